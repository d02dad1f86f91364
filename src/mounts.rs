//! The kernel's mount table, read without touching what is mounted: looking at a FUSE mount is a request to its daemon,
//! and a dead one answers nothing. [`answers`] is that question, for whoever wants to know.
//!
//! Held by: the tests below.

use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};

/// A mount, as one line of /proc/self/mountinfo tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor`.
    pub device: String,
    /// Filesystem type.
    pub kind: String,
    /// What is mounted, in the words of whoever mounted it.
    pub source: String,
}

impl Mount {
    pub fn is_ours(&self) -> bool {
        self.kind == "fuse.modelfs"
    }
}

/// The one name of a mountpoint: absolute, no links, although the mount on it may be dead.
///
/// A dead FUSE mount refuses whoever looks at it ([`is_of_dead`]), so then only its parent is resolved.
pub fn canonical(mountpoint: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(mountpoint)
        .map_err(|e| Error::new(Code::Usage, "the mountpoint is an empty path").with_source(e))?;
    match std::fs::canonicalize(&absolute) {
        Ok(path) => Ok(path),
        Err(first) => {
            let parent = absolute.parent().and_then(|parent| std::fs::canonicalize(parent).ok());
            let mounted = is_of_dead(&first) || matches!(first.raw_os_error(), Some(libc::EIO | libc::EACCES));
            match (parent, absolute.file_name()) {
                (Some(parent), Some(name)) if mounted => Ok(parent.join(name)),
                _ => Err(Error::new(Code::MountPoint, format!("mountpoint {} cannot be used", mountpoint.display()))
                    .with_source(first)),
            }
        }
    }
}

/// The kernel's two words for a mount whose connection is closed: to whoever asks from then on, and to whoever had asked
/// already and waited for the daemon.
pub fn is_of_dead(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED))
}

/// Whether whoever serves `mountpoint` answers: a question to him, and no answer without him.
pub fn answers(mountpoint: &Path) -> bool {
    let Ok(path) = CString::new(mountpoint.as_os_str().as_bytes()) else { return false };
    let mut told = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: a NUL-terminated path and a buffer of the kernel's size, both alive through the call.
    unsafe { libc::statfs(path.as_ptr(), told.as_mut_ptr()) == 0 }
}

/// The uppermost mount exactly at `mountpoint` (absolute, no links).
pub fn at(mountpoint: &Path) -> Result<Option<Mount>> {
    Ok(at_in(&table()?, mountpoint))
}

/// Whether `device` (`major:minor`) is mounted exactly at `mountpoint` (absolute, no links), perhaps below another mount.
pub fn is_at(mountpoint: &Path, device: &str) -> Result<bool> {
    Ok(is_at_in(&table()?, mountpoint, device))
}

/// The mounts at and below `folder` (absolute, no links), in the order in which they were made.
pub fn below(folder: &Path) -> Result<Vec<(PathBuf, Mount)>> {
    Ok(below_in(&table()?, folder))
}

fn table() -> Result<String> {
    std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|e| Error::new(Code::Host, "cannot read the mount table").with_source(e))
}

fn below_in(mountinfo: &str, folder: &Path) -> Vec<(PathBuf, Mount)> {
    let place = |line: &str| Some(PathBuf::from(OsString::from_vec(unescape(line.split(' ').nth(4)?))));
    let found = mountinfo.lines().filter_map(|line| Some((place(line)?, parse(line)?)));
    found.filter(|(place, _)| place.starts_with(folder)).collect()
}

fn parse(line: &str) -> Option<Mount> {
    let mut after = line.split_once(" - ")?.1.split(' ');
    Some(Mount {
        device: line.split(' ').nth(2)?.to_owned(),
        kind: after.next()?.to_owned(),
        source: String::from_utf8_lossy(&unescape(after.next()?)).into_owned(),
    })
}

fn at_in(mountinfo: &str, mountpoint: &Path) -> Option<Mount> {
    let line = mountinfo.lines().rfind(|line| {
        line.split(' ').nth(4).is_some_and(|field| unescape(field) == mountpoint.as_os_str().as_bytes())
    })?;
    parse(line)
}

fn is_at_in(mountinfo: &str, mountpoint: &Path, device: &str) -> bool {
    mountinfo.lines().any(|line| {
        let mut fields = line.split(' ').skip(2);
        fields.next() == Some(device)
            && fields.nth(1).is_some_and(|field| unescape(field) == mountpoint.as_os_str().as_bytes())
    })
}

/// A mounted filesystem: where, and with which options of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Super {
    pub mountpoint: PathBuf,
    options: Vec<String>,
}

