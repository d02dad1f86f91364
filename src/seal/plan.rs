//! Which bytes of which files go into which new objects: pure arithmetic, decided before any byte is read.
//!
//! Small files share packs, in the order of their paths; a larger file has an object to itself; a file longer than an
//! object may be is cut. Spec: docs/FORMAT.md b.1.

use std::ops::Range;

use crate::format::limits::{EXTENT_ALIGN, OBJECT_PLAIN_BYTES_MAX};

/// A file below this shares an object: one request fetches many of them, and nobody can count them.
pub const SMALL_FILE_BYTES: u64 = 2 << 20;
/// A pack is closed before it grows above this: what one changed file costs a later version at most.
pub const PACK_BYTES_MAX: u64 = 32 << 20;

/// A run of one file within an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index into the list of files.
    pub file: usize,
    pub file_offset: u64,
    pub object_offset: u64,
    pub len: u64,
}

/// An object to be made. Between its pieces, and nowhere else, are zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectPlan {
    pub plain_len: u64,
    pub pieces: Vec<Piece>,
}

/// Objects that are made one after the other, because the digest of a file runs through all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    pub objects: Vec<ObjectPlan>,
}

/// Where packs end and files are cut; other numbers than the default are for tests.
#[derive(Debug, Clone, Copy)]
pub struct Cuts {
    pub small_file_bytes: u64,
    pub pack_bytes_max: u64,
    pub object_bytes_max: u64,
}

impl Default for Cuts {
    fn default() -> Self {
        Cuts {
            small_file_bytes: SMALL_FILE_BYTES,
            pack_bytes_max: PACK_BYTES_MAX,
            object_bytes_max: OBJECT_PLAIN_BYTES_MAX,
        }
    }
}

/// `files`: index and size, in the order of their paths. Empty files need no object.
pub fn plan(files: impl IntoIterator<Item = (usize, u64)>, cuts: Cuts) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut pack = ObjectPlan { plain_len: 0, pieces: Vec::new() };
    for (file, size) in files {
        if size == 0 {
            continue;
        }
        if size >= cuts.small_file_bytes {
            jobs.push(slices(file, size, cuts.object_bytes_max));
            continue;
        }
        let mut start = pack.plain_len.next_multiple_of(EXTENT_ALIGN);
        if start + size > cuts.pack_bytes_max && !pack.pieces.is_empty() {
            jobs.push(Job {
                objects: vec![std::mem::replace(&mut pack, ObjectPlan { plain_len: 0, pieces: Vec::new() })],
            });
            start = 0;
        }
        pack.pieces.push(Piece { file, file_offset: 0, object_offset: start, len: size });
        pack.plain_len = start + size;
    }
    if !pack.pieces.is_empty() {
        jobs.push(Job { objects: vec![pack] });
    }
    jobs
}

fn slices(file: usize, size: u64, object_bytes_max: u64) -> Job {
    let objects = (0..size.div_ceil(object_bytes_max)).map(|number| {
        let file_offset = number * object_bytes_max;
        let len = object_bytes_max.min(size - file_offset);
        ObjectPlan { plain_len: len, pieces: vec![Piece { file, file_offset, object_offset: 0, len }] }
    });
    Job { objects: objects.collect() }
}

impl ObjectPlan {
    /// What the object's plain bytes `range` are: runs of files, each with its place in the range. The rest is zeros.
    pub fn cover(&self, range: Range<u64>) -> impl Iterator<Item = (Piece, Range<usize>)> + '_ {
        let first = self.pieces.partition_point(|piece| piece.object_offset + piece.len <= range.start);
        self.pieces[first..].iter().take_while(move |piece| piece.object_offset < range.end).map(move |piece| {
            let start = piece.object_offset.max(range.start);
            let end = (piece.object_offset + piece.len).min(range.end);
            let part = Piece {
                file: piece.file,
                file_offset: piece.file_offset + (start - piece.object_offset),
                object_offset: start,
                len: end - start,
            };
            let place = |at: u64| usize::try_from(at - range.start).expect("a chunk is at most 64 MiB");
            (part, place(start)..place(end))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CUTS: Cuts = Cuts { small_file_bytes: 10_000, pack_bytes_max: 20_000, object_bytes_max: 8_192 * 5 };

    #[test]
    fn small_files_share_packs_and_large_ones_do_not() {
        let jobs = plan([(0, 5_000), (1, 0), (2, 10_000), (3, 9_999), (4, 1), (5, 100_000)], CUTS);
        let shapes: Vec<Vec<u64>> =
            jobs.iter().map(|job| job.objects.iter().map(|object| object.plain_len).collect()).collect();
        assert_eq!(shapes, [vec![10_000], vec![8_192 + 9_999], vec![40_960, 40_960, 18_080], vec![1]]);
        let pack = &jobs[1].objects[0].pieces;
        assert_eq!(pack[1], Piece { file: 3, file_offset: 0, object_offset: 8_192, len: 9_999 });
    }

    #[test]
    fn a_cover_tells_every_byte_of_a_chunk_once() {
        let jobs = plan([(0, 5_000), (1, 4_096), (2, 3)], CUTS);
        let pack = &jobs[0].objects[0];
        let covered = |range: Range<u64>| {
            pack.cover(range).map(|(piece, place)| (piece.file, piece.file_offset, place)).collect::<Vec<_>>()
        };
        assert_eq!(covered(0..pack.plain_len), [(0, 0, 0..5_000), (1, 0, 8_192..12_288), (2, 0, 12_288..12_291)]);
        assert_eq!(covered(4_999..8_193), [(0, 4_999, 0..1), (1, 0, 3_193..3_194)]);
        assert_eq!(covered(5_000..8_192), []);
    }

    #[test]
    fn a_file_of_exactly_one_object_is_not_cut() {
        assert_eq!(plan([(0, 40_960)], CUTS)[0].objects.len(), 1);
        assert_eq!(plan([(0, 40_961)], CUTS)[0].objects.len(), 2);
    }
}
