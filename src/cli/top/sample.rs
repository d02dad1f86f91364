//! What a mount said at one moment, and what two moments mean per second.
//!
//! In: a mount that answers its control socket. Out: [`Sample`]s, [`Maps`], [`Rates`].
//! Promises: a number that a daemon does not tell counts as nothing; a daemon that began anew between two samples has no
//! negative rates.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Step;
use super::paint::Room;
use crate::control::{self, FileMap, FileRow, MapRequest, Request};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// A daemon answers from memory: longer means that it hangs.
const WAIT: Duration = Duration::from_secs(5);

/// Files asked for at once while one is looked for by its path.
const SEARCH_ROWS: usize = 512;

/// A mount that can be asked.
pub struct Mount {
    mountpoint: PathBuf,
    /// `None`: where that of the mountpoint is.
    socket: Option<PathBuf>,
}

impl Mount {
    fn ask(&self, request: Request) -> Result<Value> {
        match &self.socket {
            Some(socket) => control::ask_at(socket, request, WAIT),
            None => control::ask(&self.mountpoint, request, WAIT),
        }
    }

    fn map(&self, asked: MapRequest) -> Result<FileMap> {
        read(self.ask(Request::Map(asked))?)
    }
}

/// The mount that was named, or all of this user that answer.
///
/// # Errors
/// `NOT_MOUNTED` if there is none.
pub fn mounts(mountpoint: Option<&Path>) -> Result<Vec<Mount>> {
    if let Some(mountpoint) = mountpoint {
        return Ok(vec![Mount { mountpoint: mountpoint.to_owned(), socket: None }]);
    }
    let answering = control::list_mounts(WAIT)?.into_iter().filter(|mount| mount.status.is_ok());
    let mounts: Vec<Mount> =
        answering.map(|mount| Mount { mountpoint: PathBuf::new(), socket: Some(mount.socket) }).collect();
    if mounts.is_empty() {
        refuse!(NotMounted, "no modelfs mount of this user answers; `modelfs mount` makes one");
    }
    Ok(mounts)
}

/// A version as `status` tells of it.
#[derive(Debug, Clone, Deserialize)]
pub struct ModelRow {
    pub name: String,
    pub version: u64,
    pub current: bool,
    pub bytes: u64,
    pub locked: bool,
    pub resident_bytes: u64,
}

impl ModelRow {
    pub fn is_named(&self, name: &str) -> bool {
        (self.current && self.name == name) || self.key() == name
    }

    /// The one name of this version.
    pub fn key(&self) -> String {
        format!("{}@{}", self.name, self.version)
    }
}

/// What a mount said of itself.
#[derive(Clone)]
pub struct Sample {
    pub at: Instant,
    pub status: Value,
    models: Vec<ModelRow>,
}

impl Sample {
    pub fn take(mount: &Mount) -> Result<Sample> {
        let status = mount.ask(Request::Status)?;
        Sample::of(status, Instant::now())
    }

    pub fn of(status: Value, at: Instant) -> Result<Sample> {
        let models = read(status["models"].clone())?;
        Ok(Sample { at, status, models })
    }

    pub fn models(&self) -> &[ModelRow] {
        &self.models
    }

    /// A number of the status, by its JSON pointer.
    pub fn number(&self, pointer: &str) -> f64 {
        self.status.pointer(pointer).and_then(Value::as_f64).unwrap_or(0.0)
    }

    pub fn count(&self, pointer: &str) -> u64 {
        self.status.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
    }

    pub fn text(&self, pointer: &str) -> &str {
        self.status.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// A counter of the mount's process.
    pub fn metric(&self, name: &str) -> u64 {
        self.count(&format!("/metrics/{name}"))
    }
}

/// What happened between two samples, per second. Through the daemon: reads that the kernel serves by itself cost it
/// nothing, and it does not see them.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Rates {
    pub seconds: f64,
    pub fetched_bytes: f64,
    pub fetches: f64,
    /// From the request to the last byte, on average.
    pub fetch_seconds: Option<f64>,
    pub read_bytes: f64,
    pub reads: f64,
    /// Reads that had to wait for a chunk.
    pub waits: f64,
    /// Of the reads in this time, those answered from memory at once; `None` if there were none.
    pub hit_rate: Option<f64>,
    pub evicted_bytes: f64,
}

impl Rates {
    pub fn between(before: &Sample, now: &Sample) -> Rates {
        let seconds = now.at.saturating_duration_since(before.at).as_secs_f64();
        let grown = |name: &str| {
            let pointer = format!("/metrics/{name}");
            (now.number(&pointer) - before.number(&pointer)).max(0.0)
        };
        let rate = |name: &str| if seconds > 0.0 { grown(name) / seconds } else { 0.0 };
        let share = |part: f64, all: f64| (all > 0.0).then(|| part / all);
        let hits = grown("cache_hits");
        Rates {
            seconds,
            fetched_bytes: rate("fetch_bytes"),
            fetches: rate("fetch_requests"),
            fetch_seconds: share(grown("fetch_seconds"), grown("fetch_requests")),
            read_bytes: rate("read_bytes"),
            reads: rate("reads"),
            waits: rate("cache_misses"),
            hit_rate: share(hits, hits + grown("cache_misses")),
            evicted_bytes: rate("evicted_bytes"),
        }
    }
}

