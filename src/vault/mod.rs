//! HashiCorp Vault: who we are to it, and what it holds for us: wrapped keys, catalog records, floors, storage credentials.
//!
//! ```text
//!  VaultSettings ──open──> Vault ──(first use)──> login (auth) ──> token, in locked memory
//!                            │                                        └ renewed at two thirds, or a new login; one that
//!                            │                                          somebody else renews is read from its file again
//!                            └─ transit_*, kv_*, aws_* ──> wire (bounded, no redirects) ──> Vault
//! ```
//! In: names from local configuration, never from a store. Out: secrets in locked memory, or an error that names the cause
//! and the fix. All methods block and may be called from any thread: the client has a thread and a runtime of its own.
//! Promises: nothing is asked before it is needed; every call ends within the timeout; a token is in locked memory and in
//! no message; a mount learns through [`Vault::watch`] when Vault is away, sealed, or has taken our token; out of a loss leads
//! nothing but a new login.
//! Not here: what a wrapped key is for (`keys`), what is done when the token is lost (`daemon`).
//! Held by: tests/vault.rs against a live Vault, tests/hostile_vault.rs against one that lies.

mod auth;
mod aws;
mod health;
mod raw;
mod wire;

pub use aws::AwsRole;

use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustify::endpoint::Endpoint;
use serde_json::{Map, Value, json};
use tokio::sync::{Mutex, watch};
use vaultrs::api::kv2::requests::{
    DestroySecretVersionsRequest, ListSecretsRequest, ReadSecretRequest, SetSecretRequest, SetSecretRequestOptions,
};
use vaultrs::api::transit::requests::{
    DecryptDataRequest, EncryptDataRequest, ReadKeyRequest, RewrapDataRequest, SignDataRequest,
};
use vaultrs::api::transit::responses::ReadKeyData;
use zeroize::{Zeroize, Zeroizing};

pub use auth::{AuthMethod, SERVICE_ACCOUNT_TOKEN};
use auth::{EnvSecrets, Token};
pub use health::{Health, TokenSeen, ahead, health};
pub use raw::wipe_map;
use raw::{Method, Raw};
use wire::{Answer, Wire};

use crate::error::{Class, Code, Error, Result};
use crate::mem::{LockedBuf, Secret};
use crate::refuse;
use crate::telemetry::Telemetry;
use crate::telemetry::events::{Event, Kind, Severity};

/// Waits between attempts within one call, doubled each time.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Waits between attempts of the background, doubled up to the second.
const AWAY_FIRST: Duration = Duration::from_secs(1);
const AWAY_LAST: Duration = Duration::from_secs(60);
/// The second, of a mount that looks at its token more often than that.
const AWAY_CHECKED: Duration = Duration::from_secs(15);
/// The shortest time between two looks at a token: the last renewals before its longest life ends give less and less.
const LOOK_FIRST: Duration = Duration::from_millis(500);
/// The longest time between two looks at a token that never expires.
const LOOK_LAST: Duration = Duration::from_secs(3600);
/// The longest pause between attempts to log in after a loss: longer than the 15 minutes for which Vault counts failed logins
/// before it locks a user out, so that ours lock nobody out.
const LOST_LAST: Duration = Duration::from_secs(16 * 60);
/// Tokens that were replaced, still hold and are ended with ours. A login follows at 60 % of a token's life, so of lives of
/// one length one is left; more are left where an operator shortens them.
const REPLACED_MAX: usize = 8;
/// What an operator does about a loss.
const CURE: &str = "once its login works again, `modelfs unlock` lets a mount in";

/// How long a connection waits for another question: those of one start share it.
const IDLE_CONNECTION: Duration = Duration::from_secs(1);

/// How to reach Vault and as whom. Holds names and places, no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaultSettings {
    /// Without a path below it, as in `https://vault.example:8200`.
    pub address: String,
    pub namespace: Option<String>,
    /// PEM; then no other certificate authority is believed.
    pub ca_cert: Option<PathBuf>,
    pub client_cert: Option<PathBuf>,
    pub client_key: Option<PathBuf>,
    pub auth: AuthMethod,
    /// For a whole call, attempts included.
    pub timeout: Duration,
    /// How often the background asks whether the token still holds.
    pub check: Duration,
    /// A token that ends before its time was taken away by somebody: do not log in again by ourselves. Otherwise a login that
    /// was refused is tried again, with growing pauses.
    pub lock_on_loss: bool,
}

/// A key of the transit engine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TransitKey {
    pub mount: String,
    pub key: String,
}

impl std::fmt::Display for TransitKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.mount, self.key)
    }
}

/// How it stands between Vault and us.
#[derive(Debug, Clone)]
pub enum VaultState {
    /// Nothing was asked yet.
    Idle,
    /// `expires`: `None` for a token that does not.
    Live {
        expires: Option<Instant>,
    },
    /// No answer; what was obtained goes on.
    Away {
        why: Error,
    },
    Sealed {
        why: Error,
    },
    /// Our token does not hold any more, and we may not or shall not get another. Ends with a login, and with nothing else.
    Lost {
        why: Error,
    },
}

impl VaultState {
    pub const fn name(&self) -> &'static str {
        match self {
            VaultState::Idle => "idle",
            VaultState::Live { .. } => "live",
            VaultState::Away { .. } => "away",
            VaultState::Sealed { .. } => "sealed",
            VaultState::Lost { .. } => "lost",
        }
    }

    pub fn is_lost(&self) -> bool {
        matches!(self, VaultState::Lost { .. })
    }
}

/// A client of one Vault. Cheap to clone; its thread ends with the last clone.
#[derive(Clone)]
pub struct Vault {
    inner: Arc<Inner>,
}

