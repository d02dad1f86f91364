//! Seals and opens single blocks; knows nothing of objects, chunks or files.
//!
//! In: a derived key, a base nonce, a block number, the block's associated data. Out: the block in its other form, in
//! place or in another buffer, or an error and bytes that must not be looked at (the caller wipes them).
//! Promises: the nonce is always base XOR block number, so one key never meets one nonce twice unless a block number
//! does; a context is overwritten when it is dropped.
//! Several implementations on purpose: ring or AWS-LC for everything that is large, whichever is faster on this processor
//! ([`implementation`]); RustCrypto's ChaCha20-Poly1305 for manifest bodies of suite 2, and in tests RustCrypto for both
//! suites, so that no library is its own witness.
//! Held by: the tests below, and `chunk` for what the blocks add up to.

use std::hint::black_box;

use aws_lc_rs::aead as aws_lc;
use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit};
use ring::aead as ring;

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

/// Which library opens and seals the blocks of a suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implementation {
    Ring,
    AwsLc,
}

impl Implementation {
    pub fn name(self) -> &'static str {
        match self {
            Implementation::Ring => "ring",
            Implementation::AwsLc => "aws-lc",
        }
    }
}

/// The fastest implementation of `suite` on this processor. Decided by what the processor can do, so the same answer every
/// time; the reason is what `benches/crypto.rs` showed, GB/s a core at 64 KiB, each pair alternating in one process:
///
/// | | ring | AWS-LC |
/// |---|---|---|
/// | AES, AVX-512 and VAES (Zen 4, 2026-11-25): in place, from a buffer, seal | 9.5, 6.0, 8.5 | **10.4, 10.2, 10.3** |
/// | AES, VAES without AVX-512 (Zen 3): in place, from a buffer | **7.1, 4.1** | 3.9, 3.8 |
/// | ChaCha20-Poly1305 (Zen 4): in place, from a buffer, seal | 2.7, 2.3, 2.7 | 2.7, **2.7**, 2.7 |
///
/// ring's widest AES code is the one for VAES on AVX2, which AWS-LC lacks; AWS-LC's is the one for AVX-512, which ring
/// lacks. On aarch64 (not measured) both hold the same AES code, and AWS-LC one eight blocks wide as well, for
/// Neoverse V and Apple M. For ChaCha20-Poly1305 they share their origin, and AWS-LC saves the copy.
pub fn implementation(suite: Suite) -> Implementation {
    match suite {
        Suite::Aes256Gcm if aws_lc_has_the_wider_aes() => Implementation::AwsLc,
        Suite::Aes256Gcm => Implementation::Ring,
        Suite::ChaCha20Poly1305 => Implementation::AwsLc,
    }
}

/// Just what AWS-LC itself asks for before it takes its AVX-512 code (`crypto_gcm_avx512_enabled`).
#[cfg(target_arch = "x86_64")]
fn aws_lc_has_the_wider_aes() -> bool {
    use std::arch::is_x86_feature_detected as has;
    let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
    avx512 && has!("vaes") && has!("vpclmulqdq")
}

#[cfg(not(target_arch = "x86_64"))]
fn aws_lc_has_the_wider_aes() -> bool {
    cfg!(target_arch = "aarch64")
}

/// One cipher context with its base nonce: the bulk path. It lives on the stack of the thread that opens or seals one
/// chunk. ring keeps the expanded key inline; AWS-LC keeps it in one block of its own heap.
pub(super) struct BlockCipher {
    context: Context,
    base_nonce: [u8; 12],
}

#[allow(clippy::large_enum_variant)] // a box would put ring's key on the heap, where nothing wipes it
enum Context {
    Ring(ring::LessSafeKey),
    AwsLc(aws_lc::LessSafeKey),
}

impl BlockCipher {
    pub fn new(suite: Suite, derived: &Derived) -> BlockCipher {
        BlockCipher::with(implementation(suite), suite, derived)
    }

