//! Whether the process lives, serves, and keeps what it promises: for probes and for people.
//!
//! In: [`Facts`]. Out: a status of HTTP and JSON.
//! Promises: 200 is yes and 503 is no; a reason names no key, no token and no byte of a model; nothing is asked of a store.
//! Not here: who may ask (`server`).
//! Held by: the tests below, tests/observe.rs.

use serde::Serialize;
use serde_json::{Value, json};

use super::facts::{Facts, MountFacts};
use crate::config::oversight::AuditPlan;
use crate::telemetry::events::{Kind, Severity};
use crate::vault::VaultState;

/// What one question is answered with.
pub struct Told {
    /// 200 or 503.
    pub well: bool,
    pub json: Value,
}

/// The process answers: that is all.
pub fn live() -> Told {
    Told { well: true, json: json!({ "live": true }) }
}

/// Every mount serves what it must.
pub fn ready(facts: &Facts) -> Told {
    let mounts: Vec<Value> = facts
        .mounts
        .iter()
        .map(|mount| json!({ "mountpoint": mount.mountpoint, "ready": mount.trouble().is_none(), "why": mount.trouble() }))
        .collect();
    Told { well: facts.is_ready(), json: json!({ "ready": facts.is_ready(), "mounts": mounts }) }
}

/// The same with everything about each mount.
pub fn detail(facts: &Facts) -> Told {
    let numbers = &facts.numbers;
    let json = json!({
        "ready": facts.is_ready(),
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "uptime_seconds": facts.started.elapsed().unwrap_or_default().as_secs(),
        "cache": {
            "bytes": numbers.cache_bytes,
            "bytes_max": numbers.cache_bytes_max,
            "bytes_peak": facts.cache_peak_bytes,
        },
        "read_errors": numbers.read_errors,
        "fetch_errors": numbers.fetch_errors,
        "mounts": facts.mounts.iter().map(mount).collect::<Vec<_>>(),
    });
    Told { well: facts.is_ready(), json }
}

