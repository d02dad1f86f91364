//! A store that misbehaves by script: every way in which a real one may fail, lie or stall, for tests.
//!
//! In: any store, and rules of the form "the Nth call of this kind on a name like this: do that". Out: the same store,
//! broken exactly so, and a log of the calls.
//! Promises: an empty script changes nothing; a rule fires as often as it says and no more; after a death every call
//! fails, as for a publisher whose process is gone.
//! Not here: lies below HTTP (tests/hostile_http.rs). Held by: tests/store_contract.rs (empty script), the tests below.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use super::{ChunkSink, ChunkSource, Listed, ObjectWriter};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// The kinds of calls a rule can be about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    ReadRange,
    ReadSmall,
    Size,
    List,
    Create,
    Begin,
    Write,
    Finish,
    ReplaceHint,
    Delete,
}

impl Call {
    /// Whether the call changes the store: these are counted by `Faulty::die_at_write`.
    pub const fn writes(self) -> bool {
        match self {
            Call::ReadRange | Call::ReadSmall | Call::Size | Call::List => false,
            Call::Create | Call::Begin | Call::Write | Call::Finish | Call::ReplaceHint | Call::Delete => true,
        }
    }
}

/// What goes wrong. Offsets are those of the stored object, so a flipped bit is the same bit in every range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The call fails with this code: not found, denied, unreachable, ...
    Fail(Code),
    /// No answer, ever.
    Stall,
    Delay(Duration),
    /// This many bytes fewer than asked for, said to be all (a store that breaks the contract).
    Truncate(u64),
    /// This many bytes more than asked for.
    Extend(u64),
    /// Sixteen times as many bytes as asked for.
    Endless,
    FlipBit {
        offset: u64,
        bit: u8,
    },
    Zero(Range<u64>),
    /// The bytes from `start` of `name`, as many as asked for: swapped chunks, other objects, older versions.
    Instead {
        name: String,
        start: u64,
    },
    /// The range that starts this much later, or earlier.
    Shift(i64),
    /// A write is applied and its answer lost.
    AppliedButLost,
    /// A create replaces what is there.
    IgnoreCreateOnly,
}

/// On which side of its last write the publisher dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// The write never reached the store.
    Before,
    /// The write was applied; nobody heard the answer.
    After,
}

#[derive(Debug, Clone)]
struct Rule {
    call: Option<Call>,
    name_part: String,
    skip: u32,
    left: u32,
    fault: Fault,
}

/// When a fault strikes. Starts as "every call of every kind on every name".
#[derive(Debug, Clone)]
pub struct When {
    call: Option<Call>,
    name_part: String,
    skip: u32,
    times: u32,
}

impl When {
    pub fn any() -> Self {
        When { call: None, name_part: String::new(), skip: 0, times: u32::MAX }
    }

    pub fn call(call: Call) -> Self {
        When { call: Some(call), ..When::any() }
    }

    /// Only names that contain `part`.
    pub fn name(mut self, part: &str) -> Self {
        part.clone_into(&mut self.name_part);
        self
    }

    /// Not the first `calls` that match.
    pub fn after(mut self, calls: u32) -> Self {
        self.skip = calls;
        self
    }

    /// At most this many times.
    pub fn times(mut self, times: u32) -> Self {
        self.times = times;
        self
    }

    pub fn once(self) -> Self {
        self.times(1)
    }
}

#[derive(Debug, Default)]
struct Script {
    rules: Vec<Rule>,
    death: Option<(u32, Death)>,
    dead: bool,
    writes: u32,
    log: Vec<(Call, String)>,
}

/// A store over `inner` that follows a script. Clones share it.
#[derive(Debug)]
pub struct Faulty<S> {
    inner: Arc<S>,
    script: Arc<Mutex<Script>>,
}

impl<S> Clone for Faulty<S> {
    fn clone(&self) -> Self {
        Faulty { inner: Arc::clone(&self.inner), script: Arc::clone(&self.script) }
    }
}

impl<S> Faulty<S> {
    pub fn new(inner: S) -> Self {
        Faulty { inner: Arc::new(inner), script: Arc::default() }
    }

    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Adds a rule; of several that match a call, the first one added fires.
    pub fn on(&self, when: When, fault: Fault) {
        let When { call, name_part, skip, times } = when;
        self.script().rules.push(Rule { call, name_part, skip, left: times, fault });
    }

    /// The publisher dies at write number `write` (from 0), on this side of it; every later call fails as well.
    pub fn die_at_write(&self, write: u32, side: Death) {
        self.script().death = Some((write, side));
    }

    /// Forgets all rules, deaths and counts; the log stays.
    pub fn heal(&self) {
        let mut script = self.script();
        let log = std::mem::take(&mut script.log);
        *script = Script { log, ..Script::default() };
    }

