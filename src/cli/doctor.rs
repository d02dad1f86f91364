//! `modelfs doctor`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::out::printable;
use super::{AccessArgs, Out};
use crate::config::{self, Layers, default_cache_bytes};
use crate::control::{self, Request};
use crate::doctor::{self, Finding, MountFacts, Setup, Severity};
use crate::error::{Code, Error, Result};
use crate::store::StoreUrl;
use crate::units;
use crate::{mem, mounts, refuse};

/// A daemon answers from memory: longer means that it hangs.
const WAIT: Duration = Duration::from_secs(5);
/// For Vault and the store, asked at once.
const SERVICE_WAIT: Duration = Duration::from_secs(10);

/// Look at this machine, at a mount, at what is configured: what stops modelfs, holds it back or lets secrets out, and the
/// command that mends it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// A mount to look at as well, or a store that is to be mounted
    #[arg(value_name = "MOUNTPOINT|STORE")]
    place: Option<String>,
    /// The cache that a mount would be given [default: that of the mount, else what `mount` would take]
    #[arg(long, value_name = "SIZE")]
    cache: Option<String>,
    /// Show what is fine too
    #[arg(long)]
    all: bool,
    /// Fail (26) on an error, and on a warning about secrets [env: STRICT_MODEL_SECURITY]
    #[arg(long)]
    strict: bool,
    /// This rule alone; give it again for more
    #[arg(long, value_name = "NAME")]
    rule: Vec<String>,
    /// Longest time that Vault and the store have to answer, and, without --strict, for a look at an image [default: 10s]
    #[arg(long, value_name = "TIME")]
    wait: Option<String>,
    #[command(flatten)]
    access: AccessArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs doctor                            before the first mount
  modelfs doctor --cache 64GiB              would that cache work here?
  modelfs doctor s3://models/prod --key vault-transit:transit/models \\
      --trust publisher.pub --strict        and would that store, Vault, those files?
  modelfs doctor /mnt/models --all          a mount that is slower than expected
  modelfs doctor --rule swap --rule memlock
  modelfs doctor --json | jq '.findings[] | select(.severity != \"fine\")'

Nothing is changed. What is configured (files, environment, options) is looked at too. Exit code 1 when something prevents \
mounting; what costs speed is told and exits with 0. With --strict 26 for both an error and a warning about secrets.
As another user than the daemon's, the rights seen are those of the doctor.";

pub fn run(args: &DoctorArgs, layers: Result<Layers>, config_files: Vec<PathBuf>, out: &Out) -> Result<()> {
    for rule in &args.rule {
        if !doctor::rule_names().any(|name| name == rule) {
            let names: Vec<&str> = doctor::rule_names().collect();
            refuse!(Usage, "there is no rule `{rule}`; the rules are {}", names.join(", "));
        }
    }
    // Where the configuration cannot be read, that is an error of its own.
    let strict = args.strict || layers.as_ref().map_or(Ok(false), |layers| layers.switch("strict"))?;
    let wait = args.wait.as_deref().map(units::parse_duration).transpose().map_err(|e| e.context("--wait"))?;
    let asked = args.cache.as_deref().map(units::parse_size).transpose().map_err(|e| e.context("--cache"))?;
    match mem::harden() {
        // That not even a key can be locked is a finding.
        Err(error) if error.code() != Code::Memlock => return Err(error),
        Ok(_) | Err(_) => {}
    }
    let mut cache = None;
    let place = args.place.as_deref().map(|place| look_at(place, &mut cache)).transpose()?;
    let (store, mountpoint, mount) = match place {
        None => (None, None, None),
        Some(Place::Store(store)) => (Some(store), None, None),
        Some(Place::Mount(mountpoint, facts)) => (None, Some(mountpoint), Some(facts)),
    };
    let layers = layers.map(|mut layers| {
        args.access.lay(&mut layers);
        layers.flag("cache", args.cache.iter().cloned().collect());
        layers
    });
    let cache = match (asked.or(cache), &layers) {
        (Some(bytes), _) => bytes,
        // One that cannot be read is told of as a finding.
        (None, Ok(layers)) => config::cache_bytes(layers).unwrap_or_else(|_| default_cache_bytes()),
        (None, Err(_)) => default_cache_bytes(),
    };
    let store = args.place.as_deref().zip(store);
    let setup = Setup { thorough: strict, ..Setup::of_layers(layers, config_files, store, mountpoint) };
    let mut facts = doctor::gather(cache, Some(setup), &args.rule, wait.unwrap_or(SERVICE_WAIT));
    facts.mount = mount;
    let findings = doctor::examine_by(Path::new("/"), &facts, &args.rule);
    tell(&findings, strict, args.all, out)
}

fn tell(findings: &[Finding], strict: bool, all: bool, out: &Out) -> Result<()> {
    let stops: Vec<&Finding> = findings.iter().filter(|finding| finding.severity == Severity::Error).collect();
    let weak: Vec<&Finding> = findings.iter().filter(|finding| finding.stops_strict()).collect();
    let value = json!({"can_mount": stops.is_empty(), "passes_strict": weak.is_empty(), "findings": findings});
    out.result(&value, || show(findings, all))?;
    let told =
        |first: &Finding| format!("{}: {}; {}", first.rule, first.seen, first.fix.as_deref().unwrap_or(first.wanted));
    match (stops.first(), weak.first()) {
        (_, Some(first)) if strict => {
            Err(Error::new(Code::Insecure, format!("a strict check fails by {}", told(first))))
        }
        (Some(first), _) => Err(Error::new(Code::Host, format!("this machine cannot mount by {}", told(first)))),
        (None, _) => Ok(()),
    }
}

enum Place {
    Store(StoreUrl),
    Mount(PathBuf, MountFacts),
}

/// A mount of ours and, where its daemon answers us, what it says of itself; else a store.
fn look_at(place: &str, cache_bytes: &mut Option<u64>) -> Result<Place> {
    if place.contains("://") || is_local_store(Path::new(place)) {
        return Ok(Place::Store(config::parse_store(place)?));
    }
    let canonical = mounts::canonical(Path::new(place))?;
    let mount = mounts::at(&canonical)?.filter(mounts::Mount::is_ours).ok_or_else(|| {
        Error::new(Code::NotMounted, format!("no modelfs mount and no store at {}", canonical.display()))
    })?;
    // A daemon of another user, or one that hangs: its device tells what it can.
    let status = control::ask(&canonical, Request::Status, WAIT).unwrap_or(Value::Null);
    *cache_bytes = status.pointer("/cache/bytes_max").and_then(Value::as_u64);
    let facts = MountFacts {
        device: mount.device,
        passthrough: status.get("passthrough").and_then(Value::as_bool),
        no_passthrough: status["no_passthrough"] == true,
        huge_page_short_bytes: status.pointer("/metrics/huge_page_short_bytes").and_then(Value::as_u64),
    };
    Ok(Place::Mount(canonical, facts))
}

/// Models lie in folders that are named by their id and hold refs.
fn is_local_store(path: &Path) -> bool {
    if mounts::at(path).ok().flatten().is_some_and(|mount| mount.is_ours()) {
        return false;
    }
    let Ok(entries) = std::fs::read_dir(path) else { return false };
    entries.flatten().take(1000).any(|entry| entry.path().join("r").is_dir() && entry.path().join("name").is_file())
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
            security: false,
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
