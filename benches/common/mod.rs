//! What the benches share: sealing a model of any size without holding it in memory, timing, tables, JSON.
//!
//! Numbers are medians over rounds in which the contenders alternate; ratios are taken round by round and only then
//! the median, so that a machine which slows down for a while slows both sides of each ratio. Nothing here fails on a
//! time.
#![allow(dead_code)] // each bench uses its own part

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use modelfs::cache::Model;
use modelfs::crypto::{self, Dek, FileHasher, ObjectSealer, Verify};
use modelfs::format::{
    Extent, HashAlg, ManifestBuilder, ManifestDigest, ModelId, NewFile, NewHeader, NewObject, ObjectLayout, Oid, Suite,
    Vid, names,
};
use modelfs::store::{ChunkSink, ChunkSource};
use serde_json::{Value, json};

/// The one file of the sealed model.
pub const FILE: &str = "model.safetensors";
pub const NAME: &str = "acme/fixture";

/// What was typed after `cargo bench --bench NAME --`.
pub struct Options {
    pub size: u64,
    pub rounds: usize,
    pub json: Option<PathBuf>,
    /// Where stores and plain copies go.
    pub dir: PathBuf,
    /// Compare with rclone and gocryptfs too.
    pub peers: bool,
    /// Only measurements whose name holds this word: for profiling.
    pub only: String,
    /// Started by `cargo test --all-targets` or alike: everything once and small, numbers mean nothing.
    pub smoke: bool,
}

impl Options {
    /// # Panics
    /// On words it does not know: a measurement of something else than was asked is worse than none.
    pub fn parse() -> Options {
        let mut options = Options {
            size: 1 << 30,
            rounds: 3,
            json: None,
            dir: std::env::temp_dir(),
            peers: true,
            only: String::new(),
            smoke: true,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
            match word.as_str() {
                "--bench" => options.smoke = false,
                "--size-mib" => options.size = value().parse::<u64>().expect("--size-mib is a number") << 20,
                "--rounds" => options.rounds = value().parse().expect("--rounds is a number"),
                "--json" => options.json = Some(value().into()),
                "--dir" => options.dir = value().into(),
                "--only" => options.only = value(),
                "--no-peers" => options.peers = false,
                other => panic!("unknown option {other}; known: --size-mib --rounds --json --dir --only --no-peers"),
            }
        }
        assert!(options.size >= 1 << 20 && options.rounds > 0, "at least 1 MiB and one round");
        if options.smoke {
            options.size = options.size.min(32 << 20);
            options.rounds = 1;
            options.peers = false;
            println!("smoke run, numbers mean nothing; measure with `cargo bench`");
        }
        options
    }
}

/// Pseudo-random bytes, several GB a second: neither the cipher nor a peer's compression gains anything from them.
pub fn fill_random(seed: u64, bytes: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.as_chunks_mut::<8>().0 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        *word = (z ^ (z >> 31)).to_le_bytes();
    }
}

/// The sum of the bytes as little-endian words: what a reader computes to prove that it saw every one of them.
pub fn sum_words(bytes: &[u8]) -> u64 {
    bytes.as_chunks::<8>().0.iter().fold(0, |sum: u64, word| sum.wrapping_add(u64::from_le_bytes(*word)))
}

/// A model of one file, in some store.
pub struct Sealed {
    pub model_id: ModelId,
    pub oid: Oid,
    pub layout: ObjectLayout,
    pub manifest: Vec<u8>,
    pub sum: u64,
    dek_bytes: [u8; 32],
}

