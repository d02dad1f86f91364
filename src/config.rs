//! What the user meant: defaults < file < environment < flags, checked as a whole before anything starts.
//!
//! In: [`Layers`] (what each place said). Out: one [`MountPlan`] or [`Access`], or an error that names the place and
//! the fix.
//! Promises: the only reader of the environment, secrets excepted (`keys` takes and wipes those); a plan that exists has
//! no contradiction in it.
//! Not here: what a key source or a trusted key is (`keys`), what flags look like (`cli`).
//! Held by: the tests below, tests/cli.rs.

pub mod check;
pub mod env_file;
pub mod layers;
pub mod names;
pub mod options;
pub mod oversight;
pub mod rules;
mod vault;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use layers::Layers;
pub use oversight::Oversight;
use rules::Said;

use crate::crypto::Verify;
use crate::error::{Code, Error, Result};
use crate::format::{ManifestDigest, check_label};
use crate::fuse::OpenPolicy;
use crate::fuse::inherited::{self, Given};
use crate::keys::{KeySource, ModelSelector, usual_state_dir};
use crate::mounts;
use crate::policy::types::DeniedType;
use crate::processes::Pod;
use crate::refuse;
use crate::seal::CodecChoice;
use crate::store::limit::{BYTES_PER_S_MIN, RequestRate};
use crate::store::{OriginLimits, StoreOptions, StoreUrl};
use crate::units;
use crate::vault::{Vault, VaultSettings};

/// One chunk that waits, one that is opened, for two readers: less than this cannot serve.
pub(crate) const CACHE_BYTES_MIN: u64 = 64 << 20;
/// The shortest idle limit.
const IDLE_MIN: Duration = Duration::from_secs(1);
/// The longest time that an open of a locked model may wait: whoever waits cannot be killed.
const LOCKED_OPENS_MAX: Duration = Duration::from_secs(600);
/// `--require all`.
const REQUIRE_ALL: &str = "all";
/// Longer than a loader takes from one file to the next.
const RETIRE_AFTER: Duration = Duration::from_secs(60);
/// Whom to believe, as given; `keys::trust` turns it into keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustPlan {
    /// Public keys in hex, or paths of `.pub` files.
    pub keys: Vec<String>,
    pub file: Option<PathBuf>,
    pub on_first_use: bool,
    pub require_floor: bool,
    /// No ref below this number is believed, whatever is remembered; 0 is none.
    pub min_ref_seq: u64,
    /// Where the floor is kept a second time, outside this machine.
    pub floor: Option<FloorAt>,
    /// Where this machine keeps it, and what first uses believed; `None`: the usual place.
    pub state_dir: Option<PathBuf>,
}

impl TrustPlan {
    /// # Errors
    /// `USAGE` if nothing names a place.
    pub fn state_dir(&self) -> Result<PathBuf> {
        self.state_dir.clone().map_or_else(usual_state_dir, Ok)
    }
}

/// Where this machine remembers versions and first uses.
///
/// # Errors
/// `USAGE` if neither the layers nor the environment names a place.
pub fn state_dir(layers: &Layers) -> Result<PathBuf> {
    layers.parse("state-dir", parse_state_dir)?.map_or_else(usual_state_dir, Ok)
}

/// `vault-kv:MOUNT/PATH`: floors are entries below PATH of a KV v2 engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FloorAt {
    pub mount: String,
    pub path: String,
}

impl std::str::FromStr for FloorAt {
    type Err = Error;

    fn from_str(text: &str) -> Result<FloorAt> {
        let legal = |part: &str| {
            !part.is_empty() && part.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c)) && part != ".."
        };
        let parts = text.strip_prefix("vault-kv:").and_then(|rest| rest.split_once('/'));
        match parts {
            Some((mount, path)) if legal(mount) && path.split('/').all(legal) => {
                Ok(FloorAt { mount: mount.into(), path: path.into() })
            }
            Some(_) | None => {
                refuse!(
                    Usage,
                    "`{text}` is no place for floors; write vault-kv:MOUNT/PATH, as in vault-kv:secret/modelfs/floor"
                )
            }
        }
    }
}

