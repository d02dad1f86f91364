//! When a mount may be called ready: the store answers, and every model that is required can really be read.
//!
//! In: a checked [`MountPlan`]; then the opened models and the cache. Out: nothing, or what stands in the way, told to the
//! service manager as it goes.
//! Promises: a required model was unlocked, its manifest verified, and its first and its last chunk fetched, authenticated
//! and opened, through the very cache that readers will use; only a store or a Vault that does not answer is waited for, a
//! wrong key or a forged byte never.
//! Not here: what the manager hears how (`notify`), which versions a mount shows (`models`).
//! Held by: the tests below, tests/service.rs, tests/systemd.sh.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::cache::{Cache, Model};
use crate::config::{MountPlan, bare};
use crate::error::{Class, Code, Error, Result};
use crate::format::ChunkIndex;
use crate::keys::KeySource;
use crate::notify::{self, Service};
use crate::read::is_sole;
use crate::store::{self, StoreUrl};
use crate::vfs::Shown;
use crate::{reading, refuse};

/// The first pause before the store is asked again; each is twice the one before.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// No object of ours is called so: whether it is there tells nothing, that the store says so tells that it answers.
const NO_OBJECT: &str = "ready";

/// Returns once the store answers, and Vault where everything hangs on it. Asks them only if `plan` gives time for it:
/// `--ready-timeout`, or a service manager, which has a limit of its own. Blocking.
///
/// Whether what they answer is any good is not judged here: opening the models does, and does not wait.
///
/// # Errors
/// What did not answer, when the time is up.
pub fn await_store(plan: &mut MountPlan, runtime: &Handle) -> Result<()> {
    let service = notify::service();
    let limit = match plan.ready_timeout {
        Some(limit) => Some(limit),
        None if service.is_there() => None,
        None => Some(Duration::ZERO),
    };
    if limit == Some(Duration::ZERO) {
        return Ok(());
    }
    reading::connect(&mut plan.access)?;
    let plan = &*plan;
    keep_asking(limit, &|told| service.status(told), || ask_all(plan, runtime), std::thread::sleep)
}

/// One question to each. An answer that is a refusal is an answer.
fn ask_all(plan: &MountPlan, runtime: &Handle) -> Result<()> {
    let answered = |asked: Result<()>| match asked {
        Err(error) if error.class() == Class::Unreachable => Err(error),
        Ok(()) | Err(_) => Ok(()),
    };
    if let Some(vault) = plan.access.connected.as_ref().filter(|_| hangs_on_vault(plan)) {
        answered(vault.login())?;
    }
    match &plan.store {
        StoreUrl::Local(path) if !path.exists() => {
            Err(Error::new(Code::Unreachable, format!("no store at {} yet", path.display())))
        }
        StoreUrl::S3 { .. } => {
            let asked = store::open(&plan.store, &plan.access.store)
                .and_then(|store| runtime.block_on(store.size(NO_OBJECT)).map(drop));
            answered(asked)
        }
        StoreUrl::Local(_) | StoreUrl::VaultKv { .. } => Ok(()),
    }
}

/// A key that comes from elsewhere opens the mount while Vault is away: that is what it is for.
pub(crate) fn hangs_on_vault(plan: &MountPlan) -> bool {
    let from_vault = |key: &KeySource| matches!(key, KeySource::VaultTransit { .. } | KeySource::VaultKv { .. });
    let keys = &plan.access.keys;
    matches!(plan.store, StoreUrl::VaultKv { .. })
        || plan.access.s3_credentials.is_some()
        || !keys.is_empty() && keys.iter().all(from_vault)
}

/// `limit`: none is for ever. `pause` is handed how long.
fn keep_asking(
    limit: Option<Duration>,
    tell: &dyn Fn(&str),
    ask: impl Fn() -> Result<()>,
    pause: impl Fn(Duration),
) -> Result<()> {
    let started = Instant::now();
    let mut next = PAUSE_MIN;
    loop {
        let Err(error) = ask() else { return Ok(()) };
        let left = limit.map(|limit| limit.saturating_sub(started.elapsed()));
        if left == Some(Duration::ZERO) {
            let waited = started.elapsed().as_secs();
            return Err(error.context(format!("not ready within {waited} s")));
        }
        let now = left.map_or(next, |left| next.min(left));
        tell(&format!("waiting: {}; asked again in {} s", error.chain(), now.as_secs_f64().ceil()));
        tracing::warn!("not ready yet, asked again in {} s: {}", now.as_secs_f64().ceil(), error.chain());
        pause(now);
        next = (next * 2).min(PAUSE_MAX);
    }
}

