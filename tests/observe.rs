//! A mount seen from outside, for real: its doors over a Unix socket and over TLS, its health, its alerts, and who may give
//! it orders. The program is the built one, certificates are made by openssl, peers are other users of this machine.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/program.rs"]
mod program;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use fixture::{Fixture, Random, Style};
use modelfs::crypto::Verify;
use modelfs::error::Code;
use modelfs::observe::table;
use modelfs::store::fault::{Call, Fault, Faulty, When};
use modelfs::telemetry::events::{Event, Kind, Severity, Sink};
use mounted::{How, Mounted};
use program::{Mount, Program, can_mount, run_ok};
use serde_json::Value;

const NAME: &str = "acme/llama";
const FILE: &str = "model.safetensors";
const BYTES: usize = (20 << 20) + 77;
const TOKEN: &str = "canary-token-of-the-door-0123456789";
const HOOK_SECRET: &str = "canary-of-the-webhook";
/// Somebody with a role, and somebody without.
const VIEWER: u32 = 54_321;
const STRANGER: u32 = 54_322;
const GROUP: u32 = 54_400;

struct Scene {
    _folder: tempfile::TempDir,
    program: Program,
}

fn scene() -> Option<Scene> {
    if !can_mount() {
        return None;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    // Others have to get to the binary's sockets below.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    let program = Program::in_folder(folder.path());
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join(FILE), (0..BYTES).map(|at| (at * 7 + at / 251) as u8).collect::<Vec<_>>()).expect("write");
    fs::write(source.join("config.json"), "{}").expect("write");
    program.seal(&source, NAME);
    Some(Scene { _folder: folder, program })
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.program.root().join(name)
    }

    fn file(&self) -> PathBuf {
        self.program.mountpoint().join(NAME).join(FILE)
    }

    fn status(&self) -> Value {
        let asked = run_ok(self.program.command(&["status", "--json"]).arg(self.program.mountpoint()));
        serde_json::from_slice(&asked.stdout).expect("JSON")
    }

    /// Where a mount answers that was not told where to.
    fn usual_socket(&self) -> PathBuf {
        let status = self.status();
        let http = status["http"].as_str().expect("a door").to_owned();
        PathBuf::from(http.strip_prefix("unix:").expect("a Unix socket"))
    }
}

fn get(socket: &Path, path: &str) -> (u16, String) {
    let stream = UnixStream::connect(socket).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
    asked(stream, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"))
}

fn asked(mut stream: impl Read + Write, head: &str) -> (u16, String) {
    stream.write_all(head.as_bytes()).expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, body.to_owned())
}

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().expect("a number")
}

/// Looks ten times a second at most: half of what the door answers to one peer, who would be told 429 otherwise.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// In the tree is a moment before ready.
fn until_ready(mut metrics: impl FnMut() -> String) {
    until("it is never ready", || {
        // One may ask twenty times a second.
        std::thread::sleep(Duration::from_millis(100));
        metrics().contains("modelfs_ready 1")
    });
}

/// The program as another user, with these groups.
fn as_user(command: &mut Command, uid: u32, groups: &[u32]) -> Output {
    let words: Vec<String> = groups.iter().map(u32::to_string).collect();
    let mut other = Command::new("setpriv");
    other.args([format!("--reuid={uid}"), format!("--regid={uid}")]);
    match words.is_empty() {
        true => other.arg("--clear-groups"),
        false => other.arg(format!("--groups={}", words.join(","))),
    };
    other.arg(command.get_program()).args(command.get_args()).current_dir("/").env_clear();
    other.env("HOME", "/nonexistent").env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
    other.output().expect("setpriv runs")
}

/// A copy of the program that everybody may run.
fn for_everybody(scene: &Scene) -> PathBuf {
    let copy = scene.path("modelfs");
    fs::copy(env!("CARGO_BIN_EXE_modelfs"), &copy).expect("copied");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("chmod");
    copy
}

