//! `modelfs scan` finds planted weights in every format, wherever an image can hide them, and tells what it cannot read.
//!
//! Archives are built here byte by byte; tests/scan.sh has those of real engines and files of real writers.

#[path = "common/planted.rs"]
mod planted;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use modelfs::scan::{Confidence, Finding, Format, Hidden, Limits, Pattern, Report, ScanPlan, scan};
use planted::noise;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// More time than any scan here takes on a slow machine.
const AMPLE: Duration = Duration::from_secs(600);

fn look(plan: &ScanPlan) -> Report {
    scan(plan, &|_| {}).expect("the targets are there")
}

fn look_at(path: &Path) -> Report {
    look(&ScanPlan::new(vec![path.to_owned()]))
}

/// Path, format and confidence of what counts.
fn told(report: &Report) -> Vec<(String, String, String)> {
    let mut told: Vec<_> = report
        .at_least(Confidence::Likely)
        .map(|found| (found.path.clone(), found.format.name().to_owned(), found.confidence.name().to_owned()))
        .collect();
    told.sort();
    told
}

fn paths(report: &Report) -> Vec<String> {
    told(report).into_iter().map(|(path, ..)| path).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn write(root: &Path, path: &str, bytes: &[u8]) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    std::fs::write(path, bytes).expect("written");
}

// ---- archives -----------------------------------------------------------------------------------------------------------

/// A tar of files; an empty folder by a name that ends with a slash.
fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        if path.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        builder.append_data(&mut header, path, *bytes).expect("in memory");
    }
    builder.into_inner().expect("in memory")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("in memory");
    encoder.finish().expect("in memory")
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).expect("in memory")
}

fn history() -> Value {
    json!([
        {"created_by": "/bin/sh -c #(nop) ADD file:base in / "},
        {"created_by": "/bin/sh -c #(nop) COPY dir:model in /opt/model "},
        {"created_by": "/bin/sh -c #(nop) ENV A=b", "empty_layer": true},
        {"created_by": "/bin/sh -c rm -rf /opt/model/w /srv"},
    ])
}

/// Three layers: a base, one that adds weights, one that takes them away again.
fn layers() -> [Vec<u8>; 3] {
    let weights = planted::safetensors();
    let gguf = planted::gguf();
    [
        tar_of(&[("etc/", b""), ("etc/passwd", b"root:x:0:0::/:/bin/sh\n"), ("opt/replaced", &weights)]),
        tar_of(&[("opt/model/w", &weights), ("./srv/deep/m.gguf", &gguf), ("opt/stays", &gguf), ("var/lib/x", &gguf)]),
        tar_of(&[
            ("opt/model/.wh.w", b""),
            (".wh.srv", b""),
            ("opt/replaced", b"a text in its place"),
            ("var/lib/", b""),
            ("var/lib/.wh..wh..opq", b""),
        ]),
    ]
}

/// What is found in layers: path, layer, and by which layer it is hidden.
type Placed = (&'static str, usize, Option<(usize, Hidden)>);

const IN_LAYERS: [Placed; 5] = [
    ("opt/model/w", 2, Some((3, Hidden::Deleted))),
    ("opt/replaced", 1, Some((3, Hidden::Replaced))),
    ("opt/stays", 2, None),
    ("srv/deep/m.gguf", 2, Some((3, Hidden::Deleted))),
    ("var/lib/x", 2, Some((3, Hidden::Deleted))),
];

#[track_caller]
fn assert_layers(report: &Report) {
    assert_eq!(report.unread.iter().map(|unread| &unread.why).collect::<Vec<_>>(), Vec::<&String>::new());
    let mut seen: Vec<_> = report
        .findings
        .iter()
        .map(|found| {
            let layer = found.layer.as_ref().expect("in a layer");
            let at = &layer.images[0];
            assert_eq!(at.of, 3);
            assert!(layer.digest.as_ref().is_some_and(|digest| digest.starts_with("sha256:")), "{layer:?}");
            let line = at.created_by.as_deref().expect("a line of the build");
            assert_eq!(line.contains("COPY dir:model"), at.position == 2, "{line}");
            (found.path.as_str(), at.position, at.hidden_by)
        })
        .collect();
    seen.sort_by_key(|(path, ..)| path.to_owned());
    assert_eq!(seen, IN_LAYERS);
}

/// As `docker save` wrote it for ten years: a folder a layer, one of them a link to another image's.
fn docker_save_classic() -> Vec<u8> {
    let layers = layers();
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
    let config = json!({"history": history(), "rootfs": {"type": "layers", "diff_ids": diff_ids}}).to_string();
    let config_name = format!("{}.json", sha256(config.as_bytes()));
    let manifest = json!([{"Config": config_name, "RepoTags": ["acme/app:1.4"], "Layers": ["a/layer.tar", "b/layer.tar", "c/layer.tar"]}]);
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |path: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, bytes).expect("in memory");
    };
    add("shared/layer.tar", &layers[0]);
    add("b/layer.tar", &layers[1]);
    add("b/json", b"{}");
    add("b/VERSION", b"1.0");
    add("c/layer.tar", &layers[2]);
    add(&config_name, config.as_bytes());
    add("manifest.json", manifest.to_string().as_bytes());
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "a/layer.tar", "../shared/layer.tar").expect("in memory");
    builder.into_inner().expect("in memory")
}

/// Files of an OCI layout: three layers in three packings, an image for two platforms below an index of its own.
fn oci_files() -> BTreeMap<String, Vec<u8>> {
    let layers = layers();
    let mut files = BTreeMap::new();
    let mut blob = |bytes: Vec<u8>| {
        let digest = sha256(&bytes);
        let len = bytes.len();
        files.insert(format!("blobs/sha256/{digest}"), bytes);
        (format!("sha256:{digest}"), len)
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
    let packed = [
        (layers[0].clone(), "application/vnd.oci.image.layer.v1.tar"),
        (gzip(&layers[1]), "application/vnd.oci.image.layer.v1.tar+gzip"),
        (zstd(&layers[2]), "application/vnd.oci.image.layer.v1.tar+zstd"),
    ];
    let described: Vec<Value> = packed
        .into_iter()
        .map(|(bytes, kind)| {
            let (digest, size) = blob(bytes);
            json!({"mediaType": kind, "digest": digest, "size": size})
        })
        .collect();
    let mut platforms = Vec::new();
    for architecture in ["amd64", "arm64"] {
        let config = json!({"architecture": architecture, "os": "linux", "history": history(),
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let (config, size) = blob(config.to_string().into_bytes());
        let mut layers = described.clone();
        if architecture == "arm64" {
            layers.pop();
        }
        let manifest = json!({"schemaVersion": 2, "config": {"digest": config, "size": size}, "layers": layers});
        let (digest, size) = blob(manifest.to_string().into_bytes());
        platforms
            .push(json!({"digest": digest, "size": size, "platform": {"os": "linux", "architecture": architecture}}));
    }
    let (inner, size) = blob(json!({"schemaVersion": 2, "manifests": platforms}).to_string().into_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [{"digest": inner, "size": size,
        "annotations": {"io.containerd.image.name": "acme/app:1.4"}}]});
    files.insert("index.json".into(), index.to_string().into_bytes());
    files.insert("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
    files
}

fn tar_of_map(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    tar_of(&files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())).collect::<Vec<_>>())
}

// ---- what is found ------------------------------------------------------------------------------------------------------

#[test]
fn every_format_is_found_in_a_tree_and_told_as_what_it_is() {
    let root = tempfile::tempdir().expect("a folder");
    let mut wanted = Vec::new();
    for (path, format, confidence, bytes) in planted::all() {
        write(root.path(), path, &bytes);
        wanted.push((path.to_owned(), format.to_owned(), confidence.to_owned()));
    }
    write(root.path(), "three/config.json", b"{}");
    wanted.sort();

    let report = look_at(root.path());

    assert_eq!(told(&report), wanted);
    assert!(report.unread.is_empty() && report.complete);
    let formats: Vec<Format> = report.findings.iter().map(|found| found.format).collect();
    // Those that are no weights, and the two that only large files are told as.
    let others = [Format::Opaque, Format::Archive, Format::Sealed];
    for format in Format::ALL.iter().filter(|format| !others.contains(format)) {
        assert!(formats.contains(format), "no test plants {format:?}");
    }
    for found in &report.findings {
        assert!(found.fix.contains("modelfs seal") && !found.why.is_empty(), "{found:?}");
    }
}

#[test]
fn every_format_is_found_in_archives_within_archives_and_behind_every_packing() {
    let root = tempfile::tempdir().expect("a folder");
    let files = planted::all();
    let list: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(path, .., bytes)| (*path, bytes.as_slice()))
        .chain([("three/config.json", &b"{}"[..])])
        .collect();
    let plain = tar_of(&list);
    write(root.path(), "backup/models.tar.gz", &gzip(&plain));
    write(root.path(), "backup/models.tar.zst", &zstd(&plain));
    write(root.path(), "backup/models.zip", &planted::zip(&list));
    write(root.path(), "backup/outer.tar", &tar_of(&[("a/models.tgz", &gzip(&plain))]));
    write(root.path(), "backup/w.safetensors.gz", &gzip(&planted::safetensors()));

    let report = look_at(root.path());

    let seen = paths(&report);
    for (path, ..) in &files {
        for prefix in ["models.tar!", "models.zip!", "outer.tar!a/models!"] {
            let wanted = format!("backup/{prefix}{path}");
            let times = seen.iter().filter(|seen| **seen == wanted).count();
            assert_eq!(times, if prefix == "models.tar!" { 2 } else { 1 }, "{wanted} in {seen:#?}");
        }
    }
    assert!(seen.contains(&"backup/w.safetensors".to_owned()));
    // And not, where archives are not to be looked into.
    let quick = look(&ScanPlan { archives: false, ..ScanPlan::new(vec![root.path().to_owned()]) });
    assert!(told(&quick).is_empty(), "{:?}", told(&quick));
}

