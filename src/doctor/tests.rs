//! Every rule passes on a good machine and fails on one that differs in one thing; docs/DOCTOR.md names them all.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::config::Layers;
use crate::config::layers::split_list;
use crate::error::{Code, Error};
use crate::gpu::{Gpu, Seen};
use crate::vault::{Health, TokenSeen};

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
    ("proc/sys/kernel/core_pattern", "|/bin/false\n"),
    ("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny force\n"),
    ("sys/devices/system/node/has_memory", "0\n"),
    ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
    ("sys/class/bdi/0:44/read_ahead_kb", "1024\n"),
    ("sys/fs/fuse/connections/44/max_background", "65535\n"),
    ("proc/sys/kernel/io_uring_disabled", "0\n"),
    ("proc/sys/fs/suid_dumpable", "0\n"),
    ("proc/sys/kernel/yama/ptrace_scope", "1\n"),
    ("proc/cmdline", "quiet init_on_free=1\n"),
    ("proc/self/attr/current", "modelfs (enforce)\n"),
    ("sys/kernel/security/lockdown", "none integrity [confidentiality]\n"),
    ("sys/power/state", "freeze mem disk\n"),
    ("sys/power/disk", "[platform] shutdown reboot\n"),
    ("etc/modelfs/modelfs.toml", ""),
    ("etc/modelfs/key", "k"),
    ("etc/modelfs/trust", ""),
    ("etc/modelfs/policy.toml", ""),
    ("etc/modelfs/ca.pem", ""),
    ("usr/local/bin/modelfs", ""),
    ("var/lib/modelfs/floors/one", ""),
    ("var/log/modelfs/audit", ""),
    ("mnt/models/x", ""),
];

const WORDS: &str = "key=file:/etc/modelfs/key,trust_file=/etc/modelfs/trust,policy=/etc/modelfs/policy.toml,\
                     audit_file=/var/log/modelfs/audit,audit_file_bytes=4KiB,vault_addr=https://vault:8200,\
                     vault_ca_cert=/etc/modelfs/ca.pem,vault_token_file=/etc/modelfs/key";

/// What is meant on the good machine. Nothing is asked of the Vault that it names.
fn setup(words: &str) -> Setup {
    let mut layers = Layers::default();
    layers.mount_options(&split_list(words), false).expect("options");
    let vault_is_not_opened = Layers::default();
    let mut setup = Setup::of_layers(Ok(vault_is_not_opened), vec!["/etc/modelfs/modelfs.toml".into()], None, None);
    // These layers hold neither key nor signer; those of the words do.
    setup.wrong.clear();
    setup.access = Some(crate::config::Access::from_layers(&layers).expect("access"));
    setup.oversight = crate::config::Oversight::from_layers(&layers).expect("oversight");
    setup.policy = Some("/etc/modelfs/policy.toml".into());
    setup.state_dir = Some("/var/lib/modelfs".into());
    setup.program = Some("/usr/local/bin/modelfs".into());
    setup.mountpoint = Some("/mnt/models".into());
    setup
}

fn gpu() -> Gpu {
    Gpu {
        index: 0,
        uuid: "GPU-a".into(),
        name: "NVIDIA H200".into(),
        memory_total: Some(141 * GIB),
        memory_used: Some(GIB),
        utilisation_percent: Some(0),
    }
}

const NO_RIGHTS: (&str, &str) = ("proc/self/status", "CapEff:\t0000000000000000\n");

fn good_facts() -> Facts {
    Facts {
        cache_bytes: 8 * GIB,
        aes_library: "ring",
        secret_memory: Some(true),
        can_pin: Some(Ok(())),
        clock_kept: Some(true),
        mount: Some(MountFacts {
            device: "0:44".into(),
            passthrough: Some(true),
            no_passthrough: false,
            huge_page_short_bytes: Some(0),
        }),
        fuse: Some(Ok(Fuse { protocol: (7, 45), features: u64::MAX, passthrough: Ok(()) })),
        tmpfs_refuses_swap: Some(true),
        gpu: Some(Seen::Driver { version: "580".into(), gpus: vec![gpu()], lost: 0 }),
        setup: Some(setup(WORDS)),
        vault: Some(VaultSeen {
            address: "https://vault:8200".into(),
            in_clear: false,
            health: Ok(Health {
                initialised: true,
                sealed: false,
                standby: false,
                version: "1.13.0".into(),
                took: Duration::from_millis(3),
                ahead_s: Some(1),
            }),
            token: Some(Ok(TokenSeen {
                ttl: Some(Duration::from_secs(3600)),
                renewable: true,
                policies: vec!["default".into(), "server".into()],
            })),
            lacks: Vec::new(),
        }),
        store: Some(StoreSeen {
            url: "s3://models/prod".into(),
            in_clear: false,
            answered: Ok(Duration::from_millis(9)),
            models: Some(Ok(2)),
            ahead_s: Some(-2),
        }),
        baked: Some(Baked { files: 4000, ..Baked::default() }),
    }
}

