//! What a file is, told from its bytes first and from its name and size last.
//!
//! In: a name and a [`Probe`] (hostile). Out: a [`Seen`]: weights in a format, a container to look into, something that is
//! known not to be weights, or nothing known.
//! Promises: total; only the head is read, of which a format asks as much as it needs and never more than
//! [`HEAD_BYTES_MAX`]; a format is `Certain` only when its structure holds, not for a magic number alone.
//! Not here: archives (`tar`, `zip`), what is told of a finding (`mod`).
//! Held by: the tests of each format, which hold near misses too; tests/scan.rs with files made by others' writers in
//! tests/scan.sh.

mod hdf5;
mod names;
mod numpy;
mod pickle;
mod protobuf;
mod tensorflow;

use std::io;

use super::source::{Packing, Probe, Trouble};
use super::{Confidence, Format, tar};
use crate::tensors::TensorMap;

pub(super) use names::is_model_config;

/// The longest head that is read of one file: the JSON of a safetensors file of ten thousand tensors is a megabyte.
const HEAD_BYTES_MAX: usize = 8 << 20;

/// What is looked at first. Nearly every file needs no more.
const HEAD_BYTES_FIRST: usize = 4 << 10;

/// Formats that tell themselves within their first records.
const HEAD_BYTES_MORE: usize = 64 << 10;

/// Below this no name makes a file of unknown content a finding.
const NAMED_BYTES_MIN: u64 = 1 << 20;

/// From here on a file that nothing explains and that looks like noise is told of.
const OPAQUE_BYTES_MIN: u64 = 64 << 20;

/// What a file was seen to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Weights(Verdict),
    Container(Container),
    /// Packed in a way that is not unpacked here.
    Closed(&'static str),
    /// Known, and no weights.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    Tar,
    Zip,
    Packed(Packing),
}

/// One format's look at a file: its name in lower case, its content.
type Look = fn(&[u8], &mut Probe) -> io::Result<Option<Seen>>;

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub format: Format,
    pub confidence: Confidence,
    pub why: String,
    /// Only if a model's configuration lies in the same folder.
    pub beside_config: bool,
}

impl Verdict {
    fn seen(format: Format, confidence: Confidence, why: impl Into<String>) -> Seen {
        Seen::Weights(Verdict { format, confidence, why: why.into(), beside_config: false })
    }
    fn certain(format: Format, why: impl Into<String>) -> Seen {
        Verdict::seen(format, Confidence::Certain, why)
    }
}

/// Looks at one file. `min` is the size below which nothing is a finding.
///
/// # Errors
/// The source's; a head that is no format's is not an error.
pub(super) fn look(path: &[u8], probe: &mut Probe, min: u64) -> io::Result<Seen> {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
    let head = probe.head(HEAD_BYTES_FIRST)?;
    let Some(first) = head.first_chunk::<4>().copied() else { return Ok(Seen::Other) };
    match first {
        [0x1f, 0x8b, 8, _] => return Ok(Seen::Container(Container::Packed(Packing::Gzip))),
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            return Ok(Seen::Container(Container::Packed(Packing::Zstd)));
        }
        [0xfd, b'7', b'z', b'X'] => return Ok(Seen::Closed("xz")),
        [b'B', b'Z', b'h', _] => return Ok(Seen::Closed("bzip2")),
        [0x04, 0x22, 0x4d, 0x18] => return Ok(Seen::Closed("lz4")),
        _ => {}
    }
    if tar::is_header(head) {
        return Ok(Seen::Container(Container::Tar));
    }
    if head.starts_with(b"MFS1") {
        return Ok(sealed(head));
    }
    // Too small to be weights, and too small to be worth the walks below.
    if probe.known_len().is_some_and(|len| len < min) {
        return Ok(Seen::Other);
    }
    if first == *b"PK\x03\x04" {
        return zip(name, probe);
    }
    let formats: [Look; 9] = [
        safetensors,
        ggml,
        tflite,
        tensorrt,
        numpy::look,
        hdf5::look,
        pickle::look,
        protobuf::look,
        tensorflow::checkpoint_index,
    ];
    for format in formats {
        if let Some(seen) = format(name, probe)? {
            // A length that only reading tells is read for findings alone. What breaks on the way is what its head says.
            let small = match probe.measure().map_err(|e| (Trouble::of(&e), e)) {
                Ok(len) => len < min,
                Err((Trouble::Broken(_), _)) => false,
                Err((_, e)) => return Err(e),
            };
            return Ok(if small { Seen::Other } else { seen });
        }
    }
    by_name(path, probe, min)
}

