//! Revocation, through the kernel: what programs have of a locked model ends at once, nothing of it stays in memory, and
//! one session alone can be shut out.
//!
//! Readers are other processes: a map of a locked model is SIGBUS. Every byte of the models is other than zero, so that a
//! zero in place of data is noticed. How long after `lock` the last access came is printed, not asserted; asserted is the
//! order: no access that began after the lock was done has succeeded.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/needle.rs"]
mod needle;
#[path = "common/no_uring.rs"]
mod no_uring;
#[path = "common/program.rs"]
mod program;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fixture::{Fixture, Random, Style};
use modelfs::cache::{CacheLimits, LockReport, Model};
use modelfs::control::{self, AccessRequest, Taken};
use modelfs::crypto::Verify;
use modelfs::fuse::{Behaviour, OpenBy, OpenPolicy};
use modelfs::host::Revoker;
use modelfs::mem::{ArenaKind, can_pin};
use modelfs::read::OpenFile;
use modelfs::store::fault::{Call, Fault, Faulty, When};
use mounted::{How, Mounted, can_mount, skip};
use needle::{MARKER_BYTES, Needle};
use no_uring::without_io_uring;
use program::{Program, run_ok};

const WISH: &str = "MODELFS_TEST_LOCK_CHILD";
const BIG: &str = "model.safetensors";
const BIG_BYTES: usize = (40 << 20) + 12_345;

fn sample() -> Fixture {
    let mut random = Random::announced("lock");
    let mut bytes = |len| random.bytes(len).into_iter().map(|byte| byte | 1).collect::<Vec<u8>>();
    let files = vec![("config.json".to_owned(), bytes(700)), (BIG.to_owned(), bytes(BIG_BYTES))];
    let style = Style { chunk_log2: 23, pack_below: 2 << 20, ..Style::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(Fixture::seal(files, style, &mut Random(7)))
}

fn mount(fixture: &Fixture, open: OpenPolicy, arena: Option<ArenaKind>) -> Mounted {
    let behaviour = Behaviour { open, ..Behaviour::default() };
    Mounted::new(How { behaviour, arena, ..How::default() }, || fixture.model(fixture.store.clone(), Verify::Strict))
}

fn lock(mount: &Mounted) -> LockReport {
    mount.fs.lock(&mount.fs.vfs().models())
}

fn unlock(model: &Model, fixture: &Fixture) {
    assert!(model.unlock(fixture.keys(), model.locks()), "nobody else locks it");
}

fn arenas() -> [ArenaKind; 2] {
    [ArenaKind::DetachedTmpfs, ArenaKind::LockedMemfd]
}

fn errno(result: std::io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn is_refused(path: &Path) -> bool {
    errno(File::open(path)) == Some(libc::EACCES)
}

/// Nanoseconds of the clock that all processes share.
fn now_ns() -> u64 {
    // SAFETY: fills our own variable.
    unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time);
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }
}

// ---- The readers ----------------------------------------------------------------------------------------------------

/// When the last access that succeeded began.
static LAST: AtomicU64 = AtomicU64::new(0);

/// Not a test of its own: a reader in another process, which reads until it may not.
#[test]
fn child() {
    let Ok(wish) = std::env::var(WISH) else { return };
    let (verb, path) = wish.split_once('|').expect("a verb and a path");
    let file = File::open(path).expect("open");
    match verb {
        "read" => read_on(&file),
        "map" => map_on(&file),
        "hold" => {
            let len = file.metadata().expect("stat").len();
            println!("READING {}", map(&file, len as usize)[0]);
            std::thread::sleep(Duration::from_secs(600));
        }
        _ => panic!("{verb}?"),
    }
}

fn end(how: &str) -> ! {
    println!("END {} {how}", LAST.load(Ordering::SeqCst));
    std::process::exit(0)
}

fn read_on(file: &File) {
    let size = file.metadata().expect("stat").len();
    let mut piece = vec![0; 1 << 20];
    let mut at = 0;
    let mut told = false;
    loop {
        let began = now_ns();
        match file.read_at(&mut piece, at) {
            Ok(0) => end("eof"),
            Ok(got) if piece[..got].contains(&0) => end("ZEROS"),
            Ok(got) => at += got as u64,
            Err(error) => end(&format!("errno {}", error.raw_os_error().expect("an errno"))),
        }
        LAST.store(began, Ordering::SeqCst);
        if at >= size {
            at = 0;
            if !told {
                println!("READING");
                told = true;
            }
        }
    }
}

fn map(file: &File, len: usize) -> &'static [u8] {
    // SAFETY: a fresh read-only map of an open file, never unmapped.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        std::slice::from_raw_parts(at.cast(), len)
    }
}

extern "C" fn on_sigbus(_signal: libc::c_int) {
    // Raised by the read below and nowhere else, so that no lock of the allocator or of standard output is held.
    end("SIGBUS")
}

fn map_on(file: &File) {
    let bytes = map(file, file.metadata().expect("stat").len() as usize);
    // SAFETY: a handler for this process.
    unsafe { libc::signal(libc::SIGBUS, on_sigbus as *const () as libc::sighandler_t) };
    let mut told = false;
    loop {
        for at in (0..bytes.len()).step_by(1024) {
            let began = now_ns();
            // SAFETY: inside the map; what the kernel makes of it is the test.
            let byte = unsafe { std::ptr::read_volatile(&bytes[at]) };
            if byte == 0 {
                end("ZEROS");
            }
            LAST.store(began, Ordering::SeqCst);
        }
        if !told {
            println!("READING");
            told = true;
        }
    }
}

