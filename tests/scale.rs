//! What grows with a model, and what must not: a million files, ten tebibytes, a hundred models, a thousand readers, ten
//! thousand opens of one cold chunk. Counts and bytes are asserted, times never; `cargo bench --bench scale` prints those.
//!
//! Memory is counted by the allocator of this binary, to the byte; the tests run one at a time for it.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/scale.rs"]
mod scale;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fixture::{Fixture, Random, Style};
use modelfs::cache::{Cache, CacheLimits, Model};
use modelfs::crypto::{self, Verify};
use modelfs::format::ManifestDigest;
use modelfs::mem::{Arena, ArenaPlan};
use modelfs::read::Reader;
use modelfs::telemetry::Telemetry;
use modelfs::vfs::{Kind, NodeId, Ownership, ROOT, Vfs};
use scale::Huge;

const MIB: u64 = 1 << 20;

/// Long enough that only a hang meets it, on any machine.
const DEADLINE: Duration = Duration::from_secs(120);

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; only sizes are counted beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Heap bytes in use; the peak starts anew from here.
fn live() -> usize {
    let live = LIVE.load(Ordering::Relaxed);
    PEAK.store(live, Ordering::Relaxed);
    live
}

/// The same once nothing changes any more: buffers of fetches and of threads that just ended are gone.
fn settled() -> usize {
    // One look may find a thread that was not let on: many in a row seldom do.
    let (mut last, mut same) = (live(), 0);
    while same < 15 {
        std::thread::sleep(Duration::from_millis(20));
        let now = live();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

fn peak() -> usize {
    PEAK.load(Ordering::Relaxed)
}

/// Resident bytes that are not shared memory, as the kernel counts them.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("a kernel since 4.5");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
}

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

struct Mounted {
    runtime: tokio::runtime::Runtime,
    telemetry: Arc<Telemetry>,
    reader: Reader,
    vfs: Vfs,
}

/// Everything of a mount but the kernel.
fn mounted(models: Vec<Arc<Model>>, cache_bytes: u64) -> Mounted {
    let runtime = runtime();
    let telemetry = Arc::new(Telemetry::default());
    let arena = Arena::open(ArenaPlan { bytes: cache_bytes + 8 * MIB }).expect("an arena");
    let limits = CacheLimits { room_deadline: DEADLINE, ..CacheLimits::default() };
    let cache = Cache::new(arena, cache_bytes, limits, runtime.handle().clone(), telemetry.clone()).expect("a cache");
    let reader = Reader::new(cache.clone(), DEADLINE).expect("a reader");
    let vfs = Vfs::new(models, Ownership { uid: 0, gid: 0, umask: 0o222 }, cache).expect("a tree");
    Mounted { runtime, telemetry, reader, vfs }
}

impl Mounted {
    fn node(&self, path: &str) -> NodeId {
        path.split('/').fold(ROOT, |at, part| {
            self.vfs.lookup(at, part.as_bytes()).unwrap_or_else(|| panic!("no {part} of {path}"))
        })
    }

    fn read(&self, node: NodeId, offset: u64, len: usize) -> Vec<u8> {
        let file = self.vfs.open(node).expect("a file");
        let bytes = self.runtime.block_on(async {
            self.reader.read(&file, offset, len).await.unwrap_or_else(|e| panic!("{}", e.chain())).bytes().to_vec()
        });
        self.vfs.release(node);
        bytes
    }
}

/// What one file costs beyond its row in the manifest: its node, its name in its folder.
const TREE_BYTES_A_FILE_MAX: usize = 110;
/// What one file costs in the opened manifest: its row, its path, its extent.
const MANIFEST_BYTES_A_FILE_MAX: usize = 150;

#[test]
fn a_version_of_a_million_files_costs_stated_bytes_a_file_and_its_first_byte_one_chunk() {
    let _alone = alone();
    const FILES: u64 = 1_000_000;
    let picked = [0u64, 1, 123_456, 999_999];
    let huge = Huge::of_small_files(FILES, &picked);

    let (before, resident_before) = (live(), resident());
    let opened = huge.open();
    let manifest = live() - before;
    let opening_peak = peak().max(before + manifest) - before;
    assert_eq!(opened.0.files().len() as u64, FILES);
    let model = huge.model(opened);
    let before_tree = live();
    let mounted = mounted(vec![model], 64 * MIB);
    let tree = live() - before_tree;
    println!(
        "a file: {} bytes of manifest, {} of tree; opening peaks at {:.2} of the manifest object",
        manifest / FILES as usize,
        tree / FILES as usize,
        opening_peak as f64 / huge.manifest.len() as f64
    );
    assert!(manifest <= FILES as usize * MANIFEST_BYTES_A_FILE_MAX, "{manifest}");
    assert!(tree <= FILES as usize * TREE_BYTES_A_FILE_MAX + (8 << 20), "{tree}");
    // THREAT_MODEL (f) row 61.
    assert!(opening_peak <= 3 * huge.manifest.len(), "{opening_peak} for a manifest of {}", huge.manifest.len());
    let grown = resident().saturating_sub(resident_before);
    assert!(grown <= FILES * (MANIFEST_BYTES_A_FILE_MAX + TREE_BYTES_A_FILE_MAX) as u64 * 2, "{grown} resident");

    for (done, number) in picked.into_iter().enumerate() {
        let node = mounted.node(&format!("{}/{}", scale::NAME, Huge::small_path(number)));
        let bytes = mounted.read(node, 0, 8192);
        let want: Vec<u8> =
            (0..number % 4096 + 1).map(|i| scale::plain_byte(huge.objects[0].0, number * 4096 + i)).collect();
        assert!(bytes == want, "file {number}");
        // The first two lie in one chunk.
        assert_eq!(huge.store.fetches(), [1, 1, 2, 3][done]);
    }
    let folder = mounted.node(&format!("{}/shard-0999", scale::NAME));
    assert_eq!(mounted.vfs.attributes(folder).expect("a folder").kind, Kind::Directory);
    assert!(mounted.vfs.entry(folder, 1001).is_some() && mounted.vfs.entry(folder, 1002).is_none());
}

/// What 1.3 million chunks cost before one of them is read: their hashes in the manifest, and hardly more.
const COLD_BYTES_A_CHUNK_MAX: usize = 36;

#[test]
fn a_model_of_ten_tebibytes_opens_in_bounded_memory_and_its_first_byte_costs_one_chunk() {
    let _alone = alone();
    const SIZE: u64 = 10 << 40;
    let places = [0, (1 << 40) - 8, 5 << 40, SIZE - 3];
    let huge = Huge::of_one_file(SIZE, &places);
    let chunks = (SIZE >> 23) as usize;

    let before = live();
    let opened = huge.open();
    let opening_peak = peak() - before;
    let mounted = mounted(vec![huge.model(opened)], 64 * MIB);
    let node = mounted.node(&format!("{}/model.safetensors", scale::NAME));
    let file = mounted.vfs.open(node).expect("a file");
    let cold = live() - before;
    println!("{chunks} chunks: {} bytes each before a read; opening peaks at {opening_peak}", cold / chunks);
    assert!(cold <= chunks * COLD_BYTES_A_CHUNK_MAX + (12 << 20), "{cold}");
    assert!(opening_peak <= 3 * huge.manifest.len(), "{opening_peak} for a manifest of {}", huge.manifest.len());

    for (done, at) in places.into_iter().enumerate() {
        let len = (SIZE - at).min(4) as usize;
        let bytes = mounted.read(node, at, len);
        assert_eq!(bytes, (at..at + len as u64).map(|at| huge.byte(at)).collect::<Vec<_>>(), "at {at}");
        assert_eq!(huge.store.fetches(), done as u64 + 1);
    }
    assert_eq!(mounted.telemetry.fetch_requests.get(), places.len() as u64);
    let warm = live() - before;
    assert!(warm - cold <= 4 << 20, "four chunks read: {} bytes more", warm - cold);
    drop(file);
}

/// What one resident chunk costs beside its plaintext: its state and its place in the order of recency.
const RESIDENT_BYTES_A_CHUNK_MAX: usize = 128;

#[test]
fn a_resident_chunk_costs_stated_bytes_beside_its_plaintext() {
    let _alone = alone();
    const CHUNKS: usize = 256;
    let mut random = Random::announced("resident chunks");
    let bytes = random.bytes(CHUNKS << 20);
    let runtime = runtime();
    let fixture = runtime.block_on(Fixture::seal(vec![("weights.bin".into(), bytes)], Style::default(), &mut random));
    let mounted = mounted(vec![fixture.model(fixture.store.clone(), Verify::Strict)], (CHUNKS as u64 + 16) * MIB);
    let node = mounted.node("acme/fixture/weights.bin");
    let file = mounted.vfs.open(node).expect("a file");
    let read = |from: usize, to: usize| {
        for chunk in from..to {
            let got = mounted.read(node, (chunk as u64) << 20, 16);
            assert_eq!(got, fixture.files[0].1[chunk << 20..][..16]);
        }
        // What was fetched ahead ends meanwhile.
        while mounted.telemetry.chunks_opened.get() < mounted.telemetry.fetch_requests.get() {
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    read(0, 8); // pools, channels and buffers are there now
    let start = mounted.telemetry.chunks_opened.get() as usize;
    let before = settled();
    read(8, CHUNKS);
    let (each, opened) = (settled() - before, mounted.telemetry.chunks_opened.get() as usize - start);
    println!("{} bytes a resident chunk", each / opened);
    assert!(each <= opened * RESIDENT_BYTES_A_CHUNK_MAX, "{each} bytes for {opened} chunks");
    drop(file);
}

#[test]
fn a_thousand_readers_of_random_ranges_get_their_bytes_from_half_a_cache() {
    let _alone = alone();
    const READERS: u64 = 1000;
    let mut random = Random::announced("a thousand readers");
    let files = vec![("a.bin".into(), random.bytes(24 << 20)), ("b/c.bin".into(), random.bytes((24 << 20) + 4321))];
    let runtime = runtime();
    let fixture = runtime.block_on(Fixture::seal(files, Style::default(), &mut random));
    let mounted = mounted(vec![fixture.model(fixture.store.clone(), Verify::Strict)], 24 * MIB);
    let nodes = [mounted.node("acme/fixture/a.bin"), mounted.node("acme/fixture/b/c.bin")];
    let gate = std::sync::Barrier::new(READERS as usize);
    let seeds: Vec<u64> = (0..READERS).map(|_| random.next()).collect();
    std::thread::scope(|scope| {
        for seed in seeds {
            let (mounted, fixture, gate) = (&mounted, &fixture, &gate);
            let thread = std::thread::Builder::new().stack_size(256 << 10);
            let reader = move || {
                let mut random = Random(seed);
                gate.wait();
                for _ in 0..12 {
                    let which = random.below(2) as usize;
                    let plain = &fixture.files[which].1;
                    let offset = random.below(plain.len() as u64);
                    let len = 1 + random.below(200_000) as usize;
                    let got = mounted.read(nodes[which], offset, len);
                    let end = plain.len().min(offset as usize + len);
                    assert!(got == plain[offset as usize..end], "reader {seed}: {len} bytes at {offset} of {which}");
                }
            };
            thread.spawn_scoped(scope, reader).expect("a thread");
        }
    });
    assert_eq!(mounted.vfs.open_count(), 0);
    assert_eq!(mounted.telemetry.deadline_errors.get() + mounted.telemetry.fetch_errors.get(), 0);
    assert!(mounted.reader.cache().budget().peak() <= 24 * MIB, "the budget was exceeded");
}

#[test]
fn a_hundred_models_are_read_through_one_mount_each_with_its_own_bytes() {
    let _alone = alone();
    let mut random = Random::announced("a hundred models");
    let runtime = runtime();
    let style = Style { pack_below: 100_000, ..Style::default() };
    let fixtures: Vec<Fixture> = (0..100)
        .map(|i| {
            let len = 1 + random.below(300_000) as usize;
            let files = vec![
                ("config.json".into(), format!("{{\"model\": {i}}}").into_bytes()),
                ("weights.bin".into(), random.bytes(len)),
            ];
            runtime.block_on(Fixture::seal(files, style, &mut random))
        })
        .collect();
    let name = |i: usize| format!("team-{}/model-{i}", i % 7);
    let models = fixtures.iter().enumerate().map(|(i, fixture)| {
        let opened = crypto::open_manifest(&fixture.manifest, fixture.dek()).expect("opens");
        let digest = ManifestDigest::of(&fixture.manifest);
        Arc::new(Model::new(i as u32, name(i), digest, opened, fixture.store.clone(), Verify::Strict))
    });
    let mounted = mounted(models.collect(), 64 * MIB);
    assert_eq!(mounted.vfs.models().len(), 100);
    for (i, fixture) in fixtures.iter().enumerate() {
        for (path, bytes) in &fixture.files {
            let got = mounted.read(mounted.node(&format!("{}/{path}", name(i))), 0, MIB as usize);
            assert!(got == *bytes, "{path} of model {i}");
        }
    }
}

/// THREAT_MODEL (f) row 65.
#[test]
fn ten_thousand_concurrent_opens_of_one_cold_chunk_cost_one_fetch() {
    let _alone = alone();
    const OPENS: u64 = 10_000;
    let huge = Huge::of_one_file(8 << 20, &[0]);
    let mounted = mounted(vec![huge.model(huge.open())], 64 * MIB);
    let node = mounted.node(&format!("{}/model.safetensors", scale::NAME));
    huge.store.shut();
    let Mounted { runtime, telemetry, reader, vfs } = mounted;
    let (reader, vfs) = (Arc::new(reader), Arc::new(vfs));
    let oid = huge.objects[0].0;
    let tasks: Vec<_> = (0..OPENS)
        .map(|number| {
            let (reader, vfs) = (reader.clone(), vfs.clone());
            runtime.spawn(async move {
                let file = vfs.open(node).expect("a file");
                let at = (number * 829) % (8 << 20);
                let answer = reader.read(&file, at, 64).await.unwrap_or_else(|e| panic!("{}", e.chain()));
                let want: Vec<u8> = (at..(at + 64).min(8 << 20)).map(|at| scale::plain_byte(oid, at)).collect();
                assert_eq!(answer.bytes(), want, "at {at}");
                vfs.release(node);
            })
        })
        .collect();
    // Everyone has missed, hence asked, before the one fetch may end.
    while telemetry.cache_misses.get() < OPENS {
        std::thread::sleep(Duration::from_millis(1));
    }
    huge.store.open();
    runtime.block_on(async {
        for task in tasks {
            task.await.expect("a reader");
        }
    });
    assert_eq!((huge.store.fetches(), telemetry.fetch_requests.get(), telemetry.chunks_opened.get()), (1, 1, 1));
    assert_eq!(vfs.open_count(), 0);
    assert_eq!(reader.cache().budget().in_use(), 8 * MIB);
}

/// The counter sees what is allocated, or every bound above is worth nothing.
#[test]
fn the_counting_allocator_counts() {
    let _alone = alone();
    let before = settled();
    let bytes = std::hint::black_box(vec![1u8; 10 << 20]);
    let now = live();
    assert!(now - before >= 10 << 20, "{before} {now}");
    drop(bytes);
    assert!(peak() >= now && live() < now);
    assert!(Path::new("/proc/self/status").exists() && resident() > 0);
}
