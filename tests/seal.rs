//! Hypothesis: whatever fails while a folder is sealed, the store serves the version it served before, holds no plaintext,
//! and running the seal again makes a good one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use modelfs::crypto::{
    Dek, PublicKey, SigningKey, Verify, open_chunk, open_manifest, scratch_len, sha256, unwrap_dek, wrap_dek,
};
use modelfs::error::{Code, Error, Result};
use modelfs::format::*;
use modelfs::keys::{FloorStore, KeySource, Keyring, generate_recipient_pair};
use modelfs::mem::{LockedBuf, Secret};
use modelfs::seal::*;
use modelfs::store::fault::{Call, Death, Fault, Faulty, When};
use modelfs::store::local::LocalStore;
use modelfs::store::memory::MemoryStore;
use modelfs::store::{ChunkSink, ChunkSource, fetch_chunk};

const MODEL: &str = "acme/llama";
/// Stands in every file of every source, so that any plaintext that reaches a store is found.
const CANARY: &[u8] = b"plaintext-canary-0d9f3c";

/// One key file's worth of key, without the file.
struct RawKey(u8);

impl RawKey {
    fn kek(&self) -> Secret<32> {
        Secret::from_bytes(&mut [self.0; 32])
    }
}

impl SlotKeys for RawKey {
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        let params = SlotParams::Raw { salt: [7; 32] };
        let context = Slot::wrap_context("test", &params, target.model_id, target.vid, &target.dek_commit);
        let body = wrap_dek(&self.kek(), &context, dek).to_vec();
        Ok(vec![Slot { label: "test".into(), params, body }])
    }

    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        let slot = &slots.slots[0];
        let context = Slot::wrap_context(&slot.label, &slot.params, slots.model_id, slots.vid, &header.dek_commit);
        let dek = unwrap_dek(&self.kek(), &context, &slot.body)
            .map_err(|e| Error::new(Code::NoKey, "no slot opens").with_source(e))?;
        assert!(dek.opens(header));
        Ok(dek)
    }
}

fn signing(seed: u8) -> Arc<SigningKey> {
    Arc::new(SigningKey::from_seed(Secret::from_bytes(&mut [seed; 32])))
}

fn options() -> SealOptions {
    let mut options = SealOptions::new(Arc::new(RawKey(1)), signing(1));
    options.chunk_log2 = 20;
    options
}

/// Reproducible bytes with the canary at both ends.
fn bytes(len: usize, seed: u8) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    let mut out: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    })
    .take(len)
    .collect();
    if len >= 2 * CANARY.len() {
        out[..CANARY.len()].copy_from_slice(CANARY);
        out[len - CANARY.len()..].copy_from_slice(CANARY);
    }
    out
}

type Files = BTreeMap<String, Vec<u8>>;

/// A pack of three, an empty file, a file of two and a bit chunks, one of exactly two chunks.
fn files() -> Files {
    [
        ("config.json", 700),
        ("deep/er/one.bin", 5_000),
        ("deep/zero", 0),
        ("tokenizer.model", 100_000),
        ("model-1.safetensors", (2 << 20) + 77_777),
        ("model-2.safetensors", 2 << 20),
    ]
    .iter()
    .zip(1..)
    .map(|(&(path, len), seed)| (path.to_owned(), bytes(len, seed)))
    .collect()
}

fn write(dir: &Path, files: &Files) {
    for (path, bytes) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn source(files: &Files) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), files);
    dir
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work)
}

fn sealed(dir: &Path, store: impl ChunkSink + 'static, options: SealOptions) -> Result<SealSummary> {
    run(seal(dir, Arc::new(store), MODEL, options))
}

