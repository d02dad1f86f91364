//! Revocation: everything of a model leaves the cache at once, whoever reads it.
//!
//! Promises: after [`Cache::cut`] no read, open or map reaches a byte of the models; it waits for no reader, only for our own
//! threads to let go (milliseconds), and what waits for them holds up no other object; nothing is overwritten before all is
//! cut off; what is given back was overwritten, or is counted as not.
//! Not here: refusing what comes later (`Model::lock`, asked first), the kernel's page cache (`fuse`).
//! Held by: tests/lock.rs.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{Cache, CachedObject, Chunk, GENERATIONS, Model, Phase, Shared, Unit};
use crate::error::{Code, Error};
use crate::format::ChunkIndex;
use crate::mem::{Cut, Grant, LockedFile, Wiped};

/// Objects that are cut off side by side. More than most machines have processors: a file ends for its readers before the
/// kernel takes its pages out of it, so that the next one should not wait for that.
const CUTTERS_MAX: usize = 32;

/// Files that are overwritten side by side: fewer fill the bandwidth of memory.
const WIPERS_MAX: usize = 8;

/// How soon an object that something of ours is still at is looked at again.
const LOOK: Duration = Duration::from_millis(1);

/// What became of the plaintext of locked models.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct LockReport {
    /// Overwritten with zeros before it was given back.
    pub wiped_bytes: u64,
    /// Cut off at once, and given back as it was: its pages could not be pinned.
    pub unwiped_bytes: u64,
    /// Still there: something of ours did not let go in time.
    pub kept_bytes: u64,
    /// How long after it began no byte was to be had any more by anyone.
    pub refused_after: Duration,
}

impl LockReport {
    pub fn add(&mut self, other: LockReport) {
        self.wiped_bytes += other.wiped_bytes;
        self.unwiped_bytes += other.unwiped_bytes;
        self.kept_bytes += other.kept_bytes;
        self.refused_after = self.refused_after.max(other.refused_after);
    }

    /// Says in the log what did not end as zeros, and what to do about it.
    pub fn tell_what_is_left(&self) {
        if self.unwiped_bytes > 0 {
            tracing::warn!(
                "{} bytes were cut off from readers but went back to the kernel unwiped; give the daemon io_uring and \
                 CAP_IPC_LOCK (or a RLIMIT_MEMLOCK as large as the cache), or boot with init_on_free=1",
                self.unwiped_bytes
            );
        }
        if self.kept_bytes > 0 {
            tracing::error!("locked, but {} bytes of plaintext are still in memory; stop the mount", self.kept_bytes);
        }
    }
}

/// Plaintext that nobody reaches any more and that waits to be overwritten.
#[must_use = "pages go back unwiped if this is dropped"]
#[derive(Default)]
pub struct Cuts {
    cuts: Vec<CutObject>,
    report: LockReport,
}

struct CutObject {
    file: Arc<LockedFile>,
    cut: Cut,
    grants: Vec<Grant>,
    bytes: u64,
}

impl Cuts {
    /// Overwrites it and gives it back. Waits a quarter of a second at most before it begins (`mem::IN_FLIGHT_GRACE`).
    pub fn wipe(self, cache: &Cache) -> LockReport {
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(WIPERS_MAX);
        let threads = threads.min(self.cuts.len());
        let (cuts, report) = (Mutex::new(self.cuts), Mutex::new(self.report));
        side_by_side(threads, || {
            loop {
                let Some(next) = held(&cuts).pop() else { return };
                let told = next.wipe(cache);
                held(&report).add(told);
            }
        });
        report.into_inner().expect("a thread died wiping")
    }
}

