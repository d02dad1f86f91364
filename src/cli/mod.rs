//! The command line as typed: one file a command, the help text beside it.
//!
//! In: arguments. Out: a [`Cli`], and from [`run`] the end of the command. What the words mean together is decided in
//! `config`; here they are only collected.
//! Promises: names, exit codes and `--json` shapes are a contract; results go to standard output, everything else to
//! standard error; nothing printed is a key or plaintext (`cat` excepted, whose purpose it is).
//! Held by: tests/cli.rs.

mod access;
mod cat;
mod demo;
mod detach;
mod doctor;
mod inspect;
mod keygen;
mod ls;
pub mod mount;
mod out;
mod plain;
mod seal;
mod status;
mod umount;
mod verify;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Layers};
use crate::error::Result;
use crate::telemetry::{LogFormat, Logging};

pub use out::{Out, result_printed};

/// A filesystem that serves encrypted models from object storage, verified block by block, from locked memory.
#[derive(Debug, Parser)]
#[command(name = "modelfs", version, about, after_help = EXAMPLES, max_term_width = 110, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  modelfs demo                                             see the whole thing work, in a minute
  modelfs keygen ~/llama.key                               a new key
  modelfs seal ./llama s3://models/prod acme/llama --key file:$HOME/llama.key
  modelfs mount s3://models/prod /mnt/models --key file:$HOME/llama.key --trust PUBKEY
  modelfs umount /mnt/models

STORE is file:///srv/models, a plain path, or s3://bucket/prefix. MODEL is NAME, NAME@TAG or NAME@VERSION.
KEY is file:PATH, env:VAR, passphrase, or passphrase-file:PATH.
Exit codes: 0 done, 1 this machine failed, 2 usage, 3 not found, 20 tampered, 21 changed, 22 store unreachable,
23 no room, 24 files still held, 25 no key or access.";

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Print results, and the error, as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress, no hints; only results and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// More detail on standard error; twice for more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// How log lines look: text or json
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// This configuration file and no other [default: /etc/modelfs.toml, then ~/.config/modelfs/config.toml]
    #[arg(long, global = true, value_name = "PATH")]
    pub config: Option<PathBuf>,
}

impl Global {
    /// The layers below this command's own flags.
    pub fn layers(&self) -> Result<Layers> {
        let mut layers = config::base_layers(self.config.as_deref())?;
        layers.flag("log-format", self.log_format.iter().cloned().collect());
        Ok(layers)
    }

    pub fn logging(&self, layers: &Layers, daemon: bool) -> Result<Logging> {
        Ok(Logging {
            format: layers.parse("log-format", str::parse::<LogFormat>)?.unwrap_or_default(),
            verbosity: if self.quiet { -1 } else { i8::try_from(self.verbose).unwrap_or(i8::MAX) },
            filter: config::log_filter(),
            daemon,
        })
    }

    pub fn out(&self) -> Out {
        Out::new(self.json, self.quiet)
    }
}

/// Options of every command that reads a model. As typed; [`AccessArgs::lay`] puts them on top of the other layers.
#[derive(Debug, Clone, Args)]
pub struct AccessArgs {
    /// Where the key is; give it again for more, tried in order [env: MODELFS_KEY_SOURCE; MODELFS_KEY holds a key itself]
    #[arg(long, value_name = "KEY")]
    pub key: Vec<String>,
    /// A signing key to believe: 64 hex digits, or a .pub file [env: MODELFS_TRUST]
    #[arg(long, value_name = "PUBKEY")]
    pub trust: Vec<String>,
    /// The file of trusted keys [env: MODELFS_TRUST_FILE]
    #[arg(long, value_name = "PATH")]
    pub trust_file: Option<String>,
    /// Believe whoever signed what is there now, and only them from then on
    #[arg(long)]
    pub trust_on_first_use: bool,
    /// Refuse a model of which no earlier version was recorded here
    #[arg(long)]
    pub require_floor: bool,
    /// This version and no other, by its manifest digest [env: MODELFS_MANIFEST]
    #[arg(long, value_name = "sha256:HEX")]
    pub manifest: Option<String>,
    #[command(flatten)]
    pub store: StoreArgs,
}

