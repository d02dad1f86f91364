//! Which stores do not answer, and since when: told once when it begins, and once when it is over.
//!
//! In: how each fetch from a store ended, retries behind it. Out: the change, to whoever reports it; the state, to health.
//! Promises: while all answer, an answer costs one load.
//! Held by: the tests below.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub struct Stores {
    any: AtomicBool,
    silent: Mutex<BTreeMap<String, Instant>>,
}

impl Stores {
    /// Whether all answer, as far as anybody tried.
    pub fn all_answer(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// It answered. How long it had not, if this is the first answer after that.
    pub fn answered(&self, store: &str) -> Option<Duration> {
        if self.all_answer() {
            return None;
        }
        let mut silent = self.silent.lock().expect("a thread died holding the silent stores");
        let since = silent.remove(store)?;
        self.any.store(!silent.is_empty(), Ordering::Release);
        Some(since.elapsed())
    }

    /// It did not, after every attempt. `true`: it did before.
    pub fn fell_silent(&self, store: &str) -> bool {
        let mut silent = self.silent.lock().expect("a thread died holding the silent stores");
        self.any.store(true, Ordering::Release);
        let new = !silent.contains_key(store);
        if new {
            silent.insert(store.to_owned(), Instant::now());
        }
        new
    }

    pub fn is_silent(&self, store: &str) -> bool {
        let silent = self.silent.lock().expect("a thread died holding the silent stores");
        silent.contains_key(store)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_is_told_once_and_of_the_store_that_changed() {
        let stores = Stores::default();
        assert_eq!(stores.answered("a"), None);
        assert!(stores.fell_silent("a"));
        assert!(!stores.fell_silent("a"), "known");
        assert!(stores.is_silent("a") && !stores.is_silent("b"));
        assert_eq!(stores.answered("b"), None);
        assert!(stores.answered("a").is_some());
        assert_eq!(stores.answered("a"), None);
        assert!(!stores.is_silent("a") && stores.fell_silent("a"));
    }
}
