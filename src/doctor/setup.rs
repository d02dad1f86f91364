//! What somebody means to mount, as far as `doctor` was told: the layers of the configuration, a store, a mountpoint.
//!
//! In: a checked [`MountPlan`], or layers of which not even that is known. Out: a [`Setup`], with every file that it names.

use std::path::PathBuf;

use super::{Info, Machine, Said, Stops, Warning, fine, hint};
use crate::config::check::{self, About, Places};
use crate::config::options::{Use, takes};
use crate::config::oversight::{HttpPlan, Oversight};
use crate::config::rules::Level;
use crate::config::{Access, Layers, MountPlan};
use crate::crypto::Verify;
use crate::error::{Error, Result};
use crate::keys::{KeySource, usual_state_dir};
use crate::store::StoreUrl;
use crate::vault::AuthMethod;

/// See the module. Holds names and places, no secret.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Why the configuration cannot be used; then nothing else of it is known.
    pub refused: Option<Error>,
    /// What `modelfs config check` says of it. A plan that exists has nothing of the kind.
    pub wrong: Vec<check::Finding>,
    pub config_files: Vec<PathBuf>,
    pub store: Option<StoreUrl>,
    pub mountpoint: Option<PathBuf>,
    pub access: Option<Access>,
    /// Chunks are believed by their tags alone.
    pub tags_only: bool,
    /// The kernel is to serve no file by itself.
    pub no_passthrough: bool,
    pub policy: Option<PathBuf>,
    pub oversight: Oversight,
    pub state_dir: Option<PathBuf>,
    /// The program that runs.
    pub program: Option<PathBuf>,
    /// The mount was made by somebody else; we only serve it.
    pub given: bool,
    pub whole_root: WholeRoot,
    /// What is looked at is looked at to its end: what was not seen stops a strict start.
    pub thorough: bool,
}

/// Whether the root file system is looked at as a whole, for set-uid programs and for weights; else what lies beside our files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WholeRoot {
    #[default]
    Never,
    /// Where something tells that it came with an image.
    OfImage,
    Always,
}

/// Who may do what with a file that the configuration names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// For its owner alone.
    Secret,
    /// Projected by an orchestrator, for its group at most.
    Projected,
    /// For all to read, for its owner alone to write.
    Trusted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The option that names it.
    pub option: &'static str,
    pub path: PathBuf,
    pub needs: Needs,
}

impl Setup {
    /// What a mount will be made of. `plan.access` keeps the connection to Vault that is opened here: what it logs in with
    /// can be taken out of the environment only once.
    ///
    /// # Errors
    /// As [`crate::reading::connect`].
    pub fn of_mount(plan: &mut MountPlan, config_files: Vec<PathBuf>, whole_root: WholeRoot) -> Result<Setup> {
        crate::reading::connect(&mut plan.access)?;
        Ok(Setup {
            config_files,
            store: Some(plan.store.clone()),
            mountpoint: plan.given.is_none().then(|| plan.mountpoint.clone()),
            access: Some(plan.access.clone()),
            tags_only: plan.verify == Verify::Aead,
            no_passthrough: plan.no_passthrough,
            policy: plan.policy.clone(),
            state_dir: plan.access.trust.state_dir().ok(),
            oversight: plan.oversight.clone(),
            given: plan.given.is_some(),
            whole_root,
            ..Setup::of_process()
        })
    }

    /// What the layers say where nothing is mounted, of a store as typed and as read. A configuration that cannot be used is a
    /// finding.
    pub fn of_layers(
        layers: Result<Layers>,
        config_files: Vec<PathBuf>,
        store: Option<(&str, StoreUrl)>,
        mountpoint: Option<PathBuf>,
    ) -> Setup {
        // Before anything is opened: what a login takes out of the environment would be missed.
        let typed = store.as_ref().map(|(typed, _)| *typed);
        let wrong = layers.as_ref().map_or(Vec::new(), |layers| wrong(layers, typed, mountpoint.is_some()));
        let store = store.map(|(_, url)| url);
        let whole_root = WholeRoot::OfImage;
        let setup = Setup { wrong, config_files, store, mountpoint, whole_root, ..Setup::of_process() };
        let read = layers.and_then(|layers| {
            let mut access = Access::from_layers(&layers)?.anchored()?;
            let oversight = Oversight::from_layers(&layers)?;
            let tags_only = layers.parse("verify", |word| Ok(word == "aead"))?.unwrap_or(false);
            let no_passthrough = layers.switch("no-passthrough")?;
            let policy = layers.parse("policy", |path| Ok(PathBuf::from(path)))?;
            let state_dir = access.trust.state_dir().ok();
            crate::reading::connect(&mut access)?;
            Ok(Setup {
                access: Some(access),
                oversight,
                tags_only,
                no_passthrough,
                policy,
                state_dir,
                ..Setup::default()
            })
        });
        match read {
            Ok(Setup { access, oversight, tags_only, no_passthrough, policy, state_dir, .. }) => {
                Setup { access, oversight, tags_only, no_passthrough, policy, state_dir, ..setup }
            }
            Err(error) => Setup { refused: Some(error), ..setup },
        }
    }

    fn of_process() -> Setup {
        Setup {
            state_dir: usual_state_dir().ok(),
            // A link of the kernel's own: where the program really lies.
            program: std::fs::read_link("/proc/self/exe").ok().filter(|path| path.is_absolute()),
            ..Setup::default()
        }
    }

