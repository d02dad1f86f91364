//! Key sources: how they are written, and how the secret behind one is read without leaving copies.
//!
//! In: `--key` words, files, the environment, a terminal. Out: 32 key bytes or a passphrase, in locked memory.
//! Promises: a key file is judged by the open descriptor, never by its path; opening never blocks and follows no symlink;
//! empty, short, long and all-zero secrets are refused; an environment value is overwritten where it lies.
//! Spec: THREAT_MODEL e.2. Held by: the tests below, THREAT_MODEL (f) rows 42 and 43.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::{Zeroize, Zeroizing};

use super::trust::read_public_file;
use crate::crypto::{RecipientKey, RecipientSecret};
use crate::error::{Code, Error, Result};
use crate::format::SlotKind;
use crate::mem::{LockedBuf, Secret, take_env};
use crate::refuse;

/// The longest key file that is read: 32 bytes in base64 or hex are far below it, a passphrase file too.
const FILE_BYTES_MAX: usize = 4096;

/// The whole of a key file in locked memory, and how much of the buffer it fills.
pub(super) fn read_private_file(path: &Path) -> Result<(LockedBuf, usize)> {
    let bytes = crate::mem::read_private_file(path, FILE_BYTES_MAX)?;
    let len = bytes.len();
    Ok((bytes, len))
}

/// Where a key comes from, as `--key` says it. Holds names only, no secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KeySource {
    File(PathBuf),
    Env(String),
    Passphrase,
    PassphraseFile(PathBuf),
    /// The secret half of a key pair: opens what is sealed to it, and seals to it.
    X25519(PathBuf),
    /// A public half: seals, and opens nothing.
    Recipient(RecipientKey),
    RecipientFile(PathBuf),
    VaultTransit {
        mount: String,
        key: String,
    },
    VaultKv {
        mount: String,
        path: String,
        field: String,
    },
}

/// What a source gives.
pub enum KeyMaterial {
    Key(Secret<32>),
    Passphrase(LockedBuf),
    Private(RecipientSecret),
    Recipient(RecipientKey),
}

/// Asks a person for a passphrase; the word is what is asked for.
pub type Prompt<'a> = &'a (dyn Fn(&str) -> Result<LockedBuf> + Sync);

impl KeySource {
    /// What counts when no `--key` was given: `MODELFS_KEY`, then `MODEL_ENCRYPTION_KEY`, hex or base64.
    pub fn env_defaults() -> Vec<KeySource> {
        let names = ["MODELFS_KEY", "MODEL_ENCRYPTION_KEY"];
        let set = names.into_iter().find(|name| std::env::var_os(name).is_some());
        set.map(|name| KeySource::Env(name.into())).into_iter().collect()
    }

