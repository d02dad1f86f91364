//! The state of every chunk of an object, held in pages that exist once a chunk of them was wanted.
//!
//! In: chunk numbers below the object's count. Out: what is known of each; [`Chunk::Empty`] of what nobody asked for.
//! Why: an object has up to 2^20 chunks and a model of 10 TiB 1.3 million, of which a cache holds a few thousand. A flat
//! table of them would cost 40 bytes a chunk at the first open of a file; this one costs 8 bytes for [`PAGE_CHUNKS`].
//! Held by: the tests below, tests/scale.rs.

use std::ops::{Index, IndexMut};

use super::Chunk;

/// 64 chunks of 8 MiB: half a GiB of plaintext to a page of 2.5 KiB.
const PAGE_CHUNKS: usize = 64;

static EMPTY: Chunk = Chunk::Empty;

pub(super) struct Chunks {
    pages: Box<[Option<Box<[Chunk]>>]>,
    len: usize,
}

impl Chunks {
    /// `len` chunks that nobody asked for.
    pub fn new(len: u64) -> Chunks {
        let len = usize::try_from(len).expect("an object has at most 2^20 chunks");
        Chunks { pages: (0..len.div_ceil(PAGE_CHUNKS)).map(|_| None).collect(), len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The chunks that were ever asked for, and their neighbours.
    pub fn iter(&self) -> impl Iterator<Item = &Chunk> {
        self.pages.iter().flatten().flatten()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Chunk> {
        self.pages.iter_mut().flatten().flatten()
    }
}

impl Index<usize> for Chunks {
    type Output = Chunk;
    fn index(&self, index: usize) -> &Chunk {
        assert!(index < self.len, "chunk {index} of {}", self.len);
        self.pages[index / PAGE_CHUNKS].as_ref().map_or(&EMPTY, |page| &page[index % PAGE_CHUNKS])
    }
}

impl IndexMut<usize> for Chunks {
    fn index_mut(&mut self, index: usize) -> &mut Chunk {
        assert!(index < self.len, "chunk {index} of {}", self.len);
        let number = index / PAGE_CHUNKS;
        // The last page ends with the object: nobody may meet a chunk that does not exist.
        let len = PAGE_CHUNKS.min(self.len - number * PAGE_CHUNKS);
        let page = self.pages[number].get_or_insert_with(|| (0..len).map(|_| Chunk::Empty).collect());
        &mut page[index % PAGE_CHUNKS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_what_was_put_there_and_every_other_is_empty() {
        let mut chunks = Chunks::new(1 << 20);
        for index in [0, 63, 64, (1 << 20) - 1] {
            assert!(matches!(chunks[index], Chunk::Empty));
            chunks[index] = Chunk::Leaving { waiters: Vec::new() };
        }
        for index in 0..chunks.len() {
            let set = [0, 63, 64, (1 << 20) - 1].contains(&index);
            assert_eq!(matches!(chunks[index], Chunk::Leaving { .. }), set, "chunk {index}");
        }
        assert_eq!(chunks.iter().filter(|chunk| !matches!(chunk, Chunk::Empty)).count(), 4);
        assert_eq!(chunks.iter_mut().count(), 3 * PAGE_CHUNKS);
    }

    #[test]
    fn the_last_page_ends_with_the_object() {
        let mut chunks = Chunks::new(65);
        chunks[64] = Chunk::Leaving { waiters: Vec::new() };
        assert_eq!(chunks.iter_mut().count(), 1);
    }

    #[test]
    fn looking_allocates_nothing() {
        let chunks = Chunks::new(1000);
        assert!((0..1000).all(|index| matches!(chunks[index], Chunk::Empty)));
        assert_eq!(chunks.iter().count(), 0);
    }

    #[test]
    #[should_panic(expected = "chunk 65 of 65")]
    fn a_chunk_behind_the_last_is_a_bug() {
        Chunks::new(65)[65] = Chunk::Empty;
    }
}
