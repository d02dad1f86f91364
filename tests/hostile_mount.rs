//! THREAT_MODEL (f) rows 63 to 70: what programs may try on a mount, and what becomes of them when the store fails.

#[path = "common/children.rs"]
mod children;
#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/mounted.rs"]
mod mounted;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use children::Touch;
use fixture::{Fixture, NAME, Random, Style};
use modelfs::cache::{Cache, CacheLimits, Model};
use modelfs::crypto::Verify;
use modelfs::error::Code;
use modelfs::fuse::attach::{self, MountLook};
use modelfs::fuse::{Behaviour, OpenPolicy};
use modelfs::mem::{Arena, ArenaPlan};
use modelfs::read::{Answer, OpenFile, Reader};
use modelfs::store::fault::{Call, Fault, Faulty, When};
use modelfs::store::memory::MemoryStore;
use modelfs::store::patient::{Patience, Patient};
use modelfs::telemetry::Telemetry;
use modelfs::vfs::Ownership;
use mounted::{How, Mounted, can_mount, filesystem};

const CHUNK: usize = 1 << 20;

/// For deadlines that a test is not about: what ends before this was ended by something else.
const LONG: Duration = Duration::from_secs(600);

/// Not a test: see [`children`].
#[test]
fn child() {
    children::be_one();
}

/// Files in memory, behind a store that can be told to fail, with patience as a mount has it.
struct Scene {
    fixture: Fixture,
    store: Faulty<MemoryStore>,
    patience: Patience,
}

impl Scene {
    fn new(files: &[(&str, usize)], style: Style) -> Scene {
        let mut random = Random(63);
        let files = files.iter().map(|(path, len)| ((*path).to_owned(), random.bytes(*len))).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let fixture = runtime.block_on(Fixture::seal(files, style, &mut random));
        let store = Faulty::new((*fixture.store).clone());
        Scene { fixture, store, patience: Patience::default() }
    }

    fn model(&self) -> Arc<Model> {
        let source = Patient::new(self.store.clone(), self.patience.clone());
        self.fixture.model(Arc::new(source), Verify::Strict)
    }

    fn mount(&self, how: How) -> Mounted {
        Mounted::new(how, || self.model())
    }

    fn plain(&self, file: &str) -> &[u8] {
        &self.fixture.files.iter().find(|(path, _)| path == file).expect("a file of the scene").1
    }

    /// From now on every fetch meets `fault`.
    fn fault(&self, fault: Fault) {
        self.store.on(When::call(Call::ReadRange), fault);
    }
}

fn policy(open: OpenPolicy) -> How {
    How { behaviour: Behaviour { open, ..Behaviour::default() }, ..How::default() }
}

/// What a system call answered: a count, or an errno.
type Said = Result<usize, i32>;

fn said(result: isize) -> Said {
    usize::try_from(result).map_err(|_| io::Error::last_os_error().raw_os_error().expect("an errno"))
}

fn pread(file: &File, buffer: &mut [u8], offset: i64) -> Said {
    // SAFETY: writes at most `len` bytes into our own buffer.
    said(unsafe { libc::pread(file.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), offset) })
}

/// One `preadv` into three buffers that lie side by side.
fn preadv(file: &File, buffer: &mut [u8], offset: i64) -> Said {
    let (first, rest) = buffer.split_at_mut(buffer.len() / 3);
    let (second, third) = rest.split_at_mut(rest.len() / 2);
    let parts =
        [first, second, third].map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
    // SAFETY: three parts of our own buffer.
    said(unsafe { libc::preadv(file.as_raw_fd(), parts.as_ptr(), 3, offset) })
}

fn map(file: &File, len: usize, sharing: libc::c_int) -> &'static [u8] {
    // SAFETY: a fresh read-only map of an open file; tests unmap it themselves.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, sharing, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        std::slice::from_raw_parts(at.cast(), len)
    }
}

fn unmap(map: &'static [u8]) {
    // SAFETY: made by `map` above, not used again.
    unsafe { libc::munmap(map.as_ptr().cast_mut().cast(), map.len()) };
}

