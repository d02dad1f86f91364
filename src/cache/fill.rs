//! From a wish for a chunk to verified, published plaintext: one task a chunk, however many wait for it.
//!
//! Promises: a fill outlives its waiters; the only writer of a chunk's memory is its one fill; a chunk is published, or
//! wiped and refused, never half of either.

use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, SemaphorePermit, oneshot};

use super::residency::NEVER;
use super::{CachedObject, Chunk, Model, Phase, Pin, Shared, State, Unit, Urgency, Waiter, stopping};
use crate::crypto;
use crate::error::{Class, Code, Error, Result};
use crate::format::{ChunkIndex, FileEntry};
use crate::mem::{self, Arena, Grant, LockedFile, Pages};
use crate::store::{self, CipherChunk};
use crate::telemetry::events::{Event, Kind, Severity, Subject};

/// The places that a fill takes among those under way.
type Permits<'a> = Vec<SemaphorePermit<'a>>;

pub(super) enum Joined {
    Ready(Pin),
    Wait(oneshot::Receiver<Result<Pin>>),
    Failed(Error),
    /// The object is being taken away: to be asked again once it is gone.
    Cutting,
}

impl Shared {
    /// A pin if resident, the refusal if it is fresh, else a place in the line of the (started) fill.
    pub(super) fn join(self: &Arc<Self>, object: &Arc<CachedObject>, index: ChunkIndex) -> Joined {
        if *self.stop.borrow() {
            return Joined::Failed(stopping());
        }
        if object.model.is_locked() {
            return Joined::Failed(object.model.locked_error());
        }
        let mut state = object.state();
        let state = &mut *state;
        if state.phase == Phase::Cutting {
            return Joined::Cutting;
        }
        let chunk = &mut state.chunks[index.0 as usize];
        match chunk {
            Chunk::Resident { pins, read, .. } => {
                *pins += 1;
                *read = self.rounds.now();
                state.pinned += 1;
                let file = state.file.clone().expect("a resident chunk has a file");
                return Joined::Ready(Pin { object: object.clone(), index, file });
            }
            Chunk::Failed { until, error } if Instant::now() < *until => return Joined::Failed((**error).clone()),
            Chunk::Filling { waiters, hurry } => {
                let (sender, receiver) = oneshot::channel();
                waiters.push(sender);
                hurry.notify_one();
                return Joined::Wait(receiver);
            }
            Chunk::Leaving { waiters } => {
                let (sender, receiver) = oneshot::channel();
                waiters.push(sender);
                return Joined::Wait(receiver);
            }
            Chunk::Empty | Chunk::Failed { .. } => {}
        }
        let (sender, receiver) = oneshot::channel();
        self.begin(object, chunk, index, vec![sender], Urgency::Demand);
        Joined::Wait(receiver)
    }

    pub(super) fn start(self: &Arc<Self>, object: &Arc<CachedObject>, index: ChunkIndex, urgency: Urgency) {
        if *self.stop.borrow() || object.model.is_locked() {
            return;
        }
        let mut state = object.state();
        let chunk = &mut state.chunks[index.0 as usize];
        match chunk {
            Chunk::Empty => self.begin(object, chunk, index, Vec::new(), urgency),
            Chunk::Failed { until, .. } if Instant::now() >= *until => {
                self.begin(object, chunk, index, Vec::new(), urgency);
            }
            Chunk::Filling { hurry, .. } if urgency == Urgency::Demand => hurry.notify_one(),
            Chunk::Filling { .. } | Chunk::Resident { .. } | Chunk::Leaving { .. } | Chunk::Failed { .. } => {}
        }
    }

    /// Marks the chunk as filling and sends a task after it. The task outlives every waiter, so that a reader that goes
    /// away never cancels the fetch of another.
    pub(super) fn begin(
        self: &Arc<Self>,
        object: &Arc<CachedObject>,
        chunk: &mut Chunk,
        index: ChunkIndex,
        waiters: Vec<Waiter>,
        urgency: Urgency,
    ) {
        let hurry = Arc::new(Notify::new());
        *chunk = Chunk::Filling { waiters, hurry: hurry.clone() };
        let (shared, object) = (self.clone(), object.clone());
        self.runtime.spawn(async move {
            let outcome = shared.fill(&object, index, urgency, &hurry).await;
            shared.finish(&object, index, urgency, outcome);
        });
    }

