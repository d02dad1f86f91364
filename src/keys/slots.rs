//! Opens the key slots of a version with the keys at hand, and makes new slots.
//!
//! In: slots from the store (parsed, hostile), local keys in local order. Out: the DEK that the signed manifest commits to.
//! Promises: sources are tried in the order the user gave them; at most two password hashes run for one version, and
//! none whose cost is out of bounds (`Slots::parse` refuses it before); a slot can open to the signed key or to nothing;
//! a label is compared, never followed.
//! Spec: docs/FORMAT.md a.7. Held by: the tests below, THREAT_MODEL (f) rows 31, 32, 36 to 38.

use std::sync::Mutex;

use zeroize::{Zeroize, Zeroizing};

use super::source::{KeyMaterial, KeySource, Prompt};
use crate::crypto::{Dek, unwrap_dek, wrap_dek};
use crate::error::{Code, Error, Result};
use crate::format::{ManifestHeader, ModelId, Slot, SlotKind, SlotParams, Slots, Vid, check_label};
use crate::mem::{Secret, scrub_stack};
use crate::refuse;

/// Password hashes run for one version, whatever its slots say: each costs up to seconds and gigabytes.
const KDF_RUNS_MAX: usize = 2;

/// What guessing a passphrase shall cost, for a new slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    Scrypt { log2_n: u8 },
    Argon2id { m_kib: u32, t: u32, p: u32 },
}

impl Default for Cost {
    /// 256 MiB, 3 passes, 4 lanes (docs/FORMAT.md a.7).
    fn default() -> Self {
        Cost::Argon2id { m_kib: 256 << 10, t: 3, p: 4 }
    }
}

/// The version whose data key is to be wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotTarget {
    pub model_id: ModelId,
    pub vid: Vid,
    /// `Dek::commitment`, as the manifest's header will carry it.
    pub dek_commit: [u8; 32],
}

impl From<&ManifestHeader> for SlotTarget {
    fn from(header: &ManifestHeader) -> SlotTarget {
        SlotTarget { model_id: header.model_id, vid: header.vid, dek_commit: header.dek_commit }
    }
}

/// The keys of one process: each source is read once, when it is first needed, and kept in locked memory.
pub struct Keyring<'a> {
    sources: Vec<KeySource>,
    loaded: Mutex<Vec<Option<KeyMaterial>>>,
    labels: Option<Vec<String>>,
    prompt: Prompt<'a>,
}

impl<'a> Keyring<'a> {
    /// `sources` in the order in which they are to be tried.
    pub fn new(sources: &[KeySource], prompt: Prompt<'a>) -> Keyring<'a> {
        let loaded = Mutex::new(sources.iter().map(|_| None).collect());
        Keyring { sources: sources.to_vec(), loaded, labels: None, prompt }
    }

    /// Slots with other labels than these are skipped.
    pub fn allow_labels(mut self, labels: Vec<String>) -> Result<Self> {
        for label in &labels {
            check_label(label.as_bytes())?;
        }
        self.labels = Some(labels);
        Ok(self)
    }

    pub fn sources(&self) -> &[KeySource] {
        &self.sources
    }

    /// The DEK of the version that `header` describes.
    ///
    /// # Errors
    /// `SLOTS_MODEL` for slots of another version. `DEK_COMMIT` if a slot opened to another key than the signed one.
    /// `NO_KEY` if no slot opened; its cause is the last refusal (`SLOT_COMMIT` for a wrong key or a slot brought here
    /// from elsewhere: the two cannot be told apart). What reading a source may answer.
    pub fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        if slots.model_id != header.model_id || slots.vid != header.vid {
            refuse!(SlotsModel, "slots are of version {}, the manifest of {}", slots.vid, header.vid);
        }
        if slots.dek_commit != header.dek_commit {
            refuse!(DekCommit, "slots generation {} is for another key than the signed one", slots.generation);
        }
        let mut report = Report::default();
        let mut kdf_runs = 0;
        for (number, source) in self.sources.iter().enumerate() {
            let fitting = self.fitting(slots, source, &mut report);
            if fitting.is_empty() {
                continue;
            }
            let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let material = self.material(&mut loaded, number)?;
            for slot in fitting {
                if kdf_of(&slot.params).is_some() {
                    if kdf_runs == KDF_RUNS_MAX {
                        report.skip(slot, "two password hashes were tried already");
                        continue;
                    }
                    kdf_runs += 1;
                }
                match open_slot(slot, material, header) {
                    Ok(dek) if dek.opens(header) => return Ok(dek),
                    Ok(_) => report.fail(Error::new(
                        Code::DekCommit,
                        format!("slot {:?} opened to another key than the signed one", slot.label),
                    )),
                    Err(err) => report.fail(err.context(format!("slot {:?} does not open with {source}", slot.label))),
                }
            }
        }
        Err(report.verdict(slots, self.sources.len()))
    }

