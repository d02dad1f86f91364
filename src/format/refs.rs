//! Signed pointers: a ref names the version a channel serves, a signature object vouches for a manifest.
//!
//! In: hostile bytes of fixed shape. Out: their fields; nothing here says that a signature is good (`crypto`) or that a
//! ref is fresh (`keys::floor`).
//! Spec: docs/FORMAT.md a.5 and a.6.

use super::limits::{MANIFEST_BYTES_MAX, MANIFEST_BYTES_MIN, REF_SIGNATURES_MAX};
use super::wire::{array_at, i64_at, is_zero, put, u16_at, u32_at, u64_at};
use super::{
    ChannelId, FORMAT_VERSION, KeyId, ManifestDigest, ModelId, REF_HEAD_LEN, REF_SIGNATURE_LEN, SIGNATURE_ALG_ED25519,
    SIGNATURE_LEN, Vid, sha256,
};
use crate::error::Result;
use crate::refuse;

const REF_MAGIC: &[u8; 8] = b"MFS1REF\0";
const SIGNATURE_MAGIC: &[u8; 8] = b"MFS1SIGN";

/// What a channel serves from `ref_seq` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ref {
    /// How many keys sign it, 1 to 4: it lies within the signed bytes, so it is settled before the first signature.
    pub n_sigs: u8,
    pub model_id: ModelId,
    pub channel_id: ChannelId,
    /// From 1, one higher each time.
    pub ref_seq: u64,
    /// The `seq` of the manifest: its version number.
    pub seq: u64,
    pub manifest_digest: ManifestDigest,
    pub manifest_len: u64,
    pub vid: Vid,
    /// Unix seconds.
    pub issued_at: i64,
    /// Unix seconds; `i64::MAX`: never.
    pub expires_at: i64,
    pub min_slots_generation: u32,
    /// No version below this may be served any more.
    pub min_version_seq: u64,
    /// SHA-256 of the head of the ref before this one; zero in the first.
    pub previous: [u8; 32],
}

/// One signature over a ref.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefSignature {
    pub key_id: KeyId,
    pub signature: [u8; 64],
}

impl Ref {
    /// The signed 256 bytes.
    pub fn encode_head(&self) -> [u8; REF_HEAD_LEN] {
        let mut out = [0u8; REF_HEAD_LEN];
        put(&mut out, 0, REF_MAGIC);
        put(&mut out, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut out, 12, &u32::from(self.n_sigs).to_le_bytes());
        put(&mut out, 16, &self.model_id.0);
        put(&mut out, 48, &self.channel_id.0);
        put(&mut out, 80, &self.ref_seq.to_le_bytes());
        put(&mut out, 88, &self.seq.to_le_bytes());
        put(&mut out, 96, &self.manifest_digest.0);
        put(&mut out, 128, &self.manifest_len.to_le_bytes());
        put(&mut out, 136, &self.vid.0);
        put(&mut out, 152, &self.issued_at.to_le_bytes());
        put(&mut out, 160, &self.expires_at.to_le_bytes());
        put(&mut out, 168, &self.min_slots_generation.to_le_bytes());
        put(&mut out, 176, &self.min_version_seq.to_le_bytes());
        put(&mut out, 184, &self.previous);
        out
    }

    /// What the next ref of the channel carries as `previous`.
    pub fn head_digest(&self) -> [u8; 32] {
        sha256(&[&self.encode_head()])
    }

    /// What is signed.
    pub fn message(&self) -> Vec<u8> {
        [&b"MFS1/ref-signature\0"[..], &self.encode_head()].concat()
    }

    /// The whole object.
    ///
    /// # Panics
    /// If there are not `n_sigs` signatures.
    pub fn encode(&self, signatures: &[RefSignature]) -> Vec<u8> {
        assert!(signatures.len() == usize::from(self.n_sigs), "{} {}", signatures.len(), self.n_sigs);
        let mut out = self.encode_head().to_vec();
        for signature in signatures {
            out.extend(SIGNATURE_ALG_ED25519.to_le_bytes());
            out.extend([0; 2]);
            out.extend(signature.key_id.0);
            out.extend(signature.signature);
        }
        out
    }