    /// Room, fetch, open; one refetch after a wrong hash or length, since the store may have erred. A wrong length that
    /// the store itself noticed is not asked for again here: its patience did that. `None`: everyone who had waited gave
    /// up before it began. A lock of the model ends it wherever it waits.
    async fn fill(
        self: &Arc<Self>,
        object: &Arc<CachedObject>,
        index: ChunkIndex,
        urgency: Urgency,
        hurry: &Notify,
    ) -> Result<Option<Grant>> {
        let model = &object.model;
        let turn = tokio::select! {
            biased;
            () = model.until_locked() => return Err(model.locked_error()),
            turn = self.turn(object, index, urgency, hurry) => turn?,
        };
        let Some((_permits, grant)) = turn else { return Ok(None) };
        let file = self.file_of(object)?;
        let mut refetched = false;
        let error = loop {
            let cipher = match self.fetch(object, index).await {
                Ok(cipher) => cipher,
                Err(error) => break error,
            };
            match self.open(object, index, cipher, &file).await {
                Ok(()) if model.is_locked() => break model.locked_error(),
                Ok(()) => return Ok(Some(grant)),
                Err(error) if !refetched && matches!(error.code(), Code::ChunkHash | Code::Length) => {
                    tracing::warn!(code = %error.code(), model = %object.model.name, "{}; fetching it once more", error.chain());
                    self.telemetry.refetches.inc();
                    self.tell_tampered(object, index, &error, Severity::High);
                    refetched = true;
                }
                Err(error) => break error,
            }
        };
        file.wipe(object.layout.chunk_plain(index))?;
        Err(error)
    }

