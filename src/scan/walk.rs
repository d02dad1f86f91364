//! The order of a scan: which file is looked at by which thread, and what becomes of it.
//!
//! Work is a stack of jobs: a target, a folder of a tree, a blob of an archive whose place in the file is known. Threads
//! take from it until nothing is left and nobody works. An archive that comes through a pipe or a decoder has no places:
//! its blobs are looked at in order, by the thread that reads it.
//! Not here: what of that is told (`tell`).
//! Held by: tests/scan.rs.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::detect::{self, Container, Seen, Verdict};
use super::image::clean;
use super::source::{FileRange, Meter, Piped, Probe, Source, Trouble, Unpacked, broken};
use super::tar::{self, TarReader};
use super::tell::{Found, Seeing, Telling, Unit, closed, folder_of};
use super::{
    Confidence, FINDINGS_MAX, Finding, Format, Looked, Report, ScanPlan, Step, UNREAD_MAX, Unread, shown, zip,
};
use crate::crypto::FileHasher;
use crate::error::{Code, Error, Result};
use crate::mounts;
use crate::store::beneath;

/// Archives and decoders within each other: `image.tar.gz`, a layer of it that is packed, an archive in that, and one more.
const DEPTH_MAX: usize = 7;

/// JSON documents that are kept for their word on layers: of one file, and of one target.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
const DOCUMENTS_BYTES_MAX: usize = 64 << 20;

/// A layer lies at most so deep in its archive: `blobs/sha256/HEX`.
const LAYER_PARTS_MAX: usize = 3;

/// Below this nothing is said of what cannot be unpacked.
const CLOSED_BYTES_MIN: u64 = 1 << 20;

/// Links of one archive that are kept: of images that share layers.
const LINKS_MAX: usize = 100_000;

/// Folders of models that are remembered.
const FOLDERS_MAX: usize = 1_000_000;

pub(super) fn run(plan: &ScanPlan, progress: &(dyn Fn(Step) + Sync)) -> Result<Report> {
    let deadline = plan.time.map(|time| Instant::now() + time);
    let walk = Walk {
        plan,
        meter: Meter::new(plan.limits, deadline, progress),
        numbers: RandomState::new(),
        targets: plan.targets.iter().map(|path| Target::open(path)).collect::<Result<_>>()?,
        jobs: Mutex::new(Jobs::default()),
        changed: Condvar::new(),
        findings: AtomicU64::new(0),
        mentions: AtomicU64::new(0),
        lost: AtomicU64::new(0),
        mounts_skipped: AtomicU64::new(0),
    };
    walk.lock_jobs().waiting = (0..walk.targets.len()).rev().map(Job::Target).collect();
    std::thread::scope(|scope| {
        for number in 0..plan.threads.max(1) {
            let work = std::thread::Builder::new().name(format!("scan-{number}"));
            if let Err(e) = work.spawn_scoped(scope, || walk.work()) {
                // One thread is enough to come to the end.
                tracing::debug!("a thread fewer for the scan: {e}");
            }
        }
        // Also where no thread could be made.
        walk.work();
    });
    Ok(walk.report())
}

enum Job {
    Target(usize),
    /// A folder of a tree, from the target's root.
    Folder(usize, PathBuf),
    /// A file of a layout.
    File(usize, PathBuf),
    /// A blob of an archive or a layout: its name, and where it lies.
    Blob {
        target: usize,
        key: Vec<u8>,
        file: Arc<File>,
        at: u64,
        len: u64,
    },
}

#[derive(Default)]
struct Jobs {
    waiting: Vec<Job>,
    working: usize,
    out_of_time: bool,
}

struct Walk<'a> {
    plan: &'a ScanPlan,
    meter: Meter<'a>,
    /// Paths are kept as numbers that nobody outside can aim at.
    numbers: RandomState,
    targets: Vec<Target>,
    jobs: Mutex<Jobs>,
    changed: Condvar,
    findings: AtomicU64,
    /// What is told and is no finding.
    mentions: AtomicU64,
    /// Places in archives that could not be read.
    lost: AtomicU64,
    mounts_skipped: AtomicU64,
}

/// One target, and what is known of it so far.
struct Target {
    shown: String,
    input: Input,
    found: Mutex<Found>,
}

