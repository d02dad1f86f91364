//! `modelfs scan`: model weights in plaintext where none should be: in trees, docker-save archives and OCI layouts.
//!
//! In: a [`ScanPlan`] and whatever lies at its targets (hostile). Out: a [`Report`]: each finding with its format, how sure
//! that is, where it lies (layer, position, line of the build, hidden or not) and what to do; and what could not be read.
//! Promises: files are told by structure first, by name and size last; a layer is looked at as it lies in the archive, so
//! that what a later layer deletes is found; nothing is written, followed out of a tree, or opened but regular files; time
//! and memory are bounded whatever the archive holds; **what cannot be read is never taken for clean** ([`Report::unread`]).
//! `source`: bytes within limits. `tar`, `zip`: entries. `detect`: what a file is. `image`: layers. `walk`: the order of it
//! all. `tell`: what is told of it. `sarif`: for pipelines.
//! Not here: what a finding means for the exit code (`cli`), removing anything.
//! Spec: docs/SCAN.md. Held by: tests/scan.rs, tests/scan.sh.

mod detect;
mod image;
mod pattern;
mod sarif;
mod source;
mod tar;
mod tell;
mod walk;
mod zip;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::error::Result;

pub use image::Hidden;
pub use pattern::Pattern;
pub use sarif::sarif;

/// Findings that are told one by one; more are counted. Of what is only mentioned half as many are told.
pub const FINDINGS_MAX: usize = 10_000;

/// Places that could not be read and are told one by one.
pub const UNREAD_MAX: usize = 1_000;

/// What to look at and how far to go.
#[derive(Debug, Clone)]
pub struct ScanPlan {
    /// Trees, archives, layouts; `-` is standard input.
    pub targets: Vec<PathBuf>,
    /// Nothing smaller is a finding.
    pub min_bytes: u64,
    /// Paths that are passed over.
    pub exclude: Vec<Pattern>,
    /// Files that may be there, by their SHA-256.
    pub accept: BTreeSet<[u8; 32]>,
    /// Hold the blobs of an image against their digests.
    pub verify: bool,
    /// Look into archives that lie in trees and layers.
    pub archives: bool,
    /// Look at other filesystems that are mounted in a tree.
    pub cross_mounts: bool,
    /// Longest time for all.
    pub time: Option<Duration>,
    pub threads: usize,
    pub limits: Limits,
}

/// Where hostile archives end.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes that all decoders together may make.
    pub unpacked_bytes_max: u64,
    /// How many times its packed bytes one stream may make, from 256 MiB on.
    pub ratio_max: u64,
    /// Files and entries in all.
    pub entries_max: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { unpacked_bytes_max: 1 << 40, ratio_max: 200, entries_max: 20_000_000 }
    }
}

impl ScanPlan {
    /// Everything below `targets`, as `modelfs scan` looks at it.
    pub fn new(targets: Vec<PathBuf>) -> ScanPlan {
        ScanPlan {
            targets,
            min_bytes: 1 << 10,
            exclude: Vec::new(),
            accept: BTreeSet::new(),
            verify: false,
            archives: true,
            cross_mounts: false,
            time: None,
            threads: std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 16),
            limits: Limits::default(),
        }
    }

    /// What a container carries in its own filesystem, before its program starts: no archives, no mounts, nothing below
    /// 1 MiB, and an end after ten seconds. A report that is not [`complete`](Report::complete) has not seen all.
    pub fn quick(root: &Path) -> ScanPlan {
        ScanPlan {
            min_bytes: 1 << 20,
            archives: false,
            time: Some(Duration::from_secs(10)),
            ..ScanPlan::new(vec![root.to_owned()])
        }
    }
}

/// How a scan comes forward.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// So many more bytes are to be looked at.
    Found(u64),
    /// So many bytes were read or passed over.
    Passed(u64),
}

macro_rules! formats {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $title:literal;)*) => {
        /// Formats that are told apart. The names are a contract: `--json` and SARIF use them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Format { $($(#[$doc])* $variant,)* }
        impl Format {
            pub const ALL: &'static [Format] = &[$(Format::$variant,)*];
            pub const fn name(self) -> &'static str { match self { $(Format::$variant => $name,)* } }
            pub const fn title(self) -> &'static str { match self { $(Format::$variant => $title,)* } }
        }
    };
}

