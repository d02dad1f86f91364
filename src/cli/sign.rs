//! `modelfs sign`.

use bytes::Bytes;
use clap::Args;
use serde_json::json;

use super::access::{reading, runtime};
use super::out::printable;
use super::signers::Signers;
use super::{ChangeArgs, Out};
use crate::config::Layers;
use crate::error::{Code, Error, Result};
use crate::format::{SIGNATURE_LEN, SignatureObject, manifest_message, names};
use crate::keys::{ModelSelector, Resolved, Role, Signer, Wanted};
use crate::reading::Reading;
use crate::refuse;
use crate::seal::create;

/// Add a publisher signature to a version that is stored already.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct SignArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME@VERSION, or NAME with --manifest
    model: String,
    /// The publisher key; give it again for more [default: ~/.config/modelfs/signing.key]
    #[arg(long, value_name = "SIGNER")]
    sign: Vec<String>,
    #[command(flatten)]
    pub access: ChangeArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs sign s3://models/prod acme/llama@7 --sign second.key --trust-file trust.conf
  modelfs sign /srv/models acme/llama --manifest sha256:9b97... --sign second.key \\
      --trust first.pub

For trust files that ask for several publishers: the second one looks at the version (`modelfs inspect`, `modelfs \
verify`), then signs the same manifest. One publisher trusted here must have signed it before. With --key the file list is \
opened first, so that what is signed is known to be a whole model. Signing twice changes nothing.

SIGNER is a key file, or vault-transit:MOUNT/KEY for an Ed25519 key in Vault.";

pub fn run(args: &SignArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let reading = reading(&args.store, &layers)?;
    // A tag may move between the look and the signature.
    let selector: ModelSelector = args.model.parse()?;
    if reading.access.manifest.is_none() && !matches!(selector.wanted, Wanted::Version(_)) {
        refuse!(Usage, "say which version is signed: {}@7, or --manifest sha256:...", selector.name);
    }
    if !reading.trust().covers(&selector.name) {
        refuse!(
            NoTrust,
            "no key is trusted for {}; give --trust KEY of the publisher who signed first, or --trust-file",
            selector.name
        );
    }
    let signers = Signers::new(&reading.access).publishers(&args.sign)?;
    let runtime = runtime()?;
    let resolved = runtime.block_on(reading.resolve_below_threshold(&args.model))?;
    if !reading.access.keys.is_empty() {
        reading.unlock(&resolved)?;
    }
    let trusted = reading.trust().keys(&resolved.name, Role::Publisher);
    let wanted = reading.trust().threshold(&resolved.name, Role::Publisher) as usize;
    let mut held: Vec<_> = resolved.signed_by.clone();
    let mut added = Vec::new();
    for signer in &signers {
        let public = signer.public();
        let new = runtime.block_on(add(&reading, &resolved, &**signer))?;
        if trusted.contains(&public) {
            held.push(public.key_id());
        } else {
            out.hint(format!("note: {public} is not a publisher key of {} in the trust given here", resolved.name));
        }
        added.push(json!({"public_key": public.to_string(), "already": !new}));
    }
    held.sort_unstable();
    held.dedup();
    let missing = wanted.saturating_sub(held.len());
    let value = json!({
        "store": reading.url.to_string(), "model": resolved.name, "version": resolved.header.seq,
        "manifest": format!("sha256:{}", resolved.digest), "signed": added,
        "publishers": held.len(), "publishers_wanted": wanted,
    });
    out.result(&value, || {
        let (name, version) = (printable(&resolved.name), resolved.header.seq);
        let rest = match missing {
            0 => String::new(),
            _ => format!("; {missing} more must sign before readers with this trust accept it"),
        };
        format!("signed {name} version {version}: {} of {wanted} trusted publishers{rest}", held.len())
    })
}

/// Writes the signature and the public key. Says whether it was not there before.
async fn add(reading: &Reading, resolved: &Resolved, signer: &dyn Signer) -> Result<bool> {
    let (store, model, digest, key) = (&*reading.store, resolved.model_id, resolved.digest, signer.public());
    let name = names::signature(model, digest, key.key_id());
    let message = manifest_message(digest, model, resolved.header.seq);
    match store.read_small(&name, SIGNATURE_LEN as u64).await {
        Ok(bytes) => {
            let there = SignatureObject::parse(&bytes)?;
            if there.key_id != key.key_id()
                || there.manifest_digest != digest
                || !key.verify_strict(&message, &there.signature)
            {
                refuse!(ManSig, "{name} is there and does not verify under {key}; delete it, then sign again");
            }
            return Ok(false);
        }
        Err(missing) if missing.code() == Code::NotFound => {}
        Err(other) => return Err(other),
    }
    // May ask a server: the caller's thread waits for it anyway.
    let signature = tokio::task::block_in_place(|| signer.sign(&message))?;
    let object = SignatureObject { key_id: key.key_id(), manifest_digest: digest, signature };
    create(store, &names::public_key(model, key.key_id()), Bytes::copy_from_slice(key.bytes())).await?;
    let made = create(store, &name, Bytes::copy_from_slice(&object.encode())).await;
    made.map_err(|e: Error| e.context(format!("cannot add the signature of {key}")))?;
    Ok(true)
}
