//! A store that is asked no more than so often, for no more than so much, by no more than so many at once.
//!
//! In: any store and [`OriginLimits`]. Out: the same store, each call of which first waits for its turn.
//! Promises: turns are given in the order they were asked for; waiting costs nothing but time, is outside of every
//! deadline of `patience` (this lies around it), and never becomes an error; what a call really took (retries, hedges,
//! parts, bytes of small objects) is settled when it ends, and whoever comes next waits for it.
//! Not here: which reads matter most (the callers of a store do not say), how long a reader waits at most (`read`).
//! Held by: the tests below.

use std::collections::HashMap;
use std::future::Future;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Mutex as Queue, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::{ChunkSink, ChunkSource, Listed, ObjectWriter};
use crate::error::{Code, Error, Result};
use crate::refuse;
use crate::telemetry::Telemetry;

/// The lowest rate of bytes: at less, one chunk of 8 MiB takes longer than a request may.
pub const BYTES_PER_S_MIN: u64 = 1 << 20;

/// What an origin is asked for at most. Nothing by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct OriginLimits {
    pub requests: Option<RequestRate>,
    pub bytes_per_s: Option<u64>,
    /// Calls under way at once.
    pub inflight: Option<u32>,
}

/// So many a second, and so many at once after a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestRate {
    pub per_s: u32,
    pub burst: u32,
}

impl std::str::FromStr for RequestRate {
    type Err = Error;

    /// `RATE`, or `RATE:BURST`; the burst is one second's worth if none is given.
    fn from_str(text: &str) -> Result<RequestRate> {
        let (rate, burst) = text.split_once(':').unwrap_or((text, text));
        match (rate.parse(), burst.parse()) {
            (Ok(per_s), Ok(burst)) if per_s > 0 && burst > 0 => Ok(RequestRate { per_s, burst }),
            _ => refuse!(
                Usage,
                "`{text}` is no rate of requests; write so many a second, as in 100, or 100:500 with a burst"
            ),
        }
    }
}

impl OriginLimits {
    pub fn none(&self) -> bool {
        *self == OriginLimits::default()
    }

    /// How much longer a read may have to wait when `bytes` and `requests` are ahead of it.
    pub fn longest_wait(&self, requests: u64, bytes: u64) -> Duration {
        let of = |amount: u64, rate: Option<u64>| {
            rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(amount as f64 / rate as f64))
        };
        of(requests, self.requests.map(|rate| u64::from(rate.per_s))).max(of(bytes, self.bytes_per_s))
    }
}

/// A bucket that fills at a rate up to its size, and may be overdrawn by what was taken without asking.
#[derive(Debug)]
struct Bucket {
    per_s: f64,
    size: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn refill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_s;
        self.level = (self.level + gained).min(self.size);
        self.at = now;
    }

    /// Takes `amount`, or says how long to wait. More than the bucket holds is given when it is full, and paid afterwards.
    fn take(&mut self, amount: f64, now: Instant) -> Option<Duration> {
        self.refill(now);
        let short = amount.min(self.size) - self.level;
        if short > 1e-9 {
            // A tick more, so that rounding does not end in a wait of nothing.
            return Some(Duration::from_secs_f64(short / self.per_s) + Duration::from_millis(1));
        }
        self.level -= amount;
        None
    }
}

/// What time it is, and how to let it pass.
#[derive(Debug)]
enum Clock {
    Real,
    /// Stands still but for the sleeps: microseconds since it was made.
    #[cfg(test)]
    Sleeps(Instant, AtomicU64),
}

impl Clock {
    fn now(&self) -> Instant {
        match self {
            Clock::Real => Instant::now(),
            #[cfg(test)]
            Clock::Sleeps(start, slept) => *start + Duration::from_micros(slept.load(Ordering::Relaxed)),
        }
    }

