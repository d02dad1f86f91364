//! Slots added, removed, replaced and rewrapped: the next generation of a version's slots, and its signed demand.
//!
//! Order: the new slots are opened before they are written; written (create-only) as the next generation; read back; every
//! channel that names the version asks for that generation; then the older ones are deleted. Readers take the newest
//! generation there is, so they see the old one or the new one.
//! A replacement that somebody else has to follow, a record of a catalog for one, is two edits: with both keys between them.
//! Promises: the last slot stays; what is left opens with a key of whoever removes; of two editors at once both edits are
//! made; an edit that is made already only finishes what an earlier run left.
//! Held by: tests/rotate.rs.

use std::sync::Arc;

use serde::Serialize;

use super::{Keys, Place, RACES_MAX, Rotator};
use crate::crypto::Dek;
use crate::error::{Class, Code, Error, Result};
use crate::format::limits::{SLOT_LABEL_BYTES_MAX, SLOTS_MAX};
use crate::format::{
    KeyId, ManifestDigest, ManifestHeader, Slot, SlotKind, SlotParams, Slots, Vid, check_label, names,
};
use crate::keys::{Candidate, KeySource, Raised, Resolved, Wanted, free_label};
use crate::refuse;
use crate::seal::{Appended, RefTarget, blocking, create};

/// Moves a wrapped key to the newest version of the key that wraps it, without showing it: Vault's transit engine.
pub trait Rewrap: Send + Sync {
    /// `wrapped` is `vault:vN:...`; so is the answer. May block.
    ///
    /// # Errors
    /// What the service says: of class `Unreachable` if it cannot be asked, else that this one is not to be had.
    fn rewrap(&self, context: &[u8; 32], wrapped: &str) -> Result<String>;
}

/// What shall become of the slots of a version.
#[derive(Clone)]
pub enum Edit {
    /// A slot for each source of `new`, beside those that are there. `label` is for a single one.
    Add { keys: Keys, new: Keys, label: Option<String> },
    /// No slot with this label.
    Remove { keys: Keys, label: String },
    /// Slots for `new` in the place of all that `keys` opens.
    Replace { keys: Keys, new: Keys, label: Option<String> },
    /// The first half of `Replace`, which is the second: slots for `new` beside all that `keys` opens, for whoever has to learn
    /// of the new key while the old one still opens. Where a new slot is to have the label of an old one it has `-next` behind it
    /// until the second half.
    Prepare { keys: Keys, new: Keys, label: Option<String> },
    /// Each transit slot, or the one with this label, under the newest version of its key in Vault. Needs no key and opens
    /// nothing.
    Rewrap { vault: Arc<dyn Rewrap>, label: Option<String> },
}

/// What became of an edit.
#[derive(Debug, Clone, Serialize)]
pub struct Edited {
    pub version: u64,
    pub manifest: ManifestDigest,
    pub vid: Vid,
    /// The generation that counts now.
    pub generation: u32,
    /// False: the slots were as wanted already.
    pub written: bool,
    /// Nothing was to be changed, but what an earlier run left undone was done.
    pub finished: bool,
    pub added: Vec<String>,
    pub removed: Vec<String>,
    /// Slots whose transit version rose: label, from, to.
    pub rewrapped: Vec<(String, u32, u32)>,
    /// Slots that Vault did not rewrap: they open with the old version of their key alone.
    pub refused: Vec<String>,
    /// Why the first of them was not.
    #[serde(skip)]
    pub refusal: Option<Error>,
    /// The refs written: channel and number.
    pub refs: Vec<(String, u64)>,
    /// False: the slots are in force, and why the floor is not raised to that is among the warnings.
    pub floor_raised: bool,
    pub warnings: Vec<String>,
}

/// The next slots, opened already where that can be.
#[derive(Default)]
struct Draft {
    slots: Vec<Slot>,
    added: Vec<String>,
    removed: Vec<String>,
    rewrapped: Vec<(String, u32, u32)>,
    refused: Vec<(String, Error)>,
    warnings: Vec<String>,
}

