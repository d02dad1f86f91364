//! The body of a manifest: flat tables, read strictly, written canonically.
//!
//! In: the opened body, authentic but from a publisher who may be careless or hostile. Out: a [`Manifest`] for which every
//! rule holds, or the code of the rule it breaks.
//! Promises: the counts are checked against their limits, then the sum of the tables against the body's length, before
//! anything is allocated; one content has one encoding, so `encode(parse(x)) == x` for all that is accepted.
//! Spec: docs/FORMAT.md a.4.

use std::ops::Range;

use super::header::{flags, is_coded};
use super::limits::{
    ANNOTATIONS_BYTES_MAX, EXTENT_ALIGN, EXTENTS_MAX, FILE_BYTES_MAX, FILES_MAX, HASHES_MAX, OBJECTS_MAX,
    PATH_BYTES_MAX, STRINGS_BYTES_MAX,
};
use super::manifest::CodedChunk;
use super::wire::{array_at, i64_at, is_zero, put, u16_at, u32_at, u64_at};
use super::{
    Extent, FileEntry, Manifest, ManifestHeader, OBJECT_HEADER_LEN, ObjectEntry, ObjectLayout, Oid, Suite, Vid,
    check_path,
};
use crate::error::Result;
use crate::refuse;

const HEAD_LEN: usize = 64;
const FILE_LEN: usize = 80;
const EXTENT_LEN: usize = 24;
const OBJECT_LEN: usize = 128;
const ROOT_LEN: usize = 32;
const HASH_LEN: usize = 32;
const CODED_LEN: usize = 4;

/// The first 64 bytes of a body: how long each table is.
#[derive(Clone, Copy)]
pub(super) struct Counts {
    files: u32,
    objects: u32,
    extents: u32,
    inherited: u32,
    hashes: u64,
    strings: u32,
    annotations: u32,
    coded: u64,
}

/// Where each table lies within the body.
struct Tables {
    files: Range<usize>,
    extents: Range<usize>,
    objects: Range<usize>,
    inherited: Range<usize>,
    hashes: Range<usize>,
    coded: Range<usize>,
    strings: Range<usize>,
    annotations: Range<usize>,
}

impl Counts {
    fn parse(body: &[u8]) -> Result<Counts> {
        if body.len() < HEAD_LEN {
            refuse!(BodyLength, "manifest body is {} bytes long, its head alone has {HEAD_LEN}", body.len());
        }
        let counts = Counts {
            files: u32_at(body, 0),
            objects: u32_at(body, 4),
            extents: u32_at(body, 8),
            inherited: u32_at(body, 12),
            hashes: u64_at(body, 16),
            strings: u32_at(body, 24),
            annotations: u32_at(body, 28),
            coded: u64_at(body, 32),
        };
        counts.check()?;
        if !is_zero(&body[40..HEAD_LEN]) {
            refuse!(Unsupported, "manifest body has a reserved byte set");
        }
        Ok(counts)
    }

    /// The counts of a manifest about to be written; saturating, so that `check` refuses what does not fit.
    pub(super) fn of(manifest: &Manifest) -> Counts {
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        Counts {
            files: count(manifest.files.len()),
            objects: count(manifest.objects.len()),
            extents: count(manifest.extents.len()),
            inherited: manifest.n_inherited,
            hashes: manifest.hashes.len() as u64,
            strings: count(manifest.strings.len()),
            annotations: count(manifest.annotations.len()),
            coded: manifest.coded.len() as u64,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        for (what, seen, max) in [
            ("files", u64::from(self.files), u64::from(FILES_MAX)),
            ("objects", u64::from(self.objects), u64::from(OBJECTS_MAX)),
            ("extents", u64::from(self.extents), u64::from(EXTENTS_MAX)),
            ("inherited roots", u64::from(self.inherited), u64::from(self.objects)),
            ("chunk hashes", self.hashes, HASHES_MAX),
            ("bytes of paths", u64::from(self.strings), u64::from(STRINGS_BYTES_MAX)),
            ("bytes of annotations", u64::from(self.annotations), u64::from(ANNOTATIONS_BYTES_MAX)),
            ("coded chunks", self.coded, self.hashes),
        ] {
            if seen > max {
                refuse!(Limit, "manifest has {seen} {what}, at most {max} are allowed");
            }
        }
        Ok(())
    }

    /// Safe arithmetic: within the limits all tables together are below 2^30 bytes.
    fn tables(&self) -> Tables {
        let mut at = HEAD_LEN;
        let mut next = |len: usize| {
            at += len;
            at - len..at
        };
        Tables {
            files: next(self.files as usize * FILE_LEN),
            extents: next(self.extents as usize * EXTENT_LEN),
            objects: next(self.objects as usize * OBJECT_LEN),
            inherited: next(self.inherited as usize * ROOT_LEN),
            hashes: next(self.hashes as usize * HASH_LEN),
            coded: next(self.coded as usize * CODED_LEN),
            strings: next(self.strings as usize),
            annotations: next(self.annotations as usize),
        }
    }
}

impl Manifest {
    /// Reads an opened body of the manifest with this header.
    ///
    /// Also returns where in `body` the table of inherited object roots lies. Those are keys: they are left where they are.
    ///
    /// # Errors
    /// The code of the broken rule: `BODY_LENGTH`, `LIMIT`, `UNSUPPORTED`, `OBJECT`, `PATH`, `MANIFEST_ORDER`,
    /// `MANIFEST_TREE`, `MODE`, `EXTENT`.
    ///
    /// Allocates about as much as `body` is long. O(n log n) in extents and objects.
    pub fn parse_body(header: ManifestHeader, body: &[u8]) -> Result<(Manifest, Range<usize>)> {
        if body.len() as u64 != header.body_plain_len {
            refuse!(BodyLength, "manifest body is {} bytes long, header says {}", body.len(), header.body_plain_len);
        }
        let counts = Counts::parse(body)?;
        let tables = counts.tables();
        if tables.annotations.end != body.len() {
            refuse!(BodyLength, "manifest body is {} bytes long, tables need {}", body.len(), tables.annotations.end);
        }
        let rows = |table: &Range<usize>, len| body[table.clone()].chunks_exact(len);
        let mut manifest = Manifest {
            header,
            objects: rows(&tables.objects, OBJECT_LEN).map(decode_object).collect::<Result<_>>()?,
            files: rows(&tables.files, FILE_LEN).map(decode_file).collect::<Result<_>>()?,
            extents: rows(&tables.extents, EXTENT_LEN).map(decode_extent).collect::<Result<_>>()?,
            hashes: rows(&tables.hashes, HASH_LEN).map(|row| array_at(row, 0)).collect(),
            coded: rows(&tables.coded, CODED_LEN).map(|row| CodedChunk { len: u32_at(row, 0), start: 0 }).collect(),
            strings: body[tables.strings].to_vec(),
            annotations: body[tables.annotations].to_vec(),
            n_inherited: counts.inherited,
        };
        manifest.place_coded()?;
        manifest.check()?;
        Ok((manifest, tables.inherited))
    }

