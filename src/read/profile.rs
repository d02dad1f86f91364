//! In which order a model was read, and reading it ahead in that order the next time: pure, and the small file between.
//!
//! In: first touches as they happen; a profile file (hostile: anyone may have written it). Out: ranges of files in the order
//! of the earlier load; the profile's new text.
//! Promises: total on any file, bounded in and out; a profile decides what is fetched first and nothing else; a file that
//! is not a profile of this version is never overwritten.
//! A profile names the files of a model, which sealing hides from the store: it is written with mode 0600.
//! Not here: fetching (`Reader::replay`), when it is written (`daemon`).
//! Form: one JSON object, `{"modelfs_profile": 1, "models": [{"name", "manifest", "files": [path], "runs": [[file, first
//! unit, units, milliseconds since the run before]]}]}`; a unit is [`UNIT_BYTES`] of a file.
//! Held by: the tests below, tests/profile.rs.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Error, Result};
use crate::refuse;

/// What touches are counted in. As long as a chunk usually is, but a profile outlives a change of that.
pub const UNIT_BYTES: u64 = 8 << 20;

/// The longest profile file that is read or written.
pub const PROFILE_BYTES_MAX: u64 = 4 << 20;

/// Units of one model that are remembered: 8 TiB of it.
const UNITS_MAX: usize = 1 << 20;

/// Runs of one model that are remembered: a load in wholly random order of half a terabyte.
const RUNS_MAX: usize = 1 << 16;

const MODELS_MAX: usize = 64;

const VERSION: u32 = 1;

/// Units of one file that were first touched one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u32, u32, u32)", into = "(u32, u32, u32, u32)")]
pub struct Run {
    /// Index into `files`.
    pub file: u32,
    pub first: u32,
    pub units: u32,
    /// Since the run before, or since the mount was ready. For people; a replay does not wait.
    pub gap_ms: u32,
}

impl From<(u32, u32, u32, u32)> for Run {
    fn from((file, first, units, gap_ms): (u32, u32, u32, u32)) -> Self {
        Run { file, first, units, gap_ms }
    }
}

impl From<Run> for (u32, u32, u32, u32) {
    fn from(run: Run) -> Self {
        (run.file, run.first, run.units, run.gap_ms)
    }
}

/// One load of one model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// The model's name.
    pub name: String,
    /// The digest of the version's manifest, in hex.
    pub manifest: String,
    /// Paths within the model, each once.
    pub files: Vec<String>,
    pub runs: Vec<Run>,
}

/// What is known of a file of the model that is mounted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownFile {
    /// Index into the manifest's files.
    pub file: u32,
    /// Plain bytes.
    pub size: u64,
}

/// How many units a file of `size` bytes has.
pub fn units_of(size: u64) -> u32 {
    u32::try_from(size.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

impl Load {
    fn units(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.units)).sum()
    }

    /// What to fetch, in the order of this load: ranges of files as `known` has them now. Paths that are gone and units
    /// past the end fall away, nothing is named twice, at most [`UNITS_MAX`] units.
    pub fn ranges(&self, known: impl Fn(&str) -> Option<KnownFile>) -> Vec<(u32, Range<u64>)> {
        let files: Vec<Option<KnownFile>> = self.files.iter().map(|path| known(path)).collect();
        let mut named = HashSet::new();
        let mut ranges: Vec<(u32, Range<u64>)> = Vec::new();
        for run in &self.runs {
            let Some(Some(known)) = files.get(run.file as usize) else { continue };
            let end = run.first.saturating_add(run.units).min(units_of(known.size));
            for unit in run.first..end {
                if named.len() == UNITS_MAX {
                    return ranges;
                }
                if !named.insert((known.file, unit)) {
                    continue;
                }
                let start = u64::from(unit) * UNIT_BYTES;
                let range = start..(start + UNIT_BYTES).min(known.size);
                match ranges.last_mut() {
                    Some((file, last)) if *file == known.file && last.end == range.start => last.end = range.end,
                    _ => ranges.push((known.file, range)),
                }
            }
        }
        ranges
    }

    /// The files that were read from end to end.
    pub fn whole_files(&self, known: impl Fn(&str) -> Option<KnownFile>) -> HashSet<u32> {
        let mut read: HashMap<u32, u64> = HashMap::new();
        let mut sizes: HashMap<u32, u64> = HashMap::new();
        for path in &self.files {
            sizes.extend(known(path).map(|known| (known.file, known.size)));
        }
        for (file, range) in self.ranges(known) {
            *read.entry(file).or_default() += range.end - range.start;
        }
        read.into_iter().filter(|(file, bytes)| sizes.get(file) == Some(bytes)).map(|(file, _)| file).collect()
    }
}