    async fn sleep(&self, time: Duration) {
        match self {
            Clock::Real => tokio::time::sleep(time).await,
            #[cfg(test)]
            Clock::Sleeps(_, slept) => {
                slept.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        }
    }
}

type Limiters = HashMap<(String, OriginLimits), Arc<Limiter>>;

/// Every limiter of this process, by origin and limits.
static ORIGINS: LazyLock<Mutex<Limiters>> = LazyLock::new(Mutex::default);

/// From so many on, those that nobody uses are forgotten.
const ORIGINS_MAX: usize = 256;

/// The turns of one origin, shared by every store that lies there.
#[derive(Debug)]
pub struct Limiter {
    clock: Clock,
    requests: Option<Mutex<Bucket>>,
    bytes: Option<Mutex<Bucket>>,
    inflight: Option<Semaphore>,
    /// Whoever is at the head of it waits for the buckets; tokio's lock is first come, first served.
    queue: Queue<()>,
}

impl Limiter {
    /// The one of `origin` with these limits, made where there is none; `None`: nothing is limited. It outlives the stores that
    /// use it: a volume that comes and goes has no fresh allowance each time.
    pub fn of(origin: &str, limits: &OriginLimits) -> Option<Arc<Limiter>> {
        if limits.none() {
            return None;
        }
        let mut known = ORIGINS.lock().expect("a thread died holding the limiters");
        if known.len() >= ORIGINS_MAX {
            known.retain(|_, limiter| Arc::strong_count(limiter) > 1);
        }
        let limiter = known.entry((origin.to_owned(), *limits)).or_insert_with(|| Arc::new(Limiter::new(*limits)));
        Some(limiter.clone())
    }

    fn new(limits: OriginLimits) -> Limiter {
        Self::by_clock(limits, Clock::Real)
    }

    fn by_clock(limits: OriginLimits, clock: Clock) -> Limiter {
        let full = |per_s: f64, size: f64| Mutex::new(Bucket { per_s, size, level: size, at: clock.now() });
        let requests = limits.requests.map(|rate| full(rate.per_s.into(), rate.burst.into()));
        let bytes = limits.bytes_per_s.map(|rate| full(rate as f64, rate as f64));
        let inflight = limits.inflight.map(|count| Semaphore::new(count as usize));
        Limiter { clock, requests, bytes, inflight, queue: Queue::default() }
    }

    fn bucket(bucket: &Option<Mutex<Bucket>>) -> Option<MutexGuard<'_, Bucket>> {
        Some(bucket.as_ref()?.lock().expect("no thread panics while it holds a bucket"))
    }

    /// Waits for the turn of `requests` and `bytes`; whether it had to wait.
    ///
    /// # Cancel safety
    /// What a dropped wait had taken already is lost to nobody but itself.
    async fn turn(&self, requests: f64, bytes: f64) -> bool {
        let mut waited = false;
        let _head = match self.queue.try_lock() {
            Ok(head) => head,
            Err(_) => {
                waited = true;
                self.queue.lock().await
            }
        };
        for (bucket, amount) in [(&self.requests, requests), (&self.bytes, bytes)] {
            while let Some(wait) = Self::bucket(bucket).and_then(|mut bucket| bucket.take(amount, self.clock.now())) {
                waited = true;
                self.clock.sleep(wait).await;
            }
        }
        waited
    }

    /// Takes without asking; negative gives back.
    fn owe(&self, requests: f64, bytes: f64) {
        for (bucket, amount) in [(&self.requests, requests), (&self.bytes, bytes)] {
            if let Some(mut bucket) = Self::bucket(bucket) {
                bucket.level = (bucket.level - amount).min(bucket.size);
            }
        }
    }
}

/// One call's account: what it paid for, and what the wire says it took.
#[derive(Debug)]
pub(super) struct Account {
    limiter: Arc<Limiter>,
    paid_bytes: u64,
    sent: AtomicU64,
    received: AtomicU64,
    /// Below is no wire that counts: what was paid is what it took.
    unmetered: bool,
}

impl Drop for Account {
    fn drop(&mut self) {
        let received = *self.received.get_mut() as f64 - self.paid_bytes as f64;
        let sent = *self.sent.get_mut() as f64 - 1.0;
        if self.unmetered {
            self.limiter.owe(0.0, received.max(0.0));
        } else {
            self.limiter.owe(sent, received);
        }
    }
}

impl Account {
    pub(super) fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }
}

tokio::task_local! {
    static ACCOUNT: Arc<Account>;
}

/// A request goes out on the wire: on the account of the call it belongs to, which counts its body as well. A part of an
/// upload has a task of its own and belongs to none; its request is charged to `limiter`, its bytes were paid for.
pub(super) fn sent(limiter: &Limiter) -> Option<Arc<Account>> {
    let account = ACCOUNT.try_with(Arc::clone).ok();
    match &account {
        Some(account) => drop(account.sent.fetch_add(1, Ordering::Relaxed)),
        None => limiter.owe(1.0, 0.0),
    }
    account
}

/// A store with limits around it.
#[derive(Debug)]
pub struct Limited<S> {
    inner: S,
    limiter: Arc<Limiter>,
    telemetry: Arc<Telemetry>,
    /// The wire below tells what was really sent and received.
    metered: bool,
}