#[test]
fn near_misses_and_what_systems_are_made_of_are_no_findings() {
    let root = tempfile::tempdir().expect("a folder");
    let long = |text: &str| text.repeat((2 << 20) / text.len().max(1)).into_bytes();
    write(root.path(), "usr/share/doc/gguf.txt", &long("GGUF begins with four letters. "));
    write(
        root.path(),
        "usr/lib/python3/lib2to3/Grammar3.11.pickle",
        b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94\x8c\x01a\x94K\x01s.",
    );
    write(root.path(), "usr/lib/udev/hwdb.bin", &[b"KSLPHHRH".to_vec(), noise(4 << 20)].concat());
    write(root.path(), "usr/lib/model.ckpt", &[b"\x7fELF\x02\x01\x01".to_vec(), noise(4 << 20)].concat());
    write(root.path(), "usr/share/x/data.bin", &noise(4 << 20));
    write(root.path(), "usr/share/x/small.npy", &planted::npy(4000));
    write(root.path(), "usr/share/x/messages.pb", b"\x0a\x05hello\x12\x05world");
    write(root.path(), "usr/share/x/notes.pt", &long("notas em portugues\n"));
    write(root.path(), "usr/share/x/empty.safetensors", b"");
    write(root.path(), "usr/share/x/tiny.safetensors", &planted::safetensors()[..500]);
    write(
        root.path(),
        "usr/share/x/app.zip",
        &planted::zip(&[("app/data.pkl", b"\x80\x04N."), ("app/readme", b"hello")]),
    );
    write(root.path(), "usr/share/x/tensors.json", br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#);
    let program = std::fs::read(env!("CARGO_BIN_EXE_modelfs")).expect("our own program");
    write(root.path(), "usr/bin/modelfs", &program);

    let report = look_at(root.path());

    assert_eq!(told(&report), Vec::new());
    assert!(report.unread.is_empty());
    // The same folder with a configuration of a model beside the nameless numbers is another matter.
    write(root.path(), "usr/share/x/config.json", b"{}");
    assert_eq!(paths(&look_at(root.path())), ["usr/share/x/data.bin"]);
}

#[test]
fn a_sealed_store_is_clean_and_is_recognised() {
    let root = tempfile::tempdir().expect("a folder");
    let modelfs = |args: &[&str]| {
        let home = root.path().join("home");
        let out = Command::new(env!("CARGO_BIN_EXE_modelfs"))
            .args(args)
            .env_clear()
            .env("HOME", home)
            .env("MODELFS_STATE_DIR", root.path().join("state"))
            .output()
            .expect("the program starts");
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    };
    write(root.path(), "model/w.safetensors", &planted::safetensors());
    let path = |name: &str| root.path().join(name).to_str().expect("UTF-8").to_owned();
    modelfs(&["keygen", &path("k")]);
    modelfs(&["seal", &path("model"), &path("store"), "acme/m", "--key", &format!("file:{}", path("k"))]);

    let report = look_at(&root.path().join("store"));

    assert_eq!(told(&report), Vec::new());
    assert!(report.findings.iter().any(|found| found.format == Format::Sealed), "{:?}", report.findings);
    assert_eq!(paths(&look_at(&root.path().join("model"))), ["w.safetensors"]);
}

#[test]
fn weights_that_a_later_layer_deletes_are_found_in_a_docker_save_archive() {
    let root = tempfile::tempdir().expect("a folder");
    let archive = docker_save_classic();
    write(root.path(), "app.tar", &archive);
    write(root.path(), "app.tar.gz", &gzip(&archive));
    for name in ["app.tar", "app.tar.gz"] {
        let report = look_at(&root.path().join(name));
        assert_layers(&report);
        assert_eq!(report.targets[0].images[0].name, "acme/app:1.4");
        assert_eq!(report.looked.layers, 3);
    }
    let verified = ScanPlan { verify: true, ..ScanPlan::new(vec![root.path().join("app.tar")]) };
    assert_layers(&look(&verified));
}

#[test]
fn weights_are_found_in_layouts_with_nested_indexes_in_every_packing() {
    let root = tempfile::tempdir().expect("a folder");
    let files = oci_files();
    for (path, bytes) in &files {
        write(&root.path().join("layout"), path, bytes);
    }
    write(root.path(), "app.oci", &tar_of_map(&files));
    for verify in [false, true] {
        for target in ["layout", "app.oci"] {
            let report = look(&ScanPlan { verify, ..ScanPlan::new(vec![root.path().join(target)]) });
            assert_layers(&report);
            let names: Vec<&str> = report.targets[0].images.iter().map(|image| image.name.as_str()).collect();
            assert_eq!(names, ["acme/app:1.4 (linux/amd64)", "acme/app:1.4 (linux/arm64)"]);
            // The other platform has the same blob and lacks the layer that deletes.
            let found = report.findings.iter().find(|found| found.path == "opt/model/w").expect("found");
            let images = &found.layer.as_ref().expect("in a layer").images;
            assert_eq!((images.len(), images[1].of, images[1].hidden_by), (2, 2, None));
        }
    }
}

#[test]
fn the_newer_docker_save_names_each_layer_twice_and_each_finding_is_told_once() {
    let root = tempfile::tempdir().expect("a folder");
    let mut files = oci_files();
    let index: Value = serde_json::from_slice(&files["index.json"]).expect("JSON");
    let blob =
        |digest: &Value| format!("blobs/sha256/{}", digest.as_str().expect("text").trim_start_matches("sha256:"));
    let inner: Value = serde_json::from_slice(&files[&blob(&index["manifests"][0]["digest"])]).expect("JSON");
    let manifest: Value = serde_json::from_slice(&files[&blob(&inner["manifests"][0]["digest"])]).expect("JSON");
    let layers: Vec<String> =
        manifest["layers"].as_array().expect("a list").iter().map(|layer| blob(&layer["digest"])).collect();
    let classic =
        json!([{"Config": blob(&manifest["config"]["digest"]), "RepoTags": ["acme/app:1.4"], "Layers": layers}]);
    files.insert("manifest.json".into(), classic.to_string().into_bytes());
    write(root.path(), "app.tar", &tar_of_map(&files));

    let report = look_at(&root.path().join("app.tar"));

    assert_layers(&report);
    assert_eq!(report.targets[0].images.len(), 2, "{:?}", report.targets);
}

#[test]
fn a_blob_that_is_no_layer_and_a_file_outside_all_layers_are_found_too() {
    let root = tempfile::tempdir().expect("a folder");
    let mut files = oci_files();
    let stray = tar_of(&[("m/w", &planted::safetensors())]);
    files.insert(format!("blobs/sha256/{}", sha256(&stray)), stray.clone());
    let artifact = planted::gguf();
    files.insert(format!("blobs/sha256/{}", sha256(&artifact)), artifact.clone());
    files.insert("notes/w.bin".into(), planted::pytorch());
    for (path, bytes) in &files {
        write(&root.path().join("layout"), path, bytes);
    }
    write(root.path(), "app.oci", &tar_of_map(&files));
    for target in ["layout", "app.oci"] {
        let seen = paths(&look_at(&root.path().join(target)));
        assert_eq!(seen.len(), IN_LAYERS.len() + 3, "{seen:?}");
        for path in [
            format!("blobs/sha256/{}!m/w", sha256(&stray)),
            format!("blobs/sha256/{}", sha256(&artifact)),
            "notes/w.bin".to_owned(),
        ] {
            assert!(seen.contains(&path), "{path} in {seen:?}");
        }
    }
}

#[test]
fn an_exported_file_system_is_looked_at_like_a_tree() {
    let root = tempfile::tempdir().expect("a folder");
    let weights = planted::onnx();
    write(
        root.path(),
        "export.tar",
        &tar_of(&[("srv/m/w", &weights), ("w", &weights), ("a.tar", &tar_of(&[("w", &weights)]))]),
    );
    assert_eq!(paths(&look_at(&root.path().join("export.tar"))), ["a.tar!w", "srv/m/w", "w"]);
    write(root.path(), "file", &weights);
    assert_eq!(paths(&look_at(&root.path().join("file"))), ["file"]);
}

#[test]
fn weights_that_begin_like_a_document_are_found_in_archives_and_layouts() {
    let root = tempfile::tempdir().expect("a folder");
    // The length of a header is written first: one of 0x7b20 bytes begins with a space and a brace, 0x5b20 with a bracket.
    let weights = |len: usize| {
        let json = r#"{"w":{"dtype":"BF16","shape":[64,64],"data_offsets":[0,8192]}}"#;
        [&(len as u64).to_le_bytes()[..], format!("{json:len$}").as_bytes(), &noise(8192)].concat()
    };
    let (brace, bracket) = (weights(0x7b20), weights(0x5b20));
    assert!(brace.starts_with(b" {") && bracket.starts_with(b" ["));
    // And a tar, whose first bytes are a name.
    let inner = tar_of(&[("{a}/w", &planted::gguf())]);
    let files: [(&str, &[u8]); 3] =
        [("opt/m/model.safetensors", &brace), ("opt/m/w", &bracket), ("opt/inner.tar", &inner)];
    let wanted = ["opt/inner.tar!{a}/w", "opt/m/model.safetensors", "opt/m/w"];
    write(root.path(), "export.tar", &tar_of(&files));
    assert_eq!(paths(&look_at(&root.path().join("export.tar"))), wanted);
    let mut layout = oci_files();
    layout.extend(files.map(|(path, bytes)| (path.to_owned(), bytes.to_vec())));
    for (path, bytes) in &layout {
        write(&root.path().join("layout"), path, bytes);
    }
    write(root.path(), "app.oci", &tar_of_map(&layout));
    for target in ["layout", "app.oci"] {
        let seen = paths(&look_at(&root.path().join(target)));
        assert!(wanted.iter().all(|path| seen.contains(&(*path).to_owned())), "{target}: {seen:?}");
    }
}

#[test]
fn a_packed_file_of_an_exported_file_system_is_known_by_its_name_at_any_depth() {
    let root = tempfile::tempdir().expect("a folder");
    let nameless = gzip(&noise(1 << 20));
    let export = tar_of(&[
        ("opt/m/pytorch_model.bin.gz", &nameless),
        ("opt/m/x/y/pytorch_model.bin.gz", &nameless),
        ("srv/weights.bin.gz", &nameless),
        ("srv/config.json", b"{}"),
        ("var/data.bin.gz", &nameless),
        ("var/lib/inner.tar.gz", &gzip(&tar_of(&[("w", &planted::gguf())]))),
    ]);
    write(root.path(), "export.tar", &export);
    write(root.path(), "export.tar.gz", &gzip(&export));
    for name in ["export.tar", "export.tar.gz"] {
        let plan = ScanPlan::new(vec![root.path().join(name)]);
        let wanted = [
            "opt/m/pytorch_model.bin.gz",
            "opt/m/x/y/pytorch_model.bin",
            "srv/weights.bin.gz",
            "var/lib/inner.tar.gz!w",
        ];
        assert_eq!(paths(&look(&plan)), wanted, "{name}");
        let left_alone = look(&ScanPlan { archives: false, ..plan });
        assert_eq!(paths(&left_alone), Vec::<String>::new(), "{name}: archives are to be left alone");
    }
    // Layers are no archives that merely lie there.
    write(root.path(), "app.tar", &docker_save_classic());
    assert_layers(&look(&ScanPlan { archives: false, ..ScanPlan::new(vec![root.path().join("app.tar")]) }));
}

#[test]
fn holes_and_long_names_hide_nothing() {
    let root = tempfile::tempdir().expect("a folder");
    let name = format!("{}/w", "folder-of-a-long-name/".repeat(30));
    let mut archive = tar_of(&[(&name, &planted::safetensors())]);
    archive.truncate(archive.len() - 1024);
    // GNU tar's own form of a file with holes: its head is stored, its tail is, the middle is not.
    let weights = planted::safetensors();
    let mut sparse = tar::Header::new_gnu();
    sparse.set_path("s").expect("short");
    sparse.set_entry_type(tar::EntryType::GNUSparse);
    sparse.set_size(1024);
    sparse.set_mode(0o644);
    let gnu = sparse.as_gnu_mut().expect("GNU's");
    gnu.set_real_size(weights.len() as u64);
    gnu.sparse[0].set_offset(0);
    gnu.sparse[0].set_length(512);
    gnu.sparse[1].set_offset(weights.len() as u64 - 512);
    gnu.sparse[1].set_length(512);
    sparse.set_cksum();
    archive.extend(sparse.as_bytes());
    archive.extend(&weights[..512]);
    archive.extend(&weights[weights.len() - 512..]);
    archive.extend([0; 1024]);
    write(root.path(), "a.tar", &archive);
    let report = look_at(&root.path().join("a.tar"));
    assert_eq!(paths(&report), [name.replace("//", "/"), "s".into()]);
    let sparse = report.findings.iter().find(|found| found.path == "s").expect("found");
    assert_eq!(sparse.bytes, Some(weights.len() as u64));
}

// ---- what the user says -------------------------------------------------------------------------------------------------

#[test]
fn paths_can_be_passed_over_and_files_accepted_by_their_digest() {
    let root = tempfile::tempdir().expect("a folder");
    for name in ["a/w1", "a/testdata/w2", "b/w3"] {
        write(root.path(), name, &planted::safetensors());
    }
    let mut other = planted::safetensors();
    *other.last_mut().expect("not empty") ^= 1;
    write(root.path(), "b/w4", &other);
    write(root.path(), "c.tar.gz", &gzip(&tar_of(&[("w5", &planted::safetensors())])));
    write(root.path(), "d.gz", &gzip(&planted::safetensors()));
    write(root.path(), "e.gz", &gzip(&other));
    let plan = ScanPlan::new(vec![root.path().to_owned()]);
    let exclude = vec![Pattern::parse("testdata").expect("a name"), Pattern::parse("/b/*").expect("a pattern")];
    assert_eq!(paths(&look(&ScanPlan { exclude, ..plan.clone() })), ["a/w1", "c.tar!w5", "d", "e"]);

    let digest = Sha256::digest(planted::safetensors()).into();
    let report = look(&ScanPlan { accept: [digest].into(), ..plan });

    assert_eq!(paths(&report), ["b/w4", "e"], "one flipped byte is another file");
    let mut accepted: Vec<&str> = report.accepted.iter().map(|found| found.path.as_str()).collect();
    accepted.sort_unstable();
    assert_eq!(accepted, ["a/testdata/w2", "a/w1", "b/w3", "c.tar!w5", "d"]);
}

// ---- trees --------------------------------------------------------------------------------------------------------------

#[test]
fn links_pipes_and_sockets_of_a_tree_are_left_alone_and_nothing_outside_it_is_read() {
    let root = tempfile::tempdir().expect("a folder");
    let outside = tempfile::tempdir().expect("a folder");
    write(outside.path(), "w", &planted::safetensors());
    write(root.path(), "here/w", &planted::safetensors());
    symlink(outside.path(), root.path().join("out")).expect("linked");
    symlink(outside.path().join("w"), root.path().join("file")).expect("linked");
    symlink(".", root.path().join("here/loop")).expect("linked");
    symlink("/proc/self/fd/0", root.path().join("fd")).expect("linked");
    let fifo = std::ffi::CString::new(root.path().join("pipe").to_str().expect("UTF-8")).expect("no NUL");
    // SAFETY: a NUL-terminated path that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let _socket = std::os::unix::net::UnixListener::bind(root.path().join("socket")).expect("bound");

    let report = look(&ScanPlan { time: Some(AMPLE), ..ScanPlan::new(vec![root.path().to_owned()]) });

    assert_eq!(paths(&report), ["here/w"]);
    assert!(report.complete && report.unread.is_empty(), "{:?}", report.unread);
    // The target itself may be a link: whoever names it means what it leads to.
    assert_eq!(paths(&look_at(&root.path().join("out"))), ["w"]);
    assert!(scan(&ScanPlan::new(vec![root.path().join("pipe")]), &|_| {}).is_err(), "a pipe by its name");
    assert!(scan(&ScanPlan::new(vec![root.path().join("none")]), &|_| {}).is_err());
}

#[test]
fn a_folder_or_a_large_file_that_cannot_be_read_is_not_taken_for_clean() {
    let root = tempfile::tempdir().expect("a folder");
    std::fs::DirBuilder::new().mode(0o000).create(root.path().join("closed")).expect("made");
    // One is too small for a finding, whatever it holds.
    for (name, len) in [("small", 100), ("large", 5000)] {
        write(root.path(), name, &vec![1; len]);
        std::fs::set_permissions(root.path().join(name), std::os::unix::fs::PermissionsExt::from_mode(0o000))
            .expect("closed");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_modelfs"));
    command.args(["scan", "--json"]).arg(root.path());
    // SAFETY: geteuid cannot fail and touches nothing.
    if unsafe { libc::geteuid() } == 0 {
        std::fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("opened");
        std::os::unix::process::CommandExt::uid(&mut command, 65534);
        std::os::unix::process::CommandExt::gid(&mut command, 65534);
        // The program has to be reachable for that user.
        let copy = tempfile::Builder::new().prefix("modelfs-scan").tempdir_in("/tmp").expect("a folder");
        std::fs::set_permissions(copy.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("opened");
        // By another process: a descriptor that writes, which a test beside this one inherits, would keep it from starting.
        let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_modelfs")).arg(copy.path().join("modelfs")).status();
        assert!(copied.expect("cp runs").success());
        let mut again = Command::new(copy.path().join("modelfs"));
        again.args(["scan", "--json"]).arg(root.path()).env("HOME", "/nonexistent");
        std::os::unix::process::CommandExt::uid(&mut again, 65534);
        std::os::unix::process::CommandExt::gid(&mut again, 65534);
        let out = again.output().expect("runs");
        assert_unread(&out);
    } else {
        assert_unread(&command.output().expect("runs"));
    }
}

#[track_caller]
fn assert_unread(out: &std::process::Output) {
    let report: Value =
        serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)));
    assert_eq!(out.status.code(), Some(1), "{report}");
    let unread = report["unread"].as_array().expect("a list");
    let mut unread: Vec<&str> = unread.iter().filter_map(|place| place["path"].as_str()).collect();
    unread.sort_unstable();
    assert_eq!(unread, ["closed", "large"]);
    assert_eq!(report["clean"], false);
}

