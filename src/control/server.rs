//! The mount's side of the control socket.
//!
//! One thread listens, one more answers each connection, at most [`CONNECTIONS_MAX`] at once. It needs no async runtime,
//! so `status` is answered while the store hangs.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use super::client::ask_over;
use super::{
    AccessRequest, LINE_TIMEOUT, MapRequest, Peer, REQUEST_BYTES_MAX, Rates, ReplyLine, Request, RequestLine, Role,
    Turn, anyone_named, own_dir, read_line, write_line,
};
use crate::config::oversight::RolesPlan;
use crate::door;
use crate::error::{Code, Error, Result};
use crate::telemetry::Telemetry;
use crate::telemetry::events::{Event, Kind, Severity, Subject};

/// More callers than this at once wait in the kernel's queue, then are turned away.
const CONNECTIONS_MAX: usize = 16;

/// Of which those who may not all, together, take at most so many.
const OTHERS_MAX: usize = 8;

/// How often one user may ask who may not all: `status` once a second from a few screens is far below.
const OTHERS_PER_SECOND: u32 = 10;
const OTHERS_BURST: u32 = 30;

/// The same for root and the mounting user: a script in a loop, not a mistake without end.
const OWN_PER_SECOND: u32 = 200;
const OWN_BURST: u32 = 1000;

/// As often may others take a socket's name that was just given up, before it is left to them.
const NAME_TRIES: usize = 8;

/// Whom a mount answers, and where that is told.
#[derive(Default)]
pub struct Rules {
    pub roles: RolesPlan,
    pub telemetry: Arc<Telemetry>,
}

/// What all answers of one socket share.
struct Door {
    name: Arc<Name>,
    mountpoint: PathBuf,
    target: Arc<dyn ControlTarget>,
    rules: Rules,
    pace: Pace,
    busy: AtomicUsize,
    busy_others: AtomicUsize,
}

/// How often each user may ask.
struct Pace {
    own: Rates<u32>,
    others: Rates<u32>,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { own: Rates::new(OWN_PER_SECOND, OWN_BURST), others: Rates::new(OTHERS_PER_SECOND, OTHERS_BURST) }
    }
}

/// What a running mount does when it is asked. Called from the socket's threads; must not hold locks that reads need.
pub trait ControlTarget: Send + Sync {
    /// The state of the mount: `mountpoint`, `store`, `pid`, `models`, `metrics`, ... Never key material.
    fn status(&self) -> serde_json::Value;

    /// Which parts of files are in memory. Answered from memory, like `status`.
    ///
    /// # Errors
    /// `NotFound` for a model that is not mounted.
    fn map(&self, asked: &MapRequest) -> Result<serde_json::Value>;

    /// Resolves one model, or all, again, and shows newer versions. Bounded by the store's deadlines.
    ///
    /// # Errors
    /// `Usage` if the mount does not show versions; whatever refused the new version: then nothing changed.
    fn reload(&self, model: Option<&str>) -> Result<serde_json::Value>;

    /// Unmounts and wipes, and answers when that is done: the end of the process follows. Bounded in time.
    ///
    /// # Errors
    /// `Held` naming who still held files when the mount was detached.
    fn stop(&self) -> Result<serde_json::Value>;

    /// Lets go of what it has by the name of its place, for the mount that is there by now.
    ///
    /// # Errors
    /// `MountPoint` while its own mount is there.
    fn give_way(&self) -> Result<()>;

    /// Locks, unlocks, lists and shuts out sessions. Locking waits for no reader.
    ///
    /// # Errors
    /// `NotFound` for a model that is not mounted; what reading keys again answers.
    fn access(&self, request: AccessRequest) -> Result<serde_json::Value>;
}

