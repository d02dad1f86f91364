//! Counts the bytes of locked memory in use and says when there is room again.
//!
//! In: a total that never changes, requests in bytes. Out: a [`Grant`] that gives its bytes back when dropped.
//! Promises: the sum of live grants never exceeds the total, under any number of threads; room reserved for demand
//! reads is not given to prefetch (`keep_free`); whoever waits for room is woken after every release.
//! Not here: memory itself. Held by: `eight_threads_never_exceed_the_total` and the tests around it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use crate::error::{Code, Error, Result};

#[derive(Debug)]
struct Inner {
    total: u64,
    in_use: AtomicU64,
    peak: AtomicU64,
    released: Notify,
}

/// How many bytes may be in use, and how many are. Clones share one count.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Inner>);

impl Budget {
    pub fn new(total: u64) -> Budget {
        Budget(Arc::new(Inner { total, in_use: AtomicU64::new(0), peak: AtomicU64::new(0), released: Notify::new() }))
    }

    /// `bytes` of room, if `keep_free` bytes stay free beside them. Demand reads keep nothing free; prefetch keeps the
    /// demand reserve. Never waits.
    pub fn try_take(&self, bytes: u64, keep_free: u64) -> Option<Grant> {
        let inner = &*self.0;
        let room = |used: u64| {
            let after = used.checked_add(bytes)?;
            (after.checked_add(keep_free)? <= inner.total).then_some(after)
        };
        let before = inner.in_use.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).ok()?;
        inner.peak.fetch_max(before + bytes, Ordering::AcqRel);
        Some(Grant { bytes, budget: self.clone() })
    }

    /// `bytes` of room, waiting for it as long as the caller lets it (every caller puts a deadline around this).
    ///
    /// # Errors
    /// `Code::NoRoom` at once if the total could never hold it.
    ///
    /// # Cancel safety
    /// Dropping the future takes nothing.
    pub async fn take(&self, bytes: u64, keep_free: u64) -> Result<Grant> {
        if bytes.checked_add(keep_free).is_none_or(|need| need > self.total()) {
            let (total, in_use) = (self.total(), self.in_use());
            let text = format!(
                "{bytes} bytes with {keep_free} kept free are more than the cache of {total} ({in_use} in use)"
            );
            return Err(Error::new(Code::NoRoom, text));
        }
        loop {
            // Made before the check: a release between check and wait still wakes it.
            let released = self.released();
            if let Some(grant) = self.try_take(bytes, keep_free) {
                return Ok(grant);
            }
            released.await;
        }
    }

    /// Ends at the first release after this call (not after the first poll): make it, try, then await it.
    pub fn released(&self) -> impl Future<Output = ()> + Send + '_ {
        self.0.released.notified()
    }

    pub fn total(&self) -> u64 {
        self.0.total
    }
    pub fn in_use(&self) -> u64 {
        self.0.in_use.load(Ordering::Acquire)
    }
    /// The most that was ever in use.
    pub fn peak(&self) -> u64 {
        self.0.peak.load(Ordering::Acquire)
    }

    fn give_back(&self, bytes: u64) {
        let before = self.0.in_use.fetch_sub(bytes, Ordering::AcqRel);
        assert!(before >= bytes, "released {bytes} of {before} bytes in use");
        if bytes > 0 {
            self.0.released.notify_waiters();
        }
    }
}

/// Room for `bytes`, given back on drop.
#[derive(Debug)]
#[must_use = "a grant that is dropped gives its room back"]
pub struct Grant {
    bytes: u64,
    budget: Budget,
}

impl Grant {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Moves `bytes` of this grant into one of its own; `None` if it holds fewer.
    pub fn split(&mut self, bytes: u64) -> Option<Grant> {
        self.bytes = self.bytes.checked_sub(bytes)?;
        Some(Grant { bytes, budget: self.budget.clone() })
    }

    /// Takes over what `other` holds.
    pub fn absorb(&mut self, mut other: Grant) {
        assert!(Arc::ptr_eq(&self.budget.0, &other.budget.0), "grants of two budgets do not add up");
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Keeps `bytes` of it and gives the rest back now.
    pub fn shrink_to(&mut self, bytes: u64) {
        let rest = self.bytes.checked_sub(bytes).expect("a grant only shrinks");
        self.bytes = bytes;
        self.budget.give_back(rest);
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_threads_never_exceed_the_total() {
        const TOTAL: u64 = 1000;
        let budget = Budget::new(TOTAL);
        let held = AtomicU64::new(0);
        let refused = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (budget, held, refused) = (&budget, &held, &refused);
                scope.spawn(move || {
                    let mut grants = Vec::new();
                    let mut random = thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                    for _ in 0..20_000 {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        match budget.try_take(random % 300, 0) {
                            Some(grant) => {
                                let now = held.fetch_add(grant.bytes(), Ordering::SeqCst) + grant.bytes();
                                assert!(now <= TOTAL, "{now} held of {TOTAL}");
                                grants.push(grant);
                            }
                            None => drop(refused.fetch_add(1, Ordering::SeqCst)),
                        }
                        if random.is_multiple_of(3) && !grants.is_empty() {
                            let grant = grants.swap_remove(random as usize % grants.len());
                            held.fetch_sub(grant.bytes(), Ordering::SeqCst);
                        }
                    }
                    for grant in grants.drain(..) {
                        held.fetch_sub(grant.bytes(), Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(budget.in_use(), 0);
        assert!(budget.peak() <= TOTAL, "{}", budget.peak());
        assert!(refused.load(Ordering::SeqCst) > 0, "the test never met a full budget");
    }

    #[test]
    fn room_kept_free_is_for_others() {
        let budget = Budget::new(100);
        let _prefetch = budget.try_take(60, 40).unwrap();
        assert!(budget.try_take(1, 40).is_none());
        assert!(budget.try_take(40, 0).is_some());
        assert!(budget.try_take(u64::MAX, 1).is_none(), "a sum past 2^64 is no room");
    }

    #[test]
    fn a_grant_splits_absorbs_and_shrinks_without_losing_a_byte() {
        let budget = Budget::new(100);
        let mut grant = budget.try_take(80, 0).unwrap();
        assert!(grant.split(81).is_none());
        let part = grant.split(30).unwrap();
        assert_eq!((grant.bytes(), part.bytes(), budget.in_use()), (50, 30, 80));
        grant.absorb(part);
        grant.shrink_to(10);
        assert_eq!((grant.bytes(), budget.in_use(), budget.peak()), (10, 10, 80));
        drop(grant);
        assert_eq!(budget.in_use(), 0);
    }

    #[tokio::test]
    async fn a_waiter_gets_room_as_soon_as_it_is_released() {
        let budget = Budget::new(10);
        let held = budget.try_take(8, 0).unwrap();
        let released = budget.released();
        let waiter = tokio::spawn({
            let budget = budget.clone();
            async move { budget.take(5, 0).await.map(|grant| grant.bytes()) }
        });
        tokio::task::yield_now().await;
        drop(held);
        released.await;
        assert_eq!(waiter.await.unwrap().unwrap(), 5);
    }

    #[tokio::test]
    async fn more_than_the_total_is_refused_and_not_awaited() {
        let err = Budget::new(10).take(8, 3).await.unwrap_err();
        assert_eq!(err.code(), Code::NoRoom);
    }
}
