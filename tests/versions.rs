//! Hypothesis: whatever becomes of a model's versions, and whatever dies half-way, a reader gets the old state or the new
//! one, never less than what the tags lead to; and what was withdrawn or goes back is refused by its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;

use modelfs::crypto::{Dek, SigningKey, open_manifest, unwrap_dek, wrap_dek};
use modelfs::error::{Code, Error, Result};
use modelfs::format::*;
use modelfs::keys::{
    Aim, FloorPin, FloorPlace, FloorPolicy, FloorStore, Glob, ModelSelector, RefFloor, Resolved, Resolver, Roles,
    Trust, Wanted, unix_now,
};
use modelfs::mem::Secret;
use modelfs::seal::*;
use modelfs::store::fault::{Call, Death, Fault, Faulty, When};
use modelfs::store::memory::MemoryStore;
use modelfs::store::{ChunkSink, ChunkSource};
use modelfs::versions::*;

const MODEL: &str = "acme/llama";
const DAY: i64 = 86_400;

/// One key file's worth of key, without the file.
struct RawKey(u8);

impl SlotKeys for RawKey {
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        let params = SlotParams::Raw { salt: [7; 32] };
        let context = Slot::wrap_context("test", &params, target.model_id, target.vid, &target.dek_commit);
        let body = wrap_dek(&Secret::from_bytes(&mut [self.0; 32]), &context, dek).to_vec();
        Ok(vec![Slot { label: "test".into(), params, body }])
    }

    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        let slot = &slots.slots[0];
        let context = Slot::wrap_context(&slot.label, &slot.params, slots.model_id, slots.vid, &header.dek_commit);
        unwrap_dek(&Secret::from_bytes(&mut [self.0; 32]), &context, &slot.body)
            .map_err(|e| Error::new(Code::NoKey, "no slot opens").with_source(e))
    }
}

fn signing(seed: u8) -> Arc<SigningKey> {
    Arc::new(SigningKey::from_seed(Secret::from_bytes(&mut [seed; 32])))
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(work)
}

/// A model in a memory store, its publisher, and a reader who remembers.
struct World {
    store: MemoryStore,
    trust: Trust,
    floors: FloorStore,
    state: tempfile::TempDir,
    source: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let mut trust = Trust::default();
        trust.add(Glob::new("*").unwrap(), signing(1).public(), Roles::BOTH);
        let state = tempfile::tempdir().unwrap();
        let floors = FloorStore::new(&state.path().join("reader"));
        World { store: MemoryStore::new(), trust, floors, state, source: tempfile::tempdir().unwrap() }
    }

    /// With so many versions under `latest`; each has a file of its own and shares one with all others.
    fn with_versions(count: u64) -> World {
        let world = World::new();
        for _ in 0..count {
            world.seal();
        }
        world
    }

    fn options(&self) -> SealOptions {
        let mut options = SealOptions::new(Arc::new(RawKey(1)), signing(1));
        options.chunk_log2 = 20;
        options.threads = 2;
        options.floors = Some(FloorStore::new(&self.state.path().join("publisher")));
        options
    }

    fn write_files(&self, own: u64) {
        fs::write(self.source.path().join("shared.bin"), vec![7u8; 300_000]).unwrap();
        fs::write(self.source.path().join("own.txt"), format!("version {own}")).unwrap();
    }

    fn seal(&self) -> u64 {
        self.seal_with(self.options())
    }

    fn seal_with(&self, options: SealOptions) -> u64 {
        self.write_files(self.store.names().len() as u64);
        run(seal(self.source.path(), Arc::new(self.store.clone()), MODEL, options)).unwrap().version
    }

    fn seal_metric(&self, metrics: &[(&str, f64)]) -> u64 {
        let mut options = self.options();
        options.metrics = metrics.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        self.seal_with(options)
    }

    fn resolver_over<'a>(&'a self, source: &'a dyn ChunkSource) -> Resolver<'a> {
        Resolver {
            source,
            trust: &self.trust,
            first_use: None,
            floors: Some(&self.floors),
            policy: FloorPolicy::default(),
            now: unix_now,
        }
    }

    fn resolver(&self) -> Resolver<'_> {
        self.resolver_over(&self.store)
    }

    fn releaser(&self, store: Arc<dyn ChunkSink>) -> Releaser {
        let chain = Chain {
            store,
            model_id: ModelId::of_name(MODEL),
            model_name: Arc::from(MODEL),
            trusted: Arc::new(vec![signing(1).public()]),
            publishers: Arc::new(vec![signing(1).public()]),
            floors: Some(FloorStore::new(&self.state.path().join("publisher"))),
        };
        Releaser { chain, signers: vec![signing(1)], now: unix_now() }
    }

    fn mover(&self) -> Mover<'_> {
        Mover { resolver: self.resolver(), releaser: self.releaser(Arc::new(self.store.clone())) }
    }

    /// The version that a reader gets.
    fn read(&self, selector: &str) -> Result<Resolved> {
        let selector: ModelSelector = selector.parse()?;
        run(self.resolver().resolve(&selector, None))
    }

    fn seq(&self, selector: &str) -> Result<u64> {
        Ok(self.read(selector)?.header.seq)
    }

    /// Opens a version and looks for everything it needs.
    fn assert_whole(&self, resolved: &Resolved) {
        let dek = RawKey(1).unlock(&resolved.slots, &resolved.header).unwrap();
        let (manifest, _) = open_manifest(&resolved.manifest_bytes, dek).unwrap();
        for object in manifest.objects() {
            let name = names::data(resolved.model_id, object.oid);
            let there = self.store.get(&name).unwrap_or_else(|| panic!("{name} of version {}", resolved.header.seq));
            assert_eq!(there.len() as u64, object.stored_len());
        }
    }

    /// Everything that any tag leads to can be read.
    fn assert_all_named_is_whole(&self) -> BTreeSet<u64> {
        let resolver = self.resolver();
        let candidates = run(resolver.candidates(MODEL, 10_000)).unwrap();
        let mut seqs = BTreeSet::new();
        for candidate in candidates {
            let resolved = run(resolver.take(MODEL, &candidate)).unwrap();
            self.assert_whole(&resolved);
            seqs.insert(resolved.header.seq);
        }
        seqs
    }

    fn tag(&self, wanted: u64, channel: &str) -> Result<Moved> {
        run(self.mover().tag(&Wanted::Version(wanted), &order(channel)))
    }

    fn pruner_over(&self, store: Arc<dyn ChunkSink>, look: Look, now: i64, versions_kept: usize) -> PrunerOf<'_> {
        PrunerOf { world: self, store, look, now, versions_kept, grace_s: 7 * DAY as u64, pins: BTreeSet::new() }
    }

    fn prune(&self, look: Look, now: i64) -> Result<PruneReport> {
        self.pruner_over(Arc::new(self.store.clone()), look, now, 2).prune()
    }
}

struct PrunerOf<'a> {
    world: &'a World,
    store: Arc<dyn ChunkSink>,
    look: Look,
    now: i64,
    versions_kept: usize,
    grace_s: u64,
    pins: BTreeSet<ManifestDigest>,
}

impl PrunerOf<'_> {
    async fn pruned(&self) -> Result<PruneReport> {
        let pruner = Pruner {
            resolver: self.world.resolver_over(&*self.store),
            store: Arc::clone(&self.store),
            keys: Arc::new(RawKey(1)),
            state: self.world.state.path().join("pruner"),
            pins: BTreeMap::from([(ModelId::of_name(MODEL), self.pins.clone())]),
            options: PruneOptions {
                versions_kept: self.versions_kept,
                grace_s: self.grace_s,
                second_look_s: DAY as u64,
                look: self.look,
                now: self.now,
            },
        };
        pruner.prune(MODEL, &|_, _| {}).await
    }

    fn prune(&self) -> Result<PruneReport> {
        run(self.pruned())
    }
}