/// Everything about the end of a file, next to an ordinary file of the same bytes.
fn same_as_an_ordinary_file(ours: &Path, bytes: &[u8], what: &str) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let path = folder.path().join("reference");
    std::fs::write(&path, bytes).expect("written");
    let (mount, reference) = (File::open(ours).expect("open"), File::open(&path).expect("open"));
    let size = bytes.len() as i64;
    let page = size / 4096 * 4096;
    let block = size / 65_536 * 65_536;
    let edges = [0, size - 1, size, size + 1, size + 4096, page, page + 4096, block - 1, size - 500_000, 1 << 40];
    for offset in edges.into_iter().chain([i64::MAX - 4095, i64::MAX, -1]) {
        for len in [0, 1, 2, 4096, 70_000, 1 << 20, (3 << 20) + 1] {
            for call in [pread, preadv] {
                let (mut got, mut want) = (vec![0xA5; len], vec![0xA5; len]);
                let answers = (call(&mount, &mut got, offset), call(&reference, &mut want, offset));
                assert_eq!(answers.0, answers.1, "{what}: {len} bytes at {offset} of {size}");
                assert!(got == want, "{what}: {len} bytes at {offset} of {size}: bytes, or what lies behind them");
            }
        }
    }
    if size > 0 {
        for sharing in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
            let whole = map(&mount, bytes.len().next_multiple_of(4096), sharing);
            assert!(whole[..bytes.len()] == *bytes, "{what}");
            assert!(whole[bytes.len()..].iter().all(|byte| *byte == 0), "{what}: bytes behind the end of the file");
            unmap(whole);
        }
        assert_eq!(children::touch(ours, size as u64 - 1, true), Touch::Byte(bytes[bytes.len() - 1]));
    }
    let behind = bytes.len().next_multiple_of(4096) as u64;
    assert_eq!(children::touch(ours, behind, true), Touch::Killed(libc::SIGBUS), "{what}: behind the last page");
}

#[test]
fn row_63_the_end_of_a_file_is_where_posix_says() {
    if !can_mount() {
        return;
    }
    let style = Style { pack_below: 200_000, ..Style::default() };
    let names = ["alone", "empty", "packed-1", "packed-2", "packed-3"];
    let sizes = [2 * CHUNK + 65_541, 0, 70_001, 1, 4096];
    let files: Vec<_> = names.into_iter().zip(sizes).collect();
    let scene = Scene::new(&files, style);
    for (open, no_page_cache) in [(OpenPolicy::Lazy, false), (OpenPolicy::Lazy, true), (OpenPolicy::Whole, false)] {
        let mount =
            scene.mount(How { behaviour: Behaviour { open, no_page_cache, ..Behaviour::default() }, ..How::default() });
        for name in names {
            let what = format!("{name}, {open:?}, no_page_cache {no_page_cache}");
            same_as_an_ordinary_file(&mount.path(name), scene.plain(name), &what);
        }
        let hot = open == OpenPolicy::Whole && mount.fs.passthrough();
        assert!(!hot || mount.hot_opens() > 0, "the hot file was tried as well");
    }
}

#[test]
fn row_64_a_reader_killed_during_a_fetch_ends_and_keeps_no_room() {
    if !can_mount() {
        return;
    }
    let mut scene = Scene::new(&[("model", 4 * CHUNK)], Style::default());
    scene.patience = Patience { attempt: Duration::from_millis(1500), attempts_max: 1, ..Patience::default() };
    scene.fault(Fault::Stall);
    let mount = scene.mount(How { read_deadline: Duration::from_millis(1000), ..How::default() });
    let mut reader = children::start_read(&mount.path("model"), 0);
    mount.wait_until("the fetch", |mount| mount.cache.telemetry().fetch_requests.get() > 0);
    let killed = Instant::now();
    reader.kill().expect("killed");
    reader.wait().expect("it ends");
    assert!(killed.elapsed() < Duration::from_secs(60), "{:?}", killed.elapsed());
    scene.store.heal();
    mount.wait_until("the room of the fetch", |mount| mount.cache.budget().in_use() == 0);
    // The outage is remembered for a while, from a moment after the room was given back.
    mount.wait_until("the end of the outage", |mount| std::fs::read(mount.path("model")).is_ok());
    assert!(std::fs::read(mount.path("model")).expect("healed") == scene.plain("model"));
    assert_eq!(mount.unmount().held_objects, 0);
}

#[test]
fn row_64_stopping_ends_the_reads_in_flight_at_once() {
    if !can_mount() {
        return;
    }
    let mut scene = Scene::new(&[("model", 8 * CHUNK)], Style::default());
    scene.patience = Patience { attempt: LONG, budget: LONG, ..Patience::default() };
    scene.fault(Fault::Stall);
    let mount = scene.mount(How { read_deadline: LONG, ..How::default() });
    let files: Vec<_> = (0..8).map(|_| File::open(mount.path("model")).expect("open")).collect();
    std::thread::scope(|scope| {
        let readers: Vec<_> = files
            .iter()
            .enumerate()
            .map(|(i, file)| scope.spawn(move || file.read_at(&mut [0; 4096], (i * CHUNK) as u64)))
            .collect();
        mount.wait_until("the fetches", |mount| mount.cache.telemetry().fetch_requests.get() >= 8);
        assert!(!mount.attachment.unmount().expect("asked"), "umount says busy");
        let stopped = Instant::now();
        mount.attachment.detach().expect("detached");
        mount.cache.wipe_all(true);
        for reader in readers {
            let refused = reader.join().expect("a reader").expect_err("nothing was fetched");
            assert_eq!(refused.raw_os_error(), Some(libc::EIO));
        }
        assert!(stopped.elapsed() < LONG / 10, "{:?}", stopped.elapsed());
    });
    assert_eq!(mount.cache.budget().in_use(), 0);
    let refused = files[0].read_at(&mut [0; 10], 0).expect_err("stopped");
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    drop(files);
    assert_eq!(mount.unmount().held_objects, 0);
}

