//! Opens the key slots of a version with the keys at hand, and makes new slots.
//!
//! In: slots from the store (parsed, hostile), local keys in local order. Out: the DEK that the signed manifest commits to.
//! Promises: sources are tried in the order the user gave them; at most two password hashes run for one version, and
//! none whose cost is out of bounds (`Slots::parse` refuses it before); a slot can open to the signed key or to nothing;
//! a label is compared, never followed; Vault is asked only for slots of its kinds, and what it refuses hinders no source after it.
//! Spec: docs/FORMAT.md a.7. Held by: slots_tests.rs, THREAT_MODEL (f) rows 31, 32, 36 to 41.

use std::ops::Range;
use std::sync::Mutex;

use super::service::{KeyService, Place};
use super::source::{KeyMaterial, KeySource, Prompt};
use super::stretch::{Cost, is_password};
use super::wrap::{SlotTarget, open_slot, wrap};
use crate::crypto::Dek;
use crate::error::{Code, Error, Result};
use crate::format::{ManifestHeader, Slot, SlotKind, SlotParams, Slots, check_label};
use crate::refuse;
use crate::vault::Vault;

/// Password hashes run for one version, whatever its slots say: each costs up to seconds and gigabytes.
const KDF_RUNS_MAX: usize = 2;

/// The keys of one process: each source is read once, when it is first needed, and kept in locked memory.
pub struct Keyring<'a> {
    sources: Vec<KeySource>,
    loaded: Mutex<Vec<Option<KeyMaterial>>>,
    /// Empty: all.
    labels: Vec<String>,
    vault: Option<Box<dyn KeyService>>,
    prompt: Prompt<'a>,
    /// They are to open what they did not open before.
    new: bool,
}

impl<'a> Keyring<'a> {
    /// `sources` in the order in which they are to be tried.
    pub fn new(sources: &[KeySource], prompt: Prompt<'a>) -> Keyring<'a> {
        let loaded = Mutex::new(sources.iter().map(|_| None).collect());
        Keyring { sources: sources.to_vec(), loaded, labels: Vec::new(), vault: None, prompt, new: false }
    }

    /// Who is asked for the sources that lie in Vault.
    ///
    /// # Errors
    /// `USAGE` if there are such sources and no Vault.
    pub fn with_vault(mut self, vault: Option<Vault>) -> Result<Self> {
        self.vault = vault.map(|vault| Box::new(vault) as Box<dyn KeyService>);
        if let Some(source) = self.sources.iter().find(|source| Place::of(source).is_some()) {
            self.service(source)?;
        }
        Ok(self)
    }

    fn service(&self, source: &KeySource) -> Result<&dyn KeyService> {
        match &self.vault {
            Some(vault) => Ok(&**vault),
            None => refuse!(Usage, "{source} needs a Vault; say where it is with --vault-addr URL or VAULT_ADDR"),
        }
    }

    /// Slots with other labels than these are skipped; where there are none, no slot is.
    pub fn allow_labels(mut self, labels: &[String]) -> Self {
        self.labels = labels.to_vec();
        self
    }

    /// Keys that are to open what they did not open before: a passphrase among them comes from `prompt` alone.
    pub fn for_new_keys(mut self) -> Self {
        self.new = true;
        self
    }

    pub fn sources(&self) -> &[KeySource] {
        &self.sources
    }

    /// The DEK of the version that `header` describes.
    ///
    /// # Errors
    /// `SLOTS_MODEL` for slots of another version. `DEK_COMMIT` if a slot opened to another key than the signed one.
    /// What Vault answered (`VAULT_DENIED`, `VAULT_SEALED`, `VAULT_UNREACHABLE`, ...) if it was asked and nothing else opened.
    /// `NO_KEY` if no slot opened; its cause is the last refusal (`SLOT_COMMIT` for a wrong key or a slot brought here
    /// from elsewhere: the two cannot be told apart). What reading a source may answer.
    pub fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        self.unlock_with(0..self.sources.len(), slots, header)
    }

    /// As [`Keyring::unlock`], with the source at `number` in [`Keyring::sources`] alone.
    ///
    /// # Panics
    /// If there is no such source.
    pub fn unlock_source(&self, number: usize, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        self.unlock_with(number..number + 1, slots, header)
    }

