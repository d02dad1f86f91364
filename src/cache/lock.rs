//! Revocation: everything of a model leaves the cache at once, whoever reads it.
//!
//! Promises: after [`Cache::cut`] no read, open or map reaches a byte of the models; it waits for no reader, only for our own
//! threads to let go (milliseconds); what is given back was overwritten, or is counted as not.
//! Not here: refusing what comes later (`Model::lock`, asked first), the kernel's page cache (`fuse`).
//! Held by: tests/lock.rs.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{Cache, CachedObject, Chunk, GENERATIONS, Model, Phase, Shared, State, Unit};
use crate::error::{Code, Error};
use crate::format::ChunkIndex;
use crate::mem::{Cut, Grant, Wiped};

/// Objects that are cut side by side: one that somebody of ours is at holds up its own thread alone.
const CUTTERS_MAX: usize = 32;

/// What became of the plaintext of locked models.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct LockReport {
    /// Overwritten with zeros before it was given back.
    pub wiped_bytes: u64,
    /// Cut off at once, and given back as it was: its pages could not be pinned.
    pub unwiped_bytes: u64,
    /// Still there: something of ours did not let go in time. No new open comes to it; who had it open past the daemon has it.
    pub kept_bytes: u64,
}

impl LockReport {
    pub fn add(&mut self, other: LockReport) {
        self.wiped_bytes += other.wiped_bytes;
        self.unwiped_bytes += other.unwiped_bytes;
        self.kept_bytes += other.kept_bytes;
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
    cuts: Vec<(Cut, Vec<Grant>, u64)>,
    report: LockReport,
}

impl Cuts {
    /// Overwrites it and gives it back. Waits a quarter of a second at most before it begins (`mem::IN_FLIGHT_GRACE`).
    pub fn wipe(self, cache: &Cache) -> LockReport {
        let mut report = self.report;
        let telemetry = cache.telemetry();
        for (cut, grants, bytes) in self.cuts {
            let measure = telemetry.wipe_seconds.measure();
            let wiped = cut.wipe();
            drop(measure);
            match wiped {
                Wiped::Overwritten => {
                    report.wiped_bytes += bytes;
                    telemetry.wiped_bytes.add(bytes);
                }
                Wiped::CutOff => {
                    report.unwiped_bytes += bytes;
                    telemetry.unwiped_bytes.add(bytes);
                }
            }
            // Room is room again only now that it is wiped.
            drop(grants);
        }
        report
    }
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
        // First what programs can have past the daemon, which the refusal of the daemon's own answers does not reach.
        let (whole, partial): (Vec<_>, Vec<_>) =
            objects.into_iter().partition(|object| object.state().phase != Phase::Partial);
        self.shared.cut_all(whole.into_iter().chain(partial).collect())
    }

    /// Takes one whole object away from everyone who has it past the daemon; the model stays served, and the object is
    /// fetched anew. Readers through the daemon wait meanwhile. `None`: it was not whole.
    pub fn retire_held(&self, object: &Arc<CachedObject>) -> Option<LockReport> {
        if object.state().phase == Phase::Partial {
            return None;
        }
        let mut cuts = Cuts::default();
        self.shared.cut_object(object, &mut cuts);
        Some(cuts.wipe(self))
    }
}

impl Shared {
    /// In this order, many at once: pinning takes its time for each page, and one that is busy its own.
    fn cut_all(&self, objects: Vec<Arc<CachedObject>>) -> Cuts {
        let cutters = objects.len().min(CUTTERS_MAX);
        let queue = Mutex::new(objects.into_iter());
        let next = || queue.lock().expect("a thread died holding the objects to cut").next();
        let cut = || {
            let mut cuts = Cuts::default();
            while let Some(object) = next() {
                self.cut_object(&object, &mut cuts);
            }
            cuts
        };
        std::thread::scope(|scope| {
            let start = |_| std::thread::Builder::new().name("cut".into()).spawn_scoped(scope, cut).ok();
            // Where there are no threads to be had, this one does it.
            let others: Vec<_> = (1..cutters).map_while(start).collect();
            others.into_iter().fold(cut(), |mut all, other| {
                let more = other.join().expect("a thread died cutting a file off");
                all.cuts.extend(more.cuts);
                all.report.add(more.report);
                all
            })
        })
    }

    /// The object's state once it is as `wanted`, or `None` at the deadline.
    fn state_when<'a>(
        &self,
        object: &'a CachedObject,
        wanted: impl Fn(&State) -> bool,
    ) -> Option<MutexGuard<'a, State>> {
        let deadline = Instant::now() + self.limits.quiet_deadline;
        loop {
            let state = object.state();
            if wanted(&state) {
                return Some(state);
            }
            drop(state);
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes an object away once nothing of ours reads or writes its memory: a file must not be cut short under a thread
    /// that copies from it or writes into it. If that cannot be done it stays as it was, and is counted as kept.
    fn cut_object(&self, object: &Arc<CachedObject>, cuts: &mut Cuts) {
        let bytes_of = |state: &State| (state.resident * object.layout.chunk_len()).min(object.layout.plain_len());
        let kept = |cuts: &mut Cuts, bytes: u64, error: &Error| {
            cuts.report.kept_bytes += bytes;
            tracing::error!(model = %object.model.name, "{}", error.chain());
        };
        let busy = |doing: &str| {
            let (name, seconds) = (&object.model.name, self.limits.quiet_deadline.as_secs());
            Error::new(Code::Host, format!("an object of {name} is still being {doing} {seconds} s after it was to go"))
        };
        let moving = |chunk: &Chunk| matches!(chunk, Chunk::Filling { .. } | Chunk::Leaving { .. });
        let claimable = |state: &State| match state.phase {
            Phase::Whole => true,
            Phase::Partial => state.pinned == 0 && !state.chunks.iter().any(moving),
            // Somebody else is at it.
            Phase::Retiring | Phase::Cutting => false,
        };
        let Some(mut state) = self.state_when(object, claimable) else {
            let bytes = bytes_of(&object.state());
            return kept(cuts, bytes, &busy("filled or evicted"));
        };
        let was_whole = state.phase == Phase::Whole;
        if was_whole {
            state.phase = Phase::Cutting;
            drop(state);
            // Before the memory goes: a new open would read an empty file.
            self.retire(object.key);
            // Of a model that is served on, somebody may have come to read before the phase was set.
            state = match self.state_when(object, |state| state.pinned == 0) {
                Some(state) => state,
                None => {
                    let mut state = object.state();
                    state.phase = Phase::Whole;
                    let bytes = bytes_of(&state);
                    drop(state);
                    return kept(cuts, bytes, &busy("read"));
                }
            };
        }
        let Some(file) = state.file.clone() else { return };
        let bytes = bytes_of(&state);
        let cut = match file.cut_off(state.hot_opens > 0) {
            Ok(cut) => cut,
            Err(error) => {
                // Still as it was, or cut short half way: then nobody is to read it, nor wait for it to be wiped.
                if !file.is_frozen() {
                    state.phase = Phase::Cutting;
                } else if was_whole {
                    state.phase = Phase::Whole;
                }
                drop(state);
                return kept(cuts, bytes, &error);
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
        cuts.cuts.push((cut, grants, bytes));
    }
}