enum Plan {
    Change(Draft),
    /// The slots are as wanted, but for what was refused; `unless_finished` is the refusal if there was nothing left undone
    /// either.
    Nothing {
        unless_finished: Option<Error>,
        refused: Vec<(String, Error)>,
    },
}

/// What became of one try.
enum Outcome {
    /// With why it may be a mistake that nothing was to be done.
    Edited(Box<Edited>, Option<Error>),
    /// Somebody else wrote the next generation first.
    Lost,
    /// Ours was written, and another generation came after it: that was most likely built on it.
    Replaced(Box<Edited>),
}

impl Plan {
    fn done() -> Plan {
        Plan::Nothing { unless_finished: None, refused: Vec::new() }
    }
}

impl Rotator<'_> {
    /// Edits the slots of the version that `wanted` names.
    ///
    /// # Errors
    /// What a reader of that version would be told. `NO_KEY` if the keys do not open it; `USAGE` for a label that is taken,
    /// for the last slot, for a rest that the keys given do not open; `NOT_FOUND` for a label (or, rewrapping, a kind)
    /// that no slot has. What the new key, the signers and the store say; then the slots are the old or the new ones.
    pub async fn edit(&self, wanted: &Wanted, edit: &Edit) -> Result<Edited> {
        self.edit_at(Place::Wanted(wanted), edit).await
    }

    /// The same of a version that a listing found.
    ///
    /// # Errors
    /// As [`Rotator::edit`].
    pub async fn edit_found(&self, candidate: &Candidate, edit: &Edit) -> Result<Edited> {
        self.edit_at(Place::Candidate(candidate), edit).await
    }

    async fn edit_at(&self, place: Place<'_>, edit: &Edit) -> Result<Edited> {
        let mut replaced: Option<(Slots, Edited)> = None;
        for _ in 0..RACES_MAX {
            let version = self.find(place).await?;
            if let (Some((before, _)), Edit::Remove { label, .. }) = (&replaced, edit) {
                check_same_slot(before, &version.slots, label)?;
            }
            match self.edit_version(&version, edit).await? {
                // Somebody built on what we wrote before we had looked at it: the edit was made, and is no mistake.
                Outcome::Edited(last, refusal) if !last.written => match (replaced, refusal) {
                    (Some((_, ours)), _) => return Ok(ours.stands_in(*last)),
                    (None, Some(refusal)) => return Err(refusal),
                    (None, None) => return Ok(*last),
                },
                Outcome::Edited(edited, _) => return Ok(*edited),
                Outcome::Lost => {}
                Outcome::Replaced(ours) => replaced = Some((version.slots, *ours)),
            }
        }
        refuse!(Exists, "others edited the slots of {} first {RACES_MAX} times in a row; try again later", self.name());
    }

    async fn edit_version(&self, version: &Resolved, edit: &Edit) -> Result<Outcome> {
        let (before, header) = (version.slots.clone(), version.header);
        let planned = edit.clone();
        let plan = blocking(move || planned.plan(&before, &header)).await?;
        let mut edited = Edited {
            version: version.header.seq,
            manifest: version.digest,
            vid: version.header.vid,
            generation: version.slots.generation,
            written: false,
            finished: false,
            added: Vec::new(),
            removed: Vec::new(),
            rewrapped: Vec::new(),
            refused: Vec::new(),
            refusal: None,
            refs: Vec::new(),
            floor_raised: true,
            warnings: Vec::new(),
        };
        let mut refusal = None;
        match plan {
            Plan::Change(draft) => {
                let written = self.write(version, draft.slots).await;
                edited.written = true;
                (edited.added, edited.removed, edited.rewrapped) = (draft.added, draft.removed, draft.rewrapped);
                edited.warnings = draft.warnings;
                edited.refuse(draft.refused);
                edited.generation = match written {
                    Ok(Some(generation)) => generation,
                    Ok(None) => return Ok(Outcome::Replaced(Box::new(edited))),
                    Err(lost) if lost.code() == Code::Exists => return Ok(Outcome::Lost),
                    Err(other) => return Err(other),
                };
            }
            Plan::Nothing { unless_finished, refused } => {
                refusal = unless_finished;
                edited.refuse(refused);
            }
        }
        self.demand(version, &mut edited).await?;
        let deleted = self.delete_older(edited.vid, edited.generation, &mut edited.warnings).await?;
        edited.finished = !edited.written && (deleted || !edited.refs.is_empty());
        let refusal = refusal.filter(|_| !edited.finished);
        Ok(Outcome::Edited(Box::new(edited), refusal))
    }

    /// Writes the generation after that of `version`, and looks at it as a reader will. `None`: a newer one is there already.
    async fn write(&self, version: &Resolved, slots: Vec<Slot>) -> Result<Option<u32>> {
        let chain = &self.releaser.chain;
        chain.store.check_create_only().await?;
        let Some(generation) = version.slots.generation.checked_add(1) else {
            refuse!(SlotsLimit, "the highest generation of slots has been used");
        };
        let made = Slots { generation, slots, ..version.slots.clone() };
        let name = names::slots(chain.model_id, made.vid, generation);
        create(&*chain.store, &name, made.encode()?.into()).await?;
        let there = chain.read_slots(made.vid, generation).await;
        // Looked for afterwards: what replaced ours before we could read it is there then.
        let newest = chain.slots_generations(made.vid).await.map(|mut all| all.pop());
        let refusal = match (there, newest) {
            (Ok(there), Ok(newest)) if newest == Some(generation) && there == made => {
                return Ok(Some(generation));
            }
            // Another editor is through already, and most likely built on ours. Or our number had been used and deleted while
            // we looked elsewhere, and ours counts for nothing. What is there now decides.
            (Ok(there), Ok(newest)) if there == made && newest > Some(generation) => {
                // Whoever built on it deletes it as well; in a number that had been used it would stay, with whom it lets in.
                let _ = chain.store.delete(&name).await;
                return Ok(None);
            }
            (Err(gone), Ok(newest)) if gone.code() == Code::NotFound && newest > Some(generation) => {
                return Ok(None);
            }
            (Ok(_), Ok(_)) => Error::new(
                Code::SlotsFormat,
                format!("slots generation {generation} is not what was written; the one before it stays in force"),
            ),
            // The store may only be away: what was written was well-formed, so it is left for the next run.
            (Err(lost), _) | (_, Err(lost)) if lost.class() == Class::Unreachable => return Err(lost),
            (Err(bad), _) | (_, Err(bad)) => {
                bad.context("the new slots cannot be read back; the ones before stay in force")
            }
        };
        if let Err(failed) = chain.store.delete(&name).await {
            tracing::error!(%failed, name, "slots that are not to be used stay behind; delete them by hand");
        }
        Err(refusal)
    }

    /// Makes every channel that names the version ask for the generation of `edited`. A version that none names is remembered
    /// here only.
    async fn demand(&self, version: &Resolved, edited: &mut Edited) -> Result<()> {
        let generation = edited.generation;
        for _ in 0..RACES_MAX {
            let naming = self.naming(version.digest, &mut edited.warnings).await?;
            if naming.is_empty() {
                let remembered = self.remember(version, generation).await;
                edited
                    .floor(remembered.err().map(|failed| failed.context("the new generation is not remembered here")));
            }
            let mut lost = false;
            for (channel, head) in &naming {
                if head.min_slots_generation >= generation {
                    // Whoever wrote it may have died before it raised the floor.
                    if !edited.refs.iter().any(|(written, _)| written == channel) {
                        edited.floor(self.releaser.chain.remember(channel, head).err());
                    }
                    continue;
                }
                let target = RefTarget { min_slots_generation: generation, ..RefTarget::of(head) };
                match self.releaser.append(channel, Some(head), &target).await {
                    Ok(Appended { reference, unraised }) => {
                        edited.refs.push((channel.clone(), reference.ref_seq));
                        edited.floor(unraised);
                    }
                    Err(first) if first.code() == Code::Exists => lost = true,
                    Err(other) => return Err(other),
                }
            }
            if !lost {
                return Ok(());
            }
        }
        refuse!(Exists, "others moved tags of {} first {RACES_MAX} times in a row; try again later", self.name());
    }

    async fn remember(&self, version: &Resolved, generation: u32) -> Result<()> {
        let chain = &self.releaser.chain;
        let (Some(floors), Some(channel)) = (&chain.floors, &version.channel) else { return Ok(()) };
        let head = self.resolver().newest_ref(self.name(), channel).await?;
        let (store, model) = (chain.store.describe(), (chain.model_id, self.name()));
        match floors.raise(&store, model, channel, &head, (version.header.vid, generation))? {
            Raised::Everywhere => Ok(()),
            Raised::InPinOnly(failed) => Err(failed),
        }
    }

    /// Whether there was one. What cannot be deleted is told: nobody who sees the refs accepts it.
    async fn delete_older(&self, vid: Vid, generation: u32, warnings: &mut Vec<String>) -> Result<bool> {
        let chain = &self.releaser.chain;
        let mut deleted = false;
        for old in chain.slots_generations(vid).await?.into_iter().filter(|&old| old < generation) {
            match chain.store.delete(&names::slots(chain.model_id, vid, old)).await {
                Ok(()) => deleted = true,
                Err(failed) => warnings.push(format!(
                    "slots generation {old} could not be deleted, whoever may read the store can still copy it: {}",
                    failed.chain()
                )),
            }
        }
        Ok(deleted)
    }
}

