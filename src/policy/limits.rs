//! How often a user may open, and how many bytes a second he may be given.
//!
//! Token buckets (`governor`): of opens and of bytes one for each user, and one more for each rule that limits them itself. What
//! is let costs afterwards: an open or a read goes on while nothing is owed, and then may owe more than a bucket holds. So a
//! file larger than any burst can be opened, and whoever opened it waits longer for the next.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use lru::LruCache;

/// Buckets kept in mind at once; the one that was asked for longest ago is forgotten first, and begins anew.
const BUCKETS_MAX: NonZeroUsize = NonZeroUsize::new(8192).expect("not zero");
/// A bucket that is full, and that nobody who has a file open takes from, is forgotten after this.
const IDLE: Duration = Duration::from_secs(600);
/// How often, at most, it is told that one user waits or is refused.
const TOLD_EVERY: Duration = Duration::from_secs(60);
/// How long an open waits for its turn where nobody says.
pub const WAIT_USUAL: Duration = Duration::from_secs(5);
/// The longest that an open or a read may be made to wait: who waits in an open cannot be killed.
pub const WAIT_MAX: Duration = Duration::from_secs(30);
/// Most tokens in a bucket; larger ones count in larger pieces.
const TOKENS_MAX: u64 = 1 << 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub per_s: u64,
    pub burst: u64,
}

/// What a policy, or one of its rules, says of limits. What a rule leaves out is the policy's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    pub opens: Option<Rate>,
    pub bytes: Option<Rate>,
    /// How long an open waits for its turn before it is refused.
    pub wait: Option<Duration>,
}

/// A rate, and what is counted together under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    pub rate: Rate,
    /// The rule that says so itself; `None`: whatever any other rule of the policy lets.
    pub rule: Option<usize>,
}

/// The limits that hold for whom a rule lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    pub opens: Option<Share>,
    pub bytes: Option<Share>,
    pub wait: Duration,
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
    /// When it was told that somebody waits for it.
    told: Mutex<Option<Instant>>,
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
        Bucket {
            limiter: RateLimiter::direct(quota),
            piece,
            tokens_max: tokens,
            owed: Mutex::new(0),
            told: Mutex::default(),
        }
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

    /// Whether it is as a new one. Of a bucket that is going to be forgotten: a full one is emptied by the question.
    fn is_full(&self) -> bool {
        let all = NonZeroU32::new(self.tokens_max).expect("at least one");
        self.ready().is_ok() && self.limiter.check_n(all).expect("no more than a bucket holds").is_ok()
    }

    /// Whether it is to be told that somebody waits for it: the first time, then now and again.
    fn tells(&self) -> bool {
        let mut told = self.told.lock().expect("a thread died holding a time");
        let due = told.is_none_or(|last| last.elapsed() >= TOLD_EVERY);
        if due {
            *told = Some(Instant::now());
        }
        due
    }
}

/// What one user takes from under one rule.
pub struct Buckets {
    opens: Option<Arc<Bucket>>,
    bytes: Option<Arc<Bucket>>,
    wait: Duration,
}

impl Buckets {
    /// How long an open waits before it is refused.
    pub fn wait(&self) -> Duration {
        self.wait
    }

    /// Whether an open may go on; `bytes`: one that the kernel serves from then on, so that its bytes count as well.
    ///
    /// # Errors
    /// How long to wait before asking again.
    pub fn may_open(&self, bytes: bool) -> Result<(), Wait> {
        self.opens.as_ref().map_or(Ok(()), |opens| opens.ready())?;
        if bytes { self.may_read() } else { Ok(()) }
    }

