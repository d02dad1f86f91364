//! The caller's side of the control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{
    HTTP_EXTENSION, LINE_TIMEOUT, REPLY_BYTES_MAX, ROOT_DIR, ReplyLine, Request, RequestLine, Turn, check_daemon,
    code_named, read_line, socket_dirs, socket_name, write_line,
};
use crate::door;
use crate::error::{Code, Error, Result};
use crate::mounts;

/// A mount that answered, or that is too busy to.
#[derive(Debug)]
pub struct MountInfo {
    pub socket: PathBuf,
    pub status: Result<serde_json::Value>,
}

/// Asks the mount at `mountpoint` (as typed) and waits at most `wait` for its answer.
///
/// # Errors
/// `NotMounted` if no daemon of this user answers there; else the daemon's own error.
pub fn ask(mountpoint: &Path, request: Request, wait: Duration) -> Result<serde_json::Value> {
    let canonical = mounts::canonical(mountpoint)?;
    for dir in socket_dirs()? {
        match ask_at(&dir.join(socket_name(&canonical)), request.clone(), wait) {
            Err(e) if e.code() == Code::NotMounted => {}
            // One of root's that names nobody a role, or none at all: from outside they look the same.
            Err(e) if dir == Path::new(ROOT_DIR) && is_closed(&e) => {}
            answered => return answered,
        }
    }
    Err(Error::new(
        Code::NotMounted,
        format!("no modelfs mount of this user, or that gives this user a role, answers at {}", canonical.display()),
    ))
}

/// Whether a socket was there and not for us to open.
fn is_closed(error: &Error) -> bool {
    error.code() == Code::Host
        && std::error::Error::source(error)
            .and_then(|source| source.downcast_ref::<io::Error>())
            .is_some_and(|source| source.kind() == io::ErrorKind::PermissionDenied)
}

/// The same at a known socket.
pub fn ask_at(socket: &Path, request: Request, wait: Duration) -> Result<serde_json::Value> {
    let stream = UnixStream::connect(socket).map_err(|e| {
        let code = match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Code::NotMounted,
            _ => Code::Host,
        };
        Error::new(code, format!("cannot reach the control socket {}", socket.display())).with_source(e)
    })?;
    ask_over(&stream, socket, request, wait)
}

/// The same over a connection to `socket`.
pub(super) fn ask_over(
    stream: &UnixStream,
    socket: &Path,
    request: Request,
    wait: Duration,
) -> Result<serde_json::Value> {
    check_daemon(stream, socket)?;
    let sent = write_line(stream, &RequestLine { request });
    // Whoever is turned away is told so before he has said what he wants.
    let line =
        read_line(stream, REPLY_BYTES_MAX, wait.max(LINE_TIMEOUT)).map_err(|unheard| sent.err().unwrap_or(unheard))?;
    match serde_json::from_slice(&line) {
        Ok(ReplyLine::Ok(value)) => Ok(value),
        Ok(ReplyLine::Error { code, message }) => Err(Error::new(code_named(&code), message)),
        Err(e) => Err(Error::new(Code::Host, "the mount's answer is not a reply of this program").with_source(e)),
    }
}

/// Every mount of this user that has a socket, for root also those of services, for others also those of root that give
/// them a role; asked for its status. Sockets whose owner is gone are removed.
pub fn list_mounts() -> Result<Vec<MountInfo>> {
    let mut listed = Vec::new();
    for dir in socket_dirs()? {
        if dir == Path::new(ROOT_DIR) && !crate::config::env_dirs().root {
            listed.extend(list_roots_mounts()?);
        } else {
            listed.extend(list_mounts_in(&dir)?);
        }
    }
    Ok(listed)
}

/// Their folder can be passed through and not listed: the mount table says which sockets there may be.
fn list_roots_mounts() -> Result<Vec<MountInfo>> {
    let ours = mounts::below(Path::new("/"))?.into_iter().filter(|(_, mount)| mount.is_ours());
    let mut sockets: Vec<PathBuf> = ours.map(|(place, _)| Path::new(ROOT_DIR).join(socket_name(&place))).collect();
    sockets.sort();
    sockets.dedup();
    let asked =
        sockets.into_iter().map(|socket| MountInfo { status: ask_at(&socket, Request::Status, LINE_TIMEOUT), socket });
    // A mount that does not know us is none of ours to tell of.
    let known = |one: &MountInfo| match &one.status {
        Err(e) => e.code() != Code::NotMounted && e.code() != Code::StoreDenied && !is_closed(e),
        Ok(_) => true,
    };
    Ok(asked.filter(known).collect())
}

fn list_mounts_in(dir: &Path) -> Result<Vec<MountInfo>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::new(Code::State, format!("cannot list {}", dir.display())).with_source(e)),
    };
    let mut sockets: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "sock"))
        .collect();
    sockets.sort();
    let mut mounts = Vec::new();
    for socket in sockets {
        match ask_at(&socket, Request::Status, LINE_TIMEOUT) {
            // Only a refused connection says that nobody listens any more.
            Err(e) if e.code() == Code::NotMounted => remove_dead(&socket),
            status => mounts.push(MountInfo { socket, status }),
        }
    }
    Ok(mounts)
}

/// Takes away a socket that nobody listens on, and what lies beside it. Another time, where somebody is making sockets just
/// now.
fn remove_dead(socket: &Path) {
    let Some(_turn) = Turn::take_free(socket.parent().expect("a socket path is a folder and a name")) else {
        return;
    };
    for dead in [socket, &socket.with_extension(HTTP_EXTENSION)] {
        if let Err(error) = door::remove_dead(dead) {
            tracing::debug!("cannot remove the dead socket {}: {error}", dead.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::door::testing::dead_socket;

    #[test]
    fn listing_removes_a_socket_whose_owner_is_gone() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let stale = dir.path().join("0123.sock");
        dead_socket(&stale);

        let mounts = list_mounts_in(dir.path()).expect("listed");

        assert!(mounts.is_empty(), "{mounts:?}");
        assert!(!stale.exists());
    }

    #[test]
    fn listing_leaves_a_socket_that_is_being_made() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let young = dir.path().join("0123.sock");
        // Bound by then, and not listening yet.
        let turn = Turn::take(dir.path()).expect("free");
        dead_socket(&young);
        assert!(list_mounts_in(dir.path()).expect("listed").is_empty() && young.exists());
        drop(turn);
        // A program that another test starts just now has inherited the turn, until it runs.
        let until = std::time::Instant::now() + Duration::from_secs(120);
        while young.exists() {
            assert!(list_mounts_in(dir.path()).expect("listed").is_empty());
            assert!(std::time::Instant::now() < until, "it stays");
        }
    }

    #[test]
    fn a_mountpoint_without_a_daemon_is_not_mounted() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let err = ask_at(&dir.path().join("none.sock"), Request::Status, LINE_TIMEOUT).expect_err("nobody there");
        assert_eq!(err.code(), Code::NotMounted);
    }
}