fn order(channel: &str) -> MoveOrder {
    MoveOrder { channel: channel.into(), expires: Expires::AsBefore, min_version_seq: None }
}

fn withdraw(channel: &str, below: u64) -> MoveOrder {
    MoveOrder { min_version_seq: Some(below), ..order(channel) }
}

fn objects(report: &BTreeMap<Kind, Tally>) -> BTreeMap<Kind, u64> {
    report.iter().map(|(kind, tally)| (*kind, tally.objects)).collect()
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> Code {
    result.unwrap_err().code()
}

// Tags and rollbacks.

#[test]
fn a_tag_names_the_version_it_was_given_and_doing_it_again_changes_nothing() {
    let world = World::with_versions(3);
    let moved = world.tag(2, "prod").unwrap();
    assert!(moved.written && moved.before.is_none());
    assert_eq!((world.seq("acme/llama@prod").unwrap(), world.seq(MODEL).unwrap()), (2, 3));
    world.assert_whole(&world.read("acme/llama@prod").unwrap());

    let before = world.store.names();
    let again = world.tag(2, "prod").unwrap();
    assert!(!again.written);
    assert_eq!((again.reference.ref_seq, world.store.names()), (1, before));

    // From one tag to another.
    let promoted = run(world.mover().tag(&Wanted::Newest, &order("prod"))).unwrap();
    assert_eq!((promoted.reference.seq, promoted.reference.ref_seq, promoted.before.unwrap().seq), (3, 2, 2));
    assert_eq!(code(world.tag(9, "prod")), Code::NotFound);
}

#[test]
fn a_rollback_is_a_new_ref_that_readers_who_remember_follow() {
    let world = World::with_versions(3);
    assert_eq!(world.seq(MODEL).unwrap(), 3);
    let moved = run(world.mover().rollback(1, &order(LATEST))).unwrap();
    assert_eq!((moved.reference.ref_seq, moved.reference.seq), (4, 1));
    assert_eq!(world.seq(MODEL).unwrap(), 1);
    let again = run(world.mover().rollback(1, &order(LATEST))).unwrap();
    assert!(!again.written);
    assert_eq!(code(run(world.mover().rollback(3, &order(LATEST)))), Code::Usage, "3 is newer");
    assert_eq!(code(run(world.mover().rollback(1, &order("none")))), Code::NotFound);
    // The next seal goes on from there with a number of its own.
    assert_eq!(world.seal(), 4);
    assert_eq!(world.seq(MODEL).unwrap(), 4);
}

/// THREAT_MODEL (f) row 27.
#[test]
fn a_withdrawn_version_is_named_by_no_tag_and_the_floor_is_never_lowered() {
    let world = World::with_versions(3);
    world.tag(1, "prod").unwrap();
    let moved = run(world.mover().tag(&Wanted::Version(3), &withdraw(LATEST, 2))).unwrap();
    assert!(moved.written, "a higher floor is something to write");
    assert_eq!(moved.withdrawn, [("prod".to_owned(), 1)]);
    assert_eq!(code(world.read("acme/llama@1")), Code::BelowFloor);
    assert_eq!(code(run(world.mover().rollback(1, &order(LATEST)))), Code::BelowFloor);
    assert_eq!(code(world.tag(1, "canary")), Code::BelowFloor);
    assert_eq!(code(run(world.mover().tag(&Wanted::Version(3), &withdraw(LATEST, 1)))), Code::Usage, "lowered");
    assert_eq!(code(run(world.mover().tag(&Wanted::Version(2), &withdraw(LATEST, 3)))), Code::Usage, "itself");
    // Version 1 is found by `prod` alone, whose own floor would let it pass.
    let prod = run(world.mover().tag(&Wanted::Tag("prod".into()), &order("canary")));
    assert_eq!(code(prod), Code::BelowFloor);
    // What is still allowed is still allowed, and the floor stays.
    let back = run(world.mover().rollback(2, &order(LATEST))).unwrap();
    assert_eq!((back.reference.seq, back.reference.min_version_seq), (2, 2));
    world.seal();
    assert_eq!(world.read(MODEL).unwrap().reference.unwrap().min_version_seq, 2);
}

/// By its number a version is found through `latest` first, whose own floor would let it pass.
#[test]
fn a_version_withdrawn_under_one_tag_is_not_had_by_its_number_through_another() {
    let world = World::with_versions(3);
    run(world.mover().tag(&Wanted::Version(3), &withdraw("prod", 2))).unwrap();
    assert_eq!(code(world.read("acme/llama@1")), Code::BelowFloor);
    assert_eq!(world.seq("acme/llama@2").unwrap(), 2);
    // The store hides that tag from a machine that has seen it.
    assert_eq!(world.seq("acme/llama@prod").unwrap(), 3);
    let hidden: Vec<String> = world.store.names().into_iter().filter(|name| name.contains("/r/prod/")).collect();
    assert_eq!(hidden.len(), 2, "a ref and the hint: {hidden:?}");
    let prod: Vec<_> = hidden.iter().map(|name| (name.clone(), world.store.get(name).unwrap())).collect();
    hidden.iter().for_each(|name| run(world.store.delete(name)).unwrap());
    assert_eq!(code(world.read("acme/llama@1")), Code::BelowFloor, "it is remembered");
    // And a tag that somebody else signs takes nothing away.
    prod.into_iter().for_each(|(name, bytes)| world.store.put(&name, bytes));
    let other = MemoryStore::new();
    let mut options = SealOptions::new(Arc::new(RawKey(1)), signing(2));
    options.tags = vec!["theirs".into()];
    run(seal(world.source.path(), Arc::new(other.clone()), MODEL, options)).unwrap();
    for name in other.names().into_iter().filter(|name| name.contains("/r/theirs/")) {
        world.store.put(&name, other.get(&name).unwrap());
    }
    assert_eq!(world.seq("acme/llama@2").unwrap(), 2);
    assert_eq!(code(world.read("acme/llama@theirs")), Code::RefKey);
}

/// Whoever may create objects makes a tag of what lies there, or of nothing, or puts rubbish after a tag's last ref.
#[test]
fn a_broken_tag_keeps_nobody_from_a_number_and_what_it_withdrew_stays_withdrawn() {
    let world = World::with_versions(3);
    let model = ModelId::of_name(MODEL);
    let first = world.store.get(&names::reference(model, LATEST, 1)).unwrap();
    let mut forged = first.to_vec();
    *forged.last_mut().unwrap() ^= 1;
    world.store.put(&names::reference(model, "copied", 1), first);
    world.store.put(&names::reference(model, "forged", 1), forged);
    world.store.put(&names::reference(model, "short", 1), b"abc".to_vec());
    for (tag, refused) in [("copied", Code::RefChannel), ("forged", Code::RefSig), ("short", Code::RefLength)] {
        assert_eq!(code(world.read(&format!("{MODEL}@{tag}"))), refused, "{tag}");
    }
    assert_eq!(world.seq("acme/llama@2").unwrap(), 2);
    assert_eq!(code(world.read("acme/llama@9")), Code::NotFound);
    assert_eq!(world.assert_all_named_is_whole(), BTreeSet::from([1, 2, 3]));
    let versions = run(world.resolver().versions(MODEL, 10)).unwrap();
    assert_eq!(versions.broken.iter().filter(|tag| !tag.seen_before).count(), 3, "{versions:?}");
    assert!(run(world.mover().rollback(1, &order(LATEST))).unwrap().written);

    // This reader never saw `prod`: its refs before the rubbish say what is withdrawn.
    run(world.mover().tag(&Wanted::Version(3), &withdraw("prod", 2))).unwrap();
    world.store.put(&names::reference(model, "prod", 2), b"abc".to_vec());
    assert_eq!(code(world.read("acme/llama@1")), Code::BelowFloor);
    assert_eq!(world.seq("acme/llama@2").unwrap(), 2);
    // In place of the last one: the hint is signed too.
    world.store.put(&names::reference(model, "prod", 1), b"abc".to_vec());
    assert_eq!(code(world.read("acme/llama@1")), Code::BelowFloor);
    let versions = run(world.resolver().versions(MODEL, 10)).unwrap();
    let prod = versions.broken.iter().find(|tag| tag.channel == "prod").expect("told of");
    assert!(prod.seen_before, "a trusted key made it");
}

#[test]
fn of_more_tags_than_are_looked_at_a_number_is_refused_and_a_tag_is_not() {
    let world = World::with_versions(1);
    for tag in 0..1024 {
        world.store.put(&names::reference(ModelId::of_name(MODEL), &format!("t{tag}"), 1), b"abc".to_vec());
    }
    let many = world.read("acme/llama@1").unwrap_err();
    assert!(many.code() == Code::Limit && many.chain().contains("1025 tags"), "{many:?}");
    assert_eq!(world.seq(MODEL).unwrap(), 1);
}

/// THREAT_MODEL (f) row 35: the ref of one tag asks for the new slots, the old ref of another does not.
#[test]
fn slots_replaced_under_one_tag_are_not_had_by_number_through_another() {
    let world = World::with_versions(2);
    world.tag(1, "prod").unwrap();
    let prod = world.read("acme/llama@prod").unwrap().reference.unwrap();
    let target = RefTarget { min_slots_generation: 2, ..RefTarget::of(&prod) };
    run(world.releaser(Arc::new(world.store.clone())).append("prod", Some(&prod), &target)).unwrap();
    assert_eq!(code(world.read("acme/llama@1")), Code::SlotsRollback);
    assert_eq!(world.seq(MODEL).unwrap(), 2);

    // A tag that went on to another version remembers what it asked for.
    let slots = names::slots(prod.model_id, prod.vid, 1);
    let rotated = Slots { generation: 2, ..Slots::parse(&world.store.get(&slots).unwrap()).unwrap() };
    world.store.put(&names::slots(prod.model_id, prod.vid, 2), rotated.encode().unwrap());
    assert_eq!(world.seq("acme/llama@prod").unwrap(), 1);
    world.tag(2, "prod").unwrap();
    run(world.store.delete(&names::slots(prod.model_id, prod.vid, 2))).unwrap();
    assert_eq!(code(world.read("acme/llama@1")), Code::SlotsRollback, "it is remembered");
}

#[test]
fn a_refresh_signs_a_later_end_even_after_the_last_one() {
    let world = World::new();
    let now = unix_now();
    world.seal_with(SealOptions { expires_at: Some(now + 1000), ..world.options() });
    let mut mover = world.mover();
    mover.releaser.now = now + 200;
    let first = run(mover.refresh(LATEST, Expires::AsBefore)).unwrap();
    let before = first.before.as_ref().unwrap();
    assert!(before.issued_at >= now && before.expires_at == now + 1000, "{before:?}");
    let lifetime = before.expires_at - before.issued_at;
    assert_eq!(first.reference.expires_at, now + 200 + lifetime, "as long as the ref before: {first:?}");
    assert!(first.reference.expires_at > before.expires_at, "a later end: {first:?}");
    assert_eq!(code(run(mover.refresh(LATEST, Expires::At(now + 600)))), Code::Usage, "sooner");

    // Expired: readers refuse it, a refresh does not.
    let world = World::new();
    world.seal_with(SealOptions { expires_at: Some(now - 1), ..world.options() });
    assert_eq!(code(world.read(MODEL)), Code::RefExpired);
    run(world.mover().refresh(LATEST, Expires::At(now + 90 * DAY))).unwrap();
    let read = world.read(MODEL).unwrap();
    assert_eq!((read.header.seq, read.reference.unwrap().ref_seq), (1, 2));

    let world = World::with_versions(1);
    assert!(!run(world.mover().refresh(LATEST, Expires::AsBefore)).unwrap().written, "it never ends");
    assert_eq!(code(run(world.mover().refresh(LATEST, Expires::At(now + DAY)))), Code::Usage, "it would end");
    assert_eq!(code(run(world.mover().refresh("none", Expires::AsBefore))), Code::NotFound);
}

#[test]
fn a_move_keeps_the_highest_slots_generation_that_any_tag_asks_for() {
    let world = World::with_versions(2);
    world.tag(1, "prod").unwrap();
    // A rotation of version 1, as `prod` says it.
    let prod = world.read("acme/llama@prod").unwrap().reference.unwrap();
    let slots = names::slots(prod.model_id, prod.vid, 1);
    let rotated = Slots { generation: 2, ..Slots::parse(&world.store.get(&slots).unwrap()).unwrap() };
    world.store.put(&names::slots(prod.model_id, prod.vid, 2), rotated.encode().unwrap());
    let target = RefTarget { min_slots_generation: 2, ..RefTarget::of(&prod) };
    run(world.releaser(Arc::new(world.store.clone())).append("prod", Some(&prod), &target)).unwrap();
    // Found by `latest`, whose ref of version 1 asks for generation 1.
    let moved = run(world.mover().rollback(1, &order(LATEST))).unwrap();
    assert_eq!(moved.reference.min_slots_generation, 2);
}

#[test]
fn two_movers_at_once_both_end_and_the_refs_are_chained() {
    let world = World::with_versions(3);
    let (one, other) = (world.mover(), world.mover());
    let (a, b) = run(async {
        let (one_wants, other_wants) = (Wanted::Version(1), Wanted::Version(2));
        let (first, second) = (order("prod"), order("prod"));
        futures::join!(one.tag(&one_wants, &first), other.tag(&other_wants, &second))
    });
    let (a, b) = (a.unwrap().reference, b.unwrap().reference);
    assert_eq!([a.ref_seq, b.ref_seq].into_iter().collect::<BTreeSet<_>>(), BTreeSet::from([1, 2]));
    let last = if a.ref_seq == 2 { a } else { b };
    assert_eq!(world.seq("acme/llama@prod").unwrap(), last.seq);
}

/// Somebody is always first: the mover gives up, and says so, instead of going on for ever.
#[test]
fn a_mover_that_never_wins_ends_with_exists() {
    let world = World::with_versions(2);
    let faulty = Faulty::new(world.store.clone());
    faulty.on(When::call(Call::Create).name("/r/prod/"), Fault::Fail(Code::Exists));
    let mover = Mover { resolver: world.resolver(), releaser: world.releaser(Arc::new(faulty)) };
    assert_eq!(code(run(mover.tag(&Wanted::Version(1), &order("prod")))), Code::Exists);
}

#[test]
fn whatever_write_of_a_move_dies_readers_see_the_old_or_the_new_version_and_moving_again_ends_it() {
    type Move = (&'static str, fn(&Mover<'_>) -> Result<Moved>, u64, u64);
    let moves: [Move; 3] = [
        ("tag", |mover| run(mover.tag(&Wanted::Version(1), &order("prod"))), 2, 1),
        ("rollback", |mover| run(mover.rollback(1, &order("prod"))), 2, 1),
        ("refresh", |mover| run(mover.refresh("prod", Expires::At(unix_now() + 900 * DAY))), 2, 2),
    ];
    for (what, make, old, new) in moves {
        let prepare = || {
            let world = World::with_versions(3);
            let order = MoveOrder { expires: Expires::At(unix_now() + DAY), ..order("prod") };
            run(world.mover().tag(&Wanted::Version(2), &order)).unwrap();
            world
        };
        let over = |world: &World, store: &Faulty<MemoryStore>| {
            let releaser = world.releaser(Arc::new(store.clone()));
            make(&Mover { resolver: world.resolver(), releaser })
        };
        let world = prepare();
        let counted = Faulty::new(world.store.clone());
        over(&world, &counted).unwrap();
        let writes = counted.writes();
        assert!(writes >= 3, "{what}: {writes} writes are too few to prove anything");
        for write in 0..writes {
            for side in [Death::Before, Death::After] {
                let world = prepare();
                let faulty = Faulty::new(world.store.clone());
                faulty.die_at_write(write, side);
                let died = over(&world, &faulty);
                let read = world.read("acme/llama@prod").unwrap();
                let (seq, ref_seq) = (read.header.seq, read.reference.unwrap().ref_seq);
                assert!((seq, ref_seq) == (old, 1) || (seq, ref_seq) == (new, 2), "{what} {write} {side:?}: {seq}");
                if died.is_ok() {
                    assert_eq!(ref_seq, 2, "{what} told success at write {write} {side:?}");
                }
                let again = make(&world.mover()).unwrap();
                assert_eq!(world.seq("acme/llama@prod").unwrap(), new);
                if what != "refresh" {
                    assert_eq!(again.reference.ref_seq, 2, "{what} again wrote more than was needed");
                }
            }
        }
    }
}