    /// A place among the fetches, then room. `None`: nobody waits for the chunk any more.
    async fn turn<'a>(
        self: &'a Arc<Self>,
        object: &Arc<CachedObject>,
        index: ChunkIndex,
        mut urgency: Urgency,
        hurry: &Notify,
    ) -> Result<Option<(Permits<'a>, Grant)>> {
        let mut permits = Vec::with_capacity(2);
        if urgency == Urgency::Prefetch {
            tokio::select! {
                permit = self.prefetch_permits.acquire() => permits.push(permit.map_err(|_| stopping())?),
                () = hurry.notified() => urgency = Urgency::Demand,
            }
        }
        permits.push(self.all_permits.acquire().await.map_err(|_| stopping())?);
        // When a store falls silent, fills queue up faster than they end. Their turn belongs to those still waited for.
        if object.state().chunks[index.0 as usize].is_given_up() {
            return Ok(None);
        }
        let grant = self.room(object.cost(index), urgency, hurry).await?;
        Ok(Some((permits, grant)))
    }

    async fn fetch(&self, object: &CachedObject, index: ChunkIndex) -> Result<CipherChunk> {
        let model = &object.model;
        let mut stop = self.stop.subscribe();
        self.telemetry.fetch_requests.inc();
        let started = Instant::now();
        model.vitals.asked(started);
        let fetched = tokio::select! {
            fetched = store::fetch_chunk(&*model.source, &model.manifest, object.key.object, index) => fetched,
            _ = stop.wait_for(|stopped| *stopped) => return Err(stopping()),
            () = model.until_locked() => return Err(model.locked_error()),
        };
        let cipher = fetched.inspect_err(|error| {
            self.telemetry.fetch_errors.inc();
            self.count_refusal(error);
            self.store_silent(model, error);
        })?;
        self.store_answers(model);
        self.telemetry.fetch_seconds.add(started.elapsed());
        self.telemetry.fetch_bytes.add(cipher.pieces.iter().map(|p| p.len() as u64).sum());
        Ok(cipher)
    }

    async fn open(
        &self,
        object: &Arc<CachedObject>,
        index: ChunkIndex,
        cipher: CipherChunk,
        file: &Arc<LockedFile>,
    ) -> Result<()> {
        let (sender, receiver) = oneshot::channel();
        let model = object.model.clone();
        let (object, file, telemetry) = (object.clone(), file.clone(), self.telemetry.clone());
        let arena = self.arena.clone();
        let plain = object.layout.chunk_plain(index);
        self.openers.submit(Box::new(move |scratch| {
            let measure = telemetry.open_seconds.measure();
            let outcome = open_into(&object, index, &cipher, &file, scratch, &arena);
            drop(measure);
            // Before anyone is woken: who waits may look at what memory is in use.
            drop(cipher);
            // The receiver lives as long as the fill task, which never stops early.
            let _ = sender.send(outcome);
        }))?;
        let outcome = receiver.await.map_err(|_| stopping())?;
        match &outcome {
            Ok(()) => {
                self.telemetry.chunks_opened.inc();
                self.telemetry.opened_bytes.add(plain.end - plain.start);
                model.vitals.came(Instant::now(), plain.end - plain.start);
            }
            Err(error) => self.count_refusal(error),
        }
        outcome
    }

    /// Tells of a store that does not answer, once.
    fn store_silent(&self, model: &Model, error: &Error) {
        if error.class() != Class::Unreachable || error.code() == Code::Stopping {
            return;
        }
        let store = store_of(model);
        if self.telemetry.stores.fell_silent(&store) {
            let event = Event::new(Kind::StoreDown).subject(of_store(&store)).error(error);
            self.telemetry.events.tell(&event);
        }
    }

    fn store_answers(&self, model: &Model) {
        if self.telemetry.stores.all_answer() {
            return;
        }
        let store = store_of(model);
        if let Some(silent) = self.telemetry.stores.answered(&store) {
            let detail = format!("after {:.1} s", silent.as_secs_f64());
            let event = Event::new(Kind::StoreUp).subject(of_store(&store)).detail(detail);
            self.telemetry.events.tell(&event);
        }
    }

    fn count_refusal(&self, error: &Error) {
        match error.code() {
            Code::ChunkHash => self.telemetry.hash_failures.inc(),
            Code::Tag => self.telemetry.tag_failures.inc(),
            Code::Length => self.telemetry.length_failures.inc(),
            _ => {}
        }
    }

    /// The object's memory file, made on first use.
    fn file_of(&self, object: &CachedObject) -> Result<Arc<LockedFile>> {
        let mut state = object.state();
        if let Some(file) = &state.file {
            return Ok(file.clone());
        }
        let file = Arc::new(self.arena.create(object.layout.plain_len(), object.pages)?);
        state.file = Some(file.clone());
        Ok(file)
    }

    /// Publishes a filled chunk, or remembers its refusal, and answers everyone who waits.
    fn finish(
        self: &Arc<Self>,
        object: &Arc<CachedObject>,
        index: ChunkIndex,
        urgency: Urgency,
        outcome: Result<Option<Grant>>,
    ) {
        let mut state = object.state();
        let chunk = std::mem::replace(&mut state.chunks[index.0 as usize], Chunk::Empty);
        let Chunk::Filling { waiters, .. } = chunk else { unreachable!("only its fill ends a filling chunk") };
        if let Err(error) = &outcome
            && error.code() == Code::NoRoom
            && urgency == Urgency::Prefetch
            && !waiters.is_empty()
        {
            // Prefetch gave up just when a reader came to wait: for a reader it is worth waiting.
            return self.begin(object, &mut state.chunks[index.0 as usize], index, waiters, Urgency::Demand);
        }
        let answer = match outcome {
            Ok(None) => {
                // Somebody may have come since.
                if waiters.iter().any(|waiter| !waiter.is_closed()) {
                    self.begin(object, &mut state.chunks[index.0 as usize], index, waiters, Urgency::Demand);
                }
                return;
            }
            Ok(Some(grant)) => {
                let read = if waiters.is_empty() { NEVER } else { self.rounds.now() };
                state.chunks[index.0 as usize] = Chunk::Resident { grant, pins: waiters.len() as u32, read };
                state.resident += 1;
                state.pinned += waiters.len() as u64;
                Ok(state.file.clone().expect("a filled chunk has a file"))
            }
            Err(error) => {
                state.chunks[index.0 as usize] = match self.memory_of(&error) {
                    Some(memory) => Chunk::Failed { until: Instant::now() + memory, error: Box::new(error.clone()) },
                    None => Chunk::Empty,
                };
                Err(error)
            }
        };
        let whole = answer.is_ok() && self.freeze_if_whole(object, &mut state);
        drop(state);
        match &answer {
            Ok(_) if whole => self.publish_whole(object),
            Ok(_) => {
                self.remember(Unit::Chunk(object.key, index));
                self.idle.notify_waiters();
            }
            // Nobody waits for a prefetch that found no room.
            Err(error) if error.code() == Code::NoRoom && waiters.is_empty() => {}
            Err(error) => {
                report(object, error);
                if error.class() == Class::Tampered {
                    self.tell_tampered(object, index, error, Severity::Critical);
                }
            }
        }
        for waiter in waiters {
            let message = match &answer {
                Ok(file) => Ok(Pin { object: object.clone(), index, file: file.clone() }),
                Err(error) => Err(error.clone()),
            };
            // A reader that went away drops its pin here, outside every lock.
            drop(waiter.send(message));
        }
    }

    /// Somebody has to answer for bytes that are not those that were signed. Where: object, chunk, and the first file in it.
    fn tell_tampered(&self, object: &CachedObject, index: ChunkIndex, error: &Error, severity: Severity) {
        if !self.telemetry.events.any() {
            return;
        }
        let (model, plain) = (&object.model, object.layout.chunk_plain(index));
        let manifest = &model.manifest;
        let holds = |file: &&FileEntry| {
            let mut extents = manifest.extents(file).iter().filter(|extent| extent.object == object.key.object);
            extents.any(|extent| extent.object_offset < plain.end && extent.object_offset + extent.len > plain.start)
        };
        let file = manifest.files().iter().find(holds).map(|file| manifest.path(file).to_string());
        let subject = Subject { store: Some(model.source.describe()), file, ..model.subject() };
        let oid = manifest.objects()[object.key.object as usize].oid;
        let then = if severity == Severity::Critical { "refused" } else { "asked for once more" };
        let detail = format!("chunk {} of object {oid}: {then}: {}", index.0, error.chain());
        self.telemetry
            .events
            .tell(&Event::new(Kind::Tamper).subject(subject).error(error).severity(severity).detail(detail));
    }

    fn memory_of(&self, error: &Error) -> Option<Duration> {
        match error.class() {
            Class::Tampered | Class::Changed | Class::NotFound => Some(self.limits.refusal_memory),
            // Over as soon as the model is unlocked.
            _ if matches!(error.code(), Code::Stopping | Code::Locked) => None,
            Class::Unreachable | Class::Denied => Some(self.limits.outage_memory),
            Class::NoRoom | Class::Held | Class::Usage | Class::Insecure | Class::Host => None,
        }
    }

    fn freeze_if_whole(&self, object: &CachedObject, state: &mut State) -> bool {
        if !object.hot_capable || state.phase != Phase::Partial || state.resident != state.chunks.len() as u64 {
            return false;
        }
        let file = state.file.as_ref().expect("a whole object has a file");
        match file.freeze() {
            Ok(()) => {
                state.phase = Phase::Whole;
                true
            }
            Err(error) => {
                // Still correct, only slower: the object stays served through the daemon.
                tracing::warn!(model = %object.model.name, "{}", error.chain());
                false
            }
        }
    }

    fn publish_whole(&self, object: &Arc<CachedObject>) {
        let mut recency = self.recency();
        for index in 0..object.layout.chunk_count() {
            recency.pop(&Unit::Chunk(object.key, ChunkIndex(index as u32)));
        }
        recency.put(Unit::Object(object.key), ());
        drop(recency);
        let waiters = std::mem::take(&mut object.state().whole_waiters);
        let (gates, key) = (self.gates(), object.key);
        self.runtime.spawn_blocking(move || gates.iter().for_each(|gate| gate.published(key)));
        for waiter in waiters {
            // A caller that went away does not need the answer.
            let _ = waiter.send(());
        }
    }
}

