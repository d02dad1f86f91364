//! What a service manager is told, by systemd's notification protocol: ready, what goes on, reloading, stopping, alive.
//!
//! In: NOTIFY_SOCKET and WATCHDOG_USEC, as `config` reads them. Out: datagrams; without a manager nothing.
//! Promises: nothing waits longer than [`SEND_TIMEOUT`] and nothing fails because it could not be told; no message holds a
//! secret; the watchdog is fed only while the runtime and whatever the caller names answer, so that a hung daemon is
//! restarted.
//! Not here: when a mount is ready (`ready`).
//! Held by: the tests below, tests/systemd.sh.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::telemetry::scrub;

/// A manager that is busy reads later; one that hangs must not hang us.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// A status is one line of `systemctl status`.
const STATUS_BYTES_MAX: usize = 1000;

/// The manager of this process, if there is one.
pub struct Service {
    /// Connected.
    socket: Option<UnixDatagram>,
    /// How long it waits for a sign of life before it kills us.
    watchdog: Option<Duration>,
    stopping: AtomicBool,
}

/// The manager that started this process. The environment is read at the first call.
pub fn service() -> &'static Service {
    static SERVICE: OnceLock<Service> = OnceLock::new();
    SERVICE.get_or_init(|| {
        let told = crate::config::service_manager();
        Service::at(told.notify_socket.as_deref(), told.watchdog)
    })
}

impl Service {
    fn at(socket: Option<&OsStr>, watchdog: Option<Duration>) -> Service {
        let connected = socket.map(connect).transpose().unwrap_or_else(|error| {
            tracing::warn!("the service manager cannot be told anything: NOTIFY_SOCKET: {error}");
            None
        });
        Service {
            watchdog: watchdog.filter(|_| connected.is_some()),
            socket: connected,
            stopping: AtomicBool::new(false),
        }
    }

    pub fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// Programs can use what this service is for; also the end of [`Service::reloading`].
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", line(status)));
    }

    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", line(status)));
    }

    /// To be followed by [`Service::ready`], whatever became of it.
    pub fn reloading(&self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}\nSTATUS=looking for newer versions", monotonic_usec()));
    }

    pub fn stopping(&self, status: &str) {
        self.stopping.store(true, Ordering::SeqCst);
        self.send(&format!("STOPPING=1\nSTATUS={}", line(status)));
    }

    /// Why the process is about to end; `systemctl status` shows it when it is gone.
    pub fn failed(&self, error: &Error) {
        self.send(&format!("STATUS={} [{}]", line(&error.chain()), error.code()));
    }

    /// Feeds the watchdog at half of its time, while `runtime` runs what is given to it and `answers` returns true. One that
    /// hangs feeds nothing either. While stopping only the clock counts: the mount is gone then.
    pub fn watch(&'static self, runtime: &tokio::runtime::Handle, answers: impl Fn() -> bool + Send + 'static) {
        let Some(limit) = self.watchdog else { return };
        let runtime = runtime.clone();
        let started = std::thread::Builder::new().name("watchdog".into()).spawn(move || {
            let mut next = Instant::now();
            loop {
                if self.stopping.load(Ordering::SeqCst) || runs(&runtime, limit / 2) && answers() {
                    self.send("WATCHDOG=1");
                } else {
                    tracing::error!(
                        "the mount does not answer itself; the service manager hears nothing until it does"
                    );
                }
                next = tick_after(next, limit / 2, Instant::now());
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        if let Err(error) = started {
            // The manager then kills what nobody vouches for, which is what it is asked for.
            tracing::error!("cannot start the thread that feeds the watchdog: {error}");
        }
    }

    fn send(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::warn!(
                "the service manager was not told `{}`: {error}",
                message.lines().next().unwrap_or_default()
            );
        }
    }
}

/// The tick after the one at `tick`. Those that were missed are left out: one word says as much as ten in a row.
fn tick_after(tick: Instant, period: Duration, now: Instant) -> Instant {
    let next = tick + period;
    if next < now { now + period } else { next }
}

/// Whether the runtime gets to a new task within `limit`.
fn runs(runtime: &tokio::runtime::Handle, limit: Duration) -> bool {
    let (tell, told) = std::sync::mpsc::channel();
    // Nobody listens any more only after the limit.
    runtime.spawn(async move {
        let _ = tell.send(());
    });
    told.recv_timeout(limit).is_ok()
}

/// `/path` or `@name` of the abstract namespace.
fn connect(socket: &OsStr) -> std::io::Result<UnixDatagram> {
    let address = match socket.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(Path::new(socket))?,
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "neither /path nor @name")),
    };
    let connected = UnixDatagram::unbound()?;
    connected.connect_addr(&address)?;
    connected.set_write_timeout(Some(SEND_TIMEOUT))?;
    Ok(connected)
}

