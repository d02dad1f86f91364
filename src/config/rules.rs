//! What is safe by itself and not together: one line a rule, each with what to do instead.
//!
//! In: what all layers said, and the two places of a mount where they are known. Out: every rule that is broken.
//! Promises: a mount, a driver or a read command starts only if no rule of its own is broken; a rule looks at the machine
//! (modes, sizes, links), and never changes it.
//! Not here: whether a value is one (`config::options`), what only a parser of one option can know (`config::oversight`,
//! `config::vault`).
//! Held by: the tests below, tests/config.rs, which breaks each rule.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::layers::{Layers, refuse_all};
use super::options::{OPTIONS, Use, parse_switch, settled, takes};
use crate::error::{Code, Error, Result};
use crate::keys::KeySource;
use crate::store::StoreUrl;
use crate::units;

/// What follows from a broken rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Refused,
    /// It does what was said, and most likely not what was meant: `modelfs config check` tells it, and so does the mount.
    Warned,
}

pub struct Rule {
    pub id: &'static str,
    pub level: Level,
    /// What does not go together.
    pub together: &'static str,
    pub why: &'static str,
    /// Bits of [`takes`].
    pub of: u16,
    /// What to tell, with the fix.
    broken: fn(&Said<'_>) -> Option<String>,
}

/// What there is to judge.
pub struct Said<'a> {
    pub layers: &'a Layers,
    pub store: Option<&'a StoreUrl>,
    pub mountpoint: Option<&'a Path>,
    /// By the option, or because somebody else has mounted so.
    pub lets_others_in: bool,
}

impl Said<'_> {
    pub fn of_process(layers: &Layers) -> Said<'_> {
        let lets_others_in = layers.switch("allow-other").unwrap_or(false);
        Said { layers, store: None, mountpoint: None, lets_others_in }
    }

    fn is_set(&self, name: &'static str) -> bool {
        self.layers.get(name).is_some()
    }

    fn one(&self, name: &'static str) -> &str {
        self.layers.get(name).map_or("", |setting| setting.last())
    }

    fn many(&self, name: &'static str) -> &[String] {
        self.layers.get(name).map_or(&[], |setting| &setting.values)
    }

    fn on(&self, name: &'static str) -> bool {
        parse_switch(self.one(name)).unwrap_or(false)
    }

    /// Keys, floor or storage credentials that Vault is asked for.
    fn vault_source(&self) -> Option<&str> {
        let keys = self.many("key").iter().map(String::as_str).filter(|key| key.starts_with("vault-"));
        keys.chain([self.one("floor"), self.one("s3-credentials")]).find(|text| text.starts_with("vault-"))
    }

    /// Every file and folder that options name, where it will be; the option, and what for.
    fn paths(&self) -> Vec<(&'static str, PathBuf, Use)> {
        let mut paths = Vec::new();
        for spec in OPTIONS {
            for value in self.many(spec.name) {
                if let Some((path, kind)) = spec.paths(value) {
                    paths.push((spec.name, settled(&path), kind));
                }
            }
        }
        paths
    }

    /// Whether the store is a path in Vault, whose records hold what opens each model.
    fn is_catalog(&self) -> bool {
        matches!(self.store, Some(StoreUrl::VaultKv { .. }))
    }

    fn local_store(&self) -> Option<PathBuf> {
        match self.store {
            Some(StoreUrl::Local(path)) => Some(settled(path)),
            Some(StoreUrl::S3 { .. } | StoreUrl::VaultKv { .. }) | None => None,
        }
    }

    fn settled_mountpoint(&self) -> Option<PathBuf> {
        // A mount that we were handed lies on no folder of ours.
        self.mountpoint.filter(|path| !path.starts_with("/dev/fd")).map(settled)
    }
}

