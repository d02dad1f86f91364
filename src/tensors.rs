//! Where the tensors of a model file lie, told from the file's first bytes: safetensors and GGUF.
//!
//! In: the head of a file (hostile, any length) and the file's length. Out: a [`TensorMap`], or `None` when the head is of
//! neither format, is cut short, or contradicts itself.
//! Promises: total, whatever the bytes; no work beyond the head that was given, memory at most a small multiple of it;
//! what a map names lies within the file, sorted, never empty, never overlapping.
//! A map is a hint and nothing more: it may decide what is fetched first or which codec is tried on a chunk, never which
//! bytes a reader gets. A head that lies costs time.
//! Not here: prefetching (`read`), sealing (`seal`).
//! Spec: the safetensors format (8 bytes of length, a JSON object, data); GGUF versions 2 and 3, little-endian.
//! Held by: the tests below.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

/// The longest head of either format that is looked at: the safetensors reference reader stops here as well, and the
/// vocabulary that a GGUF head carries is a tenth of it.
pub const HEAD_BYTES_MAX: u64 = 100_000_000;

/// Tensors of one file at most: a thousand times what large models have.
const TENSORS_MAX: usize = 1 << 20;

/// What is asked for first of a GGUF file; doubled while the head turns out to be longer.
const GGUF_HEAD_BYTES_FIRST: u64 = 1 << 20;

/// Where GGUF data is aligned when the file does not say.
const GGUF_ALIGNMENT: u64 = 32;

/// ggml knows four dimensions; files with a few more are read as well.
const GGUF_DIMENSIONS_MAX: u32 = 8;

/// Arrays within arrays within a GGUF value; real files have none.
const GGUF_NESTING_MAX: u32 = 4;

/// How the numbers of a tensor are stored, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    Bf16,
    F16,
    F32,
    /// Integers, 8-bit floats, block-quantised weights, and whatever is invented next.
    Other,
}

/// One tensor's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Bytes from the start of the file; never empty.
    pub range: Range<u64>,
    pub dtype: Dtype,
}

/// The tensors of one file, sorted by offset, disjoint, within the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMap {
    tensors: Vec<Tensor>,
    data_start: u64,
}

impl TensorMap {
    /// How many bytes of the head are wanted before [`TensorMap::parse`] can succeed, judged by the `head` at hand.
    ///
    /// `None`: a file of `file_len` bytes that begins like this is of neither format. `Some(n)` with `n` at most
    /// `head.len()`: that is enough. Otherwise get `n` bytes and ask again: safetensors says its length in its first 8
    /// bytes, GGUF says it nowhere, so that its answer grows. At most [`HEAD_BYTES_MAX`], at most `file_len`.
    pub fn head_len_wanted(head: &[u8], file_len: u64) -> Option<u64> {
        let Some(first) = head.first_chunk::<8>() else {
            return (file_len >= 8).then_some(8);
        };
        if first.starts_with(GGUF_MAGIC) {
            return match parse_gguf(head, file_len) {
                Ok(_) => Some(head.len() as u64),
                Err(Refusal::Short) => {
                    let wanted = (head.len() as u64).saturating_mul(2).max(GGUF_HEAD_BYTES_FIRST);
                    let wanted = wanted.min(HEAD_BYTES_MAX).min(file_len);
                    (wanted > head.len() as u64).then_some(wanted)
                }
                Err(Refusal::Foreign) => None,
            };
        }
        let json_len = u64::from_le_bytes(*first);
        // Every JSON object of this format begins at once; any other beginning is another format.
        let plausible = head.get(8).is_none_or(|&byte| byte == b'{');
        let wanted = json_len.checked_add(8)?;
        (plausible && json_len >= 2 && wanted <= HEAD_BYTES_MAX.min(file_len)).then_some(wanted)
    }

