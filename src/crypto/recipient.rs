//! Seals a data key to a public key, so that who seals need not be able to open.
//!
//! In: an X25519 key and everything the slot is bound to. Out: 80 bytes `enc || AES-256-GCM(DEK)` of HPKE (RFC 9180) in
//! base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM; or the DEK.
//! Promises: keys under which every secret is zero are refused before anything is sealed to them, and so is a body that
//! leads to such a secret; a secret half lives in secret memory and is expanded on the stack for one opening at a time.
//! HPKE does not commit to its key, and base mode does not say who sealed: what comes out is nobody's until the caller
//! has compared it with the signed commitment (`Dek::opens`), which admits one data key.
//! Not here: what a slot means, where a secret half lies (`keys`).
//! Spec: docs/FORMAT.md a.7. Held by: `vectors` and the tests below.

use std::fmt;
use std::str::FromStr;

use hpke::aead::{AeadTag, AesGcm256};
use hpke::inout::InOutBuf;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::rand_core::{Infallible, TryCryptoRng, TryRng};
use hpke::{Deserializable, HpkeError, Kem, OpModeR, OpModeS, Serializable};
use zeroize::Zeroizing;

use super::dek::Dek;
use super::hash::sha256;
use crate::error::{Code, Error, Result};
use crate::format::KeyId;
use crate::format::limits::SLOT_WRAP_LEN;
use crate::mem::{Secret, scrub_stack};
use crate::refuse;

const INFO: &[u8] = b"MFS1/hpke\0";
const ENC_LEN: usize = 32;
const PREFIX: &str = "modelfs-x25519:";

type Sealed = [u8; SLOT_WRAP_LEN];

/// Whom a data key can be sealed to. Written `modelfs-x25519:` and 64 hex digits, so that nobody takes it for the public
/// half of a signing key, which is 64 hex digits alone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecipientKey([u8; 32]);

impl RecipientKey {
    /// # Errors
    /// `KEY_FORMAT` for bytes that no key pair has: not reduced, or of small order.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<RecipientKey> {
        let key = RecipientKey(bytes);
        if !is_reduced(&bytes) {
            refuse!(KeyFormat, "recipient {key} is not an X25519 public key");
        }
        // A zero shared secret is what small order means; any scalar finds it, for all are multiples of eight.
        if encapsulate(&key, Zeroizing::new([1; 32]), INFO, &mut [0; 32]).is_err() {
            refuse!(KeyFormat, "recipient {key} is of small order: anyone could open what is sealed to it");
        }
        Ok(key)
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// SHA-256 of the raw key, as a slot names its recipient.
    pub fn key_id(&self) -> KeyId {
        KeyId(sha256(&[&self.0]))
    }
}

impl FromStr for RecipientKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<RecipientKey> {
        let mut bytes = [0; 32];
        let digits = text.strip_prefix(PREFIX).map(|digits| hex::decode_to_slice(digits, &mut bytes));
        match digits {
            Some(Ok(())) => RecipientKey::from_bytes(bytes),
            Some(Err(_)) => refuse!(KeyFormat, "a recipient is {PREFIX} and 64 hex digits"),
            // It may be anything, a secret too: it is not repeated.
            None => refuse!(
                KeyFormat,
                "a recipient starts with {PREFIX}; 64 hex digits alone are the public half of a signing key"
            ),
        }
    }
}

impl fmt::Display for RecipientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", hex::encode(self.0))
    }
}
impl fmt::Debug for RecipientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Below 2^255 - 19: the one way to write a point, so that one key has one id.
fn is_reduced(bytes: &[u8; 32]) -> bool {
    let top = bytes[31] == 0x7f && bytes[1..31].iter().all(|byte| *byte == 0xff) && bytes[0] >= 0xed;
    bytes[31] <= 0x7f && !top
}

/// Who opens what was sealed to [`RecipientSecret::public`].
pub struct RecipientSecret {
    seed: Secret<32>,
    public: RecipientKey,
}

impl RecipientSecret {
    pub fn generate() -> RecipientSecret {
        RecipientSecret::from_seed(Secret::random())
    }

    /// Any 32 bytes: X25519 fixes the five bits that matter.
    pub fn from_seed(seed: Secret<32>) -> RecipientSecret {
        let public = X25519HkdfSha256::sk_to_pk(&expand(&seed)).to_bytes().into();
        scrub_stack();
        RecipientSecret { seed, public: RecipientKey(public) }
    }

    pub fn public(&self) -> RecipientKey {
        self.public
    }

    /// The seed, for the one place that writes a key file.
    pub(crate) fn seed(&self) -> &[u8; 32] {
        self.seed.expose()
    }
}

impl fmt::Debug for RecipientSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecipientSecret(public {})", self.public)
    }
}

