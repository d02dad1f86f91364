//! Which chunks of which data object are resident, and the promise that they never exceed the budget.
//!
//! `fill` brings chunks in, `evict` takes them out, `lock` takes them away, `residency` tells which are there.
//!
//! In: a model whose manifest is verified and keys are open, and a wish ("chunk 17 of object 3"). Out: a [`Pin`] on verified
//! plaintext that cannot move or vanish while the pin lives, or a named error.
//! Promises: one fetch for any number of readers (single flight); a byte is readable only after `crypto::open_chunk` said
//! so; demand is never starved by prefetch; room is taken before bytes are fetched and given back only after they were
//! wiped; nothing waits without a deadline; no lock is held across a wait.
//! Not here: which ranges make a read (`read`), names (`vfs`), the kernel (`fuse`).
//! Held by: the tests below, tests/read_property.rs, tests/hostile_read.rs.

mod chunks;
mod evict;
mod fill;
mod lock;
mod model;
mod residency;
mod vitals;

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::{Notify, Semaphore, oneshot, watch};

use chunks::Chunks;
use fill::{Joined, Openers};
pub use lock::{Cuts, LockReport};
pub use model::{Admission, Model};
use residency::Rounds;
pub use residency::{Part, Residency};
pub use vitals::{LOAD_QUIET, Loaded, Vitals};

use crate::error::{Code, Error, Result};
use crate::format::{ChunkIndex, ObjectLayout};
use crate::mem::{Arena, Budget, Grant, LockedFile, Pages};
use crate::telemetry::Telemetry;

/// One data object of one model of this mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    pub model: u32,
    pub object: u32,
}

/// Who asks, hence who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// A reader waits for it.
    Demand,
    /// Nobody waits yet: it gives way, and gives up rather than wait for room.
    Prefetch,
}

/// What the kernel side does when a whole object becomes, or stops being, readable past the daemon.
pub trait HotGate: Send + Sync {
    /// Every byte of the object is verified and frozen: new opens may bypass the daemon.
    fn published(&self, key: ObjectKey);
    /// The object is about to leave. On return no new open can reach it past the daemon, and the kernel-side backing is
    /// dropped. Called from a thread that holds no lock of the cache.
    fn retire(&self, key: ObjectKey);
    /// The model was locked: what the kernel caches of its pages goes. Called likewise.
    fn drop_pages(&self, model: u32);
}

/// Bounds and deadlines. Every queue and wait of the cache has its number here.
#[derive(Debug, Clone)]
pub struct CacheLimits {
    /// Chunks being fetched or opened at once, demand and prefetch together.
    pub fetches_max: usize,
    /// Of those, how many may be prefetch.
    pub prefetches_max: usize,
    /// Threads that hash and open chunks.
    pub open_threads: usize,
    /// How long a demand fetch waits for room before ENOMEM.
    pub room_deadline: Duration,
    /// How long a lock waits for fills, evictions and answers of our own that are under way: opening one chunk takes
    /// milliseconds, and fetches stop when told to.
    pub quiet_deadline: Duration,
    /// How long a refused chunk (tampered) is answered from memory instead of asking the store again.
    pub refusal_memory: Duration,
    /// The same for a store that did not answer.
    pub outage_memory: Duration,
}

impl CacheLimits {
    /// Locked memory that the opener threads take beside the cache itself: their stacks, and where coded chunks pass.
    pub fn opener_bytes(&self) -> u64 {
        (self.open_threads * (fill::OPENER_STACK_BYTES + fill::SCRATCH_BYTES)) as u64
    }
}

impl Default for CacheLimits {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, NonZeroUsize::get);
        CacheLimits {
            fetches_max: 16,
            prefetches_max: 12,
            open_threads: cores.clamp(2, 16),
            room_deadline: Duration::from_secs(10),
            quiet_deadline: Duration::from_secs(5),
            refusal_memory: Duration::from_secs(10),
            outage_memory: Duration::from_secs(1),
        }
    }
}

/// How long a look-up keeps a whole object from eviction: longer than any walk from look-up to open.
const PROMISE: Duration = Duration::from_millis(500);