struct Reader {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Reader {
    /// Started, and once through the file.
    fn start(verb: &str, path: &Path) -> Reader {
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command.args(["child", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(WISH, format!("{verb}|{}", path.display())).stdout(Stdio::piped());
        let mut child = command.spawn().expect("started");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut reader = Reader { child, lines };
        reader.wait_for("READING");
        reader
    }

    fn wait_for(&mut self, word: &str) -> String {
        for line in self.lines.by_ref() {
            let line = line.expect("text");
            // The harness may have written `test child ... ` before it.
            if let Some(at) = line.find(word) {
                return line[at..].to_owned();
            }
            assert!(!line.contains("END"), "{line}");
        }
        panic!("the reader ended without {word}: {:?}", self.child.wait());
    }

    /// How it ended, and when its last access that succeeded began.
    fn end(mut self) -> (String, u64) {
        let line = self.wait_for("END");
        let (last, how) = line["END ".len()..].split_once(' ').expect("a time and a word");
        (how.to_owned(), last.parse().expect("a number"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// That a lock is bounded is what it promises: of 40 MiB everything is refused and wiped within this on any machine.
const LOCKED_WITHIN: Duration = Duration::from_secs(120);

/// Locks while `readers` read; each must end as it says, before the lock was done.
fn lock_under(mount: &Mounted, readers: Vec<(&str, &str)>, what: &str) -> LockReport {
    let path = mount.path(BIG);
    let running: Vec<(Reader, &str)> =
        readers.into_iter().map(|(verb, ends)| (Reader::start(verb, &path), ends)).collect();
    let began = now_ns();
    let report = lock(mount);
    let done = now_ns();
    for (reader, wanted) in running {
        let (how, last) = reader.end();
        println!(
            "{what}, {wanted}: last access {:+.2} ms from the lock, which took {:.1} ms",
            (last as f64 - began as f64) / 1e6,
            (done - began) as f64 / 1e6
        );
        assert_eq!(how, wanted, "{what}");
        assert!(last < done, "{what}: an access that began {} ns after the lock was done succeeded", last - done);
    }
    assert!(Duration::from_nanos(done - began) < LOCKED_WITHIN, "{what}: the lock took {} ns", done - began);
    report
}

// ---- The rules ------------------------------------------------------------------------------------------------------

#[test]
fn what_programs_have_past_the_daemon_ends_and_is_overwritten() {
    if !can_mount() {
        return;
    }
    for arena in arenas() {
        let fixture = sample();
        let mount = mount(&fixture, OpenPolicy::Whole, Some(arena));
        if !mount.has_passthrough() {
            return;
        }
        let held = File::open(mount.path(BIG)).expect("open");
        assert!(mount.hot_opens() > 0);
        // A pipe keeps pages of the model beyond its end: the witness of what became of them.
        let mut pipe = pipe_of_pages(&held);

        let report = lock_under(&mount, vec![("read", "eof"), ("map", "SIGBUS")], &format!("{arena:?}, passthrough"));

        assert!(is_refused(&mount.path(BIG)) && is_refused(&mount.path("config.json")));
        assert_eq!(held.read_at(&mut [0; 64], 0).expect("read"), 0, "an open descriptor is at its end");
        assert_eq!(held.metadata().expect("stat").len(), BIG_BYTES as u64);
        let (wiped, unwiped) = if can_pin().is_ok() { (report.wiped_bytes, 0) } else { (0, report.unwiped_bytes) };
        assert!(wiped + unwiped >= BIG_BYTES as u64 && report.kept_bytes == 0, "{report:?}");
        assert_eq!(report.unwiped_bytes, unwiped);
        let mut seen = vec![0xff; 4096];
        pipe.read_exact(&mut seen).expect("the pipe holds a page");
        assert_eq!(seen.iter().all(|byte| *byte == 0), can_pin().is_ok(), "{arena:?}: the pages were not overwritten");
        assert_eq!(mount.cache.budget().in_use(), 0);
    }
}

fn pipe_of_pages(file: &File) -> File {
    let mut ends = [0; 2];
    let mut offset = 0;
    // SAFETY: fills our own descriptors, then moves 4096 bytes' worth of pages into the pipe.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        let moved = libc::splice(file.as_raw_fd(), &mut offset, ends[1], std::ptr::null_mut(), 4096, 0);
        assert_eq!(moved, 4096, "{}", std::io::Error::last_os_error());
        libc::close(ends[1]);
        File::from_raw_fd(ends[0])
    }
}

#[test]
fn where_pages_cannot_be_pinned_readers_are_cut_off_all_the_same_and_the_report_says_so() {
    if !can_mount() {
        return;
    }
    for arena in arenas() {
        let fixture = sample();
        let mount = mount(&fixture, OpenPolicy::Whole, Some(arena));
        if !mount.has_passthrough() {
            return;
        }
        let path = mount.path(BIG);
        let readers = [("read", "eof"), ("map", "SIGBUS")].map(|(verb, ends)| (Reader::start(verb, &path), ends));
        std::fs::read(mount.path("config.json")).expect("read");
        // The kernel tells of a close when it likes; until then the file counts as held.
        mount.wait_until("the close", |mount| {
            let named = |open: &OpenBy| mount.fs.vfs().file_name(open.node);
            mount.fs.open_by().iter().all(|open| named(open).is_none_or(|name| name != "config.json"))
        });

        let report = without_io_uring(|| lock(&mount));

        for (reader, wanted) in readers {
            assert_eq!(reader.end().0, wanted, "{arena:?}");
        }
        assert_eq!(report.unwiped_bytes, BIG_BYTES as u64, "{report:?}");
        assert_eq!(mount.cache.telemetry().unwiped_bytes.get(), BIG_BYTES as u64);
        // What nobody could hold was overwritten in place.
        assert!(report.wiped_bytes >= 700 && report.kept_bytes == 0, "{report:?}");
        assert!(is_refused(&path));
    }
}

#[test]
fn what_something_of_ours_is_still_at_holds_up_the_cut_of_nothing_else() {
    if !can_mount() {
        return;
    }
    // In the order of the manifest.
    let names = ["busy.safetensors", "free.safetensors", "part.safetensors"];
    let [busy, free, part] = names;
    for arena in arenas() {
        let mut random = Random::announced("lock");
        let mut bytes = |len| random.bytes(len).into_iter().map(|byte| byte | 1).collect::<Vec<u8>>();
        let files = names.map(|name| (name.to_owned(), bytes(BIG_BYTES)));
        let style = Style { chunk_log2: 23, pack_below: 2 << 20, ..Style::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let fixture = runtime.block_on(Fixture::seal(files.into(), style, &mut Random(7)));
        // What is busy stays so until the test lets go.
        let limits = CacheLimits { quiet_deadline: 2 * HANGS_AFTER, ..CacheLimits::default() };
        let behaviour = Behaviour { open: OpenPolicy::Whole, ..Behaviour::default() };
        let how = How { behaviour, limits, arena: Some(arena), ..How::default() };
        let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
        if !mount.has_passthrough() {
            return;
        }
        let model = mount.fs.vfs().models()[0].clone();
        let open = |name: &str| {
            let at = fixture.files.iter().position(|(path, _)| path == name).expect("sealed");
            OpenFile::new(&mount.cache, &model, at as u32)
        };
        let mut free_reader = Reader::start("map", &mount.path(free));
        let mut busy_reader = Reader::start("map", &mount.path(busy));
        let part = open(part);
        runtime.block_on(mount.fs.reader().read(&part, 0, 100)).map(drop).expect("read");
        let part = part.sole_object().expect("one object").clone();
        assert!(part.resident_bytes() > 0 && !part.is_whole(), "the test shows nothing");
        // An answer of ours that does not let go.
        let answer = mount.fs.reader().try_read(&open(busy), 0, 100).expect("resident");

        let (cache, models) = (mount.cache.clone(), [model.clone()]);
        let revoking = std::thread::spawn(move || cache.cut(&models).wipe(&cache));

        let deadline = Instant::now() + HANGS_AFTER;
        while free_reader.child.try_wait().expect("wait").is_none() {
            assert!(Instant::now() < deadline, "{arena:?}: it waits for an answer that is none of its own");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(free_reader.end().0, "SIGBUS", "{arena:?}");
        mount.wait_until("what is there in part to be taken too", |_| part.resident_bytes() == 0);
        assert!(!revoking.is_finished() && busy_reader.child.try_wait().expect("wait").is_none());
        drop(answer);
        let report = revoking.join().expect("revoked");
        assert_eq!(busy_reader.end().0, "SIGBUS");
        assert_eq!(report.kept_bytes, 0, "{report:?}");
        assert!(report.wiped_bytes + report.unwiped_bytes > 2 * BIG_BYTES as u64, "{report:?}");
    }
}

#[test]
fn keys_that_are_taken_back_lock_the_mount() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = mount(&fixture, OpenPolicy::Lazy, None);
    let path = mount.path(BIG);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let layers = modelfs::config::Layers::default();
    let access = modelfs::config::Access::from_layers(&layers).expect("no options");
    let revoker = Revoker::new(mount.fs.clone(), "/nowhere".parse().expect("a path"), access, runtime.handle().clone());
    // How the keys' owner tells: away for a while, and lost for good.
    let state = tokio::sync::watch::Sender::new("lent");
    revoker.lock_when_lost(state.subscribe(), |state| (*state == "lost").then(|| "token revoked".to_string()));
    state.send_replace("away");
    assert!(std::fs::read(&path).expect("served while the owner is away").len() == BIG_BYTES);

    let began = Instant::now();
    state.send_replace("lost");

    mount.wait_until("the lock", |mount| mount.fs.vfs().models()[0].is_locked());
    println!("refused {:.2} ms after the loss was known", began.elapsed().as_secs_f64() * 1e3);
    mount.wait_until("the wipe", |mount| mount.cache.budget().in_use() == 0);
    assert!(is_refused(&path));

    // Unlocked by hand and lost once more: locked once more.
    unlock(&mount.fs.vfs().models()[0], &fixture);
    assert!(File::open(&path).is_ok());
    state.send_replace("lost");
    mount.wait_until("the second lock", |mount| mount.fs.vfs().models()[0].is_locked());
}

#[test]
fn what_programs_read_through_the_daemon_is_refused_and_leaves_the_page_cache() {
    if !can_mount() {
        return;
    }
    for arena in arenas() {
        let fixture = sample();
        let mount = mount(&fixture, OpenPolicy::Lazy, Some(arena));
        mount.fs.set_passthrough(false);
        let held = File::open(mount.path(BIG)).expect("open");
        let small = File::open(mount.path("config.json")).expect("open");
        let mut piece = vec![0; 4096];
        small.read_at(&mut piece, 0).expect("read");
        let readers = vec![("read", "errno 13"), ("map", "SIGBUS")];

        // That the page is in the page cache now: another read of it does not reach us.
        held.read_at(&mut piece, 0).expect("read");
        let before = mount.cache.telemetry().reads.get();
        held.read_at(&mut piece, 0).expect("read");
        assert_eq!(mount.cache.telemetry().reads.get(), before, "the test shows nothing: the page is not kept");

        let report = lock_under(&mount, readers, &format!("{arena:?}, through the daemon"));

        for file in [&held, &small] {
            assert_eq!(errno(file.read_at(&mut piece, 0)), Some(libc::EACCES));
        }
        assert!(is_refused(&mount.path(BIG)) && is_refused(&mount.path("config.json")));
        assert!(report.wiped_bytes >= BIG_BYTES as u64 && report.unwiped_bytes == 0, "{report:?}");
        assert_eq!(mount.cache.budget().in_use(), 0);
        // Names and sizes stay.
        assert_eq!(std::fs::metadata(mount.path(BIG)).expect("stat").len(), BIG_BYTES as u64);
        assert_eq!(std::fs::read_dir(mount.root()).expect("list").count(), 2);
        // An unlock gives descriptors through the daemon back.
        unlock(&mount.fs.vfs().models()[0], &fixture);
        assert_eq!(held.read_at(&mut piece, 0).expect("read"), 4096);
        assert!(fixture.files.iter().any(|(path, bytes)| path == BIG && bytes[..4096] == piece[..]));
    }
}

#[test]
fn those_who_wait_for_a_silent_store_are_refused_at_once() {
    if !can_mount() {
        return;
    }
    for (open, word) in [(OpenPolicy::Lazy, "read"), (OpenPolicy::Whole, "open")] {
        let fixture = sample();
        let store = Faulty::new((*fixture.store).clone());
        store.on(When::call(Call::ReadRange), Fault::Stall);
        let behaviour = Behaviour { open, ..Behaviour::default() };
        let source = Arc::new(store.clone());
        let how = How { behaviour, read_deadline: HANGS_AFTER, ..How::default() };
        let mount = Mounted::new(how, || fixture.model(source, Verify::Strict));
        let path = mount.path(BIG);
        let held = open == OpenPolicy::Whole && mount.fs.passthrough();
        let waiting =
            std::thread::spawn(move || -> std::io::Result<usize> { File::open(path)?.read_at(&mut [0; 100], 0) });
        let telemetry = mount.cache.telemetry();
        mount.wait_until("somebody to wait", |_| {
            if held { telemetry.opens_held.get() > 0 } else { telemetry.cache_misses.get() > 0 }
        });
        mount.wait_until("the store to be asked", |_| store.count(Call::ReadRange) > 0);
        assert!(!waiting.is_finished());

        let began = Instant::now();
        lock(&mount);

        assert_eq!(errno(waiting.join().expect("a reader")), Some(libc::EACCES), "{word}");
        println!("a held {word} was refused within {:.1} ms of the lock", began.elapsed().as_secs_f64() * 1e3);
    }
}

#[test]
fn an_unlocked_model_is_served_again_from_an_empty_cache_beside_what_the_lock_ended() {
    if !can_mount() {
        return;
    }
    for arena in arenas() {
        let fixture = sample();
        let mount = mount(&fixture, OpenPolicy::Whole, Some(arena));
        let model = mount.fs.vfs().models()[0].clone();
        let plain = &fixture.files.iter().find(|(path, _)| path == BIG).expect("sealed").1;
        // Held throughout: the kernel ties a node to one backing file while anyone has it open.
        let mut held = Vec::new();
        for round in 0..3 {
            let file = File::open(mount.path(BIG)).expect("open");
            assert!(std::fs::read(mount.path(BIG)).expect("read") == *plain, "round {round}");
            assert!(std::fs::read(mount.path("config.json")).expect("read").len() == 700);
            held.push(file);
            let fetched = mount.cache.telemetry().fetch_requests.get();
            lock(&mount);
            assert!(is_refused(&mount.path(BIG)));
            assert_eq!(mount.cache.resident_bytes(model.serial), 0);

            unlock(&model, &fixture);

            assert!(std::fs::read(mount.path(BIG)).expect("read") == *plain, "round {round}");
            assert!(mount.cache.telemetry().fetch_requests.get() > fetched, "what was locked came back from memory");
        }
        if mount.fs.passthrough() {
            assert!(mount.hot_opens() >= 9, "{}", mount.hot_opens());
            for file in &held {
                assert_eq!(file.read_at(&mut [0; 64], 0).expect("read"), 0, "what was cut off stays so");
            }
        }
        drop(held);
        let report = mount.unmount();
        assert_eq!(report.held_objects, 0, "{report:?}");
    }
}

#[test]
fn locks_and_unlocks_under_load_never_show_a_wrong_byte() {
    if !can_mount() {
        return;
    }
    for open in [OpenPolicy::Lazy, OpenPolicy::Auto, OpenPolicy::Whole] {
        let fixture = sample();
        let mount = mount(&fixture, open, None);
        let model = mount.fs.vfs().models()[0].clone();
        let plain = &fixture.files.iter().find(|(path, _)| path == BIG).expect("sealed").1;
        let stop = AtomicBool::new(false);
        let whole_reads = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        let Ok(file) = File::open(mount.path(BIG)) else { continue };
                        let (mut piece, mut at) = (vec![0; 1 << 20], 0);
                        // An error or an early end: cut off. Anything else is data.
                        while let Ok(got @ 1..) = file.read_at(&mut piece, at as u64) {
                            assert!(piece[..got] == plain[at..at + got], "wrong bytes at {at}");
                            at += got;
                        }
                        whole_reads.fetch_add(u64::from(at == plain.len()), Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..8 {
                let before = whole_reads.load(Ordering::SeqCst);
                mount.wait_until("a read from end to end", |_| whole_reads.load(Ordering::SeqCst) > before);
                lock(&mount);
                unlock(&model, &fixture);
            }
            stop.store(true, Ordering::SeqCst);
        });
    }
}

/// How long the tests below wait for what takes moments, before they call it a hang.
const HANGS_AFTER: Duration = Duration::from_secs(240);

#[test]
fn whoever_gives_an_answer_waits_for_no_lock_that_waits_for_the_answer() {
    let fixture = sample();
    let model = fixture.model(fixture.store.clone(), Verify::Strict);
    let (fs, cache, runtime) = mounted::filesystem(How::default(), model.clone());
    let big = fixture.files.iter().position(|(path, _)| path == BIG).expect("sealed");
    let file = OpenFile::new(&cache, &model, big as u32);
    runtime.block_on(fs.reader().read(&file, 0, 100)).map(drop).expect("read");
    let (done, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let admission = model.admit().expect("served");
        let locking = model.clone();
        let locker = std::thread::spawn(move || locking.lock());
        // True as soon as the lock is asked for: it is on its way, and waits for us.
        while !model.is_locked() {
            std::thread::yield_now();
        }
        assert!(fs.reader().try_read(&file, 0, 100).is_none(), "an answer from a model that is being locked");
        drop(admission);
        assert!(locker.join().expect("locked"));
        done.send(()).expect("told");
    });

    told.recv_timeout(HANGS_AFTER).expect("the lock and an answer under way wait for each other");
    runtime.shutdown_background();
}

#[test]
fn an_unlock_whose_keys_were_read_before_a_lock_serves_nothing() {
    let fixture = sample();
    let model = fixture.model(fixture.store.clone(), Verify::Strict);
    model.lock();
    let seen = model.locks();

    model.lock();

    assert!(!model.unlock(fixture.keys(), seen), "unlocked over a later lock");
    assert!(model.is_locked() && model.admit().is_err());
    assert!(model.unlock(fixture.keys(), model.locks()));
    assert!(!model.is_locked() && model.admit().is_ok());
}

/// The wipe of a lock lasts, and an unlock may begin while it does.
#[test]
fn an_unlock_that_began_after_a_lock_is_not_refused_by_the_rest_of_it() {
    let fixture = sample();
    let model = fixture.model(fixture.store.clone(), Verify::Strict);
    let (fs, _cache, runtime) = mounted::filesystem(How::default(), model.clone());
    model.lock();
    let seen = model.locks();

    fs.lock(&fs.vfs().models());

    assert!(model.unlock(fixture.keys(), seen), "nobody has locked it again");
    let seen = model.locks();
    fs.lock(&fs.vfs().models());
    assert!(model.is_locked() && !model.unlock(fixture.keys(), seen), "of one that is served it is a lock");
    runtime.shutdown_timeout(Duration::from_millis(200));
}

/// `locked-opens`: what was locked is waited for as long as was said, and by nobody who is refused for another reason.
#[test]
fn an_open_of_a_locked_model_waits_for_the_unlock_or_fails_as_it_was_configured() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let waits = |time: Duration| {
        let behaviour = Behaviour { locked_opens: Some(time), ..Behaviour::default() };
        Mounted::new(How { behaviour, ..How::default() }, || fixture.model(fixture.store.clone(), Verify::Strict))
    };
    let long = Duration::from_secs(600);
    let held = |mount: &Mounted, end: &dyn Fn()| {
        let path = mount.path("config.json");
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| std::fs::read(&path));
            std::thread::sleep(Duration::from_millis(500));
            assert!(!reader.is_finished(), "it did not wait: {:?}", reader.join());
            // Others are answered meanwhile.
            assert!(std::fs::metadata(&path).is_ok());
            end();
            reader.join().expect("read")
        })
    };

