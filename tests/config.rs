//! One configuration: every option by file, environment and flag; names of others; what does not go together; and the
//! page that says so.
//!
//! Runs the built program as a script would, in an environment of its own.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use modelfs::config::names::{Does, OTHERS, OWN};
use modelfs::config::options::{Kind, OPTIONS, OptionSpec, find, takes};
use modelfs::config::rules::{Level, OF_PARSERS, RULES};
use serde_json::Value;

/// A home folder that nobody else uses, and the program in it.
struct Home(tempfile::TempDir);

struct Ran(Output);

impl Home {
    fn new() -> Home {
        let home = Home(tempfile::tempdir().expect("a temporary folder"));
        for name in ["mnt", "store"] {
            std::fs::create_dir(home.path(name)).expect("made");
            std::fs::set_permissions(home.path(name), std::fs::Permissions::from_mode(0o755)).expect("mode set");
        }
        home.write("k", &"5a".repeat(32), 0o600);
        home.write("t.pub", &"ab".repeat(32), 0o644);
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_string()
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> String {
        std::fs::write(self.path(name), text).expect("written");
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode)).expect("mode set");
        self.text(name)
    }

    fn run(&self, env: &[(&str, &str)], args: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_modelfs"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.0.path())
            .env("XDG_STATE_HOME", self.path("state"))
            .envs(env.iter().copied())
            .stdin(Stdio::null());
        Ran(command.args(args).output().expect("the program starts"))
    }

    /// The words of a mount with a key and a signer, and these.
    fn words(&self, more: &[&str]) -> Vec<String> {
        let mut words = vec![self.text("store"), self.text("mnt"), "--key".into(), format!("file:{}", self.text("k"))];
        words.extend(["--trust".to_string(), self.text("t.pub")]);
        words.extend(more.iter().map(|word| (*word).to_owned()));
        words
    }

    fn check(&self, env: &[(&str, &str)], more: &[&str]) -> Ran {
        let words = self.words(more);
        let mut args = vec!["config", "check", "--json"];
        args.extend(words.iter().map(String::as_str));
        self.run(env, &args)
    }
}

impl Ran {
    fn code(&self) -> i32 {
        self.0.status.code().expect("not killed by a signal")
    }
    fn out(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }
    fn all(&self) -> String {
        self.out() + &String::from_utf8_lossy(&self.0.stderr)
    }
    fn json(&self) -> Value {
        serde_json::from_str(&self.out()).unwrap_or_else(|e| panic!("{e}: {}", self.all()))
    }

    #[track_caller]
    fn ended(self, code: i32, with: &str) -> Ran {
        assert_eq!(self.code(), code, "{}", self.all());
        assert!(self.all().contains(with), "wanted {with:?} in {}", self.all());
        self
    }

    /// Texts of the findings of one level.
    fn findings(&self, level: &str) -> Vec<String> {
        let json = self.json();
        let all = json["findings"].as_array().expect("a list").iter();
        all.filter(|finding| finding["level"] == level)
            .map(|finding| finding["text"].as_str().expect("a text").to_owned())
            .collect()
    }
}

fn joined<'a>(parts: &[&[&'a str]]) -> Vec<&'a str> {
    parts.concat()
}

/// What `config show --json` says, by name.
fn shown(ran: &Ran) -> BTreeMap<String, Value> {
    let json = ran.json();
    let options = json["options"].as_array().expect("a list").iter();
    options.map(|option| (option["name"].as_str().expect("a name").to_owned(), option.clone())).collect()
}

/// As JSON shows it: a list, a text, or that it is a secret.
fn wanted(spec: &OptionSpec, value: &str) -> Value {
    let text = spec.shown(value).unwrap_or_else(|| "(not shown)".into());
    if spec.kind == Kind::Many { Value::from(vec![text]) } else { Value::from(text) }
}

