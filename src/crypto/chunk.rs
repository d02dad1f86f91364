//! Turns a stored chunk into verified plaintext in its slot, and plaintext into a stored chunk; nothing else can.
//!
//! In: a `CipherChunk` (hostile, any length) and an empty slot. Out: the slot filled, or an error and a wiped slot.
//! Promises: a byte that failed its hash, commitment or tag is never left in the slot, not even by a panic; what was
//! hashed is what is opened, because both read the same received pieces or the copy of them; a coded stream is parsed only
//! after the tags of its blocks were right, and can write nowhere but into the slot; one chunk of one object is sealed at
//! most once.
//! Not here: fetching and refetching (`store`, `cache`), which slot (`cache`), what a coded stream means (`codec`).
//! Spec: docs/FORMAT.md a.3, a.8, a.10. Held by: `vectors`, the tests below, THREAT_MODEL (f) rows 1-10, 33.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use subtle::ConstantTimeEq;

use super::aead::{BlockCipher, TAG_LEN};
use super::dek::{Dek, ModelKeys};
use super::hash::ChunkHasher;
use super::kdf::Derived;
use crate::codec;
use crate::error::{Code, Error, Result};
use crate::format::{
    BlockShape, ChunkIndex, ChunkShape, HashAlg, Manifest, ObjectEntry, ObjectHeader, ObjectLayout, Oid, Suite, Vid,
};
use crate::mem::{Secret, scrub_stack, wipe};
use crate::refuse;
use crate::store::CipherChunk;

/// What is hashed, opened and decoded before the next is touched: small enough for all of that to happen in the
/// second-level cache, so that each byte of ciphertext and plaintext crosses the memory bus once; large enough for BLAKE3 to
/// use all its lanes.
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

/// Locked memory that [`open_chunk`] needs beside the slot to open a chunk of `object`: 0 unless it is coded.
pub fn scratch_len(object: &ObjectEntry) -> usize {
    if object.is_coded() { codec::SEGMENT_BYTES_MAX + window_len(object.layout.block_len() as usize) } else { 0 }
}

/// Whole blocks, at least [`WINDOW_BYTES`].
const fn window_len(block_len: usize) -> usize {
    if block_len > WINDOW_BYTES { block_len } else { WINDOW_BYTES }
}

/// Opens `chunk` of object number `object` into `slot`.
///
/// Order: length; the object's commitment, in constant time, before any cipher; then, a window at a time, the hash
/// (strict), every block's tag, and the decoding of what is coded; at the end the signed hash is compared. Nothing may look
/// at the slot before this returns Ok. A wrong hash is told before a wrong tag: it is the one the store may be at fault for.
///
/// `scratch` is locked memory of at least [`scratch_len`] bytes; the coded plaintext passes through it, and it is wiped.
///
/// # Errors
/// `LENGTH`, `CHUNK_HASH`, `COMMIT`, `TAG`, `CODED`, each naming chunk and object; the whole slot is then zero. Only the
/// first two can be a fault of the store, and are worth one more fetch.
///
/// # Panics
/// If `slot` is not as long as the chunk's plaintext, `scratch` too short, or the manifest has no such object: bugs of the
/// caller.
///
/// No allocation but the tags (16 bytes a block). Cost at 8 MiB: one hash and one pass of the cipher, from the received
/// pieces into place.
pub fn open_chunk(
    keys: &ModelKeys,
    manifest: &Manifest,
    object: u32,
    chunk: &CipherChunk,
    verify: Verify,
    slot: &mut [u8],
    scratch: &mut [u8],
) -> Result<()> {
    let entry = &manifest.objects()[object as usize];
    let mut unproven = Unproven { slot, scratch, proven: false };
    let shape = check_claim(manifest, object, chunk)?;
    let plain_len = usize::try_from(entry.layout.chunk_plain_len(chunk.index)).expect("a chunk is at most 64 MiB");
    assert!(unproven.slot.len() == plain_len, "slot of {} bytes for a chunk of {plain_len}", unproven.slot.len());

    let mut hasher = (verify == Verify::Strict).then(|| ChunkHasher::new(manifest.header().hash_alg));
    let opened = open_committed(keys, entry, chunk, shape, hasher.as_mut(), &mut unproven);
    scrub_stack();
    let opened = opened?;
    if let Some(hasher) = hasher {
        check_hash(manifest, object, chunk, hasher)?;
    }
    opened?;
    unproven.proven = true;
    Ok(())
}

