//! A store in a folder of this machine: the embedded default.
//!
//! In: names below one root folder. Out: bytes read into fresh memory, never a map of a file that someone may truncate.
//! Promises: no path leads out of the root and no symlink is followed, whatever others do to the folder meanwhile
//! (`openat2` beneath the root's descriptor); folders are 0700 and objects 0600; an object appears whole, by a link, and
//! is on the disk, with its folder, before the call answers; a FIFO or device in place of an object is refused, not
//! waited for.
//! Not here: deadlines and retries (`patient`). Held by: tests/store_contract.rs and the tests below.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once, OnceLock};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;

use super::beneath::{self, fstat, open_beneath, read_fd_dir, read_into};
use super::{
    ChunkSink, ChunkSource, LIST_NAMES_MAX, Listed, NAME_DEPTH_MAX, ObjectWriter, check_name, check_prefix,
    is_component, random_16, range_len,
};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// Where objects grow until they are linked to their names. Its dot keeps it out of every listing.
const STAGING: &str = ".staging";

/// A staged file older than this was left by a publisher that died; the grace period of FORMAT b.1.
const STAGING_GRACE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Clones share the root's descriptor.
#[derive(Debug, Clone)]
pub struct LocalStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Opened once: from then on it is this folder, whatever happens to its path.
    fd: OnceLock<OwnedFd>,
    swept: Once,
}

impl LocalStore {
    /// The store at `root`, which need not be there yet: the first object published makes it.
    ///
    /// # Errors
    /// `Code::StorePerms` when `root` is a symlink or no folder.
    pub fn open(root: &Path) -> Result<Self> {
        let inner = Inner { root: root.to_owned(), fd: OnceLock::new(), swept: Once::new() };
        match inner.root_fd() {
            Ok(_) => {}
            Err(missing) if missing.code() == Code::NotFound => {}
            Err(other) => return Err(other),
        }
        Ok(LocalStore { inner: Arc::new(inner) })
    }

    /// Runs `work` where blocking harms nobody.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        spawn(move || work(&inner)).await
    }
}

async fn spawn<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(died) => match died.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => refuse!(Stopping, "the runtime is stopping"),
        },
    }
}

#[async_trait]
impl ChunkSource for LocalStore {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        check_name(name)?;
        let len = range_len(name, &range)?;
        let name = name.to_owned();
        self.blocking(move |inner| inner.read_range(&name, &range, len)).await
    }

    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        check_name(name)?;
        let name = name.to_owned();
        self.blocking(move |inner| inner.read_small(&name, max)).await
    }

    async fn size(&self, name: &str) -> Result<u64> {
        check_name(name)?;
        let name = name.to_owned();
        self.blocking(move |inner| Ok(inner.open_object(&name)?.1)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        check_prefix(prefix)?;
        let prefix = prefix.to_owned();
        self.blocking(move |inner| {
            let mut found = Vec::new();
            if let Some(dir) = inner.existing_dir(prefix.trim_end_matches('/'))? {
                inner.walk(&dir, &prefix, 0, &mut |name, size| {
                    found.push(Listed { name, size });
                    found.len() <= LIST_NAMES_MAX
                })?;
            }
            if found.len() > LIST_NAMES_MAX {
                refuse!(Limit, "more than {LIST_NAMES_MAX} objects below {prefix:?}");
            }
            found.sort_unstable();
            Ok(found)
        })
        .await
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        check_prefix(prefix)?;
        let prefix = prefix.to_owned();
        self.blocking(move |inner| {
            let mut dirs = Vec::new();
            let Some(dir) = inner.existing_dir(prefix.trim_end_matches('/'))? else { return Ok(dirs) };
            for entry in inner.entries(&dir)? {
                let Entry::Folder(name) = entry else { continue };
                if prefix.is_empty() && name.starts_with('.') {
                    continue;
                }
                // A folder without an object in it does not exist in any other store.
                let mut any = false;
                if let Some(below) = inner.enter(&dir, &name)? {
                    inner.walk(&below, "", 0, &mut |_, _| {
                        any = true;
                        false
                    })?;
                }
                if any {
                    dirs.push(name);
                }
            }
            dirs.sort_unstable();
            Ok(dirs)
        })
        .await
    }

    fn describe(&self) -> String {
        super::StoreUrl::Local(self.inner.root.clone()).to_string()
    }
}

