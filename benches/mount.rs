//! What a program sees: one large file, read in five ways, warm and cold, through our mount and through others.
//!
//! Each measurement is a process of its own (this binary again), as a loader is; the clock runs from before `open` to
//! after the last byte, so an open that waits counts. Contenders alternate, in another order every round. Every mapped
//! read adds up the whole file, and the sum is checked: a fast wrong answer is no answer.
//!
//! Cold means: a fresh mount for every measurement, nothing decrypted anywhere. "disk": the kernel's caches were dropped
//! just before; "cached": the stored ciphertext is in the page cache, so that what is measured is the filesystem and not
//! the disk. The same holds for every contender.
//! `cargo bench --bench mount -- [--size-mib N] [--rounds N] [--dir PATH] [--json PATH] [--no-peers]`, or benches/run.sh.

mod common;
#[path = "../tests/common/mounted.rs"]
mod mounted;
/// What `mounted` asks of its neighbour.
mod fixture {
    pub use super::common::NAME;
}

use std::ffi::CString;
use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{FILE, Options, Results, Sealed, warm_memory};
use modelfs::crypto::Verify;
use modelfs::format::{HashAlg, Suite};
use modelfs::fuse::{Behaviour, OpenPolicy};
use modelfs::store::local::LocalStore;
use mounted::{How, Mounted};

const PIECE: usize = 1 << 20;

/// The ways of reading; the name is also the column.
const WAYS: [&str; 5] = ["read 1 MiB", "mmap sum", "mmap copy", "O_DIRECT 1 MiB", "random 4 KiB"];
const WHOLE_FILE: [&str; 4] = ["read 1 MiB", "mmap sum", "mmap copy", "O_DIRECT 1 MiB"];

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let [_, flag, way, path, count] = words.as_slice()
        && flag == "--client"
    {
        return client(way, Path::new(path), count.parse().expect("a number"));
    }
    let options = Options::parse();
    if !mounted::can_mount() {
        return;
    }
    Bed::prepare(&options).run(&options);
}

// ---- the reading program ------------------------------------------------------------------------------------------------

/// Reads `path` in one way and prints `seconds bytes sum processor-seconds`. benches/peers asks it too, by that line.
fn client(way: &str, path: &Path, count: u64) {
    let buffer = warm_memory(PIECE);
    let own = way == "memcpy";
    // Made before the clock starts: the source of the plain copy.
    let memory: &[u8] = if own { warm_memory(count as usize) } else { &[] };
    let cpu = common::cpu_time();
    let start = Instant::now();
    let (bytes, sum) = match way {
        "memcpy" => {
            memory.chunks(PIECE).for_each(|piece| copy(piece, buffer));
            (memory.len() as u64, 0)
        }
        "read 1 MiB" => (read_all(&File::open(path).expect("open"), buffer), 0),
        "O_DIRECT 1 MiB" => {
            let opened = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
            (read_all(&opened.expect("open"), buffer), 0)
        }
        "mmap sum" => {
            let map = map(path);
            (map.len() as u64, common::sum_words(map))
        }
        "mmap copy" => {
            let map = map(path);
            map.chunks(PIECE).for_each(|piece| copy(piece, buffer));
            (map.len() as u64, 0)
        }
        "first byte" => {
            let file = File::open(path).expect("open");
            (read_at(&file, &mut buffer[..4096], 0) as u64, 0)
        }
        "random 4 KiB" => {
            let file = File::open(path).expect("open");
            let pages = file.metadata().expect("stat").len() / 4096;
            let mut bytes = 0;
            for i in 0..count {
                let page = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) % pages;
                bytes += read_at(&file, &mut buffer[..4096], page * 4096) as u64;
            }
            (bytes, 0)
        }
        other => panic!("no way to read called {other}"),
    };
    let took = start.elapsed().as_secs_f64();
    println!("{took} {bytes} {sum} {}", (common::cpu_time() - cpu).as_secs_f64());
}

fn copy(piece: &[u8], buffer: &mut [u8]) {
    buffer[..piece.len()].copy_from_slice(piece);
    black_box(buffer);
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> usize {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset).expect("read")
}

fn read_all(file: &File, buffer: &mut [u8]) -> u64 {
    let mut offset = 0;
    loop {
        match read_at(file, buffer, offset) {
            0 => return offset,
            got => offset += got as u64,
        }
    }
}

