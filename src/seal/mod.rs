//! Seals a folder into a store: encrypts, describes, signs, publishes; the only writer of the format.
//!
//! ```text
//!  source ──walk──plan──> upload (read, hash, encrypt, write) ──> publish (slots, manifest, signature, check, ref)
//!                  └ what the earlier version already has is inherited, not uploaded
//! ```
//! In: a folder of plaintext, a store, keys. Out: a version that a channel names, or an error and a store that serves what
//! it served before. Promises: plaintext never reaches the store, whatever fails; an object id is never used twice; bounded
//! memory whatever the size of the model; a killed seal is repaired by running it again.
//! Not here: where keys come from (`keys`), how a store is written (`store`), the bars (`cli`).
//! Spec: docs/FORMAT.md b.1. Held by: the tests below, tests/seal.rs.

mod chain;
mod coding;
mod keys;
mod plan;
mod progress;
mod publish;
mod release;
mod source;
mod upload;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

pub use chain::{Chain, Earlier, Survey};
pub use coding::CodecChoice;
pub(crate) use coding::Coding;
pub use keys::{SlotKeys, SlotTarget};
pub use plan::{Cuts, PACK_BYTES_MAX, SMALL_FILE_BYTES};
pub(crate) use progress::Meter;
pub use progress::{Phase, Progress, ProgressFn};
pub use publish::create;
pub(crate) use publish::{Published, Publisher, Terms};
pub use release::{Appended, RefTarget, Releaser};
use source::{SourceFile, SourceTree};
use upload::{JobDone, Pipeline};

use crate::crypto::{Dek, FileHasher, PublicKey};
use crate::error::{Class, Code, Error, Result};
use crate::format::limits::{
    ANNOTATIONS_BYTES_MAX, BLOCK_LOG2_DEFAULT, CHUNK_LOG2_DEFAULT, HASHES_MAX, REF_SIGNATURES_MAX,
};
use crate::format::{
    Extent, HashAlg, Lease, Manifest, ManifestBuilder, ManifestDigest, ModelId, NewFile, NewHeader, NewObject,
    ObjectEntry, ObjectLayout, Oid, Suite, Vid, check_channel, check_model_name, names,
};
use crate::keys::{FloorStore, Signer};
use crate::mem::Secret;
use crate::oms::{Endorsement, SealedFile, Vouched};
use crate::policy::types::{self, Admits};
use crate::refuse;
use crate::store::ChunkSink;

/// The channel every new version is published in.
pub const LATEST: &str = "latest";

/// How a folder is sealed.
pub struct SealOptions {
    pub suite: Suite,
    pub hash_alg: HashAlg,
    pub block_log2: u8,
    pub chunk_log2: u8,
    pub codec: CodecChoice,
    pub cuts: Cuts,
    /// Wraps the new data key, and opens the earlier version so that it can be inherited from.
    pub keys: Arc<dyn SlotKeys>,
    /// The publisher key: signs the manifest, and the refs where there is no release key.
    pub signing: Arc<dyn Signer>,
    /// Publisher keys beside it, each of which signs the manifest too.
    pub cosigning: Vec<Arc<dyn Signer>>,
    /// The release keys, up to 4. Empty: `signing` signs the refs.
    pub releasing: Vec<Arc<dyn Signer>>,
    /// Release keys whose refs may be continued, beside ours.
    pub trusted: Vec<PublicKey>,
    /// Publishers whose versions may be inherited from, beside ourselves.
    pub trusted_publishers: Vec<PublicKey>,
    /// Channels beside `latest`.
    pub tags: Vec<String>,
    /// Unix seconds; `None`: the ref never expires.
    pub expires_at: Option<i64>,
    /// What this machine remembers of the channels: a store that went back is not built upon, and what is published is
    /// remembered. `None` remembers nothing.
    pub floors: Option<FloorStore>,
    pub hide_name: bool,
    /// `NAME@best:METRIC` looks at these.
    pub metrics: BTreeMap<String, f64>,
    /// JSON for people, kept inside the encrypted manifest.
    pub annotations: serde_json::Map<String, serde_json::Value>,
    /// How large a model may be, and which types of files it may hold: refused before anything is stored.
    pub admits: Admits,
    /// A bundle that must vouch for exactly what was sealed; else nothing is published.
    pub oms: Option<Endorsement>,
    pub threads: usize,
    pub progress: ProgressFn,
}

