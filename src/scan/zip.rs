//! The entries of a zip archive, read forwards like a stream. The directory at the end is asked for one thing: how long an
//! entry is that does not tell it itself (stored, its size told after it), where the source is a place in a file. In a pipe or a
//! packed layer nobody has the directory yet: there such an entry ends where what follows is true of it, checksum and length.
//!
//! In: a [`Source`] at the first local header (hostile). Out: each entry's name and plain bytes.
//! Promises: total, and linear; an entry whose end nothing tells is shown with all that follows it, and ends the walk, which is
//! said ([`End::Unknown`]); an entry that cannot be unpacked does not, where its length is known. What the directory tells is
//! believed only where it leads to the next header.
//! Held by: the tests below, tests/scan.rs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use super::source::{FileRange, Inflated, Limited, Meter, Source, broken, drain, fill};

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
    /// Its end is known, or looked for, without unpacking it.
    pub delimited: bool,
    /// Why its bytes are not shown, and the length it claims to have.
    pub closed: Option<(&'static str, u64)>,
}

/// Entries of one directory that are remembered: some 10 MiB of them.
const DIRECTORY_ENTRIES_MAX: u64 = 1 << 18;

const LOCAL: u32 = 0x0403_4b50;
/// Before the checksum and sizes behind an entry, from most writers.
const TOLD: [u8; 4] = *b"PK\x07\x08";
/// That mark, a checksum, two sizes of 8 bytes, and the mark of what follows.
const TOLD_BYTES_MAX: usize = 4 + 4 + 8 + 8 + 4;
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
    let mut stream = Stream::new(source);
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
            // A directory that is at hand and does not tell of the entry contradicts whatever stands behind it.
            (method, true, is_closed) if place.is_none() && (method == 0 || is_closed) => {
                let mut told = ToldAfter::new(&mut stream, is_closed);
                if !is_closed {
                    // What is broken in it holds nobody up: the end is looked for in any case.
                    entry.delimited = true;
                    each(&entry, &mut told)?;
                }
                told.skip(u64::MAX)?;
                let Some(end) = told.end else { return Ok(End::Unknown) };
                stream.consume(end.bytes);
                if let Some((_, plain)) = &mut entry.closed {
                    *plain = end.plain;
                    entry.delimited = true;
                    each(&entry, &mut Limited { inner: &mut stream, left: 0 })?;
                }
            }
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

/// A stored entry of which nobody knows how long it is, up to where what stands behind it is true of it.
struct ToldAfter<'s, 'a> {
    stream: &'s mut Stream<'a>,
    /// The checksum is of bytes that are not there: encrypted, or packed. Their length and the mark behind them say enough.
    is_closed: bool,
    crc: flate2::Crc,
    /// Bytes that were read.
    len: u64,
    /// What stands behind them; None before the end, and at the end of the archive.
    end: Option<Told>,
}

/// What stands behind an entry.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    crc: u32,
    plain: u64,
    /// What it takes itself.
    bytes: usize,
}

impl Told {
    /// What `ahead` begins with, if it tells of an entry of `len` bytes.
    fn of(ahead: &[u8], len: u64, is_closed: bool) -> Option<Told> {
        let marked = ahead.starts_with(&TOLD);
        if is_closed && !marked {
            return None;
        }
        let mark = if marked { TOLD.len() } else { 0 };
        // The wide ones first: of nothing both tell with zeros.
        [8, 4].into_iter().find_map(|wide| {
            let bytes = mark + 4 + 2 * wide;
            let fields = ahead.get(mark..bytes)?;
            let size = |at| if wide == 8 { u64_at(fields, at) } else { u64::from(u32_at(fields, at)) };
            let (packed, plain) = (size(4), size(4 + wide));
            let next = ahead.get(bytes..bytes + 4).and_then(|four| <[u8; 4]>::try_from(four).ok());
            // Signatures of Android may stand behind the last entry: there its own mark and the checksum do.
            let surely = next.is_some_and(is_mark) || (marked && !is_closed);
            (packed == len && (plain == len || is_closed) && surely).then(|| Told {
                crc: u32_at(fields, 0),
                plain,
                bytes,
            })
        })
    }
}

impl<'s, 'a> ToldAfter<'s, 'a> {
    fn new(stream: &'s mut Stream<'a>, is_closed: bool) -> ToldAfter<'s, 'a> {
        ToldAfter { stream, is_closed, crc: flate2::Crc::new(), len: 0, end: None }
    }
}

