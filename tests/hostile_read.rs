//! THREAT_MODEL (f) rows 1 to 18 and 33: what a hostile store may send for a chunk, and what readers get.
//!
//! Each row is held twice, strict and aead: by the reader over a store in memory (which code, how many fetches, what is
//! left in locked memory) and by a real mount (which errno, which signal, what other files notice).

#[path = "common/children.rs"]
mod children;
#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/mounted.rs"]
mod mounted;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use children::Touch;
use fixture::{Fixture, Lie, Random, Style};
use modelfs::cache::{Cache, CacheLimits, Model};
use modelfs::crypto::{ObjectSealer, Verify};
use modelfs::error::{Code, Result};
use modelfs::format::{ChunkIndex, HashAlg, ObjectEntry, Suite, names};
use modelfs::mem::{Arena, ArenaPlan};
use modelfs::read::{OpenFile, Reader};
use modelfs::store::fault::{Call, Fault, Faulty, When};
use modelfs::store::memory::MemoryStore;
use modelfs::store::patient::{Patience, Patient};
use modelfs::store::{ChunkSource, Listed};
use modelfs::telemetry::Telemetry;
use mounted::{How, Mounted, can_mount};

const CHUNK: usize = 1 << 20;
const BLOCK: usize = 1 << 16;
const TAG: usize = 16;
const VICTIM: &str = "victim.bin";
const OTHER: &str = "sub/other.bin";

/// For what must not end while a test runs, however slow the machine.
const LONG: Duration = Duration::from_secs(600);

/// A refusal and an outage are remembered until the test is over.
fn long_memory() -> CacheLimits {
    CacheLimits { refusal_memory: LONG, outage_memory: LONG, ..CacheLimits::default() }
}

/// Not a test: see [`children`].
#[test]
fn child() {
    children::be_one();
}

/// Object names and stored ranges, in the order they were asked for.
type Asked = Vec<(String, Range<u64>)>;

/// Notes which stored ranges the cache asks for.
#[derive(Debug)]
struct Noted<S> {
    inner: S,
    asked: Arc<Mutex<Asked>>,
}

#[async_trait]
impl<S: ChunkSource> ChunkSource for Noted<S> {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        self.asked.lock().expect("notes").push((name.to_owned(), range.clone()));
        self.inner.read_range(name, range).await
    }
    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        self.inner.read_small(name, max).await
    }
    async fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        self.inner.list(prefix).await
    }
    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list_dirs(prefix).await
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// A model of two files, each an object of its own with two whole chunks and a short one, in a store that a test spoils.
struct Scene {
    fixture: Fixture,
    store: Faulty<MemoryStore>,
    asked: Arc<Mutex<Asked>>,
    model: Arc<Model>,
    verify: Verify,
}

impl Scene {
    fn new(verify: Verify) -> Scene {
        Scene::with(verify, Style::default())
    }

    fn with(verify: Verify, style: Style) -> Scene {
        // A length that no other test has at this moment: by it the memory of this one is found.
        static SCENES: AtomicUsize = AtomicUsize::new(0);
        let own = SCENES.fetch_add(1, Ordering::Relaxed);
        let odd = own % 2 == 1;
        let style = Style {
            suite: if odd { Suite::ChaCha20Poly1305 } else { Suite::Aes256Gcm },
            hash_alg: if odd { HashAlg::Sha256 } else { HashAlg::Blake3 },
            ..style
        };
        let mut random = Random(own as u64);
        let files = vec![
            (OTHER.to_owned(), random.bytes(2 * CHUNK + 100)),
            (VICTIM.to_owned(), random.bytes(2 * CHUNK + 70_000 + 4096 * own)),
        ];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let fixture = runtime.block_on(Fixture::seal(files, style, &mut random));
        let store = Faulty::new((*fixture.store).clone());
        let asked = Arc::default();
        // As a mount has it: patience around the store.
        let (attempt, budget, pause_first) = (LONG, 3 * LONG, Duration::from_millis(1));
        let patience = Patience { attempt, budget, attempts_max: 3, pause_first, ..Patience::default() };
        let source = Noted { inner: Patient::new(store.clone(), patience), asked: Arc::clone(&asked) };
        let model = fixture.model(Arc::new(source), verify);
        Scene { fixture, store, asked, model, verify }
    }

