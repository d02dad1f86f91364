//! Who is let in: locked models, and sessions that are shut out.
//!
//! In: an operator's word (lock, unlock, shut out, let in). Out: refusals of opens and reads from that moment on, and what
//! programs had of a locked model taken away.
//! Promises: locking waits for no reader; what the kernel caches of a locked model is dropped, and what programs have past
//! the daemon is cut off and overwritten, before the lock is reported done.
//! What the kernel does not allow: one reader alone cannot be kept from pages that the kernel's page cache holds, nor from a
//! map or passthrough descriptor it already has ([`ModelFs::shut_out`] says who has one).
//! Not here: keys and who may give them back (`daemon`), what `sessions` prints (`control`).
//! Held by: the tests below, tests/lock.rs.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use fuser::INodeNo;

use super::access::Judged;
use super::{Handle, Inner, ModelFs, Way};
use crate::cache::{CachedObject, LockReport, Model};
use crate::error::{Code, Error, Result};
use crate::processes::{self, Name, Process};
use crate::vfs::NodeId;

/// Rules at once; more than this is not a list that anyone keeps in mind.
const RULES_MAX: usize = 256;

/// The shortest part of a container's id that names it, as `docker ps` prints it.
const CONTAINER_PREFIX_MIN: usize = 12;

/// Whom a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Session {
    Uid(u32),
    Pid(u32),
    /// An id, or the first twelve or more digits of one.
    Container(String),
    /// The UID of a pod.
    Pod(String),
    /// A control group and all below it.
    Cgroup(String),
}

impl FromStr for Session {
    type Err = Error;
    fn from_str(text: &str) -> Result<Session> {
        const FORMS: &str = "uid=1000, pid=4711, container=ID (12 digits or more), pod=UID or cgroup=/PATH";
        let bad = || Error::new(Code::Usage, format!("`{text}` names no session; write {FORMS}"));
        let (kind, value) = text.split_once('=').ok_or_else(bad)?;
        let hex = |value: &str| value.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        match kind {
            "uid" => value.parse().map(Session::Uid).map_err(|_| bad()),
            "pid" => value.parse().ok().filter(|pid| *pid > 0).map(Session::Pid).ok_or_else(bad),
            "container" if value.len() >= CONTAINER_PREFIX_MIN && hex(value) => {
                Ok(Session::Container(value.to_ascii_lowercase()))
            }
            "pod" if value.len() >= 32 && hex(value) => Ok(Session::Pod(value.to_ascii_lowercase())),
            "cgroup" if value.starts_with('/') => Ok(Session::Cgroup(value.trim_end_matches('/').to_owned())),
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Session::Uid(uid) => write!(f, "uid={uid}"),
            Session::Pid(pid) => write!(f, "pid={pid}"),
            Session::Container(id) => write!(f, "container={id}"),
            Session::Pod(uid) => write!(f, "pod={uid}"),
            Session::Cgroup(path) => write!(f, "cgroup={path}"),
        }
    }
}

impl Session {
    /// `uid`: as the kernel said it with the request, which counts for more than /proc.
    fn is(&self, uid: u32, process: &Process) -> bool {
        match self {
            Session::Uid(of) => *of == uid,
            Session::Pid(of) => *of == process.pid,
            Session::Container(of) => {
                let is = |id: &str| id.starts_with(of.as_str());
                process.container.as_deref().is_some_and(is)
                    || named(process, &|name| matches!(name, Name::Container(id) if is(id)))
            }
            Session::Pod(of) => {
                process.pod.as_deref() == Some(of)
                    || named(process, &|name| matches!(name, Name::Pod(uid) if uid == of))
            }
            Session::Cgroup(of) => process
                .cgroup
                .as_deref()
                .and_then(|path| path.strip_prefix(of.as_str()))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
        }
    }
}

/// Whether a name in the path of its control group fits. One that a container gave itself counts as well: it only takes away.
fn named(process: &Process, fits: &dyn Fn(&Name) -> bool) -> bool {
    process.cgroup.as_deref().is_some_and(|path| processes::names(path).any(|name| fits(&name)))
}

