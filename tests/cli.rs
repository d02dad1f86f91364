//! The command line is a contract: names, exit codes, `--json` shapes, messages that name the fix, help with examples.
//!
//! Runs the built program as a script would, in an environment of its own.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use hostile::{Hostile, respond};
use serde_json::Value;

#[allow(dead_code)]
#[path = "common/hostile.rs"]
mod hostile;

const COMMANDS: &[&str] = &[
    "audit",
    "demo",
    "keygen",
    "seal",
    "ls",
    "inspect",
    "verify",
    "cat",
    "config",
    "csi",
    "mount",
    "umount",
    "status",
    "doctor",
    "floor",
    "lock",
    "key",
    "prune",
    "reload",
    "rollback",
    "run",
    "scan",
    "sessions",
    "sign",
    "tag",
    "top",
    "unlock",
    "volume-plugin",
];

/// Those that put modelfs into its place on a machine.
const COMMANDS_OF_PACKAGES: &[&str] = &["install-helper", "completions", "man"];

/// A home folder that nobody else uses, and the program in it.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Home {
        Home(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_string()
    }

    /// An empty folder, beside what the program keeps at home.
    fn mountpoint(&self) -> String {
        std::fs::create_dir_all(self.path("mnt")).expect("made");
        self.text("mnt")
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> String {
        std::fs::write(self.path(name), text).expect("written");
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode)).expect("mode set");
        self.text(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_modelfs"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.0.path())
            .env("MODELFS_STATE_DIR", self.path("state"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran(self.command().args(args).output().expect("the program starts"))
    }
}

struct Ran(Output);

impl Ran {
    fn code(&self) -> i32 {
        self.0.status.code().expect("not killed by a signal")
    }
    fn out(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }
    fn err(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }
    fn json(&self) -> Value {
        serde_json::from_slice(&self.0.stdout).unwrap_or_else(|e| panic!("{e}: {:?} {:?}", self.out(), self.err()))
    }
    #[track_caller]
    fn ended(self, code: i32, with: &str) -> Ran {
        assert_eq!(self.code(), code, "{}{}", self.out(), self.err());
        assert!(self.err().contains(with), "wanted `{with}` in: {}", self.err());
        self
    }
}

#[test]
fn every_command_has_help_with_examples() {
    let home = Home::new();
    let top = home.run(&["--help"]);
    assert_eq!(top.code(), 0);
    for command in COMMANDS.iter().chain(COMMANDS_OF_PACKAGES) {
        assert!(top.out().contains(command), "{command} is not in --help");
        let help = home.run(&[command, "--help"]);
        assert_eq!(help.code(), 0, "{command}");
        assert!(help.out().contains("Examples:"), "{command} has no examples");
        assert!(help.out().contains(&format!("modelfs {command}")), "{command} is not in its own examples");
    }
    // Nothing is done that is not there.
    home.run(&["decrypt"]).ended(2, "unrecognized subcommand");
}

#[test]
fn questions_to_an_audit_log_that_cannot_be_meant_are_refused_with_what_could_be() {
    let home = Home::new();
    let log = home.text("audit.log");
    home.run(&["audit", "show"]).ended(2, "the configuration has no audit-file");
    home.run(&["audit", "show", &log]).ended(3, "there is no audit log at");
    home.run(&["audit", "verify", &log]).ended(3, "there is no audit log at");
    home.run(&["audit", "show", &log, "--kind", "opened"]).ended(2, "open, look, login");
    home.run(&["audit", "show", &log, "--severity", "bad"]).ended(2, "low, medium, high, critical");
    home.run(&["audit", "show", &log, "--outcome", "no"]).ended(2, "allowed, denied, failed");
    home.run(&["audit", "show", &log, "--since", "yesterday"]).ended(2, "2026-11-28T21:00:00Z or 24h");
    home.write("audit.log", "not a log\n", 0o600);
    home.run(&["audit", "verify", &log]).ended(20, "line 1: edited");
    assert_eq!(home.run(&["audit", "show", &log]).ended(0, "").out(), "");
}

/// A model of one file in a store, sealed with these keys; what a reader needs beside its own key.
fn sealed_to(home: &Home, keys: &[&str]) -> [String; 2] {
    std::fs::create_dir_all(home.path("model")).expect("made");
    home.write("model/config.json", "{}", 0o644);
    let (model, store) = (home.text("model"), home.text("store"));
    let mut args = vec!["seal", &model, &store, "acme/m"];
    for key in keys {
        args.extend(["--key", key]);
    }
    home.run(&args).ended(0, "");
    [store, home.text(".config/modelfs/signing.key.pub")]
}

#[test]
fn a_model_sealed_to_public_keys_opens_with_each_of_the_secret_halves() {
    let home = Home::new();
    let [one, two] = ["one.key", "two.key"].map(|name| home.text(name));
    let made = home.run(&["keygen", "--recipient", &one, "--json"]).json();
    assert_eq!(made["kind"], "recipient");
    let public = made["public_key"].as_str().expect("told");
    assert!(public.starts_with("modelfs-x25519:"), "{public}");
    home.run(&["keygen", "--recipient", &two]).ended(0, "");
    home.run(&["keygen", "--recipient", &two]).ended(2, "never overwritten");
    home.run(&["keygen", "--recipient", "--signing", &home.text("both")]).ended(2, "cannot be used with");

    let [store, trust] = sealed_to(&home, &[&format!("recipient:{public}"), &format!("recipient:{two}.pub")]);
    let cat = |key: &str| home.run(&["cat", &store, "acme/m", "config.json", "--trust", &trust, "--key", key]);
    for secret in [&one, &two] {
        assert_eq!(cat(&format!("x25519:{secret}")).ended(0, "").out(), "{}");
    }
    cat(&format!("recipient:{one}.pub")).ended(25, "only seal");
    home.run(&["keygen", "--recipient", &home.text("three")]).ended(0, "");
    cat(&format!("x25519:{}", home.text("three"))).ended(25, "another recipient");
    cat(&format!("x25519:{trust}")).ended(2, "KEY_PERMS");
    let told = home.run(&["inspect", &store, "acme/m", "--trust", &trust, "--json"]).json();
    let kinds: Vec<_> = told["slots"].as_array().expect("slots").iter().map(|slot| &slot["kind"]).collect();
    assert_eq!(kinds, ["hpke-x25519"; 2]);
}

#[test]
fn a_key_in_the_environment_is_used_when_none_is_named() {
    let home = Home::new();
    let key = "5a".repeat(32);
    home.write("k", &key, 0o600);
    let [store, trust] = sealed_to(&home, &[&format!("file:{}", home.text("k"))]);
    let cat = |variables: &[(&str, &str)]| {
        let mut command = home.command();
        command.args(["cat", &store, "acme/m", "config.json", "--trust", &trust]).envs(variables.iter().copied());
        Ran(command.output().expect("the program starts"))
    };
    for name in ["MODELFS_KEY", "MODEL_ENCRYPTION_KEY"] {
        assert_eq!(cat(&[(name, &key)]).ended(0, "").out(), "{}", "{name}");
    }
    // The first one counts, and a wrong one is not passed over.
    let other = "5b".repeat(32);
    cat(&[("MODELFS_KEY", &other), ("MODEL_ENCRYPTION_KEY", &key)]).ended(25, "NO_KEY");
    cat(&[("MODEL_ENCRYPTION_KEY", "")]).ended(2, "KEY_FORMAT");
    cat(&[("MODEL_ENCRYPTION_KEY", &"0".repeat(64))]).ended(2, "all zeros");
    cat(&[]).ended(2, "no key given");
}

#[test]
fn an_unknown_option_ends_with_2_and_names_the_nearest() {
    let home = Home::new();
    home.run(&["mount", "/s", "/m", "--cahce", "8G"]).ended(2, "--cache");
    let json = home.run(&["ls", "--json", "/s", "--bogus"]);
    assert_eq!(json.code(), 2);
    assert_eq!(json.json()["error"]["code"], "USAGE");
}

#[test]
fn wrong_values_end_with_2_and_say_where_they_were_written() {
    let home = Home::new();
    let mnt = home.mountpoint();
    let mount = |more: &[&str]| {
        let mut args = vec!["mount", "/srv", &mnt, "--key", "file:/none"];
        args.extend(more);
        home.run(&args)
    };
    mount(&["--cache", "8Gx"]).ended(2, "--cache: `8Gx` is not a size; write 8GiB");
    mount(&["-o", "cache=8Gx"]).ended(2, "-o cache: `8Gx`");
    mount(&["-o", "chache=8G"]).ended(2, "did you mean `cache`");
    mount(&["--open", "eager"]).ended(2, "lazy, auto, whole");
    mount(&["--verify", "none"]).ended(2, "strict nor aead");
    mount(&["--manifest", "sha256:12"]).ended(2, "64 hex digits");
    mount(&["--fetch-timeout", "30"]).ended(2, "not a duration");
    home.run(&["mount", "gopher://x/y", &mnt, "--key", "file:/none"]).ended(2, "s3://bucket/prefix");
    home.run(&["mount", "/srv", "/no/such/place", "--key", "file:/none"]).ended(2, "[MOUNT_POINT]");
    let out = home.command().args(["mount", "/srv", &mnt, "--key", "file:/x"]).env("MODELFS_CACHE", "1k").output();
    Ran(out.expect("runs")).ended(2, "MODELFS_CACHE: a cache of");
}

#[test]
fn a_configuration_file_is_read_and_its_mistakes_are_named() {
    let home = Home::new();
    let mnt = home.mountpoint();
    let bad = home.write("bad.toml", "cahce = \"1GiB\"\n", 0o600);
    home.run(&["--config", &bad, "mount", "/srv", &mnt]).ended(2, "did you mean `cache`");
    let open = home.write("open.toml", "cache = \"1GiB\"\n", 0o666);
    home.run(&["--config", &open, "mount", "/srv", &mnt]).ended(2, "chmod go-w");
    std::fs::create_dir_all(home.path(".config/modelfs")).expect("made");
    home.write(".config/modelfs/config.toml", "cache = \"1 GiB\"\n", 0o600);
    home.run(&["mount", "/srv", &mnt, "--key", "file:/x"]).ended(2, "config.toml: `1 GiB` is not a size");
}

#[test]
fn a_missing_key_ends_with_2_and_says_how_to_give_one() {
    let home = Home::new();
    let mnt = home.mountpoint();
    home.run(&["mount", "/srv", &mnt]).ended(2, "--key file:PATH");
    let store = home.text("store");
    std::fs::create_dir(&store).expect("made");
    home.run(&["cat", &store, "m", "f"]).ended(2, "MODELFS_KEY");
}

#[test]
fn a_new_key_is_private_is_never_overwritten_and_never_shown() {
    let home = Home::new();
    let key = home.text("a.key");
    let made = home.run(&["keygen", &key, "--json"]);
    assert_eq!(made.code(), 0, "{}", made.err());
    assert_eq!(made.json()["kind"], "key");
    let secret = std::fs::read_to_string(&key).expect("there");
    assert_eq!(secret.trim_end().len(), 64);
    assert!(secret.trim_end().bytes().all(|c| c.is_ascii_hexdigit()));
    assert_eq!(mode(&home.path("a.key")), 0o600);
    assert!(!made.out().contains(secret.trim_end()) && !made.err().contains(secret.trim_end()));

    home.run(&["keygen", &key]).ended(2, "cannot make the key file");

    assert_eq!(std::fs::read_to_string(&key).expect("there"), secret);
}

#[test]
fn a_signing_key_comes_with_its_public_half() {
    let home = Home::new();
    let made = home.run(&["keygen", "--signing", &home.text("s.key"), "--json"]);
    assert_eq!(made.code(), 0, "{}", made.err());
    let public = std::fs::read_to_string(home.path("s.key.pub")).expect("there");
    assert_eq!(made.json()["public_key"], public.trim_end());
    assert_eq!(mode(&home.path("s.key")), 0o600);
    let secret = std::fs::read_to_string(home.path("s.key")).expect("there");
    assert_ne!(secret, public);
    assert!(!made.out().contains(secret.trim_end()));
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("there").permissions().mode() & 0o777
}

#[test]
fn an_empty_store_lists_nothing_and_a_model_that_is_not_there_ends_with_3() {
    let home = Home::new();
    let store = home.text("store");
    std::fs::create_dir(&store).expect("made");
    let listed = home.run(&["ls", &store, "--json"]);
    assert_eq!(listed.code(), 0, "{}", listed.err());
    assert_eq!(listed.json()["models"], serde_json::json!([]));
    home.run(&["ls", &store, "acme/none"]).ended(3, "no model acme/none");
    let told = home.run(&["ls", &store, "acme/none", "--json"]);
    assert_eq!(told.json()["error"]["exit"], 3);
    assert_eq!(told.json()["error"]["class"], "not-found");
}

#[test]
fn a_place_without_a_mount_ends_with_3() {
    let home = Home::new();
    std::fs::create_dir(home.path("m")).expect("made");
    home.run(&["umount", &home.text("m")]).ended(3, "nothing is mounted");
    home.run(&["status", &home.text("m")]).ended(3, "[NOT_MOUNTED]");
    home.run(&["umount", &home.text("none")]).ended(2, "[MOUNT_POINT]");
    home.run(&["umount", "/proc"]).ended(3, "is a proc mount");
}

#[test]
fn status_without_mounts_is_an_empty_list() {
    let home = Home::new();
    let status = home.run(&["status", "--json"]);
    assert_eq!(status.code(), 0, "{}", status.err());
    assert!(status.json()["mounts"].is_array());
}

#[test]
fn called_as_mount_modelfs_it_takes_the_form_of_mount_8() {
    let home = Home::new();
    let helper = home.path("mount.modelfs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_modelfs"), &helper).expect("linked");
    let run = |args: &[&str]| {
        Ran(Command::new(&helper).args(args).env_clear().env("HOME", home.0.path()).output().expect("runs"))
    };
    let mnt = home.mountpoint();
    run(&["/srv"]).ended(1, "usage: mount.modelfs");
    run(&["/srv", &mnt, "-o", "rw,cahce=1G"]).ended(1, "did you mean `cache`");
    run(&["/srv", "/no/such/place", "-o", "key=file:/k"]).ended(32, "[MOUNT_POINT]");
    run(&["/srv", &mnt, "-o", "remount,ro"]).ended(32, "nothing is mounted");
    run(&["/srv", &mnt, "-sfo", "rw,noatime,key=file:/k,later=1"]).ended(0, "");
}