#[test]
fn every_option_is_set_by_file_environment_and_flag_and_by_nothing_else() {
    let home = Home::new();
    let unset = shown(&home.run(&[], &["config", "show", "--json"]).ended(0, ""));
    assert_eq!(unset.len(), OPTIONS.len());
    for spec in OPTIONS {
        assert_eq!(unset[spec.name]["value"], Value::Null, "{}", spec.name);
        assert_eq!(unset[spec.name]["origin"]["kind"], "default", "{}", spec.name);
        // What else the option needs does not matter here: this is about where it can be written.
        let quoted = serde_json::to_string(spec.example).expect("JSON strings are TOML strings");
        let line = match spec.kind {
            Kind::Switch => format!("{} = true\n", spec.name),
            Kind::Many => format!("{} = [{quoted}]\n", spec.name.replace('-', "_")),
            Kind::One => format!("{} = {quoted}\n", spec.name),
        };
        let file = home.write("one.toml", &line, 0o600);
        let by_file = home.run(&[], &["--config", &file, "config", "show", "--json", "--set"]).ended(0, "");
        let by_env = home.run(&[(spec.env, spec.example)], &["config", "show", "--json", "--set"]).ended(0, "");
        let typed = match spec.kind {
            Kind::Switch => format!("--{}", spec.name),
            Kind::One | Kind::Many => format!("--{}={}", spec.name, spec.example),
        };
        let by_flag = home.run(&[], &["config", "show", "--json", "--set", &typed]).ended(0, "");
        for (way, ran) in [("file", &by_file), ("environment", &by_env), ("flag", &by_flag)] {
            let set = shown(ran);
            assert_eq!(set.keys().collect::<Vec<_>>(), [spec.name], "{} by {way}", spec.name);
            let option = &set[spec.name];
            assert_eq!(option["value"], wanted(spec, spec.example), "{} by {way}", spec.name);
            assert_eq!(option["origin"]["kind"], way, "{}", spec.name);
        }
        assert_eq!(shown(&by_file)[spec.name]["origin"]["path"], file.as_str(), "{}", spec.name);
        assert_eq!(shown(&by_env)[spec.name]["origin"]["name"], spec.env, "{}", spec.name);
    }
}

#[test]
fn a_higher_layer_wins_and_can_take_a_switch_back() {
    let home = Home::new();
    let file = home.write("c.toml", "cache = \"64MiB\"\nversions = true\nmodel = [\"a\", \"b\"]\n", 0o600);
    let show = |env: &[(&str, &str)], more: &[&str]| {
        let mut args = vec!["--config", &file, "config", "show", "--json"];
        args.extend(more);
        shown(&home.run(env, &args).ended(0, ""))
    };
    let env = [("MODELFS_CACHE", "128MiB"), ("MODELFS_MODEL", r"c,d\,e"), ("MODELFS_UID", "")];
    let set = show(&env, &["--cache", "256MiB", "--versions=no"]);
    assert_eq!((&set["cache"]["value"], &set["cache"]["origin"]["kind"]), (&"256MiB".into(), &"flag".into()));
    assert_eq!((&set["versions"]["value"], &set["versions"]["origin"]["kind"]), (&"no".into(), &"flag".into()));
    assert_eq!(set["model"]["value"], Value::from(vec!["c", "d,e"]), "a layer replaces a list");
    assert_eq!(set["uid"]["value"], Value::Null, "an empty variable is none");
    let set = show(&env, &[]);
    assert_eq!(set["cache"]["origin"]["name"], "MODELFS_CACHE");
    assert_eq!(show(&[], &[])["cache"]["origin"]["kind"], "file");
}

#[test]
fn what_may_be_a_secret_is_in_no_output() {
    let home = Home::new();
    let secret = "5ec4e7".repeat(10) + "0123";
    let url = format!("https://hooks.example/services/{secret}");
    let basic = format!("https://ak:{secret}@minio.example");
    let store = format!("s3://models?token={secret}");
    let env: &[(&str, &str)] = &[
        ("MODELFS_KEY_SOURCE", &secret),
        ("MODELFS_ALERT_WEBHOOK", &url),
        ("MODELFS_S3_ENDPOINT", &basic),
        ("MODELFS_S3_CREDENTIALS", &secret),
        ("MODELFS_VAULT_TOKEN_FILE", &secret),
        ("VAULT_ADDR", &basic),
        ("MODELFS_ALLOW_STORE", &store),
        ("MODELFS_KEY", &secret),
        ("VAULT_TOKEN", &secret),
        ("MODEL_ENCRYPTION_KEY", &secret),
        ("AWS_SECRET_ACCESS_KEY", &secret),
        ("MODELFS_LOG", "trace"),
    ];
    let (store, mnt) = (home.text("store"), home.text("mnt"));
    for args in [
        vec!["config", "show", "--json"],
        vec!["config", "show", "-vv"],
        vec!["config", "check", "--json"],
        vec!["config", "check", &store, &mnt],
        vec!["config", "check", "--for", "volume-plugin"],
        vec!["config", "check", "--for", "csi", "-vv"],
        vec!["mount", &store, &mnt, "-vv"],
    ] {
        let ran = home.run(env, &args);
        assert!(!ran.all().contains(&secret), "{args:?} shows it: {}", ran.all().replace(&secret, "SECRET"));
    }
    // The detector sees a value that is shown.
    let plain = home.run(&[("MODELFS_MODEL", &secret)], &["config", "show"]);
    assert!(plain.all().contains(&secret));
    let told = home.run(env, &["config", "show", "--json"]).json();
    assert!(told["secrets_set"].as_array().expect("a list").contains(&"VAULT_TOKEN".into()));
    assert_eq!(shown(&home.run(env, &["config", "show", "--json"]))["alert-webhook"]["redacted"], true);
}

