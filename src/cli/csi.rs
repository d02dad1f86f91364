//! `modelfs csi`: the volume driver of one Kubernetes node.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Flags;
use crate::config::Layers;
use crate::config::layers::{split_list, takes};
use crate::csi::{CsiOptions, CsiPlan};
use crate::error::{Code, Error, Result};
use crate::units::parse_duration;

/// Serve models to the pods of a Kubernetes node, each with the rights of its own service account.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CsiArgs {
    #[command(flatten)]
    flags: Flags<{ takes::CSI }>,
}

const EXAMPLES: &str = "\
Examples:
  modelfs csi --node-id $(NODE_NAME) --allow-store s3://models/prod --trust PUBKEY \\
      --vault-addr https://vault:8200
  modelfs --config /etc/modelfs/modelfs.toml csi --allow-store $(STORES)

docs/kubernetes has the manifests, docs/DEPLOY.md the way through them. It runs as root in a privileged container: only there \
does the kubelet see what it mounts. Stop it with SIGTERM, after the pods of the node have ended.";

impl CsiArgs {
    pub(super) fn plan(&self, mut layers: Layers) -> Result<CsiPlan> {
        self.flags.lay(&mut layers);
        plan(layers)
    }
}

/// The plan of a driver, from what all layers say.
pub(super) fn plan(layers: Layers) -> Result<CsiPlan> {
    let text = |name, usual: &str| -> Result<String> {
        Ok(layers.parse(name, |text| Ok(text.to_owned()))?.unwrap_or_else(|| usual.to_owned()))
    };
    let path = |name, usual: &str| -> Result<PathBuf> { Ok(text(name, usual)?.into()) };
    let (name, kubelet_dir) = (text("driver-name", "csi.modelfs")?, path("kubelet-dir", "/var/lib/kubelet")?);
    let usual = kubelet_dir.join("plugins").join(&name).join("csi.sock");
    let registry = path("registry", "/registration")?;
    let options = CsiOptions {
        node_id: text("node-id", "")?,
        // As a manifest writes a list: separated by commas.
        stores: layers.parse_all("allow-store", |text| Ok(split_list(text)))?.concat(),
        audience: text("audience", "vault")?,
        volumes_max: layers.parse("max-volumes", parse_volumes)?.unwrap_or(VOLUMES_MAX),
        recheck: layers.parse("recheck", parse_duration)?.unwrap_or(RECHECK),
        socket: path("socket", "/csi/csi.sock")?,
        kubelet_socket: Some(layers.parse("kubelet-socket", |text| Ok(text.into()))?.unwrap_or(usual)),
        registry: (!layers.switch("no-registration")?).then_some(registry),
        name,
        kubelet_dir,
    };
    CsiPlan::new(options, layers)
}

const VOLUMES_MAX: usize = 256;
const RECHECK: Duration = Duration::from_secs(30);

fn parse_volumes(text: &str) -> Result<usize> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(Error::new(Code::Usage, format!("`{text}` is no number of volumes; give 1 or more"))),
    }
}

pub fn run(args: &CsiArgs, layers: Layers) -> Result<()> {
    let plan = args.plan(layers)?;
    crate::csi::run(&plan)
}
