//! The places below the kubelet's folder where volumes appear: checked, made, cleared.
//!
//! In: target paths from the kubelet. Out: a folder to mount on, or a target that is gone.
//! Promises: nothing outside the kubelet's folder is touched, and nothing that is not modelfs's is unmounted. What a driver that
//! died or ended left mounted stays until the kubelet has it published anew or unpublished: a program that starts meanwhile
//! fails, instead of finding an empty folder.
//! Held by: the tests below, tests/csi.sh, tests/kubernetes.sh.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use crate::error::{Code, Error, Result};
use crate::{fuse, mounts, refuse};

/// The source of the small tmpfs that carries a volume whose mount lies one folder below.
const CARRIER: &str = "modelfs-volume";
/// Mounts on one target: drivers that died one after the other.
const LAYERS_MAX: usize = 64;
/// As often it is asked whether a connection is closed; each time the kernel has a few seconds.
const CLOSE_TRIES: usize = 12;
const NOTHING_RUNS: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
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

/// Whether anything is at `target`, a dead mount too. The kubelet makes only the folder above it, and a first publication that
/// fails leaves nothing there: so what is there was published before. Looked up in the mount table first, since a daemon that
/// hangs answers nothing.
pub fn is_there(target: &Path) -> bool {
    mounts::at(target).map_or(true, |mount| mount.is_some()) || std::fs::symlink_metadata(target).is_ok()
}

/// Whether the kubelet means to publish `target` again, or to unpublish it.
pub fn is_wanted(target: &Path) -> bool {
    target.parent().is_some_and(|folder| folder.join(VOLUME_DATA).exists())
}

/// Where a volume goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder to mount on: the target, or one in a carrier on it.
    pub folder: PathBuf,
    /// The target was there: this volume was published once already.
    pub before: bool,
}

/// The place of a volume, made where it is not there. What an earlier driver left mounted on its folder stays, to be cleared away
/// when the next mount is ready to take its place.
///
/// With `below`, the folder lies in a carrier on the target. A carrier that is there stays: it is what running containers see.
///
/// # Errors
/// `MOUNT_POINT` if something else is mounted or lies there.
pub fn prepare(target: &Path, below: Option<&str>) -> Result<Place> {
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
    let before = match std::fs::DirBuilder::new().mode(0o750).create(target) {
        Ok(()) => false,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => true,
        Err(e) => return Err(Error::new(Code::MountPoint, format!("cannot make {}", target.display())).with_source(e)),
    };
    let Some(below) = below else {
        leave_only_the_dead(target)?;
        return Ok(Place { folder: target.to_owned(), before });
    };
    let folder = target.join(below);
    leave_only_the_dead(&folder)?;
    // A dead mount on the folder answers nothing to whoever asks what it is.
    let carried = mounts::at(target)?.is_some_and(|mount| mount.source == CARRIER)
        && (mounts::at(&folder)?.is_some() || folder.is_dir());
    if !carried {
        clear(target)?;
        carry(target, &folder)?;
    }
    Ok(Place { folder, before })
}

/// A mount whose daemon hangs would hang whoever looks at the folder next.
fn leave_only_the_dead(folder: &Path) -> Result<()> {
    match mounts::at(folder)? {
        Some(mount) if mount.is_ours() && !is_dead(folder) => clear(folder),
        Some(_) | None => Ok(()),
    }
}

/// A dead mount on `folder`, as a driver that is gone leaves it, where nothing is mounted: a FUSE mount whose only descriptor is
/// closed answers ENOTCONN to everyone.
pub fn hold(folder: &Path) -> Result<()> {
    hold_by(folder, |_| ())
}