impl Sealed {
    /// Seals `size` random bytes, chunk by chunk, 8 MiB chunks of 64 KiB blocks; `also` sees the plaintext.
    pub async fn new(
        store: &dyn ChunkSink,
        size: u64,
        suite: Suite,
        hash_alg: HashAlg,
        mut also: impl FnMut(&[u8]),
    ) -> Sealed {
        let (oid, vid, model_id) = (Oid([7; 32]), Vid([9; 16]), ModelId::of_name(NAME));
        let mut dek_bytes = [0; 32];
        fill_random(3, &mut dek_bytes);
        let dek = dek_of(&dek_bytes);
        let layout = ObjectLayout::new(size, 16, 23).expect("a valid layout");
        let sealer = ObjectSealer::new(&dek, suite, layout, hash_alg, oid, vid);
        let mut writer = store.begin(&names::data(model_id, oid), layout.stored_len()).await.expect("store");
        writer.write(Bytes::copy_from_slice(&sealer.header())).await.expect("store");
        let (mut hashes, mut tags, mut sum, mut hasher) = (Vec::new(), Vec::new(), 0u64, FileHasher::new());
        for index in layout.chunks() {
            let range = layout.chunk_plain(index);
            let mut buffer = vec![0; (range.end - range.start) as usize];
            fill_random(u64::from(index.0) + 1, &mut buffer);
            sum = sum.wrapping_add(sum_words(&buffer));
            hasher.update(&buffer);
            also(&buffer);
            hashes.push(sealer.seal_chunk(index, &mut buffer, &mut tags));
            writer.write(Bytes::from(buffer)).await.expect("store");
            writer.write(Bytes::copy_from_slice(&tags)).await.expect("store");
        }
        writer.finish(layout.stored_len()).await.expect("store");
        let mut builder = ManifestBuilder::new();
        let commit = sealer.commit();
        let new = NewObject { oid, layout, suite, inherited: false, origin_vid: vid, commit, hashes, coded: None };
        let object = builder.add_object(new);
        builder.add_file(NewFile {
            path: FILE.to_owned(),
            mode: 0o444,
            size,
            sha256: hasher.finish(),
            mtime: 1_790_000_000,
            extents: vec![Extent { object, object_offset: 0, len: size }],
        });
        let header = NewHeader {
            suite,
            hash_alg,
            model_id,
            vid,
            seq: 1,
            created_at: 1_790_000_000,
            msalt: [5; 32],
            previous: None,
        };
        let mut manifest = builder.finish(header).expect("a bench keeps the rules");
        let manifest = crypto::seal_manifest(&mut manifest, &dek, &[]).expect("sealed");
        Sealed { model_id, oid, layout, manifest, sum, dek_bytes }
    }

    pub fn open(&self) -> (modelfs::format::Manifest, crypto::ModelKeys) {
        crypto::open_manifest(&self.manifest, dek_of(&self.dek_bytes)).expect("opens")
    }

    pub fn model(&self, source: Arc<dyn ChunkSource>, verify: Verify) -> Arc<Model> {
        let digest = ManifestDigest::of(&self.manifest);
        Arc::new(Model::new(0, NAME.into(), digest, self.open(), source, verify))
    }
}

fn dek_of(bytes: &[u8; 32]) -> Dek {
    let mut copy = *bytes;
    Dek::from_secret(modelfs::mem::Secret::from_bytes(&mut copy))
}

/// Anonymous memory in huge pages where the host gives them, every page touched.
pub fn warm_memory(len: usize) -> &'static mut [u8] {
    let span = len.next_multiple_of(2 << 20) + (2 << 20);
    // SAFETY: a fresh private mapping that is never unmapped; the aligned part of it is handed out once.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = libc::mmap(std::ptr::null_mut(), span, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let start = (at as usize).next_multiple_of(2 << 20) as *mut u8;
        libc::madvise(start.cast(), len.next_multiple_of(2 << 20), libc::MADV_HUGEPAGE);
        std::ptr::write_bytes(start, 1, len);
        std::slice::from_raw_parts_mut(start, len)
    }
}

