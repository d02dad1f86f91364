//! Hypothesis: the code writes and reads exactly what docs/FORMAT.md says.
//!
//! A second, independent writer (other crates, straight from the page) makes the store of a.9; it must be byte for byte what
//! `modelfs` makes and what lies in tests/vectors/. Then every edit of tests/vectors/hostile.txt must be refused with its
//! code. `MODELFS_TEST_WRITE_VECTORS=1` writes the files anew.

#[path = "common/format_edits.rs"]
mod hostile;
#[path = "common/independent.rs"]
mod independent;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use bytes::Bytes;
use modelfs::codec;
use modelfs::crypto::{
    Dek, ObjectSealer, SigningKey, Verify, open_chunk, open_manifest, scratch_len, seal_manifest, wrap_dek,
};
use modelfs::error::{Code, Result};
use modelfs::format::*;
use modelfs::keys::{KeySource, unlock};
use modelfs::mem::Secret;
use modelfs::store::CipherChunk;

use hostile::{Edit, Hostile, Part};
use independent::{det, det_array, sha256};

fn secret(seed: &str) -> Secret<32> {
    Secret::from_bytes(&mut det_array(seed))
}

fn dek() -> Dek {
    Dek::from_secret(secret("dek"))
}

fn vid() -> Vid {
    Vid(det(16, "vid").try_into().unwrap())
}

fn model_id() -> ModelId {
    ModelId::of_name("acme/llama-70b")
}

/// The plaintext of the two objects of a.9.
fn plain(object: usize) -> Vec<u8> {
    if object == 1 {
        return det(2_293_767, "big");
    }
    let mut pack = det(197_608, "A");
    pack.resize(200_704, 0);
    pack.extend(det(5_000, "B"));
    pack
}

/// The store of a.9 as `modelfs` makes it: object names below the model's prefix.
struct Store {
    manifest: Manifest,
    body: Vec<u8>,
    objects: BTreeMap<String, Vec<u8>>,
    names: Names,
}

struct Names {
    data: [String; 2],
    manifest: String,
    signature: String,
    slots: String,
    reference: String,
}

impl Store {
    fn get(&self, name: &str) -> &[u8] {
        &self.objects[name]
    }
}

