//! The last steps of a seal: slots, manifest, signature, a look at all of it as a reader, then the ref.
//!
//! Promises: the ref is written last, so that whatever dies before it leaves the old version served; a version that its
//! publisher cannot read back is never named; when two publish at once both end with versions of their own.
//! Spec: docs/FORMAT.md b.1. Held by: the tests of `seal`, which die at every write.

use std::sync::Arc;

use bytes::Bytes;
use zeroize::Zeroizing;

use super::chain::{Chain, Survey};
use super::keys::{SlotKeys, SlotTarget};
use super::progress::{Meter, Phase, ProgressFn};
use super::{blocking, random};
use crate::crypto::{Dek, ModelKeys, SigningKey, Verify, open_chunk, open_manifest, scratch_len, seal_manifest};
use crate::error::{Class, Code, Error, Result};
use crate::format::{
    ChannelId, ChunkIndex, Manifest, ManifestDigest, ManifestHeader, Ref, RefSignature, SignatureObject, Slots,
    manifest_message, names,
};
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
    pub chain: Chain,
    pub hide_name: bool,
    /// The first one decides which version number is ours.
    pub channels: Vec<String>,
    pub signing: Arc<SigningKey>,
    pub keys: Arc<dyn SlotKeys>,
    pub dek: Arc<Dek>,
    pub now: i64,
    pub expires_at: i64,
    pub progress: ProgressFn,
}