    /// A label for a slot made from this source, when the user gave none: says the kind, never a path or a name.
    pub fn default_label(&self) -> &'static str {
        match self {
            KeySource::File(_) => "key-file",
            KeySource::Env(_) => "env",
            KeySource::Passphrase | KeySource::PassphraseFile(_) => "passphrase",
            KeySource::X25519(_) | KeySource::Recipient(_) | KeySource::RecipientFile(_) => "recipient",
            KeySource::VaultTransit { .. } => "vault-transit",
            KeySource::VaultKv { .. } => "vault-kv",
        }
    }

    /// Whether a slot of this kind may open with a key from here.
    pub fn fits(&self, kind: SlotKind) -> bool {
        match kind {
            SlotKind::Raw => matches!(self, KeySource::File(_) | KeySource::Env(_)),
            SlotKind::Scrypt | SlotKind::Argon2id | SlotKind::Pbkdf2Sha512 => {
                matches!(self, KeySource::Passphrase | KeySource::PassphraseFile(_))
            }
            SlotKind::VaultKv => matches!(self, KeySource::VaultKv { .. }),
            SlotKind::VaultTransit => matches!(self, KeySource::VaultTransit { .. }),
            SlotKind::HpkeX25519 => matches!(self, KeySource::X25519(_)),
            SlotKind::Unknown(_) => false,
        }
    }

    /// Whether a key from here can open anything: not so for a recipient's public half.
    pub fn opens(&self) -> bool {
        !matches!(self, KeySource::Recipient(_) | KeySource::RecipientFile(_))
    }

    /// Reads the secret. An environment variable is gone afterwards: keep the result (`Keyring` does).
    ///
    /// # Errors
    /// `KEY_FORMAT`, `KEY_PERMS`; `USAGE` for what is not set, not there or not in this version.
    pub fn load(&self, prompt: Prompt<'_>) -> Result<KeyMaterial> {
        match self {
            KeySource::File(path) => {
                let (bytes, len) = read_private_file(path)?;
                Ok(KeyMaterial::Key(decode_key(&bytes[..len], true, &format!("key file {}", path.display()))?))
            }
            KeySource::Env(name) => {
                let Some(value) = take_env(name)? else {
                    refuse!(Usage, "environment variable {name} is not set, or was read before");
                };
                Ok(KeyMaterial::Key(decode_key(&value, false, &format!("environment variable {name}"))?))
            }
            KeySource::Passphrase => match take_env("MODELFS_PASSPHRASE")? {
                Some(value) => passphrase(value, "MODELFS_PASSPHRASE"),
                None => self.load_new(prompt),
            },
            KeySource::PassphraseFile(path) => {
                let (mut bytes, len) = read_private_file(path)?;
                bytes.truncate(len);
                passphrase(bytes, &format!("passphrase file {}", path.display()))
            }
            KeySource::X25519(path) => Ok(KeyMaterial::Private(load_recipient_secret(path)?)),
            KeySource::Recipient(recipient) => Ok(KeyMaterial::Recipient(*recipient)),
            KeySource::RecipientFile(path) => Ok(KeyMaterial::Recipient(load_recipient(path)?)),
            KeySource::VaultTransit { .. } | KeySource::VaultKv { .. } => {
                refuse!(Usage, "{self} is asked of Vault, slot by slot, and never read here")
            }
        }
    }

    /// As [`KeySource::load`], for a key that is to open what it did not open before. A passphrase is typed, whatever the
    /// environment holds: that is the one in use, and whoever changes it would keep it unasked.
    ///
    /// # Errors
    /// As [`KeySource::load`].
    pub fn load_new(&self, prompt: Prompt<'_>) -> Result<KeyMaterial> {
        match self {
            KeySource::Passphrase => passphrase(prompt("passphrase")?, "the passphrase typed"),
            other => other.load(prompt),
        }
    }
}

impl FromStr for KeySource {
    type Err = Error;

