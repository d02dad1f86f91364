//! The Vault client against HashiCorp Vault itself.
//!
//! What is real: Vault 1.13.0, its policies, tokens, engines and auth methods; the certificates; the seal. What is not: the
//! API server behind the Kubernetes method and STS behind the AWS method are small fakes that answer what Vault asks them
//! (and check what they are asked); the JWT is signed here.

mod common;
#[path = "common/iam.rs"]
mod iam;
#[path = "common/jwt.rs"]
mod jwt;

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::hostile::{Hostile, Request, respond};
use common::vault::VaultServer;
use jwt::{Signer, now};
use modelfs::error::{Code, Error};
use modelfs::mem::Secret;
use modelfs::store::IssueCredentials;
use modelfs::telemetry::Telemetry;
use modelfs::telemetry::events::{Event, Kind, Severity, Sink};
use modelfs::vault::{AuthMethod, AwsRole, TransitKey, Vault, VaultSettings, VaultState};
use serde_json::{Map, Value, json};

/// Vault answers in milliseconds; this is for a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(120);
/// One answer and a whole call have a clock each; what is said when it has run out.
const CLOCKS: [&str; 2] = ["no answer in time", "did not answer within"];

macro_rules! server {
    () => {
        match VaultServer::shared() {
            Some(server) => server,
            None => return,
        }
    };
}

fn logs_in(settings: &VaultSettings) -> Vault {
    let vault = Vault::open(settings).expect("settings that can be used");
    vault.login().unwrap_or_else(|error| panic!("{}", error.chain()));
    assert_eq!(vault.state().name(), "live");
    vault
}

/// What the login says, which must hold all of `words`.
fn refused(settings: &VaultSettings, code: Code, words: &[&str]) {
    let vault = Vault::open(settings).expect("settings that can be used");
    let error = vault.login().expect_err("refused");
    says(&error, code, words);
}

