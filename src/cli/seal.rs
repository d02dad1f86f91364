//! `modelfs seal`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;

use super::access::{LocalKeys, runtime};
use super::{Out, StoreArgs};
use crate::config::units::{parse_duration, show_rate, show_size};
use crate::config::{Access, Layers, parse_store};
use crate::crypto::SigningKey;
use crate::error::{Code, Error, Result};
use crate::keys::{self, Role, Trust};
use crate::refuse;
use crate::seal::{self, CodecChoice, Phase, Progress, ProgressFn, SealOptions, SealSummary};
use crate::store::{self, StoreUrl};

/// Encrypt a folder and publish it as the next version of a model.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct SealArgs {
    /// The folder to seal; every regular file below it
    src_dir: PathBuf,
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// What the model is called; may hold slashes, as in acme/llama-70b
    name: String,
    /// A key that opens the new version; give it again for more [env: MODELFS_KEY_SOURCE; MODELFS_KEY holds a key itself]
    #[arg(long, value_name = "KEY")]
    key: Vec<String>,
    /// A tag to move to the new version, beside `latest`; give it again for more
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// aes-256-gcm or chacha20-poly1305
    #[arg(long, value_name = "CIPHER", default_value = "aes-256-gcm")]
    cipher: String,
    /// Lossless compression of weights: auto (bf16, f16 and f32, where it wins), or none (chunk lengths then tell nothing)
    #[arg(long, value_name = "CODEC", default_value = "auto")]
    codec: String,
    /// A number to remember the version by, as in eval_loss=1.93; give it again for more
    #[arg(long, value_name = "K=V")]
    metric: Vec<String>,
    /// The signing key file [default: ~/.config/modelfs/signing.key, made by the first seal]
    #[arg(long, value_name = "KEYFILE")]
    sign: Option<PathBuf>,
    /// Readers refuse new mounts after this time, as in 90d [default: never]
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Do not publish the name: readers must know it
    #[arg(long)]
    hide_name: bool,
    #[command(flatten)]
    store_args: StoreArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs seal ./llama-70b s3://models/prod acme/llama-70b --key file:llama.key
  modelfs seal ./llama /srv/models acme/llama --key file:node.key --key passphrase --tag staging --metric eval_loss=1.93
  modelfs seal ./llama s3://models/prod acme/llama --key env:LLAMA_KEY --sign release.key --expires 90d

Files that did not change since the last version are not uploaded again. Readers switch to the new version at the next
mount; a seal that is cut off publishes nothing.";

pub fn run(args: &SealArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.store_args.lay(&mut layers);
    layers.flag("key", args.key.clone());
    let access = Access::from_layers(&layers)?;
    access.need_keys()?;
    let url = parse_store(&args.store)?;
    let metrics = parse_metrics(&args.metric)?;
    let expires_at = args.expires.as_deref().map(expiry).transpose()?;
    let codec = match args.codec.as_str() {
        "auto" => CodecChoice::Auto,
        "none" => CodecChoice::None,
        other => refuse!(Usage, "--codec: `{other}` is neither auto nor none"),
    };
    let suite = args.cipher.parse().map_err(|e: Error| e.context("--cipher"))?;
    crate::mem::harden()?;
    let signing = signing_key(args.sign.as_deref(), out)?;
    let store = store::open(&url, &access.store)?;

    let bar = Arc::new(SealBar { out: out.clone(), bar: Mutex::new(None) });
    let shown = Arc::clone(&bar);
    let mut options = SealOptions::new(Arc::new(LocalKeys::new(&access.keys)), Arc::new(signing));
    options.suite = suite;
    options.codec = codec;
    // A publisher, too, must not continue a channel that was rolled back behind its back.
    options.floors = Some(keys::FloorStore::new(&keys::state_dir()?));
    options.trusted = Trust::gather(&access.trust.keys, access.trust.file.as_deref())?.keys(&args.name, Role::Release);
    options.tags.clone_from(&args.tag);
    options.expires_at = expires_at;
    options.hide_name = args.hide_name;
    options.metrics = metrics;
    options.progress = ProgressFn::new(move |progress| shown.show(progress));
    let done = runtime()?.block_on(seal::seal(&args.src_dir, store, &args.name, options));
    bar.end();
    let done = done?;
    for warning in &done.warnings {
        out.hint(format!("warning: {warning}"));
    }
    let mut value = serde_json::to_value(&done).expect("a summary of plain values is JSON");
    value["manifest"] = json!(format!("sha256:{}", done.manifest));
    out.result(&value, || tell(args, &access, &url, &done, out.quiet))
}

