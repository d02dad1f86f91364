//! Storage credentials that end: fetched when first needed, replaced before they end, given back when the mount ends.
//!
//! In: whoever issues them ([`IssueCredentials`], which may block), and what the store says of the ones in use. Out: one
//! set of S3 credentials for any number of requests, and word of a lease that somebody revoked.
//! Promises: one thread asks, however many requests wait; the old ones are used until the new ones are there; an issuer
//! that is away changes nothing as long as the store takes what we have; a store that refuses them is asked again with new
//! ones, once for each set; a lease that whoever lends it revoked before its time is told apart from one that ended; a store
//! that refuses new ones as well cannot make us ask for more. Nothing here prints or logs a credential; a set lies in
//! locked memory and is overwritten when it is replaced.
//! What remains: the library that signs wants ordinary strings, so a copy lies on the heap while a request is under way
//! (`mem::WipingHeap` overwrites it), and a session token in the buffer of a connection until that is used again or closed.
//! Not here: talking to Vault (`vault`), what is signed (`s3`), which refusals there are (`wire`).
//! Held by: the tests below, tests/dynamic_credentials.rs.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use serde::Serialize;
use tokio::sync::watch;

use crate::error::{Class, Code, Error, Result};
use crate::mem::LockedBuf;
use crate::refuse;
use crate::telemetry::Telemetry;
use crate::telemetry::events::{Event, Kind, Outcome, Severity};

/// How long a replaced set is left alone before its lease is given back: longer than one attempt of a request.
const RETIRE_GRACE: Duration = Duration::from_secs(60);

/// The shortest time between two sets, whatever their length is said to be.
const HOLD_MIN: Duration = Duration::from_secs(1);

/// After a failed attempt: the first pause, doubled each time up to the second. Someone who waits gets one attempt a
/// `PAUSE_FIRST`, whatever the pause has grown to.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// How long a store may not know a new key yet: IAM tells its parts within seconds.
const SETTLING: Duration = Duration::from_secs(15);

/// A refusal that does not say that the credentials have ended (a policy, perhaps) replaces no set younger than this.
const REFUSAL_SPACING: Duration = Duration::from_secs(60);

/// Where credentials come from. Every method may block; all are called from one thread of ours.
pub trait IssueCredentials: Send + Sync {
    fn issue(&self) -> Result<Issued>;

    /// Makes a lease longer; the answer is how long it now lasts.
    fn renew(&self, lease_id: &str) -> Result<Duration>;

    fn revoke(&self, lease_id: &str) -> Result<()>;

    /// Whether somebody revoked the newest lease, of which time should be left: not, if it is there, nor if it ended with
    /// what it was lent to.
    fn was_revoked(&self, lease_id: &str) -> Result<bool>;

    /// For people: what is asked, without a secret.
    fn describe(&self) -> String;
}

/// One set of credentials, as it was issued.
pub struct Issued {
    pub key_id: LockedBuf,
    pub secret: LockedBuf,
    /// There for temporary credentials of STS, which end by themselves and which nobody can revoke.
    pub token: Option<LockedBuf>,
    /// `None`: they do not end.
    pub ttl: Option<Duration>,
    pub lease_id: Option<String>,
    pub renewable: bool,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Issued(ttl {:?})", self.ttl)
    }
}

impl Issued {
    fn check_signable(&self) -> Result<()> {
        let parts = [(&self.key_id, "key id"), (&self.secret, "secret key")];
        for (part, what) in parts.into_iter().chain(self.token.as_ref().map(|token| (token, "session token"))) {
            // What follows goes into a header: one printable word.
            if part.is_empty() || !part.iter().all(u8::is_ascii_graphic) {
                refuse!(VaultAnswer, "the {what} of the storage credentials is no plain word");
            }
        }
        Ok(())
    }

