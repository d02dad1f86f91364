//! What of the machine stops a mount or slows it down: the kernel, the rights, memory, processors, GPUs.
//!
//! In: files of /proc and /sys below a root, and what the kernel granted when it was asked ([`super::trial`]).
//! Held by: `doctor::tests`, where every rule passes on a good machine and fails on one that differs in one thing.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use super::files::Survey;
use super::{Facts, Info, Said, Stops, Warning, fine, hint};
use crate::fuse::attach::{BACKGROUND_REQUESTS, READ_AHEAD_KIB};
use crate::gpu::Seen;
use crate::mem::{self, HUGE_PAGE_BYTES};
use crate::units::show_size;

/// The machine below one root, and what is not in its files.
pub struct Machine<'a> {
    pub root: PathBuf,
    pub facts: &'a Facts,
    /// Two rules judge one look around.
    pub survey: OnceCell<Survey>,
}

impl<'a> Machine<'a> {
    pub fn new(root: &Path, facts: &'a Facts) -> Machine<'a> {
        Machine { root: root.to_owned(), facts, survey: OnceCell::new() }
    }
}

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

impl Machine<'_> {
    pub fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }

    pub fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    /// `(major, minor)` of the running kernel.
    pub fn kernel(&self) -> Option<(u32, u32)> {
        let release = self.text("proc/sys/kernel/osrelease")?;
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    /// Over the host, not only in a user namespace of our own.
    pub fn has_capability(&self, number: u32) -> bool {
        let status = self.text("proc/self/status").unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or("0").trim();
        let held = u64::from_str_radix(effective, 16).unwrap_or(0) >> number & 1 == 1;
        held && self.in_initial_user_namespace()
    }

    pub fn in_initial_user_namespace(&self) -> bool {
        self.text("proc/self/uid_map").is_none_or(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
    }

    /// The word in brackets.
    pub fn choice(&self, path: &str) -> Option<String> {
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

pub(super) fn fuse_device(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn mount_right(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "CAP_SYS_ADMIN, or fusermount3 to mount for an ordinary user";
    if machine.has_capability(CAP_SYS_ADMIN) {
        // A seccomp filter or a profile of AppArmor may forbid what the capability allows.
        return match &machine.facts.fuse {
            Some(Err(why)) if machine.exists("dev/fuse") => {
                let fix = "docker run --security-opt apparmor=unconfined, or a profile of AppArmor and seccomp that allows \
                           mount; or let another mount and hand the descriptor in";
                hint(Stops, format!("CAP_SYS_ADMIN, and yet: {why}"), WANTED, fix)
            }
            Some(Err(_) | Ok(_)) | None => fine("CAP_SYS_ADMIN", WANTED),
        };
    }
    let helper = ["usr/bin/fusermount3", "bin/fusermount3", "usr/local/bin/fusermount3"];
    match helper.into_iter().find(|path| machine.exists(path)) {
        Some(path) => fine(format!("no CAP_SYS_ADMIN, /{path} mounts"), WANTED),
        None => hint(Stops, "no CAP_SYS_ADMIN and no fusermount3", WANTED, "apt-get install fuse3, or run as root"),
    }
}

pub(super) fn kernel(machine: &Machine<'_>) -> Option<Said> {
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

/// By choice.
fn does_without(machine: &Machine<'_>) -> bool {
    machine.facts.mount.as_ref().is_some_and(|mount| mount.no_passthrough)
        || machine.facts.setup.as_ref().is_some_and(|setup| setup.no_passthrough)
}

/// Why no reader can hold pages of ours, as far as that is known.
pub(super) fn why_no_passthrough(machine: &Machine<'_>) -> Option<String> {
    if does_without(machine) {
        return Some("no-passthrough is set".into());
    }
    if !machine.has_capability(CAP_SYS_ADMIN) {
        return Some("there is no CAP_SYS_ADMIN".into());
    }
    match &machine.facts.fuse {
        Some(Ok(fuse)) => fuse.passthrough.as_ref().err().map(|why| format!("the kernel has no passthrough ({why})")),
        Some(Err(_)) | None => None,
    }
}

pub(super) fn passthrough(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "whole files read and mapped without the daemon, 2 to 10 times as fast";
    if does_without(machine) {
        return fine("the mount does without it, as no-passthrough says", WANTED);
    }
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
    match &machine.facts.fuse {
        Some(Ok(fuse)) => match &fuse.passthrough {
            Ok(()) => fine("tried: the kernel takes files of memory", WANTED),
            Err(why) => {
                hint(Warning, format!("tried: {why}"), WANTED, "boot Linux 6.9 or later with CONFIG_FUSE_PASSTHROUGH=y")
            }
        },
        // `mount-right` tells why nothing could be tried.
        Some(Err(_)) => None,
        None => (machine.kernel()? >= (6, 9)).then(|| fine("the kernel and the rights allow it", WANTED))?,
    }
}

pub(super) fn fuse_features(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "FUSE 7.40 or later with all that is used of it";
    let fuse = machine.facts.fuse.as_ref()?.as_ref().ok()?;
    let ((major, minor), (there, missing)) = (fuse.protocol, fuse.used());
    let seen = format!("FUSE {major}.{minor} offers {}", there.join(", "));
    match missing.as_slice() {
        [] => fine(seen, WANTED),
        missing => hint(Warning, format!("{seen}, not {}", missing.join(", ")), WANTED, "boot Linux 6.9 or later"),
    }
}

pub(super) fn tmpfs_noswap(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a tmpfs that is never swapped (Linux 6.4): no page of the cache needs a lock of its own";
    match machine.facts.tmpfs_refuses_swap? {
        true => fine("there", WANTED),
        false => hint(
            Warning,
            "not there: the cache is locked page by page, within the memlock limit",
            WANTED,
            "boot Linux 6.4 or later",
        ),
    }
}

pub(super) fn gpu(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "where there is a GPU, a driver that answers for all of them";
    match machine.facts.gpu.as_ref()? {
        Seen::Nothing => fine("no NVIDIA GPU", WANTED),
        Seen::Silent(why) => {
            let fix = "nvidia-smi; in a container --gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility";
            hint(Warning, why.clone(), WANTED, fix)
        }
        Seen::Driver { version, gpus, lost } => {
            let one = |gpu: &crate::gpu::Gpu| match (gpu.memory_used, gpu.memory_total) {
                (Some(used), Some(total)) => {
                    format!("{} with {} of {} free", gpu.name, show_size(total.saturating_sub(used)), show_size(total))
                }
                _ => gpu.name.clone(),
            };
            let names: Vec<String> = gpus.iter().map(one).collect();
            let seen =
                format!("driver {version}: {}", if names.is_empty() { "no GPU".into() } else { names.join(", ") });
            match lost {
                0 => fine(seen, WANTED),
                lost => hint(
                    Warning,
                    format!("{seen}; {lost} that the driver does not reach"),
                    WANTED,
                    "nvidia-smi; dmesg | grep -i xid",
                ),
            }
        }
    }
}

pub(super) fn memlock(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn cache_room(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn huge_pages(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn fragmentation(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn huge_pages_of_mount(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no cached byte in 4 KiB pages";
    let short = machine.facts.mount.as_ref()?.huge_page_short_bytes?;
    if short < HUGE_PAGE_BYTES {
        return fine(format!("{} in small pages", show_size(short)), WANTED);
    }
    let fix = "echo 1 > /proc/sys/vm/compact_memory, then mount again";
    hint(Warning, format!("{} of this mount's cache lie in small pages", show_size(short)), WANTED, fix)
}

pub(super) fn read_ahead(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn background(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no limit on reads under way, so that a silent store does not stop warm files";
    let device = &machine.facts.mount.as_ref()?.device;
    let path = format!("sys/fs/fuse/connections/{}/max_background", device.split_once(':')?.1);
    let limit: u32 = machine.text(&path)?.parse().ok()?;
    if limit >= u32::from(BACKGROUND_REQUESTS) {
        return fine(limit.to_string(), WANTED);
    }
    hint(Warning, limit.to_string(), WANTED, format!("echo {BACKGROUND_REQUESTS} > /{path}"))
}

pub(super) fn cpu(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn numa(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn idle(machine: &Machine<'_>) -> Option<Said> {
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

pub(super) fn clocksource(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a clock that is read without a trap (tsc, kvm-clock, hyperv, arch_sys_counter)";
    let source = machine.text("sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let quick = ["tsc", "kvm-clock", "arch_sys_counter"].contains(&source.as_str()) || source.starts_with("hyperv");
    if quick {
        return fine(source, WANTED);
    }
    let fix = "echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource";
    hint(Warning, format!("{source}: every reading of the time is slow"), WANTED, fix)
}
