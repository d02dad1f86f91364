//! MinIO over a folder of its own: the S3 server whose STS gives out credentials that end.
#![allow(dead_code)] // each test binary uses its own part

use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{free_port, is_listener, part};

/// The version that tests/parts/vault.sh installs.
const MINIO: &str = "minio-v0.0.0-20260212201848-7aac2a2c5b7c/bin/minio";

/// Stopped and removed when dropped.
pub struct Minio {
    child: Child,
    program: PathBuf,
    port: u16,
    root_secret: String,
    dir: tempfile::TempDir,
}

impl Minio {
    pub const ROOT_KEY: &'static str = "test-root";
    pub const BUCKET: &'static str = "models";

    /// A running server with one empty bucket, or `None` after [`super::skip`].
    pub fn start() -> Option<Minio> {
        let program = part(MINIO)?;
        let dir = tempfile::tempdir().expect("a folder for the server");
        std::fs::create_dir_all(dir.path().join("data").join(Self::BUCKET)).expect("a bucket");
        let root_secret = "root-secret-0123456789".to_owned();
        for _ in 0..10 {
            let port = free_port();
            let mut child = spawn(&program, &dir.path().join("data"), port, &root_secret);
            if listens(&mut child, port) {
                return Some(Minio { child, program, port, root_secret, dir });
            }
        }
        panic!("minio did not start on any of ten free ports");
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn root_secret(&self) -> &str {
        &self.root_secret
    }

    /// Starts it again with another root key: every set that STS gave out so far is worthless from now on.
    pub fn change_root_secret(&mut self, secret: &str) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.root_secret = secret.to_owned();
        self.child = spawn(&self.program, &self.dir.path().join("data"), self.port, secret);
        assert!(listens(&mut self.child, self.port), "minio starts again on its own port");
    }
}

fn spawn(program: &std::path::Path, data: &std::path::Path, port: u16, secret: &str) -> Child {
    let mut command = Command::new(program);
    command
        .arg("server")
        .arg(data)
        .args(["--address", &format!("127.0.0.1:{port}")])
        .env("MINIO_ROOT_USER", Minio::ROOT_KEY)
        .env("MINIO_ROOT_PASSWORD", secret)
        .env("MINIO_BROWSER", "off")
        .env("MINIO_UPDATE", "off")
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
    command.spawn().expect("minio can be started")
}

/// Whether it answers that it is alive; false if the port was taken.
fn listens(child: &mut Child, port: u16) -> bool {
    use std::io::{Read, Write};
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(120) {
        if child.try_wait().expect("our own child").is_some() {
            return false;
        }
        if is_listener(child.id(), port)
            && let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port))
        {
            // It calls itself ready a moment before it serves: whom it does not know it tells so only then.
            let _ = stream.write_all(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n");
            let mut answer = [0; 12];
            if stream.read_exact(&mut answer).is_ok() && answer.ends_with(b" 403") {
                return true;
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("minio was not ready within 120 s");
}

impl Drop for Minio {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
