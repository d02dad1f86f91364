//! `modelfs keygen`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Out;
use crate::error::Result;
use crate::keys;

/// Make a new key file: 32 random bytes in hex, readable by you only.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct KeygenArgs {
    /// Where to; never overwritten
    path: PathBuf,
    /// A signing key instead, with its public half in PATH.pub
    #[arg(long, conflicts_with = "recipient")]
    signing: bool,
    /// A key pair that models are sealed to instead: PATH opens, PATH.pub only seals
    #[arg(long)]
    recipient: bool,
}

const EXAMPLES: &str = "\
Examples:
  modelfs keygen ~/llama.key
      then: modelfs seal ... --key file:$HOME/llama.key
  modelfs keygen --signing ~/release.key
      then: modelfs seal ... --sign ~/release.key
      and:  modelfs mount ... --trust ~/release.key.pub
  modelfs keygen --recipient ~/server.key
      then: modelfs mount ... --key x25519:$HOME/server.key on the server
      and:  modelfs seal ... --key recipient:server.key.pub elsewhere

Whoever has the file opens every model sealed with it; without it nobody does. Keep a copy elsewhere.";

pub fn run(args: &KeygenArgs, out: &Out) -> Result<()> {
    crate::mem::harden()?;
    if args.recipient {
        return recipient(args, out);
    }
    if !args.signing {
        keys::generate_key_file(&args.path)?;
        let value = json!({"path": args.path, "kind": "key"});
        return out.result(&value, || {
            if out.quiet {
                return String::new();
            }
            format!("new key in {0}; use it as --key file:{0}", args.path.display())
        });
    }
    let public = keys::generate_signing_pair(&args.path)?;
    let public_path = keys::public_path(&args.path);
    let value =
        json!({"path": args.path, "kind": "signing", "public_key": public.to_string(), "public_path": public_path});
    out.result(&value, || {
        if out.quiet {
            return public.to_string();
        }
        format!(
            "new signing key in {}; readers trust it with --trust {} or --trust {public}",
            args.path.display(),
            public_path.display()
        )
    })
}

fn recipient(args: &KeygenArgs, out: &Out) -> Result<()> {
    let public = keys::generate_recipient_pair(&args.path)?;
    let public_path = keys::public_path(&args.path);
    let value =
        json!({"path": args.path, "kind": "recipient", "public_key": public.to_string(), "public_path": public_path});
    out.result(&value, || {
        if out.quiet {
            return public.to_string();
        }
        format!(
            "new key pair in {0}; it opens with --key x25519:{0}, others seal to it with --key recipient:{1} or --key \
             recipient:{public}",
            args.path.display(),
            public_path.display()
        )
    })
}