#[async_trait]
impl ChunkSink for LocalStore {
    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        check_name(name)?;
        let name = name.to_owned();
        self.blocking(move |inner| {
            let mut staged = inner.stage()?;
            staged.append(&bytes)?;
            match staged.publish(inner, &name) {
                Err(there) if there.code() == Code::Exists => {
                    // An attempt whose answer was lost may have made it: the same bytes are a success.
                    match inner.read_small(&name, bytes.len() as u64) {
                        Ok(stored) if stored == bytes => Ok(()),
                        Ok(_) => Err(there),
                        Err(longer) if longer.code() == Code::Limit => Err(there),
                        // Refused as there and yet not to be read: someone else's create is not done, or it was deleted. Ask again.
                        Err(gone) if gone.code() == Code::NotFound => {
                            refuse!(Unreachable, "object {name} is just being created or deleted by another")
                        }
                        Err(other) => Err(other),
                    }
                }
                other => other,
            }
        })
        .await
    }

    async fn begin(&self, name: &str, stored_len_max: u64) -> Result<Box<dyn ObjectWriter>> {
        check_name(name)?;
        let staged = self.blocking(|inner| inner.stage()).await?;
        let store = self.clone();
        Ok(Box::new(Writer { store, name: name.to_owned(), stored_len_max, staged: Some(staged) }))
    }

    async fn replace_hint(&self, name: &str, bytes: Bytes) -> Result<()> {
        check_name(name)?;
        let name = name.to_owned();
        self.blocking(move |inner| {
            let mut staged = inner.stage()?;
            staged.append(&bytes)?;
            staged.replace(inner, &name)
        })
        .await
    }

    async fn delete(&self, name: &str) -> Result<()> {
        check_name(name)?;
        let name = name.to_owned();
        self.blocking(move |inner| inner.delete(&name)).await
    }
}

struct Writer {
    store: LocalStore,
    name: String,
    stored_len_max: u64,
    /// None after a failed write: what was staged is gone, and finishing is refused.
    staged: Option<Staged>,
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, piece: Bytes) -> Result<()> {
        let Some(mut staged) = self.staged.take() else {
            refuse!(Host, "object {} already failed to be written", self.name);
        };
        if staged.len + piece.len() as u64 > self.stored_len_max {
            let max = self.stored_len_max;
            refuse!(Length, "object {} was announced with at most {max} bytes, more were written", self.name);
        }
        let staged = spawn(move || staged.append(&piece).map(|()| staged)).await?;
        self.staged = Some(staged);
        Ok(())
    }

    async fn finish(mut self: Box<Self>, stored_len: u64) -> Result<()> {
        let Some(mut staged) = self.staged.take() else {
            refuse!(Host, "object {} already failed to be written", self.name);
        };
        if staged.len != stored_len {
            refuse!(Length, "object {} has {} of {stored_len} bytes written", self.name, staged.len);
        }
        let name = mem::take(&mut self.name);
        self.store.blocking(move |inner| staged.publish(inner, &name)).await
    }

    async fn abort(self: Box<Self>) {}
}

/// A file that grows in the staging folder. Dropped, it is gone; published, it has its name.
struct Staged {
    folder: OwnedFd,
    name: CString,
    file: File,
    len: u64,
}

