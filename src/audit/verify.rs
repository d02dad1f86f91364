//! Whether a log is the one that was written; if not, the first line that is wrong, and what was done to it.
//!
//! In: files of one log, public keys that may have signed its checkpoints, checkpoints that were kept elsewhere. Out: a
//! [`Report`]. Nothing beside these files is believed, no index among them.
//! Promises: every line is looked at, each against the one before; a line is called by its file and number, as an editor
//! counts; what cannot be told is said: without a checkpoint from elsewhere a tail that was cut leaves no trace, and without
//! a key whoever can write the log can write another.
//! Spec: docs/AUDIT.md. Held by: tests/audit.rs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::record::{LINE_BYTES_MAX, Link, hash_of, is_signed_by, own};
use crate::crypto::{PublicKey, sha256};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// How far a torn piece may reach.
const TORN_BYTES_MAX: usize = 8 << 20;

/// As often a log that begins new files meanwhile is looked at.
const LOOKS_MAX: usize = 5;

/// What was done to a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// The line is not the one that was written.
    Edited,
    /// Records that were there are not.
    Deleted,
    /// The line was written elsewhere in the log.
    Reordered,
    /// The line is a copy of another one.
    Duplicated,
    /// A line that was never written stands between two that were.
    Inserted,
    /// The log ends before it should.
    Truncated,
    /// The line is of another log.
    Spliced,
    /// The log holds together, and is not the one that a checkpoint elsewhere was made of.
    Rewritten,
    /// A checkpoint is signed by nobody whom we trust, or not at all.
    Unsigned,
}

impl Fault {
    pub const fn name(self) -> &'static str {
        match self {
            Fault::Edited => "edited",
            Fault::Deleted => "deleted",
            Fault::Reordered => "reordered",
            Fault::Duplicated => "duplicated",
            Fault::Inserted => "inserted",
            Fault::Truncated => "truncated",
            Fault::Spliced => "spliced",
            Fault::Rewritten => "rewritten",
            Fault::Unsigned => "unsigned",
        }
    }
}

/// The first thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bad {
    pub fault: Fault,
    pub file: PathBuf,
    /// From 1.
    pub line: u64,
    pub why: String,
}

/// What a log says of itself.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    pub log: String,
    pub files: Vec<PathBuf>,
    pub records: u64,
    /// Number and time of the first record, and of the last.
    pub first: u64,
    pub last: u64,
    pub since: String,
    pub until: String,
    pub checkpoints_signed: u64,
    pub checkpoints_unsigned: u64,
    /// Who signed.
    pub signers: Vec<String>,
    /// Of the checkpoints kept elsewhere, those that the log holds.
    pub elsewhere: u64,
    /// Records after the last checkpoint that is signed or kept elsewhere: nothing but the next line vouches for them.
    pub uncovered: u64,
    /// What is no fault and worth knowing.
    pub notes: Vec<String>,
    pub bad: Option<Bad>,
}

/// A line where it lies.
struct Line {
    file: usize,
    number: u64,
    bytes: Vec<u8>,
    /// It ends in a newline.
    ended: bool,
}

/// The lines of some files, one after the other.
struct Lines<'f> {
    files: &'f [PathBuf],
    next: usize,
    number: u64,
    reader: Option<BufReader<File>>,
    /// The last file, open already.
    last: Option<File>,
    /// Lines that were looked at before their turn.
    ahead: std::collections::VecDeque<Line>,
}

