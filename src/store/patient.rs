//! Patience around a store: every wait has an end, and what may be tried again is tried again.
//!
//! In: any store. Out: the same store, whose calls answer within a budget: each attempt has a deadline, attempts are
//! spaced with jitter, and an error says how many there were and how long they took.
//! Promises: nothing here waits longer than its budget (a create: and one attempt more, to read back); an answer that will
//! not change (no right, not there, tampered) is not asked for twice, a wrong length once more; a create whose answer was
//! lost is read back.
//! Not here: the stall of a single body (`wire`), the refetch after a wrong hash (`cache`).
//! Held by: the tests below, tests/store_contract.rs, tests/hostile_http.rs (THREAT_MODEL (f) rows 17 and 73).

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;

use super::{ChunkSink, ChunkSource, Listed, ObjectWriter};
use crate::error::{Class, Code, Error, Result};
use crate::refuse;

/// How long to wait for a store, and how often to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patience {
    /// One attempt, from asking to the last byte. 8 MiB in 30 s is 280 KB/s: slower is as good as no answer.
    pub attempt: Duration,
    /// The longest silence within a body.
    pub stall: Duration,
    /// All attempts of one call and the pauses between them.
    pub budget: Duration,
    pub attempts_max: u32,
    /// The first pause; each further one is twice as long, up to `pause_max`, and a random half of it is left out, so
    /// that a fleet that failed together does not come back together.
    pub pause_first: Duration,
    pub pause_max: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            attempt: Duration::from_secs(30),
            stall: Duration::from_secs(10),
            budget: Duration::from_secs(60),
            attempts_max: 6,
            pause_first: Duration::from_millis(100),
            pause_max: Duration::from_secs(5),
        }
    }
}

impl Patience {
    /// Runs `attempt` until it answers something that will not change, or time or attempts are used up.
    ///
    /// `what` says for people what was asked: "read bytes 17..42 of x from s3://...".
    pub async fn run<T, F>(&self, what: &str, span: Attempt, mut attempt: impl FnMut() -> F + Send) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send,
    {
        let start = Instant::now();
        let sending = match span {
            Attempt::Single | Attempt::WholeBudget => Duration::ZERO,
            Attempt::Sending(bytes) => Duration::from_secs(bytes / SEND_BYTES_PER_S_MIN),
        };
        let budget = self.budget + sending;
        let mut lengths = 0;
        let mut before: Option<Error> = None;
        let mut tries = 0;
        loop {
            tries += 1;
            let left = budget.saturating_sub(start.elapsed());
            let whole = match span {
                Attempt::Single | Attempt::Sending(_) => self.attempt + sending,
                Attempt::WholeBudget => budget,
            };
            let limit = whole.min(left);
            let error = match tokio::time::timeout(limit, attempt()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => error,
                // Cut short by the budget, it says less of the store than the answer before it.
                Err(_) if limit < whole && before.as_ref().is_some_and(|error| error.class() == Class::Unreachable) => {
                    before.take().expect("just seen")
                }
                Err(_) => Error::new(Code::Deadline, format!("no answer within {:.1} s", limit.as_secs_f64())),
            };
            lengths += u32::from(error.code() == Code::Length);
            let again = match error.class() {
                Class::Unreachable => error.code() != Code::Stopping,
                // The store may have erred once; twice the same is what it has.
                _ => error.code() == Code::Length && lengths == 1,
            };
            let pause = self.pause(tries)?;
            if !again || tries >= self.attempts_max || start.elapsed() + pause >= budget {
                if tries == 1 && error.class() != Class::Unreachable {
                    return Err(error);
                }
                let took = start.elapsed().as_secs_f64();
                let times = if tries == 1 { "1 attempt".to_owned() } else { format!("{tries} attempts") };
                return Err(error.context(format!("cannot {what}: gave up after {times} in {took:.1} s")));
            }
            tracing::debug!(what, tries, %error, pause_ms = pause.as_millis() as u64, "store asked again");
            before = Some(error);
            tokio::time::sleep(pause).await;
        }
    }

