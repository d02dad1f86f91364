//! The door for metrics and health: HTTP/1 on a Unix socket, or over TCP with TLS and a token.
//!
//! In: GET of `/metrics`, `/live`, `/ready`, `/health`, `/health/security`. Out: text or JSON, 200 or 503.
//! Promises: on the Unix socket root, the mounting user and those whom roles name are answered, over TCP whoever has a
//! token; to anybody else nothing is told, and none of them keeps those out. Heads, connections, rates and times are bounded,
//! for each peer and for all;
//! a thread of its own answers, so that a store which hangs holds up no answer, and no question a reader.
//! Not here: what is answered (`metrics`, `health`).
//! Held by: the tests below, tests/observe.rs.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::facts::Facts;
use super::tls::{Credentials, Files, Loaded};
use super::{health, metrics};
use crate::config::oversight::{HttpPlan, RolesPlan};
use crate::control::{Peer, Rates, Role, anyone_named};
use crate::door::{self, Listening, plain};
use crate::error::{Code, Error, Result};
use crate::telemetry::events::{Actor, Event, Kind, Outcome, Severity};
use crate::telemetry::{Telemetry, scrub};

/// Of all that have shown a role or a token; root and the mounting user have theirs beside them.
const CONNECTIONS_MAX: usize = 64;
/// Of one peer.
const CONNECTIONS_EACH_MAX: usize = 8;
/// Over TCP, of all that have shown no token yet.
const ARRIVALS_MAX: usize = 32;
/// Peers without a role that are told so at once; more are turned away without a word.
const DISMISSALS_MAX: usize = 16;
const DISMISSAL_TIMEOUT: Duration = Duration::from_secs(1);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// From the first byte to the last.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// How long collecting an answer may take; each part of it is bounded itself.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers collected at once.
const LOOKS_MAX: usize = 4;
/// How often files of certificate, key and tokens are looked at.
const REFRESH_PERIOD: Duration = Duration::from_secs(5);
const EACH_PER_SECOND: u32 = 20;
const EACH_BURST: u32 = 60;
/// Of wrong tokens and of peers without a role: told of so often, then only counted.
const REFUSED_PER_SECOND: u32 = 1;
const REFUSED_BURST: u32 = 5;
/// How long the end waits for answers under way.
const END_GRACE: Duration = Duration::from_millis(200);

/// What the answers are made of, and for whom.
pub struct Watched {
    /// `None`: the process ends.
    pub facts: Box<dyn Fn() -> Option<Facts> + Send + Sync>,
    pub telemetry: Arc<Telemetry>,
    pub roles: RolesPlan,
}

/// The door, open until dropped.
pub struct Server {
    at: String,
    /// Where it really listens, when port 0 was asked for.
    address: Option<SocketAddr>,
    unix: Option<Arc<Listening>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

enum Door {
    Unix(Arc<Listening>),
    Tcp(TcpListener, Arc<Credentials>),
}

impl Server {
    /// # Errors
    /// `USAGE` for a place, certificate, key or token that cannot be used, naming it; `HOST` for a thread.
    pub fn open(plan: &HttpPlan, watched: Watched) -> Result<Server> {
        let (door, at, address) = match plan {
            HttpPlan::Unix(path) => {
                // Whoever is let in by a role has to get to the socket; the kernel's word on the peer decides.
                let mode = if anyone_named(&watched.roles) { 0o666 } else { 0o600 };
                let whose = "another mount's door for metrics; name another http=unix:PATH";
                (Door::Unix(Arc::new(Listening::bind(path, mode, whose)?)), format!("unix:{}", path.display()), None)
            }
            HttpPlan::Tcp { address, cert, key, token } => {
                let files = Files { cert: cert.clone(), key: key.clone(), token: token.clone() };
                let credentials = Arc::new(Credentials::load(files)?);
                let fault = |e: std::io::Error| {
                    Error::new(Code::Usage, format!("cannot answer at http={address}")).with_source(e)
                };
                let listener = TcpListener::bind(address).map_err(fault)?;
                listener.set_nonblocking(true).map_err(fault)?;
                let real = listener.local_addr().map_err(fault)?;
                (Door::Tcp(listener, credentials), format!("https://{real}"), Some(real))
            }
        };
        let unix = match &door {
            Door::Unix(listening) => Some(listening.clone()),
            Door::Tcp(..) => None,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("http-look")
            .max_blocking_threads(LOOKS_MAX + 1)
            .build()
            .map_err(|e| Error::new(Code::Host, "cannot start a runtime for metrics").with_source(e))?;
        let (stop, stopped) = oneshot::channel();
        let answerer = Arc::new(Answerer::new(watched));
        let thread = std::thread::Builder::new()
            .name("http".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = accept(door, answerer) => {}
                        _ = stopped => {}
                    }
                });
                runtime.shutdown_timeout(END_GRACE);
            })
            .map_err(|e| Error::new(Code::Host, "cannot start a thread for metrics").with_source(e))?;
        Ok(Server { at, address, unix, stop: Some(stop), thread: Some(thread) })
    }

    /// `unix:PATH` or `https://ADDRESS:PORT`.
    pub fn at(&self) -> &str {
        &self.at
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Takes a socket's name away; answers under way go on.
    pub fn retire(&self) {
        if let Some(unix) = &self.unix {
            unix.retire();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.retire();
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Who has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Caller {
    Uid(u32),
    /// Of IPv6 its /64: whoever has one address there has all of them.
    Ip(IpAddr),
}

impl Caller {
    fn of(ip: IpAddr) -> Caller {
        Caller::Ip(match ip {
            IpAddr::V4(_) => ip,
            IpAddr::V6(six) => match six.to_ipv4_mapped() {
                Some(four) => four.into(),
                None => {
                    let [a, b, c, d, ..] = six.segments();
                    Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
                }
            },
        })
    }
}

/// A place among the connections, given back when dropped.
struct Place {
    answerer: Arc<Answerer>,
    caller: Caller,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.answerer.open.lock().expect("a thread died holding the connections");
        if let Some(count) = open.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.caller);
            }
        }
    }
}

