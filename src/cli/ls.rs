//! `modelfs ls`: what a store says it holds. Nothing here is verified; that needs a trusted key.

use std::collections::BTreeMap;

use clap::Args;
use futures::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use serde_json::json;

use super::access::runtime;
use super::out::{printable, table};
use super::{Out, StoreArgs};
use crate::catalog::{self, CatalogAt, Records};
use crate::config::{Access, Layers};
use crate::error::{Code, Result};
use crate::format::limits::MODEL_NAME_BYTES_MAX;
use crate::format::{MANIFEST_HEADER_LEN, ManifestDigest, ManifestHeader, ModelId, Ref, check_model_name, names};
use crate::reading;
use crate::store::{self, ChunkSource, Listed, StoreUrl};
use crate::units::{show_size, show_time};

/// List the models of a store, or the versions of one; as the store says it, unverified.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct LsArgs {
    /// file:///srv/models, a plain path, s3://bucket/prefix, or a catalog: vault-kv://MOUNT/PATH
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
  modelfs ls vault-kv://secret/models
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
    /// By its name: what `seal --variant` calls NAME+VARIANT.
    variant_of: Option<String>,
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
    let url = layers.store(&args.store)?;
    let mut access = Access::from_layers(&layers)?;
    let vault = reading::connect(&mut access)?;
    if matches!(url, StoreUrl::VaultKv { .. }) {
        let at = CatalogAt::try_from(&url)?;
        return show_catalog(&*catalog::records(vault.as_ref())?, &at, args.model.as_deref(), out);
    }
    let source = store::open(&url, &access.store)?;
    runtime()?.block_on(async {
        match &args.model {
            Some(name) => show_model(&*source, name, out).await,
            None => show_store(&*source, out).await,
        }
    })
}

/// One record of a catalog, as it stands there: what it names was not looked at.
#[derive(Debug, Serialize)]
struct Entry {
    name: String,
    store: Option<String>,
    model_id: Option<ModelId>,
    manifest: Option<ManifestDigest>,
    bytes: Option<u64>,
    /// What opens it: raw or vault-transit. Never the key.
    key: Option<&'static str>,
    record_version: Option<u32>,
    /// Why it cannot be mounted.
    trouble: Option<String>,
}

fn show_catalog(records: &dyn Records, at: &CatalogAt, only: Option<&str>, out: &Out) -> Result<()> {
    let names = match only {
        Some(name) => vec![name.to_owned()],
        None => catalog::names(records, at)?,
    };
    let bar = out.progress(names.len() as u64, "records");
    let mut entries = Vec::new();
    for name in names {
        bar.inc(1);
        let record = match catalog::read(records, at, &name) {
            // The record is the trouble, not Vault: the others are listed.
            Err(error) if matches!(error.code(), Code::Catalog) || only.is_none() && error.code() == Code::NotFound => {
                let trouble = Some(error.chain());
                let none = (None, None, None, None, None, None);
                let (store, model_id, manifest, bytes, key, record_version) = none;
                entries.push(Entry { name, store, model_id, manifest, bytes, key, record_version, trouble });
                continue;
            }
            other => other?,
        };
        entries.push(Entry {
            name,
            store: Some(record.store.to_string()),
            model_id: Some(record.model_id),
            manifest: Some(record.manifest),
            bytes: Some(record.size_bytes),
            key: Some(record.key.kind()),
            record_version: Some(record.version),
            trouble: None,
        });
    }
    bar.finish_and_clear();
    out.result(&json!({"catalog": at.to_string(), "models": entries}), || {
        let rows: Vec<Vec<String>> = entries
            .iter()
            .map(|entry| match (&entry.trouble, &entry.store, entry.manifest, entry.bytes) {
                (None, Some(store), Some(manifest), Some(bytes)) => vec![
                    printable(&entry.name),
                    show_size(bytes),
                    entry.key.unwrap_or_default().to_owned(),
                    store.clone(),
                    format!("sha256:{manifest}"),
                ],
                (trouble, ..) => {
                    let why = trouble.as_deref().unwrap_or_default();
                    vec![printable(&entry.name), "-".into(), "-".into(), printable(why), "-".into()]
                }
            })
            .collect();
        table(&["model", "size", "key", "store", "manifest"], &[false, true, false, false, false], &rows)
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
        variant_of: name.as_deref().and_then(|name| name.rsplit_once('+')).map(|(of, _)| of.to_owned()),
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
