//! The life of a mount: start in an order in which every refusal comes before the mount, stop in one in which nothing
//! readable is left.
//!
//! In: a checked [`MountPlan`]. Out: when it ended, and how.
//! Promises: no partial mount; SIGTERM, SIGINT, `umount` and `modelfs umount` all end with the mount gone, keys and
//! plaintext wiped; when programs still hold files after [`HOLD_GRACE`] the mount is detached, everything that nobody holds
//! is wiped, and the holders are named (`HELD`).
//! Not here: what the kernel is answered (`fuse`), what is resident (`cache`).
//! Held by: tests/mount.rs, tests/e2e.sh.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::mpsc;

use crate::cache::{Cache, CacheLimits, Model};
use crate::config::MountPlan;
use crate::control::{self, ControlTarget};
use crate::doctor;
use crate::error::{Class, Code, Error, Result};
use crate::fuse::attach::{self, Attachment, MountLook};
use crate::fuse::{Behaviour, ModelFs};
use crate::mem::{self, Arena, ArenaPlan, Hardening};
use crate::read::Reader;
use crate::read::profile::{KnownFile, Profile, ProfileFile, Recorder};
use crate::reading::Reading;
use crate::store::ChunkSource;
use crate::telemetry::Telemetry;
use crate::vfs::{Ownership, Vfs};

/// How long stopping waits for programs to let go before it detaches the mount.
pub const HOLD_GRACE: Duration = Duration::from_secs(10);

/// How often it looks meanwhile.
const HOLD_POLL: Duration = Duration::from_millis(50);

/// How long the reader of a control answer has before the process ends.
const ANSWER_GRACE: Duration = Duration::from_secs(2);

/// Models opened at once when a whole store is mounted: each costs a handful of small requests.
const OPENINGS_MAX: usize = 16;

/// How much later than the store's own budget a read gives up: the refetch after a wrong hash has its own.
const READ_DEADLINE_SLACK: Duration = Duration::from_secs(2);

/// The share of the cache, one in so many, that a profile's replay fills at most: the rest is for what is really read.
pub const REPLAY_SHARE: u64 = 2;

/// How often a profile is written while the mount lives.
const PROFILE_PERIOD: Duration = Duration::from_secs(30);

/// What a mount says of itself once programs can use it.
#[derive(Debug, Clone)]
pub struct Ready {
    pub mountpoint: std::path::PathBuf,
    pub models: Vec<String>,
    /// Whole files are served without the daemon.
    pub passthrough: bool,
}

/// Mounts, serves until told to stop, wipes. `ready` is called once programs can use the mount.
///
/// # Errors
/// Whatever refused the mount; `HELD` if programs still held files at the end.
pub fn run(mut plan: MountPlan, ready: impl FnOnce(&Ready)) -> Result<()> {
    let hardening = mem::harden()?;
    let telemetry = Arc::new(Telemetry::default());
    plan.access.store.telemetry = telemetry.clone();
    telemetry.cache_bytes_max.set(plan.cache_bytes);
    // Before anything is fetched: a machine that cannot lock this much will not do so later either.
    let limits = CacheLimits::default();
    let beside = limits.opener_bytes() + crate::read::BUFFER_BYTES;
    let arena = Arena::open(ArenaPlan { bytes: plan.cache_bytes + beside })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("serve")
        .enable_all()
        .build()
        .map_err(|e| Error::new(Code::Host, "cannot start the runtime").with_source(e))?;
    let models = runtime.block_on(open_models(&plan))?;
    let cache =
        Cache::new(arena, plan.cache_bytes, CacheLimits::default(), runtime.handle().clone(), telemetry.clone())?;
    let reader = Reader::new(cache.clone(), plan.access.store.patience.budget + READ_DEADLINE_SLACK)?;
    let vfs = Vfs::new(models, ownership(&plan), cache.clone())?;
    let behaviour = Behaviour { open: plan.open, no_page_cache: plan.no_page_cache };
    let fs = ModelFs::new(vfs, reader, behaviour, runtime.handle().clone());
    cache.set_gate(fs.gate());

    // Listening before the mount exists: a signal at any later moment finds a handler.
    let mut stops = runtime.block_on(async { StopSignals::listen() })?;
    let look = MountLook { source: plan.store.to_string(), allow_other: plan.allow_other };
    let (session, attachment) = attach::attach(fs.clone(), &plan.mountpoint, &look)?;
    let life = Arc::new(Life {
        plan,
        fs,
        cache,
        attachment,
        telemetry,
        hardening,
        started: Instant::now(),
        stop_asked: stops.asked.clone(),
        ended: AtomicBool::new(false),
        outcome: Mutex::new(None),
        outcome_known: Condvar::new(),
    });
    let ended = stops.ended.clone();
    let session_thread = std::thread::Builder::new()
        .name("session".into())
        .spawn(move || {
            let outcome = session.join();
            // Nobody listens any more only when the process is ending anyway.
            let _ = ended.send(());
            outcome
        })
        .map_err(|e| Error::new(Code::Host, "cannot start the session thread").with_source(e))?;
    let control = match control::serve(life.attachment.mountpoint(), life.clone()) {
        Ok(control) => Some(control),
        Err(error) => {
            // The mount is there and useful; only `modelfs status` and `modelfs umount` will not find it.
            tracing::warn!("no control socket: {}", error.chain());
            None
        }
    };
    life.tell_what_costs_speed();
    let profiling = life.plan.profile.clone().map(|path| Profiling::start(&path, &life, &runtime));
    ready(&Ready {
        mountpoint: life.attachment.mountpoint().to_owned(),
        models: life.fs.vfs().models().iter().map(|model| model.name.clone()).collect(),
        passthrough: life.fs.passthrough(),
    });

    let reason = runtime.block_on(stops.next());
    tracing::info!("stopping: {reason}");
    if let Some(profiling) = profiling {
        profiling.stop();
    }
    let outcome = life.finish(&runtime, &mut stops);
    if outcome.is_ok() {
        // Unmounted: the kernel has closed the connection and its threads end.
        let _ = session_thread.join();
    }
    if let Some(control) = &control {
        control.retire();
    }
    life.tell(outcome.clone());
    if let Some(control) = control {
        std::thread::sleep(if life.was_asked() {
            ANSWER_GRACE.min(Duration::from_millis(200))
        } else {
            Duration::ZERO
        });
        drop(control);
    }
    runtime.shutdown_timeout(Duration::from_millis(100));
    outcome
}