fn map(path: &Path) -> &'static [u8] {
    let file = File::open(path).expect("open");
    let len = file.metadata().expect("stat").len() as usize;
    // SAFETY: a fresh read-only map of a file that nobody changes; it lives as long as this process.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        std::slice::from_raw_parts(at.cast(), len)
    }
}

struct Seen {
    seconds: f64,
    bytes: u64,
    sum: u64,
    cpu: f64,
}

fn ask(way: &str, path: &Path, count: u64) -> Seen {
    let program = std::env::current_exe().expect("this binary");
    let out = Command::new(program).args(["--client", way]).arg(path).arg(count.to_string()).output().expect("client");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let fields: Vec<&str> = text.split_whitespace().collect();
    let [seconds, bytes, sum, cpu] = fields[..] else {
        panic!("reading {} ({way}): {}", path.display(), String::from_utf8_lossy(&out.stderr));
    };
    let number = |text: &str| text.parse::<f64>().expect("a number");
    Seen {
        seconds: number(seconds),
        bytes: bytes.parse().expect("a number"),
        sum: sum.parse().expect("a number"),
        cpu: number(cpu),
    }
}

// ---- the contenders -----------------------------------------------------------------------------------------------------

/// How one of them is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Memcpy,
    TmpfsSmall,
    TmpfsHuge,
    Passthrough,
    Plain,
    OwnAuto,
    OwnWhole,
    OwnAead,
    Rclone,
    Gocryptfs,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::Memcpy => "memcpy",
            Who::TmpfsSmall => "tmpfs (4 KiB pages)",
            Who::TmpfsHuge => "tmpfs huge=always",
            Who::Passthrough => "modelfs",
            Who::Plain => "modelfs, no passthrough",
            Who::OwnAuto => "modelfs, open=auto",
            Who::OwnWhole => "modelfs, open=whole",
            Who::OwnAead => "modelfs, open=whole aead",
            Who::Rclone => "rclone crypt",
            Who::Gocryptfs => "gocryptfs",
        }
    }
}

/// Something mounted: where its file is, and how it goes away.
enum Live {
    Folder(PathBuf),
    Own(Box<Mounted>),
    Helper { folder: PathBuf, process: Option<Child> },
}

impl Live {
    fn file(&self) -> PathBuf {
        match self {
            Live::Folder(folder) => folder.join(FILE),
            Live::Own(mounted) => mounted.path(FILE),
            Live::Helper { folder, .. } => folder.join(FILE),
        }
    }

    fn end(self) {
        match self {
            Live::Folder(_) => {}
            Live::Own(mounted) => {
                let report = mounted.unmount();
                assert_eq!(report.held_objects, 0, "the reading processes have ended");
            }
            Live::Helper { folder, process } => {
                unmount(&folder);
                if let Some(mut process) = process {
                    process.wait().expect("the helper ends with its mount");
                }
            }
        }
    }
}

/// A mount table entry that goes away with the bench, also when it panics.
struct TmpfsMount(PathBuf);

impl TmpfsMount {
    fn new(folder: PathBuf, huge: &str, size: u64) -> TmpfsMount {
        std::fs::create_dir(&folder).expect("folder");
        let path = CString::new(folder.as_os_str().as_bytes()).expect("no NUL");
        let data = CString::new(format!("huge={huge},size={},mode=0700", size + (16 << 20))).expect("no NUL");
        // SAFETY: NUL-terminated strings that outlive the call.
        let ret = unsafe { libc::mount(c"bench".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, data.as_ptr().cast()) };
        assert_eq!(ret, 0, "mounting a tmpfs: {}", std::io::Error::last_os_error());
        TmpfsMount(folder)
    }
}

