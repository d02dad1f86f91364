//! `modelfs audit`: whether a log is genuine, and what it says.

use std::io::{BufWriter, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::Out;
use crate::audit::record::{Record, now, parse_stamp};
use crate::audit::show::{Query, files_of, find, sentence};
use crate::audit::verify::{Report, settled, verify, verify_part};
use crate::config::Layers;
use crate::error::{Code, Error, Result};
use crate::keys::load_public_key;
use crate::refuse;
use crate::telemetry::events::{Outcome, Severity};
use crate::units::parse_duration;

/// Prove an audit log, and find records in it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    Verify(VerifyArgs),
    Show(ShowArgs),
}

const EXAMPLES: &str = "\
Examples:
  modelfs audit verify /var/log/modelfs/audit.log --trust audit.key.pub \\
      --checkpoints /mnt/worm/checkpoints
  modelfs audit show /var/log/modelfs/audit.log --since 24h --severity high
  modelfs mount ... --audit-file /var/log/modelfs/audit.log --audit-key audit.key   writes one

docs/AUDIT.md says what stands in a log and what can be proved of it.";

/// Say whether a log is the one that was written; if not, which line is wrong first, and what was done to it.
#[derive(Debug, Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub struct VerifyArgs {
    /// The log; its closed files (FILE.000001 ...) go with it
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// A key that may have signed its checkpoints: 64 hex digits, or a .pub file; give it again for more [default: any]
    #[arg(long, value_name = "PUBKEY")]
    trust: Vec<String>,
    /// Checkpoints that were kept elsewhere (audit-checkpoint-file): without them a log whose end was cut looks whole
    #[arg(long, value_name = "FILE")]
    checkpoints: Option<PathBuf>,
    /// The files are a part of a log, or of one of several whose checkpoints lie in one file
    #[arg(long)]
    part: bool,
}

const VERIFY_EXAMPLES: &str = "\
Examples:
  modelfs audit verify /var/log/modelfs/audit.log
  modelfs audit verify /var/log/modelfs/audit.log --trust audit.key.pub \\
      --checkpoints /mnt/worm/checkpoints
  modelfs audit verify exported/audit.log* --trust audit.key.pub --json

Exit code 0: the log is genuine as far as is said; 20: it was edited, deleted from, reordered, duplicated, inserted into, \
truncated, spliced, rewritten, or is not signed by whom you trust.";

/// Show the records of a log that fit, oldest first; with --json as they lie, one a line.
#[derive(Debug, Args)]
#[command(after_help = SHOW_EXAMPLES)]
pub struct ShowArgs {
    /// The log; its closed files go with it [default: the audit-file of the configuration]
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// From then on: 2026-11-28, 2026-11-28T21:00:00Z, or so long ago, as in 24h
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Until then
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// Of this user; give it again for more
    #[arg(long, value_name = "UID")]
    uid: Vec<u32>,
    /// Of this model, or of those that begin with NAME*; give it again for more
    #[arg(long, value_name = "NAME")]
    model: Vec<String>,
    /// At least this bad: low, medium, high, critical
    #[arg(long, value_name = "SEVERITY")]
    severity: Option<String>,
    /// Of this kind, as in open or tamper; give it again for more
    #[arg(long, value_name = "KIND")]
    kind: Vec<String>,
    /// allowed, denied or failed; give it again for more
    #[arg(long, value_name = "OUTCOME")]
    outcome: Vec<String>,
    /// Only the newest N
    #[arg(long, value_name = "N")]
    last: Option<usize>,
}

const SHOW_EXAMPLES: &str = "\
Examples:
  modelfs audit show /var/log/modelfs/audit.log --last 20
  modelfs audit show /var/log/modelfs/audit.log --since 24h --severity high
  modelfs audit show /var/log/modelfs/audit.log --uid 1000 --model 'acme/*' --kind open \\
      --outcome denied
  modelfs audit show /var/log/modelfs/audit.log --since 2026-11-01 --until 2026-12-01 \\
      --json | jq -r .detail

It believes what it reads, and an index beside each file (.FILE.index) that it keeps: prove a log with `modelfs audit verify`.";

impl AuditArgs {
    pub fn is_filter(&self) -> bool {
        matches!(self.command, AuditCommand::Show(_))
    }
}

pub fn run(args: &AuditArgs, layers: Layers, out: &Out) -> Result<()> {
    match &args.command {
        AuditCommand::Verify(args) => prove(args, out),
        AuditCommand::Show(args) => show(args, &layers, out),
    }
}