    /// A copy for one request; the heap overwrites it when it is given back.
    fn lend(&self) -> Arc<AwsCredential> {
        let text = |part: &LockedBuf| String::from_utf8_lossy(part).into_owned();
        Arc::new(AwsCredential {
            key_id: text(&self.key_id),
            secret_key: text(&self.secret),
            token: self.token.as_ref().map(text),
        })
    }
}

/// When a set that lasts `ttl` is replaced: at two thirds, less a random tenth, so that a fleet does not ask at once.
fn due(ttl: Duration, random: u32) -> Duration {
    let early = 0.1 * f64::from(random) / f64::from(u32::MAX);
    ttl.mul_f64(2.0 / 3.0 - early).max(HOLD_MIN)
}

/// The pause after that many failures in a row: exponential, with the upper half drawn at random.
fn pause(failures: u32, random: u32) -> Duration {
    let full = PAUSE_FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(PAUSE_MAX);
    full.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX))
}

fn random() -> u32 {
    // Spreading a fleet is all this is for.
    getrandom::u32().unwrap_or(u32::MAX / 2)
}

/// One set in use.
struct Set {
    issued: Issued,
    obtained: Instant,
    /// Issued or renewed last; `ttl` counts from here.
    since: Instant,
    ttl: Option<Duration>,
    first_ttl: Option<Duration>,
    due: Option<Instant>,
    renewable: bool,
    /// The store has taken a request signed with it.
    accepted: bool,
    /// The store takes it no more: nobody gets it, its successor is waited for.
    refused: bool,
}

impl Set {
    fn new(issued: Issued, now: Instant) -> Result<Set> {
        issued.check_signable()?;
        Ok(Set {
            obtained: now,
            since: now,
            ttl: issued.ttl,
            first_ttl: issued.ttl,
            due: issued.ttl.map(|ttl| now + due(ttl, random())),
            renewable: issued.renewable,
            accepted: false,
            refused: false,
            issued,
        })
    }

    fn is(&self, key_id: &str) -> bool {
        self.issued.key_id[..] == *key_id.as_bytes()
    }

    /// Temporary credentials of STS end by themselves; nobody can take them back.
    fn revocable(&self) -> Option<String> {
        self.issued.lease_id.clone().filter(|_| self.issued.token.is_none())
    }

    /// Its lease, if nothing of it should have ended yet. Of its last tenth nothing is said: clocks differ.
    fn in_its_time(&self) -> Option<String> {
        self.revocable().filter(|_| self.ttl.is_none_or(|ttl| self.since.elapsed() < ttl.mul_f64(0.9)))
    }
}

/// What is left of a set that was replaced.
struct Retired {
    lease_id: String,
    since: Instant,
}

#[derive(Default)]
struct State {
    current: Option<Set>,
    retired: Vec<Retired>,
    /// Someone waits for a set, or the store refused the one there is.
    wanted: bool,
    /// The lease of a set that should hold and does not.
    doubted: Option<String>,
    /// A lease was revoked, and nothing more is asked for until somebody says so.
    lost: bool,
    sets: u64,
    failures: u32,
    failed_at: Option<Instant>,
    not_before: Option<Instant>,
    last_error: Option<Error>,
    started: bool,
    closing: bool,
}

/// What the thread does next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Was it revoked?
    Doubt(String),
    Issue,
    Renew(String),
    Revoke(String),
    Sleep(Option<Duration>),
}

impl State {
    fn usable(&self) -> Option<&Set> {
        self.current.as_ref().filter(|set| !set.refused)
    }

    fn next(&self, now: Instant) -> Next {
        let mut wake: Option<Instant> = None;
        let mut no_later = |at: Instant| wake = Some(wake.map_or(at, |wake| wake.min(at)));
        if let Some(lease) = &self.doubted {
            return Next::Doubt(lease.clone());
        }
        if self.wanted && !self.lost && self.usable().is_none() {
            match self.failed_at.map(|failed| failed + PAUSE_FIRST).filter(|at| *at > now) {
                None => return Next::Issue,
                Some(at) => no_later(at),
            }
        }
        if let Some((set, due)) = self.usable().and_then(|set| Some((set, set.due?))) {
            let at = self.not_before.map_or(due, |not_before| due.max(not_before));
            if at <= now {
                return match &set.issued.lease_id {
                    Some(lease) if set.renewable => Next::Renew(lease.clone()),
                    _ => Next::Issue,
                };
            }
            no_later(at);
        }
        for retired in &self.retired {
            if retired.since + RETIRE_GRACE <= now {
                return Next::Revoke(retired.lease_id.clone());
            }
            no_later(retired.since + RETIRE_GRACE);
        }
        Next::Sleep(wake.map(|at| at - now))
    }