    fn plain(&self, file: &str) -> &[u8] {
        &self.fixture.files.iter().find(|(path, _)| path == file).expect("a file of the scene").1
    }

    fn entry(&self, file: &str) -> &ObjectEntry {
        entry(&self.model, file)
    }

    fn name(&self, file: &str) -> String {
        names::data(self.fixture.model_id, self.entry(file).oid)
    }

    /// The victim's stored bytes, changed behind everyone's back.
    fn edit(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let name = self.name(VICTIM);
        let mut bytes = self.store.inner().get(&name).expect("stored").to_vec();
        change(&mut bytes);
        self.store.inner().put(&name, bytes);
    }

    /// Where chunk `index` of the victim lies in its stored object.
    fn stored(&self, index: u32) -> Range<usize> {
        stored(&self.model, VICTIM, index)
    }

    /// Bytes of ciphertext of chunk `index` of the victim.
    fn sealed_len(&self, index: u32) -> usize {
        self.model.manifest.chunk_shape(object(&self.model, VICTIM), ChunkIndex(index)).sealed_len()
    }

    /// How often the cache asked for chunk `index` of the victim.
    fn fetches(&self, index: u32) -> usize {
        let (name, start) = (self.name(VICTIM), self.stored(index).start as u64);
        self.asked.lock().expect("notes").iter().filter(|(n, range)| *n == name && range.start == start).count()
    }

    fn chunk_plain(&self, file: &str, index: u32) -> Range<usize> {
        let range = self.entry(file).layout.chunk_plain(ChunkIndex(index));
        range.start as usize..range.end as usize
    }

    fn fault(&self, fault: Fault) {
        self.store.on(When::call(Call::ReadRange).name(&self.name(VICTIM)), fault);
    }
}

fn object(model: &Model, file: &str) -> u32 {
    let manifest = &model.manifest;
    manifest.extents(&manifest.files()[manifest.find(file).expect("a file of the scene")])[0].object
}

fn entry<'a>(model: &'a Model, file: &str) -> &'a ObjectEntry {
    &model.manifest.objects()[object(model, file) as usize]
}

fn stored(model: &Model, file: &str, index: u32) -> Range<usize> {
    let range = model.manifest.chunk_stored(object(model, file), ChunkIndex(index));
    range.start as usize..range.end as usize
}

/// Puts what lies at `from` over what lies at `to`, as far as both reach.
fn overlay(bytes: &mut [u8], to: Range<usize>, other: &[u8], from: Range<usize>) {
    let len = to.len().min(from.len());
    bytes[to.start..to.start + len].copy_from_slice(&other[from.start..from.start + len]);
}

/// A reader over a scene, without a kernel.
struct Library {
    runtime: tokio::runtime::Runtime,
    cache: Cache,
    reader: Arc<Reader>,
    model: Arc<Model>,
}

impl Library {
    fn new(model: &Arc<Model>, limits: CacheLimits, deadline: Duration) -> Library {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        let budget = 64 << 20;
        let arena = Arena::open(ArenaPlan { bytes: budget }).expect("arena");
        let cache =
            Cache::new(arena, budget, limits, runtime.handle().clone(), Arc::new(Telemetry::default())).expect("cache");
        let reader = Arc::new(Reader::new(cache.clone(), deadline).expect("reader"));
        Library { runtime, cache, reader, model: model.clone() }
    }

    fn of(scene: &Scene) -> Library {
        Library::new(&scene.model, long_memory(), LONG)
    }

    fn open(&self, file: &str) -> Arc<OpenFile> {
        let index = self.model.manifest.find(file).expect("a file of the scene");
        Arc::new(OpenFile::new(&self.cache, &self.model, index as u32))
    }

    fn start(&self, file: &str, range: Range<usize>) -> tokio::task::JoinHandle<Result<Vec<u8>>> {
        let (reader, file) = (self.reader.clone(), self.open(file));
        self.runtime.spawn(async move {
            let answer = reader.read(&file, range.start as u64, range.len()).await?;
            Ok(answer.bytes().to_vec())
        })
    }