fn store() -> Store {
    let mut builder = ManifestBuilder::new();
    let mut objects = BTreeMap::new();
    let data = ["oid0", "oid1"].map(|oid| names::data(model_id(), Oid(det_array(oid))));
    for (number, name) in data.iter().enumerate() {
        let plain = plain(number);
        let layout = ObjectLayout::new(plain.len() as u64, 16, 20).unwrap();
        let oid = names::oid(name).unwrap();
        let sealer = ObjectSealer::new(&dek(), Suite::Aes256Gcm, layout, HashAlg::Sha256, oid, vid());
        let (mut stored, mut hashes, mut tags) = (sealer.header().to_vec(), Vec::new(), Vec::new());
        for (index, chunk) in layout.chunks().zip(plain.chunks(1 << 20)) {
            let mut chunk = chunk.to_vec();
            hashes.push(sealer.seal_chunk(index, &mut chunk, &mut tags));
            stored.extend(chunk);
            stored.extend(&tags);
        }
        assert_eq!(stored.len() as u64, layout.stored_len());
        let commit = sealer.commit();
        builder.add_object(NewObject {
            oid,
            layout,
            suite: Suite::Aes256Gcm,
            inherited: false,
            origin_vid: vid(),
            commit,
            hashes,
            coded: None,
        });
        objects.insert(name.clone(), stored);
    }
    for (path, bytes, extent) in [
        ("a/one.bin", det(197_608, "A"), Some((0, 0))),
        ("config.json", det(5_000, "B"), Some((0, 200_704))),
        ("empty", Vec::new(), None),
        ("model.safetensors", det(2_293_767, "big"), Some((1, 0))),
    ] {
        let size = bytes.len() as u64;
        let extents = extent.into_iter().map(|(object, object_offset)| Extent { object, object_offset, len: size });
        builder.add_file(NewFile {
            path: path.into(),
            mode: 0o444,
            size,
            sha256: sha256(&bytes),
            mtime: 0,
            extents: extents.collect(),
        });
    }
    builder.annotations(br#"{"license":"x"}"#.to_vec());
    let head = NewHeader {
        suite: Suite::Aes256Gcm,
        hash_alg: HashAlg::Sha256,
        model_id: model_id(),
        vid: vid(),
        seq: 7,
        created_at: 1_790_000_000,
        msalt: det_array("msalt"),
        previous: None,
    };
    let mut manifest = builder.finish(head).unwrap();
    let bytes = seal_manifest(&mut manifest, &dek(), &[]).unwrap();
    let mut body = vec![0; manifest.body_len()];
    manifest.encode_body(&mut body, |_, _| unreachable!("nothing is inherited"));

    let digest = ManifestDigest::of(&bytes);
    let key = SigningKey::from_seed(secret("pub"));
    let key_id = key.public().key_id();
    let signature = SignatureObject {
        key_id,
        manifest_digest: digest,
        signature: key.sign(&manifest_message(digest, model_id(), 7)),
    };
    let params = SlotParams::Raw { salt: det_array("ssalt") };
    let dek_commit = manifest.header().dek_commit;
    let context = Slot::wrap_context("node-kek-2026", &params, model_id(), vid(), &dek_commit);
    let wrapped = wrap_dek(&secret("kek"), &context, &dek()).to_vec();
    let slots = Slots {
        generation: 3,
        model_id: model_id(),
        vid: vid(),
        dek_commit,
        slots: vec![Slot { label: "node-kek-2026".into(), params, body: wrapped }],
    };
    let reference = Ref {
        n_sigs: 1,
        model_id: model_id(),
        channel_id: ChannelId::of_name("prod"),
        ref_seq: 42,
        seq: 7,
        manifest_digest: digest,
        manifest_len: bytes.len() as u64,
        vid: vid(),
        issued_at: 1_790_000_000,
        expires_at: 1_790_604_800,
        min_slots_generation: 0,
        min_version_seq: 0,
        previous: [0; 32],
    };
    let ref_signature = RefSignature { key_id, signature: key.sign(&reference.message()) };
    let names = Names {
        data,
        manifest: names::manifest(model_id(), digest),
        signature: names::signature(model_id(), digest, key_id),
        slots: names::slots(model_id(), vid(), 3),
        reference: names::reference(model_id(), "prod", 42),
    };
    objects.insert(names.manifest.clone(), bytes);
    objects.insert(names.signature.clone(), signature.encode().to_vec());
    objects.insert(names.slots.clone(), slots.encode().unwrap());
    objects.insert(names.reference.clone(), reference.encode(&[ref_signature]));
    Store { manifest, body, objects, names }
}

#[test]
fn the_store_of_the_page_is_reproduced_byte_for_byte() {
    let store = store();
    let digest = |name: &str| hex::encode(sha256(store.get(name)));
    assert_eq!(digest(&store.names.manifest), "517cc1d1929bc2c40ffad5438d4bb5bae18d1bde3a01817aa1ed62bd8ba4037a");
    assert_eq!(digest(&store.names.slots), "ccdf5795e3e7335ce80eec79fd6dea4d23f97f159ca2657749bc851f9c348fac");
    assert_eq!(digest(&store.names.reference), "2c72da628611d998282b7abd37fef9e984ce1f064f41d971e16c46a83df0d974");
    let chunk = sha256(&store.get(&store.names.data[0])[128..]);
    assert_eq!(hex::encode(chunk), "9b970cfe30418addc91ccbdb2ca8d9f92a472ff526775864d07dcbad2710044e");
    assert_eq!(chunk, *store.manifest.chunk_hash(0, ChunkIndex(0)));
    assert_eq!(
        hex::encode(&store.get(&store.names.slots)[128..261]),
        "01000d00200050006e6f64652d6b656b2d3230323689576df3d38dd0a1bc76ccccf94568bd195e121c52406e15b46a11eef93cc9a7\
         c237b54ba30b7003f86e6e27283f15da40e4e8df601e31bbf5a8cf12f11bfa9d960d4e656fd75c61f13b487fcc235878c9d3559575599\
         eed1c3a6f05cdf47b2c12eadbcef3f5ed41518fa2f9feec4161"
    );
}

#[test]
fn an_independent_writer_makes_the_same_bytes() {
    let store = store();
    let entry = &store.manifest.objects()[0];
    let object = independent::object(&det_array("dek"), &entry.header().kdf_input(), &plain(0));
    assert_eq!(object, store.get(&store.names.data[0]));
    let sealed = independent::manifest(&det_array("dek"), store.manifest.header(), &store.body);
    assert_eq!(sealed, store.get(&store.names.manifest));
}

#[test]
fn the_store_of_the_page_is_read_back() {
    let store = store();
    let (manifest, keys) = open_manifest(store.get(&store.names.manifest), dek()).unwrap();
    assert_eq!(manifest, store.manifest);
    for (number, name) in store.names.data.iter().enumerate() {
        let entry = &manifest.objects()[number];
        let (stored, plain) = (store.get(name), plain(number));
        assert_eq!(ObjectHeader::parse(&stored[..128]).unwrap(), entry.header());
        for index in entry.layout.chunks() {
            let mut slot = vec![0; entry.layout.chunk_plain_len(index) as usize];
            let chunk = chunk_of(stored, &manifest, number as u32, index);
            open_chunk(&keys, &manifest, number as u32, &chunk, Verify::Strict, &mut slot, &mut []).unwrap();
            let range = entry.layout.chunk_plain(index);
            assert!(slot == plain[range.start as usize..range.end as usize]);
        }
    }
}

/// Chunk `index` of object number `object` out of the whole stored object, as the manifest places it. What the manifest
/// places past the end is not there.
fn chunk_of(stored: &[u8], manifest: &Manifest, object: u32, index: ChunkIndex) -> CipherChunk {
    let range = manifest.chunk_stored(object, index);
    let bytes = &stored[range.start as usize..stored.len().min(range.end as usize)];
    CipherChunk { object: manifest.objects()[object as usize].oid, index, pieces: vec![Bytes::copy_from_slice(bytes)] }
}

/// What a reader of `part` says to these bytes, the edits already made and repaired.
fn read(part: Part, bytes: &[u8], store: &Store) -> Result<()> {
    match part {
        Part::ObjectHeader => ObjectHeader::parse(bytes).map(drop),
        Part::Manifest => open_manifest(bytes, dek()).map(drop),
        Part::Header => open_manifest(bytes, dek()).map(drop),
        Part::Body => {
            let opened = open_manifest(bytes, dek()).map(drop);
            // Told by the parser alone, too, which sees no cipher.
            let (header, _) = ManifestHeader::parse_object(bytes)?;
            let body = independent::open_body(&det_array("dek"), &header, bytes);
            let parsed = Manifest::parse_body(header, &body).map(drop);
            assert_eq!(opened.as_ref().map_err(|e| e.code()), parsed.as_ref().map_err(|e| e.code()));
            opened
        }
        Part::BodyThenChunk => {
            let (manifest, keys) = open_manifest(bytes, dek())?;
            let entry = &manifest.objects()[0];
            let mut slot = vec![0; entry.layout.chunk_plain_len(ChunkIndex(0)) as usize];
            let mut scratch = vec![0; scratch_len(entry)];
            let chunk = chunk_of(store.get(&store.names.data[0]), &manifest, 0, ChunkIndex(0));
            open_chunk(&keys, &manifest, 0, &chunk, Verify::Strict, &mut slot, &mut scratch)
        }
        Part::Slots | Part::SlotsRaw => Slots::parse(bytes).map(drop),
        Part::SlotsHpke | Part::SlotsPbkdf2 => open_slots(part, bytes, store),
        Part::Ref => Ref::parse(bytes).map(drop),
        Part::Signature => SignatureObject::parse(bytes).map(drop),
        Part::Chunk | Part::ChunkAead => {
            let (manifest, keys) = open_manifest(store.get(&store.names.manifest), dek())?;
            let entry = &manifest.objects()[0];
            let mut slot = vec![0x55; entry.layout.chunk_plain_len(ChunkIndex(0)) as usize];
            let pieces = vec![Bytes::copy_from_slice(bytes)];
            let chunk = CipherChunk { object: entry.oid, index: ChunkIndex(0), pieces };
            let verify = if part == Part::Chunk { Verify::Strict } else { Verify::Aead };
            let opened = open_chunk(&keys, &manifest, 0, &chunk, verify, &mut slot, &mut []);
            assert!(opened.is_ok() || slot.iter().all(|&byte| byte == 0), "a refused slot is wiped");
            opened
        }
    }
}

/// The file that tests/vectors/slots_kinds.py made.
fn slots_kinds() -> Vec<u8> {
    let lines = std::fs::read_to_string(vectors().join("slots-kinds.hex")).unwrap();
    hex::decode(lines.lines().collect::<String>()).unwrap()
}

/// With the key of one of the two slots. A slot that does not open is told as the cause of `NO_KEY`.
fn open_slots(part: Part, bytes: &[u8], store: &Store) -> Result<()> {
    let keys = tempfile::tempdir().unwrap();
    let path = keys.path().join("key");
    let (secret, source) = match part {
        Part::SlotsHpke => {
            let seed = hex::encode(det_array::<32>("recipient"));
            (format!("modelfs-x25519-secret:{seed}\n"), KeySource::X25519(path.clone()))
        }
        _ => ("correct horse battery staple\n".to_owned(), KeySource::PassphraseFile(path.clone())),
    };
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&path).unwrap();
    file.write_all(secret.as_bytes()).unwrap();
    let slots = Slots::parse(bytes)?;
    match unlock(&slots, store.manifest.header(), &[source], &|_| unreachable!()) {
        Ok(opened) => {
            assert_eq!(opened.commitment(Suite::Aes256Gcm, model_id(), vid()), store.manifest.header().dek_commit);
            Ok(())
        }
        Err(err) => {
            let cause = std::error::Error::source(&err).and_then(|cause| cause.downcast_ref::<modelfs::error::Error>());
            Err(cause.cloned().unwrap_or(err))
        }
    }
}

