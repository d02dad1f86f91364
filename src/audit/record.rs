//! One line of the log: which fields it has and in which order, how it names its place in the chain, and what is hashed.
//!
//! In: a [`Record`] without a place. Out: one line of ASCII, its place filled in; from a line, its [`Link`].
//! Promises: a line holds no byte outside `0x20..=0x7e` before its newline, whatever a name holds: what is not printable
//! ASCII is written as `\uXXXX`; a text is scrubbed of what looks like a credential, and bounded; the hash of a line is
//! SHA-256 of its exact bytes without the newline.
//! Not here: files (`file`), what is wrong with a chain (`verify`).
//! Held by: the tests below.

use std::borrow::Cow;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::crypto::{PublicKey, SIGNATURE_LEN, SigningKey, sha256};
use crate::telemetry::events::{Event, Outcome, Severity};
use crate::telemetry::{civil_date, scrub};

/// No record is longer: every text has a bound, and so has their number.
pub const LINE_BYTES_MAX: usize = 512 << 10;

/// A text is cut here. PATH_MAX is 4096.
const TEXT_BYTES_MAX: usize = 4096;

/// Records that the log writes of itself, beside those of events.
pub mod own {
    /// The first of a file: which log and which file of it.
    pub const HEAD: &str = "head";
    /// The chain so far, signed where there is a key.
    pub const CHECKPOINT: &str = "checkpoint";
    /// What stands before it since the last whole record is a piece of one.
    pub const TORN: &str = "torn";
    /// Events that could not be recorded when they happened.
    pub const GAP: &str = "gap";
    /// An old file was removed.
    pub const REMOVED: &str = "removed";
    pub const ALL: [&str; 5] = [HEAD, CHECKPOINT, TORN, GAP, REMOVED];
}

/// What a line says. The order of the fields is the order in the line; the first seven are in every one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record<'a> {
    /// UTC with microseconds, always 27 characters.
    pub time: Cow<'a, str>,
    /// From 0, one more each line, over all files of a log.
    pub seq: u64,
    /// 16 hex digits, drawn when the log was begun.
    pub log: Cow<'a, str>,
    /// The hash of the line before; of the first line of a log, zeros.
    pub prev: Cow<'a, str>,
    pub kind: Cow<'a, str>,
    pub severity: Severity,
    pub outcome: Outcome,
    #[serde(flatten)]
    pub more: More<'a>,
}

/// Whatever of it is known.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct More<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod_name: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_account: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mountpoint: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<Cow<'a, str>>,
    /// Of a head: the number of the file, from 1, and the boot of the machine that began it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot: Option<Cow<'a, str>>,
    /// Of a checkpoint: events since the last one; of a gap: events that were lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub records: Option<u64>,
    /// Of a checkpoint: after how many events the next one comes at the latest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub due: Option<u64>,
    /// Of a torn piece: its length and hash; of a removed file the hash of its last record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Cow<'a, str>>,
    /// Of a removed file: its last record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<u64>,
    /// Of a signed checkpoint: the public key, and the signature over all of the line before it. Always last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signer: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signature: Option<Cow<'a, str>>,
}

/// `value` as it may stand in a record: short, and without what looks like a credential.
fn text(value: &str) -> Cow<'_, str> {
    if value.len() <= TEXT_BYTES_MAX {
        return scrub(value);
    }
    // Masked as a whole first: half of a credential looks like none.
    let mut cut = scrub(value).into_owned();
    let boundary = (0..=TEXT_BYTES_MAX.min(cut.len())).rev().find(|at| cut.is_char_boundary(*at));
    cut.truncate(boundary.unwrap_or(0));
    cut.push_str("[cut]");
    cut.into()
}

fn path(value: &std::path::Path) -> Cow<'_, str> {
    match value.to_str() {
        Some(value) => text(value),
        None => text(&value.to_string_lossy()).into_owned().into(),
    }
}

