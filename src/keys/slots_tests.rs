//! What opens, what does not, and what Vault is asked.

use super::*;
use crate::crypto::wrap_dek;
use crate::format::{HashAlg, KeyId, ModelId, Suite, Vid};
use crate::mem::{LockedBuf, Secret};
use crate::vault::TransitKey;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::os::unix::fs::PermissionsExt;

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

#[test]
fn the_slot_that_opened_is_named_by_kind_and_label() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(1, &dek(7));
    let node = wrap(&raw(1), "node", CHEAP, &(&header).into(), &dek(7)).unwrap();
    let phrase = wrap(&pass("horse"), "old", CHEAP_SCRYPT, &(&header).into(), &dek(7)).unwrap();
    let slots = slots_of(&header, vec![node, phrase]);
    let by = |sources: &[KeySource]| unlock(&slots, &header, sources, &says("horse")).unwrap().slot().cloned();
    assert_eq!(by(&[key_file(&dir, 1)]).as_deref(), Some("raw/node"));
    assert_eq!(by(&[KeySource::Passphrase]).as_deref(), Some("scrypt/old"));
    assert_eq!(dek(7).slot(), None);
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

/// THREAT_MODEL (f) row 38.
#[test]
fn a_slot_whose_label_is_not_allowed_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(1, &dek(7));
    let slots = slots_of(&header, vec![wrap(&raw(1), "theirs", CHEAP, &(&header).into(), &dek(7)).unwrap()]);
    let sources = [key_file(&dir, 1)];
    let ring = |label: &str| Keyring::new(&sources, &nobody).allow_labels(&[label.into()]);
    let err = ring("ours").unlock(&slots, &header).unwrap_err();
    assert_eq!(err.code(), Code::NoKey);
    assert!(err.message().contains("label is not allowed"), "{err:?}");
    assert!(ring("theirs").unlock(&slots, &header).is_ok());
}

/// Slots that no key at hand is for are passed over by name; others beside them open.
#[test]
fn slots_of_other_kinds_are_skipped_and_said() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(1, &dek(7));
    let vault = Slot { label: "v".into(), params: SlotParams::VaultTransit, body: b"vault:v1:AAAA".to_vec() };
    let later = Slot { label: "l".into(), params: SlotParams::Unknown { kind: 7, params: vec![] }, body: vec![] };
    let none = slots_of(&header, vec![vault.clone(), later.clone()]);
    let err = unlock(&none, &header, &[key_file(&dir, 1)], &nobody).unwrap_err();
    assert_eq!(err.code(), Code::NoKey);
    assert!(err.message().contains("no key of its kind") && err.message().contains("later format"), "{err:?}");
    let mixed = slots_of(&header, vec![vault, later, wrap(&raw(1), "n", CHEAP, &(&header).into(), &dek(7)).unwrap()]);
    assert!(unlock(&mixed, &header, &[key_file(&dir, 1)], &nobody).is_ok());
}

fn pair(dir: &tempfile::TempDir, name: &str) -> (KeySource, KeySource) {
    let path = dir.path().join(name);
    let public = crate::keys::generate_recipient_pair(&path).unwrap();
    (KeySource::X25519(path), KeySource::Recipient(public))
}

