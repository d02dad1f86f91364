//! One mount of a process, from its start to its end.
//!
//! Promises: no partial mount; `umount`, `modelfs umount` and the end of the process all leave nothing readable that no
//! other mount shows; when programs still hold files after the grace the mount is detached, everything that nobody holds is
//! wiped, and the holders are named (`HELD`). One that is abandoned ends the same way and stays in the tree, dead.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::Host;
use super::lock::Revoker;
use super::profiling::{Profiling, current_models};
use crate::cache::HotGate;
use crate::config::oversight::HttpPlan;
use crate::config::{MountPlan, OnKeyLoss};
use crate::control::{self, AccessRequest, ControlServer, ControlTarget, MapRequest};
use crate::crypto::Verify;
use crate::doctor;
use crate::error::{Code, Error, Result};
use crate::format::limits::CHUNK_LOG2_DEFAULT;
use crate::fuse::attach::{self, Attachment, BackgroundSession, MountLook};
use crate::fuse::{Behaviour, ModelFs, Place};
use crate::models::admits;
use crate::models::{self, Versions};
use crate::notify;
use crate::policy::{Blocked, Policy};
use crate::read::Reader;
use crate::reading;
use crate::ready;
use crate::refuse;
use crate::store::{self, StoreOptions};
use crate::telemetry::events::{Actor, Event, Kind, Severity, Subject};
use crate::vault::{Vault, VaultState};
use crate::vfs::{Layout, Ownership, Vfs};

/// How long stopping waits for programs to let go before it detaches the mount.
pub const HOLD_GRACE: Duration = Duration::from_secs(10);

/// How often it looks meanwhile.
const HOLD_POLL: Duration = Duration::from_millis(50);

/// How long the kernel has to end a session whose mount is gone, before readers are refused: another mount namespace may still
/// have it.
const SESSION_GRACE: Duration = Duration::from_secs(1);

/// How much longer it is waited for then: a machine that stands still gives our thread no time to see the end, and what was
/// unmounted is not to be called held for that.
const SESSION_PATIENCE: Duration = Duration::from_secs(9);

/// How long the end waits for a lock that is overwriting: 0.2 s a GiB, on a machine that does nothing else.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);

/// How much later than the store's own budget a read gives up: the refetch after a wrong hash has its own.
const READ_DEADLINE_SLACK: Duration = Duration::from_secs(2);

/// How often it is looked whose time of being refused is over.
const BLOCKS_LOOK: Duration = Duration::from_secs(1);

/// Requests that one chunk ahead of a read may take at a limited origin: its parts and hedges.
const PARTS_AHEAD_MAX: u64 = 4;

/// What a mount says of itself once programs can use it.
#[derive(Debug, Clone)]
pub struct Ready {
    pub mountpoint: PathBuf,
    pub models: Vec<String>,
    /// Whole files are served without the daemon.
    pub passthrough: bool,
}

/// Whether the kernel has closed the connection.
#[derive(Default)]
struct SessionEnd {
    over: Mutex<bool>,
    told: Condvar,
}

impl SessionEnd {
    fn end(&self) {
        *self.over.lock().expect("a thread died ending the session") = true;
        self.told.notify_all();
    }

    fn within(&self, time: Duration) -> bool {
        let over = self.over.lock().expect("a thread died ending the session");
        *self.told.wait_timeout_while(over, time, |over| !*over).expect("a thread died ending the session").0
    }

    /// Whether it is over within `grace`, or after `refuse` within `patience`.
    fn wait(&self, grace: Duration, patience: Duration, refuse: impl FnOnce()) -> bool {
        self.within(grace) || {
            refuse();
            self.within(patience)
        }
    }
}

/// Why all readers of a mount are refused. Who has refused them alone lets them in again.
#[derive(Debug, Default)]
struct Refusals {
    /// Its right was not proved anew.
    right: Option<String>,
    /// Vault has taken its token.
    vault: Option<String>,
    /// The lease of its storage credentials was revoked.
    lease: Option<String>,
}

impl Refusals {
    fn why(&self) -> Option<&str> {
        self.right.as_deref().or(self.vault.as_deref()).or(self.lease.as_deref())
    }
}

/// A running mount.
pub struct Mounted {
    pub(super) host: Arc<Host>,
    plan: MountPlan,
    fs: ModelFs,
    gate: Arc<dyn HotGate>,
    versions: Versions,
    revoker: Arc<Revoker>,
    attachment: Attachment,
    ready: Ready,
    pub(super) started: Instant,
    /// The kernel has closed the connection.
    session: SessionEnd,
    refusals: Mutex<Refusals>,
    /// It ends: nothing lets anybody in again. Not among the refusals, of which a change may wait for Vault or a wipe.
    closed: AtomicBool,
    profiling: Mutex<Option<Profiling>>,
    control: Mutex<Option<ControlServer>>,
    /// What looks after the mount: watchers of idleness, keys and versions.
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// Held while it ends.
    outcome: Mutex<Option<Result<()>>>,
    hurry: AtomicBool,
    gone: watch::Sender<bool>,
}

