//! The writer: which seven exponents a segment names, its planes, and what coding would win.

use super::{
    CODEC, ESCAPE, GROUP, HEADER_LEN, Implementation, Kind, RAW_SEGMENT, SEGMENT, SEGMENT_HEADER_LEN, TABLE_LEN,
};

/// Plain bytes [`estimate`] looks at: so many windows of so many bytes, spread over the chunk.
const SAMPLE_WINDOWS: usize = 16;
const SAMPLE_WINDOW_BYTES: usize = 4096;

/// Appends the coded segment of 1 to 65,536 whole elements.
pub(super) type EncodeSegment = fn(Kind, elements: &[u8], out: &mut Vec<u8>);

/// Replaces `out` by the coded stream of `plain`, whose first whole element starts at `skew`. Any bytes can be coded;
/// whether it wins shows in the length. The same bytes always give the same stream.
///
/// # Panics
/// If `skew` is an element or more.
pub fn encode(kind: Kind, skew: usize, plain: &[u8], out: &mut Vec<u8>) {
    encode_with(Implementation::best(), kind, skew, plain, out);
}

/// The same by a named implementation: for tests and measurements.
///
/// # Panics
/// As [`encode`].
pub fn encode_with(implementation: Implementation, kind: Kind, skew: usize, plain: &[u8], out: &mut Vec<u8>) {
    assert!(skew < kind.width(), "{skew} {}", kind.width());
    // Fewer bytes than the skew hold no element; they all stand before the first.
    let skew = skew.min(plain.len());
    out.clear();
    out.reserve(coded_len_max(kind, plain.len()));
    out.extend_from_slice(&[CODEC, kind.log2_width(), kind.exponent_bits(), skew as u8, 0, 0, 0, 0]);
    let (before, elements) = plain.split_at(skew);
    let (elements, tail) = elements.split_at(elements.len() - elements.len() % kind.width());
    out.extend_from_slice(before);
    for segment in elements.chunks(SEGMENT * kind.width()) {
        (implementation.encode)(kind, segment, out);
    }
    out.extend_from_slice(tail);
}

/// Most bytes [`encode`] gives for `plain_len` bytes, whatever they are.
pub fn coded_len_max(kind: Kind, plain_len: usize) -> usize {
    HEADER_LEN + plain_len + SEGMENT_HEADER_LEN * (plain_len / kind.width()).div_ceil(SEGMENT)
}

/// About how many bytes [`encode`] would give, from 64 KiB spread over `plain` (from all of it, if it is shorter).
///
/// # Panics
/// As [`encode`].
pub fn estimate(kind: Kind, skew: usize, plain: &[u8]) -> usize {
    assert!(skew < kind.width(), "{skew} {}", kind.width());
    let width = kind.width();
    let skew = skew.min(plain.len());
    let elements = (plain.len() - skew) / width;
    let window = (SAMPLE_WINDOW_BYTES / width).min(elements.max(1));
    let windows = elements.div_ceil(window).min(SAMPLE_WINDOWS);
    let (mut seen, mut coded) = (0, 0);
    for index in 0..windows {
        // The first window at the start, the last at the end. A window stands for its segment: it has its own table.
        let at = (elements - window) * index / (windows - 1).max(1);
        let bytes = &plain[skew + at * width..][..window * width];
        let mut counts = [0; 256];
        match kind {
            Kind::Bf16 => count_sample::<2>(bytes, bf16_exponent, &mut counts),
            Kind::F32 => count_sample::<4>(bytes, f32_exponent, &mut counts),
            Kind::F16 => count_sample::<2>(bytes, f16_exponent, &mut counts),
        }
        let (_, escapes) = choose_table(kind, window, &counts);
        let planes = kind.segment_len(window, escapes) - SEGMENT_HEADER_LEN;
        coded += planes.min(window * width);
        seen += window * width;
    }
    let whole = elements * width;
    let segments = match seen {
        0 => 0,
        _ => (coded as u128 * whole as u128 / seen as u128) as usize,
    };
    HEADER_LEN + (plain.len() - whole) + segments + SEGMENT_HEADER_LEN * elements.div_ceil(SEGMENT)
}

/// The kind and skew under which `plain` becomes shortest, by sampling; `None` if less than 3 % would be won. For files
/// without a header that says what they hold.
pub fn sniff(plain: &[u8]) -> Option<(Kind, usize)> {
    let tries = Kind::ALL.into_iter().flat_map(|kind| (0..kind.width()).map(move |skew| (kind, skew)));
    let (coded_len, found) =
        tries.map(|(kind, skew)| (estimate(kind, skew, plain), (kind, skew))).min_by_key(|it| it.0)?;
    (coded_len as u128 * 100 <= plain.len() as u128 * 97).then_some(found)
}

