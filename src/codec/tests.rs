//! The rules of the coded stream, each by a stream that keeps it and one that breaks it; every implementation against the
//! portable one.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use super::*;

/// SplitMix64: every random test says its seed and runs from it again with `CODEC_SEED`.
struct Random(u64);

impl Random {
    fn new(test: &str) -> Random {
        let given = std::env::var("CODEC_SEED").ok().map(|seed| seed.parse().expect("a number"));
        let seed = given.unwrap_or(20_261_125);
        println!("{test}: CODEC_SEED={seed}");
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    fn fewer_bytes(&mut self, bound: usize) -> Vec<u8> {
        let len = self.below(bound);
        self.bytes(len)
    }

    /// Normally distributed, standard deviation 0.02, as trained weights are.
    fn weight(&mut self) -> f32 {
        let uniform = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let (a, b) = (uniform(self.next()), uniform(self.next()));
        (0.02 * (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    }

    fn weights(&mut self, kind: Kind, elements: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..elements {
            let bits = self.weight().to_bits();
            match kind {
                Kind::F32 => bytes.extend(bits.to_le_bytes()),
                Kind::Bf16 => bytes.extend(((bits >> 16) as u16).to_le_bytes()),
                Kind::F16 => bytes.extend(f16(bits).to_le_bytes()),
            }
        }
        bytes
    }

    /// Elements of which about `percent` in a hundred have a rare exponent.
    fn elements(&mut self, kind: Kind, elements: usize, percent: usize) -> Vec<u8> {
        let (width, bits) = (kind.width(), u32::from(kind.exponent_bits()));
        let mut bytes = Vec::new();
        for _ in 0..elements {
            let exponent = match self.below(100) < percent {
                true => self.next() % (1 << bits),
                false => 9 + self.next() % 7,
            };
            let shift = kind.rest_bits() as u32 - 1;
            let element = self.next() & !(((1 << bits) - 1) << shift) | exponent << shift;
            bytes.extend(&element.to_le_bytes()[..width]);
        }
        bytes
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

/// Memory that ends where a page without any rights begins: whoever reads or writes past it is killed.
struct Fenced {
    map: *mut u8,
    room: usize,
}

const PAGE: usize = 1 << 16;

impl Fenced {
    fn new(room: usize) -> Fenced {
        let room = room.next_multiple_of(PAGE);
        // SAFETY: a fresh private mapping, unmapped in Drop.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), room + PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            let fence = map.cast::<u8>().add(room);
            assert_eq!(libc::mprotect(fence.cast(), PAGE, libc::PROT_NONE), 0);
            Fenced { map: map.cast(), room }
        }
    }

    /// The last `len` bytes before the fence.
    fn last(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.room);
        // SAFETY: inside the mapping, borrowed from `self`.
        unsafe { std::slice::from_raw_parts_mut(self.map.add(self.room - len), len) }
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, nothing borrows it any more.
        unsafe { libc::munmap(self.map.cast(), self.room + PAGE) };
    }
}

/// Every implementation's verdict on a stream, and its plaintext; one that disagrees with the oracle fails the test, one
/// that writes beside the plaintext too.
struct Judges {
    coded: Fenced,
    out: Fenced,
}

impl Judges {
    const BEFORE: usize = 64;

    fn new(room: usize) -> Judges {
        Judges { coded: Fenced::new(room), out: Fenced::new(room + Judges::BEFORE) }
    }

    fn decode(&mut self, coded: &[u8], plain_len: usize) -> Result<Vec<u8>, Malformed> {
        let fenced = self.coded.last(coded.len());
        fenced.copy_from_slice(coded);
        let mut oracle = None;
        for implementation in Implementation::all_here().into_iter().rev() {
            let around = self.out.last(plain_len + Judges::BEFORE);
            around.fill(0x5a);
            let (before, out) = around.split_at_mut(Judges::BEFORE);
            let verdict = Decoder::with(implementation, coded.len(), plain_len).finish(fenced, out);
            assert!(before.iter().all(|&byte| byte == 0x5a), "{}: wrote before", implementation.name());
            let verdict = verdict.map(|()| out.to_vec());
            let oracle = oracle.get_or_insert_with(|| verdict.clone());
            assert!(*oracle == verdict, "{} disagrees: {:?}", implementation.name(), verdict.err());
        }
        oracle.expect("the portable one runs everywhere")
    }
}

/// The stream given in docs/FORMAT.md, and what it decodes to.
fn vector() -> (Vec<u8>, Vec<u8>) {
    let words = [0x3c00u16, 0xbc01, 0x3f80, 0x0000, 0x3b7f, 0x7f80, 0x3d11, 0xbd22];
    let plain = words.repeat(5).into_iter().flat_map(u16::to_le_bytes).collect();
    let coded = include_str!("../../tests/vectors/codec.hex");
    (plain, hex::decode(coded.split_whitespace().collect::<String>()).expect("hex"))
}

/// By every implementation, which must all write the same.
fn encoded(kind: Kind, skew: usize, plain: &[u8]) -> Vec<u8> {
    let mut oracle = Vec::new();
    encode_with(Implementation::PORTABLE, kind, skew, plain, &mut oracle);
    for implementation in Implementation::all_here() {
        let mut coded = vec![1, 2, 3];
        encode_with(implementation, kind, skew, plain, &mut coded);
        assert!(coded == oracle, "{} writes otherwise", implementation.name());
    }
    assert!(oracle.len() <= coded_len_max(kind, plain.len()), "{} {}", oracle.len(), plain.len());
    oracle
}

#[test]
fn the_vector_of_the_format_is_written_and_read_byte_for_byte() {
    let (plain, coded) = vector();
    let digest = hex::encode(Sha256::digest(&coded));
    assert_eq!(digest, "e680581d65840138cd7c60754b49c8fc43be30e3ecff05bb13312f196cb581a3");
    assert_eq!(hex::encode(encoded(Kind::Bf16, 0, &plain)), hex::encode(&coded));
    assert_eq!(Judges::new(1 << 16).decode(&coded, plain.len()).as_ref(), Ok(&plain));
}

#[test]
fn every_rule_has_a_stream_that_passes_and_one_that_is_refused() {
    let mut judges = Judges::new(1 << 16);
    let mut broken = BTreeSet::new();
    let lines = include_str!("../../tests/vectors/codec-hostile.txt").lines().filter(|line| !line.starts_with('#'));
    for line in lines {
        let [verdict, plain_len, coded, name] =
            line.split('|').map(str::trim).collect::<Vec<_>>().try_into().expect("four fields");
        let coded = hex::decode(coded).expect("hex");
        let seen = judges.decode(&coded, plain_len.parse().expect("a number"));
        assert_eq!(seen.as_ref().map_or_else(|err| err.reason(), |_| "accepted"), verdict, "{name}");
        broken.extend(seen.err().map(Malformed::reason));
    }
    let source = include_str!("mod.rs");
    let rules: BTreeSet<&str> =
        source.split("Malformed(\"").skip(1).map(|rest| rest.split('"').next().expect("a literal")).collect();
    assert_eq!(broken, rules, "a rule without a stream that breaks it");
}

#[test]
fn every_length_and_skew_comes_back_from_every_implementation() {
    let mut random = Random::new("lengths");
    let mut judges = Judges::new(1 << 20);
    for kind in Kind::ALL {
        let segment = SEGMENT * kind.width();
        let lengths = (0..300).chain((0..10).map(|i| segment - 5 + i)).chain([
            2 * segment - 1,
            2 * segment,
            segment + 63 * kind.width(),
            segment + 65 * kind.width(),
        ]);
        for len in lengths {
            for skew in 0..kind.width() {
                let percent = [0, 1, 3, 10, 40, 100][random.below(6)];
                let mut plain = random.bytes(skew.min(len));
                plain.extend(random.elements(kind, len / kind.width() + 1, percent));
                plain.truncate(len);
                let coded = encoded(kind, skew, &plain);
                let back = judges.decode(&coded, len);
                assert!(back.as_deref() == Ok(&plain), "{} {len} {skew} {percent}: {:?}", kind.name(), back.err());
            }
        }
    }
}

/// The writer stores raw what would not win; a reader takes any share of escapes all the same.
#[test]
fn every_share_of_escapes_comes_back_from_every_implementation() {
    let mut random = Random::new("shares");
    let mut judges = Judges::new(1 << 20);
    for kind in Kind::ALL {
        for percent in (0..=100).step_by(5) {
            let elements = 1000 + random.below(3000);
            let plain = random.elements(kind, elements, percent);
            let mut coded = coded_by_hand(&mut random, kind, &plain);
            let back = judges.decode(&coded, plain.len());
            assert!(back.as_deref() == Ok(&plain), "{} {percent}: {:?}", kind.name(), back.err());
            // One escape too many or too few is refused, wherever the codes stand that ask for it.
            let code = HEADER_LEN + SEGMENT_HEADER_LEN + 12 * random.below(elements / GROUP);
            let bit = random.below(32);
            for byte in [code, code + 4, code + 8] {
                coded[byte + bit / 8] ^= 1 << (bit % 8);
            }
            let was = coded[code..code + 12].to_vec();
            let after = |at: usize| was[at + bit / 8] >> (bit % 8) & 1;
            if [after(0), after(4), after(8)] == [1; 3] || [after(0), after(4), after(8)] == [0; 3] {
                assert_eq!(judges.decode(&coded, plain.len()), Err(Malformed("number of escapes")));
            }
        }
    }
}

/// One coded segment with a table in any order, whether it wins or not.
fn coded_by_hand(random: &mut Random, kind: Kind, plain: &[u8]) -> Vec<u8> {
    let elements: Vec<u64> = plain
        .chunks(kind.width())
        .map(|bytes| bytes.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte)))
        .collect();
    let shift = kind.rest_bits() - 1;
    let exponent_of = |element: u64| (element >> shift & ((1 << kind.exponent_bits()) - 1)) as u8;
    let rest_of = |element: u64| element >> (8 * kind.width() - 1) << shift | element & ((1 << shift) - 1);
    let mut table: Vec<u8> = (9..16).collect();
    (1..TABLE_LEN).for_each(|i| table.swap(i, random.below(i + 1)));
    let code_of = |element| table.iter().position(|&it| it == exponent_of(element)).unwrap_or(7) as u64;
    let escapes: Vec<u8> = elements.iter().filter(|&&it| code_of(it) == 7).map(|&it| exponent_of(it)).collect();
    let mut coded = vec![CODEC, kind.log2_width(), kind.exponent_bits(), 0, 0, 0, 0, 0];
    coded.extend((escapes.len() as u32).to_le_bytes());
    coded.extend(&table);
    coded.extend([0; 5]);
    let word = |group: &[u64], value: &dyn Fn(u64) -> u64, bit: usize| {
        let bits = group.iter().zip(0..).map(|(&element, i)| ((value(element) >> bit & 1) as u32) << i);
        bits.fold(0, |all, bit| all | bit).to_le_bytes()
    };
    for group in elements.chunks(GROUP) {
        (0..3).for_each(|bit| coded.extend(word(group, &code_of, bit)));
    }
    for plane in 0..kind.byte_planes() {
        coded.extend(elements.iter().map(|&element| (rest_of(element) >> (8 * plane)) as u8));
    }
    for group in elements.chunks(GROUP) {
        (8 * kind.byte_planes()..kind.rest_bits()).for_each(|bit| coded.extend(word(group, &rest_of, bit)));
    }
    coded.extend(escapes);
    coded
}

#[test]
fn mutated_and_random_streams_get_one_verdict_and_touch_nothing_else() {
    let mut random = Random::new("mutations");
    let rounds = std::env::var("CODEC_ROUNDS").map_or(30_000, |rounds| rounds.parse().expect("a number"));
    let mut judges = Judges::new(1 << 20);
    let mut pool: Vec<(Vec<u8>, usize)> = Vec::new();
    for kind in Kind::ALL {
        for elements in [1, 31, 32, 33, 63, 64, 65, 127, 128, 200, 1000] {
            let (skew, percent) = (random.below(kind.width()), [0, 2, 20][random.below(3)]);
            let mut plain = random.bytes(skew);
            plain.extend(random.elements(kind, elements, percent));
            plain.extend(random.fewer_bytes(kind.width()));
            pool.push((encoded(kind, skew, &plain), plain.len()));
            let plain = random.elements(kind, elements, 50);
            pool.push((coded_by_hand(&mut random, kind, &plain), plain.len()));
        }
    }
    let mut large = random.elements(Kind::Bf16, SEGMENT + 100, 2);
    large.push(7);
    pool.push((encoded(Kind::Bf16, 0, &large), large.len()));
    let (mut accepted, mut reasons) = (0, BTreeSet::new());
    for _ in 0..rounds {
        // The large one is slow: rarely.
        let among = if random.below(200) == 0 { pool.len() } else { pool.len() - 1 };
        let (mut coded, mut plain_len) = pool[random.below(among)].clone();
        for _ in 0..1 + random.below(3) {
            let len = coded.len();
            let near = len.clamp(1, 40);
            match random.below(10) {
                0 if len > 0 => coded.truncate(random.below(len)),
                1 => coded.extend(random.fewer_bytes(40)),
                2 if len > 0 => {
                    let at = random.below(len);
                    coded.drain(at..(at + 1 + random.below(8)).min(len));
                }
                3 => {
                    let (other, _) = &pool[random.below(pool.len() - 1)];
                    let (from, at) = (random.below(other.len()), random.below(len + 1));
                    coded.truncate(at);
                    coded.extend(&other[from..]);
                }
                4 => plain_len = (plain_len + random.below(9)).saturating_sub(4),
                5 => coded = random.fewer_bytes(200),
                6 if len > 12 => coded[8] = coded[8].wrapping_add(random.below(3) as u8).wrapping_sub(1),
                7 if len > 0 => coded[random.below(near)] = random.next() as u8,
                8 if len > 0 => coded[random.below(near)] ^= 1 << random.below(8),
                _ if len > 0 => {
                    let at = random.below(len);
                    coded[at] ^= 1 << random.below(8);
                }
                _ => {}
            }
        }
        match judges.decode(&coded, plain_len) {
            Ok(_) => accepted += 1,
            Err(err) => _ = reasons.insert(err.reason()),
        }
    }
    // Both sides of the parser were met, and by far the most of its rules.
    println!("{accepted} of {rounds} accepted, refused for {reasons:?}");
    assert!(rounds < 10_000 || accepted > 0 && reasons.len() >= 12, "{accepted} {reasons:?}");
}

#[test]
fn a_stream_fed_in_pieces_gives_each_segment_as_soon_as_it_is_whole() {
    let mut random = Random::new("pieces");
    for kind in Kind::ALL {
        let skew = kind.width() - 1;
        let mut plain = random.bytes(skew);
        plain.extend(random.elements(kind, 2 * SEGMENT + 50, 3));
        // A raw segment in the middle.
        random
            .bytes(SEGMENT * kind.width())
            .iter()
            .zip(&mut plain[skew + SEGMENT * kind.width()..])
            .for_each(|(&byte, to)| *to = byte);
        plain.push(9);
        let coded = encoded(kind, skew, &plain);
        for implementation in Implementation::all_here() {
            let mut decoder = Decoder::with(implementation, coded.len(), plain.len());
            let (mut out, mut available) = (vec![0; plain.len()], 0);
            // Only what has arrived and was not used yet.
            let mut window = Vec::new();
            while available < coded.len() {
                let more = (1 + random.below(40_000)).min(coded.len() - available);
                window.extend(&coded[available..available + more]);
                available += more;
                let used = decoder.advance(&window, &mut out).expect("genuine");
                window.drain(..used);
                assert!(window.len() < SEGMENT_BYTES_MAX, "a window of a segment always gets on");
                let whole = out.iter().zip(&plain).take_while(|(a, b)| a == b).count();
                assert!(whole >= decoder.plain_at, "{whole} {}", decoder.plain_at);
            }
            assert_eq!(decoder.plain_at, plain.len() - 1, "all but the tail is out before finish");
            decoder.finish(&window, &mut out).expect("genuine");
            assert!(out == plain);
        }
    }
}

/// What decides is the whole stream, not how it arrived.
#[test]
fn a_stream_fed_in_pieces_gets_the_verdict_of_the_whole() {
    let mut random = Random::new("verdicts in pieces");
    let plain = random.elements(Kind::F16, 200, 5);
    let good = encoded(Kind::F16, 0, &plain);
    for _ in 0..3000 {
        let mut coded = good.clone();
        let at = random.below(coded.len());
        coded[at] ^= 1 << random.below(8);
        let mut out = vec![0; plain.len()];
        let whole = decode(&coded, &mut out);
        let mut decoder = Decoder::new(coded.len(), plain.len());
        let (mut available, mut used) = (0, 0);
        let pieces = loop {
            available = (available + 1 + random.below(60)).min(coded.len());
            match decoder.advance(&coded[used..available], &mut out) {
                Ok(more) => used += more,
                Err(err) => break Err(err),
            }
            if available == coded.len() {
                break decoder.finish(&coded[used..], &mut out);
            }
        };
        assert_eq!(whole, pieces);
    }
}

#[test]
fn weights_win_as_much_as_estimated_and_are_recognised_with_their_skew() {
    let mut random = Random::new("sniff");
    for (kind, most) in [(Kind::Bf16, 0.71), (Kind::F32, 0.86), (Kind::F16, 0.90)] {
        for skew in 0..kind.width() {
            let mut plain = random.bytes(skew);
            plain.extend(random.weights(kind, 150_000));
            let coded = encoded(kind, skew, &plain);
            let (ratio, estimated) = (coded.len() as f64, estimate(kind, skew, &plain) as f64);
            assert!(ratio < most * plain.len() as f64, "{} {ratio}", kind.name());
            assert!((ratio / estimated - 1.0).abs() < 0.01, "{} {ratio} {estimated}", kind.name());
            assert_eq!(sniff(&plain), Some((kind, skew)));
        }
    }
}

#[test]
fn random_bytes_are_not_taken_for_weights_and_cost_only_the_headers() {
    let mut random = Random::new("random bytes");
    for len in [0, 1, 7, 64, 1000, 70_000, 1_000_000] {
        let plain = random.bytes(len);
        // A few bytes may look like anything.
        if len >= 1000 || len == 0 {
            assert_eq!(sniff(&plain), None, "{len}");
        }
        for kind in Kind::ALL {
            let coded = encoded(kind, 0, &plain);
            if len >= 1000 {
                assert_eq!(coded.len(), coded_len_max(kind, len), "raw segments");
            }
            let estimated = estimate(kind, 0, &plain);
            assert!(estimated <= coded_len_max(kind, len), "{estimated}");
        }
    }
}

#[test]
fn the_fence_kills_who_reads_past_the_end() {
    let mut fenced = Fenced::new(10);
    let past = fenced.last(10).as_ptr_range().end;
    // SAFETY: the child makes two system calls, reads one byte, which is to kill it, and leaves without running anything
    // else.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            // As long as it lives it has every socket and lock that other tests have open; a dump would make that long.
            libc::syscall(libc::SYS_close_range, 0_u32, u32::MAX, 0_u32);
            libc::prctl(libc::PR_SET_DUMPABLE, 0 as libc::c_ulong, 0, 0, 0);
            std::hint::black_box(std::ptr::read_volatile(past));
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        status
    };
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:x}");
}
