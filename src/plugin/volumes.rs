//! The volumes by name: made, mounted for containers, let go, removed.
//!
//! Promises: a volume is mounted while at least one container has it, once for all of them; a volume in use is not removed;
//! what is known is on the disk, whole, before an answer says so ([`VOLUMES_FILE`], options only); nobody waits for a
//! mount that is being made but those who want that very volume.
//! Held by: the tests below.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Asker, Mounter, Options, Standing};
use crate::error::{Code, Error, Result};
use crate::keys::state;
use crate::refuse;

/// Below the state folder.
const VOLUMES_FILE: &str = "volumes.json";
/// Below the state folder: a folder a volume.
const MOUNTS_DIR: &str = "volumes";
/// Held by a running plugin: two of them would take each other's mounts for dead ones.
const LOCK_FILE: &str = "volumes.lock";

const NAME_BYTES_MAX: usize = 128;
/// Far more than a machine mounts.
const VOLUMES_MAX: usize = 1000;
const OPTIONS_BYTES_MAX: usize = 4096;
/// All of them, with what JSON adds.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// How long the last container's files may be held after it ended, before the mount is detached.
const UNMOUNT_GRACE: Duration = Duration::from_secs(5);

/// How long the end of the plugin waits for a volume whose mount is being made or taken away: a store that hangs is not waited
/// for, and whoever stops us has this much patience thrice.
const STOP_GRACE: Duration = Duration::from_secs(20);
const STOP_POLL: Duration = Duration::from_millis(20);

/// How often engines that are gone are looked for.
pub const SWEEP_PERIOD: Duration = Duration::from_secs(5);

/// What is remembered: names and options. Options refer to secrets and never hold one (`policy`).
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    volumes: BTreeMap<String, RememberedVolume>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RememberedVolume {
    options: Options,
}

struct Volume {
    name: String,
    mountpoint: PathBuf,
    options: Options,
    /// Held while its mount is made or taken away, which may take as long as the store does.
    work: Mutex<()>,
    usage: Mutex<Usage>,
}

#[derive(Default)]
struct Usage {
    /// By the engine's name for each container's use.
    holders: BTreeMap<String, Holder>,
    standing: Option<Arc<dyn Standing>>,
    removed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Holder {
    asker: Option<Asker>,
    /// It was there some time after it had its answer: an engine that stays, not a command.
    stays: bool,
}

/// What the engine is shown of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeLook {
    pub name: String,
    /// Where it is mounted, if it is.
    pub mountpoint: Option<PathBuf>,
    pub store: String,
    pub holders: usize,
    pub models: Vec<String>,
}

pub struct Volumes {
    mounter: Arc<dyn Mounter>,
    dir: PathBuf,
    table: Mutex<BTreeMap<String, Arc<Volume>>>,
    _lock: File,
}

/// A thread that died holding one of these left nothing half changed: every change is one assignment.
fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same, or `None` if another thread holds it for longer than `until`.
fn held_by<T>(lock: &Mutex<T>, until: Instant) -> Option<MutexGuard<'_, T>> {
    loop {
        match lock.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(lost)) => return Some(lost.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(STOP_POLL),
        }
    }
}

impl Volumes {
    /// What is remembered in `dir`; what a dead plugin left mounted below it is taken off.
    ///
    /// # Errors
    /// `STATE` for a folder that another plugin serves, or that cannot be read.
    pub fn open(dir: &Path, mounter: Arc<dyn Mounter>) -> Result<Volumes> {
        let mounts = dir.join(MOUNTS_DIR);
        let fault =
            |what: &str, e| Error::new(Code::State, format!("cannot {what} {}", mounts.display())).with_source(e);
        // Closed to other users: what a container may read, they may not for that reason alone.
        let mut private = std::fs::DirBuilder::new();
        private.recursive(true).mode(0o700).create(&mounts).map_err(|e| fault("make", e))?;
        let lock = lock(dir)?;
        let remembered: Remembered = state::read_up_to(dir, VOLUMES_FILE, FILE_BYTES_MAX)?.unwrap_or_default();
        for left in std::fs::read_dir(&mounts).map_err(|e| fault("list", e))? {
            let left = left.map_err(|e| fault("list", e))?;
            mounter.clear(&left.path())?;
            remove_mountpoint(&left.path());
        }
        let volume = |(name, known): (String, RememberedVolume)| {
            let mountpoint = mounts.join(&name);
            let (work, usage) = Default::default();
            (name.clone(), Arc::new(Volume { name, mountpoint, options: known.options, work, usage }))
        };
        let table = remembered.volumes.into_iter().map(volume).collect();
        Ok(Volumes { mounter, dir: dir.to_owned(), table: Mutex::new(table), _lock: lock })
    }

