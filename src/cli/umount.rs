//! `modelfs umount`.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use super::Out;
use crate::control::{self, Request};
use crate::error::{Code, Error, Result};
use crate::mounts;
use crate::units;

/// Stop a mount: its daemon unmounts, wipes keys and plaintext, and ends.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct UmountArgs {
    /// Where it is mounted
    mountpoint: PathBuf,
    /// Longest time to wait for the daemon
    #[arg(long, value_name = "TIME", default_value = "60s")]
    timeout: String,
}

const EXAMPLES: &str = "\
Examples:
  modelfs umount /mnt/models
  modelfs umount /mnt/models || fuser -vm /mnt/models     see who holds files (exit 24)

While files are open or mapped it waits 10 s, then the mount is detached all the same: gone from the tree, keys and \
everything that nobody holds wiped, the holders named, exit 24. A mount whose daemon is gone is taken off with umount2, or \
fusermount3 without the right to.";

pub fn run(args: &UmountArgs, out: &Out) -> Result<()> {
    let wait = units::parse_duration(&args.timeout).map_err(|e| e.context("--timeout"))?;
    let mountpoint = mounts::canonical(&args.mountpoint)?;
    // What lies below it may be a mount too, and stays.
    let before = mounts::at(&mountpoint)?.filter(mounts::Mount::is_ours);
    let how = match control::ask(&mountpoint, Request::Stop, wait) {
        Ok(_) => {
            if let Some(mount) = before {
                wait_until_gone(&mountpoint, &mount.device, wait)?;
            }
            "stopped"
        }
        Err(e) if e.code() == Code::NotMounted => {
            take_off(&mountpoint)?;
            "taken off; no daemon answered"
        }
        Err(e) => return Err(e),
    };
    let value = json!({"mountpoint": mountpoint, "unmounted": true, "daemon_answered": how == "stopped"});
    out.result(&value, || if out.quiet { String::new() } else { format!("{}: {how}", mountpoint.display()) })
}

fn wait_until_gone(mountpoint: &Path, device: &str, wait: Duration) -> Result<()> {
    let until = Instant::now() + wait;
    while mounts::is_at(mountpoint, device)? {
        if Instant::now() >= until {
            return Err(Error::new(
                Code::Deadline,
                format!(
                    "{} is still mounted {} s after its daemon agreed to stop",
                    mountpoint.display(),
                    wait.as_secs()
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Without a daemon: only what is ours, only while nobody holds it.
fn take_off(mountpoint: &Path) -> Result<()> {
    match mounts::at(mountpoint)? {
        Some(mount) if mount.is_ours() => {}
        Some(mount) => {
            return Err(Error::new(
                Code::NotMounted,
                format!("{} is a {} mount, not one of modelfs", mountpoint.display(), mount.kind),
            ));
        }
        None => return Err(Error::new(Code::NotMounted, format!("nothing is mounted on {}", mountpoint.display()))),
    }
    let path = CString::new(mountpoint.as_os_str().as_bytes())
        .map_err(|_| Error::new(Code::MountPoint, "the mountpoint has a zero byte in it"))?;
    // SAFETY: `path` is a C string that outlives the call.
    if unsafe { libc::umount2(path.as_ptr(), libc::UMOUNT_NOFOLLOW) } == 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error();
    match errno.raw_os_error() {
        Some(libc::EBUSY) => Err(held(mountpoint)),
        Some(libc::EPERM) => fusermount(mountpoint),
        _ => Err(Error::new(Code::Host, format!("cannot unmount {}", mountpoint.display())).with_source(errno)),
    }
}

fn held(mountpoint: &Path) -> Error {
    let who = control::tell_holders(&control::holders(mountpoint));
    Error::new(Code::Held, format!("{} is in use: {who}", mountpoint.display()))
}

fn fusermount(mountpoint: &Path) -> Result<()> {
    let done = std::process::Command::new("fusermount3")
        .arg("-u")
        .arg("--")
        .arg(mountpoint)
        .output()
        .map_err(|e| Error::new(Code::Host, "cannot run fusermount3; install the fuse3 package").with_source(e))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().to_string();
    if said.contains("busy") {
        return Err(held(mountpoint));
    }
    Err(Error::new(Code::Host, format!("fusermount3 cannot unmount {}: {said}", mountpoint.display())))
}
