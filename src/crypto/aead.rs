//! Seals and opens single blocks in place; knows nothing of objects, chunks or files.
//!
//! In: a derived key, a base nonce, a block number, the block's associated data. Out: the block in its other form, or an
//! error and bytes that must not be looked at (the caller wipes them).
//! Promises: the nonce is always base XOR block number, so one key never meets one nonce twice unless a block number
//! does; a context is overwritten when it is dropped.
//! Two implementations on purpose: ring for everything that is large, RustCrypto's ChaCha20-Poly1305 for manifest bodies
//! of suite 2, and in tests RustCrypto for both suites, so that neither library is its own witness.
//! Held by: the tests below, and `chunk` for what the blocks add up to.

use std::hint::black_box;

use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit};
use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::kdf::Derived;
use crate::format::Suite;

pub const TAG_LEN: usize = 16;

/// A block's tag is not the one its bytes call for. Which block of what is the caller's to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadTag;

/// `base XOR (0^32 || u64be(block))`: docs/FORMAT.md a.3. The only place a nonce is made.
pub(super) fn nonce_of(base: &[u8; 12], block: u64) -> [u8; 12] {
    let mut nonce = *base;
    for (byte, count) in nonce[4..].iter_mut().zip(block.to_be_bytes()) {
        *byte ^= count;
    }
    nonce
}

fn algorithm(suite: Suite) -> &'static Algorithm {
    match suite {
        Suite::Aes256Gcm => &AES_256_GCM,
        Suite::ChaCha20Poly1305 => &CHACHA20_POLY1305,
    }
}

/// One ring cipher context with its base nonce: the bulk path. It lives on the stack of the thread that opens or seals
/// one chunk; ring keeps the expanded key inline, so there is no heap copy.
pub(super) struct BlockCipher {
    context: LessSafeKey,
    base_nonce: [u8; 12],
}

impl BlockCipher {
    pub fn new(suite: Suite, derived: &Derived) -> BlockCipher {
        BlockCipher { context: context(algorithm(suite), &derived.key), base_nonce: derived.base_nonce }
    }

    pub fn open(&self, block: u64, aad: &[u8], in_out: &mut [u8], tag: &[u8; TAG_LEN]) -> Result<(), BadTag> {
        self.context
            .open_in_place_separate_tag(self.nonce(block), Aad::from(aad), (*tag).into(), in_out, 0..)
            .map(|_| ())
            .map_err(|_| BadTag)
    }

    pub fn open_from(
        &self,
        block: u64,
        aad: &[u8],
        sealed: &[u8],
        out: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), BadTag> {
        out.copy_from_slice(sealed);
        self.open(block, aad, out, tag)
    }

    pub fn seal(&self, block: u64, aad: &[u8], in_out: &mut [u8]) -> [u8; TAG_LEN] {
        let tag = self
            .context
            .seal_in_place_separate_tag(self.nonce(block), Aad::from(aad), in_out)
            .expect("a block is at most 1 MiB, far below the cipher's limit");
        tag.as_ref().try_into().expect("both ciphers have 16-byte tags")
    }

    fn nonce(&self, block: u64) -> Nonce {
        Nonce::assume_unique_for_key(nonce_of(&self.base_nonce, block))
    }
}

impl Drop for BlockCipher {
    /// ring does not wipe its contexts. A context of the same cipher from a public key overwrites every byte of the old
    /// one; `black_box` keeps the compiler from dropping a store that nobody reads.
    fn drop(&mut self) {
        self.context = context(self.context.algorithm(), &[0; 32]);
        black_box(&self.context);
    }
}

fn context(algorithm: &'static Algorithm, key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(algorithm, key).expect("both ciphers take 32-byte keys"))
}

/// The cipher of a manifest body: ring for suite 1, RustCrypto for suite 2. Cold: a few megabytes once a mount.
#[allow(clippy::large_enum_variant)] // a box would put key bytes on the heap; there is one of these at a time
pub(super) enum BodyCipher {
    Ring(BlockCipher),
    Portable { cipher: ChaCha20Poly1305, base_nonce: [u8; 12] },
}

impl BodyCipher {
    pub fn new(suite: Suite, derived: &Derived) -> BodyCipher {
        match suite {
            Suite::Aes256Gcm => BodyCipher::Ring(BlockCipher::new(suite, derived)),
            Suite::ChaCha20Poly1305 => BodyCipher::Portable {
                cipher: ChaCha20Poly1305::new(&derived.key.into()),
                base_nonce: derived.base_nonce,
            },
        }
    }