impl<'a> Record<'a> {
    pub fn own(kind: &'static str, more: More<'a>) -> Record<'a> {
        Record::new(kind, Severity::Low, Outcome::Allowed, more)
    }

    fn new(kind: &'static str, severity: Severity, outcome: Outcome, more: More<'a>) -> Record<'a> {
        let (time, log, prev) = Default::default();
        Record { time, seq: 0, log, prev, kind: kind.into(), severity, outcome, more }
    }

    pub fn of(event: &'a Event) -> Record<'a> {
        let (actor, subject) = (&event.actor, &event.subject);
        let some = |value: &'a Option<String>| value.as_deref().map(text);
        let more = More {
            uid: actor.uid,
            gid: actor.gid,
            pid: actor.pid,
            command: some(&actor.command),
            exe: actor.exe.as_deref().map(path),
            cgroup: some(&actor.cgroup),
            container: some(&actor.container),
            pod: some(&actor.pod),
            pod_name: some(&actor.pod_name),
            service_account: some(&actor.service_account),
            mountpoint: subject.mountpoint.as_deref().map(path),
            store: some(&subject.store),
            model: some(&subject.model),
            version: subject.version,
            manifest: some(&subject.manifest),
            file: some(&subject.file),
            key: some(&subject.key),
            code: event.code.map(|code| code.name().into()),
            detail: some(&event.detail),
            ..More::default()
        };
        Record::new(event.kind.name(), event.severity, event.outcome, more)
    }

    pub fn severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }

    pub fn outcome(mut self, outcome: Outcome) -> Self {
        self.outcome = outcome;
        self
    }

    fn write(&self, line: &mut Vec<u8>) {
        line.clear();
        let mut writer = serde_json::Serializer::with_formatter(line, Ascii);
        self.serialize(&mut writer).expect("memory takes it, and all keys are words");
    }
}

/// JSON whose every byte is printable ASCII: no name can end a line, move a cursor or turn the writing round.
struct Ascii;

impl serde_json::ser::Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if fragment.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            match c {
                ' '..='~' => writer.write_all(&[c as u8])?,
                _ => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?,
            }
        }
        Ok(())
    }
}

/// Where the next line goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub log: String,
    pub seq: u64,
    pub prev: [u8; 32],
}

/// What a checkpoint's signature is over, before the bytes of its line.
const SIGNED: &[u8] = b"modelfs audit checkpoint 1\n";

/// The end of a signed checkpoint: this, 128 hex digits, `"}`.
const SIGNATURE: &str = ",\"signature\":\"";

impl Chain {
    pub fn new() -> crate::error::Result<Chain> {
        let mut id = [0; 8];
        getrandom::fill(&mut id).map_err(|e| {
            crate::error::Error::new(crate::error::Code::Host, "no random numbers from the kernel").with_source(e)
        })?;
        Ok(Chain { log: hex::encode(id), seq: 0, prev: [0; 32] })
    }

    /// Makes the next line, newline included. The chain goes on only with [`Chain::advance`].
    pub fn line(&self, record: &mut Record<'_>, line: &mut Vec<u8>) {
        record.time = stamp(now()).into();
        record.seq = self.seq;
        record.log = self.log.clone().into();
        record.prev = hex::encode(self.prev).into();
        record.write(line);
        line.push(b'\n');
    }

    /// The same for a record that `key` signs.
    pub fn signed_line(&self, record: &mut Record<'_>, key: &SigningKey, line: &mut Vec<u8>) {
        record.more.signer = Some(key.public().to_string().into());
        self.line(record, line);
        line.truncate(line.len() - 2); // `}` and the newline
        let signature = key.sign(&[SIGNED, line].concat());
        line.extend_from_slice(SIGNATURE.as_bytes());
        line.extend_from_slice(hex::encode(signature).as_bytes());
        line.extend_from_slice(b"\"}\n");
    }

    /// `line`, as [`Chain::line`] made it, is written.
    pub fn advance(&mut self, line: &[u8]) {
        self.prev = hash_of(line);
        self.seq += 1;
    }
}

/// The hash that the next line holds.
pub fn hash_of(line: &[u8]) -> [u8; 32] {
    sha256(&[line.strip_suffix(b"\n").unwrap_or(line)])
}

/// What of a line the chain is made of.
#[derive(Debug, Clone, Deserialize)]
pub struct Link<'a> {
    pub time: &'a str,
    pub seq: u64,
    pub log: &'a str,
    pub prev: &'a str,
    pub kind: &'a str,
    pub number: Option<u64>,
    pub records: Option<u64>,
    pub due: Option<u64>,
    pub bytes: Option<u64>,
    pub last: Option<u64>,
    pub sha256: Option<&'a str>,
    pub signer: Option<&'a str>,
    pub signature: Option<&'a str>,
}

