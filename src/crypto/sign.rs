//! Ed25519 signatures of manifests and refs, strictly verified.
//!
//! In: a message of the format, a key from local policy. Out: a signature, or yes or no.
//! Promises: small-order keys and points and non-canonical scalars are refused (`verify_strict`), so a signature has one
//! form only; a seed lives in secret memory and is expanded on the stack for one signature at a time.
//! Not here: which key is trusted for what (`keys::trust`).
//! Held by: the tests below.

use std::fmt;

use ed25519_dalek::{Signature, Signer, VerifyingKey};

use super::hash::sha256;
use crate::error::{Code, Error, Result};
use crate::format::KeyId;
use crate::mem::{Secret, scrub_stack};

pub const SIGNATURE_LEN: usize = 64;

/// A publisher's or releaser's secret half.
pub struct SigningKey {
    seed: Secret<32>,
    public: PublicKey,
}

impl SigningKey {
    pub fn generate() -> SigningKey {
        SigningKey::from_seed(Secret::random())
    }

    pub fn from_seed(seed: Secret<32>) -> SigningKey {
        let public = PublicKey(ed25519_dalek::SigningKey::from_bytes(seed.expose()).verifying_key().to_bytes());
        scrub_stack();
        SigningKey { seed, public }
    }

    pub fn public(&self) -> PublicKey {
        self.public
    }

    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_LEN] {
        let signature = ed25519_dalek::SigningKey::from_bytes(self.seed.expose()).sign(message).to_bytes();
        scrub_stack();
        signature
    }

    /// The seed, for the one place that writes a key file.
    pub(crate) fn seed(&self) -> &[u8; 32] {
        self.seed.expose()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(public {})", self.public)
    }
}

/// A public key, as trust files and `--trust` name it: 32 bytes, written as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub(crate) [u8; 32]);

impl PublicKey {
    /// # Errors
    /// `KEY_FORMAT` if the bytes are no point of the curve, or one of small order, under which anything verifies.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<PublicKey> {
        let bad = |why: &str| Error::new(Code::KeyFormat, format!("public key {} {why}", hex::encode(bytes)));
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| bad("is not an Ed25519 key"))?;
        if key.is_weak() {
            return Err(bad("is of small order: anyone can sign for it"));
        }
        Ok(PublicKey(bytes))
    }

    /// 64 hex digits, nothing around them.
    pub fn from_hex(text: &str) -> Result<PublicKey> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| {
            Error::new(Code::KeyFormat, format!("a public key is 64 hex digits, not {} characters", text.len()))
        })?;
        PublicKey::from_bytes(bytes)
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn key_id(&self) -> KeyId {
        KeyId(sha256(&[&self.0]))
    }

    pub fn verify_strict(&self, message: &[u8], signature: &[u8; SIGNATURE_LEN]) -> bool {
        match VerifyingKey::from_bytes(&self.0) {
            Ok(key) => key.verify_strict(message, &Signature::from_bytes(signature)).is_ok(),
            Err(_) => false,
        }
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}
impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_seed(Secret::from_bytes(&mut [seed; 32]))
    }

    /// RFC 8032 7.1, test 1.
    #[test]
    fn the_first_vector_of_rfc_8032_is_reproduced() {
        let mut seed = [0; 32];
        hex::decode_to_slice("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60", &mut seed).unwrap();
        let key = SigningKey::from_seed(Secret::from_bytes(&mut seed));
        assert_eq!(key.public().to_string(), "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a");
        let signature = key.sign(b"");
        assert!(hex::encode(signature).starts_with("e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901"));
        assert!(key.public().verify_strict(b"", &signature));
    }

    #[test]
    fn a_signature_holds_for_its_message_and_key_only() {
        let signature = key(1).sign(b"message");
        assert!(key(1).public().verify_strict(b"message", &signature));
        assert!(!key(1).public().verify_strict(b"massage", &signature));
        assert!(!key(2).public().verify_strict(b"message", &signature));
        for byte in 0..SIGNATURE_LEN {
            let mut bent = signature;
            bent[byte] ^= 1;
            assert!(!key(1).public().verify_strict(b"message", &bent), "byte {byte}");
        }
        assert!(!key(1).public().verify_strict(b"message", &[0; 64]));
    }

    #[test]
    fn a_small_order_key_is_no_key_and_verifies_nothing() {
        // The identity, and the all-zero encoding: under a lax verifier both accept the signature below for any message.
        for bytes in [
            {
                let mut one = [0; 32];
                one[0] = 1;
                one
            },
            [0; 32],
        ] {
            assert_eq!(PublicKey::from_bytes(bytes).unwrap_err().code(), Code::KeyFormat);
            let mut forged = [0; 64];
            forged[0] = 1;
            assert!(!PublicKey(bytes).verify_strict(b"anything", &forged));
        }
    }

    #[test]
    fn a_signature_with_the_group_order_added_to_s_is_refused() {
        const ORDER: [u8; 32] = [
            0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
        ];
        let mut signature = key(3).sign(b"message");
        let mut carry = 0u16;
        for (s, order) in signature[32..].iter_mut().zip(ORDER) {
            let sum = u16::from(*s) + u16::from(order) + carry;
            *s = sum as u8;
            carry = sum >> 8;
        }
        assert!(!key(3).public().verify_strict(b"message", &signature));
    }

    #[test]
    fn hex_of_another_length_or_alphabet_is_key_format() {
        for text in ["", "ab", &"g".repeat(64), &"a".repeat(63), &"a".repeat(66), &format!(" {}", "a".repeat(63))] {
            assert_eq!(PublicKey::from_hex(text).unwrap_err().code(), Code::KeyFormat, "{text:?}");
        }
    }

    #[test]
    fn a_signing_key_does_not_print_its_seed() {
        assert!(!format!("{:?}", key(0x5a)).contains(&"5a".repeat(32)));
    }
}
