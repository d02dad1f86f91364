//! How a mount ends: by signal, by umount, by `modelfs umount`, with and without programs that still hold files, as root
//! and as an ordinary user.

#[path = "common/program.rs"]
mod program;

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use program::{Program, can_mount, is_mountpoint, run_ok, skip};

const WEIGHTS_BYTES: usize = (20 << 20) + 99;

struct Ready {
    _folder: tempfile::TempDir,
    program: Program,
}

/// A store with one model `acme/m`: 20 MiB of weights and a small file.
fn ready() -> Ready {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    fs::write(source.join("weights.bin"), weights()).expect("write");
    fs::write(source.join("config.json"), b"{\"layers\": 2}\n").expect("write");
    let program = Program::in_folder(folder.path());
    program.seal(&source, "acme/m");
    Ready { _folder: folder, program }
}

fn weights() -> Vec<u8> {
    (0..WEIGHTS_BYTES).map(|i| (i * 2_654_435_761) as u32 as u8).collect()
}

#[test]
fn sigterm_sigint_umount_and_modelfs_umount_end_with_the_mount_gone_and_exit_0() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let weights = weights();
    for way in ["SIGTERM", "SIGINT", "umount", "modelfs umount"] {
        let mount = program.mount(&["--cache", "128MiB"]);
        assert!(fs::read(program.mountpoint().join("acme/m/weights.bin")).expect("read") == weights);
        match way {
            "SIGTERM" => mount.signal(libc::SIGTERM),
            "SIGINT" => mount.signal(libc::SIGINT),
            "umount" => drop(run_ok(Command::new("umount").arg(program.mountpoint()))),
            _ => drop(run_ok(program.command(&["umount"]).arg(program.mountpoint()))),
        }
        assert_eq!(mount.exit_code(Duration::from_secs(120)), 0, "{way}: {}", program.log());
        assert!(!is_mountpoint(program.mountpoint()), "{way}");
    }
}

#[test]
fn held_files_delay_the_end_by_ten_seconds_then_the_holder_is_named_and_the_exit_is_24() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let mount = program.mount(&["--open", "lazy", "--cache", "128MiB"]);
    let path = program.mountpoint().join("acme/m/config.json");
    let held = File::open(&path).expect("open");
    let mut sleeper =
        Command::new("sleep").arg("300").stdin(File::open(&path).expect("open")).spawn().expect("a second holder");
    let started = Instant::now();
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.exit_code(Duration::from_secs(120)), 24, "{}", program.log());
    assert!(started.elapsed() >= Duration::from_secs(9), "{:?}", started.elapsed());
    assert!(!is_mountpoint(program.mountpoint()));
    let log = program.log();
    assert!(log.contains(&format!("pid {}", std::process::id())), "{log}");
    assert!(log.contains("sleep") && log.contains("config.json"), "{log}");
    let mut byte = [0];
    let after = held.read_exact_at(&mut byte, 0).expect_err("the daemon is gone");
    assert_eq!(after.raw_os_error(), Some(libc::ENOTCONN));
    sleeper.kill().expect("kill");
    sleeper.wait().expect("wait");
}

/// A service manager starts again after a fault, and not after an end (24).
#[test]
fn a_connection_that_breaks_while_files_are_held_is_a_fault_and_no_end() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let control = tempfile::tempdir().expect("a folder");
    run_ok(Command::new("mount").args(["-t", "fusectl", "none"]).arg(control.path()));
    let mount = program.mount(&["--cache", "128MiB"]);
    let held = File::open(program.mountpoint().join("acme/m/config.json")).expect("open");
    let device = held.metadata().expect("stat").dev();
    fs::write(control.path().join(libc::minor(device).to_string()).join("abort"), "1").expect("aborted");
    run_ok(Command::new("umount").arg(control.path()));
    assert_eq!(mount.exit_code(Duration::from_secs(120)), 1, "{}", program.log());
    assert!(!is_mountpoint(program.mountpoint()), "the next start finds the place free");
    assert!(program.log().contains("although nobody unmounted it"), "{}", program.log());
    assert_eq!(fs::read(program.mountpoint()).expect_err("a folder").raw_os_error(), Some(libc::EISDIR));
}

#[test]
fn files_let_go_within_the_grace_end_in_exit_0() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    for trial in 1.. {
        let mount = program.mount(&["--cache", "128MiB"]);
        let held = File::open(program.mountpoint().join("acme/m/config.json")).expect("open");
        let told = Instant::now();
        mount.signal(libc::SIGTERM);
        std::thread::sleep(Duration::from_secs(1));
        let stays = is_mountpoint(program.mountpoint());
        drop(held);
        // A machine that stood still for most of the grace shows nothing.
        let within = told.elapsed() < Duration::from_secs(5);
        let code = mount.exit_code(Duration::from_secs(120));
        if within {
            assert!(stays);
            assert_eq!(code, 0, "{}", program.log());
            return;
        }
        assert!(trial < 10, "this machine is too slow for this test");
    }
}

