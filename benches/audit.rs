//! What a record costs before a reader gets its answer, and how long it takes to find some of very many.
//!
//! The first table is the number of events a second that one thread records, checkpoints signed and synced every 1000, against
//! the same lines written by a plain loop of write(2), synced as often. The second is the time of `audit show` and
//! `audit verify` over a log of `--size-mib`: 4300 is ten million lines.
//! `cargo bench --bench audit -- [--rounds N] [--dir PATH] [--json PATH] [--size-mib N] [--only record|show]`

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Weak;
use std::time::Instant;

use common::{Options, Results};
use modelfs::audit::Audit;
use modelfs::audit::show::{Query, files_of, find};
use modelfs::audit::verify::verify;
use modelfs::config::oversight::{AuditMode, AuditPlan};
use modelfs::keys;
use modelfs::telemetry::events::{Actor, Event, Kind, Outcome, Severity, Sink, Subject};

/// Events of one measurement.
const EVENTS: u64 = 200_000;

/// What a line of `event` takes.
const LINE_BYTES: u64 = 450;

fn main() {
    let options = Options::parse();
    let mut results = Results::default();
    let events = if options.smoke { 5_000 } else { EVENTS };
    if "record".contains(&options.only) {
        for _ in 0..options.rounds {
            record(&options, events, &mut results);
        }
        results.table("one thread, a second", &["events", "of a plain loop"], None);
    }
    if "show".contains(&options.only) {
        show(&options, &mut results);
    }
    results.write_json("audit", &options);
}

fn plan(dir: &Path) -> AuditPlan {
    let key = dir.join("audit.key");
    keys::generate_signing_pair(&key).expect("a key");
    AuditPlan {
        mode: AuditMode::Required,
        file: Some(dir.join("log")),
        key: Some(key),
        checkpoint_file: Some(dir.join("checkpoints")),
        ..AuditPlan::default()
    }
}

/// An open as a mount records it: a thousand users, two hundred models, one in five hundred refused.
fn event(number: u64) -> Event {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    let (severity, outcome) = match mixed {
        mixed if mixed % 5003 == 7 => (Severity::High, Outcome::Denied),
        mixed if mixed % 503 == 7 => (Severity::Medium, Outcome::Denied),
        _ => (Severity::Low, Outcome::Allowed),
    };
    Event::new(Kind::Open)
        .severity(severity)
        .outcome(outcome)
        .actor(Actor {
            uid: Some(1000 + (mixed % 1009) as u32),
            gid: Some(100),
            pid: Some((mixed % 32_768) as u32),
            command: Some("python3".into()),
            exe: Some("/usr/bin/python3.13".into()),
            cgroup: Some("/system.slice/inference.service".into()),
            ..Actor::default()
        })
        .subject(Subject {
            model: Some(format!("acme/model-{}", mixed % 211)),
            version: Some(3),
            manifest: Some(format!("sha256:{}", "51d0".repeat(16))),
            file: Some("model-00001-of-00030.safetensors".into()),
            key: Some("vault-transit/node".into()),
            ..Subject::default()
        })
}

fn record(options: &Options, events: u64, results: &mut Results) {
    let dir = tempfile::tempdir_in(&options.dir).expect("a folder");
    let plan = plan(dir.path());
    let made: Vec<Event> = (0..1000).map(event).collect();
    let (audit, _) = Audit::open(&plan, Weak::new()).expect("opened");
    let start = Instant::now();
    for number in 0..events {
        audit.take(&made[(number % 1000) as usize]).expect("recorded");
    }
    // The last checkpoint and its fsync count.
    audit.close();
    let took = start.elapsed().as_secs_f64();
    results.add("audit log", "events", "1/s", events as f64 / took);

    let text = fs::read(dir.path().join("log")).expect("bytes");
    let mut options = fs::OpenOptions::new();
    options.append(true).create_new(true).mode(0o600);
    let mut plain = options.open(dir.path().join("plain")).expect("made");
    let start = Instant::now();
    let mut lines = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        plain.write_all(line).expect("written");
        lines += 1;
        if lines % 1000 == 0 {
            plain.sync_data().expect("synced");
        }
    }
    plain.sync_data().expect("synced");
    let loop_took = start.elapsed().as_secs_f64();
    results.add("plain loop", "events", "1/s", lines as f64 / loop_took);
    results.add("audit log", "of a plain loop", "", loop_took / took);
}

fn show(options: &Options, results: &mut Results) {
    let dir = tempfile::tempdir_in(&options.dir).expect("a folder");
    let plan = plan(dir.path());
    let lines = if options.smoke { 20_000 } else { options.size / LINE_BYTES };
    let (audit, _) = Audit::open(&plan, Weak::new()).expect("opened");
    for number in 0..lines {
        audit.take(&event(number)).expect("recorded");
    }
    audit.close();
    let path = plan.file.as_deref().expect("a file");
    let files = files_of(path).expect("files");
    let bytes: u64 = files.iter().map(|file| file.metadata().expect("there").len()).sum();
    results.note(format!("{lines} events in {} files, {bytes} bytes", files.len()));
    let now = modelfs::audit::record::now();
    let questions = [
        ("severity high", Query { severity: Some(Severity::High), ..Query::default() }),
        ("uid 1017, the last 20", Query { uids: vec![1017], last: Some(20), ..Query::default() }),
        (
            "uid 1017, model acme/model-3, denied",
            Query {
                uids: vec![1017],
                models: vec!["acme/model-3".into()],
                outcomes: vec![Outcome::Denied],
                ..Query::default()
            },
        ),
        (
            "the last minute, denied",
            Query { since: Some(now - 60_000_000), outcomes: vec![Outcome::Denied], ..Query::default() },
        ),
        ("kind tamper: none", Query { kinds: vec!["tamper".into()], ..Query::default() }),
    ];
    // Indexes of files that were closed are made beside the log; the first question makes the last one's.
    for round in 0..=options.rounds {
        for (name, query) in &questions {
            let start = Instant::now();
            let mut found = 0;
            find(&files, query, |_| {
                found += 1;
                Ok(())
            })
            .expect("found");
            let took = start.elapsed().as_secs_f64();
            if round == 0 {
                results.note(format!("{name}: {found} found, {took:.3} s the first time"));
            } else {
                results.add(name, "seconds", "s", took);
            }
        }
    }
    let start = Instant::now();
    let report = verify(&files, &[], plan.checkpoint_file.as_deref()).expect("read");
    assert_eq!(report.bad, None);
    results.add("audit verify", "seconds", "s", start.elapsed().as_secs_f64());
    results.table("a log of that size, seconds", &["seconds"], None);
}
