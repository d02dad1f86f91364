//! Bytes on the store, format MFS1: what each object looks like, and which bytes are refused.
//!
//! In: hostile bytes. Out: checked values, or an [`Error`](crate::error::Error) whose code names the rule.
//! Promises: no parser here panics, loops or allocates more than the bytes it was given deserve; every length is checked
//! before it is used; whatever is accepted encodes back to the same bytes.
//! Not here: keys, ciphers, I/O. SHA-256 appears only where a name or a checksum is one.
//! Spec: docs/FORMAT.md. Held by: the tests beside each parser, tests/format_vectors.rs.

mod body;
mod builder;
mod header;
mod layout;
mod lease;
pub mod limits;
mod manifest;
pub mod names;
mod refs;
mod slots;
mod wire;

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

pub use builder::{ManifestBuilder, NewFile, NewHeader, NewObject};
pub use header::ObjectHeader;
pub use layout::{BlockShape, ChunkIndex, ChunkShape, ObjectLayout, block_aad};
pub use lease::{LEASE_BYTES_MAX, Lease};
pub use limits::{BLOCK_LOG2_DEFAULT, CHUNK_LOG2_DEFAULT};
pub use manifest::{Extent, FileEntry, Manifest, ManifestHeader, ObjectEntry};
pub use refs::{Ref, RefSignature, SignatureObject, manifest_message};
pub use slots::{Slot, SlotKind, SlotParams, Slots, check_label};

use crate::error::{Code, Error, Result};
use crate::refuse;

pub const FORMAT_VERSION: u16 = 1;
pub const OBJECT_HEADER_LEN: usize = 128;
pub const MANIFEST_HEADER_LEN: usize = 256;
pub const SIGNATURE_LEN: usize = 144;
pub const REF_HEAD_LEN: usize = 256;
pub const REF_SIGNATURE_LEN: usize = 100;
pub const SLOTS_HEADER_LEN: usize = 128;
pub const TAG_LEN: u64 = 16;
/// Ed25519; 2 is reserved for ML-DSA-65.
pub const SIGNATURE_ALG_ED25519: u16 = 1;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// The id of exactly as many lower-case hexadecimal digits as it has, and nothing else: a name on the store
            /// has one spelling.
            pub fn from_hex(text: &str) -> Option<Self> {
                let lower = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
                if !text.bytes().all(lower) {
                    return None;
                }
                let mut bytes = [0u8; $len];
                hex::decode_to_slice(text, &mut bytes).ok()?;
                Some($name(bytes))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    };
}

id! {
    /// SHA-256 of a model's name: the folder of everything that belongs to it.
    ModelId, 32
}
id! {
    /// One version of one model, drawn at random when it is sealed.
    Vid, 16
}
id! {
    /// One data object, drawn at random when it is sealed and never used again.
    Oid, 32
}
id! {
    /// SHA-256 of a whole manifest object.
    ManifestDigest, 32
}
id! {
    /// SHA-256 of a raw public signing key.
    KeyId, 32
}
id! {
    /// SHA-256 of a channel's name.
    ChannelId, 32
}

impl ModelId {
    pub fn of_name(name: &str) -> ModelId {
        ModelId(sha256(&[b"MFS1/model\0", name.as_bytes()]))
    }
}

impl ChannelId {
    pub fn of_name(name: &str) -> ChannelId {
        ChannelId(sha256(&[b"MFS1/channel\0", name.as_bytes()]))
    }
}

impl ManifestDigest {
    pub fn of(manifest: &[u8]) -> ManifestDigest {
        ManifestDigest(sha256(&[manifest]))
    }
}

impl KeyId {
    pub fn of(public_key: &[u8]) -> KeyId {
        KeyId(sha256(&[public_key]))
    }
}

pub(crate) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// The cipher of an object or a manifest. Both have 32-byte keys, 12-byte nonces and 16-byte tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Suite {
    Aes256Gcm = 1,
    ChaCha20Poly1305 = 2,
}

impl Suite {
    pub fn from_u16(number: u16) -> Result<Suite> {
        match number {
            1 => Ok(Suite::Aes256Gcm),
            2 => Ok(Suite::ChaCha20Poly1305),
            _ => refuse!(Unsupported, "cipher suite {number} is none of 1 (aes-256-gcm), 2 (chacha20-poly1305)"),
        }
    }

