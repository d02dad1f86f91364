//! A version again under a new data key: the same objects handed on (L2), or all of them encrypted anew (L3).
//!
//! In: a version that channels name, a key that opens it. Out: the next version, of the same files, in its place.
//! Promises: only channels that still name the old version are moved; a run that died after its first ref is completed by
//! the next one, without another key; an order is taken for done only where the version that is there was made by such a one,
//! for exactly the keys of this one; the old version is left to readers who hold it, and to `prune`.
//! Held by: tests/rotate.rs.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::edit::{opens, sealed_to};
use super::reencrypt::Reencryption;
use super::{Keys, RACES_MAX, Rotator};
use crate::crypto::{Dek, ModelKeys, open_manifest};
use crate::error::{Class, Code, Error, Result};
use crate::format::limits::{ANNOTATIONS_BYTES_MAX, MANIFEST_BYTES_MAX};
use crate::format::{
    Lease, Manifest, ManifestBuilder, ManifestDigest, ManifestHeader, NewFile, NewHeader, NewObject, Ref, Slot, Slots,
    Vid,
};
use crate::keys::{KeySource, Resolved, Signer, Wanted};
use crate::mem::{Secret, reserve_secrets};
use crate::refuse;
use crate::seal::{
    Appended, ProgressFn, Published, Publisher, RefTarget, SlotKeys, SlotTarget, Terms, blocking, random, write_lease,
};

/// Where a version says which one it stands for.
const ANNOTATION: &str = "key_rotation";

/// How much is new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// The data key; objects keep the keys they have.
    NewKey,
    /// Every object, under keys of its own that nobody ever had.
    Reencrypt,
}

impl Level {
    pub const fn name(self) -> &'static str {
        match self {
            Level::NewKey => "new-key",
            Level::Reencrypt => "reencrypt",
        }
    }
}

/// How a version is put under a new data key.
#[derive(Clone)]
pub struct Rekey {
    pub level: Level,
    /// Opens the old version.
    pub keys: Keys,
    /// One slot each in the new version; `None`: for `keys`.
    pub to: Option<Keys>,
    /// The publisher keys: each signs the new manifest.
    pub publishers: Vec<Arc<dyn Signer>>,
    /// Readers who see the new refs refuse every older version; none of those may be named by another tag.
    pub withdraw_old: bool,
    /// Versions younger than this, in seconds, are left alone: for jobs that are retried. `None`: the order may be about a key
    /// that leaked a minute ago, and what nothing but its age speaks against is done.
    pub if_older_s: Option<u64>,
    /// Chunks opened and sealed at once.
    pub threads: usize,
    pub progress: ProgressFn,
}

/// A version in the place of another.
#[derive(Debug, Clone, Serialize)]
pub struct Rekeyed {
    pub level: Level,
    pub from_version: u64,
    pub from_manifest: ManifestDigest,
    pub version: u64,
    pub manifest: ManifestDigest,
    pub vid: Vid,
    /// The refs written: channel and number.
    pub refs: Vec<(String, u64)>,
    /// The new version was there: what an earlier run left undone was done. Without refs there was nothing left to do.
    pub finished: bool,
    /// Plain bytes encrypted anew.
    pub reencrypted_bytes: u64,
    /// Labels of the new slots, and of the old ones that none of the keys given opens: they are not in the new version.
    pub slots: Vec<String>,
    pub left_out: Vec<String>,
    /// Why nothing was done at all: `version` is the one that is there, and too young.
    #[serde(skip)]
    pub left_alone: Option<String>,
    /// It is left alone although an earlier rotation made it for other slots than `order` has: what that was to withdraw may be
    /// there still.
    #[serde(skip)]
    pub left_unlike: bool,
    pub floor_raised: bool,
    /// Why the floor is not raised to the refs; among the warnings too.
    #[serde(skip)]
    pub unraised: Option<Error>,
    pub warnings: Vec<String>,
}

