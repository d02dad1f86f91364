//! Plaintext never lands on a disk: a random marker in the model is searched for everywhere while it is mounted and read,
//! after `kill -9` and after an unmount, in files, in a whole block device, in swap and in core dumps.
//!
//! Everything the program touches (store, state, temporary files, swap, cores) lies on one ext4 image of the test's own,
//! which is searched raw, free space and journal included; on all other file systems every file changed since the start
//! is searched. `MODELFS_TEST_CANARY_DEVICES=1` searches every block device raw as well (minutes).
//! The detector first finds planted copies.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/needle.rs"]
mod needle;
#[path = "common/program.rs"]
mod program;

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use fixture::Random;
use needle::{MARKER_BYTES, Needle};
use program::{Program, can_mount, run_ok, skip};

/// The test's own disk: an ext4 image on a loop device.
struct Disk {
    image: tempfile::TempDir,
    root: PathBuf,
}

impl Disk {
    fn new() -> Disk {
        let image = tempfile::tempdir().expect("a temporary folder");
        let file = image.path().join("disk.img");
        File::create(&file).expect("image").set_len(768 << 20).expect("image size");
        run_ok(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(&file));
        let root = image.path().join("root");
        fs::create_dir(&root).expect("mkdir");
        run_ok(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&root));
        Disk { image, root }
    }

    /// Everything written so far is in the image afterwards.
    fn sync(&self) -> PathBuf {
        let file = File::open(&self.root).expect("root");
        // SAFETY: an open descriptor.
        assert_eq!(unsafe { libc::syncfs(std::os::fd::AsRawFd::as_raw_fd(&file)) }, 0);
        self.image.path().join("disk.img")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(self.root.join("swap")).stderr(Stdio::null()).status();
        let _ = Command::new("umount").arg("-l").arg(&self.root).status();
    }
}

/// Where else the marker is: every changed file of every real file system, deleted but open files, block devices.
struct Search {
    since: SystemTime,
    /// Not searched: the mount itself (it shows the model, that is its purpose).
    except: Vec<PathBuf>,
}

impl Search {
    fn finds(&self, needle: &Needle) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut devices = HashSet::new();
        for (device, place, kind) in mounts() {
            let disk = !matches!(
                kind.as_str(),
                "proc"
                    | "sysfs"
                    | "devpts"
                    | "cgroup"
                    | "cgroup2"
                    | "devtmpfs"
                    | "mqueue"
                    | "debugfs"
                    | "tracefs"
                    | "bpf"
                    | "securityfs"
                    | "pstore"
                    | "binfmt_misc"
                    | "autofs"
            );
            if disk && !kind.starts_with("fuse") {
                self.walk(&place, fs::metadata(&place).map(|m| m.dev()).unwrap_or(0), needle, &mut found);
            }
            if device.starts_with("/dev/") && std::env::var_os("MODELFS_TEST_CANARY_DEVICES").is_some() {
                devices.insert(device);
            }
        }
        found.extend(devices.into_iter().map(PathBuf::from).filter(|device| needle.is_in_file(device)));
        found
    }

    fn walk(&self, folder: &Path, device: u64, needle: &Needle, found: &mut Vec<PathBuf>) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.dev() != device || self.except.iter().any(|except| path.starts_with(except)) {
                continue;
            }
            if meta.is_dir() {
                self.walk(&path, device, needle, found);
            } else if meta.is_file() && changed(&meta) >= self.since && needle.is_in_file(&path) {
                found.push(path);
            }
        }
    }
}

fn changed(meta: &fs::Metadata) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::new(meta.ctime().max(0) as u64, meta.ctime_nsec() as u32)
}

/// (device, place, type) of every mount.
fn mounts() -> Vec<(String, PathBuf, String)> {
    let table = fs::read_to_string("/proc/self/mounts").expect("the mount table");
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').map(str::to_owned);
            Some((fields.next()?, fields.next()?.into(), fields.next()?))
        })
        .collect()
}

/// Asks the kernel to page out everything a process has; what can go to swap goes there.
fn page_out(pid: u32) {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    // SAFETY: a system call on a process descriptor; ranges that cannot be paged out only answer an error.
    unsafe {
        let target = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(target >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
        for line in maps.lines() {
            let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) else { continue };
            let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16)) else {
                continue;
            };
            let range = libc::iovec { iov_base: start as *mut libc::c_void, iov_len: end - start };
            libc::syscall(libc::SYS_process_madvise, target, &range, 1usize, libc::MADV_PAGEOUT, 0usize);
        }
        libc::close(target as i32);
    }
}

