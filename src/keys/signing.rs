//! Key files: made once, never overwritten, read with the same care as any key.
//!
//! Promises: a secret file is created new with mode 0600 and reaches the disk before its path is told to anyone.
//! Held by: the tests below.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::source::{RECIPIENT_SECRET_PREFIX, decode_key, read_private_file};
use crate::crypto::{PublicKey, RecipientKey, RecipientSecret, SigningKey};
use crate::error::{Code, Error, Result};
use crate::mem::{LockedBuf, Secret};
use crate::refuse;
use crate::vault::{TransitKey, Vault};

/// Whoever signs manifests and refs: a key file read here, or a key service from which the key never comes.
pub trait Signer: Send + Sync + std::fmt::Debug {
    fn public(&self) -> PublicKey;

    /// The Ed25519 signature of a message of the format (at most 276 bytes). May ask a server: call it where blocking is
    /// allowed.
    ///
    /// # Errors
    /// What the service says; a signature that does not verify under [`Signer::public`] is never answered.
    fn sign(&self, message: &[u8]) -> Result<[u8; 64]>;
}

impl Signer for SigningKey {
    fn public(&self) -> PublicKey {
        SigningKey::public(self)
    }

    fn sign(&self, message: &[u8]) -> Result<[u8; 64]> {
        Ok(SigningKey::sign(self, message))
    }
}

/// An Ed25519 key of Vault's transit engine, which never leaves it.
pub struct VaultSigner {
    vault: Vault,
    at: TransitKey,
    public: PublicKey,
}

impl VaultSigner {
    /// Asks Vault for the public half, once.
    ///
    /// # Errors
    /// Vault's; `KEY_FORMAT` if what it holds there is no Ed25519 key anyone should trust.
    pub fn open(vault: &Vault, at: TransitKey) -> Result<VaultSigner> {
        let public = PublicKey::from_bytes(vault.transit_public_key(&at)?)
            .map_err(|e| e.context(format!("the public half of {at} in Vault is not usable")))?;
        Ok(VaultSigner { vault: vault.clone(), at, public })
    }
}

impl std::fmt::Debug for VaultSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VaultSigner({}, public {})", self.at, self.public)
    }
}

impl Signer for VaultSigner {
    fn public(&self) -> PublicKey {
        self.public
    }

    fn sign(&self, message: &[u8]) -> Result<[u8; 64]> {
        let signature = self.vault.transit_sign(&self.at, message)?;
        // A key that was rotated since, or an answer that is not Vault's: either way nobody could verify it.
        if !self.public.verify_strict(message, &signature) {
            refuse!(
                VaultAnswer,
                "what {} of Vault signed does not verify under {}; if the key was rotated just now, run again",
                self.at,
                self.public
            );
        }
        Ok(signature)
    }
}

/// A new random key in hex at `path`, for `--key file:PATH`.
///
/// # Errors
/// `USAGE` if something is there already: a key is never overwritten.
pub fn generate_key_file(path: &Path) -> Result<()> {
    write_secret(path, "", Secret::<32>::random().expose())
}

/// A new signing key: the seed at `path`, the public half at `path.pub`.
pub fn generate_signing_pair(path: &Path) -> Result<PublicKey> {
    let key = SigningKey::generate();
    // The public half first: a crash between the two leaves no secret whose public half nobody has.
    write_new(&public_path(path), format!("{}\n", key.public()).as_bytes(), 0o644)?;
    if let Err(err) = write_secret(path, "", key.seed()) {
        let _ = std::fs::remove_file(public_path(path));
        return Err(err);
    }
    Ok(key.public())
}

/// A new X25519 pair: the secret half at `path` for `--key x25519:PATH`, the public half at `path.pub` for
/// `--key recipient:PATH.pub`.
pub fn generate_recipient_pair(path: &Path) -> Result<RecipientKey> {
    let key = RecipientSecret::generate();
    write_new(&public_path(path), format!("{}\n", key.public()).as_bytes(), 0o644)?;
    if let Err(err) = write_secret(path, RECIPIENT_SECRET_PREFIX, key.seed()) {
        let _ = std::fs::remove_file(public_path(path));
        return Err(err);
    }
    Ok(key.public())
}

/// # Errors
/// `KEY_PERMS`, `KEY_FORMAT`, `USAGE` if it is not there.
pub fn load_signing_key(path: &Path) -> Result<SigningKey> {
    let (bytes, len) = read_private_file(path)?;
    Ok(SigningKey::from_seed(decode_key(&bytes[..len], true, &format!("signing key {}", path.display()))?))
}