/// What was withdrawn when no tag named it any more.
#[derive(Debug, Clone, Serialize)]
pub struct Withdrawn {
    /// The lowest version that is still allowed: the lowest that a tag names.
    pub below: u64,
    /// The refs written: channel and number.
    pub refs: Vec<(String, u64)>,
    pub floor_raised: bool,
    /// Why the floor is not raised to the refs; among the warnings too.
    #[serde(skip)]
    pub unraised: Option<Error>,
    /// Why not every tag has such a ref; among the warnings too. Readers of the others do not see what was withdrawn.
    #[serde(skip)]
    pub unfinished: Option<Error>,
    pub warnings: Vec<String>,
}

/// Refs, and whether the floor is raised to them.
#[derive(Default)]
struct Moves {
    refs: Vec<(String, u64)>,
    unraised: Option<Error>,
}

impl Moves {
    fn floor(&mut self, unraised: Option<Error>, warnings: &mut Vec<String>) {
        if let Some(failed) = unraised {
            warnings.push(failed.chain());
            self.unraised.get_or_insert(failed);
        }
    }

    fn withdrew(self, below: u64, unfinished: Option<Error>, warnings: Vec<String>) -> Withdrawn {
        let Moves { refs, unraised } = self;
        Withdrawn { below, refs, floor_raised: unraised.is_none(), unraised, unfinished, warnings }
    }

    /// What failed is the answer if no ref was written; else it is told beside those that readers see already.
    fn broke_off(self, below: u64, failed: Error, mut warnings: Vec<String>) -> Result<Withdrawn> {
        if self.refs.is_empty() {
            return Err(failed);
        }
        warnings.push(failed.chain());
        Ok(self.withdrew(below, Some(failed), warnings))
    }

    fn has(&self, channel: &str) -> bool {
        self.refs.iter().any(|(written, _)| written == channel)
    }
}

/// An opened version.
pub(super) struct Opened {
    pub manifest: Manifest,
    pub keys: ModelKeys,
}

