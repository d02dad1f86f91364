//! From a record to an open model.
//!
//! In: a catalog, what the user trusts, and a store for each bucket. Out: [`OpenedRecord`].
//! Promises: the version is the one whose digest the record holds, no ref is consulted; it is signed by a publisher whom
//! the user trusts under the name the model was sealed with, or it is refused; its size is the record's. A record that is
//! written anew while its model is opened is read again.
//! Held by: tests/catalog.rs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::{CatalogAt, Record, RecordKey, Records, names, read};
use crate::config::Access;
use crate::crypto::{Dek, ModelKeys, open_manifest, unwrap_dek};
use crate::error::{Class, Code, Error, Result};
use crate::format::limits::MODEL_NAME_BYTES_MAX;
use crate::format::{Manifest, ManifestDigest, ModelId, Slot, SlotKind, names as objects};
use crate::keys::{FloorPolicy, KeySource, Resolved, Resolver, Trust, unix_now};
use crate::refuse;
use crate::store::{self, ChunkSink, ChunkSource, StoreUrl};

/// How often a record is read that changes while its model is being opened.
const RECORD_READS_MAX: u32 = 4;

/// A catalog and everything that decides which of its models may be read.
pub struct Catalog {
    at: CatalogAt,
    records: Arc<dyn Records>,
    access: Access,
    trust: Trust,
    /// One for each bucket and prefix that a record named.
    stores: Mutex<HashMap<StoreUrl, Arc<dyn ChunkSink>>>,
}

/// A model of a catalog, believed and unlocked.
pub struct OpenedRecord {
    /// The record's path: what it is served as, whatever it was sealed as.
    pub name: String,
    pub digest: ManifestDigest,
    pub opened: (Manifest, ModelKeys),
    pub source: Arc<dyn ChunkSource>,
}

impl Catalog {
    /// Asks nothing yet.
    ///
    /// # Errors
    /// `USAGE` for options that contradict a catalog, or a trust file that cannot be read.
    pub fn new(at: CatalogAt, access: Access, records: Arc<dyn Records>) -> Result<Catalog> {
        if access.manifest.is_some() {
            refuse!(Usage, "--manifest pins one version, and each record of {at} pins its own; drop --manifest");
        }
        if access.trust.on_first_use {
            refuse!(
                Usage,
                "{at} names versions, not whom to believe; give --trust KEY instead of --trust-on-first-use"
            );
        }
        let trust = Trust::gather(&access.trust.keys, access.trust.file.as_deref())?;
        Ok(Catalog { at, records, access, trust, stores: Mutex::default() })
    }

    /// The names of all records, sorted.
    pub async fn names(self: &Arc<Self>) -> Result<Vec<String>> {
        self.blocking(|catalog| names(&*catalog.records, &catalog.at)).await
    }

    /// The record of that name, read from Vault now.
    ///
    /// # Errors
    /// `NOT_FOUND`, `CATALOG`, what Vault answers.
    pub async fn record(self: &Arc<Self>, name: &str) -> Result<Record> {
        let name = name.to_owned();
        self.blocking(move |catalog| read(&*catalog.records, &catalog.at, &name)).await
    }

    /// Reads the record, finds its version, checks who signed it, and opens it.
    ///
    /// # Errors
    /// As [`Catalog::record`]; `NO_TRUST`; `CATALOG` where the record and the sealed model disagree; `NO_KEY`; those of the
    /// manifest and the slots; the store's own.
    pub async fn open(self: &Arc<Self>, name: &str) -> Result<OpenedRecord> {
        let mut record = self.record(name).await?;
        for _ in 1..RECORD_READS_MAX {
            let version = record.version;
            let failed = match self.open_as(record).await {
                Ok(opened) => return Ok(opened),
                Err(failed) => failed,
            };
            // A rotation may have written another key or another version into it, and taken away what it said before.
            record = match self.record(name).await {
                Ok(newer) if newer.version != version => newer,
                Ok(_) | Err(_) => return Err(failed),
            };
        }
        self.open_as(record).await
    }