    /// # Errors
    /// `REF_LENGTH` for a number of signatures outside 1..=4 or a length that does not follow from it, `REF_FORMAT` for
    /// fields no ref has, `UNSUPPORTED` for what a later format may mean.
    pub fn parse(bytes: &[u8]) -> Result<(Ref, Vec<RefSignature>)> {
        let Some((head, rest)) = bytes.split_at_checked(REF_HEAD_LEN) else {
            refuse!(RefLength, "ref is {} bytes long, its head alone has {REF_HEAD_LEN}", bytes.len());
        };
        if &head[..8] != REF_MAGIC {
            refuse!(RefFormat, "ref does not start with MFS1REF");
        }
        let version = u16_at(head, 8);
        if version != FORMAT_VERSION {
            refuse!(Unsupported, "ref has format version {version}, this reader knows {FORMAT_VERSION}");
        }
        let stated = u32_at(head, 12);
        let n_sigs = match u8::try_from(stated) {
            Ok(n) if (1..=REF_SIGNATURES_MAX).contains(&usize::from(n)) => n,
            _ => refuse!(RefLength, "ref says {stated} signatures, 1 to {REF_SIGNATURES_MAX} are allowed"),
        };
        if rest.len() != usize::from(n_sigs) * REF_SIGNATURE_LEN {
            refuse!(RefLength, "ref with {n_sigs} signatures is {} bytes long", bytes.len());
        }
        if u16_at(head, 10) != 0 || !is_zero(&head[172..176]) || !is_zero(&head[216..]) {
            refuse!(Unsupported, "ref has a flag or a reserved byte set");
        }
        let parsed = Ref {
            n_sigs,
            model_id: ModelId(array_at(head, 16)),
            channel_id: ChannelId(array_at(head, 48)),
            ref_seq: u64_at(head, 80),
            seq: u64_at(head, 88),
            manifest_digest: ManifestDigest(array_at(head, 96)),
            manifest_len: u64_at(head, 128),
            vid: Vid(array_at(head, 136)),
            issued_at: i64_at(head, 152),
            expires_at: i64_at(head, 160),
            min_slots_generation: u32_at(head, 168),
            min_version_seq: u64_at(head, 176),
            previous: array_at(head, 184),
        };
        if parsed.ref_seq == 0 || parsed.seq == 0 {
            refuse!(RefFormat, "ref {} names version {}; both count from 1", parsed.ref_seq, parsed.seq);
        }
        if !(MANIFEST_BYTES_MIN..=MANIFEST_BYTES_MAX).contains(&parsed.manifest_len) {
            refuse!(RefFormat, "ref says a manifest of {} bytes, which none has", parsed.manifest_len);
        }
        let signatures = rest.chunks_exact(REF_SIGNATURE_LEN).map(parse_ref_signature).collect::<Result<_>>()?;
        Ok((parsed, signatures))
    }
}

fn parse_ref_signature(bytes: &[u8]) -> Result<RefSignature> {
    let (alg, reserved) = (u16_at(bytes, 0), u16_at(bytes, 2));
    if alg != SIGNATURE_ALG_ED25519 || reserved != 0 {
        refuse!(Unsupported, "ref signature has algorithm {alg}, this reader knows 1 (Ed25519)");
    }
    Ok(RefSignature { key_id: KeyId(array_at(bytes, 4)), signature: array_at(bytes, 36) })
}

/// One publisher's signature over one manifest, an object of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignatureObject {
    pub key_id: KeyId,
    pub manifest_digest: ManifestDigest,
    pub signature: [u8; 64],
}

impl SignatureObject {
    pub fn encode(&self) -> [u8; SIGNATURE_LEN] {
        let mut out = [0u8; SIGNATURE_LEN];
        put(&mut out, 0, SIGNATURE_MAGIC);
        put(&mut out, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut out, 10, &SIGNATURE_ALG_ED25519.to_le_bytes());
        put(&mut out, 16, &self.key_id.0);
        put(&mut out, 48, &self.manifest_digest.0);
        put(&mut out, 80, &self.signature);
        out
    }

    /// # Errors
    /// `MAN_SIG` for another length or magic, `UNSUPPORTED` for what a later format may mean.
    pub fn parse(bytes: &[u8]) -> Result<SignatureObject> {
        if bytes.len() != SIGNATURE_LEN || &bytes[..8] != SIGNATURE_MAGIC {
            refuse!(ManSig, "manifest signature of {} bytes is no MFS1SIGN of {SIGNATURE_LEN}", bytes.len());
        }
        let (version, alg) = (u16_at(bytes, 8), u16_at(bytes, 10));
        if version != FORMAT_VERSION || alg != SIGNATURE_ALG_ED25519 || !is_zero(&bytes[12..16]) {
            refuse!(
                Unsupported,
                "manifest signature has version {version} and algorithm {alg}, known are 1 and 1 (Ed25519)"
            );
        }
        Ok(SignatureObject {
            key_id: KeyId(array_at(bytes, 16)),
            manifest_digest: ManifestDigest(array_at(bytes, 48)),
            signature: array_at(bytes, 80),
        })
    }
}

