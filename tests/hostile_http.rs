//! What an S3 server can do to us below the contract: THREAT_MODEL (f) rows 4 and 13 to 18, rule by rule.
//!
//! The server is our own and answers whatever a rule says; the store is the real one, with patience around it.

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::hostile::{Hostile, Request, head, honest, object, respond};
use modelfs::error::{Code, Error};
use modelfs::store::{ChunkSink, Patience, StoreOptions, open};
use modelfs::telemetry::Telemetry;

const LEN: usize = 1000;

/// For a server that answers at once, on a machine that may be busy: what it says counts, not when.
fn patience() -> Patience {
    Patience {
        attempt: Duration::from_secs(60),
        stall: Duration::from_secs(60),
        budget: Duration::from_secs(90),
        attempts_max: 3,
        pause_first: Duration::from_millis(1),
        pause_max: Duration::from_millis(5),
    }
}

/// For a server that lets us wait.
fn short_patience() -> Patience {
    let s = Duration::from_secs;
    Patience { attempt: s(2), stall: s(1), budget: s(6), ..patience() }
}

fn store_with(server: &Hostile, patience: Patience, telemetry: Arc<Telemetry>) -> Arc<dyn ChunkSink> {
    let opts = StoreOptions {
        aws: server.settings(),
        ignore_environment: true,
        patience,
        telemetry,
        ..StoreOptions::default()
    };
    open(&"s3://models/prefix".parse().expect("a URL"), &opts).expect("settings")
}

fn store_of(server: &Hostile) -> Arc<dyn ChunkSink> {
    store_with(server, patience(), Arc::default())
}

type Answer = fn(&Request, &mut TcpStream) -> std::io::Result<()>;

type Read = Result<Vec<u8>, Error>;

/// Reads bytes 100..200 of an object of a server that answers like this.
async fn read_from(answer: Answer) -> (Read, Vec<Request>) {
    // An answer that came seconds late, on a machine that stood still, was asked for once more: not counted here.
    for _ in 0..10 {
        let (result, requests, extra) = read_with(answer, patience()).await;
        if extra == 0 {
            return (result, requests);
        }
    }
    panic!("extra requests were sent each time");
}

/// The same with this patience; also how many extra requests were sent.
async fn read_with(answer: Answer, patience: Patience) -> (Read, Vec<Request>, u64) {
    let server = Hostile::start(answer);
    let telemetry = Arc::new(Telemetry::default());
    let start = Instant::now();
    let store = store_with(&server, patience, telemetry.clone());
    let result = store.read_range("m/d/x", 100..200).await.map(|pieces| pieces.concat());
    assert!(start.elapsed() < Duration::from_secs(120), "every wait has an end");
    if let Err(error) = &result {
        let text = format!("{error:?} {}", error.chain());
        for canary in ["AKIDCANARY", "secret-canary-value", "token-canary-value", "Signature", "\u{1b}"] {
            assert!(!text.contains(canary), "{text}");
        }
    }
    (result, server.requests(), telemetry.hedges_sent.get())
}

async fn refused(answer: Answer, wanted: Code) -> usize {
    let (result, requests) = read_from(answer).await;
    let error = result.expect_err("refused");
    assert_eq!(error.code(), wanted, "{}", error.chain());
    requests.len()
}

#[tokio::test]
async fn an_honest_server_is_read() {
    let (result, requests) = read_from(|request, stream| honest(request, stream, LEN)).await;
    assert_eq!(result.expect("served"), object(LEN)[100..200]);
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].target, "/models/prefix/m/d/x");
    assert_eq!(requests[0].header("accept-encoding"), None, "nothing encoded is asked for");
}

/// Row 13.
#[tokio::test]
async fn a_whole_body_instead_of_a_range_is_a_wrong_length() {
    let calls = refused(|_, stream| respond(stream, "200 OK", &[], &object(LEN)), Code::Length).await;
    assert_eq!(calls, 2, "asked once more, as the store may have erred");
}

