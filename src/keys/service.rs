//! Slots that open with Vault: what is asked of it, and with which names.
//!
//! In: a slot (hostile), a key source of the local configuration. Out: a data key, or a slot, or what Vault refused.
//! Promises: mount, path, field and key name come from the local configuration, never from a slot; of a slot go out its
//! wrapped key and the number of its version. Nothing that Vault gave is kept: who takes our token away takes the keys of
//! every later opening away.
//! Not here: how Vault is reached and who we are to it (`vault`).
//! Spec: docs/FORMAT.md a.7. Held by: the tests of `slots`.

use super::source::{KeySource, decode_key};
use super::wrap::{SlotTarget, salt, unwrap_under, wrap_under};
use crate::crypto::Dek;
use crate::error::{Code, Error, Result};
use crate::format::{ManifestHeader, Slot, SlotParams};
use crate::mem::{LockedBuf, Secret};
use crate::refuse;
use crate::vault::{TransitKey, Vault};

/// What of Vault slots need. The tests have another one, for the answers that a healthy Vault never gives.
pub(super) trait KeyService: Send + Sync {
    fn transit_wrap(&self, at: &TransitKey, context: &[u8; 32], key: &Secret<32>) -> Result<String>;
    fn transit_unwrap(&self, at: &TransitKey, context: &[u8; 32], wrapped: &str) -> Result<Secret<32>>;
    fn kv_field(&self, mount: &str, path: &str, field: &str, version: Option<u32>) -> Result<(LockedBuf, u32)>;
}

impl KeyService for Vault {
    fn transit_wrap(&self, at: &TransitKey, context: &[u8; 32], key: &Secret<32>) -> Result<String> {
        Vault::transit_wrap(self, at, context, key)
    }
    fn transit_unwrap(&self, at: &TransitKey, context: &[u8; 32], wrapped: &str) -> Result<Secret<32>> {
        Vault::transit_unwrap(self, at, context, wrapped)
    }
    fn kv_field(&self, mount: &str, path: &str, field: &str, version: Option<u32>) -> Result<(LockedBuf, u32)> {
        Vault::kv_field(self, mount, path, field, version)
    }
}

/// Where in Vault a source lies.
pub(super) enum Place<'s> {
    Transit(TransitKey),
    Kv { mount: &'s str, path: &'s str, field: &'s str },
}

impl<'s> Place<'s> {
    pub fn of(source: &'s KeySource) -> Option<Place<'s>> {
        match source {
            KeySource::VaultTransit { mount, key } => {
                Some(Place::Transit(TransitKey { mount: mount.clone(), key: key.clone() }))
            }
            KeySource::VaultKv { mount, path, field } => Some(Place::Kv { mount, path, field }),
            KeySource::File(_)
            | KeySource::Env(_)
            | KeySource::Passphrase
            | KeySource::PassphraseFile(_)
            | KeySource::X25519(_)
            | KeySource::Recipient(_)
            | KeySource::RecipientFile(_) => None,
        }
    }

    /// A slot for this place: transit wraps the key itself; a KV field is the KEK, and the slot keeps which version of it.
    pub fn wrap(&self, service: &dyn KeyService, label: &str, target: &SlotTarget, dek: &Dek) -> Result<Slot> {
        match self {
            Place::Transit(at) => {
                let context = Slot::transit_context(target.model_id, target.vid);
                let body = service.transit_wrap(at, &context, dek.secret())?.into_bytes();
                Ok(Slot { label: label.into(), params: SlotParams::VaultTransit, body })
            }
            Place::Kv { .. } => {
                let (kek, version) = self.kv_key(service, None)?;
                wrap_under(&kek, label, SlotParams::VaultKv { version, salt: salt()? }, target, dek)
            }
        }
    }

    /// # Errors
    /// `SLOT_COMMIT`, `SLOT_BODY` for a slot that does not open; else what Vault refused, or answered wrongly.
    pub fn open(&self, service: &dyn KeyService, slot: &Slot, header: &ManifestHeader) -> Result<Dek> {
        match (self, &slot.params) {
            (Place::Transit(at), SlotParams::VaultTransit) => {
                let context = Slot::transit_context(header.model_id, header.vid);
                let wrapped = std::str::from_utf8(&slot.body).expect("the parser lets ASCII through only");
                Ok(Dek::from_secret(service.transit_unwrap(at, &context, wrapped)?))
            }
            (Place::Kv { .. }, SlotParams::VaultKv { version, .. }) => {
                let (kek, _) = self.kv_key(service, Some(*version))?;
                unwrap_under(slot, &kek, header)
            }
            _ => refuse!(NoKey, "slot {:?} is of another kind", slot.label),
        }
    }

    /// The 32 bytes of a field, in hex or base64, and the version they were read from.
    fn kv_key(&self, service: &dyn KeyService, version: Option<u32>) -> Result<(Secret<32>, u32)> {
        let Place::Kv { mount, path, field } = self else { refuse!(NoKey, "transit keys do not leave Vault") };
        let (text, read) = service.kv_field(mount, path, field, version)?;
        let what = format!("field {field} of {mount}/{path} version {read} in Vault");
        if version.is_some_and(|wanted| wanted != read) {
            return Err(Error::new(Code::VaultAnswer, format!("{what} was answered for another version")));
        }
        Ok((decode_key(&text, false, &what)?, read))
    }
}
