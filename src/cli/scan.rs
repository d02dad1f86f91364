//! `modelfs scan`.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::Out;
use crate::error::{Code, Error, Result};
use crate::refuse;
use crate::scan::{self, Confidence, Finding, Hidden, Kind, Pattern, Report, ScanPlan, Step};
use crate::units::{self, show_rate, show_size};

/// Find model weights in plaintext: in a tree, an image archive or an OCI layout, layer by layer.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ScanArgs {
    /// Folders, archives (docker save, OCI, plain tar; packed or not), layouts; - is standard input
    #[arg(required = true, value_name = "PATH")]
    targets: Vec<PathBuf>,
    /// End with 26 from here on: certain, likely, info, or never
    #[arg(long, value_name = "CONFIDENCE", default_value = "likely")]
    fail_on: FailOn,
    /// Pass over paths: a name, or a pattern with * ? and **; give it again for more
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Files that may be there, by digest: sha256:HEX, or a file of such lines; give it again for more
    #[arg(long, value_name = "DIGEST|FILE")]
    accept: Vec<String>,
    /// Write the report as SARIF 2.1.0; - is standard output
    #[arg(long, value_name = "FILE")]
    sarif: Option<PathBuf>,
    /// Hold blobs and layers of images against their digests, which reads every byte
    #[arg(long)]
    verify: bool,
    /// Nothing smaller is a finding
    #[arg(long, value_name = "SIZE", default_value = "1KiB")]
    min_size: String,
    /// Look at filesystems that are mounted in a tree too (never at /proc and its like, nor at a mount of modelfs)
    #[arg(long)]
    cross_mounts: bool,
    /// Do not look into archives that lie in a tree or a layer
    #[arg(long)]
    no_archives: bool,
    /// Give up after so long, as in 10m; what was not seen then counts as not clean
    #[arg(long, value_name = "TIME")]
    time: Option<String>,
    /// Most bytes that all packed streams together may unpack to
    #[arg(long, value_name = "SIZE", default_value = "1TiB")]
    max_unpacked: String,
    /// Most times its own size that one packed stream may unpack to, from 256 MiB on
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_ratio: u64,
    /// Most files and entries in all
    #[arg(long, value_name = "N", default_value_t = 20_000_000)]
    max_entries: u64,
    /// Threads [default: one a core, at most 16]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FailOn {
    Certain,
    Likely,
    Info,
    Never,
}

const EXAMPLES: &str = "\
Examples:
  docker save app:1.4 | modelfs scan -                      every layer, deleted files too
  docker save app:1.4 -o app.tar && modelfs scan app.tar    the same, with all cores
  modelfs scan /var/lib/app --exclude '**/testdata/*'       a tree, without its mounts
  modelfs scan image/ --sarif scan.sarif                    an OCI layout, for a code host
  modelfs scan app.tar --json | jq '.findings[].path'

Weights are known by structure (certain), or by name and size (likely). What is only told (info; -v shows it in text) fails \
nothing by default. Exit codes: 0 clean; 26 weights found; 20 an archive is broken, cut or more than the limits allow, so \
that nobody can say what it holds; 1 this machine did not read something. docs/SCAN.md tells what is looked at, and what \
not.";

pub fn run(args: &ScanArgs, out: &Out, verbose: bool) -> Result<()> {
    let plan = plan(args)?;
    let sarif_out = args.sarif.as_deref() == Some(Path::new("-"));
    if sarif_out && out.json {
        refuse!(Usage, "--json and --sarif - both write to standard output; write --sarif FILE");
    }
    let from = Instant::now();
    let bar = out.progress(0, "scan");
    let report = scan::scan(&plan, &|step| match step {
        Step::Found(bytes) => bar.inc_length(bytes),
        Step::Passed(bytes) => bar.inc(bytes),
    });
    bar.finish_and_clear();
    let report = report?;
    if let Some(path) = &args.sarif {
        write_sarif(path, &report, out)?;
    }
    if !sarif_out {
        let mut value = serde_json::to_value(&report).expect("plain values are JSON");
        value["clean"] = json!(conclusion(&report, args.fail_on).is_ok());
        value["seconds"] = json!(from.elapsed().as_secs_f64());
        out.result(&value, || show(&report, verbose, out.quiet, from.elapsed()))?;
    }
    conclusion(&report, args.fail_on)
}

