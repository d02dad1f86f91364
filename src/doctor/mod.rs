//! What of this machine, and of what is to be mounted, stops modelfs or holds it back or lets secrets out, and what to do.
//!
//! In: files of /proc and /sys below a root (tests give their own), [`Facts`] that are not in files, a [`Setup`] if somebody
//! said what is meant. Out: one [`Finding`] a rule: what was seen, what is wanted, the command that brings it about.
//! Promises: looks, changes nothing; a file that is not there or says nonsense is "not known", never a failure of the
//! doctor; only what prevents mounting is [`Severity::Error`]; whatever hangs costs a bounded time.
//! `machine`: what slows a mount. `secrets`: ways by which plaintext gets out. `files`: modes, owners, set-uid, room.
//! `services`: Vault and the store. `setup`: what is meant. `trial`: what the kernel grants when asked.
//! Not here: how it is shown (`cli::doctor`), what the program does about it by itself (`fuse::attach`, `mem`).
//! Held by: `tests`, where every rule passes on a good machine and fails on one that differs in one thing;
//! tests/doctor.sh, where real machines are spoiled; docs/DOCTOR.md has each rule, which a test compares.

mod files;
mod machine;
mod secrets;
mod services;
mod setup;
mod trial;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::crypto;
use crate::format::Suite;
use crate::{gpu, mem};

use Severity::{Error as Stops, Info, Warning};
pub use files::Baked;
use machine::Machine;
pub use services::{StoreSeen, VaultSeen};
pub use setup::{Named, Needs, Setup, WholeRoot};
pub use trial::Fuse;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Fine,
    /// Worth knowing; often nothing is wrong.
    Info,
    /// Costs speed or a line of defence; everything works.
    Warning,
    /// No mount is possible like this.
    Error,
}

/// What one rule found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The rule's name: a contract, scripts may depend on it.
    pub rule: &'static str,
    pub severity: Severity,
    /// About who else could come by keys or plaintext, or have us believe something; the others are about speed.
    pub security: bool,
    pub seen: String,
    pub wanted: &'static str,
    /// The command or setting; `None` when nothing is to be done.
    pub fix: Option<String>,
}

impl Finding {
    /// Whether a strict check is failed: nothing works like this, or a line of defence is missing.
    pub fn stops_strict(&self) -> bool {
        self.severity == Severity::Error || (self.security && self.severity == Severity::Warning)
    }
}

/// What is not in files, or not only. What was not looked for is `None`, and its rule says nothing.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The cache that is or would be asked for.
    pub cache_bytes: u64,
    /// The library that opens aes-256-gcm on this processor.
    pub aes_library: &'static str,
    /// Whether keys get memory that not even root can read; `None`: not tried.
    pub secret_memory: Option<bool>,
    /// Whether `lock` can overwrite what readers hold; `Err`: why not. `None`: not tried.
    pub can_pin: Option<Result<(), String>>,
    /// Whether the clock is kept by a time service; `None`: the kernel does not say.
    pub clock_kept: Option<bool>,
    pub mount: Option<MountFacts>,
    /// A FUSE connection, tried; `Err`: why there is none.
    pub fuse: Option<Result<Fuse, String>>,
    pub tmpfs_refuses_swap: Option<bool>,
    pub gpu: Option<gpu::Seen>,
    pub setup: Option<Setup>,
    pub vault: Option<VaultSeen>,
    pub store: Option<StoreSeen>,
    /// `None`: not an image, or not to be looked at.
    pub baked: Option<Baked>,
}

/// A mount that is there.
#[derive(Debug, Clone, Default)]
pub struct MountFacts {
    /// `major:minor`.
    pub device: String,
    /// As its daemon says; `None`: it did not answer.
    pub passthrough: Option<bool>,
    /// It was asked to do without.
    pub no_passthrough: bool,
    pub huge_page_short_bytes: Option<u64>,
}

/// Looks for what is not in files. Vault, the store and a search for weights each have `wait` at most (a thorough search comes
/// to its end), and are asked only if a rule of theirs is among `wanted`; empty is all.
pub fn gather(cache_bytes: u64, setup: Option<Setup>, wanted: &[String], wait: Duration) -> Facts {
    // As a mount does: what may be locked depends on it.
    mem::use_right_to_lock();
    let asked = |rules: &[&str]| wanted.is_empty() || rules.iter().any(|rule| wanted.iter().any(|name| name == rule));
    let asks = services::Asks {
        vault: asked(&["vault", "vault-tls", "vault-token", "vault-rights", "clock-skew"]),
        store: asked(&["store", "store-access", "store-tls", "clock-skew"]),
    };
    let image = setup.as_ref().filter(|setup| files::is_looked_at_whole(setup, Path::new("/")));
    let (baked, (vault, store)) = std::thread::scope(|scope| {
        let time = image.filter(|_| asked(&["baked-models"])).map(|setup| files::time_for_weights(setup, wait));
        let search = time.map(|time| scope.spawn(move || files::baked(Path::new("/"), time)));
        let services = setup.as_ref().map_or((None, None), |setup| services::ask(setup, asks, wait));
        let baked = search.map(|work| work.join().unwrap_or_else(|died| std::panic::resume_unwind(died)));
        (baked, services)
    });
    let may_mount = mem::has_cap_sys_admin();
    let given = setup.as_ref().is_some_and(|setup| setup.given);
    Facts {
        cache_bytes,
        aes_library: crypto::implementation(Suite::Aes256Gcm).name(),
        secret_memory: mem::secret_memory().ok().map(|kind| kind == mem::SecretMemory::MemfdSecret),
        can_pin: asked(&["io-uring"]).then(|| mem::can_pin().map_err(|e| e.to_string())),
        clock_kept: clock_kept(),
        mount: None,
        fuse: (may_mount && !given && asked(&["mount-right", "passthrough", "fuse-features", "io-uring"]))
            .then(trial::fuse),
        tmpfs_refuses_swap: asked(&["tmpfs-noswap"]).then(mem::tmpfs_refuses_swap).flatten(),
        gpu: asked(&["gpu"]).then(gpu::look),
        setup,
        vault,
        store,
        baked,
    }
}

