//! `--profile`: what an earlier load read is fetched again in its order, and what this one reads is written down.
//!
//! Promises: nothing about a profile refuses a mount or a read; at most a share of the cache is filled ahead.
//! Not here: what a profile holds and how it is kept (`read::profile`).

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::cache::Model;
use crate::fuse::ModelFs;
use crate::read::profile::{KnownFile, Profile, ProfileFile, Recorder};

/// The share of the cache, one in so many, that a profile's replay fills at most: the rest is for what is really read.
pub const REPLAY_SHARE: u64 = 2;

/// How often a profile is written while the mount lives.
const PROFILE_PERIOD: Duration = Duration::from_secs(30);

/// A replay under way, and what is written down meanwhile.
pub(super) struct Profiling {
    keeper: Arc<Keeper>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

struct Keeper {
    file: ProfileFile,
    profile: Mutex<Profile>,
    recorder: Arc<Recorder>,
    fs: ModelFs,
}

impl Profiling {
    /// Nothing about a profile is worth refusing a mount for: what is wrong with it is logged.
    pub fn start(path: &std::path::Path, fs: &ModelFs, runtime: &tokio::runtime::Handle) -> Profiling {
        let (file, profile) = ProfileFile::open(path);
        let models = current_models(fs);
        let mut wishes = Vec::new();
        let mut whole = HashSet::new();
        for model in &models {
            let Some(load) = profile.load_of(&model.name) else { continue };
            let known = model_files(model);
            wishes.push((model.clone(), load.ranges(&known)));
            whole.extend(load.whole_files(&known).into_iter().map(|file| (model.serial, file)));
        }
        let recorder = Arc::new(Recorder::default());
        fs.reader().set_expected_whole(whole);
        fs.reader().set_recorder(recorder.clone());
        let keeper = Arc::new(Keeper { file, profile: Mutex::new(profile), recorder, fs: fs.clone() });
        let replay = runtime.spawn({
            let fs = fs.clone();
            async move {
                let mut left = fs.reader().cache().budget().total() / REPLAY_SHARE;
                for (model, ranges) in wishes {
                    let asked = fs.reader().replay(&model, ranges, left).await;
                    tracing::info!(model = %model.name, bytes = asked, "fetched in the order of the last load");
                    left -= asked;
                }
            }
        });
        let periodic = runtime.spawn({
            let keeper = keeper.clone();
            async move {
                loop {
                    tokio::time::sleep(PROFILE_PERIOD).await;
                    let keeper = keeper.clone();
                    // Ends with the runtime, whatever became of one write.
                    let _ = tokio::task::spawn_blocking(move || keeper.keep()).await;
                }
            }
        });
        Profiling { keeper, tasks: vec![replay, periodic] }
    }

    pub fn stop(self) {
        for task in &self.tasks {
            task.abort();
        }
        self.keeper.keep();
    }
}

impl Keeper {
    /// Writes what was recorded so far, if anything was.
    fn keep(&self) {
        if !self.recorder.take_changed() {
            return;
        }
        let mut profile = self.profile.lock().expect("a thread died holding the profile");
        for model in &current_models(&self.fs) {
            let path = |file: u32| model.manifest.path(&model.manifest.files()[file as usize]).to_owned();
            profile.merge(self.recorder.load(model.serial, &model.name, &model.digest.to_string(), path));
        }
        if let Err(error) = self.file.replace(&profile) {
            tracing::warn!("{}", error.chain());
        }
    }
}

/// Finds a file of a model by its path, whatever the model's version.
fn model_files(model: &Arc<Model>) -> impl Fn(&str) -> Option<KnownFile> {
    |path| {
        let at = model.manifest.find(path)?;
        Some(KnownFile { file: at as u32, size: model.manifest.files()[at].size })
    }
}

/// What the names of a mount mean now.
pub(super) fn current_models(fs: &ModelFs) -> Vec<Arc<Model>> {
    fs.vfs().shown().into_iter().filter(|shown| shown.current).map(|shown| shown.model).collect()
}
