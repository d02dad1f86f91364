//! A floor kept in a versioned key-value store outside this machine: Vault's KV v2.
//!
//! In: a store that writes an entry only if nobody else did since it was read. Out: a [`FloorPin`]. One entry a store, model
//! and channel, its name a hash of all three; its fields are those of the local file.
//! Promises: what is pinned only grows, whoever writes at the same time; an entry that is not a floor, or one of another
//! channel, is refused, not taken for none. Whoever may write the entry can raise the floor and so refuse service, and can
//! lower it: give servers the right to read alone.
//! Spec: docs/FORMAT.md b.2. Held by: the tests below, tests/versions.rs, tests/recovery.rs (a real Vault).

use std::fmt;

use serde_json::{Map, Value};

use super::floor::{FloorPin, FloorPlace, RefFloor};
use crate::crypto::sha256;
use crate::error::{Code, Error, Result};
use crate::refuse;
use crate::vault::Vault;

/// How often a write is made again after somebody else was first.
const RACES_MAX: u32 = 16;

/// What a pin needs of a key-value store. May ask a server and block.
pub trait VersionedKv: Send + Sync + fmt::Debug {
    /// The newest entry and its version; `None` if there is none.
    fn read(&self, path: &str) -> Result<Option<(Map<String, Value>, u32)>>;

    /// Writes an entry over `version` (0: over none).
    ///
    /// # Errors
    /// `EXISTS` if the newest version is another one.
    fn write(&self, path: &str, data: &Map<String, Value>, version: u32) -> Result<()>;

    /// For people: `vault-kv:MOUNT`.
    fn describe(&self) -> String;
}

/// Floors below one path of a key-value store.
#[derive(Debug)]
pub struct KvFloor<K> {
    kv: K,
    path: String,
}

impl<K: VersionedKv> KvFloor<K> {
    pub fn new(kv: K, path: &str) -> KvFloor<K> {
        KvFloor { kv, path: path.trim_matches('/').to_owned() }
    }

    fn entry(&self, at: FloorPlace<'_>) -> String {
        let digest = sha256(&[b"MFS1/floor\0", at.store.as_bytes(), b"\0", &at.model.0, at.channel.as_bytes()]);
        format!("{}/{}", self.path, hex::encode(&digest[..16]))
    }

    /// The floor, and the version to write over.
    fn read(&self, at: FloorPlace<'_>) -> Result<(Option<RefFloor>, u32)> {
        let entry = self.entry(at);
        let Some((data, version)) = self.kv.read(&entry)? else { return Ok((None, 0)) };
        let floor: RefFloor = serde_json::from_value(Value::Object(data)).map_err(|err| {
            let what = format!("entry {entry} in {} is no floor; look who wrote it", self.kv.describe());
            Error::new(Code::State, what).with_source(err)
        })?;
        if floor.store != at.store || floor.channel != at.channel {
            refuse!(
                State,
                "entry {entry} in {} is the floor of tag {} in {}; look who wrote it",
                self.kv.describe(),
                floor.channel,
                floor.store
            );
        }
        // Number 0 is a floor that was reset.
        Ok(((floor.max_ref_seq > 0).then_some(floor), version))
    }

    /// Reads, decides, writes; again if somebody else was first. `None`: nothing to write.
    fn change(&self, at: FloorPlace<'_>, decide: impl Fn(Option<RefFloor>) -> Result<Option<RefFloor>>) -> Result<()> {
        for _ in 0..RACES_MAX {
            let (known, version) = self.read(at)?;
            let Some(wanted) = decide(known)? else { return Ok(()) };
            let Ok(Value::Object(data)) = serde_json::to_value(&wanted) else {
                unreachable!("our own plain struct is a JSON object")
            };
            match self.kv.write(&self.entry(at), &data, version) {
                Err(first) if first.code() == Code::Exists => {}
                other => return other,
            }
        }
        refuse!(
            Exists,
            "floor {} in {} was written by others {RACES_MAX} times in a row, or was deleted and not destroyed: then \
             remove its metadata",
            self.entry(at),
            self.kv.describe()
        );
    }
}

impl<K: VersionedKv> FloorPin for KvFloor<K> {
    fn load(&self, at: FloorPlace<'_>) -> Result<Option<RefFloor>> {
        Ok(self.read(at)?.0)
    }

    fn advance(&self, at: FloorPlace<'_>, floor: &RefFloor) -> Result<()> {
        self.change(at, |known| match known {
            None => Ok(Some(floor.clone())),
            Some(known) => {
                let merged = known.clone().merged(floor)?;
                Ok((merged != known).then_some(merged))
            }
        })
    }

    fn reset(&self, at: FloorPlace<'_>) -> Result<()> {
        self.change(at, |known| {
            Ok(known.map(|known| RefFloor {
                store: known.store,
                model: known.model,
                channel: known.channel,
                ..RefFloor::default()
            }))
        })
    }
}

/// A KV v2 engine of Vault, as a store of floors.
#[derive(Debug)]
pub struct VaultKv {
    vault: Vault,
    mount: String,
}

impl VaultKv {
    pub fn new(vault: Vault, mount: &str) -> VaultKv {
        VaultKv { vault, mount: mount.to_owned() }
    }
}

impl VersionedKv for VaultKv {
    fn read(&self, path: &str) -> Result<Option<(Map<String, Value>, u32)>> {
        self.vault.kv_read(&self.mount, path, None)
    }

    fn write(&self, path: &str, data: &Map<String, Value>, version: u32) -> Result<()> {
        self.vault.kv_write(&self.mount, path, data, version).map(drop)
    }

