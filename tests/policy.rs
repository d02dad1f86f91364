//! Who sees, who opens, who is refused: through the kernel, with real users and supplementary groups, and every refusal told.
//!
//! Askers are other processes under other users (setpriv). What they are told is compared by errno, as their programs print
//! it. The order matters where the kernel could answer one by what it told another: the allowed one asks first.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/program.rs"]
mod program;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fixture::{Fixture, Random, Style};
use modelfs::cache::{Cache, CacheLimits, Model};
use modelfs::crypto::{self, Verify};
use modelfs::error::{Code, Error};
use modelfs::format::ManifestDigest;
use modelfs::fuse::attach::{self, Attachment, MountLook};
use modelfs::fuse::{Behaviour, ModelFs, OpenPolicy, Place, Session};
use modelfs::mem::{Arena, ArenaPlan};
use modelfs::policy::Policy;
use modelfs::read::Reader;
use modelfs::telemetry::Telemetry;
use modelfs::telemetry::events::{Event, Kind, Outcome, Severity, Sink};
use modelfs::vfs::{Layout, Ownership, Shown, Vfs};
use program::{Program, can_mount, run_ok, skip};
use sha2::Digest;

const BIG: &str = "model.safetensors";
const BIG_BYTES: usize = (3 << 20) + 77;
const GROUP: u32 = 4300;