impl SealOptions {
    /// AES-256-GCM, BLAKE3, 64 KiB blocks, 8 MiB chunks coded where it wins, `latest`, all cores.
    pub fn new(keys: Arc<dyn SlotKeys>, signing: Arc<dyn Signer>) -> SealOptions {
        SealOptions {
            suite: Suite::Aes256Gcm,
            hash_alg: HashAlg::Blake3,
            block_log2: BLOCK_LOG2_DEFAULT,
            chunk_log2: CHUNK_LOG2_DEFAULT,
            codec: CodecChoice::default(),
            cuts: Cuts::default(),
            keys,
            signing,
            cosigning: Vec::new(),
            releasing: Vec::new(),
            trusted: Vec::new(),
            trusted_publishers: Vec::new(),
            tags: Vec::new(),
            expires_at: None,
            floors: None,
            hide_name: false,
            metrics: BTreeMap::new(),
            annotations: serde_json::Map::new(),
            admits: Admits::default(),
            oms: None,
            threads: std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 16),
            progress: ProgressFn::silent(),
        }
    }
}

/// What was sealed.
#[derive(Debug, Clone, serde::Serialize)]
pub struct SealSummary {
    pub model: String,
    pub model_id: ModelId,
    /// The version number: `NAME@<version>`.
    pub version: u64,
    pub manifest: ManifestDigest,
    pub vid: Vid,
    /// The refs written: channel and number.
    pub refs: Vec<(String, u64)>,
    pub cipher: &'static str,
    pub hash: &'static str,
    pub files: u64,
    pub bytes: u64,
    /// Plain bytes encrypted and uploaded now.
    pub uploaded_bytes: u64,
    /// Plain bytes of files that the earlier version already had.
    pub inherited_bytes: u64,
    /// Bytes that all objects of the version take in the store, and what they would take if nothing were coded.
    pub stored_bytes: u64,
    pub uncoded_bytes: u64,
    /// All objects of the version, and those it has from earlier ones.
    pub objects: u64,
    pub inherited_objects: u64,
    pub seconds: f64,
    /// Whoever mounts this names it as trusted: 64 hex digits.
    pub public_key: String,
    /// What an OpenSSF model-signing bundle said of it, where one was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oms: Option<Vouched>,
    /// False: the version is out, and why the floor is not raised to it is among the warnings.
    pub floor_raised: bool,
    pub warnings: Vec<String>,
}

