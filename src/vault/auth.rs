//! How a mount or a publisher shows Vault who it is.
//!
//! In: a method and the places of its secrets. Out: a token. Secrets are read at each login, from files that only we or
//! root can read; those from the environment are taken out of it once, when the client is made.
//! Held by: tests/vault.rs, against a live Vault.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use zeroize::{Zeroize, Zeroizing};

use super::raw::{Method, Raw};
use super::wire::{Answer, Wire, lasting};
use crate::crypto::{hmac_sha256, sha256};
use crate::error::{Code, Error, Result};
use crate::mem::{LockedBuf, take_env};
use crate::refuse;
use crate::store::EnvCredentials;
use crate::telemetry::civil_date;

/// Where Kubernetes puts a pod's token.
pub const SERVICE_ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Longest secret that is read from a file: JWTs take 1 to 4 KiB.
const SECRET_BYTES_MAX: usize = 16 << 10;

/// A way to log in. Holds names and places, no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuthMethod {
    /// `VAULT_TOKEN`, else the file named, else `~/.vault-token`.
    Token {
        file: Option<PathBuf>,
    },
    /// The secret-id by file, or `MODELFS_VAULT_SECRET_ID`; `wrapped`: it is a response-wrapping token.
    AppRole {
        mount: String,
        role_id: String,
        secret_id_file: Option<PathBuf>,
        wrapped: bool,
    },
    Kubernetes {
        mount: String,
        role: String,
        jwt_file: PathBuf,
    },
    Jwt {
        mount: String,
        role: Option<String>,
        jwt_file: PathBuf,
    },
    /// The client certificate of the connection.
    Cert {
        mount: String,
        role: Option<String>,
    },
    /// The AWS credentials of the environment sign a question to STS that Vault asks for us.
    Aws {
        mount: String,
        role: Option<String>,
        sts: String,
        region: String,
        /// Names the Vault that the signature is for (`iam_server_id_header_value` of its method).
        server_id: Option<String>,
    },
    /// The password by file, or `MODELFS_VAULT_PASSWORD`.
    Userpass {
        mount: String,
        username: String,
        password_file: Option<PathBuf>,
    },
}

impl AuthMethod {
    pub const fn name(&self) -> &'static str {
        match self {
            AuthMethod::Token { .. } => "token",
            AuthMethod::AppRole { .. } => "approle",
            AuthMethod::Kubernetes { .. } => "kubernetes",
            AuthMethod::Jwt { .. } => "jwt",
            AuthMethod::Cert { .. } => "cert",
            AuthMethod::Aws { .. } => "aws",
            AuthMethod::Userpass { .. } => "userpass",
        }
    }

    /// What a refused login may have to do with. Vault itself says little more than no, so that nobody can probe it.
    const fn suspicion(&self) -> &'static str {
        match self {
            AuthMethod::Token { .. } => "the token is wrong, revoked or expired",
            AuthMethod::AppRole { .. } => {
                "the role-id or the secret-id is wrong, used up or expired, or not for this address"
            }
            AuthMethod::Kubernetes { .. } | AuthMethod::Jwt { .. } => {
                "the token in vault-jwt-file is expired, or not for this role"
            }
            AuthMethod::Cert { .. } => "the client certificate is expired, or no role takes it",
            AuthMethod::Aws { .. } => "the AWS credentials are wrong or expired, or their identity is not in the role",
            AuthMethod::Userpass { .. } => "the user or the password is wrong, or the user is locked out",
        }
    }
}

/// A token and what Vault says of it.
pub struct Token {
    /// Of its text: the same for all of its renewals, and of no other token.
    pub id: [u8; 32],
    pub text: LockedBuf,
    pub got: Instant,
    /// `None`: it does not expire.
    pub ttl: Option<Duration>,
    pub renewable: bool,
}

impl Token {
    pub fn expires(&self) -> Option<Instant> {
        self.ttl.and_then(|ttl| self.got.checked_add(ttl))
    }

    /// Whether its time is not over yet.
    pub fn holds(&self) -> bool {
        self.expires().is_none_or(|at| at > Instant::now())
    }

    /// What a renewal of this token answered.
    pub fn renewed(&self, answer: Answer<Value>) -> Result<Token> {
        let mut fresh = Token::of(answer)?;
        if self.ttl.is_some() && fresh.ttl.is_none() {
            // What ends is not renewed to last for ever: this is its last second, of which less than one is left.
            fresh.ttl = Some(Duration::from_secs(1));
        }
        Ok(fresh)
    }