/// `--profile`: what an earlier load read is fetched again in its order, and what this one reads is written down.
struct Profiling {
    keeper: Arc<Keeper>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

struct Keeper {
    file: ProfileFile,
    profile: Mutex<Profile>,
    recorder: Arc<Recorder>,
    models: Vec<Arc<Model>>,
}

impl Profiling {
    /// Nothing about a profile is worth refusing a mount for: what is wrong with it is logged.
    fn start(path: &std::path::Path, life: &Arc<Life>, runtime: &tokio::runtime::Runtime) -> Profiling {
        let (file, profile) = ProfileFile::open(path);
        let models = life.fs.vfs().models().to_vec();
        let mut wishes = Vec::new();
        let mut whole = HashSet::new();
        for model in &models {
            let Some(load) = profile.load_of(&model.name) else { continue };
            let known = model_files(model);
            wishes.push((model.clone(), load.ranges(&known)));
            whole.extend(load.whole_files(&known).into_iter().map(|file| (model.serial, file)));
        }
        let recorder = Arc::new(Recorder::default());
        life.fs.reader().set_expected_whole(whole);
        life.fs.reader().set_recorder(recorder.clone());
        let keeper = Arc::new(Keeper { file, profile: Mutex::new(profile), recorder, models });
        let replay = runtime.spawn({
            let fs = life.fs.clone();
            async move {
                let mut left = fs.reader().cache().budget().total() / REPLAY_SHARE;
                for (model, ranges) in wishes {
                    let asked = fs.reader().replay(&model, ranges, left).await;
                    tracing::info!(model = %model.name, bytes = asked, "fetched in the order of the last load");
                    left -= asked;
                }
            }
        });
        let periodic = runtime.spawn({
            let keeper = keeper.clone();
            async move {
                loop {
                    tokio::time::sleep(PROFILE_PERIOD).await;
                    let keeper = keeper.clone();
                    // Ends with the runtime, whatever became of one write.
                    let _ = tokio::task::spawn_blocking(move || keeper.keep()).await;
                }
            }
        });
        Profiling { keeper, tasks: vec![replay, periodic] }
    }