fn count_sample<const WIDTH: usize>(bytes: &[u8], exponent: fn([u8; WIDTH]) -> u8, counts: &mut [u32; 256]) {
    bytes.as_chunks::<WIDTH>().0.iter().for_each(|&element| counts[usize::from(exponent(element))] += 1);
}

/// The seven commonest exponents, by falling count and then by value, and how many elements have another.
fn choose_table(kind: Kind, elements: usize, counts: &[u32; 256]) -> ([u8; TABLE_LEN], usize) {
    let mut table = [0; TABLE_LEN];
    let mut best = [None; TABLE_LEN];
    for exponent in 0..=u8::MAX >> (8 - kind.exponent_bits()) {
        let count = counts[usize::from(exponent)];
        // After all that are as common: the smaller value stays before.
        let rank = best.iter().position(|other| other.is_none_or(|other| count > other)).unwrap_or(TABLE_LEN);
        if rank < TABLE_LEN {
            best[rank..].rotate_right(1);
            table[rank..].rotate_right(1);
            (best[rank], table[rank]) = (Some(count), exponent);
        }
    }
    let named: u32 = best.iter().flatten().sum();
    (table, elements - named as usize)
}

/// How the bits of 32 bytes are gathered: all that differs between the implementations.
///
/// # Safety
/// An implementor may need instructions; whoever calls [`segment`] with it has made sure of them.
pub(super) trait Gather {
    /// The code planes of a group: bit `i` of word `b` is bit `b` of the code of `exponents[i]`. `codes` is `table`
    /// turned round: the code of each exponent.
    ///
    /// # Safety
    /// The processor has what the implementor needs.
    unsafe fn code_planes(exponents: &[u8; GROUP], table: &[u8; TABLE_LEN], codes: &[u8; 256]) -> [u32; 3];

    /// Bit `bit` of each byte.
    ///
    /// # Safety
    /// The processor has what the implementor needs.
    unsafe fn plane(bytes: &[u8; GROUP], bit: u32) -> u32;
}

struct Portable;

impl Gather for Portable {
    #[inline(always)]
    unsafe fn code_planes(exponents: &[u8; GROUP], _: &[u8; TABLE_LEN], codes: &[u8; 256]) -> [u32; 3] {
        let codes = exponents.map(|exponent| codes[usize::from(exponent)]);
        // SAFETY: needs nothing.
        unsafe { [Self::plane(&codes, 0), Self::plane(&codes, 1), Self::plane(&codes, 2)] }
    }

    #[inline(always)]
    unsafe fn plane(bytes: &[u8; GROUP], bit: u32) -> u32 {
        let mut word = 0;
        for (index, &eight) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let bits = u64::from_le_bytes(eight) >> bit & 0x0101_0101_0101_0101;
            // Moves bit 8 i to bit 56 + i; no two of the products' bits meet, so nothing is carried.
            word |= ((bits.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32) << (8 * index);
        }
        word
    }
}

pub(super) fn portable_segment(kind: Kind, elements: &[u8], out: &mut Vec<u8>) {
    // SAFETY: `Portable` needs nothing.
    unsafe { segment::<Portable>(kind, elements, out) }
}

/// Appends one segment, coded if that is shorter than raw.
///
/// # Safety
/// The processor has what `G` needs.
#[inline(always)]
pub(super) unsafe fn segment<G: Gather>(kind: Kind, elements: &[u8], out: &mut Vec<u8>) {
    // SAFETY: passed on from the caller.
    unsafe {
        match kind {
            Kind::Bf16 => segment_of::<G, 2>(kind, elements, out, bf16_exponent, |[low, high]| {
                [low & 0x7f | high & 0x80, 0, 0, 0]
            }),
            Kind::F32 => segment_of::<G, 4>(kind, elements, out, f32_exponent, |[low, middle, high, top]| {
                [low, middle, high & 0x7f | top & 0x80, 0]
            }),
            Kind::F16 => segment_of::<G, 2>(kind, elements, out, f16_exponent, |[low, high]| {
                [low, high & 3 | (high & 0x80) >> 5, 0, 0]
            }),
        }
    }
}

#[inline(always)]
fn bf16_exponent([low, high]: [u8; 2]) -> u8 {
    high << 1 | low >> 7
}

#[inline(always)]
fn f32_exponent([_, _, high, top]: [u8; 4]) -> u8 {
    top << 1 | high >> 7
}

