//! `modelfs verify`: everything that can be checked of one version, and every fault found, not only the first.
//!
//! The hashes of chunks are in the encrypted part of the manifest, so without a key only what is in clear can be
//! checked; the output says which of the two it was.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use futures::stream::{self, StreamExt, TryStreamExt};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;

use super::access::{Opened, Reading, reading, runtime};
use super::out::printable;
use super::plain::{self, ChunkJob};
use super::{AccessArgs, Out, oms};
use crate::config::{self, Layers};
use crate::crypto::FileHasher;
use crate::error::{Class, Code, Error, Result};
use crate::format::{Manifest, ModelId, OBJECT_HEADER_LEN, ObjectHeader, Oid, names};
use crate::keys::Resolved;
use crate::oms::{BUNDLE_NAME, Vouched};
use crate::refuse;
use crate::store::ChunkSource;
use crate::units::{show_rate, show_size};

/// Check a stored version; list every fault, end with 20 if there is one.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct VerifyArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME, NAME@TAG or NAME@VERSION
    model: String,
    #[command(flatten)]
    access: AccessArgs,
    /// Check the OpenSSF model-signing bundle in the model too [default path: model.sig]
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true, default_missing_value = BUNDLE_NAME,
          requires = "oms_key")]
    oms: Option<String>,
    /// The public key in PEM that signed the bundle
    #[arg(long, value_name = "PATH", requires = "oms")]
    oms_key: Option<PathBuf>,
    /// Start over, even if an earlier run was cut off
    #[arg(long)]
    no_resume: bool,
}

const EXAMPLES: &str = "\
Examples:
  modelfs verify s3://models/prod acme/llama --trust signing.pub --key file:llama.key
  modelfs verify s3://models/prod acme/llama@3 --trust signing.pub   without a key: see below
  modelfs verify /srv/models acme/llama --trust signing.pub --key file:k --oms \\
      --oms-key vendor.pem
  modelfs verify /srv/models acme/llama --trust signing.pub --key file:k --json | jq '.faults[]'

With a key: signatures, digest and slots; the length and header of every object; the hash and tags of every chunk; \
the SHA-256 of every file. A run that was cut off goes on where it was, file by file.
Without a key: signatures, digest and slots; and of every data object of the model (all versions) that its header is \
one and its length possible. Chunk hashes and file names are encrypted, so changed bytes are NOT found without a key.";

/// Requests for sizes and headers in flight.
const LOOKS_IN_FLIGHT: usize = 16;
/// Chunks in memory for each run of files.
const CHUNKS_AHEAD: usize = 3;
/// Runs of files at once, at most; each is hashed by one core.
const RUNS_MAX: usize = 8;
/// An older note of progress says nothing about the store of today.
const PROGRESS_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Fault {
    code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<Oid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk: Option<u32>,
    /// What of the model it spoils.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<String>,
    message: String,
}

pub fn run(args: &VerifyArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let reading = reading(&args.store, &layers)?;
    let runtime = runtime()?;
    let resolved = runtime.block_on(reading.resolve(&args.model))?;
    let from = Instant::now();
    let mut vouched = None;
    let (faults, checked) = if reading.access.keys.is_empty() {
        if args.oms.is_some() {
            refuse!(Usage, "--oms compares the hashes of files, which are encrypted; give --key");
        }
        runtime.block_on(without_key(&reading, &resolved))?
    } else {
        let opened = Opened::unlock(&reading, &resolved)?;
        let notes = Notes::open(&reading.url.to_string(), &resolved, args.no_resume);
        let (mut faults, checked) = runtime.block_on(with_key(&reading, &opened, &notes, out))?;
        if let (Some(path), Some(key)) = (&args.oms, &args.oms_key) {
            match runtime.block_on(oms::check(&reading, &opened, path, key)) {
                Ok(good) => vouched = Some(good),
                Err(e) if e.class() == Class::Tampered => faults.push(Fault {
                    code: e.code().name(),
                    object: None,
                    chunk: None,
                    files: Vec::new(),
                    message: e.chain(),
                }),
                Err(e) => return Err(e),
            }
        }
        (faults, checked)
    };
    report(out, &reading, &resolved, &faults, (&checked, vouched.as_ref()), from.elapsed())?;
    conclusion(&resolved, &faults)
}