    /// Bytes that [`Manifest::encode_body`] writes.
    pub fn body_len(&self) -> usize {
        Counts::of(self).tables().annotations.end
    }

    /// Writes the body into `out`, which must be [`Manifest::body_len`] long, all of it.
    ///
    /// `root(i, slot)` puts the object root of inherited entry `i` into `slot`; roots go straight into the caller's locked
    /// memory and nowhere else.
    pub fn encode_body(&self, out: &mut [u8], mut root: impl FnMut(u32, &mut [u8])) {
        let counts = Counts::of(self);
        let tables = counts.tables();
        assert!(out.len() == tables.annotations.end, "{} {}", out.len(), tables.annotations.end);
        out.fill(0);
        put(out, 0, &counts.files.to_le_bytes());
        put(out, 4, &counts.objects.to_le_bytes());
        put(out, 8, &counts.extents.to_le_bytes());
        put(out, 12, &counts.inherited.to_le_bytes());
        put(out, 16, &counts.hashes.to_le_bytes());
        put(out, 24, &counts.strings.to_le_bytes());
        put(out, 28, &counts.annotations.to_le_bytes());
        put(out, 32, &counts.coded.to_le_bytes());
        for (row, file) in out[tables.files].chunks_exact_mut(FILE_LEN).zip(&self.files) {
            encode_file(row, file);
        }
        for (row, extent) in out[tables.extents].chunks_exact_mut(EXTENT_LEN).zip(&self.extents) {
            encode_extent(row, extent);
        }
        for (row, object) in out[tables.objects].chunks_exact_mut(OBJECT_LEN).zip(&self.objects) {
            encode_object(row, object);
        }
        for (row, index) in out[tables.inherited].chunks_exact_mut(ROOT_LEN).zip(0..) {
            root(index, row);
        }
        for (row, hash) in out[tables.hashes].chunks_exact_mut(HASH_LEN).zip(&self.hashes) {
            row.copy_from_slice(hash);
        }
        for (row, chunk) in out[tables.coded].chunks_exact_mut(CODED_LEN).zip(&self.coded) {
            row.copy_from_slice(&chunk.len.to_le_bytes());
        }
        out[tables.strings].copy_from_slice(&self.strings);
        out[tables.annotations].copy_from_slice(&self.annotations);
    }

    /// The rules of the table of coded lengths; finds where each coded chunk starts.
    ///
    /// Tables follow each other and leave none over; a chunk is stored in 1 to as many bytes as it has plain ones; the
    /// object is as long as its chunks.
    pub(super) fn place_coded(&mut self) -> Result<()> {
        let mut next = 0u64;
        for object in self.objects.iter().filter(|object| object.first_coded.is_some()) {
            let (oid, first) = (object.oid, object.first_coded.expect("only coded objects are looked at"));
            if first != next {
                refuse!(BodyLength, "object {oid} has its coded lengths at {first}, not {next}");
            }
            // At most 2^20 objects of 2^20 chunks each: no overflow.
            next += object.layout.chunk_count();
            let Some(chunks) = self.coded.get_mut(first as usize..next as usize) else {
                refuse!(BodyLength, "object {oid} has coded lengths up to {next} of {}", self.coded.len());
            };
            let mut start = OBJECT_HEADER_LEN as u64;
            for (index, chunk) in object.layout.chunks().zip(chunks) {
                let Some(shape) = object.layout.checked_chunk_shape(index, u64::from(chunk.len)) else {
                    let plain_len = object.layout.chunk_plain_len(index);
                    refuse!(Object, "chunk {index} of object {oid} has {} bytes coded, {plain_len} plain", chunk.len);
                };
                chunk.start = start;
                start += shape.stored_len();
            }
            if object.stored_len != start {
                refuse!(Object, "object {oid} says {} stored bytes, needs {start}", object.stored_len);
            }
        }
        if next != self.coded.len() as u64 {
            refuse!(BodyLength, "manifest has {} coded lengths, its objects need {next}", self.coded.len());
        }
        Ok(())
    }

