//! Decoding by 64 elements with AVX-512 (BW, VBMI, VBMI2) and GFNI: no branch depends on the data.
//!
//! One multiplication of bit matrices turns the code planes of eight elements into eight codes; `vpexpandb` puts the
//! escapes where they belong, however many there are.

use std::arch::x86_64::*;

use super::{ESCAPE, Implementation, Kind, Place, Segment, avx2, portable};

/// Elements decoded at once: two groups.
const STEP: usize = 64;

pub(super) fn implementation() -> Option<Implementation> {
    let here = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vbmi2")
        && is_x86_feature_detected!("gfni")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("popcnt");
    let encode = avx2::implementation()?.encode;
    here.then_some(Implementation { name: "avx512", decode: decode_segment, encode })
}

fn decode_segment(kind: Kind, segment: &Segment<'_>, out: &mut [u8]) -> bool {
    // SAFETY: only `implementation` hands this function out, after it has seen the features.
    let place = unsafe { steps_of(kind, segment, out) };
    place.is_some_and(|place| portable::finish_segment(kind, segment, place, out))
}

/// Decodes all but the last elements, less than [`STEP`]; `None` if the codes ask for more escapes than there are.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,gfni,bmi2,popcnt")]
fn steps_of(kind: Kind, segment: &Segment<'_>, out: &mut [u8]) -> Option<Place> {
    let plane = |index: usize| segment.planes[index * segment.len..][..segment.len].as_chunks::<STEP>().0;
    let sign = _mm512_set1_epi8(i8::MIN);
    // Sign and high mantissa bits in one byte, and the exponent, to the two high bytes of an element. The shifts are of
    // words, there are none of bytes: what comes in from the neighbour stands in bits that the choice leaves out.
    let join = |exponents, rest| {
        let low = choose(sign, _mm512_slli_epi16::<7>(exponents), rest);
        let high = choose(sign, rest, _mm512_srli_epi16::<1>(exponents));
        (low, high)
    };
    match kind {
        Kind::Bf16 => {
            let rest = plane(0);
            steps::<128>(segment, out, |step, exponents, to| {
                let (low, high) = join(exponents, load(&rest[step]));
                store(to, interleave_bytes(low, high));
            })
        }
        Kind::F32 => {
            let (first, second, rest) = (plane(0), plane(1), plane(2));
            steps::<256>(segment, out, |step, exponents, to| {
                let (low, high) = join(exponents, load(&rest[step]));
                let below = interleave_bytes(load(&first[step]), load(&second[step]));
                let above = interleave_bytes(low, high);
                let (to_front, to_back) = to.split_at_mut(128);
                let (front, back) = (interleave_words(below[0], above[0]), interleave_words(below[1], above[1]));
                store(to_front.try_into().expect("half of it"), front);
                store(to_back.try_into().expect("half of it"), back);
            })
        }
        Kind::F16 => {
            let rest = plane(0);
            let (bits, _) = segment.bits.as_chunks::<24>();
            steps::<128>(segment, out, |step, exponents, to| {
                let high = _mm512_or_si512(_mm512_slli_epi16::<2>(exponents), transpose::<0, 1, 7>(&bits[step]));
                store(to, interleave_bytes(load(&rest[step]), high));
            })
        }
    }
}

/// Calls `put` with the exponents of each whole step and the place of its elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,gfni,bmi2,popcnt")]
fn steps<const OUT: usize>(
    segment: &Segment<'_>,
    out: &mut [u8],
    put: impl Fn(usize, __m512i, &mut [u8; OUT]),
) -> Option<Place> {
    let table = _mm512_set1_epi64(i64::from_le_bytes(segment.table));
    let (codes, _) = segment.codes.as_chunks::<24>();
    let (elements, _) = out.as_chunks_mut::<OUT>();
    let mut at = 0;
    for (step, to) in elements.iter_mut().enumerate() {
        let codes = transpose::<0, 1, 2>(&codes[step]);
        let escaped = _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(ESCAPE as i8));
        let count = escaped.count_ones();
        let escapes = segment.escapes.get(at..at + count as usize)?;
        // SAFETY: a masked load reads the `count` bytes of `escapes` and no others.
        let escapes = unsafe { _mm512_maskz_loadu_epi8(_bzhi_u64(u64::MAX, count), escapes.as_ptr().cast()) };
        let exponents = _mm512_mask_expand_epi8(_mm512_shuffle_epi8(table, codes), escaped, escapes);
        put(step, exponents, to);
        at += count as usize;
    }
    Some(Place { group: 2 * elements.len(), escape: at })
}