/// What was looked at.
#[derive(Debug, Default, Serialize)]
struct Checked {
    with_key: bool,
    objects: usize,
    chunks: u64,
    files: usize,
    bytes: u64,
    /// Files that an earlier run of today had finished.
    files_resumed: usize,
}

fn report(
    out: &Out,
    reading: &Reading,
    resolved: &Resolved,
    faults: &[Fault],
    (checked, vouched): (&Checked, Option<&Vouched>),
    took: Duration,
) -> Result<()> {
    let mut value = json!({
        "store": reading.url.to_string(), "name": resolved.name, "version": resolved.header.seq,
        "manifest": format!("sha256:{}", resolved.digest), "checked": checked, "faults": faults,
        "ok": faults.is_empty(), "seconds": took.as_secs_f64(),
    });
    if let Some(vouched) = vouched {
        value["oms"] = serde_json::to_value(vouched).expect("plain values are JSON");
    }
    out.result(&value, || {
        let mut text = String::new();
        if let Some(Vouched { signer, name, files, unsigned }) = vouched {
            text.push_str(&format!("OpenSSF bundle: {files} files of {:?}, signed by the {signer}", printable(name)));
            if !unsigned.is_empty() {
                text.push_str(&format!("; left out by the signer: {}", printable(&unsigned.join(", "))));
            }
            text.push('\n');
        }
        for fault in faults {
            text.push_str(&format!("{}: {}", fault.code, printable(&fault.message)));
            if !fault.files.is_empty() {
                text.push_str(&format!(" (spoils {})", printable(&fault.files.join(", "))));
            }
            text.push('\n');
        }
        let name = printable(&resolved.name);
        let version = resolved.header.seq;
        if checked.with_key {
            text.push_str(&format!(
                "{name} version {version}: {} files, {} chunks, {} objects, {} read in {:.1} s ({})",
                checked.files,
                checked.chunks,
                checked.objects,
                show_size(checked.bytes),
                took.as_secs_f64(),
                show_rate(checked.bytes, took),
            ));
            if checked.files_resumed > 0 {
                text.push_str(&format!("; {} files were checked by an earlier run", checked.files_resumed));
            }
        } else {
            text.push_str(&format!(
                "{name} version {version}: signatures, digest and slots hold; {} objects have a header and a possible \
                 length; chunk hashes need a key: NOT checked",
                checked.objects
            ));
        }
        text.push_str(match (faults.is_empty(), checked.with_key) {
            (true, true) => "; all good\n",
            (true, false) => "; nothing wrong in what could be checked\n",
            (false, _) => "\n",
        });
        text
    })
}

fn conclusion(resolved: &Resolved, faults: &[Fault]) -> Result<()> {
    let Some(first) = faults.first() else { return Ok(()) };
    let code = crate::control::code_named(first.code);
    let count = if faults.len() == 1 { "1 fault".to_string() } else { format!("{} faults", faults.len()) };
    Err(Error::new(code, format!("{} version {} has {}, listed above", resolved.name, resolved.header.seq, count)))
}

/// Faults of the store's bytes are collected; a store that does not answer ends the run.
fn as_fault(e: &Error, object: Oid, chunk: Option<u32>, files: Vec<String>) -> Option<Fault> {
    let code = match e.class() {
        Class::Tampered => e.code(),
        Class::NotFound => Code::Length,
        Class::Changed
        | Class::Unreachable
        | Class::NoRoom
        | Class::Held
        | Class::Usage
        | Class::Denied
        | Class::Insecure
        | Class::Host => return None,
    };
    // A missing object is one fault, however many of its chunks were asked for.
    let (chunk, message) = match e.class() {
        Class::NotFound => (None, format!("object {object} is missing")),
        _ => (chunk, e.chain()),
    };
    Some(Fault { code: code.name(), object: Some(object), chunk, files, message })
}

// ---- without a key ----

async fn without_key(reading: &Reading, resolved: &Resolved) -> Result<(Vec<Fault>, Checked)> {
    let source = &*reading.store;
    let listed = source.list(&names::data_dir(resolved.model_id)).await?;
    let checks: Vec<Option<Fault>> = stream::iter(&listed)
        .map(|object| async move {
            let Some(oid) = names::oid(&object.name) else { return Ok(None) };
            match look_without_key(source, &object.name, object.size, oid).await {
                Ok(()) => Ok(None),
                Err(e) => as_fault(&e, oid, None, Vec::new()).map(Some).ok_or(e),
            }
        })
        .buffer_unordered(LOOKS_IN_FLIGHT)
        .try_collect()
        .await?;
    let checked = Checked { objects: listed.len(), ..Checked::default() };
    Ok((checks.into_iter().flatten().collect(), checked))
}

