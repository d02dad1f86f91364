//! Revocation: everything of a model leaves the cache at once, whoever reads it.
//!
//! Promises: after [`Cache::cut`] no read, open or map reaches a byte of the models; it waits for no reader, only for our own
//! threads to let go (milliseconds); what is given back was overwritten, or is counted as not.
//! Not here: refusing what comes later (`Model::lock`, asked first), the kernel's page cache (`fuse`).
//! Held by: tests/lock.rs.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use super::{Cache, CachedObject, Chunk, GENERATIONS, Model, Phase, Shared, State, Unit};
use crate::error::{Code, Error};
use crate::format::ChunkIndex;
use crate::mem::{Cut, Grant, Wiped};

/// How long locking waits for fills, evictions and answers of our own that are under way: opening one chunk takes
/// milliseconds, and fetches stop when told to.
const QUIET_DEADLINE: Duration = Duration::from_secs(5);

/// What became of the plaintext of locked models.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct LockReport {
    /// Overwritten with zeros before it was given back.
    pub wiped_bytes: u64,
    /// Cut off at once, and given back as it was: its pages could not be pinned.
    pub unwiped_bytes: u64,
    /// Still there: something of ours did not let go in time. Nobody can read it through the mount.
    pub kept_bytes: u64,
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
        let mut cuts = Cuts::default();
        for object in objects {
            self.shared.cut_object(&object, &mut cuts);
        }
        cuts
    }

    /// Takes one whole object away from everyone who has it past the daemon; the model stays served, and the object is
    /// fetched anew. `false`: it was not whole.
    pub fn retire_held(&self, object: &Arc<CachedObject>) -> Option<LockReport> {
        if !object.is_whole() {
            return None;
        }
        let mut cuts = Cuts::default();
        self.shared.cut_object(object, &mut cuts);
        Some(cuts.wipe(self))
    }
}

impl Shared {
    /// The object's state once nothing of ours reads or writes its memory, or `None` at the deadline: a file must not be cut
    /// short under a thread that writes into it.
    fn quiet<'a>(&self, object: &'a CachedObject) -> Option<MutexGuard<'a, State>> {
        let deadline = Instant::now() + QUIET_DEADLINE;
        loop {
            let state = object.state();
            let moving = |chunk: &Chunk| matches!(chunk, Chunk::Filling { .. } | Chunk::Leaving { .. });
            if state.pinned == 0 && state.phase != Phase::Retiring && !state.chunks.iter().any(moving) {
                return Some(state);
            }
            drop(state);
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn cut_object(&self, object: &Arc<CachedObject>, cuts: &mut Cuts) {
        let bytes_of = |state: &State| (state.resident * object.layout.chunk_len()).min(object.layout.plain_len());
        let kept = |cuts: &mut Cuts, bytes: u64, error: &Error| {
            cuts.report.kept_bytes += bytes;
            tracing::error!(model = %object.model.name, "{}", error.chain());
        };
        let Some(mut state) = self.quiet(object) else {
            let bytes = bytes_of(&object.state());
            let busy = Error::new(
                Code::Host,
                format!(
                    "an object of {} is still being filled {} s after the lock",
                    object.model.name,
                    QUIET_DEADLINE.as_secs()
                ),
            );
            return kept(cuts, bytes, &busy);
        };
        if state.phase == Phase::Whole {
            state.phase = Phase::Retiring;
            drop(state);
            // Before the memory goes: a new open would read an empty file.
            self.retire(object.key);
            state = object.state();
        }
        let Some(file) = state.file.clone() else { return };
        let bytes = bytes_of(&state);
        let cut = match file.cut_off(state.hot_opens > 0) {
            Ok(cut) => cut,
            Err(error) => return kept(cuts, bytes, &error),
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