    fn read(&self, file: &str, range: Range<usize>) -> Result<Vec<u8>> {
        self.runtime.block_on(self.start(file, range)).expect("a reader")
    }
}

/// Bytes of the scene's victim that are in this process's locked memory, as the kernel counts them.
fn in_locked_memory(scene: &Scene) -> u64 {
    let mapped = scene.plain(VICTIM).len().next_multiple_of(4096);
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let (mut ours, mut sum) = (false, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        if let Some((low, high)) = first.split_once('-')
            && let (Ok(low), Ok(high)) = (usize::from_str_radix(low, 16), usize::from_str_radix(high, 16))
        {
            ours = high - low == mapped && words.next().is_some_and(|access| access.contains('s'));
        } else if ours && first == "Rss:" {
            sum += words.next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10;
        }
    }
    sum
}

/// What a row expects of the chunks in `bad`; all others must be served as if nothing had happened.
#[derive(Clone, Copy)]
struct Row {
    bad: &'static [u32],
    strict: Code,
    aead: Code,
}

impl Row {
    const fn one(strict: Code, aead: Code) -> Row {
        Row { bad: &[1], strict, aead }
    }
    const fn all(strict: Code, aead: Code) -> Row {
        Row { bad: &[0, 1, 2], strict, aead }
    }

    /// Both levels, both ways of verifying, stored as it is and coded.
    fn hold(self, spoil: impl Fn(&Scene)) {
        for coded in [false, true] {
            self.hold_style(Style { coded, ..Style::default() }, &spoil);
        }
    }

    fn hold_style(self, style: Style, spoil: impl Fn(&Scene)) {
        for verify in [Verify::Strict, Verify::Aead] {
            let scene = Scene::with(verify, style);
            spoil(&scene);
            self.in_library(&scene);
            if can_mount() {
                let scene = Scene::with(verify, style);
                spoil(&scene);
                self.in_mount(&scene);
            }
        }
    }

    fn code(self, verify: Verify) -> Code {
        if verify == Verify::Strict { self.strict } else { self.aead }
    }

    /// How often the store is asked: once more after a wrong hash or length, not again after a wrong tag.
    fn fetches(self, verify: Verify) -> usize {
        1 + usize::from(matches!(self.code(verify), Code::ChunkHash | Code::Length))
    }

    fn in_library(self, scene: &Scene) {
        let (code, fetches) = (self.code(scene.verify), self.fetches(scene.verify));
        let library = Library::of(scene);
        let telemetry = library.cache.telemetry();
        let bad = scene.chunk_plain(VICTIM, self.bad[0]);
        let piece = bad.start + 1000..bad.start + 1000 + 4096;

        let file = library.open(VICTIM);
        let reading = library.start(VICTIM, piece.clone());
        while !reading.is_finished() {
            assert!(library.reader.try_read(&file, piece.start as u64, 4096).is_none(), "a refused byte was visible");
        }
        let refused = library.runtime.block_on(reading).expect("a reader").expect_err("hostile bytes were served");
        assert_eq!(refused.code(), code, "{:?}: {refused:?}", scene.verify);
        assert_eq!(scene.store.count(Call::ReadRange), fetches, "{:?}", scene.verify);
        // A length that the store itself found wrong was asked for again below the cache.
        let asked = scene.fetches(self.bad[0]) as u64;
        assert_eq!((telemetry.fetch_requests.get(), telemetry.refetches.get()), (asked, asked - 1));
        let failures = match code {
            Code::ChunkHash => &telemetry.hash_failures,
            Code::Length => &telemetry.length_failures,
            Code::Tag => &telemetry.tag_failures,
            other => panic!("{other} is not of this table"),
        };
        assert_eq!(failures.get(), asked, "{code}");
        assert_eq!(library.cache.budget().in_use(), 0, "a refused chunk keeps no room");
        assert_eq!(in_locked_memory(scene), 0, "a refused chunk leaves no page");

        let crowd: Vec<_> = (0..100).map(|i| library.start(VICTIM, bad.start + i..bad.start + i + 10)).collect();
        for reader in crowd {
            let refused = library.runtime.block_on(reader).expect("a reader").expect_err("hostile bytes were served");
            assert_eq!(refused.code(), code);
        }
        assert_eq!(scene.store.count(Call::ReadRange), fetches, "the refusal is remembered");

        let mut resident = 0;
        for (file, bad) in [(OTHER, &[][..]), (VICTIM, self.bad)] {
            for index in (0..3).filter(|index| !bad.contains(index)) {
                let range = scene.chunk_plain(file, index);
                resident += range.len().next_multiple_of(4096) as u64;
                let want = &scene.plain(file)[range.clone()];
                assert!(library.read(file, range).expect("untouched") == want, "{file} chunk {index}");
            }
            for index in bad {
                let refused = library.read(file, scene.chunk_plain(file, *index)).expect_err("hostile bytes");
                assert_eq!(refused.errno(), libc::EIO, "{refused:?}");
            }
        }
        assert_eq!(library.cache.budget().in_use(), resident);
        if self.bad.len() < 3 {
            assert!(in_locked_memory(scene) > 0, "the detector above must be able to see pages");
        }
    }

