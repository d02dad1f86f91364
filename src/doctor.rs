//! What of this machine stops modelfs or holds it back, and what to do about it.
//!
//! In: files of /proc and /sys below a root (tests give their own), a few facts that are not in files. Out: one
//! [`Finding`] a rule: what was seen, what is wanted, the command that brings it about.
//! Promises: looks, changes nothing; a file that is not there or says nonsense is "not known", never a failure of the
//! doctor; only what prevents mounting is [`Severity::Error`].
//! Not here: how it is shown (`cli::doctor`), what the program does about it by itself (`fuse::attach`, `mem`).
//! Held by: the tests below, where every rule passes on a good machine and fails on one that differs in one file.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::units::show_size;
use crate::fuse::attach::{BACKGROUND_REQUESTS, READ_AHEAD_KIB};
use crate::mem::{self, HUGE_PAGE_BYTES};

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
    pub seen: String,
    pub wanted: &'static str,
    /// The command or setting; `None` when nothing is to be done.
    pub fix: Option<String>,
}

/// What is not in files, or not only.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The cache that is or would be asked for.
    pub cache_bytes: u64,
    /// The library that opens aes-256-gcm on this processor.
    pub aes_library: &'static str,
    /// Whether keys get memory that not even root can read; `None`: not tried.
    pub secret_memory: Option<bool>,
    /// Whether the clock is kept by a time service; `None`: the kernel does not say.
    pub clock_kept: Option<bool>,
    pub mount: Option<MountFacts>,
}

/// A mount that is there.
#[derive(Debug, Clone, Default)]
pub struct MountFacts {
    /// `major:minor`.
    pub device: String,
    /// As its daemon says; `None`: it did not answer.
    pub passthrough: Option<bool>,
    pub huge_page_short_bytes: Option<u64>,
}

/// Everything there is to say, worst first, else in the order of the rules.
pub fn examine(root: &Path, facts: &Facts) -> Vec<Finding> {
    let machine = Machine { root: root.to_owned(), facts };
    let mut findings: Vec<Finding> =
        RULES.iter().filter_map(|(rule, look)| look(&machine).map(|s| s.of(rule))).collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings
}

type Look = fn(&Machine<'_>) -> Option<Said>;

/// A rule that has nothing to look at (no mount given, no such file) says nothing.
const RULES: &[(&str, Look)] = &[
    ("fuse-device", fuse_device),
    ("mount-right", mount_right),
    ("kernel", kernel),
    ("passthrough", passthrough),
    ("memlock", memlock),
    ("cache-room", cache_room),
    ("huge-pages", huge_pages),
    ("fragmentation", fragmentation),
    ("huge-pages-of-mount", huge_pages_of_mount),
    ("read-ahead", read_ahead),
    ("background", background),
    ("cpu", cpu),
    ("numa", numa),
    ("idle", idle),
    ("clocksource", clocksource),
    ("clock", clock),
    ("secret-memory", secret_memory),
    ("swap", swap),
    ("core-pattern", core_pattern),
];

/// A finding before it has its rule's name.
struct Said {
    severity: Severity,
    seen: String,
    wanted: &'static str,
    fix: Option<String>,
}

impl Said {
    fn of(self, rule: &'static str) -> Finding {
        let Said { severity, seen, wanted, fix } = self;
        Finding { rule, severity, seen, wanted, fix }
    }
}

fn fine(seen: impl Into<String>, wanted: &'static str) -> Option<Said> {
    Some(Said { severity: Severity::Fine, seen: seen.into(), wanted, fix: None })
}

fn hint(severity: Severity, seen: impl Into<String>, wanted: &'static str, fix: impl Into<String>) -> Option<Said> {
    Some(Said { severity, seen: seen.into(), wanted, fix: Some(fix.into()) })
}

use Severity::{Error as Stops, Info, Warning};

struct Machine<'a> {
    root: PathBuf,
    facts: &'a Facts,
}

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