impl Read for ToldAfter<'_, '_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if self.end.is_some() {
            return Ok(0);
        }
        let ahead = self.stream.ahead(TOLD_BYTES_MAX)?;
        // Where the archive goes on, the last few bytes are looked at once those behind them are there.
        let looked = if ahead.len() < TOLD_BYTES_MAX { ahead.len() } else { ahead.len() - (TOLD_BYTES_MAX - 1) };
        let most = looked.min(room.len());
        let (mut n, mut summed) = (0, 0);
        while n < most {
            let (here, len) = (&ahead[n..], self.len + n as u64);
            // One comparison of each kind rules out nearly every place, so that all of it is summed up once.
            let may = here.starts_with(&TOLD) || here.get(4..8).is_some_and(|low| low == (len as u32).to_le_bytes());
            if let Some(told) = may.then(|| Told::of(here, len, self.is_closed)).flatten() {
                self.crc.update(&ahead[summed..n]);
                summed = n;
                if self.is_closed || told.crc == self.crc.sum() {
                    self.end = Some(told);
                    break;
                }
            }
            n += 1;
        }
        self.crc.update(&ahead[summed..n]);
        room[..n].copy_from_slice(&ahead[..n]);
        self.stream.consume(n);
        self.len += n as u64;
        Ok(n)
    }
}

impl Source for ToldAfter<'_, '_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        drain(self, len)
    }
    fn left(&self) -> Option<u64> {
        None
    }
}

struct Stream<'a> {
    inner: &'a mut dyn Source,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were read, and those that are there.
    used: usize,
    have: usize,
    /// Bytes of the archive that are behind us.
    at: u64,
}

