//! What a byte must cost on one core (copy, hash, cipher), and what `open_chunk` makes of it.
//!
//! The last column of the second table is the number to watch: the time of `open_chunk` over the sum of its parts, each
//! part measured alone in the same round. 1.0 means that nothing but arithmetic and one copy is left.
//! `cargo bench --bench crypto -- [--rounds N] [--json PATH]`

mod common;

use std::hint::black_box;

use bytes::Bytes;
use common::{Options, Results, Sealed, timed_on_core, warm_memory};
use modelfs::crypto::{Verify, open_chunk};
use modelfs::format::{HashAlg, Suite};
use modelfs::store::memory::MemoryStore;
use modelfs::store::{CipherChunk, fetch_chunk};
use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
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

    let suites = [(Suite::Aes256Gcm, &AES_256_GCM), (Suite::ChaCha20Poly1305, &CHACHA20_POLY1305)];
    let hashes = [HashAlg::Blake3, HashAlg::Sha256];
    let mut sealed = Vec::new();
    for (suite, _) in suites {
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
        for (suite, algorithm) in suites {
            let cipher = cipher_alone(algorithm, to);
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
    results.write_json("crypto", &options);
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

/// Opens blocks in place; what they are sealed from does not matter, so whatever lies there is sealed first, untimed.
fn cipher_alone(algorithm: &'static Algorithm, bytes: &mut [u8]) -> f64 {
    let key = LessSafeKey::new(UnboundKey::new(algorithm, &[8; 32]).expect("32 bytes"));
    let nonce = |number: usize| {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&(number as u64).to_be_bytes());
        Nonce::assume_unique_for_key(nonce)
    };
    let mut tags = Vec::with_capacity(bytes.len() / BLOCK);
    for (number, block) in bytes.chunks_mut(BLOCK).enumerate() {
        tags.push(key.seal_in_place_separate_tag(nonce(number), Aad::from([0; 16]), block).expect("short"));
    }
    timed_on_core(|| {
        for ((number, block), tag) in bytes.chunks_mut(BLOCK).enumerate().zip(tags) {
            key.open_in_place_separate_tag(nonce(number), Aad::from([0; 16]), tag, block, 0..).expect("genuine");
        }
    })
}
