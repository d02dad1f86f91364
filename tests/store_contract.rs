//! The contract of `ChunkSource` and `ChunkSink`, one suite over every store there is, and what hostile neighbours of a
//! local store cannot do.

mod common;

use std::any::Any;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use modelfs::error::{Code, Error};
use modelfs::store::fault::{Call, Fault, Faulty, When};
use modelfs::store::local::LocalStore;
use modelfs::store::memory::MemoryStore;
use modelfs::store::s3::S3Store;
use modelfs::store::{ChunkSink, ChunkSource, Patience, Patient, StoreOptions, StoreUrl, open};

/// A store to test and what must live as long as it does.
struct Ground {
    store: Arc<dyn ChunkSink>,
    _keep: Box<dyn Any + Send>,
}

fn memory() -> Option<Ground> {
    Some(Ground { store: Arc::new(MemoryStore::new()), _keep: Box::new(()) })
}

fn local() -> Option<Ground> {
    let dir = tempfile::tempdir().expect("a folder");
    let store = LocalStore::open(&dir.path().join("store")).expect("a root to be");
    Some(Ground { store: Arc::new(store), _keep: Box::new(dir) })
}

fn faulty_without_a_script() -> Option<Ground> {
    Some(Ground { store: Arc::new(Faulty::new(MemoryStore::new())), _keep: Box::new(()) })
}

fn patient() -> Option<Ground> {
    let dir = tempfile::tempdir().expect("a folder");
    let url = StoreUrl::Local(dir.path().join("deep/store"));
    Some(Ground { store: open(&url, &StoreOptions::default()).expect("a root to be"), _keep: Box::new(dir) })
}

fn s3() -> Option<Ground> {
    let server = common::S3Server::start()?;
    let opts = StoreOptions { aws: server.settings(), ignore_environment: true, ..StoreOptions::default() };
    let url: StoreUrl = "s3://models/team/store".parse().expect("a URL");
    Some(Ground { store: open(&url, &opts).expect("settings"), _keep: Box::new(server) })
}

fn s3_at_the_root_of_its_bucket_without_patience() -> Option<Ground> {
    let server = common::S3Server::start()?;
    let opts = StoreOptions { aws: server.settings(), ignore_environment: true, ..StoreOptions::default() };
    let store = S3Store::open("models", "", &opts).expect("settings");
    Some(Ground { store: Arc::new(store), _keep: Box::new(server) })
}

macro_rules! suite {
    ($($ground:ident)*: $rules:tt) => { $(suite!(@one $ground $rules);)* };
    (@one $ground:ident { $($rule:ident)* }) => {
        mod $ground {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $rule() {
                    if let Some(ground) = super::$ground() {
                        super::rules::$rule(ground.store.clone()).await;
                    }
                }
            )*
        }
    };
}