impl<S: ChunkSink> Limited<S> {
    pub fn new(inner: S, limiter: Arc<Limiter>, metered: bool, telemetry: Arc<Telemetry>) -> Limited<S> {
        Limited { inner, limiter, telemetry, metered }
    }

    /// Waits for a turn of one request and `bytes`, and holds it while `call` runs.
    async fn call<T>(&self, bytes: u64, call: impl Future<Output = Result<T>> + Send) -> Result<T> {
        self.counted(bytes, call, |_| 0).await
    }

    /// `call`, whose bytes are known only when it has answered.
    async fn counted<T>(
        &self,
        bytes: u64,
        call: impl Future<Output = Result<T>> + Send,
        took: impl Fn(&T) -> u64,
    ) -> Result<T> {
        let (_permit, waited) = self.place().await?;
        let from = Instant::now();
        if self.limiter.turn(1.0, bytes as f64).await || waited {
            self.telemetry.limit_waits.inc();
            self.telemetry.limit_wait_seconds.add(from.elapsed());
        }
        let account = Arc::new(Account {
            limiter: self.limiter.clone(),
            paid_bytes: bytes,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            unmetered: !self.metered,
        });
        let answer = ACCOUNT.scope(account.clone(), call).await;
        if let (Ok(answer), false) = (&answer, self.metered) {
            account.received(took(answer));
        }
        answer
    }

    async fn place(&self) -> Result<(Option<SemaphorePermit<'_>>, bool)> {
        let Some(places) = &self.limiter.inflight else { return Ok((None, false)) };
        if let Ok(permit) = places.try_acquire() {
            return Ok((Some(permit), false));
        }
        let permit = places.acquire().await;
        Ok((Some(permit.map_err(|_| Error::new(Code::Stopping, "the store is closing"))?), true))
    }
}

#[async_trait]
impl<S: ChunkSink + 'static> ChunkSource for Limited<S> {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        self.call(range.end.saturating_sub(range.start), self.inner.read_range(name, range)).await
    }

    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        self.counted(0, self.inner.read_small(name, max), |bytes| bytes.len() as u64).await
    }

    async fn size(&self, name: &str) -> Result<u64> {
        self.call(0, self.inner.size(name)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        self.call(0, self.inner.list(prefix)).await
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.call(0, self.inner.list_dirs(prefix)).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[async_trait]
impl<S: ChunkSink + 'static> ChunkSink for Limited<S> {
    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        // Bytes that go out are counted by nobody below: they are owed here.
        let _ = self.limiter.turn(0.0, bytes.len() as f64).await;
        self.call(0, self.inner.create(name, bytes)).await
    }

    async fn begin(&self, name: &str, stored_len_max: u64) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.call(0, self.inner.begin(name, stored_len_max)).await?;
        Ok(Box::new(LimitedWriter { inner, limiter: self.limiter.clone() }))
    }

    async fn replace_hint(&self, name: &str, bytes: Bytes) -> Result<()> {
        self.call(0, self.inner.replace_hint(name, bytes)).await
    }

    async fn delete(&self, name: &str) -> Result<()> {
        self.call(0, self.inner.delete(name)).await
    }
}

struct LimitedWriter {
    inner: Box<dyn ObjectWriter>,
    limiter: Arc<Limiter>,
}

#[async_trait]
impl ObjectWriter for LimitedWriter {
    async fn write(&mut self, piece: Bytes) -> Result<()> {
        let _ = self.limiter.turn(0.0, piece.len() as f64).await;
        self.inner.write(piece).await
    }

    async fn finish(self: Box<Self>, stored_len: u64) -> Result<()> {
        self.inner.finish(stored_len).await
    }

