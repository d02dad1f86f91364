//! The memory rules of docs/THREAT_MODEL.md, tried against the kernel: what is huge, what is wiped, who holds what, what
//! another process or a core dump can see.
//!
//! Tests that need a process of their own start this binary again as `child` with a role in the environment. Tests of
//! the detached tmpfs need CAP_SYS_ADMIN and say so where they cannot run.

#[path = "common/no_uring.rs"]
mod no_uring;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use modelfs::error::{Code, Result};
use modelfs::mem::{
    Arena, ArenaKind, ArenaPlan, HUGE_PAGE_BYTES, LockedBuf, LockedFile, Pages, Secret, SecretMemory, Wiped, harden,
    has_cap_sys_admin, memlock_limit, secret_memory, take_env,
};

use no_uring::without_io_uring;

const MIB: u64 = 1 << 20;
const ROLE: &str = "MODELFS_TEST_MEMORY_ROLE";
const VARIABLE: &str = "MODELFS_TEST_MEMORY_SECRET";

/// Tests that count openers or fork children run one at a time: a child between fork and exec holds every descriptor.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The arenas this process may have; the tmpfs is left out, aloud, where it may not.
fn arenas(bytes: u64) -> Vec<Arena> {
    [ArenaKind::DetachedTmpfs, ArenaKind::LockedMemfd]
        .into_iter()
        .filter_map(|kind| match Arena::open_kind(ArenaPlan { bytes }, kind) {
            Ok(arena) => Some(arena),
            Err(err) => {
                println!("not run on {kind:?}: {}", err.chain());
                assert!(kind == ArenaKind::LockedMemfd || !has_cap_sys_admin(), "{}", err.chain());
                None
            }
        })
        .collect()
}

fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn fill(file: &LockedFile) -> Result<()> {
    let mut at = 0;
    while at < file.len() {
        let end = (at + 8 * MIB).min(file.len());
        // SAFETY: this thread alone fills the file, front to back, and drops each slot before the next.
        let slot = unsafe { file.slot(at..end)? };
        slot.iter_mut().zip(at..).for_each(|(byte, at)| *byte = pattern(at));
        at = end;
    }
    Ok(())
}

fn assert_filled(file: &LockedFile) {
    // SAFETY: every caller has filled the whole file and wipes nothing meanwhile.
    let bytes = unsafe { file.bytes(0..file.len()) };
    let wrong = bytes.iter().zip(0u64..).find(|(byte, at)| **byte != pattern(*at));
    assert_eq!(wrong, None);
}

fn whole(arena: &Arena, len: u64, pages: Pages) -> LockedFile {
    let file = arena.create(len, pages).unwrap();
    fill(&file).unwrap();
    file
}

/// Another open of the same file, as a reader through passthrough has one.
fn open_again(file: &LockedFile) -> OwnedFd {
    std::fs::File::open(format!("/proc/self/fd/{}", file.backing().as_raw_fd())).unwrap().into()
}

#[test]
fn a_file_has_exactly_the_length_asked_for_and_holds_nothing_at_first() {
    for arena in arenas(64 * MIB) {
        for len in [0, 1, 4096, 5 * MIB + 123] {
            for pages in [Pages::Huge, Pages::Small] {
                let file = arena.create(len, pages).unwrap();
                assert_eq!((file.len(), file.resident().unwrap()), (len, 0));
                fill(&file).unwrap();
                assert_filled(&file);
                file.freeze().unwrap();
                let stat = std::fs::File::from(open_again(&file)).metadata().unwrap();
                assert_eq!(stat.len(), len, "{:?} {pages:?}", arena.kind());
                assert_eq!(stat.nlink(), 0, "the file has a name");
            }
        }
    }
}

#[test]
fn files_are_in_no_mount_table() {
    let files: Vec<_> = arenas(8 * MIB).iter().map(|arena| whole(arena, MIB, Pages::Huge)).collect();
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let devices: Vec<&str> = table.lines().map(|line| line.split(' ').nth(2).expect("major:minor")).collect();
    let of = |device: u64| format!("{}:{}", libc::major(device), libc::minor(device));
    let root = of(std::fs::metadata("/").unwrap().dev());
    assert!(devices.contains(&root.as_str()), "{root} is not found, although it is mounted");
    for file in &files {
        file.freeze().unwrap();
        let device = of(std::fs::File::from(open_again(file)).metadata().unwrap().dev());
        assert!(!devices.contains(&device.as_str()), "{device} is in the mount table");
    }
}

