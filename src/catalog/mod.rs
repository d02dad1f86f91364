//! Models that a Vault KV path lists: where each is, which version, how large, and what opens it.
//!
//! ```text
//!  vault-kv://MOUNT/PATH ──list──> names ──read──> Record (5 fields) ──open──> store, signed manifest, data key
//!                                                     ^ seal --register writes one, key rotate --register another key into it;
//!                                                       both with check-and-set, the second while both keys open
//! ```
//! In: the records of a KV version 2 path. Out: names, checked [`Record`]s, and from [`Catalog::open`] a model as any store
//! gives it. Promises: a record decides where to look and what to expect, never whom to trust: a trusted publisher must
//! have signed what it names; a field that is missing, of another type or not what the signed manifest says is refused
//! naming the record and the field, never its value; the key of a record exists while its model is opened and no longer;
//! a catalog has at most [`RECORDS_MAX`] records in at most [`DEPTH_MAX`] levels.
//! Not here: Vault itself (`vault`), what a signature or a slot is (`keys`, `format`).
//! Spec: docs/CATALOG.md. Held by: the tests of each file, tests/catalog.rs.

mod open;
mod record;
mod register;
mod vault;

pub use open::{Catalog, OpenedRecord};
pub use record::{Record, RecordKey};
pub use register::{Registered, Registration, SealedRecord};
pub use vault::VaultRecords;

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};
use crate::format::check_model_name;
use crate::keys::KeySource;
use crate::mem::Secret;
use crate::refuse;
use crate::store::StoreUrl;
use crate::vault::Vault;

/// Most records of one catalog; more are refused, not cut off.
pub const RECORDS_MAX: usize = 10_000;

/// Deepest level of a record below the catalog's path.
pub const DEPTH_MAX: usize = 8;

/// What a catalog asks of Vault. Every method may block.
pub trait Records: Send + Sync {
    /// One level below `path`, folders ending in `/`; empty if nothing is there.
    fn list(&self, mount: &str, path: &str) -> Result<Vec<String>>;

    /// The newest version of a record, and its number; `None` if it is not there or was deleted.
    fn read(&self, mount: &str, path: &str) -> Result<Option<(Map<String, Value>, u32)>>;

    /// Writes the version after `cas` (0: none was there); `EXISTS` if another one was written meanwhile.
    fn write(&self, mount: &str, path: &str, data: &Map<String, Value>, cas: u32) -> Result<u32>;

    /// The data key inside a transit ciphertext. `source` is a `KeySource::VaultTransit`.
    fn unwrap_transit(&self, source: &KeySource, context: &[u8; 32], wrapped: &str) -> Result<Secret<32>>;
}

/// Overwrites every text in a record: any of them may be a secret.
pub use crate::vault::wipe_map as wipe;

/// Where a catalog, or one record of it, is: `vault-kv://MOUNT/PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CatalogAt {
    pub mount: String,
    pub path: String,
}

impl CatalogAt {
    /// The record called `name` below this path.
    pub fn record(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }
}

impl TryFrom<&StoreUrl> for CatalogAt {
    type Error = Error;

    fn try_from(url: &StoreUrl) -> Result<CatalogAt> {
        match url {
            StoreUrl::VaultKv { mount, path } => Ok(CatalogAt { mount: mount.clone(), path: path.clone() }),
            StoreUrl::Local(_) | StoreUrl::S3 { .. } => {
                refuse!(Usage, "{url} is no catalog; write vault-kv://MOUNT/PATH")
            }
        }
    }
}

impl std::str::FromStr for CatalogAt {
    type Err = Error;

    fn from_str(text: &str) -> Result<CatalogAt> {
        CatalogAt::try_from(&text.parse::<StoreUrl>()?)
    }
}

impl fmt::Display for CatalogAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vault-kv://{}/{}", self.mount, self.path)
    }
}