    fn from_str(text: &str) -> Result<KeySource> {
        const FORMS: &str = "file:PATH, env:VAR, passphrase, passphrase-file:PATH, x25519:PATH, \
                             recipient:PUBKEY|PATH.pub, vault-transit:MOUNT/KEY or vault-kv:MOUNT/PATH#FIELD";
        // The word may be a key pasted by mistake: it is not repeated.
        let bad = |why: &str| Error::new(Code::Usage, format!("a key source {why}; write {FORMS}"));
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        if rest.is_empty() && kind != "passphrase" {
            return Err(bad("has a kind and a place, separated by a colon"));
        }
        match kind {
            "file" => Ok(KeySource::File(rest.into())),
            "env" if rest.contains('=') || rest.contains('\0') => Err(bad("names a variable without `=`")),
            "env" => Ok(KeySource::Env(rest.into())),
            "passphrase" if text == "passphrase" => Ok(KeySource::Passphrase),
            "passphrase-file" => Ok(KeySource::PassphraseFile(rest.into())),
            "x25519" => Ok(KeySource::X25519(rest.into())),
            "recipient" if rest.ends_with(".pub") => Ok(KeySource::RecipientFile(rest.into())),
            "recipient" => rest.parse().map(KeySource::Recipient),
            "vault-transit" => match rest.rsplit_once('/') {
                Some((mount, key)) if !mount.is_empty() && !key.is_empty() => {
                    Ok(KeySource::VaultTransit { mount: mount.into(), key: key.into() })
                }
                _ => Err(bad("of kind vault-transit names MOUNT/KEY")),
            },
            "vault-kv" => {
                let parts = rest.split_once('#').and_then(|(at, field)| Some((at.split_once('/')?, field)));
                match parts {
                    Some(((mount, path), field)) if ![mount, path, field].contains(&"") => {
                        Ok(KeySource::VaultKv { mount: mount.into(), path: path.into(), field: field.into() })
                    }
                    _ => Err(bad("of kind vault-kv names MOUNT/PATH#FIELD")),
                }
            }
            _ => Err(bad("is of another kind than these")),
        }
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeySource::File(path) => write!(f, "file:{}", path.display()),
            KeySource::Env(name) => write!(f, "env:{name}"),
            KeySource::Passphrase => f.write_str("passphrase"),
            KeySource::PassphraseFile(path) => write!(f, "passphrase-file:{}", path.display()),
            KeySource::X25519(path) => write!(f, "x25519:{}", path.display()),
            KeySource::Recipient(recipient) => write!(f, "recipient:{recipient}"),
            KeySource::RecipientFile(path) => write!(f, "recipient:{}", path.display()),
            KeySource::VaultTransit { mount, key } => write!(f, "vault-transit:{mount}/{key}"),
            KeySource::VaultKv { mount, path, field } => write!(f, "vault-kv:{mount}/{path}#{field}"),
        }
    }
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KeyMaterial::Key(_) => "KeyMaterial::Key(..)",
            KeyMaterial::Passphrase(_) => "KeyMaterial::Passphrase(..)",
            KeyMaterial::Private(_) => "KeyMaterial::Private(..)",
            KeyMaterial::Recipient(_) => "KeyMaterial::Recipient(..)",
        })
    }
}

/// 32 bytes as they are (where `raw` is allowed), 64 hex digits, or 44 characters of padded base64; one newline after text.
pub(super) fn decode_key(bytes: &[u8], raw: bool, what: &str) -> Result<Secret<32>> {
    let text = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let mut key = Zeroizing::new([0u8; 32]);
    let mut wide = Zeroizing::new([0u8; 33]); // base64 wants room for a padded group
    let decoded = match (bytes.len(), text.len()) {
        (32, _) if raw => {
            key.copy_from_slice(bytes);
            true
        }
        (_, 64) => hex::decode_to_slice(text, &mut key[..]).is_ok(),
        (_, 44) => match STANDARD.decode_slice(text, &mut wide[..]) {
            Ok(32) => {
                key.copy_from_slice(&wide[..32]);
                true
            }
            Ok(_) | Err(_) => false,
        },
        _ => false,
    };
    if !decoded {
        let forms = if raw { "32 raw bytes, 64 hex digits or" } else { "64 hex digits or" };
        refuse!(KeyFormat, "{what} holds {} bytes; wanted {forms} 44 characters of base64", bytes.len());
    }
    if key.iter().all(|byte| *byte == 0) {
        refuse!(KeyFormat, "{what} is all zeros, which is no key; make one with modelfs keygen");
    }
    Ok(Secret::from_bytes(&mut key))
}

/// How the secret half of a key pair is written: so that it is taken for no signing key and no key of a `file:` source,
/// which are 64 hex digits alone, and none of those for it.
pub(super) const RECIPIENT_SECRET_PREFIX: &str = "modelfs-x25519-secret:";

