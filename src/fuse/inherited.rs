//! A mount that somebody else has made: its /dev/fuse descriptor, inherited from whoever started us.
//!
//! In: a mountpoint written as `/dev/fd/N` or `/proc/self/fd/N`, as mount.fuse3 with `drop_privileges` hands it over. Out: a
//! [`Given`], or a refusal that names the descriptor and what is wrong with it.
//! Promises: the descriptor is /dev/fuse, mounted and not served by anyone yet; it is ours alone from then on and no program
//! that we start inherits it; a mount that lets others in without checking modes is served only if every mode lets everyone
//! read. Mounting, its flags and unmounting are the other's.
//! Not here: the session on it (`attach`).
//! Held by: the tests below, tests/run_command.sh.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::error::{Code, Error, Result};
use crate::mounts::{self, Super};
use crate::refuse;

/// The device number of /dev/fuse: the same on every Linux.
const DEV_FUSE: (u32, u32) = (10, 229);

/// A mount made by another, of which we hold the descriptor.
#[derive(Debug, Clone)]
pub struct Given {
    /// Taken once, by the session. Copies of a plan share it.
    device: Arc<Mutex<Option<OwnedFd>>>,
    number: RawFd,
    /// The minor number of the mount; kernels before 6.17 do not tell.
    connection: Option<u32>,
    /// Where it is mounted, if that is in sight of this process.
    seen: Option<Super>,
}

/// The number in `/dev/fd/N` or `/proc/self/fd/N`; `None` for every other path.
pub fn number_in(mountpoint: &Path) -> Option<RawFd> {
    let text = mountpoint.to_str()?;
    let digits = text.strip_prefix("/dev/fd/").or_else(|| text.strip_prefix("/proc/self/fd/"))?;
    (!digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok()).flatten()
}

impl Given {
    /// Takes descriptor `number` of this process over.
    ///
    /// # Errors
    /// `MOUNT_POINT` if it is not open, not /dev/fuse, not mounted, or served already.
    pub fn take(number: RawFd) -> Result<Given> {
        if number <= 2 {
            refuse!(
                MountPoint,
                "descriptor {number} is a standard stream; hand /dev/fuse over as descriptor 3 or above"
            );
        }
        check_kind(number)?;
        check_waiting(number)?;
        // What we start must not be able to answer for us; and a read that would block must wait, not spin.
        // SAFETY: plain calls on a descriptor that was just seen to be open.
        unsafe {
            libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC);
            let flags = libc::fcntl(number, libc::F_GETFL);
            libc::fcntl(number, libc::F_SETFL, flags & !libc::O_NONBLOCK);
        }
        // SAFETY: whoever started us gave it to us by its number, and nothing else in this process knows of it.
        let device = unsafe { OwnedFd::from_raw_fd(number) };
        let connection = connection_of(number);
        let seen = connection.map(|minor| mounts::of_device(&format!("0:{minor}"))).transpose()?.flatten();
        Ok(Given { device: Arc::new(Mutex::new(Some(device))), number, connection, seen })
    }

    /// The descriptor, for its one session.
    ///
    /// # Errors
    /// `MOUNT_POINT` the second time.
    pub fn claim(&self) -> Result<OwnedFd> {
        let device = self.device.lock().expect("a thread died holding the descriptor").take();
        device.ok_or_else(|| Error::new(Code::MountPoint, format!("descriptor {} is served already", self.number)))
    }

    /// What the mount is called: its folder, or the descriptor where the folder is out of our sight.
    pub fn name(&self) -> PathBuf {
        match &self.seen {
            Some(seen) => seen.mountpoint.clone(),
            None => PathBuf::from(format!("/dev/fd/{}", self.number)),
        }
    }

    /// Whether its folder was in sight when it was handed over.
    pub fn is_seen(&self) -> bool {
        self.seen.is_some()
    }

    /// `major:minor`, where the kernel tells.
    pub fn device_number(&self) -> Option<String> {
        self.connection.map(|minor| format!("0:{minor}"))
    }

    /// Whether users other than the mount's own may enter; `None`: not in our sight.
    pub fn lets_others_in(&self) -> Option<bool> {
        self.seen.as_ref().map(|seen| seen.has("allow_other"))
    }

    /// Whether the kernel checks owner and modes on this mount. Where we cannot see it, it counts as not.
    pub fn checks_modes(&self) -> bool {
        self.seen.as_ref().is_some_and(|seen| seen.has("default_permissions"))
    }

    /// Ends the connection, so that readers get an error at once instead of waiting for an answer that never comes. The
    /// kernel lets the mount's own user do so where fusectl is mounted. `false`: it ends with this process.
    pub fn abort(&self) -> bool {
        let Some(minor) = self.connection else { return false };
        std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1").is_ok()
    }
}

