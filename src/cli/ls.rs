//! `modelfs ls`: what a store says it holds. Nothing here is verified; that needs a trusted key.

use std::collections::BTreeMap;

use clap::Args;
use futures::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use serde_json::json;

use super::access::runtime;
use super::out::{printable, table};
use super::{Out, StoreArgs};
use crate::config::units::{show_size, show_time};
use crate::config::{Access, Layers, parse_store};
use crate::error::{Code, Result};
use crate::format::limits::MODEL_NAME_BYTES_MAX;
use crate::format::{MANIFEST_HEADER_LEN, ManifestDigest, ManifestHeader, ModelId, Ref, check_model_name, names};
use crate::store::{self, ChunkSource, Listed};

/// List the models of a store, or the versions of one; as the store says it, unverified.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct LsArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// Only this model, with its versions
    model: Option<String>,
    #[command(flatten)]
    access: StoreArgs,
}

const EXAMPLES: &str = "\
Examples:
  modelfs ls s3://models/prod
  modelfs ls s3://models/prod acme/llama
  modelfs ls /srv/models --json | jq -r '.models[].name'

Needs no key, and believes none: what is listed is what the store says. `inspect` and `verify` check signatures.
A model sealed with --hide-name shows its id only; give its NAME to see more.";

/// Requests in flight; each model is one listing and a few small reads.
const IN_FLIGHT: usize = 16;
/// Longest ref: 256 B and four signatures.
const REF_BYTES_MAX: u64 = 656;

