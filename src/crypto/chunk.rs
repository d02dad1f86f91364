//! Turns a stored chunk into verified plaintext in its slot, and plaintext into a stored chunk; nothing else can.
//!
//! In: a `CipherChunk` (hostile, any length) and an empty slot. Out: the slot filled, or an error and a wiped slot.
//! Promises: a byte that failed its hash, commitment or tag is never left in the slot, not even by a panic; what was
//! hashed is what is opened, because both read the slot; one chunk of one object is sealed at most once.
//! Not here: fetching and refetching (`store`, `cache`), which slot (`cache`).
//! Spec: docs/FORMAT.md a.3, a.8. Held by: `vectors`, the tests below, THREAT_MODEL (f) rows 1-10, 33.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use subtle::ConstantTimeEq;

use super::aead::{BlockCipher, TAG_LEN};
use super::dek::{Dek, ModelKeys};
use super::hash::ChunkHasher;
use super::kdf::Derived;
use crate::error::Result;
use crate::format::{ChunkIndex, HashAlg, Manifest, ObjectEntry, ObjectHeader, ObjectLayout, Oid, Suite, Vid};
use crate::mem::{Secret, scrub_stack};
use crate::refuse;
use crate::store::CipherChunk;

/// What a chunk is copied and hashed by: small enough to be hashed while it is still in the second-level cache, large
/// enough for BLAKE3 to use all its lanes.
const WINDOW_BYTES: usize = 128 << 10;

/// How much is checked before plaintext is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// The signed chunk hash as well as every tag: bytes forged by another holder of the key are refused.
    #[default]
    Strict,
    /// Tags only, by local policy: about three times faster, and a holder of the key can forge (FORMAT a.8).
    Aead,
}

/// Opens `chunk` of object number `object` into `slot`.
///
/// Order: length; copy (strict: hash what was copied, compare with the signed hash); the object's commitment, in constant
/// time, before any cipher; then every block's tag.
///
/// # Errors
/// `LENGTH`, `CHUNK_HASH`, `COMMIT`, `TAG`, each naming chunk and object; the whole slot is then zero. Only the first
/// two can be a fault of the store, and are worth one more fetch.
///
/// # Panics
/// If `slot` is not as long as the chunk's plaintext, or the manifest has no such object: bugs of the caller.
///
/// No allocation but the tags (16 bytes a block). Cost at 8 MiB: one copy, one hash, one pass of the cipher.
pub fn open_chunk(
    keys: &ModelKeys,
    manifest: &Manifest,
    object: u32,
    chunk: &CipherChunk,
    verify: Verify,
    slot: &mut [u8],
) -> Result<()> {
    let entry = &manifest.objects()[object as usize];
    let mut unproven = Unproven { bytes: slot, proven: false };
    check_claim(entry, chunk)?;
    let plain_len = usize::try_from(entry.layout.chunk_plain_len(chunk.index)).expect("a chunk is at most 64 MiB");
    assert!(unproven.bytes.len() == plain_len, "slot of {} bytes for a chunk of {plain_len}", unproven.bytes.len());

    if verify == Verify::Strict {
        let mut cursor = Cursor::new(&chunk.pieces);
        let mut hasher = ChunkHasher::new(manifest.header().hash_alg);
        for window in unproven.bytes.chunks_mut(WINDOW_BYTES) {
            cursor.copy_to(window);
            hasher.update(window);
        }
        cursor.each_rest(|tags| hasher.update(tags));
        check_hash(manifest, object, chunk, hasher)?;
    }

    let opened = open_committed(keys, entry, chunk, verify, unproven.bytes);
    scrub_stack();
    opened?;
    unproven.proven = true;
    Ok(())
}

/// The part of [`open_chunk`] that holds keys: a function of its own, so that the stack it used can be scrubbed.
#[inline(never)]
fn open_committed(
    keys: &ModelKeys,
    entry: &ObjectEntry,
    chunk: &CipherChunk,
    verify: Verify,
    slot: &mut [u8],
) -> Result<()> {
    let derived = keys.object_keys(entry);
    if !bool::from(derived.commit.ct_eq(&entry.commit)) {
        refuse!(
            Commit,
            "chunk {} of object {}: the key at hand is not the one it was sealed with",
            chunk.index,
            entry.oid
        );
    }
    let cipher = BlockCipher::new(entry.suite, &derived);
    let layout = &entry.layout;
    let mut tags = vec![0; TAG_LEN * (slot.len().div_ceil(layout.block_len() as usize))];
    let mut cursor = Cursor::new(&chunk.pieces);
    cursor.skip(slot.len());
    cursor.copy_to(&mut tags);

    let mut cursor = Cursor::new(&chunk.pieces);
    let blocks = slot.chunks_mut(layout.block_len() as usize).zip(tags.as_chunks::<TAG_LEN>().0);
    for (number, (block, tag)) in layout.chunk_blocks(chunk.index).zip(blocks) {
        if verify == Verify::Aead {
            cursor.copy_to(block);
        }
        if cipher.open(number, &layout.block_aad(number), block, tag).is_err() {
            refuse!(Tag, "block {number} in chunk {} of object {} failed authentication", chunk.index, entry.oid);
        }
    }
    Ok(())
}

