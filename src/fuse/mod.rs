//! The kernel's requests, answered from the tree and the reader: a skin, and the one place that knows fuser.
//!
//! In: FUSE requests. Out: exactly one reply each; a request that must wait is answered later by the task that has its
//! bytes, so no FUSE thread ever waits for the store.
//! Promises (docs/ARCHITECTURE.md, "Two nodes a file"): a node has one mode for life. The cold node is plain FUSE and never
//! passthrough; the hot node is passthrough only, and `lookup` answers it only while the file is whole and frozen. A held
//! cold open ends in ESTALE at most once a thread and node, then the kernel walks again and finds the hot node. `stat`
//! shows one number for both.
//! Not here: which bytes (`read`), which memory (`cache`), which opens wait (`policy`), who is let in
//! (`guard`), whom the policy lets see and read (`access`), what is told of opens (`told`), mounting and unmounting
//! (`attach`), what a killed daemon left (`dead`).
//! Held by: tests/e2e, tests/mount.rs.

mod access;
pub mod attach;
mod dead;
mod guard;
pub mod inherited;
mod policy;
mod told;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    BackingId, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, Request,
};
use lru::LruCache;

use access::Access;

use crate::cache::{CachedObject, GENERATIONS, HotGate, Model, ObjectKey};
use crate::error::Error;
use crate::policy::Buckets;
use crate::read::habits::{Habits, Walk, Who};
use crate::read::{OpenFile, READ_MAX, Reader};
use crate::vfs::{Attributes, Kind, NodeId, Vfs};

pub use dead::is_dead;
pub use guard::{OpenBy, Session, ShutOut};
use guard::{Opener, Rules};
pub use policy::{AUTO_HOLD, OpenPolicy, WHOLE_HOLD};
pub use told::Place;

/// Set in the number of a hot node. Below it lie the generation of the object's memory and the cold node's number: the
/// kernel ties a node to one backing file as long as anyone has it open, so other memory is another node.
const HOT: u64 = 1 << 62;
const GENERATION_SHIFT: u32 = 40;
const NODE_MASK: u64 = (1 << GENERATION_SHIFT) - 1;

/// Names and sizes never change, and a flip between cold and hot is announced: the kernel may keep what it knows.
const KEEP: Duration = Duration::from_secs(3600);

/// As `statfs` says; the format allows no longer component.
const NAME_BYTES_MAX: usize = crate::format::limits::COMPONENT_BYTES_MAX;

/// Answers of ESTALE remembered at once; more threads than this waiting on cold opens is not a case, only a bound.
const STALE_ANSWERS_MAX: NonZeroUsize = NonZeroUsize::new(16_384).expect("not zero");

/// Reads under way at which the kernel stops asking for more than readers wait for.
const READ_AHEAD_REQUESTS_MAX: u16 = 48;

/// How often an open that waits for an unlock looks whether it is refused anyway.
const LOCKED_OPENS_LOOK: Duration = Duration::from_millis(250);

/// How the kernel is answered.
#[derive(Debug, Clone, Copy, Default)]
pub struct Behaviour {
    pub open: OpenPolicy,
    /// Reads bypass the page cache, so that no second, unlocked copy of cold plaintext exists (docs/SEMANTICS.md).
    pub no_page_cache: bool,
    /// Every read is the daemon's to answer, and a name is one node for life: for an overlay above the mount, which keeps
    /// the node that it has once looked up, and for those who want every read asked for.
    pub no_passthrough: bool,
    /// How long an open of a locked model waits for it to be unlocked; `None`: not at all.
    pub locked_opens: Option<Duration>,
}

struct Handle {
    node: NodeId,
    opener: Opener,
    way: Way,
}

enum Way {
    /// `who`: only of files that the policy watches.
    Cold {
        file: Arc<OpenFile>,
        who: Option<Who>,
        walk: Mutex<Walk>,
    },
    Hot {
        object: Arc<CachedObject>,
        generation: u64,
    },
}

