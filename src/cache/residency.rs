//! Which parts of a file are in memory, on their way, or being read: for people who look.
//!
//! In: a file of a model, and how many cells its picture may have. Out: a [`Residency`].
//! Promises: nothing is fetched, created or kept from eviction by looking; the answer has no more cells than asked for, and
//! no lock is held for longer than one cell's chunks take to look at.
//! Not here: names (`vfs`), how it is drawn (`cli::top`).
//! Held by: tests/top.rs.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Cache, CachedObject, Chunk, Model, ObjectKey};
use crate::format::{ChunkIndex, FileEntry};

/// How long a round lasts at least: a chunk counts as being read if it was read in this round or the one before, so that
/// two who look at once do not hide it from each other.
const ROUND: Duration = Duration::from_millis(500);

/// The round of a chunk that nobody read yet.
pub(super) const NEVER: u32 = 0;

/// What is true of one cell: of its one chunk, or of several, where the first of this list that holds for any of them counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Refused lately: it was tampered with, or the store did not answer.
    Refused,
    /// A reader waits for it.
    Awaited,
    /// Read a moment ago through the daemon. Reads that the kernel serves by itself are not seen.
    Read,
    /// On its way ahead of any reader.
    Coming,
    /// All of it.
    Resident,
    /// Some of its chunks.
    Partly,
    Absent,
}

impl Part {
    pub const ALL: [Part; 7] =
        [Part::Refused, Part::Awaited, Part::Read, Part::Coming, Part::Resident, Part::Partly, Part::Absent];

    /// How it travels: one character a cell.
    pub const fn letter(self) -> char {
        match self {
            Part::Refused => '!',
            Part::Awaited => 'w',
            Part::Read => '@',
            Part::Coming => '>',
            Part::Resident => '#',
            Part::Partly => '+',
            Part::Absent => '.',
        }
    }

    pub fn of_letter(letter: char) -> Option<Part> {
        Part::ALL.into_iter().find(|part| part.letter() == letter)
    }
}

/// What of a file is in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residency {
    /// Chunks that hold bytes of the file; of a small file one, which it may share with others.
    pub chunks: u64,
    /// Chunks to a cell; the last cell may have fewer.
    pub cell_chunks: u64,
    pub cells: Vec<Part>,
    /// Of the file itself.
    pub resident_bytes: u64,
    /// Opens that bypass the daemon, by which it may be read unseen.
    pub passthrough_opens: u64,
}

/// When chunks were last read, in rounds that go on as somebody looks: a clock for the price of one load.
pub(super) struct Rounds {
    number: AtomicU32,
    since: Mutex<Instant>,
}

impl Default for Rounds {
    fn default() -> Self {
        // Beyond the round before, which is beyond "never". It does not wrap in 68 years of looking.
        Rounds { number: AtomicU32::new(NEVER + 2), since: Mutex::new(Instant::now()) }
    }
}

impl Rounds {
    pub fn now(&self) -> u32 {
        self.number.load(Ordering::Relaxed)
    }

    /// The oldest round that still counts as now. Begins the next one if this one is old enough.
    fn look(&self) -> u32 {
        let mut since = self.since.lock().expect("a thread died looking at a clock");
        if since.elapsed() >= ROUND {
            *since = Instant::now();
            self.number.fetch_add(1, Ordering::Relaxed);
        }
        self.now() - 1
    }
}

impl Cache {
    /// What of `file` of `model` is resident, in `cells_max` cells at most (one at least). O(its chunks).
    pub fn residency(&self, model: &Model, file: &FileEntry, cells_max: usize) -> Residency {
        let read_since = self.shared.rounds.look();
        let runs: Vec<Run> = model
            .manifest
            .extents(file)
            .iter()
            .map(|extent| {
                let layout = model.entry(extent.object).layout;
                let bytes = extent.object_offset..extent.object_offset + extent.len;
                let chunks = u64::from(layout.chunk_at(bytes.start).0)..u64::from(layout.chunk_at(bytes.end - 1).0) + 1;
                let key = ObjectKey { model: model.serial, object: extent.object };
                let table = self.shared.objects.lock().expect("a thread died holding the object table");
                Run { object: table.get(&key).cloned(), chunks, bytes }
            })
            .collect();
        let chunks = runs.iter().map(|run| run.chunks.end - run.chunks.start).sum::<u64>();
        let cell_chunks = chunks.div_ceil(cells_max.max(1) as u64).max(1);
        let mut told = Residency { chunks, cell_chunks, cells: Vec::new(), resident_bytes: 0, passthrough_opens: 0 };
        let mut cell = Cell::default();
        for run in &runs {
            told.passthrough_opens += run.object.as_ref().map_or(0, |object| object.state().hot_opens);
            let mut next = run.chunks.start;
            while next < run.chunks.end {
                let some = next..run.chunks.end.min(next + cell_chunks - cell.seen);
                told.resident_bytes += run.look(some.clone(), read_since, &mut cell);
                next = some.end;
                if cell.seen == cell_chunks {
                    told.cells.push(std::mem::take(&mut cell).part());
                }
            }
        }
        if cell.seen > 0 {
            told.cells.push(cell.part());
        }
        told
    }
}

/// Chunks of one object that a file lies in.
struct Run {
    /// `None`: nothing of it was ever asked for.
    object: Option<Arc<CachedObject>>,
    chunks: Range<u64>,
    /// The file's own, in the object.
    bytes: Range<u64>,
}

impl Run {
    /// Adds `chunks` to a cell; returns how many of the file's bytes in them are resident.
    fn look(&self, chunks: Range<u64>, read_since: u32, cell: &mut Cell) -> u64 {
        cell.seen += chunks.end - chunks.start;
        let Some(object) = &self.object else { return 0 };
        let state = object.state();
        let now = Instant::now();
        let mut bytes = 0;
        for index in chunks {
            let part = match &state.chunks[index as usize] {
                Chunk::Empty | Chunk::Leaving { .. } => continue,
                Chunk::Failed { until, .. } if *until < now => continue,
                Chunk::Failed { .. } => Part::Refused,
                Chunk::Filling { waiters, .. } if waiters.iter().any(|waiter| !waiter.is_closed()) => Part::Awaited,
                Chunk::Filling { .. } => Part::Coming,
                Chunk::Resident { pins, read, .. } => {
                    cell.resident += 1;
                    let own = object.layout.chunk_plain(ChunkIndex(index as u32));
                    bytes += own.end.min(self.bytes.end) - own.start.max(self.bytes.start);
                    if *pins == 0 && *read < read_since {
                        continue;
                    }
                    Part::Read
                }
            };
            cell.first = Some(cell.first.map_or(part, |first| first.min(part)));
        }
        bytes
    }
}

#[derive(Default)]
struct Cell {
    seen: u64,
    resident: u64,
    first: Option<Part>,
}

impl Cell {
    fn part(self) -> Part {
        match self.first {
            Some(part) => part,
            None if self.resident == self.seen => Part::Resident,
            None if self.resident > 0 => Part::Partly,
            None => Part::Absent,
        }
    }
}