fn plan(args: &ScanArgs) -> Result<ScanPlan> {
    let size = |text: &str, flag: &str| units::parse_size(text).map_err(|e| e.context(flag.to_owned()));
    let mut plan = ScanPlan::new(args.targets.clone());
    plan.min_bytes = size(&args.min_size, "--min-size")?;
    plan.exclude = args.exclude.iter().map(|text| Pattern::parse(text)).collect::<Result<_>>()?;
    plan.accept = accepted(&args.accept)?;
    plan.verify = args.verify;
    plan.archives = !args.no_archives;
    plan.cross_mounts = args.cross_mounts;
    plan.time = args.time.as_deref().map(units::parse_duration).transpose().map_err(|e| e.context("--time"))?;
    plan.limits.unpacked_bytes_max = size(&args.max_unpacked, "--max-unpacked")?;
    plan.limits.ratio_max = args.max_ratio.max(1);
    plan.limits.entries_max = args.max_entries;
    if let Some(threads) = args.threads {
        if !(1..=256).contains(&threads) {
            refuse!(Usage, "--threads {threads}: 1 to 256");
        }
        plan.threads = threads;
    }
    if args.targets.iter().filter(|path| path.as_path() == Path::new("-")).count() > 1 {
        refuse!(Usage, "standard input can be read once, and `-` is given more often");
    }
    Ok(plan)
}

/// Digests as given, and those of files: a line each, `#` begins a remark.
fn accepted(given: &[String]) -> Result<BTreeSet<[u8; 32]>> {
    let mut digests = BTreeSet::new();
    for one in given {
        if one.starts_with("sha256:") {
            digests.insert(digest(one)?);
            continue;
        }
        let text = std::fs::read_to_string(one).map_err(|e| {
            Error::new(Code::Usage, format!("--accept {one}: neither sha256:HEX nor a file that can be read"))
                .with_source(e)
        })?;
        for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
            if !line.is_empty() {
                digests.insert(digest(line).map_err(|e| e.context(format!("in {one}")))?);
            }
        }
    }
    Ok(digests)
}

fn digest(text: &str) -> Result<[u8; 32]> {
    let hex = text.strip_prefix("sha256:").and_then(|hex| hex::decode(hex).ok());
    hex.and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Error::new(Code::Usage, format!("`{text}` is no digest; write sha256: and 64 hex digits")))
}

fn write_sarif(path: &Path, report: &Report, out: &Out) -> Result<()> {
    let value = scan::sarif(report);
    if path == Path::new("-") {
        return out.result(&value, || serde_json::to_string_pretty(&value).expect("a JSON value is JSON"));
    }
    let mut text = serde_json::to_string_pretty(&value).expect("a JSON value is JSON");
    text.push('\n');
    std::fs::File::create(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|e| Error::new(Code::Host, format!("cannot write {}", path.display())).with_source(e))
}

/// # Errors
/// `INSECURE` for findings; `ARCHIVE` or `HOST` for what could not be read: nobody knows what it holds.
fn conclusion(report: &Report, fail_on: FailOn) -> Result<()> {
    let from = match fail_on {
        FailOn::Certain => Some(Confidence::Certain),
        FailOn::Likely => Some(Confidence::Likely),
        FailOn::Info => Some(Confidence::Info),
        FailOn::Never => None,
    };
    let found = from.map_or(0, |from| report.at_least(from).count() as u64 + report.findings_untold);
    let unread = report.unread.len() as u64 + report.unread_untold;
    let unread_too = if unread > 0 { format!("; {} could not be read", places(unread)) } else { String::new() };
    if found > 0 {
        let files =
            if found == 1 { "1 file of model weights".into() } else { format!("{found} files of model weights") };
        refuse!(Insecure, "found {files} in plaintext, listed above{unread_too}");
    }
    if let Some(first) = report.unread.iter().find(|unread| unread.hostile).or(report.unread.first()) {
        let code = if first.hostile { Code::Archive } else { Code::Host };
        let place =
            if first.path.is_empty() { first.target.clone() } else { format!("{} of {}", first.path, first.target) };
        let message = format!("{} could not be read, and may hold anything; {place}: {}", places(unread), first.why);
        return Err(Error::new(code, message));
    }
    if !report.complete {
        return Err(Error::new(Code::Host, "the time was over before all was seen; give more with --time"));
    }
    Ok(())
}

