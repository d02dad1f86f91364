//! How the filesystem comes into the tree and leaves it.
//!
//! In: a [`ModelFs`], a mountpoint. Out: a running session; later: unmounted, or lazily detached with the holders named.
//! Promises: the mountpoint is opened once, without following a link in its last part, and mounted on by that descriptor,
//! so that nobody can swap it in between; always read-only, nosuid, nodev, noexec; an ordinary user goes through
//! fusermount3; nothing here opens a file inside the mount, so the daemon never waits for itself.
//! Not here: when to stop and what to wipe (`daemon`).
//! Held by: tests/mount.rs.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};

use super::inherited::Given;
use super::{ModelFs, dead};
use crate::error::{Code, Error, Result};
use crate::{mem, mounts, processes};

/// The mount's readahead, KiB: larger makes random faults slow and sequential reads no faster (docs/PERFORMANCE.md).
pub const READ_AHEAD_KIB: u32 = 1024;

/// The most reads through the page cache that the kernel lets be under way: no limit (`ModelFs::init` says why).
pub const BACKGROUND_REQUESTS: u16 = u16::MAX;

/// Threads that read FUSE requests. None of them ever waits, so few are enough; two, so that a long copy in one does not
/// stall the others.
fn request_threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4)
}

/// How the mount should look from outside.
#[derive(Debug, Clone)]
pub struct MountLook {
    /// First column of /proc/mounts: the store's URL, without secrets.
    pub source: String,
    /// Whether other users may enter (then the kernel checks modes for everyone).
    pub allow_other: bool,
}

/// A mount of ours.
pub struct Attachment {
    mountpoint: PathBuf,
    by: By,
}

/// Who mounts and unmounts.
enum By {
    Ourselves,
    Fusermount,
    /// Whoever gave us the descriptor.
    Another(Given),
}

/// Mounts and starts answering.
///
/// # Errors
/// `MOUNT_POINT`: not a directory, a link, not empty. `HOST`: what the kernel said, with the fix where one is known.
pub fn attach(fs: ModelFs, mountpoint: &Path, look: &MountLook) -> Result<(BackgroundSession, Attachment)> {
    dead::clear(mountpoint)?;
    let (place, real_path) = open_mountpoint(mountpoint)?;
    let by_helper = !mem::has_cap_sys_admin();
    let mut config = Config::default();
    config.n_threads = Some(request_threads());
    config.clone_fd = true;
    config.acl = if look.allow_other { SessionACL::All } else { SessionACL::Owner };
    let session = if by_helper {
        config.mount_options = vec![
            MountOption::RO,
            MountOption::NoSuid,
            MountOption::NoDev,
            MountOption::NoExec,
            MountOption::NoAtime,
            MountOption::DefaultPermissions,
            // fusermount3 splits its options at commas.
            MountOption::FSName(look.source.replace(',', "_")),
            MountOption::Subtype("modelfs".into()),
        ];
        Session::new(fs.clone(), &real_path, &config).map_err(|e| helper_refused(&real_path, e))?
    } else {
        let device = open_device()?;
        let mount = make_mount(&device, look).map_err(|e| {
            Error::new(Code::Host, format!("the kernel refused to mount on {}", real_path.display())).with_source(e)
        })?;
        let session = Session::from_fd(fs.clone(), device, config.acl, config)
            .map_err(|e| Error::new(Code::Host, "the kernel's FUSE handshake failed").with_source(e))?;
        move_onto(&mount, &place).map_err(|e| {
            Error::new(Code::Host, format!("the kernel refused to mount on {}", real_path.display())).with_source(e)
        })?;
        session
    };
    fs.set_notifier(session.notifier());
    if fs.passthrough() {
        fs.set_passthrough(backing_accepted(&fs, &session));
    }
    let background =
        session.spawn().map_err(|e| Error::new(Code::Host, "cannot start the FUSE threads").with_source(e))?;
    let by = if by_helper { By::Fusermount } else { By::Ourselves };
    let attachment = Attachment { mountpoint: real_path, by };
    attachment.set_read_ahead();
    Ok((background, attachment))
}

/// Starts answering on a mount that somebody else has made.
///
/// # Errors
/// `MOUNT_POINT` if the descriptor is served already; `HOST`: what the kernel said.
pub fn attach_given(fs: ModelFs, given: &Given, look: &MountLook) -> Result<(BackgroundSession, Attachment)> {
    let mut config = Config::default();
    config.n_threads = Some(request_threads());
    // A second descriptor takes a second open of the device, which is what this path does without.
    config.clone_fd = File::options().read(true).write(true).open("/dev/fuse").is_ok();
    // The kernel lets in whom the mount's options let in, and the mount's user need not be ours.
    let by_kernel = look.allow_other || given.lets_others_in().is_some();
    config.acl = if by_kernel { SessionACL::All } else { SessionACL::Owner };
    let session = Session::from_fd(fs.clone(), given.claim()?, config.acl, config)
        .map_err(|e| Error::new(Code::Host, "the kernel's FUSE handshake failed").with_source(e))?;
    fs.set_notifier(session.notifier());
    fs.set_passthrough(false);
    let background =
        session.spawn().map_err(|e| Error::new(Code::Host, "cannot start the FUSE threads").with_source(e))?;
    let attachment = Attachment { mountpoint: given.name(), by: By::Another(given.clone()) };
    attachment.set_read_ahead();
    Ok((background, attachment))
}