impl Edited {
    /// What both halves of a replacement did: this one, which prepared it, and `last`.
    pub fn followed_by(self, last: Edited) -> Edited {
        let mut warnings = self.warnings;
        warnings.extend(last.warnings.iter().filter(|told| !warnings.contains(told)).cloned().collect::<Vec<_>>());
        let mut refs = self.refs;
        refs.retain(|(channel, _)| !last.refs.iter().any(|(again, _)| again == channel));
        refs.extend(last.refs);
        let written = self.written || last.written;
        let kept =
            self.added.iter().filter(|label| !last.removed.contains(label) && !last.added.contains(label)).cloned();
        Edited {
            written,
            finished: !written && (self.finished || last.finished),
            added: last.added.iter().cloned().chain(kept).collect(),
            // What was only there between the two nobody has seen before.
            removed: last.removed.into_iter().filter(|label| !self.added.contains(label)).collect(),
            refs,
            floor_raised: self.floor_raised && last.floor_raised,
            warnings,
            ..last
        }
    }

    /// What we changed, as it stands after others went on from it.
    fn stands_in(self, last: Edited) -> Edited {
        let mut warnings = self.warnings;
        warnings.extend(last.warnings.iter().filter(|told| !warnings.contains(told)).cloned().collect::<Vec<_>>());
        let (added, removed, rewrapped) = (self.added, self.removed, self.rewrapped);
        let (refused, refusal) = (self.refused, self.refusal);
        Edited { written: true, finished: false, added, removed, rewrapped, refused, refusal, warnings, ..last }
    }