/// Seals `source` as the next version of `model` in `store`.
///
/// # Errors
/// `USAGE` (names, sizes), `SOURCE` and `SOURCE_CHANGED` (the folder), `STORE_UNFIT` (a store that overwrites), `REF_KEY`
/// (a channel that somebody else continues), and whatever the store and the keys say. No error leaves a version behind that
/// a channel names, except that tags beside `latest` are moved last and only warned about.
///
/// # Cancel safety
/// May be dropped at any await point: orphans stay behind, which nobody can read.
pub async fn seal(source: &Path, store: Arc<dyn ChunkSink>, model: &str, options: SealOptions) -> Result<SealSummary> {
    let started = Instant::now();
    let channels = check_options(model, &options)?;
    let annotations = annotations(&options)?;
    check_apart(source, &*store)?;
    Meter::start(&options.progress, Phase::Scan, 0);
    let tree = Arc::new(SourceTree::open(source)?);
    let walked = Arc::clone(&tree);
    let files = Arc::new(blocking(move || walked.walk()).await?);
    let mut warnings = source::name_warnings(&files);
    let (looked, listed, admits) = (Arc::clone(&tree), Arc::clone(&files), options.admits.clone());
    let name = model.to_owned();
    blocking(move || check_admitted(&name, &looked, &listed, &admits)).await?;

    store.check_create_only().await?;
    let model_id = ModelId::of_name(model);
    let publishers = [&[Arc::clone(&options.signing)][..], &options.cosigning].concat();
    let releasers =
        if options.releasing.is_empty() { vec![Arc::clone(&options.signing)] } else { options.releasing.clone() };
    if releasers.len() > REF_SIGNATURES_MAX {
        refuse!(Usage, "{} release keys, at most {REF_SIGNATURES_MAX} can sign a ref", releasers.len());
    }
    let chain = Chain {
        store: Arc::clone(&store),
        model_id,
        model_name: Arc::from(model),
        // A publisher may have written refs before there were release keys.
        trusted: Arc::new(union([&publishers[..], &releasers], &options.trusted)),
        publishers: Arc::new(union([&publishers[..], &[]], &options.trusted_publishers)),
        floors: options.floors.clone(),
    };
    let survey = chain.survey(&channels).await?;
    let earlier = open_earlier(&chain, &survey, &options, &mut warnings).await?;

    let (dek, vid) = (Arc::new(Dek::random()), Vid(random()?));
    let pipeline = Arc::new(Pipeline {
        tree,
        files: Arc::clone(&files),
        store: Arc::clone(&store),
        model_id,
        vid,
        dek: Arc::clone(&dek),
        suite: options.suite,
        hash_alg: options.hash_alg,
        block_log2: options.block_log2,
        chunk_log2: options.chunk_log2,
        codec: options.codec,
        threads: options.threads.max(2),
    });
    let now = unix_now();
    let publisher = Publisher {
        releaser: Releaser { chain: chain.clone(), signers: releasers, now },
        hide_name: options.hide_name,
        channels,
        signers: publishers,
        keys: Arc::clone(&options.keys),
        dek,
        terms: Terms::New { expires_at: options.expires_at.unwrap_or(i64::MAX) },
        progress: options.progress.clone(),
    };

    let candidates = match &earlier {
        Some(earlier) => Candidates::find(&files, earlier, &options),
        None => Candidates::default(),
    };
    let lease = Lease { issued_at: now, oids: candidates.oids(earlier.as_ref()) };
    let lease_name = write_lease(&chain, &lease).await?;
    let made = async {
        let unchanged = candidates.confirm(&chain, earlier.as_ref(), &pipeline, &options.progress).await?;
        let sealed = seal_files(&pipeline, &unchanged, &options).await?;
        let draft = assemble(&files, earlier.as_ref(), &unchanged, sealed, annotations)?;
        let head = NewHeader {
            suite: options.suite,
            hash_alg: options.hash_alg,
            model_id,
            vid,
            seq: 1,
            created_at: now,
            msalt: [0; 32],
            previous: None,
        };
        let manifest = draft.builder.finish(head)?;
        let oms = match &options.oms {
            Some(endorsement) => Some(endorse(endorsement, &pipeline, &manifest).await?),
            None => None,
        };
        let summary = SealSummary {
            oms,
            objects: manifest.objects().len() as u64,
            stored_bytes: manifest.objects().iter().map(ObjectEntry::stored_len).sum(),
            uncoded_bytes: manifest.objects().iter().map(|object| object.layout.stored_len()).sum(),
            inherited_objects: u64::from(manifest.n_inherited()),
            uploaded_bytes: draft.uploaded_bytes,
            inherited_bytes: draft.inherited_bytes,
            ..SealSummary::of(model, vid, &files, &options)
        };
        Ok((summary, publisher.publish(manifest, draft.roots, survey).await?))
    }
    .await;
    if let Some(name) = lease_name {
        // Best effort: a lease left behind expires.
        if let Err(failed) = store.delete(&name).await {
            tracing::debug!(%failed, name, "a lease stays behind");
        }
    }
    let (mut summary, published): (SealSummary, Published) = made?;
    summary.version = published.seq;
    summary.manifest = published.digest;
    summary.refs = published.refs;
    summary.floor_raised = published.unraised.is_none();
    summary.warnings = [warnings, published.warnings].concat();
    summary.seconds = started.elapsed().as_secs_f64();
    Ok(summary)
}