/// The good machine with some files replaced (`None`: removed).
fn good_machine(changes: &[(&str, Option<&str>)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a temporary folder");
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().expect("inside")).expect("mkdir");
        std::fs::write(&path, text).expect("write");
        let mode = if path.ends_with("etc/modelfs/key") { 0o600 } else { 0o644 };
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
    };
    for (path, text) in GOOD {
        write(path, text);
    }
    for (path, text) in changes {
        match text {
            Some(text) => write(path, text),
            None => std::fs::remove_file(root.path().join(path)).expect("was there"),
        }
    }
    root
}

fn findings(changes: &[(&str, Option<&str>)], facts: &Facts) -> Vec<Finding> {
    examine(good_machine(changes).path(), facts)
}

/// The names of the rules that find something.
fn bad(findings: &[Finding]) -> Vec<&'static str> {
    let mut rules: Vec<_> = findings.iter().filter(|f| f.severity > Severity::Fine).map(|f| f.rule).collect();
    rules.sort_unstable();
    rules
}

fn found(findings: &[Finding], rule: &str) -> Finding {
    findings.iter().find(|finding| finding.rule == rule).unwrap_or_else(|| panic!("{rule} says nothing")).clone()
}

#[test]
fn on_a_good_machine_every_rule_speaks_and_every_rule_is_fine() {
    let all = findings(&[], &good_facts());
    let silent: Vec<_> = rule_names().filter(|name| !all.iter().any(|finding| finding.rule == *name)).collect();
    assert_eq!(silent, [""; 0]);
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
        (&[(URING, Some("2"))], "io-uring", Info, "zeroes them", "io_uring_disabled=0"),
        (&[("proc/sys/fs/suid_dumpable", Some("1"))], "set-id-dumps", Warning, "whoever started", "suid_dumpable=0"),
        (&[("proc/sys/fs/suid_dumpable", Some("2"))], "set-id-dumps", Info, "for root", "suid_dumpable=0"),
        (&[("proc/sys/kernel/yama/ptrace_scope", Some("0"))], "ptrace-scope", Info, "debug", "ptrace_scope=1"),
        (&[("proc/cmdline", Some("quiet"))], "init-on-free", Info, "off", "init_on_free=1"),
        (&[("proc/cmdline", Some("init_on_free=1 init_on_free=0"))], "init-on-free", Info, "off", "init_on_free=1"),
        (&[("sys/kernel/security/lockdown", Some("[none] integrity"))], "lockdown", Info, "none", "lockdown="),
        (&[("proc/self/uid_map", Some("0 1000 1"))], "privileges", Info, "user namespace", "outside"),
        (&[("etc/modelfs/key", None)], "secret-files", Stops, "key /etc/modelfs/key is not there", "ls -l"),
        (&[("etc/modelfs/trust", None)], "trusted-files", Stops, "is not there", "ls -l"),
        (
            &[("proc/sys/kernel/core_pattern", Some("|/usr/share/apport/apport -p%p"))],
            "core-pattern",
            Info,
            "/usr/share/apport/apport",
            "core_pattern=|/bin/false",
        ),
        (&[(CORES, Some("core\n"))], "core-pattern", Info, "to disk as `core`", "core_pattern=|/bin/false"),
        (&[(CORES, Some("\n"))], "core-pattern", Info, "to disk", "core_pattern=|/bin/false"),
        (&[(CORES, Some("|/bin/falsetto"))], "core-pattern", Info, "/bin/falsetto", "core_pattern=|/bin/false"),
    ];
    for (changes, rule, severity, seen, fix) in cases {
        let mut facts = good_facts();
        if *rule == "passthrough" {
            (facts.mount, facts.fuse) = (None, None);
        }
        let finding = found(&findings(changes, &facts), rule);
        assert_eq!(finding.severity, *severity, "{finding:?}");
        assert!(finding.seen.contains(seen), "{seen}: {finding:?}");
        assert!(finding.fix.as_ref().expect("a fix").contains(fix), "{fix}: {finding:?}");
    }
}

