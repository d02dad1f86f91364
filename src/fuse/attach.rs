//! How the filesystem comes into the tree and leaves it.
//!
//! In: a [`ModelFs`], a mountpoint. Out: a running session; later: unmounted, or lazily detached with the holders named.
//! Promises: the mountpoint is opened once, without following a link in its last part, and mounted on by that descriptor,
//! so that nobody can swap it in between; always read-only, nosuid, nodev, noexec; an ordinary user goes through
//! fusermount3; nothing here opens a file inside the mount, so the daemon never waits for itself; an attachment is known by
//! its device number, and whatever else is mounted at its place is left alone; what fails leaves nothing in the tree.
//! Not here: when to stop and what to wipe (`host`).
//! Held by: tests/mount.rs, tests/lifecycle.rs.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

pub use fuser::BackgroundSession;
use fuser::{Config, Session, SessionACL};

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

/// A mount of ours. Once it has left the tree another may be mounted at its place, by another daemon, while this one still
/// serves those who hold its files: so it is known by its device, not by its place alone.
pub struct Attachment {
    mountpoint: PathBuf,
    /// `major:minor`; only another's need not be known. Nobody else gets it as long as the connection lives.
    device: Option<String>,
    /// The kernel's end of the session, to ask whether it lives; `None` once it does not. As long as any descriptor of it is
    /// open the kernel keeps readers waiting for answers.
    connection: Mutex<Option<OwnedFd>>,
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
    if mem::has_cap_sys_admin() {
        return attach_at(fs, &place, real_path, look);
    }
    attach_by_helper(fs, &real_path, look).inspect_err(|_| {
        // The helper may have mounted before something failed; without us that is dead.
        if let Err(error) = dead::clear(&real_path) {
            tracing::warn!("{}", error.chain());
        }
    })
}

fn attach_at(
    fs: ModelFs,
    place: &OwnedFd,
    real_path: PathBuf,
    look: &MountLook,
) -> Result<(BackgroundSession, Attachment)> {
    let refused = |e: io::Error| {
        Error::new(Code::Host, format!("the kernel refused to mount on {}", real_path.display())).with_source(e)
    };
    let device = open_device()?;
    let mount = make_mount(&device, look).map_err(refused)?;
    let number = device_of(&mount).map_err(refused)?;
    let connection = device.try_clone().map_err(refused)?;
    let session = start(fs, device, Answering::own(look))?;
    // Last: whatever failed before has left nothing in the tree, and the session ends with the mount that nobody can reach.
    move_onto(&mount, place).map_err(refused)?;
    let attachment = Attachment::new(real_path, Some(number), connection, By::Ourselves);
    attachment.set_read_ahead();
    Ok((session, attachment))
}

/// The helper puts it into the tree before anybody answers.
fn attach_by_helper(fs: ModelFs, place: &Path, look: &MountLook) -> Result<(BackgroundSession, Attachment)> {
    let refused = |e| helper_refused(place, e);
    let device = mount_by_helper(place, look).map_err(refused)?;
    let connection = device.try_clone().map_err(refused)?;
    let number = mounts::at(place)?.filter(mounts::Mount::is_ours).map(|mount| mount.device).ok_or_else(|| {
        Error::new(Code::Host, format!("what fusermount3 mounted on {} was taken off at once", place.display()))
    })?;
    let attachment = Attachment::new(place.to_owned(), Some(number), connection, By::Fusermount);
    let session = start(fs, device, Answering::own(look)).inspect_err(|_| {
        if let Err(error) = attachment.detach() {
            tracing::warn!("a dead mount stays: {}", error.chain());
        }
    })?;
    attachment.set_read_ahead();
    Ok((session, attachment))
}

/// How a session answers.
struct Answering {
    lets_others_in: bool,
    /// Each thread has a descriptor of its own, which takes an open of the device.
    clone_fd: bool,
    may_pass_through: bool,
}

impl Answering {
    fn own(look: &MountLook) -> Answering {
        Answering { lets_others_in: look.allow_other, clone_fd: true, may_pass_through: true }
    }
}

