//! Where the chunks and blocks of a data object lie: all offset arithmetic of the format, pure.
//!
//! ```text
//! header 128 | chunk 0 | chunk 1 | ...     chunk j = ciphertext of its plain (or coded) bytes || one 16-byte tag a block
//! ```
//! An [`ObjectLayout`] says which plain bytes a chunk holds; a [`ChunkShape`] how long the chunk is as stored, and what its
//! blocks are bound to. The two differ only in coded objects, whose chunks are as long as the manifest says.
//! Promises: no operation overflows for any layout that [`ObjectLayout::new`] accepts.
//! Spec: docs/FORMAT.md a.3.

use std::ops::Range;

use super::limits::{BLOCK_LOG2_MAX, BLOCK_LOG2_MIN, CHUNK_LOG2_MAX, CHUNK_LOG2_MIN, OBJECT_PLAIN_BYTES_MAX};
use super::{OBJECT_HEADER_LEN, TAG_LEN};
use crate::error::Result;
use crate::refuse;

/// The number of a chunk within its object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkIndex(pub u32);

impl std::fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The shape of a data object: how many plain bytes, cut into which blocks and chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ObjectLayout {
    plain_len: u64,
    block_log2: u8,
    chunk_log2: u8,
}

impl ObjectLayout {
    /// # Errors
    /// `OBJECT` for a length outside 1..=2^40 or sizes outside 12..=20 (blocks) and 20..=26 (chunks).
    pub fn new(plain_len: u64, block_log2: u8, chunk_log2: u8) -> Result<ObjectLayout> {
        if !(1..=OBJECT_PLAIN_BYTES_MAX).contains(&plain_len) {
            refuse!(Object, "object of {plain_len} plain bytes, 1 to 2^40 are allowed");
        }
        check_sizes(block_log2, chunk_log2)?;
        Ok(ObjectLayout { plain_len, block_log2, chunk_log2 })
    }

    pub const fn plain_len(&self) -> u64 {
        self.plain_len
    }

    pub const fn block_log2(&self) -> u8 {
        self.block_log2
    }

    pub const fn chunk_log2(&self) -> u8 {
        self.chunk_log2
    }

    /// Plain bytes of a whole block.
    pub const fn block_len(&self) -> u64 {
        1 << self.block_log2
    }

    /// Plain bytes of a whole chunk.
    pub const fn chunk_len(&self) -> u64 {
        1 << self.chunk_log2
    }

    /// Blocks of a whole chunk.
    pub const fn blocks_per_chunk(&self) -> u64 {
        1 << (self.chunk_log2 - self.block_log2)
    }

    /// At most 2^20.
    pub const fn chunk_count(&self) -> u64 {
        self.plain_len.div_ceil(self.chunk_len())
    }

    pub const fn block_count(&self) -> u64 {
        self.plain_len.div_ceil(self.block_len())
    }

    /// Bytes of the whole stored object, header included.
    pub const fn stored_len(&self) -> u64 {
        OBJECT_HEADER_LEN as u64 + self.plain_len + TAG_LEN * self.block_count()
    }

    pub fn chunks(&self) -> impl Iterator<Item = ChunkIndex> + use<> {
        let count = u32::try_from(self.chunk_count()).expect("2^40 plain bytes are at most 2^20 chunks");
        (0..count).map(ChunkIndex)
    }

    /// The plain bytes of the object that chunk `index` holds.
    ///
    /// # Panics
    /// If the object has no such chunk.
    pub fn chunk_plain(&self, index: ChunkIndex) -> Range<u64> {
        let start = u64::from(index.0) << self.chunk_log2;
        assert!(start < self.plain_len, "chunk {index} of an object with {} chunks", self.chunk_count());
        start..self.plain_len.min(start + self.chunk_len())
    }

    /// Plain bytes of chunk `index`.
    pub fn chunk_plain_len(&self, index: ChunkIndex) -> u64 {
        let plain = self.chunk_plain(index);
        plain.end - plain.start
    }

    /// The bytes of the stored object that hold chunk `index` when nothing is coded: ciphertext, then its tags.
    ///
    /// # Panics
    /// If the object has no such chunk.
    pub fn chunk_stored(&self, index: ChunkIndex) -> Range<u64> {
        let stride = self.chunk_len() + TAG_LEN * self.blocks_per_chunk();
        let start = OBJECT_HEADER_LEN as u64 + u64::from(index.0) * stride;
        start..start + self.chunk_shape(index, self.chunk_plain_len(index)).stored_len()
    }

