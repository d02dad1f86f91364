//! Kubernetes: a volume driver of the Container Storage Interface, one on each node.
//!
//! ```text
//!  kubelet ──plugins_registry──> registration       pod's YAML ──> asked ──> words of a mount
//!          ──gRPC──> service ──> node ──> targets, private token ──> Host: one process, one locked cache, a mount a volume
//! ```
//! In: [`CsiPlan`]. Out: volumes of pods, until SIGTERM.
//! Promises: registers itself, without a helper container; what a pod may ask for is in `asked`, what becomes of it in `node`.
//! Not here: mounting, keys, caches (`host`).
//! Held by: tests/kubernetes.sh on a real kubelet, csi-sanity, the tests in each file.

mod asked;
mod door;
mod node;
mod proto;
mod registration;
mod service;
mod targets;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use asked::Rules;
pub use node::{Door, Node, Settings, Shown};
use proto::{PluginInfo, RegistrationStatus};

use door::HostDoor;

use crate::config::layers::{refuse_all, takes};
use crate::config::rules::{self, Said};
use crate::config::{Layers, Oversight, cache_bytes, parse_store};
use crate::error::{Code, Error, Result};
use crate::host::{self, Host, HostPlan};
use crate::refuse;

/// Version of the CSI specification that the driver speaks.
const CSI_VERSION: &str = "1.0.0";
/// A right is not proved more often than this, however often the kubelet comes by.
pub const RECHECK_MIN: Duration = Duration::from_secs(1);
/// The longest name of a driver.
const NAME_BYTES_MAX: usize = 63;

/// The checked configuration of the driver.
#[derive(Debug, Clone)]
pub struct CsiPlan {
    pub settings: Settings,
    /// Where the driver listens, in its own container.
    pub socket: PathBuf,
    /// The same socket as the kubelet sees it.
    pub kubelet_socket: PathBuf,
    /// The kubelet's `plugins_registry`, in the driver's container; `None`: somebody else registers the driver.
    pub registry: Option<PathBuf>,
}

/// What was typed.
#[derive(Debug, Clone)]
pub struct CsiOptions {
    pub name: String,
    pub node_id: String,
    pub stores: Vec<String>,
    pub audience: String,
    pub volumes_max: usize,
    pub recheck: Duration,
    pub kubelet_dir: PathBuf,
    pub socket: PathBuf,
    pub kubelet_socket: Option<PathBuf>,
    pub registry: Option<PathBuf>,
}

impl CsiPlan {
    /// # Errors
    /// `USAGE` for what contradicts itself or would let pods share the node's identity unseen.
    pub fn new(options: CsiOptions, mut layers: Layers) -> Result<CsiPlan> {
        let legal = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
        if options.name.is_empty() || options.name.len() > NAME_BYTES_MAX || !options.name.chars().all(legal) {
            refuse!(Usage, "`{}` is no name of a driver: at most 63 letters, digits, dots and dashes", options.name);
        }
        if options.node_id.is_empty() || options.node_id.len() > 192 {
            refuse!(Usage, "the driver does not know its node; give --node-id, in a manifest from spec.nodeName");
        }
        if options.recheck < RECHECK_MIN {
            refuse!(Usage, "a recheck every {:?} asks Vault without pause; give at least 1s", options.recheck);
        }
        for store in &options.stores {
            parse_store(store)?;
        }
        refuse_all(layers.wrong())?;
        rules::refuse(&Said::of_process(&layers), takes::CSI)?;
        let vault = layers.get("vault-addr").is_some();
        let method = layers.get("vault-auth").map(|method| method.last().to_owned());
        match method.as_deref() {
            None if vault => layers.flag("vault-auth", vec!["kubernetes".into()]),
            None | Some("kubernetes" | "jwt") => {}
            Some(other) => refuse!(
                Usage,
                "vault-auth {other} would open every pod's models with the node's identity; pods log in by kubernetes or jwt"
            ),
        }
        for word in
            ["vault-jwt-file", "model", "manifest", "require", "profile", "log-file", "uid", "gid", "umask", "versions"]
        {
            if let Some(setting) = layers.get(word) {
                refuse!(Usage, "{setting}: {word} is told by each volume; take it out of the driver's configuration");
            }
        }
        let rules = Rules {
            stores: options.stores,
            key_given: layers.get("key").is_some(),
            aead_allowed: layers.get("verify").is_some_and(|mode| mode.last() == "aead"),
            vault_role: layers.get("vault-role").map(|role| role.last().to_owned()),
            vault,
            audience: options.audience,
        };
        let kubelet_dir = options.kubelet_dir.canonicalize().map_err(|e| {
            let what = format!("the kubelet's folder {} is not there; mount it", options.kubelet_dir.display());
            Error::new(Code::Usage, what).with_source(e)
        })?;
        Ok(CsiPlan {
            kubelet_socket: options.kubelet_socket.unwrap_or_else(|| options.socket.clone()),
            socket: options.socket,
            registry: options.registry,
            settings: Settings {
                name: options.name,
                node_id: options.node_id,
                kubelet_dir,
                volumes_max: options.volumes_max,
                recheck: options.recheck,
                layers,
                rules,
            },
        })
    }
}

