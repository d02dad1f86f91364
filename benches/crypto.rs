//! What a byte must cost on one core (copy, hash, cipher), and what `open_chunk` makes of it.
//!
//! The last column of the second table is the number to watch: the time of `open_chunk` over the sum of its parts, each
//! part measured alone in the same round. 1.0 means that nothing but arithmetic and one copy is left.
//! The first tables compare the libraries that could open a block, at every block size a manifest may ask for: what
//! `crypto::implementation` decides by comes from them.
//! `cargo bench --bench crypto -- [--rounds N] [--json PATH] [--only libraries|open_chunk]`

mod common;

use std::hint::black_box;

use aws_lc_rs::aead as aws_lc;
use bytes::Bytes;
use common::{Options, Results, Sealed, timed_on_core, warm_memory};
use modelfs::crypto::{Implementation, Verify, implementation, open_chunk};
use modelfs::format::{HashAlg, Suite};
use modelfs::store::memory::MemoryStore;
use modelfs::store::{CipherChunk, fetch_chunk};
use ring::aead as ring_aead;
use sha2::Digest;

/// More than any cache: every pass comes from memory, as fetched chunks do.
const WORKING_SET: u64 = 192 << 20;
const BLOCK: usize = 64 << 10;

fn main() {
    let mut options = Options::parse();
    options.size = WORKING_SET.min(options.size);
    let mut results = Results::default();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    let len = options.size as usize;
    let (from, to) = (warm_memory(len), warm_memory(len));
    common::fill_random(1, from);

    if "libraries".contains(&options.only) {
        libraries(&options, &mut results, from, to);
    }
    if "open_chunk".contains(&options.only) {
        parts_and_whole(&options, &mut results, &runtime, from, to);
    }
    results.write_json("crypto", &options);
}

const SUITES: [Suite; 2] = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305];

fn parts_and_whole(
    options: &Options,
    results: &mut Results,
    runtime: &tokio::runtime::Runtime,
    from: &mut [u8],
    to: &mut [u8],
) {
    let len = from.len();
    let hashes = [HashAlg::Blake3, HashAlg::Sha256];
    let mut sealed = Vec::new();
    for suite in SUITES {
        for hash in hashes {
            let store = MemoryStore::new();
            let model = runtime.block_on(Sealed::new(&store, options.size, suite, hash, |_| {}));
            let (manifest, keys) = model.open();
            let chunks: Vec<CipherChunk> = model
                .layout
                .chunks()
                .map(|index| {
                    let fetched = fetch_chunk(&store, &manifest, 0, index);
                    let mut chunk = runtime.block_on(fetched).expect("memory");
                    // As they come off a wire or a disk: in huge pages or not is the allocator's choice, so ask for them.
                    let warm = warm_memory(chunk.stored_len() as usize);
                    let mut at = 0;
                    for piece in &chunk.pieces {
                        warm[at..at + piece.len()].copy_from_slice(piece);
                        at += piece.len();
                    }
                    chunk.pieces = vec![Bytes::from_static(warm)];
                    chunk
                })
                .collect();
            sealed.push((suite, hash, manifest, keys, chunks, model.layout));
        }
    }

    let gb = len as f64 / 1e9;
    for _ in 0..options.rounds {
        let copy = timed_on_core(|| copy_by_windows(from, to));
        results.add("copy, 128 KiB windows", "GB/s", "GB/s", gb / copy);
        let whole = timed_on_core(|| to.copy_from_slice(from));
        results.add("memcpy", "GB/s", "GB/s", gb / whole);
        let mut hash_time = Vec::new();
        for hash in hashes {
            let took = timed_on_core(|| hash_chunks(hash, from));
            results.add(hash.name(), "GB/s", "GB/s", gb / took);
            hash_time.push((hash, took));
        }
        for suite in SUITES {
            let cipher = cipher_alone(suite, to);
            results.add(suite.name(), "GB/s", "GB/s", gb / cipher);
            for (_, hash, manifest, keys, chunks, layout) in sealed.iter().filter(|it| it.0 == suite) {
                for verify in [Verify::Strict, Verify::Aead] {
                    // Without the hash it does not matter which.
                    if verify == Verify::Aead && *hash != HashAlg::Blake3 {
                        continue;
                    }
                    let took = timed_on_core(|| {
                        for chunk in chunks {
                            let range = layout.chunk_plain(chunk.index);
                            let slot = &mut to[range.start as usize..range.end as usize];
                            open_chunk(keys, manifest, 0, chunk, verify, slot, &mut []).expect("genuine");
                        }
                    });
                    let hashing = hash_time.iter().find(|(alg, _)| alg == hash).expect("measured").1;
                    let (mode, parts) = match verify {
                        Verify::Strict => (format!("strict {}", hash.name()), copy + hashing + cipher),
                        Verify::Aead => ("aead".to_owned(), copy + cipher),
                    };
                    let what = format!("open_chunk {} {mode}", suite.name());
                    results.add(&what, "GB/s ", "GB/s", gb / took);
                    results.add(&what, "parts alone", "GB/s", gb / parts);
                    results.add(&what, "time / parts", "ratio", took / parts);
                }
            }
        }
    }
    results.table("one core, floors", &["GB/s"], None);
    results.table(
        "one core, open_chunk, 8 MiB chunks into warm huge pages",
        &["GB/s ", "parts alone", "time / parts"],
        None,
    );
}