    fn refuse(&mut self, refused: Vec<(String, Error)>) {
        for (label, why) in refused {
            self.warnings.push(format!("slot {label:?} stays as it is: {}", why.chain()));
            self.refused.push(label);
            self.refusal.get_or_insert(why);
        }
    }

    fn floor(&mut self, unraised: Option<Error>) {
        if let Some(failed) = unraised {
            self.floor_raised = false;
            let told = failed.chain();
            if !self.warnings.contains(&told) {
                self.warnings.push(told);
            }
        }
    }
}

impl Edit {
    /// May take seconds, may ask Vault.
    fn plan(&self, slots: &Slots, header: &ManifestHeader) -> Result<Plan> {
        match self {
            Edit::Add { keys, new, label } => add(keys, new, label.as_deref(), slots, header),
            Edit::Remove { keys, label } => remove(keys, label, slots, header),
            Edit::Replace { keys, new, label } => replace(keys, new, label.as_deref(), slots, header),
            Edit::Prepare { keys, new, label } => prepare(keys, new, label.as_deref(), slots, header),
            Edit::Rewrap { vault, label } => rewrap(&**vault, label.as_deref(), slots),
        }
    }
}

/// Whether one of `keys` opens this slot of a version. May take seconds.
///
/// # Errors
/// What reading a key says, or a service that cannot be asked; a slot that merely does not open is none.
pub fn opens(keys: &Keys, slots: &Slots, header: &ManifestHeader, slot: &Slot) -> Result<bool> {
    has_opened(keys.unlock(&alone(slots, slot), header))
}