/// A login at Vault that no mount lives by: to prove a right, or for a mount that does not stand yet. What was lent for it is
/// given back.
struct Login(Option<Vault>);

impl Drop for Login {
    fn drop(&mut self) {
        if let Some(Err(failed)) = self.0.take().map(|vault| vault.revoke_self()) {
            tracing::debug!("our Vault token ends by itself: {}", failed.chain());
        }
    }
}

impl Mounted {
    pub(super) fn start(
        host: &Arc<Host>,
        plan: MountPlan,
        may_enter: impl FnOnce() -> Result<()>,
    ) -> Result<Arc<Mounted>> {
        let subject = subject(&plan);
        Mounted::begin(host, plan, may_enter).inspect_err(|error| {
            let events = &host.telemetry.events;
            if let Some(hostile) = Event::of_hostile(error) {
                events.tell(&hostile.subject(subject.clone()));
            }
            events.tell(&Event::new(Kind::Mount).severity(Severity::Medium).subject(subject).error(error));
        })
    }

    fn begin(host: &Arc<Host>, mut plan: MountPlan, may_enter: impl FnOnce() -> Result<()>) -> Result<Arc<Mounted>> {
        if !host.alone && plan.lock_when_idle.is_some() {
            refuse!(Usage, "lock-when-idle is for a mount of its own process; this one shares its models with others");
        }
        // A driver's volume lies where its containers or its pod see it, and nobody else.
        for doubt in plan.doubts.iter().filter(|_| host.alone) {
            tracing::warn!("{doubt}");
        }
        plan.access.store.telemetry = host.telemetry.clone();
        let mut login = Login(reading::connect(&mut plan.access)?);
        let tenant = host.pool.tenant(&plan.store);
        let (shown, versions) = host.handle.block_on(models::open(&plan, tenant))?;
        let objects = shown.iter().flat_map(|one| one.model.manifest.objects());
        let chunk_bytes = 1 << objects.map(|object| object.layout.chunk_log2()).max().unwrap_or(CHUNK_LOG2_DEFAULT);
        let fetches_max = host.cache.limits().fetches_max as u64;
        let deadline = read_deadline(&plan.access.store, fetches_max, chunk_bytes);
        let reader = Reader::sharing(host.cache.clone(), deadline, host.gather.clone());
        let layout = if plan.versions { Layout::Versions } else { Layout::Plain };
        let vfs = Vfs::with_layout(layout, shown, ownership(&plan), host.cache.clone())?;
        let policy = plan.policy.as_deref().map(|path| read_policy(host, &plan, path)).transpose()?;
        let in_force = policy.as_ref().map(|(_, event)| event.clone());
        let behaviour = Behaviour {
            open: plan.open,
            no_page_cache: plan.no_page_cache,
            no_passthrough: plan.no_passthrough,
            locked_opens: plan.locked_opens,
        };
        let fs = ModelFs::new(vfs, reader, behaviour, host.handle.clone());

        fs.set_place(Place {
            mountpoint: plan.mountpoint.clone(),
            store: plan.store.to_string(),
            service_account: plan.service_account.clone(),
            pod: plan.pod.clone(),
        });

        fs.set_policy(policy.map(|(policy, _)| policy));
        if admits(&plan).no_pickles() {
            fs.refuse_pickles();
        }
        let look = MountLook { source: plan.source.clone(), allow_other: plan.allow_other };
        let gate = fs.gate();
        host.cache.add_gate(gate.clone());
        let proven = host.handle.block_on(ready::prove(&plan, &fs.vfs().shown(), &host.cache));
        // Before anybody can read it: what must be recorded and cannot is not mounted.
        let mut shown = fs.vfs().shown().into_iter();
        let recorded = proven.and_then(|()| {
            in_force.iter().try_for_each(|event| host.telemetry.events.emit(event))?;
            shown.try_for_each(|one| {
                let place = subject(&plan);
                let subject = Subject { mountpoint: place.mountpoint, store: place.store, ..one.model.subject() };
                let actor = Actor::of_volume(&plan.service_account, &plan.pod);
                host.telemetry.events.emit(&Event::new(Kind::Mount).actor(actor).subject(subject))
            })
        });
        // Before the mount: one that nobody waits for would stay in the tree, dead, when its session ends.
        let (hand_over, begun) = mpsc::channel::<(BackgroundSession, Arc<Mounted>)>();
        let waiter = std::thread::Builder::new().name("session".into()).spawn(move || {
            let Ok((session, mounted)) = begun.recv() else { return };
            if let Err(error) = session.join() {
                tracing::warn!("the kernel's session ended with {error}");
            }
            mounted.session_ended();
        });
        let waited_for = waiter.map_err(|e| Error::new(Code::Host, "cannot start the session thread").with_source(e));
        let ready_to_enter = recorded.and(waited_for).and_then(|_| may_enter());
        let attached = ready_to_enter.and_then(|()| match &plan.given {
            Some(given) => attach::attach_given(fs.clone(), given, &look),
            None => attach::attach(fs.clone(), &plan.mountpoint, &look),
        });
        let (session, attachment) = attached.inspect_err(|_| {
            host.cache.remove_gate(&gate);
            host.wipe(versions.close());
        })?;
        let ready = Ready {
            mountpoint: attachment.mountpoint().to_owned(),
            models: current_models(&fs).iter().map(|model| model.name.clone()).collect(),
            passthrough: fs.passthrough(),
        };
        let mounted = Arc::new(Mounted {
            host: host.clone(),
            revoker: Revoker::new(fs.clone(), plan.store.clone(), plan.access.clone(), host.handle.clone()),
            plan,
            fs,
            gate,
            versions,
            attachment,
            ready,
            started: Instant::now(),
            session: SessionEnd::default(),
            refusals: Mutex::default(),
            closed: AtomicBool::new(false),
            profiling: Mutex::default(),
            control: Mutex::default(),
            tasks: Mutex::default(),
            outcome: Mutex::default(),
            hurry: AtomicBool::new(false),
            gone: watch::Sender::new(false),
        });
        hand_over.send((session, mounted.clone())).expect("the session thread waits for it");
        mounted.look_after();
        login.0 = None;
        Ok(mounted)
    }