/// As bash asks for it at the Tab key.
#[test]
fn the_completions_of_bash_know_commands_and_options() {
    let home = Home::new();
    let script = home.run(&["completions", "bash"]).ended(0, "");
    std::fs::write(home.path("complete"), script.0.stdout).expect("written");
    let complete = |line: &str| {
        let ask = format!(
            "source {}; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _modelfs modelfs \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; echo \"${{COMPREPLY[@]}}\"",
            home.text("complete")
        );
        let said = Command::new("bash").args(["--norc", "-c", &ask]).output().expect("bash runs");
        String::from_utf8_lossy(&said.stdout).trim().to_string()
    };
    assert_eq!(complete("modelfs inst"), "install-helper");
    assert_eq!(complete("modelfs mount --cac"), "--cache");
    assert_eq!(complete("modelfs bogus"), "");
    for shell in ["zsh", "fish"] {
        let script = home.run(&["completions", shell]).ended(0, "").out();
        assert!(script.contains("install-helper") && script.contains("lock-when-idle"), "{shell}");
    }
    home.run(&["completions", "csh"]).ended(2, "bash, zsh, fish");
}

/// As mount.fuse3 calls a file system's program.
#[test]
fn a_store_and_a_mountpoint_without_a_command_are_the_form_of_mount_8_too() {
    let home = Home::new();
    let mnt = home.mountpoint();
    home.run(&["/srv", &mnt, "-o", "dev,suid,cahce=1G"]).ended(1, "did you mean `cache`");
    home.run(&["s3://bucket/models", "/dev/fd/77", "-o", "key=file:/k"]).ended(32, "descriptor 77 is not open");
    home.run(&["/srv"]).ended(2, "unrecognized subcommand");
    home.run(&["mount", "/srv", "/dev/fd/77", "--key", "file:/k"]).ended(2, "descriptor 77 is not open");
}