/// The names of all records below `at`, sorted. One request a folder.
///
/// # Errors
/// `LIMIT` for more than [`RECORDS_MAX`] records or folders, or more than [`DEPTH_MAX`] levels; `CATALOG` for a name that
/// no model can have; `NOT_FOUND` for a path with nothing below it; what Vault answers.
pub fn names(records: &dyn Records, at: &CatalogAt) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![(String::new(), 1)];
    let mut folders_seen = 0;
    while let Some((folder, depth)) = folders.pop() {
        folders_seen += 1;
        if folders_seen > RECORDS_MAX {
            refuse!(Limit, "{at} has more than {RECORDS_MAX} folders");
        }
        let path = if folder.is_empty() { at.path.clone() } else { at.record(folder.trim_end_matches('/')) };
        for name in records.list(&at.mount, &path)? {
            let whole = format!("{folder}{name}");
            let bare = whole.trim_end_matches('/');
            let odd = |error: Error| {
                Error::new(Code::Catalog, format!("{at} lists a name that no model can have")).with_source(error)
            };
            check_model_name(bare).map_err(odd)?;
            if name.ends_with('/') {
                if depth == DEPTH_MAX {
                    refuse!(Limit, "{at} is deeper than {DEPTH_MAX} levels at {bare}");
                }
                folders.push((format!("{bare}/"), depth + 1));
            } else if found.len() == RECORDS_MAX {
                refuse!(Limit, "{at} has more than {RECORDS_MAX} records");
            } else {
                found.push(whole);
            }
        }
    }
    if found.is_empty() {
        refuse!(NotFound, "{at} lists no records; `modelfs seal … --register {at}/NAME` writes one");
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// The record of that name, as it stands now.
///
/// # Errors
/// `NOT_FOUND`; `CATALOG`, naming the record and the field; what Vault answers.
pub fn read(records: &dyn Records, at: &CatalogAt, name: &str) -> Result<Record> {
    check_model_name(name)?;
    match records.read(&at.mount, &at.record(name))? {
        Some((data, version)) => Record::parse(name, data, version),
        None => refuse!(NotFound, "{at} has no record {name}"),
    }
}

/// The records of the Vault that the user named.
///
/// # Errors
/// `USAGE` if none was.
pub fn records(vault: Option<&Vault>) -> Result<Arc<dyn Records>> {
    match vault {
        Some(vault) => Ok(Arc::new(VaultRecords(vault.clone()))),
        None => refuse!(Usage, "a catalog lies in Vault; say where that is with --vault-addr or VAULT_ADDR"),
    }
}

/// Records in memory, for tests.
#[cfg(test)]
pub(crate) mod fake {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    /// By mount and path: the fields and the version.
    type Entries = BTreeMap<String, (Map<String, Value>, u32)>;
    /// Ciphertext, context, data key.
    type Wrapped = (String, [u8; 32], [u8; 32]);

    #[derive(Default)]
    pub(crate) struct FakeRecords {
        pub(crate) data: Mutex<Entries>,
        /// What a transit key unwraps: ciphertext, context, data key.
        pub(crate) transit: Mutex<Vec<Wrapped>>,
    }

    impl FakeRecords {
        pub(crate) fn put(&self, path: &str, value: Value) {
            let Value::Object(data) = value else { panic!("a record is an object") };
            self.data.lock().unwrap().insert(path.into(), (data, 1));
        }
    }

    impl Records for FakeRecords {
        fn list(&self, mount: &str, path: &str) -> Result<Vec<String>> {
            let below = format!("{mount}/{path}/");
            let data = self.data.lock().unwrap();
            let mut names: Vec<String> = data
                .keys()
                .filter_map(|key| key.strip_prefix(&below))
                .map(|rest| rest.split_once('/').map_or(rest.to_owned(), |(folder, _)| format!("{folder}/")))
                .collect();
            names.dedup();
            Ok(names)
        }
        fn read(&self, mount: &str, path: &str) -> Result<Option<(Map<String, Value>, u32)>> {
            Ok(self.data.lock().unwrap().get(&format!("{mount}/{path}")).cloned())
        }
        fn write(&self, mount: &str, path: &str, new: &Map<String, Value>, cas: u32) -> Result<u32> {
            let mut data = self.data.lock().unwrap();
            let key = format!("{mount}/{path}");
            let seen = data.get(&key).map_or(0, |(_, version)| *version);
            if seen != cas {
                refuse!(Exists, "version {seen} is there, {cas} was expected");
            }
            data.insert(key, (new.clone(), cas + 1));
            Ok(cas + 1)
        }
        fn unwrap_transit(&self, _: &KeySource, context: &[u8; 32], wrapped: &str) -> Result<Secret<32>> {
            let known = self.transit.lock().unwrap();
            match known.iter().find(|(text, at, _)| text == wrapped && at == context) {
                Some((_, _, key)) => Ok(Secret::from_bytes(&mut key.clone())),
                None => refuse!(VaultDenied, "transit does not open this"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::FakeRecords;
    use super::*;
    use serde_json::json;

    #[test]
    fn catalogs_are_named_by_mount_and_path() {
        let at: CatalogAt = "vault-kv://secret/team/models/".parse().expect("a catalog");
        assert_eq!((at.mount.as_str(), at.path.as_str()), ("secret", "team/models"));
        assert_eq!(at.to_string(), "vault-kv://secret/team/models");
        assert_eq!(at.record("acme/llama"), "team/models/acme/llama");
        for other in ["s3://models/prod", "/srv/models", "vault-kv://secret"] {
            assert_eq!(other.parse::<CatalogAt>().expect_err(other).code(), Code::Usage);
        }
    }

    #[test]
    fn records_of_all_levels_are_listed_by_their_path_below() {
        let records = FakeRecords::default();
        for path in ["s/models/b", "s/models/acme/llama", "s/models/acme/x/y", "s/other/z"] {
            records.put(path, json!({}));
        }
        let at = "vault-kv://s/models".parse().expect("a catalog");
        assert_eq!(names(&records, &at).expect("listed"), ["acme/llama", "acme/x/y", "b"]);
        let none = "vault-kv://s/none".parse().expect("a catalog");
        assert_eq!(names(&records, &none).expect_err("empty").code(), Code::NotFound);
    }

    /// Vault's answers are bounded in number and depth, and a name may not lead elsewhere.
    #[test]
    fn endless_deep_and_odd_listings_are_refused() {
        struct Odd(fn(&str) -> Vec<String>);
        impl Records for Odd {
            fn list(&self, _: &str, path: &str) -> Result<Vec<String>> {
                Ok((self.0)(path))
            }
            fn read(&self, _: &str, _: &str) -> Result<Option<(Map<String, Value>, u32)>> {
                unreachable!("nothing is read")
            }
            fn write(&self, _: &str, _: &str, _: &Map<String, Value>, _: u32) -> Result<u32> {
                unreachable!("nothing is written")
            }
            fn unwrap_transit(&self, _: &KeySource, _: &[u8; 32], _: &str) -> Result<Secret<32>> {
                unreachable!("nothing is unwrapped")
            }
        }
        let at = "vault-kv://s/models".parse().expect("a catalog");
        type Listing = fn(&str) -> Vec<String>;
        let cases: [(Listing, Code); 6] = [
            (|_| vec!["deeper/".into()], Code::Limit),
            (|_| (0..=RECORDS_MAX).map(|i| format!("m{i}")).collect(), Code::Limit),
            (|_| vec!["../../sys".into()], Code::Catalog),
            (|_| vec!["/".into()], Code::Catalog),
            (|_| vec!["a\nb".into()], Code::Catalog),
            (|_| vec!["a@b".into()], Code::Catalog),
        ];
        for (answer, wanted) in cases {
            assert_eq!(names(&Odd(answer), &at).expect_err("refused").code(), wanted);
        }
    }

    #[test]
    fn a_wiped_record_holds_nothing() {
        let mut data = json!({"a": "canary", "b": ["canary", {"c": "canary"}]}).as_object().expect("an object").clone();
        wipe(&mut data);
        assert!(data.is_empty());
    }
}