/// Every rule, in the order of docs/CONFIGURATION.md.
pub const RULES: &[Rule] = &[
    Rule {
        id: "trust-twice",
        level: Level::Refused,
        together: "`trust` and `trust-on-first-use`",
        why: "The first says whom to believe, the second that it does not matter.",
        of: takes::READS | takes::MOUNT | takes::PLUGIN,
        broken: |said| {
            (!said.many("trust").is_empty() && said.on("trust-on-first-use"))
                .then(|| "a trusted key and trust-on-first-use contradict each other; drop --trust-on-first-use".into())
        },
    },
    Rule {
        id: "first-use-with-floor",
        level: Level::Refused,
        together: "`trust-on-first-use` and `require-floor`",
        why: "A first use has no floor.",
        of: takes::READS | takes::MOUNT | takes::PLUGIN,
        broken: |said| {
            (said.on("trust-on-first-use") && said.on("require-floor")).then(|| {
                "trust-on-first-use and require-floor contradict each other: a first use has no floor; drop one of them".into()
            })
        },
    },
    Rule {
        id: "first-use-on-a-node",
        level: Level::Refused,
        together: "`trust-on-first-use` and `csi`",
        why: "Every pod that is new to a node would be a first use, and whoever writes to the store then is believed.",
        of: takes::CSI,
        broken: |said| {
            said.on("trust-on-first-use").then(|| {
                "trust-on-first-use would let each new node believe whoever writes to the store then; name the signing keys \
                 with trust"
                    .into()
            })
        },
    },
    Rule {
        id: "vault-not-named",
        level: Level::Refused,
        together: "a key, floor or credentials from Vault, and no `vault-addr`",
        why: "There is nobody to ask.",
        of: takes::READS | takes::SEAL | takes::MOUNT | takes::PLUGIN | takes::CSI,
        broken: |said| {
            let asked = said.vault_source().filter(|_| !said.is_set("vault-addr"))?;
            let kind = asked.split(':').next().unwrap_or("vault");
            Some(format!("{kind}:... comes from Vault, and no Vault is named; set VAULT_ADDR, or add vault-addr"))
        },
    },
    Rule {
        id: "half-a-certificate",
        level: Level::Refused,
        together: "`vault-client-cert` without `vault-client-key`, or the other way round",
        why: "One proves nothing without the other.",
        of: takes::READS | takes::SEAL | takes::MOUNT | takes::PLUGIN | takes::CSI,
        broken: |said| match (said.is_set("vault-client-cert"), said.is_set("vault-client-key")) {
            (true, false) => Some("vault-client-cert proves nothing without its key; add vault-client-key".into()),
            (false, true) => {
                Some("vault-client-key proves nothing without its certificate; add vault-client-cert".into())
            }
            (true, true) | (false, false) => None,
        },
    },
    Rule {
        id: "plain-http-in-strict",
        level: Level::Refused,
        together: "`strict` and `vault-plain-http`",
        why: "Tokens and keys would cross the network in clear.",
        of: takes::RUN,
        broken: |said| {
            (said.on("strict") && said.on("vault-plain-http")).then(|| {
                "strict and vault-plain-http contradict each other: tokens and keys would cross the network in clear; use \
                 https and drop vault-plain-http"
                    .into()
            })
        },
    },
    Rule {
        id: "open-waits-for-nothing",
        level: Level::Refused,
        together: "`open` whole and `no-passthrough`",
        why: "An open waits for the whole file so that the kernel can serve it past the daemon.",
        of: takes::MOUNT | takes::PLUGIN | takes::CSI,
        broken: |said| {
            (said.one("open") == "whole" && said.on("no-passthrough")).then(|| {
                "open=whole waits for whole files so that the kernel serves them past the daemon, and no-passthrough forbids \
                 that; drop one of them"
                    .into()
            })
        },
    },
    Rule {
        id: "manifest-of-one",
        level: Level::Refused,
        together: "`manifest` without exactly one `model`",
        why: "A digest is one version of one model.",
        of: takes::MOUNT,
        broken: |said| match (said.is_set("manifest"), said.many("model")) {
            (false, _) => None,
            (true, [one]) if !one.contains('@') => None,
            (true, [one]) => Some(format!(
                "--manifest already says which version; write --model {} instead of {one}",
                super::bare(one)
            )),
            (true, other) => Some(format!(
                "--manifest pins one version of one model, {} are selected; give exactly one --model NAME",
                other.len()
            )),
        },
    },
    Rule {
        id: "min-ref-seq-of-one",
        level: Level::Refused,
        together: "`min-ref-seq` without exactly one `model`",
        why: "Each model counts its own refs.",
        of: takes::MOUNT,
        broken: |said| {
            let counted = super::parse_ref_seq(said.one("min-ref-seq")).is_ok_and(|least| least > 0);
            let models = said.many("model").len();
            (counted && models != 1).then(|| {
                format!(
                    "min-ref-seq counts the refs of one model, {models} are selected; give exactly one --model NAME"
                )
            })
        },
    },
    Rule {
        id: "model-twice",
        level: Level::Refused,
        together: "two versions of one `model` without `versions`",
        why: "A name in the mount leads to one version.",
        of: takes::MOUNT,
        broken: |said| {
            let (models, versions) = (said.many("model"), said.on("versions"));
            let twice = |(i, model): (usize, &String)| {
                let same = |other: &String| other == model || (!versions && super::bare(other) == super::bare(model));
                models[..i].iter().any(same)
            };
            let model = &models[models.iter().enumerate().position(twice)?];
            Some(format!(
                "model {} is selected twice; a mount serves one version of it, or several with --versions",
                super::bare(model)
            ))
        },
    },
    Rule {
        id: "required-and-not-mounted",
        level: Level::Refused,
        together: "`require` of a model that `model` leaves out",
        why: "The start would wait for what is never mounted.",
        of: takes::MOUNT,
        broken: |said| {
            let models = said.many("model");
            let mounted = |wanted: &&String| models.iter().any(|model| super::bare(model) == super::bare(wanted));
            let lacking = said.many("require").iter().filter(|wanted| *wanted != super::REQUIRE_ALL);
            let model = lacking.into_iter().find(|wanted| !models.is_empty() && !mounted(wanted))?;
            Some(format!("--require {model} is not among the mounted models; add --model {model}"))
        },
    },
    Rule {
        id: "lock-on-nothing",
        level: Level::Refused,
        together: "`on-key-loss` lock, and neither a key nor storage credentials from Vault",
        why: "There is nothing whose loss would lock. A catalog's records are keys from Vault.",
        of: takes::MOUNT,
        broken: |said| {
            let from_vault =
                |key: &String| matches!(key.parse(), Ok(KeySource::VaultTransit { .. } | KeySource::VaultKv { .. }));
            let lent = said.one("s3-credentials").starts_with("vault-aws:");
            let from_vault = lent || said.is_catalog() || said.many("key").iter().any(from_vault);
            (said.one("on-key-loss") == "lock" && !from_vault).then(|| {
                "on-key-loss=lock has nothing to watch: neither keys nor storage credentials come from Vault; drop it, or use \
                 lock-when-idle"
                    .into()
            })
        },
    },
    Rule {
        id: "loss-that-locks-nothing",
        level: Level::Refused,
        together: "`key-loss-check` without `on-key-loss` lock",
        why: "A loss that is seen sooner changes nothing.",
        of: takes::MOUNT | takes::PLUGIN | takes::CSI,
        broken: |said| {
            (said.is_set("key-loss-check") && said.one("on-key-loss") != "lock")
                .then(|| "key-loss-check is for mounts that lock; add on-key-loss=lock, or drop it".into())
        },
    },
    Rule {
        id: "owner-shut-out",
        level: Level::Refused,
        together: "`uid` of another user without `allow-other`",
        why: "The kernel lets only the mounting user in.",
        of: takes::MOUNT,
        broken: |said| {
            // SAFETY: geteuid only reads this process's credentials.
            let own_uid = unsafe { libc::geteuid() };
            let uid = super::parse_id(said.one("uid")).ok().filter(|uid| *uid != own_uid && !said.lets_others_in)?;
            Some(format!("uid={uid} without allow-other shows files to nobody; add --allow-other"))
        },
    },
    Rule {
        id: "aead-where-others-write",
        level: Level::Refused,
        together: "`verify` aead, and a store folder that others can write to",
        why: "With aead whoever holds the key and writes to the store can change bytes that were signed.",
        of: takes::MOUNT,
        broken: |said| {
            let store = said.local_store().filter(|_| said.one("verify") == "aead")?;
            let mode = store.metadata().ok()?.mode();
            (mode & 0o022 != 0).then(|| {
                format!(
                    "verify=aead trusts whoever writes to the store, and {} can be written by others (mode {:o}); use \
                     verify=strict, or chmod go-w",
                    store.display(),
                    mode & 0o7777
                )
            })
        },
    },
    Rule {
        id: "store-and-mountpoint",
        level: Level::Refused,
        together: "a mountpoint in the store folder, or the store folder in the mountpoint",
        why: "The mount would hide its own store, or be published with it.",
        of: takes::MOUNT,
        broken: |said| {
            let (store, mountpoint) = (said.local_store()?, said.settled_mountpoint()?);
            (store.starts_with(&mountpoint) || mountpoint.starts_with(&store)).then(|| {
                format!(
                    "store {} and mountpoint {} lie one in the other; mount beside the store",
                    store.display(),
                    mountpoint.display()
                )
            })
        },
    },
    Rule {
        id: "file-in-the-mountpoint",
        level: Level::Refused,
        together: "a file that an option names, in the mountpoint",
        why: "The mount hides it, and whoever opens it waits for itself.",
        of: takes::MOUNT,
        broken: |said| {
            let mountpoint = said.settled_mountpoint()?;
            // The folder of state has a rule of its own, which knows its usual place too.
            let mut paths = said.paths().into_iter().filter(|(name, ..)| *name != "state-dir");
            let (name, path, _) = paths.find(|(_, path, _)| path.starts_with(&mountpoint))?;
            Some(format!(
                "{name} names {} in the mountpoint {}, which the mount hides; put it elsewhere",
                path.display(),
                mountpoint.display()
            ))
        },
    },
    Rule {
        id: "state-in-the-mountpoint",
        level: Level::Refused,
        together: "the folder of state (`state-dir`, or the usual one) in the mountpoint",
        why: "What is remembered against a rollback would be hidden and could not be written.",
        of: takes::MOUNT,
        broken: |said| {
            let (mountpoint, state) = (said.settled_mountpoint()?, settled(&super::state_dir(said.layers).ok()?));
            state.starts_with(&mountpoint).then(|| {
                format!(
                    "the folder of state {} lies in the mountpoint {}, which the mount hides; set state-dir to another place",
                    state.display(),
                    mountpoint.display()
                )
            })
        },
    },
    Rule {
        id: "secret-in-the-store",
        level: Level::Refused,
        together: "a key, a secret or a file that is written to, in the store folder",
        why: "Whoever copies the store has the key with it; what is written there is published.",
        of: takes::MOUNT,
        broken: |said| {
            let store = said.local_store()?;
            let wrong = |kind: &Use| matches!(kind, Use::Secret | Use::Written);
            let (name, path, _) =
                said.paths().into_iter().find(|(_, path, kind)| wrong(kind) && path.starts_with(&store))?;
            Some(format!(
                "{name} names {} in the store {}: who copies the store has it too; put it elsewhere",
                path.display(),
                store.display()
            ))
        },
    },
    Rule {
        id: "trust-in-the-store",
        level: Level::Refused,
        together: "`trust`, `trust-file`, `policy` or `state-dir` in the store folder",
        why: "Whoever writes to the store would say whom to believe.",
        of: takes::MOUNT,
        broken: |said| {
            let store = said.local_store()?;
            let believed = |name: &str| ["trust", "trust-file", "policy", "state-dir"].contains(&name);
            let (name, path, _) =
                said.paths().into_iter().find(|(name, path, _)| believed(name) && path.starts_with(&store))?;
            Some(format!(
                "{name} names {} in the store {}: who writes there would say whom to believe; put it elsewhere",
                path.display(),
                store.display()
            ))
        },
    },
    Rule {
        id: "two-writers",
        level: Level::Refused,
        together: "one file for two of `audit-file`, `audit-checkpoint-file`, `log-file`, `profile`, `http`, `socket`",
        why: "Each would spoil what the other wrote; checkpoints beside their log prove nothing.",
        of: takes::MOUNT | takes::PLUGIN | takes::CSI,
        broken: |said| {
            let written: Vec<_> = said.paths().into_iter().filter(|(_, _, kind)| *kind == Use::Written).collect();
            let same = |(i, (_, path, _)): (usize, &(&str, PathBuf, Use))| {
                written[..i].iter().position(|(_, other, _)| other == path).map(|first| (first, i))
            };
            let (first, second) = written.iter().enumerate().find_map(same)?;
            let ((a, path, _), (b, ..)) = (&written[first], &written[second]);
            Some(format!("{a} and {b} name the same file {}; give each its own", path.display()))
        },
    },
    Rule {
        id: "checkpoints-come-late",
        level: Level::Refused,
        together: "`audit-keep` shorter than `audit-checkpoint-every`",
        why: "Records would be removed before anything vouches for them.",
        of: takes::MOUNT | takes::PLUGIN | takes::CSI,
        broken: |said| {
            let keep = units::parse_duration(said.one("audit-keep")).ok()?;
            let every = units::parse_duration(said.one("audit-checkpoint-every"))
                .unwrap_or_else(|_| super::oversight::AuditPlan::default().checkpoint_every);
            (keep < every).then(|| {
                format!("audit-keep {keep:?} removes records before the checkpoint that vouches for them ({every:?}); keep longer")
            })
        },
    },
    Rule {
        id: "alerts-in-clear",
        level: Level::Refused,
        together: "`alert-webhook` by http:// to another host",
        why: "Alerts say what is wrong here, to whoever listens; and the address may hold a secret.",
        of: takes::MOUNT | takes::PLUGIN | takes::CSI,
        broken: |said| {
            let setting = said.layers.get("alert-webhook")?;
            // The address may hold a secret: no part of it is repeated.
            let (mut no_url, mut clear) = (false, false);
            for text in &setting.values {
                match url::Url::parse(text) {
                    Ok(url) if url.scheme() == "https" => {}
                    Ok(url) if url.scheme() == "http" => clear |= !is_loopback(&url),
                    Ok(_) | Err(_) => no_url = true,
                }
            }
            match (no_url, clear) {
                (true, _) => Some(format!("{setting}: an address of it is no URL; write https://HOST/PATH")),
                (_, true) => Some(format!("{setting}: alerts would cross the network in clear; use https")),
                (false, false) => None,
            }
        },
    },
    Rule {
        id: "cache-over-memory",
        level: Level::Refused,
        together: "`cache` above the memory of the machine or the container",
        why: "The kernel would end the process in the middle of a load.",
        of: takes::MOUNT | takes::PLUGIN | takes::CSI,
        broken: |said| {
            let cache = units::parse_size(said.one("cache")).ok()?;
            let ceiling = crate::mem::memory_ceiling().filter(|ceiling| cache >= *ceiling)?;
            Some(format!(
                "cache {} does not fit into the {} that this machine or container has; give less",
                units::show_size(cache),
                units::show_size(ceiling)
            ))
        },
    },
    Rule {
        id: "policy-for-one-user",
        level: Level::Warned,
        together: "`policy` without `allow-other`",
        why: "The kernel lets only the mounting user in, whatever the policy says of others.",
        of: takes::MOUNT,
        broken: |said| {
            (said.is_set("policy") && !said.lets_others_in).then(|| {
                "policy without allow-other: the kernel lets only the mounting user in, whatever the policy allows to \
                 others; add allow-other"
                    .into()
            })
        },
    },
    Rule {
        id: "open-to-all",
        level: Level::Warned,
        together: "`allow-other`, and a `umask` that leaves others their right, without `policy`",
        why: "Every user of the machine reads every model. Left out, `umask` is 0227, which closes them to others; who says \
              another one means it, so it is told and not refused.",
        of: takes::MOUNT,
        broken: |said| {
            const READ_BY_OTHERS: u32 = 0o004;
            let umask = units::parse_octal(said.one("umask")).ok()?;
            (said.lets_others_in && !said.is_set("policy") && umask & READ_BY_OTHERS == 0).then(|| {
                format!(
                    "allow-other with umask={umask:04o} and without policy: every user of this machine reads every model; \
                     add policy, or gid and umask=0227"
                )
            })
        },
    },
    Rule {
        id: "retire-nothing",
        level: Level::Warned,
        together: "`retire-after` without `versions`",
        why: "Only with `versions` is there another version to retire.",
        of: takes::MOUNT,
        broken: |said| {
            (said.is_set("retire-after") && !said.on("versions"))
                .then(|| "retire-after has no effect without versions; add versions, or drop it".into())
        },
    },
];