#[test]
fn each_of_several_recipients_opens_with_its_own_secret_and_a_public_half_opens_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(1, &dek(7));
    let ((one, to_one), (two, to_two), (three, _)) = (pair(&dir, "1"), pair(&dir, "2"), pair(&dir, "3"));
    let sources = [to_one, to_two, key_file(&dir, 1)];
    let wrapped = Keyring::new(&sources, &nobody).wrap_all(&dek(7), &(&header).into()).unwrap();
    let labels: Vec<&str> = wrapped.iter().map(|slot| &slot.label[..]).collect();
    assert_eq!(labels, ["recipient", "recipient-2", "key-file"]);
    let slots = slots_of(&header, wrapped);
    for source in [one.clone(), two, key_file(&dir, 1)] {
        assert!(unlock(&slots, &header, &[source], &nobody).unwrap().opens(&header));
    }
    let err = unlock(&slots, &header, &[three], &nobody).unwrap_err();
    assert_eq!(err.code(), Code::NoKey);
    assert!(err.message().contains("another recipient"), "{err:?}");
    let err = unlock(&slots, &header, &sources[..2], &nobody).unwrap_err();
    assert_eq!(err.code(), Code::NoKey);
    assert!(err.message().contains("only seal"), "{err:?}");

    // Who has the secret half may seal to himself with it.
    let own = Keyring::new(&[one], &nobody);
    let slots = slots_of(&header, own.wrap_all(&dek(7), &(&header).into()).unwrap());
    assert!(own.unlock(&slots, &header).is_ok());
}

/// THREAT_MODEL (f) rows 31 and 32, for public keys: anybody can seal to one.
#[test]
fn a_sealed_slot_that_was_moved_renamed_or_made_by_another_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (header(1, &dek(7)), header(2, &dek(7)));
    let (one, to_one) = pair(&dir, "1");
    let (_, to_two) = pair(&dir, "2");
    let open = |slot: Slot, header: &ManifestHeader| {
        let err = unlock(&slots_of(header, vec![slot]), header, std::slice::from_ref(&one), &nobody).unwrap_err();
        (err.code(), err.chain())
    };
    let seal = |source: &KeySource, key: u8, header: &ManifestHeader| {
        let ring = Keyring::new(std::slice::from_ref(source), &nobody);
        ring.wrap_source(0, Some("server"), &dek(key), &header.into(), &[]).unwrap()
    };
    let good = seal(&to_one, 7, &old);
    let (code, chain) = open(good.clone(), &new);
    assert!(code == Code::NoKey && chain.contains("was not made for this recipient"), "{chain}");
    let (code, chain) = open(Slot { label: "other".into(), ..good.clone() }, &old);
    assert!(code == Code::NoKey && chain.contains("was not made for this recipient"), "{chain}");
    // What is sealed to another, told to be ours.
    let params = good.params.clone();
    let (code, chain) = open(Slot { params, ..seal(&to_two, 7, &old) }, &old);
    assert!(code == Code::NoKey && chain.contains("was not made for this recipient"), "{chain}");
    // The id of nobody.
    let params = SlotParams::HpkeX25519 { recipient: KeyId([0; 32]) };
    let (code, chain) = open(Slot { params, ..good.clone() }, &old);
    assert!(code == Code::NoKey && chain.contains("another recipient"), "{chain}");
    // A key of the forger's choice, bound to our commitment.
    assert_eq!(open(seal(&to_one, 8, &old), &old).0, Code::DekCommit);
}

/// Slot kind 8 is read, never written: these bytes are of another implementation (tests/vectors/slots_kinds.py).
#[test]
fn a_pbkdf2_slot_opens_with_its_passphrase_and_no_new_one_is_made() {
    let lines: String = include_str!("../../tests/vectors/slots-kinds.hex").lines().collect();
    let slots = Slots::parse(&hex::decode(lines).unwrap()).unwrap();
    let (model_id, vid, dek_commit) = (slots.model_id, slots.vid, slots.dek_commit);
    let header = ManifestHeader { model_id, vid, dek_commit, ..header(1, &dek(7)) };
    let passphrase = [KeySource::Passphrase];
    let opened = unlock(&slots, &header, &passphrase, &says("correct horse battery staple")).unwrap();
    assert!(opened.opens(&header));
    let err = unlock(&slots, &header, &passphrase, &says("correct horse battery stable")).unwrap_err();
    assert_eq!(err.code(), Code::NoKey);
    let again =
        Keyring::new(&passphrase, &says("correct horse battery staple")).wrap_all(&opened, &(&header).into()).unwrap();
    assert_eq!(again[0].kind(), SlotKind::Argon2id);
}

