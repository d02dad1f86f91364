//! Moves a tag: to another version, back to an earlier one, or on in time.
//!
//! In: a version, named as a reader names it. Out: the next ref of a channel, or word that it is there already.
//! Promises: what a reader would refuse is never named; a version that was withdrawn under any tag is named under none;
//! two movers at once both end with refs of their own; a move that died half-way is repaired by making it again.
//! Spec: docs/FORMAT.md b.1, b.2. Held by: tests/versions.rs, which dies at every write.

use crate::error::{Code, Error, Result};
use crate::format::Ref;
use crate::keys::{ModelSelector, Resolved, Resolver, Wanted};
use crate::refuse;
use crate::seal::{Appended, RefTarget, Releaser, Survey};

/// How often a mover that lost the race for a ref number tries the next.
const RACES_MAX: u32 = 64;

/// When the next ref ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expires {
    /// It lives as long as the ref before it did; the first one of a channel never ends.
    AsBefore,
    /// Unix seconds; `i64::MAX`: never.
    At(i64),
}

/// What a channel shall say next.
#[derive(Debug, Clone)]
pub struct MoveOrder {
    pub channel: String,
    pub expires: Expires,
    /// Withdraws every version below this one.
    pub min_version_seq: Option<u64>,
}

/// What became of a move.
#[derive(Debug, Clone)]
pub struct Moved {
    /// The newest ref of the channel now.
    pub reference: Ref,
    /// The one before the move; the same one if nothing was to do.
    pub before: Option<Ref>,
    /// False: the channel said so already.
    pub written: bool,
    /// Channels that still name a version which this move withdrew; readers refuse them.
    pub withdrawn: Vec<(String, u64)>,
    /// Why the floor is not raised to the newest ref.
    pub unraised: Option<Error>,
}

/// Whoever moves the tags of one model: what a reader believes, and the release keys.
pub struct Mover<'a> {
    pub resolver: Resolver<'a>,
    pub releaser: Releaser,
}

