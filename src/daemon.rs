//! The life of a process that is one mount.
//!
//! In: a checked [`MountPlan`]. Out: when it ended, and how.
//! Promises: every refusal comes before the mount; SIGTERM, SIGINT, `umount` and `modelfs umount` all end with the mount
//! gone, keys and plaintext wiped, while a store is waited for too, and as process 1 of a container; a second signal ends the grace that programs have to let go; SIGHUP reloads, and never
//! ends anything.
//! Not here: what mounting and ending are (`host`), going into the background (`cli`).
//! Held by: tests/mount.rs, tests/e2e.sh.

use std::sync::Arc;

use tokio::signal::unix::{Signal, SignalKind};

use crate::config::MountPlan;
use crate::error::{Code, Error, Result};
use crate::host::{Decision, HOLD_GRACE, Host, HostPlan, Mounted, listen_for};
use crate::ready::await_store;
use crate::{mem, mounts, notify};

pub use crate::host::Ready;

/// Mounts, serves until told to stop, wipes. `ready` is called once programs can use the mount.
///
/// # Errors
/// Whatever refused the mount; `HELD` if programs still held files at the end.
pub fn run(plan: MountPlan, ready: impl FnOnce(&Ready)) -> Result<()> {
    let ended = live(plan, ready);
    if let Err(error) = &ended {
        notify::service().failed(error);
    }
    ended
}

fn live(mut plan: MountPlan, ready: impl FnOnce(&Ready)) -> Result<()> {
    let host = Host::start_alone(&HostPlan { cache_bytes: plan.cache_bytes, oversight: plan.oversight.clone() })?;
    let runtime = host.runtime().clone();
    plan.access.store.telemetry = host.telemetry().clone();
    // Before anything is waited for: to process 1 of a container the kernel delivers no signal that has no handler.
    let mut signals = {
        let _in_runtime = runtime.enter();
        Signals::listen()?
    };
    let (mounted, told_early) = runtime.block_on(mount_unless_told(&host, plan, &mut signals))?;
    ready(mounted.ready());
    notify::service().ready(&mounted.told());
    notify::service().watch(&runtime, {
        let mounted = mounted.clone();
        move || mounts::answers(mounted.mountpoint())
    });

    let mut gone = mounted.gone();
    let reason = runtime.block_on(async {
        if let Some(signal) = told_early {
            return signal;
        }
        loop {
            tokio::select! {
                told = signals.next() => match told {
                    Told::Stop(signal) => return signal,
                    Told::Reload => reload(&mounted),
                },
                // The sender lives as long as the mount.
                _ = gone.wait_for(|gone| *gone) => return "unmounted",
            }
        }
    });
    tracing::info!("stopping: {reason}");
    notify::service().stopping(&format!("stopping: {reason}"));
    let outcome = runtime.block_on(async {
        let ending = tokio::task::spawn_blocking({
            let mounted = mounted.clone();
            move || mounted.unmount(HOLD_GRACE)
        });
        tokio::pin!(ending);
        loop {
            tokio::select! {
                ended = &mut ending => {
                    return ended.unwrap_or_else(|e| Err(Error::new(Code::Host, "unmounting died").with_source(e)));
                }
                told = signals.next() => match told {
                    Told::Stop(_) => mounted.hurry(),
                    Told::Reload => {}
                },
            }
        }
    });
    // Whoever asked for the end hears of it before the process is gone.
    mounted.close_control();
    // Only a mount that could not be ended is still listed; the first answer says why.
    if let Err(error) = host.stop() {
        tracing::debug!("{}", error.chain());
    }
    outcome
}

/// Waits for the store and mounts, unless told to stop before anything is in the tree: a store that says nothing keeps nobody
/// waiting. Told later than that, the mount is made whole first, and the signal handed back.
async fn mount_unless_told(
    host: &Arc<Host>,
    mut plan: MountPlan,
    signals: &mut Signals,
) -> Result<(Arc<Mounted>, Option<&'static str>)> {
    let decision = Decision::default();
    let opening = tokio::task::spawn_blocking({
        let (host, decision) = (host.clone(), decision.clone());
        move || {
            await_store(&mut plan, host.runtime())?;
            host.mount_if(plan, || decision.enter())
        }
    });
    tokio::pin!(opening);
    let mut told_early = None;
    loop {
        tokio::select! {
            mounted = &mut opening => {
                let mounted = mounted.unwrap_or_else(|e| Err(Error::new(Code::Host, "mounting died").with_source(e)))?;
                return Ok((mounted, told_early));
            }
            told = signals.next() => if let Told::Stop(signal) = told {
                // As if nothing listened; the thread that still asks the store ends with the process.
                if decision.give_up() {
                    mem::end_by(if signal == "SIGINT" { libc::SIGINT } else { libc::SIGTERM });
                }
                told_early = Some(signal);
            }
        }
    }
}

fn reload(mounted: &Arc<Mounted>) {
    let mounted = mounted.clone();
    // Ends with the runtime; a panic in there was told where it happened.
    tokio::task::spawn_blocking(move || match mounted.reload(None) {
        Ok(_) => {}
        Err(error) => tracing::error!("not reloaded, nothing changed: {}", error.chain()),
    });
}

enum Told {
    Stop(&'static str),
    Reload,
}

/// How a process is told.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn listen() -> Result<Signals> {
        Ok(Signals {
            terminate: listen_for(SignalKind::terminate())?,
            interrupt: listen_for(SignalKind::interrupt())?,
            hangup: listen_for(SignalKind::hangup())?,
        })
    }

    /// # Cancel safety
    /// No signal is lost.
    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Told::Stop("SIGINT"),
            _ = self.hangup.recv() => Told::Reload,
        }
    }
}
