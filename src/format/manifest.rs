//! The manifest: what a version of a model consists of. Its header is clear and signed; its body is sealed.
//!
//! ```text
//! header 256 | body ciphertext, 64 KiB blocks | one tag a block
//! ```
//! Promises: a [`Manifest`] exists only if every rule of docs/FORMAT.md a.4 holds for it, so its users index without checks.
//! Not here: reading the body (`body`), writing one (`builder`), opening it (`crypto`).

use std::ops::Range;

use super::limits::{MANIFEST_BLOCK_LOG2, MANIFEST_BODY_BYTES_MAX, MANIFEST_BODY_BYTES_MIN};
use super::wire::{array_at, i64_at, is_zero, put, u16_at, u64_at};
use super::{
    ChunkIndex, ChunkShape, FORMAT_VERSION, HashAlg, MANIFEST_HEADER_LEN, ManifestDigest, ModelId, ObjectHeader,
    ObjectLayout, Oid, Suite, TAG_LEN, Vid,
};
use crate::error::Result;
use crate::refuse;

const MAGIC: &[u8; 8] = b"MFS1MANI";

/// The clear 256 bytes before the sealed body; its SHA-256 is bound into every block of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestHeader {
    pub suite: Suite,
    pub hash_alg: HashAlg,
    pub model_id: ModelId,
    pub vid: Vid,
    /// The version number, from 1.
    pub seq: u64,
    /// Unix seconds.
    pub created_at: i64,
    pub body_plain_len: u64,
    pub msalt: [u8; 32],
    pub dek_commit: [u8; 32],
    pub manifest_commit: [u8; 32],
    /// The version this one was made from, if any.
    pub previous: Option<ManifestDigest>,
}

impl ManifestHeader {
    /// Stored bytes of the sealed body: the plain ones and a tag for each 64 KiB.
    pub const fn body_stored_len(&self) -> u64 {
        self.body_plain_len + TAG_LEN * self.body_plain_len.div_ceil(1 << MANIFEST_BLOCK_LOG2)
    }

    /// Bytes of the whole manifest object.
    pub const fn object_len(&self) -> u64 {
        MANIFEST_HEADER_LEN as u64 + self.body_stored_len()
    }

    pub fn encode(&self) -> [u8; MANIFEST_HEADER_LEN] {
        let mut out = [0u8; MANIFEST_HEADER_LEN];
        put(&mut out, 0, MAGIC);
        put(&mut out, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut out, 10, &self.suite.number().to_le_bytes());
        put(&mut out, 12, &self.hash_alg.number().to_le_bytes());
        put(&mut out, 16, &self.model_id.0);
        put(&mut out, 48, &self.vid.0);
        put(&mut out, 64, &self.seq.to_le_bytes());
        put(&mut out, 72, &self.created_at.to_le_bytes());
        put(&mut out, 80, &self.body_plain_len.to_le_bytes());
        put(&mut out, 88, &self.body_stored_len().to_le_bytes());
        put(&mut out, 96, &self.msalt);
        put(&mut out, 128, &self.dek_commit);
        put(&mut out, 160, &self.manifest_commit);
        put(&mut out, 192, &self.previous.map_or([0; 32], |digest| digest.0));
        out
    }

