//! A fixture mounted for real, in this process. Needs /dev/fuse and root (or fusermount3).
#![allow(dead_code)] // each test binary uses its own part

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use modelfs::cache::{Cache, CacheLimits, Model};
use modelfs::fuse::attach::{self, Attachment, MountLook};
use modelfs::fuse::{Behaviour, ModelFs, OpenPolicy};
use modelfs::mem::{Arena, ArenaKind, ArenaPlan};
use modelfs::read::Reader;
use modelfs::telemetry::Telemetry;
use modelfs::vfs::{Ownership, Vfs};

// Binaries that use two of these files have it twice.
#[allow(clippy::duplicate_mod)]
#[path = "skip.rs"]
mod skip;

use super::fixture::NAME;
pub use skip::skip;

pub struct Mounted {
    pub folder: tempfile::TempDir,
    pub fs: ModelFs,
    pub cache: Cache,
    pub attachment: Attachment,
    session: Option<fuser::BackgroundSession>,
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Clone)]
pub struct How {
    pub budget: u64,
    pub behaviour: Behaviour,
    pub read_deadline: Duration,
    pub limits: CacheLimits,
    pub allow_other: bool,
    pub ownership: Ownership,
    /// `None`: the best that this machine gives.
    pub arena: Option<ArenaKind>,
}

impl Default for How {
    fn default() -> Self {
        How {
            budget: 256 << 20,
            behaviour: Behaviour { open: OpenPolicy::Lazy, ..Behaviour::default() },
            read_deadline: Duration::from_secs(30),
            limits: CacheLimits::default(),
            allow_other: false,
            ownership: Ownership { uid: 0, gid: 0, umask: 0o222 },
            arena: None,
        }
    }
}

impl Mounted {
    pub fn new(how: How, model: impl FnOnce() -> Arc<Model>) -> Mounted {
        let look = MountLook { source: "memory".into(), allow_other: how.allow_other };
        let (fs, cache, runtime) = filesystem(how, model());
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (session, attachment) = attach::attach(fs.clone(), folder.path(), &look).expect("mounted");
        Mounted { folder, fs, cache, attachment, session: Some(session), runtime: Some(runtime) }
    }

    /// The model's folder.
    pub fn root(&self) -> PathBuf {
        self.folder.path().join(NAME)
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.root().join(file)
    }

    /// Whether whole files are read past the daemon here; where everything is required to be there that is a must.
    pub fn has_passthrough(&self) -> bool {
        let has = self.fs.passthrough();
        if !has {
            skip("this kernel has no passthrough");
        }
        has
    }

    /// Opens passthrough has answered so far.
    pub fn hot_opens(&self) -> u64 {
        self.cache.telemetry().opens_passthrough.get()
    }

    /// Waits until `done` or fails with `what`.
    pub fn wait_until(&self, what: &str, mut done: impl FnMut(&Mounted) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !done(self) {
            assert!(Instant::now() < deadline, "waited 120 s for {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn unmount(mut self) -> modelfs::cache::WipeReport {
        self.end()
    }

    fn end(&mut self) -> modelfs::cache::WipeReport {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.attachment.unmount().expect("unmount") {
            if Instant::now() > deadline {
                let holders = modelfs::control::holders(self.attachment.mountpoint());
                self.attachment.detach().expect("detach");
                eprintln!("still held by {holders:?}");
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(session) = self.session.take() {
            let _ = session.join();
        }
        self.fs.drop_backings(true);
        let report = self.cache.wipe_all(true);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_millis(200));
        }
        report
    }
}

/// A filesystem that is mounted nowhere yet.
pub fn filesystem(how: How, model: Arc<Model>) -> (ModelFs, Cache, tokio::runtime::Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let plan = ArenaPlan { bytes: how.budget };
    let arena = match how.arena {
        Some(kind) => Arena::open_kind(plan, kind),
        None => Arena::open(plan),
    };
    let arena = arena.expect("arena");
    let telemetry = Arc::new(Telemetry::default());
    let cache = Cache::new(arena, how.budget, how.limits, runtime.handle().clone(), telemetry).expect("cache");
    let reader = Reader::new(cache.clone(), how.read_deadline).expect("reader");
    let vfs = Vfs::new(vec![model], how.ownership, cache.clone()).expect("tree");
    let fs = ModelFs::new(vfs, reader, how.behaviour, runtime.handle().clone());
    cache.add_gate(fs.gate());
    (fs, cache, runtime)
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.session.is_some() {
            self.end();
        }
    }
}

/// Whether this machine can mount at all; where everything is required to be there that is a must.
pub fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists() && modelfs::mem::has_cap_sys_admin();
    if !can {
        skip("it needs /dev/fuse and root");
    }
    can
}