    fn issued(&mut self, set: Set) {
        self.sets += 1;
        self.succeeded();
        let old = self.current.replace(set).and_then(|old| old.revocable());
        self.retired.extend(old.map(|lease_id| Retired { lease_id, since: Instant::now() }));
    }

    fn renewed(&mut self, ttl: Duration, now: Instant) {
        self.succeeded();
        let Some(set) = &mut self.current else { return };
        set.since = now;
        set.ttl = Some(ttl);
        set.due = Some(now + due(ttl, random()));
        // At the end of what the role allows, renewals get shorter: better a new set than ever more of them.
        if set.first_ttl.is_some_and(|first| ttl < first / 2) {
            set.renewable = false;
        }
    }

    fn succeeded(&mut self) {
        self.wanted = false;
        self.failures = 0;
        (self.failed_at, self.not_before, self.last_error) = (None, None, None);
    }

    fn failed(&mut self, error: Error, now: Instant) {
        self.wanted = false;
        self.failures = self.failures.saturating_add(1);
        self.failed_at = Some(now);
        self.not_before = Some(now + pause(self.failures, random()));
        self.last_error = Some(error);
    }
}

struct Shared {
    issuer: Box<dyn IssueCredentials>,
    telemetry: Arc<Telemetry>,
    state: Mutex<State>,
    wake: Condvar,
    /// Attempts that ended; whoever waits for a set waits for this to grow.
    attempts: watch::Sender<u64>,
    /// A lease that somebody revoked is not replaced until [`LeasedCredentials::forgive`].
    stop_when_revoked: bool,
    /// Why there are no credentials since.
    lost: watch::Sender<Option<Error>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is made by single stores of whole values: a panic elsewhere leaves them whole.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The thread: the only place where the issuer is asked. Answers why a lease could not be given back at the end.
    fn keep(&self) -> Option<Error> {
        let mut state = self.state();
        while !state.closing {
            let next = state.next(Instant::now());
            if let Next::Sleep(time) = next {
                state = match time {
                    None => self.wake.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner()),
                    Some(time) => {
                        self.wake.wait_timeout(state, time).unwrap_or_else(|poisoned| poisoned.into_inner()).0
                    }
                };
                continue;
            }
            drop(state);
            // Whoever waits for a set learns nothing from this.
            let is_question = matches!(next, Next::Doubt(_));
            self.do_next(next);
            if !is_question || self.state().lost {
                self.attempts.send_modify(|attempts| *attempts += 1);
            }
            state = self.state();
        }
        let current = state.current.take();
        let mut retired = std::mem::take(&mut state.retired);
        drop(state);
        self.attempts.send_modify(|attempts| *attempts += 1);
        if let Some(set) = current {
            let lease_id = set.revocable();
            if set.issued.token.is_some() {
                let left = set.ttl.map(|ttl| ttl.saturating_sub(set.since.elapsed()).as_secs());
                tracing::debug!(
                    seconds = left,
                    "temporary storage credentials cannot be revoked; they end by themselves"
                );
            }
            retired.extend(lease_id.map(|lease_id| Retired { lease_id, since: Instant::now() }));
        }
        let mut kept = None;
        for set in retired {
            if let Err(error) = self.issuer.revoke(&set.lease_id) {
                kept = Some(error);
            }
        }
        kept
    }

    fn do_next(&self, next: Next) {
        match next {
            Next::Doubt(lease) => self.doubt(&lease),
            Next::Issue => match self.issuer.issue().and_then(|issued| Set::new(issued, Instant::now())) {
                Ok(set) => {
                    self.telemetry.credentials_issued.inc();
                    tracing::debug!(ttl_s = set.ttl.map(|ttl| ttl.as_secs()), "new storage credentials");
                    let ttl = set.ttl;
                    self.state().issued(set);
                    self.tell(Event::new(Kind::Renewal), "new ones", ttl);
                }
                Err(error) => self.failed(error),
            },
            Next::Renew(lease) => match self.issuer.renew(&lease) {
                Ok(ttl) => {
                    self.telemetry.credentials_renewed.inc();
                    self.state().renewed(ttl, Instant::now());
                    self.tell(Event::new(Kind::Renewal), "the lease was made longer", Some(ttl));
                }
                Err(error) => {
                    tracing::debug!("storage credentials cannot be renewed, asking for new ones: {}", error.chain());
                    let mut state = self.state();
                    let State { current: Some(set), doubted, .. } = &mut *state else { return };
                    set.renewable = false;
                    *doubted = set.in_its_time().filter(|_| error.class() != Class::Unreachable);
                }
            },
            Next::Revoke(lease) => {
                if let Err(error) = self.issuer.revoke(&lease) {
                    tell_kept(&error);
                }
                self.state().retired.retain(|set| set.lease_id != lease);
            }
            Next::Sleep(_) => unreachable!("the caller sleeps"),
        }
    }

    /// A set should hold and does not: if somebody revoked its lease, that is a loss.
    fn doubt(&self, lease: &str) {
        let revoked = self.issuer.was_revoked(lease).unwrap_or_else(|error| {
            tracing::debug!("whether the lease of the storage credentials was revoked is not known: {}", error.chain());
            false
        });
        let mut state = self.state();
        state.doubted = None;
        let current = state.current.as_mut().filter(|set| set.issued.lease_id.as_deref() == Some(lease));
        let (true, Some(set)) = (revoked, current) else { return };
        set.refused = true;
        state.lost = self.stop_when_revoked;
        let from = self.issuer.describe();
        let why =
            Error::new(Code::VaultDenied, format!("the lease of the storage credentials from {from} was revoked"));
        if self.stop_when_revoked {
            // Before it is told, which may take as long as a disk does, and as one with the state: see `forgive`.
            self.lost.send_replace(Some(why.clone()));
        }
        drop(state);
        tracing::warn!("{}", why.chain());
        self.telemetry.events.tell(&Event::new(Kind::LeaseLost).severity(Severity::High).error(&why));
    }

    fn failed(&self, error: Error) {
        self.telemetry.credentials_failed.inc();
        let mut state = self.state();
        let goes_on = if state.usable().is_some() { "; the old ones go on" } else { "" };
        tracing::warn!("no new storage credentials from {}{goes_on}: {}", self.issuer.describe(), error.chain());
        // The first of a row of failures says it.
        let (first, severity) =
            (state.failures == 0, if state.usable().is_some() { Severity::Medium } else { Severity::High });
        let event = Event::new(Kind::Renewal).severity(severity).error(&error);
        state.failed(error, Instant::now());
        drop(state);
        if first {
            self.tell(event, "no new ones", None);
        }
    }

    fn tell(&self, event: Event, what: &str, ttl: Option<Duration>) {
        if !self.telemetry.events.any() {
            return;
        }
        let mut detail = format!("storage credentials from {}: {what}", self.issuer.describe());
        if let Some(ttl) = ttl {
            detail.push_str(&format!(", for {} s", ttl.as_secs()));
        }
        if let Some(why) = &event.detail {
            detail.push_str(&format!(": {why}"));
        }
        self.telemetry.events.tell(&event.detail(detail));
    }
}

