//! A catalog in a real Vault, models in a real S3 server, the program as a user runs it.

mod common;
#[path = "common/dev_vault.rs"]
mod dev_vault;
#[path = "common/program.rs"]
mod program;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::S3Server;
use common::hostile::{Hostile, Request, respond};
use dev_vault::DevVault;
use modelfs::catalog::{Records, VaultRecords};
use modelfs::error::Code;
use program::{Program, can_mount, is_mountpoint, run_ok};
use serde_json::{Value, json};

struct World {
    vault: DevVault,
    s3: S3Server,
    program: Program,
    source: PathBuf,
    _dir: tempfile::TempDir,
}

const CATALOG: &str = "vault-kv://secret/models";
const STORE: &str = "s3://models/prod";

impl World {
    fn start() -> Option<World> {
        let (vault, s3) = (DevVault::start()?, S3Server::start()?);
        let dir = tempfile::tempdir().expect("a folder");
        let program = Program::in_folder(dir.path());
        let source = dir.path().join("source");
        std::fs::create_dir(&source).expect("mkdir");
        std::fs::write(source.join("config.json"), b"{\"a\": 1}\n").expect("write");
        std::fs::write(source.join("weights.bin"), common::hostile::object(3_000_000)).expect("write");
        Some(World { vault, s3, program, source, _dir: dir })
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.program.command(words);
        command.env("VAULT_ADDR", self.vault.address()).envs(self.s3.settings());
        command.env("MODELFS_VAULT_TOKEN_FILE", self.vault.token_file());
        command
    }

    fn seal(&self, name: &str, more: &[&str]) -> Value {
        let mut command = self.command(&["seal", "--json"]);
        command.arg(&self.source).args([STORE, name]).args(more);
        serde_json::from_slice(&run_ok(&mut command).stdout).expect("JSON")
    }

    fn seal_raw(&self, name: &str, record: &str) -> Value {
        let at = format!("{CATALOG}/{record}");
        self.seal(name, &["--key", &self.program.key(), "--register", &at, "--register-raw-key"])
    }

    fn ls(&self) -> Value {
        serde_json::from_slice(&run_ok(&mut self.command(&["ls", "--json", CATALOG])).stdout).expect("JSON")
    }

    /// Mounts with `more` options, looks with `look`, unmounts.
    fn mounted(&self, more: &[&str], look: impl FnOnce(&std::path::Path)) {
        let mountpoint = self.program.mountpoint();
        let mut command = self.command(&["mount", CATALOG, "--daemon"]);
        run_ok(command.arg(mountpoint).arg("--trust").arg(self.program.trusted_key()).args(more));
        assert!(is_mountpoint(mountpoint));
        look(mountpoint);
        run_ok(self.command(&["umount"]).arg(mountpoint));
    }

    /// A mount that must be refused: its exit code and what it said.
    fn refused(&self, trusted: bool, more: &[&str]) -> (i32, String) {
        let mut command = self.command(&["mount", CATALOG]);
        command.arg(self.program.mountpoint());
        if trusted {
            command.arg("--trust").arg(self.program.trusted_key());
        }
        let output = end_of(command.args(more));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().expect("an exit"), text)
    }

    fn record(&self, name: &str) -> serde_json::Map<String, Value> {
        let records = VaultRecords(self.vault.client());
        records.read("secret", &format!("models/{name}")).expect("read").expect("there").0
    }

    fn put(&self, name: &str, record: &serde_json::Map<String, Value>) {
        let records = VaultRecords(self.vault.client());
        let path = format!("models/{name}");
        let before = records.read("secret", &path).expect("read").map_or(0, |(_, version)| version);
        records.write("secret", &path, record, before).expect("written");
    }
}

