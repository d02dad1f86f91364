//! Where the plaintext of models lies: files in memory that no other process can find by name.
//!
//! In: how many bytes at most. Out: sparse [`LockedFile`]s, one for each model file.
//! Promises: their pages are never written to swap; an arena that cannot promise this is refused, with the fix named.
//! Two kinds. With CAP_SYS_ADMIN: a pair of private tmpfs that are mounted nowhere (no path leads to them, no mount
//! table shows them), one in huge pages and one in 4 KiB pages, with swapping off. Without it: memfds, locked page by
//! page as they fill.
//! Not here: counting bytes against the cache's budget (`Budget`, `cache`).
//! Spec: docs/THREAT_MODEL.md, memory rules. Held by: tests/memory.rs.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use super::locked_file::{Backing, LockedFile};
use super::map::{check, check_long};
use super::numa::memory_nodes;
use super::process::{can_lock, has_cap_sys_admin, memlock_refusal, memory_ceiling};
use super::{HUGE_PAGE_BYTES, SMALL_PAGE_BYTES};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// What an arena is asked for.
#[derive(Debug, Clone, Copy)]
pub struct ArenaPlan {
    /// The most bytes of plaintext at one time, each range counted in whole granules: the cache's budget.
    pub bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArenaKind {
    /// A private tmpfs mounted nowhere.
    DetachedTmpfs,
    /// Anonymous memory files whose pages are locked as they fill; every byte counts against RLIMIT_MEMLOCK.
    LockedMemfd,
}

impl ArenaKind {
    /// For people and for `status --json`.
    pub const fn name(self) -> &'static str {
        match self {
            ArenaKind::DetachedTmpfs => "a private tmpfs, unswappable and in no mount table",
            ArenaKind::LockedMemfd => "locked memory files",
        }
    }
}

/// Which pages a file asks for. Huge ones fill eight times as fast and read twice as fast, but the smallest piece of
/// such a file costs 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    Huge,
    Small,
}

/// Keys, manifests and thread stacks need room under the memlock limit beside the cache.
const BESIDE_CACHE_BYTES: u64 = 1 << 20;
/// The budget counts every byte; the mounts' own limit is only a second fence and must not be met first.
const SLACK_BYTES: u64 = 64 << 20;

#[derive(Debug)]
pub struct Arena {
    store: Store,
    /// Whether files asked for in huge pages may get them at all on this host.
    huge: bool,
    /// Pages must be locked one by one: the memory itself could be swapped.
    lock: bool,
    passthrough: bool,
}

#[derive(Debug)]
enum Store {
    Tmpfs { huge: OwnedFd, small: OwnedFd },
    Memfd,
}

impl Arena {
    /// The best arena this process may have: the detached tmpfs, else the locked memfds.
    ///
    /// # Errors
    /// `Code::Memlock` if pages must be locked and the limit does not hold `plan.bytes` and the keys; the message
    /// names the number, the limit seen and the ways to raise it. No option turns this off.
    pub fn open(plan: ArenaPlan) -> Result<Arena> {
        match Arena::open_kind(plan, ArenaKind::DetachedTmpfs) {
            Ok(arena) => Ok(arena),
            Err(err) => {
                tracing::debug!("no detached tmpfs, locked memory files instead: {}", err.chain());
                Arena::open_kind(plan, ArenaKind::LockedMemfd)
            }
        }
    }