/// Unknown names are refused by whoever mounts or reads, with the nearest one; names of others are not ours.
#[test]
fn a_name_of_ours_that_nobody_reads_is_refused_with_the_nearest() {
    let home = Home::new();
    let words = home.words(&[]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let stray = [("MODELFS_POLCY", "/etc/modelfs/policy.toml")];
    let told = "nobody reads MODELFS_POLCY of the environment; did you mean MODELFS_POLICY?";
    home.run(&stray, &joined(&[&["mount"], &words])).ended(2, told);
    home.run(&stray, &joined(&[&["run"], &words, &["--", "true"]])).ended(2, told);
    home.run(&stray, &["csi", "--node-id", "n", "--kubelet-dir", &home.text("")]).ended(2, told);
    home.run(&stray, &["volume-plugin", "--socket", &home.text("s")]).ended(2, told);
    home.run(&stray, &["inspect", &home.text("store"), "m"]).ended(2, told);
    assert_eq!(home.check(&stray, &[]).findings("refused"), [told]);
    let others = [("MODELFS_SERVICE_HOST", "10.0.0.1"), ("MODELFS_PORT", "tcp://10.0.0.1:1"), ("MODELFS_TEST_X", "1")];
    assert_eq!(home.check(&others, &[]).ended(0, "").findings("refused"), [""; 0]);
    // A name that a key is read from is known.
    home.check(&[("MODELFS_LLAMA", "x")], &["--key", "env:MODELFS_LLAMA"]).ended(0, "");
    home.check(&[("MODELFS_LLAMA", "x")], &[]).ended(2, "nobody reads MODELFS_LLAMA");
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let home = Home::new();
    let text = "cahce = \"1GiB\"\nverify = \"none\"\numask = 999\naudit = \"required\"\nfetch-timeout = \"2m\"\n";
    let file = home.write("bad.toml", text, 0o600);
    let words = home.words(&["--trust-on-first-use", "--uid", "4000000", "--key", "file:/none"]);
    let mut args = vec!["--config", &file, "config", "check", "--json"];
    args.extend(words.iter().map(String::as_str));
    let env = [("MODELFS_POLCY", "/p"), ("MODELFS_UMSK", "0"), ("STRICT_MODEL_SECURITY", "perhaps")];
    let ran = home.run(&env, &args).ended(2, "");
    let found = ran.findings("refused");
    for wanted in [
        "did you mean `cache`",
        "neither strict nor aead",
        "octal",
        "nowhere to write",
        "raise the budget",
        "drop --trust-on-first-use",
        "add --allow-other",
        "/none cannot be looked at",
        "MODELFS_POLICY",
        "MODELFS_UMASK",
        "STRICT_MODEL_SECURITY",
    ] {
        let times = found.iter().filter(|text| text.contains(wanted)).count();
        assert_eq!(times, 1, "{wanted:?} in {found:#?}");
    }
    assert_eq!(found.len(), 11, "{found:#?}");
    let [store, mnt] = [home.text("store"), home.text("mnt")];
    home.check(&[], &[]).ended(0, "");
    home.run(&[], &["config", "check", "--for", "csi", &store, &mnt]).ended(2, "for mount and run");
    home.run(&[], &["config", "check", &store]).ended(2, "MOUNTPOINT");
    home.run(&[], &["config", "check", "-o", "ro,cahce=1G"]).ended(2, "did you mean `cache`");
    // With a file that cannot be read at all, what is beside it is told too.
    let open = home.write("open.toml", "cache = \"1GiB\"\n", 0o666);
    let ran =
        home.run(&[("MODELFS_CACHE", "1k")], &["--config", &open, "config", "check", "--json"]).ended(2, "chmod go-w");
    assert!(ran.findings("refused").iter().any(|text| text.contains("MODELFS_CACHE: a cache of")));
}

#[test]
fn files_that_options_name_are_looked_for_with_their_modes() {
    let home = Home::new();
    home.write("open.key", "x", 0o644);
    let open = home.text("open.key");
    home.check(&[], &["--key", &format!("file:{open}")]).ended(2, "is open to others (mode 644); chmod 600");
    home.check(&[], &["--http-token-file", &open, "--http", "unix:/tmp/x"]).ended(2, "is open to others");
    home.check(&[], &["--trust-file", "/none/trust.toml"])
        .ended(2, "--trust-file: /none/trust.toml cannot be looked at");
    home.check(&[], &["--audit-file", "/none/audit.jsonl"]).ended(2, "there is no folder /none");
    home.check(&[], &["--audit-file", &home.text("audit.jsonl")]).ended(0, "");
}

/// How each rule is broken: what is said beside a right mount, and a part of what is told. `%` is the home folder.
const BREAKS: &[(&str, &[&str], &str)] = &[
    ("trust-twice", &["--trust-on-first-use"], "drop --trust-on-first-use"),
    ("first-use-with-floor", &["--trust-on-first-use", "--require-floor"], "drop one of them"),
    ("first-use-on-a-node", &["--for=csi", "--trust-on-first-use"], "name the signing keys"),
    ("vault-not-named", &["--floor", "vault-kv:secret/floor"], "add vault-addr"),
    ("half-a-certificate", &["--vault-client-cert", "%/t.pub"], "add vault-client-key"),
    ("plain-http-in-strict", &["--for=run", "--strict", "--vault-plain-http"], "drop vault-plain-http"),
    ("open-waits-for-nothing", &["--open", "whole", "--no-passthrough"], "drop one of them"),
    ("manifest-of-one", &["--manifest", DIGEST], "exactly one --model"),
    ("min-ref-seq-of-one", &["--min-ref-seq", "7"], "exactly one --model"),
    ("model-twice", &["--model", "a@1", "--model", "a@2"], "selected twice"),
    ("required-and-not-mounted", &["--model", "a", "--require", "b"], "add --model b"),
    ("lock-on-nothing", &["--on-key-loss", "lock"], "nothing to watch"),
    ("loss-that-locks-nothing", &["--key-loss-check", "5s"], "add on-key-loss=lock"),
    ("owner-shut-out", &["--uid", "4000000"], "add --allow-other"),
    ("aead-where-others-write", &["--verify", "aead"], "chmod go-w"),
    ("store-and-mountpoint", &[], "mount beside the store"),
    ("file-in-the-mountpoint", &["--log-file", "%/mnt/log"], "which the mount hides"),
    ("state-in-the-mountpoint", &["--state-dir", "%/mnt/state"], "set state-dir to another place"),
    ("secret-in-the-store", &["--audit-file", "%/store/audit"], "who copies the store"),
    ("trust-in-the-store", &["--trust-file", "%/store/trust.toml"], "whom to believe"),
    ("two-writers", &["--audit-file", "%/a", "--log-file", "%/./a"], "give each its own"),
    ("checkpoints-come-late", &["--audit-file", "%/a", "--audit-keep", "10s"], "keep longer"),
    ("alerts-in-clear", &["--alert-webhook", "http://hooks.example/x"], "use https"),
    ("cache-over-memory", &["--cache", "900TiB"], "give less"),
    ("policy-for-one-user", &["--policy", "%/t.pub"], "add allow-other"),
    ("open-to-all", &["--allow-other", "--umask", "0222"], "every user of this machine"),
    ("retire-nothing", &["--retire-after", "5m"], "without versions"),
    ("audit-nowhere", &["--audit", "required"], "add audit-file"),
    ("audit-off-and-on", &["--audit", "off", "--audit-file", "%/a"], "drop one"),
    ("audit-of-nothing", &["--audit-key", "%/k", "--audit-checkpoint-file", "%/c"], "nothing is audited"),
    ("audit-files-of-none", &["--audit-journal", "--audit-keep", "90d"], "the journal alone"),
    ("checkpoints-unsigned", &["--audit-file", "%/a", "--audit-checkpoint-file", "%/c"], "audit-key"),
    ("http-in-clear", &["--http", "127.0.0.1:9464"], "TLS and a token"),
    ("http-keys-for-nothing", &["--http-cert", "%/t.pub"], "drop them"),
    ("vault-in-clear", &["--vault-addr", "http://vault:8200"], "use https"),
    ("vault-method", &["--vault-addr", "https://vault:8200", "--vault-auth", "approle"], "needs vault-role-id"),
    ("budget-below-timeout", &["--fetch-timeout", "2m"], "raise the budget"),
    ("cache-too-small", &["--cache", "1MiB"], "at least 64.0 MiB"),
    ("idle-too-short", &["--lock-when-idle", "10ms"], "at least 1 s"),
    ("no-key", &[], "no key given"),
    ("no-signer", &[], "no signer is trusted"),
];

const DIGEST: &str = "sha256:51d0e6f0a9c0a1a0d7a2c9c1c5e1d4f3b2a1908f7e6d5c4b3a29181716151413";

#[test]
fn every_combination_that_the_page_lists_is_found_and_refused_or_told() {
    let listed: Vec<(&str, Level)> = RULES
        .iter()
        .map(|rule| (rule.id, rule.level))
        .chain(OF_PARSERS.iter().map(|(id, ..)| (*id, Level::Refused)))
        .collect();
    let broken: Vec<&str> = BREAKS.iter().map(|(id, ..)| *id).collect();
    assert_eq!(listed.iter().map(|(id, _)| *id).collect::<Vec<_>>(), broken, "each rule is broken once, in its order");

    for ((id, more, told), (_, level)) in BREAKS.iter().zip(&listed) {
        let home = Home::new();
        home.write("store/trust.toml", "", 0o644);
        let more: Vec<String> = more.iter().map(|word| word.replace('%', &home.text(""))).collect();
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        let (store, mnt, key) = (home.text("store"), home.text("mnt"), format!("file:{}", home.text("k")));
        let mut words = vec![store.as_str(), mnt.as_str(), "--key", &key];
        let inside = home.text("store/mnt");
        match *id {
            "first-use-on-a-node" => words.clear(),
            "store-and-mountpoint" => {
                std::fs::create_dir(&inside).expect("made");
                words[1] = &inside;
            }
            "no-key" => words.truncate(2),
            "aead-where-others-write" => {
                std::fs::set_permissions(&store, std::fs::Permissions::from_mode(0o777)).expect("mode set");
            }
            _ => {}
        }
        let trust = home.text("t.pub");
        if *id != "no-signer" {
            words.extend(["--trust", trust.as_str()]);
        }
        words.extend(&more);
        let ran = home.run(&[], &joined(&[&["config", "check", "--json"], &words]));
        let (code, found) = match level {
            Level::Refused => (2, ran.findings("refused")),
            Level::Warned => (0, ran.findings("warning")),
        };
        assert!(found.iter().any(|text| text.contains(told)), "{id}: {}", ran.all());
        assert_eq!(ran.code(), code, "{id}: {}", ran.all());
        // The start itself is refused, and not only the check; without a signer it is once the store was asked.
        let later = words.iter().any(|word| word.starts_with("--for")) || *id == "no-signer";
        if *level == Level::Refused && !later {
            home.run(&[], &joined(&[&["mount"], &words])).ended(2, told);
        }
    }
    // The detector: the same mount with nothing wrong.
    let home = Home::new();
    let ran = home.check(&[], &[]).ended(0, "");
    assert!(ran.findings("refused").is_empty() && ran.findings("warning").is_empty(), "{}", ran.all());
    let run = |words: &[&str]| home.run(&[], words);
    let (store, mnt) = (home.text("store"), home.text("mnt"));
    let strict = ["run", &store, &mnt, "--strict", "--vault-plain-http", "--key", "file:/k", "--", "true"];
    run(&strict).ended(2, "drop vault-plain-http");
    let first = ["csi", "--node-id", "n", "--kubelet-dir", &store, "--trust-on-first-use"];
    run(&first).ended(2, "trust-on-first-use");
}

/// A home with a store of one model, which nobody trusts.
fn home_with_a_model() -> Home {
    let home = Home::new();
    home.run(&[], &["keygen", "--signing", &home.text("sign")]).ended(0, "");
    std::fs::create_dir(home.path("model")).expect("made");
    home.write("model/weights", "some", 0o600);
    let (model, store, key) = (home.text("model"), home.text("store"), format!("file:{}", home.text("k")));
    let sign = home.text("sign");
    home.run(&[], &["seal", &model, &store, "acme/m", "--key", &key, "--sign", &sign]).ended(0, "");
    home
}

const OPEN_TO_ALL: &str = "every user of this machine reads every model";

#[test]
fn a_mount_says_at_its_start_what_config_check_warns_of_and_without_umask_it_is_closed_to_others() {
    let home = home_with_a_model();
    // It goes as far as the signer, whom nobody trusts.
    let (store, mnt, key) = (home.text("store"), home.text("mnt"), format!("file:{}", home.text("k")));
    let words = [&store, &mnt, "--key", &key, "--cache", "64MiB", "--allow-other"];
    let mount = |more: &[&str]| home.run(&[], &joined(&[&["mount"], &words, more])).ended(25, "");
    let told = mount(&["--umask", "0222", "--retire-after", "5m"]).all();
    assert!(told.contains(OPEN_TO_ALL) && told.contains("retire-after has no effect"), "{told}");
    for closed in [&[][..], &["--umask", "0227"]] {
        let told = mount(closed).all();
        assert!(!told.contains("reads every model"), "{closed:?}: {told}");
    }
}

#[test]
fn the_log_is_as_flag_environment_words_and_file_say_and_a_filter_that_is_none_is_refused_by_its_place() {
    let home = home_with_a_model();
    let (store, mnt, key) = (home.text("store"), home.text("mnt"), format!("file:{}", home.text("k")));
    let words = [&store, &mnt, "--key", &key, "--cache", "64MiB", "--allow-other", "--umask", "0222"];
    let off = home.write("off.toml", "log = \"off\"\n", 0o600);
    let warns = |env: &[(&str, &str)], before: &[&str], after: &[&str]| {
        home.run(env, &joined(&[before, &["mount"], &words, after])).ended(25, "").all().contains(OPEN_TO_ALL)
    };
    assert!(warns(&[], &[], &[]));
    assert!(!warns(&[], &["--config", &off], &[]), "the file");
    assert!(!warns(&[("MODELFS_LOG", "off")], &[], &[]), "the environment");
    assert!(!warns(&[], &["--log", "off"], &[]), "the flag");
    assert!(!warns(&[], &[], &["--log=off"]), "the flag behind the command");
    assert!(!warns(&[], &[], &["-o", "log=off"]), "a word of -o");
    assert!(warns(&[("MODELFS_LOG", "warn")], &["--config", &off], &[]), "the environment above the file");
    assert!(warns(&[("MODELFS_LOG", "off")], &["--log", "warn"], &["-o", "log=off"]), "the flag above all");
    let bad = home.write("bad.toml", "log = \"a=b=c\"\n", 0o600);
    home.run(&[], &["--config", &bad, "ls", &home.text("store")]).ended(2, &format!("log in {bad}"));
    home.run(&[("MODELFS_LOG", "a=b=c")], &["ls", &home.text("store")]).ended(2, "MODELFS_LOG: that is no log filter");
}

/// Who seals, reads, changes and mounts remembers in the folder that is named, however it is named, and in no other.
#[test]
fn what_was_seen_is_remembered_in_state_dir_by_every_command() {
    let holds = |home: &Home, name: &str| {
        let files = std::fs::read_dir(home.path(name).join("floor")).map_or(0, |all| {
            all.flatten().filter(|entry| entry.path().extension().is_some_and(|end| end == "json")).count()
        });
        files > 0
    };
    let home = home_with_a_model();
    assert!(holds(&home, "state/modelfs"), "the usual place");
    let (store, key) = (home.text("store"), format!("file:{}", home.text("k")));
    let trust = home.text("sign.pub");
    let file = home.write("state.toml", &format!("state-dir = {:?}\n", home.text("by-file")), 0o600);
    let cat = ["cat", &store, "acme/m", "weights", "--key", &key, "--trust", &trust];
    let by_flag = home.text("by-flag");
    home.run(&[], &joined(&[&cat, &["--state-dir", &by_flag]])).ended(0, "some");
    home.run(&[("MODELFS_STATE_DIR", &home.text("by-env"))], &cat).ended(0, "some");
    home.run(&[], &joined(&[&["--config", &file], &cat])).ended(0, "some");
    for name in ["by-flag", "by-env", "by-file"] {
        assert!(holds(&home, name), "{name}");
    }
    // What one folder knows another does not: without a floor it is refused there, and nowhere else.
    let floored = joined(&[&cat, &["--require-floor", "--state-dir"]]);
    home.run(&[], &joined(&[&floored, &[&home.text("new")]])).ended(2, "NO_FLOOR");
    home.run(&[], &joined(&[&floored, &[&by_flag]])).ended(0, "some");
    let sign = home.text("sign");
    let tag = ["tag", &store, "acme/m@1", "prod", "--key", &key, "--trust", &trust, "--sign", &sign];
    home.run(&[], &joined(&[&tag, &["--state-dir", &home.text("by-tag")]])).ended(0, "");
    assert!(holds(&home, "by-tag"));
}

#[test]
fn a_mount_that_would_believe_nobody_is_told_before_it_asks_the_store() {
    let home = home_with_a_model();
    let (store, mnt, key) = (home.text("store"), home.text("mnt"), format!("file:{}", home.text("k")));
    let mount = [store.as_str(), &mnt, "--key", &key];
    // The start ends so; hence the check must not call it right.
    home.run(&[], &joined(&[&["mount"], &mount])).ended(25, "no key is trusted for acme/m");
    let told = home.run(&[], &joined(&[&["config", "check", "--json"], &mount])).ended(2, "");
    assert!(told.findings("refused")[0].contains("no signer is trusted"), "{}", told.all());
    let doctor = home.run(&[], &["doctor", &store, "--key", &key, "--json", "--rule", "configuration"]).json();
    assert_eq!(doctor["can_mount"], false, "{doctor}");
    assert!(doctor["findings"][0]["seen"].as_str().expect("a text").contains("no signer is trusted"), "{doctor}");
    let pub_key = home.text("sign.pub");
    home.run(&[], &joined(&[&["config", "check"], &mount, &["--trust", &pub_key]])).ended(0, "");
    let trusted = ["doctor", &store, "--key", &key, "--trust", &pub_key, "--json", "--rule", "configuration"];
    assert_eq!(home.run(&[], &trusted).json()["can_mount"], true);
    let bare = home.run(&[], &["doctor", "--json", "--rule", "configuration"]).ended(0, "").json();
    assert_eq!(bare["findings"][0]["severity"], "info", "what a mount's own flags may say yet: {bare}");
}

/// What each name from before does, seen from outside.
#[test]
fn names_of_others_do_what_the_page_says() {
    let home = Home::new();
    let show = |env: &[(&str, &str)]| shown(&home.run(env, &["config", "show", "--json"]).ended(0, ""));
    for other in OTHERS {
        let name = other.name;
        let warned = |value: &str| home.check(&[(name, value)], &[]).findings("warning");
        match other.does {
            Does::Says("max-model-size") => {
                let set = show(&[(name, "2048")]);
                assert_eq!(set["max-model-size"]["value"], "2048MiB");
                assert_eq!(set["max-model-size"]["origin"]["name"], name);
                home.check(&[(name, "2GB")], &[]).ended(2, "MAX_MODEL_SIZE_MB");
                let own = show(&[(name, "2048"), ("MODELFS_MAX_MODEL_SIZE", "1GiB")]);
                assert_eq!(own["max-model-size"]["value"], "1GiB", "the option's own name wins");
            }
            Does::Says(option) => {
                let set = show(&[(name, "a,b")]);
                assert_eq!(set[option]["value"], Value::from(vec!["a", "b"]), "{name}");
                assert_eq!(set[option]["origin"]["name"], name);
            }
            Does::SaysLast(option) => {
                let file = home.write("one.toml", &format!("{option} = \"of-the-file\"\n"), 0o600);
                assert_eq!(show(&[(name, "https://x")])[option]["origin"]["name"], name);
                let ran = home.run(&[(name, "https://x")], &["--config", &file, "config", "show", "--json"]);
                assert_eq!(shown(&ran)[option]["origin"]["kind"], "file", "{name} stands below the file");
            }
            Does::Asks(option, value) => {
                let set = show(&[(name, "true")]);
                assert_eq!((&set[option]["value"], &set[option]["origin"]["name"]), (&value.into(), &name.into()));
                assert_eq!(show(&[(name, "false")])[option]["value"], Value::Null, "{name}=false asks for nothing");
                assert!(warned("false").iter().any(|text| text.contains("not obeyed")), "{name}");
                home.check(&[(name, "maybe")], &[]).ended(2, name);
            }
            Does::Always => {
                assert!(warned("true").is_empty(), "{name}");
                assert!(
                    warned("false").iter().any(|text| text.contains(name) && text.contains("not obeyed")),
                    "{name}"
                );
            }
            Does::OfStore => {
                let away = if name == "AWS_S3_BUCKET" { "no_bucket" } else { "azure" };
                let mnt = home.text("mnt");
                let words = ["config", "check", "env:", &mnt, "--key", "file:/k"];
                home.run(&[("AWS_S3_BUCKET", "models"), (name, away)], &words).ended(2, "");
            }
            Does::Nothing | Does::Secret => {
                let set = show(&[(name, "/tmp/x")]);
                assert!(set.values().all(|option| option["origin"]["kind"] == "default"), "{name} sets an option");
            }
        }
    }
    // What asks for a log and has nowhere to write it is not passed over in silence.
    home.check(&[("ENABLE_SECURITY_LOGGING", "true")], &[]).ended(2, "ENABLE_SECURITY_LOGGING: audit is on");
    let file = home.write("audit.toml", "audit = \"required\"\naudit-journal = true\n", 0o600);
    let env = [("ENABLE_SECURITY_LOGGING", "true")];
    let set = shown(&home.run(&env, &["--config", &file, "config", "show", "--json"]));
    assert_eq!(set["audit"]["value"], "required", "nothing becomes less by it");
    // A strictness that the file asks for stays.
    let file = home.write("strict.toml", "strict = true\n", 0o600);
    let ran = home.run(&[("STRICT_MODEL_SECURITY", "false")], &["--config", &file, "config", "show", "--json"]);
    assert_eq!(shown(&ran)["strict"]["value"], "true");
    for (name, ..) in OWN {
        assert!(find(name).is_none(), "{name}");
    }
}

#[test]
fn the_store_of_the_environment_is_read_where_a_store_is_named() {
    let home = Home::new();
    let mnt = home.text("mnt");
    let bucket = [("AWS_S3_BUCKET", "models-prod"), ("MODEL_STORAGE_BACKEND", "s3")];
    let key = format!("file:{}", home.text("k"));
    let trust = home.text("t.pub");
    home.run(&bucket, &["config", "check", "env:prod", &mnt, "--key", &key, "--trust", &trust]).ended(0, "");
    home.run(&[], &["config", "check", "env:", &mnt, "--key", &key]).ended(2, "AWS_S3_BUCKET");
    home.run(&bucket, &["config", "check", &home.text("store"), &mnt, "--key", &key]).ended(2, "none of that kind");
    home.run(&[("MODEL_STORAGE_BACKEND", "gcs")], &["ls", "s3://models"]).ended(2, "S3 interface");
    home.run(&[("MODEL_STORAGE_BACKEND", "local")], &["ls", &home.text("store")]).ended(0, "");
}

/// The parts of the page that are the program's own.
#[test]
fn the_page_has_the_tables_of_the_program() {
    let page_path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/CONFIGURATION.md");
    let page = std::fs::read_to_string(&page_path).expect("the page");
    let home = Home::new();
    let own = home.run(&[], &["config", "options"]).ended(0, "").out();
    let parts = |text: &str| {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find("<!-- ").filter(|_| rest.contains("<!-- end -->")) {
            let end = rest[start..].find("<!-- end -->").expect("asked on the line before") + start;
            parts.push(rest[start..end].to_owned());
            rest = &rest[end + "<!-- end -->".len()..];
        }
        parts
    };
    let (in_page, of_program) = (parts(&page), parts(&own));
    assert_eq!(of_program.len(), 4);
    if std::env::var_os("MODELFS_TEST_WRITE_PAGE").is_some() {
        let mut page = page;
        for (old, new) in in_page.iter().zip(&of_program) {
            page = page.replacen(&format!("{old}<!-- end -->"), &format!("{new}<!-- end -->"), 1);
        }
        std::fs::write(&page_path, page).expect("written");
        return;
    }
    for (in_page, of_program) in in_page.iter().zip(&of_program) {
        assert!(
            in_page == of_program,
            "docs/CONFIGURATION.md is not what `modelfs config options` prints; \
            MODELFS_TEST_WRITE_PAGE=1 writes it anew:\n{of_program}"
        );
    }
    assert_eq!(in_page.len(), of_program.len());
    // Nothing is left out of the tables.
    for spec in OPTIONS {
        assert!(page.contains(&format!("| `{}` |", spec.name)) && page.contains(spec.env), "{}", spec.name);
        assert!(spec.takes == takes::ALL || takes::NAMES.iter().any(|(bit, _)| spec.takes & bit != 0), "{}", spec.name);
    }
}
