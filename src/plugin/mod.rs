//! The volume plugin of Docker and Podman: volumes that are mounts of models, lent to containers.
//!
//! In: a container engine's requests on a Unix socket, whose options are words of `modelfs mount -o`. Out: mountpoints.
//! Promises: a volume's containers share one mount, which goes with the last of them; a volume says no more than its
//! administrator leaves to it ([`Policy`]); what is remembered holds no secret; after the plugin, the engine or both were
//! killed, every volume is still known and mounts again.
//! Not here: what a mount is (`host`), what the words mean (`config`).
//! Held by: the tests of the modules, tests/docker.sh.

mod asker;
mod hosted;
mod http;
mod policy;
mod protocol;
mod volumes;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;

pub use asker::Asker;
pub use hosted::HostMounter;
pub use http::{listen, serve};
pub use policy::Policy;
pub use protocol::Plugin;
pub use volumes::Volumes;

/// The options of a volume, as `docker volume create -o` gave them.
pub type Options = BTreeMap<String, String>;

/// What makes mounts of volumes.
pub trait Mounter: Send + Sync {
    /// Everything about `options` that can be known without the store. `mountpoint` exists.
    ///
    /// # Errors
    /// `Usage` naming the option and what to write instead.
    fn check(&self, options: &Options, mountpoint: &Path) -> Result<()>;

    /// Blocking; ready when it answers.
    fn mount(&self, options: &Options, mountpoint: &Path) -> Result<Arc<dyn Standing>>;

    /// Whether anybody has what is mounted there but this host's own tree.
    fn is_elsewhere(&self, mountpoint: &Path) -> bool;

    /// Takes off whatever a dead process left mounted there. Nothing there is success.
    fn clear(&self, mountpoint: &Path) -> Result<()>;
}

/// A mount that stands.
pub trait Standing: Send + Sync {
    /// False once somebody else unmounted it.
    fn is_mounted(&self) -> bool;

    /// The models it shows.
    fn models(&self) -> Vec<String>;

    /// Unmounts, or detaches after `grace` if files are held; wipes. Blocking.
    fn unmount(&self, grace: Duration) -> Result<()>;
}
