//! The audit log: what was done to a log is found and named, what cannot be recorded does as configured, and a log goes on
//! over restarts, crashes and full files.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/program.rs"]
mod program;

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use fixture::Random;
use modelfs::audit::index::Index;
use modelfs::audit::record::{Link, hash_of, stamp};
use modelfs::audit::show::{Query, files_of, find};
use modelfs::audit::verify::{Fault, Report, settled, verify, verify_part};
use modelfs::audit::{self, Audit};
use modelfs::config::oversight::{AuditMode, AuditPlan};
use modelfs::crypto::PublicKey;
use modelfs::error::{Code, Result};
use modelfs::keys;
use modelfs::telemetry::Telemetry;
use modelfs::telemetry::events::{Actor, Event, Kind, Outcome, Severity, Sink, Subject};
use program::{Program, can_mount, run_ok};
use serde_json::Value;

/// A folder with a log in it, and how it is written.
struct Scene {
    dir: tempfile::TempDir,
    plan: AuditPlan,
    key: PublicKey,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().expect("a folder");
        let key_path = dir.path().join("audit.key");
        let key = keys::generate_signing_pair(&key_path).expect("a key");
        let plan = AuditPlan {
            mode: AuditMode::Required,
            file: Some(dir.path().join("log")),
            key: Some(key_path),
            checkpoint_file: Some(dir.path().join("checkpoints")),
            checkpoint_records: 10,
            ..AuditPlan::default()
        };
        Scene { dir, plan, key }
    }

    fn path(&self) -> &Path {
        self.plan.file.as_deref().expect("a file")
    }

    fn checkpoints(&self) -> &Path {
        self.plan.checkpoint_file.as_deref().expect("a file")
    }

    fn open(&self) -> Audit {
        Audit::open(&self.plan, Weak::new()).expect("opened").0
    }

    /// Writes `count` events and ends the log as a process does.
    fn write(&self, count: u32) {
        let audit = self.open();
        for number in 0..count {
            audit.take(&open_event(number)).expect("recorded");
        }
        audit.close();
    }

    fn verify(&self) -> Report {
        let files = files_of(self.path()).expect("files");
        verify(&files, &[self.key], Some(self.checkpoints())).expect("read")
    }

    /// The same by who knows neither key nor checkpoints.
    fn verify_alone(&self) -> Report {
        verify(&files_of(self.path()).expect("files"), &[], None).expect("read")
    }

    fn lines(&self) -> Vec<String> {
        fs::read_to_string(self.path()).expect("text").lines().map(str::to_owned).collect()
    }

    fn put(&self, lines: &[String]) {
        fs::write(self.path(), lines.iter().map(|line| format!("{line}\n")).collect::<String>()).expect("written");
    }
}

fn open_event(number: u32) -> Event {
    Event::new(Kind::Open)
        .severity(if number % 50 == 7 { Severity::High } else { Severity::Low })
        .outcome(if number % 50 == 7 { Outcome::Denied } else { Outcome::Allowed })
        .actor(Actor { uid: Some(1000 + number % 3), pid: Some(number), ..Actor::default() })
        .subject(Subject {
            model: Some(format!("acme/{}", number % 4)),
            version: Some(3),
            file: Some(format!("shard \u{202e}{number}.safetensors")),
            key: Some("raw/node".into()),
            ..Subject::default()
        })
}

#[track_caller]
fn genuine(report: &Report) {
    assert_eq!(report.bad, None, "{report:?}");
}

#[track_caller]
fn found(report: &Report, fault: Fault, line: usize) {
    let bad = report.bad.as_ref().unwrap_or_else(|| panic!("nothing found, wanted {} at {line}", fault.name()));
    assert_eq!((bad.fault, bad.line), (fault, line as u64), "{}", bad.why);
}

fn text(line: &str, field: &str) -> String {
    let value: Value = serde_json::from_str(line).expect("JSON");
    value[field].as_str().map_or_else(|| value[field].to_string(), str::to_owned)
}

#[test]
fn a_line_says_who_did_what_to_which_model_by_which_key() {
    let scene = Scene::new();
    let audit = scene.open();
    let event = Event::new(Kind::Open)
        .severity(Severity::High)
        .outcome(Outcome::Denied)
        .actor(Actor {
            uid: Some(1000),
            gid: Some(100),
            pid: Some(42),
            command: Some("python3".into()),
            exe: Some("/usr/bin/python3".into()),
            cgroup: Some("/kubepods/pod1/abc".into()),
            container: Some("abc".into()),
            pod: Some("1".into()),
            pod_name: Some("prod/llama-0".into()),
            service_account: Some("prod/reader".into()),
        })
        .subject(Subject {
            mountpoint: Some("/mnt".into()),
            store: Some("s3://models".into()),
            model: Some("acme/llama".into()),
            version: Some(7),
            manifest: Some("sha256:51d0".into()),
            file: Some("a\nb".into()),
            key: Some("vault-transit/node".into()),
        })
        .detail("uid 1000 may not read it");
    audit.take(&event).expect("recorded");
    audit.close();
    let lines = scene.lines();
    assert_eq!(text(&lines[0], "kind"), "head");
    for (field, wanted) in [
        ("seq", "1"),
        ("kind", "open"),
        ("severity", "high"),
        ("outcome", "denied"),
        ("uid", "1000"),
        ("gid", "100"),
        ("pid", "42"),
        ("command", "python3"),
        ("exe", "/usr/bin/python3"),
        ("cgroup", "/kubepods/pod1/abc"),
        ("container", "abc"),
        ("pod", "1"),
        ("pod_name", "prod/llama-0"),
        ("service_account", "prod/reader"),
        ("mountpoint", "/mnt"),
        ("store", "s3://models"),
        ("model", "acme/llama"),
        ("version", "7"),
        ("manifest", "sha256:51d0"),
        ("file", "a\nb"),
        ("key", "vault-transit/node"),
        ("detail", "uid 1000 may not read it"),
    ] {
        assert_eq!(text(&lines[1], field), wanted, "{field}");
    }
    assert_eq!(text(&lines[2], "kind"), "checkpoint");
    assert_eq!(fs::metadata(scene.path()).expect("there").permissions().mode() & 0o777, 0o600);
    genuine(&scene.verify());
}

#[test]
fn an_untouched_log_is_genuine_and_says_what_vouches_for_it() {
    let scene = Scene::new();
    scene.write(25);
    let report = scene.verify();
    genuine(&report);
    // A head, 25 events, three checkpoints.
    assert_eq!((report.records, report.last, report.checkpoints_signed), (29, 28, 3));
    assert_eq!((report.uncovered, report.signers.as_slice()), (0, &[scene.key.to_string()][..]));
    assert!(report.elsewhere >= 1, "{report:?}");
    genuine(&scene.verify_alone());
    let other = keys::generate_signing_pair(&scene.dir.path().join("other")).expect("a key");
    let report = verify(&[scene.path().to_owned()], &[other], None).expect("read");
    assert_eq!(report.bad.expect("another key").fault, Fault::Unsigned);
}

#[test]
fn an_edited_line_is_found_and_named() {
    let scene = Scene::new();
    scene.write(25);
    let lines = scene.lines();
    for at in 0..lines.len() {
        genuine(&scene.verify());
        let mut edited = lines.clone();
        edited[at] = match text(&lines[at], "kind").as_str() {
            "open" => lines[at].replace("\"uid\":100", "\"uid\":200"),
            "head" => lines[at].replace("\"number\":1", "\"number\":1,\"boot\":\"x\",\"x\":1"),
            _ => lines[at].replace("\"due\":10", "\"due\":99"),
        };
        assert_ne!(edited[at], lines[at], "line {} was not changed", at + 1);
        scene.put(&edited);
        found(&scene.verify(), Fault::Edited, at + 1);
        found(&scene.verify_alone(), Fault::Edited, at + 1);
        // Not even JSON any more.
        edited[at] = "{\"time\":".into();
        scene.put(&edited);
        found(&scene.verify(), Fault::Edited, at + 1);
        scene.put(&lines);
    }
}

#[test]
fn deleted_lines_are_found_where_they_are_missing() {
    let scene = Scene::new();
    scene.write(25);
    let lines = scene.lines();
    for (from, count) in [(0, 1), (1, 1), (5, 1), (5, 7), (lines.len() - 2, 1)] {
        genuine(&scene.verify());
        let mut less = lines.clone();
        less.drain(from..from + count);
        scene.put(&less);
        found(&scene.verify(), Fault::Deleted, from + 1);
        found(&scene.verify_alone(), Fault::Deleted, from + 1);
        scene.put(&lines);
    }
}