/// Reads the first and the last chunk of every required model. Before the mount, so that one which cannot be read is never
/// seen.
///
/// # Errors
/// `NOT_FOUND` for a required model that the mount does not show; what refused a chunk, naming the model.
pub async fn prove(plan: &MountPlan, shown: &[Shown], cache: &Cache) -> Result<()> {
    let service = notify::service();
    for model in required(plan, service, shown)? {
        for (which, chunk) in ["first", "last"].into_iter().zip(ends(&model)) {
            let Some((object, index, sole)) = chunk else { continue };
            let name = &model.name;
            service.status(&format!("model {name}: fetching {which} block"));
            let read = cache.pin(&cache.object(&model, object, sole), index).await;
            read.map_err(|error| error.context(format!("required model {name} cannot be read: its {which} block")))?;
        }
    }
    Ok(())
}

/// Those named by `--require`; a service manager is promised what was named with `--model`, if nothing else was said.
fn required(plan: &MountPlan, service: &Service, shown: &[Shown]) -> Result<Vec<Arc<Model>>> {
    let current = || shown.iter().filter(|one| one.current).map(|one| one.model.clone());
    if plan.requires_all() {
        return Ok(current().collect());
    }
    let names = match plan.require.as_slice() {
        [] if service.is_there() => &plan.models[..],
        named => named,
    };
    let mut models = Vec::new();
    for name in names {
        match current().find(|model| model.name == bare(name)) {
            Some(model) => models.push(model),
            None => refuse!(NotFound, "required model {} is not in {}", bare(name), plan.store),
        }
    }
    Ok(models)
}

type ChunkOfModel = (u32, ChunkIndex, bool);

/// Object and chunk of the first byte and of the last, and whether one file is exactly that object; none of a model
/// without a byte.
fn ends(model: &Model) -> [Option<ChunkOfModel>; 2] {
    let manifest = &model.manifest;
    let mut full = manifest.files().iter().enumerate().filter(|(_, file)| file.size > 0);
    let first = full.next();
    let last = full.next_back().or(first);
    let chunk = |object: u32, offset: u64, file: usize| {
        (object, manifest.objects()[object as usize].layout.chunk_at(offset), is_sole(model, file as u32))
    };
    let of_first = first.and_then(|(file, entry)| {
        manifest.extents(entry).first().map(|extent| chunk(extent.object, extent.object_offset, file))
    });
    let of_last = last.and_then(|(file, entry)| {
        let end = |offset: u64, len: u64| offset + len - 1;
        manifest.extents(entry).last().map(|extent| chunk(extent.object, end(extent.object_offset, extent.len), file))
    });
    [of_first, of_last]
}

/// What `systemctl status` shows of a mount that serves: every model with its version.
pub fn status(mountpoint: &std::path::Path, shown: &[Shown]) -> String {
    let one = |one: &Shown| format!("{} version {}", one.model.name, one.model.manifest.header().seq);
    let models: Vec<String> = shown.iter().filter(|one| one.current).map(one).collect();
    format!("{}: {}", mountpoint.display(), models.join(", "))
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    fn away() -> Result<()> {
        refuse!(Unreachable, "store s3://b does not answer")
    }

    #[test]
    fn a_store_that_comes_later_is_waited_for_with_growing_pauses() {
        let (asked, pauses, told) = (Cell::new(0), RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let ask = || {
            asked.set(asked.get() + 1);
            if asked.get() < 8 { away() } else { Ok(()) }
        };
        let tell = |text: &str| told.borrow_mut().push(text.to_owned());

        keep_asking(None, &tell, ask, |pause| pauses.borrow_mut().push(pause.as_secs())).expect("it came");

        assert_eq!(*pauses.borrow(), [1, 2, 4, 8, 15, 15, 15]);
        assert!(told.borrow()[1].contains("does not answer") && told.borrow()[1].contains("2 s"), "{told:?}");
    }

    #[test]
    fn when_the_time_is_up_the_store_is_named() {
        let (limit, began) = (Duration::from_millis(20), Instant::now());
        let error = keep_asking(Some(limit), &|_| {}, away, |pause| {
            assert!(pause <= limit, "{pause:?}");
            std::thread::sleep(pause);
        });
        let error = error.expect_err("the time is up");
        assert_eq!(error.code(), Code::Unreachable);
        let told = error.chain();
        let rest = told.split_once("not ready within ").expect("a time").1;
        let seconds: u64 = rest.split_once(" s").and_then(|(seconds, _)| seconds.parse().ok()).expect("in seconds");
        assert!(seconds <= began.elapsed().as_secs(), "{told}");
        assert!(told.contains("s3://b"), "{told}");
    }
}
