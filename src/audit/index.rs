//! What stands where in a file of a log, so that a question over ten million lines looks at few of them.
//!
//! ```text
//!  PATH:         line line line ... 4096 of them ... line line line ...        line line (the rest is read as it is)
//!  .PATH.index:  the file it is of | block: span, first and last time, what occurs | a column for each field | block ...
//! ```
//! In: a file of a log. Out: [`Block`]s: of 4096 lines where they lie, the times between which they were written, which
//! severities, kinds, users and models occur at all, and of each line these again.
//! Promises: an index that is missing, of another file, or broken is made anew; whoever cannot write beside the log has one in
//! memory; nothing here says whether a log is genuine, and `verify` does not look at it.
//! Not here: what is asked (`show`).
//! Held by: the tests below, tests/audit.rs; benches/audit.rs for how fast.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::file::beside;
use super::record::{LINE_BYTES_MAX, own, parse_stamp};
use crate::crypto::sha256;
use crate::error::{Code, Error, Result};
use crate::telemetry::events::{Kind, Outcome, Severity};

/// Lines of a block: 1.5 MB of log, 74 KB of index.
const LINES: usize = 4096;

const MAGIC: &[u8; 8] = b"MFSAIDX2";

/// Magic, the hash of the file's first line.
const HEADER_BYTES: usize = 40;

/// Size, lines, offset, bytes, first and last time, severities, outcomes, padding, kinds, users, models.
const BLOCK_HEADER_BYTES: usize = 64;

/// Of each line: length, time, user, model, kind, severity and outcome.
const LINE_BYTES: usize = 4 + 8 + 2 + 2 + 1 + 1;

/// No user, no model.
const NONE: u16 = u16::MAX;

/// A record that is of no kind known here.
const OTHER: u8 = 63;

/// A line that is no record.
pub const BROKEN: u8 = 62;

/// The number of a kind in an index.
pub fn kind_number(name: &str) -> u8 {
    let of_events = Kind::ALL.iter().map(|kind| kind.name());
    let all = of_events.chain(own::ALL.into_iter().filter(|name| *name != own::CHECKPOINT));
    all.take(usize::from(BROKEN)).position(|known| known == name).map_or(OTHER, |at| at as u8)
}

/// What an index keeps of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts<'l> {
    pub time: u64,
    pub kind: u8,
    pub severity: Severity,
    pub outcome: Outcome,
    pub uid: Option<u32>,
    pub model: Option<std::borrow::Cow<'l, str>>,
}

impl Facts<'_> {
    /// Without parsing all of it: the first fields are always the same. `None`: it is no record.
    pub fn of(line: &[u8]) -> Option<Facts<'_>> {
        let line = std::str::from_utf8(line).ok()?;
        let rest = line.strip_prefix("{\"time\":\"")?;
        let (time, rest) = rest.split_at_checked(27)?;
        let rest = rest.strip_prefix("\",\"seq\":")?;
        let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix(",\"log\":\"")?;
        let rest = rest.get(16..)?.strip_prefix("\",\"prev\":\"")?;
        let rest = rest.get(64..)?.strip_prefix("\",\"kind\":\"")?;
        let (kind, rest) = rest.split_once('"')?;
        let (severity, rest) = rest.strip_prefix(",\"severity\":\"")?.split_once('"')?;
        let (outcome, rest) = rest.strip_prefix(",\"outcome\":\"")?.split_once('"')?;
        let uid = rest.strip_prefix(",\"uid\":").and_then(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_digit())?;
            rest[..end].parse().ok()
        });
        // Within a text every quotation mark has a backslash before it, so this is the field.
        let model = rest.split_once(",\"model\":").and_then(|(_, rest)| {
            let plain = rest.strip_prefix('"')?.split_once('"')?.0;
            if !plain.contains('\\') {
                return Some(plain.into());
            }
            let mut texts = serde_json::Deserializer::from_str(rest).into_iter::<String>();
            texts.next()?.ok().map(std::borrow::Cow::Owned)
        });
        let severity = Severity::ALL.into_iter().find(|known| known.name() == severity)?;
        let outcome = Outcome::ALL.into_iter().find(|known| known.name() == outcome)?;
        Some(Facts { time: parse_stamp(time)?, kind: kind_number(kind), severity, outcome, uid, model })
    }
}