// The best version.

fn best(world: &World, metric: &str, aim: Aim) -> Result<Best> {
    let open = |version: &Resolved| {
        let dek = RawKey(1).unlock(&version.slots, &version.header)?;
        Ok(open_manifest(&version.manifest_bytes, dek)?.0)
    };
    run(best_of(&world.resolver(), MODEL, metric, aim, &open))
}

#[test]
fn the_best_version_is_the_one_at_the_good_end_and_of_equals_the_newest() {
    let world = World::new();
    for loss in [2.5, 1.5, 1.5, 9.0] {
        world.seal_metric(&[("loss", loss), ("acc", -loss)]);
    }
    world.seal();
    let min = best(&world, "loss", Aim::Min).unwrap();
    assert_eq!((min.resolved.header.seq, min.value, min.compared), (3, 1.5, 4));
    assert_eq!(best(&world, "loss", Aim::Max).unwrap().resolved.header.seq, 4);
    assert_eq!(best(&world, "acc", Aim::Max).unwrap().resolved.header.seq, 3);
    world.assert_whole(&min.resolved);
    let none = best(&world, "bleu", Aim::Max).unwrap_err();
    assert_eq!(none.code(), Code::NotFound);
    assert!(none.chain().contains("acc, loss"), "{none:?}");
}

