//! What the process as a whole does so that its memory stays its own.
//!
//! In: nothing. Out: a [`Hardening`] report for the log and `doctor`, the memlock limit, locked thread stacks.
//! Promises: after [`harden`] a crash writes no core, processes of the same user cannot read us, identical pages are
//! not merged, and (where memfd_secret exists) the host cannot hibernate our keys to disk. An exec undoes this.
//! Held by: tests/memory.rs (no core after abort), the tests below.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::map::{Map, check, wipe_raw};
use super::secret::{SecretMemory, secret_memory};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// linux/prctl.h; libc does not name them on every target.
const PR_SET_MEMORY_MERGE: libc::c_int = 67;
const PR_GET_MEMORY_MERGE: libc::c_int = 68;
/// linux/capability.h.
const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// What [`harden`] reached, for the log and for `doctor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hardening {
    /// Kernels before 6.4 cannot merge a whole process and do not know the question: `None`.
    pub merging_off: Option<bool>,
    /// An open memfd_secret makes the kernel refuse to hibernate; mlock alone keeps nothing out of the image.
    pub hibernation_blocked: bool,
    pub secret_memory: SecretMemory,
    /// Bytes; `None` is no limit.
    pub memlock_limit: Option<u64>,
    pub cap_sys_admin: bool,
}

/// Closes the ways by which the kernel itself would hand out our memory: core dumps, /proc and ptrace by the same
/// user, page merging, hibernation. To be called after the last change of user and before any key is read.
///
/// # Errors
/// `Code::Host` if the kernel refuses one of the first three; `Code::Memlock` if not even the first page of keys can
/// be locked.
pub fn harden() -> Result<Hardening> {
    use_right_to_lock();
    let mut core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // The hard limit stays: what it is lowered to, no program that we start could raise again.
    // SAFETY: `core` is a valid rlimit that outlives the calls.
    check(unsafe { libc::getrlimit(libc::RLIMIT_CORE, &mut core) })
        .and_then(|_| {
            core.rlim_cur = 0;
            // SAFETY: as above.
            check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &core) })
        })
        .map_err(|errno| Error::new(Code::Host, "cannot set the core file limit to 0").with_source(errno))?;
    // A core_pattern that pipes to a handler ignores that limit; only a process that is not dumpable has no core then.
    set_dumpable(false)?;
    let merging_off = stop_merging()?;
    let secret_memory = secret_memory()?;
    let hibernation_blocked = secret_memory == SecretMemory::MemfdSecret;
    Ok(Hardening {
        merging_off,
        hibernation_blocked,
        secret_memory,
        memlock_limit: memlock_limit(),
        cap_sys_admin: has_cap_sys_admin(),
    })
}

/// Ends the process as `signal` does by itself: whoever waits for it sees the signal, not a failure of ours.
pub fn end_by(signal: libc::c_int) -> ! {
    // SAFETY: two calls on numbers; the handler that is replaced has nothing left to do, for neither call returns to it.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
    // Only a signal that this thread blocks comes here.
    std::process::exit(128 + signal)
}

/// Takes CAP_IPC_LOCK into use where the program's file permits it (`setcap cap_ipc_lock=p`): no limit of locked memory then
/// counts. Where a container's bounding set lacks it, nothing happens; with the effective bit set in the file, the program
/// could not even be started there.
pub fn use_right_to_lock() {
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Set {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = [CAPABILITY_VERSION_3, 0];
    let mut sets = [Set::default(); 2];
    let lock = 1 << CAP_IPC_LOCK;
    // SAFETY: version 3 reads a header of two words and reads or fills two sets of three; all of them outlive the calls.
    unsafe {
        if libc::syscall(libc::SYS_capget, &header, &mut sets) == 0
            && sets[0].permitted & lock != 0
            && sets[0].effective & lock == 0
        {
            sets[0].effective |= lock;
            libc::syscall(libc::SYS_capset, &header, &sets);
        }
    }
}

fn set_dumpable(on: bool) -> Result<()> {
    // SAFETY: PR_SET_DUMPABLE reads integers only.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, libc::c_ulong::from(on), 0, 0, 0) })
        .map_err(|errno| Error::new(Code::Host, "cannot make the process undumpable").with_source(errno))?;
    Ok(())
}

/// A service manager may have switched merging on for its children (systemd's MemoryKSM=): equal pages of different
/// processes would then be told apart by the time a write takes.
fn stop_merging() -> Result<Option<bool>> {
    // SAFETY: both calls read integers only.
    let merging = || check(unsafe { libc::prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) });
    match merging() {
        Err(_) => return Ok(None),
        Ok(0) => return Ok(Some(true)),
        // SAFETY: as above.
        Ok(_) => drop(check(unsafe { libc::prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0) })),
    }
    match merging() {
        Ok(0) => Ok(Some(true)),
        _ => refuse!(Host, "the kernel merges equal pages of this process and will not stop; unset MemoryKSM="),
    }
}

