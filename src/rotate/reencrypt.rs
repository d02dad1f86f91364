//! Every object of a version encrypted anew: fetched, opened, checked, sealed under fresh keys, written; in bounded memory.
//!
//! In: an opened version. Out: new objects of the same number, layout and cipher, under names that nobody used.
//! Promises: a chunk is opened only as a reader opens it, strictly; every file's bytes hash to its signed SHA-256, or
//! nothing is published; plaintext lies in locked memory (its coded form, like a sealer's, in memory that is wiped); at
//! most [`Reencryption::threads`] chunks are being opened and as many sealed at a time.
//! Held by: the tests below, tests/rotate.rs.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::{self, StreamExt};
use tokio::task::JoinHandle;
use zeroize::Zeroizing;

use super::rekey::Opened;
use crate::crypto::{Dek, FileHasher, ObjectSealer, Verify, open_chunk, scratch_len};
use crate::error::{Class, Code, Error, Result};
use crate::format::{ChunkIndex, Manifest, NewObject, Oid, Vid, names};
use crate::mem::LockedBuf;
use crate::refuse;
use crate::seal::{Coding, Meter, Phase, ProgressFn, blocking, random};
use crate::store::{ChunkSink, ObjectWriter, fetch_chunk};

pub(super) struct Reencryption {
    pub store: Arc<dyn ChunkSink>,
    pub old: Arc<Opened>,
    pub dek: Arc<Dek>,
    pub vid: Vid,
    pub threads: usize,
}

impl Reencryption {
    /// The new objects, in the order of the old ones.
    pub async fn run(&self, progress: &ProgressFn) -> Result<Vec<NewObject>> {
        let manifest = &self.old.manifest;
        let total = manifest.objects().iter().map(|object| object.layout.plain_len()).sum();
        let meter = Meter::start(progress, Phase::Seal, total);
        let mut checks = FileChecks::new(manifest);
        let mut objects = Vec::with_capacity(manifest.objects().len());
        for number in 0..manifest.objects().len() {
            let number = u32::try_from(number).expect("at most 1,000,000 objects");
            let object;
            (object, checks) = self.object(number, checks, &meter).await?;
            objects.push(object);
        }
        for file in checks.finish(manifest)? {
            self.check_apart(file).await?;
        }
        Ok(objects)
    }

    async fn object(&self, number: u32, checks: FileChecks, meter: &Meter) -> Result<(NewObject, FileChecks)> {
        let manifest = &self.old.manifest;
        let entry = &manifest.objects()[number as usize];
        let oid = Oid(random()?);
        let new_sealer = if entry.is_coded() { ObjectSealer::coded } else { ObjectSealer::new };
        let sealer = new_sealer(&self.dek, entry.suite, entry.layout, manifest.header().hash_alg, oid, self.vid);
        let sealer = Arc::new(sealer);
        let name = names::data(manifest.header().model_id, oid);
        let mut writer = self.store.begin(&name, entry.layout.stored_len()).await?;
        let written = match self.chunks(number, &sealer, &mut *writer, checks, meter).await {
            Ok(written) => written,
            Err(failed) => {
                writer.abort().await;
                return Err(failed);
            }
        };
        let object = NewObject {
            oid,
            layout: entry.layout,
            suite: entry.suite,
            inherited: false,
            origin_vid: self.vid,
            commit: sealer.commit(),
            hashes: written.hashes,
            coded: entry.is_coded().then_some(written.lens),
        };
        let stored_len = object.stored_len()?;
        match writer.finish(stored_len).await {
            // Its name is known to nobody else, so what is there with its length is it.
            Err(lost) if lost.class() == Class::Unreachable => match self.store.size(&name).await {
                Ok(size) if size == stored_len => {}
                _ => return Err(lost),
            },
            other => other?,
        }
        Ok((object, written.checks))
    }