/// uid, primary group, supplementary groups.
type User = (u32, u32, &'static [u32]);
const ROOT: User = (0, 0, &[]);
/// Of the group by its supplementary groups alone.
const TRAINER: User = (4301, 4301, &[27, GROUP]);
/// Of the group by its primary one.
const MEMBER: User = (4302, GROUP, &[]);
const STRANGER: User = (4303, 4303, &[]);
/// Of the group, and taken out by name.
const BANNED: User = (4304, GROUP, &[GROUP]);

const RULES: &str = "
[[rule]]
name = \"banned\"
uids = [4304]
models = [\"*\"]
may = \"none\"

[[rule]]
name = \"trainers\"
gids = [4300]
models = [\"acme/secret\", \"lone/*\"]
may = \"read\"

[[rule]]
name = \"everybody\"
everybody = true
models = [\"acme/shown\"]
may = \"see\"

[[rule]]
name = \"open\"
everybody = true
models = [\"open\"]
may = \"read\"
";

/// So that no test of something else blocks anybody.
const PATIENT: &str = "[denials]\ncount = 1000\n";

const MODELS: [&str; 4] = ["acme/secret", "acme/shown", "lone/hidden", "open"];

#[derive(Default)]
struct Notes {
    events: Mutex<Vec<Event>>,
    full: std::sync::atomic::AtomicBool,
}

impl Sink for Notes {
    fn take(&self, event: &Event) -> modelfs::error::Result<()> {
        self.events.lock().expect("a test").push(event.clone());
        if self.full.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(Error::new(Code::Audit, "the audit log is full"));
        }
        Ok(())
    }
}

impl Notes {
    fn of(&self, kind: Kind) -> Vec<Event> {
        self.events.lock().expect("a test").iter().filter(|event| event.kind == kind).cloned().collect()
    }

    fn clear(&self) {
        self.events.lock().expect("a test").clear();
    }

    /// Whether somebody was denied something of a model.
    fn has_denial(&self, kind: Kind, uid: u32, model: &str) -> bool {
        self.of(kind).iter().any(|event| {
            event.outcome == Outcome::Denied
                && event.code == Some(Code::Policy)
                && event.actor.uid == Some(uid)
                && event.subject.model.as_deref() == Some(model)
        })
    }
}

struct Mount {
    fs: ModelFs,
    notes: Arc<Notes>,
    folder: tempfile::TempDir,
    fixture: Fixture,
    cache: Cache,
    attachment: Attachment,
    session: Option<fuser::BackgroundSession>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Mount {
    fn new(open: OpenPolicy, layout: Layout, rules: Option<&str>) -> Mount {
        Mount::of_files(open, layout, rules, |random| {
            vec![("config.json".to_owned(), b"{}".to_vec()), (BIG.to_owned(), random.bytes(BIG_BYTES))]
        })
    }

    fn of_files(
        open: OpenPolicy,
        layout: Layout,
        rules: Option<&str>,
        files: impl FnOnce(&mut Random) -> Vec<(String, Vec<u8>)>,
    ) -> Mount {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("rt");
        let mut random = Random::announced("policy");
        let files = files(&mut random);
        let fixture = runtime.block_on(Fixture::seal(files, Style::default(), &mut random));
        let telemetry = Arc::new(Telemetry::default());
        let notes = Arc::new(Notes::default());
        telemetry.events.add(notes.clone());
        let budget = 64 << 20;
        let arena = Arena::open(ArenaPlan { bytes: budget }).expect("arena");
        let handle = runtime.handle().clone();
        let cache = Cache::new(arena, budget, CacheLimits::default(), handle.clone(), telemetry).expect("cache");
        let reader = Reader::new(cache.clone(), Duration::from_secs(30)).expect("reader");
        let model = |(serial, name): (usize, &&str)| {
            let opened = crypto::open_manifest(&fixture.manifest, fixture.dek()).expect("opens");
            let digest = ManifestDigest::of(&fixture.manifest);
            let (serial, name) = (serial as u32, (*name).to_owned());
            Shown {
                model: Arc::new(Model::new(serial, name, digest, opened, fixture.store.clone(), Verify::Strict)),
                current: true,
            }
        };
        let models = MODELS.iter().enumerate().map(model).collect();
        let ownership = Ownership { uid: 0, gid: 0, umask: 0o222 };
        let vfs = Vfs::with_layout(layout, models, ownership, cache.clone()).expect("a tree");
        let fs = ModelFs::new(vfs, reader, Behaviour { open, ..Behaviour::default() }, handle);
        cache.add_gate(fs.gate());
        let folder = tempfile::tempdir().expect("a folder");
        fs.set_place(Place {
            mountpoint: folder.path().to_owned(),
            store: "memory".into(),
            service_account: Some("ml/llama".into()),
            pod: None,
        });
        fs.set_policy(rules.map(|rules| Policy::parse(rules).expect("a policy")));
        let look = MountLook { source: "memory".into(), allow_other: true };
        let (session, attachment) = attach::attach(fs.clone(), folder.path(), &look).expect("mounted");
        let (session, runtime) = (Some(session), Some(runtime));
        Mount { fs, notes, folder, fixture, cache, attachment, session, runtime }
    }

    fn set_policy(&self, rules: &str) {
        self.fs.set_policy(Some(Policy::parse(rules).expect("a policy")));
    }

    fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join(below)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.attachment.unmount().expect("unmount") {
            if Instant::now() > deadline {
                self.attachment.detach().expect("detach");
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(session) = self.session.take() {
            let _ = session.join();
        }
        self.fs.drop_backings(true);
        self.cache.wipe_all(true);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_millis(200));
        }
    }
}

fn command_as((uid, gid, groups): User, program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &uid.to_string(), "--regid", &gid.to_string()]);
    if groups.is_empty() {
        command.arg("--clear-groups");
    } else {
        let groups: Vec<String> = groups.iter().map(u32::to_string).collect();
        command.args(["--groups", &groups.join(",")]);
    }
    command.args(["--", program]).env("LC_ALL", "C").current_dir("/").stdin(Stdio::null());
    command
}

/// What a program was told, by its words.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Let(Vec<u8>),
    NotFound,
    Denied,
    Busy,
}

fn told(output: Output) -> Told {
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    match words {
        _ if output.status.success() => Told::Let(output.stdout),
        words if words.contains("No such file") => Told::NotFound,
        words if words.contains("Permission denied") => Told::Denied,
        words if words.contains("resource busy") => Told::Busy,
        words => panic!("{}: {words}", output.status),
    }
}

fn cat(user: User, path: &Path) -> Told {
    told(command_as(user, "cat").arg(path).output().expect("setpriv"))
}

fn stat(user: User, path: &Path) -> Told {
    match told(command_as(user, "stat").args(["-c", "%s"]).arg(path).output().expect("setpriv")) {
        Told::Let(_) => Told::Let(Vec::new()),
        other => other,
    }
}

fn seen() -> Told {
    Told::Let(Vec::new())
}

/// Names in a folder, sorted.
fn list(user: User, path: &Path) -> Vec<String> {
    match told(command_as(user, "ls").args(["-1", "-a"]).arg(path).output().expect("setpriv")) {
        Told::Let(names) => {
            let names = String::from_utf8(names).expect("utf-8");
            names.lines().filter(|name| !matches!(*name, "." | "..")).map(str::to_owned).collect()
        }
        other => panic!("{path:?} is not listed: {other:?}"),
    }
}

fn rules(more: &str) -> String {
    format!("{more}{RULES}")
}

// ---- Who sees and who reads ----------------------------------------------------------------------------------------

/// The matrix, twice over, so that every answer comes once before and once after somebody else was told otherwise; served
/// through the daemon and past it.
#[test]
fn each_sees_and_reads_what_the_first_rule_that_fits_grants_and_every_refusal_is_told() {
    if !can_mount() {
        return;
    }
    for open in [OpenPolicy::Lazy, OpenPolicy::Whole] {
        let mount = Mount::new(open, Layout::Plain, Some(&rules(PATIENT)));
        let big = &mount.fixture.files[1].1;
        let file = |model: &str| mount.path(model).join(BIG);
        for round in 0..2 {
            let why = |user: User| format!("{user:?}, {open:?}, round {round}");
            for user in [TRAINER, MEMBER] {
                assert_eq!(list(user, &mount.path("")), ["acme", "lone", "open"], "{}", why(user));
                assert_eq!(list(user, &mount.path("acme")), ["secret", "shown"], "{}", why(user));
                assert_eq!(list(user, &mount.path("lone")), ["hidden"], "{}", why(user));
                for model in ["acme/secret", "lone/hidden", "open"] {
                    assert!(cat(user, &file(model)) == Told::Let(big.clone()), "{model}, {}", why(user));
                }
                assert_eq!(cat(user, &file("acme/shown")), Told::Denied, "{}", why(user));
            }
            for user in [STRANGER, ROOT] {
                assert_eq!(list(user, &mount.path("")), ["acme", "open"], "{}", why(user));
                assert_eq!(list(user, &mount.path("acme")), ["shown"], "{}", why(user));
                assert_eq!(list(user, &mount.path("acme/shown")), ["config.json", BIG], "{}", why(user));
                for name in ["acme/secret", "lone", "lone/hidden", "acme/nowhere"] {
                    assert_eq!(stat(user, &mount.path(name)), Told::NotFound, "{name}, {}", why(user));
                }
                assert_eq!(stat(user, &file("acme/shown")), seen(), "{}", why(user));
                assert_eq!(cat(user, &file("acme/shown")), Told::Denied, "{}", why(user));
                assert_eq!(cat(user, &file("acme/secret")), Told::NotFound, "{}", why(user));
                assert!(cat(user, &file("open")) == Told::Let(big.clone()), "{}", why(user));
                // Told after the answer.
                for model in ["acme/secret", "lone"] {
                    until(&why(user), || mount.notes.has_denial(Kind::Look, user.0, model));
                }
                assert!(mount.notes.has_denial(Kind::Open, user.0, "acme/shown"), "{}", why(user));
            }
            assert_eq!(list(BANNED, &mount.path("")), Vec::<String>::new(), "{}", why(BANNED));
            assert_eq!(cat(BANNED, &file("open")), Told::NotFound, "{}", why(BANNED));
            until(&why(BANNED), || mount.notes.has_denial(Kind::Look, BANNED.0, "open"));
        }
        if mount.fs.passthrough() {
            let hot = mount.cache.telemetry().opens_passthrough.get();
            assert!(hot > 0 || open == OpenPolicy::Lazy, "{hot} opens past the daemon under {open:?}");
        }
    }
}

#[test]
fn an_open_that_is_let_is_told_with_who_what_and_by_which_key_before_it_is_answered() {
    if !can_mount() {
        return;
    }
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(&rules(PATIENT)));
    assert!(matches!(cat(TRAINER, &mount.path("acme/secret/config.json")), Told::Let(_)));
    let told = mount.notes.of(Kind::Open);
    let event = told.first().expect("one event");
    assert_eq!((told.len(), event.outcome, event.severity), (1, Outcome::Allowed, Severity::Low));
    let (actor, subject) = (&event.actor, &event.subject);
    assert_eq!((actor.uid, actor.gid, actor.command.as_deref()), (Some(4301), Some(4301), Some("cat")));
    assert!(actor.pid.is_some() && actor.cgroup.is_some() && actor.exe.is_some(), "{actor:?}");
    assert_eq!(actor.service_account.as_deref(), Some("ml/llama"));
    assert_eq!((subject.model.as_deref(), subject.version), (Some("acme/secret"), Some(1)));
    assert_eq!(subject.file.as_deref(), Some("config.json"));
    let digest = ManifestDigest::of(&mount.fixture.manifest);
    assert_eq!(subject.manifest, Some(format!("sha256:{digest}")));
    assert_eq!(subject.mountpoint.as_deref(), Some(mount.folder.path()));

    // A log that must be written and cannot be: nothing is opened, through the daemon or past it.
    mount.notes.full.store(true, std::sync::atomic::Ordering::SeqCst);
    for file in ["config.json", BIG] {
        let error = File::open(mount.path("open").join(file)).expect_err("not recorded");
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    }
    // The kernel tells of a close when it likes, and `cat` has closed what it was let to open.
    until("what was not recorded stays open", || mount.fs.open_handles() == 0);
    mount.notes.full.store(false, std::sync::atomic::Ordering::SeqCst);
    File::open(mount.path("open/config.json")).expect("recorded again");
}

