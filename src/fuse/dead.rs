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
            let _ = tell.send(error.is_some_and(|error| mounts::is_of_dead(&error)));
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    const STATFS: u32 = 17;
    const INIT: u32 = 26;

    /// A daemon that has taken the question and is killed over it.
    #[test]
    fn a_mount_whose_daemon_dies_while_it_is_asked_is_dead() {
        if !mem::has_cap_sys_admin() || !Path::new("/dev/fuse").exists() {
            assert!(std::env::var_os("CI").is_none(), "CI needs root and /dev/fuse");
            return eprintln!("SKIPPED: needs root and /dev/fuse");
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let target = folder.path().canonicalize().expect("real");
        let mut device = File::options().read(true).write(true).open("/dev/fuse").expect("opened");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let words = |text: &str| CString::new(text).expect("no NUL");
        let (path, kind, options) = (words(target.to_str().expect("text")), words("fuse.modelfs"), words(&options));
        // SAFETY: NUL-terminated strings that live through the call.
        let rc = unsafe { libc::mount(kind.as_ptr(), path.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
        assert_eq!(rc, 0, "{}", io::Error::last_os_error());
        let mut next = |wanted: u32| {
            let mut request = vec![0; 1 << 20];
            loop {
                let got = device.read(&mut request).expect("a request");
                let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().expect("four bytes"));
                assert!(got >= 40);
                if word(4) == wanted {
                    return (request[8..16].to_vec(), device.try_clone().expect("a second descriptor"));
                }
            }
        };
        let (unique, mut answering) = next(INIT);
        // Header (length, no error, which request), then version 7.31 and no features.
        let mut init = [80u32.to_ne_bytes(), [0; 4]].concat();
        init.extend(unique);
        init.extend([7u32, 31].map(u32::to_ne_bytes).concat());
        init.resize(80, 0);
        answering.write_all(&init).expect("answered");
        drop(answering);
        let asked = std::thread::spawn({
            let target = target.clone();
            move || is_dead(&target)
        });
        drop(next(STATFS));
        drop(device);
        let dead = asked.join().expect("asked");
        // SAFETY: as above.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        assert!(dead.expect("told"), "it counts as alive, and whoever looks next finds it gone");
    }
}