/// Row 13: the body claims to be 1 TB and would be sent for ever; its first bytes are not waited for.
#[tokio::test]
async fn a_terabyte_instead_of_a_range_is_never_read() {
    fn endless(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "200 OK", &[], Some(1 << 40))?;
        loop {
            stream.write_all(&[0; 65536])?;
        }
    }
    refused(endless, Code::Length).await;
}

/// Row 14.
#[tokio::test]
async fn a_wrong_content_range_is_a_wrong_length() {
    const RANGES: [&str; 12] = [
        "bytes 0-99/1000",
        "bytes 100-198/1000",
        "bytes 101-200/1000",
        "bytes 100-199/150",
        "bytes 100-199/*",
        "bytes 100-199",
        "bytes 199-100/1000",
        "bytes 100-18446744073709551615/18446744073709551615",
        "bytes 0-18446744073709551615/18446744073709551616",
        "items 100-199/1000",
        "",
        "bytes -1-199/1000",
    ];
    static NOW: AtomicUsize = AtomicUsize::new(0);
    for number in 0..RANGES.len() {
        NOW.store(number, Ordering::Relaxed);
        let calls = refused(
            |_, stream| {
                let range = RANGES[NOW.load(Ordering::Relaxed)];
                respond(stream, "206 Partial Content", &[("Content-Range", range)], &object(LEN)[100..200])
            },
            Code::Length,
        )
        .await;
        assert_eq!(calls, 2);
    }
}

#[tokio::test]
async fn a_206_without_content_range_is_a_wrong_length() {
    refused(|_, stream| respond(stream, "206 Partial Content", &[], &object(LEN)[100..200]), Code::Length).await;
}

const RIGHT_RANGE: [(&str, &str); 1] = [("Content-Range", "bytes 100-199/1000")];

/// Row 14: fewer bytes.
#[tokio::test]
async fn a_body_that_ends_early_is_never_a_short_read() {
    refused(|_, stream| respond(stream, "206 Partial Content", &RIGHT_RANGE, &object(99)), Code::Length).await;
    // Without a length the end of the connection is the end of the body.
    fn unannounced(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "206 Partial Content", &RIGHT_RANGE, None)?;
        stream.write_all(&object(99))
    }
    refused(unannounced, Code::Length).await;
    // In chunks of its own, which a proxy may make, a right answer is right.
    fn in_chunks(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        let headers = [RIGHT_RANGE[0], ("Transfer-Encoding", "chunked")];
        head(stream, "206 Partial Content", &headers, None)?;
        stream.write_all(b"64\r\n")?;
        stream.write_all(&object(100))?;
        stream.write_all(b"\r\n0\r\n\r\n")
    }
    assert_eq!(read_from(in_chunks).await.0.expect("whole"), object(100));
    // A body that breaks off before its announced end is a broken connection: worth another attempt.
    fn broken(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "206 Partial Content", &RIGHT_RANGE, Some(100))?;
        stream.write_all(&object(99))
    }
    assert_eq!(refused(broken, Code::Unreachable).await, 3);
}

/// Row 14: more bytes, and bytes without end.
#[tokio::test]
async fn a_body_longer_than_its_range_is_cut_off() {
    refused(|_, stream| respond(stream, "206 Partial Content", &RIGHT_RANGE, &object(101)), Code::Length).await;
    fn endless(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "206 Partial Content", &RIGHT_RANGE, None)?;
        loop {
            stream.write_all(&[0; 65536])?;
        }
    }
    refused(endless, Code::Length).await;
    fn endless_chunks(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        let headers = [RIGHT_RANGE[0], ("Transfer-Encoding", "chunked")];
        head(stream, "206 Partial Content", &headers, None)?;
        loop {
            stream.write_all(b"1\r\nx\r\n")?;
        }
    }
    refused(endless_chunks, Code::Length).await;
}

/// Row 16: Content-Encoding.
#[tokio::test]
async fn an_encoded_body_is_refused_and_never_decoded() {
    for (i, answer) in [
        (|_: &Request, stream: &mut TcpStream| {
            let headers = [RIGHT_RANGE[0], ("Content-Encoding", "gzip")];
            respond(stream, "206 Partial Content", &headers, &object(LEN)[100..200])
        }) as Answer,
        |_, stream| {
            let headers = [RIGHT_RANGE[0], ("Content-Encoding", "identity, br")];
            respond(stream, "206 Partial Content", &headers, &object(LEN)[100..200])
        },
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(refused(answer, Code::StoreAnswer).await, 1, "answer {i}");
    }
}

