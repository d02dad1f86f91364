//! What a passphrase costs to guess: the password hashes of the format and their bounds.
//!
//! In: a passphrase, the parameters of a slot (hostile). Out: the key that the slot was wrapped with, or a refusal.
//! Promises: no hash runs whose cost is out of bounds, whoever asks for it; what is derived ends in secret memory.
//! Spec: docs/FORMAT.md a.7. Held by: the tests below, THREAT_MODEL (f) row 36.

use std::num::NonZeroU32;

use ring::pbkdf2;
use zeroize::{Zeroize, Zeroizing};

use crate::error::{Code, Error, Result};
use crate::format::SlotParams;
use crate::mem::{Secret, scrub_stack};
use crate::refuse;

/// What guessing a passphrase shall cost, for a new slot. PBKDF2 is not among them: slots of that kind are read only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    Scrypt { log2_n: u8 },
    Argon2id { m_kib: u32, t: u32, p: u32 },
}

impl Default for Cost {
    /// 256 MiB, 3 passes, 4 lanes (docs/FORMAT.md a.7).
    fn default() -> Self {
        Cost::Argon2id { m_kib: 256 << 10, t: 3, p: 4 }
    }
}

/// Whether opening such a slot runs a password hash.
pub(super) fn is_password(params: &SlotParams) -> bool {
    matches!(params, SlotParams::Scrypt { .. } | SlotParams::Argon2id { .. } | SlotParams::Pbkdf2Sha512 { .. })
}

/// The same bounds as the parser's: asked again where the hash runs, so that no other way leads to it.
fn check_cost(params: &SlotParams) -> Result<()> {
    use crate::format::limits::{ARGON2_M_KIB, ARGON2_P, ARGON2_T, PBKDF2_ITERATIONS, SCRYPT_LOG2_N};
    let ok = match params {
        SlotParams::Scrypt { log2_n, .. } => SCRYPT_LOG2_N.contains(log2_n),
        SlotParams::Argon2id { m_kib, t, p, .. } => {
            ARGON2_M_KIB.contains(m_kib) && ARGON2_T.contains(t) && ARGON2_P.contains(p)
        }
        SlotParams::Pbkdf2Sha512 { iterations, .. } => PBKDF2_ITERATIONS.contains(iterations),
        SlotParams::Raw { .. }
        | SlotParams::VaultKv { .. }
        | SlotParams::VaultTransit
        | SlotParams::HpkeX25519 { .. }
        | SlotParams::Unknown { .. } => true,
    };
    if !ok {
        refuse!(SlotParams, "password hash with costs out of bounds: {params:?}");
    }
    Ok(())
}

/// The KEK of a passphrase slot. Argon2's memory is ours and wiped; scrypt's lies on the heap and is only freed, because
/// its crate takes none from us (it holds what a guess can be checked with, not the passphrase).
pub(super) fn stretch(passphrase: &[u8], params: &SlotParams) -> Result<Secret<32>> {
    check_cost(params)?;
    let mut kek = Zeroizing::new([0u8; 32]);
    match params {
        SlotParams::Scrypt { log2_n, salt } => {
            let costs = scrypt::Params::new(*log2_n, 8, 1).expect("2^15 to 2^20 with r = 8, p = 1 are valid");
            let salt = [&b"MFS1/scrypt\0"[..], salt].concat();
            scrypt::scrypt(passphrase, &salt, &costs, &mut kek[..]).expect("32 bytes are a valid length");
        }
        SlotParams::Argon2id { m_kib, t, p, salt } => {
            let costs =
                argon2::Params::new(*m_kib, *t, *p, Some(32)).expect("costs within the format's bounds are valid");
            let mut memory = Vec::new();
            memory.try_reserve_exact(costs.block_count()).map_err(|err| {
                Error::new(Code::NoRoom, format!("no {m_kib} KiB for a password hash")).with_source(err)
            })?;
            memory.resize(costs.block_count(), argon2::Block::new());
            let hasher = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, costs);
            let done = hasher.hash_password_into_with_memory(passphrase, salt, &mut kek[..], &mut memory[..]);
            memory.iter_mut().for_each(Zeroize::zeroize);
            done.map_err(|err| Error::new(Code::KeyFormat, format!("passphrase cannot be hashed: {err}")))?;
        }
        SlotParams::Pbkdf2Sha512 { iterations, salt } => {
            let iterations = NonZeroU32::new(*iterations).expect("within the format's bounds");
            let salt = [&b"MFS1/pbkdf2\0"[..], salt].concat();
            pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA512, iterations, &salt, passphrase, &mut kek[..]);
        }
        SlotParams::Raw { .. }
        | SlotParams::VaultKv { .. }
        | SlotParams::VaultTransit
        | SlotParams::HpkeX25519 { .. }
        | SlotParams::Unknown { .. } => {
            refuse!(SlotParams, "slot of kind {} takes no passphrase", params.kind().name());
        }
    }
    scrub_stack();
    Ok(Secret::from_bytes(&mut kek))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{ModelId, Slot, Slots, Vid};

    /// Known answers of other implementations: Python's hashlib.scrypt and hashlib.pbkdf2_hmac, and cryptography's Argon2id (both OpenSSL).
    #[test]
    fn password_hashes_get_the_salt_and_costs_of_the_page() {
        let salt = [1; 32];
        for (params, want) in [
            (
                SlotParams::Scrypt { log2_n: 15, salt },
                "bf27c73d8c1d3e7b7eebfc3653846e5af0bb668309a307ad2a88cce50c720cfa",
            ),
            (
                SlotParams::Argon2id { m_kib: 19_456, t: 1, p: 2, salt },
                "9d8b74261a86c28dc3e1a64e5b8fa6e7643b24fa8554e7bd15b361d27f707201",
            ),
            (
                SlotParams::Pbkdf2Sha512 { iterations: 100_000, salt },
                "b7257778c8c21200848a476065ef96f6ff512f1828607c76f3eee222d290b787",
            ),
        ] {
            assert_eq!(hex::encode(stretch(b"horse", &params).unwrap().expose()), want, "{params:?}");
        }
    }

    /// THREAT_MODEL (f) row 36.
    #[test]
    fn a_hash_out_of_bounds_is_refused_before_it_runs() {
        let salt = [0; 32];
        for params in [
            SlotParams::Scrypt { log2_n: 40, salt },
            SlotParams::Scrypt { log2_n: 14, salt },
            SlotParams::Argon2id { m_kib: u32::MAX, t: 1, p: 1, salt },
            SlotParams::Argon2id { m_kib: 19_456, t: u32::MAX, p: 1, salt },
            SlotParams::Argon2id { m_kib: 19_456, t: 1, p: 0, salt },
            SlotParams::Pbkdf2Sha512 { iterations: 0, salt },
            SlotParams::Pbkdf2Sha512 { iterations: 99_999, salt },
            SlotParams::Pbkdf2Sha512 { iterations: 10_000_001, salt },
            SlotParams::Pbkdf2Sha512 { iterations: u32::MAX, salt },
        ] {
            let err = stretch(b"horse", &params).unwrap_err();
            assert_eq!(err.code(), Code::SlotParams, "{params:?}");
            let (model_id, vid, dek_commit) = (ModelId([1; 32]), Vid([1; 16]), [1; 32]);
            let slot = Slot { label: "p".into(), params, body: vec![0; 80] };
            let slots = Slots { generation: 1, model_id, vid, dek_commit, slots: vec![slot] };
            assert_eq!(slots.encode().unwrap_err().code(), Code::SlotParams);
        }
    }
}
