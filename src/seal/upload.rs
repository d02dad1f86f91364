//! From plaintext files to stored objects: read, hashed, encrypted and written in one pass, several chunks at a time.
//!
//! ```text
//!  read + SHA-256 of the file, in order ──> code, encrypt, chunk hash, in parallel ──> write, in order   (one object)
//! ```
//! In: a plan. Out: what the manifest says of the new objects, and the SHA-256 of every file read.
//! Promises: the bytes that are hashed are the bytes that are encrypted (as they are, or coded), one buffer holds both; at most
//! [`Pipeline::chunks_in_flight`] chunks are under way, in two buffers each, whatever the size of the model; a buffer that
//! still holds plaintext is wiped when it is dropped; a chunk is encrypted once, and only its ciphertext is sent again.
//! Held by: the tests of `seal`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use zeroize::{Zeroize, Zeroizing};

use super::coding::{CodecChoice, Coding};
use super::plan::{Job, ObjectPlan};
use super::progress::Meter;
use super::source::{SourceFile, SourceTree, StableFile};
use super::{blocking, random};
use crate::crypto::{Dek, FileHasher, ObjectSealer};
use crate::error::{Class, Code, Error, Result};
use crate::format::{ChunkIndex, HashAlg, ModelId, NewObject, ObjectLayout, Oid, Suite, Vid, names};
use crate::oms::ShardHasher;
use crate::refuse;
use crate::store::{ChunkSink, ObjectWriter};

/// Objects under way at once: enough to keep a link busy with small ones, few enough to bound what is open.
const OBJECTS_IN_FLIGHT: usize = 4;

/// Buffer for reading a file that is only hashed.
const HASH_BUFFER_BYTES: usize = 1 << 20;

pub struct Pipeline {
    pub tree: Arc<SourceTree>,
    pub files: Arc<Vec<SourceFile>>,
    pub store: Arc<dyn ChunkSink>,
    pub model_id: ModelId,
    pub vid: Vid,
    pub dek: Arc<Dek>,
    pub suite: Suite,
    pub hash_alg: HashAlg,
    pub block_log2: u8,
    pub chunk_log2: u8,
    pub codec: CodecChoice,
    pub threads: usize,
}

/// What a job left behind.
#[derive(Debug)]
pub struct JobDone {
    pub objects: Vec<NewObject>,
    /// Index of a file, SHA-256 of its bytes.
    pub digests: Vec<(usize, [u8; 32])>,
}

impl Pipeline {
    /// Chunk buffers at most: one being read and one being encrypted for each thread, and some on their way out.
    fn chunks_in_flight(&self) -> usize {
        2 * self.threads + OBJECTS_IN_FLIGHT
    }

    /// Makes all objects; results in the order of `jobs`.
    ///
    /// # Errors
    /// `SOURCE`, `SOURCE_CHANGED`, or what the store says. Objects already finished stay behind as orphans.
    pub async fn run(self: &Arc<Self>, jobs: Vec<Job>, meter: &Arc<Meter>) -> Result<Vec<JobDone>> {
        let permits = Arc::new(Semaphore::new(self.chunks_in_flight()));
        let buffers = Arc::new(Buffers::default());
        let room = Room { permits, buffers, failed: Arc::default() };
        let jobs = jobs.into_iter().map(|job| {
            let (pipeline, room, meter) = (Arc::clone(self), room.clone(), Arc::clone(meter));
            async move {
                let done = pipeline.run_job(job, &room, &meter).await;
                room.failed.fetch_or(done.is_err(), Ordering::Relaxed);
                done
            }
        });
        // To the end, even after a failure: the other objects then give up by themselves, and abort what the store holds.
        let done: Vec<Result<JobDone>> = stream::iter(jobs).buffered(OBJECTS_IN_FLIGHT).collect().await;
        if done.iter().all(Result::is_ok) {
            return done.into_iter().collect();
        }
        let mut refusals: Vec<Error> = done.into_iter().filter_map(Result::err).collect();
        let cause = refusals.iter().position(|refused| refused.code() != Code::Stopping).unwrap_or(0);
        Err(refusals.swap_remove(cause))
    }