    fn stop(self) {
        for task in &self.tasks {
            task.abort();
        }
        self.keeper.keep();
    }
}

impl Keeper {
    /// Writes what was recorded so far, if anything was.
    fn keep(&self) {
        if !self.recorder.take_changed() {
            return;
        }
        let mut profile = self.profile.lock().expect("a thread died holding the profile");
        for model in &self.models {
            let path = |file: u32| model.manifest.path(&model.manifest.files()[file as usize]).to_owned();
            profile.merge(self.recorder.load(model.serial, &model.name, &model.digest.to_string(), path));
        }
        if let Err(error) = self.file.replace(&profile) {
            tracing::warn!("{}", error.chain());
        }
    }
}

/// Finds a file of a model by its path, whatever the model's version.
fn model_files(model: &Arc<Model>) -> impl Fn(&str) -> Option<KnownFile> {
    |path| {
        let at = model.manifest.find(path)?;
        Some(KnownFile { file: at as u32, size: model.manifest.files()[at].size })
    }
}

fn ownership(plan: &MountPlan) -> Ownership {
    // SAFETY: these calls only read this process's credentials.
    let (own_uid, own_gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    // With other users about, files are for the owner and the group; alone, the bits change nothing.
    let umask = plan.umask.map_or(if plan.allow_other { 0o227 } else { 0o222 }, |umask| (umask & 0o777) as u16);
    Ownership { uid: plan.uid.unwrap_or(own_uid), gid: plan.gid.unwrap_or(own_gid), umask }
}

/// Resolves, verifies and unlocks every model of the plan.
///
/// A model that was named must open. Of a whole store, models that no given key opens or nobody vouches for are left out
/// with a warning; one that was tampered with refuses the mount.
async fn open_models(plan: &MountPlan) -> Result<Vec<Arc<Model>>> {
    let reading = Reading::new(plan.store.clone(), plan.access.clone())?;
    let source: Arc<dyn ChunkSource> = reading.store.clone();
    let named = !plan.models.is_empty();
    let selectors = if named { plan.models.clone() } else { reading.model_names().await? };
    if selectors.is_empty() {
        return Err(Error::new(
            Code::NotFound,
            format!("store {} holds no model that tells its name; name one with --model", plan.store),
        ));
    }
    use futures::stream::{self, StreamExt};
    let mut resolutions = stream::iter(selectors)
        .map(|selector| async {
            let resolved = reading.resolve(&selector).await;
            (selector, resolved)
        })
        .buffered(OPENINGS_MAX);
    let mut models = Vec::new();
    while let Some((selector, resolved)) = resolutions.next().await {
        let must = named || plan.require.contains(&selector);
        // One after the other: unlocking may ask for a passphrase, and deriving a key takes the memory of one.
        let opened = resolved.and_then(|resolved| Ok((reading.unlock(&resolved)?, resolved)));
        match opened {
            Ok((opened, resolved)) => models.push(Arc::new(Model::new(
                models.len() as u32,
                resolved.name,
                resolved.digest,
                opened,
                source.clone(),
                plan.verify,
            ))),
            Err(error) if !must && matches!(error.class(), Class::Denied | Class::Usage) => {
                tracing::warn!("model {selector} is left out: {}", error.chain());
            }
            Err(error) => return Err(error.context(format!("cannot open model {selector}"))),
        }
    }
    if models.is_empty() {
        return Err(Error::new(Code::NoKey, format!("no model of {} could be opened", plan.store)));
    }
    Ok(models)
}

/// Everything that can ask the mount to end.
struct StopSignals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    asked: mpsc::UnboundedSender<()>,
    asked_seen: mpsc::UnboundedReceiver<()>,
    ended: mpsc::UnboundedSender<()>,
    ended_seen: mpsc::UnboundedReceiver<()>,
}

impl StopSignals {
    fn listen() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let fault = |e| Error::new(Code::Host, "cannot listen for signals").with_source(e);
        let (asked, asked_seen) = mpsc::unbounded_channel();
        let (ended, ended_seen) = mpsc::unbounded_channel();
        Ok(StopSignals {
            terminate: signal(SignalKind::terminate()).map_err(fault)?,
            interrupt: signal(SignalKind::interrupt()).map_err(fault)?,
            asked,
            asked_seen,
            ended,
            ended_seen,
        })
    }

    /// Waits for the first of them.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.asked_seen.recv() => "asked to",
            _ = self.ended_seen.recv() => "unmounted",
        }
    }

    /// The same, no longer than `wait`.
    async fn next_within(&mut self, wait: Duration) -> Option<&'static str> {
        tokio::time::timeout(wait, self.next()).await.ok()
    }
}

/// A running mount, as its control socket and its end see it.
struct Life {
    plan: MountPlan,
    fs: ModelFs,
    cache: Cache,
    attachment: Attachment,
    telemetry: Arc<Telemetry>,
    hardening: Hardening,
    started: Instant,
    stop_asked: mpsc::UnboundedSender<()>,
    ended: AtomicBool,
    outcome: Mutex<Option<Result<()>>>,
    outcome_known: Condvar,
}