#[test]
fn reordered_duplicated_and_inserted_lines_are_found_and_told_apart() {
    let scene = Scene::new();
    scene.write(25);
    let lines = scene.lines();
    let last = lines.len() - 1;
    let changed = |change: &dyn Fn(&mut Vec<String>)| {
        scene.put(&lines);
        genuine(&scene.verify());
        let mut other = lines.clone();
        change(&mut other);
        scene.put(&other);
        scene.verify()
    };
    found(&changed(&|lines| lines.swap(4, 5)), Fault::Reordered, 5);
    found(&changed(&|lines| lines.swap(4, 17)), Fault::Reordered, 5);
    found(&changed(&|lines| lines.swap(last - 1, last)), Fault::Reordered, last);
    let later = |lines: &mut Vec<String>| {
        let line = lines.remove(3);
        lines.insert(9, line);
    };
    found(&changed(&later), Fault::Reordered, 4);
    found(&changed(&|lines| lines.insert(5, lines[4].clone())), Fault::Duplicated, 6);
    found(&changed(&|lines| lines.insert(15, lines[4].clone())), Fault::Duplicated, 16);
    found(&changed(&|lines| lines.insert(4, lines[15].clone())), Fault::Duplicated, 5);
    found(&changed(&|lines| lines.push(lines[4].clone())), Fault::Duplicated, last + 2);
    // As somebody would who knows how a chain is made.
    let insert = |lines: &mut Vec<String>| {
        let forged = lines[8].replace("\"uid\":100", "\"uid\":200");
        lines.insert(8, forged);
    };
    found(&changed(&insert), Fault::Inserted, 9);
}

#[test]
fn lines_of_another_log_are_found() {
    let (scene, other) = (Scene::new(), Scene::new());
    scene.write(25);
    other.write(25);
    let (lines, others) = (scene.lines(), other.lines());
    genuine(&scene.verify());
    genuine(&other.verify());
    let mut spliced = lines.clone();
    spliced[6] = others[6].clone();
    scene.put(&spliced);
    found(&scene.verify(), Fault::Spliced, 7);
    scene.put(&[&lines[..12], &others[12..]].concat());
    found(&scene.verify(), Fault::Spliced, 13);
    // All of it.
    scene.put(&others);
    assert_eq!(scene.verify_alone().bad, None, "it is genuine, only another one");
    let bad = scene.verify().bad.expect("not what was told elsewhere");
    assert!(matches!(bad.fault, Fault::Rewritten | Fault::Unsigned), "{bad:?}");
}

#[test]
fn a_cut_is_found_in_a_line_by_itself_and_at_the_end_of_one_by_what_was_told_elsewhere() {
    let scene = Scene::new();
    scene.write(25);
    let lines = scene.lines();
    let all = fs::read(scene.path()).expect("bytes");
    genuine(&scene.verify());
    fs::write(scene.path(), &all[..all.len() - 30]).expect("cut");
    found(&scene.verify_alone(), Fault::Truncated, lines.len());
    fs::write(scene.path(), &all[..all.len() - 1]).expect("cut");
    found(&scene.verify_alone(), Fault::Truncated, lines.len());
    for cut in 1..lines.len() - 1 {
        let left = lines.len() - cut;
        scene.put(&lines[..left]);
        assert_eq!(scene.verify_alone().bad, None, "nothing in a log can tell this");
        found(&scene.verify(), Fault::Truncated, left);
    }
    fs::write(scene.path(), "").expect("cut");
    found(&scene.verify_alone(), Fault::Truncated, 1);
}

/// Whoever can write the log, and has no key: everything is made anew from the change on.
#[test]
fn a_log_that_was_written_anew_without_the_key_is_found() {
    let scene = Scene::new();
    scene.write(25);
    genuine(&scene.verify());
    let mut lines = scene.lines();
    lines[3] = lines[3].replace("\"uid\":100", "\"uid\":200");
    for at in 4..lines.len() {
        let was = text(&lines[at], "prev");
        lines[at] = lines[at].replace(&was, &hex::encode(hash_of(lines[at - 1].as_bytes())));
    }
    scene.put(&lines);
    let first_checkpoint = lines.iter().position(|line| text(line, "kind") == "checkpoint").expect("one");
    found(&scene.verify_alone(), Fault::Edited, first_checkpoint + 1);
    // And the signatures left out.
    let mut unsigned = lines.clone();
    for at in 4..unsigned.len() {
        if let Some(end) = unsigned[at].find(",\"signer\"") {
            unsigned[at].truncate(end);
            unsigned[at].push('}');
        }
        let was = text(&unsigned[at], "prev");
        unsigned[at] = unsigned[at].replace(&was, &hex::encode(hash_of(unsigned[at - 1].as_bytes())));
    }
    scene.put(&unsigned);
    assert_eq!(scene.verify_alone().bad, None, "without a key to trust it holds together");
    found(
        &verify(&[scene.path().to_owned()], &[scene.key], None).expect("read"),
        Fault::Unsigned,
        first_checkpoint + 1,
    );
    found(&verify(&[scene.path().to_owned()], &[], Some(scene.checkpoints())).expect("read"), Fault::Rewritten, {
        let kept = fs::read_to_string(scene.checkpoints()).expect("text");
        let seq = kept.lines().filter_map(|line| Some(Link::of(line.as_bytes())?.seq)).min().expect("one");
        seq as usize + 1
    });
    // And no checkpoint at all any more, then a long tail.
    let without: Vec<String> = unsigned[..first_checkpoint].to_vec();
    scene.put(&without);
    found(&verify(&[scene.path().to_owned()], &[scene.key], None).expect("read"), Fault::Unsigned, without.len());
}

/// Every change of one byte, and every cut, of random logs: found, at the line or at one beside it.
#[test]
fn no_change_of_a_byte_goes_unseen() {
    let mut random = Random::announced("no_change_of_a_byte_goes_unseen");
    for _ in 0..8 {
        let mut scene = Scene::new();
        scene.plan.checkpoint_records = 1 + random.below(12);
        scene.plan.file_bytes_max = 1500 + random.below(6000);
        scene.write(1 + random.below(40) as u32);
        if random.one_in(2) {
            scene.write(1 + random.below(20) as u32);
        }
        genuine(&scene.verify());
        let files = files_of(scene.path()).expect("files");
        for _ in 0..25 {
            let file = random.pick(&files).clone();
            let bytes = fs::read(&file).expect("bytes");
            let at = random.below(bytes.len() as u64) as usize;
            let mut bent = bytes.clone();
            bent[at] ^= 1 << random.below(7);
            let line = 1 + bytes[..at].iter().filter(|byte| **byte == b'\n').count() as u64;
            fs::write(&file, &bent).expect("bent");
            let bad = scene.verify().bad.unwrap_or_else(|| {
                panic!(
                    "byte {at} of {}, line {line}, was {:?}, in\n{}",
                    file.display(),
                    bytes[at] as char,
                    String::from_utf8_lossy(&bent)
                )
            });
            let near = bad.file == file && bad.line.abs_diff(line) <= 1;
            // A head that is none has its file sorted elsewhere.
            assert!(
                near || line <= 1 || bytes[at] == b'\n',
                "byte {at} is of line {line} of {}: {bad:?}",
                file.display()
            );
            fs::write(&file, &bytes[..at]).expect("cut");
            assert_ne!(scene.verify().bad, None, "cut at {at} of {}", file.display());
            fs::write(&file, &bytes).expect("as it was");
        }
        genuine(&scene.verify());
    }
}