/// Compares a stored chunk with the signed hash, without any key: scrubbing, mirrors, `verify`.
///
/// # Errors
/// `LENGTH`, `CHUNK_HASH`.
pub fn check_chunk_hash(manifest: &Manifest, object: u32, chunk: &CipherChunk) -> Result<()> {
    check_claim(&manifest.objects()[object as usize], chunk)?;
    let mut hasher = ChunkHasher::new(manifest.header().hash_alg);
    Cursor::new(&chunk.pieces).each_rest(|piece| hasher.update(piece));
    check_hash(manifest, object, chunk, hasher)
}

/// Whether the chunk says it is one of this object, and is as long as the layout says.
fn check_claim(entry: &ObjectEntry, chunk: &CipherChunk) -> Result<()> {
    if chunk.object != entry.oid {
        refuse!(ChunkHash, "chunk {} of object {} came for object {}", chunk.index, chunk.object, entry.oid);
    }
    if u64::from(chunk.index.0) >= entry.layout.chunk_count() {
        refuse!(Length, "object {} has {} chunks, no chunk {}", entry.oid, entry.layout.chunk_count(), chunk.index);
    }
    let stored = entry.layout.chunk_stored(chunk.index);
    let want = stored.end - stored.start;
    let got: u64 = chunk.pieces.iter().map(|piece| piece.len() as u64).sum();
    if got != want {
        refuse!(Length, "store sent {got} of {want} bytes for chunk {} of object {}", chunk.index, entry.oid);
    }
    Ok(())
}

fn check_hash(manifest: &Manifest, object: u32, chunk: &CipherChunk, hasher: ChunkHasher) -> Result<()> {
    if hasher.finish() != *manifest.chunk_hash(object, chunk.index) {
        refuse!(ChunkHash, "chunk {} of object {} does not have its signed hash", chunk.index, chunk.object);
    }
    Ok(())
}

/// A slot whose bytes nobody may believe yet: wiped when dropped unproven.
struct Unproven<'a> {
    bytes: &'a mut [u8],
    proven: bool,
}

impl Drop for Unproven<'_> {
    fn drop(&mut self) {
        if !self.proven {
            self.bytes.fill(0);
        }
    }
}

/// Reads pieces as if they were one slice. Never asked for more than there is: the length was checked.
struct Cursor<'a> {
    piece: &'a [u8],
    rest: std::slice::Iter<'a, Bytes>,
}

impl<'a> Cursor<'a> {
    fn new(pieces: &'a [Bytes]) -> Cursor<'a> {
        Cursor { piece: &[], rest: pieces.iter() }
    }

    /// At least one and at most `len` of the next bytes.
    fn next(&mut self, len: usize) -> &'a [u8] {
        while self.piece.is_empty() {
            self.piece = self.rest.next().expect("the pieces were as long as the layout says");
        }
        let (now, later) = self.piece.split_at(len.min(self.piece.len()));
        self.piece = later;
        now
    }

    fn copy_to(&mut self, mut out: &mut [u8]) {
        while !out.is_empty() {
            let part = self.next(out.len());
            let (now, later) = out.split_at_mut(part.len());
            now.copy_from_slice(part);
            out = later;
        }
    }

    fn skip(&mut self, mut len: usize) {
        while len > 0 {
            len -= self.next(len).len();
        }
    }

    fn each_rest(self, mut take: impl FnMut(&[u8])) {
        take(self.piece);
        self.rest.for_each(|piece| take(piece));
    }
}

/// Seals the chunks of one new object, in any order and from any threads.
pub struct ObjectSealer {
    header: ObjectHeader,
    layout: ObjectLayout,
    hash_alg: HashAlg,
    key: Secret<32>,
    base_nonce: [u8; 12],
    /// One bit a chunk: sealing a chunk twice with other bytes would use a nonce twice, which gives plaintext away.
    sealed: Box<[AtomicU64]>,
}

