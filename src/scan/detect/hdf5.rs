//! HDF5, in which Keras keeps models and weights, and science keeps everything else.
//!
//! Promises: certain only where the superblock, the root group's header and a record of it hold; of what the file claims of
//! itself nothing is followed beyond the head, nor more often than [`PIECES_MAX`].
//! Spec: HDF5 File Format Specification 3.0, superblocks 0 to 3.

use std::io;

use super::super::source::Probe;
use super::super::{Confidence, Format};
use super::{HEAD_BYTES_FIRST, NAMED_BYTES_MIN, Seen, Verdict};

const SIGNATURE: &[u8] = b"\x89HDF\r\n\x1a\n";

/// What is searched for names: groups and their attributes come before the first large data set.
const SEARCHED_BYTES: usize = 1 << 20;

/// Pieces of the root group's header. The library writes one or two.
const PIECES_MAX: usize = 64;

/// Records of them.
const RECORDS_MAX: usize = 4096;

/// Longer names are none of those that are looked for.
const NAME_MAX: usize = 64;

/// What Keras calls attributes and groups of its files' roots, and nobody else.
const KERAS: [&[u8]; 5] =
    [b"keras_version", b"layer_names", b"weight_names", b"model_weights", b"_layer_checkpoint_dependencies"];

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
    let len = probe.known_len();
    let head = probe.head(SEARCHED_BYTES)?;
    let root = Root::read(&head[at..]);
    if let Some(word) = root.as_ref().and_then(Root::word_of_keras) {
        let of_keras = format!("an HDF5 file whose root has Keras's `{word}`");
        // A file that ends before it says: the library reads none of it, but the weights that are there are there.
        let whole = root.is_some_and(|root| len.is_none_or(|len| len >= root.end));
        return Ok(Some(match whole {
            true => Verdict::certain(Format::Hdf5, of_keras),
            false => Verdict::seen(Format::Hdf5, Confidence::Likely, format!("{of_keras}; it is cut")),
        }));
    }
    // In a group further down, or in a root of so many records that they lie elsewhere.
    let holds = |word: &[u8]| head.windows(word.len()).any(|window| window == word);
    if let Some(word) = KERAS.into_iter().find(|word| holds(word)) {
        let why = format!("an HDF5 file with Keras's `{}` somewhere near its start", String::from_utf8_lossy(word));
        return Ok(Some(Verdict::seen(Format::Hdf5, Confidence::Likely, why)));
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

/// The root group: what it is called that lies in it, attributes and links.
struct Root {
    names: Vec<Vec<u8>>,
    /// Where the file ends, by its superblock.
    end: u64,
}

impl Root {
    fn word_of_keras(&self) -> Option<String> {
        let has = |word: &[u8]| self.names.iter().any(|name| name == word);
        let word = KERAS.into_iter().find(|word| has(word));
        // Keras 3 names its groups so; each of the two alone others do as well.
        let word = word.or_else(|| (has(b"layers") && has(b"vars")).then_some(&b"layers"[..]));
        word.map(|word| String::from_utf8_lossy(word).into_owned())
    }

    /// From the signature on. `None` where not all of it is as the format has it.
    fn read(head: &[u8]) -> Option<Root> {
        let (sizes, addresses, entry) = match *head.get(8)? {
            // Versions of the parts, sizes, ranks of the trees, flags; then addresses and the root's entry.
            version @ 0..=1 => {
                let parts = [head.get(9)?, head.get(10)?, head.get(11)?, head.get(12)?, head.get(15)?];
                let ranks = [le(head, 16, 2)?, le(head, 18, 2)?];
                if parts.iter().any(|part| **part != 0) || ranks.contains(&0) {
                    return None;
                }
                ([*head.get(13)?, *head.get(14)?], if version == 0 { 24 } else { 28 }, true)
            }
            2..=3 => ([*head.get(9)?, *head.get(10)?], 12, false),
            _ => return None,
        };
        if sizes.iter().any(|size| ![2, 4, 8].contains(size)) {
            return None;
        }
        let file = Piece { head, offset: usize::from(sizes[0]), length: usize::from(sizes[1]) };
        let address = |number: usize| le(head, addresses + number * file.offset, file.offset);
        // Base, free space or extension, end; then what the driver keeps and the name of the root in no folder, or none of it.
        let (end, header) = (address(2)?, address(if entry { 5 } else { 3 })?);
        let header = usize::try_from(header).ok()?;
        // Behind the superblock and before the end.
        if header < addresses + 4 * file.offset || u64::try_from(header).ok()? >= end {
            return None;
        }
        Some(Root { names: file.names_of_header(header)?, end })
    }
}

/// A little-endian number.
fn le(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(size)?)?;
    Some(bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte)))
}

