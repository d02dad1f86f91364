//! From `Reader` down, no kernel: what a hit costs over memcpy, what a fill costs over its floors.
//!
//! Fills are made from a store that costs nothing (it hands out slices of one buffer), so that what is measured is ours.
//! The floors are measured in the same rounds: the same chunks opened by as many bare threads as the cache has, once into
//! memory that is there already, once into fresh locked files.
//! `cargo bench --bench read_path -- [--size-mib N] [--rounds N] [--dir PATH] [--json PATH]`

mod common;

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use common::{Options, Results, Sealed, timed, warm_memory};
use modelfs::cache::{Cache, CacheLimits, Model};
use modelfs::crypto::{Verify, open_chunk};
use modelfs::error::Result;
use modelfs::format::{ChunkIndex, HashAlg, Suite};
use modelfs::mem::{Arena, ArenaPlan, LockedFile, Pages};
use modelfs::read::{OpenFile, Reader};
use modelfs::store::local::LocalStore;
use modelfs::store::memory::MemoryStore;
use modelfs::store::{ChunkSource, CipherChunk, Listed, fetch_chunk};
use modelfs::telemetry::Telemetry;

/// Any name is this one object; a range of it is a slice, nothing is copied.
#[derive(Debug)]
struct Free(Bytes);

#[async_trait]
impl ChunkSource for Free {
    async fn read_range(&self, _name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        Ok(vec![self.0.slice(range.start as usize..range.end as usize)])
    }
    async fn read_small(&self, _name: &str, _max: u64) -> Result<Bytes> {
        unimplemented!("the manifest is at hand")
    }
    async fn size(&self, _name: &str) -> Result<u64> {
        Ok(self.0.len() as u64)
    }
    async fn list(&self, _prefix: &str) -> Result<Vec<Listed>> {
        Ok(Vec::new())
    }
    async fn list_dirs(&self, _prefix: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    fn describe(&self) -> String {
        "free:".to_owned()
    }
}

struct Bed {
    sealed: Sealed,
    free: Arc<Free>,
    local: LocalStore,
    memory: Arc<MemoryStore>,
    runtime: tokio::runtime::Runtime,
    budget: u64,
}

impl Bed {
    fn cache(&self) -> Cache {
        let arena = Arena::open(ArenaPlan { bytes: self.budget }).expect("arena");
        let (limits, telemetry) = (CacheLimits::default(), Arc::new(Telemetry::default()));
        Cache::new(arena, self.budget, limits, self.runtime.handle().clone(), telemetry).expect("cache")
    }

    /// A store, by name.
    fn source(&self, name: &str) -> Arc<dyn ChunkSource> {
        match name {
            "free" => self.free.clone(),
            "memory" => self.memory.clone(),
            _ => Arc::new(self.local.clone()),
        }
    }
}

fn main() {
    let options = Options::parse();
    let mut results = Results::default();
    let folder = tempfile::tempdir_in(&options.dir).expect("a temporary folder");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let local = LocalStore::open(&folder.path().join("store")).expect("store");
    let sealed = runtime.block_on(Sealed::new(&local, options.size, Suite::Aes256Gcm, HashAlg::Blake3, |_| {}));
    // The stored object again, as one buffer in warm huge pages.
    let (manifest, _) = sealed.open();
    let name = modelfs::format::names::data(sealed.model_id, sealed.oid);
    let whole = warm_memory(sealed.layout.stored_len() as usize);
    let memory = Arc::new(MemoryStore::new());
    runtime.block_on(async {
        for index in sealed.layout.chunks() {
            let range = sealed.layout.chunk_stored(index);
            let chunk = fetch_chunk(&local, &manifest, 0, index).await.expect("local");
            let mut at = range.start as usize;
            for piece in chunk.pieces {
                whole[at..at + piece.len()].copy_from_slice(&piece);
                at += piece.len();
            }
        }
    });
    let whole = Bytes::from_static(whole);
    memory.put(&name, whole.clone());
    let bed =
        Bed { sealed, free: Arc::new(Free(whole)), local, memory, runtime, budget: options.size * 2 + (64 << 20) };

    for round in 0..options.rounds {
        fills(&bed, &options, &mut results);
        if options.only.is_empty() {
            hits(&bed, &options, &mut results, round as u64);
        }
    }
    let columns = ["GB/s", "cpu s/GB", "foretold"];
    results.table("fill of one object, cold", &columns, None);
    let floor = "floor: bare threads, warm memory";
    for fill in ["fill_whole strict, free store", "sequential reads strict, free store"] {
        let ratio = results.ratio(fill, floor, "cpu s/GB");
        let fresh = results.ratio(fill, "floor: bare threads, fresh locked file", "cpu s/GB");
        results.note(format!(
            "{fill}: {ratio:.2} times the processor time of open_chunk alone, {fresh:.2} with its page faults"
        ));
    }
    results.table("hits, resident, one reader", &["4 KiB random", "128 KiB", "1 MiB"], Some("memcpy"));
    results.table("hits, time of the look-up alone (ns)", &["ns"], None);
    results.write_json("read_path", &options);
}

/// Runs `work`, which moves the whole file, and notes its rate and its processor time.
fn rated(options: &Options, results: &mut Results, what: &str, work: impl FnOnce()) {
    if !what.contains(&options.only) {
        return;
    }
    let before = common::cpu_time();
    let took = timed(work);
    let cpu = (common::cpu_time() - before).as_secs_f64();
    let gb = options.size as f64 / 1e9;
    results.add(what, "GB/s", "GB/s", gb / took);
    results.add(what, "cpu s/GB", "s/GB", cpu / gb);
}

fn fills(bed: &Bed, options: &Options, results: &mut Results) {
    let size = options.size;
    let warm = fresh_file(bed);
    bare_threads(bed, &warm);
    rated(options, results, "floor: bare threads, warm memory", || bare_threads(bed, &warm));
    warm.thaw_and_wipe().expect("wiped");
    let fresh = fresh_file(bed);
    rated(options, results, "floor: bare threads, fresh locked file", || bare_threads(bed, &fresh));
    fresh.thaw_and_wipe().expect("wiped");
    let fresh = fresh_file(bed);
    rated(options, results, "floor: fresh locked file, zeros only", || {
        // SAFETY: nobody else has this file.
        let slot = unsafe { fresh.slot(0..size).expect("room") };
        slot.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    });
    fresh.thaw_and_wipe().expect("wiped");

    for (source, verify) in [
        ("free", Verify::Strict),
        ("free", Verify::Aead),
        ("memory", Verify::Strict),
        ("local, page cache", Verify::Strict),
    ] {
        let mode = if verify == Verify::Strict { "strict" } else { "aead" };
        let cache = bed.cache();
        let model = bed.sealed.model(bed.source(source), verify);
        let object = cache.object(&model, 0, true);
        rated(options, results, &format!("fill_whole {mode}, {source} store"), || {
            bed.runtime.block_on(cache.fill_whole(&object)).expect("filled");
        });
        cache.wipe_all(true);
    }
    let (_cache, reader, file) = reader(bed, bed.source("free"));
    rated(options, results, "sequential reads strict, free store", || {
        bed.runtime.block_on(async {
            let mut offset = 0;
            while offset < size {
                let answer = reader.read(&file, offset, 1 << 20).await.expect("read");
                offset += answer.bytes().len() as u64;
            }
        });
    });
    reader.cache().wipe_all(true);
}

fn fresh_file(bed: &Bed) -> LockedFile {
    let arena = Arena::open(ArenaPlan { bytes: bed.budget }).expect("arena");
    arena.create(bed.sealed.layout.plain_len(), Pages::Huge).expect("room")
}

/// As many threads as the cache has, each opening the next chunk: no runtime, no cache.
fn bare_threads(bed: &Bed, file: &LockedFile) {
    let (manifest, keys) = bed.sealed.open();
    let next = AtomicUsize::new(0);
    let chunks: Vec<ChunkIndex> = bed.sealed.layout.chunks().collect();
    std::thread::scope(|scope| {
        for _ in 0..CacheLimits::default().open_threads {
            scope.spawn(|| {
                while let Some(&index) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let stored = bed.sealed.layout.chunk_stored(index);
                    let piece = bed.free.0.slice(stored.start as usize..stored.end as usize);
                    let chunk = CipherChunk { object: bed.sealed.oid, index, pieces: vec![piece] };
                    // SAFETY: each chunk is taken once, by one thread.
                    let slot = unsafe { file.slot(bed.sealed.layout.chunk_plain(index)).expect("room") };
                    open_chunk(&keys, &manifest, 0, &chunk, Verify::Strict, slot, &mut []).expect("genuine");
                }
            });
        }
    });
}

