//! Python pickles: a program for a stack machine, walked and never run.
//!
//! A pickle is weights by what it would build: arrays and tensors of the libraries that train models. Any other pickle is a
//! list or a grammar until it is large.
//! Spec: the opcodes of protocols 0 to 5, as CPython's pickletools documents them.

use std::io;

use super::super::source::Probe;
use super::super::{Confidence, Format};
use super::{HEAD_BYTES_MORE, NAMED_BYTES_MIN, Seen, Verdict};

/// What `torch.save` wrote before it wrote zip archives: its magic number, as a pickle of protocol 2.
const TORCH_LEGACY: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// Below this an array in a pickle is a test's or a constant's.
const ARRAYS_BYTES_MIN: u64 = 64 << 10;

/// Libraries whose objects are parts of models, whatever their size.
const TENSORS: &[&str] = &["torch", "jax", "jaxlib", "tensorflow", "keras", "flax", "paddle", "mxnet", "safetensors"];

/// Libraries that keep models of any size, and arrays of any kind.
const ARRAYS: &[&str] =
    &["numpy", "cupy", "sklearn", "xgboost", "lightgbm", "catboost", "joblib", "scipy", "pandas", "ml_dtypes"];

pub(super) fn look(name: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    let head = probe.head(64)?;
    if head.starts_with(TORCH_LEGACY) {
        return Ok(Some(Verdict::certain(Format::Pytorch, "PyTorch's older form: its magic number, then pickles")));
    }
    // Protocols 0 and 1 have no mark; what builds an array begins so.
    let marked = matches!(head, [0x80, 2..=5, ..]);
    if !marked && !matches!(head.first(), Some(b'(' | b'c' | b'}' | b']')) {
        return Ok(None);
    }
    let head = probe.head(HEAD_BYTES_MORE)?;
    let walk = walk(head);
    if walk.ops < 3 || !walk.sound || (!marked && walk.modules.is_empty()) {
        return Ok(None);
    }
    let from = |list: &[&str]| {
        walk.modules.iter().find(|module| list.contains(&module.split('.').next().unwrap_or(module))).cloned()
    };
    if let Some(module) = from(TENSORS) {
        return Ok(Some(Verdict::certain(Format::Pickle, format!("a pickle that builds objects of {module}"))));
    }
    let len = probe.measure()?;
    if let Some(module) = from(ARRAYS)
        && len >= ARRAYS_BYTES_MIN
    {
        return Ok(Some(Verdict::certain(Format::Pickle, format!("a pickle that builds objects of {module}"))));
    }
    if len < NAMED_BYTES_MIN || !marked {
        return Ok(Some(Seen::Other).filter(|_| marked));
    }
    let lower = name.to_ascii_lowercase();
    let ends = [&b".pkl"[..], b".pickle", b".pt", b".pth", b".bin", b".ckpt", b".joblib", b".model"];
    let named = ends.iter().any(|end| lower.ends_with(end));
    Ok(Some(match named {
        true => Verdict::seen(Format::Pickle, Confidence::Likely, "a pickle of at least 1 MiB"),
        false => Verdict::seen(Format::Pickle, Confidence::Info, "a pickle of at least 1 MiB under another name"),
    }))
}

#[derive(Debug, Default)]
struct Walk {
    /// Every opcode was one, to the end of the pickle or of the head.
    sound: bool,
    ops: usize,
    /// Modules whose names would be looked up.
    modules: Vec<String>,
}

/// What an opcode is followed by.
enum Argument {
    None,
    Bytes(usize),
    /// A length in so many bytes, then that many bytes.
    Counted(usize),
    Line,
    TwoLines,
}

/// The last texts that were put on the stack, and those that were remembered: of them `STACK_GLOBAL` takes its two.
#[derive(Default)]
struct Texts<'a> {
    last: [&'a [u8]; 2],
    memo: Vec<&'a [u8]>,
}

impl<'a> Texts<'a> {
    fn push(&mut self, text: &'a [u8]) {
        self.last = [self.last[1], text];
    }
}

fn walk(bytes: &[u8]) -> Walk {
    let mut walk = Walk { sound: true, ..Walk::default() };
    let mut texts = Texts::default();
    let mut at = 0;
    while let Some(op) = bytes.get(at).copied() {
        at += 1;
        let Some(argument) = argument(op) else {
            walk.sound = false;
            return walk;
        };
        let start = at;
        let end = match argument {
            Argument::None => Some(at),
            Argument::Bytes(len) => at.checked_add(len),
            Argument::Counted(width) => counted(bytes, at, width),
            Argument::Line => line(bytes, at),
            Argument::TwoLines => line(bytes, at).and_then(|next| line(bytes, next)),
        };
        // The head ends within this one.
        let Some(end) = end.filter(|end| *end <= bytes.len()) else { return walk };
        let body = &bytes[start..end];
        match op {
            // GLOBAL, INST: module and name, a line each.
            b'c' | b'i' => walk.note(body.split(|byte| *byte == b'\n').next().unwrap_or_default()),
            // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8, SHORT_BINSTRING, BINSTRING
            0x8c => texts.push(&body[1..]),
            b'X' | b'T' => texts.push(&body[4..]),
            b'U' => texts.push(&body[1..]),
            0x8d => texts.push(&body[8..]),
            // MEMOIZE
            0x94 if texts.memo.len() < 4096 => texts.memo.push(texts.last[1]),
            // BINGET of a text that was remembered.
            b'h' => {
                if let Some(text) = texts.memo.get(usize::from(body[0])) {
                    texts.push(text);
                }
            }
            // STACK_GLOBAL
            0x93 => walk.note(texts.last[0]),
            _ => {}
        }
        walk.ops += 1;
        at = end;
        // STOP
        if op == b'.' {
            return walk;
        }
    }
    walk
}