/// Contradictions that the parser of an option finds, and what is lacking, by what `modelfs config check` prints; for
/// docs/CONFIGURATION.md.
pub const OF_PARSERS: &[(&str, &str, &str)] = &[
    ("audit-nowhere", "`audit` on or required without `audit-file` or `audit-journal`", "There is nowhere to write."),
    ("audit-off-and-on", "`audit` off with `audit-file` or `audit-journal`", "One of the two is a mistake."),
    (
        "audit-of-nothing",
        "another `audit-...` option without `audit-file` or `audit-journal`",
        "Nothing would be recorded, and whoever set it believes that it is.",
    ),
    (
        "audit-files-of-none",
        "`audit-keep` or `audit-file-bytes` with `audit-journal` alone",
        "The journal keeps its records as it is told itself.",
    ),
    (
        "checkpoints-unsigned",
        "`audit-checkpoint-file` without `audit-key`",
        "A checkpoint that is not signed proves nothing on another machine.",
    ),
    (
        "http-in-clear",
        "`http` ADDRESS:PORT without `http-cert`, `http-key` and `http-token-file`",
        "TLS and a token, or unix:PATH.",
    ),
    (
        "http-keys-for-nothing",
        "`http-cert`, `http-key` or `http-token-file` without `http`",
        "One of the two is a mistake.",
    ),
    (
        "vault-in-clear",
        "`vault-addr` by http:// to another host without `vault-plain-http`",
        "Tokens and keys would cross the network in clear.",
    ),
    ("vault-method", "a `vault-auth` method without what it needs", "The login could not succeed."),
    ("budget-below-timeout", "`fetch-budget` below `fetch-timeout`", "No request could take its time."),
    ("cache-too-small", "`cache` below 64 MiB", "Two readers of one chunk could not be served."),
    ("idle-too-short", "`lock-when-idle` below 1 s", "It would lock between two reads."),
    (
        "no-key",
        "no `key`, MODELFS_KEY or MODEL_ENCRYPTION_KEY for a store that is no catalog",
        "Nothing could be opened.",
    ),
    (
        "no-signer",
        "no `trust`, `trust-file`, `manifest` or `trust-on-first-use`",
        "No version would be believed: the mount ends with 25.",
    ),
];

fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Every broken rule of `who` (bits of [`takes`]), with what to tell.
pub fn broken(said: &Said<'_>, who: u16) -> Vec<(&'static Rule, String)> {
    RULES.iter().filter(|rule| rule.of & who != 0).filter_map(|rule| Some((rule, (rule.broken)(said)?))).collect()
}

/// What is to be told of rules that refuse nothing.
///
/// # Errors
/// `USAGE` with every broken rule that refuses.
pub fn refuse(said: &Said<'_>, who: u16) -> Result<Vec<String>> {
    let (refused, warned): (Vec<_>, Vec<_>) =
        broken(said, who).into_iter().partition(|(rule, _)| rule.level == Level::Refused);
    refuse_all(refused.into_iter().map(|(_, text)| Error::new(Code::Usage, text)).collect())?;
    Ok(warned.into_iter().map(|(_, text)| text).collect())
}

#[cfg(test)]
mod tests {
    use super::super::layers::split_list;
    use super::*;

    fn broken_by(words: &str, store: Option<&StoreUrl>, mountpoint: Option<&Path>) -> Vec<&'static str> {
        let mut layers = Layers::default();
        for word in split_list(words) {
            let (name, value) = word.split_once('=').unwrap_or((&word, "true"));
            let spec = super::super::options::find(name).expect("an option");
            let mut values = layers.get(spec.name).map_or(Vec::new(), |setting| setting.values.clone());
            values.push(value.to_owned());
            layers.flag(spec.name, values);
        }
        let lets_others_in = layers.switch("allow-other").unwrap_or(false);
        let said = Said { layers: &layers, store, mountpoint, lets_others_in };
        broken(&said, takes::ALL).into_iter().map(|(rule, _)| rule.id).collect()
    }

    #[test]
    fn rules_have_names_of_their_own() {
        let ids: Vec<&str> = RULES.iter().map(|rule| rule.id).chain(OF_PARSERS.iter().map(|(id, ..)| *id)).collect();
        for (i, id) in ids.iter().enumerate() {
            assert!(!ids[..i].contains(id), "{id} twice");
        }
        assert!(broken_by("key=file:/k,trust=/t,cache=64MiB,model=a", None, None).is_empty());
    }

    /// With a raw key in each record no `key` is named, and with a transit ciphertext Vault is asked as well.
    #[test]
    fn a_loss_locks_what_has_its_keys_from_vault_and_nothing_else() {
        let catalog: StoreUrl = "vault-kv://secret/models".parse().expect("a catalog");
        let bucket: StoreUrl = "s3://models/prod".parse().expect("a bucket");
        for (words, store, refused) in [
            ("on-key-loss=lock", &catalog, false),
            ("on-key-loss=lock,key=file:/k", &catalog, false),
            ("on-key-loss=lock,key=vault-kv:secret/a#key,vault-addr=https://v", &bucket, false),
            ("on-key-loss=lock,key=vault-transit:t/k,vault-addr=https://v", &bucket, false),
            ("on-key-loss=lock,key=file:/k", &bucket, true),
            ("on-key-loss=lock,key=file:/k,vault-addr=https://v", &bucket, true),
            ("on-key-loss=lock", &bucket, true),
            ("on-key-loss=keep", &bucket, false),
        ] {
            let broken = broken_by(words, Some(store), None);
            assert_eq!(broken.contains(&"lock-on-nothing"), refused, "{words} of {store}: {broken:?}");
        }
    }

    #[test]
    fn files_are_looked_for_where_links_lead() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let top = dir.path().canonicalize().expect("there");
        for name in ["store", "mnt"] {
            std::fs::create_dir(top.join(name)).expect("made");
        }
        std::os::unix::fs::symlink(top.join("store"), top.join("link")).expect("linked");
        let (store, mnt) = (StoreUrl::Local(top.join("store")), top.join("mnt"));
        let at = |words: &str| broken_by(words, Some(&store), Some(&mnt));
        let top = top.display();
        assert_eq!(at(&format!("audit-file={top}/link/audit,audit-key={top}/k")), ["secret-in-the-store"]);
        assert_eq!(at(&format!("key=file:{top}/link/../store/k")), ["secret-in-the-store"]);
        assert_eq!(at(&format!("http=unix:{top}/mnt/new/http.sock")), ["file-in-the-mountpoint"]);
        assert_eq!(at(&format!("key=file:{top}/storeroom/k,log-file={top}/mnt.log")), [""; 0]);
        let inside = StoreUrl::Local(mnt.join("store"));
        assert_eq!(broken_by("", Some(&inside), Some(&mnt)), ["store-and-mountpoint"]);
    }

    /// A secret in a URL is in no message.
    #[test]
    fn an_address_of_alerts_is_not_repeated() {
        let mut layers = Layers::default();
        layers.flag("alert-webhook", vec!["http://hooks.example/T0/s3cret".into(), "s3cret".into()]);
        let said = Said::of_process(&layers);
        let all: Vec<String> = broken(&said, takes::MOUNT).into_iter().map(|(_, text)| text).collect();
        assert_eq!(all.len(), 1);
        assert!(all[0].contains("no URL") && !all[0].contains("s3cret"), "{all:?}");
        assert!(broken_by("alert-webhook=http://127.0.0.1:9/x", None, None).is_empty());
        assert_eq!(broken_by("alert-webhook=http://127.example/x", None, None), ["alerts-in-clear"]);
    }
}