    fn unlock_with(&self, numbers: Range<usize>, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        let sources = &self.sources[numbers.clone()];
        if slots.model_id != header.model_id || slots.vid != header.vid {
            refuse!(SlotsModel, "slots are of version {}, the manifest of {}", slots.vid, header.vid);
        }
        if slots.dek_commit != header.dek_commit {
            refuse!(DekCommit, "slots generation {} is for another key than the signed one", slots.generation);
        }
        let mut report = Report::default();
        let mut passwords = 0;
        for (number, source) in numbers.zip(sources) {
            let fitting = self.fitting(slots, source, &mut report);
            if fitting.is_empty() {
                continue;
            }
            if let Some(place) = Place::of(source) {
                if let Some(dek) = self.ask(&place, source, &fitting, header, &mut report)? {
                    return Ok(dek);
                }
                continue;
            }
            let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let material = self.material(&mut loaded, number)?;
            for slot in fitting {
                if is_password(&slot.params) {
                    if passwords == KDF_RUNS_MAX {
                        report.skip(slot, "two password hashes were tried already");
                        continue;
                    }
                    passwords += 1;
                }
                if sealed_to_another(slot, material) {
                    report.skip(slot, "it is sealed to another recipient");
                    continue;
                }
                report.tried(slot);
                match open_slot(slot, material, header) {
                    Ok(dek) if dek.opens(header) => return Ok(dek.opened_by(&slot.title())),
                    Ok(_) => report.foreign(slot),
                    Err(err) => report.fail(err.context(format!("slot {:?} does not open with {source}", slot.label))),
                }
            }
        }
        Err(report.verdict(slots, sources))
    }

    /// Asks Vault for each of these slots, which are of the kind of its place. What Vault refuses is kept for the end: a
    /// source after this one may open without it.
    fn ask(
        &self,
        place: &Place<'_>,
        source: &KeySource,
        slots: &[&Slot],
        header: &ManifestHeader,
        report: &mut Report,
    ) -> Result<Option<Dek>> {
        let service = self.service(source)?;
        for slot in slots {
            if report.silent {
                report.skip(slot, "Vault did not answer before");
                continue;
            }
            report.tried(slot);
            match place.open(service, slot, header) {
                Ok(dek) if dek.opens(header) => return Ok(Some(dek.opened_by(&slot.title()))),
                Ok(_) => report.foreign(slot),
                Err(err) => {
                    let err = err.context(format!("slot {:?} does not open with {source}", slot.label));
                    match err.code() {
                        Code::SlotCommit | Code::SlotBody => report.fail(err),
                        // Another slot would wait for the same: who does not answer is asked once.
                        Code::VaultUnreachable | Code::VaultSealed => {
                            report.silent = true;
                            report.refused(err);
                        }
                        _ => report.refused(err),
                    }
                }
            }
        }
        Ok(None)
    }

    /// One new slot for each source, so that a publisher's key is read once for sealing and for reading back. Labels say
    /// the kind of source and are told apart by a number.
    pub fn wrap_all(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        let mut slots: Vec<Slot> = Vec::new();
        let mut taken = Vec::new();
        for number in 0..self.sources.len() {
            let slot = self.wrap_source(number, None, dek, target, &taken)?;
            taken.push(slot.label.clone());
            slots.push(slot);
        }
        Ok(slots)
    }

    /// One new slot for the source at `number` in [`Keyring::sources`]. Without a `label` it gets one that says the kind of
    /// source and is not among `taken`, the labels of the slots that it will stand beside.
    ///
    /// # Errors
    /// `USAGE` for a label that is taken already, `SLOT_LABEL` for one that is none. What reading the source may answer.
    ///
    /// # Panics
    /// If there is no such source.
    pub fn wrap_source(
        &self,
        number: usize,
        label: Option<&str>,
        dek: &Dek,
        target: &SlotTarget,
        taken: &[String],
    ) -> Result<Slot> {
        let source = &self.sources[number];
        let label = match label {
            Some(given) => {
                let given = check_label(given.as_bytes())?;
                if taken.iter().any(|other| other == given) {
                    refuse!(Usage, "there is a slot {given:?} already; give this one another label");
                }
                given.to_owned()
            }
            None => free_label(source.default_label(), taken),
        };
        if let Some(place) = Place::of(source) {
            return place.wrap(self.service(source)?, &label, target, dek);
        }
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        wrap(self.material(&mut loaded, number)?, &label, Cost::default(), target, dek)
    }

    /// Shows the first raw key (`file:`, `env:`) to `look`, for a place that keeps keys; `None` if there is none.
    ///
    /// # Errors
    /// What reading the source may answer.
    pub fn with_raw_key<T>(&self, look: impl FnOnce(&crate::mem::Secret<32>) -> T) -> Result<Option<T>> {
        let raw = |source: &KeySource| matches!(source, KeySource::File(_) | KeySource::Env(_));
        let Some(number) = self.sources.iter().position(raw) else { return Ok(None) };
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match self.material(&mut loaded, number)? {
            KeyMaterial::Key(key) => Ok(Some(look(key))),
            KeyMaterial::Passphrase(_) | KeyMaterial::Private(_) | KeyMaterial::Recipient(_) => Ok(None),
        }
    }

