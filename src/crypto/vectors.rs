//! The vectors of docs/FORMAT.md a.9: keys, nonce, commitment, the whole store, the two-key ciphertext.

use bytes::Bytes;

use super::kdf::Derived;
use super::*;
use crate::error::Code;
use crate::format::{
    ChannelId, ChunkIndex, Extent, HashAlg, Manifest, ManifestBuilder, ManifestDigest, ModelId, NewFile, NewHeader,
    NewObject, ObjectHeader, ObjectLayout, Oid, Ref, RefSignature, Slot, SlotParams, Slots, Suite, Vid,
};
use crate::mem::Secret;
use crate::store::CipherChunk;

/// `SHAKE256(seed)[:N]`, as the page defines it.
fn det(len: usize, seed: &str) -> Vec<u8> {
    const RATE: usize = 136;
    assert!(seed.len() < RATE, "one block of input is enough for the names of the page");
    let mut block = [0u8; 200];
    block[..seed.len()].copy_from_slice(seed.as_bytes());
    block[seed.len()] = 0x1f;
    block[RATE - 1] |= 0x80;
    let mut state: [u64; 25] = std::array::from_fn(|i| u64::from_le_bytes(block[8 * i..][..8].try_into().unwrap()));
    let mut out = Vec::with_capacity(len + RATE);
    while out.len() < len {
        keccak_f(&mut state);
        out.extend(state[..RATE / 8].iter().flat_map(|lane| lane.to_le_bytes()));
    }
    out.truncate(len);
    out
}

/// Keccak-f[1600], FIPS 202.
fn keccak_f(a: &mut [u64; 25]) {
    let mut lfsr = 1u8;
    for _ in 0..24 {
        let c: [u64; 5] = std::array::from_fn(|x| (0..5).fold(0, |sum, y| sum ^ a[x + 5 * y]));
        for i in 0..25 {
            a[i] ^= c[(i + 4) % 5] ^ c[(i + 1) % 5].rotate_left(1);
        }
        let (mut x, mut y, mut moved) = (1, 0, a[1]);
        for t in 0..24 {
            (x, y) = (y, (2 * x + 3 * y) % 5);
            let rotated = moved.rotate_left((t + 1) * (t + 2) / 2 % 64);
            moved = std::mem::replace(&mut a[x + 5 * y], rotated);
        }
        for row in a.chunks_mut(5) {
            let old: [u64; 5] = std::array::from_fn(|x| row[x]);
            for x in 0..5 {
                row[x] = old[x] ^ (!old[(x + 1) % 5] & old[(x + 2) % 5]);
            }
        }
        for j in 0..7 {
            if lfsr & 1 == 1 {
                a[0] ^= 1 << ((1 << j) - 1);
            }
            lfsr = (lfsr << 1) ^ if lfsr & 0x80 == 0 { 0 } else { 0x71 };
        }
    }
}

fn det32(seed: &str) -> [u8; 32] {
    det(32, seed).try_into().unwrap()
}
fn dek() -> Dek {
    Dek::from_secret(Secret::from_bytes(&mut det32("dek")))
}
fn vid() -> Vid {
    Vid(det(16, "vid").try_into().unwrap())
}
fn model_id() -> ModelId {
    ModelId::of_name("acme/llama-70b")
}
fn layout0() -> ObjectLayout {
    ObjectLayout::new(205_704, 16, 20).unwrap()
}
fn header0(commit: [u8; 32]) -> ObjectHeader {
    let (suite, oid) = (Suite::Aes256Gcm, Oid(det32("oid0")));
    ObjectHeader { suite, block_log2: 16, chunk_log2: 20, oid, origin_vid: vid(), coded: false, commit }
}

