//! Whose signatures count for which model: local policy, never the store's word.
//!
//! A trust file has one rule a line; `#` starts a comment:
//! ```text
//! acme/*     <64 hex digits>              both roles
//! acme/*     <64 hex digits> publisher    signs manifests
//! acme/*     <64 hex digits> release      signs refs
//! threshold  acme/*  2                    that many publishers must sign; `... 2 release` for refs
//! ```
//! In a pattern `*` stands for any characters, `/` too, `?` for one. Of several thresholds the highest counts.
//! Promises: one key counts once, however many signatures carry its id; an unreadable rule refuses the whole file.
//! Held by: the tests below; THREAT_MODEL (f) row 22 in `resolve`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::state::{self, Locked};
use crate::crypto::PublicKey;
use crate::error::{Code, Error, Result};
use crate::format::ModelId;
use crate::refuse;

const FILE_BYTES_MAX: u64 = 1 << 20;

/// What a signature is asked to vouch for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Signs manifests.
    Publisher,
    /// Signs refs.
    Release,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    pub publisher: bool,
    pub release: bool,
}

impl Roles {
    pub const BOTH: Roles = Roles { publisher: true, release: true };

    pub const fn has(self, role: Role) -> bool {
        match role {
            Role::Publisher => self.publisher,
            Role::Release => self.release,
        }
    }

    fn parse(word: &str) -> Option<Roles> {
        match word {
            "publisher" => Some(Roles { publisher: true, release: false }),
            "release" => Some(Roles { publisher: false, release: true }),
            "both" => Some(Roles::BOTH),
            _ => None,
        }
    }
}

/// A pattern of model names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Glob(String);

impl Glob {
    pub fn new(pattern: &str) -> Result<Glob> {
        if pattern.is_empty() || pattern.chars().any(|c| c.is_whitespace() || c.is_control() || "[]{}\\@".contains(c)) {
            refuse!(Usage, "pattern {pattern:?} of model names is empty or has more than names, `*` and `?`");
        }
        Ok(Glob(pattern.into()))
    }

    /// Linear but for the stars: goes back to the last star only.
    pub fn matches(&self, name: &str) -> bool {
        let (pattern, name): (Vec<char>, Vec<char>) = (self.0.chars().collect(), name.chars().collect());
        let (mut p, mut n, mut star) = (0, 0, None);
        while n < name.len() {
            match pattern.get(p) {
                Some('*') => {
                    star = Some((p, n));
                    p += 1;
                }
                Some(c) if *c == '?' || *c == name[n] => {
                    p += 1;
                    n += 1;
                }
                Some(_) | None => match star {
                    Some((at, taken)) => {
                        star = Some((at, taken + 1));
                        (p, n) = (at + 1, taken + 1);
                    }
                    None => return false,
                },
            }
        }
        pattern[p..].iter().all(|c| *c == '*')
    }
}

/// The rules in force.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    keys: Vec<(Glob, PublicKey, Roles)>,
    thresholds: Vec<(Glob, u32, Roles)>,
}

impl Trust {
    /// `--trust` words (hex or `.pub` paths, for every model and both roles) and the trust file, if there is one.
    pub fn gather(words: &[String], file: Option<&Path>) -> Result<Trust> {
        let mut trust = Trust::default();
        if let Some(path) = file {
            trust = Trust::load(path)?;
        }
        for word in words {
            trust.add(Glob::new("*")?, load_public_key(word)?, Roles::BOTH);
        }
        Ok(trust)
    }

    pub fn add(&mut self, glob: Glob, key: PublicKey, roles: Roles) {
        self.keys.push((glob, key, roles));
    }

    /// # Errors
    /// `USAGE` if it cannot be read, `KEY_PERMS` if others could have written it, `KEY_FORMAT` naming the line.
    pub fn load(path: &Path) -> Result<Trust> {
        let text = read_public_file(path, FILE_BYTES_MAX)?;
        Trust::parse(&text).map_err(|err| err.context(format!("trust file {}", path.display())))
    }

    pub fn parse(text: &str) -> Result<Trust> {
        let mut trust = Trust::default();
        for (number, line) in (1..).zip(text.lines()) {
            let words: Vec<&str> = line.split('#').next().unwrap_or("").split_whitespace().collect();
            if !words.is_empty() {
                trust.rule(&words).map_err(|err| {
                    Error::new(Code::KeyFormat, format!("line {number}: {}", err.message())).with_source(err)
                })?;
            }
        }
        Ok(trust)
    }

