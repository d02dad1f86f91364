//! The places below the kubelet's folder where volumes appear: checked, made, cleared.
//!
//! In: target paths from the kubelet. Out: an empty folder to mount on, or a target that is gone.
//! Promises: nothing outside the kubelet's folder is touched, and nothing that is not modelfs's is unmounted. What a driver that
//! died left mounted stays until the kubelet publishes or unpublishes it: a program that starts meanwhile fails, instead of
//! finding an empty folder.
//! Held by: the tests below, tests/kubernetes.sh.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Code, Error, Result};
use crate::{mounts, refuse};

/// The source of the small tmpfs that carries a volume whose mount lies one folder below.
const CARRIER: &str = "modelfs-volume";
/// Mounts on one target: drivers that died one after the other.
const LAYERS_MAX: usize = 64;
/// What the kubelet writes beside a target as long as it means to publish or unpublish it.
const VOLUME_DATA: &str = "vol_data.json";

/// Refuses a path that does not lie below `kubelet_dir`, as it stands and as the kernel would walk it.
pub fn check(kubelet_dir: &Path, target: &str) -> Result<PathBuf> {
    let path = Path::new(target);
    let plain =
        path.is_absolute() && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !plain || !path.starts_with(kubelet_dir) || path == kubelet_dir {
        refuse!(
            Usage,
            "the target {target} is not below {}; start the driver with the kubelet's --root-dir as --kubelet-dir",
            kubelet_dir.display()
        );
    }
    Ok(path.components().collect())
}

/// The empty folder to mount on, and whether the target was there before: then this volume was published once already.
///
/// With `below`, that folder lies in a carrier on the target. A carrier that is there stays: it is what running containers see.
///
/// # Errors
/// `MOUNT_POINT` if something else is mounted or lies there.
pub fn prepare(target: &Path, below: Option<&str>) -> Result<(PathBuf, bool)> {
    let parent = target.parent().expect("a checked target lies below a folder");
    let real = parent.canonicalize().map_err(|e| {
        let what = format!("the folder {} of the volume cannot be walked", parent.display());
        Error::new(Code::MountPoint, what).with_source(e)
    })?;
    if real != parent {
        refuse!(
            MountPoint,
            "{} leads elsewhere, to {}; name the kubelet's folder without links",
            parent.display(),
            real.display()
        );
    }
    let inner = below.map(|folder| target.join(folder));
    if let Some(inner) = &inner {
        clear(inner)?;
    }
    let carried = mounts::at(target)?.is_some_and(|mount| mount.source == CARRIER)
        && inner.as_ref().is_some_and(|it| it.is_dir());
    if !carried {
        clear(target)?;
    }
    let before = match std::fs::DirBuilder::new().mode(0o750).create(target) {
        Ok(()) => false,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => true,
        Err(e) => return Err(Error::new(Code::MountPoint, format!("cannot make {}", target.display())).with_source(e)),
    };
    match inner {
        Some(inner) => {
            if !carried {
                carry(target, &inner)?;
            }
            Ok((inner, before))
        }
        None => Ok((target.to_owned(), before)),
    }
}

/// Takes every modelfs mount and carrier off `target`, dead ones too. The folder stays.
///
/// # Errors
/// `MOUNT_POINT` for a mount that is another's.
pub fn clear(target: &Path) -> Result<()> {
    for _ in 0..LAYERS_MAX {
        let Some((place, mount)) = mounts::below(target)?.into_iter().last() else { return Ok(()) };
        if !mount.is_ours() && mount.source != CARRIER {
            refuse!(MountPoint, "{} is mounted at {}, and not by this driver; unmount it", mount.kind, place.display());
        }
        detach(&place)?;
    }
    refuse!(MountPoint, "more than {LAYERS_MAX} mounts lie at {}", target.display())
}

/// A tmpfs on `target` with the folder `inner`, which outlives the driver: a mount made on that folder later reaches containers
/// that run already, where they asked for HostToContainer.
fn carry(target: &Path, inner: &Path) -> Result<()> {
    let fault = |what: &str, e| Error::new(Code::Host, format!("cannot {what} {}", target.display())).with_source(e);
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    mount(target, flags, "size=64k,nr_inodes=8,mode=0755").map_err(|e| fault("mount a tmpfs on", e))?;
    std::fs::DirBuilder::new().mode(0o750).create(inner).map_err(|e| fault("make a folder in", e))?;
    mount(target, flags | libc::MS_REMOUNT | libc::MS_RDONLY, "").map_err(|e| fault("make read-only", e))
}