impl SealSummary {
    /// What is known before anything is stored.
    fn of(model: &str, vid: Vid, files: &[SourceFile], options: &SealOptions) -> SealSummary {
        SealSummary {
            model: model.to_owned(),
            model_id: ModelId::of_name(model),
            version: 0,
            manifest: ManifestDigest([0; 32]),
            vid,
            refs: Vec::new(),
            cipher: options.suite.name(),
            hash: options.hash_alg.name(),
            files: files.len() as u64,
            bytes: files.iter().map(|file| file.size).sum(),
            uploaded_bytes: 0,
            inherited_bytes: 0,
            stored_bytes: 0,
            uncoded_bytes: 0,
            objects: 0,
            inherited_objects: 0,
            seconds: 0.0,
            public_key: options.signing.public().to_string(),
            oms: None,
            floor_raised: true,
            warnings: Vec::new(),
        }
    }
}

/// The public keys of ours and of others, each once.
fn union(ours: [&[Arc<dyn Signer>]; 2], others: &[PublicKey]) -> Vec<PublicKey> {
    let mut keys: Vec<PublicKey> = Vec::new();
    for key in ours.concat().iter().map(|signer| signer.public()).chain(others.iter().copied()) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}

/// The number after `number`: of a version, of a ref.
fn next(number: u64) -> Result<u64> {
    number.checked_add(1).ok_or_else(|| Error::new(Code::FastForward, "the highest number there is has been used"))
}

/// Also says which channels are to be written, `latest` first.
fn check_options(model: &str, options: &SealOptions) -> Result<Vec<String>> {
    check_model_name(model)?;
    // The sizes are the user's word here, not the store's.
    ObjectLayout::new(1, options.block_log2, options.chunk_log2).map_err(|e| {
        Error::new(Code::Usage, "blocks or chunks of a size that the format does not have").with_source(e)
    })?;
    let cuts = options.cuts;
    if cuts.object_bytes_max == 0
        || !cuts.object_bytes_max.is_multiple_of(4096)
        || cuts.object_bytes_max > Cuts::default().object_bytes_max
    {
        refuse!(Usage, "objects of at most {} bytes: must be a multiple of 4096 up to 2^40", cuts.object_bytes_max);
    }
    let mut channels = vec![LATEST.to_owned()];
    for tag in &options.tags {
        check_channel(tag)?;
        if !channels.contains(tag) {
            channels.push(tag.clone());
        }
    }
    Ok(channels)
}

/// The operator's rules for what may be a model, over names and, for pickles, over content.
fn check_admitted(model: &str, tree: &SourceTree, files: &[SourceFile], admits: &Admits) -> Result<()> {
    admits.check_size(model, files.iter().map(|file| u128::from(file.size)).sum())?;
    for file in files {
        admits.check_name(&file.path)?;
        if admits.no_pickles() && file.size > 0 {
            let opened = tree.open_file(file)?;
            if types::is_pickle(file.size, |offset, room| opened.read_exact_at(file, room, offset))? {
                refuse!(
                    Policy,
                    "{} is a pickle by its content, which deny-types=pickle refuses; convert it to safetensors",
                    file.path
                );
            }
        }
    }
    Ok(())
}