impl Staged {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| io_error(e, "cannot write into the store"))?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Links the file to its name, which must not be there: `Code::Exists` otherwise.
    fn publish(&mut self, inner: &Inner, name: &str) -> Result<()> {
        self.place(inner, name, |from, staged, to, last| {
            // SAFETY: both names are NUL-terminated and outlive the call; the descriptors are open.
            unsafe { libc::linkat(from, staged.as_ptr(), to, last.as_ptr(), 0) }
        })
    }

    fn replace(&mut self, inner: &Inner, name: &str) -> Result<()> {
        self.place(inner, name, |from, staged, to, last| {
            // SAFETY: both names are NUL-terminated and outlive the call; the descriptors are open.
            unsafe { libc::renameat(from, staged.as_ptr(), to, last.as_ptr()) }
        })
    }

    fn place(&mut self, inner: &Inner, name: &str, call: impl Fn(RawFd, &CStr, RawFd, &CStr) -> i32) -> Result<()> {
        self.file.sync_all().map_err(|e| io_error(e, format!("cannot bring object {name} to the disk")))?;
        let (folder, last) = split(name);
        let dir = inner.make_dir(folder)?;
        if call(self.folder.as_raw_fd(), &self.name, dir.as_raw_fd(), &c_name(last)) != 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::AlreadyExists {
                refuse!(Exists, "object {name} is there already");
            }
            return Err(io_error(error, format!("cannot publish object {name}")));
        }
        sync_dir(&dir, folder)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Already renamed away after `replace`: then there is nothing to remove, and that is as good.
        // SAFETY: the name is NUL-terminated, the descriptor open.
        unsafe { libc::unlinkat(self.folder.as_raw_fd(), self.name.as_ptr(), 0) };
    }
}

enum Entry {
    Folder(String),
    Object(String, u64),
}