impl<'f> Lines<'f> {
    fn new(files: &'f [PathBuf], last: Option<File>) -> Lines<'f> {
        Lines { files, next: 0, number: 0, reader: None, last, ahead: Default::default() }
    }

    fn read(&mut self) -> Result<Option<Line>> {
        loop {
            if self.reader.is_none() {
                let Some(path) = self.files.get(self.next) else { return Ok(None) };
                let is_last = self.next + 1 == self.files.len();
                let file = match self.last.take_if(|_| is_last) {
                    Some(last) => last,
                    None => open(path)?,
                };
                self.reader = Some(BufReader::with_capacity(1 << 20, file));
                (self.next, self.number) = (self.next + 1, 0);
            }
            let reader = self.reader.as_mut().expect("opened above");
            let mut bytes = Vec::with_capacity(512);
            // A line without an end is refused by its length, not read into memory.
            let mut bounded = std::io::Read::take(reader, TORN_BYTES_MAX as u64);
            let read = bounded.read_until(b'\n', &mut bytes);
            if read.map_err(|error| unreadable(&self.files[self.next - 1], error))? == 0 {
                self.reader = None;
                continue;
            }
            let ended = bytes.pop_if(|byte| *byte == b'\n').is_some();
            self.number += 1;
            return Ok(Some(Line { file: self.next - 1, number: self.number, bytes, ended }));
        }
    }

    fn next(&mut self) -> Result<Option<Line>> {
        match self.ahead.pop_front() {
            Some(line) => Ok(Some(line)),
            None => self.read(),
        }
    }

    fn peek(&mut self, at: usize) -> Result<Option<&Line>> {
        while self.ahead.len() <= at {
            match self.read()? {
                Some(line) => self.ahead.push_back(line),
                None => return Ok(None),
            }
        }
        Ok(self.ahead.get(at))
    }
}

fn open(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(|error| unreadable(path, error))?;
    if !file.metadata().map_err(|error| unreadable(path, error))?.is_file() {
        refuse!(Usage, "{} is no ordinary file", path.display());
    }
    Ok(file)
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    let code = if error.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::Usage };
    Error::new(code, format!("cannot read {}", path.display())).with_source(error)
}

/// What the next line must be.
struct Chained {
    log: String,
    seq: u64,
    prev: [u8; 32],
    /// The same before the last line.
    before: Option<(u64, [u8; 32])>,
    /// Where the last line lies.
    at: (usize, u64),
}

/// Checkpoints that were kept elsewhere: of each its number and the hash of its line.
type Elsewhere = HashMap<u64, [u8; 32]>;

struct Verifier<'v> {
    files: &'v [PathBuf],
    trust: &'v [PublicKey],
    elsewhere: Elsewhere,
    report: Report,
    /// Events since the last signed checkpoint, and when the next was due.
    since: u64,
    due: Option<u64>,
    /// Files that the log says it removed: the number and hash of the last record of each, and where it says so. All of
    /// them: such a record comes before the file goes, which may stay all the same.
    removed: Vec<(u64, String, u64)>,
    /// The last record that is a signed checkpoint, or one that was kept elsewhere.
    vouched: Option<u64>,
    part: bool,
}

/// Verifies the files of one log, in any order. `trust` is empty: any key may have signed. `elsewhere`: a file of
/// checkpoints, of this log alone.
///
/// # Errors
/// Files that cannot be read. A log that was tampered with is no error: [`Report::bad`] says so.
pub fn verify(files: &[PathBuf], trust: &[PublicKey], elsewhere: Option<&Path>) -> Result<Report> {
    verified(files, trust, elsewhere, false)
}

/// The same for a part of a log: its first records are somewhere else, and the checkpoints are of other logs too. That is
/// believed of whoever asks, and noted.
///
/// # Errors
/// Those of [`verify`].
pub fn verify_part(files: &[PathBuf], trust: &[PublicKey], elsewhere: Option<&Path>) -> Result<Report> {
    verified(files, trust, elsewhere, true)
}

/// A log that is being written may begin a new file after its files were listed, of which checkpoints kept elsewhere tell by
/// then: what looks like a fault is one only if the files are still the same. `list` says which they are, `look` verifies
/// them.
///
/// # Errors
/// Those of both.
pub fn settled(
    mut list: impl FnMut() -> Result<Vec<PathBuf>>,
    mut look: impl FnMut(&[PathBuf]) -> Result<Report>,
) -> Result<Report> {
    let mut files = list()?;
    for _ in 1..LOOKS_MAX {
        let looked = look(&files);
        if looked.as_ref().is_ok_and(|report| report.bad.is_none()) {
            return looked;
        }
        let now = list()?;
        if now == files {
            return looked;
        }
        files = now;
    }
    look(&files)
}