/// Says that a lease goes on.
pub fn tell_kept(error: &Error) {
    tracing::warn!("a lease of storage credentials was not given back and ends by itself: {}", error.chain());
}

/// S3 credentials of which there is always a set that the store takes, as far as the issuer gives one.
pub struct LeasedCredentials {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<Option<Error>>>>,
}

/// What `status` says of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CredentialStatus {
    pub source: String,
    /// `idle` (none asked for yet), `current`, `refused` (the store takes them no more), `lost` (their lease was revoked, and
    /// a loss is to last), `away` (the issuer does not answer), `closed`.
    pub state: &'static str,
    /// Sets fetched so far.
    pub sets: u64,
    pub age_seconds: Option<u64>,
    /// `None`: they do not end, or there are none.
    pub ends_in_seconds: Option<u64>,
    pub trouble: Option<String>,
}

impl LeasedCredentials {
    /// Asks nothing yet.
    pub fn new(issuer: Box<dyn IssueCredentials>, telemetry: Arc<Telemetry>) -> LeasedCredentials {
        LeasedCredentials::with(issuer, telemetry, false)
    }

    /// The same; once somebody has revoked a lease before its time there are no others until [`LeasedCredentials::forgive`].
    pub fn lost_when_revoked(issuer: Box<dyn IssueCredentials>, telemetry: Arc<Telemetry>) -> LeasedCredentials {
        LeasedCredentials::with(issuer, telemetry, true)
    }