    /// Reads the map from a head of at least [`TensorMap::head_len_wanted`] bytes; more does no harm.
    ///
    /// `file_len`: plain bytes of the whole file. O(head).
    pub fn parse(head: &[u8], file_len: u64) -> Option<TensorMap> {
        let head = &head[..head.len().min(HEAD_BYTES_MAX as usize)];
        if head.starts_with(GGUF_MAGIC) { parse_gguf(head, file_len).ok() } else { parse_safetensors(head, file_len) }
    }

    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The first byte after the head, in bytes from the start of the file.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// The tensors that `range` (bytes of the file) touches, in order.
    pub fn within(&self, range: Range<u64>) -> &[Tensor] {
        let first = self.tensors.partition_point(|tensor| tensor.range.end <= range.start);
        let count = self.tensors[first..].partition_point(|tensor| tensor.range.start < range.end);
        &self.tensors[first..first + count]
    }

    /// The tensor that covers most of `range`, the first of those that cover equally much; `None` if none touches it.
    pub fn dominant(&self, range: Range<u64>) -> Option<&Tensor> {
        let covered = |t: &Tensor| t.range.end.min(range.end) - t.range.start.max(range.start);
        // `max_by_key` answers the last of equals, hence the reversal.
        self.within(range.clone()).iter().rev().max_by_key(|tensor| covered(tensor))
    }

    /// Sorts and checks what a head claims. Tensors without bytes take no part.
    fn checked(mut tensors: Vec<Tensor>, data_start: u64, file_len: u64) -> Option<TensorMap> {
        tensors.retain(|tensor| tensor.range.start != tensor.range.end);
        tensors.sort_by_key(|tensor| tensor.range.start);
        let forward = tensors.iter().all(|tensor| tensor.range.start < tensor.range.end);
        let disjoint = tensors.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start);
        let inside = tensors.first().is_none_or(|tensor| data_start <= tensor.range.start)
            && tensors.last().is_none_or(|tensor| tensor.range.end <= file_len)
            && data_start <= file_len;
        (forward && disjoint && inside).then_some(TensorMap { tensors, data_start })
    }
}

// ---- safetensors --------------------------------------------------------------------------------------------------------

fn parse_safetensors(head: &[u8], file_len: u64) -> Option<TensorMap> {
    let wanted = TensorMap::head_len_wanted(head, file_len)?;
    let json = head.get(8..usize::try_from(wanted).ok()?)?;
    let mut json = serde_json::Deserializer::from_slice(json);
    let claims = (&mut json).deserialize_map(Claims).ok()?;
    // The format pads with spaces; anything else behind the object is another format.
    json.end().ok()?;
    let tensors = claims
        .into_iter()
        .map(|claim| {
            let [start, end] = claim.data_offsets;
            let range = wanted.checked_add(start)?..wanted.checked_add(end)?;
            Some(Tensor { range, dtype: claim.dtype.0 })
        })
        .collect::<Option<Vec<_>>>()?;
    TensorMap::checked(tensors, wanted, file_len)
}

/// One value of the JSON object. Shapes are of no use here.
#[derive(serde::Deserialize)]
struct Claim {
    dtype: Stored,
    data_offsets: [u64; 2],
}

/// A data type by its name, without keeping the name.
struct Stored(Dtype);

impl<'de> serde::Deserialize<'de> for Stored {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl Visitor<'_> for Names {
            type Value = Stored;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a data type")
            }
            fn visit_str<E>(self, name: &str) -> Result<Stored, E> {
                Ok(Stored(match name {
                    "BF16" => Dtype::Bf16,
                    "F16" => Dtype::F16,
                    "F32" => Dtype::F32,
                    _ => Dtype::Other,
                }))
            }
        }
        deserializer.deserialize_str(Names)
    }
}

/// Whether a key names the one entry that is no tensor, without keeping the key.
struct IsMetadata(bool);

impl<'de> serde::Deserialize<'de> for IsMetadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Key;
        impl Visitor<'_> for Key {
            type Value = IsMetadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a tensor")
            }
            fn visit_str<E>(self, name: &str) -> Result<IsMetadata, E> {
                Ok(IsMetadata(name == "__metadata__"))
            }
        }
        deserializer.deserialize_str(Key)
    }
}