/// On the stack; wiped by its drop and by the caller's `scrub_stack`.
fn expand(seed: &Secret<32>) -> <X25519HkdfSha256 as Kem>::PrivateKey {
    Deserializable::from_bytes(seed.expose()).expect("32 bytes are a private key")
}

/// Seals `dek` to `recipient`. `context` comes from `Slot::wrap_context`. Two calls never give the same bytes.
///
/// # Errors
/// `HOST` if the kernel has no random bytes.
pub fn seal_dek_to(recipient: &RecipientKey, context: &[u8], dek: &Dek) -> Result<Sealed> {
    let mut drawn = Zeroizing::new([0; 32]);
    getrandom::fill(&mut drawn[..]).map_err(|err| Error::new(Code::Host, format!("no random bytes: {err}")))?;
    seal_with(recipient, context, dek, drawn)
}

/// `drawn` is the input of DeriveKeyPair for the ephemeral key: 32 random bytes, used once.
pub(super) fn seal_with(
    recipient: &RecipientKey,
    context: &[u8],
    dek: &Dek,
    drawn: Zeroizing<[u8; 32]>,
) -> Result<Sealed> {
    let mut key = Zeroizing::new(*dek.expose());
    let sealed = encapsulate(recipient, drawn, &[INFO, context].concat(), &mut key);
    scrub_stack();
    let Ok((enc, tag)) = sealed else {
        refuse!(KeyFormat, "recipient {recipient} takes no key");
    };
    let mut body = [0; SLOT_WRAP_LEN];
    body[..ENC_LEN].copy_from_slice(&enc);
    body[ENC_LEN..64].copy_from_slice(&key[..]);
    body[64..].copy_from_slice(&tag);
    Ok(body)
}

fn encapsulate(
    recipient: &RecipientKey,
    drawn: Zeroizing<[u8; 32]>,
    info: &[u8],
    key: &mut [u8; 32],
) -> std::result::Result<([u8; ENC_LEN], [u8; 16]), HpkeError> {
    let public = Deserializable::from_bytes(&recipient.0)?;
    let (enc, tag) = hpke::single_shot_seal_inout_detached_with_rng::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeS::Base,
        &public,
        info,
        InOutBuf::from(&mut key[..]),
        b"",
        &mut Once(Some(drawn)),
    )?;
    Ok((enc.to_bytes().into(), tag.to_bytes().into()))
}

/// Opens a body of [`seal_dek_to`]. Whether the DEK is the manifest's is the caller's to check (`Dek::opens`).
///
/// # Errors
/// `SLOT_BODY` for another length than 80, and for an `enc` of small order. `SLOT_COMMIT` for a body that was sealed to
/// another key, for another slot, model or version, or changed: HPKE cannot tell which.
pub fn open_dek_with(secret: &RecipientSecret, context: &[u8], body: &[u8]) -> Result<Dek> {
    let Ok(body) = <&Sealed>::try_from(body) else {
        refuse!(SlotBody, "sealed key is {} bytes long, not {SLOT_WRAP_LEN}", body.len());
    };
    let mut key = Zeroizing::new([0; 32]);
    key.copy_from_slice(&body[ENC_LEN..64]);
    let opened = open_into(secret, &[INFO, context].concat(), body, &mut key);
    scrub_stack();
    match opened {
        Ok(()) => Ok(Dek::from_secret(Secret::from_bytes(&mut key))),
        Err(HpkeError::DecapError) => refuse!(SlotBody, "sealed key names a point of small order"),
        Err(_) => refuse!(SlotCommit, "sealed key was not made for this recipient, slot, model and version"),
    }
}

fn open_into(
    secret: &RecipientSecret,
    info: &[u8],
    body: &Sealed,
    key: &mut [u8; 32],
) -> std::result::Result<(), HpkeError> {
    let enc = Deserializable::from_bytes(&body[..ENC_LEN])?;
    let tag = AeadTag::<AesGcm256>::from_bytes(&body[64..])?;
    hpke::single_shot_open_inout_detached::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeR::Base,
        &expand(&secret.seed),
        &enc,
        info,
        InOutBuf::from(&mut key[..]),
        b"",
        &tag,
    )
}

/// A generator of 32 bytes that were drawn before, where failing to draw is an error and no panic; and the one way a
/// vector can be made.
struct Once(Option<Zeroizing<[u8; 32]>>);