// ---- hostile archives ---------------------------------------------------------------------------------------------------

const WISH: &str = "MODELFS_TEST_SCAN_CHILD";
const TOLD: &str = "CHILD ";

/// Scans a file in a process of its own: its exit code, its report and the most memory it had, in bytes.
fn apart(target: &Path, more: &[&str]) -> (i32, Value, String, u64) {
    let time: &[&str] = if more.contains(&"--time") { &[] } else { &["--time", "600s"] };
    let words = [&["scan", "--json"][..], time, more, &[target.to_str().expect("UTF-8")]].concat();
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["child", "--exact", "--nocapture", "--test-threads=1"])
        .env(WISH, json!(words).to_string())
        .stdin(Stdio::null())
        .output()
        .expect("started");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    // The harness may have written `test child ... ` before it.
    let told = text.lines().find_map(|line| line.split_once(TOLD)).unwrap_or_else(|| panic!("{words:?}: {text}")).1;
    let (code, out, err, memory): (i32, String, String, u64) = serde_json::from_str(told).expect("JSON");
    (code, serde_json::from_str(&out).unwrap_or(Value::Null), err, memory)
}

/// Not a test of its own: starts the program and tells what it used. What whoever starts a process has in memory just then
/// counts as had by that process: this one has little, the one in which all tests run may have more than any scan.
#[test]
#[allow(clippy::zombie_processes)] // waited for by wait4, which tells what it used
fn child() {
    let Ok(wish) = std::env::var(WISH) else { return };
    let words: Vec<String> = serde_json::from_str(&wish).expect("words");
    let mut child = Command::new(env!("CARGO_BIN_EXE_modelfs"))
        .args(words)
        .env_remove(WISH)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().expect("a pipe").read_to_string(&mut out).expect("read");
    child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("read");
    let mut status = 0;
    // SAFETY: our own child, waited for once; the kernel fills both.
    let used = unsafe {
        let mut used: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::wait4(child.id() as i32, &raw mut status, 0, &raw mut used), child.id() as i32);
        used
    };
    let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -1 };
    println!("{TOLD}{}", json!([code, out, err, used.ru_maxrss as u64 * 1024]));
}

