//! Models of any size without their bytes: the manifest is real, chunks are made when they are fetched.
#![allow(dead_code)] // each user takes its own part

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use modelfs::cache::Model;
use modelfs::crypto::{self, Dek, ModelKeys, ObjectSealer, Verify};
use modelfs::error::{Code, Error, Result};
use modelfs::format::{
    ChunkIndex, Extent, HashAlg, Manifest, ManifestBuilder, ManifestDigest, ModelId, NewFile, NewHeader, NewObject,
    ObjectLayout, Oid, Suite, Vid, names,
};
use modelfs::store::{ChunkSource, Listed};
use tokio::sync::Semaphore;

const SUITE: Suite = Suite::Aes256Gcm;
const HASH: HashAlg = HashAlg::Blake3;
const VID: Vid = Vid([9; 16]);
pub const NAME: &str = "acme/huge";

/// The plain bytes of an object: any place of any object can be foretold.
pub fn plain_word(oid: Oid, word: u64) -> u64 {
    let seed = u64::from_le_bytes(oid.0[..8].try_into().expect("8 of 32"));
    let mut z = seed.wrapping_add(word.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

pub fn plain_byte(oid: Oid, at: u64) -> u8 {
    plain_word(oid, at / 8).to_le_bytes()[(at % 8) as usize]
}

/// `range` starts at a multiple of 8.
fn plain(oid: Oid, range: Range<u64>) -> Vec<u8> {
    let words = range.start / 8..range.end.div_ceil(8);
    let mut bytes: Vec<u8> = words.flat_map(|word| plain_word(oid, word).to_le_bytes()).collect();
    bytes.truncate((range.end - range.start) as usize);
    bytes
}

fn oid(number: u64) -> Oid {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&(number + 1).to_le_bytes());
    Oid(bytes)
}

fn dek() -> Dek {
    Dek::from_secret(modelfs::mem::Secret::from_bytes(&mut [0x42; 32]))
}

/// A store whose data objects are made as they are read, chunk by chunk. Nothing else is in it.
pub struct OnDemand {
    objects: HashMap<String, (Oid, ObjectLayout)>,
    fetches: AtomicU64,
    /// Each fetch takes one; as many as anyone wants unless [`OnDemand::shut`].
    gate: Semaphore,
}

impl std::fmt::Debug for OnDemand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OnDemand({} objects)", self.objects.len())
    }
}

impl OnDemand {
    fn new(objects: &[(Oid, ObjectLayout)]) -> OnDemand {
        let model_id = ModelId::of_name(NAME);
        let objects = objects.iter().map(|(oid, layout)| (names::data(model_id, *oid), (*oid, *layout))).collect();
        OnDemand { objects, fetches: AtomicU64::new(0), gate: Semaphore::new(Semaphore::MAX_PERMITS / 2) }
    }

    pub fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::SeqCst)
    }

    /// From now on fetches wait.
    pub fn shut(&self) {
        self.gate.forget_permits(Semaphore::MAX_PERMITS / 2);
    }

    pub fn open(&self) {
        self.gate.add_permits(Semaphore::MAX_PERMITS / 4);
    }
}

/// A chunk as it would be stored, and its hash.
fn stored_chunk(oid: Oid, layout: ObjectLayout, index: ChunkIndex) -> (Vec<u8>, Vec<u8>, [u8; 32]) {
    let sealer = ObjectSealer::new(&dek(), SUITE, layout, HASH, oid, VID);
    let (mut bytes, mut tags) = (plain(oid, layout.chunk_plain(index)), Vec::new());
    let hash = sealer.seal_chunk(index, &mut bytes, &mut tags);
    (bytes, tags, hash)
}

#[async_trait]
impl ChunkSource for OnDemand {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        self.gate.acquire().await.expect("never closed").forget();
        let (oid, layout) = self.objects.get(name).ok_or_else(|| Error::new(Code::NotFound, name))?;
        let index = layout.chunks().find(|index| layout.chunk_stored(*index) == range);
        let index = index.ok_or_else(|| Error::new(Code::Length, format!("{range:?} is no chunk")))?;
        let (bytes, tags, _) = stored_chunk(*oid, *layout, index);
        Ok(vec![bytes.into(), tags.into()])
    }
    async fn read_small(&self, name: &str, _max: u64) -> Result<Bytes> {
        Err(Error::new(Code::NotFound, name))
    }
    async fn size(&self, name: &str) -> Result<u64> {
        Err(Error::new(Code::NotFound, name))
    }
    async fn list(&self, _prefix: &str) -> Result<Vec<Listed>> {
        Ok(Vec::new())
    }
    async fn list_dirs(&self, _prefix: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    fn describe(&self) -> String {
        "on demand".into()
    }
}

