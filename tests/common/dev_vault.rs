//! HashiCorp Vault in memory, unsealed, with a root token: for tests of what is built on it.
#![allow(dead_code)] // each test binary uses its own part

use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::common::{free_port, is_listener, part};
use super::program::run_ok;
use modelfs::vault::{AuthMethod, Vault, VaultSettings};

/// The version that tests/parts/vault.sh installs.
const VAULT: &str = "vault-1.13.0/bin/vault";

/// Stopped and removed when dropped.
pub struct DevVault {
    child: Child,
    program: PathBuf,
    port: u16,
    dir: tempfile::TempDir,
}

impl DevVault {
    pub const TOKEN: &'static str = "root-token-canary";

    /// A running server with KV v2 at `secret`, or `None` after [`super::skip`].
    pub fn start() -> Option<DevVault> {
        let program = part(VAULT)?;
        for _ in 0..10 {
            let dir = tempfile::tempdir().expect("a folder for the server");
            let port = free_port();
            let mut child = spawn(&program, dir.path(), port);
            if listens(&mut child, port) {
                let token = dir.path().join("token");
                std::fs::write(&token, Self::TOKEN).expect("a file");
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                std::fs::set_permissions(&token, mode).expect("our file");
                return Some(DevVault { child, program, port, dir });
            }
        }
        panic!("vault did not start on any of ten free ports");
    }

    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Where its root token lies, mode 0600.
    pub fn token_file(&self) -> PathBuf {
        self.dir.path().join("token")
    }

    /// The administrator's words: `admin(&["secrets", "enable", "aws"])`.
    pub fn admin(&self, words: &[&str]) {
        run_ok(&mut self.command(words));
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).env("VAULT_ADDR", self.address()).env("VAULT_TOKEN", Self::TOKEN);
        command.env("HOME", self.dir.path());
        command
    }

    /// A client of ours, as root.
    pub fn client(&self) -> Vault {
        let settings = VaultSettings {
            address: self.address(),
            namespace: None,
            ca_cert: None,
            client_cert: None,
            client_key: None,
            auth: AuthMethod::Token { file: Some(self.token_file()) },
            timeout: Duration::from_secs(120),
            check: Duration::from_secs(60),
            lock_on_loss: false,
        };
        Vault::open(&settings).expect("settings")
    }
}

fn spawn(program: &Path, home: &Path, port: u16) -> Child {
    let mut command = Command::new(program);
    command
        .args(["server", "-dev", "-dev-no-store-token", &format!("-dev-root-token-id={}", DevVault::TOKEN)])
        .arg(format!("-dev-listen-address=127.0.0.1:{port}"))
        .env("HOME", home)
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
    command.spawn().expect("vault can be started")
}

/// Whether it is this one that answers, and takes records, which its KV engine does a moment after Vault itself is well;
/// false if the port was taken.
fn listens(child: &mut Child, port: u16) -> bool {
    use std::io::{Read, Write};
    let record = r#"{"data":{"is":"it"}}"#;
    let request = format!(
        "POST /v1/secret/data/ready HTTP/1.0\r\nHost: x\r\nX-Vault-Token: {}\r\nContent-Length: {}\r\n\r\n{record}",
        DevVault::TOKEN,
        record.len()
    );
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(120) {
        if child.try_wait().expect("our own child").is_some() {
            return false;
        }
        // Another test's server may answer there while this one has not yet met that the port is taken.
        if is_listener(child.id(), port)
            && let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port))
        {
            let _ = stream.write_all(request.as_bytes());
            let mut answer = [0; 12];
            if stream.read_exact(&mut answer).is_ok() && answer.ends_with(b" 200") {
                return true;
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("vault was not ready within 120 s");
}

impl Drop for DevVault {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
