//! The entries of a tar stream, one after the other, in bounded memory.
//!
//! In: a [`Source`] (hostile). Out: for each entry its name, type and bytes as a program that unpacks would see them: pax and
//! GNU long names and sizes, holes of sparse files as zeros.
//! Promises: total; a header's claim is never a reason to allocate; what is longer than a name, a set of pax records or a
//! map of holes can be is refused ([`Trouble::Broken`]); an archive that is cut short is never taken for a whole one;
//! where a program that takes other bytes for an entry's would find other entries, that is said ([`TarReader::doubt`]).
//! Entries behind the end mark are found too: they are in the image, though nothing unpacks them.
//! Not here: what the bytes are (`detect`). Fields of a header are read by the `tar` crate, whose own reader of entries
//! takes pax records and long names of any length into memory.
//! Held by: the tests below, tests/scan.rs.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use tar::{EntryType, Header};

use super::source::{Limited, Meter, Source, Trouble, broken, drain, fill};

pub(super) const BLOCK: usize = 512;

/// Pax records before one entry; Go's reader stops at the same.
const PAX_BYTES_MAX: u64 = 1 << 20;

/// The longest name or link: Linux takes 4095 bytes of path, and nobody has ten times as much.
const NAME_BYTES_MAX: u64 = 64 << 10;

/// Headers that only tell of the next one.
const PREFIXES_MAX: usize = 16;

/// Pieces of one sparse file.
const PIECES_MAX: usize = 1 << 16;

/// Places at which other programs go on, of one archive.
const OTHERS_MAX: usize = 1 << 16;

/// Zeros behind an end mark that are read for what may come after them. Tapes pad to some MiB; a hole in a file on a disk or in
/// an archive costs nobody anything, and would be read for ever.
const ZEROS_BYTES_MAX: u64 = 64 << 20;

/// One entry, before its bytes are read.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: Kind,
    /// Bytes as they would be unpacked.
    pub len: u64,
    pieces: Option<Vec<(u64, u64)>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Folder,
    HardLink,
    Symlink,
    /// A device or a pipe.
    Other,
    /// Bytes behind the end of the archive that are no archive.
    Behind,
}

impl Entry {
    fn is_behind(&self) -> bool {
        self.kind == Kind::Behind
    }
}

pub(super) struct TarReader<'a> {
    source: Watched<'a>,
    meter: &'a Meter<'a>,
    /// Stored bytes of the entry at hand, and the padding behind them.
    stored: u64,
    padding: u64,
    /// Bytes behind us, the entry at hand not counted.
    at: u64,
    /// Where the entry at hand ends.
    end: u64,
    ended: bool,
    /// The entry at hand is all that is left.
    behind: bool,
    /// The next block and how much of it there is, where it was looked at before its turn.
    peeked: Option<([u8; BLOCK], usize)>,
    /// Pax records came before this or an earlier entry.
    pax_seen: bool,
    /// Where programs go on that pass over bytes of an entry that can hold none.
    others: BTreeSet<u64>,
    /// The first of these within the entry at hand.
    within: Option<u64>,
    doubt: Option<String>,
    doubted: bool,
}

/// Whether a block is the header of an entry.
pub(super) fn is_header(block: &[u8]) -> bool {
    let Some(block) = block.get(..BLOCK) else { return false };
    if block.iter().all(|byte| *byte == 0) {
        return false;
    }
    let header = Header::from_byte_slice(block);
    let sum = block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) });
    header.cksum().is_ok_and(|told| told == sum.sum::<u32>())
}

impl<'a> TarReader<'a> {
    pub fn new(source: &'a mut dyn Source, meter: &'a Meter<'a>) -> TarReader<'a> {
        TarReader {
            source: Watched { inner: source, wait: None, block: Vec::new(), header_seen: false },
            meter,
            stored: 0,
            padding: 0,
            at: 0,
            end: 0,
            ended: false,
            behind: false,
            peeked: None,
            pax_seen: false,
            others: BTreeSet::new(),
            within: None,
            doubt: None,
            doubted: false,
        }
    }

    /// The next entry, whatever was left of the last one; `None` at the end.
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        let next = self.next_entry();
        // Whoever is further on does not stop here.
        if !self.others.is_empty() && next.as_ref().map_or(true, |next| next.as_ref().is_some_and(Entry::is_behind)) {
            self.differ();
        }
        next
    }

