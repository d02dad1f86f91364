//! Which versions a mount shows: opened at the start, looked for again when asked, let go when nobody needs them.
//!
//! In: selectors as typed, and everything that decides what may be believed ([`Reading`]). Out: models in the tree (`vfs`),
//! one of each name current; versions that left, wiped.
//! Promises: a reload judges as the mount did, and changes everything it was asked for or nothing; `current` is switched in
//! one step; a version that is not current stays while it is open, mapped, or somebody's working directory, and for a time
//! after its last use; then its nodes are gone, its keys dropped, its memory wiped.
//! Not here: what is believed (`keys`), where versions lie in the tree (`vfs`), who asks (`daemon`).
//! Held by: tests/versions_view.rs.

mod pool;

pub use pool::{Lost, Pool, Reopened, Tenant};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt, TryStreamExt};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::cache::Model;
use crate::catalog::{self, Catalog, CatalogAt};
use crate::config::MountPlan;
use crate::crypto::Verify;
use crate::error::{Class, Code, Error, Result};
use crate::format::ManifestDigest;
use crate::fuse::ModelFs;
use crate::keys::Resolved;
use crate::policy::types::Admits;
use crate::reading::Reading;
use crate::refuse;
use crate::store::StoreUrl;
use crate::telemetry::events::{Event, Kind, Severity, Subject};
use crate::vfs::{CURRENT, Shown};

/// Models opened at once when a whole store is mounted: each costs a handful of small requests.
const OPENINGS_MAX: usize = 16;

/// How often versions that are not current are looked at, at most.
pub const SWEEP_PERIOD: Duration = Duration::from_secs(1);

/// How long the kernel has to say that it forgot what it was told to drop.
const FORGET_WAIT: Duration = Duration::from_millis(500);

/// A version that the kernel did not let go of (it is a working directory, say) is asked for again after this.
const RETRY_AFTER: Duration = Duration::from_secs(30);

/// What one selector means now.
struct Selected {
    selector: String,
    name: String,
    digest: ManifestDigest,
}

/// Everything needed to open models, and what was opened.
pub struct Versions {
    tenant: Tenant,
    table: Mutex<Option<Table>>,
    stop: watch::Sender<bool>,
    retire_after: Duration,
}

struct Table {
    reading: Reading,
    verify: Verify,
    admits: Admits,
    selected: Vec<Selected>,
    /// When the kernel last kept a version that nothing else kept.
    kept: HashMap<u32, Instant>,
    /// Out of the tree, keys gone, memory not yet.
    leaving: Vec<Arc<Model>>,
}

/// Resolves, verifies and unlocks every model of the plan.
///
/// A model that was named must open. Of a whole store, models that no given key opens or nobody vouches for are left out
/// with a warning; one that was tampered with refuses the mount. The first selector of a name says which is current.
///
/// # Errors
/// `NOT_FOUND` if the store tells no names; `NO_KEY` if nothing opened; what refused a model.
pub async fn open(plan: &MountPlan, tenant: Tenant) -> Result<(Vec<Shown>, Versions)> {
    if matches!(plan.store, StoreUrl::VaultKv { .. }) {
        if plan.versions {
            refuse!(Usage, "a catalog's records name their versions themselves; drop --versions");
        }
        let shown = open_catalog(plan, &tenant).await?;
        return Ok((shown, Versions::fixed(plan, tenant)));
    }
    let reading = Reading::new(plan.store.clone(), plan.access.clone())?;
    let named = !plan.models.is_empty();
    let selectors = if named { plan.models.clone() } else { reading.model_names().await? };
    if selectors.is_empty() {
        return Err(Error::new(
            Code::NotFound,
            format!("store {} holds no model that tells its name; name one with --model", plan.store),
        ));
    }
    let mut table = Table {
        reading,
        verify: plan.verify,
        admits: admits(plan),
        selected: Vec::new(),
        kept: HashMap::new(),
        leaving: Vec::new(),
    };
    let mut shown: Vec<Shown> = Vec::new();
    let answers: Vec<(String, Result<Resolved>)> = stream::iter(selectors)
        .map(|selector| async {
            let resolved = table.reading.resolve(&selector).await;
            (selector, resolved)
        })
        .buffered(OPENINGS_MAX)
        .collect()
        .await;
    for (selector, resolved) in answers {
        let must = named || plan.requires(&selector);
        // One after the other: unlocking may ask for a passphrase, and deriving a key takes the memory of one.
        let opened = resolved.and_then(|resolved| {
            let known = |one: &&Shown| one.model.name == resolved.name && one.model.digest == resolved.digest;
            match shown.iter().find(known) {
                Some(known) => Ok((known.model.clone(), false)),
                None => table.unlock(resolved, &tenant).map(|model| (model, true)),
            }
        });
        match opened {
            Ok((model, new)) => {
                let current = table.selected.iter().all(|other| other.name != model.name);
                table.selected.push(Selected { selector, name: model.name.clone(), digest: model.digest });
                if new {
                    shown.push(Shown { model, current });
                }
            }
            Err(error) if !must && matches!(error.class(), Class::Denied | Class::Usage) => {
                tracing::warn!("model {selector} is left out: {}", error.chain());
                tell_left_out(plan, &selector, &error);
            }
            Err(error) => return Err(error.context(format!("cannot open model {selector}"))),
        }
    }
    if shown.is_empty() {
        return Err(Error::new(Code::NoKey, format!("no model of {} could be opened", plan.store)));
    }
    // Without versions nothing is ever opened again: what opens is let go of.
    let table = plan.versions.then_some(table);
    Ok((shown, Versions { table: Mutex::new(table), ..Versions::fixed(plan, tenant) }))
}

