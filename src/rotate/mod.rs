//! Who opens a version, and under which data key it lies.
//!
//! ```text
//!  L0 Rewrap, L1 Add Remove Replace:  slots ──edit──> generation + 1 ──look──> refs that ask for it ──> older ones deleted
//!     Prepare, then Replace: the same in two generations, with both keys in the first; a record of a catalog is written between
//!  L2 NewKey:     manifest ──> the same objects, their keys handed on, under a new data key ──> the next version
//!  L3 Reencrypt:  objects ──open, check, seal──> new objects ──> a manifest of them alone ──> the next version
//! ```
//! In: a version that a reader would believe, the keys of the operator, the keys that sign. Out: a generation of slots, or
//! a version, that the channels name.
//! Promises: whatever dies at whatever step, the version opens with the old keys or with the new ones, and the same order
//! given again completes it; nothing is deleted before what replaces it is there, was read back and is named; a
//! generation that was replaced is refused by whoever sees the newest ref; no plaintext reaches the store.
//! What no rotation here can do: take a data key back from whoever unwrapped it (docs/KEYS.md says which level does what).
//! Not here: how slots are made and opened (`keys`), how versions and refs are written (`seal`), deleting what no ref
//! names any more (`versions`).
//! Spec: docs/FORMAT.md b.3. Held by: the tests of each file, tests/rotate.rs, which dies at every write.

mod edit;
mod reencrypt;
mod rekey;

pub use edit::{Edit, Edited, Rewrap, opens, opens_by, transit_version};
pub use rekey::{Level, Rekey, Rekeyed, Withdrawn};

use std::sync::Arc;

use crate::error::{Class, Code, Result};
use crate::format::{ManifestDigest, Ref};
use crate::keys::{Candidate, FloorPolicy, Keyring, ModelSelector, Resolved, Resolver, Wanted};
use crate::seal::Releaser;

/// The keys of an operator, shared by the threads that use them.
pub type Keys = Arc<Keyring<'static>>;

/// How often whoever lost a race for a number tries the next.
const RACES_MAX: u32 = 64;

/// Whoever rotates the keys of one model: what a reader believes, and the release keys.
pub struct Rotator<'a> {
    pub resolver: Resolver<'a>,
    pub releaser: Releaser,
}

/// Where a version is found.
#[derive(Clone, Copy)]
enum Place<'a> {
    Wanted(&'a Wanted),
    /// Judged by all tags when it was listed: not again for each version of a model.
    Candidate(&'a Candidate),
}

impl Rotator<'_> {
    fn name(&self) -> &str {
        &self.releaser.chain.model_name
    }

    /// As a reader resolves, but an expired ref is no reason to leave its keys as they are.
    fn resolver(&self) -> Resolver<'_> {
        Resolver { policy: FloorPolicy { freeze_warn: true, ..self.resolver.policy }, ..self.resolver }
    }

    async fn resolve(&self, wanted: &Wanted) -> Result<Resolved> {
        let selector = ModelSelector { name: self.name().to_owned(), wanted: wanted.clone() };
        self.resolver().resolve(&selector, None).await
    }

    async fn find(&self, place: Place<'_>) -> Result<Resolved> {
        match place {
            Place::Wanted(wanted) => self.resolve(wanted).await,
            Place::Candidate(candidate) => self.resolver().take(self.name(), candidate).await,
        }
    }

    /// The channels with their newest refs. One that a reader would refuse is told, and nobody reads through it.
    async fn heads(&self, warnings: &mut Vec<String>) -> Result<Vec<(String, Ref)>> {
        let mut heads = Vec::new();
        for channel in self.resolver().channels(self.name()).await? {
            match self.resolver().newest_ref(self.name(), &channel).await {
                Ok(head) => heads.push((channel, head)),
                Err(gone) if gone.code() == Code::NotFound => {}
                Err(bad) if bad.class() == Class::Tampered => {
                    let warning = format!("tag {channel} was left as it is: {}", bad.chain());
                    if !warnings.contains(&warning) {
                        warnings.push(warning);
                    }
                }
                Err(other) => return Err(other),
            }
        }
        Ok(heads)
    }

    /// Those of [`Rotator::heads`] that name the version with this manifest.
    async fn naming(&self, digest: ManifestDigest, warnings: &mut Vec<String>) -> Result<Vec<(String, Ref)>> {
        let mut heads = self.heads(warnings).await?;
        heads.retain(|(_, head)| head.manifest_digest == digest);
        Ok(heads)
    }
}