    fn in_mount(self, scene: &Scene) {
        let mount = Mounted::new(How { limits: long_memory(), ..How::default() }, || scene.model.clone());
        let path = mount.path(VICTIM);
        let bad = scene.chunk_plain(VICTIM, self.bad[0]);
        let file = File::open(&path).expect("open");
        let eio = |range: Range<usize>| {
            let mut bytes = vec![0xA5; range.len()];
            let refused = file.read_at(&mut bytes, range.start as u64).expect_err("hostile bytes were served");
            assert_eq!(refused.raw_os_error(), Some(libc::EIO));
            assert!(bytes.iter().all(|byte| *byte == 0xA5), "a refused byte reached the reader");
        };
        eio(bad.start + 10..bad.start + 20);
        let fetches = scene.fetches(self.bad[0]);
        assert!(fetches <= self.fetches(scene.verify), "{fetches}");
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (eio, bad) = (&eio, &bad);
                scope.spawn(move || {
                    for i in 0..25 {
                        eio(bad.start + 1000 * i + thread..bad.start + 1000 * i + thread + 500);
                    }
                });
            }
        });
        for shared in [true, false] {
            assert_eq!(children::touch(&path, bad.start as u64 + 5000, shared), Touch::Killed(libc::SIGBUS));
        }
        assert_eq!(scene.fetches(self.bad[0]), fetches, "{:?}: the refusal is remembered", scene.verify);

        assert!(std::fs::read(mount.path(OTHER)).expect("another file") == scene.plain(OTHER));
        assert_eq!(children::touch(&mount.path(OTHER), 5000, true), Touch::Byte(scene.plain(OTHER)[5000]));
        for index in (0..3).filter(|index| !self.bad.contains(index)) {
            let range = scene.chunk_plain(VICTIM, index);
            let mut bytes = vec![0; range.len()];
            file.read_exact_at(&mut bytes, range.start as u64).expect("an untouched chunk");
            assert!(bytes == scene.plain(VICTIM)[range], "chunk {index}");
        }
        let mut bytes = Vec::new();
        let refused = File::open(&path).expect("open").read_to_end(&mut bytes).expect_err("never a short file");
        assert_eq!(refused.raw_os_error(), Some(libc::EIO));
        assert!(bytes.len() <= bad.start && bytes == scene.plain(VICTIM)[..bytes.len()], "{} bytes", bytes.len());
        assert_eq!(scene.fetches(self.bad[0]), fetches, "{:?}: the refusal is remembered", scene.verify);
        assert!(mount.cache.telemetry().opens_passthrough.get() <= 1, "only the other file can be whole");
        drop(file);
        assert_eq!(mount.unmount().held_objects, 0);
    }
}