/// One line without secrets: what follows a line break would be another message.
fn line(text: &str) -> String {
    let mut text = scrub(text).replace(['\n', '\r', '\0'], " ");
    if text.len() > STATUS_BYTES_MAX {
        let end = (0..=STATUS_BYTES_MAX).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

fn monotonic_usec() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes the timespec we own; this clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::error::Code;

    /// For what comes at some time.
    const PATIENT: Duration = Duration::from_secs(120);

    /// A manager that listens, and a service that speaks to it.
    fn pair(watchdog: Option<Duration>) -> (tempfile::TempDir, UnixDatagram, Service) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("bound");
        manager.set_read_timeout(Some(PATIENT)).expect("a deadline");
        let service = Service::at(Some(path.as_os_str()), watchdog);
        (dir, manager, service)
    }

    fn heard(manager: &UnixDatagram) -> String {
        let mut bytes = [0; 4096];
        let len = manager.recv(&mut bytes).expect("a message");
        String::from_utf8(bytes[..len].to_vec()).expect("text")
    }

    #[test]
    fn every_state_is_told_in_the_words_of_the_protocol() {
        let (_dir, manager, service) = pair(None);
        assert!(service.is_there());
        service.status("model acme/llama: fetching first block");
        assert_eq!(heard(&manager), "STATUS=model acme/llama: fetching first block");
        service.ready("acme/llama version 2");
        assert_eq!(heard(&manager), "READY=1\nSTATUS=acme/llama version 2");
        let before = monotonic_usec();
        service.reloading();
        let told = heard(&manager);
        let since =
            told.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").and_then(|rest| rest.lines().next()).expect("a time");
        assert!((before..=monotonic_usec()).contains(&since.parse().expect("a number")), "{told}");
        service.stopping("SIGTERM");
        assert_eq!(heard(&manager), "STOPPING=1\nSTATUS=SIGTERM");
        service.failed(&Error::new(Code::NoKey, "no given key opens acme/llama"));
        assert_eq!(heard(&manager), "STATUS=no given key opens acme/llama [NO_KEY]");
    }

    #[test]
    fn a_status_cannot_smuggle_a_second_message_or_grow_without_end() {
        let (_dir, manager, service) = pair(None);
        service.status("wrong key\nREADY=1");
        assert_eq!(heard(&manager), "STATUS=wrong key READY=1");
        service.status(&"ä".repeat(STATUS_BYTES_MAX));
        assert!(heard(&manager).len() < STATUS_BYTES_MAX + 20);
    }

    #[test]
    fn an_abstract_socket_is_reached() {
        let name = format!("modelfs-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let manager = UnixDatagram::bind_addr(&address).expect("bound");
        let service = Service::at(Some(OsStr::new(&format!("@{name}"))), None);
        service.ready("here");
        assert_eq!(heard(&manager), "READY=1\nSTATUS=here");
    }

    #[test]
    fn without_a_manager_or_with_one_that_is_gone_nothing_fails() {
        for socket in [None, Some("/nowhere/at/all"), Some("vsock:2:1"), Some("")] {
            let service = Service::at(socket.map(OsStr::new), Some(Duration::from_secs(1)));
            assert!(!service.is_there() && service.watchdog.is_none(), "{socket:?}");
            service.ready("nobody hears it");
        }
        let (dir, manager, service) = pair(None);
        drop((dir, manager));
        service.ready("nobody hears it");
    }

    #[test]
    fn ticks_that_were_missed_are_not_made_up_for() {
        let (period, tick) = (Duration::from_secs(1), Instant::now());
        assert_eq!(tick_after(tick, period, tick + period / 10), tick + period, "on time");
        let late = tick + 10 * period + period / 2;
        assert_eq!(tick_after(tick, period, late), late + period, "after a stall one, and a whole period to the next");
    }

    /// The detector first: it is fed while all is well.
    #[test]
    fn the_watchdog_is_fed_only_while_runtime_and_mount_answer() {
        let (_dir, manager, service) = pair(Some(Duration::from_millis(100)));
        let service: &'static Service = Box::leak(Box::new(service));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().expect("a runtime");
        let well = Arc::new(AtomicBool::new(true));
        service.watch(runtime.handle(), {
            let well = well.clone();
            move || well.load(Ordering::SeqCst)
        });
        for _ in 0..3 {
            assert_eq!(heard(&manager), "WATCHDOG=1");
        }
        let is_silent = || {
            // Any number waits here, if this thread was held up; and some may have been under way.
            manager.set_nonblocking(true).expect("set");
            while manager.recv(&mut [0; 64]).is_ok() {}
            manager.set_nonblocking(false).expect("set");
            manager.set_read_timeout(Some(Duration::from_millis(300))).expect("a deadline");
            let silent = (0..20).any(|_| manager.recv(&mut [0; 64]).is_err());
            manager.set_read_timeout(Some(PATIENT)).expect("a deadline");
            silent
        };

        well.store(false, Ordering::SeqCst);
        assert!(is_silent(), "fed although the mount does not answer");

        well.store(true, Ordering::SeqCst);
        assert_eq!(heard(&manager), "WATCHDOG=1");
        let (release, held) = std::sync::mpsc::channel::<()>();
        runtime.spawn(async move { held.recv() });
        assert!(is_silent(), "fed although the runtime does nothing");
        drop(release);
        assert_eq!(heard(&manager), "WATCHDOG=1");

        well.store(false, Ordering::SeqCst);
        service.stopping("asked to");
        assert!((0..1000).any(|_| heard(&manager).starts_with("STOPPING=1")));
        assert_eq!(heard(&manager), "WATCHDOG=1", "a mount that is gone need not answer");
    }
}
