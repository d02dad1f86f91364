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

/// Mounts that are asked for their status at once.
const ASKED_AT_ONCE: usize = 32;

/// A mount that answered, or that is too busy to.
#[derive(Debug)]
pub struct MountInfo {
    pub socket: PathBuf,
    /// By the mount table, where it does not say itself.
    pub mountpoint: Option<PathBuf>,
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
/// them a role; asked for its status, for which each has `wait`. Sockets whose owner is gone are removed.
pub fn list_mounts(wait: Duration) -> Result<Vec<MountInfo>> {
    let mut listed = Vec::new();
    for dir in socket_dirs()? {
        if dir == Path::new(ROOT_DIR) && !crate::config::env_dirs().root {
            listed.extend(list_roots_mounts(wait)?);
        } else {
            listed.extend(list_mounts_in(&dir, wait)?);
        }
    }
    name_the_silent(&mut listed, || mounts::below(Path::new("/")).unwrap_or_default());
    Ok(listed)
}

/// Which mounts those are that do not answer.
fn name_the_silent(listed: &mut [MountInfo], table: impl FnOnce() -> Vec<(PathBuf, mounts::Mount)>) {
    if listed.iter().all(|one| one.status.is_ok()) {
        return;
    }
    let ours = table().into_iter().filter(|(_, mount)| mount.is_ours());
    let places: Vec<(String, PathBuf)> = ours.map(|(place, _)| (socket_name(&place), place)).collect();
    for one in listed.iter_mut().filter(|one| one.status.is_err()) {
        let of = |(name, _): &&(String, PathBuf)| one.socket.file_name().is_some_and(|file| file == name.as_str());
        one.mountpoint = places.iter().find(of).map(|(_, place)| place.clone());
    }
}

/// All at once, [`ASKED_AT_ONCE`] at a time: on a machine that stands still each takes as long as it may.
fn ask_all(sockets: &[PathBuf], wait: Duration) -> Vec<MountInfo> {
    let ask = |socket: &PathBuf| MountInfo {
        status: ask_at(socket, Request::Status, wait),
        socket: socket.clone(),
        mountpoint: None,
    };
    let mut answered = Vec::with_capacity(sockets.len());
    for some in sockets.chunks(ASKED_AT_ONCE) {
        answered.extend(std::thread::scope(|scope| {
            let asked: Vec<_> = some.iter().map(|socket| scope.spawn(move || ask(socket))).collect();
            asked.into_iter().map(|asked| asked.join().expect("asking does not panic")).collect::<Vec<_>>()
        }));
    }
    answered
}

/// Their folder can be passed through and not listed: the mount table says which sockets there may be.
fn list_roots_mounts(wait: Duration) -> Result<Vec<MountInfo>> {
    let ours = mounts::below(Path::new("/"))?.into_iter().filter(|(_, mount)| mount.is_ours());
    let mut sockets: Vec<PathBuf> = ours.map(|(place, _)| Path::new(ROOT_DIR).join(socket_name(&place))).collect();
    sockets.sort();
    sockets.dedup();
    // A mount that does not know us is none of ours to tell of.
    let known = |one: &MountInfo| match &one.status {
        Err(e) => e.code() != Code::NotMounted && e.code() != Code::StoreDenied && !is_closed(e),
        Ok(_) => true,
    };
    Ok(ask_all(&sockets, wait).into_iter().filter(known).collect())
}

fn list_mounts_in(dir: &Path, wait: Duration) -> Result<Vec<MountInfo>> {
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
    let mut mounts = ask_all(&sockets, wait);
    mounts.retain(|one| match &one.status {
        // Only a refused connection says that nobody listens any more.
        Err(e) if e.code() == Code::NotMounted => {
            remove_dead(&one.socket);
            false
        }
        Ok(_) | Err(_) => true,
    });
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

        let mounts = list_mounts_in(dir.path(), LINE_TIMEOUT).expect("listed");

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
        assert!(list_mounts_in(dir.path(), LINE_TIMEOUT).expect("listed").is_empty() && young.exists());
        drop(turn);
        // A program that another test starts just now has inherited the turn, until it runs.
        let until = std::time::Instant::now() + Duration::from_secs(120);
        while young.exists() {
            assert!(list_mounts_in(dir.path(), LINE_TIMEOUT).expect("listed").is_empty());
            assert!(std::time::Instant::now() < until, "it stays");
        }
    }

    #[test]
    fn a_mount_that_does_not_answer_is_listed_by_the_place_it_has_in_the_mount_table() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let silent = dir.path().join(socket_name(Path::new("/mnt/m")));
        // Connections wait in its queue.
        let _listener = std::os::unix::net::UnixListener::bind(&silent).expect("bound");
        let mut listed = list_mounts_in(dir.path(), Duration::ZERO).expect("listed");
        assert_eq!(listed[0].status.as_ref().expect_err("silent").code(), Code::Deadline);
        let mount = |kind: &str| mounts::Mount { device: "0:1".into(), kind: kind.into(), source: "x".into() };
        let table = vec![("/".into(), mount("ext4")), ("/mnt/m".into(), mount("fuse.modelfs"))];
        name_the_silent(&mut listed, || table);
        assert_eq!(listed[0].mountpoint.as_deref(), Some(Path::new("/mnt/m")));
    }

    #[test]
    fn a_mountpoint_without_a_daemon_is_not_mounted() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let err = ask_at(&dir.path().join("none.sock"), Request::Status, LINE_TIMEOUT).expect_err("nobody there");
        assert_eq!(err.code(), Code::NotMounted);
    }
}