    pub fn of(answer: Answer<Value>) -> Result<Token> {
        let Some(mut auth) = answer.auth else { refuse!(VaultAnswer, "Vault's answer to the login holds no token") };
        let text = LockedBuf::copy_of(auth.client_token.as_bytes());
        auth.client_token.zeroize();
        let text = text?;
        if text.is_empty() {
            refuse!(VaultAnswer, "Vault's answer to the login holds an empty token");
        }
        let ttl = (auth.lease_duration > 0).then(|| lasting(auth.lease_duration));
        Ok(Token { id: sha256(&[&text]), text, got: Instant::now(), ttl, renewable: auth.renewable })
    }
}

/// Secrets that came by the environment: taken out of it, kept for every login.
#[derive(Default)]
pub struct EnvSecrets {
    token: Option<LockedBuf>,
    secret_id: Option<LockedBuf>,
    password: Option<LockedBuf>,
    aws: Option<Arc<EnvCredentials>>,
    /// A wrapped secret-id can be unwrapped once; what came out is kept.
    unwrapped: std::sync::Mutex<Option<LockedBuf>>,
}

impl EnvSecrets {
    /// Takes what `method` may need; the rest of the environment is left alone.
    pub fn take(method: &AuthMethod) -> Result<EnvSecrets> {
        let mut taken = EnvSecrets::default();
        match method {
            AuthMethod::Token { .. } => taken.token = non_empty(take_env("VAULT_TOKEN")?),
            AuthMethod::AppRole { .. } => taken.secret_id = non_empty(take_env("MODELFS_VAULT_SECRET_ID")?),
            AuthMethod::Userpass { .. } => taken.password = non_empty(take_env("MODELFS_VAULT_PASSWORD")?),
            // Shared with the store's client, which may have taken them before.
            AuthMethod::Aws { .. } => taken.aws = EnvCredentials::taken()?,
            AuthMethod::Kubernetes { .. } | AuthMethod::Jwt { .. } | AuthMethod::Cert { .. } => {}
        }
        Ok(taken)
    }
}

fn non_empty(taken: Option<LockedBuf>) -> Option<LockedBuf> {
    taken.filter(|value| !value.is_empty())
}

/// Logs in.
///
/// # Errors
/// `USAGE`, `KEY_PERMS` for secrets that are not there or not private; `VAULT_DENIED` and the others of [`Wire::send`].
pub async fn login(method: &AuthMethod, secrets: &EnvSecrets, wire: &Wire) -> Result<Token> {
    let suspect = |refused: Error| match refused.code() {
        Code::VaultDenied => refused.context(method.suspicion()),
        _ => refused,
    };
    let body = match method {
        AuthMethod::Token { file } => return own_token(file.as_deref(), secrets, wire).await.map_err(suspect),
        AuthMethod::AppRole { role_id, secret_id_file, wrapped, .. } => {
            let secret_id = secret_id(secret_id_file.as_deref(), *wrapped, secrets, wire).await?;
            secret_body([("role_id", role_id.as_str())], "secret_id", &secret_id)?
        }
        AuthMethod::Kubernetes { role, jwt_file, .. } => {
            secret_body([("role", role.as_str())], "jwt", &read_token_file(jwt_file)?)?
        }
        AuthMethod::Jwt { role, jwt_file, .. } => {
            let role = role.iter().map(|role| ("role", role.as_str()));
            secret_body(role, "jwt", &read_token_file(jwt_file)?)?
        }
        AuthMethod::Cert { role, .. } => {
            let mut body = Map::new();
            if let Some(role) = role {
                body.insert("name".into(), json!(role));
            }
            Body(body)
        }
        AuthMethod::Aws { role, sts, region, server_id, .. } => {
            aws_body(role.as_deref(), sts, region, server_id.as_deref(), secrets)?
        }
        AuthMethod::Userpass { password_file, .. } => {
            let password = match (password_file, &secrets.password) {
                (Some(path), _) => read_secret_file(path)?,
                (None, Some(password)) => LockedBuf::copy_of(password)?,
                (None, None) => {
                    refuse!(Usage, "userpass needs vault-password-file, or MODELFS_VAULT_PASSWORD in the environment")
                }
            };
            secret_body([], "password", &password)?
        }
    };
    let path = match method {
        AuthMethod::Userpass { mount, username, .. } => format!("auth/{mount}/login/{username}"),
        AuthMethod::AppRole { mount, .. }
        | AuthMethod::Kubernetes { mount, .. }
        | AuthMethod::Jwt { mount, .. }
        | AuthMethod::Cert { mount, .. }
        | AuthMethod::Aws { mount, .. } => format!("auth/{mount}/login"),
        AuthMethod::Token { .. } => unreachable!("answered above"),
    };
    let what = format!("cannot log in to Vault by {}", method.name());
    let answer = wire.send(Raw::new(Method::Post, path, Some(body.0.clone())), None, &what).await;
    Token::of(answer.map_err(suspect)?)
}

