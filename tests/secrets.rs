//! No credential is anywhere that somebody looks: random secrets go in by every way there is, and are searched for in what
//! the program prints, logs, answers and leaves in its process entries, and in the memory that a core file would hold.
//!
//! The detector first finds what is planted: in a log, in another process's command line, and in memory that is not locked.

#[path = "common/mod.rs"]
mod common;
#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/program.rs"]
mod program;

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Stdio;

use common::vault::VaultServer;
use fixture::Random;
use program::{Program, can_mount, run_ok};

fn private(path: &Path, text: &str) {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).expect("a new file");
    file.write_all(text.as_bytes()).expect("written");
}

/// Whether `needle` lies in memory of `pid` that would be in its core file: every mapping but those marked "do not dump".
fn in_core(pid: u32, needle: &[u8]) -> Option<String> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("root reads memory");
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let mut place: Option<(u64, u64, String)> = None;
    for line in maps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let dumped = flags.split_whitespace().all(|flag| flag != "dd" && flag != "io");
            let Some((start, end, name)) = place.take().filter(|_| dumped && flags.contains("rd")) else { continue };
            let mut bytes = vec![0; (end - start) as usize];
            if memory.read_exact_at(&mut bytes, start).is_ok() && bytes.windows(needle.len()).any(|part| part == needle)
            {
                return Some(name);
            }
        } else if let Some((range, rest)) = line.split_once(' ')
            && let Some((start, end)) = range.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            place = Some((start, end, rest.to_owned()));
        }
    }
    None
}

#[test]
fn the_detector_finds_a_secret_in_memory_that_would_be_dumped() {
    let planted: String = Random(5).bytes(24).iter().map(|byte| format!("{byte:02x}")).collect();
    let kept = planted.clone().into_bytes();
    assert!(in_core(std::process::id(), planted.as_bytes()).is_some());
    std::hint::black_box(kept);
}