impl<'a> Stream<'a> {
    fn new(inner: &'a mut dyn Source) -> Stream<'a> {
        Stream { inner, buffer: vec![0; 16 << 10], used: 0, have: 0, at: 0 }
    }

    fn held(&self) -> usize {
        self.have - self.used
    }

    /// What comes next: `len` bytes or more, fewer only at the end.
    fn ahead(&mut self, len: usize) -> io::Result<&[u8]> {
        if self.held() < len {
            self.buffer.copy_within(self.used..self.have, 0);
            (self.used, self.have) = (0, self.held());
        }
        while self.held() < len {
            match self.inner.read(&mut self.buffer[self.have..]) {
                Ok(0) => break,
                Ok(n) => self.have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(&self.buffer[self.used..self.have])
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        // What is large goes past the buffer.
        if self.held() == 0 && room.len() >= self.buffer.len() {
            let n = self.inner.read(room)?;
            self.at += n as u64;
            return Ok(n);
        }
        let ahead = self.ahead(1)?;
        let n = room.len().min(ahead.len());
        room[..n].copy_from_slice(&ahead[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Stream<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.ahead(1)
    }
    fn consume(&mut self, len: usize) {
        self.used += len;
        self.at += len as u64;
    }
}

impl Source for Stream<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let from_buffer = self.held().min(usize::try_from(len).unwrap_or(usize::MAX));
        self.used += from_buffer;
        let rest = len - from_buffer as u64;
        let passed = from_buffer as u64 + if rest > 0 { self.inner.skip(rest)? } else { 0 };
        self.at += passed;
        Ok(passed)
    }
    fn left(&self) -> Option<u64> {
        None
    }
    fn place(&self) -> Option<(Arc<File>, u64)> {
        let (file, at) = self.inner.place()?;
        Some((file, at - self.held() as u64))
    }
}

/// A source as a plain reader.
struct Slice<'a, 'b>(&'a mut Limited<'b>);

impl Read for Slice<'_, '_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Limits;
    use super::super::source::Memory;
    use super::*;

    const STORED: u16 = 0;

    /// An entry as a streaming writer makes it: a header that tells no size, the bytes, and what is told behind them.
    fn entry(name: &str, (flags, method): (u16, u16), body: &[u8], told: &[u8]) -> Vec<u8> {
        let head = [20, flags | SIZES_FOLLOW, method, 0, 0].map(u16::to_le_bytes).concat();
        let name_len = [name.len() as u16, 0].map(u16::to_le_bytes).concat();
        [&LOCAL.to_le_bytes()[..], &head, &[0; 12], &name_len, name.as_bytes(), body, told].concat()
    }

    /// Checksum and sizes in each of the ways that writers have.
    fn told_ways(body: &[u8]) -> [Vec<u8>; 4] {
        let mut crc = flate2::Crc::new();
        crc.update(body);
        let crc = crc.sum().to_le_bytes();
        let (short, long) = ((body.len() as u32).to_le_bytes(), (body.len() as u64).to_le_bytes());
        let (short, long) = ([crc.as_slice(), &short, &short].concat(), [crc.as_slice(), &long, &long].concat());
        [short.clone(), [&TOLD[..], &short].concat(), long.clone(), [&TOLD[..], &long].concat()]
    }

    /// Names and lengths of the entries that are shown, and how the walk ended. Nothing but bytes in order is at hand.
    fn walked(archive: &[u8]) -> (Vec<(String, u64)>, io::Result<End>) {
        let meter = Meter::new(Limits::default(), None, &|_| {});
        let mut seen = Vec::new();
        let end = walk(&mut Memory(archive), &meter, &mut |entry, plain| {
            let len = entry.closed.map_or_else(|| plain.skip(u64::MAX), |(_, len)| Ok(len))?;
            seen.push((String::from_utf8_lossy(&entry.name).into_owned(), len));
            Ok(())
        });
        (seen, end)
    }

    #[test]
    fn a_stored_entry_ends_where_what_stands_behind_it_is_true_of_it() {
        // Decoys: marks of all kinds, and what would be true a few bytes further on.
        let mut large: Vec<u8> = (0..100_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for at in (0..large.len() - 40).step_by(97) {
            large[at..at + 4].copy_from_slice(&[TOLD, LOCAL.to_le_bytes()][at % 2]);
            large[at + 8..at + 12].copy_from_slice(&(at as u32).to_le_bytes());
            large[at + 12..at + 16].copy_from_slice(&(at as u32).to_le_bytes());
        }
        let within = [entry("b", (0, STORED), b"bytes", &told_ways(b"bytes")[1]), large.clone()].concat();
        let bodies = [&b""[..], b"x", &[0; 40], &TOLD, &large[..16 << 10], &large[..(16 << 10) - 50], &large, &within];
        for way in 0..4 {
            let mut archive = Vec::new();
            for (i, body) in bodies.iter().enumerate() {
                archive.extend(entry(&i.to_string(), (0, STORED), body, &told_ways(body)[way]));
            }
            archive.extend(DIRECTORY[0].to_le_bytes());
            let (seen, end) = walked(&archive);
            assert_eq!(end.expect("whole"), End::Directory, "way {way}");
            let wanted: Vec<_> =
                bodies.iter().enumerate().map(|(i, body)| (i.to_string(), body.len() as u64)).collect();
            assert_eq!(seen, wanted, "way {way}");
        }
    }

    #[test]
    fn what_is_not_true_of_a_stored_entry_is_no_end_of_it() {
        let body = b"bytes".repeat(100);
        for (way, told) in told_ways(&body).into_iter().enumerate() {
            for at in 0..told.len() {
                let mut lies = told.clone();
                lies[at] ^= 1;
                let rest = [&lies[..], &DIRECTORY[0].to_le_bytes()].concat();
                let (seen, end) = walked(&entry("a", (0, STORED), &body, &rest));
                assert_eq!(end.expect("read to its end"), End::Unknown, "way {way}, byte {at}");
                assert_eq!(seen, [("a".to_owned(), (body.len() + rest.len()) as u64)], "way {way}, byte {at}");
            }
        }
    }

    #[test]
    fn an_entry_that_cannot_be_opened_ends_by_its_length() {
        let body = b"as good as noise".repeat(2000);
        let behind = entry("z", (0, STORED), b"z", &told_ways(b"z")[1]);
        for (way, told) in told_ways(&body).into_iter().enumerate() {
            for kind in [(ENCRYPTED, 8), (0, 93)] {
                let archive =
                    [entry("a", kind, &body, &told), behind.clone(), DIRECTORY[0].to_le_bytes().to_vec()].concat();
                let (seen, end) = walked(&archive);
                let wanted = [("a".to_owned(), body.len() as u64), ("z".to_owned(), 1)];
                // Without its own mark there is too little to go by.
                let (wanted, known) =
                    if way % 2 == 1 { (&wanted[..], End::Directory) } else { (&[][..], End::Unknown) };
                assert_eq!((seen.as_slice(), end.expect("read")), (wanted, known), "way {way}, {kind:?}");
            }
        }
    }
}
