//! What the user meant: defaults < file < environment < flags, checked as a whole before anything starts.
//!
//! In: [`Layers`] (what each place said). Out: one [`MountPlan`] or [`Access`], or an error that names the place and
//! the fix.
//! Promises: the only reader of the environment, secrets excepted (`keys` takes and wipes those); a plan that exists has
//! no contradiction in it.
//! Not here: what a key source or a trusted key is (`keys`), what flags look like (`cli`).
//! Held by: the tests below, tests/cli.rs.

pub mod layers;
pub mod units;

use std::path::{Path, PathBuf};

pub use layers::Layers;

use crate::crypto::Verify;
use crate::error::{Code, Error, Result};
use crate::format::ManifestDigest;
use crate::fuse::OpenPolicy;
use crate::keys::KeySource;
use crate::refuse;
use crate::store::{StoreOptions, StoreUrl};

/// One chunk that waits, one that is opened, for two readers: less than this cannot serve.
const CACHE_BYTES_MIN: u64 = 64 << 20;
/// Whom to believe, as given; `keys::trust` turns it into keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustPlan {
    /// Public keys in hex, or paths of `.pub` files.
    pub keys: Vec<String>,
    pub file: Option<PathBuf>,
    pub on_first_use: bool,
    pub require_floor: bool,
}

/// Everything a command needs to read a model, whichever command it is.
#[derive(Debug, Clone)]
pub struct Access {
    /// In the order they are tried. Empty: none given and none in the environment.
    pub keys: Vec<KeySource>,
    pub trust: TrustPlan,
    /// `--manifest`: this version and no other; no ref is consulted.
    pub manifest: Option<ManifestDigest>,
    pub store: StoreOptions,
}

impl Access {
    pub fn from_layers(layers: &Layers) -> Result<Access> {
        let mut keys: Vec<KeySource> = layers.parse_all("key", |text| text.parse())?;
        if keys.is_empty() {
            keys = KeySource::env_defaults();
        }
        let trust = TrustPlan {
            keys: layers.parse_all("trust", |text| Ok(text.to_string()))?,
            file: layers.parse("trust-file", |text| Ok(PathBuf::from(text)))?,
            on_first_use: layers.switch("trust-on-first-use")?,
            require_floor: layers.switch("require-floor")?,
        };
        if trust.on_first_use && !trust.keys.is_empty() {
            refuse!(Usage, "a trusted key and trust-on-first-use contradict each other; drop --trust-on-first-use");
        }
        if trust.on_first_use && trust.require_floor {
            refuse!(
                Usage,
                "trust-on-first-use and require-floor contradict each other: a first use has no floor; drop one of them"
            );
        }
        Ok(Access { keys, trust, manifest: layers.parse("manifest", parse_digest)?, store: store_options(layers)? })
    }

    /// # Errors
    /// `Usage` naming how to give a key, if there is none.
    pub fn need_keys(&self) -> Result<()> {
        if self.keys.is_empty() {
            refuse!(Usage, "no key given; add --key file:PATH, --key env:VAR or --key passphrase, or set MODELFS_KEY");
        }
        Ok(())
    }
}

/// The checked configuration of one mount.
#[derive(Debug, Clone)]
pub struct MountPlan {
    pub store: StoreUrl,
    /// Absolute, without links: as the kernel will know it, and as the control socket is named.
    pub mountpoint: PathBuf,
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
    /// Models that must be usable before the mount is ready; others may fail with a warning.
    pub require: Vec<String>,
    pub allow_other: bool,
    /// Owner of every file; the mounting user by default.
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// Taken from 0555 and 0444.
    pub umask: Option<u32>,
    /// Detach when ready.
    pub daemon: bool,
    pub log_file: Option<PathBuf>,
}