/// Two threads, each with a decoder's window and a head: no archive needs more.
const MEMORY_MAX: u64 = 400 << 20;

#[track_caller]
fn refused(target: &Path, more: &[&str], words: &str) {
    let (code, report, err, memory) = apart(target, more);
    assert_eq!(code, 20, "{report} {err}");
    assert!(report["unread"].to_string().contains(words), "wanted `{words}` in {}", report["unread"]);
    assert!(err.contains("[ARCHIVE]"), "{err}");
    assert!(memory < MEMORY_MAX, "{memory} bytes of memory");
}

fn hostile() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// A classic archive of one layer, whatever that is.
fn image_of(layer: &[u8]) -> Vec<u8> {
    let manifest = json!([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["l/layer.tar"]}]).to_string();
    tar_of(&[("l/layer.tar", layer), ("c.json", b"{}"), ("manifest.json", manifest.as_bytes())])
}

#[test]
fn a_layer_that_unpacks_to_far_more_than_it_is_ends_in_an_error() {
    let root = hostile();
    // Half a GiB of zeros behind a good header, in half a MiB of gzip and some KiB of zstd.
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").expect("short");
    header.set_size(4 << 30);
    header.set_cksum();
    let zeros = vec![0; 64 << 20];
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let mut zst = zstd::stream::write::Encoder::new(Vec::new(), 1).expect("an encoder");
    gz.write_all(header.as_bytes()).and_then(|()| zst.write_all(header.as_bytes())).expect("in memory");
    for _ in 0..8 {
        gz.write_all(&zeros).expect("in memory");
        zst.write_all(&zeros).expect("in memory");
    }
    write(root.path(), "gz", &image_of(&gz.finish().expect("in memory")));
    write(root.path(), "zst", &image_of(&zst.finish().expect("in memory")));
    for name in ["gz", "zst"] {
        refused(&root.path().join(name), &[], "--max-ratio");
        refused(&root.path().join(name), &["--max-unpacked", "100MiB"], "--max-unpacked");
    }
    // Quite as much in a tree, where nobody says that it is an image.
    write(root.path(), "tree/logs.gz", &std::fs::read(root.path().join("zst")).expect("there"));
    refused(&root.path().join("tree"), &["--max-unpacked", "100MiB"], "--max-unpacked");
}

#[test]
fn archives_that_are_cut_or_spoilt_end_in_an_error() {
    let root = hostile();
    let layers = layers();
    let whole = docker_save_classic();
    for (name, bytes, words) in [
        ("cut", whole[..whole.len() / 2].to_vec(), "end"),
        ("cut layer", image_of(&layers[1][..layers[1].len() / 2]), "end"),
        ("cut gzip", image_of(&gzip(&layers[1])[..5000]), ""),
        ("cut zstd", image_of(&zstd(&layers[1])[..5000]), ""),
        ("no header", image_of(&[layers[1].as_slice(), &[7; 512]].concat()[..layers[1].len() - 1024 + 512]), ""),
        ("xz", image_of(b"\xfd7zXZ\0\0\x04rest of a layer that is packed in another way"), "xz"),
        ("cut.zip", planted::zip(&[("readme", &noise(9000))])[..5000].to_vec(), "end"),
        ("no layer", image_of(b"no archive at all, though the image says so")[..].to_vec(), ""),
    ] {
        write(root.path(), name, &bytes);
        let (code, report, ..) = apart(&root.path().join(name), &[]);
        // What came before the cut is found, and wins.
        let found = report["findings"].as_array().is_some_and(|all| all.iter().any(|one| one["confidence"] != "info"));
        if name == "no header" || name == "no layer" {
            continue;
        }
        assert_eq!(code, if found { 26 } else { 20 }, "{name}: {report}");
        assert!(report["unread"].to_string().contains(words) && report["unread"] != json!([]), "{name}: {report}");
    }
}