const URING: &str = "proc/sys/kernel/io_uring_disabled";
const CORES: &str = "proc/sys/kernel/core_pattern";

/// The value that docs/HARDENING.md sets is one of them.
#[test]
fn cores_that_go_nowhere_are_fine_and_the_two_pages_agree_on_how() {
    let page = include_str!("../../docs/HARDENING.md");
    let set = page.lines().find_map(|line| line.strip_prefix("kernel.core_pattern=")).expect("a block sets it");
    for pattern in [set, "|/bin/true", "|/usr/bin/false %p"] {
        let all = findings(&[(CORES, Some(pattern))], &good_facts());
        assert_eq!(bad(&all), [""; 0], "{pattern}");
    }
    let unnamed = [(CORES, Some("\n")), ("proc/sys/kernel/core_uses_pid", Some("0\n"))];
    assert_eq!(bad(&findings(&unnamed, &good_facts())), [""; 0]);
    let told = found(&findings(&[(CORES, Some("core"))], &good_facts()), "core-pattern");
    assert!(told.fix.expect("a fix").contains(&format!("kernel.core_pattern={set}")), "{set}");
    assert!(!told.severity.ge(&Warning), "what every distribution has stops no strict start");
}

/// Whether `lock` wipes is asked of the kernel; its setting alone does not tell it of a group, of root, of seccomp.
#[test]
fn a_lock_that_cannot_wipe_fails_a_strict_check_whoever_forbids_io_uring() {
    let tried = |setting, can_pin: Result<(), &str>| {
        let facts = Facts { can_pin: Some(can_pin.map_err(Into::into)), ..good_facts() };
        found(&findings(&[(URING, setting), ("proc/cmdline", Some("quiet"))], &facts), "io-uring")
    };
    for (setting, can_pin, fix) in [
        (Some("2"), Err("EPERM"), "io_uring_disabled=0"),
        (Some("2"), Ok(()), "io_uring_disabled=0"),
        (Some("1"), Err("EPERM"), "io_uring_group"),
        (Some("0"), Err("EPERM"), "seccomp profile"),
        (None, Err("ENOSYS"), "seccomp profile"),
    ] {
        let finding = tried(setting, can_pin);
        assert!(finding.stops_strict() && finding.security, "{finding:?}");
        assert!(
            finding.seen.contains("unwiped") && finding.fix.as_ref().is_some_and(|told| told.contains(fix)),
            "{finding:?}"
        );
    }
    for setting in [Some("0"), Some("1"), None] {
        assert_eq!(tried(setting, Ok(())).severity, Severity::Fine, "{setting:?}: it is allowed to us");
    }
    let seen = |changes: &[_], spoil: fn(&mut Facts)| {
        let mut facts = Facts { can_pin: Some(Err("EPERM".into())), ..good_facts() };
        spoil(&mut facts);
        let finding = found(&findings(&[&[("proc/cmdline", Some("quiet"))], changes].concat(), &facts), "io-uring");
        assert_eq!(finding.severity, Severity::Fine, "{finding:?}");
        finding.seen
    };
    assert!(seen(&[(NO_RIGHTS.0, Some(NO_RIGHTS.1))], |_| {}).contains("CAP_SYS_ADMIN"));
    assert!(seen(&[], |f| f.mount.as_mut().expect("given").no_passthrough = true).contains("no-passthrough is set"));
    let without = |f: &mut Facts| f.setup = Some(Setup { no_passthrough: true, ..Setup::default() });
    assert!(seen(&[], without).contains("no-passthrough is set"));
    let old = |f: &mut Facts| {
        f.fuse = Some(Ok(Fuse { protocol: (7, 38), features: u64::MAX, passthrough: Err("ENOTTY".into()) }))
    };
    assert!(seen(&[], old).contains("ENOTTY"));
}

