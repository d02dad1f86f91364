//! Signals as something that is waited for, not something that interrupts.
//!
//! Promises: a child's end is told whatever we inherited; from [`Signals::hold`] on no signal that can be held acts on this process, also not on process 1 of a
//! container, where the kernel drops those that have no handler; what the command gets is the mask we were started with.
//! Held by: tests/run_command.sh.

use std::time::Duration;

use crate::error::{Code, Error, Result};

/// Raised by the processor or by abort() in one thread: to hold them would hide a crash.
const OF_A_THREAD: [libc::c_int; 7] =
    [libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGTRAP, libc::SIGSYS];

pub struct Signals {
    held: libc::sigset_t,
    before: libc::sigset_t,
}

/// Whether a signal asks a process to end.
pub fn ends(signal: libc::c_int) -> bool {
    [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP].contains(&signal)
}

impl Signals {
    pub fn hold() -> Result<Signals> {
        // SAFETY: a sigset is plain numbers, filled by sigfillset and the kernel; both live through the calls.
        unsafe {
            let mut signals = Signals { held: std::mem::zeroed(), before: std::mem::zeroed() };
            libc::sigfillset(&mut signals.held);
            for signal in OF_A_THREAD {
                libc::sigdelset(&mut signals.held, signal);
            }
            // Whoever started us may ignore it, and ignored it stays over exec: then the kernel collects our children, and
            // nobody learns that the command has ended.
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            match libc::pthread_sigmask(libc::SIG_SETMASK, &signals.held, &mut signals.before) {
                0 => Ok(signals),
                errno => {
                    Err(Error::new(Code::Host, "cannot hold signals")
                        .with_source(std::io::Error::from_raw_os_error(errno)))
                }
            }
        }
    }

    /// The next signal, if one comes within `wait`.
    pub fn next(&self, wait: Duration) -> Option<libc::c_int> {
        let time = libc::timespec { tv_sec: wait.as_secs() as libc::time_t, tv_nsec: wait.subsec_nanos().into() };
        // SAFETY: set and time live through the call; nothing is asked about the signal's sender.
        let signal = unsafe { libc::sigtimedwait(&self.held, std::ptr::null_mut(), &time) };
        (signal > 0).then_some(signal)
    }

    /// What puts the calling thread's mask back as it was before `hold`. It may be called between fork and exec.
    pub fn restore(&self) -> impl Fn() + Copy + Send + Sync + 'static {
        let before = self.before;
        move || {
            // SAFETY: the set is the kernel's own, from `hold`; nothing is asked back.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
        }
    }
}
