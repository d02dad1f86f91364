//! Derives every key of the format by HKDF-Expand-SHA512; nothing else in the crate derives a key from a key.
//!
//! In: 32 uniform secret bytes, a label, a context. Out: as many bytes as asked for.
//! Promises: one label, one use; what is derived here is wiped when it is dropped.
//! Expand only: every input key is uniform already, so extracting first would add nothing (docs/FORMAT.md a.2).
//! Held by: the vectors of docs/FORMAT.md a.9 below.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha512;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Bytes one HMAC-SHA512 gives.
const STEP: usize = 64;

/// `X(prk, label, ctx, n)` of docs/FORMAT.md (a): HKDF-Expand-SHA512 with info `"MFS1/" || label || 0 || ctx`.
///
/// # Panics
/// If more than 255 steps are asked for, which no caller does.
pub(super) fn expand(prk: &[u8; 32], label: &str, context: &[&[u8]], out: &mut [u8]) {
    assert!(out.len() <= 255 * STEP, "{} bytes asked of one HKDF-Expand", out.len());
    let mut previous = Zeroizing::new([0u8; STEP]);
    let mut previous_len = 0;
    for (number, piece) in (1u8..=255).zip(out.chunks_mut(STEP)) {
        let mut mac = <Hmac<Sha512> as KeyInit>::new_from_slice(prk).expect("HMAC takes a key of any length");
        mac.update(&previous[..previous_len]);
        mac.update(b"MFS1/");
        mac.update(label.as_bytes());
        mac.update(&[0]);
        for part in context {
            mac.update(part);
        }
        mac.update(&[number]);
        let mut step = mac.finalize().into_bytes();
        previous.copy_from_slice(&step);
        step.as_mut_slice().zeroize();
        previous_len = STEP;
        piece.copy_from_slice(&previous[..piece.len()]);
    }
}

/// What seals and opens one object, one manifest body or one slot: cipher key, base nonce, and the commitment that is
/// compared before the cipher is used at all.
#[derive(Zeroize, ZeroizeOnDrop)]
pub(super) struct Derived {
    pub key: [u8; 32],
    pub base_nonce: [u8; 12],
    pub commit: [u8; 32],
}

impl Derived {
    pub fn new(prk: &[u8; 32], label: &str, context: &[&[u8]]) -> Derived {
        let mut bytes = Zeroizing::new([0u8; 32 + 12 + 32]);
        expand(prk, label, context, &mut bytes[..]);
        let mut derived = Derived { key: [0; 32], base_nonce: [0; 12], commit: [0; 32] };
        derived.key.copy_from_slice(&bytes[..32]);
        derived.base_nonce.copy_from_slice(&bytes[32..44]);
        derived.commit.copy_from_slice(&bytes[44..]);
        derived
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 5869 has no SHA-512 vector; the second step is what a one-step test would miss, so both are compared with
    /// ring's independent HKDF.
    #[test]
    fn expand_agrees_with_an_independent_hkdf_over_several_steps() {
        struct Len(usize);
        impl ring::hkdf::KeyType for Len {
            fn len(&self) -> usize {
                self.0
            }
        }
        let prk = [7u8; 32];
        for n in [1, 32, 63, 64, 65, 76, 128, 200] {
            let mut ours = vec![0; n];
            expand(&prk, "object", &[b"con", b"text"], &mut ours);
            let mut theirs = vec![0; n];
            ring::hkdf::Prk::new_less_safe(ring::hkdf::HKDF_SHA512, &prk)
                .expand(&[b"MFS1/object\0context"], Len(n))
                .and_then(|okm| okm.fill(&mut theirs))
                .unwrap();
            assert_eq!(ours, theirs, "{n} bytes");
        }
    }
}