#[test]
fn run_needs_a_command_and_stays_in_the_foreground() {
    let home = Home::new();
    let mnt = home.mountpoint();
    home.run(&["run", "/srv", &mnt, "--key", "file:/k"]).ended(2, "<COMMAND>");
    home.run(&["run", "/srv", &mnt, "--key", "file:/k", "--daemon", "--", "true"]).ended(2, "run stays as long as");
    assert_eq!(home.run(&["run", "/srv", &mnt, "--key", "file:/k", "--", "no-such-program"]).code(), 127);
    let mut command = home.command();
    command.args(["run", "/srv", &mnt, "--key", "file:/k", "--", "true"]).env("STRICT_MODEL_SECURITY", "perhaps");
    Ran(command.output().expect("runs")).ended(2, "STRICT_MODEL_SECURITY");
}

/// A secret given by environment or file appears in no output, whatever goes wrong.
#[test]
fn secrets_are_never_printed() {
    let home = Home::new();
    let secret = "5ec4e7".repeat(10) + "0123";
    let store = home.text("store");
    std::fs::create_dir(&store).expect("made");
    for args in [
        vec!["inspect", &store, "acme/m", "-vv"],
        vec!["cat", &store, "acme/m", "f", "-vv", "--json"],
        vec!["mount", &store, "/nowhere", "-vv"],
        vec!["ls", &store, "-vv"],
    ] {
        let mut command = home.command();
        command.args(&args).env("MODELFS_KEY", &secret).env("MODELFS_PASSPHRASE", &secret).env("MODELFS_LOG", "trace");
        let ran = Ran(command.output().expect("runs"));
        assert!(!ran.out().contains(&secret) && !ran.err().contains(&secret), "{args:?}");
    }
}