/// Greets the kernel and answers from now on.
///
/// fuser is given the device and not the mountpoint: what it mounts itself it takes off by path when the session is over, and
/// by then another may be mounted there.
fn start(fs: ModelFs, device: OwnedFd, how: Answering) -> Result<BackgroundSession> {
    let mut config = Config::default();
    config.n_threads = Some(request_threads());
    config.clone_fd = how.clone_fd;
    config.acl = if how.lets_others_in { SessionACL::All } else { SessionACL::Owner };
    let session = Session::from_fd(fs.clone(), device, config.acl, config)
        .map_err(|e| Error::new(Code::Host, "the kernel's FUSE handshake failed").with_source(e))?;
    fs.set_notifier(session.notifier());
    fs.set_passthrough(how.may_pass_through && fs.passthrough() && backing_accepted(&fs, &session));
    session.spawn().map_err(|e| Error::new(Code::Host, "cannot start the FUSE threads").with_source(e))
}

/// Starts answering on a mount that somebody else has made.
///
/// # Errors
/// `MOUNT_POINT` if the descriptor is served already; `HOST`: what the kernel said.
pub fn attach_given(fs: ModelFs, given: &Given, look: &MountLook) -> Result<(BackgroundSession, Attachment)> {
    let how = Answering {
        // The kernel lets in whom the mount's options let in, and the mount's user need not be ours.
        lets_others_in: look.allow_other || given.lets_others_in().is_some(),
        // Opening the device is what this path may have to do without.
        clone_fd: File::options().read(true).write(true).open("/dev/fuse").is_ok(),
        may_pass_through: false,
    };
    let device = given.claim()?;
    let connection = device
        .try_clone()
        .map_err(|e| Error::new(Code::Host, "cannot have a second descriptor of /dev/fuse").with_source(e))?;
    let session = start(fs, device, how)?;
    let attachment = Attachment::new(given.name(), given.device_number(), connection, By::Another(given.clone()));
    attachment.set_read_ahead();
    Ok((session, attachment))
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
            _ if mounts::is_of_dead(&e) => {
                refused("holds a dead mount; clear it with `modelfs umount` or `umount -l`".into())
            }
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

/// Has fusermount3 mount, and takes the device that it hands over.
fn mount_by_helper(mountpoint: &Path, look: &MountLook) -> io::Result<OwnedFd> {
    let mut options = "ro,nosuid,nodev,noexec,noatime,default_permissions,subtype=modelfs".to_owned();
    if look.allow_other {
        options.push_str(",allow_other");
    }
    // fusermount3 splits its options at commas.
    options.push_str(",fsname=");
    options.push_str(&look.source.replace(',', "_"));
    let (ours, theirs) = UnixStream::pair()?;
    let mut helper = Command::new("fusermount3");
    // Its end of the pair comes as standard input, which it reads nothing from.
    helper.arg("-o").arg(options).arg("--").arg(mountpoint).env("_FUSE_COMMFD", "0").stdin(OwnedFd::from(theirs));
    let output = processes::output(&mut helper)?;
    // Our copy of its end: with it open a helper that sent nothing would be waited for.
    drop(helper);
    if output.status.success() {
        return receive_descriptor(&ours);
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let not_allowed = said.contains("user_allow_other") || said.contains("ermission denied");
    Err(io::Error::new(if not_allowed { io::ErrorKind::PermissionDenied } else { io::ErrorKind::Other }, said))
}

/// The one descriptor that was sent, closed to programs that we start.
fn receive_descriptor(from: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = 0u8;
    let mut part = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // Aligned as a header is, and room for one.
    let mut control = [0u64; 3];
    // SAFETY: a msghdr is plain numbers and pointers, for which zeros are a fit start; what it points to lives through the
    // call, with its true length. The kernel has filled what CMSG_FIRSTHDR finds, and a descriptor that it made for us is
    // nobody else's.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        check(libc::recvmsg(from.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) as libc::c_long)?;
        let first = libc::CMSG_FIRSTHDR(&raw const message);
        if first.is_null() || ((*first).cmsg_level, (*first).cmsg_type) != (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "fusermount3 handed no device over"));
        }
        Ok(OwnedFd::from_raw_fd(libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned()))
    }
}