// ---- Metrics and health ---------------------------------------------------------------------------------------------

#[test]
fn a_scrape_follows_what_readers_do_and_names_only_what_the_table_names() {
    let Some(scene) = scene() else { return };
    let mount = scene.program.mount(&["--cache", "128MiB", "--open", "lazy"]);
    let socket = scene.usual_socket();
    assert_eq!(fs::metadata(&socket).expect("there").permissions().mode() & 0o777, 0o600);
    until_ready(|| get(&socket, "/metrics").1);
    let before = get(&socket, "/metrics").1;
    assert_eq!(value(&before, "modelfs_model_resident_bytes{model=\"acme/llama\",version=\"1\"}"), 0.0);
    let read = fs::read(scene.file()).expect("read");
    assert_eq!(read.len(), BYTES);
    let (code, text) = get(&socket, "/metrics");
    assert_eq!(code, 200);
    let of_model = |name: &str| value(&text, &format!("modelfs_{name}{{model=\"acme/llama\",version=\"1\"}}"));
    assert!(of_model("model_resident_bytes") >= BYTES as f64);
    assert!(of_model("model_load_bytes") >= BYTES as f64 && of_model("model_load_seconds") > 0.0);
    assert_eq!((of_model("model_locked"), of_model("model_current")), (0.0, 1.0));
    assert!(value(&text, "modelfs_fetch_bytes_total") >= BYTES as f64);
    assert!(value(&text, "modelfs_cache_misses_total") > 0.0 && value(&text, "modelfs_ready") == 1.0);
    assert!(value(&text, "modelfs_process_locked_memory_bytes") > 0.0);
    assert!(value(&text, "modelfs_fetch_seconds_total") > 0.0 && value(&text, "modelfs_decrypt_seconds_total") > 0.0);
    let disk = |name: &str| value(&text, &format!("modelfs_disk_{name}_bytes{{folder=\"state\"}}"));
    assert!(disk("size") > 0.0 && disk("free") <= disk("size"));
    let mountpoint = scene.program.mountpoint().display();
    assert_eq!(value(&text, &format!("modelfs_mount_up{{mountpoint=\"{mountpoint}\"}}")), 1.0);
    assert_eq!(value(&text, &format!("modelfs_store_up{{store=\"file://{}\"}}", scene.program.store())), 1.0);
    // Everything that is told is in the table, with the table's words.
    let mut told = HashSet::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a name and words");
            let metric = table::Metric::find(name).unwrap_or_else(|| panic!("{name} is not in the table"));
            assert_eq!(metric.help, help, "{name}");
            assert!(told.insert(name), "{name} comes twice");
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().expect("a name");
            assert!(told.contains(name), "{name} has no help");
        }
    }
    assert!(told.len() > 60, "{} families", told.len());
    // Wiping is counted too.
    run_ok(scene.program.command(&["lock"]).arg(scene.program.mountpoint()));
    let locked = get(&socket, "/metrics").1;
    assert_eq!(value(&locked, "modelfs_model_locked{model=\"acme/llama\",version=\"1\"}"), 1.0);
    assert!(
        value(&locked, "modelfs_wiped_bytes_total") + value(&locked, "modelfs_unwiped_bytes_total") >= BYTES as f64
    );
    assert!(value(&locked, "modelfs_wipe_seconds_total") > 0.0);
    mount.unmount();
    assert!(!socket.exists(), "the socket goes with the mount");
}