    /// One kind or an error, for tests and for who wants no fallback.
    pub fn open_kind(plan: ArenaPlan, kind: ArenaKind) -> Result<Arena> {
        // SAFETY: sysconf reads an integer.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        if page != SMALL_PAGE_BYTES as libc::c_long {
            refuse!(Host, "this machine has pages of {page} bytes, modelfs knows {SMALL_PAGE_BYTES}");
        }
        if let Some(ceiling) = memory_ceiling()
            && plan.bytes >= ceiling
        {
            tracing::warn!(
                cache = plan.bytes,
                ceiling,
                "the cache is as large as the memory this process may have; the kernel may kill it"
            );
        }
        match kind {
            ArenaKind::DetachedTmpfs => Arena::detached(plan),
            ArenaKind::LockedMemfd => Arena::memfds(plan),
        }
    }

    fn detached(plan: ArenaPlan) -> Result<Arena> {
        let size = plan.bytes.saturating_add(plan.bytes / 50).saturating_add(SLACK_BYTES);
        let failed = |errno| Error::new(Code::Host, "cannot make a private tmpfs").with_source(errno);
        let interleave = memory_nodes(Path::new("/")).len() > 1;
        let (small, noswap) = mount_tmpfs(c"never", size, interleave).map_err(failed)?;
        let (huge, _) = mount_tmpfs(c"always", size, interleave).map_err(failed)?;
        if !noswap {
            require_lockable(plan)?;
            tracing::warn!("this kernel's tmpfs cannot turn swapping off; cache pages are locked one by one instead");
        }
        let huge_allowed = shmem_setting().is_none_or(|setting| setting != "deny");
        let store = Store::Tmpfs { huge: huge.fd, small: small.fd };
        Ok(Arena { store, huge: huge.sized_pages && huge_allowed, lock: !noswap, passthrough: has_cap_sys_admin() })
    }

    fn memfds(plan: ArenaPlan) -> Result<Arena> {
        require_lockable(plan)?;
        let huge =
            shmem_setting().is_some_and(|it| ["always", "within_size", "advise", "force"].contains(&it.as_str()));
        Ok(Arena { store: Store::Memfd, huge, lock: true, passthrough: has_cap_sys_admin() })
    }

    pub fn kind(&self) -> ArenaKind {
        match self.store {
            Store::Tmpfs { .. } => ArenaKind::DetachedTmpfs,
            Store::Memfd => ArenaKind::LockedMemfd,
        }
    }

    /// Whether the kernel would take our files as passthrough backing, as far as privilege goes.
    pub fn passthrough_capable(&self) -> bool {
        self.passthrough
    }

    /// What the smallest piece of a file in such pages costs: 2 MiB, or 4 KiB (also where the host gives no huge pages).
    pub fn granule(&self, pages: Pages) -> u64 {
        match pages {
            Pages::Huge if self.huge => HUGE_PAGE_BYTES,
            Pages::Huge | Pages::Small => SMALL_PAGE_BYTES,
        }
    }

    /// An empty file of exactly `len` bytes, nothing of it allocated.
    ///
    /// # Errors
    /// `Code::NoRoom` if descriptors, inodes or addresses are exhausted.
    pub fn create(&self, len: u64, pages: Pages) -> Result<LockedFile> {
        let granule = self.granule(pages);
        let failed =
            |errno| Error::new(Code::NoRoom, format!("cannot make a memory file of {len} bytes")).with_source(errno);
        let (fd, backing) = match (&self.store, pages) {
            (Store::Tmpfs { huge, .. }, Pages::Huge) => (nameless_file(huge), Backing::Tmpfs),
            (Store::Tmpfs { small, .. }, Pages::Small) => (nameless_file(small), Backing::Tmpfs),
            (Store::Memfd, _) => (memfd(), Backing::Memfd),
        };
        LockedFile::new(fd.map_err(failed)?, len, pages, granule, backing, self.lock)
    }
}

/// With what the cache may fill locked beside what is locked already, would the limit hold?
fn require_lockable(plan: ArenaPlan) -> Result<()> {
    let need = plan.bytes.saturating_add(BESIDE_CACHE_BYTES);
    if can_lock(need) { Ok(()) } else { Err(memlock_refusal("a cache without CAP_SYS_ADMIN", need)) }
}

/// The host's setting for huge pages in memory files: the bracketed word.
fn shmem_setting() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").ok()?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

pub(super) struct Mounted {
    pub(super) fd: OwnedFd,
    /// The kernel took the `huge=` option.
    sized_pages: bool,
}

/// A tmpfs of our own that is never attached to the tree, and whether its pages are barred from swap.
pub(super) fn mount_tmpfs(huge: &CStr, size: u64, interleave: bool) -> io::Result<(Mounted, bool)> {
    // SAFETY: the name is a C string; the answer is a new descriptor.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), libc::FSOPEN_CLOEXEC) };
    let context = owned(context)?;
    let size = std::ffi::CString::new(size.to_string()).expect("digits hold no NUL");
    set(&context, c"size", Some(&size))?;
    set(&context, c"mode", Some(c"0700"))?;
    set(&context, c"nr_inodes", Some(c"0"))?;
    // A kernel without huge pages knows no such option; files are then in 4 KiB pages.
    let sized_pages = set(&context, c"huge", Some(huge)).is_ok();
    if interleave && let Err(error) = set(&context, c"mpol", Some(c"interleave")) {
        tracing::info!("the cache is not spread over the memory nodes: {error}");
    }
    // Linux 6.4 and later, outside user namespaces.
    let noswap = set(&context, c"noswap", None).is_ok();
    fsconfig(&context, libc::FSCONFIG_CMD_CREATE, None, None)?;
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: takes a descriptor and integers, answers a new descriptor.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes) };
    Ok((Mounted { fd: owned(mount)?, sized_pages }, noswap))
}