fn reader(bed: &Bed, source: Arc<dyn ChunkSource>) -> (Cache, Reader, OpenFile) {
    let cache = bed.cache();
    let model: Arc<Model> = bed.sealed.model(source, Verify::Strict);
    let reader = Reader::new(cache.clone(), Duration::from_secs(30)).expect("reader");
    let file = OpenFile::new(&cache, &model, 0);
    (cache, reader, file)
}

/// Reads of a resident file, each copied once, as the kernel does; against copying the same bytes without a reader.
fn hits(bed: &Bed, options: &Options, results: &mut Results, round: u64) {
    let (_cache, reader, file) = reader(bed, bed.source("free"));
    let object = file.sole_object().cloned().expect("one file, one object");
    bed.runtime.block_on(reader.cache().fill_whole(&object)).expect("filled");
    let size = options.size;
    let whole = reader.cache().try_pin_run(&object, 0..size).expect("resident");
    let mut buffer = vec![1u8; 1 << 20];
    let mut order: Vec<u64> = (0..(size / 4096).min(100_000)).collect();
    let mut random = vec![0u8; order.len() * 8];
    common::fill_random(round + 1, &mut random);
    for (at, word) in order.iter_mut().zip(random.as_chunks::<8>().0) {
        *at = u64::from_le_bytes(*word) % (size / 4096) * 4096;
    }
    for (how, len) in [("4 KiB random", 4 << 10), ("128 KiB", 128 << 10), ("1 MiB", 1 << 20)] {
        let offsets: Vec<u64> =
            if len == 4096 { order.clone() } else { (0..size / len as u64).map(|i| i * len as u64).collect() };
        let gb = offsets.len() as f64 * len as f64 / 1e9;
        let copy = |bytes: &[u8], buffer: &mut [u8]| {
            buffer[..bytes.len()].copy_from_slice(bytes);
            black_box(buffer);
        };
        let took = timed(|| {
            for &at in &offsets {
                copy(&whole.bytes()[at as usize..at as usize + len], &mut buffer);
            }
        });
        results.add("memcpy", how, "GB/s", gb / took);
        let took = timed(|| {
            for &at in &offsets {
                let answer = reader.try_read(&file, at, len).expect("resident");
                copy(answer.bytes(), &mut buffer);
            }
        });
        results.add("Reader::try_read and copy", how, "GB/s", gb / took);
        let start = Instant::now();
        for &at in &offsets {
            black_box(reader.try_read(&file, at, len).expect("resident").bytes().len());
        }
        let each = start.elapsed().as_nanos() as f64 / offsets.len() as f64;
        results.add(&format!("look-up, {how}"), "ns", "ns", each);
    }
    drop(whole);
    reader.cache().wipe_all(true);
}