    /// Why another program may find other entries than those that came so far; once an archive.
    pub fn doubt(&mut self) -> Option<String> {
        self.doubt.take()
    }

    fn differ(&mut self) {
        self.others.clear();
        if !std::mem::replace(&mut self.doubted, true) {
            let what = "an entry that can hold no bytes (a link, folder, device or pipe) tells a size: programs that pass \
                        over so many bytes find other entries than those that do not";
            self.doubt = Some(what.into());
        }
    }

    fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        self.finish_entry()?;
        let mut long_name = None;
        let mut long_link = None;
        let mut pax = Pax::default();
        for prefix in 0..PREFIXES_MAX {
            let Some((block, behind_end)) = self.header(prefix == 0)? else { return Ok(None) };
            if !is_header(&block) {
                if behind_end {
                    return Ok(Some(self.behind()));
                }
                return Err(broken(format!("no tar header at byte {}: the archive is broken or cut", self.at - 512)));
            }
            let header = Header::from_byte_slice(&block).clone();
            let size = header.entry_size().map_err(|e| broken(format!("a size in a tar header: {e}")))?;
            match header.entry_type() {
                EntryType::GNULongName => long_name = Some(self.text(size, NAME_BYTES_MAX, "a name")?),
                EntryType::GNULongLink => long_link = Some(self.text(size, NAME_BYTES_MAX, "a link")?),
                EntryType::XHeader => {
                    self.pax_seen = true;
                    pax = Pax::parse(&self.text(size, PAX_BYTES_MAX, "a set of pax records")?)?;
                }
                // Defaults for all that follow; nothing of weight is ever in them.
                EntryType::XGlobalHeader => {
                    self.pax_seen = true;
                    self.pass(size)?;
                }
                kind => return self.entry(&header, kind, long_name, long_link, pax).map(Some),
            }
        }
        Err(broken(format!("more than {PREFIXES_MAX} headers before one entry, at byte {}", self.at)))
    }

    /// The bytes of the entry that `next` just gave.
    pub fn body<'b>(&'b mut self, entry: &'b Entry) -> Body<'b> {
        Body {
            inner: Limited { inner: &mut self.source, left: self.stored },
            meter: self.meter,
            stored: self.stored,
            left: &mut self.stored,
            pieces: entry.pieces.as_deref(),
            at: 0,
            len: entry.len,
            zeros: 0,
        }
    }

    /// A block that is not empty, and whether the end mark came before it. `first`: what stands before an entry begins here.
    fn header(&mut self, first: bool) -> io::Result<Option<([u8; BLOCK], bool)>> {
        if self.others.first().is_some_and(|other| *other < self.at) {
            self.differ();
        }
        let mut behind = self.ended;
        let mut zeros = 0;
        loop {
            let (block, got) = match self.peeked.take() {
                Some(peeked) => peeked,
                None => self.block()?,
            };
            // Who goes on here finds what we find; who goes on behind a name or a size that is told apart does not.
            if first {
                self.others.remove(&self.at);
            }
            self.at += got as u64;
            match got {
                0 => return Ok(None),
                BLOCK if block.iter().any(|byte| *byte != 0) => return Ok(Some((block, behind))),
                BLOCK if zeros >= ZEROS_BYTES_MAX => {
                    return Err(Trouble::Limit(format!(
                        "more than {ZEROS_BYTES_MAX} bytes of zeros behind the end of a tar archive, and it is not known \
                         what follows them; cut them off"
                    ))
                    .into());
                }
                BLOCK => {
                    (behind, self.ended) = (true, true);
                    zeros += BLOCK as u64;
                }
                // Padding to something else than blocks.
                _ if behind && block.iter().all(|byte| *byte == 0) => return Ok(None),
                _ if behind => return Ok(Some((block, true))),
                _ => return Err(broken(format!("the archive ends in a header, at byte {}", self.at))),
            }
        }
    }

    fn block(&mut self) -> io::Result<([u8; BLOCK], usize)> {
        let mut block = [0; BLOCK];
        let got = fill(&mut self.source, &mut block)?;
        Ok((block, got))
    }

    fn entry(
        &mut self,
        header: &Header,
        kind: EntryType,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        pax: Pax,
    ) -> io::Result<Entry> {
        let size = header.entry_size().map_err(|e| broken(format!("a size in a tar header: {e}")))?;
        let mut stored = pax.size.unwrap_or(size);
        let path = pax.path.or(long_name).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link.or(long_link).unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned());
        let kind = match kind {
            EntryType::Directory => Kind::Folder,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Char | EntryType::Block | EntryType::Fifo => Kind::Other,
            // In the oldest form a folder is a file whose name ends so. Of a later file's name the slash is dropped by some.
            _ if path.ends_with(b"/") && (header.as_old().linkflag == [0] || stored == 0) => Kind::Folder,
            // Types that no program knows are unpacked as files, as POSIX has it.
            _ => Kind::File,
        };
        if kind == Kind::File {
            self.stored = stored;
            self.padding = stored.next_multiple_of(BLOCK as u64).saturating_sub(stored);
        } else if stored != 0 {
            // All leave out what an old tar says of a link: the size of what it leads to.
            let is_old_link = kind == Kind::HardLink && pax.size.is_none() && !self.pax_seen;
            self.bodiless(std::mem::take(&mut stored), is_old_link)?;
        }
        let mut len = stored;
        let mut pieces = None;
        if kind != Kind::File {
            // No bytes, and so no holes.
        } else if header.entry_type() == EntryType::GNUSparse {
            (pieces, len) = self.old_gnu_pieces(header).map(|(pieces, len)| (Some(pieces), len))?;
        } else if pax.sparse_1 {
            let (map, taken) = self.map_in_data(stored)?;
            self.stored = stored - taken;
            (pieces, len) = (Some(map), pax.real_len.unwrap_or(stored));
        } else if !pax.pieces.is_empty() {
            (pieces, len) = (Some(pax.pieces), pax.real_len.unwrap_or(stored));
        }
        if let Some(pieces) = &pieces {
            check_pieces(pieces, len, self.stored)?;
        }
        let path = pax.sparse_name.unwrap_or(path);
        // What no file is long enough for is cut, which is found when it is passed over.
        self.end = self.at.saturating_add(self.stored).saturating_add(self.padding);
        self.within = self.others.range(self.at..self.end).next().copied();
        self.source.wait = self.within.map(|other| other - self.at);
        Ok(Entry { path, link, kind, len, pieces })
    }

    /// An entry that can hold no bytes, and tells of `size`.
    ///
    /// Go's reader, with which engines unpack images, and Python's go on right behind the header. GNU tar and libarchive pass
    /// over so many bytes for some of these types, and for some only in some archives. So whoever makes an archive could
    /// choose which of them meets what. This reader goes on where engines do if an entry or an end is there, and remembers
    /// where the others are then.
    fn bodiless(&mut self, size: u64, is_old_link: bool) -> io::Result<()> {
        let padded = size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| broken("an impossible size"))?;
        let (block, got) = self.block()?;
        if got == BLOCK && block.iter().any(|byte| *byte != 0) && !is_header(&block) {
            // Bytes do lie there. Who looks for an entry among them may find one.
            self.differ();
            self.at += BLOCK as u64;
            self.stored = padded - BLOCK as u64;
            return Ok(());
        }
        self.peeked = Some((block, got));
        if !is_old_link && !self.doubted {
            // What lies behind any end is found by nobody.
            self.others.extend(self.at.checked_add(padded));
            if self.others.len() > OTHERS_MAX {
                self.differ();
            }
        }
        Ok(())
    }

    /// The map of holes of GNU tar's own format: four pieces in the header, 21 in each block that follows.
    fn old_gnu_pieces(&mut self, header: &Header) -> io::Result<(Vec<(u64, u64)>, u64)> {
        let wrong = |e: io::Error| broken(format!("the map of a sparse file: {e}"));
        let gnu = header.as_gnu().ok_or_else(|| broken("a sparse file without GNU's header"))?;
        let mut pieces = Vec::new();
        for piece in gnu.sparse.iter().filter(|piece| !piece.is_empty()) {
            pieces.push((piece.offset().map_err(wrong)?, piece.length().map_err(wrong)?));
        }
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            if fill(&mut self.source, block.as_mut_bytes())? != BLOCK {
                return Err(broken("the archive ends in the map of a sparse file"));
            }
            self.at += BLOCK as u64;
            for piece in block.sparse().iter().filter(|piece| !piece.is_empty()) {
                pieces.push((piece.offset().map_err(wrong)?, piece.length().map_err(wrong)?));
            }
            if pieces.len() > PIECES_MAX {
                return Err(broken(format!("a sparse file of more than {PIECES_MAX} pieces")));
            }
            more = block.is_extended();
        }
        Ok((pieces, gnu.real_size().map_err(wrong)?))
    }

    /// The map of holes of pax format 1.0: decimal lines at the start of the data, padded to blocks. How much it took.
    fn map_in_data(&mut self, stored: u64) -> io::Result<(Vec<(u64, u64)>, u64)> {
        let mut numbers: Vec<u64> = Vec::new();
        let (mut wanted, mut taken, mut number) = (None::<usize>, 0_u64, None::<u64>);
        loop {
            let mut block = [0; BLOCK];
            if taken + BLOCK as u64 > stored || fill(&mut self.source, &mut block)? != BLOCK {
                return Err(broken("the map of a sparse file is cut short"));
            }
            taken += BLOCK as u64;
            self.at += BLOCK as u64;
            for byte in block {
                match byte {
                    b'0'..=b'9' => {
                        let digit = u64::from(byte - b'0');
                        let next = number.unwrap_or(0).checked_mul(10).and_then(|n| n.checked_add(digit));
                        number = Some(next.ok_or_else(|| broken("a number in the map of a sparse file"))?);
                    }
                    b'\n' => {
                        let told = number.take().ok_or_else(|| broken("an empty line in the map of a sparse file"))?;
                        match wanted {
                            None if told > PIECES_MAX as u64 => {
                                return Err(broken(format!("a sparse file of more than {PIECES_MAX} pieces")));
                            }
                            None => wanted = Some(told as usize * 2),
                            Some(_) => numbers.push(told),
                        }
                        if wanted == Some(numbers.len()) {
                            return Ok((numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect(), taken));
                        }
                    }
                    _ => return Err(broken("the map of a sparse file is no list of numbers")),
                }
            }
        }
    }

    /// Without its first block, which is read by now; what follows is enough to tell that something is there.
    fn behind(&mut self) -> Entry {
        (self.stored, self.padding, self.behind) = (u64::MAX, 0, true);
        Entry { path: Vec::new(), link: Vec::new(), kind: Kind::Behind, len: u64::MAX, pieces: None }
    }

    fn text(&mut self, size: u64, max: u64, what: &str) -> io::Result<Vec<u8>> {
        if size > max {
            return Err(broken(format!("{what} of {size} bytes in a tar header, at most {max} are read")));
        }
        let mut text = vec![0; size as usize];
        if fill(&mut self.source, &mut text)? as u64 != size {
            return Err(broken(format!("the archive ends in {what}")));
        }
        self.at += size;
        self.pass_only(size.next_multiple_of(BLOCK as u64) - size)?;
        while text.last() == Some(&0) {
            text.pop();
        }
        Ok(text)
    }

    fn pass(&mut self, size: u64) -> io::Result<()> {
        let padding = size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| broken("an impossible size"))? - size;
        self.pass_only(size)?;
        self.pass_only(padding)
    }

    fn pass_only(&mut self, len: u64) -> io::Result<()> {
        let passed = self.source.skip(len)?;
        self.at += passed;
        if passed != len {
            return Err(broken(format!("the archive ends {} bytes before the end of an entry", len - passed)));
        }
        Ok(())
    }

    fn finish_entry(&mut self) -> io::Result<()> {
        let (stored, padding) = (std::mem::take(&mut self.stored), std::mem::take(&mut self.padding));
        if self.behind {
            self.source.skip(stored)?;
            return Ok(());
        }
        self.pass_only(stored)?;
        self.pass_only(padding)?;
        // What was read of it was not counted.
        self.at = self.end;
        self.source.wait = None;
        if let Some(within) = self.within.take() {
            // Who went on there looks for the next header, and has met none before the one that comes now.
            let met = std::mem::take(&mut self.source.header_seen);
            self.others.retain(|other| *other < within || *other >= self.end);
            if met {
                self.differ();
            }
        }
        Ok(())
    }
}