    async fn run_job(&self, job: Job, room: &Room, meter: &Meter) -> Result<JobDone> {
        let mut reader = Reader::new(Arc::clone(&self.tree), Arc::clone(&self.files));
        let mut objects = Vec::with_capacity(job.objects.len());
        for plan in job.objects {
            let made;
            (made, reader) = self.make_object(Arc::new(plan), reader, room, meter).await?;
            objects.push(made);
        }
        Ok(JobDone { objects, digests: reader.digests })
    }

    async fn make_object(
        &self,
        plan: Arc<ObjectPlan>,
        reader: Reader,
        room: &Room,
        meter: &Meter,
    ) -> Result<(NewObject, Reader)> {
        room.check()?;
        let layout = ObjectLayout::new(plan.plain_len, self.block_log2, self.chunk_log2)?;
        let coding = self.coding(&plan).await?;
        let coded = coding.is_some();
        let oid = Oid(random()?);
        let new_sealer = if coded { ObjectSealer::coded } else { ObjectSealer::new };
        let sealer = new_sealer(&self.dek, self.suite, layout, self.hash_alg, oid, self.vid);
        let sealer = Arc::new(Sealer { sealer, coding });
        let name = names::data(self.model_id, oid);
        let mut writer = self.store.begin(&name, layout.stored_len()).await?;

        // Short: what waits here holds a buffer.
        let (ready, mut in_order) = mpsc::channel(self.threads + 1);
        let produce = produce(plan, reader, Arc::clone(&sealer), layout, ready, room);
        let consume = async {
            writer.write(Bytes::copy_from_slice(&sealer.sealer.header())).await?;
            let mut hashes = Vec::with_capacity(usize::try_from(layout.chunk_count()).unwrap_or(0));
            let mut sealed_lens = Vec::new();
            for index in layout.chunks() {
                let Some(sealing) = in_order.recv().await else { break };
                let chunk: SealedChunk = joined(sealing).await?;
                sealed_lens.push(u32::try_from(chunk.ciphertext.len()).expect("a chunk is at most 64 MiB"));
                writer.write(chunk.ciphertext).await?;
                writer.write(Bytes::from(chunk.tags)).await?;
                hashes.push(chunk.hash);
                meter.add(layout.chunk_plain_len(index));
            }
            Ok((hashes, sealed_lens))
        };
        let (reader, (hashes, sealed_lens)) = match futures::try_join!(produce, consume) {
            Ok(done) => done,
            Err(failed) => {
                writer.abort().await;
                return Err(failed);
            }
        };
        let object = NewObject {
            oid,
            layout,
            suite: self.suite,
            inherited: false,
            origin_vid: self.vid,
            commit: sealer.sealer.commit(),
            hashes,
            coded: coded.then_some(sealed_lens),
        };
        self.finish(writer, &name, object.stored_len()?).await?;
        Ok((object, reader))
    }

    /// How the object's chunks are to be coded, if they are.
    async fn coding(&self, plan: &Arc<ObjectPlan>) -> Result<Option<Coding>> {
        if self.codec == CodecChoice::None {
            return Ok(None);
        }
        let (plan, tree, files) = (Arc::clone(plan), Arc::clone(&self.tree), Arc::clone(&self.files));
        blocking(move || Coding::choose(&plan, &tree, &files)).await
    }

    /// A lost answer is not a lost object: its name is known to nobody else, so what is there with its length is it.
    async fn finish(&self, writer: Box<dyn ObjectWriter>, name: &str, stored_len: u64) -> Result<()> {
        match writer.finish(stored_len).await {
            Err(lost) if lost.class() == Class::Unreachable => match self.store.size(name).await {
                Ok(size) if size == stored_len => Ok(()),
                _ => Err(lost),
            },
            other => other,
        }
    }

