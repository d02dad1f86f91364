//! Bytes of one file or one entry, read forwards and once, and never more of them than the limits allow.
//!
//! In: a range of a file, or another source. Out: [`Source`]s: plain ranges that skip without reading, decoders that count
//! what they make, and a [`Probe`] that shows the first bytes before they are read.
//! Promises: nothing is kept but the head that was asked for; a decoder that makes more than the limits allow ends with
//! [`Trouble::Limit`], whatever the input claims; nothing is ever written.
//! Held by: the tests below, the hostile archives of tests/scan.rs.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::{Limits, Step};
use crate::crypto::FileHasher;

/// Bytes asked of the kernel at once. Heads of small files that lie one after the other come with one call.
const READ_BYTES: usize = 64 << 10;

/// The largest zstd window that is decoded, as a power of two: what `zstd -d` takes without `--memory`.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Below this a decoder's ratio says nothing: a megabyte of zeros is no attack.
const RATIO_FREE_BYTES: u64 = 256 << 20;

/// Why a source ends before its end.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Trouble {
    /// More than the limits allow.
    #[error("{0}")]
    Limit(String),
    /// Not what its format says.
    #[error("{0}")]
    Broken(String),
    /// The time that was given for all is over.
    #[error("the time for the scan is over")]
    Time,
    /// The machine did not read it.
    #[error("{0}")]
    Host(String),
}

impl Trouble {
    pub fn of(error: &io::Error) -> Trouble {
        if let Some(trouble) = error.get_ref().and_then(|inner| inner.downcast_ref::<Trouble>()) {
            return trouble.clone();
        }
        match error.raw_os_error() {
            Some(_) => Trouble::Host(error.to_string()),
            // What decoders say of their input.
            None => Trouble::Broken(error.to_string()),
        }
    }
}

impl From<Trouble> for io::Error {
    fn from(trouble: Trouble) -> io::Error {
        io::Error::other(trouble)
    }
}

pub(super) fn broken(what: impl Into<String>) -> io::Error {
    Trouble::Broken(what.into()).into()
}

/// What all sources of one scan count together, and the limits they end at.
pub(super) struct Meter<'a> {
    pub limits: Limits,
    pub deadline: Option<Instant>,
    pub progress: &'a (dyn Fn(Step) + Sync),
    pub read: AtomicU64,
    pub unpacked: AtomicU64,
    pub entries: AtomicU64,
    pub files: AtomicU64,
    pub archives: AtomicU64,
}

impl<'a> Meter<'a> {
    pub fn new(limits: Limits, deadline: Option<Instant>, progress: &'a (dyn Fn(Step) + Sync)) -> Meter<'a> {
        let zero = || AtomicU64::new(0);
        Meter {
            limits,
            deadline,
            progress,
            read: zero(),
            unpacked: zero(),
            entries: zero(),
            files: zero(),
            archives: zero(),
        }
    }

    pub fn in_time(&self) -> Result<(), Trouble> {
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(Trouble::Time),
            Some(_) | None => Ok(()),
        }
    }

    /// One more file, link, folder or entry of an archive.
    pub fn entry(&self) -> Result<(), Trouble> {
        let count = self.entries.fetch_add(1, Ordering::Relaxed);
        if count >= self.limits.entries_max {
            return Err(Trouble::Limit(format!(
                "more than {} files and entries; raise --max-entries",
                self.limits.entries_max
            )));
        }
        // A clock read costs as much as a small entry.
        if count.is_multiple_of(64) { self.in_time() } else { Ok(()) }
    }

    /// `bytes` more that no disk and no pipe gave, of a stream that by now made `made` of `stored`.
    pub fn made(&self, bytes: u64, made: u64, stored: u64) -> Result<(), Trouble> {
        let all = self.unpacked.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if all > self.limits.unpacked_bytes_max {
            return Err(Trouble::Limit(format!(
                "unpacks to more than {} bytes in all; raise --max-unpacked",
                self.limits.unpacked_bytes_max
            )));
        }
        let ratio_max = self.limits.ratio_max;
        if made > RATIO_FREE_BYTES && made / stored.max(1) > ratio_max {
            return Err(Trouble::Limit(format!(
                "{stored} packed bytes unpack to more than {ratio_max} times as much ({made} so far); raise --max-ratio"
            )));
        }
        self.in_time()
    }
}

/// Bytes that come once, in order.
pub(super) trait Source: Read {
    /// Passes over up to `len` bytes; fewer only at the end. How many were there.
    fn skip(&mut self, len: u64) -> io::Result<u64>;

    /// Bytes to the end, where that is known without reading.
    fn left(&self) -> Option<u64>;

    /// The file and the place in it where the next byte lies, if the rest lies there as it is.
    fn place(&self) -> Option<(Arc<File>, u64)> {
        None
    }
}