impl Rotator<'_> {
    /// Puts the version that `wanted` names under a new data key, as the next version of every channel that names it.
    ///
    /// # Errors
    /// What a reader of the version would be told; `NO_KEY` if the keys do not open it; `USAGE` if no channel names it, or if
    /// another one names what would be withdrawn; `FILE_HASH` for a file that does not have its signed SHA-256; `EXISTS` if
    /// its channel was moved meanwhile. What the keys, the signers and the store say.
    pub async fn rekey(&self, wanted: &Wanted, order: &Rekey) -> Result<Rekeyed> {
        let old = self.resolve(wanted).await?;
        let mut warnings = Vec::new();
        let age_s = u64::try_from(self.releaser.now.saturating_sub(old.header.created_at)).unwrap_or(0);
        let young = order.if_older_s.filter(|least| age_s < *least);
        let left = |least: u64| left_alone(&old, order, format!("it is {age_s} s old, --if-older says {least} s"));
        let (opened, shut) = match (open(&old, &order.keys).await, &order.to) {
            (Ok(opened), _) => (opened, None),
            // The tag was moved before the run died: the new keys open what it made.
            (Err(shut), to) if shut.code() == Code::NoKey || (young.is_some() && shut.class() == Class::Denied) => {
                let newer = match to {
                    Some(to) => open(&old, to).await.ok(),
                    None => None,
                };
                match (newer, young) {
                    (Some(opened), _) => (opened, Some(shut)),
                    (None, Some(least)) => return Ok(left(least)),
                    (None, None) => return Err(shut),
                }
            }
            (Err(other), _) => return Err(other),
        };
        // Whoever can still open it and wants all before it gone has a reason to want another.
        let another = order.withdraw_old && order.if_older_s.is_none() && shut.is_none();
        if let Some(finished) = self.finish_earlier(&old, &opened, order, another, &mut warnings).await? {
            return Ok(finished);
        }
        // With the keys that there were, only its age tells that a version is not one that this order is to replace.
        let stands_for = stands_for(&opened.manifest, order.level);
        if let Some(of) = stands_for
            && (shut.is_some() || young.is_some())
            && is_sealed_for(&old, order).await?
        {
            let from = self.seq_of(of).await.unwrap_or(old.header.seq);
            return self.move_on((from, of), &old, order, &mut warnings).await;
        }
        if let Some(least) = young {
            return Ok(Rekeyed { left_unlike: stands_for.is_some(), ..left(least) });
        }
        if let Some(shut) = shut {
            return Err(match stands_for {
                None => shut,
                Some(_) => shut.context(format!(
                    "version {} was made by an earlier rotation, for other keys than these; to replace it give --key of one \
                     that opens it",
                    old.header.seq
                )),
            });
        }
        let channels: Vec<String> =
            self.naming(old.digest, &mut warnings).await?.into_iter().map(|(channel, _)| channel).collect();
        if channels.is_empty() {
            refuse!(
                Usage,
                "no tag of {} names version {}, so none would name the new one; rotate a version that is in use",
                self.name(),
                old.header.seq
            );
        }
        // Its number will be the highest of the model.
        self.check_withdraws(order, &[old.digest], u64::MAX, &mut warnings).await?;
        let chain = &self.releaser.chain;
        chain.store.check_create_only().await?;
        let terms = Terms::InPlaceOf { of: old.digest, withdraw_older: order.withdraw_old };
        // As the publish will: not only after hours of work.
        terms.check_withdraws(&chain.survey(&channels).await?)?;
        let to = order.to.clone().unwrap_or_else(|| Arc::clone(&order.keys));
        let (slots, shown) = self.plan_slots(&old, order, &to).await?;
        let (dek, vid) = (Arc::new(Dek::random()), Vid(random()?));
        let publisher = Publisher {
            releaser: self.releaser.clone(),
            // If it is to be known, it is there.
            hide_name: true,
            channels: channels.clone(),
            signers: order.publishers.clone(),
            keys: Arc::new(slots),
            dek: Arc::clone(&dek),
            terms,
            progress: order.progress.clone(),
        };
        let lease = Lease {
            issued_at: self.releaser.now,
            oids: match order.level {
                Level::NewKey => opened.manifest.objects().iter().map(|object| object.oid).collect(),
                Level::Reencrypt => Vec::new(),
            },
        };
        let lease_name = write_lease(chain, &lease).await?;
        let opened = Arc::new(opened);
        let made = async {
            let (objects, roots) = match order.level {
                Level::NewKey => hand_on(&opened)?,
                Level::Reencrypt => {
                    let work = Reencryption {
                        store: Arc::clone(&chain.store),
                        old: Arc::clone(&opened),
                        dek,
                        vid,
                        threads: order.threads.max(1),
                    };
                    (work.run(&order.progress).await?, Vec::new())
                }
            };
            let manifest = assemble(&opened.manifest, objects, vid, self.releaser.now, &old, order.level)?;
            // Hours may have gone by: the number follows what others published meanwhile, under whichever tag.
            self.check_withdraws(order, &[old.digest], u64::MAX, &mut warnings).await?;
            let survey = chain.survey(&channels).await?;
            publisher.publish(manifest, roots, survey).await
        }
        .await;
        if let Some(name) = lease_name {
            // Best effort: a lease left behind expires.
            if let Err(failed) = chain.store.delete(&name).await {
                tracing::debug!(%failed, name, "a lease stays behind");
            }
        }
        let Published { seq, digest, refs, unraised, warnings: more } = made?;
        warnings.extend(more);
        Ok(Rekeyed {
            level: order.level,
            from_version: old.header.seq,
            from_manifest: old.digest,
            version: seq,
            manifest: digest,
            vid,
            refs,
            finished: false,
            reencrypted_bytes: match order.level {
                Level::NewKey => 0,
                Level::Reencrypt => opened.manifest.objects().iter().map(|object| object.layout.plain_len()).sum(),
            },
            slots: shown.0,
            left_out: shown.1,
            left_alone: None,
            left_unlike: false,
            floor_raised: unraised.is_none(),
            unraised,
            warnings,
        })
    }

    /// The number of the version with this manifest, if that is still there.
    async fn seq_of(&self, digest: ManifestDigest) -> Option<u64> {
        let bytes = self.releaser.chain.read_manifest(digest, MANIFEST_BYTES_MAX).await.ok()?;
        ManifestHeader::parse_object(&bytes).ok().map(|(header, _)| header.seq)
    }

    /// A version that stands for `old`, or for which `old` stands, while channels still name the older of both: the run that
    /// made it died on the way. `None`: there is none, or `old` is to be replaced all the same, because it is not what this
    /// order makes or `another` one is wanted.
    async fn finish_earlier(
        &self,
        old: &Resolved,
        opened: &Opened,
        order: &Rekey,
        another: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Rekeyed>> {
        if let Some(of) = stands_for(&opened.manifest, order.level)
            && let Some((_, head)) = self.naming(of, warnings).await?.first()
        {
            let mut finished = self.move_on((head.seq, of), old, order, warnings).await?;
            if !another && is_sealed_for(old, order).await? {
                return Ok(Some(finished));
            }
            // Its tags name one version now, and that is to be replaced still.
            warnings.append(&mut finished.warnings);
            for (channel, _) in &finished.refs {
                let made = format!("version {}, which an earlier run made, is replaced in its turn", old.header.seq);
                warnings.push(format!("tag {channel} was moved first: {made}"));
            }
        }
        let mut seen = vec![old.digest];
        for (channel, head) in self.heads(warnings).await? {
            if seen.contains(&head.manifest_digest) || head.seq <= old.header.seq {
                continue;
            }
            seen.push(head.manifest_digest);
            let newer = self.resolve(&Wanted::Tag(channel)).await?;
            if newer.header.previous != Some(old.digest) {
                continue;
            }
            let keys = order.to.as_ref().unwrap_or(&order.keys);
            let manifest = match open(&newer, keys).await {
                Ok(opened) => opened.manifest,
                Err(shut) if shut.code() == Code::NoKey => continue,
                Err(other) => return Err(other),
            };
            // Sealed for others, perhaps: then it is not what this order would make.
            if stands_for(&manifest, order.level) == Some(old.digest) && is_sealed_for(&newer, order).await? {
                return self.move_on((old.header.seq, old.digest), &newer, order, warnings).await.map(Some);
            }
        }
        Ok(None)
    }

    /// Makes every channel name `newer` that still names what it stands for; without any there is nothing left to do but to
    /// remember the refs that name it.
    async fn move_on(
        &self,
        (from_version, from_manifest): (u64, ManifestDigest),
        newer: &Resolved,
        order: &Rekey,
        warnings: &mut Vec<String>,
    ) -> Result<Rekeyed> {
        let seq = newer.header.seq;
        self.check_withdraws(order, &[from_manifest, newer.digest], seq, warnings).await?;
        let min_version_seq = if order.withdraw_old { seq } else { 0 };
        let mut moves = Moves::default();
        for _ in 0..RACES_MAX {
            let mut behind = self.heads(warnings).await?;
            behind.retain(|(_, head)| {
                let withdraws = head.manifest_digest == newer.digest && head.min_version_seq < min_version_seq;
                head.manifest_digest == from_manifest || withdraws
            });
            if behind.is_empty() {
                break;
            }
            for (channel, head) in &behind {
                let target = RefTarget {
                    seq,
                    manifest_digest: newer.digest,
                    manifest_len: newer.manifest_bytes.len() as u64,
                    vid: newer.header.vid,
                    min_slots_generation: newer.slots.generation,
                    min_version_seq,
                    expires_at: head.expires_at,
                };
                match self.releaser.append(channel, Some(head), &target).await {
                    Ok(Appended { reference, unraised }) => {
                        moves.refs.push((channel.clone(), reference.ref_seq));
                        moves.floor(unraised, warnings);
                    }
                    Err(first) if first.code() == Code::Exists => {}
                    Err(other) => return Err(other),
                }
            }
        }
        // Whoever wrote these may have died before it raised the floor.
        for (channel, head) in self.naming(newer.digest, warnings).await? {
            if !moves.has(&channel) {
                moves.floor(self.releaser.chain.remember(&channel, &head).err(), warnings);
            }
        }
        Ok(Rekeyed {
            level: order.level,
            from_version,
            from_manifest,
            version: seq,
            manifest: newer.digest,
            vid: newer.header.vid,
            refs: moves.refs,
            finished: true,
            reencrypted_bytes: 0,
            slots: newer.slots.slots.iter().map(|slot| slot.label.clone()).collect(),
            left_out: Vec::new(),
            left_alone: None,
            left_unlike: false,
            floor_raised: moves.unraised.is_none(),
            unraised: moves.unraised,
            warnings: std::mem::take(warnings),
        })
    }

    /// A floor counts for all tags of a model: one above what another tag names would take that from its readers too.
    ///
    /// # Errors
    /// `USAGE` if a tag names a version below `floor` that is not among `replaced` and was not withdrawn before.
    async fn check_withdraws(
        &self,
        order: &Rekey,
        replaced: &[ManifestDigest],
        floor: u64,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        if !order.withdraw_old {
            return Ok(());
        }
        let heads = self.heads(warnings).await?;
        let withdrawn = (lowest_allowed(&heads)..floor, replaced);
        let others: Vec<String> = heads
            .iter()
            .filter(|(_, head)| withdrawn.0.contains(&head.seq) && !withdrawn.1.contains(&head.manifest_digest))
            .map(|(channel, head)| format!("{channel} (version {})", head.seq))
            .collect();
        if others.is_empty() {
            return Ok(());
        }
        let name = self.name();
        refuse!(
            Usage,
            "--withdraw-old would withdraw what other tags of {name} name: {}; rotate them all, with MODEL {name} and --all, \
             or rotate without it, move those tags, and withdraw then: `modelfs tag STORE {name} latest --min-version N`",
            others.join(", ")
        );
    }

    /// Withdraws every version below the lowest that a tag names, for the readers of each tag: after all were rotated. The
    /// versions `replaced` must be among them.
    ///
    /// # Errors
    /// `USAGE` if one of those would not be. `EXISTS` if others were first every time; what the signers and the store say, but
    /// for what came after the first ref, which is [`Withdrawn::unfinished`]. With an error nothing was withdrawn, unless it
    /// is that of an answer that was lost.
    pub async fn withdraw_below_tags(&self, replaced: &[u64]) -> Result<Withdrawn> {
        let (mut moves, mut warnings, mut below) = (Moves::default(), Vec::new(), 0);
        for _ in 0..RACES_MAX {
            let heads = match self.heads(&mut warnings).await {
                Ok(heads) => heads,
                Err(failed) => return moves.broke_off(below, failed, warnings),
            };
            let allowed = lowest_allowed(&heads);
            let named = || heads.iter().filter(|(_, head)| head.seq >= allowed);
            below = named().map(|(_, head)| head.seq).min().unwrap_or(allowed);
            if moves.refs.is_empty()
                && let Some(old) = replaced.iter().find(|&&old| old >= below)
            {
                refuse!(
                    Usage,
                    "version {old}, which was replaced, would stay: a tag still names version {below}, and the floor counts \
                     for all tags"
                );
            }
            let mut lost = false;
            for (channel, head) in named() {
                if head.min_version_seq >= below {
                    if !moves.has(channel) {
                        moves.floor(self.releaser.chain.remember(channel, head).err(), &mut warnings);
                    }
                    continue;
                }
                let target = RefTarget { min_version_seq: below, ..RefTarget::of(head) };
                match self.releaser.append(channel, Some(head), &target).await {
                    Ok(Appended { reference, unraised }) => {
                        moves.refs.push((channel.clone(), reference.ref_seq));
                        moves.floor(unraised, &mut warnings);
                    }
                    Err(first) if first.code() == Code::Exists => lost = true,
                    Err(failed) => {
                        let failed = failed.context(format!("tag {channel} does not say yet what was withdrawn"));
                        return moves.broke_off(below, failed, warnings);
                    }
                }
            }
            if !lost {
                return Ok(moves.withdrew(below, None, warnings));
            }
        }
        let name = self.name();
        let others = format!("others moved tags of {name} first {RACES_MAX} times in a row; try again later");
        moves.broke_off(below, Error::new(Code::Exists, others), warnings)
    }

    /// Who gets a slot in the new version, and the labels that are shown: new ones, and old ones that are left out.
    async fn plan_slots(
        &self,
        old: &Resolved,
        order: &Rekey,
        to: &Keys,
    ) -> Result<(NewSlots, (Vec<String>, Vec<String>))> {
        let (slots, header, keys) = (old.slots.clone(), old.header, Arc::clone(to));
        let (kept, left_out) = blocking(move || {
            let (mut kept, mut left_out) = (Vec::new(), Vec::new());
            for slot in &slots.slots {
                let list = if opens(&keys, &slots, &header, slot)? { &mut kept } else { &mut left_out };
                list.push(slot.label.clone());
            }
            Ok((kept, left_out))
        })
        .await?;
        // The labels that the same key had; which of several keys had which, the slots do not say.
        let label = if to.sources().len() == 1 && order.to.is_none() { kept.first().cloned() } else { None };
        let new = NewSlots { keys: Arc::clone(to), label };
        let labels = new.labels();
        Ok((new, (labels, left_out)))
    }
}