/// Generations of one object's memory that are told apart; then they begin anew.
pub const GENERATIONS: u64 = 1 << 20;

/// How often whoever waits for a prefetch looks whether it ended.
const PREFETCH_POLL: Duration = Duration::from_millis(10);

/// How often whoever wants a chunk of an object that is being taken away looks whether that is over.
const CUTTING_POLL: Duration = Duration::from_millis(2);

/// What recency is kept of: single chunks, or an object that is whole and leaves as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Unit {
    Chunk(ObjectKey, ChunkIndex),
    Object(ObjectKey),
}

type Waiter = oneshot::Sender<Result<Pin>>;

enum Chunk {
    Empty,
    /// Being fetched and opened; `hurry` lets a demand reader lift a queued prefetch.
    Filling {
        waiters: Vec<Waiter>,
        hurry: Arc<Notify>,
    },
    Resident {
        grant: Grant,
        pins: u32,
        /// The round in which it was pinned last, see `residency`.
        read: u32,
    },
    /// Being wiped. Whoever asks now waits and starts the next fill.
    Leaving {
        waiters: Vec<Waiter>,
    },
    /// Refused; the same answer until then.
    Failed {
        until: Instant,
        error: Box<Error>,
    },
}

impl Chunk {
    /// Whether readers came for it and all went away again.
    fn is_given_up(&self) -> bool {
        matches!(self, Chunk::Filling { waiters, .. } if !waiters.is_empty() && waiters.iter().all(Waiter::is_closed))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Partial,
    /// Every chunk resident, the file frozen, opens may bypass the daemon.
    Whole,
    /// On its way out: hot opens are refused, but nothing is wiped yet.
    Retiring,
    /// Being taken away from whoever has it: nothing of it is pinned anew either.
    Cutting,
}

struct State {
    file: Option<Arc<LockedFile>>,
    chunks: Chunks,
    resident: u64,
    pinned: u64,
    phase: Phase,
    /// Opens answered with passthrough and not yet released.
    hot_opens: u64,
    /// Which memory of this object it is: one more, modulo [`GENERATIONS`], each time it was taken
    /// away from those who had it.
    generation: u64,
    /// Until then a look-up that answered the hot node may still be followed by its open.
    promised_until: Option<Instant>,
    whole_waiters: Vec<oneshot::Sender<()>>,
    whole_fill_runs: bool,
}

/// A data object as the cache keeps it: one locked memory file, plaintext at its own offset.
pub struct CachedObject {
    pub key: ObjectKey,
    pub model: Arc<Model>,
    layout: ObjectLayout,
    pages: Pages,
    /// What memory is given and taken in: the page size that `pages` really has in this arena.
    granule: u64,
    /// Whether readers may get this object's memory itself (one file, exactly this object, a capable arena).
    hot_capable: bool,
    /// Told when something of this object may have become free to leave: whoever waits for room looks again.
    idle: Arc<Notify>,
    state: Mutex<State>,
}

impl CachedObject {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a thread died holding a cached object")
    }

    pub fn layout(&self) -> &ObjectLayout {
        &self.layout
    }

    pub fn is_hot_capable(&self) -> bool {
        self.hot_capable
    }

    /// Whether opens may be answered with the object's own memory now.
    pub fn is_whole(&self) -> bool {
        self.state().phase == Phase::Whole
    }

    /// Plain bytes resident now, counted in whole chunks but never more than the object.
    pub fn resident_bytes(&self) -> u64 {
        let resident = self.state().resident;
        (resident * self.layout.chunk_len()).min(self.layout.plain_len())
    }

    /// Locked memory that chunk `index` costs: its range rounded out to the pages it lives in.
    fn cost(&self, index: ChunkIndex) -> u64 {
        let range = self.layout.chunk_plain(index);
        (range.end - range.start).next_multiple_of(self.granule)
    }

    /// Locked memory that the whole object costs.
    pub fn whole_cost(&self) -> u64 {
        self.layout.plain_len().next_multiple_of(self.granule)
    }