    /// The pause after attempt number `tries`: exponential, with the upper half drawn at random.
    fn pause(&self, tries: u32) -> Result<Duration> {
        let full = self.pause_first.saturating_mul(1 << (tries - 1).min(16)).min(self.pause_max);
        let random =
            getrandom::u32().map_err(|e| Error::new(Code::Host, "no random numbers from the kernel").with_source(e))?;
        Ok(full.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX)))
    }
}

/// How long one attempt may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// `Patience::attempt`.
    Single,
    /// Many requests in one: whatever is left of the budget.
    WholeBudget,
    /// Sends this many bytes: `Patience::attempt` and the time they take at `SEND_BYTES_PER_S_MIN`, and the budget is
    /// longer by as much.
    Sending(u64),
}

/// The slowest link that can still publish. An uplink of 2 Mb/s sends a part of 8 MiB in 32 s.
const SEND_BYTES_PER_S_MIN: u64 = 256 << 10;

/// A store with patience around it.
#[derive(Debug)]
pub struct Patient<S> {
    inner: Arc<S>,
    patience: Patience,
}

impl<S: ChunkSink> Patient<S> {
    pub fn new(inner: S, patience: Patience) -> Self {
        Patient { inner: Arc::new(inner), patience }
    }

    /// After a create whose answer was lost: is it there, with these bytes? `None`: no, or nobody can tell.
    async fn was_created(&self, name: &str, bytes: &Bytes) -> Option<Result<()>> {
        match tokio::time::timeout(self.patience.attempt, self.inner.read_small(name, bytes.len() as u64)).await {
            Ok(Ok(stored)) if stored == *bytes => Some(Ok(())),
            Ok(Ok(_)) => Some(Err(exists(name))),
            Ok(Err(error)) if error.code() == Code::Limit => Some(Err(exists(name))),
            Ok(Err(_)) | Err(_) => None,
        }
    }
}

fn exists(name: &str) -> Error {
    Error::new(Code::Exists, format!("object {name} is there with other bytes"))
}

#[async_trait]
impl<S: ChunkSink + 'static> ChunkSource for Patient<S> {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        let what = format!("read bytes {}..{} of {name} from {}", range.start, range.end, self.describe());
        self.patience.run(&what, Attempt::Single, || self.inner.read_range(name, range.clone())).await
    }

    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        let what = format!("read {name} from {}", self.describe());
        self.patience.run(&what, Attempt::Single, || self.inner.read_small(name, max)).await
    }

    async fn size(&self, name: &str) -> Result<u64> {
        let what = format!("ask for the size of {name} in {}", self.describe());
        self.patience.run(&what, Attempt::Single, || self.inner.size(name)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        let what = format!("list {prefix:?} in {}", self.describe());
        self.patience.run(&what, Attempt::WholeBudget, || self.inner.list(prefix)).await
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        let what = format!("list the folders of {prefix:?} in {}", self.describe());
        self.patience.run(&what, Attempt::WholeBudget, || self.inner.list_dirs(prefix)).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[async_trait]
impl<S: ChunkSink + 'static> ChunkSink for Patient<S> {
    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        let what = format!("create {name} in {}", self.describe());
        let attempt = || async {
            match self.inner.create(name, bytes.clone()).await {
                Err(lost) if lost.class() == Class::Unreachable => {
                    self.was_created(name, &bytes).await.unwrap_or(Err(lost))
                }
                other => other,
            }
        };
        match self.patience.run(&what, Attempt::Sending(bytes.len() as u64), attempt).await {
            // The deadline of an attempt cuts off its reading back as well, so the last word is said here.
            Err(lost) if lost.class() == Class::Unreachable => {
                self.was_created(name, &bytes).await.unwrap_or(Err(lost))
            }
            other => other,
        }
    }

    async fn begin(&self, name: &str, stored_len_max: u64) -> Result<Box<dyn ObjectWriter>> {
        let what = format!("begin object {name} in {}", self.describe());
        let inner = self.patience.run(&what, Attempt::Single, || self.inner.begin(name, stored_len_max)).await?;
        // Four parts may be waited for before one is taken, and a completion with its check after them.
        let sending = Duration::from_secs(stored_len_max / SEND_BYTES_PER_S_MIN);
        let limit = self.patience.budget.saturating_mul(3) + sending;
        Ok(Box::new(PatientWriter { inner, name: name.to_owned(), limit }))
    }

    async fn replace_hint(&self, name: &str, bytes: Bytes) -> Result<()> {
        let what = format!("replace {name} in {}", self.describe());
        self.patience.run(&what, Attempt::Single, || self.inner.replace_hint(name, bytes.clone())).await
    }

    async fn delete(&self, name: &str) -> Result<()> {
        let what = format!("delete {name} in {}", self.describe());
        self.patience.run(&what, Attempt::Single, || self.inner.delete(name)).await
    }
}