impl ObjectSealer {
    /// `oid` is fresh from the random number generator and belongs to this object only.
    pub fn new(dek: &Dek, suite: Suite, layout: ObjectLayout, hash_alg: HashAlg, oid: Oid, vid: Vid) -> Self {
        let (block_log2, chunk_log2) = (layout.block_log2(), layout.chunk_log2());
        let mut header = ObjectHeader { suite, block_log2, chunk_log2, oid, origin_vid: vid, commit: [0; 32] };
        let mut derived = Derived::new(&dek.object_root(oid), "object", &[&header.kdf_input()]);
        header.commit = derived.commit;
        let key = Secret::from_bytes(&mut derived.key);
        let base_nonce = derived.base_nonce;
        drop(derived);
        scrub_stack();
        let words = layout.chunk_count().div_ceil(64);
        let sealed = (0..words).map(|_| AtomicU64::new(0)).collect();
        ObjectSealer { header, layout, hash_alg, key, base_nonce, sealed }
    }

    /// The first 128 bytes of the stored object.
    pub fn header(&self) -> [u8; 128] {
        self.header.encode()
    }
    pub fn object_header(&self) -> &ObjectHeader {
        &self.header
    }
    pub fn commit(&self) -> [u8; 32] {
        self.header.commit
    }
    pub fn oid(&self) -> Oid {
        self.header.oid
    }
    pub fn layout(&self) -> &ObjectLayout {
        &self.layout
    }

    /// Encrypts chunk `index` in `buf` (plain in, ciphertext out), puts its tags into `tags` (cleared first) and answers
    /// the hash for the manifest. The stored chunk is `buf || tags`.
    ///
    /// # Panics
    /// If the chunk was sealed before, does not exist, or is not as long as `buf`.
    pub fn seal_chunk(&self, index: ChunkIndex, buf: &mut [u8], tags: &mut Vec<u8>) -> [u8; 32] {
        let plain_len = self.layout.chunk_plain_len(index);
        assert!(buf.len() as u64 == plain_len, "{} bytes for a chunk of {plain_len}", buf.len());
        let bit = 1 << (index.0 % 64);
        let before = self.sealed[index.0 as usize / 64].fetch_or(bit, Ordering::Relaxed);
        assert!(before & bit == 0, "chunk {index} of object {} sealed twice", self.header.oid);

        tags.clear();
        self.seal_blocks(index, buf, tags);
        scrub_stack();
        let mut hasher = ChunkHasher::new(self.hash_alg);
        hasher.update(buf);
        hasher.update(tags);
        hasher.finish()
    }

    #[inline(never)]
    fn seal_blocks(&self, index: ChunkIndex, buf: &mut [u8], tags: &mut Vec<u8>) {
        let derived = Derived { key: *self.key.expose(), base_nonce: self.base_nonce, commit: self.header.commit };
        let cipher = BlockCipher::new(self.header.suite, &derived);
        let blocks = buf.chunks_mut(self.layout.block_len() as usize);
        for (number, block) in self.layout.chunk_blocks(index).zip(blocks) {
            tags.extend_from_slice(&cipher.seal(number, &self.layout.block_aad(number), block));
        }
    }
}

