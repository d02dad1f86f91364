//! `modelfs run`: a mount, and a command that lives on it, as a container's first process or anywhere else.
//!
//! In: a checked [`RunPlan`]. Out: the command's exit code, or why it was never started.
//! Promises: the command starts only when its models can be read; whatever ends first and however (the command killed, the
//! mount taken off from outside, a second SIGTERM), the command is waited for, then the mount goes and keys and plaintext
//! are wiped; signals go to the command; as process 1 of a container, orphans are reaped and nothing outlives the command.
//! `child`: what the command gets and does not get. `checks`: what is looked at before.
//! Not here: mounting and wiping (`host`).
//! Held by: tests/run_command.sh.

mod checks;
mod child;
mod signals;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::MountPlan;
use crate::error::{Code, Error, Result};
use crate::host::{Decision, Host, HostPlan, Mounted};
use crate::processes::{self, Change};
use crate::ready::await_store;
use crate::{mem, mounts, notify, refuse};

pub use child::{NOT_EXECUTABLE, NOT_FOUND};
use signals::Signals;

/// How long files of the mount may be held once the command has ended. Short: a container that is stopped gets 10 s in all,
/// and most of them are the command's.
const HOLD_GRACE: Duration = Duration::from_secs(2);

/// How long the processes that a container's command left behind have between SIGTERM and SIGKILL.
const LEFTOVER_GRACE: Duration = Duration::from_secs(1);

/// How long a mount that is being made has to come to an end once we are told to stop.
const GIVE_UP_GRACE: Duration = Duration::from_secs(5);

/// How often is looked while two things are waited for.
const POLL: Duration = Duration::from_millis(10);

/// How often the mount is looked at while the command runs; signals and the command's end are seen at once.
const LOOK: Duration = Duration::from_secs(1);

/// As a shell tells of a process that a signal ended.
const BY_SIGNAL: u8 = 128;

/// What to mount and what to start on it.
#[derive(Debug)]
pub struct RunPlan {
    pub mount: MountPlan,
    /// The program and its arguments; not empty.
    pub command: Vec<OsString>,
    /// What `doctor` finds of weight for secrets stops the start.
    pub strict: bool,
    /// Variables that hold secrets of ours and that the command gets all the same.
    pub keep_env: Vec<OsString>,
    /// The configuration files that `mount` came from.
    pub config_files: Vec<PathBuf>,
}

/// Mounts, runs the command, unmounts, wipes. Call it before the process has a second thread.
///
/// # Errors
/// `INSECURE` when `strict` found something; whatever refused the mount. Then the command was not started.
pub fn run(plan: RunPlan) -> Result<u8> {
    let ended = live(plan);
    if let Err(error) = &ended {
        notify::service().failed(error);
    }
    ended
}

fn live(plan: RunPlan) -> Result<u8> {
    // Before any thread exists: each of them inherits that signals wait for us.
    let signals = Signals::hold()?;
    let mut child = child::Plan::new(&plan)?;
    if !child.is_there() {
        tracing::error!("{} is not there; nothing was mounted", child.name());
        return Ok(NOT_FOUND);
    }
    child.note_limits();
    // The checks log in to Vault, and the mount goes on with what they opened.
    mem::harden()?;
    let plan = match look(plan, &signals)? {
        Looked::Good(plan) => plan,
        Looked::Stopped(signal) => return Ok(BY_SIGNAL.saturating_add(signal)),
    };
    let host =
        Host::start_alone(&HostPlan { cache_bytes: plan.mount.cache_bytes, oversight: plan.mount.oversight.clone() })?;
    let mounted = match mount(&host, plan.mount, &signals)? {
        Begun::Mounted(mounted) => mounted,
        Begun::Stopped(signal) => return Ok(BY_SIGNAL.saturating_add(signal)),
    };
    child.forget_secrets();
    let code = match child.start(&signals) {
        Ok(pid) => {
            tracing::info!(pid, "{} is ready for {}", mounted.mountpoint().display(), child.name());
            notify::service().ready(&mounted.told());
            notify::service().watch(host.runtime(), {
                let (mounted, gone) = (mounted.clone(), mounted.gone());
                // A mount that was taken off is told of; the command's life goes on.
                move || *gone.borrow() || mounts::answers(mounted.mountpoint())
            });
            let code = supervise(pid, &mounted, &signals);
            child.take_terminal_back();
            notify::service().stopping("the command has ended");
            code
        }
        Err(refused) => refused,
    };
    end(&host, &mounted, &signals);
    Ok(code)
}

enum Looked {
    Good(Box<RunPlan>),
    Stopped(u8),
}

/// How long the looks may take, each of which has its own time: whoever asks a mount that does not answer waits for ever.
const LOOK_MAX: Duration = Duration::from_secs(120);
/// Of a strict one two come to their ends, within ten minutes each.
const STRICT_LOOK_MAX: Duration = Duration::from_secs(1500);