impl CutObject {
    fn wipe(self, cache: &Cache) -> LockReport {
        let CutObject { file, cut, grants, bytes } = self;
        let telemetry = cache.telemetry();
        let mut report = LockReport::default();
        let measure = telemetry.wipe_seconds.measure();
        let wiped = cut.wipe(&file);
        drop(measure);
        match wiped {
            Ok(Wiped::Overwritten) => {
                report.wiped_bytes = bytes;
                telemetry.wiped_bytes.add(bytes);
            }
            Ok(Wiped::CutOff) => {
                report.unwiped_bytes = bytes;
                telemetry.unwiped_bytes.add(bytes);
            }
            Err(error) => {
                report.kept_bytes = bytes;
                tracing::error!("{}", error.chain());
                // Still there: the budget stays true.
                std::mem::forget(grants);
                return report;
            }
        }
        // Room is room again only now that it is wiped.
        drop(grants);
        report
    }
}

/// Runs `work` in this thread and in others beside it, `threads` in all, or as many as can be had.
pub fn side_by_side(threads: usize, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 1..threads {
            if std::thread::Builder::new().name("revoke".into()).spawn_scoped(scope, &work).is_err() {
                break;
            }
        }
        work();
    });
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("a thread died revoking")
}

impl Cache {
    /// Takes every byte of `models` away from everyone, readers past the daemon included: their reads end, their maps get
    /// SIGBUS. The models were locked before. Blocking; call it from a thread that holds nothing.
    pub fn cut(&self, models: &[Arc<Model>]) -> Cuts {
        let objects: Vec<Arc<CachedObject>> = {
            let table = self.shared.objects.lock().expect("a thread died holding the object table");
            let ours = |object: &&Arc<CachedObject>| models.iter().any(|model| model.serial == object.key.model);
            table.values().filter(ours).cloned().collect()
        };
        self.shared.cut_objects(objects)
    }

    /// [`Cache::cut`], then overwrites; the kernel drops its pages of the models beside it. The models were locked before.
    /// Blocking, as that is.
    pub fn revoke(&self, models: &[Arc<Model>]) -> LockReport {
        let started = Instant::now();
        let cuts = std::thread::scope(|scope| {
            let drop_pages = || self.drop_pages(models);
            let beside = std::thread::Builder::new().name("revoke".into()).spawn_scoped(scope, drop_pages);
            let cuts = self.cut(models);
            if beside.is_err() {
                drop_pages();
            }
            cuts
        });
        let refused_after = started.elapsed();
        LockReport { refused_after, ..cuts.wipe(self) }
    }

    /// Takes one whole object away from everyone who has it past the daemon; the model stays served, and the object is
    /// fetched anew. Readers through the daemon wait meanwhile. `None`: it was not whole.
    pub fn retire_held(&self, object: &Arc<CachedObject>) -> Option<LockReport> {
        if matches!(object.state().phase, Phase::Partial | Phase::Freezing) {
            return None;
        }
        Some(self.shared.cut_objects(vec![object.clone()]).wipe(self))
    }
}

/// An object that is to go.
struct Leaving {
    object: Arc<CachedObject>,
    /// It was whole, and its phase is ours now.
    claimed: bool,
    /// When to look at it again.
    again: Instant,
}

impl Shared {
    /// Takes objects away, each as soon as nothing of ours is at it, whatever the others wait for.
    fn cut_objects(&self, objects: Vec<Arc<CachedObject>>) -> Cuts {
        let began = Instant::now();
        let deadline = began + self.limits.quiet_deadline;
        let mut leaving: Vec<Leaving> =
            objects.into_iter().map(|object| Leaving { object, claimed: false, again: began }).collect();
        // Of the others nobody but us has the memory.
        leaving.sort_by_cached_key(|one| one.object.state().phase != Phase::Whole);
        let threads = leaving.len().min(CUTTERS_MAX);
        let (queue, cuts) = (Mutex::new(VecDeque::from(leaving)), Mutex::new(Cuts::default()));
        side_by_side(threads, || {
            loop {
                let Some(mut next) = held(&queue).pop_front() else { return };
                let now = Instant::now();
                if now < next.again {
                    // Nor is it time for any behind it.
                    held(&queue).push_front(next);
                    std::thread::sleep(LOOK);
                    continue;
                }
                match self.try_cut(&mut next) {
                    Tried::Cut(cut) => held(&cuts).cuts.push(cut),
                    Tried::Nothing => {}
                    Tried::Busy(_) if now < deadline => {
                        next.again = now + LOOK;
                        held(&queue).push_back(next);
                    }
                    Tried::Busy(doing) => held(&cuts).report.kept_bytes += self.give_up(&next, doing),
                    Tried::Failed(bytes) => held(&cuts).report.kept_bytes += bytes,
                }
            }
        });
        cuts.into_inner().expect("a thread died revoking")
    }