#[test]
fn a_withdrawn_version_is_never_the_best_whichever_tag_leads_to_it() {
    let world = World::new();
    for loss in [1.0, 2.0, 3.0] {
        world.seal_metric(&[("loss", loss)]);
    }
    world.tag(1, "prod").unwrap();
    assert_eq!(best(&world, "loss", Aim::Min).unwrap().resolved.header.seq, 1);
    run(world.mover().tag(&Wanted::Version(3), &withdraw(LATEST, 2))).unwrap();
    assert_eq!(best(&world, "loss", Aim::Min).unwrap().resolved.header.seq, 2);
}

#[test]
fn a_version_for_other_keys_is_not_compared_and_one_that_was_tampered_with_refuses_the_choice() {
    let world = World::new();
    world.seal_metric(&[("loss", 2.0)]);
    let mut options = world.options();
    options.keys = Arc::new(RawKey(2));
    options.metrics = [("loss".to_owned(), 1.0)].into();
    world.seal_with(options);
    assert_eq!(best(&world, "loss", Aim::Min).unwrap().resolved.header.seq, 1);

    let first = world.read("acme/llama@1").unwrap();
    let name = names::manifest(first.model_id, first.digest);
    let mut bytes = world.store.get(&name).unwrap().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    world.store.put(&name, bytes);
    assert_eq!(code(best(&world, "loss", Aim::Min)), Code::ManDigest);
}

#[test]
fn an_expired_tag_leads_to_no_candidate() {
    let world = World::new();
    world.seal_metric(&[("loss", 2.0)]);
    world.seal_metric(&[("loss", 1.0)]);
    let expired = MoveOrder { expires: Expires::At(unix_now() - 1), ..order(LATEST) };
    run(world.mover().tag(&Wanted::Version(1), &order("prod"))).unwrap();
    run(world.mover().tag(&Wanted::Version(2), &expired)).unwrap();
    assert_eq!(best(&world, "loss", Aim::Min).unwrap().resolved.header.seq, 1, "by prod");
    run(world.mover().tag(&Wanted::Tag("prod".into()), &MoveOrder { channel: "prod".into(), ..expired })).unwrap();
    assert_eq!(code(best(&world, "loss", Aim::Min)), Code::RefExpired);
}

// Pruning.

#[test]
fn refs_go_a_grace_period_after_the_first_look_and_what_only_they_named_a_grace_period_later() {
    let world = World::with_versions(4);
    let now = unix_now();
    let before = world.store.names();
    let first = world.prune(Look::Sweep, now).unwrap();
    assert_eq!((first.versions, objects(&first.waiting)), (2, BTreeMap::from([(Kind::Ref, 2)])));
    assert_eq!((first.due.len(), first.next_at), (0, Some(now + 7 * DAY)));
    assert_eq!(world.prune(Look::Sweep, now + 7 * DAY - 1).unwrap().due.len(), 0);
    assert_eq!(world.store.names(), before, "nothing was agreed on");
    assert_eq!(world.seq("acme/llama@1").unwrap(), 1);

    let second = world.prune(Look::Sweep, now + 7 * DAY).unwrap();
    assert_eq!(objects(&second.due), BTreeMap::from([(Kind::Ref, 2)]));
    // Of two versions; the object of the first one is inherited by all others.
    let two_each = BTreeMap::from([(Kind::Manifest, 2), (Kind::Signature, 2), (Kind::Slots, 2), (Kind::Data, 1)]);
    assert_eq!(objects(&second.waiting), two_each);
    assert_eq!(code(world.read("acme/llama@2")), Code::NotFound);
    assert_eq!(world.assert_all_named_is_whole(), BTreeSet::from([3, 4]));

    let third = world.prune(Look::Sweep, now + 14 * DAY).unwrap();
    assert_eq!(objects(&third.due), two_each);
    assert_eq!(world.assert_all_named_is_whole(), BTreeSet::from([3, 4]));
    let last = world.prune(Look::Sweep, now + 30 * DAY).unwrap();
    assert!(last.due.is_empty() && last.waiting.is_empty() && last.strange == 0, "{last:?}");
    assert_eq!(last.needed.objects as usize, world.store.names().len());
}

