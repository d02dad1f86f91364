//! From what was meant to an open model: the store, the version that may be believed, its keys. The one place where every
//! command and the daemon meet `keys` and `crypto`.
//!
//! In: a store and an [`Access`] (keys, trust, pins). Out: a manifest and its keys, or the refusal with its code.
//! Promises: nothing is opened that is not signed by whom the user trusts, or pinned by digest; what was seen is remembered
//! before it is used; keys are read once, whatever the number of models.
//! Not here: what trust and floors are (`keys`), what is done with an open model (`daemon`, `cli`).

use std::path::PathBuf;
use std::sync::Arc;

use crate::config::Access;
use crate::crypto::ModelKeys;
use crate::error::Result;
use crate::format::Manifest;
use crate::keys::{
    FloorPolicy, FloorStore, Keyring, ModelSelector, Resolved, Resolver, Tofu, Trust, prompt_terminal, state_dir,
    unix_now,
};
use crate::store::{self, ChunkSink, StoreUrl};

/// A store and everything that decides which of its models may be read.
pub struct Reading {
    pub url: StoreUrl,
    pub store: Arc<dyn ChunkSink>,
    pub access: Access,
    trust: Trust,
    first_use: Option<Tofu>,
    floors: FloorStore,
    keyring: Keyring<'static>,
}

impl Reading {
    /// # Errors
    /// `USAGE` for a trust file or key that cannot be read; what opening the store answers. Nothing is asked of the store.
    pub fn new(url: StoreUrl, access: Access) -> Result<Reading> {
        let store = store::open(&url, &access.store)?;
        let state = state_dir()?;
        let trust_file: Option<PathBuf> = access.trust.file.clone();
        let trust = Trust::gather(&access.trust.keys, trust_file.as_deref())?;
        Ok(Reading {
            trust,
            first_use: access.trust.on_first_use.then(|| Tofu::new(&state)),
            floors: FloorStore::new(&state),
            keyring: Keyring::new(&access.keys, &prompt_terminal),
            url,
            store,
            access,
        })
    }

    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    fn resolver(&self) -> Resolver<'_> {
        Resolver {
            source: &*self.store,
            trust: &self.trust,
            first_use: self.first_use.as_ref(),
            floors: Some(&self.floors),
            policy: FloorPolicy { require_floor: self.access.trust.require_floor, ..FloorPolicy::default() },
            now: unix_now,
        }
    }

    /// The models of the store that tell their names, sorted.
    pub async fn model_names(&self) -> Result<Vec<String>> {
        self.resolver().model_names().await
    }

    /// The version that `selector` names, once signatures, floor and digests hold; what is noteworthy is logged.
    pub async fn resolve(&self, selector: &str) -> Result<Resolved> {
        let selector: ModelSelector = selector.parse()?;
        let resolved = self.resolver().resolve(&selector, self.access.manifest).await?;
        for note in &resolved.notes {
            tracing::warn!(model = %resolved.name, "{}", note.text());
        }
        Ok(resolved)
    }

    /// Its file list and keys. May ask for a passphrase, may take seconds of key derivation.
    ///
    /// # Errors
    /// `USAGE` if no key was given, `NO_KEY` if none opens it.
    pub fn unlock(&self, resolved: &Resolved) -> Result<(Manifest, ModelKeys)> {
        self.access.need_keys()?;
        resolved.open(&self.keyring)
    }
}
