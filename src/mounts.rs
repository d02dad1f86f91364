//! The kernel's mount table, read without touching what is mounted: looking at a FUSE mount is a request to its daemon,
//! and a dead one answers nothing.
//!
//! Held by: the tests below.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Code, Error, Result};

/// A mount, as one line of /proc/self/mountinfo tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor`.
    pub device: String,
    /// Filesystem type.
    pub kind: String,
}

impl Mount {
    pub fn is_ours(&self) -> bool {
        self.kind == "fuse.modelfs"
    }
}

/// The uppermost mount exactly at `mountpoint` (absolute, no links).
pub fn at(mountpoint: &Path) -> Result<Option<Mount>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| Error::new(Code::Host, "cannot read the mount table").with_source(e))?;
    Ok(at_in(&table, mountpoint))
}

fn at_in(mountinfo: &str, mountpoint: &Path) -> Option<Mount> {
    let line = mountinfo.lines().rfind(|line| {
        line.split(' ').nth(4).is_some_and(|field| unescape(field) == mountpoint.as_os_str().as_bytes())
    })?;
    Some(Mount {
        device: line.split(' ').nth(2)?.to_owned(),
        kind: line.split_once(" - ")?.1.split(' ').next()?.to_owned(),
    })
}

/// The kernel writes blanks and backslashes as `\040` and the like.
fn unescape(field: &str) -> Vec<u8> {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\').and_then(|digits| {
            digits.iter().try_fold(0u32, |value, digit| {
                (b'0'..=b'7').contains(digit).then(|| value * 8 + u32::from(digit - b'0'))
            })
        });
        match octal.and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_is_found_by_its_unescaped_path() {
        let table = "36 35 98:0 / / rw - ext4 /dev/root rw\n\
                     40 36 0:44 / /mnt/a\\040b rw,nosuid shared:1 - tmpfs none rw\n\
                     41 40 0:45 / /mnt/a\\040b ro,nosuid - fuse.modelfs file:///s ro\n";
        let mount = at_in(table, Path::new("/mnt/a b")).expect("found");
        assert_eq!((mount.device.as_str(), mount.kind.as_str()), ("0:45", "fuse.modelfs"));
        assert!(mount.is_ours());
        assert_eq!(at_in(table, Path::new("/mnt/a")), None);
        assert!(!at_in(table, Path::new("/")).expect("found").is_ours());
    }

    #[test]
    fn escapes_of_the_mount_table_are_undone() {
        assert_eq!(unescape("/mnt/a\\040b\\134c"), b"/mnt/a b\\c");
        assert_eq!(unescape("/plain"), b"/plain");
        assert_eq!(unescape("/odd\\"), b"/odd\\");
    }
}
