//! Vault and the store: whether they answer, whether they know us, whether their clocks agree with ours.
//!
//! In: a [`Setup`]. Out: what was seen of each, and the rules that judge it.
//! Promises: nothing is written; a service that hangs costs the time given, and is told so; no secret is in what is seen.
//! Held by: `doctor::tests`, tests/doctor.sh against a live Vault and a live store.

use std::time::{Duration, Instant, SystemTime};

use super::setup::Setup;
use super::{Info, Machine, Said, Stops, Warning, fine, hint};
use crate::config::Access;
use crate::error::{Class, Code, Error};
use crate::format::{ModelId, names};
use crate::keys::KeySource;
use crate::store::{self, ChunkSink, StoreUrl};
use crate::vault::{self, Health, TokenSeen, Vault};

/// S3 refuses what is signed with a clock that is wrong by 15 minutes; versions expire by the same clock.
const SKEW_WARNS_S: i64 = 60;
const SKEW_STOPS_S: i64 = 15 * 60;
/// A fleet in one region sees 5 to 50 ms; a first byte of half a second makes every cold read wait.
const SLOW: Duration = Duration::from_millis(500);
/// A token that cannot be renewed and ends sooner than a model is loaded.
const TTL_MIN: Duration = Duration::from_secs(600);
/// No object is called so: that it is not there is an answer.
const NO_OBJECT: &str = "ready";
/// Credentials may be for some models alone: so many are asked for before reading is called refused.
const MODELS_TRIED_MAX: usize = 16;

#[derive(Debug, Clone)]
pub struct VaultSeen {
    pub address: String,
    /// Tokens and keys cross a network without TLS.
    pub in_clear: bool,
    pub health: Result<Health, Error>,
    /// `None`: not asked, because Vault could not answer or nothing we have logs in.
    pub token: Option<Result<TokenSeen, Error>>,
    /// What the configuration needs of Vault and the token may not.
    pub lacks: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct StoreSeen {
    pub url: String,
    pub in_clear: bool,
    /// How long one small question took, once connected.
    pub answered: Result<Duration, Error>,
    /// How many models it lists; `None`: not asked.
    pub models: Option<Result<usize, Error>>,
    pub ahead_s: Option<i64>,
}

/// What is to be asked.
#[derive(Debug, Clone, Copy)]
pub struct Asks {
    pub vault: bool,
    pub store: bool,
}

/// Asks both at once. Blocks for little more than `wait`.
pub fn ask(setup: &Setup, asks: Asks, wait: Duration) -> (Option<VaultSeen>, Option<StoreSeen>) {
    let Some(access) = &setup.access else { return (None, None) };
    std::thread::scope(|scope| {
        let vault = scope.spawn(|| asks.vault.then(|| ask_vault(access, setup.store.as_ref(), wait)).flatten());
        let store = asks.store.then(|| ask_store(access, setup.store.as_ref(), wait)).flatten();
        (vault.join().unwrap_or_else(|died| std::panic::resume_unwind(died)), store)
    })
}

fn runtime() -> Option<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().ok()
}

/// Runs what cannot be told to end sooner; after `wait` nobody waits for it any more.
fn within<T: Send + 'static>(wait: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, answer) = std::sync::mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("doctor".into())
        .spawn(move || {
            // Nobody waits any more: then the answer is of no use.
            let _ = sender.send(work());
        })
        .ok()?;
    answer.recv_timeout(wait).ok()
}

