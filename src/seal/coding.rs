//! Whether an object's chunks are worth coding, and as what: decided before its key exists, since the key depends on it.
//!
//! In: where an object's bytes come from. Out: for each chunk, the element kind and alignment to code it by, or that it is
//! stored as it is. The header of a safetensors or GGUF file says where its tensors lie; without one, samples do. Both are
//! only believed as far as a sample of the chunk itself bears out.
//! Promises: nothing here can lose a byte: what is chosen decides how short a chunk becomes, and no more.
//! Not here: the codec (`codec`), the format's rules (`format`). Spec: docs/FORMAT.md a.11.

use std::ops::Range;

use zeroize::Zeroizing;

use super::plan::ObjectPlan;
use super::source::{SourceFile, SourceTree};
use crate::codec::{self, Kind};
use crate::error::Result;
use crate::tensors::{Dtype, Tensor, TensorMap};

/// Whether weights are coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CodecChoice {
    /// Chunk by chunk, where it wins.
    #[default]
    Auto,
    /// Nothing: for those who do not want the length of a chunk to tell how compressible it is.
    None,
}

/// The longest header that is read ahead of sealing. A longer one belongs to a file of so many tensors that sampling does
/// as well.
const HEAD_BYTES_MAX: u64 = 32 << 20;

/// What of a file is sampled when it has no header: so many places of so many bytes.
const SAMPLE_PLACES: u64 = 8;
const SAMPLE_BYTES: u64 = 64 << 10;

/// A chunk is coded if at most this much of it is left, in percent: less is not worth the decoder's time.
const LEFT_MAX_PERCENT: u64 = 97;

/// How the chunks of one object are chosen for.
#[derive(Debug)]
pub struct Coding {
    /// The tensors of the file that the object is a slice of, if its header tells.
    tensors: Option<TensorMap>,
    /// Where the object's first byte lies in that file.
    file_offset: u64,
}

impl Coding {
    /// Looks at the file behind `plan`; `None` if the object is to be stored as it is: packs, files of nothing that
    /// coding shortens, and whatever cannot be read (which the sealer itself will then say).
    pub fn choose(plan: &ObjectPlan, tree: &SourceTree, files: &[SourceFile]) -> Result<Option<Coding>> {
        let [piece] = &plan.pieces[..] else { return Ok(None) };
        let file = &files[piece.file];
        let opened = tree.open_file(file)?;
        let read = |range: Range<u64>| {
            let len = usize::try_from(range.end - range.start).expect("no more than a header is read");
            let mut bytes = Zeroizing::new(vec![0; len]);
            opened.read_exact_at(file, &mut bytes, range.start)?;
            Ok(bytes)
        };
        let tensors = tensor_map(file.size, read)?;
        let range = piece.file_offset..piece.file_offset + piece.len;
        let wins = match &tensors {
            Some(tensors) => tensors.within(range).iter().any(|tensor| kind_of(tensor).is_some()),
            None => {
                let step = piece.len / SAMPLE_PLACES;
                let places = (0..SAMPLE_PLACES).map(|nth| range.start + nth * step);
                let mut found = false;
                for at in places {
                    found = found || codec::sniff(&read(at..range.end.min(at + SAMPLE_BYTES))?).is_some();
                }
                found
            }
        };
        Ok(wins.then_some(Coding { tensors, file_offset: piece.file_offset }))
    }

    /// For bytes of which nothing is known but that something among them is worth coding: every chunk is sampled.
    pub fn by_samples() -> Coding {
        Coding { tensors: None, file_offset: 0 }
    }

    /// Puts the coded stream of `plain`, the object's bytes from `start` on, into `out` if that is worth it.
    pub fn code(&self, start: u64, plain: &[u8], out: &mut Vec<u8>) -> bool {
        let worth = |coded_len: usize| coded_len as u64 * 100 <= plain.len() as u64 * LEFT_MAX_PERCENT;
        let Some((kind, skew)) = self.kind_at(self.file_offset + start, plain) else { return false };
        if !worth(codec::estimate(kind, skew, plain)) {
            return false;
        }
        codec::encode(kind, skew, plain, out);
        worth(out.len())
    }

    /// What the elements of the file's bytes from `start` on are, and how far it is to the first whole one.
    fn kind_at(&self, start: u64, plain: &[u8]) -> Option<(Kind, usize)> {
        let Some(tensors) = &self.tensors else { return codec::sniff(plain) };
        let tensor = tensors.dominant(start..start + plain.len() as u64)?;
        let kind = kind_of(tensor)?;
        let width = kind.width() as u64;
        let skew = (tensor.range.start % width + width - start % width) % width;
        Some((kind, usize::try_from(skew).expect("less than an element")))
    }
}

fn kind_of(tensor: &Tensor) -> Option<Kind> {
    match tensor.dtype {
        Dtype::Bf16 => Some(Kind::Bf16),
        Dtype::F16 => Some(Kind::F16),
        Dtype::F32 => Some(Kind::F32),
        Dtype::Other => None,
    }
}

/// The header's word on where the tensors lie; reads on while the header says that it is longer.
fn tensor_map(size: u64, read: impl Fn(Range<u64>) -> Result<Zeroizing<Vec<u8>>>) -> Result<Option<TensorMap>> {
    let mut head = read(0..size.min(64 << 10))?;
    while let Some(wanted) = TensorMap::head_len_wanted(&head, size) {
        if wanted <= head.len() as u64 {
            return Ok(TensorMap::parse(&head, size));
        }
        if wanted > size.min(HEAD_BYTES_MAX) {
            break;
        }
        head = read(0..wanted)?;
    }
    Ok(None)
}