fn tell(args: &SealArgs, access: &Access, url: &StoreUrl, done: &SealSummary, quiet: bool) -> String {
    if quiet {
        return format!("{}@{} sha256:{}", done.model, done.version, done.manifest);
    }
    let tags: Vec<&str> = done.refs.iter().map(|(tag, _)| tag.as_str()).collect();
    let key = access.keys.first().map(ToString::to_string).unwrap_or_default();
    format!(
        "sealed {} version {} as {}\n  \
           content     {} in {} files\n  \
           uploaded    {} ({})\n  \
           kept        {} unchanged since the last version\n  \
           stored      {}{}\n  \
           cipher      {}, chunks by {}\n  \
           manifest    sha256:{}\n  \
           public key  {}\n\n\
         Mount it:  modelfs mount {url} MOUNTPOINT --model {} --key {key} --trust {}\n",
        done.model,
        done.version,
        tags.join(", "),
        show_size(done.bytes),
        done.files,
        show_size(done.uploaded_bytes),
        show_rate(done.uploaded_bytes, Duration::from_secs_f64(done.seconds.max(0.0))),
        show_size(done.inherited_bytes),
        show_size(done.stored_bytes),
        won(done.stored_bytes, done.uncoded_bytes),
        done.cipher,
        done.hash,
        done.manifest,
        done.public_key,
        args.name,
        done.public_key,
    )
}

/// What coding has won, for people.
pub(super) fn won(stored_bytes: u64, uncoded_bytes: u64) -> String {
    if stored_bytes >= uncoded_bytes {
        return String::new();
    }
    let percent = 100.0 * (1.0 - stored_bytes as f64 / uncoded_bytes as f64);
    format!(", {percent:.1} % less than uncoded")
}

fn parse_metrics(words: &[String]) -> Result<BTreeMap<String, f64>> {
    let parse = |word: &String| {
        let (name, value) = word.split_once('=')?;
        let value: f64 = value.parse().ok()?;
        (!name.is_empty() && value.is_finite()).then(|| (name.to_string(), value))
    };
    words
        .iter()
        .map(|word| {
            parse(word).ok_or_else(|| Error::new(Code::Usage, format!("--metric: `{word}` is not NAME=NUMBER")))
        })
        .collect()
}

/// Unix seconds, from now.
fn expiry(text: &str) -> Result<i64> {
    let after = parse_duration(text).map_err(|e| e.context("--expires"))?;
    if after < Duration::from_secs(60) {
        refuse!(Usage, "--expires: {text} is over before anyone could mount it; give a minute or more");
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|e| Error::new(Code::Clock, "the clock stands before 1970").with_source(e))?;
    now.checked_add(after)
        .and_then(|at| i64::try_from(at.as_secs()).ok())
        .ok_or_else(|| Error::new(Code::Usage, format!("--expires: {text} is too long; leave it out for never")))
}

/// The named signing key, or this user's own, made by the first seal.
fn signing_key(named: Option<&Path>, out: &Out) -> Result<SigningKey> {
    if let Some(path) = named {
        return keys::load_signing_key(path);
    }
    let path = keys::default_signing_key_path()?;
    let (signing, new) = keys::load_or_create_signing_key(&path)?;
    if new {
        out.hint(format!(
            "made a signing key in {}; keep a copy: only its owner can publish the next version",
            path.display()
        ));
    }
    Ok(signing)
}

/// One bar a phase.
struct SealBar {
    out: Out,
    bar: Mutex<Option<(Phase, ProgressBar)>>,
}

impl SealBar {
    fn show(&self, progress: Progress) {
        let mut shown = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        let what = match progress.phase {
            Phase::Scan | Phase::Publish => None,
            Phase::Compare => Some("compare"),
            Phase::Seal => Some("seal"),
            Phase::Verify => Some("check"),
        };
        let same = shown.as_ref().is_some_and(|(phase, _)| *phase == progress.phase);
        if !same {
            if let Some((_, old)) = shown.take() {
                old.finish_and_clear();
            }
            *shown = what.map(|what| (progress.phase, self.out.progress(progress.total_bytes, what)));
        }
        if let Some((_, bar)) = shown.as_ref() {
            // Calls come from many threads: an older count must not move the bar back.
            bar.set_position(bar.position().max(progress.done_bytes));
        }
    }

    fn end(&self) {
        if let Some((_, bar)) = self.bar.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_names_and_numbers() {
        let good = parse_metrics(&["loss=1.5".into(), "acc=9e-1".into()]).expect("two");
        assert_eq!(good["loss"], 1.5);
        for bad in ["loss", "=1", "loss=", "loss=nan", "loss=one"] {
            assert_eq!(parse_metrics(&[bad.to_string()]).expect_err(bad).code(), Code::Usage);
        }
    }

    #[test]
    fn an_expiry_lies_ahead() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() as i64;
        assert!(expiry("90d").expect("90 days") >= now + 90 * 86_400);
        for bad in ["0s", "90", "10s"] {
            assert_eq!(expiry(bad).expect_err(bad).code(), Code::Usage);
        }
    }
}
