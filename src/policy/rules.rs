//! One asker, one model, the first rule that fits.
//!
//! A rule may turn on what only a visible process tells (supplementary groups, cgroup, container, pod). Where that cannot be
//! seen, or only a piece of it, whether the rule fits is unknown: then it grants nothing, and what it takes away it takes away. So the answer is the
//! least that any process behind the request could get.

use super::Policy;
use super::denials::{Culprit, Where};
use super::limits::{Limits, Rate, Share, Shares, WAIT_USUAL};
use crate::keys::Glob;
use crate::processes::{self, Name, Seen};

/// What an asker may do with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum May {
    /// It is not listed and not found.
    None,
    /// Names, sizes and dates; an open is EACCES.
    See,
    Read,
}

impl May {
    pub const ALL: [May; 3] = [May::None, May::See, May::Read];

    pub const fn name(self) -> &'static str {
        match self {
            May::None => "none",
            May::See => "see",
            May::Read => "read",
        }
    }
}

/// Whoever asks, as the kernel says it with the request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asker {
    pub uid: u32,
    pub gid: u32,
    /// `None`: gone, or of a pid namespace that is not shown here.
    pub seen: Option<Seen>,
    /// Of the mount, where it is a pod's.
    pub service_account: Option<String>,
    /// The UID of the pod that the mount is for.
    pub pod: Option<String>,
}

impl Asker {
    /// With whom this one's denials are counted: his container's outermost, so that new names below it are no new start. An
    /// id that the user may have made up is none.
    pub fn culprit(&self) -> Culprit {
        let place = match &self.seen {
            None => Where::Unseen,
            Some(seen) => match &seen.container {
                Some(id) if !seen.cgroup.as_deref().is_some_and(is_a_users_own) => Where::Container(id.clone()),
                Some(_) | None => Where::Host,
            },
        };
        Culprit { uid: self.uid, place }
    }
}

/// What the kernel shows in place of a group that has no number here: it says nothing of who somebody is.
const NO_GROUP: u32 = 65_534;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fits {
    Yes,
    No,
    Unknown,
}

/// Whom a rule is about. Every kind that is named must fit; within a kind one entry is enough.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Who {
    pub everybody: bool,
    pub uids: Vec<u32>,
    pub gids: Vec<u32>,
    /// Absolute paths: the control group itself and all below it.
    pub cgroups: Vec<String>,
    /// Ids, or their first twelve or more digits.
    pub containers: Vec<String>,
    pub pods: Vec<String>,
    pub service_accounts: Vec<String>,
}

impl Who {
    /// Whether anything is said of whom it is about.
    pub fn is_anybody(&self) -> bool {
        self.everybody || *self != Who::default()
    }

    /// Whether /proc has to be asked.
    fn needs_process(&self) -> bool {
        !(self.gids.is_empty() && self.cgroups.is_empty() && self.containers.is_empty() && self.pods.is_empty())
    }

    fn fits(&self, asker: &Asker) -> Fits {
        let of_uid = known(self.uids.is_empty() || self.uids.contains(&asker.uid));
        let account = |account: &String| self.service_accounts.contains(account);
        let of_account = known(self.service_accounts.is_empty() || asker.service_account.as_ref().is_some_and(account));
        let of_group = if self.gids.is_empty() || self.gids.contains(&asker.gid) {
            Fits::Yes
        } else {
            if_seen(asker, |seen| known(seen.groups.iter().any(|gid| *gid != NO_GROUP && self.gids.contains(gid))))
        };
        let of_cgroup = when(&self.cgroups, asker, |seen| match seen.cgroup.as_deref() {
            Some(path) if !is_cut_short(path) => known(self.cgroups.iter().any(|above| is_below(path, above))),
            Some(_) | None => Fits::Unknown,
        });
        // A user who is given a part of the control groups names groups in it as he likes: there an id is worth no more
        // than his own word, unless the rule names him. So it is with whatever a container names below itself, always.
        let believed = |seen: &Seen| !self.uids.is_empty() || !seen.cgroup.as_deref().is_some_and(is_a_users_own);
        let by_id = |seen: &Seen, id: &Option<String>, fits: &dyn Fn(&str) -> bool, names: &dyn Fn(&Name) -> bool| {
            if id.as_deref().is_some_and(fits) {
                if believed(seen) { Fits::Yes } else { Fits::Unknown }
            } else if seen.cgroup.as_deref().is_some_and(|path| processes::names(path).any(|name| names(&name))) {
                Fits::Unknown
            } else {
                Fits::No
            }
        };
        let is_container = |id: &str| self.containers.iter().any(|start| id.starts_with(start.as_str()));
        let is_pod = |uid: &str| self.pods.iter().any(|pod| pod == uid);
        let of_container = when(&self.containers, asker, |seen| {
            by_id(seen, &seen.container, &is_container, &|name| matches!(name, Name::Container(id) if is_container(id)))
        });
        let by_process = when(&self.pods, asker, |seen| {
            by_id(seen, &seen.pod, &is_pod, &|name| matches!(name, Name::Pod(uid) if is_pod(uid)))
        });
        // A pod's volume is in the tree of that pod alone: whoever is not seen there is its. Who is seen must be so too.
        let of_pod = match asker.pod.as_deref().filter(|_| !self.pods.is_empty()).map(|uid| known(is_pod(uid))) {
            Some(by_volume) if asker.seen.is_none() || by_process == by_volume => by_volume,
            Some(_) => Fits::Unknown,
            None => by_process,
        };
        let all = [of_uid, of_account, of_group, of_cgroup, of_container, of_pod];
        if all.contains(&Fits::No) {
            Fits::No
        } else if all.contains(&Fits::Unknown) {
            Fits::Unknown
        } else {
            Fits::Yes
        }
    }
}

