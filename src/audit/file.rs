//! The files of a log: one that is written, at the path that was asked for, and closed ones beside it, `PATH.000001` and on.
//!
//! In: whole lines. Out: the same at the end of the file, or an error and a file that is as it was; where the chain ended,
//! after a restart.
//! Promises: one process writes a log; a file is private, and no link is followed; what is in a file is never changed, a
//! piece of a line excepted that could not be written whole; what a crash left is found and told.
//! Not here: what a line says (`record`), when a checkpoint is due (`mod`).
//! Held by: tests/audit.rs.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::record::{LINE_BYTES_MAX, Link, hash_of, own, parse_stamp};
use crate::crypto::sha256;
use crate::error::{Code, Error, Result};
use crate::refuse;

/// How far back the last record is looked for: a crash leaves one line in pieces.
const TAIL_BYTES_MAX: u64 = 4 << 20;

/// How long a log that somebody else holds is waited for, and how often it is looked at.
const LOCK_WAIT: Duration = Duration::from_secs(1);
const LOCK_LOOK: Duration = Duration::from_millis(20);

/// What stands at the end of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    pub log: String,
    /// Of the last whole record.
    pub seq: u64,
    pub hash: [u8; 32],
    /// Where it ends, its newline included.
    pub end: u64,
    /// Its newline is missing.
    pub unended: bool,
    /// What follows it is no record.
    pub torn: Option<Torn>,
}

/// Bytes between the last whole record and the end of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Torn {
    pub bytes: u64,
    pub sha256: [u8; 32],
}

/// The files of one log, open for writing.
pub struct LogFiles {
    path: PathBuf,
    file: Option<Arc<File>>,
    /// What is known to be written whole.
    len: u64,
    /// Of the file that is written; 0 before the first.
    number: u64,
    /// A piece of a line is behind `len` and could not be taken off.
    spoiled: bool,
    /// Held for as long as we write.
    _lock: File,
}

/// Names the file and what was tried.
fn failed(what: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let message = format!("cannot {what} audit log {}", path.display());
    move |error| Error::new(Code::Audit, message).with_source(error)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).append(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}