/// A source whose blocks are looked at as they pass, where some program looks for a header among them.
struct Watched<'a> {
    inner: &'a mut dyn Source,
    /// Bytes before the first such block; `None`: there is none.
    wait: Option<u64>,
    /// What there is of the next one.
    block: Vec<u8>,
    header_seen: bool,
}

impl Watched<'_> {
    fn look(&mut self, bytes: &[u8]) {
        let Some(wait) = &mut self.wait else { return };
        let before = usize::try_from(*wait).map_or(bytes.len(), |wait| wait.min(bytes.len()));
        *wait -= before as u64;
        let mut bytes = &bytes[before..];
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(bytes.len().min(BLOCK - self.block.len()));
            self.block.extend_from_slice(piece);
            bytes = rest;
            if self.block.len() == BLOCK {
                self.header_seen |= is_header(&self.block);
                self.block.clear();
            }
        }
    }
}

impl Read for Watched<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(room)?;
        self.look(&room[..n]);
        Ok(n)
    }
}

impl Source for Watched<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let Some(wait) = self.wait else { return self.inner.skip(len) };
        let before = self.inner.skip(wait.min(len))?;
        self.wait = Some(wait - before);
        Ok(before + if before == wait { drain(self, len - before)? } else { 0 })
    }
    fn left(&self) -> Option<u64> {
        self.inner.left()
    }
    fn place(&self) -> Option<(Arc<File>, u64)> {
        self.inner.place()
    }
}