/// Everything a command needs to read a model, whichever command it is.
#[derive(Debug, Clone)]
pub struct Access {
    /// In the order they are tried. Empty: none given and none in the environment.
    pub keys: Vec<KeySource>,
    /// The slots that these keys are tried on, by label. Empty: all.
    pub slot_labels: Vec<String>,
    pub trust: TrustPlan,
    /// `--manifest`: this version and no other; no ref is consulted.
    pub manifest: Option<ManifestDigest>,
    pub store: StoreOptions,
    /// `None`: no Vault was named.
    pub vault: Option<VaultSettings>,
    /// Storage credentials from Vault, instead of those of the environment.
    pub s3_credentials: Option<VaultAwsRole>,
    /// That Vault, once [`crate::reading::connect`] has opened it: secrets of the login can be taken only once.
    pub connected: Option<Vault>,
}

impl Access {
    pub fn from_layers(layers: &Layers) -> Result<Access> {
        let keys = keys(layers)?;
        let trust = TrustPlan {
            keys: layers.parse_all("trust", |text| Ok(text.to_string()))?,
            file: layers.parse("trust-file", |text| Ok(PathBuf::from(text)))?,
            on_first_use: layers.switch("trust-on-first-use")?,
            require_floor: layers.switch("require-floor")?,
            min_ref_seq: layers.parse("min-ref-seq", parse_ref_seq)?.unwrap_or(0),
            floor: layers.parse("floor", str::parse)?,
            state_dir: layers.parse("state-dir", parse_state_dir)?,
        };
        layers::refuse_all(layers.wrong())?;
        rules::refuse(&Said::of_process(layers), options::takes::READS)?;
        Ok(Access {
            keys,
            slot_labels: layers.parse_all("slot-label", parse_slot_label)?,
            trust,
            manifest: layers.parse("manifest", parse_digest)?,
            store: store_options(layers)?,
            vault: vault::vault_settings(layers)?,
            s3_credentials: layers.parse("s3-credentials", str::parse)?,
            connected: None,
        })
    }

    /// The same wherever the process works: a daemon works in `/`, and reads keys and trust again to unlock.
    pub fn anchored(mut self) -> Result<Access> {
        for source in &mut self.keys {
            if let KeySource::File(path) | KeySource::PassphraseFile(path) | KeySource::X25519(path) = source {
                *path = absolute(path)?;
            }
        }
        for key in &mut self.trust.keys {
            // What is no key in hex is the path of one.
            let is_hex = key.len() == 64 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
            if !is_hex && let Some(path) = absolute(Path::new(key.as_str()))?.to_str() {
                *key = path.to_string();
            }
        }
        if let Some(file) = &mut self.trust.file {
            *file = absolute(file)?;
        }
        Ok(self)
    }

    /// # Errors
    /// `Usage` naming how to give a key, if there is none.
    pub fn need_keys(&self) -> Result<()> {
        if self.keys.is_empty() { Err(no_key()) } else { Ok(()) }
    }
}

fn keys(layers: &Layers) -> Result<Vec<KeySource>> {
    let keys: Vec<KeySource> = layers.parse_all("key", str::parse)?;
    Ok(if keys.is_empty() { KeySource::env_defaults() } else { keys })
}

fn need_keys(layers: &Layers) -> Result<()> {
    if keys(layers)?.is_empty() { Err(no_key()) } else { Ok(()) }
}

/// Somebody whose signature is believed, or the digest of a version that needs none.
///
/// # Errors
/// `Usage` naming the ways to say it. The mount itself ends with `NO_KEY`, once no model of the store is vouched for.
fn need_signer(layers: &Layers) -> Result<()> {
    let said = |name| layers.get(name).is_some_and(|setting| !setting.values.is_empty());
    if ["trust", "trust-file", "manifest"].into_iter().any(said) || layers.switch("trust-on-first-use")? {
        return Ok(());
    }
    refuse!(
        Usage,
        "no signer is trusted; add --trust PUBKEY or --trust-file FILE, or --manifest DIGEST for one version"
    )
}

fn no_key() -> Error {
    Error::new(Code::Usage, "no key given; add --key file:PATH, --key env:VAR or --key passphrase, or set MODELFS_KEY")
}