    /// Counts a passthrough open and hands out the memory file, or `None` when the object is not (or no longer) whole, or
    /// its memory is another than that of `generation`.
    pub fn hot_open(&self, generation: u64) -> Option<Arc<LockedFile>> {
        let mut state = self.state();
        if state.phase != Phase::Whole || state.generation != generation {
            return None;
        }
        state.hot_opens += 1;
        state.file.clone()
    }

    /// Whether a look-up may answer the hot node, and of which generation. If so the object stays for [`PROMISE`], so that
    /// the open which follows finds it: the kernel forgives ESTALE once a walk, not twice.
    pub fn promise_hot(&self) -> Option<u64> {
        let mut state = self.state();
        if state.phase != Phase::Whole {
            return None;
        }
        state.promised_until = Some(Instant::now() + PROMISE);
        Some(state.generation)
    }

    /// Whether a program has the whole object open or mapped past the daemon.
    fn is_held(&self) -> bool {
        let state = self.state();
        let lent = state.phase != Phase::Partial;
        let file = state.file.as_ref().filter(|_| lent);
        file.is_some_and(|file| state.hot_opens > 0 || file.others_hold().unwrap_or(true))
    }

    /// Ends a passthrough open of that generation's memory.
    pub fn hot_release(&self, generation: u64) {
        let mut state = self.state();
        if state.generation != generation {
            return;
        }
        state.hot_opens = state.hot_opens.checked_sub(1).expect("a hot release without its open");
        drop(state);
        self.idle.notify_waiters();
    }

    fn unpin(&self, index: ChunkIndex) {
        let mut state = self.state();
        let Chunk::Resident { pins, .. } = &mut state.chunks[index.0 as usize] else {
            unreachable!("a pinned chunk left")
        };
        *pins = pins.checked_sub(1).expect("an unpin without its pin");
        let last = *pins == 0;
        state.pinned -= 1;
        drop(state);
        if last {
            self.idle.notify_waiters();
        }
    }
}

/// A verified chunk that stays where it is until this is dropped.
pub struct Pin {
    object: Arc<CachedObject>,
    index: ChunkIndex,
    file: Arc<LockedFile>,
}

impl Pin {
    /// The plaintext of `range` of the object.
    ///
    /// # Panics
    /// If `range` leaves the pinned chunk: our own bug.
    pub fn bytes(&self, range: Range<u64>) -> &[u8] {
        let chunk = self.object.layout.chunk_plain(self.index);
        assert!(chunk.start <= range.start && range.end <= chunk.end, "{range:?} outside pinned {chunk:?}");
        // SAFETY: the chunk was verified before it was pinned, the pin keeps it from being wiped, and resident chunks
        // are never written again; freezing swaps the mapping in place without moving it.
        unsafe { self.file.bytes(range) }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.object.unpin(self.index);
    }
}

/// Consecutive chunks of one object, all pinned: a range that crosses chunks can be answered in one piece.
pub struct PinnedRun {
    pins: Vec<Pin>,
    range: Range<u64>,
}

impl PinnedRun {
    /// The plaintext asked for, in one piece: chunks of an object lie side by side in its memory file.
    pub fn bytes(&self) -> &[u8] {
        let first = self.pins.first().expect("a run has at least one pin");
        // SAFETY: every chunk that `range` touches is pinned by `pins`, verified, and never written again.
        unsafe { first.file.bytes(self.range.clone()) }
    }
}

/// The cache of a process, for all its mounts. Cheap to clone.
#[derive(Clone)]
pub struct Cache {
    shared: Arc<Shared>,
}

struct Shared {
    arena: Arc<Arena>,
    budget: Budget,
    limits: CacheLimits,
    recency: Mutex<LruCache<Unit, ()>>,
    objects: Mutex<HashMap<ObjectKey, Arc<CachedObject>>>,
    openers: Openers,
    all_permits: Arc<Semaphore>,
    prefetch_permits: Arc<Semaphore>,
    /// One a mount.
    gates: RwLock<Vec<Arc<dyn HotGate>>>,
    /// Shared with every object, see [`CachedObject`].
    idle: Arc<Notify>,
    rounds: Rounds,
    stop: watch::Sender<bool>,
    runtime: tokio::runtime::Handle,
    telemetry: Arc<Telemetry>,
}