/// docs/HARDENING.md says that it is never needed.
#[test]
fn nobody_is_told_to_do_without_seccomp() {
    let mut facts = good_facts();
    facts.fuse = Some(Err("seccomp says no".into()));
    let fix = found(&findings(&[], &facts), "mount-right").fix.expect("a fix");
    assert!(fix.contains("profile") && !fix.contains("seccomp=unconfined"), "{fix}");
}

/// What the layers of these words say of a store, a mount or neither.
fn configured(words: &str, store: Option<&str>, mountpoint: Option<&str>) -> Finding {
    let mut layers = Layers::default();
    layers.mount_options(&split_list(words), false).expect("options");
    let store = store.map(|typed| (typed, crate::config::parse_store(typed).expect("a store")));
    let setup = Setup::of_layers(Ok(layers), Vec::new(), store, mountpoint.map(Into::into));
    let facts = Facts { setup: Some(setup), ..good_facts() };
    found(&findings(&[], &facts), "configuration")
}

#[test]
fn what_config_check_refuses_the_doctor_refuses_and_what_it_tells_the_doctor_tells() {
    const WHOLE: &str = "key=file:/etc/modelfs/key,trust=/etc/modelfs/trust";
    assert_eq!(configured(WHOLE, Some("/srv/models"), None).severity, Severity::Fine, "the detector: nothing is wrong");
    for (more, told) in [
        ("model=a,require=b", "add --model b"),
        ("on_key_loss=lock", "nothing to watch"),
        ("uid=4000000", "add --allow-other"),
        ("cache=900TiB", "give less"),
        ("umask=999", "octal"),
        ("verify=none", "neither strict nor aead"),
        ("audit=required", "nowhere to write"),
        ("trust_on_first_use", "drop --trust-on-first-use"),
        ("log_file=/no/such/folder/log", "there is no folder"),
    ] {
        let finding = configured(&format!("{WHOLE},{more}"), None, None);
        assert_eq!(finding.severity, Stops, "{more}: {finding:?}");
        assert!(finding.seen.contains(told), "{told}: {finding:?}");
    }
    let finding = configured(&format!("{WHOLE},model=a,require=b,umask=999"), None, None);
    assert!(finding.seen.contains("octal") && finding.seen.contains("add --model b"), "all of it: {finding:?}");
    let finding = configured(&format!("{WHOLE},allow_other,umask=0222"), None, None);
    assert_eq!(finding.severity, Info, "{finding:?}");
    assert!(finding.seen.contains("every user of this machine"), "{finding:?}");
}

/// Which file is not there, or open to others, is for the rules that name the command.
#[test]
fn files_that_options_name_are_left_to_the_rules_about_files() {
    let finding = configured("key=file:/no/such/key,trust=/no/such/trust", Some("/srv/models"), None);
    assert_eq!(finding.severity, Severity::Fine, "{finding:?}");
}

#[test]
fn a_store_without_a_key_or_a_signer_cannot_be_mounted_and_a_bare_machine_may_be_without() {
    let (key, trust) = ("key=file:/etc/modelfs/key", "trust=/etc/modelfs/trust");
    for (words, told) in [(trust, "no key given"), (key, "no signer is trusted")] {
        let finding = configured(words, Some("/srv/models"), None);
        assert!(finding.severity == Stops && finding.seen.contains(told), "{told}: {finding:?}");
        let finding = configured(words, None, None);
        assert!(finding.severity == Info && finding.seen.contains(told), "{told}: {finding:?}");
        let finding = configured(words, None, Some("/mnt/models"));
        assert_eq!(finding.severity, Severity::Fine, "a mount has its own: {finding:?}");
    }
    let catalog = configured(trust, Some("vault-kv://secret/models"), None);
    assert_eq!(catalog.severity, Severity::Fine, "its records bring their keys: {catalog:?}");
    let pinned = "manifest=sha256:51d0e6f0a9c0a1a0d7a2c9c1c5e1d4f3b2a1908f7e6d5c4b3a29181716151413,model=a";
    assert_eq!(configured(&format!("{key},{pinned}"), Some("/srv/models"), None).severity, Severity::Fine);
}

