//! HDF5, in which Keras keeps models and weights, and science keeps everything else.

use std::io;

use super::super::source::Probe;
use super::super::{Confidence, Format};
use super::{HEAD_BYTES_FIRST, NAMED_BYTES_MIN, Seen, Verdict};

const SIGNATURE: &[u8] = b"\x89HDF\r\n\x1a\n";

/// What is searched for names: groups and their attributes come before the first large data set.
const SEARCHED_BYTES: usize = 1 << 20;

pub(super) fn look(name: &[u8], probe: &mut Probe) -> io::Result<Option<Seen>> {
    let head = probe.head(HEAD_BYTES_FIRST)?;
    // A user's block of one of these sizes may come first.
    let places = [0, 512, 1024, 2048];
    let Some(at) = places.into_iter().find(|at| head.get(*at..).is_some_and(|rest| rest.starts_with(SIGNATURE))) else {
        return Ok(None);
    };
    // The version of the superblock: 0 to 3. Anything else is another file that happens to hold the signature.
    if head.get(at + 8).is_none_or(|version| *version > 3) {
        return Ok(None);
    }
    let head = probe.head(SEARCHED_BYTES)?;
    let holds = |words: &[u8]| head.windows(words.len()).any(|window| window == words);
    let keras =
        [&b"keras_version"[..], b"layer_names", b"weight_names", b"model_weights", b"_layer_checkpoint_dependencies"];
    if let Some(word) = keras.into_iter().find(|word| holds(word)) {
        let why = format!("an HDF5 file with Keras's `{}`", String::from_utf8_lossy(word));
        return Ok(Some(Verdict::certain(Format::Hdf5, why)));
    }
    let lower = name.to_ascii_lowercase();
    let words = [&b"weight"[..], b"model", b"checkpoint", b"ckpt"];
    let named = words.iter().any(|word| lower.windows(word.len()).any(|window| window == *word));
    if probe.measure()? < NAMED_BYTES_MIN {
        return Ok(Some(Seen::Other));
    }
    Ok(Some(match named {
        true => Verdict::seen(Format::Hdf5, Confidence::Likely, "an HDF5 file of at least 1 MiB with a model's name"),
        false => Verdict::seen(Format::Hdf5, Confidence::Info, "an HDF5 file of at least 1 MiB: data of any kind"),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{is, is_not};
    use super::*;

    fn hdf5(at: usize, word: &[u8], len: usize) -> Vec<u8> {
        let mut out = vec![0; at];
        out.extend(SIGNATURE);
        out.push(2);
        out.extend([0; 300]);
        out.extend(word);
        out.resize(len, 0);
        out
    }

    #[test]
    fn keras_is_known_by_its_attributes_and_other_data_is_only_mentioned() {
        for at in [0, 512, 1024, 2048] {
            is("m", &hdf5(at, b"layer_names", 9000), Format::Hdf5, Confidence::Certain);
        }
        is("weights.h5", &hdf5(0, b"", 1 << 20), Format::Hdf5, Confidence::Likely);
        is("measured.h5", &hdf5(0, b"", 1 << 20), Format::Hdf5, Confidence::Info);
        is_not("weights.h5", &hdf5(0, b"", 9000));
        is_not("elsewhere", &hdf5(100, b"layer_names", 9000));
        let mut version = hdf5(0, b"layer_names", 9000);
        version[8] = 9;
        is_not("another version", &version);
    }
}