/// The checked configuration of one mount.
#[derive(Debug, Clone)]
pub struct MountPlan {
    pub store: StoreUrl,
    /// What the mount table shows as the source: no secret can be in it.
    pub source: String,
    /// Absolute, without links: as the kernel will know it, and as the control socket is named.
    pub mountpoint: PathBuf,
    /// The mountpoint was a descriptor: somebody else has mounted, we only serve.
    pub given: Option<Given>,
    /// Selectors as typed (`NAME`, `NAME@TAG`, `NAME@7`). Empty: every model of the store.
    pub models: Vec<String>,
    pub access: Access,
    pub verify: Verify,
    /// Most plaintext in locked memory.
    pub cache_bytes: u64,
    pub open: OpenPolicy,
    /// Where the order of reads of earlier loads is kept, for prefetching.
    pub profile: Option<PathBuf>,
    /// Cold reads bypass the page cache, so that no second copy of plaintext lies in unlocked memory.
    pub no_page_cache: bool,
    /// Every read is answered by the daemon.
    pub no_passthrough: bool,
    /// Models that must be usable before the mount is ready; others may fail with a warning. `all` is every one.
    pub require: Vec<String>,
    /// How long the start waits for a store that does not answer; `None`: as long as a service manager lets it, else not.
    pub ready_timeout: Option<Duration>,
    /// `NAME/SEQ/` and `NAME/current` instead of `NAME/`, and reload.
    pub versions: bool,
    /// With `versions`: how long a version that is not current stays after its last use.
    pub retire_after: Duration,
    pub allow_other: bool,
    /// Owner of every file; the mounting user by default.
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Taken from 0555 and 0444.
    pub umask: Option<u32>,
    /// Detach when ready.
    pub daemon: bool,
    pub log_file: Option<PathBuf>,
    /// What becomes of the mount when whoever lends the keys takes them back.
    pub on_key_loss: OnKeyLoss,
    /// How long an open of a locked model waits for it to be unlocked; `None`: not at all.
    pub locked_opens: Option<Duration>,
    /// Lock everything once no file was open or read for so long.
    pub lock_when_idle: Option<Duration>,
    /// Of a pod's mount: `NAMESPACE/NAME`. Said by the driver, by no option.
    pub service_account: Option<String>,
    /// Of a pod's mount: that pod. Said by the driver, by no option.
    pub pod: Option<Pod>,
    /// What is most likely not what was meant; told by whoever is asked for this mount and no other.
    pub doubts: Vec<String>,
    /// Who may see and read which model; `None`: modes and owner alone say so.
    pub policy: Option<PathBuf>,
    /// No model of more plain bytes is mounted.
    pub max_model_size: Option<u64>,
    /// No model that holds a file of one of these types is mounted.
    pub deny_types: Vec<DeniedType>,
    /// Of the process. A host of many mounts has its own.
    pub oversight: Oversight,
}

/// The largest model that is sealed or mounted.
pub fn max_model_size(layers: &Layers) -> Result<Option<u64>> {
    layers.parse("max-model-size", parse_model_size)
}

fn parse_model_size(text: &str) -> Result<u64> {
    match units::parse_size(text)? {
        0 => refuse!(Usage, "max-model-size 0 lets no model in; leave it out for no limit"),
        bytes => Ok(bytes),
    }
}

/// Types of files that are neither sealed nor mounted.
pub fn deny_types(layers: &Layers) -> Result<Vec<DeniedType>> {
    layers.parse_all("deny-types", str::parse)
}

/// When a token or lease through which keys came is revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnKeyLoss {
    /// What is open goes on.
    #[default]
    Keep,
    /// As `modelfs lock`.
    Lock,
}

fn parse_on_key_loss(text: &str) -> Result<OnKeyLoss> {
    match text {
        "keep" => Ok(OnKeyLoss::Keep),
        "lock" => Ok(OnKeyLoss::Lock),
        other => Err(Error::new(Code::Usage, format!("on-key-loss `{other}` is neither keep nor lock"))),
    }
}

/// `None`: an open of a locked model fails at once.
fn parse_locked_opens(text: &str) -> Result<Option<Duration>> {
    if text == "fail" {
        return Ok(None);
    }
    let wait = units::parse_duration(text)?;
    if wait.is_zero() || wait > LOCKED_OPENS_MAX {
        refuse!(
            Usage,
            "locked-opens is fail, or a time of at most {} s: whoever waits cannot be killed",
            LOCKED_OPENS_MAX.as_secs()
        );
    }
    Ok(Some(wait))
}

fn parse_idle(text: &str) -> Result<Duration> {
    let limit = units::parse_duration(text)?;
    if limit < IDLE_MIN {
        refuse!(Usage, "an idle limit of {limit:?} locks between two reads; give at least {} s", IDLE_MIN.as_secs());
    }
    Ok(limit)
}