#[test]
fn row_64_an_aborted_connection_ends_the_reads_in_flight() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("model", 8 * CHUNK)], Style::default());
    scene.fault(Fault::Stall);
    let mount = scene.mount(How::default());
    let control = tempfile::tempdir().expect("a folder");
    let place = c_path(control.path());
    // SAFETY: NUL-terminated words that live through the call.
    let mounted =
        unsafe { libc::mount(c"none".as_ptr(), place.as_ptr(), c"fusectl".as_ptr(), 0, std::ptr::null()) } == 0;
    assert!(mounted, "fusectl: {}", io::Error::last_os_error());
    let device = std::fs::metadata(mount.root()).expect("stat").dev();
    let abort = control.path().join(libc::minor(device).to_string()).join("abort");
    let file = File::open(mount.path("model")).expect("open");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_at(&mut [0; 4096], 0));
        mount.wait_until("the fetch", |mount| mount.cache.telemetry().fetch_requests.get() > 0);
        std::fs::write(&abort, "1").expect("aborted");
        let refused = reader.join().expect("a reader").expect_err("aborted").raw_os_error();
        assert!(matches!(refused, Some(libc::ECONNABORTED | libc::ENOTCONN | libc::EIO)), "{refused:?}");
    });
    assert_eq!(file.read_at(&mut [0; 4096], 0).expect_err("gone").raw_os_error(), Some(libc::ENOTCONN));
    // SAFETY: as above.
    unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) };
    drop(file);
    let cache = mount.cache.clone();
    assert_eq!(mount.unmount().held_objects, 0);
    assert_eq!(cache.budget().in_use(), 0);
}

/// More readers than any queue on the way holds, all waiting for a store that is silent.
#[test]
fn row_64_a_silent_store_ends_reads_at_their_deadline_and_warm_files_do_not_wait() {
    if !can_mount() {
        return;
    }
    // Where the machine stood still until readers met their deadline nothing is shown.
    assert!((0..5).any(|_| a_warm_file_does_not_wait_for(200)), "a warm file waited for cold ones, each time");
}