    /// The SHA-256 of files that are not sealed (yet), in any order.
    pub async fn hash_files(&self, files: Vec<usize>, meter: &Arc<Meter>) -> Result<Vec<(usize, [u8; 32])>> {
        let hashing = files.into_iter().map(|index| {
            let (tree, files, meter) = (Arc::clone(&self.tree), Arc::clone(&self.files), Arc::clone(meter));
            let hash = move || {
                let mut hasher = FileHasher::new();
                read_file(&tree, &files[index], |bytes| {
                    hasher.update(bytes);
                    meter.add(bytes.len() as u64);
                })?;
                Ok(hasher.finish())
            };
            async move { blocking(hash).await.map(|hash| (index, hash)) }
        });
        stream::iter(hashing).buffer_unordered(self.threads).try_collect().await
    }

    /// SHA-256 of a file and of its shards of `shard_bytes`.
    pub async fn hash_shards(&self, index: usize, shard_bytes: u64) -> Result<([u8; 32], Vec<[u8; 32]>)> {
        let (tree, files) = (Arc::clone(&self.tree), Arc::clone(&self.files));
        blocking(move || {
            let mut hasher = ShardHasher::new(shard_bytes);
            read_file(&tree, &files[index], |bytes| hasher.update(bytes))?;
            Ok(hasher.finish())
        })
        .await
    }
}

/// Gives every byte of the file to `take`, in order.
fn read_file(tree: &SourceTree, file: &SourceFile, mut take: impl FnMut(&[u8])) -> Result<()> {
    let opened = tree.open_file(file)?;
    let mut buffer = Zeroizing::new(vec![0u8; HASH_BUFFER_BYTES]);
    let mut offset = 0;
    while offset < file.size {
        let len = usize::try_from(file.size - offset).map_or(HASH_BUFFER_BYTES, |rest| rest.min(HASH_BUFFER_BYTES));
        opened.read_exact_at(file, &mut buffer[..len], offset)?;
        take(&buffer[..len]);
        offset += len as u64;
    }
    tree.check_read(file, &opened)
}

/// What all objects under way share.
#[derive(Clone)]
struct Room {
    permits: Arc<Semaphore>,
    buffers: Arc<Buffers>,
    /// Some object could not be made: the others need not be.
    failed: Arc<AtomicBool>,
}

impl Room {
    fn check(&self) -> Result<()> {
        if self.failed.load(Ordering::Relaxed) {
            refuse!(Stopping, "another object could not be made");
        }
        Ok(())
    }
}

type Sealing = tokio::task::JoinHandle<SealedChunk>;

/// Reads the chunks of an object in order and starts sealing each; gives the reader back for the next object.
async fn produce(
    plan: Arc<ObjectPlan>,
    mut reader: Reader,
    sealer: Arc<Sealer>,
    layout: ObjectLayout,
    ready: mpsc::Sender<Sealing>,
    room: &Room,
) -> Result<Reader> {
    for index in layout.chunks() {
        room.check()?;
        let permit = Arc::clone(&room.permits).acquire_owned().await.expect("nobody closes the semaphore");
        let plain_len = usize::try_from(layout.chunk_plain_len(index)).expect("a chunk is at most 64 MiB");
        let mut plain = room.buffers.take(plain_len);
        let (plan, range) = (Arc::clone(&plan), layout.chunk_plain(index));
        let chunk;
        (reader, chunk) = blocking(move || {
            reader.fill(&plan, range, &mut plain)?;
            Ok((reader, plain))
        })
        .await?;
        let (sealer, buffers) = (Arc::clone(&sealer), Arc::clone(&room.buffers));
        let sealing = tokio::task::spawn_blocking(move || seal_chunk(&sealer, index, chunk, buffers, permit));
        if ready.send(sealing).await.is_err() {
            // The writing side has failed and says why.
            std::future::pending::<()>().await;
        }
    }
    Ok(reader)
}

/// Seals the chunks of one object, coded where that wins.
struct Sealer {
    sealer: ObjectSealer,
    coding: Option<Coding>,
}

/// A chunk as it will be stored, on its way out.
struct SealedChunk {
    ciphertext: Bytes,
    tags: Vec<u8>,
    hash: [u8; 32],
    /// Room for another chunk, given back when the store has taken this one.
    _permit: OwnedSemaphorePermit,
}