impl Life {
    /// Unmounts, or detaches after the grace, and wipes. A second signal ends the grace at once.
    fn finish(&self, runtime: &tokio::runtime::Runtime, stops: &mut StopSignals) -> Result<()> {
        let deadline = Instant::now() + HOLD_GRACE;
        let mut unmounted = self.attachment.unmount()?;
        while !unmounted && Instant::now() < deadline {
            let again = runtime.block_on(stops.next_within(HOLD_POLL));
            if matches!(again, Some("SIGTERM" | "SIGINT")) {
                break;
            }
            unmounted = self.attachment.unmount()?;
        }
        let holders = if unmounted { Vec::new() } else { control::holders(self.attachment.mountpoint()) };
        if !unmounted {
            self.attachment.detach()?;
        }
        for model in self.fs.vfs().models() {
            model.wipe_keys();
        }
        self.fs.drop_backings(unmounted);
        let report = self.cache.wipe_all(unmounted);
        tracing::info!(wiped_bytes = report.wiped_bytes, held_bytes = report.held_bytes, "wiped");
        if unmounted && report.held_objects == 0 {
            return Ok(());
        }
        Err(self.held(&holders, report.held_bytes))
    }

    /// One line of the log: which rules of `modelfs doctor` find something at this mount.
    fn tell_what_costs_speed(&self) {
        let facts = doctor::Facts {
            cache_bytes: self.cache.budget().total(),
            mount: self.attachment.device_number().map(|device| doctor::MountFacts {
                device,
                passthrough: Some(self.fs.passthrough()),
                huge_page_short_bytes: None,
            }),
            ..doctor::Facts::default()
        };
        let slow: Vec<String> = doctor::examine(std::path::Path::new("/"), &facts)
            .into_iter()
            .filter(|finding| finding.severity >= doctor::Severity::Warning)
            .map(|finding| format!("{} ({})", finding.rule, finding.seen))
            .collect();
        if !slow.is_empty() {
            let mountpoint = self.attachment.mountpoint().display();
            tracing::info!("held back by {}; `modelfs doctor {mountpoint}` tells what to do", slow.join(", "));
        }
    }

    fn held(&self, holders: &[control::Holder], bytes: u64) -> Error {
        Error::new(
            Code::Held,
            format!(
                "{} was detached while in use: {}; {bytes} bytes stay in memory until they are let go, all else is wiped",
                self.attachment.mountpoint().display(),
                control::tell_holders(holders),
            ),
        )
    }

    fn tell(&self, outcome: Result<()>) {
        *self.outcome.lock().expect("a thread died holding the outcome") = Some(outcome);
        self.outcome_known.notify_all();
    }

    fn was_asked(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

impl ControlTarget for Life {
    fn status(&self) -> serde_json::Value {
        self.telemetry.cache_bytes.set(self.cache.budget().in_use());
        self.telemetry.huge_page_short_bytes.set(mem::huge_page_short_bytes());
        let models: Vec<_> = self
            .fs
            .vfs()
            .models()
            .iter()
            .map(|model| {
                let header = model.manifest.header();
                json!({
                    "name": model.name,
                    "version": header.seq,
                    "manifest": format!("sha256:{}", model.digest),
                    "files": model.manifest.files().len(),
                    "bytes": model.manifest.total_size() as u64,
                    "resident_bytes": self.cache.resident_bytes(model.serial),
                })
            })
            .collect();
        json!({
            "mountpoint": self.attachment.mountpoint(),
            "store": self.plan.store.to_string(),
            "pid": std::process::id(),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "verify": match self.plan.verify { crate::crypto::Verify::Strict => "strict", crate::crypto::Verify::Aead => "aead" },
            "open_policy": self.plan.open.name(),
            "passthrough": self.fs.passthrough(),
            "memory": self.cache.arena().kind().name(),
            "hardening": {
                "secrets": format!("{:?}", self.hardening.secret_memory),
                "hibernation_blocked": self.hardening.hibernation_blocked,
            },
            "cache": {
                "bytes_max": self.cache.budget().total(),
                "bytes": self.cache.budget().in_use(),
                "bytes_peak": self.cache.budget().peak(),
            },
            "open_handles": self.fs.open_handles(),
            "models": models,
            "metrics": self.telemetry.snapshot(),
        })
    }

    fn stop(&self) -> Result<serde_json::Value> {
        self.ended.store(true, Ordering::SeqCst);
        // The receiver lives as long as the process.
        let _ = self.stop_asked.send(());
        let outcome = self.outcome.lock().expect("a thread died holding the outcome");
        let limit = HOLD_GRACE + Duration::from_secs(20);
        let (outcome, timeout) = self
            .outcome_known
            .wait_timeout_while(outcome, limit, |outcome| outcome.is_none())
            .expect("a thread died holding the outcome");
        match &*outcome {
            Some(Ok(())) => Ok(json!({ "unmounted": self.attachment.mountpoint() })),
            Some(Err(error)) => Err(error.clone()),
            None => {
                assert!(timeout.timed_out(), "the wait ends with an outcome or at its limit");
                Err(Error::new(Code::Deadline, format!("the mount did not end within {} s", limit.as_secs())))
            }
        }
    }
}