formats! {
    Safetensors = "safetensors", "safetensors";
    Gguf = "gguf", "GGUF (llama.cpp)";
    Ggml = "ggml", "GGML, GGMF, GGJT or GGLA (older llama.cpp)";
    Pytorch = "pytorch", "PyTorch archive or older torch.save";
    Pickle = "pickle", "Python pickle of tensors, arrays or estimators";
    Onnx = "onnx", "ONNX";
    TfSavedModel = "tf-saved-model", "TensorFlow saved model";
    TfGraph = "tf-graph", "TensorFlow frozen graph";
    TfCheckpoint = "tf-checkpoint", "TensorFlow checkpoint";
    Tensorrt = "tensorrt", "TensorRT engine";
    Hdf5 = "hdf5", "HDF5 (Keras and others)";
    Keras = "keras", "Keras archive";
    Tflite = "tflite", "TensorFlow Lite";
    Numpy = "numpy", "NumPy arrays";
    /// Known by name and size alone.
    Named = "named", "weights by name and size";
    Opaque = "opaque", "large file of unknown content";
    /// Could not be looked into, and is part of something that was.
    Archive = "archive", "archive that was not looked into";
    /// modelfs's own ciphertext.
    Sealed = "sealed", "sealed by modelfs";
}

/// How sure a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// Told because somebody may want to know; no finding by itself.
    Info,
    /// By name and size, or by a structure that others have as well.
    Likely,
    /// By structure.
    Certain,
}

impl Confidence {
    pub const fn name(self) -> &'static str {
        match self {
            Confidence::Info => "info",
            Confidence::Likely => "likely",
            Confidence::Certain => "certain",
        }
    }
}

/// Weights that lie somewhere.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub format: Format,
    pub confidence: Confidence,
    /// As it was given.
    pub target: String,
    /// Below the target or in the layer; `!` goes into an archive. What is not printable is escaped.
    pub path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Told when files are accepted by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer: Option<LayerOf>,
    pub why: String,
    pub fix: String,
}

/// The layer that holds a finding.
#[derive(Debug, Clone, Serialize)]
pub struct LayerOf {
    /// The file of the archive.
    pub file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// In each image that has it.
    pub images: Vec<Placement>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Placement {
    pub image: String,
    /// From 1, the lowest.
    pub position: usize,
    pub of: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// The layer from which on the file is not seen any more, and how that came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_by: Option<(usize, Hidden)>,
}

/// A place that is not known to be clean.
#[derive(Debug, Clone, Serialize)]
pub struct Unread {
    pub target: String,
    pub path: String,
    pub why: String,
    /// It is not what it should be, or more than the limits allow; else this machine did not read it.
    pub hostile: bool,
}

/// What a target turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Tree,
    File,
    Archive,
    Image,
}

#[derive(Debug, Clone, Serialize)]
pub struct TargetSeen {
    pub path: String,
    pub kind: Kind,
    pub images: Vec<ImageSeen>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ImageSeen {
    pub name: String,
    pub layers: usize,
}

/// How much was looked at.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Looked {
    pub files: u64,
    pub entries: u64,
    pub archives: u64,
    pub layers: u64,
    /// Read from the disk or the pipe.
    pub bytes_read: u64,
    pub bytes_unpacked: u64,
    /// Other filesystems that were passed over.
    pub mounts_skipped: u64,
}

/// What a scan found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub targets: Vec<TargetSeen>,
    /// Surest first, then by place.
    pub findings: Vec<Finding>,
    /// Beyond [`FINDINGS_MAX`].
    pub findings_untold: u64,
    /// Accepted by digest.
    pub accepted: Vec<Finding>,
    pub unread: Vec<Unread>,
    pub unread_untold: u64,
    /// False if the time was over before the end.
    pub complete: bool,
    pub looked: Looked,
}

impl Report {
    /// Findings of at least this weight.
    pub fn at_least(&self, confidence: Confidence) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.confidence >= confidence)
    }
}

/// Looks at every target to its end, or to a limit.
///
/// `progress` is called from several threads, for bytes in either direction of hope.
///
/// # Errors
/// `NOT_FOUND` or `HOST` for a target that cannot be opened at all. What cannot be read within one is in the report.
pub fn scan(plan: &ScanPlan, progress: &(dyn Fn(Step) + Sync)) -> Result<Report> {
    walk::run(plan, progress)
}

/// A path as it may stand on a terminal and in a document: what is no letter of any script is escaped.
pub(crate) fn shown(path: &[u8]) -> String {
    let mut out = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            // Marks that turn the direction of writing can make a path look like another.
            let turns =
                matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
            match c {
                '\\' => out.push_str("\\\\"),
                c if c.is_control() || turns => out.extend(c.escape_unicode()),
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_write_to_a_terminal_or_look_like_another() {
        assert_eq!(shown(b"a/\x1b[2J\n"), "a/\\u{1b}[2J\\u{a}");
        assert_eq!(shown(b"\xff\xfe/b\\"), "\\xff\\xfe/b\\\\");
        assert_eq!(shown("m\u{202e}nib".as_bytes()), "m\\u{202e}nib");
        assert_eq!(shown("modèle".as_bytes()), "modèle");
    }

    #[test]
    fn names_of_formats_are_those_of_their_json() {
        for format in Format::ALL {
            assert_eq!(serde_json::to_value(format).expect("a word"), format.name());
        }
    }
}