    async fn open_as(self: &Arc<Self>, record: Record) -> Result<OpenedRecord> {
        let name = record.name.clone();
        let name = &*name;
        let source = self.store(&record.store)?;
        let sealed_name = sealed_name(&*source, &record).await?;
        let resolver = Resolver {
            source: &*source,
            trust: &self.trust,
            first_use: None,
            floors: None,
            policy: FloorPolicy::default(),
            now: unix_now,
        };
        let resolved = resolver.signed_pin(&sealed_name, record.manifest).await.map_err(|error| {
            match error.code() {
            Code::NotFound => Error::new(
                Code::Catalog,
                format!(
                    "record {name}: what s3_key and checksum name is not in the bucket; the record is older than the \
                     store, or the version was pruned"
                ),
            )
            .with_source(error),
            _ => error.context(format!("record {name} is refused")),
        }
        })?;
        let (record, digest) = (Arc::new(record), resolved.digest);
        let opened = {
            let record = record.clone();
            self.blocking(move |catalog| {
                let dek = catalog.unlock(&record, &resolved)?;
                open_manifest(&resolved.manifest_bytes, dek)
            })
            .await?
        };
        let (size, wanted) = (opened.0.total_size(), record.size_bytes);
        if size != u128::from(wanted) {
            refuse!(Catalog, "record {name}: size_bytes says {wanted}, the signed manifest {size}");
        }
        Ok(OpenedRecord { name: record.name.clone(), digest, opened, source })
    }

    fn store(&self, url: &StoreUrl) -> Result<Arc<dyn ChunkSink>> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = stores.get(url) {
            return Ok(there.clone());
        }
        let made = store::open(url, &self.access.store)?;
        stores.insert(url.clone(), made.clone());
        Ok(made)
    }

    fn unlock(&self, record: &Record, resolved: &Resolved) -> Result<Dek> {
        let name = &record.name;
        match &record.key {
            RecordKey::Raw(kek) => {
                let header = &resolved.header;
                for slot in resolved.slots.slots.iter().filter(|slot| slot.kind() == SlotKind::Raw) {
                    let context =
                        Slot::wrap_context(&slot.label, &slot.params, header.model_id, header.vid, &header.dek_commit);
                    match unwrap_dek(kek, &context, &slot.body) {
                        Ok(dek) if dek.opens(header) => return Ok(dek.opened_by(&slot.title())),
                        Ok(_) | Err(_) => {}
                    }
                }
                refuse!(
                    NoKey,
                    "record {name}: its encryption_key opens no raw key slot of the version; {}",
                    self.if_rotated(name)
                )
            }
            RecordKey::Transit(wrapped) => self.unwrap_transit(name, wrapped, resolved),
        }
    }

    fn unwrap_transit(&self, name: &str, wrapped: &str, resolved: &Resolved) -> Result<Dek> {
        let context = Slot::transit_context(resolved.header.model_id, resolved.header.vid);
        let mut refused = None;
        for source in self.access.keys.iter().filter(|source| matches!(source, KeySource::VaultTransit { .. })) {
            match self.records.unwrap_transit(source, &context, wrapped).map(Dek::from_secret) {
                Ok(dek) if dek.opens(&resolved.header) => return Ok(dek.opened_by("vault-transit/record")),
                Ok(_) => {
                    refused = Some(Error::new(
                        Code::DekCommit,
                        format!("{source} opens it to another key than the signed one"),
                    ));
                }
                // Another key given may open it; a Vault that does not answer says nothing about that.
                Err(error) if error.class() != Class::Unreachable => refused = Some(error),
                Err(error) => return Err(error),
            }
        }
        match refused {
            Some(error) => {
                let if_rotated = self.if_rotated(name);
                Err(error.context(format!("record {name}: its encryption_key does not open; {if_rotated}")))
            }
            None => refuse!(
                Usage,
                "record {name} holds a transit ciphertext; name the transit key with --key vault-transit:MOUNT/KEY"
            ),
        }
    }

    /// What to do about a record that a rotation left behind.
    fn if_rotated(&self, name: &str) -> String {
        format!(
            "if the keys were rotated since it was written, bring it along: `modelfs key rotate ... --register {}/{name}`",
            self.at
        )
    }

    /// Vault is asked on a thread that may wait.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Catalog) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let catalog = self.clone();
        match tokio::task::spawn_blocking(move || work(&catalog)).await {
            Ok(done) => done,
            Err(died) if died.is_panic() => std::panic::resume_unwind(died.into_panic()),
            Err(_) => refuse!(Stopping, "the runtime is stopping"),
        }
    }
}

