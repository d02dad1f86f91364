//! What is looked at before a command is started on a mount: the machine, the files, Vault, the store, and of a container its
//! image, by `doctor` and `scan`.
//!
//! Promises: every finding of weight is told in the log; with `strict`, an error of any rule and a warning of one about
//! secrets stop the start (`INSECURE`); a service that hangs costs [`WAIT`], and what only time can mend stops nothing here:
//! the mount waits for it as long as it was told to, and refuses by itself.
//! Held by: the tests below, tests/run_command.sh, tests/doctor.sh.

use std::path::Path;
use std::time::Duration;

use super::RunPlan;
use crate::doctor::{self, Finding, Setup, Severity};
use crate::error::Result;
use crate::refuse;

/// For Vault, the store and the search for weights, at once.
const WAIT: Duration = Duration::from_secs(5);

/// Whether these answer is found out by the mount, which may have been told to wait for them (`ready-timeout`).
const ANSWER_LATER: [&str; 2] = ["vault", "store"];

/// # Errors
/// `INSECURE` with every finding that stops a strict start.
pub fn look(plan: &mut RunPlan) -> Result<()> {
    // The image is that of whoever starts first in it. A strict start looks at it in any case.
    // SAFETY: getppid only reads a number.
    let first = std::process::id() == 1 || unsafe { libc::getppid() } == 1;
    let setup = Setup::of_mount(&mut plan.mount, plan.config_files.clone(), plan.strict || first)?;
    let facts = doctor::gather(plan.mount.cache_bytes, Some(setup), &[], WAIT);
    let findings = doctor::examine(Path::new("/"), &facts);
    for finding in findings.iter().filter(|finding| finding.severity >= Severity::Warning) {
        tracing::warn!("{}", tell(finding));
    }
    let stops: Vec<String> = findings.iter().filter(|finding| stops(finding)).map(tell).collect();
    if plan.strict && !stops.is_empty() {
        refuse!(Insecure, "strict model security, and {}; nothing was started", stops.join("; "));
    }
    Ok(())
}

fn stops(finding: &Finding) -> bool {
    finding.stops_strict() && !ANSWER_LATER.contains(&finding.rule)
}

fn tell(finding: &Finding) -> String {
    let fix = finding.fix.as_ref().map_or(String::new(), |fix| format!("; to mend it: {fix}"));
    format!("{}: {} (wanted: {}){fix}", finding.rule, finding.seen, finding.wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(rule: &'static str, severity: Severity, security: bool) -> Finding {
        Finding { rule, severity, security, seen: "seen".into(), wanted: "wanted", fix: Some("mend".into()) }
    }

    #[test]
    fn a_strict_start_is_stopped_by_errors_and_by_warnings_about_secrets_only() {
        assert!(stops(&finding("memlock", Severity::Error, false)));
        assert!(stops(&finding("secret-memory", Severity::Warning, true)));
        assert!(!stops(&finding("huge-pages", Severity::Warning, false)), "speed is no reason");
        assert!(!stops(&finding("swap", Severity::Info, true)));
        assert!(!stops(&finding("store", Severity::Error, false)), "a store may come later");
        let text = tell(&finding("swap", Severity::Info, true));
        assert_eq!(text, "swap: seen (wanted: wanted); to mend it: mend");
    }
}
