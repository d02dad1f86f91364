//! The entries of a zip archive, read forwards like a stream: no central directory is asked for or believed.
//!
//! In: a [`Source`] at the first local header (hostile). Out: each entry's name and plain bytes.
//! Promises: total; an entry that only the directory at the end could delimit (stored, its size told after it) ends the
//! walk, which is said ([`End::Unknown`]); an entry that cannot be unpacked does not, where its header tells its length.
//! Held by: the tests below, tests/scan.rs.

use std::io::{self, BufRead, BufReader, Read};

use super::source::{Inflated, Limited, Meter, Source, broken, fill};

/// How a walk ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// At the directory that follows the entries.
    Directory,
    /// Before an entry whose end only the directory tells.
    Unknown,
}

/// An entry that `each` is shown.
pub(super) struct Entry {
    pub name: Vec<u8>,
    /// Its end is known without unpacking it.
    pub delimited: bool,
    /// Why its bytes are not shown, and the length it claims to have.
    pub closed: Option<(&'static str, u64)>,
}

const LOCAL: u32 = 0x0403_4b50;
const DIRECTORY: [u32; 3] = [0x0201_4b50, 0x0605_4b50, 0x0606_4b50];
const ENCRYPTED: u16 = 1;
const SIZES_FOLLOW: u16 = 1 << 3;

pub(super) fn walk(
    source: &mut dyn Source,
    meter: &Meter,
    each: &mut dyn FnMut(&Entry, &mut dyn Source) -> io::Result<()>,
) -> io::Result<End> {
    let mut stream = Stream(BufReader::with_capacity(16 << 10, source));
    // Read already, where the end of an entry was found by it.
    let mut next = None;
    loop {
        let mut mark = [0; 4];
        match next.take() {
            Some(known) => mark = known,
            None if fill(&mut stream, &mut mark)? != 4 => return Err(broken("the archive ends between two entries")),
            None => {}
        }
        match u32::from_le_bytes(mark) {
            LOCAL => {}
            low if is_signing_block(&mut stream, low)? => continue,
            mark if DIRECTORY.contains(&mark) => return Ok(End::Directory),
            _ => return Err(broken("no zip header where the next entry should begin")),
        }
        meter.entry()?;
        let local = Local::read(&mut stream)?;
        let follow = local.flags & SIZES_FOLLOW != 0 && local.packed == 0;
        let mut entry = Entry { name: local.name, delimited: !follow, closed: None };
        match (local.method, follow) {
            (0, true) => return Ok(End::Unknown),
            _ if local.flags & ENCRYPTED != 0 => entry.closed = Some(("encrypted", local.plain)),
            (0 | 8, _) => {}
            _ => entry.closed = Some(("packed in another way than deflate", local.plain)),
        }
        match (local.method, follow, entry.closed.is_some()) {
            (_, true, true) => return Ok(End::Unknown),
            (8, true, false) => {
                let mut plain = Inflated::new(&mut stream, meter);
                each(&entry, &mut plain)?;
                plain.skip(u64::MAX)?;
                drop(plain);
                next = Some(descriptor(&mut stream)?);
            }
            (method, _, closed) => {
                let left = {
                    let mut packed = Limited { inner: &mut stream, left: local.packed };
                    match (method, closed) {
                        (8, false) => {
                            let mut packed = BufReader::with_capacity(16 << 10, Slice(&mut packed));
                            each(&entry, &mut Inflated::new(&mut packed, meter))?;
                        }
                        _ => each(&entry, &mut packed)?,
                    }
                    packed.left
                };
                if stream.skip(left)? != left {
                    return Err(broken("the archive ends in an entry"));
                }
                if local.flags & SIZES_FOLLOW != 0 {
                    next = Some(descriptor(&mut stream)?);
                }
            }
        }
    }
}

/// Passes over the block of signatures that Android has between the last entry and the directory: its length, that many bytes,
/// of which the last are the length once more and a name. `low` is the lower half of the length, read already.
fn is_signing_block(stream: &mut Stream, low: u32) -> io::Result<bool> {
    const NAME: &[u8] = b"APK Sig Block 42";
    // What is neither is no archive's any more, however much of it is read here.
    let mut high = [1; 4];
    if DIRECTORY.contains(&low) || fill(stream, &mut high)? != 4 || high != [0; 4] {
        return Ok(false);
    }
    let len = u64::from(low);
    let Some(signatures) = len.checked_sub(24) else { return Ok(false) };
    let mut end = [0; 24];
    let whole = stream.skip(signatures)? == signatures && fill(stream, &mut end)? == end.len();
    Ok(whole && end[..8] == len.to_le_bytes() && end[8..] == *NAME)
}

struct Local {
    flags: u16,
    method: u16,
    packed: u64,
    plain: u64,
    name: Vec<u8>,
}

impl Local {
    /// What stands behind the mark.
    fn read(stream: &mut Stream) -> io::Result<Local> {
        let mut fixed = [0; 26];
        if fill(stream, &mut fixed)? != fixed.len() {
            return Err(broken("the archive ends in a zip header"));
        }
        let u16_at = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let mut name = vec![0; usize::from(u16_at(22))];
        let mut extra = vec![0; usize::from(u16_at(24))];
        if fill(stream, &mut name)? != name.len() || fill(stream, &mut extra)? != extra.len() {
            return Err(broken("the archive ends in a zip header"));
        }
        let (mut packed, mut plain) = (u64::from(u32_at(14)), u64::from(u32_at(18)));
        let mut large = extra_field(&extra, 1).unwrap_or_default();
        for size in [&mut plain, &mut packed] {
            if *size == u64::from(u32::MAX)
                && let Some((first, rest)) = large.split_first_chunk::<8>()
            {
                *size = u64::from_le_bytes(*first);
                large = rest;
            }
        }
        Ok(Local { flags: u16_at(2), method: u16_at(4), packed, plain, name })
    }
}

fn extra_field(mut extra: &[u8], wanted: u16) -> Option<&[u8]> {
    while let [a, b, c, d, rest @ ..] = extra {
        let (field, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes([*c, *d])))?;
        if u16::from_le_bytes([*a, *b]) == wanted {
            return Some(field);
        }
        extra = rest;
    }
    None
}

