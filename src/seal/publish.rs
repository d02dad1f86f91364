//! The last steps of a seal: slots, manifest, signature, a look at all of it as a reader, then the ref.
//!
//! Promises: the ref is written last, so that whatever dies before it leaves the old version served; a version that its
//! publisher cannot read back is never named; when two publish at once both end with versions of their own.
//! Spec: docs/FORMAT.md b.1. Held by: the tests of `seal`, which die at every write.

use std::sync::Arc;

use bytes::Bytes;
use zeroize::Zeroizing;

use super::chain::Survey;
use super::keys::{SlotKeys, SlotTarget};
use super::progress::{Meter, Phase, ProgressFn};
use super::release::{Appended, RefTarget, Releaser};
use super::{blocking, next, random};
use crate::crypto::{Dek, ModelKeys, Verify, open_chunk, open_manifest, scratch_len, seal_manifest};
use crate::error::{Class, Code, Error, Result};
use crate::format::{
    ChunkIndex, Manifest, ManifestDigest, ManifestHeader, Ref, SignatureObject, Slots, manifest_message, names,
};
use crate::keys::Signer;
use crate::mem::Secret;
use crate::refuse;
use crate::store::{ChunkSink, fetch_chunk};

/// How often a publisher that lost the race for a ref number tries the next.
const RACES_MAX: u32 = 64;
/// How often a write whose answer was lost is made again; the same bytes twice are one success.
const CREATES_MAX: u32 = 3;
/// Chunks that are read back and opened before a version is named.
const SAMPLE_CHUNKS: usize = 8;

pub struct Publisher {
    pub releaser: Releaser,
    pub hide_name: bool,
    /// The first one decides which version number is ours.
    pub channels: Vec<String>,
    /// The publisher keys: each signs the manifest.
    pub signers: Vec<Arc<dyn Signer>>,
    pub keys: Arc<dyn SlotKeys>,
    pub dek: Arc<Dek>,
    pub terms: Terms,
    pub progress: ProgressFn,
}

/// What the refs say beside which version it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terms {
    /// New content: whatever a channel named before, it names this now, until then (Unix seconds).
    New { expires_at: i64 },
    /// The same content in the place of `of`: only channels that still name that one are moved, and their refs end when
    /// they would have ended.
    InPlaceOf {
        of: ManifestDigest,
        /// Readers refuse every older version from then on.
        withdraw_older: bool,
    },
}

impl Terms {
    /// Others may have made or moved a tag since the order was looked at, and lost it to this version's floor.
    ///
    /// # Errors
    /// `USAGE` if a tag names a version that would be withdrawn and is not the one that is replaced.
    pub fn check_withdraws(&self, survey: &Survey) -> Result<()> {
        let Terms::InPlaceOf { of, withdraw_older: true } = self else { return Ok(()) };
        let allowed = survey.heads.values().map(|head| head.min_version_seq).max().unwrap_or(0);
        let stays = |head: &Ref| head.seq < allowed || head.manifest_digest == *of;
        match survey.heads.iter().find(|(_, head)| !stays(head)) {
            Some((channel, head)) => refuse!(
                Usage,
                "tag {channel} names version {}, which would be withdrawn; nothing was published: move that tag to a version that \
                 stays, or leave out --withdraw-old",
                head.seq
            ),
            None => Ok(()),
        }
    }

    /// Whether a channel whose newest ref is `before` is to be moved.
    fn moves(&self, before: Option<&Ref>) -> bool {
        match self {
            Terms::New { .. } => true,
            Terms::InPlaceOf { of, .. } => before.is_some_and(|before| before.manifest_digest == *of),
        }
    }
}

/// A version that a channel names.
#[derive(Debug)]
pub struct Published {
    pub seq: u64,
    pub digest: ManifestDigest,
    /// Channel and number of each ref written.
    pub refs: Vec<(String, u64)>,
    /// Why the floor of a channel is not raised to its ref; among the warnings too.
    pub unraised: Option<Error>,
    pub warnings: Vec<String>,
}