/// The bytes that the edits start from.
fn good(part: Part, store: &Store) -> Vec<u8> {
    match part {
        Part::ObjectHeader => store.get(&store.names.data[0])[..128].to_vec(),
        Part::Manifest => store.get(&store.names.manifest).to_vec(),
        Part::Header => store.get(&store.names.manifest)[..256].to_vec(),
        Part::Body | Part::BodyThenChunk => store.body.clone(),
        Part::Slots | Part::SlotsRaw => store.get(&store.names.slots).to_vec(),
        Part::SlotsHpke | Part::SlotsPbkdf2 => slots_kinds(),
        Part::Ref => store.get(&store.names.reference).to_vec(),
        Part::Signature => store.get(&store.names.signature).to_vec(),
        Part::Chunk | Part::ChunkAead => store.get(&store.names.data[0])[128..].to_vec(),
    }
}

/// Makes everything around an edit right again, as a hostile publisher or a careful attacker would.
fn repair(part: Part, mut bytes: Vec<u8>, store: &Store) -> Vec<u8> {
    match part {
        Part::Body | Part::BodyThenChunk => {
            let mut header = *store.manifest.header();
            header.body_plain_len = bytes.len() as u64;
            independent::manifest(&det_array("dek"), &header, &bytes)
        }
        Part::Header => independent::reseal_under(&det_array("dek"), &bytes, &store.body),
        Part::Slots | Part::SlotsHpke | Part::SlotsPbkdf2 if bytes.len() >= 32 => {
            let at = bytes.len() - 32;
            let sum = sha256(&bytes[..at]);
            bytes[at..].copy_from_slice(&sum);
            bytes
        }
        Part::Slots
        | Part::SlotsRaw
        | Part::SlotsHpke
        | Part::SlotsPbkdf2
        | Part::Manifest
        | Part::ObjectHeader
        | Part::Ref
        | Part::Signature
        | Part::Chunk
        | Part::ChunkAead => bytes,
    }
}