struct Inner {
    settings: VaultSettings,
    wire: Wire,
    secrets: EnvSecrets,
    session: Mutex<Option<Arc<Token>>>,
    /// Tokens that a login replaced before their time was over. What was lent under them may be in use, so they are ended at
    /// the end, not before.
    replaced: std::sync::Mutex<Vec<Arc<Token>>>,
    /// Held while a login goes on beside a token that still serves: who gives tokens back waits for what it brings.
    relogin: Mutex<()>,
    /// Whether the task that keeps the token alive was started.
    tended: AtomicBool,
    state: watch::Sender<VaultState>,
    /// Who is told of logins and losses.
    telemetry: OnceLock<Arc<Telemetry>>,
    runtime: tokio::runtime::Handle,
    /// Dropped with the last clone: the thread ends.
    _alive: tokio::sync::oneshot::Sender<()>,
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vault({} by {})", self.inner.settings.address, self.inner.settings.auth.name())
    }
}

impl Vault {
    /// Asks nothing yet. Takes secrets of the login out of the environment.
    ///
    /// # Errors
    /// `USAGE` for an address, a certificate or a key that cannot be used.
    pub fn open(settings: &VaultSettings) -> Result<Vault> {
        let secrets = EnvSecrets::take(&settings.auth)?;
        let wire = Wire::new(http_client(settings)?, &settings.address, settings.namespace.clone(), settings.timeout);
        let host = |err| Error::new(Code::Host, "cannot start the thread that speaks with Vault").with_source(err);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(host)?;
        let (alive, ended) = tokio::sync::oneshot::channel::<()>();
        let handle = runtime.handle().clone();
        std::thread::Builder::new()
            .name("vault".into())
            .spawn(move || {
                // Ends when the sender is dropped, which is what an error says here.
                let _ = runtime.block_on(ended);
                runtime.shutdown_background();
            })
            .map_err(host)?;
        Ok(Vault {
            inner: Arc::new(Inner {
                settings: settings.clone(),
                wire,
                secrets,
                session: Mutex::new(None),
                replaced: std::sync::Mutex::default(),
                relogin: Mutex::default(),
                tended: AtomicBool::new(false),
                state: watch::Sender::new(VaultState::Idle),
                telemetry: OnceLock::new(),
                runtime: handle,
                _alive: alive,
            }),
        })
    }

    /// Tells of logins, renewals, losses and outages there from now on. Only the first call counts.
    pub fn report_to(&self, telemetry: Arc<Telemetry>) {
        // One client belongs to one process, whose telemetry is one.
        let _ = self.inner.telemetry.set(telemetry);
    }

    pub fn settings(&self) -> &VaultSettings {
        &self.inner.settings
    }

    pub fn state(&self) -> VaultState {
        self.inner.state.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<VaultState> {
        self.inner.state.subscribe()
    }

    /// For `status`: address, method, state, seconds left, why.
    pub fn status(&self) -> Value {
        let state = self.state();
        let mut shown = json!({
            "address": self.inner.settings.address,
            "auth": self.inner.settings.auth.name(),
            "state": state.name(),
        });
        match state {
            VaultState::Idle => {}
            VaultState::Live { expires } => {
                let left = expires.map(|at| at.saturating_duration_since(Instant::now()).as_secs());
                shown["token_seconds_left"] = json!(left);
            }
            VaultState::Away { why } | VaultState::Sealed { why } | VaultState::Lost { why } => {
                shown["why"] = json!(why.chain());
                shown["code"] = json!(why.code().name());
            }
        }
        shown
    }

    /// Logs in again after a loss: the operator said that it may (`unlock`), or our right was proved anew. Does nothing
    /// while nothing is lost.
    ///
    /// # Errors
    /// What refused the login; then it stays lost.
    pub fn forgive(&self) -> Result<()> {
        if !self.state().is_lost() {
            return Ok(());
        }
        let inner = self.inner.clone();
        self.run(async move { inner.patiently(|inner| async move { inner.come_back().await }).await })
    }

    /// Logs in now, if that was not done yet.
    pub fn login(&self) -> Result<()> {
        let inner = self.inner.clone();
        self.run(async move { inner.patiently(|inner| async move { inner.token().await.map(drop) }).await })
    }

    /// A data key, wrapped for the model and version that `context` stands for: `vault:vN:…`.
    pub fn transit_wrap(&self, at: &TransitKey, context: &[u8; 32], key: &Secret<32>) -> Result<String> {
        let plain = Zeroizing::new(STANDARD.encode(key.expose()));
        let what = format!("cannot wrap a key with transit {at}");
        let (at, context) = (at.clone(), STANDARD.encode(context));
        let answer = self.call(what.clone(), move || {
            let mut request = EncryptDataRequest::builder();
            let text: &str = &plain;
            request.mount(&at.mount).name(&at.key).context(&context).plaintext(text);
            WipedEncrypt(request.build().expect("every field has a value"))
        })?;
        let wrapped = answer.data.map(|data| data.ciphertext).unwrap_or_default();
        if !wrapped.starts_with("vault:v") {
            refuse!(VaultAnswer, "{what}: the answer is not vault:vN:…");
        }
        Ok(wrapped)
    }

    /// What [`Vault::transit_wrap`] wrapped.
    ///
    /// # Errors
    /// `SLOT_COMMIT` if it was wrapped for another context or with another key; `KEY_FORMAT` if it is no 32 bytes.
    pub fn transit_unwrap(&self, at: &TransitKey, context: &[u8; 32], wrapped: &str) -> Result<Secret<32>> {
        let what = format!("cannot unwrap a key with transit {at}");
        let (at, context, wrapped) = (at.clone(), STANDARD.encode(context), wrapped.to_owned());
        let answer = self.call(what.clone(), move || {
            let mut request = DecryptDataRequest::builder();
            request.mount(&at.mount).name(&at.key).context(&context).ciphertext(&wrapped);
            request.build().expect("every field has a value")
        })?;
        let plain = Zeroizing::new(answer.data.map(|data| data.plaintext).unwrap_or_default());
        decode_32(&plain, &what)
    }

    /// The same key under the newest version of the transit key. It does not leave Vault.
    pub fn transit_rewrap(&self, at: &TransitKey, context: &[u8; 32], wrapped: &str) -> Result<String> {
        let what = format!("cannot rewrap a key with transit {at}");
        let (at, context, wrapped) = (at.clone(), STANDARD.encode(context), wrapped.to_owned());
        let answer = self.call(what.clone(), move || {
            let mut request = RewrapDataRequest::builder();
            request.mount(&at.mount).name(&at.key).context(&context).ciphertext(&wrapped);
            request.build().expect("every field has a value")
        })?;
        let wrapped = answer.data.map(|data| data.ciphertext).unwrap_or_default();
        if !wrapped.starts_with("vault:v") {
            refuse!(VaultAnswer, "{what}: the answer is not vault:vN:…");
        }
        Ok(wrapped)
    }

    /// The newest version of a transit key.
    pub fn transit_latest_version(&self, at: &TransitKey) -> Result<u32> {
        let keys = match self.transit_key(at)? {
            ReadKeyData::Symmetric(keys) => keys.into_keys().collect::<Vec<_>>(),
            ReadKeyData::Asymmetric(keys) => keys.into_keys().collect(),
        };
        let newest = keys.iter().filter_map(|version| version.parse().ok()).max();
        newest.ok_or_else(|| Error::new(Code::VaultAnswer, format!("transit {at} has no versions")))
    }

    /// The Ed25519 signature of `message` under the newest version of a transit key.
    pub fn transit_sign(&self, at: &TransitKey, message: &[u8]) -> Result<[u8; 64]> {
        let what = format!("cannot sign with transit {at}");
        let (at, input) = (at.clone(), STANDARD.encode(message));
        let answer = self.call(what.clone(), move || {
            let mut request = SignDataRequest::builder();
            request.mount(&at.mount).name(&at.key).input(&input);
            request.build().expect("every field has a value")
        })?;
        let text = answer.data.map(|data| data.signature).unwrap_or_default();
        let decoded = text.rsplit_once(':').and_then(|(_, base64)| STANDARD.decode(base64).ok());
        match decoded.and_then(|bytes| <[u8; 64]>::try_from(bytes).ok()) {
            Some(signature) => Ok(signature),
            None => refuse!(VaultAnswer, "{what}: the answer is no Ed25519 signature; is the key of type ed25519?"),
        }
    }

    /// The public half of the newest version of an Ed25519 transit key.
    pub fn transit_public_key(&self, at: &TransitKey) -> Result<[u8; 32]> {
        let ReadKeyData::Asymmetric(keys) = self.transit_key(at)? else {
            refuse!(Usage, "transit key {at} has no public half; make one with type=ed25519");
        };
        let newest =
            keys.iter().filter_map(|(version, key)| Some((version.parse::<u32>().ok()?, key))).max_by_key(|k| k.0);
        let decoded = newest.and_then(|(_, key)| STANDARD.decode(&key.public_key).ok());
        match decoded.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok()) {
            Some(public) => Ok(public),
            None => refuse!(Usage, "transit key {at} is not of type ed25519"),
        }
    }