/// The bits of 64 elements from the planes of two groups, three words each: bit `A` of an element's byte from the first
/// word, `B` from the second, `C` from the third, the others 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,gfni")]
fn transpose<const A: usize, const B: usize, const C: usize>(planes: &[u8; 24]) -> __m512i {
    // Eight elements a matrix, its row for bit b in byte 7 - b; the rows that no plane fills are masked to 0.
    const fn rows<const A: usize, const B: usize, const C: usize>() -> [u8; 64] {
        let mut rows = [0; 64];
        let mut eight = 0;
        while eight < 8 {
            let byte = (eight / 4 * 12 + eight % 4) as u8;
            rows[eight * 8 + 7 - A] = byte;
            rows[eight * 8 + 7 - B] = byte + 4;
            rows[eight * 8 + 7 - C] = byte + 8;
            eight += 1;
        }
        rows
    }
    let filled = const { (1u64 << (7 - A) | 1 << (7 - B) | 1 << (7 - C)) * 0x0101_0101_0101_0101 };
    // SAFETY: a masked load reads the 24 bytes of `planes` and no others.
    let planes = unsafe { _mm256_maskz_loadu_epi8(0xff_ffff, planes.as_ptr().cast()) };
    let rows = load(const { &rows::<A, B, C>() });
    let matrices = _mm512_maskz_permutexvar_epi8(filled, rows, _mm512_castsi256_si512(planes));
    // Column i for element i.
    let columns = _mm512_set1_epi64(0x8040_2010_0804_0201_u64 as i64);
    _mm512_gf2p8affine_epi64_epi8::<0>(columns, matrices)
}

/// The bits of `yes` where `mask` is set, of `no` elsewhere.
#[inline]
#[target_feature(enable = "avx512f")]
fn choose(mask: __m512i, yes: __m512i, no: __m512i) -> __m512i {
    _mm512_ternarylogic_epi64::<0xca>(mask, yes, no)
}

/// 64 words, each a byte of `low` below one of `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn interleave_bytes(low: __m512i, high: __m512i) -> [__m512i; 2] {
    const ORDER: [[u8; 64]; 2] = {
        let mut order = [[0; 64]; 2];
        let mut i = 0;
        while i < 128 {
            order[i / 64][i % 64] = (i / 2 + i % 2 * 64) as u8;
            i += 1;
        }
        order
    };
    [_mm512_permutex2var_epi8(low, load(&ORDER[0]), high), _mm512_permutex2var_epi8(low, load(&ORDER[1]), high)]
}

/// 32 double words, each a word of `low` below one of `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn interleave_words(low: __m512i, high: __m512i) -> [__m512i; 2] {
    const ORDER: [[u8; 64]; 2] = {
        let mut order = [[0; 64]; 2];
        let mut i = 0;
        while i < 64 {
            order[i / 32][i % 32 * 2] = (i / 2 + i % 2 * 32) as u8;
            i += 1;
        }
        order
    };
    [_mm512_permutex2var_epi16(low, load(&ORDER[0]), high), _mm512_permutex2var_epi16(low, load(&ORDER[1]), high)]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &[u8; 64]) -> __m512i {
    // SAFETY: 64 bytes, at any address.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [u8; 128], vectors: [__m512i; 2]) {
    // SAFETY: 128 bytes, at any address.
    unsafe {
        _mm512_storeu_si512(to.as_mut_ptr().cast(), vectors[0]);
        _mm512_storeu_si512(to.as_mut_ptr().add(64).cast(), vectors[1]);
    }
}