    /// Leaves an object as it was. How many bytes it has.
    fn give_up(&self, leaving: &Leaving, doing: &str) -> u64 {
        let object = &leaving.object;
        let (name, seconds) = (&object.model.name, self.limits.quiet_deadline.as_secs());
        let text = format!("an object of {name} is still being {doing} {seconds} s after it was to go");
        tracing::error!(model = %name, "{}", Error::new(Code::Host, text).chain());
        let mut state = object.state();
        if leaving.claimed {
            state.phase = Phase::Whole;
        }
        object.bytes_of(&state)
    }

    /// Takes an object away if nothing of ours reads or writes its memory: a file must not be cut short under a thread that
    /// copies from it or writes into it. Waits for nothing.
    fn try_cut(&self, leaving: &mut Leaving) -> Tried {
        let object = &leaving.object;
        let mut state = object.state();
        if !leaving.claimed {
            let moving = |chunk: &Chunk| matches!(chunk, Chunk::Filling { .. } | Chunk::Leaving { .. });
            match state.phase {
                Phase::Whole => {
                    state.phase = Phase::Cutting;
                    drop(state);
                    leaving.claimed = true;
                    // Before the memory goes: a new open would read an empty file.
                    self.retire(object.key);
                    state = object.state();
                }
                Phase::Partial if state.pinned == 0 && !state.chunks.iter().any(moving) => {}
                // Somebody else is at it.
                Phase::Partial | Phase::Freezing | Phase::Retiring | Phase::Cutting => {
                    return Tried::Busy("filled or evicted");
                }
            }
        }
        // Of a model that is served on, somebody may have come to read before the phase was set.
        if state.pinned > 0 {
            return Tried::Busy("read");
        }
        let Some(file) = state.file.clone() else { return Tried::Nothing };
        let (bytes, hot_opens) = (object.bytes_of(&state), state.hot_opens);
        let cut = if leaving.claimed {
            // Taking small pages out of a file takes a while. Nothing else touches the object in this phase, but the end of
            // an open need not wait.
            drop(state);
            let cut = file.cut_off(hot_opens > 0);
            state = object.state();
            cut
        } else {
            file.cut_off(hot_opens > 0)
        };
        let cut = match cut {
            Ok(cut) => cut,
            Err(error) => {
                if leaving.claimed {
                    // Still as it was, or cut short half way: then nobody is to read it, nor wait for it to be wiped.
                    state.phase = if file.is_frozen() { Phase::Whole } else { Phase::Cutting };
                }
                tracing::error!(model = %object.model.name, "{}", error.chain());
                return Tried::Failed(bytes);
            }
        };
        let mut grants = Vec::with_capacity(state.chunks.len());
        for chunk in state.chunks.iter_mut() {
            if let Chunk::Resident { grant, .. } = std::mem::replace(chunk, Chunk::Empty) {
                grants.push(grant);
            }
        }
        state.file = None;
        state.resident = 0;
        state.phase = Phase::Partial;
        // Opens of the memory that is gone: their release says nothing of what comes after.
        state.generation = (state.generation + 1) % GENERATIONS;
        state.hot_opens = 0;
        state.promised_until = None;
        drop(state);
        let mut recency = self.recency();
        recency.pop(&Unit::Object(object.key));
        for index in 0..object.layout.chunk_count() {
            recency.pop(&Unit::Chunk(object.key, ChunkIndex(index as u32)));
        }
        drop(recency);
        Tried::Cut(CutObject { file, cut, grants, bytes })
    }
}

enum Tried {
    Cut(CutObject),
    /// There was no memory.
    Nothing,
    /// What something of ours still does with it.
    Busy(&'static str),
    /// So many bytes could not be taken away; the log says why.
    Failed(u64),
}