/// RLIMIT_MEMLOCK as it stands, in bytes; `None` is no limit.
pub fn memlock_limit() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the rlimit we own.
    let known = check(unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) }).is_ok();
    (known && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Whether the kernel would let us lock `bytes` more, by asking it: a limit, CAP_IPC_LOCK, user namespaces and what is
/// locked already all count. Locks nothing for longer than the question, allocates nothing.
pub(super) fn can_lock(bytes: u64) -> bool {
    let Ok(len) = usize::try_from(bytes.next_multiple_of(super::SMALL_PAGE_BYTES)) else { return false };
    if len == 0 {
        return true;
    }
    let Ok(map) = Map::reserve(len, super::SMALL_PAGE_BYTES as usize) else { return false };
    // SAFETY: the range is ours and empty; MLOCK_ONFAULT brings no page in.
    check(unsafe { libc::mlock2(map.at(0).cast(), map.len(), libc::MLOCK_ONFAULT) }).is_ok()
}

/// The refusal that names what is needed, what the limit is, and every way to raise it.
pub(super) fn memlock_refusal(what: &str, need: u64) -> Error {
    let limit = memlock_limit().map_or("no limit, but the kernel refused".to_owned(), bytes_text);
    let locked = locked_bytes();
    let all = need.saturating_add(locked);
    Error::new(
        Code::Memlock,
        format!(
            "{what} needs {} of locked memory beside {} locked already, the limit is {limit}; raise it with \
             `ulimit -l {}`, LimitMEMLOCK={all} in the unit or `--ulimit memlock={all}` for the container, grant \
             CAP_IPC_LOCK, or ask for a smaller --cache",
            bytes_text(need),
            bytes_text(locked),
            all.div_ceil(1024),
        ),
    )
}

fn bytes_text(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 && b % (1 << 20) == 0 => format!("{:.1} GiB ({b} bytes)", b as f64 / (1u64 << 30) as f64),
        b if b >= 1 << 20 => format!("{:.1} MiB ({b} bytes)", b as f64 / (1u64 << 20) as f64),
        b => format!("{} KiB ({b} bytes)", b.div_ceil(1024)),
    }
}

static LOCKED_BYTES: AtomicU64 = AtomicU64::new(0);

/// Bytes this process keeps locked with mlock or memfd_secret, by our own count (the detached tmpfs needs no lock).
pub fn locked_bytes() -> u64 {
    LOCKED_BYTES.load(Ordering::Relaxed)
}

pub(super) fn count_locked(bytes: u64) {
    LOCKED_BYTES.fetch_add(bytes, Ordering::Relaxed);
}

pub(super) fn count_unlocked(bytes: u64) {
    LOCKED_BYTES.fetch_sub(bytes, Ordering::Relaxed);
}

/// The least of physical memory and the memory limits of our cgroup and its parents: a cache at or above this ends in
/// the out-of-memory killer. `None` if the kernel does not say.
pub fn memory_ceiling() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.split_whitespace().next()?;
    let mut least = kib.parse::<u64>().ok()?.saturating_mul(1024);
    let cgroup = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    if let Some(own) = cgroup.lines().find_map(|line| line.strip_prefix("0::/")) {
        let root = std::path::Path::new("/sys/fs/cgroup");
        for dir in root.join(own).ancestors().take_while(|dir| dir.starts_with(root)) {
            let limit = std::fs::read_to_string(dir.join("memory.max")).ok().and_then(|text| text.trim().parse().ok());
            least = least.min(limit.unwrap_or(u64::MAX));
        }
    }
    Some(least)
}

/// Whether we hold CAP_SYS_ADMIN over the host (not only in a user namespace of our own): what passthrough and a
/// tmpfs with `noswap` ask for.
pub fn has_cap_sys_admin() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or("0").trim();
    let held = u64::from_str_radix(effective, 16).unwrap_or(0) >> CAP_SYS_ADMIN & 1 == 1;
    held && in_initial_user_namespace()
}

