//! Just enough of an HTTP server for a container engine on a Unix socket.
//!
//! Promises: root alone is answered, as the kernel names the other end; head and body are bounded in length and in time;
//! at most [`CONNECTIONS_MAX`] at once, one request each; a mount whose answer nobody got is taken back; a socket handed over by systemd is taken, one of a living plugin
//! is never taken away.
//! Held by: the tests below.

use std::future::Future;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use tokio::sync::{Semaphore, oneshot};

use super::Asker;
use super::protocol::{Answer, Plugin};
use super::volumes::SWEEP_PERIOD;
use crate::door::{self, Listening, plain};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// A volume with the longest options there may be is a tenth of this.
const BODY_BYTES_MAX: usize = 64 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a caller has to close the connection whose answer it has.
const HEARD_TIMEOUT: Duration = Duration::from_secs(10);
/// More wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 64;

/// The socket that systemd hands over, else one at `path`.
///
/// # Errors
/// `USAGE` if a plugin answers there already; `HOST` if it cannot be made.
pub fn listen(path: &Path) -> Result<Listening> {
    let told = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if told("LISTEN_PID") == Some(std::process::id()) {
        return match told("LISTEN_FDS") {
            // SAFETY: systemd's protocol: descriptor 3 is ours, and nobody else in this process took it.
            Some(1) => Ok(Listening::handed_over(handed_over(unsafe { OwnedFd::from_raw_fd(3) })?)),
            other => refuse!(Usage, "systemd handed over {} sockets, wanted one", other.unwrap_or(0)),
        };
    }
    Listening::bind(path, 0o600, "a plugin; stop it, or name another --socket")
}

fn handed_over(socket: OwnedFd) -> Result<UnixListener> {
    let socket = UnixListener::from(socket);
    let _ = socket
        .local_addr()
        .map_err(|e| Error::new(Code::Usage, "what systemd handed over is no Unix socket").with_source(e))?;
    Ok(socket)
}