/// Whether a warm file was read while so many readers of cold ones went on waiting.
fn a_warm_file_does_not_wait_for(readers: usize) -> bool {
    let style = Style { pack_below: CHUNK, ..Style::default() };
    let mut scene = Scene::new(&[("cold", readers * CHUNK), ("warm", 500_000)], style);
    scene.patience = Patience { attempt: Duration::from_secs(15), attempts_max: 1, ..Patience::default() };
    let deadline = Duration::from_secs(12);
    let mount = scene.mount(How { read_deadline: deadline, ..How::default() });
    let warm = File::open(mount.path("warm")).expect("open");
    let warm_once = || {
        // SAFETY: advice about our own descriptor: the page cache forgets, the daemon does not.
        unsafe { libc::posix_fadvise(warm.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let mut bytes = vec![0; 500_000];
        warm.read_exact_at(&mut bytes, 0).expect("a warm file");
        assert!(bytes == scene.plain("warm"));
    };
    warm_once();
    let resident = mount.cache.budget().in_use();
    scene.fault(Fault::Stall);
    // Each with its own descriptor, hence its own readahead.
    let cold: Vec<File> = (0..readers).map(|_| File::open(mount.path("cold")).expect("open")).collect();
    let alone = std::thread::scope(|scope| {
        let waiting: Vec<_> = cold
            .iter()
            .enumerate()
            .map(|(i, cold)| {
                scope.spawn(move || {
                    let started = Instant::now();
                    (cold.read_at(&mut [0; 4096], (i * CHUNK) as u64), started.elapsed())
                })
            })
            .collect();
        // All of them reach the daemon: no queue of the kernel keeps any back.
        mount.wait_until("the readers", |mount| mount.cache.telemetry().cache_misses.get() >= readers as u64);
        let reads = mount.cache.telemetry().reads.get();
        let asked = Instant::now();
        warm_once();
        assert!(mount.cache.telemetry().reads.get() > reads, "the page cache answered, which proves nothing");
        let alone = asked.elapsed() < deadline / 2 && waiting.iter().all(|reader| !reader.is_finished());
        for reader in waiting {
            let (outcome, took) = reader.join().expect("a reader");
            assert_eq!(outcome.expect_err("silence").raw_os_error(), Some(libc::EIO));
            // Pages around the one asked for are read ahead, and the one is then asked for alone.
            assert!(took < 10 * deadline, "{took:?}");
        }
        alone
    });
    mount.wait_until("the room of the fetches", |mount| mount.cache.budget().in_use() == resident);
    warm_once();
    alone
}

/// A reader over a scene, without a kernel.
struct Library {
    runtime: tokio::runtime::Runtime,
    cache: Cache,
    reader: Arc<Reader>,
    file: Arc<OpenFile>,
}

impl Library {
    fn new(scene: &Scene, budget: u64, limits: CacheLimits) -> Library {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        let arena = Arena::open(ArenaPlan { bytes: budget }).expect("arena");
        let cache =
            Cache::new(arena, budget, limits, runtime.handle().clone(), Arc::new(Telemetry::default())).expect("cache");
        let reader = Arc::new(Reader::new(cache.clone(), LONG).expect("reader"));
        let file = Arc::new(OpenFile::new(&cache, &scene.model(), 0));
        Library { runtime, cache, reader, file }
    }

    fn read(&self, offset: usize) -> modelfs::error::Result<Answer<'_>> {
        self.runtime.block_on(self.reader.read(&self.file, offset as u64, 100))
    }
}

#[test]
fn row_65_ten_thousand_readers_of_one_cold_chunk_are_one_fetch_within_the_budget() {
    let scene = Scene::new(&[("model", 4 * CHUNK)], Style::default());
    scene.fault(Fault::Delay(Duration::from_millis(700)));
    let budget = 2 * CHUNK as u64;
    let library = Library::new(&scene, budget, CacheLimits::default());
    let readers: Vec<_> = (0..10_000)
        .map(|i| {
            let (reader, file) = (library.reader.clone(), library.file.clone());
            let want = scene.plain("model")[CHUNK + i..CHUNK + i + 10].to_vec();
            library.runtime.spawn(async move {
                let answer = reader.read(&file, (CHUNK + i) as u64, 10).await.expect("a healthy store");
                assert!(answer.bytes() == want);
            })
        })
        .collect();
    for reader in readers {
        library.runtime.block_on(reader).expect("a reader");
    }
    assert_eq!(scene.store.count(Call::ReadRange), 1);
    assert_eq!(library.cache.budget().peak(), CHUNK as u64);
}

#[test]
fn row_65_ten_thousand_opens_at_once_are_one_fetch_through_a_mount() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("model", 4 * CHUNK)], Style::default());
    scene.fault(Fault::Delay(Duration::from_millis(700)));
    let how = How {
        budget: 2 * CHUNK as u64,
        behaviour: Behaviour { open: OpenPolicy::Lazy, no_page_cache: true, ..Behaviour::default() },
        ..How::default()
    };
    let mount = scene.mount(how);
    let path = mount.path("model");
    let opened: Vec<File> = (0..10_000).map(|_| File::open(&path).expect("open")).collect();
    assert_eq!(mount.fs.open_handles(), 10_000);
    std::thread::scope(|scope| {
        for files in opened.chunks(50) {
            let want = &scene.plain("model")[CHUNK..CHUNK + 4096];
            scope.spawn(move || {
                for file in files {
                    let mut bytes = [0; 4096];
                    file.read_exact_at(&mut bytes, CHUNK as u64).expect("a healthy store");
                    assert!(bytes == *want);
                }
            });
        }
    });
    assert_eq!(scene.store.count(Call::ReadRange), 1);
    assert_eq!(mount.cache.budget().peak(), CHUNK as u64);
}

#[test]
fn row_66_a_full_cache_makes_readers_wait_and_then_refuses_them() {
    let scene = Scene::new(&[("model", 6 * CHUNK)], Style::default());
    let budget = 2 * CHUNK as u64;
    let room_deadline = Duration::from_millis(600);
    let library = Library::new(&scene, budget, CacheLimits { room_deadline, ..CacheLimits::default() });
    let first = library.read(0).expect("room");
    let second = library.read(CHUNK).expect("room");
    assert_eq!(library.cache.budget().in_use(), budget);
    let started = Instant::now();
    let refused = library.read(2 * CHUNK).map(|_| ()).expect_err("everything is held");
    assert_eq!((refused.code(), refused.errno()), (Code::NoRoom, libc::ENOMEM));
    assert!(started.elapsed() >= room_deadline, "{:?}: it waits first", started.elapsed());
    assert_eq!(scene.store.count(Call::ReadRange), 2, "room comes before the fetch");
    assert_eq!(library.cache.budget().peak(), budget);
    drop((first, second));

    // A reader whose time is not over when somebody lets go.
    let library = Library::new(&scene, budget, CacheLimits { room_deadline: LONG, ..CacheLimits::default() });
    let first = library.read(0).expect("room");
    let second = library.read(CHUNK).expect("room");
    let waiting = {
        let (reader, file) = (library.reader.clone(), library.file.clone());
        library.runtime.spawn(async move { reader.read(&file, 3 * CHUNK as u64, 10).await.map(|a| a.bytes().to_vec()) })
    };
    std::thread::sleep(Duration::from_millis(100));
    assert!(!waiting.is_finished());
    drop(first);
    let bytes = library.runtime.block_on(waiting).expect("a reader").expect("room at last");
    assert!(bytes == scene.plain("model")[3 * CHUNK..3 * CHUNK + 10]);
    assert!(second.bytes() == &scene.plain("model")[CHUNK..CHUNK + 100], "what is pinned stays");
    assert_eq!(library.cache.budget().peak(), budget);
}