    pub const fn number(self) -> u16 {
        self as u16
    }

    pub const fn name(self) -> &'static str {
        match self {
            Suite::Aes256Gcm => "aes-256-gcm",
            Suite::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Suite {
    type Err = Error;
    fn from_str(text: &str) -> Result<Suite> {
        match text {
            "aes-256-gcm" => Ok(Suite::Aes256Gcm),
            "chacha20-poly1305" => Ok(Suite::ChaCha20Poly1305),
            _ => refuse!(Usage, "cipher {text:?} is none of aes-256-gcm, chacha20-poly1305"),
        }
    }
}

/// The hash of every stored chunk, listed in the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum HashAlg {
    Sha256 = 1,
    Blake3 = 2,
}

impl HashAlg {
    pub fn from_u16(number: u16) -> Result<HashAlg> {
        match number {
            1 => Ok(HashAlg::Sha256),
            2 => Ok(HashAlg::Blake3),
            _ => refuse!(Unsupported, "chunk hash {number} is none of 1 (sha-256), 2 (blake3)"),
        }
    }

    pub const fn number(self) -> u16 {
        self as u16
    }

    pub const fn name(self) -> &'static str {
        match self {
            HashAlg::Sha256 => "sha-256",
            HashAlg::Blake3 => "blake3",
        }
    }
}

impl fmt::Display for HashAlg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for HashAlg {
    type Err = Error;
    fn from_str(text: &str) -> Result<HashAlg> {
        match text {
            "sha-256" | "sha256" => Ok(HashAlg::Sha256),
            "blake3" => Ok(HashAlg::Blake3),
            _ => refuse!(Usage, "hash {text:?} is none of blake3, sha-256"),
        }
    }
}

/// The path rules of docs/FORMAT.md a.4: what a file of a model may be called.
///
/// # Errors
/// `PATH`, saying which rule.
pub fn check_path(path: &[u8]) -> Result<&str> {
    match path_fault(path) {
        Ok(text) => Ok(text),
        Err(fault) => refuse!(Path, "path {:?} {fault}", String::from_utf8_lossy(&path[..path.len().min(120)])),
    }
}

/// What is wrong with `path`, as the end of a sentence.
fn path_fault(path: &[u8]) -> Result<&str, &'static str> {
    if path.is_empty() {
        return Err("is empty");
    }
    if path.len() > limits::PATH_BYTES_MAX {
        return Err("is longer than 1024 bytes");
    }
    let text = std::str::from_utf8(path).map_err(|_| "is not UTF-8")?;
    if text.chars().any(|c| c.is_control() || c == '\\') {
        return Err("holds a control character or a backslash");
    }
    let mut depth = 0;
    for component in text.split('/') {
        depth += 1;
        match component {
            "" => return Err("has an empty component or a slash at an end"),
            "." | ".." => return Err("has a component . or .."),
            _ if component.len() > limits::COMPONENT_BYTES_MAX => return Err("has a component longer than 255 bytes"),
            _ => {}
        }
    }
    if depth > limits::PATH_DEPTH_MAX {
        return Err("is deeper than 32 components");
    }
    Ok(text)
}

/// Whether `name` may name a model: a path as in [`check_path`], at most 512 bytes, without `@`.
///
/// # Errors
/// `USAGE`: a model's name is the user's word, not the store's.
pub fn check_model_name(name: &str) -> Result<()> {
    if name.len() > limits::MODEL_NAME_BYTES_MAX {
        refuse!(Usage, "model name is {} bytes long, at most 512 are allowed", name.len());
    }
    if name.contains('@') {
        refuse!(Usage, "model name {name:?} holds an @, which separates a name from its version");
    }
    path_fault(name.as_bytes()).map_err(|fault| Error::new(Code::Usage, format!("model name {name:?} {fault}")))?;
    Ok(())
}

