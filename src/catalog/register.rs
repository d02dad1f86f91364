//! Writes the record of a version that was just published, or whose keys were just rotated.
//!
//! In: where the record is, and what was sealed or rewrapped. Out: the record's new version number, or why it was not written.
//! Promises: check-and-set: a record that changed since the seal began is not overwritten, and one that says already what it
//! should is taken as written, for the answer to our own write may be lost; a record of another model never is overwritten; fields of other names stay as they were; a version that was published stays published, whatever happens here.
//! Held by: the tests below, tests/catalog.rs.

use std::sync::Arc;

use super::record::fill;
use super::{CatalogAt, Record, Records, wipe};
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use crate::format::{ManifestDigest, ModelId};
use crate::refuse;
use crate::store::StoreUrl;

/// A record to be written once the version is published.
pub struct Registration {
    records: Arc<dyn Records>,
    at: CatalogAt,
    store: StoreUrl,
    model_id: ModelId,
    /// The record's version before the seal; 0: none.
    before: u32,
}

/// What was sealed.
#[derive(Clone, Copy)]
pub struct SealedRecord<'a> {
    pub manifest: ManifestDigest,
    pub size_bytes: u64,
    /// Base64 of a raw key, or a transit ciphertext.
    pub encryption_key: &'a str,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Registered {
    pub record: String,
    pub version: u32,
}

impl Registration {
    /// Before anything is sealed: looks at what is there, so that what cannot work is refused now. Blocks.
    ///
    /// # Errors
    /// `USAGE` for a store that is no bucket, or a record of another model; what Vault answers.
    pub fn prepare(records: Arc<dyn Records>, at: CatalogAt, store: &StoreUrl, model: &str) -> Result<Registration> {
        let model_id = ModelId::of_name(model);
        if !matches!(store, StoreUrl::S3 { .. }) {
            refuse!(Usage, "--register: a record names a bucket, and {store} is none; register models of s3:// stores");
        }
        let before = match records.read(&at.mount, &at.path)? {
            None => 0,
            Some((mut data, version)) => {
                let other = data
                    .get("s3_key")
                    .and_then(|key| key.as_str())
                    .is_some_and(|key| key.rsplit_once('/').map_or(key, |(_, id)| id) != model_id.to_string());
                wipe(&mut data);
                if other {
                    refuse!(Usage, "--register: {at} is the record of another model than {model}; choose another name");
                }
                version
            }
        };
        Ok(Registration { records, at, store: store.clone(), model_id, before })
    }

    pub fn at(&self) -> &CatalogAt {
        &self.at
    }

    /// Blocks.
    ///
    /// # Errors
    /// `EXISTS` if the record changed since [`Registration::prepare`] and does not say the same; what Vault answers. The version is published in any
    /// case, and the error says so.
    pub fn write(&self, sealed: SealedRecord<'_>) -> Result<Registered> {
        self.try_write(sealed).map_err(|error| {
            error.context(format!(
                "the version is published, but its record {} was not written; look at it, then run the same command again \
                 (unchanged files are not uploaded again)",
                self.at
            ))
        })
    }

    /// Before slots are rewrapped: whether the record names this very version. Blocks.
    ///
    /// # Errors
    /// `NOT_FOUND` for no record; `USAGE` if it names another version or another store; `CATALOG` if it is malformed.
    pub fn check_names(&self, manifest: ManifestDigest) -> Result<()> {
        let (mut data, _) = self.there()?;
        let size = self.size_of(manifest, &data);
        wipe(&mut data);
        size.map(drop)
    }

    /// Puts the transit ciphertext of a rewrapped slot into the record that names its version. Nothing was opened, so what
    /// the record says of the version beside that is kept. Blocks.
    ///
    /// # Errors
    /// As [`Registration::check_names`] and [`Registration::write`].
    pub fn rewrap(&self, manifest: ManifestDigest, encryption_key: &str) -> Result<Registered> {
        let rewrapped = || {
            let (mut data, seen) = self.there()?;
            let size = self.size_of(manifest, &data);
            let same = data.get("encryption_key").and_then(Value::as_str) == Some(encryption_key);
            wipe(&mut data);
            let size_bytes = size?;
            if same {
                return Ok(Registered { record: self.at.to_string(), version: seen });
            }
            self.try_write(SealedRecord { manifest, size_bytes, encryption_key })
        };
        rewrapped().map_err(|error: Error| {
            error.context(format!(
                "the slots are rewrapped, but record {} was not; look at it, then run the same command again",
                self.at
            ))
        })
    }

