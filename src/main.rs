//! Parses, runs, prints the error chain once, exits with its class's code. Everything else is in the library.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use modelfs::cli::{self, Cli};
use modelfs::control::error_json;
use modelfs::error::Error;
use modelfs::telemetry::scrub;

/// Tokens and keys pass through blocks of libraries that nobody else wipes.
#[global_allocator]
static HEAP: modelfs::mem::WipingHeap = modelfs::mem::WipingHeap;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let called_as = args.first().map(Path::new).and_then(Path::file_name);
    let json = args.iter().any(|arg| arg == "--json");
    let helper = called_as.is_some_and(|name| cli::mount_helper::NAMES.iter().any(|helper| name == *helper));
    if helper || cli::is_mount_form(&args[1..]) {
        return ExitCode::from(cli::mount_helper::run(&args[1..]));
    }
    let done = match Cli::try_parse_from(&args) {
        Ok(cli) => {
            if cli.command.is_filter() {
                // SAFETY: no handler of ours is replaced; the default action ends the process, as for any filter.
                unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
            }
            cli::run(cli)
        }
        Err(e) => return refused_by_clap(&e, json),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tell(&e, json);
            ExitCode::from(e.class().exit_code())
        }
    }
}

/// The chain on one line of standard error; with `--json` also one object on standard output, unless a result is there.
fn tell(error: &Error, json: bool) {
    let chain = error.chain();
    let _ = writeln!(std::io::stderr(), "modelfs: {} [{}]", scrub(&chain), error.code());
    if json && !cli::result_printed() {
        let _ = writeln!(std::io::stdout(), "{}", serde_json::json!({ "error": error_json(error) }));
    }
}

/// `--help` and `--version` end well; anything else is usage, in clap's own words (it knows the nearest option).
fn refused_by_clap(error: &clap::Error, json: bool) -> ExitCode {
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    if json {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let ours = Error::new(modelfs::error::Code::Usage, first);
        let _ = writeln!(std::io::stdout(), "{}", serde_json::json!({ "error": error_json(&ours) }));
    }
    ExitCode::from(modelfs::error::Class::Usage.exit_code())
}