#[test]
fn health_tells_a_mount_that_serves_from_one_that_does_not() {
    let Some(scene) = scene() else { return };
    let door = scene.path("door.sock");
    let mount = scene.program.mount(&["--http", &format!("unix:{}", door.display())]);
    let codes = || ["/live", "/ready", "/health", "/health/security"].map(|path| get(&door, path).0);
    // In the tree is a moment before ready. Four questions each time: one may ask twenty a second.
    until("it is never ready", || {
        std::thread::sleep(Duration::from_millis(250));
        codes() == [200; 4]
    });
    let json = |path: &str| serde_json::from_str::<Value>(&get(&door, path).1).expect("JSON");
    let security = json("/health/security");
    let items = security["items"].as_array().expect("items");
    let status = |name: &str| {
        let item = items.iter().find(|item| item["name"] == name).unwrap_or_else(|| panic!("{name}: {security}"));
        item["status"].as_str().expect("a word").to_owned()
    };
    for name in ["memory", "core_dumps", "trust", "verify", "tamper", "blocks"] {
        assert_eq!(status(name), "pass", "{name}: {security}");
    }
    assert_eq!((status("audit"), status("policy")), ("warn".into(), "warn".into()));
    run_ok(scene.program.command(&["lock"]).arg(scene.program.mountpoint()));
    assert_eq!(codes(), [200, 503, 503, 200]);
    let ready = json("/ready");
    assert_eq!(ready["mounts"][0]["why"], "a model that must serve is locked");
    assert_eq!(json("/health")["mounts"][0]["not_serving"][0], NAME);
    run_ok(scene.program.command(&["unlock"]).arg(scene.program.mountpoint()));
    assert_eq!(codes(), [200; 4]);
    mount.unmount();
    assert!(!door.exists());
}

#[test]
fn the_door_answers_while_the_daemon_answers_no_reader() {
    let Some(scene) = scene() else { return };
    // A store that says nothing: every read hangs until its deadline.
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = listener.local_addr().expect("an address");
    let door = scene.path("door.sock");
    let mut command = scene.program.command(&["mount", "s3://models/prod"]);
    command.arg(scene.program.mountpoint()).args(["--key", &scene.program.key(), "--trust"]);
    command.arg(scene.program.trusted_key()).args(["--s3-endpoint", &format!("http://{address}")]);
    command.args(["--http", &format!("unix:{}", door.display()), "--ready-timeout", "5m"]);
    command.env("AWS_ACCESS_KEY_ID", "a").env("AWS_SECRET_ACCESS_KEY", "b").env("AWS_REGION", "us-east-1");
    let log = File::create(scene.path("hang.log")).expect("log");
    let mut child = command.stdout(Stdio::null()).stderr(log).spawn().expect("runs");
    until("no door while the store is silent", || {
        let ended = child.try_wait().expect("wait");
        assert!(ended.is_none(), "{ended:?}: {}", fs::read_to_string(scene.path("hang.log")).unwrap_or_default());
        UnixStream::connect(&door).is_ok()
    });
    assert_eq!((get(&door, "/live").0, get(&door, "/ready").0), (200, 503));
    assert_eq!(value(&get(&door, "/metrics").1, "modelfs_ready"), 0.0);
    child.kill().expect("killed");
    child.wait().expect("waited");
    drop(listener);
}

// ---- TLS and tokens -------------------------------------------------------------------------------------------------

fn make_certificate(scene: &Scene, name: &str) -> (PathBuf, PathBuf) {
    let (cert, key) = (scene.path(&format!("{name}.crt")), scene.path(&format!("{name}.key")));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]);
    openssl.args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]);
    run_ok(openssl.arg("-keyout").arg(&key).arg("-out").arg(&cert));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("chmod");
    (cert, key)
}

fn write_private(path: &Path, text: &str) {
    fs::write(path, text).expect("write");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("chmod");
}

/// A connection from 127.0.0.1, or from another address of this machine.
fn connect_from(of: u8, port: u16) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind(([127, 0, 0, 1 + of], 0).into()).expect("an address of ours");
        let stream = socket.connect(([127, 0, 0, 1], port).into()).await.expect("connects");
        stream.into_std().expect("a connection")
    })
}

