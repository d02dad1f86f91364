//! Who has what of a mount: what the daemon knows of its open files, joined with what /proc shows of processes.
//!
//! In: the open files the daemon answers for, and the mountpoint. Out: one entry a process.
//! Promises: every open file the daemon knows is in the answer, if only under a process that cannot be named; maps that
//! outlive their descriptor are found where /proc shows them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::processes::{self, Process};

/// Files told of one process; the rest is counted.
const FILES_MAX: usize = 64;

/// An open file as the daemon answered it.
#[derive(Debug, Clone)]
pub struct Taken {
    /// `None`: of a pid namespace that we do not see, or the thread that opened it has ended.
    pub pid: Option<u32>,
    pub uid: u32,
    pub since: SystemTime,
    /// Absolute, below the mountpoint.
    pub path: PathBuf,
    pub passthrough: bool,
}

/// What a process has of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SessionFile {
    pub path: PathBuf,
    /// Opens answered to this process and not closed; children that inherited a descriptor have none of their own.
    pub opens: u64,
    /// Of those, opens that bypass the daemon.
    pub passthrough: u64,
    /// Mapped into its memory.
    pub mapped: bool,
    /// Unix seconds of the first of these opens; `None` if it opened none itself.
    pub since: Option<u64>,
}

/// A process and what it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SessionInfo {
    #[serde(flatten)]
    pub process: Process,
    pub files: Vec<SessionFile>,
    /// Files beyond those told.
    pub more_files: usize,
    pub shut_out: bool,
}

/// Everyone who has a file of the mount open or mapped, by process number; who cannot be seen stands under 0, one entry a
/// user. `is_shut_out` judges a user and process.
pub fn sessions(mountpoint: &Path, taken: &[Taken], is_shut_out: impl Fn(u32, &Process) -> bool) -> Vec<SessionInfo> {
    let seen = look(mountpoint);
    // Process and, of those unseen, the user.
    let mut found: BTreeMap<(u32, u32), BTreeMap<PathBuf, SessionFile>> = BTreeMap::new();
    let mut uids: HashMap<u32, u32> = HashMap::new();
    for (pid, files) in &seen {
        let process = processes::process(*pid);
        uids.insert(*pid, process.uid.unwrap_or(u32::MAX));
        for (path, have) in files {
            let file = found.entry((*pid, 0)).or_default().entry(path.clone()).or_default();
            file.path.clone_from(path);
            file.mapped = have.mapped;
        }
    }
    // Whose opener is known first, so that the others are given to who has a descriptor too many.
    let (known, unknown): (Vec<&Taken>, Vec<&Taken>) = taken.iter().partition(|open| open.pid.is_some());
    for open in known.into_iter().chain(unknown) {
        let spare = || {
            seen.iter().find(|(pid, files)| {
                let told = found.get(&(**pid, 0)).and_then(|files| files.get(&open.path)).map_or(0, |file| file.opens);
                uids.get(pid) == Some(&open.uid) && files.get(&open.path).is_some_and(|have| have.descriptors > told)
            })
        };
        let owner = open.pid.or_else(|| spare().map(|(pid, _)| *pid));
        let key = owner.map_or((0, open.uid), |pid| (pid, 0));
        let file = found.entry(key).or_default().entry(open.path.clone()).or_default();
        file.path.clone_from(&open.path);
        file.opens += 1;
        file.passthrough += u64::from(open.passthrough);
        let since = open.since.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        file.since = Some(file.since.map_or(since, |first| first.min(since)));
    }
    let told = |((pid, uid), files): ((u32, u32), BTreeMap<PathBuf, SessionFile>)| {
        let process = match pid {
            0 => Process { uid: Some(uid), ..Process::default() },
            pid => processes::process(pid),
        };
        let more_files = files.len().saturating_sub(FILES_MAX);
        let shut_out = is_shut_out(process.uid.unwrap_or(u32::MAX), &process);
        SessionInfo { process, files: files.into_values().take(FILES_MAX).collect(), more_files, shut_out }
    };
    found.into_iter().map(told).collect()
}

#[derive(Default)]
struct Have {
    descriptors: u64,
    mapped: bool,
}

/// Files below the mountpoint that processes have open or mapped, as /proc shows it: links and tables that the kernel
/// answers without asking the filesystem. Directories and working folders are no sessions.
fn look(mountpoint: &Path) -> BTreeMap<u32, BTreeMap<PathBuf, Have>> {
    let mut seen = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return seen };
    let own = std::process::id();
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    for pid in pids.filter(|pid| *pid != own) {
        let mut files: BTreeMap<PathBuf, Have> = BTreeMap::new();
        if let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) {
            for link in descriptors.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()) {
                if let Some(path) = below(&link, mountpoint) {
                    files.entry(path).or_default().descriptors += 1;
                }
            }
        }
        if let Ok(maps) = std::fs::read_to_string(format!("/proc/{pid}/maps")) {
            for line in maps.lines() {
                if let Some(path) = line.find('/').and_then(|at| below(Path::new(&line[at..]), mountpoint)) {
                    files.entry(path).or_default().mapped = true;
                }
            }
        }
        if !files.is_empty() {
            seen.insert(pid, files);
        }
    }
    seen
}

/// A file's path as a link of /proc tells it; a name that the kernel was made to forget is told as deleted.
fn below(link: &Path, mountpoint: &Path) -> Option<PathBuf> {
    if !link.starts_with(mountpoint) || link == mountpoint {
        return None;
    }
    let text = link.to_str()?;
    Some(PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_of_unseen_processes_are_told_by_user_and_none_is_lost() {
        let open = |pid, uid| Taken {
            pid,
            uid,
            since: UNIX_EPOCH + std::time::Duration::from_secs(7),
            path: "/nowhere/m/a".into(),
            passthrough: uid == 5,
        };
        let own = std::process::id();
        let taken = [open(None, 5), open(None, 5), open(None, 6), open(Some(own), 0)];
        let told = sessions(Path::new("/nowhere/m"), &taken, |uid, _| uid == 6);
        let opens = |pid: u32, uid: u32| {
            let session = told.iter().find(|it| it.process.pid == pid && (pid != 0 || it.process.uid == Some(uid)));
            session.map_or(0, |session| session.files.iter().map(|file| file.opens).sum::<u64>())
        };
        assert_eq!((opens(0, 5), opens(0, 6), opens(own, 0)), (2, 1, 1), "{told:?}");
        assert!(told.iter().all(|it| it.shut_out == (it.process.uid == Some(6))), "{told:?}");
        assert_eq!(told[0].files[0].since, Some(7));
    }

    #[test]
    fn a_process_with_a_file_open_and_mapped_is_found_without_the_daemon() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mountpoint = dir.path().canonicalize().expect("canonical");
        let path = mountpoint.join("f");
        std::fs::write(&path, "x").expect("written");
        let input = std::fs::File::open(&path).expect("open");
        let mut child = std::process::Command::new("sleep").arg("600").stdin(input).spawn().expect("sleep");

        let told = sessions(&mountpoint, &[], |_, _| false);

        child.kill().expect("killed");
        child.wait().expect("waited");
        let session = told.iter().find(|it| it.process.pid == child.id()).expect("told");
        assert_eq!(session.process.command, "sleep");
        assert_eq!(session.files, [SessionFile { path, ..SessionFile::default() }]);
    }
}