/// A writer cannot try again from outside: what it holds is gone. The S3 writer tries again inside, within the budget
/// for each part; this deadline is above what that can take.
struct PatientWriter {
    inner: Box<dyn ObjectWriter>,
    name: String,
    limit: Duration,
}

impl PatientWriter {
    async fn bounded<T>(limit: Duration, name: &str, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        match tokio::time::timeout(limit, work).await {
            Ok(result) => result,
            Err(_) => refuse!(Deadline, "object {name} was not taken within {:.1} s", limit.as_secs_f64()),
        }
    }
}

#[async_trait]
impl ObjectWriter for PatientWriter {
    async fn write(&mut self, piece: Bytes) -> Result<()> {
        Self::bounded(self.limit, &self.name, self.inner.write(piece)).await
    }

    async fn finish(self: Box<Self>, stored_len: u64) -> Result<()> {
        Self::bounded(self.limit, &self.name, self.inner.finish(stored_len)).await
    }

    async fn abort(self: Box<Self>) {
        let _ = tokio::time::timeout(self.limit, self.inner.abort()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_attempt_that_the_budget_cuts_short_does_not_hide_what_the_store_said_before() {
        let quick = Duration::from_millis(1);
        let budget = Duration::from_millis(200);
        let patience = Patience { budget, pause_first: quick, pause_max: quick, ..Patience::default() };
        let mut tries = 0;
        let attempt = || {
            tries += 1;
            let first = tries == 1;
            async move {
                if !first {
                    std::future::pending::<()>().await;
                }
                Err::<(), _>(Error::new(Code::Unreachable, "the store says 503 Slow Down"))
            }
        };
        let error = patience.run("read x", Attempt::Single, attempt).await.expect_err("in vain");
        assert_eq!(error.code(), Code::Unreachable, "{}", error.chain());
        assert!(error.chain().contains("503") && !error.chain().contains("no answer within"), "{}", error.chain());
        // One that had all the time an attempt has says that there was no answer.
        let patience = Patience { attempt: quick, attempts_max: 2, ..patience };
        let silent = || async { std::future::pending::<Result<()>>().await };
        let error = patience.run("read x", Attempt::Single, silent).await.expect_err("silent");
        assert_eq!(error.code(), Code::Deadline);
    }

    #[test]
    fn pauses_double_up_to_their_bound_with_a_random_half() {
        let patience = Patience::default();
        for (tries, full_ms) in [(1, 100), (2, 200), (3, 400), (7, 5000), (40, 5000)] {
            let full = Duration::from_millis(full_ms);
            for _ in 0..100 {
                let pause = patience.pause(tries).expect("random numbers");
                assert!(full / 2 <= pause && pause <= full, "{tries}: {pause:?}");
            }
        }
        let pauses: std::collections::HashSet<_> = (0..10).map(|_| patience.pause(7).expect("random")).collect();
        assert!(pauses.len() > 5, "a fleet must not come back together");
    }
}
