//! Files that run code when they are loaded, or that a site does not want: by name, and pickles by content.
//!
//! In: names, bytes (hostile), what the operator denies. Out: which type a file is of, or an error that names file and type.
//! Promises: a name is taken for what programs take it for; of a file that can be read as a whole (at seal) an archive that
//! holds a pickle, or cannot be looked through, counts as one; of a file whose head alone is seen (at open) so does every
//! head that pickles have. No more than [`DIRECTORY_BYTES_MAX`] is ever read, and nothing is unpickled.
//! Not here: who may read (`policy`), where the bytes come from (`seal`, `fuse::access`).

use crate::error::{Error, Result};
use crate::format::Manifest;
use crate::refuse;

/// As much of a file as its head.
pub const HEAD_BYTES: usize = 4096;
/// The most of an archive's directory that is looked through; a longer one counts as one that cannot be.
pub const DIRECTORY_BYTES_MAX: usize = 16 << 20;
/// A ZIP ends with a record that is found in its last bytes.
const ZIP_TAIL_BYTES: u64 = 22 + 65_535 + 20;
/// Members of a tar looked at.
const TAR_MEMBERS_MAX: u64 = 4096;

/// Ends of names that pickles are known by: Python's own, PyTorch's, joblib's and dill's.
const PICKLE_SUFFIXES: &[&str] = &[".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill", ".p", ".pck", ".pcl"];
/// `.bin` is weights of many programs; these names are PyTorch's.
const PICKLE_BINS: &[&str] =
    &["pytorch_model", "adapter_model", "training_args", "optimizer", "scheduler", "consolidated"];

/// A type of file that is known to run code when it is loaded, or that a site does not want.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeniedType {
    /// By content and name: pickles, and PyTorch's archives of them.
    Pickle,
    /// By the end of the name, `.bin`.
    Suffix(String),
}

impl std::str::FromStr for DeniedType {
    type Err = Error;

    fn from_str(text: &str) -> Result<DeniedType> {
        match text {
            "pickle" => Ok(DeniedType::Pickle),
            suffix if suffix.len() > 1 && suffix.starts_with('.') && !suffix.contains('/') => {
                Ok(DeniedType::Suffix(suffix.to_ascii_lowercase()))
            }
            other => refuse!(Usage, "`{other}` is no type of file; write pickle, or the end of a name as in .bin"),
        }
    }
}

/// What the operator lets be sealed and mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Admits {
    /// Plain bytes of all files together.
    pub max_model_size: Option<u64>,
    pub deny_types: Vec<DeniedType>,
}

impl Admits {
    /// Whether pickles are denied.
    pub fn no_pickles(&self) -> bool {
        self.deny_types.contains(&DeniedType::Pickle)
    }

    /// # Errors
    /// `POLICY` for a model of more bytes than the operator lets in.
    pub fn check_size(&self, model: &str, bytes: u128) -> Result<()> {
        match self.max_model_size {
            Some(most) if bytes > u128::from(most) => refuse!(
                Policy,
                "model {model} has {bytes} bytes, max-model-size lets {most} in; raise it, or split the model"
            ),
            Some(_) | None => Ok(()),
        }
    }

    /// # Errors
    /// `POLICY` for a name of a denied type.
    pub fn check_name(&self, path: &str) -> Result<()> {
        for denied in &self.deny_types {
            match denied {
                DeniedType::Pickle if is_pickle_name(path) => {
                    refuse!(Policy, "{path} is a pickle by its name, which deny-types=pickle refuses; use safetensors")
                }
                DeniedType::Suffix(suffix) if path.to_ascii_lowercase().ends_with(suffix.as_str()) => {
                    refuse!(Policy, "{path} ends in {suffix}, which deny-types={suffix} refuses")
                }
                DeniedType::Pickle | DeniedType::Suffix(_) => {}
            }
        }
        Ok(())
    }

    /// What can be told of a version by its manifest.
    ///
    /// # Errors
    /// `POLICY`, naming model and file.
    pub fn check(&self, model: &str, manifest: &Manifest) -> Result<()> {
        self.check_size(model, manifest.total_size())?;
        if self.deny_types.is_empty() {
            return Ok(());
        }
        let names = manifest.files().iter().map(|file| manifest.path(file));
        names.into_iter().try_for_each(|path| self.check_name(path)).map_err(|e| e.context(format!("model {model}")))
    }
}

