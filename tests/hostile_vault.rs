//! Answers that a healthy Vault never gives: each ends in the code and the message that name the cause, in bounded time and
//! memory, and nothing that was told to the server comes back in a message. THREATS f 40 and 41. At the end, lives of tokens
//! that a healthy Vault gives seldom.

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::hostile::{Hostile, Request, head, respond};
use modelfs::error::{Class, Code, Error};
use modelfs::mem::Secret;
use modelfs::store::LeasedCredentials;
use modelfs::telemetry::Telemetry;
use modelfs::vault::{AuthMethod, AwsRole, TransitKey, Vault, VaultSettings};
use object_store::CredentialProvider;
use serde_json::{Value, json};

const TOKEN: &str = "canary-token-0123456789";
/// For an answer that comes: what is asserted is what it says, also of a machine that stands still for seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// For one that does not come, or that is asked for again until this is over.
const TIMEOUT: Duration = Duration::from_secs(2);
/// A call that should end after `TIMEOUT` may take this long on a busy machine; one without a bound takes forever.
const BOUND: Duration = Duration::from_secs(120);
/// One answer and the whole call have a clock each; what is said when it has run out, and what to do, is the same words.
const CLOCKS: [&str; 2] = ["no answer in time", "did not answer within"];
const SLOW_CURE: &str = "look at Vault, or raise vault-timeout";
const STRANGER_CURE: &str = "is vault-addr Vault's own address?";
const BROKEN_CURE: &str = "is Vault up, is vault-addr its address";

const JSON: &[(&str, &str)] = &[("Content-Type", "application/json")];

/// An answer as Vault makes it, with this data.
fn answer(data: Value) -> String {
    let whole = json!({
        "request_id": "r", "lease_id": "", "renewable": false, "lease_duration": 0, "data": data, "wrap_info": null,
        "warnings": null, "auth": null,
    });
    whole.to_string()
}

fn lookup() -> String {
    answer(json!({ "ttl": 3600, "renewable": false, "expire_time": "2099-01-01T00:00:00Z" }))
}

/// A client whose token is good and whose every other question is answered by `lie`.
struct Liar {
    server: Hostile,
    vault: Vault,
    _dir: tempfile::TempDir,
}

fn settings(address: &str, dir: &tempfile::TempDir) -> VaultSettings {
    let file = dir.path().join("token");
    let mut options = std::fs::OpenOptions::new();
    let opened = options.create(true).write(true).truncate(true).mode(0o600).open(&file);
    opened.expect("our folder").write_all(TOKEN.as_bytes()).expect("written");
    VaultSettings {
        address: address.to_owned(),
        namespace: None,
        ca_cert: None,
        client_cert: None,
        client_key: None,
        auth: AuthMethod::Token { file: Some(file) },
        timeout: PATIENCE,
        check: Duration::from_secs(600),
        lock_on_loss: false,
    }
}

