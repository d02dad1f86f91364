//! Small sealed models in memory, made directly from the format and crypto modules, with any layout a test wants.
#![allow(dead_code)] // each test binary uses its own part

use std::sync::Arc;

use bytes::Bytes;
use modelfs::cache::Model;
use modelfs::codec;
use modelfs::crypto::{self, Dek, FileHasher, ModelKeys, ObjectSealer, Verify};
use modelfs::format::{
    Extent, HashAlg, ManifestBuilder, ManifestDigest, ModelId, NewFile, NewHeader, NewObject, ObjectLayout, Oid, Suite,
    Vid, names,
};
use modelfs::store::memory::MemoryStore;
use modelfs::store::{ChunkSink, ChunkSource};

/// A reproducible stream of numbers; the seed is printed by whoever makes one (SplitMix64).
pub struct Random(pub u64);

impl Random {
    /// Seeded by `MODELFS_TEST_SEED` when set, else by the clock; printed so that a failure can be replayed.
    pub fn announced(what: &str) -> Random {
        let seed = match std::env::var("MODELFS_TEST_SEED") {
            Ok(text) => text.parse().expect("MODELFS_TEST_SEED is a number"),
            Err(_) => {
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos()
                    as u64
            }
        };
        eprintln!("{what}: MODELFS_TEST_SEED={seed}");
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform enough in `0..bound`; `bound` > 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// What the manifest says of objects although it is not so: what a hostile publisher, or a two-key ciphertext, brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lie {
    #[default]
    Honest,
    /// Chunks sealed under another key, listed with their true hashes and this key's commitment.
    OtherKey,
    /// The same, with the commitment of the other key.
    OtherKeyAndCommitment,
}

/// How a fixture is stored.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    pub suite: Suite,
    pub hash_alg: HashAlg,
    pub block_log2: u8,
    pub chunk_log2: u8,
    /// Files smaller than this share one object, 4096-aligned, in path order.
    pub pack_below: usize,
    /// Files are cut into objects of at most this many bytes (a multiple of 4096).
    pub slice: usize,
    /// Chunks are coded as bf16 where that makes them shorter; files are turned into such weights first.
    pub coded: bool,
    pub lie: Lie,
    /// Of every file, seconds since 1970.
    pub mtime: i64,
}

impl Default for Style {
    fn default() -> Self {
        Style {
            suite: Suite::Aes256Gcm,
            hash_alg: HashAlg::Blake3,
            block_log2: 16,
            chunk_log2: 20,
            pack_below: 0,
            slice: usize::MAX,
            coded: false,
            mtime: 1_790_000_000,
            lie: Lie::Honest,
        }
    }
}

pub struct Fixture {
    pub store: Arc<MemoryStore>,
    pub model_id: ModelId,
    pub files: Vec<(String, Vec<u8>)>,
    pub manifest: Vec<u8>,
    pub style: Style,
    dek_bytes: [u8; 32],
}

pub const NAME: &str = "acme/fixture";

impl Fixture {
    pub async fn seal(mut files: Vec<(String, Vec<u8>)>, style: Style, random: &mut Random) -> Fixture {
        if style.coded {
            files.iter_mut().for_each(|(_, bytes)| weigh(bytes));
        }
        let store = Arc::new(MemoryStore::new());
        let model_id = ModelId::of_name(NAME);
        let dek_bytes: [u8; 32] = random.bytes(32).try_into().expect("32");
        let dek = dek_of(&dek_bytes);
        let vid = Vid(random.bytes(16).try_into().expect("16"));
        let mut builder = ManifestBuilder::new();
        let mut pack: Vec<u8> = Vec::new();
        let mut packed: Vec<(usize, u64)> = Vec::new();
        let mut extents: Vec<Vec<Extent>> = vec![Vec::new(); files.len()];
        for (i, (_, bytes)) in files.iter().enumerate() {
            if bytes.is_empty() {
                continue;
            }
            if bytes.len() < style.pack_below {
                pack.resize(pack.len().next_multiple_of(4096), 0);
                packed.push((i, pack.len() as u64));
                pack.extend_from_slice(bytes);
                continue;
            }
            for piece in bytes.chunks(style.slice) {
                let object = put(&store, &mut builder, model_id, &dek, vid, piece, style, random).await;
                extents[i].push(Extent { object, object_offset: 0, len: piece.len() as u64 });
            }
        }
        if !pack.is_empty() {
            let object = put(&store, &mut builder, model_id, &dek, vid, &pack, style, random).await;
            for (i, object_offset) in packed {
                extents[i].push(Extent { object, object_offset, len: files[i].1.len() as u64 });
            }
        }
        for ((path, bytes), extents) in files.iter().zip(extents) {
            let mut hasher = FileHasher::new();
            hasher.update(bytes);
            builder.add_file(NewFile {
                path: path.clone(),
                mode: if path.ends_with(".sh") { 0o555 } else { 0o444 },
                size: bytes.len() as u64,
                sha256: hasher.finish(),
                mtime: style.mtime,
                extents,
            });
        }
        let mut manifest = builder
            .finish(NewHeader {
                suite: style.suite,
                hash_alg: style.hash_alg,
                model_id,
                vid,
                seq: 1,
                created_at: 1_790_000_000,
                msalt: random.bytes(32).try_into().expect("32"),
                previous: None,
            })
            .expect("a fixture keeps the rules");
        let manifest = crypto::seal_manifest(&mut manifest, &dek, &[]).expect("sealed");
        Fixture { store, model_id, files, manifest, style, dek_bytes }
    }