#[test]
fn kill_9_leaves_files_served_by_passthrough_readable() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let mount = program.mount(&["--open", "whole", "--cache", "128MiB"]);
    let status = run_ok(program.command(&["status", "--json"]).arg(program.mountpoint()));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    if status["passthrough"] != true {
        skip("this kernel has no passthrough");
        return mount.unmount();
    }
    let file = File::open(program.mountpoint().join("acme/m/weights.bin")).expect("open");
    mount.signal(libc::SIGKILL);
    mount.wait_dead();
    let mut bytes = vec![0; WEIGHTS_BYTES];
    file.read_exact_at(&mut bytes, 0).expect("still readable");
    assert!(bytes == weights());
    drop(file);
    // A dead mount is cleared by the same command.
    run_ok(program.command(&["umount"]).arg(program.mountpoint()));
    assert!(!is_mountpoint(program.mountpoint()));
}

#[test]
fn daemon_mode_returns_when_ready_and_status_shows_the_mount() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    run_ok(
        program
            .command(&["mount"])
            .arg(program.store())
            .arg(program.mountpoint())
            .args(["--key", &program.key(), "--cache", "128MiB", "--daemon", "--trust"])
            .arg(program.trusted_key()),
    );
    assert!(is_mountpoint(program.mountpoint()));
    assert!(fs::read(program.mountpoint().join("acme/m/weights.bin")).expect("read") == weights());
    let status = run_ok(program.command(&["status", "--json"]).arg(program.mountpoint()));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    assert_eq!(status["models"][0]["name"], "acme/m");
    assert!(status["metrics"]["fetch_bytes"].as_u64().expect("a number") >= WEIGHTS_BYTES as u64);
    run_ok(program.command(&["umount"]).arg(program.mountpoint()));
    assert!(!is_mountpoint(program.mountpoint()));
}

/// /dev/fuse may be 0600 where udev does not run; an ordinary user needs what udev's rule would give.
fn let_users_open_fuse() {
    fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).expect("root changes modes");
}

/// A store of an ordinary user's, and the program where that user may read it.
struct OrdinaryUser {
    ready: Ready,
    binary: PathBuf,
}

const AS_USER: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

impl OrdinaryUser {
    /// `None` where the machine has no fusermount3; where everything is required to be there that is a must.
    fn new() -> Option<OrdinaryUser> {
        if Command::new("fusermount3").arg("--version").output().is_err() {
            skip("it needs fusermount3");
            return None;
        }
        let_users_open_fuse();
        let ready = ready();
        let root = ready.program.root();
        run_ok(Command::new("chmod").arg("755").arg(root));
        run_ok(Command::new("chown").args(["-R", "65534:65534"]).arg(root));
        let binary = root.join("modelfs");
        fs::copy(env!("CARGO_BIN_EXE_modelfs"), &binary).expect("copy the binary to where the user may read it");
        Some(OrdinaryUser { ready, binary })
    }

    /// CAP_IPC_LOCK stands for a limit that is high enough: where root may not raise hard limits it is the only way.
    fn command(&self, may_lock: bool, arguments: &[&str]) -> Command {
        let program = &self.ready.program;
        let mut command = Command::new("prlimit");
        command.arg("--memlock=8388608:8388608").arg("setpriv").args(AS_USER);
        if may_lock {
            command.args(["--inh-caps=+ipc_lock", "--ambient-caps=+ipc_lock"]);
        }
        command.arg("--").arg(&self.binary).args(arguments);
        for (name, value) in program.command(&[]).get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env("XDG_RUNTIME_DIR", program.root().join("tmp")).current_dir(program.root());
        command
    }

    fn mount(&self, may_lock: bool) -> Command {
        let program = &self.ready.program;
        let mut command = self.command(may_lock, &["mount", program.store()]);
        command.arg(program.mountpoint()).args(["--key", &program.key(), "--trust"]).arg(program.trusted_key());
        command.args(["--cache", "64MiB", "--daemon"]);
        command
    }

    /// Who answers for the mountpoint.
    fn pid(&self) -> u64 {
        let status = run_ok(self.command(false, &["status", "--json"]).arg(self.ready.program.mountpoint()));
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
        status["pid"].as_u64().expect("a number")
    }
}

