//! Who was denied how often, and who is refused everything for a while because of it.
//!
//! Counted by user, apart for each container and for those whose process cannot be seen: root of one container is not root of
//! the host. And by control group, for a program that goes through many users: once several users of a group were denied, all
//! of those are blocked, and everyone of the group with the next denial of his own. Whoever was denied nothing is not blocked
//! by what others did. Clocks are the caller's.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

/// Users, groups and blocks kept in mind at once.
const TABLE_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Users of one group kept in mind.
const MEMBERS_MAX: usize = 256;
/// Denials of one user and model closer together than this are one: a walk asks for a name several times.
pub const ONE_DENIAL: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DenialRules {
    /// So many denials ...
    pub count: u32,
    /// ... in this time ...
    pub within: Duration,
    /// ... and everything is refused for this.
    pub block: Duration,
}

impl DenialRules {
    pub const COUNT_MAX: u32 = 1000;
}

impl Default for DenialRules {
    fn default() -> DenialRules {
        DenialRules { count: 5, within: Duration::from_secs(300), block: Duration::from_secs(3600) }
    }
}

/// Where a user's process runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Where {
    Host,
    Container(String),
    /// Gone, or of a pid namespace that is not shown here.
    Unseen,
}

/// Whose denials are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Culprit {
    pub uid: u32,
    pub place: Where,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Blocked {
    User(Culprit),
    /// Its members that were denied something, now or later.
    Cgroup(String),
}

impl std::fmt::Display for Blocked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Blocked::User(Culprit { uid, place: Where::Host }) => write!(f, "uid={uid}"),
            Blocked::User(Culprit { uid, place: Where::Container(id) }) => {
                write!(f, "uid={uid} in container {}", id.get(..12).unwrap_or(id))
            }
            Blocked::User(Culprit { uid, place: Where::Unseen }) => write!(f, "uid={uid} out of sight"),
            Blocked::Cgroup(path) => write!(f, "cgroup={path}"),
        }
    }
}

/// A block, as it begins or stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub who: Blocked,
    pub until: Instant,
    /// In a sentence.
    pub why: String,
}

/// The blocks that begin with a denial, and those that end before their time since there is no room for more.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub begun: Vec<Block>,
    pub forgotten: Vec<Block>,
}

/// What becomes of one denial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// It is not part of one that was counted a moment ago.
    pub counts: bool,
    /// It is to be told, with how many before it that were not.
    pub tell: Option<u64>,
}

struct Last {
    since: Instant,
    times: u32,
    untold: u64,
}

impl Last {
    const fn at(since: Instant) -> Last {
        Last { since, times: 0, untold: 0 }
    }

    fn note(&mut self, told_max: u32, now: Instant) -> Notice {
        if now.saturating_duration_since(self.since) >= ONE_DENIAL {
            (self.since, self.times) = (now, 0);
        }
        self.times = self.times.saturating_add(1);
        let tell = if self.times <= told_max { Some(std::mem::take(&mut self.untold)) } else { None };
        self.untold += u64::from(tell.is_none());
        Notice { counts: self.times == 1, tell }
    }
}

#[derive(Default)]
struct Group {
    times: VecDeque<Instant>,
    members: Vec<(Culprit, Instant)>,
}

/// The tables.
pub struct Denials {
    last: LruCache<(Culprit, String), Last>,
    /// Apart, so that no refusal of this kind makes a denial count for less.
    refused: LruCache<Culprit, Last>,
    users: LruCache<Culprit, VecDeque<Instant>>,
    groups: LruCache<String, Group>,
    blocks: LruCache<Blocked, Block>,
}

impl Default for Denials {
    fn default() -> Denials {
        Denials {
            last: LruCache::new(TABLE_MAX),
            refused: LruCache::new(TABLE_MAX),
            users: LruCache::new(TABLE_MAX),
            groups: LruCache::new(TABLE_MAX),
            blocks: LruCache::new(TABLE_MAX),
        }
    }
}