impl Published {
    fn named(&mut self, channel: &str, appended: Appended) {
        self.refs.push((channel.to_owned(), appended.reference.ref_seq));
        if let Some(failed) = appended.unraised {
            self.warnings.push(failed.chain());
            self.unraised.get_or_insert(failed);
        }
    }
}

impl Publisher {
    /// `roots`: those of the inherited objects, in the order of the manifest.
    pub async fn publish(
        &self,
        mut manifest: Manifest,
        roots: Vec<Secret<32>>,
        mut survey: Survey,
    ) -> Result<Published> {
        let slots_made = self.write_slots(&manifest).await?;
        let warnings = self.write_name().await?;
        let roots = Arc::new(roots);
        for _ in 0..RACES_MAX {
            let first = &self.channels[0];
            let before = survey.newest.get(first);
            if !self.terms.moves(before) {
                refuse!(Exists, "tag {first} was moved to another version meanwhile; nothing was published, try again");
            }
            self.terms.check_withdraws(&survey)?;
            let header = manifest.header_mut();
            header.seq = next(survey.highest_seq)?;
            header.msalt = random()?;
            header.previous = before.map(|reference| reference.manifest_digest);
            let (dek, roots) = (Arc::clone(&self.dek), Arc::clone(&roots));
            let bytes;
            (manifest, bytes) = blocking(move || {
                let bytes = seal_manifest(&mut manifest, &dek, &roots)?;
                Ok((manifest, Bytes::from(bytes)))
            })
            .await?;
            let digest = ManifestDigest::of(&bytes);
            let seq = manifest.header().seq;
            self.write_manifest(&bytes, digest, seq).await?;
            self.check_as_reader(&manifest, digest, bytes.len() as u64, &slots_made).await?;

            Meter::start(&self.progress, Phase::Publish, 0);
            let version = Version { header: *manifest.header(), digest, manifest_len: bytes.len() as u64 };
            match self.write_ref(first, before, &version).await {
                Ok(appended) => {
                    let mut published = Published { seq, digest, refs: Vec::new(), unraised: None, warnings };
                    published.named(first, appended);
                    self.move_tags(&version, survey, &mut published).await;
                    return Ok(published);
                }
                Err(lost) if lost.code() == Code::Exists => {
                    // Another publisher was first: this manifest has a number that is no longer ours.
                    self.forget(digest).await;
                    survey = self.releaser.chain.survey(&self.channels).await?;
                }
                Err(other) => return Err(other),
            }
        }
        refuse!(Exists, "other publishers were first {RACES_MAX} times in a row; try again later");
    }

    /// The version is out; a tag that cannot be moved is told, not failed.
    async fn move_tags(&self, version: &Version, mut survey: Survey, published: &mut Published) {
        for channel in &self.channels[1..] {
            let mut races = 0;
            let moved = loop {
                let before = survey.newest.get(channel);
                if !self.terms.moves(before) {
                    break Err(Error::new(Code::Exists, "it names another version meanwhile"));
                }
                match self.write_ref(channel, before, version).await {
                    Err(lost) if lost.code() == Code::Exists && races < RACES_MAX => {
                        races += 1;
                        match self.releaser.chain.survey(&self.channels).await {
                            Ok(again) => survey = again,
                            Err(failed) => break Err(failed),
                        }
                    }
                    other => break other,
                }
            };
            match moved {
                Ok(appended) => published.named(channel, appended),
                Err(failed) => published.warnings.push(format!(
                    "version {} is published, but tag {channel} was not moved: {}",
                    version.header.seq,
                    failed.chain()
                )),
            }
        }
    }

    async fn write_slots(&self, manifest: &Manifest) -> Result<Slots> {
        let ManifestHeader { suite, model_id, vid, .. } = *manifest.header();
        let dek_commit = self.dek.commitment(suite, model_id, vid);
        let (keys, dek) = (Arc::clone(&self.keys), Arc::clone(&self.dek));
        let wrapped = blocking(move || keys.wrap(&dek, &SlotTarget { model_id, vid, dek_commit })).await?;
        let slots = Slots { generation: 1, model_id, vid, dek_commit, slots: wrapped };
        self.create(&names::slots(model_id, vid, 1), slots.encode()?.into()).await?;
        Ok(slots)
    }