    /// Every rule that spans rows. What `decode_*` checked is a rule of one row.
    pub(super) fn check(&self) -> Result<()> {
        check_objects(self)?;
        let referenced = check_files(self)?;
        check_overlaps(&self.extents)?;
        if let Some(lost) = referenced.iter().position(|&seen| !seen) {
            refuse!(Object, "object {} belongs to no file", self.objects[lost].oid);
        }
        Ok(())
    }
}

fn decode_object(row: &[u8]) -> Result<ObjectEntry> {
    let coded = is_coded(u32_at(row, 60))?;
    let oid = Oid(array_at(row, 0));
    let suite = Suite::from_u16(u16_at(row, 50))?;
    let layout = ObjectLayout::new(u64_at(row, 32), row[48], row[49])?;
    let stored_len = u64_at(row, 40);
    // How long a coded object is depends on its chunks: `place_coded`.
    if !coded && stored_len != layout.stored_len() {
        refuse!(Object, "object {oid} says {stored_len} stored bytes, needs {}", layout.stored_len());
    }
    let inherited_index = u32_at(row, 56);
    let inherited = match (u32_at(row, 52), inherited_index) {
        (0, 0) => None,
        (1, index) => Some(index),
        (source, index) => refuse!(Object, "object {oid} has key source {source} with index {index}"),
    };
    if !coded && !is_zero(&row[120..]) {
        refuse!(Object, "object {oid} is not coded but has a first coded chunk");
    }
    Ok(ObjectEntry {
        oid,
        layout,
        stored_len,
        suite,
        inherited,
        first_hash: u64_at(row, 64),
        first_coded: coded.then(|| u64_at(row, 120)),
        origin_vid: Vid(array_at(row, 72)),
        commit: array_at(row, 88),
    })
}

fn encode_object(row: &mut [u8], object: &ObjectEntry) {
    put(row, 0, &object.oid.0);
    put(row, 32, &object.layout.plain_len().to_le_bytes());
    put(row, 40, &object.stored_len.to_le_bytes());
    put(row, 48, &[object.layout.block_log2(), object.layout.chunk_log2()]);
    put(row, 50, &object.suite.number().to_le_bytes());
    put(row, 52, &u32::from(object.inherited.is_some()).to_le_bytes());
    put(row, 56, &object.inherited.unwrap_or(0).to_le_bytes());
    put(row, 60, &flags(object.first_coded.is_some()));
    put(row, 64, &object.first_hash.to_le_bytes());
    put(row, 72, &object.origin_vid.0);
    put(row, 88, &object.commit);
    put(row, 120, &object.first_coded.unwrap_or(0).to_le_bytes());
}

fn decode_file(row: &[u8]) -> Result<FileEntry> {
    if !is_zero(&row[64..]) {
        refuse!(Unsupported, "file entry has a reserved byte set");
    }
    Ok(FileEntry {
        path_off: u32_at(row, 0),
        path_len: u16_at(row, 4),
        mode: u16_at(row, 6),
        size: u64_at(row, 8),
        sha256: array_at(row, 16),
        first_extent: u32_at(row, 48),
        n_extents: u32_at(row, 52),
        mtime: i64_at(row, 56),
    })
}

fn encode_file(row: &mut [u8], file: &FileEntry) {
    put(row, 0, &file.path_off.to_le_bytes());
    put(row, 4, &file.path_len.to_le_bytes());
    put(row, 6, &file.mode.to_le_bytes());
    put(row, 8, &file.size.to_le_bytes());
    put(row, 16, &file.sha256);
    put(row, 48, &file.first_extent.to_le_bytes());
    put(row, 52, &file.n_extents.to_le_bytes());
    put(row, 56, &file.mtime.to_le_bytes());
}

fn decode_extent(row: &[u8]) -> Result<Extent> {
    if !is_zero(&row[4..8]) {
        refuse!(Unsupported, "extent has a reserved byte set");
    }
    Ok(Extent { object: u32_at(row, 0), object_offset: u64_at(row, 8), len: u64_at(row, 16) })
}

fn encode_extent(row: &mut [u8], extent: &Extent) {
    put(row, 0, &extent.object.to_le_bytes());
    put(row, 8, &extent.object_offset.to_le_bytes());
    put(row, 16, &extent.len.to_le_bytes());
}

/// Hash ranges follow each other and leave none over; oids differ; inherited roots are used once each, in order.
fn check_objects(manifest: &Manifest) -> Result<()> {
    let (mut next_hash, mut next_root) = (0u64, 0u32);
    for object in &manifest.objects {
        if object.first_hash != next_hash {
            refuse!(BodyLength, "object {} has its hashes at {}, not {next_hash}", object.oid, object.first_hash);
        }
        // At most 2^20 objects of 2^20 chunks each: no overflow.
        next_hash = object.hash_range().end;
        if let Some(index) = object.inherited {
            if index != next_root || index >= manifest.n_inherited {
                refuse!(Object, "object {} has inherited root {index}, not {next_root}", object.oid);
            }
            next_root += 1;
        }
    }
    if next_hash != manifest.hashes.len() as u64 {
        refuse!(BodyLength, "manifest has {} chunk hashes, its objects need {next_hash}", manifest.hashes.len());
    }
    if next_root != manifest.n_inherited {
        refuse!(Object, "manifest has {} inherited roots, its objects use {next_root}", manifest.n_inherited);
    }
    let mut oids: Vec<&Oid> = manifest.objects.iter().map(|object| &object.oid).collect();
    oids.sort_unstable();
    if let Some(twins) = oids.windows(2).find(|pair| pair[0] == pair[1]) {
        refuse!(Object, "object {} is listed twice", twins[0]);
    }
    Ok(())
}

/// Every file's row; says which objects some file uses.
fn check_files(manifest: &Manifest) -> Result<Vec<bool>> {
    let mut referenced = vec![false; manifest.objects.len()];
    let (mut next_string, mut next_extent) = (0usize, 0usize);
    let mut tree = TreeCheck::default();
    for file in &manifest.files {
        if file.path_off as usize != next_string {
            refuse!(BodyLength, "path starts at {} of the strings, not {next_string}", file.path_off);
        }
        let path_len = usize::from(file.path_len);
        // Told apart from a table that ends early: a length no path may have is a bad path.
        if !(1..=PATH_BYTES_MAX).contains(&path_len) {
            refuse!(Path, "path of {path_len} bytes, 1 to {PATH_BYTES_MAX} are allowed");
        }
        next_string += path_len;
        let Some(path) = manifest.strings.get(next_string - path_len..next_string) else {
            refuse!(BodyLength, "a path ends at {next_string} of {} bytes of strings", manifest.strings.len());
        };
        let shown = check_path(path)?;
        tree.next(path, shown)?;
        if !matches!(file.mode, 0o444 | 0o555) {
            refuse!(Mode, "{shown:?} has mode {:o}, only 444 and 555 are allowed", file.mode);
        }
        if file.size > FILE_BYTES_MAX {
            refuse!(Limit, "{shown:?} has {} bytes, at most 2^44 are allowed", file.size);
        }
        if file.first_extent as usize != next_extent {
            refuse!(BodyLength, "{shown:?} has its extents at {}, not {next_extent}", file.first_extent);
        }
        next_extent += file.n_extents as usize;
        let Some(extents) = manifest.extents.get(file.first_extent as usize..next_extent) else {
            refuse!(BodyLength, "{shown:?} has extents up to {next_extent} of {}", manifest.extents.len());
        };
        check_extents(manifest, file, extents, shown)?;
        for extent in extents {
            referenced[extent.object as usize] = true;
        }
    }
    if next_string != manifest.strings.len() || next_extent != manifest.extents.len() {
        refuse!(BodyLength, "manifest has paths or extents that belong to no file");
    }
    Ok(referenced)
}

fn check_extents(manifest: &Manifest, file: &FileEntry, extents: &[Extent], shown: &str) -> Result<()> {
    let mut sum = 0u64;
    for (index, extent) in extents.iter().enumerate() {
        let Extent { object, object_offset, len } = *extent;
        let Some(entry) = manifest.objects.get(object as usize) else {
            refuse!(Extent, "{shown:?} lies in object {object} of {}", manifest.objects.len());
        };
        let last = index + 1 == extents.len();
        if len == 0 || object_offset % EXTENT_ALIGN != 0 || (!last && len % EXTENT_ALIGN != 0) {
            refuse!(Extent, "{shown:?} has an extent of {len} bytes at {object_offset}: empty or not aligned");
        }
        if object_offset.checked_add(len).is_none_or(|end| end > entry.layout.plain_len()) {
            refuse!(
                Extent,
                "{shown:?} has {len} bytes at {object_offset} of an object of {}",
                entry.layout.plain_len()
            );
        }
        // At most 2^22 extents of 2^40 bytes each: no overflow.
        sum += len;
    }
    if sum != file.size {
        refuse!(Extent, "{shown:?} has {} bytes, its extents hold {sum}", file.size);
    }
    Ok(())
}

/// No two extents share a byte of an object.
fn check_overlaps(extents: &[Extent]) -> Result<()> {
    let key = |extent: &Extent| (extent.object, extent.object_offset);
    let mut order: Vec<u32> = (0..).take(extents.len()).collect();
    // A writer's natural order is already sorted, and the sort notices.
    order.sort_by_key(|&index| key(&extents[index as usize]));
    for pair in order.windows(2) {
        let (one, two) = (&extents[pair[0] as usize], &extents[pair[1] as usize]);
        if one.object == two.object && one.object_offset + one.len > two.object_offset {
            refuse!(Extent, "two extents share byte {} of object {}", two.object_offset, two.object);
        }
    }
    Ok(())
}

/// Strict order, and no file that is also a folder. Linear in the bytes of all paths.
#[derive(Default)]
struct TreeCheck {
    previous: Vec<u8>,
    /// Lengths of the files that are byte prefixes of `previous`, `previous` included: among sorted paths everything
    /// between a file and what lies below it starts with the file's bytes, so one stack finds every such file.
    prefixes: Vec<usize>,
}

impl TreeCheck {
    fn next(&mut self, path: &[u8], shown: &str) -> Result<()> {
        if !self.prefixes.is_empty() && path <= self.previous.as_slice() {
            refuse!(ManifestOrder, "{shown:?} follows {:?}", String::from_utf8_lossy(&self.previous));
        }
        let common = path.iter().zip(&self.previous).take_while(|(a, b)| a == b).count();
        while self.prefixes.last().is_some_and(|&len| len > common) {
            self.prefixes.pop();
        }
        for (at, _) in path.iter().enumerate().filter(|&(_, &byte)| byte == b'/') {
            if self.prefixes.binary_search(&at).is_ok() {
                refuse!(ManifestTree, "{:?} is a file and a folder", String::from_utf8_lossy(&path[..at]));
            }
        }
        self.prefixes.push(path.len());
        self.previous.clear();
        self.previous.extend_from_slice(path);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        ChunkIndex, HashAlg, ManifestBuilder, ModelId, NewFile, NewHeader, NewObject, OBJECT_HEADER_LEN, limits,
    };
    use super::*;
    use crate::error::Code;