/// # Errors
/// `KEY_PERMS`, `KEY_FORMAT`, `USAGE` if it is not there.
fn load_recipient_secret(path: &Path) -> Result<RecipientSecret> {
    let (bytes, len) = read_private_file(path)?;
    match bytes[..len].strip_prefix(RECIPIENT_SECRET_PREFIX.as_bytes()) {
        Some(digits) => {
            Ok(RecipientSecret::from_seed(decode_key(digits, false, &format!("recipient key {}", path.display()))?))
        }
        None => refuse!(
            KeyFormat,
            "{} is not the secret half of a key pair: it does not start with {RECIPIENT_SECRET_PREFIX}; make one with \
             modelfs keygen --recipient",
            path.display()
        ),
    }
}

/// # Errors
/// `KEY_PERMS` if others could have written it, `KEY_FORMAT`, `USAGE` if it cannot be read.
fn load_recipient(path: &Path) -> Result<RecipientKey> {
    let text = read_public_file(path, FILE_BYTES_MAX as u64)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    text.parse().map_err(|err: Error| err.context(format!("recipient file {}", path.display())))
}

fn passphrase(mut text: LockedBuf, what: &str) -> Result<KeyMaterial> {
    if text.last() == Some(&b'\n') {
        text.truncate(text.len() - 1);
    }
    if text.is_empty() {
        refuse!(KeyFormat, "{what} is empty, which is no passphrase");
    }
    if text.contains(&0) || text.contains(&b'\n') {
        refuse!(KeyFormat, "{what} has a line break or a zero byte inside");
    }
    Ok(KeyMaterial::Passphrase(text))
}

/// Asks on the terminal, not on standard input, which may be a pipe of something else.
pub fn prompt_terminal(what: &str) -> Result<LockedBuf> {
    ask(what, "passphrase-file:PATH or MODELFS_PASSPHRASE")
}

/// Asks for a new passphrase, which is typed twice: nobody could open what a slip of the finger sealed.
pub fn prompt_new(what: &str) -> Result<LockedBuf> {
    let instead = "passphrase-file:PATH (MODELFS_PASSPHRASE is never taken for a new one)";
    let first = ask(&format!("new {what}"), instead)?;
    let again = ask(&format!("new {what}, again"), instead)?;
    if first[..] != again[..] {
        refuse!(Usage, "the two {what}s typed differ; nothing was changed");
    }
    Ok(first)
}