#[test]
fn a_dry_run_is_no_look_and_a_look_deletes_nothing() {
    let world = World::with_versions(4);
    let (now, before) = (unix_now(), world.store.names());
    for day in 0..3 {
        world.prune(Look::DryRun, now + day * 10 * DAY).unwrap();
    }
    assert!(world.prune(Look::Note, now + 30 * DAY).unwrap().due.is_empty(), "a dry run was remembered");
    let told = world.prune(Look::Note, now + 40 * DAY).unwrap();
    assert_eq!((objects(&told.due), told.swept), (BTreeMap::from([(Kind::Ref, 2)]), false));
    assert_eq!(world.store.names(), before);
    // What is not deleted still leads somewhere: its objects are not garbage yet, whatever was looked at.
    world.prune(Look::Sweep, now + 50 * DAY).unwrap();
    assert_eq!(world.store.names().len(), before.len() - 2);
    // The state folder is the memory: without it, the looks start anew.
    fs::remove_dir_all(world.state.path().join("pruner")).unwrap();
    assert!(world.prune(Look::Sweep, now + 60 * DAY).unwrap().due.is_empty());
    assert_eq!(world.store.names().len(), before.len() - 2);
}

#[test]
fn the_second_look_must_lie_apart_even_without_a_grace_period_and_a_clock_set_back_agrees_to_nothing() {
    let world = World::with_versions(4);
    let now = unix_now();
    let prune =
        |now| PrunerOf { grace_s: 0, ..world.pruner_over(Arc::new(world.store.clone()), Look::Sweep, now, 2) }.prune();
    prune(now).unwrap();
    assert!(prune(now + DAY - 1).unwrap().due.is_empty());
    assert!(prune(now - 100 * DAY).unwrap().due.is_empty());
    // The look in the past counts from then on: it is the earliest that is certain.
    assert_eq!(objects(&prune(now + DAY).unwrap().due), BTreeMap::from([(Kind::Ref, 2)]));
}

#[test]
fn what_became_needed_again_between_two_looks_stays() {
    let world = World::with_versions(4);
    let now = unix_now();
    for look in [now, now + 7 * DAY] {
        world.prune(Look::Sweep, look).unwrap();
    }
    // The refs of versions 1 and 2 are gone; their objects wait. A publisher who knows version 2 names it again.
    let world2 = World::with_versions(4);
    world2.prune(Look::Sweep, now).unwrap();
    run(world2.mover().tag(&Wanted::Version(1), &order("prod"))).unwrap();
    world2.prune(Look::Sweep, now + 7 * DAY).unwrap();
    world2.prune(Look::Sweep, now + 14 * DAY).unwrap();
    world2.prune(Look::Sweep, now + 30 * DAY).unwrap();
    assert_eq!(world2.assert_all_named_is_whole(), BTreeSet::from([1, 3, 4]));
}

/// A record of a catalog names a version by its digest, and no ref leads there any more.
#[test]
fn a_pinned_version_stays_whole_when_its_refs_are_gone_and_goes_once_it_is_not_pinned() {
    let world = World::with_versions(4);
    let now = unix_now();
    let (pinned, other) = (world.read("acme/llama@1").unwrap(), world.read("acme/llama@2").unwrap());
    let prune = |day: i64, pins: &[ManifestDigest]| {
        let pruner = world.pruner_over(Arc::new(world.store.clone()), Look::Sweep, now + day * DAY, 2);
        PrunerOf { pins: pins.iter().copied().collect(), ..pruner }.prune()
    };
    for day in [0, 7, 14, 21] {
        assert_eq!(prune(day, &[pinned.digest]).unwrap().versions, 3);
    }
    assert_eq!(code(world.read("acme/llama@1")), Code::NotFound, "its ref is gone");
    world.assert_whole(&pinned);
    let manifest = |of: &Resolved| world.store.get(&names::manifest(of.model_id, of.digest));
    assert!(manifest(&pinned).is_some() && manifest(&other).is_none());
    let selector: ModelSelector = MODEL.parse().unwrap();
    let read = run(world.resolver().resolve(&selector, Some(pinned.digest))).unwrap();
    assert_eq!(read.header.seq, 1, "signature and slots are there too");

    for day in [28, 35] {
        prune(day, &[]).unwrap();
    }
    assert!(manifest(&pinned).is_none());
    let before = world.store.names();
    assert_eq!(code(prune(90, &[pinned.digest])), Code::NotFound, "a pin that leads nowhere stops the prune");
    assert_eq!(world.store.names(), before);
}

#[test]
fn refreshes_do_not_push_versions_out_of_retention() {
    let world = World::with_versions(2);
    run(world.mover().tag(&Wanted::Version(2), &MoveOrder { expires: Expires::At(unix_now() + DAY), ..order(LATEST) }))
        .unwrap();
    for day in 2..30 {
        run(world.mover().refresh(LATEST, Expires::At(unix_now() + day * DAY))).unwrap();
    }
    let report = world.prune(Look::Sweep, unix_now()).unwrap();
    assert_eq!((report.versions, report.waiting.len()), (2, 0));
}

/// A seal at work: objects that no ref names, an object that a lease names.
#[test]
fn a_lease_keeps_what_it_names_and_is_over_a_grace_period_after_it_was_first_seen() {
    let world = World::with_versions(1);
    let (model, now) = (ModelId::of_name(MODEL), unix_now());
    let (leased, free) = (Oid([1; 32]), Oid([2; 32]));
    for oid in [leased, free] {
        world.store.put(&names::data(model, oid), vec![0; 10]);
    }
    world.prune(Look::Sweep, now).unwrap();
    // The lease comes later than the first look, and says that it is from the future.
    let lease = Lease { issued_at: now + 900 * DAY, oids: vec![leased] };
    world.store.put(&names::lease(model, &[5; 16]), lease.encode().unwrap());
    let swept = world.prune(Look::Sweep, now + 7 * DAY).unwrap();
    assert_eq!(objects(&swept.due), BTreeMap::from([(Kind::Data, 1)]));
    assert!(world.store.get(&names::data(model, leased)).is_some());
    assert!(world.store.get(&names::data(model, free)).is_none());
    // First seen on day 7: over on day 14, and what it named waits a grace period of its own.
    let over = world.prune(Look::Sweep, now + 14 * DAY).unwrap();
    assert_eq!(objects(&over.due), BTreeMap::from([(Kind::Lease, 1)]));
    assert_eq!(objects(&over.waiting), BTreeMap::from([(Kind::Data, 1)]));
    world.prune(Look::Sweep, now + 21 * DAY).unwrap();
    assert!(world.store.get(&names::data(model, leased)).is_none());
    world.assert_all_named_is_whole();

    // One that cannot be read may name anything, for as long.
    world.store.put(&names::data(model, free), vec![0; 10]);
    world.prune(Look::Sweep, now + 30 * DAY).unwrap();
    world.store.put(&names::lease(model, &[6; 16]), &b"rubbish"[..]);
    let held = world.prune(Look::Sweep, now + 40 * DAY).unwrap();
    assert!(held.due.is_empty() && held.warnings.len() == 1, "{held:?}");
    // Over on day 47; what it held back counts as garbage from the next look on.
    for look in [50, 57] {
        assert!(world.store.get(&names::data(model, free)).is_some());
        world.prune(Look::Sweep, now + look * DAY).unwrap();
    }
    assert!(world.store.get(&names::data(model, free)).is_none());
}

