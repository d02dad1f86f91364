//! `modelfs floor`: what is remembered of a model, and forgetting it.

use clap::Args;
use serde_json::{Value, json};

use super::access::{reading, runtime};
use super::out::table;
use super::{ChangeArgs, Out};
use crate::config::Layers;
use crate::error::Result;
use crate::format::{ModelId, check_model_name};
use crate::keys::RefFloor;
use crate::refuse;
use crate::units::show_time;

/// Show below which versions of a model nothing is believed here; --reset forgets it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct FloorArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// The NAME of the model
    model: String,
    /// Forget it, once you know why the store went back: the next reader believes what the store shows then
    #[arg(long, requires = "yes")]
    reset: bool,
    /// Raise the floor that --floor names to what is remembered here: after a snapshot of Vault was restored
    #[arg(long, conflicts_with = "reset")]
    raise: bool,
    /// Really
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    pub access: ChangeArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs floor s3://models/prod acme/llama                  what was seen of it here, by tag
  modelfs floor s3://models/prod acme/llama --reset --yes    a bucket was restored from a backup
  modelfs floor s3://models/prod acme/llama --raise --floor vault-kv:secret/modelfs/floor

A store that shows less than was seen is refused (ROLLBACK, FORK). That is an attack, or a restored backup: reset only \
when you know that it is the latter.";

pub fn run(args: &FloorArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    check_model_name(&args.model).map_err(|e| e.context("MODEL of floor is a bare name"))?;
    if args.yes && !args.reset {
        refuse!(Usage, "--yes says yes to --reset; add it, or drop --yes");
    }
    let reading = reading(&args.store, &layers)?;
    let (store, model) = (reading.store.describe(), ModelId::of_name(&args.model));
    let floors = reading.floors();
    let mut channels = floors.channels(&store, model)?;
    // A pin cannot be listed by tag: those that the store shows are asked for.
    for channel in runtime()?.block_on(reading.resolver().channels(&args.model))? {
        if !channels.contains(&channel) {
            channels.push(channel);
        }
    }
    if args.raise {
        if reading.access.trust.floor.is_none() {
            refuse!(Usage, "--raise raises the floor that --floor names; add --floor vault-kv:MOUNT/PATH");
        }
        let mut unknown = Vec::new();
        for channel in &channels {
            if !floors.raise_pin(&store, model, channel)? {
                unknown.push(&channel[..]);
            }
        }
        if unknown.len() == channels.len() {
            refuse!(
                NoFloor,
                "nothing is remembered of {} here, so nothing was raised; raise it from a machine that remembers, or publish",
                args.model
            );
        }
        if !unknown.is_empty() {
            out.hint(format!("warning: nothing is remembered here of {}: not raised", unknown.join(", ")));
        }
    }
    let mut shown: Vec<(String, &str, RefFloor)> = Vec::new();
    for channel in channels {
        if let Some(floor) = floors.load_local(&store, model, &channel)? {
            shown.push((channel.clone(), "here", floor));
        }
        if let Some(floor) = floors.load_pinned(&store, model, &channel)? {
            shown.push((channel, "pinned", floor));
        }
    }
    if args.reset {
        for (channel, _, _) in &shown {
            floors.reset(&store, model, channel)?;
        }
    }
    let rows: Vec<Value> = shown
        .iter()
        .map(|(channel, at, floor)| {
            json!({
                "tag": channel, "at": at, "ref_seq": floor.max_ref_seq, "ref_digest": floor.ref_digest,
                "version": floor.max_version_seq, "min_version": floor.min_version_seq, "issued_at": floor.max_issued_at,
            })
        })
        .collect();
    let value = json!({"store": store, "model": args.model, "floors": rows, "reset": args.reset});
    out.result(&value, || {
        if shown.is_empty() {
            return format!("nothing is remembered of {}: whatever the store shows next is believed", args.model);
        }
        let rows: Vec<Vec<String>> = shown
            .iter()
            .map(|(channel, at, floor)| {
                vec![
                    channel.clone(),
                    (*at).to_owned(),
                    floor.max_ref_seq.to_string(),
                    floor.max_version_seq.to_string(),
                    floor.min_version_seq.to_string(),
                    show_time(floor.max_issued_at),
                ]
            })
            .collect();
        let header = ["tag", "remembered", "ref", "highest version", "lowest allowed", "signed"];
        let mut text = table(&header, &[false, false, true, true, true, false], &rows);
        if args.reset {
            text.push_str("forgotten; the next reader believes what the store shows then\n");
        }
        text
    })
}
