//! Hypothesis: at whatever write a rotation dies, the model opens with the old key or with the new one, never with
//! neither; running it again completes it; what was replaced is refused by name.

#[path = "common/program.rs"]
mod program;
#[path = "common/terminal.rs"]
mod terminal;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use modelfs::catalog::{Records, Registration, SealedRecord};
use modelfs::crypto::{Dek, FileHasher, ModelKeys, SigningKey, Verify, open_chunk, open_manifest, scratch_len};
use modelfs::error::{Code, Error, Result};
use modelfs::format::*;
use modelfs::keys::{
    self, Cost, FloorPolicy, FloorStore, Glob, KeyMaterial, KeySource, Keyring, KvFloor, ModelSelector, Resolved,
    Resolver, Roles, Trust, VersionedKv, Wanted, unix_now,
};
use modelfs::mem::{LockedBuf, Secret};
use modelfs::rotate::{Edit, Edited, Keys, Level, Rekey, Rekeyed, Rewrap, Rotator};
use modelfs::seal::*;
use modelfs::store::fault::{Call, Death, Fault, Faulty, When};
use modelfs::store::memory::MemoryStore;
use modelfs::store::{ChunkSink, ChunkSource, fetch_chunk};
use program::{Program, run_ok};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use terminal::{Terminal, without_terminal};

const MODEL: &str = "acme/llama";

fn nobody(_: &str) -> Result<LockedBuf> {
    panic!("nobody is there to be asked")
}

fn signing() -> Arc<SigningKey> {
    Arc::new(SigningKey::from_seed(Secret::from_bytes(&mut [9; 32])))
}

type Files = BTreeMap<String, Vec<u8>>;

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed + 1;
    let step = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

/// Few exponents: worth coding.
fn bf16(len: usize) -> Vec<u8> {
    let mut bytes = noise(len, 5);
    bytes.iter_mut().skip(1).step_by(2).for_each(|high| *high = 0x3c | (*high & 0x83));
    bytes
}

/// A pack, an empty file, a file of three chunks that is coded.
fn files() -> Files {
    let bytes = [noise(700, 1), noise(90_000, 2), Vec::new(), bf16((2 << 20) + 7_000)];
    ["config.json", "deep/tokenizer.model", "empty", "w.bin"].map(str::to_owned).into_iter().zip(bytes).collect()
}

/// Keys, a folder to seal, state; one store a bench.
struct Bench {
    dir: tempfile::TempDir,
    trust: Trust,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        for (path, bytes) in files() {
            let path = dir.path().join("source").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let mut trust = Trust::default();
        trust.add(Glob::new("*").unwrap(), signing().public(), Roles::BOTH);
        Bench { dir, trust }
    }

    fn key(&self, number: u8) -> KeySource {
        use std::os::unix::fs::PermissionsExt;
        let path: PathBuf = self.dir.path().join(format!("key-{number}"));
        if !path.exists() {
            fs::write(&path, [number; 32]).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        KeySource::File(path)
    }

    fn ring(&self, numbers: &[u8]) -> Keys {
        let sources: Vec<KeySource> = numbers.iter().map(|number| self.key(*number)).collect();
        Arc::new(Keyring::new(&sources, &nobody))
    }

    fn floors(&self) -> FloorStore {
        FloorStore::new(&self.dir.path().join("state"))
    }

    /// A store with version 1, under `latest` and `prod`, for these keys and, when wanted, a transit key.
    fn sealed(&self, numbers: &[u8], transit: bool) -> MemoryStore {
        let store = MemoryStore::new();
        self.seal(&store, numbers, transit);
        store
    }

    fn seal(&self, store: &MemoryStore, numbers: &[u8], transit: bool) {
        self.seal_as(store, numbers, transit, &["prod"]);
    }

    /// Under `latest` and these tags.
    fn seal_as(&self, store: &MemoryStore, numbers: &[u8], transit: bool, tags: &[&str]) {
        let keys = Arc::new(SealKeys { ring: self.ring(numbers), transit });
        let mut options = SealOptions::new(keys, signing());
        options.chunk_log2 = 20;
        options.tags = tags.iter().map(|&tag| tag.to_owned()).collect();
        run(seal(&self.dir.path().join("source"), Arc::new(store.clone()), MODEL, options)).unwrap();
    }

    fn resolver<'a>(&'a self, store: &'a dyn ChunkSource, floors: Option<&'a FloorStore>) -> Resolver<'a> {
        Resolver {
            source: store,
            trust: &self.trust,
            first_use: None,
            floors,
            policy: FloorPolicy::default(),
            now: unix_now,
        }
    }

    fn chain(&self, store: &Arc<dyn ChunkSink>, floors: Option<FloorStore>) -> Chain {
        Chain {
            store: Arc::clone(store),
            model_id: ModelId::of_name(MODEL),
            model_name: Arc::from(MODEL),
            trusted: Arc::new(vec![signing().public()]),
            publishers: Arc::new(vec![signing().public()]),
            floors,
        }
    }

    fn rotate<T>(
        &self,
        store: Arc<dyn ChunkSink>,
        floors: Option<FloorStore>,
        work: impl AsyncFnOnce(&Rotator<'_>) -> Result<T>,
    ) -> Result<T> {
        let releaser =
            Releaser { chain: self.chain(&store, floors.clone()), signers: vec![signing()], now: unix_now() };
        let rotator = Rotator { resolver: self.resolver(&*store, floors.as_ref()), releaser };
        run(work(&rotator))
    }

    fn edit(&self, store: impl ChunkSink + 'static, edit: &Edit) -> Result<Edited> {
        self.rotate(Arc::new(store), None, async |rotator| rotator.edit(&Wanted::Newest, edit).await)
    }

    fn rekey(&self, store: impl ChunkSink + 'static, order: &Rekey) -> Result<Rekeyed> {
        self.rotate(Arc::new(store), None, async |rotator| rotator.rekey(&Wanted::Newest, order).await)
    }

    fn rekey_tag(&self, store: impl ChunkSink + 'static, tag: &str, order: &Rekey) -> Result<Rekeyed> {
        self.rotate(Arc::new(store), None, async |rotator| rotator.rekey(&Wanted::Tag(tag.into()), order).await)
    }

    fn order(&self, level: Level, keys: &[u8], to: &[u8]) -> Rekey {
        Rekey {
            level,
            keys: self.ring(keys),
            to: (!to.is_empty()).then(|| self.ring(to)),
            publishers: vec![signing()],
            withdraw_old: false,
            if_older_s: None,
            threads: 2,
            progress: ProgressFn::silent(),
        }
    }

    /// As a machine that has seen nothing.
    fn resolve(&self, store: &dyn ChunkSource, selector: &str) -> Result<Resolved> {
        let selector: ModelSelector = selector.parse().unwrap();
        run(self.resolver(store, None).resolve(&selector, None))
    }

    /// What a new reader gets whom the fake Vault answers, while it takes no version older than `least`; with no other key.
    fn read_by_transit(&self, store: &dyn ChunkSource, selector: &str, least: u32) -> Result<Files> {
        let resolved = self.resolve(store, selector)?;
        let slot = resolved.slots.slots.iter().find(|slot| slot.kind() == SlotKind::VaultTransit).expect("a slot");
        let context = Slot::transit_context(resolved.header.model_id, resolved.header.vid);
        let inside = FakeVault::decrypt(least, &context, std::str::from_utf8(&slot.body).unwrap())?;
        let (salt, body) = inside.split_first_chunk().expect("a salt");
        let slot = Slot { label: "inside".into(), params: SlotParams::Raw { salt: *salt }, body: body.to_vec() };
        let alone = Slots { slots: vec![slot], ..resolved.slots.clone() };
        let dek = self.ring(&[INSIDE]).unlock(&alone, &resolved.header)?;
        let (manifest, keys) = open_manifest(&resolved.manifest_bytes, dek)?;
        run(plain(store, &manifest, &keys))
    }

    /// What a new reader with these keys gets from `selector`.
    fn read(&self, store: &dyn ChunkSource, selector: &str, numbers: &[u8]) -> Result<(Manifest, Files)> {
        let resolved = self.resolve(store, selector)?;
        let (manifest, keys) = resolved.open(&self.ring(numbers))?;
        let files = run(plain(store, &manifest, &keys))?;
        Ok((manifest, files))
    }
}

struct SealKeys {
    ring: Keys,
    transit: bool,
}

impl SlotKeys for SealKeys {
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        let mut slots = self.ring.wrap_all(dek, target)?;
        if self.transit {
            let context = Slot::transit_context(target.model_id, target.vid);
            let kek = KeyMaterial::Key(Secret::from_bytes(&mut [INSIDE; 32]));
            let inside = keys::wrap(&kek, "inside", Cost::default(), target, dek)?;
            let SlotParams::Raw { salt } = inside.params else { panic!("a key file's slot is a raw one") };
            let body = FakeVault::encrypt(1, &context, &[&salt[..], &inside.body].concat()).into_bytes();
            slots.push(Slot { label: "vault".into(), params: SlotParams::VaultTransit, body });
        }
        Ok(slots)
    }

    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        self.ring.unlock(slots, header)
    }
}

/// The key that wraps what the fake transit engine then encrypts: data keys are seen by the library alone.
const INSIDE: u8 = 77;

/// A transit engine whose key has this version: what it encrypted opens with the same version, in the same context.
struct FakeVault {
    version: u32,
    asked: AtomicUsize,
}

impl FakeVault {
    fn at(version: u32) -> Arc<FakeVault> {
        Arc::new(FakeVault { version, asked: AtomicUsize::new(0) })
    }

    fn digest(what: &[u8], version: u32, context: &[u8; 32], more: &[u8]) -> Vec<u8> {
        Sha256::digest([what, &version.to_le_bytes(), context, more].concat()).to_vec()
    }

    fn masked(version: u32, context: &[u8; 32], bytes: &[u8]) -> Vec<u8> {
        let pad = (0..).flat_map(|block: u32| Self::digest(b"pad", version, context, &block.to_le_bytes()));
        bytes.iter().zip(pad).map(|(byte, pad)| byte ^ pad).collect()
    }

    fn encrypt(version: u32, context: &[u8; 32], plain: &[u8]) -> String {
        let tag = Self::digest(b"tag", version, context, plain);
        format!("vault:v{version}:{}", STANDARD.encode([tag, Self::masked(version, context, plain)].concat()))
    }

    /// As with this `min_decryption_version`.
    fn decrypt(least: u32, context: &[u8; 32], wrapped: &str) -> Result<Vec<u8>> {
        let denied = |why: &str| Error::new(Code::VaultDenied, why);
        let (version, body) = wrapped.strip_prefix("vault:v").and_then(|rest| rest.split_once(':')).expect("the form");
        let version = version.parse().expect("a number");
        if version < least {
            return Err(denied("of a version that is retired"));
        }
        let body = STANDARD.decode(body).map_err(|_| denied("not base64"))?;
        let (tag, masked) = body.split_at_checked(32).ok_or_else(|| denied("too short"))?;
        let plain = Self::masked(version, context, masked);
        if Self::digest(b"tag", version, context, &plain) != tag {
            return Err(denied("not encrypted by this version, or in another context"));
        }
        Ok(plain)
    }
}

