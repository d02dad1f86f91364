//! Versions as folders, `current`, and reload: what programs see while versions come, become current and leave.

#[path = "common/program.rs"]
mod program;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use program::{Program, can_mount, run_ok};

const WEIGHTS_BYTES: usize = (9 << 20) + 99;
const NAME: &str = "acme/m";

struct Scene {
    folder: tempfile::TempDir,
    program: Program,
}

impl Scene {
    fn new() -> Scene {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = Program::in_folder(folder.path());
        let scene = Scene { folder, program };
        scene.publish(1);
        scene
    }

    /// Seals version `n`: every file begins with its number.
    fn publish(&self, n: u8) {
        let source = self.folder.path().join("source");
        let _ = fs::remove_dir_all(&source);
        fs::create_dir_all(source.join("sub")).expect("mkdir");
        fs::write(source.join("config.json"), [n; 40]).expect("write");
        fs::write(source.join("sub/tokenizer.json"), [n; 4000]).expect("write");
        fs::write(source.join("weights.bin"), vec![n; WEIGHTS_BYTES]).expect("write");
        self.program.seal(&source, NAME);
    }

    fn at(&self, path: &str) -> PathBuf {
        self.program.mountpoint().join(NAME).join(path)
    }

    fn reload(&self) -> std::process::Output {
        self.program.command(&["reload", "--json"]).arg(self.program.mountpoint()).output().expect("runs")
    }