#[test]
fn what_is_not_in_files_is_judged_as_well() {
    let mut facts = good_facts();
    facts.secret_memory = Some(false);
    facts.clock_kept = Some(false);
    facts.fuse = None;
    let mount = facts.mount.as_mut().expect("given");
    mount.passthrough = Some(false);
    mount.huge_page_short_bytes = Some(64 << 20);
    let all = findings(&[], &facts);
    for (rule, severity) in [
        ("secret-memory", Warning),
        ("clock", Info),
        ("passthrough", Warning),
        ("huge-pages-of-mount", Warning),
        ("hibernation", Warning),
    ] {
        assert_eq!(found(&all, rule).severity, severity, "{rule}");
    }
    let no_config = findings(&[("boot/config-6.12.8-generic", Some("CONFIG_FUSE_FS=y\n"))], &facts);
    assert!(found(&no_config, "passthrough").fix.expect("a fix").contains("CONFIG_FUSE_PASSTHROUGH"));
    facts.mount.as_mut().expect("given").no_passthrough = true;
    let asked_for = found(&findings(&[], &facts), "passthrough");
    assert!(asked_for.severity == Severity::Fine && asked_for.seen.contains("no-passthrough"), "{asked_for:?}");
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
    let nonsense: Vec<(&str, Option<&str>)> =
        GOOD.iter().filter(|(path, _)| *path != "dev/fuse").map(|(path, _)| (*path, Some("\u{fffd}[ :,-"))).collect();
    findings(&nonsense, &good_facts());
}

#[test]
fn the_worst_comes_first() {
    let all = findings(&[("dev/fuse", None), ("proc/swaps", Some("x\ny\n"))], &good_facts());
    assert_eq!((all[0].rule, all[1].rule), ("fuse-device", "swap"));
}

/// Each spoils one thing of the good machine's facts; that rule finds it, and no other does.
#[test]
fn each_fact_that_is_bad_is_found_by_its_rule_and_by_no_other() {
    type Spoil = fn(&mut Facts);
    fn vault(facts: &mut Facts) -> &mut VaultSeen {
        facts.vault.as_mut().expect("given")
    }
    fn health(facts: &mut Facts) -> &mut Health {
        vault(facts).health.as_mut().expect("given")
    }
    fn token(facts: &mut Facts) -> &mut TokenSeen {
        vault(facts).token.as_mut().expect("given").as_mut().expect("good")
    }
    fn store(facts: &mut Facts) -> &mut StoreSeen {
        facts.store.as_mut().expect("given")
    }
    fn away(code: Code) -> Error {
        Error::new(code, "so it said")
    }
    let cases: &[(&str, Severity, &str, Spoil)] = &[
        ("fuse-features", Warning, "not parallel-dirops", |f| {
            f.fuse = Some(Ok(Fuse { protocol: (7, 40), features: !(1 << 18), passthrough: Ok(()) }));
        }),
        ("mount-right", Stops, "seccomp says no", |f| {
            f.fuse = Some(Err("seccomp says no".into()));
        }),
        ("io-uring", Info, "says seccomp", |f| f.can_pin = Some(Err("EPERM, says seccomp".into()))),
        ("tmpfs-noswap", Warning, "page by page", |f| f.tmpfs_refuses_swap = Some(false)),
        ("gpu", Warning, "fell", |f| f.gpu = Some(Seen::Silent("fell off the bus".into()))),
        ("gpu", Warning, "1 that the driver does not reach", |f| {
            f.gpu = Some(Seen::Driver { version: "580".into(), gpus: vec![gpu()], lost: 1 });
        }),
        ("configuration", Stops, "so it said", |f| {
            let (program, state_dir) = (Some("/usr/local/bin/modelfs".into()), Some("/var/lib/modelfs".into()));
            f.setup = Some(Setup { refused: Some(away(Code::Usage)), program, state_dir, ..Setup::default() });
        }),
        ("trust", Warning, "signed first", |f| f.setup = Some(setup("trust_on_first_use,key=file:/etc/modelfs/key"))),
        ("verify", Warning, "tags alone", |f| f.setup.as_mut().expect("given").tags_only = true),
        ("audit-room", Warning, "a file takes", |f| {
            f.setup.as_mut().expect("given").oversight.audit.file_bytes_max = u64::MAX;
        }),
        ("vault", Stops, "sealed", |f| health(f).sealed = true),
        ("vault", Stops, "not initialised", |f| health(f).initialised = false),
        ("vault", Stops, "so it said", |f| vault(f).health = Err(away(Code::VaultUnreachable))),
        ("vault-tls", Warning, "in clear", |f| vault(f).in_clear = true),
        ("vault-token", Stops, "so it said", |f| vault(f).token = Some(Err(away(Code::VaultDenied)))),
        ("vault-token", Warning, "root token", |f| token(f).policies = vec!["root".into()]),
        ("vault-token", Info, "never ends", |f| token(f).ttl = None),
        ("vault-token", Warning, "30 s", |f| {
            (token(f).ttl, token(f).renewable) = (Some(Duration::from_secs(30)), false);
        }),
        ("vault-rights", Stops, "transit/decrypt/m", |f| vault(f).lacks = vec!["transit/decrypt/m".into()]),
        ("store", Stops, "so it said", |f| {
            (store(f).answered, store(f).models) = (Err(away(Code::Unreachable)), None);
        }),
        ("store", Warning, "2000 ms", |f| store(f).answered = Ok(Duration::from_secs(2))),
        ("store-access", Stops, "so it said", |f| store(f).models = Some(Err(away(Code::StoreDenied)))),
        ("store-access", Warning, "listing", |f| store(f).models = Some(Err(away(Code::Deadline)))),
        ("store-access", Info, "no model", |f| store(f).models = Some(Ok(0))),
        ("store-tls", Warning, "in clear", |f| store(f).in_clear = true),
        ("baked-models", Warning, "/app/llama.gguf", |f| {
            f.baked.as_mut().expect("given").found.push("/app/llama.gguf".into());
        }),
        ("baked-models", Warning, "not all was seen", |f| {
            f.baked.as_mut().expect("given").unseen = Some("the time was over".into());
        }),
        ("clock-skew", Warning, "the store is 61 s behind", |f| store(f).ahead_s = Some(-61)),
        ("clock-skew", Warning, "Vault is 3600 s ahead", |f| health(f).ahead_s = Some(3600)),
        ("clock-skew", Stops, "the store is 3600 s ahead", |f| store(f).ahead_s = Some(3600)),
    ];
    for (rule, severity, seen, spoil) in cases {
        let mut facts = good_facts();
        spoil(&mut facts);
        let all = findings(&[], &facts);
        assert_eq!(bad(&all), [*rule], "{seen}");
        let finding = found(&all, rule);
        assert_eq!(finding.severity, *severity, "{finding:?}");
        assert!(finding.seen.contains(seen) && finding.fix.is_some(), "{seen}: {finding:?}");
    }
}