    let mount_waiting = waits(long);
    lock(&mount_waiting);
    let model = mount_waiting.fs.vfs().models()[0].clone();
    let read = held(&mount_waiting, &|| unlock(&model, &fixture)).expect("served once it is unlocked");
    assert_eq!(read.len(), 700);
    lock(&mount_waiting);
    let refused = held(&mount_waiting, &|| mount_waiting.fs.refuse_all(true));
    assert_eq!(errno(refused), Some(libc::EACCES), "whoever is refused anyway does not wait");
    drop(mount_waiting);

    let short = waits(Duration::from_millis(20));
    lock(&short);
    assert!(is_refused(&short.path("config.json")), "when the time is up the lock has the last word");
    drop(short);

    let usual = mount(&fixture, OpenPolicy::Lazy, None);
    lock(&usual);
    assert!(is_refused(&usual.path("config.json")));
}

/// Else a mount that was idle for long is locked again before the operator's program comes.
#[test]
fn an_unlock_counts_as_use() {
    let fixture = sample();
    let model = fixture.model(fixture.store.clone(), Verify::Strict);
    let (fs, _cache, runtime) = mounted::filesystem(How::default(), model);
    let access = modelfs::config::Access::from_layers(&modelfs::config::Layers::default()).expect("no options");
    let revoker = Revoker::new(fs.clone(), "/nowhere".parse().expect("a path"), access, runtime.handle().clone());
    let before = fs.last_used();
    // Longer than the clock of use is fine.
    std::thread::sleep(Duration::from_millis(5));
    revoker.answer(AccessRequest::Unlock { model: None }, Path::new("/mnt")).expect("nothing is locked");
    assert!(fs.last_used() > before);
    runtime.shutdown_timeout(Duration::from_millis(200));
}

#[test]
fn thousands_of_locks_under_readers_hang_neither_the_readers_nor_the_locks() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    // Every read comes to us; a part of the file is resident, the rest is fetched again and again.
    let behaviour = Behaviour { open: OpenPolicy::Lazy, no_page_cache: true, ..Behaviour::default() };
    let how = How { behaviour, budget: 24 << 20, ..How::default() };
    let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
    mount.fs.set_passthrough(false);
    let model = mount.fs.vfs().models()[0].clone();
    let (big, small) =
        (File::open(mount.path(BIG)).expect("open"), File::open(mount.path("config.json")).expect("open"));
    let (stop, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let locks = AtomicU64::new(0);
    let (done, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let (mount, big, small, stop, answers, locks) = (&mount, &big, &small, &stop, &answers, &locks);
        for reader in 0..4u64 {
            scope.spawn(move || {
                let mut piece = vec![0; 64 << 10];
                let mut at = reader << 20;
                while !stop.load(Ordering::SeqCst) {
                    // Two of three are answered from memory.
                    for (file, at) in [(small, 0), (small, 0), (big, at)] {
                        if file.read_at(&mut piece, at).is_ok() {
                            answers.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    at = (at + (1 << 20)) % BIG_BYTES as u64;
                }
            });
        }
        scope.spawn(move || {
            let mut before = 0;
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = told.recv_timeout(HANGS_AFTER) {
                // Slow is no hang.
                let so_far = locks.load(Ordering::Relaxed);
                if so_far > before {
                    before = so_far;
                    continue;
                }
                eprintln!("hangs after {so_far} locks and {} answers", answers.load(Ordering::Relaxed));
                // Its readers cannot be killed before the kernel is told that no answer comes.
                let _ = Command::new("umount").arg("-f").arg(mount.attachment.mountpoint()).status();
                let _ = mount.attachment.detach();
                std::process::exit(101);
            }
        });
        for _ in 0..10_000 {
            model.lock();
            unlock(&model, &fixture);
            locks.fetch_add(1, Ordering::Relaxed);
        }
        done.send(()).expect("told");
        stop.store(true, Ordering::SeqCst);
    });
    assert!(answers.load(Ordering::Relaxed) > 0, "the test shows nothing: no read was answered");
    assert!(std::fs::read(mount.path(BIG)).expect("served").len() == BIG_BYTES);
}

fn tell_sessions(mount: &Mounted) -> Vec<control::SessionInfo> {
    let mountpoint = mount.attachment.mountpoint();
    let taken: Vec<Taken> = mount
        .fs
        .open_by()
        .into_iter()
        .map(|open| Taken {
            pid: open.pid,
            uid: open.uid,
            since: open.since,
            path: mount.path(&mount.fs.vfs().file_name(open.node).expect("a file")),
            passthrough: open.passthrough,
        })
        .collect();
    control::sessions(mountpoint, &taken, |uid, process| mount.fs.is_shut_out(uid, process))
}

#[test]
fn sessions_names_who_has_what_and_how() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = mount(&fixture, OpenPolicy::Whole, None);
    let reader = Reader::start("hold", &mount.path(BIG));
    let pid = reader.child.id();

    let told = tell_sessions(&mount);

    let session = told.iter().find(|it| it.process.pid == pid).unwrap_or_else(|| panic!("{pid} in {told:?}"));
    // SAFETY: reads this process's credentials.
    assert_eq!(session.process.uid, Some(unsafe { libc::getuid() }));
    assert!(session.process.exe.as_ref().is_some_and(|exe| exe == &std::env::current_exe().expect("this test")));
    let file = &session.files[0];
    assert_eq!(session.files.len(), 1, "{session:?}");
    assert!(file.path.ends_with(BIG) && file.mapped && file.opens == 1, "{session:?}");
    assert_eq!(file.passthrough, u64::from(mount.fs.passthrough()));
    drop(reader);
    mount.wait_until("the session to end", |mount| tell_sessions(mount).iter().all(|it| it.process.pid != pid));
}

#[test]
fn one_session_alone_is_shut_out_and_let_in_again() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = mount(&fixture, OpenPolicy::Lazy, None);
    mount.fs.set_passthrough(false);
    let path = mount.path(BIG);
    let reader = Reader::start("read", &path);
    let session = format!("pid={}", reader.child.id()).parse().expect("a session");