/// The same, of the source at `number` of `keys` alone.
///
/// # Errors
/// As [`opens`].
pub fn opens_by(keys: &Keys, number: usize, slots: &Slots, header: &ManifestHeader, slot: &Slot) -> Result<bool> {
    has_opened(keys.unlock_source(number, &alone(slots, slot), header))
}

/// These slots with no other than `slot`.
fn alone(slots: &Slots, slot: &Slot) -> Slots {
    Slots { slots: vec![slot.clone()], ..slots.clone() }
}

fn has_opened(tried: Result<Dek>) -> Result<bool> {
    match tried {
        Ok(_) => Ok(true),
        Err(shut) if matches!(shut.code(), Code::DekCommit | Code::SlotCommit | Code::VaultNotFound) => Ok(false),
        // `NO_KEY`, or a service that knows us and does not open this one.
        Err(shut) if shut.class() == Class::Denied => Ok(false),
        Err(other) => Err(other),
    }
}

/// N of a transit slot's `vault:vN:...`.
pub fn transit_version(slot: &Slot) -> Option<u32> {
    if slot.kind() != SlotKind::VaultTransit {
        return None;
    }
    version_of(std::str::from_utf8(&slot.body).ok()?)
}

fn version_of(wrapped: &str) -> Option<u32> {
    wrapped.strip_prefix("vault:v")?.split_once(':')?.0.parse().ok()
}

/// A label that was ours to remove may be another slot's by now: of a recipient who came in meanwhile, for one.
///
/// # Errors
/// `EXISTS`: neither is that slot taken away, nor is it said that the one meant is gone.
fn check_same_slot(before: &Slots, now: &Slots, label: &str) -> Result<()> {
    let other = |slot: &&Slot| slot.label == label && !before.slots.contains(slot);
    if before.vid == now.vid && now.slots.iter().any(|slot| other(&slot)) {
        refuse!(
            Exists,
            "others edited the slots meanwhile, and {label:?} is another slot now; look with `modelfs key list`, then decide"
        );
    }
    Ok(())
}

fn check_label_for(new: &Keys, label: Option<&str>) -> Result<()> {
    if label.is_some() && new.sources().len() > 1 {
        refuse!(Usage, "one label cannot name the slots of {} keys; give one key, or no label", new.sources().len());
    }
    Ok(())
}

/// A slot for the source at `number` of `new`, opened if it can be here.
fn make(
    new: &Keys,
    number: usize,
    label: Option<&str>,
    dek: &Dek,
    taken: &[String],
    (slots, header): (&Slots, &ManifestHeader),
    warnings: &mut Vec<String>,
) -> Result<Slot> {
    let slot = new.wrap_source(number, label, dek, &header.into(), taken)?;
    let source = &new.sources()[number];
    if !source.opens() {
        warnings.push(format!("slot {:?} was made for {source} and not tried: only its holder opens it", slot.label));
    } else {
        new.unlock_source(number, &alone(slots, &slot), header).map_err(|shut| {
            shut.context(format!("the slot made for {source} does not open with it; nothing was changed"))
        })?;
    }
    Ok(slot)
}

/// For each source of `new` the slot among `among` that it would get: one that opens with it, or is sealed to it.
fn standing(
    keys: &Keys,
    new: &Keys,
    among: &[Slot],
    slots: &Slots,
    header: &ManifestHeader,
) -> Result<Vec<Option<usize>>> {
    let find = |number: usize| {
        if new.sources()[number].opens() {
            for (at, slot) in among.iter().enumerate() {
                if has_opened(new.unlock_source(number, &alone(slots, slot), header))? {
                    return Ok(Some(at));
                }
            }
            return Ok(None);
        }
        if !among.iter().any(|slot| sealed_to(slot).is_some()) {
            return Ok(None);
        }
        // Whose public half it is, a slot made for it says.
        let made = new.wrap_source(number, None, &keys.unlock(slots, header)?, &header.into(), &[])?;
        Ok(among.iter().position(|slot| sealed_to(slot) == sealed_to(&made)))
    };
    (0..new.sources().len()).map(find).collect()
}

