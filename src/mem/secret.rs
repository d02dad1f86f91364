//! Memory for keys, and for plaintext that is not model data (manifests, passphrases, KDF output).
//!
//! In: sizes, key bytes (whose source is wiped). Out: [`Secret`]s in memfd_secret pages that not even root can read
//! through ptrace or /proc, [`LockedBuf`]s in locked private pages.
//! Promises: never swapped, never in a core dump, not in a forked child, overwritten when dropped, never printed.
//! Where the kernel has no memfd_secret, keys lie in locked private pages instead, and one warning says so.
//! Not here: which key opens what (`keys`, `crypto`). Held by: the tests below, tests/memory.rs.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

use subtle::ConstantTimeEq;

use super::SMALL_PAGE_BYTES;
use super::map::{Access, Map, check, check_long, wipe, wipe_raw};
use super::process::{count_locked, count_unlocked, memlock_refusal};
use crate::error::{Code, Error, Result};

/// Where keys lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretMemory {
    /// Out of the kernel's own map: unreadable through ptrace, /proc/PID/mem and process_vm_readv, even for root.
    MemfdSecret,
    /// Private locked pages: not swapped, not dumped, but root can read them.
    LockedPrivate,
}

/// The smallest piece of a slab: one 32-byte key.
const SLOT_BYTES: usize = 32;
/// The first slab fits a memlock limit of 64 KiB beside other users of it; later ones are for many keys.
const FIRST_SLAB_BYTES: usize = 16 << 10;
const LATER_SLAB_BYTES: usize = 64 << 10;

/// One block of secret pages, cut into slots of 32 bytes. Never given back: the next key will want it, and an open
/// memfd_secret keeps the host from hibernating.
struct Slab {
    map: Map,
    kind: SecretMemory,
    used: Vec<bool>,
    /// No slot below this one is free.
    low: usize,
}

static SLABS: Mutex<Vec<Slab>> = Mutex::new(Vec::new());

fn slabs() -> MutexGuard<'static, Vec<Slab>> {
    // The slot table is updated by single stores: a panic elsewhere leaves it whole.
    SLABS.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Slab {
    fn open(len: usize) -> Result<Slab> {
        let locked = |errno| memlock_refusal("memory for keys", len as u64).with_source(errno);
        let map = Map::reserve(len, SMALL_PAGE_BYTES as usize).map_err(locked)?;
        let kind = match place_secret(&map) {
            Ok(()) => SecretMemory::MemfdSecret,
            Err(errno) => {
                static TOLD: std::sync::Once = std::sync::Once::new();
                TOLD.call_once(|| {
                    tracing::warn!(%errno, "no memfd_secret: keys lie in locked memory that root can read, and \
                        hibernation is not blocked");
                });
                map.place_anonymous().and_then(|()| map.lock(0, len)).map_err(locked)?;
                SecretMemory::LockedPrivate
            }
        };
        count_locked(len as u64);
        Ok(Slab { map, kind, used: vec![false; len / SLOT_BYTES], low: 0 })
    }

    /// Takes the first `count` free slots in a row.
    fn take(&mut self, count: usize) -> Option<usize> {
        while self.used.get(self.low) == Some(&true) {
            self.low += 1;
        }
        let mut start = self.low;
        for slot in self.low..self.used.len() {
            if self.used[slot] {
                start = slot + 1;
            } else if slot + 1 - start == count {
                self.used[start..=slot].fill(true);
                return Some(start);
            }
        }
        None
    }

    fn give_back(&mut self, start: usize, count: usize) {
        self.used[start..start + count].fill(false);
        self.low = self.low.min(start);
    }

    fn holds(&self, address: usize) -> bool {
        let start = self.map.at(0).addr();
        (start..start + self.map.len()).contains(&address)
    }
}