/// Processor time of this process so far, all threads, kernel included.
pub fn cpu_time() -> Duration {
    // SAFETY: rusage is plain integers, filled by the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

/// Processor time of this thread: what one core needs, also on a machine that has other things to do.
pub fn timed_on_core(work: impl FnOnce()) -> f64 {
    let now = || {
        // SAFETY: timespec is plain integers, filled by the call.
        let time = unsafe {
            let mut time: libc::timespec = std::mem::zeroed();
            libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time);
            time
        };
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let start = now();
    work();
    now() - start
}

pub fn timed(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

pub fn median(values: &[f64]) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Every number of a run: (what, how) -> one value a round.
#[derive(Default)]
pub struct Results {
    rows: Vec<((String, String), &'static str, Vec<f64>)>,
    verdicts: Vec<(String, bool)>,
    notes: Vec<String>,
}

impl Results {
    pub fn add(&mut self, what: &str, how: &str, unit: &'static str, value: f64) {
        let key = (what.to_owned(), how.to_owned());
        match self.rows.iter_mut().find(|(k, ..)| *k == key) {
            Some((.., values)) => values.push(value),
            None => self.rows.push((key, unit, vec![value])),
        }
    }

    pub fn values(&self, what: &str, how: &str) -> &[f64] {
        self.rows.iter().find(|((w, h), ..)| w == what && h == how).map_or(&[], |(.., values)| values)
    }

    pub fn median(&self, what: &str, how: &str) -> f64 {
        median(self.values(what, how))
    }

    /// The median over rounds of `what` / `against`, both done `how`.
    pub fn ratio(&self, what: &str, against: &str, how: &str) -> f64 {
        let pairs = self.values(what, how).iter().zip(self.values(against, how));
        median(&pairs.map(|(a, b)| a / b).collect::<Vec<_>>())
    }

    pub fn verdict(&mut self, text: String, holds: bool) {
        println!("VERDICT: {text}: {}", if holds { "holds" } else { "DOES NOT HOLD" });
        self.verdicts.push((text, holds));
    }

    pub fn note(&mut self, text: String) {
        println!("note: {text}");
        self.notes.push(text);
    }

    /// Rows by first appearance, columns as given; the number, and in brackets its ratio to `against`.
    pub fn table(&self, title: &str, columns: &[&str], against: Option<&str>) {
        println!("\n{title}");
        let mut whats: Vec<&str> = Vec::new();
        for ((what, how), ..) in &self.rows {
            if columns.contains(&how.as_str()) && !whats.contains(&what.as_str()) {
                whats.push(what);
            }
        }
        let width = whats.iter().map(|w| w.len()).max().unwrap_or(0) + 2;
        print!("{:width$}", "");
        columns.iter().for_each(|column| print!("{column:>22}"));
        println!();
        for what in whats {
            print!("{what:width$}");
            for how in columns {
                let value = self.median(what, how);
                let cell = match against {
                    _ if value.is_nan() => "-".to_owned(),
                    Some(other) => format!("{} [{:.2}]", short(value), self.ratio(what, other, how)),
                    None => short(value),
                };
                print!("{cell:>22}");
            }
            println!();
        }
    }

    pub fn write_json(&self, bench: &str, options: &Options) {
        let Some(path) = &options.json else { return };
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|((what, how), unit, values)| {
                json!({ "what": what, "how": how, "unit": unit, "median": median(values), "rounds": values })
            })
            .collect();
        let verdicts: Vec<Value> =
            self.verdicts.iter().map(|(text, holds)| json!({ "text": text, "holds": holds })).collect();
        let all = json!({
            "bench": bench,
            "machine": machine(),
            "file_bytes": options.size,
            "rounds": options.rounds,
            "smoke": options.smoke,
            "results": rows,
            "verdicts": verdicts,
            "notes": self.notes,
        });
        std::fs::write(path, serde_json::to_vec_pretty(&all).expect("plain values")).expect("--json can be written");
    }
}

fn short(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Cores, processor, kernel: no host name.
pub fn machine() -> Value {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown").to_owned()
    };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "cpu": field("model name"),
        "family": field("cpu family"),
        "model": field("model\t"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": kernel.trim(),
        "virtual": field("flags").contains("hypervisor"),
    })
}
