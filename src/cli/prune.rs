//! `modelfs prune`: what nothing names any more, after a grace period.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::access::{LocalKeys, Reading, reading, runtime};
use super::out::{printable, table};
use super::{ChangeArgs, Out};
use crate::catalog::{self, CatalogAt};
use crate::config::{Layers, parse_digest};
use crate::error::{Code, Error, Result};
use crate::format::{ManifestDigest, ModelId, check_model_name, names};
use crate::keys::unix_now;
use crate::refuse;
use crate::store::StoreUrl;
use crate::units::{parse_duration, show_size, show_time};
use crate::versions::{Kind, Look, PruneOptions, PruneReport, Pruner, Tally};

/// Remove what no version needs any more. Without --yes: look, tell, and remember what is garbage.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PruneArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// Only this model [default: every model that tells its name]
    model: Option<String>,
    /// How long garbage must have been known as garbage; longer than the longest seal
    #[arg(long, value_name = "TIME", default_value = "7d")]
    grace: String,
    /// Of each tag, keep the newest so many different versions
    #[arg(long, value_name = "N", default_value_t = 10)]
    keep: usize,
    /// Least time between the two looks that must agree, should the grace period be shorter
    #[arg(long, value_name = "TIME", default_value = "24h")]
    second_look: String,
    /// Keep this version too, which something reads by its digest without a tag (mount --manifest); give it again for more
    #[arg(long, value_name = "sha256:...", value_parser = digest)]
    keep_manifest: Vec<ManifestDigest>,
    /// Keep every version that a record below this path of Vault names; give it again for more
    #[arg(long, value_name = "vault-kv://MOUNT/PATH", value_parser = catalog_at)]
    catalog: Vec<CatalogAt>,
    /// Only tell; remember nothing
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Delete what an earlier look has called garbage too
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    pub access: ChangeArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs prune s3://models/prod --key file:llama.key --trust signing.pub   what is garbage?
  modelfs prune s3://models/prod --key file:llama.key --trust signing.pub --yes
      once a day, from cron
  modelfs prune /srv/models acme/llama --keep 3 --grace 30d --key file:k \\
      --trust signing.pub --yes
  modelfs prune s3://models/prod --catalog vault-kv://secret/models --key file:k \\
      --trust signing.pub --yes

Two looks of this machine, at least --grace apart, must both call a thing garbage before it is deleted: first the refs \
of versions beyond --keep, and a grace period after those the objects that only they named. Whatever cannot be read, \
verified or opened stops the prune of its model, so the keys of all versions kept are needed. What is garbage is \
remembered in the state folder; without it, the looks start anew. A mount of a version that is pruned loses its files.

Nothing in a store tells of those who read by digest: a version that a catalog's record or a mount's --manifest names \
is deleted like any other once no tag leads to it, unless --catalog and --keep-manifest name it here, at every prune. A \
catalog that cannot be read, and a digest that is not there, stop the prune.";

pub fn run(args: &PruneArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    if let Some(model) = &args.model {
        check_model_name(model).map_err(|e| e.context("MODEL of prune is a bare name"))?;
    }
    let seconds = |text: &str, name: &str| Ok(parse_duration(text).map_err(|e| e.context(name.to_owned()))?.as_secs());
    let options = PruneOptions {
        versions_kept: args.keep,
        grace_s: seconds(&args.grace, "--grace")?,
        second_look_s: seconds(&args.second_look, "--second-look")?,
        look: match (args.dry_run, args.yes) {
            (true, _) => Look::DryRun,
            (false, false) => Look::Note,
            (false, true) => Look::Sweep,
        },
        now: unix_now(),
    };
    if args.keep == 0 {
        refuse!(Usage, "--keep 0 would keep no version; a tag names at least one");
    }
    let reading = reading(&args.store, &layers)?;
    reading.access.need_keys()?;
    if reading.access.manifest.is_some() {
        refuse!(Usage, "--manifest has no meaning for prune; to keep a version by its digest, write --keep-manifest");
    }
    let runtime = runtime()?;
    let models = match &args.model {
        Some(model) => vec![model.clone()],
        None => runtime.block_on(reading.model_names())?,
    };
    let mut pins = runtime.block_on(kept_manifests(&reading, &models, &args.keep_manifest))?;
    for at in &args.catalog {
        let records = of_catalog(&reading, at)?;
        if records.is_empty() {
            out.hint(format!("warning: no record of {at} names a model of {}", reading.url));
        }
        for (model, digest) in records {
            pins.entry(model).or_default().insert(digest);
        }
    }
    let pruner = Pruner {
        resolver: reading.resolver(),
        store: Arc::clone(&reading.store),
        keys: Arc::new(LocalKeys::new(&reading.access.keys, reading.vault.clone())?),
        state: reading.access.trust.state_dir()?,
        pins,
        options,
    };
    let (mut reports, mut stopped): (Vec<PruneReport>, Vec<(String, Error)>) = (Vec::new(), Vec::new());
    for model in models {
        let bar = out.progress(0, "prune");
        let progress = |done: u64, total: u64| {
            bar.set_length(total);
            bar.set_position(done);
        };
        bar.set_message(printable(&model));
        let report = runtime.block_on(pruner.prune(&model, &progress));
        bar.finish_and_clear();
        match report {
            Ok(report) => reports.push(report),
            // The other models are no worse for it.
            Err(err) => stopped.push((model, err)),
        }
    }
    for report in &reports {
        for warning in &report.warnings {
            out.hint(format!("warning: {}: {warning}", report.model));
        }
    }
    if let [(_, _)] = stopped.as_slice()
        && reports.is_empty()
    {
        let (_, err) = stopped.remove(0);
        return Err(err);
    }
    let refused: Vec<_> = stopped
        .iter()
        .map(|(model, err)| json!({"model": model, "code": err.code().name(), "why": err.chain()}))
        .collect();
    let value = json!({
        "store": reading.url.to_string(), "grace_seconds": options.grace_s, "keep": options.versions_kept,
        "swept": options.look == Look::Sweep, "models": reports, "stopped": refused,
    });
    out.result(&value, || show(&reports, &options))?;
    match stopped.into_iter().next() {
        Some((model, err)) => Err(err.context(format!("{model} was not pruned"))),
        None => Ok(()),
    }
}

