//! A plain range of a file -> exactly those verified bytes, or an error. Never a wrong byte, never a short read before
//! the end.
//!
//! In: a file of a verified manifest, an offset, a length. Out: an [`Answer`] that borrows locked memory.
//! Promises: the answer's length is `min(len, size - offset)`; a read waits at most its deadline; no pin is held while
//! waiting for another, so any cache of two chunks serves any number of readers; every read also tells the prefetcher
//! where it was.
//! Not here: keeping chunks (`cache`), names and handles (`vfs`).
//! Held by: tests/read_property.rs, tests/hostile_read.rs.

pub mod habits;
pub mod prefetch;
pub mod profile;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::cache::{Cache, CachedObject, Model, PinnedRun, Urgency};
use crate::error::{Code, Error, Result};
use crate::format::ChunkIndex;
use crate::mem::LockedBuf;
use crate::tensors::TensorMap;
use prefetch::{Streams, TensorReads};
use profile::Recorder;

/// The longest read answered in one piece; what the kernel sends at most (1 MiB, FUSE max_pages 256).
pub const READ_MAX: usize = 1 << 20;

/// Locked buffers for reads that cannot be answered from one run of resident chunks.
const GATHER_BUFFERS: usize = 4;

/// Locked memory that a [`Reader`] takes beside the cache.
pub const BUFFER_BYTES: u64 = (GATHER_BUFFERS * READ_MAX) as u64;

/// The longest head that is looked at for tensors: it must lie in the cache in one piece.
const HEAD_LOOK_BYTES_MAX: u64 = 16 << 20;

/// Files below this are not looked into: they come with their first chunks.
const TENSORS_FILE_BYTES_MIN: u64 = 32 << 20;

/// Chunks that a replay keeps in flight: fewer than prefetch may have, so that walkers find a free place.
const REPLAY_WIDTH: usize = 8;

/// A file that somebody has open: its extents, and what its readers did lately.
pub struct OpenFile {
    pub model: Arc<Model>,
    /// Index into `model.manifest.files`.
    pub file: u32,
    pub size: u64,
    extents: Vec<Placed>,
    streams: Mutex<Streams>,
    head: Mutex<Head>,
    tensors: OnceLock<Tensors>,
}

/// How far the search for the file's tensors has come. Hints only (`tensors`).
enum Head {
    /// To be looked at once this many bytes of it are resident.
    Wanted(u64),
    /// Found, or not to be found.
    Done,
}

struct Tensors {
    map: TensorMap,
    reads: Mutex<TensorReads>,
}

/// An extent: where it lies in the file, where in its object.
struct Placed {
    file_range: Range<u64>,
    object: Arc<CachedObject>,
    object_offset: u64,
}

impl OpenFile {
    pub fn new(cache: &Cache, model: &Arc<Model>, file: u32) -> Self {
        let entry = &model.manifest.files()[file as usize];
        let mut at = 0;
        let extents: Vec<Placed> = model
            .manifest
            .extents(entry)
            .iter()
            .map(|extent| {
                let sole = is_sole(model, file);
                let file_range = at..at + extent.len;
                at = file_range.end;
                Placed {
                    file_range,
                    object: cache.object(model, extent.object, sole),
                    object_offset: extent.object_offset,
                }
            })
            .collect();
        let head = match &extents[..] {
            [only] if entry.size >= TENSORS_FILE_BYTES_MIN => {
                Head::Wanted(only.object.layout().chunk_len().min(entry.size))
            }
            _ => Head::Done,
        };
        OpenFile {
            model: model.clone(),
            file,
            size: entry.size,
            extents,
            streams: Mutex::new(Streams::default()),
            head: Mutex::new(head),
            tensors: OnceLock::new(),
        }
    }

    /// Where the file's head ends and its tensors begin, once that is known.
    pub fn data_start(&self) -> Option<u64> {
        self.tensors.get().map(|tensors| tensors.map.data_start())
    }

    /// The object whose memory is this file and nothing else, if there is one: what passthrough may hand out.
    pub fn sole_object(&self) -> Option<&Arc<CachedObject>> {
        match self.extents.as_slice() {
            [only] if only.object.is_hot_capable() => Some(&only.object),
            _ => None,
        }
    }

