//! Files that hold secrets, read without leaving copies.
//!
//! Promises: a file is judged by the open descriptor, never by its path; opening never blocks and follows no symlink.
//! Held by: the tests of `keys::source`, THREAT_MODEL (f) row 43.

use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::LockedBuf;
use crate::error::{Code, Error, Result};
use crate::refuse;

fn open_private_file(path: &Path, max: u64) -> Result<std::fs::File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|err| {
        let (code, why) = match err.raw_os_error() {
            Some(libc::ELOOP) => (Code::KeyPerms, "is a symlink, name the file itself"),
            Some(libc::EACCES | libc::EPERM) => (Code::KeyPerms, "cannot be opened"),
            // A socket, or a device without a driver.
            Some(libc::ENXIO | libc::ENODEV) => (Code::KeyPerms, "is not a regular file"),
            _ => (Code::Usage, "cannot be opened"),
        };
        Error::new(code, format!("key file {} {why}", path.display())).with_source(err)
    })?;
    let meta = file.metadata().map_err(|err| {
        Error::new(Code::Host, format!("cannot examine key file {}", path.display())).with_source(err)
    })?;
    if !meta.is_file() {
        refuse!(KeyPerms, "key file {} is not a regular file", path.display());
    }
    // SAFETY: reads this process's credentials only.
    let own = unsafe { libc::geteuid() };
    if meta.uid() != own && meta.uid() != 0 {
        refuse!(KeyPerms, "key file {} belongs to uid {}, not to us ({own}) or root", path.display(), meta.uid());
    }
    if meta.mode() & 0o077 != 0 {
        let mode = meta.mode() & 0o7777;
        refuse!(KeyPerms, "key file {} has mode {mode:04o}, others may use it; chmod 600", path.display());
    }
    if meta.len() > max {
        refuse!(KeyFormat, "key file {} is {} bytes long, at most {max}", path.display(), meta.len());
    }
    Ok(file)
}

/// The whole of a file that holds a secret, in locked memory: no symlink, no waiting on a FIFO, ours or root's, for nobody
/// else, at most `max` bytes.
///
/// # Errors
/// `KEY_PERMS`, `KEY_FORMAT` for one that is too long, `USAGE` for one that is not there, `MEMLOCK`.
pub fn read_private_file(path: &Path, max: usize) -> Result<LockedBuf> {
    let mut file = open_private_file(path, max as u64)?;
    let mut buffer = LockedBuf::new(max + 1)?;
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..]) {
            Ok(0) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Ok(more) => len += more,
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => {
                return Err(Error::new(Code::Host, format!("cannot read {}", path.display())).with_source(err));
            }
        }
    }
    refuse!(KeyFormat, "key file {} grew beyond {max} bytes while it was read", path.display())
}