    fn with(implementation: Implementation, suite: Suite, derived: &Derived) -> BlockCipher {
        let context = match implementation {
            Implementation::Ring => Context::Ring(ring_context(ring_algorithm(suite), &derived.key)),
            Implementation::AwsLc => {
                let algorithm = match suite {
                    Suite::Aes256Gcm => &aws_lc::AES_256_GCM,
                    Suite::ChaCha20Poly1305 => &aws_lc::CHACHA20_POLY1305,
                };
                let key = aws_lc::UnboundKey::new(algorithm, &derived.key).expect("both ciphers take 32-byte keys");
                Context::AwsLc(aws_lc::LessSafeKey::new(key))
            }
        };
        BlockCipher { context, base_nonce: derived.base_nonce }
    }

    /// Opens a block where it lies. After an error the bytes are anything, and the caller wipes them.
    pub fn open(&self, block: u64, aad: &[u8], in_out: &mut [u8], tag: &[u8; TAG_LEN]) -> Result<(), BadTag> {
        let nonce = nonce_of(&self.base_nonce, block);
        match &self.context {
            Context::Ring(key) => {
                let (nonce, aad) = (ring::Nonce::assume_unique_for_key(nonce), ring::Aad::from(aad));
                key.open_in_place_separate_tag(nonce, aad, (*tag).into(), in_out, 0..).map(|_| ()).map_err(|_| BadTag)
            }
            Context::AwsLc(key) => {
                let (nonce, aad) = (aws_lc::Nonce::assume_unique_for_key(nonce), aws_lc::Aad::from(aad));
                key.open_in_place_separate_tag(nonce, aad, tag, in_out).map(|_| ()).map_err(|_| BadTag)
            }
        }
    }

    /// Opens the block `sealed` into `out`: one pass over both where the library can, else a copy and [`open`](Self::open).
    /// After an error `out` holds anything, and the caller wipes it.
    ///
    /// # Panics
    /// If `out` is not as long as `sealed`.
    pub fn open_from(
        &self,
        block: u64,
        aad: &[u8],
        sealed: &[u8],
        out: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), BadTag> {
        assert!(sealed.len() == out.len(), "{} bytes opened into {}", sealed.len(), out.len());
        match &self.context {
            Context::Ring(_) => {
                out.copy_from_slice(sealed);
                self.open(block, aad, out, tag)
            }
            Context::AwsLc(key) => {
                let nonce = aws_lc::Nonce::assume_unique_for_key(nonce_of(&self.base_nonce, block));
                key.open_separate_gather(nonce, aws_lc::Aad::from(aad), sealed, tag, out).map_err(|_| BadTag)
            }
        }
    }

    pub fn seal(&self, block: u64, aad: &[u8], in_out: &mut [u8]) -> [u8; TAG_LEN] {
        let nonce = nonce_of(&self.base_nonce, block);
        let limit = "a block is at most 1 MiB, far below the cipher's limit";
        let sixteen = "both ciphers have 16-byte tags";
        match &self.context {
            Context::Ring(key) => {
                let (nonce, aad) = (ring::Nonce::assume_unique_for_key(nonce), ring::Aad::from(aad));
                let tag = key.seal_in_place_separate_tag(nonce, aad, in_out).expect(limit);
                tag.as_ref().try_into().expect(sixteen)
            }
            Context::AwsLc(key) => {
                let (nonce, aad) = (aws_lc::Nonce::assume_unique_for_key(nonce), aws_lc::Aad::from(aad));
                let tag = key.seal_in_place_separate_tag(nonce, aad, in_out).expect(limit);
                tag.as_ref().try_into().expect(sixteen)
            }
        }
    }
}

impl Drop for BlockCipher {
    /// ring does not wipe its contexts: a context of the same cipher from a public key overwrites every byte of the old
    /// one; `black_box` keeps the compiler from dropping a store that nobody reads. AWS-LC does: `EVP_AEAD_CTX_free` ends
    /// in `OPENSSL_free` (crypto/mem.c), which overwrites the whole block by `OPENSSL_cleanse` before it frees it.
    fn drop(&mut self) {
        match &mut self.context {
            Context::Ring(key) => {
                *key = ring_context(key.algorithm(), &[0; 32]);
                black_box(&*key);
            }
            Context::AwsLc(_) => {}
        }
    }
}

fn ring_algorithm(suite: Suite) -> &'static ring::Algorithm {
    match suite {
        Suite::Aes256Gcm => &ring::AES_256_GCM,
        Suite::ChaCha20Poly1305 => &ring::CHACHA20_POLY1305,
    }
}