    /// Every file that decides who reads what, and with which secret.
    pub fn files(&self) -> Vec<Named> {
        let mut files: Vec<Named> = Vec::new();
        let mut add = |option, needs, path: Option<&PathBuf>| {
            files.extend(path.map(|path| Named { option, path: path.clone(), needs }));
        };
        // One that is refused is told of as that.
        for path in self.config_files.iter().filter(|_| self.refused.is_none()) {
            add("config", Needs::Trusted, Some(path));
        }
        if let Some(access) = &self.access {
            for source in &access.keys {
                match source {
                    KeySource::File(path) | KeySource::PassphraseFile(path) | KeySource::X25519(path) => {
                        add("key", Needs::Secret, Some(path));
                    }
                    KeySource::RecipientFile(path) => add("key", Needs::Trusted, Some(path)),
                    KeySource::Env(_)
                    | KeySource::Passphrase
                    | KeySource::Recipient(_)
                    | KeySource::VaultTransit { .. }
                    | KeySource::VaultKv { .. } => {}
                }
            }
            for word in &access.trust.keys {
                // What is no key in hex is the path of one.
                let is_hex = word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
                add("trust", Needs::Trusted, Some(&PathBuf::from(word)).filter(|_| !is_hex));
            }
            add("trust-file", Needs::Trusted, access.trust.file.as_ref());
            if let Some(vault) = &access.vault {
                add("vault-ca-cert", Needs::Trusted, vault.ca_cert.as_ref());
                add("vault-client-cert", Needs::Trusted, vault.client_cert.as_ref());
                add("vault-client-key", Needs::Secret, vault.client_key.as_ref());
                match &vault.auth {
                    AuthMethod::Token { file } => add("vault-token-file", Needs::Secret, file.as_ref()),
                    AuthMethod::AppRole { secret_id_file, .. } => {
                        add("vault-secret-id-file", Needs::Secret, secret_id_file.as_ref());
                    }
                    AuthMethod::Kubernetes { jwt_file, .. } | AuthMethod::Jwt { jwt_file, .. } => {
                        add("vault-jwt-file", Needs::Projected, Some(jwt_file));
                    }
                    AuthMethod::Userpass { password_file, .. } => {
                        add("vault-password-file", Needs::Secret, password_file.as_ref());
                    }
                    AuthMethod::Cert { .. } | AuthMethod::Aws { .. } => {}
                }
            }
        }
        add("policy", Needs::Trusted, self.policy.as_ref());
        add("audit-key", Needs::Secret, self.oversight.audit.key.as_ref());
        if let Some(HttpPlan::Tcp { cert, key, token, .. }) = &self.oversight.http {
            add("http-cert", Needs::Trusted, Some(cert));
            add("http-key", Needs::Secret, Some(key));
            add("http-token-file", Needs::Secret, Some(token));
        }
        add("alert-webhook-file", Needs::Secret, self.oversight.alerts.webhook_file.as_ref());
        files
    }
}

/// What `modelfs config check` finds and no rule of ours does. What `mounted` has is its own: only its daemon knows with which key
/// and whose trust it was made.
fn wrong(layers: &Layers, store: Option<&str>, mounted: bool) -> Vec<check::Finding> {
    let places = Places { store, mountpoint: None };
    let mut found = check::findings(layers, Vec::new(), takes::MOUNT, places, || Ok(()));
    found.retain(|finding| match finding.about {
        About::Said | About::File(Use::Written | Use::Folder) => true,
        // `secret-files` and `trusted-files` look at these, and say which command mends them.
        About::File(Use::Read | Use::Secret) => false,
        About::Unsaid => !mounted,
    });
    found
}

pub(super) fn configuration(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a configuration that a mount takes: readable, without contradiction, with a key and a signer";
    let setup = machine.facts.setup.as_ref()?;
    // What is not said yet may still be said by the flags of a mount; with a store this is that mount.
    let stops = |finding: &&check::Finding| {
        finding.level == Level::Refused && (finding.about != About::Unsaid || setup.store.is_some())
    };
    let text = |finding: &check::Finding| finding.text.clone();
    let (refused, told): (Vec<_>, Vec<_>) = setup.wrong.iter().partition(stops);
    let mut refused: Vec<String> = refused.into_iter().map(text).collect();
    if let Some(error) = &setup.refused {
        let chain = error.chain();
        if !refused.iter().any(|known| chain.contains(known)) {
            refused.push(chain);
        }
    }
    if !refused.is_empty() {
        return hint(Stops, refused.join("; "), WANTED, "modelfs config check");
    }
    if !told.is_empty() {
        let told: Vec<String> = told.into_iter().map(text).collect();
        return hint(Info, told.join("; "), WANTED, "modelfs config check");
    }
    match setup.config_files.as_slice() {
        [] => fine("no file; the rest is flags and environment", WANTED),
        files => {
            let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
            fine(names.join(", "), WANTED)
        }
    }
}

pub(super) fn trust(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "signing keys that are named";
    let access = machine.facts.setup.as_ref()?.access.as_ref()?;
    if access.trust.on_first_use {
        let fix = "--trust PUBKEY instead of --trust-on-first-use";
        return hint(Warning, "whoever signed first is believed", WANTED, fix);
    }
    match (access.trust.keys.len(), &access.trust.file, &access.manifest) {
        (0, None, None) => None,
        (0, None, Some(_)) => fine("one version, by its digest", WANTED),
        (keys, None, _) => fine(format!("{keys} key(s)"), WANTED),
        (keys, Some(file), _) => fine(format!("{keys} key(s) and {}", file.display()), WANTED),
    }
}

pub(super) fn verify(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "every chunk held against the signed hash";
    let setup = machine.facts.setup.as_ref().filter(|setup| setup.refused.is_none())?;
    match setup.tags_only {
        false => fine("strict", WANTED),
        true => {
            let seen = "chunks are checked by their tags alone, which every holder of the key can make";
            hint(Warning, seen, WANTED, "--verify strict")
        }
    }
}
