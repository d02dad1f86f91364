//! Whether the engine that asked for a mount still is, and whether anybody uses what it asked for.
//!
//! A Docker engine that is killed ends its containers when it starts again, and lets go of none of their volumes. Podman
//! is no such process: each of its commands asks and ends, and another one lets go.
//!
//! In: the number of the process at the other end of the socket. Out: what /proc says.
//! Promises: where nothing can be seen (another pid namespace) whoever asked is taken to be there.
//! Held by: the tests below, tests/docker.sh.

use std::path::Path;

use crate::mounts;

/// A process: its number, and when it started, since numbers come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asker {
    pid: u32,
    started: u64,
}

impl Asker {
    /// `None` for one that this pid namespace does not show.
    pub fn of(pid: Option<i32>) -> Option<Asker> {
        let pid = pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0)?;
        Some(Asker { pid, started: started(pid)? })
    }

    pub fn is_there(self) -> bool {
        started(self.pid) == Some(self.started)
    }
}

/// In clock ticks since the machine booted; `None` for a process that is gone, or only waits to be collected.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, field 2, may hold spaces and parentheses: count from behind its last one (proc(5): 3 and 22).
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X");
    if dead { None } else { fields.nth(18)?.parse().ok() }
}

/// Whether the mount on `mountpoint` is anywhere else too, in any process's mount namespace: a container has it.
pub fn is_elsewhere(mountpoint: &Path) -> bool {
    let Ok(Some(mount)) = mounts::at(mountpoint) else { return false };
    let Ok(processes) = std::fs::read_dir("/proc") else { return true };
    processes.filter_map(|entry| entry.ok()).any(|entry| {
        let is_process = entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
        // One that ended meanwhile uses nothing.
        is_process
            && std::fs::read_to_string(entry.path().join("mountinfo"))
                .is_ok_and(|table| mounts::is_elsewhere_in(&table, &mount.device, mountpoint))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_there_until_it_ends_and_its_number_alone_is_not_believed() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let asker = Asker::of(i32::try_from(child.id()).ok()).unwrap();
        assert!(asker.is_there());
        assert!(!Asker { started: asker.started + 1, ..asker }.is_there());
        child.kill().unwrap();
        // Nobody has collected it yet.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(120);
        while asker.is_there() {
            assert!(std::time::Instant::now() < until);
        }
        child.wait().unwrap();
        assert!(!asker.is_there());
    }

    #[test]
    fn who_cannot_be_seen_is_nobody() {
        assert_eq!(Asker::of(None), None);
        assert_eq!(Asker::of(Some(0)), None);
        assert_eq!(Asker::of(Some(i32::MAX)), None);
    }

    #[test]
    fn what_is_not_mounted_is_nowhere_else() {
        assert!(!is_elsewhere(Path::new("/no/such/mount")));
    }
}