    let done = mount.fs.shut_out(session, None, false).expect("shut out");

    assert_eq!((done.plain_handles, done.passthrough_handles), (1, 0));
    let (how, _) = reader.end();
    assert_eq!(how, "errno 13", "its reads through the daemon are refused");
    assert!(std::fs::read(&path).expect("we are not shut out").len() == BIG_BYTES);

    // SAFETY: reads this process's credentials.
    let me: modelfs::fuse::Session = format!("uid={}", unsafe { libc::getuid() }).parse().expect("a session");
    let held = File::open(&path).expect("open");
    mount.fs.shut_out(me.clone(), None, false).expect("shut out");
    assert!(is_refused(&path));
    assert_eq!(errno(held.read_at(&mut [0; 100], 0)), Some(libc::EACCES));
    assert!(mount.fs.let_in(&me) && !mount.fs.let_in(&me));
    assert!(std::fs::read(&path).expect("let in").len() == BIG_BYTES);

    // A rule with an end ends.
    mount.fs.shut_out(me, Some(Duration::from_millis(20)), false).expect("shut out");
    mount.wait_until("the rule to end", |_| File::open(&path).is_ok());
    assert!(mount.fs.shut_out_now().iter().all(|(session, _)| session.to_string().starts_with("pid=")));
}