    /// Making the same volume again is success: engines do.
    ///
    /// # Errors
    /// `USAGE` for a name or an option that is refused, or a volume of that name with other options.
    pub fn create(&self, name: &str, options: Options) -> Result<()> {
        check_name(name)?;
        let told: usize = options.iter().map(|(name, value)| name.len() + value.len()).sum();
        if told > OPTIONS_BYTES_MAX {
            refuse!(Usage, "the options of volume {name} are {told} bytes long, at most {OPTIONS_BYTES_MAX}");
        }
        if let Ok(there) = self.find(name) {
            return there.made_with(&options);
        }
        let mountpoint = self.dir.join(MOUNTS_DIR).join(name);
        make_mountpoint(&mountpoint)?;
        let checked = self.mounter.check(&options, &mountpoint);
        remove_mountpoint(&mountpoint);
        checked?;
        let mut table = held(&self.table);
        if let Some(there) = table.get(name) {
            return there.made_with(&options);
        }
        if table.len() >= VOLUMES_MAX {
            refuse!(NoRoom, "{VOLUMES_MAX} volumes are known already; remove some");
        }
        let (work, usage) = Default::default();
        let volume = Arc::new(Volume { name: name.to_owned(), mountpoint, options, work, usage });
        table.insert(name.to_owned(), volume);
        self.remember(&table).inspect_err(|_| drop(table.remove(name)))
    }

    /// # Errors
    /// `HELD` while a container has it.
    pub fn remove(&self, name: &str) -> Result<()> {
        let volume = self.find(name)?;
        let _work = held(&volume.work);
        self.let_go_of_the_dead(&volume);
        let mut usage = held(&volume.usage);
        if !usage.holders.is_empty() {
            refuse!(Held, "volume {name} is in use by {} containers; remove them first", usage.holders.len());
        }
        let mut table = held(&self.table);
        table.remove(name);
        if let Err(failed) = self.remember(&table) {
            table.insert(name.to_owned(), volume.clone());
            return Err(failed);
        }
        usage.removed = true;
        remove_mountpoint(&volume.mountpoint);
        Ok(())
    }

    /// Mounts it if it is not mounted, for one more holder. The same holder again is success.
    pub fn mount(&self, name: &str, holder: &str, asker: Option<Asker>) -> Result<PathBuf> {
        let volume = self.find(name)?;
        let _work = held(&volume.work);
        let dead = {
            let mut usage = held(&volume.usage);
            if usage.removed {
                return Err(unknown(name));
            }
            if usage.standing.as_ref().is_some_and(|standing| standing.is_mounted()) {
                usage.holders.insert(holder.to_owned(), Holder { asker, stays: false });
                return Ok(volume.mountpoint.clone());
            }
            usage.standing.take()
        };
        if let Some(dead) = dead {
            tracing::warn!(volume = name, "was unmounted by somebody else; mounting again");
            let_go(&volume, &*dead);
        }
        self.mounter.clear(&volume.mountpoint)?;
        make_mountpoint(&volume.mountpoint)?;
        let standing = self.mounter.mount(&volume.options, &volume.mountpoint);
        let standing = standing.inspect_err(|_| remove_mountpoint(&volume.mountpoint))?;
        let mut usage = held(&volume.usage);
        if usage.removed {
            // The plugin ended meanwhile, and did not wait for us.
            drop(usage);
            let_go(&volume, &*standing);
            return Err(unknown(name));
        }
        usage.holders.insert(holder.to_owned(), Holder { asker, stays: false });
        usage.standing = Some(standing);
        tracing::info!(volume = name, "mounted");
        Ok(volume.mountpoint.clone())
    }