enum Input {
    Tree { root: OwnedFd, layout: bool, mounts: HashSet<PathBuf> },
    File { file: Arc<File>, len: u64, name: Vec<u8> },
    Pipe(Mutex<Option<Box<dyn Read + Send>>>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a thread that panicked left is still the truth as far as it got.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- opening ------------------------------------------------------------------------------------------------------------

impl Target {
    fn open(path: &Path) -> Result<Target> {
        let shown = shown(path.as_os_str().as_bytes());
        let input = if path == Path::new("-") {
            Input::Pipe(Mutex::new(Some(Box::new(io::stdin()))))
        } else {
            open(path, &shown)?
        };
        Ok(Target { shown, input, found: Mutex::default() })
    }
}

fn open(path: &Path, shown: &str) -> Result<Input> {
    let wrong = |e: io::Error| {
        let code = if e.kind() == io::ErrorKind::NotFound { Code::NotFound } else { Code::Host };
        Error::new(code, format!("cannot scan {shown}")).with_source(e)
    };
    // Without waiting: a pipe without a writer would hold the scan for ever.
    let file = std::os::unix::fs::OpenOptionsExt::custom_flags(
        std::fs::OpenOptions::new().read(true),
        libc::O_NONBLOCK | libc::O_NOCTTY,
    )
    .open(path)
    .map_err(wrong)?;
    let about = file.metadata().map_err(wrong)?;
    if about.is_dir() {
        let has = |name: &str| path.join(name).symlink_metadata().is_ok_and(|about| about.is_file());
        let layout = has("oci-layout") && has("index.json");
        let canonical = path.canonicalize().map_err(wrong)?;
        let below = mounts::below(&canonical)?.into_iter();
        let mounts = below.filter_map(|(place, _)| Some(place.strip_prefix(&canonical).ok()?.to_owned()));
        let mounts = mounts.filter(|place| place != Path::new("")).collect();
        return Ok(Input::Tree { root: file.into(), layout, mounts });
    }
    if !about.is_file() {
        return Err(Error::new(
            Code::Usage,
            format!("{shown} is neither a folder nor a file; for a pipe, write `-` and give it as standard input"),
        ));
    }
    let name = path.file_name().map_or(&b""[..], |name| name.as_bytes()).to_vec();
    Ok(Input::File { len: about.len(), file: Arc::new(file), name })
}

// ---- work ---------------------------------------------------------------------------------------------------------------

impl<'a> Walk<'a> {
    fn lock_jobs(&self) -> MutexGuard<'_, Jobs> {
        lock(&self.jobs)
    }

    fn push(&self, job: Job) {
        let mut jobs = self.lock_jobs();
        if jobs.out_of_time {
            return;
        }
        jobs.waiting.push(job);
        drop(jobs);
        self.changed.notify_one();
    }

    /// Until nothing is left to do and nobody is left who could find more.
    fn work(&self) {
        loop {
            let job = {
                let mut jobs = self.lock_jobs();
                loop {
                    if let Some(job) = jobs.waiting.pop() {
                        jobs.working += 1;
                        break job;
                    }
                    if jobs.working == 0 {
                        return;
                    }
                    jobs = self.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let _end = Working(self);
            self.job(job);
        }
    }

    fn job(&self, job: Job) {
        match job {
            Job::Target(number) => self.target(number),
            Job::Folder(number, folder) => self.folder(number, &folder),
            Job::File(number, path) => self.layout_file(number, &path),
            Job::Blob { target, key, file, at, len } => {
                let mut unit = Unit::default();
                let mut range = FileRange::new(file.clone(), at, len, &self.meter);
                self.blob(&mut unit, &key, &mut range);
                if self.plan.verify && unit.trouble.is_none() {
                    unit.sha256 = self.hash(FileRange::new(file, at, len, &self.meter), &mut unit.trouble);
                }
                self.keep_blob(target, key, unit);
            }
        }
    }

    /// Stops everything: the time is over.
    fn out_of_time(&self) {
        let mut jobs = self.lock_jobs();
        jobs.out_of_time = true;
        jobs.waiting.clear();
    }

    fn target(&self, number: usize) {
        let target = &self.targets[number];
        match &target.input {
            Input::Tree { .. } => self.folder(number, Path::new("")),
            Input::File { file, len, name } => {
                (self.meter.progress)(Step::Found(*len));
                let mut range = FileRange::new(file.clone(), 0, *len, &self.meter);
                self.whole(number, name, &mut range);
            }
            Input::Pipe(from) => {
                if let Some(from) = lock(from).take() {
                    self.whole(number, b"-", &mut Piped { from, meter: &self.meter });
                }
            }
        }
    }

    /// A target that is a file: an archive, packed or not, or a file like any other.
    fn whole(&self, number: usize, name: &[u8], source: &mut dyn Source) {
        let mut loose = Unit::default();
        let ended = self.outermost(number, name, source, 0, &mut loose);
        if let Err(e) = ended {
            self.unread(number, b"", &Trouble::of(&e));
        }
        if let Some(kind) = loose.closed {
            let why = format!("{}; unpack it and scan what comes out", closed(kind));
            self.unread(number, b"", &Trouble::Broken(why));
        }
        self.keep_loose(number, loose);
    }

    fn outermost(
        &self,
        number: usize,
        name: &[u8],
        source: &mut dyn Source,
        depth: usize,
        loose: &mut Unit,
    ) -> io::Result<()> {
        let mut probe = self.probe(source);
        match detect::look(name, &mut probe, self.plan.min_bytes)? {
            Seen::Container(Container::Packed(packing)) if depth < 2 => {
                self.meter.archives.fetch_add(1, Ordering::Relaxed);
                let mut plain = Unpacked::new(packing, &mut probe, &self.meter)?;
                self.outermost(number, without_ending(name), &mut plain, depth + 1, loose)
            }
            Seen::Container(Container::Tar) => {
                lock(&self.targets[number].found).archive = true;
                self.meter.archives.fetch_add(1, Ordering::Relaxed);
                self.outer_tar(number, &mut probe, depth + 1, loose)
            }
            // The target itself, perhaps behind a packing that is known: nothing of it was seen.
            Seen::Closed(kind) => {
                loose.closed = Some(kind);
                Ok(())
            }
            seen => self.seen(loose, &mut vec![name.to_vec()], &mut probe, seen, depth),
        }
    }

    /// The archive that a target is: each archive in it may be a layer, each document may name layers.
    fn outer_tar(&self, number: usize, source: &mut dyn Source, depth: usize, loose: &mut Unit) -> io::Result<()> {
        let mut reader = TarReader::new(source, &self.meter);
        while let Some(entry) = self.next_entry(loose, &[], &mut reader)? {
            self.meter.entry()?;
            let key = clean(&entry.path);
            match entry.kind {
                tar::Kind::Symlink | tar::Kind::HardLink => {
                    let mut found = lock(&self.targets[number].found);
                    if found.links.len() < LINKS_MAX {
                        // A hard link's name counts from the archive's root.
                        let from_root = if entry.kind == tar::Kind::HardLink { &b"/../../../../"[..] } else { b"" };
                        let link = [from_root, &entry.link].concat();
                        found.links.insert(key, link);
                    }
                }
                tar::Kind::Folder | tar::Kind::Other => {}
                tar::Kind::Behind => self.behind(loose, &[], &mut reader.body(&entry))?,
                tar::Kind::File => {
                    let mut body = reader.body(&entry);
                    self.member(number, key, entry.len, &mut body, depth, loose)?;
                }
            }
        }
        Ok(())
    }

    /// A file of an archive or a layout.
    fn member(
        &self,
        number: usize,
        key: Vec<u8>,
        len: u64,
        source: &mut dyn Source,
        depth: usize,
        loose: &mut Unit,
    ) -> io::Result<()> {
        if self.excluded(&key) {
            return Ok(());
        }
        let parts = key.iter().filter(|byte| **byte == b'/').count() + 1;
        let mut probe = self.probe(source);
        let seen = detect::look(&key, &mut probe, self.plan.min_bytes)?;
        let may_be_document = parts <= LAYER_PARTS_MAX && len <= DOCUMENT_BYTES_MAX;
        match seen {
            // Weights may begin as a document does: the length that some formats begin with can be the number of a brace.
            Seen::Other if may_be_document && is_document(probe.head(64)?) => self.document(number, key, &mut probe),
            Seen::Container(Container::Tar | Container::Packed(_)) if parts <= LAYER_PARTS_MAX => {
                if let Some((file, at)) = probe.place() {
                    (self.meter.progress)(Step::Found(len));
                    self.push(Job::Blob { target: number, key, file, at, len });
                    return Ok(());
                }
                let mut unit = Unit::default();
                self.blob(&mut unit, &key, &mut probe);
                if matches!(unit.trouble, Some(Trouble::Time)) {
                    return Err(Trouble::Time.into());
                }
                if self.plan.verify {
                    unit.trouble = unit.trouble.or(Some(Trouble::Broken(
                        "it cannot be held against its digest in a pipe or a packed archive; unpack it first".into(),
                    )));
                }
                self.keep_blob(number, key, unit);
                Ok(())
            }
            // A layer, perhaps, that engines unpack and we do not; without an image it is a file like any other.
            Seen::Closed(_) if parts <= LAYER_PARTS_MAX => {
                let mut unit = Unit::default();
                let ended = self.seen(&mut unit, &mut Vec::new(), &mut probe, seen, depth);
                self.keep_blob(number, key, unit);
                ended
            }
            seen => {
                if parts <= LAYER_PARTS_MAX && key.starts_with(b"blobs/") {
                    // A blob that is a file by itself, as artifacts have them.
                    let mut unit = Unit::default();
                    let ended = self.seen(&mut unit, &mut Vec::new(), &mut probe, seen, depth);
                    unit.trouble = ended.err().map(|e| Trouble::of(&e));
                    self.keep_blob(number, key, unit);
                    return Ok(());
                }
                let name = key.rsplit(|byte| *byte == b'/').next().unwrap_or(&key);
                if detect::is_model_config(name) {
                    self.note_folder(loose, &key);
                }
                self.seen(loose, &mut vec![key], &mut probe, seen, depth)
            }
        }
    }

    fn document(&self, number: usize, key: Vec<u8>, probe: &mut Probe) -> io::Result<()> {
        let mut text = Vec::new();
        probe.read_to_end(&mut text)?;
        let mut found = lock(&self.targets[number].found);
        let name = key.rsplit(|byte| *byte == b'/').next().unwrap_or(&key);
        if detect::is_model_config(name) {
            let folder = self.number(folder_of(&key));
            found.loose.folders.insert(folder);
        }
        if self.plan.verify
            && let Some(hex) = key.strip_prefix(b"blobs/sha256/")
            && hex != hex::encode(crate::crypto::sha256(&[&text])).as_bytes()
        {
            drop(found);
            self.unread(number, &key, &Trouble::Broken("its content is not what its digest says".into()));
            return Ok(());
        }
        if found.texts_bytes + text.len() <= DOCUMENTS_BYTES_MAX {
            found.texts_bytes += text.len();
            found.texts.insert(key, text);
        }
        Ok(())
    }

    /// One blob to its end: a layer, or a file.
    ///
    /// Whether it is a layer is known only when all documents are read; until then it may be a file like any other, which is
    /// known by its name too.
    fn blob(&self, unit: &mut Unit, key: &[u8], source: &mut dyn Source) {
        let mut probe = self.probe(source);
        unit.name = key.to_vec();
        let ended = detect::look(key, &mut probe, self.plan.min_bytes).and_then(|seen| {
            unit.plain = matches!(seen, Seen::Container(Container::Tar));
            self.seen(unit, &mut Vec::new(), &mut probe, seen, 1)
        });
        unit.trouble = ended.err().map(|e| Trouble::of(&e));
        unit.hides.finish();
    }

    fn hash(&self, mut range: FileRange, trouble: &mut Option<Trouble>) -> Option<[u8; 32]> {
        let mut hasher = FileHasher::new();
        let mut room = vec![0; 64 << 10];
        loop {
            match range.read(&mut room) {
                Ok(0) => return Some(hasher.finish()),
                Ok(n) => hasher.update(&room[..n]),
                Err(e) => {
                    *trouble = Some(Trouble::of(&e));
                    return None;
                }
            }
        }
    }

    fn probe<'s>(&self, source: &'s mut dyn Source) -> Probe<'s> {
        Probe::hashed(source, !self.plan.accept.is_empty())
    }

    // ---- one file ----

    fn file(
        &self,
        unit: &mut Unit,
        places: &mut Vec<Vec<u8>>,
        source: &mut dyn Source,
        depth: usize,
    ) -> io::Result<()> {
        let mut probe = self.probe(source);
        let name = places.last().unwrap_or(&unit.name);
        let seen = detect::look(name, &mut probe, self.plan.min_bytes)?;
        self.seen(unit, places, &mut probe, seen, depth)
    }

    /// What becomes of a file, once it is known what it is. `places` is empty for a blob itself.
    fn seen(
        &self,
        unit: &mut Unit,
        places: &mut Vec<Vec<u8>>,
        probe: &mut Probe,
        seen: Seen,
        depth: usize,
    ) -> io::Result<()> {
        self.meter.files.fetch_add(1, Ordering::Relaxed);
        match seen {
            Seen::Other => Ok(()),
            Seen::Weights(verdict) => self.weights(unit, places, probe, verdict),
            Seen::Closed(kind) => {
                // A layer, perhaps, which then counts as unread. What merely lies somewhere is mentioned, if it is large enough
                // for weights: modules of a kernel are packed so, thousands of them.
                if places.is_empty() {
                    unit.closed = Some(kind);
                }
                let large = probe.known_len().is_none_or(|len| len >= self.plan.min_bytes.max(CLOSED_BYTES_MIN));
                if large && (self.plan.archives || places.is_empty()) {
                    self.mention(unit, places, closed(kind));
                }
                Ok(())
            }
            Seen::Container(_) if !self.plan.archives && !places.is_empty() => Ok(()),
            Seen::Container(_) if depth >= DEPTH_MAX => {
                self.mention(unit, places, "more archives within each other than are looked into".into());
                Ok(())
            }
            Seen::Container(container) => {
                self.meter.archives.fetch_add(1, Ordering::Relaxed);
                let ended = match container {
                    Container::Tar => self.tar(unit, places, probe, depth + 1),
                    Container::Zip => self.zip(unit, places, probe, depth + 1),
                    Container::Packed(packing) => Unpacked::new(packing, probe, &self.meter).and_then(|mut plain| {
                        let name = places.pop();
                        if name.is_none() {
                            unit.name = without_ending(&unit.name).to_vec();
                        }
                        places.extend(name.as_deref().map(|name| without_ending(name).to_vec()));
                        let ended = self.file(unit, places, &mut plain, depth + 1);
                        if let Some(name) = name {
                            places.pop();
                            places.push(name);
                        }
                        ended
                    }),
                };
                let Err(e) = ended else { return Ok(()) };
                match Trouble::of(&e) {
                    // Programs go by the directory at a zip archive's end, past what ended this.
                    Trouble::Broken(why) if container == Container::Zip && depth > 0 => {
                        self.lose(unit, places, format!("a zip archive that is broken from some point on: {why}"));
                        Ok(())
                    }
                    // What lies behind the break is no archive's any more. A layer is another matter, and so is a limit.
                    Trouble::Broken(why) if !places.is_empty() && depth > 0 => {
                        self.mention(unit, places, format!("broken from some point on: {why}"));
                        Ok(())
                    }
                    Trouble::Broken(_) | Trouble::Limit(_) | Trouble::Time | Trouble::Host(_) => Err(e),
                }
            }
        }
    }

    fn tar(&self, unit: &mut Unit, places: &mut Vec<Vec<u8>>, source: &mut dyn Source, depth: usize) -> io::Result<()> {
        // Whiteouts mean something in the layer's own archive.
        let is_layer = places.is_empty();
        let mut reader = TarReader::new(source, &self.meter);
        while let Some(entry) = self.next_entry(unit, places, &mut reader)? {
            self.meter.entry()?;
            if is_layer && !matches!(entry.kind, tar::Kind::Folder | tar::Kind::Behind) {
                unit.hides.note(&entry.path, |path| self.number(path));
            }
            match entry.kind {
                tar::Kind::Folder | tar::Kind::HardLink | tar::Kind::Symlink | tar::Kind::Other => {}
                tar::Kind::Behind => self.behind(unit, places, &mut reader.body(&entry))?,
                tar::Kind::File => {
                    let mut body = reader.body(&entry);
                    self.inner(unit, places, &entry.path, &mut body, depth)?;
                }
            }
        }
        Ok(())
    }

    /// The next entry of a tar. Where other programs may find others, what they find is unread.
    fn next_entry(
        &self,
        unit: &mut Unit,
        places: &[Vec<u8>],
        reader: &mut TarReader,
    ) -> io::Result<Option<tar::Entry>> {
        let next = reader.next();
        if let Some(why) = reader.doubt() {
            self.lose(unit, places, why);
        }
        next
    }

    fn zip(&self, unit: &mut Unit, places: &mut Vec<Vec<u8>>, source: &mut dyn Source, depth: usize) -> io::Result<()> {
        let end = zip::walk(source, &self.meter, &mut |entry, plain| match entry.closed {
            None => match self.inner(unit, places, &entry.name, plain, depth).map_err(|e| (Trouble::of(&e), e)) {
                // Its end is known: what lies behind it is not lost.
                Err((Trouble::Broken(why), _)) if entry.delimited => {
                    places.push(clean(&entry.name));
                    self.mention(unit, places, format!("broken from some point on: {why}"));
                    places.pop();
                    Ok(())
                }
                Err((_, e)) => Err(e),
                Ok(()) => Ok(()),
            },
            Some((why, len)) => {
                if len >= self.plan.min_bytes.max(CLOSED_BYTES_MIN) {
                    places.push(entry.name.clone());
                    self.mention(unit, places, format!("an entry of {len} bytes that is {why}"));
                    places.pop();
                }
                Ok(())
            }
        })?;
        if end == zip::End::Unknown {
            let why =
                "a zip archive with an entry that does not tell where it ends: what lies behind it was not looked at";
            self.lose(unit, places, why.into());
        }
        Ok(())
    }

    /// A file within an archive.
    fn inner(
        &self,
        unit: &mut Unit,
        places: &mut Vec<Vec<u8>>,
        path: &[u8],
        source: &mut dyn Source,
        depth: usize,
    ) -> io::Result<()> {
        let path = clean(path);
        if self.excluded(&path) {
            return Ok(());
        }
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(&path);
        let is_config = detect::is_model_config(name);
        places.push(path);
        if is_config {
            let place = places.join(&b'!');
            self.note_folder(unit, &place);
        }
        let ended = self.file(unit, places, source, depth);
        places.pop();
        ended
    }

    /// Bytes behind an archive's end that are none.
    fn behind(&self, unit: &mut Unit, places: &[Vec<u8>], source: &mut dyn Source) -> io::Result<()> {
        let mut places = places.to_vec();
        places.push(b"(behind the end of the archive)".to_vec());
        let verdict = Verdict {
            format: Format::Archive,
            confidence: Confidence::Info,
            why: "bytes behind the end of an archive, which nothing unpacks".into(),
            beside_config: false,
        };
        let bytes = source.skip(u64::MAX)?;
        self.add(unit, Seeing { places, verdict, bytes: Some(bytes), sha256: None });
        Ok(())
    }

    fn weights(&self, unit: &mut Unit, places: &[Vec<u8>], probe: &mut Probe, verdict: Verdict) -> io::Result<()> {
        let hashed = if verdict.confidence == Confidence::Info { Ok(None) } else { probe.digest() };
        // Without a digest nobody accepted it: it is told, and so is why its end was not reached.
        let (sha256, ended) = hashed.map_or_else(|e| (None, Err(e)), |sha256| (sha256, Ok(())));
        let bytes = probe.known_len();
        self.add(unit, Seeing { places: places.to_vec(), verdict, bytes, sha256 });
        ended
    }

    fn mention(&self, unit: &mut Unit, places: &[Vec<u8>], why: String) {
        let verdict = Verdict { format: Format::Archive, confidence: Confidence::Info, why, beside_config: false };
        self.add(unit, Seeing { places: places.to_vec(), verdict, bytes: None, sha256: None });
    }

    fn lose(&self, unit: &mut Unit, places: &[Vec<u8>], why: String) {
        if self.lost.fetch_add(1, Ordering::Relaxed) < UNREAD_MAX as u64 {
            unit.unread.push((places.to_vec(), why));
        } else {
            unit.unread_untold += 1;
        }
    }

    fn add(&self, unit: &mut Unit, seeing: Seeing) {
        // One that is only mentioned must not take the place of one that counts: each kind has its own room.
        let is_mention = seeing.verdict.confidence == Confidence::Info;
        let (count, room) =
            if is_mention { (&self.mentions, FINDINGS_MAX / 2) } else { (&self.findings, FINDINGS_MAX) };
        if count.fetch_add(1, Ordering::Relaxed) < room as u64 {
            unit.findings.push(seeing);
        } else if !is_mention {
            unit.untold += 1;
        }
    }

    fn note_folder(&self, unit: &mut Unit, path: &[u8]) {
        if unit.folders.len() < FOLDERS_MAX {
            unit.folders.insert(self.number(folder_of(path)));
        }
    }

    fn number(&self, path: &[u8]) -> u64 {
        self.numbers.hash_one(path)
    }

    fn excluded(&self, path: &[u8]) -> bool {
        self.plan.exclude.iter().any(|pattern| pattern.takes(path))
    }

    // ---- trees ----

    fn folder(&self, number: usize, folder: &Path) {
        let Input::Tree { root, layout, mounts } = &self.targets[number].input else {
            unreachable!("only trees have folders")
        };
        let mut loose = Unit::default();
        if let Err(e) = self.list(number, root, *layout, mounts, folder, &mut loose) {
            // A folder that went while the scan came is no trouble; a tree is alive.
            if e.kind() != io::ErrorKind::NotFound {
                self.unread(number, folder.as_os_str().as_bytes(), &Trouble::of(&e));
            }
        }
        self.keep_loose(number, loose);
    }

    fn list(
        &self,
        number: usize,
        root: &OwnedFd,
        layout: bool,
        mounts: &HashSet<PathBuf>,
        folder: &Path,
        loose: &mut Unit,
    ) -> io::Result<()> {
        let here = if folder == Path::new("") { Path::new(".") } else { folder };
        let dir = open_beneath(root, here, libc::O_RDONLY | libc::O_DIRECTORY)?;
        for entry in beneath::read_fd_dir(&dir)? {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            let bytes = path.as_os_str().as_bytes();
            self.meter.entry()?;
            if self.excluded(bytes) {
                continue;
            }
            if mounts.contains(&path) && !self.plan.cross_mounts {
                self.mounts_skipped.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            // Told with the listing: nothing but folders and regular files is ever opened.
            let kind = entry.file_type()?;
            if kind.is_dir() {
                if mounts.contains(&path) && !is_worth_crossing(&dir, &entry.file_name()) {
                    self.mounts_skipped.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                self.push(Job::Folder(number, path));
            } else if kind.is_file() && layout {
                // Opened by whoever takes it: a descriptor for each blob that waits would be too many.
                self.push(Job::File(number, path));
            } else if kind.is_file()
                && let Err(e) = self.tree_file(number, root, layout, &path, loose)
            {
                match Trouble::of(&e) {
                    Trouble::Time => return Err(e),
                    _ if e.kind() == io::ErrorKind::NotFound => {}
                    trouble => self.unread(number, bytes, &trouble),
                }
            }
        }
        Ok(())
    }

    fn layout_file(&self, number: usize, path: &Path) {
        let Input::Tree { root, .. } = &self.targets[number].input else { unreachable!("only trees have layouts") };
        let mut loose = Unit::default();
        if let Err(e) = self.tree_file(number, root, true, path, &mut loose) {
            self.unread(number, path.as_os_str().as_bytes(), &Trouble::of(&e));
        }
        self.keep_loose(number, loose);
    }

    fn tree_file(&self, number: usize, root: &OwnedFd, layout: bool, path: &Path, loose: &mut Unit) -> io::Result<()> {
        let fd = match open_beneath(root, path, libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY) {
            // What is too small for a finding needs no right to be read.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied && !layout && self.is_small(root, path) => {
                self.meter.files.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            opened => opened?,
        };
        let about = beneath::fstat(&fd)?;
        if about.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Ok(());
        }
        let bytes = path.as_os_str().as_bytes();
        if path.file_name().is_some_and(|name| detect::is_model_config(name.as_bytes())) {
            self.note_folder(loose, bytes);
        }
        let len = u64::try_from(about.st_size).unwrap_or(0);
        if len < self.plan.min_bytes && !layout {
            self.meter.files.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        (self.meter.progress)(Step::Found(len));
        let mut range = FileRange::new(Arc::new(File::from(fd)), 0, len, &self.meter);
        let ended = if layout {
            self.member(number, bytes.to_vec(), len, &mut range, 1, loose)
        } else {
            self.file(loose, &mut vec![bytes.to_vec()], &mut range, 1)
        };
        range.skip(u64::MAX)?;
        ended
    }

    fn is_small(&self, root: &OwnedFd, path: &Path) -> bool {
        let about = open_beneath(root, path, libc::O_PATH).and_then(|fd| beneath::fstat(&fd));
        about.is_ok_and(|about| u64::try_from(about.st_size).is_ok_and(|len| len < self.plan.min_bytes))
    }

    // ---- keeping ----

    fn keep_loose(&self, number: usize, unit: Unit) {
        let mut found = lock(&self.targets[number].found);
        let loose = &mut found.loose;
        loose.findings.extend(unit.findings);
        loose.untold += unit.untold;
        loose.unread.extend(unit.unread);
        loose.unread_untold += unit.unread_untold;
        loose.folders.extend(unit.folders);
    }

    fn keep_blob(&self, number: usize, key: Vec<u8>, unit: Unit) {
        if matches!(unit.trouble, Some(Trouble::Time)) {
            self.out_of_time();
        }
        let mut found = lock(&self.targets[number].found);
        // Of two entries with one name an engine takes the last; what is in the first is there all the same.
        match found.blobs.remove(&key) {
            None => drop(found.blobs.insert(key, unit)),
            Some(mut first) => {
                first.findings.extend(unit.findings);
                first.untold += unit.untold;
                first.unread.extend(unit.unread);
                first.unread_untold += unit.unread_untold;
                first.folders.extend(unit.folders);
                first.hides = unit.hides;
                first.trouble = first.trouble.or(unit.trouble);
                first.closed = first.closed.or(unit.closed);
                first.sha256 = unit.sha256;
                first.plain = unit.plain;
                found.blobs.insert(key, first);
            }
        }
    }

    fn unread(&self, number: usize, path: &[u8], trouble: &Trouble) {
        if matches!(trouble, Trouble::Time) {
            return self.out_of_time();
        }
        let target = &self.targets[number];
        let mut found = lock(&target.found);
        if found.unread.len() >= UNREAD_MAX {
            found.unread_untold += 1;
            return;
        }
        found.unread.push(Unread {
            target: target.shown.clone(),
            path: shown(path),
            why: trouble.to_string(),
            hostile: matches!(trouble, Trouble::Limit(_) | Trouble::Broken(_)),
        });
    }

    // ---- telling ----

    fn report(self) -> Report {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let mut report = Report {
            targets: Vec::new(),
            findings: Vec::new(),
            findings_untold: 0,
            accepted: Vec::new(),
            unread: Vec::new(),
            unread_untold: 0,
            complete: !lock(&self.jobs).out_of_time,
            looked: Looked {
                files: get(&self.meter.files),
                entries: get(&self.meter.entries),
                archives: get(&self.meter.archives),
                layers: 0,
                bytes_read: get(&self.meter.read),
                bytes_unpacked: get(&self.meter.unpacked),
                mounts_skipped: get(&self.mounts_skipped),
            },
        };
        let numbers = self.numbers;
        let number = |path: &[u8]| numbers.hash_one(path);
        for target in self.targets {
            let found = target.found.into_inner().unwrap_or_else(PoisonError::into_inner);
            let telling = Telling {
                target: &target.shown,
                number: &number,
                complete: report.complete,
                archives: self.plan.archives,
            };
            let is_file = matches!(target.input, Input::File { .. } | Input::Pipe(_));
            let layout = matches!(target.input, Input::Tree { layout: true, .. });
            telling.tell(found, is_file, layout, &mut report);
        }
        let accept = &self.plan.accept;
        let accepted = |finding: &Finding| {
            finding
                .sha256
                .as_deref()
                .and_then(|hex| hex::decode(hex).ok())
                .is_some_and(|digest| <[u8; 32]>::try_from(digest).is_ok_and(|digest| accept.contains(&digest)))
        };
        (report.accepted, report.findings) = std::mem::take(&mut report.findings).into_iter().partition(accepted);
        report.findings.sort_by(|a, b| {
            let place = |finding: &Finding| {
                let image = finding.layer.as_ref().and_then(|layer| layer.images.first());
                (finding.target.clone(), image.map(|at| (at.image.clone(), at.position)), finding.path.clone())
            };
            b.confidence.cmp(&a.confidence).then_with(|| place(a).cmp(&place(b)))
        });
        report
    }
}

/// Ends a thread's part even where it panicked: the others would wait for ever.
struct Working<'a, 'b>(&'a Walk<'b>);

impl Drop for Working<'_, '_> {
    fn drop(&mut self) {
        self.0.lock_jobs().working -= 1;
        self.0.changed.notify_all();
    }
}

/// `model.tar` of `model.tar.gz`.
fn without_ending(name: &[u8]) -> &[u8] {
    let endings: [&[u8]; 4] = [b".gz", b".tgz", b".zst", b".zstd"];
    endings.iter().find_map(|ending| name.strip_suffix(*ending)).filter(|stem| !stem.is_empty()).unwrap_or(name)
}

/// Whether a file begins as a document of an image does.
fn is_document(head: &[u8]) -> bool {
    let first = head.iter().find(|byte| !byte.is_ascii_whitespace());
    matches!(first, Some(b'{' | b'['))
}

/// Filesystems that hold files, not the kernel's own state; and not a mount of ours, which is where plaintext belongs.
fn is_worth_crossing(dir: &OwnedFd, name: &std::ffi::OsStr) -> bool {
    let Ok(name) = CString::new(name.as_bytes()) else { return false };
    let path = Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(dir).to_string());
    let place = std::fs::read_link(path).map(|dir| dir.join(std::ffi::OsStr::from_bytes(name.to_bytes())));
    let kind = place.ok().and_then(|place| mounts::at(&place).ok().flatten()).map(|mount| mount.kind);
    let kernel = [
        "proc",
        "sysfs",
        "devtmpfs",
        "devpts",
        "cgroup",
        "cgroup2",
        "debugfs",
        "tracefs",
        "securityfs",
        "bpf",
        "mqueue",
        "pstore",
        "configfs",
        "fusectl",
        "efivarfs",
        "binfmt_misc",
        "hugetlbfs",
        "nsfs",
        "fuse.modelfs",
    ];
    kind.is_some_and(|kind| !kernel.contains(&kind.as_str()))
}

fn open_beneath(root: &OwnedFd, path: &Path, flags: i32) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| broken("a path with a NUL"))?;
    beneath::open_beneath(root, &path, flags, 0)
}