#[test]
fn every_key_of_the_hierarchy_has_the_value_of_the_page() {
    assert_eq!(hex::encode(det32("dek")), "6a2b6cbfa741842d7f987e2ec0725b425570f252036d10ec904f7600f5c8bcf2");
    assert_eq!(vid().to_string(), "3a555a1bc5bb3d87f495a1c5ce1986ed");
    assert_eq!(model_id().to_string(), "ee148d0c2a443fb2f078683d428bbeb84ad95b1111fe6f2b6f8b449a726bda1d");
    let dek_commit = dek().commitment(Suite::Aes256Gcm, model_id(), vid());
    assert_eq!(hex::encode(dek_commit), "9cd323a419a6cb3252ea8127c31d0addd3b24ddb2bfc47755e77d9d6a23a2062");
    let oid = Oid(det32("oid0"));
    assert_eq!(oid.to_string(), "302e5a0585aa18f8e4477adfde4d6acece937bf3e37274f2de2bf8f4fd5c4a9e");
    let root = dek().object_root(oid);
    assert_eq!(hex::encode(*root), "5fba399001b3eb947dec0a91608aecbc03078bb0325a85757d63ef70b88f086a");
    let derived = Derived::new(&root, "object", &[&header0([0; 32]).kdf_input()]);
    assert_eq!(hex::encode(derived.key), "a5eb12c7db6d28d53aead0474749cf862468231698e5b79fe92c4532a97911d2");
    assert_eq!(hex::encode(derived.base_nonce), "fbaf8a71bbf4abe13691e83c");
    assert_eq!(hex::encode(super::aead::nonce_of(&derived.base_nonce, 1)), "fbaf8a71bbf4abe13691e83d");
    assert_eq!(hex::encode(derived.commit), "206db3e3b8c00d4e4c54ce736577410ff3d7b0cffd0a9ab68bad50466a96d905");
    let last = layout0().chunk_shape(ChunkIndex(0), 205_704).blocks().last().unwrap();
    assert_eq!(hex::encode(last.aad), "03000000000000008823000001000000");
}

/// Object 0 in its two files: `one.bin` to a multiple of 4096, then `config.json`.
fn plain0() -> Vec<u8> {
    let mut plain = det(197_608, "A");
    plain.resize(197_608_usize.next_multiple_of(4096), 0);
    plain.extend(det(5000, "B"));
    plain
}

fn seal(oid: &str, plain: &[u8]) -> (NewObject, Vec<Vec<u8>>) {
    let layout = ObjectLayout::new(plain.len() as u64, 16, 20).unwrap();
    let (oid, suite) = (Oid(det32(oid)), Suite::Aes256Gcm);
    let sealer = ObjectSealer::new(&dek(), suite, layout, HashAlg::Sha256, oid, vid());
    let (mut hashes, mut chunks) = (Vec::new(), Vec::new());
    for (index, chunk) in layout.chunks().zip(plain.chunks(1 << 20)) {
        let (mut chunk, mut tags) = (chunk.to_vec(), Vec::new());
        hashes.push(sealer.seal_chunk(index, &mut chunk, &mut tags));
        chunks.push([chunk, tags].concat());
    }
    let commit = sealer.commit();
    (NewObject { oid, layout, suite, inherited: false, origin_vid: vid(), commit, hashes, coded: None }, chunks)
}

