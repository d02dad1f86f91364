//! The command line as typed: one file a command, the help text beside it.
//!
//! In: arguments. Out: a [`Cli`], and from [`run`] the end of the command. What the words mean together is decided in
//! `config`; here they are only collected.
//! Promises: names, exit codes and `--json` shapes are a contract; results go to standard output, everything else to
//! standard error; nothing printed is a key or plaintext (`cat` excepted, whose purpose it is).
//! Held by: tests/cli.rs.

mod access;
mod audit;
mod cat;
mod completions;
mod config;
mod csi;
mod demo;
mod detach;
mod doctor;
mod flags;
mod floor;
mod inspect;
mod install_helper;
mod key;
mod keygen;
mod lock;
mod ls;
mod man;
mod mount;
pub mod mount_helper;
mod oms;
mod out;
mod plain;
mod prune;
mod record;
mod reload;
mod rollback;
mod run;
mod scan;
mod seal;
mod sessions;
mod sign;
mod signers;
mod status;
mod tag;
mod top;
mod umount;
mod verify;
mod volume_plugin;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Layers;
use crate::error::Result;
use crate::telemetry::events::Kind as Event;
use crate::telemetry::{LogFormat, Logging};
use record::recorded;

pub use flags::{AccessArgs, ChangeArgs, Flags, StoreArgs};
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

STORE is file:///srv/models, a plain path, or s3://bucket/prefix.
MODEL is NAME, NAME@TAG, NAME@VERSION or NAME@best:METRIC:min (or :max).
KEY is file:PATH, env:VAR, passphrase, passphrase-file:PATH, x25519:PATH (opens what is sealed to its public half), \
recipient:PUBKEY|PATH.pub (seals only), vault-transit:MOUNT/KEY or vault-kv:MOUNT/PATH#FIELD.
Exit codes: 0 done, 1 this machine failed, 2 usage, 3 not found, 20 tampered, 21 changed, 22 store unreachable, \
23 no room, 24 files still held, 25 no key or access, 26 refused by --strict, or weights \
found by scan.";

/// Apart from the options of one command, which are what its help is read for.
const EVERY: &str = "Every command";

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Print results, and the error, as JSON
    #[arg(long, global = true, help_heading = EVERY)]
    pub json: bool,
    /// No progress, no hints; only results and errors
    #[arg(short, long, global = true, help_heading = EVERY, conflicts_with = "verbose")]
    pub quiet: bool,
    /// More detail on standard error; twice for more
    #[arg(short, long, global = true, help_heading = EVERY, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What is logged: a level, or levels of parts as in modelfs=debug [env: MODELFS_LOG]
    #[arg(id = "log-filter", long = "log", global = true, help_heading = EVERY, value_name = "FILTER")]
    pub log: Option<String>,
    /// How log lines look: text or json [env: MODELFS_LOG_FORMAT]
    #[arg(long, global = true, help_heading = EVERY, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// This configuration file and no other [default: /etc/modelfs.toml, then ~/.config/modelfs/config.toml]
    #[arg(long, global = true, help_heading = EVERY, value_name = "PATH")]
    pub config: Option<PathBuf>,
}

impl Global {
    /// The layers below this command's own flags.
    pub fn layers(&self) -> Result<Layers> {
        let mut layers = crate::config::base_layers(self.config.as_deref())?;
        self.lay(&mut layers);
        Ok(layers)
    }

    /// Lays the flags of every command that are options too.
    pub(crate) fn lay(&self, layers: &mut Layers) {
        layers.flag("log", self.log.iter().cloned().collect());
        layers.flag("log-format", self.log_format.iter().cloned().collect());
    }

    pub fn logging(&self, layers: &Layers, daemon: bool) -> Result<Logging> {
        Ok(Logging {
            format: layers.parse("log-format", str::parse::<LogFormat>)?.unwrap_or_default(),
            verbosity: if self.quiet { -1 } else { i8::try_from(self.verbose).unwrap_or(i8::MAX) },
            filter: crate::config::log_filter(layers)?,
            daemon,
        })
    }

    pub fn out(&self) -> Out {
        Out::new(self.json, self.quiet)
    }
}