/// What a reader gets from the newest ref of `channel`: written apart from the sealer, from docs/FORMAT.md.
async fn read(store: &dyn ChunkSource, channel: &str, key: u8, public: PublicKey) -> Result<(Manifest, Ref, Files)> {
    let model = ModelId::of_name(MODEL);
    let listed = store.list(&names::channel_dir(model, channel)).await?;
    let newest = listed.iter().filter_map(|listed| names::ref_seq(&listed.name)).max().expect("a ref");
    let (reference, signatures) =
        Ref::parse(&store.read_small(&names::reference(model, channel, newest), limits::REF_BYTES_MAX as u64).await?)?;
    assert_eq!((reference.model_id, reference.ref_seq), (model, newest));
    assert_eq!(reference.channel_id, ChannelId::of_name(channel));
    assert!(public.verify_strict(&reference.message(), &signatures[0].signature));
    if newest > 1 {
        let name = names::reference(model, channel, newest - 1);
        let (before, _) = Ref::parse(&store.read_small(&name, limits::REF_BYTES_MAX as u64).await?)?;
        assert_eq!(before.head_digest(), reference.previous);
    }
    let digest = reference.manifest_digest;
    let bytes = store.read_small(&names::manifest(model, digest), reference.manifest_len).await?;
    assert_eq!(ManifestDigest::of(&bytes), digest);
    let object =
        SignatureObject::parse(&store.read_small(&names::signature(model, digest, public.key_id()), 144).await?)?;
    assert!(public.verify_strict(&manifest_message(digest, model, reference.seq), &object.signature));
    let slots = Slots::parse(&store.read_small(&names::slots(model, reference.vid, 1), 65_536).await?)?;
    let (header, _) = ManifestHeader::parse_object(&bytes)?;
    let (manifest, keys) = open_manifest(&bytes, RawKey(key).unlock(&slots, &header)?)?;

    let mut objects = Vec::new();
    for (number, entry) in manifest.objects().iter().enumerate() {
        let mut plain = vec![0; entry.layout.plain_len() as usize];
        let mut rest = &mut plain[..];
        for index in entry.layout.chunks() {
            let (slot, later) = rest.split_at_mut(entry.layout.chunk_plain_len(index) as usize);
            let chunk = fetch_chunk(store, &manifest, number as u32, index).await?;
            let mut scratch = vec![0; scratch_len(entry)];
            open_chunk(&keys, &manifest, number as u32, &chunk, Verify::Strict, slot, &mut scratch)?;
            rest = later;
        }
        assert_eq!(store.size(&names::data(model, entry.oid)).await?, entry.stored_len());
        let head = store.read_range(&names::data(model, entry.oid), 0..128).await?.concat();
        assert_eq!(head, entry.header().encode());
        objects.push(plain);
    }
    let mut files = Files::new();
    for file in manifest.files() {
        let mut bytes = Vec::new();
        for extent in manifest.extents(file) {
            let start = extent.object_offset as usize;
            bytes.extend_from_slice(&objects[extent.object as usize][start..start + extent.len as usize]);
        }
        assert_eq!(sha256(&[&bytes]), file.sha256);
        files.insert(manifest.path(file).to_owned(), bytes);
    }
    Ok((manifest, reference, files))
}

fn read_latest(store: &dyn ChunkSource) -> (Manifest, Ref, Files) {
    run(read(store, LATEST, 1, signing(1).public())).unwrap()
}

fn objects_in(store: &MemoryStore) -> BTreeSet<String> {
    store.names().into_iter().filter(|name| name.contains("/d/")).collect()
}

fn assert_no_plaintext(store: &MemoryStore) {
    for name in store.names() {
        let bytes = store.get(&name).unwrap();
        assert!(!bytes.windows(CANARY.len()).any(|window| window == CANARY), "plaintext in {name}");
    }
}

#[test]
fn a_sealed_folder_is_read_back_byte_for_byte() {
    for (suite, hash_alg) in [(Suite::Aes256Gcm, HashAlg::Blake3), (Suite::ChaCha20Poly1305, HashAlg::Sha256)] {
        let (dir, store) = (source(&files()), MemoryStore::new());
        let summary = sealed(dir.path(), store.clone(), SealOptions { suite, hash_alg, ..options() }).unwrap();
        let (manifest, reference, read) = read_latest(&store);
        assert_eq!(read, files());
        assert_eq!((reference.ref_seq, reference.seq, summary.version), (1, 1, 1));
        assert_eq!(summary.manifest, reference.manifest_digest);
        assert_eq!((summary.files, summary.objects, summary.inherited_objects), (6, 3, 0));
        assert_eq!(summary.uploaded_bytes, summary.bytes);
        assert_eq!(manifest.header().hash_alg, hash_alg);
        assert!(manifest.objects().iter().all(|object| object.suite == suite));
        assert_no_plaintext(&store);
        let model = ModelId::of_name(MODEL);
        assert_eq!(&store.get(&names::model_name(model)).unwrap()[..], MODEL.as_bytes());
        assert!(store.names().iter().all(|name| !name.contains("probe/") && !name.contains("/l/")));
    }
}

/// Elements of bf16 or f32 as weights are: few exponents, the rest random.
fn weights(count: usize, bf16: bool) -> Vec<u8> {
    let random = bytes(4 * count, 77);
    let mut out = Vec::new();
    for word in random.as_chunks::<4>().0 {
        let [a, b, c, d] = *word;
        let exponent = 0x77 + (d & 7).min(d >> 3 & 7);
        let high = [b & 0x7f | exponent << 7, c & 0x80 | exponent >> 1];
        if bf16 {
            out.extend(high);
        } else {
            out.extend([a, b, high[0], high[1]]);
        }
    }
    out
}

/// A safetensors file of these tensors; `odd` shifts the data by one byte, which the format allows.
fn safetensors(tensors: &[(&str, &str, Vec<u8>)], odd: bool) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut at = 0;
    for (name, dtype, data) in tensors {
        let width = if *dtype == "F32" { 4 } else { 2 };
        let shape = data.len() / width;
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{at},{}]}}"#,
            at + data.len()
        ));
        at += data.len();
    }
    let mut header = format!("{{{}}}", entries.join(","));
    while header.len() % 2 != usize::from(odd) {
        header.push(' ');
    }
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    tensors.iter().for_each(|(_, _, data)| out.extend(data));
    out
}

