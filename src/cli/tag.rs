//! `modelfs tag`: what a tag names, and until when.

use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::access::{Reading, reading, runtime};
use super::seal::expiry;
use super::signers::Signers;
use super::{ChangeArgs, Out};
use crate::config::{Access, Layers};
use crate::error::{Error, Result};
use crate::format::{ModelId, check_channel};
use crate::keys::{ModelSelector, Role, Roles, Signer, Wanted, unix_now};
use crate::refuse;
use crate::seal::{Chain, Releaser};
use crate::units::show_time;
use crate::versions::{Expires, MoveOrder, Moved, Mover};

/// Make a tag name a version, by a new signed ref; readers see it at their next mount.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TagArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME@VERSION, NAME@OTHER_TAG or NAME@best:METRIC:min; with --refresh the bare NAME
    model: String,
    /// The tag to move or make: `latest`, `prod`, ...
    tag: String,
    /// Sign what the tag names already once more, so that it expires later
    #[arg(long, conflicts_with = "min_version")]
    refresh: bool,
    #[command(flatten)]
    order: OrderArgs,
    #[command(flatten)]
    pub access: ChangeArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs tag s3://models/prod acme/llama@3 prod
  modelfs tag s3://models/prod acme/llama@staging prod --sign release.key --trust publisher.pub
  modelfs tag s3://models/prod acme/llama prod --refresh --expires 90d   once a day
  modelfs tag s3://models/prod acme/llama@7 latest --min-version 7   withdraws versions 1 to 6

The version is verified as a reader would verify it. A version that was withdrawn under any tag is named under none.
Running it again changes nothing.";

/// What the next ref says beside the version, and who signs it.
#[derive(Debug, Args)]
pub struct OrderArgs {
    /// Readers refuse new mounts after this time, as in 90d, or `never` [default: as long as the ref before; else never]
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Withdraw every version below this one: no reader who sees the new ref serves them again
    #[arg(long, value_name = "VERSION")]
    min_version: Option<u64>,
    /// The release key, which readers trust to sign refs: a file, or vault-transit:MOUNT/KEY; again for more, up to 4
    /// [default: ~/.config/modelfs/signing.key]
    #[arg(long, value_name = "KEY")]
    sign: Vec<String>,
}

pub fn run(args: &TagArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    check_channel(&args.tag)?;
    let order = args.order.order(&args.tag)?;
    let selector: ModelSelector = args.model.parse()?;
    if args.refresh && selector.wanted != Wanted::Newest {
        refuse!(Usage, "--refresh signs what the tag names; write {} instead of {selector}", selector.name);
    }
    let mut reading = reading(&args.store, &layers)?;
    let signers = args.order.signers(&reading.access)?;
    let releaser = releaser(&mut reading, &selector.name, signers)?;
    let moved = runtime()?.block_on(async {
        let mover = Mover { resolver: reading.resolver(), releaser };
        if args.refresh {
            return mover.refresh(&order.channel, order.expires).await;
        }
        let wanted = match &selector.wanted {
            // Found with the keys, then named by its number.
            Wanted::Best { .. } => Wanted::Version(reading.resolve(&args.model).await?.header.seq),
            other => other.clone(),
        };
        mover.tag(&wanted, &order).await
    })?;
    tell(&reading, &selector.name, &order, &moved, out)
}

impl OrderArgs {
    pub fn order(&self, channel: &str) -> Result<MoveOrder> {
        let expires = match self.expires.as_deref() {
            None => Expires::AsBefore,
            Some("never") => Expires::At(i64::MAX),
            Some(text) => Expires::At(expiry(text)?),
        };
        Ok(MoveOrder { channel: channel.to_owned(), expires, min_version_seq: self.min_version })
    }

    pub fn signers(&self, access: &Access) -> Result<Vec<Arc<dyn Signer>>> {
        Signers::new(access).releasers(&self.sign, "--sign")
    }
}

