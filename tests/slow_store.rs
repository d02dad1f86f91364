//! A store behind a bad line: far, narrow, one connection in ten stuck. Nothing here fails on a time; what is counted is
//! requests, and every byte is looked at.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::hostile::{Hostile, Request, head, object, respond};
use common::slow::{Line, Sick, SlowLine, one_in_ten};
use futures::StreamExt;
use modelfs::error::Code;
use modelfs::store::pace::{EXTRA_BURST, EXTRA_PER_RANGE_MAX, EXTRA_SHARE};
use modelfs::store::{ChunkSink, ChunkSource, Patience, StoreOptions, open};
use modelfs::telemetry::Telemetry;

const RANGE_BYTES: usize = 256 << 10;
const RANGES: usize = 64;

/// Serves ranges of `whole`, one request a connection.
fn serve(whole: Arc<Vec<u8>>) -> Hostile {
    Hostile::start(move |request, stream| serve_range(&whole, request, stream))
}

fn serve_range(whole: &[u8], request: &Request, stream: &mut std::net::TcpStream) -> std::io::Result<()> {
    let (first, last) = request.range().expect("only ranges are asked for");
    let range = format!("bytes {first}-{last}/{}", whole.len());
    respond(stream, "206 Partial Content", &[("Content-Range", &range)], &whole[first as usize..=last as usize])
}

/// The store behind `line`, and where it counts.
fn store_over(server: &Hostile, line: &SlowLine, patience: Patience) -> (Arc<dyn ChunkSink>, Arc<Telemetry>) {
    let telemetry = Arc::new(Telemetry::default());
    let mut aws = server.settings();
    aws[0].1 = format!("http://{}", line.address());
    let opts = StoreOptions {
        aws,
        ignore_environment: true,
        patience,
        telemetry: telemetry.clone(),
        ..StoreOptions::default()
    };
    (open(&"s3://models/prefix".parse().expect("a URL"), &opts).expect("settings"), telemetry)
}

async fn read_all(store: &dyn ChunkSource, whole: &[u8], parallel: usize) {
    let mut ranges = futures::stream::iter(0..whole.len() / RANGE_BYTES)
        .map(|number| async move {
            let start = (number * RANGE_BYTES) as u64;
            (number, store.read_range("m/d/x", start..start + RANGE_BYTES as u64).await)
        })
        .buffered(parallel);
    while let Some((number, pieces)) = ranges.next().await {
        let bytes = pieces.unwrap_or_else(|e| panic!("range {number}: {}", e.chain())).concat();
        assert!(bytes == whole[number * RANGE_BYTES..][..RANGE_BYTES], "range {number} has other bytes");
    }
}

