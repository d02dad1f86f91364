//! `modelfs cat`.

use std::io::Write;

use clap::Args;

use super::access::{Opened, reading, runtime};
use super::{AccessArgs, Out, plain};
use crate::config::Layers;
use crate::crypto::FileHasher;
use crate::error::{Code, Error, Result};

/// Write one file to standard output, every chunk verified before a byte of it is written.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CatArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME, NAME@TAG or NAME@VERSION
    model: String,
    /// The file within the model
    path: String,
    #[command(flatten)]
    access: AccessArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs cat s3://models/prod acme/llama config.json --key file:llama.key \\
      --trust signing.pub | jq .
  modelfs cat /srv/models acme/llama@3 model.safetensors --key file:k \\
      --trust signing.pub > model.safetensors

The SHA-256 of the whole file is checked at the end: an exit code other than 0 means that what was written is not the \
whole file.";

/// Chunks fetched and opened ahead of the one being written.
const AHEAD: usize = 4;

pub fn run(args: &CatArgs, mut layers: Layers, _out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let reading = reading(&args.store, &layers)?;
    reading.access.need_keys()?;
    let runtime = runtime()?;
    let resolved = runtime.block_on(reading.resolve(&args.model))?;
    let opened = Opened::unlock(&reading, &resolved)?;
    let manifest = std::sync::Arc::clone(&opened.manifest);
    let number = manifest.find(&args.path).ok_or_else(|| {
        Error::new(Code::NotFound, format!("no file {} in {}; `modelfs inspect` lists them", args.path, resolved.name))
    })?;
    let mut hasher = FileHasher::new();
    let mut stdout = std::io::stdout().lock();
    let broken = |e| Error::new(Code::Host, "cannot write to standard output").with_source(e);
    runtime.block_on(plain::each_chunk(
        reading.store.clone(),
        &opened,
        plain::jobs(&manifest, &[number]),
        AHEAD,
        |job, slot| {
            let slot = slot.map_err(|e| e.context(format!("cannot read {}", args.path)))?;
            for (_, part) in job.parts {
                hasher.update(&slot[part.clone()]);
                stdout.write_all(&slot[part]).map_err(broken)?;
            }
            Ok(())
        },
    ))?;
    stdout.flush().map_err(broken)?;
    if hasher.finish() != manifest.files()[number].sha256 {
        return Err(Error::new(Code::FileHash, format!("{} does not have its signed SHA-256", args.path)));
    }
    Ok(())
}