#[test]
fn an_ordinary_user_mounts_through_fusermount3_and_is_told_the_limit_that_is_too_low() {
    if !can_mount() {
        return;
    }
    let Some(user) = OrdinaryUser::new() else { return };
    let program = &user.ready.program;
    let mountpoint = program.mountpoint().to_str().expect("utf-8");

    let refused = user.mount(false).output().expect("runs");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("MEMLOCK") && said.contains("8.0 MiB") && said.contains("ulimit -l"), "{said}");
    assert!(!is_mountpoint(program.mountpoint()));

    run_ok(&mut user.mount(true));
    // Only the mounting user gets in, root included.
    let root = fs::read_dir(program.mountpoint()).expect_err("root is another user");
    assert_eq!(root.raw_os_error(), Some(libc::EACCES));
    let sum = |path: &str| {
        let output = run_ok(Command::new("setpriv").args(AS_USER).args(["--", "sha256sum", path]).current_dir("/"));
        String::from_utf8_lossy(&output.stdout).split(' ').next().expect("a sum").to_owned()
    };
    let plain = program.root().join("source/weights.bin");
    assert_eq!(sum(&format!("{mountpoint}/acme/m/weights.bin")), sum(plain.to_str().expect("utf-8")));
    run_ok(&mut user.command(false, &["umount", mountpoint]));
    assert!(!is_mountpoint(program.mountpoint()));
}

/// Lets the next mount have a log of its own; this one's, later.
fn keep_log(program: &Program) -> impl Fn() -> String {
    let kept = program.root().join("first.log");
    fs::rename(program.root().join("daemon.log"), &kept).expect("renamed");
    move || fs::read_to_string(&kept).unwrap_or_default()
}

/// What the mount says of itself; nothing while it does not answer.
fn told(program: &Program) -> serde_json::Value {
    let status = program.command(&["status", "--json"]).arg(program.mountpoint()).output().expect("runs");
    serde_json::from_slice(&status.stdout).unwrap_or_default()
}

/// The process that says how the mount is.
fn who_answers(program: &Program) -> Option<u64> {
    told(program)["pid"].as_u64()
}

/// What `umount -l` leaves to its holders and what is mounted there next are two mounts, of two daemons.
#[test]
fn a_mount_taken_off_while_in_use_leaves_its_successor_alone() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let answers = || who_answers(&program);
    for end in ["its last file is closed", "SIGTERM"] {
        let first = program.mount(&["--open", "lazy", "--cache", "128MiB"]);
        program.until("the first one's answer", || answers() == Some(first.pid().into()));
        let held = File::open(program.mountpoint().join("acme/m/config.json")).expect("open");
        run_ok(Command::new("umount").arg("-l").arg(program.mountpoint()));
        assert!(!is_mountpoint(program.mountpoint()));
        // As long as nobody else is there it answers, to be locked or ended.
        assert_eq!(answers(), Some(first.pid().into()), "{end}");

        let first_log = keep_log(&program);
        let second = program.mount(&["--cache", "128MiB"]);
        program.until("the second one's answer", || answers() == Some(second.pid().into()));
        // They come a moment after the first answer.
        program.until("the second one's metrics beside it", || told(&program)["http"].is_string());
        let mut bytes = [0; 14];
        held.read_exact_at(&mut bytes, 0).expect("the first one serves its holders");
        match end {
            "SIGTERM" => first.signal(libc::SIGTERM),
            _ => drop(held),
        }
        // 24: the kernel had not let go yet of what it served past the daemon.
        let code = first.exit_code(Duration::from_secs(120));
        assert!([0, 24].contains(&code), "{end}: {code}: {}", first_log());

        assert!(is_mountpoint(program.mountpoint()), "{end}: the second one was taken off");
        assert!(fs::read(program.mountpoint().join("acme/m/weights.bin")).expect("read") == weights(), "{end}");
        assert_eq!(answers(), Some(second.pid().into()), "{end}");
        run_ok(program.command(&["umount"]).arg(program.mountpoint()));
        assert_eq!(second.exit_code(Duration::from_secs(120)), 0, "{end}: {}", program.log());
        assert!(!is_mountpoint(program.mountpoint()), "{end}");
    }
}

