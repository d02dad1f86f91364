//! The kernel's requests, answered from the tree and the reader: a skin, and the one place that knows fuser.
//!
//! In: FUSE requests. Out: exactly one reply each; a request that must wait is answered later by the task that has its
//! bytes, so no FUSE thread ever waits for the store.
//! Promises (docs/ARCHITECTURE.md, "Two nodes a file"): a node has one mode for life. The cold node is plain FUSE and never
//! passthrough; the hot node is passthrough only, and `lookup` answers it only while the file is whole and frozen. A held
//! cold open ends in ESTALE at most once a thread and node, then the kernel walks again and finds the hot node. `stat`
//! shows one number for both.
//! Not here: which bytes (`read`), which memory (`cache`), mounting and unmounting (`attach`).
//! Held by: tests/e2e, tests/mount.rs.

pub mod attach;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    BackingId, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, Request,
};
use lru::LruCache;

use crate::cache::{CachedObject, HotGate, ObjectKey};
use crate::error::{Code, Error, Result};
use crate::read::habits::{Habits, Reason, Step, Walk, Who, is_configuration};
use crate::read::{OpenFile, READ_MAX, Reader};
use crate::vfs::{Attributes, Kind, NodeId, Vfs};

/// Set in the number of a hot node; the rest is the cold node's number.
const HOT: u64 = 1 << 62;

/// Names and sizes never change, and a flip between cold and hot is announced: the kernel may keep what it knows.
const KEEP: Duration = Duration::from_secs(3600);

/// As `statfs` says; the format allows no longer component.
const NAME_BYTES_MAX: usize = crate::format::limits::COMPONENT_BYTES_MAX;

/// Answers of ESTALE remembered at once; more threads than this waiting on cold opens is not a case, only a bound.
const STALE_ANSWERS_MAX: NonZeroUsize = NonZeroUsize::new(16_384).expect("not zero");

/// Reads under way at which the kernel stops asking for more than readers wait for.
const READ_AHEAD_REQUESTS_MAX: u16 = 48;

/// Which opens wait until the whole file is in locked memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OpenPolicy {
    /// None: the first byte comes as soon as its chunk does.
    Lazy,
    /// Those of programs that are seen to load the model, while the file is expected within [`AUTO_HOLD`]; never a first
    /// look at a file (docs/SEMANTICS.md, "Waiting").
    #[default]
    Auto,
    /// Every file that fits into the cache.
    Whole,
}

impl OpenPolicy {
    pub const fn name(self) -> &'static str {
        match self {
            OpenPolicy::Lazy => "lazy",
            OpenPolicy::Auto => "auto",
            OpenPolicy::Whole => "whole",
        }
    }
}

impl std::str::FromStr for OpenPolicy {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        [OpenPolicy::Lazy, OpenPolicy::Auto, OpenPolicy::Whole]
            .into_iter()
            .find(|policy| policy.name() == text)
            .ok_or_else(|| Error::new(Code::Usage, format!("open policy `{text}` is none of lazy, auto, whole")))
    }
}

/// The longest that `auto` lets an open wait. Only for files that are wanted whole: their fill is as long as their reading
/// would be. A client that waits cannot be killed, and few programs say what they wait for: hence half a minute.
pub const AUTO_HOLD: Duration = Duration::from_secs(30);

/// How often a held open looks how far its file has come.
const HOLD_LOOK: Duration = Duration::from_millis(250);

/// From when on the rate of a fill says how long the rest will take.
const RATE_KNOWN_AFTER: Duration = Duration::from_secs(2);

/// The longest that `whole` lets an open wait. A client that waits in open cannot be killed, so there is an end.
pub const WHOLE_HOLD: Duration = Duration::from_secs(600);

/// How the kernel is answered.
#[derive(Debug, Clone, Copy)]
pub struct Behaviour {
    pub open: OpenPolicy,
    /// Reads bypass the page cache, so that no second, unlocked copy of cold plaintext exists (docs/SEMANTICS.md).
    pub no_page_cache: bool,
}