impl Walk {
    fn note(&mut self, module: &[u8]) {
        let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_');
        let sound = !module.is_empty() && module.len() < 200 && module.iter().all(is_name);
        self.sound &= sound;
        if let Ok(module) = std::str::from_utf8(module)
            && sound
            && self.modules.len() < 256
            && !self.modules.iter().any(|have| have == module)
        {
            self.modules.push(module.to_owned());
        }
    }
}

fn line(bytes: &[u8], at: usize) -> Option<usize> {
    bytes.get(at..)?.iter().position(|byte| *byte == b'\n').map(|len| at + len + 1)
}

fn counted(bytes: &[u8], at: usize, width: usize) -> Option<usize> {
    let mut number = [0; 8];
    number[..width].copy_from_slice(bytes.get(at..at + width)?);
    at.checked_add(width)?.checked_add(usize::try_from(u64::from_le_bytes(number)).ok()?)
}

/// `None`: no opcode of any protocol.
fn argument(op: u8) -> Option<Argument> {
    Some(match op {
        b'(' | b'.' | b'0' | b'1' | b'2' | b'N' | b'Q' | b'R' | b'a' | b'b' | b'd' | b'e' | b'l' | b'o' | b's' => {
            Argument::None
        }
        b't' | b'u' | b'}' | b']' | b')' => Argument::None,
        0x81 | 0x85..=0x89 | 0x8f | 0x90 | 0x91 | 0x92 | 0x93 | 0x94 | 0x97 | 0x98 => Argument::None,
        b'F' | b'I' | b'L' | b'P' | b'S' | b'V' | b'g' | b'p' => Argument::Line,
        b'c' | b'i' => Argument::TwoLines,
        b'K' | b'h' | b'q' | 0x80 | 0x82 => Argument::Bytes(1),
        b'M' | 0x83 => Argument::Bytes(2),
        b'J' | b'j' | b'r' | 0x84 => Argument::Bytes(4),
        b'G' | 0x95 => Argument::Bytes(8),
        b'U' | b'C' | 0x8a | 0x8c => Argument::Counted(1),
        b'T' | b'X' | b'B' | 0x8b => Argument::Counted(4),
        0x8d | 0x8e | 0x96 => Argument::Counted(8),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{is, is_not};
    use super::*;

    /// As protocol 4 writes it: the two names, then the object that is built of them, then what follows.
    fn builds(module: &str, name: &str, len: usize) -> Vec<u8> {
        let mut out = b"\x80\x04\x95\0\x10\0\0\0\0\0\0\x8c".to_vec();
        out.push(module.len() as u8);
        out.extend(module.as_bytes());
        out.extend(b"\x94\x8c");
        out.push(name.len() as u8);
        out.extend(name.as_bytes());
        out.extend(b"\x94\x93\x94)R");
        out.resize(len.max(out.len()), b'N');
        out
    }

    #[test]
    fn a_pickle_is_weights_by_what_it_would_build() {
        is("w", &builds("torch._utils", "_rebuild_tensor_v2", 0), Format::Pickle, Confidence::Certain);
        is("w", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00.", Format::Pickle, Confidence::Certain);
        is(
            "w",
            b"cnumpy.core.multiarray\n_reconstruct\np0\n".repeat(4000).as_slice(),
            Format::Pickle,
            Confidence::Certain,
        );
        is("w", &builds("numpy._core.multiarray", "_reconstruct", 70_000), Format::Pickle, Confidence::Certain);
        is("w", &[TORCH_LEGACY, &[0; 100]].concat(), Format::Pytorch, Confidence::Certain);
        is_not("a test's array", &builds("numpy._core.multiarray", "_reconstruct", 900));
        is_not("a grammar", &builds("collections", "OrderedDict", 30_000));
        is_not("another torch", &builds("torchlight", "Lamp", 30_000));
    }

    #[test]
    fn only_a_large_pickle_of_other_things_is_told_of() {
        is("a.pkl", &builds("collections", "OrderedDict", 1 << 20), Format::Pickle, Confidence::Likely);
        is("a.cache", &builds("collections", "OrderedDict", 1 << 20), Format::Pickle, Confidence::Info);
    }

    #[test]
    fn bytes_that_only_begin_like_a_pickle_are_none() {
        is_not("no opcode", &[b"\x80\x04".as_slice(), &[0xff; 2_000_000]].concat());
        is_not(
            "no protocol",
            &builds("torch", "x", 0).iter().map(|b| if *b == 4 { 9 } else { *b }).collect::<Vec<_>>(),
        );
        is_not("a module that is none", b"\x80\x02ctorch utils\n!!\nq\x00.");
        is_not("text", b"(c) 1999 somebody\nctorch is a word\n");
    }

    #[test]
    fn a_walk_of_any_bytes_ends_and_never_reaches_past_them() {
        let seed = 7_u64;
        let mut state = seed;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mut bytes = builds("torch", "x", 40);
            let at = (state >> 33) as usize % bytes.len();
            bytes[at] = (state >> 25) as u8;
            bytes.truncate(1 + (state >> 40) as usize % bytes.len());
            let walk = walk(&bytes);
            assert!(walk.ops <= bytes.len());
        }
    }
}
