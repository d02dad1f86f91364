//! OpenSSF model-signing bundles for `seal` and `verify`: finds the bundle and the key, hands over digests.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::access::Opened;
use super::{Out, plain};
use crate::error::{Code, Error, Result};
use crate::oms::{BUNDLE_BYTES_MAX, BUNDLE_NAME, Endorsement, SealedFile, ShardHasher, Signed, Vouched};
use crate::reading::Reading;
use crate::{oms, refuse};

/// Chunks fetched and opened ahead.
const AHEAD: usize = 4;

/// The bundle that must vouch for `source`: the one named, or `model.sig` of the folder where a key is given.
pub fn for_seal(source: &Path, bundle: Option<&Path>, key: Option<&Path>, out: &Out) -> Result<Option<Endorsement>> {
    let usual = source.join(BUNDLE_NAME);
    let Some(key) = key else {
        if let Some(bundle) = bundle {
            refuse!(Usage, "--oms {} needs --oms-key PUBLIC.pem, the key of who signed it", bundle.display());
        }
        if usual.is_file() {
            out.hint(format!("note: {} is sealed unchecked; --oms-key PUBLIC.pem checks it", usual.display()));
        }
        return Ok(None);
    };
    let path: PathBuf = bundle.map_or(usual, Path::to_owned);
    let bundle_path = within(source, &path)?;
    let signed = Signed::verify(&oms::read_bundle(&path)?, &oms::load_key(key)?)
        .map_err(|e| e.context(format!("{} is refused; nothing was published", path.display())))?;
    Ok(Some(Endorsement { signed: signed.into(), bundle_path }))
}

/// The bundle as the model will call it: it ships with the files it vouches for.
fn within(source: &Path, path: &Path) -> Result<String> {
    let real = |path: &Path| {
        let fault = |e| Error::new(Code::Usage, format!("cannot read {}", path.display())).with_source(e);
        path.canonicalize().map_err(fault)
    };
    let (folder, bundle) = (real(source)?, real(path)?);
    match bundle.strip_prefix(&folder).ok().and_then(Path::to_str) {
        Some(name) if !name.is_empty() => Ok(name.to_owned()),
        Some(_) | None => refuse!(
            Usage,
            "the bundle {} lies outside {}; copy it to {}, so that it is sealed with the model",
            path.display(),
            source.display(),
            source.join(BUNDLE_NAME).display()
        ),
    }
}

/// Whether the bundle at `bundle_path` of the sealed model vouches for what its manifest signs.
///
/// # Errors
/// `OMS`; `NOT_FOUND` if there is no such file; what reading the store says.
pub async fn check(reading: &Reading, opened: &Opened, bundle_path: &str, key: &Path) -> Result<Vouched> {
    let key = oms::load_key(key)?;
    let manifest = &opened.manifest;
    let Some(number) = manifest.find(bundle_path) else {
        refuse!(NotFound, "the model has no file {bundle_path}; name its bundle with --oms=PATH");
    };
    if manifest.files()[number].size > BUNDLE_BYTES_MAX {
        refuse!(Oms, "{bundle_path} is longer than {BUNDLE_BYTES_MAX} bytes");
    }
    let mut bundle = Vec::new();
    read(reading, opened, number, |bytes| bundle.extend_from_slice(bytes)).await?;
    let signed = Signed::verify(&bundle, &key).map_err(|e| e.context(format!("{bundle_path} is refused")))?;
    let sealed = |file| SealedFile { path: manifest.path(file), size: file.size, sha256: file.sha256 };
    let files: Vec<SealedFile<'_>> = manifest.files().iter().map(sealed).collect();
    let mut shards = HashMap::new();
    for number in signed.in_shards(&files) {
        let mut hasher = ShardHasher::new(signed.shard_bytes().expect("only bundles with shards have files in shards"));
        read(reading, opened, number, |bytes| hasher.update(bytes)).await?;
        let (whole, digests) = hasher.finish();
        if whole != files[number].sha256 {
            refuse!(FileHash, "{} does not have its signed SHA-256", files[number].path);
        }
        shards.insert(number, digests);
    }
    signed.check(&files, bundle_path, &shards)
}

async fn read(reading: &Reading, opened: &Opened, number: usize, mut take: impl FnMut(&[u8])) -> Result<()> {
    let jobs = plain::jobs(&opened.manifest, &[number]);
    plain::each_chunk(reading.store.clone(), opened, jobs, AHEAD, |job, slot| {
        let slot = slot?;
        for (_, part) in job.parts {
            take(&slot[part]);
        }
        Ok(())
    })
    .await
}