    pub fn open(&self, block: u64, aad: &[u8], in_out: &mut [u8], tag: &[u8; TAG_LEN]) -> Result<(), BadTag> {
        match self {
            BodyCipher::Ring(cipher) => cipher.open(block, aad, in_out, tag),
            BodyCipher::Portable { cipher, base_nonce } => cipher
                .decrypt_inout_detached(&nonce_of(base_nonce, block).into(), aad, in_out.into(), &(*tag).into())
                .map_err(|_| BadTag),
        }
    }

    pub fn seal(&self, block: u64, aad: &[u8], in_out: &mut [u8]) -> [u8; TAG_LEN] {
        match self {
            BodyCipher::Ring(cipher) => cipher.seal(block, aad, in_out),
            BodyCipher::Portable { cipher, base_nonce } => cipher
                .encrypt_inout_detached(&nonce_of(base_nonce, block).into(), aad, in_out.into())
                .expect("a block is 64 KiB, far below the cipher's limit")
                .into(),
        }
    }
}

impl Drop for BodyCipher {
    fn drop(&mut self) {
        match self {
            BodyCipher::Ring(_) => {} // wipes itself
            BodyCipher::Portable { cipher, .. } => {
                *cipher = ChaCha20Poly1305::new(&[0; 32].into());
                black_box(&*cipher);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aes_gcm::Aes256Gcm;

    fn derived(seed: u8) -> Derived {
        Derived::new(&[seed; 32], "object", &[b"test"])
    }

    /// The second implementation: RustCrypto for both suites, the nonce written out by hand.
    fn portable_seal(suite: Suite, d: &Derived, block: u64, aad: &[u8], in_out: &mut [u8]) -> [u8; 16] {
        let count = u128::from(block).to_be_bytes();
        let nonce: [u8; 12] = std::array::from_fn(|i| d.base_nonce[i] ^ count[i + 4]);
        match suite {
            Suite::Aes256Gcm => {
                Aes256Gcm::new(&d.key.into()).encrypt_inout_detached(&nonce.into(), aad, in_out.into()).unwrap().into()
            }
            Suite::ChaCha20Poly1305 => ChaCha20Poly1305::new(&d.key.into())
                .encrypt_inout_detached(&nonce.into(), aad, in_out.into())
                .unwrap()
                .into(),
        }
    }

    #[test]
    fn both_implementations_of_both_suites_agree_byte_for_byte() {
        for suite in [Suite::Aes256Gcm, Suite::ChaCha20Poly1305] {
            for (block, len) in [(0u64, 1usize), (1, 15), (2, 16), (255, 4096), (1 << 40, 65536), (u64::MAX, 333)] {
                let d = derived(block as u8);
                let plain: Vec<u8> = (0..len).map(|i| (i * 31) as u8).collect();
                let (mut bulk, mut body, mut other) = (plain.clone(), plain.clone(), plain.clone());

                let bulk_tag = BlockCipher::new(suite, &d).seal(block, b"associated", &mut bulk);
                let body_tag = BodyCipher::new(suite, &d).seal(block, b"associated", &mut body);
                let other_tag = portable_seal(suite, &d, block, b"associated", &mut other);

                assert_eq!((&bulk, bulk_tag), (&other, other_tag), "{suite:?} block {block}");
                assert_eq!((&body, body_tag), (&other, other_tag), "{suite:?} block {block}");
                BlockCipher::new(suite, &d).open(block, b"associated", &mut bulk, &bulk_tag).unwrap();
                BodyCipher::new(suite, &d).open(block, b"associated", &mut body, &body_tag).unwrap();
                assert_eq!((&bulk, &body), (&plain, &plain));
            }
        }
    }

    #[test]
    fn a_block_opens_only_under_its_own_number_and_associated_data() {
        for suite in [Suite::Aes256Gcm, Suite::ChaCha20Poly1305] {
            let cipher = BlockCipher::new(suite, &derived(1));
            let body = BodyCipher::new(suite, &derived(1));
            let mut sealed = *b"sixteen bytes or";
            let tag = cipher.seal(5, b"aad", &mut sealed);
            for (block, aad) in [(4u64, b"aad"), (5, b"aae")] {
                assert_eq!(cipher.open(block, aad, &mut sealed.clone(), &tag), Err(BadTag));
                assert_eq!(body.open(block, aad, &mut sealed.clone(), &tag), Err(BadTag));
            }
        }
    }
}
