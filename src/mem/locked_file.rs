//! One model file's plaintext in locked memory, at its own offsets, from first chunk to last wipe.
//!
//! In: ranges to fill, to read, to wipe. Out: slices of the file's mapping, and a read-only descriptor for passthrough.
//! Promises: a range is allocated before it can be written, so that no write meets a full tmpfs; a whole file is
//! frozen without ever moving (readers of its slices notice nothing); nobody is shown zeros in place of data unless the
//! caller broke its word; what is given back to the kernel has been overwritten.
//! Not here: which ranges are filled or pinned (`cache` knows and answers for it).
//! Spec: docs/THREAT_MODEL.md, memory rules. Held by: tests/memory.rs.
//!
//! Life of a file: *filling* (read-write mapping, nobody else has it) -> *frozen* (read-only, may be open and mapped by
//! readers through passthrough) -> *gone*. The mapping's address stays the same; only what is behind it changes.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use super::arena::Pages;
use super::huge;
use super::map::{Access, Map, check, wipe_raw};
use super::pins::Pins;
use super::process::{count_locked, count_unlocked};
use super::{HUGE_PAGE_BYTES, SMALL_PAGE_BYTES};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// linux/fcntl.h; libc does not name them on every target.
const F_SETSIG: libc::c_int = 10;
const F_SEAL_FUTURE_WRITE: libc::c_int = 0x0010;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backing {
    Tmpfs,
    Memfd,
}

const FILLING: u8 = 0;
const FROZEN: u8 = 1;
const GONE: u8 = 2;

/// How the pages of a revoked file ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiped {
    /// Every page was overwritten before it went back to the kernel.
    Overwritten,
    /// Someone may have had the file open or mapped and its pages could not be pinned: it was cut off at once, and they
    /// went back as they were.
    CutOff,
}

/// How long a `read` that was already copying when its file was cut off has until the pages turn to zeros. A copy of one
/// huge page takes 0.2 ms; this leaves room for a reader that lost its processor meanwhile. Nobody can be asked: the kernel
/// tells no one who holds a page.
pub const IN_FLIGHT_GRACE: Duration = Duration::from_millis(250);

/// A file that is cut off: nobody reaches its pages any more, and they wait to be overwritten.
#[must_use = "pages go back unwiped if this is dropped"]
pub struct Cut {
    since: Instant,
    pins: Option<Pins>,
    how: Wiped,
}

impl Cut {
    /// Overwrites the pages and gives them back. Waits for what is left of [`IN_FLIGHT_GRACE`].
    pub fn wipe(self) -> Wiped {
        let Some(mut pins) = self.pins else { return self.how };
        std::thread::sleep(IN_FLIGHT_GRACE.saturating_sub(self.since.elapsed()));
        match pins.overwrite() {
            Ok(()) => Wiped::Overwritten,
            Err(error) => {
                tracing::error!("pages of a revoked file go back as they are: {error}");
                Wiped::CutOff
            }
        }
    }
}

#[derive(Debug)]
pub struct LockedFile {
    map: Map,
    len: u64,
    pages: Pages,
    granule: u64,
    backing: Backing,
    /// Filled ranges are locked with mlock: a memfd, or a tmpfs that could be swapped.
    lock: bool,
    locked: AtomicU64,
    phase: AtomicU8,
    /// The writable descriptor. A frozen file on the tmpfs has none: it would count as a writer in `others_hold`.
    writable: RwLock<Option<OwnedFd>>,
    /// The one read-only open, made when the file is frozen.
    read_only: OnceLock<OwnedFd>,
    lease: Mutex<()>,
    /// Starts of granules that are in small pages although huge ones were asked for.
    short: Mutex<BTreeSet<u64>>,
}