fn apply(edits: &[Edit], bytes: &mut Vec<u8>) {
    for edit in edits {
        match edit {
            Edit::Put(at, with) => bytes[*at..at + with.len()].copy_from_slice(with),
            Edit::Insert(at, with) => drop(bytes.splice(at..at, with.iter().copied())),
            Edit::Remove(at, len) => drop(bytes.drain(*at..at + len)),
            Edit::Zero(at, len) => bytes[*at..at + len].fill(0),
            Edit::Pad(len) => bytes.resize(bytes.len() + len, 0),
            Edit::Cut(len) => bytes.truncate(*len),
            Edit::Append(with) => bytes.extend(with),
        }
    }
}

#[test]
fn every_edit_in_the_list_is_refused_with_its_code() {
    let store = store();
    let (mut refused, mut wrong) = (BTreeSet::new(), Vec::new());
    let listed = hostile::parse(&std::fs::read_to_string(vectors().join("hostile.txt")).unwrap());
    for Hostile { name, part, code, edits } in &listed {
        let mut bytes = good(*part, &store);
        apply(edits, &mut bytes);
        let seen = match read(*part, &repair(*part, bytes, &store), &store) {
            Ok(()) => "ACCEPTED".to_owned(),
            Err(refused) => refused.code().to_string(),
        };
        if seen != *code {
            wrong.push(format!("{name}: {seen}, not {code}"));
        }
        if code != "ACCEPTED" {
            assert!(Code::ALL.iter().any(|known| known.name() == code), "{name}: {code} is no code");
            assert!(refused.insert(name.clone()), "{name} twice");
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(refused.len() >= 60, "only {} hostile cases", refused.len());
}

/// The plaintext of the coded object of a.11: 600,001 elements of bf16, their exponents 0x78 to 0x7f, then one byte.
fn weights() -> Vec<u8> {
    let mut bytes = det(2 * 600_001 + 1, "weights");
    for element in bytes.as_chunks_mut::<2>().0 {
        let [low, high] = *element;
        let exponent = 0x78 | (high & 7);
        *element = u16::from_be_bytes([high & 0x80 | exponent >> 1, exponent << 7 | low & 0x7f]).to_le_bytes();
    }
    bytes
}

/// The object of a.11 as `modelfs` makes it: stored bytes, coded lengths, and a manifest of nothing else.
fn coded_store() -> (Vec<u8>, Manifest) {
    let plain = weights();
    let layout = ObjectLayout::new(plain.len() as u64, 16, 20).unwrap();
    let (suite, oid) = (Suite::Aes256Gcm, Oid(det_array("oid2")));
    let sealer = ObjectSealer::coded(&dek(), suite, layout, HashAlg::Sha256, oid, vid());
    let (mut stored, mut hashes, mut lens) = (sealer.header().to_vec(), Vec::new(), Vec::new());
    for (index, chunk) in layout.chunks().zip(plain.chunks(1 << 20)) {
        let (mut coded, mut tags) = (Vec::new(), Vec::new());
        codec::encode(codec::Kind::Bf16, 0, chunk, &mut coded);
        lens.push(coded.len() as u32);
        hashes.push(sealer.seal_chunk(index, &mut coded, &mut tags));
        stored.extend(coded);
        stored.extend(tags);
    }
    let mut builder = ManifestBuilder::new();
    let commit = sealer.commit();
    let object =
        NewObject { oid, layout, suite, inherited: false, origin_vid: vid(), commit, hashes, coded: Some(lens) };
    assert_eq!(object.stored_len().unwrap(), stored.len() as u64);
    let object = builder.add_object(object);
    let len = plain.len() as u64;
    builder.add_file(NewFile {
        path: "weights".into(),
        mode: 0o444,
        size: len,
        sha256: sha256(&plain),
        mtime: 0,
        extents: vec![Extent { object, object_offset: 0, len }],
    });
    let head = NewHeader {
        suite,
        hash_alg: HashAlg::Sha256,
        model_id: model_id(),
        vid: vid(),
        seq: 1,
        created_at: 0,
        msalt: det_array("msalt"),
        previous: None,
    };
    (stored, builder.finish(head).unwrap())
}

/// docs/FORMAT.md a.11.
#[test]
fn the_coded_object_of_the_page_is_reproduced_byte_for_byte_and_read_back() {
    let (stored, mut manifest) = coded_store();
    assert_eq!(manifest.object_coded(0).unwrap(), [785_593, 113_523]);
    assert_eq!(hex::encode(sha256(&stored)), "f47fdf326c02e8a138773e1e9598b36ad2422f5d4974a5a316d5e74e7e0537af");

    let plain = weights();
    let coded: Vec<Vec<u8>> = plain.chunks(1 << 20).map(independent::coded_bf16).collect();
    assert_eq!(hex::encode(sha256(&coded[0])), "5268e1c3c6bc81218dbfb5e133b9b1b5ecb6b1a9bcabd5c5b82d38d08c45c831");
    assert_eq!(hex::encode(sha256(&coded[1])), "5972ef1c09598c331da6dacc4935ed91638eea4c957c98c6fa82b60277bba860");
    let kdf_input = manifest.objects()[0].header().kdf_input();
    assert!(independent::coded_object(&det_array("dek"), &kdf_input, &coded) == stored, "the two writers differ");

    let sealed = seal_manifest(&mut manifest, &dek(), &[]).unwrap();
    let (manifest, keys) = open_manifest(&sealed, dek()).unwrap();
    let entry = &manifest.objects()[0];
    for index in entry.layout.chunks() {
        let mut slot = vec![0; entry.layout.chunk_plain_len(index) as usize];
        let mut scratch = vec![0; scratch_len(entry)];
        let chunk = chunk_of(&stored, &manifest, 0, index);
        open_chunk(&keys, &manifest, 0, &chunk, Verify::Strict, &mut slot, &mut scratch).unwrap();
        let range = entry.layout.chunk_plain(index);
        assert!(slot == plain[range.start as usize..range.end as usize]);
    }
}

fn vectors() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")
}

/// What lies in tests/vectors/ is what the code and the list of edits say.
#[test]
fn the_files_are_current() {
    let store = store();
    let mut files: BTreeMap<&str, String> = BTreeMap::new();
    let lines = |bytes: &[u8]| bytes.chunks(64).map(|line| hex::encode(line) + "\n").collect::<String>();
    files.insert("manifest.hex", lines(store.get(&store.names.manifest)));
    files.insert("manifest-body.hex", lines(&store.body));
    files.insert("signature.hex", lines(store.get(&store.names.signature)));
    files.insert("slots.hex", lines(store.get(&store.names.slots)));
    files.insert("ref.hex", lines(store.get(&store.names.reference)));
    files.insert("object-header.hex", lines(&store.get(&store.names.data[0])[..128]));
    let names =
        store.objects.iter().map(|(name, bytes)| format!("{} {} {name}\n", hex::encode(sha256(bytes)), bytes.len()));
    files.insert("store.txt", names.collect());
    files.insert("hostile.txt", hostile::print(&hostile::all()));
    for (name, want) in files {
        let path = vectors().join(name);
        if std::env::var_os("MODELFS_TEST_WRITE_VECTORS").is_some() {
            std::fs::write(&path, &want).unwrap();
        }
        let seen = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(seen == want, "{name} is not what the code makes; MODELFS_TEST_WRITE_VECTORS=1 writes it anew");
    }
}