/// The part of [`open_chunk`] that holds keys: a function of its own, so that the stack it used can be scrubbed.
///
/// The inner result is what the tags and the decoder said. With a `hasher` the stored chunk has been hashed to its end
/// either way.
#[inline(never)]
fn open_committed(
    keys: &ModelKeys,
    entry: &ObjectEntry,
    chunk: &CipherChunk,
    shape: ChunkShape,
    mut hasher: Option<&mut ChunkHasher>,
    room: &mut Unproven<'_>,
) -> Result<Result<()>> {
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
    let mut cursor = Cursor::new(&chunk.pieces);
    let mut tags = vec![0; TAG_LEN * shape.block_count() as usize];
    let mut at_tags = cursor.clone();
    at_tags.skip(shape.sealed_len());
    at_tags.clone().copy_to(&mut tags);

    let mut blocks = shape.blocks().zip(tags.as_chunks::<TAG_LEN>().0);
    let mut target = Target::new(shape, room);
    let bad_tag = |number: u64| {
        let text = format!("block {number} in chunk {} of object {} failed authentication", chunk.index, entry.oid);
        Error::new(Code::Tag, text)
    };
    let malformed = |reason: codec::Malformed| {
        let text = format!("chunk {} of object {} is authentic but cannot be decoded", chunk.index, entry.oid);
        Error::new(Code::Coded, text).with_source(reason)
    };
    let mut outcome = Ok(());
    let mut rest = shape.sealed_len();
    while rest > 0 {
        let len = rest.min(window_len(shape.block_len()));
        rest -= len;
        let window = target.room(len);
        // Opened straight from the received piece where the window lies in one; from a copy of it in place otherwise.
        let sealed = cursor.next_whole(len);
        if sealed.is_none() {
            cursor.copy_to(window);
        }
        if let Some(hasher) = &mut hasher {
            hasher.update(sealed.unwrap_or(window));
        }
        if outcome.is_ok() {
            outcome = open_window(&cipher, &mut blocks, sealed, window).map_err(bad_tag);
        }
        if outcome.is_ok() {
            outcome = target.opened(len).map_err(malformed);
        }
        if outcome.is_err() && hasher.is_none() {
            return Ok(outcome);
        }
    }
    if let Some(hasher) = hasher {
        at_tags.each_rest(|tags| hasher.update(tags));
    }
    Ok(outcome.and_then(|()| target.finish().map_err(malformed)))
}

/// Opens the blocks of one window into `window`, from `sealed` or in place; the number of the first that fails.
fn open_window<'a>(
    cipher: &BlockCipher,
    blocks: &mut impl Iterator<Item = (BlockShape, &'a [u8; TAG_LEN])>,
    sealed: Option<&[u8]>,
    window: &mut [u8],
) -> Result<(), u64> {
    let mut at = 0;
    while at < window.len() {
        let (block, tag) = blocks.next().expect("the blocks of a chunk cover it");
        let range = at..at + block.len as usize;
        let out = &mut window[range.clone()];
        let opened = match sealed {
            Some(sealed) => cipher.open_from(block.number, &block.aad, &sealed[range.clone()], out, tag),
            None => cipher.open(block.number, &block.aad, out, tag),
        };
        opened.map_err(|_| block.number)?;
        at = range.end;
    }
    Ok(())
}

/// Where opened windows go: one after the other into the slot, or through the scratch and the decoder into the slot.
enum Target<'a> {
    Plain { slot: &'a mut [u8], at: usize },
    Coded { slot: &'a mut [u8], scratch: &'a mut [u8], decoder: codec::Decoder, held: usize },
}