    /// One holder less; unmounts after the last. A holder that is not known (of a plugin that was killed) is no error.
    pub fn unmount(&self, name: &str, holder: &str) -> Result<()> {
        let volume = self.find(name)?;
        let _work = held(&volume.work);
        let standing = {
            let mut usage = held(&volume.usage);
            if usage.holders.remove(holder).is_none() {
                tracing::info!(volume = name, "let go by a holder of an earlier run");
            }
            if usage.holders.is_empty() { usage.standing.take() } else { None }
        };
        if let Some(standing) = standing {
            let_go(&volume, &*standing);
            tracing::info!(volume = name, "unmounted");
        }
        Ok(())
    }

    pub fn look(&self, name: &str) -> Result<VolumeLook> {
        Ok(self.find(name)?.look())
    }

    pub fn list(&self) -> Vec<VolumeLook> {
        let volumes: Vec<_> = held(&self.table).values().cloned().collect();
        volumes.iter().map(|volume| volume.look()).collect()
    }

    /// Unmounts everything, whoever holds it: the plugin ends. A mount that is being made does not outlive its making.
    pub fn stop(&self) {
        self.stop_within(STOP_GRACE);
    }

    fn stop_within(&self, grace: Duration) {
        let volumes: Vec<_> = held(&self.table).values().cloned().collect();
        let until = Instant::now() + grace;
        // All at once: each that is in use takes seconds, and whoever stops us waits for so many, not for each.
        std::thread::scope(|all| {
            for volume in volumes {
                all.spawn(move || {
                    // First, for whoever is at work: nothing is to be mounted any more.
                    held(&volume.usage).removed = true;
                    let Some(_work) = held_by(&volume.work, until) else {
                        tracing::warn!(
                            volume = volume.name,
                            "not waited for: its mount is still being made or taken away"
                        );
                        return;
                    };
                    let standing = held(&volume.usage).standing.take();
                    if let Some(standing) = standing {
                        let_go(&volume, &*standing);
                    }
                });
            }
        });
    }

    /// Uses that an engine asked for which is gone, and which no container has any more, end: it will not let go of them.
    /// Call it every [`SWEEP_PERIOD`].
    pub fn sweep(&self) {
        let volumes: Vec<_> = held(&self.table).values().cloned().collect();
        for volume in volumes {
            // One whose mount is being made or taken away is looked at the next time.
            if let Ok(_work) = volume.work.try_lock() {
                self.let_go_of_the_dead(&volume);
            }
        }
    }

    /// The caller has `volume.work`.
    fn let_go_of_the_dead(&self, volume: &Volume) {
        let is_dead = |holder: &Holder| holder.stays && holder.asker.is_some_and(|asker| !asker.is_there());
        let any_dead = {
            let mut usage = held(&volume.usage);
            for holder in usage.holders.values_mut() {
                holder.stays |= holder.asker.is_some_and(Asker::is_there);
            }
            usage.holders.values().any(is_dead)
        };
        if !any_dead || self.mounter.is_elsewhere(&volume.mountpoint) {
            return;
        }
        let standing = {
            let mut usage = held(&volume.usage);
            usage.holders.retain(|_, holder| !is_dead(holder));
            if usage.holders.is_empty() { usage.standing.take() } else { None }
        };
        tracing::warn!(volume = volume.name, "let go for an engine that is gone");
        if let Some(standing) = standing {
            let_go(volume, &*standing);
        }
    }

    fn find(&self, name: &str) -> Result<Arc<Volume>> {
        held(&self.table).get(name).cloned().ok_or_else(|| unknown(name))
    }

    fn remember(&self, table: &BTreeMap<String, Arc<Volume>>) -> Result<()> {
        let known = |volume: &Arc<Volume>| RememberedVolume { options: volume.options.clone() };
        let volumes = table.iter().map(|(name, volume)| (name.clone(), known(volume))).collect();
        state::Locked::new(&self.dir)?.replace(VOLUMES_FILE, &Remembered { volumes })
    }
}

impl Volume {
    fn made_with(&self, options: &Options) -> Result<()> {
        if self.options != *options {
            refuse!(Usage, "volume {} exists with other options; remove it first", self.name);
        }
        Ok(())
    }

    fn look(&self) -> VolumeLook {
        let (holders, standing) = {
            let usage = held(&self.usage);
            (usage.holders.len(), usage.standing.clone())
        };
        let standing = standing.filter(|standing| standing.is_mounted());
        VolumeLook {
            name: self.name.clone(),
            mountpoint: standing.as_ref().map(|_| self.mountpoint.clone()),
            store: self.options.get("store").cloned().unwrap_or_default(),
            holders,
            models: standing.map(|standing| standing.models()).unwrap_or_default(),
        }
    }
}