    /// The model as the cache takes it, its chunks read from `source` (usually `self.store`, perhaps behind faults).
    pub fn model(&self, source: Arc<dyn ChunkSource>, verify: Verify) -> Arc<Model> {
        let opened = crypto::open_manifest(&self.manifest, dek_of(&self.dek_bytes)).expect("opens");
        Arc::new(Model::new(0, NAME.into(), ManifestDigest::of(&self.manifest), opened, source, verify))
    }

    /// The keys of that model, as an unlock brings them.
    pub fn keys(&self) -> ModelKeys {
        crypto::open_manifest(&self.manifest, dek_of(&self.dek_bytes)).expect("opens").1
    }

    pub fn dek(&self) -> Dek {
        dek_of(&self.dek_bytes)
    }
}

/// Makes bf16 weights of random bytes: eight exponents, the rest as it was.
pub fn weigh(bytes: &mut [u8]) {
    for element in bytes.as_chunks_mut::<2>().0 {
        let exponent = 0x78 + (element[1] & 7);
        element[1] = element[1] & 0x80 | exponent >> 1;
        element[0] = element[0] & 0x7f | exponent << 7;
    }
}

/// What is sealed of a chunk.
pub fn as_sealed(plain: &[u8], style: Style) -> Vec<u8> {
    let mut coded = Vec::new();
    if style.coded {
        codec::encode(codec::Kind::Bf16, 0, plain, &mut coded);
    }
    if style.coded && coded.len() < plain.len() { coded } else { plain.to_vec() }
}

fn dek_of(bytes: &[u8; 32]) -> Dek {
    let mut copy = *bytes;
    Dek::from_secret(modelfs::mem::Secret::from_bytes(&mut copy))
}

#[allow(clippy::too_many_arguments)]
async fn put(
    store: &MemoryStore,
    builder: &mut ManifestBuilder,
    model_id: ModelId,
    dek: &Dek,
    vid: Vid,
    plain: &[u8],
    style: Style,
    random: &mut Random,
) -> u32 {
    let oid = Oid(random.bytes(32).try_into().expect("32"));
    let layout = ObjectLayout::new(plain.len() as u64, style.block_log2, style.chunk_log2).expect("a valid layout");
    let make = if style.coded { ObjectSealer::coded } else { ObjectSealer::new };
    let new_sealer = |dek: &Dek| make(dek, style.suite, layout, style.hash_alg, oid, vid);
    let honest = new_sealer(dek);
    let sealer = if style.lie == Lie::Honest { new_sealer(dek) } else { new_sealer(&Dek::random()) };
    let told = if style.lie == Lie::OtherKeyAndCommitment { &sealer } else { &honest };
    let mut stored = told.header().to_vec();
    let (mut hashes, mut lens) = (Vec::new(), Vec::new());
    for index in layout.chunks() {
        let range = layout.chunk_plain(index);
        let mut buffer = as_sealed(&plain[range.start as usize..range.end as usize], style);
        lens.push(buffer.len() as u32);
        let mut tags = Vec::new();
        hashes.push(sealer.seal_chunk(index, &mut buffer, &mut tags));
        stored.extend_from_slice(&buffer);
        stored.extend_from_slice(&tags);
    }
    let object = NewObject {
        oid,
        layout,
        suite: style.suite,
        inherited: false,
        origin_vid: vid,
        commit: told.commit(),
        hashes,
        coded: style.coded.then_some(lens),
    };
    assert_eq!(stored.len() as u64, object.stored_len().expect("lengths"));
    store.create(&names::data(model_id, oid), Bytes::from(stored)).await.expect("stored");
    builder.add_object(object)
}
