//! The storage credentials of this process's environment: taken out of it once, kept in locked memory, and lent to the
//! library that signs for one request at a time.
//!
//! In: the `AWS_…` variables that hold them. Out: one set for every store and every login of the process.
//! Promises: after [`EnvCredentials::taken`] they are in no environment that anybody can look at; half a set is refused, not
//! passed over; nothing here prints them.
//! What remains: the library wants ordinary strings, so they lie on the heap while a request is under way, and what it sends
//! (a session token is a header) lies in the buffer of a connection until that is used again or closed.
//! Not here: credentials that end (`credentials`), which other settings there are (`s3`).
//! Held by: the tests below, tests/secrets.rs.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;

use crate::error::Result;
use crate::mem::{LockedBuf, is_env_set, take_env};
use crate::refuse;

const KEY_ID: &str = "AWS_ACCESS_KEY_ID";
const SECRET: &str = "AWS_SECRET_ACCESS_KEY";
/// The second is how some programs call the first.
const TOKENS: [&str; 2] = ["AWS_SESSION_TOKEN", "AWS_TOKEN"];

/// Every variable that holds a part of them.
pub const ENV_CREDENTIALS: [&str; 4] = [KEY_ID, SECRET, TOKENS[0], TOKENS[1]];

/// One set of S3 credentials that do not end.
pub struct EnvCredentials {
    pub key_id: LockedBuf,
    pub secret: LockedBuf,
    pub session: Option<LockedBuf>,
}

/// What was taken so far: volumes are mounted again and again, and the environment gives it once.
static TAKEN: Mutex<Option<Arc<EnvCredentials>>> = Mutex::new(None);

impl EnvCredentials {
    /// The set of the environment, `None` if it has none. The first call takes it out of there.
    ///
    /// # Errors
    /// `USAGE` for an id without a secret or the other way round, and for what no request could carry; never with a value.
    pub fn taken() -> Result<Option<Arc<EnvCredentials>>> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        match (is_env_set(KEY_ID), is_env_set(SECRET)) {
            (false, false) => {}
            (true, false) => refuse!(Usage, "{KEY_ID} is set and {SECRET} is not; set both or neither"),
            (false, true) => refuse!(Usage, "{SECRET} is set and {KEY_ID} is not; set both or neither"),
            (true, true) => {
                let mut session = None;
                for name in TOKENS {
                    session = session.or(take(name)?);
                }
                if let (Some(key_id), Some(secret)) = (take(KEY_ID)?, take(SECRET)?) {
                    *taken = Some(Arc::new(EnvCredentials { key_id, secret, session }));
                }
            }
        }
        Ok(taken.clone())
    }
}

/// One printable word, for it goes into a header; empty is as good as not there.
fn take(name: &str) -> Result<Option<LockedBuf>> {
    let Some(value) = take_env(name)?.filter(|value| !value.is_empty()) else { return Ok(None) };
    if !value.iter().all(u8::is_ascii_graphic) {
        refuse!(Usage, "{name} holds a space, a line break or another character that no credential has; set it anew");
    }
    Ok(Some(value))
}

impl fmt::Debug for EnvCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EnvCredentials")
    }
}

#[async_trait]
impl CredentialProvider for EnvCredentials {
    type Credential = AwsCredential;

    /// A copy for one request; the heap overwrites it when it is given back (`mem::WipingHeap`).
    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let text = |part: &LockedBuf| String::from_utf8_lossy(part).into_owned();
        Ok(Arc::new(AwsCredential {
            key_id: text(&self.key_id),
            secret_key: text(&self.secret),
            token: self.session.as_ref().map(text),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_lent_is_what_was_taken_and_nothing_of_it_is_shown() {
        let buffer = |text: &str| LockedBuf::copy_of(text.as_bytes()).expect("locked");
        let taken =
            EnvCredentials { key_id: buffer("AKIA"), secret: buffer("canary/+="), session: Some(buffer("session")) };
        let lent = taken.get_credential().await.expect("lent");
        assert_eq!((lent.key_id.as_str(), lent.secret_key.as_str()), ("AKIA", "canary/+="));
        assert_eq!(lent.token.as_deref(), Some("session"));
        assert_eq!(format!("{taken:?}"), "EnvCredentials");
    }
}