/// curl's answer: the status and what it said; 0 if there was no connection.
fn curl(url: &str, more: &[&str]) -> (u16, String) {
    let mut command = Command::new("curl");
    let output = command.args(["-sS", "-m", "30", "-w", "\n%{http_code}", url]).args(more).output().expect("curl");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, code) = text.rsplit_once('\n').expect("a status");
    (code.parse().expect("a number"), format!("{body}{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn over_the_network_only_tls_and_a_token_are_answered_and_both_change_without_a_restart() {
    let Some(scene) = scene() else { return };
    let (cert, key) = make_certificate(&scene, "door");
    let token = scene.path("token");
    write_private(&token, &format!("{TOKEN}\n"));
    let port = TcpListener::bind("127.0.0.1:0").expect("bound").local_addr().expect("an address").port();
    let at = format!("127.0.0.1:{port}");
    let words = |path: &Path| path.to_str().expect("utf-8").to_owned();
    let options = ["--http", &at, "--http-cert", &words(&cert), "--http-key", &words(&key), "--http-token-file"];
    let options: Vec<&str> = options.into_iter().chain([token.to_str().expect("utf-8")]).collect();
    // What others can read is refused before anything is mounted.
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("chmod");
    let mut refused = scene.program.command(&["mount", scene.program.store()]);
    refused.arg(scene.program.mountpoint()).args(["--key", &scene.program.key(), "--trust"]);
    let refused = refused.arg(scene.program.trusted_key()).args(&options).output().expect("runs");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("door.key"), "{said}");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("chmod");

    let mount = scene.program.mount(&options);
    let (url, ca) = (format!("https://{at}/metrics"), words(&cert));
    let bearer = |token: &str| format!("Authorization: Bearer {token}");
    let with = |token: &str| curl(&url, &["--cacert", &ca, "-H", &bearer(token)]);
    until_ready(|| with(TOKEN).1);
    let (code, text) = with(TOKEN);
    assert!(code == 200 && text.contains("modelfs_ready 1"), "{code} {text}");
    assert_eq!(with("canary-token-of-the-door-0123456788").0, 401);
    assert_eq!(curl(&url, &["--cacert", &ca]).0, 401);
    assert_eq!(curl(&format!("https://{at}/live"), &["--cacert", &ca]).0, 401, "nothing is told without a token");
    assert_eq!(curl(&format!("http://{at}/metrics"), &["-H", &bearer(TOKEN)]).0, 0, "plain HTTP");
    let old = ["--cacert", &ca, "--tls-max", "1.1", "--ciphers", "DEFAULT:@SECLEVEL=0", "-H", &bearer(TOKEN)];
    assert_eq!(curl(&url, &old).0, 0, "TLS 1.1");
    for version in ["--tlsv1.2", "--tlsv1.3"] {
        let tls = [version, "--tls-max", &version[6..], "--cacert", &ca, "-H", &bearer(TOKEN)];
        let answer = curl(&url, &tls);
        assert_eq!(answer.0, 200, "{version}: {}", answer.1);
    }
    // Silence keeps nobody out: neither that of many addresses, nor that of the asker's own.
    let silent: Vec<TcpStream> = (0..8).flat_map(|of| (0..8).map(move |_| connect_from(of, port))).collect();
    let (code, said) = with(TOKEN);
    assert_eq!(code, 200, "{} silent connections: {said}", silent.len());
    drop(silent);
    // Guessing ends in waiting. Several at once: where each takes a second, one after the other is allowed for ever.
    until("wrong tokens are tried without end", || {
        let with = &with;
        std::thread::scope(|scope| {
            let guess = || scope.spawn(move || with("canary-token-of-the-door-0123456788").0);
            let guesses = [guess(), guess(), guess(), guess()];
            guesses.into_iter().map(|one| one.join().expect("curl ends")).max() == Some(429)
        })
    });
    let (_, text) = with(TOKEN);
    assert!(value(&text, "modelfs_http_requests_total{result=\"refused\"}") >= 4.0);
    assert!(
        value(&text, "modelfs_events_total{kind=\"admin\",severity=\"medium\",outcome=\"denied\"}") >= 1.0,
        "a refusal is an event"
    );

    // A second token, then another certificate.
    let second = "canary-token-of-the-door-9876543210";
    write_private(&token, &format!("{TOKEN}\n{second}\n"));
    until("the new token is not taken", || with(second).0 == 200);
    assert_eq!(with(TOKEN).0, 200, "the old one goes on beside it");
    write_private(&token, &format!("{second}\n"));
    until("the old token is still taken", || with(TOKEN).0 == 401);
    assert_eq!(with(second).0, 200);
    let (new_cert, new_key) = make_certificate(&scene, "new");
    fs::rename(&new_cert, &cert).expect("renamed");
    until("half of a new pair does not end the door", || scene.program.log().contains("stay as they were"));
    fs::rename(&new_key, &key).expect("renamed");
    until("the new certificate is not shown", || with(second).0 == 200);

    // Nothing secret is anywhere to be seen.
    let status = scene.status().to_string();
    let metrics = with(second).1;
    let health = curl(&format!("https://{at}/health"), &["--cacert", &ca, "-H", &bearer(second)]).1;
    for (place, text) in
        [("status", &status), ("metrics", &metrics), ("health", &health), ("log", &scene.program.log())]
    {
        assert!(!text.contains("canary-token"), "a token is in the {place}: {text}");
    }
    assert!(status.contains(&format!("https://{at}")), "{status}");
    mount.unmount();
}

