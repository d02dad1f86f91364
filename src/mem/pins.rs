//! Pages that the kernel keeps for us after they have left their file, so that they can be overwritten where nobody sees it.
//!
//! In: ranges of a writable mapping. Out: [`Pins`], which hold the pages behind them whatever becomes of file and mapping.
//! Promises: while a `Pins` lives its pages are not given back; [`Pins::overwrite`] has zeroed every byte of them, or
//! says that it has not.
//! Why: zeros written before a file is cut short would be read as data; pages cut off before they are overwritten go back
//! as they are. So the pages are pinned as io_uring's registered buffers, the file is cut, and the kernel itself reads
//! /dev/zero into the pins: by then no address of ours leads to them.
//! Not here: when a file is cut (`locked_file`).
//! Held by: the tests below, tests/memory.rs.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use super::map::{Map, check_long};

/// One registered buffer is at most 1 GiB (io_uring_register(2)); a multiple of the huge page.
const PIECE_BYTES_MAX: usize = 1 << 30;

/// Buffers one ring takes: 16 TiB in pieces of 1 GiB.
const PIECES_MAX: usize = 1 << 14;

// linux/io_uring.h; libc does not name them.
const IORING_REGISTER_BUFFERS: libc::c_uint = 0;
const IORING_UNREGISTER_BUFFERS: libc::c_uint = 1;
const IORING_OP_READ_FIXED: u8 = 4;
const IORING_ENTER_GETEVENTS: libc::c_uint = 1;
const IORING_OFF_SQ_RING: libc::off_t = 0;
const IORING_OFF_CQ_RING: libc::off_t = 0x0800_0000;
const IORING_OFF_SQES: libc::off_t = 0x1000_0000;

#[repr(C)]
#[derive(Default)]
struct SubmissionOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    reserved: u32,
    user_addr: u64,
}

#[repr(C)]
#[derive(Default)]
struct CompletionOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    overflow: u32,
    cqes: u32,
    flags: u32,
    reserved: u32,
    user_addr: u64,
}

#[repr(C)]
#[derive(Default)]
struct Parameters {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq_off: SubmissionOffsets,
    cq_off: CompletionOffsets,
}