/// What the kernel keeps of names is asked for in the worst order, with the folder, the file and an absent name.
#[test]
fn the_denied_are_not_answered_by_what_the_allowed_were_told_nor_the_other_way_round() {
    if !can_mount() {
        return;
    }
    for layout in [Layout::Plain, Layout::Versions] {
        let mount = Mount::new(OpenPolicy::Whole, layout, Some(&rules(PATIENT)));
        let model = mount.path("lone/hidden");
        let inside = if layout == Layout::Versions { model.join("current") } else { model.clone() };
        for _ in 0..3 {
            // Cached as there, if anything is.
            assert!(matches!(cat(TRAINER, &inside.join(BIG)), Told::Let(_)), "{layout:?}");
            assert_eq!(list(TRAINER, &mount.path("lone")), ["hidden"]);
            for path in [mount.path("lone"), model.clone(), inside.clone(), inside.join(BIG), model.join("1")] {
                assert_eq!(stat(STRANGER, &path), Told::NotFound, "{path:?}, {layout:?}");
            }
            assert_eq!(list(STRANGER, &mount.path("")), ["acme", "open"]);
            // Cached as absent, if anything is.
            assert_eq!(stat(TRAINER, &inside.join(BIG)), seen(), "{layout:?}");
            assert_eq!(list(TRAINER, &mount.path("")), ["acme", "lone", "open"]);
        }
        // What a folder tells of itself does not change with what is hidden in it.
        let about = |user| {
            let output = command_as(user, "stat").args(["-c", "%h %Y %s"]).arg(mount.path("acme")).output();
            told(output.expect("setpriv"))
        };
        assert_eq!(about(TRAINER), about(STRANGER));
    }
}

#[test]
fn a_versions_layout_hides_its_links_and_shows_them_to_the_allowed() {
    if !can_mount() {
        return;
    }
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Versions, Some(&rules(PATIENT)));
    assert_eq!(list(TRAINER, &mount.path("acme/secret")), ["1", "current"]);
    assert!(matches!(cat(TRAINER, &mount.path("acme/secret/current/config.json")), Told::Let(_)));
    let link = |user: User| {
        told(command_as(user, "readlink").arg("-v").arg(mount.path("acme/secret/current")).output().expect("setpriv"))
    };
    assert_eq!(link(TRAINER), Told::Let(b"1\n".to_vec()));
    assert_eq!(link(STRANGER), Told::NotFound);
    assert_eq!(cat(STRANGER, &mount.path("acme/shown/current/config.json")), Told::Denied);
    assert_eq!(list(STRANGER, &mount.path("acme/shown")), ["1", "current"]);
}

/// By number: through a descriptor of the folder or the file that somebody who may has opened and handed on.
#[test]
fn what_is_handed_on_is_judged_by_who_uses_it() {
    if !can_mount() {
        return;
    }
    for open in [OpenPolicy::Lazy, OpenPolicy::Whole] {
        let mount = Mount::new(open, Layout::Plain, Some(&rules(PATIENT)));
        let everything = "[denials]\ncount = 1000\n[[rule]]\nuids = [0]\nmodels = [\"*\"]\nmay = \"read\"\n";
        mount.set_policy(&format!("{everything}{}", RULES));
        // Root opens what it may; a child of root becomes somebody else and uses it.
        let as_stranger = |file: &File, script: &str| {
            let fd = file.as_raw_fd();
            // SAFETY: a flag of our own descriptor, so that the child has it.
            unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
            told(command_as(STRANGER, "sh").args(["-c", script, "sh", &fd.to_string()]).output().expect("setpriv"))
        };
        let path_only = |path: &Path| {
            use std::os::unix::fs::OpenOptionsExt;
            File::options().read(true).custom_flags(libc::O_PATH).open(path).expect("a path")
        };
        let file = path_only(&mount.path("lone/hidden").join(BIG));
        assert_eq!(as_stranger(&file, "cat /proc/self/fd/$1"), Told::NotFound, "a magic link, {open:?}");
        let shown = path_only(&mount.path("acme/shown").join(BIG));
        assert_eq!(as_stranger(&shown, "cat /proc/self/fd/$1"), Told::Denied, "a magic link, {open:?}");
        let folder = path_only(&mount.path("lone/hidden"));
        assert_eq!(as_stranger(&folder, "ls /proc/self/fd/$1/"), Told::NotFound, "{open:?}");
        assert_eq!(as_stranger(&folder, &format!("cat /proc/self/fd/$1/{BIG}")), Told::NotFound, "{open:?}");
        let listing = File::open(mount.path("lone/hidden")).expect("a folder");
        assert_eq!(as_stranger(&listing, "ls /proc/self/fd/$1/"), Told::NotFound, "{open:?}");

        if open == OpenPolicy::Lazy {
            // Served through the daemon: the reader counts as well.
            let plain = File::open(mount.path("lone/hidden").join(BIG)).expect("open");
            mount.fs.drop_all_pages();
            assert_eq!(by_a_stranger(&plain, read_some), Err(Some(libc::EACCES)));
            plain.read_exact_at(&mut [0; 10], 2 << 20).expect("root goes on");
            assert!(mount.notes.has_denial(Kind::Open, STRANGER.0, "lone/hidden"));
        }
    }
}

/// Root of a user namespace, and ways around the mountpoint.
#[test]
fn other_ways_to_the_mount_and_root_of_a_namespace_are_judged_the_same() {
    if !can_mount() {
        return;
    }
    let mount = Mount::new(OpenPolicy::Whole, Layout::Plain, Some(&rules(PATIENT)));
    assert!(matches!(cat(TRAINER, &mount.path("lone/hidden").join(BIG)), Told::Let(_)));
    let path = mount.path("lone/hidden/config.json");
    let below = path.strip_prefix("/").expect("absolute");
    let around = Path::new("/proc/self/root").join(below);
    assert_eq!(cat(STRANGER, &around), Told::NotFound);
    assert!(matches!(cat(TRAINER, &around), Told::Let(_)));
    let mut inside = command_as(STRANGER, "unshare");
    let output = inside.args(["--user", "--map-root-user", "cat"]).arg(&path).output().expect("setpriv");
    let words = String::from_utf8_lossy(&output.stderr);
    if words.contains("unshare:") {
        eprintln!("not run: no user namespaces here");
    } else {
        assert!(!output.status.success() && words.contains("No such file"), "{words}");
    }
    // A pid namespace of its own hides nobody: the daemon sees into it.
    let mut inside = Command::new("unshare");
    inside.args(["--pid", "--fork", "setpriv", "--reuid", "4301", "--regid", "4301", "--groups", "4300", "cat"]);
    assert!(matches!(told(inside.arg(&path).output().expect("unshare")), Told::Let(_)));
}