#[test]
fn huge_pages_are_really_huge_where_the_kernel_grants_them() {
    for arena in arenas(256 * MIB) {
        if arena.granule(Pages::Huge) != HUGE_PAGE_BYTES {
            println!("{:?}: this host gives memory files no huge pages", arena.kind());
            continue;
        }
        // As long as the file itself: a few free pieces are no sign that there are many.
        let trial = whole(&arena, 64 * MIB, Pages::Huge);
        if trial.huge_pages_short().unwrap() > 0 {
            println!("{:?}: free memory is in pieces", arena.kind());
            continue;
        }
        drop(trial);
        let file = whole(&arena, 64 * MIB + 5, Pages::Huge);
        let filling = file.huge_pages_short().unwrap();
        file.freeze().unwrap();
        let frozen = file.huge_pages_short().unwrap();
        println!(
            "{:?}: {filling} bytes in small pages while filling, {frozen} frozen, of {}",
            arena.kind(),
            file.len()
        );
        // Free memory may be in pieces; all of it in pieces right after a granted trial it is not.
        assert!(filling <= file.len() / 2 && frozen <= file.len() / 2);
        let small = whole(&arena, 4 * MIB, Pages::Small);
        if arena.kind() == ArenaKind::DetachedTmpfs {
            assert_eq!(small.granule(), 4096);
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            assert!(smaps.contains("ShmemPmdMapped:"), "the kernel does not say what is huge");
        }
    }
}

#[test]
fn eviction_of_a_part_leaves_zeros_and_frees_its_pages() {
    for arena in arenas(64 * MIB) {
        for pages in [Pages::Huge, Pages::Small] {
            let len = 9 * MIB + 777;
            let file = whole(&arena, len, pages);
            let full = file.resident().unwrap();
            assert_eq!(full, file.cost(&(0..len)), "{:?} {pages:?}", arena.kind());

            file.wipe(2 * MIB..4 * MIB).unwrap();
            assert_eq!(file.resident().unwrap(), full - 2 * MIB);
            file.wipe(8 * MIB..len).unwrap();
            assert_eq!(file.resident().unwrap(), full - 2 * MIB - file.cost(&(8 * MIB..len)));

            // SAFETY: filled again before it is read; nobody else has the file.
            let slot = unsafe { file.slot(2 * MIB..4 * MIB).unwrap() };
            assert!(slot.iter().all(|byte| *byte == 0), "an evicted range came back with old bytes");
            // SAFETY: these ranges were filled and not wiped.
            let (low, high) = unsafe { (file.bytes(0..2 * MIB), file.bytes(4 * MIB..8 * MIB)) };
            assert!(low.iter().zip(0..).all(|(byte, at)| *byte == pattern(at)));
            assert!(high.iter().zip(4 * MIB..).all(|(byte, at)| *byte == pattern(at)));
        }
    }
}

#[test]
fn wiping_holes_allocates_nothing() {
    for arena in arenas(64 * MIB) {
        let file = arena.create(1 << 40, Pages::Huge).unwrap();
        file.wipe(0..1 << 39).unwrap();
        assert_eq!(file.resident().unwrap(), 0);
        file.thaw_and_wipe().unwrap();
    }
}

/// THREAT_MODEL (f) row 66: a full arena answers an error, not a signal, and what was there stays.
#[test]
fn row_66_a_full_arena_refuses_and_does_not_crash() {
    let Ok(arena) = Arena::open_kind(ArenaPlan { bytes: 8 * MIB }, ArenaKind::DetachedTmpfs) else {
        println!("not run: no detached tmpfs here");
        return;
    };
    for pages in [Pages::Huge, Pages::Small] {
        let file = arena.create(1 << 30, pages).unwrap();
        let mut filled = 0;
        let err = loop {
            // SAFETY: one thread, one slot at a time.
            match unsafe { file.slot(filled..filled + 4 * MIB) } {
                Ok(slot) => slot.fill(0x11),
                Err(err) => break err,
            }
            filled += 4 * MIB;
            assert!(filled < 512 * MIB, "the mount has no limit");
        };
        assert_eq!(err.code(), Code::NoRoom, "{err:?}");
        assert!(filled >= 8 * MIB, "{filled}");
        // SAFETY: filled above.
        assert!(unsafe { file.bytes(0..filled) }.iter().all(|byte| *byte == 0x11));
    }
}

#[test]
fn a_reader_notices_nothing_when_the_file_is_frozen_under_it() {
    for arena in arenas(64 * MIB) {
        for _ in 0..20 {
            let file = whole(&arena, 4 * MIB, Pages::Small);
            let (started, stop) = (AtomicBool::new(false), AtomicBool::new(false));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.load(Ordering::Acquire) {
                        assert_filled(&file);
                        started.store(true, Ordering::Release);
                    }
                });
                while !started.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                file.freeze().unwrap();
                stop.store(true, Ordering::Release);
            });
            assert_filled(&file);
        }
    }
}

#[test]
fn a_frozen_file_cannot_be_filled_wiped_in_part_or_frozen_again() {
    for arena in arenas(8 * MIB) {
        let file = whole(&arena, MIB, Pages::Small);
        file.freeze().unwrap();
        // SAFETY: refused before anything is handed out.
        assert_eq!(unsafe { file.slot(0..4096) }.unwrap_err().code(), Code::Stale);
        assert_eq!(file.wipe(0..4096).unwrap_err().code(), Code::Stale);
        assert_eq!(file.freeze().unwrap_err().code(), Code::Stale);
        // SAFETY: asks the kernel only; it must refuse.
        let write = unsafe { libc::pwrite(file.backing().as_raw_fd(), b"x".as_ptr().cast(), 1, 0) };
        assert_eq!((write, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EBADF)));
    }
}