    fn transit_key(&self, at: &TransitKey) -> Result<ReadKeyData> {
        let what = format!("cannot read about transit {at}");
        let at = at.clone();
        let answer = self.call(what.clone(), move || {
            ReadKeyRequest::builder().mount(&at.mount).name(&at.key).build().expect("every field has a value")
        })?;
        let data = answer.data.map(|data| data.keys);
        data.ok_or_else(|| Error::new(Code::VaultAnswer, format!("{what}: the answer has no data")))
    }

    /// The text of one field of a KV v2 record, and the version it was read from.
    ///
    /// # Errors
    /// `VAULT_NOT_FOUND` naming the record or the field.
    pub fn kv_field(&self, mount: &str, path: &str, field: &str, version: Option<u32>) -> Result<(LockedBuf, u32)> {
        let of = version.map_or(String::new(), |version| format!(" version {version}"));
        let Some((mut data, read)) = self.kv_read(mount, path, version)? else {
            refuse!(VaultNotFound, "there is no record {mount}/{path}{of} in Vault (or it was deleted)");
        };
        let text = data.get(field).and_then(Value::as_str).map(|text| LockedBuf::copy_of(text.as_bytes()));
        wipe_map(&mut data);
        match text {
            Some(text) => Ok((text?, read)),
            None => refuse!(VaultNotFound, "record {mount}/{path}{of} in Vault has no text field {field}"),
        }
    }

    /// A KV v2 record and its version; `None` if there is none. The caller wipes what is secret in it ([`wipe_map`]).
    pub fn kv_read(&self, mount: &str, path: &str, version: Option<u32>) -> Result<Option<(Map<String, Value>, u32)>> {
        let what = format!("cannot read {mount}/{path} in Vault");
        let (at, path) = (mount.to_owned(), path.to_owned());
        let answer = self.call(what.clone(), move || {
            let mut request = ReadSecretRequest::builder();
            request.mount(&at).path(&path).version(version.map(u64::from));
            request.build().expect("every field has a value")
        });
        let data = match answer {
            Ok(answer) => answer.data,
            Err(missing) if missing.code() == Code::VaultNotFound => return Ok(None),
            Err(other) => return Err(other),
        };
        let Some(data) = data else {
            refuse!(VaultAnswer, "{what}: the answer has no data; is {mount} a KV v2 mount?")
        };
        let (Value::Object(fields), Ok(read)) = (data.data, u32::try_from(data.metadata.version)) else {
            refuse!(VaultAnswer, "{what}: the record is no set of fields");
        };
        Ok(Some((fields, read)))
    }