    /// Everything that goes on beside the kernel's requests.
    fn look_after(self: &Arc<Self>) {
        let rules = control::Rules { roles: self.host.oversight.roles.clone(), telemetry: self.host.telemetry.clone() };
        let control = control::listen(self.mountpoint(), rules).and_then(|listening| {
            // Before anybody is answered: the first status tells of it.
            self.answer_beside(listening.path());
            listening.answer(self.clone())
        });
        match control {
            Ok(control) => *self.control.lock().expect("a thread died holding the control socket") = Some(control),
            // The mount is there and useful; only `modelfs status` and `modelfs umount` will not find it.
            Err(error) => tracing::warn!("no control socket: {}", error.chain()),
        }
        self.tell_what_costs_speed();
        let mut tasks = Vec::new();
        if let Some(limit) = self.plan.lock_when_idle {
            tasks.push(self.revoker.lock_when_idle(limit));
        }
        if let (OnKeyLoss::Lock, Some(vault)) = (self.plan.on_key_loss, &self.plan.access.connected) {
            tasks.push(if self.host.alone {
                self.revoker.lock_when_lost(vault.watch(), |state| match state {
                    VaultState::Lost { why } => Some(why.chain()),
                    VaultState::Idle
                    | VaultState::Live { .. }
                    | VaultState::Away { .. }
                    | VaultState::Sealed { .. } => None,
                })
            } else {
                self.refuse_while_lost(vault.watch())
            });
        }
        if let (OnKeyLoss::Lock, Some(credentials)) = (self.plan.on_key_loss, &self.plan.access.store.credentials) {
            tasks.push(if self.host.alone {
                self.revoker.lock_when_lost(credentials.watch_lost(), |lost| lost.as_ref().map(Error::chain))
            } else {
                self.refuse_while_lost(credentials.watch_lost())
            });
        }
        if self.plan.policy.is_some() {
            tasks.push(self.every(BLOCKS_LOOK, |mounted| mounted.fs.expire_blocks()));
        }
        if let Some(period) = self.versions.sweep_period() {
            tasks.push(self.every(period, |mounted| mounted.versions.sweep(&mounted.fs)));
        }
        self.tasks.lock().expect("a thread died holding the tasks").extend(tasks);
        if let Some(path) = &self.plan.profile {
            let profiling = Profiling::start(path, &self.fs, &self.host.handle);
            *self.profiling.lock().expect("a thread died holding the profiling") = Some(profiling);
        }
    }

    /// Does `work`, which may block, again and again for as long as the mount is there.
    fn every(self: &Arc<Self>, period: Duration, work: fn(&Mounted)) -> JoinHandle<()> {
        let weak = Arc::downgrade(self);
        self.host.handle.spawn(async move {
            loop {
                tokio::time::sleep(period).await;
                let Some(mounted) = weak.upgrade() else { return };
                // Ends with the runtime; a panic in there was told where it happened.
                let _ = tokio::task::spawn_blocking(move || work(&mounted)).await;
            }
        })
    }

    /// Metrics and health of a process that is one mount, where no other place was asked for: beside the control socket.
    fn answer_beside(&self, control: &Path) {
        if !self.host.alone || self.host.oversight.http.is_some() {
            return;
        }
        let beside = control.with_extension(control::HTTP_EXTENSION);
        if let Err(error) = self.host.open_server(&HttpPlan::Unix(beside)) {
            tracing::warn!("no socket for metrics: {}", error.chain());
        }
    }

