//! A mount as a service: when it is called ready and what a manager hears, what a killed daemon leaves and who clears it,
//! what SIGHUP does.

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use program::{Program, can_mount, is_mountpoint, run_ok};

const WEIGHTS_BYTES: usize = (20 << 20) + 99;

struct Sealed {
    _folder: tempfile::TempDir,
    program: Program,
}

/// A store with one model `acme/m`: 20 MiB of weights, three chunks, and a small file.
fn sealed() -> Sealed {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = folder.path().join("source");
    fs::create_dir(&source).expect("mkdir");
    let weights: Vec<u8> = (0..WEIGHTS_BYTES).map(|i| (i * 2_654_435_761) as u32 as u8).collect();
    fs::write(source.join("weights.bin"), weights).expect("write");
    fs::write(source.join("config.json"), b"{\"layers\": 2}\n").expect("write");
    let program = Program::in_folder(folder.path());
    program.seal(&source, "acme/m");
    Sealed { _folder: folder, program }
}

impl Sealed {
    fn command(&self, more: &[&str]) -> Command {
        let program = &self.program;
        let mut command = program.command(&["mount"]);
        command.arg(program.store()).arg(program.mountpoint()).args(["--key", &program.key(), "--trust"]);
        command.arg(program.trusted_key()).args(["--cache", "128MiB"]).args(more);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// What a mount that must not come says on standard error, and its exit code.
    fn refused(&self, more: &[&str]) -> (i32, String) {
        let output = self.command(more).output().expect("the binary runs");
        assert!(!is_mountpoint(self.program.mountpoint()));
        (output.status.code().expect("an exit"), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The store's largest object, and its very last byte turned over.
    fn forge_last_byte(&self) {
        let mut folders = vec![PathBuf::from(self.program.store())];
        let mut largest = (0, PathBuf::new());
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("list") {
                let entry = entry.expect("entry");
                let meta = entry.metadata().expect("stat");
                if meta.is_dir() {
                    folders.push(entry.path());
                } else if meta.len() > largest.0 {
                    largest = (meta.len(), entry.path());
                }
            }
        }
        let mut bytes = fs::read(&largest.1).expect("read");
        *bytes.last_mut().expect("not empty") ^= 1;
        let new = largest.1.with_extension("new");
        fs::write(&new, bytes).expect("write");
        fs::rename(new, largest.1).expect("rename");
    }
}

#[test]
fn a_required_model_that_cannot_be_read_to_its_end_is_not_mounted() {
    if !can_mount() {
        return;
    }
    let sealed = sealed();
    sealed.forge_last_byte();
    // Nobody required it: it is mounted, and the read says what is wrong.
    let mount = sealed.program.mount(&["--cache", "128MiB"]);
    assert!(fs::read(sealed.program.mountpoint().join("acme/m/weights.bin")).is_err());
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.exit_code(Duration::from_secs(120)), 0);

    for require in ["acme/m", "all"] {
        let (code, said) = sealed.refused(&["--require", require]);
        assert_eq!(code, 20, "{said}");
        assert!(said.contains("required model acme/m cannot be read: its last block"), "{said}");
    }
    let (code, said) = sealed.refused(&["--require", "acme/other"]);
    assert_eq!(code, 3, "{said}");
    assert!(said.contains("required model acme/other"), "{said}");
}

fn heard(manager: &UnixDatagram) -> String {
    let mut bytes = [0; 4096];
    let len = manager.recv(&mut bytes).expect("a message within the deadline");
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

fn heard_until(manager: &UnixDatagram, wanted: &str) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        all.push(heard(manager));
        if all.last().expect("just pushed").contains(wanted) {
            return all;
        }
        assert!(all.len() < 100, "{all:?}");
    }
}

