//! A second writer of docs/FORMAT.md a.2 to a.4, from the page and with crates that `modelfs` does not encrypt with.

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use hmac::{Hmac, Mac};
use modelfs::format::ManifestHeader;
use sha2::{Digest, Sha256, Sha512};

/// `SHAKE256(seed)[:N]`, as the page defines it.
pub fn det(len: usize, seed: &str) -> Vec<u8> {
    const RATE: usize = 136;
    assert!(seed.len() < RATE, "one block of input is enough for the names of the page");
    let mut block = [0u8; 200];
    block[..seed.len()].copy_from_slice(seed.as_bytes());
    block[seed.len()] = 0x1f;
    block[RATE - 1] |= 0x80;
    let mut state: [u64; 25] = std::array::from_fn(|i| u64::from_le_bytes(block[8 * i..][..8].try_into().unwrap()));
    let mut out = Vec::with_capacity(len + RATE);
    while out.len() < len {
        keccak_f(&mut state);
        out.extend(state[..RATE / 8].iter().flat_map(|lane| lane.to_le_bytes()));
    }
    out.truncate(len);
    out
}

/// Keccak-f[1600], FIPS 202.
fn keccak_f(a: &mut [u64; 25]) {
    let mut lfsr = 1u8;
    for _ in 0..24 {
        let c: [u64; 5] = std::array::from_fn(|x| (0..5).fold(0, |sum, y| sum ^ a[x + 5 * y]));
        for i in 0..25 {
            a[i] ^= c[(i + 4) % 5] ^ c[(i + 1) % 5].rotate_left(1);
        }
        let (mut x, mut y, mut moved) = (1, 0, a[1]);
        for t in 0..24 {
            (x, y) = (y, (2 * x + 3 * y) % 5);
            let rotated = moved.rotate_left((t + 1) * (t + 2) / 2 % 64);
            moved = std::mem::replace(&mut a[x + 5 * y], rotated);
        }
        for row in a.chunks_mut(5) {
            let old: [u64; 5] = std::array::from_fn(|x| row[x]);
            for x in 0..5 {
                row[x] = old[x] ^ (!old[(x + 1) % 5] & old[(x + 2) % 5]);
            }
        }
        for j in 0..7 {
            if lfsr & 1 == 1 {
                a[0] ^= 1 << ((1 << j) - 1);
            }
            lfsr = (lfsr << 1) ^ if lfsr & 0x80 == 0 { 0 } else { 0x71 };
        }
    }
}