impl Denials {
    /// Takes note of a denial; of those of one user and model within [`ONE_DENIAL`] one counts, and `told_max` are told.
    pub fn note(&mut self, who: &Culprit, model: &str, told_max: u32, now: Instant) -> Notice {
        self.last.get_or_insert_mut((who.clone(), model.to_owned()), || Last::at(now)).note(told_max, now)
    }

    /// Takes note of a refusal for another reason than the policy, which counts towards no block. Of those of one user within
    /// [`ONE_DENIAL`] `told_max` are told, whatever they are of: nothing else holds back whoever goes through the models.
    /// Returns whether it is to be told, with how many before it that were not.
    pub fn note_refusal(&mut self, who: &Culprit, told_max: u32, now: Instant) -> Option<u64> {
        self.refused.get_or_insert_mut(who.clone(), || Last::at(now)).note(told_max, now).tell
    }

    /// Counts one denial. The blocks that begin with it, and those that are forgotten for it.
    pub fn count(&mut self, rules: &DenialRules, who: &Culprit, cgroup: Option<&str>, now: Instant) -> Counted {
        let mut counted = Counted::default();
        let left = cgroup.and_then(|path| self.stands(&Blocked::Cgroup(path.to_owned()), now));
        if let Some(left) = left {
            let why = format!("denied in a control group that is blocked ({})", cgroup.unwrap_or_default());
            self.begin(Blocked::User(who.clone()), now + left, why, &mut counted, now);
            return counted;
        }
        let many = rules.count as usize;
        let times = self.users.get_or_insert_mut(who.clone(), VecDeque::new);
        note(times, rules.within, many, now);
        if times.len() >= many {
            times.clear();
            let why = format!("denied {} times within {} s", rules.count, rules.within.as_secs());
            self.begin(Blocked::User(who.clone()), now + rules.block, why, &mut counted, now);
        }
        if let Some(path) = cgroup {
            let group = self.groups.get_or_insert_mut(path.to_owned(), Group::default);
            note(&mut group.times, rules.within, many, now);
            group
                .members
                .retain(|(member, last)| member != who && now.saturating_duration_since(*last) <= rules.within);
            if group.members.len() >= MEMBERS_MAX {
                group.members.remove(0);
            }
            group.members.push((who.clone(), now));
            // One user alone is blocked by himself; more than one is a program that goes through users.
            if group.times.len() >= many && group.members.len() > 1 {
                let members = std::mem::take(&mut group.members);
                group.times.clear();
                let users = members.len();
                let why =
                    format!("{users} users of it denied {} times within {} s", rules.count, rules.within.as_secs());
                self.begin(Blocked::Cgroup(path.to_owned()), now + rules.block, why.clone(), &mut counted, now);
                for (member, _) in members {
                    let why = format!("denied in control group {path}: {why}");
                    self.begin(Blocked::User(member), now + rules.block, why, &mut counted, now);
                }
            }
        }
        counted
    }

    fn begin(&mut self, who: Blocked, until: Instant, why: String, counted: &mut Counted, now: Instant) {
        if self.stands(&who, now).is_some() {
            return;
        }
        let block = Block { who: who.clone(), until, why };
        counted.begun.push(block.clone());
        // Whoever comes last takes the place of whoever was asked about longest ago, if there is none left.
        counted
            .forgotten
            .extend(self.blocks.push(who, block).map(|(_, block)| block).filter(|block| block.until > now));
    }

