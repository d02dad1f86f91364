//! From what was meant to an open model: the store, the version that may be believed, its keys. The one place where every
//! command and the daemon meet `keys` and `crypto`.
//!
//! In: a store and an [`Access`] (keys, trust, pins). Out: a manifest and its keys, or the refusal with its code.
//! Promises: nothing is opened that is not signed by whom the user trusts, or pinned by digest; what was seen is remembered
//! before it is used; keys are read once, whatever the number of models.
//! Not here: what trust and floors are (`keys`), what is done with an open model (`daemon`, `cli`).

use std::path::PathBuf;
use std::sync::Arc;

use crate::config::Access;
use crate::crypto::{ModelKeys, PublicKey};
use crate::error::Result;
use crate::format::{Manifest, ManifestDigest};
use crate::keys::{
    FloorPolicy, FloorStore, Glob, Keyring, KvFloor, ModelSelector, Prompt, Resolved, Resolver, Roles, Tofu, Trust,
    VaultKv, Wanted, prompt_terminal, unix_now,
};
use crate::refuse;
use crate::store::{self, ChunkSink, LeasedCredentials, StoreUrl};
use crate::vault::{AwsRole, Vault};
use crate::versions;

/// What this machine remembers of channels, and the pin beside it where the layers name one.
///
/// # Errors
/// `USAGE` for a pin without the service that it lies in: a floor that was asked for is never left out silently.
pub fn floors(access: &Access, vault: Option<&Vault>) -> Result<FloorStore> {
    let local = FloorStore::new(&access.trust.state_dir()?);
    match (&access.trust.floor, vault) {
        (None, _) => Ok(local),
        (Some(at), None) => {
            refuse!(Usage, "floor vault-kv:{}/{} needs Vault; say where it is (vault-addr)", at.mount, at.path)
        }
        (Some(at), Some(vault)) => {
            let pin = KvFloor::new(VaultKv::new(vault.clone(), &at.mount), &at.path);
            Ok(local.pinned(Arc::new(pin), access.trust.require_floor))
        }
    }
}

/// A store and everything that decides which of its models may be read.
pub struct Reading {
    pub url: StoreUrl,
    pub store: Arc<dyn ChunkSink>,
    pub access: Access,
    /// Asked for nothing until a key or a floor needs it.
    pub vault: Option<Vault>,
    trust: Trust,
    first_use: Option<Tofu>,
    floors: FloorStore,
    keyring: Keyring<'static>,
}

/// Opens the Vault that was named, once for a process, and lets the store sign with credentials from it where that was
/// asked for. Asks nothing yet; whoever holds `access` or a copy of it afterwards shares both.
///
/// # Errors
/// `USAGE` for storage credentials from a Vault that was not named, and for settings of Vault that cannot be used.
pub fn connect(access: &mut Access) -> Result<Option<Vault>> {
    if access.connected.is_none() {
        access.connected = access.vault.as_ref().map(Vault::open).transpose()?;
        if let Some(vault) = &access.connected {
            vault.report_to(access.store.telemetry.clone());
        }
    }
    if let (Some(from), None) = (&access.s3_credentials, &access.store.credentials) {
        let Some(vault) = &access.connected else {
            refuse!(Usage, "s3-credentials come from Vault; say where that is with --vault-addr or VAULT_ADDR");
        };
        let issuer = AwsRole::new(vault.clone(), &from.mount, &from.role);
        let lend =
            if vault.settings().lock_on_loss { LeasedCredentials::lost_when_revoked } else { LeasedCredentials::new };
        let leased = lend(Box::new(issuer), access.store.telemetry.clone());
        access.store.credentials = Some(Arc::new(leased));
    }
    Ok(access.connected.clone())
}

impl Reading {
    /// # Errors
    /// `USAGE` for a trust file or key that cannot be read; what opening the store answers. Nothing is asked of the store.
    pub fn new(url: StoreUrl, access: Access) -> Result<Reading> {
        Reading::with_prompt(url, access, &prompt_terminal)
    }