struct Claims;

impl<'de> Visitor<'de> for Claims {
    type Value = Vec<Claim>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<Claim>, A::Error> {
        let mut claims = Vec::new();
        while let Some(IsMetadata(metadata)) = map.next_key()? {
            if metadata {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if claims.len() == TENSORS_MAX {
                return Err(serde::de::Error::custom("too many tensors"));
            }
            claims.push(map.next_value()?);
        }
        Ok(claims)
    }
}

// ---- GGUF ---------------------------------------------------------------------------------------------------------------

const GGUF_MAGIC: &[u8] = b"GGUF";

/// Why a head gives no map.
enum Refusal {
    /// It ends before its tensors do.
    Short,
    /// It is not of this format, or not of a kind that is known here.
    Foreign,
}

/// Reads forward through a head; every step is checked against what is there.
struct Cursor<'a> {
    rest: &'a [u8],
    at: u64,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], Refusal> {
        // No head is longer than this, so that a step beyond it is not one that more bytes would help.
        if len > HEAD_BYTES_MAX {
            return Err(Refusal::Foreign);
        }
        let (taken, rest) = self.rest.split_at_checked(len as usize).ok_or(Refusal::Short)?;
        self.rest = rest;
        self.at += len;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, Refusal> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().expect("four bytes were taken")))
    }

    fn u64(&mut self) -> Result<u64, Refusal> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().expect("eight bytes were taken")))
    }

    fn string(&mut self) -> Result<&'a [u8], Refusal> {
        let len = self.u64()?;
        self.take(len)
    }

    /// Passes over a value of type `kind`; answers it if it is an unsigned 32-bit number.
    fn value(&mut self, kind: u32, nesting: u32) -> Result<Option<u32>, Refusal> {
        const U32: u32 = 4;
        const STRING: u32 = 8;
        const ARRAY: u32 = 9;
        match kind {
            U32 => return self.u32().map(Some),
            STRING => self.string().map(drop)?,
            ARRAY => {
                let (item, len) = (self.u32()?, self.u64()?);
                match scalar_bytes(item) {
                    Some(bytes) => self.take(len.checked_mul(bytes).ok_or(Refusal::Foreign)?).map(drop)?,
                    None if nesting == GGUF_NESTING_MAX => return Err(Refusal::Foreign),
                    // Each string or array takes bytes of its own, so that the head's length bounds the loop.
                    None => {
                        for _ in 0..len {
                            self.value(item, nesting + 1)?;
                        }
                    }
                }
            }
            _ => self.take(scalar_bytes(kind).ok_or(Refusal::Foreign)?).map(drop)?,
        }
        Ok(None)
    }
}

/// Bytes of a GGUF value type that has a fixed size.
fn scalar_bytes(kind: u32) -> Option<u64> {
    match kind {
        // u8, i8, bool
        0 | 1 | 7 => Some(1),
        // u16, i16
        2 | 3 => Some(2),
        // u32, i32, f32
        4..=6 => Some(4),
        // u64, i64, f64
        10..=12 => Some(8),
        _ => None,
    }
}