fn places(count: u64) -> String {
    if count == 1 { "1 place".into() } else { format!("{count} places") }
}

// ---- text ---------------------------------------------------------------------------------------------------------------

fn show(report: &Report, verbose: bool, quiet: bool, took: Duration) -> String {
    let mut text = String::new();
    let mentioned = report.findings.iter().filter(|finding| finding.confidence == Confidence::Info).count();
    for finding in report.findings.iter().filter(|finding| verbose || finding.confidence > Confidence::Info) {
        show_finding(&mut text, finding, report.targets.len() > 1);
    }
    if report.findings_untold > 0 {
        text.push_str(&format!("and {} more\n", report.findings_untold));
    }
    for unread in &report.unread {
        let place = if unread.path.is_empty() { String::new() } else { format!(" {}", unread.path) };
        text.push_str(&format!("UNREAD   {}{place}: {}\n", unread.target, unread.why));
    }
    if report.unread_untold > 0 {
        text.push_str(&format!("and {} more\n", report.unread_untold));
    }
    if quiet {
        return text;
    }
    for target in &report.targets {
        let kind = match target.kind {
            Kind::Tree => "a tree",
            Kind::File => "a file",
            Kind::Archive => "an archive",
            Kind::Image => "an archive of images",
        };
        text.push_str(&format!("{}: {kind}", target.path));
        for (at, image) in target.images.iter().enumerate() {
            let mark = if at == 0 { ": " } else { "; " };
            text.push_str(&format!("{mark}{}, {} layers", image.name, image.layers));
        }
        text.push('\n');
    }
    let count = |confidence| report.findings.iter().filter(|finding| finding.confidence == confidence).count();
    text.push_str(&format!(
        "{} certain, {} likely, {mentioned} only mentioned{}{}\n",
        count(Confidence::Certain),
        count(Confidence::Likely),
        if mentioned > 0 && !verbose { " (-v shows them)" } else { "" },
        if report.accepted.is_empty() { String::new() } else { format!(", {} accepted", report.accepted.len()) },
    ));
    let looked = &report.looked;
    let mut parts = vec![format!("{} files", looked.files)];
    for (count, what) in
        [(looked.layers, "layers"), (looked.archives, "archives"), (looked.mounts_skipped, "mounts passed over")]
    {
        if count > 0 {
            parts.push(format!("{count} {what}"));
        }
    }
    parts.push(format!("{} read", show_size(looked.bytes_read)));
    if looked.bytes_unpacked > 0 {
        parts.push(format!(
            "{} unpacked ({})",
            show_size(looked.bytes_unpacked),
            show_rate(looked.bytes_unpacked, took)
        ));
    }
    text.push_str(&format!("looked at {} in {:.1} s\n", parts.join(", "), took.as_secs_f64()));
    if !report.complete {
        text.push_str("the time was over before all was seen\n");
    }
    text
}

fn show_finding(text: &mut String, finding: &Finding, with_target: bool) {
    let word = match finding.confidence {
        Confidence::Certain => "CERTAIN",
        Confidence::Likely => "likely",
        Confidence::Info => "info",
    };
    let size = finding.bytes.map_or("size unknown".into(), show_size);
    let target = if with_target { format!("{}: ", finding.target) } else { String::new() };
    text.push_str(&format!("{word:<8} {:<14} {size:>10}  {target}{}\n", finding.format.name(), finding.path));
    let mut line = |words: String| text.push_str(&format!("{:<8} {words}\n", ""));
    line(format!("why: {}", finding.why));
    if let Some(layer) = &finding.layer {
        for image in &layer.images {
            line(format!("in: layer {} of {} of {}", image.position, image.of, image.image));
            if let Some(made) = &image.created_by {
                line(format!("made by: {made}"));
            }
            if let Some((by, how)) = image.hidden_by {
                let how = match how {
                    Hidden::Deleted => "deletes",
                    Hidden::Replaced => "replaces",
                };
                line(format!("hidden by layer {by}, which {how} it: it is still in the image"));
            }
        }
        line(format!("layer: {}", layer.digest.as_deref().unwrap_or(&layer.file)));
    }
    if finding.confidence > Confidence::Info {
        line(format!("do: {}", finding.fix));
    }
}
