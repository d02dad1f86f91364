//! A model as the cache takes it: verified, keys open, and closable for good.

use std::sync::{Arc, RwLock};

use crate::crypto::{ModelKeys, Verify};
use crate::format::{Manifest, ManifestDigest, ObjectEntry};
use crate::store::ChunkSource;

/// A model whose manifest passed every check; what the cache needs to fetch and open its chunks.
pub struct Model {
    pub name: String,
    pub manifest: Manifest,
    pub source: Arc<dyn ChunkSource>,
    pub verify: Verify,
    pub digest: ManifestDigest,
    /// Distinguishes the models of one mount; part of [`ObjectKey`].
    pub serial: u32,
    pub(super) keys: RwLock<Option<ModelKeys>>,
}

impl Model {
    pub fn new(
        serial: u32,
        name: String,
        digest: ManifestDigest,
        opened: (Manifest, ModelKeys),
        source: Arc<dyn ChunkSource>,
        verify: Verify,
    ) -> Self {
        let (manifest, keys) = opened;
        Model { name, manifest, source, verify, digest, serial, keys: RwLock::new(Some(keys)) }
    }

    /// Drops and wipes the keys: from now on nothing more of this model can be opened.
    pub fn wipe_keys(&self) {
        self.keys.write().expect("a thread died holding the keys").take();
    }

    pub(super) fn entry(&self, object: u32) -> &ObjectEntry {
        &self.manifest.objects()[object as usize]
    }
}
