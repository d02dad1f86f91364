//! What the HTTP doors of this program have in common: a Unix socket that is not taken away from the living, and connections
//! that are bounded in length and time.
//!
//! Promises: a socket in use is never replaced, one that nobody answers on is; a socket listens before it has its name, so
//! that a name which refuses connections is dead; a head is at most [`HEAD_BYTES_MAX`] long and comes within
//! [`HEAD_TIMEOUT`]; one request a connection.
//! Not here: who may come in, and what is answered (`plugin`, `observe`, `control`).
//! Held by: the tests below, those of `plugin::http` and `observe::server`.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::{Code, Error, Result};
use crate::refuse;

pub const HEAD_BYTES_MAX: usize = 16 << 10;
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Names in one folder for sockets that have not got theirs yet, or that are about to lose it.
const PRIVATE_NAMES: u32 = 4096;
/// As often may others take a name that was free a moment ago.
const NAME_TRIES: usize = 8;

/// A listening socket, and whether its file is ours to remove.
pub struct Listening {
    socket: UnixListener,
    file: Option<PathBuf>,
    retired: AtomicBool,
}

impl Listening {
    /// One that somebody else made, and removes.
    pub fn handed_over(socket: UnixListener) -> Listening {
        Listening { socket, file: None, retired: AtomicBool::new(false) }
    }

    /// One of its own at `path`, open to whoever `mode` says: who comes before that is asked who it is all the same.
    /// `whose` says what else may answer there, and what to do then.
    ///
    /// # Errors
    /// `USAGE` if somebody answers there already, or what is there is no socket; `HOST` if it cannot be made.
    pub fn bind(path: &Path, mode: u32, whose: &str) -> Result<Listening> {
        let fault = |what: &str, e: io::Error| {
            Error::new(Code::Host, format!("cannot {what} {}", path.display())).with_source(e)
        };
        if let Some(folder) = path.parent() {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(folder)
                .map_err(|e| fault("make a folder for", e))?;
        }
        for _ in 0..NAME_TRIES {
            match std::fs::symlink_metadata(path) {
                Ok(meta) if !meta.file_type().is_socket() => {
                    refuse!(Usage, "{} is there and is no socket", path.display())
                }
                Ok(_) if UnixStream::connect(path).is_ok() => {
                    refuse!(Usage, "somebody answers on {} already: {whose}", path.display())
                }
                Ok(_) => remove_dead(path).map_err(|e| fault("remove the dead socket", e))?,
                Err(_) => {}
            }
            match place(path, mode) {
                Ok(socket) => {
                    return Ok(Listening { socket, file: Some(path.to_owned()), retired: AtomicBool::new(false) });
                }
                // Another was faster: it is looked at as whatever was there before.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(fault("listen on", e)),
            }
        }
        refuse!(Usage, "others take {} again and again: {whose}", path.display())
    }

    /// For a runtime; inside one.
    pub fn listener(&self) -> io::Result<tokio::net::UnixListener> {
        let socket = self.socket.try_clone()?;
        socket.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(socket)
    }