/// The filesystem as fuser calls it, and as the rest of the daemon holds it. Cheap to clone.
#[derive(Clone)]
pub struct ModelFs {
    inner: Arc<Inner>,
}

struct Inner {
    vfs: Vfs,
    reader: Reader,
    behaviour: Behaviour,
    runtime: tokio::runtime::Handle,
    handles: Mutex<HashMap<u64, Arc<Handle>>>,
    next_handle: AtomicU64,
    notifier: OnceLock<Notifier>,
    /// One backing registration for the memory of a hot object (its generation); all passthrough opens of a node must
    /// share it.
    backings: Mutex<HashMap<(ObjectKey, u64), Arc<BackingId>>>,
    /// The kernel offered passthrough and the arena's memory was accepted as backing.
    passthrough: AtomicBool,
    stale_answers: Mutex<LruCache<(u32, NodeId), ()>>,
    habits: Mutex<Habits>,
    started: Instant,
    /// When the mount was last used, counted from `started`.
    used_ms: AtomicU64,
    /// Cold nodes of which the page cache may hold something: those that were ever opened.
    paged: Mutex<HashSet<NodeId>>,
    rules: RwLock<Rules>,
    /// So that a mount without rules does not look at them.
    has_rules: AtomicBool,
    /// Everybody is shut out.
    closed: AtomicBool,
    place: OnceLock<Place>,
    access: Access,
}

impl ModelFs {
    pub fn new(vfs: Vfs, reader: Reader, behaviour: Behaviour, runtime: tokio::runtime::Handle) -> Self {
        ModelFs {
            inner: Arc::new(Inner {
                vfs,
                reader,
                behaviour,
                runtime,
                handles: Mutex::new(HashMap::new()),
                next_handle: AtomicU64::new(1),
                notifier: OnceLock::new(),
                backings: Mutex::new(HashMap::new()),
                passthrough: AtomicBool::new(false),
                stale_answers: Mutex::new(LruCache::new(STALE_ANSWERS_MAX)),
                habits: Mutex::default(),
                started: Instant::now(),
                used_ms: AtomicU64::new(0),
                paged: Mutex::default(),
                rules: RwLock::default(),
                has_rules: AtomicBool::new(false),
                closed: AtomicBool::new(false),
                place: OnceLock::new(),
                access: Access::default(),
            }),
        }
    }

    pub fn vfs(&self) -> &Vfs {
        &self.inner.vfs
    }

    pub fn reader(&self) -> &Reader {
        &self.inner.reader
    }

    /// Whether whole files are served without the daemon.
    pub fn passthrough(&self) -> bool {
        self.inner.passthrough.load(Ordering::Relaxed)
    }

    /// Told by `attach` once it has tried to register the arena's memory with this kernel connection.
    pub fn set_passthrough(&self, works: bool) {
        self.inner.passthrough.store(works, Ordering::Relaxed);
    }

    pub fn set_notifier(&self, notifier: Notifier) {
        assert!(self.inner.notifier.set(notifier).is_ok(), "one session a filesystem");
    }

    /// Handles the kernel holds now.
    pub fn open_handles(&self) -> usize {
        self.inner.handles.lock().expect("a thread died holding the handles").len()
    }

    /// Lets the kernel forget every backing; after an unmount also the opens whose release never came.
    pub fn drop_backings(&self, unmounted: bool) {
        self.inner.backings.lock().expect("a thread died holding the backings").clear();
        if unmounted {
            let mut handles = self.inner.handles.lock().expect("a thread died holding the handles");
            for (_, handle) in handles.drain() {
                // Other mounts may show the same object: what this one held of it must not count any more.
                if let Way::Hot { object, generation } = &handle.way {
                    object.hot_release(*generation);
                }
            }
        }
    }

