//! Revocation as a mount does it: on request, when the keys' owner takes them back, or when nobody has read for long.
//!
//! In: requests of the control socket, the state of whoever lends the keys, the clock. Out: models locked and served again.
//! Promises: a lock waits for no reader and for no unlock; an unlock that a lock overtakes is undone before it serves; keys
//! are read again from their sources, never kept for later.
//! Not here: how plaintext is taken back (`fuse::guard`, `cache`), what the socket looks like (`control`).
//! Held by: tests/lock.rs.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::mounted::blocks_told;
use crate::cache::{LockReport, Model};
use crate::catalog::{self, Catalog, CatalogAt};
use crate::config::Access;
use crate::control::{self, AccessRequest, Taken};
use crate::crypto::ModelKeys;
use crate::error::{Code, Error, Result};
use crate::fuse::{ModelFs, Session};
use crate::models::{Lost, Reopened};
use crate::reading::Reading;
use crate::refuse;
use crate::store::StoreUrl;
use crate::telemetry::events::{Event, Kind, Severity, Subject};
use crate::vfs::NodeId;

/// How often the idle limit is looked at: a twentieth of it, within these.
const IDLE_LOOK: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Why it is locked when somebody at the control socket said so.
const ASKED: &str = "asked to";

/// Reads the keys of one model again.
type Opener<'r> = Box<dyn Fn(&Model) -> Result<ModelKeys> + 'r>;

/// Locks and unlocks the models of one mount.
pub struct Revoker {
    fs: ModelFs,
    store: StoreUrl,
    access: Access,
    runtime: tokio::runtime::Handle,
    /// Held while models change between locked and served; never while anything is asked of store or key source.
    change: Mutex<()>,
    /// Locks so far: versions that were opened before the last of them are not shown.
    locks: AtomicU64,
}

impl Revoker {
    pub fn new(fs: ModelFs, store: StoreUrl, access: Access, runtime: tokio::runtime::Handle) -> Arc<Revoker> {
        Arc::new(Revoker { fs, store, access, runtime, change: Mutex::new(()), locks: AtomicU64::new(0) })
    }

    pub fn answer(&self, request: AccessRequest, mountpoint: &Path) -> Result<Value> {
        match request {
            AccessRequest::Lock { model } => self.lock(model.as_deref(), ASKED),
            AccessRequest::Unlock { model } => self.unlock(model.as_deref()),
            AccessRequest::Sessions => Ok(self.sessions(mountpoint)),
            AccessRequest::ShutOut { session, seconds, hard } => {
                self.shut_out(&session.parse()?, seconds.map(Duration::from_secs), hard, mountpoint)
            }
            AccessRequest::LetIn { session } => {
                let session: Session = session.parse()?;
                let was = self.fs.let_in(&session);
                tracing::warn!("let in again: {session}");
                Ok(json!({"session": session.to_string(), "was_shut_out": was}))
            }
        }
    }

    fn named(&self, name: Option<&str>) -> Result<Vec<Arc<Model>>> {
        let models = self.fs.vfs().models();
        let models: Vec<Arc<Model>> =
            models.iter().filter(|model| name.is_none_or(|name| name == model.name)).cloned().collect();
        match name {
            Some(name) if models.is_empty() => {
                Err(Error::new(Code::NotFound, format!("model {name} is not in this mount; see `modelfs status`")))
            }
            _ => Ok(models),
        }
    }

    fn of(&self, model: &Model, event: Event) -> Event {
        event.subject(Subject { store: Some(self.store.to_string()), ..model.subject() })
    }

    fn tell(&self, model: &Model, event: Event) {
        self.access.store.telemetry.events.tell(&self.of(model, event));
    }