async fn look_without_key(source: &dyn ChunkSource, name: &str, size: u64, oid: Oid) -> Result<()> {
    let bytes = source.read_range(name, 0..OBJECT_HEADER_LEN as u64).await?.concat();
    let header = ObjectHeader::parse(&bytes).map_err(|e| header_fault(oid, Some(e)))?;
    if header.oid != oid {
        return Err(header_fault(oid, None));
    }
    if !possible_length(size, header.block_log2) {
        return Err(Error::new(Code::Length, format!("object {oid} has {size} bytes, which no object has")));
    }
    Ok(())
}

fn header_fault(oid: Oid, cause: Option<Error>) -> Error {
    let fault = Error::new(Code::Header, format!("object {oid} does not begin with its header"));
    match cause {
        Some(cause) => fault.with_source(cause),
        None => fault,
    }
}

/// 128 bytes, then blocks with a tag each, of which the last may be short but not empty.
fn possible_length(stored: u64, block_log2: u8) -> bool {
    let Some(body) = stored.checked_sub(OBJECT_HEADER_LEN as u64).filter(|body| *body > 0) else { return false };
    let rest = body % ((1 << block_log2) + 16);
    rest == 0 || rest > 16
}

// ---- with a key ----

async fn with_key(reading: &Reading, opened: &Opened, notes: &Notes, out: &Out) -> Result<(Vec<Fault>, Checked)> {
    let manifest = &opened.manifest;
    let mut faults = look_at_objects(reading, manifest).await?;
    let skip = notes.done();
    let runs = runs(manifest, &skip);
    let plain: u64 = runs.iter().flat_map(|run| &run.jobs).map(|job| chunk_len(manifest, job)).sum();
    let bar = out.progress(plain, "verify");
    let chunks: u64 = runs.iter().map(|run| run.jobs.len() as u64).sum();
    let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, RUNS_MAX);
    let found: Vec<Vec<Fault>> = stream::iter(runs)
        .map(|run| check_run(reading, opened, run, notes, &bar))
        .buffer_unordered(workers)
        .try_collect()
        .await?;
    bar.finish_and_clear();
    faults.extend(found.into_iter().flatten());
    // Whatever it found, this run is over: the next one looks at everything again.
    notes.remove();
    let checked = Checked {
        with_key: true,
        objects: manifest.objects().len(),
        chunks,
        files: manifest.files().len(),
        bytes: plain,
        files_resumed: skip.len(),
    };
    Ok((merged(faults), checked))
}

/// In the order of objects and chunks; what was found twice stands once, with all the files it spoils.
fn merged(mut faults: Vec<Fault>) -> Vec<Fault> {
    faults.sort_by(|a, b| (a.object, a.chunk, &a.message).cmp(&(b.object, b.chunk, &b.message)));
    let mut out: Vec<Fault> = Vec::with_capacity(faults.len());
    for fault in faults {
        match out.last_mut() {
            Some(last) if last.object == fault.object && last.message == fault.message => {
                last.files.extend(fault.files);
                last.files.sort();
                last.files.dedup();
            }
            _ => out.push(fault),
        }
    }
    out
}

/// Length (bytes behind the end too, which no read would ever see) and the clear header of every object.
async fn look_at_objects(reading: &Reading, manifest: &Manifest) -> Result<Vec<Fault>> {
    let source = &*reading.store;
    let model = manifest.header().model_id;
    let found: Vec<Vec<Fault>> = stream::iter(manifest.objects())
        .map(|entry| async move {
            let name = names::data(model, entry.oid);
            let mut faults = Vec::new();
            let mut note =
                |e: Error| as_fault(&e, entry.oid, None, Vec::new()).map(|fault| faults.push(fault)).ok_or(e);
            match source.size(&name).await {
                Ok(size) if size == entry.stored_len() => {}
                Ok(size) => note(Error::new(
                    Code::Length,
                    format!("object {} has {size} bytes instead of {}", entry.oid, entry.stored_len()),
                ))?,
                Err(e) => {
                    note(e)?;
                    return Ok(faults);
                }
            }
            match source.read_range(&name, 0..OBJECT_HEADER_LEN as u64).await {
                Ok(pieces) if pieces.concat() == entry.header().encode() => {}
                Ok(_) => note(header_fault(entry.oid, None))?,
                Err(e) => note(e)?,
            }
            Ok::<_, Error>(faults)
        })
        .buffer_unordered(LOOKS_IN_FLIGHT)
        .try_collect()
        .await?;
    Ok(found.into_iter().flatten().collect())
}