    fn describe(&self) -> String {
        format!("vault-kv:{}", self.mount)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ModelId;
    use std::collections::BTreeMap;
    use std::sync::{Arc, Mutex};

    type Entries = BTreeMap<String, (Map<String, Value>, u32)>;

    /// Writes of others that come between a read and the write after it.
    type Between = Vec<RefFloor>;

    #[derive(Debug, Default, Clone)]
    struct FakeKv {
        entries: Arc<Mutex<Entries>>,
        between: Arc<Mutex<Between>>,
    }

    impl VersionedKv for FakeKv {
        fn read(&self, path: &str) -> Result<Option<(Map<String, Value>, u32)>> {
            Ok(self.entries.lock().unwrap().get(path).cloned())
        }

        fn write(&self, path: &str, data: &Map<String, Value>, version: u32) -> Result<()> {
            let mut entries = self.entries.lock().unwrap();
            if let Some(other) = self.between.lock().unwrap().pop() {
                let Value::Object(data) = serde_json::to_value(other).unwrap() else { panic!() };
                let newest = entries.get(path).map_or(0, |(_, version)| *version);
                entries.insert(path.to_owned(), (data, newest + 1));
            }
            let newest = entries.get(path).map_or(0, |(_, version)| *version);
            if newest != version {
                refuse!(Exists, "version {newest}, not {version}");
            }
            entries.insert(path.to_owned(), (data.clone(), version + 1));
            Ok(())
        }

        fn describe(&self) -> String {
            "fake".into()
        }
    }

    const AT: FloorPlace<'_> = FloorPlace { store: "s3://b/p", model: ModelId([1; 32]), channel: "latest" };

    fn floor(ref_seq: u64, min_version_seq: u64) -> RefFloor {
        RefFloor {
            store: AT.store.into(),
            model: "acme/m".into(),
            channel: AT.channel.into(),
            max_ref_seq: ref_seq,
            ref_digest: hex::encode([ref_seq as u8; 32]),
            min_version_seq,
            ..RefFloor::default()
        }
    }

    fn pin() -> (KvFloor<FakeKv>, FakeKv) {
        let kv = FakeKv::default();
        (KvFloor::new(kv.clone(), "/modelfs/floor/"), kv)
    }

    #[test]
    fn a_pinned_floor_only_grows_and_each_channel_has_its_own() {
        let (pin, kv) = pin();
        assert_eq!(pin.load(AT).unwrap(), None);
        pin.advance(AT, &floor(5, 1)).unwrap();
        pin.advance(AT, &floor(3, 2)).unwrap();
        let known = pin.load(AT).unwrap().unwrap();
        assert_eq!((known.max_ref_seq, known.min_version_seq), (5, 2));
        assert_eq!(known.ref_digest, floor(5, 0).ref_digest);
        for other in [FloorPlace { store: "s3://b", ..AT }, FloorPlace { channel: "prod", ..AT }] {
            assert_eq!(pin.load(other).unwrap(), None);
        }
        let writes = kv.entries.lock().unwrap().values().next().unwrap().1;
        pin.advance(AT, &floor(5, 2)).unwrap();
        assert_eq!(kv.entries.lock().unwrap().values().next().unwrap().1, writes, "nothing to write was written");
        let entry = kv.entries.lock().unwrap().keys().next().unwrap().clone();
        assert!(entry.starts_with("modelfs/floor/") && !entry.contains("acme"), "{entry}");
    }

    #[test]
    fn writers_at_the_same_time_lose_nothing_and_a_fork_between_them_is_refused() {
        let (pin, kv) = pin();
        kv.between.lock().unwrap().extend([floor(9, 1), floor(7, 4)]);
        pin.advance(AT, &floor(8, 2)).unwrap();
        let known = pin.load(AT).unwrap().unwrap();
        // The second of the others replaced the first, as a foolish writer would; ours is merged into what it found.
        assert_eq!((known.max_ref_seq, known.min_version_seq), (9, 2));
        let fork = RefFloor { ref_digest: hex::encode([0xFF; 32]), ..known };
        assert_eq!(pin.advance(AT, &fork).unwrap_err().code(), Code::Fork);
        kv.between.lock().unwrap().extend((0..100).map(|n| floor(100 + n, 0)));
        assert_eq!(pin.advance(AT, &floor(1000, 9)).unwrap_err().code(), Code::Exists);
    }

    #[test]
    fn a_reset_floor_is_none_and_an_entry_that_is_no_floor_is_refused() {
        let (pin, kv) = pin();
        pin.advance(AT, &floor(5, 3)).unwrap();
        pin.reset(AT).unwrap();
        assert_eq!(pin.load(AT).unwrap(), None);
        pin.reset(AT).unwrap();
        pin.advance(AT, &floor(2, 0)).unwrap();
        assert_eq!(pin.load(AT).unwrap().unwrap().max_ref_seq, 2);

        let entry = kv.entries.lock().unwrap().keys().next().unwrap().clone();
        let mut moved = kv.entries.lock().unwrap()[&entry].0.clone();
        moved.insert("channel".into(), "prod".into());
        for wrong in [Map::new(), [("x".to_owned(), Value::Null)].into_iter().collect(), moved] {
            kv.entries.lock().unwrap().insert(entry.clone(), (wrong, 9));
            assert_eq!(pin.load(AT).unwrap_err().code(), Code::State);
            assert_eq!(pin.advance(AT, &floor(9, 9)).unwrap_err().code(), Code::State);
        }
    }
}