/// The daemon sits in a pid namespace, askers outside of it: their groups cannot be looked up.
#[test]
fn whoever_is_out_of_sight_is_judged_by_uid_and_primary_group_alone() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(dir.path());
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let source = dir.path().join("source");
    std::fs::create_dir(&source).expect("mkdir");
    std::fs::write(source.join("config.json"), "{}").expect("written");
    for name in ["acme/secret", "open"] {
        program.seal(&source, name);
    }
    let policy = dir.path().join("policy.toml");
    std::fs::write(&policy, rules("")).expect("written");
    let mount = program.command(&["mount"]);
    let mut outside = Command::new("unshare");
    outside.args(["--pid", "--fork", "--kill-child"]);
    outside.arg(mount.get_program()).args(mount.get_args()).arg(program.store()).arg(program.mountpoint());
    outside.args(["--key", &program.key(), "--trust"]).arg(program.trusted_key());
    outside.args(["--allow-other", "--umask", "0222", "--policy"]).arg(&policy);
    for (name, value) in mount.get_envs() {
        match value {
            Some(value) => outside.env(name, value),
            None => outside.env_remove(name),
        };
    }
    let mut child = outside.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("unshare");
    until("it is not mounted", || {
        assert!(child.try_wait().expect("wait").is_none(), "the mount ended");
        program::is_mountpoint(program.mountpoint())
    });
    let secret = program.mountpoint().join("acme/secret/config.json");
    let by_primary = cat(MEMBER, &secret);
    let by_supplementary = cat(TRAINER, &secret);
    let by_anybody = cat(STRANGER, &program.mountpoint().join("open/config.json"));
    run_ok(Command::new("umount").arg(program.mountpoint()));
    let _ = child.kill();
    child.wait().expect("ended");
    assert_eq!(by_primary, Told::Let(b"{}".to_vec()), "the kernel says the primary group");
    assert_eq!(by_supplementary, Told::NotFound, "a group that cannot be looked up is none");
    assert_eq!(by_anybody, Told::Let(b"{}".to_vec()));
}

/// Names of a folder with what the kernel says of each one's place, one entry a call, and `between` before each but the first.
fn entries(folder: &Path, mut between: impl FnMut()) -> Vec<(String, u64)> {
    // Room for one entry of these names, not for two.
    #[repr(C, align(8))]
    struct Room([u8; 40]);
    let file = File::open(folder).expect("a folder");
    let mut entries = Vec::new();
    loop {
        let mut room = Room([0; 40]);
        // SAFETY: the kernel writes at most as many bytes as it is told there are.
        let got = unsafe { libc::syscall(libc::SYS_getdents64, file.as_raw_fd(), &raw mut room, room.0.len()) };
        assert!(got >= 0, "{}", std::io::Error::last_os_error());
        if got == 0 {
            return entries;
        }
        // The inode, the place of the next one, two bytes of length, one of the kind, the name.
        let next = u64::from_ne_bytes(room.0[8..16].try_into().expect("eight bytes"));
        let name = room.0[19..].split(|byte| *byte == 0).next().expect("a name");
        entries.push((String::from_utf8(name.to_vec()).expect("utf-8"), next));
        assert!(entries.len() < 100, "a listing without an end: {entries:?}");
        between();
    }
}

#[test]
fn a_listing_does_not_count_what_it_leaves_out() {
    if !can_mount() {
        return;
    }
    // Root sees acme/shown and open alone.
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(&rules(PATIENT)));
    let listed = |names: &[&str]| -> Vec<(String, u64)> {
        [".", ".."].iter().chain(names).zip(1..).map(|(name, at)| ((*name).to_owned(), at)).collect()
    };
    assert_eq!(entries(&mount.path(""), || {}), listed(&["acme", "open"]));
    assert_eq!(entries(&mount.path("acme"), || {}), listed(&["shown"]));
    // What is seen becomes more and less with every step: the listing ends, and what was there all the time is in it.
    let mut more = false;
    let changing = entries(&mount.path(""), || {
        more = !more;
        mount.set_policy(if more { ALL } else { RULES });
    });
    assert!(changing.windows(2).all(|two| two[0].1 < two[1].1), "{changing:?}");
    mount.set_policy(ALL);
    assert_eq!(entries(&mount.path(""), || {}), listed(&["acme", "lone", "open"]));
    mount.fs.set_policy(None);
    assert_eq!(entries(&mount.path(""), || {}), listed(&["acme", "lone", "open"]));
}

/// Being blocked says nothing of which names are there.
#[test]
fn the_blocked_are_told_the_same_of_absent_names_as_of_hidden_ones() {
    if !can_mount() {
        return;
    }
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(&rules("[denials]\ncount = 1\nblock = \"1h\"\n")));
    assert_eq!(stat(STRANGER, &mount.path("nowhere")), Told::NotFound);
    assert!(mount.fs.blocks().is_empty(), "a mistyped name is no denial");
    assert_eq!(stat(STRANGER, &mount.path("lone")), Told::NotFound);
    assert_eq!(mount.fs.blocks().len(), 1);
    // By number, so that the root of the mount is not asked about first.
    let root = File::open(mount.path("")).expect("a folder");
    for name in [c"lone", c"nowhere", c"open"] {
        assert_eq!(by_a_stranger_at(&root, name), Some(libc::EACCES), "{name:?}");
    }
}

/// How long the writing of it takes cannot be told from how soon the answer comes.
#[test]
fn a_refused_look_is_answered_before_it_is_told() {
    if !can_mount() {
        return;
    }
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(&rules(PATIENT)));
    let gate = Arc::new(Gate::default());
    mount.cache.telemetry().events.add(gate.clone());
    let answer = stat(STRANGER, &mount.path("lone"));
    let opened = gate.open();
    assert_eq!(answer, Told::NotFound);
    assert!(opened, "the answer came when the event was taken");
    until("a refused look is not told", || mount.notes.has_denial(Kind::Look, STRANGER.0, "lone"));
}

/// Takes no look before it is opened, or a long time has passed.
#[derive(Default)]
struct Gate {
    /// Open, and a look gave up waiting.
    state: Mutex<(bool, bool)>,
    changed: std::sync::Condvar,
}

impl Gate {
    /// Whether it was this that opened it.
    fn open(&self) -> bool {
        let mut state = self.state.lock().expect("a test");
        state.0 = true;
        self.changed.notify_all();
        !state.1
    }
}

impl Sink for Gate {
    fn take(&self, event: &Event) -> modelfs::error::Result<()> {
        if event.kind == Kind::Look {
            let state = self.state.lock().expect("a test");
            let wait = Duration::from_secs(120);
            let (mut state, late) = self.changed.wait_timeout_while(state, wait, |state| !state.0).expect("a test");
            state.1 |= late.timed_out();
        }
        Ok(())
    }
}

// ---- Policies that change -------------------------------------------------------------------------------------------

