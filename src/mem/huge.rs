//! Whether the cache's pages are really huge, and what is done when they are not.
//!
//! In: what the kernel counts as fallen back. Out: bytes in small pages now, for `status` and metrics, and one warning with
//! what to do.
//! Why: a kernel whose free memory is in pieces gives 4 KiB pages in place of a huge one without a word, and a byte in
//! them is filled and read at half the speed or less (docs/PERFORMANCE.md). It counts each time it does.
//! Nothing is mended here: asking for the pages to be gathered afterwards (MADV_COLLAPSE) made Linux 6.18 lose what was
//! written next, in 299 of 300 tries (docs/PERFORMANCE.md, "What did not help").
//! Held by: the tests of `arena`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the kernel could not give in huge pages of 2 MiB: no free piece, or no room in the memory cgroup.
const COUNTERS: [&str; 2] = [
    "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/stats/shmem_fallback",
    "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/stats/shmem_fallback_charge",
];

static SHORT_BYTES: AtomicU64 = AtomicU64::new(0);

/// Cached bytes that lie in small pages now although huge ones were asked for.
pub fn huge_page_short_bytes() -> u64 {
    SHORT_BYTES.load(Ordering::Relaxed)
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
