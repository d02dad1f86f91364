//! Every number this program keeps about itself, each with its unit, and the one place where log lines are made safe.
//!
//! In: increments from the read path (one relaxed atomic add each, no lock, no allocation) and `tracing` events.
//! Out: a [`Snapshot`] for `modelfs status` and metrics; text or JSON lines on standard error.
//! Promises: counting never fails and never waits; what looks like a credential is masked before a line leaves the
//! process, whoever logged it.
//! `events`: what happened that somebody answers for; `tally`: how often. `stores`: which of them answer.
//! Not here: the log of it (`audit`), the names of failures (`error`).

pub mod events;
pub mod stores;
pub mod tally;

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::error::{Code, Error, Result};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }
    pub fn inc(&self) {
        self.add(1);
    }
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down: what is in use now.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Time spent, summed over threads: kept in nanoseconds, told in seconds.
#[derive(Debug, Default)]
pub struct Spent(AtomicU64);

impl Spent {
    pub fn add(&self, time: Duration) {
        self.0.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
    /// Adds the time from now until the answer is dropped.
    pub fn measure(&self) -> Measure<'_> {
        Measure { spent: self, from: Instant::now() }
    }
    pub fn get(&self) -> f64 {
        Duration::from_nanos(self.0.load(Ordering::Relaxed)).as_secs_f64()
    }
}

/// See [`Spent::measure`].
#[must_use = "time is counted when this is dropped"]
pub struct Measure<'a> {
    spent: &'a Spent,
    from: Instant,
}

