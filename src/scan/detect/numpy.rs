//! NumPy arrays: `.npy`. Anybody keeps arrays; large ones of floats are told of as likely weights.

use std::io;

use super::super::source::Probe;
use super::super::{Confidence, Format};
use super::{HEAD_BYTES_FIRST, NAMED_BYTES_MIN, Seen, Verdict};

pub(super) fn look(_: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    let Some(text) = header(probe.head(HEAD_BYTES_FIRST)?).map(str::to_owned) else { return Ok(None) };
    let kind = value(&text, "'descr'").unwrap_or_default().trim_matches('\'').trim_start_matches(['<', '>', '=', '|']);
    let floats = matches!(kind, "f2" | "f4" | "f8" | "V2" | "bfloat16");
    if !floats || probe.measure()? < NAMED_BYTES_MIN {
        return Ok(Some(Seen::Other));
    }
    let shape = text.split_once("'shape':").and_then(|(_, rest)| rest.split_once(')')).map_or("", |(shape, _)| shape);
    let why = format!("a NumPy array of {kind}, shape {})", shape.trim());
    Ok(Some(Verdict::seen(Format::Numpy, Confidence::Likely, why)))
}

/// The dictionary that a file begins with.
fn header(head: &[u8]) -> Option<&str> {
    let (len, text) = match head.strip_prefix(b"\x93NUMPY")? {
        [1, _, a, b, text @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), text),
        [2 | 3, _, a, b, c, d, text @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, text),
        _ => return None,
    };
    std::str::from_utf8(text.get(..len)?).ok()
}

/// What stands behind a key of the header's dictionary, up to the next comma.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(key)?;
    rest.trim_start().strip_prefix(':')?.split([',', '}']).next().map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{is, is_not};
    use super::*;

    fn npy(kind: &str, len: usize) -> Vec<u8> {
        let text = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': (512, 512), }}\n");
        let mut out = b"\x93NUMPY\x01\0".to_vec();
        out.extend((text.len() as u16).to_le_bytes());
        out.extend(text.as_bytes());
        out.resize(len, 1);
        out
    }

    #[test]
    fn large_arrays_of_floats_are_likely_weights_and_others_are_not() {
        is("w.npy", &npy("<f4", 1 << 20), Format::Numpy, Confidence::Likely);
        is_not("small.npy", &npy("<f4", 4096));
        is_not("labels.npy", &npy("<i8", 1 << 20));
        is_not("strings.npy", &npy("|O", 1 << 20));
        is_not("cut.npy", b"\x93NUMPY\x01\0\xff\xff{'descr': ");
    }
}