fn ask_vault(access: &Access, store: Option<&StoreUrl>, wait: Duration) -> Option<VaultSeen> {
    let settings = access.vault.as_ref()?;
    let mut quick = settings.clone();
    quick.timeout = wait.min(settings.timeout);
    let health = runtime()?.block_on(vault::health(&quick));
    let mut seen = VaultSeen {
        address: settings.address.clone(),
        in_clear: in_clear(&settings.address),
        health,
        token: None,
        lacks: Vec::new(),
    };
    let usable = seen.health.as_ref().is_ok_and(|health| health.initialised && !health.sealed);
    if usable && let Some(client) = access.connected.clone() {
        let wanted = wanted_of_vault(access, store);
        let asked = within(wait, move || {
            let token = client.own_token();
            let lacks = token.as_ref().ok().map(|_| lacks(&client, &wanted)).unwrap_or_default();
            (token, lacks)
        });
        match asked {
            Some((token, lacks)) => (seen.token, seen.lacks) = (Some(token), lacks),
            None => {
                let why = format!("no answer to a login within {} s", wait.as_secs());
                seen.token = Some(Err(Error::new(Code::VaultUnreachable, why)));
            }
        }
    }
    Some(seen)
}

/// A policy that hides what a token may do hides nothing from whoever tries: then it is not known.
fn lacks(client: &Vault, wanted: &[(String, &'static [&'static str])]) -> Vec<String> {
    if wanted.is_empty() { Vec::new() } else { client.lacks(wanted).unwrap_or_default() }
}

/// What a mount asks of Vault, and any one capability that allows it.
fn wanted_of_vault(access: &Access, store: Option<&StoreUrl>) -> Vec<(String, &'static [&'static str])> {
    let mut wanted: Vec<(String, &'static [&'static str])> = Vec::new();
    for source in &access.keys {
        match source {
            KeySource::VaultTransit { mount, key } => wanted.push((format!("{mount}/decrypt/{key}"), &["update"])),
            KeySource::VaultKv { mount, path, .. } => wanted.push((format!("{mount}/data/{path}"), &["read"])),
            KeySource::File(_)
            | KeySource::Env(_)
            | KeySource::Passphrase
            | KeySource::PassphraseFile(_)
            | KeySource::X25519(_)
            | KeySource::Recipient(_)
            | KeySource::RecipientFile(_) => {}
        }
    }
    if let Some(from) = &access.s3_credentials {
        wanted.push((format!("{}/creds/{}", from.mount, from.role), &["read"]));
    }
    if let Some(floor) = &access.trust.floor {
        // Entries are named by hashes of models, so a policy has the folder; servers only read them.
        wanted.push((format!("{}/data/{}/*", floor.mount, floor.path), &["read"]));
    }
    if let Some(StoreUrl::VaultKv { mount, path }) = store {
        wanted.push((format!("{mount}/metadata/{path}"), &["list"]));
    }
    wanted
}

fn ask_store(access: &Access, url: Option<&StoreUrl>, wait: Duration) -> Option<StoreSeen> {
    let url = match url? {
        // Its records name the stores; opening the models asks those.
        StoreUrl::VaultKv { .. } => return None,
        url => url,
    };
    let mut options = access.store.clone();
    options.patience.attempt = options.patience.attempt.min(wait);
    options.patience.stall = options.patience.stall.min(wait);
    options.patience.budget = wait;
    let endpoint = matches!(url, StoreUrl::S3 { .. }).then(|| store::s3::endpoint(&options)).flatten();
    let mut seen = StoreSeen {
        url: url.to_string(),
        in_clear: endpoint.as_deref().is_some_and(in_clear),
        answered: Ok(Duration::ZERO),
        models: None,
        ahead_s: None,
    };
    if let StoreUrl::Local(path) = url
        && !path.exists()
    {
        seen.answered = Err(Error::new(Code::NotFound, format!("there is no store at {}", path.display())));
        return Some(seen);
    }
    let store = match store::open(url, &options) {
        Ok(store) => store,
        Err(error) => {
            seen.answered = Err(error);
            return Some(seen);
        }
    };
    let asked = within(wait * 2, move || {
        let runtime = runtime()?;
        Some(runtime.block_on(async {
            let (asked, ahead_s) = tokio::join!(questions(store.as_ref(), wait), date_of(endpoint.as_deref(), wait));
            (asked, ahead_s)
        }))
    });
    match asked.flatten() {
        Some(((answered, models), ahead_s)) => (seen.answered, seen.models, seen.ahead_s) = (answered, models, ahead_s),
        None => seen.answered = Err(silent(wait)),
    }
    Some(seen)
}