/// What the header names, what samples show, and what neither wins on, in one model.
#[test]
fn weights_are_coded_where_it_wins_and_read_back_byte_for_byte() {
    let files: Files = [
        ("bf16.safetensors", safetensors(&[("w", "BF16", weights(1_500_000, true))], false)),
        ("odd.safetensors", safetensors(&[("w", "BF16", weights(1_500_000, true))], true)),
        ("f32.safetensors", safetensors(&[("w", "F32", weights(800_000, false))], true)),
        (
            "two.safetensors",
            safetensors(&[("a", "BF16", weights(900_000, true)), ("b", "F32", bytes(2_000_000, 5))], false),
        ),
        ("lies.safetensors", safetensors(&[("w", "BF16", bytes(3_000_000, 6))], false)),
        ("raw.bin", weights(1_600_000, true)),
        ("random.bin", bytes(3_000_000, 7)),
        ("config.json", bytes(700, 8)),
    ]
    .into_iter()
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .collect();
    let (dir, store) = (source(&files), MemoryStore::new());
    let summary = sealed(dir.path(), store.clone(), options()).unwrap();
    let (manifest, _, read) = read_latest(&store);
    assert!(read == files, "coded files are read back otherwise");
    let ratio = |name: &str| {
        let extent = manifest.extents(&manifest.files()[manifest.find(name).unwrap()])[0];
        let object = &manifest.objects()[extent.object as usize];
        (object.is_coded(), object.stored_len() as f64 / object.layout.plain_len() as f64)
    };
    for (name, most) in [
        ("bf16.safetensors", 0.78),
        ("odd.safetensors", 0.78),
        ("f32.safetensors", 0.89),
        ("raw.bin", 0.78),
        ("two.safetensors", 0.92),
    ] {
        let (coded, ratio) = ratio(name);
        assert!(coded && ratio < most, "{name}: {coded} {ratio}");
    }
    for name in ["random.bin", "config.json"] {
        assert!(!ratio(name).0, "{name}");
    }
    // A header that lies costs nothing but the flag.
    assert!(ratio("lies.safetensors").1 < 1.001);
    assert!(summary.stored_bytes < summary.uncoded_bytes * 9 / 10, "{summary:?}");
    assert_no_plaintext(&store);
}

#[test]
fn nothing_is_coded_for_those_who_ask_for_that_and_nothing_coded_is_inherited() {
    let files: Files =
        [("w.safetensors".to_owned(), safetensors(&[("w", "BF16", weights(1_500_000, true))], false))].into();
    let (dir, store) = (source(&files), MemoryStore::new());
    let none = || SealOptions { codec: CodecChoice::None, ..options() };
    sealed(dir.path(), store.clone(), none()).unwrap();
    assert!(!read_latest(&store).0.objects()[0].is_coded());
    // What is there uncoded is not sent again only to be coded.
    let again = sealed(dir.path(), store.clone(), options()).unwrap();
    assert_eq!((again.inherited_objects, again.uploaded_bytes), (1, 0));

    let store = MemoryStore::new();
    sealed(dir.path(), store.clone(), options()).unwrap();
    let inherited = sealed(dir.path(), store.clone(), options()).unwrap();
    assert_eq!((inherited.inherited_objects, inherited.uploaded_bytes), (1, 0));
    let (manifest, _, read) = read_latest(&store);
    assert!(manifest.objects()[0].is_coded() && read == files, "a coded object is inherited with its lengths");
    let anew = sealed(dir.path(), store.clone(), none()).unwrap();
    assert_eq!(anew.inherited_objects, 0);
    assert!(!read_latest(&store).0.objects()[0].is_coded());
}

#[test]
fn a_hidden_name_stands_nowhere_and_equal_files_give_different_objects() {
    let same = bytes(2 << 20, 9);
    let dir = source(&[("a".to_owned(), same.clone()), ("b".to_owned(), same)].into());
    let store = MemoryStore::new();
    sealed(dir.path(), store.clone(), SealOptions { hide_name: true, ..options() }).unwrap();
    assert!(store.names().iter().all(|name| !name.ends_with("/name")));
    let objects: Vec<_> = objects_in(&store).iter().map(|name| store.get(name).unwrap().slice(128..)).collect();
    assert_eq!(objects.len(), 2);
    assert_ne!(objects[0], objects[1]);
}

#[test]
fn files_longer_than_an_object_are_cut_and_packs_are_closed() {
    let mut options = options();
    options.cuts = Cuts { small_file_bytes: 2 << 20, pack_bytes_max: 60_000, object_bytes_max: (1 << 20) + 4096 };
    let (dir, store) = (source(&files()), MemoryStore::new());
    let summary = sealed(dir.path(), store.clone(), options).unwrap();
    assert_eq!(read_latest(&store).2, files());
    assert_eq!(summary.objects, 2 + 3 + 2, "packs, model-1, model-2");
}

