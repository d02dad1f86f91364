//! The entries of a zip archive, read forwards like a stream. The directory at the end is asked for one thing: how long an
//! entry is that does not tell it itself (stored, its size told after it), where the source is a place in a file.
//!
//! In: a [`Source`] at the first local header (hostile). Out: each entry's name and plain bytes.
//! Promises: total; an entry whose end nothing tells is shown with all that follows it, and ends the walk, which is said
//! ([`End::Unknown`]); an entry that cannot be unpacked does not, where its length is known. What the directory tells is
//! believed only where it leads to the next header.
//! Held by: tests/scan.rs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use super::source::{FileRange, Inflated, Limited, Meter, Source, broken, fill};

/// How a walk ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// At the directory that follows the entries.
    Directory,
    /// At an entry whose end nothing tells, or that cannot be unpacked to find it.
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

/// Entries of one directory that are remembered: some 10 MiB of them.
const DIRECTORY_ENTRIES_MAX: u64 = 1 << 18;

const LOCAL: u32 = 0x0403_4b50;
const DIRECTORY: [u32; 3] = [0x0201_4b50, 0x0605_4b50, 0x0606_4b50];
const ENCRYPTED: u16 = 1;
const SIZES_FOLLOW: u16 = 1 << 3;

pub(super) fn walk(
    source: &mut dyn Source,
    meter: &Meter,
    each: &mut dyn FnMut(&Entry, &mut dyn Source) -> io::Result<()>,
) -> io::Result<End> {
    let place = source.place().zip(source.left());
    let mut directory = None;
    let mut stream = Stream { inner: BufReader::with_capacity(16 << 10, source), at: 0 };
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
        let start = stream.at - 4;
        let mut local = Local::read(&mut stream)?;
        let told_after = local.flags & SIZES_FOLLOW != 0;
        let mut follow = told_after && local.packed == 0;
        let mut entry = Entry { name: local.name, delimited: true, closed: None };
        match local.method {
            _ if local.flags & ENCRYPTED != 0 => entry.closed = Some(("encrypted", local.plain)),
            0 | 8 => {}
            _ => entry.closed = Some(("packed in another way than deflate", local.plain)),
        }
        // What is deflated ends by itself.
        if follow && (local.method != 8 || entry.closed.is_some()) {
            let directory = directory.get_or_insert_with(|| {
                let read = |((file, at), len): &((Arc<File>, u64), u64)| Directory::read(file, *at, *len, meter);
                // One that cannot be read tells nothing; the walk goes on without it, as in a pipe.
                place.as_ref().and_then(|place| read(place).ok()).unwrap_or_default()
            });
            if let Some(sizes) = directory.sizes_at(start, stream.at) {
                (local.packed, local.plain, follow) = (sizes.packed, sizes.plain, false);
                entry.closed = entry.closed.map(|(why, _)| (why, sizes.plain));
            }
        }
        entry.delimited = !follow;
        match (local.method, follow, entry.closed.is_some()) {
            (_, true, true) => return Ok(End::Unknown),
            (0, true, false) => {
                each(&entry, &mut stream)?;
                return Ok(End::Unknown);
            }
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
                if told_after {
                    next = Some(descriptor(&mut stream)?);
                }
            }
        }
    }
}

/// What the directory at the end of an archive tells of each entry, by the place of its header in the archive.
#[derive(Default)]
struct Directory {
    sizes: BTreeMap<u64, Sizes>,
}

struct Sizes {
    packed: u64,
    plain: u64,
}

impl Directory {
    /// Of the entry whose header lies at `header` and ends at `body`, if no other is said to begin in its bytes.
    fn sizes_at(&self, header: u64, body: u64) -> Option<&Sizes> {
        let sizes = self.sizes.get(&header)?;
        let end = body.checked_add(sizes.packed)?;
        let next = self.sizes.range(header + 1..).next();
        next.is_none_or(|(next, _)| *next >= end).then_some(sizes)
    }