#[test]
fn a_manager_hears_what_goes_on_readiness_a_reload_the_end_and_why_a_start_failed() {
    if !can_mount() {
        return;
    }
    let sealed = sealed();
    let socket = sealed.program.root().join("notify");
    let manager = UnixDatagram::bind(&socket).expect("bound");
    manager.set_read_timeout(Some(Duration::from_secs(120))).expect("a deadline");
    let start = |more: &[&str]| {
        let mut command = sealed.command(more);
        // Seldom: what is not read yet keeps the next message out.
        command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", "4000000").spawn().expect("the binary runs")
    };

    let mut child = start(&["--model", "acme/m", "--versions"]);
    let told = heard_until(&manager, "READY=1");
    assert!(is_mountpoint(sealed.program.mountpoint()), "ready before it was mounted");
    for wanted in ["model acme/m: fetching first block", "model acme/m: fetching last block"] {
        assert!(told.iter().any(|one| one.contains(wanted)), "{wanted}: {told:?}");
    }
    let status = format!("STATUS={}: acme/m version 1", sealed.program.mountpoint().display());
    assert!(told.last().expect("one").contains(&status), "{told:?}");
    heard_until(&manager, "WATCHDOG=1");

    // SAFETY: the pid of a child not yet waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGHUP) };
    heard_until(&manager, "RELOADING=1\nMONOTONIC_USEC=");
    heard_until(&manager, "READY=1");

    // SAFETY: as above.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    heard_until(&manager, "STOPPING=1");
    assert!(child.wait().expect("ended").success());

    run_ok(&mut sealed.program.command(&["keygen", "other.key"]));
    let other = format!("file:{}", sealed.program.root().join("other.key").display());
    let mut command = sealed.program.command(&["mount", sealed.program.store()]);
    command.arg(sealed.program.mountpoint()).args(["--key", &other, "--model", "acme/m", "--trust"]);
    command.arg(sealed.program.trusted_key()).args(["--cache", "128MiB"]).env("NOTIFY_SOCKET", &socket);
    assert_eq!(command.stderr(Stdio::null()).status().expect("runs").code(), Some(25));
    heard_until(&manager, "[NO_KEY]");
}

#[test]
fn a_store_that_comes_while_the_start_waits_is_mounted_and_one_that_does_not_is_named() {
    if !can_mount() {
        return;
    }
    let sealed = sealed();
    let away = sealed.program.root().join("away");
    fs::rename(sealed.program.store(), &away).expect("moved");
    let asked = Instant::now();
    let (code, said) = sealed.refused(&["--ready-timeout", "100ms"]);
    let most = asked.elapsed().as_secs();
    assert_eq!(code, 22, "{said}");
    let after = said.split_once("not ready within ").and_then(|(_, after)| after.split_once(" s"));
    let waited: u64 = after.and_then(|(seconds, _)| seconds.parse().ok()).unwrap_or_else(|| panic!("{said}"));
    assert!(waited <= most && said.contains("no store at"), "{most} s: {said}");
    // Nobody asked to wait.
    assert_eq!(sealed.refused(&[]).0, 3);

    let mut child = sealed.command(&["--ready-timeout", "10m"]).spawn().expect("the binary runs");
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().expect("looked").is_none(), "it did not wait");
    fs::rename(&away, sealed.program.store()).expect("moved back");
    until("the mount", || is_mountpoint(sealed.program.mountpoint()));
    run_ok(sealed.program.command(&["umount"]).arg(sealed.program.mountpoint()));
    assert!(child.wait().expect("ended").success());
}

