//! The mount's side of the control socket.
//!
//! One thread listens, one more answers each connection, at most [`CONNECTIONS_MAX`] at once. It needs no async runtime,
//! so `status` is answered while the store hangs.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use super::{
    LINE_TIMEOUT, REQUEST_BYTES_MAX, ReplyLine, Request, RequestLine, check_peer, own_dir, read_line, write_line,
};
use crate::error::{Code, Error, Result};

/// More callers than this at once wait in the kernel's queue, then are turned away.
const CONNECTIONS_MAX: usize = 8;

/// What a running mount does when it is asked. Called from the socket's threads; must not hold locks that reads need.
pub trait ControlTarget: Send + Sync {
    /// The state of the mount: `mountpoint`, `store`, `pid`, `models`, `metrics`, ... Never key material.
    fn status(&self) -> serde_json::Value;

    /// Unmounts and wipes, and answers when that is done: the end of the process follows. Bounded in time.
    ///
    /// # Errors
    /// `Held` naming who still held files when the mount was detached.
    fn stop(&self) -> Result<serde_json::Value>;
}

/// The listening socket; dropping it stops listening, lets a reply under way finish, and removes the socket file.
pub struct ControlServer {
    path: PathBuf,
    retired: AtomicBool,
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// Listens for `mountpoint` (canonical).
///
/// # Errors
/// `MountPoint` if a living mount already answers there; `State` if the folder is not ours alone.
pub fn serve(mountpoint: &Path, target: Arc<dyn ControlTarget>) -> Result<ControlServer> {
    serve_at(super::socket_path(mountpoint)?, target)
}

pub(super) fn serve_at(path: PathBuf, target: Arc<dyn ControlTarget>) -> Result<ControlServer> {
    own_dir(path.parent().expect("a socket path is a folder and a name"))?;
    if path.symlink_metadata().is_ok() {
        if UnixStream::connect(&path).is_ok() {
            return Err(Error::new(
                Code::MountPoint,
                "a modelfs mount already answers for this mountpoint; `modelfs umount` it first",
            ));
        }
        remove(&path);
    }
    let fault = |what: &str, e: io::Error| Error::new(Code::State, format!("{what} {}", path.display())).with_source(e);
    let listener = UnixListener::bind(&path).map_err(|e| fault("cannot listen on", e))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(|e| fault("cannot protect", e))?;
    listener.set_nonblocking(true).map_err(|e| fault("cannot listen on", e))?;
    // SAFETY: eventfd takes no pointers; the descriptor is owned by nobody else.
    let wake = unsafe {
        let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        if fd < 0 {
            return Err(Error::os(Code::Host, "cannot make an eventfd"));
        }
        OwnedFd::from_raw_fd(fd)
    };
    let wake_seen = wake.try_clone().map_err(|e| fault("cannot listen on", e))?;
    let thread = std::thread::Builder::new()
        .name("control".into())
        .spawn(move || listen(&listener, &wake_seen, &target))
        .map_err(|e| fault("cannot start a thread for", e))?;
    Ok(ControlServer { path, retired: AtomicBool::new(false), wake, thread: Some(thread) })
}

impl ControlServer {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the socket's name away, so that the next mount on this mountpoint finds the place free; replies under way go
    /// on. Call it before the last answer is given: whoever hears it may mount again at once.
    pub fn retire(&self) {
        if !self.retired.swap(true, Ordering::AcqRel) {
            remove(&self.path);
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // Gone first: who comes now finds nothing, instead of a socket that nobody answers.
        // Only once: by now the name may be the next mount's.
        self.retire();
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes from a live array to an eventfd we own.
        unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn remove(path: &Path) {
    if let Err(e) = std::fs::remove_file(path)
        && e.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), error = %e, "cannot remove the control socket");
    }
}

fn listen(listener: &UnixListener, wake: &OwnedFd, target: &Arc<dyn ControlTarget>) {
    let busy = Arc::new(AtomicUsize::new(0));
    loop {
        let mut fds = [
            libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: wake.as_raw_fd(), events: libc::POLLIN, revents: 0 },
        ];
        // SAFETY: the array outlives the call and its length is passed.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if fds[1].revents != 0 {
            break;
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
            Err(e) => {
                tracing::warn!(error = %e, "the control socket cannot accept");
                // Out of descriptors: the condition lasts; without a pause this loop would burn a core.
                std::thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
        };
        if busy.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
            busy.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (target, busy_now) = (Arc::clone(target), Arc::clone(&busy));
        let spawned = std::thread::Builder::new().name("control-reply".into()).spawn(move || {
            answer(&stream, &*target);
            busy_now.fetch_sub(1, Ordering::AcqRel);
        });
        if spawned.is_err() {
            busy.fetch_sub(1, Ordering::AcqRel);
        }
    }
    // A `stop` caller must get its reply before the process ends; nobody may hold the exit up for longer than a line.
    let until = std::time::Instant::now() + LINE_TIMEOUT;
    while busy.load(Ordering::Acquire) > 0 && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn answer(stream: &UnixStream, target: &dyn ControlTarget) {
    let result = stream
        .set_nonblocking(false)
        .map_err(|e| Error::new(Code::Host, "cannot use the control socket").with_source(e))
        .and_then(|()| check_peer(stream))
        .and_then(|()| read_line(stream, REQUEST_BYTES_MAX, LINE_TIMEOUT))
        .and_then(|line| {
            serde_json::from_slice::<RequestLine>(&line)
                .map_err(|e| Error::new(Code::Usage, "the control socket got an unknown request").with_source(e))
        })
        .and_then(|line| match line.request {
            Request::Status => Ok(target.status()),
            Request::Stop => target.stop(),
        });
    let reply = match result {
        Ok(value) => ReplyLine::Ok(value),
        Err(e) => ReplyLine::Error { code: e.code().name().into(), message: e.chain() },
    };
    if let Err(e) = write_line(stream, &reply) {
        tracing::debug!(error = %e.chain(), "a control caller left before its answer");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Duration;

    use super::super::ask_at;
    use super::*;

    struct Fake;
    impl ControlTarget for Fake {
        fn status(&self) -> serde_json::Value {
            serde_json::json!({"mountpoint": "/mnt/x", "pid": 7})
        }
        fn stop(&self) -> Result<serde_json::Value> {
            Err(Error::new(Code::Held, "pid 12 (python) holds acme/model.safetensors"))
        }
    }

    fn served() -> (tempfile::TempDir, ControlServer) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let server = serve_at(dir.path().join("run/a.sock"), Arc::new(Fake)).expect("served");
        (dir, server)
    }

    #[test]
    fn a_request_is_answered_and_an_error_keeps_its_code() {
        let (_dir, server) = served();
        let status = ask_at(server.path(), Request::Status, Duration::from_secs(5)).expect("an answer");
        assert_eq!(status["pid"], 7);

        let err = ask_at(server.path(), Request::Stop, Duration::from_secs(5)).expect_err("held");

        assert_eq!(err.code(), Code::Held);
        assert!(err.chain().contains("pid 12"), "{err:?}");
    }

    #[test]
    fn the_folder_and_the_socket_are_closed_to_others() {
        let (_dir, server) = served();
        let mode = |path: &Path| std::fs::symlink_metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(server.path()), 0o600);
        assert_eq!(mode(server.path().parent().expect("folder")), 0o700);
    }