/// modelfs's own objects: ciphertext, by their clear headers.
fn sealed(head: &[u8]) -> Seen {
    let known: [&[u8]; 6] = [b"MFS1DATA", b"MFS1SLOT", b"MFS1REF\0", b"MFS1SIGN", b"MFS1LEAS", b"MFS1MANI"];
    match known.iter().any(|magic| head.starts_with(magic)) {
        true => Verdict::seen(Format::Sealed, Confidence::Info, "sealed by modelfs: no plaintext"),
        false => Seen::Other,
    }
}

// ---- safetensors --------------------------------------------------------------------------------------------------------

fn safetensors(_: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    let len = probe.known_len();
    let head = probe.head(16)?;
    let Some(first) = head.first_chunk::<8>() else { return Ok(None) };
    let json_len = u64::from_le_bytes(*first);
    if head.get(8) != Some(&b'{') || !(2..=crate::tensors::HEAD_BYTES_MAX).contains(&json_len) {
        return Ok(None);
    }
    let wanted = usize::try_from(json_len).map_or(HEAD_BYTES_MAX, |len| len + 8).min(HEAD_BYTES_MAX);
    let head = probe.head(wanted)?;
    if let Some(map) = TensorMap::parse(head, len.unwrap_or(u64::MAX)) {
        let count = map.tensors().len();
        return Ok((count > 0).then(|| Verdict::certain(Format::Safetensors, format!("a header of {count} tensors"))));
    }
    // Cut short, or with a header longer than is read: its first tensor tells.
    Ok(first_tensor(&head[8..])
        .then(|| Verdict::certain(Format::Safetensors, "a header of tensors; the file is cut or its header very long")))
}

/// Whether JSON that may be cut anywhere holds an entry as safetensors writes them, whose size fits its type and shape.
fn first_tensor(json: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Entry<'a> {
        dtype: &'a str,
        shape: Vec<u64>,
        data_offsets: [u64; 2],
    }
    const KEY: &[u8] = b"\"data_offsets\"";
    let Some(at) = json.windows(KEY.len()).position(|window| window == KEY) else { return false };
    let Some(start) = json[..at].iter().rposition(|byte| *byte == b'{') else { return false };
    let Some(end) = json[at..].iter().position(|byte| *byte == b'}') else { return false };
    let Ok(entry) = serde_json::from_slice::<Entry>(&json[start..=at + end]) else { return false };
    let bits: u64 = match entry.dtype {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" | "U32" => 32,
        "BF16" | "F16" | "I16" | "U16" => 16,
        "BOOL" | "I8" | "U8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 8,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => return false,
    };
    let values = entry.shape.iter().try_fold(1_u64, |all, n| all.checked_mul(*n));
    let [from, to] = entry.data_offsets;
    let told = to.checked_sub(from).and_then(|bytes| bytes.checked_mul(8));
    told.is_some() && values.and_then(|values| values.checked_mul(bits)) == told
}

// ---- llama.cpp ----------------------------------------------------------------------------------------------------------