/// The recipient whose public half a slot is sealed to.
pub(super) fn sealed_to(slot: &Slot) -> Option<KeyId> {
    match slot.params {
        SlotParams::HpkeX25519 { recipient } => Some(recipient),
        _ => None,
    }
}

fn check_count(slots: &[Slot]) -> Result<()> {
    if slots.len() > SLOTS_MAX {
        refuse!(Usage, "the version would have {} slots, at most {SLOTS_MAX} are allowed; remove one", slots.len());
    }
    Ok(())
}

fn labels_of(slots: &[Slot]) -> Vec<String> {
    slots.iter().map(|slot| slot.label.clone()).collect()
}

fn add(keys: &Keys, new: &Keys, label: Option<&str>, slots: &Slots, header: &ManifestHeader) -> Result<Plan> {
    check_label_for(new, label)?;
    // With a label, only the slot that bears it can be the one wanted.
    let bearing = slots.slots.iter().filter(|slot| label.is_none_or(|label| slot.label == label));
    let standing = standing(keys, new, &bearing.cloned().collect::<Vec<_>>(), slots, header)?;
    if standing.iter().all(Option::is_some) {
        return Ok(Plan::done());
    }
    let dek = keys.unlock(slots, header)?;
    let mut draft = Draft { slots: slots.slots.clone(), ..Draft::default() };
    for number in (0..standing.len()).filter(|&number| standing[number].is_none()) {
        let taken = labels_of(&draft.slots);
        let slot = make(new, number, label, &dek, &taken, (slots, header), &mut draft.warnings)?;
        draft.added.push(slot.label.clone());
        draft.slots.push(slot);
    }
    check_count(&draft.slots)?;
    Ok(Plan::Change(draft))
}

fn remove(keys: &Keys, label: &str, slots: &Slots, header: &ManifestHeader) -> Result<Plan> {
    let (gone, stay): (Vec<Slot>, Vec<Slot>) = slots.slots.iter().cloned().partition(|slot| slot.label == label);
    if gone.is_empty() {
        let there = labels_of(&slots.slots).join(", ");
        let refusal =
            Error::new(Code::NotFound, format!("version {} has no slot {label:?}; its slots are {there}", header.seq));
        return Ok(Plan::Nothing { unless_finished: Some(refusal), refused: Vec::new() });
    }
    if stay.is_empty() {
        refuse!(Usage, "{label:?} is the last slot of version {}: nobody could open it; add another first", header.seq);
    }
    keys.unlock(&Slots { slots: stay.clone(), ..slots.clone() }, header).map_err(|shut| match shut.code() {
        Code::NoKey => Error::new(
            Code::Usage,
            format!(
                "without slot {label:?} none of the keys given opens version {}; give --key of one that stays",
                header.seq
            ),
        )
        .with_source(shut),
        _ => shut,
    })?;
    Ok(Plan::Change(Draft { slots: stay, removed: labels_of(&gone), ..Draft::default() }))
}

/// What a replacement finds.
struct Replacing {
    /// The slots that `keys` opens, and all others.
    old: Vec<Slot>,
    stay: Vec<Slot>,
    /// How many of `stay` come before the first of `old`.
    place: usize,
    /// For each source of `new` its slot among `stay`, and what that is to be called in the end.
    standing: Vec<Option<usize>>,
    labels: Vec<String>,
}

