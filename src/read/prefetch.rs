//! Which bytes of a file to fetch before they are asked for: a pure policy over the places where it was read.
//!
//! In: each read as it happens. Out: a plain range to fetch ahead, or nothing.
//! Promises: a single read anywhere asks for nothing; reads that walk forward ask for more the further they walk, up to
//! a fixed share of the cache; several walkers over one file, also through one shared descriptor, are told apart.
//! Not here: fetching, room, urgency (`cache`).

use std::ops::Range;

use crate::tensors::TensorMap;

/// Walkers followed at once in one file: the workers of a tensor-parallel load, or the prefetch threads of a loader.
const WALKERS_MAX: usize = 16;

/// How far beyond a walker's end, or before it, a read may start and still be its next step: the kernel's readahead sends
/// pieces out of order and skips what it has.
const STEP_SLACK_BYTES: u64 = 4 << 20;

/// Bytes walked before anything is fetched ahead: a header and its neighbours are not a walk.
const WALK_MIN_BYTES: u64 = 1 << 20;

/// The furthest ahead: 128 MiB keeps 16 chunks of 8 MiB in flight.
const AHEAD_MAX_BYTES: u64 = 128 << 20;

/// The least that is fetched ahead once a walk is seen: two chunks.
const AHEAD_MIN_BYTES: u64 = 16 << 20;

#[derive(Debug, Clone)]
struct Walker {
    /// One past the furthest byte read.
    end: u64,
    /// Bytes read in this walk.
    walked: u64,
    /// One past the furthest byte asked for ahead.
    asked: u64,
    /// When it last stepped, in reads of this file.
    seen: u64,
}

/// The walkers of one file.
#[derive(Debug, Default)]
pub struct Streams {
    walkers: Vec<Walker>,
    clock: u64,
}

impl Streams {
    /// Notes a read of `range` in a file of `size` plain bytes and says what to fetch ahead of it, if anything.
    ///
    /// `cache_bytes`: the budget; a walker never has more than an eighth of it ahead, so that what was fetched is still
    /// there when it is reached.
    pub fn on_read(&mut self, range: Range<u64>, size: u64, cache_bytes: u64) -> Option<Range<u64>> {
        self.clock += 1;
        let clock = self.clock;
        let near = |walker: &&mut Walker| {
            range.start <= walker.end.saturating_add(STEP_SLACK_BYTES)
                && range.end.saturating_add(STEP_SLACK_BYTES) >= walker.end
        };
        let Some(walker) = self.walkers.iter_mut().filter(near).min_by_key(|w| w.end.abs_diff(range.start)) else {
            self.admit(range);
            return None;
        };
        walker.seen = clock;
        if range.end > walker.end {
            walker.walked += range.end - range.start.max(walker.end);
            walker.end = range.end;
        }
        if walker.walked < WALK_MIN_BYTES {
            return None;
        }
        let share = cache_bytes / 8;
        // Four times what was walked: the window opens as fast as the walk proves itself.
        let window = walker.walked.saturating_mul(4).clamp(AHEAD_MIN_BYTES, AHEAD_MAX_BYTES).min(share);
        let target = walker.end.saturating_add(window).min(size);
        let from = walker.asked.max(walker.end);
        // Asked again only when half the window is used up, so that a stream of small reads costs nothing.
        if target <= from || (target < size && target - from < window / 2) {
            return None;
        }
        walker.asked = target;
        Some(from..target)
    }

    fn admit(&mut self, range: Range<u64>) {
        let walker = Walker { end: range.end, walked: range.end - range.start, asked: 0, seen: self.clock };
        if self.walkers.len() < WALKERS_MAX {
            self.walkers.push(walker);
            return;
        }
        let oldest = self.walkers.iter_mut().min_by_key(|w| w.seen).expect("the list is full, hence not empty");
        *oldest = walker;
    }
}

/// Tensors followed at once in one file.
const TENSORS_MAX: usize = 64;

/// Tensors shorter than this come with the chunk they lie in.
const TENSOR_BYTES_MIN: u64 = 2 << 20;

#[derive(Debug, Clone, Copy)]
struct Touched {
    start: u64,
    len: u64,
    read: u64,
}

impl Touched {
    fn is_read(&self) -> bool {
        self.read >= self.len / 4 * 3
    }
}

/// Which tensors of a file were read, and how much of each: a reader that took whole tensors will take the next one whole
/// too, in whatever order it goes through them and through each.
#[derive(Debug, Default)]
pub struct TensorReads {
    touched: Vec<Touched>,
}