/// Puts memfd_secret pages behind the map and touches them, so that the limit is met now and not by a key.
fn place_secret(map: &Map) -> io::Result<()> {
    // SAFETY: takes flags only, answers a new descriptor.
    let fd = check_long(unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) })?;
    // SAFETY: the descriptor is new and nobody else has it. The mapping keeps the file alive after it closes.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    // SAFETY: changes the size of our own file.
    check(unsafe { libc::ftruncate(std::os::fd::AsRawFd::as_raw_fd(&fd), map.len() as libc::off_t) })?;
    map.place_file(fd.as_fd(), Access::ReadWrite)?;
    // SAFETY: just mapped writable with `len` bytes behind it, and not shared yet.
    unsafe { wipe_raw(map.at(0), map.len()) };
    Ok(())
}

/// Where keys lie in this process; makes the first slab, so that a limit too low is refused at start.
///
/// # Errors
/// `Code::Memlock` if not even that can be locked.
pub fn secret_memory() -> Result<SecretMemory> {
    let mut slabs = slabs();
    if slabs.is_empty() {
        slabs.push(Slab::open(FIRST_SLAB_BYTES)?);
    }
    // The weakest decides what may be promised.
    let weakest = slabs.iter().map(|slab| slab.kind).find(|kind| *kind == SecretMemory::LockedPrivate);
    Ok(weakest.unwrap_or(SecretMemory::MemfdSecret))
}

/// Makes sure that `count` more secrets of up to 32 bytes can be made. To be called before a number of keys that
/// someone else chose (a manifest's) is loaded; the constructors below panic where this refuses.
///
/// # Errors
/// `Code::Memlock`, naming the number.
pub fn reserve_secrets(count: usize) -> Result<()> {
    let mut slabs = slabs();
    let free: usize = slabs.iter().map(|slab| slab.used.iter().filter(|used| !**used).count()).sum();
    let Some(missing) = count.checked_sub(free).filter(|missing| *missing > 0) else { return Ok(()) };
    let len = missing
        .checked_mul(SLOT_BYTES)
        .and_then(|len| len.checked_next_multiple_of(LATER_SLAB_BYTES))
        .ok_or_else(|| memlock_refusal("memory for keys", u64::MAX))?;
    slabs.push(Slab::open(len)?);
    Ok(())
}

/// `N` bytes of key, in pages of their own kind, overwritten when dropped. Has no `Clone`, and its `Debug` says nothing.
pub struct Secret<const N: usize> {
    bytes: NonNull<[u8; N]>,
}

// SAFETY: the slot belongs to this value alone (the slab's table says so) and is only written through `&mut self` or
// before the value exists; sharing `&[u8; N]` between threads is sharing plain bytes.
unsafe impl<const N: usize> Send for Secret<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Sync for Secret<N> {}

impl<const N: usize> Secret<N> {
    const SLOTS: usize = {
        assert!(N > 0 && N <= FIRST_SLAB_BYTES, "a secret is 1 byte to 16 KiB");
        N.div_ceil(SLOT_BYTES)
    };

    /// A secret of zeros, to be filled in place through [`Secret::expose_mut`].
    ///
    /// # Errors
    /// `Code::Memlock` if no more memory can be locked.
    pub fn zeroed() -> Result<Self> {
        let mut slabs = slabs();
        let taken = slabs.iter_mut().find_map(|slab| slab.take(Self::SLOTS).map(|slot| slab.map.at(slot * SLOT_BYTES)));
        let start = match taken {
            Some(start) => start,
            None => {
                let sizes = if slabs.is_empty() { [FIRST_SLAB_BYTES; 2] } else { [LATER_SLAB_BYTES, FIRST_SLAB_BYTES] };
                let mut slab = Slab::open(sizes[0]).or_else(|_| Slab::open(sizes[1]))?;
                let slot = slab.take(Self::SLOTS).expect("every secret fits an empty slab");
                let start = slab.map.at(slot * SLOT_BYTES);
                slabs.push(slab);
                start
            }
        };
        // Slots are zero when free: pages come zeroed, Drop leaves zeros.
        Ok(Secret { bytes: NonNull::new(start.cast()).expect("a map is never at null") })
    }