#[test]
fn a_ref_or_manifest_that_cannot_be_read_or_verified_stops_the_prune() {
    let model = ModelId::of_name(MODEL);
    type Spoil = (&'static str, fn(&World), Code);
    let spoils: [Spoil; 7] = [
        (
            "a foreign ref",
            |w| w.store.put(&names::reference(ModelId::of_name(MODEL), "other", 1), vec![0; 356]),
            Code::RefFormat,
        ),
        (
            "a ref of the old chain",
            |w| {
                let name = names::reference(ModelId::of_name(MODEL), LATEST, 1);
                let mut bytes = w.store.get(&name).unwrap().to_vec();
                bytes[100] ^= 1;
                w.store.put(&name, bytes);
            },
            Code::Fork,
        ),
        (
            "a hole in the chain",
            |w| run(w.store.delete(&names::reference(ModelId::of_name(MODEL), LATEST, 2))).unwrap(),
            Code::Fork,
        ),
        (
            "a ref far ahead",
            |w| w.store.put(&names::reference(ModelId::of_name(MODEL), LATEST, 900), vec![0; 356]),
            Code::Fork,
        ),
        (
            "a manifest",
            |w| {
                let read = w.read(MODEL).unwrap();
                w.store.put(&names::manifest(read.model_id, read.digest), vec![0; read.manifest_bytes.len()]);
            },
            Code::ManDigest,
        ),
        (
            "a manifest that is gone",
            |w| {
                let read = w.read("acme/llama@3").unwrap();
                run(w.store.delete(&names::manifest(read.model_id, read.digest))).unwrap();
            },
            Code::NotFound,
        ),
        (
            "slots that are gone",
            |w| {
                let read = w.read(MODEL).unwrap();
                run(w.store.delete(&names::slots(read.model_id, read.header.vid, 1))).unwrap();
            },
            Code::NotFound,
        ),
    ];
    for (what, spoil, wanted) in spoils {
        let world = World::with_versions(4);
        let now = unix_now();
        world.prune(Look::Sweep, now).unwrap();
        spoil(&world);
        let before = world.store.names();
        let stopped = world.prune(Look::Sweep, now + 30 * DAY);
        assert_eq!(code(stopped), wanted, "{what}");
        assert_eq!(world.store.names(), before, "{what}");
    }
    // Keys for none of the versions kept.
    let world = World::with_versions(2);
    let mut options = world.options();
    options.keys = Arc::new(RawKey(2));
    world.seal_with(options);
    assert_eq!(code(world.prune(Look::Sweep, unix_now())), Code::NoKey);
    // A model without refs may be a seal at work.
    let empty = World::new();
    empty.store.put(&names::data(model, Oid([1; 32])), vec![0; 10]);
    assert_eq!(code(empty.prune(Look::Sweep, unix_now())), Code::NotFound);
}

/// What a store hides must not look like garbage to those who have seen it.
#[test]
fn a_store_that_went_back_or_hides_a_tag_is_not_pruned() {
    let world = World::with_versions(4);
    let now = unix_now();
    world.tag(1, "prod").unwrap();
    world.seq("acme/llama@prod").unwrap();
    world.seq(MODEL).unwrap();
    world.prune(Look::Sweep, now).unwrap();
    let prod = world.store.get(&names::reference(ModelId::of_name(MODEL), "prod", 1)).unwrap();
    for name in world.store.names() {
        if name.contains("/r/prod/") {
            run(world.store.delete(&name)).unwrap();
        }
    }
    assert_eq!(code(world.prune(Look::Sweep, now + 30 * DAY)), Code::Rollback);
    world.store.put(&names::reference(ModelId::of_name(MODEL), "prod", 1), prod);
    for name in world.store.names() {
        if name.ends_with("/r/latest/head") || name.ends_with("/r/latest/00000000000000000004") {
            run(world.store.delete(&name)).unwrap();
        }
    }
    assert_eq!(code(world.prune(Look::Sweep, now + 60 * DAY)), Code::Rollback);
}

#[test]
fn things_that_this_format_does_not_have_are_counted_and_left_alone() {
    let world = World::with_versions(1);
    let model = ModelId::of_name(MODEL);
    let strange = [
        format!("{model}/README"),
        format!("{model}/d/not-an-oid"),
        format!("{model}/d/{}/deeper", hex::encode([1; 32])),
        format!("{model}/r/latest/1"),
        format!("{model}/l/short"),
        format!("{model}/x/{}", hex::encode([1; 32])),
    ];
    strange.iter().for_each(|name| world.store.put(name, vec![0; 3]));
    world.store.put("elsewhere/file", vec![0; 3]);
    for look in 0..4 {
        let report = world.prune(Look::Sweep, unix_now() + look * 30 * DAY).unwrap();
        assert_eq!(report.strange, strange.len());
    }
    for name in strange.iter().map(String::as_str).chain(["elsewhere/file"]) {
        assert!(world.store.get(name).is_some(), "{name}");
    }
}

#[test]
fn an_old_version_whose_key_is_lost_goes_by_its_ref_first() {
    let world = World::new();
    let mut options = world.options();
    options.keys = Arc::new(RawKey(2));
    world.seal_with(options);
    world.seal();
    world.seal();
    let now = unix_now();
    let first = world.prune(Look::Sweep, now).unwrap();
    assert_eq!((first.due.len(), first.warnings.len()), (0, 1), "{first:?}");
    for week in 1..=2 {
        world.prune(Look::Sweep, now + week * 7 * DAY).unwrap();
    }
    assert_eq!(world.assert_all_named_is_whole(), BTreeSet::from([2, 3]));
    let last = world.prune(Look::Sweep, now + 30 * DAY).unwrap();
    assert_eq!(last.needed.objects as usize, world.store.names().len());
}

#[test]
fn whatever_write_of_a_prune_dies_all_that_is_named_is_whole_and_the_next_prune_ends_it() {
    let now = unix_now();
    let prepare = || {
        let world = World::with_versions(5);
        world.tag(1, "prod").unwrap();
        world.tag(2, "prod").unwrap();
        world.tag(5, "prod").unwrap();
        for week in 0..2 {
            world.prune(Look::Sweep, now + week * 7 * DAY).unwrap();
            world.seal();
        }
        world.prune(Look::Note, now + 14 * DAY).unwrap();
        world
    };
    let over = |world: &World, store: &Faulty<MemoryStore>| {
        world.pruner_over(Arc::new(store.clone()), Look::Sweep, now + 21 * DAY, 2).prune()
    };
    let world = prepare();
    let counted = Faulty::new(world.store.clone());
    let report = over(&world, &counted).unwrap();
    assert!(report.due.contains_key(&Kind::Ref) && report.due.contains_key(&Kind::Data), "{report:?}");
    let writes = counted.writes();
    for write in 0..writes {
        for side in [Death::Before, Death::After] {
            let world = prepare();
            let faulty = Faulty::new(world.store.clone());
            faulty.die_at_write(write, side);
            over(&world, &faulty).unwrap_err();
            let named = world.assert_all_named_is_whole();
            assert!(named.is_superset(&BTreeSet::from([2, 5, 6, 7])), "{named:?} after write {write} {side:?}");
            for week in 4..8 {
                world.prune(Look::Sweep, now + week * 7 * DAY).unwrap();
            }
            assert_eq!(world.assert_all_named_is_whole(), BTreeSet::from([2, 5, 6, 7]));
            let last = world.prune(Look::Sweep, now + 90 * DAY).unwrap();
            assert_eq!(last.needed.objects as usize, world.store.names().len(), "{last:?}");
        }
    }
}

/// The check that the histories below rest on can fail.
#[test]
#[should_panic(expected = "of version 2")]
fn an_object_that_a_named_version_lacks_is_found() {
    let world = World::with_versions(2);
    for name in world.store.names().iter().filter(|name| name.contains("/d/")) {
        run(world.store.delete(name)).unwrap();
    }
    world.assert_all_named_is_whole();
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// Histories of seals, seals that die, tags, rollbacks, prunes, prunes that die, and seals and tags beside a prune.
#[test]
fn a_prune_never_removes_what_a_reader_can_still_name_whatever_the_history() {
    let base = std::env::var("MODELFS_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let random = || u64::from_le_bytes(Secret::<8>::random().expose().to_owned());
    let seeds: Vec<u64> = match base {
        Some(seed) => vec![seed],
        None => (0..6).map(|_| random() >> 1).collect(),
    };
    for seed in seeds {
        println!("MODELFS_TEST_SEED={seed}");
        history(seed);
    }
}

fn history(seed: u64) {
    let mut dice = Dice(seed);
    let world = World::with_versions(1);
    let mut now = unix_now();
    // What each channel named, in order: the model that the store is compared with.
    let mut said: BTreeMap<String, Vec<u64>> = BTreeMap::from([(LATEST.to_owned(), vec![1])]);
    const KEPT: usize = 2;
    for _ in 0..40 {
        now += (dice.roll(5) as i64) * DAY;
        let store = Faulty::new(world.store.clone());
        let shared: Arc<dyn ChunkSink> = Arc::new(store.clone());
        let channel = ["latest", "prod", "canary"][dice.roll(3) as usize].to_owned();
        let known: Vec<u64> = said.values().flatten().copied().collect();
        let wanted = known[dice.roll(known.len() as u64) as usize];
        match dice.roll(8) {
            0 | 1 => {
                let seq = world.seal();
                said.get_mut(LATEST).unwrap().push(seq);
            }
            2 => {
                world.write_files(dice.roll(1000));
                store.die_at_write(dice.roll(12) as u32, Death::Before);
                let _ = run(seal(world.source.path(), shared, MODEL, world.options()));
                follow(&world, &mut said);
            }
            3 => match world.tag(wanted, &channel) {
                Ok(moved) if moved.written => said.entry(channel).or_default().push(wanted),
                Ok(_) => {}
                // Pruned.
                Err(err) => assert_eq!(err.code(), Code::NotFound, "{err:?}"),
            },
            4 => {
                store.die_at_write(dice.roll(30) as u32, if dice.roll(2) == 0 { Death::Before } else { Death::After });
                let _ = world.pruner_over(shared, Look::Sweep, now, KEPT).prune();
            }
            5 => {
                let pruner = world.pruner_over(shared, Look::Sweep, now, KEPT);
                let mover = world.mover();
                let (wants, order) = (Wanted::Version(wanted), order(&channel));
                let (pruned, moved) = run(async { futures::join!(pruner.pruned(), mover.tag(&wants, &order)) });
                // A ref may go between the listing and the read; then the next look goes on.
                if let Err(err) = pruned {
                    assert!(matches!(err.code(), Code::Fork | Code::NotFound), "{err:?}");
                }
                if let Err(err) = moved {
                    assert!(matches!(err.code(), Code::NotFound), "{err:?}");
                }
                follow(&world, &mut said);
            }
            6 => {
                world.write_files(dice.roll(1000));
                let pruner = world.pruner_over(shared, Look::Sweep, now, KEPT);
                let sealing = seal(world.source.path(), Arc::new(world.store.clone()), MODEL, world.options());
                let (pruned, sealed) = run(async { futures::join!(pruner.pruned(), sealing) });
                pruned.unwrap();
                sealed.unwrap();
                follow(&world, &mut said);
            }
            _ => {
                world.pruner_over(shared, Look::Sweep, now, KEPT).prune().unwrap();
            }
        }
        let named = world.assert_all_named_is_whole();
        for (channel, history) in &said {
            assert_eq!(world.seq(&format!("{MODEL}@{channel}")).unwrap(), *history.last().unwrap(), "seed {seed}");
            let mut newest: Vec<u64> = Vec::new();
            for &seq in history.iter().rev() {
                if !newest.contains(&seq) && newest.len() < KEPT {
                    newest.push(seq);
                }
            }
            assert!(newest.iter().all(|seq| named.contains(seq)), "{channel} lost one of {newest:?}, seed {seed}");
        }
    }
    // When all is quiet, nothing is left that is not needed.
    for _ in 0..5 {
        now += 8 * DAY;
        world.pruner_over(Arc::new(world.store.clone()), Look::Sweep, now, KEPT).prune().unwrap();
    }
    let last = world.pruner_over(Arc::new(world.store.clone()), Look::Sweep, now, KEPT).prune().unwrap();
    assert!(last.waiting.is_empty() && last.due.is_empty(), "{last:?}, seed {seed}");
    assert_eq!(last.needed.objects as usize, names_of_model(&world.store), "seed {seed}");
    world.assert_all_named_is_whole();
}

fn names_of_model(store: &MemoryStore) -> usize {
    store.names().iter().filter(|name| !name.starts_with("probe/")).count()
}

/// After something whose end is not known: what the channels say now is what they say.
fn follow(world: &World, said: &mut BTreeMap<String, Vec<u64>>) {
    for channel in run(world.resolver().channels(MODEL)).unwrap() {
        let seq = world.seq(&format!("{MODEL}@{channel}")).unwrap();
        let history = said.entry(channel).or_default();
        if history.last() != Some(&seq) {
            history.push(seq);
        }
    }
}

// The floor outside the machine.

/// A pin in memory, which may be away.
#[derive(Debug, Default)]
struct FakePin {
    floors: std::sync::Mutex<BTreeMap<String, RefFloor>>,
    away: std::sync::atomic::AtomicBool,
    asked: std::sync::atomic::AtomicUsize,
}

impl FakePin {
    fn ask(&self) -> Result<std::sync::MutexGuard<'_, BTreeMap<String, RefFloor>>> {
        self.asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if self.away.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Error::new(Code::VaultSealed, "away"));
        }
        Ok(self.floors.lock().unwrap())
    }
}