    /// Takes the socket's name away, once: by a second time the name may be another's.
    pub fn retire(&self) {
        if let Some(file) = self.file.as_ref().filter(|_| !self.retired.swap(true, Ordering::AcqRel)) {
            drop(std::fs::remove_file(file));
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.retire();
    }
}

/// A socket that listens by the time it has its name.
///
/// # Errors
/// `AlreadyExists` if the name is taken, whatever has it.
pub fn place(path: &Path, mode: u32) -> io::Result<UnixListener> {
    loop {
        let (made, socket) = private(path, |made| UnixListener::bind(made))?;
        let placed = std::fs::set_permissions(&made, std::fs::Permissions::from_mode(mode))
            .and_then(|()| std::fs::hard_link(&made, path));
        let lost = std::fs::remove_file(&made).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        match placed {
            Ok(()) => return Ok(socket),
            // Somebody who clears the folder took it away.
            Err(e) if lost && e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
}

/// Takes away a socket that nobody listens on. What has got its name meanwhile keeps it, or has it again in a moment.
pub fn remove_dead(path: &Path) -> io::Result<()> {
    take_dead(path, || ())
}

/// `between`: what others do after it was found dead.
fn take_dead(path: &Path, between: impl FnOnce()) -> io::Result<()> {
    if !is_dead(path) {
        return Ok(());
    }
    between();
    // The name may lead to another by now, and nothing removes a name only if it still leads to what was looked at: under a
    // name of our own it is looked at again.
    let (aside, ()) = private(path, |aside| std::fs::File::create_new(aside).map(drop))?;
    let moved = std::fs::rename(path, &aside);
    if moved.is_ok() && !is_dead(&aside) {
        match std::fs::hard_link(&aside, path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            Ok(()) | Err(_) => {}
        }
    }
    std::fs::remove_file(&aside)?;
    match moved {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether nobody listens on a socket any more. One that we may not connect to, or that is no socket, is none.
fn is_dead(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

/// Makes something by a name of its own beside `path`. The leading dot keeps those away who look for sockets in the folder, as
/// the kubelet does; the name is short, since a socket's path must be.
fn private<T>(path: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    let folder = path.parent().unwrap_or(Path::new(""));
    for number in 0..PRIVATE_NAMES {
        let name = folder.join(format!(".{number:x}"));
        match make(&name) {
            Ok(made) => return Ok((name, made)),
            Err(e) if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::AddrInUse) => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other("every name beside it is taken"))
}

/// One request on `stream`, answered by `answer`. An answer's time is its own to bound. `false`: it was not written to its end.
pub async fn converse<S, F, A>(stream: S, answer: F) -> bool
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<Full<Bytes>>>,
{
    let service = service_fn(|request| {
        let answered = answer(request);
        async move { Ok::<_, Infallible>(answered.await) }
    });
    let done = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES_MAX)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    done.inspect_err(|failed| tracing::debug!("a connection ended early: {failed}")).is_ok()
}

/// Waits at most `limit` until the other end of a Unix socket is closed. `false`: it was, with words of ours unread.
pub async fn was_heard(stream: &mut tokio::net::UnixStream, limit: Duration) -> bool {
    let mut words = [0; 1024];
    let ended = async {
        loop {
            match stream.read(&mut words).await {
                Ok(0) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    };
    // Whoever keeps the connection has what was written to it.
    tokio::time::timeout(limit, ended).await.unwrap_or(true)
}

/// Tells a caller his status before he has said anything, then lets him finish: what is closed with words unread fails at the
/// other end before the answer is read.
pub async fn dismiss(mut stream: impl AsyncRead + AsyncWrite + Unpin, status: StatusCode) -> io::Result<()> {
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.shutdown().await?;
    let mut words = [0; 1024];
    let mut left = HEAD_BYTES_MAX;
    while left > 0 {
        match stream.read(&mut words).await? {
            0 => break,
            got => left = left.saturating_sub(got),
        }
    }
    Ok(())
}

/// An answer of nothing but its status.
pub fn plain(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::testing::dead_socket;
    use super::*;

    fn names(dir: &Path) -> Vec<std::ffi::OsString> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).expect("listed").map(|entry| entry.expect("an entry").file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_socket_listens_before_it_has_its_name_and_takes_no_name_that_is_taken() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a.sock");
        let first = place(&path, 0o600).expect("placed");
        UnixStream::connect(&path).expect("somebody listens");
        assert_eq!(path.metadata().expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(place(&path, 0o600).expect_err("taken").kind(), io::ErrorKind::AlreadyExists);
        drop(first);
        assert_eq!(place(&path, 0o600).expect_err("taken").kind(), io::ErrorKind::AlreadyExists, "dead, and there");
        assert_eq!(names(dir.path()), ["a.sock"], "nothing is left beside it");
    }

    #[test]
    fn names_that_others_left_beside_it_are_passed_over() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for number in 0..20 {
            dead_socket(&dir.path().join(format!(".{number:x}")));
        }
        drop(place(&dir.path().join("a.sock"), 0o600).expect("placed"));
        assert_eq!(names(dir.path()).len(), 21);
    }

    #[test]
    fn what_is_alive_or_gone_is_not_removed_as_dead() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a.sock");
        remove_dead(&path).expect("nothing there");
        let _living = place(&path, 0o600).expect("placed");
        remove_dead(&path).expect("nothing to do");
        UnixStream::connect(&path).expect("still there");
    }

    /// Whoever found a dead socket stands still, and a new owner takes its place meanwhile.
    #[test]
    fn a_socket_that_took_the_place_of_a_dead_one_is_not_removed_for_it() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a.sock");
        dead_socket(&path);
        let mut living = None;
        take_dead(&path, || {
            remove_dead(&path).expect("removed");
            living = Some(place(&path, 0o600).expect("placed"));
        })
        .expect("looked again");
        UnixStream::connect(&path).expect("the new owner's name leads to it");
        assert_eq!(names(dir.path()), ["a.sock"]);
    }

    #[test]
    fn of_two_that_start_at_a_dead_socket_one_listens_and_the_other_is_told() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a.sock");
        dead_socket(&path);
        let mut first = None;
        // The second has found the dead one, and the first is done before it goes on.
        take_dead(&path, || first = Some(Listening::bind(&path, 0o600, "another").expect("bound"))).expect("looked");
        let refused = Listening::bind(&path, 0o600, "another").err().expect("refused");
        assert!(refused.code() == Code::Usage && refused.chain().contains("answers"), "{refused:?}");
        drop(first);
        assert!(!path.exists());
    }
}

#[cfg(test)]
pub mod testing {
    use super::*;

    /// A socket whose owner is gone.
    pub fn dead_socket(path: &Path) {
        drop(UnixListener::bind(path).expect("bound"));
        // A program that another test starts just now has inherited it, until it runs.
        let until = std::time::Instant::now() + Duration::from_secs(120);
        while UnixStream::connect(path).is_ok() {
            assert!(std::time::Instant::now() < until, "somebody listens on {}", path.display());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
