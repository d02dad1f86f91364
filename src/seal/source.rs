//! The plaintext tree: which files there are, and their bytes, or the news that they moved meanwhile.
//!
//! In: a folder that somebody else may be writing to. Out: files sorted by path, and reads that are exactly of the file
//! that was listed. Promises: nothing outside the folder is ever read; a file that grows, shrinks or is replaced while it
//! is read is `SOURCE_CHANGED`, whatever its name; what cannot be part of a model is refused by name before any byte is
//! sealed.
//! Held by: the tests below, THREAT_MODEL (f) row 71.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};
use crate::format::check_path;
use crate::format::limits::{FILE_BYTES_MAX, FILES_MAX, STRINGS_BYTES_MAX};
use crate::refuse;

const BENEATH: u64 = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
const NO_LINKS: u64 = BENEATH | libc::RESOLVE_NO_SYMLINKS;

/// A folder held open: names are looked up below this very folder, wherever its path leads later.
#[derive(Debug)]
pub struct SourceTree {
    root: OwnedFd,
    shown: PathBuf,
}

/// A regular file of the tree, as it was when the tree was walked.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// As it will be called in the model.
    pub path: String,
    pub size: u64,
    pub mtime: i64,
    /// 0o444 or 0o555.
    pub mode: u16,
    seen: Seen,
    /// Reached through a symlink inside the tree.
    linked: bool,
}

/// What tells one state of one file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Seen {
    fn of(stat: &std::fs::Metadata) -> Seen {
        Seen {
            dev: stat.dev(),
            ino: stat.ino(),
            size: stat.size(),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            ctime: (stat.ctime(), stat.ctime_nsec()),
        }
    }
}

impl SourceTree {
    /// # Errors
    /// `SOURCE` if `dir` is no folder that can be read.
    pub fn open(dir: &Path) -> Result<SourceTree> {
        let root = File::open(dir)
            .and_then(
                |file| if file.metadata()?.is_dir() { Ok(file) } else { Err(io::ErrorKind::NotADirectory.into()) },
            )
            .map_err(|e| {
                Error::new(Code::Source, format!("{} cannot be read as a folder", dir.display())).with_source(e)
            })?;
        Ok(SourceTree { root: root.into(), shown: dir.to_owned() })
    }

    /// Every file, sorted by the bytes of its path.
    ///
    /// # Errors
    /// `SOURCE` naming the first thing that cannot be part of a model: a symlink that leads out, to a folder, in a circle
    /// or nowhere; a FIFO, socket or device; a name the format does not allow; a folder or file that cannot be read.
    pub fn walk(&self) -> Result<Vec<SourceFile>> {
        let (mut files, mut folders) = (Vec::new(), vec![String::new()]);
        let mut path_bytes = 0usize;
        while let Some(folder) = folders.pop() {
            for name in self.names(&folder)? {
                let path = self.model_path(&folder, &name)?;
                match self.look(&path)? {
                    Entry::Folder => folders.push(path),
                    Entry::File(file) => {
                        path_bytes += path.len();
                        files.push(file);
                    }
                }
                if files.len() > FILES_MAX as usize || path_bytes > STRINGS_BYTES_MAX as usize {
                    refuse!(Source, "{} holds more than {FILES_MAX} files or 128 MiB of paths", self.shown.display());
                }
            }
        }
        if files.is_empty() {
            refuse!(Source, "{} holds no files", self.shown.display());
        }
        files.sort_unstable_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
        Ok(files)
    }

