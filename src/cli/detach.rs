//! Going into the background: fork while there is one thread, return when the child says ready.
//!
//! The child keeps the terminal until it is ready, so that a passphrase can be asked for; then it leaves the session
//! and closes what it was given.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use crate::control::{code_named, error_json};
use crate::error::{Code, Error, Result};

/// What the child tells its parent, once.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Told {
    /// What the parent prints.
    Ready {
        line: String,
    },
    Error {
        code: String,
        message: String,
    },
}

/// Runs `work` in a forked child and returns once it calls its argument, or with the error it ended with before that.
/// What the child tells with that call is printed by the parent.
///
/// The parent's return is the caller's whole remaining work; the child never returns from here.
/// # Panics
/// If the process has more than one thread: a fork would copy locks that nobody unlocks.
pub fn in_background(log_file: Option<&Path>, work: impl FnOnce(Box<dyn FnOnce(String)>) -> Result<()>) -> Result<()> {
    assert_eq!(thread_count(), 1, "a process forks before its first thread, never after");
    let log = log_file.map(open_log).transpose()?;
    let (from_child, to_parent) = pipe()?;
    // SAFETY: this process has one thread (asserted above), so the child may go on using everything it has.
    match unsafe { libc::fork() } {
        -1 => Err(Error::os(Code::Host, "cannot start a background process")),
        0 => {
            drop(from_child);
            child(log, to_parent, work)
        }
        pid => {
            drop(to_parent);
            wait_for_child(pid, from_child)
        }
    }
}

fn wait_for_child(pid: libc::pid_t, from_child: OwnedFd) -> Result<()> {
    let mut text = String::new();
    // Ends when the child has told, or died: either closes its end. Its own waits have deadlines.
    File::from(from_child)
        .take(1 << 20)
        .read_to_string(&mut text)
        .map_err(|e| Error::new(Code::Host, "cannot hear from the background process").with_source(e))?;
    match serde_json::from_str(&text) {
        Ok(Told::Ready { line }) => {
            let _ = std::io::stdout().write_all(line.as_bytes());
            Ok(())
        }
        Ok(Told::Error { code, message }) => Err(Error::new(code_named(&code), message)),
        Err(_) => {
            let mut status = 0;
            // SAFETY: `status` outlives the call; `pid` is our own child, not waited for before.
            unsafe { libc::waitpid(pid, &raw mut status, 0) };
            let how = if libc::WIFSIGNALED(status) {
                format!("was killed by signal {}", libc::WTERMSIG(status))
            } else {
                format!("ended with code {}", libc::WEXITSTATUS(status))
            };
            Err(Error::new(Code::Host, format!("the background process {pid} {how} before the mount was ready")))
        }
    }
}

fn child(log: Option<File>, to_parent: OwnedFd, work: impl FnOnce(Box<dyn FnOnce(String)>) -> Result<()>) -> ! {
    let told = Rc::new(Cell::new(Some(File::from(to_parent))));
    let at_ready = Rc::clone(&told);
    let done = work(Box::new(move |line| {
        leave_terminal(log);
        tell(&at_ready, &Told::Ready { line });
    }));
    let code = match done {
        Ok(()) => 0,
        Err(e) => {
            let json = error_json(&e);
            let message = json["message"].as_str().unwrap_or_default().to_string();
            if !tell(&told, &Told::Error { code: e.code().name().into(), message }) {
                tracing::error!(code = e.code().name(), "{}", e.chain());
            }
            e.class().exit_code()
        }
    };
    std::process::exit(i32::from(code));
}

/// Whether the parent was still waiting.
fn tell(to: &Cell<Option<File>>, told: &Told) -> bool {
    let Some(mut pipe) = to.take() else { return false };
    let text = serde_json::to_vec(told).expect("our own enum of strings is JSON");
    // A parent that was killed meanwhile is no reason to end a mount.
    let _ = pipe.write_all(&text);
    true
}

/// A session of its own, `/` as its folder, no terminal.
fn leave_terminal(log: Option<File>) {
    // SAFETY: plain system calls on this process; the descriptors 0 to 2 are replaced atomically by dup2.
    unsafe {
        libc::setsid();
        libc::chdir(c"/".as_ptr());
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 {
            libc::dup2(null, 0);
            libc::dup2(null, 1);
            libc::dup2(log.as_ref().map_or(null, AsRawFd::as_raw_fd), 2);
            if null > 2 {
                libc::close(null);
            }
        }
    }
}

fn open_log(path: &Path) -> Result<File> {
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
        .map_err(|e| Error::new(Code::Usage, format!("cannot open the log file {}", path.display())).with_source(e))
}

fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for two descriptors; both are owned by nobody else.
    unsafe {
        if libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(Error::os(Code::Host, "cannot make a pipe"));
        }
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

fn thread_count() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(1, |tasks| tasks.count())
}
