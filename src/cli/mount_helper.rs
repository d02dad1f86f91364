//! `mount.modelfs`: what mount(8), fstab and systemd's mount units call.
//!
//! In: STORE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS]. Out: an exit status of mount(8), once the mount can be used.
//! Promises: the last line of standard error is the reason of a failure, which leaves no mount; the source in the mount table is the one in
//! fstab, so that `mount -a` sees what is mounted already; a remount never says that something changed.
//! Not here: what the words of `-o` are (`config::layers`), mounting (`cli::mount`).
//! Held by: the tests below, tests/mount8.sh.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Out, mount};
use crate::config::layers::{mount_flags_not_kept, own_words, split_list};
use crate::config::{self, MountPlan};
use crate::control::{self, Request};
use crate::error::{Code, Error, Result};
use crate::store::StoreUrl;
use crate::telemetry::{self, LogFormat, Logging, scrub};
use crate::{mounts, refuse};

/// The names under which it is looked for: `mount -t modelfs`, and whatever reads the type out of the mount table.
pub const NAMES: [&str; 2] = ["mount.modelfs", "mount.fuse.modelfs"];

const USAGE: &str = "usage: mount.modelfs STORE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS]";

/// A daemon answers from memory.
const STATUS_WAIT: Duration = Duration::from_secs(5);

/// The exit statuses that mount(8) documents.
const STATUS_USAGE: u8 = 1;
const STATUS_SYSTEM: u8 = 2;
const STATUS_FAILURE: u8 = 32;

/// What mount(8) passes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Call {
    store: String,
    mountpoint: PathBuf,
    words: Vec<String>,
    /// `-s`: pass over unknown words.
    sloppy: bool,
    /// `-f`: check everything, mount nothing.
    fake: bool,
    verbose: bool,
    /// `-N`: the file of the mount namespace to mount in.
    namespace: Option<PathBuf>,
}

impl Call {
    fn is_remount(&self) -> bool {
        self.words.iter().any(|word| word == "remount")
    }
}

/// Runs it to its end; returns the exit status.
pub fn run(args: &[OsString]) -> u8 {
    let asks = |names: [&str; 2]| args.first().is_some_and(|first| names.iter().any(|name| first == name));
    if asks(["-h", "--help"]) || asks(["-V", "--version"]) {
        let _ = writeln!(std::io::stdout(), "mount.modelfs {}; {USAGE}", env!("CARGO_PKG_VERSION"));
        return 0;
    }
    let (done, remount) = match parse(args) {
        Ok(call) => (work(&call), call.is_remount()),
        Err(error) => (Err(error), false),
    };
    match done {
        Ok(()) => 0,
        Err(error) => {
            say(&format!("{} [{}]", scrub(&error.chain()), error.code()));
            // The kernel's own filesystems answer a change they cannot make as a failure, not as wrong usage.
            if remount { STATUS_FAILURE } else { exit_status(&error) }
        }
    }
}

/// One line, whatever the text holds.
fn say(text: &str) {
    let line: Vec<&str> = text.split(['\n', '\r']).map(str::trim).filter(|part| !part.is_empty()).collect();
    let _ = writeln!(std::io::stderr(), "mount.modelfs: {}", line.join(" "));
}

fn exit_status(error: &Error) -> u8 {
    match error.code() {
        Code::Usage => STATUS_USAGE,
        Code::Host | Code::State => STATUS_SYSTEM,
        _ => STATUS_FAILURE,
    }
}

