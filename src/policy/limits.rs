//! How often a user may open, and how many bytes a second he may be given.
//!
//! Token buckets (`governor`), one pair for a user and rule. What is let costs afterwards: an open or a read goes on while
//! nothing is owed, and then may owe more than a bucket holds. So a file larger than any burst can be opened, and whoever
//! opened it waits longer for the next.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use lru::LruCache;

/// Users and rules kept in mind at once; the one that came last longest ago is forgotten first, and begins anew.
const USERS_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Who owes nothing is forgotten after this.
const IDLE: Duration = Duration::from_secs(600);
/// How often, at most, it is told that one user waits or is refused.
const TOLD_EVERY: Duration = Duration::from_secs(60);
/// The longest that an open or a read may be made to wait: who waits in an open cannot be killed.
pub const WAIT_MAX: Duration = Duration::from_secs(30);
/// Most tokens in a bucket; larger ones count in larger pieces.
const TOKENS_MAX: u64 = 1 << 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub per_s: u64,
    pub burst: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    pub opens: Option<Rate>,
    pub bytes: Option<Rate>,
    /// How long an open waits for its turn before it is refused.
    pub wait: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { opens: None, bytes: None, wait: Duration::from_secs(5) }
    }
}

/// Its turn comes no sooner than after this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait(pub Duration);

/// One bucket, and what was taken beyond it.
struct Bucket {
    limiter: DefaultDirectRateLimiter,
    /// What one token stands for.
    piece: u64,
    tokens_max: u32,
    owed: Mutex<u64>,
}

impl Bucket {
    fn new(rate: Rate) -> Bucket {
        let piece = rate.burst.div_ceil(TOKENS_MAX).max(1);
        let tokens = u32::try_from((rate.burst / piece).max(1)).expect("at most TOKENS_MAX");
        let tokens_max = NonZeroU32::new(tokens).expect("at least one");
        // As one period for a whole bucket: that of a single token may be shorter than a nanosecond.
        let seconds = (u64::from(tokens) * piece) as f64 / rate.per_s.max(1) as f64;
        let full = Duration::from_secs_f64(seconds.clamp(1e-6, 1e9));
        let period = (full / tokens).max(Duration::from_nanos(1));
        let quota = Quota::with_period(period).expect("longer than nothing").allow_burst(tokens_max);
        Bucket { limiter: RateLimiter::direct(quota), piece, tokens_max: tokens, owed: Mutex::new(0) }
    }

    /// Pays what is owed, as far as there are tokens.
    fn ready(&self) -> Result<(), Wait> {
        let mut owed = self.owed.lock().expect("a thread died holding what is owed");
        loop {
            let tokens = (*owed / self.piece).min(u64::from(self.tokens_max));
            let Some(tokens) = NonZeroU32::new(tokens as u32) else { return Ok(()) };
            match self.limiter.check_n(tokens).expect("no more than a bucket holds") {
                Ok(()) => *owed -= u64::from(tokens.get()) * self.piece,
                Err(not_until) => return Err(Wait(not_until.wait_time_from(DefaultClock::default().now()))),
            }
        }
    }

    fn charge(&self, amount: u64) {
        {
            let mut owed = self.owed.lock().expect("a thread died holding what is owed");
            *owed = owed.saturating_add(amount);
        }
        // What is not paid now is owed.
        let _ = self.ready();
    }
}

/// The buckets of one user under one rule.
#[derive(Default)]
pub struct Buckets {
    opens: Option<Bucket>,
    bytes: Option<Bucket>,
    wait: Duration,
    told: Mutex<Option<Instant>>,
}

impl Buckets {
    pub fn new(limits: &Limits) -> Buckets {
        Buckets {
            opens: limits.opens.map(Bucket::new),
            bytes: limits.bytes.map(Bucket::new),
            wait: limits.wait,
            told: Mutex::default(),
        }
    }

    /// How long an open waits before it is refused.
    pub fn wait(&self) -> Duration {
        self.wait
    }

    /// Whether an open may go on; `bytes`: one that the kernel serves from then on, so that its bytes count as well.
    ///
    /// # Errors
    /// How long to wait before asking again.
    pub fn may_open(&self, bytes: bool) -> Result<(), Wait> {
        self.opens.as_ref().map_or(Ok(()), Bucket::ready)?;
        if bytes { self.may_read() } else { Ok(()) }
    }

    /// Whether a read may go on.
    ///
    /// # Errors
    /// How long to wait before asking again.
    pub fn may_read(&self) -> Result<(), Wait> {
        self.bytes.as_ref().map_or(Ok(()), Bucket::ready)
    }

    pub fn opened(&self) {
        if let Some(opens) = &self.opens {
            opens.charge(1);
        }
    }

    pub fn given(&self, bytes: u64) {
        if let Some(bucket) = &self.bytes {
            bucket.charge(bytes);
        }
    }

    /// Whether it is to be told that this user has reached a limit: the first time, then now and again.
    pub fn tells(&self) -> bool {
        let mut told = self.told.lock().expect("a thread died holding a time");
        let due = told.is_none_or(|last| last.elapsed() >= TOLD_EVERY);
        if due {
            *told = Some(Instant::now());
        }
        due
    }

    fn owes(&self) -> bool {
        [&self.opens, &self.bytes].into_iter().flatten().any(|bucket| bucket.ready().is_err())
    }
}