/// The fields of a login, wiped when dropped.
struct Body(Map<String, Value>);

impl Drop for Body {
    fn drop(&mut self) {
        super::raw::wipe_map(&mut self.0);
    }
}

fn secret_body<'a>(plain: impl IntoIterator<Item = (&'a str, &'a str)>, name: &str, secret: &[u8]) -> Result<Body> {
    let mut body = Map::new();
    for (name, value) in plain {
        body.insert(name.into(), json!(value));
    }
    let text = std::str::from_utf8(secret)
        .map_err(|_| Error::new(Code::KeyFormat, format!("the {name} for Vault is not text")))?;
    body.insert(name.into(), json!(text));
    Ok(Body(body))
}

/// The file that a token given to us comes from, if it comes from one.
fn own_token_file(file: Option<&Path>, secrets: &EnvSecrets) -> Option<PathBuf> {
    match (&secrets.token, file) {
        (Some(_), _) => None,
        (None, Some(path)) => Some(path.to_owned()),
        (None, None) => {
            let home = std::env::var_os("HOME").map(PathBuf::from).filter(|home| home.is_absolute())?;
            Some(home.join(".vault-token")).filter(|path| path.symlink_metadata().is_ok())
        }
    }
}

/// What is in that file now. `None` if there is no such file, or none that can be read: it is being replaced, perhaps.
pub fn token_in_file(method: &AuthMethod, secrets: &EnvSecrets) -> Option<LockedBuf> {
    let AuthMethod::Token { file } = method else { return None };
    let path = own_token_file(file.as_deref(), secrets)?;
    read_secret_file(&path).inspect_err(|error| tracing::debug!("{}", error.chain())).ok()
}

async fn own_token(file: Option<&Path>, secrets: &EnvSecrets, wire: &Wire) -> Result<Token> {
    let text = match (&secrets.token, own_token_file(file, secrets)) {
        (Some(token), _) => LockedBuf::copy_of(token)?,
        (None, Some(path)) => read_secret_file(&path)?,
        (None, None) => refuse!(
            Usage,
            "no Vault token: set VAULT_TOKEN, run `vault login`, or choose another vault-auth than token"
        ),
    };
    let what = "cannot look up the Vault token";
    let answer: Answer<Value> =
        wire.send(Raw::new(Method::Get, "auth/token/lookup-self".into(), None), Some(&text), what).await?;
    let Some(Value::Object(mut data)) = answer.data else { refuse!(VaultAnswer, "{what}: the answer has no data") };
    let ttl = data.get("ttl").and_then(Value::as_u64).unwrap_or(0);
    // In its last second the time left is 0, which otherwise says that it never ends.
    let ttl = if data.get("expire_time").is_some_and(|at| !at.is_null()) { ttl.max(1) } else { ttl };
    let renewable = data.get("renewable").and_then(Value::as_bool).unwrap_or(false);
    super::raw::wipe_map(&mut data);
    let ttl = (ttl > 0).then(|| lasting(ttl));
    Ok(Token { id: sha256(&[&text]), text, got: Instant::now(), ttl, renewable })
}