fn is_pickle_name(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    if PICKLE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) {
        return true;
    }
    let is_bin = |stem: &str| PICKLE_BINS.iter().any(|known| stem.starts_with(known));
    name.strip_suffix(".bin").is_some_and(is_bin)
}

/// Whether the first bytes of a file (at least [`HEAD_BYTES`] of a longer one) are those of a pickle, bare, compressed, or in
/// the archives that PyTorch makes.
pub fn is_pickle_head(head: &[u8]) -> bool {
    is_bare_pickle(head)
        || is_packed_pickle(head)
        || is_torch_zip_head(head)
        || is_object_array(head)
        || tar_name(head).is_some_and(is_torch_tar_member)
}

/// Whether a whole file is one. `read` fills the slice from an offset; never asked beyond `size`.
///
/// # Errors
/// What `read` answers.
pub fn is_pickle(size: u64, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<bool> {
    let mut head = vec![0; HEAD_BYTES.min(usize::try_from(size).unwrap_or(HEAD_BYTES))];
    read(0, &mut head)?;
    if is_pickle_head(&head) {
        return Ok(true);
    }
    if head.starts_with(b"PK") {
        return zip_holds_pickle(size, &mut read);
    }
    if tar_name(&head).is_some() {
        return tar_holds_pickle(size, &mut read);
    }
    Ok(false)
}

/// Protocols 2 to 5 begin with their number; 0 and 1, which look like text, with a container or a class and what pickle
/// writes after one.
fn is_bare_pickle(head: &[u8]) -> bool {
    match head {
        [0x80, 2..=5, ..] => true,
        // A global: `c`, a module, a name, each a line. Lists of words begin so too: what follows tells them apart.
        [b'c', rest @ ..] => {
            let mut lines = rest.splitn(3, |byte| *byte == b'\n');
            let word = |line: Option<&[u8]>| {
                line.is_some_and(|line| {
                    !line.is_empty()
                        && line.len() < 256
                        && line.iter().all(|c| c.is_ascii_alphanumeric() || b"._".contains(c))
                })
            };
            word(lines.next()) && word(lines.next()) && lines.next().is_some_and(is_after_a_value)
        }
        [b'(', b'c', rest @ ..] => is_bare_pickle(&[b"c", rest].concat()),
        [b'(', b'd' | b'l' | b't', rest @ ..] | [b'}' | b']' | b')', rest @ ..] => is_memo(rest),
        _ => false,
    }
}

/// Where pickle remembers what it has just made: `p7`, a line, or `q` and a number.
fn is_memo(rest: &[u8]) -> bool {
    matches!(rest, [b'p', b'0'..=b'9', ..] | [b'q', 0..=31, ..])
}

fn is_after_a_value(rest: &[u8]) -> bool {
    is_memo(rest)
        || matches!(rest, [b'(' | b')' | b']' | b'}', ..] | [b'S', b'\'' | b'"', ..] | [b'U' | b'X' | b'K', 0..=31, ..])
}

/// joblib and pandas compress what they pickle.
fn is_packed_pickle(head: &[u8]) -> bool {
    use std::io::Read;
    let mut first = [0; 64];
    let filled = |mut from: Box<dyn Read + '_>, first: &mut [u8]| {
        let mut got = 0;
        while got < first.len() {
            match from.read(&mut first[got..]) {
                Ok(0) | Err(_) => break,
                Ok(more) => got += more,
            }
        }
        got
    };
    let got = match head {
        [0x1f, 0x8b, ..] => filled(Box::new(flate2::read::GzDecoder::new(head)), &mut first),
        [0x78, 0x01 | 0x5e | 0x9c | 0xda, ..] => filled(Box::new(flate2::read::ZlibDecoder::new(head)), &mut first),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => match zstd::stream::read::Decoder::with_buffer(head) {
            Ok(decoder) => filled(Box::new(decoder), &mut first),
            Err(_) => 0,
        },
        _ => return false,
    };
    is_bare_pickle(&first[..got])
}