/// The same for the modes of files, real ones below a root of its own.
#[test]
fn each_mode_that_is_too_wide_is_found_by_its_rule_and_by_no_other() {
    let cases: &[(&str, u32, &str, Severity, &str)] = &[
        ("etc/modelfs/key", 0o644, "secret-files", Stops, "chmod 600 /etc/modelfs/key"),
        ("etc/modelfs/key", 0o640, "secret-files", Stops, "chmod 600 /etc/modelfs/key"),
        ("etc/modelfs/trust", 0o664, "trusted-files", Stops, "chmod go-w /etc/modelfs/trust"),
        ("etc/modelfs/ca.pem", 0o664, "trusted-files", Warning, "chmod go-w /etc/modelfs/ca.pem"),
        ("var/lib", 0o777, "folders", Warning, "chmod go-w /var/lib"),
        ("mnt", 0o777, "folders", Warning, "chmod go-w /mnt"),
        ("usr/local/bin/modelfs", 0o4755, "program", Warning, "chmod a-s /usr/local/bin/modelfs"),
        ("var/lib/modelfs/floors", 0o777, "world-writable", Warning, "chmod o-w /var/lib/modelfs/floors"),
    ];
    for (path, mode, rule, severity, fix) in cases {
        let root = good_machine(&[]);
        std::fs::set_permissions(root.path().join(path), PermissionsExt::from_mode(*mode)).expect("chmod");
        let all = examine(root.path(), &good_facts());
        assert_eq!(bad(&all), [*rule], "{path}");
        let finding = found(&all, rule);
        assert_eq!(finding.severity, *severity, "{finding:?}");
        assert!(finding.fix.as_ref().expect("a fix").contains(fix), "{fix}: {finding:?}");
    }
    let planted = good_machine(&[("etc/modelfs/step", Some(""))]);
    std::fs::set_permissions(planted.path().join("etc/modelfs/step"), PermissionsExt::from_mode(0o4755))
        .expect("chmod");
    let all = examine(planted.path(), &good_facts());
    assert_eq!(bad(&all), ["set-id"]);
    assert_eq!(found(&all, "set-id").fix.as_deref(), Some("chmod a-s /etc/modelfs/step"));
}

