//! The anti-rollback floor: what was seen of a channel, so that an older or a forked history is refused.
//!
//! In: a ref whose signatures hold, what was remembered, local policy, the time. Out: yes with notes, or which rule is
//! broken. The judging functions are pure; [`FloorStore`] remembers, on this machine and, where one is given, in a
//! [`FloorPin`] outside it.
//! Promises: what is remembered only grows; a refused ref changes nothing; no arithmetic on the store's numbers overflows.
//! What no local floor can do: protect a machine without memory. There, pin a digest or give a pin outside the machine.
//! Spec: docs/FORMAT.md b.2. Held by: the tests below, THREAT_MODEL (f) rows 24 to 27, 35.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::state::{self, Locked};
use crate::error::{Class, Code, Error, Result};
use crate::format::{ModelId, Ref, Vid};
use crate::refuse;

/// A ref number may be this far ahead: a stolen release key must not be able to use the numbers up.
const REF_SEQ_JUMP_MAX: u64 = 1_000_000;
/// Clocks of publisher and reader may differ by this much, in either direction.
const CLOCK_SKEW_S: i64 = 300;
/// Versions whose slots generation is remembered; in practice more than there are. The lowest generations go first: what
/// refuses the least, and generation 1 refuses nothing.
const SLOTS_REMEMBERED_MAX: usize = 1024;

/// Channels whose pin is read at once: each is a round trip to a server.
const PIN_READS_AT_ONCE: usize = 8;

/// What was seen of one channel of one model at one store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefFloor {
    /// For people who look into the file.
    pub store: String,
    pub model: String,
    pub channel: String,
    pub max_ref_seq: u64,
    /// SHA-256 of that ref's bytes 0..255, in hex.
    pub ref_digest: String,
    /// The highest version seen; a rollback by a new ref may go below it.
    pub max_version_seq: u64,
    /// The highest `min_version_seq` seen: below it nothing is served, whatever a later ref says.
    pub min_version_seq: u64,
    pub max_issued_at: i64,
    /// Highest slots generation by version: generations count from 1 again in each version.
    pub slots_generations: BTreeMap<String, u32>,
}

/// What the operator decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FloorPolicy {
    /// From configuration; 0 is none.
    pub min_ref_seq: u64,
    pub min_version_seq: u64,
    /// Refuse when nothing was ever remembered.
    pub require_floor: bool,
    /// Air-gapped sites: an expired ref is a warning.
    pub freeze_warn: bool,
}

/// Accepted, but the operator should know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Note {
    /// Nothing was remembered: the store could have served an old version, and nobody here would know.
    NoFloor,
    /// The ref is past its expiry, and policy says to go on.
    Expired,
    /// Recorded on first use: whoever answered first is believed from now on.
    FirstUse,
}

impl Note {
    pub const fn text(self) -> &'static str {
        match self {
            Note::NoFloor => {
                "nothing is remembered of this model yet: if the store serves an old version, it goes unnoticed"
            }
            Note::Expired => "the newest ref has expired: the store may be withholding newer versions",
            Note::FirstUse => "the publisher's key was taken from the store on first use and is believed from now on",
        }
    }
}

/// Judges a ref that is signed, for this model and channel.
///
/// # Errors
/// `NO_FLOOR`, `ROLLBACK`, `FORK`, `FAST_FORWARD`, `REF_FUTURE`, `CLOCK`, `REF_EXPIRED`, `BELOW_FLOOR`, in this order.
pub fn check_ref(floor: Option<&RefFloor>, policy: &FloorPolicy, now: i64, seen: &Ref) -> Result<Vec<Note>> {
    let mut notes = Vec::new();
    if floor.is_none() && policy.min_ref_seq == 0 {
        if policy.require_floor {
            refuse!(
                NoFloor,
                "nothing is remembered of this model and require_floor is set; give min_ref_seq or a digest"
            );
        }
        notes.push(Note::NoFloor);
    }
    let known = floor.map_or(0, |floor| floor.max_ref_seq);
    let lowest = known.max(policy.min_ref_seq);
    if seen.ref_seq < lowest {
        refuse!(Rollback, "the store's newest ref is {}, {lowest} was seen or is required", seen.ref_seq);
    }
    if let Some(floor) = floor {
        if seen.ref_seq == known && hex::encode(seen.head_digest()) != floor.ref_digest {
            refuse!(Fork, "ref {known} is not the one that was seen under this number; ask the publisher");
        }
        if Some(seen.ref_seq) == known.checked_add(1) && hex::encode(seen.previous) != floor.ref_digest {
            refuse!(Fork, "ref {} does not follow the ref {known} that was seen; ask the publisher", seen.ref_seq);
        }
    }
    if seen.ref_seq - lowest > REF_SEQ_JUMP_MAX {
        refuse!(FastForward, "ref number jumps from {lowest} to {}; replace the release key", seen.ref_seq);
    }
    if seen.issued_at > now.saturating_add(CLOCK_SKEW_S) {
        refuse!(
            RefFuture,
            "ref {} was issued at {}, it is {now} here; check both clocks",
            seen.ref_seq,
            seen.issued_at
        );
    }
    let latest = floor.map_or(i64::MIN, |floor| floor.max_issued_at);
    if now.saturating_add(CLOCK_SKEW_S) < latest {
        refuse!(Clock, "it is {now} here, but a ref issued at {latest} was seen before; set the clock");
    }
    if now >= seen.expires_at {
        if !policy.freeze_warn {
            refuse!(
                RefExpired,
                "ref {} expired at {}, it is {now}; the publisher signs a new one",
                seen.ref_seq,
                seen.expires_at
            );
        }
        notes.push(Note::Expired);
    }
    check_version(floor, policy, seen.min_version_seq, seen.seq)?;
    Ok(notes)
}