/// What there is of a file, and how wide its addresses and lengths are.
struct Piece<'a> {
    head: &'a [u8],
    offset: usize,
    length: usize,
}

/// Types of records.
const LINK: u64 = 0x06;
const ATTRIBUTE: u64 = 0x0c;
const CONTINUED: u64 = 0x10;
const SYMBOL_TABLE: u64 = 0x11;

impl Piece<'_> {
    /// Of the attributes and links in an object's header, as far as they lie in the head; `None` if it is no header.
    fn names_of_header(&self, at: usize) -> Option<Vec<Vec<u8>>> {
        let new = self.head.get(at..)?.get(..4)? == b"OHDR";
        let (first, len, counted) = if new {
            let flags = usize::from(*self.head.get(at + 5)?);
            if *self.head.get(at + 4)? != 2 || flags > 0x3f {
                return None;
            }
            let times = if flags & 0x20 != 0 { 16 } else { 0 };
            let phases = if flags & 0x10 != 0 { 4 } else { 0 };
            let width = 1 << (flags & 3);
            let sized = at + 6 + times + phases;
            (sized + width, le(self.head, sized, width)?, flags & 4 != 0)
        } else {
            let references = le(self.head, at + 4, 4)?;
            if le(self.head, at, 2)? != 1 || le(self.head, at + 2, 2)? == 0 || references == 0 {
                return None;
            }
            (at + 16, le(self.head, at + 8, 4)?, false)
        };
        let mut names = Vec::new();
        // A group has one; many would each bring the same names again.
        let mut has_table = false;
        let mut pieces = vec![(first, usize::try_from(len).ok()?)];
        let mut records = 0;
        for number in 0.. {
            let Some((from, len)) = pieces.get(number).copied().filter(|_| number < PIECES_MAX) else { break };
            let end = from.checked_add(len)?.min(self.head.len());
            let mut at = from;
            // Type, size, flags; in the older form wider, and in the newer with a count.
            let (kind_width, fixed) = if new { (1, if counted { 6 } else { 4 }) } else { (2, 8) };
            while records < RECORDS_MAX && at.saturating_add(fixed) <= end {
                records += 1;
                let kind = le(self.head, at, kind_width)?;
                let size = usize::try_from(le(self.head, at + kind_width, 2)?).ok()?;
                let body = self.head.get(at + fixed..(at + fixed + size).min(end)).unwrap_or_default();
                match kind {
                    // Every header's first record is one of those that there are.
                    0x19.. if records == 1 => return None,
                    ATTRIBUTE => names.extend(attribute_name(body)),
                    LINK => names.extend(link_name(body)),
                    SYMBOL_TABLE if !std::mem::replace(&mut has_table, true) => {
                        names.extend(self.names_of_heap(body).unwrap_or_default())
                    }
                    CONTINUED => {
                        let place = le(body, 0, self.offset).zip(le(body, self.offset, self.length));
                        let place = place.and_then(|(at, len)| usize::try_from(at).ok().zip(usize::try_from(len).ok()));
                        // The newer form has a mark before and a checksum behind.
                        pieces.extend(place.and_then(|(at, len)| match new {
                            true => Some((at.checked_add(4)?, len.checked_sub(8)?)),
                            false => Some((at, len)),
                        }));
                    }
                    _ => {}
                }
                at += fixed + size;
            }
        }
        (records > 0).then_some(names)
    }

    /// Of the links of a group of the older form: its heap holds their names and nothing else.
    fn names_of_heap(&self, table: &[u8]) -> Option<Vec<Vec<u8>>> {
        let heap = usize::try_from(le(table, self.offset, self.offset)?).ok()?;
        if self.head.get(heap..heap.checked_add(5)?)? != b"HEAP\0" {
            return None;
        }
        let len = usize::try_from(le(self.head, heap + 8, self.length)?).ok()?;
        let at = usize::try_from(le(self.head, heap + 8 + 2 * self.length, self.offset)?).ok()?;
        let data = self.head.get(at..at.checked_add(len)?.min(self.head.len()))?;
        let names = data.split(|byte| *byte == 0).filter(|name| (1..=NAME_MAX).contains(&name.len()));
        Some(names.take(RECORDS_MAX).map(<[u8]>::to_vec).collect())
    }
}