impl Rewrap for FakeVault {
    fn rewrap(&self, context: &[u8; 32], wrapped: &str) -> Result<String> {
        assert_ne!(context, &[0; 32]);
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(Self::encrypt(self.version, context, &Self::decrypt(1, context, wrapped)?))
    }
}

/// A Vault's KV engine, which holds floors and the record of a catalog, and which nobody reaches from some write on.
#[derive(Debug, Default, Clone)]
struct Kv(Arc<Mutex<KvState>>);

#[derive(Debug, Default)]
struct KvState {
    entries: BTreeMap<String, (Map<String, Value>, u32)>,
    writes: u32,
    goes_at: Option<(u32, Death)>,
    gone: bool,
}

impl Kv {
    fn get(&self, path: &str) -> Result<Option<(Map<String, Value>, u32)>> {
        let kv = self.0.lock().unwrap();
        if kv.gone { Err(away()) } else { Ok(kv.entries.get(path).cloned()) }
    }

    fn put(&self, path: &str, data: &Map<String, Value>, version: u32) -> Result<u32> {
        let mut kv = self.0.lock().unwrap();
        let goes = kv.goes_at.filter(|(at, _)| *at == kv.writes).map(|(_, side)| side);
        kv.gone |= goes.is_some();
        kv.writes += 1;
        if goes == Some(Death::Before) || (kv.gone && goes.is_none()) {
            return Err(away());
        }
        let seen = kv.entries.get(path).map_or(0, |(_, version)| *version);
        if seen != version {
            return Err(Error::new(Code::Exists, format!("version {seen} is there, not {version}")));
        }
        kv.entries.insert(path.to_owned(), (data.clone(), version + 1));
        if goes.is_some() { Err(away()) } else { Ok(version + 1) }
    }

    fn writes(&self) -> u32 {
        self.0.lock().unwrap().writes
    }

    fn go_at(&self, write: u32, side: Death) {
        let mut kv = self.0.lock().unwrap();
        (kv.writes, kv.goes_at) = (0, Some((write, side)));
    }

    fn come_back(&self) {
        let mut kv = self.0.lock().unwrap();
        (kv.goes_at, kv.gone) = (None, false);
    }
}

fn away() -> Error {
    Error::new(Code::VaultUnreachable, "scripted: nobody answers")
}

impl VersionedKv for Kv {
    fn read(&self, path: &str) -> Result<Option<(Map<String, Value>, u32)>> {
        self.get(path)
    }
    fn write(&self, path: &str, data: &Map<String, Value>, version: u32) -> Result<()> {
        self.put(path, data, version).map(drop)
    }
    fn describe(&self) -> String {
        "scripted".into()
    }
}

impl Records for Kv {
    fn list(&self, _: &str, _: &str) -> Result<Vec<String>> {
        panic!("nobody lists")
    }
    fn read(&self, _: &str, path: &str) -> Result<Option<(Map<String, Value>, u32)>> {
        self.get(path)
    }
    fn write(&self, _: &str, path: &str, data: &Map<String, Value>, cas: u32) -> Result<u32> {
        self.put(path, data, cas)
    }
    fn unwrap_transit(&self, _: &KeySource, _: &[u8; 32], _: &str) -> Result<Secret<32>> {
        panic!("the record holds a raw key")
    }
}

/// What one operator has beside the store: a folder of state, and a Vault with floors and a record.
struct Outside {
    state: tempfile::TempDir,
    kv: Kv,
}

impl Outside {
    fn new() -> Outside {
        Outside { state: tempfile::tempdir().unwrap(), kv: Kv::default() }
    }

    fn floors(&self) -> FloorStore {
        FloorStore::new(self.state.path()).pinned(Arc::new(KvFloor::new(self.kv.clone(), "floor")), false)
    }

    /// As `key rotate --register --register-raw-key` writes it.
    fn record(&self, version: &Resolved, key: u8) -> Result<()> {
        let (at, store) = ("vault-kv://secret/record".parse().unwrap(), "s3://models".parse().unwrap());
        let registration = Registration::prepare(Arc::new(self.kv.clone()), at, &store, MODEL)?;
        let encryption_key = &*STANDARD.encode([key; 32]);
        registration.write(SealedRecord { manifest: version.digest, size_bytes: 1, encryption_key }).map(drop)
    }

    /// The key that the record holds, and the version of the record.
    fn recorded(&self) -> (u8, u32) {
        let (record, version) = self.kv.0.lock().unwrap().entries["record"].clone();
        (STANDARD.decode(record["encryption_key"].as_str().unwrap()).unwrap()[0], version)
    }
}

async fn plain(store: &dyn ChunkSource, manifest: &Manifest, keys: &ModelKeys) -> Result<Files> {
    let mut objects = Vec::new();
    for (number, entry) in manifest.objects().iter().enumerate() {
        let mut bytes = vec![0; entry.layout.plain_len() as usize];
        let mut rest = &mut bytes[..];
        for index in entry.layout.chunks() {
            let (slot, later) = rest.split_at_mut(entry.layout.chunk_plain_len(index) as usize);
            let chunk = fetch_chunk(store, manifest, number as u32, index).await?;
            let mut scratch = vec![0; scratch_len(entry)];
            open_chunk(keys, manifest, number as u32, &chunk, Verify::Strict, slot, &mut scratch)?;
            rest = later;
        }
        objects.push(bytes);
    }
    let mut files = Files::new();
    for file in manifest.files() {
        let mut bytes = Vec::new();
        for extent in manifest.extents(file) {
            let start = extent.object_offset as usize;
            bytes.extend_from_slice(&objects[extent.object as usize][start..start + extent.len as usize]);
        }
        let mut hasher = FileHasher::new();
        hasher.update(&bytes);
        assert_eq!(hasher.finish(), file.sha256);
        files.insert(manifest.path(file).to_owned(), bytes);
    }
    Ok(files)
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work)
}

fn named(store: &MemoryStore, part: &str) -> BTreeSet<String> {
    store.names().into_iter().filter(|name| name.contains(part)).collect()
}

/// What is done at each level, and the keys that open before and after. Before, key 1 always does.
enum Level0 {
    Edit {
        before: &'static [u8],
        edit: Edit,
        after: &'static [u8],
        shut: &'static [u8],
    },
    /// Key 2 for key 1, which a record of a catalog holds.
    AroundRecord {
        prepare: Edit,
        replace: Edit,
    },
    Rekey {
        order: Rekey,
        after: &'static [u8],
    },
    /// Every tag, and then what is older than what they name is withdrawn.
    All {
        order: Rekey,
        after: &'static [u8],
    },
}

fn levels(bench: &Bench) -> Vec<(&'static str, Level0)> {
    let ring = |numbers: &[u8]| bench.ring(numbers);
    vec![
        (
            "add",
            Level0::Edit {
                before: &[1],
                edit: Edit::Add { keys: ring(&[1]), new: ring(&[2]), label: None },
                after: &[1, 2],
                shut: &[],
            },
        ),
        (
            "remove",
            Level0::Edit {
                before: &[1, 2],
                edit: Edit::Remove { keys: ring(&[1]), label: "key-file-2".into() },
                after: &[1],
                shut: &[2],
            },
        ),
        (
            "replace",
            Level0::Edit {
                before: &[1, 3],
                edit: Edit::Replace { keys: ring(&[1]), new: ring(&[2]), label: None },
                after: &[2, 3],
                shut: &[1],
            },
        ),
        (
            "replace by two",
            Level0::Edit {
                before: &[1],
                edit: Edit::Replace { keys: ring(&[1]), new: ring(&[2, 3]), label: None },
                after: &[2, 3],
                shut: &[1],
            },
        ),
        (
            "replace, with a record",
            Level0::AroundRecord {
                prepare: Edit::Prepare { keys: ring(&[1]), new: ring(&[2]), label: None },
                replace: Edit::Replace { keys: ring(&[1]), new: ring(&[2]), label: None },
            },
        ),
        (
            "rewrap",
            Level0::Edit {
                before: &[1],
                edit: Edit::Rewrap { vault: FakeVault::at(2), label: None },
                after: &[1],
                shut: &[],
            },
        ),
        ("new-key", Level0::Rekey { order: bench.order(Level::NewKey, &[1], &[2]), after: &[2] }),
        ("reencrypt", Level0::Rekey { order: bench.order(Level::Reencrypt, &[1], &[2]), after: &[2] }),
        (
            "reencrypt, withdraw",
            Level0::Rekey {
                order: Rekey { withdraw_old: true, ..bench.order(Level::Reencrypt, &[1], &[2]) },
                after: &[2],
            },
        ),
        ("all, withdraw", Level0::All { order: bench.order(Level::NewKey, &[1], &[2]), after: &[2] }),
    ]
}

fn copy_of(store: &MemoryStore) -> MemoryStore {
    let copy = MemoryStore::new();
    for name in store.names() {
        copy.put(&name, store.get(&name).unwrap());
    }
    copy
}

const TAGS: [&str; 2] = [LATEST, "prod"];

/// What there was before: what each tag named, opened.
type Before = Vec<(Resolved, Manifest)>;

impl Level0 {
    fn rewraps(&self) -> bool {
        matches!(self, Level0::Edit { edit: Edit::Rewrap { .. }, .. })
    }

    fn prepare(&self, bench: &Bench) -> (MemoryStore, Before) {
        let store = MemoryStore::new();
        match self {
            Level0::Edit { before, .. } => bench.seal(&store, before, self.rewraps()),
            Level0::AroundRecord { .. } | Level0::Rekey { .. } => bench.seal(&store, &[1], false),
            Level0::All { .. } => {
                bench.seal(&store, &[1], false);
                bench.seal_as(&store, &[1], false, &[]);
            }
        }
        let named = TAGS.map(|tag| {
            let selector = format!("{MODEL}@{tag}");
            (bench.resolve(&store, &selector).unwrap(), bench.read(&store, &selector, &[1]).unwrap().0)
        });
        (store, named.into())
    }

    /// What an operator has beside a store that was prepared.
    fn outside(&self, before: &Before) -> Outside {
        let outside = Outside::new();
        if let Level0::AroundRecord { .. } = self {
            outside.record(&before[0].0, 1).unwrap();
        }
        outside
    }