/// A block that is being made.
struct Making {
    offset: u64,
    bytes: u64,
    first: u64,
    last: u64,
    severities: u8,
    outcomes: u8,
    kinds: u64,
    users: Vec<u32>,
    models: Vec<String>,
    lens: Vec<u8>,
    times: Vec<u8>,
    of_users: Vec<u8>,
    of_models: Vec<u8>,
    of_kinds: Vec<u8>,
    words: Vec<u8>,
}

impl Making {
    fn at(offset: u64) -> Making {
        let column = |width: usize| Vec::with_capacity(LINES * width);
        Making {
            offset,
            bytes: 0,
            first: u64::MAX,
            last: 0,
            severities: 0,
            outcomes: 0,
            kinds: 0,
            users: Vec::new(),
            models: Vec::new(),
            lens: column(4),
            times: column(8),
            of_users: column(2),
            of_models: column(2),
            of_kinds: column(1),
            words: column(1),
        }
    }

    fn lines(&self) -> usize {
        self.words.len()
    }

    /// A line, with its newline.
    fn push(&mut self, line: &[u8]) {
        let broken = Facts {
            time: self.last,
            kind: BROKEN,
            severity: Severity::Low,
            outcome: Outcome::Failed,
            uid: None,
            model: None,
        };
        let facts = Facts::of(line.strip_suffix(b"\n").unwrap_or(line)).unwrap_or(broken);
        self.bytes += line.len() as u64;
        (self.first, self.last) = (self.first.min(facts.time), self.last.max(facts.time));
        self.severities |= 1 << facts.severity as u8;
        self.outcomes |= 1 << facts.outcome as u8;
        self.kinds |= 1 << facts.kind;
        let user = facts.uid.map_or(NONE, |uid| number(&mut self.users, |known| *known == uid, || uid));
        let model = facts.model.as_ref();
        let model = model.map_or(NONE, |name| number(&mut self.models, |known| known == name, || name.to_string()));
        self.lens.extend_from_slice(&(line.len() as u32).to_le_bytes());
        self.times.extend_from_slice(&facts.time.to_le_bytes());
        self.of_users.extend_from_slice(&user.to_le_bytes());
        self.of_models.extend_from_slice(&model.to_le_bytes());
        self.of_kinds.push(facts.kind);
        self.words.push(facts.severity as u8 | (facts.outcome as u8) << 4);
    }

    fn finish(self) -> Block {
        let mut out = vec![0; 4];
        out.extend_from_slice(&(self.lines() as u32).to_le_bytes());
        for word in [self.offset, self.bytes, self.first, self.last] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&[self.severities, self.outcomes, 0, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&self.kinds.to_le_bytes());
        out.extend_from_slice(&(self.users.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.models.len() as u32).to_le_bytes());
        debug_assert_eq!(out.len(), BLOCK_HEADER_BYTES);
        for user in &self.users {
            out.extend_from_slice(&user.to_le_bytes());
        }
        for model in &self.models {
            out.extend_from_slice(&(model.len() as u32).to_le_bytes());
            out.extend_from_slice(model.as_bytes());
        }
        for column in [&self.lens, &self.times, &self.of_users, &self.of_models, &self.of_kinds, &self.words] {
            out.extend_from_slice(column);
        }
        let len = out.len() as u32;
        out[..4].copy_from_slice(&len.to_le_bytes());
        Block(out)
    }
}

/// The place of a value in `known`, which it joins if it is new.
fn number<T>(known: &mut Vec<T>, is_it: impl FnMut(&T) -> bool, new: impl FnOnce() -> T) -> u16 {
    // The newest first: whoever reads a model now is likely to go on.
    let at = known.iter().rposition(is_it).unwrap_or_else(|| {
        known.push(new());
        known.len() - 1
    });
    // At most 4096 lines, hence values.
    at as u16
}

/// 4096 lines of a file, or fewer at its end.
pub struct Block(Vec<u8>);

