//! `modelfs mount`.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::{Flags, Out, detach};
use crate::config::layers::{split_list, takes};
use crate::config::{Layers, MountPlan};
use crate::daemon::{self, Ready};
use crate::error::Result;

/// Mount the models of a store; MOUNTPOINT/NAME is the chosen version of NAME.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MountArgs {
    /// file:///srv/models, a plain path, s3://bucket/prefix, or a catalog: vault-kv://MOUNT/PATH
    store: String,
    /// An existing folder
    mountpoint: PathBuf,
    #[command(flatten)]
    flags: Flags<{ takes::MOUNT }>,
    /// Return when the mount is ready, and go on in the background
    #[arg(long)]
    daemon: bool,
    /// The same options as words, separated by commas: -o cache=8GiB,allow_other
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  modelfs mount /srv/models /mnt/models --key file:/etc/modelfs/llama.key \\
      --trust /etc/modelfs/signing.pub
  modelfs mount s3://models/prod /mnt/m --model acme/llama@prod --key env:LLAMA_KEY \\
      --cache 64GiB --daemon
  modelfs mount s3://models/prod /mnt/m --model acme/llama --manifest sha256:51d0... \\
      --key file:k --trust PUBKEY
  modelfs mount s3://models/prod /mnt/m --model acme/llama --versions --key file:k \\
      --trust PUBKEY
  modelfs mount vault-kv://secret/models /mnt/m --trust PUBKEY \\
      --s3-credentials vault-aws:aws/models
  mount -t modelfs s3://models/prod /mnt/models \\
      -o key=file:/etc/modelfs/llama.key,trust=PUBKEY,cache=64GiB

A version never changes under a mount; with --versions a newer one appears beside it. Stop it with `modelfs umount MOUNTPOINT`, or Ctrl-C in the foreground.";

impl MountArgs {
    /// What was meant, as a whole.
    pub(super) fn plan(&self, layers: &mut Layers) -> Result<MountPlan> {
        self.lay(layers)?;
        MountPlan::from_layers(layers, &self.store, &self.mountpoint, self.daemon)
    }

    pub(super) fn goes_to_background(&self) -> bool {
        self.daemon
    }

    fn lay(&self, layers: &mut Layers) -> Result<()> {
        self.lay_words(layers)?;
        self.flags.lay(layers);
        Ok(())
    }

    /// What `-o` says.
    pub(super) fn lay_words(&self, layers: &mut Layers) -> Result<()> {
        let words: Vec<String> = self.options.iter().flat_map(|words| split_list(words)).collect();
        layers.mount_options(&words, false)
    }
}

pub fn run(args: &MountArgs, mut layers: Layers, out: &Out) -> Result<()> {
    mount(args.plan(&mut layers)?, out)
}

/// Mounts as planned; with `plan.daemon` it returns once the mount can be used.
pub(super) fn mount(plan: MountPlan, out: &Out) -> Result<()> {
    let (store, out) = (plan.store.to_string(), out.clone());
    if plan.daemon {
        let log_file = plan.log_file.clone();
        return detach::in_background(log_file.as_deref(), |tell| {
            daemon::run(plan, |ready| tell(ready_line(ready, &store, &out)))
        });
    }
    daemon::run(plan, |ready| {
        let line = ready_line(ready, &store, &out);
        // The mount serves, whether or not anyone reads this.
        let _ = std::io::stdout().write_all(line.as_bytes()).and_then(|()| std::io::stdout().flush());
    })
}

/// The one line of standard output that says the mount can be used.
fn ready_line(ready: &Ready, store: &str, out: &Out) -> String {
    if out.json {
        let value = serde_json::json!({
            "ready": true,
            "mountpoint": ready.mountpoint,
            "store": store,
            "models": ready.models,
            "passthrough": ready.passthrough,
        });
        return format!("{value}\n");
    }
    if out.quiet {
        return String::new();
    }
    let models = match ready.models.as_slice() {
        [one] => one.clone(),
        more => format!("{} models", more.len()),
    };
    let mnt = ready.mountpoint.display();
    format!("{models} of {store} on {mnt}; stop with: modelfs umount {mnt}\n")
}