#[test]
fn files_are_closed_at_their_size_and_the_chain_goes_on() {
    let mut scene = Scene::new();
    scene.plan.file_bytes_max = 4000;
    scene.write(40);
    let files = files_of(scene.path()).expect("files");
    assert!(files.len() > 3, "{files:?}");
    assert!(files[0].ends_with("log.000001"), "{files:?}");
    let report = scene.verify();
    genuine(&report);
    assert_eq!(report.notes, Vec::<String>::new());
    // In any order.
    let mut mixed = files.clone();
    mixed.reverse();
    genuine(&verify(&mixed, &[scene.key], None).expect("read"));
    // One in the middle, or the end of one.
    let middle = fs::read(&files[1]).expect("bytes");
    fs::remove_file(&files[1]).expect("removed");
    let bad = scene.verify().bad.expect("a file is missing");
    assert_eq!((bad.fault, bad.file.as_path(), bad.line), (Fault::Deleted, files[2].as_path(), 1));
    let end = middle[..middle.len() - 1].iter().rposition(|byte| *byte == b'\n').expect("lines") + 1;
    fs::write(&files[1], &middle[..end]).expect("cut");
    let bad = scene.verify().bad.expect("the end of one is missing");
    assert_eq!((bad.fault, bad.file.as_path(), bad.line), (Fault::Deleted, files[2].as_path(), 1));
    assert!(bad.why.contains("the end of"), "{bad:?}");
    fs::write(&files[1], &middle).expect("as it was");
    genuine(&scene.verify());
}

#[test]
fn a_beginning_that_is_gone_is_found_unless_the_log_vouches_that_it_removed_it() {
    let mut scene = Scene::new();
    scene.plan.file_bytes_max = 4000;
    scene.write(40);
    let files = files_of(scene.path()).expect("files");
    for file in &files[..files.len() - 1] {
        fs::remove_file(file).expect("removed");
    }
    let last = scene.path().to_owned();
    found(&scene.verify(), Fault::Deleted, 1);
    found(&scene.verify_alone(), Fault::Deleted, 1);
    let part = verify_part(std::slice::from_ref(&last), &[scene.key], Some(scene.checkpoints())).expect("read");
    genuine(&part);
    assert!(part.notes[0].contains("not in the files given"), "{part:?}");

    // Whoever can write the file, and has no key, says that they were removed.
    let lines = scene.lines();
    let (head, end) = (lines.first().expect("a head"), lines.last().expect("an end"));
    let own = serde_json::json!({
        "time": text(end, "time"), "seq": text(end, "seq").parse::<u64>().expect("a number") + 1, "log": text(end, "log"),
        "prev": hex::encode(hash_of(end.as_bytes())), "kind": "removed", "severity": "low", "outcome": "allowed",
        "last": text(head, "seq").parse::<u64>().expect("a number") - 1, "sha256": text(head, "prev"),
    });
    let mut longer = lines.clone();
    longer.push(own.to_string());
    scene.put(&longer);
    let report = scene.verify();
    found(&report, Fault::Deleted, 1);
    assert_eq!(report.uncovered, 1, "the record that nobody signed");
}

#[test]
fn a_log_that_stands_in_the_place_of_another_is_found_by_the_other_ones_checkpoints() {
    let scene = Scene::new();
    scene.write(40);
    fs::remove_file(scene.path()).expect("removed");
    scene.write(40);
    found(&scene.verify(), Fault::Rewritten, 1);
    let part = verify_part(&[scene.path().to_owned()], &[scene.key], Some(scene.checkpoints())).expect("read");
    genuine(&part);
    assert!(part.notes.iter().any(|note| note.contains("other logs")), "{part:?}");
}

#[test]
fn a_restart_goes_on_where_the_log_ended() {
    let scene = Scene::new();
    scene.write(3);
    let before = scene.lines();
    scene.write(3);
    let after = scene.lines();
    assert_eq!(&after[..before.len()], before);
    assert_eq!(text(&after[before.len()], "kind"), "checkpoint", "a new process says what it found");
    genuine(&scene.verify());
    // The file was just closed when it died.
    fs::rename(scene.path(), scene.path().with_file_name("log.000001")).expect("renamed");
    scene.write(3);
    assert_eq!(text(&scene.lines()[0], "number"), "2");
    genuine(&scene.verify());
    // Or the next one was begun, and nothing written.
    fs::rename(scene.path(), scene.path().with_file_name("log.000002")).expect("renamed");
    let mut begun = fs::OpenOptions::new();
    begun.write(true).create_new(true).mode(0o600).open(scene.path()).expect("begun");
    scene.write(3);
    assert_eq!(text(&scene.lines()[0], "number"), "3");
    genuine(&scene.verify());
}

#[test]
fn a_piece_of_a_line_that_a_crash_left_is_closed_off_and_no_alarm_for_ever() {
    let scene = Scene::new();
    scene.write(5);
    let whole = fs::read(scene.path()).expect("bytes");
    let line = scene.lines()[3].clone();
    for piece in [&line.as_bytes()[..line.len() / 2], b"\0\0\0\0", b"x\ny\n", b"{", line.replace(':', ";").as_bytes()] {
        fs::write(scene.path(), [&whole[..], piece].concat()).expect("torn");
        assert_ne!(scene.verify_alone().bad, None, "until somebody closes it off");
        scene.write(2);
        let report = scene.verify();
        genuine(&report);
        assert!(report.notes.iter().any(|note| note.contains("closed off")), "{report:?}");
        scene.write(2);
        genuine(&scene.verify());
        // What was closed off is known to the byte.
        let all = fs::read(scene.path()).expect("bytes");
        let mut bent = all.clone();
        bent[whole.len()] ^= 1;
        fs::write(scene.path(), &bent).expect("bent");
        assert_ne!(scene.verify_alone().bad, None);
        fs::write(scene.path(), &whole).expect("as it was");
        fs::remove_file(scene.checkpoints()).expect("as it was");
    }
    // Only the newline is missing.
    fs::write(scene.path(), &whole[..whole.len() - 1]).expect("torn");
    scene.write(2);
    let report = scene.verify();
    genuine(&report);
    assert_eq!(report.notes, Vec::<String>::new());
}

#[test]
fn a_tail_that_was_cut_is_told_when_the_log_is_opened_again() {
    let scene = Scene::new();
    scene.write(25);
    let lines = scene.lines();
    let whole = Scene::new();
    whole.write(25);
    assert!(Audit::open(&whole.plan, Weak::new()).expect("opened").1.is_none());
    scene.put(&lines[..lines.len() - 3]);
    let telemetry = Arc::new(Telemetry::default());
    let audit = audit::start(&scene.plan, &telemetry).expect("opened").expect("a log");
    audit.close();
    let told = scene.lines().into_iter().find(|line| text(line, "kind") == "tamper").expect("told");
    assert_eq!(text(&told, "severity"), "critical");
    assert!(text(&told, "detail").contains("its end was cut"), "{told}");
    found(&scene.verify(), Fault::Rewritten, lines.len());
}

/// Its files are listed, then it goes on into new ones, and checkpoints of those are there by the time they are read.
#[test]
fn a_log_that_begins_a_new_file_while_it_is_verified_is_not_called_cut() {
    let mut scene = Scene::new();
    scene.plan.file_bytes_max = 4000;
    scene.write(20);
    let before = files_of(scene.path()).expect("files");
    let look = |files: &[PathBuf]| verify(files, &[scene.key], Some(scene.checkpoints()));
    let mut listed = 0;
    let list = |goes_on: &dyn Fn(u32) -> bool, listed: &mut u32| {
        let files = files_of(scene.path());
        *listed += 1;
        if goes_on(*listed) {
            scene.write(40);
        }
        files
    };
    let report = settled(|| list(&|times| times == 1, &mut listed), look).expect("read");
    assert!(files_of(scene.path()).expect("files").len() > before.len(), "it went on into new files");
    genuine(&report);
    assert_eq!(listed, 2);
    // The list alone was what it called cut.
    assert!(look(&before).expect("read").bad.is_some());
    // One that never stands still is judged in the end, and one that does at once.
    let (mut listed, mut looks) = (0, 0);
    let cut = |files: &[PathBuf], looks: &mut u32| {
        *looks += 1;
        verify(&files[..files.len() - 1], &[scene.key], Some(scene.checkpoints()))
    };
    let report = settled(|| list(&|_| true, &mut listed), |files| cut(files, &mut looks)).expect("read");
    assert!(report.bad.is_some() && looks == 5, "{looks}");
    (listed, looks) = (0, 0);
    let report = settled(|| list(&|_| false, &mut listed), |files| cut(files, &mut looks)).expect("read");
    assert_eq!(report.bad.expect("cut").fault, Fault::Truncated);
    assert_eq!((listed, looks), (2, 1));
}

#[test]
fn a_second_process_is_told_who_writes_the_log() {
    let scene = Scene::new();
    let audit = scene.open();
    let Err(error) = Audit::open(&scene.plan, Weak::new()) else { panic!("two write one log") };
    assert_eq!(error.code(), Code::Audit);
    assert!(error.message().contains(&format!("pid {}", std::process::id())), "{error:?}");
    assert!(error.message().contains("audit-file of its own"), "{error:?}");
    drop(audit);
    drop(scene.open());
}

