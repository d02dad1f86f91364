//! One request to Vault and its answer, bounded in bytes and time.
//!
//! In: a request type of vaultrs. Out: the parsed answer, or an error that names the cause.
//! Promises: redirects are not followed, bodies are cut off at [`ANSWER_BYTES_MAX`] and overwritten after parsing, every
//! request ends within its timeout; no error repeats a token, a key or more than a line of what the server said.
//! Held by: tests/hostile_vault.rs.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustify::endpoint::Endpoint;
use rustify::errors::ClientError;
use serde_json::Value;
use vaultrs::api::{EndpointMiddleware, EndpointResult};
use zeroize::{Zeroize, Zeroizing};

use super::raw::wipe_map;
use crate::error::{Code, Error, Result};
use crate::mem::LockedBuf;
use crate::telemetry::MASK;

/// Longest answer that is read: a listing of some ten thousand names. Keys and tokens take less than 2 KiB.
pub const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Longest piece of what a server says that is repeated.
const SAID_BYTES_MAX: usize = 300;

/// What to do about an answer that does not come.
pub const SLOW_CURE: &str = "look at Vault, or raise vault-timeout";
/// What to do about an answer that Vault never gives.
const STRANGER_CURE: &str = "is vault-addr Vault's own address?";

/// The longest time that an answer is believed to speak of. Vault's own limit is 32 days unless an operator raises it, and a
/// clock cannot be advanced by whatever a number has room for.
const LASTING_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// For how long, by the seconds that an answer tells.
pub fn lasting(seconds: u64) -> Duration {
    Duration::from_secs(seconds).min(LASTING_MAX)
}

/// How to reach one Vault.
#[derive(Clone)]
pub struct Wire {
    http: reqwest::Client,
    base: Arc<str>,
    namespace: Option<String>,
    timeout: Duration,
}

/// What an answer says beside its data.
pub struct Answer<T> {
    /// Which of our tokens asked, where one did.
    pub asked_by: Option<[u8; 32]>,
    pub data: Option<T>,
    pub auth: Option<vaultrs::api::AuthInfo>,
    pub lease_id: String,
    pub lease: Duration,
    pub renewable: bool,
}

impl Wire {
    pub fn new(http: reqwest::Client, base: &str, namespace: Option<String>, timeout: Duration) -> Wire {
        Wire { http, base: base.into(), namespace, timeout }
    }

    /// Sends `request`, with `token` if there is one. `what` is the request for people, as in `unwrap with transit/models`.
    ///
    /// # Errors
    /// `VAULT_UNREACHABLE`, `VAULT_SEALED`, `VAULT_DENIED`, `VAULT_NOT_FOUND`, `VAULT_ANSWER`; `EXISTS` for a check-and-set
    /// that failed.
    pub async fn send<E: Endpoint>(
        &self,
        request: E,
        token: Option<&LockedBuf>,
        what: &str,
    ) -> Result<Answer<E::Response>> {
        let path = request.path();
        if path.split('/').any(|step| step == "." || step == "..") {
            // A URL would drop them and name something else.
            return Err(Error::new(
                Code::Usage,
                format!("{what}: {path:?} is no path in Vault; write it without dots"),
            ));
        }
        let middleware = EndpointMiddleware {
            // The token is added where the request leaves, so that it lies in no struct of a library.
            token: String::new(),
            version: "v1".into(),
            wrap: None,
            namespace: self.namespace.clone(),
        };
        let transport = Transport { wire: self, token };
        let request = request.with_middleware(&middleware);
        let sent = request.exec(&transport).await;
        let mut result = sent.map_err(|err| {
            let body = Zeroizing::new(request.body().ok().flatten().unwrap_or_default());
            self.refused(err, what, &path, &Told { token: token.map_or(&[], |token| &token[..]), body: &body })
        })?;
        let body = result.response.body_mut();
        if body.is_empty() {
            return Ok(Answer {
                asked_by: None,
                data: None,
                auth: None,
                lease_id: String::new(),
                lease: Duration::ZERO,
                renewable: false,
            });
        }
        let parsed = serde_json::from_slice::<EndpointResult<E::Response>>(body);
        let len = body.len();
        body.zeroize();
        let parsed = parsed.map_err(|err| {
            let kind = err.classify();
            let why = format!("{what}: Vault's answer of {len} bytes has not the shape it should ({kind:?})");
            Error::new(Code::VaultAnswer, format!("{why}; {STRANGER_CURE}"))
        })?;
        for warning in parsed.warnings.iter().flatten() {
            tracing::debug!("Vault warns: {}", line_of(warning));
        }
        Ok(Answer {
            asked_by: None,
            data: parsed.data,
            auth: parsed.auth,
            lease_id: parsed.lease_id,
            lease: lasting(parsed.lease_duration.into()),
            renewable: parsed.renewable,
        })
    }