/// Two guesses, whatever kinds of hash the slots ask for.
#[test]
fn a_pbkdf2_slot_counts_among_the_password_hashes() {
    let header = header(1, &dek(7));
    let bad = |label: &str| Slot {
        label: label.into(),
        params: SlotParams::Pbkdf2Sha512 { iterations: 100_000, salt: [1; 32] },
        body: vec![1; 80],
    };
    let good = wrap(&pass("horse"), "p", CHEAP, &(&header).into(), &dek(7)).unwrap();
    let third = slots_of(&header, vec![bad("a"), bad("b"), good.clone()]);
    let err = unlock(&third, &header, &[KeySource::Passphrase], &says("horse")).unwrap_err();
    assert!(err.code() == Code::NoKey && err.message().contains("two password hashes"), "{err:?}");
    let second = slots_of(&header, vec![bad("a"), good]);
    assert!(unlock(&second, &header, &[KeySource::Passphrase], &says("horse")).is_ok());
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
fn a_label_is_the_one_given_or_the_first_that_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(1, &dek(7));
    let ring = Keyring::new(&[key_file(&dir, 1)], &nobody);
    let taken = ["key-file", "key-file-3", "ours"].map(String::from);
    let wrap = |label| ring.wrap_source(0, label, &dek(7), &(&header).into(), &taken);
    assert_eq!(wrap(None).unwrap().label, "key-file-2");
    let slot = wrap(Some("break-glass")).unwrap();
    assert_eq!(slot.label, "break-glass");
    assert!(ring.unlock(&slots_of(&header, vec![slot]), &header).is_ok());
    assert_eq!(wrap(Some("ours")).unwrap_err().code(), Code::Usage);
    assert_eq!(wrap(Some("../ours")).unwrap_err().code(), Code::SlotLabel);
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

/// Vault as the keyring sees it, for answers that a healthy one never gives.
#[derive(Clone)]
struct Double {
    refusal: Option<Code>,
    /// The field, by version from 1: the last is the newest.
    field: Vec<String>,
    /// What transit unwraps to instead.
    instead: Option<u8>,
    asked: std::sync::Arc<Mutex<Vec<String>>>,
}

impl Double {
    fn new() -> Double {
        Double { refusal: None, field: vec![hex::encode([1; 32])], instead: None, asked: Default::default() }
    }

    fn ask(&self, what: String) -> Result<()> {
        self.asked.lock().unwrap().push(what);
        match self.refusal {
            Some(code) => Err(Error::new(code, "Vault says no")),
            None => Ok(()),
        }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    fn ring<'a>(&self, sources: &[KeySource], prompt: Prompt<'a>) -> Keyring<'a> {
        let mut ring = Keyring::new(sources, prompt);
        ring.vault = Some(Box::new(self.clone()));
        ring
    }
}

impl KeyService for Double {
    fn transit_wrap(&self, at: &TransitKey, context: &[u8; 32], key: &Secret<32>) -> Result<String> {
        self.ask(format!("wrap {at}"))?;
        Ok(format!("vault:v1:{}", STANDARD.encode([&context[..], key.expose()].concat())))
    }
    fn transit_unwrap(&self, at: &TransitKey, context: &[u8; 32], wrapped: &str) -> Result<Secret<32>> {
        self.ask(format!("unwrap {at}"))?;
        let bytes = STANDARD.decode(&wrapped[9..]).unwrap();
        if bytes[..32] != context[..] {
            refuse!(SlotCommit, "another context");
        }
        let key: [u8; 32] = bytes[32..].try_into().unwrap();
        Ok(Secret::from_bytes(&mut self.instead.map_or(key, |byte| [byte; 32])))
    }
    fn kv_field(&self, mount: &str, path: &str, field: &str, version: Option<u32>) -> Result<(LockedBuf, u32)> {
        self.ask(format!("read {mount}/{path}#{field} {version:?}"))?;
        let version = version.unwrap_or(self.field.len() as u32);
        match self.field.get(version as usize - 1) {
            Some(text) => Ok((LockedBuf::copy_of(text.as_bytes())?, version)),
            None => refuse!(VaultNotFound, "no version {version}"),
        }
    }
}