#[test]
fn what_is_no_log_of_ours_is_not_written_to() {
    let scene = Scene::new();
    let refused = |what: &str| {
        let Err(error) = Audit::open(&scene.plan, Weak::new()) else { panic!("{what} was opened") };
        assert_eq!(error.code(), Code::Audit, "{what}: {error:?}");
        error.chain()
    };
    let make = |mode: u32| {
        let _ = fs::remove_file(scene.path());
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true).mode(mode).open(scene.path()).expect("made")
    };
    make(0o600).write_all(b"some other text\nof lines\n").expect("written");
    assert!(refused("another file").contains("move it away"));
    make(0o640);
    assert!(refused("one that others read").contains("chmod"));
    fs::remove_file(scene.path()).expect("removed");
    std::os::unix::fs::symlink("/dev/null", scene.path()).expect("linked");
    refused("a link");
    fs::remove_file(scene.path()).expect("removed");
    fs::create_dir(scene.path()).expect("made");
    refused("a folder");
    fs::remove_dir(scene.path()).expect("removed");
    let lost = AuditPlan { file: Some(scene.dir.path().join("no/such/log")), ..scene.plan.clone() };
    assert_eq!(Audit::open(&lost, Weak::new()).err().expect("no folder").code(), Code::Audit);
    scene.write(1);
    genuine(&scene.verify());
}

#[test]
fn old_files_are_removed_with_a_record_of_it() {
    let mut scene = Scene::new();
    scene.plan.file_bytes_max = 4000;
    scene.write(40);
    let files = files_of(scene.path()).expect("files");
    for file in &files[..files.len() - 1] {
        let _ = Index::of(file).expect("an index");
    }
    (scene.plan.file_bytes_max, scene.plan.keep) = (1 << 20, Some(Duration::from_secs(3600)));
    scene.write(1);
    assert!(files.iter().all(|file| file.exists()), "an hour is not over");
    scene.plan.keep = Some(Duration::from_micros(1));
    let told = || fs::read_to_string(scene.checkpoints()).expect("text").lines().count();
    let before = told();
    let audit = scene.open();
    until("old files stay", || files_of(scene.path()).expect("files").len() == 1);
    audit.take(&open_event(0)).expect("recorded");
    audit.close();
    let removed = scene.lines().into_iter().filter(|line| text(line, "kind") == "removed").count();
    assert_eq!(removed, files.len() - 1);
    // Each checkpoint went its way before the next file was removed: nothing waits for the last of many.
    assert!(told() - before >= removed, "{} checkpoints elsewhere for {removed} removals", told() - before);
    let report = scene.verify();
    genuine(&report);
    assert!(report.notes.iter().any(|note| note.contains("older than they were to be kept")), "{report:?}");
}

/// The record of a removal comes first: a disk that says no, or a death between the two, leaves the file.
#[test]
fn a_file_that_stayed_although_its_removal_is_on_record_is_no_fault() {
    let mut scene = Scene::new();
    scene.plan.file_bytes_max = 4000;
    scene.write(40);
    let closed = audit::closed(scene.path()).expect("files");
    let (_, last) = closed.last().expect("closed files").clone();
    let kept = fs::read(&last).expect("bytes");
    (scene.plan.file_bytes_max, scene.plan.keep) = (1 << 20, Some(Duration::from_micros(1)));
    let audit = scene.open();
    until("old files stay", || files_of(scene.path()).expect("files").len() == 1);
    audit.close();
    assert!(closed.len() > 1, "{closed:?}");
    genuine(&scene.verify());

    fs::write(&last, &kept).expect("written");

    genuine(&scene.verify());
    genuine(&scene.verify_alone());
}

#[test]
fn a_checkpoint_comes_by_time_too() {
    let mut scene = Scene::new();
    scene.plan.checkpoint_records = 1_000_000;
    scene.plan.checkpoint_every = Duration::from_millis(50);
    let audit = scene.open();
    audit.take(&open_event(0)).expect("recorded");
    until("no checkpoint", || fs::read(scene.checkpoints()).is_ok_and(|told| told.ends_with(b"\n")));
    let line = scene.lines().pop().expect("lines");
    assert_eq!(text(&line, "kind"), "checkpoint");
    assert_eq!(fs::read_to_string(scene.checkpoints()).expect("text").trim_end(), line);
    drop(audit);
    genuine(&scene.verify());
}