impl MountPlan {
    /// Checks everything that can be known without the store.
    pub fn from_layers(layers: &Layers, store: &str, mountpoint: &Path, daemon: bool) -> Result<MountPlan> {
        let store = layers.store(store)?;
        let given = inherited::number_in(mountpoint).map(Given::take).transpose()?;
        let mut plan = MountPlan {
            source: store.to_string(),
            store,
            mountpoint: given.as_ref().map_or_else(|| check_mountpoint(mountpoint), |given| Ok(given.name()))?,
            models: layers.parse_all("model", parse_selector)?,
            access: Access::from_layers(layers)?.anchored()?,
            verify: layers.parse("verify", parse_verify)?.unwrap_or(Verify::Strict),
            cache_bytes: layers.parse("cache", parse_cache)?.unwrap_or_else(default_cache_bytes),
            open: layers.parse("open", str::parse)?.unwrap_or_default(),
            profile: layers.parse("profile", parse_path)?,
            no_page_cache: layers.switch("no-page-cache")?,
            no_passthrough: layers.switch("no-passthrough")?,
            require: layers.parse_all("require", parse_selector)?,
            ready_timeout: layers.parse("ready-timeout", units::parse_duration)?,
            versions: layers.switch("versions")?,
            retire_after: layers.parse("retire-after", units::parse_duration)?.unwrap_or(RETIRE_AFTER),
            allow_other: layers.switch("allow-other")?
                || given.as_ref().is_some_and(|it| it.lets_others_in() == Some(true)),
            given,
            uid: layers.parse("uid", parse_id)?,
            gid: layers.parse("gid", parse_id)?,
            umask: layers.parse("umask", units::parse_octal)?,
            daemon,
            log_file: layers.parse("log-file", |text| Ok(PathBuf::from(text)))?,
            on_key_loss: layers.parse("on-key-loss", parse_on_key_loss)?.unwrap_or_default(),
            lock_when_idle: layers.parse("lock-when-idle", parse_idle)?,
            locked_opens: layers.parse("locked-opens", parse_locked_opens)?.flatten(),
            service_account: None,
            pod: None,
            doubts: Vec::new(),
            policy: layers.parse("policy", parse_path)?,
            max_model_size: max_model_size(layers)?,
            deny_types: deny_types(layers)?,
            oversight: Oversight::from_layers(layers)?,
        };
        plan.check()?;
        let said = Said {
            layers,
            store: Some(&plan.store),
            mountpoint: plan.given.is_none().then_some(&plan.mountpoint),
            lets_others_in: plan.allow_other,
        };
        plan.doubts = rules::refuse(&said, options::takes::MOUNT)?;
        Ok(plan)
    }

    /// Whether every model of the mount must be usable.
    pub fn requires_all(&self) -> bool {
        self.require.iter().any(|model| model == REQUIRE_ALL)
    }

    /// Whether the mount must not be without this one.
    pub fn requires(&self, selector: &str) -> bool {
        self.requires_all() || self.require.iter().any(|model| model == selector)
    }

    fn check(&self) -> Result<()> {
        // The records of a catalog bring their keys.
        if !matches!(self.store, StoreUrl::VaultKv { .. }) {
            self.access.need_keys()?;
        }
        self.given.as_ref().map_or(Ok(()), |given| self.check_given(given))
    }
}

impl MountPlan {
    /// What whoever mounted decided must be what this plan says.
    fn check_given(&self, given: &Given) -> Result<()> {
        const READ_BY_ALL: u32 = 0o555;
        if self.allow_other && given.lets_others_in() == Some(false) {
            refuse!(
                Usage,
                "allow-other: {} was mounted without it; mount with -o allow_other",
                self.mountpoint.display()
            );
        }
        // Then nobody asks whether owner and modes let a reader in: only a mount that hides nothing may be served so.
        let hides = self.umask.is_none_or(|umask| umask & READ_BY_ALL != 0);
        if self.allow_other && !given.checks_modes() && hides {
            refuse!(
                Usage,
                "{} lets other users in and does not check modes (or is out of our sight); mount it with -o \
                 default_permissions, or let everyone read with umask=0222",
                self.mountpoint.display()
            );
        }
        Ok(())
    }
}

/// A local store by its absolute path: a daemon works in `/`, and a hint must be right in every folder.
pub fn parse_store(text: &str) -> Result<StoreUrl> {
    match text.parse()? {
        StoreUrl::Local(path) => Ok(StoreUrl::Local(absolute(&path)?)),
        other @ (StoreUrl::S3 { .. } | StoreUrl::VaultKv { .. }) => Ok(other),
    }
}

