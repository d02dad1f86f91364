//! Lossless coding of floating-point weights: most of the air in their exponents is left out, decoding runs at memcpy's
//! speed.
//!
//! In: the plaintext of a chunk and what its elements are; back: a coded stream, which is what the cipher then covers.
//! Promises: [`decode`] refuses every stream that is not exactly of the format, never writes outside the plaintext it was
//! given, never reads outside the stream, never panics on what a stream holds and allocates nothing; every
//! implementation gives the same bytes and the same verdicts as the portable one, which is the oracle.
//! Not here: keys, I/O, which chunks are coded (`seal`), where the coded bytes come from (`crypto`).
//! Spec: docs/FORMAT.md, coded stream. Held by: the tests beside this file, tests/vectors/codec.hex and
//! codec-hostile.txt, the fuzz target under tests/fuzz.
//!
//! # How it works
//!
//! The exponents of trained weights hold 2.6 to 2.8 bits of information in 8. A segment of 65,536 elements names its
//! seven commonest exponents; each element then takes three bits, stored as bit planes of 32 elements, and an element
//! with a rarer exponent has its exponent listed after them (an escape). Sign and mantissa are as good as random and stay
//! as they are, as byte planes. Nothing depends on the element before, so 32 or 64 are decoded at once.
//!
//! ```text
//! u8 codec = 1 | u8 log2 width | u8 exponent bits | u8 skew | u32 zero | skew raw bytes
//! a segment:  u32 n_escapes | 7 exponents | 5 zero | code planes | byte planes | bit planes | escapes
//! fewer bytes than an element has
//! ```
//!
//! What the text leaves to the writer, a reader accepts: any order of the table, exponents in it that no element has, a
//! coded segment where a raw one would be shorter, and an escape whose exponent the table names too. Refusing the last
//! would cost a look-up for each escape and stop nothing: one plaintext has many streams anyway, and the stream is
//! authentic before it gets here.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod encode;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::OnceLock;

pub use encode::{coded_len_max, encode, encode_with, estimate, sniff};

/// Elements of every segment but the last.
const SEGMENT: usize = 65_536;
/// Elements whose bits share the words of the planes.
const GROUP: usize = 32;
const HEADER_LEN: usize = 8;
const SEGMENT_HEADER_LEN: usize = 16;
/// First byte of a stream; another value is another codec.
const CODEC: u8 = 1;
/// Exponents a segment's table names.
const TABLE_LEN: usize = 7;
/// Code of an element whose exponent stands among the escapes.
const ESCAPE: u8 = 7;
/// Bytes of the longest segment: f32, every exponent escaped. Who keeps so much of a stream at hand always gets on.
pub const SEGMENT_BYTES_MAX: usize = Kind::F32.segment_len(SEGMENT, SEGMENT);
/// In place of the number of escapes: the segment's elements stand as they are.
const RAW_SEGMENT: u32 = u32::MAX;

/// What the elements of a chunk are, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Bf16,
    F32,
    F16,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Bf16, Kind::F32, Kind::F16];

    /// Bytes an element takes.
    pub const fn width(self) -> usize {
        1 << self.log2_width()
    }

    pub const fn name(self) -> &'static str {
        match self {
            Kind::Bf16 => "bf16",
            Kind::F32 => "f32",
            Kind::F16 => "f16",
        }
    }

    const fn log2_width(self) -> u8 {
        match self {
            Kind::Bf16 | Kind::F16 => 1,
            Kind::F32 => 2,
        }
    }

    const fn exponent_bits(self) -> u8 {
        match self {
            Kind::Bf16 | Kind::F32 => 8,
            Kind::F16 => 5,
        }
    }

    /// Bits of sign and mantissa together.
    const fn rest_bits(self) -> usize {
        8 * self.width() - self.exponent_bits() as usize
    }

    /// Whole bytes in the rest of an element, each a plane of one byte an element.
    const fn byte_planes(self) -> usize {
        self.rest_bits() / 8
    }

    /// Bits of the rest above its whole bytes, each a plane of one word a group.
    const fn bit_planes(self) -> usize {
        self.rest_bits() % 8
    }

    /// Bytes of a coded segment, its header included. At most 65,536 elements and as many escapes: far from overflow.
    const fn segment_len(self, elements: usize, escapes: usize) -> usize {
        let words = elements.div_ceil(GROUP) * (3 + self.bit_planes());
        SEGMENT_HEADER_LEN + 4 * words + elements * self.byte_planes() + escapes
    }
}

