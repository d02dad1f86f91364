//! Several mounts of one process: one memory for one version, a right for each mount.

#[path = "common/fake_vault.rs"]
mod fake_vault;
#[path = "common/hostile.rs"]
#[allow(dead_code)]
mod hostile;
#[path = "common/program.rs"]
mod program;
#[path = "common/s3_folder.rs"]
mod s3_folder;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fake_vault::FakeVault;
use hostile::{Hostile, Request, respond};
use modelfs::config::{self, MountPlan};
use modelfs::control::{self, AccessRequest, ControlTarget};
use modelfs::error::{Code, Result};
use modelfs::host::{Host, HostPlan, Mounted};
use modelfs::store::{Limiter, OriginLimits};
use program::{Program, can_mount, is_mountpoint, run_ok};
use serde_json::json;

const NAME: &str = "acme/m";
const BYTES: usize = (9 << 20) + 99;
const GRACE: Duration = Duration::from_secs(60);

/// Says to a test that it is the child, and where its files are.
const ROOT: &str = "MODELFS_TEST_HOST_ROOT";

struct Scene {
    root: PathBuf,
    store: String,
    host: Arc<Host>,
}

/// Runs the test `name` again as a process of its own, since where versions are remembered is said by the environment.
/// In that process: a store with one model, and a host without mounts.
fn scene(name: &str) -> Option<Scene> {
    if !can_mount() {
        return None;
    }
    if let Some(root) = std::env::var_os(ROOT) {
        let root = PathBuf::from(root);
        let host = Host::start(&HostPlan { cache_bytes: 128 << 20, oversight: Default::default() }).expect("a host");
        return Some(Scene { store: root.join("store").to_str().expect("utf-8").to_owned(), root, host });
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Program::in_folder(folder.path());
    run_ok(program.command(&["keygen"]).arg(folder.path().join("home/other.key")));
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("first.bin"), vec![1; BYTES]).expect("write");
    fs::write(source.join("second.bin"), vec![2; BYTES]).expect("write");
    program.seal(&source, NAME);
    fs::create_dir(folder.path().join("other")).expect("mkdir");
    let mut child = Command::new(std::env::current_exe().expect("this test"));
    child.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    child.env(ROOT, folder.path()).env("MODELFS_STATE_DIR", folder.path().join("state"));
    let output = run_ok(&mut child);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("1 passed"), "the child ran no test: {said}");
    None
}

impl Scene {
    fn mount(&self, place: &str, key: &str, more: &[&str]) -> Result<Arc<Mounted>> {
        let home = self.root.join("home");
        let mut words = vec![
            format!("key=file:{}", home.join(key).display()),
            format!("trust={}", home.join(".config/modelfs/signing.key.pub").display()),
        ];
        words.extend(more.iter().map(|word| (*word).to_string()));
        self.mount_from(&self.store, place, &words)
    }

    fn mount_from(&self, store: &str, place: &str, words: &[String]) -> Result<Arc<Mounted>> {
        let mut layers = config::base_layers(None)?;
        layers.mount_options(words, false)?;
        self.host.mount(MountPlan::from_layers(&layers, store, &self.root.join(place), true)?)
    }

    /// The same model in another store, whose key is in a Vault, mounted at `other` with `more`.
    fn mount_by_vault(&self, more: &[&str]) -> (FakeVault, Arc<Mounted>) {
        let folder = self.root.join("of-vault");
        fs::create_dir(&folder).expect("mkdir");
        let (vault, program) = (FakeVault::start(&folder), Program::in_folder(&folder));
        let words = vault.words();
        let mut seal = program.command(&["seal"]);
        seal.arg(self.root.join("source")).args([program.store(), NAME]);
        for word in words.iter().filter(|word| !word.starts_with("floor=")) {
            let (name, value) = word.split_once('=').expect("every word has a value");
            seal.args([&format!("--{name}"), value]);
        }
        run_ok(&mut seal);
        let mounted = self.mount_again_by_vault(&vault, "other", more).expect("mounted");
        (vault, mounted)
    }

    /// What [`Scene::mount_by_vault`] sealed, once more, with a login of its own.
    fn mount_again_by_vault(&self, vault: &FakeVault, place: &str, more: &[&str]) -> Result<Arc<Mounted>> {
        let folder = self.root.join("of-vault");
        let mut words = vault.words();
        words.push(format!("trust={}", folder.join("home/.config/modelfs/signing.key.pub").display()));
        words.extend(more.iter().map(|word| (*word).to_string()));
        self.mount_from(folder.join("store").to_str().expect("utf-8"), place, &words)
    }

    fn in_memory(&self) -> u64 {
        self.host.cache().budget().in_use()
    }