fn check_kind(number: RawFd) -> Result<()> {
    // SAFETY: a stat is plain numbers for which zeros are a fit start; the kernel fills it.
    let stat = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(number, &mut stat) != 0 {
            return Err(Error::os(
                Code::MountPoint,
                format!(
                    "descriptor {number} is not open here; the program that starts modelfs must pass it on (no CLOEXEC)"
                ),
            ));
        }
        stat
    };
    let seen = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || seen != DEV_FUSE {
        let path = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
        refuse!(MountPoint, "descriptor {number} is {}, not /dev/fuse", path.display());
    }
    Ok(())
}

/// A fresh mount has its first request waiting; without one somebody has answered it, and we would wait for ever.
fn check_waiting(number: RawFd) -> Result<()> {
    let mut poll = libc::pollfd { fd: number, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that outlives the call, which does not wait.
    if unsafe { libc::poll(&mut poll, 1, 0) } < 0 {
        return Err(Error::os(Code::MountPoint, format!("descriptor {number} cannot be asked")));
    }
    if poll.revents & libc::POLLERR != 0 {
        refuse!(MountPoint, "descriptor {number} is /dev/fuse, but nothing is mounted with it (or not any more)");
    }
    if poll.revents & libc::POLLIN == 0 {
        refuse!(MountPoint, "descriptor {number} is /dev/fuse, but another program has begun to serve its mount");
    }
    Ok(())
}

/// The number that the kernel gave the mount, where it tells.
fn connection_of(number: RawFd) -> Option<u32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    info.lines().find_map(|line| line.strip_prefix("fuse_connection:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_the_two_forms_with_a_number_name_a_descriptor() {
        assert_eq!(number_in(Path::new("/dev/fd/3")), Some(3));
        assert_eq!(number_in(Path::new("/proc/self/fd/12")), Some(12));
        for other in
            ["/dev/fd", "/dev/fd/", "/dev/fd/x", "/dev/fd/3/x", "/dev/fd/-1", "/dev/fd/99999999999", "/mnt", "3"]
        {
            assert_eq!(number_in(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_descriptor_that_is_closed_a_stream_or_another_file_is_refused_by_its_number() {
        let file = tempfile::tempfile().expect("a file");
        // Higher than any limit: other tests have many files open.
        let closed = RawFd::MAX;
        for (number, word) in [(1, "standard stream"), (closed, "not open here"), (file.as_raw_fd(), "not /dev/fuse")] {
            let error = Given::take(number).expect_err("refused");
            assert_eq!(error.code(), Code::MountPoint, "{error:?}");
            assert!(error.message().contains(word) && error.message().contains(&number.to_string()), "{error:?}");
        }
    }

    #[test]
    fn a_device_that_nobody_has_mounted_is_refused() {
        let Ok(device) = std::fs::File::options().read(true).write(true).open("/dev/fuse") else {
            assert!(std::env::var_os("CI").is_none(), "CI needs /dev/fuse");
            return eprintln!("SKIPPED: needs /dev/fuse");
        };
        let error = Given::take(device.as_raw_fd()).expect_err("refused");
        assert!(error.message().contains("nothing is mounted"), "{error:?}");
    }
}