fn silent(wait: Duration) -> Error {
    Error::new(Code::Deadline, format!("the store gives no answer within {} s", wait.as_secs()))
}

type Answers = (Result<Duration, Error>, Option<Result<usize, Error>>);

async fn questions(store: &dyn ChunkSink, wait: Duration) -> Answers {
    let mut took = Duration::ZERO;
    let mut refused = None;
    // Twice: the first one also connects, resolves names and gets credentials.
    for _ in 0..2 {
        let asked = Instant::now();
        let answer = tokio::time::timeout(wait, store.size(NO_OBJECT)).await.unwrap_or_else(|_| Err(silent(wait)));
        match answer {
            Err(error) if error.class() == Class::Unreachable => return (Err(error), None),
            // A refusal is an answer too: the store is there.
            Ok(_) | Err(_) => (took, refused) = (asked.elapsed(), answer.err().filter(is_refusal)),
        }
    }
    let listed = tokio::time::timeout(wait, store.list_dirs("")).await.unwrap_or_else(|_| Err(silent(wait)));
    let models = match (listed, refused) {
        (Err(error), _) => Err(error),
        (Ok(listed), Some(refused)) if !some_model_is_read(store, &listed, wait).await => {
            Err(refused.context("models may be listed, and no object may be read"))
        }
        (Ok(listed), _) => Ok(listed.iter().filter(|name| *name != "probe").count()),
    };
    (Ok(took), Some(models))
}

fn is_refusal(error: &Error) -> bool {
    error.code() == Code::StoreDenied
}

/// Whether an object of any listed model may be asked for, there or not.
async fn some_model_is_read(store: &dyn ChunkSink, listed: &[String], wait: Duration) -> bool {
    let until = tokio::time::Instant::now() + wait;
    let models = listed.iter().filter_map(|name| ModelId::from_hex(name));
    for model in models.take(MODELS_TRIED_MAX) {
        let name = names::model_name(model);
        match tokio::time::timeout_at(until, store.size(&name)).await {
            Ok(Err(error)) if is_refusal(&error) => {}
            Ok(Ok(_) | Err(_)) => return true,
            Err(_) => return false,
        }
    }
    false
}

/// What the endpoint's own clock says, whatever else it answers. Nothing of ours is sent.
async fn date_of(endpoint: Option<&str>, wait: Duration) -> Option<i64> {
    let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().ok()?;
    let asked = SystemTime::now();
    let answer = client.head(endpoint?).timeout(wait).send().await.ok()?;
    let middle = asked + asked.elapsed().unwrap_or_default() / 2;
    vault::ahead(answer.headers().get(http::header::DATE)?.to_str().ok()?, middle)
}

fn in_clear(url: &str) -> bool {
    let Ok(url) = url::Url::parse(url) else { return false };
    let loopback = match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    url.scheme() == "http" && !loopback
}

// The rules.

pub(super) fn vault(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a Vault that answers and is unsealed";
    let seen = machine.facts.vault.as_ref()?;
    match &seen.health {
        Err(error) => {
            let fix = format!("curl -sS {}/v1/sys/health; then vault-addr, vault-ca-cert, DNS, firewall", seen.address);
            hint(Stops, error.chain(), WANTED, fix)
        }
        Ok(health) if !health.initialised => {
            hint(Stops, format!("{} is not initialised", seen.address), WANTED, "vault operator init")
        }
        Ok(health) if health.sealed => {
            hint(Stops, format!("{} is sealed", seen.address), WANTED, "vault operator unseal")
        }
        Ok(health) => {
            let role = if health.standby { " as a standby" } else { "" };
            fine(
                format!("{} answers{role} in {} ms, version {}", seen.address, millis(health.took), health.version),
                WANTED,
            )
        }
    }
}