/// A sealed manifest and the store of its chunks.
pub struct Huge {
    pub manifest: Vec<u8>,
    pub objects: Vec<(Oid, ObjectLayout)>,
    pub store: Arc<OnDemand>,
}

impl Huge {
    fn seal(mut builder: ManifestBuilder, objects: Vec<(Oid, ObjectLayout)>, honest: &[(usize, ChunkIndex)]) -> Huge {
        for (number, (oid, layout)) in objects.iter().enumerate() {
            // What is never fetched needs no true hash, and hashing 10 TiB for it would take an hour.
            let mut hashes = vec![[0xee; 32]; layout.chunk_count() as usize];
            for (_, index) in honest.iter().filter(|(object, _)| *object == number) {
                hashes[index.0 as usize] = stored_chunk(*oid, *layout, *index).2;
            }
            let commit = ObjectSealer::new(&dek(), SUITE, *layout, HASH, *oid, VID).commit();
            builder.add_object(NewObject {
                oid: *oid,
                layout: *layout,
                suite: SUITE,
                inherited: false,
                origin_vid: VID,
                commit,
                hashes,
                coded: None,
            });
        }
        let header = NewHeader {
            suite: SUITE,
            hash_alg: HASH,
            model_id: ModelId::of_name(NAME),
            vid: VID,
            seq: 1,
            created_at: 1_790_000_000,
            msalt: [5; 32],
            previous: None,
        };
        let mut manifest = builder.finish(header).expect("the rules are kept");
        let manifest = crypto::seal_manifest(&mut manifest, &dek(), &[]).expect("sealed");
        let store = Arc::new(OnDemand::new(&objects));
        Huge { manifest, objects, store }
    }

    /// `count` files of 1 to 4096 bytes in folders of 1000, all in one pack; `honest`: files that will be read.
    pub fn of_small_files(count: u64, honest: &[u64]) -> Huge {
        let size = |number: u64| number % 4096 + 1;
        let mut builder = ManifestBuilder::new();
        for number in 0..count {
            builder.add_file(NewFile {
                path: Huge::small_path(number),
                mode: 0o444,
                size: size(number),
                sha256: [number as u8; 32],
                mtime: 1_790_000_000,
                extents: vec![Extent { object: 0, object_offset: number * 4096, len: size(number) }],
            });
        }
        let layout = ObjectLayout::new((count - 1) * 4096 + size(count - 1), 16, 23).expect("a layout");
        let honest: Vec<_> = honest.iter().map(|number| (0, layout.chunk_at(number * 4096))).collect();
        Huge::seal(builder, vec![(oid(0), layout)], &honest)
    }

    pub fn small_path(number: u64) -> String {
        format!("shard-{:04}/tensor-{number:07}.bin", number / 1000)
    }

    /// One file of `size` bytes in objects of at most 1 TiB; `honest`: places that will be read.
    pub fn of_one_file(size: u64, honest: &[u64]) -> Huge {
        const OBJECT: u64 = 1 << 40;
        let mut builder = ManifestBuilder::new();
        let (mut extents, mut objects) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < size {
            let len = (size - at).min(OBJECT);
            extents.push(Extent { object: objects.len() as u32, object_offset: 0, len });
            objects.push((oid(objects.len() as u64), ObjectLayout::new(len, 16, 23).expect("a layout")));
            at += len;
        }
        builder.add_file(NewFile {
            path: "model.safetensors".into(),
            mode: 0o444,
            size,
            sha256: [1; 32],
            mtime: 1_790_000_000,
            extents,
        });
        let place = |at: &u64| ((at / OBJECT) as usize, objects[(at / OBJECT) as usize].1.chunk_at(at % OBJECT));
        let honest: Vec<_> = honest.iter().map(place).collect();
        Huge::seal(builder, objects, &honest)
    }

    /// The byte at `at` of a model of one file.
    pub fn byte(&self, at: u64) -> u8 {
        plain_byte(self.objects[(at >> 40) as usize].0, at & ((1 << 40) - 1))
    }

    pub fn open(&self) -> (Manifest, ModelKeys) {
        crypto::open_manifest(&self.manifest, dek()).expect("opens")
    }

    pub fn model(&self, opened: (Manifest, ModelKeys)) -> Arc<Model> {
        let digest = ManifestDigest::of(&self.manifest);
        Arc::new(Model::new(0, NAME.into(), digest, opened, self.store.clone(), Verify::Strict))
    }
}