/// The key of a publisher who never made one: made on first use. The flag says whether it is new.
pub fn load_or_create_signing_key(path: &Path) -> Result<(SigningKey, bool)> {
    if path.symlink_metadata().is_ok() {
        return Ok((load_signing_key(path)?, false));
    }
    if let Some(dir) = path.parent() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|err| Error::new(Code::Host, format!("cannot make {}", dir.display())).with_source(err))?;
    }
    match generate_signing_pair(path) {
        // Left by a first seal that was cut off, or somebody's public key that was put there: only its owner knows.
        Err(err) if err.code() == Code::Usage && !path.exists() && public_path(path).symlink_metadata().is_ok() => {
            Err(err.context(format!(
                "there is {} and no {}: to make a new pair, remove the .pub file if nobody needs it; if the secret half lies \
                 elsewhere, name it with --sign",
                public_path(path).display(),
                path.display()
            )))
        }
        Ok(_) => Ok((load_signing_key(path)?, true)),
        // Two first seals at once: the other one's key is as good.
        Err(err) if err.code() == Code::Usage && path.exists() => Ok((load_signing_key(path)?, false)),
        Err(err) => Err(err),
    }
}

/// `$XDG_CONFIG_HOME/modelfs/signing.key`, or below `~/.config`.
///
/// # Errors
/// `USAGE` if the environment names no home.
pub fn default_signing_key_path() -> Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")));
    let none = || Error::new(Code::Usage, "no HOME to keep a signing key in; name one with --sign FILE");
    Ok(config.ok_or_else(none)?.join("modelfs/signing.key"))
}

/// Where the public half of the signing key at `path` lies.
pub fn public_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

fn write_secret(path: &Path, prefix: &str, key: &[u8; 32]) -> Result<()> {
    let mut text = LockedBuf::new(prefix.len() + 65)?;
    let (head, digits) = text.split_at_mut(prefix.len());
    head.copy_from_slice(prefix.as_bytes());
    hex::encode_to_slice(key, &mut digits[..64]).expect("64 digits for 32 bytes");
    digits[64] = b'\n';
    write_new(path, &text, 0o600)
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let fault = |err: std::io::Error| {
        let code = match err.kind() {
            std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::NotFound => Code::Usage,
            _ => Code::Host,
        };
        let why = match err.kind() {
            std::io::ErrorKind::AlreadyExists => ", a key is never overwritten; name another place",
            _ => "",
        };
        Error::new(code, format!("cannot make the key file {}{why}", path.display())).with_source(err)
    };
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let open = OpenOptions::new().write(true).create_new(true).mode(mode).custom_flags(flags).open(path);
    let mut file = open.map_err(fault)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(fault)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(fault)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{KeyMaterial, KeySource, load_public_key};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_generated_key_file_is_private_loads_and_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        generate_key_file(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        let before = std::fs::read(&path).unwrap();
        let loaded = KeySource::File(path.clone()).load(&|_| unreachable!()).unwrap();
        assert!(matches!(loaded, KeyMaterial::Key(_)));
        assert_eq!(generate_key_file(&path).unwrap_err().code(), Code::Usage);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_recipient_pair_is_private_and_its_halves_belong_together() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server");
        let public = generate_recipient_pair(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        let load = |source: KeySource| source.load(&|_| unreachable!()).unwrap();
        assert!(matches!(load(KeySource::X25519(path.clone())), KeyMaterial::Private(key) if key.public() == public));
        let told = load(KeySource::RecipientFile(public_path(&path)));
        assert!(matches!(told, KeyMaterial::Recipient(key) if key == public));
        assert_eq!(generate_recipient_pair(&path).unwrap_err().code(), Code::Usage);
        assert_eq!(load_signing_key(&path).unwrap_err().code(), Code::KeyFormat, "it signs nothing");
    }

    #[test]
    fn a_signing_pair_signs_and_its_public_file_verifies() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/signing.key");
        let (key, new) = load_or_create_signing_key(&path).unwrap();
        assert!(new);
        let (again, new) = load_or_create_signing_key(&path).unwrap();
        assert!(!new);
        assert_eq!(key.public(), again.public());
        let public = load_public_key(dir.path().join("sub/signing.key.pub").to_str().unwrap()).unwrap();
        assert!(public.verify_strict(b"m", &again.sign(b"m")));
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        assert_eq!(path.parent().unwrap().metadata().unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_public_half_alone_is_not_replaced_and_who_runs_into_it_is_told_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("signing.key");
        std::fs::write(public_path(&path), b"somebody's").unwrap();
        let refused = load_or_create_signing_key(&path).unwrap_err();
        assert_eq!(refused.code(), Code::Usage);
        assert!(refused.message().contains("remove the .pub file"), "{refused:?}");
        assert_eq!(std::fs::read(public_path(&path)).unwrap(), b"somebody's");
        std::fs::remove_file(public_path(&path)).unwrap();
        assert!(load_or_create_signing_key(&path).unwrap().1);
    }

    #[test]
    fn a_signing_key_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        generate_signing_pair(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(load_signing_key(&path).unwrap_err().code(), Code::KeyPerms);
    }
}