    /// The names one level below `path`; folders end in `/`. Nothing there lists nothing.
    pub fn kv_list(&self, mount: &str, path: &str) -> Result<Vec<String>> {
        let what = format!("cannot list {mount}/{path} in Vault");
        let (mount, path) = (mount.to_owned(), path.trim_end_matches('/').to_owned());
        let answer = self.call(what, move || {
            ListSecretsRequest::builder().mount(&mount).path(&path).build().expect("every field has a value")
        });
        match answer {
            Ok(answer) => Ok(answer.data.map(|data| data.keys).unwrap_or_default()),
            Err(missing) if missing.code() == Code::VaultNotFound => Ok(Vec::new()),
            Err(other) => Err(other),
        }
    }

    /// Writes a KV v2 record if its newest version is `cas` (0: if it is not there). Answers the version written.
    ///
    /// # Errors
    /// `EXISTS` if another version is there.
    pub fn kv_write(&self, mount: &str, path: &str, data: &Map<String, Value>, cas: u32) -> Result<u32> {
        let what = format!("cannot write {mount}/{path} in Vault");
        let (mount, path, data) = (mount.to_owned(), path.to_owned(), WipedMap(data.clone()));
        let answer = self.call(what.clone(), move || {
            let mut request = SetSecretRequest::builder();
            request.mount(&mount).path(&path).data(Value::Object(data.0.clone()));
            request.options(SetSecretRequestOptions { cas });
            request.build().expect("every field has a value")
        })?;
        let version = answer.data.and_then(|data| u32::try_from(data.version).ok());
        version.ok_or_else(|| Error::new(Code::VaultAnswer, format!("{what}: the answer names no version")))
    }

    /// Removes versions of a record for good.
    pub fn kv_destroy(&self, mount: &str, path: &str, versions: &[u32]) -> Result<()> {
        let what = format!("cannot destroy versions of {mount}/{path} in Vault");
        let (mount, path) = (mount.to_owned(), path.to_owned());
        let versions: Vec<u64> = versions.iter().copied().map(u64::from).collect();
        self.call(what, move || {
            let mut request = DestroySecretVersionsRequest::builder();
            request.mount(&mount).path(&path).versions(versions.clone());
            request.build().expect("every field has a value")
        })
        .map(drop)
    }

    /// Ends our token and those that it replaced and that still hold, and with them every lease that they took, at a clean
    /// end. A token that was given to us (`VAULT_TOKEN`, a file) is not ours to end. Answers whether one was ended.
    ///
    /// # Errors
    /// What refused the first that could not be ended; the others are ended all the same, if Vault answers.
    pub fn revoke_self(&self) -> Result<bool> {
        if self.inner.given() {
            return Ok(false);
        }
        let inner = self.inner.clone();
        self.run(async move {
            let token = {
                let mut session = inner.session.lock().await;
                let Some(token) = session.take() else { return Ok(false) };
                inner.state.send_replace(VaultState::Idle);
                token
            };
            // A login that is under way finds no session and leaves its token with the replaced ones.
            drop(inner.relogin.lock().await);
            let mut ended = Ok(true);
            for token in std::iter::once(token).chain(inner.take_replaced()) {
                let request = Raw::new(Method::Post, "auth/token/revoke-self".into(), None);
                let Err(failed) = inner.wire.send(request, Some(&token.text), "cannot revoke our token").await else {
                    continue;
                };
                let away = failed.class() == Class::Unreachable;
                ended = ended.and(Err(failed));
                if away {
                    break;
                }
            }
            ended
        })
    }

    /// Whether a token that asked for something ([`Answer::asked_by`]) still holds and is ours: what was lent to it is there
    /// then, unless somebody revoked it.
    fn owns(&self, token: [u8; 32]) -> bool {
        let inner = self.inner.clone();
        self.run(async move { inner.owns(token).await })
    }

    /// One request, logged in, tried again while Vault does not answer and time is left.
    fn call<E>(&self, what: String, request: impl Fn() -> E + Send + Sync + 'static) -> Result<Answer<E::Response>>
    where
        E: Endpoint + 'static,
        E::Response: 'static,
    {
        let inner = self.inner.clone();
        let request = Arc::new(request);
        let what: Arc<str> = what.into();
        self.run(async move {
            inner
                .patiently(|inner| {
                    let (request, what) = (request.clone(), what.clone());
                    async move { inner.ask(&*request, &what).await }
                })
                .await
        })
    }

    /// Runs on the client's own thread, so that it may be called from within another runtime.
    fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.inner.runtime.spawn(async move {
            // Nobody waits any more: then the answer is of no use.
            let _ = sender.send(work.await);
        });
        receiver.recv().expect("the client's thread lives as long as the client")
    }
}

impl Inner {
    /// Tries again while Vault is unreachable, until the timeout. An attempt that the timeout cuts off says less than the one
    /// before it, whose cause is answered then.
    async fn patiently<T, F>(self: &Arc<Self>, attempt: impl Fn(Arc<Inner>) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let deadline = Instant::now() + self.settings.timeout;
        let mut wait = RETRY_FIRST;
        let mut before: Option<Error> = None;
        loop {
            let within = deadline.saturating_duration_since(Instant::now());
            let outcome = match tokio::time::timeout(within, attempt(self.clone())).await {
                // One request has the same time as all of them: its clock may be the one that is seen first.
                Ok(Err(lost)) if lost.code() == Code::VaultUnreachable && Instant::now() >= deadline => {
                    Err(before.take().unwrap_or(lost))
                }
                Ok(outcome) => outcome,
                Err(_) => Err(before.take().unwrap_or_else(|| {
                    let (address, timeout) = (&self.settings.address, self.settings.timeout);
                    let why = format!("Vault at {address} did not answer within {timeout:?}; {}", wire::SLOW_CURE);
                    Error::new(Code::VaultUnreachable, why)
                })),
            };
            self.note(&outcome);
            match outcome {
                Err(lost) if lost.code() == Code::VaultUnreachable && Instant::now() + wait < deadline => {
                    before = Some(lost);
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(Duration::from_secs(2));
                }
                other => return other,
            }
        }
    }