impl Drop for Measure<'_> {
    fn drop(&mut self) {
        self.spent.add(self.from.elapsed());
    }
}

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident: $kind:ident => $out:ty;)*) => {
        /// All metrics of one mount. Shared by reference; every field may be bumped from any thread.
        #[derive(Debug, Default)]
        pub struct Telemetry {
            $($(#[$doc])* pub $name: $kind,)*
            /// What happened, beside how often.
            pub events: events::Events,
            /// Which stores do not answer.
            pub stores: stores::Stores,
        }

        /// What [`Telemetry`] said at one moment. Field names are a contract: dashboards depend on them.
        #[derive(Debug, Clone, PartialEq, Serialize)]
        pub struct Snapshot { $($(#[$doc])* pub $name: $out,)* }

        impl Telemetry {
            /// Not one instant for all fields: each is read once, in order.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

metrics! {
    // From the store.
    /// Ciphertext bytes received.
    fetch_bytes: Counter => u64;
    /// Range requests sent, retries not counted.
    fetch_requests: Counter => u64;
    /// Requests that ended in an error after all retries.
    fetch_errors: Counter => u64;
    /// Chunks asked for again because hash or length was wrong.
    refetches: Counter => u64;
    /// Extra requests for ranges whose first request was far behind its peers.
    hedges_sent: Counter => u64;
    /// Of those, how many answered before the first one.
    hedges_won: Counter => u64;
    /// Time a request waited for its bytes, summed.
    fetch_seconds: Spent => f64;
    /// Calls that waited for their turn at the limits of the origin.
    limit_waits: Counter => u64;
    limit_wait_seconds: Spent => f64;
    /// Sets of storage credentials fetched, leases made longer, attempts that failed, sets that the store refused.
    credentials_issued: Counter => u64;
    credentials_renewed: Counter => u64;
    credentials_failed: Counter => u64;
    credentials_refused: Counter => u64;

    // Verifying and opening.
    chunks_opened: Counter => u64;
    /// Plaintext bytes made by opening chunks.
    opened_bytes: Counter => u64;
    /// Time spent hashing and decrypting, summed over threads.
    open_seconds: Spent => f64;
    /// Chunks whose hash was not the signed one.
    hash_failures: Counter => u64;
    /// Blocks whose tag was wrong.
    tag_failures: Counter => u64;
    /// Chunks of a wrong length.
    length_failures: Counter => u64;

    // The cache.
    /// Reads answered from locked memory at once.
    cache_hits: Counter => u64;
    /// Reads that had to wait for a chunk.
    cache_misses: Counter => u64;
    /// Plaintext bytes in locked memory now.
    cache_bytes: Gauge => u64;
    /// The limit of `cache_bytes`.
    cache_bytes_max: Gauge => u64;
    evicted_bytes: Counter => u64;
    /// Plaintext bytes overwritten with zeros: evictions, `umount`, failures.
    wiped_bytes: Counter => u64;
    /// Plaintext bytes that were cut off from readers and given back without being overwritten: pages could not be pinned.
    unwiped_bytes: Counter => u64;
    /// Time spent overwriting, summed over threads.
    wipe_seconds: Spent => f64;
    /// Bytes that should lie in huge pages but got small ones (memory was fragmented).
    huge_page_short_bytes: Gauge => u64;
    prefetch_fetched_bytes: Counter => u64;
    /// Of those, bytes that a read asked for later.
    prefetch_used_bytes: Counter => u64;

    // Through the kernel.
    reads: Counter => u64;
    read_bytes: Counter => u64;
    read_errors: Counter => u64;
    /// Opens answered by the daemon, copied through the page cache.
    opens_plain: Counter => u64;
    /// Opens answered with the locked pages themselves.
    opens_passthrough: Counter => u64;
    /// Opens that were held until the file was whole.
    opens_held: Counter => u64;
    /// Of those, opens that were answered before the file was whole, because it would have taken too long.
    opens_held_in_vain: Counter => u64;
    /// Files whose rest was fetched because of how they were read so far.
    fills_foreseen: Counter => u64;
    /// Opens answered ESTALE so that the kernel looks the name up again.
    estale_answers: Counter => u64;
    /// Passthrough that the kernel refused; the open went on plain.
    passthrough_refused: Counter => u64;
    /// Waits that ended at their deadline.
    deadline_errors: Counter => u64;

    // Who may, and who looks.
    /// Opens and look-ups that a rule refused.
    access_denied: Counter => u64;
    /// Requests that reached a limit of opens or bytes of somebody.
    limited: Counter => u64;
    /// Somebodies who are refused everything for a while, now.
    blocked: Gauge => u64;
    /// Records of the audit log written; records that could not be, and checkpoints that did not reach the disk.
    audit_records: Counter => u64;
    audit_failures: Counter => u64;
    /// Records taken and not yet written.
    audit_waiting: Gauge => u64;
    /// Since when the oldest checkpoint waits that is not on the disk, or not elsewhere, in Unix seconds; 0: none does.
    audit_pending_since: Gauge => u64;
    /// Alerts that a webhook took; that it did not take after all attempts; that were told with another one; that found no
    /// room to wait in.
    alerts_sent: Counter => u64;
    alerts_failed: Counter => u64;
    alerts_merged: Counter => u64;
    alerts_dropped: Counter => u64;
    /// Requests for metrics and health answered, and turned away for want of a right or for being too many.
    http_requests: Counter => u64;
    http_refused: Counter => u64;
    /// The same of the control socket.
    control_requests: Counter => u64;
    control_refused: Counter => u64;
}

impl Snapshot {
    /// How long the oldest checkpoint of the audit log has been on its way to the disk and elsewhere, in seconds.
    pub fn audit_checkpoint_age(&self) -> u64 {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
        if self.audit_pending_since == 0 { 0 } else { now.saturating_sub(self.audit_pending_since) }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            other => Err(Error::new(Code::Usage, format!("log format `{other}` is neither text nor json"))),
        }
    }
}

/// How much is logged, and how.
#[derive(Debug, Clone, Default)]
pub struct Logging {
    pub format: LogFormat,
    /// -1 with `-q`, 0, 1 with `-v`, 2 with `-vv` ...
    pub verbosity: i8,
    /// The option `log`: directives of `tracing`, above `verbosity`.
    pub filter: Option<String>,
    /// A daemon tells its life (info); a command only its troubles (warn).
    pub daemon: bool,
}

/// Crates whose debug lines hold request headers, hence credentials: never below info, whatever was asked.
const QUIET_CRATES: &[&str] = &["hyper", "hyper_util", "reqwest", "h2", "rustls", "object_store"];

fn directives(logging: &Logging) -> String {
    let level = match (logging.verbosity, logging.daemon) {
        (i8::MIN..=-1, _) => "error",
        (0, false) => "warn",
        (0, true) | (1, false) => "info",
        (1, true) | (2, _) => "debug",
        (3.., _) => "trace",
    };
    // Who names a part of one of them would otherwise be more exact than what stands behind; who names a span would have all
    // that is told within it.
    let named = |one: &str| {
        one.contains(['[', ']', '{', '}'])
            || QUIET_CRATES.iter().chain(&["vaultrs", "rustify"]).any(|name| one.trim().starts_with(name))
    };
    let mut text = match &logging.filter {
        Some(filter) => filter.split(',').filter(|one| !named(one)).collect::<Vec<_>>().join(","),
        None => format!("warn,modelfs={level}"),
    };
    let others = if logging.verbosity < 0 { "error" } else { "warn" };
    for name in QUIET_CRATES {
        text.push_str(&format!(",{name}={others}"));
    }
    // What they call an error is an answer that we understand, and tell in our own words.
    text.push_str(",vaultrs=off,rustify=off");
    text
}

/// # Errors
/// `USAGE` for what is no filter of `tracing`.
pub fn check_log_filter(text: &str) -> Result<()> {
    if text.contains('[') {
        crate::refuse!(
            Usage,
            "{NO_FILTER}; a span cannot be named, since what others log within it may hold credentials"
        );
    }
    let read = tracing_subscriber::EnvFilter::try_new(text);
    read.map(drop).map_err(|e| Error::new(Code::Usage, NO_FILTER).with_source(e))
}

const NO_FILTER: &str = "that is no log filter; write a level or modelfs=debug";

/// Sends `tracing` to standard error. Call once, early; a second call changes nothing.
///
/// # Errors
/// `Usage` for a filter that is none.
pub fn init_logging(logging: &Logging) -> Result<()> {
    use tracing_subscriber::EnvFilter;
    let filter =
        EnvFilter::try_new(directives(logging)).map_err(|e| Error::new(Code::Usage, NO_FILTER).with_source(e))?;
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Scrubbed::new(io::stderr()));
    // SAFETY: isatty reads no memory of ours.
    let terminal = unsafe { libc::isatty(libc::STDERR_FILENO) } == 1;
    let done = match logging.format {
        LogFormat::Text => base.with_ansi(terminal).with_target(false).try_init(),
        LogFormat::Json => base.json().with_ansi(false).try_init(),
    };
    drop(done); // Already set by a test or an earlier call: keep that one.
    Ok(())
}

/// One event of the log, masked as a whole before it is written in one call.
struct Scrubbed<W: Write> {
    inner: W,
    line: Vec<u8>,
}

impl<W: Write> Scrubbed<W> {
    fn new(inner: W) -> Self {
        Scrubbed { inner, line: Vec::with_capacity(256) }
    }
}

impl<W: Write> Write for Scrubbed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        let text = String::from_utf8_lossy(&self.line);
        self.inner.write_all(scrub(&text).as_bytes())?;
        self.line.clear();
        self.inner.flush()
    }
}

impl<W: Write> Drop for Scrubbed<W> {
    fn drop(&mut self) {
        // A log line that cannot be written has nowhere to be reported.
        let _ = self.flush();
    }
}

/// What stands in place of a masked value.
pub const MASK: &str = "[masked]";

/// Names whose value, after `=` or `:`, never leaves the process. Lower case; matched without regard to case.
const SECRET_NAMES: &[&str] = &[
    "x-amz-signature",
    "x-amz-credential",
    "x-amz-security-token",
    "x-vault-token",
    "aws_secret_access_key",
    "aws_session_token",
    "secret_access_key",
    "authorization",
    "modelfs_key",
    "modelfs_passphrase",
    "model_encryption_key",
    "sig",
];

/// How Vault and OpenBao service, batch and recovery tokens begin.
const TOKEN_STARTS: &[&str] = &["hvs.", "hvb.", "hvr."];

/// The date of the Gregorian calendar so many days after 1970-01-01: year, month, day. By Howard Hinnant's algorithm, in eras
/// of 400 years that begin in March.
pub fn civil_date(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// `text` with everything masked that looks like a credential: values of signed URLs and secret variables, passwords in
/// URLs, Vault tokens. Digests and public keys stay: they are hex as well, and wanted.
pub fn scrub(text: &str) -> Cow<'_, str> {
    let lower = text.to_ascii_lowercase();
    let mut holes: Vec<(usize, usize)> = Vec::new();
    for name in SECRET_NAMES {
        for (at, _) in lower.match_indices(name) {
            let starts_word = at == 0 || !lower.as_bytes()[at - 1].is_ascii_alphanumeric();
            let rest = &lower[at + name.len()..];
            let skip = rest.len() - rest.trim_start_matches(['"', '\\']).len();
            let rest = &rest[skip..];
            if !starts_word || !rest.starts_with(['=', ':']) {
                continue;
            }
            let value = &rest[1..];
            let lead = value.len() - value.trim_start_matches([' ', '"', '\\']).len();
            // "Authorization: Bearer x" and "... AWS4-HMAC-SHA256 Credential=..": up to the end of the line.
            let ends: &[char] =
                if *name == "authorization" { &['\n', '"'] } else { &['&', ' ', '"', '\'', '\n', ',', ')', '\\'] };
            let start = at + name.len() + skip + 1 + lead;
            let len = lower[start..].find(ends).unwrap_or(lower.len() - start);
            holes.push((start, start + len));
        }
    }
    for start in TOKEN_STARTS {
        for (at, _) in lower.match_indices(start) {
            let len = lower[at..]
                .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')))
                .unwrap_or(lower.len() - at);
            holes.push((at, at + len));
        }
    }
    for (at, _) in lower.match_indices("://") {
        let authority = &lower[at + 3..];
        let end = authority.find(['/', ' ', '"', '?', '\n']).unwrap_or(authority.len());
        if let Some(user_end) = authority[..end].rfind('@') {
            holes.push((at + 3, at + 3 + user_end));
        }
    }
    holes.retain(|(from, to)| from < to);
    if holes.is_empty() {
        return Cow::Borrowed(text);
    }
    holes.sort_unstable();
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for (from, to) in holes {
        if from >= done {
            out.push_str(&text[done..from]);
            out.push_str(MASK);
        }
        done = done.max(to);
    }
    out.push_str(&text[done..]);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_tells_what_was_counted_in_the_unit_of_its_name() {
        let telemetry = Telemetry::default();
        telemetry.fetch_bytes.add(8_390_656);
        telemetry.chunks_opened.inc();
        telemetry.open_seconds.add(Duration::from_millis(1500));
        telemetry.cache_bytes.set(42);

        let json = serde_json::to_value(telemetry.snapshot()).expect("a snapshot is plain numbers");

        assert_eq!(json["fetch_bytes"], 8_390_656);
        assert_eq!(json["chunks_opened"], 1);
        assert_eq!(json["open_seconds"], 1.5);
        assert_eq!(json["cache_bytes"], 42);
    }

    #[test]
    fn credentials_are_masked_and_digests_stay() {
        let digest = "9b970cfe30418addc91ccbdb2ca8d9f92a472ff526775864d07dcbad2710044e";
        let cases = [
            ("GET https://b.s3.x/k?X-Amz-Signature=abc123&x=1", "GET https://b.s3.x/k?X-Amz-Signature=[masked]&x=1"),
            ("url https://me:pw@host/p", "url https://[masked]@host/p"),
            ("token hvs.CAESIJ-abc_9 refused", "token [masked] refused"),
            ("{\"authorization\":\"Bearer abc def\",\"a\":1}", "{\"authorization\":\"[masked]\",\"a\":1}"),
            ("MODELFS_PASSPHRASE=hunter2 set", "MODELFS_PASSPHRASE=[masked] set"),
        ];
        for (line, wanted) in cases {
            assert_eq!(scrub(line), wanted, "{line}");
        }
        let kept = format!("manifest sha256:{digest} design: config=1");
        assert_eq!(scrub(&kept), kept);
    }

    #[test]
    fn a_log_event_is_masked_even_when_it_was_written_in_pieces() {
        let mut out = Vec::new();
        let mut writer = Scrubbed::new(&mut out);
        writer.write_all(b"fetch https://u:").expect("memory");
        writer.write_all(b"p@h/x\n").expect("memory");
        drop(writer);
        assert_eq!(String::from_utf8_lossy(&out), "fetch https://[masked]@h/x\n");
    }

    #[test]
    fn crates_that_log_headers_stay_quiet_whatever_is_asked() {
        let loud = Logging { verbosity: 3, filter: Some("trace".into()), ..Logging::default() };
        let text = directives(&loud);
        for name in QUIET_CRATES {
            assert!(text.contains(&format!("{name}=warn")), "{text}");
        }
        // A part of one that is named exactly would win over the whole.
        let exact = Logging {
            filter: Some("modelfs=debug, hyper::proto::h1=trace,rustify=debug,[Connection{a=1,b=2}]=trace".into()),
            ..loud
        };
        let text = directives(&exact);
        assert!(text.starts_with("modelfs=debug,hyper=warn") && !text.contains("proto"), "{text}");
        assert!(!text.contains("rustify=debug"), "{text}");
    }
}
