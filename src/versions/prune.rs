//! Removes what no version needs any more: first the refs beyond retention, a grace period later what only they named.
//!
//! ```text
//!  list ──> refs: the newest verified, the others by the hash that the next one carries
//!             ├ beyond retention: garbage of the first kind; deleted oldest first, so that the chain never has a hole
//!             └ all that stay, and pins ──> manifests, signatures, slots, data objects that they need (opened with the keys)
//!  everything else of known shape: garbage of the second kind          leases, and what they name, stay
//! ```
//! In: a hostile store, trust, keys, pins that nothing in the store tells of, what earlier looks called garbage. Out:
//! deletions, and a report.
//! Promises: while any ref in the store or a pin leads to a version, nothing of it is deleted; an object is deleted only when an
//! earlier look, at least a grace period ago, called it garbage and no look since found it needed; a ref or manifest that
//! cannot be read or verified stops the prune of its model; ages are counted by this machine's looks, never by what the
//! store says; a pin of a manifest that is not there stops it as well; a prune that dies is repaired by the next one.
//! Not here: old generations of slots of living versions (rotation deletes those).
//! Spec: docs/FORMAT.md b.1. Held by: the tests below, tests/versions.rs (random histories, death at every write).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use crate::crypto::open_manifest;
use crate::error::{Class, Code, Error, Result};
use crate::format::limits::{MANIFEST_BYTES_MAX, REF_BYTES_MAX};
use crate::format::{LEASE_BYTES_MAX, Lease, ManifestDigest, ManifestHeader, ModelId, Oid, Ref, Vid, names};
use crate::keys::Resolver;
use crate::keys::state::{self, Locked};
use crate::refuse;
use crate::seal::{Chain, SlotKeys};
use crate::store::{ChunkSink, Listed};

/// Requests in flight.
const IN_FLIGHT: usize = 16;
/// Refs of one channel; a refresh an hour takes eleven years to make as many.
const REFS_MAX: u64 = 100_000;
/// Garbage remembered of one model; what does not fit is remembered by a later look.
const NOTES_MAX: usize = 200_000;
/// The longest file of such notes.
const NOTES_BYTES_MAX: u64 = 64 << 20;

/// How far a prune goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Tells; remembers nothing.
    DryRun,
    /// Tells and remembers what is garbage now, so that a later look may agree.
    Note,
    /// Deletes what an earlier look has agreed on.
    Sweep,
}

#[derive(Debug, Clone, Copy)]
pub struct PruneOptions {
    /// Of each tag so many different versions stay, the newest ones; at least 1.
    pub versions_kept: usize,
    /// How long garbage must have been known as garbage.
    pub grace_s: u64,
    /// How long at least between the two looks that must agree, whatever the grace period.
    pub second_look_s: u64,
    pub look: Look,
    /// Unix seconds.
    pub now: i64,
}

/// What an object of a model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    Ref,
    Manifest,
    Signature,
    Slots,
    Data,
    Lease,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Ref => "ref",
            Kind::Manifest => "manifest",
            Kind::Signature => "signature",
            Kind::Slots => "slots",
            Kind::Data => "data",
            Kind::Lease => "lease",
        }
    }
}

/// Objects, and their bytes as the store tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Tally {
    pub objects: u64,
    pub bytes: u64,
}

impl Tally {
    fn add(&mut self, bytes: u64) {
        self.objects += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// What a look at one model found and did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PruneReport {
    pub model: String,
    /// Different versions that refs or pins lead to and that stay.
    pub versions: usize,
    pub needed: Tally,
    /// Deleted; in a dry run and in a first look, what a sweep would delete now.
    pub due: BTreeMap<Kind, Tally>,
    /// Garbage that has not been known for long enough.
    pub waiting: BTreeMap<Kind, Tally>,
    /// Unix seconds at which the first of it may go.
    pub next_at: Option<i64>,
    /// Things in the model's folder that this format does not have; never touched.
    pub strange: usize,
    /// True: what is due was deleted.
    pub swept: bool,
    pub warnings: Vec<String>,
}

/// Told of deletions: bytes done, bytes in all.
pub type PruneProgressFn<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Whoever may prune: a reader's trust, the keys of the versions, the right to delete.
pub struct Pruner<'a> {
    pub resolver: Resolver<'a>,
    pub store: Arc<dyn ChunkSink>,
    pub keys: Arc<dyn SlotKeys>,
    /// The state folder: `prune` below it holds what earlier looks called garbage.
    pub state: PathBuf,
    /// Versions that somebody reads by digest, without a ref: records of a catalog, mounts with `--manifest`.
    pub pins: BTreeMap<ModelId, BTreeSet<ManifestDigest>>,
    pub options: PruneOptions,
}