async fn secret_id(file: Option<&Path>, wrapped: bool, secrets: &EnvSecrets, wire: &Wire) -> Result<LockedBuf> {
    if wrapped && let Some(known) = &*secrets.unwrapped.lock().unwrap_or_else(|lost| lost.into_inner()) {
        return LockedBuf::copy_of(known);
    }
    let given = match (file, &secrets.secret_id) {
        (Some(path), _) => read_secret_file(path)?,
        (None, Some(secret)) => LockedBuf::copy_of(secret)?,
        (None, None) => {
            refuse!(Usage, "approle needs vault-secret-id-file, or MODELFS_VAULT_SECRET_ID in the environment")
        }
    };
    if !wrapped {
        return Ok(given);
    }
    let what = "cannot unwrap the secret-id";
    let answer: Answer<Value> =
        wire.send(Raw::new(Method::Post, "sys/wrapping/unwrap".into(), None), Some(&given), what).await?;
    let Some(Value::Object(mut data)) = answer.data else { refuse!(VaultAnswer, "{what}: the answer has no data") };
    let secret = data.get("secret_id").and_then(Value::as_str).map(|text| LockedBuf::copy_of(text.as_bytes()));
    super::raw::wipe_map(&mut data);
    let Some(secret) = secret.transpose()? else { refuse!(VaultDenied, "{what}: what was wrapped is no secret-id") };
    *secrets.unwrapped.lock().unwrap_or_else(|lost| lost.into_inner()) = Some(LockedBuf::copy_of(&secret)?);
    Ok(secret)
}

/// The text of a private file, without the newline at its end.
fn read_secret_file(path: &Path) -> Result<LockedBuf> {
    let named = |err: Error| err.context(format!("a secret for Vault is in {}", path.display()));
    trimmed(crate::mem::read_private_file(path, SECRET_BYTES_MAX).map_err(named)?, path)
}

/// Kubernetes projects tokens through symlinks, readable by the pod's group. Read on the client's one thread: nothing that
/// waits.
fn read_token_file(path: &Path) -> Result<LockedBuf> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let at = path.display();
    let fault = |err| Error::new(Code::Usage, format!("cannot read the token for Vault in {at}")).with_source(err);
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let mut file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(fault)?;
    if !file.metadata().map_err(fault)?.is_file() {
        refuse!(Usage, "{at} is not a regular file; it should hold the token for Vault");
    }
    // Room for one byte more than there may be: what is cut off is no token.
    let mut buffer = LockedBuf::new(SECRET_BYTES_MAX + 1)?;
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..]) {
            Ok(0) => {
                buffer.truncate(len);
                return trimmed(buffer, path);
            }
            Ok(more) => len += more,
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => return Err(fault(err)),
        }
    }
    refuse!(KeyFormat, "{at} is longer than {SECRET_BYTES_MAX} bytes; it should hold one token for Vault")
}

fn trimmed(mut text: LockedBuf, path: &Path) -> Result<LockedBuf> {
    while text.last().is_some_and(u8::is_ascii_whitespace) {
        text.truncate(text.len() - 1);
    }
    if text.is_empty() {
        refuse!(KeyFormat, "{} is empty; it should hold a secret for Vault", path.display());
    }
    Ok(text)
}

