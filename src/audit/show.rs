//! Finding records: who, when, which model, how bad.
//!
//! In: files of a log, a [`Query`]. Out: the lines that fit, in their order, as they lie.
//! Promises: an answer is the same with an index, without one, and with one that was spoiled; blocks in which nothing can
//! fit are not read.
//! Not here: whether what is found is genuine (`verify`).
//! Held by: the tests below, tests/audit.rs; benches/audit.rs for how fast.

use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::file;
use super::index::{BROKEN, Block, Index, Row, kind_number};
use super::record::{Record, shown};
use crate::error::{Code, Error, Result};
use crate::telemetry::events::{Kind, Outcome, Severity};

/// What is looked for; what is empty fits everything.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Microseconds since 1970, both ends included.
    pub since: Option<u64>,
    pub until: Option<u64>,
    pub uids: Vec<u32>,
    /// Names, or their beginnings with a `*` behind them.
    pub models: Vec<String>,
    /// This bad at least.
    pub severity: Option<Severity>,
    pub kinds: Vec<String>,
    pub outcomes: Vec<Outcome>,
    /// Only the newest that fit.
    pub last: Option<usize>,
}

impl Query {
    /// The kinds that can be asked for.
    pub fn all_kinds() -> Vec<&'static str> {
        let of_events = Kind::ALL.iter().map(|kind| kind.name());
        of_events.chain(super::record::own::ALL.into_iter().filter(|name| *name != "checkpoint")).collect()
    }
}

/// A query against one block: what is wanted, as bits and places.
struct Wanted {
    since: u64,
    until: u64,
    severities: u8,
    outcomes: u8,
    kinds: u64,
}

impl Wanted {
    fn of(query: &Query) -> Wanted {
        let from = query.severity.map_or(0, |severity| severity as u8);
        let outcomes = query.outcomes.iter().fold(0, |all, outcome| all | 1 << *outcome as u8);
        let kinds = query.kinds.iter().fold(0, |all, kind| all | 1 << kind_number(kind));
        Wanted {
            since: query.since.unwrap_or(0),
            until: query.until.unwrap_or(u64::MAX),
            severities: u8::MAX << from,
            outcomes: if query.outcomes.is_empty() { u8::MAX } else { outcomes },
            // What is no record fits no question; `verify` tells of it.
            kinds: if query.kinds.is_empty() { !(1 << BROKEN) } else { kinds },
        }
    }

    fn can_fit(&self, block: &Block) -> bool {
        let times = block.times();
        *times.start() <= self.until
            && *times.end() >= self.since
            && block.severities() & self.severities != 0
            && block.outcomes() & self.outcomes != 0
            && block.kinds() & self.kinds != 0
    }

    fn fits(&self, row: &Row) -> bool {
        (self.since..=self.until).contains(&row.time)
            && self.severities >> row.severity & 1 == 1
            && self.outcomes >> row.outcome & 1 == 1
            && self.kinds >> row.kind & 1 == 1
    }
}

/// The files of the log at `path`: itself and the closed ones beside it, oldest first. One that is named by its number is
/// alone.
///
/// # Errors
/// `NOT_FOUND` if there is none.
pub fn files_of(path: &std::path::Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = file::closed(path)?.into_iter().map(|(_, path)| path).collect();
    if path.exists() {
        files.push(path.to_owned());
    }
    if files.is_empty() {
        return Err(Error::new(Code::NotFound, format!("there is no audit log at {}", path.display())));
    }
    Ok(files)
}

/// Hands each line that fits to `take`, newline included.
///
/// # Errors
/// A log that cannot be read; what `take` answers.
pub fn find(files: &[PathBuf], query: &Query, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let wanted = Wanted::of(query);
    let mut newest: VecDeque<Vec<u8>> = VecDeque::new();
    for path in files {
        let mut index = Index::of(path)?;
        while let Some(block) = index.next_block()? {
            let rows = rows(&block, query, &wanted);
            if rows.is_empty() {
                continue;
            }
            let lines = Lines::of(&index, &block, &rows)?;
            for row in &rows {
                let line = lines.line(&index, row)?;
                match query.last {
                    None => take(&line)?,
                    Some(0) => {}
                    Some(most) => {
                        if newest.len() == most {
                            newest.pop_front();
                        }
                        newest.push_back(line.into_owned());
                    }
                }
            }
        }
    }
    newest.iter().try_for_each(|line| take(line))
}