/// The slots of the new version.
struct NewSlots {
    keys: Keys,
    /// Of a single source.
    label: Option<String>,
}

impl NewSlots {
    fn labels(&self) -> Vec<String> {
        match &self.label {
            Some(label) => vec![label.clone()],
            None => self.keys.sources().iter().map(|source| source.default_label().to_owned()).collect(),
        }
    }
}

impl SlotKeys for NewSlots {
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        match &self.label {
            Some(label) => Ok(vec![self.keys.wrap_source(0, Some(label), dek, target, &[])?]),
            None => self.keys.wrap_all(dek, target),
        }
    }

    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        self.keys.unlock(slots, header)
    }

    fn opens(&self) -> bool {
        self.keys.sources().iter().any(KeySource::opens)
    }
}

async fn open(version: &Resolved, keys: &Keys) -> Result<Opened> {
    let (version, keys) = (version.clone(), Arc::clone(keys));
    blocking(move || {
        let (manifest, keys) = open_manifest(&version.manifest_bytes, version.unlock(&keys)?)?;
        Ok(Opened { manifest, keys })
    })
    .await
}

fn left_alone(old: &Resolved, order: &Rekey, why: String) -> Rekeyed {
    Rekeyed {
        level: order.level,
        from_version: old.header.seq,
        from_manifest: old.digest,
        version: old.header.seq,
        manifest: old.digest,
        vid: old.header.vid,
        refs: Vec::new(),
        finished: true,
        reencrypted_bytes: 0,
        slots: old.slots.slots.iter().map(|slot| slot.label.clone()).collect(),
        left_out: Vec::new(),
        left_alone: Some(why),
        left_unlike: false,
        floor_raised: true,
        unraised: None,
        warnings: Vec::new(),
    }
}