/// The bytes are not a coded stream of the plaintext length that was expected. The reason names the rule, never a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(&'static str);

impl Malformed {
    pub fn reason(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed coded stream: {}", self.0)
    }
}

impl std::error::Error for Malformed {}

/// A coded segment whose header, lengths and padding have been checked; what is left to find out is whether the codes
/// ask for as many escapes as there are.
struct Segment<'a> {
    /// Elements, 1 to 65,536.
    len: usize,
    /// By code; the eighth is never used.
    table: [u8; 8],
    /// Three little-endian words a group.
    codes: &'a [u8],
    /// `len` bytes a plane, low bytes first.
    planes: &'a [u8],
    /// `bit_planes` little-endian words a group.
    bits: &'a [u8],
    escapes: &'a [u8],
}

/// How far a kernel has come in a segment.
#[derive(Clone, Copy, Default)]
struct Place {
    group: usize,
    escape: usize,
}

/// Writes a segment's elements to `out`, exactly `len` of them; false if the codes do not ask for exactly the escapes
/// there are, and then what `out` holds means nothing.
type DecodeSegment = fn(Kind, &Segment<'_>, out: &mut [u8]) -> bool;

/// One way to code and decode that this processor can run. All of them give the same bytes.
#[derive(Clone, Copy)]
pub struct Implementation {
    name: &'static str,
    decode: DecodeSegment,
    encode: encode::EncodeSegment,
}

impl Implementation {
    const PORTABLE: Implementation =
        Implementation { name: "portable", decode: portable::decode_segment, encode: encode::portable_segment };

    /// Every one that runs here, the fastest first, the portable one last.
    pub fn all_here() -> Vec<Implementation> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        all.extend(avx512::implementation().into_iter().chain(avx2::implementation()));
        #[cfg(target_arch = "aarch64")]
        all.extend(neon::implementation());
        all.push(Implementation::PORTABLE);
        all
    }

    /// The fastest one here, found out once.
    pub fn best() -> Implementation {
        static BEST: OnceLock<Implementation> = OnceLock::new();
        *BEST.get_or_init(|| Implementation::all_here()[0])
    }

    pub fn name(self) -> &'static str {
        self.name
    }
}

/// Which implementation runs here: `avx512`, `avx2`, `neon` or `portable`.
pub fn implementation() -> &'static str {
    Implementation::best().name
}

/// Decodes a stream while its bytes are still arriving: each segment as soon as it is whole, while it is warm in cache.
///
/// After an error the plaintext buffer holds anything; the caller wipes it as it does after a failed tag.
pub struct Decoder {
    implementation: Implementation,
    coded_len: usize,
    plain_len: usize,
    /// Known once the header has been read.
    kind: Option<Kind>,
    coded_at: usize,
    plain_at: usize,
}

impl Decoder {
    /// For a stream of `coded_len` bytes that gives `plain_len` bytes.
    pub fn new(coded_len: usize, plain_len: usize) -> Decoder {
        Decoder::with(Implementation::best(), coded_len, plain_len)
    }

    /// The same by a named implementation: for tests and measurements.
    pub fn with(implementation: Implementation, coded_len: usize, plain_len: usize) -> Decoder {
        Decoder { implementation, coded_len, plain_len, kind: None, coded_at: 0, plain_at: 0 }
    }