    /// Where versions are shared a lost key ends one mount's right, not the others'; only what none has a right to is locked.
    fn refuse_while_lost<T: Send + Sync + 'static>(self: &Arc<Self>, mut state: watch::Receiver<T>) -> JoinHandle<()> {
        let weak = Arc::downgrade(self);
        self.host.handle.spawn(async move {
            loop {
                state.mark_unchanged();
                let Some(mounted) = weak.upgrade() else { return };
                let heeded = tokio::task::spawn_blocking(move || mounted.heed_vault()).await;
                if let Ok(Err(error)) = heeded {
                    tracing::error!("{}", error.chain());
                }
                if state.changed().await.is_err() {
                    return;
                }
            }
        })
    }

    /// Refuses readers if Vault has taken our token, or somebody the lease of our storage credentials, and that is to count
    /// here; lets them in when Vault has taken us again and the lease was forgiven.
    ///
    /// # Errors
    /// Of [`Mounted::change_refusals`].
    fn heed_vault(&self) -> Result<()> {
        let Some(vault) = &self.plan.access.connected else { return Ok(()) };
        if self.host.alone || self.plan.on_key_loss != OnKeyLoss::Lock {
            return Ok(());
        }
        let credentials = self.plan.access.store.credentials.as_ref();
        self.change_refusals(|refusals| {
            // Both are asked here, where no other is between asking and refusing: two watch, and the older word must not win.
            refusals.lease = credentials.and_then(|credentials| credentials.lost()).map(|why| why.chain());
            match vault.state() {
                VaultState::Lost { why } => refusals.vault = Some(why.chain()),
                VaultState::Live { .. } => refusals.vault = None,
                // None of these says that our token holds.
                VaultState::Idle | VaultState::Away { .. } | VaultState::Sealed { .. } => {}
            }
        })
    }

    pub fn ready(&self) -> &Ready {
        &self.ready
    }

    pub fn plan(&self) -> &MountPlan {
        &self.plan
    }

    pub fn mountpoint(&self) -> &Path {
        self.attachment.mountpoint()
    }

    pub fn fs(&self) -> &ModelFs {
        &self.fs
    }

    /// Whether it is still in the mount table of this process.
    pub fn is_mounted(&self) -> bool {
        !*self.gone.borrow() && self.attachment.is_mounted()
    }

    /// Becomes true when the mount has ended, whoever ended it.
    pub fn gone(&self) -> watch::Receiver<bool> {
        self.gone.subscribe()
    }

    /// Refuses opens and reads through the daemon on this mount alone (EACCES), until called with `None`: its right was not
    /// proved anew, or was. What programs have open or mapped past the daemon they keep while another mount has a right to
    /// it, or this one keeps it (`on-key-loss=keep`); otherwise it is wiped. Blocking for as long as that and the kernel take.
    ///
    /// # Errors
    /// With `None`, what refused the keys of a version that was locked for it: its readers stay refused, until it is said again.
    pub fn refuse(&self, why: Option<&str>) -> Result<()> {
        self.change_refusals(|refusals| refusals.right = why.map(str::to_owned))
    }

    /// The mount ends: whatever is said later, nobody is let in again.
    fn refuse_for_good(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.fs.refuse_all(true);
    }

    /// # Errors
    /// What refused the keys of a version that no mount had a right to, and that this one was to have again.
    fn change_refusals(&self, change: impl FnOnce(&mut Refusals)) -> Result<()> {
        // Held to the end, so that what is in force is what was said last.
        let mut refusals = self.refusals.lock().expect("a thread died holding the refusals");
        change(&mut refusals);
        if self.closed.load(Ordering::SeqCst) {
            return Ok(());
        }
        let was = self.fs.refuses_all();
        let mountpoint = self.mountpoint().display();
        if let Some(why) = refusals.why() {
            self.fs.refuse_all(true);
            if !was {
                tracing::warn!("{mountpoint} refuses its readers: {why}");
                self.tell(Event::new(Kind::Lock).severity(Severity::High).detail(why));
            }
            // Each time it is said: an operator may have unlocked it meanwhile. Before the pages, which reads that wait for a
            // store hold, and which a lock ends.
            if self.plan.on_key_loss == OnKeyLoss::Lock {
                self.versions.refuse();
            }
            self.fs.drop_all_pages();
        } else if was {
            // The keys first: whoever is let in reads at once.
            let mut lost = self.versions.regain(Vec::new());
            while !lost.is_empty() {
                let opened = self.revoker.reopen(lost);
                let opened = opened.map_err(|error| error.context(format!("{mountpoint} stays refused")))?;
                lost = self.versions.regain(opened);
            }
            if self.closed.load(Ordering::SeqCst) {
                return Ok(());
            }
            self.fs.refuse_all(false);
            // Said in between.
            if self.closed.load(Ordering::SeqCst) {
                self.fs.refuse_all(true);
                return Ok(());
            }
            tracing::warn!("{mountpoint} serves its readers again");
            self.tell(Event::new(Kind::Unlock));
        }
        Ok(())
    }

    /// What happened to this mount as a whole.
    fn tell(&self, event: Event) {
        self.host.telemetry.events.tell(&event.subject(subject(&self.plan)));
    }

    /// Proves once more, by a new login and with keys read anew, that this mount's own access opens every version it shows. If
    /// it does and Vault was lost to the mount, the mount logs in again too. Secrets of a login that came by the environment
    /// were used up at the mount. Blocking.
    ///
    /// # Errors
    /// What refused it; the mount stays as it is.
    pub fn recheck(&self) -> Result<()> {
        let mut access = self.plan.access.clone();
        access.connected = None;
        // What is lost proves nothing; others come with the new login.
        access.store.credentials = access.store.credentials.filter(|credentials| credentials.lost().is_none());
        let login = Login(reading::connect(&mut access)?);
        let opens = self
            .revoker
            .opener(access)
            .and_then(|opener| self.fs.vfs().models().iter().try_for_each(|model| opener(model).map(drop)));
        drop(login);
        opens?;
        if let Some(vault) = &self.plan.access.connected {
            vault.forgive()?;
            if let Some(credentials) = &self.plan.access.store.credentials {
                credentials.forgive();
            }
            self.heed_vault()?;
        }
        Ok(())
    }

    /// Reads the policy again, then resolves again what was asked for and shows what is newer ([`Versions::reload`]). A policy
    /// that is refused changes nothing; one that is good is in force whatever becomes of the versions.
    ///
    /// # Errors
    /// `USAGE` for a policy with a mistake in it; `LOCKED`; `AUDIT` if it must be recorded and cannot be; what
    /// [`Versions::reload`] refuses.
    pub fn reload(&self, model: Option<&str>) -> Result<Value> {
        let policy = match (&self.plan.policy, model) {
            (Some(path), None) => Some(self.reload_policy(path)?),
            // A model's name asks for its versions alone.
            (Some(_) | None, _) => None,
        };
        if let (Some(policy), false) = (&policy, self.plan.versions) {
            return Ok(json!({ "models": [], "policy": policy }));
        }
        let mut answer = match self.reload_versions(model) {
            Ok(answer) => answer,
            Err(error) if policy.is_some() => {
                return Err(error.context("the policy is in force, the versions are not new"));
            }
            Err(error) => return Err(error),
        };
        if let (Some(policy), Value::Object(answer)) = (policy, &mut answer) {
            answer.insert("policy".into(), policy);
        }
        Ok(answer)
    }

    fn reload_policy(&self, path: &Path) -> Result<Value> {
        let stays = |error: Error| error.context("the policy stays as it was");
        let (policy, in_force) = read_policy(&self.host, &self.plan, path).map_err(stays)?;
        let rules = policy.rules.len();
        // First: it may give, and what gives is on record before it is done.
        self.host.telemetry.events.emit(&in_force).map_err(stays)?;
        self.fs.set_policy(Some(policy));
        tracing::warn!(rules, "policy {} is in force", path.display());
        Ok(json!({ "path": path, "rules": rules }))
    }

    fn reload_versions(&self, model: Option<&str>) -> Result<Value> {
        // Before the first look: a lock that comes while versions are being opened counts.
        let locks = self.revoker.locks();
        if self.fs.vfs().models().iter().any(|model| model.is_locked()) {
            refuse!(Locked, "the mount is locked, and shows no new version either; `modelfs unlock` first");
        }
        notify::service().reloading();
        let may_show = || {
            // Before the leave is taken: a lock is not to wait for a disk.
            let event =
                Event::new(Kind::Reload).subject(subject(&self.plan)).detail("what is newer is shown from now on");
            self.host.telemetry.events.emit(&event).map_err(|error| error.context("no new version is shown"))?;
            self.revoker.if_unlocked_since(locks)
        };
        let outcome = self.versions.reload(model, &self.fs, &self.host.handle, may_show);
        notify::service().ready(&match &outcome {
            Ok(_) => self.told(),
            Err(error) => format!("{}; not reloaded: {}", self.told(), error.chain()),
        });
        match &outcome {
            Ok(_) => {
                for one in self.fs.vfs().shown().into_iter().filter(|one| one.current) {
                    let place = subject(&self.plan);
                    let subject = Subject { mountpoint: place.mountpoint, store: place.store, ..one.model.subject() };
                    self.host.telemetry.events.tell(&Event::new(Kind::Reload).subject(subject).detail("current now"));
                }
            }
            Err(error) => {
                if let Some(hostile) = Event::of_hostile(error) {
                    self.tell(hostile);
                }
                self.tell(Event::new(Kind::Reload).severity(Severity::Medium).error(error));
            }
        }
        outcome
    }

    /// What it serves, in a line for `systemctl status`.
    pub fn told(&self) -> String {
        ready::status(self.mountpoint(), &self.fs.vfs().shown())
    }

    /// Ends the grace of an `unmount` that is under way.
    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::SeqCst);
    }

    /// Unmounts, or detaches when programs still hold files after `grace`, and wipes what no other mount shows. Whoever
    /// comes second gets the first one's answer. Blocking: from a thread outside the runtime, or a blocking one.
    ///
    /// # Errors
    /// `HELD` naming who still held files; `HOST` if the kernel refused: then it is still mounted.
    pub fn unmount(&self, grace: Duration) -> Result<()> {
        self.take_off(grace, None)
    }

    /// `broken`: what ended it, if nobody did.
    fn take_off(&self, grace: Duration, broken: Option<Error>) -> Result<()> {
        let mut outcome = self.outcome.lock().expect("a thread died ending the mount");
        if let Some(known) = &*outcome {
            return known.clone();
        }
        if self.attachment.is_given() {
            // It stays in the tree until whoever made it takes it off: nothing may be left in the kernel's pages.
            self.refuse_for_good();
            self.fs.drop_all_pages();
        }
        let deadline = Instant::now() + grace;
        let mut unmounted = self.attachment.unmount()?;
        while !unmounted && Instant::now() < deadline && !self.hurry.load(Ordering::SeqCst) {
            std::thread::sleep(HOLD_POLL);
            unmounted = self.attachment.unmount()?;
        }
        let holders = if unmounted { Vec::new() } else { control::holders(self.mountpoint()) };
        if !unmounted {
            self.attachment.detach()?;
        }
        let held_bytes = self.wipe(unmounted);
        let ended = match (broken, unmounted && held_bytes == 0) {
            (Some(broken), _) => Err(broken),
            (None, true) => Ok(()),
            (None, false) => Err(self.still_held("detached", &holders, held_bytes)),
        };
        self.end(&mut outcome, ended)
    }

    /// Ends it as [`Mounted::unmount`] does, and leaves it in the tree: it refuses its readers, and from the end of this process
    /// on it answers ENOTCONN, to programs that start too. For a place where the bare folder would be taken for what was there
    /// until another process mounts anew, and clears this one away. No program is waited for. Blocking, as `unmount` is.
    ///
    /// # Errors
    /// `HELD` naming who still holds files past the daemon.
    pub fn abandon(&self) -> Result<()> {
        let mut outcome = self.outcome.lock().expect("a thread died ending the mount");
        if let Some(known) = &*outcome {
            return known.clone();
        }
        let held_bytes = self.wipe(false);
        self.drop_pages_soon();
        let ended = match held_bytes {
            0 => Ok(()),
            _ => Err(self.still_held("abandoned", &control::holders(self.mountpoint()), held_bytes)),
        };
        self.end(&mut outcome, ended)
    }

    /// What the kernel caches of files that were read through the daemon. A read that waits for a store that does not answer
    /// keeps its page: it is not waited for longer than [`SESSION_GRACE`].
    fn drop_pages_soon(&self) {
        let fs = self.fs.clone();
        let (tell, told) = mpsc::channel();
        let dropping = std::thread::Builder::new().name("drop-pages".into()).spawn(move || {
            fs.drop_all_pages();
            // Nobody listens any more only after the grace.
            let _ = tell.send(());
        });
        match dropping {
            Ok(_) if told.recv_timeout(SESSION_GRACE).is_ok() => {}
            Ok(_) => tracing::debug!("pages of {} stay with reads that are under way", self.mountpoint().display()),
            Err(error) => tracing::debug!("pages of {} stay in the kernel: {error}", self.mountpoint().display()),
        }
    }

    fn still_held(&self, how: &str, holders: &[control::Holder], held_bytes: u64) -> Error {
        Error::new(
            Code::Held,
            format!(
                "{} was {how} while in use: {}; {held_bytes} bytes stay in memory until they are let go, all else is wiped",
                self.mountpoint().display(),
                control::tell_holders(holders),
            ),
        )
    }

    fn end(&self, outcome: &mut Option<Result<()>>, ended: Result<()>) -> Result<()> {
        self.tell(match &ended {
            Ok(()) => Event::new(Kind::Unmount),
            Err(held) => Event::new(Kind::Unmount).severity(Severity::Medium).error(held),
        });
        *outcome = Some(ended.clone());
        self.gone.send_replace(true);
        ended
    }

    /// Nothing of the mount goes on, whether or not it is out of the tree. Returns the bytes that programs still hold.
    fn wipe(&self, unmounted: bool) -> u64 {
        if let Some(profiling) = self.profiling.lock().expect("a thread died holding the profiling").take() {
            profiling.stop();
        }
        for task in self.tasks.lock().expect("a thread died holding the tasks").drain(..) {
            task.abort();
        }
        let over = unmounted && self.session.wait(SESSION_GRACE, SESSION_PATIENCE, || self.refuse_for_good());
        if !over {
            self.refuse_for_good();
        }
        let last = self.versions.close();
        self.fs.drop_backings(over);
        if !self.revoker.settled(LOCK_PATIENCE) {
            tracing::error!("a lock of {} is still overwriting plaintext", self.mountpoint().display());
        }
        let (wiped_bytes, held_bytes) = self.host.wipe(last);
        tracing::info!(wiped_bytes, held_bytes, "wiped");
        let kept = self.plan.access.store.credentials.as_ref().and_then(|credentials| credentials.close());
        let ended = self.plan.access.connected.as_ref().map(|vault| vault.revoke_self());
        if let Some(Err(failed)) = &ended {
            tracing::debug!("our Vault token ends by itself: {}", failed.chain());
        }
        match kept {
            Some(error) if matches!(ended, Some(Ok(true))) => {
                tracing::debug!("a lease of storage credentials ended with our token: {}", error.chain());
            }
            Some(error) => store::tell_kept(&error),
            None => {}
        }
        self.host.forget(self);
        // Before the answer is given: whoever hears it may mount again at once. Not closed yet: that waits for replies under
        // way, of which one may be ours.
        if let Some(control) = &*self.control.lock().expect("a thread died holding the control socket") {
            control.retire();
            self.host.retire_server();
        }
        held_bytes
    }

    /// Lets replies on the control socket finish and closes it. Not from one of its threads.
    pub(crate) fn close_control(&self) {
        let mut control = self.control.lock().expect("a thread died holding the control socket");
        // With the lock held: whoever comes second waits for the replies too.
        drop(control.take());
    }

    /// The kernel has closed the connection: we unmounted, or somebody else did, or the last holder of a detached mount let
    /// go. Or it broke while it was mounted (somebody aborted it, a request could not be read): then whoever runs us is to
    /// start us again, and is not told that it ended because it should.
    fn session_ended(&self) {
        self.session.end();
        // `umount -f` cuts the connection before it takes the mount out of the tree: asked again, it is gone.
        let broken = !self.attachment.is_given() && self.attachment.is_there() && {
            std::thread::sleep(HOLD_POLL);
            self.attachment.is_there()
        };
        let broken = broken.then(|| {
            let at = self.mountpoint().display();
            Error::new(Code::Host, format!("the connection of {at} to the kernel broke although nobody unmounted it"))
        });
        if let Err(error) = self.take_off(Duration::ZERO, broken) {
            tracing::debug!("{}", error.chain());
        }
        self.attachment.close();
        self.fs.drop_backings(true);
        self.host.cache.remove_gate(&self.gate);
        self.close_control();
    }

    /// One line of the log: which rules of `modelfs doctor` find something at this mount.
    fn tell_what_costs_speed(&self) {
        let facts = doctor::Facts {
            cache_bytes: self.host.cache.budget().total(),
            mount: self.attachment.device_number().map(|device| doctor::MountFacts {
                device: device.to_owned(),
                passthrough: Some(self.fs.passthrough()),
                no_passthrough: self.plan.no_passthrough,
                huge_page_short_bytes: None,
            }),
            ..doctor::Facts::default()
        };
        let slow: Vec<String> = doctor::examine(Path::new("/"), &facts)
            .into_iter()
            .filter(|finding| finding.severity >= doctor::Severity::Warning && !finding.security)
            .map(|finding| format!("{} ({})", finding.rule, finding.seen))
            .collect();
        if !slow.is_empty() {
            let mountpoint = self.mountpoint().display();
            tracing::info!("held back by {}; `modelfs doctor {mountpoint}` tells what to do", slow.join(", "));
        }
    }
}