/// A key, a signing key and a sealed model in a store of its own.
fn sealed() -> (Home, Vec<String>) {
    let home = Home::new();
    for dir in ["src/sub", "store", "mnt"] {
        std::fs::create_dir_all(home.path(dir)).expect("made");
    }
    home.write("src/config.json", "{}", 0o644);
    let weights: Vec<u8> = (0..20_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    std::fs::write(home.path("src/sub/w.bin"), weights).expect("written");
    std::fs::write(home.path("src/empty"), "").expect("written");
    home.run(&["keygen", &home.text("k")]).ended(0, "");
    home.run(&["keygen", "--signing", &home.text("s")]).ended(0, "");
    let key = format!("file:{}", home.text("k"));
    let seal =
        ["seal", &home.text("src"), &home.text("store"), "acme/m", "--key", &key, "--sign", &home.text("s"), "--json"];
    let done = home.run(&seal);
    assert_eq!(done.code(), 0, "{}", done.err());
    assert_eq!(done.json()["version"], 1);
    assert!(done.json()["manifest"].as_str().is_some_and(|digest| digest.starts_with("sha256:")), "{}", done.out());
    let access = vec!["--trust".to_string(), home.text("s.pub"), "--key".to_string(), key];
    (home, access)
}

fn with<'a>(start: &[&'a str], access: &'a [String]) -> Vec<&'a str> {
    start.iter().copied().chain(access.iter().map(String::as_str)).collect()
}

