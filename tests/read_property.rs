//! The read path against a plain byte vector: any file size, any offset and length, any interleaving of readers, any
//! cache down to two chunks, a healthy store or one that fails by script. The exact bytes or a named error: never a wrong
//! byte, never a short read before the end.
//!
//! `MODELFS_TEST_SEED=N` replays a run, `MODELFS_TEST_CASES=N` sets how many reads each test makes (default 12,000).

#[path = "common/fixture.rs"]
mod fixture;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fixture::{Fixture, Random, Style};
use modelfs::cache::{Cache, CacheLimits, Model};
use modelfs::crypto::Verify;
use modelfs::error::Code;
use modelfs::format::{HashAlg, Suite, names};
use modelfs::mem::{Arena, ArenaPlan};
use modelfs::read::{OpenFile, Reader};
use modelfs::store::fault::{Call, Fault, Faulty, When};
use modelfs::store::memory::MemoryStore;
use modelfs::store::patient::{Patience, Patient};
use modelfs::telemetry::Telemetry;

const CHUNK: u64 = 1 << 20;

fn cases() -> u64 {
    std::env::var("MODELFS_TEST_CASES").map_or(12_000, |text| text.parse().expect("MODELFS_TEST_CASES is a number"))
}

fn style(random: &mut Random) -> Style {
    Style {
        suite: *random.pick(&[Suite::Aes256Gcm, Suite::ChaCha20Poly1305]),
        hash_alg: *random.pick(&[HashAlg::Blake3, HashAlg::Sha256]),
        block_log2: *random.pick(&[12, 14, 16, 20]),
        chunk_log2: 20,
        pack_below: *random.pick(&[0, 100_000, 3 << 20]),
        coded: random.one_in(2),
        slice: *random.pick(&[usize::MAX, usize::MAX, 4096 * 300, 2 << 20]),
        ..Style::default()
    }
}

/// Sizes at, just below and just above every edge of the layout, and anything between.
fn size(random: &mut Random) -> usize {
    let edges =
        [0u64, 1, 4095, 4096, 4097, 65_535, 65_536, 65_537, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7];
    match random.below(3) {
        0 => *random.pick(&edges) as usize,
        1 => random.below(70_000) as usize,
        _ => random.below(5 * CHUNK) as usize,
    }
}

fn files(random: &mut Random) -> Vec<(String, Vec<u8>)> {
    (0..1 + random.below(6))
        .map(|i| {
            let len = size(random);
            (format!("d{}/file-{i}.bin", i % 2), random.bytes(len))
        })
        .collect()
}

/// An offset and a length, mostly inside, sometimes across or beyond the end.
fn range(random: &mut Random, size: u64) -> (u64, usize) {
    let offset = match random.below(10) {
        0 => size,
        1 => size.saturating_add(random.below(10_000)),
        2 => u64::MAX - random.below(10),
        3 => (random.below(size / CHUNK + 1) * CHUNK).saturating_sub(random.below(64)),
        _ => random.below(size + 1),
    };
    let len = match random.below(4) {
        0 => random.below(16),
        1 => 4096,
        2 => random.below(200_000),
        _ => random.below(1 << 20) + 1,
    };
    (offset, len as usize)
}

fn expected(bytes: &[u8], offset: u64, len: usize) -> &[u8] {
    let start = offset.min(bytes.len() as u64) as usize;
    let end = offset.saturating_add(len as u64).min(bytes.len() as u64) as usize;
    &bytes[start..end.max(start)]
}

/// One random model with everything open, over a store that can be scripted.
struct World {
    runtime: Arc<tokio::runtime::Runtime>,
    about: String,
    store: Faulty<MemoryStore>,
    model: Arc<Model>,
    cache: Cache,
    reader: Arc<Reader>,
    open: Arc<Vec<OpenFile>>,
    plain: Arc<Vec<Vec<u8>>>,
    budget: u64,
}

/// For what a healthy store never meets, on any machine.
const LONG: Duration = Duration::from_secs(600);