fn transit() -> KeySource {
    "vault-transit:transit/models".parse().unwrap()
}
fn kv() -> KeySource {
    "vault-kv:secret/models/llama#kek".parse().unwrap()
}

#[test]
fn vault_is_asked_by_the_names_of_the_local_configuration_and_for_the_exact_version() {
    let header = header(1, &dek(7));
    let mut vault = Double::new();
    let slots = vault.ring(&[transit(), kv()], &nobody).wrap_all(&dek(7), &(&header).into()).unwrap();
    assert_eq!(vault.asked(), ["wrap transit/models", "read secret/models/llama#kek None"]);
    assert_eq!(slots[0].kind(), SlotKind::VaultTransit);
    assert!(matches!(slots[1].params, SlotParams::VaultKv { version: 1, .. }));
    // The secret has moved on; the slot has not. Labels say nothing of the place.
    vault.field.push(hex::encode([2; 32]));
    let mut slots = slots_of(&header, slots);
    assert!(vault.ring(&[transit()], &nobody).unlock(&slots, &header).unwrap().opens(&header));
    assert_eq!(vault.asked(), ["unwrap transit/models"]);
    assert!(vault.ring(&[kv()], &nobody).unlock(&slots, &header).unwrap().opens(&header));
    assert_eq!(vault.asked(), ["read secret/models/llama#kek Some(1)"]);
    slots.slots[0].label = "evil.example".into();
    assert!(vault.ring(&[transit()], &nobody).unlock(&slots, &header).is_ok());
    assert_eq!(vault.asked(), ["unwrap transit/models"]);
}

#[test]
fn vault_is_asked_for_slots_of_its_kinds_only_and_when_its_turn_comes() {
    let dir = tempfile::tempdir().unwrap();
    let header = header(1, &dek(7));
    let vault = Double::new();
    let sources = [key_file(&dir, 1), transit(), kv()];
    let wrapped = vault.ring(&sources, &nobody).wrap_all(&dek(7), &(&header).into()).unwrap();
    vault.asked();
    let [raw, in_transit, in_kv] = &wrapped[..] else { panic!("{wrapped:?}") };
    let raw_alone = slots_of(&header, vec![raw.clone()]);
    let err = vault.ring(&[transit(), kv()], &nobody).unlock(&raw_alone, &header).unwrap_err();
    assert!(err.code() == Code::NoKey && err.message().contains("no key of its kind"), "{err:?}");
    let all = slots_of(&header, wrapped.clone());
    assert!(vault.ring(&sources, &nobody).unlock(&all, &header).is_ok(), "the file opens");
    assert_eq!(vault.asked(), [""; 0]);
    let both = slots_of(&header, vec![in_transit.clone(), in_kv.clone()]);
    assert!(vault.ring(&[kv(), transit()], &nobody).unlock(&both, &header).is_ok());
    assert_eq!(vault.asked(), ["read secret/models/llama#kek Some(1)"]);
    let ring = vault.ring(&[transit()], &nobody).allow_labels(&["others".into()]);
    assert_eq!(ring.unlock(&both, &header).unwrap_err().code(), Code::NoKey);
    assert_eq!(vault.asked(), [""; 0]);
}