    /// The refs that it wrote.
    fn run(
        &self,
        bench: &Bench,
        store: impl ChunkSink + 'static,
        outside: Option<&Outside>,
    ) -> Result<Vec<(String, u64)>> {
        let store: Arc<dyn ChunkSink> = Arc::new(store);
        let floors = || outside.map(Outside::floors);
        let edit = |edit: &Edit| {
            let edited = bench
                .rotate(Arc::clone(&store), floors(), async |rotator| rotator.edit(&Wanted::Newest, edit).await)?;
            Ok::<_, Error>(edited.refs)
        };
        let rekey = |tag: &str, order: &Rekey| {
            let wanted = Wanted::Tag(tag.into());
            bench.rotate(Arc::clone(&store), floors(), async |rotator| rotator.rekey(&wanted, order).await)
        };
        match self {
            Level0::Edit { edit: order, .. } => edit(order),
            Level0::AroundRecord { prepare, replace } => {
                let mut refs = edit(prepare)?;
                if let Some(outside) = outside {
                    outside.record(&bench.resolve(&*store, MODEL)?, 2)?;
                }
                refs.extend(edit(replace)?);
                Ok(refs)
            }
            Level0::Rekey { order, .. } => rekey(LATEST, order).map(|rekeyed| rekeyed.refs),
            Level0::All { order, .. } => {
                let mut refs = Vec::new();
                let mut old = Vec::new();
                for tag in TAGS {
                    let rekeyed = rekey(tag, order)?;
                    if rekeyed.from_version != rekeyed.version {
                        old.push(rekeyed.from_version);
                    }
                    refs.extend(rekeyed.refs);
                }
                let withdraw = async |rotator: &Rotator<'_>| rotator.withdraw_below_tags(&old).await;
                let withdrawn = bench.rotate(Arc::clone(&store), floors(), withdraw)?;
                refs.extend(withdrawn.refs);
                withdrawn.unfinished.map_or(Ok(refs), Err)
            }
        }
    }

    /// What must hold at every moment: each tag opens with the old key or the new one, a record with the one that it holds,
    /// and Vault's slot whatever else there is.
    fn assert_opens(&self, bench: &Bench, store: &MemoryStore, outside: &Outside, told: &str) {
        for tag in TAGS {
            let selector = format!("{MODEL}@{tag}");
            // Old and new keys are tried apart: one of them must do.
            let with: Vec<Result<Files>> =
                [1, 2].iter().map(|key| bench.read(store, &selector, &[*key]).map(|read| read.1)).collect();
            assert!(with.iter().flatten().all(|read| *read == files()), "{told}");
            assert!(with.iter().any(Result::is_ok), "{told}: {with:?}");
            if self.rewraps() {
                assert_eq!(bench.read_by_transit(store, &selector, 1).unwrap(), files(), "{told}");
            }
        }
        if let Level0::AroundRecord { .. } = self {
            let (key, _) = outside.recorded();
            let read = bench.read(store, MODEL, &[key]);
            assert_eq!(read.unwrap_or_else(|shut| panic!("{told}: key {key} of the record: {shut:?}")).1, files());
        }
    }

    /// Everything is as it was wanted, whatever happened on the way.
    fn assert_done(&self, bench: &Bench, store: &MemoryStore, outside: &Outside, before: &Before, told: &str) {
        let tags = TAGS.map(|tag| bench.resolve(store, &format!("{MODEL}@{tag}")).unwrap());
        match self {
            Level0::Edit { .. } | Level0::AroundRecord { .. } => {
                let (after, shut, least): (&[u8], &[u8], _) = match self {
                    Level0::Edit { after, shut, .. } => (after, shut, 2),
                    _ => (&[2], &[1], 3),
                };
                for number in after {
                    assert_eq!(bench.read(store, MODEL, &[*number]).unwrap().1, files(), "{told}");
                }
                for number in shut {
                    assert_eq!(bench.read(store, MODEL, &[*number]).unwrap_err().code(), Code::NoKey, "{told}");
                }
                if self.rewraps() {
                    assert_eq!(bench.read_by_transit(store, MODEL, 2).unwrap(), files(), "{told}");
                }
                let generation = tags[0].slots.generation;
                assert_eq!(generation, least, "{told}");
                for tag in &tags {
                    assert_eq!(tag.reference.unwrap().min_slots_generation, generation, "{told}");
                }
                assert_eq!(named(store, "/k/").len(), 1, "{told}: {:?}", named(store, "/k/"));
                assert_eq!(tags[0].header.seq, 1);
                if let Level0::AroundRecord { .. } = self {
                    assert_eq!(outside.recorded(), (2, 2), "{told}: it is written once");
                    let labels: Vec<&str> = tags[0].slots.slots.iter().map(|slot| &*slot.label).collect();
                    assert_eq!(labels, ["key-file"], "{told}: the label goes on");
                }
            }
            Level0::Rekey { order, after } | Level0::All { order, after } => {
                for (tag, (old, old_manifest)) in tags.iter().zip(before) {
                    let selector = format!("{MODEL}@{}", tag.header.seq);
                    let (manifest, read) = bench.read(store, &selector, after).unwrap();
                    assert_eq!(read, files(), "{told}");
                    assert_eq!(bench.read(store, &selector, &[1]).unwrap_err().code(), Code::NoKey, "{told}");
                    let oids = |manifest: &Manifest| {
                        manifest.objects().iter().map(|object| object.oid).collect::<BTreeSet<_>>()
                    };
                    match order.level {
                        Level::NewKey => assert_eq!(oids(&manifest), oids(old_manifest), "{told}"),
                        Level::Reencrypt => assert!(oids(&manifest).is_disjoint(&oids(old_manifest)), "{told}"),
                    }
                    assert_ne!(manifest.header().dek_commit, old.header.dek_commit);
                    // One round of it, whatever died: no second key for what was already under a new one.
                    assert_eq!(manifest.header().previous, Some(old.digest), "{told}");
                    let old = bench.read(store, &format!("{MODEL}@{}", old.header.seq), &[1]);
                    if order.withdraw_old || matches!(self, Level0::All { .. }) {
                        assert_eq!(old.unwrap_err().code(), Code::BelowFloor, "{told}");
                    } else {
                        assert_eq!(old.unwrap().1, files(), "{told}");
                    }
                }
            }
        }
        if !matches!(self, Level0::All { .. }) {
            assert_eq!(tags[0].digest, tags[1].digest, "{told}");
        }
        assert!(named(store, "/l/").is_empty() || told.contains("after a death"), "{told}");
        self.assert_floors(&outside.floors(), store, &tags, told);
    }

    fn assert_floors(&self, floors: &FloorStore, store: &MemoryStore, tags: &[Resolved], told: &str) {
        for (tag, resolved) in TAGS.iter().zip(tags) {
            let model = ModelId::of_name(MODEL);
            let newest = resolved.reference.unwrap();
            let floor =
                floors.load(&store.describe(), model, tag).unwrap().unwrap_or_else(|| panic!("{told}: no floor"));
            assert_eq!(floor.max_ref_seq, newest.ref_seq, "{told}, {tag}");
            assert_eq!(floor.min_version_seq, newest.min_version_seq, "{told}, {tag}");
            let slots = floor.slots_generations.get(&resolved.header.vid.to_string()).copied().unwrap_or(1);
            assert!(slots >= newest.min_slots_generation, "{told}, {tag}: {slots}");
            if floors.has_pin() {
                let pinned = floors.load_pinned(&store.describe(), model, tag).unwrap().unwrap();
                assert_eq!(pinned.max_ref_seq, newest.ref_seq, "{told}, {tag}: outside this machine");
            }
        }
    }

    /// After something went wrong on the way: whatever is there opens, the same order completes it, and once more changes
    /// nothing.
    fn assert_completes(&self, bench: &Bench, store: &MemoryStore, outside: &Outside, before: &Before, told: &str) {
        self.assert_opens(bench, store, outside, told);
        let removes = matches!(self, Level0::Edit { edit: Edit::Remove { .. }, .. });
        match self.run(bench, store.clone(), Some(outside)) {
            Ok(_) => {}
            // The slot is gone and nothing is left to do: that is said, since a label may be mistyped.
            Err(gone) if removes && gone.code() == Code::NotFound => {}
            Err(other) => panic!("{told}: {other:?}"),
        }
        self.assert_done(bench, store, outside, before, told);
        let (names, record) = (store.names(), outside.kv.get("record").unwrap());
        match self {
            Level0::Edit { edit, .. } => match bench.edit(store.clone(), edit) {
                Ok(third) => assert!(!third.written && !third.finished, "{told}: {third:?}"),
                Err(gone) => assert_eq!(gone.code(), Code::NotFound, "{told}"),
            },
            Level0::Rekey { order, .. } => {
                let third = bench.rekey(store.clone(), order).unwrap();
                assert!(third.finished && third.refs.is_empty(), "{told}: {third:?}");
            }
            Level0::AroundRecord { .. } | Level0::All { .. } => {
                let refs = self.run(bench, store.clone(), Some(outside)).unwrap();
                assert!(refs.is_empty(), "{told}: {refs:?}");
            }
        }
        assert_eq!(store.names(), names, "{told}");
        assert_eq!(outside.kv.get("record").unwrap(), record, "{told}");
    }
}

#[test]
fn a_rotation_that_dies_at_any_write_leaves_a_model_that_opens_and_a_rerun_completes_it() {
    let bench = Bench::new();
    for (name, level) in levels(&bench) {
        let (prepared, before) = level.prepare(&bench);
        let writes = {
            let (store, outside) = (copy_of(&prepared), level.outside(&before));
            let faulty = Faulty::new(store.clone());
            level.run(&bench, faulty.clone(), Some(&outside)).unwrap();
            level.assert_done(&bench, &store, &outside, &before, name);
            faulty.writes()
        };
        eprintln!("{name}: {writes} writes to die at");
        assert!(writes >= 7, "{name}: {writes} writes are too few to prove anything");
        for write in 0..writes {
            for side in [Death::Before, Death::After] {
                let told = format!("{name}, after a death at write {write} of {writes}, {side:?}");
                let (store, outside) = (copy_of(&prepared), level.outside(&before));
                let faulty = Faulty::new(store.clone());
                faulty.die_at_write(write, side);
                drop(level.run(&bench, faulty, Some(&outside)));
                level.assert_completes(&bench, &store, &outside, &before, &told);
            }
        }
    }
}

/// Floors and records are written there: nobody who goes by them is left without a key, and a floor that was not raised is
/// raised by the next run.
#[test]
fn a_rotation_during_which_vault_goes_away_at_any_write_leaves_a_model_that_opens_and_a_rerun_completes_it() {
    let bench = Bench::new();
    // Encrypting the objects anew writes nothing to Vault.
    for (name, level) in levels(&bench).into_iter().filter(|(name, _)| !name.starts_with("reencrypt")) {
        let (prepared, before) = level.prepare(&bench);
        let outside = level.outside(&before);
        outside.kv.go_at(u32::MAX, Death::Before);
        level.run(&bench, copy_of(&prepared), Some(&outside)).unwrap();
        let writes = outside.kv.writes();
        eprintln!("{name}: {writes} writes to Vault");
        assert!(writes >= 2, "{name}: a floor for each tag");
        for write in 0..writes {
            for side in [Death::Before, Death::After] {
                let told = format!("{name}, without Vault from write {write} of {writes}, {side:?}");
                let (store, outside) = (copy_of(&prepared), level.outside(&before));
                outside.kv.go_at(write, side);
                drop(level.run(&bench, store.clone(), Some(&outside)));
                outside.kv.come_back();
                level.assert_completes(&bench, &store, &outside, &before, &told);
            }
        }
    }
}