/// A store inside the folder would be sealed into itself, more of it each time.
fn check_apart(source: &Path, store: &dyn ChunkSink) -> Result<()> {
    let place = store.describe();
    let root = match place.strip_prefix("file://") {
        Some(root) => root,
        None if place.contains(':') => return Ok(()),
        None => &place,
    };
    let Ok(root) = std::path::absolute(root) else { return Ok(()) };
    // The store may not be there yet; its nearest folder that is decides.
    let real = root.ancestors().find_map(|folder| folder.canonicalize().ok());
    if let (Some(real), Ok(source)) = (real, source.canonicalize())
        && real.starts_with(&source)
    {
        refuse!(Usage, "store {place} lies inside {}, the folder to be sealed", source.display());
    }
    Ok(())
}

fn annotations(options: &SealOptions) -> Result<Vec<u8>> {
    let mut all = options.annotations.clone();
    if !options.metrics.is_empty() {
        let mut metrics = serde_json::Map::new();
        for (name, &value) in &options.metrics {
            let Some(number) = serde_json::Number::from_f64(value) else {
                refuse!(Usage, "metric {name} is {value}, which is no number to compare");
            };
            metrics.insert(name.clone(), number.into());
        }
        all.insert("metrics".into(), metrics.into());
    }
    if all.is_empty() {
        return Ok(Vec::new());
    }
    let json = serde_json::to_vec(&all).expect("a map of strings to values has a JSON form");
    if json.len() > ANNOTATIONS_BYTES_MAX as usize {
        refuse!(Usage, "annotations take {} bytes, at most 1 MiB are allowed", json.len());
    }
    Ok(json)
}

/// The version to inherit from, if there is one and it can be used. Why not is a warning: everything is then sealed anew.
async fn open_earlier(
    chain: &Chain,
    survey: &Survey,
    options: &SealOptions,
    warnings: &mut Vec<String>,
) -> Result<Option<Earlier>> {
    let Some(reference) = survey.newest.get(LATEST) else { return Ok(None) };
    match chain.open(reference, &options.keys).await {
        // Chunk hashes of both kinds cannot stand in one manifest.
        Ok(earlier) if earlier.manifest.header().hash_alg != options.hash_alg => Ok(None),
        Ok(earlier) => Ok(Some(earlier)),
        Err(lost) if matches!(lost.class(), Class::Unreachable | Class::NoRoom) => Err(lost),
        Err(refused) => {
            warnings.push(format!(
                "version {} cannot be inherited from, all files are sealed anew: {}",
                reference.seq,
                refused.chain()
            ));
            Ok(None)
        }
    }
}

/// Files that may be those of the earlier version: the same path and size.
#[derive(Default)]
struct Candidates {
    /// Index here, index there.
    pairs: Vec<(usize, usize)>,
}

impl Candidates {
    fn find(files: &[SourceFile], earlier: &Earlier, options: &SealOptions) -> Candidates {
        let manifest = &earlier.manifest;
        let pairs = files.iter().enumerate().filter(|(_, file)| file.size > 0).filter_map(|(here, file)| {
            let there = manifest.find(&file.path)?;
            let entry = &manifest.files()[there];
            // A cipher chosen now is meant for all of the version, and so is it to have nothing coded.
            let as_wanted = |extent: &Extent| {
                let object = &manifest.objects()[extent.object as usize];
                object.suite == options.suite && (options.codec == CodecChoice::Auto || !object.is_coded())
            };
            (entry.size == file.size && manifest.extents(entry).iter().all(as_wanted)).then_some((here, there))
        });
        Candidates { pairs: pairs.collect() }
    }

    fn objects(&self, earlier: Option<&Earlier>) -> Vec<u32> {
        let Some(Earlier { manifest, .. }) = earlier else { return Vec::new() };
        let extents = self.pairs.iter().flat_map(|&(_, there)| manifest.extents(&manifest.files()[there]));
        let mut objects: Vec<u32> = extents.map(|extent| extent.object).collect();
        objects.sort_unstable();
        objects.dedup();
        objects
    }

