//! The index of a TensorFlow checkpoint: a sorted table whose first entry, under the empty key, tells of the shards.
//!
//! The shards themselves are bare numbers: `names` knows what they are called.

use std::io;

use super::super::Format;
use super::super::source::Probe;
use super::{HEAD_BYTES_FIRST, Seen, Verdict};

pub(super) fn checkpoint_index(_: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    let head = probe.head(HEAD_BYTES_FIRST)?;
    // Shared bytes of the key, its other bytes, the length of the value.
    let [0, 0, len @ 4..=32, rest @ ..] = head else { return Ok(None) };
    let Some((header, next)) = rest.split_at_checked(usize::from(*len)) else { return Ok(None) };
    let Some(shards) = bundle_header(header) else { return Ok(None) };
    // The next key is a variable's name.
    let [0, key_len @ 1..=127, 2..=127, key @ ..] = next else { return Ok(None) };
    let named = key.get(..usize::from(*key_len)).is_some_and(|key| key.iter().all(|byte| (0x20..0x7f).contains(byte)));
    Ok(named.then(|| {
        Verdict::certain(Format::TfCheckpoint, format!("the index of a TensorFlow checkpoint, {shards} shards"))
    }))
}

/// Shards (field 1), byte order (field 2, left out for little), version (field 3).
fn bundle_header(header: &[u8]) -> Option<u8> {
    let (shards, rest) = match header {
        [0x08, shards @ 1..=127, rest @ ..] => (*shards, rest),
        _ => return None,
    };
    let rest = rest.strip_prefix(&[0x10, 0x01]).or_else(|| rest.strip_prefix(&[0x10, 0x00])).unwrap_or(rest);
    match rest {
        [0x1a, len, version @ ..] if usize::from(*len) == version.len() && version.first() == Some(&0x08) => {
            Some(shards)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Confidence;
    use super::super::tests::{is, is_not};
    use super::*;

    #[test]
    fn the_index_of_a_checkpoint_is_known_by_its_first_two_entries() {
        // The second entry's value length stands before its key.
        let good = [b"\0\0\x06\x08\x01\x1a\x02\x08\x01".as_slice(), b"\0\x0c\x14dense/kernel", &[1; 100]].concat();
        is("v.index", &good, Format::TfCheckpoint, Confidence::Certain);
        is_not(
            "no header",
            &[b"\0\0\x06\x09\x01\x1a\x02\x08\x01".as_slice(), b"\0\x0c\x14dense/kernel", &[1; 100]].concat(),
        );
        is_not(
            "no key",
            &[b"\0\0\x06\x08\x01\x1a\x02\x08\x01".as_slice(), b"\0\x0c\x14dense\x01kernel", &[1; 100]].concat(),
        );
    }
}