/// One line of a block.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// In the file.
    pub offset: u64,
    pub len: u32,
    pub time: u64,
    /// Places in [`Block::users`] and [`Block::models`].
    pub user: Option<u16>,
    pub model: Option<u16>,
    pub kind: u8,
    pub severity: u8,
    pub outcome: u8,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Block {
    /// The next block of an index, if it is whole and fits together.
    fn read(from: &mut impl Read) -> Option<Block> {
        let mut bytes = vec![0; BLOCK_HEADER_BYTES];
        from.read_exact(&mut bytes).ok()?;
        let (size, lines) = (u32_at(&bytes, 0) as usize, u32_at(&bytes, 4) as usize);
        if lines != LINES || !(BLOCK_HEADER_BYTES + lines * LINE_BYTES..=256 << 20).contains(&size) {
            return None;
        }
        bytes.resize(size, 0);
        from.read_exact(&mut bytes[BLOCK_HEADER_BYTES..]).ok()?;
        let block = Block(bytes);
        let models = block.models_at().checked_add(0)?;
        let mut at = models;
        for _ in 0..u32_at(&block.0, 60) {
            let len = block.0.get(at..at + 4).map(|len| u32_at(len, 0) as usize)?;
            std::str::from_utf8(block.0.get(at + 4..at.checked_add(4)?.checked_add(len)?)?).ok()?;
            at += 4 + len;
        }
        (at + lines * LINE_BYTES == size).then_some(block)
    }

    fn models_at(&self) -> usize {
        BLOCK_HEADER_BYTES + 4 * u32_at(&self.0, 56) as usize
    }

    pub fn lines(&self) -> usize {
        u32_at(&self.0, 4) as usize
    }

    /// Where in the file it lies.
    pub fn span(&self) -> std::ops::Range<u64> {
        let (offset, bytes) = (u64_at(&self.0, 8), u64_at(&self.0, 16));
        offset..offset.saturating_add(bytes)
    }

    pub fn times(&self) -> std::ops::RangeInclusive<u64> {
        u64_at(&self.0, 24)..=u64_at(&self.0, 32)
    }

    /// A bit for each that occurs.
    pub fn severities(&self) -> u8 {
        self.0[40]
    }

    pub fn outcomes(&self) -> u8 {
        self.0[41]
    }

    pub fn kinds(&self) -> u64 {
        u64_at(&self.0, 48)
    }

    pub fn users(&self) -> impl Iterator<Item = u32> {
        let users = &self.0[BLOCK_HEADER_BYTES..self.models_at()];
        users.chunks_exact(4).map(|user| u32_at(user, 0))
    }

    pub fn models(&self) -> impl Iterator<Item = &str> {
        let mut at = self.models_at();
        (0..u32_at(&self.0, 60)).map(move |_| {
            let len = u32_at(&self.0, at) as usize;
            let name = std::str::from_utf8(&self.0[at + 4..at + 4 + len]).expect("looked at when it was read");
            at += 4 + len;
            name
        })
    }

    pub fn rows(&self) -> impl Iterator<Item = Row> {
        let lines = self.lines();
        let mut at = self.0.len() - lines * LINE_BYTES;
        let mut column = |width: usize| {
            let column = &self.0[at..at + lines * width];
            at += lines * width;
            column
        };
        let (lens, times, users, models) = (column(4), column(8), column(2), column(2));
        let (kinds, words) = (column(1), column(1));
        let short = |column: &[u8], row: usize| u16::from_le_bytes([column[2 * row], column[2 * row + 1]]);
        let mut offset = self.span().start;
        (0..lines).map(move |row| {
            let len = u32_at(lens, 4 * row);
            let here = offset;
            offset += u64::from(len);
            Row {
                offset: here,
                len,
                time: u64_at(times, 8 * row),
                user: Some(short(users, row)).filter(|user| *user != NONE),
                model: Some(short(models, row)).filter(|model| *model != NONE),
                kind: kinds[row],
                severity: words[row] & 15,
                outcome: words[row] >> 4,
            }
        })
    }
}

/// The blocks of a file, one after the other: those that an index holds, then the rest of the file.
pub struct Index {
    path: PathBuf,
    /// Whole blocks of the sidecar.
    stored: Option<BufReader<File>>,
    /// What it does not hold.
    fresh: std::vec::IntoIter<Block>,
    /// How far in the file it reaches, and where the next block begins.
    covered: u64,
    at: u64,
    log: File,
}

fn failed(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let message = format!("cannot {what} {}", path.display());
    move |error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound { Code::NotFound } else { Code::Usage };
        Error::new(code, message).with_source(error)
    }
}