#[test]
fn unchanged_files_are_inherited_and_changed_ones_are_not() {
    let (dir, store) = (source(&files()), MemoryStore::new());
    sealed(dir.path(), store.clone(), options()).unwrap();
    let before = objects_in(&store);

    // Same size, other bytes; and a time stamp that lies in the other direction.
    let mut changed = files();
    changed.get_mut("model-2.safetensors").unwrap()[1 << 20] ^= 1;
    changed.get_mut("config.json").unwrap()[100] ^= 1;
    write(dir.path(), &changed);
    let summary = sealed(dir.path(), store.clone(), options()).unwrap();
    let (manifest, reference, read) = read_latest(&store);
    assert_eq!(read, changed);
    assert_eq!((reference.ref_seq, reference.seq), (2, 2));
    assert_eq!(summary.uploaded_bytes, (2 << 20) + 700);
    assert_eq!(summary.inherited_bytes, (2 << 20) + 77_777 + 5_000 + 100_000);
    assert_eq!(manifest.n_inherited(), 2);
    assert_eq!(objects_in(&store).difference(&before).count(), 2, "a new pack and a new large object");
    assert!(manifest.header().previous.is_some());

    // A third version inherits what the second one had inherited itself.
    let summary = sealed(dir.path(), store.clone(), options()).unwrap();
    assert_eq!((summary.uploaded_bytes, summary.inherited_objects, summary.version), (0, 4, 3));
    assert_eq!(read_latest(&store).2, changed);
    assert_no_plaintext(&store);
}

#[test]
fn an_object_that_is_gone_or_cut_is_not_inherited() {
    for cut in [None, Some(1000)] {
        let (dir, store) = (source(&files()), MemoryStore::new());
        sealed(dir.path(), store.clone(), options()).unwrap();
        let largest = objects_in(&store).into_iter().max_by_key(|name| store.get(name).unwrap().len()).unwrap();
        match cut {
            None => run(store.delete(&largest)).unwrap(),
            Some(len) => store.put(&largest, store.get(&largest).unwrap().slice(..len)),
        }
        let summary = sealed(dir.path(), store.clone(), options()).unwrap();
        assert_eq!(summary.uploaded_bytes, (2 << 20) + 77_777);
        assert_eq!(read_latest(&store).2, files());
    }
}

#[test]
fn nothing_is_inherited_under_another_key_cipher_or_hash() {
    type Change = fn(SealOptions) -> SealOptions;
    let cases: [(Change, u8); 3] = [
        (|options| SealOptions { keys: Arc::new(RawKey(2)), ..options }, 2),
        (|options| SealOptions { suite: Suite::ChaCha20Poly1305, ..options }, 1),
        (|options| SealOptions { hash_alg: HashAlg::Sha256, ..options }, 1),
    ];
    for (change, key) in cases {
        let (dir, store) = (source(&files()), MemoryStore::new());
        sealed(dir.path(), store.clone(), options()).unwrap();
        let summary = sealed(dir.path(), store.clone(), change(options())).unwrap();
        assert_eq!((summary.inherited_bytes, summary.version), (0, 2));
        assert_eq!(run(read(&store, LATEST, key, signing(1).public())).unwrap().2, files());
        assert_eq!(summary.warnings.is_empty(), key == 1, "{:?}", summary.warnings);
    }
}

#[test]
fn a_channel_of_another_publisher_is_continued_only_if_that_one_is_trusted() {
    let (dir, store) = (source(&files()), MemoryStore::new());
    sealed(dir.path(), store.clone(), options()).unwrap();
    let other = || SealOptions { signing: signing(2), ..options() };
    let before = store.names();
    assert_eq!(sealed(dir.path(), store.clone(), other()).unwrap_err().code(), Code::RefKey);
    assert_eq!(store.names(), before);
    // Its refs may be continued; from its versions only a publisher's are inherited.
    let (key, trusted_publishers) = (signing(1).public(), vec![signing(1).public()]);
    let trusting = SealOptions { trusted: vec![key], trusted_publishers, ..other() };
    let summary = sealed(dir.path(), store.clone(), trusting).unwrap();
    assert_eq!((summary.version, summary.uploaded_bytes), (2, 0));
    assert_eq!(run(read(&store, LATEST, 1, signing(2).public())).unwrap().2, files());
}

#[test]
fn a_forged_newest_ref_stops_the_publisher() {
    let (dir, store) = (source(&files()), MemoryStore::new());
    sealed(dir.path(), store.clone(), options()).unwrap();
    let model = ModelId::of_name(MODEL);
    let mut bytes = store.get(&names::reference(model, LATEST, 1)).unwrap().to_vec();
    bytes[80..88].copy_from_slice(&u64::MAX.to_le_bytes());
    store.put(&names::reference(model, LATEST, u64::MAX), bytes);
    assert_eq!(sealed(dir.path(), store.clone(), options()).unwrap_err().code(), Code::RefSig);
}