fn key(at: FloorPlace<'_>) -> String {
    format!("{} {} {}", at.store, at.model, at.channel)
}

impl FloorPin for FakePin {
    fn load(&self, at: FloorPlace<'_>) -> Result<Option<RefFloor>> {
        Ok(self.ask()?.get(&key(at)).cloned())
    }

    fn advance(&self, at: FloorPlace<'_>, floor: &RefFloor) -> Result<()> {
        let mut floors = self.ask()?;
        let merged = match floors.get(&key(at)) {
            Some(known) => known.clone().merged(floor)?,
            None => floor.clone(),
        };
        floors.insert(key(at), merged);
        Ok(())
    }

    fn reset(&self, at: FloorPlace<'_>) -> Result<()> {
        self.ask()?.remove(&key(at));
        Ok(())
    }
}

/// A publisher that pins, and readers without memory.
fn pinned_world() -> (World, Arc<FakePin>) {
    let mut world = World::new();
    let pin = Arc::new(FakePin::default());
    world.floors = FloorStore::new(&world.state.path().join("fresh")).pinned(pin.clone(), false);
    for _ in 0..2 {
        let options = world.options();
        let floors = options.floors.clone().map(|floors| floors.pinned(pin.clone(), false));
        world.seal_with(SealOptions { floors, ..options });
    }
    (world, pin)
}

#[test]
fn a_machine_without_memory_refuses_a_rollback_by_the_pin_that_the_publisher_raised() {
    let (world, pin) = pinned_world();
    assert_eq!(pin.floors.lock().unwrap().values().next().unwrap().max_ref_seq, 2);
    for name in world.store.names() {
        if name.ends_with("/head") || name.ends_with("/r/latest/00000000000000000002") {
            run(world.store.delete(&name)).unwrap();
        }
    }
    assert_eq!(code(world.read(MODEL)), Code::Rollback);
    // Without the pin nobody here would know.
    let mut naive = world;
    naive.floors = FloorStore::new(&naive.state.path().join("naive"));
    assert_eq!(naive.seq(MODEL).unwrap(), 1);
}

