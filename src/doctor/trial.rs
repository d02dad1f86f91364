//! What the kernel grants when it is asked, rather than what its version promises: a FUSE connection that is in no mount
//! table and ends with the question.
//!
//! Promises: nothing is mounted anywhere; the answer comes within [`ANSWER_MS`] or is told as missing.
//! Held by: `a_kernel_that_lets_us_mount_says_what_it_offers`.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// The kernel asks as soon as the connection is made.
const ANSWER_MS: libc::c_int = 1000;

/// What the kernel's FUSE offers, as its first request says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fuse {
    /// Major and minor of the protocol.
    pub protocol: (u32, u32),
    /// The bits of linux/fuse.h, both halves.
    pub features: u64,
    /// Whether a file of memory was taken as backing; why not.
    pub passthrough: Result<(), String>,
}

impl Fuse {
    /// What this program uses, each for a speed of its own.
    const USED: [(&str, u32); 5] = [
        ("async-dio", 15),
        ("parallel-dirops", 18),
        ("cache-symlinks", 23),
        ("direct-io-mmap", 36),
        ("passthrough", 37),
    ];

    /// Features in use that this kernel offers, and those that it does not.
    pub fn used(&self) -> (Vec<&'static str>, Vec<&'static str>) {
        let offered = |bit: u32| self.features >> bit & 1 == 1;
        let (there, missing): (Vec<_>, Vec<_>) = Fuse::USED.iter().partition(|(_, bit)| offered(*bit));
        let names = |list: Vec<&(&'static str, u32)>| list.into_iter().map(|(name, _)| *name).collect();
        (names(there), names(missing))
    }
}

/// Makes a connection, answers the kernel's first request, and lends it one page.
///
/// # Errors
/// In words: what the kernel refused on the way to a mount.
pub fn fuse() -> Result<Fuse, String> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let device = File::options().read(true).write(true).custom_flags(flags).open("/dev/fuse");
    let mut device = device.map_err(|e| format!("/dev/fuse cannot be opened: {e}"))?;
    let superblock = connect(&device).map_err(|e| format!("the kernel refuses a FUSE mount: {e}"))?;
    let trial = handshake(&mut device).map_err(|e| format!("the kernel's FUSE does not greet: {e}"));
    // The device first: what the kernel still has to ask then ends at once.
    drop(device);
    drop(superblock);
    trial
}

/// A superblock on `device`, held by the descriptor alone.
fn connect(device: &File) -> io::Result<OwnedFd> {
    // SAFETY: the name is a C string; the answer is a new descriptor that is ours.
    let context = unsafe {
        let fd = checked(libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), libc::FSOPEN_CLOEXEC))?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let configure = |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>| {
        let text = |it: Option<&CStr>| it.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: both strings outlive the call; null where the command takes none.
        checked(unsafe {
            libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, text(key), text(value), 0 as libc::c_int)
        })
    };
    let number = |n: u32| std::ffi::CString::new(n.to_string()).expect("digits hold no NUL");
    // SAFETY: both only read this process's credentials.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let fd = number(device.as_raw_fd().unsigned_abs());
    let settings =
        [(c"fd", fd), (c"rootmode", c"40000".to_owned()), (c"user_id", number(uid)), (c"group_id", number(gid))];
    for (key, value) in &settings {
        configure(libc::FSCONFIG_SET_STRING, Some(key), Some(value))?;
    }
    configure(libc::FSCONFIG_CMD_CREATE, None, None)?;
    Ok(context)
}

fn checked(answer: libc::c_long) -> io::Result<libc::c_long> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// Bytes of `fuse_in_header`, `fuse_out_header` and `fuse_init_out`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const INIT_OUT: usize = 64;
const FUSE_INIT: u32 = 26;
const FUSE_INIT_EXT: u64 = 1 << 30;
const FUSE_PASSTHROUGH: u64 = 1 << 37;

