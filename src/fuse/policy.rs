//! The open policy: which opens wait for the whole file, for how long, and what a read through the daemon shows.
//!
//! In: who opens or reads which file. Out: how long an open may be held, and fills started ahead of readers.
//! Promises: no open is held without a bound; a first look at a file is never taken for a load.
//! Not here: what was seen of programs (`read::habits`), how an open is answered (the parent).
//! Held by: the tests below, tests/mount.rs.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::Inner;
use crate::cache::CachedObject;
use crate::error::{Code, Error, Result};
use crate::read::OpenFile;
use crate::read::habits::{Habits, Reason, Step, Walk, Who, is_configuration};
use crate::vfs::NodeId;

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

impl Inner {
    /// How long an open of this cold object may wait for the whole of it, by policy; `None`: not at all.
    pub(super) fn hold(&self, node: NodeId, object: &Arc<CachedObject>, who: Option<Who>) -> Option<Duration> {
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
    pub(super) fn who(&self, thread: u32, node: NodeId, is_large: bool) -> Option<Who> {
        if self.behaviour.open != OpenPolicy::Auto {
            return None;
        }
        let configuration = self.vfs.file_name(node).is_some_and(|name| is_configuration(&name));
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
    pub(super) fn observe(&self, node: NodeId, file: &OpenFile, who: Who, walk: &Mutex<Walk>, offset: u64, len: usize) {
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

    pub(super) fn note_whole(&self, node: NodeId) {
        if let Some((model, file, _)) = self.vfs.file(node) {
            self.reader.note_whole(&model, file);
        }
    }

    /// Waits until the object is whole, for `hold` at most, and with `auto` no longer than it looks as if that were enough.
    /// The fill goes on either way.
    pub(super) async fn wait_whole(&self, object: &Arc<CachedObject>, hold: Duration) -> bool {
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