/// What is held elsewhere is detached all the same, and then the engine has nothing left to do: said in the log alone.
fn let_go(volume: &Volume, standing: &dyn Standing) {
    if let Err(failed) = standing.unmount(UNMOUNT_GRACE) {
        tracing::warn!(volume = volume.name, "{}", failed.chain());
    }
    remove_mountpoint(&volume.mountpoint);
}

fn unknown(name: &str) -> Error {
    let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
    Error::new(Code::NotFound, format!("no volume is called {shown:?}"))
}

/// A name is a folder's, and one that the engines take.
fn check_name(name: &str) -> Result<()> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if !first || name.len() > NAME_BYTES_MAX || !name.bytes().all(word) {
        refuse!(
            Usage,
            "a volume's name is up to {NAME_BYTES_MAX} letters, digits, '_', '.' and '-', and begins with a letter or digit"
        );
    }
    Ok(())
}

/// It is there only while something is mounted on it. Podman does not ask for a mount that it believes to be there: its
/// container must fail to start then, and not find an empty folder.
fn remove_mountpoint(path: &Path) {
    if let Err(left) = std::fs::remove_dir(path)
        && left.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("{} stays: {left}", path.display());
    }
}

fn make_mountpoint(path: &Path) -> Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::new(Code::State, format!("cannot make {}", path.display())).with_source(e))
        }
        _ => Ok(()),
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK_FILE);
    let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let file = File::options().write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(&path);
    let file = file.map_err(|e| Error::new(Code::State, format!("cannot lock {}", path.display())).with_source(e))?;
    // SAFETY: locks a descriptor of ours; closing it unlocks.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        refuse!(State, "another volume plugin serves the volumes of {}; stop it first", dir.display());
    }
    Ok(file)
}

#[cfg(test)]
pub(super) mod fake {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    /// Makes no mounts, and counts them.
    #[derive(Default)]
    pub struct Fake {
        pub made: AtomicUsize,
        pub standing: Arc<AtomicUsize>,
        pub cleared: Mutex<Vec<PathBuf>>,
        pub last: Mutex<Option<Arc<FakeMount>>>,
        pub elsewhere: AtomicBool,
        /// A mount waits until this is released.
        pub gate: Mutex<()>,
    }

    pub struct FakeMount {
        pub alive: AtomicBool,
        count: Arc<AtomicUsize>,
    }

    impl Standing for FakeMount {
        fn is_mounted(&self) -> bool {
            self.alive.load(Ordering::SeqCst)
        }
        fn models(&self) -> Vec<String> {
            vec!["acme/m".into()]
        }
        fn unmount(&self, _grace: Duration) -> Result<()> {
            self.alive.store(false, Ordering::SeqCst);
            self.count.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        }
    }

    impl Mounter for Fake {
        fn check(&self, options: &Options, mountpoint: &Path) -> Result<()> {
            assert!(mountpoint.is_dir());
            if options.contains_key("bad") {
                refuse!(Usage, "option bad is refused");
            }
            Ok(())
        }
        fn mount(&self, options: &Options, _mountpoint: &Path) -> Result<Arc<dyn Standing>> {
            let _open = held(&self.gate);
            if options.contains_key("tampered") {
                refuse!(ManSig, "the manifest is not signed by whom is trusted");
            }
            self.made.fetch_add(1, Ordering::SeqCst);
            self.standing.fetch_add(1, Ordering::SeqCst);
            let mount = Arc::new(FakeMount { alive: true.into(), count: self.standing.clone() });
            *held(&self.last) = Some(mount.clone());
            Ok(mount)
        }
        fn is_elsewhere(&self, _mountpoint: &Path) -> bool {
            self.elsewhere.load(Ordering::SeqCst)
        }
        fn clear(&self, mountpoint: &Path) -> Result<()> {
            held(&self.cleared).push(mountpoint.to_owned());
            Ok(())
        }
    }