fn attribute_name(body: &[u8]) -> Option<Vec<u8>> {
    let len = usize::try_from(le(body, 2, 2)?).ok()?;
    let at = match body.first()? {
        1 | 2 => 8,
        3 => 9,
        _ => return None,
    };
    let name = body.get(at..at + len)?;
    name.split(|byte| *byte == 0).next().filter(|name| name.len() <= NAME_MAX).map(<[u8]>::to_vec)
}

fn link_name(body: &[u8]) -> Option<Vec<u8>> {
    let [1, flags, ..] = body else { return None };
    // Which kind, in which order, in which letters: each only if it says so.
    let at = 2 + usize::from(flags >> 3 & 1) + 8 * usize::from(flags >> 2 & 1) + usize::from(flags >> 4 & 1);
    let width = 1 << (flags & 3);
    let len = usize::try_from(le(body, at, width)?).ok()?;
    body.get(at + width..(at + width).checked_add(len)?).filter(|name| name.len() <= NAME_MAX).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{is, is_not};
    use super::*;

    /// However often a header names its heap, and whatever lies there.
    #[test]
    fn a_header_that_names_its_heap_again_and_again_brings_its_names_once() {
        let names = |heap: fn(usize) -> u8| {
            let mut head: Vec<u8> = (0..SEARCHED_BYTES).map(heap).collect();
            head[..32].fill(0);
            head[..5].copy_from_slice(b"HEAP\0");
            head[8..16].copy_from_slice(&(SEARCHED_BYTES as u64 - 64).to_le_bytes());
            head[24..32].copy_from_slice(&64u64.to_le_bytes());
            // A header of the older form: version, records, references, its length; each record names the heap at 0.
            let (at, records) = (512, 4000u16);
            head[at..at + 16].copy_from_slice(&[1, 0, 0xa0, 0x0f, 1, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0]);
            for record in head[at + 16..at + 16 + 24 * usize::from(records)].chunks_mut(24) {
                record.fill(0);
                (record[0], record[2]) = (SYMBOL_TABLE as u8, 16);
            }
            Piece { head: &head, offset: 8, length: 8 }.names_of_header(at).expect("a header")
        };
        assert_eq!(names(|at| if at % 2 == 0 { b'a' } else { 0 }).len(), RECORDS_MAX);
        // Names without an end, between which the records lie.
        assert!(names(|_| b'a').iter().all(|name| name.len() <= NAME_MAX));
    }

    /// A file of the newer form with these attributes in its root; `len` bytes behind a user's block of `at`.
    fn newer(at: usize, attributes: &[&[u8]], links: &[&[u8]], len: usize) -> Vec<u8> {
        let mut records = Vec::new();
        let mut record = |kind: u8, body: Vec<u8>| {
            records.push(kind);
            records.extend((body.len() as u16).to_le_bytes());
            records.push(0);
            records.extend(body);
        };
        for name in attributes {
            let sized = [&[3, 0][..], &(name.len() as u16 + 1).to_le_bytes(), &[8, 0, 4, 0, 0]].concat();
            record(0x0c, [sized, name.to_vec(), vec![0; 13]].concat());
        }
        for name in links {
            record(6, [&[1, 0, name.len() as u8][..], name, &[0; 8]].concat());
        }
        record(0, vec![0; 4]);
        let addresses = [0, u64::MAX, len as u64, 48];
        let mut out = vec![0; at];
        out.extend(SIGNATURE);
        out.extend([2, 8, 8, 0]);
        out.extend(addresses.iter().flat_map(|address| address.to_le_bytes()));
        out.extend([0; 4]);
        out.extend(b"OHDR\x02\x01");
        out.extend((records.len() as u16).to_le_bytes());
        out.extend(records);
        out.resize(at + len, 0);
        out
    }

    /// One of the older form, whose root's records go on elsewhere and whose links have a heap.
    fn older(attribute: &[u8], link: &[u8], len: usize) -> Vec<u8> {
        let mut out = SIGNATURE.to_vec();
        out.extend([0, 0, 0, 0, 0, 8, 8, 0, 4, 0, 16, 0, 0, 0, 0, 0]);
        for address in [0, u64::MAX, len as u64, u64::MAX, 0, 96] {
            out.extend(address.to_le_bytes());
        }
        out.resize(96, 0);
        out.extend([1, 0, 3, 0, 1, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0]);
        out.extend([0x10, 0, 16, 0, 0, 0, 0, 0]);
        out.extend([200_u64, 100].iter().flat_map(|n| n.to_le_bytes()));
        out.resize(200, 0);
        out.extend([0x11, 0, 16, 0, 0, 0, 0, 0]);
        out.extend([u64::MAX, 400].iter().flat_map(|n| n.to_le_bytes()));
        out.extend([0x0c, 0, 40, 0, 0, 0, 0, 0]);
        out.extend([1, 0, attribute.len() as u8 + 1, 0, 8, 0, 4, 0]);
        out.extend(attribute);
        out.resize(400, 0);
        out.extend(b"HEAP\0\0\0\0");
        out.extend([64_u64, 40, 500].iter().flat_map(|n| n.to_le_bytes()));
        out.resize(508, 0);
        out.extend(link);
        out.resize(len, 0);
        out
    }

    #[test]
    fn keras_is_certain_by_a_record_of_the_root_in_both_forms_of_the_format() {
        for at in [0, 512, 1024, 2048] {
            is("m", &newer(at, &[b"backend", b"layer_names"], &[], 9000), Format::Hdf5, Confidence::Certain);
        }
        is("m", &newer(0, &[], &[b"optimizer", b"model_weights"], 9000), Format::Hdf5, Confidence::Certain);
        is("m", &newer(0, &[], &[b"layers", b"vars"], 9000), Format::Hdf5, Confidence::Certain);
        is("m", &older(b"keras_version", b"x", 9000), Format::Hdf5, Confidence::Certain);
        is("m", &older(b"backend", b"model_weights", 9000), Format::Hdf5, Confidence::Certain);
    }

    #[test]
    fn keras_words_that_are_in_no_record_of_the_root_are_likely_at_most() {
        let mut deeper = newer(0, &[b"backend"], &[b"layers"], 9000);
        deeper[4000..4011].copy_from_slice(b"layer_names");
        is("m", &deeper, Format::Hdf5, Confidence::Likely);
        // The signature and the word, and nothing between them that is HDF5.
        let unsound = [SIGNATURE, &[2], &[0; 300], b"layer_names", &[0; 9000]].concat();
        is("m", &unsound, Format::Hdf5, Confidence::Likely);
        for (at, wrong) in [(9, 3), (10, 0), (36, 2), (48, b'o'), (52, 1)] {
            let mut bytes = newer(0, &[b"layer_names"], &[], 9000);
            bytes[at] = wrong;
            is("m", &bytes, Format::Hdf5, Confidence::Likely);
        }
        for (at, wrong) in [(9, 1), (13, 7), (16, 0), (96, 2), (98, 0)] {
            let mut bytes = older(b"keras_version", b"x", 9000);
            bytes[at] = wrong;
            is("m", &bytes, Format::Hdf5, Confidence::Likely);
        }
        // Shorter than it says.
        let cut = newer(0, &[b"layer_names"], &[], 9000);
        is("m", &cut[..8000], Format::Hdf5, Confidence::Likely);
    }

    #[test]
    fn other_data_is_only_mentioned() {
        is("weights.h5", &newer(0, &[], &[], 1 << 20), Format::Hdf5, Confidence::Likely);
        is("measured.h5", &newer(0, &[], &[b"layers"], 1 << 20), Format::Hdf5, Confidence::Info);
        is_not("weights.h5", &newer(0, &[], &[], 9000));
        is_not("elsewhere", &newer(100, &[b"layer_names"], &[], 9000));
        let mut version = newer(0, &[b"layer_names"], &[], 9000);
        version[8] = 9;
        is_not("another version", &version);
    }

    #[test]
    fn what_a_file_claims_of_itself_is_followed_to_no_end() {
        // Records that go on where they are, and addresses beyond all bounds.
        let mut circle = older(b"keras_version", b"x", 9000);
        circle[120..128].copy_from_slice(&112_u64.to_le_bytes());
        is("m", &circle, Format::Hdf5, Confidence::Likely);
        for at in [24_usize, 40, 64, 120, 128, 208, 216, 408, 424] {
            let mut bytes = older(b"keras_version", b"model_weights", 9000);
            bytes[at..at + 8].fill(0xff);
            super::super::tests::seen("m", &bytes);
        }
        for len in 0..600 {
            super::super::tests::seen("m", &older(b"keras_version", b"model_weights", 9000)[..len]);
            super::super::tests::seen("m", &newer(0, &[b"layer_names"], &[], 9000)[..len]);
        }
    }
}
