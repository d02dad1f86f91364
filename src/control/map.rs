//! What of a model's files is in memory, as a page of rows that people look at.
//!
//! In: the versions a mount shows, and a [`MapRequest`]. Out: one row a file.
//! Promises: bounded by [`ROWS_MAX`] and [`LETTERS_MAX`], whatever is asked; looking fetches nothing.
//! Not here: what is resident (`cache`), how it is drawn (`cli::top`).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::{Cache, Part};
use crate::error::{Code, Error, Result};
use crate::vfs::Shown;

/// Files to an answer: more than a terminal has lines.
pub const ROWS_MAX: usize = 512;
/// Cells to an answer, of all its files together.
pub const LETTERS_MAX: usize = 64 << 10;

/// Which files to tell of, and how finely.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapRequest {
    /// `NAME` for what is current, or `NAME@NUMBER`; `None`: the first.
    pub model: Option<String>,
    /// The number of the first file, in the order of their paths.
    pub from: usize,
    pub rows: usize,
    /// Most cells to a file.
    pub cells: usize,
}

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMap {
    pub model: String,
    pub version: u64,
    /// Files of the model.
    pub files: usize,
    pub from: usize,
    pub rows: Vec<FileRow>,
}

/// A file and what of it is resident.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRow {
    pub path: String,
    pub bytes: u64,
    pub resident_bytes: u64,
    pub chunks: u64,
    /// Chunks to a cell.
    pub cell_chunks: u64,
    /// One letter a cell, see [`Part::letter`].
    pub cells: String,
    /// Opens by which programs read it without the daemon.
    pub passthrough_opens: u64,
}

/// Tells of the files asked for.
///
/// # Errors
/// `NOT_FOUND` for a model that the mount does not show.
pub fn map(shown: &[Shown], cache: &Cache, asked: &MapRequest) -> Result<Value> {
    let is_asked = |one: &&Shown| match &asked.model {
        None => true,
        Some(name) => {
            (one.current && one.model.name == *name)
                || *name == format!("{}@{}", one.model.name, one.model.manifest.header().seq)
        }
    };
    let Some(one) = shown.iter().find(is_asked) else {
        let name = asked.model.as_deref().unwrap_or("any model");
        return Err(Error::new(Code::NotFound, format!("{name} is not mounted here; `modelfs status` lists what is")));
    };
    let model = &one.model;
    let files = model.manifest.files();
    let rows = asked.rows.min(ROWS_MAX);
    let cells = asked.cells.clamp(1, LETTERS_MAX / rows.max(1));
    let row = |file| {
        let told = cache.residency(model, file, cells);
        FileRow {
            path: model.manifest.path(file).to_owned(),
            bytes: file.size,
            resident_bytes: told.resident_bytes,
            chunks: told.chunks,
            cell_chunks: told.cell_chunks,
            cells: told.cells.iter().copied().map(Part::letter).collect(),
            passthrough_opens: told.passthrough_opens,
        }
    };
    let told = FileMap {
        model: model.name.clone(),
        version: model.manifest.header().seq,
        files: files.len(),
        from: asked.from,
        rows: files.iter().skip(asked.from).take(rows).map(row).collect(),
    };
    Ok(serde_json::to_value(told).expect("names and numbers are JSON"))
}