    /// Has the kernel drop a name and every unused name below it; what programs hold goes on. From a thread that holds
    /// nothing, never from one that answers the kernel.
    pub fn drop_name(&self, folder: NodeId, name: &[u8]) {
        let Some(notifier) = self.inner.notifier.get() else { return };
        // Not known to the kernel, or the kernel is gone: then there is nothing to drop.
        if let Err(error) = notifier.inval_entry(INodeNo(folder.0), OsStr::from_bytes(name)) {
            tracing::debug!("invalidating {}: {error}", String::from_utf8_lossy(name));
        }
    }

    /// The connection between cache and kernel.
    pub fn gate(&self) -> Arc<dyn HotGate> {
        self.inner.clone()
    }
}

impl Inner {
    fn attr_of(&self, attributes: &Attributes, number: u64) -> FileAttr {
        let time = if attributes.mtime >= 0 {
            UNIX_EPOCH.checked_add(Duration::from_secs(attributes.mtime.unsigned_abs()))
        } else {
            UNIX_EPOCH.checked_sub(Duration::from_secs(attributes.mtime.unsigned_abs()))
        };
        // A date that the clock type cannot hold is shown as 1970 rather than refused: it harms nobody.
        let time: SystemTime = time.unwrap_or(UNIX_EPOCH);
        let ownership = self.vfs.ownership();
        FileAttr {
            ino: INodeNo(number),
            size: attributes.size,
            blocks: attributes.size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: match attributes.kind {
                Kind::Directory => FileType::Directory,
                Kind::File => FileType::RegularFile,
                Kind::Link => FileType::Symlink,
            },
            perm: attributes.mode,
            nlink: attributes.links,
            uid: ownership.uid,
            gid: ownership.gid,
            rdev: 0,
            // What the cold path answers best; programs that size their reads by it do well.
            blksize: READ_MAX as u32,
            flags: 0,
        }
    }

    /// What `stat` shows; under a policy nothing that tells of what an asker may not see.
    fn attributes(&self, node: NodeId, of_some: bool) -> Option<Attributes> {
        if of_some { self.vfs.attributes_of_some(node) } else { self.vfs.attributes(node) }
    }

    /// The object behind a file whose memory readers may get, when this mount can do that at all.
    fn hot_object(&self, node: NodeId) -> Option<Arc<CachedObject>> {
        if !self.passthrough.load(Ordering::Relaxed) {
            return None;
        }
        self.vfs.sole_object(node)
    }

    /// True the first time a thread is told ESTALE for a node since it last looked the node up. An open through a magic
    /// link never looks up again: the second time it is served plain.
    fn may_answer_stale(&self, thread: u32, node: NodeId) -> bool {
        let mut answers = self.stale_answers.lock().expect("a thread died holding the stale answers");
        answers.put((thread, node), ()).is_none()
    }

    fn forget_stale(&self, thread: u32, node: NodeId) {
        self.stale_answers.lock().expect("a thread died holding the stale answers").pop(&(thread, node));
    }

    fn add_handle(&self, handle: Handle) -> FileHandle {
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.lock().expect("a thread died holding the handles").insert(number, Arc::new(handle));
        FileHandle(number)
    }

    fn handle(&self, number: FileHandle) -> Option<Arc<Handle>> {
        self.handles.lock().expect("a thread died holding the handles").get(&number.0).cloned()
    }

    fn stale(&self, reply: ReplyOpen) {
        self.reader.cache().telemetry().estale_answers.inc();
        reply.error(Errno::ESTALE);
    }

    /// The model of a file that is locked, where opens of it are to wait, and how long.
    fn waits_for_unlock(&self, ino: INodeNo) -> Option<(Arc<Model>, Duration)> {
        let time = self.behaviour.locked_opens?;
        let (model, ..) = self.vfs.file(node_of(ino))?;
        model.is_locked().then(|| (model.clone(), time))
    }