#[test]
fn the_first_policy_of_a_mount_makes_the_kernel_forget_what_it_was_told_before() {
    if !can_mount() {
        return;
    }
    for open in [OpenPolicy::Lazy, OpenPolicy::Whole] {
        let mount = Mount::new(open, Layout::Plain, None);
        let hidden = mount.path("lone/hidden");
        assert_eq!(list(STRANGER, &mount.path("lone")), ["hidden"]);
        assert!(matches!(cat(STRANGER, &hidden.join(BIG)), Told::Let(_)));
        // Held, so that the kernel cannot let go of the names by itself.
        let held = File::open(hidden.join(BIG)).expect("open");
        let folder = File::open(&hidden).expect("a folder");

        mount.set_policy(&rules(PATIENT));

        assert_eq!(list(STRANGER, &mount.path("")), ["acme", "open"], "{open:?}");
        for path in [mount.path("lone"), hidden.clone(), hidden.join(BIG)] {
            assert_eq!(stat(STRANGER, &path), Told::NotFound, "{path:?}, {open:?}");
        }
        assert!(matches!(cat(TRAINER, &hidden.join(BIG)), Told::Let(_)));
        let is_plain = mount.fs.open_by().iter().any(|open| !open.passthrough);
        if is_plain {
            let refused = held.read_at(&mut [0; 100], 2 << 20).expect_err("root may not under the policy");
            assert_eq!(refused.raw_os_error(), Some(libc::EACCES), "{open:?}");
        }
        drop((held, folder));

        // And it may be taken away again.
        mount.fs.set_policy(None);
        assert!(matches!(cat(STRANGER, &hidden.join(BIG)), Told::Let(_)));
    }
}

#[test]
fn a_new_policy_holds_for_new_opens_and_for_reads_of_open_files() {
    if !can_mount() {
        return;
    }
    let all = "[[rule]]\neverybody = true\nmodels = [\"*\"]\nmay = \"read\"\n";
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(all));
    let path = mount.path("lone/hidden").join(BIG);
    let held = File::open(&path).expect("open");
    held.read_exact_at(&mut [0; 4096], 0).expect("read");
    mount.set_policy(&rules(PATIENT));
    let errno = |result: std::io::Result<usize>| result.expect_err("refused").raw_os_error();
    assert_eq!(errno(held.read_at(&mut [0; 4096], 0)), Some(libc::EACCES), "also what was cached");
    assert_eq!(errno(held.read_at(&mut [0; 4096], 2 << 20)), Some(libc::EACCES));
    assert_eq!(File::open(&path).expect_err("refused").raw_os_error(), Some(libc::ENOENT));
    mount.set_policy(all);
    held.read_exact_at(&mut [0; 4096], 2 << 20).expect("let again");

    // Its limits too: of a second's bytes that are owed for the first read, the next one pays.
    let took = || {
        mount.fs.drop_all_pages();
        let began = Instant::now();
        for at in [0, 1 << 20] {
            held.read_exact_at(&mut vec![0; 128 << 10], at).expect("let");
        }
        began.elapsed()
    };
    mount.set_policy(&format!("{all}[limits]\nbytes_per_s = \"128KiB\"\nbytes_burst = \"4KiB\"\n"));
    let limited = took();
    assert!(limited >= Duration::from_millis(700), "{limited:?} for what takes a second");
    // With them none is as quick, however often it is tried; without them one is, on a machine that stands still at times.
    mount.set_policy(all);
    let free: Vec<Duration> = std::iter::repeat_with(took).take(20).collect();
    assert!(
        free.iter().any(|free| *free < Duration::from_millis(700)),
        "{free:?} without limits, {limited:?} with them"
    );
}

// ---- How often, and for how long not --------------------------------------------------------------------------------

#[test]
fn opens_beyond_the_burst_wait_and_those_that_waited_too_long_are_busy() {
    if !can_mount() {
        return;
    }
    let limits = "[limits]\nopens_per_s = 1\nopens_burst = 4\nwait = \"0s\"\n";
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(&rules(limits)));
    let path = mount.path("open/config.json");
    // A bucket fills by one a second: on a slow machine it takes more of them to empty it.
    let first = (0..1000).map(|_| cat(STRANGER, &path)).position(|told| told == Told::Busy);
    let first = first.expect("a thousand are more than the burst");
    assert!(first >= 4, "{first} let through, the burst is 4");
    let told = mount.notes.of(Kind::Limit);
    assert!(told.iter().any(|event| event.outcome == Outcome::Denied && event.code == Some(Code::OverLimit)));
    assert!(told.iter().all(|event| event.actor.uid == Some(STRANGER.0)));
    // Another user has buckets of his own.
    assert!(matches!(cat(MEMBER, &path), Told::Let(_)));

    // With time to wait the same opens only take longer.
    mount.notes.clear();
    mount.set_policy(&rules("[limits]\nopens_per_s = 20\nopens_burst = 1\nwait = \"20s\"\n"));
    let began = Instant::now();
    for _ in 0..8 {
        assert!(matches!(cat(STRANGER, &path), Told::Let(_)));
    }
    println!("8 opens at 20 a second took {:?}", began.elapsed());
    assert!(mount.notes.of(Kind::Limit).iter().all(|event| event.outcome != Outcome::Denied));
}

/// Two rules let one user in to different models; neither has limits of its own.
#[test]
fn a_user_has_the_policys_limits_once_however_many_rules_let_him_in() {
    if !can_mount() {
        return;
    }
    const OPENS: usize = 300;
    const BURST: usize = 100;
    let let_through = |limits_of_rule: &str| {
        let rules = format!(
            "[limits]\nopens_per_s = 1\nopens_burst = {BURST}\nwait = \"0s\"\n\
             [[rule]]\nuids = [{}]\nmodels = [\"open\"]\nmay = \"read\"\n{limits_of_rule}{ALL}",
            STRANGER.0
        );
        let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(&rules));
        let files = ["open/config.json", "acme/shown/config.json"].map(|file| mount.path(file));
        let began = Instant::now();
        let output = command_as(STRANGER, "cat").args(files.iter().cycle().take(OPENS)).output().expect("setpriv");
        let refused = text(&output).matches("resource busy").count();
        // One owes, and some may have come back meanwhile.
        (OPENS - refused, BURST + 2 + began.elapsed().as_secs() as usize)
    };
    let (opens, most) = let_through("");
    assert!((BURST..=most).contains(&opens), "{opens} opens under two rules, {most} are what one user may");
    let (opens, most) = let_through("limits = { bytes_per_s = \"1GiB\" }\n");
    assert!(
        (BURST..=most).contains(&opens),
        "{opens} opens, {most} are what one user may: the rule limits bytes alone"
    );
    let (opens, _) = let_through("limits = { opens_per_s = 1000 }\n");
    assert!(opens >= OPENS / 2 + BURST, "{opens}: a rule with opens of its own");
}

#[test]
fn bytes_beyond_the_burst_are_delayed_and_a_file_larger_than_any_burst_is_read() {
    if !can_mount() {
        return;
    }
    let limits = "[limits]\nbytes_per_s = \"2MiB\"\nbytes_burst = \"1MiB\"\nwait = \"20s\"\n";
    for open in [OpenPolicy::Lazy, OpenPolicy::Whole] {
        let mount = Mount::new(open, Layout::Plain, Some(&rules(limits)));
        let path = mount.path("open").join(BIG);
        let began = Instant::now();
        for _ in 0..2 {
            assert!(cat(STRANGER, &path) == Told::Let(mount.fixture.files[1].1.clone()), "{open:?}");
            mount.fs.drop_all_pages();
        }
        let (bytes, took) = (2 * BIG_BYTES as u64, began.elapsed());
        println!("{open:?}: {bytes} bytes at 2 MiB a second after a burst of 1 MiB took {took:?}");
        // The second file's bytes wait for the first's: of 3 MiB beyond the burst at least the first two must be paid.
        assert!(took >= Duration::from_millis(800), "{open:?}: {took:?}");
        // A machine that stood still between the two let the debt be paid meanwhile, and nobody waited: then once more.
        until("nobody waits", || {
            let waited = mount.notes.of(Kind::Limit).iter().any(|event| event.actor.uid == Some(STRANGER.0));
            if !waited {
                assert!(cat(STRANGER, &path) == Told::Let(mount.fixture.files[1].1.clone()), "{open:?}");
                mount.fs.drop_all_pages();
            }
            waited
        });
    }
}

