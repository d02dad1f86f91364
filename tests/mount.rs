//! The kernel's view: what an unmodified program meets in a mounted model, cold and hot.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/mounted.rs"]
mod mounted;

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fixture::{Fixture, Random, Style};
use modelfs::cache::CacheLimits;
use modelfs::crypto::Verify;
use modelfs::fuse::{Behaviour, OpenPolicy};
use modelfs::read::OpenFile;
use modelfs::store::fault::{Call, Fault, Faulty, When};
use mounted::{How, Mounted, can_mount};

fn seal(files: Vec<(String, Vec<u8>)>, style: Style) -> Fixture {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(Fixture::seal(files, style, &mut Random(7)))
}

fn big_style() -> Style {
    Style { chunk_log2: 23, pack_below: 2 << 20, ..Style::default() }
}

/// One file of 40 MiB and some, one small, one empty.
fn sample() -> Fixture {
    let mut random = Random(42);
    let files = vec![
        ("config.json".to_owned(), random.bytes(700)),
        ("empty".to_owned(), Vec::new()),
        ("model.safetensors".to_owned(), random.bytes((40 << 20) + 12_345)),
        ("sub/tokenizer.json".to_owned(), random.bytes(90_000)),
    ];
    seal(files, big_style())
}

fn plain<'a>(fixture: &'a Fixture, path: &str) -> &'a [u8] {
    &fixture.files.iter().find(|(p, _)| p == path).expect("a file of the fixture").1
}

fn policy(open: OpenPolicy) -> Behaviour {
    Behaviour { open, ..Behaviour::default() }
}

/// Room that comes is waited for, although the machine stands still meanwhile.
fn patient() -> CacheLimits {
    CacheLimits { room_deadline: Duration::from_secs(120), ..CacheLimits::default() }
}

fn map(file: &File, len: usize) -> &'static [u8] {
    // SAFETY: a fresh read-only map of an open file; tests leave it mapped on purpose or unmap it themselves.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        std::slice::from_raw_parts(at.cast(), len)
    }
}

fn unmap(map: &'static [u8]) {
    // SAFETY: made by `map` above, not used again.
    unsafe { libc::munmap(map.as_ptr().cast_mut().cast(), map.len()) };
}

fn compare(fixture: &Fixture, root: &Path) {
    for (path, bytes) in &fixture.files {
        assert!(std::fs::read(root.join(path)).expect(path) == *bytes, "{path}");
    }
}

#[test]
fn every_file_reads_as_sealed_under_every_policy() {
    if !can_mount() {
        return;
    }
    let ways = [OpenPolicy::Lazy, OpenPolicy::Auto, OpenPolicy::Whole].map(|open| (open, false));
    for (open, no_passthrough) in ways.into_iter().chain([(OpenPolicy::Auto, true)]) {
        for no_page_cache in [false, true] {
            let fixture = sample();
            let how = How {
                behaviour: Behaviour { open, no_page_cache, no_passthrough, ..Behaviour::default() },
                ..How::default()
            };
            let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
            compare(&fixture, &mount.root());
            compare(&fixture, &mount.root());
            let report = mount.unmount();
            assert_eq!(report.held_objects, 0, "{open:?} {report:?}");
        }
    }
}

#[test]
fn the_first_open_under_whole_ends_in_passthrough() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let how = How { behaviour: policy(OpenPolicy::Whole), ..How::default() };
    let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
    if !mount.has_passthrough() {
        return;
    }
    // A dentry that the kernel already knows must not change the outcome.
    std::fs::metadata(mount.path("model.safetensors")).expect("stat");
    let file = File::open(mount.path("model.safetensors")).expect("open");
    assert_eq!(mount.hot_opens(), 1);
    assert_eq!(mount.cache.telemetry().estale_answers.get(), 1);
    let bytes = plain(&fixture, "model.safetensors");
    let before = mount.cache.telemetry().reads.get();
    let mapped = map(&file, bytes.len());
    assert!(mapped == bytes);
    assert_eq!(mount.cache.telemetry().reads.get(), before, "a hot file is read past the daemon");
    unmap(mapped);
}