impl Machine<'_> {
    fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }

    fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    /// `(major, minor)` of the running kernel.
    fn kernel(&self) -> Option<(u32, u32)> {
        let release = self.text("proc/sys/kernel/osrelease")?;
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// Over the host, not only in a user namespace of our own.
    fn has_capability(&self, number: u32) -> bool {
        let status = self.text("proc/self/status").unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or("0").trim();
        let held = u64::from_str_radix(effective, 16).unwrap_or(0) >> number & 1 == 1;
        let initial =
            self.text("proc/self/uid_map").is_none_or(|map| map.split_whitespace().eq(["0", "0", "4294967295"]));
        held && initial
    }

    /// The word in brackets.
    fn choice(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
    }

    /// A field of /proc/meminfo, in bytes.
    fn meminfo(&self, field: &str) -> Option<u64> {
        let text = self.text("proc/meminfo")?;
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
    }

    /// The least of this memory cgroup's limits and its parents'.
    fn cgroup_limit(&self) -> Option<u64> {
        let groups = self.text("proc/self/cgroup")?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let top = self.root.join("sys/fs/cgroup");
        let limit = |dir: &Path| std::fs::read_to_string(dir.join("memory.max")).ok()?.trim().parse::<u64>().ok();
        top.join(own).ancestors().take_while(|dir| dir.starts_with(&top)).filter_map(limit).min()
    }

    /// Soft RLIMIT_MEMLOCK, bytes; `None` is no limit, or not known.
    fn memlock_limit(&self) -> Option<u64> {
        let limits = self.text("proc/self/limits")?;
        let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
        line.split_whitespace().next()?.parse().ok()
    }

    fn cpu_flags(&self) -> Option<Vec<String>> {
        let info = self.text("proc/cpuinfo")?;
        let line = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"))?;
        Some(line.split_once(':')?.1.split_whitespace().map(str::to_owned).collect())
    }
}

fn fuse_device(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "/dev/fuse, readable and writable";
    let path = machine.root.join("dev/fuse");
    match std::fs::File::options().read(true).write(true).open(&path) {
        Ok(_) => fine("/dev/fuse can be opened", WANTED),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            hint(Stops, "no /dev/fuse", WANTED, "modprobe fuse; for a container, run it with --device /dev/fuse")
        }
        Err(error) => hint(Stops, format!("/dev/fuse cannot be opened: {error}"), WANTED, "chmod 666 /dev/fuse"),
    }
}

fn mount_right(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "CAP_SYS_ADMIN, or fusermount3 to mount for an ordinary user";
    if machine.has_capability(CAP_SYS_ADMIN) {
        return fine("CAP_SYS_ADMIN", WANTED);
    }
    let helper = ["usr/bin/fusermount3", "bin/fusermount3", "usr/local/bin/fusermount3"];
    match helper.into_iter().find(|path| machine.exists(path)) {
        Some(path) => fine(format!("no CAP_SYS_ADMIN, /{path} mounts"), WANTED),
        None => hint(Stops, "no CAP_SYS_ADMIN and no fusermount3", WANTED, "apt-get install fuse3, or run as root"),
    }
}

fn kernel(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "Linux 6.9 or later (passthrough; 6.4 brings unswappable tmpfs, 5.14 populating)";
    let (major, minor) = machine.kernel()?;
    let seen = format!("Linux {major}.{minor}");
    match (major, minor) {
        (6.., 9..) | (7.., _) => fine(seen, WANTED),
        (5, 2..) | (6, _) => {
            hint(Warning, format!("{seen}: files are copied by the daemon"), WANTED, "boot a newer kernel")
        }
        _ => hint(Stops, seen, WANTED, "boot a newer kernel"),
    }
}