/// A small filesystem of its own, unmounted when dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn new() -> Option<Small> {
        if !can_mount() {
            return None;
        }
        let dir = tempfile::tempdir().expect("a folder");
        run_ok(Command::new("mount").args(["-t", "tmpfs", "-o", "size=128k,mode=0700", "audit"]).arg(dir.path()));
        Some(Small(dir))
    }

    /// Takes all room that is left.
    fn fill(&self) {
        let mut filler = fs::File::create(self.0.path().join("filler")).expect("made");
        let full = (0..1000).find_map(|_| filler.write_all(&[1; 4096]).err()).expect("it is small");
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    }

    fn clear(&self) {
        fs::remove_file(self.0.path().join("filler")).expect("removed");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Events until the room of the last page is used up too.
fn take_until_refused(audit: &Audit) -> modelfs::error::Error {
    (0..1000).find_map(|number| audit.take(&open_event(number)).err()).expect("the disk is full")
}

#[test]
fn a_full_disk_refuses_what_must_be_recorded_until_there_is_room_again() {
    let Some(small) = Small::new() else { return };
    let mut scene = Scene::new();
    scene.plan.file = Some(small.0.path().join("log"));
    let telemetry = Arc::new(Telemetry::default());
    let audit = audit::start(&scene.plan, &telemetry).expect("opened").expect("a log");
    telemetry.events.emit(&open_event(0)).expect("there is room");
    small.fill();

    let error = take_until_refused(&audit);

    assert_eq!((error.code(), error.errno()), (Code::Audit, libc::EACCES), "{error:?}");
    assert!(error.chain().contains("audit=required"), "{error:?}");
    assert_eq!(telemetry.events.emit(&open_event(1)).expect_err("still full").code(), Code::Audit);
    assert!(telemetry.audit_failures.get() >= 2);
    let full = fs::read(scene.path()).expect("bytes");
    assert!(full.ends_with(b"\n"), "no piece of a line stays");
    genuine(&scene.verify_alone());

    small.clear();
    telemetry.events.emit(&open_event(2)).expect("there is room again");
    audit.close();
    let gap = scene.lines().into_iter().find(|line| text(line, "kind") == "gap").expect("a gap");
    assert!(text(&gap, "records").parse::<u64>().expect("a number") >= 2, "{gap}");
    assert_eq!(text(&gap, "severity"), "high");
    genuine(&scene.verify());
}

#[test]
fn a_full_disk_is_counted_and_told_where_the_log_is_not_required() {
    let Some(small) = Small::new() else { return };
    let mut scene = Scene::new();
    scene.plan.file = Some(small.0.path().join("log"));
    scene.plan.mode = AuditMode::On;
    let telemetry = Arc::new(Telemetry::default());
    let audit = audit::start(&scene.plan, &telemetry).expect("opened").expect("a log");
    small.fill();
    for number in 0..1000 {
        telemetry.events.emit(&open_event(number)).expect("readers go on");
    }
    let (records, failures) = (telemetry.audit_records.get(), telemetry.audit_failures.get());
    assert!(failures > 0 && records > 0 && records < 1001, "{records} {failures}");
    small.clear();
    telemetry.events.emit(&open_event(0)).expect("recorded");
    audit.close();
    let gap = scene.lines().into_iter().find(|line| text(line, "kind") == "gap").expect("a gap");
    assert_eq!(text(&gap, "records").parse::<u64>().expect("a number"), 1001 - records);
    genuine(&scene.verify());
}

/// The checkpoint file is on another disk, which is full.
#[test]
fn a_checkpoint_that_cannot_be_told_elsewhere_refuses_too() {
    let Some(small) = Small::new() else { return };
    let mut scene = Scene::new();
    scene.plan.checkpoint_file = Some(small.0.path().join("checkpoints"));
    scene.plan.checkpoint_records = 1;
    small.fill();
    let audit = scene.open();
    let mut error = None;
    until("nothing is refused", || {
        error = audit.take(&open_event(0)).err();
        error.is_some()
    });
    let error = error.expect("refused");
    assert_eq!(error.code(), Code::Audit, "{error:?}");
    assert!(error.chain().contains("checkpoint"), "{error:?}");
    small.clear();
    until("still refused", || audit.take(&open_event(1)).is_ok());
    audit.close();
    genuine(&scene.verify());
}

#[test]
fn nothing_is_shown_to_be_on_its_way_once_all_is_where_it_belongs() {
    let mut scene = Scene::new();
    scene.plan.checkpoint_records = 1;
    let telemetry = Arc::new(Telemetry::default());
    let audit = audit::start(&scene.plan, &telemetry).expect("opened").expect("a log");
    for number in 0..300 {
        telemetry.events.emit(&open_event(number)).expect("recorded");
        // Whoever hands a checkpoint over and the thread that has it already done must not overtake each other.
        until("a checkpoint is on its way for ever", || telemetry.snapshot().audit_pending_since == 0);
    }
    audit.close();
}

#[test]
fn a_log_whose_disk_filled_at_a_rotation_goes_on_from_its_newest_closed_file() {
    let mut scene = Scene::new();
    scene.plan.file_bytes_max = 4000;
    scene.write(40);
    let mut closed = audit::closed(scene.path()).expect("files");
    let (number, newest) = closed.pop().expect("closed files");
    let away = scene.dir.path().join("archive");
    fs::create_dir(&away).expect("mkdir");
    let mut moved = Vec::new();
    for (_, file) in &closed {
        moved.push(away.join(file.file_name().expect("a name")));
        fs::rename(file, &moved[moved.len() - 1]).expect("moved");
    }
    // As at that moment: it is begun, and there was no room for a line.
    scene.put(&[]);
    fs::remove_file(scene.checkpoints()).expect("removed");
    scene.plan.file_bytes_max = 1 << 20;
    scene.write(3);
    assert_eq!(audit::closed(scene.path()).expect("files"), [(number, newest.clone())]);
    moved.extend([newest, scene.path().to_owned()]);
    genuine(&verify(&moved, &[scene.key], None).expect("read"));
}

/// A share whose server has gone away: whoever asks it waits, until it is taken off.
struct Gone {
    at: PathBuf,
    server: Option<fs::File>,
}

impl Gone {
    fn over(folder: &Path) -> Option<Gone> {
        if !can_mount() {
            return None;
        }
        // Nobody ever reads what is asked here.
        let server = fs::File::options().read(true).write(true).open("/dev/fuse").expect("a server");
        let path = |path: &Path| CString::new(path.as_os_str().as_bytes()).expect("no NUL");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let (at, options) = (path(folder), CString::new(options).expect("no NUL"));
        // SAFETY: NUL-terminated strings that outlive the call.
        let mounted = unsafe {
            libc::mount(c"gone".as_ptr(), at.as_ptr(), c"fuse".as_ptr(), libc::MS_NOSUID, options.as_ptr().cast())
        };
        assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        Some(Gone { at: folder.to_owned(), server: Some(server) })
    }
}

impl Drop for Gone {
    fn drop(&mut self) {
        let at = CString::new(self.at.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: a NUL-terminated string that outlives the call.
        unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH) };
        // Whoever waits is told that it is gone for good.
        drop(self.server.take());
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A log whose checkpoints go to a folder of their own, which nobody has asked for anything yet.
fn with_share(mode: AuditMode, refuse_after: Duration) -> (Scene, PathBuf) {
    let mut scene = Scene::new();
    let share = scene.dir.path().join("share");
    fs::create_dir(&share).expect("mkdir");
    scene.plan.checkpoint_file = Some(share.join("checkpoints"));
    (scene.plan.mode, scene.plan.checkpoint_records) = (mode, 5);
    scene.plan.refuse_after = refuse_after;
    (scene, share)
}

/// Longer than this machine stands still: what is to be recorded before a share is known to hang is recorded by then.
const HANGS_AFTER: Duration = Duration::from_secs(15);

#[test]
fn a_share_that_hangs_refuses_too_and_holds_up_no_end() {
    let (scene, share) = with_share(AuditMode::Required, HANGS_AFTER);
    let telemetry = Arc::new(Telemetry::default());
    let audit = audit::start(&scene.plan, &telemetry).expect("opened").expect("a log");
    let Some(gone) = Gone::over(&share) else { return };
    for number in 0..10 {
        telemetry.events.emit(&open_event(number)).expect("no share is waited for");
    }
    assert_ne!(telemetry.snapshot().audit_pending_since, 0, "a checkpoint is on its way");
    let mut error = None;
    until("nothing is refused", || {
        std::thread::sleep(Duration::from_millis(50));
        error = telemetry.events.emit(&open_event(0)).err();
        error.is_some()
    });
    let error = error.expect("refused");
    let mut waits: Vec<Duration> = (0..5)
        .map(|number| {
            let began = Instant::now();
            assert!(telemetry.events.emit(&open_event(number)).is_err(), "it hangs still");
            began.elapsed()
        })
        .collect();
    // Who waited did so for a second. Of five: one or two may come when the machine has no time for them.
    waits.sort_unstable();
    assert!(waits[2] < Duration::from_millis(500), "once it is known to hang nobody waits: {waits:?}");
    assert_eq!(error.code(), Code::Audit, "{error:?}");
    assert!(error.chain().contains("on its way") && error.chain().contains("share/checkpoints"), "{error:?}");
    assert!(telemetry.audit_failures.get() > 0);

    // It answers again: the place below is a disk like any other.
    drop(gone);
    until("still refused", || telemetry.events.emit(&open_event(1)).is_ok());
    until("a checkpoint is on its way for ever", || telemetry.snapshot().audit_pending_since == 0);
    audit.close();
    assert!(scene.lines().iter().any(|line| text(line, "kind") == "gap"));
    genuine(&scene.verify());

    // With an unmount's 10 s it must stay below the 25 s of `modelfs umount` in the unit, and systemd's 30 s. An end that the
    // machine itself held up says nothing of it: then another.
    let mut ends: Vec<Duration> = Vec::new();
    while ends.iter().all(|took| *took >= Duration::from_secs(13)) {
        assert!(ends.len() < 3, "{ends:?}");
        let (scene, share) = with_share(AuditMode::Required, HANGS_AFTER);
        let audit = scene.open();
        let gone = Gone::over(&share).expect("as before");
        for number in 0..7 {
            audit.take(&open_event(number)).expect("recorded");
        }
        let began = Instant::now();
        audit.close();
        ends.push(began.elapsed());
        assert_eq!(text(&scene.lines().pop().expect("lines"), "kind"), "checkpoint", "the log itself has its end");
        genuine(&scene.verify_alone());
        drop(gone);
    }
}

#[test]
fn a_share_that_hangs_is_counted_where_the_log_is_not_required() {
    let (scene, share) = with_share(AuditMode::On, Duration::from_millis(500));
    let telemetry = Arc::new(Telemetry::default());
    let audit = audit::start(&scene.plan, &telemetry).expect("opened").expect("a log");
    let Some(gone) = Gone::over(&share) else { return };
    until("nothing is counted", || {
        telemetry.events.emit(&open_event(0)).expect("readers go on");
        telemetry.audit_failures.get() > 0
    });
    drop(gone);
    audit.close();
    genuine(&scene.verify());
}

fn collect(files: &[PathBuf], query: &Query) -> Result<Vec<String>> {
    let mut found = Vec::new();
    find(files, query, |line| {
        found.push(String::from_utf8_lossy(line).trim_end().to_owned());
        Ok(())
    })?;
    Ok(found)
}

/// Against a plain look at every line.
#[test]
fn what_is_shown_is_what_a_look_at_every_line_finds() {
    let mut random = Random::announced("what_is_shown_is_what_a_look_at_every_line_finds");
    let mut scene = Scene::new();
    scene.plan.file_bytes_max = 2 << 20;
    scene.plan.checkpoint_records = 100;
    scene.write(20_000);
    let files = files_of(scene.path()).expect("files");
    assert!(files.len() > 2, "{files:?}");
    let all: Vec<String> = files
        .iter()
        .flat_map(|file| fs::read_to_string(file).expect("text").lines().map(str::to_owned).collect::<Vec<_>>())
        .collect();
    let values: Vec<Value> = all.iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let times: Vec<u64> = values
        .iter()
        .map(|value| modelfs::audit::record::parse_stamp(value["time"].as_str().expect("a time")).expect("a time"))
        .collect();
    let ranks = ["low", "medium", "high", "critical"];
    for _ in 0..60 {
        let mut query = Query::default();
        if random.one_in(2) {
            query.since = Some(*random.pick(&times));
        }
        if random.one_in(2) {
            query.until = Some(*random.pick(&times));
        }
        if random.one_in(2) {
            query.uids = vec![1000 + random.below(5) as u32];
        }
        if random.one_in(2) {
            query.models = vec![["acme/1", "acme/9", "acme/*", "ac*", "*"][random.below(5) as usize].to_owned()];
        }
        if random.one_in(2) {
            query.severity = Some(*random.pick(&Severity::ALL));
        }
        if random.one_in(2) {
            query.kinds = vec![["open", "checkpoint", "head", "tamper"][random.below(4) as usize].to_owned()];
        }
        if random.one_in(3) {
            query.outcomes = vec![*random.pick(&Outcome::ALL)];
        }
        if random.one_in(3) {
            query.last = Some(random.below(50) as usize);
        }
        let fits = |(value, time): (&Value, &u64)| {
            let word = |name: &str| value[name].as_str().unwrap_or_default();
            let rank = |name: &str| ranks.iter().position(|rank| *rank == name);
            query.since.is_none_or(|since| *time >= since)
                && query.until.is_none_or(|until| *time <= until)
                && (query.uids.is_empty() || query.uids.iter().any(|uid| value["uid"] == *uid))
                && (query.models.is_empty()
                    || !value["model"].is_null()
                        && query.models.iter().any(|model| match model.strip_suffix('*') {
                            Some(start) => word("model").starts_with(start),
                            None => word("model") == model,
                        }))
                && query.severity.is_none_or(|severity| rank(word("severity")) >= rank(severity.name()))
                && (query.kinds.is_empty() || query.kinds.iter().any(|kind| word("kind") == kind))
                && (query.outcomes.is_empty() || query.outcomes.iter().any(|outcome| word("outcome") == outcome.name()))
        };
        let mut wanted: Vec<&String> =
            all.iter().zip(values.iter().zip(&times)).filter(|(_, both)| fits(*both)).map(|(line, _)| line).collect();
        if let Some(last) = query.last {
            wanted = wanted.split_off(wanted.len().saturating_sub(last));
        }
        let found = collect(&files, &query).expect("found");
        assert!(found.iter().eq(wanted.iter().copied()), "{query:?}: {} for {}", found.len(), wanted.len());
    }
    assert!(stamp(times[0]).starts_with("20"));
}

/// The command itself on a million lines in two files, of which the closed one has no index yet. Its time is told, and fails nobody.
#[test]
fn the_command_finds_a_few_records_among_a_million() {
    const LINES: u64 = 1_000_000;
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(folder.path());
    let log = folder.path().join("audit.log");
    let begin = modelfs::audit::record::parse_stamp("2026-01-01T00:00:00.000000Z").expect("a time");
    let line = |number: u64| {
        let (uid, model) = (1000 + number % 1009, number % 211);
        let (severity, outcome) = if number % 503 == 7 { ("medium", "denied") } else { ("low", "allowed") };
        let kind = if number == 700_001 { "tamper" } else { "open" };
        format!(
            "{{\"time\":\"{}\",\"seq\":{number},\"log\":\"9f86d081884c7d65\",\"prev\":\"{}\",\"kind\":\"{kind}\",\"severity\":\
             \"{severity}\",\"outcome\":\"{outcome}\",\"uid\":{uid},\"model\":\"acme/model-{model}\",\"version\":3}}\n",
            stamp(begin + number * 1_000_000),
            "51d0".repeat(16)
        )
    };
    for (path, lines) in [(log.with_extension("log.000001"), 0..LINES / 2), (log.clone(), LINES / 2..LINES)] {
        let mut file = std::io::BufWriter::new(fs::File::create(path).expect("made"));
        lines.for_each(|number| file.write_all(line(number).as_bytes()).expect("written"));
        file.flush().expect("written");
    }
    let show = |words: &[&str]| {
        let start = Instant::now();
        let mut command = program.command(&["audit", "show"]);
        let shown = run_ok(command.arg(&log).arg("--json").args(words)).stdout;
        eprintln!("audit show {}: {:.2} s, {} bytes", words.join(" "), start.elapsed().as_secs_f64(), shown.len());
        String::from_utf8(shown).expect("text")
    };
    let wanted = |fits: &dyn Fn(u64) -> bool| (0..LINES).filter(|number| fits(*number)).map(line).collect::<String>();
    let denied = |number: u64| number % 503 == 7;

    let of_one_user = wanted(&|number| number % 1009 == 17 && denied(number));
    assert_eq!(show(&["--uid", "1017", "--outcome", "denied"]), of_one_user, "with the indexes made");
    assert_eq!(show(&["--uid", "1017", "--outcome", "denied"]), of_one_user, "by the indexes");
    assert!(!of_one_user.is_empty());
    assert_eq!(show(&["--kind", "tamper"]), line(700_001));
    assert_eq!(show(&["--last", "20"]), wanted(&|number| number >= LINES - 20));
    const LATE: u64 = LINES - 300_000;
    let since = stamp(begin + LATE * 1_000_000);
    let of_one_model = wanted(&|number| number >= LATE && number % 211 == 3 && denied(number));
    assert!(!of_one_model.is_empty());
    assert_eq!(show(&["--since", &since, "--severity", "medium", "--model", "acme/model-3"]), of_one_model);
    assert_eq!(show(&["--kind", "lease-lost"]), "");
}

/// Outages begin and end once, however many chunks are asked for meanwhile; a wrong byte is told with its place.
#[test]
fn a_store_that_falls_silent_is_told_of_once_and_one_that_lies_each_time() {
    use modelfs::cache::{Cache, CacheLimits};
    use modelfs::crypto::Verify;
    use modelfs::format::ChunkIndex;
    use modelfs::mem::{Arena, ArenaPlan};
    use modelfs::store::fault::{Call, Fault as StoreFault, Faulty, When};

    let scene = Scene::new();
    let telemetry = Arc::new(Telemetry::default());
    let audit = audit::start(&scene.plan, &telemetry).expect("opened").expect("a log");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let mut random = Random::announced("a_store_that_falls_silent_is_told_of_once_and_one_that_lies_each_time");
    let files = vec![("a/weights.bin".to_owned(), random.bytes(4 << 20))];
    let sealed = runtime.block_on(fixture::Fixture::seal(files, fixture::Style::default(), &mut random));
    let faulty = Faulty::new((*sealed.store).clone());
    let model = sealed.model(Arc::new(faulty.clone()), Verify::Strict);
    // As a mount names it.
    model.vitals.set_store("s3://models");
    let limits =
        CacheLimits { refusal_memory: Duration::ZERO, outage_memory: Duration::ZERO, ..CacheLimits::default() };
    let arena = Arena::open(ArenaPlan { bytes: 32 << 20 }).expect("arena");
    let cache = Cache::new(arena, 16 << 20, limits, runtime.handle().clone(), telemetry.clone()).expect("cache");
    let object = cache.object(&model, 0, true);
    let pin = |index: u32| runtime.block_on(cache.pin(&object, ChunkIndex(index))).map(drop);

    faulty.on(When::call(Call::ReadRange), StoreFault::Fail(Code::Unreachable));
    for index in [0, 1, 2, 0] {
        assert_eq!(pin(index).expect_err("silent").code(), Code::Unreachable);
    }
    faulty.heal();
    pin(0).expect("it answers again");
    pin(1).expect("it goes on");
    faulty.on(When::call(Call::ReadRange), StoreFault::FlipBit { offset: 3_500_000, bit: 1 });
    assert_eq!(pin(3).expect_err("another byte").code(), Code::ChunkHash);
    audit.close();

    let of_kind = |kind: &str| {
        let query = Query { kinds: vec![kind.to_owned()], ..Query::default() };
        let found = collect(&[scene.path().to_owned()], &query).expect("found");
        found.iter().map(|line| serde_json::from_str::<Value>(line).expect("JSON")).collect::<Vec<_>>()
    };
    assert_eq!((of_kind("store-down").len(), of_kind("store-up").len()), (1, 1));
    let down = &of_kind("store-down")[0];
    assert_eq!((&down["code"], &down["store"]), (&"UNREACHABLE".into(), &"s3://models".into()));
    let tampered = of_kind("tamper");
    let severities: Vec<_> = tampered.iter().map(|record| record["severity"].as_str().expect("told")).collect();
    assert_eq!(severities, ["high", "critical"], "asked for once more, then refused");
    for record in &tampered {
        assert_eq!((&record["file"], &record["model"]), (&"a/weights.bin".into(), &fixture::NAME.into()));
        assert!(record["detail"].as_str().expect("told").contains("chunk 3 of object"), "{record}");
    }
    genuine(&scene.verify());
}

/// The events of a real mount, and a store whose bytes were changed.
#[test]
fn a_mount_records_its_life_and_a_store_that_lies() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(folder.path());
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("good.bin"), vec![1; 3 << 20]).expect("write");
    fs::write(source.join("bad.bin"), vec![2; 5 << 20]).expect("write");
    program.seal(&source, "acme/m");
    let (log, key) = (folder.path().join("audit.log"), folder.path().join("audit.key"));
    run_ok(program.command(&["keygen", "--signing"]).arg(&key));
    let (log_text, key_text) = (log.to_str().expect("text"), key.to_str().expect("text"));
    let options = ["--audit", "required", "--audit-file", log_text, "--audit-key", key_text];
    let mount = program.mount(&options);
    run_ok(program.command(&["lock"]).arg(program.mountpoint()));
    run_ok(program.command(&["unlock"]).arg(program.mountpoint()));
    assert_eq!(fs::read(program.mountpoint().join("acme/m/good.bin")).expect("read").len(), 3 << 20);
    // The largest object is the bad file.
    let mut objects = Vec::new();
    let mut folders = vec![PathBuf::from(program.store())];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(at).expect("listed") {
            let path = entry.expect("listed").path();
            if path.is_dir() { folders.push(path) } else { objects.push(path) }
        }
    }
    let object = objects.into_iter().max_by_key(|path| path.metadata().expect("there").len()).expect("objects");
    let mut bytes = fs::read(&object).expect("bytes");
    bytes[2 << 20] ^= 1;
    fs::set_permissions(&object, fs::Permissions::from_mode(0o600)).expect("ours");
    fs::write(&object, &bytes).expect("changed");
    assert!(fs::read(program.mountpoint().join("acme/m/bad.bin")).is_err());
    mount.unmount();

    let show = |more: &[&str]| {
        let shown = run_ok(program.command(&["audit", "show", log_text, "--json"]).args(more));
        let text = String::from_utf8(shown.stdout).expect("text");
        text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")).collect::<Vec<_>>()
    };
    for kind in ["start", "mount", "lock", "unlock", "rotation", "tamper", "unmount", "stop"] {
        let of_kind = show(&["--kind", kind]);
        assert!(!of_kind.is_empty(), "no {kind} among {:?}", show(&[]));
    }
    let mounted = &show(&["--kind", "mount"])[0];
    assert_eq!((&mounted["model"], &mounted["version"]), (&"acme/m".into(), &1.into()));
    assert_eq!(mounted["key"], "raw/key-file");
    assert!(mounted["manifest"].as_str().expect("told").starts_with("sha256:"));
    let tampered = show(&["--kind", "tamper", "--severity", "critical"]);
    assert_eq!(tampered[0]["file"], "bad.bin");
    assert_eq!((&tampered[0]["code"], &tampered[0]["outcome"]), (&"CHUNK_HASH".into(), &"failed".into()));
    assert_eq!(show(&["--kind", "start"])[0]["uid"], 0);

    let public = format!("{key_text}.pub");
    let verified = run_ok(&mut program.command(&["audit", "verify", log_text, "--trust", &public, "--json"]));
    let report: Value = serde_json::from_slice(&verified.stdout).expect("JSON");
    assert_eq!((&report["ok"], &report["uncovered"]), (&true.into(), &0.into()));
    let text = fs::read_to_string(&log).expect("text");
    fs::write(&log, text.replacen("\"kind\":\"lock\"", "\"kind\":\"open\"", 1)).expect("edited");
    let refused = program.command(&["audit", "verify", log_text, "--trust", &public]).output().expect("runs");
    assert_eq!(refused.status.code(), Some(20));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let line = 1 + text[..text.find("\"kind\":\"lock\"").expect("there")].matches('\n').count();
    assert!(said.contains(&format!("line {line}: edited")) && said.contains("[AUDIT_CHAIN]"), "{said}");
}