    /// Reads the keys of the environment now, so that they are gone from there whichever key opens first.
    ///
    /// # Errors
    /// `KEY_FORMAT` for a variable that is set and holds no key.
    pub fn take_environment(&self) -> Result<()> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for (number, source) in self.sources.iter().enumerate() {
            if let KeySource::Env(name) = source
                && std::env::var_os(name).is_some()
            {
                self.material(&mut loaded, number)?;
            }
        }
        Ok(())
    }

    fn material<'m>(&self, loaded: &'m mut [Option<KeyMaterial>], number: usize) -> Result<&'m KeyMaterial> {
        if loaded[number].is_none() {
            let source = &self.sources[number];
            loaded[number] = Some(if self.new { source.load_new(self.prompt)? } else { source.load(self.prompt)? });
        }
        Ok(loaded[number].as_ref().expect("loaded on the line before"))
    }

    /// The slots that a source of this kind can open and whose labels are allowed.
    fn fitting<'s>(&self, slots: &'s Slots, source: &KeySource, report: &mut Report) -> Vec<&'s Slot> {
        let mut fitting = Vec::new();
        for slot in slots.slots.iter().filter(|slot| source.fits(slot.kind())) {
            if self.labels.is_empty() || self.labels.contains(&slot.label) {
                fitting.push(slot);
            } else {
                report.skip(slot, "its label is not allowed here");
            }
        }
        fitting
    }
}

/// A slot says to whom it is sealed: what another recipient opens is passed over, not tried.
fn sealed_to_another(slot: &Slot, material: &KeyMaterial) -> bool {
    match (&slot.params, material) {
        (SlotParams::HpkeX25519 { recipient }, KeyMaterial::Private(secret)) => secret.public().key_id() != *recipient,
        _ => false,
    }
}

/// `kind`, or `kind-2`, `kind-3`: the first that nobody has.
pub fn free_label(kind: &str, taken: &[String]) -> String {
    let numbered = (2..).map(|number| format!("{kind}-{number}"));
    let free = std::iter::once(kind.to_owned()).chain(numbered).find(|label| !taken.contains(label));
    free.expect("more numbers than labels")
}

impl std::fmt::Debug for Keyring<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keyring({:?})", self.sources)
    }
}

/// What was tried and passed over, for the one error at the end.
#[derive(Default)]
struct Report {
    failed: Vec<Error>,
    /// What Vault refused or could not answer, the first of it.
    refused: Option<Error>,
    /// Vault is away or sealed.
    silent: bool,
    skipped: Vec<String>,
    /// Labels of slots that are told of already.
    told: Vec<String>,
}

impl Report {
    fn tried(&mut self, slot: &Slot) {
        self.told.push(slot.label.clone());
    }

    fn skip(&mut self, slot: &Slot, why: &str) {
        let line = format!("slot {:?} ({}) skipped: {why}", slot.label, slot.kind().name());
        self.told.push(slot.label.clone());
        if !self.skipped.contains(&line) {
            tracing::debug!("{line}");
            self.skipped.push(line);
        }
    }

    fn fail(&mut self, err: Error) {
        tracing::debug!("{}", err.chain());
        self.failed.push(err);
    }

    fn refused(&mut self, err: Error) {
        tracing::debug!("{}", err.chain());
        self.refused.get_or_insert(err);
    }

    fn foreign(&mut self, slot: &Slot) {
        let message = format!("slot {:?} opened to another key than the signed one", slot.label);
        self.fail(Error::new(Code::DekCommit, message));
    }

    fn verdict(mut self, slots: &Slots, sources: &[KeySource]) -> Error {
        // A slot that opened to a foreign key was forged by someone who has our key: that is told before a mere misfit.
        if let Some(at) = self.failed.iter().position(|err| err.code() == Code::DekCommit) {
            return self.failed.swap_remove(at);
        }
        for slot in &slots.slots {
            if !self.told.contains(&slot.label) {
                match slot.kind() {
                    SlotKind::Unknown(_) => self.skip(slot, "its type is of a later format"),
                    _ => self.skip(slot, "no key of its kind was given"),
                }
            }
        }
        let mut message =
            format!("none of {} key slots opens with the {} keys given", slots.slots.len(), sources.len());
        if !sources.is_empty() && !sources.iter().any(KeySource::opens) {
            message.push_str("; recipient: keys only seal, give x25519:PATH of the secret half");
        }
        for line in &self.skipped {
            message.push_str("; ");
            message.push_str(line);
        }
        // What opens with Vault might open once it answers: the code says what to do, and a wrong passphrase beside it
        // is not what stands in the way.
        if let Some(refused) = self.refused {
            return refused.context(message);
        }
        let verdict = Error::new(Code::NoKey, message);
        match self.failed.pop() {
            Some(last) => verdict.with_source(last),
            None => verdict,
        }
    }
}

/// [`Keyring::unlock`] for a single use.
pub fn unlock(slots: &Slots, header: &ManifestHeader, sources: &[KeySource], prompt: Prompt<'_>) -> Result<Dek> {
    Keyring::new(sources, prompt).unlock(slots, header)
}

#[cfg(test)]
#[path = "slots_tests.rs"]
mod tests;