/// Reads and forgets up to `len` bytes.
pub(super) fn drain(from: &mut (impl Read + ?Sized), len: u64) -> io::Result<u64> {
    let mut room = vec![0; READ_BYTES.min(usize::try_from(len).unwrap_or(READ_BYTES)).max(1)];
    let mut done = 0;
    while done < len {
        let want = room.len().min(usize::try_from(len - done).unwrap_or(room.len()));
        match from.read(&mut room[..want])? {
            0 => break,
            n => done += n as u64,
        }
    }
    Ok(done)
}

/// Fills `room` as far as there are bytes.
pub(super) fn fill(from: &mut (impl Read + ?Sized), room: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < room.len() {
        match from.read(&mut room[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// A range of a file on the disk.
pub(super) struct FileRange<'a> {
    file: Arc<File>,
    at: u64,
    end: u64,
    buffer: Vec<u8>,
    used: usize,
    /// The next range asked of the kernel; small at first, since most files are looked at and left.
    ask: usize,
    meter: &'a Meter<'a>,
}

impl<'a> FileRange<'a> {
    pub fn new(file: Arc<File>, start: u64, len: u64, meter: &'a Meter<'a>) -> FileRange<'a> {
        let end = start.saturating_add(len);
        FileRange { file, at: start, end, buffer: Vec::new(), used: 0, ask: 4 << 10, meter }
    }

    /// Where the next byte lies in the file.
    pub fn position(&self) -> u64 {
        self.at - (self.buffer.len() - self.used) as u64
    }
}

impl Read for FileRange<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if self.used == self.buffer.len() {
            self.meter.in_time()?;
            let len = self.ask.min(usize::try_from(self.end - self.at).unwrap_or(self.ask));
            self.ask = READ_BYTES;
            self.buffer.resize(len, 0);
            self.used = 0;
            let got = loop {
                match self.file.read_at(&mut self.buffer, self.at) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    other => break other,
                }
            };
            // What could not be read is not there to be handed out.
            self.buffer.truncate(*got.as_ref().unwrap_or(&0));
            let got = got?;
            self.at += got as u64;
            self.meter.read.fetch_add(got as u64, Ordering::Relaxed);
            (self.meter.progress)(Step::Passed(got as u64));
        }
        let n = room.len().min(self.buffer.len() - self.used);
        room[..n].copy_from_slice(&self.buffer[self.used..self.used + n]);
        self.used += n;
        Ok(n)
    }
}

impl Source for FileRange<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let held = (self.buffer.len() - self.used) as u64;
        if len <= held {
            self.used += len as usize;
            return Ok(len);
        }
        let over = (len - held).min(self.end - self.at);
        self.buffer.clear();
        self.used = 0;
        self.at += over;
        (self.meter.progress)(Step::Passed(over));
        Ok(held + over)
    }

    fn left(&self) -> Option<u64> {
        Some(self.end - self.position())
    }
    fn place(&self) -> Option<(Arc<File>, u64)> {
        Some((self.file.clone(), self.position()))
    }
}

/// Bytes of a pipe.
pub(super) struct Piped<'a> {
    pub from: Box<dyn Read + Send>,
    pub meter: &'a Meter<'a>,
}

impl Read for Piped<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.meter.in_time()?;
        let n = self.from.read(room)?;
        self.meter.read.fetch_add(n as u64, Ordering::Relaxed);
        (self.meter.progress)(Step::Passed(n as u64));
        Ok(n)
    }
}

impl Source for Piped<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        drain(self, len)
    }
    fn left(&self) -> Option<u64> {
        None
    }
}

/// At most `left` bytes of another source.
pub(super) struct Limited<'a> {
    pub inner: &'a mut dyn Source,
    pub left: u64,
}

impl Read for Limited<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let want = room.len().min(usize::try_from(self.left).unwrap_or(room.len()));
        let n = self.inner.read(&mut room[..want])?;
        self.left -= n as u64;
        Ok(n)
    }
}

impl Source for Limited<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let n = self.inner.skip(len.min(self.left))?;
        self.left -= n;
        Ok(n)
    }
    fn left(&self) -> Option<u64> {
        Some(self.left)
    }
    fn place(&self) -> Option<(Arc<File>, u64)> {
        self.inner.place()
    }
}

/// A source with its first bytes at hand: looked at as often as wanted, then read like any other from the start.
pub(super) struct Probe<'a> {
    inner: &'a mut dyn Source,
    head: Vec<u8>,
    /// How much of the head was read again.
    used: usize,
    ended: bool,
    len: Option<u64>,
    /// Whoever reads to the end hashes on the way: there is no second time.
    hashed: bool,
    sha256: Option<[u8; 32]>,
    /// Reading to the end was begun; what is left then is not the whole file.
    begun: bool,
}