#[derive(Debug, Serialize)]
struct Model {
    /// None: hidden, or not believed because it does not hash to `id`.
    name: Option<String>,
    id: ModelId,
    tags: BTreeMap<String, Tag>,
    versions: usize,
    data_objects: usize,
    /// Ciphertext of all versions.
    data_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Tag {
    version: u64,
    ref_seq: u64,
    manifest: ManifestDigest,
    issued_at: i64,
    /// None: never.
    expires_at: Option<i64>,
}

#[derive(Debug, Serialize)]
struct Version {
    version: u64,
    manifest: ManifestDigest,
    created_at: i64,
    cipher: &'static str,
    chunk_hash: &'static str,
    previous: Option<ManifestDigest>,
    tags: Vec<String>,
    signed_by: Vec<String>,
}

pub fn run(args: &LsArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let url = parse_store(&args.store)?;
    let access = Access::from_layers(&layers)?;
    let source = store::open(&url, &access.store)?;
    runtime()?.block_on(async {
        match &args.model {
            Some(name) => show_model(&*source, name, out).await,
            None => show_store(&*source, out).await,
        }
    })
}

async fn show_store(source: &dyn ChunkSource, out: &Out) -> Result<()> {
    let ids: Vec<ModelId> = source.list_dirs("").await?.iter().filter_map(|dir| names::model_id(dir)).collect();
    let mut models: Vec<Model> =
        stream::iter(ids).map(|id| read_model(source, id)).buffer_unordered(IN_FLIGHT).try_collect().await?;
    models.sort_by(|a, b| (a.name.is_none(), &a.name, a.id).cmp(&(b.name.is_none(), &b.name, b.id)));
    out.result(&json!({"store": source.describe(), "models": models}), || {
        if models.is_empty() {
            return format!("no models in {}", source.describe());
        }
        let rows: Vec<Vec<String>> = models
            .iter()
            .map(|model| {
                let name = model.name.clone().unwrap_or_else(|| format!("(hidden) {}", model.id));
                let tags: Vec<String> = model.tags.iter().map(|(tag, at)| format!("{tag}={}", at.version)).collect();
                vec![printable(&name), model.versions.to_string(), tags.join(" "), show_size(model.data_bytes)]
            })
            .collect();
        table(&["model", "versions", "tags", "stored"], &[false, true, false, true], &rows)
    })
}

async fn read_model(source: &dyn ChunkSource, id: ModelId) -> Result<Model> {
    let listed = source.list(&names::model_dir(id)).await?;
    let name = read_name(source, id, &listed).await?;
    let below = |dir: &str| listed.iter().filter(|object| object.name.starts_with(dir)).collect::<Vec<_>>();
    let data = below(&names::data_dir(id));
    Ok(Model {
        name,
        id,
        tags: read_tags(source, id, &listed).await?,
        versions: below(&names::manifests_dir(id)).iter().filter(|o| names::manifest_digest(&o.name).is_some()).count(),
        data_objects: data.len(),
        data_bytes: data.iter().map(|object| object.size).fold(0, u64::saturating_add),
    })
}

async fn read_name(source: &dyn ChunkSource, id: ModelId, listed: &[Listed]) -> Result<Option<String>> {
    let object = names::model_name(id);
    if !listed.iter().any(|listed| listed.name == object) {
        return Ok(None);
    }
    match source.read_small(&object, MODEL_NAME_BYTES_MAX as u64).await {
        Ok(bytes) => Ok(names::believed_name(id, &bytes).map(str::to_string)),
        Err(e) if matches!(e.code(), Code::Limit | Code::NotFound) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The newest ref of each channel, if it is one at all.
async fn read_tags(source: &dyn ChunkSource, id: ModelId, listed: &[Listed]) -> Result<BTreeMap<String, Tag>> {
    let refs_dir = names::refs_dir(id);
    let mut newest: BTreeMap<&str, (u64, &str)> = BTreeMap::new();
    for object in listed {
        let Some((channel, _)) = object.name.strip_prefix(&refs_dir).and_then(|rest| rest.split_once('/')) else {
            continue;
        };
        if let Some(seq) = names::ref_seq(&object.name) {
            let best = newest.entry(channel).or_insert((0, ""));
            *best = (*best).max((seq, object.name.as_str()));
        }
    }
    let mut tags = BTreeMap::new();
    for (channel, (_, object)) in newest {
        let parsed = match source.read_small(object, REF_BYTES_MAX).await {
            Ok(bytes) => Ref::parse(&bytes),
            Err(e) => Err(e),
        };
        match parsed {
            Ok((head, _)) => {
                let expires_at = (head.expires_at != i64::MAX).then_some(head.expires_at);
                let (version, ref_seq, manifest) = (head.seq, head.ref_seq, head.manifest_digest);
                tags.insert(
                    channel.to_string(),
                    Tag { version, ref_seq, manifest, issued_at: head.issued_at, expires_at },
                );
            }
            Err(e) if e.class() == crate::error::Class::Unreachable => return Err(e),
            Err(e) => tracing::warn!(object, error = %e.chain(), "a ref cannot be read"),
        }
    }
    Ok(tags)
}

async fn show_model(source: &dyn ChunkSource, name: &str, out: &Out) -> Result<()> {
    check_model_name(name).map_err(|e| e.context("MODEL of ls is a bare name"))?;
    let id = ModelId::of_name(name);
    let listed = source.list(&names::model_dir(id)).await?;
    if listed.is_empty() {
        return Err(crate::error::Error::new(Code::NotFound, format!("no model {name} in {}", source.describe())));
    }
    let tags = read_tags(source, id, &listed).await?;
    let digests: Vec<ManifestDigest> = listed
        .iter()
        .filter(|object| object.name.starts_with(&names::manifests_dir(id)))
        .filter_map(|object| names::manifest_digest(&object.name))
        .collect();
    let mut versions: Vec<Version> = stream::iter(digests)
        .map(|digest| read_version(source, id, digest, &listed, &tags))
        .buffer_unordered(IN_FLIGHT)
        .filter_map(|version| async { version.transpose() })
        .try_collect()
        .await?;
    versions.sort_by_key(|version| (version.version, version.manifest));
    let data = listed.iter().filter(|object| object.name.starts_with(&names::data_dir(id)));
    let (objects, bytes) = data.fold((0usize, 0u64), |(n, sum), object| (n + 1, sum.saturating_add(object.size)));
    let value = json!({
        "store": source.describe(), "name": name, "id": id, "tags": tags, "versions": versions,
        "data_objects": objects, "data_bytes": bytes,
    });
    out.result(&value, || {
        let rows: Vec<Vec<String>> = versions
            .iter()
            .map(|version| {
                vec![
                    version.version.to_string(),
                    show_time(version.created_at),
                    version.tags.join(" "),
                    version.cipher.to_string(),
                    version.signed_by.len().to_string(),
                    format!("sha256:{}", version.manifest),
                ]
            })
            .collect();
        let header = ["version", "made", "tags", "cipher", "signatures", "manifest"];
        let mut text = table(&header, &[true, false, false, false, true, false], &rows);
        text.push_str(&format!("{objects} data objects, {} stored for all versions\n", show_size(bytes)));
        text
    })
}

/// None for an object in the place of a manifest that is none.
async fn read_version(
    source: &dyn ChunkSource,
    id: ModelId,
    digest: ManifestDigest,
    listed: &[Listed],
    tags: &BTreeMap<String, Tag>,
) -> Result<Option<Version>> {
    let object = names::manifest(id, digest);
    let header = match source.read_range(&object, 0..MANIFEST_HEADER_LEN as u64).await {
        Ok(pieces) => ManifestHeader::parse(&pieces.concat()),
        Err(e) => Err(e),
    };
    let header = match header {
        Ok(header) if header.model_id == id => header,
        Ok(_) => {
            tracing::warn!(object, "a manifest of another model lies here");
            return Ok(None);
        }
        Err(e) if e.class() == crate::error::Class::Unreachable => return Err(e),
        Err(e) => {
            tracing::warn!(object, error = %e.chain(), "a manifest cannot be read");
            return Ok(None);
        }
    };
    let signatures = names::signatures_dir(id, digest);
    let tags = tags.iter().filter(|(_, tag)| tag.manifest == digest).map(|(name, _)| name.clone()).collect();
    Ok(Some(Version {
        version: header.seq,
        manifest: digest,
        created_at: header.created_at,
        cipher: header.suite.name(),
        chunk_hash: header.hash_alg.name(),
        previous: header.previous,
        tags,
        signed_by: listed
            .iter()
            .filter(|object| object.name.starts_with(&signatures))
            .filter_map(|object| names::key_id(&object.name))
            .map(|key| key.to_string())
            .collect(),
    }))
}