    const FILES_AT: usize = HEAD_LEN;
    const EXTENTS_AT: usize = FILES_AT + 4 * FILE_LEN;
    const OBJECTS_AT: usize = EXTENTS_AT + 4 * EXTENT_LEN;
    const ROOTS_AT: usize = OBJECTS_AT + 3 * OBJECT_LEN;
    const HASHES_AT: usize = ROOTS_AT + 2 * ROOT_LEN;
    const STRINGS_AT: usize = HASHES_AT + 4 * HASH_LEN;

    fn object(number: u8, plain_len: u64, inherited: bool) -> NewObject {
        let layout = ObjectLayout::new(plain_len, 16, 20).unwrap();
        NewObject {
            oid: Oid([number; 32]),
            layout,
            suite: Suite::Aes256Gcm,
            inherited,
            origin_vid: Vid([9; 16]),
            commit: [number + 1; 32],
            hashes: layout.chunks().map(|index| [index.0 as u8; 32]).collect(),
            coded: None,
        }
    }

    fn file(path: &str, extents: &[(u32, u64, u64)]) -> NewFile {
        let extents: Vec<_> =
            extents.iter().map(|&(object, object_offset, len)| Extent { object, object_offset, len }).collect();
        NewFile {
            path: path.into(),
            mode: 0o444,
            size: extents.iter().map(|extent| extent.len).sum(),
            sha256: [8; 32],
            mtime: i64::MIN,
            extents,
        }
    }