/// Serves the kubelet until SIGTERM or SIGINT, then ends every mount and wipes. Blocking.
///
/// # Errors
/// Whatever keeps the driver from starting; `HELD` if programs still held files at the end.
pub fn run(plan: &CsiPlan) -> Result<()> {
    let host = Host::start(&HostPlan {
        cache_bytes: cache_bytes(&plan.settings.layers)?,
        oversight: Oversight::from_layers(&plan.settings.layers)?,
    })?;
    host.answer_as("csi");
    let node = Arc::new(Node::new(plan.settings.clone(), Box::new(HostDoor(host.clone())))?);
    let served = host.runtime().block_on(async {
        host::reload_on_hangup(&host)?;
        let stop = host::told_to_stop()?;
        serve(plan, node.clone(), stop).await
    });
    node.stop();
    host.stop()?;
    served
}

/// Serves the kubelet until `stop` ends.
///
/// # Errors
/// Whatever keeps the driver from listening.
pub async fn serve(plan: &CsiPlan, node: Arc<Node>, stop: impl Future<Output = ()>) -> Result<()> {
    let listener = service::listen(&plan.socket)?;
    let driver = service::accept(listener, move |stream| service::serve(node.clone(), stream));
    let registry = plan.registry.as_deref().map(|folder| registration_socket(folder, &plan.settings.name));
    // After the driver answers: the kubelet calls as soon as it knows of it.
    let registered = registry.as_deref().map(|path| register(plan, path)).transpose()?;
    let registering = async {
        match registered {
            Some(registering) => registering.await,
            None => std::future::pending().await,
        }
    };
    tracing::info!(socket = %plan.socket.display(), node = plan.settings.node_id, "the driver listens");
    tokio::select! {
        () = driver => {}
        () = registering => {}
        () = stop => {}
    }
    // The kubelet takes a socket that is gone for a driver that is gone.
    for path in registry.iter().chain([&plan.socket]) {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

fn registration_socket(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}-reg.sock"))
}

fn register(plan: &CsiPlan, path: &Path) -> Result<impl Future<Output = ()> + use<>> {
    let listener = service::listen(path)?;
    let info = Arc::new(PluginInfo {
        kind: "CSIPlugin".into(),
        name: plan.settings.name.clone(),
        endpoint: plan.kubelet_socket.display().to_string(),
        supported_versions: vec![CSI_VERSION.into()],
    });
    Ok(service::accept(listener, move |stream| {
        let info = info.clone();
        async move {
            match registration::serve(stream, &info, verdict).await {
                // The kubelet hangs up when it has its answer.
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    tracing::warn!("the kubelet's registration call: {error}");
                }
                Ok(()) | Err(_) => {}
            }
        }
    }))
}

fn verdict(status: RegistrationStatus) {
    if status.plugin_registered {
        tracing::info!("registered with the kubelet");
    } else {
        tracing::error!("the kubelet did not register the driver: {}", status.error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(words: &[&str]) -> Result<CsiPlan> {
        let mut layers = Layers::default();
        layers.mount_options(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(), false)?;
        let options = CsiOptions {
            name: "csi.modelfs".into(),
            node_id: "node1".into(),
            stores: vec!["s3://models/prod".into()],
            audience: "vault".into(),
            volumes_max: 10,
            recheck: Duration::from_secs(30),
            kubelet_dir: std::env::temp_dir(),
            socket: "/csi/csi.sock".into(),
            kubelet_socket: None,
            registry: None,
        };
        CsiPlan::new(options, layers)
    }

    #[test]
    fn pods_log_in_as_themselves_or_not_at_all() {
        let rules = plan(&["vault-addr=https://vault:8200"]).expect("a plan").settings;
        assert!(rules.rules.vault);
        assert_eq!(rules.layers.get("vault-auth").expect("set").last(), "kubernetes");
        assert!(!plan(&["key=file:/k"]).expect("a plan").settings.rules.vault);
        for method in ["token", "approle", "cert"] {
            let error = plan(&["vault-addr=https://vault:8200", &format!("vault-auth={method}")]).expect_err(method);
            assert!(error.message().contains("the node's identity"), "{error:?}");
        }
    }

    #[test]
    fn what_each_volume_says_is_not_the_drivers_to_say() {
        for word in ["model=a", "vault-jwt-file=/t", "uid=7", "profile=/p"] {
            assert_eq!(plan(&[word]).expect_err(word).code(), Code::Usage);
        }
    }
}