impl LogFiles {
    /// Takes the log for this process. Writes nothing into it.
    ///
    /// # Errors
    /// `AUDIT` if another process writes it, if it is no log, if others can read or write it, or it cannot be read.
    pub fn open(path: &Path) -> Result<(LogFiles, Option<Tail>)> {
        let lock = lock(path)?;
        let mut files = LogFiles { path: path.to_owned(), file: None, len: 0, number: 0, spoiled: false, _lock: lock };
        files.number = closed(path)?.last().map_or(0, |(number, _)| *number);
        let file = match options().open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((files, last_tail(path)?)),
            Err(error) => return Err(failed("open", path)(error)),
        };
        check(path, &file)?;
        let mut len = file.metadata().map_err(failed("read", path))?.len();
        let tail = tail(path, &file)?;
        if tail.is_none() && len > 0 {
            if len > LINE_BYTES_MAX as u64 || read_at(path, &file, 0..len)?.contains(&b'\n') {
                refuse!(Audit, "{} holds no record at its end: is it an audit log? move it away", path.display());
            }
            // Its first record was never whole, so nothing was ever recorded in it.
            tracing::warn!("audit log {} was begun and not written: its {len} bytes are taken off", path.display());
            file.set_len(0).map_err(failed("clear", path))?;
            len = 0;
        }
        if len == 0 {
            // Begun and empty: as if it were not there.
            std::fs::remove_file(path).map_err(failed("begin", path))?;
            return Ok((files, last_tail(path)?));
        }
        let head = first_line(path, &file)?;
        files.number = match Link::of(&head) {
            Some(Link { kind: own::HEAD, number: Some(number), .. }) => number,
            _ => files.number + 1,
        };
        files.len = tail.as_ref().map_or(len, |tail| tail.end);
        files.spoiled = tail.as_ref().is_some_and(|tail| tail.unended || tail.torn.is_some());
        files.file = Some(Arc::new(file));
        Ok((files, tail))
    }

    pub fn is_begun(&self) -> bool {
        self.file.is_some()
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// Of the file that is written, or of the next one if none is.
    pub fn number(&self) -> u64 {
        if self.is_begun() { self.number } else { self.number + 1 }
    }

    /// Makes the next file, empty.
    ///
    /// # Errors
    /// `AUDIT`.
    pub fn begin(&mut self) -> Result<()> {
        let made = options().create_new(true).open(&self.path).map_err(failed("begin", &self.path))?;
        self.number += 1;
        (self.file, self.len, self.spoiled) = (Some(Arc::new(made)), 0, false);
        Ok(())
    }

    /// What stands behind the last whole line because it could be neither written whole nor taken off; it is to be closed
    /// off first.
    pub fn spoiled(&self) -> Result<Option<Torn>> {
        let Some(file) = self.file.as_ref().filter(|_| self.spoiled) else { return Ok(None) };
        let len = file.metadata().map_err(failed("read", &self.path))?.len();
        if len <= self.len {
            return Ok(None);
        }
        let bytes = read_at(&self.path, file, self.len..len)?;
        Ok(Some(Torn { bytes: bytes.len() as u64, sha256: sha256(&[&bytes]) }))
    }

    /// Writes a line, its newline included; `after` goes before it: a newline that is missing, after a crash.
    ///
    /// # Errors
    /// `AUDIT`. What was written of the line is taken off again, or stays [`LogFiles::spoiled`].
    pub fn append(&mut self, line: &[u8]) -> Result<()> {
        let file = self.file.clone().expect("begun before it is written");
        if self.spoiled {
            let start = [b"\n", line].concat();
            self.write(&file, &start)?;
            self.spoiled = false;
            self.len = file.metadata().map_err(failed("read", &self.path))?.len();
            return Ok(());
        }
        self.write(&file, line)?;
        self.len += line.len() as u64;
        Ok(())
    }

    fn write(&mut self, file: &File, line: &[u8]) -> Result<()> {
        let mut writer = file;
        let error = loop {
            match writer.write(line) {
                Ok(written) if written == line.len() => return Ok(()),
                Ok(_) => break std::io::Error::from_raw_os_error(libc::ENOSPC),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // Nothing of it was written.
                Err(error) => return Err(failed("write to", &self.path)(error)),
            }
        };
        // A file that may only be appended to keeps the piece.
        if self.spoiled || file.set_len(self.len).is_err() {
            self.spoiled = true;
        }
        Err(failed("write all of a record to", &self.path)(error))
    }

    /// Closes the file under its number; the next [`LogFiles::begin`] makes another.
    ///
    /// # Errors
    /// `AUDIT` if the folder does not let us: then it is still open.
    pub fn close(&mut self) -> Result<(PathBuf, Arc<File>)> {
        let to = numbered(&self.path, self.number);
        if to.symlink_metadata().is_ok() {
            refuse!(Audit, "cannot close audit log {}: {} is there", self.path.display(), to.display());
        }
        std::fs::rename(&self.path, &to).map_err(failed("close", &self.path))?;
        let file = self.file.take().expect("only an open file is closed");
        Ok((to, file))
    }

    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }
}

/// One process at a time. The lock is a file of its own: the log's own file changes.
fn lock(path: &Path) -> Result<File> {
    let place = beside(path, "lock");
    let lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&place)
        .map_err(failed("take", path))?;
    // A child that another thread has just forked holds what we let go of until it executes its program.
    let deadline = Instant::now() + LOCK_WAIT;
    let mut taken = lock.try_lock();
    while matches!(taken, Err(TryLockError::WouldBlock)) && Instant::now() < deadline {
        std::thread::sleep(LOCK_LOOK);
        taken = lock.try_lock();
    }
    match taken {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = [0; 16];
            let read = lock.read_at(&mut holder, 0).unwrap_or(0);
            let holder = String::from_utf8_lossy(&holder[..read]);
            refuse!(
                Audit,
                "another process ({}) writes audit log {}; give each process an audit-file of its own",
                if holder.is_empty() { "unknown" } else { holder.trim() },
                path.display()
            );
        }
        Err(TryLockError::Error(error)) => return Err(failed("take", path)(error)),
    }
    // For whoever comes second; it may be too full to be said.
    let _ = lock.set_len(0).and_then(|()| lock.write_all_at(format!("pid {}\n", std::process::id()).as_bytes(), 0));
    Ok(lock)
}