/// What earlier looks called garbage: name below the model's folder -> Unix seconds of the first of them.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Notes {
    /// For people who look into the file.
    store: String,
    model: String,
    garbage: BTreeMap<String, i64>,
}

/// One object of known shape.
enum Object {
    Ref {
        channel: String,
        ref_seq: u64,
    },
    Manifest(ManifestDigest),
    Signature(ManifestDigest),
    Slots(Vid),
    Data(Oid),
    Lease,
    /// Stays: the name, hints, public keys.
    Kept,
    Strange,
}

/// What the refs that stay, and the pins, lead to.
#[derive(Default)]
struct Needed {
    manifests: BTreeSet<ManifestDigest>,
    vids: HashSet<Vid>,
    oids: HashSet<Oid>,
}

/// The refs of a channel, by number.
struct Channel {
    refs: BTreeMap<u64, Ref>,
    /// The lowest number within retention.
    kept_from: u64,
}

impl Pruner<'_> {
    /// Looks at one model.
    ///
    /// # Errors
    /// Whatever a reader of the model's tags would be told; `FORK` for a chain of refs with a hole or a foreign link; what
    /// stands in the way of opening a version within retention or a pinned one (`NO_KEY`, `MAN_DIGEST`, ...); `NOT_FOUND`
    /// for a model without refs and for a pin that leads nowhere. Nothing was deleted then. The store's own errors may come half-way: look again.
    pub async fn prune(&self, name: &str, progress: PruneProgressFn<'_>) -> Result<PruneReport> {
        let model = ModelId::of_name(name);
        let folder = names::model_dir(model);
        // Before anything is read: what is created from here on is not in the list, and so in no danger.
        let listed = self.store.list(&folder).await?;
        let objects: Vec<(Object, &Listed)> =
            listed.iter().map(|listed| (classify(model, &listed.name), listed)).collect();
        let channels = self.channels(name, model, &objects).await?;
        let chain = Chain {
            store: Arc::clone(&self.store),
            model_id: model,
            model_name: Arc::from(name),
            trusted: Arc::default(),
            publishers: Arc::default(),
            floors: None,
        };
        let mut report = PruneReport { model: name.to_owned(), ..PruneReport::default() };

        // What readers can name must open, or nothing here is known well enough to delete anything.
        let mut needed = Needed::default();
        for channel in channels.values() {
            for reference in channel.refs.range(channel.kept_from..).map(|(_, reference)| reference) {
                self.need(&chain, reference, &mut needed).await.map_err(|err| {
                    err.context(format!(
                        "version {} of {name} is needed; nothing of the model was pruned",
                        reference.seq
                    ))
                })?;
            }
        }
        let by_name: HashMap<&str, &Listed> = listed.iter().map(|listed| (listed.name.as_str(), listed)).collect();
        for &digest in self.pins.get(&model).into_iter().flatten() {
            let Some(manifest) = by_name.get(names::manifest(model, digest).as_str()) else {
                refuse!(
                    NotFound,
                    "manifest sha256:{digest} of {name} is to be kept and is not there; nothing of the model was pruned: \
                     mend the catalog's record or the option that names it"
                );
            };
            self.need_version(&chain, digest, manifest.size.min(MANIFEST_BYTES_MAX), None, &mut needed).await.map_err(
                |err| {
                    err.context(format!(
                        "manifest sha256:{digest} of {name} is to be kept; nothing of the model was pruned"
                    ))
                },
            )?;
        }
        report.versions = needed.manifests.len();

        let mut notes = Book::open(&self.state, &self.store.describe(), model, name, &self.options)?;
        let mut due: Vec<(&Listed, Kind)> = Vec::new();
        // Refs first. Only a run of the oldest ones: a chain with a hole would be refused by the next prune, and rightly.
        let mut staying: Vec<Ref> = Vec::new();
        for (name, channel) in &channels {
            let mut blocked = false;
            for (&ref_seq, reference) in channel.refs.range(..channel.kept_from) {
                let Some(&listed) = by_name.get(names::reference(model, name, ref_seq).as_str()) else { continue };
                let agreed = notes.agreed(&folder, listed);
                blocked |= !agreed;
                if blocked || self.options.look != Look::Sweep {
                    staying.push(*reference);
                }
                if blocked {
                    report.waiting.entry(Kind::Ref).or_default().add(listed.size);
                } else {
                    due.push((listed, Kind::Ref));
                }
            }
        }
        // Then what no ref that stays leads to. If a version beyond retention cannot be opened any more, its ref goes
        // first, and the objects wait until it is gone.
        let mut unknown = None;
        for reference in &staying {
            if let Err(err) = self.need(&chain, reference, &mut needed).await {
                if err.class() == Class::Unreachable {
                    return Err(err);
                }
                unknown = Some(format!(
                    "version {} beyond retention cannot be opened; objects stay until its refs are gone: {}",
                    reference.seq,
                    err.chain()
                ));
            }
        }
        let leased = self.leases(model, &objects, &mut notes, &folder).await?;
        for (object, listed) in &objects {
            let kind = match object {
                Object::Ref { .. } | Object::Kept => {
                    report.needed.add(listed.size);
                    continue;
                }
                Object::Strange => {
                    report.strange += 1;
                    continue;
                }
                Object::Manifest(digest) if !needed.manifests.contains(digest) => Kind::Manifest,
                Object::Signature(digest) if !needed.manifests.contains(digest) => Kind::Signature,
                Object::Slots(vid) if !needed.vids.contains(vid) => Kind::Slots,
                Object::Data(oid) if !needed.oids.contains(oid) && !leased.oids.contains(oid) => Kind::Data,
                Object::Lease if leased.over.contains(&listed.name) => Kind::Lease,
                Object::Manifest(_) | Object::Signature(_) | Object::Slots(_) | Object::Data(_) | Object::Lease => {
                    report.needed.add(listed.size);
                    continue;
                }
            };
            if unknown.is_none() && !(leased.everything && kind != Kind::Lease) && notes.agreed(&folder, listed) {
                due.push((listed, kind));
            } else {
                report.waiting.entry(kind).or_default().add(listed.size);
            }
        }
        report.warnings.extend(unknown);
        if leased.everything {
            report.warnings.push("a lease cannot be read; objects stay until it is over".into());
        }
        for (listed, kind) in &due {
            report.due.entry(*kind).or_default().add(listed.size);
        }
        report.next_at = notes.next_at();
        let total = due.iter().fold(0u64, |sum, (listed, _)| sum.saturating_add(listed.size));
        let (refs, others): (Vec<_>, Vec<_>) = due.iter().partition(|(_, kind)| *kind == Kind::Ref);
        let mut done = 0;
        if self.options.look == Look::Sweep {
            // One after the other, oldest first: whenever this dies, the chain that is left has no hole.
            for (listed, _) in refs {
                self.store.delete(&listed.name).await?;
                done += listed.size;
                progress(done, total);
            }
        }
        // Only now: what these refs named becomes garbage when they are gone, not before.
        if self.options.look != Look::DryRun {
            notes.keep()?;
        }
        if self.options.look == Look::Sweep {
            let deletes = others.into_iter().map(|(listed, _)| async move {
                self.store.delete(&listed.name).await?;
                Ok::<u64, Error>(listed.size)
            });
            let mut deletes = stream::iter(deletes).buffer_unordered(IN_FLIGHT);
            while let Some(bytes) = deletes.try_next().await? {
                done = done.saturating_add(bytes);
                progress(done, total);
            }
            report.swept = true;
        }
        Ok(report)
    }

    /// Every channel that the store shows or that was ever seen here, its newest ref as a reader believes it.
    async fn channels(
        &self,
        name: &str,
        model: ModelId,
        objects: &[(Object, &Listed)],
    ) -> Result<BTreeMap<String, Channel>> {
        let mut lowest: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for (object, _) in objects {
            if let Object::Ref { channel, ref_seq } = object {
                let ends = lowest.entry(channel.clone()).or_insert((*ref_seq, *ref_seq));
                *ends = (ends.0.min(*ref_seq), ends.1.max(*ref_seq));
            }
        }
        // A tag that the store no longer shows is a store that went back: what it hides must not look like garbage.
        if let Some(floors) = self.resolver.floors {
            for channel in floors.channels(&self.store.describe(), model)? {
                if !lowest.contains_key(&channel) {
                    refuse!(Rollback, "tag {channel} of {name} was seen here before, and the store shows no ref of it");
                }
            }
        }
        if lowest.is_empty() {
            refuse!(NotFound, "{name} has no ref: what lies there may be a seal at work; nothing of it is pruned");
        }
        let mut channels = BTreeMap::new();
        for (channel, (first, last)) in lowest {
            let newest = self.resolver.newest_ref(name, &channel).await?;
            if last > newest.ref_seq || newest.ref_seq - first >= REFS_MAX {
                refuse!(
                    Fork,
                    "tag {channel} of {name} ends at ref {}, but its refs {first} to {last} lie there",
                    newest.ref_seq
                );
            }
            let read = (first..newest.ref_seq).map(|ref_seq| {
                let object = names::reference(model, &channel, ref_seq);
                async move {
                    let bytes =
                        self.store.read_small(&object, REF_BYTES_MAX as u64).await.map_err(|err| match err.code() {
                            Code::NotFound => {
                                Error::new(Code::Fork, format!("the chain of refs has a hole: {object} is not there"))
                                    .with_source(err)
                            }
                            _ => err,
                        })?;
                    Ok((ref_seq, Ref::parse(&bytes)?.0))
                }
            });
            let mut refs: BTreeMap<u64, Ref> = stream::iter(read).buffered(IN_FLIGHT).try_collect().await?;
            refs.insert(newest.ref_seq, newest);
            let mut next = newest;
            for before in refs.values().rev().skip(1) {
                if before.head_digest() != next.previous {
                    refuse!(Fork, "ref {} of tag {channel} of {name} does not follow the one before it", next.ref_seq);
                }
                next = *before;
            }
            let kept_from = kept_from(&refs, self.options.versions_kept.max(1));
            channels.insert(channel, Channel { refs, kept_from });
        }
        Ok(channels)
    }

    /// Notes all that `reference` leads to. The digest is the proof: it stands in a ref that is believed.
    async fn need(&self, chain: &Chain, reference: &Ref, needed: &mut Needed) -> Result<()> {
        let named = Some((reference.seq, reference.vid));
        self.need_version(chain, reference.manifest_digest, reference.manifest_len, named, needed).await
    }

    /// The same of a version by its digest; `named` is what a ref says of it besides.
    async fn need_version(
        &self,
        chain: &Chain,
        digest: ManifestDigest,
        len: u64,
        named: Option<(u64, Vid)>,
        needed: &mut Needed,
    ) -> Result<()> {
        if needed.manifests.contains(&digest) {
            return Ok(());
        }
        let bytes = chain.read_manifest(digest, len).await?;
        let (header, _) = ManifestHeader::parse_object(&bytes)?;
        if header.model_id != chain.model_id || named.is_some_and(|named| named != (header.seq, header.vid)) {
            refuse!(ManModel, "manifest {digest} is not the version it is named as");
        }
        let slots = chain.newest_slots(header.vid).await?;
        let keys = Arc::clone(&self.keys);
        let opened = tokio::task::spawn_blocking(move || open_manifest(&bytes, keys.unlock(&slots, &header)?)).await;
        let (manifest, _) =
            opened.map_err(|stopped| Error::new(Code::Host, "a thread stopped").with_source(stopped))??;
        needed.oids.extend(manifest.objects().iter().map(|object| object.oid));
        needed.vids.insert(header.vid);
        needed.manifests.insert(digest);
        Ok(())
    }

    async fn leases(
        &self,
        model: ModelId,
        objects: &[(Object, &Listed)],
        notes: &mut Book,
        folder: &str,
    ) -> Result<Leased> {
        let mut leased = Leased::default();
        for (object, listed) in objects {
            if !matches!(object, Object::Lease) {
                continue;
            }
            // A lease is over a grace period after it was first seen here: its own date is only believed to end it.
            let agreed = notes.agreed(folder, listed);
            let bytes = match self.store.read_small(&listed.name, LEASE_BYTES_MAX).await {
                Ok(bytes) => bytes,
                Err(gone) if gone.code() == Code::NotFound => continue,
                Err(long) if long.code() == Code::Limit => Default::default(),
                Err(err) => return Err(err),
            };
            let grace_s = i64::try_from(self.options.grace_s).unwrap_or(i64::MAX);
            let parsed = Lease::parse(&bytes);
            let ended = parsed.as_ref().is_ok_and(|lease| lease.issued_at.saturating_add(grace_s) <= self.options.now);
            if ended || agreed {
                leased.over.insert(listed.name.clone());
                continue;
            }
            match parsed {
                Ok(lease) => leased.oids.extend(lease.oids),
                Err(strange) => {
                    tracing::warn!(%model, name = listed.name, "a lease that cannot be read: {}", strange.chain());
                    leased.everything = true;
                }
            }
        }
        Ok(leased)
    }
}