    fn head() -> NewHeader {
        NewHeader {
            suite: Suite::Aes256Gcm,
            hash_alg: HashAlg::Blake3,
            model_id: ModelId([1; 32]),
            vid: Vid([2; 16]),
            seq: 1,
            created_at: 0,
            msalt: [3; 32],
            previous: None,
        }
    }

    /// Files `a/b` (pack, 8192 of 10000), `a/c` (pack, gap before it), `empty`, `weights` (two objects, 2 chunks in one).
    fn builder() -> ManifestBuilder {
        let mut builder = ManifestBuilder::new();
        builder.add_object(object(1, 20_480, true));
        builder.add_object(object(3, (1 << 20) + 4096, false));
        builder.add_object(object(5, 100, true));
        builder.add_file(file("weights", &[(1, 0, (1 << 20) + 4096), (2, 0, 100)]));
        builder.add_file(file("a/c", &[(0, 16_384, 4_000)]));
        builder.add_file(file("empty", &[]));
        builder.add_file(file("a/b", &[(0, 0, 10_000)]));
        builder.annotations(b"{}".to_vec());
        builder
    }

    fn sample() -> Vec<u8> {
        encode(&builder().finish(head()).unwrap())
    }

    fn encode(manifest: &Manifest) -> Vec<u8> {
        let mut body = vec![0xee; manifest.body_len()];
        manifest.encode_body(&mut body, |index, slot| slot.fill(index as u8 + 100));
        body
    }

    fn parse(body: &[u8]) -> Result<(Manifest, Range<usize>)> {
        let mut header = *builder().finish(head()).unwrap().header();
        header.body_plain_len = body.len() as u64;
        Manifest::parse_body(header, body)
    }

    #[track_caller]
    fn refused(body: &[u8], code: Code) {
        match parse(body) {
            Ok(_) => panic!("accepted, wanted {code}"),
            Err(refused) => assert_eq!(refused.code(), code, "{refused:?}"),
        }
    }

    /// The sample with `bytes` at `at`.
    #[track_caller]
    fn refused_with(at: usize, bytes: &[u8], code: Code) {
        let mut body = sample();
        put(&mut body, at, bytes);
        refused(&body, code);
    }

    #[test]
    fn a_body_is_read_back_as_written() {
        let body = sample();
        let (manifest, roots) = parse(&body).unwrap();
        assert_eq!(manifest, builder().finish(head()).unwrap());
        assert_eq!(roots, ROOTS_AT..HASHES_AT);
        assert_eq!(encode(&manifest), body);
        let paths: Vec<_> = manifest.files().iter().map(|file| manifest.path(file)).collect();
        assert_eq!(paths, ["a/b", "a/c", "empty", "weights"]);
        assert_eq!(manifest.find("weights"), Some(3));
        assert_eq!(manifest.find("a"), None);
        assert_eq!(manifest.extents(&manifest.files()[3]).len(), 2);
        assert_eq!(manifest.chunk_hash(1, ChunkIndex(1)), &[1; 32]);
        assert_eq!(manifest.objects()[0].header().encode().len(), OBJECT_HEADER_LEN);
        assert_eq!(manifest.annotations(), b"{}");
    }