/// Whoever wrote the refs died before it raised the floor.
#[test]
fn a_rotation_that_is_complete_still_raises_the_floor() {
    let bench = Bench::new();
    for (name, level) in levels(&bench) {
        let (store, before) = level.prepare(&bench);
        let outside = level.outside(&before);
        level.run(&bench, store.clone(), None).unwrap();
        if let Level0::AroundRecord { .. } = level {
            outside.record(&bench.resolve(&store, MODEL).unwrap(), 2).unwrap();
        }
        match level.run(&bench, store.clone(), Some(&outside)) {
            Ok(refs) => assert!(refs.is_empty(), "{name}: {refs:?}"),
            Err(gone) => assert!(name == "remove" && gone.code() == Code::NotFound, "{name}: {gone:?}"),
        }
        let tags = TAGS.map(|tag| bench.resolve(&store, &format!("{MODEL}@{tag}")).unwrap());
        level.assert_floors(&outside.floors(), &store, &tags, name);
    }
}

/// The detector of what opens with Vault's slot alone.
#[test]
fn a_slot_that_vault_rewrapped_to_something_else_opens_nothing_without_the_other_key() {
    struct Liar;
    impl Rewrap for Liar {
        fn rewrap(&self, context: &[u8; 32], _: &str) -> Result<String> {
            Ok(FakeVault::encrypt(2, context, &[1; 112]))
        }
    }
    let bench = Bench::new();
    let store = bench.sealed(&[1], true);
    assert_eq!(bench.read_by_transit(&store, MODEL, 1).unwrap(), files());
    assert_eq!(bench.read_by_transit(&store, MODEL, 2).unwrap_err().code(), Code::VaultDenied, "it is of version 1");
    bench.edit(store.clone(), &Edit::Rewrap { vault: Arc::new(Liar), label: None }).unwrap();
    assert_eq!(bench.read(&store, MODEL, &[1]).unwrap().1, files());
    assert_eq!(bench.read_by_transit(&store, MODEL, 1).unwrap_err().code(), Code::NoKey);
}

/// The slot that waits for the old one to go has a name of its own, and gets the label once that is free.
#[test]
fn a_replacement_in_two_halves_ends_with_the_labels_of_one_at_once() {
    let bench = Bench::new();
    let labels = |store: &MemoryStore| -> Vec<String> {
        let slots = bench.resolve(store, MODEL).unwrap().slots.slots;
        slots.into_iter().map(|slot| slot.label).collect()
    };
    let halves = |to: &[u8], label: Option<&str>| {
        let (keys, new, label) = (bench.ring(&[1]), bench.ring(to), label.map(str::to_owned));
        let prepare = Edit::Prepare { keys: Arc::clone(&keys), new: Arc::clone(&new), label: label.clone() };
        (prepare, Edit::Replace { keys, new, label })
    };
    for (to, label) in [(&[2][..], None), (&[2], Some("key-file")), (&[2], Some("own")), (&[2, 4], None)] {
        let at_once = bench.sealed(&[1, 3], false);
        let (prepare, replace) = halves(to, label);
        let wanted = bench.edit(at_once.clone(), &replace).unwrap();
        let store = bench.sealed(&[1, 3], false);
        let prepared = bench.edit(store.clone(), &prepare).unwrap();
        assert_eq!((prepared.added.len(), &prepared.removed[..]), (to.len(), &[] as &[String]));
        for key in [&[1, 3], to].concat() {
            assert_eq!(bench.read(&store, MODEL, &[key]).unwrap().1, files(), "key {key} of {to:?}");
        }
        let again = bench.edit(store.clone(), &prepare).unwrap();
        assert!(!again.written && !again.finished, "{again:?}");
        let done = prepared.followed_by(bench.edit(store.clone(), &replace).unwrap());
        assert_eq!(labels(&store), labels(&at_once), "{to:?}, {label:?}");
        assert_eq!((&done.added, &done.removed), (&wanted.added, &vec!["key-file".to_owned()]), "{to:?}, {label:?}");
        assert_eq!((done.written, done.finished), (true, false));
        assert_eq!(bench.read(&store, MODEL, &[1]).unwrap_err().code(), Code::NoKey);
        for key in [&[3], to].concat() {
            assert_eq!(bench.read(&store, MODEL, &[key]).unwrap().1, files(), "key {key} of {to:?}");
        }
        assert!(!bench.edit(store.clone(), &replace).unwrap().written && !bench.edit(store, &prepare).unwrap().written);
    }
    // A label that another slot has is refused before anything is written.
    let store = bench.sealed(&[1, 3], false);
    let names = store.names();
    let taken = bench.edit(store.clone(), &halves(&[2], Some("key-file-2")).0).unwrap_err();
    assert!(taken.code() == Code::Usage && store.names() == names, "{taken:?}");
    // What an order to another key left behind is told by name; whose it is, only the operator knows.
    bench.edit(store.clone(), &halves(&[4], None).0).unwrap();
    let (prepare, replace) = halves(&[2], None);
    bench.edit(store.clone(), &prepare).unwrap();
    let told = bench.edit(store.clone(), &replace).unwrap().warnings;
    assert!(told.iter().any(|told| told.contains("\"key-file-next\" was made by an earlier rotation")), "{told:?}");
    assert_eq!(labels(&store), ["key-file", "key-file-next", "key-file-2"]);
}

/// The detector of the first test: a model without slots opens with no key.
#[test]
fn a_model_whose_slots_are_gone_opens_with_neither_key() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    for name in named(&store, "/k/") {
        run(store.delete(&name)).unwrap();
    }
    for key in [1, 2] {
        assert_eq!(bench.read(&store, MODEL, &[key]).unwrap_err().code(), Code::NotFound);
    }
}

#[test]
fn a_reader_who_opens_all_the_while_sees_no_gap() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let (done, opened) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let both = bench.ring(&[1, 2]);
            while !done.load(Ordering::Acquire) {
                bench.resolve(&store, MODEL).and_then(|resolved| resolved.open(&both)).unwrap();
                opened.fetch_add(1, Ordering::Release);
            }
        });
        let (one, two) = (bench.ring(&[1]), bench.ring(&[2]));
        for round in 0..30 {
            let (keys, new) = if round % 2 == 0 { (&one, &two) } else { (&two, &one) };
            let edit = Edit::Replace { keys: Arc::clone(keys), new: Arc::clone(new), label: None };
            assert!(bench.edit(store.clone(), &edit).unwrap().written);
            // At least one look between two rotations.
            let seen = opened.load(Ordering::Acquire);
            while opened.load(Ordering::Acquire) == seen && !reader.is_finished() {
                std::thread::yield_now();
            }
        }
        done.store(true, Ordering::Release);
    });
    assert!(opened.into_inner() >= 30);
}

/// THREAT_MODEL (f) row 35: whoever may write to the store brings back the slots of somebody who left.
#[test]
fn slots_of_a_generation_that_was_replaced_are_slots_rollback() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let model = ModelId::of_name(MODEL);
    let vid = bench.resolve(&store, MODEL).unwrap().header.vid;
    let old = store.get(&names::slots(model, vid, 1)).unwrap();
    let edit = Edit::Replace { keys: bench.ring(&[1]), new: bench.ring(&[2]), label: None };
    let edited = bench.edit(store.clone(), &edit).unwrap();
    assert_eq!((edited.generation, edited.refs.len()), (2, 2));
    store.put(&names::slots(model, vid, 1), old);
    assert_eq!(bench.read(&store, MODEL, &[1]).unwrap_err().code(), Code::NoKey, "the newest generation counts");
    run(store.delete(&names::slots(model, vid, 2))).unwrap();
    for selector in [MODEL, "acme/llama@prod", "acme/llama@1"] {
        assert_eq!(bench.read(&store, selector, &[1]).unwrap_err().code(), Code::SlotsRollback, "{selector}");
    }
}

/// A version that no tag names any more has no ref to ask for its slots: who rotated it remembers.
#[test]
fn the_generation_of_a_version_that_no_tag_names_is_remembered_by_its_publisher() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let model = ModelId::of_name(MODEL);
    let vid = bench.resolve(&store, MODEL).unwrap().header.vid;
    let old = store.get(&names::slots(model, vid, 1)).unwrap();
    bench.seal(&store, &[1], false);
    let edit = Edit::Replace { keys: bench.ring(&[1]), new: bench.ring(&[2]), label: None };
    let floors = bench.floors();
    let edited = bench
        .rotate(Arc::new(store.clone()), Some(floors.clone()), async |rotator| {
            rotator.edit(&Wanted::Version(1), &edit).await
        })
        .unwrap();
    assert_eq!((edited.version, edited.generation, edited.refs.len()), (1, 2, 0));
    assert!(edited.warnings.is_empty(), "{:?}", edited.warnings);
    assert_eq!(bench.read(&store, "acme/llama@1", &[2]).unwrap().1, files());
    run(store.delete(&names::slots(model, vid, 2))).unwrap();
    store.put(&names::slots(model, vid, 1), old);
    let selector: ModelSelector = "acme/llama@1".parse().unwrap();
    let refused = run(bench.resolver(&store, Some(&floors)).resolve(&selector, None)).unwrap_err();
    assert_eq!(refused.code(), Code::SlotsRollback);
}

#[test]
fn after_a_new_key_the_old_one_is_dek_commit_and_no_object_changed() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let objects = |store: &MemoryStore| {
        named(store, "/d/").into_iter().map(|name| (store.get(&name).unwrap(), name)).collect::<Vec<_>>()
    };
    let (before, old) = (objects(&store), bench.resolve(&store, MODEL).unwrap());
    let dek = || old.unlock(&bench.ring(&[1])).unwrap();
    let rekeyed = bench.rekey(store.clone(), &bench.order(Level::NewKey, &[1], &[])).unwrap();
    assert_eq!((rekeyed.from_version, rekeyed.version), (1, 2));
    assert_eq!(rekeyed.refs, [(LATEST.to_owned(), 2), ("prod".to_owned(), 2)]);
    assert_eq!((&rekeyed.slots[..], rekeyed.left_out.len()), (&["key-file".to_owned()][..], 0));
    assert!(objects(&store) == before, "an object was touched");
    let new = bench.resolve(&store, MODEL).unwrap();
    assert_eq!(open_manifest(&new.manifest_bytes, dek()).unwrap_err().code(), Code::DekCommit);
    assert!(open_manifest(&old.manifest_bytes, dek()).is_ok());
    // Slots of the old version under the name of the new one.
    let forged = Slots { generation: 2, vid: new.header.vid, ..old.slots.clone() };
    store.put(&names::slots(new.model_id, new.header.vid, 2), forged.encode().unwrap());
    assert_eq!(bench.read(&store, MODEL, &[1]).unwrap_err().code(), Code::DekCommit);
}

