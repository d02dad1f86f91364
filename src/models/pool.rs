//! Versions that mounts of one process share: one memory, and a right for each.
//!
//! In: a version that a mount has itself resolved, verified and unlocked; the word that a mount has lost its right, or has it
//! again. Out: the one [`Model`] of that version.
//! Promises: nobody is given shared memory who has not just opened the version with keys of his own; who leaves takes
//! nothing from the others; whoever leaves last is told so, and wipes. A version to which no mount has a right any more is
//! locked and wiped at once, and served again only with keys that a mount with a right has just read; a lock that somebody
//! asked for is never undone here.
//! Not here: what takes a right away (`host`), how plaintext is taken back (`cache`).
//! Held by: tests/host.rs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::cache::{Cache, Model};
use crate::crypto::{ModelKeys, Verify};
use crate::error::Result;
use crate::format::{Manifest, ManifestDigest};
use crate::refuse;
use crate::store::{ChunkSource, Openings, StoreUrl};

/// How long who comes or goes waits for a wipe: one takes some seconds at most (`cache`). A kernel that does not let go of a
/// page for longer than this is not to stop every other mount.
const WIPE_WAIT: Duration = Duration::from_secs(30);

/// What must be the same for two mounts to share memory. The store too: with `verify=aead` its bytes are believed more.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Identity {
    store: String,
    name: String,
    digest: ManifestDigest,
    strict: bool,
}

/// A mount that shows a version.
struct User {
    tenant: u64,
    /// It has lost its right.
    refused: bool,
}

struct Shared {
    model: Arc<Model>,
    openings: Arc<Openings>,
    users: Vec<User>,
    /// How often it had been locked when it was locked because nobody had a right to it. A lock that came later, on
    /// somebody's word, makes it another number.
    lost_at: Option<u64>,
}

impl Shared {
    /// The number of locks if it is locked for want of anybody's right, and for nothing else.
    fn lost(&self) -> Option<u64> {
        self.lost_at.filter(|at| self.model.is_locked() && self.model.locks() == *at)
    }
}

/// A version that is locked because no mount had a right to it.
pub struct Lost {
    pub model: Arc<Model>,
    /// Locks so far: whoever opens it again may undo this one and no later one.
    locks: u64,
}

impl Lost {
    /// With its keys, which a mount that has its right back has just read.
    pub fn opened(self, keys: ModelKeys) -> Reopened {
        Reopened { lost: self, keys }
    }
}

pub struct Reopened {
    lost: Lost,
    keys: ModelKeys,
}

#[derive(Default)]
struct Table {
    shared: HashMap<Identity, Shared>,
    next_serial: u32,
    next_tenant: u64,
    /// Versions are being wiped: nobody comes to a version meanwhile, nor goes.
    wiping: bool,
}

/// The versions of one process.
pub struct Pool {
    table: Mutex<Table>,
    wiped: Condvar,
    cache: Cache,
}

/// While it is there the pool is wiping.
struct Wiping<'p>(&'p Pool);

impl Drop for Wiping<'_> {
    fn drop(&mut self) {
        self.0.table().wiping = false;
        self.0.wiped.notify_all();
    }
}

impl Pool {
    pub fn new(cache: Cache) -> Pool {
        Pool { table: Mutex::default(), wiped: Condvar::new(), cache }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("a thread died holding the shared versions")
    }

    /// Once nothing is being wiped, or after [`WIPE_WAIT`].
    fn settled(&self) -> MutexGuard<'_, Table> {
        let settled = self.wiped.wait_timeout_while(self.table(), WIPE_WAIT, |table| table.wiping);
        settled.expect("a thread died holding the shared versions").0
    }

    /// One mount's part in the pool.
    pub fn tenant(self: &Arc<Self>, store: &StoreUrl) -> Tenant {
        let mut table = self.table();
        table.next_tenant += 1;
        Tenant { pool: self.clone(), id: table.next_tenant, store: store.to_string(), refused: AtomicBool::new(false) }
    }

    /// Locks every version that only refused mounts show, and wipes it. Blocking: from a thread that holds nothing of the
    /// cache and answers no request of the kernel.
    fn lock_what_nobody_may_read(&self) {
        let (lost, _wiping) = {
            let mut table = self.settled();
            let mut lost = Vec::new();
            for shared in table.shared.values_mut() {
                if shared.users.is_empty() || shared.users.iter().any(|user| !user.refused) {
                    continue;
                }
                // What was locked before stays locked for the reason it had.
                if let Some(locks) = shared.model.lock_if_served() {
                    shared.lost_at = Some(locks);
                    lost.push(shared.model.clone());
                }
            }
            if lost.is_empty() {
                return;
            }
            table.wiping = true;
            drop(table);
            (lost, Wiping(self))
        };
        self.cache.drop_pages(&lost);
        let report = self.cache.cut(&lost).wipe(&self.cache);
        let names: Vec<&str> = lost.iter().map(|model| model.name.as_str()).collect();
        tracing::warn!(
            wiped_bytes = report.wiped_bytes,
            unwiped_bytes = report.unwiped_bytes,
            "locked {}: no mount has a right to it any more",
            names.join(", ")
        );
        report.tell_what_is_left();
    }
}