    fn with(
        issuer: Box<dyn IssueCredentials>,
        telemetry: Arc<Telemetry>,
        stop_when_revoked: bool,
    ) -> LeasedCredentials {
        let (state, wake, attempts) = (Mutex::default(), Condvar::new(), watch::channel(0).0);
        let lost = watch::Sender::new(None);
        LeasedCredentials {
            shared: Arc::new(Shared { issuer, telemetry, state, wake, attempts, stop_when_revoked, lost }),
            thread: Mutex::default(),
        }
    }

    /// The set to sign with; waits for the issuer only when there is none that the store takes.
    ///
    /// # Errors
    /// What the issuer answered; `STOPPING` after [`LeasedCredentials::close`].
    ///
    /// # Cancel safety
    /// May be dropped; what was asked of the issuer arrives all the same.
    async fn current(&self) -> Result<Arc<AwsCredential>> {
        loop {
            let (mut attempts, before) = {
                let mut state = self.shared.state();
                if state.closing {
                    return Err(Error::new(Code::Stopping, "the storage credentials were given back"));
                }
                if state.lost {
                    let why = self.lost().unwrap_or_else(|| Error::new(Code::VaultDenied, "their lease was revoked"));
                    return Err(why.context("no credentials for the store"));
                }
                if let Some(set) = state.usable() {
                    return Ok(set.issued.lend());
                }
                self.start(&mut state)?;
                state.wanted = true;
                let attempts = self.shared.attempts.subscribe();
                let before = *attempts.borrow();
                (attempts, before)
            };
            self.shared.wake.notify_one();
            // The sender lives as long as we do.
            let _ = attempts.wait_for(|now| *now > before).await;
            let state = self.shared.state();
            if let (None, Some(error)) = (state.usable(), &state.last_error) {
                return Err(error.clone().context("no credentials for the store"));
            }
        }
    }

    fn start(&self, state: &mut State) -> Result<()> {
        if !state.started {
            let shared = self.shared.clone();
            let thread = std::thread::Builder::new().name("credentials".into()).spawn(move || shared.keep());
            let thread = thread.map_err(|e| Error::new(Code::Host, "cannot start a thread").with_source(e))?;
            *self.thread.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(thread);
            state.started = true;
        }
        Ok(())
    }

    /// The store took a request signed with this key.
    pub(super) fn accepted(&self, key_id: &str) {
        if let Some(set) = &mut self.shared.state().current
            && !set.accepted
            && set.is(key_id)
        {
            set.accepted = true;
        }
    }