/// The listening socket; dropping it stops listening, lets a reply under way finish, and removes the socket file.
pub struct ControlServer {
    name: Arc<Name>,
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// The name of a listening socket, ours to take away once: later it may be the next mount's.
struct Name {
    path: PathBuf,
    retired: AtomicBool,
}

impl Name {
    fn retire(&self) {
        if !self.retired.swap(true, Ordering::AcqRel) {
            remove(&self.path);
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        self.retire();
    }
}

/// A socket that listens at `path`. Whoever listens there is asked to give way; what nobody listens on is replaced.
///
/// # Errors
/// `MountPoint` if somebody does not give way.
fn listen_at(path: &Path, mode: u32, mountpoint: &Path) -> Result<UnixListener> {
    let fault = |what: &str, e: io::Error| Error::new(Code::State, format!("{what} {}", path.display())).with_source(e);
    for _ in 0..NAME_TRIES {
        let turn = Turn::take(path.parent().expect("a socket path is a folder and a name"));
        let other = match UnixStream::connect(path) {
            Ok(other) => other,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                door::remove_dead(path).map_err(|e| fault("cannot remove the dead socket", e))?;
                match door::place(path, mode) {
                    // Another was faster, which had no turn either.
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                    placed => return placed.map_err(|e| fault("cannot listen on", e)),
                }
            }
            Err(e) => return Err(fault("cannot tell whether somebody listens on", e)),
        };
        // Nobody else is to wait for his answer.
        drop(turn);
        let pid = Peer::of(&other)?.pid;
        match ask_over(&other, path, Request::GiveWay, LINE_TIMEOUT) {
            Ok(_) => {}
            // He ended meanwhile.
            Err(_) if path.symlink_metadata().is_err() => {}
            Err(refused) => {
                let (place, socket) = (mountpoint.display(), path.display());
                let told = format!("pid {pid} answers for {place} at {socket} already; end it first");
                return Err(Error::new(Code::MountPoint, told).with_source(refused));
            }
        }
    }
    Err(Error::new(Code::MountPoint, format!("others listen on {} again and again", path.display())))
}

/// A socket that has its name: whoever comes waits until [`Listening::answer`].
pub struct Listening {
    listener: UnixListener,
    name: Arc<Name>,
    mountpoint: PathBuf,
    rules: Rules,
}

/// Listens for `mountpoint` (canonical).
///
/// # Errors
/// `MountPoint` if a mount that is there already answers for it; `State` if the folder is not ours alone.
pub fn listen(mountpoint: &Path, rules: Rules) -> Result<Listening> {
    listen_in(super::socket_path(mountpoint)?, mountpoint, rules)
}

fn listen_in(path: PathBuf, mountpoint: &Path, rules: Rules) -> Result<Listening> {
    let open = anyone_named(&rules.roles);
    own_dir(path.parent().expect("a socket path is a folder and a name"), open)?;
    let listener = listen_at(&path, if open { 0o666 } else { 0o600 }, mountpoint)?;
    let name = Arc::new(Name { path, retired: AtomicBool::new(false) });
    Ok(Listening { listener, name, mountpoint: mountpoint.to_owned(), rules })
}

impl Listening {
    pub fn path(&self) -> &Path {
        &self.name.path
    }

    /// # Errors
    /// `Host` and `State` for what the machine does not give; then the name is gone.
    pub fn answer(self, target: Arc<dyn ControlTarget>) -> Result<ControlServer> {
        serve(self, target, Pace::default())
    }
}

fn serve(listening: Listening, target: Arc<dyn ControlTarget>, pace: Pace) -> Result<ControlServer> {
    let Listening { listener, name, mountpoint, rules } = listening;
    let fault =
        |what: &str, e: io::Error| Error::new(Code::State, format!("{what} {}", name.path.display())).with_source(e);
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
    let door = Door {
        name: name.clone(),
        mountpoint,
        target,
        rules,
        pace,
        busy: AtomicUsize::new(0),
        busy_others: AtomicUsize::new(0),
    };
    let thread = std::thread::Builder::new()
        .name("control".into())
        .spawn(move || accept(&listener, &wake_seen, &Arc::new(door)))
        .map_err(|e| fault("cannot start a thread for", e))?;
    Ok(ControlServer { name, wake, thread: Some(thread) })
}

impl ControlServer {
    pub fn path(&self) -> &Path {
        &self.name.path
    }