struct Rule {
    session: Session,
    until: Option<Instant>,
}

impl Rule {
    fn holds(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

/// Sessions that are shut out now.
#[derive(Default)]
pub(super) struct Rules(Vec<Rule>);

/// Who opened a file, as the kernel said it.
#[derive(Debug, Clone)]
pub(super) struct Opener {
    /// The thread; 0 if it is of a pid namespace that this one does not show.
    pub thread: u32,
    pub uid: u32,
    pub gid: u32,
    pub since: SystemTime,
    /// By the policy, if there was one.
    pub judged: Option<Arc<Judged>>,
}

/// An open file, for `modelfs sessions`.
#[derive(Debug, Clone)]
pub struct OpenBy {
    /// `None`: of a pid namespace that we do not see, or the thread has ended.
    pub pid: Option<u32>,
    pub uid: u32,
    pub since: SystemTime,
    pub node: NodeId,
    pub passthrough: bool,
}

/// What shutting a session out did, and could not do.
#[derive(Debug, Clone, Default)]
pub struct ShutOut {
    /// Its open files whose reads through the daemon are refused from now on.
    pub plain_handles: u64,
    /// Its open files that it reads past the daemon. Refused nothing, unless `hard`.
    pub passthrough_handles: u64,
    /// With `hard`: objects taken away from everyone who had them past the daemon.
    pub objects_retired: u64,
    /// The files of those of its objects that nobody has past the daemon any more.
    pub taken_away: Vec<NodeId>,
    /// With `hard`: what became of the plaintext. Kept bytes could not be taken away; whoever had them goes on.
    pub report: LockReport,
}

impl ModelFs {
    /// Locks `models`: from the return on no byte of them is to be had, and what was in memory has been overwritten, or is
    /// counted as not. Call it from a thread that holds nothing and answers no requests.
    pub fn lock(&self, models: &[Arc<Model>]) -> LockReport {
        let inner = &self.inner;
        // Refused first, so that whatever is taken away now cannot come back. Once: an unlock that began since is not refused
        // as if somebody had locked it again.
        for model in models {
            model.lock_if_served();
        }
        let cache = inner.reader.cache();
        cache.drop_pages(models);
        cache.cut(models).wipe(cache)
    }

    /// Refuses every open of a file and every read through the daemon from now on, on this mount alone, or lets all in
    /// again. What programs have past the daemon they keep, and what the kernel has in its page cache until
    /// [`ModelFs::drop_all_pages`].
    pub fn refuse_all(&self, refuse: bool) {
        self.inner.closed.store(refuse, Ordering::SeqCst);
    }

    /// Lets the kernel drop every page that it caches of this mount. Waits for reads that are under way.
    pub fn drop_all_pages(&self) {
        self.inner.drop_pages(|_| true);
    }

    /// Whether [`ModelFs::refuse_all`] holds.
    pub fn refuses_all(&self) -> bool {
        self.inner.closed.load(Ordering::SeqCst)
    }

    /// When the mount was last used: an open, a read through the daemon, a close.
    pub fn last_used(&self) -> Instant {
        self.inner.started + Duration::from_millis(self.inner.used_ms.load(Ordering::Relaxed))
    }

    /// Counts as used now.
    pub fn note_use(&self) {
        self.inner.note_use();
    }

    /// Whether any program has a file open or mapped, as far as the kernel tells us: a map of a file that is served through
    /// the daemon keeps its file open, one of a passthrough file is asked for.
    pub fn is_in_use(&self) -> bool {
        let cache = self.inner.reader.cache();
        self.open_handles() > 0 || self.inner.vfs.models().iter().any(|model| cache.is_held(model.serial))
    }

    /// Every open file and who opened it.
    pub fn open_by(&self) -> Vec<OpenBy> {
        let handles: Vec<Arc<Handle>> =
            self.inner.handles.lock().expect("a thread died holding the handles").values().cloned().collect();
        let told = |handle: Arc<Handle>| OpenBy {
            pid: processes::process_of(handle.opener.thread),
            uid: handle.opener.uid,
            since: handle.opener.since,
            node: handle.node,
            passthrough: matches!(handle.way, Way::Hot { .. }),
        };
        handles.into_iter().map(told).collect()
    }

    /// Shuts a session out: its opens and its reads through the daemon get EACCES, for `time` or until it is let in.
    ///
    /// What it already has past the daemon (a passthrough descriptor or map) the kernel serves without asking: `hard` takes
    /// those objects away from everyone, to be fetched anew. Pages that the kernel caches are dropped once.
    ///
    /// # Errors
    /// `NO_ROOM` beyond 256 rules.
    pub fn shut_out(&self, session: Session, time: Option<Duration>, hard: bool) -> Result<ShutOut> {
        let inner = &self.inner;
        {
            let mut rules = inner.rules.write().expect("a thread died holding the rules");
            rules.0.retain(|rule| rule.holds() && rule.session != session);
            if rules.0.len() >= RULES_MAX {
                return Err(Error::new(Code::NoRoom, format!("{RULES_MAX} sessions are shut out; let one in first")));
            }
            rules.0.push(Rule { session: session.clone(), until: time.map(|time| Instant::now() + time) });
            inner.has_rules.store(true, Ordering::SeqCst);
        }
        let mut done = ShutOut::default();
        let handles: Vec<Arc<Handle>> =
            inner.handles.lock().expect("a thread died holding the handles").values().cloned().collect();
        let mut pages = HashSet::new();
        let mut held: Vec<(NodeId, Arc<CachedObject>)> = Vec::new();
        for handle in handles {
            let pid = processes::process_of(handle.opener.thread).unwrap_or(0);
            if !inner.is_for(&session) && !session.is(handle.opener.uid, &processes::process(pid)) {
                continue;
            }
            match &handle.way {
                Way::Cold { .. } => {
                    done.plain_handles += 1;
                    pages.insert(handle.node);
                }
                Way::Hot { object, .. } => {
                    done.passthrough_handles += 1;
                    if !held.iter().any(|(_, other)| Arc::ptr_eq(other, object)) {
                        held.push((handle.node, object.clone()));
                    }
                }
            }
        }
        inner.drop_pages(|node| pages.contains(&node));
        if hard {
            for (node, object) in held {
                let report = inner.reader.cache().retire_held(&object);
                done.objects_retired += u64::from(report.is_some_and(|report| report.kept_bytes == 0));
                let report = report.unwrap_or_default();
                done.report.add(report);
                if report.kept_bytes == 0 {
                    done.taken_away.push(node);
                }
            }
        }
        Ok(done)
    }

    /// Lets a session in again, whoever shut it out: the operator, or too many denials. `false`: nobody had.
    pub fn let_in(&self, session: &Session) -> bool {
        let was_blocked = self.lift_blocks(session);
        let mut rules = self.inner.rules.write().expect("a thread died holding the rules");
        let before = rules.0.len();
        rules.0.retain(|rule| rule.holds() && rule.session != *session);
        self.inner.has_rules.store(!rules.0.is_empty(), Ordering::SeqCst);
        was_blocked || before > rules.0.len()
    }

    /// Who is shut out now, and for how much longer.
    pub fn shut_out_now(&self) -> Vec<(Session, Option<Duration>)> {
        let rules = self.inner.rules.read().expect("a thread died holding the rules");
        let left = |rule: &Rule| rule.until.map(|until| until.saturating_duration_since(Instant::now()));
        rules.0.iter().filter(|rule| rule.holds()).map(|rule| (rule.session.clone(), left(rule))).collect()
    }

    /// Whether this process is shut out.
    pub fn is_shut_out(&self, uid: u32, process: &Process) -> bool {
        let rules = self.inner.rules.read().expect("a thread died holding the rules");
        let is = |session: &Session| self.inner.is_for(session) || session.is(uid, process);
        rules.0.iter().any(|rule| rule.holds() && is(&rule.session))
    }
}

impl Inner {
    /// Whether the mount is for the pod that the session is: then whoever uses it is of that session, seen or not.
    fn is_for(&self, session: &Session) -> bool {
        matches!(session, Session::Pod(of) if self.place().pod.as_ref().is_some_and(|pod| pod.uid == *of))
    }

    /// Whether whoever asks is shut out. Costs a look at /proc while there are rules that need one, nothing otherwise.
    pub(super) fn refuses(&self, thread: u32, uid: u32) -> bool {
        if self.closed.load(Ordering::SeqCst) {
            return true;
        }
        if !self.has_rules.load(Ordering::SeqCst) {
            return false;
        }
        let rules = self.rules.read().expect("a thread died holding the rules");
        let mut process = None;
        rules.0.iter().filter(|rule| rule.holds()).any(|rule| match rule.session {
            Session::Uid(of) => of == uid,
            Session::Pod(_) if self.is_for(&rule.session) => true,
            Session::Pid(_) | Session::Container(_) | Session::Pod(_) | Session::Cgroup(_) => {
                let process = process
                    .get_or_insert_with(|| processes::process_of(thread).map(processes::process).unwrap_or_default());
                process.pid != 0 && rule.session.is(uid, process)
            }
        })
    }

    /// Notes that programs still use the mount.
    pub(super) fn note_use(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.used_ms.store(now, Ordering::Relaxed);
    }

    /// Lets the kernel drop what its page cache holds of cold nodes. Waits for reads of them that are under way: from a
    /// thread that holds nothing, after those reads are sure to be answered.
    pub(super) fn drop_pages(&self, wanted: impl Fn(NodeId) -> bool) {
        let Some(notifier) = self.notifier.get() else { return };
        let nodes: Vec<NodeId> = {
            let paged = self.paged.lock().expect("a thread died holding the nodes with pages");
            paged.iter().copied().filter(|node| wanted(*node)).collect()
        };
        for node in nodes {
            // An error means that the kernel is gone.
            if let Err(error) = notifier.inval_inode(INodeNo(node.0), 0, 0) {
                tracing::debug!("invalidating the pages of a file: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_named_in_one_of_five_ways() {
        for text in [
            "cgroup=/system.slice/x.service",
            "uid=1000",
            "pid=4711",
            "container=3f2a3f2a3f2a",
            "pod=0f8fad5b-d9cb-469f-a165-70867728950e",
        ] {
            assert_eq!(text.parse::<Session>().expect(text).to_string(), text);
        }
        for text in [
            "",
            "uid",
            "uid=",
            "uid=-1",
            "uid=me",
            "pid=0",
            "container=3f2a",
            "container=../../../..",
            "pod=x",
            "cgroup=system.slice",
            "user=1",
        ] {
            let error = text.parse::<Session>().expect_err(text);
            assert_eq!(error.code(), Code::Usage, "{text}");
            assert!(error.message().contains("uid=1000"), "{error:?}");
        }
    }

    #[test]
    fn a_container_is_known_by_the_first_digits_of_its_id_and_a_pod_by_all_of_its() {
        let process = Process {
            pid: 7,
            container: Some("3f2a".repeat(16)),
            pod: Some("0f8fad5b-d9cb-469f-a165-70867728950e".into()),
            ..Process::default()
        };
        let is = |text: &str| text.parse::<Session>().expect(text).is(1000, &process);
        assert!(is("uid=1000") && is("pid=7") && is("container=3f2a3f2a3f2a"));
        assert!(is("pod=0f8fad5b-d9cb-469f-a165-70867728950e"));
        assert!(
            !is("uid=0")
                && !is("pid=8")
                && !is("container=2a3f2a3f2a3f")
                && !is("pod=0f8fad5b-d9cb-469f-a165-708677289500")
        );
        // Whoever is inside cannot leave by a name that he gives a group of his own.
        let (outer, inner) = ("a".repeat(64), "b".repeat(64));
        let cgroup = format!("/system.slice/docker-{outer}.scope/{inner}");
        let (container, pod) = processes::container_and_pod(&cgroup);
        let within = Process { pid: 8, container, pod, cgroup: Some(cgroup), ..Process::default() };
        let is = |id: &str| format!("container={id}").parse::<Session>().expect("an id").is(0, &within);
        assert!(is(&outer) && is(&inner) && !is(&"c".repeat(64)));
    }
}