type Pins = BTreeMap<ModelId, BTreeSet<ManifestDigest>>;

/// Of which model each is. A digest alone does not say, so the store is asked.
///
/// # Errors
/// `NOT_FOUND` for one that no model has: whoever named it would take it for safe.
async fn kept_manifests(reading: &Reading, models: &[String], digests: &[ManifestDigest]) -> Result<Pins> {
    let mut pins = Pins::new();
    for &digest in digests {
        let mut found = false;
        for model in models.iter().map(|name| ModelId::of_name(name)) {
            match reading.store.size(&names::manifest(model, digest)).await {
                Ok(_) => {
                    found = true;
                    pins.entry(model).or_default().insert(digest);
                }
                Err(none) if none.code() == Code::NotFound => {}
                Err(err) => return Err(err),
            }
        }
        if !found {
            refuse!(
                NotFound,
                "--keep-manifest sha256:{digest}: no model that would be pruned has this manifest; nothing was pruned"
            );
        }
    }
    Ok(pins)
}

/// What the records of a catalog name in this store.
///
/// # Errors
/// `USAGE` for a store that no record can name; `CATALOG` for a record that cannot be understood; what Vault answers.
fn of_catalog(reading: &Reading, at: &CatalogAt) -> Result<Vec<(ModelId, ManifestDigest)>> {
    if !matches!(reading.url, StoreUrl::S3 { .. }) {
        refuse!(
            Usage,
            "--catalog {at}: its records name buckets, and {} is none; write --keep-manifest for each version instead",
            reading.url
        );
    }
    let records = catalog::records(reading.vault.as_ref())?;
    let mut pins = Vec::new();
    for name in catalog::names(&*records, at).map_err(|err| err.context("nothing was pruned"))? {
        let record = catalog::read(&*records, at, &name).map_err(|err| err.context("nothing was pruned"))?;
        if record.store == reading.url {
            pins.push((record.model_id, record.manifest));
        }
    }
    Ok(pins)
}

fn digest(text: &str) -> std::result::Result<ManifestDigest, String> {
    parse_digest(text).map_err(|err| err.chain())
}

fn catalog_at(text: &str) -> std::result::Result<CatalogAt, String> {
    text.parse().map_err(|err: Error| err.chain())
}

fn show(reports: &[PruneReport], options: &PruneOptions) -> String {
    if reports.is_empty() {
        return "no model to prune".into();
    }
    let mut rows = Vec::new();
    let mut row = |model: &str, what: &str, tally: &Tally| {
        rows.push(vec![printable(model), what.to_owned(), tally.objects.to_string(), show_size(tally.bytes)]);
    };
    let verb = if options.look == Look::Sweep { "deleted" } else { "to delete" };
    let (mut due, mut next_at) = (0, None::<i64>);
    for report in reports {
        row(&report.model, &format!("needed by {} versions", report.versions), &report.needed);
        let mut kinds = |what: &str, tallies: &BTreeMap<Kind, Tally>| {
            for (kind, tally) in tallies {
                row(&report.model, &format!("{what}: {}", kind.name()), tally);
            }
        };
        kinds(verb, &report.due);
        kinds("waiting", &report.waiting);
        due += report.due.values().map(|tally| tally.objects).sum::<u64>();
        next_at = match (next_at, report.next_at) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if report.strange > 0 {
            let strange = Tally { objects: report.strange as u64, bytes: 0 };
            row(&report.model, "not of this format, left alone", &strange);
        }
    }
    let mut text = table(&["model", "what", "objects", "stored"], &[false, false, true, true], &rows);
    if options.look != Look::Sweep && due > 0 {
        text.push_str("add --yes to delete what may go\n");
    }
    if let Some(at) = next_at {
        let apart = Duration::from_secs(options.grace_s.max(options.second_look_s));
        text.push_str(&format!(
            "what waits may go from {} on, {apart:?} after it was first called garbage\n",
            show_time(at)
        ));
    }
    text
}
