//! Address ranges of this process, and the one way to overwrite memory.
//!
//! In: lengths, descriptors. Out: a [`Map`] whose address never changes while it lives, whatever lies behind it.
//! Promises: a `Map` is unmapped exactly once; putting something else behind its addresses is one kernel call, so that
//! a reader in another thread sees the old or the new pages and never a gap; [`wipe`] is not optimised away.
//! Held by: the tests below and those of `locked_file`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// Turns -1 into the errno.
pub(super) fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// The same for raw system calls, which answer a long.
pub(super) fn check_long(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Overwrites `bytes` with zeros; neither the compiler nor the linker may leave it out. Runs at memset speed.
pub fn wipe(bytes: &mut [u8]) {
    // SAFETY: an exclusive slice is writable for its whole length.
    unsafe { wipe_raw(bytes.as_mut_ptr(), bytes.len()) }
}

/// # Safety
/// `start..start + len` is mapped writable and nobody else reads or writes it meanwhile.
pub(super) unsafe fn wipe_raw(start: *mut u8, len: usize) {
    // SAFETY: the caller's promise is exactly what write_bytes asks for. The empty asm may, as far as the compiler
    // knows, read any memory reachable from `start`, so the zeros must have been stored before it.
    unsafe {
        std::ptr::write_bytes(start, 0, len);
        std::arch::asm!("/* {0} */", in(reg) start, options(nostack, preserves_flags));
    }
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
}

/// What may be done through a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    ReadWrite,
}

impl Access {
    fn prot(self) -> libc::c_int {
        match self {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// A range of addresses that is ours until dropped. Excluded from core dumps and not inherited by a forked child,
/// whatever is placed behind it.
#[derive(Debug)]
pub(super) struct Map {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a Map is an address range; it hands out raw pointers only, whose users say who keeps them apart.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Reserves `len` bytes of addresses, a multiple of the page size, starting at a multiple of `align` (a power of
    /// two). Nothing is behind them: touching them is SIGSEGV.
    pub fn reserve(len: usize, align: usize) -> io::Result<Map> {
        assert!(align.is_power_of_two() && len > 0, "align {align} len {len}");
        let span = len.checked_add(align).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), span, libc::PROT_NONE, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let low = raw as usize;
        let start = low.next_multiple_of(align);
        let (head, tail) = (start - low, low + span - (start + len));
        // SAFETY: head and tail lie inside the mapping just made and outside `start..start + len`; nobody knows them.
        unsafe {
            if head > 0 {
                libc::munmap(raw, head);
            }
            if tail > 0 {
                libc::munmap(raw.byte_add(head + len), tail);
            }
        }
        let start = NonNull::new(raw.cast::<u8>().wrapping_add(head)).expect("mmap never answers the null page");
        Ok(Map { start, len })
    }

    /// Puts `len` fresh, zeroed, private bytes behind the whole map.
    pub fn place_anonymous(&self) -> io::Result<()> {
        self.place(libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Puts the file's bytes from 0 on behind the whole map, shared. What was there before stays readable until the
    /// new pages are.
    pub fn place_file(&self, file: BorrowedFd<'_>, access: Access) -> io::Result<()> {
        self.place(access.prot(), libc::MAP_SHARED, file.as_raw_fd())
    }

    /// Puts nothing behind the map. A stale borrow given to the kernel then ends in EFAULT and not in zeros.
    pub fn place_nothing(&self) -> io::Result<()> {
        self.place(libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    fn place(&self, prot: libc::c_int, flags: libc::c_int, fd: libc::c_int) -> io::Result<()> {
        // SAFETY: MAP_FIXED replaces exactly our own range, which nobody else mapped anything into. The kernel swaps
        // old for new under the lock that page faults take, so that other threads never see a hole.
        let raw = unsafe { libc::mmap(self.start.as_ptr().cast(), self.len, prot, flags | libc::MAP_FIXED, fd, 0) };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.advise(0, self.len, libc::MADV_DONTDUMP)?;
        self.advise(0, self.len, libc::MADV_DONTFORK)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The address `offset` bytes into the map.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.len, "{offset} past a map of {}", self.len);
        // SAFETY: the result is inside our mapping or one past its end.
        unsafe { self.start.as_ptr().add(offset) }
    }

    pub fn advise(&self, offset: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
        let start = self.range(offset, len);
        // SAFETY: the range is ours; no advice used in this crate changes the content of written memory.
        check(unsafe { libc::madvise(start.cast(), len, advice) }).map(drop)
    }

    /// Locks the pages that `offset..offset + len` touches into memory, allocating what is missing.
    pub fn lock(&self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.range(offset, len);
        // SAFETY: locking a range that is ours changes no content.
        check(unsafe { libc::mlock(start.cast(), len) }).map(drop)
    }

    pub fn unlock(&self, offset: usize, len: usize) -> io::Result<()> {
        let start = self.range(offset, len);
        // SAFETY: as for lock.
        check(unsafe { libc::munlock(start.cast(), len) }).map(drop)
    }

    fn range(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "{offset}+{len} past a map of {}", self.len);
        self.at(offset)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range came from mmap in `reserve`, is unmapped only here, and whoever borrowed from it has
        // promised (slot, bytes, expose) to be gone before its owner.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_map_is_aligned_as_asked() {
        for align in [4096usize, 2 << 20] {
            let map = Map::reserve(3 * 4096, align).unwrap();
            assert_eq!(map.at(0) as usize % align, 0);
        }
    }

    #[test]
    fn wiped_bytes_are_zero() {
        let mut bytes = [7u8; 100];
        wipe(&mut bytes);
        assert_eq!(bytes, [0u8; 100]);
    }
}