fn says(error: &Error, code: Code, words: &[&str]) {
    let chain = error.chain();
    assert_eq!(error.code(), code, "{chain}");
    for word in words {
        assert!(chain.contains(word), "{word:?} is not in: {chain}");
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn token_file(server: &VaultServer, name: &str, text: &str) -> AuthMethod {
    AuthMethod::Token { file: Some(server.secret_file(name, text)) }
}

fn root(server: &VaultServer) -> Vault {
    logs_in(&server.settings(token_file(server, "root", VaultServer::ROOT)))
}

fn approle(server: &VaultServer, mount: &str, role_id: &str, secret: &str, wrapped: bool) -> AuthMethod {
    AuthMethod::AppRole {
        mount: mount.into(),
        role_id: role_id.into(),
        secret_id_file: Some(server.secret_file(&format!("{mount}.secret-id"), secret)),
        wrapped,
    }
}

// ---- logging in ----------------------------------------------------------------------------------------------------

#[test]
fn a_token_comes_from_a_private_file_and_a_wrong_or_expired_one_is_refused_by_name() {
    let server = server!();
    logs_in(&server.settings(token_file(server, "good", &format!("{}\n", VaultServer::ROOT))));
    let lookup = ["cannot look up the Vault token", "auth/token/lookup-self", "the token is wrong, revoked or expired"];
    refused(&server.settings(token_file(server, "wrong", "hvs.nobody-gave-this-out")), Code::VaultDenied, &lookup);
    let short = server.token(json!({ "ttl": "1s" }));
    let settings = server.settings(token_file(server, "short", &short));
    let denied = |error: Error| error.code() == Code::VaultDenied;
    until("the token ends", || Vault::open(&settings).expect("usable").login().is_err_and(denied));
    refused(&settings, Code::VaultDenied, &lookup);
    let open = server.secret_file("open", VaultServer::ROOT);
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&open, mode).expect("chmod");
    refused(&server.settings(AuthMethod::Token { file: Some(open) }), Code::KeyPerms, &["open", "0644"]);
    refused(&server.settings(token_file(server, "empty", "\n")), Code::KeyFormat, &["is empty"]);
}

#[test]
fn an_approle_logs_in_by_a_file_and_a_wrong_or_used_up_secret_id_is_named() {
    let server = server!();
    let role_id = server.approle("ar-file", json!({ "secret_id_num_uses": 1 }));
    let secret = server.secret_id("ar-file");
    let settings = server.settings(approle(server, "ar-file", &role_id, &secret, false));
    logs_in(&settings);
    refused(&settings, Code::VaultDenied, &["by approle", "auth/ar-file/login", "secret-id is wrong, used up"]);
    let wrong = approle(server, "ar-file", &role_id, "00000000-0000-0000-0000-000000000000", false);
    refused(&server.settings(wrong), Code::VaultDenied, &["secret-id is wrong, used up"]);
    let stranger = approle(server, "ar-file", "no-such-role", &secret, false);
    refused(&server.settings(stranger), Code::VaultDenied, &["by approle"]);
    let elsewhere = approle(server, "ar-nowhere", &role_id, &secret, false);
    refused(&server.settings(elsewhere), Code::VaultDenied, &["auth/ar-nowhere/login"]);
}

#[test]
fn a_secret_id_whose_time_is_over_is_named_as_expired() {
    let server = server!();
    let role_id = server.approle("ar-over", json!({ "secret_id_ttl": "1s" }));
    let settings = server.settings(approle(server, "ar-over", &role_id, &server.secret_id("ar-over"), false));
    let denied = |error: Error| error.code() == Code::VaultDenied;
    until("the secret-id ends", || Vault::open(&settings).expect("usable").login().is_err_and(denied));
    refused(&settings, Code::VaultDenied, &["by approle", "auth/ar-over/login", "used up or expired"]);
}

/// It lets itself be made and looked at, and opens nothing: what the role lacks is named, and nothing counts as lost.
#[test]
fn a_login_whose_role_has_too_few_rights_is_answered_with_the_path_that_it_needs() {
    let server = server!();
    server.enable_transit("poor");
    server.write("poor/keys/models", json!({ "derived": true }));
    let role_id = server.approle("ar-poor", json!({ "token_ttl": "1h" }));
    let auth = approle(server, "ar-poor", &role_id, &server.secret_id("ar-poor"), false);
    let vault = logs_in(&VaultSettings { lock_on_loss: true, ..server.settings(auth) });
    let at = TransitKey { mount: "poor".into(), key: "models".into() };
    let error = vault.transit_unwrap(&at, &[0; 32], "vault:v1:AAAA").expect_err("not allowed");
    says(&error, Code::VaultDenied, &["may not use poor/decrypt/models", "its policy needs that path"]);
    let error = AwsRole::new(vault.clone(), "aws", "models").issue().expect_err("not allowed");
    says(&error, Code::VaultDenied, &["may not use aws/creds/models", "its policy needs that path"]);
    assert_eq!(vault.state().name(), "live", "the token itself is good");
}

#[test]
fn a_wrapped_secret_id_is_unwrapped_once_and_a_second_unwrapping_is_an_alarm() {
    let server = server!();
    let role_id = server.approle("ar-wrapped", json!({ "token_ttl": "1h" }));
    let wrapping = server.wrapped_secret_id("ar-wrapped");
    let settings = server.settings(approle(server, "ar-wrapped", &role_id, &wrapping, true));
    let vault = logs_in(&settings);
    vault.revoke_self().expect("our own token");
    vault.login().expect("what was unwrapped is kept for the next login");
    refused(&settings, Code::VaultDenied, &["unwrapped before", "somebody has it"]);
    let stolen = server.wrapped_secret_id("ar-wrapped");
    assert!(server.unwrap(&stolen), "a thief is first");
    let settings = server.settings(approle(server, "ar-wrapped", &role_id, &stolen, true));
    refused(&settings, Code::VaultDenied, &["unwrapped before", "destroy the secret-id"]);
}

#[test]
fn a_user_logs_in_with_a_password_and_a_wrong_one_is_named_and_not_repeated() {
    let server = server!();
    server.enable_auth("up", "userpass");
    server.write("auth/up/users/ann", json!({ "password": "correct-horse" }));
    let method = |user: &str, name: &str, password: &str| AuthMethod::Userpass {
        mount: "up".into(),
        username: user.into(),
        password_file: Some(server.secret_file(name, password)),
    };
    logs_in(&server.settings(method("ann", "up-right", "correct-horse\n")));
    let wrong = server.settings(method("ann", "up-wrong", "wrong-canary"));
    refused(&wrong, Code::VaultDenied, &["by userpass", "auth/up/login/ann", "the user or the password is wrong"]);
    let error = Vault::open(&wrong).expect("usable").login().expect_err("refused");
    assert!(!error.chain().contains("canary"));
    refused(
        &server.settings(method("bob", "up-bob", "x-canary")),
        Code::VaultDenied,
        &["the user or the password is wrong"],
    );
}

#[test]
fn a_jwt_logs_in_and_an_expired_or_forged_one_or_one_for_others_is_named() {
    let server = server!();
    let signer = Signer::new();
    server.enable_auth("jw", "jwt");
    server.write("auth/jw/config", json!({ "jwt_validation_pubkeys": [signer.public_pem()] }));
    let role = json!({ "role_type": "jwt", "user_claim": "sub", "bound_audiences": ["vault"], "bound_subject": "ci" });
    server.write("auth/jw/role/models", role);
    let claims = |aud: &str, ends: u64| json!({ "sub": "ci", "aud": aud, "iat": now() - 7200, "nbf": now() - 7200, "exp": ends });
    let method = |name: &str, jwt: String| {
        let jwt_file = server.secret_file(name, &jwt);
        server.settings(AuthMethod::Jwt { mount: "jw".into(), role: Some("models".into()), jwt_file })
    };
    let good = signer.jwt(&claims("vault", now() + 600));
    logs_in(&method("jw-good", good.clone()));
    let login = ["by jwt", "auth/jw/login"];
    let named = ["by jwt", "the token in vault-jwt-file is expired", "token is expired"];
    refused(&method("jw-old", signer.jwt(&claims("vault", now() - 3600))), Code::VaultDenied, &named);
    refused(&method("jw-aud", signer.jwt(&claims("others", now() + 600))), Code::VaultDenied, &["by jwt", "audience"]);
    let forged = Signer::new().jwt(&claims("vault", now() + 600));
    refused(&method("jw-forged", forged), Code::VaultDenied, &["by jwt", "signature"]);
    let jwt_file = server.secret_file("jw-role", &good);
    let other = AuthMethod::Jwt { mount: "jw".into(), role: Some("nobody".into()), jwt_file };
    refused(&server.settings(other), Code::VaultDenied, &login);
    let missing = AuthMethod::Jwt { mount: "jw".into(), role: None, jwt_file: PathBuf::from("/nonexistent/jwt") };
    refused(&server.settings(missing), Code::Usage, &["/nonexistent/jwt"]);
}

/// The API server is a fake that reviews tokens: it knows one, and asks for the reviewer's own.
#[test]
fn a_service_account_logs_in_and_a_token_that_the_cluster_does_not_know_is_refused() {
    let server = server!();
    let signer = Signer::new();
    let account_until = |name: &str, ends: u64| {
        let claims = json!({
            "iss": "https://kubernetes.default.svc", "sub": format!("system:serviceaccount:models:{name}"),
            "aud": ["https://kubernetes.default.svc"], "iat": now() - 7200, "nbf": now() - 7200, "exp": ends,
            "kubernetes.io": { "namespace": "models", "serviceaccount": { "name": name, "uid": "uid-1" } },
        });
        signer.jwt(&claims)
    };
    let account = |name: &str| account_until(name, now() + 600);
    let (known, other) = (account("server"), account("other"));
    let over = account_until("server", now() - 3600);
    let reviewer = account("reviewer");
    let reviews = format!("Bearer {reviewer}");
    let (taken, ended) = ([known.clone(), other.clone()], over.clone());
    let cluster = Hostile::start(move |request: &Request, stream: &mut TcpStream| {
        let review: Value = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
        let asked = review["spec"]["token"].as_str().unwrap_or_default().to_owned();
        let reviewer = request.header("authorization") == Some(reviews.as_str());
        let known = reviewer && request.target.ends_with("/tokenreviews") && taken.contains(&asked);
        let name = if asked == taken[0] { "server" } else { "other" };
        let user = json!({ "username": format!("system:serviceaccount:models:{name}"), "uid": "uid-1", "groups": [] });
        let status = if known {
            json!({ "authenticated": true, "user": user, "audiences": review["spec"]["audiences"] })
        } else if asked == ended {
            json!({ "error": "[invalid bearer token, service account token has expired]" })
        } else {
            json!({ "error": "unknown token" })
        };
        let answer = json!({ "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status });
        respond(stream, "201 Created", &[("Content-Type", "application/json")], answer.to_string().as_bytes())
    });
    server.enable_auth("k8s", "kubernetes");
    let config = json!({
        "kubernetes_host": cluster.endpoint(), "token_reviewer_jwt": reviewer, "disable_local_ca_jwt": true,
        "kubernetes_ca_cert": std::fs::read_to_string(server.file("ca.pem")).expect("a certificate"),
    });
    server.write("auth/k8s/config", config);
    let role = json!({ "bound_service_account_names": "server", "bound_service_account_namespaces": "models" });
    server.write("auth/k8s/role/server", role);
    let method = |name: &str, role: &str, jwt: &str| {
        let jwt_file = server.secret_file(name, jwt);
        server.settings(AuthMethod::Kubernetes { mount: "k8s".into(), role: role.into(), jwt_file })
    };
    logs_in(&method("k8s-good", "server", &known));
    let login = ["by kubernetes", "auth/k8s/login"];
    refused(&method("k8s-other", "server", &other), Code::VaultDenied, &["by kubernetes", "not authorized"]);
    refused(&method("k8s-unknown", "server", &account("server2")), Code::VaultDenied, &login);
    let named = ["by kubernetes", "the token in vault-jwt-file is expired, or not for this role"];
    refused(&method("k8s-over", "server", &over), Code::VaultDenied, &named);
    refused(&method("k8s-role", "nobody", &known), Code::VaultDenied, &["by kubernetes", "invalid role name"]);
}

#[test]
fn a_client_certificate_logs_in_and_that_of_another_authority_does_not() {
    let server = server!();
    server.enable_auth("tls", "cert");
    let ca = std::fs::read_to_string(server.file("ca.pem")).expect("a certificate");
    server.write("auth/tls/certs/models", json!({ "certificate": ca, "allowed_common_names": "client" }));
    let method = |cert: Option<&str>| VaultSettings {
        address: server.tls_address(),
        ca_cert: Some(server.file("ca.pem")),
        client_cert: cert.map(|name| server.file(&format!("{name}.pem"))),
        client_key: cert.map(|name| server.file(&format!("{name}.key"))),
        ..server.settings(AuthMethod::Cert { mount: "tls".into(), role: Some("models".into()) })
    };
    logs_in(&method(Some("client")));
    let named = ["by cert", "auth/tls/login", "the client certificate is expired, or no role takes it"];
    for cert in [Some("stranger"), Some("expired"), None] {
        refused(&method(cert), Code::VaultDenied, &named);
    }
    let error = Vault::open(&VaultSettings { client_key: None, ..method(Some("client")) }).expect_err("half a pair");
    says(&error, Code::Usage, &["vault-client-cert and vault-client-key"]);
}

#[test]
fn a_server_that_the_private_authority_did_not_sign_is_not_believed() {
    let server = server!();
    let settings = VaultSettings {
        address: server.tls_address(),
        ca_cert: Some(server.file("other.pem")),
        ..server.settings(token_file(server, "tls-root", VaultServer::ROOT))
    };
    // A machine that stands still for all of a short time learns nothing: then the next one is longer.
    let within = |seconds| {
        let settings = VaultSettings { timeout: Duration::from_secs(seconds), ..settings.clone() };
        Vault::open(&settings).expect("usable").login().expect_err("refused")
    };
    let mut tries = [3, 30, 120].into_iter().map(within);
    let named = |error: &Error| !CLOCKS.iter().any(|words| error.chain().contains(words));
    let error = tries.find(named).expect("the certificate is looked at within two minutes");
    says(&error, Code::VaultUnreachable, &["certificate", "vault-ca-cert of its authority?"]);
    logs_in(&VaultSettings { ca_cert: Some(server.file("ca.pem")), timeout: PATIENCE, ..settings });
}

/// STS is a fake that checks the signature by the book with another library.
#[test]
fn an_aws_identity_logs_in_with_a_signed_question_and_a_wrong_key_is_refused() {
    let server = server!();
    let sts = Hostile::start(|request: &Request, stream: &mut TcpStream| {
        if !signed_by(request, "aws-secret-of-the-tests") {
            let body = b"<ErrorResponse><Error><Code>SignatureDoesNotMatch</Code></Error></ErrorResponse>";
            return respond(stream, "403 Forbidden", &[("Content-Type", "text/xml")], body);
        }
        let body =
            b"<GetCallerIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><GetCallerIdentityResult>\
            <Arn>arn:aws:iam::123456789012:user/models</Arn><UserId>AIDATEST</UserId><Account>123456789012</Account>\
            </GetCallerIdentityResult><ResponseMetadata><RequestId>1</RequestId></ResponseMetadata>\
            </GetCallerIdentityResponse>";
        respond(stream, "200 OK", &[("Content-Type", "text/xml")], body)
    });
    server.enable_auth("iam", "aws");
    server.write("auth/iam/config/client", json!({ "sts_endpoint": sts.endpoint(), "sts_region": "us-east-1" }));
    let role = json!({
        "auth_type": "iam", "resolve_aws_unique_ids": false,
        "bound_iam_principal_arn": "arn:aws:iam::123456789012:user/models",
    });
    server.write("auth/iam/role/models", role);
    // A Vault that wants its own name signed, so that nobody can repeat to it what another was told.
    server.enable_auth("iam-named", "aws");
    let named = json!({
        "sts_endpoint": sts.endpoint(), "sts_region": "us-east-1", "iam_server_id_header_value": "vault.example",
    });
    server.write("auth/iam-named/config/client", named);
    let role = json!({
        "auth_type": "iam", "resolve_aws_unique_ids": false,
        "bound_iam_principal_arn": "arn:aws:iam::123456789012:user/models",
    });
    server.write("auth/iam-named/role/models", role);
    let login_at = |mount: &str, server_id: &str, role: &str, secret: &str| {
        child(&[
            ("WISH", "aws"),
            ("ADDRESS", &server.address()),
            ("STS", &format!("{}/", sts.endpoint())),
            ("MOUNT", mount),
            ("SERVER_ID", server_id),
            ("ROLE", role),
            ("AWS_ACCESS_KEY_ID", "AKIATEST"),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_SESSION_TOKEN", "session-of-the-tests"),
        ])
    };
    let login = |role: &str, secret: &str| login_at("iam", "", role, secret);
    let said = login("models", "aws-secret-of-the-tests");
    assert!(said.contains("CHILD live"), "{said}");
    let said = login_at("iam-named", "vault.example", "models", "aws-secret-of-the-tests");
    assert!(said.contains("CHILD live"), "{said}");
    for (id, why) in [("", "missing header"), ("vault.elsewhere", "vault.elsewhere")] {
        let said = login_at("iam-named", id, "models", "aws-secret-of-the-tests");
        assert!(said.contains("CHILD VAULT_DENIED") && said.contains(why), "{id}: {said}");
    }
    let said = login("models", "another-canary-secret");
    assert!(said.contains("CHILD VAULT_DENIED") && said.contains("by aws"), "{said}");
    assert!(!said.contains("canary"), "{said}");
    let said = login("nobody", "aws-secret-of-the-tests");
    assert!(said.contains("CHILD VAULT_DENIED") && said.contains("nobody"), "{said}");
}

/// AWS Signature Version 4 of a request, computed from what arrived.
fn signed_by(request: &Request, secret: &str) -> bool {
    use ring::{digest, hmac};
    let hash = |bytes: &[u8]| hex::encode(digest::digest(&digest::SHA256, bytes));
    let mac =
        |key: &[u8], text: &str| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec();
    let Some(authorization) = request.header("authorization") else { return false };
    let field = |name: &str| {
        let rest = authorization.split_once(&format!("{name}="))?.1;
        Some(rest.split(',').next().unwrap_or(rest).trim().to_owned())
    };
    let (Some(credential), Some(signed), Some(signature)) =
        (field("Credential"), field("SignedHeaders"), field("Signature"))
    else {
        return false;
    };
    let Some((_, scope)) = credential.split_once('/') else { return false };
    let canonical: String =
        signed.split(';').map(|name| format!("{name}:{}\n", request.header(name).unwrap_or_default().trim())).collect();
    // Vault asks for `//`, which STS takes for `/`.
    assert!(request.target.trim_matches('/').is_empty(), "{}", request.target);
    let whole = format!("{}\n/\n\n{canonical}\n{signed}\n{}", request.method, hash(&request.body));
    let stamp = request.header("x-amz-date").unwrap_or_default();
    let text = format!("AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{}", hash(whole.as_bytes()));
    let key = scope.split('/').fold(format!("AWS4{secret}").into_bytes(), |key, part| mac(&key, part));
    request.header("x-amz-security-token") == Some("session-of-the-tests") && hex::encode(mac(&key, &text)) == signature
}

#[test]
fn a_token_in_the_environment_is_used_and_taken_out_of_it() {
    let server = server!();
    let said = child(&[("WISH", "token"), ("ADDRESS", &server.address()), ("VAULT_TOKEN", VaultServer::ROOT)]);
    assert!(said.contains("CHILD live"), "{said}");
    assert!(said.contains("CHILD environ clean"), "{said}");
    let said = child(&[("WISH", "token"), ("ADDRESS", &server.address()), ("HOME", "/nonexistent")]);
    assert!(said.contains("CHILD USAGE") && said.contains("set VAULT_TOKEN"), "{said}");
}

#[test]
fn the_token_that_vault_login_left_at_home_is_used_if_it_is_good_private_and_no_other_was_given() {
    let server = server!();
    let home = server.file("home");
    std::fs::create_dir(&home).expect("a folder");
    let (path, address) = (home.join(".vault-token"), server.address());
    let home = home.to_str().expect("utf-8");
    let leaves = |text: &str, mode: u32| {
        let file = server.secret_file("home/.vault-token", text);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(file, mode).expect("chmod");
    };
    let says_of = |more: &[(&str, &str)], words: &[&str]| {
        let variables = [&[("WISH", "token"), ("ADDRESS", address.as_str()), ("HOME", home)][..], more].concat();
        let said = child(&variables);
        for word in words {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
    };
    let wrong = "hvs.nobody-gave-this-out";
    leaves(VaultServer::ROOT, 0o600);
    says_of(&[], &["CHILD live"]);
    says_of(&[("VAULT_TOKEN", wrong)], &["CHILD VAULT_DENIED"]);
    leaves(VaultServer::ROOT, 0o644);
    says_of(&[], &["CHILD KEY_PERMS", path.to_str().expect("utf-8"), "0644"]);
    leaves(wrong, 0o600);
    says_of(&[], &["CHILD VAULT_DENIED", "the token is wrong, revoked or expired"]);
    says_of(&[("VAULT_TOKEN", VaultServer::ROOT)], &["CHILD live"]);
}

/// This test binary again, with these variables in its environment.
fn child(variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["child_process", "--exact", "--nocapture", "--test-threads=1"]).env_remove("VAULT_TOKEN");
    for (name, value) in variables {
        let own = ["WISH", "ADDRESS", "STS", "MOUNT", "SERVER_ID", "ROLE"].contains(name);
        command.env(if own { format!("MODELFS_TEST_{name}") } else { (*name).to_owned() }, value);
    }
    let output = command.output().expect("started");
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn child_process() {
    let Ok(wish) = std::env::var("MODELFS_TEST_WISH") else { return };
    let given = |name: &str| std::env::var(format!("MODELFS_TEST_{name}")).expect("given by the parent");
    let auth = match wish.as_str() {
        "token" | "calm" => AuthMethod::Token { file: None },
        "aws" => AuthMethod::Aws {
            mount: given("MOUNT"),
            role: Some(given("ROLE")),
            sts: given("STS"),
            region: "us-east-1".into(),
            server_id: Some(given("SERVER_ID")).filter(|id| !id.is_empty()),
        },
        other => panic!("{other}?"),
    };
    let settings = VaultSettings {
        address: given("ADDRESS"),
        namespace: None,
        ca_cert: None,
        client_cert: None,
        client_key: None,
        auth,
        timeout: PATIENCE,
        check: if wish == "calm" { Duration::from_millis(200) } else { Duration::from_secs(60) },
        lock_on_loss: false,
    };
    let vault = Vault::open(&settings).expect("usable");
    match vault.login() {
        Ok(()) => println!("CHILD {}", vault.state().name()),
        Err(error) => println!("CHILD {} {}", error.code().name(), error.chain()),
    }
    if wish == "calm" {
        until("the token ends", || vault.state().is_lost());
        println!("CHILD lost after ms {}", cpu_time().as_millis());
    }
    let environ = std::fs::read("/proc/self/environ").expect("our own");
    let there = environ.windows(VaultServer::ROOT.len()).any(|window| window == VaultServer::ROOT.as_bytes());
    println!("CHILD environ {}", if there { "HOLDS THE TOKEN" } else { "clean" });
}

// ---- the life of a token -------------------------------------------------------------------------------------------

#[test]
fn a_token_is_renewed_before_it_ends_without_another_login() {
    let server = server!();
    // A machine that stands still for two seconds loses a token of six: then it is one of sixty that must be kept.
    assert!(is_kept(server, 6) || is_kept(server, 60), "it was lost");
}

/// Whether a token that lasts for `period` seconds is there after more than twice that time.
fn is_kept(server: &VaultServer, period: u64) -> bool {
    let mount = format!("ar-renewed-{period}");
    // A second login would need a second use of the secret-id.
    let role_id = server.approle(&mount, json!({ "secret_id_num_uses": 1, "token_period": format!("{period}s") }));
    let vault = logs_in(&server.settings(approle(server, &mount, &role_id, &server.secret_id(&mount), false)));
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2 * period + 2) {
        if vault.state().is_lost() {
            println!("after {:?}: {}", start.elapsed(), vault.status());
            return false;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(vault.status()["state"], "live", "{}", vault.status());
    assert_eq!(vault.status()["auth"], "approle");
    assert!(vault.status()["token_seconds_left"].as_u64().is_some_and(|left| left <= period), "{}", vault.status());
    true
}

#[test]
fn a_token_that_cannot_be_renewed_further_is_replaced_by_a_new_login() {
    // A server of its own: another test's login would be another token.
    let Some(server) = VaultServer::start() else { return };
    let role_id = server.approle("ar-again", json!({ "token_ttl": "3s", "token_max_ttl": "3s" }));
    let auth = approle(&server, "ar-again", &role_id, &server.secret_id("ar-again"), false);
    let vault = logs_in(&server.settings(auth));
    let accessors = || {
        let answer = server.admin("LIST", "auth/token/accessors", Value::Null);
        answer["data"]["keys"].as_array().expect("a list").clone()
    };
    let first = accessors();
    let start = Instant::now();
    until("the first token's time is over", || start.elapsed() > Duration::from_secs(7));
    // Before anything is asked by this client, which would log in for it.
    until("its successor holds", || vault.status()["token_seconds_left"].as_u64().is_some_and(|left| left > 0));
    until("there is another token", || accessors().iter().any(|accessor| !first.contains(accessor)));
    assert_eq!(vault.state().name(), "live", "{}", vault.status());
    vault.login().expect("still in");
}

#[test]
fn a_login_that_is_refused_after_the_token_ended_is_a_loss() {
    let server = server!();
    let options = json!({ "secret_id_num_uses": 1, "token_ttl": "2s", "token_max_ttl": "2s" });
    let role_id = server.approle("ar-lost", options);
    let vault = logs_in(&server.settings(approle(server, "ar-lost", &role_id, &server.secret_id("ar-lost"), false)));
    until("the loss is seen", || vault.state().is_lost());
    let VaultState::Lost { why } = vault.state() else { panic!("{:?}", vault.state()) };
    says(&why, Code::VaultDenied, &["our Vault token is gone and a new login is refused", "used up or expired"]);
    assert_eq!(vault.status()["code"], "VAULT_DENIED");
    says(&vault.login().expect_err("lost"), Code::VaultDenied, &["is gone"]);
}

/// What a client tells of itself from now on.
#[derive(Default)]
struct Told(Mutex<Vec<Event>>);

impl Told {
    fn by(vault: &Vault) -> Arc<Told> {
        let (telemetry, told) = (Arc::new(Telemetry::default()), Arc::new(Told::default()));
        telemetry.events.add(told.clone());
        vault.report_to(telemetry);
        told
    }

    fn kinds(&self) -> Vec<Kind> {
        self.0.lock().expect("a test").iter().map(|event| event.kind).collect()
    }
}

impl Sink for Told {
    fn take(&self, event: &Event) -> modelfs::error::Result<()> {
        self.0.lock().expect("a test").push(event.clone());
        Ok(())
    }
}

#[test]
fn a_token_that_was_given_and_revoked_is_lost() {
    let server = server!();
    let token = server.token(json!({ "ttl": "1h" }));
    let vault = logs_in(&server.settings(token_file(server, "given", &token)));
    let told = Told::by(&vault);
    server.write("auth/token/revoke", json!({ "token": token }));
    until("the loss is seen", || vault.state().is_lost());
    says(&vault.login().expect_err("lost"), Code::VaultDenied, &["revoked or has expired"]);
    until("the loss is told", || told.kinds() == [Kind::LeaseLost]);
    assert_eq!(told.0.lock().expect("a test")[0].severity, Severity::High);
}

/// As Vault Agent does it: a new token lies in the file before the old one ends, or comes after that was revoked.
#[test]
fn a_token_that_is_replaced_in_its_file_is_taken_over_before_the_old_one_is_missed() {
    let server = server!();
    for lock_on_loss in [false, true] {
        let name = format!("sink-{lock_on_loss}");
        // Its successor is there before, so that it lies in the file in time on a slow machine too.
        let second = server.token(json!({ "ttl": "1h" }));
        let first = server.token(json!({ "ttl": "10s", "renewable": false }));
        let vault = logs_in(&VaultSettings { lock_on_loss, ..server.settings(token_file(server, &name, &first)) });
        server.secret_file(&name, &second);
        let told = Told::by(&vault);
        until("the first one is over", || !server.knows(&first));
        until("the second one counts", || vault.status()["token_seconds_left"].as_u64() > Some(60));
        // Revoked by whoever has put another one there.
        let third = server.token(json!({ "ttl": "2h" }));
        server.secret_file(&name, &third);
        server.write("auth/token/revoke", json!({ "token": second }));
        vault.kv_list("secret", "").expect("a request that meets the revoked one goes on with the third");
        until("the third one counts", || vault.status()["token_seconds_left"].as_u64() > Some(3700));
        // What lies there now is none: then it is a loss.
        server.secret_file(&name, "hvs.nobody-gave-this-out");
        server.write("auth/token/revoke", json!({ "token": third }));
        until("the loss is seen", || vault.state().is_lost());
        // Whoever looks may see it a moment before it is told.
        until("the loss is told", || told.kinds().contains(&Kind::LeaseLost));
        let fourth = server.token(json!({ "ttl": "1h" }));
        server.secret_file(&name, &fourth);
        if lock_on_loss {
            // What is to stay dark does not look for itself.
            says(&vault.login().expect_err("lost"), Code::VaultDenied, &["`modelfs unlock`"]);
            vault.forgive().expect("in again");
        }
        until("it is in again", || vault.state().name() == "live");
        vault.login().expect("in");
        assert_eq!(told.kinds().iter().filter(|kind| **kind == Kind::LeaseLost).count(), 1, "{:?}", told.kinds());
    }
}

/// The real Agent: it logs in by AppRole and writes what it gets, ten seconds' worth at a time.
#[test]
fn a_token_that_vault_agent_renews_outlives_any_one_token() {
    let server = server!();
    // An Agent has a second or two to replace a token of ten. A machine that stands still for longer has a gap between
    // two of them, which is a loss: then longer ones must follow each other without.
    assert!(outlives(server, 10) || outlives(server, 60), "it was lost");
}

/// Whether the first token of an Agent, of so many seconds, ends without a loss.
fn outlives(server: &VaultServer, seconds: u64) -> bool {
    let mount = format!("ar-agent-{seconds}");
    let lasts = format!("{seconds}s");
    let role_id = server.approle(&mount, json!({ "token_ttl": lasts, "token_max_ttl": lasts }));
    let role_file = server.secret_file(&format!("{mount}.role-id"), &role_id);
    let secret_file = server.secret_file(&format!("{mount}.secret-id"), &server.secret_id(&mount));
    let sink = server.file(&format!("{mount}.token"));
    let config = format!(
        "vault {{ address = {:?} }}
         auto_auth {{
           method \"approle\" {{
             mount_path = \"auth/{mount}\"
             config = {{
               role_id_file_path = {role_file:?}
               secret_id_file_path = {secret_file:?}
               remove_secret_id_file_after_reading = false
             }}
           }}
           sink \"file\" {{ config = {{ path = {sink:?}, mode = 0600 }} }}
         }}",
        server.address()
    );
    let _agent = server.agent(&server.secret_file(&format!("{mount}.hcl"), &config));
    until("the Agent has logged in", || sink.exists());
    let first = std::fs::read_to_string(&sink).expect("a token");
    let settings =
        VaultSettings { lock_on_loss: true, ..server.settings(AuthMethod::Token { file: Some(sink.clone()) }) };
    let vault = Vault::open(&settings).expect("settings that can be used");
    let told = Told::by(&vault);
    let later = vault.login().and_then(|()| {
        until("the first one is over", || !server.knows(&first));
        vault.own_token()
    });
    if let Err(lost) = later {
        println!("{}", lost.chain());
        return false;
    }
    assert!(!told.kinds().contains(&Kind::LeaseLost), "{:?}", told.kinds());
    true
}

/// The password is changed and put back: nobody has to say so to a mount that keeps its keys.
#[test]
fn a_login_that_is_refused_for_a_while_is_tried_again_unless_a_loss_shall_last() {
    let server = server!();
    server.enable_auth("up-again", "userpass");
    // This client asks within seconds; one of a mount asks so seldom that Vault does not lock its user out.
    let lockout = json!({
        "lockout_threshold": "1000000", "lockout_duration": "15m", "lockout_counter_reset_duration": "15m",
    });
    server.write("sys/auth/up-again/tune", json!({ "user_lockout_config": lockout }));
    let password = |text: &str| {
        server.write("auth/up-again/users/ann", json!({ "password": text, "token_ttl": "1h" }));
    };
    for lock_on_loss in [false, true] {
        password("correct-horse");
        let auth = AuthMethod::Userpass {
            mount: "up-again".into(),
            username: "ann".into(),
            password_file: Some(server.secret_file("up-again", "correct-horse")),
        };
        let vault = logs_in(&VaultSettings { lock_on_loss, ..server.settings(auth) });
        password("another");
        server.write("sys/leases/revoke-prefix/auth/up-again", json!({ "sync": true }));
        until("the loss is seen", || vault.state().is_lost());
        says(&vault.forgive().expect_err("no login yet"), Code::VaultDenied, &["a new login is refused"]);
        assert!(vault.state().is_lost());
        password("correct-horse");
        if lock_on_loss {
            vault.forgive().expect("in again");
        }
        until("it is in again", || vault.state().name() == "live");
        vault.login().expect("in");
    }
}

/// A given token that may not be renewed and nears its end must not make the client spin.
#[test]
fn a_token_that_cannot_be_renewed_is_watched_calmly_until_it_ends() {
    let server = server!();
    let token = server.token(json!({ "ttl": "20s", "renewable": false }));
    let said = child(&[("WISH", "calm"), ("ADDRESS", &server.address()), ("VAULT_TOKEN", &token)]);
    assert!(said.contains("CHILD live"), "{said}");
    let spent = said.lines().find_map(|line| line.strip_prefix("CHILD lost after ms ")?.parse::<u64>().ok());
    // A spinning thread takes the 6 s between 70 % and the end; a calm one some milliseconds, however busy the machine:
    // this is processor time.
    assert!(spent.is_some_and(|spent| spent < 3000), "{said}");
}

fn cpu_time() -> Duration {
    // SAFETY: an all-zero rusage is valid, and the kernel fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    Duration::from_micros((usage.ru_utime.tv_sec * 1_000_000 + usage.ru_utime.tv_usec) as u64)
}

#[test]
fn a_revoked_token_is_replaced_unless_its_loss_shall_lock() {
    let server = server!();
    let role_id = server.approle("ar-revoked", json!({ "token_ttl": "1h" }));
    for lock_on_loss in [false, true] {
        let auth = approle(server, "ar-revoked", &role_id, &server.secret_id("ar-revoked"), false);
        let vault = logs_in(&VaultSettings { lock_on_loss, ..server.settings(auth) });
        let told = Told::by(&vault);
        server.write("sys/leases/revoke-prefix/auth/ar-revoked", json!({ "sync": true }));
        if lock_on_loss {
            until("the loss is seen", || vault.state().is_lost());
            says(&vault.login().expect_err("lost"), Code::VaultDenied, &["was revoked", "`modelfs unlock`"]);
            vault.forgive().expect("in again");
        }
        vault.login().expect("in again");
        until("live again", || vault.state().name() == "live");
        let wanted: &[Kind] = if lock_on_loss { &[Kind::LeaseLost, Kind::Login] } else { &[Kind::Login] };
        until("it is told", || told.kinds().starts_with(wanted));
    }
}

// ---- leases ---------------------------------------------------------------------------------------------------------

/// What docs/KEYS.md says of `iam_user` roles.
#[test]
fn an_iam_user_is_given_back_by_the_extra_rule_or_with_our_own_token() {
    let server = server!();
    let (iam, users) = iam::start("secret-of-the-user", "session-of-the-role");
    let users = || users.lock().expect("no panic under the lock").len();
    server.write("sys/mounts/aws-users", json!({ "type": "aws" }));
    let root = json!({
        "access_key": "AKIAROOT", "secret_key": "root", "region": "us-east-1", "iam_endpoint": iam.endpoint(),
        "sts_endpoint": iam.endpoint(),
    });
    server.write("aws-users/config/root", root);
    let policy = json!({ "Version": "2012-10-17", "Statement": [] }).to_string();
    server.write("aws-users/roles/models", json!({ "credential_type": "iam_user", "policy_document": policy }));
    let read = "path \"aws-users/creds/models\" { capabilities = [\"read\"] }\n";
    server.policy("users", read);
    server.policy("users-back", &format!("{read}path \"sys/leases/revoke\" {{ capabilities = [\"update\"] }}"));

    // A token that was given to us and goes on: without the rule the user goes on as well.
    let given = |policy: &str| {
        let token = server.token(json!({ "policies": [policy], "ttl": "1h" }));
        logs_in(&server.settings(token_file(server, policy, &token)))
    };
    let without = given("users");
    let role = |vault: &Vault| AwsRole::new(vault.clone(), "aws-users", "models");
    let lender = role(&without);
    let lease = lender.issue().expect("a user").lease_id.expect("a lease");
    assert!(!lender.was_revoked(&lease).expect("Vault's default policy lets it be asked"), "it is there");
    says(&role(&without).revoke(&lease).expect_err("no right"), Code::VaultDenied, &["sys/leases/revoke", "policy"]);
    assert!(!without.revoke_self().expect("not ours"), "a given token is not ended");
    assert_eq!(users(), 1);
    role(&given("users-back")).revoke(&lease).expect("given back");
    until("the user is gone", || users() == 0);
    until("the lease is gone", || lender.was_revoked(&lease).expect("asked"));

    // A token of our own takes its leases along.
    let role_id = server.approle("ar-users", json!({ "token_policies": "users", "token_ttl": "1h" }));
    let own = logs_in(&server.settings(approle(server, "ar-users", &role_id, &server.secret_id("ar-users"), false)));
    let lender = role(&own);
    let lease = lender.issue().expect("a user").lease_id.expect("a lease");
    role(&own).revoke(&lease).expect_err("no right");
    assert_eq!(users(), 1);
    assert!(own.revoke_self().expect("ours"));
    until("the user is gone", || users() == 0);
    // Asked by the login that follows, as after a token that came to its end.
    assert!(!lender.was_revoked(&lease).expect("asked"), "it ended with its token, not by anybody's word");
}

// ---- Vault away, sealed --------------------------------------------------------------------------------------------

#[test]
fn a_sealed_vault_says_so_and_goes_on_when_it_is_unsealed_and_one_that_is_gone_is_away() {
    let Some(mut server) = VaultServer::start() else { return };
    let settings = server.settings(token_file(&server, "root", VaultServer::ROOT));
    let vault = logs_in(&settings);
    // Asks one that is gone for so long; the other waits, so that no slow answer is taken for an outage.
    let hasty = logs_in(&VaultSettings { timeout: Duration::from_secs(15), ..settings.clone() });
    let told = Told::by(&vault);
    server.seal();
    says(&vault.kv_list("secret", "").expect_err("sealed"), Code::VaultSealed, &["is sealed", "unseal it"]);
    until("the state says sealed", || vault.state().name() == "sealed");
    refused(&settings, Code::VaultSealed, &[&server.address(), "is sealed"]);
    server.unseal();
    until("the background finds it open", || vault.state().name() == "live");
    vault.kv_list("secret", "").expect("open again");
    server.stop();
    says(&hasty.kv_list("secret", "").expect_err("gone"), Code::VaultUnreachable, &[&server.address()]);
    assert_eq!(hasty.state().name(), "away");
    until("the background finds it gone", || vault.state().name() == "away");
    assert_eq!(vault.status()["code"], "VAULT_UNREACHABLE");
    // Whoever looks may see it a moment before it is told.
    until("it is told", || told.kinds().len() >= 3);
    assert_eq!(
        told.kinds(),
        [Kind::VaultDown, Kind::VaultUp, Kind::VaultDown],
        "each once, however often it was asked"
    );
}

// ---- what Vault holds ----------------------------------------------------------------------------------------------

fn key(byte: u8) -> Secret<32> {
    Secret::from_bytes(&mut [byte; 32])
}

#[test]
fn a_wrapped_key_opens_for_its_context_alone_and_is_rewrapped_within_vault() {
    let server = server!();
    let vault = root(server);
    server.enable_transit("tr");
    server.write("tr/keys/models", json!({ "type": "aes256-gcm96", "derived": true }));
    let at = TransitKey { mount: "tr".into(), key: "models".into() };
    let (mine, other) = ([1; 32], [2; 32]);
    let wrapped = vault.transit_wrap(&at, &mine, &key(7)).expect("wrapped");
    assert!(wrapped.starts_with("vault:v1:"), "{wrapped}");
    assert!(vault.transit_unwrap(&at, &mine, &wrapped).expect("unwrapped").ct_eq(&[7; 32]));
    let error = vault.transit_unwrap(&at, &other, &wrapped).expect_err("another context");
    says(&error, Code::SlotCommit, &["for this model and version"]);
    assert_eq!(vault.transit_latest_version(&at).expect("a version"), 1);
    server.write("tr/keys/models/rotate", json!({}));
    assert_eq!(vault.transit_latest_version(&at).expect("a version"), 2);
    let again = vault.transit_rewrap(&at, &mine, &wrapped).expect("rewrapped");
    assert!(again.starts_with("vault:v2:"), "{again}");
    assert!(vault.transit_unwrap(&at, &mine, &again).expect("unwrapped").ct_eq(&[7; 32]));
    server.write("tr/keys/models/config", json!({ "min_decryption_version": 2 }));
    says(&vault.transit_unwrap(&at, &mine, &wrapped).expect_err("retired"), Code::VaultDenied, &["rewrap"]);
    let nothing = TransitKey { mount: "tr".into(), key: "nothing".into() };
    says(&vault.transit_unwrap(&nothing, &mine, &again).expect_err("no key"), Code::VaultNotFound, &["nothing"]);
    let wide = json!({ "plaintext": STANDARD.encode([7; 33]), "context": STANDARD.encode(mine) });
    let wide = server.write("tr/encrypt/models", wide)["data"]["ciphertext"].as_str().expect("wrapped").to_owned();
    says(&vault.transit_unwrap(&at, &mine, &wide).expect_err("33 bytes"), Code::KeyFormat, &["not 32 bytes"]);
}

#[test]
fn transit_signs_what_its_public_half_verifies() {
    let server = server!();
    let vault = root(server);
    server.enable_transit("sig");
    server.write("sig/keys/release", json!({ "type": "ed25519" }));
    server.write("sig/keys/release/rotate", json!({}));
    server.write("sig/keys/plain", json!({ "type": "aes256-gcm96" }));
    let at = TransitKey { mount: "sig".into(), key: "release".into() };
    let public = vault.transit_public_key(&at).expect("a public key");
    let signature = vault.transit_sign(&at, b"a ref").expect("signed");
    let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, public);
    key.verify(b"a ref", &signature).expect("the newest version signs");
    key.verify(b"another", &signature).expect_err("and nothing else");
    let plain = TransitKey { mount: "sig".into(), key: "plain".into() };
    says(&vault.transit_public_key(&plain).expect_err("symmetric"), Code::Usage, &["ed25519"]);
}

#[test]
fn a_record_is_read_by_exact_version_and_written_by_check_and_set() {
    let server = server!();
    let vault = root(server);
    let record = |text: &str| Map::from_iter([("key".to_owned(), json!(text))]);
    assert!(vault.kv_read("secret", "kv/a", None).expect("asked").is_none());
    assert_eq!(vault.kv_write("secret", "kv/a", &record("one"), 0).expect("new"), 1);
    says(&vault.kv_write("secret", "kv/a", &record("x"), 0).expect_err("there"), Code::Exists, &["somebody else"]);
    assert_eq!(vault.kv_write("secret", "kv/a", &record("two"), 1).expect("next"), 2);
    says(&vault.kv_write("secret", "kv/a", &record("x"), 1).expect_err("moved"), Code::Exists, &["secret/kv/a"]);
    for (version, want, read) in [(None, "two", 2), (Some(1), "one", 1), (Some(2), "two", 2)] {
        let (text, seen) = vault.kv_field("secret", "kv/a", "key", version).expect("there");
        assert_eq!((&text[..], seen), (want.as_bytes(), read));
    }
    says(&vault.kv_field("secret", "kv/a", "no", None).expect_err("no field"), Code::VaultNotFound, &["field no"]);
    says(&vault.kv_field("secret", "kv/a", "key", Some(9)).expect_err("no"), Code::VaultNotFound, &["version 9"]);
    vault.kv_write("secret", "kv/deep/b", &record("three"), 0).expect("new");
    assert_eq!(vault.kv_list("secret", "kv").expect("listed"), ["a", "deep/"]);
    assert!(vault.kv_list("secret", "kv/nothing").expect("listed").is_empty());
    vault.kv_destroy("secret", "kv/a", &[1]).expect("destroyed");
    says(&vault.kv_field("secret", "kv/a", "key", Some(1)).expect_err("gone"), Code::VaultNotFound, &["deleted"]);
    assert_eq!(vault.kv_field("secret", "kv/a", "key", None).expect("there").1, 2);
    for path in ["kv/../kv/a", "./kv/a"] {
        says(&vault.kv_read("secret", path, None).expect_err("dots"), Code::Usage, &["without dots"]);
    }
}

#[test]
fn a_policy_that_is_not_enough_is_answered_with_the_path_that_it_needs() {
    let server = server!();
    server.enable_transit("few");
    server.write("few/keys/models", json!({ "derived": true }));
    server.policy("few", "path \"few/encrypt/models\" { capabilities = [\"update\"] }");
    let token = server.token(json!({ "policies": ["few"] }));
    let vault = logs_in(&server.settings(token_file(server, "few", &token)));
    let at = TransitKey { mount: "few".into(), key: "models".into() };
    let wrapped = vault.transit_wrap(&at, &[0; 32], &key(1)).expect("allowed");
    let error = vault.transit_unwrap(&at, &[0; 32], &wrapped).expect_err("not allowed");
    says(&error, Code::VaultDenied, &["few/decrypt/models", "policy", "permission denied"]);
    assert_eq!(vault.state().name(), "live", "the token itself is good");
    says(&vault.kv_read("secret", "few", None).expect_err("no"), Code::VaultDenied, &["secret/data/few"]);
}

#[test]
fn a_namespace_goes_along_as_a_header() {
    let seen = Hostile::start(|_: &Request, stream: &mut TcpStream| {
        respond(stream, "200 OK", &[], 
            br#"{"request_id":"r","lease_id":"","renewable":false,"lease_duration":0,"data":{"ttl":0,"renewable":false}}"#)
    });
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("token");
    std::fs::write(&file, "t-namespace").expect("written");
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("chmod");
    let settings = VaultSettings {
        address: seen.endpoint(),
        namespace: Some("team/models".into()),
        ca_cert: None,
        client_cert: None,
        client_key: None,
        auth: AuthMethod::Token { file: Some(file) },
        timeout: PATIENCE,
        check: PATIENCE,
        lock_on_loss: false,
    };
    logs_in(&settings);
    let requests = seen.requests();
    assert_eq!(requests[0].header("x-vault-namespace"), Some("team/models"));
    assert_eq!(requests[0].header("x-vault-token"), Some("t-namespace"));
}