    fn refused(&self, err: ClientError, what: &str, path: &str, told: &Told) -> Error {
        let path = path.trim().trim_start_matches('/');
        match err {
            ClientError::GenericError { source } => match source.downcast_ref::<Error>() {
                Some(ours) => ours.clone().context(format!("{what}: Vault at {} gives no answer", self.base)),
                None => Error::new(Code::VaultAnswer, format!("{what}: {}", line_of(&source.to_string()))),
            },
            ClientError::ServerResponseError { code, content } => {
                let content = Zeroizing::new(content.unwrap_or_default());
                self.status(code, &content, what, path, told)
            }
            ClientError::UrlParseError { .. } | ClientError::UrlBuildError { .. } => {
                Error::new(Code::Usage, format!("{what}: {path:?} makes no URL below {}", self.base))
            }
            other => Error::new(Code::VaultAnswer, format!("{what}: {}", line_of(&other.to_string()))),
        }
    }

    fn status(&self, status: u16, content: &str, what: &str, path: &str, told: &Told) -> Error {
        #[derive(serde::Deserialize)]
        struct Errors {
            errors: Vec<String>,
        }
        let errors: Option<Errors> = serde_json::from_str(content).ok();
        let said = errors.as_ref().map(|errors| line_of(&told.hide(&errors.errors.join("; ")))).unwrap_or_default();
        let has = |text: &str| said.contains(text);
        let says = if said.is_empty() { String::new() } else { format!(", Vault says: {said}") };
        let place = &self.base;
        let (code, why) = match status {
            300..400 => (
                Code::VaultAnswer,
                format!("{place} redirects, which is not followed; name the active server's own address"),
            ),
            // A gateway whose Vault is away says so with a page of its own: that is no answer of anybody's.
            502..=504 if errors.is_none() => (
                Code::VaultUnreachable,
                format!("something between us and Vault at {place} answers {status}; is Vault behind it up?"),
            ),
            _ if errors.is_none() && status != 404 => (
                Code::VaultAnswer,
                format!("{place} answers {status} with something that is not Vault's; is this address Vault's?"),
            ),
            503 if has("sealed") => (Code::VaultSealed, format!("Vault at {place} is sealed; unseal it")),
            501 => (Code::VaultSealed, format!("Vault at {place} is not initialised; initialise it")),
            // Vault 1.13.0 calls these its own fault: a wrong password, of which asking again would lock the user out, and a
            // client certificate that is over.
            500 if path.starts_with("auth/")
                && (has("invalid username or password") || has("failed to verify client's certificate")) =>
            {
                (Code::VaultDenied, format!("Vault refuses the credentials at {path}{says}"))
            }
            429 | 472 | 473 | 500..600 => {
                (Code::VaultUnreachable, format!("Vault at {place} answers {status}; look at its log{says}"))
            }
            // How Vault 1.13 says it, and how it says it of a renewal.
            400 if path.starts_with("sys/leases/") && (has("invalid lease") || has("lease not found")) => {
                (Code::VaultNotFound, format!("there is no such lease: it has ended, or was revoked{says}"))
            }
            400 if has("check-and-set") => (Code::Exists, "somebody else wrote it first".into()),
            400 if has("wrapping token is not valid") => (
                Code::VaultDenied,
                "the wrapped secret-id was unwrapped before, or has expired. Was it unwrapped by this server before a \
                 restart? What came out is kept in memory only: wrap a new one for each start. If not, somebody has it: \
                 destroy the secret-id, then issue a new one"
                    .into(),
            ),
            400 if has("encryption key not found") || has("signing key not found") => {
                (Code::VaultNotFound, format!("there is no such transit key ({path}); make it, or name another"))
            }
            400 if has("version is too new") => (
                Code::SlotCommit,
                "the transit key has no such version. Was Vault restored from before the key was rotated? docs/RECOVERY.md, drill \
                 4, has the way back. If not, the slot is not this key's"
                    .into(),
            ),
            400 if has("message authentication failed") || has("invalid ciphertext") => {
                (Code::SlotCommit, "it was not wrapped with this transit key for this model and version".into())
            }
            400 if has("too old") => {
                (
                    Code::VaultDenied,
                    format!(
                        "it is wrapped with a retired version of the key; rewrap it (`modelfs key rotate --rewrap`, for a \
                         record of a catalog with --register){says}"
                    ),
                )
            }
            403 if path.starts_with("auth/") => (Code::VaultDenied, format!("Vault refuses the login at {path}{says}")),
            400 | 401 if path.starts_with("auth/") => {
                (Code::VaultDenied, format!("Vault refuses the credentials at {path}{says}"))
            }
            403 => (
                Code::VaultDenied,
                format!(
                    "the token may not use {path}; its policy needs that path, or the token was revoked or has \
                     expired{says}"
                ),
            ),
            404 => (Code::VaultNotFound, format!("there is nothing at {path}; are mount and name right?{says}")),
            _ => (Code::VaultDenied, format!("Vault refuses ({status}){says}")),
        };
        Error::new(code, format!("{what}: {why}"))
    }
}

