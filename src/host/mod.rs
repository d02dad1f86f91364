//! One process, one locked cache, any number of mounts.
//!
//! In: checked [`MountPlan`]s. Out: [`Mounted`]s, each a kernel session and a control socket of its own.
//! Promises: what can be refused is refused before anything is mounted; all plaintext of the process fits one budget; the
//! memory of one version is there once, however many mounts show it, and no right is shared with it: every mount opens the
//! version with its own keys before it gets there; a mount that ends takes nothing from the others, and what nobody else
//! shows is wiped with it.
//! `lock`: revocation while a mount lives. `mounted`: one mount, from its start to its end. `profiling`: the order of reads.
//! `seen`: all of it as metrics and health see it.
//! Not here: the life of a process that is one mount (`daemon`), what the kernel is answered (`fuse`).
//! Held by: tests/host.rs, tests/mount.rs, tests/e2e.sh.

mod lock;
mod mounted;
mod profiling;
mod seen;

pub use lock::Revoker;
pub use mounted::{HOLD_GRACE, Mounted, Ready};
pub use profiling::REPLAY_SHARE;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::audit::{self, Audit};
use crate::cache::{Cache, CacheLimits, Model};
use crate::config::oversight::HttpPlan;
use crate::config::{MountPlan, Oversight};
use crate::control;
use crate::error::{Code, Error, Result};
use crate::mem::{self, Arena, ArenaPlan, Hardening};
use crate::models::Pool;
use crate::observe::{Alerts, Probe, Server, Watched};
use crate::read::{BUFFER_BYTES, GatherBuffers};
use crate::refuse;
use crate::telemetry::Telemetry;
use crate::telemetry::events::{Event, Kind, Severity};

/// How often memory is asked for again that programs held when its last mount ended.
const LEAVING_POLL: Duration = Duration::from_secs(1);

/// A signal counts from the call on, not from the first wait. Inside a runtime.
///
/// # Errors
/// `HOST` if signals cannot be listened for.
pub(crate) fn listen_for(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|e| Error::new(Code::Host, "cannot listen for signals").with_source(e))
}

/// Ends when this process is told to: SIGTERM or SIGINT. A signal counts from the call on, not from the first wait. Inside a
/// runtime.
///
/// # Errors
/// `HOST` if signals cannot be listened for.
pub fn told_to_stop() -> Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (listen_for(SignalKind::terminate())?, listen_for(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    })
}

/// From the call on SIGHUP has every mount read its policy again, and look for newer versions where it shows them. For a
/// process of many mounts. Inside a runtime.
///
/// # Errors
/// `HOST` if signals cannot be listened for.
pub fn reload_on_hangup(host: &Arc<Host>) -> Result<()> {
    let mut hangup = listen_for(SignalKind::hangup())?;
    let weak = Arc::downgrade(host);
    host.handle.spawn(async move {
        while hangup.recv().await.is_some() {
            let Some(host) = weak.upgrade() else { return };
            // Ends with the runtime; a panic in there was told where it happened.
            let _ = tokio::task::spawn_blocking(move || host.reload()).await;
        }
    });
    Ok(())
}

/// Whether a mount is made although its process is told to stop meanwhile: who is first decides, once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Decision(Arc<AtomicBool>);

impl Decision {
    /// For [`Host::mount_if`].
    ///
    /// # Errors
    /// `STOPPING` if it was given up.
    pub(crate) fn enter(&self) -> Result<()> {
        if self.0.swap(true, Ordering::SeqCst) {
            refuse!(Stopping, "told to stop before the mount was made");
        }
        Ok(())
    }

    /// Nothing is in the tree then, and nothing will be. `false`: it is being made; half of one would be a dead mount, so it is
    /// waited for and ended.
    pub(crate) fn give_up(&self) -> bool {
        !self.0.swap(true, Ordering::SeqCst)
    }
}

/// What the mounts of a process have in common.
#[derive(Debug, Clone)]
pub struct HostPlan {
    /// Most plaintext in locked memory, of all mounts together.
    pub cache_bytes: u64,
    /// What is recorded and told of them.
    pub oversight: Oversight,
}