fn verified(files: &[PathBuf], trust: &[PublicKey], elsewhere: Option<&Path>, part: bool) -> Result<Report> {
    let (files, last) = in_order(files)?;
    let mut verifier = Verifier {
        files: &files,
        trust,
        part,
        vouched: None,
        elsewhere: Elsewhere::new(),
        report: Report { files: files.clone(), ..Report::default() },
        since: 0,
        due: None,
        removed: Vec::new(),
    };
    let bad = verifier.run(last, elsewhere)?;
    verifier.report.bad = bad;
    verifier.report.signers.sort_unstable();
    Ok(verifier.report)
}

/// By the numbers in their heads; files without one stay where they were given. The last one is open: its name may be the next
/// file's by the time the others are read.
fn in_order(files: &[PathBuf]) -> Result<(Vec<PathBuf>, File)> {
    if files.is_empty() {
        refuse!(Usage, "no audit log was named");
    }
    let mut numbered = Vec::with_capacity(files.len());
    // The one with the highest number, and the last one given: each other is closed again, they may be many.
    type Open<'f> = Option<(Option<u64>, &'f Path, Arc<File>)>;
    let (mut highest, mut given): (Open<'_>, Open<'_>) = (None, None);
    for path in files {
        let mut head = Vec::new();
        let file = Arc::new(open(path)?);
        let read = std::io::Read::take(BufReader::new(&*file), LINE_BYTES_MAX as u64).read_until(b'\n', &mut head);
        read.map_err(|error| unreadable(path, error))?;
        let number = Link::of(&head).and_then(|link| link.number);
        numbered.push((number, path.clone()));
        if highest.as_ref().is_none_or(|(before, ..)| *before < number) {
            highest = Some((number, path.as_path(), file.clone()));
        }
        given = Some((number, path.as_path(), file));
    }
    if numbered.iter().all(|(number, _)| number.is_some()) {
        numbered.sort_by_key(|(number, _)| *number);
    }
    numbered.dedup();
    let last = numbered.last().map(|(_, path)| path).expect("one was named");
    let kept = [highest, given].into_iter().flatten().find(|(_, path, _)| *path == last);
    let mut file = match kept.map(|(.., file)| file.try_clone()) {
        Some(file) => file.map_err(|error| unreadable(last, error))?,
        None => open(last)?,
    };
    file.rewind().map_err(|error| unreadable(last, error))?;
    Ok((numbered.into_iter().map(|(_, path)| path).collect(), file))
}

