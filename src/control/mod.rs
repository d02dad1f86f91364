//! How `status` and `umount` talk to a running mount: one unix socket a mount, one JSON line each way.
//!
//! In: a mountpoint (either side computes the same socket path from it) and, on the server's side, a [`ControlTarget`].
//! Out: the target's answer, or its error with the same code the daemon had.
//! Promises: only the mounting user and root are answered (the folder is 0700, the socket 0600, and the kernel's word on
//! the peer is checked as well); no request or reply is longer than its limit; no wait is without a deadline; no key or
//! plaintext ever passes here.
//! Not here: what status says and what stopping does (`daemon`).
//! Held by: the tests in `server.rs`, tests/cli.rs.

mod client;
mod holders;
mod server;

pub use client::{MountInfo, ask, ask_at, list_mounts};
pub use holders::{Holder, holders, tell_holders};
pub use server::{ControlServer, ControlTarget, serve};

use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error, Result};

/// A request is a word or two.
pub const REQUEST_BYTES_MAX: usize = 4 << 10;
/// A status names every model and counter; a store of 10,000 models fits.
pub const REPLY_BYTES_MAX: usize = 8 << 20;
/// How long either side may take to send its line once connected.
pub const LINE_TIMEOUT: Duration = Duration::from_secs(5);

/// What can be asked of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// What is mounted, from where, and every counter.
    Status,
    /// Unmount, wipe and end; the answer comes when it is done.
    Stop,
}

#[derive(Debug, Serialize, Deserialize)]
struct RequestLine {
    request: Request,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ReplyLine {
    Ok(serde_json::Value),
    Error { code: String, message: String },
}

/// An error as one JSON object: the shape `--json` prints and the socket carries.
pub fn error_json(error: &Error) -> serde_json::Value {
    serde_json::json!({
        "code": error.code().name(),
        "class": error.class().name(),
        "exit": error.class().exit_code(),
        "message": crate::telemetry::scrub(&error.chain()),
    })
}

/// The code of a name from the other side; one this build does not know is a failure of the host.
pub(crate) fn code_named(name: &str) -> Code {
    Code::ALL.iter().copied().find(|code| code.name() == name).unwrap_or(Code::Host)
}

/// The one name of a mountpoint: absolute, no links, although the mount on it may be dead.
///
/// A dead FUSE mount answers ENOTCONN to whoever looks at it, so then only its parent is resolved.
pub fn canonical_mountpoint(mountpoint: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(mountpoint)
        .map_err(|e| Error::new(Code::Usage, "the mountpoint is an empty path").with_source(e))?;
    match std::fs::canonicalize(&absolute) {
        Ok(path) => Ok(path),
        Err(first) => {
            let parent = absolute.parent().and_then(|parent| std::fs::canonicalize(parent).ok());
            match (parent, absolute.file_name(), first.raw_os_error()) {
                (Some(parent), Some(name), Some(libc::ENOTCONN | libc::EIO | libc::EACCES)) => Ok(parent.join(name)),
                _ => Err(Error::new(Code::MountPoint, format!("mountpoint {} cannot be used", mountpoint.display()))
                    .with_source(first)),
            }
        }
    }
}

/// Where sockets of this user's mounts lie: /run/modelfs for root, else the runtime folder, else the state folder.
pub fn socket_dir() -> Result<PathBuf> {
    crate::config::env_dirs().control_dir()
}

/// The socket of a mount. `mountpoint` is canonical.
pub fn socket_path(mountpoint: &Path) -> Result<PathBuf> {
    Ok(socket_dir()?.join(format!("{:016x}.sock", path_hash(mountpoint))))
}

/// FNV-1a, 64 bits: a short, stable file name. Not a promise: the reply says which mountpoint it is for.
fn path_hash(path: &Path) -> u64 {
    path.as_os_str()
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Makes the folder if it is missing; refuses one that others could have put sockets into.
fn own_dir(dir: &Path) -> Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| {
        Error::new(Code::State, format!("cannot make the folder {} for the control socket", dir.display()))
            .with_source(e)
    })?;
    let meta = std::fs::symlink_metadata(dir)
        .map_err(|e| Error::new(Code::State, format!("cannot look at {}", dir.display())).with_source(e))?;
    // SAFETY: geteuid only reads this process's credentials.
    let own_uid = unsafe { libc::geteuid() };
    if !meta.is_dir() || meta.uid() != own_uid || meta.mode() & 0o077 != 0 {
        return Err(Error::new(
            Code::State,
            format!(
                "{} must be a folder of uid {own_uid} with mode 0700, it has uid {} and mode {:04o}; chmod 700 it",
                dir.display(),
                meta.uid(),
                meta.mode() & 0o7777
            ),
        ));
    }
    Ok(())
}

/// Who is at the other end, as the kernel noted when it connected or listened.
fn peer_uid(stream: &UnixStream) -> Result<(u32, i32)> {
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `cred` and `len` outlive the call and `len` is the size of `cred`.
    let rc = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut cred).cast(), &raw mut len)
    };
    if rc != 0 || len as usize != size_of::<libc::ucred>() {
        return Err(Error::os(Code::Host, "cannot learn who is at the other end of the control socket"));
    }
    Ok((cred.uid, cred.pid))
}

/// The same user or root.
fn check_peer(stream: &UnixStream) -> Result<()> {
    let (uid, _) = peer_uid(stream)?;
    // SAFETY: geteuid only reads this process's credentials.
    let own = unsafe { libc::geteuid() };
    if uid == own || uid == 0 {
        return Ok(());
    }
    Err(Error::new(Code::StoreDenied, format!("the control socket answers uid {own} and root, not uid {uid}")))
}

/// One line of at most `max` bytes, all of it before `deadline` counted from now.
fn read_line(stream: &UnixStream, max: usize, deadline: Duration) -> Result<Vec<u8>> {
    use std::io::Read;
    let until = std::time::Instant::now() + deadline;
    let mut line = Vec::new();
    let mut piece = [0u8; 4096];
    let mut from = stream;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Err(Error::new(
                Code::Deadline,
                format!("no whole line on the control socket within {} s", deadline.as_secs()),
            ));
        }
        stream
            .set_read_timeout(Some(left))
            .map_err(|e| Error::new(Code::Host, "cannot set a deadline on the control socket").with_source(e))?;
        let got = match from.read(&mut piece) {
            Ok(0) => return Err(Error::new(Code::Host, "the other side of the control socket went away")),
            Ok(got) => got,
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => continue,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::new(Code::Host, "the control socket broke").with_source(e)),
        };
        if let Some(end) = piece[..got].iter().position(|byte| *byte == b'\n') {
            line.extend_from_slice(&piece[..end]);
            return if line.len() <= max { Ok(line) } else { Err(too_long(max)) };
        }
        line.extend_from_slice(&piece[..got]);
        if line.len() > max {
            return Err(too_long(max));
        }
    }
}

fn too_long(max: usize) -> Error {
    Error::new(Code::Usage, format!("a line on the control socket is longer than {max} bytes"))
}

fn write_line(stream: &UnixStream, value: &impl Serialize) -> Result<()> {
    use std::io::Write;
    let mut bytes = serde_json::to_vec(value).expect("our own structs of plain values are JSON");
    bytes.push(b'\n');
    stream
        .set_write_timeout(Some(LINE_TIMEOUT))
        .and_then(|()| { stream }.write_all(&bytes))
        .map_err(|e| Error::new(Code::Host, "cannot write to the control socket").with_source(e))
}
