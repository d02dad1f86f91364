//! Decoding and coding by groups of 32 elements with AVX2.
//!
//! Escapes are rare: seven in a hundred groups of a trained model have more than two. Two are put in always, so that the
//! processor has nothing to guess; a loop does what is left.

use std::arch::x86_64::*;

use super::encode::{Gather, segment};
use super::{GROUP, Implementation, Kind, Place, Segment, TABLE_LEN, portable};

pub(super) fn implementation() -> Option<Implementation> {
    let here =
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("popcnt");
    here.then_some(Implementation { name: "avx2", decode: decode_segment, encode: encode_segment })
}

fn decode_segment(kind: Kind, segment: &Segment<'_>, out: &mut [u8]) -> bool {
    // SAFETY: only `implementation` hands this function out, after it has seen the features.
    let place = unsafe { groups_of(kind, segment, out) };
    place.escape <= segment.escapes.len() && portable::finish_segment(kind, segment, place, out)
}

/// Where the elements of a group stand in a vector, so that unpacking leaves them in order.
struct Order {
    /// The byte of a plane's word that holds an element's bit.
    byte: [u8; GROUP],
    /// That bit.
    bit: [u8; GROUP],
    /// The element.
    element: [u8; GROUP],
}

impl Order {
    /// Runs of `run` elements, in the order of `runs`.
    const fn of_runs<const N: usize>(runs: [usize; N]) -> Order {
        let mut order = Order { byte: [0; GROUP], bit: [0; GROUP], element: [0; GROUP] };
        let mut at = 0;
        while at < GROUP {
            let run = GROUP / N;
            let element = runs[at / run] * run + at % run;
            order.byte[at] = (element / 8) as u8;
            order.bit[at] = 1 << (element % 8);
            order.element[at] = element as u8;
            at += 1;
        }
        order
    }
}

/// For elements of two bytes: one unpacking, which works in each half of a vector on its own.
const BY_EIGHT: Order = Order::of_runs([0, 2, 1, 3]);
/// For elements of four bytes: two unpackings.
const BY_FOUR: Order = Order::of_runs([0, 2, 4, 6, 1, 3, 5, 7]);

/// Decodes all whole groups. The place's escapes may lie beyond those there are: then the codes ask for too many.
#[target_feature(enable = "avx2,bmi1,popcnt")]
fn groups_of(kind: Kind, segment: &Segment<'_>, out: &mut [u8]) -> Place {
    let plane = |index: usize| segment.planes[index * segment.len..][..segment.len].as_chunks::<GROUP>().0;
    let sign = _mm256_set1_epi8(i8::MIN);
    // Sign and high mantissa bits in one byte, and the exponent, to the two high bytes of an element. The shifts are of
    // words, there are none of bytes: what comes in from the neighbour stands in bits that the choice leaves out.
    let join = |exponents, rest| {
        let low = choose(sign, _mm256_slli_epi16::<7>(exponents), rest);
        let high = choose(sign, rest, _mm256_srli_epi16::<1>(exponents));
        (low, high)
    };
    match kind {
        Kind::Bf16 => {
            let rest = plane(0);
            groups::<64>(&BY_EIGHT, segment, out, |group, exponents, to| {
                let (low, high) = join(exponents, by_eight(&rest[group]));
                store(to, [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]);
            })
        }
        Kind::F32 => {
            let (first, second, rest) = (plane(0), plane(1), plane(2));
            groups::<128>(&BY_FOUR, segment, out, |group, exponents, to| {
                let (low, high) = join(exponents, by_four(&rest[group]));
                let (first, second) = (by_four(&first[group]), by_four(&second[group]));
                let (front, back) = to.split_at_mut(64);
                let (below, above) = (_mm256_unpacklo_epi8(first, second), _mm256_unpacklo_epi8(low, high));
                let halves = [_mm256_unpacklo_epi16(below, above), _mm256_unpackhi_epi16(below, above)];
                store(front.try_into().expect("half of it"), halves);
                let (below, above) = (_mm256_unpackhi_epi8(first, second), _mm256_unpackhi_epi8(low, high));
                let halves = [_mm256_unpacklo_epi16(below, above), _mm256_unpackhi_epi16(below, above)];
                store(back.try_into().expect("half of it"), halves);
            })
        }
        Kind::F16 => {
            let rest = plane(0);
            let (bits, _) = segment.bits.as_chunks::<12>();
            groups::<64>(&BY_EIGHT, segment, out, |group, exponents, to| {
                let low = by_eight(&rest[group]);
                let bits = spread(&BY_EIGHT, words(&bits[group]), [1, 2, i8::MIN]);
                let high = _mm256_or_si256(_mm256_slli_epi16::<2>(exponents), bits);
                store(to, [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]);
            })
        }
    }
}