/// Row 16: redirects, with the credentials of the first host.
#[tokio::test]
async fn no_redirect_is_followed_not_even_to_the_same_host() {
    static ELSEWHERE: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let other = Hostile::start(|request, stream| honest(request, stream, LEN));
    ELSEWHERE.set(other.endpoint()).expect("set once");
    for answer in [
        (|_: &Request, stream: &mut TcpStream| {
            let location = format!("{}/models/prefix/m/d/x", ELSEWHERE.get().expect("set"));
            respond(stream, "307 Temporary Redirect", &[("Location", &location)], b"")
        }) as Answer,
        |_, stream| respond(stream, "301 Moved Permanently", &[("Location", "file:///etc/passwd")], b""),
        |_, stream| respond(stream, "302 Found", &[("Location", "/models/prefix/m/d/y")], b""),
        |_, stream| respond(stream, "301 Moved Permanently", &[("x-amz-bucket-region", "eu-west-1")], b""),
        |_, stream| respond(stream, "304 Not Modified", &[], b""),
    ] {
        assert_eq!(refused(answer, Code::StoreAnswer).await, 1);
    }
    assert_eq!(other.requests().len(), 0, "the other host never hears of us");
}

/// Row 17: statuses.
#[tokio::test]
async fn statuses_are_told_apart_and_retried_within_bounds() {
    for (answer, code, calls) in [
        (
            (|_: &Request, stream: &mut TcpStream| respond(stream, "404 Not Found", &[], b"")) as Answer,
            Code::NotFound,
            1,
        ),
        (|_, stream| respond(stream, "403 Forbidden", &[], b"<Code>AccessDenied</Code>"), Code::StoreDenied, 1),
        (|_, stream| respond(stream, "401 Unauthorized", &[], b""), Code::StoreDenied, 1),
        (|_, stream| respond(stream, "400 Bad Request", &[], b"<Code>ExpiredToken</Code>"), Code::StoreDenied, 1),
        (|_, stream| respond(stream, "400 Bad Request", &[], b""), Code::StoreAnswer, 1),
        (|_, stream| respond(stream, "416 Range Not Satisfiable", &[], b""), Code::Length, 2),
        (|_, stream| respond(stream, "429 Too Many Requests", &[], b""), Code::Unreachable, 3),
        (|_, stream| respond(stream, "500 Internal Server Error", &[], b""), Code::Unreachable, 3),
        (|_, stream| respond(stream, "503 Slow Down", &[], b"<Code>SlowDown</Code>"), Code::Unreachable, 3),
    ] {
        assert_eq!(refused(answer, code).await, calls, "{code}");
    }
}

/// Row 17: the page of an error is as hostile as anything.
#[tokio::test]
async fn an_endless_error_page_is_not_collected() {
    fn endless(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "403 Forbidden", &[], None)?;
        loop {
            stream.write_all(b"<Code>\x1b[31mred</Code>")?;
        }
    }
    refused(endless, Code::StoreDenied).await;
}