/// Short, so that a world of faults is over soon.
const DEADLINE: Duration = Duration::from_millis(400);
const ATTEMPT: Duration = Duration::from_millis(60);
const REFUSAL_MEMORY: Duration = Duration::from_millis(10);

impl World {
    fn new(
        random: &mut Random,
        runtime: &Arc<tokio::runtime::Runtime>,
        limits: CacheLimits,
        deadline: Duration,
    ) -> World {
        let style = style(random);
        let fixture = runtime.block_on(Fixture::seal(files(random), style, random));
        let budget = CHUNK * (2 + random.below(7));
        let arena = Arena::open(ArenaPlan { bytes: budget }).expect("arena");
        let telemetry = Arc::new(Telemetry::default());
        let cache = Cache::new(arena, budget, limits, runtime.handle().clone(), telemetry).expect("cache");
        let reader = Arc::new(Reader::new(cache.clone(), deadline).expect("reader"));
        let verify = *random.pick(&[Verify::Strict, Verify::Aead]);
        let store = Faulty::new((*fixture.store).clone());
        let patience = Patience {
            attempt: ATTEMPT,
            budget: 3 * ATTEMPT,
            attempts_max: 2,
            pause_first: Duration::from_millis(1),
            ..Patience::default()
        };
        let model = fixture.model(Arc::new(Patient::new(store.clone(), patience)), verify);
        let open = (0..fixture.files.len()).map(|i| OpenFile::new(&cache, &model, i as u32)).collect();
        let plain_of = |path: &str| fixture.files.iter().find(|(p, _)| p == path).expect("same files").1.clone();
        let plain = model.manifest.files().iter().map(|file| plain_of(model.manifest.path(file))).collect();
        World {
            runtime: runtime.clone(),
            about: format!("{style:?}, {verify:?}, cache {budget}"),
            store,
            model,
            cache,
            reader,
            open: Arc::new(open),
            plain: Arc::new(plain),
            budget,
        }
    }