    /// The shape of chunk `index` when `sealed_len` bytes of it are encrypted: all its plain bytes, or fewer coded ones.
    ///
    /// # Panics
    /// If the object has no such chunk, or `sealed_len` is 0 or more than its plain bytes.
    pub fn chunk_shape(&self, index: ChunkIndex, sealed_len: u64) -> ChunkShape {
        self.checked_chunk_shape(index, sealed_len)
            .unwrap_or_else(|| panic!("{sealed_len} bytes sealed of {} in chunk {index}", self.chunk_plain_len(index)))
    }

    /// The same of a length that somebody claims: `None` if the chunk cannot be sealed in so many bytes.
    ///
    /// # Panics
    /// If the object has no such chunk.
    pub fn checked_chunk_shape(&self, index: ChunkIndex, sealed_len: u64) -> Option<ChunkShape> {
        (1..=self.chunk_plain_len(index)).contains(&sealed_len).then(|| ChunkShape {
            first_block: u64::from(index.0) << (self.chunk_log2 - self.block_log2),
            sealed_len,
            block_log2: self.block_log2,
            ends_object: u64::from(index.0) + 1 == self.chunk_count(),
        })
    }

    /// The chunk that holds byte `plain_offset` of the object.
    ///
    /// # Panics
    /// At or past the end of the object.
    pub fn chunk_at(&self, plain_offset: u64) -> ChunkIndex {
        assert!(plain_offset < self.plain_len, "byte {plain_offset} of an object of {}", self.plain_len);
        ChunkIndex(u32::try_from(plain_offset >> self.chunk_log2).expect("an object has at most 2^20 chunks"))
    }
}

/// How a chunk is stored: so many bytes, encrypted in blocks that are numbered through the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkShape {
    first_block: u64,
    sealed_len: u64,
    block_log2: u8,
    ends_object: bool,
}

impl ChunkShape {
    /// Bytes encrypted: the chunk's plain bytes, or its coded stream. At most 64 MiB.
    pub const fn sealed_len(&self) -> usize {
        self.sealed_len as usize
    }

    /// Bytes of every block but the last.
    pub const fn block_len(&self) -> usize {
        1 << self.block_log2
    }

    pub const fn block_count(&self) -> u64 {
        self.sealed_len.div_ceil(1 << self.block_log2)
    }

    /// Bytes in the store: ciphertext and tags.
    pub const fn stored_len(&self) -> u64 {
        self.sealed_len + TAG_LEN * self.block_count()
    }

    /// Number within the object, sealed bytes, and what the tag authenticates beside them, of each block in order.
    pub fn blocks(self) -> impl Iterator<Item = BlockShape> {
        let count = self.block_count();
        (0..count).map(move |nth| {
            let last_of_chunk = nth + 1 == count;
            let len = if last_of_chunk { self.sealed_len - (nth << self.block_log2) } else { 1 << self.block_log2 };
            let number = self.first_block + nth;
            let len = u32::try_from(len).expect("a block is at most 2^20 bytes");
            BlockShape { number, len, aad: block_aad(number, len, last_of_chunk && self.ends_object) }
        })
    }
}

/// One block of a [`ChunkShape`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockShape {
    pub number: u64,
    pub len: u32,
    pub aad: [u8; 16],
}

/// `u64le(number) || u32le(sealed length) || u32le(1 if last)`: binds a block to its place, its length and the end.
pub fn block_aad(number: u64, sealed_len: u32, last: bool) -> [u8; 16] {
    let mut aad = [0u8; 16];
    aad[..8].copy_from_slice(&number.to_le_bytes());
    aad[8..12].copy_from_slice(&sealed_len.to_le_bytes());
    aad[12..].copy_from_slice(&u32::from(last).to_le_bytes());
    aad
}