/// A signed `GetCallerIdentity`: Vault sends it to STS and learns who signed. AWS Signature Version 4.
fn aws_body(
    role: Option<&str>,
    sts: &str,
    region: &str,
    server_id: Option<&str>,
    secrets: &EnvSecrets,
) -> Result<Body> {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    const ASK: &str = "Action=GetCallerIdentity&Version=2011-06-15";
    let Some(aws) = &secrets.aws else {
        refuse!(Usage, "aws login needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment");
    };
    let url = url::Url::parse(sts)
        .map_err(|err| Error::new(Code::Usage, format!("{sts:?} is no address of STS")).with_source(err))?;
    let Some(host) = url.host_str() else { refuse!(Usage, "{sts:?} names no host") };
    let host = url.port().map_or(host.to_string(), |port| format!("{host}:{port}"));
    let text = |secret: &LockedBuf| -> Result<Zeroizing<String>> {
        let text = std::str::from_utf8(secret);
        Ok(Zeroizing::new(text.map_err(|_| Error::new(Code::KeyFormat, "AWS credentials are not text"))?.to_owned()))
    };
    let stamp = amz_date(now_unix()?);
    let day = &stamp[..8];
    // Values may be secrets: each is wiped, and so is what is made of them.
    let mut headers: Vec<(&str, Zeroizing<String>)> = vec![
        ("content-type", Zeroizing::new("application/x-www-form-urlencoded; charset=utf-8".into())),
        ("host", Zeroizing::new(host)),
        ("x-amz-date", Zeroizing::new(stamp.clone())),
    ];
    if let Some(session) = &aws.session {
        headers.push(("x-amz-security-token", text(session)?));
    }
    if let Some(id) = server_id {
        // Signed like the others: what one Vault is told cannot be repeated to another that asks for its own name.
        headers.push(("x-vault-aws-iam-server-id", Zeroizing::new(id.to_owned())));
    }
    let signed = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
    // Hashed piece by piece: a string of them all would be one more copy.
    let body_hash = hex::encode(sha256(&[ASK.as_bytes()]));
    let mut request: Vec<&[u8]> = vec![b"POST\n/\n\n".as_slice()];
    for (name, value) in &headers {
        request.extend([name.as_bytes(), b":", value.as_bytes(), b"\n"]);
    }
    request.extend([b"\n".as_slice(), signed.as_bytes(), b"\n", body_hash.as_bytes()]);
    let scope = format!("{day}/{region}/sts/aws4_request");
    let to_sign = format!("AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{}", hex::encode(sha256(&request)));
    let mut seed = Zeroizing::new(Vec::with_capacity(b"AWS4".len() + aws.secret.len()));
    seed.extend_from_slice(b"AWS4");
    seed.extend_from_slice(&aws.secret);
    let mut key = Zeroizing::new(hmac_sha256(&seed, day.as_bytes()));
    for part in [region, "sts", "aws4_request"] {
        *key = hmac_sha256(&key[..], part.as_bytes());
    }
    let signature = hex::encode(hmac_sha256(&key[..], to_sign.as_bytes()));
    let key_id = text(&aws.key_id)?;
    let authorization =
        format!("AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={signed}, Signature={signature}", &*key_id);
    headers.push(("authorization", Zeroizing::new(authorization)));
    let mut shown = Map::new();
    for (name, value) in &headers {
        shown.insert((*name).into(), json!([value.as_str()]));
    }
    let headers = Zeroizing::new(serde_json::to_vec(&shown).expect("strings have a JSON form"));
    super::raw::wipe_map(&mut shown);
    let mut body = Map::new();
    if let Some(role) = role {
        body.insert("role".into(), json!(role));
    }
    body.insert("iam_http_request_method".into(), json!("POST"));
    body.insert("iam_request_url".into(), json!(STANDARD.encode(url.as_str())));
    body.insert("iam_request_body".into(), json!(STANDARD.encode(ASK)));
    body.insert("iam_request_headers".into(), json!(STANDARD.encode(&*headers)));
    Ok(Body(body))
}

fn now_unix() -> Result<i64> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let since = since.map_err(|err| Error::new(Code::Clock, "the clock stands before 1970").with_source(err))?;
    Ok(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// `YYYYMMDDTHHMMSSZ` of unix seconds.
fn amz_date(unix: i64) -> String {
    let (days, second) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
    let (year, month, day) = civil_date(days);
    format!("{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_for_vault_is_a_whole_regular_file_and_nothing_is_waited_for() {
        let dir = tempfile::tempdir().expect("a folder");
        let at = |name: &str| dir.path().join(name);
        let put = |name: &str, len: usize| std::fs::write(at(name), vec![b'j'; len]).expect("written");
        put("longest", SECRET_BYTES_MAX);
        std::os::unix::fs::symlink("longest", at("projected")).expect("a link");
        assert_eq!(read_token_file(&at("projected")).expect("whole").len(), SECRET_BYTES_MAX);
        put("longer", SECRET_BYTES_MAX + 1);
        assert_eq!(read_token_file(&at("longer")).map(drop).expect_err("refused").code(), Code::KeyFormat);
        assert!(std::process::Command::new("mkfifo").arg(at("fifo")).status().expect("coreutils").success());
        for name in ["fifo", "."] {
            assert_eq!(read_token_file(&at(name)).map(drop).expect_err("refused").code(), Code::Usage, "{name}");
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (unix, want) in [
            (0, "19700101T000000Z"),
            (951_782_400, "20000229T000000Z"),
            (1_440_938_160, "20150830T123600Z"),
            (4_107_542_399, "21000228T235959Z"),
            (4_107_542_400, "21000301T000000Z"),
        ] {
            assert_eq!(amz_date(unix), want);
        }
    }
}