fn ggml(_: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    let head = probe.head(HEAD_BYTES_FIRST)?;
    let u32_at = |at: usize| head.get(at..at + 4).map(|four| u32::from_le_bytes(four.try_into().expect("four bytes")));
    let u64_at = |at: usize| head.get(at..at + 8).map(|eight| u64::from_le_bytes(eight.try_into().expect("eight")));
    if head.starts_with(b"GGUF") {
        let little = u32_at(4).is_some_and(|version| (1..=99).contains(&version));
        let swap32 = |n: u32| if little { n } else { n.swap_bytes() };
        let swap64 = |n: u64| if little { n } else { n.swap_bytes() };
        let Some(version) = u32_at(4).map(swap32).filter(|version| (1..=99).contains(version)) else { return Ok(None) };
        let (tensors, pairs, first) = match version {
            1 => (u32_at(8).map(swap32).map(u64::from), u32_at(12).map(swap32).map(u64::from), 16),
            _ => (u64_at(8).map(swap64), u64_at(16).map(swap64), 24),
        };
        let (Some(tensors), Some(pairs)) = (tensors, pairs) else { return Ok(None) };
        let text = |len: Option<u64>, at: usize| {
            let len = usize::try_from(len.filter(|len| (1..=1024).contains(len))?).ok()?;
            head.get(at..at + len).filter(|key| key.iter().all(|byte| (0x20..0x7f).contains(byte)))
        };
        let key = match version {
            1 => text(u32_at(first).map(swap32).map(u64::from), first + 4),
            _ => text(u64_at(first).map(swap64), first + 8),
        };
        let sound = tensors <= 1 << 24 && pairs <= 1 << 24 && (tensors > 0 || pairs > 0) && key.is_some();
        return Ok(sound.then(|| {
            Verdict::certain(
                Format::Gguf,
                format!("GGUF version {version}, {tensors} tensors, {pairs} values of metadata"),
            )
        }));
    }
    // Numbers of a vocabulary, a width, heads, layers: small, and none of them zero.
    let sizes =
        |from: usize, count: usize| (0..count).all(|i| u32_at(from + 4 * i).is_some_and(|n| n > 0 && n < 1 << 24));
    let versioned = |range: std::ops::RangeInclusive<u32>| u32_at(4).is_some_and(|version| range.contains(&version));
    let name = match head.first_chunk::<4>() {
        Some(b"lmgg") if sizes(4, 4) => "ggml",
        Some(b"fmgg") if versioned(1..=3) && sizes(8, 4) => "ggmf",
        Some(b"tjgg") if versioned(1..=3) && sizes(8, 4) => "ggjt",
        Some(b"algg") if versioned(1..=2) && sizes(8, 2) => "ggla",
        _ => return Ok(None),
    };
    Ok(Some(Verdict::certain(Format::Ggml, format!("a {name} header with a model's sizes"))))
}

// ---- TensorFlow Lite, TensorRT ------------------------------------------------------------------------------------------

/// A FlatBuffer named TFL3: its root must lead to a table whose own table of fields lies in the file and is one.
fn tflite(_: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    if probe.head(8)?.get(4..8) != Some(b"TFL3") {
        return Ok(None);
    }
    let len = probe.known_len();
    // The builder writes from the end to the start: the root lies near the start, whatever the model's size.
    let head = probe.head(HEAD_BYTES_MORE)?;
    let u16_at = |at: usize| head.get(at..at + 2).map(|two| u16::from_le_bytes([two[0], two[1]]));
    let i32_at = |at: usize| head.get(at..at + 4).map(|four| i32::from_le_bytes(four.try_into().expect("four bytes")));
    let u32_at = |at: usize| head.get(at..at + 4).map(|four| u32::from_le_bytes(four.try_into().expect("four bytes")));
    let Some(root) = u32_at(0) else { return Ok(None) };
    if root < 8 || len.is_some_and(|len| u64::from(root) + 4 > len) {
        return Ok(None);
    }
    let table = i32_at(root as usize).and_then(|back| i64::from(root).checked_sub(i64::from(back)));
    let Some(table) = table.and_then(|at| usize::try_from(at).ok()) else { return Ok(None) };
    let fields = u16_at(table).filter(|bytes| (6..=64).contains(bytes) && bytes.is_multiple_of(2));
    let size = u16_at(table + 2).filter(|bytes| (4..=256).contains(bytes));
    let version = u16_at(table + 4).filter(|at| *at >= 4).and_then(|at| u32_at(root as usize + usize::from(at)));
    let sound = fields.is_some() && size.is_some() && version == Some(3);
    Ok(sound.then(|| Verdict::certain(Format::Tflite, "a TensorFlow Lite model, schema version 3")))
}