    fn names(&self, folder: &str) -> Result<Vec<std::ffi::OsString>> {
        let unreadable = |e| self.fault(folder, "cannot be listed").with_source(e);
        let here = if folder.is_empty() { "." } else { folder };
        let dir =
            self.open_at(here, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW, NO_LINKS).map_err(unreadable)?;
        // Through the descriptor: the folder that was opened, not whatever has its name now.
        let listing = std::fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd())).map_err(unreadable)?;
        listing.map(|entry| entry.map(|entry| entry.file_name()).map_err(unreadable)).collect()
    }

    fn model_path(&self, folder: &str, name: &std::ffi::OsStr) -> Result<String> {
        let mut path = folder.as_bytes().to_vec();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name.as_bytes());
        match check_path(&path) {
            Ok(path) => Ok(path.to_owned()),
            Err(fault) => Err(Error::new(
                Code::Source,
                format!("{} cannot be sealed", self.shown.join(folder).join(name).display()),
            )
            .with_source(fault)),
        }
    }

    fn look(&self, path: &str) -> Result<Entry> {
        let unreadable = |e| self.fault(path, "cannot be looked at").with_source(e);
        let fd = self.open_at(path, libc::O_PATH | libc::O_NOFOLLOW, NO_LINKS).map_err(unreadable)?;
        let stat = File::from(fd).metadata().map_err(unreadable)?;
        let kind = stat.mode() & libc::S_IFMT;
        match kind {
            libc::S_IFDIR => return Ok(Entry::Folder),
            libc::S_IFREG => return self.file(path, &stat, false),
            libc::S_IFLNK => {}
            libc::S_IFIFO => return Err(self.fault(path, "is a FIFO")),
            libc::S_IFSOCK => return Err(self.fault(path, "is a socket")),
            _ => return Err(self.fault(path, "is a device")),
        }
        let target = self.open_at(path, libc::O_PATH, BENEATH).map_err(|e| {
            let why = match e.raw_os_error() {
                Some(libc::EXDEV) => "is a symlink that leads out of the tree; copy the tree with cp -rL first",
                Some(libc::ELOOP) => "is a symlink that leads in a circle",
                Some(libc::ENOENT) => "is a symlink that leads nowhere",
                _ => "is a symlink that cannot be followed",
            };
            self.fault(path, why).with_source(e)
        })?;
        let stat = File::from(target).metadata().map_err(unreadable)?;
        if stat.mode() & libc::S_IFMT != libc::S_IFREG {
            return Err(self.fault(path, "is a symlink to something that is no regular file"));
        }
        self.file(path, &stat, true)
    }

    fn file(&self, path: &str, stat: &std::fs::Metadata, linked: bool) -> Result<Entry> {
        if stat.size() > FILE_BYTES_MAX {
            return Err(self.fault(path, "is larger than 2^44 bytes"));
        }
        Ok(Entry::File(SourceFile {
            path: path.to_owned(),
            size: stat.size(),
            mtime: stat.mtime(),
            mode: if stat.mode() & 0o111 == 0 { 0o444 } else { 0o555 },
            seen: Seen::of(stat),
            linked,
        }))
    }

    /// Opens a listed file for reading.
    ///
    /// # Errors
    /// `SOURCE` if it cannot be read, `SOURCE_CHANGED` if it is not the file that was listed.
    pub fn open_file(&self, file: &SourceFile) -> Result<StableFile> {
        // Non-blocking: a FIFO that took the place of the file must not hold us.
        let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
        let opened = self.open_as_listed(file, flags).map_err(|e| match e.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => self.fault(&file.path, "cannot be read").with_source(e),
            _ => self.changed(file, "is no longer there").with_source(e),
        })?;
        let opened = StableFile { file: File::from(opened) };
        self.check_same(file, &opened.file)?;
        Ok(opened)
    }

    /// After the last byte of `file` was read through `opened`: nothing about it may have changed since the walk.
    ///
    /// # Errors
    /// `SOURCE_CHANGED`.
    pub fn check_read(&self, file: &SourceFile, opened: &StableFile) -> Result<()> {
        self.check_same(file, &opened.file)?;
        let again =
            self.open_as_listed(file, libc::O_PATH).map_err(|e| self.changed(file, "was removed").with_source(e))?;
        self.check_same(file, &File::from(again))
    }

    fn check_same(&self, file: &SourceFile, opened: &File) -> Result<()> {
        let stat = opened.metadata().map_err(|e| self.fault(&file.path, "cannot be looked at").with_source(e))?;
        let now = Seen::of(&stat);
        if (now.dev, now.ino) != (file.seen.dev, file.seen.ino) {
            return Err(self.changed(file, "was replaced"));
        }
        if now.size != file.size {
            return Err(self.changed(file, &format!("went from {} to {} bytes", file.size, now.size)));
        }
        if now != file.seen {
            return Err(self.changed(file, "was written to"));
        }
        Ok(())
    }

    fn open_as_listed(&self, file: &SourceFile, flags: i32) -> io::Result<OwnedFd> {
        match file.linked {
            true => self.open_at(&file.path, flags, BENEATH),
            false => self.open_at(&file.path, flags | libc::O_NOFOLLOW, NO_LINKS),
        }
    }

    fn open_at(&self, path: &str, flags: i32, resolve: u64) -> io::Result<OwnedFd> {
        let path = CString::new(path).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: open_how is plain integers; all zero is a valid value of it.
        let mut how: libc::open_how = unsafe { std::mem::zeroed() };
        how.flags = (flags | libc::O_CLOEXEC) as u64;
        how.resolve = resolve;
        loop {
            // SAFETY: the path is NUL-terminated, `how` has the size given, both outlive the call.
            let fd = unsafe {
                libc::syscall(
                    libc::SYS_openat2,
                    self.root.as_raw_fd(),
                    path.as_ptr(),
                    &raw const how,
                    size_of::<libc::open_how>(),
                )
            };
            if fd >= 0 {
                let fd = i32::try_from(fd).expect("a descriptor is a small number");
                // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            let error = io::Error::last_os_error();
            // EAGAIN: a rename elsewhere raced the walk; it is to be made again.
            if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                return Err(error);
            }
        }
    }

    fn fault(&self, path: &str, what: &str) -> Error {
        Error::new(Code::Source, format!("{} {what}", self.shown.join(path).display()))
    }

    fn changed(&self, file: &SourceFile, what: &str) -> Error {
        let shown = self.shown.join(&file.path);
        Error::new(Code::SourceChanged, format!("{} {what} while it was being sealed", shown.display()))
    }
}