    /// The same where nobody sits at this process's terminal: `prompt` is asked for passphrases.
    pub fn with_prompt(url: StoreUrl, mut access: Access, prompt: Prompt<'static>) -> Result<Reading> {
        let vault = connect(&mut access)?;
        let store = store::open(&url, &access.store)?;
        let state = access.trust.state_dir()?;
        let trust_file: Option<PathBuf> = access.trust.file.clone();
        let trust = Trust::gather(&access.trust.keys, trust_file.as_deref())?;
        let keyring = Keyring::new(&access.keys, prompt).with_vault(vault.clone())?.allow_labels(&access.slot_labels);
        keyring.take_environment()?;
        Ok(Reading {
            trust,
            first_use: access.trust.on_first_use.then(|| Tofu::new(&state)),
            floors: floors(&access, vault.as_ref())?,
            keyring,
            url,
            store,
            access,
            vault,
        })
    }

    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Believes a key of the user's own, whatever the layers say of others.
    pub fn trust_own(&mut self, key: PublicKey, roles: Roles) {
        self.trust.add(Glob::new("*").expect("a pattern"), key, roles);
    }

    pub fn floors(&self) -> &FloorStore {
        &self.floors
    }

    pub fn resolver(&self) -> Resolver<'_> {
        self.resolver_under(&self.trust)
    }

    fn resolver_under<'a>(&'a self, trust: &'a Trust) -> Resolver<'a> {
        Resolver {
            source: &*self.store,
            trust,
            first_use: self.first_use.as_ref(),
            floors: Some(&self.floors),
            policy: FloorPolicy {
                require_floor: self.access.trust.require_floor,
                min_ref_seq: self.access.trust.min_ref_seq,
                ..FloorPolicy::default()
            },
            now: unix_now,
        }
    }

    /// The models of the store that tell their names, sorted.
    pub async fn model_names(&self) -> Result<Vec<String>> {
        self.resolver().model_names().await
    }

    /// The version that `selector` names, once signatures, floor and digests hold; what is noteworthy is logged. With
    /// `@best:` the keys are used, and a passphrase may be asked for.
    pub async fn resolve(&self, selector: &str) -> Result<Resolved> {
        self.resolve_under(&self.trust, selector).await
    }

    /// As [`Reading::resolve`], but one trusted publisher is enough: what `sign` may add a signature to.
    pub async fn resolve_below_threshold(&self, selector: &str) -> Result<Resolved> {
        self.resolve_under(&self.trust.with_one_publisher(), selector).await
    }

    async fn resolve_under(&self, trust: &Trust, selector: &str) -> Result<Resolved> {
        let selector: ModelSelector = selector.parse()?;
        let resolved = match &selector.wanted {
            Wanted::Best { metric, aim } => {
                if self.access.manifest.is_some() {
                    refuse!(
                        Usage,
                        "--manifest already says which version; write {} instead of {selector}",
                        selector.name
                    );
                }
                self.access.need_keys()?;
                let open = |version: &Resolved| Ok(version.open(&self.keyring)?.0);
                let best = versions::best_of(&self.resolver_under(trust), &selector.name, metric, *aim, &open).await?;
                let (version, of) = (best.resolved.header.seq, best.compared);
                tracing::info!(model = %selector.name, version, of, "{metric} is {}, the best", best.value);
                best.resolved
            }
            Wanted::Newest | Wanted::Version(_) | Wanted::Tag(_) => {
                self.resolver_under(trust).resolve(&selector, self.access.manifest).await?
            }
        };
        for note in &resolved.notes {
            tracing::warn!(model = %resolved.name, "{}", note.text());
        }
        Ok(resolved)
    }

    /// The very version that was opened before, whatever the refs say by now.
    pub async fn resolve_digest(&self, name: &str, digest: ManifestDigest) -> Result<Resolved> {
        let selector: ModelSelector = name.parse()?;
        self.resolver().resolve(&selector, Some(digest)).await
    }

    /// Its file list and keys. May ask for a passphrase, may take seconds of key derivation.
    ///
    /// # Errors
    /// `USAGE` if no key was given, `NO_KEY` if none opens it.
    pub fn unlock(&self, resolved: &Resolved) -> Result<(Manifest, ModelKeys)> {
        self.access.need_keys()?;
        resolved.open(&self.keyring)
    }
}
