//! The files that decide who reads what, and what lies near them: modes, owners, steps to other rights, room.
//!
//! In: the files that a [`Setup`] names, the program's own, the folders above them. Out: findings that name each file.
//! Promises: no link is followed but where a mount would follow it; a survey looks at [`SURVEY_ENTRIES_MAX`] entries and for
//! [`SURVEY_TIME`] at most (a thorough one at all of them, for [`THOROUGH_TIME`]) and never leaves its file system; what was
//! not seen is a finding, and never taken for clean.
//! Held by: `doctor::tests`, the tests below, tests/doctor.sh.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::setup::{Named, Needs, Setup, WholeRoot};
use super::{Info, Machine, Said, Stops, Warning, fine, hint};
use crate::config::oversight::AuditMode;
use crate::scan::{self, Confidence, ScanPlan, Step};
use crate::units::show_size;

/// An image of some gigabytes holds 50,000 to 200,000 files; a warm tree is walked at 300,000 a second.
const SURVEY_ENTRIES_MAX: u64 = 400_000;
const SURVEY_TIME: Duration = Duration::from_secs(3);
/// For a look that has to come to its end. A hundred times what the largest images took: a disk that hangs ends it.
const THOROUGH_TIME: Duration = Duration::from_secs(600);
/// How often a long look says that it goes on.
const TOLD_EVERY: Duration = Duration::from_secs(10);
/// Of one folder beside a file of ours.
const NEAR_ENTRIES_MAX: u64 = 10_000;
/// Links on the way to one file, as the kernel counts.
const LINKS_MAX: usize = 40;
/// Paths named in one finding; the number of the others is told.
const SHOWN_MAX: usize = 8;
/// What is remembered is small, and a state folder that is full forgets which versions were seen.
const STATE_ROOM_MIN: u64 = 16 << 20;

/// Where packages put what is theirs: set-uid programs are at home there.
const SYSTEM: [&str; 8] = ["/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/usr/libexec", "/bin", "/sbin", "/lib"];

const SET_ID: u32 = 0o6000;
const STICKY: u32 = 0o1000;
const BY_OTHERS: u32 = 0o002;
const BY_GROUP: u32 = 0o020;

/// What a look around found. Paths as the machine knows them.
#[derive(Debug, Default)]
pub struct Survey {
    /// Set-uid and set-gid programs where packages put them, and elsewhere.
    set_id_system: Vec<PathBuf>,
    set_id_elsewhere: Vec<PathBuf>,
    writable: Vec<PathBuf>,
    looked: u64,
    cut_off: bool,
    /// Folders that others than their owner may enter and that we cannot list.
    closed: Vec<PathBuf>,
    /// The whole root was looked at.
    whole: bool,
}

/// How a path is looked up.
struct Way {
    /// Each in which a name of it is looked up, also of a link on the way.
    folders: BTreeSet<PathBuf>,
    /// What it leads to; no link but where there are too many.
    end: PathBuf,
}

impl Machine<'_> {
    /// Where a path of this machine lies below the root that is examined.
    fn place(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn look_at(&self, path: &Path) -> Option<Metadata> {
        std::fs::symlink_metadata(self.place(path)).ok()
    }

    /// Follows `path` as the kernel does, below the root that is examined. What is not there is no link.
    fn way(&self, path: &Path) -> Way {
        let parts = |path: &Path| path.components().rev().map(|part| part.as_os_str().to_owned()).collect::<Vec<_>>();
        let mut way = Way { folders: BTreeSet::new(), end: PathBuf::from("/") };
        let (mut rest, mut links) = (parts(path), 0);
        while let Some(name) = rest.pop() {
            match name.as_bytes() {
                b"/" => way.end = PathBuf::from("/"),
                b"." => {}
                // Where links are followed one by one, it is the folder that the kernel goes to.
                b".." => drop(way.end.pop()),
                _ => {
                    let next = way.end.join(&name);
                    way.folders.insert(std::mem::replace(&mut way.end, next));
                    if links < LINKS_MAX
                        && let Ok(to) = std::fs::read_link(self.place(&way.end))
                    {
                        links += 1;
                        way.end.pop();
                        rest.extend(parts(&to));
                    }
                }
            }
        }
        way
    }

    fn survey(&self, setup: &Setup) -> &Survey {
        self.survey.get_or_init(|| {
            let mut survey = Survey { whole: is_looked_at_whole(setup, &self.root), ..Survey::default() };
            let (time, most, most_near) = match setup.thorough {
                true => (THOROUGH_TIME, u64::MAX, u64::MAX),
                false => (SURVEY_TIME, SURVEY_ENTRIES_MAX, NEAR_ENTRIES_MAX),
            };
            let until = Instant::now() + time;
            if survey.whole {
                survey.tree(self, Path::new("/"), most, until, true);
            }
            // Mounted into the container, hence on other file systems than its root.
            for folder in near(setup).iter().map(|folder| self.way(folder).end).filter(|folder| !is_system(folder)) {
                survey.tree(self, &folder, most_near, until, false);
            }
            let Survey { set_id_system, set_id_elsewhere, writable, closed, .. } = &mut survey;
            for list in [set_id_system, set_id_elsewhere, writable, closed] {
                // It has a rule of its own.
                list.retain(|path| Some(path) != setup.program.as_ref());
                list.sort();
                list.dedup();
            }
            survey
        })
    }
}