#[test]
fn who_reads_past_the_daemon_is_told_and_only_hard_ends_it() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = mount(&fixture, OpenPolicy::Whole, None);
    if !mount.has_passthrough() {
        return;
    }
    let path = mount.path(BIG);
    let mut reader = Reader::start("map", &path);
    let session: modelfs::fuse::Session = format!("pid={}", reader.child.id()).parse().expect("a session");

    let soft = mount.fs.shut_out(session.clone(), None, false).expect("shut out");
    assert_eq!((soft.passthrough_handles, soft.objects_retired), (1, 0));
    assert!(reader.child.try_wait().expect("wait").is_none());
    let told = tell_sessions(&mount);
    assert!(told.iter().any(|it| it.shut_out && it.process.pid == reader.child.id() && it.files[0].mapped), "{told:?}");

    let hard = mount.fs.shut_out(session, None, true).expect("shut out");

    assert_eq!(hard.objects_retired, 1);
    assert_eq!(reader.end().0, "SIGBUS");
    assert!(std::fs::read(&path).expect("others go on, with new memory").len() == BIG_BYTES);
}

#[test]
fn a_file_that_is_taken_away_hurts_nobody_who_reads_it_through_the_daemon() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let plain = &fixture.files.iter().find(|(path, _)| path == BIG).expect("sealed").1;
    let behaviour = Behaviour { open: OpenPolicy::Lazy, no_page_cache: true, ..Behaviour::default() };
    let mount =
        Mounted::new(How { behaviour, ..How::default() }, || fixture.model(fixture.store.clone(), Verify::Strict));
    if !mount.has_passthrough() {
        return;
    }
    let model = mount.fs.vfs().models()[0].clone();
    let big = fixture.files.iter().position(|(path, _)| path == BIG).expect("sealed");
    let object = OpenFile::new(&mount.cache, &model, big as u32).sole_object().expect("one object").clone();
    // Opened before the file is whole: their reads come to us for good.
    let cold: Vec<File> = (0..3).map(|_| File::open(mount.path(BIG)).expect("open")).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        for file in &cold {
            scope.spawn(move || {
                let (mut piece, mut at) = (vec![0; 1 << 20], 0);
                while !stop.load(Ordering::SeqCst) {
                    let got = file.read_at(&mut piece, at as u64).expect("nobody took anything from this reader");
                    assert!(got > 0 && piece[..got] == plain[at..at + got], "wrong bytes at {at}");
                    at = (at + got) % plain.len();
                }
            });
        }
        let mut held = Vec::new();
        for round in 0..12 {
            mount.wait_until("the file to be whole", |_| object.is_whole());
            held.push(File::open(mount.path(BIG)).expect("open"));
            let report = mount.cache.retire_held(&object).expect("it was whole");
            assert_eq!(report.kept_bytes, 0, "round {round}: {report:?}");
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(mount.hot_opens() > 0, "the test shows nothing: nobody had the file past the daemon");
}

