//! `--profile`: a mount writes down in which order a model was read, and the next one fetches it in that order.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/mounted.rs"]
mod mounted;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use fixture::{Fixture, NAME, Random, Style};
use modelfs::cache::{CacheLimits, Model};
use modelfs::crypto::Verify;
use modelfs::fuse::{Behaviour, OpenPolicy};
use modelfs::read::profile::{KnownFile, Load, Profile, Recorder, Run, UNIT_BYTES};
use modelfs::store::ChunkSource;
use modelfs::store::fault::{Call, Fault, Faulty, When};
use modelfs::store::memory::MemoryStore;
use mounted::{How, Mounted, can_mount};

const UNIT: usize = UNIT_BYTES as usize;

fn sample() -> Fixture {
    let mut random = Random(11);
    let files = vec![
        ("a.bin".to_owned(), random.bytes(4 * UNIT)),
        ("b.bin".to_owned(), random.bytes(3 * UNIT + 5)),
        ("c.bin".to_owned(), random.bytes(2 * UNIT)),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let style = Style { chunk_log2: 23, pack_below: 2 << 20, ..Style::default() };
    runtime.block_on(Fixture::seal(files, style, &mut random))
}

/// One fetch at a time, so that the order of fetches is the order in which they were asked for.
fn one_by_one(open: OpenPolicy) -> How {
    let limits = CacheLimits { fetches_max: 1, prefetches_max: 1, ..CacheLimits::default() };
    How { limits, behaviour: Behaviour { open, ..Behaviour::default() }, ..How::default() }
}

fn known(model: &Model) -> impl Fn(&str) -> Option<KnownFile> {
    move |path| {
        let files = model.manifest.files();
        let at = files.iter().position(|file| model.manifest.path(file) == path)?;
        Some(KnownFile { file: at as u32, size: files[at].size })
    }
}

/// The data objects in the order in which they were asked for, one entry a range.
fn fetched(store: &Faulty<MemoryStore>) -> Vec<String> {
    store.log().into_iter().filter(|(call, _)| *call == Call::ReadRange).map(|(_, name)| name).collect()
}

fn open_faulty(fixture: &Fixture, store: &Faulty<MemoryStore>) -> Arc<Model> {
    let source: Arc<dyn ChunkSource> = Arc::new(store.clone());
    fixture.model(source, Verify::Strict)
}

fn replayed(fixture: &Fixture, load: &Load, bytes_max: u64) -> (Vec<String>, u64) {
    let store = Faulty::new((*fixture.store).clone());
    let mount = Mounted::new(one_by_one(OpenPolicy::Lazy), || open_faulty(fixture, &store));
    let model = mount.fs.vfs().models()[0].clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let asked = runtime.block_on(mount.fs.reader().replay(&model, load.ranges(known(&model)), bytes_max));
    for (path, bytes) in &fixture.files {
        assert!(std::fs::read(mount.path(path)).expect(path) == *bytes, "{path} after the replay");
    }
    let calls = fetched(&store);
    (calls, asked)
}

#[test]
fn the_next_mount_fetches_in_the_order_in_which_the_last_one_was_read() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let store = Faulty::new((*fixture.store).clone());
    let recorder = Arc::new(Recorder::default());
    let mount = Mounted::new(one_by_one(OpenPolicy::Lazy), || open_faulty(&fixture, &store));
    mount.fs.reader().set_recorder(recorder.clone());
    let places = [("c.bin", 1), ("a.bin", 2), ("b.bin", 3), ("a.bin", 0), ("c.bin", 0), ("b.bin", 1)];
    for (path, unit) in places {
        let file = std::fs::File::open(mount.path(path)).expect("open");
        file.read_exact_at(&mut [0; 4], (unit * UNIT) as u64).expect("read");
    }
    let first_order = fetched(&store);
    assert_eq!(first_order.len(), places.len(), "one chunk a place");
    let model = mount.fs.vfs().models()[0].clone();
    let digest = model.digest.to_string();
    let load =
        recorder.load(0, NAME, &digest, |file| model.manifest.path(&model.manifest.files()[file as usize]).into());
    let text = {
        let mut profile = Profile::default();
        profile.merge(load);
        profile.text()
    };
    mount.unmount();

    let profile = Profile::parse(&text).expect("own text");
    let load = profile.load_of(NAME).expect("recorded");
    let (second_order, asked) = replayed(&fixture, load, u64::MAX);
    assert_eq!(second_order[..places.len()], first_order);
    assert_eq!(asked, 5 * UNIT_BYTES + 5);

    // The share is kept, from the front.
    let (calls, asked) = replayed(&fixture, load, 2 * UNIT_BYTES + 4);
    assert_eq!(calls[..2], first_order[..2]);
    assert_eq!(asked, 2 * UNIT_BYTES);
}