#[test]
fn a_wait_for_a_store_ends_at_once_when_told_to_also_as_process_1_of_a_container() {
    use std::os::unix::process::ExitStatusExt;
    if !can_mount() {
        return;
    }
    let sealed = sealed();
    fs::remove_dir_all(sealed.program.store()).expect("no store yet");
    let log = sealed.program.root().join("wait.log");
    let waits = |command: &mut Command| {
        let mut child = command.stderr(fs::File::create(&log).expect("log")).spawn().expect("runs");
        let deadline = Instant::now() + Duration::from_secs(120);
        let said = || fs::read_to_string(&log).expect("text");
        while !said().contains("not ready yet") {
            assert!(Instant::now() < deadline && child.try_wait().expect("looked").is_none(), "{}", said());
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    };
    let ends = |mut child: std::process::Child, pid: i32| {
        let told = Instant::now();
        // SAFETY: the pid of a child, or of a child's child, that nobody has waited for.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        loop {
            if let Some(status) = child.try_wait().expect("looked") {
                return status;
            }
            if told.elapsed() > Duration::from_secs(60) {
                let _ = child.kill();
                panic!("it goes on waiting: {}", fs::read_to_string(&log).expect("text"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let mut plain = sealed.command(&["--ready-timeout", "10m"]);
    let child = waits(&mut plain);
    let pid = child.id() as i32;
    assert_eq!(ends(child, pid).signal(), Some(libc::SIGTERM));

    let mut inside = Command::new("unshare");
    inside.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"]).arg(plain.get_program());
    inside.args(plain.get_args()).current_dir(sealed.program.root()).stdout(Stdio::null());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => inside.env(name, value),
            None => inside.env_remove(name),
        };
    }
    let child = waits(&mut inside);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).expect("its children");
    let pid = children.trim().parse().expect("one child");
    assert_eq!(ends(child, pid).code(), Some(128 + libc::SIGTERM));
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not come within 120 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_killed_daemons_left_is_cleared_at_the_next_start_and_nothing_else_is() {
    if !can_mount() {
        return;
    }
    let sealed = sealed();
    let mountpoint = sealed.program.mountpoint();
    for round in 0..2 {
        let mount = sealed.program.mount(&["--cache", "128MiB"]);
        mount.signal(libc::SIGKILL);
        mount.wait_dead();
        assert_eq!(fs::read_dir(mountpoint).expect_err("dead").raw_os_error(), Some(libc::ENOTCONN), "{round}");

        // `Program::mount` takes the dead one for the new one: the daemon's own word counts.
        let mut child = sealed.command(&[]).spawn().expect("the binary runs");
        until("a mount that answers", || mountpoint.join("acme/m/config.json").exists());
        assert_eq!(fs::read(mountpoint.join("acme/m/config.json")).expect("read"), b"{\"layers\": 2}\n");
        run_ok(sealed.program.command(&["umount"]).arg(mountpoint));
        assert!(child.wait().expect("ended").success());
        let mut said = String::new();
        child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
        assert!(said.contains("cleared a dead mount on"), "{said}");
        assert!(!is_mountpoint(mountpoint), "another mount lies below");
    }

    // A living one of ours, and one of somebody else.
    let mount = sealed.program.mount(&["--cache", "128MiB"]);
    let second = sealed.command(&[]).output().expect("the binary runs");
    assert_eq!(second.status.code(), Some(2), "{}", String::from_utf8_lossy(&second.stderr));
    assert!(mountpoint.join("acme/m/config.json").exists(), "the living mount was taken off");
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.exit_code(Duration::from_secs(120)), 0);
    run_ok(Command::new("mount").args(["-t", "tmpfs", "other"]).arg(mountpoint));
    fs::write(mountpoint.join("mine"), b"x").expect("write");
    let foreign = sealed.command(&[]).output().expect("the binary runs");
    let kept = mountpoint.join("mine").exists();
    run_ok(Command::new("umount").arg(mountpoint));
    assert_eq!(foreign.status.code(), Some(2));
    assert!(kept, "a mount of somebody else was taken off");
}

#[test]
fn sighup_does_not_end_a_mount_that_is_bound_to_its_versions() {
    if !can_mount() {
        return;
    }
    let sealed = sealed();
    let mount = sealed.program.mount(&["--cache", "128MiB"]);
    until("the control socket", || {
        let mut status = sealed.program.command(&["status"]);
        status.arg(sealed.program.mountpoint()).stdout(Stdio::null()).stderr(Stdio::null());
        status.status().expect("runs").success()
    });
    mount.signal(libc::SIGHUP);
    until("the word in the log", || sealed.program.log().contains("bound to the versions it began with"));
    assert!(sealed.program.mountpoint().join("acme/m/config.json").exists());
    mount.signal(libc::SIGTERM);
    assert_eq!(mount.exit_code(Duration::from_secs(120)), 0);
}