impl std::fmt::Debug for ObjectSealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ObjectSealer({})", self.header.oid)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Sealed, pattern};
    use super::*;
    use crate::error::Code;

    const SUITES: [Suite; 2] = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305];

    /// Opens `stored` as chunk `index` both ways; asserts that what is refused leaves a slot of zeros.
    fn outcome(sealed: &Sealed, index: u32, stored: &[u8]) -> [Result<Vec<u8>, Code>; 2] {
        [Verify::Strict, Verify::Aead].map(|verify| {
            let mut slot = sealed.slot(index);
            let chunk = sealed.chunk_of(index, stored);
            match open_chunk(&sealed.keys, &sealed.manifest, 0, &chunk, verify, &mut slot) {
                Ok(()) => Ok(slot),
                Err(err) => {
                    assert!(slot.iter().all(|byte| *byte == 0), "{verify:?}: unverified bytes in the slot");
                    assert!(err.message().contains(&sealed.manifest.objects()[0].oid.to_string()), "{err:?}");
                    Err(err.code())
                }
            }
        })
    }

    fn refused(sealed: &Sealed, index: u32, stored: &[u8], what: &str) {
        let got = outcome(sealed, index, stored);
        assert_eq!(got, [Err(Code::ChunkHash), Err(Code::Tag)], "{what}");
        let chunk = sealed.chunk_of(index, stored);
        assert_eq!(check_chunk_hash(&sealed.manifest, 0, &chunk).unwrap_err().code(), Code::ChunkHash, "{what}");
    }

    #[test]
    fn what_is_sealed_opens_for_every_suite_hash_and_shape() {
        for (block_log2, chunk_log2) in [(12, 20), (16, 20), (20, 20), (16, 23)] {
            let (block, chunk) = (1u64 << block_log2, 1u64 << chunk_log2);
            for plain_len in [1, block - 1, block, block + 1, chunk - 1, chunk, chunk + 1, 2 * chunk + block + 5] {
                let layout = ObjectLayout::new(plain_len, block_log2, chunk_log2).unwrap();
                for suite in SUITES {
                    for hash_alg in [HashAlg::Sha256, HashAlg::Blake3] {
                        let sealed = Sealed::new(suite, hash_alg, layout, Oid([7; 32]));
                        for (index, stored) in sealed.chunks.iter().enumerate() {
                            let index = index as u32;
                            let plain = sealed.plain_of(index).to_vec();
                            assert_eq!(outcome(&sealed, index, stored), [Ok(plain.clone()), Ok(plain)], "{layout:?}");
                            check_chunk_hash(&sealed.manifest, 0, &sealed.chunk(index)).unwrap();
                        }
                    }
                }
            }
        }
    }

    /// Sizes and cuts that nobody thought of; the seed of a failure is in its message.
    #[test]
    fn random_lengths_open_however_the_pieces_are_cut() {
        for seed in 0..60u8 {
            let random = pattern(seed, 64);
            let word = |at: usize| u64::from_le_bytes(random[at..at + 8].try_into().unwrap());
            let layout = ObjectLayout::new(1 + word(0) % (3 << 20), 12 + (random[8] % 9), 20).unwrap();
            let suite = SUITES[usize::from(random[9] % 2)];
            let hash_alg = [HashAlg::Sha256, HashAlg::Blake3][usize::from(random[10] % 2)];
            let sealed = Sealed::new(suite, hash_alg, layout, Oid([seed; 32]));
            let index = (word(16) % sealed.chunks.len() as u64) as u32;
            let mut rest = &sealed.chunks[index as usize][..];
            let mut pieces = Vec::new();
            for at in 0.. {
                let len = (1 + word(24 + at % 32) as usize % 300_000).min(rest.len());
                let (now, later) = rest.split_at(len);
                pieces.extend([Bytes::copy_from_slice(now), Bytes::new()]);
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            let chunk = CipherChunk { object: Oid([seed; 32]), index: ChunkIndex(index), pieces };
            for verify in [Verify::Strict, Verify::Aead] {
                let mut slot = sealed.slot(index);
                open_chunk(&sealed.keys, &sealed.manifest, 0, &chunk, verify, &mut slot)
                    .unwrap_or_else(|err| panic!("seed {seed}: {err:?}"));
                assert_eq!(slot, sealed.plain_of(index), "seed {seed}");
            }
        }
    }

    /// THREAT_MODEL (f) rows 1 and 2.
    #[test]
    fn a_flipped_bit_in_ciphertext_or_tag_is_refused() {
        for suite in SUITES {
            let sealed = Sealed::small(suite);
            let len = sealed.chunks[0].len();
            for at in [0, 1, 65_535, 65_536, (1 << 20) - 1, 1 << 20, len - 16, len - 1] {
                for bit in [0, 7] {
                    let mut stored = sealed.chunks[0].clone();
                    stored[at] ^= 1 << bit;
                    refused(&sealed, 0, &stored, &format!("{suite:?} byte {at} bit {bit}"));
                }
            }
        }
    }

    /// THREAT_MODEL (f) row 3.
    #[test]
    fn a_chunk_of_another_length_is_refused_before_it_is_copied() {
        let sealed = Sealed::small(Suite::Aes256Gcm);
        let stored = &sealed.chunks[2];
        for other in [&stored[..stored.len() - 1], &[&stored[..], &[0]].concat(), &stored[..0], &sealed.chunks[0]] {
            assert_eq!(outcome(&sealed, 2, other), [Err(Code::Length), Err(Code::Length)]);
        }
        let chunk = sealed.chunk_of(3, stored);
        assert_eq!(check_chunk_hash(&sealed.manifest, 0, &chunk).unwrap_err().code(), Code::Length);
    }

    /// THREAT_MODEL (f) rows 6 and 8.
    #[test]
    fn a_chunk_moved_to_another_index_or_object_is_refused() {
        let sealed = Sealed::small(Suite::Aes256Gcm);
        refused(&sealed, 0, &sealed.chunks[1], "chunk 1 as chunk 0");
        refused(&sealed, 1, &sealed.chunks[0], "chunk 0 as chunk 1");
        let layout = sealed.manifest.objects()[0].layout;
        let other = Sealed::new(Suite::Aes256Gcm, HashAlg::Blake3, layout, Oid([2; 32]));
        refused(&sealed, 0, &other.chunks[0], "chunk 0 of another object");
        let mut slot = sealed.slot(0);
        let err = open_chunk(&sealed.keys, &sealed.manifest, 0, &other.chunk(0), Verify::Aead, &mut slot).unwrap_err();
        assert_eq!(err.code(), Code::ChunkHash, "a chunk that says it is of another object");
    }

    /// THREAT_MODEL (f) row 7.
    #[test]
    fn two_blocks_swapped_with_their_tags_are_refused() {
        for suite in SUITES {
            let sealed = Sealed::small(suite);
            let mut stored = sealed.chunks[0].clone();
            let (first, second) = stored.split_at_mut(65_536);
            first.swap_with_slice(&mut second[..65_536]);
            let tags = 1 << 20;
            let (first, second) = stored[tags..].split_at_mut(16);
            first.swap_with_slice(&mut second[..16]);
            refused(&sealed, 0, &stored, "blocks 0 and 1 swapped");
        }
    }

    /// THREAT_MODEL (f) row 9.
    #[test]
    fn zeros_are_an_ordinary_failing_block() {
        let sealed = Sealed::small(Suite::Aes256Gcm);
        let mut block = sealed.chunks[0].clone();
        block[65_536..131_072].fill(0);
        block[(1 << 20) + 16..(1 << 20) + 32].fill(0);
        refused(&sealed, 0, &block, "a zero block with a zero tag");
        refused(&sealed, 0, &vec![0; block.len()], "a chunk of zeros");
    }

    /// THREAT_MODEL (f) row 10: what the strict mode is for.
    #[test]
    fn a_block_forged_with_the_key_is_refused_by_the_hash_and_by_nothing_else() {
        for suite in SUITES {
            let sealed = Sealed::small(suite);
            let entry = sealed.manifest.objects()[0];
            let cipher = BlockCipher::new(suite, &sealed.keys.object_keys(&entry));
            let mut stored = sealed.chunks[0].clone();
            stored[..65_536].copy_from_slice(&pattern(99, 65_536));
            let tag = cipher.seal(0, &entry.layout.block_aad(0), &mut stored[..65_536]);
            stored[1 << 20..][..16].copy_from_slice(&tag);

            let [strict, aead] = outcome(&sealed, 0, &stored);
            assert_eq!(strict, Err(Code::ChunkHash));
            assert_eq!(&aead.unwrap()[..65_536], pattern(99, 65_536));
        }
    }

    /// A slot is wiped also when the opener dies of a bug half-way.
    #[test]
    fn a_panic_while_opening_leaves_zeros() {
        let sealed = Sealed::small(Suite::Aes256Gcm);
        let mut slot = vec![0xee; 10];
        let chunk = sealed.chunk(0);
        let bug = std::panic::AssertUnwindSafe(|| {
            open_chunk(&sealed.keys, &sealed.manifest, 0, &chunk, Verify::Strict, &mut slot)
        });
        assert!(std::panic::catch_unwind(bug).is_err());
        assert_eq!(slot, [0; 10]);
    }

    #[test]
    #[should_panic(expected = "sealed twice")]
    fn a_chunk_is_sealed_once() {
        let layout = ObjectLayout::new(100, 16, 20).unwrap();
        let sealer =
            ObjectSealer::new(&Dek::random(), Suite::Aes256Gcm, layout, HashAlg::Blake3, Oid([1; 32]), Vid([1; 16]));
        let (mut buf, mut tags) = ([0; 100], Vec::new());
        sealer.seal_chunk(ChunkIndex(0), &mut buf, &mut tags);
        sealer.seal_chunk(ChunkIndex(0), &mut buf, &mut tags);
    }
}