    fn there(&self) -> Result<(Map<String, Value>, u32)> {
        match self.records.read(&self.at.mount, &self.at.path)? {
            Some(there) => Ok(there),
            None => {
                refuse!(NotFound, "--register: there is no record {}; `modelfs seal --register` writes one", self.at)
            }
        }
    }

    /// What the record says of the size of this version.
    fn size_of(&self, manifest: ManifestDigest, data: &Map<String, Value>) -> Result<u64> {
        let record = Record::parse(&self.at.path, data.clone(), 0)?;
        if record.manifest != manifest || record.store != self.store || record.model_id != self.model_id {
            refuse!(
                Usage,
                "--register: {} names sha256:{} in {}, and what is rewrapped is sha256:{manifest} in {}; name the version \
                 of the record, as MODEL@N",
                self.at,
                record.manifest,
                record.store,
                self.store
            );
        }
        Ok(record.size_bytes)
    }

    fn try_write(&self, sealed: SealedRecord<'_>) -> Result<Registered> {
        // An order that is given again, and a write whose answer was lost and that is sent again, meet themselves.
        let version = match self.version_that_says(sealed)? {
            Some(version) => version,
            None => self.write_once(sealed).or_else(|refused| {
                if refused.code() != Code::Exists {
                    return Err(refused);
                }
                self.version_that_says(sealed).ok().flatten().ok_or(refused)
            })?,
        };
        Ok(Registered { record: self.at.to_string(), version })
    }

    /// The version of the record, if its five fields are what we would write.
    fn version_that_says(&self, sealed: SealedRecord<'_>) -> Result<Option<u32>> {
        let Some((mut data, version)) = self.records.read(&self.at.mount, &self.at.path)? else { return Ok(None) };
        let mut wanted = Map::new();
        let filled =
            fill(&mut wanted, &self.store, self.model_id, sealed.manifest, sealed.size_bytes, sealed.encryption_key);
        let same = wanted.iter().all(|(name, value)| data.get(name) == Some(value));
        wipe(&mut wanted);
        wipe(&mut data);
        filled.map(|()| same.then_some(version))
    }

    fn write_once(&self, sealed: SealedRecord<'_>) -> Result<u32> {
        // Read again: what it holds beside the five fields is kept, and was not kept in memory meanwhile.
        let (mut data, seen) = self.records.read(&self.at.mount, &self.at.path)?.unwrap_or_default();
        let filled =
            fill(&mut data, &self.store, self.model_id, sealed.manifest, sealed.size_bytes, sealed.encryption_key);
        let written = filled.and_then(|()| {
            if seen != self.before {
                let message = format!("someone else wrote version {seen} of it, version {} was expected", self.before);
                return Err(Error::new(Code::Exists, message));
            }
            self.records.write(&self.at.mount, &self.at.path, &data, self.before)
        });
        wipe(&mut data);
        written
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeRecords;
    use super::*;
    use serde_json::json;

    fn prepared(records: &Arc<FakeRecords>) -> Result<Registration> {
        let at = "vault-kv://secret/models/llama".parse().expect("a record");
        let store = "s3://models/prod".parse().expect("a URL");
        Registration::prepare(records.clone(), at, &store, "acme/llama")
    }

    fn sealed(byte: u8) -> SealedRecord<'static> {
        SealedRecord { manifest: ManifestDigest([byte; 32]), size_bytes: 42, encryption_key: "vault:v1:abc" }
    }

    #[test]
    fn a_new_record_and_the_next_version_of_it_are_written() {
        let records = Arc::new(FakeRecords::default());
        for (version, byte) in [(1, 1), (2, 2)] {
            let done = prepared(&records).expect("prepared").write(sealed(byte)).expect("written");
            assert_eq!(done, Registered { record: "vault-kv://secret/models/llama".into(), version });
            let (data, _) = records.read("secret", "models/llama").expect("read").expect("there");
            assert_eq!(Record::parse("llama", data, version).expect("a record").manifest, ManifestDigest([byte; 32]));
        }
    }