impl Link<'_> {
    /// Of a line with or without its newline; `None`: it is no record.
    pub fn of(line: &[u8]) -> Option<Link<'_>> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        if line.len() > LINE_BYTES_MAX || !line.starts_with(b"{") {
            return None;
        }
        serde_json::from_slice(line).ok()
    }
}

/// Whether the signature at the end of `line` is `key`'s over what stands before it.
pub fn is_signed_by(line: &[u8], key: &PublicKey) -> bool {
    const TAIL: usize = 2 * SIGNATURE_LEN + 2;
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let Some(at) = line.len().checked_sub(TAIL + SIGNATURE.len()) else { return false };
    let (message, end) = line.split_at(at);
    let digits = end.strip_prefix(SIGNATURE.as_bytes()).and_then(|end| end.strip_suffix(b"\"}"));
    let mut signature = [0; SIGNATURE_LEN];
    match digits.map(|digits| hex::decode_to_slice(digits, &mut signature)) {
        Some(Ok(())) => key.verify_strict(&[SIGNED, message].concat(), &signature),
        Some(Err(_)) | None => false,
    }
}

/// Microseconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// `2026-11-28T21:58:14.123456Z`.
pub fn stamp(micros: u64) -> String {
    let seconds = micros / 1_000_000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) =
        civil_date(i64::try_from(days).expect("microseconds of 64 bits are below a million years"));
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", micros % 1_000_000)
}

/// What [`stamp`] wrote, and the same with fewer digits or without a time of day.
pub fn parse_stamp(text: &str) -> Option<u64> {
    let (date, time) = match text.split_once('T') {
        Some((date, time)) => (date, time.strip_suffix('Z')?),
        None => (text, "00:00:00"),
    };
    let number = |part: &str, len: usize, max: u64| -> Option<u64> {
        let right = part.len() == len && part.bytes().all(|byte| byte.is_ascii_digit());
        part.parse().ok().filter(|value| right && *value <= max)
    };
    let mut parts = date.split('-');
    let (year, month, day) =
        (number(parts.next()?, 4, 9999)?, number(parts.next()?, 2, 12)?, number(parts.next()?, 2, 31)?);
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut hands = clock.split(':');
    let (hour, minute) = (number(hands.next()?, 2, 23)?, number(hands.next()?, 2, 59)?);
    let second = hands.next().map_or(Some(0), |second| number(second, 2, 60))?;
    let micros = number(fraction, fraction.len(), 999_999).filter(|_| (1..=6).contains(&fraction.len()))?;
    if parts.next().is_some() || hands.next().is_some() || month == 0 || day == 0 || year < 1970 {
        return None;
    }
    let micros = micros * 10u64.pow(6 - fraction.len() as u32);
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let (era, year_of_era) = (year / 400, year % 400);
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = (era * 146_097 + day_of_era).checked_sub(719_468)?;
    Some((days * 86_400 + hour * 3600 + minute * 60 + second) * 1_000_000 + micros)
}

