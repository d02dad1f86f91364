//! A second request when the first is stuck, several when one is slow: no connection holds up a stream.
//!
//! In: any store that can tell how far a request has come. Out: the same store; a read far behind what its peers took is
//! asked for once more, on another connection, and the first complete answer wins. A range of a far store comes in parts
//! over several connections where that was measured to help.
//! Promises: one extra request at a time for a range, and all of them within the budget of `pace`; an answer is one
//! request's from first to last byte; the loser is dropped, and with it its connection; an error of an extra request
//! is never the answer. Writes are passed on as they are.
//! Not here: what is far behind (`pace`), deadlines and retries (`patient`, around this).
//! Held by: the tests below, tests/slow_store.rs, tests/store_contract.rs.

use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::try_join_all;

use super::pace::{EXTRA_PER_RANGE_MAX, Pace, Seen, Verdict};
use super::{ChunkSink, ChunkSource, Listed, ObjectWriter};
use crate::error::{Class, Result};
use crate::telemetry::Telemetry;

/// How far one request has come, told by the store and read by whoever waits.
#[derive(Debug)]
pub struct Progress {
    sent: Instant,
    received: AtomicU64,
    /// Microseconds from `sent`; 0: no byte yet.
    first_byte_us: AtomicU64,
    last_byte_us: AtomicU64,
}

impl Progress {
    pub fn start() -> Self {
        let (received, first_byte_us, last_byte_us) = <(AtomicU64, AtomicU64, AtomicU64)>::default();
        Progress { sent: Instant::now(), received, first_byte_us, last_byte_us }
    }

    /// That many bytes more of the body have arrived.
    pub fn add(&self, bytes: u64) {
        let now_us = u64::try_from(self.sent.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        self.last_byte_us.store(now_us, Ordering::Relaxed);
        // One task tells; the others only read.
        if self.first_byte_us.load(Ordering::Relaxed) == 0 {
            self.first_byte_us.store(now_us, Ordering::Relaxed);
        }
        self.received.fetch_add(bytes, Ordering::Release);
    }

    fn seen(&self) -> Seen {
        let received = self.received.load(Ordering::Acquire);
        let elapsed = self.sent.elapsed();
        let last_byte = Duration::from_micros(self.last_byte_us.load(Ordering::Relaxed));
        Seen { elapsed, received, silent: elapsed.saturating_sub(last_byte) }
    }

    fn first_byte(&self) -> Duration {
        Duration::from_micros(self.first_byte_us.load(Ordering::Relaxed))
    }
}

/// A store whose reads are hedged.
#[derive(Debug)]
pub struct Hedged<S> {
    inner: Arc<S>,
    pace: Mutex<Pace>,
    opened: Instant,
    ranges_in_flight: AtomicUsize,
    telemetry: Arc<Telemetry>,
}

/// A range under way, counted until dropped.
struct InFlight<'a>(&'a AtomicUsize);

impl<'a> InFlight<'a> {
    /// And how many there are with it.
    fn enter(count: &'a AtomicUsize) -> (Self, usize) {
        let others = count.fetch_add(1, Ordering::Relaxed);
        (InFlight(count), others + 1)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One request under way.
struct Run<'a, T> {
    progress: Arc<Progress>,
    answer: Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>,
}

impl<S: ChunkSink + 'static> Hedged<S> {
    pub fn new(inner: S, telemetry: Arc<Telemetry>) -> Self {
        let (pace, ranges_in_flight) = Default::default();
        Hedged { inner: Arc::new(inner), pace, opened: Instant::now(), ranges_in_flight, telemetry }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().expect("no thread panics while it holds the pace")
    }

