//! What a model's channels say so far: the newest refs, the highest version number, the version to build upon.
//!
//! In: a store, which is hostile, and the keys a publisher trusts. Out: verified refs only.
//! Promises: nothing unsigned decides a number that will be signed; the newest ref of a channel that is to be continued
//! must verify, or nothing is published there.
//! Spec: docs/FORMAT.md b.1.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::stream::{self, StreamExt, TryStreamExt};

use super::keys::SlotKeys;
use super::{blocking, unix_now};
use crate::crypto::{ModelKeys, PublicKey, open_manifest};
use crate::error::{Class, Code, Error, Result};
use crate::format::{
    ChannelId, Manifest, ManifestDigest, ManifestHeader, ModelId, Ref, SIGNATURE_LEN, SignatureObject, Slots, Vid,
    limits, manifest_message, names,
};
use crate::keys::{FloorPolicy, FloorStore, Raised, check_ref};
use crate::refuse;
use crate::store::ChunkSink;

/// Of each channel so many refs are looked at for the highest version number. A version is named by a ref of `latest`
/// when it is made, so older ones matter only after as many rollbacks in a row.
const REFS_PER_CHANNEL_MAX: usize = 1024;
/// Small objects read at a time.
const READS_IN_FLIGHT: usize = 16;
/// How often the newest slots are looked for again because a rotation deleted them just then.
const SLOTS_READS_MAX: usize = 16;

/// A model on a store, as its publisher sees it.
#[derive(Clone)]
pub struct Chain {
    pub store: Arc<dyn ChunkSink>,
    pub model_id: ModelId,
    pub model_name: Arc<str>,
    /// Whose refs are believed.
    pub trusted: Arc<Vec<PublicKey>>,
    /// Whose manifests are: a release key alone makes no version.
    pub publishers: Arc<Vec<PublicKey>>,
    pub floors: Option<FloorStore>,
}

/// The state a new version continues.
#[derive(Debug, Default)]
pub struct Survey {
    /// Over all channels; 0 for a new model.
    pub highest_seq: u64,
    /// The newest ref of each channel that is to be continued.
    pub newest: BTreeMap<String, Ref>,
    /// The newest ref of each channel, but for those whose newest ref is somebody else's.
    pub heads: BTreeMap<String, Ref>,
}

/// An earlier version, opened.
#[derive(Debug)]
pub struct Earlier {
    pub manifest: Manifest,
    pub keys: ModelKeys,
}

impl Chain {
    /// # Errors
    /// `REF_SIG`, `REF_KEY` and the like if the newest ref of one of `channels` is not one of ours; what the store says.
    pub async fn survey(&self, channels: &[String]) -> Result<Survey> {
        let prefix = names::refs_dir(self.model_id);
        let mut refs: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for listed in self.store.list(&prefix).await? {
            let rest = listed.name.strip_prefix(&prefix).and_then(|rest| rest.split_once('/'));
            if let Some((channel, leaf)) = rest
                && let (Some(channel), Some(ref_seq)) = (names::channel(channel), names::ref_seq(leaf))
            {
                refs.entry(channel.to_owned()).or_default().push(ref_seq);
            }
        }
        let mut survey = Survey::default();
        for (channel, mut numbers) in refs {
            numbers.sort_unstable_by(|a, b| b.cmp(a));
            numbers.truncate(REFS_PER_CHANNEL_MAX);
            let continued = channels.contains(&channel);
            let reads = numbers.iter().map(|&ref_seq| self.read_ref(&channel, ref_seq));
            let read: Vec<Result<Ref>> = stream::iter(reads).buffered(READS_IN_FLIGHT).collect().await;
            for (position, reference) in read.into_iter().enumerate() {
                match reference {
                    Ok(reference) => {
                        survey.highest_seq = survey.highest_seq.max(reference.seq);
                        if position == 0 {
                            survey.heads.insert(channel.clone(), reference);
                        }
                        if position == 0 && continued {
                            survey.newest.insert(channel.clone(), reference);
                        }
                    }
                    Err(bad) if position == 0 && continued => {
                        return Err(bad.context(format!("channel {channel} cannot be continued")));
                    }
                    Err(lost) if lost.class() == Class::Unreachable => return Err(lost),
                    // Somebody else's, or rubbish: it decides nothing.
                    Err(_) => {}
                }
            }
        }
        self.check_floors(channels, &survey)?;
        Ok(survey)
    }

