//! Who did what to which model: a log that cannot be changed unseen.
//!
//! ```text
//!  Event ──take──> Record ──Chain──> line ──write(2)──> PATH          (before whoever emitted it goes on)
//!                                     │  └────────────> the journal
//!                     every N records or T seconds: a checkpoint, signed ──fsync──> PATH
//!                                                                          └──────> the checkpoint file, elsewhere
//! ```
//! In: events of `telemetry::events`, an [`AuditPlan`]. Out: JSON lines; each holds the hash of the one before it.
//! Promises: a record is written when [`Sink::take`] returns Ok, and with `audit=required` an Err says that it is not, so
//! that what it tells of does not happen; nor does it where a checkpoint hangs on its way; what could not be recorded is
//! counted, told, and stands in the log as a gap once it can be written again; a checkpoint that is elsewhere names what is
//! on the disk.
//! `record`: one line. `file`: the files. `verify`: what is wrong with a log, and where. `index`, `show`: finding records.
//! Not here: what is an event (whoever emits it), who may read the log (the modes of its files).
//! Spec: docs/AUDIT.md. Held by: the tests of each file, tests/audit.rs, tests/audit.sh; benches/audit.rs for what it costs.

mod file;
pub mod index;
mod journal;
pub mod record;
pub mod show;
pub mod verify;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use file::closed;
use file::{LogFiles, Tail};
use journal::Journal;
use record::{Chain, Link, More, Record, own, stamp};

use crate::config::oversight::{AuditMode, AuditPlan};
use crate::crypto::SigningKey;
use crate::error::{Code, Error, Result};
use crate::keys;
use crate::processes;
use crate::telemetry::Telemetry;
use crate::telemetry::events::{Actor, Event, Kind, Severity, Sink};

/// How often files are looked for that are older than they are to be kept.
const RETENTION_LOOK: Duration = Duration::from_secs(3600);

/// How long after a checkpoint did not reach the disk it is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The end of a process waits so long for its last checkpoint. An unmount before it waits up to 10 s for readers; both are over
/// before systemd kills (modelfs@.service: TimeoutStopSec).
const END_WAIT: Duration = Duration::from_secs(10);

/// Whoever finds that the thread hangs looks again so many times, so long after one another.
const LOOKS: u32 = 10;
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A failure that goes on is told again after this.
const TELL_AGAIN: Duration = Duration::from_secs(60);

/// The log of one process.
pub struct Audit {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    plan: AuditPlan,
    key: Option<SigningKey>,
    writer: Mutex<Writer>,
    work: Mutex<Work>,
    wake: Condvar,
    /// Where failures are counted. It holds us as one of its sinks.
    telemetry: Weak<Telemetry>,
}

/// Everything that a record needs in order to be written.
struct Writer {
    chain: Chain,
    files: Option<LogFiles>,
    journal: Option<Journal>,
    line: Vec<u8>,
    /// Events since the last checkpoint.
    since: u64,
    /// The next thing written is a checkpoint: a new process says what it found, and one that failed is made up for.
    owed: bool,
    begun: bool,
    /// Events that could not be recorded, and since when.
    lost: u64,
    lost_since: Option<String>,
    told: Option<Instant>,
    /// When a full file could not be closed.
    stuck: Option<Instant>,
}

/// What goes on beside the records: nobody waits for it.
#[derive(Default)]
struct Work {
    /// The newest checkpoint of the file that is written.
    sync: Option<Sync>,
    /// Files that were closed, with their last checkpoint.
    closed: Vec<(PathBuf, Sync)>,
    /// When the next checkpoint is due.
    due: Option<Instant>,
    /// Since when the oldest of the above waits, and the oldest that the thread has taken and not brought to its end.
    handed: Option<Instant>,
    taken: Option<Instant>,
    /// Since when the thread is at the piece of work that it is at; None while it waits for some.
    busy: Option<Instant>,
    /// The piece that it was found to hang in.
    hangs: Option<Instant>,
    /// Why the last checkpoint is not on the disk, or not elsewhere.
    failed: Option<Error>,
    stop: bool,
    /// The thread is gone.
    ended: bool,
}

impl Work {
    /// Since when the oldest checkpoint is on its way.
    fn since(&self) -> Option<Instant> {
        self.taken.or(self.handed)
    }

    /// The piece of work that the thread has been at for longer than `most`.
    fn late(&self, most: Duration) -> Option<Instant> {
        self.busy.filter(|since| !self.ended && since.elapsed() > most)
    }
}

