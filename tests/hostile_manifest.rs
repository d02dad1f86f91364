//! Manifests of a trusted publisher that try the machine: odd names, dates beyond every clock, a million files.
//! THREAT_MODEL (f) rows 47, 58, 59, 60, 61, where the format accepts them.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/mounted.rs"]
mod mounted;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fixture::{Fixture, Random, Style};
use modelfs::cache::Model;
use modelfs::crypto::{self, Dek, Verify};
use modelfs::format::{HashAlg, ManifestBuilder, ManifestDigest, ModelId, NewFile, NewHeader, Suite, Vid};
use modelfs::mem::Secret;
use modelfs::store::memory::MemoryStore;
use mounted::{How, Mounted, can_mount};

fn seal(files: Vec<(String, Vec<u8>)>, style: Style) -> Fixture {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(Fixture::seal(files, style, &mut Random(3)))
}

#[test]
fn row_47_names_that_look_alike_are_different_files_byte_for_byte() {
    if !can_mount() {
        return;
    }
    let names = ["Model.bin", "model.bin", "caf\u{e9}.bin", "cafe\u{301}.bin", "a\u{202e}nib.b", "with space", "-rf"];
    let mut files: Vec<_> = names.iter().map(|name| ((*name).to_owned(), name.as_bytes().to_vec())).collect();
    files.sort();
    let fixture = seal(files, Style { pack_below: 1 << 20, ..Style::default() });
    let mount = Mounted::new(How::default(), || fixture.model(fixture.store.clone(), Verify::Strict));
    for name in names {
        assert_eq!(std::fs::read(mount.path(name)).expect(name), name.as_bytes(), "{name:?}");
    }
    let mut listed: Vec<_> = std::fs::read_dir(mount.root()).expect("list").flatten().map(|e| e.file_name()).collect();
    listed.sort();
    let mut wanted = names.map(std::ffi::OsString::from);
    wanted.sort();
    assert_eq!(listed, wanted);
}

#[test]
fn row_60_dates_beyond_every_clock_are_shown_not_died_of() {
    if !can_mount() {
        return;
    }
    for mtime in [i64::MIN, i64::MIN + 1, -1, 0, i64::from(u32::MAX) + 1, i64::MAX] {
        let fixture = seal(vec![("f".to_owned(), b"x".to_vec())], Style { mtime, ..Style::default() });
        let mount = Mounted::new(How::default(), || fixture.model(fixture.store.clone(), Verify::Strict));
        let shown = std::fs::metadata(mount.path("f")).expect("stat").mtime();
        if (-1..=i64::from(u32::MAX) + 1).contains(&mtime) {
            assert_eq!(shown, mtime);
        }
        assert_eq!(std::fs::read(mount.path("f")).expect("read"), b"x", "mtime {mtime}");
    }
}

/// Deep, broken or not even text: annotations are opaque to a mount.
#[test]
fn row_59_annotations_are_never_parsed_by_a_mount() {
    if !can_mount() {
        return;
    }
    for annotations in [vec![b'['; 1 << 20], vec![0xff; 1 << 20], b"{\"a\":".to_vec()] {
        let model = synthetic(1, annotations);
        let mount = Mounted::new(How::default(), move || model);
        assert!(std::fs::metadata(mount.path(&path_of(0))).expect("stat").is_file());
    }
}

fn path_of(number: u32) -> String {
    format!(
        "layer-{:03}/expert-{:03}/a-rather-long-name-of-a-tensor-{number:07}.bin",
        number / 10_000,
        number / 100 % 100
    )
}

/// A manifest of `files` empty files.
fn synthetic(files: u32, annotations: Vec<u8>) -> Arc<Model> {
    let key = || Dek::from_secret(Secret::from_bytes(&mut [9; 32]));
    let mut builder = ManifestBuilder::new();
    for number in 0..files {
        builder.add_file(NewFile {
            path: path_of(number),
            mode: 0o444,
            size: 0,
            sha256: crypto::sha256(&[]),
            mtime: 0,
            extents: Vec::new(),
        });
    }
    builder.annotations(annotations);
    let mut manifest = builder
        .finish(NewHeader {
            suite: Suite::Aes256Gcm,
            hash_alg: HashAlg::Blake3,
            model_id: ModelId::of_name(fixture::NAME),
            vid: Vid([1; 16]),
            seq: 1,
            created_at: 0,
            msalt: [2; 32],
            previous: None,
        })
        .expect("within the limits");
    let bytes = crypto::seal_manifest(&mut manifest, &key(), &[]).expect("sealed");
    drop(manifest);
    let before = reset_peak();
    let started = Instant::now();
    let opened = crypto::open_manifest(&bytes, key()).expect("opens");
    let peak = peak_bytes().saturating_sub(before) + bytes.len() as u64;
    eprintln!(
        "{files} files, manifest of {} MB opened in {:?}, peak {} MB with the stored bytes",
        bytes.len() / 1_000_000,
        started.elapsed(),
        peak / 1_000_000
    );
    if files >= 1_000_000 {
        assert!(peak <= 3 * bytes.len() as u64 + (16 << 20), "peak {peak} for a manifest of {}", bytes.len());
    }
    let digest = ManifestDigest::of(&bytes);
    Arc::new(Model::new(0, fixture::NAME.into(), digest, opened, Arc::new(MemoryStore::new()), Verify::Strict))
}

/// Forgets the highest resident size so far; says what it is now.
fn reset_peak() -> u64 {
    std::fs::write("/proc/self/clear_refs", "5").expect("clear_refs");
    status_bytes("VmRSS:")
}

fn peak_bytes() -> u64 {
    status_bytes("VmHWM:")
}

fn status_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[test]
fn rows_58_and_61_a_million_files_in_130_megabytes_of_manifest_mount_in_bounded_memory() {
    if !can_mount() {
        return;
    }
    let model = synthetic(1_000_000, Vec::new());
    let started = Instant::now();
    let mount = Mounted::new(How::default(), move || model);
    let took = started.elapsed();
    eprintln!("mounted in {took:?}");
    // A bound against quadratic work, not a race: linear work takes about a second.
    assert!(took < Duration::from_secs(600), "{took:?}");
    for number in [0, 499_999, 999_999] {
        assert_eq!(std::fs::metadata(mount.path(&path_of(number))).expect("stat").len(), 0);
        assert_eq!(std::fs::read(mount.path(&path_of(number))).expect("read"), b"");
    }
    let folder = mount.path("layer-042/expert-017");
    assert_eq!(std::fs::read_dir(folder).expect("list").count(), 100);
}