/// The first member of an archive that `torch.save` makes is its pickle.
fn is_torch_zip_head(head: &[u8]) -> bool {
    let Some(name_len) = head.strip_prefix(b"PK\x03\x04").and_then(|rest| rest.get(22..24)) else { return false };
    let name_len = usize::from(u16::from_le_bytes([name_len[0], name_len[1]]));
    head.get(30..30 + name_len).is_some_and(is_pickle_member)
}

/// A member of an archive that is a pickle by its name, or one that PyTorch puts beside its pickle.
fn is_pickle_member(name: &[u8]) -> bool {
    String::from_utf8(name.to_vec()).map_or(true, |name| is_pickle_name(&name))
}

/// NumPy pickles arrays of objects: its header says so.
fn is_object_array(head: &[u8]) -> bool {
    let Some(rest) = head.strip_prefix(b"\x93NUMPY") else { return false };
    let header = &rest[..rest.len().min(1024)];
    let text = String::from_utf8_lossy(header);
    text.split("'descr':").nth(1).and_then(|after| after.split(',').next()).is_some_and(|descr| descr.contains('O'))
}

/// The name of the member that a block of a tar begins.
fn tar_name(block: &[u8]) -> Option<&[u8]> {
    if block.len() < 512 || &block[257..262] != b"ustar" {
        return None;
    }
    let end = block[..100].iter().position(|byte| *byte == 0).unwrap_or(100);
    Some(&block[..end])
}

/// PyTorch before its ZIPs: a tar of `sys_info`, `pickle`, `tensors`, `storages`.
fn is_torch_tar_member(name: &[u8]) -> bool {
    let last = name.rsplit(|byte| *byte == b'/').next().unwrap_or(name);
    matches!(last, b"pickle" | b"sys_info" | b"storages") || is_pickle_member(name)
}