    pub fn options(words: &[(&str, &str)]) -> Options {
        words.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    pub fn volumes(dir: &Path) -> (Volumes, Arc<Fake>) {
        let fake = Arc::new(Fake::default());
        (Volumes::open(dir, fake.clone()).unwrap(), fake)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::Ordering;

    use super::fake::{options, volumes};
    use super::*;

    fn store() -> Options {
        options(&[("store", "s3://models/prod"), ("model", "acme/m")])
    }

    #[test]
    fn containers_of_a_volume_share_one_mount_which_goes_with_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, fake) = volumes(dir.path());
        volumes.create("llama", store()).unwrap();
        assert_eq!(volumes.look("llama").unwrap().mountpoint, None);
        assert!(!dir.path().join("volumes/llama").exists(), "nobody finds an empty folder");
        let path = volumes.mount("llama", "one", None).unwrap();
        assert_eq!(path, dir.path().join("volumes/llama"));
        assert_eq!(volumes.mount("llama", "two", None).unwrap(), path);
        assert_eq!(volumes.mount("llama", "two", None).unwrap(), path);
        let look = volumes.look("llama").unwrap();
        assert_eq!((look.holders, fake.made.load(Ordering::SeqCst)), (2, 1));
        assert_eq!((look.mountpoint, look.models), (Some(path.clone()), vec!["acme/m".to_string()]));

        volumes.unmount("llama", "one").unwrap();
        assert_eq!(volumes.remove("llama").unwrap_err().code(), Code::Held);
        assert_eq!(fake.standing.load(Ordering::SeqCst), 1);
        assert!(path.exists());
        volumes.unmount("llama", "two").unwrap();
        assert!(!path.exists());
        assert_eq!(fake.standing.load(Ordering::SeqCst), 0);
        volumes.remove("llama").unwrap();
        assert_eq!(volumes.mount("llama", "three", None).unwrap_err().code(), Code::NotFound);
        assert!(!dir.path().join("volumes/llama").exists());
    }

