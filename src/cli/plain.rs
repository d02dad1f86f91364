//! A run of files as verified plaintext, in order and in bounded memory: what `cat` prints and `verify` hashes.
//!
//! Several chunks are fetched and opened at once; their order is kept. A chunk that files share is opened once.

use std::ops::Range;
use std::sync::Arc;

use futures::stream::{self, StreamExt};

use super::access::Opened;
use crate::crypto::{Verify, open_chunk, scratch_len};
use crate::error::{Code, Error, Result};
use crate::format::{ChunkIndex, Manifest};
use crate::mem::LockedBuf;
use crate::store::{ChunkSource, CipherChunk, fetch_chunk};

/// One chunk and what of it belongs to which file.
#[derive(Debug, PartialEq, Eq)]
pub struct ChunkJob {
    pub object: u32,
    pub index: ChunkIndex,
    /// Number of the file, and bytes within the chunk's plaintext.
    pub parts: Vec<(usize, Range<usize>)>,
}

/// The chunks of `files` in the order of their bytes. Pure.
pub fn jobs(manifest: &Manifest, files: &[usize]) -> Vec<ChunkJob> {
    let mut jobs: Vec<ChunkJob> = Vec::new();
    for number in files {
        for extent in manifest.extents(&manifest.files()[*number]) {
            let layout = &manifest.objects()[extent.object as usize].layout;
            let end = extent.object_offset + extent.len;
            let mut at = extent.object_offset;
            while at < end {
                let index = layout.chunk_at(at);
                let chunk = layout.chunk_plain(index);
                let stop = end.min(chunk.end);
                let part = (at - chunk.start) as usize..(stop - chunk.start) as usize;
                match jobs.last_mut() {
                    Some(last) if (last.object, last.index) == (extent.object, index) => {
                        last.parts.push((*number, part))
                    }
                    _ => jobs.push(ChunkJob { object: extent.object, index, parts: vec![(*number, part)] }),
                }
                at = stop;
            }
        }
    }
    jobs
}

/// The plaintext of one chunk; wiped when dropped.
pub enum Slot {
    Locked(LockedBuf),
    /// Where the limit of locked memory is too small for one chunk.
    Ordinary(zeroize::Zeroizing<Vec<u8>>),
}

impl Slot {
    fn new(len: usize) -> Result<Slot> {
        static TOLD: std::sync::Once = std::sync::Once::new();
        match LockedBuf::new(len) {
            Ok(buf) => Ok(Slot::Locked(buf)),
            Err(e) if e.code() == Code::Memlock => {
                TOLD.call_once(|| tracing::warn!("plaintext passes through unlocked memory: {}", e.chain()));
                Ok(Slot::Ordinary(zeroize::Zeroizing::new(vec![0; len])))
            }
            Err(e) => Err(e),
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Slot::Locked(buf) => buf,
            Slot::Ordinary(buf) => buf,
        }
    }
}

impl std::ops::Deref for Slot {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Slot::Locked(buf) => buf,
            Slot::Ordinary(buf) => buf,
        }
    }
}

/// Fetches and opens one chunk, strictly; a wrong hash or length is asked for once more.
pub async fn open_one(source: &dyn ChunkSource, opened: &Opened, object: u32, index: ChunkIndex) -> Result<Slot> {
    match open_once(source, opened, object, index).await {
        Err(e) if matches!(e.code(), Code::ChunkHash | Code::Length) => open_once(source, opened, object, index).await,
        done => done,
    }
}

async fn open_once(source: &dyn ChunkSource, opened: &Opened, object: u32, index: ChunkIndex) -> Result<Slot> {
    let chunk = fetch_chunk(source, &opened.manifest, object, index).await?;
    let opened = opened.clone();
    run_blocking(move || open_here(&opened, object, &chunk)).await
}

fn open_here(opened: &Opened, object: u32, chunk: &CipherChunk) -> Result<Slot> {
    let entry = &opened.manifest.objects()[object as usize];
    let len = entry.layout.chunk_plain_len(chunk.index);
    let mut slot = Slot::new(usize::try_from(len).expect("a chunk is at most 64 MiB"))?;
    let mut scratch = Slot::new(scratch_len(entry))?;
    let (keys, manifest) = (&opened.keys, &opened.manifest);
    open_chunk(keys, manifest, object, chunk, Verify::Strict, slot.bytes_mut(), scratch.bytes_mut())?;
    Ok(slot)
}

pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(e) => Err(Error::new(Code::Stopping, "the work was cancelled").with_source(e)),
    }
}

/// Gives every job and its opened chunk, or why not, to `take`, in order, with at most `depth` chunks in memory.
/// `take` says whether to go on.
pub async fn each_chunk(
    source: Arc<dyn ChunkSource>,
    opened: &Opened,
    jobs: Vec<ChunkJob>,
    depth: usize,
    mut take: impl FnMut(ChunkJob, Result<Slot>) -> Result<()>,
) -> Result<()> {
    let mut slots = stream::iter(jobs)
        .map(|job| {
            let (source, opened) = (Arc::clone(&source), opened.clone());
            async move {
                let slot = open_one(&*source, &opened, job.object, job.index).await;
                (job, slot)
            }
        })
        .buffered(depth);
    while let Some((job, slot)) = slots.next().await {
        // Hashing and writing block: the runtime moves its other work to another thread meanwhile.
        tokio::task::block_in_place(|| take(job, slot))?;
    }
    Ok(())
}