/// What was found when the cache was told to let go of everything.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct WipeReport {
    pub wiped_bytes: u64,
    /// Objects that a program still has open or mapped past the daemon: their memory lives until it lets go.
    pub held_objects: u64,
    pub held_bytes: u64,
}

impl Cache {
    pub fn new(
        arena: Arena,
        budget_bytes: u64,
        limits: CacheLimits,
        runtime: tokio::runtime::Handle,
        telemetry: Arc<Telemetry>,
    ) -> Result<Self> {
        let openers = Openers::start(limits.open_threads)?;
        Ok(Cache {
            shared: Arc::new(Shared {
                arena: Arc::new(arena),
                budget: Budget::new(budget_bytes),
                all_permits: Arc::new(Semaphore::new(limits.fetches_max)),
                prefetch_permits: Arc::new(Semaphore::new(limits.prefetches_max)),
                limits,
                recency: Mutex::new(LruCache::unbounded()),
                objects: Mutex::new(HashMap::new()),
                openers,
                gates: RwLock::default(),
                idle: Arc::new(Notify::new()),
                rounds: Rounds::default(),
                stop: watch::Sender::new(false),
                runtime,
                telemetry,
            }),
        })
    }

    /// Connects the kernel side of a mount: before its first open can be answered.
    pub fn add_gate(&self, gate: Arc<dyn HotGate>) {
        self.shared.gates.write().expect("a thread died holding the gates").push(gate);
    }

    /// The mount is gone.
    pub fn remove_gate(&self, gate: &Arc<dyn HotGate>) {
        self.shared.gates.write().expect("a thread died holding the gates").retain(|other| !Arc::ptr_eq(other, gate));
    }

    /// Lets the kernel drop what its page cache holds of `models`, through whichever mount it came there. From a thread that
    /// holds nothing, after reads that are under way are sure to be answered.
    pub fn drop_pages(&self, models: &[Arc<Model>]) {
        for gate in self.shared.gates() {
            models.iter().for_each(|model| gate.drop_pages(model.serial));
        }
    }

    pub fn limits(&self) -> &CacheLimits {
        &self.shared.limits
    }

    pub fn budget(&self) -> &Budget {
        &self.shared.budget
    }

    pub fn arena(&self) -> &Arena {
        &self.shared.arena
    }

    pub fn telemetry(&self) -> &Telemetry {
        &self.shared.telemetry
    }

    /// The cached form of data object `object` of `model`; nothing is fetched. `sole_file`: one file is exactly this
    /// object, so that its memory may be given to readers whole.
    pub fn object(&self, model: &Arc<Model>, object: u32, sole_file: bool) -> Arc<CachedObject> {
        let key = ObjectKey { model: model.serial, object };
        let mut objects = self.shared.objects.lock().expect("a thread died holding the object table");
        objects
            .entry(key)
            .or_insert_with(|| {
                let layout = model.entry(object).layout;
                // A chunk of 2 MiB or more fills whole huge pages; anything smaller would waste most of one.
                let huge = layout.chunk_len().min(layout.plain_len()) >= self.shared.arena.granule(Pages::Huge);
                let pages = if huge { Pages::Huge } else { Pages::Small };
                let chunks = Chunks::new(layout.chunk_count());
                Arc::new(CachedObject {
                    key,
                    model: model.clone(),
                    layout,
                    pages,
                    granule: self.shared.arena.granule(pages),
                    hot_capable: sole_file && self.shared.arena.passthrough_capable(),
                    idle: self.shared.idle.clone(),
                    state: Mutex::new(State {
                        file: None,
                        chunks,
                        resident: 0,
                        pinned: 0,
                        phase: Phase::Partial,
                        hot_opens: 0,
                        generation: 0,
                        promised_until: None,
                        whole_waiters: Vec::new(),
                        whole_fill_runs: false,
                    }),
                })
            })
            .clone()
    }