#[test]
fn a_sealed_model_is_listed_inspected_verified_and_read_back() {
    let (home, access) = sealed();
    let store = home.text("store");
    let listed = home.run(&["ls", &store, "--json"]).json();
    assert_eq!(listed["models"][0]["name"], "acme/m");
    assert_eq!(listed["models"][0]["tags"]["latest"]["version"], 1);
    let shown = home.run(&with(&["inspect", &store, "acme/m", "--json"], &access)).json();
    assert_eq!(shown["files"].as_array().map(Vec::len), Some(3));
    let closed = home.run(&with(&["inspect", &store, "acme/m", "--json"], &access[..2])).json();
    assert_eq!(closed["opened"], false);
    assert!(closed.get("files").is_none(), "{closed}");
    let verified = home.run(&with(&["verify", &store, "acme/m", "--json"], &access)).json();
    assert_eq!(verified["ok"], true, "{verified}");
    let read = home.run(&with(&["cat", &store, "acme/m", "sub/w.bin"], &access));
    assert!(read.0.stdout == std::fs::read(home.path("src/sub/w.bin")).expect("there"), "{}", read.err());
    home.run(&with(&["cat", &store, "acme/m", "none"], &access)).ended(3, "`modelfs inspect` lists them");
}

/// THREAT_MODEL (f) rows 1, 5: every fault is listed, not only the first, and bytes behind the end count.
#[test]
fn verify_lists_every_fault_and_ends_with_20() {
    let (home, access) = sealed();
    let store = home.text("store");
    let model = std::fs::read_dir(&store)
        .expect("listed")
        .filter_map(|entry| Some(entry.ok()?.path().join("d")))
        .find(|data| data.is_dir())
        .expect("the model's data");
    let objects = std::fs::read_dir(model).expect("listed").map(|entry| entry.expect("listed").path());
    let object = objects.max_by_key(|path| path.metadata().expect("there").len()).expect("objects");
    let mut bytes = std::fs::read(&object).expect("there");
    for at in [9_000_000, 19_000_000] {
        bytes[at] ^= 1;
    }
    bytes.push(0);
    std::fs::write(&object, bytes).expect("tampered");

    let ran = home.run(&with(&["verify", &store, "acme/m", "--json"], &access)).ended(20, "3 faults");

    let codes: Vec<String> = ran.json()["faults"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|fault| fault["code"].as_str().expect("a code").to_string())
        .collect();
    assert_eq!(codes, ["LENGTH", "CHUNK_HASH", "CHUNK_HASH"]);
    home.run(&with(&["cat", &store, "acme/m", "sub/w.bin"], &access)).ended(20, "[CHUNK_HASH]");
    std::fs::remove_file(&object).expect("removed");
    let gone = home.run(&with(&["verify", &store, "acme/m", "--json"], &access)).ended(20, "1 fault,");
    assert_eq!(gone.json()["faults"][0]["files"][0], "sub/w.bin");
}