    /// Seals the same files once more, for a passphrase alone; the option that opens them.
    fn seal_with_a_passphrase(&self, name: &str) -> String {
        let phrase = self.root.join("home/phrase");
        fs::write(&phrase, "a long passphrase of a test\n").expect("write");
        fs::set_permissions(&phrase, fs::Permissions::from_mode(0o600)).expect("chmod");
        let word = format!("passphrase-file:{}", phrase.display());
        let mut seal = Command::new(env!("CARGO_BIN_EXE_modelfs"));
        seal.arg("seal").arg(self.root.join("source")).args([&self.store, name, "--key", &word]);
        seal.env("HOME", self.root.join("home")).env("XDG_CONFIG_HOME", self.root.join("home/.config"));
        run_ok(&mut seal);
        format!("key={word}")
    }

    fn fetched(&self) -> u64 {
        self.host.telemetry().fetch_bytes.get()
    }

    /// What [`Scene::mount_by_vault`] sealed, by way of a store that wants storage credentials of that Vault whose lease
    /// is there.
    fn mount_by_lease(&self, vault: &FakeVault, place: &str, more: &[&str]) -> (Hostile, Result<Arc<Mounted>>) {
        let folder = self.root.join("of-vault");
        let s3 = bucket_of(&folder.join("store"), vault);
        let mut words = vault.words();
        words.extend(lease_words(&s3));
        words.push(format!("trust={}", folder.join("home/.config/modelfs/signing.key.pub").display()));
        words.extend(more.iter().map(|word| (*word).to_string()));
        let mounted = self.mount_from(&format!("s3://{BUCKET}"), place, &words);
        (s3, mounted)
    }