    async fn write_name(&self) -> Result<Vec<String>> {
        if self.hide_name {
            return Ok(Vec::new());
        }
        let name = names::model_name(self.releaser.chain.model_id);
        match self.create(&name, Bytes::copy_from_slice(self.releaser.chain.model_name.as_bytes())).await {
            Ok(()) => Ok(Vec::new()),
            // Readers believe no name that does not hash to its model, so the one there does no harm.
            Err(taken) if taken.code() == Code::Exists => {
                Ok(vec![format!("{name} holds another name; listings will not show this model by name")])
            }
            Err(other) => Err(other),
        }
    }

    async fn write_manifest(&self, bytes: &Bytes, digest: ManifestDigest, seq: u64) -> Result<()> {
        let model_id = self.releaser.chain.model_id;
        let signers = self.signers.clone();
        let message = manifest_message(digest, model_id, seq);
        let signed = blocking(move || {
            let sign = |signer: &Arc<dyn Signer>| Ok((signer.public().key_id(), signer.sign(&message)?));
            signers.iter().map(sign).collect::<Result<Vec<_>>>()
        })
        .await?;
        for signer in &self.signers {
            self.releaser.offer(&**signer).await?;
        }
        self.create(&names::manifest(model_id, digest), bytes.clone()).await?;
        for (key_id, signature) in signed {
            let object = SignatureObject { key_id, manifest_digest: digest, signature };
            let name = names::signature(model_id, digest, key_id);
            self.create(&name, Bytes::copy_from_slice(&object.encode())).await?;
        }
        Ok(())
    }

    /// Reads back what a reader will read: slots, manifest, signature, the length of every object, some chunks. Nobody but
    /// the recipients can unwrap what is sealed to public keys: those slots are compared with the ones that were made, and
    /// their commitment with the signed one.
    async fn check_as_reader(&self, sealed: &Manifest, digest: ManifestDigest, len: u64, made: &Slots) -> Result<()> {
        let chain = &self.releaser.chain;
        let unreadable = |e: Error| e.context("what was written cannot be read back; nothing was published");
        let slots = chain.read_slots(made.vid, made.generation).await.map_err(unreadable)?;
        let bytes = chain.read_manifest(digest, len).await.map_err(unreadable)?;
        chain.check_signed(digest, sealed.header().seq).await.map_err(unreadable)?;
        if slots != *made {
            refuse!(
                SlotsFormat,
                "the slots that were read back are not those that were written; nothing was published"
            );
        }
        let (keys, dek) = (Arc::clone(&self.keys), Arc::clone(&self.dek));
        let (manifest, keys) = blocking(move || {
            let (header, _) = ManifestHeader::parse_object(&bytes)?;
            if slots.dek_commit != header.dek_commit {
                refuse!(DekCommit, "slots and manifest are of different keys");
            }
            let dek = if keys.opens() { keys.unlock(&slots, &header)? } else { dek.copy() };
            open_manifest(&bytes, dek)
        })
        .await
        .map_err(unreadable)?;
        if manifest != *sealed {
            refuse!(
                ManFormat,
                "the manifest that was read back is not the one that was written; nothing was published"
            );
        }
        let wanted = manifest.objects().iter().map(|object| (object.oid, object.stored_len())).collect();
        let there = chain.present(wanted).await?;
        if let Some(lost) = there.iter().position(|&there| !there) {
            refuse!(
                Length,
                "object {} is gone or has another length; nothing was published",
                manifest.objects()[lost].oid
            );
        }
        self.check_sample(manifest, keys).await.map_err(unreadable)
    }