const fn known(yes: bool) -> Fits {
    if yes { Fits::Yes } else { Fits::No }
}

fn if_seen(asker: &Asker, look: impl Fn(&Seen) -> Fits) -> Fits {
    asker.seen.as_ref().map_or(Fits::Unknown, look)
}

fn when(named: &[String], asker: &Asker, look: impl Fn(&Seen) -> Fits) -> Fits {
    if named.is_empty() { Fits::Yes } else { if_seen(asker, look) }
}

fn is_below(path: &str, above: &str) -> bool {
    let above = above.trim_end_matches('/');
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// In a cgroup namespace of our own the kernel tells of a group outside only how it lies to ours: `/../x.service` may be
/// `/system.slice/x.service` or any other `x.service`.
fn is_cut_short(path: &str) -> bool {
    path.split('/').any(|part| part == "..")
}

/// Below `user@UID.service` systemd lets a user make control groups of any name; root of a machine of systemd-nspawn or LXC,
/// which have no ids, may do so below what it was given. What lies in a container says nothing of what it lies in.
fn is_a_users_own(cgroup: &str) -> bool {
    cgroup.split('/').take_while(|part| Name::of(part).is_none()).any(|part| {
        let of_machine = matches!(part, "payload" | "lxc") || part.starts_with("lxc.payload");
        of_machine || part.starts_with("user@") && part.ends_with(".service")
    })
}

#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// For people and the audit log.
    pub name: String,
    pub who: Who,
    pub models: Vec<Glob>,
    pub may: May,
    /// Each of them instead of the policy's own.
    pub limits: Limits,
}

/// The answer, and the number of the rule that gave it; `None`: no rule fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub may: May,
    pub rule: Option<usize>,
}

impl Policy {
    pub fn judge(&self, asker: &Asker, model: &str) -> Verdict {
        let mut most = May::Read;
        for (number, rule) in self.rules.iter().enumerate() {
            if !rule.models.iter().any(|glob| glob.matches(model)) {
                continue;
            }
            match rule.who.fits(asker) {
                Fits::No => {}
                Fits::Unknown => most = most.min(rule.may),
                Fits::Yes => return Verdict { may: rule.may.min(most), rule: Some(number) },
            }
        }
        Verdict { may: May::None, rule: None }
    }

    /// Whether any rule turns on more than the kernel says with a request.
    pub fn needs_process(&self) -> bool {
        self.rules.iter().any(|rule| rule.who.needs_process())
    }

    /// The limits that hold for whom this rule lets in. What the rule does not limit itself counts with all that the other
    /// rules let: else a user would have the policy's limits once for each rule that fits him.
    pub fn shares_of(&self, rule: Option<usize>) -> Shares {
        let own = rule.and_then(|rule| self.rules.get(rule)).map(|rule| &rule.limits);
        let share = |of: fn(&Limits) -> Option<Rate>| match own.and_then(of) {
            Some(rate) => Some(Share { rate, rule }),
            None => of(&self.limits).map(|rate| Share { rate, rule: None }),
        };
        let wait = own.and_then(|own| own.wait).or(self.limits.wait).unwrap_or(WAIT_USUAL);
        Shares { opens: share(|limits| limits.opens), bytes: share(|limits| limits.bytes), wait }
    }