    fn tell(&self, event: Event) {
        let Some(telemetry) = self.telemetry.get().filter(|telemetry| telemetry.events.any()) else { return };
        let at = format!("Vault at {} by {}", self.settings.address, self.settings.auth.name());
        let detail = event.detail.as_ref().map_or_else(|| at.clone(), |detail| format!("{at}: {detail}"));
        telemetry.events.tell(&event.detail(detail));
    }

    /// The token was given to us, by the environment or a file: we cannot get another by ourselves.
    fn given(&self) -> bool {
        matches!(self.settings.auth, AuthMethod::Token { .. })
    }

    /// Enters a state. Only that it is another one than before is worth telling. Out of a loss leads only
    /// [`Inner::come_back`], not an answer to what was asked before.
    fn turn(&self, state: VaultState) {
        let mut left = None;
        self.state.send_if_modified(|now| {
            let again = now.is_lost();
            if again && !state.is_lost() {
                return false;
            }
            left = Some(std::mem::replace(now, state.clone()));
            !again
        });
        let Some(was) = left else { return };
        let is_down = |state: &VaultState| matches!(state, VaultState::Away { .. } | VaultState::Sealed { .. });
        match &state {
            VaultState::Away { why } | VaultState::Sealed { why } if !is_down(&was) => {
                self.tell(Event::new(Kind::VaultDown).error(why));
            }
            VaultState::Live { .. } if is_down(&was) => self.tell(Event::new(Kind::VaultUp)),
            VaultState::Lost { why } if !was.is_lost() => {
                self.tell(Event::new(Kind::LeaseLost).error(why));
            }
            VaultState::Idle
            | VaultState::Live { .. }
            | VaultState::Away { .. }
            | VaultState::Sealed { .. }
            | VaultState::Lost { .. } => {}
        }
    }

    /// Says who we are. A Vault that does not answer is told of by its state.
    async fn log_in(&self) -> Result<Arc<Token>> {
        let token = auth::login(&self.settings.auth, &self.secrets, &self.wire).await;
        match &token {
            Ok(token) => {
                let lasts = token.ttl.map_or("it does not end".to_owned(), |ttl| format!("{} s", ttl.as_secs()));
                self.tell(Event::new(Kind::Login).detail(lasts));
            }
            Err(refused) if refused.class() != Class::Unreachable => {
                self.tell(Event::new(Kind::Login).severity(Severity::Medium).error(refused));
            }
            Err(_) => {}
        }
        token.map(Arc::new)
    }

    /// What an outcome says about Vault itself.
    fn note<T>(&self, outcome: &Result<T>) {
        match outcome {
            Err(why) if why.code() == Code::VaultSealed => self.turn(VaultState::Sealed { why: why.clone() }),
            Err(why) if why.code() == Code::VaultUnreachable => self.turn(VaultState::Away { why: why.clone() }),
            _ => {}
        }
    }

    /// One request with our token. A token that Vault does not know any more is replaced once by a new login.
    async fn ask<E: Endpoint>(
        self: &Arc<Self>,
        request: &(impl Fn() -> E + Sync),
        what: &str,
    ) -> Result<Answer<E::Response>> {
        let token = self.token().await?;
        let first = self.wire.send(request(), Some(&token.text), what).await;
        let refused = match first {
            Err(refused) if refused.code() == Code::VaultDenied => refused,
            Err(other) => return Err(other),
            Ok(answer) => {
                self.live(&token);
                return Ok(Answer { asked_by: Some(token.id), ..answer });
            }
        };
        // Is it this request that is not allowed, or is the token no more?
        match self.look(&token).await {
            Err(gone) if gone.code() == Code::VaultDenied => {
                let token = self.after_loss(&token, gone).await?;
                let answer = self.wire.send(request(), Some(&token.text), what).await?;
                Ok(Answer { asked_by: Some(token.id), ..answer })
            }
            _ => Err(refused),
        }
    }

    fn live(&self, token: &Token) {
        self.turn(VaultState::Live { expires: token.expires() });
    }

    async fn look(&self, token: &Token) -> Result<()> {
        let request = Raw::new(Method::Get, "auth/token/lookup-self".into(), None);
        let mut answer = self.wire.send(request, Some(&token.text), "cannot look up our token").await?;
        if let Some(Value::Object(data)) = &mut answer.data {
            wipe_map(data);
        }
        Ok(())
    }

    /// The token at hand, or a new one by logging in.
    async fn token(self: &Arc<Self>) -> Result<Arc<Token>> {
        let mut session = self.session.lock().await;
        if let VaultState::Lost { why } = &*self.state.borrow() {
            return Err(why.clone());
        }
        if let Some(token) = &*session
            && token.holds()
        {
            return Ok(token.clone());
        }
        let token = match self.log_in().await {
            Ok(token) => token,
            // We were in once, and that has ended.
            Err(refused) if session.is_some() => return Err(self.refused_again(refused)),
            Err(refused) => return Err(refused),
        };
        *session = Some(token.clone());
        self.live(&token);
        if !self.tended.swap(true, Ordering::Relaxed) {
            tracing::debug!(auth = self.settings.auth.name(), "logged in to Vault");
            tokio::spawn(tend(Arc::downgrade(self)));
        }
        Ok(token)
    }

    /// The token ended: after its time a new login is what anyone expects; before it, somebody took it away. Of a token that
    /// somebody else renews the file is asked first.
    async fn after_loss(self: &Arc<Self>, old: &Arc<Token>, gone: Error) -> Result<Arc<Token>> {
        match self.adopt(old).await {
            Ok(Some(newer)) => return Ok(newer),
            Err(away) if away.class() == Class::Unreachable => return Err(away),
            Ok(None) => {}
            Err(refused) => tracing::warn!("the token in the file is no better: {}", refused.chain()),
        }
        let mut session = self.session.lock().await;
        match &*session {
            Some(held) if held.id != old.id => return Ok(held.clone()),
            Some(_) => {}
            // Nobody took it away: we gave it back while this was asked, and nothing is to outlive that.
            None => return Err(gone.context("our Vault token was given back")),
        }
        if let VaultState::Lost { why } = &*self.state.borrow() {
            return Err(why.clone());
        }
        let expired = old.expires().is_some_and(|at| at <= Instant::now() + Duration::from_secs(1));
        if self.given() || (!expired && self.settings.lock_on_loss) {
            let why = gone.context(format!("our Vault token was revoked or has expired ({CURE})"));
            self.turn(VaultState::Lost { why: why.clone() });
            return Err(why);
        }
        match self.log_in().await {
            Ok(token) => {
                tracing::info!("logged in to Vault again");
                *session = Some(token.clone());
                self.live(&token);
                Ok(token)
            }
            Err(refused) => Err(self.refused_again(refused)),
        }
    }