fn passthrough(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "whole files read and mapped without the daemon, 2 to 10 times as fast";
    let mount = machine.facts.mount.as_ref().and_then(|mount| mount.passthrough);
    if mount == Some(true) {
        return fine("the mount uses it", WANTED);
    }
    if !machine.has_capability(CAP_SYS_ADMIN) {
        let fix = "run as root, or with CAP_SYS_ADMIN (AmbientCapabilities=CAP_SYS_ADMIN, --cap-add SYS_ADMIN)";
        return hint(Warning, "no CAP_SYS_ADMIN", WANTED, fix);
    }
    let release = machine.text("proc/sys/kernel/osrelease")?;
    let config = machine.text(&format!("boot/config-{release}"));
    if config.is_some_and(|config| !config.lines().any(|line| line == "CONFIG_FUSE_PASSTHROUGH=y")) {
        return hint(
            Warning,
            "the kernel was built without it",
            WANTED,
            "boot a kernel with CONFIG_FUSE_PASSTHROUGH=y",
        );
    }
    if mount == Some(false) {
        let fix = "see the mount's log (modelfs -v mount ...) for what the kernel said";
        return hint(Warning, "the kernel did not grant it to this mount", WANTED, fix);
    }
    (machine.kernel()? >= (6, 9)).then(|| fine("the kernel and the rights allow it", WANTED))?
}

fn memlock(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "room to lock keys (8 MiB), and the cache too without CAP_SYS_ADMIN";
    const KEYS: u64 = 8 << 20;
    let limit = machine.memlock_limit().filter(|_| !machine.has_capability(CAP_IPC_LOCK));
    let Some(limit) = limit else { return fine("no limit", WANTED) };
    let beside = if machine.has_capability(CAP_SYS_ADMIN) { 0 } else { machine.facts.cache_bytes };
    let need = KEYS + beside;
    let seen = format!("limit {}, {} wanted", show_size(limit), show_size(need));
    if limit >= need {
        return fine(seen, WANTED);
    }
    let fix =
        format!("ulimit -l {}, or LimitMEMLOCK={need} in the unit, or --ulimit memlock={need}", need.div_ceil(1024));
    hint(Stops, seen, WANTED, fix)
}

fn cache_room(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "more memory for this process than the cache takes, and 192 MiB beside it";
    const BESIDE: u64 = 192 << 20;
    let total = machine.meminfo("MemTotal")?;
    let (room, whose) = match machine.cgroup_limit().filter(|limit| *limit < total) {
        Some(limit) => (limit, "the cgroup"),
        None => (total, "the machine"),
    };
    let cache = machine.facts.cache_bytes;
    let seen = format!("{whose} has {}, the cache takes {}", show_size(room), show_size(cache));
    if room >= cache.saturating_add(BESIDE) {
        return fine(seen, WANTED);
    }
    let less = show_size(room.saturating_sub(BESIDE) / 2);
    hint(Warning, seen, WANTED, format!("mount with a smaller --cache (say {less}), or raise MemoryMax= / memory.max"))
}

