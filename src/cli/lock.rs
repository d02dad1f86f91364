//! `modelfs lock` and `modelfs unlock`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::Out;
use crate::control::{self, AccessRequest, Request};
use crate::error::Result;
use crate::units::{parse_duration, show_size};

/// Wipe the keys and the plaintext of a mount and refuse all reads, at once; the mount stays.
#[derive(Debug, Args)]
#[command(after_help = LOCK_EXAMPLES)]
pub struct LockArgs {
    /// Where it is mounted
    mountpoint: PathBuf,
    /// Only this model [default: all]
    model: Option<String>,
}

const LOCK_EXAMPLES: &str = "\
Examples:
  modelfs lock /mnt/models
  modelfs lock /mnt/models acme/llama --json
  modelfs unlock /mnt/models                        read the keys again and serve

It waits for no reader: opens and reads get EACCES, what was mapped past the daemon is SIGBUS, what was open past it ends.
Names and sizes stay visible.";

/// Read the keys of locked models again, from where the mount read them, and serve the same versions.
#[derive(Debug, Args)]
#[command(after_help = UNLOCK_EXAMPLES)]
pub struct UnlockArgs {
    /// Where it is mounted
    mountpoint: PathBuf,
    /// Only this model [default: all]
    model: Option<String>,
    /// Longest time to wait for store and key source
    #[arg(long, value_name = "TIME", default_value = "120s")]
    timeout: String,
}

const UNLOCK_EXAMPLES: &str = "\
Examples:
  modelfs unlock /mnt/models
  modelfs unlock /mnt/models acme/llama

A key that came from the environment or was typed is gone once read: such a mount cannot be unlocked, mount it again.";

/// Wiping takes 40 ms a GiB; after 60 s the daemon hangs.
const WAIT: Duration = Duration::from_secs(60);

pub fn lock(args: &LockArgs, out: &Out) -> Result<()> {
    let request = AccessRequest::Lock { model: args.model.clone() };
    let done = control::ask(&args.mountpoint, Request::Access(request), WAIT)?;
    out.result(&done, || {
        if out.quiet {
            return String::new();
        }
        let bytes = |name: &str| show_size(done[name].as_u64().unwrap_or(0));
        let mut text = format!(
            "locked {} in {:.2} s; {} wiped",
            names(&done["locked"]),
            done["seconds"].as_f64().unwrap_or(0.0),
            bytes("wiped_bytes")
        );
        if done["unwiped_bytes"].as_u64() > Some(0) {
            text.push_str(&format!(", {} cut off but NOT wiped (see the log)", bytes("unwiped_bytes")));
        }
        text
    })
}

pub fn unlock(args: &UnlockArgs, out: &Out) -> Result<()> {
    let wait = parse_duration(&args.timeout).map_err(|e| e.context("--timeout"))?;
    let request = AccessRequest::Unlock { model: args.model.clone() };
    let done = control::ask(&args.mountpoint, Request::Access(request), wait)?;
    out.result(&done, || match done["unlocked"].as_array() {
        _ if out.quiet => String::new(),
        Some(unlocked) if !unlocked.is_empty() => format!("unlocked {}", names(&done["unlocked"])),
        _ if done["vault"] == "live" => "nothing was locked; Vault takes the mount again".into(),
        _ => "nothing was locked".into(),
    })
}

fn names(value: &Value) -> String {
    let names = value.as_array().into_iter().flatten().filter_map(Value::as_str);
    names.map(super::out::printable).collect::<Vec<_>>().join(", ")
}