/// Answers until `stop` is done. Requests under way are not waited for.
pub async fn serve(listening: &Listening, plugin: Arc<Plugin>, stop: impl Future<Output = ()>) -> Result<()> {
    let fault = |e| Error::new(Code::Host, "cannot listen on the plugin's socket").with_source(e);
    let socket = listening.listener().map_err(fault)?;
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    tokio::pin!(stop);
    let sweeping = tokio::spawn({
        let plugin = plugin.clone();
        async move {
            loop {
                tokio::time::sleep(SWEEP_PERIOD).await;
                let plugin = plugin.clone();
                // Unmounting blocks. Ends with the runtime; a panic in there was told where it happened.
                let _ = tokio::task::spawn_blocking(move || plugin.volumes().sweep()).await;
            }
        }
    });
    loop {
        // Both at once: with every place taken by mounts of a store that hangs, the plugin still hears that it is to stop.
        let next = async {
            let permit = room.clone().acquire_owned().await.expect("never closed");
            (permit, socket.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            () = &mut stop => {
                sweeping.abort();
                return Ok(());
            }
            next = next => next,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(failed) => {
                // Out of descriptors, or a caller that left: neither ends the plugin, nor spins it.
                tracing::warn!("cannot take a connection: {failed}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(asker) = ours(&stream) else { continue };
        let plugin = plugin.clone();
        tokio::spawn(async move {
            let (_permit, mut stream, given) = (permit, stream, Given::default());
            let answer = |request| handle(plugin.clone(), asker, request, given.clone());
            let written = door::converse(&mut stream, answer).await;
            let answered = given.lock().expect("a thread died holding an answer").take();
            // From here on it counts as heard: what ends now is this process, and its mounts with it.
            if let (true, Some(answered)) = (written, answered)
                && let Some(answer) = answered.settle()
                && !door::was_heard(&mut stream, HEARD_TIMEOUT).await
            {
                drop(Undone { plugin, answer: Some(answer) });
            }
        });
    }
}

/// Who asks, if it is root, or whoever this process is: a volume is a mount, and may name keys.
fn ours(stream: &tokio::net::UnixStream) -> Option<Option<Asker>> {
    // SAFETY: geteuid only reads this process's credentials.
    let own = unsafe { libc::geteuid() };
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == own => Some(Asker::of(peer.pid())),
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "turned away: volumes are for root's container engine");
            None
        }
        Err(failed) => {
            tracing::warn!("turned away, unknown: {failed}");
            None
        }
    }
}

/// An answer on its way. Dropped, it is taken back: whoever asked has given up, and will never let go of what it says.
struct Undone {
    plugin: Arc<Plugin>,
    answer: Option<Answer>,
}

impl Undone {
    /// Not taken back any more.
    fn settle(mut self) -> Option<Answer> {
        self.answer.take()
    }
}

impl Drop for Undone {
    fn drop(&mut self) {
        let Some(answer) = self.answer.take().filter(Answer::gives) else { return };
        let (plugin, answer) = (self.plugin.clone(), Arc::new(answer));
        // Unmounting blocks, and this may be a thread that answers others.
        let undo = {
            let (plugin, answer) = (plugin.clone(), answer.clone());
            move || plugin.take_back(&answer)
        };
        if let Err(error) = std::thread::Builder::new().name("take-back".into()).spawn(undo) {
            tracing::warn!("cannot start a thread to take a mount back: {error}");
            plugin.take_back(&answer);
        }
    }
}

/// The answer that a connection's caller is being given.
type Given = Arc<Mutex<Option<Undone>>>;

async fn handle(
    plugin: Arc<Plugin>,
    asker: Option<Asker>,
    request: Request<Incoming>,
    given: Given,
) -> Response<Full<Bytes>> {
    if request.method() != Method::POST {
        return plain(StatusCode::METHOD_NOT_ALLOWED);
    }
    let path = request.uri().path().to_owned();
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
    let body = match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) => return plain(StatusCode::PAYLOAD_TOO_LARGE),
        Err(_) => return plain(StatusCode::REQUEST_TIMEOUT),
    };
    let (tell, told) = oneshot::channel();
    tokio::task::spawn_blocking(move || {
        let answer = Some(plugin.answer(&path, &body, asker));
        // The engine gives a mount two minutes, then closes the connection, which drops the other end, or what it was sent.
        drop(tell.send(Undone { plugin, answer }));
    });
    let Ok(answered) = told.await else { return plain(StatusCode::INTERNAL_SERVER_ERROR) };
    let answer = answered.answer.as_ref().expect("nobody has settled it");
    let mut response = plain(StatusCode::from_u16(answer.status).expect("one of the protocol's"));
    *response.body_mut() = Full::new(answer.json.to_string().into());
    let json = header::HeaderValue::from_static("application/vnd.docker.plugins.v1.1+json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    *given.lock().expect("a thread died holding an answer") = Some(answered);
    response
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::Ordering;
    use std::time::Instant;

    use super::super::volumes::fake::{Fake, volumes};
    use super::*;
    use crate::door::HEAD_BYTES_MAX;

    /// A plugin over mounts that are none, on a socket of its own.
    struct Served {
        dir: tempfile::TempDir,
        fake: Arc<Fake>,
        plugin: Arc<Plugin>,
        stop: Option<oneshot::Sender<()>>,
        thread: Option<std::thread::JoinHandle<()>>,
    }

    impl Served {
        fn start() -> Served {
            let dir = tempfile::tempdir().unwrap();
            let (volumes, fake) = volumes(&dir.path().join("state"));
            let plugin = Arc::new(Plugin::new(volumes));
            let listening = listen(&dir.path().join("run/m.sock")).unwrap();
            let (stop, stopped) = oneshot::channel::<()>();
            let thread = std::thread::spawn({
                let plugin = plugin.clone();
                move || {
                    let runtime =
                        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
                    let stop = async { drop(stopped.await) };
                    runtime.block_on(serve(&listening, plugin, stop)).unwrap();
                }
            });
            Served { dir, fake, plugin, stop: Some(stop), thread: Some(thread) }
        }

        fn connect(&self) -> UnixStream {
            let stream = UnixStream::connect(self.dir.path().join("run/m.sock")).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
            stream
        }

        fn ask(&self, request: &str) -> String {
            let mut stream = self.connect();
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            // What was answered before the connection was closed on the rest counts.
            let _ = stream.read_to_string(&mut answer);
            answer
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            drop(self.stop.take());
            self.thread.take().unwrap().join().unwrap();
        }
    }

    fn post(path: &str, body: &str) -> String {
        format!("POST {path} HTTP/1.1\r\nHost: plugin.moby.localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    #[test]
    fn an_engine_is_answered_with_and_without_a_body() {
        let served = Served::start();
        // Docker's own first request, as it was seen on the wire.
        let activate = "POST /Plugin.Activate HTTP/1.1\r\nHost: %2Frun%2Fdocker%2Fplugins%2Fm.sock\r\nUser-Agent: Go-http-client/1.1\r\n\
                        Content-Length: 0\r\nAccept: application/vnd.docker.plugins.v1.2+json\r\n\r\n";
        let answer = served.ask(activate);
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#"{"Implements":["VolumeDriver"]}"#),
            "{answer}"
        );
        let answer = served.ask("POST /VolumeDriver.List HTTP/1.0\r\n\r\n");
        assert!(answer.contains(r#""Volumes":[]"#), "{answer}");
        let create = post("/VolumeDriver.Create", r#"{"Name":"v","Opts":{"store":"s3://models/prod"}}"#);
        assert!(served.ask(&create).ends_with(r#"{"Err":""}"#));
        let refused = served.ask(&post("/VolumeDriver.Create", r#"{"Name":"w","Opts":{"bad":"x"}}"#));
        assert!(refused.starts_with("HTTP/1.1 500") && refused.contains("option bad is refused [USAGE]"), "{refused}");
        let chunked = "POST /VolumeDriver.Get HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nc\r\n{\"Name\":\"v\"}\r\n0\r\n\r\n";
        assert!(served.ask(chunked).contains(r#""Name":"v""#));
    }

    #[test]
    fn what_is_too_long_or_no_post_is_turned_away() {
        let served = Served::start();
        assert!(served.ask("GET /Plugin.Activate HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.1 405"));
        let long = post("/VolumeDriver.Create", &"x".repeat(BODY_BYTES_MAX + 1));
        assert!(served.ask(&long).starts_with("HTTP/1.1 413"));
        let head = format!("POST / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(HEAD_BYTES_MAX * 2));
        assert!(!served.ask(&head).starts_with("HTTP/1.1 200"));
        assert!(served.plugin.volumes().list().is_empty());
    }

    #[test]
    fn a_caller_that_says_nothing_is_let_go_and_keeps_nobody_else_out() {
        let served = Served::start();
        let began = Instant::now();
        let mut silent = served.connect();
        let mut slow = served.connect();
        slow.write_all(b"POST /VolumeDriver.List HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{").unwrap();
        assert!(served.ask(&post("/VolumeDriver.List", "{}")).contains("Volumes"));
        let mut rest = String::new();
        let _ = silent.read_to_string(&mut rest);
        let mut late = String::new();
        let _ = slow.read_to_string(&mut late);
        assert!(late.starts_with("HTTP/1.1 408"), "{late}");
        // Ten times as long as either is waited for.
        assert!(began.elapsed() < 10 * BODY_TIMEOUT, "{:?}", began.elapsed());
    }

    #[test]
    fn a_plugin_with_every_place_taken_hears_that_it_is_to_stop() {
        let is_quick = || {
            let served = Served::start();
            let silent: Vec<_> = (0..=CONNECTIONS_MAX).map(|_| served.connect()).collect();
            // Until all but one are taken.
            std::thread::sleep(Duration::from_millis(500));
            let began = Instant::now();
            drop(served);
            let took = began.elapsed();
            drop(silent);
            // A silent caller is let go after twice that.
            took < Duration::from_secs(5)
        };
        // A machine that is held up may be slow once; a plugin that waits for a place is slow each time.
        assert!((0..3).any(|_| is_quick()), "it waited for a place");
    }

    #[test]
    fn a_mount_of_an_engine_that_hung_up_is_taken_back() {
        let served = Served::start();
        served.ask(&post("/VolumeDriver.Create", r#"{"Name":"v","Opts":{"store":"s3://models/prod"}}"#));
        let gate = served.fake.gate.lock().unwrap();
        let mut caller = served.connect();
        caller.write_all(post("/VolumeDriver.Mount", r#"{"Name":"v","ID":"c1"}"#).as_bytes()).unwrap();
        let until = Instant::now() + Duration::from_secs(120);
        // It made its folder, and waits at the gate.
        while !served.dir.path().join("state/volumes/v").exists() {
            assert!(Instant::now() < until, "nothing is mounted");
            std::thread::sleep(Duration::from_millis(10));
        }
        caller.shutdown(std::net::Shutdown::Write).unwrap();
        // The plugin has noticed when it hangs up too, and lets go of the question right after.
        let mut answer = String::new();
        let _ = caller.read_to_string(&mut answer);
        assert_eq!(answer, "");
        drop(caller);
        std::thread::sleep(Duration::from_millis(300));
        drop(gate);
        while served.fake.made.load(Ordering::SeqCst) == 0 || served.fake.standing.load(Ordering::SeqCst) != 0 {
            assert!(Instant::now() < until, "the mount stands, and nobody has it");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(served.plugin.volumes().look("v").unwrap().holders, 0);
    }

    impl Served {
        fn create(&self) {
            self.ask(&post("/VolumeDriver.Create", r#"{"Name":"v","Opts":{"store":"s3://models/prod"}}"#));
        }

        fn wait_until_nobody_has_it(&self) {
            let until = Instant::now() + Duration::from_secs(120);
            while self.fake.standing.load(Ordering::SeqCst) != 0 {
                assert!(Instant::now() < until, "the mount stands, and nobody has it");
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(self.plugin.volumes().look("v").unwrap().holders, 0);
        }
    }

    #[test]
    fn a_mount_whose_answer_was_sent_to_somebody_who_left_before_he_looked_is_taken_back() {
        let served = Served::start();
        served.create();
        let answer = served.plugin.answer("/VolumeDriver.Mount", br#"{"Name":"v","ID":"c1"}"#, None);
        assert_eq!(served.fake.standing.load(Ordering::SeqCst), 1);
        let (tell, told) = oneshot::channel();
        assert!(tell.send(Undone { plugin: served.plugin.clone(), answer: Some(answer) }).is_ok(), "it is still there");
        drop(told);
        served.wait_until_nobody_has_it();
    }

    #[test]
    fn a_mount_whose_answer_was_written_and_never_read_is_taken_back() {
        let served = Served::start();
        served.create();
        let mut caller = served.connect();
        caller.write_all(post("/VolumeDriver.Mount", r#"{"Name":"v","ID":"c1"}"#).as_bytes()).unwrap();
        let mut byte = [0u8];
        // SAFETY: one byte of our own, which the kernel fills without taking it from the socket.
        let seen = unsafe {
            libc::recv(std::os::fd::AsRawFd::as_raw_fd(&caller), byte.as_mut_ptr().cast(), 1, libc::MSG_PEEK)
        };
        assert_eq!((seen, served.fake.standing.load(Ordering::SeqCst)), (1, 1), "the answer is there");
        drop(caller);
        served.wait_until_nobody_has_it();
    }

    #[test]
    fn a_mount_whose_answer_was_read_stays() {
        let served = Served::start();
        served.create();
        let answer = served.ask(&post("/VolumeDriver.Mount", r#"{"Name":"v","ID":"c1"}"#));
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        for _ in 0..20 {
            served.ask(&post("/VolumeDriver.List", "{}"));
        }
        assert_eq!(served.fake.standing.load(Ordering::SeqCst), 1);
        assert_eq!(served.plugin.volumes().look("v").unwrap().holders, 1);
    }

    #[test]
    fn the_socket_is_private_is_not_taken_from_a_living_plugin_and_goes_with_it() {
        let served = Served::start();
        let path = served.dir.path().join("run/m.sock");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let err = listen(&path).err().unwrap();
        assert!(err.code() == Code::Usage && err.chain().contains("answers"), "{err:?}");
        let file = served.dir.path().join("run/file");
        std::fs::write(&file, "mine").unwrap();
        assert!(listen(&file).err().unwrap().chain().contains("no socket"));
        let dead = served.dir.path().join("run/dead.sock");
        door::testing::dead_socket(&dead);
        drop(listen(&dead).unwrap());
        assert!(!dead.exists());
        drop(served);
        assert!(!path.exists());
    }
}
