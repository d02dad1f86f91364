//! One slot: made for a key, or opened with it.
//!
//! In: a key in locked memory, a data key, the version it belongs to. Out: a slot that opens to it, or the data key.
//! Promises: whatever a slot opens to is compared with the signed commitment by the caller (`Dek::opens`) before it is
//! used; a slot is bound to its label, its parameters, its model and its version.
//! Spec: docs/FORMAT.md a.7. Held by: the tests below, THREAT_MODEL (f) rows 31, 32 and 37.

use super::source::KeyMaterial;
use super::stretch::{Cost, stretch};
use crate::crypto::{Dek, RecipientKey, open_dek_with, seal_dek_to, unwrap_dek, wrap_dek};
use crate::error::{Code, Error, Result};
use crate::format::{ManifestHeader, ModelId, Slot, SlotParams, Vid, check_label};
use crate::mem::Secret;
use crate::refuse;

/// The version whose data key is to be wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotTarget {
    pub model_id: ModelId,
    pub vid: Vid,
    /// `Dek::commitment`, as the manifest's header will carry it.
    pub dek_commit: [u8; 32],
}

impl From<&ManifestHeader> for SlotTarget {
    fn from(header: &ManifestHeader) -> SlotTarget {
        SlotTarget { model_id: header.model_id, vid: header.vid, dek_commit: header.dek_commit }
    }
}

/// A new slot that opens to `dek`, which must be the key that `target` commits to, with `material`.
///
/// # Errors
/// `SLOT_LABEL`, `SLOT_PARAMS` for costs out of bounds, `NO_ROOM` for a hash's memory, `HOST` without random bytes.
pub fn wrap(material: &KeyMaterial, label: &str, cost: Cost, target: &SlotTarget, dek: &Dek) -> Result<Slot> {
    check_label(label.as_bytes())?;
    match material {
        KeyMaterial::Key(kek) => wrap_under(kek, label, SlotParams::Raw { salt: salt()? }, target, dek),
        KeyMaterial::Passphrase(text) => {
            let params = match cost {
                Cost::Scrypt { log2_n } => SlotParams::Scrypt { log2_n, salt: salt()? },
                Cost::Argon2id { m_kib, t, p } => SlotParams::Argon2id { m_kib, t, p, salt: salt()? },
            };
            wrap_under(&stretch(text, &params)?, label, params, target, dek)
        }
        KeyMaterial::Recipient(recipient) => seal_to(recipient, label, target, dek),
        KeyMaterial::Private(secret) => seal_to(&secret.public(), label, target, dek),
    }
}

pub(super) fn salt() -> Result<[u8; 32]> {
    let mut salt = [0; 32];
    getrandom::fill(&mut salt).map_err(|err| Error::new(Code::Host, format!("no random bytes: {err}")))?;
    Ok(salt)
}

/// The 80-byte wrap under a key-encryption key, whatever `params` says it came from.
pub(super) fn wrap_under(
    kek: &Secret<32>,
    label: &str,
    params: SlotParams,
    target: &SlotTarget,
    dek: &Dek,
) -> Result<Slot> {
    check_label(label.as_bytes())?;
    let context = Slot::wrap_context(label, &params, target.model_id, target.vid, &target.dek_commit);
    let body = wrap_dek(kek, &context, dek).to_vec();
    Ok(Slot { label: label.into(), params, body })
}

fn seal_to(recipient: &RecipientKey, label: &str, target: &SlotTarget, dek: &Dek) -> Result<Slot> {
    let params = SlotParams::HpkeX25519 { recipient: recipient.key_id() };
    let context = Slot::wrap_context(label, &params, target.model_id, target.vid, &target.dek_commit);
    let body = seal_dek_to(recipient, &context, dek)?.to_vec();
    Ok(Slot { label: label.into(), params, body })
}

/// # Errors
/// `SLOT_COMMIT`, `SLOT_BODY` for what does not open; `NO_KEY` for a recipient's public half, which opens nothing.
pub(super) fn open_slot(slot: &Slot, material: &KeyMaterial, header: &ManifestHeader) -> Result<Dek> {
    match material {
        KeyMaterial::Key(kek) => unwrap_under(slot, kek, header),
        KeyMaterial::Passphrase(text) => unwrap_under(slot, &stretch(text, &slot.params)?, header),
        KeyMaterial::Private(secret) => open_dek_with(secret, &context_of(slot, header), &slot.body),
        KeyMaterial::Recipient(_) => refuse!(NoKey, "the public half of a key pair seals and does not open"),
    }
}

pub(super) fn unwrap_under(slot: &Slot, kek: &Secret<32>, header: &ManifestHeader) -> Result<Dek> {
    unwrap_dek(kek, &context_of(slot, header), &slot.body)
}

fn context_of(slot: &Slot, header: &ManifestHeader) -> Vec<u8> {
    Slot::wrap_context(&slot.label, &slot.params, header.model_id, header.vid, &header.dek_commit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Slots;
    use crate::mem::Secret;

    /// THREAT_MODEL (f) row 37: a label is data; what looks like a place is refused and never visited.
    #[test]
    fn a_label_that_looks_like_a_place_is_slot_label() {
        let (dek, model_id, vid, dek_commit) = (Dek::random(), ModelId::of_name("m"), Vid([1; 16]), [2; 32]);
        let target = SlotTarget { model_id, vid, dek_commit };
        let raw = KeyMaterial::Key(Secret::random());
        let long = "x".repeat(65);
        for label in ["../../etc/shadow", "http://evil", &long, "", "UPPER"] {
            let err = wrap(&raw, label, Cost::default(), &target, &dek).unwrap_err();
            assert_eq!(err.code(), Code::SlotLabel, "{label:?}");
            let slot = Slot { label: label.into(), params: SlotParams::Raw { salt: [0; 32] }, body: vec![0; 80] };
            let slots = Slots { generation: 1, model_id, vid, dek_commit, slots: vec![slot] };
            assert_eq!(slots.encode().unwrap_err().code(), Code::SlotLabel, "{label:?}");
        }
    }
}
