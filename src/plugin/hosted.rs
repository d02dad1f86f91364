//! Volumes as mounts of one host: one process, one locked cache, whatever the number of volumes.
//!
//! Held by: tests/docker.sh.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{Mounter, Options, Policy, Standing, asker};
use crate::config::MountPlan;
use crate::error::{Code, Error, Result};
use crate::host::{Host, Mounted};
use crate::mounts;

/// More layers of dead mounts than a plugin leaves that is killed at every start.
const DEAD_MOUNTS_MAX: usize = 64;

pub struct HostMounter {
    host: Arc<Host>,
    policy: Policy,
}

impl HostMounter {
    pub fn new(host: Arc<Host>, policy: Policy) -> HostMounter {
        HostMounter { host, policy }
    }

    fn plan(&self, options: &Options, mountpoint: &Path) -> Result<MountPlan> {
        let (store, layers) = self.policy.admit(options)?;
        MountPlan::from_layers(&layers, &store, mountpoint, true)
    }
}

impl Mounter for HostMounter {
    fn check(&self, options: &Options, mountpoint: &Path) -> Result<()> {
        self.plan(options, mountpoint).map(drop)
    }

    /// What the options name is checked again: files and links may be others by now.
    fn mount(&self, options: &Options, mountpoint: &Path) -> Result<Arc<dyn Standing>> {
        let plan = self.plan(options, mountpoint)?;
        Ok(self.host.mount(plan)?)
    }

    fn is_elsewhere(&self, mountpoint: &Path) -> bool {
        asker::is_elsewhere(mountpoint)
    }

    fn clear(&self, mountpoint: &Path) -> Result<()> {
        clear(mountpoint)
    }
}

impl Standing for Mounted {
    fn is_mounted(&self) -> bool {
        Mounted::is_mounted(self)
    }

    fn models(&self) -> Vec<String> {
        self.ready().models.clone()
    }

    fn unmount(&self, grace: Duration) -> Result<()> {
        Mounted::unmount(self, grace)
    }
}

/// Only what is ours; looked up in the mount table, since looking at a dead mount answers nothing.
fn clear(mountpoint: &Path) -> Result<()> {
    for _ in 0..DEAD_MOUNTS_MAX {
        match mounts::at(mountpoint)? {
            None => return Ok(()),
            Some(mount) if mount.is_ours() => {}
            Some(mount) => {
                return Err(Error::new(
                    Code::MountPoint,
                    format!("a {} filesystem is mounted on {}; unmount it", mount.kind, mountpoint.display()),
                ));
            }
        }
        let path = CString::new(mountpoint.as_os_str().as_bytes()).expect("a volume's name holds no NUL");
        tracing::info!("taking off what a dead plugin left on {}", mountpoint.display());
        // SAFETY: `path` is a C string that outlives the call.
        if unsafe { libc::umount2(path.as_ptr(), libc::UMOUNT_NOFOLLOW | libc::MNT_DETACH) } != 0 {
            return Err(Error::os(Code::Host, format!("cannot unmount {}", mountpoint.display())));
        }
    }
    Err(Error::new(Code::MountPoint, format!("{} has mounts without end", mountpoint.display())))
}