    /// Pins every chunk of `range` (plain bytes of the object) if all are resident now; starts and waits for nothing.
    pub fn try_pin_run(&self, object: &Arc<CachedObject>, range: Range<u64>) -> Option<PinnedRun> {
        assert!(range.start < range.end, "an empty range has no chunks");
        if object.model.is_locked() {
            return None;
        }
        let first = object.layout.chunk_at(range.start);
        let last = object.layout.chunk_at(range.end - 1);
        let file;
        {
            let mut state = object.state();
            if state.phase == Phase::Cutting {
                return None;
            }
            let indices = first.0..=last.0;
            if !indices.clone().all(|i| matches!(state.chunks[i as usize], Chunk::Resident { .. })) {
                return None;
            }
            for i in indices {
                if let Chunk::Resident { pins, read, .. } = &mut state.chunks[i as usize] {
                    *pins += 1;
                    *read = self.shared.rounds.now();
                }
                state.pinned += 1;
            }
            file = state.file.clone().expect("resident chunks have a file");
        }
        let pins = (first.0..=last.0)
            .map(|i| Pin { object: object.clone(), index: ChunkIndex(i), file: file.clone() })
            .collect();
        self.shared.touch(object, first, last);
        Some(PinnedRun { pins, range })
    }

    /// Chunk `index`, verified and pinned. Joins a fetch that is under way, or starts one.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the fetch running for whoever else waits; a pin that nobody takes is released.
    pub async fn pin(&self, object: &Arc<CachedObject>, index: ChunkIndex) -> Result<Pin> {
        loop {
            match self.shared.join(object, index) {
                Joined::Ready(pin) => {
                    self.shared.touch(object, index, index);
                    return Ok(pin);
                }
                Joined::Failed(error) => return Err(error),
                Joined::Wait(receiver) => return receiver.await.unwrap_or_else(|_| Err(stopping())),
                // Whoever cuts has a deadline.
                Joined::Cutting => tokio::time::sleep(CUTTING_POLL).await,
            }
        }
    }

    /// Starts fetching chunk `index` unless it is there, on its way, or was refused a moment ago.
    pub fn start(&self, object: &Arc<CachedObject>, index: ChunkIndex, urgency: Urgency) {
        self.shared.start(object, index, urgency);
    }

    /// The same ahead of any reader, and waits until the chunk is there or was given up.
    pub async fn prefetch(&self, object: &Arc<CachedObject>, index: ChunkIndex) {
        self.shared.start(object, index, Urgency::Prefetch);
        // Not as one of its waiters: whoever waits makes a fetch urgent.
        let filling = || matches!(object.state().chunks[index.0 as usize], Chunk::Filling { .. });
        while filling() {
            // Told of most ends, and of those of others; not of every one.
            let _ = tokio::time::timeout(PREFETCH_POLL, self.shared.idle.notified()).await;
        }
    }

    /// Whether the object can become whole and stay so while everything that programs hold past the daemon stays too, and
    /// a quarter of the budget is left to serve others: what is held is not evicted for anyone.
    pub fn has_room_to_keep(&self, object: &Arc<CachedObject>) -> bool {
        let others: Vec<Arc<CachedObject>> = {
            let table = self.shared.objects.lock().expect("a thread died holding the object table");
            table.values().filter(|other| !Arc::ptr_eq(other, object)).cloned().collect()
        };
        let held: u64 = others.iter().filter(|other| other.is_held()).map(|other| other.whole_cost()).sum();
        held.saturating_add(object.whole_cost()) <= self.shared.budget.total() / 4 * 3
    }

    /// Plain bytes of a model that are resident now.
    pub fn resident_bytes(&self, model: u32) -> u64 {
        self.objects_of(model).iter().map(|object| object.resident_bytes()).sum()
    }

    /// How many chunks may be on their way ahead of readers.
    pub fn prefetches_max(&self) -> usize {
        self.shared.limits.prefetches_max
    }

    /// Whether every byte of the object can be resident at once and leave room to serve others.
    pub fn fits_whole(&self, object: &CachedObject) -> bool {
        object.whole_cost() <= self.shared.budget.total()
    }