// ---- Alerts ---------------------------------------------------------------------------------------------------------

/// Takes requests, answers 200, and hands on their bodies.
fn receiver() -> (String, mpsc::Receiver<Value>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let url = format!("http://{}/services/{HOOK_SECRET}", listener.local_addr().expect("an address"));
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            if let Some(body) = body_of(stream)
                && tell.send(body).is_err()
            {
                return;
            }
        }
    });
    (url, told)
}

fn body_of(mut stream: TcpStream) -> Option<Value> {
    let mut seen = Vec::new();
    let mut piece = [0u8; 4096];
    loop {
        let got = stream.read(&mut piece).ok().filter(|got| *got > 0)?;
        seen.extend_from_slice(&piece[..got]);
        let text = String::from_utf8_lossy(&seen);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let lower = head.to_ascii_lowercase();
        let length: usize = lower.lines().find_map(|line| line.strip_prefix("content-length: "))?.parse().ok()?;
        if body.len() >= length {
            let json = serde_json::from_str(body).ok();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").ok()?;
            let _ = stream.shutdown(Shutdown::Write);
            return json;
        }
    }
}

/// Changes one byte in every large object of the store.
fn spoil(store: &Path) -> usize {
    let mut spoilt = 0;
    let mut folders = vec![store.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder").map_while(Result::ok) {
            let (path, meta) = (entry.path(), entry.metadata().expect("stat"));
            if meta.is_dir() {
                folders.push(path);
            } else if meta.len() > 1 << 20 {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
                let file = File::options().read(true).write(true).open(&path).expect("open");
                let (at, mut byte) = (meta.len() / 2, [0u8]);
                file.read_exact_at(&mut byte, at).expect("read");
                file.write_all_at(&[byte[0] ^ 1], at).expect("write");
                spoilt += 1;
            }
        }
    }
    spoilt
}

#[derive(Default)]
struct Notes(Mutex<Vec<Event>>);

impl Sink for Notes {
    fn take(&self, event: &Event) -> modelfs::error::Result<()> {
        self.0.lock().expect("a test").push(event.clone());
        Ok(())
    }
}