/// Whether this kernel's tmpfs can be told never to swap; `None`: we may not mount one.
pub fn tmpfs_refuses_swap() -> Option<bool> {
    mount_tmpfs(c"never", SMALL_PAGE_BYTES, false).ok().map(|(_, noswap)| noswap)
}

fn set(context: &OwnedFd, key: &CStr, value: Option<&CStr>) -> io::Result<()> {
    let command = if value.is_some() { libc::FSCONFIG_SET_STRING } else { libc::FSCONFIG_SET_FLAG };
    fsconfig(context, command, Some(key), value)
}

fn fsconfig(context: &OwnedFd, command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>) -> io::Result<()> {
    let text = |it: Option<&CStr>| it.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: both strings outlive the call; null where the command takes none.
    let ret = unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, text(key), text(value), 0 as libc::c_int)
    };
    check_long(ret).map(drop)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check_long(fd)? as libc::c_int;
    // SAFETY: the kernel just made it for us and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn nameless_file(mount: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the path is a C string; the answer is a new descriptor.
    let fd = check(unsafe { libc::openat(mount.as_raw_fd(), c".".as_ptr(), flags, 0o600 as libc::c_uint) })?;
    owned(fd.into())
}

fn memfd() -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: as above.
    let sealed = unsafe { libc::memfd_create(c"modelfs".as_ptr(), flags | libc::MFD_NOEXEC_SEAL) };
    // Kernels before 6.3 do not know NOEXEC_SEAL.
    // SAFETY: as above.
    let fd = check(sealed).or_else(|_| check(unsafe { libc::memfd_create(c"modelfs".as_ptr(), flags) }))?;
    let fd = owned(fd.into())?;
    // A memfd is born 0777: whoever reaches it through /proc would open it by its mode.
    // SAFETY: changes the mode of our own file.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), 0o600) })?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::huge_page_short_bytes;

    const MIB: u64 = 1 << 20;

    /// What is counted is counted for the process: those who count, or fill huge pages, take turns.
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    /// A tmpfs without huge pages stands for memory in pieces: what `allocate` gets from it is what it would get then.
    fn fallen_back(len: u64) -> Option<LockedFile> {
        let (small, _) = mount_tmpfs(c"never", 256 * MIB, false).ok()?;
        let fd = nameless_file(&small.fd).expect("a file");
        Some(LockedFile::new(fd, len, Pages::Huge, HUGE_PAGE_BYTES, Backing::Tmpfs, false).expect("mapped"))
    }

    fn write(file: &LockedFile, range: std::ops::Range<u64>) {
        // SAFETY: one thread, one slot at a time.
        unsafe { file.slot(range).expect("room") }.fill(7);
    }

    #[test]
    fn pages_that_fell_back_are_counted_until_they_go() {
        if !has_cap_sys_admin() {
            println!("not run: no CAP_SYS_ADMIN");
            return;
        }
        let _alone = ALONE.lock().expect("the other test failed");
        let len = 33 * MIB + 5;
        let file = fallen_back(len).expect("a tmpfs");
        let before = huge_page_short_bytes();
        write(&file, 0..len);
        assert!(file.huge_pages_short().expect("smaps") >= len, "the stand-in gives huge pages");
        // What a moved counter would have caused; counted once.
        file.count_short(&(0..34 * MIB));
        file.count_short(&(2 * MIB..6 * MIB));
        assert_eq!(huge_page_short_bytes() - before, len);
        file.freeze().expect("frozen");
        file.thaw_and_wipe().expect("wiped");
        drop(file);
        assert_eq!(huge_page_short_bytes(), before, "bytes that went are still counted");
    }

    #[test]
    fn a_tmpfs_spread_over_nodes_can_be_had_and_holds_huge_pages() {
        if !has_cap_sys_admin() {
            return;
        }
        let _alone = ALONE.lock().expect("the other test failed");
        let (mounted, _) = mount_tmpfs(c"always", 64 * MIB, true).expect("a tmpfs with mpol=interleave");
        let fd = nameless_file(&mounted.fd).expect("a file");
        let file = LockedFile::new(fd, 4 * MIB, Pages::Huge, HUGE_PAGE_BYTES, Backing::Tmpfs, false).expect("mapped");
        write(&file, 0..4 * MIB);
        assert_eq!(file.resident().expect("stat"), 4 * MIB);
    }
}
