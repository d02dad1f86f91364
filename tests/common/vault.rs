//! HashiCorp Vault in memory, started for the tests of one binary, with a plain and a TLS listener.
#![allow(dead_code)] // each test binary uses its own part

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use modelfs::vault::{AuthMethod, VaultSettings};
use serde_json::{Value, json};

use super::{free_port, part};

/// The version that tests/parts/vault.sh installs.
const VAULT: &str = "vault-1.13.0/bin/vault";

/// Stopped and removed when dropped.
pub struct VaultServer {
    child: Child,
    port: u16,
    tls_port: u16,
    dir: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
}

impl VaultServer {
    pub const ROOT: &'static str = "root-token-of-the-tests";

    /// One for the whole test binary; a test uses mounts and roles with names of its own. `None` after [`super::skip`].
    pub fn shared() -> Option<&'static VaultServer> {
        static SERVER: OnceLock<Option<VaultServer>> = OnceLock::new();
        let server = SERVER.get_or_init(|| {
            part(VAULT)?;
            // The kernel ends the server with the thread that started it, so this one stays.
            let (sender, receiver) = sync_channel(1);
            std::thread::spawn(move || {
                sender.send(VaultServer::start()).expect("somebody waits");
                loop {
                    std::thread::park();
                }
            });
            receiver.recv().expect("vault starts")
        });
        if server.is_none() {
            part(VAULT)?;
        }
        server.as_ref()
    }

    /// A server that may be sealed and stopped.
    pub fn start() -> Option<VaultServer> {
        let program = part(VAULT)?;
        for _ in 0..10 {
            if let Some(server) = Self::start_on(&program, free_port(), free_port()) {
                return Some(server);
            }
        }
        panic!("vault did not start on any of ten free ports");
    }

    fn start_on(program: &Path, port: u16, tls_port: u16) -> Option<VaultServer> {
        // Not below /tmp: a server that is shared is never dropped, and its folder stays.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder for the server");
        certificates(dir.path());
        let at = dir.path().display();
        let config = format!(
            "listener \"tcp\" {{\n  address = \"127.0.0.1:{tls_port}\"\n  tls_cert_file = \"{at}/server.pem\"\n  \
             tls_key_file = \"{at}/server.key\"\n}}\n"
        );
        std::fs::write(dir.path().join("tls.hcl"), config).expect("written");
        let log = std::fs::File::create(dir.path().join("log")).expect("a log");
        let mut command = Command::new(program);
        command
            .args(["server", "-dev", "-dev-no-store-token", &format!("-dev-root-token-id={}", Self::ROOT)])
            .arg(format!("-dev-listen-address=127.0.0.1:{port}"))
            .arg(format!("-config={at}/tls.hcl"))
            .env("HOME", dir.path())
            .env_remove("VAULT_TOKEN")
            .env_remove("VAULT_ADDR")
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log);
        // SAFETY: prctl is async-signal-safe and touches nothing of the parent.
        unsafe {
            command.pre_exec(|| {
                // A test run that is killed must not leave its servers behind.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn().expect("vault can be started");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let http = reqwest::Client::builder().no_proxy().build().expect("a client");
        let mut server = VaultServer { child, port, tls_port, dir, runtime: runtime.expect("a runtime"), http };
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(120) {
            if server.child.try_wait().expect("our own child").is_some() {
                return None;
            }
            // It is well before its KV engine takes anything.
            let record = json!({ "data": { "is": "it" } });
            let done = |answer: Option<(u16, Value)>| answer.is_some_and(|(status, _)| status == 200);
            if done(server.try_call("GET", "sys/health", None, ""))
                && server.log().contains("Unseal Key: ")
                && done(server.try_call("POST", "secret/data/ready", Some(record), Self::ROOT))
            {
                return Some(server);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("vault was not ready within 120 s: {}", server.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn tls_address(&self) -> String {
        format!("https://127.0.0.1:{}", self.tls_port)
    }

    /// `ca.pem`, `client.pem`, `client.key`, `stranger.pem`, `stranger.key` of another authority, and `expired.pem`,
    /// `expired.key`, the client's name in a certificate whose time is over.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file that nobody else can read.
    pub fn secret_file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        let mut options = OpenOptions::new();
        let mut file = options.create(true).write(true).truncate(true).mode(0o600).open(&path).expect("our folder");
        file.write_all(text.as_bytes()).expect("written");
        path
    }

    fn try_call(&self, method: &str, path: &str, body: Option<Value>, token: &str) -> Option<(u16, Value)> {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self.http.request(method, format!("{}/v1/{path}", self.address()));
        if !token.is_empty() {
            request = request.header("X-Vault-Token", token);
        }
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        self.runtime.block_on(async {
            let answer = request.send().await.ok()?;
            let status = answer.status().as_u16();
            let body = answer.bytes().await.ok()?;
            Some((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
        })
    }

    /// As the administrator; fails unless Vault does it.
    pub fn admin(&self, method: &str, path: &str, body: Value) -> Value {
        let body = (!body.is_null()).then_some(body);
        let (status, answer) = self.try_call(method, path, body, Self::ROOT).expect("vault answers its administrator");
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    pub fn write(&self, path: &str, body: Value) -> Value {
        self.admin("POST", path, body)
    }

    /// An auth method of `kind` at auth/`mount`.
    pub fn enable_auth(&self, mount: &str, kind: &str) {
        self.write(&format!("sys/auth/{mount}"), json!({ "type": kind }));
    }

    pub fn enable_transit(&self, mount: &str) {
        self.write(&format!("sys/mounts/{mount}"), json!({ "type": "transit" }));
    }

    pub fn policy(&self, name: &str, hcl: &str) {
        self.admin("PUT", &format!("sys/policies/acl/{name}"), json!({ "policy": hcl }));
    }

    /// A token with these options of `auth/token/create`.
    pub fn token(&self, options: Value) -> String {
        let answer = self.write("auth/token/create", options);
        answer["auth"]["client_token"].as_str().expect("a token").to_owned()
    }

    /// An AppRole mount with the role `server`; answers its role-id.
    pub fn approle(&self, mount: &str, options: Value) -> String {
        self.enable_auth(mount, "approle");
        self.write(&format!("auth/{mount}/role/server"), options);
        let answer = self.admin("GET", &format!("auth/{mount}/role/server/role-id"), Value::Null);
        answer["data"]["role_id"].as_str().expect("a role-id").to_owned()
    }

    pub fn secret_id(&self, mount: &str) -> String {
        let answer = self.write(&format!("auth/{mount}/role/server/secret-id"), json!({}));
        answer["data"]["secret_id"].as_str().expect("a secret-id").to_owned()
    }

    /// A new secret-id within a wrapping token.
    pub fn wrapped_secret_id(&self, mount: &str) -> String {
        let url = format!("{}/v1/auth/{mount}/role/server/secret-id", self.address());
        let request = self.http.post(url).header("X-Vault-Token", Self::ROOT).header("X-Vault-Wrap-TTL", "6h");
        let body = self.runtime.block_on(async { request.send().await.expect("an answer").bytes().await });
        let answer: Value = serde_json::from_slice(&body.expect("a body")).expect("JSON");
        answer["wrap_info"]["token"].as_str().expect("a wrapping token").to_owned()
    }

    /// Whether the token holds.
    pub fn knows(&self, token: &str) -> bool {
        self.try_call("GET", "auth/token/lookup-self", None, token.trim()).is_some_and(|(status, _)| status == 200)
    }

    /// Vault Agent with this configuration, until dropped.
    pub fn agent(&self, config: &Path) -> Agent {
        let mut command = Command::new(part(VAULT).expect("this server is one"));
        command.arg("agent").arg(format!("-config={}", config.display())).env("HOME", self.dir.path());
        for name in ["VAULT_TOKEN", "VAULT_ADDR"] {
            command.env_remove(name);
        }
        let log = std::fs::File::create(self.dir.path().join("agent.log")).expect("a log");
        command.stdout(log.try_clone().expect("a second handle")).stderr(log);
        Agent(command.spawn().expect("vault can be started"))
    }

    /// Whether somebody unwrapped it: then nobody else can.
    pub fn unwrap(&self, wrapping: &str) -> bool {
        self.try_call("POST", "sys/wrapping/unwrap", None, wrapping).is_some_and(|(status, _)| status == 200)
    }

    pub fn seal(&self) {
        self.admin("PUT", "sys/seal", Value::Null);
    }

    pub fn unseal(&self) {
        let log = self.log();
        let key = log.lines().find_map(|line| line.strip_prefix("Unseal Key: ")).expect("a dev server says it");
        let body = json!({ "key": key.trim() });
        let (status, _) = self.try_call("PUT", "sys/unseal", Some(body), "").expect("an answer");
        assert_eq!(status, 200);
    }

    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// A client that looks at its token often.
    pub fn settings(&self, auth: AuthMethod) -> VaultSettings {
        VaultSettings {
            address: self.address(),
            namespace: None,
            ca_cert: None,
            client_cert: None,
            client_key: None,
            auth,
            timeout: Duration::from_secs(120),
            check: Duration::from_millis(200),
            lock_on_loss: false,
        }
    }
}

pub struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for VaultServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// An authority with a server's and a client's certificate, and a client of another authority.
fn certificates(dir: &Path) {
    let script = "
        pair() { openssl ecparam -name prime256v1 -genkey -noout -out $1.key; }
        authority() { pair $1; openssl req -x509 -new -key $1.key -subj /CN=$1 -days 30 -out $1.pem; }
        leaf() { # NAME AUTHORITY EXTENSIONS [COMMON NAME [DAYS]]
            pair $1; openssl req -new -key $1.key -subj /CN=${4:-$1} -out $1.csr
            printf \"$3\" > $1.ext
            openssl x509 -req -in $1.csr -CA $2.pem -CAkey $2.key -CAcreateserial -days ${5:-30} -extfile $1.ext -out $1.pem
        }
        authority ca; authority other
        leaf server ca 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth'
        leaf client ca 'subjectAltName=DNS:models\\nextendedKeyUsage=clientAuth'
        leaf stranger other 'subjectAltName=DNS:models\\nextendedKeyUsage=clientAuth'
        leaf expired ca 'subjectAltName=DNS:models\\nextendedKeyUsage=clientAuth' client -1
        chmod 600 *.key";
    let mut shell = Command::new("bash");
    shell.args(["-euc", script]).current_dir(dir).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(shell.status().expect("bash runs").success(), "openssl made the certificates");
}
