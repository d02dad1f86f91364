//! Collects what a sealer has stored and makes the one manifest that describes it.
//!
//! Promises: what `finish` returns passes the reader's own checks, so its encoding is accepted.

use super::body::Counts;
use super::manifest::CodedChunk;
use super::{Extent, FileEntry, HashAlg, Manifest, ManifestDigest, ManifestHeader, ModelId, ObjectEntry, ObjectLayout};
use super::{OBJECT_HEADER_LEN, Oid, Suite, Vid};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// A stored data object, as its sealer knows it.
#[derive(Debug, Clone)]
pub struct NewObject {
    pub oid: Oid,
    pub layout: ObjectLayout,
    pub suite: Suite,
    /// Its root comes from an earlier version and will be listed in the manifest.
    pub inherited: bool,
    pub origin_vid: Vid,
    pub commit: [u8; 32],
    /// One a chunk.
    pub hashes: Vec<[u8; 32]>,
    /// Coded objects: bytes encrypted of each chunk, as many as it has plain ones where it is stored as it is.
    pub coded: Option<Vec<u32>>,
}

impl NewObject {
    /// Bytes of the whole stored object, header included.
    ///
    /// # Errors
    /// `OBJECT` if there are not as many coded lengths as chunks, or one that its chunk cannot have.
    pub fn stored_len(&self) -> Result<u64> {
        let Some(coded) = &self.coded else { return Ok(self.layout.stored_len()) };
        if coded.len() as u64 != self.layout.chunk_count() {
            refuse!(Object, "object {} has {} coded lengths for its chunks", self.oid, coded.len());
        }
        let mut stored_len = OBJECT_HEADER_LEN as u64;
        for (index, &len) in self.layout.chunks().zip(coded) {
            let Some(shape) = self.layout.checked_chunk_shape(index, u64::from(len)) else {
                refuse!(Object, "chunk {index} of object {} has {len} bytes coded", self.oid);
            };
            stored_len += shape.stored_len();
        }
        Ok(stored_len)
    }
}

/// A file whose bytes are stored.
#[derive(Debug, Clone)]
pub struct NewFile {
    pub path: String,
    pub mode: u16,
    pub size: u64,
    pub sha256: [u8; 32],
    pub mtime: i64,
    /// `object` counts the calls of [`ManifestBuilder::add_object`] from 0.
    pub extents: Vec<Extent>,
}

/// Files may come in any order; objects keep the order they came in.
#[derive(Debug, Default)]
pub struct ManifestBuilder {
    files: Vec<NewFile>,
    objects: Vec<NewObject>,
    annotations: Vec<u8>,
}

impl ManifestBuilder {
    pub fn new() -> Self {
        ManifestBuilder::default()
    }

    /// Returns the object's index, for extents.
    pub fn add_object(&mut self, object: NewObject) -> u32 {
        self.objects.push(object);
        u32::try_from(self.objects.len() - 1).unwrap_or(u32::MAX)
    }

    #[cfg(test)]
    pub(super) fn objects_mut(&mut self) -> &mut [NewObject] {
        &mut self.objects
    }

    pub fn add_file(&mut self, file: NewFile) {
        self.files.push(file);
    }

    /// JSON for people, at most 1 MiB.
    pub fn annotations(&mut self, json: Vec<u8>) {
        self.annotations = json;
    }

    /// The manifest, its commitments still zero: [`Manifest::header_mut`] takes them.
    ///
    /// # Errors
    /// The code of the first rule that the files or objects break.
    pub fn finish(mut self, head: NewHeader) -> Result<Manifest> {
        self.files.sort_unstable_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
        let header = ManifestHeader {
            suite: head.suite,
            hash_alg: head.hash_alg,
            model_id: head.model_id,
            vid: head.vid,
            seq: head.seq,
            created_at: head.created_at,
            body_plain_len: 0,
            msalt: head.msalt,
            dek_commit: [0; 32],
            manifest_commit: [0; 32],
            previous: head.previous,
        };
        let mut manifest = Manifest {
            header,
            files: Vec::with_capacity(self.files.len()),
            extents: Vec::new(),
            objects: Vec::with_capacity(self.objects.len()),
            hashes: Vec::new(),
            coded: Vec::new(),
            strings: Vec::new(),
            annotations: self.annotations,
            n_inherited: 0,
        };
        for object in self.objects {
            let stored_len = object.stored_len()?;
            let inherited = object.inherited.then_some(manifest.n_inherited);
            manifest.n_inherited += u32::from(object.inherited);
            manifest.objects.push(ObjectEntry {
                oid: object.oid,
                layout: object.layout,
                stored_len,
                suite: object.suite,
                inherited,
                first_hash: manifest.hashes.len() as u64,
                first_coded: object.coded.is_some().then_some(manifest.coded.len() as u64),
                origin_vid: object.origin_vid,
                commit: object.commit,
            });
            manifest.hashes.extend(object.hashes);
            manifest.coded.extend(object.coded.into_iter().flatten().map(|len| CodedChunk { len, start: 0 }));
        }
        for file in self.files {
            let too_many = || Error::new(Code::Limit, "manifest has more paths or extents than fit");
            manifest.files.push(FileEntry {
                path_off: u32::try_from(manifest.strings.len()).map_err(|_| too_many())?,
                path_len: u16::try_from(file.path.len())
                    .map_err(|_| Error::new(Code::Path, format!("path of {} bytes", file.path.len())))?,
                mode: file.mode,
                size: file.size,
                sha256: file.sha256,
                first_extent: u32::try_from(manifest.extents.len()).map_err(|_| too_many())?,
                n_extents: u32::try_from(file.extents.len()).map_err(|_| too_many())?,
                mtime: file.mtime,
            });
            manifest.strings.extend_from_slice(file.path.as_bytes());
            manifest.extents.extend(file.extents);
        }
        Counts::of(&manifest).check()?;
        manifest.place_coded()?;
        manifest.check()?;
        manifest.header.body_plain_len = manifest.body_len() as u64;
        Ok(manifest)
    }
}

/// What the sealer decides about a version beside its content.
#[derive(Debug, Clone, Copy)]
pub struct NewHeader {
    pub suite: Suite,
    pub hash_alg: HashAlg,
    pub model_id: ModelId,
    pub vid: Vid,
    pub seq: u64,
    pub created_at: i64,
    pub msalt: [u8; 32],
    pub previous: Option<ManifestDigest>,
}
