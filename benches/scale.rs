//! How long a million files, ten tebibytes and ten thousand opens take; tests/scale.rs holds what they cost in memory.
//!
//! `cargo bench --bench scale -- [--rounds N] [--json PATH]`; as root the million files are mounted as well, and the
//! time counts until the kernel has answered a `stat` of one of them.

mod common;
#[path = "../tests/common/scale.rs"]
mod scale;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Instant;

use common::{Options, Results};
use modelfs::cache::{Cache, CacheLimits};
use modelfs::fuse::attach::{MountLook, attach};
use modelfs::fuse::{Behaviour, ModelFs, OpenPolicy};
use modelfs::mem::{Arena, ArenaPlan, has_cap_sys_admin};
use modelfs::read::Reader;
use modelfs::telemetry::Telemetry;
use modelfs::vfs::{Ownership, ROOT, Vfs};
use scale::Huge;

const CACHE_BYTES: u64 = 256 << 20;

fn main() {
    let options = Options::parse();
    let mut results = Results::default();
    let files = if options.smoke { 10_000 } else { 1_000_000 };
    let many = Huge::of_small_files(files, &[files - 1]);
    let large = Huge::of_one_file(10 << 40, &[5 << 40]);
    let many_name = format!("{files} files");
    results.note(format!(
        "manifests: {many_name} {} bytes, 10 TiB {} bytes",
        many.manifest.len(),
        large.manifest.len()
    ));
    for _ in 0..options.rounds {
        one(&many_name, &many, &Huge::small_path(files - 1), 0, &mut results);
        one("10 TiB in one file", &large, "model.safetensors", 5 << 40, &mut results);
    }
    results.table(
        "from the fetched manifest, ms",
        &["opened", "tree", "mounted, stat", "all of it", "first byte"],
        None,
    );
    results.write_json("scale", &options);
}

/// Opens `huge`, makes its tree, mounts it, asks the kernel for one file's size, reads one byte.
fn one(what: &str, huge: &Huge, path: &str, at: u64, results: &mut Results) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let mut add = |how: &str, from: Instant| results.add(what, how, "ms", from.elapsed().as_secs_f64() * 1e3);
    let start = Instant::now();
    let model = huge.model(huge.open());
    add("opened", start);
    let from = Instant::now();
    let arena = Arena::open(ArenaPlan { bytes: CACHE_BYTES + (8 << 20) }).expect("arena");
    let telemetry = Arc::new(Telemetry::default());
    let cache = Cache::new(arena, CACHE_BYTES, CacheLimits::default(), runtime.handle().clone(), telemetry);
    let cache = cache.expect("cache");
    let reader = Reader::new(cache.clone(), std::time::Duration::from_secs(60)).expect("reader");
    let vfs = Vfs::new(vec![model], Ownership { uid: 0, gid: 0, umask: 0o222 }, cache.clone()).expect("tree");
    add("tree", from);
    let behaviour = Behaviour { open: OpenPolicy::Lazy, ..Behaviour::default() };
    let fs = ModelFs::new(vfs, reader, behaviour, runtime.handle().clone());
    cache.add_gate(fs.gate());
    let full = format!("{}/{path}", scale::NAME);
    if has_cap_sys_admin() {
        let from = Instant::now();
        let folder = tempfile::tempdir().expect("a folder");
        let look = MountLook { source: "bench".into(), allow_other: false };
        let (session, attachment) = attach(fs.clone(), folder.path(), &look).expect("mounted");
        let size = std::fs::metadata(folder.path().join(&full)).expect("stat").size();
        assert!(size > 0);
        add("mounted, stat", from);
        add("all of it", start);
        assert!(attachment.unmount().expect("unmounted"));
        session.join().expect("ended");
    }
    let from = Instant::now();
    let node = full.split('/').fold(ROOT, |at, part| fs.vfs().lookup(at, part.as_bytes()).expect("is there"));
    let file = fs.vfs().open(node).expect("a file");
    runtime.block_on(async {
        let answer = fs.reader().read(&file, at, 1).await.expect("read");
        assert_eq!(answer.bytes().len(), 1);
    });
    add("first byte", from);
    fs.vfs().release(node);
}