/// Connections that have shown no token yet, the one that came first in front.
///
/// When there are too many, of one peer or of all, the oldest goes: whoever has a token shows it at once, so silence keeps
/// nobody out.
struct Arrivals<T> {
    next: u64,
    waiting: VecDeque<(u64, Caller, T)>,
}

impl<T> Default for Arrivals<T> {
    fn default() -> Arrivals<T> {
        Arrivals { next: 0, waiting: VecDeque::new() }
    }
}

impl<T> Arrivals<T> {
    /// Takes one in. Its number, and the one that has to go for it.
    fn add(&mut self, caller: Caller, arrived: T) -> (u64, Option<T>) {
        let of_caller = self.waiting.iter().filter(|(_, of, _)| *of == caller).count();
        let goes = if of_caller >= CONNECTIONS_EACH_MAX {
            self.waiting.iter().position(|(_, of, _)| *of == caller)
        } else {
            (self.waiting.len() >= ARRIVALS_MAX).then_some(0)
        };
        let gone = goes.and_then(|at| self.waiting.remove(at)).map(|(_, _, gone)| gone);
        self.next += 1;
        self.waiting.push_back((self.next, caller, arrived));
        (self.next, gone)
    }

    /// It has shown a token, or is gone.
    fn remove(&mut self, number: u64) {
        self.waiting.retain(|(of, _, _)| *of != number);
    }
}

/// An entry among the arrivals, for as long as the connection shows nothing.
struct Arrival<'a> {
    answerer: &'a Answerer,
    number: &'a OnceLock<u64>,
}

