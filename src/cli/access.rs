//! From what was typed to an open model, and the keys as `seal` asks for them.

use std::sync::Arc;

use crate::config::{Access, Layers, parse_store};
use crate::crypto::{Dek, ModelKeys};
use crate::error::{Code, Error, Result};
use crate::format::{Manifest, ManifestHeader, Slot, Slots};
use crate::keys::{KeySource, Keyring, Resolved, prompt_terminal};
pub use crate::reading::Reading;
use crate::seal::{SlotKeys, SlotTarget};

/// Threads for fetching and for opening chunks. Start it once the process will not fork any more.
pub fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("modelfs")
        .build()
        .map_err(|e| Error::new(Code::Host, "cannot start threads").with_source(e))
}

/// The store that was named, and what the layers say of keys and trust.
pub fn reading(store_url: &str, layers: &Layers) -> Result<Reading> {
    crate::mem::harden()?;
    Reading::new(parse_store(store_url)?, Access::from_layers(layers)?)
}

/// A version whose key we have, shared by the tasks that read it.
#[derive(Clone)]
pub struct Opened {
    pub manifest: Arc<Manifest>,
    pub keys: Arc<ModelKeys>,
}

impl Opened {
    pub fn unlock(reading: &Reading, resolved: &Resolved) -> Result<Opened> {
        let (manifest, keys) = reading.unlock(resolved)?;
        Ok(Opened { manifest: Arc::new(manifest), keys: Arc::new(keys) })
    }
}

/// The keys of the command line, as `seal` asks for them: one slot each.
pub struct LocalKeys {
    keyring: Keyring<'static>,
}

impl LocalKeys {
    pub fn new(sources: &[KeySource]) -> LocalKeys {
        LocalKeys { keyring: Keyring::new(sources, &prompt_terminal) }
    }
}

impl SlotKeys for LocalKeys {
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        self.keyring.wrap_all(dek, target)
    }

    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        self.keyring.unlock(slots, header)
    }
}