/// Whether the file system below `root` is looked at as a whole.
pub fn is_looked_at_whole(setup: &Setup, root: &Path) -> bool {
    match setup.whole_root {
        WholeRoot::Never => false,
        WholeRoot::OfImage => in_container(root),
        WholeRoot::Always => true,
    }
}

/// Whether what runs below `root` was unpacked from an image.
fn in_container(root: &Path) -> bool {
    // Of Docker, Podman, nspawn, and a pod with a token. containerd and CRI-O leave none.
    let marks = [
        ".dockerenv",
        "run/.containerenv",
        "run/host/container-manager",
        "run/systemd/container",
        "var/run/secrets/kubernetes.io/serviceaccount",
    ];
    // Every container of a pod has it, with and without a token; it is this process's, and so says nothing of another root.
    let in_pod = root == Path::new("/") && std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    let mounts = || std::fs::read_to_string(root.join("proc/self/mountinfo"));
    in_pod || marks.iter().any(|mark| root.join(mark).exists()) || mounts().is_ok_and(|text| is_root_unpacked(&text))
}

/// Whether the root is made of layers, or is a folder of another file system: so runtimes mount what they unpacked.
fn is_root_unpacked(mountinfo: &str) -> bool {
    let mounted = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (from, at) = (place.next()?, place.next()?);
        (at == "/").then(|| (from.to_owned(), kind.split(' ').next().unwrap_or_default().to_owned()))
    };
    // The last one lies on top.
    mountinfo.lines().rev().find_map(mounted).is_some_and(|(from, kind)| match kind.as_str() {
        "overlay" | "fuse.fuse-overlayfs" | "aufs" => true,
        // Machines have their root in a subvolume as well.
        "btrfs" => false,
        _ => from != "/",
    })
}

/// Model weights in plaintext that came with an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baked {
    /// By structure, or by name and size.
    pub found: Vec<PathBuf>,
    pub files: u64,
    /// Why not all was looked at, or could be.
    pub unseen: Option<String>,
    /// What could not be read of it.
    pub unread: Vec<PathBuf>,
}

/// How long an image may be looked at for weights, where Vault and the store have `wait`.
pub fn time_for_weights(setup: &Setup, wait: Duration) -> Duration {
    if setup.thorough { THOROUGH_TIME } else { wait }
}