    /// Takes the socket's name away, so that the next mount on this mountpoint finds the place free; replies under way go
    /// on. Call it before the last answer is given: whoever hears it may mount again at once.
    pub fn retire(&self) {
        self.name.retire();
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // Gone first: who comes now finds nothing, instead of a socket that nobody answers.
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

fn accept(listener: &UnixListener, wake: &OwnedFd, door: &Arc<Door>) {
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
        let Some(admitted) = Admitted::ask(door, &stream) else {
            door.rules.telemetry.control_refused.inc();
            continue;
        };
        // What cannot be started is dropped, and its place with it.
        let _ = std::thread::Builder::new().name("control-reply".into()).spawn(move || answer(&stream, &admitted));
    }
    // A `stop` caller must get its reply before the process ends; nobody may hold the exit up for longer than a line.
    let until = std::time::Instant::now() + LINE_TIMEOUT;
    while door.busy.load(Ordering::Acquire) > 0 && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// A caller that has a place, given back when dropped.
struct Admitted {
    door: Arc<Door>,
    peer: Peer,
    role: Option<Role>,
}

impl Admitted {
    /// `None`: no place, or nobody knows who it is. Those who may not all cannot take the places of those who may.
    fn ask(door: &Arc<Door>, stream: &UnixStream) -> Option<Admitted> {
        let peer = Peer::of(stream).inspect_err(|e| tracing::warn!("turned away: {}", e.chain())).ok()?;
        let role = Role::of(&door.rules.roles, &peer);
        let admitted = Admitted { door: door.clone(), peer, role };
        let full = door.busy.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX;
        let others_full = role != Some(Role::Admin) && door.busy_others.fetch_add(1, Ordering::AcqRel) >= OTHERS_MAX;
        (!full && !others_full).then_some(admitted)
    }

    /// # Errors
    /// `STORE_DENIED`: too often.
    fn in_time(&self) -> Result<()> {
        let rates = if self.role == Some(Role::Admin) { &self.door.pace.own } else { &self.door.pace.others };
        match rates.admits(self.peer.uid) {
            true => Ok(()),
            false => Err(Error::new(
                Code::StoreDenied,
                format!("uid {} asks too often at the control socket; wait a second", self.peer.uid),
            )),
        }
    }

    /// # Errors
    /// `STORE_DENIED`: somebody whom no role was given.
    fn known(&self) -> Result<Role> {
        self.role.ok_or_else(|| {
            Error::new(
                Code::StoreDenied,
                format!(
                    "the control socket answers root, the mounting user and those that --control-viewer, \
                     --control-operator and --control-admin name, not uid {}",
                    self.peer.uid
                ),
            )
        })
    }

    fn perform(&self, request: Request) -> Result<serde_json::Value> {
        let (role, needs) = (self.known()?, request.needs());
        if role < needs {
            return Err(Error::new(
                Code::StoreDenied,
                format!(
                    "uid {} is {} of this mount, and `{}` is for {} and above",
                    self.peer.uid,
                    role.name(),
                    request.told(),
                    needs.name()
                ),
            ));
        }
        if request.gives() {
            let what = request.told();
            let recorded = self.door.rules.telemetry.events.emit(&self.event().detail(what.as_str()));
            recorded.map_err(|error| error.context(format!("`{what}` is not begun")))?;
        }
        let target = &self.door.target;
        match request {
            Request::Status => Ok(target.status()),
            Request::Map(asked) => target.map(&asked),
            Request::Reload { model } => target.reload(model.as_deref()),
            Request::Stop => target.stop(),
            Request::GiveWay => {
                target.give_way()?;
                // Before the answer is given, as whenever the name changes hands.
                self.door.name.retire();
                Ok(serde_json::Value::Null)
            }
            Request::Access(request) => target.access(request),
        }
    }

    fn event(&self) -> Event {
        let subject = Subject { mountpoint: Some(self.door.mountpoint.clone()), ..Subject::default() };
        Event::new(Kind::Admin).actor(self.peer.actor()).subject(subject)
    }

    /// What a peer did or was not let do is told of; that somebody looked is not.
    fn tell(&self, what: &str, done: &Result<serde_json::Value>) {
        let event = self.event();
        let event = match done {
            Ok(_) => event.detail(what),
            Err(error) => {
                let severity = if error.code() == Code::StoreDenied { Severity::Medium } else { Severity::Low };
                let event = event.severity(severity).error(error);
                event.detail(format!("{what}: {}", error.chain()))
            }
        };
        self.door.rules.telemetry.events.tell(&event);
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if self.role != Some(Role::Admin) {
            self.door.busy_others.fetch_sub(1, Ordering::AcqRel);
        }
        self.door.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

fn answer(stream: &UnixStream, admitted: &Admitted) {
    let telemetry = &admitted.door.rules.telemetry;
    let asked = stream
        .set_nonblocking(false)
        .map_err(|e| Error::new(Code::Host, "cannot use the control socket").with_source(e))
        .and_then(|()| admitted.in_time())
        // Nobody who has no role keeps a thread waiting for his words.
        .and_then(|()| admitted.known().inspect_err(|e| admitted.tell("ask", &Err(e.clone()))))
        .and_then(|_| read_line(stream, REQUEST_BYTES_MAX, LINE_TIMEOUT))
        .and_then(|line| {
            serde_json::from_slice::<RequestLine>(&line)
                .map_err(|e| Error::new(Code::Usage, "the control socket got an unknown request").with_source(e))
        });
    let result = asked.and_then(|line| {
        let (looks, gives) = (line.request.needs() == Role::Viewer, line.request.gives());
        let what = line.request.told();
        let done = admitted.perform(line.request);
        // What gives is on record since before it was begun; if it then came to nothing, that is told too.
        let told_before = gives && done.is_ok();
        if !looks && !told_before {
            admitted.tell(&what, &done);
        }
        done
    });
    match &result {
        Err(e) if e.code() == Code::StoreDenied => telemetry.control_refused.inc(),
        Ok(_) | Err(_) => telemetry.control_requests.inc(),
    }
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
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::super::ask_at;
    use super::*;
    use crate::door::testing::dead_socket;

    const WAIT: Duration = Duration::from_secs(120);

    #[derive(Default)]
    struct Fake {
        /// Its mount has left the tree.
        gone: bool,
    }
    impl ControlTarget for Fake {
        fn status(&self) -> serde_json::Value {
            serde_json::json!({"mountpoint": "/mnt/x", "pid": 7})
        }
        fn map(&self, asked: &MapRequest) -> Result<serde_json::Value> {
            Ok(serde_json::json!({ "asked": asked }))
        }
        fn reload(&self, model: Option<&str>) -> Result<serde_json::Value> {
            Ok(serde_json::json!({ "asked": model }))
        }
        fn stop(&self) -> Result<serde_json::Value> {
            Err(Error::new(Code::Held, "pid 12 (python) holds acme/model.safetensors"))
        }
        fn give_way(&self) -> Result<()> {
            if self.gone { Ok(()) } else { Err(Error::new(Code::MountPoint, "still mounted")) }
        }
        fn access(&self, request: AccessRequest) -> Result<serde_json::Value> {
            Ok(serde_json::json!({"asked": format!("{request:?}")}))
        }
    }

    fn at(path: PathBuf, rules: Rules) -> Result<ControlServer> {
        listen_in(path, Path::new("/mnt/x"), rules)?.answer(Arc::new(Fake::default()))
    }

    fn served() -> (tempfile::TempDir, ControlServer) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let server = at(dir.path().join("run/a.sock"), Rules::default()).expect("served");
        (dir, server)
    }

    #[test]
    fn a_request_is_answered_and_an_error_keeps_its_code() {
        let (_dir, server) = served();
        let status = ask_at(server.path(), Request::Status, WAIT).expect("an answer");
        assert_eq!(status["pid"], 7);

        let err = ask_at(server.path(), Request::Stop, WAIT).expect_err("held");

        assert_eq!(err.code(), Code::Held);
        assert!(err.chain().contains("pid 12"), "{err:?}");
    }

    /// What a mount says of itself is complete by then.
    #[test]
    fn whoever_comes_before_there_are_answers_waits_for_one() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let listening =
            listen_in(dir.path().join("run/a.sock"), Path::new("/mnt/x"), Rules::default()).expect("listens");
        let path = listening.path().to_owned();
        let early = UnixStream::connect(&path).expect("connects");
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask_over(&early, &path, Request::Status, WAIT));
            let _server = listening.answer(Arc::new(Fake::default())).expect("served");
            assert_eq!(asked.join().expect("asked").expect("an answer")["pid"], 7);
        });
        let unheard = listen_in(path.clone(), Path::new("/mnt/x"), Rules::default()).expect("listens");
        drop(unheard);
        assert!(!path.exists(), "the name goes with it");
    }