suite! {
    memory local faulty_without_a_script patient s3 s3_at_the_root_of_its_bucket_without_patience: {
        a_small_object_reads_back
        a_second_create_keeps_the_first_bytes
        of_eight_creates_at_once_one_wins
        the_probe_for_create_only_passes_and_leaves_nothing
        read_small_stops_at_its_cap
        ranges_are_exact_or_refused
        what_is_not_there_is_not_found
        lists_are_sorted_recursive_and_below_the_prefix
        list_dirs_names_the_next_component_once
        a_deleted_object_is_gone
        a_hint_is_replaced
        data_objects_of_every_size_read_back
        an_unfinished_object_is_invisible
        a_data_object_may_be_shorter_than_announced_but_not_longer_or_cut
        odd_names_are_refused_by_every_call
        sixty_four_reads_at_once_are_all_right
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> Code {
    result.expect_err("refused").code()
}

/// Bytes that differ at every offset of interest and between seeds.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

mod rules {
    use super::*;

    type Store = Arc<dyn ChunkSink>;

    async fn range(store: &Store, name: &str, range: std::ops::Range<u64>) -> Result<Vec<u8>, Error> {
        Ok(store.read_range(name, range).await?.concat())
    }

    async fn write_object(store: &Store, name: &str, bytes: &[u8], piece: usize) -> Result<(), Error> {
        let mut writer = store.begin(name, bytes.len() as u64).await?;
        for piece in bytes.chunks(piece) {
            writer.write(Bytes::copy_from_slice(piece)).await?;
        }
        writer.finish(bytes.len() as u64).await
    }

    pub async fn a_small_object_reads_back(store: Store) {
        for (name, len) in [("m/empty", 0), ("m/one", 1), ("m/d/e/e/p", 1000), ("top", 70_000)] {
            let bytes = Bytes::from(noise(len as u64, len));
            store.create(name, bytes.clone()).await.expect(name);
            assert_eq!(store.size(name).await.expect(name), len as u64);
            assert_eq!(store.read_small(name, 1 << 20).await.expect(name), bytes);
        }
        assert!(!store.describe().contains("secret"));
    }

    pub async fn a_second_create_keeps_the_first_bytes(store: Store) {
        store.create("m/x", Bytes::from_static(b"first")).await.expect("new");
        store.create("m/x", Bytes::from_static(b"first")).await.expect("the same bytes again are a success");
        for other in [&b"other"[..], b"firs", b"first and more", b""] {
            assert_eq!(code(store.create("m/x", Bytes::copy_from_slice(other)).await), Code::Exists);
        }
        assert_eq!(store.read_small("m/x", 100).await.expect("there"), "first");
    }

    pub async fn of_eight_creates_at_once_one_wins(store: Store) {
        let tasks = (0..8_u8).map(|i| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.create("m/r/prod/7", Bytes::from(vec![i; 100])).await })
        });
        let results = futures::future::join_all(tasks).await;
        let won = results.iter().filter(|result| result.as_ref().expect("no panic").is_ok()).count();
        for result in results.into_iter().map(|result| result.expect("no panic")) {
            // A loser may also be told to ask again: S3 answers 409 when two creates meet.
            let told = result.map_err(|error| (error.code(), error.chain()));
            assert!(matches!(told, Ok(()) | Err((Code::Exists | Code::Unreachable, _))), "{told:?}");
        }
        assert_eq!(won, 1);
        assert_eq!(store.size("m/r/prod/7").await.expect("the winner's"), 100);
    }

    pub async fn the_probe_for_create_only_passes_and_leaves_nothing(store: Store) {
        store.check_create_only().await.expect("a store that keeps its promise");
        assert_eq!(store.list("").await.expect("listed"), []);
    }

    pub async fn read_small_stops_at_its_cap(store: Store) {
        store.create("m/x", Bytes::from(vec![7; 5000])).await.expect("new");
        assert_eq!(store.read_small("m/x", 5000).await.expect("exactly the cap").len(), 5000);
        assert_eq!(code(store.read_small("m/x", 4999).await), Code::Limit);
        assert_eq!(code(store.read_small("m/x", 0).await), Code::Limit);
    }

    pub async fn ranges_are_exact_or_refused(store: Store) {
        let bytes = noise(3, 100_000);
        store.create("m/x", Bytes::from(bytes.clone())).await.expect("new");
        for (start, end) in [(0, 1), (0, 100_000), (1, 99_999), (50_000, 50_001), (99_999, 100_000), (40_000, 90_000)] {
            let got = range(&store, "m/x", start..end).await.expect("inside");
            assert!(got == bytes[start as usize..end as usize], "{start}..{end}");
        }
        // Past the end is an error and never a short answer, wherever it begins.
        for (start, end) in [(0, 100_001), (99_999, 100_001), (100_000, 100_001), (1 << 40, (1 << 40) + 1)] {
            assert_eq!(code(range(&store, "m/x", start..end).await), Code::Length, "{start}..{end}");
        }
        let (empty, backward) = (5..5, std::ops::Range { start: 6, end: 5 });
        assert_eq!(code(range(&store, "m/x", empty).await), Code::Usage);
        assert_eq!(code(range(&store, "m/x", backward).await), Code::Usage);
    }

    pub async fn what_is_not_there_is_not_found(store: Store) {
        for _ in 0..2 {
            assert_eq!(code(range(&store, "m/none", 0..1).await), Code::NotFound);
            assert_eq!(code(store.read_small("m/none", 10).await), Code::NotFound);
            assert_eq!(code(store.size("none").await), Code::NotFound);
            store.delete("m/none").await.expect("deleting nothing is a success");
            assert_eq!(store.list("m/").await.expect("nothing is no error"), []);
            assert_eq!(store.list_dirs("").await.expect("nothing is no error"), [""; 0]);
            // The second time the folder is there.
            store.create("m/y", Bytes::from_static(b"y")).await.expect("new");
            store.delete("m/y").await.expect("there");
        }
    }

    const NAMES: [&str; 7] = ["a/d/1", "a/d/2", "a/k/v/0000000001", "a/name", "ab/d/3", "b/d/4", "top"];

    async fn filled(store: &Store) {
        for (i, name) in NAMES.iter().enumerate() {
            store.create(name, Bytes::from(vec![0; i + 1])).await.expect(name);
        }
    }

    pub async fn lists_are_sorted_recursive_and_below_the_prefix(store: Store) {
        filled(&store).await;
        for prefix in ["", "a/", "a/d/", "ab/", "b/", "c/", "a/k/v/", "a/name/"] {
            let wanted: Vec<_> = NAMES.iter().filter(|name| name.starts_with(prefix)).copied().collect();
            let listed = store.list(prefix).await.expect(prefix);
            assert_eq!(listed.iter().map(|listed| listed.name.as_str()).collect::<Vec<_>>(), wanted, "{prefix:?}");
            for listed in listed {
                let index = NAMES.iter().position(|name| *name == listed.name).expect("one of ours");
                assert_eq!(listed.size, index as u64 + 1);
            }
        }
        for odd in ["a", "/", "a//", "../", "a/../"] {
            assert_eq!(code(store.list(odd).await), Code::Usage, "{odd:?}");
            assert_eq!(code(store.list_dirs(odd).await), Code::Usage, "{odd:?}");
        }
    }

    pub async fn list_dirs_names_the_next_component_once(store: Store) {
        filled(&store).await;
        for (prefix, wanted) in
            [("", vec!["a", "ab", "b"]), ("a/", vec!["d", "k"]), ("a/k/", vec!["v"]), ("a/d/", vec![]), ("c/", vec![])]
        {
            assert_eq!(store.list_dirs(prefix).await.expect(prefix), wanted, "{prefix:?}");
        }
        store.delete("a/k/v/0000000001").await.expect("there");
        assert_eq!(store.list_dirs("a/").await.expect("listed"), ["d"], "a folder without objects is none");
    }

    pub async fn a_deleted_object_is_gone(store: Store) {
        store.create("m/x", Bytes::from_static(b"1")).await.expect("new");
        store.delete("m/x").await.expect("there");
        store.delete("m/x").await.expect("gone is what was wanted");
        assert_eq!(code(store.size("m/x").await), Code::NotFound);
        store.create("m/x", Bytes::from_static(b"2")).await.expect("new again");
        assert_eq!(store.read_small("m/x", 10).await.expect("there"), "2");
    }

    pub async fn a_hint_is_replaced(store: Store) {
        for bytes in [&b"first"[..], b"second, longer", b"3"] {
            store.replace_hint("m/r/prod/head", Bytes::from_static(bytes)).await.expect("replaced");
            assert_eq!(store.read_small("m/r/prod/head", 100).await.expect("there"), bytes);
        }
        assert_eq!(store.list("m/").await.expect("listed").len(), 1);
    }

    pub async fn data_objects_of_every_size_read_back(store: Store) {
        const MIB: usize = 1 << 20;
        let chunk = 8_390_656;
        for (len, piece) in [
            (1, 1),
            (129, 50),
            (8 * MIB - 1, MIB),
            (8 * MIB, 8 * MIB),
            (8 * MIB + 1, 3 * MIB + 7),
            (128 + 3 * chunk + 77, chunk),
            (50 * MIB, 50 * MIB),
        ] {
            let name = format!("m/d/{len}");
            let bytes = noise(len as u64, len);
            write_object(&store, &name, &bytes, piece).await.expect(&name);
            assert_eq!(store.size(&name).await.expect(&name), len as u64);
            assert!(range(&store, &name, 0..len as u64).await.expect(&name) == bytes, "{name}");
            let last = (len as u64 - 1)..len as u64;
            assert_eq!(range(&store, &name, last).await.expect(&name), bytes[len - 1..]);
        }
        assert_eq!(store.list("m/d/").await.expect("listed").len(), 7);
    }

    pub async fn an_unfinished_object_is_invisible(store: Store) {
        for len in [1000_u64, 20 << 20] {
            for give_up in [true, false] {
                let mut writer = store.begin("m/d/x", len).await.expect("begun");
                writer.write(Bytes::from(vec![1; len as usize])).await.expect("taken");
                assert_eq!(code(store.size("m/d/x").await), Code::NotFound);
                if give_up {
                    writer.abort().await;
                } else {
                    drop(writer);
                }
                assert_eq!(code(store.size("m/d/x").await), Code::NotFound);
                assert_eq!(store.list("").await.expect("listed"), []);
            }
        }
    }

    pub async fn a_data_object_may_be_shorter_than_announced_but_not_longer_or_cut(store: Store) {
        for len in [1000_u64, 20 << 20] {
            let mut writer = store.begin("m/d/x", len).await.expect("begun");
            writer.write(Bytes::from(vec![1; len as usize - 1])).await.expect("taken");
            assert_eq!(code(writer.finish(len).await), Code::Length);

            for (name, shorter) in [("m/d/one", len - 1), ("m/d/few", 10)] {
                let mut writer = store.begin(name, len).await.expect("begun");
                writer.write(Bytes::from(vec![1; shorter as usize])).await.expect("taken");
                writer.finish(shorter).await.expect("published");
                assert_eq!(store.size(name).await.expect("there"), shorter);
                store.delete(name).await.expect("deleted");
            }

            let mut writer = store.begin("m/d/x", len).await.expect("begun");
            writer.write(Bytes::from(vec![1; len as usize])).await.expect("taken");
            assert_eq!(code(writer.write(Bytes::from_static(&[1])).await), Code::Length);
            writer.abort().await;
            assert_eq!(code(store.size("m/d/x").await), Code::NotFound);
        }
    }

    pub async fn odd_names_are_refused_by_every_call(store: Store) {
        let long = format!("m/{}", "a".repeat(256));
        for name in ["", "/x", "x/", "a//b", "../x", "a/../b", "./x", "a\\b", "a b", "ä", "a\u{202e}b", "a\nb", &long]
        {
            assert_eq!(code(store.create(name, Bytes::new()).await), Code::Usage, "{name:?}");
            assert_eq!(code(store.replace_hint(name, Bytes::new()).await), Code::Usage, "{name:?}");
            assert_eq!(store.begin(name, 1).await.err().expect("refused").code(), Code::Usage, "{name:?}");
            assert_eq!(code(store.delete(name).await), Code::Usage, "{name:?}");
            assert_eq!(code(store.read_range(name, 0..1).await), Code::Usage, "{name:?}");
            assert_eq!(code(store.read_small(name, 1).await), Code::Usage, "{name:?}");
            assert_eq!(code(store.size(name).await), Code::Usage, "{name:?}");
        }
        let longest = format!("m/{}/{}", "a".repeat(255), "b".repeat(253));
        store.create(&longest, Bytes::from_static(b"1")).await.expect("the longest name");
        assert_eq!(store.list("m/").await.expect("listed")[0].name, longest);
    }

    pub async fn sixty_four_reads_at_once_are_all_right(store: Store) {
        let bytes = Bytes::from(noise(9, 4 << 20));
        store.create("m/x", bytes.clone()).await.expect("new");
        let tasks = (0..64_usize).map(|i| {
            let (store, bytes) = (Arc::clone(&store), bytes.clone());
            tokio::spawn(async move {
                let (start, end) = (i * 64_000, i * 64_000 + 100_000);
                let got = range(&store, "m/x", start as u64..end as u64).await.expect("served");
                assert!(got == bytes[start..end], "read {i}");
            })
        });
        for task in futures::future::join_all(tasks).await {
            task.expect("no panic");
        }
    }
}