#[test]
fn a_hostile_profile_changes_nothing_but_the_order() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let runs = [
        (2, 0, u32::MAX, 0),
        (0, u32::MAX, u32::MAX, 9),
        (9, 1, 1, 1),
        (1, 3, 1, 0),
        (1, 3, 1, u32::MAX),
        (0, 0, 0, 0),
    ];
    let load = Load {
        name: NAME.into(),
        manifest: "no digest".into(),
        files: vec!["../../etc/passwd".into(), "b.bin".into(), "a.bin".into()],
        runs: runs.into_iter().map(Run::from).collect(),
    };
    let text = Profile { loads: vec![load] }.text();
    let profile = Profile::parse(&text).expect("odd, but within its bounds");
    // `replayed` compares every byte of every file afterwards.
    let (_, asked) = replayed(&fixture, profile.load_of(NAME).expect("there"), u64::MAX);
    assert_eq!(asked, 4 * UNIT_BYTES + 5);
}

#[test]
fn a_replay_gives_way_to_readers_and_ends_although_the_store_refuses() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    let store = Faulty::new((*fixture.store).clone());
    store.on(When::call(Call::ReadRange).times(2), Fault::Fail(modelfs::error::Code::NotFound));
    store.on(When::call(Call::ReadRange), Fault::Delay(Duration::from_millis(20)));
    let mount = Mounted::new(How::default(), || open_faulty(&fixture, &store));
    let model = mount.fs.vfs().models()[0].clone();
    let ranges = vec![(0, 0..4 * UNIT_BYTES), (1, 0..3 * UNIT_BYTES)];
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let replay = runtime.spawn({
        let fs = mount.fs.clone();
        async move { fs.reader().replay(&model, ranges, u64::MAX).await }
    });
    mount.wait_until("the refusals", |_| store.count(Call::ReadRange) >= 2);
    let bytes = std::fs::read(mount.path("c.bin")).expect("a reader is served meanwhile");
    assert!(bytes == fixture.files[2].1);
    assert_eq!(runtime.block_on(replay).expect("ended"), 7 * UNIT_BYTES);
}

#[test]
fn a_file_that_was_read_whole_is_held_at_its_first_open_the_next_time() {
    if !can_mount() {
        return;
    }
    let fixture = sample();
    for expected in [false, true] {
        let how = How { behaviour: Behaviour { open: OpenPolicy::Auto, ..Behaviour::default() }, ..How::default() };
        let mount = Mounted::new(how, || fixture.model(fixture.store.clone(), Verify::Strict));
        if !mount.has_passthrough() {
            return;
        }
        if expected {
            mount.fs.reader().set_expected_whole([(0, 1)].into());
        }
        std::fs::File::open(mount.path("b.bin")).expect("open");
        assert_eq!(mount.hot_opens(), u64::from(expected));
        std::fs::File::open(mount.path("a.bin")).expect("open");
        assert_eq!(mount.hot_opens(), u64::from(expected), "a file that the profile does not name");
    }
}