impl ControlTarget for Mounted {
    fn status(&self) -> Value {
        let models: Vec<_> = self
            .fs
            .vfs()
            .shown()
            .iter()
            .map(|shown| {
                let model = &shown.model;
                let header = model.manifest.header();
                json!({
                    "name": model.name,
                    "version": header.seq,
                    "current": shown.current,
                    "manifest": format!("sha256:{}", model.digest),
                    "files": model.manifest.files().len(),
                    "bytes": model.manifest.total_size() as u64,
                    "locked": model.is_locked(),
                    "resident_bytes": self.host.cache.resident_bytes(model.serial),
                })
            })
            .collect();
        let own = json!({
            "mountpoint": self.mountpoint(),
            "store": self.plan.store.to_string(),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "verify": match self.plan.verify { Verify::Strict => "strict", Verify::Aead => "aead" },
            "versions": self.plan.versions,
            "open_policy": self.plan.open.name(),
            "passthrough": self.fs.passthrough(),
            "no_passthrough": self.plan.no_passthrough,
            "refused": self.fs.refuses_all(),
            "policy": self.plan.policy.as_ref().map(|path| json!({
                "path": path,
                "rules": self.fs.policy_rules(),
            })),
            "blocked": blocks_told(&self.fs),
            "vault": self.plan.access.connected.as_ref().map(Vault::status),
            "storage_credentials": self.plan.access.store.credentials.as_ref().map(|credentials| credentials.status()),
            "open_handles": self.fs.open_handles(),
            "models": models,
        });
        let (Value::Object(mut told), Value::Object(own)) = (self.host.status(), own) else {
            unreachable!("both are objects")
        };
        told.extend(own);
        Value::Object(told)
    }