/// Whoever moves tags of `model`: the keys named, beside those the layers trust.
///
/// # Errors
/// `USAGE` for a pinned digest, which no tag has a use for, and for fewer keys than readers want.
pub fn releaser(reading: &mut Reading, model: &str, signers: Vec<Arc<dyn Signer>>) -> Result<Releaser> {
    if reading.access.manifest.is_some() {
        refuse!(Usage, "--manifest names a version by its digest, a tag is moved by number; drop --manifest");
    }
    let wanted = u64::from(reading.trust().threshold(model, Role::Release));
    if (signers.len() as u64) < wanted {
        refuse!(
            Usage,
            "refs of {model} need {wanted} signatures by the trust file, {} are given; give --sign again",
            signers.len()
        );
    }
    // Alone, our key is the publisher's too, as after a first seal.
    let publisher = reading.trust().keys(model, Role::Publisher).is_empty();
    for signer in &signers {
        reading.trust_own(signer.public(), Roles { publisher, release: true });
    }
    let chain = Chain {
        store: Arc::clone(&reading.store),
        model_id: ModelId::of_name(model),
        model_name: Arc::from(model),
        trusted: Arc::new(reading.trust().keys(model, Role::Release)),
        publishers: Arc::new(reading.trust().keys(model, Role::Publisher)),
        floors: Some(reading.floors().clone()),
    };
    Ok(Releaser { chain, signers, now: unix_now() })
}

/// # Errors
/// Why the floor was not raised, if that is what was ordered: then the result is printed all the same.
pub fn tell(reading: &Reading, model: &str, order: &MoveOrder, moved: &Moved, out: &Out) -> Result<()> {
    let tag = &order.channel;
    let head = &moved.reference;
    let expires_at = (head.expires_at != i64::MAX).then_some(head.expires_at);
    let before = moved.before.map(|before| json!({"version": before.seq, "ref_seq": before.ref_seq}));
    let withdrawn: Vec<Value> =
        moved.withdrawn.iter().map(|(tag, version)| json!({"tag": tag, "version": version})).collect();
    let value = json!({
        "store": reading.url.to_string(), "model": model, "tag": tag, "version": head.seq,
        "manifest": format!("sha256:{}", head.manifest_digest), "ref_seq": head.ref_seq, "issued_at": head.issued_at,
        "expires_at": expires_at, "min_version": head.min_version_seq, "written": moved.written, "before": before,
        "withdrawn": withdrawn, "floor_raised": moved.unraised.is_none(),
        "warnings": moved.unraised.iter().map(Error::chain).collect::<Vec<String>>(),
    });
    if let Some(failed) = &moved.unraised {
        out.hint(format!("warning: {}", failed.chain()));
    }
    for (other, version) in &moved.withdrawn {
        out.hint(format!(
            "warning: tag {other} still names version {version}, which is withdrawn now: its readers should get another; \
             move it with `modelfs tag {} {model}@{} {other} --min-version {}`",
            reading.url, head.seq, head.min_version_seq
        ));
    }
    out.result(&value, || {
        if out.quiet {
            return format!("{model}@{} sha256:{}", head.seq, head.manifest_digest);
        }
        let until = expires_at.map_or("never expires".to_owned(), |at| format!("expires {}", show_time(at)));
        let now = match (moved.written, moved.before) {
            (false, _) => format!("is version {} already, nothing to do", head.seq),
            (true, Some(before)) if before.seq == head.seq => format!("is version {}, signed again", head.seq),
            (true, Some(before)) => format!("is version {} now, was {}", head.seq, before.seq),
            (true, None) => format!("is version {} now, and new", head.seq),
        };
        format!("{model}@{tag} {now} (ref {}, {until})", head.ref_seq)
    })?;
    match &moved.unraised {
        Some(failed) if order.min_version_seq.is_some() => Err(failed.clone()),
        Some(_) | None => Ok(()),
    }
}
