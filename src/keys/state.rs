//! Small files this machine remembers things in: what was seen (floors), who was believed (first use).
//!
//! Promises: a file is replaced whole or not at all, and is on the disk when a write answers Ok; a file that others could
//! have written is refused, not believed; one that cannot be read is an error, never "nothing remembered".
//! Held by: the tests below and those of `floor`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::crypto::sha256;
use crate::error::{Code, Error, Result};
use crate::format::ModelId;
use crate::refuse;

const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where `state-dir` says nothing: `$XDG_STATE_HOME/modelfs`, else `/var/lib/modelfs` for root and `~/.local/state/modelfs`
/// for others.
///
/// # Errors
/// `USAGE` if the environment names no place.
pub fn usual_state_dir() -> Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    // SAFETY: reads this process's credentials only.
    let root = unsafe { libc::geteuid() } == 0;
    match absolute("XDG_STATE_HOME") {
        Some(dir) => Ok(dir.join("modelfs")),
        None if root => Ok("/var/lib/modelfs".into()),
        None => match absolute("HOME") {
            Some(home) => Ok(home.join(".local/state/modelfs")),
            None => refuse!(Usage, "no place to remember versions in; say where with state-dir"),
        },
    }
}

/// A file name for what is remembered of a model at a store: nothing of the names can lead elsewhere.
pub(crate) fn file_name(store: &str, model: ModelId, rest: &str) -> String {
    let digest = sha256(&[store.as_bytes(), b"\0", &model.0, rest.as_bytes()]);
    format!("{}.json", hex::encode(&digest[..16]))
}

/// Keeps other processes out of one folder of state while something is read, judged and replaced.
pub(crate) struct Locked {
    dir: PathBuf,
    _lock: File,
}

impl Locked {
    pub fn new(dir: &Path) -> Result<Locked> {
        let fault = |what: &str, err| {
            Error::new(Code::State, format!("cannot {what} state folder {}", dir.display())).with_source(err)
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|err| fault("make", err))?;
        let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(flags);
        let lock = options.open(dir.join("lock")).map_err(|err| fault("lock", err))?;
        // SAFETY: locks a descriptor of ours; closing it unlocks.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) } != 0 {
            return Err(fault("lock", std::io::Error::last_os_error()));
        }
        Ok(Locked { dir: dir.to_owned(), _lock: lock })
    }

    pub fn replace<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let path = self.dir.join(name);
        let staged = self.dir.join(format!("{name}.new"));
        let text = serde_json::to_vec_pretty(value).expect("our own plain structs are JSON");
        let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let write = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600).custom_flags(flags);
            let mut file = options.open(&staged)?;
            file.write_all(&text)?;
            file.sync_all()?;
            std::fs::rename(&staged, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|err| Error::new(Code::State, format!("cannot write {}", path.display())).with_source(err))
    }

    /// Forgets; what is not there is forgotten already.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.dir.join(name);
        let fault = |err| Error::new(Code::State, format!("cannot remove {}", path.display())).with_source(err);
        match std::fs::remove_file(&path) {
            Ok(()) => File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(fault),
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(err) => Err(fault(err)),
        }
    }
}

/// What is remembered, or `None` if nothing ever was.
///
/// # Errors
/// `STATE` for a file that cannot be read, that others could have written, or that is not ours.
pub(crate) fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>> {
    read_up_to(dir, name, FILE_BYTES_MAX)
}

/// The same for a file of at most `bytes_max` bytes; a longer one is damaged.
pub(crate) fn read_up_to<T: DeserializeOwned>(dir: &Path, name: &str, bytes_max: u64) -> Result<Option<T>> {
    let path = dir.join(name);
    let fault = |err| Error::new(Code::State, format!("cannot read {}", path.display())).with_source(err);
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
        Ok(file) => file,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(fault(err)),
    };
    let meta = file.metadata().map_err(fault)?;
    // SAFETY: reads this process's credentials only.
    let own = unsafe { libc::geteuid() };
    if !meta.is_file() || (meta.uid() != own && meta.uid() != 0) || meta.mode() & 0o022 != 0 {
        refuse!(State, "{} is not a file that only we can write; look into it, then remove it", path.display());
    }
    let mut text = Vec::new();
    file.take(bytes_max).read_to_end(&mut text).map_err(fault)?;
    match serde_json::from_slice(&text) {
        Ok(value) => Ok(Some(value)),
        Err(err) => Err(Error::new(Code::State, format!("{} is damaged; what it guarded is unknown", path.display()))
            .with_source(err)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn state_is_replaced_whole_private_and_refused_when_damaged_or_writable_by_others() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("deep/state");
        assert_eq!(read::<Vec<u64>>(&at, "x.json").unwrap(), None);
        Locked::new(&at).unwrap().replace("x.json", &vec![1u64, 2]).unwrap();
        Locked::new(&at).unwrap().replace("x.json", &vec![3u64]).unwrap();
        assert_eq!(read::<Vec<u64>>(&at, "x.json").unwrap(), Some(vec![3]));
        let path = at.join("x.json");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o622)).unwrap();
        assert_eq!(read::<Vec<u64>>(&at, "x.json").unwrap_err().code(), Code::State);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "[3").unwrap();
        assert_eq!(read::<Vec<u64>>(&at, "x.json").unwrap_err().code(), Code::State);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert_eq!(read::<Vec<u64>>(&at, "x.json").unwrap_err().code(), Code::State);
    }
}