#[test]
fn an_image_is_looked_at_whole_and_its_own_set_uid_programs_are_harmless_without_new_privileges() {
    let plant = |root: &Path, path: &str, mode| {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("inside")).expect("mkdir");
        std::fs::write(&path, "").expect("write");
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
    };
    let image = good_machine(&[(".dockerenv", Some(""))]);
    assert_eq!(bad(&examine(image.path(), &good_facts())), [""; 0]);
    plant(image.path(), "usr/bin/su", 0o4755);
    let all = examine(image.path(), &good_facts());
    // Only root's own programs are the system's; as another user the test plants one that is not.
    // SAFETY: geteuid only reads this process's credentials.
    let severity = if unsafe { libc::geteuid() } == 0 { Info } else { Warning };
    assert_eq!((bad(&all), found(&all, "set-id").severity), (vec!["set-id"], severity));
    if severity == Info {
        let status = "CapEff:\t000001ffffffffff\nNoNewPrivs:\t1\n";
        std::fs::write(image.path().join("proc/self/status"), status).expect("write");
        assert_eq!(bad(&examine(image.path(), &good_facts())), [""; 0]);
    }
    plant(image.path(), "opt/app/helper", 0o4755);
    plant(image.path(), "srv/shared", 0o666);
    let all = examine(image.path(), &good_facts());
    assert_eq!(bad(&all), ["set-id", "world-writable"]);
    assert!(found(&all, "set-id").seen.contains("/opt/app/helper"), "{all:?}");
    assert!(found(&all, "world-writable").seen.contains("/srv/shared"), "{all:?}");
}

#[test]
fn a_link_in_place_of_a_secret_is_refused_and_one_in_place_of_a_certificate_is_followed() {
    let root = good_machine(&[]);
    for name in ["key", "ca.pem"] {
        let path = root.path().join("etc/modelfs").join(name);
        std::fs::rename(&path, path.with_extension("real")).expect("rename");
        std::os::unix::fs::symlink(path.with_extension("real"), &path).expect("link");
    }
    let all = examine(root.path(), &good_facts());
    assert_eq!(bad(&all), ["secret-files"]);
    assert!(found(&all, "secret-files").seen.contains("is a link"), "{all:?}");
}

#[test]
fn folders_that_links_lead_through_are_judged_like_those_that_are_named() {
    // The folder of the key, a folder above it, the folder of what was seen, and a link to a link.
    for (link, to, links) in [
        ("etc/modelfs", "srv/shared/modelfs", &[("etc/modelfs", "../srv/shared/modelfs")][..]),
        ("etc", "srv/shared/etc", &[("etc", "srv/shared/etc")]),
        ("var/lib/modelfs", "srv/shared/state", &[("var/lib/modelfs", "../../srv/./shared/../shared/state")]),
        ("mnt", "srv/shared/mnt", &[("mnt", "srv/near"), ("srv/near", "shared/mnt")]),
    ] {
        let root = good_machine(&[("srv/shared/x", Some("")), ("srv/shared/link/x", Some(""))]);
        std::fs::rename(root.path().join(link), root.path().join(to)).expect("moved");
        for (path, to) in links {
            std::os::unix::fs::symlink(to, root.path().join(path)).expect("linked");
        }
        assert_eq!(bad(&examine(root.path(), &good_facts())), [""; 0], "{link}");
        let mode = |mode| std::fs::set_permissions(root.path().join("srv/shared"), PermissionsExt::from_mode(mode));
        mode(0o777).expect("chmod");
        let all = examine(root.path(), &good_facts());
        assert_eq!(bad(&all), ["folders"], "{link}");
        assert_eq!(found(&all, "folders").fix.as_deref(), Some("chmod go-w /srv/shared"), "{link}");
        mode(0o755).expect("chmod");
        // And what lies beside the files there.
        std::fs::write(root.path().join(to).join("notes"), "").expect("written");
        std::fs::set_permissions(root.path().join(to).join("notes"), PermissionsExt::from_mode(0o666)).expect("chmod");
        let beside = if ["etc", "mnt"].contains(&link) { &[""; 0][..] } else { &["world-writable"] };
        assert_eq!(bad(&examine(root.path(), &good_facts())), beside, "{link}");
    }
    // A circle is followed to no end.
    let root = good_machine(&[("var/lib/modelfs/floors/one", None)]);
    std::fs::remove_dir_all(root.path().join("var/lib/modelfs")).expect("removed");
    std::os::unix::fs::symlink("modelfs", root.path().join("var/lib/modelfs")).expect("linked");
    examine(root.path(), &good_facts());
}

