//! As much of Vault as a mount needs, told by a test whom it takes: one user, a key in KV version 2, no floors, storage
//! credentials by lease.
#![allow(dead_code)] // each test binary uses its own part

use std::collections::HashSet;
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::hostile::{Hostile, Request, respond};

const PASSWORD: &str = "canary-password";

#[derive(Default)]
struct Rights {
    tokens: HashSet<String>,
    issued: u64,
    shut: bool,
    /// Of storage credentials, by the number in their key id.
    leases: HashSet<u64>,
    lent: u64,
}

pub struct FakeVault {
    server: Hostile,
    rights: Arc<Mutex<Rights>>,
    password_file: PathBuf,
}

impl FakeVault {
    /// With a password below `folder` that it takes.
    pub fn start(folder: &Path) -> FakeVault {
        let password_file = folder.join("vault-password");
        let mut options = std::fs::OpenOptions::new();
        let opened = options.create(true).write(true).truncate(true).mode(0o600).open(&password_file);
        std::io::Write::write_all(&mut opened.expect("our folder"), PASSWORD.as_bytes()).expect("written");
        let rights: Arc<Mutex<Rights>> = Arc::default();
        let of_server = rights.clone();
        let server = Hostile::start(move |request: &Request, stream: &mut TcpStream| {
            let (status, answer) = of_server.lock().expect("no panic under the lock").answer(request);
            respond(stream, status, &[("Content-Type", "application/json")], answer.to_string().as_bytes())
        });
        FakeVault { server, rights, password_file }
    }

    /// The words of a mount or a publisher that logs in here and has its key and floor here.
    pub fn words(&self) -> Vec<String> {
        vec![
            format!("vault-addr={}", self.server.endpoint()),
            "vault-auth=userpass".into(),
            "vault-username=ann".into(),
            format!("vault-password-file={}", self.password_file.display()),
            "key=vault-kv:secret/key#key".into(),
            "floor=vault-kv:secret/floor".into(),
        ]
    }

    /// Knows none of its tokens any more.
    pub fn revoke_all(&self) {
        let mut rights = self.rights.lock().expect("no panic under the lock");
        rights.tokens.clear();
        rights.leases.clear();
    }

    /// Refuses every login from now on, or takes them again.
    pub fn shut(&self, shut: bool) {
        self.rights.lock().expect("no panic under the lock").shut = shut;
    }

    /// Logins so far.
    pub fn issued(&self) -> u64 {
        self.rights.lock().expect("no panic under the lock").issued
    }

    /// Knows none of its leases any more: those of storage credentials, not the tokens.
    pub fn revoke_leases(&self) {
        self.rights.lock().expect("no panic under the lock").leases.clear();
    }

    /// What a store asks: whether a request is signed with credentials whose lease is there.
    pub fn takes(&self) -> impl Fn(&Request) -> bool + Send + Sync + use<> {
        let rights = self.rights.clone();
        move |request| {
            let number = request.header("authorization").and_then(|header| {
                let (_, key) = header.split_once("Credential=AK")?;
                key.split_once('/')?.0.parse().ok()
            });
            number.is_some_and(|number: u64| rights.lock().expect("no panic under the lock").leases.contains(&number))
        }
    }

    /// Storage credentials lent so far.
    pub fn lent(&self) -> u64 {
        self.rights.lock().expect("no panic under the lock").lent
    }

    /// Tokens that live.
    pub fn tokens(&self) -> usize {
        self.rights.lock().expect("no panic under the lock").tokens.len()
    }
}

impl Rights {
    fn answer(&mut self, request: &Request) -> (&'static str, Value) {
        let refused = |status, why: &str| (status, json!({ "errors": [why] }));
        let path = request.target.strip_prefix("/v1/").unwrap_or_default();
        let path = path.split('?').next().unwrap_or_default();
        if path == "auth/userpass/login/ann" {
            let right = String::from_utf8_lossy(&request.body).contains(PASSWORD);
            if self.shut || !right {
                return refused("400 Bad Request", "invalid username or password");
            }
            self.issued += 1;
            let token = format!("canary-token-{}", self.issued);
            self.tokens.insert(token.clone());
            let auth = json!({
                "client_token": token, "accessor": "a", "policies": [], "token_policies": [], "metadata": null,
                "lease_duration": 3600, "renewable": true, "entity_id": "", "token_type": "service", "orphan": true,
            });
            return ("200 OK", whole(Value::Null, auth));
        }
        let token = request.header("x-vault-token").unwrap_or_default();
        if !self.tokens.contains(token) {
            return refused("403 Forbidden", "permission denied");
        }
        match path {
            "auth/token/revoke-self" => {
                self.tokens.remove(token);
                ("200 OK", whole(Value::Null, Value::Null))
            }
            "auth/token/lookup-self" => {
                let data = json!({ "ttl": 3600, "renewable": true, "expire_time": "2099-01-01T00:00:00Z" });
                ("200 OK", whole(data, Value::Null))
            }
            "aws/creds/models" => {
                self.lent += 1;
                let number = self.lent;
                self.leases.insert(number);
                let data = json!({
                    "access_key": format!("AK{number}"), "secret_key": "canary-s3-secret", "security_token": null,
                });
                let mut lease = whole(data, Value::Null);
                lease["lease_id"] = json!(format!("aws/creds/models/{number}"));
                lease["lease_duration"] = json!(3600);
                ("200 OK", lease)
            }
            "sys/leases/lookup" | "sys/leases/revoke" => {
                let asked: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                let number = asked["lease_id"].as_str().and_then(|id| id.rsplit('/').next()?.parse::<u64>().ok());
                let known = number.is_some_and(|number| match path {
                    "sys/leases/revoke" => self.leases.remove(&number),
                    _ => self.leases.contains(&number),
                });
                match (path, known) {
                    ("sys/leases/revoke", _) => ("200 OK", whole(Value::Null, Value::Null)),
                    (_, true) => ("200 OK", whole(json!({ "id": asked["lease_id"], "ttl": 3000 }), Value::Null)),
                    (_, false) => refused("400 Bad Request", "invalid lease"),
                }
            }
            "secret/data/key" => {
                let metadata = json!({
                    "created_time": "2026-01-01T00:00:00Z", "deletion_time": "", "destroyed": false, "version": 1,
                    "custom_metadata": null,
                });
                let data = json!({ "data": { "key": "5a".repeat(32) }, "metadata": metadata });
                ("200 OK", whole(data, Value::Null))
            }
            floor if floor.starts_with("secret/data/floor/") => match request.method.as_str() {
                "GET" => ("404 Not Found", json!({ "errors": [] })),
                _ => (
                    "200 OK",
                    whole(
                        json!({ "created_time": "2026-01-01T00:00:00Z", "deletion_time": "",
                    "destroyed": false, "version": 1, "custom_metadata": null }),
                        Value::Null,
                    ),
                ),
            },
            _ => refused("404 Not Found", "no handler for route"),
        }
    }
}

fn whole(data: Value, auth: Value) -> Value {
    json!({
        "request_id": "r", "lease_id": "", "renewable": false, "lease_duration": 0, "data": data, "wrap_info": null,
        "warnings": null, "auth": auth,
    })
}