    /// A login that followed a token which has ended: if it is refused, rather than not answered, all is lost.
    fn refused_again(&self, refused: Error) -> Error {
        if !matches!(refused.class(), Class::Denied | Class::Usage) {
            return refused;
        }
        let why = refused.context(format!("our Vault token is gone and a new login is refused ({CURE})"));
        self.turn(VaultState::Lost { why: why.clone() });
        why
    }

    /// The way out of a loss: a new login, or the token that is in the file now.
    async fn come_back(self: &Arc<Self>) -> Result<()> {
        let mut session = self.session.lock().await;
        if !self.state.borrow().is_lost() {
            return Ok(());
        }
        let token = self.log_in().await.map_err(|refused| self.refused_again(refused))?;
        tracing::warn!("Vault takes us again");
        self.state.send_replace(VaultState::Live { expires: token.expires() });
        *session = Some(token);
        Ok(())
    }

    /// Tries to come back, where no loss is to last until somebody says so. `wait` is the pause of before, zero at first; the
    /// answer is when to try again. A file is looked at as often as a token is and asks nothing of Vault until it changes;
    /// logins come ever more seldom.
    async fn after_a_loss(self: &Arc<Self>, lost: Option<&Token>, wait: &mut Duration) -> Duration {
        let check = self.settings.check;
        let from_file = auth::token_in_file(&self.settings.auth, &self.secrets).is_some();
        if from_file && lost.is_some_and(|lost| !self.file_changed(lost)) {
            return check;
        }
        if !from_file && wait.is_zero() {
            *wait = check * 2;
            return *wait;
        }
        let Err(refused) = self.come_back().await else { return Duration::ZERO };
        tracing::warn!("Vault: {}", refused.chain());
        if from_file {
            return self.refused_file_wait();
        }
        *wait = wait.saturating_mul(2).min(LOST_LAST.max(check));
        wait.mul_f64(1.0 + 0.1 * dice())
    }

    /// How long a token in a file that was refused is left alone: it tells somebody's log each time.
    fn refused_file_wait(&self) -> Duration {
        (self.settings.check * 10).min(AWAY_LAST)
    }

    /// Whether the file of our token holds another one than `old`.
    fn file_changed(&self, old: &Token) -> bool {
        auth::token_in_file(&self.settings.auth, &self.secrets).is_some_and(|text| text[..] != old.text[..])
    }

    /// Takes over the token that whoever renews it (Vault Agent) has put into the file in place of `old`. `None`: there is
    /// no other.
    ///
    /// # Errors
    /// Vault does not answer, or does not take it.
    async fn adopt(&self, old: &Token) -> Result<Option<Arc<Token>>> {
        if !self.file_changed(old) {
            return Ok(None);
        }
        let mut session = self.session.lock().await;
        if self.state.borrow().is_lost() {
            return Ok(None);
        }
        if let Some(newer) = session.as_ref().filter(|newer| newer.id != old.id) {
            return Ok(Some(newer.clone()));
        }
        let token = self.log_in().await?;
        tracing::info!("took over the new token in the file");
        *session = Some(token.clone());
        self.live(&token);
        Ok(Some(token))
    }

    /// Renews the token, or replaces it where it cannot be renewed (for long enough).
    async fn renew(self: &Arc<Self>, token: &Arc<Token>) -> Result<()> {
        let mut held = token.clone();
        if token.renewable {
            let request = Raw::new(Method::Post, "auth/token/renew-self".into(), None);
            let answer = self.wire.send(request, Some(&token.text), "cannot renew our token").await;
            match answer {
                Ok(answer) => {
                    let fresh = Arc::new(token.renewed(answer)?);
                    // Near the end of its longest life a renewal gives less and less: log in while the old one holds.
                    let worth = fresh.ttl.is_none_or(|ttl| token.ttl.is_none_or(|old| ttl * 2 >= old));
                    match &mut *self.session.lock().await {
                        Some(held) if held.id == fresh.id => *held = fresh.clone(),
                        // Given back or replaced meanwhile.
                        _ => return Ok(()),
                    }
                    self.live(&fresh);
                    self.tell(Event::new(Kind::Renewal));
                    if worth || self.given() {
                        return Ok(());
                    }
                    held = fresh;
                }
                Err(gone) if gone.code() == Code::VaultDenied => {
                    return match self.look(token).await {
                        Err(gone) if gone.code() == Code::VaultDenied => self.after_loss(token, gone).await.map(drop),
                        Err(other) => Err(other),
                        // The policy does not let us renew: the token still holds.
                        Ok(()) => self.log_in_anew(token).await,
                    };
                }
                Err(other) => return Err(other),
            }
        }
        self.log_in_anew(&held).await
    }

    async fn log_in_anew(self: &Arc<Self>, old: &Arc<Token>) -> Result<()> {
        if self.given() {
            return Ok(());
        }
        let _relogin = self.relogin.lock().await;
        if self.session.lock().await.as_ref().is_none_or(|held| held.id != old.id) {
            return Ok(());
        }
        match self.log_in().await {
            Ok(token) => {
                let mut session = self.session.lock().await;
                match &mut *session {
                    Some(held) if held.id == old.id => *held = token.clone(),
                    // Given back or replaced meanwhile: it serves nobody, and is ended with the others.
                    _ => {
                        self.keep_replaced(token);
                        return Ok(());
                    }
                }
                drop(session);
                self.keep_replaced(old.clone());
                self.live(&token);
                Ok(())
            }
            Err(refused) if old.expires().is_some_and(|at| at <= Instant::now()) => Err(self.refused_again(refused)),
            // The old token still holds: there is time to try again.
            Err(refused) => Err(refused),
        }
    }