fn huge_pages(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "huge pages for memory files: filled 8 times, read twice to 4 times as fast";
    let setting = machine.choice("sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let advise = "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled";
    match setting.as_deref() {
        None => hint(Warning, "this kernel has none", WANTED, "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE"),
        Some("deny") => hint(Warning, "forbidden (shmem_enabled is deny)", WANTED, advise),
        Some("never") if !machine.has_capability(CAP_SYS_ADMIN) => {
            hint(Warning, "shmem_enabled is never, and without CAP_SYS_ADMIN it decides", WANTED, advise)
        }
        Some(word) => fine(format!("shmem_enabled is {word}"), WANTED),
    }
}

fn fragmentation(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "free memory in pieces of 2 MiB or more, enough for the cache";
    let text = machine.text("proc/buddyinfo")?;
    const HUGE_ORDER: usize = 9;
    let (mut free, mut huge) = (0u64, 0u64);
    for line in text.lines() {
        let (_, counts) = line.split_once("zone")?;
        for (order, count) in counts.split_whitespace().skip(1).enumerate() {
            let bytes = count.parse::<u64>().ok()?.checked_mul(4096 << order)?;
            free = free.saturating_add(bytes);
            huge = huge.saturating_add(if order >= HUGE_ORDER { bytes } else { 0 });
        }
    }
    let seen = format!("{} of {} free memory in such pieces", show_size(huge), show_size(free));
    // Page cache that can be dropped is not free yet, and the kernel makes pieces of it as they are asked for.
    let enough = huge >= machine.facts.cache_bytes || huge >= free / 2;
    if enough { fine(seen, WANTED) } else { hint(Warning, seen, WANTED, "echo 1 > /proc/sys/vm/compact_memory") }
}

fn huge_pages_of_mount(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no cached byte in 4 KiB pages";
    let short = machine.facts.mount.as_ref()?.huge_page_short_bytes?;
    if short < HUGE_PAGE_BYTES {
        return fine(format!("{} in small pages", show_size(short)), WANTED);
    }
    let fix = "echo 1 > /proc/sys/vm/compact_memory, then mount again";
    hint(Warning, format!("{} of this mount's cache lie in small pages", show_size(short)), WANTED, fix)
}

fn read_ahead(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "1024 KiB of readahead: cold maps are copied 3 to 5 times as fast as with 128";
    let device = &machine.facts.mount.as_ref()?.device;
    let path = format!("sys/class/bdi/{device}/read_ahead_kb");
    let kib: u32 = machine.text(&path)?.parse().ok()?;
    let seen = format!("{kib} KiB");
    if kib == READ_AHEAD_KIB {
        return fine(seen, WANTED);
    }
    hint(Warning, seen, WANTED, format!("echo {READ_AHEAD_KIB} > /{path}"))
}

fn background(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no limit on reads under way, so that a silent store does not stop warm files";
    let device = &machine.facts.mount.as_ref()?.device;
    let path = format!("sys/fs/fuse/connections/{}/max_background", device.split_once(':')?.1);
    let limit: u32 = machine.text(&path)?.parse().ok()?;
    if limit >= u32::from(BACKGROUND_REQUESTS) {
        return fine(limit.to_string(), WANTED);
    }
    hint(Warning, limit.to_string(), WANTED, format!("echo {BACKGROUND_REQUESTS} > /{path}"))
}

fn cpu(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "AES instructions; AVX-512 with VAES is the fastest";
    let flags = machine.cpu_flags()?;
    let wide = ["aes", "vaes", "avx2", "avx512f", "avx512vl", "vpclmulqdq", "sha_ni", "sha2", "pmull", "asimd", "sve"];
    let found: Vec<&str> = wide.into_iter().filter(|flag| flags.iter().any(|have| have == flag)).collect();
    if !found.contains(&"aes") {
        let fix = "seal models for such machines with --cipher chacha20-poly1305";
        return hint(Warning, "no AES instructions: aes-256-gcm opens at a tenth of its speed", WANTED, fix);
    }
    let library = machine.facts.aes_library;
    fine(format!("{}; aes-256-gcm by {library}, chacha20-poly1305 by aws-lc", found.join(" ")), WANTED)
}

fn numa(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "one memory node, or a cache spread over all of them (done by itself as root)";
    match mem::memory_nodes(&machine.root).len() {
        0 | 1 => fine("one memory node", WANTED),
        nodes if machine.has_capability(CAP_SYS_ADMIN) => fine(format!("{nodes} memory nodes, interleaved"), WANTED),
        nodes => {
            let fix = "numactl --interleave=all modelfs mount ...";
            hint(Info, format!("{nodes} memory nodes; the cache lies where the filling threads run"), WANTED, fix)
        }
    }
}

fn idle(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a guest that polls before it halts: a request of a cold file then costs 10 us, not 100";
    if !machine.cpu_flags()?.iter().any(|flag| flag == "hypervisor") {
        return fine("no hypervisor", WANTED);
    }
    let governor = machine.text("sys/devices/system/cpu/cpuidle/current_governor").unwrap_or_default();
    let poll =
        machine.text("sys/module/haltpoll/parameters/guest_halt_poll_ns").and_then(|text| text.parse::<u64>().ok());
    match poll {
        Some(ns @ 1..) if governor == "haltpoll" => fine(format!("haltpoll, up to {ns} ns"), WANTED),
        _ => {
            let fix = "modprobe cpuidle_haltpoll force=1; echo 200000 > /sys/module/haltpoll/parameters/guest_halt_poll_ns \
                       (costs processor time)";
            hint(Info, format!("a virtual machine, idle governor `{governor}`"), WANTED, fix)
        }
    }
}

fn clocksource(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a clock that is read without a trap (tsc, kvm-clock, hyperv, arch_sys_counter)";
    let source = machine.text("sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let quick = ["tsc", "kvm-clock", "arch_sys_counter"].contains(&source.as_str()) || source.starts_with("hyperv");
    if quick {
        return fine(source, WANTED);
    }
    let fix = "echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource";
    hint(Warning, format!("{source}: every reading of the time is slow"), WANTED, fix)
}

fn clock(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a clock kept by a time service: expiry of versions is judged by it";
    match machine.facts.clock_kept? {
        true => fine("kept", WANTED),
        false => hint(Info, "nobody keeps this clock", WANTED, "timedatectl set-ntp true, or run chrony"),
    }
}

fn secret_memory(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "memfd_secret: keys that root cannot read, and no hibernation image while mounted";
    match machine.facts.secret_memory? {
        true => fine("there", WANTED),
        false => {
            let fix = "boot with secretmem.enable=1 (Linux 5.14 and later; the default since 6.5)";
            hint(Warning, "not there: keys lie in locked memory", WANTED, fix)
        }
    }
}

fn swap(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no swap: the cache is never swapped, but what readers copy of it may be";
    let devices = machine.text("proc/swaps")?.lines().skip(1).count();
    match devices {
        0 => fine("none", WANTED),
        some => {
            let fix = "swapoff -a, or MemorySwapMax=0 for the programs that read models";
            hint(Info, format!("{some} swap device(s) in use"), WANTED, fix)
        }
    }
}

fn core_pattern(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no crash handler: modelfs leaves no core, but a reader's may hold what it copied";
    let pattern = machine.text("proc/sys/kernel/core_pattern")?;
    match pattern.strip_prefix('|') {
        None => fine(format!("`{pattern}`"), WANTED),
        Some(handler) => {
            let handler = handler.split_whitespace().next().unwrap_or_default();
            let fix = "sysctl kernel.core_pattern=core, and ulimit -c 0 for the programs that read models";
            hint(Info, format!("crashes are piped to {handler}"), WANTED, fix)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A machine on which every rule passes, as files.
    const GOOD: &[(&str, &str)] = &[
        ("dev/fuse", ""),
        ("usr/bin/fusermount3", ""),
        ("proc/sys/kernel/osrelease", "6.12.8-generic\n"),
        ("boot/config-6.12.8-generic", "CONFIG_FUSE_FS=y\nCONFIG_FUSE_PASSTHROUGH=y\n"),
        ("proc/self/status", "Name:\tmodelfs\nCapEff:\t000001ffffffffff\n"),
        ("proc/self/uid_map", "         0          0 4294967295\n"),
        (
            "proc/self/limits",
            "Limit                     Soft Limit   Hard Limit  Units\nMax locked memory         8388608  8388608  bytes\n",
        ),
        ("proc/self/cgroup", "0::/system.slice/modelfs.service\n"),
        ("sys/fs/cgroup/system.slice/modelfs.service/memory.max", "max\n"),
        ("proc/meminfo", "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\n"),
        ("proc/buddyinfo", "Node 0, zone   Normal   10   10   10   10   10   10   10   10   10   10   4000 \n"),
        ("proc/cpuinfo", "processor : 0\nflags : fpu aes avx2 vaes avx512f\n"),
        ("proc/swaps", "Filename Type Size Used Priority\n"),
        ("proc/sys/kernel/core_pattern", "core\n"),
        ("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny force\n"),
        ("sys/devices/system/node/has_memory", "0\n"),
        ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
        ("sys/class/bdi/0:44/read_ahead_kb", "1024\n"),
        ("sys/fs/fuse/connections/44/max_background", "65535\n"),
    ];

    const NO_RIGHTS: (&str, &str) = ("proc/self/status", "CapEff:\t0000000000000000\n");

    fn good_facts() -> Facts {
        Facts {
            cache_bytes: 8 * GIB,
            aes_library: "ring",
            secret_memory: Some(true),
            clock_kept: Some(true),
            mount: Some(MountFacts { device: "0:44".into(), passthrough: Some(true), huge_page_short_bytes: Some(0) }),
        }
    }

    /// The good machine with some files replaced (`None`: removed).
    fn findings(changes: &[(&str, Option<&str>)], facts: &Facts) -> Vec<Finding> {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in GOOD {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("mkdir");
            std::fs::write(path, text).expect("write");
        }
        for (path, text) in changes {
            let path = root.path().join(path);
            match text {
                Some(text) => {
                    std::fs::create_dir_all(path.parent().expect("inside")).expect("mkdir");
                    std::fs::write(path, text).expect("write");
                }
                None => std::fs::remove_file(path).expect("was there"),
            }
        }
        examine(root.path(), facts)
    }

    fn found(findings: &[Finding], rule: &str) -> Finding {
        findings.iter().find(|finding| finding.rule == rule).unwrap_or_else(|| panic!("{rule} says nothing")).clone()
    }

    #[test]
    fn on_a_good_machine_every_rule_speaks_and_every_rule_is_fine() {
        let all = findings(&[], &good_facts());
        assert_eq!(all.len(), RULES.len());
        for finding in all {
            assert_eq!((finding.severity, &finding.fix), (Severity::Fine, &None), "{finding:?}");
        }
    }

    /// (files changed, rule, severity, a word of what was seen, a word of the fix)
    type Case<'a> = (&'a [(&'a str, Option<&'a str>)], &'a str, Severity, &'a str, &'a str);

    #[test]
    fn each_rule_fails_on_a_machine_that_lacks_its_one_thing_and_names_the_fix() {
        let no_rights = (NO_RIGHTS.0, Some(NO_RIGHTS.1));
        let shmem = "sys/kernel/mm/transparent_hugepage/shmem_enabled";
        let clocksource = "sys/devices/system/clocksource/clocksource0/current_clocksource";
        let virtual_cpu = ("proc/cpuinfo", Some("flags : aes hypervisor\n"));
        let cases: &[Case<'_>] = &[
            (&[("dev/fuse", None)], "fuse-device", Stops, "no /dev/fuse", "modprobe fuse"),
            (&[no_rights, ("usr/bin/fusermount3", None)], "mount-right", Stops, "no fusermount3", "fuse3"),
            (&[("proc/sys/kernel/osrelease", Some("6.8.0-1"))], "kernel", Warning, "6.8", "newer kernel"),
            (&[("proc/sys/kernel/osrelease", Some("5.1.0"))], "kernel", Stops, "5.1", "newer kernel"),
            (&[no_rights], "passthrough", Warning, "CAP_SYS_ADMIN", "--cap-add SYS_ADMIN"),
            (&[no_rights], "memlock", Stops, "8.00 MiB", "LimitMEMLOCK=8598323200"),
            (&[("proc/self/uid_map", Some("0 1000 1"))], "passthrough", Warning, "CAP_SYS_ADMIN", "root"),
            (
                &[("sys/fs/cgroup/system.slice/memory.max", Some("4294967296\n"))],
                "cache-room",
                Warning,
                "the cgroup has 4.00 GiB",
                "--cache",
            ),
            (&[("proc/meminfo", Some("MemTotal: 8000000 kB\n"))], "cache-room", Warning, "the machine", "--cache"),
            (&[(shmem, Some("always [deny] never"))], "huge-pages", Warning, "deny", "echo advise"),
            (&[(shmem, None)], "huge-pages", Warning, "none", "CONFIG_TRANSPARENT_HUGEPAGE"),
            (&[no_rights], "huge-pages", Warning, "never", "echo advise"),
            (
                &[("proc/buddyinfo", Some("Node 0, zone Normal 900000 0 0 0 0 0 0 0 0 100 0\n"))],
                "fragmentation",
                Warning,
                "200 MiB of",
                "compact_memory",
            ),
            (
                &[("sys/class/bdi/0:44/read_ahead_kb", Some("128"))],
                "read-ahead",
                Warning,
                "128",
                "echo 1024 > /sys/class/bdi/0:44/read_ahead_kb",
            ),
            (
                &[("sys/fs/fuse/connections/44/max_background", Some("12"))],
                "background",
                Warning,
                "12",
                "/sys/fs/fuse/connections/44/max_background",
            ),
            (&[("proc/cpuinfo", Some("flags : sse2\n"))], "cpu", Warning, "no AES", "chacha20-poly1305"),
            (
                &[no_rights, ("sys/devices/system/node/has_memory", Some("0-3"))],
                "numa",
                Info,
                "4 memory nodes",
                "--interleave=all",
            ),
            (&[virtual_cpu], "idle", Info, "virtual machine", "guest_halt_poll_ns"),
            (&[(clocksource, Some("hpet"))], "clocksource", Warning, "hpet", "echo tsc"),
            (&[("proc/swaps", Some("Filename\n/dev/sda2 partition 1 0 -2\n"))], "swap", Info, "1 swap", "swapoff"),
            (
                &[("proc/sys/kernel/core_pattern", Some("|/usr/share/apport/apport -p%p"))],
                "core-pattern",
                Info,
                "/usr/share/apport/apport",
                "core_pattern=core",
            ),
        ];
        for (changes, rule, severity, seen, fix) in cases {
            let mut facts = good_facts();
            if *rule == "passthrough" {
                facts.mount = None;
            }
            let finding = found(&findings(changes, &facts), rule);
            assert_eq!(finding.severity, *severity, "{finding:?}");
            assert!(finding.seen.contains(seen), "{seen}: {finding:?}");
            assert!(finding.fix.as_ref().expect("a fix").contains(fix), "{fix}: {finding:?}");
        }
    }

    #[test]
    fn what_is_not_in_files_is_judged_as_well() {
        let mut facts = good_facts();
        facts.secret_memory = Some(false);
        facts.clock_kept = Some(false);
        let mount = facts.mount.as_mut().expect("given");
        mount.passthrough = Some(false);
        mount.huge_page_short_bytes = Some(64 << 20);
        let all = findings(&[], &facts);
        for (rule, severity) in
            [("secret-memory", Warning), ("clock", Info), ("passthrough", Warning), ("huge-pages-of-mount", Warning)]
        {
            assert_eq!(found(&all, rule).severity, severity, "{rule}");
        }
        let no_config = findings(&[("boot/config-6.12.8-generic", Some("CONFIG_FUSE_FS=y\n"))], &facts);
        assert!(found(&no_config, "passthrough").fix.expect("a fix").contains("CONFIG_FUSE_PASSTHROUGH"));
    }

    #[test]
    fn rights_and_limits_that_suffice_are_fine() {
        let interleaved = findings(&[("sys/devices/system/node/has_memory", Some("0-1"))], &good_facts());
        assert_eq!(found(&interleaved, "numa").severity, Severity::Fine);
        let polling = [
            ("proc/cpuinfo", Some("flags : aes hypervisor\n")),
            ("sys/devices/system/cpu/cpuidle/current_governor", Some("haltpoll\n")),
            ("sys/module/haltpoll/parameters/guest_halt_poll_ns", Some("200000\n")),
        ];
        assert_eq!(found(&findings(&polling, &good_facts()), "idle").severity, Severity::Fine);
        let unlimited = [
            (NO_RIGHTS.0, Some(NO_RIGHTS.1)),
            ("proc/self/limits", Some("Max locked memory         unlimited  unlimited  bytes\n")),
        ];
        assert_eq!(found(&findings(&unlimited, &good_facts()), "memlock").severity, Severity::Fine);
    }

    #[test]
    fn a_machine_that_says_nothing_or_nonsense_is_examined_all_the_same() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let all = examine(root.path(), &Facts::default());
        assert_eq!(found(&all, "fuse-device").severity, Stops);
        let nonsense: Vec<(&str, Option<&str>)> = GOOD
            .iter()
            .filter(|(path, _)| *path != "dev/fuse")
            .map(|(path, _)| (*path, Some("\u{fffd}[ :,-")))
            .collect();
        findings(&nonsense, &good_facts());
    }

    #[test]
    fn the_worst_comes_first() {
        let all = findings(&[("dev/fuse", None), ("proc/swaps", Some("x\ny\n"))], &good_facts());
        assert_eq!((all[0].rule, all[1].rule), ("fuse-device", "swap"));
    }
}
