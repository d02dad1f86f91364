//! The 80-byte wrap of a data key under a key-encryption key.
//!
//! In: a KEK of 32 uniform bytes and everything the wrap is bound to. Out: `commitment || AES-256-GCM(DEK)`, or the DEK.
//! Promises: a wrap opens under one KEK and one context only (`Slot::wrap_context`: slot header, label, parameters, model,
//! version, DEK commitment); the commitment is compared in constant time before the cipher is used (docs/FORMAT.md a.7).
//! Not here: what a slot means, where a KEK comes from (`keys`).
//! Held by: the vector of FORMAT.md a.9 and the tests below.

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::aead::{BlockCipher, TAG_LEN};
use super::dek::Dek;
use super::kdf::Derived;
use crate::error::Result;
use crate::format::Suite;
use crate::format::limits::SLOT_WRAP_LEN;
use crate::mem::{Secret, scrub_stack};
use crate::refuse;

const LABEL: &str = "slot-wrap";
const WRAP_LEN: usize = SLOT_WRAP_LEN;

/// Seals `dek` under `kek`. `context` comes from `Slot::wrap_context` and holds a fresh salt,
/// so one KEK may wrap any number of keys.
pub fn wrap_dek(kek: &Secret<32>, context: &[u8], dek: &Dek) -> [u8; WRAP_LEN] {
    let derived = Derived::new(kek.expose(), LABEL, &[context]);
    let mut body = [0; WRAP_LEN];
    body[..32].copy_from_slice(&derived.commit);
    let mut key = Zeroizing::new(*dek.expose());
    let tag = BlockCipher::new(Suite::Aes256Gcm, &derived).seal(0, b"", &mut key[..]);
    body[32..64].copy_from_slice(&key[..]);
    body[64..].copy_from_slice(&tag);
    drop((derived, key));
    scrub_stack();
    body
}

/// Opens a wrap. Whether the DEK is the manifest's is the caller's to check (`Dek::opens`).
///
/// # Errors
/// `SLOT_BODY` for another length than 80, `SLOT_COMMIT` for another KEK, or a slot moved here from elsewhere. A wrong
/// tag under a right commitment is `SLOT_BODY`.
pub fn unwrap_dek(kek: &Secret<32>, context: &[u8], body: &[u8]) -> Result<Dek> {
    let Ok(body) = <&[u8; WRAP_LEN]>::try_from(body) else {
        refuse!(SlotBody, "wrapped key is {} bytes long, not {WRAP_LEN}", body.len());
    };
    let opened = open_wrap(kek.expose(), context, body);
    scrub_stack();
    let mut dek = opened?;
    Ok(Dek::from_secret(Secret::from_bytes(&mut dek)))
}

fn open_wrap(kek: &[u8; 32], context: &[u8], body: &[u8; WRAP_LEN]) -> Result<Zeroizing<[u8; 32]>> {
    let derived = Derived::new(kek, LABEL, &[context]);
    if !bool::from(derived.commit.ct_eq(&body[..32])) {
        refuse!(SlotCommit, "wrapped key was not made with this key for this slot, model and version");
    }
    let mut dek = Zeroizing::new([0; 32]);
    dek.copy_from_slice(&body[32..64]);
    let tag: [u8; TAG_LEN] = body[64..].try_into().expect("the last 16 of 80 bytes");
    match BlockCipher::new(Suite::Aes256Gcm, &derived).open(0, b"", &mut dek[..], &tag) {
        Ok(()) => Ok(dek),
        Err(_) => refuse!(SlotBody, "wrapped key was changed after it was made"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn secret(byte: u8) -> Secret<32> {
        Secret::from_bytes(&mut [byte; 32])
    }

    #[test]
    fn a_wrap_opens_with_its_key_and_context_only() {
        let body = wrap_dek(&secret(1), b"context", &Dek::from_secret(secret(2)));
        assert_eq!(unwrap_dek(&secret(1), b"context", &body).unwrap().expose(), &[2; 32]);
        assert_eq!(unwrap_dek(&secret(9), b"context", &body).unwrap_err().code(), Code::SlotCommit);
        assert_eq!(unwrap_dek(&secret(1), b"contexT", &body).unwrap_err().code(), Code::SlotCommit);
    }

    #[test]
    fn every_bent_byte_and_every_other_length_of_a_wrap_is_refused() {
        let body = wrap_dek(&secret(1), b"context", &Dek::from_secret(secret(2)));
        for at in 0..WRAP_LEN {
            let mut bent = body;
            bent[at] ^= 0x80;
            let want = if at < 32 { Code::SlotCommit } else { Code::SlotBody };
            assert_eq!(unwrap_dek(&secret(1), b"context", &bent).unwrap_err().code(), want, "byte {at}");
        }
        for len in [0, 32, 79] {
            assert_eq!(unwrap_dek(&secret(1), b"context", &body[..len]).unwrap_err().code(), Code::SlotBody);
        }
        let long = [&body[..], &[0]].concat();
        assert_eq!(unwrap_dek(&secret(1), b"context", &long).unwrap_err().code(), Code::SlotBody);
    }
}