    /// The pieces of `range` (plain bytes of the file), each within one chunk, in order.
    fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece<'_>> {
        let first = self.extents.partition_point(|placed| placed.file_range.end <= range.start);
        self.extents[first..]
            .iter()
            .take_while({
                let end = range.end;
                move |placed| placed.file_range.start < end
            })
            .flat_map(move |placed| {
                let start = range.start.max(placed.file_range.start) - placed.file_range.start + placed.object_offset;
                let end = range.end.min(placed.file_range.end) - placed.file_range.start + placed.object_offset;
                let layout = placed.object.layout();
                let (first, last) = (layout.chunk_at(start), layout.chunk_at(end - 1));
                (first.0..=last.0).map(move |index| {
                    let chunk = layout.chunk_plain(ChunkIndex(index));
                    Piece {
                        object: &placed.object,
                        index: ChunkIndex(index),
                        range: start.max(chunk.start)..end.min(chunk.end),
                    }
                })
            })
    }

    /// The one extent that holds all of `range`, with the range in its object.
    fn in_one_object(&self, range: &Range<u64>) -> Option<(&Arc<CachedObject>, Range<u64>)> {
        let at = self.extents.partition_point(|placed| placed.file_range.end <= range.start);
        let placed = self.extents.get(at)?;
        let shift = |offset: u64| offset - placed.file_range.start + placed.object_offset;
        (range.end <= placed.file_range.end).then(|| (&placed.object, shift(range.start)..shift(range.end)))
    }
}

/// Whether `file` is one extent that covers its object from the first byte to the last.
pub fn is_sole(model: &Model, file: u32) -> bool {
    let entry = &model.manifest.files()[file as usize];
    let extents = model.manifest.extents(entry);
    match extents {
        [only] => {
            let plain_len = model.manifest.objects()[only.object as usize].layout.plain_len();
            only.object_offset == 0 && only.len == plain_len
        }
        _ => false,
    }
}

struct Piece<'a> {
    object: &'a Arc<CachedObject>,
    index: ChunkIndex,
    /// Plain bytes of the object, within chunk `index`.
    range: Range<u64>,
}

/// The bytes that were asked for.
pub enum Answer<'a> {
    /// At or past the end of the file, or nothing asked.
    Empty,
    /// Borrowed from the cache.
    Pinned(PinnedRun),
    /// Gathered from chunks that were never resident together.
    Gathered(GatherGuard<'a>),
}

impl Answer<'_> {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Answer::Empty => &[],
            Answer::Pinned(run) => run.bytes(),
            Answer::Gathered(guard) => &guard.buffer()[..guard.len],
        }
    }
}

/// A locked buffer on loan, wiped before the next reader gets it.
pub struct GatherGuard<'a> {
    buffer: Option<LockedBuf>,
    len: usize,
    pool: &'a Mutex<Vec<LockedBuf>>,
    _permit: SemaphorePermit<'a>,
}

impl GatherGuard<'_> {
    fn buffer(&self) -> &LockedBuf {
        self.buffer.as_ref().expect("the buffer is there until the guard is dropped")
    }

    fn append(&mut self, bytes: &[u8]) {
        let buffer = self.buffer.as_mut().expect("the buffer is there until the guard is dropped");
        buffer[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

impl Drop for GatherGuard<'_> {
    fn drop(&mut self) {
        let mut buffer = self.buffer.take().expect("the buffer is there until the guard is dropped");
        zeroize::Zeroize::zeroize(&mut buffer[..self.len]);
        self.pool.lock().expect("a thread died holding the gather buffers").push(buffer);
    }
}

/// Locked memory in which reads are put together that no single chunk answers. One a process: mounts share it.
pub struct GatherBuffers {
    permits: Semaphore,
    buffers: Mutex<Vec<LockedBuf>>,
}

impl GatherBuffers {
    /// # Errors
    /// `MEMLOCK` if they cannot be locked.
    pub fn new() -> Result<Arc<GatherBuffers>> {
        let buffers = (0..GATHER_BUFFERS).map(|_| LockedBuf::new(READ_MAX)).collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(GatherBuffers { permits: Semaphore::new(GATHER_BUFFERS), buffers: Mutex::new(buffers) }))
    }
}

/// Answers reads of every open file of a mount.
pub struct Reader {
    cache: Cache,
    /// The longest any read waits.
    deadline: Duration,
    gather: Arc<GatherBuffers>,
    recorder: OnceLock<Arc<Recorder>>,
    /// Files (model number, file) that an earlier load read from end to end.
    expected_whole: OnceLock<HashSet<(u32, u32)>>,
}