impl Verifier<'_> {
    fn bad(&self, fault: Fault, line: &Line, why: impl Into<String>) -> Option<Bad> {
        self.bad_at(fault, (line.file, line.number), why)
    }

    fn bad_at(&self, fault: Fault, (file, line): (usize, u64), why: impl Into<String>) -> Option<Bad> {
        Some(Bad { fault, file: self.files[file].clone(), line, why: why.into() })
    }

    fn run(&mut self, last: File, elsewhere: Option<&Path>) -> Result<Option<Bad>> {
        let files = self.files;
        let mut lines = Lines::new(files, Some(last));
        let Some(first) = lines.peek(0)? else {
            let bad = Bad { fault: Fault::Truncated, file: files[0].clone(), line: 1, why: "it is empty".into() };
            return Ok(Some(bad));
        };
        let Some(head) = Link::of(&first.bytes) else {
            let at = (first.file, first.number);
            return Ok(self.bad_at(Fault::Edited, at, "it is no record, and should be the head of a file"));
        };
        if head.kind != own::HEAD {
            let why = format!("record {} is no head of a file: what was before it is gone", head.seq);
            let at = (first.file, first.number);
            return Ok(self.bad_at(Fault::Deleted, at, why));
        }
        let mut prev = [0; 32];
        if hex::decode_to_slice(head.prev, &mut prev).is_err() {
            let at = (first.file, first.number);
            return Ok(self.bad_at(Fault::Edited, at, "the hash it holds is none"));
        }
        if head.seq == 0 && prev != [0; 32] || head.seq > 0 && head.number == Some(1) {
            let at = (first.file, first.number);
            return Ok(self.bad_at(Fault::Edited, at, "it is the head of a first file, and does not begin a chain"));
        }
        let mut chained = Chained { log: head.log.to_owned(), seq: head.seq, prev, before: None, at: (0, 0) };
        (self.report.log, self.report.first) = (head.log.to_owned(), head.seq);
        self.report.since = head.time.to_owned();
        let began = (head.seq, hex::encode(prev));
        if let Some(path) = elsewhere
            && let Some(bad) = self.read_elsewhere(path)?
        {
            return Ok(Some(bad));
        }
        while let Some(line) = lines.next()? {
            match self.one(&mut chained, line, &mut lines)? {
                Ok(()) => {}
                Err(bad) => return Ok(Some(*bad)),
            }
        }
        self.report.last = chained.seq.saturating_sub(1);
        let without = match began.0 {
            0 => None,
            first => self.without_beginning(first, &began.1, elsewhere.is_some()),
        };
        Ok(without.or_else(|| self.end(&chained)))
    }

    /// The files begin with record `first`, which holds the hash `prev`: were those before it removed by the log itself?
    fn without_beginning(&mut self, first: u64, prev: &str, elsewhere: bool) -> Option<Bad> {
        let last = first - 1;
        let vouched = |at: u64| self.vouched.is_some_and(|vouched| vouched > at);
        // Anybody can append that something was removed; what comes before a checkpoint, only who wrote the log.
        let asked = elsewhere || !self.trust.is_empty();
        let fits = |(was, hash, at): &(u64, String, u64)| *was == last && hash == prev && (!asked || vouched(*at));
        match self.removed.iter().any(fits) {
            true => {
                let note = format!("records 0 to {last} were removed when they were older than they were to be kept");
                self.report.notes.push(note);
                None
            }
            false if self.part => {
                self.report.notes.push(format!("records 0 to {last} are not in the files given"));
                None
            }
            false => self.bad_at(
                Fault::Deleted,
                (0, 1),
                format!(
                    "records 0 to {last} are missing before it, and no record that a checkpoint vouches for says that they \
                     were removed; if these files are a part of a log, say --part"
                ),
            ),
        }
    }

    /// What can only be said when all lines were seen.
    fn end(&mut self, chained: &Chained) -> Option<Bad> {
        let last = self.report.last;
        let mut missing: Vec<u64> = self.elsewhere.keys().copied().filter(|seq| *seq > last).collect();
        missing.sort_unstable();
        if let Some(newest) = missing.last() {
            let why = format!(
                "it is record {last}, the last one, and a checkpoint kept elsewhere is record {newest}: the end was cut"
            );
            return self.bad_at(Fault::Truncated, chained.at, why);
        }
        if self.trust.is_empty() {
            return None;
        }
        if self.report.checkpoints_signed == 0 {
            return self.bad_at(Fault::Unsigned, chained.at, "no checkpoint is signed by a trusted key");
        }
        match self.due {
            Some(due) if self.since > due => {
                let since = self.since;
                let why = format!("{since} records follow the last signed checkpoint; the next was due after {due}");
                self.bad_at(Fault::Unsigned, chained.at, why)
            }
            Some(_) | None => None,
        }
    }

    /// Looks at one line; `chained` goes on if it is right.
    fn one(&mut self, chained: &mut Chained, line: Line, lines: &mut Lines<'_>) -> Result<Result<(), Box<Bad>>> {
        let wrong = |bad: Option<Bad>| Ok(Err(Box::new(bad.expect("a fault was found"))));
        let Some(link) = Link::of(&line.bytes) else {
            return match self.torn(chained, &line, lines)? {
                true => Ok(Ok(())),
                false if !line.ended => wrong(self.bad(
                    Fault::Truncated,
                    &line,
                    "it breaks off: a crash that no later start closed off, or a cut",
                )),
                false => wrong(self.bad(Fault::Edited, &line, "it is no record")),
            };
        };
        let hash = hash_of(&line.bytes);
        let follows = link.prev == hex::encode(chained.prev);
        if link.log != chained.log {
            let why = format!("it is of log {}, this is log {}", link.log, chained.log);
            return wrong(self.bad(Fault::Spliced, &line, why));
        }
        if link.seq != chained.seq || !follows {
            return wrong(self.diagnose(chained, &line, &link, hash, follows, lines)?);
        }
        if !line.ended {
            return wrong(self.bad(Fault::Truncated, &line, "its newline is missing"));
        }
        if (link.kind == own::HEAD) != (line.number == 1) {
            let why = "the head of a file is its first line, and only that";
            return wrong(self.bad(Fault::Edited, &line, why));
        }
        if let Some(kept) = self.elsewhere.remove(&link.seq) {
            if kept != hash {
                // Changed by whoever could not sign it: this one line is meant.
                if let Some(bad) = self.forged(&line, &link) {
                    return wrong(Some(bad));
                }
                let why =
                    format!("a checkpoint kept elsewhere is another record {}: the log was written anew", link.seq);
                return wrong(self.bad(Fault::Rewritten, &line, why));
            }
            (self.report.elsewhere, self.since) = (self.report.elsewhere + 1, 0);
            (self.report.uncovered, self.vouched) = (0, Some(link.seq));
        } else {
            self.report.uncovered += 1;
        }
        match link.kind {
            own::CHECKPOINT => {
                if let Some(bad) = self.checkpoint(&line, &link) {
                    return wrong(Some(bad));
                }
            }
            own::REMOVED => {
                let named = link.last.zip(link.sha256);
                self.removed.extend(named.map(|(last, hash)| (last, hash.to_owned(), link.seq)));
            }
            own::GAP => self.note(&line, "events could not be recorded before it"),
            own::HEAD | own::TORN => {}
            _ => self.since += 1,
        }
        self.report.records += 1;
        self.report.until = link.time.to_owned();
        chained.before = Some((chained.seq, chained.prev));
        (chained.seq, chained.prev, chained.at) = (chained.seq + 1, hash, (line.file, line.number));
        Ok(Ok(()))
    }

    fn note(&mut self, line: &Line, what: &str) {
        // A log that was full every night has many; the first ones say enough.
        if self.report.notes.len() < 100 {
            self.report.notes.push(format!("{} line {}: {what}", self.files[line.file].display(), line.number));
        }
    }

    /// A line that names a signer who has not signed it.
    fn forged(&self, line: &Line, link: &Link<'_>) -> Option<Bad> {
        let signer = link.signer?;
        match PublicKey::from_hex(signer) {
            Ok(key) if is_signed_by(&line.bytes, &key) => None,
            Ok(_) => self.bad(Fault::Edited, line, format!("the signature of {signer} does not hold")),
            Err(_) => self.bad(Fault::Edited, line, "the key that signed it is none"),
        }
    }

    fn checkpoint(&mut self, line: &Line, link: &Link<'_>) -> Option<Bad> {
        let Some(signer) = link.signer else {
            self.report.checkpoints_unsigned += 1;
            if self.trust.is_empty() {
                return None;
            }
            return self.bad(Fault::Unsigned, line, "the checkpoint is not signed");
        };
        if let Some(bad) = self.forged(line, link) {
            return Some(bad);
        }
        if !self.trust.is_empty() && !self.trust.iter().any(|key| key.to_string() == signer) {
            return self.bad(Fault::Unsigned, line, format!("it is signed by {signer}, which is not trusted"));
        }
        if !self.report.signers.iter().any(|known| known == signer) {
            self.report.signers.push(signer.to_owned());
        }
        self.report.checkpoints_signed += 1;
        (self.since, self.due) = (0, link.due);
        (self.report.uncovered, self.vouched) = (0, Some(link.seq));
        None
    }

    /// Whether the line begins a piece that a later start, or a disk with room again, closed off. Then the record that does
    /// so is the next line.
    fn torn(&mut self, chained: &Chained, line: &Line, lines: &mut Lines<'_>) -> Result<bool> {
        let mut piece = line.bytes.clone();
        let mut at = 0;
        while let Some(next) = lines.peek(at)? {
            if next.file != line.file || piece.len() > TORN_BYTES_MAX {
                return Ok(false);
            }
            let closes = Link::of(&next.bytes).filter(|link| {
                link.kind == own::TORN
                    && (link.seq, link.log) == (chained.seq, chained.log.as_str())
                    && link.prev == hex::encode(chained.prev)
            });
            if let Some(link) = closes {
                let whole = link.bytes == Some(piece.len() as u64)
                    && link.sha256.is_some_and(|told| told == hex::encode(sha256(&[&piece])));
                if whole {
                    lines.ahead.drain(..at);
                    let what =
                        format!("{} bytes that are no record, closed off by record {}", piece.len(), chained.seq);
                    self.note(line, &what);
                }
                return Ok(whole);
            }
            piece.push(b'\n');
            piece.extend_from_slice(&next.bytes);
            at += 1;
        }
        Ok(false)
    }

    /// The line does not follow the one before it. Why?
    fn diagnose(
        &self,
        chained: &Chained,
        line: &Line,
        link: &Link<'_>,
        hash: [u8; 32],
        follows: bool,
        lines: &mut Lines<'_>,
    ) -> Result<Option<Bad>> {
        let (seq, wanted) = (link.seq, chained.seq);
        if follows {
            return Ok(self.bad(
                Fault::Edited,
                line,
                format!("it says that it is record {seq}, and is record {wanted}"),
            ));
        }
        if seq == wanted {
            return self.edited(chained, line, hash, lines);
        }
        if seq > wanted {
            return self.ahead(chained, line, seq, lines);
        }
        if let Some((file, number)) = self.earlier(line, hash)? {
            let why = format!("it is a copy of line {number} of {}", self.files[file].display());
            return Ok(self.bad(Fault::Duplicated, line, why));
        }
        if let Some((before, prev)) = chained.before
            && before == seq
            && link.prev == hex::encode(prev)
        {
            let why = format!("line {} follows the line before it, and was there first", line.number);
            return Ok(self.bad_at(Fault::Inserted, chained.at, why));
        }
        Ok(self.bad(Fault::Edited, line, format!("it says that it is record {seq}, record {wanted} belongs here")))
    }

    /// Right number, wrong hash: this line was changed, or the one before it.
    fn edited(&self, chained: &Chained, line: &Line, hash: [u8; 32], lines: &mut Lines<'_>) -> Result<Option<Bad>> {
        let number = line.number;
        let own = |why: &str| self.bad(Fault::Edited, line, why);
        let before = |why: String| self.bad_at(Fault::Edited, chained.at, why);
        if chained.at.1 == 0 {
            return Ok(own("it does not hold the hash that it should"));
        }
        let signed = Link::of(&line.bytes).and_then(|link| link.signer.and_then(|key| PublicKey::from_hex(key).ok()));
        if let Some(key) = signed {
            return Ok(match is_signed_by(&line.bytes, &key) {
                true => before(format!("it is not the record whose hash the signed line {number} holds")),
                false => own("its signature does not hold, and neither does the hash in it"),
            });
        }
        Ok(match lines.peek(0)? {
            Some(next) => match Link::of(&next.bytes) {
                Some(link) if link.prev == hex::encode(hash) => {
                    before(format!("it is not the record whose hash line {number} holds"))
                }
                _ => own("neither it nor the line after it holds the hash of the line before"),
            },
            None => before(format!("it is not the record whose hash line {number} holds, or that line is")),
        })
    }

    /// A higher number than belongs here: the record that does comes later, or not at all.
    fn ahead(&self, chained: &Chained, line: &Line, seq: u64, lines: &mut Lines<'_>) -> Result<Option<Bad>> {
        let wanted = chained.seq;
        let mut belongs = None;
        while let Some(later) = lines.next()? {
            if later.bytes == line.bytes {
                let why = format!("it is a copy of line {} of {}", later.number, self.files[later.file].display());
                return Ok(self.bad(Fault::Duplicated, line, why));
            }
            let Some(link) = Link::of(&later.bytes) else { continue };
            if belongs.is_none() && link.seq == wanted && link.log == chained.log {
                belongs = Some((later.file, later.number));
            }
        }
        if let Some((file, number)) = belongs {
            let file = self.files[file].display();
            let why = format!("it is record {seq}; record {wanted}, which belongs here, is line {number} of {file}");
            return Ok(self.bad(Fault::Reordered, line, why));
        }
        let missing = match seq - wanted {
            1 => format!("record {wanted} is missing before it"),
            _ => format!("records {wanted} to {} are missing before it", seq - 1),
        };
        if line.number == 1 && chained.at.1 > 0 {
            let file = self.files[chained.at.0].display();
            return Ok(self.bad(
                Fault::Deleted,
                line,
                format!("{missing}: the end of {file}, or a file between the two"),
            ));
        }
        Ok(self.bad(Fault::Deleted, line, missing))
    }

    /// The same bytes before this line.
    fn earlier(&self, line: &Line, hash: [u8; 32]) -> Result<Option<(usize, u64)>> {
        let mut lines = Lines::new(self.files, None);
        while let Some(other) = lines.next()? {
            if (other.file, other.number) == (line.file, line.number) {
                break;
            }
            if other.bytes.len() == line.bytes.len() && hash_of(&other.bytes) == hash {
                return Ok(Some((other.file, other.number)));
            }
        }
        Ok(None)
    }

    /// Takes the checkpoints of this log, each signed.
    fn read_elsewhere(&mut self, path: &Path) -> Result<Option<Bad>> {
        let paths = [path.to_owned()];
        let mut lines = Lines::new(&paths, None);
        let (mut others, mut any) = (None, false);
        while let Some(line) = lines.next()? {
            let bad = |fault, why: String| Some(Bad { fault, file: path.to_owned(), line: line.number, why });
            // The last may have been cut off when the machine that wrote it died.
            if !line.ended {
                break;
            }
            let Some(link) = Link::of(&line.bytes) else {
                // A disk that was full leaves a piece; whoever could change it could as well remove it.
                let note = format!("{} line {}: it is no checkpoint", path.display(), line.number);
                self.report.notes.push(note);
                continue;
            };
            if link.log != self.report.log {
                others = Some(link.log.to_owned());
                continue;
            }
            let key = link.signer.and_then(|signer| PublicKey::from_hex(signer).ok());
            let Some(key) = key.filter(|key| is_signed_by(&line.bytes, key)) else {
                return Ok(bad(Fault::Edited, "the checkpoint is not signed, or its signature does not hold".into()));
            };
            if !self.trust.is_empty() && !self.trust.contains(&key) {
                return Ok(bad(Fault::Unsigned, format!("it is signed by {key}, which is not trusted")));
            }
            any = true;
            // What was removed long ago is not asked for.
            if link.seq >= self.report.first
                && self.elsewhere.insert(link.seq, hash_of(&line.bytes)).is_some_and(|was| was != hash_of(&line.bytes))
            {
                return Ok(bad(Fault::Rewritten, format!("it is a second checkpoint with number {}", link.seq)));
            }
        }
        let Some(other) = others else { return Ok(None) };
        let (path, own) = (path.display(), &self.report.log);
        if any && self.part {
            self.report.notes.push(format!("{path} holds checkpoints of other logs too, of {other} among them"));
            return Ok(None);
        }
        let why = match any {
            false => format!("{path} holds checkpoints of log {other}, none of this log {own}"),
            true => format!(
                "{path} holds checkpoints of log {other} too, and this is log {own}: another log was here. Give each log a file \
                 of checkpoints of its own, or say --part"
            ),
        };
        Ok(Some(Bad { fault: Fault::Rewritten, file: self.files[0].clone(), line: 1, why }))
    }
}