/// `audit=required`, many at once: each looks into the log right after its own open, through the daemon and past it.
#[test]
fn an_open_that_has_returned_is_on_record_already_however_many_open_at_once() {
    const OPENERS: usize = 8;
    const OPENS: usize = 40;
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(folder.path());
    let source = folder.path().join("source");
    for opener in 0..OPENERS {
        fs::create_dir_all(source.join(opener.to_string())).expect("mkdir");
        for number in 0..OPENS {
            fs::write(source.join(format!("{opener}/{number}.bin")), vec![1; 4096]).expect("write");
        }
        // Large enough to be an object of its own, which the kernel serves once it is whole.
        fs::write(source.join(format!("{opener}/whole.bin")), vec![2; 3 << 20]).expect("write");
    }
    program.seal(&source, "acme/m");
    let (log, key) = (folder.path().join("audit.log"), folder.path().join("audit.key"));
    run_ok(program.command(&["keygen", "--signing"]).arg(&key));
    let (log_text, key_text) = (log.to_str().expect("text"), key.to_str().expect("text"));
    let elsewhere = folder.path().join("checkpoints");
    let mut options = vec!["--audit", "required", "--audit-file", log_text, "--audit-key", key_text, "--open", "whole"];
    options.extend(["--audit-checkpoint-file", elsewhere.to_str().expect("text"), "--audit-checkpoint-records", "10"]);
    let mount = program.mount(&options);
    let root = program.mountpoint().join("acme/m");
    let on_record = |file: &str| {
        let from = fs::metadata(&log).expect("a log").len();
        let opened = fs::File::open(root.join(file)).expect("opened");
        let text = fs::read(&log).expect("bytes");
        drop(opened);
        let since = String::from_utf8_lossy(&text[from as usize..]).into_owned();
        let is_its = |line: &str| line.contains("\"kind\":\"open\"") && line.contains(&format!("\"file\":\"{file}\""));
        assert!(since.lines().any(is_its), "{file} is open and not on record: {since}");
    };
    std::thread::scope(|scope| {
        for opener in 0..OPENERS {
            let on_record = &on_record;
            scope.spawn(move || {
                for number in 0..OPENS {
                    on_record(&format!("{opener}/{number}.bin"));
                    on_record(&format!("{opener}/whole.bin"));
                }
            });
        }
    });
    mount.unmount();
    let public = format!("{key_text}.pub");
    run_ok(program.command(&["audit", "verify", log_text, "--trust", &public, "--checkpoints"]).arg(&elsewhere));
}