struct Kept {
    buckets: Arc<Buckets>,
    used: Instant,
}

/// The buckets of everybody, by user and rule.
pub struct Limiter {
    users: Mutex<LruCache<(u32, Option<usize>), Kept>>,
}

impl Default for Limiter {
    fn default() -> Limiter {
        Limiter { users: Mutex::new(LruCache::new(USERS_MAX)) }
    }
}

impl Limiter {
    /// `None`: nothing is limited.
    pub fn buckets(&self, uid: u32, rule: Option<usize>, limits: &Limits) -> Option<Arc<Buckets>> {
        if limits.opens.is_none() && limits.bytes.is_none() {
            return None;
        }
        let mut users = self.users.lock().expect("a thread died holding the limits");
        let now = Instant::now();
        if let Some(kept) = users.get_mut(&(uid, rule)) {
            kept.used = now;
            return Some(kept.buckets.clone());
        }
        while let Some((_, oldest)) = users.peek_lru()
            && now.duration_since(oldest.used) >= IDLE
            && !oldest.buckets.owes()
        {
            users.pop_lru();
        }
        let buckets = Arc::new(Buckets::new(limits));
        users.put((uid, rule), Kept { buckets: buckets.clone(), used: now });
        Some(buckets)
    }

    /// Users and rules kept in mind.
    pub fn len(&self) -> usize {
        self.users.lock().expect("a thread died holding the limits").len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(opens: Option<Rate>, bytes: Option<Rate>) -> Limits {
        Limits { opens, bytes, ..Limits::default() }
    }

    /// What `look` finds at its quickest: while a machine stands still buckets fill.
    fn undisturbed<T>(look: impl Fn() -> T) -> T {
        for _ in 0..1000 {
            let began = Instant::now();
            let found = look();
            if began.elapsed() < Duration::from_millis(100) {
                return found;
            }
        }
        panic!("a thousand times held up");
    }

    #[test]
    fn a_burst_goes_through_and_then_the_rate_holds() {
        let (buckets, let_through, wait) = undisturbed(|| {
            let buckets = Buckets::new(&limits(Some(Rate { per_s: 1, burst: 3 }), None));
            let mut let_through = 0;
            let wait = loop {
                match buckets.may_open(true) {
                    Ok(()) => {
                        buckets.opened();
                        let_through += 1;
                    }
                    Err(Wait(wait)) => break wait,
                }
                assert!(let_through < 100);
            };
            (buckets, let_through, wait)
        });
        // Three from the bucket, and the one that owes.
        assert_eq!(let_through, 4);
        assert!(wait <= Duration::from_secs(1), "{wait:?}");
        assert!(buckets.may_read().is_ok(), "bytes are not limited");
    }

    #[test]
    fn what_is_larger_than_any_burst_goes_through_once_and_is_owed() {
        let rate = Rate { per_s: 10 << 20, burst: 10 << 20 };
        let (read, open, open_alone) = undisturbed(|| {
            let buckets = Buckets::new(&limits(None, Some(rate)));
            buckets.may_open(true).expect("nothing is owed");
            buckets.given(1 << 40);
            (buckets.may_read(), buckets.may_open(true), buckets.may_open(false))
        });
        let Err(Wait(wait)) = read else { panic!("a TiB is owed") };
        assert!(wait > Duration::from_millis(500) && wait <= Duration::from_millis(1100), "{wait:?}: a bucket's worth");
        assert!(open.is_err() && open_alone.is_ok());
    }

    #[test]
    fn rates_from_a_byte_to_a_terabyte_a_second_are_kept() {
        for per_s in [1, 1000, 64 << 20, 3_000_000_000, 1 << 40] {
            let read = undisturbed(|| {
                let buckets = Buckets::new(&limits(None, Some(Rate { per_s, burst: per_s })));
                buckets.given(per_s * 2);
                buckets.may_read()
            });
            let Err(Wait(wait)) = read else { panic!("{per_s}: a second's worth is owed") };
            let seconds = wait.as_secs_f64();
            assert!(seconds > 0.5 && seconds < 1.05, "{per_s} a second: {seconds} s for a second's worth");
        }
    }

    #[test]
    fn users_do_not_share_and_the_table_is_bounded() {
        let limits = limits(Some(Rate { per_s: 1, burst: 1 }), None);
        let (limiter, its_own, again) = undisturbed(|| {
            let limiter = Limiter::default();
            let one = limiter.buckets(1000, None, &limits).expect("limited");
            one.opened();
            one.opened();
            let again = limiter.buckets(1000, None, &limits).expect("limited").may_open(false);
            (limiter, one.may_open(false), again)
        });
        assert!(its_own.is_err());
        assert!(again.is_err(), "the same buckets");
        assert!(limiter.buckets(1001, None, &limits).expect("limited").may_open(false).is_ok());
        assert!(limiter.buckets(1000, Some(1), &limits).expect("limited").may_open(false).is_ok(), "another rule");
        for uid in 0..3 * USERS_MAX.get() as u32 {
            limiter.buckets(uid, None, &limits);
        }
        assert_eq!(limiter.len(), USERS_MAX.get());
        assert!(limiter.buckets(1, None, &Limits::default()).is_none(), "without limits nothing is kept");
    }

    #[test]
    fn a_user_who_waits_is_told_of_once_in_a_while() {
        let buckets = Buckets::new(&Limits::default());
        assert!(buckets.tells());
        assert!(!buckets.tells());
    }
}