/// `major:minor` of a mount, in the tree or not, without a question to whoever serves it.
fn device_of(mount: &OwnedFd) -> io::Result<String> {
    let mut about = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: an open descriptor, an empty string and a buffer of the kernel's size, for which zeros are fit, alive through
    // the call.
    let about = unsafe {
        check(libc::statx(mount.as_raw_fd(), c"".as_ptr(), flags, 0, about.as_mut_ptr()).into())?;
        about.assume_init()
    };
    Ok(format!("{}:{}", about.stx_dev_major, about.stx_dev_minor))
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
    fn new(mountpoint: PathBuf, device: Option<String>, connection: OwnedFd, by: By) -> Attachment {
        Attachment { mountpoint, device, connection: Mutex::new(Some(connection)), by }
    }

    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether it is what this process finds at its place: not taken off, and nothing mounted over it. Another's need not be
    /// in sight: it lives as long as its session.
    pub fn is_mounted(&self) -> bool {
        self.is_given()
            || mounts::at(&self.mountpoint).ok().flatten().is_some_and(|mount| self.device == Some(mount.device))
    }

    /// Whether it lives and is in the tree at its place, perhaps below another mount. What cannot be seen counts as there.
    pub fn stands(&self) -> bool {
        if self.is_over() {
            return false;
        }
        if let By::Another(given) = &self.by
            && !given.is_seen()
        {
            return true;
        }
        let Some(device) = &self.device else { return true };
        mounts::is_at(&self.mountpoint, device).unwrap_or(true)
    }

    /// Whether somebody else mounted, and unmounts: until then readers have to be refused, not only kept out.
    pub fn is_given(&self) -> bool {
        matches!(self.by, By::Another(_))
    }

    /// `major:minor` of the mount.
    pub fn device_number(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// Best effort: only root may, and without it cold sequential reads come in smaller pieces.
    fn set_read_ahead(&self) {
        let Some(device) = self.device_number() else { return };
        let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
        if let Err(error) = std::fs::write(&path, READ_AHEAD_KIB.to_string()) {
            tracing::debug!("readahead stays as it is ({path}): {error}");
        }
    }

    /// Whether what is at its place is this very mount, alive or dead, and may be taken off.
    pub fn is_there(&self) -> bool {
        // The connection is asked after the table: while it lives, nobody else has our device number. Once it is closed a mount
        // of that number is ours only if it is dead; one that does not say so is left alone.
        self.is_mounted() && (!self.is_over() || dead::is_dead(&self.mountpoint).unwrap_or(false))
    }

    /// Whether the kernel has closed the connection: the last of the mount is gone, or somebody cut it.
    fn is_over(&self) -> bool {
        let connection = self.connection.lock().expect("a thread died asking the connection");
        let Some(connection) = &*connection else { return true };
        let mut poll = libc::pollfd { fd: connection.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one pollfd that outlives the call, which does not wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 && poll.revents & libc::POLLERR != 0 }
    }

    /// The session is over: nobody answers any more, and whoever still holds files is to be told so.
    pub fn close(&self) {
        self.connection.lock().expect("a thread died asking the connection").take();
    }

    /// Asks the kernel to unmount. `Ok(false)`: somebody still holds files. What another mounted is only cut off from us.
    pub fn unmount(&self) -> Result<bool> {
        match &self.by {
            By::Another(given) => {
                // Where we may not, the connection ends with this process. Once it is over its number may be another's.
                if !self.is_over() {
                    given.abort();
                }
                return Ok(true);
            }
            By::Fusermount | By::Ourselves if !self.is_there() => return Ok(true),
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
        match &self.by {
            By::Another(_) => return Ok(()),
            By::Fusermount | By::Ourselves if !self.is_there() => return Ok(()),
            By::Fusermount => return self.run_helper(&["-u", "-z"]).map(drop),
            By::Ourselves => {}
        }
        self.umount2(libc::UMOUNT_NOFOLLOW | libc::MNT_DETACH).map_err(|e| self.cannot_unmount(e))
    }

    fn cannot_unmount(&self, error: io::Error) -> Error {
        Error::new(Code::Host, format!("cannot unmount {}", self.mountpoint.display())).with_source(error)
    }

    /// Right after [`Attachment::is_there`]: the kernel takes off whatever is at the path by now.
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