impl<'a> Probe<'a> {
    pub fn new(inner: &'a mut dyn Source) -> Probe<'a> {
        let len = inner.left();
        Probe { inner, head: Vec::new(), used: 0, ended: false, len, hashed: false, sha256: None, begun: false }
    }

    /// A probe that will be asked for its [`digest`](Probe::digest).
    pub fn hashed(inner: &'a mut dyn Source, hashed: bool) -> Probe<'a> {
        Probe { hashed, ..Probe::new(inner) }
    }

    /// The first `len` bytes; fewer only if there are no more. Nothing may have been read before.
    pub fn head(&mut self, len: usize) -> io::Result<&[u8]> {
        if self.head.len() < len && !self.ended {
            let have = self.head.len();
            // A claimed length is no reason to take memory: it grows with what comes.
            let want = self.len.map_or(len, |all| len.min(usize::try_from(all).unwrap_or(len)));
            let mut piece = vec![0; READ_BYTES.min(want.saturating_sub(have)).max(1)];
            while self.head.len() < want {
                let room = piece.len().min(want - self.head.len());
                let got = fill(self.inner, &mut piece[..room])?;
                self.head.extend_from_slice(&piece[..got]);
                if got < room {
                    self.ended = true;
                    break;
                }
            }
        }
        Ok(&self.head[..len.min(self.head.len())])
    }

    /// Bytes in all, where that is known without reading.
    pub fn known_len(&self) -> Option<u64> {
        self.len.or(self.ended.then_some(self.head.len() as u64))
    }

    /// Bytes in all; reads to the end if there is no other way.
    pub fn measure(&mut self) -> io::Result<u64> {
        match self.known_len() {
            Some(len) => Ok(len),
            None => self.read_out(),
        }
    }

    /// SHA-256 of all bytes. Nothing may have been read but the head.
    pub fn digest(&mut self) -> io::Result<Option<[u8; 32]>> {
        if self.hashed && self.sha256.is_none() {
            self.read_out()?;
        }
        Ok(self.sha256)
    }

    fn read_out(&mut self) -> io::Result<u64> {
        if std::mem::replace(&mut self.begun, true) {
            return Err(broken("its end could not be read"));
        }
        let mut len = self.head.len() as u64;
        if self.hashed {
            let mut hasher = FileHasher::new();
            hasher.update(&self.head);
            let mut room = vec![0; READ_BYTES];
            loop {
                match self.inner.read(&mut room)? {
                    0 => break,
                    n => {
                        hasher.update(&room[..n]);
                        len += n as u64;
                    }
                }
            }
            self.sha256 = Some(hasher.finish());
        } else {
            len += drain(self.inner, u64::MAX)?;
        }
        (self.len, self.ended) = (Some(len), true);
        Ok(len)
    }
}

impl Read for Probe<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if self.used < self.head.len() {
            let n = room.len().min(self.head.len() - self.used);
            room[..n].copy_from_slice(&self.head[self.used..self.used + n]);
            self.used += n;
            return Ok(n);
        }
        if self.ended { Ok(0) } else { self.inner.read(room) }
    }
}

impl Source for Probe<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let held = (self.head.len() - self.used) as u64;
        if len <= held {
            self.used += len as usize;
            return Ok(len);
        }
        self.used = self.head.len();
        if self.ended { Ok(held) } else { Ok(held + self.inner.skip(len - held)?) }
    }
    fn left(&self) -> Option<u64> {
        let held = (self.head.len() - self.used) as u64;
        if self.ended { Some(held) } else { Some(held + self.inner.left()?) }
    }
    fn place(&self) -> Option<(Arc<File>, u64)> {
        let (file, at) = self.inner.place()?;
        Some((file, at - (self.head.len() - self.used) as u64))
    }
}

/// How a file's bytes are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Zstd,
}

/// What a decoder reads, counted.
struct Counted<'a> {
    inner: &'a mut dyn Source,
    count: u64,
}

impl Read for Counted<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(room)?;
        self.count += n as u64;
        Ok(n)
    }
}

enum Decoder<'a> {
    Gzip(Box<flate2::bufread::MultiGzDecoder<BufReader<Counted<'a>>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<Counted<'a>>>>),
}

/// What another source holds packed.
pub(super) struct Unpacked<'a> {
    decoder: Decoder<'a>,
    made: u64,
    meter: &'a Meter<'a>,
}

