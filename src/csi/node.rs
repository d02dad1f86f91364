//! The node service: a volume is published, proved again, and taken away.
//!
//! In: publish and unpublish requests of the kubelet. Out: mounts by the [`Door`], or a refusal in words for the pod's events.
//! Promises: each volume is mounted with its own pod's token and no other right; the token lies in a private folder, is replaced
//! at every republish and removed with the volume. A republish proves the right again, at most once a period: what Vault refuses
//! is shut for new opens until it is allowed again; an outage changes nothing. One call a target at a time; all may be repeated.
//! Keeps no state outside the process: after a restart the kubelet publishes anew. Until that succeeds, a volume that was there
//! before is a dead mount, never an empty folder, and every refusal is one after which the kubelet tries again.
//! Held by: the tests in node_tests.rs, tests/csi.sh, tests/kubernetes.sh.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tonic::Code as GrpcCode;

use super::asked::{Asked, Rules, Token};
use super::proto::{NodePublishVolumeRequest, NodeUnpublishVolumeRequest};
use super::service::Refusal;
use super::targets::{self, Place};
use crate::config::{Layers, MountPlan};
use crate::error::{Class, Code, Error, Result};
use crate::mem::PrivateFolder;
use crate::refuse;

/// How long an unpublish waits for programs: the kubelet has ended the pod's before.
const HOLD_GRACE: Duration = Duration::from_secs(5);
/// How long the end of the driver waits for calls that are under way: what they publish is to be let go too.
const BUSY_GRACE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });
/// How often it looks meanwhile.
const BUSY_POLL: Duration = Duration::from_millis(50);
/// Room for the tokens of the most volumes: each takes a page or two.
const TOKEN_BYTES: u64 = 16 << 20;

/// Where models are mounted; `Host` outside tests.
pub trait Door: Send + Sync {
    /// `may_enter` is asked last, when the model is open and nothing of it is in the tree yet; what it refuses is not mounted.
    fn mount(&self, plan: MountPlan, may_enter: &dyn Fn() -> Result<()>) -> Result<Arc<dyn Shown>>;
}

/// One mount of the door.
pub trait Shown: Send + Sync {
    fn is_mounted(&self) -> bool;
    fn refuse(&self, why: Option<&str>) -> Result<()>;
    fn recheck(&self) -> Result<()>;
    fn unmount(&self, grace: Duration) -> Result<()>;
    /// Ends as by `unmount`, but the mount stays in the tree, and is dead with the end of this process.
    fn abandon(&self) -> Result<()>;
}

/// What the operator decided.
#[derive(Debug, Clone)]
pub struct Settings {
    pub name: String,
    pub node_id: String,
    pub kubelet_dir: PathBuf,
    pub volumes_max: usize,
    /// A right that was proved is not asked for again before this has passed.
    pub recheck: Duration,
    /// Everything a mount is told that no pod may say.
    pub layers: Layers,
    pub rules: Rules,
}

pub struct Node {
    settings: Settings,
    door: Box<dyn Door>,
    tokens: PrivateFolder,
    volumes: Mutex<HashMap<PathBuf, Slot>>,
    /// Nothing is published any more: it would be mounted behind the back of `stop`.
    stopping: AtomicBool,
}

enum Slot {
    /// A call is under way, for a volume that is there or for none.
    Busy(Option<Arc<dyn Shown>>),
    Published(Box<Volume>),
}

struct Volume {
    id: String,
    asked: Asked,
    shown: Arc<dyn Shown>,
    proved: Instant,
    refused: Option<Error>,
}

impl Node {
    pub fn new(settings: Settings, door: Box<dyn Door>) -> Result<Node> {
        let waiting = targets::inherit(&settings.kubelet_dir)?;
        if waiting > 0 {
            tracing::warn!("{waiting} volumes of an earlier driver are dead until the kubelet publishes them again");
        }
        Ok(Node {
            settings,
            door,
            tokens: PrivateFolder::new(TOKEN_BYTES)?,
            volumes: Mutex::default(),
            stopping: AtomicBool::new(false),
        })
    }

    pub fn name(&self) -> &str {
        &self.settings.name
    }
    pub fn id(&self) -> &str {
        &self.settings.node_id
    }
    pub fn volumes_max(&self) -> usize {
        self.settings.volumes_max
    }

