//! No credential is anywhere that somebody looks: random secrets go in by every way there is, one mount for each, and are
//! searched for in every place that somebody looks at: what is printed, the log, the audit log, metrics and health, command
//! lines, environments, and the memory that a core file would hold, were one written (none is: tests/memory.rs).
//!
//! Every place is first searched for something harmless that must be there, by the same search: a place that shows nothing
//! proves nothing. Each secret is searched for as it was typed, as what it stands for, in hex and in base64.
//!
//! What is real: the program, Vault, its auth methods, its aws engine. What is not: the S3 server, which serves a folder, says
//! what it was sent and closes every connection; the STS, the IAM and the cluster that Vault asks; the webhook. Not looked for
//! in memory: what a library makes of a private key of TLS, and a session token in the buffer of a connection that is kept open
//! (src/store/env_credentials.rs).

#[path = "common/mod.rs"]
mod common;
#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/iam.rs"]
mod iam;
#[path = "common/jwt.rs"]
mod jwt;
#[path = "common/program.rs"]
mod program;
#[path = "common/s3_folder.rs"]
mod s3_folder;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::slice;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::hostile::{self, Hostile, Request, respond};
use common::vault::VaultServer;
use fixture::Random;
use program::{Program, can_mount, run_ok};
use s3_folder::serve_folder;
use serde_json::{Value, json};

const MODEL: &str = "secret/model";
const BUCKET: &str = "models";
/// Who signs the version, and who the ref.
const SIGNERS: [&str; 2] = ["publisher", "release"];
/// For a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(180);

/// A secret and every form in which it would give itself away.
#[derive(Clone)]
struct Canary {
    what: String,
    forms: Vec<Vec<u8>>,
}

impl Canary {
    fn text(what: &str, typed: &str) -> Canary {
        Canary::of(what, typed, typed.as_bytes())
    }

    /// `typed` stands for `meant`.
    fn of(what: &str, typed: &str, meant: &[u8]) -> Canary {
        assert!(meant.len() >= 16, "{what}: so few bytes are found by chance");
        let mut forms = vec![typed.as_bytes().to_vec(), meant.to_vec()];
        forms.extend([hex::encode(meant).into_bytes(), STANDARD.encode(meant).into_bytes()]);
        forms.dedup();
        Canary { what: what.into(), forms }
    }
}

/// Horspool: with needles of 16 bytes and more it looks at few bytes of the hay, even where nothing was optimised.
fn holds(hay: &[u8], needle: &[u8]) -> bool {
    let last = needle.len() - 1;
    let mut skip = [needle.len(); 256];
    for (at, byte) in needle[..last].iter().enumerate() {
        skip[usize::from(*byte)] = last - at;
    }
    let mut at = 0;
    while at + needle.len() <= hay.len() {
        if hay[at + last] == needle[last] && &hay[at..at + needle.len()] == needle {
            return true;
        }
        at += skip[usize::from(hay[at + last])];
    }
    false
}

/// What would be in a core file of `pid`: every mapping but those marked "do not dump", by name.
fn core_of(pid: u32) -> Vec<(String, Vec<u8>)> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("root reads memory");
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let mut place: Option<(u64, u64, String)> = None;
    let mut found = Vec::new();
    for line in maps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let dumped = flags.split_whitespace().all(|flag| flag != "dd" && flag != "io");
            let Some((start, end, name)) = place.take().filter(|_| dumped && flags.contains("rd")) else { continue };
            let mut bytes = vec![0; (end - start) as usize];
            if memory.read_exact_at(&mut bytes, start).is_ok() {
                found.push((name, bytes));
            }
        } else if let Some((range, rest)) = line.split_once(' ')
            && let Some((start, end)) = range.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            place = Some((start, end, rest.to_owned()));
        }
    }
    found
}

