//! What metrics and health are made of, collected once for each question.
//!
//! In: the host, the kernel's files about this process. Out: plain values.
//! Promises: bounded in time, though a mount or a disk hangs; takes no lock that a read waits for longer than it takes to
//! copy a number.
//! Held by: the tests below, tests/observe.rs.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::cache::Loaded;
use crate::telemetry::events::{Kind, Outcome, Severity};
use crate::telemetry::{Snapshot, Telemetry};
use crate::vault::VaultState;

/// A version that is shown, by whichever mounts.
#[derive(Debug, Clone)]
pub struct ModelFacts {
    pub name: String,
    pub version: u64,
    pub bytes: u64,
    pub resident_bytes: u64,
    pub current: bool,
    pub locked: bool,
    pub load: Option<Loaded>,
    /// Unix seconds.
    pub expires_at: Option<i64>,
}

#[derive(Debug, Clone)]
pub struct MountFacts {
    pub mountpoint: PathBuf,
    pub store: String,
    pub store_silent: bool,
    pub since: SystemTime,
    /// It is in the tree, and who asks the kernel about it gets an answer.
    pub answers: bool,
    pub refused: bool,
    pub open_handles: u64,
    /// Of the models that must serve, those that do not.
    pub not_serving: Vec<String>,
    pub locked: usize,
    pub models: usize,
    pub vault: Option<VaultState>,
    /// Everything hangs on it: no other key opens the mount.
    pub needs_vault: bool,
    pub credentials_end_in: Option<Duration>,
    pub strict: bool,
    pub trust: &'static str,
    pub policy: bool,
}

impl MountFacts {
    /// Why it is not ready, in words that hold no name of a model.
    pub fn trouble(&self) -> Option<&'static str> {
        if !self.answers {
            Some("does not answer")
        } else if self.refused {
            Some("refuses its readers")
        } else if self.needs_vault && self.vault.as_ref().is_some_and(VaultState::is_lost) {
            Some("Vault does not take our token any more")
        } else if !self.not_serving.is_empty() {
            Some("a model that must serve is locked")
        } else {
            None
        }
    }
}

/// How this process keeps its memory to itself.
#[derive(Debug, Clone)]
pub struct Keep {
    pub memory: &'static str,
    pub secrets: &'static str,
    /// Not even root reads them through the kernel.
    pub secrets_private: bool,
    pub hibernation_blocked: bool,
    pub merging_off: Option<bool>,
    pub can_pin: bool,
}

/// The process and its mounts at one moment.
#[derive(Debug, Clone)]
pub struct Facts {
    pub started: SystemTime,
    pub numbers: Snapshot,
    pub events: Vec<(Kind, Severity, Outcome, u64)>,
    pub cache_peak_bytes: u64,
    pub models: Vec<ModelFacts>,
    pub mounts: Vec<MountFacts>,
    /// The process is there for one mount: without it, it is of no use. One that serves volumes waits for the first.
    pub is_for_one_mount: bool,
    pub audit: &'static str,
    pub keep: Keep,
    /// Folders whose disk may fill up, and what they are for.
    pub folders: Vec<(&'static str, PathBuf)>,
}

impl Facts {
    /// Of a process without mounts.
    pub fn empty(telemetry: &Telemetry) -> Facts {
        Facts {
            started: SystemTime::now(),
            numbers: telemetry.snapshot(),
            events: telemetry.events.tally().counts(),
            cache_peak_bytes: 0,
            models: Vec::new(),
            mounts: Vec::new(),
            is_for_one_mount: true,
            audit: "off",
            keep: Keep {
                memory: "none",
                secrets: "none",
                secrets_private: true,
                hibernation_blocked: true,
                merging_off: None,
                can_pin: true,
            },
            folders: Vec::new(),
        }
    }

    pub fn is_ready(&self) -> bool {
        (!self.is_for_one_mount || !self.mounts.is_empty()) && self.mounts.iter().all(|mount| mount.trouble().is_none())
    }

    /// Each store once, and whether it is silent.
    pub fn stores(&self) -> BTreeMap<&str, bool> {
        self.mounts.iter().map(|mount| (mount.store.as_str(), mount.store_silent)).collect()
    }
}

/// What the kernel says of this process. What it does not say is left out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Process {
    pub cpu_user: Duration,
    pub cpu_system: Duration,
    pub resident_bytes: Option<u64>,
    pub locked_bytes: Option<u64>,
    pub threads: Option<u64>,
    pub open_fds: Option<u64>,
    pub max_fds: Option<u64>,
}