/// A submission entry, as far as READ_FIXED uses it.
#[repr(C)]
#[derive(Default)]
struct Submission {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    offset: u64,
    address: u64,
    len: u32,
    rw_flags: u32,
    user_data: u64,
    buf_index: u16,
    personality: u16,
    splice_fd: i32,
    unused: [u64; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Completion {
    user_data: u64,
    res: i32,
    flags: u32,
}

const _: () = assert!(size_of::<Parameters>() == 120 && size_of::<Submission>() == 64);

/// Memory shared with the kernel: part of a ring.
struct Shared {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address range of our own; `Ring` has all access to it, one call at a time through `&mut`.
unsafe impl Send for Shared {}

impl Shared {
    fn of(ring: &OwnedFd, len: usize, offset: libc::off_t) -> io::Result<Shared> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, ring.as_raw_fd(), offset) };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Shared { start: NonNull::new(raw.cast()).expect("mmap never answers the null page"), len })
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.len, "{offset} in a ring of {} bytes", self.len);
        // SAFETY: inside the mapping.
        unsafe { self.start.as_ptr().add(offset).cast() }
    }

    fn number(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the kernel's offsets are aligned, `at` checks that they are inside, and both sides use atomics there.
        unsafe { &*self.at::<AtomicU32>(offset as usize) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped in `of`, unmapped only here.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// A ring that does one thing at a time.
struct Ring {
    fd: OwnedFd,
    submissions: Shared,
    completions: Shared,
    entries: Shared,
    parameters: Parameters,
}

impl Ring {
    fn new() -> io::Result<Ring> {
        let mut parameters = Parameters::default();
        // SAFETY: the kernel fills our own variable; the answer is a new descriptor.
        let fd = check_long(unsafe { libc::syscall(libc::SYS_io_uring_setup, 2 as libc::c_uint, &mut parameters) })?;
        // SAFETY: the kernel just made it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let (sq, cq) = (&parameters.sq_off, &parameters.cq_off);
        let sq_len = sq.array as usize + parameters.sq_entries as usize * size_of::<u32>();
        let cq_len = cq.cqes as usize + parameters.cq_entries as usize * size_of::<Completion>();
        let sqes_len = parameters.sq_entries as usize * size_of::<Submission>();
        Ok(Ring {
            submissions: Shared::of(&fd, sq_len, IORING_OFF_SQ_RING)?,
            completions: Shared::of(&fd, cq_len, IORING_OFF_CQ_RING)?,
            entries: Shared::of(&fd, sqes_len, IORING_OFF_SQES)?,
            fd,
            parameters,
        })
    }

    fn register(&self, buffers: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: the array outlives the call; the kernel pins pages and changes none.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.fd.as_raw_fd(),
                IORING_REGISTER_BUFFERS,
                buffers.as_ptr(),
                buffers.len() as libc::c_uint,
            )
        };
        check_long(ret).map(drop)
    }

    fn unregister(&self) -> io::Result<()> {
        let none: *const libc::c_void = std::ptr::null();
        // SAFETY: takes no memory of ours.
        let ret = unsafe {
            libc::syscall(libc::SYS_io_uring_register, self.fd.as_raw_fd(), IORING_UNREGISTER_BUFFERS, none, 0)
        };
        check_long(ret).map(drop)
    }

    /// One request, from submission to its answer.
    fn run(&mut self, submission: Submission) -> io::Result<i32> {
        let (sq, cq) = (&self.parameters.sq_off, &self.parameters.cq_off);
        let tail = self.submissions.number(sq.tail);
        let mask = self.submissions.number(sq.ring_mask).load(Ordering::Relaxed);
        let at = tail.load(Ordering::Relaxed);
        let slot = (at & mask) as usize;
        // SAFETY: the entry is inside the mapping and the kernel reads it only after the tail has moved.
        unsafe { self.entries.at::<Submission>(slot * size_of::<Submission>()).write(submission) };
        self.submissions.number(sq.array + (slot * size_of::<u32>()) as u32).store(slot as u32, Ordering::Relaxed);
        tail.store(at.wrapping_add(1), Ordering::Release);
        let mut submit = 1;
        loop {
            let head = self.completions.number(cq.head);
            let seen = head.load(Ordering::Relaxed);
            if self.completions.number(cq.tail).load(Ordering::Acquire) != seen {
                let mask = self.completions.number(cq.ring_mask).load(Ordering::Relaxed);
                let place = cq.cqes as usize + (seen & mask) as usize * size_of::<Completion>();
                // SAFETY: inside the mapping, written by the kernel before it moved the tail.
                let completion = unsafe { self.completions.at::<Completion>(place).read() };
                head.store(seen.wrapping_add(1), Ordering::Release);
                return Ok(completion.res);
            }
            let none: *const libc::c_void = std::ptr::null();
            // SAFETY: integers, and no signal mask.
            let ret = unsafe {
                let fd = self.fd.as_raw_fd();
                libc::syscall(libc::SYS_io_uring_enter, fd, submit, 1, IORING_ENTER_GETEVENTS, none, 0usize)
            };
            match check_long(ret) {
                Ok(submitted) => submit -= submitted.min(libc::c_long::from(submit)) as libc::c_uint,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Pages held beyond the life of their file; given back when dropped, overwritten or not.
pub(super) struct Pins {
    ring: Ring,
    zero: File,
    /// Address and length of each registered buffer, as numbers: what is behind them now is the kernel's affair.
    pieces: Vec<(usize, usize)>,
}

impl Pins {
    /// Pins the pages of `ranges` of `map`, which is mapped writable there and backed by pages.
    ///
    /// # Errors
    /// What the kernel says: EPERM or ENOSYS where io_uring is not to be had (seccomp, sysctl), ENOMEM where the pages do
    /// not fit under RLIMIT_MEMLOCK (CAP_IPC_LOCK lifts it). Nothing is pinned then.
    pub fn new(map: &Map, ranges: &[Range<usize>]) -> io::Result<Pins> {
        let pieces: Vec<(usize, usize)> = ranges
            .iter()
            .flat_map(|range| {
                range.clone().step_by(PIECE_BYTES_MAX).map(|at| (at, PIECE_BYTES_MAX.min(range.end - at)))
            })
            .map(|(at, len)| (map.at(at).addr(), len))
            .collect();
        if pieces.len() > PIECES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let zero = File::open("/dev/zero")?;
        let ring = Ring::new()?;
        let buffers: Vec<libc::iovec> =
            pieces.iter().map(|(at, len)| libc::iovec { iov_base: *at as *mut libc::c_void, iov_len: *len }).collect();
        if !buffers.is_empty() {
            ring.register(&buffers)?;
        }
        Ok(Pins { ring, zero, pieces })
    }

    /// Zeros every byte of the pages, wherever they are by now.
    ///
    /// # Errors
    /// What the kernel says; some pages are then as they were.
    pub fn overwrite(&mut self) -> io::Result<()> {
        fence(Ordering::SeqCst);
        for index in 0..self.pieces.len() {
            let (start, len) = self.pieces[index];
            let mut done = 0;
            while done < len {
                let res = self.ring.run(Submission {
                    opcode: IORING_OP_READ_FIXED,
                    fd: self.zero.as_raw_fd(),
                    address: (start + done) as u64,
                    len: (len - done) as u32,
                    buf_index: index as u16,
                    ..Submission::default()
                })?;
                match res {
                    0 => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                    1.. => done += res as usize,
                    errno if [libc::EINTR, libc::EAGAIN].contains(&-errno) => {}
                    errno => return Err(io::Error::from_raw_os_error(-errno)),
                }
            }
        }
        Ok(())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // Closing the ring alone would give the pages back at some later time.
        if !self.pieces.is_empty()
            && let Err(error) = self.ring.unregister()
        {
            tracing::warn!("pinned pages are given back late: {error}");
        }
    }
}

/// Whether this process may pin pages at all, and if not, why: asked once, with nothing.
pub fn can_pin() -> io::Result<()> {
    Ring::new().map(drop)
}

#[cfg(test)]
mod tests {
    use super::super::map::check;
    use super::*;

    #[test]
    fn pinned_pages_are_zeroed_after_their_mapping_went() {
        if let Err(error) = can_pin() {
            println!("not run: {error}");
            return;
        }
        const LEN: usize = 3 << 20;
        // SAFETY: a new anonymous file.
        let fd = check(unsafe { libc::memfd_create(c"pins".as_ptr(), libc::MFD_CLOEXEC) }).unwrap();
        // SAFETY: just made.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(LEN as u64).unwrap();
        let map = Map::reserve(LEN, 4096).unwrap();
        map.place_file(std::os::fd::AsFd::as_fd(&file), super::super::map::Access::ReadWrite).unwrap();
        // SAFETY: our own writable mapping.
        unsafe { std::slice::from_raw_parts_mut(map.at(0), LEN) }.fill(0xa5);
        let mut pins = Pins::new(&map, &[0..4096, 8192..LEN]).unwrap();
        map.place_nothing().unwrap();
        pins.overwrite().unwrap();
        drop(pins);
        map.place_file(std::os::fd::AsFd::as_fd(&file), super::super::map::Access::ReadWrite).unwrap();
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(map.at(0), LEN) };
        let kept = |at: usize| (4096..8192).contains(&at);
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == if kept(at) { 0xa5 } else { 0 }));
    }
}