/// `audit=required`: a file is not opened unless that is on record, and opened again once there is room.
#[test]
fn a_full_disk_refuses_opens_of_a_mount_until_there_is_room_again() {
    let Some(small) = Small::new() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(folder.path());
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("a.bin"), vec![1; 1 << 20]).expect("write");
    program.seal(&source, "acme/m");
    let log = small.0.path().join("audit.log");
    let log = log.to_str().expect("text");
    let mount = program.mount(&["--audit", "required", "--audit-file", log]);
    let file = program.mountpoint().join("acme/m/a.bin");
    assert_eq!(fs::read(&file).expect("read").len(), 1 << 20);
    small.fill();

    // The last page of the log has room for some.
    let refused = (0..1000).find_map(|_| fs::File::open(&file).err()).expect("refused");

    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    assert!(fs::File::open(&file).is_err(), "still full");
    small.clear();
    assert_eq!(fs::read(&file).expect("read").len(), 1 << 20);
    mount.unmount();
    let shown = run_ok(&mut program.command(&["audit", "show", log, "--json"]));
    let records: Vec<Value> =
        String::from_utf8_lossy(&shown.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    // The word of the first may have found room where the open itself did not: then the other is told of by a second.
    let gaps: Vec<&Value> = records.iter().filter(|record| record["kind"] == "gap").collect();
    assert!(gaps.iter().filter_map(|gap| gap["records"].as_u64()).sum::<u64>() >= 2, "{gaps:?}");
    let open = records.iter().rfind(|record| record["kind"] == "open").expect("an open");
    assert_eq!((&open["uid"], &open["file"], &open["key"]), (&0.into(), &"a.bin".into(), &"raw/key-file".into()));
    run_ok(&mut program.command(&["audit", "verify", log]));
}