/// `None`: it was done before.
fn replacing(
    keys: &Keys,
    new: &Keys,
    label: Option<&str>,
    slots: &Slots,
    header: &ManifestHeader,
) -> Result<Option<Replacing>> {
    check_label_for(new, label)?;
    let (mut stay, mut old, mut place) = (Vec::new(), Vec::new(), None);
    for slot in &slots.slots {
        if opens(keys, slots, header, slot)? {
            place = place.or(Some(stay.len()));
            old.push(slot.clone());
        } else {
            stay.push(slot.clone());
        }
    }
    // What the new key is can only be asked of a public half with the data key at hand.
    let asked = place.is_some() || new.sources().iter().all(KeySource::opens);
    let standing = if asked { standing(keys, new, &stay, slots, header)? } else { vec![None; new.sources().len()] };
    let Some(place) = place else {
        // Done before, or never to be done with these keys.
        if standing.iter().all(Option::is_some) {
            return Ok(None);
        }
        // Says why not.
        keys.unlock(slots, header)?;
        refuse!(NoKey, "the keys given open no slot of version {} every time; try again", header.seq);
    };
    // The label goes on where it still says the truth: default labels name the kind of key.
    let (from, to) = (keys.sources(), new.sources());
    let same_kind = from.len() == 1 && to.len() == 1 && from[0].default_label() == to[0].default_label();
    let ours = !from.iter().any(|source| old[0].label.starts_with(source.default_label()));
    let kept = (to.len() == 1 && (same_kind || ours)).then_some(&*old[0].label);
    let for_now = |at: usize| standing.contains(&Some(at)) && stay[at].label.contains(INTERIM);
    let mut taken = labels_of(&stay);
    taken = taken.into_iter().enumerate().filter(|(at, _)| !for_now(*at)).map(|(_, label)| label).collect();
    let mut labels = Vec::new();
    for (source, there) in to.iter().zip(&standing) {
        let label = match label.or(kept) {
            Some(label) => check_label(label.as_bytes())?.to_owned(),
            None => free_label(source.default_label(), &taken),
        };
        if taken.contains(&label) && there.is_none_or(for_now) {
            refuse!(Usage, "there is a slot {label:?} already; give this one another label");
        }
        taken.push(label.clone());
        labels.push(label);
    }
    Ok(Some(Replacing { old, stay, place, standing, labels }))
}

/// How the label of a slot goes on that waits for the old one to go.
const INTERIM: &str = "-next";

/// What a slot is called whose label an old slot still has; in its full length where there is room for that and a number.
fn interim(label: &str) -> String {
    format!("{}{INTERIM}", &label[..label.len().min(SLOT_LABEL_BYTES_MAX - INTERIM.len() - "-16".len())])
}

/// Whether a slot of this label waits to be called `label`.
fn is_interim(waiting: &str, label: &str) -> bool {
    let number = waiting.strip_prefix(&*interim(label));
    number.is_some_and(|number| number.is_empty() || number.strip_prefix('-').is_some_and(|n| n.parse::<u8>().is_ok()))
}

fn prepare(keys: &Keys, new: &Keys, label: Option<&str>, slots: &Slots, header: &ManifestHeader) -> Result<Plan> {
    let Some(found) = replacing(keys, new, label, slots, header)? else { return Ok(Plan::done()) };
    if found.standing.iter().all(Option::is_some) {
        return Ok(Plan::done());
    }
    let dek = keys.unlock(slots, header)?;
    let mut draft = Draft { slots: slots.slots.clone(), ..Draft::default() };
    let missing = found.labels.iter().enumerate().filter(|(number, _)| found.standing[*number].is_none());
    for (place, (number, label)) in (found.place + 1..).zip(missing) {
        let taken = labels_of(&draft.slots);
        let label = if taken.contains(label) { free_label(&interim(label), &taken) } else { label.clone() };
        let slot = make(new, number, Some(&label), &dek, &taken, (slots, header), &mut draft.warnings)?;
        draft.added.push(label);
        draft.slots.insert(place, slot);
    }
    check_count(&draft.slots)?;
    Ok(Plan::Change(draft))
}