    #[test]
    fn a_manifest_of_nothing_is_read_back() {
        let nothing = ManifestBuilder::new().finish(head()).unwrap();
        assert_eq!(nothing.body_len(), 64);
        assert_eq!(Manifest::parse_body(*nothing.header(), &encode(&nothing)).unwrap().0, nothing);
    }

    /// THREAT_MODEL (f) row 48: told by the counts alone, so nothing was allocated.
    #[test]
    fn counts_above_their_limits_are_refused() {
        for (at, max) in [(0, FILES_MAX), (4, OBJECTS_MAX), (8, EXTENTS_MAX), (24, STRINGS_BYTES_MAX)] {
            refused_with(at, &(max + 1).to_le_bytes(), Code::Limit);
            refused_with(at, &u32::MAX.to_le_bytes(), Code::Limit);
            refused_with(at, &max.to_le_bytes(), Code::BodyLength);
        }
        refused_with(28, &(ANNOTATIONS_BYTES_MAX + 1).to_le_bytes(), Code::Limit);
        refused_with(12, &4u32.to_le_bytes(), Code::Limit);
        refused_with(16, &(HASHES_MAX + 1).to_le_bytes(), Code::Limit);
        refused_with(16, &(1u64 << 60).to_le_bytes(), Code::Limit);
        refused_with(32, &5u64.to_le_bytes(), Code::Limit);
        let mut head_only = [0xff; 64];
        refused(&head_only, Code::Limit);
        head_only[40..].fill(0);
        refused(&head_only, Code::Limit);
    }

    /// The second object coded, its two chunks in 5 and 4096 bytes.
    fn coded_sample() -> Vec<u8> {
        let mut builder = builder();
        builder.objects_mut()[1].coded = Some(vec![5, 4096]);
        encode(&builder.finish(head()).unwrap())
    }

    #[test]
    fn coded_lengths_are_read_back_and_place_the_chunks() {
        let body = coded_sample();
        assert_eq!(body.len(), sample().len() + 8);
        assert_eq!(body[STRINGS_AT..STRINGS_AT + 8], [5, 0, 0, 0, 0, 16, 0, 0]);
        let (manifest, _) = parse(&body).unwrap();
        assert_eq!(encode(&manifest), body);
        let object = manifest.objects()[1];
        assert!(object.is_coded() && object.header().coded && !manifest.objects()[0].is_coded());
        assert_eq!(object.stored_len(), 128 + 5 + 16 + 4096 + 16);
        assert_eq!(manifest.chunk_stored(1, ChunkIndex(0)), 128..149);
        assert_eq!(manifest.chunk_stored(1, ChunkIndex(1)), 149..4261);
        assert_eq!(manifest.chunk_shape(1, ChunkIndex(0)).sealed_len(), 5);
        assert_eq!(manifest.object_coded(1), Some(vec![5, 4096]));
        assert_eq!(manifest.object_coded(0), None);
    }

    #[test]
    fn coded_lengths_that_a_reader_must_not_believe_are_refused() {
        let row = OBJECTS_AT + OBJECT_LEN;
        let refused_with = |at: usize, bytes: &[u8], code| {
            let mut body = coded_sample();
            put(&mut body, at, bytes);
            refused(&body, code);
        };
        for len in [0, (1 << 20) + 1, u32::MAX] {
            refused_with(STRINGS_AT, &len.to_le_bytes(), Code::Object);
        }
        refused_with(STRINGS_AT + 4, &4097u32.to_le_bytes(), Code::Object);
        // Right lengths of an object that says another sum, and the sum that an uncoded one would have.
        refused_with(STRINGS_AT, &6u32.to_le_bytes(), Code::Object);
        refused_with(row + 40, &((1u64 << 20) + 4096 + 128 + 17 * 16).to_le_bytes(), Code::Object);
        refused_with(row + 120, &1u64.to_le_bytes(), Code::BodyLength);
        refused_with(row + 120, &u64::MAX.to_le_bytes(), Code::BodyLength);
        refused_with(row + 60, &[0], Code::Object);
        refused_with(row + 60, &[3], Code::Unsupported);
        refused_with(OBJECTS_AT + 60, &[1], Code::Object);
        // A length more or fewer than there are coded chunks.
        let mut body = coded_sample();
        put(&mut body, 32, &3u64.to_le_bytes());
        body.splice(STRINGS_AT + 8..STRINGS_AT + 8, [1, 0, 0, 0]);
        refused(&body, Code::BodyLength);
        let mut body = coded_sample();
        put(&mut body, 32, &1u64.to_le_bytes());
        body.drain(STRINGS_AT..STRINGS_AT + 4);
        refused(&body, Code::BodyLength);
        // Lengths and no coded object.
        let mut body = sample();
        put(&mut body, 32, &1u64.to_le_bytes());
        body.splice(STRINGS_AT..STRINGS_AT, [1, 0, 0, 0]);
        refused(&body, Code::BodyLength);
    }

