//! Hypothesis: no bytes make a parser of the format panic, and whatever one accepts encodes back to the same bytes.
//!
//! Random edits of good objects. The seed is printed; `MODELFS_TEST_SEED=n` runs the same edits again and
//! `MODELFS_TEST_ROUNDS=n` runs longer.

use std::collections::BTreeMap;

use modelfs::error::{Code, Result};
use modelfs::format::*;
use sha2::{Digest, Sha256};

/// SplitMix64: enough randomness for edits, one word of state to print.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

const INTERESTING: &[u64] = &[
    0,
    1,
    2,
    3,
    15,
    16,
    17,
    63,
    64,
    255,
    256,
    4095,
    4096,
    65_535,
    65_536,
    1 << 20,
    1 << 31,
    1 << 40,
    1 << 63,
    u64::MAX,
];

/// One to four edits: a bit, a byte, a small step or an interesting number at a place, a cut, a piece repeated or moved.
fn edit(good: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        match random.below(9) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = random.next() as u8,
            2 if !bytes.is_empty() => bytes[at] = bytes[at].wrapping_add(1),
            3 if !bytes.is_empty() => bytes[at] = bytes[at].wrapping_sub(1),
            4 => {
                let number = INTERESTING[random.below(INTERESTING.len())].to_le_bytes();
                let at = at & !3;
                let width = [1, 2, 4, 8][random.below(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
            5 if random.below(4) == 0 => bytes.truncate(at),
            6 if random.below(4) == 0 => {
                let piece = bytes[at..(at + random.below(200)).min(bytes.len())].to_vec();
                bytes.splice(at..at, piece);
            }
            7 => {
                // Swap two pieces of equal length: reordered rows.
                let len = [8, 16, 24, 32, 80, 100, 128][random.below(7)];
                let (from, to) = (random.below(bytes.len()), random.below(bytes.len()));
                let (from, to) = (from.min(to), from.max(to));
                if from + len <= to && to + len <= bytes.len() {
                    let (head, tail) = bytes.split_at_mut(to);
                    head[from..from + len].swap_with_slice(&mut tail[..len]);
                }
            }
            _ => {}
        }
    }
    bytes
}

/// What a parser made of some bytes: the bytes again, or the code.
type Outcome = Result<Vec<u8>>;

/// A name, good bytes, what to repair after an edit, and the parser.
struct Case {
    name: &'static str,
    good: Vec<u8>,
    repair: fn(&mut [u8]),
    read: fn(&[u8]) -> Outcome,
}

fn manifest() -> Manifest {
    let mut builder = ManifestBuilder::new();
    let objects = [(20_480, true, None), ((2 << 20) + 4096, false, Some(vec![1 << 20, 70_000, 5])), (100, true, None)];
    for (number, (plain_len, inherited, coded)) in objects.into_iter().enumerate() {
        let layout = ObjectLayout::new(plain_len, 16, 20).unwrap();
        builder.add_object(NewObject {
            oid: Oid([number as u8; 32]),
            layout,
            suite: Suite::Aes256Gcm,
            inherited,
            origin_vid: Vid([9; 16]),
            commit: [7; 32],
            hashes: layout.chunks().map(|index| [index.0 as u8; 32]).collect(),
            coded,
        });
    }
    let mut file = |path: &str, size, extents: &[(u32, u64, u64)]| {
        builder.add_file(NewFile {
            path: path.into(),
            mode: 0o444,
            size,
            sha256: [8; 32],
            mtime: 5,
            extents: extents
                .iter()
                .map(|&(object, object_offset, len)| Extent { object, object_offset, len })
                .collect(),
        });
    };
    file("a", 4096, &[(0, 0, 4096)]);
    file("b/c", 100, &[(0, 8192, 100)]);
    file("b/d", 0, &[]);
    file("e", (2 << 20) + 4196, &[(1, 0, (2 << 20) + 4096), (2, 0, 100)]);
    builder.annotations(br#"{"x":1}"#.to_vec());
    let head = NewHeader {
        suite: Suite::Aes256Gcm,
        hash_alg: HashAlg::Blake3,
        model_id: ModelId([1; 32]),
        vid: Vid([2; 16]),
        seq: 1,
        created_at: 0,
        msalt: [3; 32],
        previous: None,
    };
    builder.finish(head).unwrap()
}

fn body(manifest: &Manifest, roots: &[u8]) -> Vec<u8> {
    let mut out = vec![0; manifest.body_len()];
    manifest.encode_body(&mut out, |index, slot| slot.copy_from_slice(&roots[index as usize * 32..][..32]));
    out
}

fn read_body(bytes: &[u8]) -> Outcome {
    let mut header = *manifest().header();
    header.body_plain_len = bytes.len() as u64;
    let (parsed, roots) = Manifest::parse_body(header, bytes)?;
    Ok(body(&parsed, &bytes[roots]))
}

/// The checksum of slots and the length of the table are made right again, else nothing behind them is reached.
fn repair_slots(bytes: &mut [u8]) {
    if bytes.len() >= 160 {
        let at = bytes.len() - 32;
        let len = (at - 128) as u32;
        bytes[96..100].copy_from_slice(&len.to_le_bytes());
        let sum = Sha256::digest(&bytes[..at]);
        bytes[at..].copy_from_slice(&sum);
    }
}

fn cases() -> Vec<Case> {
    let salt = [4; 32];
    let slot = |params: SlotParams| {
        let body = if params == SlotParams::VaultTransit { b"vault:v1:AAAA".to_vec() } else { vec![1; 80] };
        Slot { label: "k".into(), params, body }
    };
    let slots = Slots {
        generation: 1,
        model_id: ModelId([1; 32]),
        vid: Vid([2; 16]),
        dek_commit: [3; 32],
        slots: vec![
            slot(SlotParams::Raw { salt }),
            slot(SlotParams::Scrypt { log2_n: 17, salt }),
            slot(SlotParams::Argon2id { m_kib: 19_456, t: 1, p: 1, salt }),
            slot(SlotParams::VaultKv { version: 1, salt }),
            slot(SlotParams::VaultTransit),
            slot(SlotParams::HpkeX25519 { recipient: KeyId([5; 32]) }),
            slot(SlotParams::Pbkdf2Sha512 { iterations: 100_000, salt }),
            slot(SlotParams::Unknown { kind: 7, params: vec![1] }),
        ],
    };
    let reference = Ref {
        n_sigs: 2,
        model_id: ModelId([1; 32]),
        channel_id: ChannelId([2; 32]),
        ref_seq: 3,
        seq: 4,
        manifest_digest: ManifestDigest([5; 32]),
        manifest_len: 1169,
        vid: Vid([6; 16]),
        issued_at: 7,
        expires_at: 8,
        min_slots_generation: 9,
        min_version_seq: 1,
        previous: [11; 32],
    };
    let signature = RefSignature { key_id: KeyId([1; 32]), signature: [2; 64] };
    let object =
        SignatureObject { key_id: KeyId([1; 32]), manifest_digest: ManifestDigest([2; 32]), signature: [3; 64] };
    let manifest = manifest();
    let keep: fn(&mut [u8]) = |_| {};
    vec![
        Case {
            name: "object header",
            good: manifest.objects()[0].header().encode().to_vec(),
            repair: keep,
            read: |bytes| ObjectHeader::parse(bytes).map(|header| header.encode().to_vec()),
        },
        Case {
            name: "manifest header",
            good: manifest.header().encode().to_vec(),
            repair: keep,
            read: |bytes| ManifestHeader::parse(bytes).map(|header| header.encode().to_vec()),
        },
        Case { name: "manifest body", good: body(&manifest, &[9; 64]), repair: keep, read: read_body },
        Case {
            name: "slots",
            good: slots.encode().unwrap(),
            repair: repair_slots,
            read: |bytes| Slots::parse(bytes).map(|slots| slots.encode().expect("read slots can be written")),
        },
        Case {
            name: "ref",
            good: reference.encode(&[signature, signature]),
            repair: keep,
            read: |bytes| Ref::parse(bytes).map(|(reference, signatures)| reference.encode(&signatures)),
        },
        Case {
            name: "signature",
            good: object.encode().to_vec(),
            repair: keep,
            read: |bytes| SignatureObject::parse(bytes).map(|object| object.encode().to_vec()),
        },
    ]
}

fn number_from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a decimal number"))
}

#[test]
fn random_edits_never_panic_and_what_is_accepted_encodes_back() {
    let now =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    let seed = number_from_env("MODELFS_TEST_SEED").unwrap_or_else(now);
    let rounds = number_from_env("MODELFS_TEST_ROUNDS").unwrap_or(20_000);
    println!("MODELFS_TEST_SEED={seed} MODELFS_TEST_ROUNDS={rounds}");

    for case in cases() {
        assert_eq!((case.read)(&case.good).expect(case.name), case.good, "{}", case.name);
        let mut random = Random(seed);
        let mut seen: BTreeMap<String, u64> = BTreeMap::new();
        let mut accepted_edits = 0;
        for _ in 0..rounds {
            let mut bytes = edit(&case.good, &mut random);
            if random.below(8) != 0 {
                (case.repair)(&mut bytes);
            }
            match (case.read)(&bytes) {
                Ok(again) => {
                    assert_eq!(hex::encode(again), hex::encode(&bytes), "{} encodes back differently", case.name);
                    accepted_edits += u64::from(bytes != case.good);
                }
                Err(refused) => *seen.entry(refused.code().to_string()).or_default() += 1,
            }
        }
        println!("{}: {accepted_edits} accepted, {seen:?}", case.name);
        // The edits must reach both sides of the parser, or this test proves nothing.
        assert!(accepted_edits > 0 && !seen.is_empty(), "{}", case.name);
        if case.name == "manifest body" {
            for code in [Code::BodyLength, Code::Limit, Code::Path, Code::Extent, Code::Object, Code::Unsupported] {
                assert!(seen.contains_key(code.name()), "no edit reached {code}");
            }
        }
    }
}