    fn keep_replaced(&self, old: Arc<Token>) {
        let mut replaced = self.replaced.lock().expect("a thread died holding the replaced tokens");
        replaced.push(old);
        replaced.retain(|token| token.holds());
        if replaced.len() > REPLACED_MAX {
            // The first to end is the one that matters least. One that never ends is not replaced.
            let soonest = (0..replaced.len()).min_by_key(|at| replaced[*at].expires());
            replaced.remove(soonest.expect("there are more than none"));
        }
    }

    async fn owns(&self, id: [u8; 32]) -> bool {
        let session = self.session.lock().await;
        if session.as_ref().is_some_and(|token| token.id == id && token.holds()) {
            return true;
        }
        let replaced = self.replaced.lock().expect("a thread died holding the replaced tokens");
        replaced.iter().any(|token| token.id == id && token.holds())
    }

    /// Those that still hold.
    fn take_replaced(&self) -> Vec<Arc<Token>> {
        let mut replaced = self.replaced.lock().expect("a thread died holding the replaced tokens");
        std::mem::take(&mut *replaced).into_iter().filter(|token| token.holds()).collect()
    }
}

/// Keeps the token alive and learns when it is taken away; ends with the client.
async fn tend(inner: Weak<Inner>) {
    let mut away = AWAY_FIRST;
    let mut pause = Duration::ZERO;
    // Between logins after a loss, and until when a token in the file is not tried.
    let (mut wait, mut refused_until) = (Duration::ZERO, Instant::now());
    loop {
        let Some(now) = inner.upgrade() else { return };
        let token = now.session.lock().await.clone();
        let check = now.settings.check;
        let mut state = now.state.subscribe();
        let lost = state.borrow().is_lost();
        drop(now);
        let due = match &token {
            // At two thirds of its life, a little earlier or later each time, so that a fleet does not come at once.
            Some(token) => token.ttl.map_or(LOOK_LAST, |ttl| {
                let at = token.got + ttl.mul_f64(0.6 + 0.1 * dice());
                at.saturating_duration_since(Instant::now()).max(LOOK_FIRST)
            }),
            None => LOOK_LAST,
        };
        tokio::select! {
            () = tokio::time::sleep(if pause.is_zero() { due.min(check) } else { pause }) => {}
            // Somebody else has ended the loss: the new token is looked after from its first day.
            () = async { drop(state.wait_for(|state| !state.is_lost()).await) }, if lost => {}
        }
        let Some(now) = inner.upgrade() else { return };
        if now.state.borrow().is_lost() {
            pause = if now.settings.lock_on_loss { check } else { now.after_a_loss(token.as_deref(), &mut wait).await };
            continue;
        }
        wait = Duration::ZERO;
        let Some(mut token) = now.session.lock().await.clone() else { continue };
        if refused_until <= Instant::now() {
            match now.adopt(&token).await {
                Ok(Some(newer)) => token = newer,
                Ok(None) => {}
                Err(refused) => {
                    tracing::warn!("the new token in the file is not taken over: {}", refused.chain());
                    refused_until = Instant::now() + now.refused_file_wait();
                }
            }
        }
        let renew = token.ttl.is_some_and(|ttl| token.got.elapsed() >= ttl.mul_f64(0.6));
        let outcome = if renew && (token.renewable || !now.given()) {
            now.renew(&token).await
        } else {
            match now.look(&token).await {
                Err(gone) if gone.code() == Code::VaultDenied => now.after_loss(&token, gone).await.map(drop),
                other => other,
            }
        };
        now.note(&outcome);
        match outcome {
            Ok(()) => {
                // A token that cannot be renewed, given to us so that we cannot log in, is watched until it ends.
                let same = now.session.lock().await.as_ref().is_some_and(|held| Arc::ptr_eq(held, &token));
                (away, pause) = (AWAY_FIRST, if renew && same { check } else { Duration::ZERO });
                // Vault answered and knows it. Of one that took its place whoever put it there has told.
                if same {
                    now.live(&token);
                }
            }
            Err(error) => {
                tracing::warn!("Vault: {}", error.chain());
                (pause, away) = away_pause(away, check, dice());
            }
        }
    }
}

/// How long to leave a Vault alone that does not answer or is sealed, and the longest time after that. Away it takes nothing
/// from anybody, so a fleet need not ask it as often as one that is there. `dice` is between 0 and 1.
fn away_pause(away: Duration, check: Duration, dice: f64) -> (Duration, Duration) {
    let longest = check.clamp(AWAY_CHECKED, AWAY_LAST);
    (away.min(longest).mul_f64(0.9 + 0.2 * dice), (away * 2).min(longest))
}

/// Between 0 and 1; where there are no random bytes, the middle.
fn dice() -> f64 {
    let mut byte = [128u8];
    let _ = getrandom::fill(&mut byte);
    f64::from(byte[0]) / 255.0
}

fn decode_32(text: &str, what: &str) -> Result<Secret<32>> {
    let mut wide = Zeroizing::new([0u8; 64]);
    let len = STANDARD.decode_slice(text, &mut wide[..]).ok();
    if len != Some(32) {
        refuse!(KeyFormat, "{what}: Vault's answer is not 32 bytes in base64; was it wrapped by modelfs?");
    }
    let mut key = [0u8; 32];
    key.copy_from_slice(&wide[..32]);
    Ok(Secret::from_bytes(&mut key))
}

