//! The caller's side of the control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{
    LINE_TIMEOUT, REPLY_BYTES_MAX, ReplyLine, Request, RequestLine, canonical_mountpoint, check_peer, code_named,
    read_line, socket_dir, socket_path, write_line,
};
use crate::error::{Code, Error, Result};

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
    let canonical = canonical_mountpoint(mountpoint)?;
    let socket = socket_path(&canonical)?;
    ask_at(&socket, request, wait).map_err(|e| {
        if e.code() == Code::NotMounted {
            return Error::new(
                Code::NotMounted,
                format!("no modelfs mount of this user answers at {}", canonical.display()),
            );
        }
        e
    })
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
    check_peer(&stream)?;
    write_line(&stream, &RequestLine { request })?;
    let line = read_line(&stream, REPLY_BYTES_MAX, wait.max(LINE_TIMEOUT))?;
    match serde_json::from_slice(&line) {
        Ok(ReplyLine::Ok(value)) => Ok(value),
        Ok(ReplyLine::Error { code, message }) => Err(Error::new(code_named(&code), message)),
        Err(e) => Err(Error::new(Code::Host, "the mount's answer is not a reply of this program").with_source(e)),
    }
}

/// Every mount of this user that has a socket, asked for its status; sockets whose owner is gone are removed.
pub fn list_mounts() -> Result<Vec<MountInfo>> {
    list_mounts_in(&socket_dir()?)
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
            Err(e) if e.code() == Code::NotMounted => drop(std::fs::remove_file(&socket)),
            status => mounts.push(MountInfo { socket, status }),
        }
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listing_removes_a_socket_whose_owner_is_gone() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let stale = dir.path().join("0123.sock");
        drop(std::os::unix::net::UnixListener::bind(&stale).expect("bound"));

        let mounts = list_mounts_in(dir.path()).expect("listed");

        assert!(mounts.is_empty(), "{mounts:?}");
        assert!(!stale.exists());
    }

    #[test]
    fn a_mountpoint_without_a_daemon_is_not_mounted() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let err = ask_at(&dir.path().join("none.sock"), Request::Status, LINE_TIMEOUT).expect_err("nobody there");
        assert_eq!(err.code(), Code::NotMounted);
    }
}