/// Once a mount is gone the kernel gives its device number to the next one.
#[test]
fn a_daemon_that_hears_late_of_its_unmount_leaves_its_successor_alone() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let first = program.mount(&["--cache", "128MiB"]);
    program.until("its answer", || who_answers(&program) == Some(first.pid().into()));
    first.signal(libc::SIGSTOP);
    // Each of its threads stops by itself: one that still runs would hear of the unmount at once.
    let threads = format!("/proc/{}/task", first.pid());
    program.until("its standstill", || {
        let stands = |stat: String| stat.contains(") T ");
        fs::read_dir(&threads)
            .expect("its threads")
            .flatten()
            .all(|thread| fs::read_to_string(thread.path().join("stat")).is_ok_and(stands))
    });
    let place = CString::new(program.mountpoint().to_str().expect("utf-8")).expect("no NUL");
    // umount(8) would ask the daemon first.
    // SAFETY: a NUL-terminated path that lives through the call.
    assert_eq!(unsafe { libc::umount2(place.as_ptr(), 0) }, 0, "{}", std::io::Error::last_os_error());
    let first_log = keep_log(&program);
    let second = program.mount(&["--cache", "128MiB"]);
    // It waits a while for who has the control socket, and says then who that is.
    program.until("the second one's word", || program.log().contains(&format!("pid {} answers for", first.pid())));
    first.signal(libc::SIGCONT);
    assert_eq!(first.exit_code(Duration::from_secs(120)), 0, "{}", first_log());
    assert!(is_mountpoint(program.mountpoint()), "the second one was taken off");
    assert!(fs::read(program.mountpoint().join("acme/m/weights.bin")).expect("read") == weights());
    second.unmount();
}

#[test]
fn an_ordinary_users_mount_taken_off_while_in_use_leaves_its_successor_alone() {
    if !can_mount() {
        return;
    }
    let Some(user) = OrdinaryUser::new() else { return };
    let program = &user.ready.program;
    let mountpoint = program.mountpoint().to_str().expect("utf-8");
    run_ok(&mut user.mount(true));
    let first = user.pid();
    let hold = format!("exec sleep 60 < {mountpoint}/acme/m/config.json");
    let mut holder = Command::new("setpriv")
        .args(AS_USER)
        .args(["--", "sh", "-c", &hold])
        .current_dir("/")
        .spawn()
        .expect("setpriv");
    let held = || fs::read_link(format!("/proc/{}/fd/0", holder.id())).is_ok_and(|it| it.starts_with(mountpoint));
    program.until("the holder", held);
    run_ok(
        Command::new("setpriv")
            .args(AS_USER)
            .args(["--", "fusermount3", "-u", "-z", "--", mountpoint])
            .current_dir("/"),
    );

    run_ok(&mut user.mount(true));
    let second = user.pid();
    holder.kill().expect("killed");
    holder.wait().expect("waited");
    // Not our child: gone, or waited for by nobody.
    let is_over = |pid: u64| fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
    program.until("the first one's end", || is_over(first));

    assert_ne!(first, second);
    assert!(is_mountpoint(program.mountpoint()), "the second one was taken off");
    assert_eq!(user.pid(), second);
    run_ok(&mut user.command(false, &["umount", mountpoint]));
    assert!(!is_mountpoint(program.mountpoint()));
}

#[test]
fn modelfs_umount_is_done_when_its_mount_is_gone_whatever_lies_below() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    run_ok(Command::new("mount").args(["-t", "tmpfs", "below"]).arg(program.mountpoint()));
    let mut mount = program.command(&["mount", program.store()]);
    mount.arg(program.mountpoint()).args(["--key", &program.key(), "--cache", "128MiB", "--daemon", "--trust"]);
    let mounted = mount.arg(program.trusted_key()).output().expect("runs");
    let taken_off = program.command(&["umount", "--timeout", "120s"]).arg(program.mountpoint()).output().expect("runs");
    let stays = is_mountpoint(program.mountpoint());
    run_ok(Command::new("umount").arg(program.mountpoint()));
    assert!(mounted.status.success(), "{}", String::from_utf8_lossy(&mounted.stderr));
    assert!(taken_off.status.success(), "{}", String::from_utf8_lossy(&taken_off.stderr));
    assert!(stays && !is_mountpoint(program.mountpoint()), "one mount lay below");
}

#[test]
fn modelfs_umount_takes_no_other_fuse_mount_off() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let device = File::options().read(true).write(true).open("/dev/fuse").expect("/dev/fuse");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let text = |text: &str| CString::new(text).expect("no NUL");
    let (place, options) = (text(program.mountpoint().to_str().expect("utf-8")), text(&options));
    // SAFETY: NUL-terminated words that live through the call.
    let mounted =
        unsafe { libc::mount(c"other".as_ptr(), place.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()) };
    assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
    // Nobody serves it: it is dead, and nobody waits for an answer.
    drop(device);
    let refused = program.command(&["umount"]).arg(program.mountpoint()).output().expect("runs");
    let stays = is_mountpoint(program.mountpoint());
    run_ok(Command::new("umount").arg("-l").arg(program.mountpoint()));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("not one of modelfs"), "{said}");
    assert!(stays, "it was taken off");
}