impl<'a> Unpacked<'a> {
    pub fn new(packing: Packing, inner: &'a mut dyn Source, meter: &'a Meter<'a>) -> io::Result<Unpacked<'a>> {
        let from = BufReader::with_capacity(READ_BYTES, Counted { inner, count: 0 });
        let decoder = match packing {
            Packing::Gzip => Decoder::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(from))),
            Packing::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(from)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Decoder::Zstd(Box::new(decoder))
            }
        };
        Ok(Unpacked { decoder, made: 0, meter })
    }

    fn taken(&self) -> u64 {
        match &self.decoder {
            Decoder::Gzip(decoder) => decoder.get_ref().get_ref().count,
            Decoder::Zstd(decoder) => decoder.get_ref().get_ref().count,
        }
    }
}

impl Read for Unpacked<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = match &mut self.decoder {
            Decoder::Gzip(decoder) => decoder.read(room),
            Decoder::Zstd(decoder) => decoder.read(room),
        }?;
        self.made += n as u64;
        self.meter.made(n as u64, self.made, self.taken())?;
        Ok(n)
    }
}

impl Source for Unpacked<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        drain(self, len)
    }
    fn left(&self) -> Option<u64> {
        None
    }
}

/// One deflated entry of a zip archive; what follows it stays unread in `from`.
pub(super) struct Inflated<'a, R: BufRead> {
    decoder: flate2::bufread::DeflateDecoder<&'a mut R>,
    made: u64,
    meter: &'a Meter<'a>,
}

impl<'a, R: BufRead> Inflated<'a, R> {
    pub fn new(from: &'a mut R, meter: &'a Meter<'a>) -> Inflated<'a, R> {
        Inflated { decoder: flate2::bufread::DeflateDecoder::new(from), made: 0, meter }
    }
}

impl<R: BufRead> Read for Inflated<'_, R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let n = self.decoder.read(room)?;
        self.made += n as u64;
        self.meter.made(n as u64, self.made, self.decoder.total_in())?;
        Ok(n)
    }
}

impl<R: BufRead> Source for Inflated<'_, R> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        drain(self, len)
    }
    fn left(&self) -> Option<u64> {
        None
    }
}

/// Plain bytes in memory, for tests.
#[cfg(test)]
pub(super) struct Memory<'a>(pub &'a [u8]);

#[cfg(test)]
impl Read for Memory<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.0.read(room)
    }
}

#[cfg(test)]
impl Source for Memory<'_> {
    fn skip(&mut self, len: u64) -> io::Result<u64> {
        let n = (self.0.len() as u64).min(len);
        self.0 = &self.0[n as usize..];
        Ok(n)
    }
    fn left(&self) -> Option<u64> {
        Some(self.0.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn meter(unpacked_bytes_max: u64, ratio_max: u64) -> Meter<'static> {
        Meter::new(Limits { unpacked_bytes_max, ratio_max, ..Limits::default() }, None, &|_| {})
    }

    #[test]
    fn a_head_that_was_looked_at_is_read_again_and_skipped_like_the_rest() {
        let bytes: Vec<u8> = (0..200_000_u32).map(|i| i as u8).collect();
        let mut memory = Memory(&bytes);
        let mut probe = Probe::new(&mut memory);
        assert_eq!(probe.head(4).expect("there"), &bytes[..4]);
        assert_eq!(probe.head(70_000).expect("there"), &bytes[..70_000]);
        assert_eq!(probe.skip(69_999).expect("there"), 69_999);
        let mut two = [0; 2];
        assert_eq!(fill(&mut probe, &mut two).expect("there"), 2);
        assert_eq!(two, [bytes[69_999], bytes[70_000]]);
        assert_eq!(probe.left(), Some(bytes.len() as u64 - 70_001));
        assert_eq!(probe.skip(u64::MAX).expect("there"), bytes.len() as u64 - 70_001);
    }

    #[test]
    fn a_range_of_a_file_skips_without_reading() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&vec![7; 1 << 20]).expect("written");
        let meter = meter(1, 1);
        let mut range = FileRange::new(Arc::new(file), 10, 1 << 19, &meter);
        assert_eq!(fill(&mut range, &mut [0; 100]).expect("there"), 100);
        assert_eq!(range.skip(400_000).expect("there"), 400_000);
        assert_eq!(range.position(), 400_110);
        assert_eq!(range.skip(u64::MAX).expect("there"), (1 << 19) - 400_100);
        assert_eq!(range.left(), Some(0));
        assert!(meter.read.load(Ordering::Relaxed) < 10_000);
    }

    #[test]
    fn a_decoder_ends_at_the_limit_of_all_bytes() {
        let packed = zstd::encode_all(&vec![0; 1 << 20][..], 1).expect("packed");
        let meter = meter(1000, 10);
        let mut memory = Memory(&packed);
        let mut plain = Unpacked::new(Packing::Zstd, &mut memory, &meter).expect("a decoder");
        let error = plain.skip(u64::MAX).expect_err("too much");
        assert!(matches!(Trouble::of(&error), Trouble::Limit(_)), "{error:?}");
    }
}
