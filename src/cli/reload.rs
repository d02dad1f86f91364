//! `modelfs reload`.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use super::Out;
use super::out::printable;
use crate::control::{self, Request};
use crate::error::Result;
use crate::units;

/// Put the policy in force as its file says now; look for newer versions, and let MOUNTPOINT/NAME/current lead to them.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ReloadArgs {
    /// Where it is mounted
    mountpoint: PathBuf,
    /// Only this model, by its name [default: all of the mount]
    model: Option<String>,
    /// Longest time to wait for the daemon
    #[arg(long, value_name = "TIME", default_value = "5m")]
    timeout: String,
}

const EXAMPLES: &str = "\
Examples:
  modelfs reload /mnt/models
  modelfs reload /mnt/models acme/llama --json | jq '.models[] | select(.changed)'
  kill -HUP PID                                            the same, without an answer

The policy holds for opens and for reads through the daemon of what is open; one with a mistake in it changes nothing.
Newer versions are looked for on mounts with --versions: what was asked for at the mount is resolved again, with the same trust, keys and floors. What is refused changes nothing, \
for any model. Whoever has a version open keeps it; every walk through `current` that begins afterwards sees the new one.";

pub fn run(args: &ReloadArgs, out: &Out) -> Result<()> {
    let wait = units::parse_duration(&args.timeout).map_err(|e| e.context("--timeout"))?;
    let answer = control::ask(&args.mountpoint, Request::Reload { model: args.model.clone() }, wait)?;
    out.result(&answer, || if out.quiet { String::new() } else { show(&answer) })
}

fn show(answer: &Value) -> String {
    let models = answer.get("models").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let line = |model: &Value| {
        let name = printable(model["name"].as_str().unwrap_or("?"));
        match (model["changed"].as_bool(), &model["before"]) {
            (Some(true), before) if !before.is_null() => format!("{name}: {before} -> {}", model["version"]),
            _ => format!("{name}: {}, unchanged", model["version"]),
        }
    };
    let policy = answer.get("policy").and_then(|policy| Some((policy["path"].as_str()?, policy["rules"].as_u64()?)));
    let policy = policy.map(|(path, rules)| format!("policy {}: in force, {rules} rules", printable(path)));
    policy.into_iter().chain(models.iter().map(line)).collect::<Vec<_>>().join("\n")
}