    fn oids(&self, earlier: Option<&Earlier>) -> Vec<Oid> {
        let Some(Earlier { manifest, .. }) = earlier else { return Vec::new() };
        self.objects(earlier).into_iter().map(|object| manifest.objects()[object as usize].oid).collect()
    }

    /// Those whose objects are still there, whole, and whose bytes hash to what the earlier version signed: index here to
    /// index there.
    async fn confirm(
        &self,
        chain: &Chain,
        earlier: Option<&Earlier>,
        pipeline: &Pipeline,
        progress: &ProgressFn,
    ) -> Result<HashMap<usize, usize>> {
        let Some(Earlier { manifest, .. }) = earlier else { return Ok(HashMap::new()) };
        let objects = self.objects(earlier);
        let entry = |&object: &u32| &manifest.objects()[object as usize];
        let wanted = objects.iter().map(entry).map(|object| (object.oid, object.stored_len())).collect();
        let present = chain.present(wanted).await?;
        let present: HashMap<u32, bool> = objects.into_iter().zip(present).collect();
        let whole =
            |there: usize| manifest.extents(&manifest.files()[there]).iter().all(|extent| present[&extent.object]);
        let mut there_of: HashMap<usize, usize> =
            self.pairs.iter().copied().filter(|&(_, there)| whole(there)).collect();
        let total = there_of.keys().map(|&here| pipeline.files[here].size).sum();
        let meter = Meter::start(progress, Phase::Compare, total);
        let mut indices: Vec<usize> = there_of.keys().copied().collect();
        indices.sort_unstable();
        for (here, sha256) in pipeline.hash_files(indices, &meter).await? {
            if manifest.files()[there_of[&here]].sha256 != sha256 {
                there_of.remove(&here);
            }
        }
        Ok(there_of)
    }
}

/// Tells collectors which objects are about to be inherited, before anybody looks whether they are there.
pub(crate) async fn write_lease(chain: &Chain, lease: &Lease) -> Result<Option<String>> {
    if lease.oids.is_empty() {
        return Ok(None);
    }
    let name = names::lease(chain.model_id, &random()?);
    publish::create(&*chain.store, &name, lease.encode()?.into()).await?;
    Ok(Some(name))
}

/// The jobs and what came of them.
struct Sealed {
    jobs: Vec<plan::Job>,
    done: Vec<JobDone>,
}

async fn seal_files(
    pipeline: &Arc<Pipeline>,
    unchanged: &HashMap<usize, usize>,
    options: &SealOptions,
) -> Result<Sealed> {
    let files = &pipeline.files;
    let new = || files.iter().enumerate().filter(|(index, _)| !unchanged.contains_key(index));
    let jobs = plan::plan(new().map(|(index, file)| (index, file.size)), options.cuts);
    let chunks: u64 =
        jobs.iter().flat_map(|job| &job.objects).map(|object| object.plain_len.div_ceil(1 << options.chunk_log2)).sum();
    if chunks > HASHES_MAX {
        refuse!(Usage, "the model has {chunks} chunks, at most {HASHES_MAX} fit a manifest; choose larger chunks");
    }
    let total = new().map(|(_, file)| file.size).sum();
    let meter = Meter::start(&options.progress, Phase::Seal, total);
    // Empty files have no object; that they are still empty is seen as for any other file.
    let empty = new().filter(|(_, file)| file.size == 0).map(|(index, _)| index).collect();
    pipeline.hash_files(empty, &meter).await?;
    let done = pipeline.run(jobs.clone(), &meter).await?;
    Ok(Sealed { jobs, done })
}

/// A manifest in the making, and the keys it hands on.
struct Draft {
    builder: ManifestBuilder,
    roots: Vec<Secret<32>>,
    uploaded_bytes: u64,
    inherited_bytes: u64,
}