pub(super) fn vault_tls(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "TLS wherever a token crosses a network";
    let seen = machine.facts.vault.as_ref()?;
    match seen.in_clear {
        false => fine("TLS, or this machine alone", WANTED),
        true => hint(
            Warning,
            format!("{} is spoken to in clear", seen.address),
            WANTED,
            "vault-addr=https://HOST:8200, without vault-plain-http",
        ),
    }
}

pub(super) fn vault_token(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a token that is valid, ends by itself and may little";
    let token = match machine.facts.vault.as_ref()?.token.as_ref()? {
        Ok(token) => token,
        Err(error) => {
            let fix = "vault token lookup; then another token, or a login by vault-auth (approle, kubernetes, ...)";
            return hint(Stops, error.chain(), WANTED, fix);
        }
    };
    if token.policies.iter().any(|policy| policy == "root") {
        let fix = "vault token create -policy=modelfs-server -period=24h (docs/KEYS.md has the policy)";
        return hint(Warning, "a root token: whoever takes it takes all of Vault", WANTED, fix);
    }
    let policies = token.policies.join(", ");
    match token.ttl {
        None => hint(Info, format!("valid, never ends, policies {policies}"), WANTED, "vault token create -period=24h"),
        Some(left) if left < TTL_MIN && !token.renewable => {
            let fix = "vault token create -period=24h, or a login by vault-auth that can be repeated";
            hint(Warning, format!("ends in {} s and cannot be renewed", left.as_secs()), WANTED, fix)
        }
        Some(left) => {
            let renewed = if token.renewable { ", renewed by itself" } else { "" };
            fine(format!("valid, {} s left{renewed}, policies {policies}", left.as_secs()), WANTED)
        }
    }
}

pub(super) fn vault_rights(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a policy that allows what the configuration asks of Vault";
    let seen = machine.facts.vault.as_ref()?;
    seen.token.as_ref()?.as_ref().ok()?;
    match seen.lacks.as_slice() {
        [] => fine("allowed, as far as Vault tells", WANTED),
        lacks => {
            let fix = format!("vault token capabilities {}; add it to the policy (docs/KEYS.md)", lacks[0]);
            hint(Stops, format!("the token may not use {}", lacks.join(", ")), WANTED, fix)
        }
    }
}

pub(super) fn store(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a store that answers, within half a second";
    let seen = machine.facts.store.as_ref()?;
    match &seen.answered {
        Err(error) => {
            let fix = "modelfs -v ls STORE; then s3-endpoint, s3-region, DNS, firewall, or the path";
            hint(Stops, format!("{}: {}", seen.url, error.chain()), WANTED, fix)
        }
        Ok(took) if *took > SLOW => {
            let fix = "a store in the same region, or --profile so that reads are foreseen";
            hint(Warning, format!("{} answers in {} ms", seen.url, millis(*took)), WANTED, fix)
        }
        Ok(took) => fine(format!("{} answers in {} ms", seen.url, millis(*took)), WANTED),
    }
}

pub(super) fn store_access(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "credentials that may list and read the store, with a model in it";
    let seen = machine.facts.store.as_ref()?;
    match seen.models.as_ref()? {
        Err(error) if error.class() == Class::Unreachable => {
            hint(Warning, format!("listing {}: {}", seen.url, error.chain()), WANTED, "modelfs ls STORE")
        }
        Err(error) => {
            let fix = "modelfs ls STORE with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of a reader (s3:ListBucket, \
                       s3:GetObject), or s3-credentials";
            hint(Stops, format!("{}: {}", seen.url, error.chain()), WANTED, fix)
        }
        Ok(0) => hint(Info, format!("{} holds no model", seen.url), WANTED, "modelfs seal FOLDER STORE NAME --key KEY"),
        Ok(models) => fine(format!("{models} model(s)"), WANTED),
    }
}