/// The name the model was sealed with, which is what trust is given by: the record's own, or the published one. Both must
/// hash to the model's id; where neither does, nobody can say whose word counts for it.
async fn sealed_name(source: &dyn ChunkSource, record: &Record) -> Result<String> {
    let (name, id) = (&record.name, record.model_id);
    if ModelId::of_name(name) == id {
        return Ok(name.clone());
    }
    let published = match source.read_small(&objects::model_name(id), MODEL_NAME_BYTES_MAX as u64).await {
        Ok(bytes) => objects::believed_name(id, &bytes).map(str::to_owned),
        Err(error) if matches!(error.code(), Code::NotFound | Code::Limit) => None,
        Err(error) => return Err(error.context(format!("cannot read the name of record {name}"))),
    };
    match published {
        Some(published) => Ok(published),
        None => refuse!(
            Catalog,
            "record {name}: s3_key is of a model that was sealed under another, unpublished name; call the record by the \
             name it was sealed with"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::config::Layers;
    use crate::crypto::SigningKey;
    use crate::format::names::model_name;
    use crate::format::{ManifestHeader, Slots};
    use crate::keys::{Keyring, prompt_terminal};
    use crate::mem::Secret;
    use crate::seal::{SealOptions, SlotKeys, SlotTarget, seal};
    use crate::store::memory::MemoryStore;

    fn record(name: &str, sealed_as: &str) -> Record {
        Record {
            name: name.into(),
            store: "s3://models".parse().expect("a URL"),
            model_id: ModelId::of_name(sealed_as),
            manifest: ManifestDigest([1; 32]),
            size_bytes: 1,
            key: RecordKey::Raw(Secret::from_bytes(&mut [7; 32])),
            version: 1,
        }
    }

    /// Opens a folder that is sealed for key 7, by a record that holds `key`, and others when it is read the first `stale` times.
    async fn opened_after(stale: u32, key: u8) -> (Result<OpenedRecord>, u32) {
        let dir = tempfile::tempdir().expect("a folder");
        let (source, key_file) = (dir.path().join("m"), dir.path().join("key"));
        std::fs::create_dir(&source).expect("made");
        std::fs::write(source.join("a"), b"four").expect("written");
        std::fs::write(&key_file, [7; 32]).expect("written");
        std::fs::set_permissions(&key_file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("ours");
        let signing = Arc::new(SigningKey::from_seed(Secret::from_bytes(&mut [9; 32])));
        let trusted = signing.public().to_string();
        let store = Arc::new(MemoryStore::new());
        let ring = Keyring::new(&[KeySource::File(key_file)], &prompt_terminal);
        let options = SealOptions::new(Arc::new(OneKey(ring)), signing);
        let sealed = seal(&source, store.clone(), "acme/a", options).await.expect("sealed");

        let mut layers = Layers::default();
        layers.flag("trust", vec![trusted]);
        let records = Arc::new(Changing {
            fields: json!({
                "s3_bucket": "models", "s3_key": ModelId::of_name("acme/a").to_string(), "size_bytes": 4,
                "checksum": format!("sha256:{}", sealed.manifest),
            }),
            reads: AtomicU32::new(0),
            stale,
            key,
        });
        let at = "vault-kv://secret/models".parse().expect("a catalog");
        let catalog = Catalog::new(at, Access::from_layers(&layers).expect("options"), records.clone());
        let catalog = Arc::new(catalog.expect("a catalog"));
        catalog.stores.lock().expect("whole").insert("s3://models".parse().expect("a URL"), store);
        let opened = catalog.open("acme/a").await;
        (opened, records.reads.load(Ordering::Relaxed))
    }

    struct OneKey(Keyring<'static>);

    impl SlotKeys for OneKey {
        fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
            self.0.wrap_all(dek, target)
        }
        fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
            self.0.unlock(slots, header)
        }
    }

    /// A record into which somebody writes another key after each of the first `stale` reads.
    struct Changing {
        fields: Value,
        reads: AtomicU32,
        stale: u32,
        key: u8,
    }

    impl Records for Changing {
        fn list(&self, _: &str, _: &str) -> Result<Vec<String>> {
            unreachable!("a name was given")
        }
        fn read(&self, _: &str, _: &str) -> Result<Option<(Map<String, Value>, u32)>> {
            let read = self.reads.fetch_add(1, Ordering::Relaxed);
            let (key, version) = if read < self.stale { (99, read + 1) } else { (self.key, self.stale + 1) };
            let mut fields = self.fields.as_object().expect("an object").clone();
            fields.insert("encryption_key".into(), STANDARD.encode([key; 32]).into());
            Ok(Some((fields, version)))
        }
        fn write(&self, _: &str, _: &str, _: &Map<String, Value>, _: u32) -> Result<u32> {
            unreachable!("nothing is written")
        }
        fn unwrap_transit(&self, _: &KeySource, _: &[u8; 32], _: &str) -> Result<Secret<32>> {
            unreachable!("the key is a raw one")
        }
    }

    /// Whoever read the record before a rotation wrote it, and the slots after it took the old one away.
    #[tokio::test]
    async fn a_record_that_changed_while_its_model_was_opened_is_read_again() {
        let (opened, reads) = opened_after(0, 7).await;
        assert_eq!((opened.expect("opens at once").name.as_str(), reads), ("acme/a", 1));
        let (opened, reads) = opened_after(1, 7).await;
        assert_eq!((opened.expect("opens by the new record").name.as_str(), reads), ("acme/a", 2));
        let (refused, reads) = opened_after(100, 7).await;
        assert_eq!((refused.err().expect("it never settles").code(), reads), (Code::NoKey, RECORD_READS_MAX));
        // One that stays as it is and opens nothing is looked at once more.
        let (refused, reads) = opened_after(0, 8).await;
        assert_eq!((refused.err().expect("another key").code(), reads), (Code::NoKey, 2));
    }

    #[tokio::test]
    async fn trust_goes_by_the_name_a_model_was_sealed_with() {
        let store = MemoryStore::new();
        assert_eq!(sealed_name(&store, &record("acme/a", "acme/a")).await.expect("its own"), "acme/a");
        store.put(&model_name(ModelId::of_name("acme/a")), b"acme/a".to_vec());
        assert_eq!(sealed_name(&store, &record("evil/b", "acme/a")).await.expect("published"), "acme/a");
    }

    #[tokio::test]
    async fn a_model_of_an_unknown_name_is_refused() {
        let store = MemoryStore::new();
        let hidden = record("b", "acme/a");
        assert_eq!(sealed_name(&store, &hidden).await.expect_err("hidden").code(), Code::Catalog);
        store.put(&model_name(hidden.model_id), b"b".to_vec());
        assert_eq!(sealed_name(&store, &hidden).await.expect_err("a lie").code(), Code::Catalog);
    }
}