fn ring_context(algorithm: &'static ring::Algorithm, key: &[u8; 32]) -> ring::LessSafeKey {
    ring::LessSafeKey::new(ring::UnboundKey::new(algorithm, key).expect("both ciphers take 32-byte keys"))
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
    use std::os::unix::fs::FileExt;

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

    const SUITES: [Suite; 2] = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305];
    const BULK: [Implementation; 2] = [Implementation::Ring, Implementation::AwsLc];

    #[test]
    fn all_implementations_of_both_suites_agree_byte_for_byte() {
        for suite in SUITES {
            for (block, len) in [(0u64, 1usize), (1, 15), (2, 16), (255, 4096), (1 << 40, 65536), (u64::MAX, 333)] {
                let d = derived(block as u8);
                let plain: Vec<u8> = (0..len).map(|i| (i * 31) as u8).collect();
                let mut other = plain.clone();
                let other_tag = portable_seal(suite, &d, block, b"associated", &mut other);

                for library in BULK {
                    let cipher = BlockCipher::with(library, suite, &d);
                    let (mut bulk, mut out) = (plain.clone(), vec![0xee; len]);
                    let tag = cipher.seal(block, b"associated", &mut bulk);
                    assert_eq!((&bulk, tag), (&other, other_tag), "{library:?} {suite:?} block {block}");
                    cipher.open_from(block, b"associated", &other, &mut out, &other_tag).unwrap();
                    cipher.open(block, b"associated", &mut bulk, &other_tag).unwrap();
                    assert_eq!((&bulk, &out), (&plain, &plain), "{library:?} {suite:?} block {block}");
                }
                let body = BodyCipher::new(suite, &d);
                let mut text = plain.clone();
                let tag = body.seal(block, b"associated", &mut text);
                assert_eq!((&text, tag), (&other, other_tag), "{suite:?} block {block}");
                body.open(block, b"associated", &mut text, &tag).unwrap();
                assert_eq!(text, plain);
            }
        }
    }

    /// Lengths around every width the assembly works in: 16 bytes, 4, 8, 16, 32 and 48 of them, and a tail.
    #[test]
    fn all_implementations_agree_at_every_length_near_their_strides() {
        for suite in SUITES {
            let d = derived(9);
            let ciphers = BULK.map(|library| BlockCipher::with(library, suite, &d));
            for len in (1..=1100).chain([4095, 4097, 65_535, (1 << 20) - 1, 1 << 20]) {
                let plain: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
                let mut sealed = plain.clone();
                let tag = portable_seal(suite, &d, 3, b"0123456789abcdef", &mut sealed);
                for (library, cipher) in BULK.iter().zip(&ciphers) {
                    let (mut text, mut out) = (plain.clone(), vec![0; len]);
                    assert_eq!(cipher.seal(3, b"0123456789abcdef", &mut text), tag, "{library:?} {suite:?} {len}");
                    assert!(text == sealed, "{library:?} {suite:?} {len}");
                    cipher.open_from(3, b"0123456789abcdef", &sealed, &mut out, &tag).unwrap();
                    assert!(out == plain, "{library:?} {suite:?} {len}");
                }
            }
        }
    }

    #[test]
    fn a_block_opens_only_under_its_own_number_associated_data_bytes_and_tag() {
        for suite in SUITES {
            let body = BodyCipher::new(suite, &derived(1));
            for library in BULK {
                let cipher = BlockCipher::with(library, suite, &derived(1));
                let mut sealed = *b"sixteen bytes or";
                let tag = cipher.seal(5, b"aad", &mut sealed);
                let (mut other_bytes, mut other_tag) = (sealed, tag);
                other_bytes[15] ^= 0x80;
                other_tag[0] ^= 1;
                for (block, aad, sealed, tag) in [
                    (4u64, b"aad", sealed, tag),
                    (5, b"aae", sealed, tag),
                    (5, b"aad", other_bytes, tag),
                    (5, b"aad", sealed, other_tag),
                ] {
                    assert_eq!(cipher.open(block, aad, &mut sealed.clone(), &tag), Err(BadTag), "{library:?}");
                    assert_eq!(cipher.open_from(block, aad, &sealed, &mut [0; 16], &tag), Err(BadTag), "{library:?}");
                    assert_eq!(body.open(block, aad, &mut sealed.clone(), &tag), Err(BadTag));
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "16 bytes opened into 15")]
    fn a_block_is_not_opened_into_a_place_of_another_length() {
        let cipher = BlockCipher::new(Suite::Aes256Gcm, &derived(1));
        let _ = cipher.open_from(0, b"", &[0; 16], &mut [0; 15], &[0; 16]);
    }

    /// The rule stands in `implementation`'s table; this says what it comes to where the tests run.
    #[test]
    fn aes_goes_to_the_library_with_the_widest_code_for_this_processor() {
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
        if cfg!(target_arch = "x86_64") && !flags.is_empty() {
            let wide = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "vaes", "vpclmulqdq"].into_iter().all(has);
            let want = if wide { Implementation::AwsLc } else { Implementation::Ring };
            assert_eq!(implementation(Suite::Aes256Gcm), want);
        }
        assert_eq!(implementation(Suite::ChaCha20Poly1305), Implementation::AwsLc);
    }

    /// Where `needle` (given with every bit flipped, so that it is not found itself) lies in this process's writable
    /// memory, without this thread's stack and the window it is read through.
    fn addresses_of(flipped: &[u8; 32], memory: &std::fs::File) -> Vec<u64> {
        let on_stack = std::ptr::from_ref(&flipped) as u64;
        let mut window = vec![0u8; 1 << 20];
        let own = window.as_ptr() as u64..window.as_ptr() as u64 + window.len() as u64;
        let mut found = Vec::new();
        for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
            let Some((range, rest)) = line.split_once(' ') else { continue };
            let (start, end) = range.split_once('-').unwrap();
            let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap());
            if !rest.starts_with("rw-p") {
                continue;
            }
            let mut at = start;
            while at < end {
                let len = (end - at).min(window.len() as u64) as usize;
                let Ok(got) = memory.read_at(&mut window[..len], at) else { break };
                // The allocator and both libraries align contexts to 8 bytes at least.
                for (i, bytes) in window[..got].windows(32).enumerate().step_by(8) {
                    let address = at + i as u64;
                    let hit = bytes.iter().zip(flipped).all(|(byte, flipped)| *byte == !flipped);
                    if hit && !own.contains(&address) && on_stack.abs_diff(address) > 256 << 10 {
                        found.push(address);
                    }
                }
                // A key may lie across two windows.
                at += if got == window.len() { got as u64 - 64 } else { got.max(1) as u64 };
            }
        }
        found
    }

    #[inline(never)]
    fn boxed_cipher(library: Implementation, suite: Suite, flipped: &[u8; 32]) -> Box<BlockCipher> {
        let mut derived = derived(1);
        derived.key = flipped.map(|byte| !byte);
        Box::new(BlockCipher::with(library, suite, &derived))
    }

    /// Both ciphers of both libraries keep the key itself at the start of their contexts, so that it can be searched for.
    #[test]
    fn a_dropped_context_leaves_no_key_on_the_heap() {
        let Ok(memory) = std::fs::File::open("/proc/self/mem") else {
            return; // not root, and another test made the process undumpable
        };
        for (n, (suite, library)) in SUITES.iter().flat_map(|s| BULK.map(|l| (*s, l))).enumerate() {
            let flipped = Derived::new(&[n as u8; 32], "object", &[b"wiped"]).key.map(|byte| !byte);
            let cipher = boxed_cipher(library, suite, &flipped);
            let places = addresses_of(&flipped, &memory);
            assert!(!places.is_empty(), "the search finds no live key of {library:?} {suite:?}");

            drop(cipher);

            for place in places {
                let mut left = [0; 32];
                memory.read_exact_at(&mut left, place).unwrap_or_default(); // unmapped is wiped too
                for (half, flipped) in left.as_chunks::<16>().0.iter().zip(flipped.as_chunks::<16>().0) {
                    assert!(*half != flipped.map(|byte| !byte), "{library:?} {suite:?} left its key at {place:#x}");
                }
            }
        }
    }
}
