//! A sealed model in memory, for the tests of this module: one file, one object, any shape.

use bytes::Bytes;

use super::*;
use crate::codec;
use crate::format::{
    ChunkIndex, Extent, HashAlg, Manifest, ManifestBuilder, ModelId, NewFile, NewHeader, NewObject, ObjectLayout, Oid,
    Suite, Vid,
};
use crate::store::CipherChunk;

/// Plain bytes that differ in every 4 KiB and between seeds.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(seed).wrapping_mul(0xd134_2543_de82_ef95);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub struct Sealed {
    pub plain: Vec<u8>,
    /// `ciphertext || tags` of each chunk.
    pub chunks: Vec<Vec<u8>>,
    pub manifest_bytes: Vec<u8>,
    pub manifest: Manifest,
    pub keys: ModelKeys,
}

impl Sealed {
    pub fn new(suite: Suite, hash_alg: HashAlg, layout: ObjectLayout, oid: Oid) -> Sealed {
        let plain = pattern(oid.0[0], layout.plain_len() as usize);
        Sealed::of(suite, hash_alg, layout, oid, plain, None)
    }

    /// An object of bf16 weights, every chunk coded but those of `as_is`.
    pub fn coded(suite: Suite, hash_alg: HashAlg, layout: ObjectLayout, as_is: &[u32]) -> Sealed {
        let plain = weights(layout.plain_len() as usize);
        Sealed::of(suite, hash_alg, layout, Oid([5; 32]), plain, Some(as_is))
    }

    fn of(
        suite: Suite,
        hash_alg: HashAlg,
        layout: ObjectLayout,
        oid: Oid,
        plain: Vec<u8>,
        coded_but: Option<&[u32]>,
    ) -> Sealed {
        let model_id = ModelId::of_name("test/model");
        let (vid, mut key) = (Vid([9; 16]), [0x42; 32]);
        let dek = Dek::from_secret(crate::mem::Secret::from_bytes(&mut key));
        let new_sealer = if coded_but.is_some() { ObjectSealer::coded } else { ObjectSealer::new };
        let sealer = new_sealer(&dek, suite, layout, hash_alg, oid, vid);
        let (mut chunks, mut hashes, mut lens) = (Vec::new(), Vec::new(), Vec::new());
        for index in layout.chunks() {
            let range = layout.chunk_plain(index);
            let mut chunk = plain[range.start as usize..range.end as usize].to_vec();
            if coded_but.is_some_and(|as_is| !as_is.contains(&index.0)) {
                let mut coded = Vec::new();
                codec::encode(codec::Kind::Bf16, 0, &chunk, &mut coded);
                if coded.len() < chunk.len() {
                    chunk = coded;
                }
            }
            lens.push(chunk.len() as u32);
            let mut tags = Vec::new();
            hashes.push(sealer.seal_chunk(index, &mut chunk, &mut tags));
            chunk.extend_from_slice(&tags);
            chunks.push(chunk);
        }
        let mut builder = ManifestBuilder::new();
        let object = builder.add_object(NewObject {
            oid,
            layout,
            suite,
            inherited: false,
            origin_vid: vid,
            commit: sealer.commit(),
            hashes,
            coded: coded_but.map(|_| lens),
        });
        let len = plain.len() as u64;
        builder.add_file(NewFile {
            path: "model.bin".into(),
            mode: 0o444,
            size: len,
            sha256: sha256(&[&plain]),
            mtime: 0,
            extents: vec![Extent { object, object_offset: 0, len }],
        });
        let head = NewHeader { suite, hash_alg, model_id, vid, seq: 1, created_at: 0, msalt: [3; 32], previous: None };
        let mut manifest = builder.finish(head).unwrap();
        let manifest_bytes = seal_manifest(&mut manifest, &dek, &[]).unwrap();
        let (opened, keys) = open_manifest(&manifest_bytes, dek).unwrap();
        assert_eq!(opened, manifest);
        Sealed { plain, chunks, manifest_bytes, manifest: opened, keys }
    }

    pub fn small(suite: Suite) -> Sealed {
        let layout = ObjectLayout::new((2 << 20) + 70_000, 16, 20).unwrap();
        Sealed::new(suite, HashAlg::Blake3, layout, Oid([1; 32]))
    }

    /// The chunk as a store would hand it over, in uneven pieces.
    pub fn chunk(&self, index: u32) -> CipherChunk {
        self.chunk_of(index, &self.chunks[index as usize])
    }

    pub fn chunk_of(&self, index: u32, stored: &[u8]) -> CipherChunk {
        let pieces = stored.chunks(100_003).map(Bytes::copy_from_slice).collect();
        CipherChunk { object: self.manifest.objects()[0].oid, index: ChunkIndex(index), pieces }
    }

    pub fn slot(&self, index: u32) -> Vec<u8> {
        let len = self.manifest.objects()[0].layout.chunk_plain_len(ChunkIndex(index));
        vec![0xee; len as usize]
    }

    pub fn plain_of(&self, index: u32) -> &[u8] {
        let range = self.manifest.objects()[0].layout.chunk_plain(ChunkIndex(index));
        &self.plain[range.start as usize..range.end as usize]
    }
}

/// Elements of bf16 as weights are: exponents close to each other, all else random.
pub fn weights(len: usize) -> Vec<u8> {
    let mut bytes = pattern(33, len);
    for element in bytes.as_chunks_mut::<2>().0 {
        let exponent = 0x78 + (element[1] & 7);
        element[1] = element[1] & 0x80 | exponent >> 1;
        element[0] = element[0] & 0x7f | exponent << 7;
    }
    bytes
}