#[test]
fn a_key_file_that_others_can_read_is_refused() {
    let (home, access) = sealed();
    std::fs::set_permissions(home.path("k"), std::fs::Permissions::from_mode(0o644)).expect("opened");
    home.run(&with(&["cat", &home.text("store"), "acme/m", "config.json"], &access)).ended(2, "[KEY_PERMS]");
}

#[test]
fn a_key_that_opens_nothing_ends_with_25() {
    let (home, access) = sealed();
    home.run(&["keygen", &home.text("other")]).ended(0, "");
    let key = format!("file:{}", home.text("other"));
    home.run(&["cat", &home.text("store"), "acme/m", "config.json", "--key", &key, "--trust", &access[1]])
        .ended(25, "[NO_KEY]");
}

/// A Vault whose token may read floors, of which there are none, and may not write any.
fn readers_vault() -> Hostile {
    Hostile::start(|request, stream| {
        let (status, body) = match (request.method.as_str(), request.target.ends_with("/auth/token/lookup-self")) {
            (_, true) => (
                "200 OK",
                r#"{"request_id": "r", "lease_id": "", "renewable": false, "lease_duration": 0,
                "data": {"ttl": 3600, "renewable": false, "expire_time": "2099-01-01T00:00:00Z"},
                "wrap_info": null, "warnings": null, "auth": null}"#,
            ),
            ("GET", false) => ("404 Not Found", r#"{"errors": []}"#),
            (_, false) => ("403 Forbidden", r#"{"errors": ["permission denied"]}"#),
        };
        respond(stream, status, &[("Content-Type", "application/json")], body.as_bytes())
    })
}

#[test]
fn a_machine_that_remembers_nothing_raises_no_floor_and_says_so() {
    let (home, _) = sealed();
    let (store, vault) = (home.text("store"), readers_vault());
    let args = ["floor", &store, "acme/m", "--raise", "--floor", "vault-kv:secret/floor"];
    let mut command = home.command();
    command.env("MODELFS_STATE_DIR", home.path("fresh")).env("VAULT_TOKEN", "t").args(args);
    let ran = Ran(command.args(["--vault-addr", &vault.endpoint()]).output().expect("runs"));
    ran.ended(2, "nothing is remembered of acme/m here, so nothing was raised");
}

/// What was published stands and is told; whether the end is an error says what the floor was for.
#[test]
fn a_floor_that_cannot_be_raised_is_an_error_of_orders_that_are_for_it_alone() {
    let (home, access) = sealed();
    let vault = readers_vault();
    for (tag, more, code) in [("prod", &[][..], 0), ("latest", &["--min-version", "1"][..], 25)] {
        let mut command = home.command();
        command.env("VAULT_TOKEN", "t").args(["tag", &home.text("store"), "acme/m@1", tag, "--json", "--sign"]);
        command.arg(home.path("s")).args(more).args(&access[..2]);
        command.args(["--floor", "vault-kv:secret/floor", "--vault-addr", &vault.endpoint()]);
        let ran = Ran(command.output().expect("runs"));
        let told = ran.json();
        assert_eq!((told["written"].as_bool(), told["floor_raised"].as_bool()), (Some(true), Some(false)), "{told}");
        let why = told["warnings"][0].as_str().expect("one");
        assert!(why.contains("--raise --floor") && why.contains("permission denied"), "{why}");
        ran.ended(code, "");
    }
}
