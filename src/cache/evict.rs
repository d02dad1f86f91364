//! Room: who leaves when there is none, in which order, and what is wiped at the end.
//!
//! Promises: nothing pinned, open or mapped is touched; bytes are given back to the budget only after they were wiped;
//! looking for room takes a bounded number of steps.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::Notify;

use super::{CachedObject, Chunk, ObjectKey, Phase, Shared, State, Unit, Urgency, WipeReport, stopping};
use crate::error::{Code, Error, Result};
use crate::format::ChunkIndex;
use crate::mem::Grant;

/// How many of the least recently used units one search for room looks at.
const EVICT_SCAN_MAX: usize = 512;

/// Who waits for room looks for it again after so long, then after twice as long each time, and at the deadline.
const LOOK_AGAIN_FIRST: Duration = Duration::from_millis(50);
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(1);

/// How long the end waits for fills and wipes under way: opening one chunk takes milliseconds.
const SETTLE_DEADLINE: Duration = Duration::from_secs(2);

impl Shared {
    pub(super) fn recency(&self) -> MutexGuard<'_, LruCache<Unit, ()>> {
        self.recency.lock().expect("a thread died holding the recency list")
    }

    pub(super) fn remember(&self, unit: Unit) {
        self.recency().put(unit, ());
    }

    /// Marks as used now. A unit that is just being evicted is not brought back.
    pub(super) fn touch(&self, object: &CachedObject, first: ChunkIndex, last: ChunkIndex) {
        let mut recency = self.recency();
        if recency.get(&Unit::Object(object.key)).is_some() {
            return;
        }
        for index in first.0..=last.0 {
            recency.get(&Unit::Chunk(object.key, ChunkIndex(index)));
        }
    }

    /// Locked room for `cost` bytes. Prefetch never waits, and leaves room for the demand fetches that may start beside it
    /// (of a small cache a quarter at most). No more than that: what it wants free beyond its own need it throws out of the
    /// cache, and a model that fits would be thrown out with it.
    pub(super) async fn room(self: &Arc<Self>, cost: u64, urgency: Urgency, hurry: &Notify) -> Result<Grant> {
        let deadline = tokio::time::Instant::now() + self.limits.room_deadline;
        let mut stop = self.stop.subscribe();
        let mut urgency = urgency;
        let (mut pause, mut over) = (LOOK_AGAIN_FIRST, false);
        loop {
            // Registered before looking, so that nothing that becomes free in between is missed.
            let mut idle = std::pin::pin!(self.idle.notified());
            idle.as_mut().enable();
            let mut released = std::pin::pin!(self.budget.released());
            let keep_free = match urgency {
                Urgency::Demand => 0,
                Urgency::Prefetch => {
                    let demand_fetches = self.limits.fetches_max - self.limits.prefetches_max;
                    (self.budget.total() / 4).min(demand_fetches as u64 * cost)
                }
            };
            if let Some(grant) = self.budget.try_take(cost, keep_free) {
                return Ok(grant);
            }
            let shared = self.clone();
            let freed = tokio::task::spawn_blocking(move || shared.evict(cost)).await.map_err(|_| stopping())?;
            // Others may take what was freed, again and again: the deadline holds all the same.
            if freed > 0 && tokio::time::Instant::now() < deadline {
                continue;
            }
            let no_room = || {
                let (used, total) = (self.budget.in_use(), self.budget.total());
                Error::new(
                    Code::NoRoom,
                    format!(
                        "no room for {cost} more bytes: {used} of {total} are in use and held; raise --cache or close files"
                    ),
                )
            };
            if urgency == Urgency::Prefetch {
                // Someone may have come to wait for this very chunk meanwhile: then it is worth waiting.
                match tokio::time::timeout(Duration::ZERO, hurry.notified()).await {
                    Ok(()) => urgency = Urgency::Demand,
                    Err(_) => return Err(no_room()),
                }
            }
            if over {
                // What was just thrown out is not to have been for nothing.
                return self.budget.try_take(cost, keep_free).ok_or_else(no_room);
            }
            // Nobody tells of the end of a promise, nor of the kernel's letting go of a file after its last close.
            let look_again = deadline.min(tokio::time::Instant::now() + pause);
            tokio::select! {
                () = &mut idle => {}
                () = &mut released => {}
                () = tokio::time::sleep_until(look_again) => {
                    over = look_again == deadline;
                    pause = (pause * 2).min(LOOK_AGAIN_MAX);
                }
                _ = stop.wait_for(|stopped| *stopped) => return Err(stopping()),
            }
        }
    }

    /// Wipes least recently used units that nobody holds until `need` bytes are free or none is left. Returns the bytes
    /// freed. Blocking: wiping, and for whole objects a word with the kernel.
    fn evict(self: &Arc<Self>, need: u64) -> u64 {
        let mut freed = 0;
        let mut kept = Vec::new();
        for _ in 0..EVICT_SCAN_MAX {
            if freed >= need {
                break;
            }
            let Some((unit, ())) = self.recency().pop_lru() else { break };
            let gone = match unit {
                Unit::Chunk(key, index) => self.lookup(key).and_then(|object| self.evict_chunk(&object, index)),
                Unit::Object(key) => self.lookup(key).and_then(|object| self.evict_whole(&object)),
            };
            match gone {
                Some(bytes) => freed += bytes,
                None => kept.push(unit),
            }
        }
        let mut recency = self.recency();
        for unit in kept {
            // In use, hence recent: it goes to the young end, and the next search does not meet it first again.
            recency.put(unit, ());
        }
        self.telemetry.evicted_bytes.add(freed);
        freed
    }

    fn lookup(&self, key: ObjectKey) -> Option<Arc<CachedObject>> {
        self.objects.lock().expect("a thread died holding the object table").get(&key).cloned()
    }

    /// `None` if the chunk is pinned (or part of an object that became whole meanwhile).
    fn evict_chunk(self: &Arc<Self>, object: &Arc<CachedObject>, index: ChunkIndex) -> Option<u64> {
        let (grant, file) = {
            let mut state = object.state();
            if state.phase != Phase::Partial {
                return Some(0);
            }
            match &state.chunks[index.0 as usize] {
                Chunk::Resident { pins: 0, .. } => {}
                Chunk::Resident { .. } => return None,
                _ => return Some(0),
            }
            let leaving = Chunk::Leaving { waiters: Vec::new() };
            let chunk = std::mem::replace(&mut state.chunks[index.0 as usize], leaving);
            let Chunk::Resident { grant, .. } = chunk else { unreachable!("matched above under the same lock") };
            state.resident -= 1;
            (grant, state.file.clone().expect("a resident chunk has a file"))
        };
        let measure = self.telemetry.wipe_seconds.measure();
        let wiped = file.wipe(object.layout.chunk_plain(index));
        drop(measure);
        self.left(object, index);
        match wiped {
            Ok(()) => {
                let bytes = grant.bytes();
                self.telemetry.wiped_bytes.add(bytes);
                Some(bytes)
            }
            Err(error) => {
                tracing::error!(model = %object.model.name, "{}", error.chain());
                // The memory could not be given back: keep it counted, so that the budget stays true.
                std::mem::forget(grant);
                Some(0)
            }
        }
    }

    /// The chunk is gone; whoever came while it left starts the next fill.
    fn left(self: &Arc<Self>, object: &Arc<CachedObject>, index: ChunkIndex) {
        let mut state = object.state();
        let chunk = &mut state.chunks[index.0 as usize];
        let Chunk::Leaving { waiters } = std::mem::replace(chunk, Chunk::Empty) else {
            unreachable!("only its evictor ends a leaving chunk")
        };
        if !waiters.is_empty() {
            self.begin(object, chunk, index, waiters, Urgency::Demand);
        }
    }

    /// The order matters (docs/ARCHITECTURE.md, "Eviction of a whole file"): unpublish, let the kernel forget the name, no
    /// open answered and not released, backing dropped, nobody else holds the memory, then wipe.
    fn evict_whole(self: &Arc<Self>, object: &Arc<CachedObject>) -> Option<u64> {
        {
            let mut state = object.state();
            if state.phase != Phase::Whole {
                return Some(0);
            }
            let promised = state.promised_until.is_some_and(|until| Instant::now() < until);
            if state.hot_opens > 0 || state.pinned > 0 || promised {
                return None;
            }
            state.phase = Phase::Retiring;
        }
        self.retire(object.key);
        let mut state = object.state();
        let file = state.file.clone().expect("a whole object has a file");
        let held = state.pinned > 0 || state.hot_opens > 0 || file.others_hold().unwrap_or(true);
        if held {
            state.phase = Phase::Whole;
            return None;
        }
        let mut grants = Vec::with_capacity(state.chunks.len());
        for chunk in state.chunks.iter_mut() {
            let leaving = Chunk::Leaving { waiters: Vec::new() };
            if let Chunk::Resident { grant, .. } = std::mem::replace(chunk, leaving) {
                grants.push(grant);
            }
        }
        state.file = None;
        state.resident = 0;
        state.phase = Phase::Partial;
        drop(state);
        let measure = self.telemetry.wipe_seconds.measure();
        let wiped = file.thaw_and_wipe();
        drop(measure);
        for index in 0..object.layout.chunk_count() {
            self.left(object, ChunkIndex(index as u32));
        }
        let bytes: u64 = grants.iter().map(Grant::bytes).sum();
        match wiped {
            Ok(()) => self.telemetry.wiped_bytes.add(bytes),
            Err(error) => tracing::error!(model = %object.model.name, "{}", error.chain()),
        }
        Some(bytes)
    }

    /// The object's state once no fill or eviction is under way (they end by themselves: fetches stop when told to), or as
    /// it is after [`SETTLE_DEADLINE`]. A file must not be cut short under a thread that writes into it.
    fn settled<'a>(&self, object: &'a CachedObject) -> MutexGuard<'a, State> {
        let deadline = Instant::now() + SETTLE_DEADLINE;
        loop {
            let state = object.state();
            let moving = |chunk: &Chunk| matches!(chunk, Chunk::Filling { .. } | Chunk::Leaving { .. });
            let leaves = matches!(state.phase, Phase::Retiring | Phase::Cutting);
            if !state.chunks.iter().any(moving) && !leaves || Instant::now() >= deadline {
                return state;
            }
            drop(state);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Drops an object that was wiped, and what recency is kept of it.
    pub(super) fn forget_object(&self, object: &CachedObject) {
        self.objects.lock().expect("a thread died holding the object table").remove(&object.key);
        let mut recency = self.recency();
        recency.pop(&Unit::Object(object.key));
        for index in 0..object.layout.chunk_count() {
            recency.pop(&Unit::Chunk(object.key, ChunkIndex(index as u32)));
        }
    }

    /// At the end: wipe what nobody holds, count what somebody does.
    pub(super) fn wipe_object(self: &Arc<Self>, object: &Arc<CachedObject>, unmounted: bool, report: &mut WipeReport) {
        let mut state = self.settled(object);
        let Some(file) = state.file.clone() else { return };
        let cost = state.resident * object.layout.chunk_len().min(object.layout.plain_len());
        let held = state.pinned > 0
            || (state.hot_opens > 0 && !unmounted)
            || state.chunks.iter().any(|chunk| matches!(chunk, Chunk::Filling { .. } | Chunk::Leaving { .. }))
            || state.phase == Phase::Cutting
            || (state.phase != Phase::Partial && file.others_hold().unwrap_or(true));
        if held {
            report.held_objects += 1;
            report.held_bytes += cost;
            return;
        }
        let measure = self.telemetry.wipe_seconds.measure();
        let wiped = file.thaw_and_wipe();
        drop(measure);
        match wiped {
            Ok(()) => {
                state.file = None;
                state.resident = 0;
                state.phase = Phase::Partial;
                for chunk in state.chunks.iter_mut() {
                    *chunk = Chunk::Empty;
                }
                report.wiped_bytes += cost;
                self.telemetry.wiped_bytes.add(cost);
            }
            Err(error) => {
                report.held_objects += 1;
                report.held_bytes += cost;
                tracing::error!(model = %object.model.name, "{}", error.chain());
            }
        }
    }
}
