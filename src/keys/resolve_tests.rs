//! A publisher in a memory store, and what a hostile store may do to its objects. Named after THREAT_MODEL (f).

use bytes::Bytes;

use super::*;
use crate::crypto::{SigningKey, seal_manifest, sha256};
use crate::format::{HashAlg, ManifestBuilder, NewFile, NewHeader, RefSignature, Suite, Vid};
use crate::keys::{Cost, Glob, KeyMaterial, KeySource, Roles, wrap};
use crate::mem::{LockedBuf, Secret};
use crate::store::ChunkSink;
use crate::store::memory::MemoryStore;

const NOW: i64 = 1_790_000_000;
const NAME: &str = "acme/m";

/// What one ref is to say; the rest follows from the version it names.
#[derive(Clone, Copy)]
struct Says {
    channel: &'static str,
    ref_seq: u64,
    issued_at: i64,
    expires_at: i64,
    min_slots_generation: u32,
    min_version_seq: u64,
}

impl Default for Says {
    fn default() -> Self {
        let (issued_at, expires_at) = (NOW - 10, i64::MAX);
        Says { channel: "latest", ref_seq: 1, issued_at, expires_at, min_slots_generation: 1, min_version_seq: 1 }
    }
}

struct World {
    store: MemoryStore,
    key: SigningKey,
    trust: Trust,
    policy: FloorPolicy,
    state: tempfile::TempDir,
    /// Digest, length and vid of each version, from 1.
    versions: Vec<(ManifestDigest, u64, Vid)>,
    floors: bool,
    first_use: bool,
    now: fn() -> i64,
}

fn signing_key(seed: u8) -> SigningKey {
    SigningKey::from_seed(Secret::from_bytes(&mut [seed; 32]))
}

fn sign(key: &SigningKey, reference: &Ref) -> RefSignature {
    RefSignature { key_id: key.public().key_id(), signature: key.sign(&reference.message()) }
}

impl World {
    /// One version under `latest`, its ref number 1.
    async fn new() -> World {
        let key = signing_key(1);
        let mut trust = Trust::default();
        trust.add(Glob::new("*").unwrap(), key.public(), Roles::BOTH);
        let mut world = World {
            store: MemoryStore::new(),
            key,
            trust,
            policy: FloorPolicy::default(),
            state: tempfile::tempdir().unwrap(),
            versions: Vec::new(),
            floors: true,
            first_use: false,
            now: || NOW,
        };
        world.publish().await;
        world.point(Says::default(), 1).await;
        world
    }

    fn model() -> ModelId {
        ModelId::of_name(NAME)
    }

    fn dek(seq: u64) -> Dek {
        Dek::from_secret(Secret::from_bytes(&mut [seq as u8; 32]))
    }

    fn kek() -> KeyMaterial {
        KeyMaterial::Key(Secret::from_bytes(&mut [0x77; 32]))
    }

    /// Stores the next version with slots of generation 1, named by no ref yet.
    async fn publish(&mut self) -> u64 {
        let seq = self.versions.len() as u64 + 1;
        let dek = World::dek(seq);
        let mut builder = ManifestBuilder::new();
        let sha256 = sha256(&[]);
        builder.add_file(NewFile { path: "a".into(), mode: 0o444, size: 0, sha256, mtime: 0, extents: Vec::new() });
        let vid = Vid([seq as u8; 16]);
        let head = NewHeader {
            suite: Suite::Aes256Gcm,
            hash_alg: HashAlg::Blake3,
            model_id: World::model(),
            vid,
            seq,
            created_at: NOW,
            msalt: [seq as u8; 32],
            previous: None,
        };
        let mut manifest = builder.finish(head).unwrap();
        let bytes = seal_manifest(&mut manifest, &dek, &[]).unwrap();
        let digest = ManifestDigest::of(&bytes);
        self.versions.push((digest, bytes.len() as u64, vid));
        self.store.put(&names::manifest(World::model(), digest), bytes);
        self.sign_manifest(&signing_key(1), seq).await;
        self.put_slots(manifest.header(), 1, &dek).await;
        seq
    }