/// A read-only overlay above a folder.
struct Overlay {
    top: tempfile::TempDir,
    empty: tempfile::TempDir,
}

impl Overlay {
    fn above(lower: &Path) -> Overlay {
        let overlay =
            Overlay { top: tempfile::tempdir().expect("a folder"), empty: tempfile::tempdir().expect("a folder") };
        let options = format!("lowerdir={}:{}", lower.display(), overlay.empty.path().display());
        let [name, target, options] = ["overlay", overlay.top.path().to_str().expect("utf-8"), &options]
            .map(|text| CString::new(text).expect("no NUL"));
        // SAFETY: three strings that outlive the call.
        let done = unsafe {
            libc::mount(name.as_ptr(), target.as_ptr(), name.as_ptr(), libc::MS_RDONLY, options.as_ptr().cast())
        };
        assert_eq!(done, 0, "overlay: {}", std::io::Error::last_os_error());
        overlay
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let target = CString::new(self.top.path().to_str().expect("utf-8")).expect("no NUL");
        // SAFETY: a string that outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

/// overlayfs keeps the node that it once looked up. With passthrough a whole file is another node, which the same test shows.
#[test]
fn below_an_overlay_a_mount_without_passthrough_serves_files_before_and_after_they_are_whole() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let bytes = plain(&fixture, "model.safetensors");
    for no_passthrough in [false, true] {
        let how = How { behaviour: Behaviour { no_passthrough, ..Behaviour::default() }, ..How::default() };
        let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
        assert!(!(no_passthrough && mount.fs.passthrough()));
        if !no_passthrough && !mount.fs.passthrough() {
            continue; // no second node either
        }
        let overlay = Overlay::above(&mount.root());
        let above = overlay.top.path().join("model.safetensors");
        std::fs::metadata(&above).expect("looked at while it is cold");
        assert!(std::fs::read(mount.path("model.safetensors")).expect("read") == bytes);
        let model = mount.fs.vfs().models()[0].clone();
        let index = fixture.files.iter().position(|(path, _)| path == "model.safetensors").expect("sealed");
        let file = OpenFile::new(&mount.cache, &model, index as u32);
        let object = file.sole_object().expect("an object of its own");
        mount.wait_until("the file to be whole", |_| object.is_whole());
        let read = std::fs::read(&above);
        if no_passthrough {
            assert!(read.expect("read above") == bytes);
            assert_eq!(mount.cache.telemetry().estale_answers.get(), 0);
            assert_eq!(mount.hot_opens(), 0);
        } else {
            assert_eq!(read.expect_err("another node").raw_os_error(), Some(libc::ESTALE));
        }
    }
}

#[test]
fn stat_shows_one_number_before_and_after_the_flip() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = Mounted::new(How::default(), || fixture.model(fixture.store.clone(), Verify::Strict));
    let path = mount.path("model.safetensors");
    let before = std::fs::metadata(&path).expect("stat").ino();
    let mut cold = File::open(&path).expect("open");
    let mut bytes = Vec::new();
    cold.read_to_end(&mut bytes).expect("read");
    assert!(bytes == plain(&fixture, "model.safetensors"));
    if mount.fs.passthrough() {
        mount.wait_until("the flip", |_| {
            File::open(&path).expect("open");
            mount.hot_opens() > 0
        });
    }
    let hot = File::open(&path).expect("open");
    assert_eq!(hot.metadata().expect("fstat").ino(), before);
    assert_eq!(std::fs::metadata(&path).expect("stat").ino(), before);
    assert_eq!(cold.metadata().expect("fstat").ino(), before);
    let listed =
        std::fs::read_dir(mount.root()).expect("list").flatten().find(|e| e.file_name() == "model.safetensors");
    assert_eq!(std::os::unix::fs::DirEntryExt::ino(&listed.expect("listed")), before);
}

