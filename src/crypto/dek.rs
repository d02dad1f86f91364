//! The data key of one model version, and what it leads to.
//!
//! Promises: the key and the roots a later version inherits live in secret memory only; nothing here prints them.
//! Spec: docs/FORMAT.md a.2. Held by: `vectors`.

use std::fmt;
use std::sync::Arc;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::kdf::{Derived, expand};
use crate::format::{ManifestHeader, ModelId, ObjectEntry, Oid, Suite, Vid};
use crate::mem::Secret;

/// The data key: 32 random bytes, one per model version, wrapped in slots, never stored in clear.
pub struct Dek {
    key: Secret<32>,
    /// What it was unwrapped from: kind and label of a slot, for those who tell who opened what.
    slot: Option<Arc<str>>,
}

impl Dek {
    pub fn random() -> Dek {
        Dek::from_secret(Secret::random())
    }

    /// For [`super::unwrap_dek`] and for a slot whose body opens to the key itself.
    pub fn from_secret(secret: Secret<32>) -> Dek {
        Dek { key: secret, slot: None }
    }

    /// The same key, and the name of the slot that gave it.
    pub fn opened_by(mut self, slot: &str) -> Dek {
        self.slot = Some(slot.into());
        self
    }

    pub fn slot(&self) -> Option<&Arc<str>> {
        self.slot.as_ref()
    }

    /// The public promise which key a manifest was sealed with: stands in the signed header.
    pub fn commitment(&self, suite: Suite, model_id: ModelId, vid: Vid) -> [u8; 32] {
        let mut commit = [0; 32];
        let suite = suite.number().to_le_bytes();
        expand(self.key.expose(), "dek-commit", &[&suite, &model_id.0, &vid.0], &mut commit);
        commit
    }

    /// Whether this is the key that `header` promises, in constant time.
    pub fn opens(&self, header: &ManifestHeader) -> bool {
        self.commitment(header.suite, header.model_id, header.vid).ct_eq(&header.dek_commit).into()
    }

    pub(super) fn manifest_keys(&self, header: &ManifestHeader) -> Derived {
        let (suite, seq) = (header.suite.number().to_le_bytes(), header.seq.to_le_bytes());
        let context: [&[u8]; 5] = [&suite, &header.model_id.0, &header.vid.0, &seq, &header.msalt];
        Derived::new(self.key.expose(), "manifest", &context)
    }

    pub(super) fn object_root(&self, oid: Oid) -> Zeroizing<[u8; 32]> {
        let mut root = Zeroizing::new([0; 32]);
        expand(self.key.expose(), "object-root", &[&oid.0], &mut root[..]);
        root
    }

    /// The key itself, for a key service that wraps it.
    pub(crate) fn secret(&self) -> &Secret<32> {
        &self.key
    }

    /// A second copy in secret memory, for a publisher that seals with one and reads back with the other.
    pub(crate) fn copy(&self) -> Dek {
        let mut copy = Zeroizing::new(*self.key.expose());
        Dek { key: Secret::from_bytes(&mut copy), slot: self.slot.clone() }
    }

    pub(super) fn expose(&self) -> &[u8; 32] {
        self.key.expose()
    }
}

impl fmt::Debug for Dek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dek(..)")
    }
}

/// Every key of one opened manifest. Shared by all threads that open its chunks.
pub struct ModelKeys {
    dek: Dek,
    inherited: Vec<Secret<32>>,
}

impl ModelKeys {
    pub(super) fn new(dek: Dek, inherited: Vec<Secret<32>>) -> ModelKeys {
        ModelKeys { dek, inherited }
    }

    /// The root of an object's keys, for a publisher that hands it to a later version.
    pub fn object_root(&self, entry: &ObjectEntry) -> Secret<32> {
        Secret::from_bytes(&mut self.root(entry))
    }

    /// The data key, for wrapping it into another slot.
    pub fn dek(&self) -> &Dek {
        &self.dek
    }

    /// The slot that gave the data key, as `KIND/LABEL`.
    pub fn slot(&self) -> Option<&Arc<str>> {
        self.dek.slot()
    }

    pub(super) fn object_keys(&self, entry: &ObjectEntry) -> Derived {
        Derived::new(&self.root(entry), "object", &[&entry.header().kdf_input()])
    }

    fn root(&self, entry: &ObjectEntry) -> Zeroizing<[u8; 32]> {
        match entry.inherited {
            None => self.dek.object_root(entry.oid),
            Some(index) => Zeroizing::new(*self.inherited[index as usize].expose()),
        }
    }
}

impl fmt::Debug for ModelKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelKeys({} inherited)", self.inherited.len())
    }
}
