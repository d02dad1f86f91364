//! Versions that mounts of one process share: one memory, and a right for each.
//!
//! In: a version that a mount has itself resolved, verified and unlocked. Out: the one [`Model`] of that version.
//! Promises: nobody is given shared memory who has not just opened the version with keys of his own; who leaves takes
//! nothing from the others; whoever leaves last is told so, and wipes.
//! Held by: the tests below, tests/host.rs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::cache::Model;
use crate::crypto::{ModelKeys, Verify};
use crate::error::Result;
use crate::format::{Manifest, ManifestDigest};
use crate::store::{ChunkSource, Openings, StoreUrl};

/// What must be the same for two mounts to share memory. The store too: with `verify=aead` its bytes are believed more.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Identity {
    store: String,
    name: String,
    digest: ManifestDigest,
    strict: bool,
}

struct Shared {
    model: Arc<Model>,
    openings: Arc<Openings>,
    users: Vec<u64>,
}

#[derive(Default)]
struct Table {
    shared: HashMap<Identity, Shared>,
    next_serial: u32,
    next_tenant: u64,
}

/// The versions of one process.
#[derive(Default)]
pub struct Pool {
    table: Mutex<Table>,
}

impl Pool {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("a thread died holding the shared versions")
    }

    /// One mount's part in the pool.
    pub fn tenant(self: &Arc<Self>, store: &StoreUrl) -> Tenant {
        let mut table = self.table();
        table.next_tenant += 1;
        Tenant { pool: self.clone(), id: table.next_tenant, store: store.to_string() }
    }
}

/// What one mount uses of the pool. Leaves it when dropped, keys of versions that nobody else uses wiped.
pub struct Tenant {
    pool: Arc<Pool>,
    id: u64,
    store: String,
}

impl Tenant {
    /// The model of a version that was just opened with keys of this mount's own: shared if another mount shows it.
    ///
    /// # Errors
    /// `LOCKED` if it was locked: who comes new does not unlock it for the others.
    pub fn model(
        &self,
        name: String,
        digest: ManifestDigest,
        opened: (Manifest, ModelKeys),
        source: Arc<dyn ChunkSource>,
        verify: Verify,
    ) -> Result<Arc<Model>> {
        let strict = verify == Verify::Strict;
        let identity = Identity { store: self.store.clone(), name: name.clone(), digest, strict };
        let mut table = self.pool.table();
        if let Some(shared) = table.shared.get_mut(&identity) {
            shared.model.admit()?;
            shared.openings.add(self.id, source);
            shared.users.push(self.id);
            return Ok(shared.model.clone());
        }
        let serial = table.next_serial;
        table.next_serial += 1;
        let openings = Arc::new(Openings::default());
        openings.add(self.id, source);
        let model = Arc::new(Model::new(serial, name, digest, opened, openings.clone(), verify));
        model.vitals.set_store(&self.store);
        table.shared.insert(identity, Shared { model: model.clone(), openings, users: vec![self.id] });
        Ok(model)
    }

    /// This mount shows the version no more. `true`: nobody does, and nobody will be given this memory again.
    pub fn leave(&self, model: &Model) -> bool {
        self.leave_those(|of| of.serial == model.serial).pop().is_some()
    }

    /// Leaves every version; those that nobody uses any more.
    pub fn leave_all(&self) -> Vec<Arc<Model>> {
        self.leave_those(|_| true)
    }

    fn leave_those(&self, wanted: impl Fn(&Model) -> bool) -> Vec<Arc<Model>> {
        let mut last = Vec::new();
        self.pool.table().shared.retain(|_, shared| {
            let before = shared.users.len();
            if wanted(&shared.model) {
                shared.users.retain(|user| *user != self.id);
                shared.openings.remove(self.id);
            }
            let over = before > 0 && shared.users.is_empty();
            if over {
                last.push(shared.model.clone());
            }
            !over
        });
        last
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        for model in self.leave_all() {
            model.wipe_keys();
        }
    }
}