/// Both levels: nothing of what was done to the store matters to readers.
fn unaffected(spoil: impl Fn(&Scene)) {
    for verify in [Verify::Strict, Verify::Aead] {
        let scene = Scene::new(verify);
        spoil(&scene);
        let library = Library::of(&scene);
        for index in 0..3 {
            let range = scene.chunk_plain(VICTIM, index);
            assert!(library.read(VICTIM, range.clone()).expect("served") == scene.plain(VICTIM)[range]);
        }
        if can_mount() {
            let mount = Mounted::new(How::default(), || scene.model.clone());
            for (path, bytes) in &scene.fixture.files {
                assert!(std::fs::read(mount.path(path)).expect(path) == *bytes, "{path}");
            }
        }
    }
}

const HASH_OR_TAG: Row = Row::one(Code::ChunkHash, Code::Tag);

#[test]
fn row_01_a_flipped_bit_of_ciphertext_is_refused() {
    for at in [0, 5 * BLOCK + 77, CHUNK - 1] {
        HASH_OR_TAG.hold(|scene| {
            let (start, at) = (scene.stored(1).start, at.min(scene.sealed_len(1) - 1));
            scene.edit(|bytes| bytes[start + at] ^= 0x10);
        });
    }
}

#[test]
fn row_02_a_flipped_bit_of_a_tag_is_refused() {
    HASH_OR_TAG.hold(|scene| {
        let end = scene.stored(1).end;
        scene.edit(|bytes| bytes[end - 3 * TAG] ^= 1);
    });
}

#[test]
fn row_03_a_chunk_one_byte_short_or_long_is_refused() {
    for fault in [Fault::Truncate(1), Fault::Extend(1)] {
        Row::all(Code::Length, Code::Length).hold(|scene| scene.fault(fault.clone()));
    }
}

#[test]
fn row_03_an_object_that_lost_a_byte_inside_is_refused_from_there() {
    let row = Row { bad: &[1, 2], ..HASH_OR_TAG };
    row.hold(|scene| {
        let start = scene.stored(1).start;
        scene.edit(|bytes| _ = bytes.remove(start + 100));
    });
}

#[test]
fn row_04_an_object_cut_at_a_chunk_boundary_is_an_error_never_an_end_of_file() {
    Row { bad: &[1, 2], strict: Code::Length, aead: Code::Length }.hold(|scene| {
        let start = scene.stored(1).start;
        scene.edit(|bytes| bytes.truncate(start));
    });
}

#[test]
fn row_05_bytes_after_the_end_of_an_object_change_nothing() {
    unaffected(|scene| scene.edit(|bytes| bytes.extend_from_slice(&[0; 5000])));
}

#[test]
fn row_06_swapped_chunks_of_one_object_are_refused() {
    Row { bad: &[0, 1], ..HASH_OR_TAG }.hold(|scene| {
        let (first, second) = (scene.stored(0), scene.stored(1));
        scene.edit(|bytes| {
            let before = bytes.clone();
            overlay(bytes, first.clone(), &before, second.clone());
            overlay(bytes, second, &before, first);
        });
    });
}

#[test]
fn row_07_swapped_blocks_with_their_tags_are_refused() {
    HASH_OR_TAG.hold(|scene| {
        let (chunk, sealed_len) = (scene.stored(1), scene.sealed_len(1));
        scene.edit(|bytes| {
            let chunk = &mut bytes[chunk];
            let (blocks, tags) = chunk.split_at_mut(sealed_len);
            let (low, high) = blocks.split_at_mut(9 * BLOCK);
            low[2 * BLOCK..3 * BLOCK].swap_with_slice(&mut high[..BLOCK]);
            let (low, high) = tags.split_at_mut(9 * TAG);
            low[2 * TAG..3 * TAG].swap_with_slice(&mut high[..TAG]);
        });
    });
}

#[test]
fn row_08_the_same_chunk_of_another_object_is_refused() {
    HASH_OR_TAG.hold(|scene| {
        let other = scene.store.inner().get(&scene.name(OTHER)).expect("stored");
        scene.edit(|bytes| overlay(bytes, scene.stored(1), &other, stored(&scene.model, OTHER, 1)));
    });
}