// What only some stores do.

/// THREAT_MODEL (f) row 74: the store ignores If-None-Match.
#[tokio::test]
async fn a_store_that_replaces_on_create_is_unfit() {
    let store = Faulty::new(MemoryStore::new());
    store.on(When::call(Call::Create), Fault::IgnoreCreateOnly);
    assert_eq!(code(store.check_create_only().await), Code::StoreUnfit);
}

fn quick() -> Patience {
    Patience {
        attempt: Duration::from_millis(100),
        stall: Duration::from_millis(50),
        // Not what ends it: a machine that stands still between two attempts has all four.
        budget: Duration::from_secs(600),
        attempts_max: 4,
        pause_first: Duration::from_millis(1),
        pause_max: Duration::from_millis(4),
    }
}

/// THREAT_MODEL (f) row 73: the create was applied and its answer lost.
#[tokio::test]
async fn a_create_whose_answer_was_lost_is_read_back() {
    let faulty = Faulty::new(MemoryStore::new());
    faulty.on(When::call(Call::Create), Fault::AppliedButLost);
    let store = Patient::new(faulty.clone(), quick());
    store.create("m/r/1", Bytes::from_static(b"ours")).await.expect("read back and found equal");
    faulty.inner().put("m/r/2", &b"theirs"[..]);
    assert_eq!(code(store.create("m/r/2", Bytes::from_static(b"ours")).await), Code::Exists);
}