#[test]
fn the_lease_test_says_idle_open_and_mapped() {
    let _alone = alone();
    for arena in arenas(64 * MIB) {
        let file = whole(&arena, 3 * MIB, Pages::Huge);
        assert!(!file.others_hold().unwrap());
        file.freeze().unwrap();
        assert!(!file.others_hold().unwrap(), "{:?}: our own map or descriptor counts", arena.kind());

        let other = open_again(&file);
        assert!(file.others_hold().unwrap());
        drop(other);
        assert!(!file.others_hold().unwrap());

        let mut child = in_child("map-and-close").stdin(open_again(&file)).spawn().unwrap();
        assert_eq!(line_of(&mut child), "mapped");
        assert!(file.others_hold().unwrap(), "a map held by a process that closed its descriptor is not seen");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!file.others_hold().unwrap());
    }
}

/// An open that meets the lease sends its owner a signal; SIGIO, the default, would end the daemon.
#[test]
fn opens_during_the_lease_test_do_not_kill_us() {
    let _alone = alone();
    for arena in arenas(64 * MIB) {
        let file = whole(&arena, MIB, Pages::Small);
        file.freeze().unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Acquire) {
                    drop(open_again(&file));
                }
            });
            let held = (0..20_000).filter(|_| file.others_hold().unwrap()).count();
            println!("{:?}: held in {held} of 20000 tests", arena.kind());
            stop.store(true, Ordering::Release);
        });
    }
}

#[test]
fn thaw_and_wipe_overwrites_every_page_and_frees_it() {
    let _alone = alone();
    for arena in arenas(64 * MIB) {
        for pages in [Pages::Huge, Pages::Small] {
            let file = whole(&arena, 5 * MIB + 5, pages);
            file.freeze().unwrap();
            file.thaw_and_wipe().unwrap();
            assert_eq!(file.resident().unwrap(), 0);
            // SAFETY: refused before anything is handed out.
            assert_eq!(unsafe { file.slot(0..1) }.unwrap_err().code(), Code::Stale);
            file.thaw_and_wipe().unwrap();
        }
    }
}

/// A pipe keeps the file's own pages beyond the file's end: what comes out of it is what went back to the kernel.
#[test]
fn pages_are_overwritten_before_they_are_freed() {
    let _alone = alone();
    for arena in arenas(64 * MIB) {
        for pages in [Pages::Huge, Pages::Small] {
            let file = whole(&arena, MIB, pages);
            file.freeze().unwrap();
            let (read, held) = pages_held_by_a_pipe(&file);
            file.thaw_and_wipe().unwrap();
            let mut seen = vec![0xff; held];
            std::fs::File::from(read).read_exact(&mut seen).unwrap();
            assert!(seen.iter().all(|byte| *byte == 0), "{:?}: plaintext went back to the kernel", arena.kind());
        }
        // The detector's own proof, and what revoking a held file cannot promise where pages cannot be pinned.
        let file = whole(&arena, MIB, Pages::Small);
        file.freeze().unwrap();
        let (read, held) = pages_held_by_a_pipe(&file);
        let holder = open_again(&file);
        assert_eq!(without_io_uring(|| file.revoke()).unwrap(), Wiped::CutOff);
        drop(holder);
        let mut seen = vec![0; held];
        std::fs::File::from(read).read_exact(&mut seen).unwrap();
        assert!(seen.iter().zip(0..).all(|(byte, at)| *byte == pattern(at)), "the pipe holds copies, not pages");
    }
}

/// Whether pages can be pinned here at all; said aloud if not.
fn pins() -> bool {
    let can = modelfs::mem::can_pin();
    if let Err(error) = &can {
        println!("SKIPPED (part): this machine gives no io_uring: {error}");
    }
    can.is_ok()
}

/// The witness is a pipe that holds a page of the file beyond its end; the detector's proof is the test above.
#[test]
fn pages_of_a_revoked_file_are_zeroed_although_it_is_held() {
    let _alone = alone();
    if !pins() {
        return;
    }
    for arena in arenas(64 * MIB) {
        for pages in [Pages::Huge, Pages::Small] {
            let file = whole(&arena, 5 * MIB + 77, pages);
            file.freeze().unwrap();
            let (read, held) = pages_held_by_a_pipe(&file);
            let holder = open_again(&file);
            assert_eq!(file.revoke().unwrap(), Wiped::Overwritten, "{:?} {pages:?}", arena.kind());
            drop(holder);
            let mut seen = vec![0xff; held];
            std::fs::File::from(read).read_exact(&mut seen).unwrap();
            assert!(seen.iter().all(|byte| *byte == 0), "{:?} {pages:?}: plaintext went back", arena.kind());
            assert_eq!(file.resident().unwrap(), 0);
        }
    }
}