/// What the operator lets be mounted.
pub fn admits(plan: &MountPlan) -> Admits {
    Admits { max_model_size: plan.max_model_size, deny_types: plan.deny_types.clone() }
}

fn tell_left_out(plan: &MountPlan, model: &str, error: &Error) {
    let subject = Subject {
        mountpoint: Some(plan.mountpoint.clone()),
        store: Some(plan.store.to_string()),
        model: Some(model.to_owned()),
        ..Subject::default()
    };
    let event = Event::new(Kind::Mount).severity(Severity::Medium).subject(subject).error(error);
    plan.access.store.telemetry.events.tell(&event);
}

/// The same for the records of a catalog, each of which names one version itself.
async fn open_catalog(plan: &MountPlan, tenant: &Tenant) -> Result<Vec<Shown>> {
    let at = CatalogAt::try_from(&plan.store)?;
    let catalog = Arc::new(Catalog::new(at, plan.access.clone(), catalog::records(plan.access.connected.as_ref())?)?);
    let named = !plan.models.is_empty();
    let names = if named { plan.models.clone() } else { catalog.names().await? };
    if let Some(name) = names.iter().find(|name| name.contains('@')) {
        refuse!(
            Usage,
            "a record names its version itself; write --model {} instead of {name}",
            crate::config::bare(name)
        );
    }
    let catalog = &catalog;
    let mut opened = stream::iter(names)
        .map(|name| async move {
            let opened = catalog.open(&name).await;
            (name, opened)
        })
        .buffered(OPENINGS_MAX);
    let (mut models, admits) = (Vec::new(), admits(plan));
    while let Some((name, opened)) = opened.next().await {
        let must = named || plan.requires(&name);
        let opened = opened.and_then(|record| {
            admits.check(&record.name, &record.opened.0)?;
            Ok(record)
        });
        match opened {
            Ok(record) => {
                let model = tenant.model(record.name, record.digest, record.opened, record.source, plan.verify)?;
                models.push(Shown { model, current: true });
            }
            Err(error) if !must && matches!(error.class(), Class::Denied | Class::Usage) => {
                tracing::warn!("record {name} is left out: {}", error.chain());
                tell_left_out(plan, &name, &error);
            }
            Err(error) => return Err(error.context(format!("cannot open model {name}"))),
        }
    }
    if models.is_empty() {
        return Err(Error::new(Code::NoKey, format!("no model of {} could be opened", plan.store)));
    }
    Ok(models)
}

impl Table {
    fn unlock(&self, resolved: Resolved, tenant: &Tenant) -> Result<Arc<Model>> {
        let opened = self.reading.unlock(&resolved)?;
        self.admits.check(&resolved.name, &opened.0)?;
        let expires_at = resolved.reference.as_ref().map(|reference| reference.expires_at);
        let model = tenant.model(resolved.name, resolved.digest, opened, self.reading.store.clone(), self.verify)?;
        model.vitals.set_expires_at(expires_at.unwrap_or(i64::MAX));
        Ok(model)
    }