    /// Locks one model or all. Blocking for as long as wiping takes; from its first moments on nothing is served.
    pub fn lock(&self, name: Option<&str>, why: &str) -> Result<Value> {
        let mut models = self.named(name)?;
        let started = Instant::now();
        // Before waiting for anyone: what is under way does not count from here on.
        self.locks.fetch_add(1, Ordering::SeqCst);
        for model in &models {
            model.lock();
        }
        let _change = self.change.lock().expect("a thread died holding the change of locks");
        // Once more: a version that was shown at the last moment is locked with the others.
        for model in self.named(name).unwrap_or_default() {
            if !models.iter().any(|other| Arc::ptr_eq(other, &model)) {
                models.push(model);
            }
        }
        let report = self.fs.lock(&models);
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        let seconds = started.elapsed().as_secs_f64();
        tracing::warn!(
            wiped_bytes = report.wiped_bytes,
            unwiped_bytes = report.unwiped_bytes,
            seconds,
            "locked {}: {why}",
            names.join(", ")
        );
        // Nobody asked: somebody should look why the keys are gone.
        let severity = if why == ASKED { Severity::Medium } else { Severity::High };
        for model in &models {
            self.tell(model, Event::new(Kind::Lock).severity(severity).detail(why));
        }
        report.tell_what_is_left();
        if report.kept_bytes > 0 {
            return Err(Error::new(
                Code::Host,
                format!("locked, but {} bytes of plaintext are still in memory; stop the mount", report.kept_bytes),
            ));
        }
        Ok(json!({
            "locked": names,
            "wiped_bytes": report.wiped_bytes,
            "unwiped_bytes": report.unwiped_bytes,
            "seconds": seconds,
        }))
    }

    /// Whether no lock is under way any more. One that is has what it cut off, which the cache knows nothing of: the end of the
    /// process would give it back as it is.
    pub(super) fn settled(&self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while let Err(TryLockError::WouldBlock) = self.change.try_lock() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// Locks so far, for [`Revoker::if_unlocked_since`].
    pub(super) fn locks(&self) -> u64 {
        self.locks.load(Ordering::SeqCst)
    }

    /// Leave to show versions that were opened since there were `seen` locks: while it is held no lock ends, and the next one
    /// takes them along.
    ///
    /// # Errors
    /// `LOCKED` if a lock came meanwhile.
    pub(super) fn if_unlocked_since(&self, seen: u64) -> Result<MutexGuard<'_, ()>> {
        let change = self.change.lock().expect("a thread died holding the change of locks");
        if self.locks() != seen || self.fs.vfs().models().iter().any(|model| model.is_locked()) {
            refuse!(Locked, "locked while new versions were being opened; none is shown, `modelfs unlock` first");
        }
        Ok(change)
    }