impl Arrival<'_> {
    fn end(&self) {
        if let Some(number) = self.number.get() {
            self.answerer.arrivals().remove(*number);
        }
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

async fn accept(door: Door, answerer: Arc<Answerer>) {
    let listening = match &door {
        Door::Unix(listening) => listening.listener().map(Accepting::Unix),
        Door::Tcp(listener, credentials) => listener
            .try_clone()
            .and_then(tokio::net::TcpListener::from_std)
            .map(|listener| Accepting::Tcp(listener, credentials.clone())),
    };
    let listening = match listening {
        Ok(listening) => listening,
        Err(failed) => return tracing::error!("cannot listen for questions about metrics: {failed}"),
    };
    if let Accepting::Tcp(_, credentials) = &listening {
        let credentials = credentials.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(REFRESH_PERIOD).await;
                let credentials = credentials.clone();
                // Ends with the runtime; a panic in there was told where it happened.
                let _ = tokio::task::spawn_blocking(move || credentials.refresh()).await;
            }
        });
    }
    loop {
        if let Err(failed) = listening.take(&answerer).await {
            // Out of descriptors, or a caller that left: neither ends the door, nor spins it.
            tracing::warn!("cannot take a connection: {failed}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

enum Accepting {
    Unix(tokio::net::UnixListener),
    Tcp(tokio::net::TcpListener, Arc<Credentials>),
}

impl Accepting {
    /// Taken before there is a place for it: whoever waits for one would keep those out who have their own.
    async fn take(&self, answerer: &Arc<Answerer>) -> std::io::Result<()> {
        match self {
            Accepting::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let peer = match Peer::of(&stream) {
                    Ok(peer) => peer,
                    Err(unknown) => return Err(std::io::Error::other(unknown.chain())),
                };
                let caller = Caller::Uid(peer.uid);
                if Role::of(&answerer.watched.roles, &peer).is_none() {
                    answerer.dismiss(stream, &peer);
                } else if let Some(place) = answerer.place(caller, peer.is_master()) {
                    let answerer = answerer.clone();
                    tokio::spawn(async move {
                        converse(stream, |request| answerer.answer(caller, request)).await;
                        drop(place);
                    });
                }
            }
            Accepting::Tcp(listener, credentials) => {
                let (stream, from) = listener.accept().await?;
                let (number, shown) = (Arc::new(OnceLock::new()), credentials.now());
                let task = tokio::spawn(meet(stream, from.ip(), shown, answerer.clone(), number.clone()));
                // Before it runs: this thread runs all of them.
                answerer.arrive(Caller::of(from.ip()), task.abort_handle(), &number);
            }
        }
        Ok(())
    }
}

/// A connection over TCP, from its handshake to its end.
async fn meet(
    stream: tokio::net::TcpStream,
    from: IpAddr,
    loaded: Arc<Loaded>,
    answerer: Arc<Answerer>,
    number: Arc<OnceLock<u64>>,
) {
    let arrival = Arrival { answerer: &answerer, number: &number };
    let stream = match timeout(HANDSHAKE_TIMEOUT, loaded.acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(failed)) => return tracing::debug!("no TLS from {from}: {failed}"),
        Err(_) => return tracing::debug!("no TLS from {from} in time"),
    };
    let held = OnceLock::new();
    let answer = |request: Request<Incoming>| {
        let admitted = bearer(&request).is_some_and(|token| loaded.admits(token));
        // One request a connection: it is held until its answer has been read.
        let has_place = !admitted || {
            arrival.end();
            answerer.place(Caller::of(from), false).is_some_and(|place| held.set(place).is_ok())
        };
        let answerer = answerer.clone();
        async move {
            if has_place {
                answerer.over_network(from, admitted, request).await
            } else {
                plain(StatusCode::SERVICE_UNAVAILABLE)
            }
        }
    };
    converse(stream, answer).await;
}

/// The token of a request: `Authorization: Bearer TOKEN`.
fn bearer(request: &Request<Incoming>) -> Option<&[u8]> {
    let value = request.headers().get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

async fn converse<S, F, A>(stream: S, answer: F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<Full<Bytes>>>,
{
    if timeout(CONNECTION_TIMEOUT, door::converse(stream, answer)).await.is_err() {
        tracing::debug!("a connection took too long");
    }
}

struct Answerer {
    watched: Arc<Watched>,
    looks: Arc<Semaphore>,
    rates: Rates<Caller>,
    refusals: Rates<Caller>,
    room: Arc<Semaphore>,
    open: Mutex<HashMap<Caller, usize>>,
    arrivals: Mutex<Arrivals<AbortHandle>>,
    dismissals: Arc<Semaphore>,
}

/// What is asked for.
#[derive(Clone, Copy)]
enum Page {
    Metrics,
    Ready,
    Health,
    Security,
}

impl Answerer {
    fn new(watched: Watched) -> Answerer {
        Answerer {
            watched: Arc::new(watched),
            looks: Arc::new(Semaphore::new(LOOKS_MAX)),
            rates: Rates::new(EACH_PER_SECOND, EACH_BURST),
            refusals: Rates::new(REFUSED_PER_SECOND, REFUSED_BURST),
            room: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            open: Mutex::default(),
            arrivals: Mutex::default(),
            dismissals: Arc::new(Semaphore::new(DISMISSALS_MAX)),
        }
    }

    /// `None`: the caller has as many connections as one may have, or there is no room; a master needs none.
    fn place(self: &Arc<Self>, caller: Caller, is_master: bool) -> Option<Place> {
        let mut open = self.open.lock().expect("a thread died holding the connections");
        let has_many = open.get(&caller).is_some_and(|count| *count >= CONNECTIONS_EACH_MAX);
        let permit = if is_master { None } else { self.room.clone().try_acquire_owned().ok() };
        if has_many || permit.is_none() && !is_master {
            self.watched.telemetry.http_refused.inc();
            return None;
        }
        *open.entry(caller).or_insert(0) += 1;
        Some(Place { answerer: self.clone(), caller, _permit: permit })
    }

    /// Notes one that has shown nothing yet.
    fn arrive(&self, caller: Caller, task: AbortHandle, number: &OnceLock<u64>) {
        let (own, gone) = self.arrivals().add(caller, task);
        assert!(number.set(own).is_ok(), "one number a connection");
        if let Some(gone) = gone {
            self.watched.telemetry.http_refused.inc();
            gone.abort();
        }
    }

    fn arrivals(&self) -> MutexGuard<'_, Arrivals<AbortHandle>> {
        self.arrivals.lock().expect("a thread died holding the arrivals")
    }

    /// Tells who has no role so. It never has a place, so it takes none from those who have one.
    fn dismiss(&self, stream: tokio::net::UnixStream, peer: &Peer) {
        let who = || (peer.actor(), format!("uid {} has no role here", peer.uid));
        let status = self.refuse(Caller::Uid(peer.uid), StatusCode::FORBIDDEN, who).status();
        if let Ok(permit) = self.dismissals.clone().try_acquire_owned() {
            tokio::spawn(async move {
                // Whether it listens is its own affair.
                let _ = timeout(DISMISSAL_TIMEOUT, door::dismiss(stream, status)).await;
                drop(permit);
            });
        }
    }

    async fn over_network(&self, from: IpAddr, admitted: bool, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let caller = Caller::of(from);
        if admitted {
            return self.answer(caller, request).await;
        }
        let who = || (Actor::default(), format!("{from} has no token of ours"));
        let mut response = self.refuse(caller, StatusCode::UNAUTHORIZED, who);
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        response
    }

    /// Tells of it, unless that was told a moment ago.
    fn refuse(
        &self,
        caller: Caller,
        status: StatusCode,
        who: impl FnOnce() -> (Actor, String),
    ) -> Response<Full<Bytes>> {
        let telemetry = &self.watched.telemetry;
        telemetry.http_refused.inc();
        if !self.refusals.admits(caller) {
            return plain(StatusCode::TOO_MANY_REQUESTS);
        }
        let (actor, why) = who();
        let event = Event::new(Kind::Admin).severity(Severity::Medium).outcome(Outcome::Denied).actor(actor);
        telemetry.events.tell(&event.detail(format!("metrics and health: {why}")));
        plain(status)
    }

    async fn answer(&self, caller: Caller, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let telemetry = &self.watched.telemetry;
        if !self.rates.admits(caller) {
            telemetry.http_refused.inc();
            return plain(StatusCode::TOO_MANY_REQUESTS);
        }
        telemetry.http_requests.inc();
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED);
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        let page = match request.uri().path() {
            "/live" => return told(&health::live()),
            "/metrics" => Page::Metrics,
            "/ready" => Page::Ready,
            "/health" => Page::Health,
            "/health/security" => Page::Security,
            _ => return plain(StatusCode::NOT_FOUND),
        };
        self.look(page).await.unwrap_or_else(|| plain(StatusCode::SERVICE_UNAVAILABLE))
    }

    /// Collects it on a thread of its own. `None`: not in time, or the process ends.
    async fn look(&self, page: Page) -> Option<Response<Full<Bytes>>> {
        let looking = async {
            let permit = self.looks.clone().acquire_owned().await.ok()?;
            let watched = self.watched.clone();
            let looked = tokio::task::spawn_blocking(move || {
                // Held until it is really done: threads that hang are never more than there are permits.
                let _permit = permit;
                let facts = (watched.facts)()?;
                Some(match page {
                    Page::Metrics => scraped(&facts),
                    Page::Ready => told(&health::ready(&facts)),
                    Page::Health => told(&health::detail(&facts)),
                    Page::Security => told(&health::security(&facts)),
                })
            });
            looked.await.ok()?
        };
        timeout(LOOK_TIMEOUT, looking).await.ok()?
    }
}

fn scraped(facts: &Facts) -> Response<Full<Bytes>> {
    answered(StatusCode::OK, metrics::CONTENT_TYPE, metrics::text(facts))
}

fn told(told: &health::Told) -> Response<Full<Bytes>> {
    let status = if told.well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answered(status, "application/json", format!("{}\n", told.json))
}

fn answered(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(scrub(&text).into_owned())));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use super::super::facts::MountFacts;
    use super::*;

    struct Served {
        dir: tempfile::TempDir,
        hangs: Arc<AtomicBool>,
        telemetry: Arc<Telemetry>,
        server: Option<Server>,
    }

    impl Served {
        fn start() -> Served {
            Served::with(RolesPlan::default())
        }

        fn with(roles: RolesPlan) -> Served {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let (hangs, telemetry) = (Arc::new(AtomicBool::new(false)), Arc::new(Telemetry::default()));
            let facts = {
                let (hangs, telemetry) = (hangs.clone(), telemetry.clone());
                Box::new(move || {
                    while hangs.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    let mut facts = Facts::empty(&telemetry);
                    facts.mounts.push(MountFacts::still("/m".into()));
                    Some(facts)
                })
            };
            let watched = Watched { facts, telemetry: telemetry.clone(), roles };
            let server = Server::open(&HttpPlan::Unix(dir.path().join("m.sock")), watched).expect("open");
            Served { dir, hangs, telemetry, server: Some(server) }
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("m.sock")
        }

        fn ask(&self, head: &str) -> String {
            ask(&self.path(), head)
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            self.hangs.store(false, Ordering::SeqCst);
        }
    }

    fn ask(path: &Path, head: &str) -> String {
        let mut stream = UnixStream::connect(path).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        // A caller that is turned away early cannot say all it has to say.
        let _ = stream.write_all(head.as_bytes());
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
    }

    #[test]
    fn each_page_is_answered_and_nothing_else_is() {
        let served = Served::start();
        for (path, wanted) in [
            ("/metrics", "modelfs_ready 1"),
            ("/live", "{\"live\":true}"),
            ("/ready", "\"ready\":true"),
            ("/health", "\"mountpoint\":\"/m\""),
            ("/health/security", "\"items\""),
        ] {
            let answer = served.ask(&get(path));
            // A process of tests may be dumped, unless one of them has forbidden it: then the page says so.
            let fine =
                answer.starts_with("HTTP/1.1 200") || path == "/health/security" && answer.contains("can be dumped");
            assert!(fine && answer.contains(wanted), "{path}: {answer}");
        }
        assert!(served.ask(&get("/")).starts_with("HTTP/1.1 404"));
        assert!(served.ask(&get("/metrics/../../etc/passwd")).starts_with("HTTP/1.1 404"));
        assert!(
            served.ask("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").starts_with("HTTP/1.1 405")
        );
        let head = served.ask("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
        let long = format!("GET /live HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(door::HEAD_BYTES_MAX * 2));
        assert!(!served.ask(&long).starts_with("HTTP/1.1 200"));
        assert!(served.telemetry.http_requests.get() >= 8);
    }

    #[test]
    fn what_hangs_behind_it_is_answered_for_and_keeps_nobody_from_the_rest_nor_from_the_end() {
        let mut served = Served::start();
        served.hangs.store(true, Ordering::SeqCst);
        let path = served.path();
        let hung: Vec<_> = (0..LOOKS_MAX)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || ask(&path, &get("/metrics")))
            })
            .collect();
        let until = Instant::now() + Duration::from_secs(60);
        while served.telemetry.http_requests.get() < LOOKS_MAX as u64 {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(served.ask(&get("/live")).starts_with("HTTP/1.1 200"), "the process answers all the same");
        for asked in hung {
            assert!(asked.join().expect("asked").starts_with("HTTP/1.1 503"));
        }
        // The threads still hang: closing does not wait for them.
        drop(served.server.take());
        assert!(!path.exists());
    }

    #[test]
    fn one_caller_is_bounded_in_connections_and_in_questions() {
        let served = Served::start();
        let connect_all = || -> Vec<UnixStream> {
            (0..CONNECTIONS_EACH_MAX).map(|_| UnixStream::connect(served.path()).expect("connects")).collect()
        };
        let mut silent = connect_all();
        let until = Instant::now() + Duration::from_secs(120);
        // Turned away at once, without a word.
        while !served.ask(&get("/live")).is_empty() {
            assert!(Instant::now() < until, "a ninth connection is still taken");
            // Those who say nothing are let go after a while, which may be over if we were held up.
            silent.clear();
            std::thread::sleep(Duration::from_millis(100));
            silent = connect_all();
        }
        assert!(served.telemetry.http_refused.get() > 0);
        drop(silent);
        while !served.ask(&get("/live")).starts_with("HTTP/1.1 200") {
            assert!(Instant::now() < until, "places are not given back");
        }
        let mut seen = 0;
        while !served.ask(&get("/live")).starts_with("HTTP/1.1 429") {
            seen += 1;
            assert!(seen < 10_000, "nobody is ever told to wait");
        }
    }

    /// A connection of another user, if we may be one.
    fn connect_as(uid: u32, path: PathBuf) -> Option<UnixStream> {
        let connecting = std::thread::spawn(move || {
            // SAFETY: the bare call changes this thread alone, which ends right after.
            let done = unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) };
            (done == 0).then(|| UnixStream::connect(path).expect("connects"))
        });
        connecting.join().expect("a thread")
    }

    #[test]
    fn peers_without_a_role_are_told_so_before_they_speak_and_keep_nobody_out() {
        use crate::config::oversight::Peers;
        let viewers = (50..60).map(Peers::Uid).collect();
        let served = Served::with(RolesPlan { viewers, ..RolesPlan::default() });
        // The folder is its maker's; others have to get to the socket in it.
        std::fs::set_permissions(served.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("chmod");
        let connect = |uid: u32| connect_as(uid, served.path());
        if connect(50).is_none() {
            return eprintln!("SKIPPED: needs root, to be other users");
        }
        let mut told = String::new();
        let mut stranger = connect(4000).expect("root");
        stranger.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        let _ = stranger.read_to_string(&mut told);
        assert!(told.starts_with("HTTP/1.1 403"), "nothing was asked: {told:?}");
        let of = |uids: std::ops::Range<u32>, each: usize| -> Vec<UnixStream> {
            uids.flat_map(|uid| (0..each).filter_map(move |_| connect(uid))).collect()
        };
        let silent = of(4000..4010, CONNECTIONS_EACH_MAX);
        assert!(served.ask(&get("/live")).starts_with("HTTP/1.1 200"), "{} silent strangers", silent.len());
        let mut viewer = connect(50).expect("root");
        viewer.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        viewer.write_all(get("/live").as_bytes()).expect("asked");
        let mut told = String::new();
        viewer.read_to_string(&mut told).expect("answered");
        assert!(told.starts_with("HTTP/1.1 200"), "{told:?}");
        // Those with a role may take all places of their own, and none of root's.
        let viewers = of(51..60, CONNECTIONS_EACH_MAX);
        assert!(viewers.len() > CONNECTIONS_MAX);
        assert!(served.ask(&get("/live")).starts_with("HTTP/1.1 200"), "{} silent viewers", viewers.len());
    }

    #[test]
    fn of_those_who_have_shown_nothing_the_oldest_goes_of_its_own_network_first() {
        let of = |last: u8| Caller::of(IpAddr::from([10, 0, 0, last]));
        let mut arrivals = Arrivals::default();
        let first: Vec<u64> = (0..CONNECTIONS_EACH_MAX).map(|at| arrivals.add(of(1), at).0).collect();
        assert_eq!(arrivals.add(of(1), 100).1, Some(0), "one peer pushes itself out");
        arrivals.remove(first[1]);
        assert_eq!(arrivals.add(of(1), 101).1, None, "one has shown a token");
        assert_eq!(arrivals.waiting.len(), CONNECTIONS_EACH_MAX);
        let others = CONNECTIONS_EACH_MAX..ARRIVALS_MAX;
        assert!(others.map(|at| arrivals.add(of(at as u8), 0).1).all(|gone| gone.is_none()));
        assert_eq!(arrivals.add(of(200), 0).1, Some(2), "the oldest of all");
        assert_eq!(arrivals.waiting.len(), ARRIVALS_MAX);
    }

    #[test]
    fn a_living_door_is_not_taken_away_and_a_dead_one_is() {
        let served = Served::start();
        let again = || {
            let facts = Box::new(|| None);
            let watched = Watched { facts, telemetry: Arc::default(), roles: RolesPlan::default() };
            Server::open(&HttpPlan::Unix(served.path()), watched)
        };
        assert_eq!(again().err().expect("taken").code(), Code::Usage);
        served.server.as_ref().expect("open").retire();
        assert!(!served.path().exists());
        door::testing::dead_socket(&served.path());
        let server = again().expect("a dead socket is replaced");
        assert!(ask(&served.path(), &get("/metrics")).starts_with("HTTP/1.1 503"), "a process that ends has no facts");
        drop(server);
    }

    #[test]
    fn addresses_of_one_network_are_one_caller() {
        let of = |text: &str| Caller::of(text.parse().expect("an address"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