/// THREAT_MODEL (f) row 17: bounded retries, then an error that says how many.
#[tokio::test]
async fn a_store_that_is_away_is_asked_again_within_bounds() {
    let faulty = Faulty::new(MemoryStore::new());
    faulty.inner().put("m/x", vec![1; 10]);
    let store = Patient::new(faulty.clone(), quick());

    faulty.on(When::call(Call::ReadRange).times(3), Fault::Fail(Code::Unreachable));
    store.read_range("m/x", 0..10).await.expect("the fourth attempt is served");
    assert_eq!(faulty.count(Call::ReadRange), 4);

    faulty.on(When::call(Call::ReadRange), Fault::Fail(Code::Unreachable));
    let err = store.read_range("m/x", 0..10).await.expect_err("four attempts are all");
    assert_eq!(err.code(), Code::Unreachable);
    assert!(err.chain().contains("after 4 attempts"), "{}", err.chain());
    assert_eq!(faulty.count(Call::ReadRange), 8);
}

#[tokio::test]
async fn a_stalled_store_ends_in_a_deadline_and_others_are_served_meanwhile() {
    let faulty = Faulty::new(MemoryStore::new());
    faulty.inner().put("m/x", vec![1; 10]);
    faulty.inner().put("m/y", vec![1; 10]);
    faulty.on(When::any().name("m/x"), Fault::Stall);
    let store = Patient::new(faulty, quick());
    let start = Instant::now();
    let (stalled, served) = tokio::join!(store.read_range("m/x", 0..10), store.read_range("m/y", 0..10));
    assert_eq!(code(stalled), Code::Deadline);
    served.expect("served");
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[tokio::test]
async fn an_answer_that_will_not_change_is_not_asked_for_again() {
    for (refusal, calls) in
        [(Code::NotFound, 1), (Code::StoreDenied, 1), (Code::StoreAnswer, 1), (Code::Limit, 1), (Code::Length, 2)]
    {
        let faulty = Faulty::new(MemoryStore::new());
        faulty.on(When::call(Call::ReadRange), Fault::Fail(refusal));
        let store = Patient::new(faulty.clone(), quick());
        assert_eq!(code(store.read_range("m/x", 0..10).await), refusal);
        assert_eq!(faulty.count(Call::ReadRange), calls, "{refusal}");
    }
}

// Local stores among hostile neighbours.

async fn local_with_object(dir: &Path) -> LocalStore {
    let store = LocalStore::open(&dir.join("store")).expect("a root to be");
    store.create("m/d/x", Bytes::from(vec![5; 1000])).await.expect("new");
    store
}

#[tokio::test]
async fn folders_and_objects_of_a_local_store_are_for_their_owner_only() {
    let dir = tempfile::tempdir().expect("a folder");
    local_with_object(dir.path()).await;
    for (path, mode) in [("store", 0o700), ("store/m", 0o700), ("store/m/d", 0o700), ("store/m/d/x", 0o600)] {
        let meta = std::fs::metadata(dir.path().join(path)).expect(path);
        assert_eq!(meta.permissions().mode() & 0o7777, mode, "{path}");
    }
    let staged = std::fs::read_dir(dir.path().join("store/.staging")).expect("staging").count();
    assert_eq!(staged, 0, "nothing is left in staging");
}

#[tokio::test]
async fn a_root_that_is_a_symlink_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    local_with_object(dir.path()).await;
    symlink(dir.path().join("store"), dir.path().join("link")).expect("a link");
    for path in ["link", "link/", "link//"] {
        let url: StoreUrl = format!("{}/{path}", dir.path().display()).parse().expect("a path");
        assert_eq!(code(open(&url, &StoreOptions::default())), Code::StorePerms, "{path}");
    }
    std::fs::write(dir.path().join("file"), b"").expect("a file");
    assert_eq!(code(LocalStore::open(&dir.path().join("file"))), Code::StorePerms);
}

