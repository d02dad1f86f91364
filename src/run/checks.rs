//! What is looked at before a command is started on a mount: the machine, the files, Vault, the store, and of a container its
//! image, by `doctor` and `scan`.
//!
//! Promises: every finding of weight is told in the log; with `strict`, an error of any rule and a warning of one about
//! secrets stop the start (`INSECURE`), and so does an image that could not be looked at to its end; a service that hangs
//! costs [`WAIT`], and what only time can mend stops nothing here: the mount waits for it as long as it was told to, and
//! refuses by itself.
//! Held by: the tests below, tests/run_command.sh, tests/doctor.sh.

use std::path::Path;
use std::time::Duration;

use super::RunPlan;
use crate::doctor::{self, Finding, Setup, Severity, WholeRoot};
use crate::error::Result;
use crate::refuse;

/// For Vault, the store and, unless it has to come to its end, the search for weights, at once.
const WAIT: Duration = Duration::from_secs(5);

/// Whether these answer is found out by the mount, which may have been told to wait for them (`ready-timeout`).
const ANSWER_LATER: [&str; 2] = ["vault", "store"];

/// # Errors
/// `INSECURE` with every finding that stops a strict start.
pub fn look(plan: &mut RunPlan) -> Result<()> {
    // SAFETY: getppid only reads a number.
    let whole_root = whole_root(plan.strict, std::process::id(), unsafe { libc::getppid() });
    let setup = Setup::of_mount(&mut plan.mount, plan.config_files.clone(), whole_root)?;
    let setup = Setup { thorough: plan.strict, ..setup };
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

/// The image is that of whoever starts first in it. A strict start looks at what it runs on whatever it is.
fn whole_root(strict: bool, pid: u32, parent: i32) -> WholeRoot {
    match (pid, parent) {
        _ if strict => WholeRoot::Always,
        // Only an image's program is the first one: machines have an init.
        (1, _) => WholeRoot::Always,
        // Of an image's small init, or of a machine's.
        (_, 1) => WholeRoot::OfImage,
        _ => WholeRoot::Never,
    }
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

    /// containerd leaves no mark in an image: whether there is one must not depend on it.
    #[test]
    fn a_strict_start_and_the_first_process_look_at_the_whole_root_whatever_marks_it_has() {
        assert_eq!(whole_root(true, 4711, 4710), WholeRoot::Always);
        assert_eq!(whole_root(false, 1, 0), WholeRoot::Always);
        assert_eq!(whole_root(false, 7, 1), WholeRoot::OfImage);
        assert_eq!(whole_root(false, 4711, 4710), WholeRoot::Never);
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
