//! What a record costs before a reader gets its answer, and how long it takes to find some of very many.
//!
//! The first table is the number of events a second that one thread records, checkpoints signed and synced every 1000, against
//! the same lines written by a plain loop of write(2), synced as often. The second is the time of `audit show` and
//! `audit verify` over a log of `--size-mib`: 4300 is ten million lines. The third is opens of a real mount (root), by one thread
//! and by several processes at once: nobody listens; somebody does, so that each asker is looked up in /proc and the event made;
//! the log is required, signed, with checkpoints elsewhere.
//! `cargo bench --bench audit -- [--rounds N] [--dir PATH] [--json PATH] [--size-mib N] [--only record|show|opens]`

mod common;
#[path = "../tests/common/mounted.rs"]
mod mounted;
/// What `mounted` asks of its neighbour.
mod fixture {
    pub use super::common::NAME;
}

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::Instant;

use common::{FILE, Options, Results, Sealed};
use modelfs::audit::Audit;
use modelfs::audit::show::{Query, files_of, find};
use modelfs::audit::verify::verify;
use modelfs::config::oversight::{AuditMode, AuditPlan};
use modelfs::crypto::Verify;
use modelfs::format::{HashAlg, Suite};
use modelfs::keys;
use modelfs::store::local::LocalStore;
use modelfs::telemetry::events::{Actor, Event, Kind, Outcome, Severity, Sink, Subject};
use mounted::{How, Mounted};

/// Events of one measurement.
const EVENTS: u64 = 200_000;

/// What a line of `event` takes.
const LINE_BYTES: u64 = 450;

/// Opens of one process, and processes that open at once.
const OPENS: u64 = 4_000;
const OPENERS: u64 = 4;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let [_, flag, path, count] = words.as_slice()
        && flag == "--opener"
    {
        return opener(Path::new(path), count.parse().expect("a number"));
    }
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
    if "opens".contains(&options.only) && mounted::can_mount() {
        opens(&options, &mut results);
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

/// Another process: opens and closes a file so often, and prints how many seconds that took.
fn opener(path: &Path, count: u64) {
    // Together with the others: when all were started.
    std::io::stdin().read_line(&mut String::new()).expect("the word to begin");
    let start = Instant::now();
    for _ in 0..count {
        fs::File::open(path).expect("opened");
    }
    println!("{}", start.elapsed().as_secs_f64());
}

/// Makes each event worth making, and keeps none.
struct Listener;

impl Sink for Listener {
    fn take(&self, _: &Event) -> modelfs::error::Result<()> {
        Ok(())
    }
}

fn opens(options: &Options, results: &mut Results) {
    const NOBODY: &str = "nobody listens";
    let count = if options.smoke { 100 } else { OPENS };
    let (one, many) = ("by 1 thread".to_owned(), format!("by {OPENERS} processes"));
    let dir = tempfile::tempdir_in(&options.dir).expect("a folder");
    let local = LocalStore::open(&dir.path().join("store")).expect("store");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let sealed = runtime.block_on(Sealed::new(&local, 1 << 20, Suite::Aes256Gcm, HashAlg::Blake3, |_| {}));
    for round in 0..options.rounds {
        let mut contenders = [NOBODY, "who asked is looked up", "audit=required"];
        contenders.rotate_left(round % 3);
        for who in contenders {
            let logs = tempfile::tempdir_in(&options.dir).expect("a folder");
            let plan = plan(logs.path());
            let mounted = Mounted::new(How::default(), || sealed.model(Arc::new(local.clone()), Verify::default()));
            let events = &mounted.cache.telemetry().events;
            let audit = (who == "audit=required").then(|| {
                let audit = Arc::new(Audit::open(&plan, Weak::new()).expect("opened").0);
                events.add(audit.clone());
                audit
            });
            if audit.is_none() && who != NOBODY {
                events.add(Arc::new(Listener));
            }
            let path = mounted.path(FILE);
            fs::read(&path).expect("in the cache from here on");
            for (how, openers) in [(&one, 1), (&many, OPENERS)] {
                let cpu = common::cpu_time();
                results.add(who, how, "1/s", (openers * count) as f64 / seconds_of(&path, openers, count));
                let cost = (common::cpu_time() - cpu).as_secs_f64() * 1e6 / (openers * count) as f64;
                results.add(who, &format!("{how}: us each"), "us", cost);
            }
            if let Some(audit) = audit {
                audit.close();
                let text = fs::read(plan.file.as_deref().expect("a file")).expect("bytes");
                let opened = text.split(|byte| *byte == b'\n').filter(|line| is_open(line)).count() as u64;
                assert_eq!(opened, 1 + (1 + OPENERS) * count, "each open is on record");
            }
            mounted.unmount();
        }
    }
    results.table("opens of a mount, a second", &[&one, &many], Some(NOBODY));
    // What a machine that has other things to do says most about.
    let costs = [&one, &many].map(|how| format!("{how}: us each"));
    results.table("processor time of the mount for an open", &[&costs[0], &costs[1]], Some(NOBODY));
}

fn is_open(line: &[u8]) -> bool {
    line.windows(13).any(|word| word == b"\"kind\":\"open\"")
}

/// Of the slowest of so many processes that open at once.
fn seconds_of(path: &Path, openers: u64, count: u64) -> f64 {
    let program = std::env::current_exe().expect("this binary");
    let start = |_| {
        let mut command = Command::new(&program);
        command.arg("--opener").arg(path).arg(count.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("another process")
    };
    let mut children: Vec<Child> = (0..openers).map(start).collect();
    children.iter_mut().for_each(|child| {
        child.stdin.take().expect("piped").write_all(b"begin\n").expect("it waits");
    });
    let seconds = children.into_iter().map(|child| {
        let output = child.wait_with_output().expect("ends");
        String::from_utf8_lossy(&output.stdout).trim().parse::<f64>().expect("seconds")
    });
    seconds.fold(0.0, f64::max)
}