    async fn check_sample(&self, manifest: Manifest, keys: ModelKeys) -> Result<()> {
        let sample = sample(&manifest)?;
        let stored = |&(object, index): &(u32, ChunkIndex)| manifest.chunk_shape(object, index).stored_len();
        let total = sample.iter().map(stored).sum();
        let meter = Meter::start(&self.progress, Phase::Verify, total);
        let (mut shared, mut slot) = (Arc::new((manifest, keys)), Zeroizing::new(Vec::new()));
        for (object, index) in sample {
            let entry = shared.0.objects()[object as usize];
            let chunk = fetch_chunk(&*self.releaser.chain.store, &shared.0, object, index).await?;
            let len = chunk.stored_len();
            (shared, slot) = blocking(move || {
                let plain_len =
                    usize::try_from(entry.layout.chunk_plain_len(index)).expect("a chunk is at most 64 MiB");
                // Wiped before it is resized: a vector that moves leaves its old place behind.
                zeroize::Zeroize::zeroize(&mut *slot);
                slot.resize(plain_len, 0);
                let mut scratch = Zeroizing::new(vec![0; scratch_len(&entry)]);
                open_chunk(&shared.1, &shared.0, object, &chunk, Verify::Strict, &mut slot, &mut scratch)?;
                Ok((shared, slot))
            })
            .await?;
            meter.add(len);
        }
        Ok(())
    }

    /// The commit point.
    async fn write_ref(&self, channel: &str, before: Option<&Ref>, version: &Version) -> Result<Appended> {
        let seq = version.header.seq;
        let (expires_at, min_version_seq) = match self.terms {
            Terms::New { expires_at } => (expires_at, 0),
            Terms::InPlaceOf { withdraw_older, .. } => {
                (before.map_or(i64::MAX, |before| before.expires_at), if withdraw_older { seq } else { 0 })
            }
        };
        let target = RefTarget {
            seq,
            manifest_digest: version.digest,
            manifest_len: version.manifest_len,
            vid: version.header.vid,
            min_slots_generation: 1,
            min_version_seq,
            expires_at,
        };
        self.releaser.append(channel, before, &target).await
    }

    /// The manifest of a lost race. It would only lie about, so it may stay if the store does not let us delete.
    async fn forget(&self, digest: ManifestDigest) {
        let model_id = self.releaser.chain.model_id;
        let signatures = self.signers.iter().map(|signer| names::signature(model_id, digest, signer.public().key_id()));
        for name in signatures.chain([names::manifest(model_id, digest)]) {
            if let Err(failed) = self.releaser.chain.store.delete(&name).await {
                tracing::debug!(%failed, name, "an unnamed object stays behind");
            }
        }
    }

    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        create(&*self.releaser.chain.store, name, bytes).await
    }
}

/// Creates, and asks again when the answer was lost: what is there with the same bytes is ours.
pub async fn create(store: &dyn ChunkSink, name: &str, bytes: Bytes) -> Result<()> {
    let mut tries = 1;
    loop {
        match store.create(name, bytes.clone()).await {
            Err(lost) if lost.class() == Class::Unreachable && tries < CREATES_MAX => tries += 1,
            other => return other,
        }
    }
}

/// The version being published.
struct Version {
    header: ManifestHeader,
    digest: ManifestDigest,
    manifest_len: u64,
}

/// Some chunks of some objects at random, the last chunk of the last object among them.
fn sample(manifest: &Manifest) -> Result<Vec<(u32, ChunkIndex)>> {
    let objects = manifest.objects();
    let Some(last) = objects.last() else { return Ok(Vec::new()) };
    let count = |object: usize| u32::try_from(objects[object].layout.chunk_count()).expect("at most 2^20 chunks");
    let mut sample =
        vec![(objects.len() - 1, u32::try_from(last.layout.chunk_count() - 1).expect("at most 2^20 chunks"))];
    for _ in 1..SAMPLE_CHUNKS {
        let dice = u128::from_le_bytes(random()?);
        let object = (dice as u64 % objects.len() as u64) as usize;
        let index = ((dice >> 64) as u64 % u64::from(count(object))) as u32;
        sample.push((object, index));
    }
    sample.sort_unstable();
    sample.dedup();
    let number = |object: usize| u32::try_from(object).expect("at most 10^6 objects");
    Ok(sample.into_iter().map(|(object, index)| (number(object), ChunkIndex(index))).collect())
}