/// Restores the machine's setting when dropped.
struct CorePattern(String);

impl CorePattern {
    fn into_folder(folder: &Path) -> CorePattern {
        let before = fs::read_to_string("/proc/sys/kernel/core_pattern").expect("core_pattern");
        fs::write("/proc/sys/kernel/core_pattern", format!("{}/core.%p", folder.display())).expect("root sets it");
        CorePattern(before)
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        let _ = fs::write("/proc/sys/kernel/core_pattern", &self.0);
    }
}

/// Not a test of its own: run as a child. Maps the file named in the environment, looks at every byte, dumps core.
#[test]
#[ignore = "the child of the canary test"]
fn child_that_maps_and_dumps_core() {
    let Some(path) = std::env::var_os("CANARY_MAP") else { return };
    let file = File::open(path).expect("open");
    let len = file.metadata().expect("stat").len() as usize;
    // SAFETY: a fresh map of an open file, only read.
    let sum = unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ,
            libc::MAP_SHARED,
            std::os::fd::AsRawFd::as_raw_fd(&file),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        let bytes = std::slice::from_raw_parts(at.cast::<u8>(), len);
        bytes.iter().fold(0u64, |sum, byte| sum.wrapping_add(u64::from(*byte)))
    };
    assert_ne!(sum, 0);
    let copy = std::env::var_os("CANARY_COPY").map(|_| {
        // The control: what a program copies into its own memory is in its core.
        let mut copy = vec![0; len];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut copy, 0).expect("read");
        copy
    });
    // SAFETY: limits of this process only; then the end.
    unsafe {
        let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        assert_eq!(libc::setrlimit(libc::RLIMIT_CORE, &unlimited), 0, "{}", std::io::Error::last_os_error());
        std::hint::black_box(&copy);
        libc::abort();
    }
}

fn core_of_reader(folder: &Path, map: &Path, copy: bool) -> PathBuf {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--ignored", "--exact", "child_that_maps_and_dumps_core", "--test-threads=1"]);
    command.env("CANARY_MAP", map).current_dir(folder).stdout(Stdio::null()).stderr(Stdio::null());
    if copy {
        command.env("CANARY_COPY", "1");
    }
    let child = command.spawn().expect("child");
    let core = folder.join(format!("core.{}", child.id()));
    let status = child.wait_with_output().expect("child").status;
    assert!(status.core_dumped(), "the reader must dump core: {status}");
    assert!(core.exists(), "{}", core.display());
    core
}