#[test]
fn claims_of_endless_names_records_and_sizes_end_in_an_error() {
    let root = hostile();
    let header = |kind: u8, size: u64| {
        let mut header = tar::Header::new_gnu();
        header.set_path("x").expect("short");
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let endless = |kind: u8| [header(kind, 1 << 60), vec![b'1'; 8 << 20]].concat();
    for (name, layer) in [
        ("pax", endless(b'x')),
        ("global pax", endless(b'g')),
        ("long name", endless(b'L')),
        ("long link", endless(b'K')),
        ("file", endless(b'0')),
        ("records", (0..100).flat_map(|_| [header(b'x', 512), vec![0; 512]].concat()).collect()),
        ("names", (0..100).flat_map(|_| [header(b'L', 512), vec![b'n'; 512]].concat()).collect()),
        ("sparse", [header(b'S', 512), vec![0xff; 512]].concat()),
    ] {
        write(root.path(), name, &image_of(&layer));
        refused(&root.path().join(name), &[], "");
        write(root.path(), name, &image_of(&gzip(&layer)));
        refused(&root.path().join(name), &[], "");
    }
    // A file of 2^60 bytes, of which the first 512 are stored: whoever reads on reads zeros for ever.
    let with_hole = |stored: &[u8]| {
        let record = |text: &str| format!("{} {text}\n", text.len() + 4);
        let size = format!("GNU.sparse.size={}", 1_u64 << 60);
        let records = [record("GNU.sparse.map=0,512"), record(&size)].concat().into_bytes();
        let mut out = [header(b'x', records.len() as u64), records].concat();
        out.resize(1024, 0);
        [out, header(b'0', 512), stored[..512].to_vec()].concat()
    };
    write(root.path(), "hole", &image_of(&with_hole(&header(b'0', 0))));
    refused(&root.path().join("hole"), &[], "zeros behind the end");
    write(root.path(), "accepted", format!("sha256:{}\n", "0".repeat(64)).as_bytes());
    let accepted = root.path().join("accepted");
    write(root.path(), "hashed", &image_of(&with_hole(&planted::safetensors())));
    for (more, words) in [(&[][..], "--max-ratio"), (&["--max-unpacked", "100MiB"], "--max-unpacked")] {
        let more = [&["--accept", accepted.to_str().expect("UTF-8")], more].concat();
        let (code, report, err, _) = apart(&root.path().join("hashed"), &more);
        assert_eq!(code, 26, "its head tells what it is: {report} {err}");
        assert!(report["unread"].to_string().contains(words), "{report}");
    }
    let more = ["--accept", accepted.to_str().expect("UTF-8"), "--max-ratio", "1000000000000", "--time", "2s"];
    assert_eq!(apart(&root.path().join("hashed"), &more).1["complete"], false, "the time ends it too");
    // The same on a disk, where a hole is the file system's.
    write(root.path(), "tree/padded", &tar_of(&[("readme", b"hello")]));
    let padded = std::fs::File::options().write(true).open(root.path().join("tree/padded")).expect("there");
    padded.set_len(1 << 36).expect("a file with a hole");
    refused(&root.path().join("tree"), &[], "zeros behind the end");
}

/// A zip archive whose first entry is deflated and spoilt, and whose second is weights; as a streaming writer makes it, or
/// one that tells sizes beforehand.
fn zip_with_a_spoilt_entry(streamed: bool) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&b"text that is packed, ".repeat(500)).expect("in memory");
    let mut packed = encoder.finish().expect("in memory");
    // A block of a kind that there is not.
    packed[0] = 0xff;
    let whole = planted::zip(&[("notes", &packed), ("w", &planted::safetensors())]);
    let mut out = whole[..30 + 5 + packed.len()].to_vec();
    out[8] = 8;
    if streamed {
        out[6] = 8;
        out[18..26].fill(0);
        out.extend(b"PK\x07\x08");
        out.extend([0; 4]);
        out.extend((packed.len() as u32).to_le_bytes());
        out.extend(10_500_u32.to_le_bytes());
    }
    out.extend(&whole[30 + 5 + packed.len()..]);
    out
}

/// A zip archive as a streaming writer makes it: sizes behind each entry, and in the directory at the end. `deflated` entries end
/// by themselves, stored ones do not.
fn streamed_zip(entries: &[(&str, &[u8])], deflated: bool) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, plain) in entries {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(plain).expect("in memory");
        let (method, body) = if deflated { (8, encoder.finish().expect("in memory")) } else { (0, plain.to_vec()) };
        let mut crc = flate2::Crc::new();
        crc.update(plain);
        let told = [crc.sum(), body.len() as u32, plain.len() as u32].map(u32::to_le_bytes).concat();
        let at = out.len() as u32;
        let fixed = [&[20, 0, 8, 0, method, 0, 0, 0, 0, 0][..]].concat();
        let lengths = [name.len() as u16, 0].map(u16::to_le_bytes).concat();
        out.extend([b"PK\x03\x04", &fixed[..], &[0; 12], &lengths, name.as_bytes(), &body].concat());
        out.extend([b"PK\x07\x08", &told[..]].concat());
        let entry =
            [b"PK\x01\x02", &[20, 0][..], &fixed, &told, &lengths, &[0; 10], &at.to_le_bytes(), name.as_bytes()];
        directory.extend(entry.concat());
    }
    let (at, len, count) = (out.len() as u32, directory.len() as u32, entries.len() as u16);
    out.extend(directory);
    out.extend([b"PK\x05\x06", &[0; 4][..], &count.to_le_bytes(), &count.to_le_bytes()].concat());
    out.extend([&len.to_le_bytes()[..], &at.to_le_bytes(), &[3, 0], b"end"].concat());
    out
}

#[test]
fn stored_entries_of_a_streamed_zip_archive_end_by_its_directory_or_by_what_is_true_of_them() {
    let root = hostile();
    let (weights, gguf) = (planted::safetensors(), planted::gguf());
    let planted = streamed_zip(&[("readme", b"hello"), ("empty", b""), ("m/w", &weights), ("m/g", &gguf)], false);
    let inner = streamed_zip(&[("inner.zip", &planted)], false);
    for (name, archive, prefix) in [
        ("a.zip", planted.clone(), "a.zip"),
        ("b.tar", tar_of(&[("x", b"y"), ("a.zip", &planted)]), "b.tar!a.zip"),
        ("c.zip", inner, "c.zip!inner.zip"),
    ] {
        write(root.path(), &format!("{name}.tree/{name}"), &archive);
        let report = look_at(&root.path().join(format!("{name}.tree")));
        assert_eq!(paths(&report), ["m/g", "m/w"].map(|path| format!("{prefix}!{path}")), "{report:?}");
        assert!(report.unread.is_empty() && report.findings.len() == 2, "{report:?}");
    }

    let class = noise(9000);
    // What is clean is clean, in a pipe and a layer too.
    let files: [(&str, &[u8]); 3] =
        [("META-INF/", b""), ("META-INF/MANIFEST.MF", b"Manifest-Version: 1.0"), ("A.class", &class)];
    write(root.path(), "clean/stored.jar", &streamed_zip(&files, false));
    write(root.path(), "clean/deflated.jar", &streamed_zip(&files, true));
    write(root.path(), "clean/deflated.jar.gz", &gzip(&streamed_zip(&files, true)));
    write(root.path(), "clean/stored.jar.zst", &zstd(&streamed_zip(&files, false)));
    write(root.path(), "clean/image.tar", &image_of(&gzip(&tar_of(&[("app/a.jar", &streamed_zip(&files, false))]))));
    let (code, report, err, _) = apart(&root.path().join("clean"), &[]);
    assert_eq!((code, &report["unread"], &report["findings"]), (0, &json!([]), &json!([])), "{err}");

    // Of what comes through a decoder or a pipe no directory is at hand: each entry ends where what follows is true of it.
    write(root.path(), "packed/a.zip.gz", &gzip(&planted));
    let report = look_at(&root.path().join("packed"));
    assert_eq!((paths(&report), report.unread.len()), (vec!["a.zip!m/g".to_owned(), "a.zip!m/w".to_owned()], 0));
    write(root.path(), "layer/image.tar", &image_of(&gzip(&tar_of(&[("srv/a.zip", &planted)]))));
    let report = look_at(&root.path().join("layer/image.tar"));
    assert_eq!((paths(&report).len(), report.unread.len()), (2, 0), "{report:?}");

    // Where it is true of none, the first is looked at, and the rest unread.
    let spoilt = |archive: &[u8]| {
        let mut archive = archive.to_vec();
        let told = archive.windows(4).position(|four| four == b"PK\x07\x08").expect("sizes");
        archive[told + 4] ^= 1;
        archive
    };
    write(root.path(), "spoilt/a.zip.gz", &gzip(&spoilt(&planted)));
    refused(&root.path().join("spoilt"), &[], "does not tell where it ends");
    let (code, out, _) = modelfs(&["scan", "--json", "-"], Some(&spoilt(&planted)));
    assert_eq!(code, 20, "{out}");
    let first = streamed_zip(&[("w", &weights), ("readme", b"hello")], false);
    write(root.path(), "first/a.zip.gz", &gzip(&spoilt(&first)));
    let report = look_at(&root.path().join("first"));
    assert_eq!(
        (paths(&report), report.unread.len()),
        (vec!["a.zip!w".to_owned()], 1),
        "the head of the first is there"
    );

    // A directory that lies, or is none.
    let first = planted.windows(4).position(|four| four == b"PK\x01\x02").expect("a directory");
    for (name, at, byte) in
        [("short", first + 20, 2), ("long", first + 20, 10), ("huge", first + 23, 0x7f), ("lost", first + 42, 1)]
    {
        let mut lies = planted.clone();
        lies[at] = byte;
        write(root.path(), &format!("{name}/a.zip"), &lies);
        refused(&root.path().join(name), &[], "zip");
    }
    write(root.path(), "none/a.zip", &planted[..planted.len() - 1]);
    refused(&root.path().join("none"), &[], "zip");
}