    /// Sends a request for `len` bytes, and another one whenever the latest is far behind; the first answer wins.
    async fn race<'a, T>(
        &'a self,
        len: Option<u64>,
        ask: impl Fn(Arc<Progress>) -> Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>> + Send,
    ) -> Result<T> {
        let send = || {
            let progress = Arc::new(Progress::start());
            Run { answer: ask(progress.clone()), progress }
        };
        self.pace().asked();
        let mut first = send();
        let mut extra: Option<Run<'a, T>> = None;
        let mut extras_sent = 0;
        loop {
            let latest = extra.as_ref().unwrap_or(&first).progress.seen();
            let mut wait = Duration::MAX;
            if extras_sent < EXTRA_PER_RANGE_MAX {
                let mut pace = self.pace();
                let ranges = self.ranges_in_flight.load(Ordering::Relaxed);
                match pace.verdict(latest, len, extras_sent, ranges) {
                    // Sooner than that if others end meanwhile: then the link is emptier.
                    Verdict::LookAgain(time) => wait = time.min(super::pace::FLOOR),
                    // The budget is used up: others earn it meanwhile.
                    Verdict::Behind if !pace.take_extra() => wait = super::pace::FLOOR,
                    Verdict::Behind => {
                        // What was extra before is dropped here. The first request keeps its turn: of a store that is
                        // slow for everyone it is the one that has waited longest.
                        tracing::debug!(?latest, ?len, extras_sent, "a request is far behind: asked for once more");
                        extra = Some(send());
                        extras_sent += 1;
                        self.telemetry.hedges_sent.inc();
                        continue;
                    }
                }
            }
            let second = async {
                match &mut extra {
                    Some(run) => run.answer.as_mut().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = first.answer.as_mut() => match answer {
                    Ok(bytes) => return Ok(self.won(&first, bytes)),
                    // The connection broke; the other one may hold.
                    Err(error) if error.class() == Class::Unreachable && extra.is_some() => {
                        first = extra.take().expect("seen a moment ago");
                    }
                    Err(error) => return Err(error),
                },
                answer = second => match answer {
                    Ok(bytes) => {
                        self.telemetry.hedges_won.inc();
                        return Ok(self.won(extra.as_ref().expect("it has just answered"), bytes));
                    }
                    Err(error) => {
                        tracing::debug!(%error, "an extra request failed; the first one goes on");
                        extra = None;
                    }
                },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn read_part(&self, name: &str, part: Range<u64>) -> Result<Vec<Bytes>> {
        self.race(Some(part.end.saturating_sub(part.start)), |progress| {
            let (inner, name, part) = (self.inner.clone(), name.to_owned(), part.clone());
            Box::pin(async move { inner.read_range_watched(&name, part, &progress).await })
        })
        .await
    }

    fn won<T>(&self, run: &Run<'_, T>, bytes: T) -> T {
        let seen = run.progress.seen();
        self.pace().brought(seen.received, run.progress.first_byte(), seen.elapsed);
        bytes
    }
}

#[async_trait]
impl<S: ChunkSink + 'static> ChunkSource for Hedged<S> {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        let len = range.end.saturating_sub(range.start);
        let (_in_flight, ranges) = InFlight::enter(&self.ranges_in_flight);
        let parts = self.pace().parts(len, ranges);
        let pieces = if parts == 1 {
            self.read_part(name, range).await?
        } else {
            let part_len = len.div_ceil(parts) as usize;
            let cut = range.clone().step_by(part_len).map(|start| start..range.end.min(start + part_len as u64));
            try_join_all(cut.map(|part| self.read_part(name, part))).await?.concat()
        };
        self.pace().range_ended(len, ranges, self.opened.elapsed());
        Ok(pieces)
    }

    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        self.race(None, |progress| {
            let (inner, name) = (self.inner.clone(), name.to_owned());
            Box::pin(async move { inner.read_small_watched(&name, max, &progress).await })
        })
        .await
    }

    async fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        self.inner.list(prefix).await
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list_dirs(prefix).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[async_trait]
impl<S: ChunkSink + 'static> ChunkSink for Hedged<S> {
    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        self.inner.create(name, bytes).await
    }

    async fn begin(&self, name: &str, stored_len: u64) -> Result<Box<dyn ObjectWriter>> {
        self.inner.begin(name, stored_len).await
    }

    async fn replace_hint(&self, name: &str, bytes: Bytes) -> Result<()> {
        self.inner.replace_hint(name, bytes).await
    }

    async fn delete(&self, name: &str) -> Result<()> {
        self.inner.delete(name).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::fault::{Call, Fault, Faulty, When};
    use super::super::memory::MemoryStore;
    use super::*;
    use crate::error::Code;

    const LEN: usize = 8 << 20;

    /// Over a store whose object x is `LEN` bytes, and which seemed far so far: 100 ms, 50 MB/s.
    fn far() -> (Hedged<Faulty<MemoryStore>>, Faulty<MemoryStore>, Vec<u8>) {
        let bytes: Vec<u8> = (0..LEN).map(|i| (i % 251) as u8).collect();
        let store = Faulty::new(MemoryStore::new());
        store.inner().put("m/d/x", bytes.clone());
        let hedged = Hedged::new(store.clone(), Arc::default());
        for _ in 0..20 {
            hedged.pace().brought(LEN as u64, Duration::from_millis(100), Duration::from_millis(268));
        }
        (hedged, store, bytes)
    }

    #[tokio::test]
    async fn a_range_in_parts_comes_in_its_order() {
        let (hedged, store, bytes) = far();
        // The first part comes last.
        store.on(When::call(Call::ReadRange).once(), Fault::Delay(Duration::from_millis(20)));

        let pieces = hedged.read_range("m/d/x", 5..LEN as u64 - 3).await.expect("served");

        assert!(pieces.concat() == bytes[5..LEN - 3]);
        assert_eq!(store.count(Call::ReadRange), 3);
        assert_eq!(hedged.ranges_in_flight.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_part_that_fails_fails_its_range() {
        let (hedged, store, _) = far();
        store.on(When::call(Call::ReadRange).after(1).once(), Fault::Fail(Code::StoreDenied));
        let error = hedged.read_range("m/d/x", 0..LEN as u64).await.expect_err("refused");
        assert_eq!(error.code(), Code::StoreDenied);
        assert_eq!(hedged.ranges_in_flight.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_stalled_request_is_asked_once_more_and_counted() {
        let (hedged, store, bytes) = far();
        store.on(When::call(Call::ReadRange).once(), Fault::Stall);
        let pieces = hedged.read_range("m/d/x", 0..1000).await.expect("the second one answers");
        assert!(pieces.concat() == bytes[..1000]);
        assert_eq!((hedged.telemetry.hedges_sent.get(), hedged.telemetry.hedges_won.get()), (1, 1));
        assert_eq!(store.count(Call::ReadRange), 2);
    }

    #[tokio::test]
    async fn beyond_the_budget_nothing_more_is_asked() {
        let (hedged, store, _) = far();
        while hedged.pace().take_extra() {}
        store.on(When::call(Call::ReadRange), Fault::Stall);
        // Longer than patience with one request, shorter than any other end of this one.
        let waited = tokio::time::timeout(Duration::from_secs(1), hedged.read_range("m/d/x", 0..1000)).await;
        assert!(waited.is_err(), "nobody answers");
        assert_eq!(store.count(Call::ReadRange), 1);
    }
}