#[test]
fn a_store_that_does_not_answer_is_told_of_once_and_so_is_its_return() {
    if !can_mount() {
        return;
    }
    let files = vec![(FILE.to_owned(), Random::announced("observe").bytes(3 << 20))];
    let style = Style { chunk_log2: 20, pack_below: 1 << 20, ..Style::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let fixture = runtime.block_on(Fixture::seal(files, style, &mut Random(7)));
    let store = Faulty::new((*fixture.store).clone());
    let mount = Mounted::new(How::default(), || {
        let model = fixture.model(Arc::new(store.clone()), Verify::Strict);
        model.vitals.set_store("s3://models/prod");
        model
    });
    let (telemetry, notes) = (mount.cache.telemetry(), Arc::new(Notes::default()));
    telemetry.events.add(notes.clone());
    let of_store = |kind: &Kind| matches!(kind, Kind::StoreDown | Kind::StoreUp);
    let told =
        || -> Vec<Kind> { notes.0.lock().expect("a test").iter().map(|event| event.kind).filter(of_store).collect() };
    store.on(When::call(Call::ReadRange), Fault::Fail(Code::Unreachable));
    let file = File::open(mount.path(FILE)).expect("open");
    let mut piece = [0u8; 100];
    for at in [0, 1 << 20, 2 << 20] {
        assert!(file.read_exact_at(&mut piece, at).is_err());
    }
    assert_eq!(told(), [Kind::StoreDown], "once, however many reads fail");
    assert!(telemetry.stores.is_silent("s3://models/prod"));
    store.heal();
    until("the store is never asked again", || file.read_exact_at(&mut piece, 0).is_ok());
    assert_eq!(told(), [Kind::StoreDown, Kind::StoreUp]);
    assert!(!telemetry.stores.is_silent("s3://models/prod"));
    let events = notes.0.lock().expect("a test");
    let down = events.iter().find(|event| event.kind == Kind::StoreDown).expect("told above");
    assert_eq!(down.subject.store.as_deref(), Some("s3://models/prod"));
    assert_eq!((down.code, down.severity), (Some(Code::Unreachable), Severity::High));
    drop(events);
    drop(file);
    mount.unmount();
}

#[test]
fn a_spoilt_byte_is_counted_fails_the_health_check_and_shows_no_address_of_who_is_told() {
    let Some(scene) = scene() else { return };
    let (url, told) = receiver();
    let hooks = scene.path("hooks");
    write_private(&hooks, &format!("# who is on call\n{url}\n"));
    let mount = scene.program.mount(&["--alert-webhook-file", hooks.to_str().expect("utf-8"), "--open", "lazy"]);
    let socket = scene.usual_socket();
    let metrics = get(&socket, "/metrics").1;
    assert_eq!(value(&metrics, "modelfs_alerts_total{result=\"sent\"}"), 0.0);
    assert!(spoil(Path::new(scene.program.store())) > 0);
    assert!(fs::read(scene.file()).is_err(), "a spoilt chunk is read");
    let metrics = get(&socket, "/metrics").1;
    let tampered = ["hash", "tag", "length"]
        .map(|reason| value(&metrics, &format!("modelfs_tampered_chunks_total{{reason=\"{reason}\"}}")));
    assert!(tampered.iter().sum::<f64>() > 0.0, "{metrics}");
    let (code, security) = get(&socket, "/health/security");
    assert!(code == 503 && security.contains("\"fail\""), "{code} {security}");
    // Asked for once more, and refused.
    for severity in ["high", "critical"] {
        let alert = told.recv_timeout(Duration::from_secs(120)).expect("an alert");
        assert_eq!((&alert["kind"], &alert["severity"]), (&"tamper".into(), &severity.into()), "{alert}");
        assert_eq!(alert["subject"]["model"], NAME, "{alert}");
    }
    let everywhere = [scene.status().to_string(), metrics, security, scene.program.log()];
    assert!(everywhere.iter().all(|text| !text.contains(HOOK_SECRET)), "{everywhere:?}");
    mount.unmount();
    assert!(!scene.program.log().contains(HOOK_SECRET));
}

// ---- Roles ----------------------------------------------------------------------------------------------------------

fn with_roles(scene: &Scene) -> Mount {
    let viewer = format!("uid={VIEWER}");
    let operator = format!("gid={GROUP}");
    let door = format!("unix:{}", scene.path("door.sock").display());
    let roles = ["--control-viewer", &viewer, "--control-operator", &operator, "--http", &door];
    scene.program.mount(&roles)
}

#[test]
fn each_role_may_what_it_may_and_the_kernel_says_who_it_is() {
    let Some(scene) = scene() else { return };
    let binary = for_everybody(&scene);
    let mount = with_roles(&scene);
    let at = scene.program.mountpoint().to_str().expect("utf-8");
    let ask = |uid: u32, groups: &[u32], words: &[&str]| {
        let output = as_user(Command::new(&binary).args(words).arg(at), uid, groups);
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // Looking.
    assert_eq!(ask(VIEWER, &[], &["status"]).0, 0, "{}", ask(VIEWER, &[], &["status"]).1);
    assert_eq!(ask(STRANGER, &[GROUP], &["status"]).0, 0, "an operator looks too");
    let (code, said) = ask(STRANGER, &[], &["status"]);
    assert!(code != 0 && said.contains(&STRANGER.to_string()), "{code} {said}");
    // Listing finds the mount by the mount table, since the folder cannot be listed.
    let listed = as_user(Command::new(&binary).args(["status", "--json"]), VIEWER, &[]);
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let places: Vec<_> = listed["mounts"].as_array().expect("mounts").iter().map(|one| &one["mountpoint"]).collect();
    assert!(places.contains(&&Value::from(at)), "{listed}");
    let listed = as_user(Command::new(&binary).args(["status", "--json"]), STRANGER, &[]);
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    assert!(!listed.to_string().contains(at), "a stranger is told of no mount: {listed}");
    // Orders.
    let (code, said) = ask(VIEWER, &[], &["lock"]);
    assert!(code != 0 && said.contains("viewer"), "{code} {said}");
    assert!(fs::read(scene.file()).is_ok(), "it was locked all the same");
    assert_eq!(ask(STRANGER, &[GROUP], &["lock"]).0, 0, "an operator by a supplementary group");
    assert!(fs::read(scene.file()).is_err());
    assert_eq!(ask(STRANGER, &[1, GROUP, 2], &["unlock"]).0, 0);
    assert!(fs::read(scene.file()).is_ok());
    let (code, said) = ask(STRANGER, &[GROUP], &["umount"]);
    assert!(code != 0 && said.contains("operator"), "{code} {said}");
    assert!(program::is_mountpoint(scene.program.mountpoint()));
    // Each order is an event, allowed or not; the door knows the same roles.
    let metrics = get(&scene.path("door.sock"), "/metrics").1;
    let admin = |severity: &str, outcome: &str| {
        value(
            &metrics,
            &format!("modelfs_events_total{{kind=\"admin\",severity=\"{severity}\",outcome=\"{outcome}\"}}"),
        )
    };
    assert!(admin("low", "allowed") >= 2.0 && admin("medium", "denied") >= 3.0, "{metrics}");
    let curl = |uid: u32| {
        let door = scene.path("door.sock");
        let mut curl = Command::new("curl");
        curl.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket"]).arg(door).arg("http://x/ready");
        String::from_utf8_lossy(&as_user(&mut curl, uid, &[]).stdout).into_owned()
    };
    assert_eq!((curl(VIEWER).as_str(), curl(STRANGER).as_str()), ("200", "403"));
    mount.unmount();
}

#[test]
fn without_roles_nobody_else_gets_to_the_socket() {
    let Some(scene) = scene() else { return };
    let binary = for_everybody(&scene);
    let mount = scene.program.mount(&[]);
    let at = scene.program.mountpoint();
    let output = as_user(Command::new(&binary).args(["status"]).arg(at), STRANGER, &[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("no modelfs mount"), "{said}");
    let mode = fs::metadata(scene.usual_socket()).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    mount.unmount();
}
