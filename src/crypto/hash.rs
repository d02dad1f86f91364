//! Digests: SHA-256 of names, files and small objects; the chunk hash of either algorithm over pieces.
//!
//! In: bytes in any pieces. Out: 32 bytes. Promises: the split into pieces never changes the result.
//! Held by: the tests below.

use sha2::{Digest, Sha256};

use crate::format::HashAlg;

/// SHA-256 of the parts, one after the other.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// HMAC-SHA256, for requests that are signed with it (AWS Signature Version 4).
pub fn hmac_sha256(key: &[u8], message: &[u8]) -> [u8; 32] {
    use hmac::{Hmac, KeyInit, Mac};
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(message);
    mac.finalize().into_bytes().into()
}

/// SHA-256 of a file's plaintext, as it is read or opened: what `FILE.sha256` in the manifest says.
#[derive(Default)]
pub struct FileHasher(Sha256);

impl FileHasher {
    pub fn new() -> FileHasher {
        FileHasher::default()
    }
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

impl std::fmt::Debug for FileHasher {
    /// The state of a hash of plaintext is not for logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FileHasher(..)")
    }
}

/// The hash over a stored chunk (`ciphertext || tags`) that the signed manifest lists.
pub(super) enum ChunkHasher {
    Sha256(Sha256),
    /// Boxed: its state is 2 KiB.
    Blake3(Box<blake3::Hasher>),
}

impl ChunkHasher {
    pub fn new(alg: HashAlg) -> ChunkHasher {
        match alg {
            HashAlg::Sha256 => ChunkHasher::Sha256(Sha256::new()),
            HashAlg::Blake3 => ChunkHasher::Blake3(Box::new(blake3::Hasher::new())),
        }
    }
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            ChunkHasher::Sha256(hasher) => hasher.update(bytes),
            ChunkHasher::Blake3(hasher) => {
                hasher.update(bytes);
            }
        }
    }
    pub fn finish(self) -> [u8; 32] {
        match self {
            ChunkHasher::Sha256(hasher) => hasher.finalize().into(),
            ChunkHasher::Blake3(hasher) => *hasher.finalize().as_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_both_algorithms_over_the_empty_string_and_abc() {
        for (alg, text, want) in [
            (HashAlg::Sha256, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (HashAlg::Blake3, "abc", "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
            (HashAlg::Blake3, "", "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        ] {
            let mut hasher = ChunkHasher::new(alg);
            hasher.update(text.as_bytes());
            assert_eq!(hex::encode(hasher.finish()), want, "{alg:?} of {text:?}");
        }
    }

    #[test]
    fn the_split_into_pieces_does_not_change_the_hash() {
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        for alg in [HashAlg::Sha256, HashAlg::Blake3] {
            let mut whole = ChunkHasher::new(alg);
            whole.update(&bytes);
            let mut split = ChunkHasher::new(alg);
            for piece in bytes.chunks(1 + bytes.len() / 7) {
                split.update(piece);
            }
            assert_eq!(whole.finish(), split.finish(), "{alg:?}");
        }
        let mut file = FileHasher::new();
        file.update(&bytes[..9]);
        file.update(&bytes[9..]);
        assert_eq!(file.finish(), sha256(&[&bytes[..100], &bytes[100..]]));
    }
}