impl Process {
    pub fn now() -> Process {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        // SAFETY: zeros are a valid rusage, as they are a valid rlimit.
        let (mut usage, mut files) =
            unsafe { (std::mem::zeroed::<libc::rusage>(), std::mem::zeroed::<libc::rlimit>()) };
        // SAFETY: both structures outlive the calls.
        let told = unsafe {
            libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
            libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut files) == 0
        };
        let time = |at: libc::timeval| {
            Duration::from_secs(at.tv_sec.unsigned_abs()) + Duration::from_micros(at.tv_usec.unsigned_abs())
        };
        Process {
            cpu_user: time(usage.ru_utime),
            cpu_system: time(usage.ru_stime),
            resident_bytes: field("VmRSS").map(|kib| kib << 10),
            locked_bytes: field("VmLck").map(|kib| kib << 10),
            threads: field("Threads"),
            // The one that lists them is not one of them.
            open_fds: std::fs::read_dir("/proc/self/fd").ok().map(|all| (all.count() as u64).saturating_sub(1)),
            max_fds: told.then_some(files.rlim_cur),
        }
    }
}

/// A file system, as whoever writes to it sees it.
#[derive(Debug, Clone, Copy)]
pub struct Disk {
    pub free_bytes: u64,
    pub size_bytes: u64,
}

impl Disk {
    /// Of the nearest folder above that is there: what will be made lies on it too.
    pub fn of(path: &Path) -> Option<Disk> {
        let there = path.ancestors().find(|folder| folder.symlink_metadata().is_ok())?;
        let path = CString::new(there.as_os_str().as_bytes()).ok()?;
        let mut told = std::mem::MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: a NUL-terminated path and a buffer of the kernel's size, both alive through the call.
        if unsafe { libc::statvfs(path.as_ptr(), told.as_mut_ptr()) } != 0 {
            return None;
        }
        // SAFETY: the call filled it in.
        let told = unsafe { told.assume_init() };
        Some(Disk { free_bytes: told.f_bavail * told.f_frsize, size_bytes: told.f_blocks * told.f_frsize })
    }
}

#[cfg(test)]
impl MountFacts {
    /// One that is well and shows nothing.
    pub fn still(mountpoint: PathBuf) -> MountFacts {
        MountFacts {
            mountpoint,
            store: "file:///store".into(),
            store_silent: false,
            since: SystemTime::now(),
            answers: true,
            refused: false,
            open_handles: 0,
            not_serving: Vec::new(),
            locked: 0,
            models: 0,
            vault: None,
            needs_vault: false,
            credentials_end_in: None,
            strict: true,
            trust: "signers",
            policy: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_of_this_process() {
        let own = Process::now();
        assert!(own.resident_bytes.is_some_and(|bytes| bytes > 1 << 20), "{own:?}");
        assert!(own.threads.is_some_and(|threads| threads > 0) && own.open_fds.is_some_and(|fds| fds >= 3), "{own:?}");
        let more = std::fs::File::open("/proc/self/status").expect("opened");
        // Other tests open and close files meanwhile: only that it is counted at all can be said.
        assert!(Process::now().open_fds.is_some());
        drop(more);
        let disk = Disk::of(Path::new("/no/such/folder")).expect("the root is there");
        assert!(disk.size_bytes > 0 && disk.free_bytes <= disk.size_bytes, "{disk:?}");
    }

    #[test]
    fn a_mount_is_ready_unless_something_stands_in_the_way() {
        let telemetry = Telemetry::default();
        let mut facts = Facts::empty(&telemetry);
        assert!(!facts.is_ready(), "nothing is mounted");
        assert!(Facts { is_for_one_mount: false, ..facts.clone() }.is_ready(), "no volume is asked for yet");
        let well = MountFacts::still("/m".into());
        facts.mounts.push(well.clone());
        assert!(facts.is_ready());
        let lost = || Some(VaultState::Lost { why: crate::error::Error::new(crate::error::Code::NoKey, "gone") });
        let ill = [
            MountFacts { answers: false, ..well.clone() },
            MountFacts { refused: true, ..well.clone() },
            MountFacts { not_serving: vec!["a".into()], ..well.clone() },
            MountFacts { vault: lost(), needs_vault: true, ..well.clone() },
        ];
        for one in ill {
            facts.mounts.truncate(1);
            facts.mounts.push(one.clone());
            assert!(one.trouble().is_some() && !facts.is_ready(), "{one:?}");
        }
        let other_key = MountFacts { vault: lost(), needs_vault: false, ..well };
        assert_eq!(other_key.trouble(), None, "another key opens it");
    }
}