/// Whether readers that copy all the time saw a zero in a file that holds none, while `end` ended it. `None`: one did
/// within a read that the machine held up for as long as a revocation waits for readers, which shows nothing.
fn zeros_seen_while(arena: &Arena, pages: Pages, end: impl FnOnce(&LockedFile)) -> Option<bool> {
    let file = arena.create(16 * MIB, pages).unwrap();
    // SAFETY: this thread alone fills the file.
    unsafe { file.slot(0..16 * MIB).unwrap() }.fill(0xa5);
    file.freeze().unwrap();
    let readers: Vec<std::fs::File> = (0..2).map(|_| open_again(&file).into()).collect();
    let reading = std::sync::Barrier::new(readers.len() + 1);
    let read_on = |reader: &std::fs::File| {
        let mut bytes = vec![0u8; 4 << 20];
        for reads in 0u64.. {
            if reads == 2 {
                reading.wait();
            }
            let began = std::time::Instant::now();
            let got = reader.read_at(&mut bytes, reads % 4 * 4 * MIB).unwrap();
            let took = began.elapsed();
            if bytes[..got].iter().any(|byte| *byte != 0xa5) {
                return (took < modelfs::mem::IN_FLIGHT_GRACE / 2).then_some(true);
            }
            if got == 0 {
                return Some(false);
            }
        }
        unreachable!("the file ends")
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = readers.iter().map(|reader| scope.spawn(|| read_on(reader))).collect();
        reading.wait();
        end(&file);
        let seen: Vec<_> = running.into_iter().map(|reader| reader.join().expect("a reader")).collect();
        if seen.contains(&Some(true)) {
            return Some(true);
        }
        (!seen.contains(&None)).then_some(false)
    })
}

#[test]
fn a_reader_of_a_file_that_is_revoked_sees_data_or_the_end_and_no_zeros() {
    let _alone = alone();
    for arena in arenas(64 * MIB) {
        // The detector's own proof: overwriting a held file in place is seen.
        let in_place = |file: &LockedFile| file.thaw_and_wipe().unwrap();
        let shown = (0..100).any(|_| zeros_seen_while(&arena, Pages::Small, in_place) == Some(true));
        assert!(shown, "{:?}", arena.kind());
        for trial in 0..6 {
            let pages = if trial % 2 == 0 { Pages::Huge } else { Pages::Small };
            let revoke = |file: &LockedFile| {
                let how = file.revoke().unwrap();
                assert!(how == Wiped::Overwritten || modelfs::mem::can_pin().is_err(), "{how:?}");
            };
            let seen = (0..20).find_map(|_| zeros_seen_while(&arena, pages, revoke)).expect("readers that go on");
            assert!(!seen, "{:?} {pages:?}: zeros in place of data", arena.kind());
        }
    }
}

/// Not asserted, printed: `cargo test --release --test memory how_long -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn how_long_revoking_takes() {
    let _alone = alone();
    for arena in arenas(2 << 30) {
        for (len, pages) in
            [(64 * MIB, Pages::Huge), (64 * MIB, Pages::Small), (1 << 30, Pages::Huge), (1 << 30, Pages::Small)]
        {
            for _ in 0..3 {
                let file = whole(&arena, len, pages);
                file.freeze().unwrap();
                let holder = std::fs::File::from(open_again(&file));
                let started = std::time::Instant::now();
                let cut = file.cut_off(true).unwrap();
                let cut_after = started.elapsed();
                assert_eq!(holder.read_at(&mut [0; 1], 0).unwrap(), 0);
                std::thread::sleep(modelfs::mem::IN_FLIGHT_GRACE);
                let started = std::time::Instant::now();
                let how = cut.wipe();
                println!(
                    "{:?} {pages:?} {} MiB: cut off after {:.1} ms, overwritten in {:.1} ms, {how:?}",
                    arena.kind(),
                    len / MIB,
                    cut_after.as_secs_f64() * 1e3,
                    started.elapsed().as_secs_f64() * 1e3,
                );
            }
        }
    }
}

fn pages_held_by_a_pipe(file: &LockedFile) -> (OwnedFd, usize) {
    let mut ends = [0; 2];
    // SAFETY: fills the two descriptors.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: new descriptors, nobody else's.
    let [read, write] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let mut offset = 0;
    let from = file.backing().as_raw_fd();
    // SAFETY: integers, and an offset of our own.
    let held = unsafe { libc::splice(from, &mut offset, write.as_raw_fd(), std::ptr::null_mut(), 16384, 0) };
    assert!(held > 0, "{}", std::io::Error::last_os_error());
    (read, held as usize)
}