/// The older version's object has other bytes, another key and the same place.
#[test]
fn row_08_the_same_chunk_of_an_older_version_is_refused() {
    HASH_OR_TAG.hold(|scene| {
        let older = Scene::with(scene.verify, scene.fixture.style);
        let bytes_then = older.store.inner().get(&older.name(VICTIM)).expect("stored");
        scene.edit(|bytes| overlay(bytes, scene.stored(1), &bytes_then, older.stored(1)));
    });
}

#[test]
fn row_09_zeros_in_place_of_a_block_or_a_chunk_are_refused() {
    HASH_OR_TAG.hold(|scene| {
        let chunk = scene.stored(1);
        scene.edit(|bytes| bytes[chunk.start + BLOCK..chunk.start + 2 * BLOCK].fill(0));
    });
    HASH_OR_TAG.hold(|scene| {
        let chunk = scene.stored(1);
        scene.edit(|bytes| bytes[chunk].fill(0));
    });
}

/// Chunk 1 of the victim with other content, sealed by somebody who holds the model's key.
fn forge(scene: &Scene) -> Vec<u8> {
    let content = Random(99).bytes(CHUNK);
    let entry = scene.entry(VICTIM);
    let hash_alg = scene.model.manifest.header().hash_alg;
    let sealer =
        ObjectSealer::new(&scene.fixture.dek(), entry.suite, entry.layout, hash_alg, entry.oid, entry.origin_vid);
    let (mut chunk, mut tags) = (content.clone(), Vec::new());
    sealer.seal_chunk(ChunkIndex(1), &mut chunk, &mut tags);
    chunk.extend_from_slice(&tags);
    let place = scene.stored(1);
    scene.edit(|bytes| bytes[place].copy_from_slice(&chunk));
    content
}

/// Strict refuses what any holder of the key can make; aead is documented to believe it.
#[test]
fn row_10_a_chunk_forged_with_the_key_is_refused_in_strict_and_believed_in_aead() {
    let scene = Scene::new(Verify::Strict);
    forge(&scene);
    HASH_OR_TAG.in_library(&scene);
    if can_mount() {
        let scene = Scene::new(Verify::Strict);
        forge(&scene);
        HASH_OR_TAG.in_mount(&scene);
    }
    let scene = Scene::new(Verify::Aead);
    let content = forge(&scene);
    assert!(Library::of(&scene).read(VICTIM, scene.chunk_plain(VICTIM, 1)).expect("valid tags") == content);
}

/// The whole object of another version under this name: no chunk of it opens.
#[test]
fn row_11_another_object_under_the_same_name_is_refused() {
    Row::all(Code::ChunkHash, Code::Tag).hold(|scene| {
        let another = Scene::with(scene.verify, scene.fixture.style);
        let bytes_then = another.store.inner().get(&another.name(VICTIM)).expect("stored");
        scene.store.inner().put(&scene.name(VICTIM), bytes_then);
    });
}

#[test]
fn row_12_an_altered_object_header_is_not_trusted_hence_harmless() {
    unaffected(|scene| scene.edit(|bytes| bytes[..128].iter_mut().for_each(|byte| *byte ^= 0xFF)));
}

/// The store's view of a server that answers a range with the whole object, or without end.
#[test]
fn row_13_far_more_bytes_than_asked_for_are_refused() {
    Row::all(Code::Length, Code::Length).hold(|scene| scene.fault(Fault::Endless));
}

#[test]
fn row_14_another_range_than_asked_for_is_refused() {
    // Earlier for the last chunk, which has nothing after it.
    for by in [-1, -4096] {
        Row::all(Code::ChunkHash, Code::Tag).hold(|scene| scene.fault(Fault::Shift(by)));
    }
}

#[test]
fn row_14_half_a_range_is_refused() {
    Row::all(Code::Length, Code::Length).hold(|scene| scene.fault(Fault::Truncate(40_000)));
}