impl LockedFile {
    pub(super) fn new(
        fd: OwnedFd,
        len: u64,
        pages: Pages,
        granule: u64,
        backing: Backing,
        lock: bool,
    ) -> Result<LockedFile> {
        let failed = |errno| Error::new(Code::NoRoom, format!("cannot map a file of {len} bytes")).with_source(errno);
        let too_long = || failed(io::Error::from_raw_os_error(libc::EFBIG));
        // Whole granules, so that the last piece too can be one huge page. Past the end of the file nothing is touched.
        let mapped = len.max(1).checked_next_multiple_of(granule).ok_or_else(too_long)?;
        let mapped = usize::try_from(mapped).map_err(|_| too_long())?;
        let size = libc::off_t::try_from(len).map_err(|_| too_long())?;
        // Exactly: readers through passthrough see the file's size, not the one that stat answers.
        // SAFETY: changes the size of our own new file.
        check(unsafe { libc::ftruncate(fd.as_raw_fd(), size) }).map_err(failed)?;
        let align = if pages == Pages::Huge { HUGE_PAGE_BYTES } else { SMALL_PAGE_BYTES };
        let map = Map::reserve(mapped, align as usize).map_err(failed)?;
        let file = LockedFile {
            map,
            len,
            pages,
            granule,
            backing,
            lock,
            locked: AtomicU64::new(0),
            phase: AtomicU8::new(FILLING),
            writable: RwLock::new(None),
            read_only: OnceLock::new(),
            lease: Mutex::new(()),
            short: Mutex::new(BTreeSet::new()),
        };
        file.place(fd.as_fd(), Access::ReadWrite).map_err(failed)?;
        *file.writable.write().expect("nobody else has it yet") = Some(fd);
        Ok(file)
    }

    fn place(&self, fd: BorrowedFd<'_>, access: Access) -> io::Result<()> {
        self.map.place_file(fd, access)?;
        if self.backing == Backing::Memfd && self.granule == HUGE_PAGE_BYTES {
            // Where the host gives memory files huge pages only on advice. A refusal costs speed and nothing else.
            let _ = self.map.advise(0, self.map.len(), libc::MADV_HUGEPAGE);
        }
        Ok(())
    }

    /// Bytes of the file, exactly.
    pub fn len(&self) -> u64 {
        self.len
    }
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    pub fn pages(&self) -> Pages {
        self.pages
    }
    /// What a range really costs is that range rounded out to this: 2 MiB or 4 KiB.
    pub fn granule(&self) -> u64 {
        self.granule
    }
    /// Whole and read-only: fit to be passthrough backing.
    pub fn is_frozen(&self) -> bool {
        self.phase.load(Ordering::Acquire) == FROZEN
    }

    /// `range` rounded out to granules.
    pub fn cost(&self, range: &Range<u64>) -> u64 {
        if range.is_empty() { 0 } else { self.rounded(range).end - self.rounded(range).start }
    }

    fn rounded(&self, range: &Range<u64>) -> Range<u64> {
        range.start / self.granule * self.granule..range.end.next_multiple_of(self.granule)
    }

    fn check_range(&self, range: &Range<u64>) -> (usize, usize) {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a file of {} bytes", self.len);
        (range.start as usize, (range.end - range.start) as usize)
    }

    /// Room for `range`, allocated (and locked where it must be) before it is handed out.
    ///
    /// # Errors
    /// `Code::NoRoom` if the memory, the cgroup or the lock limit is exhausted. `Code::Stale` if the file is frozen or
    /// gone.
    ///
    /// # Safety
    /// Until the slice is dropped nobody else has a slice of this range (the cache gives a chunk to one filler at a
    /// time), and the file is neither frozen nor wiped. Neighbours in the same granule may be read and filled.
    #[expect(clippy::mut_from_ref, reason = "the caller keeps ranges apart; that is what `unsafe` says here")]
    pub unsafe fn slot(&self, range: Range<u64>) -> Result<&mut [u8]> {
        let (start, len) = self.check_range(&range);
        let writable = self.writable();
        let Some(fd) = writable.as_ref().filter(|_| self.phase.load(Ordering::Acquire) == FILLING) else {
            refuse!(Stale, "no bytes {range:?} to fill: the file is frozen or gone");
        };
        if len > 0 {
            self.allocate(fd.as_fd(), &range).map_err(|errno| self.no_room(&range, errno))?;
        }
        // SAFETY: the range is inside the mapping, now backed by pages, and nobody else's by the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.map.at(start), len) })
    }