fn tensorrt(name: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    let head = probe.head(HEAD_BYTES_FIRST)?;
    // Two marks, by version.
    if !(head.starts_with(b"ptrt") || head.starts_with(b"ftrt")) || head.len() < 64 || is_text(head) {
        return Ok(None);
    }
    let named = [&b".engine"[..], b".plan", b".trt", b".mytrtfile"].iter().any(|end| name.ends_with(end));
    // What follows the magic differs by version and is not published: zeros of sizes and versions are all that is common.
    let binary = head[4..64].iter().filter(|byte| **byte == 0).count() >= 8;
    Ok(match (named, binary) {
        (_, true) => Some(Verdict::certain(Format::Tensorrt, "a serialized TensorRT engine")),
        (true, false) => {
            Some(Verdict::seen(Format::Tensorrt, Confidence::Likely, "TensorRT's magic and an engine's name"))
        }
        (false, false) => None,
    })
}

// ---- zip ----------------------------------------------------------------------------------------------------------------

/// Formats that are zip archives, by the names in the first of their headers.
fn zip(name: &[u8], probe: &mut Probe) -> io::Result<Seen> {
    // PyTorch pads so that each tensor lies at a multiple of 64: of its first names some are always near.
    let head = probe.head(HEAD_BYTES_MORE)?;
    let names = zip_names(head);
    // A writer puts everything below one folder. Other names are those of an archive that lies in this one, stored.
    let folder =
        names.first().and_then(|name| name.iter().position(|byte| *byte == b'/').map(|at| name[..=at].to_vec()));
    let below = |name: &Vec<u8>| name.strip_prefix(folder.as_deref()?).map(<[u8]>::to_vec);
    let inner: Vec<Vec<u8>> = names.iter().filter_map(below).collect();
    let is_tensor = |name: &[u8]| {
        name.strip_prefix(b"data/")
            .or_else(|| name.strip_prefix(b"constants/"))
            .is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
    };
    let pickle = inner.iter().any(|name| name == b"data.pkl");
    let tensors = inner.iter().any(|name| is_tensor(name));
    let versions = [&b"version"[..], b"byteorder", b".format_version", b".data/serialization_id", b"constants.pkl"];
    let versioned = inner.iter().any(|name| versions.contains(&name.as_slice()));
    // PyTorch's own padding: an extra field FB of Zs in the first header.
    let padded = head.get(30..).is_some_and(|rest| {
        let at = usize::from(u16::from_le_bytes([head[26], head[27]]));
        rest.get(at..at + 2) == Some(b"FB")
    });
    if (pickle || tensors) && [pickle, tensors, versioned, padded].iter().filter(|seen| **seen).count() >= 2 {
        return Ok(Verdict::certain(Format::Pytorch, "a PyTorch archive: data.pkl and its tensors"));
    }
    if folder.is_none() && names.iter().any(|name| name == b"model.weights.h5" || name == b"model.weights.npz") {
        return Ok(Verdict::certain(Format::Keras, "a Keras archive: model.weights"));
    }
    if name.ends_with(b".keras") && names.iter().any(|name| name == b"metadata.json" || name == b"config.json") {
        return Ok(Verdict::certain(Format::Keras, "a Keras archive: its configuration and its name"));
    }
    let arrays = names.iter().filter(|name| name.ends_with(b".npy")).count();
    if arrays > 0 && arrays == names.len() {
        let large = probe.measure()? >= NAMED_BYTES_MIN;
        return Ok(match large {
            true => Verdict::seen(Format::Numpy, Confidence::Likely, "an archive of NumPy arrays of at least 1 MiB"),
            false => Seen::Other,
        });
    }
    Ok(Seen::Container(Container::Zip))
}