    /// Decodes as many whole segments as have arrived, and answers how many bytes of `arrived` it is done with.
    ///
    /// `arrived` is what is there of the stream beyond the bytes that earlier calls were done with: the caller moves the
    /// rest to the front and appends. A window of [`SEGMENT_BYTES_MAX`] always gets on. `out` is the chunk's whole
    /// plaintext, the same in every call.
    ///
    /// # Errors
    /// [`Malformed`] as soon as a rule is seen broken; which call that is depends on what had arrived, the verdict does
    /// not.
    ///
    /// # Panics
    /// If `out` does not have the length the decoder was made for, or more arrived than the stream has.
    pub fn advance(&mut self, arrived: &[u8], out: &mut [u8]) -> Result<usize, Malformed> {
        assert!(out.len() == self.plain_len, "{} {}", out.len(), self.plain_len);
        assert!(arrived.len() <= self.coded_len - self.coded_at, "{} of {}", arrived.len(), self.coded_len);
        let before = self.coded_at;
        let mut rest = arrived;
        while self.next_piece(&mut rest, out)? {}
        Ok(self.coded_at - before)
    }

    /// Takes the stream's header or one segment from the front of `rest`, if it is there whole.
    fn next_piece(&mut self, rest: &mut &[u8], out: &mut [u8]) -> Result<bool, Malformed> {
        let Some(kind) = self.kind else { return self.open(rest, out) };
        let elements = ((self.plain_len - self.plain_at) / kind.width()).min(SEGMENT);
        if elements == 0 {
            return Ok(false);
        }
        let Some(header) = self.peek(rest, SEGMENT_HEADER_LEN)? else { return Ok(false) };
        let n_escapes = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let plain_len = elements * kind.width();
        let len = if n_escapes == RAW_SEGMENT {
            if header[4..].iter().any(|&byte| byte != 0) {
                return Err(Malformed("a raw segment has a table"));
            }
            let Some(segment) = self.peek(rest, SEGMENT_HEADER_LEN + plain_len)? else { return Ok(false) };
            out[self.plain_at..][..plain_len].copy_from_slice(&segment[SEGMENT_HEADER_LEN..]);
            segment.len()
        } else {
            let escapes = n_escapes as usize;
            if escapes > elements {
                return Err(Malformed("more escapes than elements"));
            }
            let Some(bytes) = self.peek(rest, kind.segment_len(elements, escapes))? else { return Ok(false) };
            let segment = parse_segment(kind, elements, bytes)?;
            if !(self.implementation.decode)(kind, &segment, &mut out[self.plain_at..][..plain_len]) {
                return Err(Malformed("number of escapes"));
            }
            bytes.len()
        };
        self.plain_at += plain_len;
        self.take(rest, len);
        Ok(true)
    }

    /// All of the stream has arrived, `rest` being what [`Decoder::advance`] left of it: decodes that and checks that the
    /// stream ends with it.
    ///
    /// # Errors
    /// [`Malformed`] if anything in the whole stream is not exactly of the format.
    ///
    /// # Panics
    /// As [`Decoder::advance`]; if `rest` is not all of the rest.
    pub fn finish(mut self, rest: &[u8], out: &mut [u8]) -> Result<(), Malformed> {
        assert!(rest.len() == self.coded_len - self.coded_at, "{} of {}", rest.len(), self.coded_len);
        let used = self.advance(rest, out)?;
        let (tail, rest) = (&mut out[self.plain_at..], &rest[used..]);
        if rest.len() != tail.len() {
            return Err(Malformed("the stream does not end where its plaintext does"));
        }
        tail.copy_from_slice(rest);
        Ok(())
    }