impl Index {
    /// Opens the index of the file at `path`; what it lacks is made, and kept if we may write there.
    ///
    /// # Errors
    /// A log that cannot be read.
    pub fn of(path: &Path) -> Result<Index> {
        let log = File::open(path).map_err(failed("read", path))?;
        let mut first = Vec::new();
        let read = Read::take(BufReader::new(&log), LINE_BYTES_MAX as u64).read_until(b'\n', &mut first);
        read.map_err(failed("read", path))?;
        let header = [&MAGIC[..], &sha256(&[&first])].concat();
        let len = log.metadata().map_err(failed("read", path))?.len();

        let place = beside(path, "index");
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let (mut covered, mut stored_bytes) = (0, 0);
        let mut sidecar = options.open(&place).ok();
        if let Some(found) = &mut sidecar {
            match stored(found, &header, &log, len) {
                Some(whole) => (covered, stored_bytes) = whole,
                None => sidecar = None,
            }
        }
        let fresh = blocks(path, &log, covered)?;
        let keep: Vec<&Block> = fresh.iter().filter(|block| block.lines() == LINES).collect();
        if !keep.is_empty() {
            let old = sidecar.as_ref().map_or(0, |_| stored_bytes);
            // Whoever may only read asks all the same.
            if let Err(error) = store(&place, &header, old, &keep) {
                tracing::debug!("no index is kept beside {}: {error}", path.display());
            }
        }
        let stored = sidecar.map(|mut sidecar| {
            let begin = sidecar.seek(SeekFrom::Start(HEADER_BYTES as u64));
            begin.map(|_| BufReader::with_capacity(1 << 20, sidecar)).map_err(failed("read", &place))
        });
        let stored = if covered > 0 { stored.transpose()? } else { None };
        Ok(Index { path: path.to_owned(), stored, fresh: fresh.into_iter(), covered, at: 0, log })
    }