    /// To be asked about keeps a block from being forgotten: that of a group above all, which each of its users asks about.
    fn stands(&mut self, who: &Blocked, now: Instant) -> Option<Duration> {
        self.blocks.get(who)?.until.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// How much longer this user is refused everything.
    pub fn blocked(&mut self, who: &Culprit, now: Instant) -> Option<Duration> {
        if self.blocks.is_empty() {
            return None;
        }
        self.stands(&Blocked::User(who.clone()), now)
    }

    /// Every block that stands.
    pub fn standing(&self, now: Instant) -> Vec<Block> {
        self.blocks.iter().map(|(_, block)| block.clone()).filter(|block| block.until > now).collect()
    }

    /// Takes out what is over, and tells of the blocks among it. Denials count for as long as `within`, so nobody whose last
    /// one is longer ago is kept in mind.
    pub fn expire(&mut self, within: Duration, now: Instant) -> Vec<Block> {
        let is_old = |last: Option<&Instant>| last.is_none_or(|last| now.saturating_duration_since(*last) > within);
        while self.users.peek_lru().is_some_and(|(_, times)| is_old(times.back())) {
            self.users.pop_lru();
        }
        while self.groups.peek_lru().is_some_and(|(_, group)| is_old(group.members.last().map(|(_, last)| last))) {
            self.groups.pop_lru();
        }
        forget(&mut self.last, now);
        forget(&mut self.refused, now);
        self.take(|block| block.until <= now)
    }

    /// Lifts blocks; whoever was blocked begins anew.
    pub fn lift(&mut self, wanted: impl Fn(&Blocked) -> bool) -> Vec<Block> {
        let lifted = self.take(|block| wanted(&block.who));
        for block in &lifted {
            match &block.who {
                Blocked::User(who) => drop(self.users.pop(who)),
                Blocked::Cgroup(path) => drop(self.groups.pop(path)),
            }
        }
        lifted
    }

    fn take(&mut self, wanted: impl Fn(&Block) -> bool) -> Vec<Block> {
        let over: Vec<Blocked> =
            self.blocks.iter().filter(|(_, block)| wanted(block)).map(|(who, _)| who.clone()).collect();
        over.iter().filter_map(|who| self.blocks.pop(who)).collect()
    }

    pub fn has_blocks(&self) -> bool {
        !self.blocks.is_empty()
    }
}

/// Drops what the next denial would begin anew, unless there is something to be told with that.
fn forget<K: Clone + Eq + std::hash::Hash>(table: &mut LruCache<K, Last>, now: Instant) {
    let old = table.iter().rev().take_while(|(_, last)| now.saturating_duration_since(last.since) >= ONE_DENIAL);
    let over: Vec<K> = old.filter(|(_, last)| last.untold == 0).map(|(who, _)| who.clone()).collect();
    for who in &over {
        table.pop(who);
    }
}

/// Keeps what is not older than `within`, `most` of it, and adds `now`.
fn note(times: &mut VecDeque<Instant>, within: Duration, most: usize, now: Instant) {
    times.retain(|time| now.saturating_duration_since(*time) <= within);
    while times.len() >= most.max(1) {
        times.pop_front();
    }
    times.push_back(now);
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: DenialRules =
        DenialRules { count: 5, within: Duration::from_secs(300), block: Duration::from_secs(3600) };

    fn host(uid: u32) -> Culprit {
        Culprit { uid, place: Where::Host }
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn five_denials_within_five_minutes_block_for_an_hour_and_four_do_not() {
        let (mut denials, start) = (Denials::default(), Instant::now());
        for number in 0..4 {
            assert!(denials.count(&RULES, &host(1000), None, start + s(number)).begun.is_empty());
        }
        assert_eq!(denials.blocked(&host(1000), start + s(4)), None);
        // The first has been forgotten by then.
        assert!(denials.count(&RULES, &host(1000), None, start + s(301)).begun.is_empty());
        let begun = denials.count(&RULES, &host(1000), None, start + s(301)).begun;
        assert_eq!(begun.len(), 1, "{begun:?}");
        assert_eq!(begun[0].who.to_string(), "uid=1000");
        assert_eq!(denials.blocked(&host(1000), start + s(302)), Some(s(3599)));
        assert_eq!(denials.blocked(&host(1001), start + s(302)), None);
        assert_eq!(denials.blocked(&host(1000), start + s(301 + 3600)), None);
        assert_eq!(denials.expire(RULES.within, start + s(301 + 3599)), []);
        assert_eq!(denials.expire(RULES.within, start + s(301 + 3600)), begun);
        assert!(!denials.has_blocks());
    }

    #[test]
    fn root_of_a_container_is_not_root_of_the_host() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        let inside = Culprit { uid: 0, place: Where::Container("3f2a".repeat(16)) };
        let begun: Vec<Block> = (0..5).flat_map(|_| denials.count(&RULES, &inside, None, now).begun).collect();
        assert_eq!(begun[0].who.to_string(), "uid=0 in container 3f2a3f2a3f2a");
        assert!(denials.blocked(&inside, now).is_some());
        for other in [Where::Host, Where::Unseen, Where::Container("b".repeat(64))] {
            assert_eq!(denials.blocked(&Culprit { uid: 0, place: other }, now), None);
        }
    }

    #[test]
    fn a_program_that_goes_through_users_is_stopped_and_its_innocent_neighbours_are_not() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        let begun: Vec<Block> =
            (2000..2005).flat_map(|uid| denials.count(&RULES, &host(uid), Some("/s"), now).begun).collect();
        let told: Vec<String> = begun.iter().map(|block| block.who.to_string()).collect();
        assert_eq!(told, ["cgroup=/s", "uid=2000", "uid=2001", "uid=2002", "uid=2003", "uid=2004"]);
        assert_eq!(denials.blocked(&host(3000), now), None, "never denied anything");
        // The next one it tries is blocked by his first denial.
        let next = denials.count(&RULES, &host(2005), Some("/s"), now + s(1000)).begun;
        assert_eq!(next.len(), 1);
        assert_eq!(denials.blocked(&host(2005), now + s(1000)), Some(s(2600)), "for as long as the group");
        assert!(denials.count(&RULES, &host(2006), Some("/other"), now + s(1000)).begun.is_empty());
    }