impl Drop for TmpfsMount {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

fn unmount(folder: &Path) {
    let path = CString::new(folder.as_os_str().as_bytes()).expect("no NUL");
    for _ in 0..100 {
        // SAFETY: a NUL-terminated string.
        if unsafe { libc::umount2(path.as_ptr(), libc::UMOUNT_NOFOLLOW) } == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    eprintln!("{} stays mounted: {}", folder.display(), std::io::Error::last_os_error());
}

struct Bed {
    folder: tempfile::TempDir,
    small: TmpfsMount,
    huge: TmpfsMount,
    sealed: Arc<Sealed>,
    local: LocalStore,
    peers: Vec<Who>,
}

impl Bed {
    fn prepare(options: &Options) -> Bed {
        let folder = tempfile::tempdir_in(&options.dir).expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        let small = TmpfsMount::new(at("tmpfs-small"), "never", options.size);
        let huge = TmpfsMount::new(at("tmpfs-huge"), "always", options.size);
        let local = LocalStore::open(&at("store")).expect("store");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let mut copies = [&small, &huge].map(|mount| File::create(mount.0.join(FILE)).expect("a file on the tmpfs"));
        let sealed = runtime.block_on(Sealed::new(&local, options.size, Suite::Aes256Gcm, HashAlg::Blake3, |bytes| {
            copies.iter_mut().for_each(|copy| copy.write_all(bytes).expect("room on the tmpfs"));
        }));
        let mut bed = Bed { folder, small, huge, sealed: Arc::new(sealed), local, peers: Vec::new() };
        if options.peers {
            bed.prepare_peers();
        }
        bed
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn plain(&self) -> PathBuf {
        self.small.0.join(FILE)
    }

    /// Copies the file into an rclone crypt remote and into a gocryptfs folder, where the program is there.
    fn prepare_peers(&mut self) {
        let has = |program: &str| {
            let found =
                Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
            if !found {
                println!("{program} is not installed and is left out");
            }
            found
        };
        if has("rclone") {
            std::fs::create_dir(self.at("rclone-store")).expect("folder");
            std::fs::create_dir(self.at("rclone-mount")).expect("folder");
            let copied = self.rclone().arg("copy").arg(self.plain()).arg("sec:").status().expect("rclone");
            assert!(copied.success(), "rclone copy");
            self.peers.push(Who::Rclone);
        }
        if has("gocryptfs") {
            std::fs::create_dir(self.at("gocryptfs-store")).expect("folder");
            std::fs::create_dir(self.at("gocryptfs-mount")).expect("folder");
            std::fs::write(self.at("pass"), "bench\n").expect("pass");
            let made = self.gocryptfs().args(["-init", "-scryptn", "10"]).arg(self.at("gocryptfs-store")).status();
            assert!(made.expect("gocryptfs").success(), "gocryptfs -init");
            let mounted = self.gocryptfs().arg(self.at("gocryptfs-store")).arg(self.at("gocryptfs-mount")).status();
            assert!(mounted.expect("gocryptfs").success(), "gocryptfs");
            std::fs::copy(self.plain(), self.at("gocryptfs-mount").join(FILE)).expect("copy into gocryptfs");
            unmount(&self.at("gocryptfs-mount"));
            self.peers.push(Who::Gocryptfs);
        }
    }

    fn rclone(&self) -> Command {
        let pass = Command::new("rclone").args(["obscure", "bench"]).output().expect("rclone").stdout;
        let mut command = Command::new("rclone");
        command
            .env("RCLONE_CONFIG", "/dev/null")
            .env("RCLONE_CONFIG_SEC_TYPE", "crypt")
            .env("RCLONE_CONFIG_SEC_REMOTE", self.at("rclone-store"))
            .env("RCLONE_CONFIG_SEC_PASSWORD", String::from_utf8_lossy(&pass).trim())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    fn gocryptfs(&self) -> Command {
        let mut command = Command::new("gocryptfs");
        // It speaks of a missing syslog each time; what matters is its exit status.
        command.args(["-q", "-passfile"]).arg(self.at("pass")).stderr(Stdio::null());
        command
    }

    fn live(&self, who: Who) -> Live {
        let own = |open, verify, passthrough: bool| {
            let behaviour = Behaviour { open, ..Behaviour::default() };
            let budget = self.sealed.layout.plain_len() * 2 + (64 << 20);
            let how = How { budget, behaviour, ..How::default() };
            let (sealed, local) = (self.sealed.clone(), self.local.clone());
            let mounted = Mounted::new(how, || sealed.model(Arc::new(local), verify));
            if !passthrough {
                mounted.fs.set_passthrough(false);
            }
            Live::Own(Box::new(mounted))
        };
        match who {
            Who::Memcpy => Live::Folder(PathBuf::from("/")),
            Who::TmpfsSmall => Live::Folder(self.small.0.clone()),
            Who::TmpfsHuge => Live::Folder(self.huge.0.clone()),
            Who::Passthrough | Who::OwnWhole => own(OpenPolicy::Whole, Verify::Strict, true),
            Who::OwnAead => own(OpenPolicy::Whole, Verify::Aead, true),
            Who::OwnAuto => own(OpenPolicy::Auto, Verify::Strict, true),
            Who::Plain => own(OpenPolicy::Lazy, Verify::Strict, false),
            Who::Rclone => {
                let folder = self.at("rclone-mount");
                let process =
                    self.rclone().args(["mount", "sec:", "--read-only"]).arg(&folder).spawn().expect("rclone");
                let deadline = Instant::now() + Duration::from_secs(20);
                while !folder.join(FILE).exists() {
                    assert!(Instant::now() < deadline, "rclone did not mount within 20 s");
                    std::thread::sleep(Duration::from_millis(20));
                }
                Live::Helper { folder, process: Some(process) }
            }
            Who::Gocryptfs => {
                let folder = self.at("gocryptfs-mount");
                let mounted = self.gocryptfs().arg("-ro").arg(self.at("gocryptfs-store")).arg(&folder).status();
                assert!(mounted.expect("gocryptfs").success(), "gocryptfs");
                Live::Helper { folder, process: None }
            }
        }
    }

    fn run(&self, options: &Options) {
        let mut results = Results::default();
        self.warm(options, &mut results);
        self.cold(options, &mut results);
        self.report(options, &mut results);
    }

    fn warm(&self, options: &Options, results: &mut Results) {
        let mut contenders = vec![Who::Memcpy, Who::TmpfsSmall, Who::TmpfsHuge, Who::Passthrough, Who::Plain];
        contenders.extend(&self.peers);
        let live: Vec<(Who, Live)> = contenders.iter().map(|&who| (who, self.live(who))).collect();
        for (who, live) in &live {
            if *who != Who::Memcpy {
                // Twice: our own file becomes hot with the first open, whatever is cached is then cached.
                ask("read 1 MiB", &live.file(), 0);
                ask("read 1 MiB", &live.file(), 0);
            }
            if let (Who::Passthrough, Live::Own(mounted)) = (who, live) {
                let short = mounted.cache.object(&mounted.fs.vfs().models()[0], 0, true);
                let generation = short.promise_hot().unwrap_or(0);
                let file = short.hot_open(generation).map(|file| file.huge_pages_short().unwrap_or(0));
                if file.is_some() {
                    short.hot_release(generation);
                }
                match file {
                    Some(0) => {}
                    Some(bytes) => {
                        results.note(format!("{bytes} bytes of the cache lie in 4 KiB pages: memory is fragmented"))
                    }
                    None => results
                        .note("the file did not become whole: no passthrough, warm numbers are plain FUSE".into()),
                }
                if mounted.hot_opens() == 0 {
                    results.note("passthrough was not granted: warm numbers are plain FUSE".into());
                }
            }
        }
        for round in 0..options.rounds {
            for way in WAYS {
                for i in 0..live.len() {
                    let (who, live) = &live[(i + round) % live.len()];
                    eprint!("\r\x1b[Kwarm, round {}: {way}, {}", round + 1, who.name());
                    let count = if options.smoke { 200 } else { 20_000 };
                    let (way_of, count) = match (who, way) {
                        (Who::Memcpy, "read 1 MiB" | "mmap copy" | "O_DIRECT 1 MiB") => ("memcpy", options.size),
                        (Who::Memcpy, _) => continue,
                        (Who::Rclone | Who::Gocryptfs, "random 4 KiB") => (way, count / 100),
                        _ => (way, count),
                    };
                    self.note_one(results, "warm", who.name(), way, &ask(way_of, &live.file(), count));
                }
            }
        }
        live.into_iter().for_each(|(_, live)| live.end());
    }

    fn cold(&self, options: &Options, results: &mut Results) {
        let mut contenders = vec![Who::OwnAuto, Who::OwnWhole, Who::OwnAead, Who::Plain];
        contenders.extend(&self.peers);
        for (kind, drop) in [("disk", true), ("cached", false)] {
            for round in 0..options.rounds {
                for way in WAYS {
                    for i in 0..contenders.len() {
                        let who = contenders[(i + round) % contenders.len()];
                        // Over the disk the other ways say nothing new, and copying backwards out of a map, as the C library
                        // does for large pieces, takes minutes a GiB elsewhere.
                        let peer = self.peers.contains(&who);
                        let once = way == "mmap sum" && round == 0;
                        let wanted = if drop { way == "read 1 MiB" } else { !peer || way == "read 1 MiB" || once };
                        if !wanted {
                            continue;
                        }
                        eprint!("\r\x1b[Kcold, {kind}, round {}: {way}, {}", round + 1, who.name());
                        let live = self.live(who);
                        if drop {
                            drop_caches();
                        }
                        let cpu = common::cpu_time();
                        let seen = ask(way, &live.file(), if options.smoke { 20 } else { 200 });
                        let daemon = (common::cpu_time() - cpu).as_secs_f64();
                        self.note_one(results, kind, who.name(), way, &seen);
                        if matches!(live, Live::Own(_)) && WHOLE_FILE.contains(&way) {
                            let each = (daemon + seen.cpu) / (seen.bytes as f64 / 1e9);
                            results.add(&format!("{} ", who.name()), &format!("cpu {kind} {way}"), "s/GB", each);
                        }
                        live.end();
                    }
                }
                if drop {
                    drop_caches();
                }
                let stored = self.at("store").join(modelfs::format::names::data(self.sealed.model_id, self.sealed.oid));
                let seen = ask("read 1 MiB", &stored, 0);
                let rate = seen.bytes as f64 / seen.seconds / 1e9;
                results.add("the stored ciphertext itself", &format!("{kind} read 1 MiB"), "GB/s", rate);
            }
        }
    }

    fn note_one(&self, results: &mut Results, kind: &str, who: &str, way: &str, seen: &Seen) {
        let how = format!("{kind} {way}");
        if way == "mmap sum" {
            assert_eq!(seen.sum, self.sealed.sum, "{who} served wrong bytes");
        }
        if way == "random 4 KiB" {
            results.add(who, &how, "us", seen.seconds * 1e6 / (seen.bytes as f64 / 4096.0));
        } else {
            assert_eq!(seen.bytes, self.sealed.layout.plain_len(), "{who} served the file short");
            results.add(who, &how, "GB/s", seen.bytes as f64 / seen.seconds / 1e9);
        }
    }

    fn report(&self, options: &Options, results: &mut Results) {
        eprintln!();
        let columns = |kind: &str| WAYS.map(|way| format!("{kind} {way}"));
        fn words(columns: &[String]) -> Vec<&str> {
            columns.iter().map(String::as_str).collect()
        }
        let tmpfs = Who::TmpfsSmall.name();
        let warm = columns("warm");
        results.table("warm, GB/s [of tmpfs]; random in us a read", &words(&warm), Some(tmpfs));
        let cached = columns("cached");
        let own = Who::OwnWhole.name();
        results.table(
            "cold, ciphertext in the page cache, GB/s [of modelfs open=whole]; random in us a read",
            &words(&cached),
            Some(own),
        );
        let disk = ["disk read 1 MiB"];
        results.table("cold from the disk, GB/s [of modelfs open=whole]", &disk, Some(own));
        let cpu = ["cpu cached read 1 MiB", "cpu cached mmap sum", "cpu cached mmap copy", "cpu cached O_DIRECT 1 MiB"];
        results.table("processor seconds a GB, daemon and reader together, cold", &cpu, None);
        println!();
        let me = Who::Passthrough.name();
        for way in ["read 1 MiB", "mmap sum", "mmap copy"] {
            let ratio = results.ratio(me, tmpfs, &format!("warm {way}"));
            results.verdict(
                format!("warm {way} through the mount is {ratio:.2} of tmpfs, wanted 1.00 or more"),
                ratio >= 1.0,
            );
        }
        for peer in &self.peers {
            for way in ["read 1 MiB", "mmap sum"] {
                let ratio = results.ratio(own, peer.name(), &format!("cached {way}"));
                results
                    .verdict(format!("cold {way} is {ratio:.1} times {}, wanted 3 or more", peer.name()), ratio >= 3.0);
            }
        }
        results.write_json("mount", options);
    }
}

/// Root only, which the bench is; the whole machine feels it for a moment.
fn drop_caches() {
    // SAFETY: no arguments.
    unsafe { libc::sync() };
    if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "1") {
        eprintln!("the page cache stays as it is: {error}");
    }
}