    /// NodePublishVolume: first, repeated, or the kubelet's regular republish. Blocking.
    pub fn publish(&self, request: &NodePublishVolumeRequest) -> Result<(), Refusal> {
        need("volume id", &request.volume_id)?;
        need("target path", &request.target_path)?;
        let target = Path::new(&request.target_path);
        let was_there = targets::is_there(target);
        self.publish_at(request).map_err(|mut refusal| {
            // The pod had this volume, from a driver that is gone, and whatever is wrong now (a store, a role or a key that the
            // operator took out of the configuration too) may be mended. After a final refusal the kubelet would throw away what
            // it needs to unpublish.
            if was_there && is_final(refusal.code) && !self.stands(target) {
                refusal.code = GrpcCode::Unavailable;
            }
            refusal
        })
    }

    fn publish_at(&self, request: &NodePublishVolumeRequest) -> Result<(), Refusal> {
        let target = targets::check(&self.settings.kubelet_dir, &request.target_path)?;
        let (asked, token) = Asked::read(request, &self.settings.rules)?;
        let claim = self.claim(&target, Some(self.settings.volumes_max))?;
        match claim.had {
            Some(ref volume) if volume.id != request.volume_id || volume.asked != asked => Err(Refusal::new(
                GrpcCode::AlreadyExists,
                format!("another volume ({}) is published at {}", volume.id, target.display()),
            )),
            Some(ref volume) if volume.shown.is_mounted() => self.republish(claim, &asked, token),
            Some(_) | None => self.publish_anew(claim, &request.volume_id, asked, token),
        }
    }

    fn publish_anew(&self, mut claim: Claim, id: &str, asked: Asked, token: Option<Token>) -> Result<(), Refusal> {
        if let Some(gone) = claim.had.take() {
            // Somebody unmounted it behind our back: what it held is let go before it is mounted once more.
            tracing::warn!(target = %claim.target.display(), "the volume was unmounted outside the driver");
            if let Err(error) = self.let_go(&claim.target, &*gone.shown) {
                claim.had = Some(gone);
                return Err(error.into());
            }
        }
        let place = targets::prepare(&claim.target, asked.below.as_deref())?;
        match self.mount(&claim.target, &place, &asked, token) {
            Ok(shown) => {
                tracing::info!(models = asked.models(), who = %asked.who, pod = asked.who.pod, "published");
                let id = id.to_owned();
                claim.had = Some(Box::new(Volume { id, asked, shown, proved: Instant::now(), refused: None }));
                Ok(())
            }
            Err(error) => {
                tracing::warn!(models = asked.models(), who = %asked.who, "not published: {}", error.chain());
                let refusal = self.tell(&asked, &error);
                self.forget(&claim.target);
                if place.before {
                    if let Err(error) = targets::hold(&place.folder) {
                        tracing::error!("a container may find an empty folder: {}", error.chain());
                    }
                } else {
                    targets::clear(&claim.target)?;
                    targets::remove(&claim.target)?;
                }
                Err(refusal)
            }
        }
    }

    fn mount(&self, target: &Path, place: &Place, asked: &Asked, token: Option<Token>) -> Result<Arc<dyn Shown>> {
        let mut layers = self.settings.layers.clone();
        let mut words = asked.words.clone();
        if let Some(token) = token {
            self.tokens.put(&token_name(target), &token)?;
            let path = self.tokens.path(&token_name(target));
            words.push(format!("vault-jwt-file={}", path.display()));
        }
        words.extend(asked.vault_role.iter().map(|role| format!("vault-role={role}")));
        words.push("allow-other".into());
        match asked.group {
            // The pod's own group, and nobody else in it.
            Some(group) => words.extend([format!("gid={group}"), "umask=0227".into()]),
            // A volume is seen by its pod alone, and which user runs there is the pod's affair.
            None => words.push("umask=0222".into()),
        }
        layers.mount_options(&words, false)?;
        let mut plan = MountPlan::from_layers(&layers, &asked.store, &place.folder, true)?;
        plan.service_account = Some(format!("{}/{}", asked.who.namespace, asked.who.service_account));
        plan.pod = asked.who.pod();
        self.door.mount(plan, &|| {
            if self.stopping.load(Ordering::Acquire) {
                refuse!(Stopping, "the driver is stopping; the kubelet tries again");
            }
            // Only now: where Vault or the store is away, a container that starts meets the dead mount and not an empty folder.
            targets::clear(&place.folder)
        })
    }

