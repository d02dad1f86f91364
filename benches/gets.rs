//! The floor of every cold load: whole objects fetched by plain parallel range GETs and thrown away.
//!
//! Three ways to get the same parts of the same objects, alternating:
//! - `store`: modelfs' own store layer, as a mount fetches, retries and rules of the wire included;
//! - `client`: the HTTP client below it alone, pieces dropped as they arrive;
//! - `bare`: one blocking socket and one buffer a thread, nothing kept, nothing allocated: the least a client can do.
//!
//! Of `s3://` stores (settings from `AWS_...`) the last two ask by presigned URL, or plainly under
//! `AWS_SKIP_SIGNATURE=true`; an `http://` URL is asked as it is, without `store`. Each part is checked for its status and
//! counted to its last byte, and never looked at.
//!
//! `gets STORE NAME... --parallel 16 --part 8MiB --repeat 3 --json`, through `cargo bench --bench gets --` or by the
//! path of the executable. Without STORE: a small run against a server of its own, whose numbers mean nothing.

#[path = "common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use common::{cpu_time, machine, median};
use modelfs::store::{ChunkSink, StoreOptions, StoreUrl, open};
use modelfs::units::{parse_size, show_size};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::signer::Signer;
use serde_json::json;
use url::Url;

/// Fetch whole objects by parallel range GETs and throw the bytes away
#[derive(Debug, Parser)]
#[command(name = "gets")]
struct Typed {
    /// s3://bucket/prefix, or the http:// URL of a folder
    store: Option<String>,
    /// Objects below the store
    names: Vec<String>,
    /// All objects below this prefix as well; needs a store that lists (s3://)
    #[arg(long, value_name = "PREFIX")]
    all_under: Option<String>,
    /// Requests in flight
    #[arg(long, default_value_t = 16)]
    parallel: usize,
    /// Bytes of one request
    #[arg(long, default_value = "8MiB", value_parser = size)]
    part: u64,
    /// Rounds; the ways alternate within each
    #[arg(long, default_value_t = 1)]
    repeat: usize,
    /// Only these ways
    #[arg(long, value_delimiter = ',', default_values = ["store", "client", "bare"])]
    ways: Vec<String>,
    /// Threads of the runtime below `store` and `client`, as many as a mount has
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
    /// What `cargo bench` adds
    #[arg(long, hide = true)]
    bench: bool,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|e| e.to_string())
}

/// One object to fetch. The URL may hold a signature: it is never printed.
struct Object {
    name: String,
    url: Url,
    size: u64,
}

/// One request.
struct Part {
    object: usize,
    range: Range<u64>,
}

struct Job {
    store: Option<Arc<dyn ChunkSink>>,
    objects: Vec<Object>,
    parts: Vec<Part>,
    parallel: usize,
}

impl Job {
    fn bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.size).sum()
    }
}

fn main() {
    let mut typed = Typed::parse();
    let own_server = typed.store.is_none();
    if own_server {
        (typed.part, typed.parallel) = (1 << 20, 4);
        typed.store = Some(serve_small());
        typed.names = vec!["a".into(), "b".into()];
        eprintln!("no STORE given: a small run against a server of its own, numbers mean nothing");
    }
    assert!(
        typed.part > 0 && typed.parallel > 0 && typed.repeat > 0,
        "parts, requests and rounds: at least one of each"
    );
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(typed.threads).enable_all().build().expect("a runtime");
    let job = Arc::new(runtime.block_on(job(&typed)));
    let ways = typed.ways.iter().filter(|way| match way.as_str() {
        "store" => job.store.is_some(),
        "client" => true,
        "bare" => job.objects.iter().all(|object| object.url.scheme() == "http"),
        other => panic!("no way called {other}; there are store, client and bare"),
    });
    let ways: Vec<&str> = ways.map(String::as_str).collect();
    let mut rounds: Vec<Vec<(f64, f64)>> = vec![Vec::new(); ways.len()];
    for _ in 0..typed.repeat {
        for (way, taken) in ways.iter().zip(&mut rounds) {
            let (start, cpu) = (Instant::now(), cpu_time());
            let bytes = match *way {
                "store" => runtime.block_on(through_store(job.clone())),
                "client" => runtime.block_on(through_client(job.clone())),
                _ => through_bare(&job),
            };
            let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_time() - cpu);
            assert_eq!(bytes, job.bytes(), "{way}: every byte came, once");
            taken.push((seconds, cpu.as_secs_f64()));
        }
    }
    tell(&typed, &job, &ways, &rounds);
}