    /// Reads exactly the 256 header bytes.
    ///
    /// # Errors
    /// `MAN_FORMAT` for another length, magic or seq 0; `UNSUPPORTED` for what a later format may mean; `MAN_LENGTH` for
    /// a body that no manifest can have.
    pub fn parse(bytes: &[u8]) -> Result<ManifestHeader> {
        if bytes.len() != MANIFEST_HEADER_LEN {
            refuse!(ManFormat, "manifest header is {} bytes long, not {MANIFEST_HEADER_LEN}", bytes.len());
        }
        if &bytes[..8] != MAGIC {
            refuse!(ManFormat, "manifest does not start with MFS1MANI");
        }
        let version = u16_at(bytes, 8);
        if version != FORMAT_VERSION {
            refuse!(Unsupported, "manifest has format version {version}, this reader knows {FORMAT_VERSION}");
        }
        let flags = u16_at(bytes, 14);
        if flags != 0 || !is_zero(&bytes[224..]) {
            refuse!(Unsupported, "manifest header has flags {flags:#x} or a reserved byte set");
        }
        let previous: [u8; 32] = array_at(bytes, 192);
        let header = ManifestHeader {
            suite: Suite::from_u16(u16_at(bytes, 10))?,
            hash_alg: HashAlg::from_u16(u16_at(bytes, 12))?,
            model_id: ModelId(array_at(bytes, 16)),
            vid: Vid(array_at(bytes, 48)),
            seq: u64_at(bytes, 64),
            created_at: i64_at(bytes, 72),
            body_plain_len: u64_at(bytes, 80),
            msalt: array_at(bytes, 96),
            dek_commit: array_at(bytes, 128),
            manifest_commit: array_at(bytes, 160),
            previous: (!is_zero(&previous)).then_some(ManifestDigest(previous)),
        };
        if header.seq == 0 {
            refuse!(ManFormat, "manifest has version number 0, the first is 1");
        }
        // Before `body_stored_len` is asked: its arithmetic is safe only within these bounds.
        if !(MANIFEST_BODY_BYTES_MIN..=MANIFEST_BODY_BYTES_MAX).contains(&header.body_plain_len) {
            refuse!(ManLength, "manifest body of {} bytes, 64 to 512 MiB are allowed", header.body_plain_len);
        }
        let stored_len = u64_at(bytes, 88);
        if stored_len != header.body_stored_len() {
            refuse!(ManLength, "manifest body says {stored_len} stored bytes, needs {}", header.body_stored_len());
        }
        Ok(header)
    }

    /// Splits a whole manifest object into its checked header and its sealed body, whose length is then exact.
    ///
    /// # Errors
    /// As [`ManifestHeader::parse`]; `MAN_LENGTH` if the object is longer or shorter than its header says.
    pub fn parse_object(object: &[u8]) -> Result<(ManifestHeader, &[u8])> {
        let Some((head, body)) = object.split_at_checked(MANIFEST_HEADER_LEN) else {
            refuse!(ManFormat, "manifest is {} bytes long, its header alone has {MANIFEST_HEADER_LEN}", object.len());
        };
        let header = ManifestHeader::parse(head)?;
        if body.len() as u64 != header.body_stored_len() {
            refuse!(ManLength, "manifest body is {} bytes long, header says {}", body.len(), header.body_stored_len());
        }
        Ok((header, body))
    }
}

/// A file of the model. Its path and extents lie in the manifest's tables: ask [`Manifest::path`], [`Manifest::extents`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileEntry {
    pub(super) path_off: u32,
    pub(super) path_len: u16,
    /// 0o444 or 0o555.
    pub mode: u16,
    pub size: u64,
    /// Of the plaintext.
    pub sha256: [u8; 32],
    pub(super) first_extent: u32,
    pub(super) n_extents: u32,
    /// Unix seconds; any value, whoever shows it clamps it.
    pub mtime: i64,
}

/// A run of a file's bytes within one object's plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index into [`Manifest::objects`].
    pub object: u32,
    pub object_offset: u64,
    pub len: u64,
}

/// A data object, as the signed manifest describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectEntry {
    pub oid: Oid,
    pub layout: ObjectLayout,
    /// Bytes of the whole stored object, header included.
    pub(super) stored_len: u64,
    pub suite: Suite,
    /// Index into the table of inherited object roots; `None`: the root is derived from this version's DEK.
    pub inherited: Option<u32>,
    /// Index of chunk 0's hash in [`Manifest::hashes`].
    pub first_hash: u64,
    /// Coded objects: index of chunk 0 in the table of coded lengths.
    pub(super) first_coded: Option<u64>,
    pub origin_vid: Vid,
    pub commit: [u8; 32],
}

impl ObjectEntry {
    /// The header that the stored object must start with.
    pub fn header(&self) -> ObjectHeader {
        ObjectHeader {
            suite: self.suite,
            block_log2: self.layout.block_log2(),
            chunk_log2: self.layout.chunk_log2(),
            oid: self.oid,
            origin_vid: self.origin_vid,
            coded: self.is_coded(),
            commit: self.commit,
        }
    }

    /// Bytes of the whole stored object, header included.
    pub const fn stored_len(&self) -> u64 {
        self.stored_len
    }