    #[test]
    fn one_user_alone_blocks_no_group() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        let begun: Vec<Block> = (0..20).flat_map(|_| denials.count(&RULES, &host(1), Some("/s"), now).begun).collect();
        assert!(begun.iter().all(|block| block.who == Blocked::User(host(1))), "{begun:?}");
        assert!(denials.count(&RULES, &host(2), Some("/other"), now).begun.is_empty());
        assert_eq!(denials.blocked(&host(2), now), None);
    }

    #[test]
    fn one_walk_is_one_denial_and_every_model_counts() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        let mut note = |uid, model: &str, at| {
            let Notice { counts, tell } = denials.note(&host(uid), model, 2, at);
            (counts, tell)
        };
        assert_eq!(note(1, "a", now), (true, Some(0)));
        assert_eq!(note(1, "a", now + Duration::from_millis(5)), (false, Some(0)));
        assert_eq!(note(1, "b", now), (true, Some(0)));
        assert_eq!(note(2, "a", now), (true, Some(0)));
        // Beyond what is told, how many it were is told with the next.
        assert_eq!(note(1, "a", now + Duration::from_millis(6)), (false, None));
        assert_eq!(note(1, "a", now + Duration::from_millis(7)), (false, None));
        assert_eq!(note(1, "a", now + ONE_DENIAL), (true, Some(2)));
    }

    #[test]
    fn refusals_that_block_nobody_are_told_so_often_a_second_and_hide_no_denial() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        let told: Vec<_> = (0..5).map(|_| denials.note_refusal(&host(1), 2, now)).collect();
        assert_eq!(told, [Some(0), Some(0), None, None, None]);
        assert_eq!(denials.note_refusal(&host(2), 2, now), Some(0), "another user");
        assert!(denials.note(&host(1), "a", 2, now).counts);
        assert_eq!(denials.note_refusal(&host(1), 2, now + ONE_DENIAL), Some(3));
        assert_eq!(denials.note_refusal(&host(1), 2, now + ONE_DENIAL), Some(0));
    }

    #[test]
    fn who_is_let_in_begins_anew() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        for _ in 0..7 {
            denials.count(&RULES, &host(1), None, now);
        }
        assert_eq!(denials.lift(|who| *who == Blocked::User(host(1))).len(), 1);
        assert_eq!(denials.blocked(&host(1), now), None);
        for _ in 0..4 {
            assert!(denials.count(&RULES, &host(1), None, now).begun.is_empty());
        }
    }

    /// Root of a container with many users under him.
    #[test]
    fn a_block_that_is_forgotten_for_want_of_room_is_told_and_a_groups_own_is_not_forgotten() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        for uid in 1..6 {
            denials.count(&RULES, &host(uid), Some("/s"), now);
        }
        let innocent = host(1_000_000);
        let forgotten: Vec<Blocked> = (10..2 * TABLE_MAX.get() as u32)
            .flat_map(|uid| denials.count(&RULES, &host(uid), Some("/s"), now).forgotten)
            .map(|block| block.who)
            .collect();
        assert!(forgotten.contains(&Blocked::User(host(1))) && forgotten.contains(&Blocked::User(host(10))));
        assert!(!forgotten.contains(&Blocked::Cgroup("/s".into())), "its own users kept it in mind");
        for who in &forgotten {
            assert!(!denials.standing(now).iter().any(|block| block.who == *who), "{who}");
        }
        assert_eq!(denials.blocked(&innocent, now), None);
        assert_eq!(denials.count(&RULES, &innocent, Some("/s"), now).begun.len(), 1, "the group is blocked still");
    }

    #[test]
    fn who_was_not_denied_for_a_while_is_forgotten_and_who_was_is_not() {
        let (mut denials, start) = (Denials::default(), Instant::now());
        let kept = |denials: &Denials| {
            let tables = [denials.users.len(), denials.groups.len(), denials.last.len(), denials.refused.len()];
            (tables, denials.blocks.len())
        };
        for uid in 0..4 {
            denials.note(&host(uid), "m", 1, start);
            denials.note_refusal(&host(uid), 1, start);
            denials.count(&RULES, &host(uid), Some(&format!("/{uid}")), start);
        }
        // Of the last one more is to be told than was.
        denials.note(&host(3), "m", 1, start);
        denials.note_refusal(&host(3), 1, start);
        denials.expire(RULES.within, start);
        assert_eq!(kept(&denials), ([4, 4, 4, 4], 0), "a moment ago");
        denials.count(&RULES, &host(0), Some("/0"), start + s(100));
        denials.expire(RULES.within, start + s(300));
        assert_eq!(kept(&denials), ([4, 4, 1, 1], 0), "they count for five minutes");
        denials.expire(RULES.within, start + s(301));
        assert_eq!(kept(&denials), ([1, 1, 1, 1], 0), "one of them has been denied since");
        // What was counted of him counts on.
        let begun: Vec<Block> =
            (0..4).flat_map(|_| denials.count(&RULES, &host(0), None, start + s(301)).begun).collect();
        assert_eq!(begun.len(), 1, "{begun:?}");
        denials.expire(RULES.within, start + s(301 + 1000));
        assert_eq!(kept(&denials), ([0, 0, 1, 1], 1), "a block stands for its own time");
        assert_eq!(denials.note_refusal(&host(3), 1, start + s(2000)), Some(1), "and what was not told is told");
        denials.note(&host(3), "m", 1, start + s(2000));
        denials.expire(RULES.within, start + s(4000));
        assert_eq!(kept(&denials), ([0; 4], 0));
    }

    #[test]
    fn the_tables_are_bounded() {
        let (mut denials, now) = (Denials::default(), Instant::now());
        let rules = DenialRules { count: 1, ..RULES };
        for uid in 0..3 * TABLE_MAX.get() as u32 {
            denials.note(&host(uid), "m", 1, now);
            denials.note_refusal(&host(uid), 1, now);
            denials.count(&rules, &host(uid), Some(&format!("/{uid}")), now);
        }
        let most = TABLE_MAX.get();
        assert_eq!(denials.blocks.len(), most);
        assert!(denials.users.len() <= most && denials.groups.len() <= most && denials.last.len() <= most);
        assert!(denials.refused.len() <= most);
    }
}