    fn listed(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.at(""))
            .expect("list")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("utf-8"))
            .collect();
        names.sort();
        names
    }

    fn wait_until(&self, what: &str, done: impl Fn() -> bool) {
        // A version that the kernel did not let go of at once is asked for again half a minute later.
        let deadline = Instant::now() + Duration::from_secs(180);
        while !done() {
            assert!(Instant::now() < deadline, "waited 180 s for {what}: {}", self.program.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The folder that `current` leads to. Whoever is held up for longer than a version is kept, between the link and the folder
/// that it named, finds that one gone; nobody else does.
fn open_current(current: &Path, kept: Duration) -> File {
    loop {
        let began = Instant::now();
        match File::open(current) {
            Ok(folder) => return folder,
            Err(error) if error.kind() == ErrorKind::NotFound && began.elapsed() >= kept => {}
            Err(error) => panic!("open current: {error}, after {:?}", began.elapsed()),
        }
    }
}

fn first_byte(path: &Path) -> u8 {
    fs::read(path).expect("read")[0]
}

#[test]
fn a_reload_shows_the_new_version_beside_the_old_and_current_leads_to_it() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mount = scene.program.mount(&["--cache", "128MiB", "--versions"]);
    assert_eq!(scene.listed(), ["1", "current"]);
    assert!(fs::symlink_metadata(scene.at("current")).expect("lstat").is_symlink());
    assert_eq!(fs::read_link(scene.at("current")).expect("readlink"), Path::new("1"));
    assert!(fs::metadata(scene.at("current")).expect("stat").is_dir());
    assert_eq!(first_byte(&scene.at("current/sub/tokenizer.json")), 1);
    scene.publish(2);
    assert_eq!(scene.listed(), ["1", "current"], "nothing changes before it is asked for");
    assert!(scene.reload().status.success());
    assert_eq!(scene.listed(), ["1", "2", "current"]);
    assert_eq!(fs::read_link(scene.at("current")).expect("readlink"), Path::new("2"));
    assert_eq!(first_byte(&scene.at("current/weights.bin")), 2);
    assert_eq!(first_byte(&scene.at("1/weights.bin")), 1);
    let status = run_ok(scene.program.command(&["status", "--json"]).arg(scene.program.mountpoint()));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    let current: Vec<_> = status["models"]
        .as_array()
        .expect("models")
        .iter()
        .map(|m| (m["version"].clone(), m["current"].clone()))
        .collect();
    assert_eq!(current, [(1.into(), false.into()), (2.into(), true.into())]);
    scene.publish(3);
    mount.signal(libc::SIGHUP);
    scene.wait_until("SIGHUP to reload", || fs::read_link(scene.at("current")).expect("readlink") == Path::new("3"));
    mount.unmount();
}

#[test]
fn a_refused_version_changes_nothing_and_the_reason_is_told() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mount = scene.program.mount(&["--cache", "128MiB", "--versions"]);
    // Refs, and the hint at the newest of them.
    let refs = || -> std::collections::BTreeMap<String, Vec<u8>> {
        let found = run_ok(std::process::Command::new("find").arg(scene.program.store()).args(["-type", "f"])).stdout;
        let found = String::from_utf8(found).expect("utf-8");
        found
            .lines()
            .filter(|file| file.contains("/r/"))
            .map(|file| (file.to_owned(), fs::read(file).expect("read")))
            .collect()
    };
    let before = refs();
    scene.publish(2);
    let kept: Vec<(String, Vec<u8>)> =
        refs().into_iter().filter(|(file, bytes)| before.get(file) != Some(bytes)).collect();
    assert!(kept.len() >= 2, "a publish writes a ref and the hint: {kept:?}");
    for (file, bytes) in &kept {
        let mut bytes = bytes.clone();
        bytes[300] ^= 1; // in the signature
        fs::remove_file(file).expect("remove");
        fs::write(file, bytes).expect("write");
    }
    let refused = scene.reload();
    assert_eq!(refused.status.code(), Some(20), "{refused:?}");
    assert_eq!(scene.listed(), ["1", "current"]);
    assert_eq!(first_byte(&scene.at("current/weights.bin")), 1);
    for (file, bytes) in &kept {
        fs::write(file, bytes).expect("write");
    }
    assert!(scene.reload().status.success());
    assert_eq!(first_byte(&scene.at("current/weights.bin")), 2);
    mount.unmount();
}

#[test]
fn an_old_version_stays_while_it_is_open_or_mapped_and_its_memory_is_wiped_after() {
    if !can_mount() {
        return;
    }
    for open in ["lazy", "whole"] {
        let scene = Scene::new();
        let mount =
            scene.program.mount(&["--cache", "128MiB", "--versions", "--retire-after", "200ms", "--open", open]);
        let file = File::open(scene.at("current/weights.bin")).expect("open");
        // SAFETY: a fresh read-only map of an open file, unmapped below.
        let map = unsafe {
            let fd = file.as_raw_fd();
            libc::mmap(std::ptr::null_mut(), WEIGHTS_BYTES, libc::PROT_READ, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(map, libc::MAP_FAILED);
        drop(file);
        scene.publish(2);
        assert!(scene.reload().status.success());
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(scene.listed(), ["1", "2", "current"], "{open}: mapped");
        // SAFETY: within the map.
        let bytes = unsafe { std::slice::from_raw_parts(map.cast::<u8>(), WEIGHTS_BYTES) };
        assert!(bytes.iter().all(|byte| *byte == 1), "{open}");
        // SAFETY: made above, not used again.
        unsafe { libc::munmap(map, WEIGHTS_BYTES) };
        scene.wait_until("the old version to leave", || scene.listed() == ["2", "current"]);
        scene.wait_until("its memory to be wiped", || {
            let status = run_ok(scene.program.command(&["status", "--json"]).arg(scene.program.mountpoint()));
            let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
            status["cache"]["bytes"] == 0
        });
        assert!(fs::metadata(scene.at("1")).is_err());
        mount.unmount();
    }
}

#[test]
fn a_version_whose_directory_is_held_stays_while_others_leave() {
    if !can_mount() {
        return;
    }
    for hold in ["a descriptor of its folder", "a descriptor below it", "a working directory"] {
        let scene = Scene::new();
        let mount = scene.program.mount(&["--cache", "128MiB", "--versions", "--retire-after", "100ms"]);
        // Resolved once, through the link.
        let below = scene.at("current").join(if hold.contains("below") { "sub" } else { "" });
        let folder = (!hold.contains("working")).then(|| File::open(&below).expect("open"));
        let mut shell = folder.is_none().then(|| {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "read -r _; cat config.json sub/tokenizer.json weights.bin"]).current_dir(&below);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sh runs")
        });
        // Each of these leaves after the period, so that it has passed three times for the one that is held.
        for version in 2..=5 {
            scene.publish(version);
            assert!(scene.reload().status.success());
            if version > 2 {
                let gone = (version - 1).to_string();
                scene.wait_until("a version that nobody has to leave", || !scene.listed().contains(&gone));
            }
        }
        assert_eq!(scene.listed(), ["1", "5", "current"], "{hold}");

        if let Some(folder) = &folder {
            let inside = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
            for (file, len) in [("config.json", 40), ("sub/tokenizer.json", 4000), ("weights.bin", WEIGHTS_BYTES)] {
                let file = if hold.contains("below") { Path::new("..").join(file) } else { file.into() };
                assert_eq!(fs::read(inside.join(file)).expect("read"), vec![1; len], "{hold}");
            }
        }
        if let Some(shell) = shell.take() {
            let read = shell.wait_with_output().expect("sh ends").stdout;
            assert_eq!(read, vec![1; 40 + 4000 + WEIGHTS_BYTES], "{hold}");
        }
        drop(folder);
        scene.wait_until(&format!("it to leave once let go: {hold}"), || scene.listed() == ["5", "current"]);
        mount.unmount();
    }
}

#[test]
fn a_load_through_an_open_directory_never_mixes_versions() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mount = scene.program.mount(&["--cache", "128MiB", "--versions", "--retire-after", "100ms"]);
    let (done, loads, least) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(1));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let at_least = least.load(Ordering::SeqCst);
                    // Half of it: the version may have been used last a moment before.
                    let folder = open_current(&scene.at("current"), Duration::from_millis(50));
                    let inside = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
                    let seen =
                        ["config.json", "sub/tokenizer.json", "weights.bin"].map(|f| first_byte(&inside.join(f)));
                    assert!(seen.iter().all(|marker| *marker == seen[0]), "mixed: {seen:?}");
                    assert!(u64::from(seen[0]) >= at_least, "{seen:?} after a reload to {at_least}");
                    loads.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for version in 2..6 {
            scene.publish(version);
            assert!(scene.reload().status.success());
            least.store(version.into(), Ordering::SeqCst);
            let seen = loads.load(Ordering::SeqCst);
            scene.wait_until("loads", || loads.load(Ordering::SeqCst) > seen + 6);
        }
        done.store(true, Ordering::SeqCst);
    });
    mount.unmount();
}