    fn map(&self, asked: &MapRequest) -> Result<Value> {
        control::map(&self.fs.vfs().shown(), &self.host.cache, asked)
    }

    fn access(&self, request: AccessRequest) -> Result<Value> {
        let unlocks = matches!(request, AccessRequest::Unlock { .. });
        let answer = self.revoker.answer(request, self.mountpoint())?;
        // Whoever was told that it is unlocked may read at once.
        match self.heed_vault() {
            Err(refused) if unlocks => Err(refused),
            Err(refused) => {
                tracing::warn!("{}", refused.chain());
                Ok(answer)
            }
            Ok(()) => Ok(answer),
        }
    }

    fn reload(&self, model: Option<&str>) -> Result<Value> {
        Mounted::reload(self, model)
    }

    fn give_way(&self) -> Result<()> {
        let (mountpoint, pid) = (self.mountpoint().display(), std::process::id());
        if self.attachment.stands() {
            refuse!(MountPoint, "the mount that pid {pid} serves is still there; `modelfs umount {mountpoint}`");
        }
        tracing::warn!(
            "another mount is at {mountpoint}: this one, taken off while in use, ends when its last file is closed, or when \
             pid {pid} is told to by SIGTERM"
        );
        self.host.retire_server();
        Ok(())
    }

    fn stop(&self) -> Result<Value> {
        self.unmount(HOLD_GRACE).map(|()| json!({ "unmounted": self.mountpoint() }))
    }
}