    /// One new slot for each source, so that a publisher's key is read once for sealing and for reading back. Labels say
    /// the kind of source and are told apart by a number.
    pub fn wrap_all(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut slots: Vec<Slot> = Vec::new();
        for (number, source) in self.sources.iter().enumerate() {
            let kind = source.default_label();
            let taken = slots.iter().filter(|slot| slot.label.starts_with(kind)).count();
            let label = if taken == 0 { kind.to_owned() } else { format!("{kind}-{}", taken + 1) };
            slots.push(wrap(self.material(&mut loaded, number)?, &label, Cost::default(), target, dek)?);
        }
        Ok(slots)
    }

    fn material<'m>(&self, loaded: &'m mut [Option<KeyMaterial>], number: usize) -> Result<&'m KeyMaterial> {
        if loaded[number].is_none() {
            loaded[number] = Some(self.sources[number].load(self.prompt)?);
        }
        Ok(loaded[number].as_ref().expect("loaded on the line before"))
    }

    /// The slots that a source of this kind can open and whose labels are allowed.
    fn fitting<'s>(&self, slots: &'s Slots, source: &KeySource, report: &mut Report) -> Vec<&'s Slot> {
        let mut fitting = Vec::new();
        for slot in &slots.slots {
            let allowed = self.labels.as_ref().is_none_or(|labels| labels.contains(&slot.label));
            let fits = match (slot.kind(), source) {
                (SlotKind::Raw, KeySource::File(_) | KeySource::Env(_)) => true,
                (SlotKind::Scrypt | SlotKind::Argon2id, KeySource::Passphrase | KeySource::PassphraseFile(_)) => true,
                (SlotKind::VaultKv | SlotKind::VaultTransit, _) => {
                    report.skip(slot, "Vault is not in this version");
                    false
                }
                (SlotKind::Unknown(_), _) => {
                    report.skip(slot, "its type is of a later format");
                    false
                }
                (SlotKind::Raw | SlotKind::Scrypt | SlotKind::Argon2id, _) => false,
            };
            match (fits, allowed) {
                (true, true) => fitting.push(slot),
                (true, false) => report.skip(slot, "its label is not allowed here"),
                (false, _) => {}
            }
        }
        fitting
    }
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
    skipped: Vec<String>,
}

impl Report {
    fn skip(&mut self, slot: &Slot, why: &str) {
        let line = format!("slot {:?} ({}) skipped: {why}", slot.label, slot.kind().name());
        if !self.skipped.contains(&line) {
            tracing::debug!("{line}");
            self.skipped.push(line);
        }
    }

    fn fail(&mut self, err: Error) {
        tracing::debug!("{}", err.chain());
        self.failed.push(err);
    }