fn tell(typed: &Typed, job: &Job, ways: &[&str], rounds: &[Vec<(f64, f64)>]) {
    let gb = job.bytes() as f64 / 1e9;
    let mut told = serde_json::Map::new();
    for (way, taken) in ways.iter().zip(rounds) {
        let seconds: Vec<f64> = taken.iter().map(|(seconds, _)| *seconds).collect();
        let cpu_s: Vec<f64> = taken.iter().map(|(_, cpu)| *cpu).collect();
        let (rate, cpu_s_per_gb) = (gb / median(&seconds), median(&cpu_s) / gb);
        if !typed.json {
            println!("{way:<7} {:8.3} s  {rate:6.3} GB/s  {cpu_s_per_gb:6.3} CPU s/GB", median(&seconds));
        }
        told.insert(
            (*way).to_owned(),
            json!({ "seconds": median(&seconds), "gb_per_s": rate, "cpu_s_per_gb": cpu_s_per_gb,
                    "rounds_seconds": seconds, "rounds_cpu_seconds": cpu_s }),
        );
    }
    let (objects, bytes) = (job.objects.len(), job.bytes());
    if typed.json {
        let all = json!({
            "bench": "gets", "machine": machine(), "objects": objects, "bytes": bytes, "parallel": typed.parallel,
            "part_bytes": typed.part, "repeat": typed.repeat, "threads": typed.threads, "ways": told,
        });
        println!("{all}");
    } else {
        let (all, part) = (show_size(bytes), show_size(typed.part));
        println!("{all} in {objects} objects, by {part}, {} in flight, {} rounds", typed.parallel, typed.repeat);
    }
}

/// What to fetch: sizes are asked of the server, parts cut.
async fn job(typed: &Typed) -> Job {
    let at = typed.store.as_deref().expect("given, or our own");
    let mut names = typed.names.clone();
    let (store, base) = if at.starts_with("http") {
        assert!(typed.all_under.is_none(), "--all-under needs a store that lists: s3://bucket/prefix");
        (None, Base::Folder(Url::parse(&format!("{}/", at.trim_end_matches('/'))).expect("STORE is a URL")))
    } else {
        let url: StoreUrl = at.parse().expect("STORE is s3://bucket/prefix or an http:// URL");
        let store = open(&url, &StoreOptions::default()).expect("settings of the store");
        if let Some(prefix) = &typed.all_under {
            names.extend(store.list(prefix).await.expect("a listing").into_iter().map(|listed| listed.name));
        }
        (Some(store), Base::s3(&url))
    };
    assert!(!names.is_empty(), "name at least one object");
    let client = reqwest::Client::builder().http1_only().build().expect("an HTTP client");
    let mut objects = Vec::new();
    for name in names {
        let url = base.url(&name).await;
        let answer = client.get(url.clone()).header("range", "bytes=0-0").send().await.expect("an answer");
        let whole = answer.headers().get("content-range").and_then(|range| range.to_str().ok()?.rsplit_once('/'));
        let size = whole.and_then(|(_, size)| size.parse().ok());
        let size = size.unwrap_or_else(|| panic!("{name}: status {}, no size", answer.status()));
        objects.push(Object { name, url, size });
    }
    let cut = objects.iter().enumerate().flat_map(|(number, object)| {
        let starts = (0..object.size).step_by(usize::try_from(typed.part).expect("a part fits in memory"));
        starts.map(move |start| Part { object: number, range: start..object.size.min(start + typed.part) })
    });
    Job { store, parts: cut.collect(), parallel: typed.parallel, objects }
}

/// From names to URLs.
enum Base {
    Folder(Url),
    S3 { signer: Box<AmazonS3>, prefix: String },
}

impl Base {
    fn s3(url: &StoreUrl) -> Base {
        let StoreUrl::S3 { bucket, prefix } = url else { panic!("a local store is not fetched by GETs") };
        let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_allow_http(true);
        if builder.get_config_value(&AmazonS3ConfigKey::SkipSignature).is_some_and(|value| value == "true") {
            let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint).expect("AWS_ENDPOINT_URL is set");
            let folder = format!("{}/{bucket}/{prefix}", endpoint.trim_end_matches('/'));
            return Base::Folder(Url::parse(&format!("{}/", folder.trim_end_matches('/'))).expect("a URL"));
        }
        let signer = Box::new(builder.build().expect("settings of the store"));
        Base::S3 { signer, prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") } }
    }

    async fn url(&self, name: &str) -> Url {
        match self {
            Base::Folder(folder) => folder.join(name).expect("a name makes a URL"),
            Base::S3 { signer, prefix } => {
                let path = object_store::path::Path::from(format!("{prefix}{name}"));
                signer.signed_url(http::Method::GET, &path, Duration::from_secs(24 * 3600)).await.expect("signed")
            }
        }
    }
}

async fn through_store(job: Arc<Job>) -> u64 {
    let source = job.store.clone().expect("chosen only where there is one");
    in_parallel(job, move |job, part| {
        let source = source.clone();
        async move {
            let (object, range) = (&job.objects[job.parts[part].object], job.parts[part].range.clone());
            let pieces = source.read_range(&object.name, range).await.expect("served");
            pieces.iter().map(|piece| piece.len() as u64).sum()
        }
    })
    .await
}

