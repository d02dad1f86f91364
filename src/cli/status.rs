//! `modelfs status`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::Out;
use super::out::{printable, table};
use crate::control::{self, Request};
use crate::error::Result;
use crate::refuse;
use crate::units::show_size;

/// A daemon answers from memory: longer means that it hangs, or that the machine does.
const WAIT: Duration = Duration::from_secs(15);

/// Show a mount: its models, its memory, how opens are served; without MOUNTPOINT all mounts of this user.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct StatusArgs {
    /// Where it is mounted
    mountpoint: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  modelfs status
  modelfs status /mnt/models
  modelfs status /mnt/models --json | jq .metrics.opens_passthrough
  modelfs -q status /mnt/models || echo \"not serving\"

With -q and a MOUNTPOINT nothing is printed but an error: 0 it serves, 3 nothing is mounted there or its daemon is gone, \
25 every model of it is locked, 22 its daemon does not answer.";

pub fn run(args: &StatusArgs, out: &Out) -> Result<()> {
    match &args.mountpoint {
        Some(mountpoint) => {
            let status = control::ask(mountpoint, Request::Status, WAIT)?;
            if out.quiet && !out.json {
                return serves(mountpoint, &status);
            }
            out.result(&status, || show_one(&status))
        }
        None => show_all(out),
    }
}

/// For health checks: nothing to read, only an exit code.
fn serves(mountpoint: &Path, status: &Value) -> Result<()> {
    let models = status["models"].as_array().map(Vec::as_slice).unwrap_or_default();
    let locked = !models.is_empty() && models.iter().all(|model| model["locked"] == true);
    if locked || status["refused"] == true {
        refuse!(Locked, "{} is mounted and refuses its readers: it is locked", mountpoint.display());
    }
    Ok(())
}

fn show_all(out: &Out) -> Result<()> {
    let mounts = control::list_mounts(WAIT)?;
    let values: Vec<Value> = mounts
        .iter()
        .map(|mount| match &mount.status {
            Ok(status) => status.clone(),
            Err(e) => {
                json!({"socket": mount.socket, "mountpoint": mount.mountpoint, "error": control::error_json(e)})
            }
        })
        .collect();
    out.result(&json!({"mounts": values}), || {
        if values.is_empty() {
            return "no modelfs mounts".into();
        }
        let rows: Vec<Vec<String>> = values
            .iter()
            .map(|value| {
                let text =
                    |name: &str| value.get(name).filter(|it| !it.is_null()).map_or_else(|| "-".into(), show_value);
                let cache = value.pointer("/cache/bytes").and_then(Value::as_u64).map_or("-".into(), show_size);
                let models_of = value.get("models").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                let locked = models_of.iter().filter(|model| model["locked"] == true).count();
                let state = match locked {
                    _ if value.get("error").is_some() => "no answer".to_string(),
                    0 => "serving".to_string(),
                    all if all == models_of.len() => "locked".to_string(),
                    some => format!("{some} locked"),
                };
                vec![text("mountpoint"), text("store"), models_of.len().to_string(), cache, text("pid"), state]
            })
            .collect();
        table(
            &["mountpoint", "store", "models", "in memory", "pid", "state"],
            &[false, false, true, true, true, false],
            &rows,
        )
    })
}

/// Plain fields first, then lists, then the counters that are not zero.
fn show_one(status: &Value) -> String {
    let Some(fields) = status.as_object() else { return show_value(status) };
    let mut text = String::new();
    for (name, value) in fields.iter().filter(|(_, value)| !value.is_array() && !value.is_object()) {
        text.push_str(&format!("{:<22} {}\n", name.replace('_', " "), show_named(name, value)));
    }
    for (name, value) in fields {
        let entries: Vec<String> = match value {
            Value::Array(items) => items.iter().map(show_item).collect(),
            Value::Object(items) => items
                .iter()
                .filter(|(_, value)| value.as_f64() != Some(0.0))
                .map(|(name, value)| format!("{:<20} {}", name.replace('_', " "), show_named(name, value)))
                .collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => continue,
        };
        if !entries.is_empty() {
            text.push_str(&format!("{}:\n", name.replace('_', " ")));
            for entry in entries {
                text.push_str(&format!("  {entry}\n"));
            }
        }
    }
    text
}

fn show_item(item: &Value) -> String {
    match item.as_object() {
        None => show_value(item),
        Some(fields) => {
            let pairs: Vec<String> = fields
                .iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(name, value)| match name.as_str() {
                    "name" => show_value(value),
                    _ => format!("{} {}", name.replace('_', " "), show_named(name, value)),
                })
                .collect();
            pairs.join(", ")
        }
    }
}

/// The unit is in the name.
fn show_named(name: &str, value: &Value) -> String {
    match value {
        Value::Number(number) if name.contains("bytes") => number.as_u64().map_or(number.to_string(), show_size),
        Value::Number(number) if name.ends_with("seconds") => {
            number.as_f64().map_or(number.to_string(), |seconds| format!("{seconds:.3} s"))
        }
        _ => show_value(value),
    }
}

fn show_value(value: &Value) -> String {
    match value {
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_serves_unless_every_model_of_it_is_locked() {
        let of = |locked: &[bool], refused: bool| {
            let models: Vec<Value> = locked.iter().map(|locked| json!({"locked": locked})).collect();
            serves(Path::new("/m"), &json!({"models": models, "refused": refused})).map_err(|error| error.code())
        };
        assert_eq!(of(&[false, true], false), Ok(()));
        assert_eq!(of(&[], false), Ok(()));
        assert_eq!(of(&[true, true], false), Err(crate::error::Code::Locked));
        assert_eq!(of(&[false], true), Err(crate::error::Code::Locked));
    }

    #[test]
    fn a_status_is_shown_with_units_and_without_zeros() {
        let status = json!({
            "mountpoint": "/mnt/m", "cache_bytes_max": 1u64 << 30,
            "models": [{"name": "acme/llama", "version": 3}],
            "metrics": {"fetch_bytes": 2048, "fetch_errors": 0, "open_seconds": 1.5},
        });
        let text = show_one(&status);
        assert!(text.contains("1.00 GiB"), "{text}");
        assert!(text.contains("acme/llama, version 3"), "{text}");
        assert!(text.contains("2.00 KiB") && text.contains("1.500 s"), "{text}");
        assert!(!text.contains("fetch errors"), "{text}");
    }
}