/// Nobody tells of the end of a promise: whoever waits looks for room again, long before the deadline.
#[test]
fn row_66_room_that_time_alone_gives_back_is_found() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("a", 2 * CHUNK), ("b", CHUNK)], Style::default());
    let limits = CacheLimits { room_deadline: LONG, ..CacheLimits::default() };
    let library = Library::new(&scene, 2 * CHUNK as u64, limits);
    for chunk in 0..2 {
        drop(library.read(chunk * CHUNK).expect("room"));
    }
    let whole = library.file.sole_object().expect("a file of its own object");
    assert!(whole.promise_hot().is_some(), "it is whole, and the open that follows a look-up is to find it");
    let other = Arc::new(OpenFile::new(&library.cache, &scene.model(), 1));
    let reading = library.reader.read(&other, 0, 10);
    let read = library.runtime.block_on(async { tokio::time::timeout(LONG / 5, reading).await });
    let read = read.expect("within a fifth of the deadline").expect("room");
    assert!(read.bytes() == &scene.plain("b")[..10]);
    assert!(!whole.is_whole());
}

/// A fill that waits for room must not keep the end waiting.
#[test]
fn row_64_stopping_ends_a_read_that_waits_for_room() {
    let scene = Scene::new(&[("model", 4 * CHUNK)], Style::default());
    let limits = CacheLimits { room_deadline: LONG, ..CacheLimits::default() };
    let library = Library::new(&scene, 2 * CHUNK as u64, limits);
    let held = [library.read(0).expect("room"), library.read(CHUNK).expect("room")];
    let (reader, file) = (library.reader.clone(), library.file.clone());
    let waiting =
        library.runtime.spawn(async move { reader.read(&file, 2 * CHUNK as u64, 10).await.map(|a| a.bytes().len()) });
    std::thread::sleep(Duration::from_millis(200));
    assert!(!waiting.is_finished());
    let stopped = Instant::now();
    let report = library.cache.wipe_all(true);
    let refused = library.runtime.block_on(waiting).expect("a reader").expect_err("stopped");
    assert_eq!(refused.code(), Code::Stopping);
    assert!(stopped.elapsed() < LONG / 10, "{:?}", stopped.elapsed());
    assert_eq!(report.held_objects, 1, "two chunks are still being read");
    drop(held);
    assert_eq!(library.cache.wipe_all(true).held_objects, 0);
    assert_eq!(library.cache.budget().in_use(), 0);
}

/// Whole files that programs have mapped are not taken from them, whoever waits.
#[test]
fn row_66_maps_that_fill_the_cache_give_others_enomem_not_unlocked_memory() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("a", 4 * CHUNK), ("b", 4 * CHUNK), ("c", 4 * CHUNK)], Style::default());
    let budget = 8 * CHUNK as u64;
    let limits = CacheLimits { room_deadline: Duration::from_millis(500), ..CacheLimits::default() };
    let mount = scene.mount(How { budget, limits, ..policy(OpenPolicy::Whole) });
    if !mount.has_passthrough() {
        return;
    }
    let maps = ["a", "b"].map(|name| {
        let file = File::open(mount.path(name)).expect("open");
        map(&file, 4 * CHUNK, libc::MAP_SHARED)
    });
    assert_eq!(mount.hot_opens(), 2);
    let started = Instant::now();
    let refused = std::fs::read(mount.path("c")).expect_err("no room");
    assert_eq!(refused.raw_os_error(), Some(libc::ENOMEM));
    assert!(started.elapsed() >= Duration::from_millis(500));
    assert!(mount.cache.budget().peak() <= budget);
    for (name, mapped) in ["a", "b"].into_iter().zip(maps) {
        assert!(*mapped == *scene.plain(name));
        unmap(mapped);
    }
    // The kernel tells of a map that is gone when it gets to it.
    mount.wait_until("room again", |mount| std::fs::read(mount.path("c")).is_ok());
    assert!(std::fs::read(mount.path("c")).expect("room again") == scene.plain("c"));
    assert!(mount.cache.budget().peak() <= budget);
}