impl<'a> Target<'a> {
    fn new(shape: ChunkShape, room: &'a mut Unproven<'_>) -> Target<'a> {
        if shape.sealed_len() == room.slot.len() {
            return Target::Plain { slot: room.slot, at: 0 };
        }
        let decoder = codec::Decoder::new(shape.sealed_len(), room.slot.len());
        Target::Coded { slot: room.slot, scratch: room.scratch, decoder, held: 0 }
    }

    /// Room for the next window.
    fn room(&mut self, len: usize) -> &mut [u8] {
        match self {
            Target::Plain { slot, at } => &mut slot[*at..][..len],
            Target::Coded { scratch, held, .. } => &mut scratch[*held..][..len],
        }
    }

    /// Takes over a window of `len` bytes whose tags were right.
    fn opened(&mut self, len: usize) -> Result<(), codec::Malformed> {
        match self {
            Target::Plain { at, .. } => *at += len,
            Target::Coded { slot, scratch, decoder, held } => {
                *held += len;
                let used = decoder.advance(&scratch[..*held], slot)?;
                // Less than a segment is left, and still warm.
                scratch.copy_within(used..*held, 0);
                *held -= used;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<(), codec::Malformed> {
        match self {
            Target::Plain { .. } => Ok(()),
            Target::Coded { slot, scratch, decoder, held } => decoder.finish(&scratch[..held], slot),
        }
    }
}

/// Compares a stored chunk with the signed hash, without any key: scrubbing, mirrors, `verify`.
///
/// # Errors
/// `LENGTH`, `CHUNK_HASH`.
pub fn check_chunk_hash(manifest: &Manifest, object: u32, chunk: &CipherChunk) -> Result<()> {
    check_claim(manifest, object, chunk)?;
    let mut hasher = ChunkHasher::new(manifest.header().hash_alg);
    Cursor::new(&chunk.pieces).each_rest(|piece| hasher.update(piece));
    check_hash(manifest, object, chunk, hasher)
}

/// Whether the chunk says it is one of this object, and is as long as the manifest says; its shape if so.
fn check_claim(manifest: &Manifest, object: u32, chunk: &CipherChunk) -> Result<ChunkShape> {
    let entry = &manifest.objects()[object as usize];
    if chunk.object != entry.oid {
        refuse!(ChunkHash, "chunk {} of object {} came for object {}", chunk.index, chunk.object, entry.oid);
    }
    if u64::from(chunk.index.0) >= entry.layout.chunk_count() {
        refuse!(Length, "object {} has {} chunks, no chunk {}", entry.oid, entry.layout.chunk_count(), chunk.index);
    }
    let shape = manifest.chunk_shape(object, chunk.index);
    let (got, want) = (chunk.stored_len(), shape.stored_len());
    if got != want {
        refuse!(Length, "store sent {got} of {want} bytes for chunk {} of object {}", chunk.index, entry.oid);
    }
    Ok(shape)
}

fn check_hash(manifest: &Manifest, object: u32, chunk: &CipherChunk, hasher: ChunkHasher) -> Result<()> {
    if hasher.finish() != *manifest.chunk_hash(object, chunk.index) {
        refuse!(ChunkHash, "chunk {} of object {} does not have its signed hash", chunk.index, chunk.object);
    }
    Ok(())
}

/// A slot whose bytes nobody may believe yet: wiped when dropped unproven. The scratch is wiped in any case.
struct Unproven<'a> {
    slot: &'a mut [u8],
    scratch: &'a mut [u8],
    proven: bool,
}

impl Drop for Unproven<'_> {
    fn drop(&mut self) {
        wipe(self.scratch);
        if !self.proven {
            wipe(self.slot);
        }
    }
}