    fn allocate(&self, fd: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<()> {
        let whole = self.rounded(range);
        let fell_back = huge::fallbacks();
        fallocate(fd, libc::FALLOC_FL_KEEP_SIZE, &whole)?;
        if self.granule == HUGE_PAGE_BYTES && huge::fallbacks() != fell_back {
            self.count_short(&whole);
        }
        if self.lock {
            let (start, len) = self.touchable(&whole);
            self.map.lock(start, len)?;
            self.locked.fetch_add(len as u64, Ordering::Relaxed);
            count_locked(len as u64);
            return Ok(());
        }
        // Pages that are allocated and never touched go away again when a neighbour's fallocate of a shared granule
        // fails halfway and is undone: touch those that may be shared. Small pages are all brought in by this one
        // call; huge ones are left to the writer, whose caches they then fill (4.4 against 3.4 GB/s in
        // `how_fast_files_fill_freeze_and_wipe`, 2 cores of an EPYC, noisy, 2026-11-22).
        if self.granule == SMALL_PAGE_BYTES {
            return self.touch(&whole);
        }
        if range.start != whole.start {
            self.touch(&(whole.start..whole.start + self.granule))?;
        }
        if range.end != whole.end && range.end != self.len {
            self.touch(&(whole.end - self.granule..whole.end))?;
        }
        Ok(())
    }

    /// Counts the granules of `whole` as lying in small pages. Which of them did is not known: the kernel's count moved
    /// while they were allocated.
    pub(super) fn count_short(&self, whole: &Range<u64>) {
        for start in (whole.start..whole.end.min(self.len)).step_by(self.granule as usize) {
            if self.short().insert(start) {
                huge::count_short((self.len - start).min(self.granule));
            }
        }
    }

    fn short(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.short.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The granules of `range` went back to the kernel.
    fn forget_short(&self, range: &Range<u64>) {
        let mut short = self.short();
        while let Some(start) = short.range(range.clone()).next().copied() {
            short.remove(&start);
            huge::count_gone((self.len - start).min(self.granule));
        }
    }

    fn touch(&self, range: &Range<u64>) -> io::Result<()> {
        let (start, len) = self.touchable(range);
        match self.map.advise(start, len, libc::MADV_POPULATE_WRITE) {
            // Linux before 5.14 does not know it.
            Err(errno) if errno.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    /// Offset and length of a range of whole pages, cut at the last page that holds a byte of the file: behind it every
    /// touch is SIGBUS.
    fn touchable(&self, range: &Range<u64>) -> (usize, usize) {
        let end = self.past_end(range.end);
        (range.start as usize, end - range.start as usize)
    }

    /// `end`, but not past the last page that holds a byte of the file: behind it every touch is SIGBUS.
    fn past_end(&self, end: u64) -> usize {
        end.min(self.len.next_multiple_of(SMALL_PAGE_BYTES)) as usize
    }

    fn no_room(&self, range: &Range<u64>, errno: io::Error) -> Error {
        let text = format!("no memory for bytes {range:?} of a cached file of {} bytes", self.len);
        Error::new(Code::NoRoom, text).with_source(errno)
    }

    /// The bytes of `range`, which someone has filled.
    ///
    /// # Safety
    /// The range was filled, is not being filled, wiped or evicted, and stays so until the slice is dropped (the cache
    /// pins it). Freezing meanwhile is allowed.
    pub unsafe fn bytes(&self, range: Range<u64>) -> &[u8] {
        let (start, len) = self.check_range(&range);
        debug_assert_ne!(self.phase.load(Ordering::Acquire), GONE, "bytes {range:?} of a file that is gone");
        // SAFETY: inside the mapping, filled and unchanged by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.map.at(start), len) }
    }

    /// Overwrites a range of a file that is still filling and gives its pages back to the kernel.
    ///
    /// `range` is in whole granules, except that it may end with the file. Nobody has a slice of it (the cache's
    /// promise, as for `slot`). Holes in it stay holes.
    ///
    /// # Errors
    /// `Code::Host` if the pages were overwritten and could not be freed. `Code::Stale` if the file is frozen or gone.
    pub fn wipe(&self, range: Range<u64>) -> Result<()> {
        let aligned = |at: u64| at.is_multiple_of(self.granule);
        assert!(aligned(range.start) && (aligned(range.end) || range.end == self.len), "{range:?} cuts a granule");
        let (start, len) = self.check_range(&range);
        if len == 0 {
            return Ok(());
        }
        let writable = self.writable();
        let Some(fd) = writable.as_ref().filter(|_| self.phase.load(Ordering::Acquire) == FILLING) else {
            refuse!(Stale, "no bytes {range:?} to wipe: the file is frozen or gone");
        };
        let failed =
            |errno| Error::new(Code::Host, format!("cannot free bytes {range:?} of a cached file")).with_source(errno);
        self.overwrite(fd.as_fd(), &range);
        if self.lock {
            let len = self.past_end(self.rounded(&range).end) - start;
            self.map.unlock(start, len).map_err(failed)?;
            self.count_unlocked(len as u64);
        }
        self.forget_short(&range);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(fd.as_fd(), mode, &self.rounded(&range)).map_err(failed)
    }

    /// Zeros every allocated page of `range` through the mapping, which is writable. Holes are not touched: a write
    /// there would allocate.
    fn overwrite(&self, fd: BorrowedFd<'_>, range: &Range<u64>) {
        let mut at = range.start;
        while let Some(data) = next_data(fd, at..range.end) {
            // SAFETY: inside the mapping, backed by pages, and nobody else's (see the callers).
            unsafe { wipe_raw(self.map.at(data.start as usize), (data.end - data.start) as usize) };
            at = data.end;
        }
    }

    fn count_unlocked(&self, bytes: u64) {
        // A granule that two chunks share was locked and counted twice; it unlocks once.
        let counted =
            self.locked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(now.saturating_sub(bytes)));
        count_unlocked(counted.expect("the closure always answers").min(bytes));
    }

    fn writable(&self) -> RwLockReadGuard<'_, Option<OwnedFd>> {
        self.writable.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Ends filling: from here on nobody can change a byte, and the file can be passthrough backing.
    ///
    /// Every byte has been filled, nobody has a slot. Slices from `bytes` stay good: the read-only pages take the place
    /// of the writable ones at the same address. On the tmpfs the writable mapping and descriptor go, and the new
    /// mapping comes from the one read-only open, because `others_hold` counts opens. A memfd keeps both (they do not
    /// count there) and is sealed against every later writer.
    ///
    /// # Errors
    /// `Code::Host` if the kernel refuses; the file is then still filling. `Code::Stale` if it was not filling.
    pub fn freeze(&self) -> Result<()> {
        let mut writable = self.writable.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Some(fd) = writable.as_ref().filter(|_| self.phase.load(Ordering::Acquire) == FILLING) else {
            refuse!(Stale, "only a file that is filling can be frozen");
        };
        let failed = |errno| Error::new(Code::Host, "cannot freeze a cached file").with_source(errno);
        let read_only = reopen(fd.as_fd(), libc::O_RDONLY).map_err(failed)?;
        match self.backing {
            Backing::Tmpfs => {
                self.place(read_only.as_fd(), Access::Read).map_err(failed)?;
                if self.lock {
                    let filled = self.past_end(self.map.len() as u64);
                    self.map.lock(0, filled).map_err(failed)?;
                }
                *writable = None;
            }
            Backing::Memfd => {
                // Not SHRINK: revoking truncates.
                let seals = F_SEAL_FUTURE_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
                // SAFETY: takes a descriptor and integers.
                check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map_err(failed)?;
            }
        }
        self.read_only.set(read_only).expect("frozen once");
        self.phase.store(FROZEN, Ordering::Release);
        Ok(())
    }

    /// The read-only descriptor of a frozen file, for passthrough.
    ///
    /// # Panics
    /// If the file was never frozen: a hole would read as zeros, without an error.
    pub fn backing(&self) -> BorrowedFd<'_> {
        self.read_only.get().expect("only a frozen file can back passthrough").as_fd()
    }

    /// Whether anyone but us has the file open or mapped: another process, or the kernel for a passthrough open or map
    /// (which outlives the close of its descriptor). A process being spawned at this moment may count for a moment.
    ///
    /// The kernel grants a write lease only to the sole opener. An open that was answered but has not yet reached the
    /// backing is not seen: wait for those first.
    pub fn others_hold(&self) -> Result<bool> {
        let Some(fd) = self.read_only.get() else { return Ok(false) };
        let failed = |errno| Error::new(Code::Host, "cannot ask who holds a cached file").with_source(errno);
        // SAFETY: fcntl takes a descriptor and integers here.
        let fcntl = |command, value: libc::c_int| check(unsafe { libc::fcntl(fd.as_raw_fd(), command, value) });
        let _one_at_a_time = self.lease.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // An open that meets our lease makes the kernel signal us, by default with SIGIO, which kills. SIGURG is
        // ignored. The kernel forgets the choice with every lease dropped.
        fcntl(F_SETSIG, libc::SIGURG).map_err(failed)?;
        match fcntl(libc::F_SETLEASE, libc::F_WRLCK) {
            Ok(_) => fcntl(libc::F_SETLEASE, libc::F_UNLCK).map(|_| false).map_err(failed),
            Err(errno) if errno.raw_os_error() == Some(libc::EAGAIN) => Ok(true),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Ends the file: every page overwritten, then freed. A holder would see zeros for a moment: ask `others_hold`
    /// first, or use [`LockedFile::cut_off`]. Nobody in this process has a slice of it.
    ///
    /// # Errors
    /// `Code::Host` if it cannot be opened for writing again; it then stays as it is.
    pub fn thaw_and_wipe(&self) -> Result<()> {
        self.end(Wiped::Overwritten)
    }

    /// Ends the file although others may hold it: their reads end (0 bytes), their maps get SIGBUS, at once. Nobody in
    /// this process has a slice of it.
    ///
    /// Zeros before that would be read as data, so the pages are pinned, the file is truncated, and [`Cut::wipe`] writes
    /// the zeros through the pins. Where pages cannot be pinned (no io_uring, or RLIMIT_MEMLOCK without CAP_IPC_LOCK):
    /// overwritten in place if nobody can hold the file, else only truncated; its pages then go back as they are, which
    /// `init_on_free=1` mends.
    ///
    /// `opens_pending`: an open was answered whose descriptor the kernel may not have made yet; asking who holds the file
    /// is then no answer.
    ///
    /// # Errors
    /// `Code::Host` if it cannot be opened for writing again or truncated; it then stays as it is.
    pub fn cut_off(&self, opens_pending: bool) -> Result<Cut> {
        let ended = |how| Cut { since: Instant::now(), pins: None, how };
        if !self.is_frozen() {
            // Still filling: nobody else ever had it.
            return self.thaw_and_wipe().map(|()| ended(Wiped::Overwritten));
        }
        match self.end_pinned()? {
            Ok(pins) => Ok(Cut { since: Instant::now(), pins: Some(pins), how: Wiped::CutOff }),
            Err(why) => {
                let held = opens_pending || self.others_hold()?;
                let how = if held { Wiped::CutOff } else { Wiped::Overwritten };
                if held {
                    tracing::warn!("pages of a revoked file go back as they are, they cannot be pinned: {why}");
                }
                self.end(how)?;
                Ok(ended(how))
            }
        }
    }

    /// Both halves of [`LockedFile::cut_off`].
    pub fn revoke(&self) -> Result<Wiped> {
        Ok(self.cut_off(false)?.wipe())
    }

    /// Pins every page, then truncates. The inner error: nothing was pinned, and the file is as it was.
    fn end_pinned(&self) -> Result<io::Result<Pins>> {
        let mut writable = self.writable.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let failed = |errno| Error::new(Code::Host, "cannot revoke a cached file").with_source(errno);
        let read_only = self.read_only.get().expect("a frozen file has one");
        let reopened = match self.backing {
            Backing::Tmpfs => Some(reopen(read_only.as_fd(), libc::O_RDWR).map_err(failed)?),
            Backing::Memfd => None,
        };
        let fd = reopened.as_ref().or(writable.as_ref()).expect("a frozen memfd keeps its writable descriptor").as_fd();
        let pinned = self.pin(fd);
        let Ok(pins) = pinned else {
            if self.backing == Backing::Tmpfs {
                // No writer may stay, or `others_hold` would count it.
                self.place(read_only.as_fd(), Access::Read).map_err(failed)?;
            }
            return Ok(pinned);
        };
        self.gone(fd).map_err(failed)?;
        *writable = None;
        Ok(Ok(pins))
    }

    fn pin(&self, fd: BorrowedFd<'_>) -> io::Result<Pins> {
        if self.backing == Backing::Tmpfs {
            self.place(fd, Access::ReadWrite)?;
        }
        let mut ranges = Vec::new();
        let mut at = 0;
        while let Some(data) = next_data(fd, at..self.len) {
            let start = data.start / SMALL_PAGE_BYTES * SMALL_PAGE_BYTES;
            ranges.push(start as usize..self.past_end(data.end.next_multiple_of(SMALL_PAGE_BYTES)));
            at = data.end;
        }
        Pins::new(&self.map, &ranges)
    }

    fn end(&self, how: Wiped) -> Result<()> {
        let mut writable = self.writable.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.phase.load(Ordering::Acquire) == GONE {
            return Ok(());
        }
        let failed = |errno| Error::new(Code::Host, "cannot wipe a cached file").with_source(errno);
        let fd = match (writable.take(), self.read_only.get()) {
            (Some(fd), _) => fd,
            (None, Some(read_only)) => reopen(read_only.as_fd(), libc::O_RDWR).map_err(failed)?,
            (None, None) => unreachable!("a file that is not gone has a descriptor"),
        };
        if how == Wiped::Overwritten && self.len > 0 {
            let mapped_writable = !(self.is_frozen() && self.backing == Backing::Tmpfs);
            if mapped_writable {
                self.overwrite(fd.as_fd(), &(0..self.len));
            } else if self.granule == HUGE_PAGE_BYTES {
                self.place(fd.as_fd(), Access::ReadWrite).map_err(failed)?;
                self.overwrite(fd.as_fd(), &(0..self.len));
            } else {
                // A fault for each small page of a new mapping costs more than the zeros.
                write_zeros(fd.as_fd(), self.len).map_err(failed)?;
            }
        }
        self.gone(fd.as_fd()).map_err(failed)
    }

    /// Cuts the file short: its pages leave it, and whoever has it open or mapped.
    fn gone(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.phase.store(GONE, Ordering::Release);
        self.forget_short(&(0..u64::MAX));
        // SAFETY: changes the size of our own file.
        check(unsafe { libc::ftruncate(fd.as_raw_fd(), 0) })?;
        self.map.place_nothing()?;
        self.count_unlocked(u64::MAX);
        Ok(())
    }

    /// Bytes of memory the file holds, counted by the kernel in whole pages.
    pub fn resident(&self) -> Result<u64> {
        let writable = self.writable();
        let fd = writable.as_ref().or_else(|| self.read_only.get());
        let Some(fd) = fd else { return Ok(0) };
        // SAFETY: a stat is plain data for which zeros are valid; the kernel fills our own variable.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        check(unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) })
            .map_err(|errno| Error::new(Code::Host, "cannot stat a cached file").with_source(errno))?;
        Ok(stat.st_blocks as u64 * 512)
    }

    /// How many resident bytes ended up in 4 KiB pages although huge ones were asked for (memory was fragmented, or the
    /// host gives none). Reads /proc/self/smaps: milliseconds, for metrics, not for every chunk.
    pub fn huge_pages_short(&self) -> Result<u64> {
        if self.pages == Pages::Small || self.phase.load(Ordering::Acquire) == GONE {
            return Ok(0);
        }
        let failed = |errno| Error::new(Code::Host, "cannot count huge pages").with_source(errno);
        {
            let writable = self.writable();
            let fd =
                writable.as_ref().or_else(|| self.read_only.get()).expect("a file that is not gone has one").as_fd();
            let mut at = 0;
            // Only what our own mapping has touched is in smaps; a frozen file's has touched nothing yet.
            while let Some(data) = next_data(fd, at..self.len) {
                let (start, end) = (
                    data.start / SMALL_PAGE_BYTES * SMALL_PAGE_BYTES,
                    self.past_end(data.end.next_multiple_of(SMALL_PAGE_BYTES)),
                );
                let _ = self.map.advise(start as usize, end - start as usize, libc::MADV_POPULATE_READ);
                at = data.end;
            }
        }
        let smaps = std::fs::read_to_string("/proc/self/smaps").map_err(failed)?;
        let low = self.map.at(0).addr();
        let (rss, huge) = smaps_sums(&smaps, &(low..low + self.map.len()));
        Ok(rss.saturating_sub(huge))
    }
}

/// Resident and PMD-mapped bytes of the mappings that lie in `ours`.
fn smaps_sums(smaps: &str, ours: &Range<usize>) -> (u64, u64) {
    let (mut inside, mut rss, mut huge) = (false, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else { continue };
        if let Some(low) = first.split_once('-').and_then(|(low, _)| usize::from_str_radix(low, 16).ok()) {
            inside = ours.contains(&low);
            continue;
        }
        let kib = second.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
        match first {
            "Rss:" if inside => rss += kib * 1024,
            "ShmemPmdMapped:" if inside => huge += kib * 1024,
            _ => {}
        }
    }
    (rss, huge)
}

/// The first run of allocated bytes in `range`.
fn next_data(fd: BorrowedFd<'_>, range: Range<u64>) -> Option<Range<u64>> {
    // SAFETY: takes a descriptor and integers. The file's position means nothing to us.
    let seek = |at: u64, whence| unsafe { libc::lseek(fd.as_raw_fd(), at as libc::off_t, whence) };
    if range.is_empty() {
        return None;
    }
    let start = u64::try_from(seek(range.start, libc::SEEK_DATA)).ok().filter(|start| *start < range.end)?;
    // Past the last data the end of the file counts as a hole.
    let end = u64::try_from(seek(start, libc::SEEK_HOLE)).ok()?;
    Some(start..end.min(range.end))
}

/// Overwrites the allocated part of the first `len` bytes through the descriptor.
fn write_zeros(fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    static ZEROS: [u8; 256 << 10] = [0; 256 << 10];
    let mut at = 0;
    while let Some(data) = next_data(fd, at..len) {
        at = data.start;
        while at < data.end {
            let piece = (data.end - at).min(ZEROS.len() as u64) as usize;
            // SAFETY: reads `piece` bytes of ZEROS; writes into our own file.
            let done = unsafe { libc::pwrite(fd.as_raw_fd(), ZEROS.as_ptr().cast(), piece, at as libc::off_t) };
            match u64::try_from(done) {
                Ok(done) => at += done,
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
    }
    Ok(())
}

fn fallocate(fd: BorrowedFd<'_>, mode: libc::c_int, range: &Range<u64>) -> io::Result<()> {
    let (start, len) = (range.start as libc::off_t, (range.end - range.start) as libc::off_t);
    loop {
        // SAFETY: takes a descriptor and integers; allocates or frees pages of our own file.
        match check(unsafe { libc::fallocate(fd.as_raw_fd(), mode, start, len) }) {
            Err(errno) if errno.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// A new open of the same file, of its own kind of access.
fn reopen(fd: BorrowedFd<'_>, access: libc::c_int) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("digits hold no NUL");
    // SAFETY: the path is a C string; the answer is a new descriptor.
    let fd = check(unsafe { libc::open(path.as_ptr(), access | libc::O_CLOEXEC) })?;
    // SAFETY: the kernel just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        if self.phase.load(Ordering::Acquire) == GONE {
            return;
        }
        // Whoever still holds a frozen file keeps it: wiping would show them zeros. The last of them frees the pages.
        let wiped = match self.others_hold() {
            Ok(false) => self.thaw_and_wipe(),
            Ok(true) => {
                tracing::warn!(bytes = self.len, "a cached file was let go while others hold it; it ends with them");
                self.count_unlocked(u64::MAX);
                self.forget_short(&(0..u64::MAX));
                Ok(())
            }
            Err(err) => Err(err),
        };
        if let Err(err) = wiped {
            tracing::error!("a cached file ended unwiped: {}", err.chain());
        }
    }
}