/// A publisher that remembers does not build upon a store that was put back to an earlier state.
#[test]
fn a_store_that_went_back_is_not_built_upon() {
    let (dir, store, state) = (source(&files()), MemoryStore::new(), tempfile::tempdir().unwrap());
    let remembering = || SealOptions { floors: Some(FloorStore::new(state.path())), ..options() };
    for _ in 0..2 {
        sealed(dir.path(), store.clone(), remembering()).unwrap();
    }
    let reference = names::reference(ModelId::of_name(MODEL), LATEST, 2);
    let bytes = store.get(&reference).unwrap();
    run(store.delete(&reference)).unwrap();
    assert_eq!(sealed(dir.path(), store.clone(), remembering()).unwrap_err().code(), Code::Rollback);
    // The same number with other bytes.
    sealed(dir.path(), store.clone(), options()).unwrap();
    assert_eq!(sealed(dir.path(), store.clone(), remembering()).unwrap_err().code(), Code::Fork);
    for name in store.names().into_iter().filter(|name| name.contains("/r/")) {
        run(store.delete(&name)).unwrap();
    }
    assert_eq!(sealed(dir.path(), store.clone(), remembering()).unwrap_err().code(), Code::Rollback);
    store.put(&reference, bytes);
    assert_eq!(sealed(dir.path(), store, remembering()).unwrap().version, 3);
}

#[test]
fn tags_are_moved_and_a_version_number_is_never_used_twice_after_a_rollback() {
    let (dir, store) = (source(&files()), MemoryStore::new());
    let tagged = || SealOptions { tags: vec!["prod".into(), LATEST.into()], ..options() };
    let one = sealed(dir.path(), store.clone(), tagged()).unwrap();
    assert_eq!(one.refs, [(LATEST.to_owned(), 1), ("prod".to_owned(), 1)]);
    for _ in 0..2 {
        sealed(dir.path(), store.clone(), options()).unwrap();
    }
    assert_eq!(run(read(&store, "prod", 1, signing(1).public())).unwrap().1.seq, 1);

    // A deliberate rollback: a new ref to the first manifest.
    let (_, newest, _) = read_latest(&store);
    let (_, first, _) = run(read(&store, "prod", 1, signing(1).public())).unwrap();
    let back = Ref { channel_id: ChannelId::of_name(LATEST), ref_seq: 4, previous: newest.head_digest(), ..first };
    let key = signing(1);
    let signature = RefSignature { key_id: key.public().key_id(), signature: key.sign(&back.message()) };
    store.put(&names::reference(back.model_id, LATEST, 4), back.encode(&[signature]));
    let summary = sealed(dir.path(), store.clone(), tagged()).unwrap();
    assert_eq!(summary.version, 4);
    assert_eq!(summary.refs, [(LATEST.to_owned(), 5), ("prod".to_owned(), 2)]);
    assert_eq!(run(read(&store, "prod", 1, signing(1).public())).unwrap().1.seq, 4);
}

/// THREAT_MODEL (f) row 72: the publisher dies at every write there is, on both sides of it.
#[test]
fn a_publisher_that_dies_at_any_write_leaves_the_old_version_and_a_rerun_repairs_it() {
    let old = files();
    let mut new = files();
    new.get_mut("model-1.safetensors").unwrap()[5] ^= 1;
    new.insert("added.txt".into(), bytes(300, 77));

    let prepare = || {
        let (dir, store) = (source(&old), MemoryStore::new());
        sealed(dir.path(), store.clone(), options()).unwrap();
        write(dir.path(), &new);
        (dir, store)
    };
    let writes = {
        let (dir, store) = prepare();
        let faulty = Faulty::new(store);
        sealed(dir.path(), faulty.clone(), options()).unwrap();
        faulty.writes()
    };
    assert!(writes > 15, "{writes} writes are too few to prove anything");

    for write in 0..writes {
        for side in [Death::Before, Death::After] {
            let (dir, store) = prepare();
            let mut oids = oids_ever(&store);
            let faulty = Faulty::new(store.clone());
            faulty.die_at_write(write, side);
            let died = sealed(dir.path(), faulty.clone(), options());
            assert_no_plaintext(&store);
            let (_, reference, read) = read_latest(&store);
            // Everything is as before, or, from the ref on, everything is new.
            match reference.seq {
                1 => assert_eq!(read, old, "write {write} {side:?}"),
                2 => assert_eq!(read, new, "write {write} {side:?}"),
                other => panic!("version {other} after write {write} {side:?}"),
            }
            if died.is_ok() {
                assert_eq!(reference.seq, 2, "success was told at write {write} {side:?}");
            }
            let after = oids_ever(&store);
            let orphans: BTreeSet<_> = after.difference(&oids).cloned().collect();

            let summary = sealed(dir.path(), store.clone(), options()).unwrap();
            let (manifest, rerun, read) = read_latest(&store);
            assert_eq!(read, new, "write {write} {side:?}");
            assert_eq!(summary.version, reference.seq + 1);
            assert_eq!(rerun.seq, summary.version);
            oids.extend(orphans.iter().cloned());
            let reused = manifest.objects().iter().enumerate().filter(|(_, object)| object.inherited.is_none());
            for (_, object) in reused {
                let name = names::data(rerun.model_id, object.oid);
                assert!(!oids.contains(&name), "{name} was used twice, write {write} {side:?}");
            }
        }
    }
}