    /// How a rule is called in a sentence.
    pub fn told(&self, rule: Option<usize>) -> String {
        match rule {
            Some(number) => format!("rule {} ({})", number + 1, self.rules[number].name),
            None => "no rule".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Limiter;

    fn policy(rules: &str) -> Policy {
        Policy::parse(rules).unwrap_or_else(|error| panic!("{rules}: {}", error.chain()))
    }

    fn host(uid: u32, gid: u32, groups: &[u32]) -> Asker {
        let seen = Seen { pid: 7, uid, groups: groups.to_vec(), cgroup: Some("/".into()), ..Seen::default() };
        Asker { uid, gid, seen: Some(seen), service_account: None, pod: None }
    }

    fn unseen(uid: u32, gid: u32) -> Asker {
        Asker { uid, gid, seen: None, service_account: None, pod: None }
    }

    fn may(policy: &Policy, asker: &Asker, model: &str) -> May {
        policy.judge(asker, model).may
    }

    #[test]
    fn what_no_rule_grants_is_denied_and_the_first_rule_that_fits_decides() {
        let policy = policy(
            "[[rule]]\nuids = [1003]\nmodels = [\"acme/*\"]\nmay = \"none\"\n\
             [[rule]]\ngids = [4300]\nmodels = [\"acme/*\"]\nmay = \"read\"\n\
             [[rule]]\neverybody = true\nmodels = [\"acme/open\"]\nmay = \"see\"\n",
        );
        assert_eq!(may(&policy, &host(1000, 4300, &[]), "acme/secret"), May::Read);
        assert_eq!(may(&policy, &host(1003, 4300, &[]), "acme/secret"), May::None, "taken out before the group");
        assert_eq!(may(&policy, &host(1000, 1000, &[]), "acme/secret"), May::None);
        assert_eq!(may(&policy, &host(1000, 1000, &[]), "acme/open"), May::See);
        assert_eq!(may(&policy, &host(0, 0, &[]), "acme/secret"), May::None, "root like anybody");
        assert_eq!(policy.judge(&host(1000, 1000, &[]), "other").rule, None);
    }

    /// One user, whom two rules let in to different models.
    #[test]
    fn the_policys_limits_hold_for_a_user_whatever_rules_let_him_in() {
        let of = |limits: &str| {
            policy(&format!(
                "[limits]\nopens_per_s = 1\nopens_burst = 2\nbytes_per_s = \"1KiB\"\nwait = \"7s\"\n\
                 [[rule]]\nuids = [1000]\nmodels = [\"a\"]\nmay = \"read\"\n\
                 [[rule]]\neverybody = true\nmodels = [\"b\"]\nmay = \"read\"\n{limits}"
            ))
        };
        // What he is given of one model, asked about under the rule of the other.
        let left = |policy: &Policy| {
            let limiter = Limiter::default();
            let buckets = |model| {
                let verdict = policy.judge(&host(1000, 1000, &[]), model);
                assert_eq!(verdict.may, May::Read);
                limiter.buckets(1000, &policy.shares_of(verdict.rule)).expect("limited")
            };
            // More than comes back while this runs.
            let first = buckets("a");
            (0..100_000).for_each(|_| first.opened());
            first.given(1 << 40);
            let second = buckets("b");
            (second.may_open(false).is_ok(), second.may_read().is_ok(), second.wait().as_secs())
        };
        assert_eq!(left(&of("")), (false, false, 7), "neither rule has limits of its own");
        assert_eq!(
            left(&of("limits = { opens_per_s = 9 }\n")),
            (true, false, 7),
            "its own opens, and no bytes of its own"
        );
        assert_eq!(left(&of("limits = { bytes_per_s = \"9KiB\" }\n")), (false, true, 7));
        assert_eq!(left(&of("limits = { wait = \"1s\" }\n")), (false, false, 1), "a time to wait is no bucket");
        assert_eq!(left(&of("limits = { opens_per_s = 9, bytes_per_s = \"9KiB\" }\n")), (true, true, 7));
    }

    #[test]
    fn supplementary_groups_count_and_nogroup_is_nobodys() {
        let policy = policy("[[rule]]\ngids = [4300, 65534]\nmodels = [\"*\"]\nmay = \"read\"\n");
        assert_eq!(may(&policy, &host(1000, 1000, &[27, 4300]), "m"), May::Read);
        assert_eq!(may(&policy, &host(1000, 1000, &[27, 65534]), "m"), May::None);
        assert_eq!(may(&policy, &host(65534, 65534, &[]), "m"), May::Read, "as a primary group the kernel says it");
    }

    #[test]
    fn whose_process_cannot_be_seen_gets_what_uid_and_primary_group_say_and_never_more() {
        let grants = policy(
            "[[rule]]\ngids = [4300]\nmodels = [\"a\"]\nmay = \"read\"\n\
             [[rule]]\ncontainers = [\"3f2a3f2a3f2a\"]\nmodels = [\"b\"]\nmay = \"read\"\n\
             [[rule]]\nuids = [1000]\nmodels = [\"c\"]\nmay = \"read\"\n",
        );
        assert_eq!(may(&grants, &unseen(1000, 4300), "a"), May::Read, "the primary group is the kernel's word");
        assert_eq!(may(&grants, &unseen(1000, 1000), "a"), May::None);
        assert_eq!(may(&grants, &unseen(1000, 1000), "b"), May::None);
        assert_eq!(may(&grants, &unseen(1000, 1000), "c"), May::Read);

        // A rule that takes away might fit: then it does.
        let takes = policy(
            "[[rule]]\ncontainers = [\"3f2a3f2a3f2a\"]\nmodels = [\"*\"]\nmay = \"none\"\n\
             [[rule]]\ngids = [99]\nmodels = [\"m\"]\nmay = \"see\"\n\
             [[rule]]\nuids = [1000]\nmodels = [\"*\"]\nmay = \"read\"\n",
        );
        assert_eq!(may(&takes, &host(1000, 1000, &[]), "m"), May::Read);
        assert_eq!(may(&takes, &host(1000, 1000, &[99]), "m"), May::See);
        assert_eq!(may(&takes, &unseen(1000, 1000), "m"), May::None);
    }

    /// For every asker the unseen one gets no more than any process that could be behind it.
    #[test]
    fn the_unseen_never_get_more_than_the_seen() {
        let seed = std::env::var("MODELFS_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(7_u64);
        println!("MODELFS_TEST_SEED={seed}");
        let mut state = seed;
        let mut below = |bound: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % bound
        };
        for _ in 0..2000 {
            let mut text = String::new();
            for _ in 0..1 + below(4) {
                let who = match below(5) {
                    0 => format!("uids = [{}]", below(2)),
                    1 => format!("gids = [{}]", below(3)),
                    2 => format!("containers = [\"{}\"]", ["a", "b"][below(2) as usize].repeat(12)),
                    3 => "cgroups = [\"/system.slice\"]".to_owned(),
                    _ => "everybody = true".to_owned(),
                };
                let may = ["none", "see", "read"][below(3) as usize];
                text += &format!("[[rule]]\n{who}\nmodels = [\"*\"]\nmay = \"{may}\"\n");
            }
            let policy = policy(&text);
            for uid in 0..2 {
                for gid in 0..3 {
                    let least = may(&policy, &unseen(uid, gid), "m");
                    for groups in [vec![], vec![1], vec![1, 2]] {
                        for container in [None, Some("a".repeat(64)), Some("b".repeat(64))] {
                            let nested = format!("/docker/{}/{}", "a".repeat(64), "b".repeat(64));
                            for cgroup in ["/", "/system.slice/x.service", "/user.slice/user@1.service/x", &nested] {
                                let groups = groups.clone();
                                let cgroup = Some(cgroup.to_owned());
                                let container = container.clone();
                                let seen = Some(Seen { pid: 1, uid, groups, cgroup, container, pod: None });
                                let asker = Asker { uid, gid, seen, service_account: None, pod: None };
                                assert!(least <= may(&policy, &asker, "m"), "{asker:?} under\n{text}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_kind_that_a_rule_names_must_fit() {
        let policy = policy(
            "[[rule]]\nuids = [0]\ncontainers = [\"3f2a3f2a3f2a\"]\nmodels = [\"*\"]\nmay = \"read\"\n\
             [[rule]]\nservice_accounts = [\"ml/llama\"]\npods = [\"0f8fad5b-d9cb-469f-a165-70867728950e\"]\n\
             models = [\"*\"]\nmay = \"read\"\n",
        );
        let mut asker = host(0, 0, &[]);
        assert_eq!(may(&policy, &asker, "m"), May::None, "root outside the container");
        asker.seen.as_mut().expect("seen").container = Some("3f2a".repeat(16));
        assert_eq!(may(&policy, &asker, "m"), May::Read);
        asker.uid = 1;
        assert_eq!(may(&policy, &asker, "m"), May::None);
        asker.service_account = Some("ml/llama".into());
        assert_eq!(may(&policy, &asker, "m"), May::None, "the pod is another");
        asker.seen.as_mut().expect("seen").pod = Some("0f8fad5b-d9cb-469f-a165-70867728950e".into());
        assert_eq!(may(&policy, &asker, "m"), May::Read);
    }

    /// Where the driver does not see the processes of pods, the volume says whose it is; where it sees one, both must.
    #[test]
    fn a_rule_of_pods_fits_the_pod_that_the_volume_is_for_and_no_process_that_is_seen_elsewhere() {
        let (uid, other) = ("0f8fad5b-d9cb-469f-a165-70867728950e", "11111111-d9cb-469f-a165-70867728950e");
        let rule = |uid: &str, may: &str| format!("[[rule]]\npods = [\"{uid}\"]\nmodels = [\"*\"]\nmay = \"{may}\"\n");
        let everybody = "[[rule]]\neverybody = true\nmodels = [\"*\"]\nmay = \"read\"\n";
        let (grants, takes) = (policy(&rule(uid, "read")), policy(&format!("{}{everybody}", rule(uid, "none"))));
        let in_volume_of = |pod: &str, asker: Asker| Asker { pod: Some(pod.into()), ..asker };
        let seen_in = |pod: &str| in_group(0, &format!("/kubepods/pod{pod}/{}", "a".repeat(64)));
        for (asker, granted, taken, what) in [
            (in_volume_of(uid, unseen(0, 0)), May::Read, May::None, "its own volume, unseen"),
            (in_volume_of(other, unseen(0, 0)), May::None, May::Read, "another's volume, unseen"),
            (in_volume_of(uid, seen_in(uid)), May::Read, May::None, "its own volume, seen in it"),
            (in_volume_of(other, seen_in(other)), May::None, May::Read, "another's volume, seen in that"),
            (in_volume_of(uid, seen_in(other)), May::None, May::None, "seen in another pod"),
            (in_volume_of(other, seen_in(uid)), May::None, May::None, "seen in another's volume"),
            (in_volume_of(uid, host(0, 0, &[])), May::None, May::None, "a process of the node in a pod's volume"),
            (unseen(0, 0), May::None, May::None, "no pod's mount, unseen"),
        ] {
            assert_eq!(may(&grants, &asker, "m"), granted, "{what}: grants");
            assert_eq!(may(&takes, &asker, "m"), taken, "{what}: takes");
        }
    }

    #[test]
    fn a_control_group_is_a_path_and_what_lies_below_it() {
        let policy = policy("[[rule]]\ncgroups = [\"/system.slice/vllm.service\"]\nmodels = [\"*\"]\nmay = \"read\"\n");
        for (path, wanted) in [
            ("/system.slice/vllm.service", May::Read),
            ("/system.slice/vllm.service/worker", May::Read),
            ("/system.slice/vllm.service.d", May::None),
            ("/system.slice", May::None),
            ("/x/system.slice/vllm.service", May::None),
        ] {
            let mut asker = host(0, 0, &[]);
            asker.seen.as_mut().expect("seen").cgroup = Some(path.into());
            assert_eq!(may(&policy, &asker, "m"), wanted, "{path}");
        }
    }

    /// A daemon with the host's pid namespace and a cgroup namespace of its own.
    #[test]
    fn a_control_group_that_is_told_from_inside_another_is_not_known() {
        let rule = |may: &str| {
            format!("[[rule]]\ncgroups = [\"/system.slice/x.service\"]\nmodels = [\"*\"]\nmay = \"{may}\"\n")
        };
        let everybody = "[[rule]]\neverybody = true\nmodels = [\"*\"]\nmay = \"read\"\n";
        for path in ["/../x.service", "/../../system.slice/x.service", "/.."] {
            let asker = in_group(0, path);
            assert_eq!(may(&policy(&rule("read")), &asker, "m"), May::None, "{path}: grants nothing");
            assert_eq!(may(&policy(&format!("{}{everybody}", rule("none"))), &asker, "m"), May::None, "{path}: takes");
            assert_eq!(may(&policy(everybody), &asker, "m"), May::Read, "{path}");
        }
        // What an engine names is told by its name all the same.
        let id = "3f2a".repeat(16);
        let beside = in_group(0, &format!("/../docker-{id}.scope"));
        let by_id = format!("[[rule]]\ncontainers = [\"{id}\"]\nmodels = [\"*\"]\nmay = \"read\"\n");
        assert_eq!(may(&policy(&by_id), &beside, "m"), May::Read);
    }

    /// As [`crate::processes::seen`] would make it of a process in this control group.
    fn in_group(uid: u32, cgroup: &str) -> Asker {
        let mut asker = host(uid, uid, &[]);
        let seen = asker.seen.as_mut().expect("seen");
        (seen.container, seen.pod) = processes::container_and_pod(cgroup);
        seen.cgroup = Some(cgroup.into());
        asker
    }

    #[test]
    fn a_container_that_names_another_below_itself_is_not_that_one() {
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let (pod, of_pod) = ("0f8fad5b-d9cb-469f-a165-70867728950e", "11111111-d9cb-469f-a165-70867728950e");
        let rule = |who: &str, may: &str| format!("[[rule]]\n{who}\nmodels = [\"*\"]\nmay = \"{may}\"\n");
        let of_b = format!("containers = [\"{b}\"]");
        let of_a = format!("containers = [\"{a}\"]");
        let of_p = format!("pods = [\"{pod}\"]");
        let everybody = rule("everybody = true", "read");
        for path in [
            format!("/system.slice/docker-{a}.scope/{b}"),
            format!("/system.slice/docker-{a}.scope/docker-{b}.scope"),
            format!("/kubepods/pod{of_pod}/{a}/kubepods/pod{pod}/{b}"),
        ] {
            let asker = in_group(0, &path);
            for who in [of_b.clone(), format!("{of_b}\nuids = [0]")] {
                assert_eq!(may(&policy(&rule(&who, "read")), &asker, "m"), May::None, "{path}: {who}");
            }
            assert_eq!(may(&policy(&rule(&of_a, "read")), &asker, "m"), May::Read, "{path}: the engine's own name");
            // What it claims to be is taken away from it as well.
            let takes = policy(&format!("{}{everybody}", rule(&of_b, "none")));
            assert_eq!(may(&takes, &asker, "m"), May::None, "{path}");
            assert_eq!(asker.culprit().place, Where::Container(a.clone()), "{path}: no new start");
        }
        let claims = in_group(0, &format!("/docker/{a}/kubepods/pod{pod}"));
        assert_eq!(may(&policy(&rule(&of_p, "read")), &claims, "m"), May::None);
        let genuine = in_group(0, &format!("/kubepods/pod{pod}/{b}"));
        assert_eq!(may(&policy(&rule(&of_p, "read")), &genuine, "m"), May::Read);
        assert_eq!(may(&policy(&rule(&of_b, "read")), &genuine, "m"), May::Read);
        // Nor can it pass for a user of the host.
        let within = in_group(0, &format!("/docker/{a}/user@0.service/payload"));
        assert_eq!(within.culprit().place, Where::Container(a.clone()));
        assert_eq!(may(&policy(&rule(&of_a, "read")), &within, "m"), May::Read);
        for machine in ["/machine.slice/machine-x.scope/payload", "/lxc.payload.x"] {
            let asker = in_group(0, &format!("{machine}/docker/{b}"));
            assert_eq!(may(&policy(&rule(&of_b, "read")), &asker, "m"), May::None, "{machine}");
            assert_eq!(asker.culprit().place, Where::Host, "{machine}");
        }
    }

    #[test]
    fn an_id_in_control_groups_that_a_user_may_name_is_worth_his_word_alone() {
        let id = "3f2a".repeat(16);
        let mut asker = host(1000, 1000, &[]);
        let seen = asker.seen.as_mut().expect("seen");
        seen.container = Some(id.clone());
        seen.cgroup = Some(format!("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{id}.scope"));
        let by_id = "[[rule]]\ncontainers = [\"3f2a3f2a3f2a\"]\nmodels = [\"*\"]\n";
        assert_eq!(may(&policy(&format!("{by_id}may = \"read\"\n")), &asker, "m"), May::None);
        let named = format!("{by_id}uids = [1000]\nmay = \"read\"\n");
        assert_eq!(may(&policy(&named), &asker, "m"), May::Read, "the rule names him");
        // What it takes away it takes away.
        let taken = format!("{by_id}may = \"none\"\n[[rule]]\neverybody = true\nmodels = [\"*\"]\nmay = \"read\"\n");
        assert_eq!(may(&policy(&taken), &asker, "m"), May::None);
    }
}
