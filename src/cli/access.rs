//! From what was typed to an open model, and the keys as `seal` asks for them.

use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::config::{Access, Layers};
use crate::crypto::{Dek, ModelKeys};
use crate::error::{Code, Error, Result};
use crate::format::{Manifest, ManifestHeader, Slot, SlotKind, Slots};
use crate::keys::{KeySource, Keyring, Resolved, prompt_terminal};
use crate::mem::Secret;
pub use crate::reading::Reading;
use crate::refuse;
use crate::seal::{SlotKeys, SlotTarget};
use crate::vault::Vault;

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
    Reading::new(layers.store(store_url)?, Access::from_layers(layers)?)
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
    /// What transit made of the newest data key: a record of a catalog holds the same.
    transit: Mutex<Option<String>>,
}

impl LocalKeys {
    /// # Errors
    /// `USAGE` for a key in Vault and no Vault.
    pub fn new(sources: &[KeySource], vault: Option<Vault>) -> Result<LocalKeys> {
        let keyring = Keyring::new(sources, &prompt_terminal).with_vault(vault)?;
        Ok(LocalKeys { keyring, transit: Mutex::default() })
    }

    /// What opens the version that was just sealed, as a record of a catalog holds it: the transit ciphertext, or the first
    /// raw key in base64 where `raw` asks for it.
    pub fn for_record(&self, raw: bool) -> Result<Zeroizing<String>> {
        if raw {
            return raw_key_for_record(&self.keyring);
        }
        let transit = self.transit.lock().unwrap_or_else(PoisonError::into_inner);
        let text = transit.clone().map(Zeroizing::new);
        text.ok_or_else(|| Error::new(Code::Usage, "there is no transit ciphertext to register"))
    }
}

/// The first raw key of a ring, in base64.
pub fn raw_key_for_record(ring: &Keyring<'_>) -> Result<Zeroizing<String>> {
    let text = ring.with_raw_key(|key: &Secret<32>| {
        let mut text = Zeroizing::new(String::with_capacity(RAW_KEY_TEXT_BYTES));
        STANDARD.encode_string(key.expose(), &mut text);
        text
    })?;
    text.ok_or_else(|| Error::new(Code::Usage, "there is no raw key to register"))
}

/// Refused before anything is sealed or rotated, not after: whether a record could hold one of these keys.
///
/// # Errors
/// `USAGE`, saying what to give.
pub fn need_registrable(keys: &[KeySource], raw: bool) -> Result<()> {
    let transit = keys.iter().any(|key| matches!(key, KeySource::VaultTransit { .. }));
    let has_raw = keys.iter().any(|key| matches!(key, KeySource::File(_) | KeySource::Env(_)));
    match (transit, raw, has_raw) {
        (true, false, _) | (_, true, true) => Ok(()),
        (_, true, false) => refuse!(Usage, "--register-raw-key: no raw key is among the keys; give one, file:PATH"),
        (false, false, _) => refuse!(
            Usage,
            "--register: a record holds what opens the model; use the key vault-transit:MOUNT/KEY, or say \
             --register-raw-key to put the raw key into Vault"
        ),
    }
}

/// 32 bytes in padded base64: no buffer that grows leaves a part of the key behind.
const RAW_KEY_TEXT_BYTES: usize = 44;

impl SlotKeys for LocalKeys {
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        let slots = self.keyring.wrap_all(dek, target)?;
        let transit = slots.iter().find(|slot| slot.kind() == SlotKind::VaultTransit);
        if let Some(text) = transit.and_then(|slot| String::from_utf8(slot.body.clone()).ok()) {
            *self.transit.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        }
        Ok(slots)
    }

    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        self.keyring.unlock(slots, header)
    }

    fn opens(&self) -> bool {
        self.keyring.sources().iter().any(KeySource::opens)
    }
}