/// `DIR/.NAME.WHAT`: not among what `NAME*` names.
pub fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{what}"))
}

fn numbered(path: &Path, number: u64) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}.{number:06}"))
}

/// The closed files of the log at `path`, oldest first.
///
/// # Errors
/// `AUDIT` if the folder cannot be listed.
pub fn closed(path: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let name = format!("{}.", path.file_name().unwrap_or_default().to_string_lossy());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed("list the folder of", path))? {
        let entry = entry.map_err(failed("list the folder of", path))?;
        let entry_name = entry.file_name();
        let digits = entry_name.to_str().and_then(|entry| entry.strip_prefix(&name));
        let digits = digits.filter(|digits| digits.len() >= 6 && digits.bytes().all(|byte| byte.is_ascii_digit()));
        if let Some(number) = digits.and_then(|digits| digits.parse().ok()) {
            found.push((number, path.with_file_name(&entry_name)));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// A file of ours, of nobody else.
fn check(path: &Path, file: &File) -> Result<()> {
    let told = file.metadata().map_err(failed("read", path))?;
    // SAFETY: reads this process's credentials.
    let uid = unsafe { libc::geteuid() };
    if !told.is_file() {
        refuse!(Audit, "audit log {} is no ordinary file", path.display());
    }
    if told.uid() != uid || told.mode() & 0o077 != 0 {
        refuse!(
            Audit,
            "audit log {} is of uid {} and mode {:o}; it must be ours ({uid}) and 0600: chown and chmod it",
            path.display(),
            told.uid(),
            told.mode() & 0o777
        );
    }
    Ok(())
}

/// The tail of the newest closed file.
fn last_tail(path: &Path) -> Result<Option<Tail>> {
    let Some((_, last)) = closed(path)?.pop() else { return Ok(None) };
    Ok(tail_of(&last)?.map(|tail| Tail { unended: false, torn: None, ..tail }))
}

/// The last whole record of a file.
pub fn tail_of(path: &Path) -> Result<Option<Tail>> {
    Ok(tail_and_time_of(path)?.map(|(tail, _)| tail))
}

/// The last whole record of a file, and when it was written, in microseconds since 1970.
pub fn tail_and_time_of(path: &Path) -> Result<Option<(Tail, Option<u64>)>> {
    let open = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let (tail, line) = last_lines(path, &open.map_err(failed("read", path))?)?;
    Ok(tail.map(|tail| (tail, Link::of(&line).and_then(|link| parse_stamp(link.time)))))
}

fn read_at(path: &Path, file: &File, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut bytes, range.start).map_err(failed("read", path))?;
    Ok(bytes)
}

fn first_line(path: &Path, file: &File) -> Result<Vec<u8>> {
    let len = file.metadata().map_err(failed("read", path))?.len();
    let mut bytes = read_at(path, file, 0..len.min(LINE_BYTES_MAX as u64))?;
    bytes.truncate(bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len()));
    Ok(bytes)
}

fn tail(path: &Path, file: &File) -> Result<Option<Tail>> {
    Ok(last_lines(path, file)?.0)
}

/// The last whole record, as a tail and as it lies.
fn last_lines(path: &Path, file: &File) -> Result<(Option<Tail>, Vec<u8>)> {
    let len = file.metadata().map_err(failed("read", path))?.len();
    let from = len.saturating_sub(TAIL_BYTES_MAX);
    let bytes = read_at(path, file, from..len)?;
    let mut end = bytes.len();
    while end > 0 {
        let body = end - usize::from(bytes[end - 1] == b'\n');
        let start = bytes[..body].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let line = &bytes[start..body];
        if let Some(link) = Link::of(line) {
            let unended = body == end;
            let rest = &bytes[end..];
            let torn = Torn { bytes: rest.len() as u64, sha256: sha256(&[rest]) };
            let tail = Tail {
                log: link.log.to_owned(),
                seq: link.seq,
                hash: hash_of(line),
                end: from + end as u64,
                unended,
                torn: (!rest.is_empty()).then_some(torn),
            };
            return Ok((Some(tail), line.to_vec()));
        }
        end = start;
    }
    Ok((None, Vec::new()))
}
