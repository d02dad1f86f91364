//! A store in ordinary memory: the reference for the contract, and the ground on which tests stand.
//!
//! In and out: as the traits say. Promises: exactly the contract of `ChunkSource` and `ChunkSink`, nothing clever; a
//! test may look at and change what is stored (`put`, `get`) as a hostile store could.
//! Not here: faults (`fault`), waiting (`patient`). Held by: tests/store_contract.rs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use super::{
    ChunkSink, ChunkSource, LIST_NAMES_MAX, Listed, ObjectWriter, check_name, check_prefix, dirs_of, range_len,
};
use crate::error::{Code, Error, Result};
use crate::refuse;

type Objects = Arc<Mutex<BTreeMap<String, Bytes>>>;

/// Clones share the same objects.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    objects: Objects,
}

impl MemoryStore {
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts any bytes under any name behind the back of the contract, as a hostile store would.
    pub fn put(&self, name: &str, bytes: impl Into<Bytes>) {
        lock(&self.objects).insert(name.to_owned(), bytes.into());
    }

    pub fn get(&self, name: &str) -> Option<Bytes> {
        lock(&self.objects).get(name).cloned()
    }

    pub fn names(&self) -> Vec<String> {
        lock(&self.objects).keys().cloned().collect()
    }

    fn object(&self, name: &str) -> Result<Bytes> {
        check_name(name)?;
        self.get(name).ok_or_else(|| Error::new(Code::NotFound, format!("no object {name} in {}", self.describe())))
    }
}

fn lock(objects: &Objects) -> MutexGuard<'_, BTreeMap<String, Bytes>> {
    objects.lock().expect("no thread panics while it holds the map")
}

#[async_trait]
impl ChunkSource for MemoryStore {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        range_len(name, &range)?;
        let object = self.object(name)?;
        if range.end > object.len() as u64 {
            refuse!(Length, "object {name} has {} bytes, {}..{} were wanted", object.len(), range.start, range.end);
        }
        // A copy, not a share: nobody may keep 1 GB of an object alive by a piece of it.
        Ok(vec![Bytes::copy_from_slice(&object[range.start as usize..range.end as usize])])
    }

    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        let object = self.object(name)?;
        if object.len() as u64 > max {
            refuse!(Limit, "object {name} is longer than {max} bytes");
        }
        Ok(object)
    }

    async fn size(&self, name: &str) -> Result<u64> {
        Ok(self.object(name)?.len() as u64)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        check_prefix(prefix)?;
        let objects = lock(&self.objects);
        let below = objects.range(prefix.to_owned()..).take_while(|(name, _)| name.starts_with(prefix));
        let mut found = Vec::new();
        for (name, bytes) in below.filter(|(name, _)| check_name(name).is_ok()) {
            if found.len() == LIST_NAMES_MAX {
                refuse!(Limit, "more than {LIST_NAMES_MAX} objects below {prefix:?}");
            }
            found.push(Listed { name: name.clone(), size: bytes.len() as u64 });
        }
        Ok(found)
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        let listed = self.list(prefix).await?;
        Ok(dirs_of(prefix, listed.iter().map(|listed| listed.name.as_str())))
    }

    fn describe(&self) -> String {
        "memory:".to_owned()
    }
}

#[async_trait]
impl ChunkSink for MemoryStore {
    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        check_name(name)?;
        insert_new(&self.objects, name, bytes)
    }

    async fn begin(&self, name: &str, stored_len_max: u64) -> Result<Box<dyn ObjectWriter>> {
        check_name(name)?;
        let objects = Arc::clone(&self.objects);
        Ok(Box::new(Writer { objects, name: name.to_owned(), stored_len_max, bytes: BytesMut::new() }))
    }

    async fn replace_hint(&self, name: &str, bytes: Bytes) -> Result<()> {
        check_name(name)?;
        self.put(name, bytes);
        Ok(())
    }

    async fn delete(&self, name: &str) -> Result<()> {
        check_name(name)?;
        lock(&self.objects).remove(name);
        Ok(())
    }
}

fn insert_new(objects: &Objects, name: &str, bytes: Bytes) -> Result<()> {
    let mut objects = lock(objects);
    match objects.get(name) {
        Some(there) if *there == bytes => Ok(()),
        Some(_) => refuse!(Exists, "object {name} is there with other bytes"),
        None => {
            objects.insert(name.to_owned(), bytes);
            Ok(())
        }
    }
}

struct Writer {
    objects: Objects,
    name: String,
    stored_len_max: u64,
    bytes: BytesMut,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, piece: Bytes) -> Result<()> {
        if self.bytes.len() as u64 + piece.len() as u64 > self.stored_len_max {
            let max = self.stored_len_max;
            refuse!(Length, "object {} was announced with at most {max} bytes, more were written", self.name);
        }
        self.bytes.extend_from_slice(&piece);
        Ok(())
    }

    async fn finish(self: Box<Self>, stored_len: u64) -> Result<()> {
        if self.bytes.len() as u64 != stored_len {
            refuse!(Length, "object {} has {} of {stored_len} bytes written", self.name, self.bytes.len());
        }
        insert_new(&self.objects, &self.name, self.bytes.freeze())
    }

    async fn abort(self: Box<Self>) {}
}