/// The object is replaced between two fetches of one read: an error, not half of each, and right again when it is back.
#[test]
fn row_15_an_object_replaced_mid_file_is_refused_and_never_mixed() {
    for verify in [Verify::Strict, Verify::Aead] {
        let scene = Scene::new(verify);
        let refusal_memory = Duration::from_millis(300);
        let limits = CacheLimits { refusal_memory, ..CacheLimits::default() };
        let library = Library::new(&scene.model, limits, Duration::from_secs(30));
        library.read(VICTIM, 0..100).expect("before");
        let mut before = Vec::new();
        scene.edit(|bytes| {
            before = bytes.clone();
            bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
        });
        let across = CHUNK - 50_000..CHUNK + 50_000;
        let asked = Instant::now();
        let refused = library.read(VICTIM, across.clone()).expect_err("half of it was replaced");
        assert_eq!(refused.code(), if verify == Verify::Strict { Code::ChunkHash } else { Code::Tag });
        assert!(library.read(VICTIM, 0..CHUNK).expect("the half that was here") == scene.plain(VICTIM)[..CHUNK]);
        scene.edit(|bytes| bytes.clone_from(&before));
        let fetches = scene.fetches(1);
        if library.read(VICTIM, across.clone()).is_err() {
            assert_eq!(scene.fetches(1), fetches, "remembered");
        } else {
            assert!(asked.elapsed() >= refusal_memory, "the refusal is forgotten only when its time is over");
        }
        std::thread::sleep(refusal_memory);
        assert!(library.read(VICTIM, across.clone()).expect("the object is back") == scene.plain(VICTIM)[across]);
    }
}

#[test]
fn row_17_an_error_of_the_store_is_one_errno_and_not_a_refetch() {
    let rows = [
        (Code::NotFound, libc::ENOENT),
        (Code::StoreDenied, libc::EACCES),
        (Code::Unreachable, libc::EIO),
        (Code::Deadline, libc::EIO),
    ];
    for (code, errno) in rows {
        let scene = Scene::new(Verify::Strict);
        scene.fault(Fault::Fail(code));
        let library = Library::of(&scene);
        for _ in 0..3 {
            let refused = library.read(VICTIM, 10..20).expect_err("the store failed");
            assert_eq!((refused.code(), refused.errno()), (code, errno));
        }
        assert_eq!(scene.fetches(0), 1, "{code}: asked once, then remembered");
        assert_eq!(library.cache.budget().in_use(), 0);
        assert!(library.read(OTHER, 0..CHUNK).expect("another file") == scene.plain(OTHER)[..CHUNK]);
        if can_mount() {
            let scene = Scene::new(Verify::Strict);
            scene.fault(Fault::Fail(code));
            let mount = Mounted::new(How::default(), || scene.model.clone());
            let file = File::open(mount.path(VICTIM)).expect("open");
            let refused = file.read_at(&mut [0; 10], 0).expect_err("the store failed");
            assert_eq!(refused.raw_os_error(), Some(errno), "{code}");
            assert_eq!(children::touch(&mount.path(VICTIM), 0, true), Touch::Killed(libc::SIGBUS));
            assert!(std::fs::read(mount.path(OTHER)).expect("another file") == scene.plain(OTHER));
        }
    }
}

/// As a mount has it: patience around the store, and a deadline around the read.
#[test]
fn row_17_tries_are_bounded_and_a_passing_fault_is_not_noticed() {
    let patience = Patience {
        attempt: Duration::from_secs(1),
        budget: LONG,
        attempts_max: 4,
        pause_first: Duration::from_millis(5),
        ..Patience::default()
    };
    let scene = Scene::new(Verify::Strict);
    let patient = || Arc::new(Patient::new(scene.store.clone(), patience.clone()));
    let name = scene.name(VICTIM);
    let rule = || When::call(Call::ReadRange).name(&name);

    scene.store.on(rule().times(1), Fault::Stall);
    scene.store.on(rule().times(2), Fault::Fail(Code::Unreachable));
    let model = scene.fixture.model(patient(), Verify::Strict);
    let library = Library::new(&model, CacheLimits::default(), LONG);
    assert!(library.read(VICTIM, 0..100).expect("the fourth try") == scene.plain(VICTIM)[..100]);
    assert_eq!(scene.store.count(Call::ReadRange), 4);

    scene.store.on(rule(), Fault::Fail(Code::Unreachable));
    let model = scene.fixture.model(patient(), Verify::Strict);
    let library = Library::new(&model, CacheLimits::default(), LONG);
    let refused = library.read(VICTIM, 0..100).expect_err("never answered");
    assert_eq!(refused.code(), Code::Unreachable);
    assert_eq!(scene.store.count(Call::ReadRange), 8, "four tries more: {refused:?}");
}