#[test]
fn a_withdrawn_old_version_is_below_the_floor_of_whoever_sees_the_new_one() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let order = Rekey { withdraw_old: true, ..bench.order(Level::Reencrypt, &[1], &[2]) };
    bench.rekey(store.clone(), &order).unwrap();
    assert_eq!(bench.read(&store, "acme/llama@1", &[1]).unwrap_err().code(), Code::BelowFloor);
    assert_eq!(bench.read(&store, MODEL, &[2]).unwrap().1, files());
}

/// The floor counts for all tags: at the new version it would take the other tag's version from its readers.
#[test]
fn the_old_version_is_not_withdrawn_while_another_tag_names_one_that_would_go_with_it() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    bench.seal_as(&store, &[1], false, &[]);
    let order = Rekey { withdraw_old: true, ..bench.order(Level::Reencrypt, &[1], &[2]) };
    let before = store.names();
    for (tag, other) in [("prod", "latest (version 2)"), (LATEST, "prod (version 1)")] {
        let refused = bench.rekey_tag(store.clone(), tag, &order).unwrap_err();
        assert!(refused.code() == Code::Usage && refused.message().contains(other), "{refused:?}");
    }
    assert_eq!(store.names(), before);

    // Without it both go on, and what no tag names any more can be withdrawn then.
    let order = bench.order(Level::Reencrypt, &[1], &[2]);
    for (tag, version) in [("prod", 3), (LATEST, 4)] {
        assert_eq!(bench.rekey_tag(store.clone(), tag, &order).unwrap().version, version);
    }
    let withdraw = |replaced: &'static [u64]| {
        let store = Arc::new(store.clone());
        bench.rotate(store, None, async move |rotator| rotator.withdraw_below_tags(replaced).await)
    };
    let before = store.names();
    let stays = withdraw(&[3]).unwrap_err();
    assert!(stays.code() == Code::Usage && stays.message().contains("version 3"), "{stays:?}");
    assert_eq!(store.names(), before, "it is looked at before anything is written");
    let withdrawn = withdraw(&[1, 2]).unwrap();
    assert_eq!((withdrawn.below, withdrawn.refs), (3, vec![(LATEST.to_owned(), 4), ("prod".to_owned(), 3)]));
    assert!(withdraw(&[]).unwrap().refs.is_empty(), "it is done");
    for old in ["acme/llama@1", "acme/llama@2"] {
        assert_eq!(bench.read(&store, old, &[1]).unwrap_err().code(), Code::BelowFloor, "{old}");
    }
    for new in [MODEL, "acme/llama@prod", "acme/llama@3", "acme/llama@4"] {
        assert_eq!(bench.read(&store, new, &[2]).unwrap().1, files(), "{new}");
    }
}

/// Readers of the tags that were moved see it: an error would say that nothing happened.
#[test]
fn a_withdrawal_that_reached_some_tags_is_told_with_them_and_one_that_reached_none_is_an_error() {
    let bench = Bench::new();
    let sealed = || {
        let store = bench.sealed(&[1], false);
        bench.seal(&store, &[1], false);
        store
    };
    let withdraw = |store: Faulty<MemoryStore>| {
        bench.rotate(Arc::new(store), None, async |rotator| rotator.withdraw_below_tags(&[1]).await)
    };
    let lost = |tag: &str, rounds: u32| {
        let faulty = Faulty::new(sealed());
        faulty.on(When::call(Call::Create).name(tag).times(rounds), Fault::Fail(Code::Exists));
        faulty
    };
    // Others are first at one tag, every time.
    let faulty = lost("/r/prod/", u32::MAX);
    let withdrawn = withdraw(faulty.clone()).unwrap();
    assert_eq!((withdrawn.below, &withdrawn.refs[..]), (2, &[(LATEST.to_owned(), 3)][..]));
    let why = withdrawn.unfinished.expect("prod does not say it");
    assert!(why.code() == Code::Exists && withdrawn.warnings.contains(&why.chain()), "{:?}", withdrawn.warnings);
    faulty.heal();
    let again = withdraw(faulty).unwrap();
    assert!(again.unfinished.is_none() && again.refs == [("prod".to_owned(), 3)], "{again:?}");
    // At every tag.
    let faulty = lost("/r/", u32::MAX);
    let before = faulty.inner().names();
    assert_eq!(withdraw(faulty.clone()).unwrap_err().code(), Code::Exists);
    assert_eq!(faulty.inner().names(), before);
    // The store answers no more, at any listing of two rounds.
    let counted = lost("/r/prod/", 1);
    withdraw(counted.clone()).unwrap();
    let lists = u32::try_from(counted.count(Call::List)).unwrap();
    let mut broke_off = 0;
    for list in 0..lists {
        let faulty = lost("/r/prod/", 1);
        faulty.on(When::call(Call::List).after(list), Fault::Fail(Code::StoreDenied));
        let refs = named(faulty.inner(), "/r/");
        match withdraw(faulty.clone()) {
            Ok(withdrawn) => {
                assert_eq!((withdrawn.below, withdrawn.refs.len()), (2, 1), "listing {list}");
                assert_eq!(withdrawn.unfinished.expect("prod is behind").code(), Code::StoreDenied);
                broke_off += 1;
            }
            Err(denied) => {
                assert_eq!(denied.code(), Code::StoreDenied);
                assert_eq!(named(faulty.inner(), "/r/"), refs, "listing {list}: an error, and yet written");
            }
        }
    }
    assert!(broke_off > 0 && broke_off < lists, "{broke_off} of {lists}");
}

/// Nothing but its age tells a version that such an order has made from one whose data key leaked since.
#[test]
fn an_order_for_a_new_data_key_that_is_given_again_makes_another_unless_the_version_is_too_young() {
    let bench = Bench::new();
    for level in [Level::NewKey, Level::Reencrypt] {
        let store = bench.sealed(&[1], false);
        let order = bench.order(level, &[1], &[]);
        assert_eq!(bench.rekey(store.clone(), &order).unwrap().version, 2);
        let before = store.names();
        let retried = Rekey { if_older_s: Some(3600), ..order.clone() };
        let again = bench.rekey(store.clone(), &retried).unwrap();
        assert!(again.finished && again.refs.is_empty() && again.left_alone.is_none(), "{again:?}");
        assert_eq!((again.from_version, again.version), (1, 2));
        assert_eq!(before, store.names());
        // The purpose of this one is the floor, and it is not there yet.
        let withdrawing = Rekey { withdraw_old: true, ..retried };
        assert_eq!(bench.rekey(store.clone(), &withdrawing).unwrap().refs.len(), 2);
        assert_eq!(bench.read(&store, "acme/llama@1", &[1]).unwrap_err().code(), Code::BelowFloor);
        assert!(bench.rekey(store.clone(), &withdrawing).unwrap().refs.is_empty());
        let others = Rekey { if_older_s: Some(3600), ..bench.order(level, &[1], &[1, 2]) };
        let left = bench.rekey(store.clone(), &others).unwrap();
        assert!(left.left_alone.is_some() && left.version == 2, "{left:?}");

        // The data key of version 2 leaked today.
        let leaked = bench.rekey(store.clone(), &Rekey { withdraw_old: true, ..order.clone() }).unwrap();
        assert_eq!((leaked.finished, leaked.version, leaked.from_version), (false, 3, 2));
        assert_eq!(bench.read(&store, "acme/llama@2", &[1]).unwrap_err().code(), Code::BelowFloor);
        assert_eq!(bench.rekey(store.clone(), &order).unwrap().version, 4);
    }
}

/// Each slot that the order would not make is that of somebody who is to be out.
#[test]
fn a_key_that_an_order_leaves_out_opens_nothing_new_however_young_the_version_is() {
    let bench = Bench::new();
    for to in [&[][..], &[1]] {
        let store = bench.sealed(&[1], false);
        let both = bench.order(Level::NewKey, &[1], &[1, 2]);
        assert_eq!(bench.rekey(store.clone(), &both).unwrap().version, 2);
        assert!(bench.read(&store, MODEL, &[2]).is_ok());
        let one = bench.rekey(store.clone(), &bench.order(Level::NewKey, &[1], to)).unwrap();
        assert!(!one.finished && one.version == 3, "{one:?}");
        assert_eq!(bench.read(&store, MODEL, &[2]).unwrap_err().code(), Code::NoKey);
    }
    // Where the old key opens nothing any more, the order cannot be done; it is not done already either.
    let store = bench.sealed(&[1], false);
    let both = bench.order(Level::NewKey, &[1], &[2, 3]);
    bench.rekey(store.clone(), &both).unwrap();
    assert!(bench.rekey(store.clone(), &both).unwrap().refs.is_empty());
    let refused = bench.rekey(store.clone(), &bench.order(Level::NewKey, &[1], &[2])).unwrap_err();
    assert!(refused.code() == Code::NoKey && refused.message().contains("for other keys"), "{refused:?}");
}

#[test]
fn what_an_earlier_run_made_for_other_keys_is_finished_and_then_replaced() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let faulty = Faulty::new(store.clone());
    faulty.on(When::call(Call::Create).name("/r/prod/"), Fault::Fail(Code::StoreDenied));
    let half = bench.rekey(faulty, &bench.order(Level::NewKey, &[1], &[1, 2])).unwrap();
    assert_eq!((half.version, half.refs.len()), (2, 1), "prod stays behind");
    let one = bench.rekey(store.clone(), &bench.order(Level::NewKey, &[1], &[1])).unwrap();
    assert_eq!((one.version, one.refs.len()), (3, 2));
    for selector in [MODEL, "acme/llama@prod"] {
        assert_eq!(bench.read(&store, selector, &[2]).unwrap_err().code(), Code::NoKey, "{selector}");
        assert_eq!(bench.read(&store, selector, &[1]).unwrap().1, files(), "{selector}");
    }
    // For the same keys it is finished, but for an order that withdraws: the data key that leaked may be the one it made.
    for (withdraw_old, made) in [(false, (true, 2, 1)), (true, (false, 3, 2))] {
        let store = bench.sealed(&[1], false);
        let faulty = Faulty::new(store.clone());
        faulty.on(When::call(Call::Create).name("/r/prod/"), Fault::Fail(Code::StoreDenied));
        let order = bench.order(Level::NewKey, &[1], &[]);
        assert_eq!(bench.rekey(faulty, &order).unwrap().refs.len(), 1);
        let done = bench.rekey(store.clone(), &Rekey { withdraw_old, ..order }).unwrap();
        assert_eq!((done.finished, done.version, done.refs.len()), made, "{done:?}");
    }
}

/// Two versions never carry one number, though the tag of a rotation is not the one that others publish under.
#[test]
fn a_rotated_version_is_numbered_after_what_was_published_meanwhile() {
    let bench = Arc::new(Bench::new());
    let store = bench.sealed(&[1], false);
    bench.seal_as(&store, &[1], false, &[]);
    let (others, published) = ((Arc::clone(&bench), store.clone()), AtomicBool::new(false));
    let progress = ProgressFn::new(move |progress| {
        if progress.phase == Phase::Seal && !published.swap(true, Ordering::Relaxed) {
            let (bench, store) = others.clone();
            std::thread::spawn(move || bench.seal_as(&store, &[1], false, &[])).join().unwrap();
        }
    });
    let order = Rekey { progress, ..bench.order(Level::Reencrypt, &[1], &[]) };
    assert_eq!(bench.rekey_tag(store.clone(), "prod", &order).unwrap().version, 4);
    assert_eq!(bench.resolve(&store, MODEL).unwrap().header.seq, 3);
}