/// The process side of its mounts.
pub struct Host {
    // Dropped last by `stop`, so that what the others spawn on it ends first.
    runtime: Mutex<Option<tokio::runtime::Runtime>>,
    handle: tokio::runtime::Handle,
    cache: Cache,
    gather: Arc<GatherBuffers>,
    telemetry: Arc<Telemetry>,
    audit: Option<Arc<Audit>>,
    hardening: Hardening,
    oversight: Oversight,
    started: SystemTime,
    probe: Probe,
    alerts: Option<Arc<Alerts>>,
    /// Where metrics and health are answered.
    server: Mutex<Option<Server>>,
    pool: Arc<Pool>,
    /// One mount is all there will be: then its versions are its own to lock.
    alone: bool,
    mounted: Mutex<Vec<Arc<Mounted>>>,
    /// Versions that nobody shows any more and programs still hold memory of.
    leaving: Mutex<Vec<Arc<Model>>>,
}

impl Drop for Host {
    /// A process whose mount was refused never comes to [`Host::stop`], and its records are to reach the disk all the same.
    fn drop(&mut self) {
        if let Some(audit) = &self.audit {
            audit.close();
        }
    }
}

/// What a process with a cache of `cache_bytes` takes of locked memory, its keys aside.
pub(crate) fn memory_bytes(cache_bytes: u64) -> u64 {
    cache_bytes.saturating_add(CacheLimits::default().opener_bytes() + BUFFER_BYTES)
}

impl Host {
    /// Takes the locked memory and starts the threads. Once a process.
    ///
    /// # Errors
    /// `MEMLOCK` and `HOST` for what the machine does not give.
    pub fn start(plan: &HostPlan) -> Result<Arc<Host>> {
        Host::begin(plan, false)
    }

    /// The same for a process that is one mount.
    pub(crate) fn start_alone(plan: &HostPlan) -> Result<Arc<Host>> {
        Host::begin(plan, true)
    }

    fn begin(plan: &HostPlan, alone: bool) -> Result<Arc<Host>> {
        let hardening = mem::harden()?;
        let telemetry = Arc::new(Telemetry::default());
        telemetry.cache_bytes_max.set(plan.cache_bytes);
        // Before anything happens that is to be recorded.
        let audit = audit::start(&plan.oversight.audit, &telemetry)?;
        // Before anything is fetched: a machine that cannot lock this much will not do so later either.
        let limits = CacheLimits::default();
        let arena = Arena::open(ArenaPlan { bytes: memory_bytes(plan.cache_bytes) })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("serve")
            .enable_all()
            .build()
            .map_err(|e| Error::new(Code::Host, "cannot start the runtime").with_source(e))?;
        let handle = runtime.handle().clone();
        let cache = Cache::new(arena, plan.cache_bytes, limits, handle.clone(), telemetry.clone())?;
        let alerts = Alerts::start(&plan.oversight.alerts, telemetry.clone())?;
        if let Some(alerts) = &alerts {
            telemetry.events.add(alerts.clone());
        }
        let host = Arc::new(Host {
            runtime: Mutex::new(Some(runtime)),
            handle,
            pool: Arc::new(Pool::new(cache.clone())),
            cache,
            gather: GatherBuffers::new()?,
            telemetry,
            audit,
            hardening,
            oversight: plan.oversight.clone(),
            started: SystemTime::now(),
            probe: Probe::default(),
            alerts,
            server: Mutex::default(),
            alone,
            mounted: Mutex::default(),
            leaving: Mutex::default(),
        });
        if let Some(http) = &plan.oversight.http {
            // Whoever asks for metrics wants every event counted.
            host.telemetry.events.count_all();
            // Before a store is asked: that nothing is ready yet is an answer too.
            host.open_server(http)?;
        }
        Ok(host)
    }