/// Row 17: silence before the answer, within it, and an answer of one byte every now and then.
#[tokio::test(flavor = "multi_thread")]
async fn silence_and_slowness_end_in_a_deadline() {
    fn silent(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        // Until the client gives up.
        std::io::Read::read(stream, &mut [0; 1]).map(|_| ())
    }
    fn stalls_within(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "206 Partial Content", &RIGHT_RANGE, Some(100))?;
        stream.write_all(&object(50))?;
        std::io::Read::read(stream, &mut [0; 1]).map(|_| ())
    }
    fn slow(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "206 Partial Content", &RIGHT_RANGE, Some(100))?;
        loop {
            stream.write_all(b"x")?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    fn slow_headers(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        stream.write_all(b"HTTP/1.1 206 Partial Content\r\nX-Slow: ")?;
        loop {
            stream.write_all(b"x")?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    // Far from the end of an attempt, which a machine that stands still would meet as well.
    let one_second = Patience { stall: Duration::from_secs(1), ..patience() };
    let stalled = read_with(stalls_within, one_second).await.0.expect_err("refused");
    assert!(stalled.chain().contains("fell silent"), "its own bound, before that of the attempt: {}", stalled.chain());
    let all = [silent as Answer, stalls_within, slow, slow_headers].map(|answer| read_with(answer, short_patience()));
    for (result, ..) in futures::future::join_all(all).await {
        let error = result.expect_err("refused");
        assert_eq!(error.code(), Code::Deadline, "{}", error.chain());
    }
}

#[tokio::test]
async fn what_is_not_http_at_all_is_unreachable() {
    assert_eq!(refused(|_, stream| stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n"), Code::Unreachable).await, 3);
    assert_eq!(refused(|_, _| Ok(()), Code::Unreachable).await, 3);
}

/// Row 18.
#[tokio::test]
async fn an_error_page_with_status_200_is_a_wrong_length() {
    refused(|_, stream| respond(stream, "200 OK", &[], b"<html>maintenance</html>"), Code::Length).await;
}

/// Row 15: between two reads the object became another one. Both are told as they are; the chunk hash decides.
#[tokio::test]
async fn a_changed_etag_is_not_a_reason_to_fail_or_to_believe() {
    let server = Hostile::start(|request, stream| honest(request, stream, LEN));
    let store = store_of(&server);
    for _ in 0..2 {
        assert_eq!(store.read_range("m/d/x", 0..10).await.expect("served").concat(), object(10));
    }
    for request in server.requests() {
        assert!(request.header("if-match").is_none() && request.header("if-none-match").is_none());
    }
}

#[tokio::test]
async fn a_small_object_without_end_stops_at_its_cap() {
    fn endless(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "200 OK", &[], Some(1 << 40))?;
        loop {
            stream.write_all(&[0; 65536])?;
        }
    }
    fn unannounced(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "200 OK", &[("Transfer-Encoding", "chunked")], None)?;
        loop {
            stream.write_all(b"1\r\nx\r\n")?;
        }
    }
    for (answer, code) in [(endless as Answer, Code::Limit), (unannounced, Code::StoreAnswer)] {
        let server = Hostile::start(answer);
        let err = store_of(&server).read_small("m/name", 4096).await.expect_err("refused");
        assert_eq!(err.code(), code, "{}", err.chain());
    }
}

/// A listing may lie about names, lengths and its own end.
#[tokio::test]
async fn a_hostile_listing_is_filtered_and_bounded() {
    fn page(names: &[&str], token: Option<&str>) -> Vec<u8> {
        let mut xml = String::from("<?xml version=\"1.0\"?><ListBucketResult>");
        for name in names {
            xml.push_str(&format!(
                "<Contents><Key>{name}</Key><LastModified>2026-11-18T10:00:00.000Z</LastModified><Size>7</Size></Contents>"
            ));
        }
        if let Some(token) = token {
            xml.push_str(&format!("<NextContinuationToken>{token}</NextContinuationToken>"));
        }
        xml.push_str("</ListBucketResult>");
        xml.into_bytes()
    }
    fn lies(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        let names = ["prefix/m/b", "prefix/m/a", "prefix/m/a", "prefix/other/x", "elsewhere/m/y", "prefix/m/odd name"];
        respond(stream, "200 OK", &[], &page(&names, None))
    }
    fn pages_for_ever(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        respond(stream, "200 OK", &[], &page(&[], Some("again")))
    }
    fn huge(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        head(stream, "200 OK", &[], Some(1 << 40))?;
        loop {
            stream.write_all(&[b' '; 65536])?;
        }
    }
    fn no_listing(_: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        respond(stream, "200 OK", &[], b"<html>maintenance</html")
    }

    let server = Hostile::start(lies);
    let names: Vec<_> = store_of(&server).list("m/").await.expect("listed").into_iter().map(|l| l.name).collect();
    assert_eq!(names, ["m/a", "m/b"]);

    for (answer, patience, codes) in [
        (pages_for_ever as Answer, short_patience(), vec![Code::Limit, Code::Deadline]),
        (huge, patience(), vec![Code::Length]),
        (no_listing, patience(), vec![Code::StoreAnswer]),
    ] {
        let server = Hostile::start(answer);
        let err = store_with(&server, patience, Arc::default()).list("m/").await.expect_err("refused");
        assert!(codes.contains(&err.code()), "{}", err.chain());
    }
}

/// Row 73 on the wire: the create was applied, and a proxy dropped the answer.
#[tokio::test]
async fn a_create_whose_answer_never_came_is_read_back() {
    fn drops_the_answer(request: &Request, stream: &mut TcpStream) -> std::io::Result<()> {
        match request.method.as_str() {
            "PUT" => Ok(()),
            _ => respond(stream, "200 OK", &[], b"ours"),
        }
    }
    let server = Hostile::start(drops_the_answer);
    store_of(&server).create("m/r/prod/1", Bytes::from_static(b"ours")).await.expect("it is there");
    let put = server.requests().into_iter().find(|request| request.method == "PUT").expect("asked");
    assert_eq!(put.header("if-none-match"), Some("*"));
    assert_eq!(put.body, b"ours");
    let err = store_of(&server).create("m/r/prod/1", Bytes::from_static(b"mine")).await.expect_err("taken");
    assert_eq!(err.code(), Code::Exists);
}

/// S3 answers 409 when two creates meet: neither success nor failure yet.
#[tokio::test]
async fn a_conflict_of_two_creates_is_asked_again() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let server = Hostile::start(|request, stream| match request.method.as_str() {
        "PUT" if CALLS.fetch_add(1, Ordering::Relaxed) == 0 => {
            respond(stream, "409 Conflict", &[], b"<Code>ConditionalRequestConflict</Code>")
        }
        "PUT" => respond(stream, "200 OK", &[], b""),
        _ => respond(stream, "404 Not Found", &[], b""),
    });
    store_of(&server).create("m/x", Bytes::from_static(b"ours")).await.expect("created at the second attempt");
    assert_eq!(CALLS.load(Ordering::Relaxed), 2);
}

/// A part is sent again with the very same bytes, and a completion whose answer was lost is looked up.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_survives_failing_parts_and_a_lost_completion() {
    static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());
    fn first_time(query: &str) -> bool {
        let mut seen = SEEN.lock().expect("no panic under the lock");
        let first = !seen.iter().any(|seen| seen == query);
        seen.push(query.to_owned());
        first
    }
    const SIZE: usize = 20 << 20;
    let server = Hostile::start(|request, stream| match (request.method.as_str(), request.target.split_once('?')) {
        ("POST", Some((_, query))) if query.starts_with("uploads") => {
            let xml = "<InitiateMultipartUploadResult><UploadId>id1</UploadId></InitiateMultipartUploadResult>";
            respond(stream, "200 OK", &[], xml.as_bytes())
        }
        // The first PUT of each part breaks the connection.
        ("PUT", Some((_, query))) if first_time(query) => Ok(()),
        ("PUT", Some(_)) => respond(stream, "200 OK", &[], b""),
        ("POST", Some(_)) => Ok(()),
        ("HEAD", _) => head(stream, "200 OK", &[], Some(SIZE as u64)),
        _ => respond(stream, "500 Internal Server Error", &[], b""),
    });
    let store = store_of(&server);
    let bytes = Bytes::from(object(SIZE));
    let mut writer = store.begin("m/d/x", SIZE as u64).await.expect("begun");
    for start in (0..SIZE).step_by(3 << 20) {
        writer.write(bytes.slice(start..SIZE.min(start + (3 << 20)))).await.expect("taken");
    }
    writer.finish(SIZE as u64).await.expect("the object is there with its length");
    for (number, want) in [(1, 0..8 << 20), (2, 8 << 20..16 << 20), (3, 16 << 20..SIZE)] {
        let part = format!("partNumber={number}&");
        let sent: Vec<_> = server.requests().into_iter().filter(|request| request.target.contains(&part)).collect();
        assert!(!sent.is_empty(), "part {number} was sent");
        assert!(sent.iter().all(|request| request.body == bytes[want.clone()]), "part {number}");
    }
}
