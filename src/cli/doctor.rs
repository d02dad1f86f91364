//! `modelfs doctor`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::Out;
use super::out::printable;
use crate::config::{default_cache_bytes, units};
use crate::control::{self, Request};
use crate::crypto;
use crate::doctor::{self, Facts, Finding, MountFacts, Severity};
use crate::error::{Code, Error, Result};
use crate::format::Suite;
use crate::{mem, mounts};

/// A daemon answers from memory: longer means that it hangs.
const WAIT: Duration = Duration::from_secs(5);

/// Look at this machine, and at a mount: what stops modelfs or holds it back, and the command that mends it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// A mount to look at as well
    mountpoint: Option<PathBuf>,
    /// The cache that a mount would be given [default: that of the mount, else what `mount` would take]
    #[arg(long, value_name = "SIZE")]
    cache: Option<String>,
    /// Show what is fine too
    #[arg(long)]
    all: bool,
}

const EXAMPLES: &str = "\
Examples:
  modelfs doctor                            before the first mount
  modelfs doctor --cache 64GiB              would that cache work here?
  modelfs doctor /mnt/models --all          a mount that is slower than expected
  modelfs doctor --json | jq '.findings[] | select(.severity != \"fine\")'

Nothing is changed. Exit code 1 only when something prevents mounting; what costs speed is told and exits with 0.
As another user than the daemon's, the rights seen are those of the doctor.";

pub fn run(args: &DoctorArgs, out: &Out) -> Result<()> {
    let facts = facts(args)?;
    let findings = doctor::examine(Path::new("/"), &facts);
    let stops: Vec<&Finding> = findings.iter().filter(|finding| finding.severity == Severity::Error).collect();
    let value = json!({"can_mount": stops.is_empty(), "findings": findings});
    out.result(&value, || show(&findings, args.all))?;
    match stops.first() {
        None => Ok(()),
        Some(first) => Err(Error::new(
            Code::Host,
            format!("this machine cannot mount: {}; {}", first.seen, first.fix.as_deref().unwrap_or(first.wanted)),
        )),
    }
}

fn facts(args: &DoctorArgs) -> Result<Facts> {
    let asked = args.cache.as_deref().map(units::parse_size).transpose().map_err(|e| e.context("--cache"))?;
    let mut of_mount = None;
    let mount = args.mountpoint.as_deref().map(|mountpoint| look_at(mountpoint, &mut of_mount)).transpose()?;
    Ok(Facts {
        cache_bytes: asked.or(of_mount).unwrap_or_else(default_cache_bytes),
        aes_library: crypto::implementation(Suite::Aes256Gcm).name(),
        secret_memory: mem::secret_memory().ok().map(|kind| kind == mem::SecretMemory::MemfdSecret),
        clock_kept: clock_kept(),
        mount: Some(mount).flatten(),
    })
}

/// The mount and, where its daemon answers us, what it says of itself.
fn look_at(mountpoint: &Path, cache_bytes: &mut Option<u64>) -> Result<MountFacts> {
    let canonical = control::canonical_mountpoint(mountpoint)?;
    let mount = mounts::at(&canonical)?
        .filter(mounts::Mount::is_ours)
        .ok_or_else(|| Error::new(Code::NotMounted, format!("no modelfs mount at {}", canonical.display())))?;
    // A daemon of another user, or one that hangs: its device tells what it can.
    let status = control::ask(&canonical, Request::Status, WAIT).unwrap_or(Value::Null);
    *cache_bytes = status.pointer("/cache/bytes_max").and_then(Value::as_u64);
    Ok(MountFacts {
        device: mount.device,
        passthrough: status.get("passthrough").and_then(Value::as_bool),
        huge_page_short_bytes: status.pointer("/metrics/huge_page_short_bytes").and_then(Value::as_u64),
    })
}

/// Whether a time service keeps the kernel's clock.
fn clock_kept() -> Option<bool> {
    // SAFETY: a timex is plain numbers; with no mode set the kernel only fills it.
    let (state, status) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&mut timex), timex.status)
    };
    (state >= 0).then_some(status & libc::STA_UNSYNC == 0)
}

fn show(findings: &[Finding], all: bool) -> String {
    let mut text = String::new();
    for finding in findings.iter().filter(|finding| all || finding.severity > Severity::Fine) {
        let word = match finding.severity {
            Severity::Fine => "fine",
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Error => "ERROR",
        };
        text.push_str(&format!("{word:<8} {:<20} {}\n", finding.rule, printable(&finding.seen)));
        if let Some(fix) = &finding.fix {
            text.push_str(&format!("{:<8} {:<20} wanted: {}\n", "", "", finding.wanted));
            text.push_str(&format!("{:<8} {:<20} do: {}\n", "", "", printable(fix)));
        }
    }
    let fine: Vec<&str> = findings.iter().filter(|f| f.severity == Severity::Fine).map(|f| f.rule).collect();
    if !all && !fine.is_empty() {
        text.push_str(&format!("fine: {}\n", fine.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_shows_what_was_seen_what_is_wanted_and_what_to_do() {
        let of = |rule, severity, fix: Option<&str>| Finding {
            rule,
            severity,
            seen: format!("{rule} seen"),
            wanted: "much",
            fix: fix.map(str::to_owned),
        };
        let findings = [of("memlock", Severity::Error, Some("ulimit -l 1")), of("kernel", Severity::Fine, None)];
        let text = show(&findings, false);
        for part in ["ERROR", "memlock seen", "wanted: much", "do: ulimit -l 1", "fine: kernel"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("kernel seen"), "{text}");
        assert!(show(&findings, true).contains("kernel seen"));
    }
}