/// One line a refusal, with the object and nothing secret; repeats are kept away by the refusal memory.
fn store_of(model: &Model) -> String {
    model.vitals.store().map_or_else(|| model.source.describe(), str::to_owned)
}

fn of_store(store: &str) -> Subject {
    Subject { store: Some(store.to_owned()), ..Subject::default() }
}

fn report(object: &CachedObject, error: &Error) {
    match error.class() {
        // Said once, by whoever locked it.
        _ if error.code() == Code::Locked => {}
        Class::Tampered => tracing::error!(code = %error.code(), model = %object.model.name, "{}", error.chain()),
        _ => tracing::warn!(code = %error.code(), model = %object.model.name, "{}", error.chain()),
    }
}

/// Hashes and opens one chunk straight into its place. Runs on an opener thread.
fn open_into(
    object: &CachedObject,
    index: ChunkIndex,
    cipher: &CipherChunk,
    file: &LockedFile,
    scratch: &mut Scratch,
    arena: &Arena,
) -> Result<()> {
    let keys = object.model.keys.read().expect("a thread died holding the keys");
    let Some(keys) = keys.as_ref() else { return Err(object.model.locked_error()) };
    // SAFETY: the chunk is in state Filling, whose one task sent us here; nobody reads or writes this range until that
    // task publishes it.
    let slot = unsafe { file.slot(object.layout.chunk_plain(index))? };
    let Model { manifest, verify, .. } = &*object.model;
    let scratch = scratch.room(arena, crypto::scratch_len(&manifest.objects()[object.key.object as usize]))?;
    crypto::open_chunk(keys, manifest, object.key.object, cipher, *verify, slot, scratch)
}