#[test]
fn a_pin_that_is_away_is_a_warning_unless_it_is_required_and_readers_do_not_write_it() {
    let (mut world, pin) = pinned_world();
    let before = pin.floors.lock().unwrap().clone();
    assert_eq!(world.seq(MODEL).unwrap(), 2);
    assert_eq!(*pin.floors.lock().unwrap(), before, "a reader wrote the pin");
    for tag in ["prod", "canary"] {
        world.tag(1, tag).unwrap();
    }
    pin.away.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(world.seq(MODEL).unwrap(), 2);
    // A number is judged by all tags: each question may take its whole time.
    let asked = || pin.asked.load(std::sync::atomic::Ordering::Relaxed);
    let before = asked();
    assert_eq!(world.seq("acme/llama@1").unwrap(), 1);
    assert_eq!(asked() - before, 1);
    world.floors = FloorStore::new(&world.state.path().join("fresh")).pinned(pin.clone(), true);
    assert_eq!(code(world.read(MODEL)), Code::VaultSealed);
    // Of several at once each has its own.
    pin.away.store(false, std::sync::atomic::Ordering::Relaxed);
    let model = ModelId::of_name(MODEL);
    let tags: Vec<String> = (0..20).map(|n| format!("t{n}")).collect();
    for (tag, ref_seq) in tags.iter().zip(1..) {
        let floor = RefFloor { max_ref_seq: ref_seq, channel: tag.clone(), ..RefFloor::default() };
        pin.advance(FloorPlace { store: "s", model, channel: tag }, &floor).unwrap();
    }
    let floors = world.floors.load_all("s", model, &tags).unwrap();
    assert_eq!(
        floors.into_iter().map(|floor| floor.unwrap().max_ref_seq).collect::<Vec<_>>(),
        (1..21).collect::<Vec<_>>()
    );
}

/// A publisher that pins and has seen nothing yet, as a job in a fresh container is.
fn pinning_mover<'a>(world: &'a World, pin: &Arc<FakePin>, memory: &str) -> Mover<'a> {
    let mut mover = world.mover();
    let floors = FloorStore::new(&world.state.path().join(memory));
    mover.releaser.chain.floors = Some(floors.pinned(pin.clone(), false));
    mover
}

/// A ref stands from its creation on: who dies then, or cannot ask Vault then, has published.
#[test]
fn a_floor_that_was_not_raised_is_told_and_the_same_command_raises_it() {
    let (world, pin) = pinned_world();
    let away = |away| pin.away.store(away, std::sync::atomic::Ordering::Relaxed);
    let pinned = |channel: &str| {
        let floors = pin.floors.lock().unwrap();
        floors.values().find(|floor| floor.channel == channel).map(|floor| floor.max_ref_seq)
    };
    away(true);
    let moved = run(pinning_mover(&world, &pin, "one").tag(&Wanted::Version(1), &order("prod"))).unwrap();
    let told = moved.unraised.expect("the pin is away");
    assert!(moved.written && told.code() == Code::VaultSealed, "{told:?}");
    assert!(told.message().contains("`modelfs floor memory: acme/llama --raise"), "{told:?}");
    let options = SealOptions { floors: pinning_mover(&world, &pin, "one").releaser.chain.floors, ..world.options() };
    world.write_files(99);
    let sealed = run(seal(world.source.path(), Arc::new(world.store.clone()), MODEL, options)).unwrap();
    assert!(!sealed.floor_raised && sealed.warnings.iter().any(|told| told.contains("--raise")), "{sealed:?}");
    away(false);
    assert_eq!((pinned("prod"), pinned(LATEST)), (None, Some(2)));

    let again = run(pinning_mover(&world, &pin, "two").tag(&Wanted::Version(1), &order("prod"))).unwrap();
    assert!(!again.written && again.unraised.is_none());
    let refreshed = run(pinning_mover(&world, &pin, "three").refresh(LATEST, Expires::AsBefore)).unwrap();
    assert!(!refreshed.written && refreshed.unraised.is_none());
    assert_eq!((pinned("prod"), pinned(LATEST)), (Some(1), Some(3)));
}

#[test]
fn a_machine_that_cannot_remember_is_not_told_to_raise_what_is_raised() {
    let (world, pin) = pinned_world();
    let reference = world.read(MODEL).unwrap().reference.unwrap();
    // No folder can be made where a file lies, whoever asks.
    fs::write(world.state.path().join("file"), b"").unwrap();
    let told = pinning_mover(&world, &pin, "file").releaser.chain.remember(LATEST, &reference).unwrap_err();
    assert_eq!(told.code(), Code::State, "{told:?}");
    assert!(told.message().contains("does not remember it") && !told.message().contains("--raise"), "{told:?}");
}

#[test]
fn a_pin_and_a_memory_that_saw_different_refs_of_one_number_are_a_fork() {
    let (world, pin) = pinned_world();
    world.seq(MODEL).unwrap();
    pin.floors.lock().unwrap().values_mut().for_each(|floor| floor.ref_digest = hex::encode([9; 32]));
    assert_eq!(code(world.read(MODEL)), Code::Fork);
    // A pin that is behind is no lower floor: the higher of both counts.
    pin.floors.lock().unwrap().values_mut().for_each(|floor| floor.max_ref_seq = 1);
    assert_eq!(world.seq(MODEL).unwrap(), 2);
}

/// Drill 4 of docs/RECOVERY.md: a snapshot of the pin's server is restored, and the store goes back with it.
#[test]
fn after_the_pin_was_restored_from_a_snapshot_memories_still_refuse_and_raise_it_again() {
    let (mut world, pin) = pinned_world();
    let snapshot = |world: &World| {
        world.store.names().iter().map(|name| (name.clone(), world.store.get(name).unwrap())).collect::<Vec<_>>()
    };
    let memory = FloorStore::new(&world.state.path().join("memory")).pinned(pin.clone(), true);
    let fresh = |world: &World, name: &str| FloorStore::new(&world.state.path().join(name)).pinned(pin.clone(), true);
    world.floors = memory.clone();
    assert_eq!(world.seq(MODEL).unwrap(), 2);
    let newest = snapshot(&world);

    // Both go back to the first version.
    let model = ModelId::of_name(MODEL);
    let first = Ref::parse(&world.store.get(&names::reference(model, LATEST, 1)).unwrap()).unwrap().0;
    pin.floors.lock().unwrap().clear();
    FloorStore::new(&world.state.path().join("then"))
        .pinned(pin.clone(), true)
        .raise("memory:", (model, MODEL), LATEST, &first, (first.vid, 1))
        .unwrap();
    for name in world.store.names() {
        if name.ends_with("/head") || name.ends_with("/r/latest/00000000000000000002") {
            run(world.store.delete(&name)).unwrap();
        }
    }
    assert_eq!(code(world.read(MODEL)), Code::Rollback, "who remembers refuses");
    world.floors = fresh(&world, "pod-1");
    assert_eq!(world.seq(MODEL).unwrap(), 1, "who does not goes by the pin, which went back");

    // Any machine that remembers raises it: `modelfs floor STORE MODEL --raise`.
    assert!(memory.raise_pin("memory:", model, LATEST).unwrap());
    world.floors = fresh(&world, "pod-2");
    assert_eq!(code(world.read(MODEL)), Code::Rollback);
    newest.into_iter().for_each(|(name, bytes)| world.store.put(&name, bytes));
    assert_eq!(world.seq(MODEL).unwrap(), 2);
    // So does the next publish.
    pin.floors.lock().unwrap().clear();
    let options = world.options();
    let floors = options.floors.clone().map(|floors| floors.pinned(pin.clone(), false));
    assert_eq!(world.seal_with(SealOptions { floors, ..options }), 3);
    assert_eq!(pin.floors.lock().unwrap().values().next().unwrap().max_ref_seq, 3);
}