/// The names in the local headers that begin within `head`.
fn zip_names(head: &[u8]) -> Vec<Vec<u8>> {
    const LOCAL: &[u8] = b"PK\x03\x04";
    let mut names = Vec::new();
    let mut at = 0;
    while let Some(found) = head.get(at..).and_then(|rest| rest.windows(4).position(|four| four == LOCAL)) {
        at += found;
        let Some(fixed) = head.get(at..at + 30) else { break };
        let len = usize::from(u16::from_le_bytes([fixed[26], fixed[27]]));
        if let Some(name) = head.get(at + 30..at + 30 + len) {
            names.push(name.to_vec());
        }
        at += 4;
    }
    names
}

// ---- by name and size ---------------------------------------------------------------------------------------------------

fn by_name(path: &[u8], probe: &mut Probe, min: u64) -> io::Result<Seen> {
    let head = probe.head(HEAD_BYTES_FIRST)?;
    if is_known_other(head) || is_text(head) {
        return Ok(Seen::Other);
    }
    let noise = is_noise(head);
    let Some(named) = names::look(path) else {
        // An unknown length is not read for a hint.
        let large = probe.known_len().is_some_and(|len| len >= OPAQUE_BYTES_MIN);
        return Ok(match large && noise {
            true => Verdict::seen(
                Format::Opaque,
                Confidence::Info,
                "a large file of unknown content without structure: packed, encrypted, or bare numbers",
            ),
            false => Seen::Other,
        });
    };
    let len = probe.measure()?;
    if len < NAMED_BYTES_MIN.max(min) {
        return Ok(Seen::Other);
    }
    Ok(Seen::Weights(Verdict {
        format: named.format,
        confidence: Confidence::Likely,
        why: format!("{}, and binary content of {len} bytes", named.why),
        beside_config: named.beside_config,
    }))
}

/// Beginnings of formats that hold no weights, whatever the file is called.
fn is_known_other(head: &[u8]) -> bool {
    let known: &[&[u8]] = &[
        b"\x7fELF",
        b"MZ",
        b"!<arch>\n",
        b"\x89PNG",
        b"\xff\xd8\xff",
        b"GIF8",
        b"%PDF",
        b"RIFF",
        b"OggS",
        b"ID3",
        b"fLaC",
        b"SQLite format 3\0",
        b"KSLPHHRH",
        b"\xca\xfe\xba\xbe",
        b"\xde\x12\x04\x95",
        b"\0asm",
        b"wOF",
        b"\0\x01\0\0\0",
        b"OTTO",
        b"PK\x05\x06",
        b"\x1f\x9d",
        b"#!",
        b"hsqs",
        b"LUKS\xba\xbe",
        b"TZif",
    ];
    known.iter().any(|magic| head.starts_with(magic))
}

/// Whether a head reads as text: what people write holds no control bytes but line ends and tabs.
fn is_text(head: &[u8]) -> bool {
    !head.iter().any(|byte| matches!(byte, 0..=8 | 14..=26 | 28..=31)) && {
        // The last letter may be cut.
        match std::str::from_utf8(head) {
            Ok(_) => true,
            Err(e) => e.valid_up_to() + 4 > head.len(),
        }
    }
}

/// Whether all values of a byte are about as frequent: what is packed, encrypted or the low half of floats looks so.
fn is_noise(head: &[u8]) -> bool {
    if head.len() < 2048 {
        return false;
    }
    let mut counts = [0_u32; 256];
    for byte in head {
        counts[usize::from(*byte)] += 1;
    }
    let len = head.len() as f64;
    let entropy: f64 = counts.iter().filter(|n| **n > 0).map(|n| f64::from(*n) / len).map(|p| -p * p.log2()).sum();
    // Of 4 KiB even true noise reaches no more than 7.95.
    entropy > 7.0
}

#[cfg(test)]
mod tests {
    use super::super::source::Memory;
    use super::*;

    pub(super) fn seen(name: &str, bytes: &[u8]) -> Seen {
        let mut memory = Memory(bytes);
        look(name.as_bytes(), &mut Probe::new(&mut memory), 0).expect("memory reads")
    }