const ALL: &str = "[[rule]]\neverybody = true\nmodels = [\"*\"]\nmay = \"read\"\n";
const STRANGERS: Session = Session::Uid(STRANGER.0);

/// What is done to a mount, by its name.
type Deed = (&'static str, fn(&Mount));

/// What takes away what was granted: the operator's word, and another policy.
const STOPS: [Deed; 3] = [
    ("shut out", |mount| drop(mount.fs.shut_out(STRANGERS, None, false).expect("shut out"))),
    ("everybody is refused", |mount| mount.fs.refuse_all(true)),
    ("another policy", |mount| mount.set_policy(RULES)),
];

/// Grants everything again, with these limits; whoever owed begins anew.
fn grant_all(mount: &Mount, limits: &str) {
    mount.fs.refuse_all(false);
    mount.fs.let_in(&STRANGERS);
    mount.set_policy(&format!("[limits]\n{limits}{ALL}"));
}

/// What somebody was told who asked, waited for his turn, and was stopped meanwhile. Tried again where the turn came first:
/// `answered` counts what is let.
fn told_after_a_wait<P: Sync, T: Send>(
    mount: &Mount,
    answered: impl Fn() -> u64,
    prepare: impl Fn() -> P,
    ask: impl Fn(&P) -> T + Sync,
    stop: impl Fn(&Mount),
) -> T {
    for _ in 0..20 {
        let prepared = prepare();
        mount.notes.clear();
        let before = answered();
        let (told, in_time) = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask(&prepared));
            until("nobody waits", || !mount.notes.of(Kind::Limit).is_empty() || asked.is_finished());
            stop(mount);
            let in_time = answered() == before;
            (asked.join().expect("asked"), in_time)
        });
        if in_time {
            return told;
        }
    }
    panic!("twenty turns came before the word that was to stop them");
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn an_open_that_waited_for_its_turn_is_asked_about_again() {
    if !can_mount() {
        return;
    }
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, None);
    let file = mount.path("acme/secret/config.json");
    let prepare = || {
        grant_all(&mount, "opens_per_s = 1\nopens_burst = 1\nwait = \"20s\"\n");
        // The second one owes.
        (0..2).for_each(|_| assert!(matches!(cat(STRANGER, &file), Told::Let(_))));
    };
    let opens = || mount.cache.telemetry().opens_plain.get();
    for (what, stop) in STOPS {
        let told = told_after_a_wait(&mount, opens, prepare, |()| cat(STRANGER, &file), stop);
        assert!(matches!(told, Told::Denied | Told::NotFound), "{what}: {told:?}");
        let refused = mount.notes.of(Kind::Open);
        assert!(refused.iter().any(|event| event.outcome == Outcome::Denied), "{what}: {refused:?}");
    }
}

#[test]
fn a_read_that_waited_for_its_turn_is_asked_about_again() {
    if !can_mount() {
        return;
    }
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, None);
    let prepare = || {
        grant_all(&mount, "bytes_per_s = \"16KiB\"\nbytes_burst = \"16KiB\"\n");
        mount.fs.drop_all_pages();
        let file = File::open(mount.path("acme/secret").join(BIG)).expect("open");
        // SAFETY: advice on a descriptor of ours: so that nothing is read ahead.
        assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) }, 0);
        // Owes some seconds' worth.
        file.read_exact_at(&mut [0; 80 << 10], 0).expect("read");
        file
    };
    let reads = || mount.cache.telemetry().reads.get();
    for (what, stop) in STOPS {
        let told = told_after_a_wait(&mount, reads, prepare, |file| by_a_stranger(file, read_some), stop);
        assert_eq!(told, Err(Some(libc::EACCES)), "{what}");
    }
}

/// A log that must be written is not to be filled by who is refused.
#[test]
fn who_is_refused_again_and_again_is_told_of_so_often_a_second_and_no_more() {
    if !can_mount() {
        return;
    }
    const OPENS: usize = 1000;
    let shut_out: fn(&Mount) = |mount| drop(mount.fs.shut_out(STRANGERS, None, false).expect("shut out"));
    let locked: fn(&Mount) = |mount| {
        mount.fs.lock(&mount.fs.vfs().models());
    };
    let pickles: fn(&Mount) = |mount| mount.fs.refuse_pickles();
    let limited: fn(&Mount) = |mount| grant_all(mount, "opens_per_s = 1\nopens_burst = 1\nwait = \"0s\"\n");
    for (what, refuse) in [("shut out", shut_out), ("locked", locked), ("a pickle", pickles), ("over a limit", limited)]
    {
        let pickle = |_: &mut Random| vec![("config.json".to_owned(), b"\x80\x04.".to_vec())];
        let mount = Mount::of_files(OpenPolicy::Lazy, Layout::Plain, None, pickle);
        refuse(&mount);
        let began = Instant::now();
        // Several models in turn: no model has a share of its own.
        let files: Vec<PathBuf> =
            (0..OPENS).map(|at| mount.path(MODELS[at % MODELS.len()]).join("config.json")).collect();
        let output = command_as(STRANGER, "cat").args(&files).output().expect("setpriv");
        let words = String::from_utf8_lossy(&output.stderr);
        let refused = words.matches("Permission denied").count() + words.matches("resource busy").count();
        let most = 20 * (2 + began.elapsed().as_secs() as usize);
        let denied = |event: &&Event| event.outcome == Outcome::Denied;
        let told = || [mount.notes.of(Kind::Open), mount.notes.of(Kind::Limit)].concat();
        let count = told().iter().filter(denied).count();
        println!("{what}: {count} of {refused} told in {:?}", began.elapsed());
        assert!(refused > OPENS / 2, "{what}: {refused}");
        assert!(count > 0 && count <= most, "{what}: {count} of {refused} are told, {most} would be enough");
        // How many they were is told with the next.
        std::thread::sleep(Duration::from_millis(1100));
        let again = command_as(STRANGER, "cat").args(&files[..8]).output().expect("setpriv");
        assert!(!again.status.success(), "{what}");
        let more = |event: &Event| event.detail.as_deref().is_some_and(|detail| detail.contains("more like it before"));
        assert!(count == refused || told().iter().any(more), "{what}: {:?}", told().last());
    }
}