/// Files that share objects, checked one after the other; or chunks that no file covers.
struct Run {
    files: Vec<usize>,
    jobs: Vec<ChunkJob>,
}

/// Every chunk of every object, and every file but those in `skip`, divided among runs. Pure.
fn runs(manifest: &Manifest, skip: &BTreeSet<usize>) -> Vec<Run> {
    let first = |number: usize| {
        let extents = manifest.extents(&manifest.files()[number]);
        extents.first().map_or((u32::MAX, 0), |extent| (extent.object, extent.object_offset))
    };
    let mut by_object: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    let mut order: Vec<usize> = (0..manifest.files().len()).collect();
    order.sort_by_key(|number| first(*number));
    for number in &order {
        by_object.entry(first(*number).0).or_default().push(*number);
    }
    let mut covered: BTreeSet<(u32, u32)> = BTreeSet::new();
    let mut runs = Vec::new();
    for files in by_object.into_values() {
        covered.extend(plain::jobs(manifest, &files).iter().map(|job| (job.object, job.index.0)));
        let files: Vec<usize> = files.into_iter().filter(|number| !skip.contains(number)).collect();
        let jobs = plain::jobs(manifest, &files);
        runs.push(Run { files, jobs });
    }
    let mut rest = Vec::new();
    for (object, entry) in manifest.objects().iter().enumerate() {
        let object = u32::try_from(object).expect("at most 1,000,000 objects");
        rest.extend(
            entry.layout.chunks().filter(|index| !covered.contains(&(object, index.0))).map(|index| ChunkJob {
                object,
                index,
                parts: Vec::new(),
            }),
        );
    }
    if !rest.is_empty() {
        runs.push(Run { files: Vec::new(), jobs: rest });
    }
    runs
}

fn chunk_len(manifest: &Manifest, job: &ChunkJob) -> u64 {
    manifest.objects()[job.object as usize].layout.chunk_plain_len(job.index)
}

async fn check_run(
    reading: &Reading,
    opened: &Opened,
    run: Run,
    notes: &Notes,
    bar: &ProgressBar,
) -> Result<Vec<Fault>> {
    let manifest = Arc::clone(&opened.manifest);
    let mut faults = Vec::new();
    let mut files: BTreeMap<usize, FileCheck> = run.files.iter().map(|n| (*n, FileCheck::new(&manifest, *n))).collect();
    for (number, check) in &mut files {
        if manifest.files()[*number].size == 0 {
            faults.extend(check.finish(&manifest, *number, notes));
        }
    }
    plain::each_chunk(reading.store.clone(), opened, run.jobs, CHUNKS_AHEAD, |job, slot| {
        bar.inc(chunk_len(&manifest, &job));
        match slot {
            Ok(slot) => {
                for (number, part) in &job.parts {
                    let check = files.get_mut(number).expect("jobs are made of the run's files");
                    check.take(&slot[part.clone()]);
                    if check.left == 0 {
                        faults.extend(check.finish(&manifest, *number, notes));
                    }
                }
                Ok(())
            }
            Err(e) => {
                let spoiled = job.parts.iter().map(|(number, _)| path(&manifest, *number)).collect();
                let oid = manifest.objects()[job.object as usize].oid;
                let fault = as_fault(&e, oid, Some(job.index.0), spoiled).ok_or(e)?;
                faults.push(fault);
                for (number, _) in &job.parts {
                    files.get_mut(number).expect("jobs are made of the run's files").spoiled = true;
                }
                Ok(())
            }
        }
    })
    .await?;
    Ok(faults)
}

fn path(manifest: &Manifest, number: usize) -> String {
    manifest.path(&manifest.files()[number]).to_string()
}