/// How to reach the store.
#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    /// Longest time one request may take, as in 30s
    #[arg(long, value_name = "TIME")]
    pub fetch_timeout: Option<String>,
    /// Longest time a chunk may take, retries included, as in 60s
    #[arg(long, value_name = "TIME")]
    pub fetch_budget: Option<String>,
    /// An S3 endpoint other than Amazon's [env: MODELFS_S3_ENDPOINT, AWS_ENDPOINT_URL]
    #[arg(long, value_name = "URL")]
    pub s3_endpoint: Option<String>,
    /// The S3 region [env: MODELFS_S3_REGION, AWS_REGION]
    #[arg(long, value_name = "REGION")]
    pub s3_region: Option<String>,
}

impl StoreArgs {
    pub fn lay(&self, layers: &mut Layers) {
        let one = |value: &Option<String>| value.iter().cloned().collect();
        layers.flag("fetch-timeout", one(&self.fetch_timeout));
        layers.flag("fetch-budget", one(&self.fetch_budget));
        layers.flag("s3-endpoint", one(&self.s3_endpoint));
        layers.flag("s3-region", one(&self.s3_region));
    }
}

impl AccessArgs {
    pub fn lay(&self, layers: &mut Layers) {
        let one = |value: &Option<String>| value.iter().cloned().collect();
        layers.flag("key", self.key.clone());
        layers.flag("trust", self.trust.clone());
        layers.flag("trust-file", one(&self.trust_file));
        layers.flag("manifest", one(&self.manifest));
        layers.flag("trust-on-first-use", switch(self.trust_on_first_use));
        layers.flag("require-floor", switch(self.require_floor));
        self.store.lay(layers);
    }
}

/// An absent switch hides nothing below it.
fn switch(on: bool) -> Vec<String> {
    on.then(|| "true".to_string()).into_iter().collect()
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Demo(demo::DemoArgs),
    Keygen(keygen::KeygenArgs),
    Seal(seal::SealArgs),
    Ls(ls::LsArgs),
    Inspect(inspect::InspectArgs),
    Verify(verify::VerifyArgs),
    Cat(cat::CatArgs),
    Mount(mount::MountArgs),
    Umount(umount::UmountArgs),
    Status(status::StatusArgs),
    Doctor(doctor::DoctorArgs),
}

impl Command {
    /// Whether a closed pipe at standard output may end the process, as it does any filter.
    pub fn is_filter(&self) -> bool {
        match self {
            Command::Ls(_) | Command::Inspect(_) | Command::Cat(_) | Command::Status(_) | Command::Doctor(_) => true,
            Command::Demo(_)
            | Command::Keygen(_)
            | Command::Seal(_)
            | Command::Verify(_)
            | Command::Mount(_)
            | Command::Umount(_) => false,
        }
    }
}

/// Runs one command to its end.
pub fn run(cli: Cli) -> Result<()> {
    let layers = cli.global.layers()?;
    let daemon = matches!(cli.command, Command::Mount(_));
    crate::telemetry::init_logging(&cli.global.logging(&layers, daemon)?)?;
    let out = cli.global.out();
    match cli.command {
        Command::Demo(args) => demo::run(&args, &out),
        Command::Keygen(args) => keygen::run(&args, &out),
        Command::Seal(args) => seal::run(&args, layers, &out),
        Command::Ls(args) => ls::run(&args, layers, &out),
        Command::Inspect(args) => inspect::run(&args, layers, &out),
        Command::Verify(args) => verify::run(&args, layers, &out),
        Command::Cat(args) => cat::run(&args, layers, &out),
        Command::Mount(args) => mount::run(&args, layers, &out),
        Command::Umount(args) => umount::run(&args, &out),
        Command::Status(args) => status::run(&args, &out),
        Command::Doctor(args) => doctor::run(&args, &out),
    }
}