    async fn sign_manifest(&self, key: &SigningKey, seq: u64) {
        let (digest, ..) = self.versions[seq as usize - 1];
        let key_id = key.public().key_id();
        let signature = key.sign(&manifest_message(digest, World::model(), seq));
        let object = SignatureObject { key_id, manifest_digest: digest, signature };
        self.store.put(&names::signature(World::model(), digest, key_id), object.encode().to_vec());
    }

    async fn put_slots(&self, header: &ManifestHeader, generation: u32, dek: &Dek) {
        let slot = wrap(&World::kek(), "node", Cost::default(), &header.into(), dek).unwrap();
        let (model_id, vid, dek_commit) = (header.model_id, header.vid, header.dek_commit);
        let slots = Slots { generation, model_id, vid, dek_commit, slots: vec![slot] };
        self.store.put(&names::slots(model_id, vid, generation), slots.encode().unwrap());
    }

    fn header(&self, seq: u64) -> ManifestHeader {
        let (digest, ..) = self.versions[seq as usize - 1];
        let bytes = self.store.get(&names::manifest(World::model(), digest)).unwrap();
        ManifestHeader::parse_object(&bytes).unwrap().0
    }

    fn ref_to(&self, says: Says, seq: u64) -> Ref {
        let (manifest_digest, manifest_len, vid) = self.versions[seq as usize - 1];
        let before = self.store.get(&names::reference(World::model(), says.channel, says.ref_seq.wrapping_sub(1)));
        let previous = before.map_or([0; 32], |bytes| sha256(&[&bytes[..256]]));
        Ref {
            n_sigs: 1,
            model_id: World::model(),
            channel_id: ChannelId::of_name(says.channel),
            ref_seq: says.ref_seq,
            seq,
            manifest_digest,
            manifest_len,
            vid,
            issued_at: says.issued_at,
            expires_at: says.expires_at,
            min_slots_generation: says.min_slots_generation,
            min_version_seq: says.min_version_seq,
            previous,
        }
    }

    /// Commits a ref to version `seq`, and the hint.
    async fn point(&self, says: Says, seq: u64) {
        let reference = self.ref_to(says, seq);
        let bytes = reference.encode(&[sign(&self.key, &reference)]);
        self.put_ref(says, bytes).await;
    }

    async fn put_ref(&self, says: Says, bytes: Vec<u8>) {
        self.store.put(&names::reference(World::model(), says.channel, says.ref_seq), bytes.clone());
        self.store.replace_hint(&names::head(World::model(), says.channel), Bytes::from(bytes)).await.unwrap();
    }

    async fn get(&self, selector: &str, pin: Option<ManifestDigest>) -> Result<Resolved> {
        let floors = FloorStore::new(self.state.path());
        let tofu = Tofu::new(self.state.path());
        let resolver = Resolver {
            source: &self.store,
            trust: &self.trust,
            first_use: self.first_use.then_some(&tofu),
            floors: self.floors.then_some(&floors),
            policy: self.policy,
            now: self.now,
        };
        resolver.resolve(&selector.parse().unwrap(), pin).await
    }

    /// Resolves `NAME`; the floor must be as before when it is refused.
    async fn refused(&self) -> Code {
        let floor = FloorStore::new(self.state.path());
        let before = floor.load(&self.store.describe(), World::model(), "latest").unwrap();
        let code = self.get(NAME, None).await.unwrap_err().code();
        assert_eq!(floor.load(&self.store.describe(), World::model(), "latest").unwrap(), before, "floor moved");
        code
    }

    fn bend(&self, name: &str, at: usize) {
        let mut bytes = self.store.get(name).unwrap().to_vec();
        bytes[at] ^= 1;
        self.store.put(name, bytes);
    }
}

fn latest(ref_seq: u64) -> String {
    names::reference(World::model(), "latest", ref_seq)
}