    fn wait_until(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !done() {
            assert!(Instant::now() < deadline, "waited 120 s for {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

const BUCKET: &str = "models";

/// A folder as a bucket, for whoever signs with what that Vault has lent and not taken back.
fn bucket_of(folder: &Path, vault: &FakeVault) -> Hostile {
    let (folder, takes) = (folder.to_owned(), vault.takes());
    Hostile::start(move |request: &Request, stream: &mut TcpStream| match takes(request) {
        true => s3_folder::serve_folder(&folder, BUCKET, request, stream),
        false => respond(stream, "403 Forbidden", &[], b"<Error><Code>InvalidAccessKeyId</Code></Error>"),
    })
}

/// What a mount is told of it.
fn lease_words(s3: &Hostile) -> [String; 2] {
    [format!("s3-endpoint={}", s3.endpoint()), "s3-credentials=vault-aws:aws/models".into()]
}

fn file(mounted: &Mounted, name: &str) -> PathBuf {
    mounted.mountpoint().join(NAME).join(name)
}

fn holds(path: &Path, byte: u8) -> bool {
    fs::read(path).is_ok_and(|bytes| bytes.len() == BYTES && bytes.iter().all(|is| *is == byte))
}

#[test]
fn two_mounts_of_one_version_share_its_memory_and_either_may_go_first() {
    let Some(scene) = scene("two_mounts_of_one_version_share_its_memory_and_either_may_go_first") else { return };
    let one = scene.mount("mnt", "model.key", &[]).expect("mounted");
    let two = scene.mount("other", "model.key", &[]).expect("mounted");
    let before = scene.fetched();
    assert!(holds(&file(&one, "first.bin"), 1));
    let once = scene.fetched();
    assert!(once > before, "the first read fetches");
    let resident = scene.host.cache().budget().in_use();

    assert!(holds(&file(&two, "first.bin"), 1));
    assert_eq!(scene.fetched(), once, "what one mount fetched the other has");
    assert_eq!(scene.host.cache().budget().in_use(), resident);

    one.unmount(GRACE).expect("unmounted");
    assert!(!is_mountpoint(one.mountpoint()) && !one.is_mounted());
    assert!(holds(&file(&two, "first.bin"), 1), "what is resident stays for the other");
    assert_eq!(scene.fetched(), once);
    assert!(holds(&file(&two, "second.bin"), 2), "and what is not is fetched through its own access");
    assert!(scene.fetched() > once);

    two.unmount(GRACE).expect("unmounted");
    scene.wait_until("the wipe", || scene.host.cache().budget().in_use() == 0);
    scene.host.stop().expect("stopped");
}

#[test]
fn mounts_of_one_origin_share_its_limits_and_wait_for_them() {
    let Some(scene) = scene("mounts_of_one_origin_share_its_limits_and_wait_for_them") else { return };
    let free = scene.mount("mnt", "model.key", &[]).expect("mounted");
    assert!(holds(&file(&free, "first.bin"), 1));
    assert_eq!(scene.host.telemetry().limit_waits.get(), 0, "nothing is limited unless it is said");
    free.unmount(GRACE).expect("unmounted");
    scene.wait_until("the wipe", || scene.host.cache().budget().in_use() == 0);

    let limits = OriginLimits { bytes_per_s: Some(4 << 20), ..OriginLimits::default() };
    let turns = Limiter::of(&scene.store, &limits).expect("limited");
    let nobody = Arc::strong_count(&turns);
    let one = scene.mount("mnt", "model.key", &["origin-bytes=4MiB"]).expect("mounted");
    let of_one = Arc::strong_count(&turns);
    let two = scene.mount("other", "model.key", &["origin-bytes=4MiB"]).expect("mounted");
    assert!(nobody < of_one && of_one < Arc::strong_count(&turns), "each waits for the same turns");
    assert!(holds(&file(&one, "first.bin"), 1) && holds(&file(&two, "second.bin"), 2));
    assert!(scene.host.telemetry().limit_waits.get() > 0, "18 MiB at once");
    one.unmount(GRACE).expect("unmounted");
    two.unmount(GRACE).expect("unmounted");
    scene.host.stop().expect("stopped");
}

#[test]
fn a_mount_without_a_key_of_its_own_gets_nothing_that_another_has() {
    let Some(scene) = scene("a_mount_without_a_key_of_its_own_gets_nothing_that_another_has") else { return };
    let one = scene.mount("mnt", "model.key", &[]).expect("mounted");
    assert!(holds(&file(&one, "first.bin"), 1));

    let refused = scene.mount("other", "other.key", &[]).err().expect("another key opens nothing");

    assert_eq!(refused.code(), Code::NoKey, "{refused:?}");
    assert!(!is_mountpoint(&scene.root.join("other")));
    assert!(holds(&file(&one, "second.bin"), 2), "the first mount goes on");
    assert_eq!(scene.host.mounted().len(), 1);
    scene.host.stop().expect("stopped");
    assert!(!is_mountpoint(&scene.root.join("mnt")));
}

#[test]
fn one_mount_is_refused_and_served_again_while_the_other_goes_on() {
    let Some(scene) = scene("one_mount_is_refused_and_served_again_while_the_other_goes_on") else { return };
    let one = scene.mount("mnt", "model.key", &[]).expect("mounted");
    let two = scene.mount("other", "model.key", &["open=lazy"]).expect("mounted");
    assert!(holds(&file(&two, "first.bin"), 1));

    two.refuse(Some("its right was taken back")).expect("refused");

    for name in ["first.bin", "second.bin"] {
        let refused = fs::File::open(file(&two, name)).expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied, "{name}");
        assert!(fs::File::open(file(&one, name)).is_ok(), "{name}");
    }
    assert_eq!(two.status()["refused"], true);
    two.refuse(None).expect("let in");
    assert!(holds(&file(&two, "first.bin"), 1));
    scene.host.stop().expect("stopped");
}

#[test]
fn a_recheck_tells_whether_the_own_access_still_opens_the_version_and_changes_nothing() {
    let Some(scene) = scene("a_recheck_tells_whether_the_own_access_still_opens_the_version_and_changes_nothing")
    else {
        return;
    };
    let one = scene.mount("mnt", "model.key", &[]).expect("mounted");
    one.recheck().expect("the key is there");
    let key = scene.root.join("home/model.key");
    fs::copy(scene.root.join("home/other.key"), &key).expect("replaced");

    assert_eq!(one.recheck().expect_err("another key").code(), Code::NoKey);
    fs::remove_file(&key).expect("removed");
    assert!(one.recheck().is_err());

    assert!(holds(&file(&one, "first.bin"), 1));
    scene.host.stop().expect("stopped");
}

#[test]
fn a_mount_that_somebody_unmounts_ends_and_the_others_go_on() {
    let Some(scene) = scene("a_mount_that_somebody_unmounts_ends_and_the_others_go_on") else { return };
    let one = scene.mount("mnt", "model.key", &[]).expect("mounted");
    let two = scene.mount("other", "model.key", &[]).expect("mounted");
    assert!(holds(&file(&two, "first.bin"), 1));

    run_ok(Command::new("umount").arg(two.mountpoint()));

    scene.wait_until("the end of the mount", || *two.gone().borrow());
    assert!(!two.is_mounted());
    assert_eq!(scene.host.mounted().len(), 1);
    assert!(holds(&file(&one, "second.bin"), 2));
    let again = scene.mount("other", "model.key", &[]).expect("the place is free again");
    assert!(holds(&file(&again, "first.bin"), 1));
    scene.host.stop().expect("stopped");
    assert!(scene.host.mounted().is_empty());
}

#[test]
fn a_mount_whose_files_are_held_is_detached_and_wiped_when_they_are_let_go() {
    let Some(scene) = scene("a_mount_whose_files_are_held_is_detached_and_wiped_when_they_are_let_go") else { return };
    let one = scene.mount("mnt", "model.key", &["open=whole"]).expect("mounted");
    assert!(holds(&file(&one, "first.bin"), 1));
    let held = fs::File::open(file(&one, "first.bin")).expect("open");

    let told = one.unmount(Duration::from_millis(200)).expect_err("held");

    assert_eq!(told.code(), Code::Held);
    assert!(!is_mountpoint(&scene.root.join("mnt")));
    assert!(scene.host.cache().budget().in_use() > 0 || !one.ready().passthrough);
    drop(held);
    scene.wait_until("the wipe", || scene.host.cache().budget().in_use() == 0);
    scene.host.stop().expect("stopped");
}

#[test]
fn a_mount_that_is_abandoned_stays_in_the_tree_wiped_and_lets_nobody_read() {
    let Some(scene) = scene("a_mount_that_is_abandoned_stays_in_the_tree_wiped_and_lets_nobody_read") else { return };
    let one = scene.mount("mnt", "model.key", &[]).expect("mounted");
    assert!(holds(&file(&one, "first.bin"), 1));
    let open = fs::File::open(file(&one, "second.bin")).expect("open");
    let (place, name) = (scene.root.join("mnt"), file(&one, "first.bin"));

    // Who has a file open is not waited for.
    let began = Instant::now();
    let _ = one.abandon();
    assert!(began.elapsed() < GRACE, "{:?}", began.elapsed());

    assert!(is_mountpoint(&place) && !one.is_mounted() && scene.host.mounted().is_empty());
    assert_eq!(fs::read(&name).expect_err("refused").kind(), ErrorKind::PermissionDenied);
    drop(open);
    scene.wait_until("the wipe", || scene.host.cache().budget().in_use() == 0);
    let _ = one.unmount(GRACE);
    scene.host.stop().expect("stopped");
    assert!(is_mountpoint(&place), "it is dead when this process has ended");
    run_ok(Command::new("umount").arg("-l").arg(&place));
}

#[test]
fn a_locked_version_is_given_to_no_newcomer() {
    let Some(scene) = scene("a_locked_version_is_given_to_no_newcomer") else { return };
    let one = scene.mount("mnt", "model.key", &[]).expect("mounted");
    one.access(AccessRequest::Lock { model: None }).expect("locked");

    let refused = scene.mount("other", "model.key", &["model=acme/m"]).err().expect("locked for newcomers too");
    assert_eq!(refused.code(), Code::Locked, "{refused:?}");

    one.access(AccessRequest::Unlock { model: None }).expect("unlocked");
    let two = scene.mount("other", "model.key", &[]).expect("mounted");
    assert!(holds(&file(&two, "first.bin"), 1));
    scene.host.stop().expect("stopped");
}

fn vault_of(mounted: &Mounted) -> serde_json::Value {
    mounted.status()["vault"]["state"].clone()
}

fn is_refused(mounted: &Mounted) -> bool {
    let opened = fs::File::open(file(mounted, "second.bin"));
    opened.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

fn unlock(mounted: &Mounted) -> Result<serde_json::Value> {
    mounted.access(AccessRequest::Unlock { model: None })
}

#[test]
fn a_mount_whose_storage_lease_was_revoked_is_refused_until_an_unlock_or_a_new_proof_of_its_right() {
    let name = "a_mount_whose_storage_lease_was_revoked_is_refused_until_an_unlock_or_a_new_proof_of_its_right";
    let Some(scene) = scene(name) else { return };
    let (vault, keeper) = scene.mount_by_vault(&["on-key-loss=keep", "open=lazy"]);
    let (_s3, two) = scene.mount_by_lease(&vault, "mnt", &["on-key-loss=lock", "open=lazy"]);
    let two = two.expect("mounted");
    assert!(holds(&file(&two, "first.bin"), 1));
    let lent = vault.lent();

    vault.revoke_leases();

    // The store refuses what it took before: that is how the mount learns of it.
    assert!(fs::read(file(&two, "second.bin")).is_err(), "it was read with a set of another lease");
    scene.wait_until("the refusal", || two.status()["refused"] == true);
    assert!(is_refused(&two));
    assert_eq!(two.status()["storage_credentials"]["state"], "lost");
    assert_eq!((vault.lent(), vault_of(&two)), (lent, json!("live")), "another set was asked for");
    assert!(holds(&file(&keeper, "first.bin"), 1), "the other mount goes on");
    two.recheck().expect("its right is as good as ever");
    assert!(holds(&file(&two, "second.bin"), 2));

    vault.revoke_leases();
    assert!(fs::read(file(&two, "first.bin")).is_err(), "it was read with a set of another lease");
    scene.wait_until("the second refusal", || two.status()["refused"] == true);
    unlock(&two).expect("asked for by its operator");
    assert!(holds(&file(&two, "second.bin"), 2));
    scene.host.stop().expect("stopped");
    assert_eq!(vault.tokens(), 1, "the publisher's alone is left");
}

/// The program itself, which is one mount: with `keep` nobody notices, with `lock` it is dark.
#[test]
fn a_revoked_storage_lease_locks_a_mount_that_is_to_lock_and_is_replaced_for_one_that_keeps() {
    if !can_mount() {
        return;
    }
    for policy in ["keep", "lock"] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (vault, program) = (FakeVault::start(folder.path()), Program::in_folder(folder.path()));
        let source = folder.path().join("source");
        fs::create_dir(&source).expect("mkdir");
        fs::write(source.join("first.bin"), vec![1; BYTES]).expect("write");
        fs::write(source.join("second.bin"), vec![2; BYTES]).expect("write");
        let flags = |words: &[String]| -> Vec<String> {
            let pairs = words.iter().map(|word| word.split_once('=').expect("every word has a value"));
            pairs.flat_map(|(name, value)| [format!("--{name}"), value.to_owned()]).collect()
        };
        let words = vault.words();
        let (floor, reach): (Vec<String>, Vec<String>) = words.into_iter().partition(|word| word.starts_with("floor="));
        run_ok(program.command(&["seal"]).arg(&source).args([program.store(), NAME]).args(flags(&reach)));
        let s3 = bucket_of(Path::new(program.store()), &vault);
        let mountpoint = program.mountpoint();
        let mut mount = program.command(&["mount", &format!("s3://{BUCKET}"), "--open", "lazy"]);
        mount.arg(mountpoint).args(flags(&[reach, floor].concat())).args(flags(&lease_words(&s3)));
        mount.args(["--on-key-loss", policy, "--trust"]).arg(program.trusted_key());
        let log = fs::File::create(folder.path().join("daemon.log")).expect("log");
        let mut child = mount.stdout(std::process::Stdio::null()).stderr(log).spawn().expect("runs");
        let (first, second) = (mountpoint.join(NAME).join("first.bin"), mountpoint.join(NAME).join("second.bin"));
        program.until("the first file", || holds(&first, 1));

        vault.revoke_leases();

        if policy == "keep" {
            assert!(holds(&second, 2), "{}", program.log());
        } else {
            assert!(fs::read(&second).is_err(), "it was read with a set of another lease");
            program.until("the lock", || fs::read(&first).is_err());
            let status = run_ok(program.command(&["status", "--json"]).arg(mountpoint)).stdout;
            let status: serde_json::Value = serde_json::from_slice(&status).expect("JSON");
            assert_eq!(status["models"][0]["locked"], true, "{status}");
            run_ok(program.command(&["unlock"]).arg(mountpoint));
            assert!(holds(&first, 1) && holds(&second, 2), "{}", program.log());
        }
        program.until("word of it", || program.log().contains("the lease of the storage credentials"));
        run_ok(program.command(&["umount"]).arg(mountpoint));
        child.wait().expect("ended");
        assert_eq!(vault.tokens(), 1, "the publisher's alone is left");
    }
}

/// With `on-key-loss=keep`, where nothing is locked that could be unlocked.
#[test]
fn an_unlock_ends_a_loss_that_locked_nothing_or_says_that_it_lasts() {
    let Some(scene) = scene("an_unlock_ends_a_loss_that_locked_nothing_or_says_that_it_lasts") else { return };
    let (vault, one) = scene.mount_by_vault(&["versions"]);
    vault.revoke_all();
    vault.shut(true);
    // The floor cannot be asked for: that is how the mount learns of it here.
    assert_eq!(one.reload(None).expect_err("lost").code(), Code::VaultDenied);
    assert_eq!(vault_of(&one), "lost");
    assert!(holds(&file(&one, "current/first.bin"), 1), "a mount that keeps its keys goes on");

    let refused = unlock(&one).expect_err("there is no login yet");

    assert_eq!(refused.code(), Code::VaultDenied, "{refused:?}");
    for word in ["still lost", "modelfs unlock", "the user or the password is wrong"] {
        assert!(refused.chain().contains(word), "{word:?} is not in: {}", refused.chain());
    }
    assert_eq!(vault_of(&one), "lost");
    vault.shut(false);
    assert_eq!(unlock(&one).expect("in again"), json!({"unlocked": [], "vault": "live"}));
    assert_eq!(vault_of(&one), "live");
    one.reload(None).expect("the floor is asked for again");
    assert_eq!(unlock(&one).expect("nothing to do"), json!({"unlocked": []}));
    scene.host.stop().expect("stopped");
    assert_eq!(vault.tokens(), 0, "every token was given back");
}

#[test]
fn a_mount_whose_token_was_revoked_is_refused_until_vault_takes_it_again() {
    let Some(scene) = scene("a_mount_whose_token_was_revoked_is_refused_until_vault_takes_it_again") else { return };
    let one = scene.mount("mnt", "model.key", &[]).expect("mounted");
    let (vault, two) = scene.mount_by_vault(&["on-key-loss=lock", "open=lazy"]);
    assert!(holds(&file(&two, "first.bin"), 1));

    vault.revoke_all();

    scene.wait_until("the refusal", || two.status()["refused"] == true);
    assert!(is_refused(&two));
    assert!(holds(&file(&one, "first.bin"), 1), "the other mount goes on");
    // What could log in does not do so by itself.
    assert_eq!(vault_of(&two), "lost");
    two.recheck().expect("its login is as good as ever");
    assert!(holds(&file(&two, "first.bin"), 1));
    assert_eq!(vault_of(&two), "live");

    vault.revoke_all();
    scene.wait_until("the second refusal", || two.status()["refused"] == true);
    vault.shut(true);
    assert_eq!(two.recheck().expect_err("no login").code(), Code::VaultDenied);
    assert_eq!(unlock(&two).expect_err("no login").code(), Code::VaultDenied);
    assert!(is_refused(&two));
    vault.shut(false);
    unlock(&two).expect("in again");
    assert!(holds(&file(&two, "second.bin"), 2));
    scene.host.stop().expect("stopped");
}

fn locked(mounted: &Mounted) -> bool {
    let told = mounted.status();
    told["models"].as_array().expect("models").iter().all(|model| model["locked"] == true)
}

/// A refusal leaves the plaintext where it is, for the others; where there are none it goes.
#[test]
fn a_version_that_no_mount_has_a_right_to_is_locked_and_wiped() {
    let Some(scene) = scene("a_version_that_no_mount_has_a_right_to_is_locked_and_wiped") else { return };
    let (vault, two) = scene.mount_by_vault(&["on-key-loss=lock", "open=whole"]);
    assert!(holds(&file(&two, "first.bin"), 1));
    let mut held = fs::File::open(file(&two, "first.bin")).expect("open");
    assert!(scene.in_memory() > 0);

    vault.revoke_all();

    scene.wait_until("the lock", || locked(&two));
    scene.wait_until("the wipe", || scene.in_memory() == 0);
    assert!(is_refused(&two));
    // A whole file that was read past the daemon ends early, another answers EACCES.
    let mut rest = Vec::new();
    assert!(std::io::Read::read_to_end(&mut held, &mut rest).is_err() || rest.is_empty());
    drop(held);

    // Its right is proved: the keys are read anew, and it is served again.
    two.recheck().expect("its login is as good as ever");
    assert!(!locked(&two));
    assert!(holds(&file(&two, "second.bin"), 2));

    // What an operator locked stays locked, whatever becomes of the right.
    vault.revoke_all();
    scene.wait_until("the second lock", || locked(&two));
    two.access(AccessRequest::Lock { model: None }).expect("locked by somebody");
    two.recheck().expect("its login is as good as ever");
    assert_eq!(two.status()["refused"], false);
    assert!(locked(&two) && is_refused(&two));
    let newcomer = scene.mount_again_by_vault(&vault, "mnt", &["model=acme/m"]).err().expect("locked for him too");
    assert_eq!(newcomer.code(), Code::Locked, "{newcomer:?}");
    unlock(&two).expect("the operator's word");
    assert!(holds(&file(&two, "second.bin"), 2));
    scene.host.stop().expect("stopped");
    assert_eq!(vault.tokens(), 0, "every token was given back");
}

#[test]
fn a_version_is_kept_for_whoever_has_a_right_to_it_and_goes_with_the_last() {
    let Some(scene) = scene("a_version_is_kept_for_whoever_has_a_right_to_it_and_goes_with_the_last") else { return };
    fs::create_dir(scene.root.join("third")).expect("mkdir");
    let (vault, two) = scene.mount_by_vault(&["on-key-loss=lock", "open=lazy"]);
    let more = ["on-key-loss=lock", "open=lazy", "model=acme/m"];
    let one = scene.mount_again_by_vault(&vault, "mnt", &more).expect("mounted");
    assert!(holds(&file(&two, "first.bin"), 1));

    two.refuse(Some("its right was not proved")).expect("refused");
    assert!(is_refused(&two) && !locked(&two), "the other goes on");
    let fetched = scene.fetched();
    assert!(holds(&file(&one, "first.bin"), 1));
    assert_eq!(scene.fetched(), fetched, "from memory");

    // The last that has a right loses it: by a refusal, and by going.
    one.refuse(Some("its right was not proved")).expect("refused");
    assert!(locked(&two) && scene.in_memory() == 0);
    one.refuse(None).expect("it has its right again, and keys");
    assert!(holds(&file(&one, "first.bin"), 1) && is_refused(&two));
    one.unmount(GRACE).expect("unmounted");
    assert!(locked(&two) && scene.in_memory() == 0, "who is left has no right to it");

    // A newcomer with keys of his own is served, and lets nobody else in; with him it goes again.
    let third = scene.mount_again_by_vault(&vault, "third", &more).expect("mounted");
    assert!(holds(&file(&third, "second.bin"), 2) && is_refused(&two));
    third.unmount(GRACE).expect("unmounted");
    assert!(locked(&two) && scene.in_memory() == 0);

    two.refuse(None).expect("let in");
    assert!(holds(&file(&two, "first.bin"), 1));
    scene.host.stop().expect("stopped");
}

/// Rights come and go on all sides, while somebody reads: he gets the bytes or a refusal.
#[test]
fn rights_that_come_and_go_at_once_leave_every_mount_as_it_was_told_last() {
    let Some(scene) = scene("rights_that_come_and_go_at_once_leave_every_mount_as_it_was_told_last") else { return };
    fs::create_dir(scene.root.join("third")).expect("mkdir");
    let more = ["on-key-loss=lock", "open=lazy", "no-passthrough", "model=acme/m"];
    let (vault, two) = scene.mount_by_vault(&more);
    let one = scene.mount_again_by_vault(&vault, "mnt", &more).expect("mounted");
    let toggled = |mounted: &Arc<Mounted>, rounds: u64| {
        for round in 0..rounds {
            mounted.refuse(Some("its right was not proved")).expect("refused");
            std::thread::sleep(Duration::from_millis(7 * round));
            mounted.refuse(None).expect("let in");
        }
    };
    std::thread::scope(|all| {
        let ways = [all.spawn(|| toggled(&one, 9)), all.spawn(|| toggled(&two, 7))];
        let comes = all.spawn(|| {
            for _ in 0..4 {
                let third = scene.mount_again_by_vault(&vault, "third", &more).expect("its right was never taken");
                assert!(holds(&file(&third, "first.bin"), 1));
                third.unmount(GRACE).expect("unmounted");
            }
        });
        while !ways.iter().all(|way| way.is_finished()) || !comes.is_finished() {
            for mounted in [&one, &two] {
                if let Ok(bytes) = fs::read(file(mounted, "first.bin")) {
                    assert!(bytes.len() == BYTES && bytes.iter().all(|byte| *byte == 1));
                }
            }
        }
    });
    for mounted in [&one, &two] {
        assert!(holds(&file(mounted, "second.bin"), 2) && !locked(mounted));
    }
    scene.host.stop().expect("stopped");
}

#[test]
fn a_mount_whose_keys_cannot_be_read_again_stays_refused() {
    let Some(scene) = scene("a_mount_whose_keys_cannot_be_read_again_stays_refused") else { return };
    let (vault, two) = scene.mount_by_vault(&["on-key-loss=lock", "open=lazy"]);
    two.refuse(Some("its right was not proved")).expect("refused");
    let slots = scene.root.join("of-vault/store");
    let aside = scene.root.join("of-vault/aside");
    fs::rename(&slots, &aside).expect("the store is away");

    two.refuse(None).expect_err("nothing to read the slots from");

    assert!(is_refused(&two) && locked(&two));
    assert_eq!(two.status()["refused"], true);
    fs::rename(&aside, &slots).expect("the store is back");
    two.refuse(None).expect("said again");
    assert!(holds(&file(&two, "first.bin"), 1));
    scene.host.stop().expect("stopped");
    drop(vault);
}

/// A mount that keeps its keys has its right as long as it lasts, and nothing is wiped under it.
#[test]
fn a_refused_mount_that_keeps_its_keys_keeps_the_version() {
    let Some(scene) = scene("a_refused_mount_that_keeps_its_keys_keeps_the_version") else { return };
    let (_vault, two) = scene.mount_by_vault(&["open=lazy"]);
    assert!(holds(&file(&two, "first.bin"), 1));
    two.refuse(Some("its right was not proved")).expect("refused");
    assert!(is_refused(&two) && !locked(&two) && scene.in_memory() > 0);
    scene.host.stop().expect("stopped");
}

/// Else whoever tries again and again, as a kubelet does, leaves a living token each time.
#[test]
fn a_mount_that_is_refused_gives_its_token_back() {
    let Some(scene) = scene("a_mount_that_is_refused_gives_its_token_back") else { return };
    let vault = FakeVault::start(&scene.root);
    let mut words = vault.words();
    words.push(format!("trust={}", scene.root.join("home/.config/modelfs/signing.key.pub").display()));
    let refused =
        scene.mount_from(&scene.store, "other", &words).map(drop).expect_err("no slot is for the key in Vault");
    assert_eq!(refused.code(), Code::NoKey);
    assert_eq!((vault.issued(), vault.tokens()), (1, 0));
    scene.host.stop().expect("stopped");
}

#[test]
fn who_refused_a_mount_alone_lets_its_readers_in_again() {
    let Some(scene) = scene("who_refused_a_mount_alone_lets_its_readers_in_again") else { return };
    let (vault, two) = scene.mount_by_vault(&["on-key-loss=lock", "open=lazy"]);
    // Vault takes the token and then us again, while the right is not proved: that stays.
    two.refuse(Some("its right was not proved")).expect("refused");
    vault.revoke_all();
    scene.wait_until("the loss", || vault_of(&two) == "lost");
    unlock(&two).expect("in again");
    assert_eq!(vault_of(&two), "live");
    assert!(is_refused(&two));
    two.refuse(None).expect("let in");
    assert!(!is_refused(&two));
    // The right is proved, while Vault has taken the token: that stays.
    vault.revoke_all();
    scene.wait_until("the refusal", || two.status()["refused"] == true);
    two.refuse(Some("its right was not proved")).expect("refused");
    two.refuse(None).expect("let in");
    assert!(is_refused(&two));
    unlock(&two).expect("in again");
    assert!(holds(&file(&two, "second.bin"), 2));
    scene.host.stop().expect("stopped");
}

#[test]
fn an_unlock_that_any_mount_overtakes_with_a_lock_serves_nothing_at_all() {
    let Some(scene) = scene("an_unlock_that_any_mount_overtakes_with_a_lock_serves_nothing_at_all") else { return };
    let slow = scene.seal_with_a_passphrase("acme/slow");
    let (quick, slow_alone) = (["model=acme/m", "model=acme/slow", slow.as_str()], ["model=acme/slow", slow.as_str()]);
    let one = scene.mount("mnt", "model.key", &quick).expect("mounted");
    let two = scene.mount("other", "other.key", &slow_alone).expect("mounted");
    one.access(AccessRequest::Lock { model: None }).expect("locked");
    let unlocking = {
        let one = one.clone();
        std::thread::spawn(move || one.access(AccessRequest::Unlock { model: None }))
    };

    // Stretching the passphrase takes far longer than a lock: some come while it goes on.
    while !unlocking.is_finished() {
        two.access(AccessRequest::Lock { model: Some("acme/slow".into()) }).expect("locked");
        std::thread::sleep(Duration::from_millis(5));
    }

    let refused = unlocking.join().expect("a thread").expect_err("locked again meanwhile");
    assert_eq!(refused.code(), Code::Locked, "{refused:?}");
    for model in one.status()["models"].as_array().expect("models") {
        assert_eq!(model["locked"], true, "all or none: {model}");
    }
    one.access(AccessRequest::Unlock { model: None }).expect("unlocked");
    assert!(holds(&file(&one, "first.bin"), 1));
    scene.host.stop().expect("stopped");
}

#[test]
fn what_only_fits_a_mount_of_its_own_process_is_refused_by_name() {
    let Some(scene) = scene("what_only_fits_a_mount_of_its_own_process_is_refused_by_name") else { return };
    let refused = scene.mount("mnt", "model.key", &["lock-when-idle=60s"]).err().expect("refused");
    assert_eq!(refused.code(), Code::Usage);
    assert!(refused.message().contains("lock-when-idle"), "{refused:?}");
    assert!(!is_mountpoint(&scene.root.join("mnt")));
    scene.host.stop().expect("stopped");
}

/// Drivers whose configuration says no `http` are to be looked at too, whatever their volumes come and go.
#[test]
fn a_host_answers_beside_the_sockets_of_its_mounts_and_goes_on_when_a_mount_ends() {
    let Some(scene) = scene("a_host_answers_beside_the_sockets_of_its_mounts_and_goes_on_when_a_mount_ends") else {
        return;
    };
    let name = format!("test-{}", std::process::id());
    let socket =
        control::socket_dir().expect("a place for sockets").join(&name).with_extension(control::HTTP_EXTENSION);
    scene.host.answer_as(&name);
    assert_eq!(scene.host.status()["http"], format!("unix:{}", socket.display()));
    let live = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(b"GET /live HTTP/1.1\r\nHost: modelfs\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    assert!(live().expect("answered").starts_with("HTTP/1.1 200"));
    let mounted = scene.mount("mnt", "model.key", &[]).expect("mounted");
    mounted.unmount(GRACE).expect("unmounted");
    assert!(live().expect("answered, though a mount has ended").starts_with("HTTP/1.1 200"));
    scene.host.stop().expect("stopped");
    assert!(!socket.exists(), "it left its socket");
}