    #[test]
    fn a_rewrapped_record_keeps_all_but_the_ciphertext_and_what_is_the_same_is_not_written_again() {
        let records = Arc::new(FakeRecords::default());
        prepared(&records).expect("prepared").write(sealed(1)).expect("written");
        for version in [2, 2] {
            let registration = prepared(&records).expect("prepared");
            registration.check_names(ManifestDigest([1; 32])).expect("it does");
            let done = registration.rewrap(ManifestDigest([1; 32]), "vault:v2:abc").expect("rewrapped");
            assert_eq!(done.version, version);
        }
        let (data, _) = records.read("secret", "models/llama").expect("read").expect("there");
        assert_eq!(data["encryption_key"], "vault:v2:abc");
        let record = Record::parse("llama", data, 2).expect("a record");
        assert_eq!((record.manifest, record.size_bytes), (ManifestDigest([1; 32]), 42));
    }

    /// The ciphertext of one version opens no other: a record that got it would open nothing.
    #[test]
    fn a_record_of_another_version_or_store_and_none_are_not_rewrapped() {
        let records = Arc::new(FakeRecords::default());
        let registration = prepared(&records).expect("prepared");
        assert_eq!(registration.check_names(ManifestDigest([1; 32])).expect_err("none").code(), Code::NotFound);
        registration.write(sealed(1)).expect("written");
        let registration = prepared(&records).expect("prepared");
        for refused in [
            registration.check_names(ManifestDigest([2; 32])).expect_err("another version"),
            registration.rewrap(ManifestDigest([2; 32]), "vault:v2:abc").expect_err("another version"),
        ] {
            assert_eq!(refused.code(), Code::Usage);
            assert!(refused.chain().contains("MODEL@N"), "{}", refused.chain());
        }
        let at = "vault-kv://secret/models/llama".parse().expect("a record");
        let elsewhere = "s3://copies/prod".parse().expect("a URL");
        let elsewhere = Registration::prepare(records.clone(), at, &elsewhere, "acme/llama").expect("prepared");
        assert_eq!(elsewhere.check_names(ManifestDigest([1; 32])).expect_err("another bucket").code(), Code::Usage);
        let (data, version) = records.read("secret", "models/llama").expect("read").expect("there");
        assert_eq!((version, data["encryption_key"].as_str()), (1, Some("vault:v1:abc")));
    }

    #[test]
    fn what_others_keep_in_a_record_stays() {
        let records = Arc::new(FakeRecords::default());
        records.put("secret/models/llama", json!({"owner": "team-x"}));
        prepared(&records).expect("prepared").write(sealed(1)).expect("written");
        assert_eq!(records.read("secret", "models/llama").expect("read").expect("there").0["owner"], "team-x");
    }

    #[test]
    fn a_record_that_changed_meanwhile_is_not_overwritten() {
        let records = Arc::new(FakeRecords::default());
        let first = prepared(&records).expect("prepared");
        let second = prepared(&records).expect("prepared");
        second.write(sealed(2)).expect("written");
        let error = first.write(sealed(1)).expect_err("the other was sooner");
        assert_eq!(error.code(), Code::Exists);
        let text = error.chain();
        assert!(text.contains("is published") && text.contains("version 1") && text.contains("again"), "{text}");
        let (data, version) = records.read("secret", "models/llama").expect("read").expect("there");
        assert_eq!(Record::parse("llama", data, version).expect("whole").manifest, ManifestDigest([2; 32]));
    }

    /// As Vault does behind a gateway that cuts the answer: the client sends the write again.
    #[test]
    fn a_write_that_meets_itself_is_done() {
        let records = Arc::new(FakeRecords::default());
        let (ours, lost) = (prepared(&records).expect("prepared"), prepared(&records).expect("prepared"));
        lost.write(sealed(1)).expect("written, and nobody hears it");
        assert_eq!(ours.write(sealed(1)).expect("there it is").version, 1);
        let another_key = SealedRecord { encryption_key: "vault:v1:other", ..sealed(1) };
        let refused = ours.write(another_key).expect_err("what opens it is another");
        assert_eq!(refused.code(), Code::Exists);
        assert_eq!(records.read("secret", "models/llama").expect("read").expect("there").1, 1);
    }

    #[test]
    fn the_record_of_another_model_and_a_store_without_a_bucket_are_refused_before_sealing() {
        let records = Arc::new(FakeRecords::default());
        records.put("secret/models/llama", json!({"s3_key": format!("prod/{}", ModelId::of_name("other"))}));
        assert_eq!(prepared(&records).err().expect("refused").code(), Code::Usage);
        let at = "vault-kv://secret/models/x".parse().expect("a record");
        let local = "/srv/models".parse().expect("a path");
        let refused = Registration::prepare(records, at, &local, "m").err().expect("refused");
        assert_eq!(refused.code(), Code::Usage);
    }
}