/// Values in a block, and bytes of a block, of a ggml type; `None` for types that are not known here.
fn ggml_block(kind: u32) -> Option<(u64, u64)> {
    Some(match kind {
        0 => (1, 4),         // F32
        1 | 30 => (1, 2),    // F16, BF16
        2 => (32, 18),       // Q4_0
        3 => (32, 20),       // Q4_1
        6 => (32, 22),       // Q5_0
        7 => (32, 24),       // Q5_1
        8 => (32, 34),       // Q8_0
        9 => (32, 36),       // Q8_1
        10 => (256, 84),     // Q2_K
        11 => (256, 110),    // Q3_K
        12 => (256, 144),    // Q4_K
        13 => (256, 176),    // Q5_K
        14 => (256, 210),    // Q6_K
        15 => (256, 292),    // Q8_K
        16 => (256, 66),     // IQ2_XXS
        17 => (256, 74),     // IQ2_XS
        18 => (256, 98),     // IQ3_XXS
        19 => (256, 50),     // IQ1_S
        20 => (32, 18),      // IQ4_NL
        21 => (256, 110),    // IQ3_S
        22 => (256, 82),     // IQ2_S
        23 => (256, 136),    // IQ4_XS
        24 => (1, 1),        // I8
        25 => (1, 2),        // I16
        26 => (1, 4),        // I32
        27 | 28 => (1, 8),   // I64, F64
        29 => (256, 56),     // IQ1_M
        31..=33 => (32, 18), // Q4_0 in three orders, gone since
        34 => (256, 54),     // TQ1_0
        35 => (256, 66),     // TQ2_0
        36..=38 => (32, 18), // IQ4_NL in three orders, gone since
        39 => (32, 17),      // MXFP4
        40 => (64, 36),      // NVFP4
        _ => return None,
    })
}

fn ggml_dtype(kind: u32) -> Dtype {
    match kind {
        0 => Dtype::F32,
        1 => Dtype::F16,
        30 => Dtype::Bf16,
        _ => Dtype::Other,
    }
}

fn parse_gguf(head: &[u8], file_len: u64) -> Result<TensorMap, Refusal> {
    let mut cursor = Cursor { rest: head, at: 0 };
    if cursor.take(4)? != GGUF_MAGIC || !matches!(cursor.u32()?, 2 | 3) {
        return Err(Refusal::Foreign);
    }
    let tensor_count = cursor.u64()?;
    let pair_count = cursor.u64()?;
    if tensor_count > TENSORS_MAX as u64 {
        return Err(Refusal::Foreign);
    }
    let mut alignment = GGUF_ALIGNMENT;
    for _ in 0..pair_count {
        let key = cursor.string()?;
        let kind = cursor.u32()?;
        let number = cursor.value(kind, 0)?;
        if key == b"general.alignment" {
            alignment = number.map(u64::from).ok_or(Refusal::Foreign)?;
        }
    }
    if alignment == 0 || !alignment.is_multiple_of(8) {
        return Err(Refusal::Foreign);
    }
    // Not sized by the claim: grown by what is really there.
    let mut claims: Vec<(u64, Option<u64>, Dtype)> = Vec::new();
    for _ in 0..tensor_count {
        cursor.string()?;
        let dimensions = cursor.u32()?;
        if dimensions > GGUF_DIMENSIONS_MAX {
            return Err(Refusal::Foreign);
        }
        let (mut row, mut values) = (1, 1_u64);
        for dimension in 0..dimensions {
            let len = cursor.u64()?;
            if dimension == 0 {
                row = len;
            }
            values = values.checked_mul(len).ok_or(Refusal::Foreign)?;
        }
        let kind = cursor.u32()?;
        let offset = cursor.u64()?;
        let bytes = match ggml_block(kind) {
            Some((block, _)) if !row.is_multiple_of(block) => return Err(Refusal::Foreign),
            Some((block, bytes)) => Some((values / block).checked_mul(bytes).ok_or(Refusal::Foreign)?),
            None => None,
        };
        claims.push((offset, bytes, ggml_dtype(kind)));
    }
    let data_start = cursor.at.next_multiple_of(alignment);
    claims.sort_by_key(|(offset, ..)| *offset);
    let next = claims.iter().skip(1).map(|(offset, ..)| data_start.checked_add(*offset)).chain([Some(file_len)]);
    let tensors = claims
        .iter()
        .zip(next)
        .map(|((offset, bytes, dtype), next)| {
            let start = data_start.checked_add(*offset)?;
            // A type of a later day: up to where the next tensor begins.
            let end = bytes.map_or(next, |bytes| start.checked_add(bytes))?;
            Some(Tensor { range: start..end, dtype: *dtype })
        })
        .collect::<Option<Vec<_>>>()
        .ok_or(Refusal::Foreign)?;
    TensorMap::checked(tensors, data_start, file_len).ok_or(Refusal::Foreign)
}