#[test]
fn one_rule_can_be_asked_for_and_a_mount_of_anothers_making_needs_no_device() {
    let root = good_machine(&[("dev/fuse", None), ("proc/swaps", Some("x\ny\n"))]);
    let one = examine_by(root.path(), &good_facts(), &["swap".to_owned()]);
    assert_eq!(one.iter().map(|finding| finding.rule).collect::<Vec<_>>(), ["swap"]);
    let mut facts = good_facts();
    facts.setup.as_mut().expect("given").given = true;
    assert_eq!(bad(&examine(root.path(), &facts)), ["swap"]);
}

#[test]
fn the_page_has_a_row_for_every_rule_with_its_severities_and_for_no_other() {
    let page = include_str!("../../docs/DOCTOR.md");
    let rows = page.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split('|');
        let name = cells.next()?.trim().trim_end_matches('`');
        Some((name, cells.next()?.trim()))
    });
    let told: Vec<(&str, &str)> = rows.collect();
    let names: Vec<&str> = told.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, rule_names().collect::<Vec<_>>(), "docs/DOCTOR.md, in the order of the rules");
    for rule in RULES {
        let (_, kind) = told.iter().find(|(name, _)| *name == rule.name).expect("compared above");
        assert_eq!(kind.contains("secrets"), rule.security, "{}: {kind}", rule.name);
    }
}

/// A rule that no test spoils would be believed for nothing.
#[test]
fn every_rule_is_spoiled_for_real_in_a_step_or_listed_as_imitated_and_none_is_both() {
    let page = include_str!("../../docs/DOCTOR.md");
    let steps = include_str!("../../tests/doctor.sh");
    let (_, lists) = page.split_once("\nSpoiled for real:\n").expect("the first list");
    let (real, imitated) = lists.split_once("\nImitated").expect("the second list");
    fn named(list: &str) -> Vec<&str> {
        list.split('`').skip(1).step_by(2).filter(|word| rule_names().any(|rule| rule == *word)).collect()
    }
    let (real, imitated) = (named(real), named(imitated));
    let mut both = [real.clone(), imitated].concat();
    both.sort_unstable();
    let mut all: Vec<&str> = rule_names().collect();
    all.sort_unstable();
    assert_eq!(both, all, "docs/DOCTOR.md: each rule once, in one of the lists");
    for rule in real {
        let complains = ["info", "warning", "error"].iter().any(|word| {
            let wanted = format!("{rule} {word}");
            steps.match_indices(&wanted).any(|(at, _)| {
                // As one of those that a step wants, not as one that it leaves out.
                steps[..at].ends_with(['"', ',', '\''])
            })
        });
        // Its weight is another where the kernel zeroes what it frees.
        let io_uring = rule == "io-uring" && steps.contains("\"io-uring $(");
        assert!(complains || io_uring, "tests/doctor.sh has no step for {rule}");
    }
}

#[test]
fn weights_are_found_in_an_image_and_an_image_that_was_not_seen_whole_is_not_called_clean() {
    let image = tempfile::tempdir().expect("a temporary folder");
    let clean = files::baked(image.path(), Duration::from_secs(60));
    assert_eq!((clean.found, clean.unseen), (vec![], None));
    let mut weights = b"GGUF\x03\0\0\0".to_vec();
    weights.extend([0; 16]);
    weights.resize(2 << 20, 7);
    std::fs::create_dir(image.path().join("app")).expect("mkdir");
    std::fs::write(image.path().join("app/llama.gguf"), weights).expect("write");
    let found = files::baked(image.path(), Duration::from_secs(60)).found;
    assert_eq!(found, [Path::new("/app/llama.gguf")]);
    let cut_off = files::baked(image.path(), Duration::ZERO);
    assert!(cut_off.unseen.expect("no time").contains("was over"));
    assert!(files::baked(&image.path().join("nothing"), Duration::from_secs(60)).unseen.is_some());
}