/// The loads of several models, one a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profile {
    pub loads: Vec<Load>,
}

#[derive(Serialize, Deserialize)]
struct Form {
    modelfs_profile: u32,
    models: Vec<Load>,
}

impl Profile {
    /// # Errors
    /// `USAGE` for anything that is not a profile of this version within its bounds.
    pub fn parse(text: &[u8]) -> Result<Profile> {
        if text.len() as u64 > PROFILE_BYTES_MAX {
            refuse!(Usage, "a profile is at most {PROFILE_BYTES_MAX} bytes long");
        }
        let form: Form = serde_json::from_slice(text)
            .map_err(|e| Error::new(Code::Usage, "not a profile that modelfs wrote").with_source(e))?;
        if form.modelfs_profile != VERSION {
            refuse!(Usage, "a profile of version {}, known is {VERSION}", form.modelfs_profile);
        }
        if form.models.len() > MODELS_MAX || form.models.iter().any(|load| load.runs.len() > RUNS_MAX) {
            refuse!(Usage, "a profile of more models or runs than modelfs writes");
        }
        Ok(Profile { loads: form.models })
    }

    /// The profile's text; the loads that were recorded last stay when all do not fit.
    pub fn text(&self) -> Vec<u8> {
        let from = self.loads.len().saturating_sub(MODELS_MAX);
        let mut form = Form { modelfs_profile: VERSION, models: self.loads[from..].to_vec() };
        loop {
            let text = serde_json::to_vec(&form).expect("numbers and strings are always JSON");
            if text.len() as u64 <= PROFILE_BYTES_MAX {
                return text;
            }
            form.models.remove(0);
        }
    }

    pub fn load_of(&self, name: &str) -> Option<&Load> {
        self.loads.iter().rev().find(|load| load.name == name)
    }

    /// Takes in what was recorded now. A load of the same version that saw less than half of the one before it was no
    /// load (somebody looked at a head), and changes nothing.
    pub fn merge(&mut self, recorded: Load) {
        if recorded.runs.is_empty() {
            return;
        }
        let slighter = |old: &Load| old.manifest == recorded.manifest && recorded.units() * 2 < old.units();
        if self.load_of(&recorded.name).is_some_and(slighter) {
            return;
        }
        self.loads.retain(|load| load.name != recorded.name);
        self.loads.push(recorded);
    }
}

/// First touches of one model.
#[derive(Debug, Default)]
struct Touches {
    seen: HashSet<(u32, u32)>,
    runs: Vec<Run>,
    last_ms: u32,
}

impl Touches {
    fn touch(&mut self, file: u32, units: Range<u32>, now_ms: u32) {
        for unit in units {
            if self.seen.len() == UNITS_MAX || !self.seen.insert((file, unit)) {
                continue;
            }
            let room = self.runs.len() < RUNS_MAX;
            match self.runs.last_mut() {
                Some(run) if run.file == file && run.first + run.units == unit => run.units += 1,
                _ if !room => {}
                _ => {
                    let gap_ms = now_ms.saturating_sub(self.last_ms);
                    self.runs.push(Run { file, first: unit, units: 1, gap_ms });
                    self.last_ms = now_ms;
                }
            }
        }
    }
}

/// Writes down in which order the chunks of a mount's models are first wanted.
#[derive(Debug)]
pub struct Recorder {
    started: Instant,
    /// By the model's number in this mount.
    models: Mutex<HashMap<u32, Touches>>,
    changed: AtomicBool,
}

impl Default for Recorder {
    fn default() -> Self {
        Recorder { started: Instant::now(), models: Mutex::default(), changed: AtomicBool::new(false) }
    }
}