/// Looks at an image as `modelfs scan` does, for `time` at most.
pub fn baked(root: &Path, time: Duration) -> Baked {
    let plan = ScanPlan { time: Some(time), ..ScanPlan::quick(root) };
    let (began, told, passed) = (Instant::now(), AtomicU64::new(0), AtomicU64::new(0));
    let progress = |step| {
        let Step::Passed(bytes) = step else { return };
        let passed = passed.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let turn = began.elapsed().as_secs() / TOLD_EVERY.as_secs();
        if told.fetch_max(turn, Ordering::Relaxed) < turn {
            tracing::info!("looking for weights in the image: {} so far", show_size(passed));
        }
    };
    match scan::scan(&plan, &progress) {
        Err(error) => Baked { unseen: Some(error.chain()), ..Baked::default() },
        Ok(report) => {
            let unread = report.unread.len() as u64 + report.unread_untold;
            let mut places: Vec<PathBuf> = report.unread.iter().map(|place| Path::new("/").join(&place.path)).collect();
            places.sort();
            let why = report.unread.first().map_or("", |place| place.why.as_str());
            let unseen = match (report.complete, unread) {
                (true, 0) => None,
                (true, 1) => Some(format!("{} could not be read: {why}", list(&places))),
                (true, some) => Some(format!("{some} places could not be read: {}", list(&places))),
                (false, _) => Some(format!("the time of {} s was over", time.as_secs())),
            };
            let found = report.at_least(Confidence::Likely).map(|finding| Path::new("/").join(&finding.path)).collect();
            Baked { found, files: report.looked.files, unseen, unread: places }
        }
    }
}

/// The folders that hold the program and the files of the configuration, except where everything of the system lies.
fn near(setup: &Setup) -> BTreeSet<PathBuf> {
    let files = setup.files().into_iter().map(|named| named.path).chain(setup.program.clone());
    let folders = files.filter_map(|path| path.parent().map(Path::to_owned)).chain(setup.state_dir.clone());
    folders.filter(|folder| !is_system(folder) && folder.components().count() > 1).collect()
}

fn is_system(path: &Path) -> bool {
    SYSTEM.iter().any(|system| path.starts_with(system))
}

impl Survey {
    fn tree(&mut self, machine: &Machine<'_>, top: &Path, most: u64, until: Instant, deep: bool) {
        let Some(first) = machine.look_at(top).filter(Metadata::is_dir) else { return };
        // Everybody's own folder, as /tmp: what lies in it is not ours to judge.
        if first.mode() & BY_OTHERS != 0 && !deep {
            return;
        }
        let mut folders = vec![top.to_owned()];
        let mut looked = 0;
        while let Some(folder) = folders.pop() {
            let entries = match std::fs::read_dir(machine.place(&folder)) {
                Ok(entries) => entries,
                // A tree is alive.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(_) => {
                    // Into one that its owner alone may enter nobody else gets, nor through it to other rights.
                    if machine.look_at(&folder).is_none_or(|meta| meta.mode() & 0o011 != 0) {
                        self.closed.push(folder);
                    }
                    continue;
                }
            };
            for entry in entries {
                let Ok(entry) = entry else {
                    self.closed.push(folder.clone());
                    break;
                };
                looked += 1;
                if looked > most || (looked % 256 == 0 && Instant::now() > until) {
                    self.cut_off = true;
                    self.looked += looked;
                    return;
                }
                let meta = match entry.metadata() {
                    Ok(meta) => meta,
                    Err(e) => {
                        if e.kind() != std::io::ErrorKind::NotFound && self.closed.last() != Some(&folder) {
                            self.closed.push(folder.clone());
                        }
                        continue;
                    }
                };
                let path = folder.join(entry.file_name());
                if meta.is_dir() {
                    let open_to_all = meta.mode() & BY_OTHERS != 0 && meta.mode() & STICKY == 0;
                    if open_to_all {
                        self.writable.push(path.clone());
                    }
                    if deep && meta.dev() == first.dev() {
                        folders.push(path);
                    }
                } else if meta.is_file() {
                    if meta.mode() & BY_OTHERS != 0 {
                        self.writable.push(path.clone());
                    }
                    // Without the right to execute, set-gid means locking, as it once did.
                    if meta.mode() & SET_ID != 0 && meta.mode() & 0o111 != 0 {
                        let trusted = is_system(&path) && meta.uid() == 0 && meta.mode() & BY_OTHERS == 0;
                        if trusted { &mut self.set_id_system } else { &mut self.set_id_elsewhere }.push(path);
                    }
                }
            }
        }
        self.looked += looked;
    }

    /// Why not all was seen.
    fn unseen(&self) -> Option<String> {
        let cut = self.cut_off.then(|| format!("after {} entries the time was over", self.looked));
        cut.or_else(|| (!self.closed.is_empty()).then(|| format!("{} cannot be listed", list(&self.closed))))
    }
}