#[test]
fn a_cold_descriptor_goes_on_undisturbed_after_the_flip() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = Mounted::new(How::default(), || fixture.model(fixture.store.clone(), Verify::Strict));
    let path = mount.path("model.safetensors");
    let bytes = plain(&fixture, "model.safetensors");
    let cold = File::open(&path).expect("open");
    let cold_map = map(&cold, bytes.len());
    assert!(cold_map[..4096] == bytes[..4096]);
    assert!(std::fs::read(&path).expect("read") == bytes);
    if mount.fs.passthrough() {
        mount.wait_until("the flip", |_| {
            File::open(&path).expect("open");
            mount.hot_opens() > 0
        });
    }
    let hot = File::open(&path).expect("open");
    let hot_map = map(&hot, bytes.len());
    assert!(hot_map == bytes);
    assert!(cold_map == bytes);
    let mut piece = vec![0; 100_000];
    cold.read_exact_at(&mut piece, 20_000_000).expect("pread");
    assert!(piece == bytes[20_000_000..20_100_000]);
    unmap(cold_map);
    unmap(hot_map);
}

#[test]
fn an_open_through_a_magic_link_is_served_plain_not_refused() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let how = How { behaviour: policy(OpenPolicy::Whole), ..How::default() };
    let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
    let path = std::ffi::CString::new(mount.path("model.safetensors").to_str().expect("utf-8")).expect("no NUL");
    // SAFETY: a path that lives through the call.
    let handle = unsafe { libc::open(path.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
    assert!(handle >= 0);
    for _ in 0..3 {
        let bytes = std::fs::read(format!("/proc/self/fd/{handle}")).expect("an open through a magic link works");
        assert!(bytes == plain(&fixture, "model.safetensors"));
    }
    // SAFETY: ours, not used again.
    unsafe { libc::close(handle) };
}

#[test]
fn whole_files_are_evicted_for_others_but_never_under_a_reader() {
    if !can_mount() {
        return;
    }
    let mut random = Random(5);
    let files: Vec<_> = (0..6).map(|i| (format!("shard-{i}"), random.bytes(24 << 20))).collect();
    let fixture = seal(files, big_style());
    let how = How { budget: 64 << 20, behaviour: policy(OpenPolicy::Whole), limits: patient(), ..How::default() };
    let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
    let first = File::open(mount.path("shard-0")).expect("open");
    let mapped = map(&first, 24 << 20);
    drop(first);
    for round in 0..2 {
        for i in 1..6 {
            let name = format!("shard-{i}");
            assert!(std::fs::read(mount.path(&name)).expect("read") == plain(&fixture, &name), "{name} round {round}");
            assert!(mapped == plain(&fixture, "shard-0"), "the mapped file changed while {name} was read");
        }
    }
    assert!(mount.cache.telemetry().evicted_bytes.get() > 0);
    assert!(mount.cache.budget().peak() <= 64 << 20);
    unmap(mapped);
    let report = mount.unmount();
    assert_eq!(report.held_objects, 0, "{report:?}");
}

#[test]
fn a_file_larger_than_the_cache_reads_correctly_from_end_to_end() {
    if !can_mount() {
        return;
    }
    let fixture = seal(vec![("huge.bin".to_owned(), Random(1).bytes(100 << 20))], big_style());
    for open in [OpenPolicy::Lazy, OpenPolicy::Auto, OpenPolicy::Whole] {
        let how = How { budget: 32 << 20, behaviour: policy(open), limits: patient(), ..How::default() };
        let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
        compare(&fixture, &mount.root());
        assert!(mount.cache.budget().peak() <= 32 << 20);
    }
}

#[test]
fn ten_thousand_concurrent_reads_of_one_cold_chunk_are_one_fetch() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = Arc::new(Mounted::new(How::default(), || fixture.model(fixture.store.clone(), Verify::Strict)));
    let want = plain(&fixture, "model.safetensors")[..4096].to_vec();
    let threads: Vec<_> = (0..50)
        .map(|_| {
            let (mount, want) = (mount.clone(), want.clone());
            std::thread::spawn(move || {
                for _ in 0..200 {
                    let file = File::open(mount.path("model.safetensors")).expect("open");
                    let mut bytes = [0; 4096];
                    file.read_exact_at(&mut bytes, 0).expect("pread");
                    assert!(bytes[..] == want[..]);
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("a reader");
    }
    assert_eq!(mount.cache.telemetry().fetch_requests.get(), 1);
}

#[test]
fn a_small_read_of_a_large_file_costs_one_chunk() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let mount = Mounted::new(How::default(), || fixture.model(fixture.store.clone(), Verify::Strict));
    let file = File::open(mount.path("model.safetensors")).expect("open");
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, 33 << 20).expect("pread");
    assert!(bytes[..] == plain(&fixture, "model.safetensors")[33 << 20..][..4096]);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(mount.cache.telemetry().fetch_requests.get(), 1);
}

#[test]
fn unmounting_wipes_and_is_quick() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let how = How { behaviour: policy(OpenPolicy::Whole), ..How::default() };
    let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
    compare(&fixture, &mount.root());
    let started = Instant::now();
    let report = mount.unmount();
    assert_eq!(report.held_objects, 0, "{report:?}");
    assert!(report.wiped_bytes >= 40 << 20, "{report:?}");
    eprintln!("unmount and wipe took {:?}", started.elapsed());
}

// ---- open=auto ----------------------------------------------------------------------------------------------------------

/// Three shards of 40 MiB that look like safetensors files, and the files that loaders read first.
fn sharded() -> Fixture {
    let mut random = Random(77);
    let mut files =
        vec![("config.json".to_owned(), b"{}".to_vec()), ("model.safetensors.index.json".to_owned(), b"{}".to_vec())];
    for shard in 1..=3 {
        let tensor =
            |i: u64| format!(r#""t{i}":{{"dtype":"BF16","shape":[],"data_offsets":[{},{}]}}"#, i << 23, (i + 1) << 23);
        let json = format!("{{{}}}", (0..5).map(tensor).collect::<Vec<_>>().join(","));
        let head = [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
        files.push((format!("model-{shard}.safetensors"), [head, random.bytes(40 << 20)].concat()));
    }
    seal(files, big_style())
}

fn auto_mount(fixture: &Fixture) -> Option<Mounted> {
    let how = How { behaviour: policy(OpenPolicy::Auto), ..How::default() };
    let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
    if !mount.has_passthrough() {
        return None;
    }
    Some(mount)
}

fn read_head(path: &Path) {
    let mut file = File::open(path).expect("open");
    let mut len = [0; 8];
    file.read_exact(&mut len).expect("read");
    file.read_exact(&mut vec![0; u64::from_le_bytes(len) as usize]).expect("read");
}

#[test]
fn auto_listing_and_reading_heads_fetches_one_chunk_a_file() {
    if !can_mount() {
        return;
    }
    let fixture = sharded();
    let Some(mount) = auto_mount(&fixture) else { return };
    for shard in 1..=3 {
        let path = mount.path(&format!("model-{shard}.safetensors"));
        std::fs::metadata(&path).expect("stat");
        assert_eq!(mount.cache.telemetry().fetch_requests.get(), shard - 1);
        read_head(&path);
        assert_eq!(mount.cache.telemetry().fetch_requests.get(), shard);
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(mount.cache.telemetry().fetch_requests.get(), 3);
    assert_eq!(mount.cache.telemetry().opens_held.get(), 0);
}

#[test]
fn auto_holds_the_weights_of_a_process_that_read_the_configuration() {
    if !can_mount() {
        return;
    }
    let fixture = sharded();
    let Some(mount) = auto_mount(&fixture) else { return };
    std::fs::read(mount.path("config.json")).expect("read");
    for shard in 1..=3 {
        let name = format!("model-{shard}.safetensors");
        // From a thread of its own: it is the process that counts.
        let path = mount.path(&name);
        let bytes = std::thread::spawn(move || std::fs::read(path).expect("read")).join().expect("a reader");
        assert!(bytes == plain(&fixture, &name));
        assert_eq!(mount.hot_opens(), shard);
    }
    assert_eq!(mount.cache.telemetry().opens_held_in_vain.get(), 0);
}

#[test]
fn auto_holds_the_second_open_after_a_head_was_read() {
    if !can_mount() {
        return;
    }
    let fixture = sharded();
    let Some(mount) = auto_mount(&fixture) else { return };
    let path = mount.path("model-2.safetensors");
    read_head(&path);
    let file = File::open(&path).expect("open");
    assert_eq!(mount.hot_opens(), 1);
    let mapped = map(&file, plain(&fixture, "model-2.safetensors").len());
    assert!(mapped == plain(&fixture, "model-2.safetensors"));
    unmap(mapped);
}

#[test]
fn auto_fetches_the_rest_of_a_file_that_is_walked_and_holds_its_siblings() {
    if !can_mount() {
        return;
    }
    let fixture = sharded();
    let Some(mount) = auto_mount(&fixture) else { return };
    let first = File::open(mount.path("model-1.safetensors")).expect("open");
    // From the end, so that it is not the walk's own readahead that completes the file.
    for piece in (0..28).rev() {
        first.read_exact_at(&mut vec![0; 1 << 20], (12 << 20) + (piece << 20)).expect("read");
    }
    assert_eq!(mount.cache.telemetry().fills_foreseen.get(), 1);
    mount.wait_until("the fill", |mount| mount.cache.telemetry().opened_bytes.get() >= 40 << 20);
    let second = File::open(mount.path("model-2.safetensors")).expect("open");
    assert_eq!(mount.cache.telemetry().opens_held.get(), 1);
    assert_eq!(mount.hot_opens(), 1);
    drop(second);
}

#[test]
fn auto_streams_what_would_leave_no_room_for_others() {
    if !can_mount() {
        return;
    }
    let fixture = sharded();
    let how = How { budget: 96 << 20, behaviour: policy(OpenPolicy::Auto), limits: patient(), ..How::default() };
    let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
    std::fs::read(mount.path("config.json")).expect("read");
    // A loader of a model that is larger than the cache, which keeps every shard mapped.
    let maps: Vec<&'static [u8]> = (1..=3)
        .map(|shard| {
            let name = format!("model-{shard}.safetensors");
            let file = File::open(mount.path(&name)).expect("open");
            let mapped = map(&file, plain(&fixture, &name).len());
            assert!(mapped == plain(&fixture, &name), "{name}");
            mapped
        })
        .collect();
    assert!(mount.hot_opens() <= 1, "two shards would not leave a quarter of the cache");
    maps.into_iter().for_each(unmap);
}

#[test]
fn auto_lets_an_open_go_when_the_store_is_too_slow_for_it() {
    if !can_mount() {
        return;
    }
    let fixture = sharded();
    let store = Faulty::new((*fixture.store).clone());
    store.on(When::call(Call::ReadRange).after(1), Fault::Delay(Duration::from_secs(8)));
    let limits = CacheLimits { prefetches_max: 1, ..CacheLimits::default() };
    let how = How { behaviour: policy(OpenPolicy::Auto), limits, ..How::default() };
    let mount = Mounted::new(how, || fixture.model(Arc::new(store.clone()), Verify::Strict));
    std::fs::read(mount.path("config.json")).expect("read");
    let started = Instant::now();
    let file = File::open(mount.path("model-1.safetensors")).expect("open");
    if mount.fs.passthrough() {
        assert_eq!(mount.cache.telemetry().opens_held_in_vain.get(), 1);
    }
    assert_eq!(mount.hot_opens(), 0);
    eprintln!("the open took {:?}", started.elapsed());
    store.heal();
    drop(file);
}
