//! How `status`, `top`, `umount`, `lock` and `sessions` talk to a running mount: one unix socket a mount, one JSON line each way.
//!
//! In: a mountpoint (either side computes the same socket path from it) and, on the server's side, a [`ControlTarget`]. The
//! path is the newest mount's: one that was taken off while in use gives it up to its successor.
//! Out: the target's answer, or its error with the same code the daemon had.
//! Promises: only the mounting user and root are answered, and those whom roles name, each what its role may (`roles`): the
//! kernel's word on the peer decides. Without roles the socket is 0600 as well, with them its folder can be passed through
//! and not listed. No request or reply is longer than its limit; no wait is without a deadline; nobody asks without end
//! (`rate`); no key or plaintext ever passes here.
//! Not here: what status says and what stopping does (`daemon`).
//! Held by: the tests in `server.rs`, tests/cli.rs.

mod client;
mod holders;
mod map;
mod rate;
mod roles;
mod server;
mod sessions;

pub use client::{MountInfo, ask, ask_at, list_mounts};
pub use holders::{Holder, holders, tell_holders};
pub use map::{FileMap, FileRow, MapRequest, map};
pub use rate::{PEERS_MAX, Rates};
pub use roles::{Peer, Role, anyone_named};
pub use server::{ControlServer, ControlTarget, Listening, Rules, listen};
pub use sessions::{SessionFile, SessionInfo, Taken, sessions};

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::oversight::RolesPlan;
use crate::error::{Code, Error, Result};

/// A request is a word or two.
pub const REQUEST_BYTES_MAX: usize = 4 << 10;
/// A status names every model and counter; a store of 10,000 models fits.
pub const REPLY_BYTES_MAX: usize = 8 << 20;
/// How long either side may take to send its line once connected.
pub const LINE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a folder is waited for that another has; it is taken for a few system calls.
const TURN_WAIT: Duration = Duration::from_secs(1);

/// How often it is looked meanwhile.
const TURN_POLL: Duration = Duration::from_millis(5);

/// What can be asked of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// What is mounted, from where, and every counter.
    Status,
    /// Resolve again, one model or all, and show what is newer; the answer comes when it is shown.
    Reload { model: Option<String> },
    /// Unmount, wipe and end; the answer comes when it is done.
    Stop,
    /// Give the socket's name up, which the asker needs for the mount that is at the place by now.
    GiveWay,
    /// Which parts of a model's files are in memory.
    Map(MapRequest),
    /// Who may read.
    Access(AccessRequest),
}

impl Request {
    /// What a peer must be to be answered.
    pub const fn needs(&self) -> Role {
        match self {
            Request::Status | Request::Map(_) => Role::Viewer,
            Request::Reload { .. } | Request::Access(_) => Role::Operator,
            Request::Stop | Request::GiveWay => Role::Admin,
        }
    }

    /// Whether somebody may get what he could not get before. Such an order is on record before it is begun; one that only
    /// takes away waits for no record.
    const fn gives(&self) -> bool {
        match self {
            Request::Reload { .. } | Request::Access(AccessRequest::Unlock { .. } | AccessRequest::LetIn { .. }) => {
                true
            }
            Request::Status | Request::Map(_) | Request::Stop | Request::GiveWay => false,
            Request::Access(AccessRequest::Lock { .. } | AccessRequest::Sessions | AccessRequest::ShutOut { .. }) => {
                false
            }
        }
    }

    /// As an event names it: what, and of what.
    fn told(&self) -> String {
        let of = |what: &str, model: &Option<String>| match model {
            Some(model) => format!("{what} {model}"),
            None => what.to_owned(),
        };
        match self {
            Request::Status => "status".into(),
            Request::Map(_) => "map".into(),
            Request::Reload { model } => of("reload", model),
            Request::Stop => "stop".into(),
            Request::GiveWay => "give way".into(),
            Request::Access(AccessRequest::Lock { model }) => of("lock", model),
            Request::Access(AccessRequest::Unlock { model }) => of("unlock", model),
            Request::Access(AccessRequest::Sessions) => "sessions".into(),
            Request::Access(AccessRequest::ShutOut { session, .. }) => format!("shut out {session}"),
            Request::Access(AccessRequest::LetIn { session }) => format!("let in {session}"),
        }
    }
}

/// What can be asked about who may read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessRequest {
    /// Wipe keys and plaintext of one model or all, refuse reads; the answer comes when it is done.
    Lock { model: Option<String> },
    /// Read the keys again and serve.
    Unlock { model: Option<String> },
    /// Who has what open or mapped.
    Sessions,
    /// Refuse opens and reads of a session (`uid=…`, `pid=…`, `container=…`, `pod=…`).
    ShutOut { session: String, seconds: Option<u64>, hard: bool },
    /// The reverse.
    LetIn { session: String },
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

/// Where sockets of this user's mounts lie: /run/modelfs for root, else the runtime folder, else the state folder.
pub fn socket_dir() -> Result<PathBuf> {
    crate::config::env_dirs().control_dir()
}

