//! The options of the table as flags of a command.
//!
//! In: which commands take what (`config::options`). Out: flags with their help, and what was typed as the highest layer.
//! Promises: a command has exactly the flags of the options that it takes; a flag that was not typed hides nothing below it,
//! and a switch can be typed both ways (`--versions=no`).
//! Held by: the tests below, tests/config.rs.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::config::Layers;
use crate::config::options::{Kind, OPTIONS, OptionSpec, Section, takes};

/// The flags of whoever takes the options with one of these bits of [`takes`].
#[derive(Debug, Clone, Default)]
pub struct Flags<const WHO: u16>(Vec<(&'static OptionSpec, Vec<String>)>);

/// Of every command that reads a model.
pub type AccessArgs = Flags<{ takes::READS }>;
/// Of every command that changes what a store holds of a model.
pub type ChangeArgs = Flags<{ takes::READS | takes::CHANGES }>;
/// How to reach the store.
pub type StoreArgs = Flags<{ takes::STORES }>;

/// `--log` and `--log-format` are flags of all commands, before the command too.
fn of(who: u16) -> impl Iterator<Item = &'static OptionSpec> {
    OPTIONS.iter().filter(move |spec| spec.is_taken_by(who) && spec.takes != takes::ALL)
}

impl<const WHO: u16> Flags<WHO> {
    /// Lays what was typed above everything so far.
    pub fn lay(&self, layers: &mut Layers) {
        for (spec, values) in &self.0 {
            layers.flag(spec.name, values.clone());
        }
    }
}

/// What `--help` and the manual say of an option.
pub fn help(spec: &OptionSpec) -> String {
    let default = match spec.default {
        "" | "no" => String::new(),
        default => format!(" [default: {default}]"),
    };
    format!("{}{default} [env: {}]", spec.means, spec.env)
}

fn arg(spec: &'static OptionSpec) -> Arg {
    let arg = Arg::new(spec.name).long(spec.name).value_name(spec.word).help(help(spec));
    let arg = match spec.section {
        // The command's own.
        Section::Mount | Section::Run | Section::Seal | Section::Log => arg,
        other => arg.help_heading(other.title()),
    };
    match spec.kind {
        Kind::One => arg.action(ArgAction::Set).overrides_with(spec.name),
        Kind::Many => arg.action(ArgAction::Append),
        Kind::Switch => {
            arg.num_args(0..=1).require_equals(true).default_missing_value("true").overrides_with(spec.name)
        }
    }
}

impl<const WHO: u16> Args for Flags<WHO> {
    fn augment_args(command: Command) -> Command {
        of(WHO).fold(command, |command, spec| command.arg(arg(spec)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<const WHO: u16> FromArgMatches for Flags<WHO> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let typed = |spec: &'static OptionSpec| {
            let values = matches.get_many::<String>(spec.name).unwrap_or_default();
            (spec, values.cloned().collect::<Vec<String>>())
        };
        Ok(Flags(of(WHO).map(typed).filter(|(_, values)| !values.is_empty()).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::Cli;

    #[derive(Debug, Parser)]
    struct Mounts {
        #[command(flatten)]
        flags: Flags<{ takes::MOUNT }>,
    }

    fn laid(args: &[&str]) -> Layers {
        let mut layers = Layers::default();
        let words = std::iter::once("mount").chain(args.iter().copied());
        Mounts::try_parse_from(words).expect("flags of a mount").flags.lay(&mut layers);
        layers
    }

    #[test]
    fn a_switch_is_typed_both_ways_and_takes_no_word_that_follows() {
        assert!(laid(&["--versions"]).switch("versions").expect("a switch"));
        let off = laid(&["--versions=no", "--allow-other"]);
        assert!(off.get("versions").is_some() && !off.switch("versions").expect("a switch"));
        assert!(laid(&[]).get("versions").is_none(), "what was not typed hides nothing");
        Mounts::try_parse_from(["mount", "--versions", "no"]).expect_err("`no` is no argument");
    }

    #[test]
    fn values_are_kept_in_order_and_the_last_of_one_wins() {
        assert_eq!(laid(&["--key", "a", "--key", "b"]).get("key").expect("typed").values, ["a", "b"]);
        assert_eq!(laid(&["--cache", "1G", "--cache", "2G"]).get("cache").expect("typed").last(), "2G");
    }

    /// Which command takes which option is said once, and true.
    #[test]
    fn a_command_has_the_flags_of_the_options_it_takes_and_no_other() {
        let mut top = Cli::command();
        top.build();
        let commands = [
            ("ls", takes::STORES),
            ("cat", takes::READS),
            ("seal", takes::SEAL),
            ("tag", takes::READS | takes::CHANGES),
            ("mount", takes::MOUNT),
            ("run", takes::MOUNT | takes::RUN),
            ("volume-plugin", takes::PLUGIN),
            ("csi", takes::CSI),
        ];
        for (name, who) in commands {
            let command = top.find_subcommand(name).expect("a command");
            for spec in OPTIONS {
                let arg = command.get_arguments().find(|arg| arg.get_long() == Some(spec.name));
                assert_eq!(arg.is_some(), spec.is_taken_by(who), "{name} --{}", spec.name);
                let told = arg.map(|arg| arg.get_help().map(ToString::to_string).unwrap_or_default());
                let lacks = told.is_some_and(|told| spec.takes != takes::ALL && !told.contains(spec.env));
                assert!(!lacks, "the help of {name} --{} names no {}", spec.name, spec.env);
            }
        }
    }
}