/// Says that the thread is gone, however it went.
struct Ending<'s>(&'s Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.work.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.0.wake.notify_all();
    }
}

/// A checkpoint whose records are to be on the disk before it is told elsewhere.
struct Sync {
    /// None where the journal is the log.
    file: Option<Arc<File>>,
    /// Its line, where it is signed.
    line: Option<Vec<u8>>,
}

/// This process, as who did something.
pub fn this_process() -> Actor {
    let pid = std::process::id();
    let process = processes::process(pid);
    // SAFETY: these calls only read this process's credentials.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    Actor {
        uid: Some(uid),
        gid: Some(gid),
        pid: Some(pid),
        command: Some(process.command),
        exe: process.exe,
        cgroup: process.cgroup,
        container: process.container,
        pod: process.pod,
        pod_name: None,
        service_account: None,
    }
}

/// Opens the log that `plan` asks for, if any, makes it a sink of `telemetry`, and records that this process has started.
///
/// # Errors
/// `AUDIT` if the log cannot be opened; with `audit=required` also if it cannot be written. Those of the key.
pub fn start(plan: &AuditPlan, telemetry: &Arc<Telemetry>) -> Result<Option<Arc<Audit>>> {
    if plan.mode == AuditMode::Off {
        return Ok(None);
    }
    let (audit, found) = Audit::open(plan, Arc::downgrade(telemetry))?;
    let audit = Arc::new(audit);
    telemetry.events.add(audit.clone());
    let version = concat!("modelfs ", env!("CARGO_PKG_VERSION"));
    telemetry.events.emit(&Event::new(Kind::Start).actor(this_process()).detail(version))?;
    if let Some(found) = found {
        telemetry.events.emit(&found)?;
    }
    Ok(Some(audit))
}

impl Audit {
    /// Opens the log for writing. Also what was found to be wrong with it.
    ///
    /// # Errors
    /// As [`start`].
    pub fn open(plan: &AuditPlan, telemetry: Weak<Telemetry>) -> Result<(Audit, Option<Event>)> {
        let key = plan.key.as_deref().map(keys::load_signing_key).transpose();
        let key = key.map_err(|error| error.context("the key that signs checkpoints cannot be used (audit-key)"))?;
        let (files, tail) = match &plan.file {
            Some(path) => {
                let (files, tail) = LogFiles::open(path)?;
                (Some(files), tail)
            }
            None => (None, None),
        };
        let journal = if plan.journal { Some(Journal::open()?) } else { None };
        let chain = match &tail {
            Some(tail) => Chain { log: tail.log.clone(), seq: tail.seq + 1, prev: tail.hash },
            None => Chain::new()?,
        };
        let found = found(plan, tail.as_ref());
        let writer = Writer {
            begun: files.is_some() || tail.is_some(),
            chain,
            files,
            journal,
            line: Vec::new(),
            since: 0,
            owed: tail.is_some(),
            lost: 0,
            lost_since: None,
            told: None,
            stuck: None,
        };
        let shared = Arc::new(Shared {
            plan: plan.clone(),
            key,
            writer: Mutex::new(writer),
            work: Mutex::default(),
            wake: Condvar::new(),
            telemetry,
        });
        let worker = std::thread::Builder::new().name("audit".into()).spawn({
            let shared = shared.clone();
            move || shared.work()
        });
        let worker =
            worker.map_err(|e| Error::new(Code::Host, "cannot start the thread of the audit log").with_source(e))?;
        Ok((Audit { shared, worker: Mutex::new(Some(worker)) }, found))
    }