impl Super {
    pub fn has(&self, option: &str) -> bool {
        self.options.iter().any(|have| have == option)
    }
}

/// The first mount of a device (`major:minor`) that this process sees; bind mounts of it follow later in the table.
pub fn of_device(device: &str) -> Result<Option<Super>> {
    Ok(of_device_in(&table()?, device))
}

fn of_device_in(mountinfo: &str, device: &str) -> Option<Super> {
    let line = mountinfo.lines().find(|line| line.split(' ').nth(2) == Some(device))?;
    let path = unescape(line.split(' ').nth(4)?);
    // "... - type source options"
    let options = line.split_once(" - ")?.1.splitn(3, ' ').nth(2)?;
    Some(Super {
        mountpoint: PathBuf::from(OsString::from_vec(path)),
        options: options.split(',').map(str::to_owned).collect(),
    })
}

/// Whether the filesystem `device` is mounted in that table at any other place than `mountpoint`, as a container has it that
/// was given it. One that was given a folder above, the whole machine as a monitor has it, sees it under its own name there,
/// and does not use it.
pub(crate) fn is_elsewhere_in(mountinfo: &str, device: &str, mountpoint: &Path) -> bool {
    let own = mountpoint.strip_prefix("/").unwrap_or(mountpoint);
    mountinfo.lines().any(|line| {
        let mut fields = line.split(' ').skip(2);
        fields.next() == Some(device)
            && fields.nth(1).is_some_and(|place| !Path::new(OsStr::from_bytes(&unescape(place))).ends_with(own))
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
        // The lower one is there too, and neither is anywhere else.
        assert!(is_at_in(table, Path::new("/mnt/a b"), "0:44") && is_at_in(table, Path::new("/mnt/a b"), "0:45"));
        assert!(!is_at_in(table, Path::new("/mnt/a b"), "0:4") && !is_at_in(table, Path::new("/"), "0:45"));
    }

    #[test]
    fn a_device_leads_to_its_folder_and_its_options() {
        let table = "41 40 0:45 / /mnt/a\\040b ro,nosuid - fuse.modelfs file:///s ro,user_id=7,allow_other\n\
                     42 40 0:45 /x /mnt/bound ro - fuse.modelfs file:///s ro,user_id=7,allow_other\n";
        let seen = of_device_in(table, "0:45").expect("found");
        assert_eq!(seen.mountpoint, Path::new("/mnt/a b"));
        assert!(seen.has("allow_other") && !seen.has("default_permissions") && !seen.has("allow"));
        assert_eq!(of_device_in(table, "0:4"), None);
    }

    #[test]
    fn a_filesystem_is_elsewhere_where_another_place_has_its_device() {
        let table = "40 36 0:44 / /mnt/a\\040b rw - fuse.modelfs s ro\n41 40 0:45 / /models ro - fuse.modelfs s ro\n";
        assert!(!is_elsewhere_in(table, "0:44", Path::new("/mnt/a b")));
        assert!(is_elsewhere_in(table, "0:45", Path::new("/mnt/a b")));
        assert!(!is_elsewhere_in(table, "0:46", Path::new("/mnt/a b")));
        let monitor = "40 36 0:44 / /rootfs/mnt/a\\040b rw - fuse.modelfs s ro\n";
        assert!(!is_elsewhere_in(monitor, "0:44", Path::new("/mnt/a b")));
        assert!(is_elsewhere_in(monitor, "0:44", Path::new("/mnt/b")));
    }

    #[test]
    fn mounts_below_a_folder_are_found_by_whole_names() {
        let table = "40 36 0:44 / /mnt/a rw shared:1 - tmpfs one rw\n\
                     41 40 0:45 / /mnt/a/b\\040c ro - fuse.modelfs s3://m\\040x ro\n\
                     42 36 0:46 / /mnt/ab rw - tmpfs two rw\n";
        let found = below_in(table, Path::new("/mnt/a"));
        assert_eq!(
            found.iter().map(|(place, _)| place.as_path()).collect::<Vec<_>>(),
            [Path::new("/mnt/a"), Path::new("/mnt/a/b c")]
        );
        assert_eq!(found[1].1.source, "s3://m x");
    }

    #[test]
    fn escapes_of_the_mount_table_are_undone() {
        assert_eq!(unescape("/mnt/a\\040b\\134c"), b"/mnt/a b\\c");
        assert_eq!(unescape("/plain"), b"/plain");
        assert_eq!(unescape("/odd\\"), b"/odd\\");
    }
}
