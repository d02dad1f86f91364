//! `modelfs completions`: words for the shell's Tab key, from the command line's own definition.

use clap::{Args, CommandFactory, ValueEnum};

use super::{Cli, Out};
use crate::error::Result;

/// Print the completion script of a shell.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Those that a package has a folder for.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

const EXAMPLES: &str = "\
Examples:
  modelfs completions bash > ~/.local/share/bash-completion/completions/modelfs
  modelfs completions zsh > ~/.zfunc/_modelfs              with ~/.zfunc in fpath
  modelfs completions fish > ~/.config/fish/completions/modelfs.fish
  source <(modelfs completions bash)                       for this shell alone

The Debian package brings all three.";

pub fn run(args: &CompletionsArgs, out: &Out) -> Result<()> {
    let script = script(args.shell);
    out.result(&serde_json::json!({ "script": script }), || script.clone())
}

fn script(shell: Shell) -> String {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "modelfs", &mut script);
    String::from_utf8(script).expect("made of our own words")
}