/// From one folder to the next a relative one would be another, in which nothing is remembered.
fn parse_state_dir(text: &str) -> Result<PathBuf> {
    match Path::new(text).is_absolute() {
        true => Ok(text.into()),
        false => refuse!(Usage, "`{text}` is not an absolute path"),
    }
}

fn parse_path(text: &str) -> Result<PathBuf> {
    absolute(Path::new(text))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Error::new(Code::Usage, format!("`{}` is not a path", path.display())).with_source(e))
}

/// A selector without its `@VERSION` or `@TAG`.
pub fn bare(selector: &str) -> &str {
    selector.rsplit_once('@').map_or(selector, |(name, _)| name)
}

fn parse_selector(text: &str) -> Result<String> {
    if text.ends_with('@') {
        refuse!(Usage, "model `{text}` ends in @; write NAME, NAME@TAG or NAME@VERSION");
    }
    text.parse::<ModelSelector>()?;
    Ok(text.to_string())
}

pub fn parse_digest(text: &str) -> Result<ManifestDigest> {
    text.strip_prefix("sha256:").and_then(ManifestDigest::from_hex).ok_or_else(|| {
        Error::new(Code::Usage, "a manifest digest is sha256: and 64 hex digits, as `modelfs seal` prints it")
    })
}

fn parse_slot_label(text: &str) -> Result<String> {
    // A label of a store that is none is an attack; here it is a slip.
    check_label(text.as_bytes()).map(ToOwned::to_owned).map_err(|e| Error::new(Code::Usage, e.message().to_owned()))
}

fn parse_ref_seq(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::new(Code::Usage, format!("`{text}` is not the number of a ref")))
}

fn parse_verify(text: &str) -> Result<Verify> {
    match text {
        "strict" => Ok(Verify::Strict),
        "aead" => Ok(Verify::Aead),
        other => Err(Error::new(Code::Usage, format!("verify mode `{other}` is neither strict nor aead"))),
    }
}

fn parse_cache(text: &str) -> Result<u64> {
    let bytes = units::parse_size(text)?;
    if bytes < CACHE_BYTES_MIN {
        refuse!(
            Usage,
            "a cache of {} cannot serve; give at least {}",
            units::show_size(bytes),
            units::show_size(CACHE_BYTES_MIN)
        );
    }
    Ok(bytes)
}

fn parse_id(text: &str) -> Result<u32> {
    text.parse().map_err(|_| Error::new(Code::Usage, format!("`{text}` is not a numeric id between 0 and 4294967295")))
}

/// An existing folder, absolute and without links.
fn check_mountpoint(path: &Path) -> Result<PathBuf> {
    let canonical = crate::mounts::canonical(path)?;
    match std::fs::symlink_metadata(&canonical) {
        Ok(meta) if meta.is_dir() => Ok(canonical),
        Ok(_) => Err(Error::new(Code::MountPoint, format!("mountpoint {} is not a folder", path.display()))),
        // What a killed daemon of ours left; mounting clears it (`fuse::attach`).
        Err(e) if mounts::is_of_dead(&e) && mounts::at(&canonical)?.is_some_and(|mount| mount.is_ours()) => {
            Ok(canonical)
        }
        Err(e) if mounts::is_of_dead(&e) => Err(Error::new(
            Code::MountPoint,
            format!("a dead mount that is not ours lies on {0}; run `umount -l {0}` first", path.display()),
        )),
        Err(e) => {
            Err(Error::new(Code::MountPoint, format!("mountpoint {} cannot be used", path.display())).with_source(e))
        }
    }
}

/// Most plaintext in locked memory, for a process that has many mounts.
pub fn cache_bytes(layers: &Layers) -> Result<u64> {
    Ok(layers.parse("cache", parse_cache)?.unwrap_or_else(default_cache_bytes))
}

/// Half of what the machine or the container can still give.
pub(crate) fn default_cache_bytes() -> u64 {
    let free = proc_kib("/proc/meminfo", "MemAvailable:").unwrap_or(2 << 30);
    let ceiling = crate::mem::memory_ceiling().unwrap_or(u64::MAX);
    (free.min(ceiling) / 2).max(CACHE_BYTES_MIN) & !((2 << 20) - 1)
}