/// The size of the object: no multiple of the period of its bytes, so that a piece in the wrong place is seen.
fn whole() -> Arc<Vec<u8>> {
    Arc::new(object(RANGES * RANGE_BYTES))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_which_every_tenth_connection_is_stuck_comes_whole_within_the_budget() {
    let whole = whole();
    let server = serve(whole.clone());
    let line = Line { latency: Duration::from_millis(100), bytes_per_s: 50_000_000, sick: one_in_ten };
    let line = SlowLine::to(server.address(), line);
    let (store, telemetry) = store_over(&server, &line, Patience::default());

    read_all(&*store, &whole, 16).await;

    let (sent, won) = (telemetry.hedges_sent.get(), telemetry.hedges_won.get());
    assert!(sent >= 1 && won >= 1, "{sent} sent, {won} won");
    // Where a machine that stood still used the extra ones up, a range whose request is stuck is asked for anew in the
    // end, and earns its share again.
    let asked = server.requests().len();
    let firsts = (asked - asked.min(sent as usize)).max(RANGES);
    let most = firsts as f64 * EXTRA_SHARE + EXTRA_BURST;
    assert!(sent as f64 <= most, "{sent} extra requests beside {firsts}, at most {most}");
    assert!(firsts <= RANGES + RANGES / 4, "{asked} requests for {RANGES} ranges, {sent} of them extra");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_a_connection_is_stuck_another_one_answers() {
    // The first ten connections are well, so that there are peers to compare with; then one is not.
    fn mute(connection: usize) -> Option<Sick> {
        (connection == 10).then_some(Sick::SilentAfter(0))
    }
    fn head_alone(connection: usize) -> Option<Sick> {
        (connection == 10).then_some(Sick::SilentAfter(60))
    }
    fn half_a_body(connection: usize) -> Option<Sick> {
        (connection == 10).then_some(Sick::SilentAfter(RANGE_BYTES / 2))
    }
    fn trickle(connection: usize) -> Option<Sick> {
        (connection == 10).then_some(Sick::Trickle(10_000))
    }
    let whole = whole();
    for (what, sick) in
        [("mute", mute as fn(usize) -> _), ("head", head_alone), ("half", half_a_body), ("slow", trickle)]
    {
        let line = Line { latency: Duration::from_millis(1), bytes_per_s: 100_000_000, sick };
        let mut won = 0;
        // On a machine that stood still the stuck connection may have been an extra one: then once more.
        for _ in 0..5 {
            let server = serve(whole.clone());
            let line = SlowLine::to(server.address(), line);
            let (store, telemetry) = store_over(&server, &line, Patience::default());

            read_all(&*store, &whole[..RANGE_BYTES * 16], 1).await;

            won = telemetry.hedges_won.get();
            if won >= 1 {
                break;
            }
        }
        assert!(won >= 1, "{what}: no other connection answered");
    }
}

/// The extra request may meet anything; the first one still has its turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_of_an_extra_request_is_never_the_answer() {
    // Requests for the last range.
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let whole = whole();
    let served = whole.clone();
    let server = Hostile::start(move |request, stream| {
        if request.range().is_none_or(|(start, _)| start != (RANGE_BYTES * 10) as u64) {
            return serve_range(&served, request, stream);
        }
        if CALLS.fetch_add(1, Ordering::SeqCst) > 0 {
            return respond(stream, "404 Not Found", &[], b"<Code>NoSuchKey</Code>");
        }
        // Answers only when an extra request was refused.
        while CALLS.load(Ordering::SeqCst) == 1 {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(50));
        serve_range(&served, request, stream)
    });
    let line = Line { latency: Duration::ZERO, bytes_per_s: 1_000_000_000, sick: |_| None };
    let line = SlowLine::to(server.address(), line);
    let (store, telemetry) = store_over(&server, &line, Patience::default());

    read_all(&*store, &whole[..RANGE_BYTES * 10], 1).await;
    // Of a machine that stood still: those may win.
    let (sent, won) = (telemetry.hedges_sent.get(), telemetry.hedges_won.get());

    let last = RANGE_BYTES * 10..RANGE_BYTES * 11;
    let pieces = store.read_range("m/d/x", last.start as u64..last.end as u64).await.expect("the first one's answer");

    assert!(pieces.concat() == whole[last]);
    assert!(telemetry.hedges_sent.get() > sent);
    assert_eq!(telemetry.hedges_won.get(), won);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_answers_nobody_ends_in_an_error_after_a_bounded_number_of_requests() {
    static DEAD: AtomicBool = AtomicBool::new(false);
    fn once_dead(_: usize) -> Option<Sick> {
        DEAD.load(Ordering::SeqCst).then_some(Sick::SilentAfter(0))
    }
    let whole = whole();
    let server = serve(whole.clone());
    let line = Line { latency: Duration::ZERO, bytes_per_s: 1_000_000_000, sick: once_dead };
    let line = SlowLine::to(server.address(), line);
    let patience = Patience { attempt: Duration::from_secs(3), attempts_max: 2, ..Patience::default() };
    let (store, telemetry) = store_over(&server, &line, patience);
    read_all(&*store, &whole[..RANGE_BYTES * 10], 1).await;
    DEAD.store(true, Ordering::SeqCst);
    let sent = telemetry.hedges_sent.get();

    let error = store.read_range("m/d/x", 0..1000).await.expect_err("nobody answers");

    assert_eq!(error.code(), Code::Deadline, "{}", error.chain());
    let after = server.requests().iter().filter(|request| request.range() == Some((0, 999))).count();
    assert!(after <= 2 * (1 + EXTRA_PER_RANGE_MAX as usize), "{after} requests");
    assert!(telemetry.hedges_sent.get() > sent, "it was tried");
}

/// A small object is hedged too: the manifest of a mount is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_object_on_a_stuck_connection_is_asked_for_again() {
    fn first(connection: usize) -> Option<Sick> {
        (connection == 0).then_some(Sick::SilentAfter(0))
    }
    let server = Hostile::start(|_, stream| {
        head(stream, "200 OK", &[], Some(5))?;
        std::io::Write::write_all(stream, b"small")
    });
    let line = Line { latency: Duration::ZERO, bytes_per_s: 1_000_000_000, sick: first };
    let line = SlowLine::to(server.address(), line);
    let (store, telemetry) = store_over(&server, &line, Patience::default());
    assert_eq!(store.read_small("m/name", 100).await.expect("served"), "small");
    assert_eq!(telemetry.hedges_won.get(), 1);
}