fn whole_manifest() -> (Manifest, Vec<u8>) {
    let mut builder = ManifestBuilder::new();
    let one = det(197_608, "A");
    let (config, big) = (det(5000, "B"), det(2_293_767, "big"));
    builder.add_object(seal("oid0", &plain0()).0);
    builder.add_object(seal("oid1", &big).0);
    let extent = |object, object_offset, bytes: &[u8]| vec![Extent { object, object_offset, len: bytes.len() as u64 }];
    for (path, bytes, extents) in [
        ("a/one.bin", &one, extent(0, 0, &one)),
        ("config.json", &config, extent(0, 200_704, &config)),
        ("empty", &Vec::new(), Vec::new()),
        ("model.safetensors", &big, extent(1, 0, &big)),
    ] {
        let (path, size) = (path.to_owned(), bytes.len() as u64);
        builder.add_file(NewFile { path, mode: 0o444, size, sha256: sha256(&[bytes]), mtime: 0, extents });
    }
    builder.annotations(br#"{"license":"x"}"#.to_vec());
    let head = NewHeader {
        suite: Suite::Aes256Gcm,
        hash_alg: HashAlg::Sha256,
        model_id: model_id(),
        vid: vid(),
        seq: 7,
        created_at: 1_790_000_000,
        msalt: det32("msalt"),
        previous: None,
    };
    let mut manifest = builder.finish(head).unwrap();
    let bytes = seal_manifest(&mut manifest, &dek(), &[]).unwrap();
    (manifest, bytes)
}

#[test]
fn the_first_chunk_of_the_whole_store_has_the_hash_of_the_page() {
    let (object, chunks) = seal("oid0", &plain0());
    assert_eq!(object.layout, layout0());
    assert_eq!(chunks[0].len(), 205_896 - 128);
    assert_eq!(hex::encode(object.hashes[0]), "9b970cfe30418addc91ccbdb2ca8d9f92a472ff526775864d07dcbad2710044e");
}

#[test]
fn the_manifest_of_the_whole_store_has_the_digest_of_the_page_and_opens() {
    let (manifest, bytes) = whole_manifest();
    assert_eq!(bytes.len(), 1_169);
    let digest = ManifestDigest::of(&bytes);
    assert_eq!(digest.to_string(), "517cc1d1929bc2c40ffad5438d4bb5bae18d1bde3a01817aa1ed62bd8ba4037a");
    let (opened, keys) = open_manifest(&bytes, dek()).unwrap();
    assert_eq!(opened, manifest);

    let plain = plain0();
    let (object, chunks) = seal("oid0", &plain);
    let pieces = vec![Bytes::from(chunks[0].clone())];
    let chunk = CipherChunk { object: object.oid, index: ChunkIndex(0), pieces };
    let mut slot = vec![0; plain.len()];
    open_chunk(&keys, &opened, 0, &chunk, Verify::Strict, &mut slot, &mut []).unwrap();
    assert_eq!(slot, plain);
}

#[test]
fn the_slot_and_the_slots_object_of_the_whole_store_have_the_bytes_of_the_page() {
    let (params, label) = (SlotParams::Raw { salt: det32("ssalt") }, "node-kek-2026");
    let dek_commit = dek().commitment(Suite::Aes256Gcm, model_id(), vid());
    let context = Slot::wrap_context(label, &params, model_id(), vid(), &dek_commit);
    let kek = Secret::from_bytes(&mut det32("kek"));
    let body = wrap_dek(&kek, &context, &dek()).to_vec();
    assert!(unwrap_dek(&kek, &context, &body).unwrap().commitment(Suite::Aes256Gcm, model_id(), vid()) == dek_commit);
    let slot = Slot { label: label.into(), params, body };
    let slots = Slots { generation: 3, model_id: model_id(), vid: vid(), dek_commit, slots: vec![slot] };
    let bytes = slots.encode().unwrap();
    assert_eq!(
        hex::encode(&bytes[128..bytes.len() - 32]),
        "01000d00200050006e6f64652d6b656b2d3230323689576df3d38dd0a1bc76ccccf94568bd195e121c52406e15b46a11eef93cc9a7\
         c237b54ba30b7003f86e6e27283f15da40e4e8df601e31bbf5a8cf12f11bfa9d960d4e656fd75c61f13b487fcc235878c9d3559575599\
         eed1c3a6f05cdf47b2c12eadbcef3f5ed41518fa2f9feec4161"
    );
    assert_eq!(bytes.len(), 293);
    assert_eq!(hex::encode(sha256(&[&bytes])), "ccdf5795e3e7335ce80eec79fd6dea4d23f97f159ca2657749bc851f9c348fac");
}

/// slots-kinds.hex was made by tests/vectors/slots_kinds.py, with none of our code.
#[test]
fn the_slots_of_public_keys_and_of_pbkdf2_have_the_bytes_of_another_implementation() {
    let lines: String = include_str!("../../tests/vectors/slots-kinds.hex").lines().collect();
    let bytes = hex::decode(lines).unwrap();
    let slots = Slots::parse(&bytes).unwrap();
    assert_eq!(slots.encode().unwrap(), bytes);
    let dek_commit = dek().commitment(Suite::Aes256Gcm, model_id(), vid());
    let context = |slot: &Slot| Slot::wrap_context(&slot.label, &slot.params, model_id(), vid(), &dek_commit);
    let [to_recipient, by_passphrase] = &slots.slots[..] else { panic!("{slots:?}") };

    let secret = RecipientSecret::from_seed(Secret::from_bytes(&mut det32("recipient")));
    assert_eq!(
        secret.public().to_string(),
        "modelfs-x25519:269f9fe1ada5f027dbd2e82b3b04f3932d0df62b30a6a1336e6fbb69d6fb194b"
    );
    assert_eq!(to_recipient.params, SlotParams::HpkeX25519 { recipient: secret.public().key_id() });
    let drawn = zeroize::Zeroizing::new(det32("ephemeral"));
    let body = recipient::seal_with(&secret.public(), &context(to_recipient), &dek(), drawn).unwrap();
    assert_eq!(hex::encode(body), hex::encode(&to_recipient.body));
    let opened = open_dek_with(&secret, &context(to_recipient), &to_recipient.body).unwrap();
    assert_eq!(opened.expose(), dek().expose());

    let salt = det32("psalt");
    assert_eq!(by_passphrase.params, SlotParams::Pbkdf2Sha512 { iterations: 100_000, salt });
    let kek = hex::decode("6ff1a631b23906ad2656991bed7889c72b0ab589bd5b813871dafa970c84a260").unwrap();
    let kek = Secret::from_bytes(&mut kek.try_into().unwrap());
    assert_eq!(wrap_dek(&kek, &context(by_passphrase), &dek())[..], by_passphrase.body);
}

#[test]
fn the_ref_of_the_whole_store_has_the_digest_of_the_page() {
    let (_, manifest) = whole_manifest();
    let key = SigningKey::from_seed(Secret::from_bytes(&mut det32("pub")));
    let ref_of = |previous, min_slots_generation, min_version_seq| Ref {
        n_sigs: 1,
        model_id: model_id(),
        channel_id: ChannelId::of_name("prod"),
        ref_seq: 42,
        seq: 7,
        manifest_digest: ManifestDigest::of(&manifest),
        manifest_len: manifest.len() as u64,
        vid: vid(),
        issued_at: 1_790_000_000,
        expires_at: 1_790_000_000 + 7 * 86_400,
        min_slots_generation,
        min_version_seq,
        previous,
    };
    let digest_of = |reference: &Ref| {
        let signature = RefSignature { key_id: key.public().key_id(), signature: key.sign(&reference.message()) };
        let bytes = reference.encode(&[signature]);
        assert_eq!(bytes.len(), 356);
        assert!(key.public().verify_strict(&reference.message(), &signature.signature));
        hex::encode(sha256(&[&bytes]))
    };
    // The page leaves three fields open: the floors and the digest of the ref before.
    let want = "2c72da628611d998282b7abd37fef9e984ce1f064f41d971e16c46a83df0d974";
    let previous = [[0; 32], det32("prev"), det32("previous"), det32("prevref"), det32("ref41")];
    let mut tried = 0;
    for previous in previous {
        for generation in 0..=4 {
            for floor in 0..=8 {
                tried += 1;
                if digest_of(&ref_of(previous, generation, floor)) == want {
                    println!("previous {} generation {generation} floor {floor}", hex::encode(previous));
                    return;
                }
            }
        }
    }
    panic!("none of {tried} gives the digest of the page");
}

/// One GCM ciphertext that is valid under two raw keys. No caller can bring a raw key: keys are derived, the commitment
/// admits one only, and the chunk hash is fixed before any key is tried.
#[test]
fn the_two_key_ciphertext_is_refused_under_either_key() {
    let two_key = hex::decode(
        "639fe34e6d538f13a5eab9743218f6cc3d99c94f479e4542bde4d6d0456b02cb00000000000000000000000000000000\
         e169ccb38efac7fbd88dcaa3b50512e3d7cd4b253dfd077ea686b99b8cd74071",
    )
    .unwrap();
    let plain_len = two_key.len() - 16;
    let layout = ObjectLayout::new(plain_len as u64, 16, 20).unwrap();
    let sealed = testing::Sealed::new(Suite::Aes256Gcm, HashAlg::Sha256, layout, Oid([5; 32]));
    let chunk = sealed.chunk_of(0, &two_key);
    for (verify, want) in [(Verify::Strict, Code::ChunkHash), (Verify::Aead, Code::Tag)] {
        let mut slot = sealed.slot(0);
        let err = open_chunk(&sealed.keys, &sealed.manifest, 0, &chunk, verify, &mut slot, &mut []).unwrap_err();
        assert_eq!(err.code(), want, "{err:?}");
        assert!(slot.iter().all(|byte| *byte == 0));
    }
}

/// What stops a two-key ciphertext whose bytes the manifest does list: the second key has another commitment.
#[test]
fn a_chunk_under_a_second_key_is_refused_by_the_commitment_before_any_cipher() {
    let sealed = testing::Sealed::small(Suite::Aes256Gcm);
    let other = ModelKeys::new(Dek::random(), Vec::new());
    for verify in [Verify::Strict, Verify::Aead] {
        let mut slot = sealed.slot(0);
        let err = open_chunk(&other, &sealed.manifest, 0, &sealed.chunk(0), verify, &mut slot, &mut []).unwrap_err();
        assert_eq!(err.code(), Code::Commit, "{err:?}");
        assert!(slot.iter().all(|byte| *byte == 0));
    }
    assert_eq!(open_manifest(&sealed.manifest_bytes, Dek::random()).unwrap_err().code(), Code::DekCommit);
}