    /// Resolves the selectors of `only`, or all, in their order. One refusal refuses all.
    async fn resolve(&self, only: Option<&str>) -> Result<Vec<(usize, Resolved)>> {
        let wanted = self.selected.iter().enumerate().filter(|(_, one)| only.is_none_or(|name| one.name == name));
        let resolving = wanted.map(|(index, one)| async move {
            let resolved = self.reading.resolve(&one.selector).await;
            let resolved = resolved.map_err(|error| error.context(format!("cannot reload {}", one.selector)))?;
            Ok((index, resolved))
        });
        stream::iter(resolving.collect::<Vec<_>>()).buffered(OPENINGS_MAX).try_collect().await
    }

    fn is_selected(&self, model: &Model) -> bool {
        self.selected.iter().any(|one| one.name == model.name && one.digest == model.digest)
    }
}

impl Versions {
    /// What is never resolved again.
    fn fixed(plan: &MountPlan, tenant: Tenant) -> Versions {
        Versions { tenant, table: Mutex::new(None), stop: watch::Sender::new(false), retire_after: plan.retire_after }
    }

    /// Resolves what was asked for again, of one model or all, and makes what it means now current. Blocking; from a thread
    /// outside the runtime that `runtime` names, or one of its blocking threads. `may_show` is asked when all is opened and
    /// nothing shown yet; what it gives is held until all is shown.
    ///
    /// # Errors
    /// `USAGE` if the mount does not show versions or has no such model; whatever refused a version: then nothing changed.
    pub fn reload<Leave>(
        &self,
        only: Option<&str>,
        fs: &ModelFs,
        runtime: &tokio::runtime::Handle,
        may_show: impl FnOnce() -> Result<Leave>,
    ) -> Result<Value> {
        let mut guard = self.table.lock().expect("a thread died holding the versions");
        let Some(table) = guard.as_mut() else {
            refuse!(Usage, "this mount is bound to the versions it began with; mount with --versions to reload");
        };
        if let Some(name) = only
            && table.selected.iter().all(|one| one.name != name)
        {
            refuse!(Usage, "no model {name} is mounted here; `modelfs status` lists them, by their plain names");
        }
        let mut stop = self.stop.subscribe();
        let resolved = runtime.block_on(async {
            tokio::select! {
                resolved = table.resolve(only) => resolved,
                _ = stop.wait_for(|stopped| *stopped) => Err(Error::new(Code::Stopping, "the filesystem is stopping")),
            }
        })?;
        let vfs = fs.vfs();
        let mut shown = vfs.shown();
        let before: HashMap<String, u64> = shown
            .iter()
            .filter(|one| one.current)
            .map(|one| (one.model.name.clone(), one.model.manifest.header().seq))
            .collect();
        // Everything that can be refused is refused here, before anything changes.
        let mut new = Vec::new();
        let opened = self.open_new(table, resolved, &mut shown, &mut new).and_then(|meant| {
            let leave = may_show()?;
            new.iter().try_for_each(|model| vfs.add(model))?;
            Ok((leave, meant))
        });
        let (_leave, meant) = match opened {
            Ok(meant) => meant,
            Err(refused) => {
                for model in new.iter().filter(|model| self.tenant.leave(model)) {
                    model.wipe_keys();
                }
                return Err(refused);
            }
        };
        let mut answer = Vec::new();
        for (index, model) in meant {
            table.selected[index].digest = model.digest;
            let first = table.selected.iter().position(|one| one.name == model.name) == Some(index);
            if !first {
                continue;
            }
            let changed = vfs.set_current(model.serial);
            if let Some(folder) = changed {
                fs.drop_name(folder, CURRENT.as_bytes());
            }
            let (seq, was) = (model.manifest.header().seq, before.get(&model.name));
            if changed.is_some() {
                tracing::info!(model = %model.name, version = seq, before = was, "current");
            }
            answer.push(json!({
                "name": model.name,
                "before": was,
                "version": seq,
                "manifest": format!("sha256:{}", model.digest),
                "changed": changed.is_some(),
            }));
        }
        Ok(json!({ "models": answer }))
    }

