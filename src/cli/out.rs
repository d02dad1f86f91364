//! What a command prints: results to standard output as text or JSON, hints and progress to standard error.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::record::Recorder;
use crate::error::{Code, Error, Result};

/// Whether standard output already holds this command's one JSON document.
static PRINTED: AtomicBool = AtomicBool::new(false);

/// A result was printed, so an error that follows it goes to standard error only: one command, one JSON document.
pub fn result_printed() -> bool {
    PRINTED.load(Ordering::Relaxed)
}

/// The one way a command prints.
#[derive(Debug, Clone)]
pub struct Out {
    pub json: bool,
    pub quiet: bool,
    /// Where results are recorded before they are printed.
    recorder: Option<Arc<Recorder>>,
}

impl Out {
    pub fn new(json: bool, quiet: bool) -> Out {
        Out { json, quiet, recorder: None }
    }

    /// The same, for a command whose results are recorded.
    pub fn recording(&self, recorder: Arc<Recorder>) -> Out {
        Out { recorder: Some(recorder), ..self.clone() }
    }

    /// The result: `value` as one JSON document with `--json`, else what `text` writes.
    pub fn result(&self, value: &serde_json::Value, text: impl FnOnce() -> String) -> Result<()> {
        let shown = if self.json {
            let mut shown = serde_json::to_string_pretty(value).expect("a JSON value is JSON");
            shown.push('\n');
            shown
        } else {
            let mut shown = text();
            if !shown.is_empty() && !shown.ends_with('\n') {
                shown.push('\n');
            }
            shown
        };
        if let Some(recorder) = &self.recorder {
            recorder.done(value)?;
        }
        PRINTED.store(true, Ordering::Relaxed);
        std::io::stdout()
            .write_all(shown.as_bytes())
            .and_then(|()| std::io::stdout().flush())
            .map_err(|e| Error::new(Code::Host, "cannot write to standard output").with_source(e))
    }

    /// A line for people, on standard error; none with `-q` or `--json`.
    pub fn hint(&self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            // Standard error that is gone is no reason to end the work.
            let _ = writeln!(std::io::stderr(), "{}", text.as_ref());
        }
    }

    /// A bar of things, by number; invisible unless a person watches.
    pub fn count(&self, things: u64, what: &str) -> ProgressBar {
        let bar = self.progress(things, what);
        let style = ProgressStyle::with_template("{prefix:<8} {bar:30} {pos:>6}/{len} {eta:>5} left {wide_msg}")
            .expect("a constant template");
        bar.set_style(style.progress_chars("=> "));
        bar
    }

    /// A bar of bytes with rate and time left; invisible unless a person watches.
    pub fn progress(&self, bytes: u64, what: &str) -> ProgressBar {
        let hidden = self.quiet || self.json || !std::io::stderr().is_terminal();
        let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(8) };
        let bar = ProgressBar::with_draw_target(Some(bytes), target);
        let style = ProgressStyle::with_template(
            "{prefix:<8} {bar:30} {bytes:>10}/{total_bytes} {bytes_per_sec:>12} {eta:>5} left {wide_msg}",
        )
        .expect("a constant template");
        bar.set_style(style.progress_chars("=> "));
        bar.set_prefix(what.to_string());
        bar
    }
}

/// Columns, each as wide as its widest cell; numbers to the right where `right` says so.
pub fn table(header: &[&str], right: &[bool], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let titles: Vec<String> = header.iter().map(|cell| (*cell).to_string()).collect();
    for row in std::iter::once(&titles).chain(rows) {
        let mut line = String::new();
        for ((cell, width), right) in row.iter().zip(&widths).zip(right) {
            let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
            if *right {
                line.push_str(&pad);
                line.push_str(cell);
            } else {
                line.push_str(cell);
                line.push_str(&pad);
            }
            line.push_str("  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `text` from the store or the user as it may stand on a terminal: no control characters, no line ends.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let text =
            table(&["name", "size"], &[false, true], &[vec!["a".into(), "10".into()], vec!["long".into(), "7".into()]]);
        assert_eq!(text, "name  size\na       10\nlong     7\n");
    }

    #[test]
    fn a_name_cannot_write_escape_sequences_to_a_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