/// Whether this version has the slots that `order` would make, and no others: a slot too many is that of a key that is to go.
async fn is_sealed_for(version: &Resolved, order: &Rekey) -> Result<bool> {
    let (slots, header) = (version.slots.clone(), version.header);
    let keys = Arc::clone(&order.keys);
    let to = Arc::clone(order.to.as_ref().unwrap_or(&order.keys));
    blocking(move || {
        let (mut opened, mut recipients) = (0, Vec::new());
        for slot in &slots.slots {
            if opens(&to, &slots, &header, slot)? {
                opened += 1;
                continue;
            }
            match sealed_to(slot) {
                Some(recipient) => recipients.push(recipient),
                None => return Ok(false),
            }
        }
        let (openers, others): (Vec<_>, Vec<_>) = (0..to.sources().len()).partition(|&n| to.sources()[n].opens());
        if opened != openers.len() || recipients.len() != others.len() {
            return Ok(false);
        }
        if others.is_empty() {
            return Ok(true);
        }
        // Whose public half it is, a slot made for it says.
        let dek = to.unlock(&slots, &header).or_else(|_| keys.unlock(&slots, &header))?;
        let made = others.into_iter().map(|n| to.wrap_source(n, None, &dek, &SlotTarget::from(&header), &[]));
        let mut wanted: Vec<_> =
            made.map(|slot| Ok(sealed_to(&slot?))).collect::<Result<Option<Vec<_>>>>()?.unwrap_or_default();
        wanted.sort_unstable();
        recipients.sort_unstable();
        Ok(wanted == recipients)
    })
    .await
}

