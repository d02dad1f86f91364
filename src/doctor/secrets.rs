//! Ways by which keys or plaintext leave the process that holds them, other than through a mount: disks, dumps, debuggers.
//!
//! What modelfs closes for itself (`mem`) stays open for the programs that read models, and those hold plaintext too.
//! Held by: `doctor::tests`, tests/doctor.sh.

use super::machine::why_no_passthrough;
use super::{Info, Machine, Said, Warning, fine, hint};

pub(super) fn clock(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a clock kept by a time service: expiry of versions is judged by it";
    match machine.facts.clock_kept? {
        true => fine("kept", WANTED),
        false => hint(Info, "nobody keeps this clock", WANTED, "timedatectl set-ntp true, or run chrony"),
    }
}

pub(super) fn secret_memory(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "memfd_secret: keys that root cannot read, and no hibernation image while mounted";
    match machine.facts.secret_memory? {
        true => fine("there", WANTED),
        false => {
            let fix = "boot with secretmem.enable=1 (Linux 5.14 and later; the default since 6.5)";
            hint(Warning, "not there: keys lie in locked memory", WANTED, fix)
        }
    }
}

pub(super) fn swap(machine: &Machine<'_>) -> Option<Said> {
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

/// Programs that read a core and keep nothing of it.
const DISCARD: [&str; 4] = ["/bin/false", "/bin/true", "/usr/bin/false", "/usr/bin/true"];

/// For what programs that read models hold: the memory of modelfs itself is in no core, wherever cores go
/// (PR_SET_DUMPABLE, MADV_DONTDUMP). Every distribution keeps cores, hence no more than [`Info`].
pub(super) fn core_pattern(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "cores that go nowhere: modelfs is in none, but a reader's holds what it copied";
    let pattern = machine.text("proc/sys/kernel/core_pattern")?;
    let nowhere = "sysctl 'kernel.core_pattern=|/bin/false'";
    match pattern.strip_prefix('|') {
        Some(piped) => {
            let handler = piped.split_whitespace().next().unwrap_or_default();
            if DISCARD.contains(&handler) {
                return fine(format!("cores go to {handler}, which keeps nothing"), WANTED);
            }
            // A limit of 0 (ulimit -c) does not hold for pipes: core(5).
            hint(Info, format!("cores are piped to {handler}, whatever ulimit -c says"), WANTED, nowhere)
        }
        // An empty name writes nothing, unless `.PID` is added to it: core(5).
        None if pattern.is_empty() && machine.text("proc/sys/kernel/core_uses_pid").as_deref() == Some("0") => {
            fine("cores have no name, and are not written", WANTED)
        }
        None => {
            let seen = format!("cores are written to disk as `{pattern}`, plaintext with them");
            hint(Info, seen, WANTED, format!("{nowhere}, or ulimit -c 0 for the programs that read models"))
        }
    }
}

pub(super) fn hibernation(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no image of the memory on a disk while keys are in it";
    let states = machine.text("sys/power/state")?;
    let off = machine.choice("sys/power/disk").is_some_and(|choice| choice == "disabled");
    if off || !states.split_whitespace().any(|state| state == "disk") {
        return fine("this machine cannot hibernate", WANTED);
    }
    match machine.facts.secret_memory? {
        true => fine("the kernel refuses it while secret memory is in use", WANTED),
        false => {
            let fix = "systemctl mask hibernate.target hybrid-sleep.target suspend-then-hibernate.target";
            hint(Warning, "allowed, and without secret memory nothing stops it", WANTED, fix)
        }
    }
}

pub(super) fn set_id_dumps(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no core of a program that has changed its rights";
    match machine.text("proc/sys/fs/suid_dumpable")?.as_str() {
        "0" => fine("none", WANTED),
        "2" => hint(Info, "written for root", WANTED, "sysctl fs.suid_dumpable=0"),
        _ => hint(Warning, "written for whoever started it", WANTED, "sysctl fs.suid_dumpable=0"),
    }
}

pub(super) fn ptrace_scope(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no debugger on a program that reads models but its own parent (modelfs itself lets none in)";
    match machine.text("proc/sys/kernel/yama/ptrace_scope")?.as_str() {
        "0" => hint(
            Info,
            "every process of a user may debug every other of his",
            WANTED,
            "sysctl kernel.yama.ptrace_scope=1",
        ),
        scope => fine(format!("scope {scope}"), WANTED),
    }
}

pub(super) fn init_on_free(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "memory of programs that read models zeroed when freed (modelfs wipes its own)";
    match freed_is_zeroed(machine)? {
        true => fine("on", WANTED),
        false => hint(Info, "off", WANTED, "boot with init_on_free=1 (costs a few percent)"),
    }
}

fn freed_is_zeroed(machine: &Machine<'_>) -> Option<bool> {
    let command_line = machine.text("proc/cmdline")?;
    let said = command_line.split_whitespace().rev().find_map(|word| word.strip_prefix("init_on_free="));
    let release = machine.text("proc/sys/kernel/osrelease").unwrap_or_default();
    let built_in = || {
        let config = machine.text(&format!("boot/config-{release}")).unwrap_or_default();
        config.lines().any(|line| line == "CONFIG_INIT_ON_FREE_DEFAULT_ON=y")
    };
    Some(said.map_or_else(built_in, |word| word == "1" || word == "y" || word == "on"))
}

/// Pages that readers hold are pinned by io_uring before they are cut off, and overwritten then ([`crate::mem::can_pin`]). It is
/// tried as well as looked up: seccomp forbids it in containers whatever the setting is.
pub(super) fn io_uring(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "io_uring, through which `lock` overwrites what readers still hold";
    if let Some(why) = why_no_passthrough(machine) {
        return fine(format!("not needed: {why}, so readers hold no pages of ours"), WANTED);
    }
    let setting = machine.text("proc/sys/kernel/io_uring_disabled");
    let (seen, fix) = match (setting.as_deref(), machine.facts.can_pin.as_ref()?) {
        (Some("2"), _) => ("off for all".to_owned(), "sysctl kernel.io_uring_disabled=0"),
        (_, Ok(())) => return fine("tried: it can be used", WANTED),
        (Some("1"), Err(why)) => (
            format!("for one group and CAP_SYS_ADMIN only, and not for us ({why})"),
            "sysctl kernel.io_uring_disabled=0, or be in the group of kernel.io_uring_group",
        ),
        (_, Err(why)) => (
            format!("it cannot be used ({why})"),
            "a seccomp profile that allows io_uring_setup, io_uring_enter and io_uring_register",
        ),
    };
    match freed_is_zeroed(machine) {
        Some(true) => {
            let seen =
                format!("{seen}: `lock` gives pages that readers hold back, and the kernel zeroes them (init_on_free)");
            hint(Info, seen, WANTED, fix)
        }
        Some(false) | None => {
            let seen = format!("{seen}: `lock` gives pages that readers hold back to the kernel unwiped");
            hint(Warning, seen, WANTED, format!("{fix}; else boot with init_on_free=1"))
        }
    }
}

pub(super) fn lockdown(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a kernel that not even root can read the memory of";
    match machine.choice("sys/kernel/security/lockdown")?.as_str() {
        "confidentiality" => fine("lockdown=confidentiality", WANTED),
        level => hint(Info, format!("lockdown is {level}"), WANTED, "boot with lockdown=confidentiality"),
    }
}

pub(super) fn privileges(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "known rights: root of the machine, or an ordinary user with fusermount3";
    let status = machine.text("proc/self/status")?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let capabilities = u64::from_str_radix(field("CapEff").unwrap_or("0"), 16).unwrap_or(0).count_ones();
    let filter = match field("Seccomp") {
        Some("2") => "a seccomp filter",
        Some("1") => "strict seccomp",
        Some(_) | None => "no seccomp filter",
    };
    let label = machine.text("proc/self/attr/current").filter(|label| !label.is_empty());
    let label = label.map_or("no profile".to_owned(), |label| format!("profile {}", label.trim_end_matches('\0')));
    let seen = format!("{capabilities} capabilities, {filter}, {label}");
    let initial = machine.in_initial_user_namespace();
    match capabilities {
        1.. if !initial => {
            let fix =
                "nothing where fusermount3 mounts or a descriptor is handed in; else run outside the user namespace";
            hint(Info, format!("{seen}; in a user namespace, where none of them counts for the machine"), WANTED, fix)
        }
        _ => fine(seen, WANTED),
    }
}