    async fn chunks(
        &self,
        number: u32,
        sealer: &Arc<ObjectSealer>,
        writer: &mut dyn ObjectWriter,
        mut checks: FileChecks,
        meter: &Meter,
    ) -> Result<Written> {
        let entry = &self.old.manifest.objects()[number as usize];
        writer.write(Bytes::copy_from_slice(&sealer.header())).await?;
        let mut opened = stream::iter(entry.layout.chunks())
            .map(|index| async move { self.open(number, index).await.map(|plain| (index, plain)) })
            .buffered(self.threads);
        let mut sealing: VecDeque<JoinHandle<SealedChunk>> = VecDeque::new();
        let (mut hashes, mut lens) = (Vec::new(), Vec::new());
        loop {
            let next = opened.next().await.transpose()?;
            let last = next.is_none();
            if let Some((index, plain)) = next {
                let range = entry.layout.chunk_plain(index);
                let plain_len = plain.len() as u64;
                let plain_after;
                (checks, plain_after) = blocking(move || {
                    checks.take(number, range, &plain);
                    Ok((checks, plain))
                })
                .await?;
                let (sealer, coded) = (Arc::clone(sealer), entry.is_coded());
                sealing.push_back(tokio::task::spawn_blocking(move || seal(&sealer, index, plain_after, coded)));
                meter.add(plain_len);
            }
            while sealing.len() >= self.threads || (last && !sealing.is_empty()) {
                let done = sealing.pop_front().expect("not empty");
                let chunk =
                    done.await.map_err(|e| Error::new(Code::Host, "a sealing thread stopped").with_source(e))?;
                lens.push(u32::try_from(chunk.ciphertext.len()).expect("a chunk is at most 64 MiB"));
                writer.write(chunk.ciphertext).await?;
                writer.write(Bytes::from(chunk.tags)).await?;
                hashes.push(chunk.hash);
            }
            if last {
                return Ok(Written { hashes, lens, checks });
            }
        }
    }

    /// The plaintext of a chunk of the old version; a wrong hash or length is asked for once more.
    async fn open(&self, object: u32, index: ChunkIndex) -> Result<LockedBuf> {
        match self.open_once(object, index).await {
            Err(bad) if matches!(bad.code(), Code::ChunkHash | Code::Length) => self.open_once(object, index).await,
            done => done,
        }
    }

    async fn open_once(&self, object: u32, index: ChunkIndex) -> Result<LockedBuf> {
        let chunk = fetch_chunk(&*self.store, &self.old.manifest, object, index).await?;
        let old = Arc::clone(&self.old);
        blocking(move || {
            let entry = &old.manifest.objects()[object as usize];
            let len = usize::try_from(entry.layout.chunk_plain_len(index)).expect("a chunk is at most 64 MiB");
            let mut plain = LockedBuf::new(len)?;
            let mut scratch = LockedBuf::new(scratch_len(entry))?;
            open_chunk(&old.keys, &old.manifest, object, &chunk, Verify::Strict, &mut plain, &mut scratch)?;
            Ok(plain)
        })
        .await
    }

    /// A file whose extents do not come in the order of the objects: read once more, in its own order.
    async fn check_apart(&self, file: usize) -> Result<()> {
        let manifest = &self.old.manifest;
        let entry = &manifest.files()[file];
        let mut hasher = FileHasher::new();
        for extent in manifest.extents(entry) {
            let layout = &manifest.objects()[extent.object as usize].layout;
            let (mut at, end) = (extent.object_offset, extent.object_offset + extent.len);
            while at < end {
                let index = layout.chunk_at(at);
                let chunk = layout.chunk_plain(index);
                let stop = end.min(chunk.end);
                let plain = self.open(extent.object, index).await?;
                hasher.update(&plain[within(&chunk, at..stop)]);
                at = stop;
            }
        }
        check_digest(manifest, file, hasher)
    }
}

/// What came of the chunks of one object.
struct Written {
    hashes: Vec<[u8; 32]>,
    /// Bytes encrypted of each chunk.
    lens: Vec<u32>,
    checks: FileChecks,
}

struct SealedChunk {
    ciphertext: Bytes,
    tags: Vec<u8>,
    hash: [u8; 32],
}

