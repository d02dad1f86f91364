//! `modelfs seal`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;

use super::access::{LocalKeys, need_registrable, runtime};
use super::signers::Signers;
use super::{Flags, Out, oms};
use crate::catalog::{self, Registration, SealedRecord};
use crate::config::layers::takes;
use crate::config::{self, Access, Layers};
use crate::error::{Code, Error, Result};
use crate::format::Suite;
use crate::keys::{Role, Signer, Trust};
use crate::policy::types::Admits;
use crate::reading;
use crate::refuse;
use crate::seal::{self, Phase, Progress, ProgressFn, SealOptions, SealSummary};
use crate::store::{self, StoreUrl};
use crate::units::{parse_duration, show_rate, show_size};

/// Encrypt a folder and publish it as the next version of a model.
#[derive(Debug, Args)]
#[command(
    after_help = EXAMPLES,
    mut_arg("key", |arg| arg.help("A key that opens the new version; give it again for more [env: MODELFS_KEY_SOURCE]")),
    mut_arg("trust", |arg| arg.help("A key whose refs may be continued: 64 hex digits, or a .pub file [env: MODELFS_TRUST]"))
)]
pub struct SealArgs {
    /// The folder to seal; every regular file below it
    src_dir: PathBuf,
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// What the model is called; may hold slashes, as in acme/llama-70b
    name: String,
    /// A tag to move to the new version, beside `latest`; give it again for more
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// A number to remember the version by, as in eval_loss=1.93; give it again for more
    #[arg(long, value_name = "K=V")]
    metric: Vec<String>,
    /// Seal a variant of NAME, as in q4_k_m: a model of its own, called NAME+VARIANT
    #[arg(long, value_name = "VARIANT")]
    variant: Option<String>,
    /// The publisher key; give it again for cosigners [default: ~/.config/modelfs/signing.key, made by the first seal]
    #[arg(long, value_name = "SIGNER")]
    sign: Vec<String>,
    /// The release key, which moves tags; up to 4 times [default: the first publisher key]
    #[arg(long, value_name = "SIGNER")]
    release: Vec<String>,
    /// Readers refuse new mounts after this time, as in 90d [default: never]
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// An OpenSSF model-signing bundle in the folder, which must vouch for every file [default: model.sig, with --oms-key]
    #[arg(long, value_name = "PATH")]
    oms: Option<PathBuf>,
    /// The public key in PEM that signed the bundle
    #[arg(long, value_name = "PATH")]
    oms_key: Option<PathBuf>,
    /// Write the version into this record of a catalog, as in vault-kv://secret/models/acme/llama
    #[arg(long, value_name = "vault-kv://MOUNT/PATH")]
    register: Option<String>,
    /// With --register and no transit key: put the raw key into Vault, where every reader of the record has it
    #[arg(long, requires = "register")]
    register_raw_key: bool,
    #[command(flatten)]
    pub flags: Flags<{ takes::SEAL }>,
}

const EXAMPLES: &str = "\
Examples:
  modelfs seal ./llama-70b s3://models/prod acme/llama-70b --key file:llama.key
  modelfs seal ./llama /srv/models acme/llama --key file:node.key --key passphrase \\
      --tag staging --metric eval_loss=1.93
  modelfs seal ./llama-q4 s3://models/prod acme/llama --variant q4_k_m --key file:llama.key
      as acme/llama+q4_k_m
  modelfs seal ./llama s3://models/prod acme/llama --key vault-transit:transit/models \\
    --register vault-kv://secret/models/acme/llama
  modelfs seal ./llama s3://models/prod acme/llama --key env:LLAMA_KEY --sign publisher.key \\
      --expires 90d
  modelfs seal ./llama s3://models/prod acme/llama --key file:k --sign a.key --sign b.key \\
      --release ci.key
  modelfs seal ./llama s3://models/prod acme/llama --key file:k --oms-key vendor.pem

Files that did not change since the last version are not uploaded again. Readers switch to the new version at the next \
mount; a seal that is cut off publishes nothing.

SIGNER is a key file, or vault-transit:MOUNT/KEY for an Ed25519 key in Vault.";