    /// Several readers at once, each with reads of its own. Bytes are exact; `allowed` says of errors whether they may be.
    /// Returns how many reads there were and how many of them were refused.
    fn read_at_random(&self, random: &mut Random, allowed: Arc<HashSet<Code>>) -> (u64, u64) {
        const EACH: u64 = 40;
        let readers = 1 + random.below(8);
        let refused = Arc::new(Mutex::new(0));
        let tasks: Vec<_> = (0..readers)
            .map(|_| {
                let mut random = Random(random.next());
                let (reader, open, plain) = (self.reader.clone(), self.open.clone(), self.plain.clone());
                let (allowed, refused) = (allowed.clone(), refused.clone());
                self.runtime.spawn(async move {
                    for _ in 0..EACH {
                        let which = random.below(open.len() as u64) as usize;
                        let (offset, len) = range(&mut random, open[which].size);
                        match reader.read(&open[which], offset, len).await {
                            Ok(answer) => {
                                let want = expected(&plain[which], offset, len);
                                assert_eq!(answer.bytes().len(), want.len(), "file {which} {offset} {len}");
                                assert!(answer.bytes() == want, "wrong bytes: file {which} {offset} {len}");
                            }
                            Err(error) => {
                                assert!(allowed.contains(&error.code()), "{allowed:?}, got {error:?}");
                                *refused.lock().expect("a count") += 1;
                            }
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            self.runtime.block_on(task).unwrap_or_else(|e| panic!("{e}; {}", self.about));
        }
        let refused = *refused.lock().expect("a count");
        (readers * EACH, refused)
    }

    /// Every byte of every file, in order; `Err` with the first refusal.
    fn read_everything(&self) -> modelfs::error::Result<()> {
        for (file, plain) in self.open.iter().zip(self.plain.iter()) {
            for offset in (0..file.size).step_by(modelfs::read::READ_MAX) {
                let answer = self.runtime.block_on(self.reader.read(file, offset, modelfs::read::READ_MAX))?;
                let want = expected(plain, offset, modelfs::read::READ_MAX);
                assert!(answer.bytes() == want, "wrong bytes at {offset}; {}", self.about);
            }
        }
        Ok(())
    }

    /// What the chunks that can be read at once cost.
    fn resident(&self) -> u64 {
        let mut sum = 0;
        for (number, entry) in self.model.manifest.objects().iter().enumerate() {
            let object = self.cache.object(&self.model, number as u32, false);
            for index in entry.layout.chunks() {
                let range = entry.layout.chunk_plain(index);
                if self.cache.try_pin_run(&object, range.clone()).is_some() {
                    sum += (range.end - range.start).next_multiple_of(4096);
                }
            }
        }
        sum
    }

    /// No byte over the budget, none leaked, none left.
    fn end(self) {
        let budget = self.cache.budget();
        assert!(budget.peak() <= self.budget, "{} of {}; {}", budget.peak(), self.budget, self.about);
        let deadline = Instant::now() + Duration::from_secs(120);
        // Fetches that nobody waits for may still be on their way.
        while budget.in_use() != self.resident() {
            assert!(
                Instant::now() < deadline,
                "{} in use, {} resident; {}",
                budget.in_use(),
                self.resident(),
                self.about
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(self.open);
        let report = self.cache.wipe_all(true);
        assert_eq!(report.held_objects, 0, "{report:?}; {}", self.about);
        assert_eq!(self.cache.budget().in_use(), 0, "{}", self.about);
    }
}

fn runtime() -> Arc<tokio::runtime::Runtime> {
    Arc::new(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime"))
}

#[test]
fn every_read_is_exactly_the_bytes_of_the_file() {
    let mut random = Random::announced("read property");
    let runtime = runtime();
    let mut done = 0;
    while done < cases() {
        let limits = CacheLimits { room_deadline: LONG, ..CacheLimits::default() };
        let world = World::new(&mut random, &runtime, limits, LONG);
        let (reads, refused) = world.read_at_random(&mut random, Arc::default());
        assert_eq!(refused, 0);
        world.end();
        done += reads;
    }
    eprintln!("{done} reads");
}

/// One fault, somewhere, for a while. What it may do to readers goes into `allowed`.
fn script(random: &mut Random, world: &World, allowed: &mut HashSet<Code>) {
    let objects = world.model.manifest.objects();
    if objects.is_empty() {
        return;
    }
    let name = |random: &mut Random| names::data(world.model.manifest.header().model_id, random.pick(objects).oid);
    let entry = random.pick(objects);
    let stored_len = entry.layout.stored_len();
    let at = 128 + random.below(stored_len - 128);
    let content = [Code::ChunkHash, Code::Tag, Code::Length];
    let (fault, codes): (Fault, &[Code]) = match random.below(14) {
        0 => (Fault::Fail(Code::NotFound), &[Code::NotFound]),
        1 => (Fault::Fail(Code::StoreDenied), &[Code::StoreDenied]),
        2 => (Fault::Fail(Code::Unreachable), &[Code::Unreachable]),
        3 => (Fault::Truncate(1 + random.below(5000)), &[Code::Length]),
        4 => (Fault::Truncate(u64::MAX), &[Code::Length]),
        5 => (Fault::Extend(1 + random.below(5000)), &[Code::Length]),
        6 => (Fault::Endless, &[Code::Length]),
        7 => (Fault::FlipBit { offset: at, bit: random.below(8) as u8 }, &content[..2]),
        8 => (Fault::Zero(at..stored_len.min(at + 1 + random.below(100_000))), &content[..2]),
        9 => (Fault::Instead { name: name(random), start: 128 + random.below(3) * CHUNK }, &content),
        10 => (Fault::Shift(random.below(10_000) as i64 - 5_000), &content),
        11 => (Fault::Delay(Duration::from_millis(random.below(20))), &[]),
        // Longer than an attempt, shorter than the deadline of a read.
        12 => (Fault::Delay(ATTEMPT + Duration::from_millis(20)), &[]),
        _ => (Fault::Stall, &[]),
    };
    allowed.extend(codes);
    let mut when = When::call(Call::ReadRange);
    // Offsets mean something in one object only.
    if matches!(fault, Fault::FlipBit { .. } | Fault::Zero(_)) || random.one_in(2) {
        when = when.name(&names::data(world.model.manifest.header().model_id, entry.oid));
    }
    when = when.after(random.below(6) as u32);
    if random.one_in(2) {
        when = when.times(1 + random.below(5) as u32);
    }
    world.store.on(when, fault);
}

#[test]
fn a_failing_store_costs_errors_never_a_wrong_byte_and_nothing_lasts() {
    let mut random = Random::announced("read property, faults");
    let runtime = runtime();
    let (mut done, mut refusals, mut worlds) = (0, 0, 0);
    while done < cases() {
        // Room is waited for longer than a read waits: of both deadlines it is always the read's that is told.
        let limits = CacheLimits {
            refusal_memory: REFUSAL_MEMORY,
            outage_memory: REFUSAL_MEMORY,
            room_deadline: LONG,
            ..CacheLimits::default()
        };
        let world = World::new(&mut random, &runtime, limits, DEADLINE);
        // A busy machine may miss these short deadlines even where no fault is slow.
        let mut allowed = HashSet::from([Code::Deadline]);
        for _ in 0..1 + random.below(4) {
            script(&mut random, &world, &mut allowed);
        }
        let (reads, refused) = world.read_at_random(&mut random, Arc::new(allowed));
        world.store.heal();
        // Attempts that stall end by themselves, then their refusal is forgotten.
        let deadline = Instant::now() + Duration::from_secs(120);
        while let Err(error) = world.read_everything() {
            assert!(Instant::now() < deadline, "the faults are over: {error:?}; {}", world.about);
            std::thread::sleep(REFUSAL_MEMORY);
        }
        world.end();
        done += reads;
        refusals += refused;
        worlds += 1;
    }
    eprintln!("{done} reads in {worlds} worlds, {refusals} refused");
    assert!(refusals > 0, "the faults never met a read");
}

/// Readahead wants a little room beside its own for readers that may come; it must not throw out of the cache, for that, what
/// was read a moment ago and would be read again.
#[test]
fn a_model_that_fits_is_not_thrown_out_by_its_own_readahead() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let mut random = Random(7);
    // Not whole objects: of a pack, every chunk leaves by itself.
    let files: Vec<_> = (0..30).map(|i| (format!("file-{i:02}"), random.bytes(2 << 20))).collect();
    let style = Style { pack_below: 3 << 20, ..Style::default() };
    let fixture = runtime.block_on(Fixture::seal(files, style, &mut random));
    let budget = 66 * CHUNK;
    let arena = Arena::open(ArenaPlan { bytes: budget }).expect("arena");
    let telemetry = Arc::new(Telemetry::default());
    let limits = CacheLimits::default();
    let cache = Cache::new(arena, budget, limits, runtime.handle().clone(), telemetry).expect("cache");
    let reader = Reader::new(cache.clone(), Duration::from_secs(30)).expect("reader");
    let model = fixture.model(fixture.store.clone(), Verify::Strict);
    for _ in 0..2 {
        for (index, (_, bytes)) in fixture.files.iter().enumerate() {
            let file = OpenFile::new(&cache, &model, index as u32);
            for at in (0..bytes.len()).step_by(256 << 10) {
                let answer = runtime.block_on(reader.read(&file, at as u64, 256 << 10)).expect("read");
                assert!(answer.bytes() == &bytes[at..at + (256 << 10)]);
            }
        }
    }
    assert_eq!(cache.telemetry().evicted_bytes.get(), 0);
    assert_eq!(cache.telemetry().chunks_opened.get(), 60, "each chunk once");
}