/// The descriptor table is part of the promise: nothing of ours keeps the mount busy.
#[test]
fn the_daemon_holds_no_descriptor_on_its_own_mount() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let mount = program.mount(&["--cache", "128MiB"]);
    let file = File::open(program.mountpoint().join("acme/m/weights.bin")).expect("open");
    assert!(file.as_raw_fd() >= 0);
    for entry in fs::read_dir(format!("/proc/{}/fd", mount.pid())).expect("its descriptors").flatten() {
        if let Ok(target) = fs::read_link(entry.path()) {
            assert!(!target.starts_with(program.mountpoint()), "{}", target.display());
        }
    }
    drop(file);
    mount.unmount();
}

#[test]
fn a_profile_is_kept_at_the_end_replayed_by_the_next_mount_and_never_stops_one() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let profile = program.root().join("home/load.json");
    let words = ["--cache", "128MiB", "--profile", profile.to_str().expect("utf-8")];
    let read =
        |what: &str| assert!(fs::read(program.mountpoint().join("acme/m/weights.bin")).expect(what) == weights());

    let mount = program.mount(&words);
    read("the first load");
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.exit_code(Duration::from_secs(120)), 0, "{}", program.log());
    assert_eq!(fs::metadata(&profile).expect("written").permissions().mode() & 0o777, 0o600);
    assert!(fs::read_to_string(&profile).expect("JSON").contains(r#""files":["weights.bin"],"runs":[[0,0,3,"#));

    // Nothing is read from this mount until all of it is there.
    let mount = program.mount(&words);
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let status = program.command(&["status", "--json"]).arg(program.mountpoint()).output().expect("status");
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
        if status["metrics"]["opened_bytes"].as_u64().is_some_and(|bytes| bytes >= WEIGHTS_BYTES as u64) {
            assert_eq!(status["metrics"]["reads"], 0);
            break;
        }
        assert!(Instant::now() < deadline, "not replayed: {status}");
        std::thread::sleep(Duration::from_millis(20));
    }
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.exit_code(Duration::from_secs(120)), 0, "{}", program.log());

    fs::write(&profile, "{\"not\": \"ours\"}").expect("write");
    let mount = program.mount(&words);
    read("a load without the profile");
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.exit_code(Duration::from_secs(120)), 0, "{}", program.log());
    assert!(program.log().contains("is ignored and left as it is"), "{}", program.log());
    assert_eq!(fs::read_to_string(&profile).expect("left alone"), "{\"not\": \"ours\"}");
}

#[test]
fn a_mount_that_is_held_back_says_by_what_and_doctor_says_what_to_do() {
    if !can_mount() {
        return;
    }
    let Ready { _folder, program } = ready();
    let meminfo = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let total_kib: u64 = meminfo.split_whitespace().nth(1).expect("MemTotal").parse().expect("a number");
    // Less than there is, or it would be refused, and no room beside it. Only a number until it is filled, which nothing
    // here does.
    let mount = program.mount(&["--cache", &format!("{}MiB", total_kib / 1024 - 100)]);
    program.until("the word in the log", || program.log().contains("held back by"));
    let log = program.log();
    assert!(log.contains("cache-room") && log.contains("modelfs doctor"), "{log}");

    let doctor = |rule: &str| {
        let output = run_ok(program.command(&["doctor", "--json"]).arg(program.mountpoint()));
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(value["can_mount"], true);
        let findings = value["findings"].as_array().expect("a list").clone();
        findings.into_iter().find(|finding| finding["rule"] == rule).unwrap_or_else(|| panic!("{rule} says nothing"))
    };
    let room = doctor("cache-room");
    assert_eq!(room["severity"], "warning");
    assert!(room["fix"].as_str().expect("a fix").contains("--cache"), "{room}");
    assert_eq!(doctor("read-ahead")["severity"], "fine", "the mount sets its own readahead");
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let mountpoint = program.mountpoint().to_str().expect("UTF-8");
    let line = table.lines().rfind(|line| line.split(' ').nth(4) == Some(mountpoint)).expect("mounted");
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", line.split(' ').nth(2).expect("a device"));
    fs::write(&path, "128").expect("root may");
    let read_ahead = doctor("read-ahead");
    assert_eq!(read_ahead["severity"], "warning");
    assert_eq!(read_ahead["fix"], format!("echo 1024 > {path}"));
    mount.unmount();
}