    /// THREAT_MODEL (f) row 49.
    #[test]
    fn tables_that_do_not_fill_the_body_are_refused() {
        let good = sample();
        refused(&good[..good.len() - 1], Code::BodyLength);
        refused(&[&good[..], &[0]].concat(), Code::BodyLength);
        refused(&good[..63], Code::BodyLength);
        refused(&[], Code::BodyLength);
        let header = *builder().finish(head()).unwrap().header();
        assert_eq!(Manifest::parse_body(header, &good[1..]).unwrap_err().code(), Code::BodyLength);
        // One string byte more, one annotation byte less: the tables fill the body, the paths do not fill the strings.
        let mut shifted = good.clone();
        put(&mut shifted, 24, &(u32_at(&good, 24) + 1).to_le_bytes());
        put(&mut shifted, 28, &1u32.to_le_bytes());
        refused(&shifted, Code::BodyLength);
    }

    #[test]
    fn ranges_with_gaps_overlaps_or_leftovers_are_refused() {
        refused_with(FILES_AT, &[1], Code::BodyLength); // a gap before the first path
        refused_with(FILES_AT + FILE_LEN, &[2], Code::BodyLength); // the second path starts inside the first
        refused_with(FILES_AT + 48, &[1], Code::BodyLength); // first_extent
        refused_with(FILES_AT + 3 * FILE_LEN + 52, &[3], Code::BodyLength); // one extent too many
        refused_with(FILES_AT + 3 * FILE_LEN + 52, &[0xff; 4], Code::BodyLength);
        refused_with(FILES_AT + 3 * FILE_LEN + 4, &[200], Code::BodyLength); // a path past the strings
        refused_with(OBJECTS_AT + 64, &[1], Code::BodyLength); // first_hash
        refused_with(OBJECTS_AT + OBJECT_LEN + 64, &[0], Code::BodyLength);
        let mut leftover = sample();
        put(&mut leftover, 16, &5u64.to_le_bytes());
        leftover.splice(STRINGS_AT..STRINGS_AT, [0; HASH_LEN]);
        refused(&leftover, Code::BodyLength);
        let mut leftover = sample();
        put(&mut leftover, 8, &5u32.to_le_bytes());
        leftover.splice(OBJECTS_AT..OBJECTS_AT, [0; EXTENT_LEN]);
        refused(&leftover, Code::BodyLength);
        let mut leftover = sample();
        let strings = u32_at(&leftover, 24) + 1;
        put(&mut leftover, 24, &strings.to_le_bytes());
        leftover.insert(leftover.len() - 2, b'x');
        refused(&leftover, Code::BodyLength);
    }

    #[test]
    fn reserved_bytes_are_refused() {
        for at in [40, 63, FILES_AT + 64, FILES_AT + 79, EXTENTS_AT + 4, EXTENTS_AT + 7] {
            refused_with(at, &[1], Code::Unsupported);
        }
        refused_with(OBJECTS_AT + 60, &[2], Code::Unsupported);
        refused_with(OBJECTS_AT + 63, &[0x80], Code::Unsupported);
    }

    /// THREAT_MODEL (f) rows 44 to 46.
    #[test]
    fn bad_paths_and_bad_trees_are_refused() {
        refused_with(STRINGS_AT, b"/", Code::Path);
        refused_with(STRINGS_AT, b"\0", Code::Path);
        refused_with(STRINGS_AT, b"\xff", Code::Path);
        refused_with(FILES_AT + 4, &[0, 0], Code::Path);
        refused_with(FILES_AT + 4, &[1, 4], Code::Path);
        refused_with(STRINGS_AT, b"a/c", Code::ManifestOrder); // twice the same
        refused_with(STRINGS_AT, b"b/b", Code::ManifestOrder);
        refused_with(STRINGS_AT, b"a/ba/b", Code::ManifestOrder);
        for paths in [
            &["a", "a/b"][..],
            &["a", "a!", "a!!", "a/b"],
            &["a", "a-b", "a-c/d", "a.e", "a/b/c"],
            &["x/y", "x/y-z", "x/y/z"],
            &["d", "d!/d", "d/d"],
        ] {
            let mut builder = ManifestBuilder::new();
            paths.iter().for_each(|path| builder.add_file(file(path, &[])));
            assert_eq!(builder.finish(head()).unwrap_err().code(), Code::ManifestTree, "{paths:?}");
        }
        let mut builder = ManifestBuilder::new();
        for path in ["a", "a!", "a!b", "a!/b", "ab/c", "ab!", "b/a", "b/a!/x", "b/ab", "b0"] {
            // `a!` is a file and `a!/b` makes it a folder, too: leave that one out.
            if path != "a!/b" {
                builder.add_file(file(path, &[]));
            }
        }
        builder.finish(head()).unwrap();
    }

    /// THREAT_MODEL (f) row 57.
    #[test]
    fn modes_but_two_are_refused() {
        for mode in [0u16, 0o4755, 0o666, 0o644, 0o120_777, 0o100_444, 0o1444] {
            refused_with(FILES_AT + 6, &mode.to_le_bytes(), Code::Mode);
        }
        let mut body = sample();
        put(&mut body, FILES_AT + 6, &0o555u16.to_le_bytes());
        parse(&body).unwrap();
    }