fn oids_ever(store: &MemoryStore) -> BTreeSet<String> {
    objects_in(store)
}

/// THREAT_MODEL (f) row 73: every create is applied, and its answer lost, once.
#[test]
fn a_create_that_timed_out_but_was_applied_is_success() {
    let (dir, store) = (source(&files()), MemoryStore::new());
    for name in ["/m/", "/s/", "/k/", "/r/latest/0", "/name"] {
        let faulty = Faulty::new(store.clone());
        faulty.on(When::call(Call::Create).name(name).once(), Fault::AppliedButLost);
        sealed(dir.path(), faulty.clone(), options()).unwrap();
        assert_eq!(read_latest(&store).2, files());
    }
    let faulty = Faulty::new(store.clone());
    faulty.on(When::call(Call::Finish), Fault::AppliedButLost);
    let dir = source(&[("other".to_owned(), bytes(9_000, 3))].into());
    sealed(dir.path(), faulty, options()).unwrap();
    assert_eq!(read_latest(&store).1.seq, 6);
}

/// THREAT_MODEL (f) row 74.
#[test]
fn a_store_that_ignores_create_only_gets_nothing() {
    let (dir, store) = (source(&files()), MemoryStore::new());
    let faulty = Faulty::new(store.clone());
    faulty.on(When::call(Call::Create), Fault::IgnoreCreateOnly);
    assert_eq!(sealed(dir.path(), faulty, options()).unwrap_err().code(), Code::StoreUnfit);
    assert!(store.names().iter().all(|name| name.starts_with("probe/")), "{:?}", store.names());
}

#[test]
fn a_store_that_loses_or_changes_what_was_written_is_found_out_before_the_ref() {
    type Break = (When, Fault);
    let cases: [Break; 4] = [
        (When::call(Call::ReadRange).name("/d/"), Fault::FlipBit { offset: 5_000, bit: 1 }),
        (When::call(Call::ReadSmall).name("/m/"), Fault::FlipBit { offset: 300, bit: 1 }),
        (When::call(Call::ReadSmall).name("/k/"), Fault::FlipBit { offset: 200, bit: 1 }),
        (When::call(Call::Size).name("/d/"), Fault::Fail(Code::NotFound)),
    ];
    for (when, fault) in cases {
        // One object of one chunk: whatever the sample, it is in it.
        let dir = source(&[("a".to_owned(), bytes(9_000, 1))].into());
        let store = MemoryStore::new();
        let faulty = Faulty::new(store.clone());
        faulty.on(when.clone(), fault);
        let refused = sealed(dir.path(), faulty, options()).unwrap_err();
        assert!(refused.chain().contains("nothing was published"), "{refused:?}");
        assert!(store.names().iter().all(|name| !name.contains("/r/")), "{when:?}");
    }
}

/// THREAT_MODEL (f) row 72: two packers at once.
/// The public half of a key pair, as a publisher has it who is no reader. Beside each slots object it leaves another of
/// the same version, as a store could that wants its own recipient to be served.
struct ToRecipient {
    keyring: Keyring<'static>,
    store: MemoryStore,
}

impl SlotKeys for ToRecipient {
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        let slots = self.keyring.wrap_all(dek, target)?;
        let SlotTarget { model_id, vid, dek_commit } = *target;
        let forged = Slots { generation: 1, model_id, vid, dek_commit, slots: self.keyring.wrap_all(dek, target)? };
        self.store.put("forged", forged.encode()?);
        Ok(slots)
    }

    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        self.keyring.unlock(slots, header)
    }

    fn opens(&self) -> bool {
        false
    }
}

fn nobody(_: &str) -> Result<LockedBuf> {
    panic!("nobody is there to be asked")
}

