//! The policy, as the kernel is answered: who sees a name, who opens, how soon, and who is refused everything for a while.
//!
//! In: requests, the policy in force. Out: refusals, waits, events.
//! Promises: without a policy a request costs one load. With one nothing that the kernel is told of names and attributes
//! outlives the answer, so that nobody is answered by what another was told; a model that an asker may not see is as one that
//! is not there, by name and by number, and folders that hold nothing he sees are not there either; a read through the daemon
//! is judged by who opened and by who reads; a new policy holds for descriptors that are open.
//! What the kernel does not allow: a reader who has passthrough descriptors or maps, or pages in the kernel's cache that he
//! has mapped, keeps those until `sessions --hard` or a lock takes them.
//! Not here: rules, limits and counts (`policy`), words of the operator (`guard`), what events look like (`told`).
//! Held by: tests/policy.rs, tests/policy.sh.

use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use fuser::{Errno, INodeNo, Request};
use lru::LruCache;

use super::{Handle, Inner, ModelFs, Opener, Session, told};
use crate::error::{Code, Error, Result};
use crate::policy::{
    Asker, Block, Blocked, Buckets, Counted, Culprit, Denials, Limiter, May, Policy, Verdict, Wait, Where, types,
};
use crate::processes;
use crate::telemetry::events::{Actor, Event, Kind, Outcome, Severity};
use crate::vfs::NodeId;

/// Denied opens of one user and model told within a second, and refusals for other reasons of one user; looks are told once.
const OPENS_TOLD: u32 = 20;
/// A read that waits for its turn is refused after this.
const READ_WAIT: Duration = crate::policy::WAIT_MAX;
/// What the kernel was told before the first policy is made to be forgotten twice: an answer may have been on its way.
const FORGET_AGAIN: Duration = Duration::from_millis(50);

/// A policy in force.
pub(super) struct Active {
    policy: Policy,
    limiter: Limiter,
    /// Policies so far.
    epoch: u64,
}

impl Active {
    /// What a verdict of this policy means for whoever has a file open.
    fn last(&self, uid: u32, verdict: Verdict) -> Last {
        let buckets = match verdict.may {
            May::Read => self.limiter.buckets(uid, &self.policy.shares_of(verdict.rule)),
            May::See | May::None => None,
        };
        Last { epoch: self.epoch, may: verdict.may, buckets }
    }
}

#[derive(Default)]
pub(super) struct Access {
    on: AtomicBool,
    active: RwLock<Option<Arc<Active>>>,
    denials: Mutex<Denials>,
    /// So that nobody is looked up while nobody is blocked.
    has_blocks: AtomicBool,
    epochs: AtomicU64,
    /// Pickles are refused by content: what was looked at so far.
    no_pickles: AtomicBool,
    inside: Mutex<Inside>,
}

/// Files whose first bytes were looked at; one that was forgotten is looked at again.
struct Inside(LruCache<NodeId, bool>);

impl Default for Inside {
    fn default() -> Inside {
        const FILES_MAX: NonZeroUsize = NonZeroUsize::new(1 << 16).expect("not zero");
        Inside(LruCache::new(FILES_MAX))
    }
}

/// How somebody who opened a file was judged, and when.
#[derive(Debug)]
pub(super) struct Judged {
    asker: Asker,
    last: Mutex<Last>,
}

#[derive(Debug)]
struct Last {
    /// Of the policy that judged.
    epoch: u64,
    may: May,
    buckets: Option<Arc<Buckets>>,
}

impl std::fmt::Debug for Buckets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Buckets")
    }
}

impl Opener {
    pub(super) fn of(request: &Request) -> Opener {
        let since = std::time::SystemTime::now();
        Opener { thread: request.pid(), uid: request.uid(), gid: request.gid(), since, judged: None }
    }

    /// What holds him back, as the policy says that judged him last.
    pub(super) fn buckets(&self) -> Option<Arc<Buckets>> {
        self.judged.as_ref()?.last.lock().expect("a thread died judging").buckets.clone()
    }
}