/// The mountpoint itself, held by a descriptor so that it cannot be swapped, and its path without links.
fn open_mountpoint(mountpoint: &Path) -> Result<(OwnedFd, PathBuf)> {
    let refused = |why: String| Error::new(Code::MountPoint, format!("{} {why}", mountpoint.display()));
    // `link/` and `link/.` would lead the kernel through the link in spite of O_NOFOLLOW.
    let plain: PathBuf = mountpoint.components().collect();
    let place = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&plain)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => refused("does not exist; make the directory first".into()),
            Some(libc::ENOTCONN) => refused("holds a dead mount; clear it with `modelfs umount` or `umount -l`".into()),
            _ => refused("cannot be opened".into()).with_source(e),
        })?;
    let kind = place.metadata().map_err(|e| refused("cannot be looked at".into()).with_source(e))?.file_type();
    if kind.is_symlink() {
        return Err(refused("is a symbolic link; name the directory itself".into()));
    }
    if !kind.is_dir() {
        return Err(refused("is not a directory".into()));
    }
    let by_fd = format!("/proc/self/fd/{}", place.as_raw_fd());
    let mut inside = std::fs::read_dir(&by_fd).map_err(|e| refused("cannot be listed".into()).with_source(e))?;
    if inside.next().is_some() {
        return Err(refused("is not empty; files in it would be hidden by the mount".into()));
    }
    let real_path = std::fs::read_link(&by_fd).map_err(|e| refused("has no path".into()).with_source(e))?;
    Ok((place.into(), real_path))
}

fn open_device() -> Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/fuse").map_err(|e| {
        Error::new(Code::Host, "cannot open /dev/fuse; load the module (modprobe fuse) or pass --device /dev/fuse")
            .with_source(e)
    })?;
    Ok(device.into())
}

fn helper_refused(mountpoint: &Path, error: io::Error) -> Error {
    let hint = match error.kind() {
        io::ErrorKind::NotFound => "; install fuse3 (fusermount3), which mounts for ordinary users",
        io::ErrorKind::PermissionDenied => {
            "; is /dev/fuse readable for this user, and does the user own the mountpoint? allow_other needs \
             user_allow_other in /etc/fuse.conf"
        }
        _ => "",
    };
    Error::new(Code::Host, format!("fusermount3 could not mount on {}{hint}", mountpoint.display())).with_source(error)
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the system call just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A FUSE mount that is nowhere in the tree yet.
fn make_mount(device: &OwnedFd, look: &MountLook) -> io::Result<OwnedFd> {
    const FSCONFIG_SET_FLAG: libc::c_uint = 0;
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    // SAFETY: plain numbers and NUL-terminated strings that live through each call.
    unsafe {
        let context = owned(libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), FSOPEN_CLOEXEC))?;
        let fd = context.as_raw_fd();
        let set = |key: &str, value: &str| -> io::Result<()> {
            let key = CString::new(key).expect("our own words hold no NUL");
            let value = CString::new(value.replace('\0', "?")).expect("NULs were replaced");
            check(libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr(), 0))?;
            Ok(())
        };
        let flag = |key: &str| -> io::Result<()> {
            let key = CString::new(key).expect("our own words hold no NUL");
            let none: *const libc::c_char = std::ptr::null();
            check(libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_SET_FLAG, key.as_ptr(), none, 0))?;
            Ok(())
        };
        set("source", &look.source)?;
        set("subtype", "modelfs")?;
        set("fd", &device.as_raw_fd().to_string())?;
        set("rootmode", "40000")?;
        set("user_id", &libc::geteuid().to_string())?;
        set("group_id", &libc::getegid().to_string())?;
        flag("default_permissions")?;
        if look.allow_other {
            flag("allow_other")?;
        }
        flag("ro")?;
        let none: *const libc::c_char = std::ptr::null();
        check(libc::syscall(libc::SYS_fsconfig, fd, FSCONFIG_CMD_CREATE, none, none, 0))?;
        let attributes = libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC
            | libc::MOUNT_ATTR_NOATIME;
        owned(libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes))
    }
}

fn move_onto(mount: &OwnedFd, place: &OwnedFd) -> io::Result<()> {
    const FROM_EMPTY_PATH: libc::c_uint = 0x4;
    const TO_EMPTY_PATH: libc::c_uint = 0x40;
    // SAFETY: two open descriptors and two empty strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            place.as_raw_fd(),
            c"".as_ptr(),
            FROM_EMPTY_PATH | TO_EMPTY_PATH,
        )
    })?;
    Ok(())
}