#[test]
fn a_file_that_cannot_be_taken_away_is_told_as_a_failure_and_can_be_later() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = mount(&fixture, OpenPolicy::Whole, None);
    if !mount.has_passthrough() {
        return;
    }
    let mut reader = Reader::start("map", &mount.path(BIG));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let access = modelfs::config::Access::from_layers(&modelfs::config::Layers::default()).expect("no options");
    let revoker = Revoker::new(mount.fs.clone(), "/nowhere".parse().expect("a path"), access, runtime.handle().clone());
    let session = format!("pid={}", reader.child.id());
    let ask = || {
        let request = AccessRequest::ShutOut { session: session.clone(), seconds: None, hard: true };
        revoker.answer(request, mount.attachment.mountpoint())
    };
    // An answer of ours that does not let go.
    let model = mount.fs.vfs().models()[0].clone();
    let big = fixture.files.iter().position(|(path, _)| path == BIG).expect("sealed");
    let file = OpenFile::new(&mount.cache, &model, big as u32);
    let answer = mount.fs.reader().try_read(&file, 0, 100).expect("resident");

    let refused = ask().expect_err("it has everything still");

    assert!(refused.message().contains("could not be taken away"), "{refused:?}");
    assert!(reader.child.try_wait().expect("wait").is_none());
    drop(answer);
    let done = ask().expect("taken away");
    assert_eq!(done["objects_retired"], 1, "{done}");
    assert_eq!(done["still_reading_pids"], serde_json::json!([]), "{done}");
    assert_eq!(reader.end().0, "SIGBUS");
}

// ---- The program ----------------------------------------------------------------------------------------------------

