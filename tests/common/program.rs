//! The program as a user runs it: its binary, in a folder of its own, with nothing of the user's read or changed.
#![allow(dead_code)] // each test binary uses its own part

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

// Binaries that use two of these files have it twice.
#[allow(clippy::duplicate_mod)]
#[path = "skip.rs"]
mod skip;

pub use skip::skip;

pub struct Program {
    root: PathBuf,
    store: String,
}

impl Program {
    /// Store, keys, state, mountpoint and temporary files all lie below `root`.
    pub fn in_folder(root: &Path) -> Program {
        for folder in ["store", "home", "mnt", "tmp"] {
            std::fs::create_dir(root.join(folder)).expect("mkdir");
        }
        let program = Program { root: root.to_owned(), store: root.join("store").to_str().expect("utf-8").to_owned() };
        run_ok(program.command(&["keygen"]).arg(program.key_path()));
        program
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn store(&self) -> &str {
        &self.store
    }

    pub fn key_path(&self) -> PathBuf {
        self.root.join("home/model.key")
    }

    pub fn key(&self) -> String {
        format!("file:{}", self.key_path().display())
    }

    pub fn mountpoint(&self) -> &'static Path {
        // Leaked once a test: lets callers keep the path without borrowing the program.
        Box::leak(self.root.join("mnt").into_boxed_path())
    }

    pub fn trusted_key(&self) -> PathBuf {
        self.root.join("home/.config/modelfs/signing.key.pub")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_modelfs"));
        command.args(arguments).current_dir(&self.root).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("MODELFS_") || text.starts_with("XDG_") || text.starts_with("MODEL_") {
                command.env_remove(name);
            }
        }
        command.env("HOME", self.root.join("home")).env("TMPDIR", self.root.join("tmp"));
        command.env("XDG_CONFIG_HOME", self.root.join("home/.config"));
        command.env("MODELFS_STATE_DIR", self.root.join("home/state"));
        command.env("XDG_CACHE_HOME", self.root.join("home/cache"));
        command
    }

    pub fn seal(&self, source: &Path, name: &str) {
        run_ok(self.command(&["seal"]).arg(source).args([&self.store, name, "--key", &self.key()]));
    }

    /// Mounts the whole store in the foreground, as a child, and waits until it is ready and can be asked.
    pub fn mount(&self, more: &[&str]) -> Mount {
        let log = std::fs::File::create(self.root.join("daemon.log")).expect("log");
        let mut command = self.command(&["mount"]);
        command.arg(&self.store).arg(self.mountpoint()).args(["--key", &self.key(), "--trust"]).arg(self.trusted_key());
        command.args(more).stdout(Stdio::null()).stderr(log);
        let place = self.root.canonicalize().expect("our folder").join("mnt");
        let socket = modelfs::control::socket_path(&place).expect("a place for sockets");
        let before = named(&socket);
        let mut child = command.spawn().expect("the binary runs");
        // It is in the tree a moment before it can be asked. One whose socket another has says so.
        let is_new = || named(&socket).is_some_and(|now| Some(now) != before);
        let can_be_asked = || is_new() || self.log().contains("no control socket");
        let deadline = Instant::now() + Duration::from_secs(120);
        while !is_mountpoint(self.mountpoint()) || !can_be_asked() {
            let ended = child.try_wait().expect("wait");
            assert!(ended.is_none(), "mount ended with {ended:?}: {}", self.log());
            assert!(Instant::now() < deadline, "not mounted within 120 s: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Mount { child, mountpoint: self.mountpoint() }
    }

    /// Waits for `done`; what did not come is told with the log of the mount.
    pub fn until(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !done() {
            assert!(Instant::now() < deadline, "{what} did not come within 120 s: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.root.join("daemon.log")).unwrap_or_default()
    }
}

/// A mount in a child process.
pub struct Mount {
    child: Child,
    mountpoint: &'static Path,
}

impl Mount {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the pid of a child not yet waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Waits for the end, however it came.
    pub fn wait_dead(mut self) {
        self.child.wait().expect("wait");
    }

    /// Waits for an exit and gives its code.
    pub fn exit_code(mut self, within: Duration) -> i32 {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status.code().unwrap_or_else(|| panic!("ended by a signal: {status}"));
            }
            assert!(Instant::now() < deadline, "still running after {within:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The ordinary end: SIGTERM, exit 0, nothing mounted.
    pub fn unmount(self) {
        self.signal(libc::SIGTERM);
        let mountpoint = self.mountpoint;
        assert_eq!(self.exit_code(Duration::from_secs(120)), 0);
        assert!(!is_mountpoint(mountpoint));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
            let _ = Command::new("umount").arg("-l").arg(self.mountpoint).stderr(Stdio::null()).status();
        }
    }
}

/// From the mount table: looking at a dead mount would fail, at a living one would be a request to it.
pub fn is_mountpoint(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mounts").expect("the mount table");
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    table.lines().any(|line| line.split(' ').nth(1).is_some_and(|place| Path::new(place) == path))
}

/// Which file it is that has the name of a socket. Looking is no question to whoever listens, and who has the name listens; one
/// that is there before may be a dead one's.
fn named(socket: &Path) -> Option<(u64, i64, i64)> {
    let meta = std::fs::symlink_metadata(socket).ok()?;
    Some((meta.ino(), meta.ctime(), meta.ctime_nsec()))
}

/// Runs to success or fails the test with what was said.
pub fn run_ok(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Whether this machine can mount at all; where everything is required to be there that is a must.
pub fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists() && modelfs::mem::has_cap_sys_admin();
    if !can {
        skip("it needs /dev/fuse and root");
    }
    can
}