/// The bounds on block and chunk size; with them a chunk is never smaller than a block.
pub(super) fn check_sizes(block_log2: u8, chunk_log2: u8) -> Result<()> {
    if !(BLOCK_LOG2_MIN..=BLOCK_LOG2_MAX).contains(&block_log2) {
        refuse!(Object, "block size 2^{block_log2}, 2^12 to 2^20 are allowed");
    }
    if !(CHUNK_LOG2_MIN..=CHUNK_LOG2_MAX).contains(&chunk_log2) {
        refuse!(Object, "chunk size 2^{chunk_log2}, 2^20 to 2^26 are allowed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn the_layout_of_the_spec_vector() {
        let layout = ObjectLayout::new(205_704, 16, 20).unwrap();
        assert_eq!(layout.block_count(), 4);
        assert_eq!(layout.chunk_count(), 1);
        assert_eq!(layout.stored_len(), 205_896);
        let last = layout.chunk_shape(ChunkIndex(0), 205_704).blocks().last().unwrap();
        assert_eq!((last.number, last.len), (3, 9_096));
        assert_eq!(hex::encode(last.aad), "03000000000000008823000001000000");
        assert_eq!(layout.chunk_stored(ChunkIndex(0)), 128..205_896);
    }

    #[test]
    fn the_default_stride_is_the_one_the_spec_states() {
        let layout = ObjectLayout::new(1 << 40, 16, 23).unwrap();
        assert_eq!(layout.chunk_stored(ChunkIndex(1)).start - 128, 8_390_656);
    }

    /// Chunks and blocks tile the object, whatever its shape: no gap, no overlap, nothing left.
    #[test]
    fn chunks_and_blocks_tile_every_object() {
        for (block_log2, chunk_log2) in [(12, 20), (16, 20), (20, 20), (16, 23), (20, 26)] {
            let (block, chunk) = (1u64 << block_log2, 1u64 << chunk_log2);
            for plain_len in [1, 4095, block, block + 1, chunk - 1, chunk, chunk + 1, 3 * chunk + 5 * block + 7] {
                let layout = ObjectLayout::new(plain_len, block_log2, chunk_log2).unwrap();
                let (mut plain, mut stored, mut number) = (0, 128, 0);
                for index in layout.chunks() {
                    assert_eq!(layout.chunk_plain(index).start, plain);
                    assert_eq!(layout.chunk_stored(index).start, stored);
                    plain = layout.chunk_plain(index).end;
                    stored = layout.chunk_stored(index).end;
                    assert_eq!(layout.chunk_at(plain - 1), index);
                    let shape = layout.chunk_shape(index, layout.chunk_plain_len(index));
                    let mut sum = 0;
                    for block in shape.blocks() {
                        assert_eq!(block.number, number);
                        assert_eq!(
                            block.aad[12] == 1,
                            number + 1 == layout.block_count(),
                            "the last block, and no other"
                        );
                        number += 1;
                        sum += u64::from(block.len);
                    }
                    assert_eq!(sum, layout.chunk_plain_len(index));
                }
                assert_eq!((plain, stored, number), (plain_len, layout.stored_len(), layout.block_count()));
            }
        }
    }

    /// However few bytes a coded chunk has, its blocks keep the numbers that the plain ones would have: no nonce twice.
    #[test]
    fn a_coded_chunk_keeps_the_block_numbers_of_its_place() {
        let layout = ObjectLayout::new((2 << 20) + 10, 16, 20).unwrap();
        for sealed_len in [1, 65_535, 65_536, 65_537, 1 << 20] {
            let shape = layout.chunk_shape(ChunkIndex(1), sealed_len);
            let blocks: Vec<_> = shape.blocks().collect();
            assert_eq!(blocks[0].number, 16);
            assert_eq!(blocks.iter().map(|block| u64::from(block.len)).sum::<u64>(), sealed_len);
            assert_eq!(shape.stored_len(), sealed_len + 16 * blocks.len() as u64);
            assert!(blocks.iter().all(|block| block.aad[12] == 0), "chunk 2 is the last");
        }
        let end = layout.chunk_shape(ChunkIndex(2), 3).blocks().last().unwrap();
        assert_eq!((end.number, end.len, end.aad[12]), (32, 3, 1));
    }

    #[test]
    fn the_largest_object_does_not_overflow() {
        let layout = ObjectLayout::new(1 << 40, 12, 20).unwrap();
        let last = layout.chunks().last().unwrap();
        assert_eq!(layout.chunk_stored(last).end, layout.stored_len());
    }

    /// THREAT_MODEL (f) rows 52 and 53.
    #[test]
    fn impossible_shapes_are_refused() {
        for (plain_len, block, chunk) in [
            (0, 16, 23),
            ((1 << 40) + 1, 16, 23),
            (1 << 62, 16, 23),
            (u64::MAX, 16, 23),
            (1, 0, 23),
            (1, 11, 23),
            (1, 21, 23),
            (1, 63, 23),
            (1, 255, 23),
            (1, 16, 19),
            (1, 16, 27),
            (1, 16, 40),
            (1, 20, 16),
        ] {
            let refused = ObjectLayout::new(plain_len, block, chunk).unwrap_err();
            assert_eq!(refused.code(), Code::Object, "{plain_len} {block} {chunk}");
        }
    }
}
