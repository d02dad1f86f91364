//! The kernel calls below the local store: opening beneath a folder, reading without a map.
//!
//! In: descriptors of folders we hold. Out: descriptors and bytes, or an `io::Error`.
//! Promises: nothing outside the folder can be reached, by no symlink and no `..`; memory is never mapped from a file.
//! Not here: what the errors mean (`local`). Held by: the hostile cases of tests/store_contract.rs.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Opens `path` below `dir`; the kernel refuses symlinks in any component and every way out.
pub(crate) fn open_beneath(dir: &OwnedFd, path: &CStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: open_how is plain integers; all zero is a valid value of it.
    let mut how: libc::open_how = unsafe { mem::zeroed() };
    // No O_NOFOLLOW: it would turn a symlink in the last component from ELOOP into ENOTDIR, which is another story.
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
    loop {
        // SAFETY: the path is NUL-terminated, `how` has the size given, both outlive the call.
        let fd = unsafe {
            libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), path.as_ptr(), &raw const how, size_of_val(&how))
        };
        if fd >= 0 {
            // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) });
        }
        let error = io::Error::last_os_error();
        // EAGAIN: a rename elsewhere raced the walk and the kernel could not be sure; the walk is to be made again.
        if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return Err(error);
        }
    }
}

pub(crate) fn fstat(fd: &OwnedFd) -> io::Result<libc::stat> {
    // SAFETY: stat is plain integers; fstat fills it.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open and `stat` outlives the call.
    if unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat)
}

/// The entries of the folder behind the descriptor itself, not of whatever now has its path.
pub(crate) fn read_fd_dir(dir: &OwnedFd) -> io::Result<std::fs::ReadDir> {
    std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))
}

/// Brings the folder's names to the disk.
pub(super) fn sync_dir(dir: &OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    if unsafe { libc::fsync(dir.as_raw_fd()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Appends up to `len` bytes of `file` from `offset` to `bytes`, fewer only at its end.
///
/// Reads into memory that was never zeroed: zeroing 8 MiB for each chunk costs as much as copying it.
pub(super) fn read_into(file: &File, mut offset: u64, bytes: &mut Vec<u8>, len: usize) -> io::Result<()> {
    let end = bytes.len() + len;
    bytes.reserve_exact(len);
    while bytes.len() < end {
        let at = libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let want = end - bytes.len();
        let room = &mut bytes.spare_capacity_mut()[..want];
        // SAFETY: `room` is writable memory of that length, owned by `bytes`, and pread writes at most that much.
        let got = unsafe { libc::pread(file.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), at) };
        match usize::try_from(got) {
            Ok(0) => break,
            Ok(got) => {
                offset += got as u64;
                // SAFETY: pread has just written `got` bytes behind the old length, within the capacity.
                unsafe { bytes.set_len(bytes.len() + got) };
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
