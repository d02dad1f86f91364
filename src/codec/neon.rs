//! Decoding by groups of 32 elements, two vectors of 16, with NEON.

use std::arch::aarch64::*;

use super::encode::portable_segment;
use super::{GROUP, Implementation, Kind, Place, Segment, portable};

pub(super) fn implementation() -> Option<Implementation> {
    let here = std::arch::is_aarch64_feature_detected!("neon");
    here.then_some(Implementation { name: "neon", decode: decode_segment, encode: portable_segment })
}

fn decode_segment(kind: Kind, segment: &Segment<'_>, out: &mut [u8]) -> bool {
    // SAFETY: only `implementation` hands this function out, after it has seen the feature.
    let place = unsafe { groups_of(kind, segment, out) };
    place.escape <= segment.escapes.len() && portable::finish_segment(kind, segment, place, out)
}

/// Elements of a vector.
const HALF: usize = GROUP / 2;

/// Decodes all whole groups. The place's escapes may lie beyond those there are: then the codes ask for too many.
#[target_feature(enable = "neon")]
fn groups_of(kind: Kind, segment: &Segment<'_>, out: &mut [u8]) -> Place {
    let plane = |index: usize| segment.planes[index * segment.len..][..segment.len].as_chunks::<HALF>().0;
    let sign = vdupq_n_u8(0x80);
    // Sign and high mantissa bits in one byte, and the exponent, to the two high bytes of an element.
    let join = |exponents, rest| {
        let low = vbslq_u8(sign, vshlq_n_u8::<7>(exponents), rest);
        let high = vbslq_u8(sign, rest, vshrq_n_u8::<1>(exponents));
        (low, high)
    };
    match kind {
        Kind::Bf16 => {
            let rest = plane(0);
            groups::<32>(segment, out, |half, exponents, to| {
                let (low, high) = join(exponents, load(&rest[half]));
                // SAFETY: 32 bytes.
                unsafe { vst2q_u8(to.as_mut_ptr(), uint8x16x2_t(low, high)) }
            })
        }
        Kind::F32 => {
            let (first, second, rest) = (plane(0), plane(1), plane(2));
            groups::<64>(segment, out, |half, exponents, to| {
                let (low, high) = join(exponents, load(&rest[half]));
                let bytes = uint8x16x4_t(load(&first[half]), load(&second[half]), low, high);
                // SAFETY: 64 bytes.
                unsafe { vst4q_u8(to.as_mut_ptr(), bytes) }
            })
        }
        Kind::F16 => {
            let rest = plane(0);
            let (bits, _) = segment.bits.as_chunks::<12>();
            groups::<32>(segment, out, |half, exponents, to| {
                let bits = spread(&bits[half / 2], half % 2, [1, 2, 0x80]);
                let high = vorrq_u8(vshlq_n_u8::<2>(exponents), bits);
                // SAFETY: 32 bytes.
                unsafe { vst2q_u8(to.as_mut_ptr(), uint8x16x2_t(load(&rest[half]), high)) }
            })
        }
    }
}

/// Calls `put` with the exponents of each half of each whole group and the place of its elements.
#[inline]
#[target_feature(enable = "neon")]
fn groups<const OUT: usize>(
    segment: &Segment<'_>,
    out: &mut [u8],
    put: impl Fn(usize, uint8x16_t, &mut [u8; OUT]),
) -> Place {
    let mut table = [0; HALF];
    table[..8].copy_from_slice(&segment.table);
    let table = load(&table);
    let numbers = load(&std::array::from_fn(|i| i as u8));
    let (codes, _) = segment.codes.as_chunks::<12>();
    let whole = segment.len / GROUP;
    let (halves, _) = out.as_chunks_mut::<OUT>();
    let mut at = 0;
    for (half, to) in halves[..2 * whole].iter_mut().enumerate() {
        let codes = spread(&codes[half / 2], half % 2, [1, 2, 4]);
        let mut exponents = vqtbl1q_u8(table, codes);
        // Four bits an element, as there is no instruction for one.
        let escaped = vreinterpretq_u16_u8(vceqq_u8(codes, vdupq_n_u8(super::ESCAPE)));
        let mut escaped = vget_lane_u64::<0>(vreinterpret_u64_u8(vshrn_n_u16::<4>(escaped)));
        while escaped != 0 {
            let element = escaped.trailing_zeros() / 4;
            let escape = segment.escapes.get(at).copied().unwrap_or(0);
            let here = vceqq_u8(numbers, vdupq_n_u8(element as u8));
            exponents = vbslq_u8(here, vdupq_n_u8(escape), exponents);
            escaped &= !(0xf << (4 * element));
            at += 1;
        }
        put(half, exponents, to);
    }
    Place { group: whole, escape: at }
}

/// The bits of half a group from its three words: where one is set, the element has the bits of `values`.
#[inline]
#[target_feature(enable = "neon")]
fn spread(words: &[u8; 12], half: usize, values: [u8; 3]) -> uint8x16_t {
    let mut all = [0; HALF];
    all[..12].copy_from_slice(words);
    let words = load(&all);
    let first = vdupq_n_u8(2 * half as u8);
    let byte = vaddq_u8(load(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]), first);
    let bit = load(&[1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128]);
    let of = |word: u8, value: u8| {
        let bytes = vqtbl1q_u8(words, vaddq_u8(byte, vdupq_n_u8(4 * word)));
        vandq_u8(vtstq_u8(bytes, bit), vdupq_n_u8(value))
    };
    vorrq_u8(vorrq_u8(of(0, values[0]), of(1, values[1])), of(2, values[2]))
}

#[inline]
#[target_feature(enable = "neon")]
fn load(from: &[u8; HALF]) -> uint8x16_t {
    // SAFETY: 16 bytes, at any address.
    unsafe { vld1q_u8(from.as_ptr()) }
}
