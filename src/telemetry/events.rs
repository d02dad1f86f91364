//! What happened that somebody answers for: who did what to which model, whether it was let, and why not.
//!
//! In: an [`Event`] from wherever it happens: an open, a login, a chunk that was not what was signed. Out: the same, to every
//! [`Sink`], in the order in which they came, before the call returns.
//! Promises: without sinks an event costs one load and one addition; an event holds no key, no token and no plaintext; what happened first to
//! one caller is told first.
//! Not here: how a record is written (`audit`), who is woken (`observe::alerts`), how often it happened (the counters).
//! Held by: the tests below.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use serde::{Deserialize, Serialize};

use super::tally::Tally;
use crate::error::{Code, Result};
use crate::processes::Pod;

/// What kind of thing happened. The names are a contract: the audit log, metrics and alerts use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The program began, or ended.
    Start,
    Stop,
    /// A mount came into the tree, or could not; it left.
    Mount,
    Unmount,
    /// A file was opened, or not let open.
    Open,
    /// A name or a listing was refused to somebody who knew it.
    Look,
    /// A login at Vault; what it lent was renewed, replaced, or could not be.
    Login,
    Renewal,
    /// Vault takes our token no more, and we get no other; or somebody revoked the lease of our storage credentials.
    LeaseLost,
    /// Keys were read anew, slots or data keys changed.
    Rotation,
    /// A version was sealed, signed or removed, a tag moved: by a command of this machine.
    Publish,
    /// A version came or became the current one.
    Reload,
    /// Somebody reached a limit of opens or bytes.
    Limit,
    /// Refused so often that everything is refused for a while; and the end of that.
    Block,
    Unblock,
    /// Configuration or policy was read anew.
    Configuration,
    /// A word of an operator at the control socket.
    Admin,
    Lock,
    Unlock,
    /// Bytes, a signature or a manifest were not what was signed.
    Tamper,
    /// An older or contradicting version was offered.
    Rollback,
    /// The store does not answer, and answers again.
    StoreDown,
    StoreUp,
    VaultDown,
    VaultUp,
    /// A record of the log itself: its chain so far, signed.
    Checkpoint,
}

impl Kind {
    pub const ALL: [Kind; 26] = [
        Kind::Start,
        Kind::Stop,
        Kind::Mount,
        Kind::Unmount,
        Kind::Open,
        Kind::Look,
        Kind::Login,
        Kind::Renewal,
        Kind::LeaseLost,
        Kind::Rotation,
        Kind::Publish,
        Kind::Reload,
        Kind::Limit,
        Kind::Block,
        Kind::Unblock,
        Kind::Configuration,
        Kind::Admin,
        Kind::Lock,
        Kind::Unlock,
        Kind::Tamper,
        Kind::Rollback,
        Kind::StoreDown,
        Kind::StoreUp,
        Kind::VaultDown,
        Kind::VaultUp,
        Kind::Checkpoint,
    ];

    /// As records, metrics and options write it.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Start => "start",
            Kind::Stop => "stop",
            Kind::Mount => "mount",
            Kind::Unmount => "unmount",
            Kind::Open => "open",
            Kind::Look => "look",
            Kind::Login => "login",
            Kind::Renewal => "renewal",
            Kind::LeaseLost => "lease-lost",
            Kind::Rotation => "rotation",
            Kind::Publish => "publish",
            Kind::Reload => "reload",
            Kind::Limit => "limit",
            Kind::Block => "block",
            Kind::Unblock => "unblock",
            Kind::Configuration => "configuration",
            Kind::Admin => "admin",
            Kind::Lock => "lock",
            Kind::Unlock => "unlock",
            Kind::Tamper => "tamper",
            Kind::Rollback => "rollback",
            Kind::StoreDown => "store-down",
            Kind::StoreUp => "store-up",
            Kind::VaultDown => "vault-down",
            Kind::VaultUp => "vault-up",
            Kind::Checkpoint => "checkpoint",
        }
    }

    /// How bad it is where whoever emits it does not say otherwise. What calls somebody has its severity here alone, so that
    /// rules of alerts, webhooks and pages can go by it.
    pub const fn severity(self) -> Severity {
        match self {
            Kind::Tamper | Kind::Rollback => Severity::Critical,
            Kind::Block | Kind::LeaseLost | Kind::StoreDown => Severity::High,
            // What is mounted is served with the keys that it has.
            Kind::VaultDown => Severity::Medium,
            Kind::Start
            | Kind::Stop
            | Kind::Mount
            | Kind::Unmount
            | Kind::Open
            | Kind::Look
            | Kind::Login
            | Kind::Renewal
            | Kind::Rotation
            | Kind::Publish
            | Kind::Reload
            | Kind::Limit
            | Kind::Unblock
            | Kind::Configuration
            | Kind::Admin
            | Kind::Lock
            | Kind::Unlock
            | Kind::StoreUp
            | Kind::VaultUp
            | Kind::Checkpoint => Severity::Low,
        }
    }
}