/// A store that never answers for one object: its readers end at their deadline, the others do not wait.
#[test]
fn row_17_a_stalled_chunk_ends_at_the_deadline_and_holds_up_nobody() {
    let scene = Scene::new(Verify::Strict);
    scene.fault(Fault::Stall);
    let library = Library::new(&scene.model, long_memory(), Duration::from_millis(700));
    // Who reads what comes has time: a busy machine may take more than that for it.
    let patient = Reader::new(library.cache.clone(), LONG).expect("reader");
    let other = library.open(OTHER);
    let started = Instant::now();
    let stuck: Vec<_> = (0..50).map(|i| library.start(VICTIM, i * 10_000..i * 10_000 + 100)).collect();
    for index in 0..3 {
        let range = scene.chunk_plain(OTHER, index);
        let answer = library.runtime.block_on(patient.read(&other, range.start as u64, range.len()));
        assert!(answer.expect("another file").bytes() == &scene.plain(OTHER)[range]);
    }
    assert!(stuck.iter().all(|reader| !reader.is_finished()) || started.elapsed() > Duration::from_millis(700));
    for reader in stuck {
        let refused = library.runtime.block_on(reader).expect("a reader").expect_err("nothing ever came");
        assert_eq!(refused.code(), Code::Deadline);
    }
    assert!(started.elapsed() < LONG / 10, "{:?}", started.elapsed());
    assert_eq!(scene.fetches(0), 1);
}

/// An error page with status 200, seen through a store that did not notice: not as long as the range.
#[test]
fn row_18_an_error_page_in_place_of_a_chunk_is_refused() {
    Row::all(Code::Length, Code::Length).hold(|scene| {
        let page = b"<html>503 Slow Down</html>".to_vec();
        scene.store.inner().put(&scene.name(VICTIM), page);
    });
}

/// Listed in the manifest, hash right: only the tag says that the key is another. Nothing a refetch could mend.
#[test]
fn row_33_a_chunk_sealed_under_another_key_fails_its_tag_once() {
    let style = Style { lie: Lie::OtherKey, ..Style::default() };
    row_33(style, Code::Tag);
}

/// A ciphertext that opens under two keys is stopped by the commitment, before any cipher.
#[test]
fn row_33_a_two_key_ciphertext_fails_its_commitment() {
    let style = Style { lie: Lie::OtherKeyAndCommitment, ..Style::default() };
    row_33(style, Code::Commit);
}

fn row_33(style: Style, code: Code) {
    for verify in [Verify::Strict, Verify::Aead] {
        let scene = Scene::with(verify, style);
        let library = Library::of(&scene);
        for _ in 0..50 {
            assert_eq!(library.read(VICTIM, 5..10).expect_err("another key").code(), code);
        }
        assert_eq!(scene.fetches(0), 1, "{code} is not asked for again");
        assert_eq!(library.cache.budget().in_use(), 0);
        assert_eq!(in_locked_memory(&scene), 0);
        if can_mount() {
            let scene = Scene::with(verify, style);
            let mount = Mounted::new(How { limits: long_memory(), ..How::default() }, || scene.model.clone());
            let refused = std::fs::read(mount.path(VICTIM)).expect_err("another key");
            assert_eq!(refused.raw_os_error(), Some(libc::EIO));
            assert_eq!(children::touch(&mount.path(VICTIM), 0, true), Touch::Killed(libc::SIGBUS));
            assert_eq!(scene.fetches(0), 1);
        }
    }
}

#[test]
fn a_refusal_is_remembered_for_ten_seconds_unless_told_otherwise() {
    assert_eq!(CacheLimits::default().refusal_memory, Duration::from_secs(10));
}