/// The rows of a block that fit.
fn rows(block: &Block, query: &Query, wanted: &Wanted) -> Vec<Row> {
    if !wanted.can_fit(block) {
        return Vec::new();
    }
    let users: Vec<bool> = block.users().map(|uid| query.uids.contains(&uid)).collect();
    let models: Vec<bool> = block.models().map(|name| query.models.iter().any(|asked| is_named(name, asked))).collect();
    if !query.uids.is_empty() && !users.contains(&true) || !query.models.is_empty() && !models.contains(&true) {
        return Vec::new();
    }
    let is_in = |places: &[bool], place: Option<u16>| {
        place.is_some_and(|place| places.get(usize::from(place)).copied().unwrap_or(false))
    };
    let fits = |row: &Row| {
        wanted.fits(row)
            && (query.uids.is_empty() || is_in(&users, row.user))
            && (query.models.is_empty() || is_in(&models, row.model))
    };
    block.rows().filter(fits).collect()
}

fn is_named(name: &str, asked: &str) -> bool {
    match asked.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == asked,
    }
}

/// The bytes of a block, if many of its lines fit; each by itself otherwise.
struct Lines {
    start: u64,
    bytes: Option<Vec<u8>>,
}

impl Lines {
    fn of(index: &Index, block: &Block, rows: &[Row]) -> Result<Lines> {
        let span = block.span();
        let bytes = (rows.len() * 8 > block.lines()).then(|| read(index, span.clone())).transpose()?;
        Ok(Lines { start: span.start, bytes })
    }

    fn line(&self, index: &Index, row: &Row) -> Result<std::borrow::Cow<'_, [u8]>> {
        let line = match &self.bytes {
            Some(bytes) => {
                let at = (row.offset - self.start) as usize;
                bytes.get(at..at + row.len as usize).map(std::borrow::Cow::Borrowed)
            }
            None => Some(read(index, row.offset..row.offset + u64::from(row.len))?.into()),
        };
        match line {
            Some(line) if line.starts_with(b"{\"time\":\"") => Ok(line),
            Some(_) | None => Err(Error::new(
                Code::AuditChain,
                format!(
                    "{} is not the file that its index was made of; remove {}, and run `modelfs audit verify`",
                    index.path().display(),
                    file::beside(index.path(), "index").display()
                ),
            )),
        }
    }
}

fn read(index: &Index, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    index
        .log()
        .read_exact_at(&mut bytes, range.start)
        .map_err(|e| Error::new(Code::Usage, format!("cannot read {}", index.path().display())).with_source(e))?;
    Ok(bytes)
}

/// A record in one line for people; nothing in it can move a cursor.
pub fn sentence(record: &Record<'_>) -> String {
    let more = &record.more;
    let mut text = format!("{:<8} {:<13} {:<7}", record.severity.name(), shown(&record.kind), record.outcome.name());
    let mut add = |part: String| {
        text.push(' ');
        text.push_str(&part);
    };
    if let Some(uid) = more.uid {
        add(format!("uid {uid}"));
    }
    if let Some(pid) = more.pid {
        add(format!("pid {pid}"));
    }
    let places = [("in pod ", &more.pod), ("called ", &more.pod_name), ("in container ", &more.container)];
    for (name, value) in std::iter::once(("", &more.command)).chain(places) {
        if let Some(value) = value {
            add(format!("{name}{}", shown(value)));
        }
    }
    if let Some(account) = &more.service_account {
        add(format!("as {}", shown(account)));
    }
    if let Some(model) = &more.model {
        let version = more.version.map_or(String::new(), |version| format!(" version {version}"));
        add(format!("model {}{version}", shown(model)));
    }
    if let Some(file) = &more.file {
        add(format!("file {}", shown(file)));
    }
    if let Some(key) = &more.key {
        add(format!("by {}", shown(key)));
    }
    if let Some(detail) = &more.detail {
        add(format!("({})", shown(detail)));
    }
    if let Some(code) = &more.code {
        add(format!("[{}]", shown(code)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_asked_for_by_name_or_beginning() {
        assert!(is_named("acme/llama", "acme/llama") && is_named("acme/llama", "acme/*") && is_named("x", "*"));
        assert!(!is_named("acme/llama2", "acme/llama") && !is_named("other/llama", "acme/*"));
    }
}