fn in_initial_user_namespace() -> bool {
    // Without user namespaces in the kernel the file is not there, and there is only the initial one.
    let Ok(map) = std::fs::read_to_string("/proc/self/uid_map") else { return true };
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Locks the calling thread's stack and keeps it out of core dumps, for threads through whose frames keys pass. Pages
/// are locked as they are touched, but the whole stack counts against the limit: give such threads small stacks.
///
/// # Errors
/// `Code::Memlock` if the limit does not hold the stack; it is then out of dumps all the same.
pub fn lock_thread_stack() -> Result<()> {
    let (low, len) =
        thread_stack().map_err(|errno| Error::new(Code::Host, "cannot find the stack").with_source(errno))?;
    let start = std::ptr::with_exposed_provenance_mut::<libc::c_void>(low);
    // SAFETY: the range is this thread's stack, mapped while it runs; neither call changes its content.
    check(unsafe { libc::madvise(start, len, libc::MADV_DONTDUMP) })
        .map_err(|errno| Error::new(Code::Host, "cannot keep the stack out of core dumps").with_source(errno))?;
    // SAFETY: as above.
    check(unsafe { libc::mlock2(start, len, libc::MLOCK_ONFAULT) })
        .map_err(|errno| memlock_refusal("a thread that opens chunks", len as u64).with_source(errno))?;
    Ok(())
}

/// Lowest address and length of what is mapped of the calling thread's stack, in whole pages.
fn thread_stack() -> io::Result<(usize, usize)> {
    // SAFETY: gettid takes nothing.
    if unsafe { libc::gettid() } == std::process::id() as libc::pid_t {
        return main_stack();
    }
    let (mut low, mut len) = (std::ptr::null_mut(), 0usize);
    // SAFETY: an attr is a plain C struct for which zeros are a fit start; it is filled by getattr, read by getstack
    // and destroyed once; all pointers are to our own variables.
    unsafe {
        let mut attr: libc::pthread_attr_t = std::mem::zeroed();
        let ret = libc::pthread_getattr_np(libc::pthread_self(), &mut attr);
        if ret != 0 {
            return Err(io::Error::from_raw_os_error(ret));
        }
        let ret = libc::pthread_attr_getstack(&attr, &mut low, &mut len);
        libc::pthread_attr_destroy(&mut attr);
        if ret != 0 {
            return Err(io::Error::from_raw_os_error(ret));
        }
    }
    let page = super::SMALL_PAGE_BYTES as usize;
    let start = low.expose_provenance().next_multiple_of(page);
    let end = (low.expose_provenance() + len) / page * page;
    Ok((start, end - start))
}

/// The main thread's stack grows: its limit says nothing about what is mapped, /proc/self/maps does.
fn main_stack() -> io::Result<(usize, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let here = std::ptr::from_ref(&maps).expose_provenance();
    let parse = |line: &str| {
        let (low, high) = line.split_whitespace().next()?.split_once('-')?;
        Some((usize::from_str_radix(low, 16).ok()?, usize::from_str_radix(high, 16).ok()?))
    };
    let range = maps.lines().filter_map(parse).find(|(low, high)| (*low..*high).contains(&here));
    let (low, high) = range.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    Ok((low, high - low))
}

/// How far below the caller's frame [`scrub_stack`] reaches: deeper than any cipher, hash or KDF we call goes.
const SCRUB_BYTES: usize = 64 << 10;

/// Overwrites the stack below the caller, where the frames of calls that already returned left copies of keys.
#[inline(never)]
pub fn scrub_stack() {
    let mut below = std::mem::MaybeUninit::<[u8; SCRUB_BYTES]>::uninit();
    // SAFETY: the array is ours and lives in this frame; zeros are valid bytes.
    unsafe { wipe_raw(below.as_mut_ptr().cast(), SCRUB_BYTES) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_need_the_limit_and_every_fix() {
        let text = memlock_refusal("a cache", 4 << 30).message().to_owned();
        for part in ["4.0 GiB", "limit is", "ulimit -l", "LimitMEMLOCK=", "--ulimit memlock=", "--cache"] {
            assert!(text.contains(part), "{part} is missing from: {text}");
        }
    }

    #[test]
    fn the_memory_ceiling_is_not_above_physical_memory() {
        let ceiling = memory_ceiling().unwrap();
        assert!(ceiling > 64 << 20, "{ceiling}");
    }

    /// A fixed marker left in a dead frame is found before the scrub and not after it.
    #[test]
    fn scrubbing_reaches_the_frames_of_calls_that_returned() {
        #[inline(never)]
        fn leave(marker: u8) -> usize {
            let frame = [marker; 4096];
            std::hint::black_box(&frame).as_ptr().expose_provenance()
        }
        #[inline(never)]
        fn count(at: usize, marker: u8) -> usize {
            let start = std::ptr::with_exposed_provenance::<u8>(at);
            // SAFETY: the stack below us stays mapped; the bytes are whatever they are.
            (0..4096).filter(|i| unsafe { start.add(*i).read_volatile() } == marker).count()
        }
        std::thread::spawn(|| {
            let at = leave(0xa7);
            assert!(count(at, 0xa7) > 3000, "the detector does not see the marker it planted");
            scrub_stack();
            assert_eq!(count(at, 0xa7), 0);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_small_thread_stack_can_be_locked() {
        // How large the map around an address is, and whether it is locked. The sum of the whole process says nothing: other
        // tests lock and unlock meanwhile.
        let map_around = |at: usize| {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let (mut inside, mut bytes, mut locked) = (false, 0, false);
            for line in smaps.lines() {
                let mut words = line.split_whitespace();
                let first = words.next().unwrap_or_default();
                if let Some((low, high)) = first.split_once('-') {
                    let [low, high] = [low, high].map(|hex| usize::from_str_radix(hex, 16).unwrap());
                    inside = (low..high).contains(&at);
                    bytes = if inside { high - low } else { bytes };
                } else if inside && first == "VmFlags:" {
                    locked = words.any(|flag| flag == "lo");
                }
            }
            (bytes, locked)
        };
        let thread = std::thread::Builder::new().stack_size(256 << 10).spawn(move || {
            let local = 0_u8;
            let here = std::ptr::from_ref(&local).expose_provenance();
            lock_thread_stack().unwrap();
            let (bytes, locked) = map_around(here);
            assert!(locked && bytes >= 200 << 10, "{bytes} bytes, locked: {locked}");
        });
        thread.unwrap().join().unwrap();
    }
}