fn keyring_file(dir: &tempfile::TempDir) -> KeySource {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.path().join("kek");
    std::fs::write(&path, [0x77; 32]).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    KeySource::File(path)
}

#[tokio::test]
async fn the_newest_version_is_found_unlocked_and_remembered() {
    let mut world = World::new().await;
    let got = world.get(NAME, None).await.unwrap();
    assert_eq!((got.header.seq, got.channel.as_deref(), &got.notes[..]), (1, Some("latest"), &[Note::NoFloor][..]));
    assert_eq!(got.signed_by, [world.key.public().key_id()]);
    let prompt = |_: &str| -> Result<LockedBuf> { unreachable!() };
    let ring = Keyring::new(&[keyring_file(&world.state)], &prompt);
    assert_eq!(got.open(&ring).unwrap().0.files().len(), 1);

    let seq = world.publish().await;
    world.point(Says { ref_seq: 2, ..Says::default() }, seq).await;
    let got = world.get(NAME, None).await.unwrap();
    assert_eq!((got.header.seq, &got.notes[..]), (2, &[][..]));
    assert_eq!(got.reference.unwrap().ref_seq, 2);
}

#[tokio::test]
async fn a_stale_wrong_or_missing_hint_is_only_a_hint() {
    let mut world = World::new().await;
    let stale = world.store.get(&names::head(World::model(), "latest")).unwrap();
    let seq = world.publish().await;
    world.point(Says { ref_seq: 2, ..Says::default() }, seq).await;
    for hint in [stale, Bytes::from_static(b"rubbish"), Bytes::from(vec![0; 5000])] {
        world.floors = false;
        world.store.replace_hint(&names::head(World::model(), "latest"), hint).await.unwrap();
        assert_eq!(world.get(NAME, None).await.unwrap().header.seq, 2);
    }
    world.store.delete(&names::head(World::model(), "latest")).await.unwrap();
    assert_eq!(world.get(NAME, None).await.unwrap().header.seq, 2);
}

/// Further behind than the probes reach: the listing finds the newest.
#[tokio::test]
async fn a_hint_far_behind_still_leads_to_the_newest() {
    let mut world = World::new().await;
    let stale = world.store.get(&names::head(World::model(), "latest")).unwrap();
    let two = world.publish().await;
    for ref_seq in 2..=40 {
        world.point(Says { ref_seq, ..Says::default() }, if ref_seq == 40 { two } else { 1 }).await;
    }
    world.store.replace_hint(&names::head(World::model(), "latest"), stale).await.unwrap();
    let got = world.get(NAME, None).await.unwrap();
    assert_eq!((got.header.seq, got.reference.unwrap().ref_seq), (2, 40));
}