    fn verdict(mut self, slots: &Slots, sources: usize) -> Error {
        // A slot that opened to a foreign key was forged by someone who has our key: that is told before a mere misfit.
        if let Some(at) = self.failed.iter().position(|err| err.code() == Code::DekCommit) {
            return self.failed.swap_remove(at);
        }
        let mut message = format!("none of {} key slots opens with the {sources} keys given", slots.slots.len());
        for line in &self.skipped {
            message.push_str("; ");
            message.push_str(line);
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

/// A new slot that opens to `dek`, which must be the key that `target` commits to, with `material`.
///
/// # Errors
/// `SLOT_LABEL`, `KEY_FORMAT`, `KEY_PERMS`, `SLOT_PARAMS` for costs out of bounds, `NO_ROOM` for a hash's memory.
pub fn wrap(material: &KeyMaterial, label: &str, cost: Cost, target: &SlotTarget, dek: &Dek) -> Result<Slot> {
    check_label(label.as_bytes())?;
    let mut salt = [0; 32];
    getrandom::fill(&mut salt).map_err(|err| Error::new(Code::Host, format!("no random bytes: {err}")))?;
    let params = match (material, cost) {
        (KeyMaterial::Key(_), _) => SlotParams::Raw { salt },
        (KeyMaterial::Passphrase(_), Cost::Scrypt { log2_n }) => SlotParams::Scrypt { log2_n, salt },
        (KeyMaterial::Passphrase(_), Cost::Argon2id { m_kib, t, p }) => SlotParams::Argon2id { m_kib, t, p, salt },
    };
    check_cost(&params)?;
    let context = Slot::wrap_context(label, &params, target.model_id, target.vid, &target.dek_commit);
    let body = match material {
        KeyMaterial::Key(kek) => wrap_dek(kek, &context, dek),
        KeyMaterial::Passphrase(text) => wrap_dek(&stretch(text, &params)?, &context, dek),
    };
    Ok(Slot { label: label.into(), params, body: body.to_vec() })
}

fn open_slot(slot: &Slot, material: &KeyMaterial, header: &ManifestHeader) -> Result<Dek> {
    let context = Slot::wrap_context(&slot.label, &slot.params, header.model_id, header.vid, &header.dek_commit);
    match material {
        KeyMaterial::Key(kek) => unwrap_dek(kek, &context, &slot.body),
        KeyMaterial::Passphrase(text) => unwrap_dek(&stretch(text, &slot.params)?, &context, &slot.body),
    }
}

fn kdf_of(params: &SlotParams) -> Option<&SlotParams> {
    matches!(params, SlotParams::Scrypt { .. } | SlotParams::Argon2id { .. }).then_some(params)
}

/// The same bounds as the parser's: asked again where the hash runs, so that no other way leads to it.
fn check_cost(params: &SlotParams) -> Result<()> {
    use crate::format::limits::{ARGON2_M_KIB, ARGON2_P, ARGON2_T, SCRYPT_LOG2_N};
    let ok = match params {
        SlotParams::Scrypt { log2_n, .. } => SCRYPT_LOG2_N.contains(log2_n),
        SlotParams::Argon2id { m_kib, t, p, .. } => {
            ARGON2_M_KIB.contains(m_kib) && ARGON2_T.contains(t) && ARGON2_P.contains(p)
        }
        SlotParams::Raw { .. } | SlotParams::VaultKv { .. } | SlotParams::VaultTransit | SlotParams::Unknown { .. } => {
            true
        }
    };
    if !ok {
        refuse!(SlotParams, "password hash with costs out of bounds: {params:?}");
    }
    Ok(())
}

/// The KEK of a passphrase slot. Argon2's memory is ours and wiped; scrypt's lies on the heap and is only freed, because
/// its crate takes none from us (it holds what a guess can be checked with, not the passphrase).
fn stretch(passphrase: &[u8], params: &SlotParams) -> Result<Secret<32>> {
    check_cost(params)?;
    let mut kek = Zeroizing::new([0u8; 32]);
    match params {
        SlotParams::Scrypt { log2_n, salt } => {
            let costs = scrypt::Params::new(*log2_n, 8, 1).expect("2^15 to 2^20 with r = 8, p = 1 are valid");
            let salt = [&b"MFS1/scrypt\0"[..], salt].concat();
            scrypt::scrypt(passphrase, &salt, &costs, &mut kek[..]).expect("32 bytes are a valid length");
        }
        SlotParams::Argon2id { m_kib, t, p, salt } => {
            let costs =
                argon2::Params::new(*m_kib, *t, *p, Some(32)).expect("costs within the format's bounds are valid");
            let mut memory = Vec::new();
            memory.try_reserve_exact(costs.block_count()).map_err(|err| {
                Error::new(Code::NoRoom, format!("no {m_kib} KiB for a password hash")).with_source(err)
            })?;
            memory.resize(costs.block_count(), argon2::Block::new());
            let hasher = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, costs);
            let done = hasher.hash_password_into_with_memory(passphrase, salt, &mut kek[..], &mut memory[..]);
            memory.iter_mut().for_each(Zeroize::zeroize);
            done.map_err(|err| Error::new(Code::KeyFormat, format!("passphrase cannot be hashed: {err}")))?;
        }
        SlotParams::Raw { .. } | SlotParams::VaultKv { .. } | SlotParams::VaultTransit | SlotParams::Unknown { .. } => {
            refuse!(SlotParams, "slot of kind {} takes no passphrase", params.kind().name());
        }
    }
    scrub_stack();
    Ok(Secret::from_bytes(&mut kek))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{HashAlg, Suite};
    use crate::mem::LockedBuf;
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, Instant};

    const CHEAP: Cost = Cost::Argon2id { m_kib: 19_456, t: 1, p: 1 };
    const CHEAP_SCRYPT: Cost = Cost::Scrypt { log2_n: 15 };

    fn dek(byte: u8) -> Dek {
        Dek::from_secret(Secret::from_bytes(&mut [byte; 32]))
    }
    fn raw(byte: u8) -> KeyMaterial {
        KeyMaterial::Key(Secret::from_bytes(&mut [byte; 32]))
    }
    fn pass(text: &str) -> KeyMaterial {
        KeyMaterial::Passphrase(LockedBuf::copy_of(text.as_bytes()).unwrap())
    }
    fn header(vid: u8, dek: &Dek) -> ManifestHeader {
        let (suite, model_id, vid) = (Suite::Aes256Gcm, ModelId::of_name("m"), Vid([vid; 16]));
        ManifestHeader {
            suite,
            hash_alg: HashAlg::Blake3,
            model_id,
            vid,
            seq: 1,
            created_at: 0,
            body_plain_len: 64,
            msalt: [0; 32],
            dek_commit: dek.commitment(suite, model_id, vid),
            manifest_commit: [0; 32],
            previous: None,
        }
    }
    fn slots_of(header: &ManifestHeader, slots: Vec<Slot>) -> Slots {
        let (model_id, vid, dek_commit) = (header.model_id, header.vid, header.dek_commit);
        let slots = Slots { generation: 1, model_id, vid, dek_commit, slots };
        Slots::parse(&slots.encode().unwrap()).unwrap()
    }
    fn key_file(dir: &tempfile::TempDir, byte: u8) -> KeySource {
        let path = dir.path().join(format!("key-{byte}"));
        std::fs::write(&path, [byte; 32]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        KeySource::File(path)
    }
    fn says(text: &'static str) -> impl Fn(&str) -> Result<LockedBuf> + Sync {
        move |_| LockedBuf::copy_of(text.as_bytes())
    }
    fn nobody(_: &str) -> Result<LockedBuf> {
        panic!("nobody is there to be asked")
    }

    #[test]
    fn every_kind_of_slot_opens_with_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let header = header(1, &dek(7));
        let slots = slots_of(
            &header,
            vec![
                wrap(&raw(1), "node", Cost::default(), &(&header).into(), &dek(7)).unwrap(),
                wrap(&pass("horse"), "old", CHEAP_SCRYPT, &(&header).into(), &dek(7)).unwrap(),
            ],
        );
        assert!(unlock(&slots, &header, &[key_file(&dir, 1)], &nobody).unwrap().opens(&header));
        assert!(unlock(&slots, &header, &[KeySource::Passphrase], &says("horse")).unwrap().opens(&header));
        let argon = slots_of(&header, vec![wrap(&pass("horse"), "new", CHEAP, &(&header).into(), &dek(7)).unwrap()]);
        assert!(unlock(&argon, &header, &[KeySource::Passphrase], &says("horse")).unwrap().opens(&header));
        let err = unlock(&argon, &header, &[KeySource::Passphrase], &says("donkey")).unwrap_err();
        assert_eq!(err.code(), Code::NoKey);
    }

    /// Known answers of other implementations: Python's hashlib.scrypt, and cryptography's Argon2id (both OpenSSL).
    #[test]
    fn password_hashes_get_the_salt_and_costs_of_the_page() {
        let salt = [1; 32];
        for (params, want) in [
            (
                SlotParams::Scrypt { log2_n: 15, salt },
                "bf27c73d8c1d3e7b7eebfc3653846e5af0bb668309a307ad2a88cce50c720cfa",
            ),
            (
                SlotParams::Argon2id { m_kib: 19_456, t: 1, p: 2, salt },
                "9d8b74261a86c28dc3e1a64e5b8fa6e7643b24fa8554e7bd15b361d27f707201",
            ),
        ] {
            assert_eq!(hex::encode(stretch(b"horse", &params).unwrap().expose()), want, "{params:?}");
        }
    }

    /// THREAT_MODEL (f) row 31: whoever can wrap under our KEK offers a key of their own.
    #[test]
    fn a_slot_with_another_dek_under_the_same_kek_is_dek_commit() {
        let dir = tempfile::tempdir().unwrap();
        let header = header(1, &dek(7));
        // Bound to our commitment, as a forger would, but holding another key.
        let salt = [5; 32];
        let params = SlotParams::Raw { salt };
        let context = Slot::wrap_context("node", &params, header.model_id, header.vid, &header.dek_commit);
        let KeyMaterial::Key(kek) = raw(1) else { unreachable!() };
        let body = wrap_dek(&kek, &context, &dek(8)).to_vec();
        let forged = slots_of(&header, vec![Slot { label: "node".into(), params, body }]);
        assert_eq!(unlock(&forged, &header, &[key_file(&dir, 1)], &nobody).unwrap_err().code(), Code::DekCommit);

        // A whole slots object for another key.
        let mut other = slots_of(&header, vec![wrap(&raw(1), "node", CHEAP, &(&header).into(), &dek(7)).unwrap()]);
        other.dek_commit = [9; 32];
        assert_eq!(unlock(&other, &header, &[key_file(&dir, 1)], &nobody).unwrap_err().code(), Code::DekCommit);
    }

    /// THREAT_MODEL (f) row 32.
    #[test]
    fn a_slot_from_another_version_is_slot_commit() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (header(1, &dek(7)), header(2, &dek(7)));
        let slot = wrap(&raw(1), "node", CHEAP, &(&old).into(), &dek(7)).unwrap();
        assert_eq!(open_slot(&slot, &raw(1), &new).unwrap_err().code(), Code::SlotCommit);
        let moved = slots_of(&new, vec![slot.clone()]);
        let err = unlock(&moved, &new, &[key_file(&dir, 1)], &nobody).unwrap_err();
        assert_eq!(err.code(), Code::NoKey);
        assert!(err.chain().contains("was not made with this key"), "{}", err.chain());
        // The whole object of another version says so itself.
        let whole = slots_of(&old, vec![slot]);
        assert_eq!(unlock(&whole, &new, &[key_file(&dir, 1)], &nobody).unwrap_err().code(), Code::SlotsModel);
    }