    /// The end: a last checkpoint, on the disk and elsewhere. Records that come later are written all the same. A disk or a
    /// share that hangs holds the end up for 10 s and no longer.
    pub fn close(&self) {
        let Some(worker) = self.worker.lock().expect("a thread died ending the audit log").take() else { return };
        let shared = self.shared.clone();
        if let Err(error) = std::thread::Builder::new().name("audit-end".into()).spawn(move || shared.end()) {
            tracing::debug!("no thread for the end of the audit log: {error}");
            self.shared.end();
        }
        // The last to let go of a sink may be its own thread.
        if worker.thread().id() == std::thread::current().id() {
            return;
        }
        let work = self.shared.work.lock().expect("a thread died holding the audit work");
        let (work, _) = (self.shared.wake.wait_timeout_while(work, END_WAIT, |work| !work.ended))
            .expect("a thread died holding the audit work");
        let ended = work.ended;
        drop(work);
        if !ended {
            tracing::error!(
                "the end of the audit log is left to itself: a disk or share of it has not answered for {} s",
                END_WAIT.as_secs()
            );
        } else if worker.join().is_err() {
            tracing::error!("the thread of the audit log died");
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.close();
    }
}

impl Sink for Audit {
    fn take(&self, event: &Event) -> Result<()> {
        self.shared.take(event)
    }
}

/// What a restart finds wrong: a piece of a line, or less than what was told elsewhere.
fn found(plan: &AuditPlan, tail: Option<&Tail>) -> Option<Event> {
    let path = plan.file.as_deref()?.display();
    if let Some(torn) = tail.and_then(|tail| tail.torn.as_ref()) {
        tracing::warn!("audit log {path} ends with {} bytes that are no record: closed off", torn.bytes);
    }
    let elsewhere = plan.checkpoint_file.as_deref()?;
    let known = match file::tail_of(elsewhere) {
        Ok(Some(known)) => known,
        // None yet, or a pipe that cannot be read.
        Ok(None) | Err(_) => return None,
    };
    let detail = match tail {
        Some(tail) if tail.log != known.log => {
            format!("audit log {path} is log {}; {} speaks of log {}", tail.log, elsewhere.display(), known.log)
        }
        Some(tail) if tail.seq < known.seq => format!(
            "audit log {path} ends with record {}, {} holds checkpoint {}: its end was cut",
            tail.seq,
            elsewhere.display(),
            known.seq
        ),
        None => format!("audit log {path} is not there, {} speaks of log {}", elsewhere.display(), known.log),
        Some(_) => return None,
    };
    tracing::error!("{detail}");
    let error = Error::new(Code::AuditChain, detail);
    Some(Event::new(Kind::Tamper).error(&error))
}

impl Shared {
    fn writer(&self) -> MutexGuard<'_, Writer> {
        // A panic between two stores could leave a chain that does not hold; nobody goes on with it.
        self.writer.lock().expect("a thread died writing the audit log")
    }

    fn required(&self) -> bool {
        self.plan.mode == AuditMode::Required
    }

    fn take(&self, event: &Event) -> Result<()> {
        let (failed, stuck) = self.not_synced();
        let mut writer = self.writer();
        let recorded = match (failed.or_else(|| stuck.clone()), stuck) {
            (Some(error), _) if self.required() => Err(error),
            (_, stuck) => {
                // What fails, the thread tells; what hangs, nobody else can.
                if let Some(error) = stuck.filter(|_| writer.told.is_none_or(|told| told.elapsed() > TELL_AGAIN)) {
                    self.tell(&mut writer, &error);
                }
                self.pay(&mut writer).and_then(|()| self.put(&mut writer, &mut Record::of(event)))
            }
        };
        let Err(error) = recorded else {
            if let Some(telemetry) = self.telemetry.upgrade() {
                telemetry.audit_records.inc();
                telemetry.audit_waiting.set(writer.since + 1);
            }
            writer.since += 1;
            if writer.since >= self.plan.checkpoint_records {
                writer.owed = true;
                // The record itself is written; a checkpoint that is not is made up for before the next one.
                if let Err(error) = self.pay(&mut writer) {
                    self.tell(&mut writer, &error);
                }
            } else if writer.since == 1 {
                self.work.lock().expect("a thread died holding the audit work").due =
                    Some(Instant::now() + self.plan.checkpoint_every);
                self.wake.notify_all();
            }
            return Ok(());
        };
        writer.lost += 1;
        if writer.lost_since.is_none() {
            writer.lost_since = Some(stamp(record::now()));
        }
        self.tell(&mut writer, &error);
        if self.required() {
            let what = format!("{} is refused: it cannot be recorded, and audit=required", event.kind.name());
            return Err(error.context(what));
        }
        Ok(())
    }