#[tokio::test]
async fn nothing_is_published_where_others_can_write() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = local_with_object(dir.path()).await;
    for mode in [0o777, 0o770, 0o702] {
        std::fs::set_permissions(dir.path().join("store"), PermissionsExt::from_mode(mode)).expect("ours");
        assert_eq!(code(store.create("m/y", Bytes::new()).await), Code::StorePerms);
        assert_eq!(code(store.replace_hint("m/y", Bytes::new()).await), Code::StorePerms);
        assert_eq!(code(store.delete("m/d/x").await), Code::StorePerms);
        assert_eq!(store.begin("m/y", 1).await.err().expect("refused").code(), Code::StorePerms);
        store.read_range("m/d/x", 0..1000).await.expect("reading needs no trust in the folder");
    }
}

#[tokio::test]
async fn no_symlink_is_followed_below_the_root() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = local_with_object(dir.path()).await;
    let root = dir.path().join("store");
    std::fs::write(dir.path().join("outside"), vec![9; 1000]).expect("a file outside");
    symlink(dir.path().join("outside"), root.join("m/d/out")).expect("a link");
    symlink("x", root.join("m/d/in")).expect("a link");
    symlink(dir.path(), root.join("m/up")).expect("a link");
    symlink("m", root.join("n")).expect("a link");
    for name in ["m/d/out", "m/d/in", "m/up/outside", "n/d/x"] {
        assert_eq!(code(store.read_range(name, 0..10).await), Code::StorePerms, "{name}");
        assert_eq!(code(store.read_small(name, 9999).await), Code::StorePerms, "{name}");
        assert_eq!(code(store.size(name).await), Code::StorePerms, "{name}");
    }
    for name in ["m/up/new", "n/new"] {
        assert_eq!(code(store.create(name, Bytes::new()).await), Code::StorePerms, "{name}");
        assert_eq!(code(store.delete(name).await), Code::StorePerms, "{name}");
    }
    assert_eq!(code(store.create("m/d/out", Bytes::from_static(b"x")).await), Code::StorePerms);
    let names: Vec<_> = store.list("").await.expect("listed").into_iter().map(|listed| listed.name).collect();
    assert_eq!(names, ["m/d/x"], "links are listed nowhere");
    assert_eq!(store.list_dirs("").await.expect("listed"), ["m"]);
    store.replace_hint("m/d/out", Bytes::from_static(b"hint")).await.expect("the link itself is replaced");
    assert_eq!(std::fs::read(dir.path().join("outside")).expect("there"), vec![9; 1000], "never through it");
}