/// What one mount uses of the pool. Leaves it when dropped, keys of versions that nobody else uses wiped.
pub struct Tenant {
    pool: Arc<Pool>,
    id: u64,
    store: String,
    /// Changed with the table held.
    refused: AtomicBool,
}

impl Tenant {
    /// The model of a version that was just opened with keys of this mount's own: shared if another mount shows it. Blocks
    /// while versions are being wiped.
    ///
    /// # Errors
    /// `LOCKED` if somebody locked it: who comes new does not unlock it for the others; or if this mount is refused.
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
        let mut table = self.pool.settled();
        if self.refused.load(Ordering::SeqCst) {
            refuse!(Locked, "the mount is refused, and opens no version of {name} either; `modelfs unlock` first");
        }
        let user = User { tenant: self.id, refused: false };
        if let Some(shared) = table.shared.get_mut(&identity) {
            if let Some(locks) = shared.lost() {
                // Nobody had a right to it; now somebody has. If it was locked meanwhile, it is refused below.
                if shared.model.unlock(opened.1, locks) {
                    tracing::warn!("unlocked {name}: a new mount has a right to it");
                }
            }
            shared.model.admit()?;
            shared.openings.add(self.id, source);
            shared.users.push(user);
            return Ok(shared.model.clone());
        }
        let serial = table.next_serial;
        table.next_serial += 1;
        let openings = Arc::new(Openings::default());
        openings.add(self.id, source);
        let model = Arc::new(Model::new(serial, name, digest, opened, openings.clone(), verify));
        model.vitals.set_store(&self.store);
        table.shared.insert(identity, Shared { model: model.clone(), openings, users: vec![user], lost_at: None });
        Ok(model)
    }

    /// This mount has lost its right: what no other mount has a right to is locked and wiped. Blocking, as
    /// [`Cache::cut`].
    pub fn refuse(&self) {
        self.mark(&mut self.pool.settled(), true);
        self.pool.lock_what_nobody_may_read();
    }

    /// This mount has its right again, if `opened` opens every version of it that was locked for want of anybody's right.
    /// Otherwise nothing changes, and those versions are answered. All, or none. What somebody locked stays locked.
    #[must_use = "it has no right yet if any are answered"]
    pub fn regain(&self, opened: Vec<Reopened>) -> Vec<Lost> {
        let mut table = self.pool.settled();
        let mine = |shared: &&mut Shared| shared.users.iter().any(|user| user.tenant == self.id);
        let is_of =
            |one: &Reopened, model: &Arc<Model>, locks| Arc::ptr_eq(&one.lost.model, model) && one.lost.locks == locks;
        let lost: Vec<Lost> = table
            .shared
            .values_mut()
            .filter(mine)
            .filter_map(|shared| Some(Lost { locks: shared.lost()?, model: shared.model.clone() }))
            .collect();
        if lost.iter().any(|lost| !opened.iter().any(|one| is_of(one, &lost.model, lost.locks))) {
            return lost;
        }
        for Reopened { lost: Lost { model, locks }, keys } in opened {
            // Who else came in has unlocked it, or somebody has locked it on his word: both stand.
            if lost.iter().any(|lost| Arc::ptr_eq(&lost.model, &model)) && model.unlock(keys, locks) {
                tracing::warn!("unlocked {}: a mount has its right to it again", model.name);
            }
        }
        self.mark(&mut table, false);
        Vec::new()
    }

    fn mark(&self, table: &mut Table, refused: bool) {
        self.refused.store(refused, Ordering::SeqCst);
        let users = table.shared.values_mut().flat_map(|shared| &mut shared.users);
        users.filter(|user| user.tenant == self.id).for_each(|user| user.refused = refused);
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
        self.pool.settled().shared.retain(|_, shared| {
            let before = shared.users.len();
            if wanted(&shared.model) {
                shared.users.retain(|user| user.tenant != self.id);
                shared.openings.remove(self.id);
            }
            let over = before > 0 && shared.users.is_empty();
            if over {
                last.push(shared.model.clone());
            }
            !over
        });
        // Those that stay may have no right to what they stay with.
        self.pool.lock_what_nobody_may_read();
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
