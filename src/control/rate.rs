//! How often each peer may ask: a bounded table of token buckets.
//!
//! In: who asks. Out: whether it is too soon.
//! Promises: the table never holds more than [`PEERS_MAX`] peers, whoever comes; one that was quiet for [`IDLE`] is
//! forgotten; when all are busy, newcomers share one bucket.
//! Held by: the tests below.

use std::collections::HashMap;
use std::hash::Hash;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};

pub const PEERS_MAX: usize = 1024;

/// By then every bucket is full again: forgetting it changes nothing.
const IDLE: Duration = Duration::from_secs(60);

pub struct Rates<K> {
    quota: Quota,
    peers: Mutex<HashMap<K, (DefaultDirectRateLimiter, Instant)>>,
    rest: DefaultDirectRateLimiter,
}

impl<K: Eq + Hash> Rates<K> {
    /// So many a second, and `burst` at once after a pause. Numbers below 1 count as 1.
    pub fn new(per_second: u32, burst: u32) -> Rates<K> {
        let at_least_one = |number| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
        Rates::of(Quota::per_second(at_least_one(per_second)).allow_burst(at_least_one(burst)))
    }

    pub(super) fn of(quota: Quota) -> Rates<K> {
        Rates { quota, peers: Mutex::default(), rest: RateLimiter::direct(quota) }
    }

    /// Counts a request. `false`: too many.
    pub fn admits(&self, peer: K) -> bool {
        self.admits_at(peer, Instant::now())
    }

    fn admits_at(&self, peer: K, now: Instant) -> bool {
        let mut peers = self.peers.lock().expect("a thread died holding the peers");
        if let Some((bucket, last)) = peers.get_mut(&peer) {
            *last = now;
            return bucket.check().is_ok();
        }
        if peers.len() >= PEERS_MAX {
            peers.retain(|_, (_, last)| now.saturating_duration_since(*last) < IDLE);
        }
        if peers.len() >= PEERS_MAX {
            return self.rest.check().is_ok();
        }
        let bucket = RateLimiter::direct(self.quota);
        let admitted = bucket.check().is_ok();
        peers.insert(peer, (bucket, now));
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_has_a_burst_of_its_own_and_then_waits() {
        let rates = Rates::new(1, 3);
        let admitted = |peer: u32| (0..20).filter(|_| rates.admits(peer)).count();
        let (one, other) = (admitted(1), admitted(2));
        // A bucket may gain one or two while the test is held up.
        assert!((3..=6).contains(&one) && (3..=6).contains(&other), "{one} {other}");
    }

    #[test]
    fn the_table_is_bounded_and_forgets_who_is_quiet() {
        let rates = Rates::new(1, 2);
        let start = Instant::now();
        for peer in 0..(PEERS_MAX as u32 * 4) {
            rates.admits_at(peer, start);
        }
        let held = || rates.peers.lock().expect("a test").len();
        assert_eq!(held(), PEERS_MAX);
        // Newcomers share a bucket that they have emptied.
        assert!((0..50).filter(|peer| rates.admits_at(1_000_000 + peer, start)).count() < 50);
        assert!(rates.admits_at(2_000_000, start + IDLE));
        assert_eq!(held(), 1);
    }
}