    /// The models that the selectors mean now, by the selectors' numbers; `new`: those that were not shown yet.
    fn open_new(
        &self,
        table: &Table,
        resolved: Vec<(usize, Resolved)>,
        shown: &mut Vec<Shown>,
        new: &mut Vec<Arc<Model>>,
    ) -> Result<Vec<(usize, Arc<Model>)>> {
        let mut meant = Vec::new();
        for (index, resolved) in resolved {
            let (seq, digest) = (resolved.header.seq, resolved.digest);
            let same_place =
                shown.iter().find(|one| one.model.name == resolved.name && one.model.manifest.header().seq == seq);
            let model = match same_place {
                Some(one) if one.model.digest == digest => {
                    if let Some(reference) = &resolved.reference {
                        one.model.vitals.set_expires_at(reference.expires_at);
                    }
                    one.model.clone()
                }
                Some(one) => refuse!(
                    Usage,
                    "version {seq} of {} is shown with manifest sha256:{}, {} now means sha256:{digest} with the same number; mount it elsewhere",
                    resolved.name,
                    one.model.digest,
                    table.selected[index].selector
                ),
                None => {
                    let context = format!("cannot reload {}", table.selected[index].selector);
                    let model = table.unlock(resolved, &self.tenant).map_err(|error| error.context(context))?;
                    shown.push(Shown { model: model.clone(), current: false });
                    new.push(model.clone());
                    model
                }
            };
            meant.push((index, model));
        }
        Ok(meant)
    }

    /// Lets versions go that nothing needs any more, and wipes what is left of earlier ones. Blocking: from a thread that
    /// answers no request of the kernel. Does nothing while a reload is under way.
    pub fn sweep(&self, fs: &ModelFs) {
        let mut guard = match self.table.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::WouldBlock) => return,
            Err(TryLockError::Poisoned(_)) => panic!("a thread died holding the versions"),
        };
        let Some(table) = guard.as_mut() else { return };
        let cache = fs.reader().cache();
        for Shown { model, current } in fs.vfs().shown() {
            let serial = model.serial;
            let kept = table.kept.get(&serial).is_some_and(|since| since.elapsed() < RETRY_AFTER);
            if current || kept || table.is_selected(&model) || !fs.vfs().is_idle(serial, self.retire_after) {
                continue;
            }
            if cache.is_held(serial) {
                continue;
            }
            match take_out(fs, serial) {
                Some(model) => {
                    tracing::info!(model = %model.name, version = model.manifest.header().seq, "retired");
                    table.kept.remove(&serial);
                    if self.tenant.leave(&model) {
                        model.wipe_keys();
                        table.leaving.push(model);
                    }
                }
                None => drop(table.kept.insert(serial, Instant::now())),
            }
        }
        table.leaving.retain(|model| {
            let report = cache.wipe_model(model.serial);
            tracing::debug!(model = %model.name, wiped = report.wiped_bytes, held = report.held_bytes, "wiped");
            report.held_objects > 0
        });
    }

    /// The end: no reload goes on or begins, the keys that open models are dropped. What no other mount shows is to be
    /// wiped now.
    pub fn close(&self) -> Vec<Arc<Model>> {
        self.stop.send_replace(true);
        let table = self.table.lock().expect("a thread died holding the versions").take();
        let mut last = self.tenant.leave_all();
        last.extend(table.into_iter().flat_map(|table| table.leaving));
        last
    }

    /// [`Tenant::refuse`]
    pub fn refuse(&self) {
        self.tenant.refuse();
    }

    /// [`Tenant::regain`]
    #[must_use = "it has no right yet if any are answered"]
    pub fn regain(&self, opened: Vec<Reopened>) -> Vec<Lost> {
        self.tenant.regain(opened)
    }

    /// How often [`Versions::sweep`] is to be called; `None`: never.
    pub fn sweep_period(&self) -> Option<Duration> {
        let shows = self.table.lock().expect("a thread died holding the versions").is_some();
        shows.then(|| SWEEP_PERIOD.min((self.retire_after / 2).max(Duration::from_millis(50))))
    }
}

/// Has the kernel drop the names of a version, and takes it out of the tree if it then knows none of its nodes.
fn take_out(fs: &ModelFs, serial: u32) -> Option<Arc<Model>> {
    let (folder, name) = fs.vfs().place(serial)?;
    let version = fs.vfs().lookup(folder, name.as_bytes())?;
    let is_forgotten = || {
        let until = Instant::now() + FORGET_WAIT;
        while fs.vfs().is_known(serial) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        !fs.vfs().is_known(serial)
    };
    fs.drop_name(folder, CURRENT.as_bytes());
    fs.drop_name(folder, name.as_bytes());
    if !is_forgotten() {
        // A folder that was somebody's working directory lost its name at an earlier try, and is kept by what was looked up
        // below it since.
        for (_, _, child) in (2..).map_while(|position| fs.vfs().entry(version, position)) {
            fs.drop_name(version, &child);
        }
        is_forgotten();
    }
    fs.vfs().retire(serial)
}
