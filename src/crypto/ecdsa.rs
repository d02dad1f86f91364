//! ECDSA public keys of others' formats: P-256, P-384 and P-521, each with its own hash; only ever to verify.
//!
//! In: a key as PEM or as the DER of a SubjectPublicKeyInfo. Out: yes or no to a message and a signature in DER.
//! Promises: one encoding of a key is accepted (named curve, uncompressed point), so a key has one fingerprint.
//! Held by: the tests below, tests/oms.rs.

use std::fmt;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ECDSA_P521_SHA512_ASN1, EcdsaVerificationAlgorithm,
    UnparsedPublicKey,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::hash::sha256;
use crate::error::Result;
use crate::refuse;

const PEM_HEAD: &str = "-----BEGIN PUBLIC KEY-----";
const PEM_TAIL: &str = "-----END PUBLIC KEY-----";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Curve {
    P256,
    P384,
    P521,
}

impl Curve {
    const ALL: [Curve; 3] = [Curve::P256, Curve::P384, Curve::P521];

    const fn name(self) -> &'static str {
        match self {
            Curve::P256 => "P-256",
            Curve::P384 => "P-384",
            Curve::P521 => "P-521",
        }
    }

    /// The DER before the point (RFC 5480), and the length of the point in bytes.
    const fn frame(self) -> (&'static [u8], usize) {
        match self {
            Curve::P256 => (
                &[
                    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
                    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
                ],
                65,
            ),
            Curve::P384 => (
                &[
                    0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b,
                    0x81, 0x04, 0x00, 0x22, 0x03, 0x62, 0x00,
                ],
                97,
            ),
            Curve::P521 => (
                &[
                    0x30, 0x81, 0x9b, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05,
                    0x2b, 0x81, 0x04, 0x00, 0x23, 0x03, 0x81, 0x86, 0x00,
                ],
                133,
            ),
        }
    }

    fn algorithm(self) -> &'static EcdsaVerificationAlgorithm {
        match self {
            Curve::P256 => &ECDSA_P256_SHA256_ASN1,
            Curve::P384 => &ECDSA_P384_SHA384_ASN1,
            Curve::P521 => &ECDSA_P521_SHA512_ASN1,
        }
    }
}

/// A key that verifies.
#[derive(Clone, PartialEq, Eq)]
pub struct EcPublicKey {
    curve: Curve,
    /// SubjectPublicKeyInfo.
    der: Vec<u8>,
}

impl EcPublicKey {
    /// # Errors
    /// `KEY_FORMAT` for what is no key of the three curves; a point that lies on none of them verifies nothing.
    pub fn from_der(der: &[u8]) -> Result<EcPublicKey> {
        for curve in Curve::ALL {
            let (frame, point_len) = curve.frame();
            if der.len() == frame.len() + point_len && der.starts_with(frame) && der[frame.len()] == 4 {
                return Ok(EcPublicKey { curve, der: der.to_vec() });
            }
        }
        refuse!(KeyFormat, "not a public key of the curves P-256, P-384 or P-521 with an uncompressed point");
    }

    /// `-----BEGIN PUBLIC KEY-----` and so on, one key, nothing around it.
    pub fn from_pem(text: &str) -> Result<EcPublicKey> {
        let inner = text.trim().strip_prefix(PEM_HEAD).and_then(|rest| rest.strip_suffix(PEM_TAIL));
        let Some(inner) = inner else {
            refuse!(KeyFormat, "not a public key in PEM: it does not stand between {PEM_HEAD} and {PEM_TAIL}");
        };
        let joined: String = inner.split_ascii_whitespace().collect();
        match STANDARD.decode(joined) {
            Ok(der) => EcPublicKey::from_der(&der),
            Err(_) => refuse!(KeyFormat, "the public key in PEM is not base64"),
        }
    }

    pub fn curve(&self) -> &'static str {
        self.curve.name()
    }

    /// SHA-256 over the key's PEM with lines of 64 characters, in hex: how OpenSSF model signing names a key.
    pub fn pem_fingerprint(&self) -> String {
        let base64 = STANDARD.encode(&self.der);
        let mut pem = format!("{PEM_HEAD}\n");
        for line in base64.as_bytes().chunks(64) {
            pem.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
            pem.push('\n');
        }
        pem.push_str(PEM_TAIL);
        pem.push('\n');
        hex::encode(sha256(&[pem.as_bytes()]))
    }

    /// Whether `signature` (DER) is one of this key over `message`, hashed with the curve's own hash.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        let point = &self.der[self.curve.frame().0.len()..];
        UnparsedPublicKey::new(self.curve.algorithm(), point).verify(message, signature).is_ok()
    }
}

impl fmt::Debug for EcPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EcPublicKey({} {})", self.curve.name(), self.pem_fingerprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use aws_lc_rs::encoding::AsDer;
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair,
        KeyPair,
    };

    #[test]
    fn a_key_of_each_curve_verifies_its_own_signatures_only() {
        for (algorithm, name) in [
            (&ECDSA_P256_SHA256_ASN1_SIGNING, "P-256"),
            (&ECDSA_P384_SHA384_ASN1_SIGNING, "P-384"),
            (&ECDSA_P521_SHA512_ASN1_SIGNING, "P-521"),
        ] {
            let pair = EcdsaKeyPair::generate(algorithm).expect("a new key");
            let der: aws_lc_rs::encoding::PublicKeyX509Der<'_> = pair.public_key().as_der().expect("encoded");
            let key = EcPublicKey::from_der(der.as_ref()).expect(name);
            assert_eq!(key.curve(), name);
            let pem = format!("{PEM_HEAD}\n{}\n{PEM_TAIL}\n", STANDARD.encode(der.as_ref()));
            assert_eq!(EcPublicKey::from_pem(&pem).expect("PEM"), key);
            let signature = pair.sign(&SystemRandom::new(), b"message").expect("signed");
            assert!(key.verify(b"message", signature.as_ref()));
            assert!(!key.verify(b"other", signature.as_ref()));
            assert!(!key.verify(b"message", &signature.as_ref()[1..]));
            let mut off = der.as_ref().to_vec();
            let last = off.len() - 1;
            off[last] ^= 1;
            assert!(!EcPublicKey::from_der(&off).expect("framed").verify(b"message", signature.as_ref()));
        }
    }

    #[test]
    fn what_is_no_key_of_the_three_curves_is_refused() {
        for text in [
            "",
            "-----BEGIN PUBLIC KEY-----\n!!\n-----END PUBLIC KEY-----",
            "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----",
            "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----",
        ] {
            assert_eq!(EcPublicKey::from_pem(text).expect_err(text).code(), Code::KeyFormat);
        }
    }
}