#[test]
fn a_lock_that_comes_during_a_reload_leaves_no_version_served() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let phrase = scene.folder.path().join("phrase");
    fs::write(&phrase, "a long passphrase of a test\n").expect("write");
    fs::set_permissions(&phrase, fs::Permissions::from_mode(0o600)).expect("chmod");
    let word = format!("passphrase-file:{}", phrase.display());
    let mount = scene.program.mount(&["--cache", "128MiB", "--versions", "--key", &word]);
    // Its key takes a while to stretch, so that the reload goes on when the lock comes. The rule holds whenever it comes.
    let source = scene.folder.path().join("source");
    run_ok(scene.program.command(&["seal"]).arg(&source).args([scene.program.store(), NAME, "--key", &word]));
    std::thread::scope(|scope| {
        let reloading = scope.spawn(|| scene.reload());
        std::thread::sleep(Duration::from_millis(300));
        run_ok(scene.program.command(&["lock"]).arg(scene.program.mountpoint()));
        let reloaded = reloading.join().expect("a thread");

        let status = run_ok(scene.program.command(&["status", "--json"]).arg(scene.program.mountpoint()));
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
        for model in status["models"].as_array().expect("models") {
            assert_eq!(model["locked"], true, "{status}, {reloaded:?}");
        }
    });
    assert_eq!(File::open(scene.at("current/weights.bin")).expect_err("locked").kind(), ErrorKind::PermissionDenied);
    mount.unmount();
}

#[test]
fn several_versions_can_be_asked_for_and_the_first_is_current() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    scene.publish(2);
    let mount = scene.program.mount(&["--cache", "128MiB", "--versions", "--model", "acme/m@1", "--model", "acme/m@2"]);
    assert_eq!(scene.listed(), ["1", "2", "current"]);
    assert_eq!(first_byte(&scene.at("current/config.json")), 1);
    assert_eq!(first_byte(&scene.at("2/config.json")), 2);
    mount.unmount();
}

#[test]
fn without_versions_reload_is_refused_with_what_to_do() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mount = scene.program.mount(&["--cache", "128MiB"]);
    let refused = scene.reload();
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let said = [refused.stdout, refused.stderr].concat();
    assert!(String::from_utf8_lossy(&said).contains("--versions"));
    assert_eq!(scene.listed(), ["config.json", "sub", "weights.bin"]);
    mount.unmount();
}
