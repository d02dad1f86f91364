//! The decoder without any special instruction: what the others are held against, and what finishes their segments.

use super::{GROUP, Kind, Place, Segment};

pub(super) fn decode_segment(kind: Kind, segment: &Segment<'_>, out: &mut [u8]) -> bool {
    finish_segment(kind, segment, Place::default(), out)
}

/// Decodes from `place` to the segment's end; true if exactly all escapes were asked for.
pub(super) fn finish_segment(kind: Kind, segment: &Segment<'_>, place: Place, out: &mut [u8]) -> bool {
    match kind {
        Kind::Bf16 => groups(segment, place, out, |exponent, [low, ..], _| {
            [low & 0x7f | exponent << 7, low & 0x80 | exponent >> 1]
        }),
        Kind::F32 => groups(segment, place, out, |exponent, [low, middle, high], _| {
            [low, middle, high & 0x7f | exponent << 7, high & 0x80 | exponent >> 1]
        }),
        Kind::F16 => groups(segment, place, out, |exponent, [low, ..], high| {
            // Two bits of mantissa, then the sign: sign << 7 | exponent << 2 | mantissa >> 8.
            [low, high & 3 | exponent << 2 | (high & 4) << 5]
        }),
    }
}

/// `join` makes an element of its exponent, the byte planes it has and the bits of its bit planes.
fn groups<const WIDTH: usize>(
    segment: &Segment<'_>,
    place: Place,
    out: &mut [u8],
    join: impl Fn(u8, [u8; 3], u8) -> [u8; WIDTH],
) -> bool {
    let mut escapes = segment.escapes[place.escape..].iter();
    let n_groups = segment.len.div_ceil(GROUP);
    let (code_words, _) = segment.codes.as_chunks::<12>();
    let bit_planes = segment.bits.len() / 4 / n_groups;
    let byte_planes = segment.planes.len() / segment.len;
    let (elements, _) = out.as_chunks_mut::<WIDTH>();
    for (group, codes) in code_words.iter().enumerate().skip(place.group) {
        let from = group * GROUP;
        let to = segment.len.min(from + GROUP);
        let codes = words(codes);
        let mut exponents = [0; GROUP];
        for (i, exponent) in exponents.iter_mut().enumerate() {
            *exponent = segment.table[usize::from(element_bits(codes, i))];
        }
        let mut escaped = codes[0] & codes[1] & codes[2];
        while escaped != 0 {
            let Some(&escape) = escapes.next() else { return false };
            exponents[escaped.trailing_zeros() as usize] = escape;
            escaped &= escaped - 1;
        }
        let high = words(&segment.bits[4 * bit_planes * group..][..4 * bit_planes]);
        let mut planes: [&[u8]; 3] = [&[0; GROUP]; 3];
        for (index, plane) in planes.iter_mut().enumerate().take(byte_planes) {
            *plane = &segment.planes[index * segment.len..][from..to];
        }
        for (i, element) in elements[from..to].iter_mut().enumerate() {
            let bytes = [planes[0][i], planes[1][i], planes[2][i]];
            *element = join(exponents[i], bytes, element_bits(high, i));
        }
    }
    escapes.len() == 0
}

/// Up to three little-endian words.
fn words(bytes: &[u8]) -> [u32; 3] {
    let mut words = [0; 3];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

/// Bit `i` of each word, the first word's lowest.
fn element_bits(words: [u32; 3], i: usize) -> u8 {
    ((words[0] >> i & 1) | (words[1] >> i & 1) << 1 | (words[2] >> i & 1) << 2) as u8
}