/// THREAT_MODEL (f) row 41.
#[test]
fn what_vault_refuses_is_told_with_its_code_and_hinders_no_source_after_it() {
    let header = header(1, &dek(7));
    let mut vault = Double::new();
    let sources = [transit(), kv(), KeySource::Passphrase];
    let mut wrapped = vault.ring(&sources[..2], &nobody).wrap_all(&dek(7), &(&header).into()).unwrap();
    wrapped.push(Slot { label: "transit-2".into(), ..wrapped[0].clone() });
    wrapped.push(wrap(&pass("horse"), "break-glass", CHEAP, &(&header).into(), &dek(7)).unwrap());
    let slots = slots_of(&header, wrapped);
    vault.asked();
    for (code, asked) in [
        (Code::VaultDenied, 3),
        (Code::VaultSealed, 1),
        (Code::VaultUnreachable, 1),
        (Code::VaultNotFound, 3),
        (Code::VaultAnswer, 3),
    ] {
        vault.refusal = Some(code);
        let err = vault.ring(&sources[..2], &nobody).unlock(&slots, &header).unwrap_err();
        assert_eq!(err.code(), code, "{err:?}");
        assert!(err.chain().contains("Vault says no"), "{err:?}");
        assert_eq!(vault.asked().len(), asked, "{code}: once, where it does not answer");
        let err = vault.ring(&sources, &says("donkey")).unlock(&slots, &header).unwrap_err();
        assert_eq!(err.code(), code, "a wrong passphrase is not what stands in the way");
        assert!(vault.ring(&sources, &says("horse")).unlock(&slots, &header).unwrap().opens(&header), "{code}");
        vault.asked();
    }
}

/// THREAT_MODEL (f) row 40.
#[test]
fn what_vault_answers_wrongly_opens_nothing() {
    let (old, new) = (header(1, &dek(7)), header(2, &dek(7)));
    let good = Double::new();
    let slots_for = |source: KeySource, header: &ManifestHeader| {
        let ring = good.ring(std::slice::from_ref(&source), &nobody);
        slots_of(header, ring.wrap_all(&dek(7), &header.into()).unwrap())
    };
    let code = |vault: &Double, source: KeySource, slots: &Slots, header: &ManifestHeader| {
        vault.ring(&[source], &nobody).unlock(slots, header).unwrap_err().code()
    };
    let other = Double { instead: Some(8), ..Double::new() };
    assert_eq!(code(&other, transit(), &slots_for(transit(), &old), &old), Code::DekCommit);
    for wrong in [String::new(), "ab".repeat(31), "ab".repeat(33), "00".repeat(32), "<html>".into()] {
        let vault = Double { field: vec![wrong.clone()], ..Double::new() };
        assert_eq!(code(&vault, kv(), &slots_for(kv(), &old), &old), Code::KeyFormat, "{wrong}");
        let err = vault.ring(&[kv()], &nobody).wrap_all(&dek(7), &(&old).into()).unwrap_err();
        assert_eq!(err.code(), Code::KeyFormat);
    }
    let changed = Double { field: vec![hex::encode([2; 32])], ..Double::new() };
    assert_eq!(code(&changed, kv(), &slots_for(kv(), &old), &old), Code::NoKey);
    // A slot of another version, put where it does not belong.
    for source in [transit(), kv()] {
        let moved = slots_of(&new, slots_for(source.clone(), &old).slots);
        let err = good.ring(&[source], &nobody).unlock(&moved, &new).unwrap_err();
        assert_eq!(err.code(), Code::NoKey, "{err:?}");
    }
}

#[test]
fn a_source_in_vault_without_a_vault_says_what_to_set() {
    let header = header(1, &dek(7));
    for source in [transit(), kv()] {
        let err = Keyring::new(&[KeySource::Passphrase, source.clone()], &nobody).with_vault(None).unwrap_err();
        assert!(err.code() == Code::Usage && err.message().contains("--vault-addr"), "{err:?}");
        let err = Keyring::new(&[source], &nobody).wrap_all(&dek(7), &(&header).into()).unwrap_err();
        assert!(err.code() == Code::Usage && err.message().contains("VAULT_ADDR"), "{err:?}");
    }
    assert!(Keyring::new(&[KeySource::Passphrase], &nobody).with_vault(None).is_ok());
}