/// Looks at the machine in a thread of its own: a signal ends that at once, since nothing is there to be undone.
fn look(mut plan: RunPlan, signals: &Signals) -> Result<Looked> {
    let (began, most) = (Instant::now(), if plan.strict { STRICT_LOOK_MAX } else { LOOK_MAX });
    let work = std::thread::Builder::new()
        .name("look".into())
        .spawn(move || checks::look(&mut plan).map(|()| plan))
        .map_err(|e| Error::new(Code::Host, "cannot start a thread").with_source(e))?;
    while !work.is_finished() {
        if let Some(signal) = signals.next(POLL)
            && signals::ends(signal)
        {
            tracing::info!("told to stop by signal {signal} before the command was started");
            return Ok(Looked::Stopped(signal as u8));
        }
        if began.elapsed() > most {
            refuse!(
                Host,
                "the look at this machine did not end within {} s, so nothing was started: something that is mounted here does \
                 not answer; unmount it (`cat /proc/self/mountinfo`)",
                most.as_secs()
            );
        }
    }
    let plan = work.join().map_err(|_| Error::new(Code::Host, "the thread that looks died"))?;
    Ok(Looked::Good(Box::new(plan?)))
}

enum Begun {
    Mounted(Arc<Mounted>),
    Stopped(u8),
}

/// Mounts in a thread of its own, so that a signal is heard while a store is slow.
fn mount(host: &Arc<Host>, mut plan: MountPlan, signals: &Signals) -> Result<Begun> {
    let decision = Decision::default();
    let work = std::thread::Builder::new().name("mount".into()).spawn({
        let (host, decision) = (host.clone(), decision.clone());
        move || {
            plan.access.store.telemetry = host.telemetry().clone();
            await_store(&mut plan, host.runtime())?;
            host.mount_if(plan, || decision.enter())
        }
    });
    let work = work.map_err(|e| Error::new(Code::Host, "cannot start a thread").with_source(e))?;
    let mut stopped: Option<(u8, Instant, bool)> = None;
    while !work.is_finished() {
        match signals.next(POLL) {
            Some(signal) if signals::ends(signal) && stopped.is_none() => {
                tracing::info!("told to stop by signal {signal} before the command was started");
                stopped = Some((signal as u8, Instant::now() + GIVE_UP_GRACE, decision.give_up()));
            }
            Some(_) | None => {}
        }
        if let Some((signal, until, given_up)) = stopped
            && given_up
            && Instant::now() >= until
        {
            // Nothing is mounted and nothing will be, and what was fetched goes with the process.
            return Ok(Begun::Stopped(signal));
        }
    }
    let mounted = work.join().map_err(|_| Error::new(Code::Host, "the thread that mounts died"))?;
    match stopped {
        None => Ok(Begun::Mounted(mounted?)),
        Some((signal, ..)) => {
            if let Ok(mounted) = mounted {
                end(host, &mounted, signals);
            }
            Ok(Begun::Stopped(signal))
        }
    }
}

/// Until the command ends. Its exit code, as a shell would tell it.
fn supervise(pid: libc::pid_t, mounted: &Mounted, signals: &Signals) -> u8 {
    let gone = mounted.gone();
    let mut told = false;
    loop {
        match signals.next(LOOK) {
            Some(libc::SIGCHLD) | None => {}
            // Only a command that has ended cannot be told, and that is seen next.
            Some(signal) => drop(processes::tell(pid, signal)),
        }
        let mut ended = None;
        processes::reap(|change| match change {
            Change::Ended { pid: who, code } if who == pid => ended = Some(code),
            Change::Ended { .. } => {}
            // Nobody could wake it from the terminal, and who waits for files that it holds would wait for ever.
            Change::Stopped { pid: who, signal: libc::SIGTSTP } if who == pid => {
                drop(processes::tell(-pid, libc::SIGCONT))
            }
            Change::Stopped { .. } => {}
        });
        if let Some(code) = ended {
            tracing::info!("the command ended with {code}");
            return code;
        }
        if !told && *gone.borrow() {
            told = true;
            tracing::error!(
                "{} was taken off while the command runs: it reads errors there from now on; it goes on, and its end is \
                 waited for",
                mounted.mountpoint().display()
            );
        }
    }
}

/// The command is over: nothing readable stays.
fn end(host: &Arc<Host>, mounted: &Arc<Mounted>, signals: &Signals) {
    if std::process::id() == 1 {
        end_leftovers(signals);
    }
    let work = std::thread::Builder::new().name("unmount".into()).spawn({
        let mounted = mounted.clone();
        move || mounted.unmount(HOLD_GRACE)
    });
    match work {
        Ok(work) => {
            while !work.is_finished() {
                match signals.next(POLL) {
                    Some(signal) if signals::ends(signal) => mounted.hurry(),
                    Some(_) | None => {}
                }
            }
            match work.join() {
                Ok(Ok(())) => {}
                // The command's own code counts; this is for whoever reads the log.
                Ok(Err(error)) => tracing::error!("{} [{}]", error.chain(), error.code()),
                Err(_) => tracing::error!("the thread that unmounts died"),
            }
        }
        Err(error) => tracing::error!("cannot start a thread to unmount: {error}"),
    }
    mounted.close_control();
    if let Err(error) = host.stop() {
        tracing::debug!("{}", error.chain());
    }
}

/// Everything else in a container whose first process we are: it would be killed with us in any case, and until then holds
/// the mount.
fn end_leftovers(signals: &Signals) {
    for (signal, grace) in [(libc::SIGTERM, LEFTOVER_GRACE), (libc::SIGKILL, LEFTOVER_GRACE)] {
        // -1: every process that we may signal, without ourselves.
        if processes::tell(-1, signal).is_err() {
            return;
        }
        let until = Instant::now() + grace;
        while processes::reap(|_| {}) && Instant::now() < until {
            signals.next(POLL);
        }
    }
}
