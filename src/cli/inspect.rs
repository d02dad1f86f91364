//! `modelfs inspect`: one version, verified, as far as a key shows it.

use clap::Args;
use serde_json::{Value, json};

use super::access::{Opened, Reading, reading, runtime};
use super::out::{printable, table};
use super::{AccessArgs, Out};
use crate::config::Layers;
use crate::error::Result;
use crate::format::SlotParams;
use crate::keys::Resolved;
use crate::units::{show_size, show_time};

/// Show one version: with a key its files, sizes and SHA-256; without, what its signed header says.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InspectArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME, NAME@TAG or NAME@VERSION
    model: String,
    #[command(flatten)]
    access: AccessArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs inspect s3://models/prod acme/llama --trust signing.pub
  modelfs inspect s3://models/prod acme/llama@3 --trust signing.pub --key file:llama.key
  modelfs inspect /srv/models acme/llama --trust signing.pub --key file:k \\
      --json | jq '.files[].sha256'

Signatures, digest and freshness are checked first. Slots are shown by kind and label; key material never is.";

pub fn run(args: &InspectArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let reading = reading(&args.store, &layers)?;
    let resolved = runtime()?.block_on(reading.resolve(&args.model))?;
    let opened = if reading.access.keys.is_empty() { None } else { Some(Opened::unlock(&reading, &resolved)?) };
    let value = describe(&reading, &resolved, opened.as_ref());
    out.result(&value, || show(&value, &resolved))
}

fn describe(reading: &Reading, resolved: &Resolved, opened: Option<&Opened>) -> Value {
    let header = &resolved.header;
    let slots: Vec<Value> = resolved
        .slots
        .slots
        .iter()
        .map(|slot| {
            let cost = match &slot.params {
                SlotParams::Scrypt { log2_n, .. } => Some(format!("N=2^{log2_n}")),
                SlotParams::Argon2id { m_kib, t, p, .. } => Some(format!("m={m_kib}KiB t={t} p={p}")),
                SlotParams::VaultKv { version, .. } => Some(format!("version {version}")),
                SlotParams::HpkeX25519 { recipient } => Some(format!("recipient {recipient}")),
                SlotParams::Pbkdf2Sha512 { iterations, .. } => Some(format!("iterations={iterations}")),
                SlotParams::Raw { .. } | SlotParams::VaultTransit | SlotParams::Unknown { .. } => None,
            };
            json!({"label": slot.label, "kind": slot.kind().name(), "cost": cost})
        })
        .collect();
    let mut value = json!({
        "store": reading.url.to_string(),
        "name": resolved.name,
        "id": resolved.model_id,
        "version": header.seq,
        "manifest": format!("sha256:{}", resolved.digest),
        "created_at": header.created_at,
        "cipher": header.suite.name(),
        "chunk_hash": header.hash_alg.name(),
        "vid": header.vid,
        "previous": header.previous.map(|digest| format!("sha256:{digest}")),
        "slots_generation": resolved.slots.generation,
        "slots": slots,
        "opened": opened.is_some(),
    });
    if let Some(head) = &resolved.reference {
        value["ref"] = json!({
            "tag": resolved.channel, "ref_seq": head.ref_seq, "issued_at": head.issued_at,
            "expires_at": (head.expires_at != i64::MAX).then_some(head.expires_at),
        });
    }
    if let Some(opened) = opened {
        let manifest = &opened.manifest;
        value["files"] = manifest
            .files()
            .iter()
            .map(|file| {
                json!({
                    "path": manifest.path(file), "size": file.size, "sha256": hex::encode(file.sha256),
                    "mode": format!("{:04o}", file.mode), "mtime": file.mtime,
                })
            })
            .collect();
        value["total_bytes"] = json!(manifest.total_size() as u64);
        value["objects"] = json!(manifest.objects().len());
        value["stored_bytes"] = json!(manifest.objects().iter().map(|object| object.stored_len()).sum::<u64>());
        value["uncoded_bytes"] = json!(manifest.objects().iter().map(|object| object.layout.stored_len()).sum::<u64>());
        value["coded_objects"] = json!(manifest.objects().iter().filter(|object| object.is_coded()).count());
        value["inherited_objects"] = json!(manifest.n_inherited());
        // Display only: whoever sealed it wrote this.
        value["annotations"] = serde_json::from_slice(manifest.annotations()).unwrap_or(Value::Null);
    }
    value
}

fn show(value: &Value, resolved: &Resolved) -> String {
    let header = &resolved.header;
    let mut text = format!(
        "{} version {}\n  manifest    {}\n  made        {}\n  cipher      {}, chunks by {}\n",
        printable(&resolved.name),
        header.seq,
        value["manifest"].as_str().unwrap_or_default(),
        show_time(header.created_at),
        header.suite,
        header.hash_alg,
    );
    if let (Some(head), Some(tag)) = (&resolved.reference, value["ref"]["tag"].as_str()) {
        let until = if head.expires_at == i64::MAX { "never".into() } else { show_time(head.expires_at) };
        text.push_str(&format!(
            "  tag         {tag}, ref {}, signed {}, expires {until}\n",
            head.ref_seq,
            show_time(head.issued_at)
        ));
    }
    for slot in value["slots"].as_array().into_iter().flatten() {
        text.push_str(&format!(
            "  slot        {} ({}{})\n",
            printable(slot["label"].as_str().unwrap_or_default()),
            slot["kind"].as_str().unwrap_or_default(),
            slot["cost"].as_str().map(|cost| format!(", {cost}")).unwrap_or_default()
        ));
    }
    let Some(files) = value["files"].as_array() else {
        text.push_str("  files       not shown: names and sizes are encrypted; add --key KEY\n");
        return text;
    };
    let bytes = |name: &str| show_size(value[name].as_u64().unwrap_or_default());
    text.push_str(&format!(
        "  content     {} in {} files, {} stored{}\n\n",
        bytes("total_bytes"),
        files.len(),
        bytes("stored_bytes"),
        super::seal::won(
            value["stored_bytes"].as_u64().unwrap_or_default(),
            value["uncoded_bytes"].as_u64().unwrap_or_default()
        )
    ));
    let rows: Vec<Vec<String>> = files
        .iter()
        .map(|file| {
            vec![
                file["sha256"].as_str().unwrap_or_default().to_string(),
                show_size(file["size"].as_u64().unwrap_or_default()),
                printable(file["path"].as_str().unwrap_or_default()),
            ]
        })
        .collect();
    text.push_str(&table(&["sha256", "size", "path"], &[false, true, false], &rows));
    text
}