#[tokio::test]
async fn a_fifo_or_folder_in_place_of_an_object_is_refused_without_a_wait() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = local_with_object(dir.path()).await;
    let fifo = std::ffi::CString::new(dir.path().join("store/m/fifo").into_os_string().into_encoded_bytes());
    // SAFETY: the path is NUL-terminated and outlives the call.
    assert_eq!(unsafe { libc::mkfifo(fifo.expect("no NUL").as_ptr(), 0o600) }, 0);
    for name in ["m/fifo", "m/d"] {
        let answers = async {
            assert_eq!(code(store.read_range(name, 0..10).await), Code::StorePerms, "{name}");
            assert_eq!(code(store.read_small(name, 10).await), Code::StorePerms, "{name}");
            assert_eq!(code(store.size(name).await), Code::StorePerms, "{name}");
        };
        tokio::time::timeout(Duration::from_secs(60), answers).await.expect("no wait for a writer");
    }
    assert_eq!(store.list("").await.expect("listed").len(), 1);
}

#[tokio::test]
async fn an_object_changed_behind_our_back_is_never_read_short() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = local_with_object(dir.path()).await;
    let path = dir.path().join("store/m/d/x");
    std::fs::write(&path, vec![5; 999]).expect("truncated");
    assert_eq!(code(store.read_range("m/d/x", 0..1000).await), Code::Length);
    store.read_range("m/d/x", 0..999).await.expect("what is there");
    // Trailing bytes do not matter to ranges (THREAT_MODEL (f) row 5); `verify` sees the size.
    std::fs::write(&path, vec![5; 1001]).expect("extended");
    store.read_range("m/d/x", 0..1000).await.expect("what was asked for");
    assert_eq!(store.size("m/d/x").await.expect("there"), 1001);
}