/// Calls `put` with the exponents of each whole group, in `order`, and the place of its elements.
#[inline]
#[target_feature(enable = "avx2,bmi1,popcnt")]
fn groups<const OUT: usize>(
    order: &Order,
    segment: &Segment<'_>,
    out: &mut [u8],
    put: impl Fn(usize, __m256i, &mut [u8; OUT]),
) -> Place {
    let table = _mm256_set1_epi64x(i64::from_le_bytes(segment.table));
    let numbers = load(&order.element);
    let (codes, _) = segment.codes.as_chunks::<12>();
    let (elements, _) = out.as_chunks_mut::<OUT>();
    let mut at = 0;
    for (group, to) in elements.iter_mut().enumerate() {
        let codes = words(&codes[group]);
        let mut exponents = _mm256_shuffle_epi8(table, spread(order, codes, [1, 2, 4]));
        let mut escaped = codes[0] & codes[1] & codes[2];
        let count = escaped.count_ones() as usize;
        let patch = |exponents, element: u32, escape: u8| {
            let here = _mm256_cmpeq_epi8(numbers, _mm256_set1_epi8(element as i8));
            _mm256_blendv_epi8(exponents, _mm256_set1_epi8(escape as i8), here)
        };
        // The last escapes have no neighbour to read; what stands in for one that is missing is never served, as
        // the count will not fit.
        let next = match segment.escapes.get(at..at + 2) {
            Some(next) => [next[0], next[1]],
            None => [segment.escapes.get(at).copied().unwrap_or(0), 0],
        };
        // Without a bit left it is element 32, which is in no lane.
        exponents = patch(exponents, escaped.trailing_zeros(), next[0]);
        escaped &= escaped.wrapping_sub(1);
        exponents = patch(exponents, escaped.trailing_zeros(), next[1]);
        escaped &= escaped.wrapping_sub(1);
        let mut more = at + 2;
        while escaped != 0 {
            let escape = segment.escapes.get(more).copied().unwrap_or(0);
            exponents = patch(exponents, escaped.trailing_zeros(), escape);
            escaped &= escaped - 1;
            more += 1;
        }
        put(group, exponents, to);
        at += count;
    }
    Place { group: elements.len(), escape: at }
}

/// The bits of 32 elements, in `order`, from three words: where one is set, the element has the bits of `values`.
#[inline]
#[target_feature(enable = "avx2")]
fn spread(order: &Order, words: [u32; 3], values: [i8; 3]) -> __m256i {
    let (byte, bit) = (load(&order.byte), load(&order.bit));
    let of = |word: u32, value: i8| {
        let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word as i32), byte);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
        _mm256_and_si256(set, _mm256_set1_epi8(value))
    };
    let two = _mm256_or_si256(of(words[0], values[0]), of(words[1], values[1]));
    _mm256_or_si256(two, of(words[2], values[2]))
}

/// The bits of `yes` where `mask` is set, of `no` elsewhere.
#[inline]
#[target_feature(enable = "avx2")]
fn choose(mask: __m256i, yes: __m256i, no: __m256i) -> __m256i {
    _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no))
}

/// A group's bytes of one plane in the order [`BY_EIGHT`].
#[inline]
#[target_feature(enable = "avx2")]
fn by_eight(from: &[u8; GROUP]) -> __m256i {
    _mm256_permute4x64_epi64::<0b11_01_10_00>(load(from))
}

/// A group's bytes of one plane in the order [`BY_FOUR`].
#[inline]
#[target_feature(enable = "avx2")]
fn by_four(from: &[u8; GROUP]) -> __m256i {
    _mm256_permutevar8x32_epi32(load(from), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7))
}

#[inline]
#[target_feature(enable = "avx2")]
fn words(bytes: &[u8; 12]) -> [u32; 3] {
    let (words, _) = bytes.as_chunks::<4>();
    [u32::from_le_bytes(words[0]), u32::from_le_bytes(words[1]), u32::from_le_bytes(words[2])]
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(from: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes, at any address.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(to: &mut [u8; 64], vectors: [__m256i; 2]) {
    // SAFETY: 64 bytes, at any address.
    unsafe {
        _mm256_storeu_si256(to.as_mut_ptr().cast(), vectors[0]);
        _mm256_storeu_si256(to.as_mut_ptr().add(32).cast(), vectors[1]);
    }
}

fn encode_segment(kind: Kind, elements: &[u8], out: &mut Vec<u8>) {
    // SAFETY: only `implementation` hands this function out, after it has seen the features.
    unsafe { encode_with_avx2(kind, elements, out) }
}

#[target_feature(enable = "avx2,bmi1,popcnt")]
fn encode_with_avx2(kind: Kind, elements: &[u8], out: &mut Vec<u8>) {
    // SAFETY: the processor has AVX2, as this function asks.
    unsafe { segment::<Avx2>(kind, elements, out) }
}

/// Needs AVX2.
struct Avx2;

impl Gather for Avx2 {
    #[inline(always)]
    unsafe fn code_planes(exponents: &[u8; GROUP], table: &[u8; TABLE_LEN], _: &[u8; 256]) -> [u32; 3] {
        // SAFETY: passed on from the caller.
        unsafe { code_planes(exponents, table) }
    }

    #[inline(always)]
    unsafe fn plane(bytes: &[u8; GROUP], bit: u32) -> u32 {
        // SAFETY: passed on from the caller.
        unsafe { plane(bytes, bit) }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn code_planes(exponents: &[u8; GROUP], table: &[u8; TABLE_LEN]) -> [u32; 3] {
    let exponents = load(exponents);
    let is = |code: usize| _mm256_cmpeq_epi8(exponents, _mm256_set1_epi8(table[code] as i8));
    // A bit is 0 in four codes, none of which is the escape: what is in the table with another code, or in no table at
    // all, has a 1.
    let zero = |codes: [__m256i; 4]| {
        let either = _mm256_or_si256(_mm256_or_si256(codes[0], codes[1]), _mm256_or_si256(codes[2], codes[3]));
        !(_mm256_movemask_epi8(either) as u32)
    };
    let codes = [is(0), is(1), is(2), is(3), is(4), is(5), is(6)];
    [
        zero([codes[0], codes[2], codes[4], codes[6]]),
        zero([codes[0], codes[1], codes[4], codes[5]]),
        zero([codes[0], codes[1], codes[2], codes[3]]),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn plane(bytes: &[u8; GROUP], bit: u32) -> u32 {
    // The bit to the top of its byte; what comes in from the byte below stands lower.
    let top = _mm256_sll_epi16(load(bytes), _mm_cvtsi32_si128(7 - bit as i32));
    _mm256_movemask_epi8(top) as u32
}