    /// Fills a new secret where it lies, so that no copy is made on the way.
    pub fn filled_by(fill: impl FnOnce(&mut [u8; N]) -> Result<()>) -> Result<Self> {
        let mut secret = Self::zeroed()?;
        fill(secret.expose_mut())?;
        Ok(secret)
    }

    /// `N` bytes from the kernel's generator.
    ///
    /// # Panics
    /// If no more memory can be locked (see [`reserve_secrets`]), or the kernel has no random bytes.
    pub fn random() -> Self {
        let fill = |bytes: &mut [u8; N]| {
            getrandom::fill(bytes).map_err(|err| Error::new(Code::Host, format!("no random bytes: {err}")))
        };
        Self::filled_by(fill).unwrap_or_else(|err| panic!("{}", err.chain()))
    }

    /// Moves the bytes in: `source` is zeros afterwards.
    ///
    /// # Panics
    /// If no more memory can be locked (see [`reserve_secrets`]).
    pub fn from_bytes(source: &mut [u8; N]) -> Self {
        let secret = Self::zeroed();
        let mut secret = secret.unwrap_or_else(|err| {
            wipe(source);
            panic!("{}", err.chain())
        });
        secret.expose_mut().copy_from_slice(source);
        wipe(source);
        secret
    }

    pub fn expose(&self) -> &[u8; N] {
        // SAFETY: the slot is ours until Drop, zeroed or filled, and slabs are never unmapped.
        unsafe { self.bytes.as_ref() }
    }

    pub fn expose_mut(&mut self) -> &mut [u8; N] {
        // SAFETY: as for expose; `&mut self` keeps others away.
        unsafe { self.bytes.as_mut() }
    }

    /// Whether both hold the same bytes, in a time that does not depend on them.
    pub fn ct_eq(&self, other: &[u8; N]) -> bool {
        self.expose()[..].ct_eq(&other[..]).into()
    }
}

impl<const N: usize> Drop for Secret<N> {
    fn drop(&mut self) {
        wipe(self.expose_mut());
        let start = self.bytes.as_ptr().addr();
        let mut slabs = slabs();
        let slab = slabs.iter_mut().find(|slab| slab.holds(start));
        let slab = slab.expect("every secret lies in a slab, and slabs are never given back");
        slab.give_back((start - slab.map.at(0).addr()) / SLOT_BYTES, Self::SLOTS);
    }
}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret<{N}>")
    }
}

/// A buffer of fixed length in locked private pages, zeroed at first and overwritten when dropped.
pub struct LockedBuf {
    map: Map,
    len: usize,
}

impl LockedBuf {
    /// `len` zero bytes, page-aligned.
    ///
    /// # Errors
    /// `Code::Memlock`, naming need, limit and fix. `Code::NoRoom` if there is no such memory at all.
    ///
    /// Costs a page fault per 4 KiB (about 1 GB/s), paid here and not by whoever fills it.
    pub fn new(len: usize) -> Result<LockedBuf> {
        let page = SMALL_PAGE_BYTES as usize;
        let no_room = |errno| Error::new(Code::NoRoom, format!("no {len} bytes of memory")).with_source(errno);
        let mapped = len.max(1).checked_next_multiple_of(page);
        let mapped = mapped.ok_or_else(|| no_room(io::Error::from_raw_os_error(libc::ENOMEM)))?;
        let map = Map::reserve(mapped, page).map_err(no_room)?;
        map.place_anonymous().map_err(no_room)?;
        // khugepaged would copy the pages into a huge one and leave the old frames, with their plaintext, unwiped.
        // A kernel without huge pages refuses the advice and has no khugepaged either.
        let _ = map.advise(0, mapped, libc::MADV_NOHUGEPAGE);
        map.lock(0, mapped).map_err(|errno| memlock_refusal("a locked buffer", mapped as u64).with_source(errno))?;
        count_locked(mapped as u64);
        Ok(LockedBuf { map, len })
    }