#[cfg(test)]
mod tests {
    use super::*;

    // ---- writing heads --------------------------------------------------------------------------------------------------

    fn safetensors(json: &str) -> Vec<u8> {
        let mut head = (json.len() as u64).to_le_bytes().to_vec();
        head.extend(json.as_bytes());
        head
    }

    #[derive(Default)]
    struct Gguf {
        pairs: Vec<Vec<u8>>,
        tensors: Vec<Vec<u8>>,
    }

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    impl Gguf {
        fn pair(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
            self.pairs.push([&string(key), &kind.to_le_bytes()[..], value].concat());
            self
        }

        fn tensor(mut self, shape: &[u64], kind: u32, offset: u64) -> Self {
            let name = string(&format!("blk.{}.weight", self.tensors.len()));
            let shape_bytes: Vec<u8> = shape.iter().flat_map(|len| len.to_le_bytes()).collect();
            let parts = [
                &name[..],
                &(shape.len() as u32).to_le_bytes(),
                &shape_bytes,
                &kind.to_le_bytes(),
                &offset.to_le_bytes(),
            ];
            self.tensors.push(parts.concat());
            self
        }

        fn head(&self, version: u32) -> Vec<u8> {
            let counts = [self.tensors.len() as u64, self.pairs.len() as u64].map(u64::to_le_bytes).concat();
            let parts = [GGUF_MAGIC, &version.to_le_bytes(), &counts, &self.pairs.concat(), &self.tensors.concat()];
            parts.concat()
        }
    }

    fn ranges(map: &TensorMap) -> Vec<(u64, u64, Dtype)> {
        let base = map.data_start();
        map.tensors().iter().map(|t| (t.range.start - base, t.range.end - base, t.dtype)).collect()
    }

    // ---- vectors --------------------------------------------------------------------------------------------------------

