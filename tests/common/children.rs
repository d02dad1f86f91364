//! What another program meets: this test binary started again to do one thing to one file, so that it may be killed.
//!
//! A test binary that uses this has `#[test] fn child() { children::be_one() }`, which does nothing unless asked.
#![allow(dead_code)] // each test binary uses its own part

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const WISH: &str = "MODELFS_TEST_CHILD";

/// How a touch of one mapped byte ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Touch {
    Byte(u8),
    Killed(i32),
    Other(String),
}

pub fn be_one() {
    let Ok(wish) = std::env::var(WISH) else { return };
    let mut words = wish.splitn(3, '|');
    let verb = words.next().expect("a verb");
    let offset: u64 = words.next().expect("an offset").parse().expect("a number");
    let path = words.next().expect("a path");
    let file = File::open(path).expect("open");
    println!("CHILD opened");
    match verb {
        "touch-shared" => touch_here(&file, offset, libc::MAP_SHARED),
        "touch-private" => touch_here(&file, offset, libc::MAP_PRIVATE),
        "read" => match file.read_at(&mut [0; 4096], offset) {
            Ok(count) => println!("CHILD read {count}"),
            Err(error) => println!("CHILD errno {}", error.raw_os_error().expect("an errno")),
        },
        _ => panic!("{verb}?"),
    }
}

fn touch_here(file: &File, offset: u64, sharing: libc::c_int) {
    let page = offset / 4096 * 4096;
    // SAFETY: a fresh map of an open file, read once; whatever the kernel makes of that is the test.
    let byte = unsafe {
        let none = std::ptr::null_mut();
        let at = libc::mmap(none, 4096, libc::PROT_READ, sharing, file.as_raw_fd(), page as libc::off_t);
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        std::ptr::read_volatile(at.cast::<u8>().add((offset - page) as usize))
    };
    println!("CHILD byte {byte}");
}

fn command(verb: &str, path: &Path, offset: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["child", "--exact", "--nocapture", "--test-threads=1"]);
    command.env(WISH, format!("{verb}|{offset}|{}", path.display())).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Maps the page that holds byte `offset` in another process and reads the byte.
pub fn touch(path: &Path, offset: u64, shared: bool) -> Touch {
    let verb = if shared { "touch-shared" } else { "touch-private" };
    let output = command(verb, path, offset).output().expect("started");
    if let Some(signal) = output.status.signal() {
        return Touch::Killed(signal);
    }
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.lines().find_map(|line| line.strip_prefix("CHILD byte ")?.parse().ok()) {
        Some(byte) => Touch::Byte(byte),
        None => Touch::Other(format!("{text} {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// A process that has `path` open and reads 4096 bytes at `offset`; it says how that ended on its standard output.
pub fn start_read(path: &Path, offset: u64) -> Child {
    command("read", path, offset).spawn().expect("started")
}
