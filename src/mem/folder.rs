//! A folder for short-lived secrets that other code wants to read by path, in no mount table.
//!
//! In: names and bytes. Out: a path by which this process, and nobody without its rights, reads them.
//! Promises: the files lie on a private tmpfs that is mounted nowhere, is never swapped where the kernel can promise that, and
//! ends with the process; a file is replaced whole; what was replaced or removed is overwritten first.
//! Needs CAP_SYS_ADMIN. Held by: the tests below.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::arena::mount_tmpfs;
use crate::error::{Code, Error, Result};

const NO_HUGE_PAGES: &CStr = c"never";

/// See the module.
pub struct PrivateFolder(OwnedFd);

impl PrivateFolder {
    /// # Errors
    /// `Code::Host` without CAP_SYS_ADMIN, or on a kernel before 5.2.
    pub fn new(bytes: u64) -> Result<PrivateFolder> {
        let (mount, noswap) = mount_tmpfs(NO_HUGE_PAGES, bytes, false).map_err(|errno| {
            Error::new(Code::Host, "cannot make a private folder; it needs CAP_SYS_ADMIN").with_source(errno)
        })?;
        if !noswap {
            tracing::warn!("this kernel's tmpfs cannot turn swapping off; keep swap off on this machine");
        }
        Ok(PrivateFolder(mount.fd))
    }

    /// Where `name` is, or will be: a path of this process alone.
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(name)
    }

    /// Puts `bytes` under `name`, mode 0600, in place of what was there.
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(name);
        let fresh = self.path(&format!("{name}.new"));
        let fault = |e| Error::new(Code::Host, "cannot write a secret to the private folder").with_source(e);
        // A leftover of a write that failed half way.
        let _ = std::fs::remove_file(&fresh);
        let old = OpenOptions::new().write(true).open(&path).ok();
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh).map_err(fault)?;
        file.write_all(bytes).map_err(fault)?;
        std::fs::rename(&fresh, &path).map_err(fault)?;
        // After the rename: whoever reads by the path finds one of the two whole.
        old.map_or(Ok(()), overwrite).map_err(fault)
    }

    /// Overwrites and removes `name`; one that is not there is no error.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        let fault = |e| Error::new(Code::Host, "cannot remove a secret from the private folder").with_source(e);
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => overwrite(file).map_err(fault)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(fault(e)),
        }
        std::fs::remove_file(&path).map_err(fault)
    }

    /// How many files there are.
    pub fn count(&self) -> usize {
        std::fs::read_dir(self.path("")).map_or(0, Iterator::count)
    }
}

fn overwrite(mut file: File) -> std::io::Result<()> {
    let len = file.metadata()?.len();
    file.write_all(&vec![0; usize::try_from(len).unwrap_or(usize::MAX)])
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_secret_is_private_replaced_whole_and_wiped() {
        if !super::super::has_cap_sys_admin() {
            return;
        }
        let folder = PrivateFolder::new(1 << 20).expect("made");
        folder.put("pod", b"first secret").expect("put");
        assert_eq!(std::fs::metadata(folder.path("pod")).expect("there").mode() & 0o777, 0o600);
        let mut kept = File::open(folder.path("pod")).expect("opened");
        folder.put("pod", b"second").expect("put again");
        assert_eq!(std::fs::read(folder.path("pod")).expect("read"), b"second");
        let mut old = Vec::new();
        kept.read_to_end(&mut old).expect("the old file");
        assert_eq!(old, [0; 12]);
        folder.remove("pod").expect("removed");
        folder.remove("pod").expect("gone already");
        assert_eq!(folder.count(), 0);
        let table = std::fs::read_to_string("/proc/self/mountinfo").expect("read");
        let device = std::fs::metadata(folder.path("")).expect("there").dev();
        let shown = format!(" {}:{} ", libc::major(device), libc::minor(device));
        assert!(!table.contains(&shown), "it is in the mount table");
    }
}