    #[test]
    fn a_safetensors_head_tells_every_tensor_in_order() {
        let head = safetensors(
            r#"{"__metadata__":{"format":"pt","dtype":"x"},"b":{"dtype":"F16","shape":[2,3],"data_offsets":[8,20]},
                "a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]},"e":{"dtype":"F32","shape":[0],"data_offsets":[8,8]},
                "c":{"dtype":"F32","shape":[1],"data_offsets":[20,24]},
                "d":{"dtype":"F8_E4M3","shape":[5],"data_offsets":[24,29]}}   "#,
        );
        let file_len = head.len() as u64 + 29;
        assert_eq!(TensorMap::head_len_wanted(&head[..8], file_len), Some(head.len() as u64));
        let map = TensorMap::parse(&head, file_len).expect("a good head");
        assert_eq!(map.data_start(), head.len() as u64);
        let wanted = [(0, 8, Dtype::Bf16), (8, 20, Dtype::F16), (20, 24, Dtype::F32), (24, 29, Dtype::Other)];
        assert_eq!(ranges(&map), wanted);
        // What follows the head is data, whatever it looks like.
        assert_eq!(TensorMap::parse(&[head.clone(), b"}{".to_vec()].concat(), file_len), Some(map));
    }

    #[test]
    fn a_gguf_head_of_either_version_tells_every_tensor() {
        let strings = [&8_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &string("a"), &string("")].concat();
        let nested =
            [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &0_u32.to_le_bytes(), &3_u64.to_le_bytes(), b"xyz"]
                .concat();
        for version in [2, 3] {
            let head = Gguf::default()
                .pair("general.architecture", 8, &string("llama"))
                .pair("tokenizer.ggml.tokens", 9, &strings)
                .pair("nested", 9, &nested)
                .pair("flag", 7, &[1])
                .pair("theta", 12, &1.5_f64.to_le_bytes())
                .pair("general.alignment", 4, &64_u32.to_le_bytes())
                .tensor(&[256, 2], 12, 0)
                .tensor(&[10], 0, 320)
                .tensor(&[64, 3, 2], 30, 384)
                .tensor(&[32], 8, 1152)
                // Of a type that nobody knows yet, and in front of one that is known.
                .tensor(&[7], 4_000, 1216)
                .tensor(&[4], 1, 1280)
                .head(version);
            let data_start = (head.len() as u64).next_multiple_of(64);
            let map = TensorMap::parse(&head, data_start + 1288).expect("a good head");
            assert_eq!(map.data_start(), data_start);
            let wanted = [
                (0, 288, Dtype::Other),
                (320, 360, Dtype::F32),
                (384, 1152, Dtype::Bf16),
                (1152, 1186, Dtype::Other),
                (1216, 1280, Dtype::Other),
                (1280, 1288, Dtype::F16),
            ];
            assert_eq!(ranges(&map), wanted, "version {version}");
        }
    }

    #[test]
    fn more_of_a_gguf_head_is_asked_for_until_it_is_whole() {
        let tokens = string(&"t".repeat(3 << 20));
        let head = Gguf::default().pair("tokens", 8, &tokens).tensor(&[8], 0, 0).head(3);
        let data_start = (head.len() as u64).next_multiple_of(32);
        let file = [head, vec![0; 64]].concat();
        let file_len = data_start + 32;
        let mut have = 8;
        let mut asked = Vec::new();
        while let Some(wanted) = TensorMap::head_len_wanted(&file[..have], file_len)
            && wanted > have as u64
        {
            asked.push(wanted);
            have = wanted as usize;
        }
        assert_eq!(asked, [1 << 20, 2 << 20, file_len]);
        assert_eq!(TensorMap::parse(&file[..have], file_len).expect("whole").tensors().len(), 1);
        assert_eq!(TensorMap::head_len_wanted(&file[..100], 100), None, "a head longer than its file");
    }

    #[test]
    fn other_formats_are_refused() {
        let zip = b"PK\x03\x04\x14\x00\x08\x08\x08\x00\x00\x00\x00\x00\x00\x00";
        let onnx = b"\x08\x07\x12\x07pytorch\x1a\x051.9:";
        for head in
            [&zip[..], onnx, b"\x7fELF\x02\x01\x01\x00\x00", b"{\"a\": 1, \"b\": 2}", &[0; 64], b"GGUF\x01\0\0\0"]
        {
            assert_eq!(TensorMap::parse(head, 1 << 40), None, "{head:?}");
            assert_eq!(TensorMap::head_len_wanted(head, 1 << 30), None, "{head:?}");
        }
        assert_eq!(TensorMap::head_len_wanted(b"", 7), None);
        assert_eq!(TensorMap::head_len_wanted(b"abc", 8), Some(8));
    }

    #[test]
    fn a_safetensors_head_that_contradicts_itself_is_refused() {
        let tensor = |offsets: &str| format!(r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}}}"#);
        let refused = [
            ("past the end", tensor("[0,101]")),
            ("backwards", tensor("[8,4]")),
            ("beyond 64 bits", tensor("[18446744073709551615,18446744073709551616]")),
            ("an overflow", tensor("[18446744073709551600,18446744073709551610]")),
            ("negative", tensor("[-4,4]")),
            ("one offset", tensor("[4]")),
            ("no offsets", r#"{"a":{"dtype":"F32","shape":[1]}}"#.to_owned()),
            ("no type", r#"{"a":{"shape":[1],"data_offsets":[0,4]}}"#.to_owned()),
            (
                "an overlap",
                r#"{"a":{"dtype":"F32","data_offsets":[0,8]},"b":{"dtype":"F32","data_offsets":[4,12]}}"#.to_owned(),
            ),
            ("no object", "[]".to_owned()),
            ("cut short", r#"{"a":{"dtype":"F32""#.to_owned()),
            ("a tail", format!("{} x", tensor("[0,4]"))),
            ("depth", format!(r#"{{"a":{}"#, "[".repeat(100_000))),
        ];
        for (what, json) in refused {
            let head = safetensors(&json);
            assert_eq!(TensorMap::parse(&head, head.len() as u64 + 100), None, "{what}");
        }
        let head = safetensors(&tensor("[0,100]"));
        assert!(TensorMap::parse(&head, head.len() as u64 + 100).is_some());
        assert_eq!(TensorMap::parse(&head[..head.len() - 1], head.len() as u64 + 100), None, "a short head");
        let mut huge = safetensors("{}");
        huge[..8].copy_from_slice(&(HEAD_BYTES_MAX).to_le_bytes());
        assert_eq!(TensorMap::head_len_wanted(&huge, u64::MAX), None, "a head beyond the limit");
    }

    #[test]
    fn a_gguf_head_that_contradicts_itself_is_refused() {
        let good = || Gguf::default().tensor(&[8], 0, 0);
        let alignment = |value: u32| good().pair("general.alignment", 4, &value.to_le_bytes());
        let endless = [&9_u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        let deep: Vec<u8> = (0..10).flat_map(|_| [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat()).collect();
        let refused = [
            ("no alignment", alignment(0)),
            ("an odd alignment", alignment(12)),
            ("an alignment of another type", good().pair("general.alignment", 10, &[0; 8])),
            ("an unknown value", good().pair("k", 13, &[0; 8])),
            ("a long string", good().pair("k", 8, &u64::MAX.to_le_bytes())),
            ("a long array", good().pair("k", 9, &[&5_u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat())),
            ("deep arrays", good().pair("k", 9, &deep)),
            ("a long array of arrays", good().pair("k", 9, &endless)),
            ("too many dimensions", Gguf::default().tensor(&[1; 9], 0, 0)),
            ("an overflow of values", Gguf::default().tensor(&[1 << 40, 1 << 40], 0, 0)),
            ("an overflow of bytes", Gguf::default().tensor(&[1 << 63], 0, 0)),
            ("a part of a block", Gguf::default().tensor(&[33], 2, 0)),
            ("past the end", Gguf::default().tensor(&[8], 0, 1 << 20)),
            ("an offset beyond 64 bits", Gguf::default().tensor(&[8], 0, u64::MAX - 8)),
            ("an overlap", good().tensor(&[8], 0, 16)),
        ];
        for (what, gguf) in refused {
            let head = gguf.head(3);
            assert_eq!(TensorMap::parse(&head, head.len() as u64 + 1000), None, "{what}");
        }
        let head = good().head(3);
        assert!(TensorMap::parse(&head, head.len() as u64 + 1000).is_some());
        let mut many = head.clone();
        many[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(TensorMap::head_len_wanted(&many, 1 << 40), None, "too many tensors");
    }

    #[test]
    fn the_dominant_tensor_covers_most_of_a_range() {
        let head = safetensors(
            r#"{"a":{"dtype":"BF16","data_offsets":[0,100]},"b":{"dtype":"F32","data_offsets":[100,110]},
                "c":{"dtype":"F16","data_offsets":[200,300]}}"#,
        );
        let map = TensorMap::parse(&head, head.len() as u64 + 300).expect("a good head");
        let base = map.data_start();
        let dominant = |range: Range<u64>| map.dominant(base + range.start..base + range.end).map(|t| t.dtype);
        assert_eq!(dominant(0..50), Some(Dtype::Bf16));
        assert_eq!(dominant(95..110), Some(Dtype::F32));
        assert_eq!(dominant(95..105), Some(Dtype::Bf16), "the first of equals");
        assert_eq!(dominant(110..200), None, "a gap");
        assert_eq!(dominant(105..300), Some(Dtype::F16));
        assert_eq!(dominant(300..400), None);
        assert_eq!(map.dominant(0..8), None, "the head is no tensor");
        assert_eq!(map.within(base + 99..base + 201).len(), 3);
    }

    // ---- property -------------------------------------------------------------------------------------------------------

    /// splitmix64.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }

        fn below(&mut self, bound: u64) -> u64 {
            self.next() % bound
        }
    }

    fn random_head(random: &mut Random) -> (Vec<u8>, u64, Vec<(u64, u64, Dtype)>) {
        let count = random.below(12);
        let mut at = 0_u64;
        let mut wanted = Vec::new();
        let mut gguf = Gguf::default().pair("name", 8, &string("m")).pair("n", 10, &[0; 8]);
        let mut entries = vec![r#""__metadata__":{"a":"{}"}"#.to_owned()];
        let is_gguf = random.below(2) == 0;
        for i in 0..count {
            at = if is_gguf { at.next_multiple_of(32) } else { at };
            let (name, kind, dtype, bytes) = [
                ("BF16", 30, Dtype::Bf16, 2),
                ("F16", 1, Dtype::F16, 2),
                ("F32", 0, Dtype::F32, 4),
                ("I64", 27, Dtype::Other, 8),
            ][random.below(4) as usize];
            let shape = [random.below(9), 1 + random.below(5)];
            let end = at + shape[0] * shape[1] * bytes;
            gguf = gguf.tensor(&shape, kind, at);
            entries.push(format!(r#""t{i}":{{"shape":{shape:?},"data_offsets":[{at},{end}],"dtype":"{name}"}}"#));
            if at != end {
                wanted.push((at, end, dtype));
            }
            at = end;
        }
        // The order of a JSON object means nothing.
        let turn = random.below(entries.len() as u64) as usize;
        entries.rotate_left(turn);
        let head = if is_gguf { gguf.head(3) } else { safetensors(&format!("{{{}}}", entries.join(","))) };
        let data_start = if is_gguf { (head.len() as u64).next_multiple_of(32) } else { head.len() as u64 };
        (head, data_start + at, wanted)
    }

    #[test]
    fn any_head_gives_its_tensors_and_any_edit_of_it_a_sound_map_or_none() {
        let from_env = std::env::var("MODELFS_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let seed = from_env.unwrap_or(clock.as_nanos() as u64);
        println!("MODELFS_TEST_SEED={seed}");
        let mut random = Random(seed);
        let (mut still_good, mut refused) = (0, 0);
        for case in 0..20_000 {
            let (mut head, file_len, wanted) = random_head(&mut random);
            let map = TensorMap::parse(&head, file_len).expect("a good head");
            assert_eq!(ranges(&map), wanted, "case {case}");
            assert!(TensorMap::head_len_wanted(&head, file_len).is_some_and(|n| n <= head.len() as u64));
            for _ in 0..=random.below(3) {
                let at = random.below(head.len() as u64) as usize;
                match random.below(4) {
                    0 => head[at] ^= 1 << random.below(8),
                    1 => head[at] = [0xff, 0, b'"', b'9', b'}', b'['][random.below(6) as usize],
                    2 => head.truncate(at.max(1)),
                    _ => head.insert(at, random.next() as u8),
                }
            }
            if let Some(wanted) = TensorMap::head_len_wanted(&head, file_len) {
                assert!(wanted <= HEAD_BYTES_MAX.min(file_len), "case {case}");
            }
            let Some(map) = TensorMap::parse(&head, file_len) else {
                refused += 1;
                continue;
            };
            still_good += 1;
            assert!(map.data_start() <= file_len);
            assert!(
                map.tensors().iter().all(|t| t.range.start < t.range.end && t.range.end <= file_len),
                "case {case}"
            );
            assert!(map.tensors().windows(2).all(|p| p[0].range.end <= p[1].range.start), "case {case}");
        }
        assert!(still_good > 100 && refused > 100, "the edits prove nothing: {still_good} good, {refused} refused");
    }
}