    /// Opens the door for metrics and health, once.
    fn open_server(self: &Arc<Self>, http: &HttpPlan) -> Result<()> {
        let mut server = self.server.lock().expect("a thread died holding the server");
        if server.is_none() {
            let host = Arc::downgrade(self);
            let opened = Server::open(
                http,
                Watched {
                    facts: Box::new(move || host.upgrade().map(|host| host.seen())),
                    telemetry: self.telemetry.clone(),
                    roles: self.oversight.roles.clone(),
                },
            )?;
            // Where nobody asked for it, mount(8) says nothing of it; `modelfs status` does.
            match self.oversight.http {
                Some(_) => tracing::info!("metrics and health are answered at {}", opened.at()),
                None => tracing::debug!("metrics and health are answered at {}", opened.at()),
            }
            *server = Some(opened);
        }
        Ok(())
    }

    /// Metrics and health of a process of many mounts, where no other place was asked for: NAME.http, beside the sockets of
    /// its mounts. What keeps it from that is told, and nothing else fails.
    pub fn answer_as(self: &Arc<Self>, name: &str) {
        if self.oversight.http.is_some() {
            return;
        }
        let opened = control::own_socket_dir(&self.oversight.roles)
            .and_then(|dir| self.open_server(&HttpPlan::Unix(dir.join(name).with_extension(control::HTTP_EXTENSION))));
        if let Err(error) = opened {
            tracing::warn!("no socket for metrics: {}", error.chain());
        }
    }