/// How bad it is, to somebody on call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As every day.
    Low,
    /// Worth a look in daylight.
    Medium,
    /// Somebody should look today.
    High,
    /// Somebody should be woken.
    Critical,
}

impl Severity {
    pub const ALL: [Severity; 4] = [Severity::Low, Severity::Medium, Severity::High, Severity::Critical];

    pub const fn name(self) -> &'static str {
        match self {
            Severity::Low => "low",
            Severity::Medium => "medium",
            Severity::High => "high",
            Severity::Critical => "critical",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Allowed,
    /// A rule or a right said no.
    Denied,
    /// It was let, and could not be done.
    Failed,
}

impl Outcome {
    pub const ALL: [Outcome; 3] = [Outcome::Allowed, Outcome::Denied, Outcome::Failed];

    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Allowed => "allowed",
            Outcome::Denied => "denied",
            Outcome::Failed => "failed",
        }
    }
}

/// Who did it, as far as the kernel tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub pid: Option<u32>,
    pub command: Option<String>,
    pub exe: Option<PathBuf>,
    pub cgroup: Option<String>,
    pub container: Option<String>,
    /// The UID of the pod that it runs in; where that is not seen, of the pod that the mount is for.
    pub pod: Option<String>,
    /// `NAMESPACE/NAME` of Kubernetes, where the mount is a pod's.
    pub pod_name: Option<String>,
    /// The same of the pod's service account.
    pub service_account: Option<String>,
}

impl Actor {
    /// Whoever uses a pod's volume, as far as the volume tells.
    pub fn of_volume(service_account: &Option<String>, pod: &Option<Pod>) -> Actor {
        Actor {
            pod: pod.as_ref().map(|pod| pod.uid.clone()),
            pod_name: pod.as_ref().map(|pod| pod.name.clone()),
            service_account: service_account.clone(),
            ..Actor::default()
        }
    }
}

/// What it was done to. A model is told by name, number and digest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    pub mountpoint: Option<PathBuf>,
    pub store: Option<String>,
    pub model: Option<String>,
    pub version: Option<u64>,
    /// `sha256:HEX`.
    pub manifest: Option<String>,
    /// Within the model.
    pub file: Option<String>,
    /// Which slot or key source gave the key: its kind and label, never key material.
    pub key: Option<String>,
}

#[derive(Debug, Clone)]
pub struct Event {
    pub kind: Kind,
    pub severity: Severity,
    pub outcome: Outcome,
    pub actor: Actor,
    pub subject: Subject,
    /// Of a refusal or a failure.
    pub code: Option<Code>,
    /// In a sentence: why not, or what was changed. Masked by whoever writes it.
    pub detail: Option<String>,
}

impl Event {
    /// Something that was let and done, of its kind's severity.
    pub fn new(kind: Kind) -> Event {
        Event {
            kind,
            severity: kind.severity(),
            outcome: Outcome::Allowed,
            actor: Actor::default(),
            subject: Subject::default(),
            code: None,
            detail: None,
        }
    }

    pub fn severity(mut self, severity: Severity) -> Event {
        self.severity = severity;
        self
    }

    pub fn outcome(mut self, outcome: Outcome) -> Event {
        self.outcome = outcome;
        self
    }

    pub fn actor(mut self, actor: Actor) -> Event {
        self.actor = actor;
        self
    }

    pub fn subject(mut self, subject: Subject) -> Event {
        self.subject = subject;
        self
    }

    pub fn detail(mut self, detail: impl Into<String>) -> Event {
        self.detail = Some(detail.into());
        self
    }

    /// Something that the store or whoever lies between did: bytes that are not those that were signed, or a version that
    /// is not the newest one seen. `None` for any other error.
    pub fn of_hostile(error: &crate::error::Error) -> Option<Event> {
        let kind = match error.code() {
            Code::Rollback | Code::Fork | Code::FastForward | Code::BelowFloor | Code::SlotsRollback => Kind::Rollback,
            // Neither says that anyone changed anything: a word of time, a wrong key, what this version cannot read.
            Code::RefExpired | Code::RefFuture | Code::Clock | Code::SlotCommit | Code::Unsupported => return None,
            code if code.class() == crate::error::Class::Tampered => Kind::Tamper,
            _ => return None,
        };
        Some(Event::new(kind).error(error))
    }