/// Reads pieces as if they were one slice. Never asked for more than there is: the length was checked.
#[derive(Clone)]
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

    /// The next `len` bytes, if they lie in one piece.
    fn next_whole(&mut self, len: usize) -> Option<&'a [u8]> {
        while self.piece.is_empty() {
            self.piece = self.rest.next()?;
        }
        let (now, later) = self.piece.split_at_checked(len)?;
        self.piece = later;
        Some(now)
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
    /// An object whose chunks are all stored as they are. `oid` is fresh from the random number generator and belongs to
    /// this object only.
    pub fn new(dek: &Dek, suite: Suite, layout: ObjectLayout, hash_alg: HashAlg, oid: Oid, vid: Vid) -> Self {
        ObjectSealer::with(dek, layout, hash_alg, unsealed_header(suite, layout, oid, vid))
    }

    /// An object whose chunks may be coded; otherwise as [`ObjectSealer::new`].
    pub fn coded(dek: &Dek, suite: Suite, layout: ObjectLayout, hash_alg: HashAlg, oid: Oid, vid: Vid) -> Self {
        let header = ObjectHeader { coded: true, ..unsealed_header(suite, layout, oid, vid) };
        ObjectSealer::with(dek, layout, hash_alg, header)
    }

    fn with(dek: &Dek, layout: ObjectLayout, hash_alg: HashAlg, mut header: ObjectHeader) -> Self {
        let mut derived = Derived::new(&dek.object_root(header.oid), "object", &[&header.kdf_input()]);
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

    /// Encrypts chunk `index` in `buf` (plain or coded bytes in, ciphertext out), puts its tags into `tags` (cleared first)
    /// and answers the hash for the manifest. The stored chunk is `buf || tags`.
    ///
    /// # Panics
    /// If the chunk was sealed before or does not exist; if `buf` is not as long as the chunk's plaintext, or, in a coded
    /// object, is empty or longer than that.
    pub fn seal_chunk(&self, index: ChunkIndex, buf: &mut [u8], tags: &mut Vec<u8>) -> [u8; 32] {
        let plain_len = self.layout.chunk_plain_len(index);
        assert!(buf.len() as u64 == plain_len || self.header.coded, "{} bytes for a chunk of {plain_len}", buf.len());
        let shape = self.layout.chunk_shape(index, buf.len() as u64);
        let bit = 1 << (index.0 % 64);
        let before = self.sealed[index.0 as usize / 64].fetch_or(bit, Ordering::Relaxed);
        assert!(before & bit == 0, "chunk {index} of object {} sealed twice", self.header.oid);

        tags.clear();
        self.seal_blocks(shape, buf, tags);
        scrub_stack();
        let mut hasher = ChunkHasher::new(self.hash_alg);
        hasher.update(buf);
        hasher.update(tags);
        hasher.finish()
    }

    #[inline(never)]
    fn seal_blocks(&self, shape: ChunkShape, buf: &mut [u8], tags: &mut Vec<u8>) {
        let derived = Derived { key: *self.key.expose(), base_nonce: self.base_nonce, commit: self.header.commit };
        let cipher = BlockCipher::new(self.header.suite, &derived);
        for (block, bytes) in shape.blocks().zip(buf.chunks_mut(shape.block_len())) {
            tags.extend_from_slice(&cipher.seal(block.number, &block.aad, bytes));
        }
    }
}