#[inline(always)]
fn f16_exponent([_, high]: [u8; 2]) -> u8 {
    high >> 2 & 0x1f
}

/// `rest` gives sign and mantissa as a little-endian number.
///
/// # Safety
/// The processor has what `G` needs.
#[inline(always)]
unsafe fn segment_of<G: Gather, const WIDTH: usize>(
    kind: Kind,
    bytes: &[u8],
    out: &mut Vec<u8>,
    exponent: impl Fn([u8; WIDTH]) -> u8,
    rest: impl Fn([u8; WIDTH]) -> [u8; 4],
) {
    let (elements, _) = bytes.as_chunks::<WIDTH>();
    let n_groups = elements.len().div_ceil(GROUP);
    // On the stack, not allocated for each segment. Beyond the last element zeros, whose bits are masked out.
    let mut exponents = [0u8; SEGMENT];
    elements.iter().zip(&mut exponents).for_each(|(&element, to)| *to = exponent(element));
    let counts = count(&exponents[..elements.len()]);
    let (table, escapes) = choose_table(kind, elements.len(), &counts);
    let coded_len = kind.segment_len(elements.len(), escapes);
    if coded_len >= SEGMENT_HEADER_LEN + bytes.len() {
        out.extend_from_slice(&RAW_SEGMENT.to_le_bytes());
        out.extend_from_slice(&[0; SEGMENT_HEADER_LEN - 4]);
        out.extend_from_slice(bytes);
        return;
    }
    out.extend_from_slice(&(escapes as u32).to_le_bytes());
    out.extend_from_slice(&table);
    out.extend_from_slice(&[0; SEGMENT_HEADER_LEN - 4 - TABLE_LEN]);
    let mut codes = [ESCAPE; 256];
    table.iter().zip(0..).for_each(|(&exponent, code)| codes[usize::from(exponent)] = code);

    let at = out.len();
    out.resize(at + coded_len - SEGMENT_HEADER_LEN, 0);
    let (code_words, to) = out[at..].split_at_mut(12 * n_groups);
    let (mut planes, to) = to.split_at_mut(elements.len() * kind.byte_planes());
    let (bit_words, mut escaped) = to.split_at_mut(4 * n_groups * kind.bit_planes());

    for (group, (exponents, words)) in
        exponents.as_chunks::<GROUP>().0.iter().zip(code_words.as_chunks_mut::<12>().0).enumerate()
    {
        let present = present(elements.len() - group * GROUP);
        // SAFETY: passed on from the caller.
        let [low, middle, high] = unsafe { G::code_planes(exponents, &table, &codes) }.map(|word| word & present);
        words[..4].copy_from_slice(&low.to_le_bytes());
        words[4..8].copy_from_slice(&middle.to_le_bytes());
        words[8..].copy_from_slice(&high.to_le_bytes());
        let mut at = low & middle & high;
        while at != 0 {
            let (to, rest) = std::mem::take(&mut escaped).split_first_mut().expect("counted above");
            *to = exponents[at.trailing_zeros() as usize];
            escaped = rest;
            at &= at - 1;
        }
    }
    for index in 0..kind.byte_planes() {
        let (plane, others) = std::mem::take(&mut planes).split_at_mut(elements.len());
        elements.iter().zip(plane).for_each(|(&element, to)| *to = rest(element)[index]);
        planes = others;
    }
    if kind.bit_planes() > 0 {
        for (elements, words) in elements.chunks(GROUP).zip(bit_words.chunks_mut(4 * kind.bit_planes())) {
            let mut high = [0; GROUP];
            elements.iter().zip(&mut high).for_each(|(&element, to)| *to = rest(element)[kind.byte_planes()]);
            for (bit, word) in words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                // SAFETY: passed on from the caller.
                *word = unsafe { G::plane(&high, bit as u32) }.to_le_bytes();
            }
        }
    }
}

/// The bits of a group that `left` elements fill.
#[inline(always)]
fn present(left: usize) -> u32 {
    if left >= GROUP { u32::MAX } else { (1 << left) - 1 }
}

/// How often each exponent occurs. Four tables in turn: equal neighbours would wait for each other's count.
#[inline(always)]
fn count(exponents: &[u8]) -> [u32; 256] {
    let mut counts = [[0u32; 256]; 4];
    let (fours, rest) = exponents.as_chunks::<4>();
    for four in fours {
        for (table, &exponent) in counts.iter_mut().zip(four) {
            table[usize::from(exponent)] += 1;
        }
    }
    rest.iter().for_each(|&exponent| counts[0][usize::from(exponent)] += 1);
    std::array::from_fn(|i| counts.iter().map(|table| table[i]).sum())
}