#[test]
fn who_is_denied_too_often_is_refused_everything_for_a_while_and_nobody_else_is() {
    if !can_mount() {
        return;
    }
    // Longer than this test, so that it stands for all that is asked meanwhile.
    let denials = "[denials]\ncount = 3\nwithin = \"1m\"\nblock = \"1h\"\n";
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(&rules(denials)));
    let open = mount.path("open/config.json");
    assert!(matches!(cat(STRANGER, &open), Told::Let(_)));
    assert_eq!(cat(STRANGER, &mount.path("acme/secret/config.json")), Told::NotFound);
    assert_eq!(cat(STRANGER, &mount.path("lone/hidden/config.json")), Told::NotFound);
    assert!(matches!(cat(STRANGER, &open), Told::Let(_)), "two denials are not three");
    assert!(mount.fs.blocks().is_empty());
    assert_eq!(cat(STRANGER, &mount.path("acme/shown/config.json")), Told::Denied);

    let blocks = mount.fs.blocks();
    assert_eq!(blocks.len(), 1, "{blocks:?}");
    assert_eq!(blocks[0].0.to_string(), "uid=4303");
    assert_eq!(cat(STRANGER, &open), Told::Denied, "every open");
    assert_eq!(stat(STRANGER, &mount.path("acme")), Told::Denied, "and every look");
    assert_eq!(stat(STRANGER, &mount.path("")), Told::Denied);
    assert!(matches!(cat(MEMBER, &open), Told::Let(_)), "the neighbour goes on");
    assert!(matches!(cat(ROOT, &open), Told::Let(_)));
    let told = mount.notes.of(Kind::Block);
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((told[0].severity, told[0].actor.uid), (Severity::High, Some(STRANGER.0)));
    assert!(told[0].detail.as_deref().is_some_and(|detail| detail.contains("3 times within 60 s")), "{told:?}");
    assert!(mount.notes.has_denial(Kind::Open, STRANGER.0, "acme/shown"));

    // A new policy does not forgive.
    mount.set_policy(&rules(denials));
    assert_eq!(cat(STRANGER, &open), Told::Denied);
    mount.fs.expire_blocks();
    assert_eq!(mount.fs.blocks().len(), 1, "an hour is not over");

    // Another one, that ends by itself. Denials of one model within a second are one.
    assert!(mount.fs.let_in(&STRANGERS));
    mount.notes.clear();
    mount.set_policy(&rules("[denials]\ncount = 3\nwithin = \"10m\"\nblock = \"4s\"\n"));
    until("no second block", || {
        for file in ["acme/secret/config.json", "lone/hidden/config.json", "acme/shown/config.json"] {
            assert!(!matches!(cat(STRANGER, &mount.path(file)), Told::Let(_)), "{file}");
        }
        !mount.notes.of(Kind::Block).is_empty()
    });
    until("a block of 4 s does not end", || matches!(cat(STRANGER, &open), Told::Let(_)));
    mount.fs.expire_blocks();
    let told = mount.notes.of(Kind::Unblock);
    assert!(told.len() == 1 && told[0].detail.as_deref().is_some_and(|it| it.contains("time is over")), "{told:?}");
}

#[test]
fn the_operator_lets_the_blocked_in_again() {
    if !can_mount() {
        return;
    }
    let denials = "[denials]\ncount = 1\nblock = \"1h\"\n";
    let mount = Mount::new(OpenPolicy::Lazy, Layout::Plain, Some(&rules(denials)));
    assert_eq!(cat(STRANGER, &mount.path("acme/shown/config.json")), Told::Denied);
    assert_eq!(cat(STRANGER, &mount.path("open/config.json")), Told::Denied);
    let session: Session = "uid=4303".parse().expect("a session");
    assert!(mount.fs.let_in(&session));
    assert!(!mount.fs.let_in(&session), "nothing is left to lift");
    assert!(matches!(cat(STRANGER, &mount.path("open/config.json")), Told::Let(_)));
    assert_eq!(mount.notes.of(Kind::Unblock).len(), 1);
}

// ---- Files that run code --------------------------------------------------------------------------------------------

#[test]
fn a_file_that_begins_as_pickles_do_is_not_opened_whatever_its_name() {
    if !can_mount() {
        return;
    }
    for open in [OpenPolicy::Lazy, OpenPolicy::Whole] {
        let mount = Mount::of_files(open, Layout::Plain, None, |random| {
            let mut weights = random.bytes(BIG_BYTES);
            weights[..2].copy_from_slice(b"{}");
            let mut pickle = random.bytes(BIG_BYTES);
            pickle[..2].copy_from_slice(b"\x80\x04");
            vec![("a.safetensors".to_owned(), pickle), (BIG.to_owned(), weights)]
        });
        mount.fs.refuse_pickles();
        for _ in 0..2 {
            assert_eq!(cat(STRANGER, &mount.path("open/a.safetensors")), Told::Denied, "{open:?}");
            assert!(matches!(cat(STRANGER, &mount.path("open").join(BIG)), Told::Let(_)), "{open:?}");
        }
        assert!(mount.notes.has_denial(Kind::Open, STRANGER.0, "open"));
    }
}

// ---- The program ----------------------------------------------------------------------------------------------------

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[test]
fn models_too_large_or_of_denied_types_are_refused_at_seal_before_anything_is_stored() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(dir.path());
    let source = dir.path().join("source");
    std::fs::create_dir(&source).expect("mkdir");
    std::fs::write(source.join("model.safetensors"), vec![7; 100_000]).expect("written");
    let seal = |more: &[&str]| {
        let mut command = program.command(&["seal"]);
        command.arg(&source).args([program.store(), "m", "--key", &program.key()]).args(more);
        command.output().expect("the binary runs")
    };
    let refused = |more: &[&str], words: &[&str]| {
        let output = seal(more);
        assert_eq!(output.status.code(), Some(25), "{}", text(&output));
        for word in words {
            assert!(text(&output).contains(word), "{word}: {}", text(&output));
        }
        let stored = std::fs::read_dir(program.store()).expect("the store").count();
        assert_eq!(stored, 0, "nothing is stored");
    };
    refused(&["--max-model-size", "50k"], &["100000", "max-model-size"]);
    std::fs::write(source.join("weights.safetensors"), b"\x80\x04\x95....").expect("written");
    refused(&["--deny-types", "pickle"], &["weights.safetensors", "pickle", "content"]);
    std::fs::remove_file(source.join("weights.safetensors")).expect("removed");
    std::fs::write(source.join("optimizer.pt"), b"anything").expect("written");
    refused(&["--deny-types", "pickle"], &["optimizer.pt", "name"]);
    refused(&["--deny-types", ".onnx", "--deny-types", ".pt"], &["optimizer.pt", ".pt"]);
    let output = seal(&["--deny-types", ".onnx", "--max-model-size", "1MiB"]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn what_was_sealed_elsewhere_is_refused_at_mount_or_left_out_of_a_whole_store() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(dir.path());
    let source = dir.path().join("source");
    std::fs::create_dir(&source).expect("mkdir");
    std::fs::write(source.join("model.safetensors"), vec![7; 1000]).expect("written");
    program.seal(&source, "good");
    std::fs::write(source.join("model.pkl"), b"\x80\x04.").expect("written");
    program.seal(&source, "bad");

    let mount = program.mount(&["--deny-types", "pickle"]);
    assert!(program.mountpoint().join("good/model.safetensors").exists());
    assert!(!program.mountpoint().join("bad").exists());
    assert!(program.log().contains("bad is left out") && program.log().contains("model.pkl"), "{}", program.log());
    mount.unmount();

    let named = |more: &[&str]| {
        let mut command = program.command(&["mount"]);
        command.arg(program.store()).arg(program.mountpoint()).args(["--key", &program.key(), "--trust"]);
        command.arg(program.trusted_key()).args(["--model", "bad"]).args(more);
        let output = command.output().expect("the binary runs");
        assert_eq!(output.status.code(), Some(25), "{}", text(&output));
        text(&output)
    };
    assert!(named(&["--deny-types", "pickle"]).contains("model.pkl"));
    assert!(named(&["--max-model-size", "500"]).contains("max-model-size"));
}