#[test]
fn a_spoilt_entry_of_a_zip_archive_hides_none_of_those_behind_it() {
    let root = hostile();
    let spoilt = zip_with_a_spoilt_entry(false);
    write(root.path(), "tree/a.zip", &spoilt);
    write(root.path(), "tree/b.tar", &tar_of(&[("a.zip", &spoilt)]));
    let report = look_at(&root.path().join("tree"));
    assert_eq!(paths(&report), ["a.zip!w", "b.tar!a.zip!w"]);
    assert!(report.unread.is_empty(), "{:?}", report.unread);
    let mentioned: Vec<&str> =
        report.findings.iter().filter(|one| one.why.contains("broken")).map(|one| one.path.as_str()).collect();
    assert_eq!(mentioned, ["a.zip!notes", "b.tar!a.zip!notes"]);

    // Where only its directory tells how to go on, nobody here knows what the rest is.
    let streamed = zip_with_a_spoilt_entry(true);
    let weights = planted::gguf();
    for (name, archive) in [
        ("t.tar", tar_of(&[("x/y/z/d/a.zip", &streamed), ("x/y/z/d/m", &weights)])),
        ("p.tar", tar_of(&[("a.zip.gz", &gzip(&streamed)), ("x/y/z/d/m", &weights)])),
        ("i.tar", image_of(&tar_of(&[("srv/a.zip", &streamed), ("srv/m", &weights)]))),
    ] {
        write(root.path(), name, &archive);
        let report = look_at(&root.path().join(name));
        assert_eq!(paths(&report).len(), 1, "what lies behind the zip archive in {name}: {report:?}");
        let unread: Vec<&str> = report.unread.iter().map(|unread| unread.path.as_str()).collect();
        assert!(unread.len() == 1 && unread[0].contains("a.zip") && report.unread[0].hostile, "{name}: {report:?}");
    }
    let whole = planted::zip(&[("readme", b"hello"), ("w", &planted::safetensors())]);
    let second = 30 + "readme".len() + "hello".len();
    for (name, archive) in [
        ("streamed/a.zip", streamed),
        ("mark/a.zip", [&whole[..second], b"X", &whole[second + 1..]].concat()),
        ("size/a.zip", [&whole[..21], &[1], &whole[22..]].concat()),
    ] {
        write(root.path(), name, &archive);
        refused(root.path().join(name).parent().expect("a folder"), &[], "zip");
    }
    // Where programs of Android sign an archive, between the last entry and the directory, nothing is broken.
    let block = |len: u64| [&len.to_le_bytes()[..], &[7; 100], &len.to_le_bytes(), b"APK Sig Block 42"].concat();
    let end = whole.len() - 22;
    write(root.path(), "apk/a.apk", &[&whole[..end], &block(124), &whole[end..]].concat());
    let report = look_at(&root.path().join("apk"));
    assert_eq!((paths(&report).len(), report.unread.len()), (1, 0), "{report:?}");
}

/// Whatever it holds: a folder, an archive, a layer or the target itself, none of it passes without a word.
#[test]
fn what_is_packed_in_a_way_that_is_not_unpacked_here_is_told_of_wherever_it_lies() {
    let root = hostile();
    let closed = |magic: &[u8], len| [magic, &noise(len)].concat();
    let (xz, bz, lz4) = (&b"\xfd7zXZ\0"[..], &b"BZh9"[..], &b"\x04\x22\x4d\x18"[..]);
    let mut files = Vec::new();
    for (name, magic) in [("w.xz", xz), ("w.bz2", bz), ("w.lz4", lz4)] {
        files.push((name.to_owned(), closed(magic, 1 << 20)));
        files.push((format!("a/b/c/d/{name}"), closed(magic, 1 << 20)));
        files.push((format!("lib/modules/{name}"), closed(magic, 9000)));
    }
    let list: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    for (name, bytes) in &list {
        write(&root.path().join("tree"), name, bytes);
    }
    write(root.path(), "export.tar", &tar_of(&list));
    write(root.path(), "zip/a.zip", &planted::zip(&list));
    let mut wanted: Vec<String> =
        files.iter().filter(|(.., bytes)| bytes.len() > 1 << 20).map(|(name, _)| name.clone()).collect();
    wanted.sort();
    for (target, prefix) in [("tree", ""), ("export.tar", ""), ("zip", "a.zip!")] {
        let plan = ScanPlan::new(vec![root.path().join(target)]);
        let report = look(&plan);
        let mut told: Vec<String> = report.findings.iter().map(|found| found.path.clone()).collect();
        told.sort();
        assert_eq!(told, wanted.iter().map(|name| format!("{prefix}{name}")).collect::<Vec<_>>(), "{target}");
        for found in &report.findings {
            assert!(found.confidence == Confidence::Info && found.why.contains("not unpacked here"), "{found:?}");
        }
        assert!(report.unread.is_empty(), "{target}: {:?}", report.unread);
        let left_alone = look(&ScanPlan { archives: false, ..plan });
        assert!(left_alone.findings.is_empty(), "{target}: {:?}", left_alone.findings);
    }
    // A target of any size, and a layer.
    let small = closed(xz, 5000);
    for (name, bytes) in [
        ("t.xz", small.clone()),
        ("t.xz.gz", gzip(&small)),
        ("i.tar", image_of(&small)),
        ("g.tar", image_of(&gzip(&small))),
    ] {
        write(root.path(), name, &bytes);
        refused(&root.path().join(name), &[], "packed with xz");
        assert_eq!(look_at(&root.path().join(name)).findings.len(), 0, "{name}: told once");
    }
}

/// Engines read on right behind a pipe or a link that tells a size, others pass over so many bytes.
#[test]
fn an_entry_without_bytes_that_tells_a_size_hides_nothing_from_any_program() {
    let root = hostile();
    let (weights, gguf) = (planted::safetensors(), planted::gguf());
    let first = weights.len().next_multiple_of(512) as u64 + 512;
    let models = tar_of(&[("opt/model/w", &weights), ("opt/model/m", &gguf)]);
    let clean = tar_of(&[("etc/hostname", &[b'x'; 512]), ("etc/hosts", b"here")]);
    for kind in [tar::EntryType::Fifo, tar::EntryType::Char, tar::EntryType::Directory, tar::EntryType::Symlink] {
        let front = |size: u64| {
            let mut header = tar::Header::new_ustar();
            header.set_path("run/x").expect("short");
            header.set_entry_type(kind);
            header.set_size(size);
            header.set_cksum();
            header.as_bytes().to_vec()
        };
        // Whoever passes over the first finds the second: nothing is hidden from anybody, and nothing is unread.
        let layer = [front(first), models.clone()].concat();
        for (name, archive) in [("image.tar", image_of(&layer)), ("export.tar", layer.clone()), ("gz", gzip(&layer))] {
            write(root.path(), name, &archive);
            let report = look_at(&root.path().join(name));
            assert_eq!(paths(&report), ["opt/model/m", "opt/model/w"], "{kind:?} in {name}: {report:?}");
            assert!(report.unread.is_empty(), "{kind:?} in {name}: {report:?}");
        }
        write(root.path(), "clean/a.tar", &[front(1024), clean.clone()].concat());
        // No header is where such a program looks for one: it meets the next one that we meet.
        write(root.path(), "clean/b.tar", &[front(512), clean.clone()].concat());
        assert_eq!(apart(&root.path().join("clean"), &[]).0, 0, "{kind:?}");
        // Whoever goes on within a file may find another one there.
        let within = [front(512), tar_of(&[("etc/blob", &[&[b'x'; 512], &models[..]].concat())])].concat();
        for (name, archive) in [("i.tar", image_of(&within)), ("e.tar", within.clone()), ("tree/t.tar", within.clone())]
        {
            write(root.path(), name, &archive);
            let target = if name.starts_with("tree") { "tree" } else { name };
            refused(&root.path().join(target), &[], "can hold no bytes");
        }
        // Bytes do lie there: no engine comes further, and others do.
        let bytes = vec![7; 4096];
        write(root.path(), "bytes/a.tar", &[front(4096), bytes, models.clone()].concat());
        let report = look_at(&root.path().join("bytes"));
        assert_eq!((paths(&report).len(), report.unread.len()), (2, 1), "{kind:?}: {report:?}");
    }
}

