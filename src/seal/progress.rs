//! How far a seal has come, for whoever draws a bar.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a seal is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Listing the source.
    Scan,
    /// Hashing files that may be those of the earlier version.
    Compare,
    /// Reading, encrypting, writing.
    Seal,
    /// Reading back what was written.
    Verify,
    /// Writing the ref.
    Publish,
}

/// Bytes of plaintext (`Compare`, `Seal`) or of stored chunks (`Verify`); in the other phases both are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// Called from any thread, often; must return at once.
#[derive(Clone)]
pub struct ProgressFn(Arc<dyn Fn(Progress) + Send + Sync>);

impl ProgressFn {
    pub fn new(tell: impl Fn(Progress) + Send + Sync + 'static) -> ProgressFn {
        ProgressFn(Arc::new(tell))
    }

    pub fn silent() -> ProgressFn {
        ProgressFn::new(|_| {})
    }
}

impl fmt::Debug for ProgressFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProgressFn")
    }
}

/// Counts one phase.
pub(crate) struct Meter {
    phase: Phase,
    done_bytes: AtomicU64,
    total_bytes: u64,
    tell: ProgressFn,
}

impl Meter {
    pub fn start(tell: &ProgressFn, phase: Phase, total_bytes: u64) -> Arc<Meter> {
        let meter = Meter { phase, done_bytes: AtomicU64::new(0), total_bytes, tell: tell.clone() };
        meter.add(0);
        Arc::new(meter)
    }

    pub fn add(&self, bytes: u64) {
        let done_bytes = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.tell.0)(Progress { phase: self.phase, done_bytes, total_bytes: self.total_bytes });
    }
}
