//! Who signs: from `--sign` and `--release` as typed to [`Signer`]s.
//!
//! In: words, each a key file or `vault-transit:MOUNT/KEY`. Out: signers, each key once. With no word: this user's own key.
//! Promises: a word that cannot sign fails before anything is written; no secret of a Vault key comes here.
//! Held by: the tests below, tests/signing.rs.

use std::path::Path;
use std::sync::Arc;

use super::Out;
use crate::config::Access;
use crate::error::{Error, Result};
use crate::format::limits::REF_SIGNATURES_MAX;
use crate::keys::{self, Signer, VaultSigner};
use crate::refuse;
use crate::vault::{TransitKey, Vault};

/// Publisher signatures that a command makes at most; readers look at those of the keys they trust only.
const PUBLISHERS_MAX: usize = 16;

/// Makes signers of words.
pub struct Signers<'a> {
    access: &'a Access,
}

impl<'a> Signers<'a> {
    pub fn new(access: &'a Access) -> Signers<'a> {
        Signers { access }
    }

    /// The signers that `--sign` names, 1 to 16; with no word this user's own key.
    ///
    /// # Errors
    /// `USAGE` (no own key yet, one key twice), those of a key file, those of Vault.
    pub fn publishers(&self, words: &[String]) -> Result<Vec<Arc<dyn Signer>>> {
        self.all(words, "--sign", PUBLISHERS_MAX)
    }

    /// As [`Signers::publishers`], but this user's own key is made if there is none: for the first seal.
    pub fn publishers_or_new(&self, words: &[String], out: &Out) -> Result<Vec<Arc<dyn Signer>>> {
        if !words.is_empty() {
            return self.publishers(words);
        }
        let path = keys::default_signing_key_path()?;
        let (signing, new) = keys::load_or_create_signing_key(&path)?;
        if new {
            out.hint(format!(
                "made a signing key in {}; keep a copy: only its owner can publish the next version",
                path.display()
            ));
        }
        Ok(vec![Arc::new(signing)])
    }

    /// The signers of a ref, 1 to 4, that `option` (`--release`, or `--sign` where only refs are signed) names; with no
    /// word this user's own key.
    pub fn releasers(&self, words: &[String], option: &str) -> Result<Vec<Arc<dyn Signer>>> {
        self.all(words, option, REF_SIGNATURES_MAX)
    }

    fn all(&self, words: &[String], option: &str, max: usize) -> Result<Vec<Arc<dyn Signer>>> {
        if words.len() > max {
            refuse!(Usage, "{option} is given {} times, at most {max} keys can sign", words.len());
        }
        if words.is_empty() {
            let path = keys::default_signing_key_path()?;
            let load = keys::load_signing_key(&path);
            let key =
                load.map_err(|e| e.context(format!("your own signing key is not usable; name one with {option}")))?;
            return Ok(vec![Arc::new(key)]);
        }
        let mut signers: Vec<Arc<dyn Signer>> = Vec::with_capacity(words.len());
        for word in words {
            let signer = self.one(word).map_err(|e: Error| e.context(format!("{option} {word}")))?;
            if signers.iter().any(|other| other.public() == signer.public()) {
                refuse!(Usage, "{option} {word} names a key that signs already: one key counts once");
            }
            signers.push(signer);
        }
        Ok(signers)
    }

    fn vault(&self) -> Result<&Vault> {
        let Some(vault) = &self.access.connected else {
            refuse!(Usage, "a signing key in Vault needs Vault; say where it is (vault-addr)");
        };
        Ok(vault)
    }

    fn one(&self, word: &str) -> Result<Arc<dyn Signer>> {
        if let Some(at) = word.strip_prefix("vault-transit:") {
            let Some((mount, key)) = at.rsplit_once('/').filter(|(mount, key)| !mount.is_empty() && !key.is_empty())
            else {
                refuse!(
                    Usage,
                    "a signing key in Vault is vault-transit:MOUNT/KEY, as in vault-transit:transit/publisher"
                );
            };
            let at = TransitKey { mount: mount.to_owned(), key: key.to_owned() };
            return Ok(Arc::new(VaultSigner::open(self.vault()?, at)?));
        }
        let path = word.strip_prefix("file:").unwrap_or(word);
        Ok(Arc::new(keys::load_signing_key(Path::new(path))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;
    use crate::error::Code;

    #[test]
    fn a_key_signs_once_and_too_many_keys_are_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let access = Access::from_layers(&Layers::default()).expect("nothing given");
        let signers = Signers::new(&access);
        let words: Vec<String> = (0..5)
            .map(|number| {
                let path = dir.path().join(number.to_string());
                keys::generate_signing_pair(&path).expect("a new pair");
                path.to_str().expect("a text path").to_string()
            })
            .collect();
        assert_eq!(signers.publishers(&words).expect("five").len(), 5);
        assert_eq!(signers.releasers(&words[..4], "--release").expect("four").len(), 4);
        assert_eq!(signers.releasers(&words, "--release").expect_err("five").code(), Code::Usage);
        let twice = [words[0].clone(), format!("file:{}", words[0])];
        assert_eq!(signers.publishers(&twice).expect_err("twice").code(), Code::Usage);
        let missing = signers.publishers(&["/nowhere/key".to_string()]).expect_err("not there");
        assert_eq!(missing.code(), Code::Usage);
        assert!(missing.chain().contains("--sign /nowhere/key"), "{missing:?}");
    }
}