/// `text` as a person may see it: what is not printable, or turns the writing round, as an escape.
pub fn shown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ' '..='~' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::Secret;
    use crate::telemetry::events::{Actor, Kind, Subject};

    fn hostile() -> Event {
        Event::new(Kind::Open)
            .actor(Actor { uid: Some(1000), command: Some("a\nb\u{1b}[2J".into()), ..Actor::default() })
            .subject(Subject { file: Some("gpj.\u{202e}exe \u{200b}\u{7f}\u{9b}1m 🦀".into()), ..Subject::default() })
            .detail("got https://me:pw@host/x with token hvs.CAESIJ-abc_9")
    }

    #[test]
    fn whatever_a_name_holds_a_line_is_printable_ascii_and_says_the_same() {
        let chain = Chain::new().expect("random");
        let event = hostile();
        let mut line = Vec::new();
        chain.line(&mut Record::of(&event), &mut line);
        let body = line.strip_suffix(b"\n").expect("a newline");
        assert!(body.iter().all(|byte| (b' '..=b'~').contains(byte)), "{}", String::from_utf8_lossy(body));
        let read: Record<'_> = serde_json::from_slice(body).expect("JSON");
        assert_eq!(read.more.command.as_deref(), event.actor.command.as_deref());
        assert_eq!(read.more.file.as_deref(), event.subject.file.as_deref());
        let text = String::from_utf8_lossy(body);
        assert!(!text.contains("pw@") && !text.contains("CAESIJ"), "{text}");
        let shown = shown(&read.more.file.expect("there"));
        assert!(!shown.contains('\u{202e}') && !shown.contains('\u{200b}') && !shown.contains('\u{9b}'), "{shown}");
    }

    #[test]
    fn a_text_has_a_bound_and_so_has_a_line() {
        let long = "\u{1}".repeat(1 << 20);
        let all = Some(long.clone());
        let path = Some(std::path::PathBuf::from(&long));
        let event = Event::new(Kind::Open)
            .actor(Actor {
                uid: Some(u32::MAX),
                gid: Some(u32::MAX),
                pid: Some(u32::MAX),
                command: all.clone(),
                exe: path.clone(),
                cgroup: all.clone(),
                container: all.clone(),
                pod: all.clone(),
                pod_name: all.clone(),
                service_account: all.clone(),
            })
            .subject(Subject {
                mountpoint: path,
                store: all.clone(),
                model: all.clone(),
                version: Some(u64::MAX),
                manifest: all.clone(),
                file: all.clone(),
                key: all,
            })
            .detail(long);
        let mut line = Vec::new();
        Chain::new().expect("random").line(&mut Record::of(&event), &mut line);
        assert!(line.len() <= LINE_BYTES_MAX, "{}", line.len());
        assert!(Link::of(&line).is_some());
    }

    #[test]
    fn each_line_holds_the_hash_of_the_exact_bytes_of_the_one_before() {
        let mut chain = Chain::new().expect("random");
        let mut lines = Vec::new();
        for _ in 0..3 {
            let mut line = Vec::new();
            chain.line(&mut Record::of(&hostile()), &mut line);
            chain.advance(&line);
            lines.push(line);
        }
        for (seq, pair) in lines.windows(2).enumerate() {
            let next = Link::of(&pair[1]).expect("a record");
            assert_eq!(next.seq, seq as u64 + 1);
            assert_eq!(next.prev, hex::encode(sha256(&[&pair[0][..pair[0].len() - 1]])));
        }
    }

    #[test]
    fn a_signature_covers_all_of_its_line_and_is_of_one_key() {
        let key = |seed: u8| SigningKey::from_seed(Secret::from_bytes(&mut [seed; 32]));
        let chain = Chain::new().expect("random");
        let mut line = Vec::new();
        chain.signed_line(&mut Record::own(own::CHECKPOINT, More::default()), &key(1), &mut line);
        assert_eq!(Link::of(&line).expect("a record").signer, Some(&*key(1).public().to_string()));
        assert!(is_signed_by(&line, &key(1).public()));
        assert!(!is_signed_by(&line, &key(2).public()));
        for at in 0..line.len() - 1 {
            let mut bent = line.clone();
            bent[at] ^= 1;
            assert!(!is_signed_by(&bent, &key(1).public()), "byte {at}");
        }
        assert!(!is_signed_by(b"{}", &key(1).public()));
    }

    #[test]
    fn times_are_those_of_the_calendar_and_read_back() {
        for (micros, want) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400_000_001, "2000-02-29T00:00:00.000001Z"),
            (4_107_542_399_999_999, "2100-02-28T23:59:59.999999Z"),
            (4_107_542_400_000_000, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(stamp(micros), want);
            assert_eq!(parse_stamp(want), Some(micros));
        }
        assert_eq!(parse_stamp("2000-02-29"), Some(951_782_400_000_000));
        assert_eq!(parse_stamp("2000-02-29T00:00:00.5Z"), Some(951_782_400_500_000));
        assert_eq!(parse_stamp("2000-02-29T00:01Z"), Some(951_782_460_000_000));
        for bad in ["", "yesterday", "2000-13-01", "2000-02-29T00:00:00", "1969-12-31", "2000-1-1", "2000-00-10"] {
            assert_eq!(parse_stamp(bad), None, "{bad}");
        }
    }
}
