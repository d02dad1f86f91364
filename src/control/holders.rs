//! Who still uses a mount: read from /proc, without asking the filesystem anything.

use std::path::{Path, PathBuf};

use serde::Serialize;

/// One process and what of the mount it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    pub pid: u32,
    pub command: String,
    /// Open files, mapped files, or the working folder, below the mountpoint; at most [`PATHS_MAX`].
    pub paths: Vec<PathBuf>,
}

/// An error names a few paths, not thousands.
const PATHS_MAX: usize = 8;
/// Nor thousands of processes.
const HOLDERS_MAX: usize = 64;

/// Processes that have something below `mountpoint` (canonical) open, mapped, or as their folder.
///
/// A hint: processes come and go, and those of other users show nothing unless we are root. Only links of /proc are read,
/// which the kernel answers without the filesystem, so a hung mount cannot hang this.
pub fn holders(mountpoint: &Path) -> Vec<Holder> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let own = std::process::id();
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != own).filter_map(|pid| holder(pid, mountpoint)).take(HOLDERS_MAX).collect()
}

fn holder(pid: u32, mountpoint: &Path) -> Option<Holder> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let mut links = vec![process.join("cwd"), process.join("root"), process.join("exe")];
    if let Ok(open) = std::fs::read_dir(process.join("fd")) {
        links.extend(open.filter_map(|entry| Some(entry.ok()?.path())));
    }
    let mut paths: Vec<PathBuf> = links.iter().filter_map(|link| std::fs::read_link(link).ok()).collect();
    if let Ok(maps) = std::fs::read_to_string(process.join("maps")) {
        // "address perms offset dev inode path": the path is all after the fifth run of blanks.
        paths.extend(maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..]))));
    }
    paths.retain(|path| path.starts_with(mountpoint));
    paths.sort();
    paths.dedup();
    if paths.is_empty() {
        return None;
    }
    paths.truncate(PATHS_MAX);
    let command = std::fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_string();
    Some(Holder { pid, command, paths })
}

/// `pid 12 (python) holds /mnt/m/a.safetensors; ...`, for an error of code `Held`.
pub fn tell_holders(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "a process that cannot be seen from here still holds files of it".into();
    }
    let one = |holder: &Holder| {
        let paths: Vec<String> = holder.paths.iter().map(|path| path.display().to_string()).collect();
        format!("pid {} ({}) holds {}", holder.pid, holder.command, paths.join(", "))
    };
    holders.iter().map(one).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_in_a_folder_is_named() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().canonicalize().expect("canonical");
        let mut child = std::process::Command::new("sleep").arg("600").current_dir(&path).spawn().expect("sleep");

        // The child changes its folder between fork and exec; spawn returns after exec.
        let found = holders(&path);

        child.kill().expect("killed");
        child.wait().expect("waited");
        assert!(found.iter().any(|holder| holder.pid == child.id()), "{found:?}");
        assert!(tell_holders(&found).contains("sleep"), "{}", tell_holders(&found));
        assert!(holders(Path::new("/nowhere/at/all")).is_empty());
    }
}
