//! What a command changes in a store, in the audit log that the configuration names.
//!
//! In: the audit options of the layers, and the command's one result. Out: a record for each model it was about, before the
//! result is printed; of a command that failed, one with its error.
//! Promises: with `audit=required` a command begins nothing before the log could be written; with `audit=on` a log that
//! cannot be opened is told, and the work goes on.
//! Not here: what mounts record (`host`), what a record says (`audit`).
//! Held by: the tests below, tests/audit.rs.

use std::sync::Arc;

use serde_json::Value;

use super::{Flags, Out};
use crate::audit::{self, Audit, this_process};
use crate::config::Layers;
use crate::config::oversight::{AuditMode, audit as audit_plan};
use crate::error::{Error, Result};
use crate::telemetry::Telemetry;
use crate::telemetry::events::{Event, Kind, Severity, Subject};

/// The log of one command.
pub struct Recorder {
    kind: Kind,
    /// As it was typed: `key rotate`.
    command: &'static str,
    telemetry: Arc<Telemetry>,
    audit: Arc<Audit>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("command", &self.command).finish_non_exhaustive()
    }
}

/// Runs a command that changes what a store holds, and records it if the layers with `flags` above them say where.
///
/// # Errors
/// The command's; those of the log if it is required.
pub fn recorded<const WHO: u16>(
    (kind, command): (Kind, &'static str),
    flags: &Flags<WHO>,
    layers: Layers,
    out: &Out,
    work: impl FnOnce(Layers, &Out) -> Result<()>,
) -> Result<()> {
    let mut typed = layers.clone();
    flags.lay(&mut typed);
    let plan = audit_plan(&typed)?;
    let telemetry = Arc::new(Telemetry::default());
    let audit = match audit::start(&plan, &telemetry) {
        Ok(Some(audit)) => audit,
        Ok(None) => return work(layers, out),
        Err(error) if plan.mode == AuditMode::Required => {
            return Err(error.context(format!("{command} is refused: it cannot be recorded, and audit=required")));
        }
        Err(error) => {
            tracing::warn!(
                "{command} is not recorded: {}; a mount holds its log for itself, so give this command another audit-file, \
                 or audit-journal",
                error.chain()
            );
            return work(layers, out);
        }
    };
    let recorder = Arc::new(Recorder { kind, command, telemetry, audit });
    let done = work(layers, &out.recording(recorder.clone()));
    let told = match &done {
        Ok(()) => Ok(()),
        Err(error) => recorder.failed(error),
    };
    let stopped = recorder.telemetry.events.emit(&Event::new(Kind::Stop).actor(this_process()));
    recorder.audit.close();
    done.and(told).and(stopped)
}

impl Recorder {
    /// Records a result as it is printed with `--json`.
    ///
    /// # Errors
    /// Those of the log if it is required: what was done is done, and the caller learns that it is not recorded.
    pub fn done(&self, value: &Value) -> Result<()> {
        let mut outcome = Ok(());
        for (subject, detail) in subjects(value) {
            let event = self.event(subject).detail(detail);
            outcome = outcome.and(self.telemetry.events.emit(&event));
        }
        outcome.map_err(|error| error.context(format!("{} is done, and is not in the audit log", self.command)))
    }

    fn failed(&self, error: &Error) -> Result<()> {
        self.telemetry.events.emit(&self.event(Subject::default()).error(error))
    }

    fn event(&self, subject: Subject) -> Event {
        let mut actor = this_process();
        actor.command = Some(format!("modelfs {}", self.command));
        Event::new(self.kind).severity(Severity::Medium).actor(actor).subject(subject)
    }
}

/// Whom a result is about, and what it says of each: itself, or the list of models or versions in it.
fn subjects(value: &Value) -> Vec<(Subject, String)> {
    let store = value["store"].as_str().map(str::to_owned);
    let rows = ["versions", "models"].iter().find_map(|list| value[*list].as_array().filter(|rows| holds_models(rows)));
    let rows: Vec<&Value> = rows.map_or_else(|| vec![value], |rows| rows.iter().collect());
    let text = |row: &Value, name: &str| row[name].as_str().map(str::to_owned);
    rows.into_iter()
        .map(|row| {
            let subject = Subject {
                store: text(row, "store").or_else(|| store.clone()),
                model: text(row, "model"),
                version: row["version"].as_u64(),
                manifest: text(row, "manifest"),
                ..Subject::default()
            };
            (subject, said(row))
        })
        .collect()
}

fn holds_models(rows: &[Value]) -> bool {
    rows.iter().all(|row| row.get("model").is_some())
}

/// The words of a result that tell what was changed, in the order of this list.
fn said(row: &Value) -> String {
    const WORDS: [&str; 16] = [
        "status",
        "detail",
        "added",
        "removed",
        "rewrapped",
        "from_version",
        "tag",
        "refs",
        "min_version",
        "withdrawn",
        "written",
        "signed",
        "registered",
        "swept",
        "due",
        "reset",
    ];
    let word = |name: &str, value: &Value| match value {
        Value::Null => None,
        Value::Array(list) if list.is_empty() => None,
        Value::String(text) => Some(format!("{name}={text}")),
        other => Some(format!("{name}={other}")),
    };
    WORDS.iter().filter_map(|name| word(name, &row[*name])).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_result_about_several_versions_is_one_record_each_and_any_other_is_one() {
        let both = json!({"store": "file:///s", "versions": [
            {"model": "a", "version": 1, "status": "rotated", "added": ["new"], "removed": ["old"]},
            {"model": "b", "version": 2, "status": "untouched", "added": []},
        ]});
        let told = subjects(&both);
        assert_eq!(told.len(), 2);
        assert_eq!((told[0].0.model.as_deref(), told[0].0.version), (Some("a"), Some(1)));
        assert_eq!(told[0].0.store.as_deref(), Some("file:///s"));
        assert_eq!(told[0].1, r#"status=rotated added=["new"] removed=["old"]"#);
        assert_eq!(told[1].1, "status=untouched");
        let one = subjects(&json!({"store": "s", "model": "a", "tag": "prod", "version": 3, "written": true}));
        assert_eq!((one.len(), one[0].1.as_str()), (1, "tag=prod written=true"));
    }
}