impl Mover<'_> {
    /// Makes `order.channel` name the version that `wanted` names now.
    ///
    /// # Errors
    /// What a reader of that version would be told; `BELOW_FLOOR` for a version withdrawn under any tag; `USAGE` for a
    /// floor that would be lowered or that would withdraw the version itself; `EXISTS` if others were first every time.
    pub async fn tag(&self, wanted: &Wanted, order: &MoveOrder) -> Result<Moved> {
        self.point(wanted, order, false).await
    }

    /// Makes `order.channel` name version `to`, which must be older than the one it names.
    ///
    /// # Errors
    /// As [`Mover::tag`]; `USAGE` for a version that is newer, `NOT_FOUND` for a channel without any.
    pub async fn rollback(&self, to: u64, order: &MoveOrder) -> Result<Moved> {
        self.point(&Wanted::Version(to), order, true).await
    }

    /// Signs the newest ref of `channel` again, so that it ends later.
    ///
    /// # Errors
    /// `NOT_FOUND` for a channel without refs; `USAGE` if it would not end later; `EXISTS` as above. The ref may have
    /// expired; all else a reader would refuse is refused.
    pub async fn refresh(&self, channel: &str, expires: Expires) -> Result<Moved> {
        let channels = [channel.to_owned()];
        for _ in 0..RACES_MAX {
            let survey = self.releaser.chain.survey(&channels).await?;
            let Some(before) = survey.newest.get(channel).copied() else {
                refuse!(NotFound, "{} has no tag {channel} to refresh", self.name());
            };
            let expires_at = self.expiry(Some(&before), expires);
            if before.expires_at == i64::MAX {
                if expires_at == i64::MAX {
                    return Ok(self.already(channel, before));
                }
                refuse!(
                    Usage,
                    "tag {channel} never expires, a refresh would end it; tag the version anew with --expires instead"
                );
            }
            if expires_at < before.expires_at {
                refuse!(
                    Usage,
                    "tag {channel} would expire at {expires_at}, sooner than at {} as it does now; give a longer --expires",
                    before.expires_at
                );
            }
            self.check_floor(before.seq, survey_floor(&survey))?;
            let target = RefTarget { expires_at, ..RefTarget::of(&before) };
            match self.releaser.append(channel, Some(&before), &target).await {
                Ok(appended) => return Ok(Moved::to(appended, Some(before), &survey, channel)),
                Err(lost) if lost.code() == Code::Exists => {}
                Err(other) => return Err(other),
            }
        }
        refuse!(Exists, "others moved tag {channel} first {RACES_MAX} times in a row; try again later");
    }

    async fn point(&self, wanted: &Wanted, order: &MoveOrder, back: bool) -> Result<Moved> {
        let selector = ModelSelector { name: self.name().to_owned(), wanted: wanted.clone() };
        let version = self.resolver.resolve(&selector, None).await?;
        let channel = &order.channel;
        let channels = [channel.clone()];
        for _ in 0..RACES_MAX {
            let survey = self.releaser.chain.survey(&channels).await?;
            let before = survey.newest.get(channel).copied();
            if back {
                self.check_back(channel, before.as_ref(), version.header.seq)?;
            }
            let floor = self.floor(order, before.as_ref(), &survey, version.header.seq)?;
            if let Some(before) = before
                && before.manifest_digest == version.digest
                && before.min_version_seq >= floor
                && before.expires_at > self.releaser.now
                && order.expires == Expires::AsBefore
            {
                return Ok(self.already(channel, before));
            }
            let target = RefTarget {
                seq: version.header.seq,
                manifest_digest: version.digest,
                manifest_len: version.manifest_bytes.len() as u64,
                vid: version.header.vid,
                min_slots_generation: min_slots_generation(&version, &survey),
                min_version_seq: floor,
                expires_at: self.expiry(before.as_ref(), order.expires),
            };
            match self.releaser.append(channel, before.as_ref(), &target).await {
                Ok(appended) => return Ok(Moved::to(appended, before, &survey, channel)),
                // Somebody else moved it: what they wrote decides what is to do now.
                Err(lost) if lost.code() == Code::Exists => {}
                Err(other) => return Err(other),
            }
        }
        refuse!(Exists, "others moved tag {channel} first {RACES_MAX} times in a row; try again later");
    }

    /// Nothing to write; but whoever wrote it may have died before it raised the floor.
    fn already(&self, channel: &str, reference: Ref) -> Moved {
        let unraised = self.releaser.chain.remember(channel, &reference).err();
        Moved { reference, before: Some(reference), written: false, withdrawn: Vec::new(), unraised }
    }

    fn check_back(&self, channel: &str, before: Option<&Ref>, to: u64) -> Result<()> {
        match before {
            None => refuse!(NotFound, "{} has no tag {channel} to roll back", self.name()),
            Some(before) if to > before.seq => refuse!(
                Usage,
                "tag {channel} names version {}, {to} is newer; go forward with `modelfs tag STORE {}@{to} {channel}`",
                before.seq,
                self.name()
            ),
            Some(_) => Ok(()),
        }
    }

    /// The floor that the next ref carries.
    fn floor(&self, order: &MoveOrder, before: Option<&Ref>, survey: &Survey, seq: u64) -> Result<u64> {
        let known = survey_floor(survey);
        self.check_floor(seq, known)?;
        let Some(wanted) = order.min_version_seq else { return Ok(before.map_or(0, |before| before.min_version_seq)) };
        if wanted < known {
            refuse!(
                Usage,
                "--min-version {wanted} would lower the floor, which is {known}: versions below it were withdrawn; to \
                 serve their files again, seal them as a new version"
            );
        }
        if wanted > seq {
            refuse!(Usage, "--min-version {wanted} would withdraw version {seq} itself; name {seq} or less");
        }
        Ok(wanted)
    }

    fn check_floor(&self, seq: u64, floor: u64) -> Result<()> {
        if seq < floor {
            refuse!(
                BelowFloor,
                "version {seq} of {} was withdrawn: the lowest version allowed is {floor}; to serve its files again, \
                 seal them as a new version",
                self.name()
            );
        }
        Ok(())
    }

    fn expiry(&self, before: Option<&Ref>, expires: Expires) -> i64 {
        match (expires, before) {
            (Expires::At(at), _) => at,
            (Expires::AsBefore, Some(before)) if before.expires_at != i64::MAX => {
                let lifetime = before.expires_at.saturating_sub(before.issued_at).max(0);
                self.releaser.now.saturating_add(lifetime)
            }
            (Expires::AsBefore, Some(_) | None) => i64::MAX,
        }
    }

    fn name(&self) -> &str {
        &self.releaser.chain.model_name
    }
}

impl Moved {
    fn to(appended: Appended, before: Option<Ref>, survey: &Survey, channel: &str) -> Moved {
        let Appended { reference, unraised } = appended;
        let below =
            survey.heads.iter().filter(|(other, head)| *other != channel && head.seq < reference.min_version_seq);
        let withdrawn = below.map(|(other, head)| (other.clone(), head.seq)).collect();
        Moved { reference, before, written: true, withdrawn, unraised }
    }
}

/// The highest floor of all channels: a version withdrawn in one of them is no better in another.
fn survey_floor(survey: &Survey) -> u64 {
    survey.heads.values().map(|head| head.min_version_seq).max().unwrap_or(0)
}

/// The highest that any newest ref asks of the version's slots: moving a tag takes back no rotation.
fn min_slots_generation(version: &Resolved, survey: &Survey) -> u32 {
    let own = version.reference.map_or(1, |reference| reference.min_slots_generation);
    let heads = survey.heads.values().filter(|head| head.vid == version.header.vid);
    heads.map(|head| head.min_slots_generation).fold(own, u32::max)
}