    fn rule(&mut self, words: &[&str]) -> Result<()> {
        let roles = |word: &str| {
            let unknown = || Error::new(Code::KeyFormat, format!("role {word:?} is none of publisher, release, both"));
            Roles::parse(word).ok_or_else(unknown)
        };
        match words {
            ["threshold", glob, count, role @ ..] if role.len() <= 1 => {
                let role = role.first().map_or(Ok(Roles { publisher: true, release: false }), |word| roles(word))?;
                match count.parse() {
                    Ok(count) if (1..=16).contains(&count) => self.thresholds.push((Glob::new(glob)?, count, role)),
                    _ => refuse!(KeyFormat, "threshold {count:?} is no number from 1 to 16"),
                }
            }
            [glob, key, role @ ..] if role.len() <= 1 => {
                let roles = role.first().map_or(Ok(Roles::BOTH), |word| roles(word))?;
                self.add(Glob::new(glob)?, PublicKey::from_hex(key)?, roles);
            }
            _ => refuse!(KeyFormat, "a rule is `PATTERN KEY [ROLE]` or `threshold PATTERN N [ROLE]`"),
        }
        Ok(())
    }

    /// The keys that count for `role` of the model, each once.
    pub fn keys(&self, name: &str, role: Role) -> Vec<PublicKey> {
        let of = self.keys.iter().filter(|(glob, _, roles)| roles.has(role) && glob.matches(name));
        let mut keys: Vec<PublicKey> = of.map(|(_, key, _)| *key).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// How many different keys must sign.
    pub fn threshold(&self, name: &str, role: Role) -> u32 {
        let of = self.thresholds.iter().filter(|(glob, _, roles)| roles.has(role) && glob.matches(name));
        of.map(|(_, count, _)| *count).max().unwrap_or(1)
    }

    /// The same keys, where one publisher is enough: for whoever adds the missing signatures.
    pub fn with_one_publisher(&self) -> Trust {
        let mut trust = self.clone();
        for (_, _, roles) in &mut trust.thresholds {
            roles.publisher = false;
        }
        trust
    }

    /// Whether anyone is trusted for this model at all.
    pub fn covers(&self, name: &str) -> bool {
        self.keys.iter().any(|(glob, _, _)| glob.matches(name))
    }
}

/// A public key as `--trust` names it: 64 hex digits, or the path of a `.pub` file that holds them.
///
/// # Errors
/// `KEY_FORMAT`, `KEY_PERMS`, `USAGE` if there is no such file.
pub fn load_public_key(word: &str) -> Result<PublicKey> {
    if word.len() == 64 && word.bytes().all(|c| c.is_ascii_hexdigit()) {
        return PublicKey::from_hex(word);
    }
    if !word.ends_with(".pub") {
        refuse!(KeyFormat, "a trusted key is 64 hex digits or the path of a .pub file, not {word:?}");
    }
    let text = read_public_file(Path::new(word), 4096)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    PublicKey::from_hex(text).map_err(|err| err.context(format!("public key file {word}")))
}

/// A file that may be read by all, but written by us and root only.
pub(super) fn read_public_file(path: &Path, max: u64) -> Result<String> {
    use std::io::Read;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let fault = |err| Error::new(Code::Usage, format!("cannot read {}", path.display())).with_source(err);
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(fault)?;
    let meta = file.metadata().map_err(fault)?;
    // SAFETY: reads this process's credentials only.
    let own = unsafe { libc::geteuid() };
    if !meta.is_file() || (meta.uid() != own && meta.uid() != 0) || meta.mode() & 0o022 != 0 {
        refuse!(KeyPerms, "{} must be a file that only we or root can write; chmod go-w", path.display());
    }
    let mut text = String::new();
    file.take(max + 1).read_to_string(&mut text).map_err(fault)?;
    if text.len() as u64 > max {
        refuse!(KeyFormat, "{} is longer than {max} bytes", path.display());
    }
    Ok(text)
}

/// Trust on first use: whoever signed what was first seen of a model is trusted for it from then on.
#[derive(Debug, Clone)]
pub struct Tofu {
    dir: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    store: String,
    model: String,
    keys: Vec<String>,
}

impl Tofu {
    /// Below the state folder.
    pub fn new(state: &Path) -> Tofu {
        Tofu { dir: state.join("first-use") }
    }

    /// The keys recorded for a model; none if it was never used.
    pub fn recorded(&self, store: &str, model: ModelId) -> Result<Vec<PublicKey>> {
        let record: Option<Record> = state::read(&self.dir, &state::file_name(store, model, "first-use"))?;
        let keys = record.map(|record| record.keys).unwrap_or_default();
        keys.iter().map(|key| PublicKey::from_hex(key)).collect()
    }