fn json_of(program: &Program, arguments: &[&str]) -> serde_json::Value {
    let output = run_ok(program.command(arguments).arg("--json"));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn refusal_of(program: &Program, arguments: &[&str]) -> (i32, String) {
    let output = program.command(arguments).output().expect("runs");
    (output.status.code().expect("a code"), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Two models, each with a marker in every 200 KB.
fn two_models(program: &Program, marker: &[u8]) -> Vec<u8> {
    let source = tempfile::Builder::new().prefix("lock").tempdir_in("/dev/shm").expect("a folder in memory");
    let mut weights = Random(3).bytes((24 << 20) + 777);
    for at in (100..weights.len() - MARKER_BYTES).step_by(200_000) {
        weights[at..at + MARKER_BYTES].copy_from_slice(marker);
    }
    std::fs::write(source.path().join(BIG), &weights).expect("write");
    std::fs::write(source.path().join("config.json"), &weights[..3000]).expect("write");
    program.seal(source.path(), "first");
    program.seal(source.path(), "second");
    weights
}

#[test]
fn nothing_of_a_locked_model_is_left_in_the_memory_of_the_daemon() {
    if !can_mount() {
        return;
    }
    let marker: [u8; MARKER_BYTES] = Random::announced("canary").bytes(MARKER_BYTES).try_into().expect("64");
    let needle = Needle::new(marker);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Program::in_folder(folder.path());
    let weights = two_models(&program, &marker);
    for open in ["lazy", "whole"] {
        let running = program.mount(&["--open", open, "--cache", "128MiB"]);
        let mnt = program.mountpoint();
        for model in ["first", "second"] {
            assert!(std::fs::read(mnt.join(model).join(BIG)).expect("read") == weights);
            std::fs::read(mnt.join(model).join("config.json")).expect("read");
        }
        let held = File::open(mnt.join("first").join(BIG)).expect("open");
        assert!(!needle.in_memory_of(running.pid()).is_empty(), "the detector finds nothing in a daemon that has it");

        let done = json_of(&program, &["lock", mnt.to_str().expect("utf-8")]);

        assert!(done["wiped_bytes"].as_u64().expect("a number") >= 2 * weights.len() as u64, "{done}");
        if can_pin().is_ok() {
            assert_eq!(done["unwiped_bytes"], 0, "{done}");
        }
        let found = needle.in_memory_of(running.pid());
        assert!(found.is_empty(), "--open {open}: plaintext in {found:#?}");
        println!("--open {open}: {done}");
        drop(held);
        running.unmount();
    }
}

#[test]
fn the_commands_lock_one_model_or_all_and_unlock_what_they_can() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Program::in_folder(folder.path());
    let weights = two_models(&program, &[9; MARKER_BYTES]);
    let running = program.mount(&["--cache", "128MiB"]);
    let mnt = program.mountpoint();
    let at = mnt.to_str().expect("utf-8");
    let reads = |model: &str| std::fs::read(mnt.join(model).join(BIG)).map(|bytes| bytes == weights);
    let (first, second) = (mnt.join("first").join(BIG), mnt.join("second").join(BIG));

    // One model alone, by name; a name that is not there is said.
    assert!(reads("first").expect("read") && reads("second").expect("read"));
    assert_eq!(json_of(&program, &["lock", at, "first"])["locked"], serde_json::json!(["first"]));
    assert!(is_refused(&first));
    assert!(reads("second").expect("the other model is served"));
    let locked: Vec<bool> = json_of(&program, &["status", at])["models"]
        .as_array()
        .expect("models")
        .iter()
        .map(|model| model["locked"].as_bool().expect("said"))
        .collect();
    assert_eq!(locked, [true, false]);
    let (code, said) = refusal_of(&program, &["lock", at, "third"]);
    assert!(code == 3 && said.contains("third is not in this mount"), "{code} {said}");

    // Locked twice is locked; unlocked from its sources, and once more when there is nothing to do.
    json_of(&program, &["lock", at]);
    assert!(is_refused(&first) && is_refused(&second));
    assert_eq!(json_of(&program, &["unlock", at, "second"])["unlocked"], serde_json::json!(["second"]));
    assert!(is_refused(&first));
    assert!(reads("second").expect("served again"));

    // No key, no unlock; it stays locked and says why.
    let away = folder.path().join("home/away.key");
    std::fs::rename(program.key_path(), &away).expect("rename");
    let (code, said) = refusal_of(&program, &["unlock", at]);
    assert!(code != 0 && said.contains("first stays locked") && said.contains("model.key"), "{code} {said}");
    assert!(is_refused(&first));
    std::fs::rename(&away, program.key_path()).expect("rename");
    assert_eq!(json_of(&program, &["unlock", at])["unlocked"], serde_json::json!(["first"]));
    assert!(reads("first").expect("served again"));
    assert_eq!(json_of(&program, &["unlock", at])["unlocked"], serde_json::json!([]));

    // Sessions, through the command.
    let held = File::open(&first).expect("open");
    let told = json_of(&program, &["sessions", at]);
    let me = told["sessions"].as_array().expect("a list").iter().find(|it| it["pid"] == std::process::id());
    let me = me.unwrap_or_else(|| panic!("{told}"));
    assert_eq!(me["files"][0]["path"], first.to_str().expect("utf-8"), "{told}");
    let shut = format!("pid={}", std::process::id());
    let done = json_of(&program, &["sessions", at, "--shut-out", &shut, "--for", "10m"]);
    assert_eq!(done["seconds"], 600);
    assert!(is_refused(&second));
    assert_eq!(json_of(&program, &["sessions", at])["shut_out"][0]["session"], shut.as_str());
    assert_eq!(json_of(&program, &["sessions", at, "--let-in", &shut])["was_shut_out"], true);
    assert!(reads("second").expect("let in"));
    let (code, said) = refusal_of(&program, &["sessions", at, "--shut-out", "everyone"]);
    assert!(code == 2 && said.contains("uid=1000"), "{code} {said}");
    let text = String::from_utf8(run_ok(&mut program.command(&["sessions", at])).stdout).expect("text");
    assert!(text.contains(BIG) && text.contains("pid"), "{text}");
    drop(held);
    running.unmount();
}

#[test]
fn a_key_that_is_gone_once_read_cannot_unlock_and_the_refusal_says_so() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Program::in_folder(folder.path());
    two_models(&program, &[9; MARKER_BYTES]);
    let mnt = program.mountpoint();
    let at = mnt.to_str().expect("utf-8");
    let mut mounting =
        program.command(&["mount", program.store(), at, "--cache", "128MiB", "--key", "env:LOCK_TEST_KEY"]);
    mounting.arg("--trust").arg(program.trusted_key()).arg("--daemon");
    let key = std::fs::read_to_string(program.key_path()).expect("a key in hex");
    run_ok(mounting.env("LOCK_TEST_KEY", key.trim()));
    json_of(&program, &["lock", at, "first"]);

    let (code, said) = refusal_of(&program, &["unlock", at]);

    assert_eq!(code, 2, "{said}");
    assert!(said.contains("LOCK_TEST_KEY") && said.contains("gone once read"), "{said}");
    assert!(is_refused(&mnt.join("first").join(BIG)));
    run_ok(&mut program.command(&["umount", at]));
}

#[test]
fn a_daemon_unlocks_with_files_that_were_named_from_another_folder() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Program::in_folder(folder.path());
    two_models(&program, &[9; MARKER_BYTES]);
    let at = program.mountpoint().to_str().expect("utf-8");
    let trust = "home/.config/modelfs/signing.key.pub";
    let words =
        ["mount", "store", "mnt", "--cache", "128MiB", "--key", "file:home/model.key", "--trust", trust, "--daemon"];
    run_ok(&mut program.command(&words));
    json_of(&program, &["lock", at]);

    assert_eq!(json_of(&program, &["unlock", at])["unlocked"], serde_json::json!(["first", "second"]));

    run_ok(&mut program.command(&["umount", at]));
}