pub(super) fn store_tls(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "TLS wherever credentials and names cross a network";
    match machine.facts.store.as_ref()?.in_clear {
        false => fine("TLS, or this machine alone", WANTED),
        true => hint(
            Warning,
            "the store is spoken to in clear (AWS_ALLOW_HTTP)",
            WANTED,
            "s3-endpoint=https://HOST, and unset AWS_ALLOW_HTTP",
        ),
    }
}

pub(super) fn clock_skew(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a clock within a minute of Vault's and the store's: expiry and signatures hang on it";
    let vault = machine.facts.vault.as_ref().and_then(|seen| seen.health.as_ref().ok()?.ahead_s);
    let store = machine.facts.store.as_ref().and_then(|seen| seen.ahead_s);
    let all = [("Vault", vault), ("the store", store)];
    let (whose, ahead) =
        all.iter().filter_map(|(whose, ahead)| Some((*whose, (*ahead)?))).max_by_key(|(_, s)| s.abs())?;
    let seen = match ahead {
        0.. => format!("{whose} is {ahead} s ahead of this machine"),
        _ => format!("{whose} is {} s behind this machine", -ahead),
    };
    match ahead.abs() {
        SKEW_STOPS_S.. if whose == "the store" => {
            hint(Stops, seen, WANTED, "timedatectl set-ntp true, or chronyc makestep")
        }
        SKEW_WARNS_S.. => hint(Warning, seen, WANTED, "timedatectl set-ntp true, or chronyc makestep"),
        _ => fine(seen, WANTED),
    }
}

fn millis(took: Duration) -> u128 {
    took.as_millis()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::config::Layers;
    use crate::config::layers::split_list;
    use crate::store::fault::{Call, Fault, Faulty, When};
    use crate::store::memory::MemoryStore;

    const WAIT: Duration = Duration::from_secs(10);

    /// What is found of two models, where these questions about names are refused.
    async fn models(refused: &[&str]) -> Result<usize, Error> {
        let store = Faulty::new(MemoryStore::new());
        for model in ["acme/a", "acme/b"] {
            let name = names::model_name(ModelId::of_name(model));
            store.create(&name, Bytes::from_static(model.as_bytes())).await.expect("stored");
        }
        for part in refused {
            store.on(When::call(Call::Size).name(part), Fault::Fail(Code::StoreDenied));
        }
        let (answered, models) = questions(&store, WAIT).await;
        answered.expect("a refusal is an answer");
        models.expect("asked")
    }

    #[tokio::test]
    async fn credentials_that_list_and_may_read_nothing_are_found() {
        assert_eq!(models(&[]).await.expect("the detector: all is allowed"), 2);
        let error = models(&[""]).await.expect_err("nothing may be read");
        assert!(error.code() == Code::StoreDenied && error.chain().contains("no object may be read"), "{error:?}");
    }

    #[tokio::test]
    async fn credentials_for_one_model_alone_are_good_ones() {
        let one = ModelId::of_name("acme/a").to_string();
        assert_eq!(models(&[NO_OBJECT, &one]).await.expect("the other one is read"), 2);
    }

    #[test]
    fn vault_is_asked_for_the_keys_the_credentials_and_the_floor_that_are_configured() {
        let words = "key=vault-transit:transit/models,floor=vault-kv:secret/modelfs/floor,\
                     s3_credentials=vault-aws:aws/reader,vault_addr=https://vault:8200";
        let mut layers = Layers::default();
        layers.mount_options(&split_list(words), false).expect("options");
        let access = Access::from_layers(&layers).expect("access");
        let wanted: Vec<String> = wanted_of_vault(&access, None).into_iter().map(|(path, _)| path).collect();
        assert_eq!(wanted, ["transit/decrypt/models", "aws/creds/reader", "secret/data/modelfs/floor/*"]);
    }
}
