//! `modelfs run`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::Flags;
use super::mount::MountArgs;
use crate::config::Layers;
use crate::config::layers::takes;
use crate::config::rules::{self, Said};
use crate::error::Result;
use crate::refuse;
use crate::run::{self, RunPlan};

/// Mount, run a command once its models can be read, hand signals on to it, and with its end unmount and wipe.
#[derive(Debug, Args)]
#[command(override_usage = "modelfs run [OPTIONS] <STORE> <MOUNTPOINT> -- <COMMAND> [ARGS]...")]
pub struct RunArgs {
    #[command(flatten)]
    mount: Box<MountArgs>,
    #[command(flatten)]
    flags: Flags<{ takes::RUN }>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl RunArgs {
    pub(super) fn mount(&self) -> &MountArgs {
        &self.mount
    }
}

const EXAMPLES: &str = "\
Examples:
  modelfs run /srv/models /models --key file:/run/secrets/key --trust PUBKEY \\
      -- python3 serve.py /models/acme/llama
  modelfs run s3://models/prod /models --model acme/llama --require acme/llama \\
      --key env:KEY --trust PUBKEY -- vllm serve
  ENTRYPOINT [\"modelfs\", \"run\"]                                    in a Dockerfile
  HEALTHCHECK CMD [\"modelfs\", \"-q\", \"status\", \"/models\"]         beside it

The exit code is the command's; 128+N if signal N ended it, 127 if it is not there, 126 if it cannot be executed. Codes of \
modelfs itself, told on standard error: the command was not started. With --strict 26: a check found something.
Keys, passphrases, Vault tokens and, for a store in S3, AWS credentials are not in the command's environment.";

pub(super) const AFTER_HELP: &str = EXAMPLES;

pub fn run(args: &RunArgs, mut layers: Layers, config_files: Vec<PathBuf>) -> Result<()> {
    if args.mount.goes_to_background() {
        refuse!(
            Usage,
            "--daemon: run stays as long as its command; use `modelfs mount --daemon` and start the command"
        );
    }
    args.flags.lay(&mut layers);
    let mount = args.mount.plan(&mut layers)?;
    rules::refuse(&Said::of_process(&layers), takes::RUN)?;
    let strict = layers.switch("strict")?;
    let keep_env = layers.parse_all("keep-env", |name| Ok(OsString::from(name)))?;
    let plan = RunPlan { mount, command: args.command.clone(), strict, keep_env, config_files };
    // The command's code is not one of ours: it leaves as it came.
    std::process::exit(i32::from(run::run(plan)?));
}
