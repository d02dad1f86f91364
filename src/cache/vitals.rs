//! What is told of a model beside its bytes: where it comes from, until when it may be believed, how long its last load took.
//!
//! Promises: one short lock a chunk; nothing here decides anything.
//! Held by: the tests below.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// A load is over when nothing of the model was fetched for so long: what comes later is another one.
pub const LOAD_QUIET: Duration = Duration::from_secs(10);

/// One of a [`Model`](super::Model).
#[derive(Debug)]
pub struct Vitals {
    store: OnceLock<String>,
    /// Unix seconds; `i64::MAX`: never, or not known.
    expires_at: AtomicI64,
    load: Mutex<Option<Load>>,
}

/// A run of fetches of one model without a pause of [`LOAD_QUIET`].
#[derive(Debug, Clone, Copy)]
struct Load {
    began: Instant,
    last: Instant,
    bytes: u64,
}

/// How a load went, or goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// From the first chunk that was asked for to the last one that came.
    pub took: Duration,
    /// Plaintext.
    pub bytes: u64,
}

impl Default for Vitals {
    fn default() -> Vitals {
        Vitals { store: OnceLock::new(), expires_at: AtomicI64::new(i64::MAX), load: Mutex::default() }
    }
}

impl Vitals {
    /// The URL of the store, as it may be shown. The first word counts.
    pub fn set_store(&self, store: &str) {
        self.store.get_or_init(|| store.to_owned());
    }

    pub fn store(&self) -> Option<&str> {
        self.store.get().map(String::as_str)
    }

    /// When the ref that leads to this version ends.
    pub fn set_expires_at(&self, seconds: i64) {
        self.expires_at.store(seconds, Ordering::Relaxed);
    }

    pub fn expires_at(&self) -> Option<i64> {
        Some(self.expires_at.load(Ordering::Relaxed)).filter(|at| *at != i64::MAX)
    }

    /// A chunk is asked for.
    pub(super) fn asked(&self, now: Instant) {
        let mut load = self.load.lock().expect("a thread died holding a load");
        match &mut *load {
            Some(load) if now.saturating_duration_since(load.last) < LOAD_QUIET => {}
            load => *load = Some(Load { began: now, last: now, bytes: 0 }),
        }
    }

    /// It came, and was opened.
    pub(super) fn came(&self, now: Instant, bytes: u64) {
        if let Some(load) = &mut *self.load.lock().expect("a thread died holding a load") {
            load.last = load.last.max(now);
            load.bytes += bytes;
        }
    }

    /// The last load; `None` before the first byte came.
    pub fn last_load(&self) -> Option<Loaded> {
        let load = *self.load.lock().expect("a thread died holding a load");
        load.filter(|load| load.bytes > 0).map(|load| Loaded { took: load.last - load.began, bytes: load.bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_lasts_from_the_first_wish_to_the_last_byte_and_a_pause_begins_another() {
        let vitals = Vitals::default();
        let start = Instant::now();
        assert_eq!(vitals.last_load(), None);
        vitals.asked(start);
        assert_eq!(vitals.last_load(), None, "nothing came yet");
        vitals.came(start + Duration::from_secs(2), 10);
        vitals.asked(start + Duration::from_secs(3));
        vitals.came(start + Duration::from_secs(4), 5);
        assert_eq!(vitals.last_load(), Some(Loaded { took: Duration::from_secs(4), bytes: 15 }));
        // A chunk that came before another one that was asked for earlier does not turn time back.
        vitals.came(start + Duration::from_secs(1), 1);
        assert_eq!(vitals.last_load().map(|load| load.took), Some(Duration::from_secs(4)));
        let later = start + Duration::from_secs(4) + LOAD_QUIET;
        vitals.asked(later);
        vitals.came(later + Duration::from_millis(5), 7);
        assert_eq!(vitals.last_load(), Some(Loaded { took: Duration::from_millis(5), bytes: 7 }));
    }

    #[test]
    fn what_never_ends_has_no_end_to_tell() {
        let vitals = Vitals::default();
        assert_eq!(vitals.expires_at(), None);
        vitals.set_expires_at(1_800_000_000);
        assert_eq!(vitals.expires_at(), Some(1_800_000_000));
        vitals.set_store("file:///a");
        vitals.set_store("file:///b");
        assert_eq!(vitals.store(), Some("file:///a"));
    }
}