    /// THREAT_MODEL (f) row 36.
    #[test]
    fn a_hash_out_of_bounds_is_refused_before_it_runs() {
        let salt = [0; 32];
        let started = Instant::now();
        for params in [
            SlotParams::Scrypt { log2_n: 40, salt },
            SlotParams::Scrypt { log2_n: 14, salt },
            SlotParams::Argon2id { m_kib: u32::MAX, t: 1, p: 1, salt },
            SlotParams::Argon2id { m_kib: 19_456, t: u32::MAX, p: 1, salt },
            SlotParams::Argon2id { m_kib: 19_456, t: 1, p: 0, salt },
        ] {
            let err = stretch(b"horse", &params).unwrap_err();
            assert_eq!(err.code(), Code::SlotParams, "{params:?}");
            let header = header(1, &dek(7));
            let (model_id, vid, dek_commit) = (header.model_id, header.vid, header.dek_commit);
            let slot = Slot { label: "p".into(), params, body: vec![0; 80] };
            let slots = Slots { generation: 1, model_id, vid, dek_commit, slots: vec![slot] };
            assert_eq!(slots.encode().unwrap_err().code(), Code::SlotParams);
        }
        assert!(started.elapsed() < Duration::from_millis(50), "{:?}", started.elapsed());
    }