impl Reader {
    /// # Errors
    /// `MEMLOCK` if the gather buffers cannot be locked.
    pub fn new(cache: Cache, deadline: Duration) -> Result<Self> {
        Ok(Reader::sharing(cache, deadline, GatherBuffers::new()?))
    }

    /// The same with buffers that other mounts use too.
    pub fn sharing(cache: Cache, deadline: Duration, gather: Arc<GatherBuffers>) -> Self {
        Reader { cache, deadline, gather, recorder: OnceLock::new(), expected_whole: OnceLock::new() }
    }

    /// From now on first touches are written down. Called at most once.
    pub fn set_recorder(&self, recorder: Arc<Recorder>) {
        assert!(self.recorder.set(recorder).is_ok(), "one recorder a reader");
    }

    /// Which files (model number, file) an earlier load read from end to end. Called at most once.
    pub fn set_expected_whole(&self, files: HashSet<(u32, u32)>) {
        assert!(self.expected_whole.set(files).is_ok(), "told once");
    }

    /// Whether an earlier load read this file from end to end.
    pub fn is_expected_whole(&self, model: u32, file: u32) -> bool {
        self.expected_whole.get().is_some_and(|files| files.contains(&(model, file)))
    }

    /// A program opened the file past the daemon, or an open waits for all of it: its reads will not be seen.
    pub fn note_whole(&self, model: &Model, file: u32) {
        if let Some(recorder) = self.recorder.get() {
            recorder.touch(model.serial, file, 0..model.manifest.files()[file as usize].size);
        }
    }

