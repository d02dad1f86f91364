//! How Vault is and what our token may do: for `doctor`, which asks before anything hangs on it.
//!
//! Promises: [`health`] sends no token and keeps nothing; nothing here renews, writes or logs a token.
//! Held by: tests/doctor.sh, against a live Vault.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::raw::{Method, Raw, wipe_map};
use super::wire::lasting;
use super::{Vault, VaultSettings, http_client};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// Vault's own answer takes 300 bytes.
const ANSWER_BYTES_MAX: usize = 16 << 10;

/// What Vault says of itself to anybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub initialised: bool,
    pub sealed: bool,
    pub standby: bool,
    pub version: String,
    pub took: Duration,
    /// How far Vault's clock is ahead of ours, to a second; `None`: its answer bears no date.
    pub ahead_s: Option<i64>,
}

/// # Errors
/// `USAGE` for settings that cannot be used, `VAULT_UNREACHABLE`, `VAULT_ANSWER` for something else at this address.
pub async fn health(settings: &VaultSettings) -> Result<Health> {
    // 200 however it stands: what counts is in the body.
    const PATH: &str =
        "/v1/sys/health?standbyok=true&perfstandbyok=true&sealedcode=200&uninitcode=200&drsecondarycode=200";
    let place = &settings.address;
    let lost = |e: reqwest::Error| {
        let why = if e.is_timeout() { "gives no answer in time" } else { "cannot be reached" };
        Error::new(Code::VaultUnreachable, format!("Vault at {place} {why}")).with_source(e.without_url())
    };
    let other = || Error::new(Code::VaultAnswer, format!("what answers at {place} is not Vault"));
    let client = http_client(settings)?;
    let asked = SystemTime::now();
    let mut answer = client.get(format!("{place}{PATH}")).timeout(settings.timeout).send().await.map_err(lost)?;
    let took = asked.elapsed().unwrap_or_default();
    let ahead_s =
        answer.headers().get(http::header::DATE).and_then(|date| ahead(date.to_str().ok()?, asked + took / 2));
    match answer.status().as_u16() {
        200 => {}
        // Whatever stands of Vault is asked for with 200: this is a gateway's word.
        status @ 502..=504 => {
            let why = format!("something between us and Vault at {place} answers {status}; is Vault behind it up?");
            return Err(Error::new(Code::VaultUnreachable, why));
        }
        _ => return Err(other()),
    }
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(lost)? {
        body.extend_from_slice(&piece);
        if body.len() > ANSWER_BYTES_MAX {
            return Err(other());
        }
    }
    let told: Value = serde_json::from_slice(&body).map_err(|_| other())?;
    let yes = |name: &str| told.get(name).and_then(Value::as_bool);
    let (Some(initialised), Some(sealed)) = (yes("initialized"), yes("sealed")) else { return Err(other()) };
    let version = told.get("version").and_then(Value::as_str).unwrap_or("unknown");
    let version = version.chars().filter(|c| c.is_ascii_graphic()).take(32).collect();
    Ok(Health { initialised, sealed, standby: yes("standby").unwrap_or(false), version, took, ahead_s })
}

/// How far the clock that wrote `date` (of an HTTP answer) was ahead of `now`, in seconds.
pub fn ahead(date: &str, now: SystemTime) -> Option<i64> {
    let theirs = httpdate::parse_http_date(date).ok()?;
    let seconds = |d: Duration| i64::try_from(d.as_secs()).ok();
    match theirs.duration_since(now) {
        Ok(ahead) => seconds(ahead),
        Err(behind) => seconds(behind.duration()).map(|s| -s),
    }
}

/// Our token, as Vault knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenSeen {
    /// `None`: it does not expire.
    pub ttl: Option<Duration>,
    pub renewable: bool,
    pub policies: Vec<String>,
}

impl Vault {
    /// Logs in if that was not done, and asks what the token is.
    pub fn own_token(&self) -> Result<TokenSeen> {
        let what = "cannot look up our token";
        let answer = self.call(what.into(), || Raw::new(Method::Get, "auth/token/lookup-self".into(), None))?;
        let Some(Value::Object(mut data)) = answer.data else { refuse!(VaultAnswer, "{what}: the answer has no data") };
        let ttl = data.get("ttl").and_then(Value::as_u64).unwrap_or(0);
        let expires = data.get("expire_time").is_some_and(|at| !at.is_null());
        let names = |name: &str| data.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
        let policies = names("policies").into_iter().chain(names("identity_policies"));
        let seen = TokenSeen {
            ttl: expires.then(|| lasting(ttl)),
            renewable: data.get("renewable").and_then(Value::as_bool).unwrap_or(false),
            policies: policies.filter_map(|policy| policy.as_str().map(str::to_owned)).collect(),
        };
        wipe_map(&mut data);
        Ok(seen)
    }

    /// Which of `wanted` (a path, and any one of the capabilities that do) the token may not.
    pub fn lacks(&self, wanted: &[(String, &'static [&'static str])]) -> Result<Vec<String>> {
        let paths: Vec<Value> = wanted.iter().map(|(path, _)| json!(path)).collect();
        let answer = self.call("cannot ask what our token may".into(), move || {
            let body = Map::from_iter([("paths".to_owned(), Value::Array(paths.clone()))]);
            Raw::new(Method::Post, "sys/capabilities-self".into(), Some(body))
        })?;
        let data = answer.data.unwrap_or_default();
        let may = |path: &str, any: &[&str]| {
            let has = data.get(path).and_then(Value::as_array);
            has.is_some_and(|has| has.iter().filter_map(Value::as_str).any(|one| one == "root" || any.contains(&one)))
        };
        Ok(wanted.iter().filter(|(path, any)| !may(path, any)).map(|(path, _)| path.clone()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_told_as_seconds_ahead_or_behind() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").expect("a date");
        assert_eq!(ahead("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(0));
        assert_eq!(ahead("Sun, 06 Nov 1994 09:49:37 GMT", now), Some(3600));
        assert_eq!(ahead("Sun, 06 Nov 1994 08:49:07 GMT", now), Some(-30));
        assert_eq!(ahead("yesterday", now), None);
    }
}