#[test]
fn what_was_coded_is_coded_again_and_no_plaintext_reaches_the_store() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let canary = &files()["deep/tokenizer.model"][..32];
    let before = store.names();
    bench.rekey(store.clone(), &bench.order(Level::Reencrypt, &[1], &[])).unwrap();
    let (manifest, _) = bench.read(&store, MODEL, &[1]).unwrap();
    let coded = |manifest: &Manifest| manifest.objects().iter().filter(|object| object.is_coded()).count();
    assert_eq!((coded(&manifest), coded(&bench.read(&store, "acme/llama@1", &[1]).unwrap().0)), (1, 1));
    let lens = |manifest: &Manifest| manifest.objects().iter().map(ObjectEntry::stored_len).sum::<u64>();
    let plain: u64 = manifest.objects().iter().map(|object| object.layout.plain_len()).sum();
    assert!(lens(&manifest) < plain * 9 / 10, "{} of {plain}", lens(&manifest));
    for name in store.names().into_iter().filter(|name| !before.contains(name)) {
        let bytes = store.get(&name).unwrap();
        assert!(!bytes.windows(canary.len()).any(|window| window == canary), "plaintext in {name}");
    }
}

/// Damage that a reader would find is found before anything is published.
#[test]
fn a_damaged_object_is_not_encrypted_anew() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let refs = named(&store, "/r/");
    let faulty = Faulty::new(store.clone());
    faulty.on(When::call(Call::ReadRange).name("/d/"), Fault::FlipBit { offset: 5_000, bit: 1 });
    let refused = bench.rekey(faulty, &bench.order(Level::Reencrypt, &[1], &[])).unwrap_err();
    assert_eq!(refused.code(), Code::ChunkHash);
    assert_eq!(named(&store, "/r/"), refs);
}

#[test]
fn slots_that_the_store_changed_are_taken_back_and_the_old_ones_stay_in_force() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let faulty = Faulty::new(store.clone());
    faulty.on(When::call(Call::ReadSmall).name("/0000000002"), Fault::FlipBit { offset: 150, bit: 1 });
    let edit = Edit::Replace { keys: bench.ring(&[1]), new: bench.ring(&[2]), label: None };
    let refused = bench.edit(faulty, &edit).unwrap_err();
    assert_eq!(refused.code(), Code::SlotsChecksum, "{refused:?}");
    assert_eq!(bench.read(&store, MODEL, &[1]).unwrap().1, files());
    assert_eq!(named(&store, "/k/").len(), 1);
}

#[test]
fn of_two_editors_at_once_both_edits_are_made() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    std::thread::scope(|scope| {
        for number in [2, 3, 4] {
            let (bench, store) = (&bench, store.clone());
            scope.spawn(move || {
                let slow = Faulty::new(store);
                slow.on(When::call(Call::Create).name("/k/").once(), Fault::Delay(Duration::from_millis(50)));
                let edit = Edit::Add { keys: bench.ring(&[1]), new: bench.ring(&[number]), label: None };
                bench.edit(slow, &edit).unwrap();
            });
        }
    });
    for number in [1, 2, 3, 4] {
        assert_eq!(bench.read(&store, MODEL, &[number]).unwrap().1, files(), "key {number}");
    }
    assert_eq!(bench.resolve(&store, MODEL).unwrap().slots.generation, 4);
}

/// The other one built on what we wrote and deleted it before we had read it back: the edit stands, in theirs. Where the
/// label that we removed is theirs by then, neither is their slot removed nor is ours said to be gone.
#[test]
fn an_edit_that_another_editor_built_on_before_it_was_read_back_is_made() {
    // Theirs may not delete ours: then ours can be read, and counts for nothing all the same.
    for (label, deletes) in [(Some("third"), true), (Some("third"), false), (None, true)] {
        let mut delay = Duration::from_millis(1500);
        let (bench, store, removed) = loop {
            let bench = Bench::new();
            let store = bench.sealed(&[1, 2], false);
            let slow = Faulty::new(store.clone());
            slow.on(When::call(Call::ReadSmall).name("/0000000002").once(), Fault::Delay(delay));
            let began = Instant::now();
            let (removed, in_time) = std::thread::scope(|scope| {
                let remove = Edit::Remove { keys: bench.ring(&[1]), label: "key-file-2".into() };
                let (bench, slow) = (&bench, slow.clone());
                let removed = scope.spawn(move || bench.edit(slow, &remove));
                let is_written = || store.names().iter().any(|name| name.ends_with("/0000000002"));
                while !is_written() {
                    assert!(!removed.is_finished() || is_written(), "it ended before it wrote");
                    std::thread::yield_now();
                }
                let label = label.map(str::to_owned);
                let add = Edit::Add { keys: bench.ring(&[1]), new: bench.ring(&[3]), label };
                let other = Faulty::new(store.clone());
                if !deletes {
                    other.on(When::call(Call::Delete), Fault::Fail(Code::StoreDenied));
                }
                let added = bench.edit(other, &add);
                let in_time = began.elapsed() < delay;
                assert!(!in_time || added.is_ok_and(|added| added.generation == 3), "built on what was written");
                (removed.join().unwrap(), in_time)
            });
            if in_time {
                break (bench, store, removed);
            }
            // On a slow machine it was read back before the other one was through: again, with more time.
            delay *= 2;
            assert!(delay < Duration::from_secs(120), "the other edit takes longer than half of {delay:?}");
        };
        match label {
            Some(_) => {
                let removed = removed.unwrap();
                assert_eq!((removed.generation, removed.written, removed.finished), (3, true, false));
                assert_eq!(removed.removed, ["key-file-2"], "what became of it is told");
            }
            None => {
                assert_eq!(removed.unwrap_err().code(), Code::Exists);
            }
        }
        assert_eq!(bench.read(&store, MODEL, &[2]).unwrap_err().code(), Code::NoKey);
        for number in [1, 3] {
            assert_eq!(bench.read(&store, MODEL, &[number]).unwrap().1, files());
        }
        assert_eq!(named(&store, "/k/").len(), 1);
    }
}

#[test]
fn the_last_slot_and_the_last_key_of_the_operator_stay() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let remove = |keys: &[u8], label: &str| Edit::Remove { keys: bench.ring(keys), label: label.into() };
    let last = bench.edit(store.clone(), &remove(&[1], "key-file")).unwrap_err();
    assert!(last.code() == Code::Usage && last.message().contains("last slot"), "{last:?}");
    bench
        .edit(store.clone(), &Edit::Add { keys: bench.ring(&[1]), new: bench.ring(&[2]), label: Some("b".into()) })
        .unwrap();
    let own = bench.edit(store.clone(), &remove(&[1], "key-file")).unwrap_err();
    assert!(own.code() == Code::Usage && own.message().contains("--key of one that stays"), "{own:?}");
    let unknown = bench.edit(store.clone(), &remove(&[1], "nobody")).unwrap_err();
    assert!(unknown.code() == Code::NotFound && unknown.message().contains("key-file, b"), "{unknown:?}");
    bench.edit(store.clone(), &remove(&[2], "key-file")).unwrap();
    assert_eq!(bench.read(&store, MODEL, &[1]).unwrap_err().code(), Code::NoKey);
}

#[test]
fn a_key_that_opens_nothing_adds_and_replaces_nothing() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], false);
    let before = store.names();
    let (keys, new) = (bench.ring(&[7]), bench.ring(&[2]));
    for edit in [
        Edit::Add { keys: Arc::clone(&keys), new: Arc::clone(&new), label: None },
        Edit::Replace { keys, new, label: None },
    ] {
        assert_eq!(bench.edit(store.clone(), &edit).unwrap_err().code(), Code::NoKey);
    }
    assert_eq!(store.names(), before);
}

/// A rewrap job opens nothing: what it can check is the form, and that the version did not fall.
#[test]
fn a_rewrap_raises_the_version_and_asks_for_no_key() {
    let bench = Bench::new();
    let store = bench.sealed(&[1], true);
    let rewrap = |vault: &Arc<FakeVault>| Edit::Rewrap { vault: Arc::clone(vault) as Arc<dyn Rewrap>, label: None };
    let same = FakeVault::at(1);
    let edited = bench.edit(store.clone(), &rewrap(&same)).unwrap();
    assert!(!edited.written && same.asked.load(Ordering::Relaxed) == 1, "already the newest: nothing to write");
    let edited = bench.edit(store.clone(), &rewrap(&FakeVault::at(5))).unwrap();
    assert_eq!(edited.rewrapped, [("vault".to_owned(), 1, 5)]);
    let older = bench.edit(store.clone(), &rewrap(&FakeVault::at(4))).unwrap_err();
    assert_eq!(older.code(), Code::VaultAnswer);
    struct Broken(Code);
    impl Rewrap for Broken {
        fn rewrap(&self, _: &[u8; 32], _: &str) -> Result<String> {
            match self.0 {
                Code::Usage => Ok("<html>".into()),
                code => Err(Error::new(code, "as told")),
            }
        }
    }
    for (told, code) in [
        (Code::Usage, Code::VaultAnswer),
        (Code::VaultDenied, Code::VaultDenied),
        (Code::VaultUnreachable, Code::VaultUnreachable),
    ] {
        let edit = Edit::Rewrap { vault: Arc::new(Broken(told)), label: None };
        assert_eq!(bench.edit(store.clone(), &edit).unwrap_err().code(), code);
    }
    assert_eq!(bench.read(&store, MODEL, &[1]).unwrap().1, files());
    let none = bench.edit(bench.sealed(&[1], false), &rewrap(&FakeVault::at(5))).unwrap_err();
    assert_eq!(none.code(), Code::NotFound);
}

/// Slots do not say which key of Vault they are of: one that Vault refuses keeps nobody from the others, and is told.
#[test]
fn a_slot_that_vault_does_not_rewrap_is_told_beside_those_that_it_does() {
    struct Picky(u32);
    impl Rewrap for Picky {
        fn rewrap(&self, _: &[u8; 32], wrapped: &str) -> Result<String> {
            match wrapped {
                "vault:v1:b3RoZXI=" => Err(Error::new(Code::VaultDenied, "of another key")),
                other => Ok(format!("vault:v{}:{}", self.0, other.rsplit(':').next().unwrap())),
            }
        }
    }
    let bench = Bench::new();
    let store = bench.sealed(&[1], true);
    let resolved = bench.resolve(&store, MODEL).unwrap();
    let mut slots = resolved.slots.clone();
    slots.slots.push(Slot {
        label: "other".into(),
        params: SlotParams::VaultTransit,
        body: b"vault:v1:b3RoZXI=".to_vec(),
    });
    store.put(&names::slots(resolved.model_id, resolved.header.vid, 1), slots.encode().unwrap());
    let rewrap = |version, label: Option<&str>| {
        let edit = Edit::Rewrap { vault: Arc::new(Picky(version)), label: label.map(str::to_owned) };
        bench.edit(store.clone(), &edit)
    };
    // The second time nothing is to be changed, and the slot is as it was.
    for written in [true, false] {
        let edited = rewrap(2, None).unwrap();
        assert_eq!((edited.written, &edited.refused[..]), (written, &["other".to_owned()][..]));
        assert_eq!(edited.refusal.unwrap().code(), Code::VaultDenied);
        assert!(edited.warnings[0].contains("of another key"), "{:?}", edited.warnings);
    }
    assert_eq!(rewrap(3, Some("other")).unwrap_err().code(), Code::VaultDenied);
    assert!(rewrap(3, Some("vault")).unwrap().refused.is_empty());
}