    /// THREAT_MODEL (f) row 50.
    #[test]
    fn sizes_that_lie_are_refused() {
        for size in [1 << 63, u64::MAX, (1 << 44) + 1] {
            refused_with(FILES_AT + 8, &u64::to_le_bytes(size), Code::Limit);
        }
        for size in [0, 9_999, 10_001, 1 << 44] {
            refused_with(FILES_AT + 8, &u64::to_le_bytes(size), Code::Extent);
        }
        refused_with(FILES_AT + 2 * FILE_LEN + 8, &[1], Code::Extent); // bytes of a file without extents
    }

    /// THREAT_MODEL (f) row 51.
    #[test]
    fn extents_that_lie_are_refused() {
        let cases: &[(usize, &[u8])] = &[
            (0, &[3]),                                                   // no such object
            (0, &[0xff; 4]),                                             // nor this
            (8, &(u64::MAX - 4095).to_le_bytes()),                       // offset + length wraps
            (8, &1u64.to_le_bytes()),                                    // unaligned
            (8, &12_288u64.to_le_bytes()),                               // past the end
            (8, &8_192u64.to_le_bytes()),                                // over its neighbour
            (16, &0u64.to_le_bytes()),                                   // empty
            (16, &20_481u64.to_le_bytes()),                              // past the end
            (2 * EXTENT_LEN + 16, &((1u64 << 20) + 4095).to_le_bytes()), // unaligned length before the last
        ];
        for (at, bytes) in cases {
            refused_with(EXTENTS_AT + at, bytes, Code::Extent);
        }
    }

    #[test]
    fn extents_that_overlap_out_of_order_are_refused() {
        for (second, overlap) in [(4096, true), (0, true), (12_288, false)] {
            let mut builder = ManifestBuilder::new();
            builder.add_object(object(1, 20_480, false));
            builder.add_file(file("a", &[(0, second, 8_192)]));
            builder.add_file(file("b", &[(0, 0, 10_000)]));
            let made = builder.finish(head());
            assert_eq!(made.is_err(), overlap, "{second}");
            if let Err(refused) = made {
                assert_eq!(refused.code(), Code::Extent);
            }
        }
    }

    /// THREAT_MODEL (f) rows 52, 53, 54, 56.
    #[test]
    fn objects_that_lie_are_refused() {
        let cases: &[(usize, &[u8], Code)] = &[
            (0, &[3; 32], Code::Object), // the oid of the second
            (32, &[0; 8], Code::Object), // no plain bytes
            (32, &(1u64 << 62).to_le_bytes(), Code::Object),
            (32, &((1u64 << 40) + 1).to_le_bytes(), Code::Object),
            (40, &[1], Code::Object), // stored_len
            (40, &[0xff; 8], Code::Object),
            (48, &[0], Code::Object),
            (48, &[63], Code::Object),
            (49, &[19], Code::Object),
            (49, &[40], Code::Object),
            (50, &[0, 0], Code::Unsupported),
            (50, &[3, 0], Code::Unsupported),
            (52, &[2], Code::Object), // key source
            (52, &[0], Code::Object), // derived, but its inherited root is left over
            (56, &[1], Code::Object), // not in order
            (56, &[0xff; 4], Code::Object),
            (OBJECT_LEN + 56, &[1], Code::Object),     // derived with an index
            (2 * OBJECT_LEN + 56, &[0], Code::Object), // a root used twice
            (2 * OBJECT_LEN + 56, &[2], Code::Object), // out of range
            (120, &[1], Code::Object),                 // first_coded
        ];
        for (at, bytes, code) in cases {
            refused_with(OBJECTS_AT + at, bytes, *code);
        }
        let mut lost = builder();
        lost.add_object(object(7, 1, false));
        assert_eq!(lost.finish(head()).unwrap_err().code(), Code::Object);
    }

    /// THREAT_MODEL (f) row 58: the checks stay near linear.
    #[test]
    fn the_largest_tables_are_read_within_a_bound() {
        let mut builder = ManifestBuilder::new();
        for number in 0..limits::FILES_MAX {
            builder.add_file(file(&format!("{}/{number:07}", number / 1000), &[]));
        }
        let empty = builder.finish(head()).unwrap();

        let mut builder = ManifestBuilder::new();
        let pages = u64::from(limits::EXTENTS_MAX);
        builder.add_object(object(1, pages * 4096, false));
        // Every second page backwards, so that the table is as unsorted as it gets.
        let extents: Vec<_> = (0..pages).map(|n| (0, if n % 2 == 0 { n } else { pages - n } * 4096, 4096)).collect();
        let mut seen = extents.clone();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), extents.len(), "the case itself must not overlap");
        builder.add_file(file("big", &extents));
        let paged = builder.finish(head()).unwrap();

        for manifest in [empty, paged] {
            let body = encode(&manifest);
            let start = std::time::Instant::now();
            Manifest::parse_body(*manifest.header(), &body).unwrap();
            // Generous: a quadratic check would take hours.
            assert!(start.elapsed().as_secs() < 300, "{:?}", start.elapsed());
        }
    }

    #[test]
    fn the_builder_refuses_what_a_reader_would() {
        for (path, code) in [("../x", Code::Path), ("", Code::Path)] {
            let mut builder = builder();
            builder.add_file(file(path, &[]));
            assert_eq!(builder.finish(head()).unwrap_err().code(), code);
        }
        let mut builder = builder();
        builder.annotations(vec![b' '; (1 << 20) + 1]);
        assert_eq!(builder.finish(head()).unwrap_err().code(), Code::Limit);
    }
}