    /// The kubelet comes by every minute or so with a fresh token.
    fn republish(&self, mut claim: Claim, asked: &Asked, token: Option<Token>) -> Result<(), Refusal> {
        if let Some(token) = token {
            self.tokens.put(&token_name(&claim.target), &token)?;
        }
        let volume = claim.had.as_mut().expect("a republish has a volume");
        if volume.proved.elapsed() < self.settings.recheck {
            return volume.refused.as_ref().map_or(Ok(()), |error| Err(self.tell(asked, error)));
        }
        volume.proved = Instant::now();
        match volume.shown.recheck() {
            Ok(()) => {
                if volume.refused.is_some() {
                    // Its keys may be read anew for it; until they are it stays refused.
                    volume.shown.refuse(None).map_err(|error| self.tell(asked, &error))?;
                    volume.refused = None;
                    tracing::info!(who = %asked.who, models = asked.models(), "allowed again");
                }
                Ok(())
            }
            Err(error) if takes_the_right(&error) => {
                tracing::warn!(who = %asked.who, models = asked.models(), "refused from now on: {}", error.chain());
                // Who is refused is refused: what fails is only to let in.
                if let Err(failed) = volume.shown.refuse(Some(&error.chain())) {
                    tracing::error!("{}", failed.chain());
                }
                let refusal = self.tell(asked, &error);
                volume.refused = Some(error);
                Err(refusal)
            }
            Err(error) => {
                tracing::warn!(who = %asked.who, "the right could not be proved again, and stays: {}", error.chain());
                volume.refused.as_ref().map_or(Ok(()), |error| Err(self.tell(asked, error)))
            }
        }
    }

    /// NodeUnpublishVolume; of what is not there, too. Blocking.
    pub fn unpublish(&self, request: &NodeUnpublishVolumeRequest) -> Result<(), Refusal> {
        need("volume id", &request.volume_id)?;
        need("target path", &request.target_path)?;
        let target = targets::check(&self.settings.kubelet_dir, &request.target_path)?;
        let mut claim = self.claim(&target, None)?;
        if let Some(volume) = claim.had.take() {
            if let Err(error) = self.let_go(&target, &*volume.shown) {
                claim.had = Some(volume);
                return Err(error.into());
            }
            tracing::info!(models = volume.asked.models(), who = %volume.asked.who, "unpublished");
        }
        self.forget(&target);
        targets::clear(&target)?;
        Ok(targets::remove(&target)?)
    }

    /// Lets every volume go at once, as at the driver's end: pods that run lose what they do not hold. What the kubelet means to
    /// publish again stays in the tree as a dead mount, also where a call of it waits for Vault. Blocking.
    pub fn stop(&self) {
        let until = Instant::now() + BUSY_GRACE;
        loop {
            let (published, any_busy) = {
                let mut volumes = lock(&self.volumes);
                self.stopping.store(true, Ordering::Release);
                let published: Vec<_> = volumes.extract_if(|_, slot| matches!(slot, Slot::Published(_))).collect();
                (published, !volumes.is_empty())
            };
            std::thread::scope(|all| {
                for (target, slot) in published {
                    all.spawn(move || {
                        if let Slot::Published(volume) = slot {
                            self.leave(&target, &*volume.shown);
                        }
                    });
                }
            });
            if !any_busy {
                return;
            }
            if Instant::now() >= until {
                break;
            }
            std::thread::sleep(BUSY_POLL);
        }
        // Their calls fail with the mount, or come too late to matter.
        let busy: Vec<_> = lock(&self.volumes)
            .iter()
            .filter_map(|(target, slot)| match slot {
                Slot::Busy(shown) => Some((target.clone(), shown.clone()?)),
                Slot::Published(volume) => Some((target.clone(), volume.shown.clone())),
            })
            .collect();
        std::thread::scope(|all| {
            for (target, shown) in busy {
                all.spawn(move || self.leave(&target, &*shown));
            }
        });
    }

    fn leave(&self, target: &Path, shown: &dyn Shown) {
        let left = if targets::is_wanted(target) && shown.is_mounted() {
            let left = shown.abandon();
            self.forget(target);
            left
        } else {
            self.let_go(target, shown)
        };
        if let Err(error) = left {
            tracing::error!("{}", error.chain());
        }
    }

    /// Whether a volume of this driver is mounted at `target`.
    fn stands(&self, target: &Path) -> bool {
        let shown = match lock(&self.volumes).get(target) {
            Some(Slot::Published(volume)) => volume.shown.clone(),
            Some(Slot::Busy(_)) | None => return false,
        };
        shown.is_mounted()
    }