enum Entry {
    Folder,
    File(SourceFile),
}

/// An open file of the tree that was the listed one when it was opened.
#[derive(Debug)]
pub struct StableFile {
    file: File,
}

impl StableFile {
    /// Fills `room` from `offset`.
    ///
    /// # Errors
    /// `SOURCE_CHANGED` if the file ends before, `SOURCE` if the disk fails.
    pub fn read_exact_at(&self, listed: &SourceFile, room: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(room, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::new(Code::SourceChanged, format!("{} became shorter while it was being sealed", listed.path))
            }
            _ => Error::new(Code::Source, format!("{} cannot be read", listed.path)).with_source(e),
        })
    }
}

/// Paths that some other filesystem would not tell apart: legal, and worth a word.
pub fn name_warnings(files: &[SourceFile]) -> Vec<String> {
    const WARNINGS_MAX: usize = 20;
    let mut folded: HashMap<String, &str> = HashMap::with_capacity(files.len());
    let mut warnings = Vec::new();
    for file in files {
        if let Some(twin) = folded.insert(file.path.to_lowercase(), &file.path) {
            warnings.push(format!("{twin:?} and {:?} differ only in upper and lower case", file.path));
            if warnings.len() == WARNINGS_MAX {
                break;
            }
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn tree(make: impl FnOnce(&Path)) -> (tempfile::TempDir, SourceTree) {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        let tree = SourceTree::open(dir.path()).unwrap();
        (dir, tree)
    }

    fn paths(tree: &SourceTree) -> Vec<String> {
        tree.walk().unwrap().into_iter().map(|file| file.path).collect()
    }

    #[test]
    fn files_come_sorted_by_bytes_with_mode_and_size() {
        let (_dir, tree) = tree(|dir| {
            fs::create_dir_all(dir.join("a/b")).unwrap();
            fs::write(dir.join("a/b/z"), "12345").unwrap();
            fs::write(dir.join("a.x"), "").unwrap();
            fs::write(dir.join("run"), "#!").unwrap();
            fs::set_permissions(dir.join("run"), fs::Permissions::from_mode(0o4755)).unwrap();
            symlink("a/b/z", dir.join("link")).unwrap();
        });
        let files = tree.walk().unwrap();
        let seen: Vec<_> = files.iter().map(|file| (file.path.as_str(), file.size, file.mode)).collect();
        assert_eq!(seen, [("a.x", 0, 0o444), ("a/b/z", 5, 0o444), ("link", 5, 0o444), ("run", 2, 0o555)]);
        let mut room = [0; 5];
        tree.open_file(&files[2]).unwrap().read_exact_at(&files[2], &mut room, 0).unwrap();
        assert_eq!(&room, b"12345");
    }

    /// THREAT_MODEL (f) row 71.
    #[test]
    fn what_cannot_be_part_of_a_model_is_refused_by_name() {
        type Make = fn(&Path);
        let cases: [(&str, Make); 9] = [
            ("out", |dir| symlink("/etc/passwd", dir.join("out")).unwrap()),
            ("up", |dir| symlink("../up", dir.join("up")).unwrap()),
            ("loop", |dir| symlink("loop", dir.join("loop")).unwrap()),
            ("gone", |dir| symlink("nothing", dir.join("gone")).unwrap()),
            ("folder", |dir| {
                fs::create_dir(dir.join("d")).unwrap();
                symlink("d", dir.join("folder")).unwrap();
            }),
            ("circle", |dir| symlink(".", dir.join("circle")).unwrap()),
            ("magic", |dir| symlink("/proc/self/exe", dir.join("magic")).unwrap()),
            ("socket", |dir| drop(std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap())),
            ("back\\slash", |dir| fs::write(dir.join("back\\slash"), "x").unwrap()),
        ];
        for (name, make) in cases {
            let (_dir, tree) = tree(|dir| {
                fs::write(dir.join("good"), "x").unwrap();
                make(dir);
            });
            let refused = tree.walk().unwrap_err();
            assert_eq!(refused.code(), Code::Source, "{refused:?}");
            assert!(refused.message().contains(name), "{refused:?}");
        }
    }

    #[test]
    fn a_fifo_is_refused_and_never_opened() {
        let (_dir, tree) = tree(|dir| {
            let made = std::process::Command::new("mkfifo").arg(dir.join("pipe")).status().unwrap();
            assert!(made.success());
        });
        assert!(tree.walk().unwrap_err().message().contains("FIFO"));
    }

    #[test]
    fn a_tree_without_files_and_a_file_as_a_tree_are_refused() {
        let (dir, tree) = tree(|_| {});
        assert_eq!(tree.walk().unwrap_err().code(), Code::Source);
        fs::write(dir.path().join("file"), "x").unwrap();
        assert_eq!(SourceTree::open(&dir.path().join("file")).unwrap_err().code(), Code::Source);
        assert_eq!(SourceTree::open(&dir.path().join("nothing")).unwrap_err().code(), Code::Source);
    }

    #[test]
    fn a_file_that_changes_after_the_walk_is_noticed() {
        type Change = fn(&Path);
        let changes: [Change; 5] = [
            |file| fs::write(file, "longer than before").unwrap(),
            |file| fs::write(file, "x").unwrap(),
            |file| fs::remove_file(file).unwrap(),
            |file| {
                fs::write(file.with_extension("new"), "12345").unwrap();
                fs::rename(file.with_extension("new"), file).unwrap();
            },
            |file| {
                fs::remove_file(file).unwrap();
                symlink("/etc/passwd", file).unwrap();
            },
        ];
        for change in changes {
            let (dir, tree) = tree(|dir| fs::write(dir.join("file"), "12345").unwrap());
            let files = tree.walk().unwrap();
            let opened = tree.open_file(&files[0]).unwrap();
            tree.check_read(&files[0], &opened).unwrap();
            change(&dir.path().join("file"));
            assert_eq!(tree.check_read(&files[0], &opened).unwrap_err().code(), Code::SourceChanged);
            assert_eq!(tree.open_file(&files[0]).unwrap_err().code(), Code::SourceChanged);
        }
    }

    #[test]
    fn a_swapped_folder_does_not_lead_out() {
        let (dir, tree) = tree(|dir| {
            fs::create_dir(dir.join("d")).unwrap();
            fs::write(dir.join("d/hostname"), "12345").unwrap();
        });
        let files = tree.walk().unwrap();
        fs::remove_dir_all(dir.path().join("d")).unwrap();
        symlink("/etc", dir.path().join("d")).unwrap();
        assert_eq!(tree.open_file(&files[0]).unwrap_err().code(), Code::SourceChanged);
    }

    #[test]
    fn names_that_fold_together_are_warned_about() {
        let (_dir, tree) = tree(|dir| {
            fs::write(dir.join("Model.bin"), "").unwrap();
            fs::write(dir.join("model.bin"), "").unwrap();
        });
        assert_eq!(paths(&tree).len(), 2);
        assert_eq!(name_warnings(&tree.walk().unwrap()).len(), 1);
    }
}