    /// Every call so far, in order, whatever became of it.
    pub fn log(&self) -> Vec<(Call, String)> {
        self.script().log.clone()
    }

    /// How many calls of this kind there were.
    pub fn count(&self, call: Call) -> usize {
        self.script().log.iter().filter(|(seen, _)| *seen == call).count()
    }

    /// How many writing calls there were: the number of places to die at.
    pub fn writes(&self) -> u32 {
        self.script().writes
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().expect("no thread panics while it holds the script")
    }

    /// Notes the call and answers what is to go wrong with it.
    fn strike(&self, call: Call, name: &str) -> Strike {
        let mut script = self.script();
        script.log.push((call, name.to_owned()));
        if script.dead {
            return Strike::Dead;
        }
        if call.writes() {
            let this = script.writes;
            script.writes += 1;
            if let Some((_, side)) = script.death.filter(|(at, _)| *at == this) {
                script.dead = true;
                return if side == Death::Before { Strike::Dead } else { Strike::DiesAfter };
            }
        }
        for rule in &mut script.rules {
            if rule.call.is_some_and(|wanted| wanted != call) || !name.contains(&rule.name_part) || rule.left == 0 {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            rule.left -= 1;
            return Strike::Fault(rule.fault.clone());
        }
        Strike::None
    }

    /// The faults that concern calls of every kind; what is left concerns the answer of this one.
    async fn enter(&self, call: Call, name: &str) -> Result<Option<Fault>> {
        match self.strike(call, name) {
            Strike::None => Ok(None),
            Strike::Dead => Err(dead()),
            Strike::DiesAfter => Ok(Some(Fault::AppliedButLost)),
            Strike::Fault(Fault::Fail(code)) => Err(Error::new(code, format!("scripted fault on {call:?} {name}"))),
            Strike::Fault(Fault::Stall) => std::future::pending().await,
            Strike::Fault(Fault::Delay(time)) => {
                tokio::time::sleep(time).await;
                Ok(None)
            }
            Strike::Fault(other) => Ok(Some(other)),
        }
    }

    /// The answer to a writing call that was applied.
    fn leave(fault: Option<Fault>, result: Result<()>) -> Result<()> {
        match fault {
            Some(Fault::AppliedButLost) => refuse!(Deadline, "scripted fault: applied, and the answer lost"),
            _ => result,
        }
    }
}

enum Strike {
    None,
    Fault(Fault),
    DiesAfter,
    Dead,
}

fn dead() -> Error {
    Error::new(Code::Unreachable, "scripted death of this process")
}

fn join(pieces: &[Bytes]) -> BytesMut {
    let mut whole = BytesMut::new();
    pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
    whole
}

/// Applies a fault to the answer `bytes`, which starts at `start` of its object.
fn spoil(fault: Fault, start: u64, bytes: &mut BytesMut) {
    match fault {
        Fault::Truncate(fewer) => bytes.truncate(bytes.len().saturating_sub(fewer as usize)),
        Fault::Extend(more) => bytes.resize(bytes.len() + more as usize, 0xEE),
        Fault::Endless => bytes.resize(bytes.len() * 16, 0xEE),
        Fault::FlipBit { offset, bit } => {
            let at = offset.checked_sub(start).and_then(|at| bytes.get_mut(at as usize));
            if let Some(byte) = at {
                *byte ^= 1 << (bit % 8);
            }
        }
        Fault::Zero(range) => {
            let end = range.end.saturating_sub(start).min(bytes.len() as u64) as usize;
            let first = range.start.saturating_sub(start).min(end as u64) as usize;
            bytes[first..end].fill(0);
        }
        // These are about the call, not about its answer.
        Fault::Fail(_)
        | Fault::Stall
        | Fault::Delay(_)
        | Fault::Instead { .. }
        | Fault::Shift(_)
        | Fault::AppliedButLost
        | Fault::IgnoreCreateOnly => {}
    }
}

#[async_trait]
impl<S: ChunkSink + 'static> ChunkSource for Faulty<S> {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        let Some(fault) = self.enter(Call::ReadRange, name).await? else {
            return self.inner.read_range(name, range).await;
        };
        let pieces = match &fault {
            Fault::Instead { name, start } => {
                self.inner.read_range(name, *start..*start + (range.end - range.start)).await?
            }
            Fault::Shift(by) => {
                let start = range.start.saturating_add_signed(*by);
                self.inner.read_range(name, start..start + (range.end - range.start)).await?
            }
            _ => self.inner.read_range(name, range.clone()).await?,
        };
        let mut bytes = join(&pieces);
        spoil(fault, range.start, &mut bytes);
        Ok(vec![bytes.freeze()])
    }

    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        let Some(fault) = self.enter(Call::ReadSmall, name).await? else {
            return self.inner.read_small(name, max).await;
        };
        let from = if let Fault::Instead { name, .. } = &fault { name } else { name };
        let mut bytes = join(&[self.inner.read_small(from, max).await?]);
        spoil(fault, 0, &mut bytes);
        if bytes.len() as u64 > max {
            refuse!(Limit, "object {name} is longer than {max} bytes");
        }
        Ok(bytes.freeze())
    }

    async fn size(&self, name: &str) -> Result<u64> {
        let fault = self.enter(Call::Size, name).await?;
        let size = self.inner.size(name).await?;
        Ok(match fault {
            Some(Fault::Truncate(fewer)) => size.saturating_sub(fewer),
            Some(Fault::Extend(more)) => size + more,
            _ => size,
        })
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        self.enter(Call::List, prefix).await?;
        self.inner.list(prefix).await
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.enter(Call::List, prefix).await?;
        self.inner.list_dirs(prefix).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[async_trait]
impl<S: ChunkSink + 'static> ChunkSink for Faulty<S> {
    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        let fault = self.enter(Call::Create, name).await?;
        let result = match fault {
            Some(Fault::IgnoreCreateOnly) => self.inner.replace_hint(name, bytes).await,
            _ => self.inner.create(name, bytes).await,
        };
        Self::leave(fault, result)
    }

    async fn begin(&self, name: &str, stored_len_max: u64) -> Result<Box<dyn ObjectWriter>> {
        let fault = self.enter(Call::Begin, name).await?;
        let inner = self.inner.begin(name, stored_len_max).await?;
        Self::leave(fault, Ok(()))?;
        Ok(Box::new(Writer { faulty: self.clone(), name: name.to_owned(), inner }))
    }

    async fn replace_hint(&self, name: &str, bytes: Bytes) -> Result<()> {
        let fault = self.enter(Call::ReplaceHint, name).await?;
        Self::leave(fault, self.inner.replace_hint(name, bytes).await)
    }

    async fn delete(&self, name: &str) -> Result<()> {
        let fault = self.enter(Call::Delete, name).await?;
        Self::leave(fault, self.inner.delete(name).await)
    }
}