    /// The next `len` bytes of the stream; `None` while they have not all arrived.
    fn peek<'a>(&self, rest: &'a [u8], len: usize) -> Result<Option<&'a [u8]>, Malformed> {
        if self.coded_len - self.coded_at < len {
            return Err(Malformed("cut"));
        }
        Ok(rest.get(..len))
    }

    fn take(&mut self, rest: &mut &[u8], len: usize) {
        self.coded_at += len;
        *rest = &rest[len..];
    }

    /// Reads the header and the bytes before the first whole element.
    fn open(&mut self, rest: &mut &[u8], out: &mut [u8]) -> Result<bool, Malformed> {
        let Some(header) = self.peek(rest, HEADER_LEN)? else { return Ok(false) };
        if header[0] != CODEC {
            return Err(Malformed("unknown codec"));
        }
        let named = |kind: &Kind| [kind.log2_width(), kind.exponent_bits()] == header[1..3];
        let kind = Kind::ALL.into_iter().find(named).ok_or(Malformed("unknown kind of element"))?;
        let skew = usize::from(header[3]);
        if skew >= kind.width() {
            return Err(Malformed("skew of an element or more"));
        }
        if header[4..].iter().any(|&byte| byte != 0) {
            return Err(Malformed("header: reserved bytes"));
        }
        if skew > self.plain_len {
            return Err(Malformed("skew beyond the end"));
        }
        let Some(bytes) = self.peek(rest, HEADER_LEN + skew)? else { return Ok(false) };
        out[..skew].copy_from_slice(&bytes[HEADER_LEN..]);
        let len = bytes.len();
        (self.plain_at, self.kind) = (skew, Some(kind));
        self.take(rest, len);
        Ok(true)
    }
}

/// Splits the `segment_len` bytes of a coded segment and checks all that its codes do not decide.
fn parse_segment(kind: Kind, elements: usize, bytes: &[u8]) -> Result<Segment<'_>, Malformed> {
    let (header, bytes) = bytes.split_at(SEGMENT_HEADER_LEN);
    let (table, zero) = header[4..].split_at(TABLE_LEN);
    if zero.iter().any(|&byte| byte != 0) {
        return Err(Malformed("segment: reserved bytes"));
    }
    let out_of_range = |exponents: &[u8]| kind.exponent_bits() < 8 && above(exponents, kind.exponent_bits());
    if out_of_range(table) {
        return Err(Malformed("table: an exponent out of range"));
    }
    if (1..TABLE_LEN).any(|i| table[..i].contains(&table[i])) {
        return Err(Malformed("table: an exponent twice"));
    }
    let groups = elements.div_ceil(GROUP);
    let (codes, bytes) = bytes.split_at(12 * groups);
    let (planes, bytes) = bytes.split_at(elements * kind.byte_planes());
    let (bits, escapes) = bytes.split_at(4 * groups * kind.bit_planes());
    if out_of_range(escapes) {
        return Err(Malformed("escapes: an exponent out of range"));
    }
    let last = elements % GROUP;
    if last != 0 {
        let padded = |words: &[u8], count: usize| {
            let words = words[words.len() - 4 * count..].as_chunks::<4>().0;
            words.iter().any(|&word| u32::from_le_bytes(word) >> last != 0)
        };
        if padded(codes, 3) || padded(bits, kind.bit_planes()) {
            return Err(Malformed("padding bits"));
        }
    }
    let mut by_code = [0; 8];
    by_code[..TABLE_LEN].copy_from_slice(table);
    Ok(Segment { len: elements, table: by_code, codes, planes, bits, escapes })
}

/// Whether any of the exponents has a bit above the lowest `bits`.
fn above(exponents: &[u8], bits: u8) -> bool {
    exponents.iter().fold(0, |all, &exponent| all | exponent) >> bits != 0
}

/// Decodes a whole stream into `out`, which is as long as its plaintext.
///
/// # Errors
/// [`Malformed`] if `coded` is not exactly a stream of `out.len()` bytes; `out` then holds anything.
pub fn decode(coded: &[u8], out: &mut [u8]) -> Result<(), Malformed> {
    Decoder::new(coded.len(), out.len()).finish(coded, out)
}