    /// A store that went back must not be built upon: readers who remember would refuse what comes of it.
    fn check_floors(&self, channels: &[String], survey: &Survey) -> Result<()> {
        let Some(floors) = &self.floors else { return Ok(()) };
        for channel in channels {
            floors.judge_and_raise(&self.store.describe(), self.model_id, channel, |floor| {
                match (floor, survey.newest.get(channel)) {
                    (Some(floor), None) => {
                        refuse!(
                            Rollback,
                            "channel {channel} is empty, but ref {} of it was seen before",
                            floor.max_ref_seq
                        );
                    }
                    (floor, Some(newest)) => {
                        // An expired ref is what a new version is for.
                        let policy = FloorPolicy { freeze_warn: true, ..FloorPolicy::default() };
                        check_ref(floor, &policy, unix_now(), newest)
                            .map_err(|e| e.context(format!("channel {channel} cannot be continued")))
                            .map(drop)
                    }
                    (None, None) => Ok(()),
                }
            })?;
        }
        Ok(())
    }

    /// Remembers a ref that we wrote, or that stands as we would have written it, here and where the floor is kept outside
    /// this machine. Doing it again changes nothing.
    ///
    /// # Errors
    /// `FORK`, `STATE`, what the pin says; the message tells what raises the floor later. The ref stands.
    pub fn remember(&self, channel: &str, reference: &Ref) -> Result<()> {
        let Some(floors) = &self.floors else { return Ok(()) };
        let model = (self.model_id, &*self.model_name);
        let slots = (reference.vid, reference.min_slots_generation.max(1));
        let stands = format!("ref {} of tag {channel} stands", reference.ref_seq);
        match floors.raise(&self.store.describe(), model, channel, reference, slots) {
            Ok(Raised::Everywhere) => Ok(()),
            Ok(Raised::InPinOnly(failed)) => Err(failed.context(format!(
                "{stands}, and the floor kept elsewhere is raised to it, but this machine does not remember it"
            ))),
            Err(failed) => {
                let command = format!("modelfs floor {} {}", self.store.describe(), self.model_name);
                let later = match (failed.code(), floors.has_pin()) {
                    (Code::Fork, _) => format!("look at both refs: `{command}`"),
                    (_, true) => {
                        format!("once that is mended, `{command} --raise --floor vault-kv:MOUNT/PATH` raises it")
                    }
                    (_, false) => "the next command here that sees it remembers it".to_owned(),
                };
                Err(failed.context(format!("{stands}, but the floor is not raised to it; {later}")))
            }
        }
    }

    async fn read_ref(&self, channel: &str, ref_seq: u64) -> Result<Ref> {
        let name = names::reference(self.model_id, channel, ref_seq);
        let bytes = self.store.read_small(&name, limits::REF_BYTES_MAX as u64).await?;
        let (reference, signatures) = Ref::parse(&bytes)?;
        if reference.model_id != self.model_id {
            refuse!(RefModel, "{name} is a ref of model {}", reference.model_id);
        }
        if reference.channel_id != ChannelId::of_name(channel) || reference.ref_seq != ref_seq {
            refuse!(RefChannel, "{name} is a ref of another channel or number");
        }
        let message = reference.message();
        let Some((key, signature)) = signatures.iter().find_map(|signature| {
            let key = self.trusted.iter().find(|key| key.key_id() == signature.key_id)?;
            Some((key, signature))
        }) else {
            refuse!(RefKey, "{name} is signed by none of the keys trusted here; name its publisher's with --trust");
        };
        if !key.verify_strict(&message, &signature.signature) {
            refuse!(RefSig, "{name} does not verify under key {key}");
        }
        Ok(reference)
    }