enum Handle {
    /// `who`: only of files that the policy watches.
    Cold {
        node: NodeId,
        file: Arc<OpenFile>,
        who: Option<Who>,
        walk: Mutex<Walk>,
    },
    Hot {
        object: Arc<CachedObject>,
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
    /// One backing registration a hot object; all passthrough opens of a node must share it.
    backings: Mutex<HashMap<ObjectKey, Arc<BackingId>>>,
    /// The kernel offered passthrough and the arena's memory was accepted as backing.
    passthrough: AtomicBool,
    stale_answers: Mutex<LruCache<(u32, NodeId), ()>>,
    habits: Mutex<Habits>,
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
            self.inner.handles.lock().expect("a thread died holding the handles").clear();
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

    fn open_hot(&self, node: NodeId, reply: ReplyOpen) {
        let Some(object) = self.hot_object(node) else { return self.stale(reply) };
        // Counted before the kernel hears of it: from here on the object cannot be evicted.
        let Some(file) = object.hot_open() else { return self.stale(reply) };
        let backing = {
            let mut backings = self.backings.lock().expect("a thread died holding the backings");
            match backings.get(&object.key) {
                Some(backing) => Ok(backing.clone()),
                None => reply.open_backing(file.backing()).map(|id| {
                    let id = Arc::new(id);
                    backings.insert(object.key, id.clone());
                    id
                }),
            }
        };
        match backing {
            Ok(backing) => {
                let telemetry = self.reader.cache().telemetry();
                telemetry.opens_passthrough.inc();
                self.note_whole(node);
                let handle = self.add_handle(Handle::Hot { object });
                reply.opened_passthrough(handle, FopenFlags::FOPEN_NOFLUSH, &backing);
            }
            Err(error) => {
                object.hot_release();
                self.reader.cache().telemetry().passthrough_refused.inc();
                tracing::warn!("the kernel refused passthrough, serving through the daemon from now on: {error}");
                self.passthrough.store(false, Ordering::Relaxed);
                self.stale(reply);
            }
        }
    }

    fn opened_plain(&self, node: NodeId, file: Arc<OpenFile>, who: Option<Who>, reply: ReplyOpen) {
        self.reader.cache().telemetry().opens_plain.inc();
        let mut flags = FopenFlags::FOPEN_NOFLUSH;
        if self.behaviour.no_page_cache {
            flags |= FopenFlags::FOPEN_DIRECT_IO;
        } else if !self.passthrough.load(Ordering::Relaxed) {
            // Content never changes, so what the page cache has stays right. With passthrough the page cache is only a
            // second copy on the way to the hot node: let it go.
            flags |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        let handle = self.add_handle(Handle::Cold { node, file, who, walk: Mutex::default() });
        reply.opened(handle, flags);
    }

    /// How long an open of this cold object may wait for the whole of it, by policy; `None`: not at all.
    fn hold(&self, node: NodeId, object: &Arc<CachedObject>, who: Option<Who>) -> Option<Duration> {
        let cache = self.reader.cache();
        match self.behaviour.open {
            OpenPolicy::Lazy => None,
            OpenPolicy::Whole => cache.fits_whole(object).then_some(WHOLE_HOLD),
            OpenPolicy::Auto => {
                let who = who?;
                let reason = self.reason(node, who)?;
                if !cache.has_room_to_keep(object) {
                    return None;
                }
                tracing::debug!(node = node.0, process = who.process, "expected to be read whole: {reason:?}");
                Some(AUTO_HOLD)
            }
        }
    }

    fn habits(&self) -> MutexGuard<'_, Habits> {
        self.habits.lock().expect("a thread died holding the habits")
    }

    /// Why this open's file will be read from end to end, as far as its process has shown.
    fn reason(&self, node: NodeId, who: Who) -> Option<Reason> {
        let (model, file, folder) = self.vfs.file(node)?;
        if self.reader.is_expected_whole(model.serial, file) {
            return Some(Reason::Profile);
        }
        self.habits().reason(who, folder.0, node.0)
    }

    /// Who opens, if the policy watches files such as this; somebody that the mount cannot see is nobody in particular.
    fn who(&self, thread: u32, node: NodeId, is_large: bool) -> Option<Who> {
        if self.behaviour.open != OpenPolicy::Auto {
            return None;
        }
        let configuration = self.vfs.file_name(node).is_some_and(is_configuration);
        if !is_large && !configuration {
            return None;
        }
        let who = process_of(thread);
        if configuration && let Some((_, _, folder)) = self.vfs.file(node) {
            self.habits().on_configuration(who, folder.0);
        }
        is_large.then_some(who)
    }

    /// Takes a read through the daemon as evidence.
    fn observe(&self, node: NodeId, file: &OpenFile, who: Who, walk: &Mutex<Walk>, offset: u64, len: usize) {
        let end = offset.saturating_add(len as u64).min(file.size);
        let step =
            walk.lock().expect("a thread died holding a walk").on_read(offset, end, file.size, file.data_start());
        match step {
            Step::On => {}
            Step::First => self.habits().on_read(who, node.0),
            Step::Whole => {
                if let Some((_, _, folder)) = self.vfs.file(node) {
                    self.habits().on_walk(who, folder.0);
                }
                self.fill_rest(node);
            }
        }
    }

    /// Fetches the rest of a file that is being read through the daemon, so that the pipe stays full and later opens need
    /// it no more.
    fn fill_rest(&self, node: NodeId) {
        let cache = self.reader.cache();
        let Some(object) = self.hot_object(node).filter(|object| !object.is_whole()) else { return };
        if !cache.has_room_to_keep(&object) {
            return;
        }
        cache.telemetry().fills_foreseen.inc();
        let cache = cache.clone();
        self.runtime.spawn(async move {
            // Reported where a chunk was refused; whoever reads it hears of it as well.
            if let Err(error) = cache.fill_whole(&object).await {
                tracing::debug!("a file was not made whole: {}", error.chain());
            }
        });
    }

    fn note_whole(&self, node: NodeId) {
        if let Some((model, file, _)) = self.vfs.file(node) {
            self.reader.note_whole(model, file);
        }
    }

    /// Waits until the object is whole, for `hold` at most, and with `auto` no longer than it looks as if that were enough.
    /// The fill goes on either way.
    async fn wait_whole(&self, object: &Arc<CachedObject>, hold: Duration) -> bool {
        let cache = self.reader.cache();
        let had = object.resident_bytes();
        let started = Instant::now();
        let mut fill = std::pin::pin!(cache.fill_whole(object));
        loop {
            let left = hold.saturating_sub(started.elapsed());
            if let Ok(filled) = tokio::time::timeout(left.min(HOLD_LOOK), &mut fill).await {
                return filled.is_ok();
            }
            let bytes = object.resident_bytes();
            let missing = object.layout().plain_len() - bytes;
            // The first chunks of a far store share its link, and all come late: as many as are on their way count as here.
            let on_their_way = cache.prefetches_max() as u64 * object.layout().chunk_len();
            let brought = bytes.saturating_sub(had) + on_their_way;
            let hopeless =
                self.behaviour.open == OpenPolicy::Auto && is_hopeless(brought, missing, started.elapsed(), hold);
            if hopeless || started.elapsed() >= hold {
                return false;
            }
        }
    }
}

/// Whether `missing` bytes will not come within `hold`, when `brought` bytes came in `elapsed` of it.
fn is_hopeless(brought: u64, missing: u64, elapsed: Duration, hold: Duration) -> bool {
    let needed = elapsed.as_secs_f64() * missing as f64 / brought.max(1) as f64;
    elapsed >= RATE_KNOWN_AFTER && elapsed.as_secs_f64() + needed > hold.as_secs_f64()
}

/// The process that a thread belongs to, and its parent; nobody if the thread is of another pid namespace, or gone.
fn process_of(thread: u32) -> Who {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0);
    Who { process: field("Tgid:"), parent: field("PPid:") }
}