/// A version that a channel names.
#[derive(Debug)]
pub struct Published {
    pub seq: u64,
    pub digest: ManifestDigest,
    /// Channel and number of each ref written.
    pub refs: Vec<(String, u64)>,
    pub warnings: Vec<String>,
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
        let mut warnings = self.write_name().await?;
        let roots = Arc::new(roots);
        for _ in 0..RACES_MAX {
            let first = &self.channels[0];
            let before = survey.newest.get(first);
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
                Ok(ref_seq) => {
                    let mut refs = vec![(first.clone(), ref_seq)];
                    self.move_tags(&version, survey, &mut refs, &mut warnings).await;
                    return Ok(Published { seq, digest, refs, warnings });
                }
                Err(lost) if lost.code() == Code::Exists => {
                    // Another publisher was first: this manifest has a number that is no longer ours.
                    self.forget(digest).await;
                    survey = self.chain.survey(&self.channels).await?;
                }
                Err(other) => return Err(other),
            }
        }
        refuse!(Exists, "other publishers were first {RACES_MAX} times in a row; try again later");
    }

    /// The version is out; a tag that cannot be moved is told, not failed.
    async fn move_tags(
        &self,
        version: &Version,
        mut survey: Survey,
        refs: &mut Vec<(String, u64)>,
        warnings: &mut Vec<String>,
    ) {
        for channel in &self.channels[1..] {
            let mut races = 0;
            let moved = loop {
                match self.write_ref(channel, survey.newest.get(channel), version).await {
                    Err(lost) if lost.code() == Code::Exists && races < RACES_MAX => {
                        races += 1;
                        match self.chain.survey(&self.channels).await {
                            Ok(again) => survey = again,
                            Err(failed) => break Err(failed),
                        }
                    }
                    other => break other,
                }
            };
            match moved {
                Ok(ref_seq) => refs.push((channel.clone(), ref_seq)),
                Err(failed) => warnings.push(format!(
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
        let name = names::model_name(self.chain.model_id);
        match self.create(&name, Bytes::copy_from_slice(self.chain.model_name.as_bytes())).await {
            Ok(()) => Ok(Vec::new()),
            // Readers believe no name that does not hash to its model, so the one there does no harm.
            Err(taken) if taken.code() == Code::Exists => {
                Ok(vec![format!("{name} holds another name; listings will not show this model by name")])
            }
            Err(other) => Err(other),
        }
    }

    async fn write_manifest(&self, bytes: &Bytes, digest: ManifestDigest, seq: u64) -> Result<()> {
        let model_id = self.chain.model_id;
        let signature = self.signing.sign(&manifest_message(digest, model_id, seq));
        let key_id = self.signing.public().key_id();
        let object = SignatureObject { key_id, manifest_digest: digest, signature };
        // For readers who were asked to trust on first use; nobody else looks at it.
        let public = self.signing.public();
        self.create(&names::public_key(model_id, key_id), Bytes::copy_from_slice(public.bytes())).await?;
        self.create(&names::manifest(model_id, digest), bytes.clone()).await?;
        self.create(&names::signature(model_id, digest, key_id), Bytes::copy_from_slice(&object.encode())).await
    }

    /// Reads back what a reader will read: slots, manifest, signature, the length of every object, some chunks.
    async fn check_as_reader(&self, sealed: &Manifest, digest: ManifestDigest, len: u64, made: &Slots) -> Result<()> {
        let chain = &self.chain;
        let unreadable = |e: Error| e.context("what was written cannot be read back; nothing was published");
        let slots = chain.read_slots(made.vid, made.generation).await.map_err(unreadable)?;
        let bytes = chain.read_manifest(digest, len).await.map_err(unreadable)?;
        chain.check_signed(digest, sealed.header().seq).await.map_err(unreadable)?;
        let keys = Arc::clone(&self.keys);
        let (manifest, keys) = blocking(move || {
            let (header, _) = ManifestHeader::parse_object(&bytes)?;
            open_manifest(&bytes, keys.unlock(&slots, &header)?)
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
            let chunk = fetch_chunk(&*self.chain.store, &shared.0, object, index).await?;
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

    /// The commit point. Answers the number of the ref.
    async fn write_ref(&self, channel: &str, before: Option<&Ref>, version: &Version) -> Result<u64> {
        let ref_seq = next(before.map_or(0, |reference| reference.ref_seq))?;
        let ManifestHeader { model_id, vid, seq, .. } = version.header;
        let reference = Ref {
            n_sigs: 1,
            model_id,
            channel_id: ChannelId::of_name(channel),
            ref_seq,
            seq,
            manifest_digest: version.digest,
            manifest_len: version.manifest_len,
            vid,
            // Never older than the ref before: readers remember the highest they saw.
            issued_at: before.map_or(self.now, |reference| reference.issued_at.max(self.now)),
            expires_at: self.expires_at,
            min_slots_generation: 1,
            min_version_seq: before.map_or(0, |reference| reference.min_version_seq),
            previous: before.map_or([0; 32], Ref::head_digest),
        };
        let signature = self.signing.sign(&reference.message());
        let bytes =
            Bytes::from(reference.encode(&[RefSignature { key_id: self.signing.public().key_id(), signature }]));
        self.create(&names::reference(model_id, channel, ref_seq), bytes.clone()).await?;
        // A hint: readers look for the next number themselves.
        if let Err(failed) = self.chain.store.replace_hint(&names::head(model_id, channel), bytes).await {
            tracing::warn!(%failed, channel, "the hint at the newest ref was not written");
        }
        // Behind by one is harmless: a reader here will see the ref, and remember it.
        if let Err(failed) = self.chain.remember(channel, &reference) {
            tracing::warn!(%failed, channel, "the version published is not remembered here");
        }
        Ok(ref_seq)
    }

    /// The manifest of a lost race. It would only lie about, so it may stay if the store does not let us delete.
    async fn forget(&self, digest: ManifestDigest) {
        let (model_id, key_id) = (self.chain.model_id, self.signing.public().key_id());
        for name in [names::signature(model_id, digest, key_id), names::manifest(model_id, digest)] {
            if let Err(failed) = self.chain.store.delete(&name).await {
                tracing::debug!(%failed, name, "an unnamed object stays behind");
            }
        }
    }

    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        create(&*self.chain.store, name, bytes).await
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

fn next(number: u64) -> Result<u64> {
    number.checked_add(1).ok_or_else(|| Error::new(Code::FastForward, "the highest number there is has been used"))
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