/// Pieces lie in order and within the file, and what is stored is enough for them.
fn check_pieces(pieces: &[(u64, u64)], len: u64, stored: u64) -> io::Result<()> {
    let (mut end, mut sum) = (0_u64, 0_u64);
    for (start, piece) in pieces {
        let next = start.checked_add(*piece).filter(|next| *start >= end && *next <= len);
        end = next.ok_or_else(|| broken("the map of a sparse file contradicts itself"))?;
        sum += piece;
    }
    if sum > stored {
        return Err(broken("the map of a sparse file tells of more than is stored"));
    }
    Ok(())
}

/// The records before an entry that matter here.
#[derive(Debug, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    sparse_1: bool,
    sparse_name: Option<Vec<u8>>,
    real_len: Option<u64>,
    pieces: Vec<(u64, u64)>,
}

impl Pax {
    /// Records are `LEN KEY=VALUE\n`; a value may hold anything, line ends too.
    fn parse(mut text: &[u8]) -> io::Result<Pax> {
        let wrong = || broken("a pax record that is none");
        let number = |value: &[u8]| {
            let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            let text = std::str::from_utf8(value).ok().filter(|_| digits).ok_or_else(wrong)?;
            text.parse::<u64>().map_err(|_| wrong())
        };
        let mut pax = Pax::default();
        let mut offset = None;
        while !text.is_empty() {
            let space = text.iter().take(20).position(|byte| *byte == b' ').ok_or_else(wrong)?;
            let len = usize::try_from(number(&text[..space])?).map_err(|_| wrong())?;
            let record = text.get(space + 1..len).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(wrong)?;
            text = &text[len..];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => pax.path = Some(name(value)?),
                b"linkpath" => pax.link = Some(name(value)?),
                b"size" => pax.size = Some(number(value)?),
                b"GNU.sparse.major" => pax.sparse_1 = number(value)? == 1,
                b"GNU.sparse.name" => pax.sparse_name = Some(name(value)?),
                b"GNU.sparse.realsize" | b"GNU.sparse.size" => pax.real_len = Some(number(value)?),
                b"GNU.sparse.offset" => offset = Some(number(value)?),
                b"GNU.sparse.numbytes" => pax.pieces.push((offset.take().ok_or_else(wrong)?, number(value)?)),
                b"GNU.sparse.map" => {
                    let numbers: Vec<u64> = value.split(|byte| *byte == b',').map(number).collect::<io::Result<_>>()?;
                    pax.pieces = numbers.chunks(2).map(|pair| (pair[0], pair.get(1).copied().unwrap_or(0))).collect();
                }
                _ => {}
            }
            if pax.pieces.len() > PIECES_MAX {
                return Err(broken(format!("a sparse file of more than {PIECES_MAX} pieces")));
            }
        }
        Ok(pax)
    }
}