    /// Until it is served again, whoever asks is refused anyway, or the time is up. What is said to the open is then decided as
    /// without a wait. No thread waits with it, and the mount's end is seen too.
    async fn wait_for_unlock(&self, model: &Model, time: Duration, opener: &Opener) {
        let served = model.until_served();
        tokio::pin!(served);
        let until = tokio::time::Instant::now() + time;
        while tokio::time::Instant::now() < until && !self.refuses(opener.thread, opener.uid) {
            tokio::select! {
                biased;
                () = &mut served => return,
                () = tokio::time::sleep(LOCKED_OPENS_LOOK.min(until - tokio::time::Instant::now())) => {}
            }
        }
    }

    /// Answers an open that nothing stands against any more but a lock.
    fn open_now(self: &Arc<Self>, ino: INodeNo, mut opener: Opener, reply: ReplyOpen) {
        let (node, thread) = (node_of(ino), opener.thread);
        if let Some(generation) = generation_of(ino) {
            return self.open_hot(node, generation, opener, reply);
        }
        let Some(file) = self.vfs.open(node) else { return reply.error(Errno::EISDIR) };
        if file.model.is_locked() {
            // Before it is held or sent round: the answer is no.
            return self.opened_plain(node, file, None, opener, reply);
        }
        let object = self.hot_object(node);
        let who = self.who(thread, node, object.is_some());
        let Some(object) = object else { return self.opened_plain(node, file, who, opener, reply) };
        let whole = object.is_whole();
        let hold = if whole { None } else { self.hold(node, &object, who) };
        if (!whole && hold.is_none()) || !self.may_answer_stale(thread, node) {
            return self.opened_plain(node, file, who, opener, reply);
        }
        let Some(hold) = hold else {
            self.vfs.release(node);
            return self.stale(reply);
        };
        self.reader.cache().telemetry().opens_held.inc();
        self.note_whole(node);
        let inner = self.clone();
        inner.runtime.clone().spawn(async move {
            let whole = tokio::select! {
                biased;
                () = file.model.until_locked() => false,
                whole = inner.wait_whole(&object, hold) => whole,
            };
            if whole {
                inner.vfs.release(node);
                inner.stale(reply);
            } else {
                inner.reader.cache().telemetry().opens_held_in_vain.inc();
                if let Err(refused) = inner.let_open(&mut opener, node) {
                    inner.vfs.release(node);
                    return reply.error(refused);
                }
                inner.opened_plain(node, file, who, opener, reply);
            }
        });
    }

    /// Answers a read that nothing stands against any more but a lock.
    fn read_now(self: &Arc<Self>, handle: &Handle, offset: u64, size: u32, reply: ReplyData) {
        let Way::Cold { file, who, walk } = &handle.way else {
            // The kernel reads hot files by itself; it asks us only if something is badly wrong.
            return reply.error(Errno::EIO);
        };
        let admission = match file.model.admit() {
            Ok(admission) => admission,
            Err(error) => return reply.error(errno(&error)),
        };
        let telemetry = self.reader.cache().telemetry();
        telemetry.reads.inc();
        let size = size as usize;
        if let Some(buckets) = handle.opener.buckets() {
            buckets.given((size as u64).min(file.size.saturating_sub(offset)));
        }
        if let Some(who) = *who {
            self.observe(handle.node, file, who, walk, offset, size);
        }
        if let Some(answer) = self.reader.try_read(file, offset, size) {
            telemetry.read_bytes.add(answer.bytes().len() as u64);
            reply.data(answer.bytes());
            return;
        }
        drop(admission);
        let (inner, file) = (self.clone(), file.clone());
        inner.runtime.clone().spawn(async move {
            let telemetry = inner.reader.cache().telemetry();
            let outcome = tokio::select! {
                biased;
                () = file.model.until_locked() => Err(file.model.locked_error()),
                outcome = inner.reader.read(&file, offset, size) => outcome,
            };
            match outcome.and_then(|answer| Ok((file.model.admit()?, answer))) {
                Ok((_admission, answer)) => {
                    telemetry.read_bytes.add(answer.bytes().len() as u64);
                    reply.data(answer.bytes());
                }
                Err(error) => {
                    telemetry.read_errors.inc();
                    tracing::debug!("read refused: {}", error.chain());
                    reply.error(errno(&error));
                }
            }
        });
    }