fn seal_chunk(
    Sealer { sealer, coding }: &Sealer,
    index: ChunkIndex,
    mut chunk: Zeroizing<Vec<u8>>,
    buffers: Arc<Buffers>,
    permit: OwnedSemaphorePermit,
) -> SealedChunk {
    if let Some(coding) = coding {
        let mut coded = buffers.take(0);
        if coding.code(sealer.layout().chunk_plain(index).start, &chunk, &mut coded) {
            std::mem::swap(&mut chunk, &mut coded);
        }
        buffers.give_back(coded);
    }
    let mut tags = Vec::new();
    let hash = sealer.seal_chunk(index, &mut chunk, &mut tags);
    // Encrypted in place: what leaves the wiping wrapper is ciphertext.
    let bytes = std::mem::take(&mut *chunk);
    SealedChunk { ciphertext: Bytes::from_owner(Recycled { bytes, buffers }), tags, hash, _permit: permit }
}

/// Waits for a blocking task and passes its panic on as a failure of ours.
async fn joined<T>(task: tokio::task::JoinHandle<T>) -> Result<T> {
    task.await.map_err(|e| Error::new(Code::Host, "a sealing thread stopped").with_source(e))
}

/// Reads pieces of files in the order of a plan, hashing each file from its first byte to its last.
struct Reader {
    tree: Arc<SourceTree>,
    files: Arc<Vec<SourceFile>>,
    open: Option<(usize, StableFile, FileHasher)>,
    digests: Vec<(usize, [u8; 32])>,
}

impl Reader {
    fn new(tree: Arc<SourceTree>, files: Arc<Vec<SourceFile>>) -> Reader {
        Reader { tree, files, open: None, digests: Vec::new() }
    }

    /// Fills `room` with the plain bytes `range` of the object; what no file covers becomes zero.
    fn fill(&mut self, plan: &ObjectPlan, range: std::ops::Range<u64>, room: &mut [u8]) -> Result<()> {
        let mut written = 0;
        for (piece, place) in plan.cover(range) {
            room[written..place.start].fill(0);
            written = place.end;
            let file = &self.files[piece.file];
            if piece.file_offset == 0 {
                self.open = Some((piece.file, self.tree.open_file(file)?, FileHasher::new()));
            }
            let (index, opened, mut hasher) = self.open.take().expect("a plan starts each file at its first byte");
            assert!(index == piece.file, "piece of file {} while {index} is open", piece.file);
            let room = &mut room[place];
            opened.read_exact_at(file, room, piece.file_offset)?;
            hasher.update(room);
            if piece.file_offset + piece.len == file.size {
                self.tree.check_read(file, &opened)?;
                self.digests.push((index, hasher.finish()));
            } else {
                self.open = Some((index, opened, hasher));
            }
        }
        room[written..].fill(0);
        Ok(())
    }
}

/// Chunk buffers that were used before: a fresh 8 MiB costs two thousand page faults.
#[derive(Default)]
struct Buffers {
    free: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// A buffer of `len` bytes; what it holds is ciphertext of an earlier chunk, or zeros.
    fn take(&self, len: usize) -> Zeroizing<Vec<u8>> {
        let mut bytes = self.list().pop().unwrap_or_default();
        bytes.resize(len, 0);
        Zeroizing::new(bytes)
    }

    /// Takes back a buffer that may hold plaintext.
    fn give_back(&self, mut buffer: Zeroizing<Vec<u8>>) {
        buffer.zeroize();
        self.keep(std::mem::take(&mut *buffer));
    }

    fn keep(&self, bytes: Vec<u8>) {
        /// Of no use to keep more than can be in flight.
        const KEPT_MAX: usize = 64;
        let mut free = self.list();
        if free.len() < KEPT_MAX {
            free.push(bytes);
        }
    }

    fn list(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.free.lock().expect("no thread panics while it holds the list")
    }
}

/// Ciphertext whose buffer goes back to the list when the store lets go of it.
struct Recycled {
    bytes: Vec<u8>,
    buffers: Arc<Buffers>,
}

impl AsRef<[u8]> for Recycled {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Recycled {
    fn drop(&mut self) {
        self.buffers.keep(std::mem::take(&mut self.bytes));
    }
}