    /// Whether a read may go on.
    ///
    /// # Errors
    /// How long to wait before asking again.
    pub fn may_read(&self) -> Result<(), Wait> {
        self.bytes.as_ref().map_or(Ok(()), |bytes| bytes.ready())
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

    /// Whether it is to be told that this user has reached a limit.
    pub fn tells(&self) -> bool {
        let both = [&self.opens, &self.bytes].map(|bucket| bucket.as_ref().is_some_and(|bucket| bucket.tells()));
        both.contains(&true)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Of {
    Opens,
    Bytes,
}

/// Whose bucket it is, of what, and of which rule alone.
type Key = (u32, Of, Option<usize>);

struct Kept {
    bucket: Arc<Bucket>,
    used: Instant,
}

/// The buckets of everybody.
pub struct Limiter {
    kept: Mutex<LruCache<Key, Kept>>,
}

impl Default for Limiter {
    fn default() -> Limiter {
        Limiter { kept: Mutex::new(LruCache::new(BUCKETS_MAX)) }
    }
}

impl Limiter {
    /// `None`: nothing is limited.
    pub fn buckets(&self, uid: u32, shares: &Shares) -> Option<Arc<Buckets>> {
        self.buckets_at(uid, shares, Instant::now())
    }

    fn buckets_at(&self, uid: u32, shares: &Shares, now: Instant) -> Option<Arc<Buckets>> {
        if shares.opens.is_none() && shares.bytes.is_none() {
            return None;
        }
        let mut kept = self.kept.lock().expect("a thread died holding the limits");
        let mut bucket = |of, share: Share| {
            let key = (uid, of, share.rule);
            if let Some(known) = kept.get_mut(&key) {
                known.used = now;
                return known.bucket.clone();
            }
            forget(&mut kept, now);
            let bucket = Arc::new(Bucket::new(share.rate));
            kept.put(key, Kept { bucket: bucket.clone(), used: now });
            bucket
        };
        Some(Arc::new(Buckets {
            opens: shares.opens.map(|share| bucket(Of::Opens, share)),
            bytes: shares.bytes.map(|share| bucket(Of::Bytes, share)),
            wait: shares.wait,
        }))
    }

    /// Buckets kept in mind.
    pub fn len(&self) -> usize {
        self.kept.lock().expect("a thread died holding the limits").len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Drops what nobody has asked for in [`IDLE`] and what, made anew, would be the same.
fn forget(kept: &mut LruCache<Key, Kept>, now: Instant) {
    // From the one that was asked for longest ago.
    let idle = kept.iter().rev().take_while(|(_, one)| now.saturating_duration_since(one.used) >= IDLE);
    let idle = idle.filter(|(_, one)| Arc::strong_count(&one.bucket) == 1 && one.bucket.is_full());
    let over: Vec<Key> = idle.map(|(key, _)| *key).collect();
    for key in &over {
        kept.pop(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(opens: Option<Rate>, bytes: Option<Rate>) -> Shares {
        let of_all = |rate| Share { rate, rule: None };
        Shares { opens: opens.map(of_all), bytes: bytes.map(of_all), wait: Duration::from_secs(5) }
    }

    fn buckets(opens: Option<Rate>, bytes: Option<Rate>) -> Arc<Buckets> {
        Limiter::default().buckets(1000, &shares(opens, bytes)).expect("limited")
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
            let buckets = buckets(Some(Rate { per_s: 1, burst: 3 }), None);
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
            let buckets = buckets(None, Some(rate));
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
                let buckets = buckets(None, Some(Rate { per_s, burst: per_s }));
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
        let limiter = Limiter::default();
        let rate = Rate { per_s: 1, burst: 1 };
        let shares = shares(Some(rate), None);
        let own = Shares { opens: Some(Share { rate, rule: Some(1) }), ..shares };
        let get = |uid, shares| limiter.buckets(uid, shares).expect("limited");
        let one = get(1000, &shares);
        for _ in 0..1000 {
            one.opened();
        }
        assert!(one.may_open(false).is_err());
        assert!(get(1000, &shares).may_open(false).is_err(), "the same bucket");
        assert!(get(1001, &shares).may_open(false).is_ok());
        assert!(get(1000, &own).may_open(false).is_ok(), "a rule with limits of its own");
        for uid in 0..3 * BUCKETS_MAX.get() as u32 {
            limiter.buckets(uid, &shares);
        }
        assert_eq!(limiter.len(), BUCKETS_MAX.get());
        let none = Shares { opens: None, bytes: None, wait: Duration::ZERO };
        assert!(limiter.buckets(1, &none).is_none(), "without limits nothing is kept");
    }

    #[test]
    fn a_user_who_waits_is_told_of_once_in_a_while_under_whatever_rule() {
        let limiter = Limiter::default();
        let shares = shares(Some(Rate { per_s: 1, burst: 1 }), Some(Rate { per_s: 1, burst: 1 }));
        let get = |uid| limiter.buckets(uid, &shares).expect("limited");
        assert!(get(1000).tells());
        assert!(!get(1000).tells());
        assert!(get(1001).tells());
    }

    #[test]
    fn a_bucket_is_forgotten_when_it_is_idle_and_full_and_nobody_holds_it() {
        // What is taken here comes back in hours.
        let rate = Rate { per_s: 1, burst: 86_400 };
        let (limiter, shares, start) = (Limiter::default(), shares(None, Some(rate)), Instant::now());
        let get = |uid, at| limiter.buckets_at(uid, &shares, at).expect("limited");
        drop(get(1, start));
        get(2, start).given(40_000);
        get(3, start).given(1 << 40);
        let held = get(4, start);
        get(5, start + IDLE - Duration::from_secs(1));
        assert_eq!(limiter.len(), 5, "nobody is idle yet");
        get(6, start + IDLE);
        let known: Vec<u32> = limiter.kept.lock().expect("a test").iter().map(|((uid, ..), _)| *uid).collect();
        assert_eq!(known, [6, 5, 4, 3, 2], "the first one was full, and nobody's");
        assert!(get(3, start + IDLE).may_read().is_err(), "what is owed stays owed");
        drop(held);
        get(7, start + 2 * IDLE);
        let known: Vec<u32> = limiter.kept.lock().expect("a test").iter().map(|((uid, ..), _)| *uid).collect();
        assert_eq!(known, [7, 3, 2], "of the rest only who took nothing");
    }
}