    /// Sixteen slots that each ask for a password hash cost two.
    #[test]
    fn at_most_two_password_hashes_run_for_one_version() {
        let header = header(1, &dek(7));
        let good = wrap(&pass("horse"), "p2", CHEAP, &(&header).into(), &dek(7)).unwrap();
        let bad = |label: &str| Slot {
            label: label.into(),
            ..wrap(&pass("horse"), "x", CHEAP, &(&header).into(), &dek(7)).unwrap()
        };
        let third = slots_of(&header, vec![bad("p0"), bad("p1"), good.clone()]);
        let err = unlock(&third, &header, &[KeySource::Passphrase], &says("horse")).unwrap_err();
        assert_eq!(err.code(), Code::NoKey);
        assert!(err.message().contains("two password hashes"), "{err:?}");
        let second = slots_of(&header, vec![bad("p0"), good]);
        assert!(unlock(&second, &header, &[KeySource::Passphrase], &says("horse")).is_ok());
    }

    /// THREAT_MODEL (f) row 37: a label is data; what looks like a place is refused and never visited.
    #[test]
    fn a_label_that_looks_like_a_place_is_slot_label() {
        let header = header(1, &dek(7));
        let long = "x".repeat(65);
        for label in ["../../etc/shadow", "http://evil", &long, "", "UPPER"] {
            let err = wrap(&raw(1), label, CHEAP, &(&header).into(), &dek(7)).unwrap_err();
            assert_eq!(err.code(), Code::SlotLabel, "{label:?}");
            let slot = Slot { label: label.into(), params: SlotParams::Raw { salt: [0; 32] }, body: vec![0; 80] };
            let (model_id, vid, dek_commit) = (header.model_id, header.vid, header.dek_commit);
            let slots = Slots { generation: 1, model_id, vid, dek_commit, slots: vec![slot] };
            assert_eq!(slots.encode().unwrap_err().code(), Code::SlotLabel, "{label:?}");
        }
    }