/// `audit=required` on a disk that is full: orders that may give are not begun, a policy stays, and a lock locks.
#[test]
fn what_gives_is_not_done_unless_it_is_on_record_and_what_takes_away_is() {
    let Some(small) = Small::new() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(folder.path());
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("a.bin"), vec![1; 1 << 20]).expect("write");
    program.seal(&source, "acme/m");
    let policy = folder.path().join("policy.toml");
    let may = |may: &str| {
        let rule = format!("[[rule]]\neverybody = true\nmodels = [\"*\"]\nmay = \"{may}\"\n");
        fs::write(&policy, rule).expect("written");
    };
    may("read");
    let log = small.0.path().join("audit.log");
    let (log, rules) = (log.to_str().expect("text"), policy.to_str().expect("text"));
    let mount = program.mount(&["--audit", "required", "--audit-file", log, "--policy", rules]);
    let file = program.mountpoint().join("acme/m/a.bin");
    let fill = || {
        small.fill();
        (0..1000).find_map(|_| fs::File::open(&file).err()).expect("refused");
    };
    let order = |words: &[&str]| program.command(words).arg(program.mountpoint()).output().expect("runs");
    let not_begun = |words: &[&str]| {
        let ended = order(words);
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(!ended.status.success() && said.contains("is not begun"), "{words:?}: {said}");
    };
    assert_eq!(fs::read(&file).expect("read").len(), 1 << 20);
    fill();
    may("none");
    not_begun(&["reload"]);
    not_begun(&["unlock"]);
    not_begun(&["sessions", "--let-in", "uid=1"]);
    // Nor by a signal.
    mount.signal(libc::SIGHUP);
    until("no word of the policy", || program.log().contains("the policy stays as it was"));
    small.clear();
    assert_eq!(fs::read(&file).expect("by the policy of before").len(), 1 << 20);
    mount.signal(libc::SIGHUP);
    until("the policy is not in force", || fs::File::open(&file).is_err());
    may("read");
    assert!(order(&["reload"]).status.success());

    fill();
    let locked = order(&["lock"]);
    assert!(locked.status.success(), "{}", String::from_utf8_lossy(&locked.stderr));
    not_begun(&["unlock"]);
    small.clear();
    assert!(fs::File::open(&file).is_err(), "it is locked");
    assert!(order(&["unlock"]).status.success());
    assert_eq!(fs::read(&file).expect("read").len(), 1 << 20);
    mount.unmount();
    run_ok(&mut program.command(&["audit", "verify", log]));
}

/// `audit=required` on a disk that is full: nothing is mounted.
#[test]
fn a_mount_that_cannot_be_recorded_is_not_made() {
    let Some(small) = Small::new() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(folder.path());
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("a.bin"), vec![1; 1 << 20]).expect("write");
    program.seal(&source, "acme/m");
    small.fill();
    let log = small.0.path().join("audit.log");
    let log = log.to_str().expect("text");
    let mut command = program.command(&["mount", program.store()]);
    command.arg(program.mountpoint()).args(["--key", &program.key(), "--trust"]).arg(program.trusted_key());
    command.args(["--audit", "required", "--audit-file", log]);
    let refused = command.output().expect("runs");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(25), "{said}");
    assert!(said.contains("[AUDIT]") && said.contains("No space left"), "{said}");
    assert!(!program::is_mountpoint(program.mountpoint()));

    let mount = program.mount(&["--audit", "on", "--audit-file", log]);
    assert_eq!(fs::read(program.mountpoint().join("acme/m/a.bin")).expect("read").len(), 1 << 20);
    assert!(program.log().contains("the audit log is not written"), "{}", program.log());
    small.clear();
    mount.unmount();
    let shown = run_ok(&mut program.command(&["audit", "show", log]));
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(text.contains("gap") && text.contains("could not be recorded"), "{text}");
    run_ok(&mut program.command(&["audit", "verify", log]));
}

/// What is published, rotated and removed from this machine stands in its log, refusals too.
#[test]
fn commands_that_change_a_store_are_recorded_with_what_they_changed() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(folder.path());
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("a.bin"), vec![1; 1 << 20]).expect("write");
    let (log, other) = (folder.path().join("audit.log"), folder.path().join("home/other.key"));
    let (log_text, other_text) = (log.to_str().expect("text"), format!("file:{}", other.display()));
    run_ok(program.command(&["keygen"]).arg(&other));
    let audited = |words: &[&str]| {
        let mut command = program.command(words);
        command.env("MODELFS_AUDIT", "required").args(["--key", &program.key(), "--audit-file", log_text]);
        command
    };
    let trust = program.trusted_key();
    let trust = trust.to_str().expect("text");

    run_ok(&mut audited(&["seal", source.to_str().expect("text"), program.store(), "acme/m"]));
    let add = ["key", "add", program.store(), "acme/m", "--add", &other_text, "--label", "second", "--trust", trust];
    run_ok(&mut audited(&add));
    let remove = ["key", "remove", program.store(), "acme/m", "--label", "nobody", "--trust", trust];
    let refused = audited(&remove).output().expect("runs");
    assert!(!refused.status.success());
    run_ok(&mut audited(&["tag", program.store(), "acme/m@1", "prod", "--trust", trust]));
    run_ok(&mut audited(&["prune", program.store(), "acme/m", "--trust", trust]));
    run_ok(&mut audited(&["floor", program.store(), "acme/m", "--trust", trust]));

    let shown = run_ok(&mut program.command(&["audit", "show", log_text, "--json"]));
    let records: Vec<Value> =
        String::from_utf8_lossy(&shown.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let told: Vec<[String; 4]> = records
        .iter()
        .filter(|record| ["publish", "rotation", "admin"].contains(&record["kind"].as_str().unwrap_or_default()))
        .map(|record| {
            let text = |name: &str| record[name].as_str().unwrap_or_default().to_owned();
            [text("kind"), text("command"), text("outcome"), text("model")]
        })
        .collect();
    let want = [
        ["publish", "modelfs seal", "allowed", "acme/m"],
        ["rotation", "modelfs key add", "allowed", "acme/m"],
        ["rotation", "modelfs key remove", "failed", ""],
        ["publish", "modelfs tag", "allowed", "acme/m"],
        ["publish", "modelfs prune", "allowed", "acme/m"],
        ["admin", "modelfs floor", "allowed", "acme/m"],
    ];
    assert_eq!(told, want.map(|words| words.map(str::to_owned)), "{records:?}");
    let detail = |command: &str| {
        let record = records.iter().find(|record| record["command"] == command).expect("told above");
        record["detail"].as_str().unwrap_or_default().to_owned()
    };
    assert!(detail("modelfs key add").contains("second"), "{}", detail("modelfs key add"));
    assert!(detail("modelfs key remove").contains("nobody"), "{}", detail("modelfs key remove"));
    assert!(detail("modelfs tag").contains("tag=prod"), "{}", detail("modelfs tag"));
    run_ok(&mut program.command(&["audit", "verify", log_text]));
}

/// A mount holds its log for itself.
#[test]
fn a_command_whose_log_another_process_writes_goes_on_with_a_word_or_is_refused_where_it_must_be_recorded() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(folder.path());
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("a.bin"), vec![1; 1 << 20]).expect("write");
    let log = folder.path().join("audit.log");
    let plan = AuditPlan { mode: AuditMode::On, file: Some(log.clone()), ..AuditPlan::default() };
    let (held, _) = Audit::open(&plan, Weak::new()).expect("opened");
    let seal = |mode: &str| {
        let mut command = program.command(&["seal"]);
        command.arg(&source).args([program.store(), "acme/m", "--key", &program.key(), "--audit", mode]);
        command.arg("--audit-file").arg(&log).output().expect("runs")
    };

    let refused = seal("required");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        refused.status.code() == Some(25) && said.contains("seal is refused") && said.contains("[AUDIT]"),
        "{said}"
    );
    assert!(fs::read_dir(program.store()).expect("listed").next().is_none(), "something was published");
    let told = seal("on");
    let said = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.status.success() && said.contains("seal is not recorded"), "{said}");
    held.close();
}