    /// What reads the keys of one of our models again by `access`, for the very version that is mounted.
    pub(super) fn opener(&self, access: Access) -> Result<Opener<'_>> {
        if matches!(self.store, StoreUrl::VaultKv { .. }) {
            let records = catalog::records(access.connected.as_ref())?;
            let catalog = Arc::new(Catalog::new(CatalogAt::try_from(&self.store)?, access, records)?);
            return Ok(Box::new(move |model| {
                let opened = self.runtime.block_on(catalog.open(&model.name))?;
                if opened.digest != model.digest {
                    refuse!(Stale, "record {} names another version now; mount again", model.name);
                }
                Ok(opened.opened.1)
            }));
        }
        let reading = Reading::with_prompt(self.store.clone(), access, &nobody_to_ask)?;
        Ok(Box::new(move |model| {
            let resolved = self.runtime.block_on(reading.resolve_digest(&model.name, model.digest))?;
            Ok(reading.unlock(&resolved)?.1)
        }))
    }

    /// Logs in to Vault again if that is lost, reads the keys again and serves the very versions that were mounted, with an
    /// empty cache. All that are asked for, or none.
    ///
    /// # Errors
    /// What refused the keys; with nothing locked, what refused the login; `AUDIT` if it must be recorded and cannot be.
    fn unlock(&self, name: Option<&str>) -> Result<Value> {
        let counted = |model: Arc<Model>| (model.locks(), model);
        let locked: Vec<_> = self.named(name)?.into_iter().filter(|model| model.is_locked()).map(counted).collect();
        let mut opened = Vec::with_capacity(locked.len());
        let lost = self.access.connected.as_ref().filter(|vault| vault.state().is_lost());
        // The operator says that we may ask again, whether or not anything was locked for it.
        let came_back = lost.map(|vault| vault.forgive());
        if let Some(credentials) = &self.access.store.credentials {
            credentials.forgive();
        }
        if let Some(Err(refused)) = came_back {
            if locked.is_empty() {
                return Err(refused.context("Vault is still lost to this mount"));
            }
            // A key from elsewhere may open them all the same.
            tracing::warn!("{}", refused.chain());
        }
        if !locked.is_empty() {
            let opener = self.opener(self.access.clone())?;
            for (locks, model) in locked {
                let keys = opener(&model).map_err(|error| {
                    self.tell(&model, Event::new(Kind::Unlock).severity(Severity::Medium).error(&error));
                    let rule = "an unlock reads keys again; those of the environment are gone once read";
                    error.context(format!("model {} stays locked ({rule})", model.name))
                })?;
                opened.push((model, keys, locks));
            }
        }
        // On record before anything is served by them.
        for (model, ..) in &opened {
            let read = self.of(model, Event::new(Kind::Rotation).detail("its keys were read anew"));
            let recorded = self.access.store.telemetry.events.emit(&read);
            recorded.map_err(|error| error.context(format!("model {} stays locked", model.name)))?;
        }
        let _change = self.change.lock().expect("a thread died holding the change of locks");
        // Before anything is served: for the watcher of idleness the time of whoever is to come begins now.
        self.fs.note_use();
        let mut unlocked: Vec<Arc<Model>> = Vec::with_capacity(opened.len());
        for (model, keys, locks) in opened {
            if !model.unlock(keys, locks) {
                // All or none: what was served for a moment goes again, with what was read of it.
                self.fs.lock(&unlocked).tell_what_is_left();
                let name = &model.name;
                refuse!(Locked, "{name} was locked again while the keys were being read; nothing was unlocked");
            }
            unlocked.push(model);
        }
        let names: Vec<&str> = unlocked.iter().map(|model| model.name.as_str()).collect();
        for model in &unlocked {
            self.tell(model, Event::new(Kind::Unlock));
        }
        if !names.is_empty() {
            tracing::warn!("unlocked {}", names.join(", "));
        }
        let mut done = json!({"unlocked": names});
        if let Some(vault) = lost {
            done["vault"] = json!(vault.state().name());
        }
        Ok(done)
    }

    /// Reads the keys again of versions that were locked because no mount had a right to them: this one has it again.
    ///
    /// # Errors
    /// What refused the keys of any of them.
    pub(super) fn reopen(&self, lost: Vec<Lost>) -> Result<Vec<Reopened>> {
        let opener = self.opener(self.access.clone())?;
        let reopen = |lost: Lost| {
            let keys = opener(&lost.model).map_err(|error| {
                self.tell(&lost.model, Event::new(Kind::Unlock).severity(Severity::Medium).error(&error));
                error.context(format!("the keys of {} could not be read again", lost.model.name))
            })?;
            self.tell(&lost.model, Event::new(Kind::Rotation).detail("its keys were read anew"));
            Ok(lost.opened(keys))
        };
        lost.into_iter().map(reopen).collect()
    }

    fn path_of(&self, node: NodeId, mountpoint: &Path) -> Option<PathBuf> {
        let (model, file, _) = self.fs.vfs().file(node)?;
        let path = model.manifest.path(&model.manifest.files()[file as usize]);
        Some(mountpoint.join(&model.name).join(path))
    }

    fn sessions(&self, mountpoint: &Path) -> Value {
        let taken: Vec<Taken> = self
            .fs
            .open_by()
            .into_iter()
            .filter_map(|open| {
                let path = self.path_of(open.node, mountpoint)?;
                let passthrough = open.passthrough;
                Some(Taken { pid: open.pid, uid: open.uid, since: open.since, path, passthrough })
            })
            .collect();
        let sessions = control::sessions(mountpoint, &taken, |uid, process| self.fs.is_shut_out(uid, process));
        let rules: Vec<Value> = self
            .fs
            .shut_out_now()
            .into_iter()
            .map(|(session, left)| json!({"session": session.to_string(), "seconds_left": left.map(|left| left.as_secs())}))
            .collect();
        json!({"mountpoint": mountpoint, "sessions": sessions, "shut_out": rules, "blocked": blocks_told(&self.fs)})
    }

    fn shut_out(&self, session: &Session, time: Option<Duration>, hard: bool, mountpoint: &Path) -> Result<Value> {
        let done = self.fs.shut_out(session.clone(), time, hard)?;
        tracing::warn!(hard, "shut out: {session}");
        let gone: Vec<PathBuf> = done.taken_away.iter().filter_map(|node| self.path_of(*node, mountpoint)).collect();
        // After the fact, so that what it opened meanwhile is told too.
        let told = self.sessions(mountpoint);
        let still: Vec<&Value> = told["sessions"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|it| it["shut_out"] == true)
            .filter(|it| {
                let has = |file: &&Value| file["mapped"] == true || file["passthrough"].as_u64() > Some(0);
                let mut files = it["files"].as_array().into_iter().flatten().filter(has);
                files.any(|file| !gone.iter().any(|path| file["path"].as_str().map(Path::new) == Some(path.as_path())))
            })
            .map(|it| &it["pid"])
            .collect();
        // What was kept is told to whoever asked, below.
        LockReport { kept_bytes: 0, ..done.report }.tell_what_is_left();
        if done.report.kept_bytes > 0 {
            return Err(Error::new(
                Code::Host,
                format!(
                    "{session} is shut out, but {} bytes that it has past the daemon could not be taken away; try again, or \
                     `modelfs lock` the model",
                    done.report.kept_bytes
                ),
            ));
        }
        Ok(json!({
            "session": session.to_string(),
            "seconds": time.map(|time| time.as_secs()),
            "plain_handles_refused": done.plain_handles,
            "passthrough_handles": done.passthrough_handles,
            "objects_retired": done.objects_retired,
            "wiped_bytes": done.report.wiped_bytes,
            "unwiped_bytes": done.report.unwiped_bytes,
            "hard": hard,
            "still_reading_pids": still,
        }))
    }

    /// Locks everything as soon as `lost` says of a state why the keys are lost to us, and again whenever it says so anew.
    pub fn lock_when_lost<T: Send + Sync + 'static>(
        self: &Arc<Self>,
        mut state: watch::Receiver<T>,
        lost: impl Fn(&T) -> Option<String> + Send + 'static,
    ) -> tokio::task::JoinHandle<()> {
        let revoker = self.clone();
        self.runtime.spawn(async move {
            loop {
                let why = lost(&state.borrow_and_update());
                if let Some(why) = why {
                    revoker.lock_in_background(format!("the keys were taken back: {why}")).await;
                }
                if state.changed().await.is_err() {
                    return;
                }
            }
        })
    }

    /// Locks everything once no file was open, mapped or read for `limit`.
    pub fn lock_when_idle(self: &Arc<Self>, limit: Duration) -> tokio::task::JoinHandle<()> {
        let revoker = self.clone();
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep((limit / 20).clamp(IDLE_LOOK.0, IDLE_LOOK.1)).await;
                let fs = revoker.fs.clone();
                // Asks the kernel about every whole object.
                let in_use = tokio::task::spawn_blocking(move || fs.is_in_use()).await.unwrap_or(true);
                if in_use {
                    revoker.fs.note_use();
                } else if revoker.is_idle(limit) {
                    revoker.lock_in_background(format!("nobody read for {} s", limit.as_secs())).await;
                }
            }
        })
    }

    /// Whether it was left alone for `limit` and has anything to lock.
    fn is_idle(&self, limit: Duration) -> bool {
        // In this order: an unlock counts as use before it serves.
        self.fs.vfs().models().iter().any(|model| !model.is_locked()) && self.fs.last_used().elapsed() >= limit
    }

    async fn lock_in_background(self: &Arc<Self>, why: String) {
        let revoker = self.clone();
        let locked = tokio::task::spawn_blocking(move || revoker.lock(None, &why)).await;
        if let Ok(Err(error)) = locked {
            tracing::error!("{}", error.chain());
        }
    }
}

/// A daemon has no terminal, and whoever asks for an unlock is at another.
fn nobody_to_ask(what: &str) -> Result<crate::mem::LockedBuf> {
    Err(Error::new(
        Code::Usage,
        format!("the {what} typed at the mount is not kept; mount again, or give it by passphrase-file or Vault"),
    ))
}