#[test]
fn row_67_a_partly_fetched_file_is_never_passed_through() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("model", 8 * CHUNK)], Style::default());
    let mount = scene.mount(policy(OpenPolicy::Lazy));
    let file = File::open(mount.path("model")).expect("open");
    // All but the last chunk.
    for i in 0..7 {
        file.read_exact_at(&mut [0; 100], (i * CHUNK + 5000) as u64).expect("pread");
        let again = File::open(mount.path("model")).expect("open");
        let mut bytes = [1; 100];
        again.read_exact_at(&mut bytes, (i * CHUNK + 5000) as u64).expect("pread");
        assert!(bytes[..] == scene.plain("model")[i * CHUNK + 5000..][..100]);
        assert_eq!(mount.hot_opens(), 0);
    }
    assert_eq!(mount.cache.telemetry().opens_plain.get(), 8);
}

/// A file of which one chunk is refused is never whole: opens that waited for it are served plain, and the rest reads.
#[test]
fn row_67_a_file_with_a_refused_chunk_is_served_plain_and_only_there_refused() {
    if !can_mount() {
        return;
    }
    for open in [OpenPolicy::Auto, OpenPolicy::Whole] {
        let scene = Scene::new(&[("model", 8 * CHUNK)], Style::default());
        scene.fault(Fault::FlipBit { offset: 5 * CHUNK as u64 + 40_000, bit: 3 });
        let mount = scene.mount(policy(open));
        for _ in 0..3 {
            let file = File::open(mount.path("model")).expect("an open is not a read");
            let mut bytes = vec![0; 5 * CHUNK - 100_000];
            file.read_exact_at(&mut bytes, 0).expect("before");
            assert!(bytes == scene.plain("model")[..bytes.len()]);
            file.read_exact_at(&mut bytes[..CHUNK], 6 * CHUNK as u64 + 5).expect("after");
            assert!(bytes[..CHUNK] == scene.plain("model")[6 * CHUNK + 5..7 * CHUNK + 5]);
            let refused = file.read_at(&mut [0; 10], 5 * CHUNK as u64 + 100_000).expect_err("the flipped chunk");
            assert_eq!(refused.raw_os_error(), Some(libc::EIO));
        }
        assert_eq!(mount.hot_opens(), 0, "{open:?}");
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no NUL")
}

fn errno_of(result: libc::c_int) -> i32 {
    assert_eq!(result, -1, "a write was let through");
    io::Error::last_os_error().raw_os_error().expect("an errno")
}

#[test]
fn row_68_every_way_of_writing_is_refused() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("model", CHUNK), ("run.sh", 5000)], Style::default());
    for open in [OpenPolicy::Lazy, OpenPolicy::Whole] {
        let mount = scene.mount(policy(open));
        let (path, new) = (mount.path("model"), mount.path("new"));
        let (file, fresh) = (c_path(&path), c_path(&new));
        let (folder, folder_path) = (c_path(&mount.root()), mount.root());
        for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_RDONLY | libc::O_TRUNC, libc::O_WRONLY | libc::O_APPEND] {
            // SAFETY: a NUL-terminated path.
            assert_eq!(errno_of(unsafe { libc::open(file.as_ptr(), flags) }), libc::EROFS, "{flags:#o}");
        }
        // SAFETY: NUL-terminated paths and values that live through each call; every call is meant to be refused.
        unsafe {
            use libc::EROFS;
            assert_eq!(errno_of(libc::open(fresh.as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o644)), EROFS);
            assert_eq!(errno_of(libc::truncate(file.as_ptr(), 0)), EROFS);
            assert_eq!(errno_of(libc::chmod(file.as_ptr(), 0o777)), EROFS);
            assert_eq!(errno_of(libc::chown(file.as_ptr(), 1, 1)), EROFS);
            assert_eq!(errno_of(libc::utimensat(libc::AT_FDCWD, file.as_ptr(), std::ptr::null(), 0)), EROFS);
            assert_eq!(errno_of(libc::unlink(file.as_ptr())), EROFS);
            assert_eq!(errno_of(libc::rename(file.as_ptr(), fresh.as_ptr())), EROFS);
            assert_eq!(errno_of(libc::link(file.as_ptr(), fresh.as_ptr())), EROFS);
            assert_eq!(errno_of(libc::symlink(c"x".as_ptr(), fresh.as_ptr())), EROFS);
            assert_eq!(errno_of(libc::mkdir(fresh.as_ptr(), 0o755)), EROFS);
            assert_eq!(errno_of(libc::rmdir(folder.as_ptr())), EROFS);
            assert_eq!(errno_of(libc::mknod(fresh.as_ptr(), libc::S_IFIFO | 0o644, 0)), EROFS);
            let (key, value) = (c"user.x".as_ptr(), c"1".as_ptr().cast());
            assert_eq!(errno_of(libc::setxattr(file.as_ptr(), key, value, 1, 0)), EROFS);
            assert_eq!(errno_of(libc::removexattr(file.as_ptr(), key)), EROFS);
        }
        let file = File::open(&path).expect("open");
        let fd = file.as_raw_fd();
        // SAFETY: as above, on our own descriptor.
        unsafe {
            assert_eq!(errno_of(libc::write(fd, c"x".as_ptr().cast(), 1) as i32), libc::EBADF);
            assert_eq!(errno_of(libc::pwrite(fd, c"x".as_ptr().cast(), 1, 0) as i32), libc::EBADF);
            assert_eq!(errno_of(libc::ftruncate(fd, 0)), libc::EINVAL);
            assert_eq!(errno_of(libc::fallocate(fd, 0, 0, 10)), libc::EBADF);
            assert_eq!(errno_of(libc::fchmod(fd, 0o777)), libc::EROFS);
            let wish = libc::PROT_READ | libc::PROT_WRITE;
            let none = std::ptr::null_mut();
            assert_eq!(libc::mmap(none, 4096, wish, libc::MAP_SHARED, fd, 0), libc::MAP_FAILED);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EACCES));
            let wish = libc::PROT_READ | libc::PROT_EXEC;
            assert_eq!(libc::mmap(none, 4096, wish, libc::MAP_PRIVATE, fd, 0), libc::MAP_FAILED);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EPERM));
            // A map that may become writable later may not.
            let at = libc::mmap(none, 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
            assert_ne!(at, libc::MAP_FAILED);
            assert_eq!(errno_of(libc::mprotect(at, 4096, libc::PROT_READ | libc::PROT_WRITE)), libc::EACCES);
            libc::munmap(at, 4096);
            let mut flags: libc::c_int = 0x10; // FS_IMMUTABLE_FL
            const FS_IOC_SETFLAGS: libc::c_ulong = 0x4008_6602;
            let refused = errno_of(libc::ioctl(fd, FS_IOC_SETFLAGS as _, &mut flags));
            assert!(matches!(refused, libc::EROFS | libc::ENOTTY | libc::ENOSYS | libc::EPERM), "{refused}");
        }
        // A new writable open of a descriptor is an open like any other.
        let reopened = File::options().write(true).open(format!("/proc/self/fd/{fd}")).expect_err("read-only");
        assert_eq!(reopened.raw_os_error(), Some(libc::EROFS));
        for name in ["model", "run.sh"] {
            let refused = Command::new(mount.path(name)).spawn().expect_err("noexec");
            assert_eq!(refused.raw_os_error(), Some(libc::EACCES), "{name}");
        }
        assert!(std::fs::read(&path).expect("still there") == scene.plain("model"));
        assert_eq!(std::fs::read_dir(&folder_path).expect("still there").count(), 2);
        let table = std::fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
        let line =
            table.lines().find(|line| line.contains(mount.folder.path().to_str().expect("utf-8"))).expect("ours");
        for flag in ["ro", "nosuid", "nodev", "noexec"] {
            let options = line.split(' ').nth(5).expect("options");
            assert!(options.split(',').any(|option| option == flag), "{flag} in {options}");
        }
    }
}

