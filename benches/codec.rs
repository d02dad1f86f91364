//! What decoding a chunk costs one core against copying its plaintext, and what coding one costs the writer.
//!
//! For each kind of element and each implementation that runs here: weights with a normal distribution, 8 MiB chunks, a
//! working set beyond any cache, into warm huge pages. `decode` reads whole streams from memory; `as opened` gets them
//! in blocks of 64 KiB, copied first into a scratch of a segment and a block, as a cipher would put them there, and decodes each segment
//! while it is warm. The second table has the ratios to memcpy of the same plaintext in the same round.
//! `MODELFS_BENCH_WEIGHTS=PATH cargo bench --bench codec -- [--rounds N] [--json PATH] [--only bf16]` measures a file of
//! weights besides, as what sniffing takes it for.

mod common;

use common::{Options, Results, fill_random, timed_on_core, warm_memory};
use modelfs::codec::{self, Decoder, Implementation, Kind};

const WORKING_SET: u64 = 192 << 20;
const CHUNK: usize = 8 << 20;
const BLOCK: usize = 64 << 10;
/// Chunks that are coded a round; the writer is not the fast side.
const CODED_CHUNKS: usize = 6;

fn main() {
    let mut options = Options::parse();
    options.size = WORKING_SET.min(options.size);
    let mut results = Results::default();
    let len = options.size as usize;
    let (plain, to) = (warm_memory(len), warm_memory(len));
    let normals = normals();
    for kind in Kind::ALL.into_iter().filter(|kind| kind.name().contains(options.only.as_str())) {
        fill_weights(kind, &normals, plain);
        assert_eq!(codec::sniff(&plain[..CHUNK]), Some((kind, 0)));
        measure(kind.name(), (kind, 0), plain, to, &options, &mut results);
    }
    if let Some(path) = std::env::var_os("MODELFS_BENCH_WEIGHTS") {
        let weights = std::fs::read(path).expect("MODELFS_BENCH_WEIGHTS is a file");
        let weights = &weights[..weights.len().min(len)];
        // The middle: a header or a vocabulary says little of what the rest is.
        let found = codec::sniff(&weights[(weights.len() / 2) & !7..]);
        results.note(format!("the given weights are taken for {found:?}"));
        if let Some((kind, skew)) = found {
            measure("given weights", (kind, skew), weights, to, &options, &mut results);
        }
    }
    fill_random(1, &mut plain[..CHUNK]);
    results.verdict("random bytes are not taken for weights".into(), codec::sniff(&plain[..CHUNK]).is_none());
    results.table("one core, GB/s of plaintext", &["memcpy", "decode", "as opened", "encode"], None);
    results.table("of memcpy in the same round", &["decode / memcpy", "as opened / memcpy"], None);
    results.table("coded / plain", &["size"], None);
    results.write_json("codec", &options);
}

fn measure(
    what: &str,
    (kind, skew): (Kind, usize),
    plain: &[u8],
    to: &mut [u8],
    options: &Options,
    results: &mut Results,
) {
    let mut coded = Vec::new();
    let mut streams = Vec::new();
    for chunk in plain.chunks(CHUNK) {
        codec::encode(kind, skew, chunk, &mut coded);
        // In huge pages, as what was decrypted is.
        let warm = warm_memory(coded.len());
        warm.copy_from_slice(&coded);
        streams.push(&*warm);
    }
    let coded_len: usize = streams.iter().map(|stream| stream.len()).sum();
    results.add(what, "size", "ratio", coded_len as f64 / plain.len() as f64);
    let scratch = warm_memory(codec::SEGMENT_BYTES_MAX + BLOCK);
    let to = &mut to[..plain.len()];
    let gb = plain.len() as f64 / 1e9;
    for round in 0..options.rounds {
        let copy = timed_on_core(|| {
            plain.chunks(CHUNK).zip(to.chunks_mut(CHUNK)).for_each(|(from, to)| to.copy_from_slice(from));
        });
        results.add(what, "memcpy", "GB/s", gb / copy);
        for implementation in Implementation::all_here() {
            let row = format!("{what} {}", implementation.name());
            to.fill(0);
            let took = timed_on_core(|| {
                for (stream, to) in streams.iter().zip(to.chunks_mut(CHUNK)) {
                    Decoder::with(implementation, stream.len(), to.len()).finish(stream, to).expect("genuine");
                }
            });
            assert!(round > 0 || *to == *plain, "{row} decodes to something else");
            results.add(&row, "decode", "GB/s", gb / took);
            results.add(&row, "decode / memcpy", "ratio", copy / took);
            let took = timed_on_core(|| {
                for (stream, to) in streams.iter().zip(to.chunks_mut(CHUNK)) {
                    as_opened(implementation, stream, scratch, to);
                }
            });
            results.add(&row, "as opened", "GB/s", gb / took);
            results.add(&row, "as opened / memcpy", "ratio", copy / took);
            let part = &plain[..plain.len().min(CODED_CHUNKS * CHUNK)];
            let took = timed_on_core(|| {
                for chunk in part.chunks(CHUNK) {
                    codec::encode_with(implementation, kind, skew, chunk, &mut coded);
                }
            });
            results.add(&row, "encode", "GB/s", part.len() as f64 / 1e9 / took);
        }
    }
}

fn as_opened(implementation: Implementation, stream: &[u8], scratch: &mut [u8], to: &mut [u8]) {
    let mut decoder = Decoder::with(implementation, stream.len(), to.len());
    let mut held = 0;
    for block in stream.chunks(BLOCK) {
        scratch[held..held + block.len()].copy_from_slice(block);
        held += block.len();
        let used = decoder.advance(&scratch[..held], to).expect("genuine");
        scratch.copy_within(used..held, 0);
        held -= used;
    }
    decoder.finish(&scratch[..held], to).expect("genuine");
}

/// Values with a normal distribution, standard deviation 0.02.
fn normals() -> Vec<f32> {
    let mut random = vec![0; 16 << 20];
    fill_random(2, &mut random);
    let uniform = |bytes: [u8; 8]| ((u64::from_le_bytes(bytes) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let pairs = random.as_chunks::<8>().0.as_chunks::<2>().0;
    let normal = |&[a, b]: &[[u8; 8]; 2]| {
        (0.02 * (-2.0 * uniform(a).ln()).sqrt() * (std::f64::consts::TAU * uniform(b)).cos()) as f32
    };
    pairs.iter().map(normal).collect()
}

/// The values over and over, each time from another one on.
fn fill_weights(kind: Kind, normals: &[f32], to: &mut [u8]) {
    for (turn, part) in to.chunks_mut(normals.len() * kind.width()).enumerate() {
        let values = normals.iter().cycle().skip(turn * 7919);
        for (bytes, value) in part.chunks_exact_mut(kind.width()).zip(values) {
            let bits = value.to_bits();
            match kind {
                Kind::F32 => bytes.copy_from_slice(&bits.to_le_bytes()),
                Kind::Bf16 => bytes.copy_from_slice(&((bits >> 16) as u16).to_le_bytes()),
                Kind::F16 => bytes.copy_from_slice(&f16(bits).to_le_bytes()),
            }
        }
    }
}

/// The f16 nearest below in magnitude, for values of weights.
fn f16(bits: u32) -> u16 {
    let (sign, exponent) = (bits >> 16 & 0x8000, (bits >> 23 & 0xff) as i32 - 112);
    let magnitude = match exponent {
        1.. => (exponent as u32) << 10 | bits >> 13 & 0x3ff,
        _ => (bits & 0x7f_ffff | 0x80_0000) >> (14 - exponent).min(31),
    };
    (sign | magnitude) as u16
}