fn http_client(settings: &VaultSettings) -> Result<reqwest::Client> {
    let usage = |err: reqwest::Error| Error::new(Code::Usage, "Vault cannot be reached this way").with_source(err);
    let read = |path: &PathBuf| {
        std::fs::read(path)
            .map_err(|err| Error::new(Code::Usage, format!("cannot read {}", path.display())).with_source(err))
    };
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("modelfs/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(settings.timeout)
        // What was sent, the token too, lies in a connection's buffer as long as that waits for its next use.
        .pool_idle_timeout(IDLE_CONNECTION)
        .no_proxy();
    if let Some(path) = &settings.ca_cert {
        let certificates = reqwest::Certificate::from_pem_bundle(&read(path)?);
        let certificates =
            certificates.map_err(|err| usage(err).context(format!("vault-ca-cert {}", path.display())))?;
        if certificates.is_empty() {
            refuse!(Usage, "vault-ca-cert {} holds no certificate in PEM", path.display());
        }
        builder = builder.tls_certs_only(certificates);
    }
    match (&settings.client_cert, &settings.client_key) {
        (Some(cert), Some(key)) => {
            let mut pem = Zeroizing::new(read(cert)?);
            pem.push(b'\n');
            pem.extend_from_slice(&crate::mem::read_private_file(key, 64 << 10)?);
            let identity = reqwest::Identity::from_pem(&pem);
            let identity = identity.map_err(|err| usage(err).context("vault-client-cert and vault-client-key"))?;
            builder = builder.identity(identity);
        }
        (None, None) => {}
        _ => refuse!(Usage, "vault-client-cert and vault-client-key belong together; give both"),
    }
    builder.build().map_err(usage)
}

/// A request that holds a data key, wiped when it was sent.
struct WipedEncrypt(EncryptDataRequest);

impl Drop for WipedEncrypt {
    fn drop(&mut self) {
        self.0.plaintext.zeroize();
    }
}

impl Endpoint for WipedEncrypt {
    type Response = vaultrs::api::transit::responses::EncryptDataResponse;
    const REQUEST_BODY_TYPE: rustify::enums::RequestType = EncryptDataRequest::REQUEST_BODY_TYPE;
    const RESPONSE_BODY_TYPE: rustify::enums::ResponseType = EncryptDataRequest::RESPONSE_BODY_TYPE;

    fn path(&self) -> String {
        self.0.path()
    }
    fn method(&self) -> rustify::enums::RequestMethod {
        self.0.method()
    }
    fn body(&self) -> Result<Option<Vec<u8>>, rustify::errors::ClientError> {
        self.0.body()
    }
}

struct WipedMap(Map<String, Value>);

impl Drop for WipedMap {
    fn drop(&mut self) {
        wipe_map(&mut self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// A client of a place where nobody is.
    fn client(timeout: Duration) -> Vault {
        let settings = VaultSettings {
            address: "http://127.0.0.1:9".into(),
            namespace: None,
            ca_cert: None,
            client_cert: None,
            client_key: None,
            auth: AuthMethod::Cert { mount: "cert".into(), role: None },
            timeout,
            check: Duration::from_secs(600),
            lock_on_loss: false,
        };
        Vault::open(&settings).expect("usable")
    }

    /// The first attempt answers at once, however slow the machine is; the others never do.
    fn asked_in_vain(timeout: Duration) -> (Error, usize) {
        let (vault, attempts) = (client(timeout), Arc::new(AtomicUsize::new(0)));
        let (inner, counted) = (vault.inner.clone(), attempts.clone());
        let outcome = vault.run(async move {
            let attempt = |_| {
                let number = counted.fetch_add(1, Ordering::SeqCst);
                async move {
                    match number {
                        0 => Err(Error::new(Code::VaultUnreachable, "a gateway answers 502")),
                        _ => std::future::pending::<Result<()>>().await,
                    }
                }
            };
            inner.patiently(attempt).await
        });
        (outcome.expect_err("nobody answers"), attempts.load(Ordering::SeqCst))
    }

    #[test]
    fn an_attempt_that_the_timeout_cuts_off_hides_no_cause_that_one_before_it_had() {
        let mut timeout = RETRY_FIRST * 3;
        loop {
            let (error, attempts) = asked_in_vain(timeout);
            assert!(error.chain().contains("a gateway answers 502"), "{}", error.chain());
            if attempts > 1 {
                return;
            }
            // A machine that stood still for all of the time made one attempt only, which proves nothing.
            assert!(timeout < Duration::from_secs(120), "a second attempt is never made");
            timeout *= 2;
        }
    }

    #[test]
    fn a_vault_that_never_answers_is_named_with_what_to_do() {
        let vault = client(RETRY_FIRST);
        let inner = vault.inner.clone();
        let outcome = vault.run(async move { inner.patiently(|_| std::future::pending::<Result<()>>()).await });
        let chain = outcome.expect_err("nobody answers").chain();
        assert!(chain.contains("did not answer within") && chain.contains("raise vault-timeout"), "{chain}");
    }

    #[test]
    fn a_vault_that_stays_away_is_asked_less_and_less_often_and_never_given_up() {
        let pauses = |check: Duration, dice: f64| {
            let mut away = AWAY_FIRST;
            let mut next = || {
                let pause;
                (pause, away) = away_pause(away, check, dice);
                pause.as_secs_f64()
            };
            (0..12).map(|_| next()).collect::<Vec<_>>()
        };
        let calm = pauses(Duration::from_millis(500), 0.5);
        assert_eq!(calm[..5], [1.0, 2.0, 4.0, 8.0, 15.0]);
        assert_eq!(calm[11], 15.0, "it is bounded, and does not end");
        assert_eq!(pauses(Duration::from_secs(60), 0.5)[11], 60.0);
        let (early, late) = (pauses(Duration::from_millis(500), 0.0), pauses(Duration::from_millis(500), 1.0));
        assert!(early[11] < 14.0 && late[11] > 16.0, "a fleet does not come at once");
    }
}