/// The process and all that it started.
fn family(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<u32> =
        children.flat_map(|text| text.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    [pid].into_iter().chain(pids.into_iter().flat_map(family)).collect()
}

#[test]
fn the_detector_finds_a_secret_in_memory_that_would_be_dumped_in_every_form() {
    let planted = hex::encode(Random(5).bytes(24));
    let kept = planted.clone().into_bytes();
    assert!(core_of(std::process::id()).iter().any(|(_, bytes)| holds(bytes, planted.as_bytes())));
    std::hint::black_box(kept);
    let canary = Canary::of("key", "typed-as-this-word", b"sixteen bytes it");
    for hay in
        ["..typed-as-this-word..", "sixteen bytes it", "7369787465656e206279746573206974", "c2l4dGVlbiBieXRlcyBpdA=="]
    {
        assert!(canary.forms.iter().any(|form| holds(hay.as_bytes(), form)), "{hay}");
    }
    assert!(!holds(b"typed-as-this-wor", b"typed-as-this-word") && !holds(b"", b"typed"));
}

/// One way in: how a mount is told its secrets.
struct Way {
    name: String,
    store: String,
    /// As flags of `mount`, in pairs.
    words: Vec<(String, String)>,
    variables: Vec<(String, String)>,
    /// Given: the mount is made by `mount -t modelfs` with this `env-file`.
    env_file: Option<PathBuf>,
    /// Given: its words open this door for metrics and health. Otherwise it is a socket.
    door: Option<NetworkDoor>,
    canaries: Vec<Canary>,
}

impl Way {
    fn new(name: &str, store: &str, words: &[(&str, &str)], variables: &[(&str, &str)], canaries: &[Canary]) -> Way {
        let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
        Way {
            name: name.into(),
            store: store.into(),
            words: owned(words),
            variables: owned(variables),
            env_file: None,
            door: None,
            canaries: canaries.to_vec(),
        }
    }
}

/// A door over the network, by TLS and with a token.
struct NetworkDoor {
    /// `ADDRESS:PORT`.
    at: String,
    token: String,
    authority: PathBuf,
}

impl NetworkDoor {
    fn get(&self, path: &str) -> Vec<u8> {
        let authority = fs::read(&self.authority).expect("a certificate");
        let authority = reqwest::Certificate::from_pem_bundle(&authority).expect("PEM");
        let client = reqwest::Client::builder().no_proxy().tls_certs_only(authority).build().expect("a client");
        let asked =
            client.get(format!("https://{}{path}", self.at)).header("Authorization", format!("Bearer {}", self.token));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async { asked.send().await.expect("answered").bytes().await }).expect("a body").to_vec()
    }
}

/// A place that somebody looks at: what is there, and something harmless that must be found there.
struct Place {
    name: &'static str,
    shows: Vec<u8>,
    control: String,
}

/// A model sealed for every kind of key, and the secrets.
struct World {
    program: Program,
    dir: tempfile::TempDir,
    random: Random,
    s3: Hostile,
    raw_key: Canary,
    raw_hex: String,
    raw_base64: String,
    phrase: Canary,
    phrase_text: String,
    recipient: Canary,
    /// A field of Vault's KV, where there is a Vault.
    kv_key: Canary,
    sealed: Value,
}

impl World {
    fn new(vault: Option<&VaultServer>) -> World {
        let mut random = Random::announced("secrets");
        let dir = tempfile::tempdir().expect("a folder");
        let program = Program::in_folder(dir.path());
        let (raw, kv) = (random.bytes(32), random.bytes(32));
        let (raw_hex, raw_base64) = (hex::encode(&raw), STANDARD.encode(&raw));
        let phrase_text = format!("phrase-{}", hex::encode(random.bytes(20)));
        let pair = dir.path().join("home/server.key");
        run_ok(program.command(&["keygen", "--recipient"]).arg(&pair));
        let private = fs::read_to_string(&pair).expect("text").trim().to_owned();
        let digits = private.rsplit(':').next().expect("digits").to_owned();
        let s3 = Hostile::start({
            let folder = PathBuf::from(program.store());
            move |request: &Request, stream: &mut TcpStream| serve_folder(&folder, BUCKET, request, stream)
        });
        let mut world = World {
            s3,
            raw_key: Canary::of("raw key", &raw_hex, &raw),
            raw_hex,
            raw_base64,
            phrase: Canary::text("passphrase", &phrase_text),
            phrase_text,
            recipient: Canary::of("recipient's secret", &digits, &hex::decode(&digits).expect("hex")),
            kv_key: Canary::of("key in Vault", &STANDARD.encode(&kv), &kv),
            sealed: Value::Null,
            random,
            program,
            dir,
        };
        world.seal(vault, &STANDARD.encode(&kv));
        world
    }

    fn seal(&mut self, vault: Option<&VaultServer>, kv_key: &str) {
        let source = self.dir.path().join("source");
        fs::create_dir(&source).expect("mkdir");
        fs::write(source.join("config.json"), b"{}").expect("a file");
        let phrase_file = self.file("phrase", &self.phrase_text);
        let signers = SIGNERS.map(|name| self.dir.path().join(format!("home/{name}.key")));
        for path in &signers {
            run_ok(self.program.command(&["keygen", "--signing"]).arg(path));
        }
        let of_signer = |path: &PathBuf| {
            let text = fs::read_to_string(path).expect("text");
            let digits = text.trim().rsplit(':').next().expect("digits");
            Canary::of("signing key", digits, &hex::decode(digits).expect("hex"))
        };
        let mut command = self.program.command(&["seal", "-vv", "--json"]);
        command.arg(&source).args([self.program.store(), MODEL, "--key", "env:KEY_OF_TEST", "--key"]);
        command.arg(format!("passphrase-file:{phrase_file}")).arg("--key");
        command.arg(format!("recipient:{}", self.dir.path().join("home/server.key.pub").display()));
        command.env("KEY_OF_TEST", &self.raw_hex).env("MODELFS_LOG", "trace");
        command.arg("--sign").arg(&signers[0]).arg("--release").arg(&signers[1]);
        let mut canaries: Vec<Canary> = signers.iter().map(of_signer).collect();
        canaries.extend([self.raw_key.clone(), self.phrase.clone(), self.recipient.clone()]);
        if let Some(vault) = vault {
            let token = vault.token(json!({ "policies": ["secrets"], "ttl": "12h" }));
            vault.write("secret/data/secrets-keys/model", json!({ "data": { "key": kv_key } }));
            let words = ["vault-transit:transit-secrets/models", "--key", "vault-kv:secret/secrets-keys/model#key"];
            command.arg("--key").args(words).args(["--vault-addr", &vault.address()]).env("VAULT_TOKEN", &token);
            canaries.extend([Canary::text("token of the publisher", &token), self.kv_key.clone()]);
        }
        let output = run_ok(&mut command);
        self.sealed = serde_json::from_slice(&output.stdout).expect("JSON");
        let printed = [output.stdout, output.stderr].concat();
        check("seal", &canaries, &[Place { name: "printed", shows: printed, control: self.digest() }]);
    }