/// The same, made where it is missing; for whoever has a role it can be passed through.
///
/// # Errors
/// `STATE` for a folder that others could have put sockets into.
pub fn own_socket_dir(roles: &RolesPlan) -> Result<PathBuf> {
    let dir = socket_dir()?;
    own_dir(&dir, anyone_named(roles))?;
    Ok(dir)
}

/// The end of the name of a mount's socket for metrics and health, beside its control socket.
pub const HTTP_EXTENSION: &str = "http";

/// The socket of a mount. `mountpoint` is canonical.
pub fn socket_path(mountpoint: &Path) -> Result<PathBuf> {
    Ok(socket_dir()?.join(socket_name(mountpoint)))
}

fn socket_name(mountpoint: &Path) -> String {
    format!("{:016x}.sock", path_hash(mountpoint))
}

/// Where root's mounts have their sockets.
const ROOT_DIR: &str = "/run/modelfs";

/// Where callers look: this user's place; root also where services of other users have theirs, the folders /run/modelfs-*,
/// which nobody but root can have made there; others also where root's mounts have theirs, which may name them a role.
fn socket_dirs() -> Result<Vec<PathBuf>> {
    let mut dirs = vec![socket_dir()?];
    if crate::config::env_dirs().root
        && let Ok(entries) = std::fs::read_dir("/run")
    {
        let of_service = |name: &std::ffi::OsStr| name.as_bytes().starts_with(b"modelfs-");
        let found = entries.flatten().filter(|entry| of_service(&entry.file_name())).map(|entry| entry.path());
        dirs.extend(found);
    }
    dirs[1..].sort();
    if !crate::config::env_dirs().root && is_roots(Path::new(ROOT_DIR)) {
        dirs.push(ROOT_DIR.into());
    }
    Ok(dirs)
}

/// Whether nobody but root can have put a socket there.
fn is_roots(dir: &Path) -> bool {
    std::fs::symlink_metadata(dir).is_ok_and(|meta| meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0)
}

/// FNV-1a, 64 bits: a short, stable file name. Not a promise: the reply says which mountpoint it is for.
fn path_hash(path: &Path) -> u64 {
    path.as_os_str()
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Makes the folder if it is missing; refuses one that others could have put sockets into. `passable`: others may reach what
/// they know the name of.
fn own_dir(dir: &Path, passable: bool) -> Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| {
        Error::new(Code::State, format!("cannot make the folder {} for the control socket", dir.display()))
            .with_source(e)
    })?;
    let meta = std::fs::symlink_metadata(dir)
        .map_err(|e| Error::new(Code::State, format!("cannot look at {}", dir.display())).with_source(e))?;
    // SAFETY: geteuid only reads this process's credentials.
    let own_uid = unsafe { libc::geteuid() };
    // Passable it may be for the sake of another mount.
    if !meta.is_dir() || meta.uid() != own_uid || meta.mode() & 0o066 != 0 {
        return Err(Error::new(
            Code::State,
            format!(
                "{} must be a folder of uid {own_uid} with mode 0700 or 0711, it has uid {} and mode {:04o}; chmod 700 it",
                dir.display(),
                meta.uid(),
                meta.mode() & 0o7777
            ),
        ));
    }
    if passable && meta.mode() & 0o011 != 0o011 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711)).map_err(|e| {
            Error::new(Code::State, format!("cannot let those with a role pass through {}", dir.display()))
                .with_source(e)
        })?;
    }
    Ok(())
}

/// The right to make a socket in a folder, or to take away one that nobody listens on. Without it nothing is lost
/// ([`crate::door::remove_dead`]), but a name may be missing for a moment. It ends when dropped, or with the process.
struct Turn {
    _locked: File,
}

impl Turn {
    /// `None` after [`TURN_WAIT`]: whoever has it for so long is stopped, and nobody is to be without a socket for that.
    fn take(dir: &Path) -> Option<Turn> {
        let until = Instant::now() + TURN_WAIT;
        loop {
            match Turn::take_free(dir) {
                Some(turn) => return Some(turn),
                None if Instant::now() < until => std::thread::sleep(TURN_POLL),
                None => {
                    tracing::debug!("another process has {} locked, and does not let it go", dir.display());
                    return None;
                }
            }
        }
    }

    /// `None`: somebody else has it.
    fn take_free(dir: &Path) -> Option<Turn> {
        let folder = File::open(dir).ok()?;
        folder.try_lock().ok()?;
        Some(Turn { _locked: folder })
    }
}

/// At the caller's end: the same user, root, or for root whoever owns the folder of the socket.
fn check_daemon(stream: &UnixStream, socket: &Path) -> Result<()> {
    let daemon = Peer::of(stream)?.uid;
    let owner = socket.parent().and_then(|dir| std::fs::metadata(dir).ok()).map(|meta| meta.uid());
    // SAFETY: geteuid only reads this process's credentials.
    let own = unsafe { libc::geteuid() };
    if daemon == own || daemon == 0 || own == 0 && owner == Some(daemon) {
        return Ok(());
    }
    Err(Error::new(
        Code::StoreDenied,
        format!("uid {daemon} answers on {}, which is neither root nor uid {own}", socket.display()),
    ))
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
