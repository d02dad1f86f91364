//! What integration tests stand on: a real S3 server of their own, and a rule for parts that are not there.
//!
//! A test that needs a part calls [`part`] and goes on only with its path. Without the part it prints SKIPPED with the
//! reason and returns; with `CI=true` or `MODELFS_TEST_REQUIRE_PARTS=1` that is a failure instead. tests/parts/install.sh
//! installs the parts.

// Each test binary compiles this module and uses a part of it.
#![allow(dead_code)]

pub mod hostile;
pub mod minio;
// Binaries that use two of these files have it twice.
#[allow(clippy::duplicate_mod)]
mod skip;
pub mod slow;
pub mod vault;

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub use skip::skip;

/// The version that tests/parts/versitygw.sh installs.
const VERSITYGW_VERSION: &str = "1.8.0";

/// The folder into which tests/parts/install.sh puts what tests need.
pub fn parts_dir() -> PathBuf {
    match std::env::var_os("MODELFS_TEST_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/modelfs-tests"),
    }
}

/// The path of an installed part below the cache folder, or `None` after [`skip`].
pub fn part(relative: &str) -> Option<PathBuf> {
    let path = parts_dir().join(relative);
    if path.exists() {
        return Some(path);
    }
    skip(&format!("{} is not there; tests/parts/install.sh installs it", path.display()));
    None
}

/// versitygw over a folder of its own, stopped and removed when dropped.
pub struct S3Server {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl S3Server {
    pub const ACCESS_KEY: &'static str = "test-access";
    pub const SECRET_KEY: &'static str = "test-secret-0123456789";
    pub const BUCKET: &'static str = "models";

    /// A running server with one empty bucket, or `None` after [`skip`].
    pub fn start() -> Option<S3Server> {
        let program = part(&format!("versitygw-{VERSITYGW_VERSION}/bin/versitygw"))?;
        // Another test may take the free port between looking and binding: then the server dies and we look again.
        for _ in 0..10 {
            if let Some(server) = Self::start_on(&program, free_port()) {
                return Some(server);
            }
        }
        panic!("versitygw did not start on any of ten free ports");
    }

    fn start_on(program: &Path, port: u16) -> Option<S3Server> {
        let dir = tempfile::tempdir().expect("a folder for the server");
        for folder in ["data", "data/models", "sidecar"] {
            std::fs::create_dir(dir.path().join(folder)).expect("a folder in ours");
        }
        let mut command = Command::new(program);
        command
            .args(["--port", &format!("127.0.0.1:{port}"), "--quiet", "--keep-alive", "posix"])
            .arg("--sidecar")
            .arg(dir.path().join("sidecar"))
            .arg(dir.path().join("data"))
            .env("ROOT_ACCESS_KEY", Self::ACCESS_KEY)
            .env("ROOT_SECRET_KEY", Self::SECRET_KEY)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: prctl is async-signal-safe and touches nothing of the parent.
        unsafe {
            command.pre_exec(|| {
                // A test run that is killed must not leave its servers behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn().expect("versitygw can be started");
        let mut server = S3Server { child, port, dir };
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(120) {
            if server.child.try_wait().expect("our own child").is_some() {
                return None;
            }
            // Somebody else may answer there while ours has not yet met that the port is taken.
            if is_listener(server.child.id(), port) {
                return Some(server);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("versitygw did not listen within 120 s");
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Where the bucket's objects lie as plain files: a test can spoil them behind the server's back.
    pub fn bucket_dir(&self) -> PathBuf {
        self.dir.path().join("data").join(Self::BUCKET)
    }

    /// The settings of a client, by their environment names.
    pub fn settings(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL", self.endpoint().as_str()),
            ("AWS_ACCESS_KEY_ID", Self::ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", Self::SECRET_KEY),
            ("AWS_REGION", "us-east-1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this very process listens on `port`.
pub fn is_listener(pid: u32, port: u16) -> bool {
    let place = format!(":{port:04X}");
    let read = |table: &str| std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
    let sockets: Vec<PathBuf> = ["tcp", "tcp6"]
        .map(read)
        .concat()
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        // Its own address, the state LISTEN, its inode.
        .filter(|words| words.len() > 9 && words[1].ends_with(&place) && words[3] == "0A")
        .map(|words| PathBuf::from(format!("socket:[{}]", words[9])))
        .collect();
    let Ok(open) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    open.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| sockets.contains(&to)))
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("a bound listener has an address").port()
}