    pub fn log(&self) -> &File {
        &self.log
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Index {
    /// The next block; `None` at the end of the file.
    ///
    /// # Errors
    /// A log that cannot be read.
    pub fn next_block(&mut self) -> Result<Option<Block>> {
        if let Some(stored) = &mut self.stored {
            if self.at < self.covered {
                let covered = self.covered;
                let fits = |block: &Block| block.span().start == self.at && block.span().end <= covered;
                if let Some(block) = Block::read(stored).filter(fits) {
                    self.at = block.span().end;
                    return Ok(Some(block));
                }
                // It is broken there, or somebody writes it anew while we read: the log itself has it all.
                self.fresh = blocks(&self.path, &self.log, self.at)?.into_iter();
            }
            self.stored = None;
        }
        Ok(self.fresh.next())
    }
}

/// How far a sidecar that is of this file reaches: in the file, and in itself.
fn stored(sidecar: &mut File, header: &[u8], log: &File, len: u64) -> Option<(u64, u64)> {
    let size = sidecar.metadata().ok()?.len();
    let mut start = [0; HEADER_BYTES];
    sidecar.read_exact_at(&mut start, 0).ok()?;
    if start != header {
        return None;
    }
    let (mut covered, mut at) = (0, HEADER_BYTES as u64);
    let mut head = [0; 24];
    while sidecar.read_exact_at(&mut head, at).is_ok() {
        let (block, offset, bytes) = (u64::from(u32_at(&head, 0)), u64_at(&head, 8), u64_at(&head, 16));
        if block < BLOCK_HEADER_BYTES as u64 || at + block > size || offset != covered || offset + bytes > len {
            break;
        }
        (covered, at) = (offset + bytes, at + block);
    }
    // The file has lines, and the last one that is covered ends where it should.
    let mut end = [0];
    let fits = covered == 0 || log.read_exact_at(&mut end, covered - 1).is_ok() && end == *b"\n";
    fits.then_some((covered, at))
}

/// The blocks of a file from an offset on.
fn blocks(path: &Path, log: &File, from: u64) -> Result<Vec<Block>> {
    let mut log = log;
    log.seek(SeekFrom::Start(from)).map_err(failed("read", path))?;
    let mut reader = BufReader::with_capacity(1 << 20, log);
    let (mut made, mut making, mut line) = (Vec::new(), Making::at(from), Vec::new());
    loop {
        line.clear();
        let bounded = Read::take(&mut reader, u64::from(u32::MAX)).read_until(b'\n', &mut line);
        if bounded.map_err(failed("read", path))? == 0 {
            break;
        }
        making.push(&line);
        if making.lines() == LINES {
            let next = making.offset + making.bytes;
            made.push(std::mem::replace(&mut making, Making::at(next)).finish());
        }
    }
    if making.lines() > 0 {
        made.push(making.finish());
    }
    Ok(made)
}

/// Adds blocks to a sidecar, or begins it. Readers of an older one go on with what they have open.
fn store(place: &Path, header: &[u8], old: u64, blocks: &[&Block]) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let mut sidecar = options.open(place)?;
    // Two that do so at once write the same; one that waits for nobody is enough.
    if sidecar.try_lock().is_err() {
        return Ok(());
    }
    if old == 0 {
        sidecar.set_len(0)?;
        sidecar.write_all(header)?;
    } else {
        sidecar.set_len(old)?;
        sidecar.seek(SeekFrom::Start(old))?;
    }
    blocks.iter().try_for_each(|block| sidecar.write_all(&block.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::record::{Chain, Record};
    use crate::telemetry::events::{Actor, Event, Subject};

    fn write(path: &Path, count: u32) -> Vec<Event> {
        let mut chain = Chain::new().expect("random");
        let (mut all, mut line, mut events) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..count {
            let model = (number % 3 > 0).then(|| format!("acme/\"m\u{e9}\",\"model\":\"{}", number % 5));
            let event = Event::new(Kind::ALL[number as usize % Kind::ALL.len()])
                .severity(Severity::ALL[number as usize % 4])
                .outcome(Outcome::ALL[number as usize % 3])
                .actor(Actor { uid: (number % 7 > 0).then_some(number % 7), ..Actor::default() })
                .subject(Subject { model, ..Subject::default() });
            chain.line(&mut Record::of(&event), &mut line);
            chain.advance(&line);
            all.extend_from_slice(&line);
            events.push(event);
        }
        std::fs::write(path, all).expect("written");
        events
    }

    fn all_rows(path: &Path) -> Vec<(Row, Option<u32>, Option<String>)> {
        let mut index = Index::of(path).expect("an index");
        let blocks = std::iter::from_fn(|| index.next_block().expect("readable"));
        let of_block = |block: Block| {
            let users: Vec<u32> = block.users().collect();
            let models: Vec<String> = block.models().map(str::to_owned).collect();
            let row = |row: Row| {
                let user = row.user.map(|user| users[usize::from(user)]);
                (row, user, row.model.map(|model| models[usize::from(model)].clone()))
            };
            block.rows().map(row).collect::<Vec<_>>()
        };
        blocks.flat_map(of_block).collect()
    }

    #[test]
    fn an_index_says_of_each_line_what_the_line_says_and_is_made_anew_when_it_is_not_of_the_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("log");
        let count = 2 * LINES as u32 + 100;
        let events = write(&path, count);
        let text = std::fs::read_to_string(&path).expect("text");
        let sidecar = beside(&path, "index");
        let check = |what: &str| {
            let rows = all_rows(&path);
            assert_eq!(rows.len(), events.len(), "{what}");
            let mut at = 0;
            for ((row, user, model), event) in rows.iter().zip(&events) {
                assert_eq!(row.offset, at, "{what}");
                at += u64::from(row.len);
                assert_eq!((user, model), (&event.actor.uid, &event.subject.model), "{what}");
                assert_eq!(row.kind, kind_number(event.kind.name()), "{what}");
                assert_eq!((row.severity, row.outcome), (event.severity as u8, event.outcome as u8), "{what}");
            }
            assert_eq!(at as usize, text.len(), "{what}");
        };
        check("made");
        let stored = std::fs::read(&sidecar).expect("kept");
        check("found");
        for (what, bytes) in [
            ("empty", Vec::new()),
            ("of another file", [MAGIC.to_vec(), vec![7; stored.len() - 8]].concat()),
            ("cut in a block", stored[..stored.len() - 9].to_vec()),
            ("cut after a block", stored[..HEADER_BYTES + u32_at(&stored, HEADER_BYTES) as usize].to_vec()),
            ("with more behind it", [stored.clone(), vec![255; 100]].concat()),
        ] {
            std::fs::write(&sidecar, bytes).expect("spoiled");
            check(what);
        }
        std::fs::remove_file(&sidecar).expect("removed");
        check("removed");
        assert_eq!(std::fs::read(&sidecar).expect("made again"), stored);
    }

    #[test]
    fn kinds_have_numbers_of_their_own_and_what_is_no_record_is_no_answer() {
        let mut seen = std::collections::HashSet::new();
        for name in Kind::ALL.iter().map(|kind| kind.name()).chain(["head", "torn", "gap", "removed"]) {
            assert!(seen.insert(kind_number(name)), "{name}");
        }
        assert_eq!(kind_number("later"), OTHER);
        for line in ["", "{}", "{\"time\":\"2026", &"x".repeat(300)] {
            assert_eq!(Facts::of(line.as_bytes()), None);
        }
    }
}