    #[test]
    fn a_volume_that_is_refused_or_does_not_mount_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, _) = volumes(dir.path());
        assert_eq!(volumes.create("v", options(&[("bad", "")])).unwrap_err().code(), Code::Usage);
        assert!(volumes.list().is_empty() && !dir.path().join("volumes/v").exists());
        for name in ["", ".", "..", "../x", "a/b", "-a", "a b", &"x".repeat(129)] {
            assert_eq!(volumes.create(name, store()).unwrap_err().code(), Code::Usage, "{name:?}");
        }
        let long = options(&[("store", &"x".repeat(OPTIONS_BYTES_MAX))]);
        assert!(volumes.create("v", long).unwrap_err().chain().contains("at most"));
        volumes.create("v", options(&[("tampered", "")])).unwrap();
        assert_eq!(volumes.mount("v", "one", None).unwrap_err().code(), Code::ManSig);
        volumes.remove("v").unwrap();
    }

    #[test]
    fn the_same_volume_again_is_success_and_another_of_its_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, _) = volumes(dir.path());
        volumes.create("v", store()).unwrap();
        volumes.create("v", store()).unwrap();
        let err = volumes.create("v", options(&[("store", "s3://models/other")])).unwrap_err();
        assert!(err.chain().contains("other options"), "{err:?}");
    }

    #[test]
    fn after_a_killed_plugin_volumes_are_known_dead_mounts_cleared_and_old_holders_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let (before, _) = volumes(dir.path());
        before.create("v", store()).unwrap();
        before.mount("v", "old", None).unwrap();
        std::fs::create_dir(dir.path().join("volumes/stray")).unwrap();
        let second = Volumes::open(dir.path(), Arc::new(fake::Fake::default())).err().unwrap();
        assert!(second.code() == Code::State && second.chain().contains("another volume plugin"), "{second:?}");
        drop(before);

        // A program that another test starts just now has inherited the lock, until it runs.
        let until = Instant::now() + Duration::from_secs(120);
        let (after, fake) = loop {
            let fake = Arc::new(fake::Fake::default());
            match Volumes::open(dir.path(), fake.clone()) {
                Ok(after) => break (after, fake),
                Err(locked) => assert!(Instant::now() < until, "{locked:?}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let cleared = held(&fake.cleared).clone();
        assert!(cleared.contains(&dir.path().join("volumes/v")) && cleared.contains(&dir.path().join("volumes/stray")));
        assert!(!dir.path().join("volumes/stray").exists());
        assert_eq!(after.look("v").unwrap().store, "s3://models/prod");
        after.mount("v", "new", None).unwrap();
        after.unmount("v", "old").unwrap();
        assert_eq!(fake.standing.load(Ordering::SeqCst), 1, "the new container keeps its mount");
        after.unmount("v", "new").unwrap();
        assert_eq!(fake.standing.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_is_remembered_is_private_and_a_damaged_memory_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (before, _) = volumes(dir.path());
        before.create("v", store()).unwrap();
        drop(before);
        let file = dir.path().join(VOLUMES_FILE);
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(dir.path().join(MOUNTS_DIR).metadata().unwrap().permissions().mode() & 0o777, 0o700);
        std::fs::write(&file, "{").unwrap();
        assert_eq!(Volumes::open(dir.path(), Arc::new(fake::Fake::default())).err().unwrap().code(), Code::State);
    }

    #[test]
    fn a_mount_that_somebody_took_off_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, fake) = volumes(dir.path());
        volumes.create("v", store()).unwrap();
        volumes.mount("v", "one", None).unwrap();
        held(&fake.last).as_ref().unwrap().alive.store(false, Ordering::SeqCst);
        assert_eq!(volumes.look("v").unwrap().mountpoint, None);
        volumes.mount("v", "two", None).unwrap();
        assert_eq!(fake.made.load(Ordering::SeqCst), 2);
        assert_eq!(volumes.look("v").unwrap().holders, 2);
    }

    #[test]
    fn what_a_dead_engine_asked_for_is_let_go_once_no_container_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, fake) = volumes(dir.path());
        volumes.create("v", store()).unwrap();
        let mut engine = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let asker = Asker::of(i32::try_from(engine.id()).ok());
        volumes.mount("v", "of-the-engine", asker).unwrap();
        volumes.sweep();
        assert_eq!(volumes.look("v").unwrap().holders, 1, "the engine is there");
        // A command that asked and ended: another one lets go.
        let mut command = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        volumes.mount("v", "of-a-command", Asker::of(i32::try_from(command.id()).ok())).unwrap();
        for child in [&mut engine, &mut command] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        fake.elsewhere.store(true, Ordering::SeqCst);
        volumes.sweep();
        assert_eq!(volumes.look("v").unwrap().holders, 2, "a container has it");
        fake.elsewhere.store(false, Ordering::SeqCst);
        volumes.sweep();
        assert_eq!(volumes.look("v").unwrap().holders, 1, "the command's use stays");
        volumes.unmount("v", "of-a-command").unwrap();
        assert_eq!(fake.standing.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_mount_that_takes_long_keeps_nobody_else_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, fake) = volumes(dir.path());
        volumes.create("slow", store()).unwrap();
        let gate = held(&fake.gate);
        std::thread::scope(|scope| {
            let mounting = scope.spawn(|| volumes.mount("slow", "one", None));
            // Whether or not it waits at the gate by now, these answer.
            assert_eq!(volumes.list().len(), 1);
            volumes.create("other", store()).unwrap();
            volumes.remove("other").unwrap();
            drop(gate);
            mounting.join().unwrap().unwrap();
        });
        assert_eq!(volumes.look("slow").unwrap().holders, 1);
    }

    #[test]
    fn at_the_end_everything_is_unmounted_and_nothing_mounts_again() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, fake) = volumes(dir.path());
        volumes.create("v", store()).unwrap();
        volumes.mount("v", "one", None).unwrap();
        volumes.stop();
        assert_eq!(fake.standing.load(Ordering::SeqCst), 0);
        assert_eq!(volumes.mount("v", "two", None).unwrap_err().code(), Code::NotFound);
    }

    #[test]
    fn the_end_does_not_wait_for_a_store_that_hangs_and_its_mount_does_not_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (volumes, fake) = volumes(dir.path());
        volumes.create("slow", store()).unwrap();
        let gate = held(&fake.gate);
        std::thread::scope(|scope| {
            let mounting = scope.spawn(|| volumes.mount("slow", "one", None));
            // It made its folder, and waits at the gate.
            while !dir.path().join("volumes/slow").exists() {
                std::thread::yield_now();
            }
            volumes.stop_within(Duration::from_millis(50));
            drop(gate);
            assert_eq!(mounting.join().unwrap().unwrap_err().code(), Code::NotFound);
        });
        assert_eq!((fake.made.load(Ordering::SeqCst), fake.standing.load(Ordering::SeqCst)), (1, 0));
        assert!(!dir.path().join("volumes/slow").exists());
    }
}