fn proc_kib(file: &str, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn store_options(layers: &Layers) -> Result<StoreOptions> {
    let mut options = StoreOptions::default();
    if let Some(budget) = layers.parse("fetch-budget", units::parse_duration)? {
        options.patience.budget = budget;
    }
    if let Some(attempt) = layers.parse("fetch-timeout", units::parse_duration)? {
        options.patience.attempt = attempt;
    } else {
        options.patience.attempt = options.patience.attempt.min(options.patience.budget);
    }
    let (attempt, budget) = (options.patience.attempt, options.patience.budget);
    if attempt.is_zero() || budget < attempt {
        refuse!(
            Usage,
            "fetch-timeout {attempt:?} does not fit into fetch-budget {budget:?}; raise the budget or lower the timeout"
        );
    }
    if let Some(endpoint) = layers.parse("s3-endpoint", |text| Ok(text.to_string()))? {
        options.aws.push(("AWS_ENDPOINT_URL".into(), endpoint));
    }
    if let Some(region) = layers.parse("s3-region", |text| Ok(text.to_string()))? {
        options.aws.push(("AWS_REGION".into(), region));
    }
    options.limits = origin_limits(layers)?;
    Ok(options)
}

fn origin_limits(layers: &Layers) -> Result<OriginLimits> {
    let limits = OriginLimits {
        requests: layers.parse("origin-requests", parse_request_rate)?,
        bytes_per_s: layers.parse("origin-bytes", parse_byte_rate)?,
        inflight: layers.parse("origin-inflight", parse_inflight)?,
    };
    Ok(limits)
}

fn parse_request_rate(text: &str) -> Result<RequestRate> {
    text.parse()
}

fn parse_byte_rate(text: &str) -> Result<u64> {
    let rate = units::parse_size(text.trim_end_matches("/s"))?;
    if rate < BYTES_PER_S_MIN {
        let (seen, least) = (units::show_size(rate), units::show_size(BYTES_PER_S_MIN));
        refuse!(Usage, "origin-bytes {seen} a second is too little to read by; give at least {least}");
    }
    Ok(rate)
}

fn parse_inflight(text: &str) -> Result<u32> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => refuse!(Usage, "`{text}` is no number of requests at once; give 1 or more"),
    }
}

fn parse_codec(text: &str) -> Result<CodecChoice> {
    match text {
        "auto" => Ok(CodecChoice::Auto),
        "none" => Ok(CodecChoice::None),
        other => refuse!(Usage, "codec `{other}` is neither auto nor none"),
    }
}

/// How a new version is sealed.
pub fn seal_codec(layers: &Layers) -> Result<CodecChoice> {
    Ok(layers.parse("codec", parse_codec)?.unwrap_or_default())
}

fn parse_count(text: &str) -> Result<u64> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => refuse!(Usage, "`{text}` is not a count; give 1 or more"),
    }
}

/// `--s3-credentials`: where short-lived ones come from. Names only, no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaultAwsRole {
    pub mount: String,
    pub role: String,
}

impl std::str::FromStr for VaultAwsRole {
    type Err = Error;

    fn from_str(text: &str) -> Result<VaultAwsRole> {
        // The word may be a secret put here by mistake: it is not repeated.
        let plain = |part: &str| {
            let word = |c: u8| c.is_ascii_alphanumeric() || b"-_.@+=,".contains(&c);
            part.split('/').all(|word_of| !matches!(word_of, "" | "." | "..") && word_of.bytes().all(word))
        };
        match text.strip_prefix("vault-aws:").and_then(|rest| rest.rsplit_once('/')) {
            Some((mount, role)) if plain(mount) && plain(role) => {
                Ok(VaultAwsRole { mount: mount.to_owned(), role: role.to_owned() })
            }
            _ => refuse!(
                Usage,
                "storage credentials come from vault-aws:MOUNT/ROLE, or from the AWS_ variables if left out"
            ),
        }
    }
}

/// The folders of this user, from the environment.
#[derive(Debug, Clone)]
pub struct Dirs {
    pub config_home: Option<PathBuf>,
    pub state_home: Option<PathBuf>,
    pub cache_home: Option<PathBuf>,
    pub runtime: Option<PathBuf>,
    /// What systemd made for the service that this process is (`RuntimeDirectory=`).
    pub service_runtime: Option<PathBuf>,
    pub root: bool,
}

