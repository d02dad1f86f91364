//! What the HTTP doors of this program have in common: a Unix socket that is not taken away from the living, and connections
//! that are bounded in length and time.
//!
//! Promises: a socket in use is never replaced, one that nobody answers on is; a head is at most [`HEAD_BYTES_MAX`] long and
//! comes within [`HEAD_TIMEOUT`]; one request a connection.
//! Not here: who may come in, and what is answered (`plugin`, `observe`).
//! Held by: the tests of `plugin::http` and `observe::server`.

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
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => refuse!(Usage, "{} is there and is no socket", path.display()),
            Ok(_) if UnixStream::connect(path).is_ok() => {
                refuse!(Usage, "somebody answers on {} already: {whose}", path.display())
            }
            Ok(_) => std::fs::remove_file(path).map_err(|e| fault("remove the dead socket", e))?,
            Err(_) => {}
        }
        let socket = UnixListener::bind(path).map_err(|e| fault("listen on", e))?;
        let listening = Listening { socket, file: Some(path.to_owned()), retired: AtomicBool::new(false) };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(|e| fault("protect", e))?;
        Ok(listening)
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

/// One request on `stream`, answered by `answer`. An answer's time is its own to bound.
pub async fn converse<S, F, A>(stream: S, answer: F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
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
    if let Err(failed) = done {
        tracing::debug!("a connection ended early: {failed}");
    }
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
