//! A model as the cache takes it: verified, keys open, and closable, for good or until it is unlocked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use tokio::sync::watch;

use super::vitals::Vitals;
use crate::crypto::{ModelKeys, Verify};
use crate::error::{Code, Error, Result};
use crate::format::{Manifest, ManifestDigest, ObjectEntry};
use crate::store::ChunkSource;
use crate::telemetry::events::Subject;

/// A model whose manifest passed every check; what the cache needs to fetch and open its chunks.
pub struct Model {
    pub name: String,
    pub manifest: Manifest,
    pub source: Arc<dyn ChunkSource>,
    pub verify: Verify,
    pub digest: ManifestDigest,
    /// Distinguishes the models of one mount; part of [`ObjectKey`](super::ObjectKey).
    pub serial: u32,
    pub vitals: Vitals,
    pub(super) keys: RwLock<Option<ModelKeys>>,
    /// What the keys were unwrapped from. Stays known while it is locked.
    slot: RwLock<Option<Arc<str>>>,
    /// How often it was locked. Held while it changes between locked and served, so that what follows agrees.
    locks: Mutex<u64>,
    /// For those who only look. `locked` must not be asked by who holds an [`Admission`]: a lock that waits for the admission
    /// stands before the second look, and that one would wait for the lock.
    is_locked: AtomicBool,
    /// Held for reading by every [`Admission`]; wakes who waits.
    locked: watch::Sender<bool>,
}

/// Leave to answer with the model's plaintext, now: [`Model::lock`] waits until it is dropped. Hold it for one answer, not
/// across a wait, and ask for no second one meanwhile; [`Model::is_locked`] may be asked.
pub struct Admission<'a>(#[expect(dead_code, reason = "held, not looked at")] watch::Ref<'a, bool>);

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
        let slot = RwLock::new(keys.slot().cloned());
        Model {
            name,
            manifest,
            source,
            verify,
            digest,
            serial,
            vitals: Vitals::default(),
            keys: RwLock::new(Some(keys)),
            slot,
            locks: Mutex::default(),
            is_locked: AtomicBool::new(false),
            locked: watch::Sender::new(false),
        }
    }

    /// Drops and wipes the keys: nothing more of this model can be opened.
    pub fn wipe_keys(&self) {
        self.keys.write().expect("a thread died holding the keys").take();
    }

    /// From the return on nothing of the model is answered any more, who waits is refused, and the keys are wiped. Names and
    /// sizes stay. `false`: it was locked before. Waits for answers being given, not for readers.
    pub fn lock(&self) -> bool {
        self.shut(&mut self.locks.lock().expect("a thread died holding the locks of a model"))
    }

    /// [`Model::lock`], unless it is locked already. How often it was locked now; `None`: it was.
    pub fn lock_if_served(&self) -> Option<u64> {
        let mut locks = self.locks.lock().expect("a thread died holding the locks of a model");
        if self.is_locked() {
            return None;
        }
        self.shut(&mut locks);
        Some(*locks)
    }

    fn shut(&self, locks: &mut u64) -> bool {
        *locks += 1;
        self.is_locked.store(true, Ordering::SeqCst);
        let before = self.locked.send_replace(true);
        self.wipe_keys();
        !before
    }

    /// How often it was locked so far, by whichever mount.
    pub fn locks(&self) -> u64 {
        *self.locks.lock().expect("a thread died holding the locks of a model")
    }

    /// Serves it again, with the keys of this very version, unless it was locked since there were `seen` locks
    /// ([`Model::locks`], asked before the keys were read). `false`: it was, and stays so.
    #[must_use = "it may have been locked meanwhile"]
    pub fn unlock(&self, keys: ModelKeys, seen: u64) -> bool {
        let locks = self.locks.lock().expect("a thread died holding the locks of a model");
        if *locks != seen {
            return false;
        }
        *self.slot.write().expect("a thread died holding the slot") = keys.slot().cloned();
        *self.keys.write().expect("a thread died holding the keys") = Some(keys);
        self.locked.send_replace(false);
        self.is_locked.store(false, Ordering::SeqCst);
        true
    }

    /// The key slot that opened it last, as `KIND/LABEL`; where mounts share it, the first one's.
    pub fn key_slot(&self) -> Option<Arc<str>> {
        self.slot.read().expect("a thread died holding the slot").clone()
    }

    /// As the subject of an event.
    pub fn subject(&self) -> Subject {
        Subject {
            model: Some(self.name.clone()),
            version: Some(self.manifest.header().seq),
            manifest: Some(format!("sha256:{}", self.digest)),
            key: self.key_slot().map(|slot| slot.to_string()),
            ..Subject::default()
        }
    }

    /// True from the moment a lock is asked for. Waits for nothing.
    pub fn is_locked(&self) -> bool {
        self.is_locked.load(Ordering::SeqCst)
    }

    /// # Errors
    /// `LOCKED`.
    pub fn admit(&self) -> Result<Admission<'_>> {
        let locked = self.locked.borrow();
        if *locked { Err(self.locked_error()) } else { Ok(Admission(locked)) }
    }

    /// Returns when the model is locked.
    pub async fn until_locked(&self) {
        // The sender lives as long as `self`.
        let _ = self.locked.subscribe().wait_for(|locked| *locked).await;
    }

    /// Returns when the model is served.
    pub async fn until_served(&self) {
        // The sender lives as long as `self`.
        let _ = self.locked.subscribe().wait_for(|locked| !*locked).await;
    }

    pub fn locked_error(&self) -> Error {
        Error::new(Code::Locked, format!("model {} is locked; `modelfs unlock` serves it again", self.name))
    }

    pub(super) fn entry(&self, object: u32) -> &ObjectEntry {
        &self.manifest.objects()[object as usize]
    }
}