#[test]
fn weights_whose_packing_breaks_behind_their_head_are_found_also_when_they_are_to_be_hashed() {
    let root = hostile();
    let weights = [planted::safetensors(), noise(1 << 20)].concat();
    for (name, packed) in [("a.gz", gzip(&weights)), ("b.zst", zstd(&weights))] {
        write(root.path(), &format!("tree/{name}"), &packed[..packed.len() / 2]);
    }
    let plan = ScanPlan::new(vec![root.path().join("tree")]);
    for accept in [vec![], vec![[0; 32]]] {
        let report = look(&ScanPlan { accept: accept.into_iter().collect(), ..plan.clone() });
        assert_eq!(paths(&report), ["a", "b"], "{report:?}");
    }
}

#[test]
fn documents_that_lie_about_layers_end_in_an_error() {
    let root = hostile();
    let digest = format!("sha256:{}", "ab".repeat(32));
    let layout = |index: Value| tar_of(&[("oci-layout", b"{}"), ("index.json", index.to_string().as_bytes())]);
    write(root.path(), "lost", &layout(json!({"manifests": [{"digest": digest}]})));
    refused(&root.path().join("lost"), &[], "not there");
    write(root.path(), "way out", &layout(json!({"manifests": [{"digest": "sha256:../../../etc/passwd"}]})));
    refused(&root.path().join("way out"), &[], "no digest");
    write(root.path(), "none", &layout(json!({"manifests": []})));
    refused(&root.path().join("none"), &[], "names none");

    let mut files = oci_files();
    let largest = files.iter().filter(|(path, _)| path.starts_with("blobs")).max_by_key(|(_, bytes)| bytes.len());
    let key = largest.expect("blobs").0.clone();
    let layer = files.remove(&key).expect("there");
    write(root.path(), "gone", &tar_of_map(&files));
    let (_, report, ..) = apart(&root.path().join("gone"), &[]);
    assert!(report["unread"].to_string().contains("not in the archive"), "{report}");

    // Another tar under the digest of the first: only --verify reads and tells.
    let other = tar_of(&[("etc/passwd", b"root")]);
    let _ = layer;
    files.insert(key, gzip(&other));
    write(root.path(), "changed", &tar_of_map(&files));
    let (_, report, ..) = apart(&root.path().join("changed"), &[]);
    assert_eq!(report["unread"], json!([]), "{report}");
    let (_, report, ..) = apart(&root.path().join("changed"), &["--verify"]);
    assert!(report["unread"].to_string().contains("digest says"), "{report}");

    // Indexes within indexes, and one that names itself by a digest that is not its own.
    let mut deep = json!({"manifests": [{"digest": digest}]}).to_string();
    let mut files = BTreeMap::new();
    for level in 0..40 {
        let name = format!("{level:064x}");
        files.insert(format!("blobs/sha256/{name}"), deep.into_bytes());
        deep = json!({"manifests": [{"digest": format!("sha256:{name}")}]}).to_string();
    }
    files.insert(format!("blobs/sha256/{}", "ab".repeat(32)), deep.clone().into_bytes());
    files.insert("index.json".into(), deep.into_bytes());
    files.insert("oci-layout".into(), b"{}".to_vec());
    write(root.path(), "deep", &tar_of_map(&files));
    refused(&root.path().join("deep"), &[], "deep");
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    write(root.path(), "nested", &tar_of(&[("manifest.json", nested.as_bytes())]));
    assert_eq!(apart(&root.path().join("nested"), &[]).0, 0, "no image, and nothing found");
}

#[test]
fn names_that_lead_out_or_write_to_a_terminal_change_nothing_and_are_shown_escaped() {
    let root = hostile();
    let weights = planted::safetensors();
    let raw = |path: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.set_size(weights.len() as u64);
        header.set_cksum();
        let mut out = header.as_bytes().to_vec();
        out.extend(&weights);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    };
    let marker = root.path().join("marker");
    let layer = [
        raw(b"../../../../marker"),
        raw(b"/etc/evil"),
        raw(b"a\x1b[2J\x07b"),
        raw(b"\xff\xfe"),
        raw(b"c\nfake: clean"),
    ]
    .concat();
    write(root.path(), "a.tar", &image_of(&layer));

    let out =
        Command::new(env!("CARGO_BIN_EXE_modelfs")).arg("scan").arg(root.path().join("a.tar")).output().expect("runs");

    let text = String::from_utf8(out.stdout).expect("UTF-8");
    assert_eq!(out.status.code(), Some(26));
    assert!(!marker.exists());
    assert!(!text.contains('\x1b') && !text.contains('\x07') && !text.contains("\nfake"), "{text}");
    for shown in ["a\\u{1b}[2J\\u{7}b", "\\xff\\xfe", "c\\u{a}fake: clean", " etc/evil"] {
        assert!(text.contains(shown), "{shown} in {text}");
    }
}

#[test]
fn more_entries_archives_or_time_than_allowed_end_in_an_error() {
    let root = hostile();
    let many: Vec<(String, Vec<u8>)> = (0..3000).map(|n| (format!("f{n}"), Vec::new())).collect();
    let list: Vec<(&str, &[u8])> = many.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    write(root.path(), "many", &image_of(&tar_of(&list)));
    refused(&root.path().join("many"), &["--max-entries", "1000"], "--max-entries");
    assert_eq!(apart(&root.path().join("many"), &[]).0, 0);

    // Packed into itself thirty times: looked into to a depth, and told.
    let mut matryoshka = planted::safetensors();
    for _ in 0..30 {
        matryoshka = gzip(&tar_of(&[("inner.tar.gz", &matryoshka)]));
    }
    write(root.path(), "tree/m.tar.gz", &matryoshka);
    let report = look_at(&root.path().join("tree"));
    assert!(report.findings.iter().any(|found| found.format == Format::Archive), "{:?}", report.findings);

    let (code, report, err, _) = apart(&root.path().join("many"), &["--time", "0s"]);
    assert_eq!((code, &report["complete"]), (1, &json!(false)), "{err}");
    assert!(err.contains("--time"), "{err}");
}

#[test]
fn thousands_of_findings_are_counted_and_do_not_fill_the_memory() {
    let root = hostile();
    let gguf = planted::gguf();
    let mut layer = Vec::new();
    for n in 0..12_000 {
        let mut header = tar::Header::new_gnu();
        header.set_path(format!("m{n}")).expect("short");
        header.set_size(1024);
        header.set_cksum();
        layer.extend(header.as_bytes());
        layer.extend(&gguf[..1024]);
    }
    write(root.path(), "a.tar", &image_of(&layer));
    let (code, report, err, memory) = apart(&root.path().join("a.tar"), &[]);
    assert_eq!(code, 26);
    assert_eq!(report["findings"].as_array().map(Vec::len), Some(10_000));
    assert_eq!(report["findings_untold"], 2_000);
    assert!(err.contains("12000 files"), "{err}");
    assert!(memory < MEMORY_MAX, "{memory}");
}

#[test]
fn what_is_only_mentioned_takes_no_room_from_what_counts() {
    let root = hostile();
    let mut files: Vec<(String, Vec<u8>)> =
        (0..10_500).map(|n| (format!("s{n}"), [&b"MFS1DATA"[..], &[1; 504]].concat())).collect();
    files.push(("w".to_owned(), planted::safetensors()));
    let list: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    write(root.path(), "a.tar", &tar_of(&list));
    let path = root.path().join("a.tar");

    let (code, report, err, _) = apart(&path, &[]);

    let findings = report["findings"].as_array().expect("a list");
    assert_eq!((code, &findings[0]["path"], &report["findings_untold"]), (26, &json!("w"), &json!(0)), "{err}");
    assert_eq!(findings.len(), 5_001, "mentions have an end of their own");
    write(root.path(), "accepted", format!("sha256:{}\n", sha256(&planted::safetensors())).as_bytes());
    let accepted = root.path().join("accepted");
    assert_eq!(apart(&path, &["--accept", accepted.to_str().expect("UTF-8")]).0, 0);
}