#[test]
fn a_mount_that_nobody_uses_is_locked_and_stays_so() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Program::in_folder(folder.path());
    two_models(&program, &[9; MARKER_BYTES]);
    let running = program.mount(&["--cache", "128MiB", "--open", "whole", "--lock-when-idle", "1s"]);
    let mnt = program.mountpoint();
    let at = mnt.to_str().expect("utf-8");
    let first = mnt.join("first").join(BIG);
    let is_locked = || json_of(&program, &["status", at])["models"][0]["locked"] == true;

    let deadline = Instant::now() + Duration::from_secs(120);
    // It is idle until somebody comes, and locked if that takes this machine longer than a second.
    let opened = || {
        loop {
            match File::open(&first) {
                Ok(file) => return file,
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{error}"),
            }
            assert!(Instant::now() < deadline, "locked again each time: {}", program.log());
            // Refused where the lock is still under way.
            program.command(&["unlock", at]).output().expect("runs");
        }
    };

    // A map alone is use, though its descriptor is closed.
    let held = opened();
    let reader = Reader::start("hold", &first);
    drop(held);
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!is_locked(), "locked under a reader");
    let locks_told = || program.log().matches("nobody read for 1 s").count();
    let before = locks_told();
    drop(reader);
    // It is shown as locked from its first moment on, and can be unlocked when that is over.
    program.until("the lock after its last reader", || is_locked() && locks_told() > before);
    assert!(is_refused(&first), "an open does not unlock it");
    json_of(&program, &["unlock", at]);
    drop(opened());
    running.unmount();
}

#[test]
fn a_user_alone_is_shut_out() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let ownership = modelfs::vfs::Ownership { uid: 0, gid: 0, umask: 0 };
    let how = How { allow_other: true, ownership, ..How::default() };
    let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
    let nobody = 65534;
    // Below a folder that only we may enter, it would fail for another reason.
    let cat = || {
        let mut command = Command::new("cat");
        command.uid(nobody).arg("config.json").current_dir(mount.root()).stdout(Stdio::null()).stderr(Stdio::piped());
        let output = command.output().expect("cat runs");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(cat(), (true, String::new()), "the test shows nothing: another user cannot read at all");

    mount.fs.shut_out(format!("uid={nobody}").parse().expect("a session"), None, false).expect("shut out");

    let (read, said) = cat();
    assert!(!read && said.contains("Permission denied"), "{said}");
    assert!(std::fs::read(mount.path("config.json")).is_ok());
}

/// A control group of our own, as an engine names one.
struct Group(PathBuf);

impl Group {
    /// The root of control groups, version 2, or `None` after `skip`.
    fn root() -> Option<PathBuf> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        // ID, parent, device, root, mountpoint, options..., "-", type.
        let at = mounts.lines().filter(|line| line.contains(" - cgroup2 ")).find_map(|line| line.split(' ').nth(4));
        let at = at.map(PathBuf::from).filter(|at| Group::of(at, "modelfs-test-probe").is_some());
        if at.is_none() {
            skip("no control groups of version 2 can be made here");
        }
        at
    }

    fn of(parent: &Path, name: &str) -> Option<Group> {
        let path = parent.join(name);
        std::fs::create_dir(&path).ok().map(|()| Group(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes have been waited for; the kernel may take a moment more.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        eprintln!("{} stays", self.0.display());
    }
}

/// A process that opens and reads a file whenever it is told to, in a control group or in none of its own.
struct Shell {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Shell {
    fn start(path: &Path, group: Option<&Group>) -> Shell {
        // Of its own accord it neither opens nor reads anything of the mount.
        let script = "while read -r _; do if cat \"$0\" >/dev/null 2>&1; then echo READ; else echo REFUSED; fi; done";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("sh runs");
        if let Some(Group(group)) = group {
            std::fs::write(group.join("cgroup.procs"), child.id().to_string()).expect("moved into the group");
        }
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Shell { child, lines }
    }

    fn reads(&mut self) -> bool {
        self.child.stdin.as_mut().expect("piped").write_all(b"go\n").expect("told");
        match self.lines.next().expect("an answer").expect("text").as_str() {
            "READ" => true,
            "REFUSED" => false,
            other => panic!("{other}?"),
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_container_and_a_pod_are_shut_out_by_their_control_groups_and_nobody_outside_them() {
    if !can_mount() {
        return;
    }
    let Some(root) = Group::root() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Program::in_folder(folder.path());
    two_models(&program, &[9; MARKER_BYTES]);
    let running = program.mount(&["--cache", "128MiB"]);
    let mnt = program.mountpoint();
    let at = mnt.to_str().expect("utf-8");
    let path = mnt.join("first/config.json");
    let mut random = Random::announced("control groups");
    let mut id = || random.bytes(32).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (docker, other, inner) = (id(), id(), id());
    let uid = "0f8fad5b-d9cb-469f-a165-70867728950e";
    let pod = format!("kubepods-burstable-pod{}.slice", uid.replace('-', "_"));
    let group = |parent: &Path, name: String| Group::of(parent, &name).expect("a control group");
    let docker_group = group(&root, format!("docker-{docker}.scope"));
    let other_group = group(&root, format!("docker-{other}.scope"));
    let pod_group = group(&root, pod);
    let inner_group = group(&pod_group.0, format!("cri-containerd-{inner}.scope"));
    let mut docker_shell = Shell::start(&path, Some(&docker_group));
    let mut other_shell = Shell::start(&path, Some(&other_group));
    let mut pod_shell = Shell::start(&path, Some(&inner_group));
    let mut outside = Shell::start(&path, None);
    let mut who_reads =
        || [&mut docker_shell, &mut other_shell, &mut pod_shell, &mut outside].map(|shell| shell.reads());
    assert_eq!(who_reads(), [true; 4], "the test shows nothing: one of them cannot read at all");

    // As `docker ps` shows it.
    let container = format!("container={}", &docker[..12]);
    let pod = format!("pod={uid}");
    for (session, left) in [
        (&container, [false, true, true, true]),
        (&pod, [true, true, false, true]),
        (&format!("container={inner}"), [true, true, false, true]),
        (&format!("container={}", "0".repeat(64)), [true; 4]),
        (&"pod=0f8fad5b-d9cb-469f-a165-708677289500".to_owned(), [true; 4]),
    ] {
        json_of(&program, &["sessions", at, "--shut-out", session]);
        assert_eq!(who_reads(), left, "{session}");
        assert_eq!(json_of(&program, &["sessions", at, "--let-in", session])["was_shut_out"], true);
        assert_eq!(who_reads(), [true; 4], "{session} was let in");
    }
    drop((docker_shell, other_shell, pod_shell, outside));
    drop(inner_group);
    running.unmount();
}