#[test]
fn who_has_only_a_public_key_seals_twice_and_its_owner_opens() {
    let (folder, keys, store) = (source(&files()), tempfile::tempdir().unwrap(), MemoryStore::new());
    let path = keys.path().join("server");
    let recipient = KeySource::Recipient(generate_recipient_pair(&path).unwrap());
    let to_recipient = || {
        let keyring = Keyring::new(std::slice::from_ref(&recipient), &nobody);
        let mut options = options();
        options.keys = Arc::new(ToRecipient { keyring, store: store.clone() });
        options
    };
    sealed(folder.path(), store.clone(), to_recipient()).unwrap();
    // The second time there is a version it cannot open: told, and nothing inherited.
    let summary = sealed(folder.path(), store.clone(), to_recipient()).unwrap();
    assert_eq!(summary.version, 2);
    assert!(summary.warnings.iter().any(|told| told.contains("only seal")), "{:?}", summary.warnings);

    let model = ModelId::of_name(MODEL);
    let reader = Keyring::new(&[KeySource::X25519(path)], &nobody);
    let manifests: Vec<_> = store.names().into_iter().filter(|name| name.contains("/m/")).collect();
    assert_eq!(manifests.len(), 2);
    for name in manifests {
        let bytes = run(store.read_small(&name, 1 << 20)).unwrap();
        let (header, _) = ManifestHeader::parse_object(&bytes).unwrap();
        let slots = run(store.read_small(&names::slots(model, header.vid, 1), 65_536)).unwrap();
        let dek = reader.unlock(&Slots::parse(&slots).unwrap(), &header).unwrap();
        assert_eq!(open_manifest(&bytes, dek).unwrap().0.files().len(), files().len());
    }

    let faulty = Faulty::new(store.clone());
    faulty.on(When::call(Call::ReadSmall).name("/k/"), Fault::Instead { name: "forged".into(), start: 0 });
    let err = sealed(folder.path(), faulty, to_recipient()).unwrap_err();
    assert_eq!(err.code(), Code::SlotsFormat, "{err:?}");
}

#[test]
fn two_sealers_at_once_both_finish_with_numbers_of_their_own() {
    let store = MemoryStore::new();
    let dirs: Vec<_> = (0..4).map(|seed| source(&[("file".to_owned(), bytes(50_000, seed))].into())).collect();
    let summaries: Vec<_> = run(async {
        let sealing = dirs.iter().map(|dir| {
            // All look before anyone writes a ref: the slow part of each lies between the two.
            let slow = Faulty::new(store.clone());
            slow.on(When::call(Call::Begin), Fault::Delay(Duration::from_millis(300)));
            seal(dir.path(), Arc::new(slow), MODEL, options())
        });
        futures::future::join_all(sealing).await
    });
    let versions: BTreeSet<_> = summaries.iter().map(|summary| summary.as_ref().unwrap().version).collect();
    assert_eq!(versions, BTreeSet::from([1, 2, 3, 4]));
    let model = ModelId::of_name(MODEL);
    for number in 1..=4 {
        let bytes = store.get(&names::reference(model, LATEST, number)).unwrap();
        assert_eq!(Ref::parse(&bytes).unwrap().0.seq, number, "refs and versions in one order");
    }
    let manifests = store.names().iter().filter(|name| name.contains("/m/")).count();
    assert_eq!(manifests, 4, "the manifests of lost races are gone");
    read_latest(&store);
}

/// THREAT_MODEL (f) row 71: a file that grows, shrinks or is replaced while it is being sealed.
#[test]
fn a_source_that_changes_while_it_is_sealed_is_not_committed() {
    type Change = fn(&Path);
    let changes: [Change; 4] = [
        |file| {
            let mut bytes = fs::read(file).unwrap();
            bytes.push(1);
            fs::write(file, bytes).unwrap();
        },
        |file| fs::OpenOptions::new().write(true).open(file).unwrap().set_len(100).unwrap(),
        |file| {
            let bytes = fs::read(file).unwrap();
            fs::write(file.with_extension("new"), bytes).unwrap();
            fs::rename(file.with_extension("new"), file).unwrap();
        },
        |file| {
            let mut bytes = fs::read(file).unwrap();
            bytes[1 << 20] ^= 1;
            fs::write(file, bytes).unwrap();
        },
    ];
    for change in changes {
        let (dir, store) = (source(&files()), MemoryStore::new());
        sealed(dir.path(), store.clone(), options()).unwrap();
        let mut changed = files();
        changed.get_mut("model-1.safetensors").unwrap().push(0);
        write(dir.path(), &changed);
        // The kernel's clock for files has steps of some milliseconds: two changes within one would look like none.
        let yesterday = std::time::SystemTime::now() - Duration::from_secs(86_400);
        let listed = fs::File::options().write(true).open(dir.path().join("model-1.safetensors")).unwrap();
        listed.set_modified(yesterday).unwrap();
        // The change comes with the first progress of the sealing phase, when the file was listed and not yet read.
        let file = Mutex::new(Some(dir.path().join("model-1.safetensors")));
        let progress = ProgressFn::new(move |progress| {
            if progress.phase == Phase::Seal
                && let Some(file) = file.lock().unwrap().take()
            {
                change(&file);
            }
        });
        let refused = sealed(dir.path(), store.clone(), SealOptions { progress, ..options() }).unwrap_err();
        assert_eq!(refused.code(), Code::SourceChanged, "{refused:?}");
        let (_, reference, read) = read_latest(&store);
        assert_eq!((reference.seq, read), (1, files()));
        assert!(store.names().iter().all(|name| !name.contains("/l/")), "the lease is gone");
        assert_no_plaintext(&store);
    }
}