fn work(call: &Call) -> Result<()> {
    if let Some(namespace) = &call.namespace {
        enter(namespace)?;
    }
    if call.is_remount() {
        return remount(call);
    }
    let (words, env_files) = apart(&call.words);
    for file in env_files {
        // What needs a secret among them takes it out of the environment again, and overwrites it there.
        for (name, value) in config::env_file::read(&file)?.variables() {
            // SAFETY: this process has one thread yet.
            unsafe { std::env::set_var(name, value) };
        }
    }
    // A short value passes through the stack on its way to the C library.
    crate::mem::scrub_stack();
    let mut layers = config::base_layers(None)?;
    layers.mount_options(&words, call.sloppy)?;
    telemetry::init_logging(&Logging {
        format: layers.parse("log-format", str::parse::<LogFormat>)?.unwrap_or_default(),
        verbosity: i8::from(call.verbose),
        filter: config::log_filter(&layers)?,
        daemon: true,
    })?;
    let mut plan = MountPlan::from_layers(&layers, &call.store, &call.mountpoint, true)?;
    if matches!(plan.store, StoreUrl::Local(_)) {
        // `mount -a` compares this with the first field of fstab.
        plan.source.clone_from(&call.store);
    }
    if call.fake {
        return Ok(());
    }
    // Who has mounted has chosen the flags.
    let given = plan.given.is_some();
    mount::mount(plan, &Out::new(false, !call.verbose))?;
    let not_kept = if given { Vec::new() } else { mount_flags_not_kept(&call.words) };
    if !not_kept.is_empty() {
        let (asked, is): (Vec<_>, Vec<_>) = not_kept.into_iter().unzip();
        let mnt = call.mountpoint.display();
        say(&format!("{mnt}: WARNING: mounted {}, although asked for {}", is.join(","), asked.join(",")));
    }
    Ok(())
}

/// `env-file=PATH` is for this helper alone: whoever types `modelfs mount` has an environment.
fn apart(words: &[String]) -> (Vec<String>, Vec<PathBuf>) {
    let (mut rest, mut env_files) = (Vec::new(), Vec::new());
    for word in words {
        match word.split_once('=') {
            Some(("env-file" | "env_file", path)) => env_files.push(path.into()),
            _ => rest.push(word.clone()),
        }
    }
    (rest, env_files)
}