impl ModelFs {
    /// Puts a policy in force, or takes it away: for every request from now on, and for descriptors that are open. Waits for
    /// reads that are under way: from a thread that holds nothing and answers no requests.
    pub fn set_policy(&self, policy: Option<Policy>) {
        let access = &self.inner.access;
        let is_first = {
            let mut active = access.active.write().expect("a thread died holding the policy");
            let is_first = active.is_none() && policy.is_some();
            let epoch = access.epochs.fetch_add(1, Ordering::SeqCst) + 1;
            *active = policy.map(|policy| Arc::new(Active { policy, limiter: Limiter::default(), epoch }));
            access.on.store(active.is_some(), Ordering::SeqCst);
            is_first
        };
        if is_first {
            self.forget_names();
            std::thread::sleep(if self.inner.notifier.get().is_some() { FORGET_AGAIN } else { Duration::ZERO });
            self.forget_names();
        }
        self.drop_all_pages();
    }

    /// Has the kernel forget every name, listing and attribute that it was told to keep.
    fn forget_names(&self) {
        let Some(notifier) = self.inner.notifier.get() else { return };
        let mut last = None;
        for (folder, name) in self.inner.vfs.names() {
            // Not known to the kernel, or the kernel is gone: then there is nothing to forget.
            let _ = notifier.inval_entry(INodeNo(folder.0), OsStr::from_bytes(&name));
            if last != Some(folder) {
                let _ = notifier.inval_inode(INodeNo(folder.0), 0, 0);
                last = Some(folder);
            }
        }
    }

    /// Whether a policy is in force, and how many rules it has.
    pub fn policy_rules(&self) -> Option<usize> {
        self.inner.access().map(|active| active.policy.rules.len())
    }

    /// From now on the first open of a file looks whether it begins as pickles do, and is refused if so.
    pub fn refuse_pickles(&self) {
        self.inner.access.no_pickles.store(true, Ordering::SeqCst);
    }

    /// Who is refused everything after too many denials, why, and for how much longer.
    pub fn blocks(&self) -> Vec<(Blocked, String, Duration)> {
        let now = Instant::now();
        let denials = self.inner.denials();
        let left = |block: Block| (block.who, block.why, block.until.saturating_duration_since(now));
        denials.standing(now).into_iter().map(left).collect()
    }

    /// Tells of the blocks that are over, and forgets denials that count no more. To be called now and again.
    pub fn expire_blocks(&self) {
        let active = self.inner.access();
        if active.is_none() && !self.inner.access.has_blocks.load(Ordering::SeqCst) {
            return;
        }
        let within = active.map_or(Duration::ZERO, |active| active.policy.denials.within);
        let over = self.inner.denials().expire(within, Instant::now());
        self.inner.unblocked(&over, "its time is over");
    }

    /// Lifts the blocks of a session.
    pub(super) fn lift_blocks(&self, session: &Session) -> bool {
        let lifted = self.inner.denials().lift(|blocked| is_of(blocked, session));
        self.inner.unblocked(&lifted, "let in by the operator");
        !lifted.is_empty()
    }
}

fn is_of(blocked: &Blocked, session: &Session) -> bool {
    match (session, blocked) {
        (Session::Uid(uid), Blocked::User(who)) => who.uid == *uid,
        (Session::Container(start), Blocked::User(who)) => {
            matches!(&who.place, Where::Container(id) if id.starts_with(start.as_str()))
        }
        (Session::Cgroup(path), Blocked::Cgroup(of)) => of == path,
        (Session::Pid(_) | Session::Pod(_) | Session::Cgroup(_), Blocked::User(_)) => false,
        (Session::Uid(_) | Session::Pid(_) | Session::Container(_) | Session::Pod(_), Blocked::Cgroup(_)) => false,
    }
}

