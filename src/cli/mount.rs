//! `modelfs mount`, and the same as a helper of mount(8).

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::{AccessArgs, Out, detach, switch};
use crate::config::{Layers, MountPlan, layers::split_list};
use crate::daemon::{self, Ready};
use crate::error::{Code, Error, Result};
use crate::telemetry::{self, LogFormat, Logging};

/// Mount the models of a store; MOUNTPOINT/NAME is the chosen version of NAME.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MountArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// An existing folder
    mountpoint: PathBuf,
    #[command(flatten)]
    access: AccessArgs,
    /// Only this model; give it again for more [default: all of the store] [env: MODELFS_MODEL]
    #[arg(long, value_name = "MODEL")]
    model: Vec<String>,
    /// strict: every chunk against the signed hash; aead: tags only, faster, where no key holder writes to the store
    #[arg(long, value_name = "MODE")]
    verify: Option<String>,
    /// Most plaintext in locked memory, as in 8GiB [default: half of the free memory] [env: MODELFS_CACHE]
    #[arg(long, value_name = "SIZE")]
    cache: Option<String>,
    /// Which opens wait for the whole file: lazy (none), auto (weights of a program that is loading the model), whole (all
    /// that fit) [default: auto]
    #[arg(long, value_name = "POLICY")]
    open: Option<String>,
    /// Keep the order of reads here, and fetch ahead in that order at the next mount; names files, mode 0600
    /// [env: MODELFS_PROFILE]
    #[arg(long, value_name = "FILE")]
    profile: Option<String>,
    /// No second, unlocked copy of plaintext in the page cache; cold reads are slower
    #[arg(long)]
    no_page_cache: bool,
    /// Not ready before this model is usable; give it again for more
    #[arg(long, value_name = "MODEL")]
    require: Vec<String>,
    /// Let users other than the mounting one in, as file modes allow
    #[arg(long)]
    allow_other: bool,
    /// Owner of all files [default: the mounting user]
    #[arg(long, value_name = "ID")]
    uid: Option<String>,
    /// Group of all files
    #[arg(long, value_name = "ID")]
    gid: Option<String>,
    /// Taken from the modes 0444 and 0555, octal
    #[arg(long, value_name = "OCTAL")]
    umask: Option<String>,
    /// Return when the mount is ready, and go on in the background
    #[arg(long)]
    daemon: bool,
    /// With --daemon: log here after the mount is ready
    #[arg(long, value_name = "PATH")]
    log_file: Option<String>,
    /// The same options as words, separated by commas: -o cache=8GiB,allow_other
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  modelfs mount /srv/models /mnt/models --key file:/etc/modelfs/llama.key --trust /etc/modelfs/signing.pub
  modelfs mount s3://models/prod /mnt/m --model acme/llama@prod --key env:LLAMA_KEY --cache 64GiB --daemon
  modelfs mount s3://models/prod /mnt/m --model acme/llama --manifest sha256:51d0... --key file:k --trust PUBKEY
  mount -t modelfs s3://models/prod /mnt/models -o key=file:/etc/modelfs/llama.key,trust=PUBKEY,cache=64GiB

A version never changes under a mount. Stop it with `modelfs umount MOUNTPOINT`, or Ctrl-C in the foreground.";

impl MountArgs {
    fn lay(&self, layers: &mut Layers) -> Result<()> {
        let words: Vec<String> = self.options.iter().flat_map(|words| split_list(words)).collect();
        layers.mount_options(&words, false)?;
        self.access.lay(layers);
        let one = |value: &Option<String>| value.iter().cloned().collect();
        layers.flag("model", self.model.clone());
        layers.flag("verify", one(&self.verify));
        layers.flag("cache", one(&self.cache));
        layers.flag("open", one(&self.open));
        layers.flag("profile", one(&self.profile));
        layers.flag("require", self.require.clone());
        layers.flag("uid", one(&self.uid));
        layers.flag("gid", one(&self.gid));
        layers.flag("umask", one(&self.umask));
        layers.flag("log-file", one(&self.log_file));
        layers.flag("no-page-cache", switch(self.no_page_cache));
        layers.flag("allow-other", switch(self.allow_other));
        Ok(())
    }
}

pub fn run(args: &MountArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.lay(&mut layers)?;
    let plan = MountPlan::from_layers(&layers, &args.store, &args.mountpoint, args.daemon)?;
    mount(plan, out)
}

fn mount(plan: MountPlan, out: &Out) -> Result<()> {
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

/// What mount(8) passes to `mount.modelfs`.
#[derive(Debug, Default, PartialEq, Eq)]
struct HelperCall {
    store: String,
    mountpoint: PathBuf,
    words: Vec<String>,
    /// `-s`: pass over unknown words.
    sloppy: bool,
    /// `-f`: check everything, mount nothing.
    fake: bool,
    verbose: bool,
}

const HELPER_USAGE: &str = "usage: mount.modelfs STORE MOUNTPOINT [-sfnv] [-o OPTIONS]";

fn parse_helper(args: &[OsString]) -> Result<HelperCall> {
    let usage = |what: String| Error::new(Code::Usage, format!("{what}; {HELPER_USAGE}"));
    let mut call = HelperCall::default();
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
                    if letter == 'o' {
                        call.words.extend(split_list(&value));
                    }
                }
                other => return Err(usage(format!("unknown option -{other}"))),
            }
        }
    }
    match <[String; 2]>::try_from(places) {
        Ok([store, mountpoint]) => Ok(HelperCall { store, mountpoint: mountpoint.into(), ..call }),
        Err(other) => Err(usage(format!("wanted a store and a mountpoint, got {} arguments", other.len()))),
    }
}

/// `mount.modelfs STORE MOUNTPOINT [-sfnv] [-o OPTIONS]`: always returns when ready, as mount(8) expects.
pub fn run_helper(args: &[OsString]) -> Result<()> {
    let call = parse_helper(args)?;
    let mut layers = crate::config::base_layers(None)?;
    layers.mount_options(&call.words, call.sloppy)?;
    telemetry::init_logging(&Logging {
        format: layers.parse("log-format", str::parse::<LogFormat>)?.unwrap_or_default(),
        verbosity: i8::from(call.verbose),
        filter: crate::config::log_filter(),
        daemon: true,
    })?;
    let plan = MountPlan::from_layers(&layers, &call.store, &call.mountpoint, true)?;
    if call.fake {
        return Ok(());
    }
    mount(plan, &Out::new(false, !call.verbose))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helper(text: &str) -> Result<HelperCall> {
        let args: Vec<OsString> = text.split(' ').map(OsString::from).collect();
        parse_helper(&args)
    }

    #[test]
    fn the_form_of_mount_8_is_understood() {
        let call = helper("s3://b/p /mnt -n -o rw,key=file:/k -sv -t modelfs").expect("parsed");
        assert_eq!(call.store, "s3://b/p");
        assert_eq!(call.mountpoint, PathBuf::from("/mnt"));
        assert_eq!(call.words, ["rw", "key=file:/k"]);
        assert!(call.sloppy && call.verbose && !call.fake);
        assert!(helper("s /m -fo ro").expect("glued").fake);
    }

    #[test]
    fn a_wrong_helper_call_is_refused_with_the_usage() {
        for text in ["s3://b/p", "a b c", "a b -o", "a b -x"] {
            let err = helper(text).expect_err(text);
            assert_eq!(err.code(), Code::Usage);
            assert!(err.chain().contains("usage: mount.modelfs"), "{err:?}");
        }
    }
}