    /// Whether some of its chunks may hold a coded stream in place of their plain bytes.
    pub const fn is_coded(&self) -> bool {
        self.first_coded.is_some()
    }

    pub(super) fn hash_range(&self) -> Range<u64> {
        self.first_hash..self.first_hash + self.layout.chunk_count()
    }
}

/// How a chunk of a coded object is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CodedChunk {
    /// Bytes encrypted; as many as the chunk has plain ones when it is stored as it is.
    pub len: u32,
    /// Where the chunk starts in the stored object.
    pub start: u64,
}

/// A checked manifest. Holds no keys: the table of inherited roots is left to whoever opened the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub(super) header: ManifestHeader,
    pub(super) files: Vec<FileEntry>,
    pub(super) extents: Vec<Extent>,
    pub(super) objects: Vec<ObjectEntry>,
    pub(super) hashes: Vec<[u8; 32]>,
    pub(super) coded: Vec<CodedChunk>,
    pub(super) strings: Vec<u8>,
    pub(super) annotations: Vec<u8>,
    pub(super) n_inherited: u32,
}

impl Manifest {
    pub fn header(&self) -> &ManifestHeader {
        &self.header
    }

    /// For the sealer, which knows the commitments only once the body exists.
    pub fn header_mut(&mut self) -> &mut ManifestHeader {
        &mut self.header
    }

    /// Strictly ascending by path bytes.
    pub fn files(&self) -> &[FileEntry] {
        &self.files
    }

    pub fn objects(&self) -> &[ObjectEntry] {
        &self.objects
    }

    pub fn hashes(&self) -> &[[u8; 32]] {
        &self.hashes
    }

    /// Opaque JSON for people; never parsed on the way to a mount.
    pub fn annotations(&self) -> &[u8] {
        &self.annotations
    }

    pub fn n_inherited(&self) -> u32 {
        self.n_inherited
    }

    pub fn path(&self, file: &FileEntry) -> &str {
        std::str::from_utf8(self.path_bytes(file)).expect("paths are checked to be UTF-8 when a manifest is made")
    }

    pub fn path_bytes(&self, file: &FileEntry) -> &[u8] {
        &self.strings[file.path_off as usize..][..usize::from(file.path_len)]
    }

    /// The file's bytes, in order; empty for an empty file.
    pub fn extents(&self, file: &FileEntry) -> &[Extent] {
        &self.extents[file.first_extent as usize..][..file.n_extents as usize]
    }

    /// The signed hash of a stored chunk.
    ///
    /// # Panics
    /// If there is no such object or chunk.
    pub fn chunk_hash(&self, object: u32, index: ChunkIndex) -> &[u8; 32] {
        let entry = &self.objects[object as usize];
        assert!(u64::from(index.0) < entry.layout.chunk_count(), "chunk {index} of object {}", entry.oid);
        let at = entry.first_hash + u64::from(index.0);
        &self.hashes[usize::try_from(at).expect("hash counts are checked to fit")]
    }

    fn coded_chunk(&self, entry: &ObjectEntry, index: ChunkIndex) -> Option<CodedChunk> {
        let at = entry.first_coded? + u64::from(index.0);
        Some(self.coded[usize::try_from(at).expect("counts of coded chunks are checked to fit")])
    }

    /// How chunk `index` of an object is stored. It is coded if its shape seals fewer bytes than it has plain ones.
    ///
    /// # Panics
    /// If there is no such object or chunk.
    pub fn chunk_shape(&self, object: u32, index: ChunkIndex) -> ChunkShape {
        let entry = &self.objects[object as usize];
        let sealed_len = match self.coded_chunk(entry, index) {
            Some(chunk) => u64::from(chunk.len),
            None => entry.layout.chunk_plain_len(index),
        };
        entry.layout.chunk_shape(index, sealed_len)
    }

    /// The bytes of the stored object that hold chunk `index`: ciphertext, then its tags. O(1).
    ///
    /// # Panics
    /// If there is no such object or chunk.
    pub fn chunk_stored(&self, object: u32, index: ChunkIndex) -> Range<u64> {
        let entry = &self.objects[object as usize];
        match self.coded_chunk(entry, index) {
            Some(chunk) => {
                let shape = entry.layout.chunk_shape(index, u64::from(chunk.len));
                chunk.start..chunk.start + shape.stored_len()
            }
            None => entry.layout.chunk_stored(index),
        }
    }