impl MountPlan {
    /// Checks everything that can be known without the store.
    pub fn from_layers(layers: &Layers, store: &str, mountpoint: &Path, daemon: bool) -> Result<MountPlan> {
        let plan = MountPlan {
            store: parse_store(store)?,
            mountpoint: check_mountpoint(mountpoint)?,
            models: layers.parse_all("model", parse_selector)?,
            access: Access::from_layers(layers)?,
            verify: layers.parse("verify", parse_verify)?.unwrap_or(Verify::Strict),
            cache_bytes: layers.parse("cache", parse_cache)?.unwrap_or_else(default_cache_bytes),
            open: layers.parse("open", str::parse)?.unwrap_or_default(),
            profile: layers.parse("profile", parse_path)?,
            no_page_cache: layers.switch("no-page-cache")?,
            require: layers.parse_all("require", parse_selector)?,
            allow_other: layers.switch("allow-other")?,
            uid: layers.parse("uid", parse_id)?,
            gid: layers.parse("gid", parse_id)?,
            umask: layers.parse("umask", units::parse_octal)?,
            daemon,
            log_file: layers.parse("log-file", |text| Ok(PathBuf::from(text)))?,
        };
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<()> {
        self.access.need_keys()?;
        if self.access.manifest.is_some() {
            match self.models.as_slice() {
                [one] if !one.contains('@') => {}
                [one] => refuse!(
                    Usage,
                    "--manifest already says which version; write --model {} instead of {one}",
                    bare(one)
                ),
                other => refuse!(
                    Usage,
                    "--manifest pins one version of one model, {} are selected; give exactly one --model NAME",
                    other.len()
                ),
            }
        }
        for (i, model) in self.models.iter().enumerate() {
            if self.models[..i].iter().any(|other| bare(other) == bare(model)) {
                refuse!(Usage, "model {} is selected twice; a mount serves one version of it", bare(model));
            }
        }
        for model in &self.require {
            if !self.models.is_empty() && !self.models.iter().any(|other| bare(other) == bare(model)) {
                refuse!(Usage, "--require {model} is not among the mounted models; add --model {model}");
            }
        }
        // SAFETY: geteuid only reads this process's credentials.
        let own_uid = unsafe { libc::geteuid() };
        if let Some(uid) = self.uid
            && uid != own_uid
            && !self.allow_other
        {
            refuse!(Usage, "uid={uid} without allow-other shows files to nobody; add --allow-other");
        }
        Ok(())
    }
}

/// A local store by its absolute path: a daemon works in `/`, and a hint must be right in every folder.
pub fn parse_store(text: &str) -> Result<StoreUrl> {
    match text.parse()? {
        StoreUrl::Local(path) => Ok(StoreUrl::Local(absolute(&path)?)),
        StoreUrl::S3 { bucket, prefix } => Ok(StoreUrl::S3 { bucket, prefix }),
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
    crate::format::check_model_name(bare(text))?;
    if text.ends_with('@') {
        refuse!(Usage, "model `{text}` ends in @; write NAME, NAME@TAG or NAME@VERSION");
    }
    Ok(text.to_string())
}

pub fn parse_digest(text: &str) -> Result<ManifestDigest> {
    text.strip_prefix("sha256:").and_then(ManifestDigest::from_hex).ok_or_else(|| {
        Error::new(Code::Usage, "a manifest digest is sha256: and 64 hex digits, as `modelfs seal` prints it")
    })
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
    let canonical = crate::control::canonical_mountpoint(path)?;
    match std::fs::symlink_metadata(&canonical) {
        Ok(meta) if meta.is_dir() => Ok(canonical),
        Ok(_) => Err(Error::new(Code::MountPoint, format!("mountpoint {} is not a folder", path.display()))),
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => Err(Error::new(
            Code::MountPoint,
            format!("a dead mount lies on {0}; run `modelfs umount {0}` first", path.display()),
        )),
        Err(e) => {
            Err(Error::new(Code::MountPoint, format!("mountpoint {} cannot be used", path.display())).with_source(e))
        }
    }
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
    Ok(options)
}

/// The folders of this user, from the environment.
#[derive(Debug, Clone)]
pub struct Dirs {
    pub config_home: Option<PathBuf>,
    pub state_home: Option<PathBuf>,
    pub cache_home: Option<PathBuf>,
    pub runtime: Option<PathBuf>,
    pub root: bool,
}

fn env_path(name: &str) -> Option<PathBuf> {
    // XDG says that a relative path is to be ignored.
    std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
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
        // SAFETY: geteuid only reads this process's credentials.
        root: unsafe { libc::geteuid() } == 0,
    }
}

impl Dirs {
    pub fn control_dir(&self) -> Result<PathBuf> {
        match (self.root, &self.runtime, &self.state_home) {
            (true, _, _) => Ok(PathBuf::from("/run/modelfs")),
            (false, Some(runtime), _) => Ok(runtime.join("modelfs")),
            (false, None, Some(state)) => Ok(state.join("modelfs/run")),
            (false, None, None) => Err(Error::new(Code::Usage, "neither XDG_RUNTIME_DIR nor HOME is set; set one")),
        }
    }

    /// Where `verify` notes how far it came. None: nowhere to note it.
    pub fn cache_dir(&self) -> Option<PathBuf> {
        self.cache_home.as_ref().map(|home| home.join("modelfs"))
    }
}

/// File and environment. `named` (`--config` or `MODELFS_CONFIG`) replaces the usual files and must exist.
pub fn base_layers(named: Option<&Path>) -> Result<Layers> {
    let mut layers = Layers::default();
    match named.map(PathBuf::from).or_else(|| std::env::var_os("MODELFS_CONFIG").map(PathBuf::from)) {
        Some(path) => layers.file(&path, true)?,
        None => {
            layers.file(Path::new("/etc/modelfs.toml"), false)?;
            if let Some(home) = env_dirs().config_home {
                layers.file(&home.join("modelfs/config.toml"), false)?;
            }
        }
    }
    layers.environment(|name| std::env::var(name).ok());
    Ok(layers)
}

/// `MODELFS_LOG`.
pub fn log_filter() -> Option<String> {
    std::env::var("MODELFS_LOG").ok().filter(|filter| !filter.is_empty())
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
            ("key=file:/k,uid=4000000".into(), "--allow-other"),
            ("key=file:/k,cache=1MiB".into(), "at least 64.0 MiB"),
            ("key=file:/k,open=eager".into(), "lazy, auto, whole"),
            ("key=file:/k,fetch_timeout=30s,fetch_budget=10s".into(), "raise the budget"),
            ("key=file:/k,umask=999".into(), "octal"),
        ];
        for (words, fix) in cases {
            let err = plan(&words).expect_err(&words);
            assert_eq!(err.class(), crate::error::Class::Usage, "{words}");
            assert!(err.chain().contains(fix), "{words}: {}", err.chain());
        }
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