#[test]
fn a_policy_is_checked_before_it_takes_effect_and_a_refused_one_changes_nothing() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::in_folder(dir.path());
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    let source = dir.path().join("source");
    std::fs::create_dir(&source).expect("mkdir");
    std::fs::write(source.join("config.json"), "{}").expect("written");
    program.seal(&source, "m");
    let policy = dir.path().join("policy.toml");
    let policy_arg = policy.to_str().expect("utf-8");
    std::fs::write(&policy, "[[rule]]\nuid = [1]\n").expect("written");
    let mut command = program.command(&["mount"]);
    command.arg(program.store()).arg(program.mountpoint()).args(["--key", &program.key(), "--trust"]);
    let output = command.arg(program.trusted_key()).args(["--policy", policy_arg]).output().expect("runs");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("did you mean `uids`"), "{}", text(&output));

    let grant = |uid: u32| format!("[[rule]]\nuids = [{uid}]\nmodels = [\"m\"]\nmay = \"read\"\n");
    std::fs::write(&policy, grant(4303)).expect("written");
    let log = dir.path().join("audit.log");
    let log = log.to_str().expect("utf-8");
    let mount = program.mount(&["--allow-other", "--umask", "0222", "--policy", policy_arg, "--audit-file", log]);
    let file = program.mountpoint().join("m/config.json");
    assert!(matches!(cat(STRANGER, &file), Told::Let(_)));
    assert_eq!(cat(MEMBER, &file), Told::NotFound);

    std::fs::write(&policy, "[[rule]]\nuid = [1]\n").expect("written");
    let output = program.command(&["reload"]).arg(program.mountpoint()).output().expect("runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("stays as it was") && text(&output).contains("`uids`"), "{}", text(&output));
    mount.signal(libc::SIGHUP);
    program.until("the word of a refused policy", || program.log().contains("nothing changed"));
    assert!(matches!(cat(STRANGER, &file), Told::Let(_)), "the old one stands");

    std::fs::write(&policy, grant(4302)).expect("written");
    let output = run_ok(program.command(&["reload"]).arg(program.mountpoint()));
    assert!(text(&output).contains("in force, 1 rules"), "{}", text(&output));
    assert_eq!(cat(STRANGER, &file), Told::NotFound);
    assert!(matches!(cat(MEMBER, &file), Told::Let(_)));
    let status = text(&run_ok(program.command(&["status", "--json"]).arg(program.mountpoint())));
    assert!(status.contains("policy.toml"), "{status}");
    mount.unmount();

    // Which policy was in force, from the mount on, and which was refused.
    let show = ["audit", "show", log, "--kind", "configuration", "--json"];
    let told = text(&run_ok(&mut program.command(&show)));
    let told: Vec<serde_json::Value> = told.lines().map(|line| serde_json::from_str(line).expect("a record")).collect();
    let outcomes: Vec<_> = told.iter().map(|record| record["outcome"].as_str().unwrap_or_default()).collect();
    assert_eq!((outcomes.first(), outcomes.last()), (Some(&"allowed"), Some(&"allowed")), "{told:?}");
    assert!(outcomes[1..outcomes.len() - 1].iter().all(|outcome| *outcome != "allowed"), "{told:?}");
    for (record, uid) in [(&told[0], 4303), (&told[told.len() - 1], 4302)] {
        let digest = hex::encode(sha2::Sha256::digest(grant(uid)));
        let detail = record["detail"].as_str().expect("a sentence");
        assert!(detail.contains("1 rules") && detail.ends_with(&format!("sha256:{digest}")), "{detail}");
    }
}

/// What the kernel serves by itself it serves to whoever has the descriptor (docs/ACCESS.md); not what it asks us about.
#[test]
fn a_descriptor_past_the_daemon_that_is_handed_on_gives_bytes_and_no_attributes() {
    if !can_mount() {
        return;
    }
    let root = "[denials]\ncount = 1000\n[[rule]]\nuids = [0]\nmodels = [\"*\"]\nmay = \"read\"\n";
    let mount = Mount::new(OpenPolicy::Whole, Layout::Plain, Some(root));
    if !mount.fs.passthrough() {
        skip("this kernel has no passthrough");
        return;
    }
    let file = File::open(mount.path("open").join(BIG)).expect("open");
    assert_eq!(by_a_stranger(&file, read_some), Ok(()));
    assert_eq!(by_a_stranger(&file, look), Err(Some(libc::ENOENT)));
}

/// What a child of ours that has become a stranger is told of a descriptor that we opened.
fn by_a_stranger(file: &File, asks: fn(i32) -> i64) -> Result<(), Option<i32>> {
    let fd = file.as_raw_fd();
    let mut command = Command::new("true");
    command.uid(STRANGER.0).gid(STRANGER.1);
    // SAFETY: after the change of user; plain calls on a descriptor that the child has until it becomes `true`.
    unsafe {
        command.pre_exec(move || if asks(fd) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) });
    }
    command.status().map(drop).map_err(|error| error.raw_os_error())
}

fn read_some(fd: i32) -> i64 {
    let mut room = [0u8; 10];
    // SAFETY: reads into a buffer of this length.
    unsafe { libc::pread(fd, room.as_mut_ptr().cast(), room.len(), 1 << 20) as i64 }
}

fn look(fd: i32) -> i64 {
    // SAFETY: a stat is plain numbers; the kernel fills ours.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        i64::from(libc::fstat(fd, &raw mut stat))
    }
}

/// What a stranger is told of a name in a folder that we opened; `None`: it is there.
fn by_a_stranger_at(folder: &File, name: &'static std::ffi::CStr) -> Option<i32> {
    let fd = folder.as_raw_fd();
    let mut command = Command::new("true");
    command.uid(STRANGER.0).gid(STRANGER.1);
    // SAFETY: after the change of user; a plain call on a descriptor that the child has until it becomes `true`.
    unsafe {
        command.pre_exec(move || {
            let mut stat: libc::stat = std::mem::zeroed();
            match libc::fstatat(fd, name.as_ptr(), &raw mut stat, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    command.status().err().and_then(|error| error.raw_os_error())
}