/// Removes the empty folder of a volume; one that is not there is no error.
pub fn remove(target: &Path) -> Result<()> {
    match std::fs::remove_dir(target) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::new(Code::MountPoint, format!("cannot remove {}", target.display())).with_source(e)),
    }
}

/// What an earlier driver left: how many mounts wait for the kubelet, after those that it has forgotten were taken away.
pub fn inherit(kubelet_dir: &Path) -> Result<usize> {
    let mut waiting = 0;
    for (place, _) in mounts::below(kubelet_dir)?.into_iter().filter(|(_, mount)| mount.is_ours()) {
        if !is_dead(&place) {
            continue;
        }
        let known = place.ancestors().skip(1).take(2).any(|folder| folder.join(VOLUME_DATA).exists());
        if known {
            waiting += 1;
        } else {
            tracing::info!("a dead mount that the kubelet does not know is taken away: {}", place.display());
            detach(&place)?;
        }
    }
    Ok(waiting)
}

/// A FUSE mount whose daemon is gone answers nothing but that.
fn is_dead(place: &Path) -> bool {
    std::fs::metadata(place).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN))
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path from the mount table or a checked request holds no NUL")
}

fn detach(place: &Path) -> Result<()> {
    let path = c_path(place);
    // SAFETY: a NUL-terminated path that lives through the call.
    match unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) } {
        0 => Ok(()),
        _ => Err(Error::os(Code::Host, format!("cannot unmount {}", place.display()))),
    }
}

fn mount(target: &Path, flags: libc::c_ulong, options: &str) -> io::Result<()> {
    let (source, kind) = (CString::new(CARRIER).expect("our own word"), c"tmpfs");
    let options = CString::new(options).expect("our own words hold no NUL");
    // SAFETY: NUL-terminated strings that live through the call.
    let ret =
        unsafe { libc::mount(source.as_ptr(), c_path(target).as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) };
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_the_kubelets_folder_are_targets() {
        let kubelet = Path::new("/var/lib/kubelet");
        let good = check(kubelet, "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/m/mount").expect("a target");
        assert!(good.ends_with("m/mount"));
        for bad in [
            "",
            "m",
            "/var/lib/kubelet",
            "/var/lib/kubelet2/x",
            "/var/lib/kubelet/../../etc",
            "/etc",
            "relative/var/lib/kubelet/x",
        ] {
            assert_eq!(check(kubelet, bad).expect_err(bad).code(), Code::Usage);
        }
    }

    #[test]
    fn a_target_is_made_once_and_never_through_a_link() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let root = folder.path().canonicalize().expect("real");
        std::fs::create_dir(root.join("pod")).expect("made");
        let target = root.join("pod/mount");
        assert!(!prepare(&target, None).expect("made").1);
        assert_eq!(prepare(&target, None).expect("there"), (target.clone(), true));
        remove(&target).expect("removed");
        remove(&target).expect("gone already");
        std::os::unix::fs::symlink("/tmp", root.join("link")).expect("a link");
        assert_eq!(prepare(&root.join("link/mount"), None).expect_err("a link").code(), Code::MountPoint);
        std::fs::create_dir(root.join("pod/mount")).expect("made");
        std::fs::write(root.join("pod/mount/file"), "x").expect("written");
        assert_eq!(remove(&target).expect_err("holds a file").code(), Code::MountPoint);
    }

    #[test]
    fn a_carrier_outlives_what_is_mounted_in_it() {
        if !crate::mem::has_cap_sys_admin() {
            return;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let target = folder.path().canonicalize().expect("real").join("mount");
        let (place, before) = prepare(&target, Some("store")).expect("carried");
        assert_eq!((place.as_path(), before), (target.join("store").as_path(), false));
        let carrier = mounts::at(&target).expect("read").expect("mounted").device;
        std::fs::create_dir(target.join("other")).expect_err("read-only");
        assert_eq!(prepare(&target, Some("store")).expect("again"), (place, true));
        assert_eq!(mounts::at(&target).expect("read").expect("mounted").device, carrier, "it is the same one");
        clear(&target).expect("cleared");
        assert_eq!(mounts::at(&target).expect("read"), None);
        remove(&target).expect("removed");
    }

    #[test]
    fn another_mount_is_left_alone() {
        // /proc is mounted everywhere, and nobody's volume.
        let error = clear(Path::new("/proc")).expect_err("refused");
        assert!(error.message().contains("not by this driver"), "{error:?}");
        assert!(Path::new("/proc/self").exists());
    }
}