struct Writer<S> {
    faulty: Faulty<S>,
    name: String,
    inner: Box<dyn ObjectWriter>,
}

#[async_trait]
impl<S: ChunkSink + 'static> ObjectWriter for Writer<S> {
    async fn write(&mut self, piece: Bytes) -> Result<()> {
        let fault = self.faulty.enter(Call::Write, &self.name).await?;
        Faulty::<S>::leave(fault, self.inner.write(piece).await)
    }

    async fn finish(self: Box<Self>, stored_len: u64) -> Result<()> {
        let fault = self.faulty.enter(Call::Finish, &self.name).await?;
        Faulty::<S>::leave(fault, self.inner.finish(stored_len).await)
    }

    async fn abort(self: Box<Self>) {
        // A dead process aborts nothing; what it began is dropped, as its memory is.
        if !self.faulty.script().dead {
            self.inner.abort().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::MemoryStore;
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
    }

    #[test]
    fn rules_fire_when_they_say_and_no_more() {
        runtime().block_on(async {
            let store = Faulty::new(MemoryStore::new());
            store.inner().put("a/x", vec![0_u8; 100]);
            store.on(When::call(Call::ReadRange).name("a/").after(1).once(), Fault::FlipBit { offset: 15, bit: 0 });
            for (call, wanted) in [(0, 0), (1, 1), (2, 0)] {
                let pieces = store.read_range("a/x", 10..20).await.expect("served");
                assert_eq!(pieces[0][5], wanted, "call {call}");
            }
            store.on(When::call(Call::ReadRange).once(), Fault::Fail(Code::NotFound));
            assert_eq!(store.read_range("a/x", 0..1).await.expect_err("scripted").code(), Code::NotFound);
            assert_eq!(store.count(Call::ReadRange), 4);
        });
    }

    #[test]
    fn a_dead_process_does_nothing_more() {
        runtime().block_on(async {
            for (side, there) in [(Death::Before, false), (Death::After, true)] {
                let store = Faulty::new(MemoryStore::new());
                store.die_at_write(1, side);
                store.create("a", Bytes::from_static(b"1")).await.expect("write 0 is before");
                store.create("b", Bytes::from_static(b"2")).await.expect_err("write 1 kills");
                store.create("c", Bytes::from_static(b"3")).await.expect_err("dead");
                store.size("a").await.expect_err("dead");
                assert_eq!(store.inner().get("b").is_some(), there);
                assert!(store.inner().get("c").is_none());
            }
        });
    }
}