    /// Of the archive that lies in `file` at `start`, `len` bytes.
    fn read(file: &Arc<File>, start: u64, len: u64, meter: &Meter) -> io::Result<Directory> {
        let part = |at: u64, len: u64| FileRange::new(file.clone(), start.saturating_add(at), len, meter);
        // The record at the end has a comment of up to 64 KiB behind it.
        const END: usize = 22;
        let tail_len = len.min((END + usize::from(u16::MAX)) as u64);
        let tail_at = len - tail_len;
        let mut tail = Vec::new();
        part(tail_at, tail_len).read_to_end(&mut tail)?;
        let is_end = |at: &usize| {
            let record = &tail[*at..];
            record.starts_with(&DIRECTORY[1].to_le_bytes()) && END + usize::from(u16_at(record, 20)) == record.len()
        };
        let end = (0..=tail.len().saturating_sub(END)).rev().find(|at| tail.len() >= END && is_end(at));
        let end = end.ok_or_else(|| broken("no directory at the end of a zip archive"))?;
        let (mut size, mut at) = (u64::from(u32_at(&tail[end..], 12)), u64::from(u32_at(&tail[end..], 16)));
        if (size == u64::from(u32::MAX) || at == u64::from(u32::MAX))
            && let Some(locator) = end.checked_sub(20).map(|at| &tail[at..end])
            && locator.starts_with(b"PK\x06\x07")
        {
            let mut record = [0; 56];
            let place = u64_at(locator, 8);
            if place > len || fill(&mut part(place, len - place), &mut record)? != record.len() {
                return Err(broken("no directory of a large zip archive where its end says"));
            }
            (size, at) = (u64_at(&record, 40), u64_at(&record, 48));
        }
        if at.checked_add(size).is_none_or(|end| end > len) {
            return Err(broken("the directory of a zip archive lies outside it"));
        }
        let mut entries = part(at, size);
        let mut directory = Directory::default();
        for _ in 0..DIRECTORY_ENTRIES_MAX {
            let mut fixed = [0; 46];
            if fill(&mut entries, &mut fixed)? != fixed.len() || !fixed.starts_with(&DIRECTORY[0].to_le_bytes()) {
                return Ok(directory);
            }
            let mut extra = vec![0; usize::from(u16_at(&fixed, 30))];
            entries.skip(u64::from(u16_at(&fixed, 28)))?;
            if fill(&mut entries, &mut extra)? != extra.len() {
                return Ok(directory);
            }
            entries.skip(u64::from(u16_at(&fixed, 32)))?;
            let [mut packed, mut plain, mut header] = [20, 24, 42].map(|at| u64::from(u32_at(&fixed, at)));
            large_sizes(&extra, [&mut plain, &mut packed, &mut header]);
            // Of two that claim one header none is believed.
            if directory.sizes.insert(header, Sizes { packed, plain }).is_some() {
                return Err(broken("two entries of a zip archive at one place"));
            }
        }
        Err(broken("more entries in the directory of a zip archive than are remembered"))
    }
}

/// Fields that did not fit into 32 bits stand in a record of their own, in this order, those that did are left out.
fn large_sizes<const N: usize>(extra: &[u8], fields: [&mut u64; N]) {
    let mut large = extra_field(extra, 1).unwrap_or_default();
    for field in fields {
        if *field == u64::from(u32::MAX)
            && let Some((first, rest)) = large.split_first_chunk::<8>()
        {
            *field = u64::from_le_bytes(*first);
            large = rest;
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
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
        let mut name = vec![0; usize::from(u16_at(&fixed, 22))];
        let mut extra = vec![0; usize::from(u16_at(&fixed, 24))];
        if fill(stream, &mut name)? != name.len() || fill(stream, &mut extra)? != extra.len() {
            return Err(broken("the archive ends in a zip header"));
        }
        let [mut packed, mut plain] = [14, 18].map(|at| u64::from(u32_at(&fixed, at)));
        large_sizes(&extra, [&mut plain, &mut packed]);
        Ok(Local { flags: u16_at(&fixed, 2), method: u16_at(&fixed, 4), packed, plain, name })
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

struct Stream<'a> {
    inner: BufReader<&'a mut dyn Source>,
    /// Bytes of the archive that are behind us.
    at: u64,
}

impl Read for Stream<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(room)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl BufRead for Stream<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }
    fn consume(&mut self, len: usize) {
        self.inner.consume(len);
        self.at += len as u64;
    }
}

impl Source for Stream<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let held = self.inner.buffer().len();
        let from_buffer = held.min(usize::try_from(len).unwrap_or(held));
        self.inner.consume(from_buffer);
        let rest = len - from_buffer as u64;
        let passed = from_buffer as u64 + if rest > 0 { self.inner.get_mut().skip(rest)? } else { 0 };
        self.at += passed;
        Ok(passed)
    }
    fn left(&self) -> Option<u64> {
        None
    }
    fn place(&self) -> Option<(Arc<File>, u64)> {
        let (file, at) = self.inner.get_ref().place()?;
        Some((file, at - self.inner.buffer().len() as u64))
    }
}

/// A source as a plain reader.
struct Slice<'a, 'b>(&'a mut Limited<'b>);

impl Read for Slice<'_, '_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}