#[test]
fn revoking_ends_the_reads_of_those_who_hold_the_file() {
    let _alone = alone();
    for arena in arenas(64 * MIB) {
        let idle = whole(&arena, 3 * MIB, Pages::Huge);
        idle.freeze().unwrap();
        assert_eq!(idle.revoke().unwrap(), Wiped::Overwritten);

        let file = whole(&arena, 3 * MIB, Pages::Huge);
        file.freeze().unwrap();
        let reader = std::fs::File::from(open_again(&file));
        let mut bytes = [0u8; 64];
        assert_eq!(reader.read_at(&mut bytes, 100).unwrap(), 64);
        let how = if pins() { Wiped::Overwritten } else { Wiped::CutOff };
        assert_eq!(file.revoke().unwrap(), how);
        assert_eq!(reader.read_at(&mut bytes, 100).unwrap(), 0);
        assert_eq!(file.resident().unwrap(), 0);
    }
}

#[test]
fn a_file_dropped_while_held_is_left_to_its_holder() {
    let _alone = alone();
    for arena in arenas(64 * MIB) {
        let file = whole(&arena, MIB, Pages::Small);
        file.freeze().unwrap();
        let reader = std::fs::File::from(open_again(&file));
        drop(file);
        let mut bytes = [0u8; 256];
        reader.read_exact_at(&mut bytes, 4096).unwrap();
        assert!(bytes.iter().zip(4096..).all(|(byte, at)| *byte == pattern(at)), "a holder was shown something else");
    }
}

#[test]
fn a_secret_is_not_readable_through_proc_mem() {
    let secret = Secret::<32>::from_bytes(&mut [0x6b; 32]);
    let control = Box::new([0x6b_u8; 32]);
    let mem = std::fs::File::open("/proc/self/mem").unwrap();
    let mut seen = [0u8; 32];
    mem.read_exact_at(&mut seen, control.as_ptr().addr() as u64).expect("the way in is open for ordinary memory");
    assert_eq!(seen, *control);
    let answer = mem.read_exact_at(&mut seen, secret.expose().as_ptr().addr() as u64);
    match secret_memory().unwrap() {
        SecretMemory::MemfdSecret => {
            let errno = answer.unwrap_err().raw_os_error();
            assert!(matches!(errno, Some(libc::EIO | libc::EFAULT)), "{errno:?}");
        }
        SecretMemory::LockedPrivate => println!("no memfd_secret here: readable, as documented ({answer:?})"),
    }
}

#[test]
fn a_taken_variable_is_gone_from_proc_environ() {
    let _alone = alone();
    let mut child = in_child("take-env").env(VARIABLE, "a secret=with an equals sign").spawn().unwrap();
    assert_eq!(line_of(&mut child), "started");
    let environ = |child: &Child| std::fs::read(format!("/proc/{}/environ", child.id())).unwrap();
    assert!(contains(&environ(&child), b"a secret=with"), "the detector does not see the variable");
    go_on(&mut child);
    assert_eq!(line_of(&mut child), "taken: a secret=with an equals sign, then None");
    let after = environ(&child);
    assert!(!contains(&after, b"a secret") && !contains(&after, b"with an") && contains(&after, ROLE.as_bytes()));
    go_on(&mut child);
    assert!(child.wait().unwrap().success());
}

/// THREAT_MODEL (f) row 78: the lock limit is too low, or just high enough, without any privilege.
#[test]
fn row_78_without_privilege_the_lock_limit_decides() {
    let _alone = alone();
    for (limit, cache, expected) in [
        (64 << 10, 4 * MIB, "refused MEMLOCK, key ok"),
        (8 * MIB, 16 * MIB, "refused MEMLOCK, key ok"),
        (8 * MIB, 4 * MIB, "LockedMemfd filled 4194304, then NO_ROOM past the limit, key ok"),
    ] {
        let mut child =
            in_child("little-memlock").env("LIMIT", limit.to_string()).env("CACHE", cache.to_string()).spawn();
        let child = child.as_mut().unwrap();
        assert_eq!(line_of(child), expected, "limit {limit}, cache {cache}");
        assert!(child.wait().unwrap().success());
    }
}

/// THREAT_MODEL (f) row 78: in a user namespace the kernel refuses `noswap`, as kernels before 6.4 do everywhere.
#[test]
fn row_78_a_tmpfs_that_could_swap_is_locked() {
    let _alone = alone();
    for (cache, expected) in [(16 * MIB, "refused MEMLOCK"), (4 * MIB, "filled, 4096 KiB more locked, then 0")] {
        let mut command = in_child("tmpfs-without-noswap");
        command.env("CACHE", cache.to_string()).env("LIMIT", (8 * MIB).to_string());
        // SAFETY: between fork and exec only system calls are made: no allocation, no locks.
        unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, enter_user_namespace) };
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(err) => return println!("not run: no user namespaces here ({err})"),
        };
        assert_eq!(line_of(&mut child), expected);
        assert!(child.wait().unwrap().success());
    }
}

/// Root in a user namespace of our own: capabilities, but not over the host.
fn enter_user_namespace() -> std::io::Result<()> {
    // SAFETY: system calls on integers and constant strings.
    unsafe {
        let (user, group) = (libc::getuid(), libc::getgid());
        if user != 0 || group != 0 {
            return Err(std::io::Error::from_raw_os_error(libc::EPERM));
        }
        if libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        for (path, text) in
            [(c"/proc/self/setgroups", "deny"), (c"/proc/self/uid_map", "0 0 1"), (c"/proc/self/gid_map", "0 0 1")]
        {
            let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            if fd < 0 || libc::write(fd, text.as_ptr().cast(), text.len()) != text.len() as isize {
                return Err(std::io::Error::last_os_error());
            }
            libc::close(fd);
        }
    }
    Ok(())
}