    /// With the code and the words of an error: denied or failed, as its class says.
    pub fn error(mut self, error: &crate::error::Error) -> Event {
        self.outcome = match error.class() {
            crate::error::Class::Denied => Outcome::Denied,
            _ => Outcome::Failed,
        };
        self.code = Some(error.code());
        self.detail = Some(error.chain());
        self
    }
}

/// Takes events. Called from any thread, also from those that answer the kernel: bounded in time, never through a mount.
pub trait Sink: Send + Sync {
    /// # Errors
    /// Only if what happened must not go on unless it is told: an audit log that is required and cannot be written.
    fn take(&self, event: &Event) -> Result<()>;
}

/// Where events of one process go. Cheap when nobody listens.
#[derive(Default)]
pub struct Events {
    sinks: RwLock<Vec<Arc<dyn Sink>>>,
    any: AtomicBool,
    tally: Tally,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("any", &self.any).finish_non_exhaustive()
    }
}

impl Events {
    pub fn add(&self, sink: Arc<dyn Sink>) {
        self.sinks.write().expect("a thread died holding the sinks").push(sink);
        self.any.store(true, Ordering::Release);
    }

    /// Whether anybody listens: an event that costs something to make need not be made otherwise.
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// From now on every event is made, though nobody listens: somebody looks at how many there are.
    pub fn count_all(&self) {
        self.any.store(true, Ordering::Release);
    }

    /// How often what was told of.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Tells every sink.
    ///
    /// # Errors
    /// The first sink's that says so; the others have been told all the same. Then what the event tells of must not go on.
    pub fn emit(&self, event: &Event) -> Result<()> {
        self.tally.note(event);
        if !self.any() {
            return Ok(());
        }
        let sinks = self.sinks.read().expect("a thread died holding the sinks").clone();
        let mut outcome = Ok(());
        for sink in &sinks {
            let taken = sink.take(event);
            outcome = outcome.and(taken);
        }
        outcome
    }

    /// The same for what has happened and cannot be held back: a failure is in the log.
    pub fn tell(&self, event: &Event) {
        if let Err(error) = self.emit(event) {
            tracing::error!("not recorded: {}", error.chain());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::error::Error;

    struct Notes(Mutex<Vec<Kind>>, bool);

    impl Sink for Notes {
        fn take(&self, event: &Event) -> Result<()> {
            self.0.lock().expect("a test").push(event.kind);
            if self.1 { Err(Error::new(Code::Host, "full")) } else { Ok(()) }
        }
    }

    #[test]
    fn every_sink_is_told_in_order_and_one_that_refuses_is_heard() {
        let events = Events::default();
        events.emit(&Event::new(Kind::Open)).expect("nobody listens");
        let (full, fine) = (Arc::new(Notes(Mutex::default(), true)), Arc::new(Notes(Mutex::default(), false)));
        events.add(full.clone());
        events.add(fine.clone());
        let error = events.emit(&Event::new(Kind::Mount)).expect_err("the first sink is full");
        assert_eq!(error.code(), Code::Host);
        events.tell(&Event::new(Kind::Unmount));
        for sink in [full, fine] {
            assert_eq!(*sink.0.lock().expect("a test"), [Kind::Mount, Kind::Unmount]);
        }
    }

    #[test]
    fn a_store_that_offers_other_bytes_or_an_older_version_is_critical_and_a_word_of_time_is_no_alarm() {
        let told = |code| Event::of_hostile(&Error::new(code, "x")).map(|event| (event.kind, event.severity));
        assert_eq!(told(Code::ChunkHash), Some((Kind::Tamper, Severity::Critical)));
        assert_eq!(told(Code::Rollback), Some((Kind::Rollback, Severity::Critical)));
        assert_eq!(told(Code::RefExpired), None);
        assert_eq!(told(Code::Unreachable), None);
    }

    #[test]
    fn names_are_those_that_records_are_read_by() {
        for kind in Kind::ALL {
            assert_eq!(serde_json::to_value(kind).expect("a word"), kind.name());
        }
        for severity in Severity::ALL {
            assert_eq!(serde_json::to_value(severity).expect("a word"), severity.name());
        }
        for outcome in Outcome::ALL {
            assert_eq!(serde_json::to_value(outcome).expect("a word"), outcome.name());
        }
    }

    #[test]
    fn a_denial_and_a_failure_are_told_apart_by_the_errors_class() {
        let denied = Event::new(Kind::Open).error(&Error::new(Code::Locked, "locked"));
        assert_eq!((denied.outcome, denied.code), (Outcome::Denied, Some(Code::Locked)));
        let failed = Event::new(Kind::Open).error(&Error::new(Code::ChunkHash, "other bytes"));
        assert_eq!(failed.outcome, Outcome::Failed);
    }
}