pub fn run(args: &SealArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.flags.lay(&mut layers);
    let mut access = Access::from_layers(&layers)?;
    access.need_keys()?;
    let admits = Admits { max_model_size: config::max_model_size(&layers)?, deny_types: config::deny_types(&layers)? };
    let url = layers.store(&args.store)?;
    let name = variant_name(&args.name, args.variant.as_deref())?;
    let metrics = parse_metrics(&args.metric)?;
    let expires_at = args.expires.as_deref().map(expiry).transpose()?;
    let codec = config::seal_codec(&layers)?;
    let suite = layers.parse("cipher", str::parse)?.unwrap_or(Suite::Aes256Gcm);
    crate::mem::harden()?;
    let vault = reading::connect(&mut access)?;
    let register = match &args.register {
        Some(record) => {
            need_registrable(&access.keys, args.register_raw_key)?;
            let (records, at) = (catalog::records(vault.as_ref())?, record.parse().map_err(at_register)?);
            Some(Registration::prepare(records, at, &url, &name)?)
        }
        None => None,
    };
    let keys = Arc::new(LocalKeys::new(&access.keys, vault)?);
    let signers = Signers::new(&access);
    let publishers = signers.publishers_or_new(&args.sign, out)?;
    let releasing = if args.release.is_empty() { Vec::new() } else { signers.releasers(&args.release, "--release")? };
    let trust = Trust::gather(&access.trust.keys, access.trust.file.as_deref())?;
    let policy = Policy::of(&trust, &name, &publishers, &releasing);
    policy.check_release()?;
    let oms = oms::for_seal(&args.src_dir, args.oms.as_deref(), args.oms_key.as_deref(), out)?;
    let store = store::open(&url, &access.store)?;

    let bar = SealBar::new(out);
    let shown = Arc::clone(&bar);
    let mut options = SealOptions::new(keys.clone(), Arc::clone(&publishers[0]));
    options.cosigning = publishers[1..].to_vec();
    options.releasing = releasing;
    options.suite = suite;
    options.codec = codec;
    // A publisher, too, must not continue a channel that was rolled back behind its back.
    options.floors = Some(reading::floors(&access, access.connected.as_ref())?);
    options.trusted = trust.keys(&name, Role::Release);
    options.trusted_publishers = trust.keys(&name, Role::Publisher);
    options.admits = admits;
    options.oms = oms;
    options.tags.clone_from(&args.tag);
    options.expires_at = expires_at;
    options.hide_name = layers.switch("hide-name")?;
    options.metrics = metrics;
    if let Some(variant) = &args.variant {
        options.annotations.insert("variant_of".into(), args.name.as_str().into());
        options.annotations.insert("variant".into(), variant.as_str().into());
    }
    options.progress = ProgressFn::new(move |progress| shown.show(progress));
    let done = runtime()?.block_on(seal::seal(&args.src_dir, store, &name, options));
    bar.end();
    let mut done = done?;
    done.warnings.extend(policy.warning(&args.store, &done));
    for warning in &done.warnings {
        out.hint(format!("warning: {warning}"));
    }
    let registered = match &register {
        Some(registration) => {
            let encryption_key = keys.for_record(args.register_raw_key)?;
            let (manifest, size_bytes, encryption_key) = (done.manifest, done.bytes, encryption_key.as_str());
            Some(registration.write(SealedRecord { manifest, size_bytes, encryption_key })?)
        }
        None => None,
    };
    let mut value = serde_json::to_value(&done).expect("a summary of plain values is JSON");
    value["manifest"] = json!(format!("sha256:{}", done.manifest));
    value["store"] = json!(url.to_string());
    value["registered"] = json!(registered);
    out.result(&value, || {
        let mut text = tell(args, &access, &url, &done, out.quiet);
        if let (Some(registered), false) = (&registered, out.quiet) {
            text.push_str(&format!("Registered: {} version {}\n", registered.record, registered.version));
        }
        text
    })
}

fn at_register(error: Error) -> Error {
    error.context("--register")
}

fn tell(args: &SealArgs, access: &Access, url: &StoreUrl, done: &SealSummary, quiet: bool) -> String {
    if quiet {
        return format!("{}@{} sha256:{}", done.model, done.version, done.manifest);
    }
    let tags: Vec<&str> = done.refs.iter().map(|(tag, _)| tag.as_str()).collect();
    // Whoever has only public halves cannot say where the secret ones lie.
    let opener = access.keys.iter().find(|key| key.opens());
    let key = opener.map_or_else(|| "x25519:PATH".to_owned(), ToString::to_string);
    format!(
        "sealed {} version {} as {}\n  \
           content     {} in {} files\n  \
           uploaded    {} ({})\n  \
           kept        {} unchanged since the last version\n  \
           stored      {}{}\n  \
           cipher      {}, chunks by {}\n  \
           manifest    sha256:{}\n  \
           public key  {}\n{}\n\
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
        done.oms
            .as_ref()
            .map(|oms| format!("  vouched for {} files, by the {}\n", oms.files, oms.signer))
            .unwrap_or_default(),
        args.name,
        done.public_key,
    )
}