fn replace(keys: &Keys, new: &Keys, label: Option<&str>, slots: &Slots, header: &ManifestHeader) -> Result<Plan> {
    let Some(found) = replacing(keys, new, label, slots, header)? else { return Ok(Plan::done()) };
    let mut draft = Draft { slots: found.stay, removed: labels_of(&found.old), ..Draft::default() };
    let mut made = Vec::new();
    for (number, label) in found.labels.iter().enumerate() {
        let slot = match found.standing[number] {
            // It was there before this order, under the name that somebody gave it.
            Some(at) if !is_interim(&draft.slots[at].label, label) => continue,
            // A transit ciphertext is the one that a record may hold by now, and is not bound to a label.
            Some(at) if draft.slots[at].kind() == SlotKind::VaultTransit => {
                Slot { label: label.clone(), ..draft.slots[at].clone() }
            }
            Some(_) | None => {
                let dek = keys.unlock(slots, header)?;
                make(new, number, Some(label), &dek, &[], (slots, header), &mut draft.warnings)?
            }
        };
        draft.added.push(label.clone());
        match found.standing[number] {
            Some(at) => draft.removed.push(std::mem::replace(&mut draft.slots[at], slot).label),
            None => made.push(slot),
        }
    }
    draft.slots.splice(found.place..found.place, made);
    for slot in &draft.slots {
        if found.labels.iter().any(|label| is_interim(&slot.label, label)) {
            draft.warnings.push(format!(
                "slot {:?} was made by an earlier rotation that did not end, to another key than this one: remove it with \
                 `modelfs key remove`, or that key opens the version still",
                slot.label
            ));
        }
    }
    check_count(&draft.slots)?;
    Ok(Plan::Change(draft))
}

/// Nothing is opened here, so that this can run where nothing may be: what Vault answers must be of its form and of a
/// version that is not older. A slot whose answer is wrong all the same fails its readers by the signed commitment.
fn rewrap(vault: &dyn Rewrap, label: Option<&str>, slots: &Slots) -> Result<Plan> {
    let context = Slot::transit_context(slots.model_id, slots.vid);
    let mut draft = Draft { slots: slots.slots.clone(), ..Draft::default() };
    let (mut asked, mut answered) = (0, 0);
    for slot in &mut draft.slots {
        let Some(before) = transit_version(slot) else { continue };
        if label.is_some_and(|label| slot.label != label) {
            continue;
        }
        asked += 1;
        let wrapped = std::str::from_utf8(&slot.body).expect("a transit slot was parsed as text");
        let answer = match vault.rewrap(&context, wrapped) {
            Ok(answer) => answer,
            Err(away) if away.class() == Class::Unreachable => return Err(away),
            // Of another key in Vault, most likely: slots do not say which.
            Err(shut) => {
                draft.refused.push((slot.label.clone(), shut));
                continue;
            }
        };
        let after = match version_of(&answer) {
            Some(after) if after >= before => after,
            Some(after) => refuse!(
                VaultAnswer,
                "Vault rewrapped slot {:?} from version {before} to the older version {after}; nothing was changed",
                slot.label
            ),
            None => refuse!(VaultAnswer, "Vault answered a rewrap with something else than vault:vN:..."),
        };
        answered += 1;
        if after > before {
            slot.body = answer.into_bytes();
            draft.rewrapped.push((slot.label.clone(), before, after));
        }
    }
    let none = || match label {
        Some(label) => format!("no vault-transit slot {label:?} to rewrap"),
        None => "no vault-transit slot to rewrap".to_owned(),
    };
    if asked == 0 {
        return Ok(Plan::Nothing { unless_finished: Some(Error::new(Code::NotFound, none())), refused: Vec::new() });
    }
    if answered == 0 {
        let (label, shut) = draft.refused.swap_remove(0);
        return Err(shut.context(format!("slot {label:?} was not rewrapped")));
    }
    if draft.rewrapped.is_empty() {
        return Ok(Plan::Nothing { unless_finished: None, refused: draft.refused });
    }
    Ok(Plan::Change(draft))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_a_transit_slot_is_the_number_in_its_text() {
        let slot = |body: &str, params| Slot { label: "v".into(), params, body: body.into() };
        let transit = crate::format::SlotParams::VaultTransit;
        assert_eq!(transit_version(&slot("vault:v12:AAAA", transit.clone())), Some(12));
        assert_eq!(transit_version(&slot("vault:vx:AAAA", transit)), None);
        assert_eq!(transit_version(&slot("vault:v1:A", crate::format::SlotParams::Raw { salt: [0; 32] })), None);
    }
}