#[tokio::test]
async fn what_dead_publishers_left_is_swept_after_its_grace() {
    let dir = tempfile::tempdir().expect("a folder");
    local_with_object(dir.path()).await;
    let staging = dir.path().join("store/.staging");
    for (name, days) in [("old", 8), ("young", 6)] {
        let file = std::fs::File::create(staging.join(name)).expect("a staged file");
        let then = std::time::SystemTime::now() - Duration::from_secs(days * 24 * 3600);
        file.set_modified(then).expect("ours");
    }
    let store = LocalStore::open(&dir.path().join("store")).expect("there");
    assert_eq!(store.list("").await.expect("listed").len(), 1, "staging is listed nowhere");
    store.create("m/y", Bytes::new()).await.expect("new");
    let left: Vec<_> =
        std::fs::read_dir(staging).expect("there").map(|entry| entry.expect("readable").file_name()).collect();
    assert_eq!(left, ["young"]);
}

// S3, where the server is real.

/// For a real server on a busy machine: few attempts, each with time.
fn few_attempts() -> Patience {
    Patience { attempts_max: 3, pause_first: Duration::from_millis(1), ..Patience::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_and_buckets_are_told_apart() {
    let Some(server) = common::S3Server::start() else { return };
    let with = |name: &str, value: &str| {
        let mut aws = server.settings();
        aws.retain(|(seen, _)| seen != name);
        aws.push((name.to_owned(), value.to_owned()));
        StoreOptions { aws, ignore_environment: true, patience: few_attempts(), ..StoreOptions::default() }
    };
    let store = |url: &str, opts: &StoreOptions| open(&url.parse().expect("a URL"), opts).expect("settings");

    let denied = store("s3://models/x", &with("AWS_SECRET_ACCESS_KEY", "wrong-secret"));
    assert_eq!(code(denied.read_small("m/x", 10).await), Code::StoreDenied);
    assert_eq!(code(denied.list("").await), Code::StoreDenied);
    assert_eq!(code(denied.create("m/x", Bytes::new()).await), Code::StoreDenied);

    let missing = store("s3://other-bucket/x", &with("AWS_REGION", "us-east-1"));
    assert_eq!(code(missing.list("").await), Code::NotFound);
    assert_eq!(code(missing.create("m/x", Bytes::new()).await), Code::NotFound);

    // A port that is given to nobody who asks for any.
    let gone = store("s3://models/x", &with("AWS_ENDPOINT_URL", "http://127.0.0.1:1"));
    let err = gone.read_small("m/x", 10).await.expect_err("nobody listens");
    assert_eq!(err.code(), Code::Unreachable);
    assert!(err.chain().contains("attempts"), "{}", err.chain());
}

/// THREAT_MODEL (f) rows 3, 4: an object cut behind the server's back.
#[tokio::test(flavor = "multi_thread")]
async fn an_s3_object_that_became_shorter_is_an_error_and_never_a_short_read() {
    let Some(server) = common::S3Server::start() else { return };
    let opts = StoreOptions {
        aws: server.settings(),
        ignore_environment: true,
        patience: few_attempts(),
        ..StoreOptions::default()
    };
    let store = open(&"s3://models".parse().expect("a URL"), &opts).expect("settings");
    store.create("m/x", Bytes::from(vec![5; 1000])).await.expect("new");
    std::fs::write(server.bucket_dir().join("m/x"), vec![5; 500]).expect("its plain file");
    assert_eq!(code(store.read_range("m/x", 0..1000).await), Code::Length);
    assert_eq!(code(store.read_range("m/x", 400..600).await), Code::Length);
    assert_eq!(code(store.read_range("m/x", 500..1000).await), Code::Length);
}

#[test]
fn s3_settings_that_cannot_work_are_refused_at_once() {
    for (name, value) in [
        ("AWS_ENDPOINT_URL", "http://minio.example.org"),
        ("AWS_ENDPOINT_URL", "nonsense"),
        ("AWS_NO_SUCH_SETTING", "1"),
        ("AWS_ACCESS_KEY_ID", "key without a secret"),
    ] {
        let aws = vec![(name.to_owned(), value.to_owned())];
        let opts = StoreOptions { aws, ignore_environment: true, ..StoreOptions::default() };
        assert_eq!(code(open(&"s3://models/x".parse().expect("a URL"), &opts)), Code::Usage, "{name}={value}");
    }
}