/// Any edit of an archive ends in a report, in bounded time, without a panic; and the same report each time.
#[test]
fn any_edit_of_an_archive_is_survived() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let from_env = std::env::var("MODELFS_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = from_env.unwrap_or(clock.as_nanos() as u64);
    println!("MODELFS_TEST_SEED={seed}");
    let mut state = seed;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize) % below.max(1)
    };
    let root = tempfile::tempdir().expect("a folder");
    let list = planted::all();
    let small: Vec<(&str, &[u8])> = list
        .iter()
        .filter(|(.., bytes)| bytes.len() < 20_000)
        .map(|(path, .., bytes)| (*path, bytes.as_slice()))
        .collect();
    let originals = [
        docker_save_classic(),
        tar_of_map(&oci_files()),
        tar_of(&small),
        planted::zip(&small),
        gzip(&tar_of(&small)),
        zstd(&tar_of(&small)),
    ];
    let limits = Limits { unpacked_bytes_max: 64 << 20, ratio_max: 100, entries_max: 20_000 };
    let (mut clean, mut found, mut unread) = (0, 0, 0);
    for case in 0..400 {
        let mut bytes = originals[random(originals.len())].clone();
        for _ in 0..=random(6) {
            let at = random(bytes.len());
            match random(6) {
                0 => bytes[at] ^= 1 << random(8),
                1 => bytes[at] = [0, 0xff, b'9', b'/', b'x', b'L'][random(6)],
                2 => bytes.truncate(at.max(1)),
                3 => {
                    let more = noise(random(600));
                    bytes.splice(at..at, more);
                }
                4 => {
                    let end = (at + random(2000)).min(bytes.len());
                    bytes.drain(at..end);
                }
                _ => {
                    // A field of a header with a good checksum: what lies behind it is then believed.
                    let at = at / 512 * 512;
                    if let Some(block) = bytes.get_mut(at..at + 512) {
                        block[124 + random(12)] = b'0' + random(8) as u8;
                        block[156] = b"0125gxLKS"[random(9)];
                        let mut header = tar::Header::from_byte_slice(block).clone();
                        header.set_cksum();
                        block.copy_from_slice(header.as_bytes());
                    }
                }
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
        let path = root.path().join("a");
        std::fs::write(&path, &bytes).expect("written");
        let plan = ScanPlan { limits, time: Some(AMPLE), ..ScanPlan::new(vec![path]) };
        let report = look(&plan);
        assert!(report.complete, "case {case}");
        let again = look(&ScanPlan { threads: 1, ..plan });
        assert_eq!(told(&report), told(&again), "case {case}");
        clean += usize::from(report.findings.is_empty() && report.unread.is_empty());
        found += usize::from(!report.findings.is_empty());
        unread += usize::from(!report.unread.is_empty());
    }
    println!("{found} with findings, {unread} unread, {clean} clean");
    assert!(found > 50 && unread > 50, "the edits prove nothing: {found} {unread} {clean}");
}

// ---- the command --------------------------------------------------------------------------------------------------------

fn modelfs(args: &[&str], stdin: Option<&[u8]>) -> (i32, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_modelfs"))
        .args(args)
        .stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    if let (Some(bytes), Some(mut pipe)) = (stdin, child.stdin.take()) {
        let _ = pipe.write_all(bytes);
    }
    let out = child.wait_with_output().expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (out.status.code().expect("not killed"), text(out.stdout), text(out.stderr))
}

#[test]
fn an_archive_in_a_pipe_gives_the_report_of_the_file() {
    let root = tempfile::tempdir().expect("a folder");
    for archive in [docker_save_classic(), tar_of_map(&oci_files()), gzip(&docker_save_classic())] {
        write(root.path(), "a", &archive);
        let path = root.path().join("a");
        let from_file: Value =
            serde_json::from_str(&modelfs(&["scan", "--json", path.to_str().expect("UTF-8")], None).1).expect("JSON");
        let (code, out, _) = modelfs(&["scan", "--json", "-"], Some(&archive));
        let from_pipe: Value = serde_json::from_str(&out).expect("JSON");
        let without_target = |report: &Value| {
            let mut findings = report["findings"].clone();
            for finding in findings.as_array_mut().expect("a list") {
                finding.as_object_mut().expect("an object").remove("target");
            }
            findings
        };
        assert_eq!(code, 26);
        assert_eq!(without_target(&from_file), without_target(&from_pipe));
    }
}

#[test]
fn exit_codes_say_what_was_found_and_from_which_confidence_on() {
    let root = tempfile::tempdir().expect("a folder");
    let path = |name: &str| root.path().join(name).to_str().expect("UTF-8").to_owned();
    write(root.path(), "clean/readme", &b"nothing here\n".repeat(1000));
    write(root.path(), "certain/w", &planted::gguf());
    write(root.path(), "likely/model.ckpt", &noise(1 << 20));
    write(root.path(), "info/data.h5", &[b"\x89HDF\r\n\x1a\n\0".to_vec(), vec![0; 2 << 20]].concat());
    for (folder, flags, wanted) in [
        ("clean", &[][..], 0),
        ("certain", &[], 26),
        ("likely", &[], 26),
        ("likely", &["--fail-on", "certain"], 0),
        ("info", &[], 0),
        ("info", &["--fail-on", "info"], 26),
        ("certain", &["--fail-on", "never"], 0),
    ] {
        let args: Vec<String> =
            ["scan".to_owned(), path(folder)].into_iter().chain(flags.iter().map(|f| f.to_string())).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (code, out, err) = modelfs(&args, None);
        assert_eq!(code, wanted, "{folder} {flags:?}: {out}{err}");
    }
    assert_eq!(modelfs(&["scan", &path("none")], None).0, 3);
    assert_eq!(modelfs(&["scan"], None).0, 2);
    assert_eq!(modelfs(&["scan", &path("clean"), "--accept", "sha256:12"], None).0, 2);
    assert_eq!(modelfs(&["scan", &path("clean"), "--min-size", "much"], None).0, 2);
    let (code, out, _) = modelfs(&["scan", &path("certain")], None);
    assert_eq!(code, 26);
    for words in ["CERTAIN", "gguf", "why: GGUF version 3", "do: seal the model", "1 certain, 0 likely"] {
        assert!(out.contains(words), "{words}: {out}");
    }
    // Accepted by a file of digests, it is told and fails nothing.
    write(root.path(), "accepted", format!("# reviewed\nsha256:{} # a test's\n", sha256(&planted::gguf())).as_bytes());
    let (code, out, _) = modelfs(&["scan", &path("certain"), "--accept", &path("accepted")], None);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("1 accepted"), "{out}");
}

#[test]
fn a_sarif_report_names_rule_place_and_layer_of_each_finding() {
    let root = tempfile::tempdir().expect("a folder");
    let path = |name: &str| root.path().join(name).to_str().expect("UTF-8").to_owned();
    write(root.path(), "a.tar", &docker_save_classic());
    assert_eq!(modelfs(&["scan", &path("a.tar"), "--sarif", &path("out.sarif")], None).0, 26);
    let from_file: Value = serde_json::from_slice(&std::fs::read(path("out.sarif")).expect("written")).expect("JSON");
    let (_, out, _) = modelfs(&["scan", &path("a.tar"), "--sarif", "-"], None);
    assert_eq!(from_file, serde_json::from_str::<Value>(&out).expect("nothing but SARIF on standard output"));
    let run = &from_file["runs"][0];
    assert_eq!((&from_file["version"], &run["tool"]["driver"]["name"]), (&json!("2.1.0"), &json!("modelfs scan")));
    let results = run["results"].as_array().expect("a list");
    assert_eq!(results.len(), IN_LAYERS.len());
    let rules = run["tool"]["driver"]["rules"].as_array().expect("a list");
    for result in results {
        let rule = &rules[result["ruleIndex"].as_u64().expect("a number") as usize];
        assert_eq!(rule["id"], result["ruleId"]);
        assert_eq!(result["level"], "error");
        assert!(result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].is_string());
    }
    assert!(out.contains("hidden by layer 3") && out.contains("COPY dir:model"), "{out}");
    assert_eq!(run["invocations"][0]["executionSuccessful"], true);
    // What could not be read is no success.
    write(root.path(), "cut.tar", &docker_save_classic()[..3000]);
    let (_, out, _) = modelfs(&["scan", &path("cut.tar"), "--sarif", "-"], None);
    let cut: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(cut["runs"][0]["invocations"][0]["executionSuccessful"], false, "{cut}");
}

#[test]
fn the_quick_look_of_a_starting_container_ends_in_time_and_sees_large_files() {
    let root = tempfile::tempdir().expect("a folder");
    write(root.path(), "opt/model/w", &[planted::safetensors(), noise(1 << 20)].concat());
    write(root.path(), "opt/small", &planted::gguf());
    let quick = ScanPlan::quick(root.path());
    assert!(quick.time.is_some_and(|time| time <= Duration::from_secs(10)), "{:?}", quick.time);
    // Of a machine that stands still for so long it says nothing.
    let report = look(&ScanPlan { time: Some(AMPLE), ..quick });
    assert!(report.complete);
    assert_eq!(paths(&report), ["opt/model/w"]);
    let over = look(&ScanPlan { time: Some(Duration::ZERO), ..ScanPlan::quick(root.path()) });
    assert!(!over.complete);
    let places: Vec<PathBuf> = Vec::new();
    assert!(look(&ScanPlan::new(places)).findings.is_empty());
    let _: Option<&Finding> = report.findings.first();
}