#[test]
fn the_marker_is_found_nowhere_but_in_living_memory() {
    if !can_mount() {
        return;
    }
    let since = SystemTime::now() - Duration::from_secs(2);
    let mut random = Random(u64::from_le_bytes(std::array::from_fn(|i| {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos().to_le_bytes()[i]
    })));
    let disk = Disk::new();
    let swap = disk.root.join("swap");
    let swapping = make_swap(&disk, &swap);
    // This process holds the marker too, and must not be the one that brings it to swap.
    // SAFETY: a system call on this process alone.
    assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) }, 0);
    let marker: [u8; MARKER_BYTES] = random.bytes(MARKER_BYTES).try_into().expect("64");
    let needle = Needle::new(marker);
    let mut search = Search { since, except: Vec::new() };

    // The detector finds what is planted: in a file, in a deleted file's blocks, across a window's edge.
    let planted: [u8; MARKER_BYTES] = random.bytes(MARKER_BYTES).try_into().expect("64");
    let plant = Needle::new(planted);
    let mut bytes = random.bytes((4 << 20) + 100_000);
    bytes[(4 << 20) - 30..][..MARKER_BYTES].copy_from_slice(&planted);
    let file = disk.root.join("planted");
    fs::write(&file, &bytes).expect("plant");
    let mut found = search.finds(&plant);
    // The kernel may have written it to the disk already, which is a file as well.
    found.retain(|path| !path.ends_with("disk.img"));
    assert_eq!(found, std::slice::from_ref(&file));
    let image = disk.sync();
    fs::remove_file(&file).expect("remove");
    assert!(plant.is_in_file(&image), "a deleted file's blocks are searched");

    // The plaintext's only home before sealing is memory.
    let source = tempfile::Builder::new().prefix("canary").tempdir_in("/dev/shm").expect("a folder in memory");
    let mut weights = random.bytes((24 << 20) + 777);
    for at in (100..weights.len() - MARKER_BYTES).step_by(200_000) {
        weights[at..at + MARKER_BYTES].copy_from_slice(&marker);
    }
    let mut config = random.bytes(3000);
    config[1000..1000 + MARKER_BYTES].copy_from_slice(&marker);
    fs::write(source.path().join("model.safetensors"), &weights).expect("write");
    fs::write(source.path().join("config.json"), &config).expect("write");

    let program = Program::in_folder(&disk.root);
    program.seal(source.path(), "canary");
    drop(source);
    assert!(needle.is_in(&weights), "the marker is in the model");

    let cores = disk.root.join("cores");
    fs::create_dir(&cores).expect("mkdir");
    let pattern = CorePattern::into_folder(&cores);
    if swapping {
        // Only now: the plain source is gone from memory that could be swapped.
        run_ok(Command::new("swapon").arg(&swap));
    }

    for (open, end) in [("whole", End::Kill), ("lazy", End::Kill), ("auto", End::Unmount)] {
        let mount = program.mount(&["--open", open, "--cache", "128MiB"]);
        search.except = vec![program.mountpoint().to_owned()];
        let model = program.mountpoint().join("canary/model.safetensors");
        assert!(fs::read(&model).expect("read") == weights);
        assert!(fs::read(program.mountpoint().join("canary/config.json")).expect("read") == config);

        let core = core_of_reader(&cores, &model, false);
        assert!(!needle.is_in_file(&core), "a reader's core holds mapped plaintext ({open})");
        fs::remove_file(core).expect("remove");
        if swapping {
            page_out(mount.pid());
        }
        nothing_found(&search, &needle, &disk, &format!("while mounted with --open {open}"));

        match end {
            End::Kill => {
                // First the signal that would dump core, if anything could.
                mount.signal(if open == "whole" { libc::SIGABRT } else { libc::SIGKILL });
                mount.wait_dead();
                let _ = Command::new("umount").arg("-l").arg(program.mountpoint()).status();
                assert_eq!(fs::read_dir(&cores).expect("list").count(), 0, "the daemon dumped core");
            }
            End::Unmount => mount.unmount(),
        }
        nothing_found(&search, &needle, &disk, &format!("after the end of --open {open}"));
    }

    // Last, because it does write the marker to the disk: a core of a reader that copied it is found.
    let mount = program.mount(&["--open", "lazy", "--cache", "128MiB"]);
    let core = core_of_reader(&cores, &program.mountpoint().join("canary/model.safetensors"), true);
    assert!(needle.is_in_file(&core), "the detector misses a copy in a core");
    mount.unmount();
    drop(pattern);
}

#[derive(Clone, Copy)]
enum End {
    Kill,
    Unmount,
}

/// Swap on the test's own disk; with a proof that paging out lands there.
fn make_swap(disk: &Disk, swap: &Path) -> bool {
    fs::write(swap, vec![0; 128 << 20]).expect("swap file");
    run_ok(Command::new("chmod").arg("600").arg(swap));
    run_ok(Command::new("mkswap").arg("-q").arg(swap).stdout(Stdio::null()));
    if !Command::new("swapon").arg(swap).status().expect("swapon").success() {
        skip("this machine does not let us swap");
        return false;
    }
    let planted: [u8; MARKER_BYTES] = Random(99).bytes(MARKER_BYTES).try_into().expect("64");
    // A page of its own, written, paged out by the same call that is used on the daemon.
    let mut page = vec![0u8; 1 << 20];
    for at in (0..page.len() - MARKER_BYTES).step_by(4096) {
        page[at + 64..at + 64 + MARKER_BYTES].copy_from_slice(&planted);
    }
    let needle = Needle::new(planted);
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        page_out(std::process::id());
        // In the image, not in the file: swapping goes past the file system's own cache, and comes when it comes.
        if needle.is_in_file(&disk.sync()) {
            break;
        }
        assert!(Instant::now() < deadline, "paged-out memory is searched");
    }
    std::hint::black_box(&page);
    run_ok(Command::new("swapoff").arg(swap));
    true
}

fn nothing_found(search: &Search, needle: &Needle, disk: &Disk, when: &str) {
    let found = search.finds(needle);
    assert!(found.is_empty(), "{when}: the marker is in {found:?}");
    let image = disk.sync();
    assert!(!needle.is_in_file(&image), "{when}: the marker is on the raw disk (free space or journal)");
}