fn mount(mount: &MountFacts) -> Value {
    json!({
        "mountpoint": mount.mountpoint,
        "store": mount.store,
        "store_answers": !mount.store_silent,
        "ready": mount.trouble().is_none(),
        "why": mount.trouble(),
        "answers": mount.answers,
        "refused": mount.refused,
        "models": mount.models,
        "locked": mount.locked,
        "not_serving": mount.not_serving,
        "open_handles": mount.open_handles,
        "vault": mount.vault.as_ref().map(VaultState::name),
        "needs_vault": mount.needs_vault,
        "storage_credentials_end_in_seconds": mount.credentials_end_in.map(|left| left.as_secs()),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Pass,
    /// Weaker than it could be.
    Warn,
    /// Somebody should look now.
    Fail,
}

use Verdict::{Fail, Pass, Warn};

/// What the process does to keep models and keys to itself, and what it has seen of those who want them: 503 if anything fails.
pub fn security(facts: &Facts) -> Told {
    let mut items: Vec<(&str, Verdict, String)> = Vec::new();
    let mut item = |name, verdict, seen: String| items.push((name, verdict, seen));
    let keep = &facts.keep;
    let or_warn = |well: bool| if well { Pass } else { Warn };
    item("memory", Pass, format!("plaintext in locked memory ({})", keep.memory));
    item("secrets_memory", or_warn(keep.secrets_private), keep.secrets.to_owned());
    item(
        "hibernation",
        or_warn(keep.hibernation_blocked),
        if keep.hibernation_blocked { "blocked" } else { "not blocked: memory may be written to disk" }.into(),
    );
    let (dumps, dumps_seen) = core_dumps();
    item("core_dumps", if dumps { Fail } else { Pass }, dumps_seen.into());
    item(
        "memory_merging",
        or_warn(keep.merging_off != Some(false)),
        match keep.merging_off {
            Some(true) => "off",
            Some(false) => "the kernel did not turn it off",
            None => "the kernel does not merge whole processes",
        }
        .into(),
    );
    item(
        "overwrite_on_lock",
        or_warn(keep.can_pin),
        if keep.can_pin { "locked plaintext is overwritten though readers hold it" } else { "pages cannot be pinned" }
            .into(),
    );
    let trust: Vec<&str> = facts.mounts.iter().map(|mount| mount.trust).collect();
    item(
        "trust",
        or_warn(!trust.contains(&"first-use")),
        match trust.contains(&"first-use") {
            true => "a mount trusts whoever signed what it saw first".into(),
            false => "named signers or a pinned manifest".into(),
        },
    );
    let strict = facts.mounts.iter().all(|mount| mount.strict);
    item("verify", or_warn(strict), if strict { "strict" } else { "a mount checks tags and no hashes" }.into());
    let policy = facts.mounts.iter().all(|mount| mount.policy);
    item("policy", or_warn(policy), if policy { "on" } else { "a mount has no policy: modes and owner decide" }.into());
    let numbers = &facts.numbers;
    let (age, usual) = (numbers.audit_checkpoint_age(), AuditPlan::default());
    item(
        "audit",
        match (facts.audit, numbers.audit_failures, age <= usual.stuck_after.as_secs()) {
            ("off", ..) => Warn,
            (_, 0, true) => Pass,
            _ => Fail,
        },
        format!(
            "{}; {} records, {} waiting, {} failed, a checkpoint on its way for {age} s",
            facts.audit, numbers.audit_records, numbers.audit_waiting, numbers.audit_failures
        ),
    );
    let events = |wanted: Kind, is_refused: bool| -> u64 {
        let of_kind = facts.events.iter().filter(|(kind, ..)| *kind == wanted);
        of_kind
            .filter(|(_, severity, ..)| (*severity == Severity::Critical) == is_refused)
            .map(|(.., count)| count)
            .sum()
    };
    // What was right when it was asked for once more was given to nobody before, and says that something is not well.
    let (tampered, refetched) = (events(Kind::Tamper, true), events(Kind::Tamper, false));
    let rolled_back = events(Kind::Rollback, true) + events(Kind::Rollback, false);
    item(
        "tamper",
        match (tampered + rolled_back, refetched) {
            (0, 0) => Pass,
            (0, _) => Warn,
            _ => Fail,
        },
        format!("{tampered} tampered, {refetched} asked for once more, {rolled_back} rolled back since the start"),
    );
    let blocked = numbers.blocked;
    item("blocks", or_warn(blocked == 0), format!("{blocked} blocked now, {} refused so far", numbers.access_denied));
    item("wiped", or_warn(numbers.unwiped_bytes == 0), format!("{} bytes not overwritten", numbers.unwiped_bytes));
    let vault = facts.mounts.iter().filter_map(|mount| mount.vault.as_ref());
    if let Some((verdict, state)) = vault.map(|state| (vault_verdict(state), state.name())).max() {
        item("vault", verdict, state.into());
    }
    item(
        "alerts",
        or_warn(numbers.alerts_failed + numbers.alerts_dropped == 0),
        format!("{} sent, {} failed, {} dropped", numbers.alerts_sent, numbers.alerts_failed, numbers.alerts_dropped),
    );
    let worst = items.iter().map(|(_, verdict, _)| *verdict).max().unwrap_or(Pass);
    let shown = items.iter().map(|(name, verdict, seen)| json!({ "name": name, "status": verdict, "seen": seen }));
    let json = json!({ "status": worst, "items": shown.collect::<Vec<_>>() });
    Told { well: worst != Fail, json }
}

fn vault_verdict(state: &VaultState) -> Verdict {
    match state {
        VaultState::Idle | VaultState::Live { .. } => Pass,
        VaultState::Away { .. } | VaultState::Sealed { .. } => Warn,
        VaultState::Lost { .. } => Fail,
    }
}

/// Whether the kernel would write one of us, and why not. Asked anew: a limit can be changed from outside.
fn core_dumps() -> (bool, &'static str) {
    let mut core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `core` outlives the call; prctl with PR_GET_DUMPABLE takes no pointer.
    let (told, dumpable) = unsafe {
        (libc::getrlimit(libc::RLIMIT_CORE, &raw mut core) == 0, libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0))
    };
    match (dumpable, told && core.rlim_cur == 0) {
        (0, true) => (false, "off: the process cannot be dumped, and its limit is 0"),
        (0, false) => (false, "off: the process cannot be dumped"),
        _ => (true, "the process can be dumped"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Code, Error};
    use crate::telemetry::Telemetry;
    use crate::telemetry::events::{Event, Severity};

    fn facts(telemetry: &Telemetry) -> Facts {
        let mut facts = Facts::empty(telemetry);
        facts.mounts.push(MountFacts { policy: true, ..MountFacts::still("/m".into()) });
        facts.audit = "required";
        facts
    }

    fn verdict(told: &Told, name: &str) -> String {
        let items = told.json["items"].as_array().expect("items");
        let item = items.iter().find(|item| item["name"] == name).unwrap_or_else(|| panic!("{name} is not told"));
        item["status"].as_str().expect("a word").to_owned()
    }

    #[test]
    fn ready_follows_the_mounts_and_says_why_not() {
        let telemetry = Telemetry::default();
        let mut facts = facts(&telemetry);
        assert!(live().well && ready(&facts).well && detail(&facts).well);
        facts.mounts[0].refused = true;
        let told = ready(&facts);
        assert!(!told.well && !detail(&facts).well && live().well);
        assert_eq!(told.json["mounts"][0]["why"], "refuses its readers");
    }

    #[test]
    fn each_weakness_is_named_and_what_happened_fails() {
        let telemetry = Telemetry::default();
        let well = facts(&telemetry);
        for name in ["verify", "trust", "policy", "audit", "tamper", "blocks", "wiped", "alerts"] {
            assert_eq!(verdict(&security(&well), name), "pass", "{name}");
        }
        let mut weak = well.clone();
        weak.mounts[0] = MountFacts {
            strict: false,
            trust: "first-use",
            policy: false,
            vault: Some(VaultState::Lost { why: Error::new(Code::VaultDenied, "gone") }),
            ..weak.mounts[0].clone()
        };
        weak.audit = "off";
        let told = security(&weak);
        for name in ["verify", "trust", "policy", "audit"] {
            assert_eq!(verdict(&told, name), "warn", "{name}");
        }
        assert_eq!(verdict(&told, "vault"), "fail");
        telemetry.events.tell(&Event::new(Kind::Tamper).severity(Severity::High));
        assert_eq!(verdict(&security(&facts(&telemetry)), "tamper"), "warn", "a healed one was given to nobody");
        telemetry.audit_pending_since.set(1);
        assert_eq!(verdict(&security(&facts(&telemetry)), "audit"), "fail", "a checkpoint hangs");
        telemetry.audit_failures.inc();
        telemetry.unwiped_bytes.add(4096);
        telemetry.blocked.set(1);
        telemetry.events.tell(&Event::new(Kind::Rollback));
        let told = security(&facts(&telemetry));
        for (name, wanted) in [("audit", "fail"), ("tamper", "fail"), ("blocks", "warn"), ("wiped", "warn")] {
            assert_eq!(verdict(&told, name), wanted, "{name}");
        }
        assert!(!told.well && told.json["status"] == "fail");
    }
}