fn copy_by_windows(from: &[u8], to: &mut [u8]) {
    for (from, to) in from.chunks(128 << 10).zip(to.chunks_mut(128 << 10)) {
        to.copy_from_slice(from);
        black_box(to);
    }
}

fn hash_chunks(hash: HashAlg, bytes: &[u8]) {
    for chunk in bytes.chunks(8 << 20) {
        match hash {
            HashAlg::Blake3 => {
                let mut hasher = blake3::Hasher::new();
                chunk.chunks(128 << 10).for_each(|window| {
                    hasher.update(window);
                });
                black_box(hasher.finalize());
            }
            HashAlg::Sha256 => {
                let mut hasher = sha2::Sha256::new();
                chunk.chunks(128 << 10).for_each(|window| hasher.update(window));
                black_box(hasher.finalize());
            }
        }
    }
}

/// Opens blocks in place with the library the program would take; what they are sealed from does not matter, so whatever
/// lies there is sealed first, untimed.
fn cipher_alone(suite: Suite, bytes: &mut [u8]) -> f64 {
    let cipher = Cipher::new(implementation(suite), suite);
    let tags = cipher.seal_all(bytes, BLOCK);
    timed_on_core(|| cipher.open_all(bytes, BLOCK, &tags))
}

const LIBRARIES: [Implementation; 2] = [Implementation::Ring, Implementation::AwsLc];
const BLOCK_SIZES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];
const COLUMNS: [&str; 5] = ["4 KiB", "16 KiB", "64 KiB", "256 KiB", "1 MiB"];

/// Both libraries, both suites, every block size, in place and from a received buffer, alternating; then the hashes, and
/// what a context costs.
fn libraries(options: &Options, results: &mut Results, from: &mut [u8], to: &mut [u8]) {
    let gb = from.len() as f64 / 1e9;
    for _ in 0..options.rounds {
        for suite in SUITES {
            for (size, column) in BLOCK_SIZES.into_iter().zip(COLUMNS) {
                let tags = Cipher::new(Implementation::Ring, suite).seal_all(from, size);
                for library in LIBRARIES {
                    let cipher = Cipher::new(library, suite);
                    let mut add = |how: &str, took: f64| {
                        results.add(&format!("{}, {}, {how}", suite.name(), library.name()), column, "GB/s", gb / took);
                    };
                    to.copy_from_slice(from);
                    add("in place", timed_on_core(|| cipher.open_all(to, size, &tags)));
                    add("copy + in place", timed_on_core(|| cipher.open_copies(from, to, size, &tags)));
                    if let Cipher::AwsLc(_) = cipher {
                        add("gather", timed_on_core(|| cipher.gather_all(from, to, size, &tags)));
                    }
                    add("seal", timed_on_core(|| drop(cipher.seal_all(to, size))));
                }
            }
            for library in LIBRARIES {
                const CONTEXTS: u32 = 100_000;
                let took = timed_on_core(|| (0..CONTEXTS).for_each(|_| drop(black_box(Cipher::new(library, suite)))));
                let what = format!("{}, {}", suite.name(), library.name());
                results.add(&what, "a context, ns", "ns", took / f64::from(CONTEXTS) * 1e9);
            }
        }
        let mut hash = |what: &str, hash: &dyn Fn(&[u8])| {
            results.add(what, "GB/s by 128 KiB", "GB/s", gb / timed_on_core(|| hash(from)));
        };
        hash("BLAKE3", &|bytes| hash_chunks(HashAlg::Blake3, bytes));
        hash("SHA-256, sha2", &|bytes| hash_chunks(HashAlg::Sha256, bytes));
        hash("SHA-256, ring", &|bytes| {
            let mut hasher = ring::digest::Context::new(&ring::digest::SHA256);
            bytes.chunks(128 << 10).for_each(|window| hasher.update(window));
            black_box(hasher.finish());
        });
        hash("SHA-256, aws-lc", &|bytes| {
            let mut hasher = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
            bytes.chunks(128 << 10).for_each(|window| hasher.update(window));
            black_box(hasher.finish());
        });
        // Its widest code works on 16 blocks of 1 KiB at once: below that the narrower ones are seen.
        for (kib, column) in [(4, "GB/s by 4 KiB"), (16, "GB/s by 16 KiB"), (1024, "GB/s by 1 MiB")] {
            let took = timed_on_core(|| {
                let mut hasher = blake3::Hasher::new();
                for window in from.chunks(kib << 10) {
                    hasher.update(window);
                }
                black_box(hasher.finalize());
            });
            results.add("BLAKE3", column, "GB/s", gb / took);
        }
    }
    results.table("one core, GB/s by block size", &COLUMNS, None);
    results.table("one core, a cipher context made and dropped", &["a context, ns"], None);
    let hashes = ["GB/s by 4 KiB", "GB/s by 16 KiB", "GB/s by 128 KiB", "GB/s by 1 MiB"];
    results.table("one core, hashes", &hashes, None);
    for suite in SUITES {
        let ratio = |how: &str, other: &str| {
            let what = |library: Implementation, how: &str| format!("{}, {}, {how}", suite.name(), library.name());
            results.ratio(&what(Implementation::AwsLc, how), &what(Implementation::Ring, other), "64 KiB")
        };
        println!(
            "{}: aws-lc over ring at 64 KiB: in place {:.2}, from a buffer {:.2} (gather over copy + in place), seal {:.2}; this processor gets {}",
            suite.name(),
            ratio("in place", "in place"),
            ratio("gather", "copy + in place"),
            ratio("seal", "seal"),
            implementation(suite).name(),
        );
    }
}