    /// Takes the name of a mount's own socket for metrics away: the next mount on its mountpoint may want it.
    fn retire_server(&self) {
        if self.alone
            && self.oversight.http.is_none()
            && let Some(server) = &*self.server.lock().expect("a thread died holding the server")
        {
            server.retire();
        }
    }

    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.handle
    }

    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.telemetry
    }

    /// Resolves, verifies and unlocks the models of `plan`, and mounts them. Its `cache_bytes` count for nothing: the
    /// host's do. Blocking: from a thread outside the runtime, or one of its blocking threads.
    ///
    /// # Errors
    /// Whatever refused a model or the mountpoint; then nothing is mounted and nothing kept.
    pub fn mount(self: &Arc<Self>, plan: MountPlan) -> Result<Arc<Mounted>> {
        self.mount_if(plan, || Ok(()))
    }

    /// The same; `may_enter` is asked last, when everything is ready and nothing is in the tree yet.
    pub(crate) fn mount_if(
        self: &Arc<Self>,
        plan: MountPlan,
        may_enter: impl FnOnce() -> Result<()>,
    ) -> Result<Arc<Mounted>> {
        let mounted = Mounted::start(self, plan, may_enter)?;
        self.mounted.lock().expect("a thread died holding the mounts").push(mounted.clone());
        // It may have been unmounted before it was listed.
        if *mounted.gone().borrow() {
            self.forget(&mounted);
        }
        Ok(mounted)
    }

    /// Every mount by itself: what one refuses keeps no other from what is new. Blocking.
    fn reload(&self) {
        for mounted in self.mounted() {
            let plan = mounted.plan();
            if (plan.policy.is_some() || plan.versions)
                && let Err(error) = mounted.reload(None)
            {
                tracing::error!("{}: not reloaded: {}", mounted.mountpoint().display(), error.chain());
            }
        }
    }

    /// The mounts that are there, in the order in which they came.
    pub fn mounted(&self) -> Vec<Arc<Mounted>> {
        self.mounted.lock().expect("a thread died holding the mounts").clone()
    }

    /// Unmounts everything and wipes, then ends the threads. Blocking: from a thread outside the runtime.
    ///
    /// # Errors
    /// `HELD` if programs still held files of a mount.
    pub fn stop(&self) -> Result<()> {
        let mut outcome = Ok(());
        for mounted in self.mounted() {
            let ended = mounted.unmount(HOLD_GRACE);
            outcome = outcome.and(ended);
        }
        let report = self.cache.wipe_all(outcome.is_ok());
        tracing::debug!(wiped_bytes = report.wiped_bytes, held_bytes = report.held_bytes, "wiped at the end");
        // With the lock let go: an answer under way may look at the host.
        let server = self.server.lock().expect("a thread died holding the server").take();
        drop(server);
        if let Some(alerts) = &self.alerts {
            alerts.close();
        }
        if let Some(runtime) = self.runtime.lock().expect("a thread died holding the runtime").take() {
            runtime.shutdown_timeout(Duration::from_millis(100));
        }
        if let Some(audit) = &self.audit {
            let stop = Event::new(Kind::Stop).actor(audit::this_process());
            self.telemetry.events.tell(&match &outcome {
                Ok(()) => stop,
                Err(held) => stop.severity(Severity::Medium).error(held),
            });
            audit.close();
        }
        outcome
    }

    /// What all mounts have in common; each tells of itself by [`Mounted::status`].
    pub fn status(&self) -> Value {
        self.telemetry.cache_bytes.set(self.cache.budget().in_use());
        self.telemetry.huge_page_short_bytes.set(mem::huge_page_short_bytes());
        self.count_blocked(&self.mounted());
        json!({
            "pid": std::process::id(),
            "memory": self.cache.arena().kind().name(),
            "hardening": {
                "secrets": format!("{:?}", self.hardening.secret_memory),
                "hibernation_blocked": self.hardening.hibernation_blocked,
                // Of files that readers hold; those that nobody holds always are.
                "overwritten_on_lock": mem::can_pin().is_ok(),
            },
            "cache": {
                "bytes_max": self.cache.budget().total(),
                "bytes": self.cache.budget().in_use(),
                "bytes_peak": self.cache.budget().peak(),
            },
            "http": self.server.lock().expect("a thread died holding the server").as_ref().map(|server| server.at().to_owned()),
            "mountpoints": self.mounted().iter().map(|one| one.mountpoint().to_owned()).collect::<Vec<_>>(),
            "metrics": self.telemetry.snapshot(),
        })
    }

    /// Blocks end by time, so they are counted when somebody asks.
    fn count_blocked(&self, mounted: &[Arc<Mounted>]) {
        self.telemetry.blocked.set(mounted.iter().map(|mounted| mounted.fs().blocks().len() as u64).sum());
    }

    fn forget(&self, mounted: &Mounted) {
        let mut all = self.mounted.lock().expect("a thread died holding the mounts");
        all.retain(|other| !std::ptr::eq(&**other, mounted));
    }

    /// Wipes versions that nobody shows any more; what programs still hold of them is asked for again until they let go.
    /// Returns the bytes wiped, and those held.
    fn wipe(self: &Arc<Self>, models: Vec<Arc<Model>>) -> (u64, u64) {
        let (mut wiped, mut held) = (0, 0);
        let mut still = Vec::new();
        for model in models {
            model.wipe_keys();
            let report = self.cache.wipe_model(model.serial);
            wiped += report.wiped_bytes;
            held += report.held_bytes;
            if report.held_objects > 0 {
                still.push(model);
            }
        }
        if !still.is_empty() {
            let mut leaving = self.leaving.lock().expect("a thread died holding what leaves");
            let idle = leaving.is_empty();
            leaving.extend(still);
            if idle {
                self.handle.spawn(Host::let_go(Arc::downgrade(self)));
            }
        }
        (wiped, held)
    }

    async fn let_go(host: Weak<Host>) {
        loop {
            tokio::time::sleep(LEAVING_POLL).await;
            let Some(host) = host.upgrade() else { return };
            // Wiping blocks. Ends with the runtime; a panic in there was told where it happened.
            let left = tokio::task::spawn_blocking(move || {
                let mut leaving = host.leaving.lock().expect("a thread died holding what leaves");
                leaving.retain(|model| host.cache.wipe_model(model.serial).held_objects > 0);
                leaving.len()
            });
            if left.await.unwrap_or(0) == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_not_mounted_and_what_is_being_mounted_is_not_given_up() {
        let early = Decision::default();
        assert!(early.give_up());
        assert_eq!(early.clone().enter().expect_err("given up").code(), Code::Stopping);
        let late = Decision::default();
        late.clone().enter().expect("nobody gave it up");
        assert!(!late.give_up());
    }
}