    /// The store refused a request signed with this key, for `reason` (S3's word, where it said one). True if the request
    /// is worth sending again: with the set that is there by now, or with a new one, which this asks for.
    pub(super) fn refused(&self, key_id: &str, reason: Option<&str>) -> bool {
        let mut state = self.shared.state();
        let Some(set) = &mut state.current else { return !state.closing };
        if set.refused || !set.is(key_id) {
            return true;
        }
        let age = set.obtained.elapsed();
        let ended = matches!(
            reason,
            Some("ExpiredToken" | "InvalidToken" | "InvalidTokenId" | "TokenRefreshRequired" | "InvalidAccessKeyId")
        );
        if !set.accepted && reason == Some("InvalidAccessKeyId") && age < SETTLING {
            return true;
        }
        // A set that was never taken is not replaced at once: the next one would fare no better.
        let spacing = set.first_ttl.map_or(REFUSAL_SPACING, |ttl| REFUSAL_SPACING.max(ttl / 10));
        if !(ended && set.accepted || age >= spacing) {
            return false;
        }
        set.refused = true;
        let doubted = set.in_its_time().filter(|_| set.accepted);
        state.doubted = doubted;
        state.wanted = true;
        self.shared.telemetry.credentials_refused.inc();
        tracing::info!(reason, "the store takes these storage credentials no more; asking for new ones");
        drop(state);
        // Whether others can be had is told by what comes of asking: no lease is lost yet.
        let refused = Event::new(Kind::Renewal).severity(Severity::Medium).outcome(Outcome::Denied);
        let why = reason.unwrap_or("no reason given");
        self.shared.tell(refused, &format!("the store takes them no more ({why}); new ones are asked for"), None);
        self.shared.wake.notify_one();
        true
    }

    /// Why there are none since somebody revoked a lease, with [`LeasedCredentials::lost_when_revoked`].
    pub fn lost(&self) -> Option<Error> {
        self.shared.lost.borrow().clone()
    }

    pub fn watch_lost(&self) -> watch::Receiver<Option<Error>> {
        self.shared.lost.subscribe()
    }

    /// Asks for others after a loss: the operator said that it may, or our right was proved anew.
    pub fn forgive(&self) {
        let mut state = self.shared.state();
        if std::mem::replace(&mut state.lost, false) {
            self.shared.lost.send_replace(None);
            drop(state);
            self.shared.wake.notify_one();
        }
    }

    pub fn status(&self) -> CredentialStatus {
        let state = self.shared.state();
        let set = state.current.as_ref();
        CredentialStatus {
            source: self.shared.issuer.describe(),
            state: match set {
                _ if state.closing => "closed",
                _ if state.lost => "lost",
                _ if state.last_error.is_some() => "away",
                None => "idle",
                Some(set) if set.refused => "refused",
                Some(_) => "current",
            },
            sets: state.sets,
            age_seconds: set.map(|set| set.obtained.elapsed().as_secs()),
            ends_in_seconds: set.and_then(|set| Some(set.ttl?.saturating_sub(set.since.elapsed()).as_secs())),
            trouble: state.last_error.as_ref().map(Error::chain),
        }
    }

    /// Gives back what can be given back and overwrites the rest; waits until that is done. Nothing is signed afterwards.
    /// Answers why a lease could not be given back: it goes on, unless it ends with the issuer's own right.
    pub fn close(&self) -> Option<Error> {
        self.shared.state().closing = true;
        self.shared.wake.notify_one();
        let thread = self.thread.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        // It panicked, at worst; there is nothing to give back then.
        thread?.join().ok().flatten()
    }
}

impl Drop for LeasedCredentials {
    fn drop(&mut self) {
        if let Some(error) = self.close() {
            tell_kept(&error);
        }
    }
}

impl fmt::Debug for LeasedCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LeasedCredentials({})", self.shared.issuer.describe())
    }
}

#[async_trait]
impl CredentialProvider for LeasedCredentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let wrapped = |error: Error| object_store::Error::Generic { store: "S3", source: Box::new(error) };
        self.current().await.map_err(wrapped)
    }
}

#[cfg(test)]
#[path = "credentials_tests.rs"]
mod tests;