/// THREAT_MODEL (f) row 78: a kernel without memfd_secret.
#[test]
fn row_78_without_memfd_secret_keys_are_locked() {
    let _alone = alone();
    let mut child = in_child("no-memfd-secret").spawn().unwrap();
    assert_eq!(line_of(&mut child), "LockedPrivate, 16 KiB locked, hibernation blocked: false");
    assert!(child.wait().unwrap().success());
}

/// THREAT_MODEL (f) row 77, first half: a hardened process that crashes leaves no core at all.
#[test]
fn row_77_a_crash_of_a_hardened_process_leaves_no_core() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut child = in_child("crash-hardened").current_dir(folder.path()).spawn().unwrap();
    assert_eq!(line_of(&mut child), "hardened");
    let mem = std::fs::metadata(format!("/proc/{}/mem", child.id())).unwrap();
    assert_eq!(mem.uid(), 0, "an undumpable process's files belong to root");
    go_on(&mut child);
    assert!(!child.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// THREAT_MODEL (f) row 77, second half: with a core forced on, nothing from locked memory is in it.
#[test]
fn row_77_a_forced_core_holds_no_marker_from_locked_memory() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let seed = u64::from_ne_bytes(*Secret::<8>::random().expose());
    println!("seed {seed}");
    let mut child =
        in_child("crash-with-core").env("SEED", seed.to_string()).current_dir(folder.path()).spawn().unwrap();
    let ready = line_of(&mut child);
    println!("{ready}");
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let plain = !pattern.starts_with(['|', '/']) && pattern.starts_with("core");
    if plain {
        go_on(&mut child);
        child.wait().unwrap();
    } else {
        let made = Command::new("gcore").arg("-o").arg(folder.path().join("core")).arg(child.id().to_string()).output();
        if !made.is_ok_and(|made| made.status.success()) {
            println!("not run: core_pattern is {pattern:?} and there is no gcore that works");
            child.kill().unwrap();
            child.wait().unwrap();
            return;
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let Some(core) = core_in(folder.path()) else {
        panic!("no core although it was forced on; core_pattern {pattern:?}")
    };
    let core = std::fs::read(core).unwrap();
    println!("core of {} bytes", core.len());
    for kind in Marked::PLANTED {
        assert!(contains(&core, &marker(kind, seed)), "the detector does not find {kind:?}, planted for it");
    }
    for kind in Marked::LOCKED {
        assert!(!contains(&core, &marker(kind, seed)), "{kind:?} is in the core");
    }
}

#[derive(Debug, Clone, Copy)]
enum Marked {
    Control = 1,
    Secret = 2,
    Buffer = 3,
    Filling = 4,
    Frozen = 5,
    Memfd = 6,
    /// A shared mapping like a file's, without our advice.
    SharedControl = 7,
}

impl Marked {
    const PLANTED: [Marked; 2] = [Marked::Control, Marked::SharedControl];
    const LOCKED: [Marked; 5] = [Marked::Secret, Marked::Buffer, Marked::Filling, Marked::Frozen, Marked::Memfd];
}

/// Byte `i` of the marker. The seed is chosen at run time, so that no constant of the program holds a marker.
fn marker_byte(kind: Marked, seed: u64, i: usize) -> u8 {
    let mixed = (seed ^ ((kind as u64) << 32)).wrapping_add(i as u64 + 1).wrapping_mul(0xd134_2543_de82_ef95);
    (mixed ^ (mixed >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7] | 1
}

fn marker(kind: Marked, seed: u64) -> Vec<u8> {
    (0..24).map(|i| marker_byte(kind, seed, i)).collect()
}

/// Writes the marker byte by byte, so that no copy of it is left on a stack.
fn plant(kind: Marked, seed: u64, place: &mut [u8]) {
    for (i, byte) in place.iter_mut().take(24).enumerate() {
        // SAFETY: a valid exclusive reference.
        unsafe { std::ptr::write_volatile(byte, marker_byte(kind, seed, i)) };
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let first = needle[0];
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|byte| *byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

fn core_in(folder: &Path) -> Option<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).next()
}

fn in_child(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(ROLE, role);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// The next line that the child says (its test harness says others).
fn line_of(child: &mut Child) -> String {
    let out = child.stdout.as_mut().unwrap();
    // One byte at a time: what follows the line is for the next call.
    let mut line = Vec::new();
    let mut byte = [0];
    while out.read(&mut byte).unwrap() == 1 {
        if byte[0] != b'\n' {
            line.push(byte[0]);
        } else if let Some(said) = String::from_utf8_lossy(&line).split_once("child: ") {
            return said.1.to_owned();
        } else {
            line.clear();
        }
    }
    panic!("the child ended without a word: {:?}", child.wait());
}

fn go_on(child: &mut Child) {
    child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
}

fn say(line: &str) {
    println!("child: {line}");
    std::io::stdout().flush().unwrap();
}

fn wait_for_parent() {
    BufReader::new(std::io::stdin()).lines().next();
}

/// Not a test of its own: what the tests above start in a process of its own.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    match role.as_str() {
        "map-and-close" => child_maps_and_closes(),
        "take-env" => child_takes_env(),
        "little-memlock" => child_with_little_memlock(),
        "tmpfs-without-noswap" => child_with_a_tmpfs_that_could_swap(),
        "no-memfd-secret" => child_without_memfd_secret(),
        "crash-hardened" => {
            harden().unwrap();
            say("hardened");
            wait_for_parent();
            std::process::abort();
        }
        "crash-with-core" => child_crashes_with_core(),
        other => panic!("no role {other}"),
    }
}

fn child_maps_and_closes() {
    let prot = libc::PROT_READ;
    // SAFETY: a new mapping of standard input, which is the file; then the only descriptor of it goes.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, 0, 0);
        assert_ne!(at, libc::MAP_FAILED);
        assert_eq!(at.cast::<u8>().read_volatile(), pattern(0));
        libc::close(0);
    }
    say("mapped");
    loop {
        std::thread::park();
    }
}

fn child_takes_env() {
    say("started");
    wait_for_parent();
    let value = take_env(VARIABLE).unwrap().unwrap();
    let again = take_env(VARIABLE).unwrap();
    say(&format!("taken: {}, then {again:?}", String::from_utf8_lossy(&value)));
    wait_for_parent();
}

fn number(name: &str) -> u64 {
    std::env::var(name).unwrap().parse().unwrap()
}

fn child_with_little_memlock() {
    let limit = number("LIMIT");
    let cache = number("CACHE");
    drop_all_capabilities();
    set_memlock(limit);
    assert_eq!(memlock_limit(), Some(limit));
    assert!(!has_cap_sys_admin());
    let key = || if Secret::<32>::random().ct_eq(&[0; 32]) { "key zero" } else { "key ok" };
    let arena = match Arena::open(ArenaPlan { bytes: cache }) {
        Ok(arena) => arena,
        Err(err) => {
            for part in [limit.to_string(), "ulimit -l".into(), "LimitMEMLOCK=".into(), "--ulimit memlock".into()] {
                assert!(err.message().contains(&part), "{part} is missing from: {}", err.message());
            }
            return say(&format!("refused {}, {}", err.code(), key()));
        }
    };
    assert!(!arena.passthrough_capable());
    let file = whole(&arena, cache, Pages::Huge);
    assert_filled(&file);
    // A cache that takes more than its plan meets the limit as an error.
    let more = arena.create(2 * limit, Pages::Small).unwrap();
    // SAFETY: one thread.
    let err = unsafe { more.slot(0..2 * limit) }.unwrap_err();
    say(&format!("{:?} filled {}, then {} past the limit, {}", arena.kind(), file.len(), err.code(), key()));
}

fn set_memlock(limit: u64) {
    let rlimit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: a valid rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &rlimit) }, 0);
}