    /// A locked copy; wiping the source is the caller's.
    pub fn copy_of(bytes: &[u8]) -> Result<LockedBuf> {
        let mut copy = LockedBuf::new(bytes.len())?;
        copy.copy_from_slice(bytes);
        Ok(copy)
    }

    /// Ends the buffer at `len`; what lies behind is overwritten.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            wipe(&mut self[len..]);
            self.len = len;
        }
    }
}

impl Deref for LockedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the map is private, ours, initialised (zero pages) and at least `len` long.
        unsafe { std::slice::from_raw_parts(self.map.at(0), self.len) }
    }
}

impl DerefMut for LockedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for deref; `&mut self` keeps others away.
        unsafe { std::slice::from_raw_parts_mut(self.map.at(0), self.len) }
    }
}

impl AsRef<[u8]> for LockedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for LockedBuf {
    fn drop(&mut self) {
        // SAFETY: the map is mapped writable and nobody borrows from a value that is being dropped.
        unsafe { wipe_raw(self.map.at(0), self.map.len()) };
        count_unlocked(self.map.len() as u64);
    }
}

impl fmt::Debug for LockedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LockedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_takes_its_bytes_and_wipes_their_source() {
        let mut source = [9u8; 48];
        let secret = Secret::<48>::from_bytes(&mut source);
        assert_eq!(source, [0u8; 48]);
        assert!(secret.ct_eq(&[9u8; 48]) && !secret.ct_eq(&[0u8; 48]));
        assert_eq!(format!("{secret:?}"), "Secret<48>");
    }

    #[test]
    fn a_dropped_secret_leaves_zeros_in_its_slot() {
        let secret = Secret::<32>::from_bytes(&mut [0x5a; 32]);
        let at = secret.bytes;
        drop(secret);
        // SAFETY: slabs are never unmapped; another test may own the slot by now, but never with these bytes.
        assert_ne!(unsafe { at.as_ptr().read_volatile() }, [0x5a; 32]);
    }

    #[test]
    fn ten_thousand_secrets_do_not_overlap_and_their_room_is_used_again() {
        let make = || (0..10_000u32).map(|i| Secret::<40>::from_bytes(&mut [(i % 251) as u8; 40])).collect::<Vec<_>>();
        let first = make();
        let slabs_then = slabs().len();
        assert!(first.iter().enumerate().all(|(i, secret)| *secret.expose() == [(i % 251) as u8; 40]));
        drop(first);
        let second = make();
        assert!(second.iter().enumerate().all(|(i, secret)| *secret.expose() == [(i % 251) as u8; 40]));
        assert!(slabs().len() <= slabs_then + 1, "{} slabs after {slabs_then}", slabs().len());
    }

    #[test]
    fn two_random_secrets_differ() {
        assert!(!Secret::<32>::random().ct_eq(Secret::<32>::random().expose()));
    }

    #[test]
    fn a_locked_buffer_is_zero_aligned_and_counted() {
        let mut buffer = LockedBuf::new(5000).unwrap();
        assert_eq!(buffer.as_ptr().addr() % 4096, 0);
        assert!(buffer.iter().all(|byte| *byte == 0));
        assert!(super::super::locked_bytes() >= 8192);
        buffer.fill(3);
        buffer.truncate(10);
        assert_eq!(&buffer[..], [3u8; 10]);
        assert_eq!(LockedBuf::new(0).unwrap().len(), 0);
    }

    #[test]
    fn a_buffer_no_machine_has_is_refused() {
        let err = LockedBuf::new(usize::MAX - 10_000).unwrap_err();
        assert_eq!(err.code(), Code::NoRoom);
    }
}