/// What leases keep.
#[derive(Default)]
struct Leased {
    oids: HashSet<Oid>,
    /// Names of those that count for nothing any more.
    over: HashSet<String>,
    /// One of them cannot be read, so it may name anything.
    everything: bool,
}

/// The lowest ref number with which `versions` different versions are named, counted from the newest.
fn kept_from(refs: &BTreeMap<u64, Ref>, versions: usize) -> u64 {
    let mut seen = HashSet::new();
    let mut lowest = 0;
    for (&ref_seq, reference) in refs.iter().rev() {
        if !seen.contains(&reference.manifest_digest) {
            if seen.len() == versions {
                return lowest;
            }
            seen.insert(reference.manifest_digest);
        }
        lowest = ref_seq;
    }
    lowest
}

/// What an object is, by its name: exactly the names that this format makes.
fn classify(model: ModelId, name: &str) -> Object {
    let folder = names::model_dir(model);
    let Some(rest) = name.strip_prefix(&folder) else { return Object::Strange };
    let parts: Vec<&str> = rest.split('/').collect();
    let exactly = |made: String, object: Object| if made == name { object } else { Object::Strange };
    match parts[..] {
        ["name"] => Object::Kept,
        ["p", key] if names::key_id(key).is_some() => Object::Kept,
        ["r", channel, "head"] if names::channel(channel).is_some() => Object::Kept,
        ["r", channel, _] if names::channel(channel).is_some() => match names::ref_seq(name) {
            Some(ref_seq) => {
                exactly(names::reference(model, channel, ref_seq), Object::Ref { channel: channel.to_owned(), ref_seq })
            }
            None => Object::Strange,
        },
        ["d", oid] => match names::oid(oid) {
            Some(oid) => exactly(names::data(model, oid), Object::Data(oid)),
            None => Object::Strange,
        },
        ["m", digest] => match names::manifest_digest(digest) {
            Some(digest) => exactly(names::manifest(model, digest), Object::Manifest(digest)),
            None => Object::Strange,
        },
        ["s", digest, key] => match (ManifestDigest::from_hex(digest), names::key_id(key)) {
            (Some(digest), Some(key)) => exactly(names::signature(model, digest, key), Object::Signature(digest)),
            _ => Object::Strange,
        },
        ["k", vid, generation] => match (names::vid(vid), names::slots_generation(generation)) {
            (Some(vid), Some(generation)) => exactly(names::slots(model, vid, generation), Object::Slots(vid)),
            _ => Object::Strange,
        },
        ["l", random] if random.len() == 32 && random.bytes().all(|c| c.is_ascii_hexdigit()) => Object::Lease,
        _ => Object::Strange,
    }
}