/// KiB that the kernel counts as locked for this process.
fn locked_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn child_with_a_tmpfs_that_could_swap() {
    set_memlock(number("LIMIT"));
    assert!(!has_cap_sys_admin(), "root of a user namespace is not root of the host");
    let cache = number("CACHE");
    let arena = match Arena::open_kind(ArenaPlan { bytes: cache }, ArenaKind::DetachedTmpfs) {
        Ok(arena) => arena,
        Err(err) => return say(&format!("refused {}", err.code())),
    };
    assert!(!arena.passthrough_capable());
    let before = locked_kib();
    let file = whole(&arena, cache, Pages::Huge);
    let filled = locked_kib() - before;
    file.freeze().unwrap();
    assert_filled(&file);
    assert_eq!(locked_kib() - before, filled, "frozen pages are no longer locked");
    file.thaw_and_wipe().unwrap();
    say(&format!("filled, {filled} KiB more locked, then {}", locked_kib() - before));
}

fn child_without_memfd_secret() {
    let step = |code: u32, k, jt, jf| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_memfd_secret as u32, 0, 1),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32, 0, 0),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: a valid program that outlives the calls.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter, 0, 0), 0);
    }
    let before = locked_kib();
    let hardening = harden().unwrap();
    assert!(!Secret::<32>::random().ct_eq(&[0; 32]));
    let (locked, blocked) = (locked_kib() - before, hardening.hibernation_blocked);
    say(&format!("{:?}, {locked} KiB locked, hibernation blocked: {blocked}", hardening.secret_memory));
}

fn drop_all_capabilities() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let none = [0u32; 6];
    // SAFETY: version 3 of the interface reads a header and two sets of three words, which both are.
    assert_eq!(unsafe { libc::syscall(libc::SYS_capset, &header, none.as_ptr()) }, 0);
}