/// `shared`: what others do with the descriptor.
fn hold_by(folder: &Path, shared: impl FnOnce(&std::fs::File)) -> Result<()> {
    if mounts::at(folder)?.is_some() {
        return Ok(());
    }
    let fault = |e| Error::new(Code::Host, format!("cannot put a dead mount on {}", folder.display())).with_source(e);
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").map_err(fault)?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    mount(folder, c"fuse.modelfs", NOTHING_RUNS | libc::MS_RDONLY, &options).map_err(fault)?;
    shared(&device);
    drop(device);
    // A child of ours between fork and exec has the descriptor too, and until it has not, whoever comes here waits.
    for _ in 0..CLOSE_TRIES {
        if is_dead(folder) {
            return Ok(());
        }
    }
    tracing::warn!("the mount that holds {} is not dead yet: another process has its descriptor", folder.display());
    Ok(())
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
    let options = "size=64k,nr_inodes=8,mode=0755";
    mount(target, c"tmpfs", NOTHING_RUNS, options).map_err(|e| fault("mount a tmpfs on", e))?;
    std::fs::DirBuilder::new().mode(0o750).create(inner).map_err(|e| fault("make a folder in", e))?;
    let flags = NOTHING_RUNS | libc::MS_REMOUNT | libc::MS_RDONLY;
    mount(target, c"tmpfs", flags, "").map_err(|e| fault("make read-only", e))
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

/// One that hangs is none, nor is what cannot be looked at.
fn is_dead(place: &Path) -> bool {
    fuse::is_dead(place).unwrap_or(false)
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

fn mount(target: &Path, kind: &CStr, flags: libc::c_ulong, options: &str) -> io::Result<()> {
    let source = CString::new(CARRIER).expect("our own word");
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
        assert!(!is_there(&target));
        assert!(!prepare(&target, None).expect("made").before);
        assert!(is_there(&target));
        assert_eq!(prepare(&target, None).expect("there"), Place { folder: target.clone(), before: true });
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
            assert!(std::env::var_os("CI").is_none(), "CI needs root");
            return eprintln!("SKIPPED: needs root, to mount a tmpfs");
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let target = folder.path().canonicalize().expect("real").join("mount");
        let place = prepare(&target, Some("store")).expect("carried");
        assert_eq!(place, Place { folder: target.join("store"), before: false });
        let carrier = mounts::at(&target).expect("read").expect("mounted").device;
        std::fs::create_dir(target.join("other")).expect_err("read-only");
        let again = Place { before: true, ..place };
        assert_eq!(prepare(&target, Some("store")).expect("again"), again);
        // As a driver leaves it that was killed.
        hold(&again.folder).expect("dead");
        assert_eq!(prepare(&target, Some("store")).expect("once more"), again);
        assert!(is_dead(&again.folder), "it stays until the next mount is ready");
        assert_eq!(mounts::at(&target).expect("read").expect("mounted").device, carrier, "it is the same one");
        clear(&again.folder).expect("cleared");
        assert!(again.folder.is_dir());
        clear(&target).expect("cleared");
        assert_eq!(mounts::at(&target).expect("read"), None);
        remove(&target).expect("removed");
    }

    #[test]
    fn what_is_held_is_dead_by_the_time_that_is_said_though_a_child_had_its_descriptor() {
        if !crate::mem::has_cap_sys_admin() || !Path::new("/dev/fuse").exists() {
            return;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let target = folder.path().canonicalize().expect("real");
        let (closing, closed) = std::sync::mpsc::channel();
        hold_by(&target, |device| {
            let child = device.try_clone().expect("a second descriptor");
            std::thread::spawn(move || {
                // Long enough to be asked meanwhile.
                std::thread::sleep(std::time::Duration::from_millis(300));
                closing.send(()).expect("the test waits");
                drop(child);
            });
        })
        .expect("held");
        let was_closed = closed.try_recv().is_ok();
        let dead = is_dead(&target);
        clear(&target).expect("cleared");
        assert!(was_closed && dead);
    }

    #[test]
    fn what_is_held_is_dead_to_everyone_and_known_as_ours() {
        if !crate::mem::has_cap_sys_admin() || !Path::new("/dev/fuse").exists() {
            return;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let root = folder.path().canonicalize().expect("real");
        let (wanted, forgotten) = (root.join("wanted/mount"), root.join("forgotten/mount"));
        for target in [&wanted, &forgotten] {
            std::fs::create_dir(target.parent().expect("a folder")).expect("made");
            std::fs::create_dir(target).expect("made");
            hold(target).expect("held");
            assert!(is_there(target));
            let device = mounts::at(target).expect("read").expect("mounted").device;
            hold(target).expect("is held already");
            assert_eq!(mounts::at(target).expect("read").expect("mounted").device, device);
            let told = std::fs::read_dir(target).expect_err("dead");
            assert_eq!(told.raw_os_error(), Some(libc::ENOTCONN));
        }
        std::fs::write(root.join("wanted").join(VOLUME_DATA), "{}").expect("written");
        assert!(is_wanted(&wanted) && !is_wanted(&forgotten));
        assert_eq!(inherit(&root).expect("looked"), 1);
        assert_eq!(mounts::at(&forgotten).expect("read"), None);
        assert!(is_dead(&wanted));
        clear(&root).expect("cleared");
        remove(&wanted).expect("bare again");
    }

    #[test]
    fn another_mount_is_left_alone() {
        // /proc is mounted everywhere, and nobody's volume.
        let error = clear(Path::new("/proc")).expect_err("refused");
        assert!(error.message().contains("not by this driver"), "{error:?}");
        assert!(Path::new("/proc/self").exists());
    }
}
