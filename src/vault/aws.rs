//! S3 credentials from Vault's aws secrets engine, for `store::credentials` to hold and replace.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::raw::{Method, Raw, wipe_map};
use super::{Vault, wire};
use crate::error::{Code, Result};
use crate::mem::LockedBuf;
use crate::refuse;
use crate::store::credentials::{IssueCredentials, Issued};

/// `MOUNT/creds/ROLE` of one Vault.
pub struct AwsRole {
    vault: Vault,
    mount: String,
    role: String,
    /// The newest lease and which token of ours it was lent to: it ends with that.
    lent: Mutex<Option<(String, [u8; 32])>>,
}

impl AwsRole {
    pub fn new(vault: Vault, mount: &str, role: &str) -> AwsRole {
        AwsRole { vault, mount: mount.to_owned(), role: role.to_owned(), lent: Mutex::default() }
    }

    fn lent(&self) -> MutexGuard<'_, Option<(String, [u8; 32])>> {
        // A single store of a whole value: a panic elsewhere leaves it whole.
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IssueCredentials for AwsRole {
    fn issue(&self) -> Result<Issued> {
        let path = format!("{}/creds/{}", self.mount, self.role);
        let what = format!("cannot get storage credentials from {path}");
        // Not by vaultrs: its answer has no room for `ttl`, which is all that is said of how long those of STS last.
        let answer = self.vault.call(what.clone(), move || Raw::new(Method::Get, path.clone(), None))?;
        let Some(Value::Object(mut data)) = answer.data else { refuse!(VaultAnswer, "{what}: the answer has no data") };
        let locked = |field: &str| {
            let text = data.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
            text.map(|text| LockedBuf::copy_of(text.as_bytes())).transpose()
        };
        let (key_id, secret, token) = (locked("access_key"), locked("secret_key"), locked("security_token"));
        // Vault makes no lease of what ends by itself.
        let ttl = data.get("ttl").and_then(Value::as_u64).map(wire::lasting);
        let ttl = if answer.lease.is_zero() { ttl.unwrap_or_default() } else { answer.lease };
        wipe_map(&mut data);
        let (Some(key_id), Some(secret)) = (key_id?, secret?) else {
            refuse!(VaultAnswer, "{what}: the answer holds no key");
        };
        let lease_id = Some(answer.lease_id).filter(|id| !id.is_empty());
        *self.lent() = lease_id.clone().zip(answer.asked_by);
        Ok(Issued {
            key_id,
            secret,
            token: token?,
            ttl: Some(ttl).filter(|ttl| !ttl.is_zero()),
            lease_id,
            renewable: answer.renewable,
        })
    }

    fn was_revoked(&self, lease_id: &str) -> Result<bool> {
        let body = of_lease(lease_id);
        let ask = move || Raw::new(Method::Post, "sys/leases/lookup".into(), Some(body.clone()));
        match self.vault.call("cannot look up a lease".into(), ask) {
            Err(gone) if gone.code() == Code::VaultNotFound => {}
            other => return other.map(|_| false),
        }
        let lent = self.lent().clone().filter(|(lent, _)| lent == lease_id);
        // A token that has ended took its leases along, which was to be expected.
        Ok(lent.is_some_and(|(_, token)| self.vault.owns(token)))
    }

    fn renew(&self, lease_id: &str) -> Result<Duration> {
        let body = of_lease(lease_id);
        let ask = move || Raw::new(Method::Post, "sys/leases/renew".into(), Some(body.clone()));
        Ok(self.vault.call("cannot renew a lease".into(), ask)?.lease)
    }

    fn revoke(&self, lease_id: &str) -> Result<()> {
        let body = of_lease(lease_id);
        let ask = move || Raw::new(Method::Post, "sys/leases/revoke".into(), Some(body.clone()));
        self.vault.call("cannot revoke a lease".into(), ask).map(drop)
    }

    fn describe(&self) -> String {
        format!("vault-aws:{}/{}", self.mount, self.role)
    }
}

fn of_lease(id: &str) -> Map<String, Value> {
    Map::from_iter([("lease_id".into(), json!(id))])
}