fn unsealed_header(suite: Suite, layout: ObjectLayout, oid: Oid, origin_vid: Vid) -> ObjectHeader {
    let (block_log2, chunk_log2) = (layout.block_log2(), layout.chunk_log2());
    ObjectHeader { suite, block_log2, chunk_log2, oid, origin_vid, coded: false, commit: [0; 32] }
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
            let mut scratch = vec![0xee; scratch_len(&sealed.manifest.objects()[0])];
            let outcome = open_chunk(&sealed.keys, &sealed.manifest, 0, &chunk, verify, &mut slot, &mut scratch);
            assert!(scratch.iter().all(|byte| *byte == 0), "{verify:?}: the scratch keeps plaintext");
            match outcome {
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
                open_chunk(&sealed.keys, &sealed.manifest, 0, &chunk, verify, &mut slot, &mut [])
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
        let err = open_chunk(&sealed.keys, &sealed.manifest, 0, &other.chunk(0), Verify::Aead, &mut slot, &mut [])
            .unwrap_err();
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
            let first = sealed.manifest.chunk_shape(0, ChunkIndex(0)).blocks().next().unwrap();
            let tag = cipher.seal(0, &first.aad, &mut stored[..65_536]);
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
            open_chunk(&sealed.keys, &sealed.manifest, 0, &chunk, Verify::Strict, &mut slot, &mut [])
        });
        assert!(std::panic::catch_unwind(bug).is_err());
        assert_eq!(slot, [0; 10]);
    }

    #[test]
    #[should_panic(expected = "sealed twice")]
    fn a_chunk_is_sealed_once() {
        let layout = ObjectLayout::new(100, 16, 20).unwrap();
        let (oid, vid) = (Oid([1; 32]), Vid([1; 16]));
        let sealer = ObjectSealer::new(&Dek::random(), Suite::Aes256Gcm, layout, HashAlg::Blake3, oid, vid);
        let (mut buf, mut tags) = ([0; 100], Vec::new());
        sealer.seal_chunk(ChunkIndex(0), &mut buf, &mut tags);
        sealer.seal_chunk(ChunkIndex(0), &mut buf, &mut tags);
    }

    #[test]
    fn coded_chunks_open_to_their_plaintext_beside_chunks_stored_as_they_are() {
        for (block_log2, chunk_log2) in [(12, 20), (16, 20), (20, 20), (16, 23)] {
            let (block, chunk) = (1u64 << block_log2, 1u64 << chunk_log2);
            for plain_len in [2 * block + 2, chunk - 1, chunk, 2 * chunk + block + 5] {
                let layout = ObjectLayout::new(plain_len, block_log2, chunk_log2).unwrap();
                for (suite, hash_alg) in [(SUITES[0], HashAlg::Blake3), (SUITES[1], HashAlg::Sha256)] {
                    for as_is in [&[][..], &[0], &[1]] {
                        let sealed = Sealed::coded(suite, hash_alg, layout, as_is);
                        for (index, stored) in sealed.chunks.iter().enumerate() {
                            let index = index as u32;
                            let plain = sealed.plain_of(index).to_vec();
                            let short = stored.len() < plain.len() * 9 / 10;
                            assert!(short != as_is.contains(&index) || plain.len() < 100_000, "{layout:?} {index}");
                            assert_eq!(outcome(&sealed, index, stored), [Ok(plain.clone()), Ok(plain)], "{layout:?}");
                            check_chunk_hash(&sealed.manifest, 0, &sealed.chunk(index)).unwrap();
                        }
                    }
                }
            }
        }
    }

    /// The received bytes are opened where they lie if they lie in one piece: the same result either way.
    #[test]
    fn a_coded_chunk_opens_from_one_piece_as_from_many() {
        let layout = ObjectLayout::new(1 << 20, 16, 20).unwrap();
        let sealed = Sealed::coded(Suite::Aes256Gcm, HashAlg::Blake3, layout, &[]);
        let stored = &sealed.chunks[0];
        for cut in [1, 65_536, 131_072, 131_073, stored.len()] {
            let pieces = stored.chunks(cut.max(1000)).map(Bytes::copy_from_slice).collect();
            let chunk = CipherChunk { object: Oid([5; 32]), index: ChunkIndex(0), pieces };
            let mut slot = sealed.slot(0);
            let mut scratch = vec![0; scratch_len(&sealed.manifest.objects()[0])];
            open_chunk(&sealed.keys, &sealed.manifest, 0, &chunk, Verify::Strict, &mut slot, &mut scratch).unwrap();
            assert_eq!(slot, sealed.plain_of(0), "pieces of {cut}");
        }
    }

    /// THREAT_MODEL (f) rows 1 to 3 for coded chunks.
    #[test]
    fn edits_of_a_coded_chunk_are_refused_before_anything_is_decoded() {
        let layout = ObjectLayout::new((2 << 20) + 70_000, 16, 20).unwrap();
        let sealed = Sealed::coded(Suite::Aes256Gcm, HashAlg::Blake3, layout, &[]);
        let stored = &sealed.chunks[1];
        for at in [0, 8, 70_000, stored.len() - 200, stored.len() - 1] {
            let mut edited = stored.clone();
            edited[at] ^= 4;
            refused(&sealed, 1, &edited, &format!("a bit at {at}"));
        }
        let mut longer = stored.clone();
        longer.push(0);
        for wrong in [&stored[..stored.len() - 1], &longer] {
            assert_eq!(outcome(&sealed, 1, wrong), [Err(Code::Length), Err(Code::Length)]);
        }
    }

    /// A holder of the key writes a stream that is authentic and no coded stream: by hash it is refused as any forgery, by
    /// tags alone it reaches the decoder, which refuses it and leaves nothing behind.
    #[test]
    fn a_forged_coded_stream_is_refused_by_the_decoder_where_the_hash_is_not_asked() {
        let layout = ObjectLayout::new(1 << 20, 16, 20).unwrap();
        let sealed = Sealed::coded(Suite::Aes256Gcm, HashAlg::Blake3, layout, &[]);
        let entry = sealed.manifest.objects()[0];
        let cipher = BlockCipher::new(Suite::Aes256Gcm, &sealed.keys.object_keys(&entry));
        let shape = sealed.manifest.chunk_shape(0, ChunkIndex(0));
        let mut honest = Vec::new();
        codec::encode(codec::Kind::Bf16, 0, sealed.plain_of(0), &mut honest);
        for (at, byte) in [(0, 2), (3, 9), (8, 0xff), (12, honest[13]), (honest.len() - 1, 0)] {
            let mut forged = honest.clone();
            forged[at] = byte;
            let mut tags = Vec::new();
            for (block, bytes) in shape.blocks().zip(forged.chunks_mut(shape.block_len())) {
                tags.extend(cipher.seal(block.number, &block.aad, bytes));
            }
            forged.extend(tags);
            let [strict, aead] = outcome(&sealed, 0, &forged);
            assert_eq!(strict, Err(Code::ChunkHash));
            let only_a_value_changed = at + 1 == honest.len();
            assert!(only_a_value_changed || aead == Err(Code::Coded), "byte {at}: {aead:?}");
        }
    }
}