/// Whether this connection takes the arena's memory as backing: asked once, with a page of zeros, so that no program's
/// open has to find out.
fn backing_accepted(fs: &ModelFs, session: &Session<ModelFs>) -> bool {
    let attempt = || -> Result<()> {
        let probe = fs.reader().cache().arena().create(mem::SMALL_PAGE_BYTES, mem::Pages::Small)?;
        probe.freeze()?;
        let refused = |e| Error::new(Code::Host, "the kernel refused passthrough").with_source(e);
        let id = fuser::BackingId::create_raw(session.as_fd(), probe.backing()).map_err(refused)?;
        const FUSE_DEV_IOC_BACKING_CLOSE: libc::c_ulong = 0x4004_e502;
        // SAFETY: the ioctl reads one u32, which lives through the call; the id is the one just made and used by nobody.
        unsafe { libc::ioctl(session.as_fd().as_raw_fd(), FUSE_DEV_IOC_BACKING_CLOSE as _, &id) };
        Ok(())
    };
    match attempt() {
        Ok(()) => true,
        Err(error) => {
            tracing::info!("whole files are served through the daemon: {}", error.chain());
            false
        }
    }
}

impl Attachment {
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether the mount is still in this process's mount table. Another's need not be: it lives as long as its session.
    pub fn is_mounted(&self) -> bool {
        self.is_given() || self.device_number().is_some()
    }

    /// Whether somebody else mounted, and unmounts: until then readers have to be refused, not only kept out.
    pub fn is_given(&self) -> bool {
        matches!(self.by, By::Another(_))
    }

    /// `major:minor` of the mount.
    pub fn device_number(&self) -> Option<String> {
        if let By::Another(given) = &self.by {
            return given.device_number();
        }
        mounts::at(&self.mountpoint).ok().flatten().filter(mounts::Mount::is_ours).map(|mount| mount.device)
    }

    /// Best effort: only root may, and without it cold sequential reads come in smaller pieces.
    fn set_read_ahead(&self) {
        let Some(device) = self.device_number() else { return };
        let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
        if let Err(error) = std::fs::write(&path, READ_AHEAD_KIB.to_string()) {
            tracing::debug!("readahead stays as it is ({path}): {error}");
        }
    }

    /// Asks the kernel to unmount. `Ok(false)`: somebody still holds files. What another mounted is only cut off from us.
    pub fn unmount(&self) -> Result<bool> {
        if !self.is_mounted() {
            return Ok(true);
        }
        match &self.by {
            By::Another(given) => {
                // Where we may not, the connection ends with this process.
                given.abort();
                return Ok(true);
            }
            By::Fusermount => return self.run_helper(&["-u"]),
            By::Ourselves => {}
        }
        match self.umount2(libc::UMOUNT_NOFOLLOW) {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EBUSY) => Ok(false),
                // Somebody else unmounted it first.
                Some(libc::EINVAL | libc::ENOENT) => Ok(true),
                _ => Err(self.cannot_unmount(error)),
            },
        }
    }

    /// Takes the mount out of the tree although files are open: nobody new can enter.
    pub fn detach(&self) -> Result<()> {
        if !self.is_mounted() {
            return Ok(());
        }
        match &self.by {
            By::Another(_) => return Ok(()),
            By::Fusermount => return self.run_helper(&["-u", "-z"]).map(drop),
            By::Ourselves => {}
        }
        self.umount2(libc::UMOUNT_NOFOLLOW | libc::MNT_DETACH).map_err(|e| self.cannot_unmount(e))
    }

    fn cannot_unmount(&self, error: io::Error) -> Error {
        Error::new(Code::Host, format!("cannot unmount {}", self.mountpoint.display())).with_source(error)
    }

    fn umount2(&self, flags: libc::c_int) -> io::Result<()> {
        let path = CString::new(self.mountpoint.as_os_str().as_bytes()).expect("a path from the kernel holds no NUL");
        // SAFETY: a NUL-terminated path that lives through the call.
        if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// `Ok(false)`: busy. fusermount3 tells so only in words, hence by looking whether the mount is still there.
    fn run_helper(&self, arguments: &[&str]) -> Result<bool> {
        let output = processes::output(Command::new("fusermount3").args(arguments).arg("--").arg(&self.mountpoint))
            .map_err(|e| Error::new(Code::Host, "cannot run fusermount3; install fuse3").with_source(e))?;
        if output.status.success() || !self.is_mounted() {
            return Ok(true);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("busy") {
            return Ok(false);
        }
        Err(Error::new(
            Code::Host,
            format!("fusermount3 cannot unmount {}: {}", self.mountpoint.display(), said.trim()),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mountpoint_that_is_a_link_a_file_missing_or_full_is_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("file");
        std::fs::write(&file, b"x").expect("write");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/tmp", &link).expect("symlink");
        for (path, word) in [
            (file.clone(), "not a directory"),
            (link, "symbolic link"),
            (folder.path().join("none"), "not exist"),
            (folder.path().to_owned(), "not empty"),
        ] {
            let error = open_mountpoint(&path).expect_err("refused");
            assert_eq!(error.code(), Code::MountPoint);
            assert!(error.message().contains(word), "{error:?}");
        }
        let empty = folder.path().join("empty");
        std::fs::create_dir(&empty).expect("mkdir");
        assert_eq!(open_mountpoint(&empty).expect("accepted").1, empty.canonicalize().expect("canonical"));
    }
}