/// In the order in which help lists them: to try it, to publish, to serve, to look after it, for machines.
#[derive(Debug, Subcommand)]
pub enum Command {
    Demo(demo::DemoArgs),
    Keygen(keygen::KeygenArgs),
    Seal(seal::SealArgs),
    Ls(ls::LsArgs),
    Inspect(inspect::InspectArgs),
    Verify(verify::VerifyArgs),
    Cat(cat::CatArgs),
    Mount(Box<mount::MountArgs>),
    Umount(umount::UmountArgs),
    Reload(reload::ReloadArgs),
    Status(status::StatusArgs),
    Top(top::TopArgs),
    Doctor(Box<doctor::DoctorArgs>),
    Scan(scan::ScanArgs),
    Config(config::ConfigArgs),
    Audit(audit::AuditArgs),
    Key(key::KeyArgs),
    Tag(tag::TagArgs),
    Rollback(rollback::RollbackArgs),
    Prune(prune::PruneArgs),
    Floor(floor::FloorArgs),
    Sign(sign::SignArgs),
    Lock(lock::LockArgs),
    Unlock(lock::UnlockArgs),
    Sessions(sessions::SessionsArgs),
    #[command(after_help = run::AFTER_HELP)]
    Run(run::RunArgs),
    VolumePlugin(Box<volume_plugin::VolumePluginArgs>),
    Csi(Box<csi::CsiArgs>),
    InstallHelper(install_helper::InstallHelperArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

impl Command {
    /// Whether a closed pipe at standard output may end the process, as it does any filter.
    pub fn is_filter(&self) -> bool {
        match self {
            Command::Ls(_) | Command::Inspect(_) | Command::Cat(_) | Command::Status(_) | Command::Doctor(_) => true,
            Command::Scan(_) | Command::Sessions(_) | Command::Completions(_) | Command::Man(_) => true,
            Command::Config(_) => true,
            Command::Audit(args) => args.is_filter(),
            Command::Demo(_)
            | Command::Keygen(_)
            | Command::Seal(_)
            | Command::Verify(_)
            | Command::Csi(_)
            | Command::Mount(_)
            | Command::Run(_)
            | Command::Floor(_)
            | Command::Key(_)
            | Command::Prune(_)
            | Command::Rollback(_)
            | Command::Tag(_)
            | Command::Lock(_)
            | Command::Unlock(_)
            | Command::Sign(_)
            | Command::Reload(_)
            | Command::Top(_)
            | Command::InstallHelper(_)
            | Command::VolumePlugin(_)
            | Command::Umount(_) => false,
        }
    }
}

/// `modelfs STORE MOUNTPOINT -o OPTIONS`, as mount.fuse3 calls a filesystem's program: no command holds a slash or a colon,
/// and every store that is no plain word does.
pub fn is_mount_form(args: &[OsString]) -> bool {
    let [store, mountpoint, ..] = args else { return false };
    let has = |word: &OsString, marks: &[u8]| word.as_bytes().iter().any(|byte| marks.contains(byte));
    !store.as_bytes().starts_with(b"-") && has(store, b"/:") && has(mountpoint, b"/")
}

/// Runs one command to its end.
pub fn run(cli: Cli) -> Result<()> {
    // It is to say what is wrong, all of it, and not to end at the first.
    if let Command::Config(args) = &cli.command {
        return config::run(args, &cli.global);
    }
    let layers = cli.global.layers();
    let config_files = crate::config::files(cli.global.config.as_deref());
    let out = cli.global.out();
    if let Command::Doctor(args) = &cli.command {
        // A configuration that cannot be used is one of its findings.
        let known = layers.as_ref().ok().cloned().unwrap_or_default();
        crate::telemetry::init_logging(&cli.global.logging(&known, false)?)?;
        return doctor::run(args, layers, config_files, &out);
    }
    let layers = layers?;
    let daemon =
        matches!(cli.command, Command::Csi(_) | Command::Mount(_) | Command::Run(_) | Command::VolumePlugin(_));
    let mut logged = layers.clone();
    let mounts = match &cli.command {
        Command::Mount(args) => Some(args.as_ref()),
        Command::Run(args) => Some(args.mount()),
        _ => None,
    };
    if let Some(args) = mounts {
        // How to log may stand among the words of -o. What is wrong with them is told where the plan is made.
        let _ = args.lay_words(&mut logged);
        cli.global.lay(&mut logged);
    }
    crate::telemetry::init_logging(&cli.global.logging(&logged, daemon)?)?;
    for told in layers.told().iter().filter(|_| daemon) {
        tracing::warn!("{told}");
    }
    let verbose = cli.global.verbose > 0;
    match cli.command {
        Command::Audit(args) => audit::run(&args, layers, &out),
        Command::Config(_) => unreachable!("ran above"),
        Command::Demo(args) => demo::run(&args, &out),
        Command::Keygen(args) => keygen::run(&args, &out),
        Command::Seal(args) => {
            recorded((Event::Publish, "seal"), &args.flags, layers, &out, |layers, out| seal::run(&args, layers, out))
        }
        Command::Ls(args) => ls::run(&args, layers, &out),
        Command::Inspect(args) => inspect::run(&args, layers, &out),
        Command::Verify(args) => verify::run(&args, layers, &out),
        Command::Cat(args) => cat::run(&args, layers, &out),
        Command::Csi(args) => csi::run(&args, layers),
        Command::Mount(args) => mount::run(&args, layers, &out),
        Command::Run(args) => run::run(&args, layers, config_files),
        Command::Umount(args) => umount::run(&args, &out),
        Command::Status(args) => status::run(&args, &out),
        Command::Top(args) => top::run(&args, &out),
        Command::Doctor(_) => unreachable!("answered above"),
        Command::Scan(args) => scan::run(&args, &out, verbose),
        Command::Floor(args) => {
            recorded((Event::Admin, "floor"), &args.access, layers, &out, |layers, out| floor::run(&args, layers, out))
        }
        Command::Key(args) => key::run(&args, layers, &out),
        Command::Prune(args) => recorded((Event::Publish, "prune"), &args.access, layers, &out, |layers, out| {
            prune::run(&args, layers, out)
        }),
        Command::Rollback(args) => recorded((Event::Publish, "rollback"), &args.access, layers, &out, |layers, out| {
            rollback::run(&args, layers, out)
        }),
        Command::Tag(args) => {
            recorded((Event::Publish, "tag"), &args.access, layers, &out, |layers, out| tag::run(&args, layers, out))
        }
        Command::Lock(args) => lock::lock(&args, &out),
        Command::Sessions(args) => sessions::run(&args, &out),
        Command::Unlock(args) => lock::unlock(&args, &out),
        Command::Sign(args) => {
            recorded((Event::Publish, "sign"), &args.access, layers, &out, |layers, out| sign::run(&args, layers, out))
        }
        Command::Reload(args) => reload::run(&args, &out),
        Command::InstallHelper(args) => install_helper::run(&args, &out),
        Command::Completions(args) => completions::run(&args, &out),
        Command::Man(args) => man::run(&args, &out),
        Command::VolumePlugin(args) => volume_plugin::run(&args, layers, &out),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn each(command: &clap::Command, look: &mut dyn FnMut(&clap::Command)) {
        look(command);
        command.get_subcommands().for_each(|inner| each(inner, look));
    }

    /// Where clap breaks a row for a narrow terminal, a row that was broken before becomes two ragged ones.
    #[test]
    fn help_breaks_no_sentence_by_hand_and_no_example_is_wider_than_a_terminal_of_a_hundred_columns() {
        each(&Cli::command(), &mut |command| {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let rows: Vec<&str> = help.lines().collect();
            for row in rows.iter().filter(|row| row.starts_with(' ')) {
                assert!(row.len() <= 96, "{}: {row}", command.get_name());
            }
            for pair in rows.windows(2).filter(|pair| pair.iter().all(|row| !row.is_empty() && !row.starts_with(' '))) {
                assert!(pair[0].ends_with(['.', ':']), "{}: broken in a sentence: {}", command.get_name(), pair[0]);
            }
        });
    }

    #[test]
    fn options_of_every_command_stand_under_a_heading_of_their_own() {
        let mut top = Cli::command();
        top.build();
        let floor = top.find_subcommand("floor").expect("a command");
        let heading = |flag: &str| {
            let arg = floor.get_arguments().find(|arg| arg.get_long() == Some(flag)).expect("a flag");
            arg.get_help_heading().map(ToOwned::to_owned)
        };
        for flag in ["json", "quiet", "verbose", "log", "log-format", "config"] {
            assert_eq!(heading(flag).as_deref(), Some(EVERY), "--{flag}");
        }
        assert_eq!(heading("reset"), None);
    }
}