    /// The public halves of those who signed.
    fn trusted(&self) -> [PathBuf; 2] {
        SIGNERS.map(|name| self.dir.path().join(format!("home/{name}.key.pub")))
    }

    /// Of the manifest, without its prefix.
    fn digest(&self) -> String {
        let digest = self.sealed["manifest"].as_str().expect("text");
        digest.strip_prefix("sha256:").unwrap_or(digest).to_owned()
    }

    /// A file that nobody else can read.
    fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join("home").join(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).expect("a new file");
        file.write_all(text.as_bytes()).expect("written");
        path.to_str().expect("utf-8").to_owned()
    }

    fn word(&mut self, name: &str) -> String {
        format!("{name}-{}", hex::encode(self.random.bytes(20)))
    }

    /// Credentials for S3, as variables and as canaries.
    fn aws(&mut self) -> ([(&'static str, String); 3], [Canary; 2]) {
        let (id, secret, session) = (self.word("keyid"), self.word("s3secret"), self.word("s3session"));
        let canaries = [Canary::text("S3 secret", &secret), Canary::text("S3 session token", &session)];
        let variables = [("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret), ("AWS_SESSION_TOKEN", session)];
        (variables, canaries)
    }

    /// Mounts that way, lets people look at it, and searches.
    fn search(&self, way: &Way) {
        println!("{}", way.name);
        let mount_dir = self.program.mountpoint();
        let mountpoint = mount_dir.to_str().expect("utf-8");
        let folder = self.dir.path().join(way.name.replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
        fs::create_dir(&folder).expect("every way has a name of its own");
        let at = |name: &str| folder.join(name);
        let (log, audit, door) = (at("mount.log"), at("audit.log"), at("door.sock"));
        // Where a daemon goes on once it has let go of its caller.
        let later = at("daemon.log");
        let whole_log = || [fs::read(&log).expect("log"), fs::read(&later).unwrap_or_default()].concat();
        let public = format!("public-word-{}", way.name.len());
        let mut words = way.words.clone();
        let trusted = self.trusted().map(|path| ("trust", path));
        let socket = way.door.is_none().then(|| ("http", PathBuf::from(format!("unix:{}", door.display()))));
        for (name, value) in trusted.into_iter().chain([("audit-file", audit.clone())]).chain(socket) {
            words.push((name.into(), value.to_str().expect("utf-8").to_owned()));
        }
        let mut command = match &way.env_file {
            None => {
                let mut command = self.program.command(&["mount", "-vvv", &way.store, mountpoint]);
                for (name, value) in &words {
                    command.arg(format!("--{name}")).args(Some(value).filter(|value| !value.is_empty()));
                }
                command
            }
            Some(file) => {
                let words: Vec<String> = words.iter().map(|(name, value)| format!("{name}={value}")).collect();
                let given = format!("{},env-file={},log-file={}", words.join(","), file.display(), later.display());
                self.program.command(&[&way.store, mountpoint, "-v", "-o", &given])
            }
        };
        command.envs(way.variables.iter().map(|(name, value)| (name, value))).env("PUBLIC_WORD", &public);
        command.env("MODELFS_LOG", "trace").env("AWS_ENDPOINT_URL", self.s3.endpoint()).stdout(Stdio::null());
        command.stderr(fs::File::create(&log).expect("log"));
        let mut child = command.spawn().expect("runs");
        let file = mount_dir.join(MODEL).join("config.json");
        self.until(&way.name, &log, || fs::read(&file).is_ok_and(|bytes| bytes == b"{}"));

        let mut printed = Vec::new();
        for words in [&["status", mountpoint, "--json"][..], &["sessions", mountpoint], &["config", "show"]] {
            let mut command = self.program.command(words);
            command.envs(way.variables.iter().map(|(name, value)| (name, value)));
            let output = command.output().expect("runs");
            printed.extend([output.stdout, output.stderr].concat());
        }
        let status = run_ok(&mut self.program.command(&["status", mountpoint, "--json"])).stdout;
        let status: Value = serde_json::from_slice(&status).expect("JSON");
        let pid = u32::try_from(status["pid"].as_u64().expect("a pid")).expect("a pid");
        let shown = ["/metrics", "/live", "/ready", "/health", "/health/security"].map(|path| match &way.door {
            Some(network) => network.get(path),
            None => get(&door, path),
        });
        let door = way.door.as_ref().map_or(door.to_str().expect("utf-8"), |network| &network.at);
        let of_all = |name: &str| {
            let each = family(pid).into_iter().filter_map(|pid| fs::read(format!("/proc/{pid}/{name}")).ok());
            each.collect::<Vec<_>>().concat()
        };
        let place = |name, shows, control: &str| Place { name, shows, control: control.into() };
        check(
            &way.name,
            &way.canaries,
            &[
                place("printed", printed, mountpoint),
                place("log", whole_log(), door),
                place("metrics and health", shown.concat(), "modelfs_ready"),
                place("audit log", fs::read(&audit).expect("audit log"), MODEL),
                place("command line", of_all("cmdline"), mountpoint),
                place("environment", of_all("environ"), &public),
            ],
        );
        self.search_core(way, pid, mountpoint);
        run_ok(&mut self.program.command(&["umount", mountpoint]));
        child.wait().expect("ended");
        self.until("the daemon ends", &log, || !Path::new(&format!("/proc/{pid}")).exists());
        let at_the_end = [
            place("log at the end", whole_log(), door),
            place("audit log at the end", fs::read(&audit).expect("audit log"), MODEL),
        ];
        check(&way.name, &way.canaries, &at_the_end);
    }

    /// What a request carries lies in memory while it is under way: a secret is left there if it stays.
    fn search_core(&self, way: &Way, pid: u32, control: &str) {
        let until = Instant::now() + PATIENCE;
        loop {
            let core = core_of(pid);
            let in_it = |form: &[u8]| core.iter().find(|(_, bytes)| holds(bytes, form)).map(|(name, _)| name.clone());
            assert!(in_it(control.as_bytes()).is_some(), "{}: the detector finds nothing in memory", way.name);
            let left: Vec<(&str, String)> = way
                .canaries
                .iter()
                .flat_map(|canary| canary.forms.iter().map(|form| (canary.what.as_str(), form)))
                .filter_map(|(what, form)| Some((what, in_it(form)?)))
                .collect();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < until, "{}: would be in a core file: {left:?}", way.name);
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn until(&self, what: &str, log: &Path, mut done: impl FnMut() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < until, "{what}: {}", fs::read_to_string(log).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Every canary in every place, after the place has shown that things are found there.
fn check(way: &str, canaries: &[Canary], places: &[Place]) {
    for place in places {
        let name = place.name;
        assert!(holds(&place.shows, place.control.as_bytes()), "{way}: nothing is ever found in: {name}");
        for canary in canaries {
            let found = canary.forms.iter().any(|form| holds(&place.shows, form));
            assert!(!found, "{way}: the {} is in: {name}", canary.what);
        }
    }
}

fn get(socket: &Path, path: &str) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).expect("asked");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("answered");
    answer
}

fn borrowed<'a>(pairs: &'a [(&'a str, String)]) -> Vec<(&'a str, &'a str)> {
    pairs.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

/// The server was sent what goes with every request: the canary came as far as it should.
fn reached_s3(world: &World, session: &Canary) {
    let sent = |request: &Request| request.header("x-amz-security-token").map(|text| text.as_bytes().to_vec());
    assert!(
        world.s3.requests().iter().any(|request| sent(request).as_ref() == session.forms.first()),
        "nothing was sent"
    );
}

#[test]
fn no_key_and_no_storage_credential_is_left_where_somebody_looks() {
    if !can_mount() {
        return;
    }
    let mut world = World::new(None);
    let store = world.program.store().to_owned();
    let s3_store = format!("s3://{BUCKET}");
    let (raw, phrase, recipient) = (world.raw_key.clone(), world.phrase.clone(), world.recipient.clone());
    let key_file = format!("file:{}", world.file("raw.key", &world.raw_hex));
    let phrase_file = format!("passphrase-file:{}", world.dir.path().join("home/phrase").display());
    let pair = format!("x25519:{}", world.dir.path().join("home/server.key").display());
    let (hex, base64, text) = (world.raw_hex.clone(), world.raw_base64.clone(), world.phrase_text.clone());
    let (aws, aws_canaries) = world.aws();
    let (file_aws, file_canaries) = world.aws();
    let [_, session] = aws_canaries.clone();
    let [_, file_session] = file_canaries.clone();
    let s3_way = [&[("KEY_OF_TEST", hex.as_str())][..], &borrowed(&aws)[..]].concat();
    let lines: String = file_aws.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    let env_file = world.file("environment", &format!("{lines}MODELFS_KEY=\"{hex}\"\n"));
    let through_file = Way {
        env_file: Some(env_file.into()),
        ..Way::new("env-file of fstab", &s3_store, &[], &[], &[&[raw.clone()][..], &file_canaries].concat())
    };
    for way in [
        Way::new("key in a file", &store, &[("key", &key_file)], &[], slice::from_ref(&raw)),
        Way::new("env:NAME", &store, &[("key", "env:KEY_OF_TEST")], &[("KEY_OF_TEST", &hex)], slice::from_ref(&raw)),
        Way::new("MODELFS_KEY", &store, &[], &[("MODELFS_KEY", &base64)], slice::from_ref(&raw)),
        Way::new("MODEL_ENCRYPTION_KEY", &store, &[], &[("MODEL_ENCRYPTION_KEY", &hex)], slice::from_ref(&raw)),
        Way::new("passphrase in a file", &store, &[("key", &phrase_file)], &[], slice::from_ref(&phrase)),
        Way::new("MODELFS_PASSPHRASE", &store, &[("key", "passphrase")], &[("MODELFS_PASSPHRASE", &text)], &[phrase]),
        Way::new("secret half of a pair", &store, &[("key", &pair)], &[], &[recipient]),
        Way::new(
            "S3 by the environment",
            &s3_store,
            &[("key", "env:KEY_OF_TEST")],
            &s3_way,
            &[&[raw][..], &aws_canaries].concat(),
        ),
        through_file,
    ] {
        world.search(&way);
    }
    reached_s3(&world, &session);
    reached_s3(&world, &file_session);
}

/// `modelfs run`: ours are taken out of the environment, and `--keep-env` gives one to the command all the same.
#[test]
fn a_command_gets_no_storage_credential_but_those_it_is_to_keep() {
    if !can_mount() {
        return;
    }
    let mut world = World::new(None);
    let (aws, canaries) = world.aws();
    let mut command = world.program.command(&["run", &format!("s3://{BUCKET}")]);
    command.arg(world.program.mountpoint()).args(["--key", "env:KEY_OF_TEST", "--keep-env", "AWS_ACCESS_KEY_ID"]);
    for trusted in world.trusted() {
        command.arg("--trust").arg(trusted);
    }
    command.args(["--", "sh", "-c", "env; tr '\\0' '\\n' </proc/$PPID/environ >&2"]);
    command.env("KEY_OF_TEST", &world.raw_hex).envs(borrowed(&aws)).env("PUBLIC_WORD", "public-word");
    let output = run_ok(command.env("AWS_ENDPOINT_URL", world.s3.endpoint()));
    let [(kept, id), ..] = &aws;
    let place = |name, shows, control: String| Place { name, shows, control };
    let ours = [&canaries[..], &[Canary::text("key id", id), world.raw_key.clone()]].concat();
    check("run", &ours, &[place("our environment", output.stderr, "PUBLIC_WORD=public-word".into())]);
    let its = [&canaries[..], &[world.raw_key.clone()]].concat();
    check("run", &its, &[place("the command's environment", output.stdout, format!("{kept}={id}"))]);
}

#[test]
fn no_login_to_vault_and_nothing_that_vault_gives_is_left_where_somebody_looks() {
    if !can_mount() {
        return;
    }
    let Some(vault) = VaultServer::shared() else { return };
    prepare(vault);
    let mut world = World::new(Some(vault));
    let (ways, fakes) = ways_by_vault(&mut world, vault);
    for way in &ways {
        world.search(way);
    }
    let signed = |key: &str| {
        let by = format!("Credential={key}/");
        world.s3.requests().iter().any(|request| request.header("authorization").is_some_and(|text| text.contains(&by)))
    };
    assert!(signed("AKIAUSER") && signed("ASIAROLE"), "what Vault lent was not used");
    let [.., hook] = &fakes;
    assert!(hook.requests().iter().any(|request| request.target.starts_with("/hook/")), "no alert was sent");
}

/// What every login may use.
fn prepare(vault: &VaultServer) {
    vault.enable_transit("transit-secrets");
    vault.write("transit-secrets/keys/models", json!({ "derived": true }));
    let rules = ["transit-secrets/+/models", "secret/data/secrets-*", "secret/metadata/secrets-*", "aws-lent/creds/*"]
        .map(|path| format!("path \"{path}\" {{ capabilities = [\"update\", \"read\", \"list\"] }}\n"));
    vault.policy("secrets", &rules.concat());
}

/// What some of them need, STS, IAM, a cluster and a webhook, comes along.
fn ways_by_vault(world: &mut World, vault: &VaultServer) -> (Vec<Way>, [Hostile; 4]) {
    let store = world.program.store().to_owned();
    let (address, policies) = (vault.address(), json!({ "token_policies": ["secrets"] }));
    let transit = ("key", "vault-transit:transit-secrets/models");
    let at = ("vault-addr", address.as_str());
    let token = || vault.token(json!({ "policies": ["secrets"], "ttl": "12h" }));
    let mut ways = Vec::new();
    let mut way = |name: &str, words: &[(&str, &str)], variables: &[(&str, &str)], what: &str, secret: &str| {
        let words = [&[transit, at][..], words].concat();
        ways.push(Way::new(name, &store, &words, variables, &[Canary::text(what, secret)]));
    };

    let text = token();
    way("VAULT_TOKEN", &[], &[("VAULT_TOKEN", &text)], "token", &text);
    let text = token();
    way("token in a file", &[("vault-token-file", &world.file("token", &text))], &[], "token", &text);

    let role_id = vault.approle("approle-secrets", policies.clone());
    let approle =
        [("vault-auth", "approle"), ("vault-auth-mount", "approle-secrets"), ("vault-role-id", role_id.as_str())];
    let secret = vault.secret_id("approle-secrets");
    let file = world.file("secret-id", &secret);
    way(
        "secret-id in a file",
        &[&approle[..], &[("vault-secret-id-file", file.as_str())]].concat(),
        &[],
        "secret-id",
        &secret,
    );
    let secret = vault.secret_id("approle-secrets");
    way("MODELFS_VAULT_SECRET_ID", &approle, &[("MODELFS_VAULT_SECRET_ID", &secret)], "secret-id", &secret);
    let secret = vault.wrapped_secret_id("approle-secrets");
    let file = world.file("wrapped", &secret);
    let wrapped = [("vault-secret-id-file", file.as_str()), ("vault-secret-id-wrapped", "")];
    way("wrapped secret-id", &[&approle[..], &wrapped].concat(), &[], "wrapping token", &secret);

    vault.enable_auth("userpass-secrets", "userpass");
    let password = world.word("password");
    let user = json!({ "password": password, "token_policies": ["secrets"] });
    vault.write("auth/userpass-secrets/users/reader", user);
    let userpass = [("vault-auth", "userpass"), ("vault-auth-mount", "userpass-secrets"), ("vault-username", "reader")];
    let file = world.file("password", &password);
    way(
        "password in a file",
        &[&userpass[..], &[("vault-password-file", file.as_str())]].concat(),
        &[],
        "password",
        &password,
    );
    way("MODELFS_VAULT_PASSWORD", &userpass, &[("MODELFS_VAULT_PASSWORD", &password)], "password", &password);

    let signer = jwt::Signer::new();
    vault.enable_auth("jwt-secrets", "jwt");
    vault.write("auth/jwt-secrets/config", json!({ "jwt_validation_pubkeys": [signer.public_pem()] }));
    let role = json!({
        "role_type": "jwt", "user_claim": "sub", "bound_audiences": ["vault"], "token_policies": ["secrets"],
    });
    vault.write("auth/jwt-secrets/role/models", role);
    let claims = json!({ "sub": "reader", "aud": "vault", "iat": jwt::now() - 10, "exp": jwt::now() + 12 * 3600 });
    let text = signer.jwt(&claims);
    let file = world.file("jwt", &text);
    let by_jwt = [("vault-auth", "jwt"), ("vault-auth-mount", "jwt-secrets"), ("vault-role", "models")];
    way("JWT", &[&by_jwt[..], &[("vault-jwt-file", file.as_str())]].concat(), &[], "JWT", &text);

    let (text, cluster) = (signer.jwt(&service_account(12 * 3600)), fake_cluster());
    vault.enable_auth("k8s-secrets", "kubernetes");
    let config = json!({
        "kubernetes_host": cluster.endpoint(), "token_reviewer_jwt": signer.jwt(&service_account(3600)),
        "kubernetes_ca_cert": fs::read_to_string(vault.file("ca.pem")).expect("a certificate"),
        "disable_local_ca_jwt": true,
    });
    vault.write("auth/k8s-secrets/config", config);
    let role = json!({
        "bound_service_account_names": "server", "bound_service_account_namespaces": "models",
        "token_policies": ["secrets"],
    });
    vault.write("auth/k8s-secrets/role/models", role);
    let file = world.file("service-account", &text);
    let by_account = [("vault-auth", "kubernetes"), ("vault-auth-mount", "k8s-secrets"), ("vault-role", "models")];
    way(
        "service account",
        &[&by_account[..], &[("vault-jwt-file", file.as_str())]].concat(),
        &[],
        "service account's token",
        &text,
    );

    vault.enable_auth("cert-secrets", "cert");
    let path = |name: &str| vault.file(name).to_str().expect("utf-8").to_owned();
    let (ca, cert, key) = (path("ca.pem"), path("client.pem"), path("client.key"));
    let authority = fs::read_to_string(&ca).expect("a certificate");
    let role = json!({ "certificate": authority, "allowed_common_names": "client", "token_policies": ["secrets"] });
    vault.write("auth/cert-secrets/certs/models", role);
    let pem = fs::read_to_string(&key).expect("a key");
    let line = pem.lines().find(|line| line.len() > 40).expect("a line of the key").to_owned();
    let tls_address = vault.tls_address();
    let words = [
        transit,
        ("vault-addr", tls_address.as_str()),
        ("vault-auth", "cert"),
        ("vault-auth-mount", "cert-secrets"),
        ("vault-ca-cert", ca.as_str()),
        ("vault-client-cert", cert.as_str()),
        ("vault-client-key", key.as_str()),
    ];
    let by_cert = Way::new("client key", &store, &words, &[], &[Canary::text("client key", &line)]);

    let sts = fake_sts();
    vault.enable_auth("aws-secrets", "aws");
    vault.write("auth/aws-secrets/config/client", json!({ "sts_endpoint": sts.endpoint(), "sts_region": "us-east-1" }));
    let role = json!({
        "auth_type": "iam", "resolve_aws_unique_ids": false, "token_policies": ["secrets"],
        "bound_iam_principal_arn": "arn:aws:iam::123456789012:user/models",
    });
    vault.write("auth/aws-secrets/role/models", role);
    let place = format!("{}/", sts.endpoint());
    let (aws, aws_canaries) = world.aws();
    let words = [
        transit,
        at,
        ("vault-auth", "aws"),
        ("vault-auth-mount", "aws-secrets"),
        ("vault-role", "models"),
        ("vault-aws-sts", place.as_str()),
    ];
    let by_aws = Way::new("AWS login, no S3", &store, &words, &borrowed(&aws), &aws_canaries);

    let file = world.file("kv-token", &token());
    let kv = [("key", "vault-kv:secret/secrets-keys/model#key"), at, ("vault-token-file", file.as_str())];
    let by_kv = Way::new("key in Vault", &store, &kv, &[], slice::from_ref(&world.kv_key));

    let record = json!({
        "s3_bucket": BUCKET, "s3_key": world.sealed["model_id"], "checksum": format!("sha256:{}", world.digest()),
        "size_bytes": world.sealed["bytes"], "encryption_key": world.raw_base64,
    });
    vault.write(&format!("secret/data/secrets-catalog/{MODEL}"), json!({ "data": record }));
    let (aws, aws_canaries) = world.aws();
    let words = [at, ("vault-token-file", file.as_str())];
    let canaries = [&[world.raw_key.clone()][..], &aws_canaries].concat();
    let by_record =
        Way::new("record of a catalog", "vault-kv://secret/secrets-catalog", &words, &borrowed(&aws), &canaries);

    let (lent, lent_session) = (world.word("lent"), world.word("lent-session"));
    let (iam, _) = iam::start(&lent, &lent_session);
    vault.write("sys/mounts/aws-lent", json!({ "type": "aws" }));
    let root = json!({
        "access_key": "AKIAROOT", "secret_key": "root", "region": "us-east-1", "iam_endpoint": iam.endpoint(),
        "sts_endpoint": iam.endpoint(),
    });
    vault.write("aws-lent/config/root", root);
    let policy = json!({ "Version": "2012-10-17", "Statement": [] }).to_string();
    vault.write("aws-lent/roles/user", json!({ "credential_type": "iam_user", "policy_document": policy }));
    let role = json!({ "credential_type": "assumed_role", "role_arns": ["arn:aws:iam::123456789012:role/models"] });
    vault.write("aws-lent/roles/role", role);
    let s3_store = format!("s3://{BUCKET}");
    let canaries = [Canary::text("lent S3 secret", &lent), Canary::text("lent session token", &lent_session)];
    let by_lease = ["user", "role"].map(|role| {
        let from = format!("vault-aws:aws-lent/{role}");
        let words = [transit, at, ("vault-token-file", file.as_str()), ("s3-credentials", from.as_str())];
        Way::new(&format!("S3 lent by Vault to a {role}"), &s3_store, &words, &[], &canaries)
    });

    ways.extend([by_cert, by_aws, by_kv, by_record]);
    ways.extend(by_lease);

    let hook = Hostile::start(|_: &Request, stream: &mut TcpStream| respond(stream, "200 OK", &[], b""));
    let (door_token, hook_path) = (world.word("door"), world.word("hook"));
    let network = NetworkDoor {
        at: format!("127.0.0.1:{}", common::free_port()),
        token: door_token.clone(),
        authority: ca.into(),
    };
    let door_file = world.file("door-token", &door_token);
    let hook_file = world.file("webhooks", &format!("{}/hook/{hook_path}\n", hook.endpoint()));
    let (server_cert, server_key) = (path("server.pem"), path("server.key"));
    let words = [
        transit,
        at,
        ("vault-token-file", file.as_str()),
        ("http", network.at.as_str()),
        ("http-cert", server_cert.as_str()),
        ("http-key", server_key.as_str()),
        ("http-token-file", door_file.as_str()),
        ("alert-webhook-file", hook_file.as_str()),
        ("alert-severity", "low"),
    ];
    let canaries = [Canary::text("token of the door", &door_token), Canary::text("webhook's address", &hook_path)];
    let seen = Way::new("seen from outside", &store, &words, &[], &canaries);
    ways.push(Way { door: Some(network), ..seen });
    (ways, [sts, iam, cluster, hook])
}

fn service_account(lasts: u64) -> Value {
    json!({
        "iss": "https://kubernetes.default.svc", "sub": "system:serviceaccount:models:server",
        "aud": ["https://kubernetes.default.svc"], "iat": jwt::now() - 10, "nbf": jwt::now() - 10,
        "exp": jwt::now() + lasts,
        "kubernetes.io": { "namespace": "models", "serviceaccount": { "name": "server", "uid": "uid-1" } },
    })
}

/// Knows every token for the server's; tests/vault.rs looks at whom it should refuse.
fn fake_cluster() -> Hostile {
    Hostile::start(|request: &Request, stream: &mut TcpStream| {
        let review: Value = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
        let user = json!({ "username": "system:serviceaccount:models:server", "uid": "uid-1", "groups": [] });
        let status = json!({ "authenticated": true, "user": user, "audiences": review["spec"]["audiences"] });
        let answer = json!({ "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status });
        respond(stream, "201 Created", &[("Content-Type", "application/json")], answer.to_string().as_bytes())
    })
}

/// Says of everybody that they are the reader; tests/vault.rs looks at signatures.
fn fake_sts() -> Hostile {
    Hostile::start(|_: &Request, stream: &mut TcpStream| {
        let body =
            b"<GetCallerIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><GetCallerIdentityResult>\
            <Arn>arn:aws:iam::123456789012:user/models</Arn><UserId>AIDATEST</UserId><Account>123456789012</Account>\
            </GetCallerIdentityResult><ResponseMetadata><RequestId>1</RequestId></ResponseMetadata>\
            </GetCallerIdentityResponse>";
        respond(stream, "200 OK", &[("Content-Type", "text/xml")], body)
    })
}

/// Refusals of every kind talk the most. A secret may also stand where a word belongs, pasted there; in place of a trusted
/// key, which is public and told, nothing could know it for one.
#[test]
fn no_refusal_repeats_a_secret() {
    let mut random = Random::announced("refusals");
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(dir.path());
    let source = dir.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("config.json"), b"{}").expect("a file");
    program.seal(&source, MODEL);
    let wrong = format!("wrong-{}", hex::encode(random.bytes(20)));
    let key = hex::encode(random.bytes(32));
    let secret_file = dir.path().join("home/wrong");
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&secret_file).expect("new");
    file.write_all(wrong.as_bytes()).expect("written");
    let secret_file = secret_file.to_str().expect("utf-8");
    let vault = VaultServer::shared();
    if let Some(vault) = vault {
        vault.enable_auth("approle-wrong", "approle");
        vault.enable_auth("userpass-wrong", "userpass");
    }
    let address = vault.map(VaultServer::address).unwrap_or_default();
    let trusted = program.trusted_key();
    let trust = ["--trust", trusted.to_str().expect("utf-8")];
    let at = ["--key", "vault-transit:transit/none", "--vault-addr", &address];
    let by = |words: &[&'static str]| [&at[..], &trust, words].concat();
    let approle =
        by(&["--vault-auth", "approle", "--vault-auth-mount", "approle-wrong", "--vault-role-id", "some-role"]);
    let userpass =
        by(&["--vault-auth", "userpass", "--vault-auth-mount", "userpass-wrong", "--vault-username", "somebody"]);
    let env_key = [&["--key", "env:WRONG"][..], &trust].concat();
    /// What is given, by which variables, and whether Vault is needed for it.
    type Row<'a> = (Vec<&'a str>, &'a [(&'a str, &'a str)], bool);
    let rows: [Row<'_>; 12] = [
        (env_key.clone(), &[("WRONG", &wrong)], false),
        (env_key, &[("WRONG", &key)], false),
        (trust.to_vec(), &[("MODEL_ENCRYPTION_KEY", &wrong)], false),
        ([&["--key", "passphrase"][..], &trust].concat(), &[("MODELFS_PASSPHRASE", &wrong)], false),
        ([&["--key", &wrong][..], &trust].concat(), &[], false),
        ([&["--s3-credentials", &wrong, "--key", "env:WRONG"][..], &trust].concat(), &[], false),
        ([&approle[..], &["--vault-secret-id-file", secret_file]].concat(), &[], true),
        (approle, &[("MODELFS_VAULT_SECRET_ID", &wrong)], true),
        ([&userpass[..], &["--vault-password-file", secret_file]].concat(), &[], true),
        (userpass, &[("MODELFS_VAULT_PASSWORD", &wrong)], true),
        ([&by(&[])[..], &["--vault-token-file", secret_file]].concat(), &[], true),
        (by(&[]), &[("VAULT_TOKEN", &wrong)], true),
    ];
    let canaries =
        [Canary::text("wrong secret", &wrong), Canary::of("wrong key", &key, &hex::decode(&key).expect("hex"))];
    for (words, variables, needs_vault) in rows {
        if needs_vault && vault.is_none() {
            continue;
        }
        let mut cat = program.command(&["cat", "-vvv", program.store(), MODEL, "config.json", "--json"]);
        cat.args(&words).env_remove("VAULT_TOKEN").envs(variables.iter().copied()).env("MODELFS_LOG", "trace");
        let output = cat.output().expect("runs");
        assert!(!output.status.success(), "{:?}", words.first());
        let shows = [output.stdout, output.stderr].concat();
        check("a refusal", &canaries, &[Place { name: "printed", shows, control: "modelfs: ".into() }]);
    }
}