#[test]
fn no_credential_is_printed_logged_answered_or_left_where_others_look() {
    if !can_mount() {
        return;
    }
    let Some(vault) = VaultServer::shared() else { return };
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    println!("seed {seed}");
    let mut random = Random(seed);
    let raw_key: String = random.bytes(32).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut canary = |name: &str| -> String {
        let hex: String = random.bytes(20).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{name}-{hex}")
    };
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(dir.path());
    vault.enable_transit("transit-secrets");
    vault.write("transit-secrets/keys/models", serde_json::json!({"derived": true}));
    vault.policy("secrets", r#"path "transit-secrets/+/models" { capabilities = ["update", "read"] }"#);
    let role_id =
        vault.approle("approle-secrets", serde_json::json!({"token_policies": ["secrets"], "token_ttl": "10m"}));
    let secret_id = vault.secret_id("approle-secrets");
    let phrase = canary("phrase");
    let (secret_file, phrase_file) = (dir.path().join("home/secret-id"), dir.path().join("home/phrase"));
    private(&secret_file, &secret_id);
    private(&phrase_file, &phrase);
    let (s3_key, s3_secret, session) = (canary("s3key"), canary("s3secret"), canary("s3session"));
    let address = vault.address();
    let connect = [
        "--vault-addr",
        &address,
        "--vault-auth",
        "approle",
        "--vault-auth-mount",
        "approle-secrets",
        "--vault-role-id",
        &role_id,
        "--vault-secret-id-file",
        secret_file.to_str().expect("utf-8"),
    ];
    let source = dir.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("config.json"), b"{}").expect("a file");
    let environment = |command: &mut std::process::Command| {
        command.env("MODELFS_KEY_OF_TEST", &raw_key).env("AWS_ACCESS_KEY_ID", &s3_key);
        command.env("AWS_SECRET_ACCESS_KEY", &s3_secret).env("AWS_SESSION_TOKEN", &session);
    };
    let phrase_word = format!("passphrase-file:{}", phrase_file.display());
    let keys =
        ["--key", "vault-transit:transit-secrets/models", "--key", &phrase_word, "--key", "env:MODELFS_KEY_OF_TEST"];
    let mut said = Vec::new();
    let mut note = |output: std::process::Output| {
        said.extend_from_slice(&output.stdout);
        said.extend_from_slice(&output.stderr);
        output.status.success()
    };

    let mut seal = program.command(&["seal", "-vv"]);
    seal.arg(&source).args([program.store(), "secret/model"]).args(keys).args(connect);
    environment(&mut seal);
    assert!(note(seal.output().expect("runs")));

    let log = dir.path().join("mount.log");
    let mut mount = program.command(&["mount", "-vvv", program.store()]);
    mount.arg(program.mountpoint()).args(keys).args(connect).arg("--trust").arg(program.trusted_key());
    environment(&mut mount);
    mount.stdout(Stdio::null()).stderr(fs::File::create(&log).expect("log"));
    let mut child = mount.spawn().expect("runs");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while fs::read(program.mountpoint().join("secret/model/config.json")).is_err() {
        assert!(std::time::Instant::now() < until, "not mounted: {}", fs::read_to_string(&log).unwrap_or_default());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let mountpoint = program.mountpoint().to_str().expect("utf-8");
    assert!(note(program.command(&["status", mountpoint, "--json"]).output().expect("runs")));
    // Refusals of every kind talk the most.
    let wrong = dir.path().join("home/wrong");
    private(&wrong, &canary("wrong"));
    let wrong_secret = fs::read_to_string(&wrong).expect("text");
    for words in [
        vec![
            "--key",
            "vault-transit:transit-secrets/models",
            "--vault-addr",
            &address,
            "--vault-auth",
            "approle",
            "--vault-auth-mount",
            "approle-secrets",
            "--vault-role-id",
            &role_id,
            "--vault-secret-id-file",
            wrong.to_str().expect("utf-8"),
        ],
        vec![
            "--key",
            "vault-transit:transit-secrets/models",
            "--vault-addr",
            &address,
            "--vault-token-file",
            wrong.to_str().expect("utf-8"),
        ],
        vec!["--key", "env:MODELFS_WRONG"],
        // A secret pasted where a word belongs.
        vec!["--key", &wrong_secret],
        vec!["--trust", &raw_key, "--key", "file:/nowhere"],
    ] {
        let mut cat = program.command(&["cat", "-vvv", program.store(), "secret/model", "config.json", "--json"]);
        cat.args(&words).env("MODELFS_WRONG", &wrong_secret);
        if !words.contains(&"--trust") {
            cat.arg("--trust").arg(program.trusted_key());
        }
        let output = cat.output().expect("runs");
        assert!(!output.status.success(), "{words:?}");
        note(output);
    }

    let pid = child.id();
    let secrets = [&secret_id, &phrase, &s3_secret, &session, &wrong_secret];
    let log_text = fs::read(&log).expect("log");
    assert!(log_text.len() > 100, "the log says something at this level");
    for secret in secrets.into_iter().chain([&raw_key]) {
        let needle = secret.as_bytes();
        let found = |hay: &[u8]| hay.windows(needle.len()).any(|part| part == needle);
        assert!(!found(&log_text), "a secret is in the log");
        let public = secret == &raw_key;
        assert!(public || !found(&said), "a secret was printed: {}", &secret[..6]);
        assert!(!found(&fs::read(format!("/proc/{pid}/cmdline")).expect("cmdline")), "a secret is on the command line");
    }
    // What the daemon itself takes from its environment is gone from there.
    let environ = fs::read(format!("/proc/{pid}/environ")).expect("environ");
    assert!(!environ.windows(raw_key.len()).any(|part| part == raw_key.as_bytes()), "a key is left in the environment");
    for (name, secret) in [("secret-id", &secret_id), ("passphrase", &phrase), ("raw key", &raw_key)] {
        assert_eq!(in_core(pid, secret.as_bytes()), None, "the {name} would be in a core file");
    }
    run_ok(&mut program.command(&["umount", mountpoint]));
    child.wait().expect("ended");
}