/// Whether version `seq` may be served under a newest ref that names `min_version_seq`.
///
/// # Errors
/// `BELOW_FLOOR`.
pub(super) fn check_version(
    floor: Option<&RefFloor>,
    policy: &FloorPolicy,
    min_version_seq: u64,
    seq: u64,
) -> Result<()> {
    let remembered = floor.map_or(0, |floor| floor.min_version_seq);
    let lowest = min_version_seq.max(policy.min_version_seq).max(remembered);
    if seq < lowest {
        refuse!(BelowFloor, "version {seq} was withdrawn: the lowest version allowed is {lowest}");
    }
    Ok(())
}

/// Judges a slots generation of version `vid`; `min_generation` is the ref's.
///
/// # Errors
/// `SLOTS_ROLLBACK`.
pub fn check_slots(floor: Option<&RefFloor>, min_generation: u32, vid: Vid, generation: u32) -> Result<()> {
    let remembered = floor.and_then(|floor| floor.slots_generations.get(&vid.to_string()).copied()).unwrap_or(0);
    let lowest = min_generation.max(remembered);
    if generation < lowest {
        refuse!(SlotsRollback, "key slots are of generation {generation}, {lowest} was seen or is required");
    }
    Ok(())
}

impl RefFloor {
    /// What is known, or the floor of a channel that was never seen.
    fn after(known: Option<RefFloor>, store: &str, model: &str, channel: &str) -> RefFloor {
        known.unwrap_or_else(|| RefFloor {
            store: store.into(),
            model: model.into(),
            channel: channel.into(),
            max_issued_at: i64::MIN,
            ..RefFloor::default()
        })
    }

    /// What is remembered after `newest` and the slots of `vid` were accepted. Nothing shrinks.
    fn advanced(mut self, newest: &Ref, vid: Vid, generation: u32) -> RefFloor {
        if newest.ref_seq > self.max_ref_seq {
            self.max_ref_seq = newest.ref_seq;
            self.ref_digest = hex::encode(newest.head_digest());
        }
        self.max_version_seq = self.max_version_seq.max(newest.seq);
        self.min_version_seq = self.min_version_seq.max(newest.min_version_seq);
        self.max_issued_at = self.max_issued_at.max(newest.issued_at);
        let known = self.slots_generations.entry(vid.to_string()).or_default();
        *known = generation.max(*known);
        self.forget_slots();
        self
    }

    fn forget_slots(&mut self) {
        while self.slots_generations.len() > SLOTS_REMEMBERED_MAX {
            let lowest = self.slots_generations.iter().min_by_key(|(_, generation)| **generation);
            let vid = lowest.map(|(vid, _)| vid.clone()).expect("more than one is remembered");
            self.slots_generations.remove(&vid);
        }
    }

    /// The higher of both in everything: what two memories of one channel know together.
    ///
    /// # Errors
    /// `FORK` if they saw different refs of one number.
    pub fn merged(mut self, other: &RefFloor) -> Result<RefFloor> {
        if self.max_ref_seq == other.max_ref_seq && self.ref_digest != other.ref_digest {
            refuse!(
                Fork,
                "ref {} of tag {} was seen with two contents, {} and {}; ask the publisher",
                self.max_ref_seq,
                self.channel,
                self.ref_digest,
                other.ref_digest
            );
        }
        if other.max_ref_seq > self.max_ref_seq {
            self.max_ref_seq = other.max_ref_seq;
            self.ref_digest.clone_from(&other.ref_digest);
        }
        self.max_version_seq = self.max_version_seq.max(other.max_version_seq);
        self.min_version_seq = self.min_version_seq.max(other.min_version_seq);
        self.max_issued_at = self.max_issued_at.max(other.max_issued_at);
        for (vid, &generation) in &other.slots_generations {
            let known = self.slots_generations.entry(vid.clone()).or_default();
            *known = generation.max(*known);
        }
        self.forget_slots();
        Ok(self)
    }
}

