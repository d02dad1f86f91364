//! A host as metrics and health see it.
//!
//! Promises: bounded in time, though a mount hangs; nothing is asked of a store or of Vault.
//! Not here: what becomes of it (`observe`).

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use super::{Host, Mounted};
use crate::config::{bare, oversight::AuditMode};
use crate::crypto::Verify;
use crate::keys::usual_state_dir;
use crate::mem;
use crate::observe::{Facts, Keep, ModelFacts, MountFacts, Probe};
use crate::ready;

impl Host {
    pub(crate) fn seen(&self) -> Facts {
        self.telemetry.cache_bytes.set(self.cache.budget().in_use());
        self.telemetry.huge_page_short_bytes.set(mem::huge_page_short_bytes());
        let mounted = self.mounted();
        self.count_blocked(&mounted);
        // A version that several mounts show is one in memory.
        let mut models: BTreeMap<u32, ModelFacts> = BTreeMap::new();
        for shown in mounted.iter().flat_map(|mounted| mounted.fs().vfs().shown()) {
            let model = &shown.model;
            let known = models.entry(model.serial).or_insert_with(|| ModelFacts {
                name: model.name.clone(),
                version: model.manifest.header().seq,
                bytes: u64::try_from(model.manifest.total_size()).unwrap_or(u64::MAX),
                resident_bytes: self.cache.resident_bytes(model.serial),
                current: false,
                locked: model.is_locked(),
                load: model.vitals.last_load(),
                expires_at: model.vitals.expires_at(),
            });
            known.current |= shown.current;
        }
        let mut folders = Vec::new();
        if let Ok(dir) = self.oversight.state_dir.clone().map_or_else(usual_state_dir, Ok) {
            folders.push(("state", dir));
        }
        if let Some(file) = &self.oversight.audit.file {
            folders.push(("audit", file.clone()));
        }
        let secrets_private = self.hardening.secret_memory == mem::SecretMemory::MemfdSecret;
        Facts {
            started: self.started,
            cache_peak_bytes: self.cache.budget().peak(),
            models: one_of_each(models.into_values()),
            mounts: mounted.iter().map(|mounted| mounted.seen(&self.probe)).collect(),
            is_for_one_mount: self.alone,
            audit: match self.oversight.audit.mode {
                AuditMode::Off => "off",
                AuditMode::On => "on",
                AuditMode::Required => "required",
            },
            keep: Keep {
                memory: self.cache.arena().kind().name(),
                secrets: if secrets_private { "out of the kernel's own map" } else { "locked, and readable for root" },
                secrets_private,
                hibernation_blocked: self.hardening.hibernation_blocked,
                merging_off: self.hardening.merging_off,
                can_pin: mem::can_pin().is_ok(),
            },
            folders,
            ..Facts::empty(&self.telemetry)
        }
    }
}

/// Two stores may have a version of the same name and number: told as one, since nothing else tells them apart.
fn one_of_each(models: impl Iterator<Item = ModelFacts>) -> Vec<ModelFacts> {
    let mut named: BTreeMap<(String, u64), ModelFacts> = BTreeMap::new();
    for model in models {
        match named.entry((model.name.clone(), model.version)) {
            std::collections::btree_map::Entry::Vacant(place) => drop(place.insert(model)),
            std::collections::btree_map::Entry::Occupied(mut there) => {
                let there = there.get_mut();
                there.bytes += model.bytes;
                there.resident_bytes += model.resident_bytes;
                there.current |= model.current;
                there.locked |= model.locked;
                there.load = there.load.or(model.load);
                there.expires_at = there.expires_at.min(model.expires_at).or(there.expires_at).or(model.expires_at);
            }
        }
    }
    named.into_values().collect()
}

impl Mounted {
    fn seen(&self, probe: &Probe) -> MountFacts {
        let plan = self.plan();
        let shown = self.fs().vfs().shown();
        let current: Vec<_> = shown.iter().filter(|shown| shown.current).collect();
        let required = |name: &str| plan.requires_all() || plan.require.iter().any(|one| bare(one) == name);
        let down = current.iter().filter(|shown| shown.model.is_locked());
        let all_down = !current.is_empty() && current.iter().all(|shown| shown.model.is_locked());
        let not_serving = down.filter(|shown| all_down || required(&shown.model.name));
        let store = plan.store.to_string();
        let credentials = plan.access.store.credentials.as_ref().map(|credentials| credentials.status());
        MountFacts {
            mountpoint: self.mountpoint().to_owned(),
            store_silent: self.host.telemetry.stores.is_silent(&store),
            store,
            since: SystemTime::now() - self.started.elapsed(),
            answers: self.is_mounted() && probe.answers(self.mountpoint()),
            refused: self.fs().refuses_all(),
            open_handles: self.fs().open_handles() as u64,
            not_serving: not_serving.map(|shown| shown.model.name.clone()).collect(),
            locked: shown.iter().filter(|shown| shown.model.is_locked()).count(),
            models: shown.len(),
            vault: plan.access.connected.as_ref().map(|vault| vault.state()),
            needs_vault: ready::hangs_on_vault(plan),
            credentials_end_in: credentials.and_then(|status| status.ends_in_seconds).map(Duration::from_secs),
            strict: plan.verify == Verify::Strict,
            trust: match (plan.access.manifest.is_some(), plan.access.trust.on_first_use) {
                (true, _) => "pinned",
                (false, true) => "first-use",
                (false, false) => "signers",
            },
            policy: plan.policy.is_some(),
        }
    }
}