impl HotGate for Inner {
    fn published(&self, key: ObjectKey) {
        if !self.passthrough.load(Ordering::Relaxed) {
            return;
        }
        if let (Some((_, parent, name)), Some(notifier)) = (self.vfs.name_of_object(key), self.notifier.get()) {
            // The next walk asks again and is answered the hot node. An error means that the kernel is gone.
            if let Err(error) = notifier.inval_entry(INodeNo(parent.0), OsStr::from_bytes(name)) {
                tracing::debug!("invalidating a name: {error}");
            }
        }
    }

    fn retire(&self, key: ObjectKey) {
        self.published(key);
        self.backings.lock().expect("a thread died holding the backings").remove(&key);
    }
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
        let capable = self.inner.reader.cache().arena().passthrough_capable()
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
        let Some(node) = inner.vfs.lookup(NodeId(parent.0), name.as_bytes()) else {
            return reply.error(Errno::ENOENT);
        };
        let attributes = inner.vfs.attributes(node).expect("lookup names nodes that exist");
        inner.forget_stale(request.pid(), node);
        let hot = inner.hot_object(node).is_some_and(|object| object.promise_hot());
        if hot {
            // fuser takes the entry's number for the node's; the stable one is told by getattr, so nothing is kept.
            let attr = inner.attr_of(&attributes, node.0 | HOT);
            reply.entry_with_ttls(&Duration::ZERO, &KEEP, &attr, Generation(0));
        } else {
            reply.entry(&KEEP, &inner.attr_of(&attributes, node.0), Generation(0));
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let node = NodeId(ino.0 & !HOT);
        match self.inner.vfs.attributes(node) {
            Some(attributes) => {
                let keep = if ino.0 & HOT == 0 { KEEP } else { Duration::ZERO };
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
        let node = NodeId(ino.0 & !HOT);
        if ino.0 & HOT != 0 {
            return inner.open_hot(node, reply);
        }
        let Some(file) = inner.vfs.open(node) else { return reply.error(Errno::EISDIR) };
        let object = inner.hot_object(node);
        let who = inner.who(request.pid(), node, object.is_some());
        let Some(object) = object else { return inner.opened_plain(node, file, who, reply) };
        let whole = object.is_whole();
        let hold = if whole { None } else { inner.hold(node, &object, who) };
        if (!whole && hold.is_none()) || !inner.may_answer_stale(request.pid(), node) {
            return inner.opened_plain(node, file, who, reply);
        }
        let Some(hold) = hold else {
            inner.vfs.release(node);
            return inner.stale(reply);
        };
        inner.reader.cache().telemetry().opens_held.inc();
        inner.note_whole(node);
        let inner = inner.clone();
        inner.runtime.clone().spawn(async move {
            if inner.wait_whole(&object, hold).await {
                inner.vfs.release(node);
                inner.stale(reply);
            } else {
                inner.reader.cache().telemetry().opens_held_in_vain.inc();
                inner.opened_plain(node, file, who, reply);
            }
        });
    }

    fn read(
        &self,
        _request: &Request,
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
        let Handle::Cold { node, file, who, walk } = &*handle else {
            // The kernel reads hot files by itself; it asks us only if something is badly wrong.
            return reply.error(Errno::EIO);
        };
        let telemetry = inner.reader.cache().telemetry();
        telemetry.reads.inc();
        let size = size as usize;
        if let Some(who) = *who {
            inner.observe(*node, file, who, walk, offset, size);
        }
        if let Some(answer) = inner.reader.try_read(file, offset, size) {
            telemetry.read_bytes.add(answer.bytes().len() as u64);
            reply.data(answer.bytes());
            return;
        }
        let (inner, file) = (inner.clone(), file.clone());
        inner.runtime.clone().spawn(async move {
            let telemetry = inner.reader.cache().telemetry();
            match inner.reader.read(&file, offset, size).await {
                Ok(answer) => {
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
        match handle.as_deref() {
            Some(Handle::Hot { object }) => object.hot_release(),
            Some(Handle::Cold { node, .. }) => {
                let last = inner.vfs.release(*node);
                let whole = inner.hot_object(*node).is_some_and(|object| object.is_whole());
                if last
                    && whole
                    && let Some(notifier) = inner.notifier.get()
                {
                    // Nobody reads the cold node any more: its page cache is a second copy that nobody needs. From a
                    // thread that holds nothing, since dropping pages waits for reads under way.
                    let (notifier, node) = (notifier.clone(), *node);
                    inner.runtime.spawn_blocking(move || notifier.inval_inode(INodeNo(node.0), 0, 0));
                }
            }
            None => {}
        }
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if !self.inner.vfs.is_directory(NodeId(ino.0)) {
            return reply.error(Errno::ENOTDIR);
        }
        // Listings never change.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn readdir(&self, _request: &Request, ino: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut position = offset;
        while let Some((node, kind, name)) = self.inner.vfs.entry(NodeId(ino.0), position) {
            let kind = match kind {
                Kind::Directory => FileType::Directory,
                Kind::File => FileType::RegularFile,
            };
            position += 1;
            if reply.add(INodeNo(node.0), position, kind, OsStr::from_bytes(name)) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let (nodes, bytes) = self.inner.vfs.totals();
        reply.statfs(bytes.div_ceil(4096), 0, 0, nodes, 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: fuser::ReplyXattr) {
        reply.error(Errno::NO_XATTR);
    }

    fn listxattr(&self, _request: &Request, _ino: INodeNo, size: u32, reply: fuser::ReplyXattr) {
        if size == 0 { reply.size(0) } else { reply.data(&[]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_ends_early_only_when_its_rate_says_that_it_is_in_vain() {
        let s = Duration::from_secs;
        assert!(!is_hopeless(0, 1 << 40, RATE_KNOWN_AFTER / 2, s(30)), "too early to tell");
        assert!(!is_hopeless(100, 1300, s(2), s(30)));
        assert!(is_hopeless(100, 1500, s(2), s(30)));
        assert!(is_hopeless(0, 1000, s(2), s(30)), "a store that is silent");
        assert!(!is_hopeless(0, 0, s(2), s(30)));
    }

    #[test]
    fn a_thread_is_told_by_its_process_and_an_unknown_one_is_nobody() {
        let own = std::thread::spawn(|| {
            // SAFETY: the call only reads this thread's number.
            process_of(unsafe { libc::gettid() } as u32)
        });
        assert_eq!(own.join().expect("a thread").process, std::process::id());
        assert_eq!(process_of(0), Who::default());
    }
}