    #[test]
    fn a_folder_open_to_others_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let run = dir.path().join("run");
        std::fs::create_dir(&run).expect("made");
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o777)).expect("opened");

        let err = serve_at(run.join("a.sock"), Arc::new(Fake)).err().expect("refused");

        assert_eq!(err.code(), Code::State, "{err:?}");
    }

    #[test]
    fn a_second_mount_is_refused_while_the_first_lives_and_a_stale_socket_is_replaced() {
        let (dir, server) = served();
        let path = server.path().to_path_buf();
        assert_eq!(serve_at(path.clone(), Arc::new(Fake)).err().expect("refused").code(), Code::MountPoint);
        drop(server);
        assert!(!path.exists(), "dropping removes the socket");
        drop(UnixListener::bind(&path).expect("a socket whose owner is gone"));
        assert!(path.exists());

        let again = serve_at(path, Arc::new(Fake)).expect("a stale socket is replaced");

        assert!(ask_at(again.path(), Request::Status, Duration::from_secs(5)).is_ok());
        drop(dir);
    }

    #[test]
    fn an_endless_request_is_cut_off_and_an_unknown_one_is_named() {
        let (_dir, server) = served();
        for (sent, wanted) in
            [(vec![b'x'; REQUEST_BYTES_MAX + 2], "longer than"), (b"{\"request\":\"fly\"}\n".to_vec(), "unknown")]
        {
            let mut stream = UnixStream::connect(server.path()).expect("connects");
            stream.write_all(&sent).expect("sent");
            let mut reply = String::new();
            let _ = stream.read_to_string(&mut reply);
            assert!(reply.contains(wanted), "{reply}");
        }
    }
}