fn seal(sealer: &ObjectSealer, index: ChunkIndex, mut plain: LockedBuf, coded: bool) -> SealedChunk {
    let mut tags = Vec::new();
    if coded {
        // Never longer than what it is made of, so it does not move and leave a copy behind.
        let mut stream = Zeroizing::new(Vec::with_capacity(2 * plain.len()));
        if Coding::by_samples().code(sealer.layout().chunk_plain(index).start, &plain, &mut stream) {
            let hash = sealer.seal_chunk(index, &mut stream, &mut tags);
            // Encrypted in place: what leaves the wiping wrapper is ciphertext.
            return SealedChunk { ciphertext: Bytes::from(std::mem::take(&mut *stream)), tags, hash };
        }
    }
    let hash = sealer.seal_chunk(index, &mut plain, &mut tags);
    SealedChunk { ciphertext: Bytes::from_owner(plain), tags, hash }
}

/// `range` as places in the buffer that holds `chunk`.
fn within(chunk: &Range<u64>, range: Range<u64>) -> Range<usize> {
    let place = |at: u64| usize::try_from(at - chunk.start).expect("a chunk is at most 64 MiB");
    place(range.start)..place(range.end)
}

fn check_digest(manifest: &Manifest, file: usize, hasher: FileHasher) -> Result<()> {
    let entry = &manifest.files()[file];
    if hasher.finish() != entry.sha256 {
        refuse!(
            FileHash,
            "file {} does not have its signed SHA-256; nothing was published, restore it first",
            manifest.path(entry)
        );
    }
    Ok(())
}

/// Hashes files while the chunks of objects pass by in order.
struct FileChecks {
    /// By object: its parts of files.
    parts: Vec<Vec<Part>>,
    files: Vec<FileCheck>,
}

/// A run of a file within an object.
#[derive(Clone, Copy)]
struct Part {
    start: u64,
    end: u64,
    file: usize,
    /// Which extent of the file it is.
    ordinal: usize,
}

struct FileCheck {
    hasher: FileHasher,
    /// The extent whose bytes come next, and how many of them came.
    next: usize,
    came: u64,
    /// Its bytes pass by in another order than its own.
    apart: bool,
}

impl FileChecks {
    fn new(manifest: &Manifest) -> FileChecks {
        let mut parts: Vec<Vec<Part>> = vec![Vec::new(); manifest.objects().len()];
        for (file, entry) in manifest.files().iter().enumerate() {
            for (ordinal, extent) in manifest.extents(entry).iter().enumerate() {
                let (start, end) = (extent.object_offset, extent.object_offset + extent.len);
                parts[extent.object as usize].push(Part { start, end, file, ordinal });
            }
        }
        parts.iter_mut().for_each(|parts| parts.sort_by_key(|part| (part.start, part.file, part.ordinal)));
        let check = |_| FileCheck { hasher: FileHasher::new(), next: 0, came: 0, apart: false };
        FileChecks { parts, files: manifest.files().iter().map(check).collect() }
    }

    /// `bytes` are the plain bytes `range` of an object.
    fn take(&mut self, object: u32, range: Range<u64>, bytes: &[u8]) {
        let parts = &self.parts[object as usize];
        for part in parts.iter().take_while(|part| part.start < range.end).filter(|part| part.end > range.start) {
            let check = &mut self.files[part.file];
            let run = part.start.max(range.start)..part.end.min(range.end);
            check.apart |= check.next != part.ordinal || check.came != run.start - part.start;
            if check.apart {
                continue;
            }
            check.hasher.update(&bytes[within(&range, run.clone())]);
            check.came += run.end - run.start;
            if run.end == part.end {
                (check.next, check.came) = (check.next + 1, 0);
            }
        }
    }

    /// The files that must be looked at apart.
    ///
    /// # Errors
    /// `FILE_HASH`.
    fn finish(self, manifest: &Manifest) -> Result<Vec<usize>> {
        let mut apart = Vec::new();
        for (file, check) in self.files.into_iter().enumerate() {
            let whole = check.next == manifest.extents(&manifest.files()[file]).len();
            if check.apart || !whole {
                apart.push(file);
            } else {
                check_digest(manifest, file, check.hasher)?;
            }
        }
        Ok(apart)
    }
}