    /// Why the last checkpoint is not where it belongs, and, where nobody says why, that the thread hangs on its way there, in
    /// a disk or a share that answers neither yes nor no. Nobody may hold the writer: the thread may wait for it.
    ///
    /// The clock goes on while a process is frozen as a whole (a container that is paused, SIGSTOP), and says nothing of a disk
    /// then. So whoever finds the thread late first gives it a second in which it need only be seen to come on; a share that
    /// hangs costs that once. In pieces: a second that passes in one go may be one of those in which nothing ran.
    fn not_synced(&self) -> (Option<Error>, Option<Error>) {
        let most = self.plan.refuse_after;
        let mut work = self.work.lock().expect("a thread died holding the audit work");
        let mut late = work.late(most);
        for _ in 0..LOOKS {
            if late.is_none() || work.hangs == late {
                break;
            }
            work = (self.wake.wait_timeout_while(work, LOOK_AGAIN, |work| work.busy == late && !work.ended))
                .expect("a thread died holding the audit work")
                .0;
            late = work.late(most).filter(|since| late == Some(*since));
        }
        work.hangs = late;
        let stuck = late.map(|since| {
            let places = [&self.plan.file, &self.plan.checkpoint_file];
            let places: Vec<String> = places.into_iter().flatten().map(|path| path.display().to_string()).collect();
            let (seconds, places) = (since.elapsed().as_secs(), places.join(" and "));
            Error::new(
                Code::Audit,
                format!("a checkpoint has been on its way for {seconds} s; look whether the disk of {places} answers"),
            )
        });
        (work.failed.clone(), stuck)
    }

    /// The thread begins another piece of work.
    fn comes_on(&self) {
        self.work.lock().expect("a thread died holding the audit work").busy = Some(Instant::now());
        self.wake.notify_all();
    }

    /// Gives the thread something to bring to the disk.
    fn hand_over(&self, give: impl FnOnce(&mut Work)) {
        self.change(|work| {
            give(work);
            work.due = None;
            work.handed.get_or_insert_with(Instant::now);
        });
        self.wake.notify_all();
    }

    /// Changes what is on its way, and shows since when something is, before anybody else can change it: of two who show it
    /// later, the one with the older word may be the last.
    fn change(&self, change: impl FnOnce(&mut Work)) {
        let unix = |since: Instant| (record::now() / 1_000_000).saturating_sub(since.elapsed().as_secs()).max(1);
        // Let go of when nothing is locked any more: ours may be the last hold on our own sink.
        let telemetry = self.telemetry.upgrade();
        let mut work = self.work.lock().expect("a thread died holding the audit work");
        change(&mut work);
        if let Some(telemetry) = &telemetry {
            telemetry.audit_pending_since.set(work.since().map_or(0, unix));
        }
        drop(work);
    }

    /// A last checkpoint, then the thread may go.
    fn end(&self) {
        {
            let mut writer = self.writer();
            if writer.since > 0 || writer.owed {
                writer.owed = true;
                if let Err(error) = self.pay(&mut writer) {
                    tracing::error!("the audit log has no last checkpoint: {}", error.chain());
                }
            }
        }
        self.work.lock().expect("a thread died holding the audit work").stop = true;
        self.wake.notify_all();
    }

    fn tell(&self, writer: &mut Writer, error: &Error) {
        if let Some(telemetry) = self.telemetry.upgrade() {
            telemetry.audit_failures.inc();
        }
        if writer.told.is_none_or(|told| told.elapsed() > TELL_AGAIN) {
            writer.told = Some(Instant::now());
            let then = if self.required() { "what cannot be recorded is refused" } else { "it goes on all the same" };
            tracing::error!("the audit log is not written, {then}: {}", error.chain());
        }
    }

    /// Whatever must stand in the log before the next record.
    fn pay(&self, writer: &mut Writer) -> Result<()> {
        if let Some(files) = &mut writer.files
            && let Some(torn) = files.spoiled()?
        {
            let (bytes, sha256) = (Some(torn.bytes), Some(hex::encode(torn.sha256).into()));
            let more = More { bytes, sha256, ..More::default() };
            self.put(writer, &mut Record::own(own::TORN, more).severity(Severity::Medium))?;
        }
        // A file that is closed ends with a checkpoint; the one that begins after it is owed its own, or the head of a log
        // that ends here would be vouched for by nothing.
        let owed = writer.owed;
        self.rotate(writer)?;
        writer.owed |= owed;
        if writer.lost > 0 {
            let (since, lost) = (writer.lost_since.clone().unwrap_or_default(), writer.lost);
            let then = if self.required() { "they were refused, as far as they could be" } else { "they went on" };
            let detail = format!("{lost} events since {since} could not be recorded; {then}");
            let more = More { records: Some(lost), detail: Some(detail.into()), ..More::default() };
            self.put(writer, &mut Record::own(own::GAP, more).severity(Severity::High))?;
            tracing::warn!("the audit log is written again; {lost} events are not in it");
            (writer.lost, writer.lost_since, writer.told) = (0, None, None);
        }
        if writer.owed {
            let sync = self.checkpoint(writer)?;
            self.hand_over(|work| work.sync = Some(sync));
        }
        Ok(())
    }