impl Recorder {
    /// Plain bytes `range` of `file` of model number `model` were wanted.
    pub fn touch(&self, model: u32, file: u32, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let now_ms = u32::try_from(self.started.elapsed().as_millis()).unwrap_or(u32::MAX);
        let unit = |at: u64| u32::try_from(at / UNIT_BYTES).unwrap_or(u32::MAX - 1);
        let mut models = self.models.lock().expect("a thread died holding the recorder");
        models.entry(model).or_default().touch(file, unit(range.start)..unit(range.end - 1) + 1, now_ms);
        self.changed.store(true, Ordering::Relaxed);
    }

    /// Whether anything was touched since the last time this was asked.
    pub fn take_changed(&self) -> bool {
        self.changed.swap(false, Ordering::Relaxed)
    }

    /// What was recorded of model number `model`; `path` names its files.
    pub fn load(&self, model: u32, name: &str, manifest: &str, path: impl Fn(u32) -> String) -> Load {
        let models = self.models.lock().expect("a thread died holding the recorder");
        let runs = models.get(&model).map(|touches| touches.runs.clone()).unwrap_or_default();
        drop(models);
        let mut files: Vec<u32> = Vec::new();
        let mut places: HashMap<u32, u32> = HashMap::new();
        let runs = runs
            .into_iter()
            .map(|run| {
                let place = *places.entry(run.file).or_insert_with(|| {
                    files.push(run.file);
                    files.len() as u32 - 1
                });
                Run { file: place, ..run }
            })
            .collect();
        let files = files.into_iter().map(path).collect();
        Load { name: name.to_owned(), manifest: manifest.to_owned(), files, runs }
    }
}

/// The file that a profile lives in.
#[derive(Debug)]
pub struct ProfileFile {
    path: PathBuf,
    /// It holds something that is not ours to overwrite.
    foreign: bool,
}

impl ProfileFile {
    /// Reads the profile; one that is missing is empty, one that cannot be used is reported, left alone and empty.
    pub fn open(path: &Path) -> (ProfileFile, Profile) {
        let mut file = ProfileFile { path: path.to_owned(), foreign: false };
        match read_bounded(path).and_then(|text| text.map_or(Ok(Profile::default()), |text| Profile::parse(&text))) {
            Ok(profile) => (file, profile),
            Err(error) => {
                tracing::warn!(
                    "profile {} is ignored and left as it is ({}); remove it to start a new one",
                    path.display(),
                    error.chain()
                );
                file.foreign = true;
                (file, Profile::default())
            }
        }
    }

    /// Replaces the file at once or not at all; mode 0600. Does nothing to a file that is not ours.
    ///
    /// # Errors
    /// `HOST` if it cannot be written.
    pub fn replace(&self, profile: &Profile) -> Result<()> {
        if self.foreign {
            return Ok(());
        }
        let fault = |e| Error::new(Code::Host, format!("cannot write profile {}", self.path.display())).with_source(e);
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let aside = self.path.with_file_name(name);
        // Left over from a process of this number that was killed.
        match std::fs::remove_file(&aside) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(fault(e)),
        }
        let write = || {
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&aside)?;
            file.write_all(&profile.text())?;
            file.sync_all()?;
            std::fs::rename(&aside, &self.path)
        };
        write().map_err(|e| {
            // What is left of a failed write is of no use; that it stays is no new failure.
            let _ = std::fs::remove_file(&aside);
            fault(e)
        })
    }
}