type Job = Box<dyn FnOnce(&mut Scratch) + Send>;

/// What an opener's scratch takes for chunks in blocks of the usual sizes: a segment and a window. Longer blocks, which
/// no writer of ours chooses unasked, take up to 1 MiB more.
pub(super) const SCRATCH_BYTES: usize = 512 << 10;

/// An opener's own piece of locked memory, which coded chunks pass through; made when the first one comes. `open_chunk`
/// leaves it wiped.
#[derive(Default)]
struct Scratch(Option<LockedFile>);

impl Scratch {
    fn room(&mut self, arena: &Arena, len: usize) -> Result<&mut [u8]> {
        if len == 0 {
            return Ok(&mut []);
        }
        if self.0.as_ref().is_none_or(|file| file.len() < len as u64) {
            self.0 = Some(arena.create(len.max(SCRATCH_BYTES) as u64, Pages::Small)?);
        }
        let file = self.0.as_ref().expect("made above");
        // SAFETY: the file is this thread's alone, and the slice borrows from `self`: there is one at a time.
        unsafe { file.slot(0..len as u64) }
    }
}

/// Ample for hashing and opening, small enough to lock.
pub(super) const OPENER_STACK_BYTES: usize = 256 << 10;

/// A fixed pool of threads whose stacks are locked: key schedules touch them.
pub(super) struct Openers {
    queue: mpsc::Sender<Job>,
}

impl Openers {
    pub(super) fn start(threads: usize) -> Result<Self> {
        let (queue, jobs) = mpsc::channel::<Job>();
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 0..threads {
            let jobs = jobs.clone();
            std::thread::Builder::new()
                .name(format!("open-{number}"))
                .stack_size(OPENER_STACK_BYTES)
                .spawn(move || {
                    if let Err(error) = mem::lock_thread_stack() {
                        tracing::warn!("key schedules may touch memory that can be swapped: {}", error.chain());
                    }
                    let mut scratch = Scratch::default();
                    loop {
                        let job = jobs.lock().expect("an opener died holding the queue").recv();
                        match job {
                            Ok(job) => job(&mut scratch),
                            // The cache is gone.
                            Err(mpsc::RecvError) => return,
                        }
                    }
                })
                .map_err(|e| Error::new(Code::Host, "cannot start a thread to open chunks").with_source(e))?;
        }
        Ok(Openers { queue })
    }

    fn submit(&self, job: Job) -> Result<()> {
        self.queue.send(job).map_err(|_| stopping())
    }
}