/// What the trust given here asks of a new version, and what its signers give.
struct Policy {
    publishers: usize,
    publishers_wanted: usize,
    releasers: usize,
    releasers_wanted: usize,
}

impl Policy {
    fn of(trust: &Trust, model: &str, publishers: &[Arc<dyn Signer>], releasing: &[Arc<dyn Signer>]) -> Policy {
        let releasing = if releasing.is_empty() { &publishers[..1] } else { releasing };
        let counted = |role, signers: &[Arc<dyn Signer>]| {
            let keys = trust.keys(model, role);
            signers.iter().filter(|signer| keys.contains(&signer.public())).count()
        };
        // Where nothing is said of the model, readers elsewhere decide.
        let wanted = |role| if trust.covers(model) { trust.threshold(model, role) as usize } else { 0 };
        Policy {
            publishers: counted(Role::Publisher, publishers),
            publishers_wanted: wanted(Role::Publisher),
            releasers: counted(Role::Release, releasing),
            releasers_wanted: wanted(Role::Release),
        }
    }

    /// A ref is signed once: one with too few signatures would close the model to all its readers.
    fn check_release(&self) -> Result<()> {
        if self.releasers < self.releasers_wanted && self.releasers_wanted > 1 {
            refuse!(
                Usage,
                "the trust given here asks for {} release keys, {} of them sign; give --release for each of them",
                self.releasers_wanted,
                self.releasers
            );
        }
        Ok(())
    }

    /// A missing publisher may sign later: readers refuse the version until then.
    fn warning(&self, store: &str, done: &SealSummary) -> Option<String> {
        (self.publishers < self.publishers_wanted).then(|| {
            format!(
                "version {version} is signed by {} of the {} publishers that the trust given here asks for: readers refuse \
                 it (MAN_SIG) until the others sign: modelfs sign {store} {}@{version} --sign KEYFILE",
                self.publishers,
                self.publishers_wanted,
                done.model,
                version = done.version,
            )
        })
    }
}

/// What coding has won, for people.
pub(super) fn won(stored_bytes: u64, uncoded_bytes: u64) -> String {
    if stored_bytes >= uncoded_bytes {
        return String::new();
    }
    let percent = 100.0 * (1.0 - stored_bytes as f64 / uncoded_bytes as f64);
    format!(", {percent:.1} % less than uncoded")
}

/// What a variant of `name` is called. It is a model of its own, beside the other one and not below it: a mount shows
/// both, and a folder of one is never a folder of the other.
fn variant_name(name: &str, variant: Option<&str>) -> Result<String> {
    let Some(variant) = variant else { return Ok(name.to_owned()) };
    let legal = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    if !(1..=64).contains(&variant.len()) || !variant.bytes().all(legal) {
        refuse!(Usage, "--variant: `{variant}` is not 1 to 64 letters, digits, `.`, `_` and `-`");
    }
    if name.contains('+') {
        refuse!(Usage, "--variant: {name} holds a +, which is a variant already; give the name of the model itself");
    }
    Ok(format!("{name}+{variant}"))
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
pub(super) fn expiry(text: &str) -> Result<i64> {
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

/// One bar a phase.
pub(super) struct SealBar {
    out: Out,
    bar: Mutex<Option<(Phase, ProgressBar)>>,
}

impl SealBar {
    pub(super) fn new(out: &Out) -> Arc<SealBar> {
        Arc::new(SealBar { out: out.clone(), bar: Mutex::new(None) })
    }

    pub(super) fn show(&self, progress: Progress) {
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

    pub(super) fn end(&self) {
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
    fn a_variant_is_a_model_beside_the_one_it_is_of() {
        assert_eq!(variant_name("acme/llama", None).expect("itself"), "acme/llama");
        assert_eq!(variant_name("acme/llama", Some("Q4_K_M")).expect("a variant"), "acme/llama+Q4_K_M");
        let long = "x".repeat(65);
        for (name, bad) in [("m", ""), ("m", "a/b"), ("m", "a@b"), ("m", "a+b"), ("m", &long), ("m+a", "b")] {
            assert_eq!(variant_name(name, Some(bad)).expect_err(bad).code(), Code::Usage);
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