/// Who is refused everything after too many denials.
pub(super) fn blocks_told(fs: &ModelFs) -> Vec<Value> {
    let told = |(who, why, left): (Blocked, String, Duration)| json!({ "session": who.to_string(), "seconds_left": left.as_secs(), "why": why });
    fs.blocks().into_iter().map(told).collect()
}

/// A policy, and the event that is to be told before it is in force. One that is refused has been told.
fn read_policy(host: &Host, plan: &MountPlan, path: &Path) -> Result<(Policy, Event)> {
    let event = Event::new(Kind::Configuration).severity(Severity::Medium).subject(subject(plan));
    let policy = Policy::read(path).inspect_err(|error| host.telemetry.events.tell(&event.clone().error(error)))?;
    let (rules, digest) = (policy.rules.len(), hex::encode(policy.digest));
    let detail = format!("policy {} is in force, {rules} rules, sha256:{digest}", path.display());
    Ok((policy, event.detail(detail)))
}

/// The mount itself, whatever it shows.
fn subject(plan: &MountPlan) -> Subject {
    Subject { mountpoint: Some(plan.mountpoint.clone()), store: Some(plan.store.to_string()), ..Subject::default() }
}

/// The longest a read waits: what the store may take, and with limits on the origin its turn behind all that may be ahead.
fn read_deadline(store: &StoreOptions, fetches_max: u64, chunk_bytes: u64) -> Duration {
    // Of all mounts of this process together: what may be ahead is theirs together too.
    let turn = store.limits.longest_wait(fetches_max * PARTS_AHEAD_MAX, fetches_max * chunk_bytes);
    store.patience.budget + READ_DEADLINE_SLACK + turn
}

fn ownership(plan: &MountPlan) -> Ownership {
    // SAFETY: these calls only read this process's credentials.
    let (own_uid, own_gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    // With other users about, files are for the owner and the group; alone, the bits change nothing.
    let umask = plan.umask.map_or(if plan.allow_other { 0o227 } else { 0o222 }, |umask| (umask & 0o777) as u16);
    Ownership { uid: plan.uid.unwrap_or(own_uid), gid: plan.gid.unwrap_or(own_gid), umask }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_whose_end_is_seen_late_is_over_and_its_readers_were_refused_meanwhile() {
        let (never, long) = (Duration::ZERO, Duration::from_secs(600));
        let late = SessionEnd::default();
        let mut refused = false;
        assert!(late.wait(never, long, || {
            refused = true;
            late.end();
        }));
        assert!(refused);
        assert!(late.wait(never, never, || panic!("it is over, and nobody is refused for it")));
        assert!(!SessionEnd::default().wait(never, never, || ()), "another mount namespace has it");
    }
}