/// Somebody else, by `setpriv` arguments.
fn cat_as(who: &[&str], path: &Path) -> Result<Vec<u8>, String> {
    let mut command = Command::new("setpriv");
    command.args(who).args(["--inh-caps=-all", "--", "cat"]).arg(path);
    let output = command.output().expect("setpriv");
    if output.status.success() { Ok(output.stdout) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

const STRANGER: &[&str] = &["--reuid=4242", "--regid=4242", "--clear-groups"];
const MEMBER: &[&str] = &["--reuid=4242", "--regid=4300", "--clear-groups"];
const SUPPLEMENTARY: &[&str] = &["--reuid=4242", "--regid=4242", "--groups=4299,4300"];

fn denied(outcome: Result<Vec<u8>, String>, what: &str) {
    let refused = outcome.expect_err(what);
    assert!(refused.contains("Permission denied"), "{what}: {refused}");
}

#[test]
fn row_69_others_get_nothing_unless_they_are_let_in() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("model", CHUNK)], Style::default());
    for open in [OpenPolicy::Lazy, OpenPolicy::Whole] {
        let mount = scene.mount(policy(open));
        let path = mount.path("model");
        assert!(std::fs::read(&path).expect("the owner") == scene.plain("model"));
        // The mode is 0444; it does not count.
        for who in [STRANGER, MEMBER, SUPPLEMENTARY] {
            denied(cat_as(who, &path), "another user");
        }
        // The same mount by another way: through the root of a process of one's own.
        let mut bystander =
            Command::new("setpriv").args(STRANGER).args(["--", "sleep", "300"]).spawn().expect("setpriv");
        let there =
            |pid: u32| PathBuf::from(format!("/proc/{pid}/root")).join(path.strip_prefix("/").expect("absolute"));
        mount.wait_until("the other user's process", |_| {
            std::fs::read_to_string(format!("/proc/{}/comm", bystander.id())).is_ok_and(|comm| comm.trim() == "sleep")
        });
        denied(cat_as(STRANGER, &there(bystander.id())), "through one's own /proc/PID/root");
        denied(cat_as(STRANGER, &there(std::process::id())), "through the daemon's /proc/PID/root");
        bystander.kill().expect("killed");
        bystander.wait().expect("ended");
        // Root of a user namespace of one's own.
        let namespace = |arguments: &[&str], last: &Path| {
            let command = &mut Command::new("setpriv");
            command.args(STRANGER).args(["--", "unshare", "--user", "--map-root-user"]).args(arguments).arg(last);
            command.stdin(Stdio::null()).output().expect("setpriv")
        };
        if namespace(&["ls"], Path::new("/")).status.success() {
            let output = namespace(&["cat"], &path);
            assert!(!output.status.success(), "root of a user namespace read the mount");
            assert!(String::from_utf8_lossy(&output.stderr).contains("Permission denied"));
        } else {
            eprintln!("not run: no user namespaces here");
        }
    }
}