    /// The coded lengths of all chunks of a coded object, for a later version that inherits it.
    pub fn object_coded(&self, object: u32) -> Option<Vec<u32>> {
        let entry = &self.objects[object as usize];
        let first = usize::try_from(entry.first_coded?).expect("counts of coded chunks are checked to fit");
        let chunks = &self.coded[first..][..entry.layout.chunk_count() as usize];
        Some(chunks.iter().map(|chunk| chunk.len).collect())
    }

    /// The signed hashes of all chunks of an object.
    pub fn object_hashes(&self, object: u32) -> &[[u8; 32]] {
        let range = self.objects[object as usize].hash_range();
        &self.hashes[range.start as usize..range.end as usize]
    }

    /// The index of the file at `path`. O(log files).
    pub fn find(&self, path: &str) -> Option<usize> {
        self.files.binary_search_by(|file| self.path_bytes(file).cmp(path.as_bytes())).ok()
    }

    /// Plain bytes of all files.
    pub fn total_size(&self) -> u128 {
        self.files.iter().map(|file| u128::from(file.size)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn header() -> ManifestHeader {
        ManifestHeader {
            suite: Suite::Aes256Gcm,
            hash_alg: HashAlg::Blake3,
            model_id: ModelId([1; 32]),
            vid: Vid([2; 16]),
            seq: 7,
            created_at: -1,
            body_plain_len: 65_537,
            msalt: [3; 32],
            dek_commit: [4; 32],
            manifest_commit: [5; 32],
            previous: None,
        }
    }

    #[test]
    fn a_header_is_read_back_as_written() {
        for previous in [None, Some(ManifestDigest([6; 32]))] {
            let header = ManifestHeader { previous, ..header() };
            assert_eq!(ManifestHeader::parse(&header.encode()).unwrap(), header);
        }
        assert_eq!(header().body_stored_len(), 65_537 + 32);
    }

    /// THREAT_MODEL (f) rows 54 and 62.
    #[test]
    fn every_field_of_a_header_is_checked() {
        let cases: &[(usize, &[u8], Code)] = &[
            (0, b"X", Code::ManFormat),
            (8, &[0], Code::Unsupported),
            (8, &[2], Code::Unsupported),
            (10, &[3], Code::Unsupported),
            (12, &[0], Code::Unsupported),
            (12, &[3], Code::Unsupported),
            (14, &[1], Code::Unsupported),
            (15, &[1], Code::Unsupported),
            (224, &[1], Code::Unsupported),
            (255, &[1], Code::Unsupported),
            (64, &[0; 8], Code::ManFormat),
            (80, &(1u64 << 63).to_le_bytes(), Code::ManLength),
            (80, &u64::MAX.to_le_bytes(), Code::ManLength),
            (80, &63u64.to_le_bytes(), Code::ManLength),
            (80, &((512u64 << 20) + 1).to_le_bytes(), Code::ManLength),
            (88, &[0], Code::ManLength),
        ];
        for (at, bytes, code) in cases {
            let mut wrong = header().encode();
            put(&mut wrong, *at, bytes);
            assert_eq!(ManifestHeader::parse(&wrong).unwrap_err().code(), *code, "offset {at} {bytes:?}");
        }
        assert_eq!(ManifestHeader::parse(&header().encode()[1..]).unwrap_err().code(), Code::ManFormat);
    }

    #[test]
    fn an_object_is_exactly_as_long_as_its_header_says() {
        let header = ManifestHeader { body_plain_len: 64, ..header() };
        let mut object = header.encode().to_vec();
        object.extend([0; 80]);
        assert_eq!(object.len() as u64, header.object_len());
        assert_eq!(ManifestHeader::parse_object(&object).unwrap().1.len(), 80);
        assert_eq!(ManifestHeader::parse_object(&object[..335]).unwrap_err().code(), Code::ManLength);
        object.push(0);
        assert_eq!(ManifestHeader::parse_object(&object).unwrap_err().code(), Code::ManLength);
        assert_eq!(ManifestHeader::parse_object(&object[..255]).unwrap_err().code(), Code::ManFormat);
    }
}
