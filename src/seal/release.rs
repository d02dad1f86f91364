//! Writes the next ref of a channel: the commit point of a seal, of a tag, of a rollback and of a rotation.
//!
//! In: the newest ref, verified, and what the next one shall say. Out: a signed ref in the store, remembered here.
//! Promises: refs are chained and created, never replaced; when somebody else was first the answer is `EXISTS` and
//! nothing was changed; a floor that was not raised is told, and takes nothing back.
//! Spec: docs/FORMAT.md a.6, b.1. Held by: the tests of `seal`, which die at every write.

use std::sync::Arc;

use bytes::Bytes;

use super::chain::Chain;
use super::publish::create;
use super::{blocking, next};
use crate::error::{Error, Result};
use crate::format::{ChannelId, ManifestDigest, Ref, RefSignature, Vid, names};
use crate::keys::Signer;

/// The version that a ref shall name, and the floors that it sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefTarget {
    pub seq: u64,
    pub manifest_digest: ManifestDigest,
    pub manifest_len: u64,
    pub vid: Vid,
    pub min_slots_generation: u32,
    /// Never below that of the ref before.
    pub min_version_seq: u64,
    /// Unix seconds; `i64::MAX`: never.
    pub expires_at: i64,
}

impl RefTarget {
    /// What `reference` names, with its floors.
    pub fn of(reference: &Ref) -> RefTarget {
        RefTarget {
            seq: reference.seq,
            manifest_digest: reference.manifest_digest,
            manifest_len: reference.manifest_len,
            vid: reference.vid,
            min_slots_generation: reference.min_slots_generation,
            min_version_seq: reference.min_version_seq,
            expires_at: reference.expires_at,
        }
    }
}

/// A ref that was written: whatever becomes of the floor, readers see it.
#[derive(Debug)]
pub struct Appended {
    pub reference: Ref,
    /// Why the floor is not raised to it.
    pub unraised: Option<Error>,
}

/// Whoever may move a model's channels: the release keys, 1 to 4.
#[derive(Clone)]
pub struct Releaser {
    pub chain: Chain,
    pub signers: Vec<Arc<dyn Signer>>,
    /// Unix seconds.
    pub now: i64,
}

impl Releaser {
    /// Creates the ref that follows `before` in `channel`.
    ///
    /// # Errors
    /// `EXISTS` if somebody else wrote that number first: survey again and decide again. What the signers and the store
    /// say; then nothing was published, or (an answer that was lost) exactly this ref was.
    pub async fn append(&self, channel: &str, before: Option<&Ref>, target: &RefTarget) -> Result<Appended> {
        let model_id = self.chain.model_id;
        let reference = Ref {
            n_sigs: u8::try_from(self.signers.len()).expect("1 to 4 release keys"),
            model_id,
            channel_id: ChannelId::of_name(channel),
            ref_seq: next(before.map_or(0, |reference| reference.ref_seq))?,
            seq: target.seq,
            manifest_digest: target.manifest_digest,
            manifest_len: target.manifest_len,
            vid: target.vid,
            // Never older than the ref before: readers remember the highest they saw.
            issued_at: before.map_or(self.now, |reference| reference.issued_at.max(self.now)),
            expires_at: target.expires_at,
            min_slots_generation: target.min_slots_generation,
            min_version_seq: target.min_version_seq.max(before.map_or(0, |reference| reference.min_version_seq)),
            previous: before.map_or([0; 32], Ref::head_digest),
        };
        let signers = self.signers.clone();
        let signatures = blocking(move || {
            let sign = |signer: &Arc<dyn Signer>| {
                let signature = signer.sign(&reference.message())?;
                Ok(RefSignature { key_id: signer.public().key_id(), signature })
            };
            signers.iter().map(sign).collect::<Result<Vec<RefSignature>>>()
        })
        .await?;
        for signer in &self.signers {
            self.offer(&**signer).await?;
        }
        let bytes = Bytes::from(reference.encode(&signatures));
        let store = &self.chain.store;
        create(&**store, &names::reference(model_id, channel, reference.ref_seq), bytes.clone()).await?;
        // A hint: readers look for the next number themselves.
        if let Err(failed) = store.replace_hint(&names::head(model_id, channel), bytes).await {
            tracing::warn!(%failed, channel, "the hint at the newest ref was not written");
        }
        // Behind by one is harmless: the ref stands, and a reader here will see and remember it.
        let unraised = self.chain.remember(channel, &reference).err();
        Ok(Appended { reference, unraised })
    }

    /// For readers who were asked to trust on first use; nobody else looks at it.
    pub(super) async fn offer(&self, signer: &dyn Signer) -> Result<()> {
        let public = signer.public();
        let name = names::public_key(self.chain.model_id, public.key_id());
        create(&*self.chain.store, &name, Bytes::copy_from_slice(public.bytes())).await
    }
}
