//! `modelfs rollback`: an earlier version, by a new ref.

use clap::Args;

use super::access::{reading, runtime};
use super::tag::{OrderArgs, releaser, tell};
use super::{ChangeArgs, Out};
use crate::config::Layers;
use crate::error::Result;
use crate::format::{check_channel, check_model_name};
use crate::keys::DEFAULT_CHANNEL;
use crate::versions::Mover;

/// Make a tag name an earlier version again, by a new signed ref.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RollbackArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// The NAME of the model
    model: String,
    /// The version to go back to, as `modelfs ls STORE MODEL` numbers them
    #[arg(long, value_name = "VERSION")]
    to: u64,
    /// The tag that goes back
    #[arg(long, visible_alias = "channel", value_name = "TAG", default_value = DEFAULT_CHANNEL)]
    tag: String,
    #[command(flatten)]
    order: OrderArgs,
    #[command(flatten)]
    pub access: ChangeArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs rollback s3://models/prod acme/llama --to 2
  modelfs rollback s3://models/prod acme/llama --to 2 --tag prod --sign release.key \\
      --trust publisher.pub

The ref is new and has the next number, so readers who remember the newer version follow it: nothing on the store goes \
back. A version that was withdrawn is refused (BELOW_FLOOR). Running it again changes nothing.";

pub fn run(args: &RollbackArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    check_model_name(&args.model).map_err(|e| e.context("MODEL of rollback is a bare name; the version is --to"))?;
    check_channel(&args.tag)?;
    let order = args.order.order(&args.tag)?;
    let mut reading = reading(&args.store, &layers)?;
    let signers = args.order.signers(&reading.access)?;
    let releaser = releaser(&mut reading, &args.model, signers)?;
    let mover = Mover { resolver: reading.resolver(), releaser };
    let moved = runtime()?.block_on(mover.rollback(args.to, &order))?;
    tell(&reading, &args.model, &order, &moved, out)
}