/// One context of one library, as the program would make it.
#[allow(clippy::large_enum_variant)] // as in the program
enum Cipher {
    Ring(ring_aead::LessSafeKey),
    AwsLc(aws_lc::LessSafeKey),
}

const AAD: [u8; 16] = [0; 16];

impl Cipher {
    fn new(library: Implementation, suite: Suite) -> Cipher {
        match library {
            Implementation::Ring => {
                let algorithm = match suite {
                    Suite::Aes256Gcm => &ring_aead::AES_256_GCM,
                    Suite::ChaCha20Poly1305 => &ring_aead::CHACHA20_POLY1305,
                };
                let key = ring_aead::UnboundKey::new(algorithm, &[8; 32]).expect("32 bytes");
                Cipher::Ring(ring_aead::LessSafeKey::new(key))
            }
            Implementation::AwsLc => {
                let algorithm = match suite {
                    Suite::Aes256Gcm => &aws_lc::AES_256_GCM,
                    Suite::ChaCha20Poly1305 => &aws_lc::CHACHA20_POLY1305,
                };
                let key = aws_lc::UnboundKey::new(algorithm, &[8; 32]).expect("32 bytes");
                Cipher::AwsLc(aws_lc::LessSafeKey::new(key))
            }
        }
    }

    fn nonce(number: usize) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&(number as u64).to_be_bytes());
        nonce
    }

    fn seal_all(&self, bytes: &mut [u8], size: usize) -> Vec<[u8; 16]> {
        let seal = |(number, block): (usize, &mut [u8])| -> [u8; 16] {
            let nonce = Cipher::nonce(number);
            match self {
                Cipher::Ring(key) => {
                    let nonce = ring_aead::Nonce::assume_unique_for_key(nonce);
                    let tag = key.seal_in_place_separate_tag(nonce, ring_aead::Aad::from(AAD), block).expect("short");
                    tag.as_ref().try_into().expect("16 bytes")
                }
                Cipher::AwsLc(key) => {
                    let nonce = aws_lc::Nonce::assume_unique_for_key(nonce);
                    let tag = key.seal_in_place_separate_tag(nonce, aws_lc::Aad::from(AAD), block).expect("short");
                    tag.as_ref().try_into().expect("16 bytes")
                }
            }
        };
        bytes.chunks_mut(size).enumerate().map(seal).collect()
    }

    fn open(&self, number: usize, block: &mut [u8], tag: &[u8; 16]) {
        let nonce = Cipher::nonce(number);
        match self {
            Cipher::Ring(key) => {
                let nonce = ring_aead::Nonce::assume_unique_for_key(nonce);
                let aad = ring_aead::Aad::from(AAD);
                key.open_in_place_separate_tag(nonce, aad, (*tag).into(), block, 0..).expect("genuine");
            }
            Cipher::AwsLc(key) => {
                let nonce = aws_lc::Nonce::assume_unique_for_key(nonce);
                key.open_in_place_separate_tag(nonce, aws_lc::Aad::from(AAD), tag, block).expect("genuine");
            }
        }
    }

    fn open_all(&self, bytes: &mut [u8], size: usize, tags: &[[u8; 16]]) {
        for ((number, block), tag) in bytes.chunks_mut(size).enumerate().zip(tags) {
            self.open(number, block, tag);
        }
    }

    fn open_copies(&self, from: &[u8], to: &mut [u8], size: usize, tags: &[[u8; 16]]) {
        for (((number, sealed), block), tag) in from.chunks(size).enumerate().zip(to.chunks_mut(size)).zip(tags) {
            block.copy_from_slice(sealed);
            self.open(number, block, tag);
        }
    }

    fn gather_all(&self, from: &[u8], to: &mut [u8], size: usize, tags: &[[u8; 16]]) {
        let Cipher::AwsLc(key) = self else { panic!("only AWS-LC opens from one buffer into another") };
        for (((number, sealed), block), tag) in from.chunks(size).enumerate().zip(to.chunks_mut(size)).zip(tags) {
            let nonce = aws_lc::Nonce::assume_unique_for_key(Cipher::nonce(number));
            key.open_separate_gather(nonce, aws_lc::Aad::from(AAD), sealed, tag, block).expect("genuine");
        }
    }
}