impl Inner {
    /// The root's descriptor. `Code::NotFound` while there is no root.
    fn root_fd(&self) -> Result<&OwnedFd> {
        if let Some(fd) = self.fd.get() {
            return Ok(fd);
        }
        let path = self.root.display();
        let meta = match std::fs::symlink_metadata(&self.root) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::new(Code::NotFound, format!("no store at {path}")).with_source(e));
            }
            Err(e) => return Err(io_error(e, format!("cannot look at store {path}"))),
        };
        if meta.file_type().is_symlink() {
            refuse!(StorePerms, "store {path} is a symlink; give the folder it leads to");
        }
        if !meta.is_dir() {
            refuse!(StorePerms, "store {path} is not a folder");
        }
        let c_path = CString::new(self.root.as_os_str().as_encoded_bytes())
            .map_err(|_| Error::new(Code::Usage, "the store's path holds a NUL byte"))?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        // SAFETY: the path is NUL-terminated; the result is checked before it is owned.
        let fd = unsafe { libc::open(c_path.as_ptr(), flags) };
        if fd < 0 {
            return Err(io_error(io::Error::last_os_error(), format!("cannot open store {path}")));
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(self.fd.get_or_init(|| fd))
    }

    /// The root, made when missing and fit to be published to: nobody else may write there.
    fn root_for_writing(&self) -> Result<&OwnedFd> {
        if !self.root.exists() && self.fd.get().is_none() {
            let mut builder = std::fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            match builder.recursive(true).create(&self.root) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io_error(e, format!("cannot make store {}", self.root.display())));
                }
                _ => {}
            }
        }
        let fd = self.root_fd()?;
        let stat = fstat(fd).map_err(|e| io_error(e, "cannot look at the store's folder"))?;
        let path = self.root.display();
        if stat.st_mode & 0o022 != 0 {
            refuse!(StorePerms, "others can write to store {path} (mode {:04o}); chmod go-w it", stat.st_mode & 0o7777);
        }
        // SAFETY: geteuid has no preconditions.
        let me = unsafe { libc::geteuid() };
        if me != 0 && stat.st_uid != me {
            refuse!(StorePerms, "store {path} belongs to user {}, not to us ({me})", stat.st_uid);
        }
        Ok(fd)
    }

    /// `Ok(None)` when the folder or the root is not there.
    fn existing_dir(&self, folder: &str) -> Result<Option<OwnedFd>> {
        let root = match self.root_fd() {
            Ok(root) => root,
            Err(missing) if missing.code() == Code::NotFound => return Ok(None),
            Err(other) => return Err(other),
        };
        self.enter(root, if folder.is_empty() { "." } else { folder })
    }

    fn enter(&self, dir: &OwnedFd, folder: &str) -> Result<Option<OwnedFd>> {
        match open_beneath(dir, &c_name(folder), libc::O_RDONLY | libc::O_DIRECTORY, 0) {
            Ok(fd) => Ok(Some(fd)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
            Err(e) => Err(self.path_error(e, folder)),
        }
    }

    /// The folder, each missing part of it made and brought to the disk.
    fn make_dir(&self, folder: &str) -> Result<OwnedFd> {
        let root = self.root_for_writing()?;
        let mut dir =
            open_beneath(root, c".", libc::O_RDONLY | libc::O_DIRECTORY, 0).map_err(|e| self.path_error(e, folder))?;
        for part in folder.split('/').filter(|part| !part.is_empty()) {
            let name = c_name(part);
            dir = match open_beneath(&dir, &name, libc::O_RDONLY | libc::O_DIRECTORY, 0) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    // SAFETY: the name is NUL-terminated, the descriptor open. Another writer may be first: no harm.
                    unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), 0o700) };
                    sync_dir(&dir, folder)?;
                    open_beneath(&dir, &name, libc::O_RDONLY | libc::O_DIRECTORY, 0)
                }
                other => other,
            }
            .map_err(|e| self.path_error(e, folder))?;
        }
        Ok(dir)
    }

    /// The object's descriptor and its length; only regular files are objects.
    fn open_object(&self, name: &str) -> Result<(File, u64)> {
        let root = self.root_fd()?;
        // O_NONBLOCK: opening a FIFO must not wait for a writer that never comes.
        let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = open_beneath(root, &c_name(name), flags, 0).map_err(|e| self.path_error(e, name))?;
        let file = File::from(file);
        let meta = file.metadata().map_err(|e| io_error(e, format!("cannot look at object {name}")))?;
        if !meta.is_file() {
            let what = if meta.file_type().is_fifo() { "a FIFO" } else { "no regular file" };
            refuse!(StorePerms, "object {name} in {} is {what}", self.root.display());
        }
        Ok((file, meta.size()))
    }

    fn read_range(&self, name: &str, range: &Range<u64>, len: usize) -> Result<Vec<Bytes>> {
        let (file, size) = self.open_object(name)?;
        if range.end > size {
            refuse!(Length, "object {name} has {size} bytes, {}..{} were wanted", range.start, range.end);
        }
        let mut bytes = Vec::with_capacity(len);
        read_into(&file, range.start, &mut bytes, len)
            .map_err(|e| io_error(e, format!("cannot read object {name}")))?;
        if bytes.len() != len {
            refuse!(Length, "object {name} ended after {} of {len} bytes: it is being truncated", bytes.len());
        }
        Ok(vec![Bytes::from(bytes)])
    }

    fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        let (file, size) = self.open_object(name)?;
        let too_long = || Error::new(Code::Limit, format!("object {name} is longer than {max} bytes"));
        let len = usize::try_from(size.min(max)).map_err(|_| too_long())?;
        // One byte more than it says: a file that grows meanwhile is noticed.
        let mut bytes = Vec::with_capacity(len + 1);
        read_into(&file, 0, &mut bytes, len + 1).map_err(|e| io_error(e, format!("cannot read object {name}")))?;
        if bytes.len() as u64 > max {
            return Err(too_long());
        }
        if bytes.len() as u64 != size {
            refuse!(Length, "object {name} changed its length while it was read");
        }
        Ok(Bytes::from(bytes))
    }

    fn delete(&self, name: &str) -> Result<()> {
        let root = match self.root_fd() {
            Ok(_) => self.root_for_writing()?,
            Err(missing) if missing.code() == Code::NotFound => return Ok(()),
            Err(other) => return Err(other),
        };
        let (folder, last) = split(name);
        let Some(dir) = self.enter(root, if folder.is_empty() { "." } else { folder })? else { return Ok(()) };
        // SAFETY: the name is NUL-terminated, the descriptor open; unlinkat follows no symlink in the last component.
        if unsafe { libc::unlinkat(dir.as_raw_fd(), c_name(last).as_ptr(), 0) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::NotFound {
                return Ok(());
            }
            return Err(self.path_error(error, name));
        }
        sync_dir(&dir, folder)
    }

    fn stage(&self) -> Result<Staged> {
        let folder = self.make_dir(STAGING)?;
        self.swept.call_once(|| self.sweep_staging(&folder));
        let name = c_name(&hex::encode(random_16()?));
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
        let file = open_beneath(&folder, &name, flags, 0o600).map_err(|e| self.path_error(e, STAGING))?;
        Ok(Staged { folder, name, file: File::from(file), len: 0 })
    }

    /// Removes what publishers that died have left; errors are for the next sweep.
    fn sweep_staging(&self, folder: &OwnedFd) {
        let Ok(entries) = read_fd_dir(folder) else { return };
        for entry in entries.flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified()).map(|at| SystemTime::now().duration_since(at));
            let Ok(name) = CString::new(entry.file_name().as_encoded_bytes()) else { continue };
            if matches!(age, Ok(Ok(age)) if age > STAGING_GRACE) {
                // SAFETY: the name is NUL-terminated, the descriptor open.
                unsafe { libc::unlinkat(folder.as_raw_fd(), name.as_ptr(), 0) };
            }
        }
    }

    /// What a folder holds that our writers could have made: links, devices and odd names are left out.
    fn entries(&self, dir: &OwnedFd) -> Result<Vec<Entry>> {
        let describe = |e| io_error(e, format!("cannot list a folder of store {}", self.root.display()));
        let mut entries = Vec::new();
        for entry in read_fd_dir(dir).map_err(describe)? {
            let entry = entry.map_err(describe)?;
            let Some(name) = entry.file_name().to_str().filter(|name| is_component(name)).map(str::to_owned) else {
                continue;
            };
            // Looks at the entry itself, not at what a link leads to. Gone meanwhile: as if it had never been.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                entries.push(Entry::Folder(name));
            } else if meta.is_file() {
                entries.push(Entry::Object(name, meta.len()));
            }
            if entries.len() > LIST_NAMES_MAX {
                refuse!(Limit, "more than {LIST_NAMES_MAX} entries in a folder of store {}", self.root.display());
            }
        }
        Ok(entries)
    }

    /// Tells every object at or below `dir` to `tell`, until that answers false. Answers whether to go on.
    fn walk(
        &self,
        dir: &OwnedFd,
        prefix: &str,
        depth: usize,
        tell: &mut dyn FnMut(String, u64) -> bool,
    ) -> Result<bool> {
        for entry in self.entries(dir)? {
            let go_on = match entry {
                Entry::Object(name, _) | Entry::Folder(name) if prefix.is_empty() && name.starts_with('.') => true,
                Entry::Object(name, size) => tell(format!("{prefix}{name}"), size),
                Entry::Folder(_) if depth == NAME_DEPTH_MAX => true,
                Entry::Folder(name) => match self.enter(dir, &name) {
                    Ok(Some(below)) => self.walk(&below, &format!("{prefix}{name}/"), depth + 1, tell)?,
                    Ok(None) => true,
                    Err(e) => return Err(e),
                },
            };
            if !go_on {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn path_error(&self, error: io::Error, name: &str) -> Error {
        let store = self.root.display();
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Error::new(Code::NotFound, format!("no object {name} in {store}")),
            Some(libc::ELOOP | libc::EXDEV) => {
                Error::new(Code::StorePerms, format!("a symlink on the way to {name} in {store} is not followed"))
            }
            Some(libc::EISDIR | libc::ENXIO) => {
                Error::new(Code::StorePerms, format!("object {name} in {store} is no regular file"))
            }
            Some(libc::ENOSYS) => {
                Error::new(Code::Host, "the kernel lacks openat2 (Linux 5.6), or a seccomp profile forbids it")
            }
            _ => io_error(error, format!("cannot open {name} in {store}")),
        }
    }
}

fn io_error(error: io::Error, what: impl Into<String>) -> Error {
    let code = match error.kind() {
        io::ErrorKind::PermissionDenied => Code::StoreDenied,
        io::ErrorKind::NotFound => Code::NotFound,
        _ => Code::Host,
    };
    Error::new(code, what).with_source(error)
}

fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

fn c_name(name: &str) -> CString {
    CString::new(name).expect("check_name lets no NUL byte through")
}

fn sync_dir(dir: &OwnedFd, folder: &str) -> Result<()> {
    beneath::sync_dir(dir).map_err(|e| io_error(e, format!("cannot bring folder {folder:?} to the disk")))
}