/// What a request told the server: a server that repeats it in an error must not bring it into our messages.
struct Told<'a> {
    token: &'a [u8],
    body: &'a [u8],
}

/// Fields of requests that are names, and useful in a message.
const NAMES: &[&str] = &["role", "role_id", "name", "context", "ciphertext", "lease_id", "iam_request_url"];
/// Shorter values would blot out words.
const HIDDEN_BYTES_MIN: usize = 4;

impl Told<'_> {
    fn hide(&self, said: &str) -> String {
        let mut said = said.to_owned();
        if let Ok(token) = std::str::from_utf8(self.token) {
            hide(&mut said, token);
        }
        if let Ok(Value::Object(mut body)) = serde_json::from_slice(self.body) {
            body.iter().filter(|(name, _)| !NAMES.contains(&name.as_str())).for_each(|(_, v)| hide_value(&mut said, v));
            wipe_map(&mut body);
        }
        said
    }
}

fn hide_value(said: &mut String, value: &Value) {
    match value {
        Value::String(text) => hide(said, text),
        Value::Array(values) => values.iter().for_each(|value| hide_value(said, value)),
        Value::Object(map) => map.values().for_each(|value| hide_value(said, value)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn hide(said: &mut String, secret: &str) {
    if secret.len() >= HIDDEN_BYTES_MIN && said.contains(secret) {
        *said = said.replace(secret, MASK);
    }
}

/// One line of what a server said, without control characters.
fn line_of(said: &str) -> String {
    let mut line: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SAID_BYTES_MAX).collect();
    line.truncate(line.trim_end().len());
    line
}

struct Transport<'a> {
    wire: &'a Wire,
    token: Option<&'a LockedBuf>,
}

impl Transport<'_> {
    async fn exchange(&self, request: http::Request<Vec<u8>>) -> Result<http::Response<Vec<u8>>> {
        let lost = |err: reqwest::Error| {
            let why = if err.is_timeout() {
                format!("no answer in time; {SLOW_CURE}")
            } else {
                "the connection failed; is Vault up, is vault-addr its address, and vault-ca-cert of its authority?"
                    .into()
            };
            // The URL holds names only, but people know it already.
            Error::new(Code::VaultUnreachable, why).with_source(err.without_url())
        };
        let mut request = reqwest::Request::try_from(request).map_err(lost)?;
        *request.timeout_mut() = Some(self.wire.timeout);
        if let Some(token) = self.token {
            let value = http::HeaderValue::from_bytes(token);
            let mut value =
                value.map_err(|_| Error::new(Code::KeyFormat, "the Vault token has characters that no token has"))?;
            value.set_sensitive(true);
            request.headers_mut().insert("X-Vault-Token", value);
        }
        let mut response = self.wire.http.execute(request).await.map_err(lost)?;
        let status = response.status();
        let mut body = Zeroizing::new(Vec::new());
        while let Some(piece) = response.chunk().await.map_err(lost)? {
            if body.len() + piece.len() > ANSWER_BYTES_MAX {
                return Err(Error::new(
                    Code::VaultAnswer,
                    format!("an answer of more than {ANSWER_BYTES_MAX} bytes is none of Vault's; {STRANGER_CURE}"),
                ));
            }
            // A vector that grows leaves its old place behind; here it is wiped.
            if body.len() + piece.len() > body.capacity() {
                let mut larger = Vec::with_capacity((body.len() + piece.len()).next_power_of_two());
                larger.extend_from_slice(&body);
                *body = larger;
            }
            body.extend_from_slice(&piece);
        }
        let answer = http::Response::builder().status(status.as_u16()).body(std::mem::take(&mut *body));
        answer.map_err(|err| Error::new(Code::VaultAnswer, "a status that is none").with_source(err))
    }
}

#[async_trait]
impl rustify::client::Client for Transport<'_> {
    async fn send(&self, request: http::Request<Vec<u8>>) -> Result<http::Response<Vec<u8>>, ClientError> {
        self.exchange(request).await.map_err(|err| ClientError::GenericError { source: err.into() })
    }

    fn base(&self) -> &str {
        &self.wire.base
    }
}
