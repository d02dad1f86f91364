//! Hypothesis: a store that goes back, forks, jumps or stands still is refused by its name through the command line, and
//! each drill of docs/RECOVERY.md gets a reader and a publisher going again with the commands written there.

mod common;
#[path = "common/program.rs"]
mod program;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use modelfs::crypto::SigningKey;
use modelfs::format::{ModelId, Ref, RefSignature, Slots, names};
use modelfs::keys::{load_signing_key, unix_now};
use program::{Program, can_mount, run_ok};
use serde_json::Value;

const MODEL: &str = "acme/llama";
const DAY: i64 = 86_400;

/// A publisher's home with a store, and a reader's state beside it.
struct Site {
    program: Program,
    root: tempfile::TempDir,
}

impl Site {
    /// With so many versions sealed.
    fn with_versions(count: u32) -> Site {
        let root = tempfile::tempdir().expect("a temporary folder");
        let site = Site { program: Program::in_folder(root.path()), root };
        (0..count).for_each(|_| site.seal());
        site
    }

    fn seal(&self) {
        self.seal_with(&[]);
    }

    fn seal_with(&self, more: &[&str]) -> Value {
        json(&self.sealing(more))
    }

    fn sealing(&self, more: &[&str]) -> Output {
        let source = self.root.path().join("llama");
        fs::create_dir_all(&source).expect("mkdir");
        let stamp = format!("{}", walk(Path::new(self.program.store())).len());
        fs::write(source.join("config.json"), stamp).expect("written");
        let mut command = self.program.command(&["seal"]);
        command.arg(&source).args([self.program.store(), MODEL, "--key", &self.program.key(), "--json"]).args(more);
        command.output().expect("runs")
    }

    /// A command on this store, as its publisher: `words[0]` is the command, the store comes after it.
    fn publisher(&self, words: &[&str]) -> Output {
        let mut command = self.program.command(&[words[0], self.program.store()]);
        command.args(&words[1..]).arg("--json").output().expect("runs")
    }

    /// The same as a reader, who trusts the publisher's key and remembers in a folder of its own.
    fn reader(&self, words: &[&str]) -> Output {
        self.reader_trusting(&self.program.trusted_key(), words)
    }

    fn reader_trusting(&self, key: &Path, words: &[&str]) -> Output {
        let mut command = self.program.command(&[words[0], self.program.store()]);
        command.args(&words[1..]).arg("--json").arg("--trust").arg(key);
        command.env("MODELFS_STATE_DIR", self.reader_state()).output().expect("runs")
    }

    /// The block of docs/RECOVERY.md of that name, as an operator would paste it on the machine that remembers in `state`.
    fn paste(&self, block: &str, state: &Path, words: &[(&str, &str)]) -> Output {
        let program = Path::new(env!("CARGO_BIN_EXE_modelfs"));
        let mut shell = Command::new("bash");
        // The surroundings of the program's own commands.
        for (name, value) in self.program.command(&[]).get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        let path = std::env::var("PATH").expect("a PATH");
        shell.env("PATH", format!("{}:{path}", program.parent().expect("a folder").display()));
        shell.env("STORE", self.program.store()).env("MODEL", MODEL).env("KEY", self.program.key());
        shell.env("TRUST", self.program.trusted_key()).env("FLOOR", "").env("MNT", self.program.mountpoint());
        shell.env("MODELFS_STATE_DIR", state).envs(words.iter().copied());
        shell.args(["-euo", "pipefail", "-c", &page_block(block)]).current_dir(self.root.path());
        shell.stdin(Stdio::null()).output().expect("bash runs")
    }

    fn publisher_state(&self) -> PathBuf {
        self.root.path().join("home/state")
    }

    fn reader_state(&self) -> PathBuf {
        self.root.path().join("reader-state")
    }

    fn model_dir(&self) -> PathBuf {
        Path::new(self.program.store()).join(ModelId::of_name(MODEL).to_string())
    }

    fn signing(&self) -> SigningKey {
        load_signing_key(&self.root.path().join("home/.config/modelfs/signing.key")).expect("made by the first seal")
    }

    fn ref_path(&self, ref_seq: u64) -> PathBuf {
        Path::new(self.program.store()).join(names::reference(ModelId::of_name(MODEL), "latest", ref_seq))
    }

    fn newest_ref(&self) -> Ref {
        let mut refs: Vec<PathBuf> = walk(&self.model_dir().join("r/latest"));
        refs.retain(|path| !path.ends_with("head"));
        let newest = refs.into_iter().max().expect("a ref");
        Ref::parse(&fs::read(newest).expect("read")).expect("a ref").0
    }

    /// The ref after the newest one, with `change` made to it, signed with the publisher's key: what its thief could write.
    fn forge(&self, change: impl FnOnce(&mut Ref)) -> Ref {
        let before = self.newest_ref();
        let mut reference = Ref { ref_seq: before.ref_seq + 1, previous: before.head_digest(), ..before };
        change(&mut reference);
        let key = self.signing();
        let signature = RefSignature { key_id: key.public().key_id(), signature: key.sign(&reference.message()) };
        let bytes = reference.encode(&[signature]);
        fs::write(self.ref_path(reference.ref_seq), &bytes).expect("written");
        fs::write(self.model_dir().join("r/latest/head"), bytes).expect("written");
        reference
    }

    fn backup(&self) -> PathBuf {
        self.copy("backup")
    }

    fn copy(&self, name: &str) -> PathBuf {
        let to = self.root.path().join(name);
        run_ok(std::process::Command::new("cp").arg("-a").arg(self.program.store()).arg(&to));
        to
    }

    fn restore(&self, backup: &Path) {
        fs::remove_dir_all(self.program.store()).expect("removed");
        run_ok(std::process::Command::new("cp").arg("-a").arg(backup).arg(self.program.store()));
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.is_dir() { found.extend(walk(&path)) } else { found.push(path) }
    }
    found
}