fn env_path(name: &str) -> Option<PathBuf> {
    // XDG says that a relative path is to be ignored.
    std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// What systemd tells a service about itself.
#[derive(Debug, Clone, Default)]
pub struct ServiceManager {
    /// `/path` or `@name`.
    pub notify_socket: Option<std::ffi::OsString>,
    /// It kills a service that says nothing for so long.
    pub watchdog: Option<Duration>,
}

pub fn service_manager() -> ServiceManager {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    // Inherited from a service that started us: its watchdog is not ours to feed.
    let for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    ServiceManager {
        notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()),
        watchdog: number("WATCHDOG_USEC").filter(|usec| for_us && *usec > 0).map(Duration::from_micros),
    }
}

/// Reads the environment each time: tests and `demo` set it for their children only.
pub fn env_dirs() -> Dirs {
    let home = env_path("HOME");
    let under = |name: &str, tail: &str| env_path(name).or_else(|| home.as_ref().map(|home| home.join(tail)));
    Dirs {
        config_home: under("XDG_CONFIG_HOME", ".config"),
        state_home: under("XDG_STATE_HOME", ".local/state"),
        cache_home: under("XDG_CACHE_HOME", ".cache"),
        runtime: env_path("XDG_RUNTIME_DIR"),
        service_runtime: std::env::var("RUNTIME_DIRECTORY")
            .ok()
            .and_then(|list| list.split(':').next().map(PathBuf::from))
            .filter(|path| path.is_absolute()),
        // SAFETY: geteuid only reads this process's credentials.
        root: unsafe { libc::geteuid() } == 0,
    }
}

impl Dirs {
    pub fn control_dir(&self) -> Result<PathBuf> {
        match (self.root, &self.service_runtime, &self.runtime, &self.state_home) {
            // Wherever a service's own folder is: all of root's mounts are found in one place.
            (true, ..) => Ok(PathBuf::from("/run/modelfs")),
            (false, Some(service), ..) => Ok(service.clone()),
            (false, None, Some(runtime), _) => Ok(runtime.join("modelfs")),
            (false, None, None, Some(state)) => Ok(state.join("modelfs/run")),
            (false, None, None, None) => {
                Err(Error::new(Code::Usage, "neither XDG_RUNTIME_DIR nor HOME is set; set one"))
            }
        }
    }

    /// Where `verify` notes how far it came. None: nowhere to note it.
    pub fn cache_dir(&self) -> Option<PathBuf> {
        self.cache_home.as_ref().map(|home| home.join("modelfs"))
    }
}

/// File and environment. `named` (`--config` or `MODELFS_CONFIG`) replaces the usual files and must exist.
pub fn base_layers(named: Option<&Path>) -> Result<Layers> {
    let (layers, errors) = base_layers_each(named);
    layers::refuse_all(errors)?;
    Ok(layers)
}

/// The same: what can be understood is laid, and every error told.
pub fn base_layers_each(named: Option<&Path>) -> (Layers, Vec<Error>) {
    let mut layers = Layers::default();
    let (files, must_exist) = places_of_files(named);
    let errors = files.iter().flat_map(|path| layers.file_each(path, must_exist)).collect();
    layers.environment(&crate::mem::env_names(), |name| std::env::var(name).ok());
    (layers, errors)
}

/// Where configuration is looked for, lowest layer first, and whether it must be there.
fn places_of_files(named: Option<&Path>) -> (Vec<PathBuf>, bool) {
    match named.map(PathBuf::from).or_else(|| std::env::var_os("MODELFS_CONFIG").map(PathBuf::from)) {
        Some(path) => (vec![path], true),
        None => {
            let own = env_dirs().config_home.map(|home| home.join("modelfs/config.toml"));
            ([PathBuf::from("/etc/modelfs.toml")].into_iter().chain(own).collect(), false)
        }
    }
}

/// The files that [`base_layers`] reads.
pub fn files(named: Option<&Path>) -> Vec<PathBuf> {
    let there = places_of_files(named).0.into_iter().filter(|path| path.exists());
    there.map(|path| absolute(&path).unwrap_or(path)).collect()
}