    /// A file to write to, with its head; a full one is closed first.
    fn rotate(&self, writer: &mut Writer) -> Result<()> {
        let full =
            writer.files.as_ref().is_some_and(|files| files.is_begun() && files.len() >= self.plan.file_bytes_max);
        if full && writer.stuck.is_none_or(|since| since.elapsed() > TELL_AGAIN) {
            let sync = self.checkpoint(writer)?;
            let files = writer.files.as_mut().expect("it is full");
            match files.close() {
                Ok((path, file)) => {
                    let sync = Sync { file: Some(file), ..sync };
                    self.hand_over(|work| {
                        work.sync = None;
                        work.closed.push((path, sync));
                    });
                }
                // Better one long file than none.
                Err(error) => {
                    writer.stuck = Some(Instant::now());
                    self.tell(writer, &error);
                }
            }
        }
        match &mut writer.files {
            Some(files) if !files.is_begun() => files.begin()?,
            Some(files) if files.len() > 0 => return Ok(()),
            Some(_) => {}
            None if writer.begun => return Ok(()),
            None => {}
        }
        let number = writer.files.as_ref().map_or(1, LogFiles::number);
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let detail = concat!("modelfs ", env!("CARGO_PKG_VERSION"));
        let more = More {
            number: Some(number),
            boot: Some(boot.trim().to_owned().into()),
            detail: Some(detail.into()),
            ..More::default()
        };
        self.put(writer, &mut Record::own(own::HEAD, more))?;
        writer.begun = true;
        Ok(())
    }

    /// Writes one record. The chain goes on only if it is written.
    fn put(&self, writer: &mut Writer, record: &mut Record<'_>) -> Result<()> {
        let mut line = std::mem::take(&mut writer.line);
        match (&self.key, &*record.kind) {
            (Some(key), own::CHECKPOINT) => writer.chain.signed_line(record, key, &mut line),
            _ => writer.chain.line(record, &mut line),
        }
        let written = match (&mut writer.files, &mut writer.journal) {
            (Some(files), _) => files.append(&line),
            (None, Some(journal)) => journal.send(record, &line),
            (None, None) => unreachable!("config gives a log a place"),
        };
        if written.is_ok() {
            writer.chain.advance(&line);
            // Beside a file the journal is a copy, which holds nothing up.
            if let (Some(_), Some(journal)) = (&writer.files, &mut writer.journal)
                && let Err(error) = journal.send(record, &line)
            {
                self.tell(writer, &error);
            }
        }
        writer.line = line;
        written
    }

    fn checkpoint(&self, writer: &mut Writer) -> Result<Sync> {
        let more = More { records: Some(writer.since), due: Some(self.plan.checkpoint_records), ..More::default() };
        self.put(writer, &mut Record::own(own::CHECKPOINT, more))?;
        (writer.since, writer.owed) = (0, false);
        if let Some(telemetry) = self.telemetry.upgrade() {
            telemetry.audit_waiting.set(0);
        }
        let line = self.key.as_ref().map(|_| writer.line.clone());
        Ok(Sync { file: writer.files.as_ref().and_then(LogFiles::file).cloned(), line })
    }