    fn open_hot(&self, node: NodeId, generation: u64, opener: Opener, reply: ReplyOpen) {
        let Some(object) = self.hot_object(node) else { return self.stale(reply) };
        let model = object.model.clone();
        // Until the kernel has its answer: a lock that comes meanwhile takes the object away afterwards.
        let _admission = match model.admit() {
            Ok(admission) => admission,
            Err(error) => {
                self.tell_not_opened(node, &opener, &error);
                return reply.error(errno(&error));
            }
        };
        // Counted before the kernel hears of it: from here on the object cannot be evicted.
        let Some(file) = object.hot_open(generation) else { return self.stale(reply) };
        let backing = {
            let mut backings = self.backings.lock().expect("a thread died holding the backings");
            match backings.get(&(object.key, generation)) {
                Some(backing) => Ok(backing.clone()),
                None => reply.open_backing(file.backing()).map(|id| {
                    let id = Arc::new(id);
                    backings.insert((object.key, generation), id.clone());
                    id
                }),
            }
        };
        match backing {
            Ok(backing) => {
                if let Err(error) = self.tell_opened(node, &opener) {
                    object.hot_release(generation);
                    return reply.error(errno(&error));
                }
                let telemetry = self.reader.cache().telemetry();
                telemetry.opens_passthrough.inc();
                self.note_whole(node);
                self.vfs.begin_use(node);
                if let Some(buckets) = opener.buckets() {
                    buckets.opened();
                    // What the kernel serves is not seen again: the whole file counts now.
                    buckets.given(object.layout().plain_len());
                }
                let handle = self.add_handle(Handle { node, opener, way: Way::Hot { object, generation } });
                reply.opened_passthrough(handle, FopenFlags::FOPEN_NOFLUSH, &backing);
            }
            Err(error) => {
                object.hot_release(generation);
                self.reader.cache().telemetry().passthrough_refused.inc();
                tracing::warn!("the kernel refused passthrough, serving through the daemon from now on: {error}");
                self.passthrough.store(false, Ordering::Relaxed);
                self.stale(reply);
            }
        }
    }

    fn opened_plain(&self, node: NodeId, file: Arc<OpenFile>, who: Option<Who>, opener: Opener, reply: ReplyOpen) {
        let model = file.model.clone();
        let _admission = match model.admit() {
            Ok(admission) => admission,
            Err(error) => {
                self.tell_not_opened(node, &opener, &error);
                self.vfs.release(node);
                return reply.error(errno(&error));
            }
        };
        if let Err(error) = self.tell_opened(node, &opener) {
            self.vfs.release(node);
            return reply.error(errno(&error));
        }
        if let Some(buckets) = opener.buckets() {
            buckets.opened();
        }
        self.paged.lock().expect("a thread died holding the nodes with pages").insert(node);
        self.reader.cache().telemetry().opens_plain.inc();
        let mut flags = FopenFlags::FOPEN_NOFLUSH;
        if self.behaviour.no_page_cache {
            flags |= FopenFlags::FOPEN_DIRECT_IO;
        } else if !self.passthrough.load(Ordering::Relaxed) {
            // Content never changes, so what the page cache has stays right. With passthrough the page cache is only a
            // second copy on the way to the hot node: let it go.
            flags |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        let handle = self.add_handle(Handle { node, opener, way: Way::Cold { file, who, walk: Mutex::default() } });
        reply.opened(handle, flags);
    }
}

impl HotGate for Inner {
    fn published(&self, key: ObjectKey) {
        if !self.passthrough.load(Ordering::Relaxed) {
            return;
        }
        if let (Some((_, parent, name)), Some(notifier)) = (self.vfs.name_of_object(key), self.notifier.get()) {
            // The next walk asks again and is answered the hot node. An error means that the kernel is gone.
            if let Err(error) = notifier.inval_entry(INodeNo(parent.0), OsStr::from_bytes(&name)) {
                tracing::debug!("invalidating a name: {error}");
            }
        }
    }