/// Everything from here on, the daemon too, happens in that namespace: its tree is where the mountpoint is looked for, and
/// where the daemon unmounts.
fn enter(namespace: &Path) -> Result<()> {
    let refused = |e: std::io::Error| {
        Error::new(Code::Host, format!("cannot enter the mount namespace {}", namespace.display())).with_source(e)
    };
    let file = File::open(namespace).map_err(refused)?;
    // SAFETY: an open descriptor and a number; this process has one thread yet, as the call demands.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNS) } != 0 {
        return Err(refused(std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Nothing of a running mount can be changed from here; what asks for no change succeeds.
fn remount(call: &Call) -> Result<()> {
    let mountpoint = mounts::canonical(&call.mountpoint)?;
    let shown = mountpoint.display();
    match mounts::at(&mountpoint)? {
        Some(mount) if mount.is_ours() => {}
        Some(mount) => refuse!(NotMounted, "{shown} is a {} mount, not one of modelfs; nothing remounted", mount.kind),
        None => refuse!(NotMounted, "nothing is mounted on {shown}; mount it without remount"),
    }
    if let Some((asked, is)) = mount_flags_not_kept(&call.words).first() {
        refuse!(MountPoint, "{shown} is {is} and cannot be remounted {asked}; nothing changed");
    }
    let has = words_of_daemon(&mountpoint);
    let new: Vec<String> = own_words(&call.words).into_iter().filter(|word| !has.contains(word)).collect();
    if !new.is_empty() {
        let new = new.join(",");
        refuse!(MountPoint, "a running mount takes no new options ({new}); unmount {shown} and mount it again");
    }
    Ok(())
}

/// The options that the mount was made with by this helper: its daemon is a fork of that call and carries its arguments.
/// None, if another way made it or nobody answers.
fn words_of_daemon(mountpoint: &Path) -> Vec<String> {
    let words = || {
        let status = control::ask(mountpoint, Request::Status, STATUS_WAIT).ok()?;
        let cmdline = std::fs::read(format!("/proc/{}/cmdline", status["pid"].as_u64()?)).ok()?;
        let mut args = cmdline.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned());
        let program = args.next()?;
        let name = Path::new(&program).file_name()?.to_str()?;
        if !NAMES.contains(&name) {
            return None;
        }
        let args: Vec<OsString> = args.filter(|arg| !arg.is_empty()).map(OsString::from).collect();
        Some(own_words(&parse(&args).ok()?.words))
    };
    words().unwrap_or_default()
}

fn parse(args: &[OsString]) -> Result<Call> {
    let usage = |what: String| Error::new(Code::Usage, format!("{what}; {USAGE}"));
    let mut call = Call::default();
    let mut places = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let text = arg.to_str().ok_or_else(|| usage("an argument is not UTF-8".into()))?;
        let Some(letters) = text.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
            places.push(text.to_string());
            continue;
        };
        let mut rest = letters.chars();
        while let Some(letter) = rest.next() {
            match letter {
                's' => call.sloppy = true,
                'f' => call.fake = true,
                'v' => call.verbose = true,
                'n' => {}
                'o' | 't' | 'N' => {
                    let glued: String = rest.by_ref().collect();
                    let value = match (glued.is_empty(), args.as_slice()) {
                        (false, _) => glued,
                        (true, [next, ..]) => {
                            args.next();
                            next.to_str().ok_or_else(|| usage("an option is not UTF-8".into()))?.to_string()
                        }
                        (true, []) => return Err(usage(format!("-{letter} needs a value"))),
                    };
                    match letter {
                        'o' => call.words.extend(split_list(&value)),
                        'N' => call.namespace = Some(value.into()),
                        _ => {}
                    }
                }
                other => return Err(usage(format!("unknown option -{other}"))),
            }
        }
    }
    match <[String; 2]>::try_from(places) {
        Ok([store, mountpoint]) => Ok(Call { store, mountpoint: mountpoint.into(), ..call }),
        Err(other) => Err(usage(format!("wanted a store and a mountpoint, got {} arguments", other.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helper(text: &str) -> Result<Call> {
        let args: Vec<OsString> = text.split(' ').map(OsString::from).collect();
        parse(&args)
    }

    #[test]
    fn the_form_of_mount_8_is_understood() {
        let call = helper("s3://b/p /mnt -n -o rw,key=file:/k -sv -t modelfs -N /proc/7/fd/4").expect("parsed");
        assert_eq!(call.store, "s3://b/p");
        assert_eq!(call.mountpoint, PathBuf::from("/mnt"));
        assert_eq!(call.words, ["rw", "key=file:/k"]);
        assert_eq!(call.namespace, Some("/proc/7/fd/4".into()));
        assert!(call.sloppy && call.verbose && !call.fake && !call.is_remount());
        let call = helper("s /m -fo ro,remount").expect("glued");
        assert!(call.fake && call.is_remount());
    }

    #[test]
    fn the_file_of_variables_is_no_option_of_the_mount() {
        let (words, files) = apart(&split_list("ro,env-file=/a,cache=1G,env_file=/b"));
        assert_eq!(words, ["ro", "cache=1G"]);
        assert_eq!(files, [PathBuf::from("/a"), PathBuf::from("/b")]);
    }

    #[test]
    fn a_wrong_helper_call_is_refused_with_the_usage() {
        for text in ["s3://b/p", "a b c", "a b -o", "a b -x"] {
            let err = helper(text).expect_err(text);
            assert_eq!(err.code(), Code::Usage);
            assert!(err.chain().contains("usage: mount.modelfs"), "{err:?}");
        }
    }

    #[test]
    fn every_failure_has_an_exit_status_of_mount_8() {
        for code in Code::ALL {
            let status = exit_status(&Error::new(*code, "x"));
            assert!([STATUS_USAGE, STATUS_SYSTEM, STATUS_FAILURE].contains(&status), "{code}");
        }
        assert_eq!(exit_status(&Error::new(Code::Unreachable, "x")), 32);
        assert_eq!(exit_status(&Error::new(Code::MountPoint, "x")), 32);
        assert_eq!(exit_status(&Error::new(Code::Usage, "x")), 1);
        assert_eq!(exit_status(&Error::new(Code::Host, "x")), 2);
    }

    #[test]
    fn a_place_without_a_mount_cannot_be_remounted() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (at, code) in [(dir.path(), "nothing is mounted"), (Path::new("/proc"), "is a proc mount")] {
            let err = remount(&Call { mountpoint: at.into(), ..Call::default() }).expect_err("refused");
            assert!(err.chain().contains(code), "{err:?}");
        }
    }
}