/// The command line, as an operator types it.
#[test]
fn keys_are_listed_added_rotated_and_removed_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("w.bin"), bf16(300_000)).unwrap();
    let program = Program::in_folder(folder.path());
    program.seal(&source, "acme/a");
    program.seal(&source, "acme/b");
    let (store, key) = (program.store().to_owned(), program.key());
    let file = |name: &str| {
        let path = folder.path().join(name);
        run_ok(program.command(&["keygen"]).arg(&path));
        format!("file:{}", path.display())
    };
    let (two, three) = (file("two.key"), file("three.key"));
    let trusted = program.trusted_key();
    let command = |words: &[&str]| {
        let mut command = program.command(words);
        command.arg("--json").arg("--trust").arg(&trusted);
        command
    };
    let json = |words: &[&str]| -> Value { serde_json::from_slice(&run_ok(&mut command(words)).stdout).unwrap() };
    let code = |words: &[&str]| command(words).output().unwrap().status.code().unwrap();

    let list = json(&["key", "list", &store, "acme/a", "--key", &key, "--key", &two]);
    assert_eq!((list["generation"].as_u64(), list["slots"][0]["label"].as_str()), (Some(1), Some("key-file")));
    assert_eq!(list["slots"][0]["opened_by"], serde_json::json!([key]));
    let add = json(&["key", "add", &store, "acme/a", "--key", &key, "--add", &two, "--label", "break-glass"]);
    assert_eq!((add["status"].as_str(), add["generation"].as_u64()), (Some("rotated"), Some(2)));
    let again = json(&["key", "add", &store, "acme/a", "--key", &key, "--add", &two, "--label", "break-glass"]);
    assert_eq!(again["status"], "unchanged");
    let list = json(&["key", "list", &store, "acme/a", "--key", &two]);
    assert_eq!(list["slots"][0]["opened_by"], serde_json::json!([]));
    assert_eq!(list["slots"][1]["label"], "break-glass");

    let all = json(&["key", "rotate", &store, "--all", "--key", &key, "--to", &three]);
    assert_eq!(all["failed"], 0);
    let rows = all["versions"].as_array().unwrap();
    assert!(rows.len() == 2 && rows.iter().all(|row| row["status"] == "rotated"), "{all}");
    let all = json(&["key", "rotate", &store, "--all", "--key", &key, "--to", &three]);
    assert!(all["versions"].as_array().unwrap().iter().all(|row| row["status"] == "unchanged"), "{all}");
    assert_eq!(code(&["verify", &store, "acme/a", "--key", &key]), 25);
    assert_eq!(code(&["verify", &store, "acme/a", "--key", &three]), 0);

    assert_eq!(code(&["key", "remove", &store, "acme/a", "--key", &two, "--label", "nobody"]), 3);
    let gone = json(&["key", "remove", &store, "acme/a", "--key", &three, "--label", "break-glass"]);
    assert_eq!(gone["removed"], serde_json::json!(["break-glass"]));
    assert_eq!(code(&["key", "remove", &store, "acme/a", "--key", &three, "--label", "key-file"]), 2);
    assert_eq!(code(&["key", "rotate", &store, "acme/a", "--key", &three]), 2);

    let new = json(&["key", "rotate", &store, "acme/a", "--key", &three, "--new-key"]);
    assert_eq!((new["version"].as_u64(), new["from_version"].as_u64()), (Some(2), Some(1)));
    let young = json(&["key", "rotate", &store, "acme/a", "--all", "--key", &three, "--reencrypt"]);
    assert_eq!(young["versions"][0]["status"], "untouched", "a day is the least age with --all: {young}");
    let anew =
        json(&["key", "rotate", &store, "acme/a", "--key", &three, "--to", &two, "--reencrypt", "--withdraw-old"]);
    assert_eq!((anew["version"].as_u64(), anew["left_out"].clone()), (Some(3), serde_json::json!(["key-file"])));
    assert_eq!(code(&["verify", &store, "acme/a", "--key", &two]), 0);
    assert_eq!(code(&["verify", &store, "acme/a@2", "--key", &three]), 20);
    // A model that the keys have no business with is told and is no failure.
    let mixed = json(&["key", "rotate", &store, "--all", "--key", &two, "--to", &key]);
    let status = |model: &str| {
        let rows = mixed["versions"].as_array().unwrap();
        rows.iter().find(|row| row["model"] == model).unwrap()["status"].clone()
    };
    assert_eq!((status("acme/a"), status("acme/b")), ("rotated".into(), "untouched".into()), "{mixed}");
}

/// A model with version 2 under `latest` and version 1 under `prod`, and the command line that rotates it.
struct TwoTags {
    folder: tempfile::TempDir,
    program: Program,
}

impl TwoTags {
    fn new() -> TwoTags {
        let folder = tempfile::tempdir().unwrap();
        let program = Program::in_folder(folder.path());
        let two = TwoTags { folder, program };
        two.seal(1);
        two.json(&["tag", two.program.store(), "acme/a@1", "prod"]);
        two.seal(2);
        two
    }

    fn seal(&self, own: u64) {
        let source = self.folder.path().join("source");
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("w.bin"), noise(50_000, own)).unwrap();
        self.program.seal(&source, "acme/a");
    }

    fn output(&self, words: &[&str]) -> std::process::Output {
        let mut command = self.program.command(words);
        command.arg("--json").arg("--trust").arg(self.program.trusted_key()).output().unwrap()
    }

    fn json(&self, words: &[&str]) -> Value {
        let done = self.output(words);
        assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).unwrap()
    }

    /// Versions (0: the model) and what became of them, of `key rotate --all` with these words.
    fn rotate_all(&self, words: &[&str]) -> Vec<(u64, String)> {
        let key = self.program.key();
        let before = ["key", "rotate", self.program.store(), "--all", "--key", &key];
        let done = self.json(&[&before[..], words].concat());
        let row = |row: &Value| (row["version"].as_u64().unwrap_or(0), row["status"].as_str().unwrap().to_owned());
        done["versions"].as_array().unwrap().iter().map(row).collect()
    }

    fn inspect(&self, selector: &str) -> Value {
        self.json(&["inspect", self.program.store(), selector, "--key", &self.program.key()])
    }
}

/// What a tag beside `latest` names has a data key as well, and `latest` has led there once.
#[test]
fn every_version_that_a_tag_names_is_rotated_with_all() {
    for level in ["--reencrypt", "--new-key"] {
        let two = TwoTags::new();
        let rotated = two.rotate_all(&[level, "--if-older", "0s"]);
        assert_eq!(rotated, [(2, "rotated".to_owned()), (1, "rotated".to_owned())], "{level}");
        let version = |selector: &str| two.inspect(selector)["version"].as_u64().unwrap();
        assert_eq!((version("acme/a"), version("acme/a@prod")), (3, 4), "{level}");
    }
}

#[test]
fn with_all_old_versions_are_withdrawn_when_no_tag_names_one_any_more() {
    let two = TwoTags::new();
    let rotated = two.rotate_all(&["--reencrypt", "--if-older", "0s", "--withdraw-old"]);
    assert_eq!(rotated, [(2, "rotated"), (1, "rotated"), (0, "withdrawn")].map(|(n, what)| (n, what.to_owned())));
    let verify = |selector: &str| {
        let words = ["verify", two.program.store(), selector, "--key", &two.program.key()];
        two.output(&words).status.code().unwrap()
    };
    for (selector, code) in [("acme/a@1", 20), ("acme/a@2", 20), ("acme/a@3", 0), ("acme/a", 0), ("acme/a@prod", 0)] {
        assert_eq!(verify(selector), code, "{selector}");
    }
}