/// What is logged, where the layers say so.
///
/// # Errors
/// `USAGE` for what is no filter.
pub fn log_filter(layers: &Layers) -> Result<Option<String>> {
    layers.parse("log", |text| crate::telemetry::check_log_filter(text).map(|()| text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(words: &str) -> Result<MountPlan> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut layers = Layers::default();
        layers.mount_options(&layers::split_list(words), false)?;
        MountPlan::from_layers(&layers, "/srv/models", dir.path(), false)
    }

    #[test]
    fn a_plan_has_the_documented_defaults() {
        let plan = plan("key=file:/k").expect("a plan");
        assert!(matches!(plan.verify, Verify::Strict));
        assert_eq!(plan.open, OpenPolicy::Auto);
        assert!(plan.cache_bytes >= CACHE_BYTES_MIN);
        assert!(plan.models.is_empty() && !plan.allow_other && !plan.no_page_cache);
    }

    #[test]
    fn a_place_for_floors_is_a_mount_and_a_path() {
        let at: FloorAt = "vault-kv:secret/modelfs/floor".parse().expect("a place");
        assert_eq!(at, FloorAt { mount: "secret".into(), path: "modelfs/floor".into() });
        for text in ["secret/x", "vault-kv:secret", "vault-kv:/x", "vault-kv:s/", "vault-kv:s/../x", "vault-kv:s/x#f"] {
            assert_eq!(text.parse::<FloorAt>().expect_err(text).code(), Code::Usage);
        }
    }

    #[test]
    fn what_a_daemon_reads_again_is_named_absolutely() {
        let hex = "ab".repeat(32);
        let access = plan(&format!("key=file:k,key=passphrase-file:p,trust=s.pub,trust={hex},trust_file=t"))
            .expect("a plan")
            .access;
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(access.keys, [KeySource::File(here.join("k")), KeySource::PassphraseFile(here.join("p"))]);
        assert_eq!(access.trust.keys, [here.join("s.pub").to_str().expect("utf-8"), hex.as_str()]);
        assert_eq!(access.trust.file, Some(here.join("t")));
    }

    /// Each refusal names what to do instead.
    #[test]
    fn contradictions_are_refused_with_their_fix() {
        let digest = "9b970cfe30418addc91ccbdb2ca8d9f92a472ff526775864d07dcbad2710044e";
        let cases = [
            (format!("key=file:/k,manifest=sha256:{digest}"), "exactly one --model"),
            (format!("key=file:/k,manifest=sha256:{digest},model=a@3"), "--model a"),
            ("key=file:/k,manifest=sha256:12".into(), "64 hex digits"),
            ("key=file:/k,trust=ab,trust_on_first_use".into(), "drop --trust-on-first-use"),
            ("key=file:/k,trust_on_first_use,require_floor=true".into(), "drop one"),
            ("key=file:/k,model=a,require=b".into(), "add --model b"),
            ("key=file:/k,model=a,model=a@2".into(), "selected twice"),
            ("key=file:/k,versions,model=a@2,model=a@2".into(), "selected twice"),
            ("key=file:/k,uid=4000000".into(), "--allow-other"),
            ("key=file:/k,cache=1MiB".into(), "at least 64.0 MiB"),
            ("key=file:/k,open=eager".into(), "lazy, auto, whole"),
            ("key=file:/k,fetch_timeout=30s,fetch_budget=10s".into(), "raise the budget"),
            ("key=file:/k,umask=999".into(), "octal"),
            ("key=file:/k,slot_label=Node".into(), "1 to 64 characters"),
            ("key=file:/k,on_key_loss=panic".into(), "neither keep nor lock"),
            ("key=file:/k,on_key_loss=lock".into(), "neither keys nor storage credentials come from Vault"),
            ("key=file:/k,lock_when_idle=10ms".into(), "at least 1 s"),
            ("key=file:/k,key_loss_check=5s".into(), "add on-key-loss=lock"),
            ("key=file:/k,locked_opens=0s".into(), "at most 600 s"),
            ("key=file:/k,locked_opens=1h".into(), "at most 600 s"),
            ("key=file:/k,state_dir=here".into(), "not an absolute path"),
        ];
        for (words, fix) in cases {
            let err = plan(&words).expect_err(&words);
            assert_eq!(err.class(), crate::error::Class::Usage, "{words}");
            assert!(err.chain().contains(fix), "{words}: {}", err.chain());
        }
    }

    #[test]
    fn several_versions_of_a_model_need_the_layout_that_shows_them() {
        assert!(plan("key=file:/k,versions,model=a,model=a@2").expect("a plan").versions);
        assert!(!plan("key=file:/k,model=a").expect("a plan").versions);
    }

    #[test]
    fn a_mountpoint_must_be_an_existing_folder() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("f");
        std::fs::write(&file, "").expect("written");
        let mut layers = Layers::default();
        layers.flag("key", vec!["file:/k".into()]);
        for path in [file, dir.path().join("none")] {
            let err = MountPlan::from_layers(&layers, "/srv", &path, false).expect_err("refused");
            assert_eq!(err.code(), Code::MountPoint, "{err:?}");
        }
    }
}