    fn retire(&self, key: ObjectKey) {
        self.published(key);
        self.backings.lock().expect("a thread died holding the backings").retain(|(of, _), _| *of != key);
    }

    fn drop_pages(&self, model: u32) {
        self.drop_pages(|node| self.vfs.file(node).is_some_and(|(of, _, _)| of.serial == model));
    }
}

fn hot_number(node: NodeId, generation: u64) -> u64 {
    HOT | generation << GENERATION_SHIFT | node.0
}

/// The node whose number `stat` shows.
fn node_of(ino: INodeNo) -> NodeId {
    NodeId(ino.0 & NODE_MASK)
}

/// Of a hot node: which memory of its object.
fn generation_of(ino: INodeNo) -> Option<u64> {
    (ino.0 & HOT != 0).then_some(ino.0 >> GENERATION_SHIFT & (GENERATIONS - 1))
}

fn errno(error: &Error) -> Errno {
    Errno::from_i32(error.errno())
}

impl Filesystem for ModelFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
            | InitFlags::FUSE_CACHE_SYMLINKS;
        for flag in wanted.iter() {
            // Each is a speed or a mapping mode of its own; a kernel without one of them serves all the same.
            if config.add_capabilities(flag).is_err() {
                tracing::debug!("the kernel does not offer {flag:?}");
            }
        }
        let capable = !self.inner.behaviour.no_passthrough
            && self.inner.reader.cache().arena().passthrough_capable()
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok();
        self.set_passthrough(capable);
        // Requests of at most READ_MAX, so that one gather buffer holds any answer.
        config.set_max_write(READ_MAX as u32).expect("1 MiB is within fuser's limit");
        // Reads through the page cache are "background" to the kernel: at its limit it would let reads of warm files wait
        // behind those of a store that is silent. So there is no limit but what readers ask for themselves; only what it
        // would read ahead of them stops at a number.
        config.set_max_background(attach::BACKGROUND_REQUESTS).expect("not zero");
        config.set_congestion_threshold(READ_AHEAD_REQUESTS_MAX).expect("not zero");
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let inner = &self.inner;
        // The kernel leaves this limit to us.
        if name.len() > NAME_BYTES_MAX {
            return reply.error(Errno::ENAMETOOLONG);
        }
        let access = inner.access();
        if let Some(active) = &access {
            // Judged before it is entered: what an asker may not see the kernel is never told of.
            if let Err((refused, events)) =
                inner.look_up(active, &Opener::of(request), NodeId(parent.0), name.as_bytes())
            {
                reply.error(refused);
                return events.into_iter().for_each(|event| inner.tell(event));
            }
        }
        let Some(node) = inner.vfs.enter(NodeId(parent.0), name.as_bytes()) else {
            return reply.error(Errno::ENOENT);
        };
        let attributes = inner.attributes(node, access.is_some()).expect("lookup names nodes that exist");
        inner.forget_stale(request.pid(), node);
        let hot = inner.hot_object(node).and_then(|object| object.promise_hot());
        if access.is_some() {
            // The next asker may be another: he is asked about, name by name.
            let number = hot.map_or(node.0, |generation| hot_number(node, generation));
            let attr = inner.attr_of(&attributes, number);
            reply.entry_with_ttls(&Duration::ZERO, &Duration::ZERO, &attr, Generation(0));
        } else if let Some(generation) = hot {
            // fuser takes the entry's number for the node's; the stable one is told by getattr, so nothing is kept.
            let attr = inner.attr_of(&attributes, hot_number(node, generation));
            reply.entry_with_ttls(&Duration::ZERO, &KEEP, &attr, Generation(0));
        } else if attributes.kind == Kind::Link {
            // Which version is current is asked at every walk: none that begins after a switch misses it.
            reply.entry_with_ttls(&KEEP, &Duration::ZERO, &inner.attr_of(&attributes, node.0), Generation(0));
        } else if inner.vfs.changes(node) {
            reply.entry_with_ttls(&Duration::ZERO, &KEEP, &inner.attr_of(&attributes, node.0), Generation(0));
        } else {
            reply.entry(&KEEP, &inner.attr_of(&attributes, node.0), Generation(0));
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, times: u64) {
        self.inner.vfs.forget(NodeId(ino.0 & !HOT), times);
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        if let Some(active) = self.inner.access()
            && let Err(refused) = self.inner.look(&active, &Opener::of(request), NodeId(ino.0))
        {
            return reply.error(refused);
        }
        match self.inner.vfs.link_target(NodeId(ino.0)) {
            Some(target) => reply.data(target.as_bytes()),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let node = node_of(ino);
        let access = self.inner.access();
        if let Some(active) = &access
            && let Err(refused) = self.inner.look(active, &Opener::of(request), node)
        {
            return reply.error(refused);
        }
        match self.inner.attributes(node, access.is_some()) {
            Some(attributes) => {
                let fixed = access.is_none() && ino.0 & HOT == 0 && !self.inner.vfs.changes(node);
                let keep = if fixed { KEEP } else { Duration::ZERO };
                reply.attr(&keep, &self.inner.attr_of(&attributes, node.0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let inner = &self.inner;
        inner.note_use();
        let mut opener = Opener::of(request);
        let node = node_of(ino);
        if let Err(refused) = inner.let_open(&mut opener, node) {
            return reply.error(refused);
        }
        let is_hot = generation_of(ino).is_some();
        let turn_comes = opener.buckets().is_none_or(|buckets| buckets.may_open(is_hot).is_ok());
        let locked = inner.waits_for_unlock(ino);
        if turn_comes && locked.is_none() && !inner.must_look_inside(node) {
            return inner.open_now(ino, opener, reply);
        }
        let inner = inner.clone();
        inner.runtime.clone().spawn(async move {
            if let Some((model, time)) = locked {
                inner.wait_for_unlock(&model, time, &opener).await;
            }
            if let Some(buckets) = opener.buckets()
                && let Err(error) =
                    inner.turn(&opener, node, &buckets, buckets.wait(), |buckets| buckets.may_open(is_hot)).await
            {
                return reply.error(errno(&error));
            }
            if inner.must_look_inside(node)
                && let Err(error) = inner.look_inside(node).await
            {
                inner.tell_not_opened(node, &opener, &error);
                return reply.error(errno(&error));
            }
            // The policy may be another by now, and the operator may have spoken.
            if let Err(refused) = inner.let_open(&mut opener, node) {
                return reply.error(refused);
            }
            inner.open_now(ino, opener, reply);
        });
    }

    fn read(
        &self,
        request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let inner = &self.inner;
        let Some(handle) = inner.handle(handle) else { return reply.error(Errno::EBADF) };
        inner.note_use();
        let reader = Opener::of(request);
        if !inner.lets_read(&handle, &reader) {
            return reply.error(Errno::EACCES);
        }
        if let Some(buckets) = handle.opener.buckets()
            && inner.access().is_some()
            && buckets.may_read().is_err()
        {
            let inner = inner.clone();
            inner.runtime.clone().spawn(async move {
                let most = Inner::read_wait();
                match inner.turn(&handle.opener, handle.node, &buckets, most, Buckets::may_read).await {
                    // Asked again: what was let when it came may not be let any more.
                    Ok(()) if inner.lets_read(&handle, &reader) => inner.read_now(&handle, offset, size, reply),
                    Ok(()) => reply.error(Errno::EACCES),
                    Err(error) => reply.error(errno(&error)),
                }
            });
            return;
        }
        inner.read_now(&handle, offset, size, reply);
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let inner = &self.inner;
        let handle = inner.handles.lock().expect("a thread died holding the handles").remove(&handle.0);
        reply.ok();
        inner.note_use();
        let Some(handle) = handle else { return };
        match &handle.way {
            Way::Hot { object, generation } => {
                object.hot_release(*generation);
                inner.vfs.end_use(handle.node);
            }
            Way::Cold { .. } => {
                let node = handle.node;
                let last = inner.vfs.release(node);
                let whole = inner.hot_object(node).is_some_and(|object| object.is_whole());
                if last
                    && whole
                    && let Some(notifier) = inner.notifier.get()
                {
                    // Nobody reads the cold node any more: its page cache is a second copy that nobody needs. From a
                    // thread that holds nothing, since dropping pages waits for reads under way.
                    let notifier = notifier.clone();
                    inner.runtime.spawn_blocking(move || notifier.inval_inode(INodeNo(node.0), 0, 0));
                }
            }
        }
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if !self.inner.vfs.is_directory(NodeId(ino.0)) {
            return reply.error(Errno::ENOTDIR);
        }
        let access = self.inner.access();
        if let Some(active) = &access
            && let Err(refused) = self.inner.look(active, &Opener::of(request), NodeId(ino.0))
        {
            return reply.error(refused);
        }
        self.inner.vfs.begin_use(NodeId(ino.0));
        // But for the folder of a model's versions, listings never change.
        let fixed = FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE;
        let listed_anew = access.is_some() || self.inner.vfs.changes(NodeId(ino.0));
        let flags = if listed_anew { FopenFlags::empty() } else { fixed };
        reply.opened(FileHandle(0), flags);
    }

    fn releasedir(&self, _request: &Request, ino: INodeNo, _handle: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.inner.vfs.end_use(NodeId(ino.0));
        reply.ok();
    }

    fn readdir(&self, request: &Request, ino: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        // By who reads it: the descriptor may have been handed on.
        let mut sees = None;
        if let Some(active) = self.inner.access() {
            match self.inner.look(&active, &Opener::of(request), NodeId(ino.0)) {
                Ok(asker) => sees = Some((active, asker)),
                Err(refused) => return reply.error(refused),
            }
        }
        // Offsets count what this asker sees: gaps would tell how much he does not. So they are counted from the start.
        let mut place = if sees.is_none() { offset } else { 0 };
        let mut position = place;
        while let Some((node, kind, name)) = self.inner.vfs.entry(NodeId(ino.0), place) {
            let kind = match kind {
                Kind::Directory => FileType::Directory,
                Kind::File => FileType::RegularFile,
                Kind::Link => FileType::Symlink,
            };
            place += 1;
            // `.` and `..` are always there.
            if place > 2
                && let Some((active, asker)) = &sees
                && !self.inner.lists(active, asker, node)
            {
                continue;
            }
            position += 1;
            // Each step leads on, whatever became of the policy or the folder since the last one: a listing ends.
            if position > offset && reply.add(INodeNo(node.0), position, kind, OsStr::from_bytes(&name)) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let (nodes, bytes) = match self.inner.access() {
            Some(active) => self.inner.totals_seen(&active, &Opener::of(request)),
            None => self.inner.vfs.totals(),
        };
        reply.statfs(bytes.div_ceil(4096), 0, 0, nodes, 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: fuser::ReplyXattr) {
        reply.error(Errno::NO_XATTR);
    }

    fn listxattr(&self, _request: &Request, _ino: INodeNo, size: u32, reply: fuser::ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }
}
