//! One store as several mounts of a process have opened it, each with credentials of its own.
//!
//! In: what each mount opened. Out: one source, asked through the first of them that is let in.
//! Promises: a mount that leaves, or whose credentials end, stops nobody else; what only one mount is refused is asked
//! through another that proved the same right; any other failure is the store's, and is told as it is.
//! Held by: the tests below, tests/host.rs.

use std::ops::Range;
use std::sync::{Arc, RwLock};

use async_trait::async_trait;
use bytes::Bytes;

use super::{ChunkSource, Listed, Progress};
use crate::error::{Code, Error, Result};

/// Openings of one store, by the number of the mount that made each.
#[derive(Debug, Default)]
pub struct Openings {
    opened: RwLock<Vec<(u64, Arc<dyn ChunkSource>)>>,
}

impl Openings {
    pub fn add(&self, mount: u64, source: Arc<dyn ChunkSource>) {
        self.opened.write().expect("a thread died holding the openings").push((mount, source));
    }

    pub fn remove(&self, mount: u64) {
        self.opened.write().expect("a thread died holding the openings").retain(|(of, _)| *of != mount);
    }

    fn now(&self) -> Vec<Arc<dyn ChunkSource>> {
        let opened = self.opened.read().expect("a thread died holding the openings");
        opened.iter().map(|(_, source)| source.clone()).collect()
    }
}

/// The answer through the first opening that is not refused.
macro_rules! through {
    ($self:ident, $source:ident => $ask:expr) => {{
        let mut refused = Error::new(Code::Stopping, "every mount that had opened the store is gone");
        for $source in $self.now() {
            match $ask.await {
                Err(error) if error.code() == Code::StoreDenied => refused = error,
                answer => return answer,
            }
        }
        Err(refused)
    }};
}

#[async_trait]
impl ChunkSource for Openings {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        through!(self, source => source.read_range(name, range.clone()))
    }

    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        through!(self, source => source.read_small(name, max))
    }

    async fn read_range_watched(&self, name: &str, range: Range<u64>, progress: &Progress) -> Result<Vec<Bytes>> {
        through!(self, source => source.read_range_watched(name, range.clone(), progress))
    }

    async fn read_small_watched(&self, name: &str, max: u64, progress: &Progress) -> Result<Bytes> {
        through!(self, source => source.read_small_watched(name, max, progress))
    }

    async fn size(&self, name: &str) -> Result<u64> {
        through!(self, source => source.size(name))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        through!(self, source => source.list(prefix))
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        through!(self, source => source.list_dirs(prefix))
    }

    fn describe(&self) -> String {
        self.now().first().map_or_else(String::new, |source| source.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::fault::{Fault, Faulty, When};
    use crate::store::memory::MemoryStore;

    fn holding(text: &'static str) -> Arc<Faulty<MemoryStore>> {
        let store = MemoryStore::new();
        store.put("a/b", text.as_bytes());
        Arc::new(Faulty::new(store))
    }

    fn read(openings: &Openings) -> Result<Vec<u8>> {
        let bytes = futures::executor::block_on(openings.read_small("a/b", 100))?;
        Ok(bytes.to_vec())
    }

    #[test]
    fn who_is_refused_is_passed_over_and_who_left_is_not_asked() {
        let (first, second) = (holding("first"), holding("second"));
        let openings = Openings::default();
        assert_eq!(read(&openings).expect_err("nobody").code(), Code::Stopping);
        openings.add(1, first.clone());
        openings.add(2, second);
        assert_eq!(read(&openings).expect("read"), b"first");

        first.on(When::any(), Fault::Fail(Code::StoreDenied));
        assert_eq!(read(&openings).expect("read"), b"second");

        openings.remove(2);
        assert_eq!(read(&openings).expect_err("refused").code(), Code::StoreDenied);
    }

    #[test]
    fn what_is_no_refusal_is_told_as_it_is() {
        let (first, second) = (holding("first"), holding("second"));
        let openings = Openings::default();
        openings.add(1, first.clone());
        openings.add(2, second);
        first.on(When::any(), Fault::Fail(Code::Unreachable));
        assert_eq!(read(&openings).expect_err("away").code(), Code::Unreachable);
    }
}