fn tar_holds_pickle(size: u64, read: &mut impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<bool> {
    let mut block = [0; 512];
    let mut at = 0;
    for _ in 0..TAR_MEMBERS_MAX {
        if at + 512 > size {
            return Ok(false);
        }
        read(at, &mut block)?;
        let Some(name) = tar_name(&block) else { return Ok(block != [0; 512]) };
        if is_torch_tar_member(name) {
            return Ok(true);
        }
        let digits = block[124..136].iter().skip_while(|c| **c == b' ').take_while(|c| (b'0'..=b'7').contains(c));
        let len = digits.fold(0u64, |len, digit| len.saturating_mul(8).saturating_add(u64::from(digit - b'0')));
        at = at.saturating_add(512).saturating_add(len.checked_next_multiple_of(512).unwrap_or(u64::MAX));
    }
    // Longer than anybody looks through.
    Ok(true)
}

fn le<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// By the directory at the end, as programs read it. An archive that has none that can be read counts as one with a pickle.
fn zip_holds_pickle(size: u64, read: &mut impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<bool> {
    let tail_len = ZIP_TAIL_BYTES.min(size);
    let tail_at = size - tail_len;
    let mut tail = vec![0; usize::try_from(tail_len).expect("some 64 KiB")];
    read(tail_at, &mut tail)?;
    let Some(end) = tail.windows(4).rposition(|four| four == b"PK\x05\x06") else { return Ok(true) };
    let of_32 = |at| le(&tail, end + at).map(|four| u64::from(u32::from_le_bytes(four)));
    let (Some(mut len), Some(mut start)) = (of_32(12), of_32(16)) else { return Ok(true) };
    if len == u64::from(u32::MAX) || start == u64::from(u32::MAX) {
        // ZIP64: a locator before the record leads to the one with 64 bits.
        let locator = end.checked_sub(20).filter(|at| tail[*at..].starts_with(b"PK\x06\x07"));
        let Some(wide_at) = locator.and_then(|at| le(&tail, at + 8)).map(u64::from_le_bytes) else { return Ok(true) };
        let mut wide = [0; 56];
        if wide_at.checked_add(56).is_none_or(|wide_end| wide_end > size) {
            return Ok(true);
        }
        read(wide_at, &mut wide)?;
        let (Some(wide_len), Some(wide_start)) = (le(&wide, 40), le(&wide, 48)) else { return Ok(true) };
        if !wide.starts_with(b"PK\x06\x06") {
            return Ok(true);
        }
        (len, start) = (u64::from_le_bytes(wide_len), u64::from_le_bytes(wide_start));
    }
    if len > DIRECTORY_BYTES_MAX as u64 || start.checked_add(len).is_none_or(|end| end > size) {
        return Ok(true);
    }
    let mut directory = vec![0; usize::try_from(len).expect("at most 16 MiB")];
    read(start, &mut directory)?;
    let mut at = 0;
    while at < directory.len() {
        let of_16 = |from| le(&directory, at + from).map(|two| usize::from(u16::from_le_bytes(two)));
        let (Some(name), Some(extra), Some(comment)) = (of_16(28), of_16(30), of_16(32)) else { return Ok(true) };
        let Some(member) = directory.get(at + 46..at + 46 + name) else { return Ok(true) };
        if !directory[at..].starts_with(b"PK\x01\x02") || is_pickle_member(member) {
            return Ok(true);
        }
        at += 46 + name + extra + comment;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn whole(bytes: &[u8]) -> bool {
        is_pickle(bytes.len() as u64, |offset, room: &mut [u8]| {
            let at = usize::try_from(offset).expect("in memory");
            room.copy_from_slice(&bytes[at..at + room.len()]);
            Ok(())
        })
        .expect("memory")
    }

    /// An archive of stored members, as `zip -0` makes it.
    fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
        let (mut bytes, mut directory) = (Vec::new(), Vec::new());
        for (name, body) in members {
            let at = bytes.len() as u32;
            let sizes = [&(body.len() as u32).to_le_bytes()[..], &(body.len() as u32).to_le_bytes()].concat();
            bytes.extend_from_slice(b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
            bytes.extend_from_slice(&sizes);
            bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
            bytes.extend_from_slice(b"\0\0");
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(body);
            directory.extend_from_slice(b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
            directory.extend_from_slice(&sizes);
            directory.extend_from_slice(&(name.len() as u16).to_le_bytes());
            directory.extend_from_slice(&[0; 12]);
            directory.extend_from_slice(&at.to_le_bytes());
            directory.extend_from_slice(name.as_bytes());
        }
        let start = bytes.len() as u32;
        bytes.extend_from_slice(&directory);
        bytes.extend_from_slice(b"PK\x05\x06\0\0\0\0");
        bytes.extend_from_slice(&[(members.len() as u16).to_le_bytes(), (members.len() as u16).to_le_bytes()].concat());
        bytes.extend_from_slice(&(directory.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&start.to_le_bytes());
        bytes.extend_from_slice(b"\0\0");
        bytes
    }

    fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, body) in members {
            let mut header = tar::Header::new_ustar();
            header.set_size(body.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append_data(&mut header, name, *body).expect("memory");
        }
        builder.into_inner().expect("memory")
    }

    #[test]
    fn pickles_are_known_by_content_in_every_form() {
        use std::io::Write;
        let bare = b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}\x94\x8c\x01a\x94K\x01s.";
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(bare).expect("memory");
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        zlib.write_all(bare).expect("memory");
        let forms: Vec<(&str, Vec<u8>)> = vec![
            ("protocol 4", bare.to_vec()),
            ("protocol 2", b"\x80\x02}q\0.".to_vec()),
            ("protocol 0", b"(dp0\nS'a'\np1\nI1\ns.".to_vec()),
            ("protocol 0, a call", b"cos\nsystem\n(S'true'\ntR.".to_vec()),
            ("protocol 1", b"}q\x00U\x01aq\x01K\x01s.".to_vec()),
            ("PyTorch before 1.6", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec()),
            ("gzip", gz.finish().expect("memory")),
            ("zlib", zlib.finish().expect("memory")),
            ("zstd", zstd::encode_all(&bare[..], 1).expect("memory")),
            (
                "objects of NumPy",
                b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".to_vec(),
            ),
            (
                "PyTorch",
                zip(&[("archive/data.pkl", bare), ("archive/data/0", b"weights"), ("archive/version", b"3\n")]),
            ),
            ("PyTorch's first tars", tar(&[("sys_info", b"x"), ("pickle", bare)])),
        ];
        for (what, bytes) in &forms {
            assert!(is_pickle_head(bytes), "{what}, by its head");
            assert!(whole(bytes), "{what}");
        }
        // Where the head says nothing, the directory of the archive does.
        for (what, bytes) in [
            ("a later member", zip(&[("archive/data/0", &[7; 9000]), ("archive/data.pkl", bare)])),
            ("a checkpoint in a tar", tar(&[("model_config.yaml", b"a: 1"), ("model_weights.ckpt", b"PK\x03\x04")])),
            ("a ZIP without its end", zip(&[("a.txt", b"text")])[..40].to_vec()),
        ] {
            assert!(!is_pickle_head(&bytes), "{what}");
            assert!(whole(&bytes), "{what}");
        }
    }

    #[test]
    fn what_is_no_pickle_is_not_taken_for_one() {
        let header = b"{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}";
        let safetensors = [&(header.len() as u64).to_le_bytes()[..], header, b"\0\0\x80\x3f"].concat();
        let forms: Vec<(&str, Vec<u8>)> = vec![
            ("nothing", Vec::new()),
            ("one byte", vec![0x80]),
            ("JSON", b"{\"architectures\": [\"Llama\"]}".to_vec()),
            ("a list in JSON", b"[1, 2]".to_vec()),
            ("text", b"config of a model\nwith lines\nof words\n".to_vec()),
            ("text in brackets", b"(dpkg) a text".to_vec()),
            ("labels, a line each", b"cat\ndog\nbird\npig\nVan\n".to_vec()),
            ("one label", b"cat\n".to_vec()),
            ("safetensors", safetensors),
            ("GGUF", b"GGUF\x03\0\0\0".to_vec()),
            ("HDF5", b"\x89HDF\r\n\x1a\n".to_vec()),
            (
                "numbers of NumPy",
                b"\x93NUMPY\x01\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }".to_vec(),
            ),
            ("a ZIP of texts", zip(&[("a.txt", b"text"), ("b/c.json", b"{}")])),
            ("a tar of texts", tar(&[("a.txt", b"text"), ("b/c.json", b"{}")])),
        ];
        for (what, bytes) in &forms {
            assert!(!is_pickle_head(bytes), "{what}, by its head");
            assert!(!whole(bytes), "{what}");
        }
    }

    #[test]
    fn names_are_taken_for_what_programs_take_them_for() {
        let admits =
            Admits { deny_types: vec![DeniedType::Pickle, DeniedType::Suffix(".onnx".into())], ..Admits::default() };
        for path in
            ["a/model.PKL", "m.pt", "x.pth", "last.ckpt", "pytorch_model-00001-of-00002.bin", "f.joblib", "g.onnx"]
        {
            let error = admits.check_name(path).expect_err(path);
            assert_eq!(error.code(), Code::Policy);
            assert!(error.message().contains(path), "{error:?}");
        }
        for path in ["model.safetensors", "ggml-base.bin", "config.json", "pt", "onnx/readme.md", "model.gguf"] {
            admits.check_name(path).unwrap_or_else(|error| panic!("{path}: {error:?}"));
        }
        assert!(Admits::default().check_name("a.pkl").is_ok());
        let small = Admits { max_model_size: Some(100), ..Admits::default() };
        assert!(small.check_size("m", 100).is_ok());
        assert!(small.check_size("m", 101).expect_err("too large").message().contains("max-model-size"));
    }

    /// Whatever the bytes, the answer comes, and nothing beyond the file is read.
    #[test]
    fn hostile_bytes_end_in_an_answer() {
        let seed = std::env::var("MODELFS_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(11_u64);
        println!("MODELFS_TEST_SEED={seed}");
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let starts = [zip(&[("a.txt", &[1; 600]), ("b.txt", b"x")]), tar(&[("a.txt", &[1; 600]), ("b", b"x")])];
        for round in 0..20_000 {
            let mut bytes = starts[round % 2].clone();
            for _ in 0..1 + next() % 6 {
                let at = next() % bytes.len();
                bytes[at] = [0, 0xff, next() as u8][next() % 3];
            }
            if round % 5 == 0 {
                bytes.truncate(next() % bytes.len());
            }
            whole(&bytes);
        }
    }
}