pub fn det_array<const N: usize>(seed: &str) -> [u8; N] {
    det(N, seed).try_into().unwrap()
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// `X(prk, label, context, len)`.
fn expand(prk: &[u8], label: &str, context: &[u8], len: usize) -> Vec<u8> {
    let info = [b"MFS1/", label.as_bytes(), &[0], context].concat();
    let (mut out, mut last) = (Vec::new(), Vec::new());
    for number in 1.. {
        let mut mac = <Hmac<Sha512> as hmac::KeyInit>::new_from_slice(prk).unwrap();
        Mac::update(&mut mac, &[&last[..], &info, &[number]].concat());
        last = mac.finalize().into_bytes().to_vec();
        out.extend(&last);
        if out.len() >= len {
            break;
        }
    }
    out.truncate(len);
    out
}

struct Keys {
    cipher: Aes256Gcm,
    base: Vec<u8>,
    commit: Vec<u8>,
}

fn keys(prk: &[u8], label: &str, context: &[u8]) -> Keys {
    let derived = expand(prk, label, context, 76);
    Keys {
        cipher: Aes256Gcm::new_from_slice(&derived[..32]).unwrap(),
        base: derived[32..44].to_vec(),
        commit: derived[44..].to_vec(),
    }
}

impl Keys {
    fn nonce(&self, number: u64) -> aes_gcm::Nonce<aes_gcm::aead::consts::U12> {
        let mut nonce: [u8; 12] = self.base[..].try_into().unwrap();
        for (byte, counter) in nonce[4..].iter_mut().zip(number.to_be_bytes()) {
            *byte ^= counter;
        }
        nonce.into()
    }

    /// All blocks of a chunk or a body: ciphertext, then tags.
    fn seal(&self, plain: &[u8], first: usize, total: usize, more_aad: &[u8]) -> Vec<u8> {
        let (mut out, mut tags): (Vec<u8>, Vec<u8>) = Default::default();
        for (number, block) in (first..).zip(plain.chunks(65_536)) {
            let aad = [&aad(number, block.len(), number + 1 == total)[..], more_aad].concat();
            let sealed = self.cipher.encrypt(&self.nonce(number as u64), Payload { msg: block, aad: &aad }).unwrap();
            let (ciphertext, tag) = sealed.split_at(block.len());
            out.extend(ciphertext);
            tags.extend(tag);
        }
        out.extend(tags);
        out
    }
}

fn aad(number: usize, len: usize, last: bool) -> Vec<u8> {
    [&(number as u64).to_le_bytes()[..], &(len as u32).to_le_bytes(), &u32::from(last).to_le_bytes()].concat()
}

/// A stored object of 64 KiB blocks and 1 MiB chunks under suite 1.
pub fn object(dek: &[u8; 32], kdf_input: &[u8; 64], plain: &[u8]) -> Vec<u8> {
    let root = expand(dek, "object-root", &kdf_input[16..48], 32);
    let keys = keys(&root, "object", kdf_input);
    let mut out = [&kdf_input[..], &keys.commit, &[0; 32]].concat();
    let total = plain.len().div_ceil(65_536);
    for (index, chunk) in plain.chunks(1 << 20).enumerate() {
        out.extend(keys.seal(chunk, index * 16, total, &[]));
    }
    out
}

/// A coded object of 64 KiB blocks and 1 MiB chunks under suite 1, from what each chunk seals.
pub fn coded_object(dek: &[u8; 32], kdf_input: &[u8; 64], sealed: &[Vec<u8>]) -> Vec<u8> {
    let root = expand(dek, "object-root", &kdf_input[16..48], 32);
    let keys = keys(&root, "object", kdf_input);
    let mut out = [&kdf_input[..], &keys.commit, &[0; 32]].concat();
    for (index, chunk) in sealed.iter().enumerate() {
        let end = index * 16 + chunk.len().div_ceil(65_536);
        let total = if index + 1 == sealed.len() { end } else { usize::MAX };
        out.extend(keys.seal(chunk, index * 16, total, &[]));
    }
    out
}

/// The coded stream of whole bf16 elements and perhaps one byte more, bit by bit as the page has it.
pub fn coded_bf16(plain: &[u8]) -> Vec<u8> {
    let mut out = vec![1, 1, 8, 0, 0, 0, 0, 0];
    let (elements, tail) = plain.as_chunks::<2>();
    for segment in elements.chunks(65_536) {
        let values: Vec<u16> = segment.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
        let exponent = |value: &u16| (value >> 7) as u8;
        let mut counts = [0u32; 256];
        values.iter().for_each(|value| counts[usize::from(exponent(value))] += 1);
        let mut table: Vec<u8> = (0..=255).collect();
        table.sort_by_key(|&exponent| (std::cmp::Reverse(counts[usize::from(exponent)]), exponent));
        table.truncate(7);
        let code = |value: &u16| table.iter().position(|&known| known == exponent(value)).unwrap_or(7);
        let escapes: Vec<u8> = values.iter().filter(|value| code(value) == 7).map(exponent).collect();
        out.extend((escapes.len() as u32).to_le_bytes());
        out.extend(&table);
        out.extend([0; 5]);
        for group in values.chunks(32) {
            for bit in 0..3 {
                let word = group
                    .iter()
                    .enumerate()
                    .fold(0u32, |word, (i, value)| word | u32::try_from(code(value) >> bit & 1).unwrap() << i);
                out.extend(word.to_le_bytes());
            }
        }
        out.extend(values.iter().map(|value| ((value >> 15) << 7 | value & 0x7f) as u8));
        out.extend(escapes);
    }
    out.extend(tail);
    out
}

fn manifest_keys(dek: &[u8; 32], header: &[u8]) -> Keys {
    // suite || model_id || vid || seq || msalt
    let context = [&header[10..12], &header[16..48], &header[48..64], &header[64..72], &header[96..128]].concat();
    keys(dek, "manifest", &context)
}

/// A whole manifest object: `body` sealed under this header, whatever the body holds; commitments and lengths filled in.
pub fn manifest(dek: &[u8; 32], header: &ManifestHeader, body: &[u8]) -> Vec<u8> {
    let mut head = header.encode();
    head[80..88].copy_from_slice(&(body.len() as u64).to_le_bytes());
    head[88..96].copy_from_slice(&((body.len() + 16 * body.len().div_ceil(65_536)) as u64).to_le_bytes());
    let dek_commit = expand(dek, "dek-commit", &[&head[10..12], &head[16..64]].concat(), 32);
    head[128..160].copy_from_slice(&dek_commit);
    let commit = manifest_keys(dek, &head).commit;
    head[160..192].copy_from_slice(&commit);
    reseal_under(dek, &head, body)
}

/// `body` sealed under exactly these header bytes, whatever they say.
pub fn reseal_under(dek: &[u8; 32], head: &[u8], body: &[u8]) -> Vec<u8> {
    if head.len() != 256 {
        return head.to_vec();
    }
    let sealed = manifest_keys(dek, head).seal(body, 0, body.len().div_ceil(65_536), &sha256(head));
    [head, &sealed].concat()
}

/// Opens what [`manifest`] sealed.
pub fn open_body(dek: &[u8; 32], header: &ManifestHeader, object: &[u8]) -> Vec<u8> {
    let (head, stored) = object.split_at(256);
    let keys = manifest_keys(dek, head);
    let len = header.body_plain_len as usize;
    let (ciphertext, tags) = stored.split_at(len);
    let total = len.div_ceil(65_536);
    let mut out = Vec::new();
    for (number, (block, tag)) in ciphertext.chunks(65_536).zip(tags.chunks(16)).enumerate() {
        let aad = [&aad(number, block.len(), number + 1 == total)[..], &sha256(head)].concat();
        let sealed = [block, tag].concat();
        out.extend(keys.cipher.decrypt(&keys.nonce(number as u64), Payload { msg: &sealed, aad: &aad }).unwrap());
    }
    out
}
