//! What a killed daemon leaves behind: a mount that nobody serves any more, taken off so that the next one finds its place.
//!
//! Promises: only a mount of ours is taken off, only when the kernel says that its connection is closed, and exactly the one
//! that was looked at, whatever is mounted there meanwhile; what alive, hung or foreign is there stays.
//! Held by: tests/service.rs, tests/systemd.sh.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use crate::error::{Code, Error, Result};
use crate::{mem, mounts, refuse};

/// How long a living daemon has to answer one question. A closed connection is told at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Dead mounts on top of each other: each start of a daemon that dies may have added one.
const STACKED_MAX: usize = 64;

/// Takes off every dead mount of ours that lies on `mountpoint` (absolute, no links). One that is alive is left to whoever
/// looks at the mountpoint next.
///
/// # Errors
/// `MOUNT_POINT` if what is there does not answer but is not dead either; `HOST` for what the kernel refused.
pub fn clear(mountpoint: &Path) -> Result<()> {
    for _ in 0..STACKED_MAX {
        if !mounts::at(mountpoint)?.is_some_and(|mount| mount.is_ours()) {
            return Ok(());
        }
        let root = root_of(mountpoint)?;
        if !is_dead_root(&root, mountpoint)? {
            return Ok(());
        }
        take_off(&root, mountpoint)?;
        tracing::warn!("cleared a dead mount on {}: its daemon ended without unmounting", mountpoint.display());
    }
    refuse!(MountPoint, "{} has more than {STACKED_MAX} dead mounts on it; `umount -l` them", mountpoint.display())
}

/// Whether the mount on `mountpoint` is one whose connection the kernel has closed.
///
/// # Errors
/// `MOUNT_POINT` if it does not answer but is not dead either; `HOST` for what the kernel refused.
pub fn is_dead(mountpoint: &Path) -> Result<bool> {
    is_dead_root(&root_of(mountpoint)?, mountpoint)
}

/// A descriptor on the mount itself: what is mounted over it later is another one.
fn root_of(mountpoint: &Path) -> Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(mountpoint)
        .map_err(|e| cannot(mountpoint, "cannot be looked at", e))
}

fn cannot(mountpoint: &Path, what: &str, error: io::Error) -> Error {
    Error::new(Code::Host, format!("the dead mount on {} {what}", mountpoint.display())).with_source(error)
}

/// Whether the kernel says so. Asked in a thread: a daemon that hangs answers never.
fn is_dead_root(root: &File, mountpoint: &Path) -> Result<bool> {
    let root = root.try_clone().map_err(|e| cannot(mountpoint, "cannot be looked at", e))?;
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new()
        .name("dead-mount".into())
        .spawn(move || {
            let mut about = std::mem::MaybeUninit::<libc::statfs>::uninit();
            // SAFETY: an open descriptor and a buffer of the kernel's size, both alive through the call.
            let rc = unsafe { libc::fstatfs(root.as_raw_fd(), about.as_mut_ptr()) };
            let error = (rc != 0).then(io::Error::last_os_error);
            // Nobody listens any more only after the timeout.
            let _ = tell.send(error.is_some_and(|error| error.raw_os_error() == Some(libc::ENOTCONN)));
        })
        .map_err(|e| cannot(mountpoint, "cannot be looked at", e))?;
    told.recv_timeout(ANSWER_TIMEOUT).map_err(|_| {
        let (path, s) = (mountpoint.display(), ANSWER_TIMEOUT.as_secs());
        Error::new(
            Code::MountPoint,
            format!("a mount on {path} did not answer within {s} s; end its daemon, or `umount -l {path}`"),
        )
    })
}

/// Lazily: nothing more can be asked of it, and programs that still have it open or mapped keep what they have.
fn take_off(root: &File, mountpoint: &Path) -> Result<()> {
    if !mem::has_cap_sys_admin() {
        let done = Command::new("fusermount3").args(["-u", "-z", "--"]).arg(mountpoint).output();
        let done = done.map_err(|e| cannot(mountpoint, "stays: cannot run fusermount3; install fuse3", e))?;
        if done.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&done.stderr);
        refuse!(Host, "fusermount3 cannot clear the dead mount on {}: {}", mountpoint.display(), said.trim());
    }
    let by_fd = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let path = CString::new(by_fd.into_os_string().into_encoded_bytes()).expect("our own words hold no NUL");
    // SAFETY: a NUL-terminated path that lives through the call.
    if unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } == 0 {
        return Ok(());
    }
    Err(cannot(mountpoint, "cannot be taken off", io::Error::last_os_error()))
}