    #[test]
    fn a_request_about_access_arrives_with_what_it_names() {
        let (_dir, server) = served();
        let requests = [
            AccessRequest::Lock { model: Some("acme/llama".into()) },
            AccessRequest::Unlock { model: None },
            AccessRequest::Sessions,
            AccessRequest::ShutOut { session: "uid=1000".into(), seconds: Some(600), hard: true },
            AccessRequest::LetIn { session: "uid=1000".into() },
        ];
        for request in requests {
            let answer = ask_at(server.path(), Request::Access(request.clone()), WAIT).expect("answered");
            assert_eq!(answer["asked"], format!("{request:?}"));
        }
    }

    #[test]
    fn the_folder_and_the_socket_are_closed_to_others() {
        let (_dir, server) = served();
        let mode = |path: &Path| std::fs::symlink_metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(server.path()), 0o600);
        assert_eq!(mode(server.path().parent().expect("folder")), 0o700);
    }

    #[test]
    fn with_roles_others_pass_through_the_folder_and_cannot_list_it() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let roles = RolesPlan { viewers: vec!["gid=4242".parse().expect("a group")], ..RolesPlan::default() };
        let rules = || Rules { roles: roles.clone(), telemetry: Arc::default() };
        let plain = at(dir.path().join("run/a.sock"), Rules::default()).expect("served");
        let open = at(dir.path().join("run/b.sock"), rules()).expect("served");
        let mode = |path: &Path| std::fs::symlink_metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(open.path().parent().expect("folder")), 0o711);
        assert_eq!((mode(plain.path()), mode(open.path())), (0o600, 0o666));
        // What comes after does not close the folder again, nor mind that it is open.
        let third = at(dir.path().join("run/c.sock"), Rules::default()).expect("served");
        assert_eq!((mode(third.path()), mode(third.path().parent().expect("folder"))), (0o600, 0o711));
    }

    #[test]
    fn orders_are_told_of_with_who_gave_them_and_looking_is_not() {
        #[derive(Default)]
        struct Notes(std::sync::Mutex<Vec<Event>>);
        impl crate::telemetry::events::Sink for Notes {
            fn take(&self, event: &Event) -> Result<()> {
                self.0.lock().expect("a test").push(event.clone());
                Ok(())
            }
        }
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (telemetry, notes) = (Arc::new(Telemetry::default()), Arc::new(Notes::default()));
        telemetry.events.add(notes.clone());
        let rules = Rules { telemetry: telemetry.clone(), ..Rules::default() };
        let server = at(dir.path().join("run/a.sock"), rules).expect("served");
        let ask = |request| ask_at(server.path(), request, WAIT);
        ask(Request::Status).expect("an answer");
        ask(Request::Access(AccessRequest::Lock { model: Some("acme/llama".into()) })).expect("done");
        ask(Request::Stop).expect_err("held");
        ask(Request::Reload { model: None }).expect("done");
        let told = notes.0.lock().expect("a test");
        let words: Vec<_> = told.iter().map(|event| event.detail.clone().unwrap_or_default()).collect();
        assert!(words[0] == "lock acme/llama" && words[1].starts_with("stop: pid 12"), "{words:?}");
        assert_eq!(words[2..], ["reload"], "once, and not again when it is done");
        assert!(told.iter().all(|event| event.kind == Kind::Admin && event.actor.pid == Some(std::process::id())));
        assert_eq!(telemetry.control_requests.get(), 4);
    }

    /// With `audit=required` and a log that cannot be written.
    #[test]
    fn an_order_that_gives_is_not_begun_unless_it_is_on_record_and_one_that_takes_away_is() {
        struct Full;
        impl crate::telemetry::events::Sink for Full {
            fn take(&self, _event: &Event) -> Result<()> {
                Err(Error::new(Code::Audit, "the disk is full"))
            }
        }
        struct Done(std::sync::Mutex<Vec<String>>);
        impl ControlTarget for Done {
            fn status(&self) -> serde_json::Value {
                serde_json::json!({})
            }
            fn map(&self, _asked: &MapRequest) -> Result<serde_json::Value> {
                Ok(serde_json::json!({}))
            }
            fn reload(&self, _model: Option<&str>) -> Result<serde_json::Value> {
                self.0.lock().expect("a test").push("reload".into());
                Ok(serde_json::json!({}))
            }
            fn stop(&self) -> Result<serde_json::Value> {
                self.0.lock().expect("a test").push("stop".into());
                Ok(serde_json::json!({}))
            }
            fn give_way(&self) -> Result<()> {
                self.0.lock().expect("a test").push("give way".into());
                Ok(())
            }
            fn access(&self, request: AccessRequest) -> Result<serde_json::Value> {
                self.0.lock().expect("a test").push(Request::Access(request).told());
                Ok(serde_json::json!({}))
            }
        }
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (telemetry, done) = (Arc::new(Telemetry::default()), Arc::new(Done(std::sync::Mutex::default())));
        telemetry.events.add(Arc::new(Full));
        let rules = Rules { telemetry, ..Rules::default() };
        let listening = listen_in(dir.path().join("run/a.sock"), Path::new("/mnt/x"), rules).expect("listens");
        let server = listening.answer(done.clone()).expect("served");
        let ask = |request| ask_at(server.path(), request, WAIT);
        let session = || "uid=1".to_owned();
        for gives in [
            Request::Reload { model: None },
            Request::Access(AccessRequest::Unlock { model: None }),
            Request::Access(AccessRequest::LetIn { session: session() }),
        ] {
            let error = ask(gives.clone()).expect_err("cannot be recorded");
            assert!(error.chain().contains("is not begun") && error.chain().contains("the disk is full"), "{error:?}");
        }
        assert!(done.0.lock().expect("a test").is_empty());
        for takes in [
            Request::Access(AccessRequest::Lock { model: None }),
            Request::Access(AccessRequest::ShutOut { session: session(), seconds: None, hard: true }),
            Request::Stop,
        ] {
            ask(takes).expect("done all the same");
        }
        assert_eq!(*done.0.lock().expect("a test"), ["lock", "shut out uid=1", "stop"]);
    }

    /// Asks as another user, where we may become one: `None` where not.
    fn ask_as(uid: u32, path: &Path) -> Option<Result<serde_json::Value>> {
        let path = path.to_owned();
        let asker = std::thread::spawn(move || {
            // SAFETY: the system call itself changes this thread alone, which ends with the question.
            let became = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) } == 0;
            became.then(|| ask_at(&path, Request::Status, Duration::from_secs(60)))
        });
        asker.join().expect("a thread")
    }

    #[test]
    fn who_asks_too_often_is_refused_before_a_word_of_his_is_read_and_holds_back_nobody_else() {
        const VIEWERS: [u32; 2] = [54_321, 54_322];
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("opened");
        let names = VIEWERS.map(|uid| format!("uid={uid}").parse().expect("a user"));
        let roles = RolesPlan { viewers: names.to_vec(), ..RolesPlan::default() };
        let (rules, telemetry) = (Rules { roles, ..Rules::default() }, Arc::new(Telemetry::default()));
        let rules = Rules { telemetry: telemetry.clone(), ..rules };
        // Nothing comes back while this runs.
        let at_once = |burst: u32| {
            let hour = governor::Quota::with_period(Duration::from_secs(3600)).expect("longer than nothing");
            Rates::of(hour.allow_burst(burst.try_into().expect("some")))
        };
        let pace = Pace { own: at_once(5), others: at_once(3) };
        let path = dir.path().join("run/a.sock");
        let listening = listen_in(path, Path::new("/mnt/x"), rules).expect("listens");
        let server = serve(listening, Arc::new(Fake::default()), pace).expect("served");
        let too_often = |answer: Result<serde_json::Value>| {
            let error = answer.expect_err("too often");
            assert_eq!(error.code(), Code::StoreDenied, "{error:?}");
            assert!(error.chain().contains("asks too often"), "{error:?}");
        };
        for _ in 0..5 {
            ask_at(server.path(), Request::Status, Duration::from_secs(60)).expect("an answer");
        }
        too_often(ask_at(server.path(), Request::Status, Duration::from_secs(60)));
        // He who has said nothing yet is told so all the same.
        let mut silent = UnixStream::connect(server.path()).expect("connects");
        let mut reply = String::new();
        silent.read_to_string(&mut reply).expect("an answer");
        assert!(reply.contains("asks too often"), "{reply}");
        let mut refused = 2;
        for uid in VIEWERS {
            for _ in 0..3 {
                let Some(answer) = ask_as(uid, server.path()) else { continue };
                answer.expect("a burst of his own");
            }
            if let Some(answer) = ask_as(uid, server.path()) {
                too_often(answer);
                refused += 1;
            }
        }
        assert_eq!(telemetry.control_refused.get(), refused);
    }

    #[test]
    fn a_folder_open_to_others_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let run = dir.path().join("run");
        std::fs::create_dir(&run).expect("made");
        std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o777)).expect("opened");

        let err = at(run.join("a.sock"), Rules::default()).err().expect("refused");

        assert_eq!(err.code(), Code::State, "{err:?}");
    }

    #[test]
    fn a_second_mount_is_refused_while_the_first_lives_and_a_stale_socket_is_replaced() {
        let (dir, server) = served();
        let path = server.path().to_path_buf();
        let refused = at(path.clone(), Rules::default()).err().expect("refused");
        assert_eq!(refused.code(), Code::MountPoint);
        let own = format!("pid {} answers for /mnt/x at {}", std::process::id(), path.display());
        assert!(refused.message().contains(&own) && refused.chain().contains("still mounted"), "{refused:?}");
        drop(server);
        assert!(!path.exists(), "dropping removes the socket");
        dead_socket(&path);
        assert!(path.exists());

        let again = at(path, Rules::default()).expect("a stale socket is replaced");

        assert!(ask_at(again.path(), Request::Status, WAIT).is_ok());
        drop(dir);
    }

    #[test]
    fn one_whose_mount_is_gone_gives_way_and_never_takes_its_successors_socket() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("run/a.sock");
        let gone = Arc::new(Fake { gone: true });
        let old = listen_in(path.clone(), Path::new("/mnt/x"), Rules::default()).expect("listens");
        let old = old.answer(gone).expect("served");
        let new = at(path.clone(), Rules::default()).expect("the old one gives way");
        drop(old);
        assert!(ask_at(&path, Request::Status, WAIT).is_ok());
        assert_eq!(at(path.clone(), Rules::default()).err().expect("it stands").code(), Code::MountPoint);
        drop(new);
        assert!(!path.exists());
    }

    #[test]
    fn one_that_is_stopped_while_it_makes_a_socket_leaves_others_theirs() {
        let (dir, _server) = served();
        let _turn = Turn::take(&dir.path().join("run")).expect("free");
        let other = at(dir.path().join("run/b.sock"), Rules::default()).expect("served");
        assert!(ask_at(other.path(), Request::Status, WAIT).is_ok());
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