fn name(value: &[u8]) -> io::Result<Vec<u8>> {
    if value.len() as u64 > NAME_BYTES_MAX {
        return Err(broken(format!("a name of {} bytes, at most {NAME_BYTES_MAX} are read", value.len())));
    }
    Ok(value.to_vec())
}

/// The bytes of one entry, its holes filled with zeros.
pub(super) struct Body<'a> {
    inner: Limited<'a>,
    meter: &'a Meter<'a>,
    /// What the archive holds of it.
    stored: u64,
    /// What the reader still has to pass over.
    left: &'a mut u64,
    pieces: Option<&'a [(u64, u64)]>,
    at: u64,
    len: u64,
    /// Bytes of holes that were read.
    zeros: u64,
}

impl Read for Body<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let want = room.len().min(usize::try_from(self.len - self.at).unwrap_or(room.len()));
        if want == 0 {
            return Ok(0);
        }
        let n = match self.gap() {
            (true, until) => {
                let n = want.min(usize::try_from(until - self.at).unwrap_or(want));
                room[..n].fill(0);
                self.zeros += n as u64;
                // A hole costs the archive nothing, like what a decoder makes.
                self.meter.made(n as u64, self.zeros, self.stored)?;
                n
            }
            (false, until) => {
                let n = want.min(usize::try_from(until - self.at).unwrap_or(want));
                let n = self.inner.read(&mut room[..n])?;
                *self.left = self.inner.left;
                n
            }
        };
        self.at += n as u64;
        Ok(n)
    }
}