/// Which mount, version and file is looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    pub mount: usize,
    pub model: usize,
    pub file: usize,
}

impl Choice {
    pub(super) fn step_model(&mut self, step: Step, count: usize) {
        let before = self.model;
        self.model = step.from(self.model, 1, count);
        if self.model == before && count > 0 {
            // Round and round: there is one key for it.
            self.model = if step == Step::Next { 0 } else { count - 1 };
        }
        if self.model != before {
            self.file = 0;
        }
    }

    pub(super) fn step_file(&mut self, step: Step, page: usize, count: usize) {
        self.file = step.from(self.file, page, count);
    }
}

/// The files that a frame shows.
#[derive(Debug, Clone, Default)]
pub struct Maps {
    pub list: FileMap,
    /// The one that is chosen, in more cells.
    pub chosen: Option<FileRow>,
}

impl Maps {
    /// Asks for as much as there is room for. A choice beyond what there is becomes the last one.
    pub fn take(mount: &Mount, sample: &Sample, choice: &mut Choice, room: &Room) -> Result<Maps> {
        choice.model = choice.model.min(sample.models().len().saturating_sub(1));
        let Some(model) = sample.models().get(choice.model) else { return Ok(Maps::default()) };
        let rows = room.files.max(1);
        let ask = |from, rows, cells| mount.map(MapRequest { model: Some(model.key()), from, rows, cells });
        let page_of = |file: usize| file - file % rows;
        let mut list = ask(page_of(choice.file), rows, room.file_cells)?;
        if choice.file >= list.files {
            choice.file = list.files.saturating_sub(1);
            list = ask(page_of(choice.file), rows, room.file_cells)?;
        }
        let chosen = ask(choice.file, 1, room.given(list.files).map_cells)?.rows.pop();
        Ok(Maps { list, chosen })
    }
}

/// The number of a file of a model, by its path.
pub fn find_file(mount: &Mount, sample: &Sample, model: usize, path: &str) -> Result<usize> {
    let Some(model) = sample.models().get(model) else { refuse!(NotFound, "the mount shows no model") };
    let mut from = 0;
    loop {
        let page = mount.map(MapRequest { model: Some(model.key()), from, rows: SEARCH_ROWS, cells: 1 })?;
        if let Some(at) = page.rows.iter().position(|row| row.path == path) {
            return Ok(from + at);
        }
        from += page.rows.len();
        if page.rows.is_empty() || from >= page.files {
            refuse!(NotFound, "{} has no file {path}; `modelfs ls` lists its files", model.key());
        }
    }
}

/// The one sample that `--json` prints.
pub fn to_json(sample: &Sample, maps: &Maps, rates: &Rates) -> Value {
    json!({
        "mountpoint": sample.status["mountpoint"],
        "rates": rates,
        "map": maps.list,
        "file": maps.chosen,
        "status": sample.status,
    })
}

fn read<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| {
        Error::new(Code::Host, "the mount's answer is not one this version understands; is its daemon another version?")
            .with_source(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, metrics: Value) -> Sample {
        Sample::of(json!({"models": [], "metrics": metrics}), at).expect("a status")
    }

    #[test]
    fn rates_are_what_grew_over_the_time_it_took() {
        let then = Instant::now();
        let before =
            sample(then, json!({"fetch_bytes": 1000, "fetch_requests": 1, "fetch_seconds": 0.5, "cache_hits": 10}));
        let now = sample(
            then + Duration::from_secs(2),
            json!({"fetch_bytes": 5000, "fetch_requests": 5, "fetch_seconds": 1.5, "cache_hits": 40, "cache_misses": 10}),
        );
        let rates = Rates::between(&before, &now);
        assert_eq!((rates.seconds, rates.fetched_bytes, rates.fetches), (2.0, 2000.0, 2.0));
        assert_eq!((rates.fetch_seconds, rates.waits, rates.hit_rate), (Some(0.25), 5.0, Some(0.75)));
    }

    #[test]
    fn a_daemon_that_began_anew_and_a_moment_without_reads_have_no_rates() {
        let then = Instant::now();
        let before = sample(then, json!({"fetch_bytes": 1000, "cache_hits": 5}));
        let now = sample(then + Duration::from_secs(1), json!({"fetch_bytes": 10}));
        assert_eq!(Rates::between(&before, &now), Rates { seconds: 1.0, ..Rates::default() });
        assert_eq!(Rates::between(&now, &now), Rates::default());
    }

    #[test]
    fn models_are_stepped_through_in_a_circle_and_each_begins_with_its_first_file() {
        let mut choice = Choice { mount: 0, model: 1, file: 7 };
        choice.step_model(Step::Next, 3);
        assert_eq!(choice, Choice { mount: 0, model: 2, file: 0 });
        choice.step_model(Step::Next, 3);
        assert_eq!(choice.model, 0);
        choice.step_model(Step::Previous, 3);
        assert_eq!(choice.model, 2);
        choice.file = 4;
        choice.step_model(Step::Next, 0);
        choice.step_model(Step::Next, 1);
        assert_eq!(choice.model, 0);
    }
}