    /// Opens the version that `reference` names, to inherit from it.
    ///
    /// # Errors
    /// Whatever a reader would refuse, and `NO_KEY` if no key at hand opens it.
    pub async fn open(&self, reference: &Ref, keys: &Arc<dyn SlotKeys>) -> Result<Earlier> {
        let bytes = self.read_manifest(reference.manifest_digest, reference.manifest_len).await?;
        let (header, _) = ManifestHeader::parse_object(&bytes)?;
        if (header.model_id, header.seq, header.vid) != (self.model_id, reference.seq, reference.vid) {
            refuse!(ManModel, "manifest {} is not the version its ref names", reference.manifest_digest);
        }
        self.check_signed(reference.manifest_digest, header.seq).await?;
        let slots = self.newest_slots(header.vid).await?;
        let keys = Arc::clone(keys);
        blocking(move || {
            let dek = keys.unlock(&slots, &header)?;
            let (manifest, keys) = open_manifest(&bytes, dek)?;
            Ok(Earlier { manifest, keys })
        })
        .await
    }

    /// A manifest with this digest, whatever else it is.
    pub async fn read_manifest(&self, digest: ManifestDigest, len: u64) -> Result<bytes::Bytes> {
        let name = names::manifest(self.model_id, digest);
        let bytes = self.store.read_small(&name, len).await.map_err(|e| match e.code() {
            Code::Limit => {
                Error::new(Code::ManLen, format!("manifest {digest} is longer than {len} bytes")).with_source(e)
            }
            _ => e,
        })?;
        if ManifestDigest::of(&bytes) != digest {
            refuse!(ManDigest, "manifest {digest} does not have its digest");
        }
        Ok(bytes)
    }

    /// One trusted publisher must have signed the manifest.
    pub async fn check_signed(&self, digest: ManifestDigest, seq: u64) -> Result<()> {
        let message = manifest_message(digest, self.model_id, seq);
        for key in self.publishers.iter() {
            let name = names::signature(self.model_id, digest, key.key_id());
            match self.store.read_small(&name, SIGNATURE_LEN as u64).await {
                Ok(bytes) => {
                    let object = SignatureObject::parse(&bytes)?;
                    let named = object.key_id == key.key_id() && object.manifest_digest == digest;
                    if !named || !key.verify_strict(&message, &object.signature) {
                        refuse!(ManSig, "{name} does not verify");
                    }
                    return Ok(());
                }
                Err(missing) if missing.code() == Code::NotFound => {}
                Err(other) => return Err(other),
            }
        }
        refuse!(ManSig, "manifest {digest} is signed by none of the publishers trusted here");
    }

    pub async fn newest_slots(&self, vid: Vid) -> Result<Slots> {
        let mut vanished = None;
        // A rotation may delete the generation between the listing and the read.
        for _ in 0..SLOTS_READS_MAX {
            let Some(generation) = self.slots_generations(vid).await?.pop() else {
                refuse!(NotFound, "version {vid} has no key slots");
            };
            match self.read_slots(vid, generation).await {
                Err(gone) if gone.code() == Code::NotFound => vanished = Some(gone),
                read => return read,
            }
        }
        Err(vanished.expect("every round ended with a vanished object"))
    }

    /// The generations of a version's slots that the store shows, ascending.
    pub async fn slots_generations(&self, vid: Vid) -> Result<Vec<u32>> {
        let listed = self.store.list(&names::slots_dir(self.model_id, vid)).await?;
        let mut generations: Vec<u32> =
            listed.iter().filter_map(|listed| names::slots_generation(&listed.name)).collect();
        generations.sort_unstable();
        Ok(generations)
    }

    pub async fn read_slots(&self, vid: Vid, generation: u32) -> Result<Slots> {
        let name = names::slots(self.model_id, vid, generation);
        let slots = Slots::parse(&self.store.read_small(&name, limits::SLOTS_BYTES_MAX as u64).await?)?;
        if (slots.model_id, slots.vid, slots.generation) != (self.model_id, vid, generation) {
            refuse!(SlotsModel, "{name} holds the slots of another version or generation");
        }
        Ok(slots)
    }

    /// Looks at every object named: those that are there with the length wanted.
    pub async fn present(&self, wanted: Vec<(crate::format::Oid, u64)>) -> Result<Vec<bool>> {
        let looks = wanted.into_iter().map(|(oid, stored_len)| async move {
            match self.store.size(&names::data(self.model_id, oid)).await {
                Ok(size) => Ok(size == stored_len),
                Err(missing) if missing.code() == Code::NotFound => Ok(false),
                Err(other) => Err(other),
            }
        });
        stream::iter(looks).buffered(READS_IN_FLIGHT).try_collect().await
    }
}