/// The readers of the tag still get it: with `latest` alone in mind somebody would stay in.
#[test]
fn a_withdrawn_version_that_a_tag_still_names_is_not_passed_over_when_all_are_rotated() {
    let two = TwoTags::new();
    two.json(&["tag", two.program.store(), "acme/a@2", "latest", "--min-version", "2"]);
    run_ok(&mut two.program.command(&["keygen", "new.key"]));
    let key = two.program.key();
    let verify = |selector: &str, key: &str| {
        two.output(&["verify", two.program.store(), selector, "--key", key]).status.code().unwrap()
    };
    let rotated = two.rotate_all(&["--to", "file:new.key"]);
    assert_eq!(rotated, [(2, "rotated".to_owned()), (1, "rotated".to_owned())]);
    assert_eq!((verify("acme/a@prod", &key), verify("acme/a@prod", "file:new.key")), (25, 0));

    // A new version of its files would bring back what was withdrawn; and nothing is withdrawn while a row is open.
    let words = ["--all", "--key", "file:new.key", "--reencrypt", "--if-older", "0s", "--withdraw-old"];
    let done = two.output(&[&["key", "rotate", two.program.store()], &words[..]].concat());
    let told: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((done.status.code(), told["failed"].as_u64()), (Some(2), Some(1)), "{told}");
    let rows = told["versions"].as_array().unwrap();
    let statuses: Vec<&str> = rows.iter().map(|row| row["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["rotated", "failed"], "{told}");
    assert_eq!(verify("acme/a@2", "file:new.key"), 0, "not withdrawn");
}

/// A tag that anybody made keeps nothing from its rotation; one that this machine knew may lead to what was not rotated.
#[test]
fn a_broken_tag_stops_no_rotation_of_all_and_one_that_was_believed_before_is_a_failure() {
    let two = TwoTags::new();
    let break_tag = |tag: &str, number: u64| {
        let name = names::reference(ModelId::of_name("acme/a"), tag, number);
        let path = std::path::Path::new(two.program.store()).join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"abc").unwrap();
    };
    run_ok(&mut two.program.command(&["keygen", "new.key"]));
    break_tag("zzz", 1);
    assert_eq!(two.rotate_all(&["--to", "file:new.key"]).len(), 2);

    break_tag("prod", 3);
    let key = two.program.key();
    let done = two.output(&["key", "rotate", two.program.store(), "--all", "--key", "file:new.key", "--to", &key]);
    let told: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((done.status.code(), told["failed"].as_u64()), (Some(20), Some(1)), "{told}");
    let row = told["versions"].as_array().unwrap().iter().find(|row| row["status"] == "failed").unwrap();
    assert!(row["detail"].as_str().unwrap().starts_with("tag prod was made by a trusted key"), "{told}");
}

/// The run that was to withdraw died before, and somebody added a key to what it had made.
#[test]
fn an_order_that_withdraws_fails_where_what_it_made_has_other_slots_by_now() {
    let two = TwoTags::new();
    assert_eq!(two.rotate_all(&["--reencrypt", "--if-older", "0s"]).len(), 2);
    run_ok(&mut two.program.command(&["keygen", "more.key"]));
    let (store, key) = (two.program.store(), two.program.key());
    two.json(&["key", "add", store, "acme/a", "--key", &key, "--add", "file:more.key", "--label", "more"]);
    let again = two.output(&["key", "rotate", store, "--all", "--key", &key, "--reencrypt", "--withdraw-old"]);
    let told: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((again.status.code(), told["failed"].as_u64()), (Some(2), Some(1)), "{told}");
    let row = told["versions"].as_array().unwrap().iter().find(|row| row["status"] == "failed").unwrap();
    assert!(row["detail"].as_str().unwrap().contains("nothing of acme/a was withdrawn: version 3"), "{told}");
    let verify = ["verify", store, "acme/a@1", "--key", &key];
    assert!(two.output(&verify).status.success(), "not withdrawn");
}

#[test]
fn a_recipient_that_was_swapped_for_another_is_another_order() {
    let two = TwoTags::new();
    for name in ["r.key", "s.key"] {
        run_ok(&mut two.program.command(&["keygen", "--recipient", name]));
    }
    let key = two.program.key();
    let rotate = |recipient: &str, more: &[&str]| {
        let words = ["key", "rotate", two.program.store(), "acme/a", "--key", &key, "--to", &key, "--new-key"];
        two.json(&[&words[..], &["--to", recipient], more].concat())["status"].as_str().unwrap().to_owned()
    };
    let (r, s) = ("recipient:r.key.pub", "recipient:s.key.pub");
    assert_eq!(rotate(r, &[]), "rotated");
    assert_eq!(rotate(r, &["--if-older", "1h"]), "unchanged");
    assert_eq!(rotate(s, &["--if-older", "1h"]), "untouched", "not done, but too young");
    let recipient = || {
        let list = two.json(&["key", "list", two.program.store(), "acme/a"]);
        let slots = list["slots"].as_array().unwrap().clone();
        slots.iter().find_map(|slot| slot["detail"].as_str().map(str::to_owned)).unwrap()
    };
    let before = recipient();
    assert_eq!(rotate(s, &[]), "rotated");
    assert_ne!(recipient(), before);
}

#[test]
fn warnings_about_each_version_are_told_when_all_are_rotated() {
    let two = TwoTags::new();
    run_ok(&mut two.program.command(&["keygen", "--recipient", "server.key"]));
    let mut command =
        two.program.command(&["key", "rotate", two.program.store(), "--all", "--key", &two.program.key()]);
    command.args(["--to", "recipient:server.key.pub", "--trust"]).arg(two.program.trusted_key());
    let told = String::from_utf8(run_ok(&mut command).stderr).unwrap();
    for version in ["acme/a@1", "acme/a@2"] {
        let line = told.lines().find(|line| line.starts_with(&format!("warning: {version}: ")));
        assert!(line.is_some_and(|line| line.contains("only its holder opens it")), "{told}");
    }
}

/// A model that a passphrase opens, and the command line that changes it.
struct Passphrases {
    folder: tempfile::TempDir,
    program: Program,
}

impl Passphrases {
    fn new() -> Passphrases {
        let folder = tempfile::tempdir().unwrap();
        let program = Program::in_folder(folder.path());
        let source = folder.path().join("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("w.bin"), noise(50_000, 1)).unwrap();
        let model = Passphrases { folder, program };
        let key = model.file("old words");
        run_ok(model.program.command(&["seal"]).arg(&source).args([model.program.store(), "acme/a", "--key", &key]));
        model
    }

    /// The key source of a file with this passphrase.
    fn file(&self, words: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        let path = self.folder.path().join(words.replace(' ', "-"));
        fs::write(&path, format!("{words}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        format!("passphrase-file:{}", path.display())
    }

    fn key(&self, verb: &str, words: &[&str]) -> std::process::Command {
        let mut command = self.program.command(&["key", verb, self.program.store(), "acme/a"]);
        command.args(words).arg("--trust").arg(self.program.trusted_key());
        command
    }

    /// Exit codes of a reader with each of these passphrases.
    fn read_with(&self, phrases: &[&str]) -> Vec<i32> {
        let code = |words: &&str| {
            let mut verify =
                self.program.command(&["verify", self.program.store(), "acme/a", "--key", &self.file(words)]);
            verify.arg("--trust").arg(self.program.trusted_key()).output().unwrap().status.code().unwrap()
        };
        phrases.iter().map(code).collect()
    }
}

#[test]
fn a_passphrase_that_was_changed_opens_no_more_and_the_new_one_does() {
    let model = Passphrases::new();
    assert_eq!(model.read_with(&["old words", "new words"]), [0, 25]);
    let (old, new) = (model.file("old words"), model.file("new words"));
    run_ok(&mut model.key("rotate", &["--key", &old, "--to", &new]));
    assert_eq!(model.read_with(&["old words", "new words"]), [25, 0]);
    let again = run_ok(&mut model.key("rotate", &["--key", &old, "--to", &new, "--json"]));
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!((again["status"].as_str(), again["generation"].as_u64()), (Some("unchanged"), Some(2)));
    let slots = run_ok(&mut model.key("list", &["--json"])).stdout;
    let slots: Value = serde_json::from_slice(&slots).unwrap();
    assert_eq!(slots["slots"].as_array().unwrap().len(), 1, "{slots}");
    assert_eq!(
        (slots["slots"][0]["label"].as_str(), slots["slots"][0]["kind"].as_str()),
        (Some("passphrase"), Some("argon2id"))
    );
}

#[test]
fn a_new_passphrase_is_typed_twice_and_what_is_typed_is_not_shown() {
    let model = Passphrases::new();
    let words = ["--key", "passphrase", "--to", "passphrase"];
    let ask = |typed: [&str; 3]| {
        let mut terminal = Terminal::start(&mut model.key("rotate", &words));
        for (prompt, line) in ["passphrase: ", "new passphrase: ", "new passphrase, again: "].iter().zip(typed) {
            terminal.expect(prompt);
            terminal.type_secret(line);
        }
        terminal.ended()
    };
    let (code, shown) = ask(["old words", "new words", "new wrods"]);
    assert!(code == Some(2) && shown.contains("differ") && shown.contains("nothing was changed"), "{shown}");
    assert_eq!(model.read_with(&["old words", "new words", "new wrods"]), [0, 25, 25]);
    let (code, shown) = ask(["old words", "new words", "new words"]);
    assert_eq!(code, Some(0), "{shown}");
    assert!(!shown.contains("old words") && !shown.contains("new words"), "{shown}");
    assert_eq!(model.read_with(&["old words", "new words"]), [25, 0]);
    // A wrong old one changes nothing.
    let mut terminal = Terminal::start(&mut model.key("rotate", &words));
    terminal.expect("passphrase: ");
    terminal.type_secret("old words");
    terminal.expect("new passphrase: ");
    terminal.type_secret("x");
    terminal.expect("new passphrase, again: ");
    terminal.type_secret("x");
    let (code, shown) = terminal.ended();
    assert_eq!(code, Some(25), "{shown}");
    assert_eq!(model.read_with(&["new words", "x"]), [0, 25]);
}

/// It holds the passphrase that is in use: taken for the new one, a change would change nothing, or let somebody in whom
/// nobody meant.
#[test]
fn the_passphrase_of_the_environment_is_never_taken_for_a_new_one() {
    let model = Passphrases::new();
    let old = model.file("old words");
    run_ok(&mut model.program.command(&["keygen", "other.key"]));
    run_ok(&mut model.key("add", &["--key", &old, "--add", "file:other.key", "--label", "other"]));
    // Whether the old ring wants the variable (the first) or not, the new one does not get it.
    let orders: [(&str, &[&str]); 4] = [
        ("rotate", &["--key", "passphrase", "--to", "passphrase"]),
        ("rotate", &["--key", &old, "--to", "passphrase"]),
        ("rotate", &["--key", "file:other.key", "--to", "passphrase"]),
        ("add", &["--key", "passphrase", "--add", "passphrase"]),
    ];
    for (verb, words) in orders {
        let mut command = model.key(verb, words);
        let refused = without_terminal(command.env("MODELFS_PASSPHRASE", "old words")).output().unwrap();
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{verb} {words:?}: {told}");
        assert!(told.contains("new passphrase") && told.contains("passphrase-file:PATH"), "{verb} {words:?}: {told}");
    }
    let slots: Value = serde_json::from_slice(&run_ok(&mut model.key("list", &["--json"])).stdout).unwrap();
    assert_eq!(slots["generation"], 2, "nothing was changed: {slots}");
    assert_eq!(model.read_with(&["old words"]), [0]);

    let mut command = model.key("rotate", &["--key", "passphrase", "--to", "passphrase"]);
    let mut terminal = Terminal::start(command.env("MODELFS_PASSPHRASE", "old words"));
    for prompt in ["new passphrase: ", "new passphrase, again: "] {
        terminal.expect(prompt);
        terminal.type_secret("new words");
    }
    let (code, shown) = terminal.ended();
    assert!(code == Some(0) && shown.matches("passphrase: ").count() == 1, "the old one is not asked for: {shown}");
    assert_eq!(model.read_with(&["old words", "new words"]), [25, 0]);
}

#[test]
fn a_person_who_rotates_all_models_sees_which_one_it_is_at_and_a_program_does_not() {
    let two = TwoTags::new();
    let source = two.folder.path().join("source");
    two.program.seal(&source, "acme/b");
    run_ok(&mut two.program.command(&["keygen", "new.key"]));
    let rotate = |from: &str, to: &str, more: &[&str]| {
        let mut command =
            two.program.command(&["key", "rotate", two.program.store(), "--all", "--key", from, "--to", to]);
        command.args(more).arg("--trust").arg(two.program.trusted_key());
        command
    };
    let (old, new) = (two.program.key(), "file:new.key");
    let mut terminal = Terminal::start(&mut rotate(&old, new, &[]));
    // The name, the bar, and how many of how many.
    for part in ["rotate", "0/2", "acme/"] {
        terminal.expect(part);
    }
    let (code, shown) = terminal.ended();
    assert!(code == Some(0) && shown.contains("rotated"), "{shown}");
    for more in ["--json", "-q"] {
        let (code, shown) = Terminal::start(&mut rotate(new, &old, &[more])).ended();
        assert!(code == Some(0) && !shown.contains("0/2") && !shown.contains("1/2"), "{more}: {shown}");
    }
    let piped = run_ok(&mut rotate(&old, new, &[]));
    let told = String::from_utf8_lossy(&piped.stderr).into_owned();
    assert!(!told.contains("0/2"), "{told}");
}