fn assemble(
    files: &[SourceFile],
    earlier: Option<&Earlier>,
    unchanged: &HashMap<usize, usize>,
    sealed: Sealed,
    annotations: Vec<u8>,
) -> Result<Draft> {
    let mut draft = Draft { builder: ManifestBuilder::new(), roots: Vec::new(), uploaded_bytes: 0, inherited_bytes: 0 };
    let mut extents: Vec<Vec<Extent>> = vec![Vec::new(); files.len()];
    let mut digests: Vec<[u8; 32]> = vec![FileHasher::new().finish(); files.len()];
    for (job, done) in sealed.jobs.iter().zip(sealed.done) {
        for (plan, object) in job.objects.iter().zip(done.objects) {
            let object = draft.builder.add_object(object);
            for piece in &plan.pieces {
                extents[piece.file].push(Extent { object, object_offset: piece.object_offset, len: piece.len });
                draft.uploaded_bytes += piece.len;
            }
        }
        for (file, digest) in done.digests {
            digests[file] = digest;
        }
    }
    if let Some(Earlier { manifest, keys }) = earlier {
        let mut handed_on: HashMap<u32, u32> = HashMap::new();
        for index in 0..files.len() {
            let Some(&there) = unchanged.get(&index) else { continue };
            let entry = &manifest.files()[there];
            digests[index] = entry.sha256;
            draft.inherited_bytes += entry.size;
            for extent in manifest.extents(entry) {
                let object = *handed_on.entry(extent.object).or_insert_with(|| {
                    let old = &manifest.objects()[extent.object as usize];
                    draft.roots.push(keys.object_root(old));
                    draft.builder.add_object(NewObject {
                        oid: old.oid,
                        layout: old.layout,
                        suite: old.suite,
                        inherited: true,
                        origin_vid: old.origin_vid,
                        commit: old.commit,
                        hashes: manifest.object_hashes(extent.object).to_vec(),
                        coded: manifest.object_coded(extent.object),
                    })
                });
                extents[index].push(Extent { object, ..*extent });
            }
        }
    }
    for ((file, extents), sha256) in files.iter().zip(extents).zip(digests) {
        let SourceFile { path, mode, size, mtime, .. } = file.clone();
        draft.builder.add_file(NewFile { path, mode, size, sha256, mtime, extents });
    }
    draft.builder.annotations(annotations);
    Ok(draft)
}

/// Whether the bundle vouches for what is about to be published: for the digests of the bytes that were encrypted.
async fn endorse(endorsement: &Endorsement, pipeline: &Pipeline, manifest: &Manifest) -> Result<Vouched> {
    let sealed = |file| SealedFile { path: manifest.path(file), size: file.size, sha256: file.sha256 };
    let files: Vec<SealedFile<'_>> = manifest.files().iter().map(sealed).collect();
    let signed = &endorsement.signed;
    let mut shards = HashMap::new();
    for number in signed.in_shards(&files) {
        let path = files[number].path;
        let index = pipeline.files.binary_search_by(|file| file.path.as_bytes().cmp(path.as_bytes()));
        let index = index.expect("every file of the manifest comes from the folder");
        let shard_bytes = signed.shard_bytes().expect("only bundles with shards have files in shards");
        let (whole, digests) = pipeline.hash_shards(index, shard_bytes).await?;
        if whole != files[number].sha256 {
            refuse!(SourceChanged, "{path} was changed after it was sealed; nothing was published");
        }
        shards.insert(number, digests);
    }
    signed.check(&files, &endorsement.bundle_path, &shards).map_err(|e| e.context("nothing was published"))
}

/// Runs what blocks or computes on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(stopped) => Err(Error::new(Code::Host, "a sealing thread stopped").with_source(stopped)),
    }
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::new(Code::Host, "no random numbers from the kernel").with_source(e))?;
    Ok(bytes)
}

fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