    /// Fills the object whole in the background, in order; returns when it is whole, or with the first error.
    /// Many callers share one fill.
    pub async fn fill_whole(&self, object: &Arc<CachedObject>) -> Result<()> {
        if !object.hot_capable || !self.fits_whole(object) {
            return Err(Error::new(Code::NoRoom, "the object cannot be resident as a whole"));
        }
        let receiver = {
            let mut state = object.state();
            if state.phase == Phase::Whole {
                return Ok(());
            }
            let (sender, receiver) = oneshot::channel();
            state.whole_waiters.push(sender);
            if !std::mem::replace(&mut state.whole_fill_runs, true) {
                let (cache, object) = (self.clone(), object.clone());
                self.shared.runtime.spawn(async move { cache.run_whole_fill(&object).await });
            }
            receiver
        };
        receiver.await.map_err(|_| Error::new(Code::NoRoom, "the object could not be made resident as a whole"))
    }

    /// Two passes: a chunk that was evicted behind the first pass gets one more chance before the fill gives up.
    async fn run_whole_fill(&self, object: &Arc<CachedObject>) {
        use futures::stream::{self, StreamExt};
        for _pass in 0..2 {
            let missing: Vec<ChunkIndex> = {
                let state = object.state();
                (0..state.chunks.len())
                    .filter(|&i| !matches!(state.chunks[i], Chunk::Resident { .. }))
                    .map(|i| ChunkIndex(i as u32))
                    .collect()
            };
            let width = self.shared.limits.prefetches_max;
            let mut arrivals = stream::iter(missing)
                .map(|index| async move { self.pin(object, index).await.map(drop) })
                // Begun in order, taken as they come: one chunk that is late does not idle the others' places.
                .buffer_unordered(width);
            let mut failed = false;
            while let Some(arrival) = arrivals.next().await {
                failed |= arrival.is_err();
                if failed {
                    break;
                }
            }
            if failed || object.is_whole() {
                break;
            }
        }
        let mut state = object.state();
        state.whole_fill_runs = false;
        let waiters = std::mem::take(&mut state.whole_waiters);
        let whole = state.phase == Phase::Whole;
        drop(state);
        for waiter in waiters {
            if whole {
                // A caller that went away does not need the answer.
                let _ = waiter.send(());
            }
        }
    }

    fn objects_of(&self, model: u32) -> Vec<Arc<CachedObject>> {
        let table = self.shared.objects.lock().expect("a thread died holding the object table");
        table.values().filter(|object| object.key.model == model).cloned().collect()
    }

    /// Whether a program has something of a model open or mapped past the daemon.
    pub fn is_held(&self, model: u32) -> bool {
        self.objects_of(model).iter().any(|object| object.is_held())
    }

    /// Wipes everything of one model that no program holds past the daemon, and forgets what was wiped. The caller has
    /// seen to it that nobody opens the model again, and wiped its keys. Idempotent; blocking.
    pub fn wipe_model(&self, model: u32) -> WipeReport {
        let mut report = WipeReport::default();
        for object in self.objects_of(model) {
            self.shared.retire(object.key);
            let held = report.held_objects;
            self.shared.wipe_object(&object, false, &mut report);
            if report.held_objects == held {
                self.shared.forget_object(&object);
            }
        }
        report
    }

    /// Refuses new work, then wipes everything that no program holds past the daemon. Idempotent.
    ///
    /// `unmounted`: the mount is gone, so a passthrough open whose release never came is no longer a reason to wait.
    pub fn wipe_all(&self, unmounted: bool) -> WipeReport {
        self.shared.stop.send_replace(true);
        let objects: Vec<Arc<CachedObject>> =
            self.shared.objects.lock().expect("a thread died holding the object table").values().cloned().collect();
        let mut report = WipeReport::default();
        for object in objects {
            self.shared.wipe_object(&object, unmounted, &mut report);
        }
        report
    }
}

impl Shared {
    fn gates(&self) -> Vec<Arc<dyn HotGate>> {
        self.gates.read().expect("a thread died holding the gates").clone()
    }

    /// On return no mount lets a new open reach the object past the daemon. From a thread that holds no lock of the cache.
    fn retire(&self, key: ObjectKey) {
        self.gates().iter().for_each(|gate| gate.retire(key));
    }
}

fn stopping() -> Error {
    Error::new(Code::Stopping, "the filesystem is stopping")
}