    /// THREAT_MODEL (f) row 38.
    #[test]
    fn a_slot_whose_label_is_not_allowed_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let header = header(1, &dek(7));
        let slots = slots_of(&header, vec![wrap(&raw(1), "theirs", CHEAP, &(&header).into(), &dek(7)).unwrap()]);
        let sources = [key_file(&dir, 1)];
        let ring = |label: &str| Keyring::new(&sources, &nobody).allow_labels(vec![label.into()]).unwrap();
        let err = ring("ours").unlock(&slots, &header).unwrap_err();
        assert_eq!(err.code(), Code::NoKey);
        assert!(err.message().contains("label is not allowed"), "{err:?}");
        assert!(ring("theirs").unlock(&slots, &header).is_ok());
    }

    /// Slots of kinds this version does not open are passed over by name; others beside them open.
    #[test]
    fn vault_and_unknown_slots_are_skipped_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let header = header(1, &dek(7));
        let vault = Slot { label: "v".into(), params: SlotParams::VaultTransit, body: b"vault:v1:AAAA".to_vec() };
        let later = Slot { label: "l".into(), params: SlotParams::Unknown { kind: 6, params: vec![] }, body: vec![] };
        let none = slots_of(&header, vec![vault.clone(), later.clone()]);
        let err = unlock(&none, &header, &[key_file(&dir, 1)], &nobody).unwrap_err();
        assert_eq!(err.code(), Code::NoKey);
        assert!(err.message().contains("Vault is not in this version") && err.message().contains("later format"));
        let mixed =
            slots_of(&header, vec![vault, later, wrap(&raw(1), "n", CHEAP, &(&header).into(), &dek(7)).unwrap()]);
        assert!(unlock(&mixed, &header, &[key_file(&dir, 1)], &nobody).is_ok());
    }

    #[test]
    fn every_source_gets_a_slot_with_a_label_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let header = header(1, &dek(7));
        let sources = [key_file(&dir, 1), key_file(&dir, 2), key_file(&dir, 3)];
        let wrapped = Keyring::new(&sources, &nobody).wrap_all(&dek(7), &(&header).into()).unwrap();
        let labels: Vec<&str> = wrapped.iter().map(|slot| &slot.label[..]).collect();
        assert_eq!(labels, ["key-file", "key-file-2", "key-file-3"]);
        let slots = slots_of(&header, wrapped);
        for source in sources {
            assert!(unlock(&slots, &header, &[source], &nobody).is_ok());
        }
    }

    #[test]
    fn a_source_is_read_once_for_any_number_of_versions() {
        let asked = std::sync::atomic::AtomicUsize::new(0);
        let prompt = |_: &str| {
            asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            LockedBuf::copy_of(b"horse")
        };
        let ring = Keyring::new(&[KeySource::Passphrase], &prompt);
        for vid in 1..=2 {
            let header = header(vid, &dek(7));
            let slots =
                slots_of(&header, vec![wrap(&pass("horse"), "p", CHEAP_SCRYPT, &(&header).into(), &dek(7)).unwrap()]);
            assert!(ring.unlock(&slots, &header).is_ok());
        }
        assert_eq!(asked.into_inner(), 1);
    }
}