    /// The thread: what nobody waits for.
    fn work(&self) {
        let _ending = Ending(self);
        let mut elsewhere = self.plan.checkpoint_file.clone().map(Elsewhere::new);
        let mut look = Instant::now();
        let mut pending: Vec<(Option<PathBuf>, Sync)> = Vec::new();
        loop {
            let (due, stop) = {
                let mut work = self.work.lock().expect("a thread died holding the audit work");
                work.busy = None;
                self.wake.notify_all();
                loop {
                    let now = Instant::now();
                    let until = work.due.map_or(look, |due| due.min(look));
                    let until = if pending.is_empty() { until } else { until.min(now + RETRY) };
                    if work.sync.is_some() || !work.closed.is_empty() || work.stop || until <= now {
                        break;
                    }
                    work = self.wake.wait_timeout(work, until - now).expect("a thread died holding the audit work").0;
                    if !pending.is_empty() {
                        break;
                    }
                }
                pending.extend(work.closed.drain(..).map(|(path, sync)| (Some(path), sync)));
                if let Some(sync) = work.sync.take() {
                    // What was not told yet of the same file is told with it.
                    pending.retain(|(path, _)| path.is_some());
                    pending.push((None, sync));
                }
                work.busy = Some(Instant::now());
                let handed = work.handed.take();
                work.taken = work.taken.or(handed);
                let due = work.due.is_some_and(|due| due <= Instant::now());
                if due {
                    work.due = None;
                }
                (due, work.stop)
            };
            let mut failed = None;
            pending.retain(|(path, sync)| {
                self.comes_on();
                match self.finish(path.as_deref(), sync, elsewhere.as_mut()) {
                    Ok(()) => {
                        if path.is_some() {
                            look = Instant::now();
                        }
                        false
                    }
                    Err(error) => {
                        failed.get_or_insert(error);
                        true
                    }
                }
            });
            if let Some(error) = &failed {
                let mut writer = self.writer();
                self.tell(&mut writer, error);
            }
            self.change(|work| {
                work.failed = failed;
                if pending.is_empty() {
                    work.taken = None;
                }
            });
            self.comes_on();
            if due {
                let mut writer = self.writer();
                if writer.since > 0 {
                    writer.owed = true;
                    if let Err(error) = self.pay(&mut writer) {
                        self.tell(&mut writer, &error);
                        self.work.lock().expect("a thread died holding the audit work").due =
                            Some(Instant::now() + self.plan.checkpoint_every);
                    }
                }
            }
            if look <= Instant::now() {
                // One at a time: what removes it is to be on the disk before the next, and a checkpoint that was handed over
                // meanwhile waits for one file and not for hundreds. An end waits for no more than that either.
                self.comes_on();
                let more = self.retain() && !stop;
                look = Instant::now()
                    + match more {
                        true if pending.is_empty() => Duration::ZERO,
                        true => RETRY,
                        false => RETENTION_LOOK,
                    };
            }
            let work = self.work.lock().expect("a thread died holding the audit work");
            if stop && work.sync.is_none() && work.closed.is_empty() {
                return;
            }
        }
    }

    /// Puts a checkpoint onto the disk, then elsewhere.
    fn finish(&self, closed: Option<&Path>, sync: &Sync, elsewhere: Option<&mut Elsewhere>) -> Result<()> {
        let failed = |error| Error::new(Code::Audit, "a checkpoint did not reach the disk").with_source(error);
        sync.file.as_ref().map_or(Ok(()), |file| file.sync_data()).map_err(failed)?;
        if let (Some(line), Some(elsewhere)) = (&sync.line, elsewhere) {
            elsewhere.append(line)?;
        }
        if let Some(path) = closed {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
            // `audit show` makes what is missing itself.
            let path = path.to_owned();
            let made = std::thread::Builder::new().name("audit-index".into()).spawn(move || {
                if let Err(error) = index::Index::of(&path) {
                    tracing::debug!("no index of {}: {}", path.display(), error.chain());
                }
            });
            drop(made);
        }
        Ok(())
    }

    /// Removes the oldest closed file if its last record is older than it is to be kept, with a record of that. Whether it did.
    fn retain(&self) -> bool {
        let (Some(keep), Some(path)) = (self.plan.keep, &self.plan.file) else { return false };
        let oldest = record::now().saturating_sub(u64::try_from(keep.as_micros()).unwrap_or(u64::MAX));
        let files = match file::closed(path) {
            Ok(files) => files,
            Err(error) => {
                tracing::warn!("old audit files are not looked for: {}", error.chain());
                return false;
            }
        };
        // In order: a log without its middle would look like one that was tampered with.
        let Some((number, path)) = files.into_iter().next() else { return false };
        let Ok(Some((tail, Some(last)))) = file::tail_and_time_of(&path) else { return false };
        if last >= oldest {
            return false;
        }
        let mut writer = self.writer();
        let detail = format!("{} was older than it is to be kept, and is removed", path.display());
        let more = More {
            number: Some(number),
            last: Some(tail.seq),
            sha256: Some(hex::encode(tail.hash).into()),
            detail: Some(detail.into()),
            ..More::default()
        };
        let told = self.pay(&mut writer).and_then(|()| self.put(&mut writer, &mut Record::own(own::REMOVED, more)));
        // Signed before the file goes: whoever verifies the log believes no other record of it.
        let told = told.and_then(|()| {
            writer.owed = true;
            self.pay(&mut writer)
        });
        drop(writer);
        let gone = told.and_then(|()| {
            let _ = std::fs::remove_file(file::beside(&path, "index"));
            std::fs::remove_file(&path)
                .map_err(|e| Error::new(Code::Audit, format!("cannot remove {}", path.display())).with_source(e))
        });
        match gone {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!("an old audit file stays: {}", error.chain());
                false
            }
        }
    }
}