#[test]
fn row_69_with_allow_other_modes_and_groups_decide() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("model", CHUNK)], Style::default());
    for open in [OpenPolicy::Lazy, OpenPolicy::Whole] {
        let ownership = Ownership { uid: 0, gid: 4300, umask: 0o227 };
        let mount = scene.mount(How { allow_other: true, ownership, ..policy(open) });
        let path = mount.path("model");
        for round in 0..2 {
            denied(cat_as(STRANGER, &path), "a user outside the group");
            for who in [MEMBER, SUPPLEMENTARY] {
                let bytes = cat_as(who, &path).unwrap_or_else(|e| panic!("{who:?}, {open:?}, round {round}: {e}"));
                assert!(bytes == scene.plain("model"));
            }
        }
        let others = Command::new("setpriv").args(STRANGER).args(["--", "ls"]).arg(mount.folder.path()).output();
        assert!(!others.expect("setpriv").status.success(), "names are for the group as well");
    }
}

#[test]
fn row_70_a_mountpoint_that_is_not_an_empty_directory_is_refused() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("model", 10)], Style::default());
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("empty")).expect("made");
    symlink(at("empty"), at("link")).expect("made");
    symlink(at("nowhere"), at("dangling")).expect("made");
    std::fs::write(at("file"), "").expect("made");
    std::fs::create_dir(at("full")).expect("made");
    std::fs::write(at("full").join(".hidden"), "").expect("made");
    let fifo = c_path(&at("fifo"));
    // SAFETY: a NUL-terminated path.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    for (place, wanted) in [
        ("missing", "does not exist"),
        ("link", "symbolic link"),
        ("link/", "symbolic link"),
        ("link/.", "symbolic link"),
        ("dangling", "symbolic link"),
        ("file", "not a directory"),
        ("fifo", "not a directory"),
        ("full", "not empty"),
    ] {
        let (fs, _cache, _runtime) = filesystem(How::default(), scene.model());
        let look = MountLook { source: "memory".into(), allow_other: false };
        let Err(refused) = attach::attach(fs, &at(place), &look) else { panic!("mounted on {place}") };
        assert_eq!(refused.code(), Code::MountPoint, "{place}: {refused:?}");
        assert!(refused.message().contains(wanted), "{place}: {refused:?}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(!mounts.contains(folder.path().to_str().expect("utf-8")), "nothing stays mounted");
    assert_eq!(std::fs::read_dir(at("empty")).expect("there").count(), 0);
}

/// A link on the way to the mountpoint is the user's; only the last part must not be one.
#[test]
fn row_70_the_mount_is_where_the_directory_really_is() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[("model", 10)], Style::default());
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir_all(folder.path().join("real/place")).expect("made");
    symlink(folder.path().join("real"), folder.path().join("way")).expect("made");
    let (fs, cache, _runtime) = filesystem(How::default(), scene.model());
    let look = MountLook { source: "memory".into(), allow_other: false };
    let (session, attachment) = attach::attach(fs, &folder.path().join("way/place"), &look).expect("mounted");
    assert_eq!(attachment.mountpoint(), folder.path().join("real/place"));
    // The way there changes; the mount does not.
    std::fs::remove_file(folder.path().join("way")).expect("removed");
    assert!(
        std::fs::read(folder.path().join("real/place").join(NAME).join("model")).expect("read") == scene.plain("model")
    );
    // A child of another test has our descriptors until it is another program.
    let deadline = Instant::now() + Duration::from_secs(120);
    while !attachment.unmount().expect("asked") {
        assert!(Instant::now() < deadline, "it stays mounted");
        std::thread::sleep(Duration::from_millis(10));
    }
    session.join().expect("the session ends");
    cache.wipe_all(true);
}