/// Whether `name` may name a channel (a tag): `[a-z0-9._-]{1,64}`, not digits only (`NAME@3` is a version), not `.` or `..`.
///
/// # Errors
/// `USAGE`.
pub fn check_channel(name: &str) -> Result<()> {
    if !is_label(name.as_bytes(), limits::CHANNEL_BYTES_MAX) || name == "." || name == ".." {
        refuse!(Usage, "tag {name:?} is not 1 to 64 characters of a-z 0-9 . _ -");
    }
    if name.bytes().all(|c| c.is_ascii_digit()) {
        refuse!(Usage, "tag {name:?} is a number, which names a version; put a letter into it");
    }
    Ok(())
}

/// `[a-z0-9._-]{1,max}`.
fn is_label(text: &[u8], max: usize) -> bool {
    (1..=max).contains(&text.len())
        && text.iter().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || b"._-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_spelling() {
        let id = Vid([0xab; 16]);
        assert_eq!(Vid::from_hex(&id.to_string()), Some(id));
        assert_eq!(Vid::from_hex(&id.to_string().to_uppercase()), None);
        assert_eq!(Vid::from_hex(&id.to_string()[1..]), None);
        assert_eq!(Vid::from_hex("+0ababababababababababababababab"), None);
    }

    #[test]
    fn the_model_id_of_the_spec_vector() {
        let id = ModelId::of_name("acme/llama-70b");
        assert_eq!(id.to_string(), "ee148d0c2a443fb2f078683d428bbeb84ad95b1111fe6f2b6f8b449a726bda1d");
    }

    #[test]
    fn suites_and_hashes_round_trip_and_nothing_else_is_known() {
        for suite in [Suite::Aes256Gcm, Suite::ChaCha20Poly1305] {
            assert_eq!(Suite::from_u16(suite.number()).unwrap(), suite);
            assert_eq!(suite.name().parse::<Suite>().unwrap(), suite);
        }
        for alg in [HashAlg::Sha256, HashAlg::Blake3] {
            assert_eq!(HashAlg::from_u16(alg.number()).unwrap(), alg);
            assert_eq!(alg.name().parse::<HashAlg>().unwrap(), alg);
        }
        for number in [0, 3, 0x100, u16::MAX] {
            assert_eq!(Suite::from_u16(number).unwrap_err().code(), Code::Unsupported);
            assert_eq!(HashAlg::from_u16(number).unwrap_err().code(), Code::Unsupported);
        }
    }

    /// THREAT_MODEL (f) rows 44 and 45.
    #[test]
    fn paths_that_could_lead_elsewhere_or_lie_to_a_terminal_are_refused() {
        let long = "x".repeat(256);
        let deep = vec!["d"; 33].join("/");
        let wide = vec!["x".repeat(204); 5].join("/");
        let bad = [
            "",
            "/",
            "/x",
            "../x",
            "a//b",
            "a/./b",
            "a/..",
            "a/",
            ".",
            "..",
            "a\0b",
            "a\nb",
            "a\u{7f}",
            "a\u{85}b",
            "a\\b",
            &long,
            &deep,
            &(wide.clone() + "y"),
        ];
        for path in bad {
            assert_eq!(check_path(path.as_bytes()).unwrap_err().code(), Code::Path, "{path:?}");
        }
        for path in [&b"a\xff"[..], b"\xed\xa0\x80", b"\xc0\xaf"] {
            assert_eq!(check_path(path).unwrap_err().code(), Code::Path);
        }
        let deepest = vec!["d"; 32].join("/");
        for path in ["a", "a b", "..a", "a/b.c", "ä", "...", &long[1..], &deepest, &wide] {
            assert_eq!(check_path(path.as_bytes()).unwrap(), path);
        }
    }

    #[test]
    fn model_names_and_channels_keep_their_alphabets() {
        for name in ["a", "acme/llama-70b", "A b"] {
            check_model_name(name).unwrap();
        }
        for name in ["", "a@b", "/a", "a/", "../a", &"x/".repeat(300)] {
            assert_eq!(check_model_name(name).unwrap_err().code(), Code::Usage, "{name:?}");
        }
        for name in ["latest", "prod", "v1.2", "2026-11", "a_b", &"x".repeat(64)] {
            check_channel(name).unwrap();
        }
        for name in ["", "3", "007", "Prod", "a/b", "best:loss", ".", "..", "a b", &"x".repeat(65)] {
            assert_eq!(check_channel(name).unwrap_err().code(), Code::Usage, "{name:?}");
        }
    }
}