    #[track_caller]
    pub(super) fn is(name: &str, bytes: &[u8], format: Format, confidence: Confidence) {
        match seen(name, bytes) {
            Seen::Weights(verdict) => assert_eq!((verdict.format, verdict.confidence), (format, confidence), "{name}"),
            other => panic!("{name}: {other:?}"),
        }
    }

    #[track_caller]
    pub(super) fn is_not(name: &str, bytes: &[u8]) {
        assert_eq!(seen(name, bytes), Seen::Other, "{name}");
    }

    fn safetensors(json: &str) -> Vec<u8> {
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[1; 4000]].concat()
    }

    #[test]
    fn safetensors_are_known_whole_and_cut_and_json_that_is_none_is_not() {
        let json = r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[10,100],"data_offsets":[0,4000]}}"#;
        let whole = safetensors(json);
        is("w", &whole, Format::Safetensors, Confidence::Certain);
        is("cut", &whole[..1000], Format::Safetensors, Confidence::Certain);
        let mut long = (50_000_000_u64).to_le_bytes().to_vec();
        long.extend_from_slice(json.as_bytes());
        is("a header that is cut", &long, Format::Safetensors, Confidence::Certain);
        is_not("no tensor", &safetensors(r#"{"__metadata__":{"format":"pt"}}"#));
        is_not("other JSON", &safetensors(r#"{"w":{"type":"F32","shape":[10,100],"offsets":[0,4000]}}"#));
        is_not("a type that is none", &safetensors(&json.replace("F32", "XYZ"))[..1000]);
        is_not("a size that does not fit", &safetensors(&json.replace("4000]", "9000]")));
        is_not("no length", &[&[0xff; 8][..], json.as_bytes()].concat());
    }

    #[test]
    fn gguf_and_its_forerunners_are_known_by_their_headers() {
        let gguf = |version: u32, tensors: u64, key: &[u8]| {
            let mut out = b"GGUF".to_vec();
            out.extend(version.to_le_bytes());
            out.extend(tensors.to_le_bytes());
            out.extend(3_u64.to_le_bytes());
            out.extend((key.len() as u64).to_le_bytes());
            out.extend(key);
            out.resize(4096, 1);
            out
        };
        is("m", &gguf(3, 291, b"general.architecture"), Format::Gguf, Confidence::Certain);
        is_not("no version", &gguf(0, 291, b"general.architecture"));
        is_not("too many tensors", &gguf(3, u64::MAX, b"general.architecture"));
        is_not("a key that is none", &gguf(3, 1, b"\x01\x02\x03"));
        is_not("text", b"GGUF is a format for weights, described elsewhere. It begins with four letters.");
        let numbers = |magic: &[u8; 4], numbers: &[u32]| {
            let mut out = magic.to_vec();
            out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
            out.resize(4096, 1);
            out
        };
        is("m", &numbers(b"lmgg", &[32_000, 4096, 256, 32, 32]), Format::Ggml, Confidence::Certain);
        is("m", &numbers(b"tjgg", &[3, 32_000, 4096, 256, 32]), Format::Ggml, Confidence::Certain);
        is("m", &numbers(b"algg", &[1, 8, 16]), Format::Ggml, Confidence::Certain);
        is_not("no sizes", &numbers(b"tjgg", &[3, 0, 4096, 256, 32]));
        is_not("no version", &numbers(b"fmgg", &[9, 32_000, 4096, 256, 32]));
        is_not("text", b"tjgg and more text, which is not a model at all");
    }

    #[test]
    fn a_tflite_model_is_known_by_where_its_root_leads() {
        // Offset of the root, the name; the table of fields: its size, the table's size, where the version is; the table.
        let mut model = vec![0; 4096];
        model[..4].copy_from_slice(&28_u32.to_le_bytes());
        model[4..8].copy_from_slice(b"TFL3");
        model[12..14].copy_from_slice(&12_u16.to_le_bytes());
        model[14..16].copy_from_slice(&20_u16.to_le_bytes());
        model[16..18].copy_from_slice(&4_u16.to_le_bytes());
        model[28..32].copy_from_slice(&16_i32.to_le_bytes());
        model[32..36].copy_from_slice(&3_u32.to_le_bytes());
        is("m", &model, Format::Tflite, Confidence::Certain);
        let mut version = model.clone();
        version[32] = 9;
        is_not("another version", &version);
        let mut root = model.clone();
        root[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        is_not("a root beyond the end", &root);
        is_not("text", b"ABCDTFL3 is where the name of the format stands, and this is a text");
    }

    #[test]
    fn a_tensorrt_engine_is_known_by_magic_and_binary_content() {
        for mark in [b"ptrt", b"ftrt"] {
            let mut engine = mark.to_vec();
            engine.resize(2000, 0);
            is("m.engine", &engine, Format::Tensorrt, Confidence::Certain);
            is("m", &engine, Format::Tensorrt, Confidence::Certain);
            is_not("notes", &[mark, &b": notes on a format. ".repeat(100)[..]].concat());
        }
    }

    fn zip(names: &[&str], extra: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for name in names {
            out.extend(b"PK\x03\x04\0\0\0\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
            out.extend((name.len() as u16).to_le_bytes());
            out.extend((extra.len() as u16).to_le_bytes());
            out.extend(name.as_bytes());
            out.extend(extra);
            out.extend([7; 100]);
        }
        out
    }

    #[test]
    fn pytorch_and_keras_archives_are_known_by_their_names_and_other_zips_are_looked_into() {
        let zipped = Seen::Container(Container::Zip);
        for names in [
            &["archive/data.pkl", "archive/byteorder", "archive/data/0"][..],
            &["model/data/0", "model/data/1", "model/data.pkl", "model/version"],
            &["x/data/0", "x/constants.pkl"],
        ] {
            is("m.bin", &zip(names, b""), Format::Pytorch, Confidence::Certain);
        }
        is("padded", &zip(&["archive/data.pkl"], b"FB\x02\0ZZ"), Format::Pytorch, Confidence::Certain);
        assert_eq!(seen("near", &zip(&["app/data.pkl"], b"")), zipped, "a pickle of anybody's");
        assert_eq!(seen("near", &zip(&["app/data/notes", "app/version"], b"")), zipped);
        assert_eq!(seen("of others", &zip(&["readme", "archive/data.pkl", "archive/version"], b"")), zipped);
        let keras = ["metadata.json", "config.json", "model.weights.h5"];
        is("m", &zip(&keras, b""), Format::Keras, Confidence::Certain);
        is("m.keras", &zip(&keras[..1], b""), Format::Keras, Confidence::Certain);
        assert_eq!(seen("m.zip", &zip(&keras[..2], b"")), zipped);
        is_not("small.npz", &zip(&["a.npy", "b.npy"], b""));
        let mut large = zip(&["a.npy", "b.npy"], b"");
        large.resize(1 << 20, 1);
        is("large.npz", &large, Format::Numpy, Confidence::Likely);
    }

    #[test]
    fn a_name_alone_is_believed_only_for_large_binary_content() {
        let noise: Vec<u8> = (0..2_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        is("model.ckpt", &noise, Format::Named, Confidence::Likely);
        is("a/model.onnx_data", &noise, Format::Onnx, Confidence::Likely);
        is_not("model.ckpt", &noise[..100_000]);
        is_not("model.ckpt", "a text about checkpoints\n".repeat(100_000).as_bytes());
        is_not("model.ckpt", &[b"\x7fELF\x02\x01\x01\0", &noise[..]].concat());
        is_not("program", &noise);
    }

    #[test]
    fn a_large_file_that_looks_like_noise_is_mentioned_and_one_with_structure_is_not() {
        let noise: Vec<u8> = (0..65_u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        is("blob", &noise, Format::Opaque, Confidence::Info);
        is_not("blob", &noise[..10 << 20]);
        is_not("disk", &vec![0; 65 << 20]);
    }

    #[test]
    fn what_modelfs_sealed_is_no_plaintext() {
        is("x", &[b"MFS1DATA".as_slice(), &[1; 200]].concat(), Format::Sealed, Confidence::Info);
        is_not("x", &[b"MFS1ELSE".as_slice(), &[1; 200]].concat());
    }
}