/// A floor kept outside this machine: the memory of those that have none, and a second one of those that have.
///
/// May ask a server and block. A channel is named by store, model and tag, as they are on this machine.
pub trait FloorPin: Send + Sync + fmt::Debug {
    /// What is pinned; `None` if nothing ever was.
    ///
    /// # Errors
    /// Of class `Unreachable` if nobody can be asked now; anything else is refused, not passed over.
    fn load(&self, at: FloorPlace<'_>) -> Result<Option<RefFloor>>;

    /// Merges `floor` into what is pinned, whatever others write meanwhile.
    fn advance(&self, at: FloorPlace<'_>, floor: &RefFloor) -> Result<()>;

    /// Forgets what is pinned. For an operator who has looked.
    fn reset(&self, at: FloorPlace<'_>) -> Result<()>;
}

/// Where a floor was raised.
#[derive(Debug)]
pub enum Raised {
    /// Here, and in the pin where there is one.
    Everywhere,
    /// In the pin; and why this machine does not remember it.
    InPinOnly(Error),
}

/// What a floor is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FloorPlace<'a> {
    pub store: &'a str,
    pub model: ModelId,
    pub channel: &'a str,
}

/// What is remembered here, and what the pin says.
struct Both {
    local: Option<RefFloor>,
    pinned: Option<RefFloor>,
    away: bool,
}

impl Both {
    fn merged(self) -> Result<Option<RefFloor>> {
        match (self.local, self.pinned) {
            (Some(local), Some(pinned)) => local.merged(&pinned).map(Some),
            (one, other) => Ok(one.or(other)),
        }
    }

    fn pin_is_behind(&self) -> bool {
        match (&self.local, &self.pinned) {
            (Some(local), Some(pinned)) => pinned.clone().merged(local).is_ok_and(|both| both != *pinned),
            (Some(_), None) => !self.away,
            (None, _) => false,
        }
    }
}

/// Floors on disk: one file a store, model and channel; with a pin beside them, the higher one of both counts.
#[derive(Debug, Clone)]
pub struct FloorStore {
    dir: PathBuf,
    pin: Option<Arc<dyn FloorPin>>,
    pin_required: bool,
}

impl FloorStore {
    /// Below `state` (see [`state::usual_state_dir`]); nothing is made until something is remembered.
    pub fn new(state: &Path) -> FloorStore {
        FloorStore { dir: state.join("floor"), pin: None, pin_required: false }
    }

    /// The same with a pin. `required`: when it cannot be asked, nothing is loaded; otherwise that is a warning.
    pub fn pinned(self, pin: Arc<dyn FloorPin>, required: bool) -> FloorStore {
        FloorStore { pin: Some(pin), pin_required: required, ..self }
    }

    /// # Errors
    /// `STATE`: what cannot be read is not taken for nothing. `FORK` if this machine and the pin saw two refs of one
    /// number. What the pin says, unless it is only away and not required.
    pub fn load(&self, store: &str, model: ModelId, channel: &str) -> Result<Option<RefFloor>> {
        self.load_both(store, model, channel, &mut false)?.merged()
    }

    /// The same of several channels of a model: the pin is asked for some at once, and one that is away is asked once.
    pub fn load_all(&self, store: &str, model: ModelId, channels: &[String]) -> Result<Vec<Option<RefFloor>>> {
        let Some((first, rest)) = channels.split_first() else { return Ok(Vec::new()) };
        let mut away = false;
        let mut floors = vec![self.load_both(store, model, first, &mut away)?.merged()?];
        let at_once = if self.pin.is_some() { PIN_READS_AT_ONCE } else { 1 };
        for some in rest.chunks(at_once) {
            if away || some.len() == 1 {
                for channel in some {
                    floors.push(self.load_both(store, model, channel, &mut away)?.merged()?);
                }
                continue;
            }
            let loaded: Vec<Result<Both>> = std::thread::scope(|scope| {
                let mut loads = Vec::new();
                for channel in some {
                    loads.push(scope.spawn(move || self.load_both(store, model, channel, &mut false)));
                }
                loads.into_iter().map(|load| load.join().expect("reading a floor does not panic")).collect()
            });
            for both in loaded {
                let both = both?;
                away |= both.away;
                floors.push(both.merged()?);
            }
        }
        Ok(floors)
    }

    /// The same, judged by whoever is about to publish. Where `judge` finds nothing wrong, a pin that a run which died left
    /// behind this machine is raised first, so that it never lags by more than one; that it cannot be is a warning.
    ///
    /// # Errors
    /// As [`FloorStore::load`]; what `judge` says, and then nothing is raised: it may be this machine that remembers too much.
    pub fn judge_and_raise(
        &self,
        store: &str,
        model: ModelId,
        channel: &str,
        judge: impl FnOnce(Option<&RefFloor>) -> Result<()>,
    ) -> Result<()> {
        let both = self.load_both(store, model, channel, &mut false)?;
        let (behind, local) = (both.pin_is_behind(), both.local.clone());
        judge(both.merged()?.as_ref())?;
        if let (true, Some(pin), Some(local)) = (behind, &self.pin, local)
            && let Err(failed) = pin.advance(FloorPlace { store, model, channel }, &local)
        {
            tracing::warn!(channel, "the floor kept elsewhere stays behind the local one: {}", failed.chain());
        }
        Ok(())
    }

    /// `away`: that the pin is, as far as it is known; then it is not asked.
    fn load_both(&self, store: &str, model: ModelId, channel: &str, away: &mut bool) -> Result<Both> {
        let local = self.load_local(store, model, channel)?;
        if *away {
            return Ok(Both { local, pinned: None, away: true });
        }
        match self.load_pinned(store, model, channel) {
            Ok(pinned) => Ok(Both { local, pinned, away: false }),
            Err(silent) if silent.class() == Class::Unreachable && !self.pin_required => {
                tracing::warn!(
                    channel,
                    "the floor kept elsewhere cannot be asked, the local one counts: {}",
                    silent.chain()
                );
                *away = true;
                Ok(Both { local, pinned: None, away: true })
            }
            Err(err) => Err(err.context(format!("cannot learn the floor of tag {channel}"))),
        }
    }

    /// Whether there is one outside this machine.
    pub fn has_pin(&self) -> bool {
        self.pin.is_some()
    }

    /// What this machine alone remembers.
    pub fn load_local(&self, store: &str, model: ModelId, channel: &str) -> Result<Option<RefFloor>> {
        state::read(&self.dir, &state::file_name(store, model, channel))
    }

    /// What the pin alone says; `None` without a pin.
    pub fn load_pinned(&self, store: &str, model: ModelId, channel: &str) -> Result<Option<RefFloor>> {
        match &self.pin {
            Some(pin) => pin.load(FloorPlace { store, model, channel }),
            None => Ok(None),
        }
    }

    /// Remembers an accepted ref and slots generation on this machine. Reads again under a lock, so that two mounts never
    /// lose what the other one saw.
    pub fn advance(
        &self,
        store: &str,
        model: (ModelId, &str),
        channel: &str,
        newest: &Ref,
        slots: (Vid, u32),
    ) -> Result<()> {
        self.advance_local(store, model, channel, newest, slots).map(drop)
    }

    /// The same, and raises the pin: for whoever published the ref. Readers need no right to write there.
    ///
    /// # Errors
    /// `FORK` if another ref of this number was seen here: then the pin is left to who looks into that. A state folder that
    /// cannot be written keeps nobody from raising the pin, which is the memory of all others. What the pin says; without one
    /// `STATE`.
    pub fn raise(
        &self,
        store: &str,
        model: (ModelId, &str),
        channel: &str,
        newest: &Ref,
        slots: (Vid, u32),
    ) -> Result<Raised> {
        let local = self.advance_local(store, model, channel, newest, slots);
        let Some(pin) = &self.pin else { return local.map(|_| Raised::Everywhere) };
        let (floor, unremembered) = match local {
            Ok(floor) => (floor, None),
            Err(fork) if fork.code() == Code::Fork => return Err(fork),
            Err(failed) => {
                // What is known for sure; the pin keeps the higher of both.
                let known = self.load_local(store, model.0, channel).ok().flatten();
                (RefFloor::after(known, store, model.1, channel).advanced(newest, slots.0, slots.1), Some(failed))
            }
        };
        pin.advance(FloorPlace { store, model: model.0, channel }, &floor)?;
        Ok(unremembered.map_or(Raised::Everywhere, Raised::InPinOnly))
    }

    /// Raises the pin to what this machine remembers of a channel: after the pin itself went back. True: there is a pin, and
    /// something was remembered.
    pub fn raise_pin(&self, store: &str, model: ModelId, channel: &str) -> Result<bool> {
        match (&self.pin, self.load_local(store, model, channel)?) {
            (Some(pin), Some(floor)) => {
                pin.advance(FloorPlace { store, model, channel }, &floor)?;
                Ok(true)
            }
            (Some(_), None) | (None, _) => Ok(false),
        }
    }

    fn advance_local(
        &self,
        store: &str,
        model: (ModelId, &str),
        channel: &str,
        newest: &Ref,
        slots: (Vid, u32),
    ) -> Result<RefFloor> {
        let name = state::file_name(store, model.0, channel);
        let locked = Locked::new(&self.dir)?;
        let known: Option<RefFloor> = state::read(&self.dir, &name)?;
        let before = RefFloor::after(known, store, model.1, channel);
        if newest.ref_seq == before.max_ref_seq && hex::encode(newest.head_digest()) != before.ref_digest {
            return Err(Error::new(Code::Fork, format!("two refs {} were seen at the same time", newest.ref_seq)));
        }
        let after = before.clone().advanced(newest, slots.0, slots.1);
        if after != before {
            locked.replace(&name, &after)?;
        }
        Ok(after)
    }

    /// The channels of a model that this machine remembers, sorted: a store that no longer shows one of them went back.
    ///
    /// # Errors
    /// `STATE`: a file that cannot be read may be one of them.
    pub fn channels(&self, store: &str, model: ModelId) -> Result<Vec<String>> {
        self.channels_but(store, model, Err)
    }

    /// The same without those in files that cannot be read, each a warning: for readers, whom a broken file of some other model
    /// must not keep out.
    ///
    /// # Errors
    /// `STATE` if the folder cannot be listed.
    pub fn readable_channels(&self, store: &str, model: ModelId) -> Result<Vec<String>> {
        self.channels_but(store, model, |unreadable| {
            tracing::warn!("a floor is passed over, of whichever model it is: {}", unreadable.chain());
            Ok(())
        })
    }

    fn channels_but(
        &self,
        store: &str,
        model: ModelId,
        unreadable: impl Fn(Error) -> Result<()>,
    ) -> Result<Vec<String>> {
        let fault = |err| Error::new(Code::State, format!("cannot list {}", self.dir.display())).with_source(err);
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(err) => return Err(fault(err)),
        };
        let mut channels = Vec::new();
        for entry in entries {
            let name = entry.map_err(fault)?.file_name();
            let Some(name) = name.to_str().filter(|name| name.ends_with(".json")) else { continue };
            // The file's own words must lead to its name: they are for people, and could have been edited.
            let floor = match state::read::<RefFloor>(&self.dir, name) {
                Ok(floor) => floor,
                Err(bad) => {
                    unreadable(bad)?;
                    None
                }
            };
            if let Some(floor) = floor
                && floor.store == store
                && state::file_name(store, model, &floor.channel) == name
            {
                channels.push(floor.channel);
            }
        }
        channels.sort_unstable();
        Ok(channels)
    }

    /// Forgets the floor of a channel, in the pin and then here: the next reader believes what the store then shows. For an
    /// operator who has looked why.
    ///
    /// # Errors
    /// What the pin says to someone who has no right to write there: nothing is forgotten then, here neither.
    pub fn reset(&self, store: &str, model: ModelId, channel: &str) -> Result<()> {
        if let Some(pin) = &self.pin {
            let kept = |err: Error| err.context(format!("the floor of tag {channel} stays, here and in the pin"));
            pin.reset(FloorPlace { store, model, channel }).map_err(kept)?;
        }
        Locked::new(&self.dir)?.remove(&state::file_name(store, model, channel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{ChannelId, ManifestDigest};

    const NOW: i64 = 1_790_000_000;

    fn reference(ref_seq: u64) -> Ref {
        Ref {
            n_sigs: 1,
            model_id: ModelId([1; 32]),
            channel_id: ChannelId::of_name("latest"),
            ref_seq,
            seq: 7,
            manifest_digest: ManifestDigest([2; 32]),
            manifest_len: 400,
            vid: Vid([3; 16]),
            issued_at: NOW,
            expires_at: NOW + 1000,
            min_slots_generation: 2,
            min_version_seq: 5,
            previous: [0; 32],
        }
    }

    fn floor() -> RefFloor {
        RefFloor::default().advanced(&reference(42), Vid([3; 16]), 3)
    }

    fn code(floor: Option<&RefFloor>, now: i64, seen: &Ref) -> Option<Code> {
        check_ref(floor, &FloorPolicy::default(), now, seen).err().map(|err| err.code())
    }

    #[test]
    fn the_same_ref_and_its_true_successor_are_accepted() {
        let next = Ref { previous: reference(42).head_digest(), ..reference(43) };
        assert_eq!(check_ref(Some(&floor()), &FloorPolicy::default(), NOW, &reference(42)).unwrap(), []);
        assert_eq!(check_ref(Some(&floor()), &FloorPolicy::default(), NOW, &next).unwrap(), []);
        assert_eq!(check_ref(None, &FloorPolicy::default(), NOW, &reference(42)).unwrap(), [Note::NoFloor]);
    }

    /// THREAT_MODEL (f) row 24.
    #[test]
    fn an_older_a_changed_and_an_unchained_ref_are_refused() {
        assert_eq!(code(Some(&floor()), NOW, &reference(41)), Some(Code::Rollback));
        assert_eq!(code(Some(&floor()), NOW, &Ref { seq: 8, ..reference(42) }), Some(Code::Fork));
        assert_eq!(code(Some(&floor()), NOW, &Ref { previous: [9; 32], ..reference(43) }), Some(Code::Fork));
        let policy = FloorPolicy { min_ref_seq: 50, ..FloorPolicy::default() };
        assert_eq!(check_ref(None, &policy, NOW, &reference(49)).unwrap_err().code(), Code::Rollback);
    }

    /// THREAT_MODEL (f) row 25.
    #[test]
    fn an_expired_ref_a_future_ref_and_a_clock_set_back_are_refused() {
        assert_eq!(code(Some(&floor()), NOW + 1000, &reference(42)), Some(Code::RefExpired));
        assert_eq!(code(Some(&floor()), NOW + 999, &reference(42)), None);
        assert_eq!(code(None, NOW, &Ref { issued_at: NOW + 301, ..reference(42) }), Some(Code::RefFuture));
        assert_eq!(code(None, NOW, &Ref { issued_at: NOW + 300, ..reference(42) }), None);
        let old = Ref { issued_at: 0, previous: reference(42).head_digest(), ..reference(43) };
        assert_eq!(code(Some(&floor()), NOW - 301, &old), Some(Code::Clock));
        let warn = FloorPolicy { freeze_warn: true, ..FloorPolicy::default() };
        assert_eq!(check_ref(Some(&floor()), &warn, NOW + 5000, &reference(42)).unwrap(), [Note::Expired]);
        // The ends of the number line.
        assert_eq!(code(None, i64::MAX, &Ref { expires_at: i64::MAX, ..reference(1) }), Some(Code::RefExpired));
        assert_eq!(code(None, i64::MIN, &reference(1)), Some(Code::RefFuture));
        assert_eq!(code(None, NOW, &Ref { expires_at: i64::MAX, issued_at: i64::MIN, ..reference(1) }), None);
    }

    /// THREAT_MODEL (f) row 26.
    #[test]
    fn a_ref_number_that_jumps_is_refused_at_the_end_of_the_number_line_too() {
        for ref_seq in [1 << 60, u64::MAX, 42 + 1_000_001] {
            assert_eq!(code(Some(&floor()), NOW, &reference(ref_seq)), Some(Code::FastForward), "{ref_seq}");
        }
        assert_eq!(code(None, NOW, &reference(u64::MAX)), Some(Code::FastForward));
        assert_eq!(code(Some(&floor()), NOW, &reference(42 + 1_000_000)), None);
        let full = RefFloor::default().advanced(&reference(u64::MAX), Vid([3; 16]), 1);
        assert_eq!(code(Some(&full), NOW, &reference(u64::MAX)), None);
    }

    /// THREAT_MODEL (f) row 27: the release key alone cannot revive a withdrawn version.
    #[test]
    fn a_version_below_the_floor_is_refused() {
        assert_eq!(code(None, NOW, &Ref { seq: 4, ..reference(1) }), Some(Code::BelowFloor));
        let lowered = Ref { seq: 4, min_version_seq: 0, previous: reference(42).head_digest(), ..reference(43) };
        assert_eq!(code(Some(&floor()), NOW, &lowered), Some(Code::BelowFloor));
        // A deliberate rollback to a version that is still allowed is a new ref, and accepted.
        assert_eq!(code(Some(&floor()), NOW, &Ref { seq: 5, ..lowered }), None);
    }

    /// THREAT_MODEL (f) row 35.
    #[test]
    fn an_older_slots_generation_is_refused() {
        let vid = Vid([3; 16]);
        assert_eq!(check_slots(Some(&floor()), 0, vid, 2).unwrap_err().code(), Code::SlotsRollback);
        assert_eq!(check_slots(None, 4, vid, 3).unwrap_err().code(), Code::SlotsRollback);
        check_slots(Some(&floor()), 3, vid, 3).unwrap();
        // Another version starts again from 1.
        check_slots(Some(&floor()), 1, Vid([4; 16]), 1).unwrap();
    }

    #[test]
    fn no_floor_is_refused_only_when_one_is_required() {
        let policy = FloorPolicy { require_floor: true, ..FloorPolicy::default() };
        assert_eq!(check_ref(None, &policy, NOW, &reference(1)).unwrap_err().code(), Code::NoFloor);
        assert!(check_ref(Some(&floor()), &policy, NOW, &reference(42)).is_ok());
        let configured = FloorPolicy { min_ref_seq: 1, ..policy };
        assert_eq!(check_ref(None, &configured, NOW, &reference(1)).unwrap(), []);
    }

    /// As for a server, whose right on the pin is to read it.
    #[derive(Debug)]
    struct ReadOnlyPin;

    impl FloorPin for ReadOnlyPin {
        fn load(&self, _: FloorPlace<'_>) -> Result<Option<RefFloor>> {
            Ok(Some(floor()))
        }
        fn advance(&self, _: FloorPlace<'_>, _: &RefFloor) -> Result<()> {
            Err(Error::new(Code::VaultDenied, "permission denied"))
        }
        fn reset(&self, _: FloorPlace<'_>) -> Result<()> {
            Err(Error::new(Code::VaultDenied, "permission denied"))
        }
    }

    /// The memory of all who have none of their own.
    #[derive(Debug, Default)]
    struct MemoryPin(std::sync::Mutex<Option<RefFloor>>);

    impl FloorPin for MemoryPin {
        fn load(&self, _: FloorPlace<'_>) -> Result<Option<RefFloor>> {
            Ok(self.0.lock().unwrap().clone())
        }
        fn advance(&self, _: FloorPlace<'_>, floor: &RefFloor) -> Result<()> {
            let mut pinned = self.0.lock().unwrap();
            *pinned = Some(match pinned.take() {
                Some(known) => known.merged(floor)?,
                None => floor.clone(),
            });
            Ok(())
        }
        fn reset(&self, _: FloorPlace<'_>) -> Result<()> {
            *self.0.lock().unwrap() = None;
            Ok(())
        }
    }

    #[test]
    fn the_pin_is_raised_although_this_machine_cannot_remember_but_not_to_one_of_two_refs() {
        let dir = tempfile::tempdir().unwrap();
        let (store, model, slots) = ("file:///srv", (ModelId([1; 32]), "acme/m"), (Vid([3; 16]), 3));
        // No folder can be made where a file lies, whoever asks.
        std::fs::write(dir.path().join("file"), b"").unwrap();
        let pin = Arc::new(MemoryPin::default());
        let floors = FloorStore::new(&dir.path().join("file")).pinned(pin.clone(), false);
        let raised = floors.raise(store, model, "latest", &reference(42), slots).unwrap();
        assert!(matches!(&raised, Raised::InPinOnly(told) if told.code() == Code::State), "{raised:?}");
        let pinned = pin.0.lock().unwrap().clone().unwrap();
        assert_eq!((pinned.max_ref_seq, pinned.min_version_seq, pinned.model.as_str()), (42, 5, "acme/m"));
        assert_eq!((pinned.store.as_str(), pinned.channel.as_str()), (store, "latest"));

        let floors = FloorStore::new(dir.path()).pinned(pin.clone(), false);
        floors.advance(store, model, "latest", &Ref { seq: 9, ..reference(43) }, slots).unwrap();
        let fork = floors.raise(store, model, "latest", &reference(43), slots).unwrap_err();
        assert_eq!(fork.code(), Code::Fork);
        assert_eq!(pin.0.lock().unwrap().clone().unwrap().max_ref_seq, 42);
    }

    #[test]
    fn a_pin_that_is_behind_this_machine_is_raised_before_anything_is_published() {
        let dir = tempfile::tempdir().unwrap();
        let (store, model, slots) = ("file:///srv", (ModelId([1; 32]), "acme/m"), (Vid([3; 16]), 3));
        let pin = Arc::new(MemoryPin::default());
        let floors = FloorStore::new(dir.path()).pinned(pin.clone(), false);
        floors.advance(store, model, "latest", &reference(42), slots).unwrap();
        assert_eq!(floors.load(store, model.0, "latest").unwrap().unwrap().max_ref_seq, 42);
        assert!(pin.0.lock().unwrap().is_none(), "a reader writes nothing there");
        let judge = |code: Option<Code>| {
            floors.judge_and_raise(store, model.0, "latest", |known| {
                assert_eq!(known.unwrap().max_ref_seq, 42);
                code.map_or(Ok(()), |code| Err(Error::new(code, "as told")))
            })
        };
        assert_eq!(judge(Some(Code::Rollback)).unwrap_err().code(), Code::Rollback);
        assert!(pin.0.lock().unwrap().is_none(), "it may have been reset for a reason");
        judge(None).unwrap();
        assert_eq!(pin.0.lock().unwrap().clone().unwrap().max_ref_seq, 42);
        // Who may not write there publishes all the same; the end of it tells.
        let other = tempfile::tempdir().unwrap();
        let floors = FloorStore::new(other.path()).pinned(Arc::new(ReadOnlyPin), true);
        let next = Ref { previous: reference(42).head_digest(), ..reference(43) };
        floors.advance(store, model, "latest", &next, slots).unwrap();
        floors.judge_and_raise(store, model.0, "latest", |_| Ok(())).unwrap();
    }

    #[test]
    fn of_more_slots_than_are_remembered_those_go_that_refuse_the_least() {
        let generations = |from: u128, generation: u32, count: u128| {
            (from..from + count).map(move |n| (Vid(n.to_be_bytes()).to_string(), generation)).collect::<Vec<_>>()
        };
        let max = SLOTS_REMEMBERED_MAX as u128;
        let many = [generations(0, 7, max / 2), generations(1 << 64, 1, max / 2)].concat();
        let full = RefFloor { slots_generations: many.into_iter().collect(), ..floor() };
        // The highest names and the lowest, both kept before those of generation 1.
        let added = full.clone().advanced(&reference(43), Vid([0xFF; 16]), 2);
        let merged = full.clone().merged(&RefFloor { max_ref_seq: 0, ..added.clone() }).unwrap();
        for floor in [added, merged] {
            assert_eq!(floor.slots_generations.len(), SLOTS_REMEMBERED_MAX);
            assert_eq!(floor.slots_generations[&Vid([0xFF; 16]).to_string()], 2);
            assert_eq!(
                floor.slots_generations.values().filter(|generation| **generation == 7).count() as u128,
                max / 2
            );
        }
    }

    #[test]
    fn a_floor_whose_pin_cannot_be_reset_is_forgotten_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (store, model) = ("file:///srv", (ModelId([1; 32]), "acme/m"));
        let floors = FloorStore::new(dir.path()).pinned(Arc::new(ReadOnlyPin), true);
        floors.advance(store, model, "latest", &reference(42), (Vid([3; 16]), 3)).unwrap();

        let refused = floors.reset(store, model.0, "latest").unwrap_err();

        assert_eq!(refused.code(), Code::VaultDenied);
        assert!(refused.chain().contains("tag latest stays"), "{}", refused.chain());
        assert_eq!(floors.load_local(store, model.0, "latest").unwrap().unwrap().max_ref_seq, 42);
    }

    #[test]
    fn what_is_remembered_only_grows_and_survives_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let (store, model) = ("file:///srv", (ModelId([1; 32]), "acme/m"));
        let floors = FloorStore::new(dir.path());
        assert_eq!(floors.load(store, model.0, "latest").unwrap(), None);
        floors.advance(store, model, "latest", &reference(42), (Vid([3; 16]), 3)).unwrap();
        let older = Ref { issued_at: 0, min_version_seq: 0, seq: 1, ..reference(41) };
        floors.advance(store, model, "latest", &older, (Vid([3; 16]), 1)).unwrap();

        let again = FloorStore::new(dir.path()).load(store, model.0, "latest").unwrap().unwrap();
        assert_eq!((again.max_ref_seq, again.min_version_seq, again.max_issued_at), (42, 5, NOW));
        assert_eq!(again.slots_generations[&Vid([3; 16]).to_string()], 3);
        // Another store, model or channel has a floor of its own.
        assert_eq!(floors.load("file:///other", model.0, "latest").unwrap(), None);
        assert_eq!(floors.load(store, model.0, "prod").unwrap(), None);
        assert_eq!(floors.load(store, ModelId([2; 32]), "latest").unwrap(), None);
        let fork = Ref { seq: 9, ..reference(42) };
        let err = floors.advance(store, model, "latest", &fork, (Vid([3; 16]), 3)).unwrap_err();
        assert_eq!(err.code(), Code::Fork);
    }
}