#[tokio::test]
async fn versions_and_tags_are_found_by_name() {
    let mut world = World::new().await;
    let two = world.publish().await;
    world.point(Says { ref_seq: 2, ..Says::default() }, two).await;
    let three = world.publish().await;
    world.point(Says { channel: "prod", ..Says::default() }, three).await;
    assert_eq!(world.get("acme/m@1", None).await.unwrap().header.seq, 1);
    assert_eq!(world.get("acme/m@2", None).await.unwrap().header.seq, 2);
    let by_number = world.get("acme/m@3", None).await.unwrap();
    assert_eq!((by_number.header.seq, by_number.channel.as_deref()), (3, Some("prod")));
    assert_eq!(world.get("acme/m@prod", None).await.unwrap().header.seq, 3);
    assert_eq!(world.get("acme/m@4", None).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(world.get("acme/m@beta", None).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(world.get("other", None).await.unwrap_err().code(), Code::NotFound);
    // A withdrawn version cannot be had by its number either.
    world.point(Says { ref_seq: 3, min_version_seq: 2, ..Says::default() }, two).await;
    assert_eq!(world.get("acme/m@1", None).await.unwrap_err().code(), Code::BelowFloor);
}

/// THREAT_MODEL (f) row 21.
#[tokio::test]
async fn a_ref_with_a_bent_bit_is_ref_sig() {
    for at in [81, 100, 200, 292, 355] {
        let world = World::new().await;
        world.bend(&latest(1), at);
        assert_eq!(world.refused().await, Code::RefSig, "byte {at}");
    }
}

/// THREAT_MODEL (f) row 22.
#[tokio::test]
async fn a_ref_by_an_unknown_key_or_one_key_twice_is_ref_key() {
    let mut world = World::new().await;
    let reference = world.ref_to(Says::default(), 1);
    world.put_ref(Says::default(), reference.encode(&[sign(&signing_key(9), &reference)])).await;
    assert_eq!(world.refused().await, Code::RefKey);

    let (one, two) = (signing_key(1).public(), signing_key(2).public());
    world.trust = Trust::parse(&format!("* {one}\n* {two}\nthreshold * 2 release")).unwrap();
    let reference = Ref { n_sigs: 2, ..world.ref_to(Says::default(), 1) };
    let twice = [sign(&signing_key(1), &reference); 2];
    world.put_ref(Says::default(), reference.encode(&twice)).await;
    assert_eq!(world.refused().await, Code::RefKey);
    let both = [sign(&signing_key(1), &reference), sign(&signing_key(2), &reference)];
    world.put_ref(Says::default(), reference.encode(&both)).await;
    assert!(world.get(NAME, None).await.is_ok());

    // A key that may sign manifests only.
    world.trust = Trust::parse(&format!("* {one} publisher\n* {two} release")).unwrap();
    world.point(Says::default(), 1).await;
    world.floors = false;
    assert_eq!(world.refused().await, Code::RefKey);
}

/// THREAT_MODEL (f) row 23.
#[tokio::test]
async fn a_ref_of_another_model_or_channel_is_refused() {
    let world = World::new().await;
    for (bent, want) in [
        (Ref { model_id: ModelId([9; 32]), ..world.ref_to(Says::default(), 1) }, Code::RefModel),
        (Ref { channel_id: ChannelId::of_name("beta"), ..world.ref_to(Says::default(), 1) }, Code::RefChannel),
    ] {
        world.put_ref(Says::default(), bent.encode(&[sign(&world.key, &bent)])).await;
        assert_eq!(world.refused().await, want);
    }
}

/// THREAT_MODEL (f) row 24.
#[tokio::test]
async fn an_older_a_changed_and_an_unchained_ref_are_refused() {
    let mut world = World::new().await;
    let first = world.store.get(&latest(1)).unwrap();
    let two = world.publish().await;
    world.point(Says { ref_seq: 2, ..Says::default() }, two).await;
    world.get(NAME, None).await.unwrap();

    // A snapshot of the bucket from before.
    let second = world.store.get(&latest(2)).unwrap();
    world.store.delete(&latest(2)).await.unwrap();
    world.store.replace_hint(&names::head(World::model(), "latest"), first.clone()).await.unwrap();
    assert_eq!(world.refused().await, Code::Rollback);
    // The old ref under the new number.
    world.store.put(&latest(2), first);
    assert_eq!(world.refused().await, Code::Rollback);
    // The same number with other bytes, properly signed.
    world.point(Says { ref_seq: 2, issued_at: NOW - 5, ..Says::default() }, two).await;
    assert_eq!(world.refused().await, Code::Fork);
    // A successor of something else.
    world.point(Says { ref_seq: 3, ..Says::default() }, two).await;
    world.store.put(&latest(2), second);
    assert_eq!(world.refused().await, Code::Fork);
}

/// THREAT_MODEL (f) row 25.
#[tokio::test]
async fn expiry_future_and_clock_are_judged_by_our_clock() {
    let mut world = World::new().await;
    world.point(Says { expires_at: NOW, ..Says::default() }, 1).await;
    assert_eq!(world.refused().await, Code::RefExpired);
    world.policy.freeze_warn = true;
    assert_eq!(world.get(NAME, None).await.unwrap().notes, [Note::NoFloor, Note::Expired]);
    world.policy.freeze_warn = false;

    let mut world = World::new().await;
    world.point(Says { issued_at: NOW + 400, ..Says::default() }, 1).await;
    assert_eq!(world.refused().await, Code::RefFuture);
    world.point(Says::default(), 1).await;
    world.get(NAME, None).await.unwrap();
    world.point(Says { ref_seq: 2, issued_at: 0, ..Says::default() }, 1).await;
    world.now = || NOW - 1000;
    assert_eq!(world.refused().await, Code::Clock);
}

/// THREAT_MODEL (f) row 26.
#[tokio::test]
async fn a_ref_number_at_the_end_of_the_line_is_fast_forward() {
    for ref_seq in [1 << 60, u64::MAX] {
        let world = World::new().await;
        world.point(Says { ref_seq, ..Says::default() }, 1).await;
        assert_eq!(world.refused().await, Code::FastForward, "{ref_seq}");
    }
}

/// THREAT_MODEL (f) row 27, and b.2: a rollback is a new ref, down to the floor.
#[tokio::test]
async fn a_manifest_below_the_floor_is_refused_and_a_deliberate_rollback_is_not() {
    let mut world = World::new().await;
    let two = world.publish().await;
    world.point(Says { ref_seq: 2, ..Says::default() }, two).await;
    world.get(NAME, None).await.unwrap();
    world.point(Says { ref_seq: 3, ..Says::default() }, 1).await;
    assert_eq!(world.get(NAME, None).await.unwrap().header.seq, 1);
    world.point(Says { ref_seq: 4, min_version_seq: 2, ..Says::default() }, 1).await;
    assert_eq!(world.refused().await, Code::BelowFloor);
}

/// THREAT_MODEL (f) row 28.
#[tokio::test]
async fn a_ref_of_another_length_is_ref_length() {
    let world = World::new().await;
    let good = world.store.get(&latest(1)).unwrap().to_vec();
    let with_count = |count: u32| {
        let mut bytes = good.clone();
        bytes[12..16].copy_from_slice(&count.to_le_bytes());
        bytes
    };
    let cases = [with_count(0), with_count(5), with_count(u32::MAX), good[..355].to_vec(), [&good[..], &[0]].concat()];
    for bytes in cases.into_iter().chain([vec![0; 10_000]]) {
        world.store.put(&latest(1), bytes);
        assert_eq!(world.refused().await, Code::RefLength);
    }
}

/// THREAT_MODEL (f) row 29.
#[tokio::test]
async fn a_bent_or_resized_manifest_is_refused() {
    let world = World::new().await;
    let name = names::manifest(World::model(), world.versions[0].0);
    let good = world.store.get(&name).unwrap().to_vec();
    for at in [0, 70, 255, 256, good.len() - 1] {
        world.store.put(&name, good.clone());
        world.bend(&name, at);
        assert_eq!(world.refused().await, Code::ManDigest, "byte {at}");
    }
    for bytes in [[&good[..], &[0]].concat(), good[..good.len() - 1].to_vec(), vec![0; 1 << 20]] {
        world.store.put(&name, bytes);
        assert_eq!(world.refused().await, Code::ManLen);
    }
}

/// THREAT_MODEL (f) row 30.
#[tokio::test]
async fn a_manifest_without_a_good_publisher_signature_is_man_sig() {
    let world = World::new().await;
    let (digest, ..) = world.versions[0];
    let name = names::signature(World::model(), digest, world.key.public().key_id());
    let good = world.store.get(&name).unwrap().to_vec();
    let edit = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        edit(&mut bytes);
        bytes
    };
    for bytes in [
        edit(&|bytes| bytes[80..].fill(0)),
        edit(&|bytes| bytes[100] ^= 1),
        edit(&|bytes| bytes[143] |= 0x80),
        edit(&|bytes| bytes[20] ^= 1),
        edit(&|bytes| bytes[50] ^= 1),
        edit(&|bytes| bytes.truncate(143)),
        edit(&|bytes| bytes.push(0)),
        edit(&|bytes| bytes[10] = 2),
    ] {
        world.store.put(&name, bytes);
        assert_eq!(world.refused().await, Code::ManSig);
    }
    world.store.delete(&name).await.unwrap();
    assert_eq!(world.refused().await, Code::ManSig);
}

/// THREAT_MODEL (f) row 30 and (c) 12: two of three publishers.
#[tokio::test]
async fn a_threshold_of_publishers_needs_that_many_different_ones() {
    let mut world = World::new().await;
    let keys: Vec<String> = (1..=3).map(|seed| format!("* {}", signing_key(seed).public())).collect();
    world.trust = Trust::parse(&format!("{}\nthreshold * 2", keys.join("\n"))).unwrap();
    assert_eq!(world.refused().await, Code::ManSig);
    world.sign_manifest(&signing_key(9), 1).await;
    assert_eq!(world.refused().await, Code::ManSig);
    world.sign_manifest(&signing_key(3), 1).await;
    assert_eq!(world.get(NAME, None).await.unwrap().signed_by.len(), 2);
}

/// THREAT_MODEL (c) 11: a stolen release key names a manifest that no publisher signed.
#[tokio::test]
async fn a_ref_to_another_models_manifest_is_refused() {
    let mut world = World::new().await;
    let two = world.publish().await;
    let (digest, len, _) = world.versions[1];
    let lying = Ref { manifest_digest: digest, manifest_len: len, ..world.ref_to(Says::default(), 1) };
    world.put_ref(Says::default(), lying.encode(&[sign(&world.key, &lying)])).await;
    // The signature over version 2 does not cover it as version 1.
    assert_eq!(world.refused().await, Code::ManSig);
    let vid = Ref { vid: Vid([9; 16]), ..world.ref_to(Says::default(), two) };
    world.put_ref(Says::default(), vid.encode(&[sign(&world.key, &vid)])).await;
    assert_eq!(world.refused().await, Code::ManModel);
}

/// THREAT_MODEL (f) rows 31 and 32, for whole objects; `slots` has the rest.
#[tokio::test]
async fn slots_of_another_key_or_version_are_refused() {
    let mut world = World::new().await;
    let two = world.publish().await;
    let name = names::slots(World::model(), world.versions[0].2, 1);
    let other = names::slots(World::model(), world.versions[1].2, 1);
    world.store.put(&name, world.store.get(&other).unwrap());
    assert_eq!(world.refused().await, Code::SlotsModel);
    let header = ManifestHeader { dek_commit: world.header(two).dek_commit, ..world.header(1) };
    let mut slots = Slots::parse(&world.store.get(&other).unwrap()).unwrap();
    slots.vid = header.vid;
    world.store.put(&name, slots.encode().unwrap());
    assert_eq!(world.refused().await, Code::DekCommit);
}

/// THREAT_MODEL (f) row 34.
#[tokio::test]
async fn malformed_slots_are_refused_by_a_slots_code() {
    let world = World::new().await;
    let name = names::slots(World::model(), world.versions[0].2, 1);
    let good = world.store.get(&name).unwrap().to_vec();
    let resum = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good[..good.len() - 32].to_vec();
        edit(&mut bytes);
        let sum = sha256(&[&bytes]);
        bytes.extend(sum);
        bytes
    };
    for (bytes, want) in [
        (good[..good.len() - 1].to_vec(), Code::SlotsFormat),
        (good[..100].to_vec(), Code::SlotsFormat),
        (resum(&|bytes| bytes[10] = 17), Code::SlotsLimit),
        (resum(&|bytes| bytes[10] = 0), Code::SlotsLimit),
        (resum(&|bytes| bytes[128 + 6..128 + 8].fill(0xff)), Code::SlotsLimit),
        (resum(&|bytes| bytes[110] = 1), Code::SlotsFormat),
        (resum(&|bytes| bytes[128] = 3), Code::SlotParams),
        (vec![0; 70_000], Code::SlotsLimit),
    ] {
        world.store.put(&name, bytes);
        assert_eq!(world.refused().await, want);
    }
    let mut bent = good.clone();
    bent[140] ^= 1;
    world.store.put(&name, bent);
    assert_eq!(world.refused().await, Code::SlotsChecksum);
}