/// The notes of one model, old and new.
struct Book {
    dir: PathBuf,
    file: String,
    old: BTreeMap<String, i64>,
    new: Notes,
    now: i64,
    /// Seconds that two looks must lie apart.
    apart_s: i64,
}

impl Book {
    fn open(state: &Path, store: &str, model: ModelId, name: &str, options: &PruneOptions) -> Result<Book> {
        let dir = state.join("prune");
        let file = state::file_name(store, model, "prune");
        let old: Option<Notes> = state::read_up_to(&dir, &file, NOTES_BYTES_MAX)?;
        let apart_s = options.grace_s.max(options.second_look_s);
        Ok(Book {
            dir,
            file,
            old: old.map(|notes| notes.garbage).unwrap_or_default(),
            new: Notes { store: store.to_owned(), model: name.to_owned(), garbage: BTreeMap::new() },
            now: options.now,
            apart_s: i64::try_from(apart_s).unwrap_or(i64::MAX),
        })
    }

    /// Calls `listed` garbage, and says whether an earlier look long enough ago did so too. What no look asks about is
    /// forgotten: it is needed, or gone.
    fn agreed(&mut self, folder: &str, listed: &Listed) -> bool {
        let name = listed.name.strip_prefix(folder).unwrap_or(&listed.name);
        let before = self.old.get(name).copied();
        // A clock that was set back must not make garbage look old, nor keep it for ever.
        let first = before.filter(|&first| first <= self.now).unwrap_or(self.now);
        if self.new.garbage.len() < NOTES_MAX || self.new.garbage.contains_key(name) {
            self.new.garbage.insert(name.to_owned(), first);
        }
        before.is_some_and(|before| before.saturating_add(self.apart_s) <= self.now)
    }

    /// When the first of what has to wait may go.
    fn next_at(&self) -> Option<i64> {
        let ends = self.new.garbage.values().map(|first| first.saturating_add(self.apart_s));
        ends.filter(|&at| at > self.now || self.old.is_empty()).min()
    }

    fn keep(&self) -> Result<()> {
        if self.new.garbage.is_empty() && self.old.is_empty() {
            return Ok(());
        }
        Locked::new(&self.dir)?.replace(&self.file, &self.new)
    }
}