/// Runs to its end, which must come: a mount that stands would run for ever.
fn end_of(command: &mut Command) -> Output {
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary runs");
    let start = Instant::now();
    while child.try_wait().expect("our child").is_none() {
        if start.elapsed() > Duration::from_secs(180) {
            // SAFETY: our own child, not yet waited for.
            unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
            let output = child.wait_with_output().expect("ended");
            panic!("it was not refused: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().expect("ended")
}

#[test]
fn what_is_sealed_and_registered_is_listed_and_mounted_by_its_record_alone() {
    let Some(world) = World::start() else { return };
    let sealed = world.seal_raw("acme/llama", "acme/llama");
    assert_eq!(sealed["registered"]["version"], 1);
    world.seal_raw("acme/other", "short-name");

    let listed = world.ls();
    let models = listed["models"].as_array().expect("models");
    let names: Vec<&str> = models.iter().filter_map(|model| model["name"].as_str()).collect();
    assert_eq!(names, ["acme/llama", "short-name"]);
    assert_eq!(models[0]["manifest"].as_str(), sealed["manifest"].as_str().and_then(|m| m.strip_prefix("sha256:")));
    assert_eq!((&models[0]["bytes"], &models[0]["key"]), (&sealed["bytes"], &json!("raw")));
    let key = world.record("acme/llama")["encryption_key"].as_str().expect("text").to_owned();
    assert!(!listed.to_string().contains(&key), "no key is shown");

    if !can_mount() {
        return;
    }
    // No key and no store is named: the records say it all. `vault kv put` would have written the size as text.
    let mut record = world.record("short-name");
    record["size_bytes"] = json!(record["size_bytes"].to_string());
    record.insert("owner".into(), json!({"team": "x"}));
    world.put("short-name", &record);
    world.mounted(&[], |mountpoint| {
        for name in ["acme/llama", "short-name"] {
            let read = std::fs::read(mountpoint.join(name).join("weights.bin")).expect("read");
            assert!(read == common::hostile::object(3_000_000), "{name}");
        }
    });
    world.mounted(&["--model", "short-name"], |mountpoint| {
        assert!(mountpoint.join("short-name/config.json").exists());
        assert!(!mountpoint.join("acme").exists());
    });

    // A new version is served when the record names it, and the fields of others stay.
    std::fs::write(world.source.join("config.json"), b"{\"a\": 2}\n").expect("write");
    assert_eq!(world.seal_raw("acme/other", "short-name")["registered"]["version"], 3);
    assert_eq!(world.record("short-name")["owner"], json!({"team": "x"}));
    world.mounted(&["--model", "short-name"], |mountpoint| {
        assert_eq!(std::fs::read(mountpoint.join("short-name/config.json")).expect("read"), b"{\"a\": 2}\n");
    });
}

/// The record holds what transit made of the data key; which transit key that was, the mount says.
#[test]
fn a_record_with_a_transit_ciphertext_opens_with_the_transit_key_that_the_mount_names() {
    let Some(world) = World::start() else { return };
    world.vault.admin(&["secrets", "enable", "transit"]);
    for key in ["models", "foreign"] {
        world.vault.admin(&["write", "-f", &format!("transit/keys/{key}"), "derived=true"]);
    }
    let at = format!("{CATALOG}/acme/llama");
    world.seal("acme/llama", &["--key", "vault-transit:transit/models", "--register", &at]);
    let record = world.record("acme/llama");
    assert!(record["encryption_key"].as_str().expect("text").starts_with("vault:v1:"));
    assert_eq!(world.ls()["models"][0]["key"], "vault-transit");

    let (exit, text) = world.refused(true, &["--model", "acme/llama"]);
    assert_eq!((exit, text.contains("--key vault-transit:MOUNT/KEY")), (2, true), "{text}");
    let (_, text) = world.refused(true, &["--model", "acme/llama", "--key", "vault-transit:transit/foreign"]);
    assert!(text.contains("does not open"), "{text}");
    if can_mount() {
        let keys = ["--key", "vault-transit:transit/foreign", "--key", "vault-transit:transit/models"];
        world.mounted(&keys, |mountpoint| {
            let read = std::fs::read(mountpoint.join("acme/llama/weights.bin")).expect("read");
            assert!(read == common::hostile::object(3_000_000));
        });
    }
}

/// A record holds a key of its own: whoever rotates keys has to bring it along, or it opens nothing any more.
#[test]
fn a_record_follows_a_rotation_that_names_it_and_one_left_behind_says_how() {
    let Some(world) = World::start() else { return };
    world.vault.admin(&["secrets", "enable", "transit"]);
    world.vault.admin(&["write", "-f", "transit/keys/models", "derived=true"]);
    let at = format!("{CATALOG}/acme/llama");
    let (transit, raw) = ("vault-transit:transit/models", world.program.key());
    world.seal("acme/llama", &["--key", transit, "--key", &raw, "--register", &at]);
    let served = |more: &[&str]| {
        if can_mount() {
            world.mounted(more, |mountpoint| {
                let read = std::fs::read(mountpoint.join("acme/llama/weights.bin")).expect("read");
                assert!(read == common::hostile::object(3_000_000));
            });
        }
    };
    let named = || world.record("acme/llama")["checksum"].as_str().expect("text").to_owned();
    let rotate = |more: &[&str]| -> Output {
        world.command(&["key", "rotate", STORE, "acme/llama", "--json"]).args(more).output().expect("runs")
    };
    let rotated = |more: &[&str]| -> Value {
        let output = rotate(more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };

    // L0 as docs/KEYS.md has it, first without the record.
    world.vault.admin(&["write", "-f", "transit/keys/models/rotate"]);
    rotated(&["--rewrap", "--key", transit]);
    world.vault.admin(&["write", "transit/keys/models/config", "min_decryption_version=2"]);
    let (_, text) = world.refused(true, &["--model", "acme/llama", "--key", transit]);
    assert!(text.contains("VAULT_DENIED") && text.contains(&format!("key rotate ... --register {at}")), "{text}");
    let before = named();
    let followed = rotated(&["--rewrap", "--key", transit, "--register", &at]);
    assert_eq!((&followed["status"], &followed["registered"]["version"]), (&json!("unchanged"), &json!(2)));
    assert!(world.record("acme/llama")["encryption_key"].as_str().expect("text").starts_with("vault:v2:"));
    assert_eq!(named(), before, "the version is the same");
    served(&["--key", transit]);
    let again = rotated(&["--rewrap", "--key", transit, "--register", &at]);
    assert_eq!(again["registered"]["version"], 2, "nothing was new");

    // L1 of the raw key, which the record is to hold from here on.
    let new = world.program.root().join("home/new.key");
    run_ok(world.program.command(&["keygen"]).arg(&new));
    let new = format!("file:{}", new.display());
    let asked = rotate(&["--key", &raw, "--to", &new, "--register", &at]);
    let text = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert_eq!((asked.status.code(), text.contains("--register-raw-key")), (Some(2), true), "{text}");
    rotated(&["--key", &raw, "--to", &new, "--register", &at, "--register-raw-key"]);
    assert_eq!((world.ls()["models"][0]["key"].as_str(), named()), (Some("raw"), before.clone()));
    served(&[]);

    // L2: the record names the new version.
    let sealed = rotated(&["--key", &new, "--new-key", "--register", &at, "--register-raw-key"]);
    assert_eq!(sealed["manifest"].as_str(), Some(named().as_str()));
    assert_ne!(named(), before);
    served(&[]);
    // L1 without the record: it tells what it is for as well.
    rotated(&["--key", &new, "--to", &raw]);
    let (_, text) = world.refused(true, &["--model", "acme/llama"]);
    assert!(text.contains("NO_KEY") && text.contains(&format!("key rotate ... --register {at}")), "{text}");
}

/// What becomes of the next writes of records.
#[derive(Clone, Copy, PartialEq)]
enum RecordWrite {
    Applied,
    /// 503, as by a Vault that is sealed.
    Refused,
    /// Nobody answers any more, after it was applied or without.
    Unanswered {
        applied: bool,
    },
}

/// Stands before the real Vault.
struct Between {
    server: Hostile,
    rule: Arc<Mutex<RecordWrite>>,
    met: Arc<AtomicUsize>,
}

impl Between {
    fn start(vault: &DevVault) -> Between {
        let to = vault.address().strip_prefix("http://").expect("plain HTTP").to_owned();
        let (rule, met) = (Arc::new(Mutex::new(RecordWrite::Applied)), Arc::new(AtomicUsize::new(0)));
        let (of_server, meeting) = (Arc::clone(&rule), Arc::clone(&met));
        let server = Hostile::start(move |request, stream| {
            let writes = request.method != "GET" && request.target.contains("/secret/data/models/");
            let rule = if writes { *of_server.lock().expect("whole") } else { RecordWrite::Applied };
            let (answer, unanswered) = match rule {
                RecordWrite::Applied => (Some(hand_on(&to, request)?), false),
                RecordWrite::Refused => (None, false),
                RecordWrite::Unanswered { applied: true } => (Some(hand_on(&to, request)?), true),
                RecordWrite::Unanswered { applied: false } => (None, true),
            };
            if rule != RecordWrite::Applied {
                meeting.fetch_add(1, Ordering::Release);
            }
            match answer {
                // Until whoever asked is gone.
                _ if unanswered => std::io::copy(stream, &mut std::io::sink()).map(drop),
                Some(answer) => stream.write_all(&answer),
                None => {
                    let sealed = br#"{"errors":["Vault is sealed"]}"#;
                    respond(stream, "503 Service Unavailable", &[("Content-Type", "application/json")], sealed)
                }
            }
        });
        Between { server, rule, met }
    }

    fn set(&self, rule: RecordWrite) {
        *self.rule.lock().expect("whole") = rule;
        self.met.store(0, Ordering::Release);
    }
}

/// What the server at `to` answers to this request.
fn hand_on(to: &str, request: &Request) -> std::io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(to)?;
    let mut head = format!("{} {} HTTP/1.1\r\nConnection: close\r\n", request.method, request.target);
    for (name, value) in request.headers.iter().filter(|(name, _)| name != "connection") {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    server.write_all(&[head.as_bytes(), b"\r\n", &request.body].concat())?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Whoever goes by the record opens the model at every moment: the old key is taken away when the record has the new one.
#[test]
fn a_rotation_that_dies_around_the_write_of_its_record_leaves_one_that_opens_and_a_rerun_completes_it() {
    let Some(world) = World::start() else { return };
    let between = Between::start(&world.vault);
    let (old, new) = (world.program.key(), format!("file:{}", world.program.root().join("home/new.key").display()));
    run_ok(world.program.command(&["keygen"]).arg(world.program.root().join("home/new.key")));
    let rules = [
        ("refused", RecordWrite::Refused),
        ("unheard", RecordWrite::Unanswered { applied: false }),
        ("applied", RecordWrite::Unanswered { applied: true }),
    ];
    for (name, rule) in rules {
        world.seal_raw(name, name);
        let before = world.record(name);
        let at = format!("{CATALOG}/{name}");
        let rotate = || {
            let words = ["key", "rotate", STORE, name, "--key", &old, "--to", &new, "--register", &at, "--json"];
            let mut command = world.command(&words);
            command.arg("--register-raw-key");
            command
        };
        between.set(rule);
        let mut dying = rotate();
        dying.env("VAULT_ADDR", between.server.endpoint());
        if rule == RecordWrite::Refused {
            dying.args(["--vault-timeout", "5m"]);
            let output = end_of(&mut dying);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success(), "{name}: the record was not written");
            assert!(text.contains("the old key and the new one open version 1") && text.contains("again"), "{text}");
        } else {
            dying
                .args(["--vault-timeout", "5m"])
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null());
            let mut child = dying.spawn().expect("the binary runs");
            let start = Instant::now();
            while between.met.load(Ordering::Acquire) == 0 {
                assert!(start.elapsed() < Duration::from_secs(120), "{name}: it never wrote the record");
                assert!(child.try_wait().expect("our child").is_none(), "{name}: it ended before it wrote the record");
                std::thread::sleep(Duration::from_millis(20));
            }
            child.kill().expect("our child");
            child.wait().expect("our child");
        }
        let verify = |key: &str| {
            let mut verify = world.command(&["verify", STORE, name, "--key", key, "--trust"]);
            verify.arg(world.program.trusted_key()).output().expect("runs").status.code().expect("an exit")
        };
        let by_record = || {
            if can_mount() {
                world.mounted(&["--model", name], |mountpoint| {
                    let read = std::fs::read(mountpoint.join(name).join("weights.bin")).expect("read");
                    assert!(read == common::hostile::object(3_000_000), "{name}");
                });
            }
        };
        let applied = rule == RecordWrite::Unanswered { applied: true };
        assert_eq!(world.record(name) != before, applied, "{name}");
        assert_eq!((verify(&old), verify(&new)), (0, 0), "{name}: both keys are in");
        by_record();

        let again: Value = serde_json::from_slice(&run_ok(&mut rotate()).stdout).expect("JSON");
        assert_eq!(
            (&again["status"], &again["registered"]["version"]),
            (&json!("rotated"), &json!(2)),
            "{name}: {again}"
        );
        assert_eq!(
            again["removed"].as_array().map(|labels| labels.contains(&json!("key-file"))),
            Some(true),
            "{again}"
        );
        assert_eq!((verify(&old), verify(&new)), (25, 0), "{name}");
        by_record();
        let third: Value = serde_json::from_slice(&run_ok(&mut rotate()).stdout).expect("JSON");
        assert_eq!((&third["status"], &third["registered"]["version"]), (&json!("unchanged"), &json!(2)), "{third}");
        let mut list = world.command(&["key", "list", STORE, name, "--json", "--trust"]);
        let list: Value = serde_json::from_slice(&run_ok(list.arg(world.program.trusted_key())).stdout).expect("JSON");
        let labels: Vec<&Value> = list["slots"].as_array().expect("slots").iter().map(|slot| &slot["label"]).collect();
        assert_eq!(labels, [&json!("key-file")], "{name}");
    }
}

/// The records are keys from Vault, though no `--key` names one.
#[test]
fn a_catalog_of_raw_keys_is_locked_when_vault_takes_the_token_back() {
    let Some(world) = World::start() else { return };
    if !can_mount() {
        return;
    }
    world.seal_raw("acme/llama", "acme/llama");
    let token = run_ok(&mut world.vault.command(&["token", "create", "-policy=root", "-field=token"])).stdout;
    let token = String::from_utf8(token).expect("text").trim().to_owned();
    let file = world.program.root().join("home/token");
    std::fs::write(&file, &token).expect("written");
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("ours");
    let mountpoint = world.program.mountpoint();
    let mut mount = world.command(&["mount", CATALOG, "--daemon", "--on-key-loss", "lock", "--open", "lazy"]);
    mount.env("MODELFS_VAULT_TOKEN_FILE", &file).arg(mountpoint).arg("--trust").arg(world.program.trusted_key());
    run_ok(&mut mount);
    let weights = mountpoint.join("acme/llama/weights.bin");
    assert!(std::fs::read(&weights).expect("read") == common::hostile::object(3_000_000));
    let held = std::fs::File::open(&weights).expect("open");

    world.vault.admin(&["token", "revoke", &token]);
    let until = |what: &str, done: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(120), "{what} two minutes after the token was revoked");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    until("still opened", &|| std::fs::File::open(&weights).is_err());
    let denied = std::fs::File::open(&weights).expect_err("locked");
    assert_eq!(denied.raw_os_error(), Some(libc::EACCES), "{denied}");
    // Opens are refused first, then what is open is cut off.
    let read = || std::os::unix::fs::FileExt::read_at(&held, &mut [0; 4096], 0);
    // EACCES, or the end of a file that the kernel served by itself.
    until("an open file still read", &|| !matches!(read(), Ok(1..)));
    drop(held);
    let status = run_ok(world.command(&["status", "--json"]).arg(mountpoint)).stdout;
    let status = String::from_utf8_lossy(&status).into_owned();
    assert!(status.contains("\"lost\""), "{status}");
    run_ok(world.command(&["umount"]).arg(mountpoint));
}

/// A record that got the ciphertext of another version would open nothing.
#[test]
fn a_record_of_another_version_is_refused_before_anything_is_rewrapped() {
    let Some(world) = World::start() else { return };
    world.vault.admin(&["secrets", "enable", "transit"]);
    world.vault.admin(&["write", "-f", "transit/keys/models", "derived=true"]);
    let (at, transit) = (format!("{CATALOG}/acme/llama"), "vault-transit:transit/models");
    world.seal("acme/llama", &["--key", transit, "--register", &at]);
    std::fs::write(world.source.join("config.json"), b"{\"a\": 2}\n").expect("write");
    world.seal("acme/llama", &["--key", transit]);
    world.vault.admin(&["write", "-f", "transit/keys/models/rotate"]);
    let rewrap = |model: &str, at: &str| {
        let words = ["key", "rotate", STORE, model, "--rewrap", "--key", transit, "--register", at];
        world.command(&words).output().expect("runs")
    };
    for (place, wanted) in [(at.as_str(), "MODEL@N"), ("vault-kv://secret/models/none", "no record")] {
        let output = rewrap("acme/llama", place);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(wanted), "{text}");
    }
    let slots =
        run_ok(world.command(&["key", "list", STORE, "acme/llama", "--trust"]).arg(world.program.trusted_key()));
    assert!(String::from_utf8_lossy(&slots.stdout).contains("version 1"), "nothing was rewrapped");
    assert!(rewrap("acme/llama@1", &at).status.success());
    assert!(world.record("acme/llama")["encryption_key"].as_str().expect("text").starts_with("vault:v2:"));
}

/// A variant is a model of its own, and its record names it.
#[test]
fn a_variant_is_registered_under_its_own_id() {
    let Some(world) = World::start() else { return };
    let at = format!("{CATALOG}/acme/llama+q4");
    let sealed = world.seal(
        "acme/llama",
        &["--variant", "q4", "--key", &world.program.key(), "--register", &at, "--register-raw-key"],
    );
    let key = world.record("acme/llama+q4")["s3_key"].as_str().expect("text").to_owned();
    assert_eq!(Some(key.as_str()), sealed["model_id"].as_str().map(|id| format!("prod/{id}")).as_deref());
    if can_mount() {
        world.mounted(&[], |mountpoint| assert!(mountpoint.join("acme/llama+q4/config.json").exists()));
    }
}

/// Nothing in a bucket tells that a record names one of its versions.
#[test]
fn a_prune_that_is_told_of_the_catalog_keeps_what_its_records_name() {
    let Some(world) = World::start() else { return };
    world.seal_raw("acme/llama", "acme/llama");
    for text in ["{\"a\": 2}\n", "{\"a\": 3}\n"] {
        std::fs::write(world.source.join("config.json"), text).expect("write");
        world.seal("acme/llama", &["--key", &world.program.key()]);
    }
    let prune = |more: &[&str]| {
        let words = ["prune", STORE, "--yes", "--keep", "1", "--grace", "0s", "--second-look", "0s", "--trust"];
        let mut command = world.command(&words);
        command.arg(world.program.trusted_key()).args(["--key", &world.program.key()]);
        end_of(command.args(more))
    };
    let told = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    for _ in 0..4 {
        let output = prune(&["--catalog", CATALOG]);
        assert!(output.status.success(), "{}", told(&output));
    }
    let read_by_record = || {
        world.mounted(&["--model", "acme/llama"], |mountpoint| {
            let read = std::fs::read(mountpoint.join("acme/llama/config.json")).expect("read");
            assert_eq!(read, b"{\"a\": 1}\n");
        });
    };
    if can_mount() {
        read_by_record();
    }

    // What cannot be read keeps nothing, and so nothing is deleted.
    let nowhere = prune(&["--catalog", "vault-kv://secret/nothing-is-here"]);
    assert_eq!(nowhere.status.code(), Some(3), "{}", told(&nowhere));
    let good = world.record("acme/llama");
    let mut bad = good.clone();
    bad.remove("checksum");
    world.put("acme/llama", &bad);
    let odd = prune(&["--catalog", CATALOG]);
    assert!(!odd.status.success() && told(&odd).contains("checksum"), "{}", told(&odd));
    world.put("acme/llama", &good);
    if can_mount() {
        read_by_record();
    }

    // The detector: a prune that is not told does take it.
    for _ in 0..4 {
        let output = prune(&[]);
        assert!(output.status.success(), "{}", told(&output));
    }
    let (_, text) = world.refused(true, &["--model", "acme/llama"]);
    assert!(text.contains("was pruned"), "{text}");
    let gone = prune(&["--catalog", CATALOG]);
    assert_eq!(gone.status.code(), Some(3), "{}", told(&gone));
}

/// Each by its name: a record decides where to look and what to expect, never whom to trust.
#[test]
fn records_that_lie_are_refused_by_name() {
    let Some(world) = World::start() else { return };
    world.seal_raw("acme/llama", "acme/llama");
    world.seal_raw("acme/other", "other");
    let good = world.record("acme/llama");
    let other = world.record("other");
    std::fs::write(world.source.join("config.json"), b"{\"a\": 2}\n").expect("write");
    world.seal("acme/llama", &["--key", &world.program.key()]);

    let (exit, text) = world.refused(false, &["--model", "acme/llama"]);
    assert_eq!((exit, text.contains("NO_TRUST")), (2, true), "{text}");
    let (exit, text) = world.refused(false, &["--trust-on-first-use"]);
    assert_eq!((exit, text.contains("--trust KEY")), (2, true), "{text}");
    let (exit, text) = world.refused(true, &["--model", "acme/llama@3"]);
    assert_eq!((exit, text.contains("names its version itself")), (2, true), "{text}");

    let cases = [
        ("size_bytes", json!(good["size_bytes"].as_u64().expect("a number") + 1), 20, "CATALOG"),
        ("size_bytes", json!(null), 20, "CATALOG"),
        ("checksum", other["checksum"].clone(), 20, "CATALOG"),
        ("checksum", json!(format!("sha256:{}", "0".repeat(64))), 20, "CATALOG"),
        ("s3_key", other["s3_key"].clone(), 20, "CATALOG"),
        ("s3_key", json!("prod"), 20, "CATALOG"),
        ("s3_bucket", json!("no-such-bucket"), 20, "CATALOG"),
        ("encryption_key", json!("BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="), 25, "NO_KEY"),
        ("encryption_key", json!("vault:v1:abcd"), 2, "--key vault-transit"),
    ];
    for (field, value, wanted_exit, wanted) in cases {
        let mut record = good.clone();
        record.insert(field.into(), value.clone());
        world.put("acme/llama", &record);
        let (exit, text) = world.refused(true, &["--model", "acme/llama"]);
        assert_eq!((exit, text.contains(wanted)), (wanted_exit, true), "{field} = {value}: {text}");
        assert!(text.contains("acme/llama"), "{field}: {text}");
        let key = good["encryption_key"].as_str().expect("text");
        assert!(!text.contains(key), "{field}: {text}");
    }
    let mut record = good.clone();
    record.remove("encryption_key");
    world.put("acme/llama", &record);
    let listed = world.ls();
    assert!(listed["models"][0]["trouble"].as_str().expect("told").contains("encryption_key is missing"), "{listed}");
    assert_eq!(listed["models"][1]["trouble"], Value::Null, "the others are listed all the same");
}

#[test]
fn what_cannot_be_registered_is_refused_before_it_is_sealed() {
    let Some(world) = World::start() else { return };
    let key = world.program.key();
    let at = format!("{CATALOG}/x");
    let local = world.program.store().to_owned();
    let cases: [(&str, Vec<&str>, &str); 4] = [
        (STORE, vec!["--register", &at], "--register-raw-key"),
        (&local, vec!["--register", &at, "--register-raw-key"], "names a bucket"),
        (STORE, vec!["--register", "secret/models/x", "--register-raw-key"], "vault-kv://MOUNT/PATH"),
        (STORE, vec!["--register-raw-key"], "--register"),
    ];
    for (store, more, wanted) in cases {
        let mut command = world.command(&["seal"]);
        command.arg(&world.source).args([store, "acme/llama", "--key", &key]).args(&more);
        let output = end_of(&mut command);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), text.contains(wanted)), (Some(2), true), "{more:?}: {text}");
    }
    assert_eq!(std::fs::read_dir(world.s3.bucket_dir()).expect("the bucket").count(), 0, "nothing was sealed");
}

/// Check-and-set as the real server does it.
#[test]
fn a_record_that_someone_else_wrote_meanwhile_is_not_overwritten() {
    let Some(vault) = DevVault::start() else { return };
    let records = VaultRecords(vault.client());
    let data = json!({"x": "1"}).as_object().expect("an object").clone();
    assert_eq!(records.write("secret", "models/x", &data, 0).expect("new"), 1);
    assert_eq!(records.write("secret", "models/x", &data, 0).expect_err("is there").code(), Code::Exists);
    assert_eq!(records.write("secret", "models/x", &data, 1).expect("the next"), 2);
    assert_eq!(records.write("secret", "models/x", &data, 1).expect_err("was sooner").code(), Code::Exists);
    assert_eq!(records.list("secret", "models").expect("listed"), ["x"]);
    assert!(records.read("secret", "models/none").expect("read").is_none());
}