impl TensorReads {
    /// Notes a read of `range` and says which bytes of the tensor it enters to fetch as well, if any: the first time that a
    /// tensor is entered, once two others were read, and unless more of the lately entered ones were left unread. At
    /// most an eighth of `cache_bytes`.
    pub fn on_read(&mut self, range: &Range<u64>, tensors: &TensorMap, cache_bytes: u64) -> Option<Range<u64>> {
        let mut wish = None;
        for tensor in tensors.within(range.clone()).iter().take(TENSORS_MAX) {
            let (start, len) = (tensor.range.start, tensor.range.end - tensor.range.start);
            if len < TENSOR_BYTES_MIN {
                continue;
            }
            let read = tensor.range.end.min(range.end) - start.max(range.start);
            if let Some(touched) = self.touched.iter_mut().find(|touched| touched.start == start) {
                touched.read += read;
                continue;
            }
            let finished = self.touched.iter().filter(|touched| touched.is_read()).count();
            // The one before is still being read, hence never counts against.
            let unread = (self.touched.len() - finished).saturating_sub(1);
            if finished >= 2 && finished > unread {
                wish = Some(start..tensor.range.end.min(start + (cache_bytes / 8).min(AHEAD_MAX_BYTES)));
            }
            if self.touched.len() == TENSORS_MAX {
                self.touched.remove(0);
            }
            self.touched.push(Touched { start, len, read });
        }
        wish
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    #[test]
    fn a_single_read_asks_for_nothing() {
        let mut streams = Streams::default();
        assert_eq!(streams.on_read(0..4096, 100 * GIB, 8 * GIB), None);
        assert_eq!(streams.on_read(50 * GIB..50 * GIB + 4096, 100 * GIB, 8 * GIB), None);
    }

    #[test]
    fn reading_a_header_of_some_kilobytes_asks_for_nothing() {
        let mut streams = Streams::default();
        for start in (0..256 << 10).step_by(4096) {
            assert_eq!(streams.on_read(start..start + 4096, 100 * GIB, 8 * GIB), None, "at {start}");
        }
    }

    #[test]
    fn a_walk_asks_ahead_and_every_byte_is_asked_for_once() {
        let mut streams = Streams::default();
        let mut asked: Vec<Range<u64>> = Vec::new();
        for start in (0..GIB).step_by(MIB as usize) {
            if let Some(range) = streams.on_read(start..start + MIB, GIB, 8 * GIB) {
                assert!(range.start >= start + MIB, "{range:?} is behind {start}");
                assert!(range.end - start <= AHEAD_MAX_BYTES + MIB, "{range:?} is too far ahead of {start}");
                asked.push(range);
            }
        }
        assert!(asked.windows(2).all(|pair| pair[0].end <= pair[1].start), "{asked:?}");
        assert_eq!(asked.last().expect("a walk of a gigabyte asks").end, GIB);
    }

    #[test]
    fn walkers_that_take_turns_on_one_descriptor_are_told_apart() {
        let mut streams = Streams::default();
        let mut ahead = [0u64; 8];
        for step in 0..32 {
            for (walker, ahead) in ahead.iter_mut().enumerate() {
                let start = walker as u64 * 10 * GIB + step * MIB;
                if streams.on_read(start..start + MIB, 100 * GIB, 8 * GIB).is_some() {
                    *ahead += 1;
                }
            }
        }
        assert!(ahead.iter().all(|&n| n > 0), "{ahead:?}");
    }

    #[test]
    fn the_window_stays_within_an_eighth_of_the_cache() {
        let mut streams = Streams::default();
        for start in (0..256 * MIB).step_by(MIB as usize) {
            if let Some(range) = streams.on_read(start..start + MIB, GIB, 64 * MIB) {
                assert!(range.end - (start + MIB) <= 8 * MIB, "{range:?} at {start}");
            }
        }
    }

    #[test]
    fn random_reads_ask_for_nothing() {
        let mut streams = Streams::default();
        let mut at: u64 = 1;
        for _ in 0..10_000 {
            at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let start = (at >> 20) % (1000 * GIB);
            assert_eq!(streams.on_read(start..start + 4096, 1001 * GIB, 8 * GIB), None);
        }
    }

    /// A file of `count` tensors of `len` bytes each behind a head.
    fn map_of(count: u64, len: u64) -> TensorMap {
        let entries: Vec<String> = (0..count)
            .map(|i| format!(r#""t{i}":{{"dtype":"BF16","shape":[],"data_offsets":[{},{}]}}"#, i * len, (i + 1) * len))
            .collect();
        let json = format!("{{{}}}", entries.join(","));
        let head = [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
        TensorMap::parse(&head, head.len() as u64 + count * len).expect("a good head")
    }

    #[test]
    fn who_took_two_tensors_whole_is_brought_the_third_at_its_first_touch() {
        let map = map_of(100, 20 * MIB);
        let mut reads = TensorReads::default();
        // Tensors in any order, and each from its end to its beginning, as some copies go.
        for (step, index) in [70, 3, 41, 8, 99].into_iter().enumerate() {
            let tensor = map.tensors()[index].range.clone();
            let mut wishes = Vec::new();
            for at in (tensor.start..tensor.end).step_by(MIB as usize).collect::<Vec<_>>().into_iter().rev() {
                wishes.extend(reads.on_read(&(at..at + MIB), &map, 8 * GIB));
            }
            let wanted = if step < 2 { vec![] } else { vec![tensor] };
            assert_eq!(wishes, wanted, "tensor {index}");
        }
    }

    #[test]
    fn who_takes_slices_of_tensors_is_brought_no_more_than_those() {
        let map = map_of(1000, 20 * MIB);
        let mut reads = TensorReads::default();
        for tensor in map.tensors() {
            let start = tensor.range.start + 5 * MIB;
            assert_eq!(reads.on_read(&(start..start + 2 * MIB), &map, 8 * GIB), None);
        }
        assert!(reads.touched.len() <= TENSORS_MAX);
    }

    #[test]
    fn a_huge_tensor_is_brought_within_an_eighth_of_the_cache() {
        let map = map_of(4, GIB);
        let mut reads = TensorReads::default();
        for tensor in &map.tensors()[..2] {
            reads.on_read(&tensor.range, &map, 256 * MIB);
        }
        let third = map.tensors()[2].range.start;
        assert_eq!(reads.on_read(&(third..third + 1), &map, 256 * MIB), Some(third..third + 32 * MIB));
    }
}