/// THREAT_MODEL (f) row 35.
#[tokio::test]
async fn an_older_slots_generation_is_refused_by_the_ref_and_by_memory() {
    let world = World::new().await;
    world.point(Says { min_slots_generation: 2, ..Says::default() }, 1).await;
    assert_eq!(world.refused().await, Code::SlotsRollback);

    let world = World::new().await;
    world.put_slots(&world.header(1), 5, &World::dek(1)).await;
    assert_eq!(world.get(NAME, None).await.unwrap().slots.generation, 5);
    let newest = names::slots(World::model(), world.versions[0].2, 5);
    let bytes = world.store.get(&newest).unwrap();
    world.store.delete(&newest).await.unwrap();
    assert_eq!(world.refused().await, Code::SlotsRollback);
    // An old object under a new number.
    let old = world.store.get(&names::slots(World::model(), world.versions[0].2, 1)).unwrap();
    world.store.put(&newest, old);
    assert_eq!(world.refused().await, Code::SlotsRollback);
    world.store.put(&newest, bytes);
    assert!(world.get(NAME, None).await.is_ok());
}

#[tokio::test]
async fn a_pinned_digest_consults_no_ref_and_needs_no_key_of_trust() {
    let mut world = World::new().await;
    let two = world.publish().await;
    let (one, ..) = world.versions[0];
    world.point(Says { ref_seq: 2, ..Says::default() }, two).await;
    world.bend(&latest(2), 90);
    assert_eq!(world.refused().await, Code::RefSig);
    let got = world.get(NAME, Some(one)).await.unwrap();
    assert_eq!((got.header.seq, got.reference, got.signed_by.len()), (1, None, 1));
    world.trust = Trust::default();
    assert_eq!(world.get(NAME, Some(one)).await.unwrap().signed_by, []);
    assert_eq!(world.get("other/name", Some(one)).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(world.get("acme/m@2", Some(one)).await.unwrap_err().code(), Code::Usage);
    world.bend(&names::manifest(World::model(), one), 3);
    assert_eq!(world.get(NAME, Some(one)).await.unwrap_err().code(), Code::ManDigest);
    // Who is trusted for the model must have signed a pinned version too.
    world.bend(&names::manifest(World::model(), one), 3);
    world.trust.add(Glob::new("acme/*").unwrap(), signing_key(5).public(), Roles::BOTH);
    assert_eq!(world.get(NAME, Some(one)).await.unwrap_err().code(), Code::ManSig);
}

#[tokio::test]
async fn nobody_trusted_is_refused_unless_first_use_was_asked_for() {
    let mut world = World::new().await;
    world.trust = Trust::default();
    assert_eq!(world.refused().await, Code::NoTrust);

    world.first_use = true;
    assert_eq!(world.refused().await, Code::NoTrust, "the store offers no key");
    let key = world.key.public();
    let offered = names::public_key(World::model(), key.key_id());
    world.store.put(&offered, signing_key(9).public().bytes().to_vec());
    assert_eq!(world.refused().await, Code::NoTrust, "the store offers another key under this id");
    world.store.put(&offered, key.bytes().to_vec());
    assert!(world.get(NAME, None).await.unwrap().notes.contains(&Note::FirstUse));
    assert!(!world.get(NAME, None).await.unwrap().notes.contains(&Note::FirstUse));

    // From now on another signer is refused, whatever key the store offers.
    let thief = signing_key(9);
    world.store.put(&names::public_key(World::model(), thief.public().key_id()), thief.public().bytes().to_vec());
    let reference = world.ref_to(Says { ref_seq: 2, ..Says::default() }, 1);
    let bytes = reference.encode(&[sign(&thief, &reference)]);
    world.put_ref(Says { ref_seq: 2, ..Says::default() }, bytes).await;
    assert_eq!(world.refused().await, Code::RefKey);
}

/// Whoever may write the store can offer a key, and sign a tag with it that withdraws everything.
#[tokio::test]
async fn on_first_use_a_tag_of_other_signers_withdraws_nothing() {
    let mut world = World::new().await;
    let two = world.publish().await;
    world.point(Says { ref_seq: 2, ..Says::default() }, two).await;
    world.trust = Trust::default();
    world.first_use = true;
    let thief = signing_key(9);
    for key in [world.key.public(), thief.public()] {
        world.store.put(&names::public_key(World::model(), key.key_id()), key.bytes().to_vec());
    }
    let says = Says { channel: "aaa", min_version_seq: u64::MAX, ..Says::default() };
    let reference = world.ref_to(says, two);
    world.put_ref(says, reference.encode(&[sign(&thief, &reference)])).await;
    let tofu = Tofu::new(world.state.path());
    let resolver = Resolver {
        source: &world.store,
        trust: &world.trust,
        first_use: Some(&tofu),
        floors: None,
        policy: FloorPolicy::default(),
        now: world.now,
    };
    let best: Vec<u64> = resolver.candidates(NAME, 9).await.unwrap().iter().map(|found| found.wanted.seq).collect();
    assert_eq!(best, [2, 1]);
    assert_eq!(world.get("acme/m@1", None).await.unwrap().header.seq, 1);
    assert_eq!(
        world.get("acme/m@aaa", None).await.unwrap_err().code(),
        Code::RefKey,
        "the first ones are believed now"
    );
}

#[tokio::test]
async fn a_floor_of_another_model_that_cannot_be_read_keeps_nobody_from_a_number() {
    let world = World::new().await;
    world.get(NAME, None).await.unwrap();
    std::fs::write(world.state.path().join("floor/0123.json"), b"{").unwrap();
    assert_eq!(world.get("acme/m@1", None).await.unwrap().header.seq, 1);
    let floors = FloorStore::new(world.state.path());
    let strict = floors.channels(&world.store.describe(), World::model()).unwrap_err();
    assert_eq!(strict.code(), Code::State, "who prunes must know all of them");
}

#[tokio::test]
async fn a_required_floor_refuses_a_first_mount() {
    let mut world = World::new().await;
    world.policy.require_floor = true;
    assert_eq!(world.refused().await, Code::NoFloor);
    world.policy.require_floor = false;
    world.get(NAME, None).await.unwrap();
    world.policy.require_floor = true;
    assert!(world.get(NAME, None).await.is_ok());
}

#[tokio::test]
async fn names_are_believed_only_when_they_hash_to_their_model() {
    let world = World::new().await;
    world.store.put(&names::model_name(World::model()), NAME.as_bytes().to_vec());
    world.store.put(&names::model_name(ModelId([7; 32])), b"acme/liar".to_vec());
    world.store.put(&names::model_name(ModelId([8; 32])), vec![b'x'; 5000]);
    let resolver = Resolver {
        source: &world.store,
        trust: &world.trust,
        first_use: None,
        floors: None,
        policy: FloorPolicy::default(),
        now: world.now,
    };
    assert_eq!(resolver.model_names().await.unwrap(), [NAME]);
    assert_eq!(resolver.newest_ref(NAME, "latest").await.unwrap().ref_seq, 1);
    assert_eq!(resolver.newest_ref(NAME, "beta").await.unwrap_err().code(), Code::NotFound);
}

/// Whoever opens many models does it from several threads.
#[test]
fn resolving_and_unlocking_may_move_between_threads() {
    fn send<T: Send>(_: T) {}
    fn shared<T: Send + Sync>() {}
    shared::<Keyring<'static>>();
    shared::<Resolved>();
    shared::<ModelKeys>();
    let (store, trust) = (MemoryStore::new(), Trust::default());
    let resolver = Resolver {
        source: &store,
        trust: &trust,
        first_use: None,
        floors: None,
        policy: FloorPolicy::default(),
        now: unix_now,
    };
    send(resolver.resolve(&"m".parse().unwrap(), None));
}