fn all_files(named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in named {
        for file in files_of(path)? {
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

fn prove(args: &VerifyArgs, out: &Out) -> Result<()> {
    let trust = args.trust.iter().map(|text| load_public_key(text).map_err(|e| e.context("--trust")));
    let trust = trust.collect::<Result<Vec<_>>>()?;
    let verify = if args.part { verify_part } else { verify };
    let report = settled(|| all_files(&args.files), |files| verify(files, &trust, args.checkpoints.as_deref()))?;
    let mut value = json!(report);
    value["ok"] = json!(report.bad.is_none());
    out.result(&value, || if out.quiet { String::new() } else { told(&report, args) })?;
    match report.bad {
        None => Ok(()),
        Some(bad) => {
            let (file, line) = (bad.file.display(), bad.line);
            refuse!(AuditChain, "{file} line {line}: {}: {}", bad.fault.name(), bad.why)
        }
    }
}

fn told(report: &Report, args: &VerifyArgs) -> String {
    let files = report.files.len();
    let mut text = format!(
        "log {}: {} records in {files} {}, {} to {}\n",
        report.log,
        report.records,
        if files == 1 { "file" } else { "files" },
        report.since,
        report.until
    );
    let signers = report.signers.join(", ");
    text.push_str(&match (report.checkpoints_signed, args.trust.is_empty()) {
        (0, _) => format!(
            "checkpoints: {} unsigned: whoever can write the log could have written another\n",
            report.checkpoints_unsigned
        ),
        (signed, true) => {
            format!("checkpoints: {signed} signed by {signers}; --trust says whether that is the right key\n")
        }
        (signed, false) => format!("checkpoints: {signed} signed by {signers}, trusted\n"),
    });
    text.push_str(&match (&args.checkpoints, report.elsewhere) {
        (Some(path), held) => format!("elsewhere: {held} checkpoints of {} are in the log\n", path.display()),
        (None, _) => "elsewhere: no checkpoints were given: an end that was cut would not be seen\n".to_owned(),
    });
    if report.uncovered > 0 {
        text.push_str(&format!("{} records follow the last checkpoint that vouches for anything\n", report.uncovered));
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text.push_str(if report.bad.is_none() { "every line follows the one before it\n" } else { "NOT GENUINE\n" });
    text
}

fn show(args: &ShowArgs, layers: &Layers, out: &Out) -> Result<()> {
    let query = query(args)?;
    let named = match args.files.is_empty() {
        false => args.files.clone(),
        true => match layers.parse("audit-file", |text| Ok(PathBuf::from(text)))? {
            Some(path) => vec![path],
            None => refuse!(Usage, "no audit log was named, and the configuration has no audit-file"),
        },
    };
    let failed = |error| Error::new(Code::Host, "cannot write to standard output").with_source(error);
    let mut stdout = BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
    find(&all_files(&named)?, &query, |line| {
        if out.json {
            return stdout.write_all(line).map_err(failed);
        }
        match serde_json::from_slice::<Record<'_>>(line) {
            Ok(record) => writeln!(stdout, "{} {}", record.time, sentence(&record)).map_err(failed),
            Err(_) => writeln!(stdout, "a line that is no record; run `modelfs audit verify`").map_err(failed),
        }
    })?;
    stdout.flush().map_err(failed)
}

fn query(args: &ShowArgs) -> Result<Query> {
    let kinds = Query::all_kinds();
    if let Some(kind) = args.kind.iter().find(|kind| !kinds.contains(&kind.as_str())) {
        refuse!(Usage, "--kind: `{kind}` is none of {}", kinds.join(", "));
    }
    let severity = |text: &String| match Severity::ALL.into_iter().find(|known| known.name() == text) {
        Some(severity) => Ok(severity),
        None => refuse!(Usage, "--severity: `{text}` is none of low, medium, high, critical"),
    };
    let outcome = |text: &String| match Outcome::ALL.into_iter().find(|known| known.name() == text) {
        Some(outcome) => Ok(outcome),
        None => refuse!(Usage, "--outcome: `{text}` is none of allowed, denied, failed"),
    };
    Ok(Query {
        since: args.since.as_deref().map(|text| when("--since", text)).transpose()?,
        until: args.until.as_deref().map(|text| when("--until", text)).transpose()?,
        uids: args.uid.clone(),
        models: args.model.clone(),
        severity: args.severity.as_ref().map(severity).transpose()?,
        kinds: args.kind.clone(),
        outcomes: args.outcome.iter().map(outcome).collect::<Result<_>>()?,
        last: args.last,
    })
}

fn when(option: &str, text: &str) -> Result<u64> {
    if let Some(stamp) = parse_stamp(text) {
        return Ok(stamp);
    }
    match parse_duration(text) {
        Ok(ago) => Ok(now().saturating_sub(u64::try_from(ago.as_micros()).unwrap_or(u64::MAX))),
        Err(_) => refuse!(Usage, "{option}: `{text}` is no time; write 2026-11-28, 2026-11-28T21:00:00Z or 24h"),
    }
}