/// The highest floor of all tags: what lies below was withdrawn.
fn lowest_allowed(heads: &[(String, Ref)]) -> u64 {
    heads.iter().map(|(_, head)| head.min_version_seq).max().unwrap_or(0)
}

/// Which version `manifest` was made of by a rotation of this level.
fn stands_for(manifest: &Manifest, level: Level) -> Option<ManifestDigest> {
    let all: Value = serde_json::from_slice(manifest.annotations()).ok()?;
    let told = all.get(ANNOTATION)?;
    let of = told.get("of")?.as_str()?.strip_prefix("sha256:")?;
    if told.get("level")?.as_str()? != level.name()
        || manifest.header().previous.map(|digest| digest.to_string()) != Some(of.to_owned())
    {
        return None;
    }
    manifest.header().previous
}

/// Every object as it is, and the keys that open them, in order.
fn hand_on(old: &Opened) -> Result<(Vec<NewObject>, Vec<Secret<32>>)> {
    let manifest = &old.manifest;
    reserve_secrets(manifest.objects().len())?;
    let objects = (0..).zip(manifest.objects()).map(|(number, object)| NewObject {
        oid: object.oid,
        layout: object.layout,
        suite: object.suite,
        inherited: true,
        origin_vid: object.origin_vid,
        commit: object.commit,
        hashes: manifest.object_hashes(number).to_vec(),
        coded: manifest.object_coded(number),
    });
    let roots = manifest.objects().iter().map(|object| old.keys.object_root(object)).collect();
    Ok((objects.collect(), roots))
}