    /// Records the keys of a first use. A record that is there already is never replaced.
    pub fn record(&self, store: &str, model: (ModelId, &str), keys: &[PublicKey]) -> Result<()> {
        let name = state::file_name(store, model.0, "first-use");
        let locked = Locked::new(&self.dir)?;
        if state::read::<Record>(&self.dir, &name)?.is_some() {
            let known = self.recorded(store, model.0)?;
            if keys.iter().all(|key| known.contains(key)) {
                return Ok(());
            }
            refuse!(NoTrust, "another publisher of {} was recorded at the same time", model.1);
        }
        let keys = keys.iter().map(PublicKey::to_string).collect();
        locked.replace(&name, &Record { store: store.into(), model: model.1.into(), keys })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::SigningKey;

    fn key() -> PublicKey {
        SigningKey::generate().public()
    }

    #[test]
    fn patterns_match_names() {
        for (pattern, yes, no) in [
            ("*", &["a", "a/b"][..], &[][..]),
            ("acme/*", &["acme/a", "acme/a/b"], &["acme", "acmee/a", "xacme/a"]),
            ("a?c", &["abc", "a/c"], &["ac", "abbc"]),
            ("a*b*c", &["abc", "aXbYc", "abbc"], &["ab", "acb"]),
            ("exact", &["exact"], &["exactly", "inexact"]),
        ] {
            let glob = Glob::new(pattern).unwrap();
            assert!(yes.iter().all(|name| glob.matches(name)), "{pattern}");
            assert!(!no.iter().any(|name| glob.matches(name)), "{pattern}");
        }
        assert!(Glob::new("a*b*".repeat(20).as_str()).unwrap().matches(&"ab".repeat(200)));
        for pattern in ["", "a b", "a[bc]", "{a}", "a@3"] {
            assert_eq!(Glob::new(pattern).unwrap_err().code(), Code::Usage);
        }
    }

    #[test]
    fn a_trust_file_says_who_may_sign_what() {
        let (a, b, c) = (key(), key(), key());
        let text = format!("# ours\nacme/* {a}\nacme/* {b} publisher # offline\n* {c} release\n\nthreshold acme/* 2\n");
        let trust = Trust::parse(&text).unwrap();
        let mut publishers = vec![a, b];
        publishers.sort();
        assert_eq!(trust.keys("acme/x", Role::Publisher), publishers);
        assert_eq!(trust.keys("other", Role::Publisher), []);
        assert_eq!(trust.keys("other", Role::Release), [c]);
        assert_eq!(trust.threshold("acme/x", Role::Publisher), 2);
        assert_eq!(trust.threshold("acme/x", Role::Release), 1);
        assert!(trust.covers("other") && Trust::default().keys("other", Role::Release).is_empty());
        // A key named twice is one key.
        let twice = Trust::parse(&format!("* {a}\nacme/* {a}")).unwrap();
        assert_eq!(twice.keys("acme/x", Role::Publisher), [a]);
    }

    #[test]
    fn a_rule_that_cannot_be_read_refuses_the_file_and_names_its_line() {
        let a = key();
        for line in [
            "acme/*".to_string(),
            format!("acme/* {a} boss"),
            format!("acme/* {a} release extra"),
            format!("acme/* {}", &a.to_string()[1..]),
            format!("acme/* {}", "0".repeat(64)),
            "threshold *".into(),
            "threshold * 0".into(),
            "threshold * 17".into(),
            "threshold * many".into(),
            format!("a[b] {a}"),
        ] {
            let err = Trust::parse(&format!("\n* {a}\n{line}\n")).unwrap_err();
            assert_eq!(err.code(), Code::KeyFormat, "{line}");
            assert!(err.message().starts_with("line 3: "), "{err:?}");
        }
    }

    #[test]
    fn a_public_key_is_hex_or_a_file_that_others_cannot_write() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (path, a) = (dir.path().join("k.pub"), key());
        std::fs::write(&path, format!("{a}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let word = path.to_str().unwrap();
        assert_eq!(load_public_key(word).unwrap(), a);
        assert_eq!(load_public_key(&a.to_string()).unwrap(), a);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(load_public_key(word).unwrap_err().code(), Code::KeyPerms);
        assert_eq!(load_public_key("deadbeef").unwrap_err().code(), Code::KeyFormat);
        assert_eq!(load_public_key("/nowhere/k.pub").unwrap_err().code(), Code::Usage);
    }

    #[test]
    fn a_first_use_is_recorded_once() {
        let dir = tempfile::tempdir().unwrap();
        let (tofu, model, a) = (Tofu::new(dir.path()), (ModelId([1; 32]), "m"), key());
        assert_eq!(tofu.recorded("s", model.0).unwrap(), []);
        tofu.record("s", model, &[a]).unwrap();
        tofu.record("s", model, &[a]).unwrap();
        assert_eq!(tofu.record("s", model, &[key()]).unwrap_err().code(), Code::NoTrust);
        assert_eq!(tofu.recorded("s", model.0).unwrap(), [a]);
        assert_eq!(tofu.recorded("other", model.0).unwrap(), []);
    }
}