/// Whether a time service keeps the kernel's clock.
fn clock_kept() -> Option<bool> {
    // SAFETY: a timex is plain numbers; with no mode set the kernel only fills it.
    let (state, status) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&mut timex), timex.status)
    };
    (state >= 0).then_some(status & libc::STA_UNSYNC == 0)
}

/// Everything there is to say, worst first, else in the order of the rules.
pub fn examine(root: &Path, facts: &Facts) -> Vec<Finding> {
    examine_by(root, facts, &[])
}

/// The same by the rules of these names alone; empty is all.
pub fn examine_by(root: &Path, facts: &Facts, wanted: &[String]) -> Vec<Finding> {
    let machine = Machine::new(root, facts);
    let asked = |rule: &&Rule| wanted.is_empty() || wanted.iter().any(|name| name == rule.name);
    // Somebody else has opened the device and mounted.
    let given = facts.setup.as_ref().is_some_and(|setup| setup.given);
    let applies = |rule: &&Rule| !(given && ["fuse-device", "mount-right"].contains(&rule.name));
    let said = |rule: &Rule| (rule.look)(&machine).map(|said| said.of(rule));
    let mut findings: Vec<Finding> = RULES.iter().filter(asked).filter(applies).filter_map(said).collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings
}

/// The names of all rules, in their order.
pub fn rule_names() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|rule| rule.name)
}

struct Rule {
    name: &'static str,
    security: bool,
    /// A rule that has nothing to look at (no mount given, no such file) says nothing.
    look: fn(&Machine<'_>) -> Option<Said>,
}

const fn speed(name: &'static str, look: fn(&Machine<'_>) -> Option<Said>) -> Rule {
    Rule { name, security: false, look }
}

const fn security(name: &'static str, look: fn(&Machine<'_>) -> Option<Said>) -> Rule {
    Rule { name, security: true, look }
}

const RULES: &[Rule] = &[
    speed("fuse-device", machine::fuse_device),
    speed("mount-right", machine::mount_right),
    speed("kernel", machine::kernel),
    speed("fuse-features", machine::fuse_features),
    speed("passthrough", machine::passthrough),
    speed("memlock", machine::memlock),
    speed("cache-room", machine::cache_room),
    speed("tmpfs-noswap", machine::tmpfs_noswap),
    speed("huge-pages", machine::huge_pages),
    speed("fragmentation", machine::fragmentation),
    speed("huge-pages-of-mount", machine::huge_pages_of_mount),
    speed("read-ahead", machine::read_ahead),
    speed("background", machine::background),
    speed("cpu", machine::cpu),
    speed("numa", machine::numa),
    speed("idle", machine::idle),
    speed("clocksource", machine::clocksource),
    speed("gpu", machine::gpu),
    security("clock", secrets::clock),
    security("secret-memory", secrets::secret_memory),
    security("swap", secrets::swap),
    security("hibernation", secrets::hibernation),
    security("core-pattern", secrets::core_pattern),
    security("set-id-dumps", secrets::set_id_dumps),
    security("ptrace-scope", secrets::ptrace_scope),
    security("init-on-free", secrets::init_on_free),
    security("io-uring", secrets::io_uring),
    security("lockdown", secrets::lockdown),
    security("privileges", secrets::privileges),
    security("configuration", setup::configuration),
    security("trust", setup::trust),
    security("verify", setup::verify),
    security("secret-files", files::secret_files),
    security("trusted-files", files::trusted_files),
    security("folders", files::folders),
    security("program", files::program),
    security("set-id", files::set_id),
    security("world-writable", files::world_writable),
    security("baked-models", files::baked_models),
    speed("state-room", files::state_room),
    speed("audit-room", files::audit_room),
    speed("vault", services::vault),
    security("vault-tls", services::vault_tls),
    security("vault-token", services::vault_token),
    speed("vault-rights", services::vault_rights),
    speed("store", services::store),
    speed("store-access", services::store_access),
    security("store-tls", services::store_tls),
    security("clock-skew", services::clock_skew),
];

/// A finding before it has its rule's name.
struct Said {
    severity: Severity,
    seen: String,
    wanted: &'static str,
    fix: Option<String>,
}

impl Said {
    fn of(self, rule: &Rule) -> Finding {
        let Said { severity, seen, wanted, fix } = self;
        Finding { rule: rule.name, severity, security: rule.security, seen, wanted, fix }
    }
}

fn fine(seen: impl Into<String>, wanted: &'static str) -> Option<Said> {
    Some(Said { severity: Severity::Fine, seen: seen.into(), wanted, fix: None })
}

fn hint(severity: Severity, seen: impl Into<String>, wanted: &'static str, fix: impl Into<String>) -> Option<Said> {
    Some(Said { severity, seen: seen.into(), wanted, fix: Some(fix.into()) })
}
