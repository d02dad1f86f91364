//! `modelfs volume-plugin`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::{Flags, Out};
use crate::config::layers::{refuse_all, takes};
use crate::config::rules::{self, Said};
use crate::config::{self, Layers, Oversight};
use crate::error::Result;
use crate::host::{self, Host, HostPlan};
use crate::plugin::{self, HostMounter, Plugin, Policy, Volumes};
use crate::units;

/// Serve models as volumes of Docker and Podman.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct VolumePluginArgs {
    #[command(flatten)]
    flags: Flags<{ takes::PLUGIN }>,
}

const EXAMPLES: &str = "\
Examples:
  modelfs volume-plugin --key-dir /etc/modelfs/keys --trust /etc/modelfs/signing.pub \\
      --allow-store s3://models/prod
  docker volume create -d modelfs -o store=s3://models/prod -o model=acme/llama \\
         -o key=file:/etc/modelfs/keys/llama.key -o uid=1000 llama
  docker run --mount type=volume,source=llama,target=/models,readonly IMAGE
  podman volume create --driver modelfs -o store=s3://models/prod -o model=acme/llama llama

Options of a volume are the words of `modelfs mount -o`, and store. What the plugin is started with is every volume's default; \
whom to trust, floors, limits and lock rules that are given here, and where Vault is, a volume cannot change.
Containers of one volume share its mount, volumes of one version share its memory. The mount goes with the last container.";

/// Where Docker looks, where nothing else is said.
const SOCKET: &str = "/run/docker/plugins/modelfs.sock";

/// What all layers say of a plugin.
pub(super) struct Plan {
    socket: PathBuf,
    cache_bytes: u64,
    oversight: Oversight,
    policy: Policy,
    state_dir: PathBuf,
}

/// # Errors
/// `USAGE` for what contradicts itself, and what is for one mount alone.
pub(super) fn plan(layers: Layers) -> Result<Plan> {
    refuse_all(layers.wrong())?;
    rules::refuse(&Said::of_process(&layers), takes::PLUGIN)?;
    Ok(Plan {
        socket: layers.parse("socket", |text| Ok(text.into()))?.unwrap_or_else(|| SOCKET.into()),
        cache_bytes: config::cache_bytes(&layers)?,
        oversight: Oversight::from_layers(&layers)?,
        state_dir: config::state_dir(&layers)?,
        policy: Policy::from_layers(layers)?,
    })
}

pub fn run(args: &VolumePluginArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.flags.lay(&mut layers);
    let Plan { socket, cache_bytes, oversight, policy, state_dir } = plan(layers)?;
    // Before the engine can ask anything: what waits in the socket's queue is answered once all of this stands.
    let listening = plugin::listen(&socket)?;
    let host = Host::start(&HostPlan { cache_bytes, oversight })?;
    host.answer_as("volume-plugin");
    let volumes = Volumes::open(&state_dir, Arc::new(HostMounter::new(host.clone(), policy)))?;
    let plugin = Arc::new(Plugin::new(volumes));
    let told = json!({ "ready": true, "volumes": plugin.volumes().list().len(), "cache_bytes": cache_bytes });
    out.result(&told, || match out.quiet {
        true => String::new(),
        false => format!("volumes of this host in a cache of {}", units::show_size(cache_bytes)),
    })?;
    let served = host.runtime().block_on(async {
        host::reload_on_hangup(&host)?;
        let stop = host::told_to_stop()?;
        plugin::serve(&listening, plugin.clone(), stop).await
    });
    // No new request before the volumes go.
    drop(listening);
    plugin.volumes().stop();
    host.stop()?;
    served
}