    async fn abort(self: Box<Self>) {
        self.inner.abort().await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::fault::{Call, Fault, Faulty, When};
    use super::super::memory::MemoryStore;
    use super::super::{Patience, Patient, StoreOptions, StoreUrl, open};
    use super::*;

    /// Over a store whose object m/x is 10 MiB, by a clock that moves by the sleeps alone: times are exact.
    fn limited(limits: OriginLimits) -> (Limited<Faulty<MemoryStore>>, Faulty<MemoryStore>) {
        let store = Faulty::new(MemoryStore::new());
        store.inner().put("m/x", vec![7; 10 << 20]);
        let limiter = Limiter::by_clock(limits, Clock::Sleeps(Instant::now(), AtomicU64::new(0)));
        (Limited::new(store.clone(), Arc::new(limiter), false, Arc::default()), store)
    }

    fn requests(per_s: u32, burst: u32) -> OriginLimits {
        OriginLimits { requests: Some(RequestRate { per_s, burst }), ..OriginLimits::default() }
    }

    fn mib_per_s(mib: u64) -> OriginLimits {
        OriginLimits { bytes_per_s: Some(mib << 20), ..OriginLimits::default() }
    }

    async fn seconds(store: &Limited<Faulty<MemoryStore>>, work: impl Future<Output = ()>) -> f64 {
        let from = store.limiter.clock.now();
        work.await;
        store.limiter.clock.now().duration_since(from).as_secs_f64()
    }

    #[tokio::test]
    async fn a_burst_is_free_and_the_rest_comes_at_the_rate() {
        let (store, _) = limited(requests(10, 5));
        let took = seconds(&store, async {
            for _ in 0..25 {
                store.size("m/x").await.expect("served");
            }
        })
        .await;
        // 5 at once, 20 at 10 a second.
        assert!((1.99..2.1).contains(&took), "{took}");
        assert_eq!(store.telemetry.limit_waits.get(), 20);
    }

    #[tokio::test]
    async fn bytes_come_at_their_rate_however_many_ask() {
        let (store, _) = limited(mib_per_s(1));
        let took = seconds(&store, async {
            let reads = (0..8).map(|_| store.read_range("m/x", 0..1 << 20));
            futures::future::try_join_all(reads).await.expect("served");
        })
        .await;
        // The first MiB is the burst.
        assert!((6.99..7.1).contains(&took), "{took}");
    }

    #[tokio::test]
    async fn a_read_larger_than_the_burst_is_served_and_paid_afterwards() {
        let (store, _) = limited(mib_per_s(1));
        let first = seconds(&store, async { drop(store.read_range("m/x", 0..8 << 20).await.expect("served")) }).await;
        let second = seconds(&store, async { drop(store.read_range("m/x", 0..1).await.expect("served")) }).await;
        assert!(first == 0.0, "{first}");
        assert!((6.99..7.1).contains(&second), "{second}");
    }

    #[tokio::test]
    async fn the_bytes_of_a_small_object_are_owed_once_known() {
        let (store, _) = limited(mib_per_s(1));
        store.read_small("m/x", 1 << 30).await.expect("served");
        let next = seconds(&store, async { drop(store.read_range("m/x", 0..1).await.expect("served")) }).await;
        assert!((8.99..9.1).contains(&next), "{next}");
    }

    #[tokio::test]
    async fn turns_are_given_in_the_order_they_were_asked_for() {
        let (store, _) = limited(requests(1, 1));
        let order = Mutex::new(Vec::new());
        let (store, order) = (&store, &order);
        let asked = (0..6).map(|number| async move {
            store.size("m/x").await.expect("served");
            order.lock().expect("whole").push(number);
        });
        futures::future::join_all(asked).await;
        assert_eq!(*order.lock().expect("whole"), [0, 1, 2, 3, 4, 5]);
    }

    #[tokio::test]
    async fn no_more_calls_are_under_way_than_allowed() {
        let (store, faulty) = limited(OriginLimits { inflight: Some(2), ..OriginLimits::default() });
        faulty.on(When::call(Call::Size), Fault::Stall);
        let calls = (0..6).map(|_| store.size("m/x"));
        let ended = tokio::time::timeout(Duration::from_millis(50), futures::future::join_all(calls)).await;
        assert!(ended.is_err(), "nobody answers");
        assert_eq!(faulty.count(Call::Size), 2, "the others wait for a place");
        assert_eq!(store.limiter.inflight.as_ref().expect("places").available_permits(), 2, "and give it back");
    }

    /// The limit lies around patience: a second in the queue is no silence of the store.
    #[tokio::test]
    async fn waiting_for_a_turn_never_becomes_an_error() {
        let store = MemoryStore::new();
        store.put("m/x", vec![7; 10]);
        let short = Duration::from_millis(300);
        let patience = Patience { budget: short, attempt: short, ..Patience::default() };
        let limiter = Arc::new(Limiter::new(requests(4, 1)));
        let limited = Limited::new(Patient::new(store, patience), limiter, false, Arc::default());
        let from = Instant::now();
        futures::future::try_join_all((0..5).map(|_| limited.size("m/x"))).await.expect("every one is served");
        assert!(from.elapsed() >= Duration::from_secs(1), "the last one waited far longer than the budget");
    }

    #[tokio::test]
    async fn stores_of_one_origin_and_the_same_limits_share_them_whoever_opens_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let url: StoreUrl = folder.path().to_str().expect("text").parse().expect("a store");
        let opened = |limits: OriginLimits| {
            // As each volume has options of its own.
            let store = open(&url, &StoreOptions { limits, ..StoreOptions::default() }).expect("opened");
            async move { tokio::time::timeout(Duration::from_millis(50), store.size("m/x")).await.is_ok() }
        };
        let limits = requests(1, 1);
        let limiter = Limiter::of(&folder.path().display().to_string(), &limits).expect("limited");
        limiter.owe(100_000.0, 0.0);
        assert!(!opened(limits).await && !opened(limits).await, "what one has used the other has not");
        let other = Limiter::of(&folder.path().display().to_string(), &requests(1, 2)).expect("limited");
        assert!(!Arc::ptr_eq(&limiter, &other), "other limits");
        let other = Limiter::of("elsewhere", &limits).expect("limited");
        assert!(!Arc::ptr_eq(&limiter, &other), "another origin");
        assert!(Limiter::of("elsewhere", &OriginLimits::default()).is_none());
    }