async fn through_client(job: Arc<Job>) -> u64 {
    let client = reqwest::Client::builder().http1_only().pool_max_idle_per_host(job.parallel);
    let client = client.no_gzip().no_brotli().no_zstd().no_deflate().build().expect("an HTTP client");
    in_parallel(job, move |job, part| {
        let client = client.clone();
        async move {
            let (object, range) = (&job.objects[job.parts[part].object], &job.parts[part].range);
            let asked = format!("bytes={}-{}", range.start, range.end - 1);
            let mut answer = client.get(object.url.clone()).header("range", asked).send().await.expect("an answer");
            assert_eq!(answer.status(), 206, "{}", object.name);
            let mut bytes = 0;
            while let Some(piece) = answer.chunk().await.expect("the rest of the answer") {
                bytes += piece.len() as u64;
            }
            assert_eq!(bytes, range.end - range.start, "{}: the whole part", object.name);
            bytes
        }
    })
    .await
}

/// Runs `one` on every part, `parallel` at a time, each runner a task of its own.
async fn in_parallel<F>(job: Arc<Job>, one: impl Fn(Arc<Job>, usize) -> F + Clone + Send + 'static) -> u64
where
    F: Future<Output = u64> + Send,
{
    let next = Arc::new(AtomicUsize::new(0));
    let runners: Vec<_> = (0..job.parallel)
        .map(|_| {
            let (job, next, one) = (job.clone(), next.clone(), one.clone());
            tokio::spawn(async move {
                let mut bytes = 0;
                loop {
                    let part = next.fetch_add(1, Ordering::Relaxed);
                    if part >= job.parts.len() {
                        return bytes;
                    }
                    bytes += one(job.clone(), part).await;
                }
            })
        })
        .collect();
    let mut bytes = 0;
    for runner in runners {
        bytes += runner.await.expect("a runner panicked");
    }
    bytes
}

/// A socket's reads: as large as a receive window grows, so that a wake-up takes all that is there.
const BARE_BUFFER_BYTES: usize = 512 << 10;

fn through_bare(job: &Job) -> u64 {
    let (next, bytes) = (AtomicUsize::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..job.parallel {
            scope.spawn(|| {
                let mut buffer = vec![0; BARE_BUFFER_BYTES];
                let mut connection = None;
                while let Some(part) = job.parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let url = &job.objects[part.object].url;
                    let got = bare_get(&mut connection, url, &part.range, &mut buffer).expect("served");
                    bytes.fetch_add(got, Ordering::Relaxed);
                }
            });
        }
    });
    bytes.into_inner()
}

/// One range by one request on a connection that is kept. Knows no more of HTTP/1.1 than servers of files need.
fn bare_get(
    connection: &mut Option<(String, TcpStream)>,
    url: &Url,
    range: &Range<u64>,
    buffer: &mut [u8],
) -> std::io::Result<u64> {
    let (host, port) = (url.host_str().expect("a host"), url.port_or_known_default().expect("a port"));
    let address = format!("{host}:{port}");
    if connection.as_ref().is_none_or(|(kept, _)| *kept != address) {
        let stream = TcpStream::connect(&address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        *connection = Some((address, stream));
    }
    let (address, stream) = connection.as_mut().expect("just made");
    let path = &url[url::Position::BeforePath..url::Position::AfterQuery];
    let (first, last) = (range.start, range.end - 1);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nRange: bytes={first}-{last}\r\n\r\n")?;
    let mut filled = 0;
    let head = loop {
        let got = stream.read(&mut buffer[filled..])?;
        assert!(got > 0, "the server hung up within a head");
        filled += got;
        if let Some(end) = buffer[..filled].windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        assert!(filled < 64 << 10, "a head without end");
    };
    let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
    let status = text.split_whitespace().nth(1).unwrap_or("");
    assert_eq!(status, "206", "answer to bytes {first} to {last}");
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<u64>().ok());
    assert_eq!(length, Some(range.end - range.start), "an answer in chunks is not for this client");
    let mut left = (range.end - range.start).checked_sub((filled - head) as u64).expect("no more than asked for");
    while left > 0 {
        let most = left.min(buffer.len() as u64) as usize;
        let got = stream.read(&mut buffer[..most])?;
        assert!(got > 0, "the server hung up within a body");
        left -= got as u64;
    }
    if text.contains("connection: close") {
        *connection = None;
    }
    Ok(range.end - range.start)
}

/// Two objects of 4 MiB and a bit over HTTP, for as long as this process lives.
fn serve_small() -> String {
    const SIZE: usize = (4 << 20) + 17;
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let address = listener.local_addr().expect("a bound listener has an address");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || -> std::io::Result<()> {
                let body = vec![7; SIZE];
                loop {
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        let mut byte = [0];
                        stream.read_exact(&mut byte)?;
                        request.push(byte[0]);
                    }
                    let text = String::from_utf8_lossy(&request).to_ascii_lowercase();
                    let range = text.lines().find_map(|line| line.strip_prefix("range: bytes=")?.split_once('-'));
                    let (first, last) = range.expect("a range");
                    let (first, last): (usize, usize) = (first.parse().expect("first"), last.parse().expect("last"));
                    let length = last + 1 - first;
                    write!(
                        stream,
                        "HTTP/1.1 206 Partial Content\r\nContent-Length: {length}\r\nContent-Range: bytes {first}-{last}/{SIZE}\r\n\r\n"
                    )?;
                    stream.write_all(&body[first..=last])?;
                }
            });
        }
    });
    format!("http://{address}")
}