/// What a publisher signs about a manifest: 96 bytes, so that any signing service takes them.
pub fn manifest_message(digest: ManifestDigest, model_id: ModelId, seq: u64) -> [u8; 96] {
    let mut message = [0u8; 96];
    put(&mut message, 0, b"MFS1/manifest-signature\0");
    put(&mut message, 24, &digest.0);
    put(&mut message, 56, &model_id.0);
    put(&mut message, 88, &seq.to_le_bytes());
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn reference() -> Ref {
        Ref {
            n_sigs: 1,
            model_id: ModelId([1; 32]),
            channel_id: ChannelId::of_name("prod"),
            ref_seq: 42,
            seq: 7,
            manifest_digest: ManifestDigest([2; 32]),
            manifest_len: 1169,
            vid: Vid([3; 16]),
            issued_at: 1_790_000_000,
            expires_at: i64::MAX,
            min_slots_generation: 1,
            min_version_seq: 0,
            previous: [4; 32],
        }
    }

    fn signature() -> RefSignature {
        RefSignature { key_id: KeyId([5; 32]), signature: [6; 64] }
    }

    fn code(bytes: &[u8]) -> Code {
        Ref::parse(bytes).unwrap_err().code()
    }

    #[test]
    fn a_ref_is_read_back_as_written() {
        for n_sigs in 1..=4 {
            let reference = Ref { n_sigs, ..reference() };
            let signatures = vec![signature(); usize::from(n_sigs)];
            let bytes = reference.encode(&signatures);
            assert_eq!(bytes.len(), 256 + 100 * usize::from(n_sigs));
            assert_eq!(Ref::parse(&bytes).unwrap(), (reference, signatures));
        }
    }

    /// THREAT_MODEL (f) rows 28 and 54.
    #[test]
    fn the_shape_of_a_ref_is_checked() {
        let good = reference().encode(&[signature()]);
        for len in [0, 255, 256, 355] {
            assert_eq!(code(&good[..len]), Code::RefLength, "{len}");
        }
        let cases: &[(usize, &[u8], Code)] = &[
            (0, b"m", Code::RefFormat),
            (8, &[2], Code::Unsupported),
            (10, &[1], Code::Unsupported),
            (12, &[0], Code::RefLength),
            (12, &[2], Code::RefLength),
            (12, &[5], Code::RefLength),
            (12, &[0xff; 4], Code::RefLength),
            (12, &[1, 1, 0, 0], Code::RefLength),
            (80, &[0; 8], Code::RefFormat),
            (88, &[0; 8], Code::RefFormat),
            (128, &[0; 8], Code::RefFormat),
            (128, &[0xff; 8], Code::RefFormat),
            (172, &[1], Code::Unsupported),
            (216, &[1], Code::Unsupported),
            (255, &[1], Code::Unsupported),
            (256, &[2], Code::Unsupported),
            (258, &[1], Code::Unsupported),
        ];
        for (at, bytes, want) in cases {
            let mut wrong = good.clone();
            put(&mut wrong, *at, bytes);
            assert_eq!(code(&wrong), *want, "offset {at} {bytes:?}");
        }
        let mut longer = good;
        longer.push(0);
        assert_eq!(code(&longer), Code::RefLength);
        let five = [reference().encode(&[signature()]), vec![0; 400]].concat();
        assert_eq!(code(&five), Code::RefLength);
    }

    /// THREAT_MODEL (f) row 26: numbers near the end are for the floor to refuse, not for arithmetic to trip over.
    #[test]
    fn the_highest_numbers_are_read() {
        let high = Ref { ref_seq: u64::MAX, seq: u64::MAX, ..reference() };
        assert_eq!(Ref::parse(&high.encode(&[signature()])).unwrap().0, high);
    }

    #[test]
    fn a_signature_object_is_checked_and_read_back() {
        let object =
            SignatureObject { key_id: KeyId([1; 32]), manifest_digest: ManifestDigest([2; 32]), signature: [3; 64] };
        let good = object.encode();
        assert_eq!(SignatureObject::parse(&good).unwrap(), object);
        for len in [0, 143] {
            assert_eq!(SignatureObject::parse(&good[..len]).unwrap_err().code(), Code::ManSig);
        }
        assert_eq!(SignatureObject::parse(&[0; 144]).unwrap_err().code(), Code::ManSig);
        for (at, byte) in [(8, 0), (10, 2), (12, 1), (15, 1)] {
            let mut wrong = good;
            wrong[at] = byte;
            assert_eq!(SignatureObject::parse(&wrong).unwrap_err().code(), Code::Unsupported, "{at}");
        }
    }

    #[test]
    fn the_manifest_message_is_its_label_digest_model_and_number() {
        let message = manifest_message(ManifestDigest([1; 32]), ModelId([2; 32]), 7);
        let want = [&b"MFS1/manifest-signature\0"[..], &[1; 32], &[2; 32], &7u64.to_le_bytes()].concat();
        assert_eq!(message[..], want[..]);
    }
}