struct FileCheck {
    hasher: FileHasher,
    left: u64,
    /// A chunk of it is bad and was reported; its SHA-256 would only say so again.
    spoiled: bool,
}

impl FileCheck {
    fn new(manifest: &Manifest, number: usize) -> FileCheck {
        FileCheck { hasher: FileHasher::new(), left: manifest.files()[number].size, spoiled: false }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.left -= bytes.len() as u64;
    }

    fn finish(&mut self, manifest: &Manifest, number: usize, notes: &Notes) -> Option<Fault> {
        if self.spoiled {
            return None;
        }
        let got = std::mem::replace(&mut self.hasher, FileHasher::new()).finish();
        if got == manifest.files()[number].sha256 {
            notes.note(number);
            return None;
        }
        let path = path(manifest, number);
        Some(Fault {
            code: Code::FileHash.name(),
            object: None,
            chunk: None,
            message: format!("file {path} does not have its signed SHA-256"),
            files: vec![path],
        })
    }
}

// ---- going on after a kill ----

/// The numbers of files found good, one a line, in a file of its own for each manifest. Losing it costs time only.
struct Notes {
    path: Option<PathBuf>,
    done: BTreeSet<usize>,
    file: Mutex<Option<std::fs::File>>,
}

impl Notes {
    fn open(store: &str, resolved: &Resolved, start_over: bool) -> Notes {
        let none = Notes { path: None, done: BTreeSet::new(), file: Mutex::new(None) };
        let Some(dir) = config::env_dirs().cache_dir() else { return none };
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        // A copy of the same version on another store is another thing to verify.
        let place = ModelId::of_name(store).to_string();
        let path = dir.join(format!("verify-{}-{}", resolved.digest, &place[..16]));
        if start_over {
            drop(std::fs::remove_file(&path));
        }
        let done = read_notes(&path);
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&path);
        match (made, file) {
            (Ok(()), Ok(file)) => Notes { path: Some(path), done, file: Mutex::new(Some(file)) },
            (_, Err(e)) | (Err(e), _) => {
                tracing::warn!(error = %e, "progress is not kept: {} cannot be written", path.display());
                none
            }
        }
    }

    fn done(&self) -> BTreeSet<usize> {
        self.done.clone()
    }

    fn note(&self, number: usize) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file.as_mut() {
            // One short append: a line is there whole or not at all. One that is lost is checked again.
            let _ = file.write_all(format!("{number}\n").as_bytes());
        }
    }

    fn remove(&self) {
        if let Some(path) = &self.path {
            drop(std::fs::remove_file(path));
        }
    }
}

fn read_notes(path: &std::path::Path) -> BTreeSet<usize> {
    let fresh = std::fs::symlink_metadata(path)
        .and_then(|meta| meta.modified())
        .is_ok_and(|then| then.elapsed().is_ok_and(|age| age < PROGRESS_AGE_MAX));
    if !fresh {
        drop(std::fs::remove_file(path));
        return BTreeSet::new();
    }
    let text = std::fs::read_to_string(path).unwrap_or_default();
    // Without its line end, a last line may be half a number.
    text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_no_object_has_are_known_without_a_key() {
        assert!(possible_length(205_896, 16), "the vector of docs/FORMAT.md");
        for stored in [0, 127, 128, 129, 144, 128 + 65_552 + 16] {
            assert!(!possible_length(stored, 16), "{stored}");
        }
        assert!(possible_length(145, 16) && possible_length(128 + 65_552, 16));
    }

    #[test]
    fn a_fault_found_twice_is_listed_once_with_all_it_spoils() {
        let fault = |file: &str| Fault {
            code: "LENGTH",
            object: Some(Oid([1; 32])),
            chunk: None,
            files: vec![file.into()],
            message: "object is missing".into(),
        };
        let faults = merged(vec![fault("b"), fault("a"), fault("b")]);
        assert_eq!(faults.len(), 1);
        assert_eq!(faults[0].files, ["a", "b"]);
    }

    #[test]
    fn half_a_line_of_progress_is_not_believed() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("notes");
        std::fs::write(&path, "3\n17\n12").expect("written");
        assert_eq!(read_notes(&path), BTreeSet::from([3, 17]));
        assert_eq!(read_notes(&dir.path().join("none")), BTreeSet::new());
    }
}