    /// Fetches `ranges` (file, plain bytes of it) of `model` in their order, ahead of any reader: at most `bytes_max` of
    /// locked memory, giving way to readers, passing over what is there or cannot be had. Returns the bytes asked for.
    ///
    /// # Cancel safety
    /// Dropping the future leaves at most [`REPLAY_WIDTH`] fetches running.
    pub async fn replay(&self, model: &Arc<Model>, ranges: Vec<(u32, Range<u64>)>, bytes_max: u64) -> u64 {
        use futures::stream::{self, StreamExt};
        let mut asked = 0;
        let mut chunks: Vec<(Arc<CachedObject>, ChunkIndex)> = Vec::new();
        let mut seen = HashSet::new();
        'ranges: for (file, range) in ranges {
            for piece in OpenFile::new(&self.cache, model, file).pieces(range) {
                if !seen.insert((piece.object.key, piece.index)) {
                    continue;
                }
                let chunk = piece.object.layout().chunk_plain(piece.index);
                asked += chunk.end - chunk.start;
                if asked > bytes_max {
                    asked -= chunk.end - chunk.start;
                    break 'ranges;
                }
                chunks.push((piece.object.clone(), piece.index));
            }
        }
        stream::iter(chunks)
            .map(|(object, index)| async move { self.cache.prefetch(&object, index).await })
            .buffered(REPLAY_WIDTH.min(self.cache.prefetches_max()))
            .for_each(|()| std::future::ready(()))
            .await;
        asked
    }

    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// What of the file a read of `len` bytes at `offset` means, by POSIX: cut at the end, empty past it.
    fn clip(file: &OpenFile, offset: u64, len: usize) -> Range<u64> {
        let len = len.min(READ_MAX) as u64;
        let start = offset.min(file.size);
        start..offset.saturating_add(len).min(file.size).max(start)
    }

    /// The answer if every byte is resident, in no more time than a look-up takes.
    pub fn try_read(&self, file: &OpenFile, offset: u64, len: usize) -> Option<Answer<'static>> {
        let range = Self::clip(file, offset, len);
        if range.is_empty() {
            return Some(Answer::Empty);
        }
        let (object, in_object) = file.in_one_object(&range)?;
        let run = self.cache.try_pin_run(object, in_object)?;
        self.cache.telemetry().cache_hits.inc();
        self.foresee(file, range);
        Some(Answer::Pinned(run))
    }

    /// The answer, fetching what is missing.
    ///
    /// # Errors
    /// What the cache says of a chunk, or `DEADLINE`.
    ///
    /// # Cancel safety
    /// Dropping the future drops its pins; fetches go on for others.
    pub async fn read(&self, file: &OpenFile, offset: u64, len: usize) -> Result<Answer<'_>> {
        if let Some(answer) = self.try_read(file, offset, len) {
            return Ok(answer);
        }
        self.cache.telemetry().cache_misses.inc();
        let range = Self::clip(file, offset, len);
        match tokio::time::timeout(self.deadline, self.wait_and_read(file, range.clone())).await {
            Ok(answer) => answer,
            Err(_) => {
                self.cache.telemetry().deadline_errors.inc();
                Err(Error::new(
                    Code::Deadline,
                    format!(
                        "no answer within {} s for bytes {}..{} of {}",
                        self.deadline.as_secs_f64(),
                        range.start,
                        range.end,
                        file.model.manifest.path(&file.model.manifest.files()[file.file as usize]),
                    ),
                ))
            }
        }
    }

    async fn wait_and_read(&self, file: &OpenFile, range: Range<u64>) -> Result<Answer<'_>> {
        for piece in file.pieces(range.clone()) {
            self.cache.start(piece.object, piece.index, Urgency::Demand);
        }
        self.foresee(file, range.clone());
        for piece in file.pieces(range.clone()) {
            drop(self.cache.pin(piece.object, piece.index).await?);
        }
        // Now all are usually here together, and nothing needs copying.
        if let Some((object, in_object)) = file.in_one_object(&range)
            && let Some(run) = self.cache.try_pin_run(object, in_object)
        {
            return Ok(Answer::Pinned(run));
        }
        // A cache too small or too busy to keep them together, or a range over two objects. Each piece is copied at once
        // and its pin let go before the next wait: a pin held while waiting for room could wait for itself.
        let mut guard = self.gather().await;
        for piece in file.pieces(range.clone()) {
            let pin = self.cache.pin(piece.object, piece.index).await?;
            guard.append(pin.bytes(piece.range.clone()));
        }
        assert!(guard.len as u64 == range.end - range.start, "{} {range:?}", guard.len);
        Ok(Answer::Gathered(guard))
    }

    async fn gather(&self) -> GatherGuard<'_> {
        let permit = self.gather.permits.acquire().await.expect("the semaphore is never closed");
        let mut buffers = self.gather.buffers.lock().expect("a thread died holding the gather buffers");
        let buffer = buffers.pop().expect("as many buffers as permits");
        GatherGuard { buffer: Some(buffer), len: 0, pool: &self.gather.buffers, _permit: permit }
    }

    /// Tells the prefetcher of a read and starts what it asks for.
    fn foresee(&self, file: &OpenFile, range: Range<u64>) {
        if let Some(recorder) = self.recorder.get() {
            recorder.touch(file.model.serial, file.file, range.clone());
        }
        let budget = self.cache.budget().total();
        let of_tensor = self.tensors(file).and_then(|tensors| {
            let mut reads = tensors.reads.lock().expect("a thread died holding the tensors of a file");
            reads.on_read(&range, &tensors.map, budget)
        });
        let of_stream = {
            let mut streams = file.streams.lock().expect("a thread died holding the streams of a file");
            streams.on_read(range, file.size, budget)
        };
        for ahead in of_tensor.into_iter().chain(of_stream) {
            for piece in file.pieces(ahead) {
                self.cache.start(piece.object, piece.index, Urgency::Prefetch);
            }
        }
    }

    /// The file's tensors, if it is of a format that tells and its head has passed through the cache.
    fn tensors<'a>(&self, file: &'a OpenFile) -> Option<&'a Tensors> {
        if let Some(tensors) = file.tensors.get() {
            return Some(tensors);
        }
        let mut head = file.head.lock().expect("a thread died holding the head of a file");
        let Head::Wanted(wanted) = *head else { return None };
        let (object, in_object) = file.in_one_object(&(0..wanted))?;
        let run = self.cache.try_pin_run(object, in_object)?;
        match TensorMap::head_len_wanted(run.bytes(), file.size) {
            Some(more) if more > wanted && more <= HEAD_LOOK_BYTES_MAX => *head = Head::Wanted(more),
            _ => {
                *head = Head::Done;
                if let Some(map) = TensorMap::parse(run.bytes(), file.size) {
                    let _ = file.tensors.set(Tensors { map, reads: Mutex::default() });
                }
            }
        }
        file.tensors.get()
    }
}