/// A named block of docs/RECOVERY.md. tests/run.sh asks at the end whether each of them was run.
fn page_block(name: &str) -> String {
    let fence = format!("```sh {name}\n");
    let page = include_str!("../docs/RECOVERY.md");
    let (_, rest) = page.split_once(&fence).unwrap_or_else(|| panic!("docs/RECOVERY.md has no block {name}"));
    let (block, _) = rest.split_once("\n```").expect("a fence ends");
    if let Some(list) = std::env::var_os("MODELFS_TEST_PAGE_RUN") {
        let mut list = fs::OpenOptions::new().append(true).create(true).open(list).expect("the list of blocks");
        // In one piece: tests beside this one write there too.
        list.write_all(format!("RECOVERY.md sh {name}\n").as_bytes()).expect("written");
    }
    block.to_owned()
}

/// What a pasted block said.
#[track_caller]
fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", told(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A pasted block that ends with this code of ours.
#[track_caller]
fn ends_with(output: &Output, code: &str) {
    assert!(!output.status.success() && told(output).contains(&format!("[{code}]")), "{}", told(output));
}

#[track_caller]
fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", told(output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", told(output)))
}

fn told(output: &Output) -> String {
    format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Refused with this code, and the exit code of its class.
#[track_caller]
fn refused(output: &Output, code: &str, exit: i32) {
    assert_eq!(output.status.code(), Some(exit), "{}", told(output));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", told(output)));
    assert_eq!(value["error"]["code"], code, "{}", told(output));
}

#[track_caller]
fn version(output: &Output) -> u64 {
    json(output)["version"].as_u64().expect("a number")
}

// The states of docs/FORMAT.md b.2, by name.

/// THREAT_MODEL (f) row 24.
#[test]
fn an_older_bucket_put_back_is_a_rollback_to_readers_and_publishers_and_a_mount_refuses_it() {
    let site = Site::with_versions(1);
    let backup = site.backup();
    site.seal();
    assert_eq!(version(&site.reader(&["inspect", MODEL])), 2);
    site.restore(&backup);
    refused(&site.reader(&["inspect", MODEL]), "ROLLBACK", 20);
    refused(&site.reader(&["inspect", "acme/llama@1"]), "ROLLBACK", 20);
    refused(&site.reader(&["cat", MODEL, "config.json", "--key", &site.program.key()]), "ROLLBACK", 20);
    refused(&site.sealing(&[]), "ROLLBACK", 20);
    refused(&site.publisher(&["tag", "acme/llama@1", "latest"]), "ROLLBACK", 20);
    refused(
        &site.publisher(&[
            "prune",
            MODEL,
            "--key",
            &site.program.key(),
            "--trust",
            site.program.trusted_key().to_str().unwrap(),
        ]),
        "ROLLBACK",
        20,
    );
    if can_mount() {
        let mut mount = site.program.command(&["mount", site.program.store()]);
        mount.arg(site.program.mountpoint()).args([
            "--key",
            &site.program.key(),
            "--model",
            MODEL,
            "--json",
            "--trust",
        ]);
        let output = mount.arg(site.program.trusted_key()).env("MODELFS_STATE_DIR", site.reader_state()).output();
        refused(&output.expect("runs"), "ROLLBACK", 20);
    }
}

#[test]
fn another_ref_of_a_number_that_was_seen_is_a_fork() {
    let site = Site::with_versions(2);
    site.reader(&["inspect", MODEL]);
    let seen = site.newest_ref();
    fs::remove_file(site.ref_path(2)).expect("removed");
    let other = site.forge(|reference| reference.issued_at -= 1);
    assert_eq!((other.ref_seq, seen.ref_seq), (2, 2));
    refused(&site.reader(&["inspect", MODEL]), "FORK", 20);
    refused(&site.sealing(&[]), "FORK", 20);
}

#[test]
fn a_next_ref_that_does_not_follow_the_one_seen_is_a_fork() {
    let site = Site::with_versions(1);
    site.reader(&["inspect", MODEL]);
    site.forge(|reference| reference.previous = [7; 32]);
    refused(&site.reader(&["inspect", MODEL]), "FORK", 20);
}

/// THREAT_MODEL (f) row 26.
#[test]
fn a_ref_number_far_ahead_is_fast_forward() {
    let site = Site::with_versions(1);
    site.reader(&["inspect", MODEL]);
    site.forge(|reference| reference.ref_seq = 1_000_003);
    refused(&site.reader(&["inspect", MODEL]), "FAST_FORWARD", 20);
}

/// THREAT_MODEL (f) row 25.
#[test]
fn an_expired_ref_and_one_from_the_future_are_refused_and_a_refresh_ends_the_first() {
    let site = Site::with_versions(1);
    site.forge(|reference| (reference.issued_at, reference.expires_at) = (unix_now() - 60, unix_now() - 1));
    refused(&site.reader(&["inspect", MODEL]), "REF_EXPIRED", 20);
    let refreshed = json(&site.publisher(&["tag", MODEL, "latest", "--refresh", "--expires", "90d"]));
    assert_eq!((refreshed["ref_seq"].as_u64(), refreshed["version"].as_u64()), (Some(3), Some(1)));
    assert_eq!(version(&site.reader(&["inspect", MODEL])), 1);
    site.forge(|reference| reference.issued_at = unix_now() + 3600);
    refused(&site.reader(&["inspect", MODEL]), "REF_FUTURE", 20);
}

/// The clock cannot be set here; what was remembered can be as if it had been.
#[test]
fn a_clock_before_what_was_seen_is_refused() {
    let site = Site::with_versions(1);
    site.reader(&["inspect", MODEL]);
    let [file] = &walk(&site.reader_state().join("floor"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect::<Vec<_>>()[..]
    else {
        panic!("one floor")
    };
    let mut floor: Value = serde_json::from_slice(&fs::read(file).expect("read")).expect("JSON");
    floor["max_issued_at"] = (unix_now() + DAY).into();
    fs::write(file, floor.to_string()).expect("written");
    refused(&site.reader(&["inspect", MODEL]), "CLOCK", 20);
}

/// THREAT_MODEL (f) row 35.
#[test]
fn key_slots_of_an_older_generation_than_seen_are_refused() {
    let site = Site::with_versions(1);
    let [first] = &walk(&site.model_dir().join("k"))[..] else { panic!("one generation") };
    let rotated = Slots { generation: 2, ..Slots::parse(&fs::read(first).expect("read")).expect("slots") };
    let second = first.with_file_name(format!("{:010}", 2));
    fs::write(&second, rotated.encode().expect("fits")).expect("written");
    assert_eq!(json(&site.reader(&["inspect", MODEL]))["slots_generation"], 2);
    fs::remove_file(second).expect("removed");
    refused(&site.reader(&["inspect", MODEL]), "SLOTS_ROLLBACK", 20);
}

/// THREAT_MODEL (f) row 27.
#[test]
fn a_withdrawn_version_is_below_the_floor_for_readers_for_a_rollback_and_for_a_stolen_release_key() {
    let site = Site::with_versions(3);
    let told = json(&site.publisher(&["tag", "acme/llama@3", "latest", "--min-version", "2"]));
    assert_eq!((told["written"].as_bool(), told["min_version"].as_u64()), (Some(true), Some(2)));
    assert_eq!(version(&site.reader(&["inspect", MODEL])), 3);
    refused(&site.reader(&["inspect", "acme/llama@1"]), "BELOW_FLOOR", 20);
    refused(&site.publisher(&["rollback", MODEL, "--to", "1"]), "BELOW_FLOOR", 20);
    refused(&site.publisher(&["tag", "acme/llama@3", "latest", "--min-version", "1"]), "USAGE", 2);
    let back = json(&site.publisher(&["rollback", MODEL, "--to", "2"]));
    assert_eq!((back["version"].as_u64(), back["before"]["version"].as_u64()), (Some(2), Some(3)));
    assert_eq!(version(&site.reader(&["inspect", MODEL])), 2);
    assert_eq!(json(&site.publisher(&["rollback", MODEL, "--to", "2"]))["written"], false);

    let first = Ref::parse(&fs::read(site.ref_path(1)).expect("read")).expect("a ref").0;
    site.forge(|reference| {
        *reference = Ref {
            ref_seq: reference.ref_seq,
            previous: reference.previous,
            issued_at: reference.issued_at,
            min_version_seq: 0,
            ..first
        }
    });
    refused(&site.reader(&["inspect", MODEL]), "BELOW_FLOOR", 20);
}

#[test]
fn nothing_remembered_is_refused_only_where_a_floor_is_required_and_a_number_from_elsewhere_is_one() {
    let site = Site::with_versions(2);
    refused(&site.reader(&["inspect", MODEL, "--require-floor"]), "NO_FLOOR", 2);
    refused(&site.reader(&["inspect", MODEL, "--require-floor", "--min-ref-seq", "3"]), "ROLLBACK", 20);
    assert_eq!(version(&site.reader(&["inspect", MODEL, "--require-floor", "--min-ref-seq", "2"])), 2);
    assert_eq!(version(&site.reader(&["inspect", MODEL, "--require-floor"])), 2);
}

// Choosing by metric.

#[test]
fn the_best_version_is_mounted_listed_read_and_tagged_by_its_metric() {
    let site = Site::with_versions(0);
    for loss in ["2.5", "1.25", "3"] {
        site.seal_with(&["--metric", &format!("eval_loss={loss}")]);
    }
    let key = site.program.key();
    let best = format!("{MODEL}@best:eval_loss:min");
    assert_eq!(version(&site.reader(&["inspect", &best, "--key", &key])), 2);
    assert_eq!(version(&site.reader(&["inspect", &format!("{MODEL}@best:eval_loss:max"), "--key", &key])), 3);
    let inspected = json(&site.reader(&["inspect", &best, "--key", &key]));
    assert_eq!(inspected["annotations"]["metrics"]["eval_loss"], 1.25);
    refused(&site.reader(&["inspect", &format!("{MODEL}@best:eval_loss"), "--key", &key]), "USAGE", 2);
    refused(&site.reader(&["inspect", &format!("{MODEL}@best:bleu:max"), "--key", &key]), "NOT_FOUND", 3);
    refused(&site.reader(&["inspect", &best]), "USAGE", 2);
    json(&site.reader(&["verify", &best, "--key", &key]));
    let told = json(&site.publisher(&["tag", &best, "prod", "--key", &key]));
    assert_eq!((told["version"].as_u64(), told["tag"].as_str()), (Some(2), Some("prod")));
    if can_mount() {
        let mount = site.program.mount(&["--model", &best]);
        let read = fs::read(site.program.mountpoint().join(MODEL).join("config.json")).expect("read");
        let mut cat =
            site.program.command(&["cat", site.program.store(), "acme/llama@2", "config.json", "--key", &key]);
        assert_eq!(read, run_ok(cat.arg("--trust").arg(site.program.trusted_key())).stdout);
        mount.unmount();
    }
}

// Pruning, through the command line.

#[test]
fn prune_looks_then_deletes_what_two_looks_agree_on_and_says_what() {
    let site = Site::with_versions(3);
    let (key, trust) = (site.program.key(), site.program.trusted_key());
    let prune = |more: &[&str]| {
        let words = ["prune", "--keep", "1", "--grace", "0s", "--second-look", "0s", "--key", &key, "--trust"];
        site.publisher(&[&words[..], &[trust.to_str().expect("UTF-8")], more].concat())
    };
    let files = || walk(Path::new(site.program.store())).len();
    let before = files();
    let dry = json(&prune(&["--dry-run"]));
    assert_eq!(
        (dry["models"][0]["waiting"]["ref"]["objects"].as_u64(), dry["swept"].as_bool()),
        (Some(2), Some(false))
    );
    assert_eq!(json(&prune(&["--yes"]))["models"][0]["due"], serde_json::json!({}), "the dry run was no look");
    assert_eq!(files(), before);
    let looked = json(&prune(&[]));
    assert_eq!(looked["models"][0]["due"]["ref"]["objects"], 2);
    assert_eq!(files(), before, "without --yes nothing goes");
    json(&prune(&["--yes"]));
    let swept = json(&prune(&["--yes"]));
    assert_eq!(swept["models"][0]["due"]["manifest"]["objects"], 2, "{swept}");
    assert_eq!(version(&site.reader(&["inspect", MODEL])), 3);
    refused(&site.reader(&["inspect", "acme/llama@1"]), "NOT_FOUND", 3);
    json(&site.reader(&["verify", MODEL, "--key", &key]));
    refused(&site.publisher(&["prune", MODEL]), "USAGE", 2);
    refused(&prune(&["acme/none"]), "NOT_FOUND", 3);
}

#[test]
fn prune_keeps_what_a_digest_names_and_stops_at_one_that_is_not_there() {
    let site = Site::with_versions(0);
    let sealed = site.seal_with(&[]);
    let digest = sealed["manifest"].as_str().expect("text").to_owned();
    (0..2).for_each(|_| site.seal());
    let (key, trust) = (site.program.key(), site.program.trusted_key());
    let prune = |more: &[&str]| {
        let words = ["prune", "--keep", "1", "--grace", "0s", "--second-look", "0s", "--yes", "--key", &key, "--trust"];
        site.publisher(&[&words[..], &[trust.to_str().expect("UTF-8")], more].concat())
    };
    for _ in 0..4 {
        assert_eq!(json(&prune(&["--keep-manifest", &digest]))["models"][0]["versions"], 2);
    }
    refused(&site.reader(&["inspect", "acme/llama@1"]), "NOT_FOUND", 3);
    json(&site.reader(&["verify", MODEL, "--manifest", &digest, "--key", &key]));

    let nowhere = format!("sha256:{}", "5a".repeat(32));
    let files = || walk(Path::new(site.program.store())).len();
    let before = files();
    refused(&prune(&["--keep-manifest", &nowhere]), "NOT_FOUND", 3);
    let local = prune(&["--catalog", "vault-kv://secret/models"]);
    refused(&local, "USAGE", 2);
    assert!(String::from_utf8_lossy(&local.stderr).contains("--keep-manifest"), "{local:?}");
    assert_eq!(files(), before);
}

// The drills of docs/RECOVERY.md.

/// Drill 1.
#[test]
fn after_an_older_backup_of_the_bucket_was_restored_the_floor_is_reset_by_hand_and_all_goes_on() {
    let site = Site::with_versions(1);
    let backup = site.backup();
    site.seal();
    site.reader(&["inspect", MODEL]);
    site.restore(&backup);
    refused(&site.reader(&["inspect", MODEL]), "ROLLBACK", 20);
    refused(&site.sealing(&[]), "ROLLBACK", 20);

    let remembered = json(&site.reader(&["floor", MODEL]));
    assert_eq!((remembered["floors"][0]["ref_seq"].as_u64(), remembered["reset"].as_bool()), (Some(2), Some(false)));
    let listed = json(&site.publisher(&["ls", MODEL]));
    let digest = listed["versions"][0]["manifest"].as_str().expect("a digest").to_owned();
    let (publisher, reader) = (site.publisher_state(), site.reader_state());
    let looked = done(&site.paste("look", &reader, &[("DIGEST", &format!("sha256:{digest}"))]));
    assert!(looked.contains(&digest), "{looked}");
    refused(&site.reader(&["floor", MODEL, "--reset"]), "USAGE", 2);
    refused(&site.reader(&["inspect", MODEL]), "ROLLBACK", 20);
    done(&site.paste("forget", &publisher, &[]));
    done(&site.paste("forget", &reader, &[]));
    done(&site.paste("see", &reader, &[]));
    assert_eq!(version(&site.reader(&["inspect", MODEL])), 1);
    done(&site.paste("publish", &publisher, &[]));
    assert_eq!(version(&site.reader(&["inspect", MODEL])), 2);
    assert_eq!(json(&site.reader(&["floor", MODEL]))["floors"][0]["ref_seq"], 2);
}

/// Drill 2.
#[test]
fn after_local_state_was_lost_a_number_or_a_digest_from_elsewhere_is_the_floor() {
    let site = Site::with_versions(1);
    let backup = site.backup();
    let sealed = site.seal_with(&[]);
    let (digest, ref_seq) = (sealed["manifest"].as_str().expect("text"), sealed["refs"][0][1].to_string());
    site.reader(&["inspect", MODEL]);
    fs::remove_dir_all(site.reader_state()).expect("removed");
    let newest = site.copy("newest");
    site.restore(&backup);
    // Nothing here knows better, and says so; whoever asks for a floor is refused.
    let naive = site.reader_trusting(&site.program.trusted_key(), &["inspect", MODEL, "--require-floor"]);
    refused(&naive, "NO_FLOOR", 2);
    refused(&site.reader(&["inspect", MODEL, "--min-ref-seq", &ref_seq]), "ROLLBACK", 20);
    refused(&site.reader(&["inspect", MODEL, "--manifest", digest]), "NOT_FOUND", 3);
    let words = [("REF", ref_seq.as_str())];
    let state = site.reader_state();
    for block in ["inspect-with-floor", "mount-with-floor"] {
        ends_with(&site.paste(block, &state, &words), "ROLLBACK");
    }

    site.restore(&newest);
    done(&site.paste("inspect-with-floor", &state, &words));
    assert_eq!(version(&site.reader(&["inspect", MODEL, "--require-floor"])), 2, "it is recorded");
    assert_eq!(version(&site.reader(&["inspect", MODEL, "--manifest", digest])), 2);
    if can_mount() {
        fs::remove_dir_all(&state).expect("removed");
        done(&site.paste("mount-with-floor", &state, &words));
        assert!(site.program.mountpoint().join(MODEL).join("config.json").is_file());
        run_ok(site.program.command(&["umount"]).arg(site.program.mountpoint()));
    }
}

/// Drill 3.
#[test]
fn after_the_signing_key_was_lost_a_new_one_continues_the_channel_for_those_who_trust_it() {
    let site = Site::with_versions(2);
    assert_eq!(version(&site.reader(&["inspect", MODEL])), 2);
    let home = site.root.path().join("home");
    let old_public = home.join("old.pub");
    fs::rename(site.program.trusted_key(), &old_public).expect("renamed");
    fs::remove_file(home.join(".config/modelfs/signing.key")).expect("removed");
    let (new, new_public) = (home.join("new.key"), home.join("new.key.pub"));
    let trust_file = home.join("trust");
    let old_hex = fs::read_to_string(&old_public).expect("the public key");
    fs::write(&trust_file, format!("acme/*  {}\n", old_hex.trim())).expect("written");
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let (new, old, file) = (text(&new), text(&old_public), text(&trust_file));
    let words = [("NEW_KEY", new.as_str()), ("TRUST", old.as_str()), ("TRUST_FILE", file.as_str())];
    let (publisher, server) = (site.publisher_state(), site.reader_state());
    done(&site.paste("new-key", &publisher, &words));
    done(&site.paste("trust-both", &server, &words));
    let new = new.as_str();

    // Without the old public key nobody can tell whose channel it is.
    refused(&site.sealing(&["--sign", new]), "REF_KEY", 20);
    done(&site.paste("continue", &publisher, &words));
    // A server goes by its trust file.
    let by_file = |model: &str| {
        let mut command =
            site.program.command(&["inspect", site.program.store(), model, "--json", "--trust-file", &file]);
        command.env("MODELFS_STATE_DIR", &server).output().expect("runs")
    };
    assert_eq!(version(&by_file(MODEL)), 3);
    assert_eq!(version(&by_file("acme/llama@1")), 1);
    done(&site.paste("move-tag", &publisher, &words));
    assert_eq!(version(&by_file("acme/llama@prod")), 3);

    // The floor goes on: readers who trust the new key follow, those who do not refuse.
    assert_eq!(version(&site.reader_trusting(&new_public, &["inspect", MODEL])), 3);
    refused(&site.reader_trusting(&old_public, &["inspect", MODEL]), "REF_KEY", 20);
    refused(&site.reader_trusting(&new_public, &["inspect", "acme/llama@1"]), "MAN_SIG", 20);
    let both = format!("{MODEL}@1");
    let with_both =
        site.reader_trusting(&new_public, &["inspect", &both, "--trust", old_public.to_str().expect("UTF-8")]);
    assert_eq!(version(&with_both), 1);
    // The next versions need the new key alone.
    let source = site.root.path().join("llama");
    let source = source.to_str().expect("UTF-8");
    json(
        &site
            .program
            .command(&[
                "seal",
                source,
                site.program.store(),
                MODEL,
                "--key",
                &site.program.key(),
                "--sign",
                new,
                "--json",
            ])
            .output()
            .expect("runs"),
    );
    assert_eq!(version(&site.reader_trusting(&new_public, &["inspect", MODEL])), 4);
}

#[test]
fn tags_move_by_the_command_line_and_a_pin_a_bad_tag_and_a_missing_version_are_named() {
    let site = Site::with_versions(2);
    let first = json(&site.publisher(&["tag", "acme/llama@1", "prod", "--expires", "90d"]));
    assert_eq!(
        (first["ref_seq"].as_u64(), first["version"].as_u64(), first["before"].is_null()),
        (Some(1), Some(1), true)
    );
    assert!(first["expires_at"].as_i64().is_some_and(|at| at > unix_now() + 89 * DAY));
    assert_eq!(version(&site.reader(&["inspect", "acme/llama@prod"])), 1);
    assert_eq!(json(&site.publisher(&["tag", "acme/llama@1", "prod"]))["written"], false);
    let promoted = json(&site.publisher(&["tag", "acme/llama@latest", "prod"]));
    assert_eq!(promoted["version"], 2);
    assert!(promoted["expires_at"].as_i64().is_some_and(|at| at > unix_now() + 89 * DAY), "as long as before");
    refused(&site.publisher(&["tag", "acme/llama@9", "prod"]), "NOT_FOUND", 3);
    refused(&site.publisher(&["tag", "acme/llama@1", "7"]), "USAGE", 2);
    refused(&site.publisher(&["tag", "acme/llama@1", "prod", "--refresh"]), "USAGE", 2);
    let digest = format!("sha256:{}", hex::encode([1; 32]));
    refused(&site.publisher(&["tag", "acme/llama@1", "prod", "--manifest", &digest]), "USAGE", 2);
    // A key that readers do not trust cannot move what they read.
    let other = site.root.path().join("home/other.key");
    run_ok(site.program.command(&["keygen", "--signing"]).arg(&other));
    let other = other.to_str().expect("UTF-8");
    let stranger = site.publisher(&["tag", "acme/llama@1", "prod", "--sign", other]);
    assert!(!stranger.status.success(), "{}", told(&stranger));
    refused(&site.publisher(&["rollback", "acme/llama@1", "--to", "1"]), "USAGE", 2);
}

#[test]
fn a_variant_is_sealed_listed_and_mounted_beside_the_model_it_is_of() {
    let site = Site::with_versions(1);
    let sealed = site.seal_with(&["--variant", "q4_k_m", "--metric", "size=4"]);
    assert_eq!((sealed["model"].as_str(), sealed["version"].as_u64()), (Some("acme/llama+q4_k_m"), Some(1)));
    let listed = json(&site.publisher(&["ls"]));
    let names: Vec<_> = listed["models"].as_array().expect("models").iter().map(|model| &model["name"]).collect();
    assert_eq!(names, ["acme/llama", "acme/llama+q4_k_m"]);
    assert_eq!(listed["models"][1]["variant_of"], "acme/llama");
    let inspected = json(&site.reader(&["inspect", "acme/llama+q4_k_m", "--key", &site.program.key()]));
    assert_eq!(inspected["annotations"]["variant_of"], "acme/llama");
    assert_eq!(inspected["annotations"]["metrics"]["size"], 4.0);
    if can_mount() {
        let mount = site.program.mount(&[]);
        for model in ["acme/llama", "acme/llama+q4_k_m"] {
            assert!(site.program.mountpoint().join(model).join("config.json").is_file(), "{model}");
        }
        mount.unmount();
    }
}

/// A Vault of its own, stopped when dropped.
struct Vault {
    child: std::process::Child,
    address: String,
    token: String,
}

const VAULT_TOKEN: &str = "root-of-the-recovery-drill";

impl Vault {
    /// With a KV v2 engine at `secret`, and forgotten when it ends. `None` where the part is not installed.
    fn start() -> Option<Vault> {
        Self::on_a_free_port(|program, port| {
            let listen = format!("-dev-listen-address=127.0.0.1:{port}");
            let mut command = Command::new(program);
            command.args(["server", "-dev", "-dev-no-store-token", &listen, "-dev-root-token-id", VAULT_TOKEN]);
            let mut vault = Self::listening(command, port, VAULT_TOKEN.to_owned())?;
            // It listens before its KV engine takes anything.
            vault.until_done(&["kv", "put", "-mount=secret", "ready", "is=it"]).then_some(vault)
        })
    }

    /// One that keeps in `folder` what it has, as a server in use does; what opens it lies beside the folder. It goes on with
    /// what is there. `None` where the part is not installed.
    fn stored(folder: &Path) -> Option<Vault> {
        Self::on_a_free_port(|program, port| {
            let config = folder.with_extension("hcl");
            let text = format!(
                "storage \"file\" {{ path = \"{}\" }}\nlistener \"tcp\" {{ address = \"127.0.0.1:{port}\" tls_disable = true \
                 }}\ndisable_mlock = true\n",
                folder.display()
            );
            fs::write(&config, text).expect("written");
            let mut command = Command::new(program);
            command.arg("server").arg("-config").arg(config);
            let mut vault = Self::listening(command, port, String::new())?;
            let opened_by = folder.with_extension("json");
            if !opened_by.exists() {
                let init = ["operator", "init", "-key-shares=1", "-key-threshold=1", "-format=json"];
                // It listens before it answers.
                if !vault.until_done(&["operator", "init", "-status", "-format=json"]) {
                    return None;
                }
                fs::write(&opened_by, vault.admin(&init)).expect("written");
            }
            let keys: Value = serde_json::from_slice(&fs::read(opened_by).expect("read")).expect("JSON");
            vault.token = keys["root_token"].as_str().expect("a token").to_owned();
            let unseal = keys["unseal_keys_b64"][0].as_str().expect("a key");
            (vault.until_done(&["operator", "unseal", unseal]) && vault.until_done(&["token", "lookup"]))
                .then_some(vault)
        })
    }

    fn on_a_free_port(start: impl Fn(&Path, u16) -> Option<Vault>) -> Option<Vault> {
        let program = common::part("vault-1.13.0/bin/vault")?;
        // Somebody else may take the free port between looking and binding: then the server dies and we look again.
        for _ in 0..10 {
            if let Some(vault) = start(&program, common::free_port()) {
                return Some(vault);
            }
        }
        panic!("vault did not start on any of ten free ports");
    }

    /// `None` if it ended.
    fn listening(mut command: Command, port: u16, token: String) -> Option<Vault> {
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("vault starts");
        let mut vault = Vault { child, address: format!("http://127.0.0.1:{port}"), token };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            if vault.child.try_wait().expect("our own child").is_some() {
                return None;
            }
            assert!(std::time::Instant::now() < deadline, "vault does not listen");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Some(vault)
    }

    /// Until the administrator's words are taken. False if it ended.
    fn until_done(&mut self, words: &[&str]) -> bool {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        loop {
            let output = self.command(words).output().expect("runs");
            // `operator init -status` tells so that it was not made yet.
            if output.status.success() || output.status.code() == Some(2) && words.contains(&"-status") {
                return true;
            }
            if self.child.try_wait().expect("our own child").is_some() {
                return false;
            }
            assert!(std::time::Instant::now() < deadline, "{words:?}: {}", told(&output));
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// The administrator's words.
    fn admin(&self, words: &[&str]) -> String {
        String::from_utf8(run_ok(&mut self.command(words)).stdout).expect("text")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(common::part("vault-1.13.0/bin/vault").expect("it was started"));
        command.args(words).env("VAULT_ADDR", &self.address).env("VAULT_TOKEN", &self.token);
        command
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Drill 1 with a real Vault and the rights of docs/KEYS.md: a server reads the floor there, the publisher writes it.
#[test]
fn a_floor_in_vault_is_reset_by_who_may_write_it_before_the_servers_forget_theirs() {
    let Some(vault) = Vault::start() else { return };
    let site = Site::with_versions(0);
    let policy = site.root.path().join("policy.hcl");
    fs::write(&policy, "path \"secret/data/floor/*\" { capabilities = [\"read\"] }\n").expect("written");
    vault.admin(&["policy", "write", "server", policy.to_str().expect("UTF-8")]);
    let token = vault.admin(&["token", "create", "-policy=server", "-field=token"]);
    let floor = ["--floor", "vault-kv:secret/floor"];
    let (publisher, server) = (site.publisher_state(), site.reader_state());
    let paste = |block: &str, state: &Path| {
        let token = if state == publisher { VAULT_TOKEN } else { token.trim() };
        let words =
            [("FLOOR", "--floor vault-kv:secret/floor"), ("VAULT_ADDR", &vault.address), ("VAULT_TOKEN", token)];
        site.paste(block, state, &words)
    };
    let seen = || {
        let mut command = site.program.command(&["inspect", site.program.store(), MODEL, "--json", "--trust"]);
        command.arg(site.program.trusted_key()).args(floor).env("VAULT_ADDR", &vault.address);
        command.env("VAULT_TOKEN", token.trim()).env("MODELFS_STATE_DIR", &server).output().expect("runs")
    };
    fs::create_dir_all(site.root.path().join("llama")).expect("mkdir");
    fs::write(site.root.path().join("llama/config.json"), "1").expect("written");
    done(&paste("publish", &publisher));
    let backup = site.backup();
    fs::write(site.root.path().join("llama/config.json"), "2").expect("written");
    done(&paste("publish", &publisher));
    assert_eq!(version(&seen()), 2);
    site.restore(&backup);

    // Forgotten on a machine alone, the floor in Vault still stands, and who may not write it is told.
    ends_with(&paste("forget", &server), "VAULT_DENIED");
    refused(&seen(), "ROLLBACK", 20);
    done(&paste("forget", &publisher));
    done(&paste("forget", &server));
    done(&paste("see", &server));
    assert_eq!(version(&seen()), 1);
    fs::write(site.root.path().join("llama/config.json"), "other 2").expect("written");
    done(&paste("publish", &publisher));
    assert_eq!(version(&seen()), 2);
    // A machine without memory is protected by what was pinned anew.
    site.restore(&backup);
    fs::remove_dir_all(&server).expect("removed");
    refused(&seen(), "ROLLBACK", 20);
}

/// Drill 4, with a real Vault: of a restored snapshot the entry is an older one, or it is not there.
#[test]
fn a_floor_in_vault_refuses_a_rollback_to_machines_without_memory_and_is_raised_again_after_a_restore() {
    let Some(mut vault) = Vault::start() else { return };
    let site = Site::with_versions(0);
    let floor = ["--floor", "vault-kv:secret/modelfs/floor"];
    let asking = |mut command: std::process::Command, address: &str, state: &str| {
        command.env("VAULT_ADDR", address).env("VAULT_TOKEN", VAULT_TOKEN);
        command.env("MODELFS_STATE_DIR", site.root.path().join(state)).output().expect("runs")
    };
    let source = site.root.path().join("llama");
    fs::create_dir_all(&source).expect("mkdir");
    let seal = |address: &str| {
        fs::write(source.join("config.json"), walk(Path::new(site.program.store())).len().to_string())
            .expect("written");
        let mut command = site.program.command(&["seal"]);
        command.arg(&source).args([site.program.store(), MODEL, "--key", &site.program.key(), "--json"]).args(floor);
        asking(command, address, "publisher")
    };
    let read = |words: &[&str], address: &str, state: &str| {
        let mut command = site.program.command(&[words[0], site.program.store(), MODEL]);
        command.args(&words[1..]).args(floor).arg("--json").arg("--trust").arg(site.program.trusted_key());
        asking(command, address, state)
    };
    let address = vault.address.clone();
    json(&seal(&address));
    let backup = site.backup();
    json(&seal(&address));
    // A pod without memory has a floor, and refuses what is older.
    assert_eq!(version(&read(&["inspect", "--require-floor"], &address, "pod-1")), 2);
    let newest = site.root.path().join("newest");
    run_ok(std::process::Command::new("cp").arg("-a").arg(site.program.store()).arg(&newest));
    site.restore(&backup);
    refused(&read(&["inspect"], &address, "pod-2"), "ROLLBACK", 20);

    // The entry goes back: a machine without memory goes by it, who remembers refuses still, and raises it.
    let entry = vault.admin(&["kv", "list", "-format=json", "secret/modelfs/floor"]);
    let entry: Vec<String> = serde_json::from_str(&entry).expect("names");
    let path = format!("modelfs/floor/{}", entry[0]);
    vault.admin(&["kv", "rollback", "-mount=secret", "-version=1", &path]);
    assert_eq!(version(&read(&["inspect", "--require-floor"], &address, "pod-7")), 1);
    refused(&read(&["inspect"], &address, "pod-1"), "ROLLBACK", 20);
    let words =
        [("FLOOR", "--floor vault-kv:secret/modelfs/floor"), ("VAULT_ADDR", &address), ("VAULT_TOKEN", VAULT_TOKEN)];
    done(&site.paste("raise", &site.root.path().join("publisher"), &words));
    refused(&read(&["inspect", "--require-floor"], &address, "pod-8"), "ROLLBACK", 20);

    // Vault goes back to before: a new one, empty.
    vault.stop();
    let away = read(&["inspect", "--require-floor", "--vault-timeout", "2s"], &address, "pod-1");
    assert!(matches!(away.status.code(), Some(22)), "{}", told(&away));
    let vault = Vault::start().expect("it did before");
    refused(&read(&["inspect", "--require-floor"], &vault.address, "pod-3"), "NO_FLOOR", 2);
    refused(&read(&["inspect"], &vault.address, "pod-1"), "ROLLBACK", 20);
    json(&read(&["floor", "--raise"], &vault.address, "publisher"));
    refused(&read(&["inspect", "--require-floor"], &vault.address, "pod-4"), "ROLLBACK", 20);
    site.restore(&newest);
    assert_eq!(version(&read(&["inspect", "--require-floor"], &vault.address, "pod-5")), 2);
    let shown = json(&read(&["floor"], &vault.address, "pod-6"));
    assert_eq!((shown["floors"][0]["at"].as_str(), shown["floors"][0]["ref_seq"].as_u64()), (Some("pinned"), Some(2)));
}

/// Drill 4, the keys: a Vault that goes back to before its transit key was rotated, and after it rotates anew.
#[test]
fn slots_under_a_transit_version_that_a_restored_vault_lacks_are_refused_by_name_and_healed_by_the_break_glass_slot() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kept = folder.path().join("vault");
    let copy = |from: &Path, to: &Path| run_ok(Command::new("cp").arg("-a").arg(from).arg(to));
    fs::create_dir(&kept).expect("mkdir");
    let Some(mut vault) = Vault::stored(&kept) else { return };
    vault.admin(&["secrets", "enable", "transit"]);
    vault.admin(&["write", "-f", "transit/keys/models", "derived=true"]);
    let site = Site::with_versions(0);
    let (source, phrase) = (site.root.path().join("llama"), site.root.path().join("phrase"));
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("config.json"), "1").expect("written");
    fs::write(&phrase, "an envelope in a safe, 5e2a9c\n").expect("written");
    run_ok(Command::new("chmod").arg("600").arg(&phrase));
    let (transit, phrase) = ("vault-transit:transit/models", format!("passphrase-file:{}", phrase.display()));
    let asking = |vault: &Vault, words: &[&str]| {
        let mut command = site.program.command(words);
        command.env("VAULT_ADDR", &vault.address).env("VAULT_TOKEN", &vault.token).output().expect("runs")
    };
    let (store, trust) = (site.program.store().to_owned(), site.program.trusted_key());
    let trust = trust.to_str().expect("UTF-8");
    let sealed = ["seal", source.to_str().expect("UTF-8"), &store, MODEL, "--key", transit, "--key", &phrase, "--json"];
    json(&asking(&vault, &sealed));
    let cat = |vault: &Vault, key: &str| {
        asking(vault, &["cat", &store, MODEL, "config.json", "--key", key, "--trust", trust])
    };
    let rewrap = |vault: &Vault| {
        asking(vault, &["key", "rotate", &store, MODEL, "--rewrap", "--key", transit, "--trust", trust, "--json"])
    };
    let slots = |vault: &Vault| {
        let words = ["key", "list", &store, MODEL, "--key", transit, "--key", &phrase, "--trust", trust, "--json"];
        json(&asking(vault, &words))["slots"].as_array().expect("slots").clone()
    };

    // The snapshot is of before the rotation.
    vault.stop();
    let snapshot = folder.path().join("snapshot");
    copy(&kept, &snapshot);
    let mut vault = Vault::stored(&kept).expect("it did before");
    vault.admin(&["write", "-f", "transit/keys/models/rotate"]);
    assert_eq!(json(&rewrap(&vault))["rewrapped"][0][2], 2);
    assert_eq!(done(&cat(&vault, transit)), "1");
    vault.stop();
    fs::remove_dir_all(&kept).expect("removed");
    copy(&snapshot, &kept);
    let vault = Vault::stored(&kept).expect("it did before");

    let refused_saying = |vault: &Vault, words: &str| {
        let output = cat(vault, transit);
        ends_with(&output, "NO_KEY");
        assert_eq!(output.status.code(), Some(25), "{}", told(&output));
        assert!(told(&output).contains(words), "{}", told(&output));
    };
    refused_saying(&vault, "Was Vault restored from before the key was rotated?");
    // The version that a fresh rotation makes bears the number, and is another key.
    vault.admin(&["write", "-f", "transit/keys/models/rotate"]);
    refused_saying(&vault, "it was not wrapped with this transit key");
    assert!(!rewrap(&vault).status.success(), "nothing moves a slot that does not open");
    let lost = slots(&vault);
    assert_eq!((&lost[0]["label"], &lost[0]["detail"]), (&"vault-transit".into(), &"version 2".into()));
    assert_eq!(lost[0]["opened_by"], serde_json::json!([]), "{lost:?}");

    let (publisher, server) = (site.publisher_state(), site.reader_state());
    let paste = |block: &str, state: &Path| {
        let words = [("KEY", transit), ("PHRASE", &phrase), ("DEAD", "vault-transit")];
        let vault = [("VAULT_ADDR", vault.address.as_str()), ("VAULT_TOKEN", vault.token.as_str())];
        site.paste(block, state, &[&words[..], &vault[..]].concat())
    };
    let shown = done(&paste("slots", &server));
    assert!(shown.lines().any(|line| line.contains("version 2") && line.contains("none of the keys given")), "{shown}");
    done(&paste("break-glass", &server));
    done(&paste("add-slot", &publisher));
    assert_eq!(done(&cat(&vault, transit)), "1", "the dead slot beside it holds nobody up");
    done(&paste("remove-slot", &publisher));
    let healed = slots(&vault);
    let opened: Vec<_> = healed.iter().map(|slot| slot["opened_by"].as_array().expect("keys").len()).collect();
    assert_eq!(opened, [1, 1], "{healed:?}");
    assert_eq!((done(&cat(&vault, transit)), done(&cat(&vault, &phrase))), ("1".to_owned(), "1".to_owned()));
    // From here on as ever.
    vault.admin(&["write", "-f", "transit/keys/models/rotate"]);
    assert_eq!(json(&rewrap(&vault))["rewrapped"][0][2], 3);
}