impl Liar {
    fn new(lie: impl Fn(&Request, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> Liar {
        Liar::within(PATIENCE, lie)
    }

    fn within(
        timeout: Duration,
        lie: impl Fn(&Request, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Liar {
        let server = Hostile::start(move |request: &Request, stream: &mut TcpStream| {
            match request.target.ends_with("/auth/token/lookup-self") {
                true => respond(stream, "200 OK", JSON, lookup().as_bytes()),
                false => lie(request, stream),
            }
        });
        let dir = tempfile::tempdir().expect("a folder");
        let vault = Vault::open(&VaultSettings { timeout, ..settings(&server.endpoint(), &dir) }).expect("usable");
        Liar { server, vault, _dir: dir }
    }

    fn saying(status: &'static str, headers: &'static [(&str, &str)], body: impl Into<Vec<u8>>) -> Liar {
        let body = body.into();
        Liar::new(move |_, stream| respond(stream, status, headers, &body))
    }

    /// What is said of an outage that answers like this: it is asked again until the time is over. A machine that stands
    /// still for all of a short time gets no answer at all; then the next one is longer.
    fn outage(status: &'static str, body: &'static str) -> Error {
        Liar::outage_by(move |stream| respond(stream, status, JSON, body.as_bytes()))
    }

    fn outage_by(answer: impl Fn(&mut TcpStream) -> std::io::Result<()> + Copy + Send + Sync + 'static) -> Error {
        for timeout in [TIMEOUT, TIMEOUT * 10, BOUND] {
            let server = Liar::within(timeout, move |_, stream| answer(stream));
            let error = server.unwrap_key();
            if timeout == BOUND || !CLOCKS.iter().any(|words| error.chain().contains(words)) {
                return error;
            }
        }
        unreachable!("the last one is answered with")
    }

    /// Of an outage: it is asked again until the time is over.
    fn down(status: &'static str, headers: &'static [(&str, &str)], body: impl Into<Vec<u8>>) -> Liar {
        let body = body.into();
        Liar::within(TIMEOUT, move |_, stream| respond(stream, status, headers, &body))
    }

    fn unwrap_key(&self) -> Error {
        let start = Instant::now();
        let answer = self.vault.transit_unwrap(&at(), &[7; 32], "vault:v1:AAAA");
        assert!(start.elapsed() < BOUND * 2, "{:?}", start.elapsed());
        let Err(error) = answer else { panic!("a lie was believed") };
        let chain = error.chain();
        assert!(!chain.contains("canary") && !chain.contains('\n') && chain.len() < 1000, "{chain}");
        error
    }
}

fn at() -> TransitKey {
    TransitKey { mount: "transit".into(), key: "models".into() }
}

fn says(error: &Error, code: Code, words: &[&str]) {
    let chain = error.chain();
    assert_eq!(error.code(), code, "{chain}");
    for word in words {
        assert!(chain.contains(word), "{word:?} is not in: {chain}");
    }
}

/// That these tests can fail: the same client believes an answer that is right.
#[test]
fn an_honest_answer_is_believed() {
    let body = answer(json!({ "plaintext": STANDARD.encode([9; 32]) }));
    let honest = Liar::saying("200 OK", JSON, body);
    let key: Secret<32> = honest.vault.transit_unwrap(&at(), &[7; 32], "vault:v1:AAAA").expect("a key");
    assert!(key.ct_eq(&[9; 32]));
    let request = honest.server.requests().pop().expect("asked");
    assert_eq!(request.target, "/v1/transit/decrypt/models");
    assert_eq!(request.header("x-vault-token"), Some(TOKEN));
}

#[test]
fn a_refusal_is_named_with_its_cause_and_what_to_do() {
    for (status, body, code, words) in [
        ("503 x", r#"{"errors":["Vault is sealed"]}"#, Code::VaultSealed, &["is sealed", "unseal it"][..]),
        ("501 x", r#"{"errors":["not initialized"]}"#, Code::VaultSealed, &["not initialised", "initialise it"]),
        ("403 x", r#"{"errors":["permission denied"]}"#, Code::VaultDenied, &["transit/decrypt/models", "policy"]),
        (
            "404 x",
            r#"{"errors":["no handler for route"]}"#,
            Code::VaultNotFound,
            &["no handler for route", "are mount and name right?"],
        ),
        ("400 x", r#"{"errors":["cipher: message authentication failed"]}"#, Code::SlotCommit, &["not wrapped"]),
        ("429 x", r#"{"errors":["too many"]}"#, Code::VaultUnreachable, &["429", "look at its log"]),
        ("473 x", r#"{"errors":[]}"#, Code::VaultUnreachable, &["473", "look at its log"]),
        (
            "500 x",
            r#"{"errors":["internal error"]}"#,
            Code::VaultUnreachable,
            &["500", "look at its log", "internal error"],
        ),
        (
            "502 x",
            "<html>bad gateway</html>",
            Code::VaultUnreachable,
            &["between us and Vault", "502", "is Vault behind it up?"],
        ),
        ("503 x", "<html>no healthy upstream</html>", Code::VaultUnreachable, &["between us and Vault", "503"]),
        ("504 x", "", Code::VaultUnreachable, &["between us and Vault", "504"]),
        ("500 x", "<html>whose?</html>", Code::VaultAnswer, &["is this address Vault's?"]),
        ("403 x", "<html>proxy</html>", Code::VaultAnswer, &["not Vault's"]),
    ] {
        let error = match code {
            Code::VaultUnreachable => Liar::outage(status, body),
            _ => Liar::saying(status, JSON, body).unwrap_key(),
        };
        says(&error, code, words);
    }
}

/// An outage, not an attack: it is asked again, and a state says so meanwhile.
#[test]
fn a_gateway_whose_vault_is_away_is_asked_again_and_told_as_an_outage() {
    let left = AtomicU64::new(2);
    let gateway = Liar::new(move |_, stream| {
        match left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => respond(stream, "503 x", &[("Content-Type", "text/html")], b"<html>no healthy upstream</html>"),
            Err(_) => {
                let body = answer(json!({ "plaintext": STANDARD.encode([9; 32]) }));
                respond(stream, "200 OK", JSON, body.as_bytes())
            }
        }
    });
    let mut states = gateway.vault.watch();
    let key = gateway.vault.transit_unwrap(&at(), &[7; 32], "vault:v1:AAAA").expect("the third time");
    assert!(key.ct_eq(&[9; 32]));
    assert_eq!(states.borrow_and_update().name(), "live");

    let down = Liar::down("504 x", &[("Content-Type", "text/html")], "<html></html>");
    assert_eq!(down.unwrap_key().class(), Class::Unreachable);
    assert_eq!(down.vault.state().name(), "away");
}

#[test]
fn a_key_of_another_length_or_no_base64_is_refused() {
    for text in [
        STANDARD.encode([1; 31]),
        STANDARD.encode([1; 33]),
        STANDARD.encode([1; 4096]),
        "canary, no base64".to_owned(),
        "\u{e9}\u{0}".to_owned(),
        String::new(),
    ] {
        let body = answer(json!({ "plaintext": text }));
        let refused = Liar::saying("200 OK", JSON, body).unwrap_key();
        says(&refused, Code::KeyFormat, &["not 32 bytes in base64", "was it wrapped by modelfs?"]);
    }
}

#[test]
fn an_answer_of_another_shape_is_none_of_vaults() {
    let deep = "[".repeat(200_000);
    for body in [
        "<html><body>Welcome to the canary portal</body></html>",
        &answer(json!({ "plaintext": 7 })),
        &answer(json!("canary")),
        r#"{"data":{"plaintext":"canary"}"#,
        "[]",
        "\"canary\"",
        "\u{0}\u{0}",
        &deep,
    ] {
        let refused = Liar::saying("200 OK", JSON, body).unwrap_key();
        says(&refused, Code::VaultAnswer, &["has not the shape it should", STRANGER_CURE]);
    }
    for body in ["{}", "null", "", &answer(Value::Null)] {
        let code = Liar::saying("200 OK", JSON, body).unwrap_key().code();
        assert!(matches!(code, Code::VaultAnswer | Code::KeyFormat), "{body}: {code:?}");
    }
    let wrapped = Liar::saying("200 OK", JSON, answer(json!({ "ciphertext": "not wrapped" })));
    let key = Secret::from_bytes(&mut [1; 32]);
    says(&wrapped.vault.transit_wrap(&at(), &[7; 32], &key).expect_err("a lie"), Code::VaultAnswer, &["vault:vN"]);
    says(&wrapped.vault.transit_sign(&at(), b"m").expect_err("a lie"), Code::VaultAnswer, &[]);
    says(&wrapped.vault.transit_public_key(&at()).expect_err("a lie"), Code::VaultAnswer, &[]);
    says(&wrapped.vault.kv_read("secret", "a", None).expect_err("a lie"), Code::VaultAnswer, &[]);
    says(&wrapped.vault.kv_list("secret", "a").expect_err("a lie"), Code::VaultAnswer, &[]);
}

const TEN_YEARS_S: u64 = 10 * 365 * 24 * 3600;

/// A clock cannot be advanced by it, and the thread that replaces them must live.
#[tokio::test(flavor = "multi_thread")]
async fn storage_credentials_that_claim_to_last_for_ever_are_used_like_others() {
    let keys = json!({ "access_key": "AK1", "secret_key": "canary", "security_token": "canary", "ttl": u64::MAX });
    let liar = Liar::saying("200 OK", JSON, answer(keys));
    let issuer = AwsRole::new(liar.vault.clone(), "aws", "models");
    let credentials = LeasedCredentials::new(Box::new(issuer), Arc::new(Telemetry::default()));

    let got = tokio::time::timeout(BOUND, credentials.get_credential()).await.expect("in bounded time");

    assert_eq!(got.expect("credentials").key_id, "AK1");
    assert!(credentials.status().ends_in_seconds.is_some_and(|ends| ends <= TEN_YEARS_S), "{:?}", credentials.status());
}

/// Whoever believes that it never ends would never see that it was taken away.
#[test]
fn a_token_that_claims_to_last_for_ever_is_watched_like_others() {
    let gone = Arc::new(AtomicBool::new(false));
    let revoked = gone.clone();
    let server = Hostile::start(move |_: &Request, stream: &mut TcpStream| {
        if revoked.load(Ordering::SeqCst) {
            return respond(stream, "403 Forbidden", JSON, br#"{"errors":["permission denied"]}"#);
        }
        let data = json!({ "ttl": u64::MAX, "renewable": true, "expire_time": "2999-01-01T00:00:00Z" });
        respond(stream, "200 OK", JSON, answer(data).as_bytes())
    });
    let dir = tempfile::tempdir().expect("a folder");
    let often = VaultSettings { check: Duration::from_millis(50), ..settings(&server.endpoint(), &dir) };
    let vault = Vault::open(&often).expect("usable");
    vault.login().expect("a token");
    assert!(
        vault.status()["token_seconds_left"].as_u64().is_some_and(|left| left <= TEN_YEARS_S),
        "{}",
        vault.status()
    );

    gone.store(true, Ordering::SeqCst);

    let start = Instant::now();
    while !vault.state().is_lost() {
        assert!(start.elapsed() < BOUND, "nobody looked: {}", vault.status());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_redirect_is_not_followed_and_its_target_never_sees_the_token() {
    let target =
        Hostile::start(|_: &Request, stream: &mut TcpStream| respond(stream, "200 OK", JSON, lookup().as_bytes()));
    for status in ["301 x", "302 x", "307 x", "308 x"] {
        let location = format!("{}/v1/transit/decrypt/models", target.endpoint());
        let liar = Liar::new(move |_, stream| respond(stream, status, &[("Location", &location)], b""));
        says(&liar.unwrap_key(), Code::VaultAnswer, &["redirects", "not followed"]);
    }
    assert!(target.requests().is_empty());
}

/// Where a process of its own finds the server that it is to ask, so that what it needs for that is told from what other tests
/// need.
const ASKS: &str = "MODELFS_TEST_ASKS";
/// One answer of a mebibyte, its larger place, and what libraries hold of a connection.
const GROWS_MAX_KIB: u64 = 16 << 10;

/// The most memory that this process ever had.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("our own");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches("kB").trim().parse().expect("a number")
}

fn asks_in_its_own_process(address: &str) {
    let dir = tempfile::tempdir().expect("a folder");
    let vault = Vault::open(&settings(address, &dir)).expect("usable");
    // What every question costs is paid before.
    vault.login().expect("the token is good");
    let before = peak_kib();
    let refused = vault.transit_unwrap(&at(), &[7; 32], "vault:v1:AAAA").map(drop).expect_err("a lie");
    says(&refused, Code::VaultAnswer, &["more than 1048576 bytes", STRANGER_CURE]);
    let grown = peak_kib() - before;
    assert!(grown < GROWS_MAX_KIB, "{grown} KiB for an answer that is cut off");
}

#[test]
fn an_endless_body_is_cut_off_after_a_mebibyte() {
    if let Ok(address) = std::env::var(ASKS) {
        return asks_in_its_own_process(&address);
    }
    for announced in [None, Some(10_000_000_000)] {
        let sent = Arc::new(AtomicU64::new(0));
        let counted = sent.clone();
        let liar = Liar::new(move |_, stream| {
            head(stream, "200 OK", JSON, announced)?;
            let block = [b' '; 64 << 10];
            // Ends with an error when the client has had enough.
            for _ in 0..10_000_000_000u64 / block.len() as u64 {
                stream.write_all(&block)?;
                counted.fetch_add(block.len() as u64, Ordering::SeqCst);
            }
            Ok(())
        });
        let mut child = std::process::Command::new(std::env::current_exe().expect("this test"));
        child.args(["an_endless_body_is_cut_off_after_a_mebibyte", "--exact", "--nocapture"]);
        let output = child.env(ASKS, liar.server.endpoint()).output().expect("started");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        // What was not read lies in the sockets' buffers, which the kernel bounds.
        let sent = sent.load(Ordering::SeqCst);
        assert!(sent < 64 << 20, "{sent} bytes were taken");
    }
}

#[test]
fn an_answer_that_comes_a_byte_at_a_time_or_never_ends_with_the_timeout() {
    let slow = Liar::within(TIMEOUT, |_, stream| {
        head(stream, "200 OK", JSON, Some(1000))?;
        for _ in 0..1000 {
            stream.write_all(b" ")?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    });
    let refused = slow.unwrap_key();
    // Both end at the same moment.
    assert!(CLOCKS.iter().any(|words| refused.chain().contains(words)), "{}", refused.chain());
    says(&refused, Code::VaultUnreachable, &[SLOW_CURE]);
    let silent = Liar::within(TIMEOUT, |_, stream| {
        // Until the client hangs up.
        let _ = std::io::Read::read(stream, &mut [0]);
        Ok(())
    });
    says(&silent.unwrap_key(), Code::VaultUnreachable, &[SLOW_CURE]);
    assert_eq!(slow.vault.state().name(), "away");
}

#[test]
fn an_answer_that_is_cut_short_or_is_no_http_is_told_as_a_broken_connection_with_what_to_look_at() {
    let cut: fn(&mut TcpStream) -> std::io::Result<()> = |stream| head(stream, "200 OK", JSON, Some(1000));
    let nonsense: fn(&mut TcpStream) -> std::io::Result<()> = |stream| stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n");
    for answer in [cut, nonsense] {
        let refused = Liar::outage_by(answer);
        says(&refused, Code::VaultUnreachable, &["the connection failed", BROKEN_CURE]);
    }
}

#[test]
fn what_the_server_was_told_comes_back_in_no_message() {
    let echo = Liar::new(|request, stream| {
        let told = request.header("x-vault-token").unwrap_or_default();
        let body = String::from_utf8_lossy(&request.body).into_owned();
        let said = format!("bad\r\n\u{1b}[31mtoken {told} in {body} {}", "x".repeat(100_000));
        respond(stream, "400 Bad Request", JSON, json!({ "errors": [said] }).to_string().as_bytes())
    });
    says(&echo.unwrap_key(), Code::VaultDenied, &["token [masked] in"]);
    let plain = STANDARD.encode([0x5a; 32]);
    let key = Secret::from_bytes(&mut [0x5a; 32]);
    let error = echo.vault.transit_wrap(&at(), &[7; 32], &key).expect_err("refused");
    assert!(!error.chain().contains(&plain) && !format!("{error:?}").contains(&plain), "{}", error.chain());
    assert!(!format!("{error:?} {:?} {:?}", echo.vault, echo.vault.state()).contains("canary"));
}

#[test]
fn a_login_that_echoes_the_password_is_not_repeated() {
    let server = Hostile::start(|request: &Request, stream: &mut TcpStream| {
        let body = String::from_utf8_lossy(&request.body).into_owned();
        let said = json!({ "errors": [format!("no such login: {body}")] });
        respond(stream, "400 Bad Request", JSON, said.to_string().as_bytes())
    });
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("password");
    std::fs::write(&file, "canary-password").expect("written");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    let auth = AuthMethod::Userpass { mount: "userpass".into(), username: "ann".into(), password_file: Some(file) };
    let vault = Vault::open(&VaultSettings { auth, ..settings(&server.endpoint(), &dir) }).expect("usable");
    let error = vault.login().expect_err("refused");
    says(&error, Code::VaultDenied, &["auth/userpass/login/ann", "[masked]"]);
    assert!(!error.chain().contains("canary"));
}

/// As Vault 1.13.0 answers. Taken for an outage it would be tried again until Vault locks the user out.
#[test]
fn a_wrong_password_is_a_refusal_and_not_tried_again_where_vault_calls_it_its_own_fault() {
    let body = br#"{"errors":["invalid username or password"]}"#;
    let server = Hostile::start(|_: &Request, stream: &mut TcpStream| respond(stream, "500 x", JSON, body));
    let dir = tempfile::tempdir().expect("a folder");
    let plain = settings(&server.endpoint(), &dir);
    let AuthMethod::Token { file } = &plain.auth else { unreachable!("as made above") };
    let auth = AuthMethod::Userpass { mount: "userpass".into(), username: "ann".into(), password_file: file.clone() };
    let vault = Vault::open(&VaultSettings { auth, ..plain }).expect("usable");
    says(&vault.login().expect_err("refused"), Code::VaultDenied, &["the user or the password is wrong"]);
    assert_eq!(server.requests().len(), 1);
}

/// The same of a client certificate: nothing that time would mend.
#[test]
fn an_expired_client_certificate_is_a_refusal_and_not_tried_again_where_vault_calls_it_its_own_fault() {
    let body = br#"{"errors":["failed to verify client's certificate: x509: certificate has expired"]}"#;
    let server = Hostile::start(|_: &Request, stream: &mut TcpStream| respond(stream, "500 x", JSON, body));
    let dir = tempfile::tempdir().expect("a folder");
    let auth = AuthMethod::Cert { mount: "cert".into(), role: None };
    let vault = Vault::open(&VaultSettings { auth, ..settings(&server.endpoint(), &dir) }).expect("usable");
    says(&vault.login().expect_err("refused"), Code::VaultDenied, &["the client certificate is expired"]);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_login_without_a_token_in_its_answer_is_none() {
    for body in [answer(Value::Null), answer(json!({ "client_token": "not here" }))] {
        let server =
            Hostile::start(move |_: &Request, stream: &mut TcpStream| respond(stream, "200 OK", JSON, body.as_bytes()));
        let dir = tempfile::tempdir().expect("a folder");
        let auth = AuthMethod::Cert { mount: "cert".into(), role: None };
        let vault = Vault::open(&VaultSettings { auth, ..settings(&server.endpoint(), &dir) }).expect("usable");
        says(&vault.login().expect_err("no token"), Code::VaultAnswer, &["holds no token"]);
    }
}

#[test]
fn nobody_listening_is_said_within_the_timeout() {
    let dir = tempfile::tempdir().expect("a folder");
    // Bound, so that nobody else listens there meanwhile, and not listening.
    let held = tokio::net::TcpSocket::new_v4().expect("a socket");
    held.bind(([127, 0, 0, 1], 0).into()).expect("a free port");
    let address = format!("http://{}", held.local_addr().expect("it is bound"));
    let vault = Vault::open(&VaultSettings { timeout: TIMEOUT, ..settings(&address, &dir) }).expect("usable");
    let start = Instant::now();
    says(&vault.login().expect_err("nobody"), Code::VaultUnreachable, &["Vault at http://127.0.0.1"]);
    assert!(start.elapsed() < BOUND);
    assert_eq!(vault.state().name(), "away");
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < BOUND, "{what}: not within {BOUND:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A token that was given to us and can only be looked at: late in its life too an outage ends when Vault answers again.
#[test]
fn an_outage_ends_for_a_token_that_is_near_its_end_and_cannot_be_renewed() {
    for (status, body, state) in [("503 x", "<html>", "away"), ("503 x", r#"{"errors":["Vault is sealed"]}"#, "sealed")]
    {
        let down = Arc::new(AtomicBool::new(false));
        let is_down = down.clone();
        let server = Hostile::start(move |_: &Request, stream: &mut TcpStream| {
            if is_down.load(Ordering::SeqCst) {
                return respond(stream, status, JSON, body.as_bytes());
            }
            let data = json!({ "ttl": 1, "renewable": false, "expire_time": "2099-01-01T00:00:00Z" });
            respond(stream, "200 OK", JSON, answer(data).as_bytes())
        });
        let dir = tempfile::tempdir().expect("a folder");
        let often = VaultSettings { check: Duration::from_millis(50), ..settings(&server.endpoint(), &dir) };
        let vault = Vault::open(&often).expect("usable");
        vault.login().expect("a token");
        let start = Instant::now();
        until("it is near its end", || start.elapsed() > Duration::from_millis(1100));
        down.store(true, Ordering::SeqCst);
        until(state, || vault.state().name() == state);
        down.store(false, Ordering::SeqCst);
        // Nothing is asked here that would tell: the background has to.
        until("it is live again", || vault.state().name() == "live");
    }
}

/// A Vault that ann logs in to. What a login and what a renewal last is told by a test, in seconds; `None`: not renewable.
struct Lender {
    vault: Vault,
    /// Logins so far.
    logins: Arc<AtomicU64>,
    /// Tokens that were ended, by the number of their login.
    ended: Arc<Mutex<Vec<u64>>>,
    _server: Hostile,
    _dir: tempfile::TempDir,
}

impl Lender {
    fn new(lasts: impl Fn(u64) -> u64 + Send + Sync + 'static, renewed: Option<u64>) -> Lender {
        let (logins, ended) = (Arc::new(AtomicU64::new(0)), Arc::<Mutex<Vec<u64>>>::default());
        let (counted, noted) = (logins.clone(), ended.clone());
        let server = Hostile::start(move |request: &Request, stream: &mut TcpStream| {
            let auth = |login: u64, lasts: u64| {
                json!({
                    "client_token": format!("canary-{login}"), "accessor": "a", "policies": [], "token_policies": [],
                    "metadata": null, "lease_duration": lasts, "renewable": renewed.is_some(), "entity_id": "",
                    "token_type": "service", "orphan": true,
                })
            };
            let token = request.header("x-vault-token").and_then(|token| token.strip_prefix("canary-")?.parse().ok());
            let answer_auth = |auth: Value| {
                let mut whole: Value = serde_json::from_str(&answer(Value::Null)).expect("as made above");
                whole["auth"] = auth;
                whole.to_string()
            };
            let body = match (request.target.as_str(), token) {
                ("/v1/auth/userpass/login/ann", _) => {
                    let login = counted.fetch_add(1, Ordering::SeqCst) + 1;
                    answer_auth(auth(login, lasts(login)))
                }
                ("/v1/auth/token/renew-self", Some(login)) => answer_auth(auth(login, renewed.unwrap_or(0))),
                ("/v1/auth/token/revoke-self", Some(login)) => {
                    noted.lock().expect("no panic under the lock").push(login);
                    return respond(stream, "204 No Content", &[], b"");
                }
                _ => lookup(),
            };
            respond(stream, "200 OK", JSON, body.as_bytes())
        });
        let dir = tempfile::tempdir().expect("a folder");
        let plain = settings(&server.endpoint(), &dir);
        let AuthMethod::Token { file } = &plain.auth else { unreachable!("as made above") };
        let auth =
            AuthMethod::Userpass { mount: "userpass".into(), username: "ann".into(), password_file: file.clone() };
        let often = VaultSettings { auth, check: Duration::from_millis(50), ..plain };
        let vault = Vault::open(&often).expect("usable");
        vault.login().expect("a token");
        Lender { vault, logins, ended, _server: server, _dir: dir }
    }

    fn logins(&self) -> u64 {
        self.logins.load(Ordering::SeqCst)
    }
}

/// A login beside a token that still serves cannot be called back: what it brings is not to outlive the end.
#[test]
fn a_token_whose_login_was_under_way_at_the_end_is_given_back_like_the_one_it_replaces() {
    let (open, gate) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (opened, waits) = (open.clone(), gate.clone());
    // The second login is answered when the test says so. Its first token is of a time that is over soon.
    let lender = Lender::new(
        move |login| {
            while login == 2 && !opened.load(Ordering::SeqCst) {
                waits.store(true, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(10));
            }
            if login == 1 { 3 } else { 3600 }
        },
        None,
    );
    until("the second login is under way", || gate.load(Ordering::SeqCst));
    let vault = lender.vault.clone();
    let end = std::thread::spawn(move || vault.revoke_self());
    // From here on nobody uses the first one.
    until("the end has begun", || lender.vault.state().name() == "idle");
    open.store(true, Ordering::SeqCst);
    // The first may have come to its own end on a machine that stood still, and is refused then.
    let _ = end.join().expect("no panic");
    assert!(lender.ended.lock().expect("a test").contains(&2), "the second token lives on");
    assert_eq!((lender.logins(), lender.vault.state().name()), (2, "idle"));
}

/// In a token's last second a renewal gives 0, which of a login says that it never ends.
#[test]
fn a_token_whose_renewal_gives_nothing_more_is_replaced_by_a_login() {
    let lender = Lender::new(|_| 3, Some(0));
    until("there is another token", || lender.logins() >= 2);
    assert!(lender.vault.status()["token_seconds_left"].is_u64(), "{}", lender.vault.status());
}

/// What was lent under a token lives as long as it does: what is left of one that a login has replaced ends with ours.
#[test]
fn a_token_that_was_replaced_and_still_holds_is_ended_with_its_successor() {
    // On a machine that stands still for long enough the second is over as well, which proves nothing: once more with a
    // longer one.
    for second in [10, 30, 120] {
        let start = Instant::now();
        // The first is over when the second is replaced, at 60 % of its time or a little later.
        let lender = Lender::new(move |login| [1, second, 3600][login.min(3) as usize - 1], None);
        until("the third token", || lender.logins() == 3);
        // The client knows of it too.
        until("it is ours", || lender.vault.status()["token_seconds_left"].as_u64() > Some(second));
        assert!(lender.ended.lock().expect("a test").is_empty(), "what was lent under them may be in use");
        assert!(lender.vault.revoke_self().expect("ended"));
        let ended = lender.ended.lock().expect("a test").clone();
        if start.elapsed() < Duration::from_secs(second) || second == 120 {
            assert_eq!(ended, [3, 2]);
            return;
        }
    }
}

#[test]
fn an_answer_without_data_names_the_mount_that_may_be_of_another_kind() {
    let empty = Liar::saying("200 OK", JSON, answer(Value::Null));
    let error = empty.vault.kv_read("secret", "a/b", None).expect_err("no record");
    says(&error, Code::VaultAnswer, &["cannot read secret/a/b", "is secret a KV v2 mount?"]);
}