/// The files of `old`, in `objects` of the same number and layout.
fn assemble(
    old: &Manifest,
    objects: Vec<NewObject>,
    vid: Vid,
    now: i64,
    version: &Resolved,
    level: Level,
) -> Result<Manifest> {
    let mut builder = ManifestBuilder::new();
    for object in objects {
        builder.add_object(object);
    }
    for file in old.files() {
        builder.add_file(NewFile {
            path: old.path(file).to_owned(),
            mode: file.mode,
            size: file.size,
            sha256: file.sha256,
            mtime: file.mtime,
            extents: old.extents(file).to_vec(),
        });
    }
    builder.annotations(annotations(old, version.digest, level));
    let header = old.header();
    builder.finish(NewHeader {
        suite: header.suite,
        hash_alg: header.hash_alg,
        model_id: header.model_id,
        vid,
        seq: 1,
        created_at: now,
        msalt: [0; 32],
        previous: None,
    })
}

/// What the old version says of itself, and of which one this stands for. Left as it is where there is no room for that.
fn annotations(old: &Manifest, of: ManifestDigest, level: Level) -> Vec<u8> {
    let before = old.annotations();
    let all = if before.is_empty() { Some(Map::new()) } else { serde_json::from_slice(before).ok() };
    let Some(mut all) = all else { return before.to_vec() };
    all.insert(ANNOTATION.into(), json!({"of": format!("sha256:{of}"), "level": level.name()}));
    let json = serde_json::to_vec(&all).expect("a map of strings to values has a JSON form");
    if json.len() > ANNOTATIONS_BYTES_MAX as usize { before.to_vec() } else { json }
}