impl TryRng for Once {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> std::result::Result<u32, Infallible> {
        unreachable!("a key pair is derived from bytes")
    }
    fn try_next_u64(&mut self) -> std::result::Result<u64, Infallible> {
        unreachable!("a key pair is derived from bytes")
    }
    fn try_fill_bytes(&mut self, out: &mut [u8]) -> std::result::Result<(), Infallible> {
        out.copy_from_slice(&self.0.take().expect("one key pair is derived, once")[..]);
        Ok(())
    }
}
impl TryCryptoRng for Once {}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: u8) -> RecipientSecret {
        RecipientSecret::from_seed(Secret::from_bytes(&mut [byte; 32]))
    }
    fn dek() -> Dek {
        Dek::from_secret(Secret::from_bytes(&mut [2; 32]))
    }

    #[test]
    fn a_sealed_key_opens_with_its_secret_and_context_only() {
        let body = seal_dek_to(&secret(1).public(), b"context", &dek()).unwrap();
        assert_eq!(open_dek_with(&secret(1), b"context", &body).unwrap().expose(), &[2; 32]);
        assert_eq!(open_dek_with(&secret(9), b"context", &body).unwrap_err().code(), Code::SlotCommit);
        assert_eq!(open_dek_with(&secret(1), b"contexT", &body).unwrap_err().code(), Code::SlotCommit);
        assert_ne!(seal_dek_to(&secret(1).public(), b"context", &dek()).unwrap(), body, "an ephemeral key used twice");
    }

    #[test]
    fn every_bent_byte_and_every_other_length_of_a_sealed_key_is_refused() {
        let body = seal_dek_to(&secret(1).public(), b"context", &dek()).unwrap();
        for at in 0..SLOT_WRAP_LEN {
            let mut bent = body;
            bent[at] ^= 0x80;
            assert_eq!(open_dek_with(&secret(1), b"context", &bent).unwrap_err().code(), Code::SlotCommit, "byte {at}");
        }
        let long = [&body[..], &[0]].concat();
        for wrong in [&body[..0], &body[..32], &body[..79], &long] {
            assert_eq!(open_dek_with(&secret(1), b"context", wrong).unwrap_err().code(), Code::SlotBody);
        }
    }

    /// The points whose order divides eight, as u-coordinates below 2^255: RFC 7748 6.1 leaves refusing them to us.
    fn small_order() -> Vec<[u8; 32]> {
        let eight = [
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
            "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        ];
        let mut points = vec![[0; 32], [0; 32]];
        points[1][0] = 1;
        points.extend(eight.map(|point| <[u8; 32]>::try_from(hex::decode(point).unwrap()).unwrap()));
        points
    }

    #[test]
    fn a_recipient_or_a_body_of_small_order_is_refused() {
        let body = seal_dek_to(&secret(1).public(), b"context", &dek()).unwrap();
        for point in small_order() {
            let err = RecipientKey::from_bytes(point).unwrap_err();
            assert!(err.code() == Code::KeyFormat && err.message().contains("small order"), "{err:?}");
            assert_eq!(seal_dek_to(&RecipientKey(point), b"context", &dek()).unwrap_err().code(), Code::KeyFormat);
            // With the top bit set it is the same point.
            for top in [0, 0x80] {
                let mut bent = body;
                bent[..32].copy_from_slice(&point);
                bent[31] |= top;
                assert_eq!(open_dek_with(&secret(1), b"context", &bent).unwrap_err().code(), Code::SlotBody);
            }
        }
    }

    #[test]
    fn a_key_that_is_not_reduced_has_no_second_spelling() {
        let good = *secret(1).public().bytes();
        RecipientKey::from_bytes(good).unwrap();
        let mut top = good;
        top[31] |= 0x80;
        // p + 9 is the base point again, p + 1 a small one; 2^255 - 1 is p + 18.
        let wide = |low: u8| std::array::from_fn(|i| [low, 0xff, 0x7f][usize::from(i > 0) + usize::from(i > 30)]);
        for wrong in [top, wide(0xed), wide(0xee), wide(0xf6), wide(0xff)] {
            let err = RecipientKey::from_bytes(wrong).unwrap_err();
            assert!(err.code() == Code::KeyFormat && err.message().contains("not an X25519"), "{err:?}");
        }
        let mut base = [0; 32];
        base[0] = 9;
        RecipientKey::from_bytes(base).unwrap();
    }

    #[test]
    fn a_recipient_is_written_so_that_nobody_takes_it_for_a_signing_key() {
        let text = secret(1).public().to_string();
        assert_eq!(text.parse::<RecipientKey>().unwrap(), secret(1).public());
        let bare = &text[PREFIX.len()..];
        let err = bare.parse::<RecipientKey>().unwrap_err();
        assert!(err.code() == Code::KeyFormat && !err.message().contains(bare), "{err:?}");
        for wrong in [&text[..78], &format!("{text}0"), &text.to_uppercase(), PREFIX, ""] {
            assert_eq!(wrong.parse::<RecipientKey>().unwrap_err().code(), Code::KeyFormat, "{wrong:?}");
        }
        assert_eq!(super::super::PublicKey::from_hex(&text).unwrap_err().code(), Code::KeyFormat);
    }
}