impl Body<'_> {
    /// Whether the next byte is in a hole, and where that ends.
    fn gap(&self) -> (bool, u64) {
        let Some(pieces) = self.pieces else { return (false, self.len) };
        let next = pieces.partition_point(|(start, len)| start + len <= self.at);
        match pieces.get(next) {
            Some((start, len)) if *start <= self.at => (false, start + len),
            Some((start, _)) => (true, *start),
            None => (true, self.len),
        }
    }
}

impl Source for Body<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let end = self.at.saturating_add(len).min(self.len);
        let from = self.at;
        while self.at < end {
            let (hole, until) = self.gap();
            let step = until.min(end) - self.at;
            let passed = if hole {
                step
            } else {
                let passed = self.inner.skip(step)?;
                *self.left = self.inner.left;
                passed
            };
            self.at += passed;
            if passed < step {
                break;
            }
        }
        Ok(self.at - from)
    }
    fn left(&self) -> Option<u64> {
        (self.len != u64::MAX).then(|| self.len - self.at)
    }
    fn place(&self) -> Option<(Arc<File>, u64)> {
        // With holes the bytes do not lie there as they are.
        if self.pieces.is_some() { None } else { self.inner.place() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Limits;
    use super::super::source::Memory;
    use super::*;

    fn header(path: &str, kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_path(path).expect("a short path");
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        header
    }

    fn with(header: &Header, data: &[u8]) -> Vec<u8> {
        let mut out = header.as_bytes().to_vec();
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        out
    }

    fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut text = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut len = rest + rest.to_string().len();
            if len.to_string().len() + rest != len {
                len = rest + len.to_string().len();
            }
            text.extend_from_slice(format!("{len} {key}=").as_bytes());
            text.extend_from_slice(value);
            text.push(b'\n');
        }
        with(&header("pax", EntryType::XHeader, text.len() as u64), &text)
    }

    fn list(bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut memory = Memory(bytes);
        let limits = Limits { unpacked_bytes_max: 1 << 20, ..Limits::default() };
        let meter = Meter::new(limits, None, &|_| {});
        let mut reader = TarReader::new(&mut memory, &meter);
        let mut found = Vec::new();
        while let Some(entry) = reader.next()? {
            let mut data = Vec::new();
            reader.body(&entry).read_to_end(&mut data)?;
            found.push((entry.path, data));
        }
        Ok(found)
    }

    #[test]
    fn names_and_sizes_come_from_pax_records_whatever_bytes_they_hold() {
        let mut bytes = pax(&[("SCHILY.xattr.user.x", b"a\nb 3 c=\n"), ("path", b"long/name"), ("size", b"3")]);
        bytes.extend(with(&header("short", EntryType::Regular, 0), b"abc"));
        bytes.extend(with(&header("next", EntryType::Regular, 2), b"de"));
        bytes.extend([0; 1024]);
        let found = list(&bytes).expect("good");
        assert_eq!(found, [(b"long/name".to_vec(), b"abc".to_vec()), (b"next".to_vec(), b"de".to_vec())]);
    }

    /// The names of an archive's entries, and whether other programs may find others.
    fn doubts(bytes: &[u8]) -> (Vec<Vec<u8>>, bool) {
        let mut memory = Memory(bytes);
        let meter = Meter::new(Limits::default(), None, &|_| {});
        let mut reader = TarReader::new(&mut memory, &meter);
        let (mut names, mut doubted) = (Vec::new(), false);
        loop {
            let next = reader.next();
            doubted |= reader.doubt().is_some();
            match next {
                Ok(Some(entry)) => names.push(entry.path),
                Ok(None) | Err(_) => return (names, doubted),
            }
        }
    }

    #[test]
    fn what_can_hold_no_bytes_hides_no_entry_whatever_size_it_tells() {
        let names = |names: &[&str]| names.iter().map(|name| name.as_bytes().to_vec()).collect::<Vec<_>>();
        let inner = with(&header("inner", EntryType::Regular, 512), &[1; 512]);
        let hidden = with(&header("hidden", EntryType::Regular, 1024), &inner);
        let harmless = with(&header("hidden", EntryType::Regular, 1024), &[1; 1024]);
        let last = with(&header("last", EntryType::Regular, 1), b"n");
        let bodiless = [EntryType::Link, EntryType::Symlink, EntryType::Char, EntryType::Block, EntryType::Directory];
        for kind in bodiless.into_iter().chain([EntryType::Fifo]) {
            for size_in_pax in [false, true] {
                let is_old_link = kind == EntryType::Link && !size_in_pax;
                let front = |size: u64| match size_in_pax {
                    true => {
                        let records = pax(&[("size", size.to_string().as_bytes())]);
                        [&records, &header("front", kind, 0).as_bytes()[..]].concat()
                    }
                    false => header("front", kind, size).as_bytes().to_vec(),
                };
                let archive = |size, rest: &[&[u8]]| doubts(&[front(size), rest.concat()].concat());
                let all = names(&["front", "hidden", "last"]);
                // Whoever passes over the first finds the second, whoever does not finds both.
                assert_eq!(archive(1536, &[&hidden, &last]), (all.clone(), false), "{kind:?}");
                assert_eq!(archive(1500, &[&hidden, &last, &[0; 1024]]), (all.clone(), false), "{kind:?}");
                // Within an entry there may be another one.
                for within in [1, 512] {
                    assert_eq!(archive(within, &[&hidden, &last]), (all.clone(), !is_old_link), "{kind:?}");
                    assert_eq!(archive(within, &[&hidden]).1, !is_old_link, "{kind:?}: the last one too");
                    assert_eq!(archive(within, &[&harmless, &last]), (all.clone(), false), "{kind:?}: there is none");
                }
                assert_eq!(archive(1024, &[&hidden, &last]), (all.clone(), false), "{kind:?}: it begins before");
                // Behind the size of the next one, which is told apart, that has another.
                let apart =
                    [pax(&[("size", b"512")]), with(&header("hidden", EntryType::Regular, 0), &[0; 512])].concat();
                assert_eq!(archive(1024, &[&apart, &last]), (all.clone(), !is_old_link), "{kind:?}");
                // Where this reader comes to no good end, others may be further on.
                assert!(archive(2048, &[&hidden, &[7; 512], &last]).1 != is_old_link, "{kind:?}: broken");
                assert!(archive(4096, &[&hidden, &[0; 1024], &[7; 4096]]).1 != is_old_link, "{kind:?}: behind the end");
                assert_eq!(archive(1 << 40, &[&hidden, &last]), (all, false), "{kind:?}: nothing is there");
                // Bytes do lie there.
                assert_eq!(archive(1024, &[&[7; 1024], &last]), (names(&["front", "last"]), true), "{kind:?}");
            }
        }
        // libarchive believes a link's size once it has seen a pax record.
        let records = [pax(&[("path", b"a")]), with(&header("x", EntryType::Regular, 0), b"")].concat();
        let link = header("link", EntryType::Link, 512);
        let (names, doubted) = doubts(&[records, link.as_bytes().to_vec(), hidden, last].concat());
        assert_eq!((names.len(), doubted), (4, true));
        // Thousands of them, as a test of Go's reader has some, are no trouble.
        let many: Vec<u8> = (0..1000).flat_map(|_| header("d", EntryType::Directory, 5).as_bytes().to_vec()).collect();
        assert_eq!((doubts(&many).0.len(), doubts(&many).1), (1000, false));
    }

    #[test]
    fn a_type_that_nobody_knows_and_a_name_with_a_slash_behind_it_are_files_where_they_hold_bytes() {
        let unknown = with(&header("v", EntryType::new(b'V'), 4), b"data");
        let slash = with(&header("w/", EntryType::Regular, 4), b"data");
        let found = list(&[unknown, slash, with(&header("f/", EntryType::Regular, 0), b"")].concat()).expect("good");
        let data = |name: &[u8], data: &[u8]| (name.to_vec(), data.to_vec());
        assert_eq!(found, [data(b"v", b"data"), data(b"w/", b"data"), data(b"f/", b"")]);
    }

    #[test]
    fn an_archive_that_is_cut_or_broken_is_refused() {
        let whole = with(&header("a", EntryType::Regular, 1000), &[7; 1000]);
        for len in [100, 511, 513, 1000, 1535] {
            assert!(list(&whole[..len]).is_err(), "{len}");
        }
        assert!(list(&whole).is_ok(), "no end mark is needed");
        let mut flipped = whole.clone();
        flipped[3] ^= 1;
        assert!(list(&flipped).is_err(), "the checksum");
        let mut huge = header("a", EntryType::GNULongName, 1 << 40);
        huge.set_cksum();
        assert!(list(huge.as_bytes()).is_err(), "an endless name");
        let many: Vec<u8> = (0..40).flat_map(|_| pax(&[("path", b"x")])).collect();
        assert!(list(&many).is_err(), "headers without end");
        assert!(Pax::parse(b"5 a=\n3 x").is_err());
        assert!(Pax::parse(b"99999999999999999999 a=b\n").is_err());
        assert!(Pax::parse(b"3 a").is_err());
    }

    #[test]
    fn holes_of_sparse_files_are_zeros_in_every_form() {
        let data = b"headTAIL";
        let plain = [b"head".as_slice(), &[0; 96], b"TAIL", &[0; 20]].concat();
        let mut v0 = pax(&[("GNU.sparse.map", b"0,4,100,4"), ("GNU.sparse.size", b"124"), ("path", b"s")]);
        v0.extend(with(&header("x", EntryType::Regular, 8), data));
        let mut map = b"2\n0\n4\n100\n4\n".to_vec();
        map.resize(BLOCK, 0);
        map.extend_from_slice(data);
        let mut v1 = pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"s"),
            ("GNU.sparse.realsize", b"124"),
        ]);
        v1.extend(with(&header("x", EntryType::Regular, map.len() as u64), &map));
        let mut old = header("s", EntryType::GNUSparse, 8);
        let gnu = old.as_gnu_mut().expect("GNU's");
        for (at, (start, len)) in [(0, 4), (100, 4)].into_iter().enumerate() {
            gnu.sparse[at].set_offset(start);
            gnu.sparse[at].set_length(len);
        }
        gnu.set_real_size(124);
        old.set_cksum();
        for (what, mut bytes) in [("0.1", v0), ("1.0", v1), ("old", with(&old, data))] {
            bytes.extend(with(&header("next", EntryType::Regular, 1), b"n"));
            let found = list(&bytes).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(found[0], (b"s".to_vec(), plain.clone()), "{what}");
            assert_eq!(found[1].0, b"next", "{what}");
        }
        let mut lies = pax(&[("GNU.sparse.map", b"0,4,2,4"), ("GNU.sparse.size", b"124")]);
        lies.extend(with(&header("x", EntryType::Regular, 8), data));
        assert!(list(&lies).is_err(), "pieces that overlap");
        let mut endless = pax(&[("GNU.sparse.map", b"0,8"), ("GNU.sparse.size", b"1152921504606846976")]);
        endless.extend(with(&header("x", EntryType::Regular, 8), data));
        let error = list(&endless).expect_err("holes are counted like what is unpacked");
        assert!(matches!(Trouble::of(&error), Trouble::Limit(_)), "{error:?}");
    }

    #[test]
    fn entries_behind_the_end_mark_are_found() {
        let mut bytes = with(&header("a", EntryType::Regular, 1), b"a");
        bytes.extend([0; 1024]);
        bytes.extend(with(&header("b", EntryType::Regular, 1), b"b"));
        assert_eq!(list(&bytes).expect("good").len(), 2);
        bytes.extend([0; 1024]);
        bytes.extend([9; 700]);
        assert_eq!(list(&bytes).expect("good").len(), 3, "bytes that are no archive are told of");
        bytes.truncate(4096);
        bytes.resize(65 << 20, 0);
        let error = list(&bytes).expect_err("zeros are not read for ever");
        assert!(matches!(Trouble::of(&error), Trouble::Limit(_)), "{error:?}");
    }
}
