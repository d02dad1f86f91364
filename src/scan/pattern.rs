//! Patterns of paths for `--exclude`: `*` within a folder, `**` across folders, `?` for one letter.

use crate::error::Result;
use crate::refuse;

/// A pattern. Without a slash it is held against every name on the way; with one, against the whole path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: Vec<u8>,
    whole: bool,
}

impl Pattern {
    /// # Errors
    /// `USAGE` for an empty pattern or one that would take long to match.
    pub fn parse(text: &str) -> Result<Pattern> {
        let inner = text.trim_matches('/');
        if inner.is_empty() {
            refuse!(
                Usage,
                "`{text}` excludes nothing or everything; write a path or a pattern as in '**/testdata/*.h5'"
            );
        }
        if text.matches('*').count() > 16 || text.len() > 4096 {
            refuse!(Usage, "a pattern of more than 16 stars or 4096 letters is not a pattern");
        }
        Ok(Pattern { text: inner.as_bytes().to_vec(), whole: inner.contains('/') || text.starts_with('/') })
    }

    /// Whether the pattern takes a path, or a folder above it.
    pub fn takes(&self, path: &[u8]) -> bool {
        let path: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
        if !self.whole {
            return path.iter().any(|name| matches(&self.text, name));
        }
        (1..=path.len()).any(|end| matches(&self.text, &path[..end].join(&b'/')))
    }
}

/// All places of the pattern that the path so far may have come to, one letter of the path after the other: time is the
/// product of both lengths, whatever the names.
fn matches(pattern: &[u8], path: &[u8]) -> bool {
    let mut states = vec![false; pattern.len() + 1];
    enter(pattern, &mut states, 0);
    for byte in path {
        let mut next = vec![false; pattern.len() + 1];
        for at in (0..pattern.len()).filter(|at| states[*at]) {
            match &pattern[at..] {
                [b'*', b'*', ..] => {
                    next[at] = true;
                    enter(pattern, &mut next, at + 2);
                }
                [b'*', ..] if *byte != b'/' => enter(pattern, &mut next, at),
                [b'*', ..] => {}
                [b'?', ..] if *byte != b'/' => enter(pattern, &mut next, at + 1),
                [letter, ..] if letter == byte => enter(pattern, &mut next, at + 1),
                _ => {}
            }
        }
        states = next;
    }
    states[pattern.len()]
}

/// Comes to a place, and to those that a star lets it pass to without a letter.
fn enter(pattern: &[u8], states: &mut [bool], at: usize) {
    states[at] = true;
    match &pattern[at..] {
        // No folder at all; once it has taken a letter, the slash has to be there.
        [b'*', b'*', b'/', ..] if at == 0 || pattern[at - 1] == b'/' => {
            enter(pattern, states, at + 2);
            enter(pattern, states, at + 3);
        }
        [b'*', b'*', ..] => enter(pattern, states, at + 2),
        [b'*', ..] => enter(pattern, states, at + 1),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_take_what_they_say_and_what_lies_below_it() {
        for (pattern, path, wanted) in [
            ("*.h5", "a/b/c.h5", true),
            ("*.h5", "a/b/c.h5x", false),
            ("testdata", "src/testdata/m.onnx", true),
            ("/usr/share", "usr/share/x/y", true),
            ("usr/share", "opt/usr/share/x", false),
            ("**/testdata/*.h5", "a/b/testdata/m.h5", true),
            ("**/testdata/*.h5", "testdata/m.h5", true),
            ("**/testdata/*.h5", "mytestdata/m.h5", false),
            ("**/a/**/x", "b/a/a/x", true),
            ("**/a/**/x", "b/a/ax", false),
            ("usr/*/x", "usr/a/x", true),
            ("usr/*/x", "usr/a/b/x", false),
            ("usr/**", "usr/a/b", true),
            ("m?del", "model", true),
            ("m?del", "mdel", false),
        ] {
            let pattern = Pattern::parse(pattern).expect(pattern);
            assert_eq!(pattern.takes(path.as_bytes()), wanted, "{pattern:?} {path}");
        }
        for wrong in ["", "/", &"*".repeat(20)] {
            assert!(Pattern::parse(wrong).is_err(), "{wrong}");
        }
    }
}