fn handshake(device: &mut File) -> io::Result<Fuse> {
    let mut ready = libc::pollfd { fd: device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that outlives the call.
    if unsafe { libc::poll(&mut ready, 1, ANSWER_MS) } != 1 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // The kernel wants room for the largest request there may be.
    let mut request = vec![0u8; 64 << 10];
    let len = device.read(&mut request)?;
    let word = |at: usize| {
        let bytes = request.get(at..at + 4).filter(|_| at + 4 <= len)?;
        Some(u32::from_ne_bytes(bytes.try_into().expect("four bytes")))
    };
    let (Some(FUSE_INIT), Some(major), Some(minor), Some(low)) =
        (word(4), word(IN_HEADER), word(IN_HEADER + 4), word(IN_HEADER + 12))
    else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let high = if u64::from(low) & FUSE_INIT_EXT != 0 { word(IN_HEADER + 16).unwrap_or(0) } else { 0 };
    let features = u64::from(high) << 32 | u64::from(low);

    let granted = features & (FUSE_INIT_EXT | FUSE_PASSTHROUGH);
    let mut reply = [0u8; OUT_HEADER + INIT_OUT];
    let put = |reply: &mut [u8], at: usize, bytes: &[u8]| reply[at..at + bytes.len()].copy_from_slice(bytes);
    put(&mut reply, 0, &((OUT_HEADER + INIT_OUT) as u32).to_ne_bytes());
    put(&mut reply, 8, &request[8..16]);
    put(&mut reply, OUT_HEADER, &major.to_ne_bytes());
    put(&mut reply, OUT_HEADER + 4, &minor.to_ne_bytes());
    put(&mut reply, OUT_HEADER + 12, &(granted as u32).to_ne_bytes());
    put(&mut reply, OUT_HEADER + 20, &4096u32.to_ne_bytes());
    put(&mut reply, OUT_HEADER + 24, &1u32.to_ne_bytes());
    put(&mut reply, OUT_HEADER + 32, &((granted >> 32) as u32).to_ne_bytes());
    // Files of a file system that lies on no other may be lent.
    put(&mut reply, OUT_HEADER + 36, &1u32.to_ne_bytes());
    device.write_all(&reply)?;
    let passthrough = match features & FUSE_PASSTHROUGH {
        0 => Err("the kernel does not offer it".to_owned()),
        _ => lend(device).map_err(|e| format!("the kernel does not take a file of memory: {e}")),
    };
    Ok(Fuse { protocol: (major, minor), features, passthrough })
}

fn lend(device: &File) -> io::Result<()> {
    #[repr(C)]
    struct Backing {
        fd: i32,
        flags: u32,
        padding: u64,
    }
    const BACKING_OPEN: libc::c_ulong = 0x4010_e501;
    const BACKING_CLOSE: libc::c_ulong = 0x4004_e502;
    // SAFETY: a C string and a flag; the answer is a new descriptor that is ours.
    let file = unsafe {
        let fd = checked(libc::memfd_create(c"modelfs-doctor".as_ptr(), libc::MFD_CLOEXEC).into())?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    let map = Backing { fd: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: the first ioctl reads the struct, the second one word; both live through the calls.
    unsafe {
        let id = checked(libc::ioctl(device.as_raw_fd(), BACKING_OPEN as _, &map).into())? as u32;
        libc::ioctl(device.as_raw_fd(), BACKING_CLOSE as _, &id);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_lets_us_mount_says_what_it_offers() {
        if !crate::mem::has_cap_sys_admin() || !std::path::Path::new("/dev/fuse").exists() {
            assert!(std::env::var_os("CI").is_none(), "CI needs /dev/fuse and root");
            return eprintln!("SKIPPED: needs /dev/fuse and root");
        }
        let fuse_mounts = || {
            let table = std::fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
            table.lines().filter(|line| line.contains(" - fuse ")).map(str::to_owned).collect::<Vec<_>>()
        };
        let before = fuse_mounts();
        let fuse = fuse().expect("root may mount");
        assert_eq!(fuse.protocol.0, 7, "{fuse:?}");
        let (there, missing) = fuse.used();
        assert_eq!(there.len() + missing.len(), Fuse::USED.len());
        assert_eq!(fuse.passthrough.is_ok(), there.contains(&"passthrough"), "{fuse:?}");
        assert_eq!(fuse_mounts(), before);
    }

    #[test]
    fn what_is_not_offered_is_named() {
        let fuse = Fuse { protocol: (7, 38), features: 1 << 15 | 1 << 36, passthrough: Err("no".into()) };
        assert_eq!(fuse.used().0, ["async-dio", "direct-io-mmap"]);
        assert_eq!(fuse.used().1, ["parallel-dirops", "cache-symlinks", "passthrough"]);
    }
}