    #[test]
    fn buckets_of_one_service_are_one_origin_and_another_endpoint_is_another() {
        let at = |endpoint: &str, bucket: &str| {
            let aws = vec![("AWS_ENDPOINT_URL".into(), endpoint.to_owned()), ("AWS_REGION".into(), "x".into())];
            let opts =
                StoreOptions { aws, ignore_environment: true, limits: requests(7, 7), ..StoreOptions::default() };
            drop(super::super::s3::S3Store::open(bucket, "", &opts).expect("settings"));
            Limiter::of(&super::super::s3::origin(&opts), &opts.limits).expect("limited")
        };
        let one = at("http://127.0.0.1:9", "one");
        assert!(Arc::ptr_eq(&one, &at("http://127.0.0.1:9", "two")));
        assert!(!Arc::ptr_eq(&one, &at("http://127.0.0.1:10", "one")));
    }

    #[tokio::test]
    async fn a_wait_that_is_dropped_lets_the_next_one_through() {
        let mut tries = 0;
        let (dropped, waited) = loop {
            let from = Instant::now();
            let limiter = Limiter::new(OriginLimits { bytes_per_s: Some(1 << 20), ..OriginLimits::default() });
            limiter.owe(0.0, (1 << 20) as f64 + (1 << 18) as f64);
            let dropped = tokio::time::timeout(Duration::from_millis(1), limiter.turn(0.0, 1.0)).await;
            let waited = limiter.turn(0.0, 1.0).await;
            tries += 1;
            // Where the machine stood still for so long, what was owed is paid before anybody waits.
            let held_up = from.elapsed() >= Duration::from_millis(250);
            if dropped.is_err() && waited || !held_up || tries == 20 {
                break (dropped, waited);
            }
        };
        assert!(dropped.is_err(), "its turn comes in a quarter of a second");
        assert!(waited, "and then the next one's");
    }

    /// As the wire tells it: a call that was never sent, and one that took three requests.
    #[tokio::test]
    async fn what_a_call_really_took_is_settled_when_it_ends() {
        let limiter = Arc::new(Limiter::by_clock(requests(1, 10), Clock::Sleeps(Instant::now(), AtomicU64::new(0))));
        let store = Limited::new(MemoryStore::new(), limiter.clone(), true, Arc::default());
        let level = || Limiter::bucket(&limiter.requests).expect("a bucket").level;
        store.call(0, async { Ok(()) }).await.expect("not sent");
        assert_eq!(level(), 10.0, "given back");
        let thrice = async {
            for _ in 0..3 {
                sent(&limiter).expect("an account");
            }
            Ok(())
        };
        store.call(0, thrice).await.expect("sent");
        assert_eq!(level(), 7.0);
        assert!(sent(&limiter).is_none(), "a task of its own belongs to no call");
        assert_eq!(level(), 6.0);
    }

    #[test]
    fn rates_are_read_with_and_without_a_burst() {
        assert_eq!("100".parse::<RequestRate>().expect("a rate"), RequestRate { per_s: 100, burst: 100 });
        assert_eq!("100:500".parse::<RequestRate>().expect("a rate"), RequestRate { per_s: 100, burst: 500 });
        for bad in ["", "0", "1:0", "-1", "1:", "x", "1:2:3", "1.5"] {
            assert_eq!(bad.parse::<RequestRate>().expect_err(bad).code(), Code::Usage);
        }
    }
}