/// Passes over the checksum and sizes behind an entry, with or without a mark, of 4 or of 8 bytes a size. The mark of what
/// follows, which is how their end is known.
fn descriptor(stream: &mut Stream) -> io::Result<[u8; 4]> {
    for word in 0..=6 {
        let mut four = [0; 4];
        if fill(stream, &mut four)? != 4 {
            break;
        }
        if word >= 3 && is_mark(four) {
            return Ok(four);
        }
    }
    Err(broken("no sizes behind a zip entry that promises them"))
}

fn is_mark(four: [u8; 4]) -> bool {
    let mark = u32::from_le_bytes(four);
    mark == LOCAL || DIRECTORY.contains(&mark)
}

struct Stream<'a>(BufReader<&'a mut dyn Source>);

impl Read for Stream<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}

impl BufRead for Stream<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.0.fill_buf()
    }
    fn consume(&mut self, len: usize) {
        self.0.consume(len);
    }
}

impl Source for Stream<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let held = self.0.buffer().len();
        let from_buffer = held.min(usize::try_from(len).unwrap_or(held));
        self.0.consume(from_buffer);
        let rest = len - from_buffer as u64;
        Ok(from_buffer as u64 + if rest > 0 { self.0.get_mut().skip(rest)? } else { 0 })
    }
    fn left(&self) -> Option<u64> {
        None
    }
}

/// A source as a plain reader.
struct Slice<'a, 'b>(&'a mut Limited<'b>);

impl Read for Slice<'_, '_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}