/// The whole of a regular file within the bound; `None` if there is none, or an empty one.
fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>> {
    let fault = |e| Error::new(Code::Host, "cannot read it").with_source(e);
    // A FIFO would make the mount wait.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fault(e)),
    };
    if !file.metadata().map_err(fault)?.is_file() {
        refuse!(Usage, "it is not a regular file");
    }
    let mut text = Vec::new();
    file.take(PROFILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(fault)?;
    Ok((!text.is_empty()).then_some(text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn known(sizes: &[(&str, u64)]) -> impl Fn(&str) -> Option<KnownFile> {
        let sizes: Vec<(String, u64)> = sizes.iter().map(|(path, size)| ((*path).to_owned(), *size)).collect();
        move |path| {
            let at = sizes.iter().position(|(known, _)| known == path)?;
            Some(KnownFile { file: at as u32, size: sizes[at].1 })
        }
    }

    fn load(manifest: &str, runs: &[(u32, u32, u32, u32)]) -> Load {
        Load {
            name: "m".into(),
            manifest: manifest.into(),
            files: vec!["a".into(), "b".into()],
            runs: runs.iter().map(|&run| run.into()).collect(),
        }
    }

    #[test]
    fn what_was_touched_first_is_told_first_and_once() {
        let recorder = Recorder::default();
        let at = |unit: u64| unit * UNIT_BYTES..unit * UNIT_BYTES + 1;
        for (file, unit) in [(5, 3), (5, 3), (2, 0), (5, 4), (5, 3), (5, 5), (2, 1)] {
            recorder.touch(9, file, at(unit));
        }
        recorder.touch(9, 2, 0..3 * UNIT_BYTES);
        assert!(recorder.take_changed() && !recorder.take_changed());
        let load = recorder.load(9, "m", "d", |file| format!("f{file}"));
        assert_eq!(load.files, ["f5", "f2"]);
        let runs: Vec<_> = load.runs.iter().map(|run| (run.file, run.first, run.units)).collect();
        assert_eq!(runs, [(0, 3, 1), (1, 0, 1), (0, 4, 2), (1, 1, 2)]);
        assert_eq!(recorder.load(1, "other", "d", |_| unreachable!()).runs, []);
    }

    #[test]
    fn a_replay_names_what_still_exists_in_order_and_once() {
        let load = load("d", &[(1, 2, 2, 0), (0, 0, 1, 5), (1, 0, u32::MAX, 0), (7, 0, 1, 0), (0, 9, 1, 0)]);
        let ranges = load.ranges(known(&[("b", 3 * UNIT_BYTES + 5), ("x", 1), ("a", 10)]));
        let unit = UNIT_BYTES;
        assert_eq!(ranges, [(0, 2 * unit..3 * unit + 5), (2, 0..10), (0, 0..2 * unit)]);
        assert_eq!(load.whole_files(known(&[("b", 3 * unit + 5), ("a", 2 * unit)])), HashSet::from([0]));
        assert_eq!(load.ranges(known(&[])), []);
    }

    #[test]
    fn a_profile_reads_as_it_was_written() {
        let profile = Profile { loads: vec![load("d", &[(1, 2, 3, 40)])] };
        let text = profile.text();
        assert_eq!(Profile::parse(&text).expect("own text"), profile);
        assert!(text.starts_with(br#"{"modelfs_profile":1,"models":[{"name":"m","manifest":"d","files":["a","b"],"#));
    }

    #[test]
    fn what_is_not_a_profile_is_refused() {
        let run = r#"{"modelfs_profile":1,"models":[{"name":"m","manifest":"d","files":["a"],"runs":[RUN]}]}"#;
        for text in [
            "".to_owned(),
            "{}".to_owned(),
            "[]".to_owned(),
            r#"{"modelfs_profile":2,"models":[]}"#.to_owned(),
            r#"{"modelfs_profile":1}"#.to_owned(),
            run.replace("RUN", "[0,0,-1,0]"),
            run.replace("RUN", "[0,0,4294967296,0]"),
            run.replace("RUN", "[0,0,1]"),
            run.replace("RUN", &vec!["[0,0,1,0]"; RUNS_MAX + 1].join(",")),
            " ".repeat(PROFILE_BYTES_MAX as usize + 1),
            "[".repeat(100_000),
        ] {
            assert_eq!(Profile::parse(text.as_bytes()).expect_err("refused").code(), Code::Usage);
        }
        Profile::parse(run.replace("RUN", "[9,4294967295,4294967295,0]").as_bytes()).expect("odd, but harmless");
    }

    #[test]
    fn a_look_does_not_replace_a_load_but_a_new_version_does() {
        let full = load("d", &[(0, 0, 100, 0)]);
        let mut profile = Profile { loads: vec![full.clone()] };
        profile.merge(load("d", &[(1, 0, 1, 0)]));
        profile.merge(load("d", &[]));
        assert_eq!(profile.loads, [full]);
        let other_order = load("d", &[(0, 50, 50, 0)]);
        profile.merge(other_order.clone());
        assert_eq!(profile.loads, [other_order]);
        let newer = load("e", &[(1, 0, 1, 0)]);
        profile.merge(newer.clone());
        assert_eq!(profile.loads, [newer]);
    }

    #[test]
    fn a_profile_file_is_private_and_replaced_and_a_foreign_one_is_left_alone() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("p.json");
        let (file, empty) = ProfileFile::open(&path);
        assert_eq!(empty, Profile::default());
        let profile = Profile { loads: vec![load("d", &[(0, 0, 1, 0)])] };
        file.replace(&Profile::default()).expect("written");
        file.replace(&profile).expect("written again");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(ProfileFile::open(&path).1, profile);
        assert_eq!(std::fs::read_dir(folder.path()).expect("list").count(), 1, "nothing is left beside it");

        let foreign = folder.path().join("notes.json");
        std::fs::write(&foreign, "{\"mine\": 1}").expect("written");
        let (file, empty) = ProfileFile::open(&foreign);
        assert_eq!(empty, Profile::default());
        file.replace(&profile).expect("does nothing");
        assert_eq!(std::fs::read(&foreign).expect("there"), b"{\"mine\": 1}");
        // A folder, and a FIFO that nobody writes to, end at once as well.
        assert_eq!(ProfileFile::open(folder.path()).1, Profile::default());
    }

    /// splitmix64.
    fn next(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ (z >> 31)
    }

    #[test]
    fn any_order_of_touches_is_replayed_as_it_was_and_any_edit_of_it_is_harmless() {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let from_env = std::env::var("MODELFS_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = from_env.unwrap_or(clock.as_nanos() as u64);
        println!("MODELFS_TEST_SEED={seed}");
        let mut state = seed;
        let sizes = [3 * UNIT_BYTES, 1, UNIT_BYTES + 1, 40 * UNIT_BYTES];
        let names = ["a", "b", "c", "d"];
        let now: Vec<(&str, u64)> = names.into_iter().zip(sizes).collect();
        let (mut good, mut refused) = (0, 0);
        for case in 0..2_000 {
            let recorder = Recorder::default();
            let mut wanted: Vec<(u32, u64)> = Vec::new();
            for _ in 0..next(&mut state) % 60 {
                let file = (next(&mut state) % 4) as u32;
                let unit = next(&mut state) % u64::from(units_of(sizes[file as usize]));
                recorder.touch(0, file, unit * UNIT_BYTES..unit * UNIT_BYTES + 1);
                if !wanted.contains(&(file, unit)) {
                    wanted.push((file, unit));
                }
            }
            let mut profile = Profile::default();
            profile.merge(recorder.load(0, "m", "d", |file| names[file as usize].to_owned()));
            let text = profile.text();
            let read = Profile::parse(&text).expect("own text");
            let replayed: Vec<(u32, u64)> = read.load_of("m").map_or(Vec::new(), |load| {
                let ranges = load.ranges(known(&now));
                let units = |(file, range): (u32, Range<u64>)| {
                    (range.start / UNIT_BYTES..range.end.div_ceil(UNIT_BYTES)).map(move |unit| (file, unit))
                };
                ranges.into_iter().flat_map(units).collect()
            });
            assert_eq!(replayed, wanted, "case {case}");

            let mut edited = text;
            for _ in 0..=next(&mut state) % 3 {
                let at = next(&mut state) as usize % edited.len();
                edited[at] = b"0123456789,[]\"a"[next(&mut state) as usize % 15];
            }
            let Ok(profile) = Profile::parse(&edited) else {
                refused += 1;
                continue;
            };
            good += 1;
            for load in &profile.loads {
                for (file, range) in load.ranges(known(&now)) {
                    assert!(range.start < range.end && range.end <= sizes[file as usize], "case {case}");
                }
            }
        }
        assert!(good > 50 && refused > 50, "the edits prove nothing: {good} good, {refused} refused");
    }
}