fn ask(what: &str, instead: &str) -> Result<LockedBuf> {
    let mut typed = rpassword::prompt_password(format!("{what}: ")).map_err(|err| {
        Error::new(Code::Usage, format!("cannot ask for the {what}: no terminal to ask on; give {instead}"))
            .with_source(err)
    })?;
    let copy = LockedBuf::copy_of(typed.as_bytes());
    typed.zeroize();
    copy
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const BASE64: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    fn no_prompt(_: &str) -> Result<LockedBuf> {
        panic!("nobody is there to be asked")
    }

    fn file(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn load(path: &Path) -> Result<KeyMaterial> {
        KeySource::File(path.to_owned()).load(&no_prompt)
    }

    fn key_of(material: KeyMaterial) -> [u8; 32] {
        match material {
            KeyMaterial::Key(key) => *key.expose(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sources_are_printed_as_they_are_written() {
        for text in [
            "file:/etc/modelfs/key",
            "file:a:b",
            "env:MODELFS_KEY",
            "passphrase",
            "passphrase-file:./p",
            "x25519:/etc/modelfs/server.key",
            "recipient:server.pub",
            "recipient:modelfs-x25519:269f9fe1ada5f027dbd2e82b3b04f3932d0df62b30a6a1336e6fbb69d6fb194b",
            "vault-transit:transit/models",
            "vault-transit:a/b/models",
            "vault-kv:secret/models/llama#kek",
        ] {
            assert_eq!(text.parse::<KeySource>().unwrap().to_string(), text);
        }
        for text in ["", "file:", "file", HEX, "env:", "env:A=B", "passphrase:", "passphrase:x", "vault-kv:secret/x"] {
            let err = text.parse::<KeySource>().unwrap_err();
            assert_eq!(err.code(), Code::Usage, "{text:?}");
            assert!(text.is_empty() || text.len() < 20 || !err.message().contains(text), "a key pasted by mistake");
        }
        // A signing key, or a secret, where a recipient belongs.
        for text in [&format!("recipient:{HEX}"), "recipient:server.key", "recipient:modelfs-x25519-secret:00"] {
            let err = text.parse::<KeySource>().unwrap_err();
            assert_eq!(err.code(), Code::KeyFormat, "{text:?}");
            assert!(!err.message().contains(&text[10..]), "{err:?}");
        }
        let vault: KeySource = "vault-transit:t/k".parse().unwrap();
        assert_eq!(vault.load(&no_prompt).unwrap_err().code(), Code::Usage);
    }

    #[test]
    fn a_key_file_may_be_raw_hex_or_base64() {
        let dir = tempfile::tempdir().unwrap();
        let raw: [u8; 32] = std::array::from_fn(|i| i as u8);
        for (name, bytes) in [
            ("raw", &raw[..]),
            ("hex", HEX.as_bytes()),
            ("hex-newline", format!("{HEX}\n").as_bytes()),
            ("upper", HEX.to_uppercase().as_bytes()),
            ("base64", BASE64.as_bytes()),
            ("base64-newline", format!("{BASE64}\n").as_bytes()),
        ] {
            let path = file(dir.path(), name, bytes, 0o600);
            assert_eq!(key_of(load(&path).unwrap()), raw, "{name}");
        }
    }

    #[test]
    fn no_key_file_is_taken_for_one_of_another_kind() {
        let dir = tempfile::tempdir().unwrap();
        let secret = format!("modelfs-x25519-secret:{HEX}\n");
        let path = file(dir.path(), "pair", secret.as_bytes(), 0o600);
        let seed: [u8; 32] = std::array::from_fn(|i| i as u8);
        let public = match KeySource::X25519(path.clone()).load(&no_prompt).unwrap() {
            KeyMaterial::Private(secret) => {
                assert_eq!(secret.seed(), &seed);
                secret.public()
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(load(&path).unwrap_err().code(), Code::KeyFormat, "a key pair is no key");
        for (name, bytes) in [
            ("a signing or raw key", HEX.as_bytes()),
            ("raw bytes", &seed),
            ("cut", &secret.as_bytes()[..80]),
            ("two lines", format!("{secret}\n").as_bytes()),
            ("zeros", format!("modelfs-x25519-secret:{}", "0".repeat(64)).as_bytes()),
            ("its public half", format!("{public}\n").as_bytes()),
        ] {
            let path = file(dir.path(), name, bytes, 0o600);
            assert_eq!(KeySource::X25519(path).load(&no_prompt).unwrap_err().code(), Code::KeyFormat, "{name}");
        }
        let open = file(dir.path(), "open", secret.as_bytes(), 0o644);
        assert_eq!(KeySource::X25519(open).load(&no_prompt).unwrap_err().code(), Code::KeyPerms);

        let load = |path| KeySource::RecipientFile(path).load(&no_prompt);
        let good = file(dir.path(), "good.pub", format!("{public}\n").as_bytes(), 0o644);
        assert!(matches!(load(good.clone()).unwrap(), KeyMaterial::Recipient(key) if key == public));
        let signing = file(dir.path(), "signing.pub", HEX.as_bytes(), 0o644);
        assert_eq!(load(signing).unwrap_err().code(), Code::KeyFormat);
        let writable = file(dir.path(), "writable.pub", format!("{public}\n").as_bytes(), 0o666);
        assert_eq!(load(writable).unwrap_err().code(), Code::KeyPerms, "others could have put their own key there");
        let err = crate::keys::load_public_key(good.to_str().unwrap()).unwrap_err();
        assert_eq!(err.code(), Code::KeyFormat, "a recipient is no signer");
    }

    /// THREAT_MODEL (f) row 42.
    #[test]
    fn empty_zero_short_and_padded_secrets_are_key_format() {
        let dir = tempfile::tempdir().unwrap();
        let raw = [1u8; 32];
        for (name, bytes) in [
            ("empty", &b""[..]),
            ("newline", b"\n"),
            ("zeros", &[0; 32]),
            ("zeros-hex", "0".repeat(64).as_bytes()),
            ("31", &raw[..31]),
            ("33", &[1; 33]),
            ("raw-newline", &[&raw[..], b"\n"].concat()),
            ("two-newlines", format!("{HEX}\n\n").as_bytes()),
            ("crlf", format!("{HEX}\r\n").as_bytes()),
            ("space", format!(" {HEX}").as_bytes()),
            ("hex-63", &HEX.as_bytes()[1..]),
            ("not-hex", "g".repeat(64).as_bytes()),
            ("base64-unpadded", &BASE64.as_bytes()[..43]),
            ("base64-trailing-bits", b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh9="),
            ("base64-url", b"--ECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="),
            ("long", &[b'a'; 5000]),
        ] {
            let path = file(dir.path(), name, bytes, 0o600);
            assert_eq!(load(&path).unwrap_err().code(), Code::KeyFormat, "{name}");
        }
        for (name, bytes) in [("pass-empty", &b""[..]), ("pass-newline", b"\n"), ("pass-lines", b"a\nb\n")] {
            let path = file(dir.path(), name, bytes, 0o600);
            let err = KeySource::PassphraseFile(path).load(&no_prompt).unwrap_err();
            assert_eq!(err.code(), Code::KeyFormat, "{name}");
        }
        let empty = KeySource::Passphrase.load(&|_| LockedBuf::new(0)).unwrap_err();
        assert_eq!(empty.code(), Code::KeyFormat);
        for value in [&b""[..], &raw, b"0000000000000000000000000000000000000000000000000000000000000000"] {
            assert_eq!(decode_key(value, false, "env").unwrap_err().code(), Code::KeyFormat);
        }
    }

    /// THREAT_MODEL (f) row 43. A FIFO without a writer would block an ordinary open for ever.
    #[test]
    fn a_key_file_that_others_control_is_key_perms_and_nothing_blocks() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o644, 0o640, 0o604, 0o610, 0o601] {
            let path = file(dir.path(), "open", HEX.as_bytes(), mode);
            assert_eq!(load(&path).unwrap_err().code(), Code::KeyPerms, "{mode:o}");
        }
        let good = file(dir.path(), "good", HEX.as_bytes(), 0o400);
        load(&good).unwrap();
        let link = dir.path().join("link");
        symlink(&good, &link).unwrap();
        let fifo = dir.path().join("fifo");
        let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
        // SAFETY: a valid path of our own directory.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        for path in [link.as_path(), dir.path(), &fifo, Path::new("/dev/null")] {
            assert_eq!(load(path).unwrap_err().code(), Code::KeyPerms, "{}", path.display());
        }
        // Only root can give a file away.
        if std::os::unix::fs::chown(&good, Some(12_345), None).is_ok() {
            assert_eq!(load(&good).unwrap_err().code(), Code::KeyPerms);
        }
        assert_eq!(load(&dir.path().join("absent")).unwrap_err().code(), Code::Usage);
    }

    #[test]
    fn an_environment_key_is_read_once_and_named_when_missing() {
        let source = KeySource::Env("MODELFS_NO_SUCH_KEY".into());
        let err = source.load(&no_prompt).unwrap_err();
        assert_eq!(err.code(), Code::Usage);
        assert!(err.message().contains("MODELFS_NO_SUCH_KEY"));
    }

    #[test]
    fn a_passphrase_keeps_everything_but_its_last_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "p", " correct horse \n".as_bytes(), 0o600);
        match KeySource::PassphraseFile(path).load(&no_prompt).unwrap() {
            KeyMaterial::Passphrase(text) => assert_eq!(&text[..], b" correct horse "),
            other => panic!("{other:?}"),
        }
    }
}
