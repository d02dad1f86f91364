//! Whether the cache's pages are really huge, and what is done when they are not.
//!
//! In: what the kernel counts as fallen back, what gathering pages came to. Out: bytes in small pages now and bytes
//! gathered so far, for `status` and metrics; leave to try.
//! Why: a kernel whose free memory is in pieces gives 4 KiB pages in place of a huge one without a word, and a byte in
//! them is filled and read at half the speed or less (docs/PERFORMANCE.md). It counts each time it does; when the count
//! moves, `LockedFile` asks for the pages to be gathered (MADV_COLLAPSE, which moves other pages out of the way, as
//! compaction by hand would, but only for what is needed).
//! Held by: the tests of `arena`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the kernel could not give in huge pages of 2 MiB: no free piece, or no room in the memory cgroup.
const COUNTERS: [&str; 2] = [
    "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/stats/shmem_fallback",
    "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/stats/shmem_fallback_charge",
];

/// Failures in a row after which gathering rests: each may cost the kernel milliseconds of moving pages about.
const FAILURES_MAX: u32 = 8;
const REST: Duration = Duration::from_secs(10);

static SHORT_BYTES: AtomicU64 = AtomicU64::new(0);
static GATHERED_BYTES: AtomicU64 = AtomicU64::new(0);
static FAILURES: AtomicU32 = AtomicU32::new(0);
/// Milliseconds after `start()` until which nothing is tried.
static REST_UNTIL_MS: AtomicU64 = AtomicU64::new(0);

/// Cached bytes that lie in small pages now although huge ones were asked for.
pub fn huge_page_short_bytes() -> u64 {
    SHORT_BYTES.load(Ordering::Relaxed)
}

/// Cached bytes that the kernel first gave in small pages and then gathered into huge ones, since the start.
pub fn huge_page_gathered_bytes() -> u64 {
    GATHERED_BYTES.load(Ordering::Relaxed)
}

/// How often any program of this machine got small pages for a huge one; moves whenever we do. Zero where the kernel
/// (before 6.10) does not count. About a microsecond.
pub(super) fn fallbacks() -> u64 {
    static OPENED: OnceLock<[Option<File>; 2]> = OnceLock::new();
    let files = OPENED.get_or_init(|| COUNTERS.map(|path| File::open(path).ok()));
    files.iter().flatten().filter_map(read_number).sum()
}

fn read_number(file: &File) -> Option<u64> {
    let mut text = [0; 24];
    let len = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..len]).ok()?.trim().parse().ok()
}

fn now_ms() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_millis() as u64
}

pub(super) fn may_gather() -> bool {
    now_ms() >= REST_UNTIL_MS.load(Ordering::Relaxed)
}

/// How an attempt ended; `bytes` are those it was about.
pub(super) fn tell(gathered: bool, bytes: u64) {
    if gathered {
        FAILURES.store(0, Ordering::Relaxed);
        GATHERED_BYTES.fetch_add(bytes, Ordering::Relaxed);
    } else if FAILURES.fetch_add(1, Ordering::Relaxed) + 1 == FAILURES_MAX {
        FAILURES.store(0, Ordering::Relaxed);
        REST_UNTIL_MS.store(now_ms() + REST.as_millis() as u64, Ordering::Relaxed);
    }
}

pub(super) fn count_short(bytes: u64) {
    static TOLD: OnceLock<()> = OnceLock::new();
    SHORT_BYTES.fetch_add(bytes, Ordering::Relaxed);
    TOLD.get_or_init(|| {
        tracing::warn!(
            "memory is fragmented: part of the cache lies in 4 KiB pages, which are filled and read at half the speed; \
             `echo 1 > /proc/sys/vm/compact_memory` before mounting helps, `modelfs status` counts"
        );
    });
}

pub(super) fn count_gone(bytes: u64) {
    SHORT_BYTES.fetch_sub(bytes, Ordering::Relaxed);
}