fn child_crashes_with_core() {
    let seed = number("SEED");
    let mut control = vec![0u8; 64];
    plant(Marked::Control, seed, &mut control);
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping of a page, ours alone.
    let shared = unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        std::slice::from_raw_parts_mut(at.cast::<u8>(), 4096)
    };
    plant(Marked::SharedControl, seed, shared);
    let secret = Secret::<32>::filled_by(|bytes| {
        plant(Marked::Secret, seed, bytes);
        Ok(())
    });
    let mut buffer = LockedBuf::new(4096).unwrap();
    plant(Marked::Buffer, seed, &mut buffer);
    let mut files = Vec::new();
    for arena in arenas(4 * MIB) {
        for freeze in [false, true] {
            let file = arena.create(MIB, Pages::Small).unwrap();
            let kind = match (arena.kind(), freeze) {
                (ArenaKind::LockedMemfd, _) => Marked::Memfd,
                (ArenaKind::DetachedTmpfs, false) => Marked::Filling,
                (ArenaKind::DetachedTmpfs, true) => Marked::Frozen,
            };
            // SAFETY: one thread.
            plant(kind, seed, unsafe { file.slot(0..MIB).unwrap() });
            if freeze {
                file.freeze().unwrap();
                // SAFETY: filled. Touched, so that the read-only mapping has the page.
                assert_eq!(unsafe { file.bytes(0..1) }[0], marker_byte(kind, seed, 0));
            }
            files.push(file);
        }
    }
    // The debugger's default leaves shared mappings out; everything that a filter can switch on is on.
    std::fs::write("/proc/self/coredump_filter", "0x7f").unwrap();
    let all = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    let mut hard = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: valid rlimits of our own; prctl takes integers.
    unsafe {
        if libc::setrlimit(libc::RLIMIT_CORE, &all) != 0 {
            libc::getrlimit(libc::RLIMIT_CORE, &mut hard);
            hard.rlim_cur = hard.rlim_max;
            libc::setrlimit(libc::RLIMIT_CORE, &hard);
        }
        assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0), 0);
    }
    say(&format!("{} files, secret memory {:?}", files.len(), secret_memory().unwrap()));
    wait_for_parent();
    std::hint::black_box((&control, &shared, &secret, &buffer, &files));
    std::process::abort();
}

/// The descriptor is the borrowed one for as long as the file lives.
#[test]
fn the_backing_descriptor_is_one_and_stays() {
    for arena in arenas(8 * MIB) {
        let file = whole(&arena, 4096, Pages::Small);
        file.freeze().unwrap();
        let fd = file.backing().as_fd().as_raw_fd();
        file.thaw_and_wipe().unwrap();
        assert_eq!(file.backing().as_raw_fd(), fd);
    }
}

/// `cargo test --release --test memory -- --ignored --nocapture how_fast`: rates for docs/PERFORMANCE.md.
#[test]
#[ignore = "measures, and needs 2 GiB of memory"]
fn how_fast_files_fill_freeze_and_wipe() {
    let source = vec![0x5a_u8; 8 * MIB as usize];
    for arena in arenas(1100 * MIB) {
        for pages in [Pages::Huge, Pages::Small] {
            for round in 0..3 {
                let file = arena.create(1024 * MIB, pages).unwrap();
                let clock = std::time::Instant::now();
                let (mut allocate, mut at) = (0.0, 0);
                while at < file.len() {
                    let before = clock.elapsed();
                    // SAFETY: one thread, one slot at a time.
                    let slot = unsafe { file.slot(at..at + 8 * MIB).unwrap() };
                    allocate += (clock.elapsed() - before).as_secs_f64();
                    slot.copy_from_slice(&source);
                    at += 8 * MIB;
                }
                let fill = clock.elapsed().as_secs_f64();
                let short = file.huge_pages_short().unwrap();
                let part = {
                    let clock = std::time::Instant::now();
                    file.wipe(0..256 * MIB).unwrap();
                    let wiped = clock.elapsed().as_secs_f64();
                    // SAFETY: as above.
                    unsafe { file.slot(0..256 * MIB).unwrap().fill(1) };
                    wiped * 4.0
                };
                let clock = std::time::Instant::now();
                file.freeze().unwrap();
                let freeze = clock.elapsed().as_secs_f64();
                let clock = std::time::Instant::now();
                file.thaw_and_wipe().unwrap();
                let wipe = clock.elapsed().as_secs_f64();
                println!(
                    "{:?} {pages:?} round {round}: fill {:.2} GB/s (allocate alone {:.0} ms), partial wipe {:.0} ms/GiB, \
                     freeze {:.2} ms, end {:.0} ms/GiB, {} MiB in small pages",
                    arena.kind(),
                    file.len() as f64 / 1e9 / fill,
                    allocate * 1e3,
                    part * 1e3,
                    freeze * 1e3,
                    wipe * 1e3,
                    short / MIB,
                );
            }
        }
    }
}