impl Inner {
    /// The policy in force.
    pub(super) fn access(&self) -> Option<Arc<Active>> {
        if !self.access.on.load(Ordering::Acquire) {
            return None;
        }
        self.access.active.read().expect("a thread died holding the policy").clone()
    }

    fn denials(&self) -> std::sync::MutexGuard<'_, Denials> {
        self.access.denials.lock().expect("a thread died holding the denials")
    }

    /// As much of whoever asks as the policy turns on.
    fn asker(&self, active: &Active, opener: &Opener) -> Asker {
        if active.policy.needs_process() || self.access.has_blocks.load(Ordering::SeqCst) {
            self.whole_asker(opener)
        } else {
            self.asker_as(opener, None)
        }
    }

    fn whole_asker(&self, opener: &Opener) -> Asker {
        // A thread's number may be another's by now: then nothing is known of whom the kernel named.
        self.asker_as(opener, processes::seen(opener.thread).filter(|seen| seen.uid == opener.uid))
    }

    fn asker_as(&self, opener: &Opener, seen: Option<processes::Seen>) -> Asker {
        let place = self.place();
        let pod = place.pod.as_ref().map(|pod| pod.uid.clone());
        Asker { uid: opener.uid, gid: opener.gid, seen, service_account: place.service_account.clone(), pod }
    }

    /// Whether this node is to be seen by whoever asks; else what he is told.
    pub(super) fn look(&self, active: &Active, opener: &Opener, node: NodeId) -> std::result::Result<Asker, Errno> {
        let asker = self.asker(active, opener);
        if let Some(error) = self.block_of(&asker) {
            self.denied(active, Kind::Look, node, opener, &error, false);
            return Err(Errno::EACCES);
        }
        if self.vfs.is_seen(node, &sees(active, &asker)) {
            return Ok(asker);
        }
        self.denied(active, Kind::Look, node, opener, &hidden(), true);
        Err(Errno::ENOENT)
    }

    /// Whether a name leads whoever asks to a node that he may see. One that he may not see and one that is not there get the
    /// same answer after the same work, and what is to be told is left to the caller, for after the answer: else how soon it
    /// comes would tell one from the other.
    ///
    /// # Errors
    /// What the asker is told, and then the log.
    pub(super) fn look_up(
        &self,
        active: &Active,
        opener: &Opener,
        parent: NodeId,
        name: &[u8],
    ) -> std::result::Result<(), (Errno, Vec<Event>)> {
        let found = self.vfs.lookup(parent, name);
        let asker = self.asker(active, opener);
        let blocked = self.block_of(&asker);
        let sees = sees(active, &asker);
        match found {
            Some(node) if self.vfs.is_seen(node, &sees) && blocked.is_none() => return Ok(()),
            Some(_) => {}
            // Judged as a model of this name would be.
            None => _ = std::hint::black_box(sees(&String::from_utf8_lossy(name))),
        }
        let is_absent = self.vfs.is_seen(parent, &sees) && found.is_none() && blocked.is_none();
        if is_absent && self.vfs.model_of(parent).is_some() {
            // In a model nothing is hidden from whoever sees it.
            return Err((Errno::ENOENT, Vec::new()));
        }
        let whole = self.whole_asker(opener);
        let actor = if self.is_heard() { self.actor(opener) } else { Actor::default() };
        if is_absent {
            return Err((Errno::ENOENT, Vec::new()));
        }
        let (errno, counts) = if blocked.is_some() { (Errno::EACCES, false) } else { (Errno::ENOENT, true) };
        let error = &blocked.unwrap_or_else(hidden);
        let denial = Denial { kind: Kind::Look, node: found.unwrap_or(parent), error, counts };
        Err((errno, self.note_denied(active, &denial, &whole, || actor.clone())))
    }

    /// The same without a word to anybody, for what is listed.
    pub(super) fn lists(&self, active: &Active, asker: &Asker, node: NodeId) -> bool {
        self.vfs.is_seen(node, &sees(active, asker))
    }

    /// What `statfs` says to this asker.
    pub(super) fn totals_seen(&self, active: &Active, opener: &Opener) -> (u64, u64) {
        let asker = self.asker(active, opener);
        self.vfs.totals_of_some(&sees(active, &asker))
    }

    fn block_of(&self, asker: &Asker) -> Option<Error> {
        if !self.access.has_blocks.load(Ordering::SeqCst) {
            return None;
        }
        let left = self.denials().blocked(&asker.culprit(), Instant::now())?;
        Some(Error::new(Code::Policy, format!("blocked after repeated denials, for {} s more", left.as_secs())))
    }

    /// Whether an open goes on, by the operator's word and the policy of this moment. Asked when it comes, and again whenever
    /// it has waited. Notes in the opener how he was judged.
    ///
    /// # Errors
    /// What the asker is told.
    pub(super) fn let_open(&self, opener: &mut Opener, node: NodeId) -> std::result::Result<(), Errno> {
        if self.refuses(opener.thread, opener.uid) {
            let error = Error::new(Code::Locked, "shut out by the operator, or the mount refuses everybody");
            self.tell_not_opened(node, opener, &error);
            return Err(Errno::EACCES);
        }
        self.judge_open(opener, node)
    }

    fn judge_open(&self, opener: &mut Opener, node: NodeId) -> std::result::Result<(), Errno> {
        let Some(active) = self.access() else { return Ok(()) };
        let Some(model) = self.vfs.model_of(node) else { return Ok(()) };
        // Whole, although this policy may not need it: a later one judges by what was seen now.
        let asker = self.whole_asker(opener);
        if let Some(error) = self.block_of(&asker) {
            self.denied(&active, Kind::Open, node, opener, &error, false);
            return Err(Errno::EACCES);
        }
        let verdict = active.policy.judge(&asker, &model.name);
        let (what, errno) = match verdict.may {
            May::Read => {
                let last = Mutex::new(active.last(asker.uid, verdict));
                opener.judged = Some(Arc::new(Judged { asker, last }));
                return Ok(());
            }
            May::See => ("lets it be seen and not read", Errno::EACCES),
            May::None => ("lets it be seen", Errno::ENOENT),
        };
        let error = Error::new(Code::Policy, format!("{} {what}", active.policy.told(verdict.rule)));
        self.denied(&active, Kind::Open, node, opener, &error, true);
        Err(errno)
    }

    /// Whether a read through the daemon goes on, by the operator's word and the policy of this moment. Who opened and who
    /// reads are both asked about: a descriptor may have been handed on.
    pub(super) fn lets_read(&self, handle: &Handle, reader: &Opener) -> bool {
        let shut_out = self.refuses(reader.thread, reader.uid) || self.refuses(handle.opener.thread, handle.opener.uid);
        !shut_out && self.access().is_none_or(|active| self.may_read_on(&active, handle, reader))
    }

    fn may_read_on(&self, active: &Active, handle: &Handle, reader: &Opener) -> bool {
        let Some(model) = self.vfs.model_of(handle.node) else { return false };
        let opener = &handle.opener;
        let may = match &opener.judged {
            Some(judged) => {
                let mut last = judged.last.lock().expect("a thread died judging");
                if last.epoch != active.epoch {
                    *last = active.last(judged.asker.uid, active.policy.judge(&judged.asker, &model.name));
                }
                last.may
            }
            // It was open before there was a policy.
            None => active.policy.judge(&self.whole_asker(opener), &model.name).may,
        };
        let refused = |who: &Opener, why: &str, counts| {
            self.denied(active, Kind::Open, handle.node, who, &Error::new(Code::Policy, why), counts);
            false
        };
        if may < May::Read {
            return refused(opener, "a read of an open file: the policy does not let its opener read any more", false);
        }
        if (reader.thread, reader.uid, reader.gid) == (opener.thread, opener.uid, opener.gid) {
            return true;
        }
        let asker = self.asker(active, reader);
        if active.policy.judge(&asker, &model.name).may < May::Read {
            return refused(reader, "a read of a descriptor that another opened and handed on", true);
        }
        true
    }

    /// Tells of a denial, and counts it.
    fn denied(&self, active: &Active, kind: Kind, node: NodeId, opener: &Opener, error: &Error, counts: bool) {
        let denial = Denial { kind, node, error, counts };
        for event in self.note_denied(active, &denial, &self.whole_asker(opener), || self.actor(opener)) {
            self.tell(event);
        }
    }

    /// Counts a denial; what is to be told of it.
    fn note_denied(&self, active: &Active, denial: &Denial, asker: &Asker, actor: impl Fn() -> Actor) -> Vec<Event> {
        let Denial { kind, node, error, counts } = *denial;
        self.reader.cache().telemetry().access_denied.inc();
        let culprit = asker.culprit();
        let model = match self.vfs.model_of(node) {
            Some(model) => model.name.clone(),
            None => self.vfs.folder_path(node).unwrap_or_default(),
        };
        let told_max = if kind == Kind::Open { OPENS_TOLD } else { 1 };
        let (notice, Counted { begun, forgotten }) = {
            let mut denials = self.denials();
            let now = Instant::now();
            let notice = denials.note(&culprit, &model, told_max, now);
            let cgroup = asker.seen.as_ref().and_then(|seen| seen.cgroup.as_deref());
            let counted = if counts && notice.counts {
                denials.count(&active.policy.denials, &culprit, cgroup, now)
            } else {
                Counted::default()
            };
            self.access.has_blocks.store(denials.has_blocks(), Ordering::SeqCst);
            (notice, counted)
        };
        let mut events = Vec::new();
        if let Some(missed) = notice.tell
            && self.is_heard()
        {
            let event = told::after(missed, Event::new(kind).severity(Severity::Medium).error(error));
            events.push(event.actor(actor()).subject(self.subject(node)));
        }
        for block in begun {
            let seconds = block.until.saturating_duration_since(Instant::now()).as_secs_f64().round();
            let detail = format!("{} is refused everything for {seconds} s: {}", block.who, block.why);
            tracing::warn!(model, "{detail}");
            if self.is_heard() {
                let event = Event::new(Kind::Block).outcome(Outcome::Denied).detail(detail);
                // Of whom the block is about: others of his control group may be blocked for what he did.
                let about = if block.who == Blocked::User(culprit.clone()) { actor() } else { named(&block.who) };
                let mut event = event.actor(about).subject(self.subject(node));
                event.code = Some(Code::Policy);
                events.push(event);
            }
        }
        let why = "there is no room for more blocks, and it was asked about longest ago";
        events.extend(forgotten.iter().map(|block| self.unblock_event(block, why).severity(Severity::Medium)));
        events
    }

    fn unblocked(&self, blocks: &[Block], why: &str) {
        if blocks.is_empty() {
            return;
        }
        let denials = self.denials();
        self.access.has_blocks.store(denials.has_blocks(), Ordering::SeqCst);
        drop(denials);
        for block in blocks {
            self.tell(self.unblock_event(block, why));
        }
    }

    fn unblock_event(&self, block: &Block, why: &str) -> Event {
        let detail = format!("{} is no longer refused: {why}", block.who);
        tracing::warn!("{detail}");
        let place = self.place();
        let mut event = Event::new(Kind::Unblock).detail(detail).actor(named(&block.who));
        event.subject.mountpoint = Some(place.mountpoint.clone());
        event.subject.store = Some(place.store.clone());
        event
    }

    /// Waits for the user's turn, `most` at most.
    ///
    /// # Errors
    /// `OVER_LIMIT`; it has been told.
    pub(super) async fn turn(
        &self,
        opener: &Opener,
        node: NodeId,
        buckets: &Buckets,
        most: Duration,
        ask: impl Fn(&Buckets) -> std::result::Result<(), Wait>,
    ) -> Result<()> {
        let until = Instant::now() + most;
        let mut waited = false;
        while let Err(Wait(wait)) = ask(buckets) {
            let left = until.saturating_duration_since(Instant::now());
            let error = Error::new(
                Code::OverLimit,
                format!("uid {} has had more than the policy's share, and waited {} s", opener.uid, most.as_secs()),
            );
            if left.is_zero() {
                self.at_limit(opener, node, Some(&error));
                return Err(error);
            }
            if !waited && buckets.tells() {
                self.at_limit(opener, node, None);
            }
            waited = true;
            // At least a millisecond: the clock of the buckets is another.
            tokio::time::sleep(wait.max(Duration::from_millis(1)).min(left)).await;
        }
        Ok(())
    }

    fn at_limit(&self, opener: &Opener, node: NodeId, error: Option<&Error>) {
        self.reader.cache().telemetry().limited.inc();
        let event = Event::new(Kind::Limit);
        match error {
            Some(error) => {
                let event = event.severity(Severity::Medium).error(error).outcome(Outcome::Denied);
                self.tell_refused(event, node, opener);
            }
            None if self.is_heard() => {
                let event = event.detail(format!("uid {} waits for its turn", opener.uid));
                self.tell(event.actor(self.actor(opener)).subject(self.subject(node)));
            }
            None => {}
        }
    }

    /// Whether one more refusal of this user that counts towards no block is told, and how many before it were not.
    pub(super) fn refusal_is_told(&self, opener: &Opener) -> Option<u64> {
        let culprit = self.whole_asker(opener).culprit();
        self.denials().note_refusal(&culprit, OPENS_TOLD, Instant::now())
    }

    /// Whether this file's first bytes are still to be looked at before it may be opened.
    pub(super) fn must_look_inside(&self, node: NodeId) -> bool {
        self.access.no_pickles.load(Ordering::Relaxed) && self.inside(node) != Some(false)
    }

    fn inside(&self, node: NodeId) -> Option<bool> {
        self.access.inside.lock().expect("a thread died holding what is inside").0.get(&node).copied()
    }

    /// # Errors
    /// `POLICY` for a file that begins as pickles do; what reading it answers.
    pub(super) async fn look_inside(&self, node: NodeId) -> Result<()> {
        let is_pickle = match self.inside(node) {
            Some(known) => known,
            None => {
                let Some(file) = self.vfs.open(node) else { return Ok(()) };
                let head = self.reader.read(&file, 0, types::HEAD_BYTES).await;
                let found = head.map(|head| types::is_pickle_head(head.bytes()));
                self.vfs.release(node);
                let found = found?;
                self.access.inside.lock().expect("a thread died holding what is inside").0.put(node, found);
                found
            }
        };
        if is_pickle {
            return Err(Error::new(
                Code::Policy,
                "deny-types=pickle: the file begins as pickles do, whatever its name",
            ));
        }
        Ok(())
    }

    pub(super) const fn read_wait() -> Duration {
        READ_WAIT
    }
}

/// As much of somebody who is blocked as his block says.
fn named(who: &Blocked) -> Actor {
    match who {
        Blocked::User(Culprit { uid, place }) => {
            let container = if let Where::Container(id) = place { Some(id.clone()) } else { None };
            Actor { uid: Some(*uid), container, ..Actor::default() }
        }
        Blocked::Cgroup(path) => Actor { cgroup: Some(path.clone()), ..Actor::default() },
    }
}

/// What was denied, and why.
struct Denial<'a> {
    kind: Kind,
    node: NodeId,
    error: &'a Error,
    /// Towards a block.
    counts: bool,
}

fn hidden() -> Error {
    Error::new(Code::Policy, "no rule lets it be seen: answered as a name that is not there")
}

fn sees<'a>(active: &'a Active, asker: &'a Asker) -> impl Fn(&str) -> bool + 'a {
    |model| active.policy.judge(asker, model).may >= May::See
}
