//! A command on a terminal of its own, as a person has it: what it shows, and what is typed.
#![allow(dead_code)] // each test binary uses its own part

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(120);

pub struct Terminal {
    child: Child,
    screen: File,
    /// All that was shown, and how much of it was waited for already.
    seen: Vec<u8>,
    waited: usize,
}

impl Terminal {
    /// The terminal is the command's controlling one: it is where passwords are asked for. 30 lines of 100 columns.
    pub fn start(command: &mut Command) -> Terminal {
        let (mut screen, mut inside) = (-1, -1);
        let size = libc::winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: both descriptors are written by the call and owned by nobody else; the rest is read.
        let (screen, inside) = unsafe {
            let made = libc::openpty(&mut screen, &mut inside, std::ptr::null_mut(), std::ptr::null_mut(), &size);
            assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
            (File::from_raw_fd(screen), OwnedFd::from_raw_fd(inside))
        };
        // SAFETY: the flag belongs to a descriptor of ours.
        unsafe { libc::fcntl(screen.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        let stdio = || Stdio::from(inside.try_clone().expect("a descriptor"));
        command.env("TERM", "xterm-256color").env_remove("NO_COLOR");
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: both calls are async-signal-safe and touch nothing of the parent.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        Terminal { child: command.spawn().expect("the binary runs"), screen, seen: Vec::new(), waited: 0 }
    }

    fn read(&mut self) {
        let mut piece = [0; 65536];
        while let Ok(len @ 1..) = self.screen.read(&mut piece) {
            self.seen.extend_from_slice(&piece[..len]);
        }
    }

    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Waits until `part` was shown after what was waited for before.
    pub fn expect(&mut self, part: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.read();
            let rest = &self.seen[self.waited..];
            if let Some(at) = rest.windows(part.len()).position(|bytes| bytes == part.as_bytes()) {
                self.waited += at + part.len();
                return;
            }
            assert!(Instant::now() < deadline, "`{part}` never came: {}", self.shown());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A line with its end. The prompt is shown a moment before the terminal stops to show what is typed: that is waited for.
    pub fn type_secret(&mut self, line: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.modes().c_lflag & libc::ECHO != 0 {
            assert!(Instant::now() < deadline, "the terminal still shows what is typed: {}", self.shown());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.press(&format!("{line}\n"));
    }

    /// How it takes and shows what is typed.
    pub fn modes(&self) -> libc::termios {
        let mut modes = std::mem::MaybeUninit::uninit();
        // SAFETY: the call fills what it is given when it answers 0.
        unsafe {
            assert_eq!(libc::tcgetattr(self.screen.as_raw_fd(), modes.as_mut_ptr()), 0);
            modes.assume_init()
        }
    }

    pub fn press(&mut self, keys: &str) {
        self.screen.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    pub fn resize(&mut self, columns: u16, lines: u16) {
        let size = libc::winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the size is read; the descriptor is ours.
        assert_eq!(unsafe { libc::ioctl(self.screen.as_raw_fd(), libc::TIOCSWINSZ, &size) }, 0);
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the pid of a child not yet waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Waits for the end; the exit code, and all that was shown.
    pub fn ended(&mut self) -> (Option<i32>, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.read();
            if let Some(status) = self.child.try_wait().expect("wait") {
                self.read();
                return (status.code(), self.shown());
            }
            assert!(Instant::now() < deadline, "still running: {}", self.shown());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Without a terminal to ask on, though whoever runs the tests may have one.
pub fn without_terminal(command: &mut Command) -> &mut Command {
    // SAFETY: async-signal-safe, and touches nothing of the parent.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
    command.stdin(Stdio::null())
}