    /// # Errors
    /// Only if it is still mounted afterwards.
    fn let_go(&self, target: &Path, shown: &dyn Shown) -> Result<()> {
        match shown.unmount(HOLD_GRACE) {
            Err(error) if shown.is_mounted() => return Err(error),
            // Somebody held files; the mount is gone from the tree all the same, and what they do not hold is wiped.
            Err(error) => tracing::warn!("{}: {}", target.display(), error.chain()),
            Ok(()) => {}
        }
        self.forget(target);
        Ok(())
    }

    fn forget(&self, target: &Path) {
        if let Err(error) = self.tokens.remove(&token_name(target)) {
            tracing::error!("{}", error.chain());
        }
    }

    /// The words for the events of the pod: which model, who asked, what was said, what to do.
    fn tell(&self, asked: &Asked, error: &Error) -> Refusal {
        let role = asked.vault_role.as_deref().unwrap_or("(none)");
        let advice = match error.code() {
            Code::VaultDenied => format!("in Vault the role {role} must name this service account and allow its key: "),
            Code::NoKey => "the key that the pod names does not open it: ".into(),
            Code::VaultUnreachable | Code::VaultSealed => "the kubelet tries again by itself: ".into(),
            _ => String::new(),
        };
        let cause = Refusal::from(error.clone());
        let models = asked.models();
        Refusal::new(
            cause.code,
            format!("model {models} for {} (Vault role {role}): {advice}{}", asked.who, cause.message),
        )
    }

    /// The target for one call; the volume that is there goes with it, and comes back with its end. A new one only within
    /// `most`; what lets go of one is never refused for their number: a pod could not end.
    fn claim(&self, target: &Path, most: Option<usize>) -> Result<Claim<'_>, Refusal> {
        let mut volumes = lock(&self.volumes);
        if most.is_some() && self.stopping.load(Ordering::Acquire) {
            return Err(Refusal::new(GrpcCode::Unavailable, "the driver is stopping; the kubelet tries again"));
        }
        if !volumes.contains_key(target) && most.is_some_and(|most| volumes.len() >= most) {
            return Err(Refusal::new(
                GrpcCode::ResourceExhausted,
                format!("{} volumes are published on this node, the most that --max-volumes allows", volumes.len()),
            ));
        }
        let had = match volumes.remove(target) {
            Some(busy @ Slot::Busy(_)) => {
                volumes.insert(target.to_owned(), busy);
                let what = format!("a call for {} is still under way", target.display());
                return Err(Refusal::new(GrpcCode::Aborted, what));
            }
            Some(Slot::Published(volume)) => Some(volume),
            None => None,
        };
        volumes.insert(target.to_owned(), Slot::Busy(had.as_ref().map(|volume| volume.shown.clone())));
        Ok(Claim { node: self, target: target.to_owned(), had })
    }

    /// How many tokens lie in the private folder.
    #[cfg(test)]
    pub fn tokens(&self) -> usize {
        self.tokens.count()
    }
}

/// Vault said no, to this pod. Everything else is an outage or a fault: it takes from nobody what he has.
fn takes_the_right(error: &Error) -> bool {
    error.class() == Class::Denied && error.code() != Code::StoreDenied || error.code() == Code::VaultNotFound
}

/// Whether the kubelet takes the answer for its last word, and the volume for one that is not there.
fn is_final(code: GrpcCode) -> bool {
    !matches!(
        code,
        GrpcCode::Aborted
            | GrpcCode::Cancelled
            | GrpcCode::DeadlineExceeded
            | GrpcCode::ResourceExhausted
            | GrpcCode::Unavailable
    )
}

/// The file of a target's token; a digest, since a path is no file name.
fn token_name(target: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    hex::encode(crate::crypto::sha256(&[target.as_os_str().as_bytes()]))
}

fn need(what: &str, value: &str) -> Result<(), Refusal> {
    match value.is_empty() {
        true => Err(Refusal::new(GrpcCode::InvalidArgument, format!("the request has no {what}"))),
        false => Ok(()),
    }
}

fn lock(volumes: &Mutex<HashMap<PathBuf, Slot>>) -> MutexGuard<'_, HashMap<PathBuf, Slot>> {
    // What a call that panicked left is whole: a slot is put in or taken out at once.
    volumes.lock().unwrap_or_else(|lost| lost.into_inner())
}

struct Claim<'a> {
    node: &'a Node,
    target: PathBuf,
    had: Option<Box<Volume>>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut volumes = lock(&self.node.volumes);
        match self.had.take() {
            Some(volume) => volumes.insert(std::mem::take(&mut self.target), Slot::Published(volume)),
            None => volumes.remove(&self.target),
        };
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