#[test]
fn progress_covers_every_byte_once_and_phases_come_in_order() {
    let (dir, store) = (source(&files()), MemoryStore::new());
    sealed(dir.path(), store.clone(), options()).unwrap();
    fs::write(dir.path().join("new.bin"), bytes(3 << 20, 8)).unwrap();
    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let told = Arc::clone(&seen);
    let progress = ProgressFn::new(move |progress| told.lock().unwrap().push(progress));
    let summary = sealed(dir.path(), store, SealOptions { progress, ..options() }).unwrap();
    let seen = seen.lock().unwrap();
    let mut phases: Vec<Phase> = seen.iter().map(|progress| progress.phase).collect();
    phases.dedup();
    assert_eq!(phases, [Phase::Scan, Phase::Compare, Phase::Seal, Phase::Verify, Phase::Publish]);
    let mut most: HashMap<String, Progress> = HashMap::new();
    for progress in seen.iter() {
        let best = most.entry(format!("{:?}", progress.phase)).or_insert(*progress);
        if progress.done_bytes > best.done_bytes {
            *best = *progress;
        }
    }
    assert_eq!(most["Compare"].done_bytes, summary.inherited_bytes);
    assert_eq!(most["Seal"].done_bytes, 3 << 20);
    for progress in most.values() {
        assert_eq!(progress.done_bytes, progress.total_bytes, "{progress:?}");
    }
}

#[test]
fn annotations_and_metrics_lie_inside_the_encrypted_body() {
    let (dir, store) = (source(&files()), MemoryStore::new());
    let mut with = options();
    with.metrics.insert("loss".into(), 1.25);
    with.annotations.insert("license".into(), "apache-2.0".into());
    sealed(dir.path(), store.clone(), with).unwrap();
    let json: serde_json::Value = serde_json::from_slice(read_latest(&store).0.annotations()).unwrap();
    assert_eq!(json, serde_json::json!({"license": "apache-2.0", "metrics": {"loss": 1.25}}));
    for name in store.names() {
        assert!(!store.get(&name).unwrap().windows(7).any(|window| window == b"license"), "{name}");
    }
}

#[test]
fn words_the_format_does_not_have_are_refused_before_anything_is_written() {
    type Change = fn(&mut SealOptions);
    let changes: [Change; 6] = [
        |options| options.tags = vec!["3".into()],
        |options| options.tags = vec!["UP".into()],
        |options| options.block_log2 = 30,
        |options| options.chunk_log2 = 10,
        |options| options.cuts.object_bytes_max = 1000,
        |options| options.metrics = [("loss".to_owned(), f64::NAN)].into(),
    ];
    let (dir, store) = (source(&files()), MemoryStore::new());
    for change in changes {
        let mut with = options();
        change(&mut with);
        assert_eq!(sealed(dir.path(), store.clone(), with).unwrap_err().code(), Code::Usage);
    }
    for name in ["", "a@b", "../x", "/a"] {
        let refused = run(seal(dir.path(), Arc::new(store.clone()), name, options())).unwrap_err();
        assert_eq!(refused.code(), Code::Usage, "{name:?}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(sealed(empty.path(), store.clone(), options()).unwrap_err().code(), Code::Source);
    assert!(store.names().is_empty());
}

#[test]
fn a_local_store_takes_versions_as_the_memory_one_does() {
    let (dir, root) = (source(&files()), tempfile::tempdir().unwrap());
    let store = || LocalStore::open(&root.path().join("store")).unwrap();
    sealed(dir.path(), store(), options()).unwrap();
    let summary = sealed(dir.path(), store(), options()).unwrap();
    assert_eq!((summary.version, summary.uploaded_bytes), (2, 0));
    assert_eq!(read_latest(&store()).2, files());
}

#[test]
fn a_store_inside_the_folder_to_be_sealed_is_refused() {
    let dir = source(&files());
    for below in ["", "store", "deep/store"] {
        let store = LocalStore::open(&dir.path().join(below)).unwrap();
        assert_eq!(sealed(dir.path(), store, options()).unwrap_err().code(), Code::Usage, "{below:?}");
    }
}

/// One object fails: the others give up too, nothing half-written stays open, and the cause is the one that is told.
#[test]
fn a_failed_object_stops_the_others_and_is_the_one_told() {
    let files: Files = (0..8).map(|number| (format!("model-{number}"), bytes(3 << 20, number))).collect();
    let (dir, store) = (source(&files), MemoryStore::new());
    let faulty = Faulty::new(store.clone());
    faulty.on(When::call(Call::Write).after(9).once(), Fault::Fail(Code::StoreDenied));
    assert_eq!(sealed(dir.path(), faulty.clone(), options()).unwrap_err().code(), Code::StoreDenied);
    assert!(faulty.count(Call::Begin) < 8, "all objects were begun");
    assert!(store.names().iter().all(|name| name.contains("/d/")), "{:?}", store.names());
    assert_no_plaintext(&store);
}