/// Where checkpoints are told a second time.
struct Elsewhere {
    path: PathBuf,
    file: Option<File>,
    /// A piece of a line is at its end.
    torn: bool,
}

impl Elsewhere {
    fn new(path: PathBuf) -> Elsewhere {
        Elsewhere { path, file: None, torn: false }
    }

    fn append(&mut self, line: &[u8]) -> Result<()> {
        self.try_append(line).map_err(|error| {
            // It may be another file by now, or a pipe with a new reader.
            self.file = None;
            Error::new(Code::Audit, format!("cannot write a checkpoint to {}", self.path.display())).with_source(error)
        })
    }

    fn try_append(&mut self, line: &[u8]) -> std::io::Result<()> {
        if self.file.is_none() {
            let mut options = OpenOptions::new();
            // A pipe without a reader, or one that is full, must not hold us up.
            options.append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
            self.file = Some(options.open(&self.path)?);
        }
        let file = self.file.as_mut().expect("opened above");
        let start = if self.torn { &b"\n"[..] } else { b"" };
        let written = file.write(&[start, line].concat())?;
        let whole = written == start.len() + line.len();
        self.torn = !whole;
        match file.sync_data() {
            // Not on every kind of file.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EROFS)) => {}
            synced => synced?,
        }
        if whole { Ok(()) } else { Err(std::io::ErrorKind::WriteZero.into()) }
    }
}

/// Whether a line is a record, for tests and tools that read logs.
pub fn is_record(line: &[u8]) -> bool {
    Link::of(line).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(folder: &Path) -> Audit {
        let plan = AuditPlan {
            mode: AuditMode::Required,
            file: Some(folder.join("log")),
            checkpoint_records: 1,
            refuse_after: Duration::from_millis(20),
            ..AuditPlan::default()
        };
        Audit::open(&plan, Weak::new()).expect("opened").0
    }

    /// What the thread was handed is done, however slow the disk, and it waits for more.
    fn comes_to_its_end(audit: &Audit) {
        let waits = |work: &Work| work.since().is_none() && work.busy.is_none();
        let deadline = Instant::now() + Duration::from_secs(120);
        while !waits(&audit.shared.work.lock().expect("nobody died")) {
            assert!(Instant::now() < deadline, "the thread comes to no end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// As the thread was when the whole process was frozen, and is when it runs again.
    fn at_work_since_long(audit: &Audit) {
        comes_to_its_end(audit);
        audit.take(&Event::new(Kind::Open)).expect("recorded");
        comes_to_its_end(audit);
        audit.shared.comes_on();
        std::thread::sleep(Duration::from_millis(50));
    }

    #[test]
    fn a_thread_that_was_frozen_with_all_others_is_given_the_time_to_go_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let audit = opened(folder.path());
        at_work_since_long(&audit);
        std::thread::scope(|scope| {
            let shared = &audit.shared;
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(150));
                shared.work.lock().expect("nobody died").busy = None;
                shared.wake.notify_all();
            });
            audit.take(&Event::new(Kind::Open)).expect("recorded as soon as it goes on");
        });
    }

    #[test]
    fn a_thread_that_hangs_refuses_after_a_second_and_then_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let audit = opened(folder.path());
        at_work_since_long(&audit);
        let began = Instant::now();
        let error = audit.take(&Event::new(Kind::Open)).expect_err("nobody goes on");
        assert!(error.chain().contains("on its way"), "{error:?}");
        let first = began.elapsed();
        let again = || {
            let began = Instant::now();
            audit.take(&Event::new(Kind::Open)).expect_err("still nobody");
            began.elapsed()
        };
        // A machine that stands still may be slow once.
        assert!((0..5).any(|_| again() < first) && first >= LOOK_AGAIN * LOOKS / 2, "{first:?}");
        audit.shared.work.lock().expect("nobody died").busy = None;
        audit.take(&Event::new(Kind::Open)).expect("recorded");
    }
}