fn list(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().take(SHOWN_MAX).map(|path| path.display().to_string()).collect();
    match paths.len().saturating_sub(SHOWN_MAX) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// A shell reads them back as they are.
fn quoted(paths: &[PathBuf]) -> String {
    let quote = |path: &PathBuf| {
        let text = path.display().to_string();
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+@:,=".contains(&b));
        if plain { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
    };
    paths.iter().take(SHOWN_MAX).map(quote).collect::<Vec<_>>().join(" ")
}

fn own_uid() -> u32 {
    // SAFETY: geteuid only reads this process's credentials.
    unsafe { libc::geteuid() }
}

fn own_gid() -> u32 {
    // SAFETY: as above.
    unsafe { libc::getegid() }
}

/// What is wrong with a file, and the command that mends it.
fn fault(machine: &Machine<'_>, named: &Named) -> Option<(String, String)> {
    let shown = format!("{} {}", named.option, named.path.display());
    let quote = quoted(std::slice::from_ref(&named.path));
    let place = machine.place(&named.path);
    // Whoever opens a secret refuses a link; the others are followed, and the file that they lead to is judged.
    let followed = named.needs != Needs::Secret;
    let meta = if followed { std::fs::metadata(&place) } else { std::fs::symlink_metadata(&place) };
    let meta = match meta {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Some((format!("{shown} is not there"), format!("ls -l {quote}; make it, or name another")));
        }
        Err(error) => return Some((format!("{shown}: {error}"), format!("ls -l {quote}"))),
    };
    if !meta.is_file() {
        let what = if meta.is_symlink() { "a link" } else { "no regular file" };
        return Some((format!("{shown} is {what}"), format!("readlink -f {quote}; name the file itself")));
    }
    let mode = meta.mode() & 0o7777;
    if meta.uid() != 0 && meta.uid() != own_uid() {
        let fix = format!("chown {} {quote}", own_uid());
        return Some((format!("{shown} belongs to uid {}", meta.uid()), fix));
    }
    let (forbidden, fix) = match named.needs {
        Needs::Secret => (0o077, "chmod 600"),
        Needs::Projected => (0o027, "chmod o=,g-w"),
        Needs::Trusted => (0o022, "chmod go-w"),
    };
    (mode & forbidden != 0).then(|| (format!("{shown} has mode {mode:04o}"), format!("{fix} {quote}")))
}

fn faults(machine: &Machine<'_>, files: &[Named]) -> Option<(String, String)> {
    let found: Vec<(String, String)> = files.iter().filter_map(|named| fault(machine, named)).collect();
    let join = |list: Vec<String>| list.join("; ");
    let (seen, fixes): (Vec<String>, Vec<String>) = found.into_iter().unzip();
    (!seen.is_empty()).then(|| (join(seen), join(fixes)))
}

pub(super) fn secret_files(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "keys, tokens and passwords in files that their owner alone can read";
    let mut files = machine.facts.setup.as_ref()?.files();
    files.retain(|named| named.needs != Needs::Trusted);
    match faults(machine, &files) {
        // A secret that others may read is refused by whoever is to use it.
        Some((seen, fix)) => hint(Stops, seen, WANTED, fix),
        None => fine(format!("{} file(s)", files.len()), WANTED),
    }
}

pub(super) fn trusted_files(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "configuration, trust, policy and certificates that only their owner or root can write";
    let mut files = machine.facts.setup.as_ref()?.files();
    files.retain(|named| named.needs == Needs::Trusted);
    // A certificate is read whoever can write it; the others are refused by whoever is to believe them.
    let (read_anyway, refused): (Vec<Named>, Vec<Named>) =
        files.into_iter().partition(|named| named.option.ends_with("cert"));
    match (faults(machine, &refused), faults(machine, &read_anyway)) {
        (Some((seen, fix)), None) => hint(Stops, seen, WANTED, fix),
        (Some((seen, fix)), Some((too, mend))) => {
            hint(Stops, format!("{seen}; {too}"), WANTED, format!("{fix}; {mend}"))
        }
        (None, Some((seen, fix))) => hint(Warning, seen, WANTED, fix),
        (None, None) => fine(format!("{} file(s)", refused.len() + read_anyway.len()), WANTED),
    }
}

/// Every folder in which a name is looked up on the way to each of ours, links followed: whoever may write in one may put
/// another in its place.
pub(super) fn folders(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str =
        "folders above the program, its files, its state and the mountpoint that only root or we can write in";
    let setup = machine.facts.setup.as_ref()?;
    let files = setup.files().into_iter().map(|named| named.path);
    let mut above: BTreeSet<PathBuf> =
        files.chain(setup.program.clone()).flat_map(|path| machine.way(&path).folders).collect();
    if let Some(dir) = &setup.state_dir {
        let way = machine.way(dir);
        above.extend(way.folders);
        above.insert(way.end);
    }
    // Nothing is asked of the mountpoint itself: a mount that is dead may lie on it.
    if let Some(parent) = setup.mountpoint.as_ref().and_then(|path| path.parent()) {
        let way = machine.way(parent);
        above.extend(way.folders);
        above.insert(way.end);
    }
    let mut open: Vec<PathBuf> = Vec::new();
    let mut strange: Vec<PathBuf> = Vec::new();
    for folder in above {
        let Some(meta) = machine.look_at(&folder).filter(Metadata::is_dir) else { continue };
        let group_is_root_or_us = meta.gid() == 0 || meta.gid() == own_gid();
        let others = meta.mode() & BY_OTHERS != 0 || (meta.mode() & BY_GROUP != 0 && !group_is_root_or_us);
        if others && meta.mode() & STICKY == 0 {
            open.push(folder);
        } else if meta.uid() != 0 && meta.uid() != own_uid() {
            strange.push(folder);
        }
    }
    match (open.as_slice(), strange.as_slice()) {
        ([], []) => fine("closed to others", WANTED),
        ([], strange) => hint(
            Warning,
            format!("{} belongs to another user", list(strange)),
            WANTED,
            format!("chown root {}", quoted(strange)),
        ),
        (open, _) => {
            hint(Warning, format!("others can write in {}", list(open)), WANTED, format!("chmod go-w {}", quoted(open)))
        }
    }
}

pub(super) fn program(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "a program that belongs to root or us, that nobody else can write, without set-uid";
    let path = machine.facts.setup.as_ref()?.program.as_ref()?;
    let meta = machine.look_at(path)?;
    let (shown, quote) = (path.display(), quoted(std::slice::from_ref(path)));
    let mode = meta.mode() & 0o7777;
    if mode & SET_ID != 0 {
        return hint(Warning, format!("{shown} is set-uid or set-gid"), WANTED, format!("chmod a-s {quote}"));
    }
    if mode & (BY_OTHERS | BY_GROUP) != 0 && (mode & BY_OTHERS != 0 || meta.gid() != 0) {
        return hint(Warning, format!("{shown} has mode {mode:04o}"), WANTED, format!("chmod go-w {quote}"));
    }
    if meta.uid() != 0 && meta.uid() != own_uid() {
        let fix = format!("chown root {quote}");
        return hint(Warning, format!("{shown} belongs to uid {}", meta.uid()), WANTED, fix);
    }
    fine(shown.to_string(), WANTED)
}

pub(super) fn set_id(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no set-uid program beside ours; in a container none at all, or no_new_privs";
    let survey = machine.survey(machine.facts.setup.as_ref()?);
    let fix = |paths: &[PathBuf]| format!("chmod a-s {}", quoted(paths));
    if !survey.set_id_elsewhere.is_empty() {
        let seen = format!("{} lead to other rights", list(&survey.set_id_elsewhere));
        return hint(Warning, seen, WANTED, fix(&survey.set_id_elsewhere));
    }
    let inert =
        machine.text("proc/self/status").is_some_and(|status| status.lines().any(|line| line == "NoNewPrivs:\t1"));
    if let Some(why) = survey.unseen().filter(|_| !inert) {
        let seen = format!("none elsewhere in what was seen, but not all was: {why}");
        return hint(Warning, seen, WANTED, see_all(&survey.closed));
    }
    match (survey.set_id_system.len(), survey.whole && !inert) {
        (0, _) => fine(format!("none in {} entries", survey.looked), WANTED),
        (some, false) => fine(format!("{some} of the system's own, without effect here"), WANTED),
        (some, true) => {
            let seen = format!("{some} in this image: {}", list(&survey.set_id_system));
            let fix = "docker run --security-opt no-new-privileges, allowPrivilegeEscalation: false, or in the image \
                       `find / -xdev -perm /6000 -type f -exec chmod a-s {} +`";
            hint(Info, seen, WANTED, fix)
        }
    }
}

pub(super) fn world_writable(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "nothing that everybody can write beside the program and its files, or in a container's image";
    let survey = machine.survey(machine.facts.setup.as_ref()?);
    match (survey.writable.as_slice(), survey.unseen()) {
        ([], None) => fine(format!("none in {} entries", survey.looked), WANTED),
        ([], Some(why)) => {
            hint(Warning, format!("none in what was seen, but not all was: {why}"), WANTED, see_all(&survey.closed))
        }
        (writable, _) => {
            let seen = format!("everybody can write {}", list(writable));
            hint(Warning, seen, WANTED, format!("chmod o-w {}", quoted(writable)))
        }
    }
}

/// Where not all was seen: these could not be read, or else the time was over.
fn see_all(closed: &[PathBuf]) -> String {
    match closed {
        [] => "modelfs doctor --strict, which looks to the end".into(),
        closed => format!(
            "let them be read (chmod a+rX {}), or in an image delete them in the step that makes them",
            quoted(closed)
        ),
    }
}

pub(super) fn baked_models(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "no model weights in plaintext in the image: they come by the mount alone";
    let baked = machine.facts.baked.as_ref()?;
    let cut = baked.unseen.as_ref().map_or(String::new(), |why| format!("; not all was seen: {why}"));
    match (baked.found.as_slice(), &baked.unseen) {
        ([], None) => fine(format!("none in {} files", baked.files), WANTED),
        // Not known to be clean.
        ([], Some(why)) => {
            let seen = format!("none in {} files, but not all was seen: {why}", baked.files);
            let fix = match baked.unread.is_empty() {
                true => format!("modelfs scan IMAGE.tar before it is used; {}", see_all(&[])),
                false => see_all(&baked.unread),
            };
            hint(Warning, seen, WANTED, fix)
        }
        (found, _) => {
            let fix = "modelfs scan / tells each; build the image without them, and seal them (modelfs seal)";
            hint(Warning, format!("{}{cut}", list(found)), WANTED, fix)
        }
    }
}

pub(super) fn state_room(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "room to remember which versions were seen";
    let dir = machine.facts.setup.as_ref()?.state_dir.as_ref()?;
    let free = machine.room(dir)?;
    let seen = format!("{} free at {}", show_size(free), dir.display());
    if free >= STATE_ROOM_MIN {
        return fine(seen, WANTED);
    }
    let fix = format!("df -h {}; make room, or --state-dir ELSEWHERE", quoted(std::slice::from_ref(dir)));
    hint(Warning, seen, WANTED, fix)
}

pub(super) fn audit_room(machine: &Machine<'_>) -> Option<Said> {
    const WANTED: &str = "room for the audit log until it is rotated";
    let audit = &machine.facts.setup.as_ref()?.oversight.audit;
    let file = audit.file.as_ref()?;
    let free = machine.room(file.parent()?)?;
    let seen =
        format!("{} free at {}, a file takes {}", show_size(free), file.display(), show_size(audit.file_bytes_max));
    let folder = quoted(&[file.parent()?.to_owned()]);
    match audit.mode {
        _ if free >= audit.file_bytes_max => fine(seen, WANTED),
        AuditMode::Required => {
            let seen = format!("{seen}; once it is full, opens are refused");
            hint(Warning, seen, WANTED, format!("df -h {folder}; make room, or a smaller audit-file-bytes"))
        }
        AuditMode::On | AuditMode::Off => {
            hint(Warning, seen, WANTED, format!("df -h {folder}; make room, or a smaller audit-file-bytes"))
        }
    }
}

impl Machine<'_> {
    /// Bytes that we may still write in `folder`, or where it would be made.
    fn room(&self, folder: &Path) -> Option<u64> {
        let there = folder.ancestors().map(|folder| self.place(folder)).find(|folder| folder.is_dir())?;
        let path = CString::new(there.as_os_str().as_bytes()).ok()?;
        let mut told = std::mem::MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: a NUL-terminated path and a buffer of the right size, both alive through the call; read only if filled.
        let told = unsafe { (libc::statvfs(path.as_ptr(), told.as_mut_ptr()) == 0).then(|| told.assume_init()) }?;
        told.f_bavail.checked_mul(told.f_frsize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Facts, Severity};

    /// What containerd, CRI-O, Podman, `docker` and machines show of their root.
    #[test]
    fn a_root_of_layers_and_one_that_is_a_folder_of_another_file_system_came_with_an_image() {
        let line =
            |from: &str, at: &str, kind: &str| format!("627 510 0:71 {from} {at} rw,relatime master:1 - {kind} x rw\n");
        let below = line("/", "/proc", "proc") + &line("/pods/a/etc-hosts", "/etc/hosts", "ext4");
        for (from, kind, unpacked) in [
            ("/", "overlay", true),
            ("/", "fuse.fuse-overlayfs", true),
            ("/var/lib/containerd/io.containerd.snapshotter.v1.native/snapshots/7", "ext4", true),
            ("/", "ext4", false),
            ("/", "tmpfs", false),
            ("/@", "btrfs", false),
        ] {
            let text = line(from, "/", kind) + &below;
            assert_eq!(is_root_unpacked(&text), unpacked, "{kind} {from}");
        }
        // An initramfs lies below what is the root now.
        assert!(!is_root_unpacked(&(line("/", "/", "overlay") + &line("/", "/", "ext4"))));
        assert!(!is_root_unpacked("") && !is_root_unpacked("nonsense / / - overlay"));
        let root = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir_all(root.path().join("proc/self")).expect("mkdir");
        assert!(!in_container(root.path()));
        std::fs::write(root.path().join("proc/self/mountinfo"), line("/", "/", "overlay")).expect("written");
        assert!(in_container(root.path()));
        let whole = |whole_root| is_looked_at_whole(&Setup { whole_root, ..Setup::default() }, root.path());
        assert!(whole(WholeRoot::OfImage) && !whole(WholeRoot::Never));
        std::fs::remove_file(root.path().join("proc/self/mountinfo")).expect("removed");
        assert!(whole(WholeRoot::Always) && !whole(WholeRoot::OfImage), "no mark is needed");
    }

    #[test]
    fn a_survey_that_did_not_see_all_fails_a_strict_check_of_both_its_rules() {
        let root = tempfile::tempdir().expect("a temporary folder");
        for number in 0..10 {
            std::fs::write(root.path().join(number.to_string()), "").expect("written");
        }
        let facts = Facts { setup: Some(Setup::default()), ..Facts::default() };
        let looked = |survey: Survey| {
            let machine = Machine::new(root.path(), &facts);
            machine.survey.set(survey).expect("the first");
            [set_id(&machine), world_writable(&machine)].map(|said| said.expect("there is a setup"))
        };
        let surveyed = |most, time| {
            let mut survey = Survey { whole: true, ..Survey::default() };
            survey.tree(&Machine::new(root.path(), &facts), Path::new("/"), most, Instant::now() + time, true);
            survey
        };
        for said in looked(surveyed(1000, Duration::from_secs(60))) {
            assert_eq!((said.severity, said.seen.as_str()), (Severity::Fine, "none in 10 entries"));
        }
        for said in looked(surveyed(5, Duration::from_secs(60))) {
            assert!(said.severity == Warning && said.seen.contains("not all was"), "{}", said.seen);
        }
        let closed = || Survey { closed: vec!["/opt/app".into()], whole: true, ..Survey::default() };
        for said in looked(closed()) {
            assert!(said.severity == Warning && said.seen.contains("/opt/app cannot be listed"), "{}", said.seen);
        }
    }

    #[test]
    fn a_thorough_look_has_the_time_it_needs() {
        let (brief, wait) = (Setup::default(), Duration::from_secs(5));
        assert_eq!(time_for_weights(&brief, wait), wait);
        assert_eq!(time_for_weights(&Setup { thorough: true, ..Setup::default() }, wait), THOROUGH_TIME);
    }
}
