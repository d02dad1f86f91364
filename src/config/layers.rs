//! The four layers an option can come from, and which one won.
//!
//! Every option is one line of [`OPTIONS`]: from it follow its flag, its word in `-o` and in the file, and its
//! environment name. Each value remembers where it was written, so that a message can say so.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One value; within a layer the last one wins.
    One,
    /// Any number; a layer replaces the list of the layer below.
    Many,
    /// Yes or no.
    Switch,
}

/// One option, by the name of its flag.
#[derive(Debug)]
pub struct OptionSpec {
    pub name: &'static str,
    pub kind: Kind,
    pub env: &'static str,
}

const fn option(name: &'static str, kind: Kind, env: &'static str) -> OptionSpec {
    OptionSpec { name, kind, env }
}

/// Every option that the file, the environment and `-o` know. `MODELFS_KEY` and `MODELFS_PASSPHRASE` are not here: they
/// hold secrets, and only `keys` reads them.
pub const OPTIONS: &[OptionSpec] = &[
    option("allow-other", Kind::Switch, "MODELFS_ALLOW_OTHER"),
    option("cache", Kind::One, "MODELFS_CACHE"),
    option("fetch-budget", Kind::One, "MODELFS_FETCH_BUDGET"),
    option("fetch-timeout", Kind::One, "MODELFS_FETCH_TIMEOUT"),
    option("gid", Kind::One, "MODELFS_GID"),
    option("key", Kind::Many, "MODELFS_KEY_SOURCE"),
    option("log-file", Kind::One, "MODELFS_LOG_FILE"),
    option("log-format", Kind::One, "MODELFS_LOG_FORMAT"),
    option("manifest", Kind::One, "MODELFS_MANIFEST"),
    option("model", Kind::Many, "MODELFS_MODEL"),
    option("no-page-cache", Kind::Switch, "MODELFS_NO_PAGE_CACHE"),
    option("open", Kind::One, "MODELFS_OPEN"),
    option("profile", Kind::One, "MODELFS_PROFILE"),
    option("require", Kind::Many, "MODELFS_REQUIRE"),
    option("require-floor", Kind::Switch, "MODELFS_REQUIRE_FLOOR"),
    option("s3-endpoint", Kind::One, "MODELFS_S3_ENDPOINT"),
    option("s3-region", Kind::One, "MODELFS_S3_REGION"),
    option("trust", Kind::Many, "MODELFS_TRUST"),
    option("trust-file", Kind::One, "MODELFS_TRUST_FILE"),
    option("trust-on-first-use", Kind::Switch, "MODELFS_TRUST_ON_FIRST_USE"),
    option("uid", Kind::One, "MODELFS_UID"),
    option("umask", Kind::One, "MODELFS_UMASK"),
    option("verify", Kind::One, "MODELFS_VERIFY"),
];

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    File(PathBuf),
    Env(&'static str),
    MountOption,
    Flag,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub name: &'static str,
    pub values: Vec<String>,
    pub origin: Origin,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::File(path) => write!(f, "{} in {}", self.name, path.display()),
            Origin::Env(env) => f.write_str(env),
            Origin::MountOption => write!(f, "-o {}", self.name),
            Origin::Flag => write!(f, "--{}", self.name),
        }
    }
}

impl Setting {
    pub fn last(&self) -> &str {
        self.values.last().map_or("", String::as_str)
    }
}

/// What all layers said, the highest winning.
#[derive(Debug, Clone, Default)]
pub struct Layers(BTreeMap<&'static str, Setting>);

impl Layers {
    pub fn get(&self, name: &'static str) -> Option<&Setting> {
        debug_assert!(OPTIONS.iter().any(|spec| spec.name == name), "{name} is not an option");
        self.0.get(name)
    }

    /// Reads one value; an error names the place it was written at.
    pub fn parse<T>(&self, name: &'static str, read: impl FnOnce(&str) -> Result<T>) -> Result<Option<T>> {
        match self.get(name) {
            None => Ok(None),
            Some(setting) => read(setting.last()).map(Some).map_err(|e| e.context(setting.to_string())),
        }
    }

    pub fn parse_all<T>(&self, name: &'static str, mut read: impl FnMut(&str) -> Result<T>) -> Result<Vec<T>> {
        let Some(setting) = self.get(name) else { return Ok(Vec::new()) };
        setting.values.iter().map(|value| read(value).map_err(|e| e.context(setting.to_string()))).collect()
    }

    pub fn switch(&self, name: &'static str) -> Result<bool> {
        Ok(self.parse(name, parse_switch)?.unwrap_or(false))
    }

    fn put(&mut self, spec: &'static OptionSpec, values: Vec<String>, origin: Origin) {
        self.0.insert(spec.name, Setting { name: spec.name, values, origin });
    }

    /// Lays flags above everything. No value, no layer: an absent flag hides nothing below it.
    pub fn flag(&mut self, name: &'static str, values: Vec<String>) {
        let spec = find(name).expect("flags are options of the table");
        if !values.is_empty() {
            self.put(spec, values, Origin::Flag);
        }
    }

    /// Lays the environment above the file. An empty value counts as not set, as `docker run -e NAME=` leaves it.
    pub fn environment(&mut self, read: impl Fn(&str) -> Option<String>) {
        for spec in OPTIONS {
            if let Some(value) = read(spec.env).filter(|value| !value.is_empty()) {
                let values = if spec.kind == Kind::Many { split_list(&value) } else { vec![value] };
                self.put(spec, values, Origin::Env(spec.env));
            }
        }
    }

    /// Lays the words of `-o` (already split) above everything so far.
    ///
    /// Words of mount(8) itself are passed over: the filesystem is always read-only, nosuid, nodev and noexec.
    /// # Errors
    /// `Usage` for an unknown word, naming the nearest known one, unless `sloppy` (mount -s).
    pub fn mount_options(&mut self, words: &[String], sloppy: bool) -> Result<()> {
        let mut seen: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
        for word in words {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word.as_str(), None),
            };
            if is_mount_word(name) {
                continue;
            }
            let Some(spec) = find(name) else {
                if sloppy {
                    continue;
                }
                return Err(unknown("mount option", name, "-o"));
            };
            let value = match (spec.kind, value) {
                (Kind::Switch, None) => "true".to_string(),
                (_, None | Some("")) => {
                    return Err(Error::new(Code::Usage, format!("-o {0} needs a value: {0}=...", spec.name)));
                }
                (_, Some(value)) => value.to_string(),
            };
            seen.entry(spec.name).or_default().push(value);
        }
        for (name, values) in seen {
            self.put(find(name).expect("came from the table"), values, Origin::MountOption);
        }
        Ok(())
    }

    /// Lays one file above the ones before it. A file that is not there is no layer.
    ///
    /// # Errors
    /// `Usage` if it is not TOML, names an option that does not exist, or can be written by others: it names keys and
    /// whom to trust.
    pub fn file(&mut self, path: &Path, must_exist: bool) -> Result<()> {
        use std::io::Read;
        let named = |what: &str| format!("the configuration file {} {what}", path.display());
        let mut file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !must_exist => return Ok(()),
            Err(e) => return Err(Error::new(Code::Usage, named("cannot be read")).with_source(e)),
        };
        // The open file is asked, not the path: the path may lead elsewhere by now.
        let meta = file.metadata().map_err(|e| Error::new(Code::Usage, named("cannot be looked at")).with_source(e))?;
        // SAFETY: geteuid only reads this process's credentials.
        let own_uid = unsafe { libc::geteuid() };
        if !meta.is_file() || meta.mode() & 0o022 != 0 || !(meta.uid() == 0 || meta.uid() == own_uid) {
            return Err(Error::new(
                Code::Usage,
                named("must belong to you or root and be writable by its owner only; chown it and chmod go-w"),
            ));
        }
        const FILE_BYTES_MAX: u64 = 1 << 20;
        let mut text = String::new();
        let read = (&mut file).take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
        read.map_err(|e| Error::new(Code::Usage, named("cannot be read")).with_source(e))?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(Error::new(Code::Usage, named("is longer than 1 MiB")));
        }
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            Error::new(Code::Usage, format!("{}: {}", named("is not TOML"), e.message()))
        })?;
        for (name, value) in table {
            let spec = find(&name).ok_or_else(|| unknown("option", &name, &path.display().to_string()))?;
            let values = file_values(spec, value).map_err(|e| e.context(named("is refused")))?;
            self.put(spec, values, Origin::File(path.to_path_buf()));
        }
        Ok(())
    }
}

fn file_values(spec: &OptionSpec, value: toml::Value) -> Result<Vec<String>> {
    let plain = |value: toml::Value| match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Boolean(yes) if spec.kind == Kind::Switch => Ok(yes.to_string()),
        other => Err(Error::new(Code::Usage, format!("{} cannot be a {}", spec.name, other.type_str()))),
    };
    match (spec.kind, value) {
        (Kind::Many, toml::Value::Array(values)) => values.into_iter().map(plain).collect(),
        (_, value) => Ok(vec![plain(value)?]),
    }
}

/// By flag name; `_` and `-` are the same.
fn find(name: &str) -> Option<&'static OptionSpec> {
    let dashed = name.replace('_', "-");
    OPTIONS.iter().find(|spec| spec.name == dashed)
}

fn unknown(what: &str, name: &str, place: &str) -> Error {
    let shown: String = name.chars().take(64).collect();
    let near = OPTIONS.iter().map(|spec| (distance(&name.replace('_', "-"), spec.name), spec.name)).min();
    match near {
        Some((far, best)) if far <= 3.max(name.len() / 3) => {
            Error::new(Code::Usage, format!("unknown {what} `{shown}` in {place}; did you mean `{best}`?"))
        }
        _ => Error::new(Code::Usage, format!("unknown {what} `{shown}` in {place}; `modelfs mount --help` lists them")),
    }
}

/// Edits between two words (Levenshtein). Both are short; the typed one is cut.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (i, cb) in b.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, ca) in a.iter().enumerate() {
            let best = (diagonal + usize::from(*ca != cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = best;
        }
    }
    row[a.len()]
}

/// Splits at commas; `\,` is a comma within a value. Empty pieces are dropped.
pub fn split_list(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.peek() == Some(&',') => {
                chars.next();
                pieces.last_mut().expect("never empty").push(',');
            }
            ',' => pieces.push(String::new()),
            c => pieces.last_mut().expect("never empty").push(c),
        }
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

fn parse_switch(text: &str) -> Result<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(Error::new(Code::Usage, format!("`{text}` is neither true nor false"))),
    }
}

/// Words that mount(8), fstab and systemd put into `-o` for themselves.
fn is_mount_word(name: &str) -> bool {
    const WORDS: &[&str] = &[
        "ro",
        "rw",
        "defaults",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "owner",
        "group",
        "_netdev",
        "nofail",
        "nosuid",
        "suid",
        "nodev",
        "dev",
        "noexec",
        "exec",
        "atime",
        "noatime",
        "relatime",
        "norelatime",
        "strictatime",
        "nodiratime",
        "diratime",
        "async",
        "sync",
        "dirsync",
        "default_permissions",
        "silent",
        "loud",
        "nosymfollow",
        "subtype",
        "fsname",
    ];
    WORDS.contains(&name) || name.starts_with("x-") || name.starts_with("X-") || name.starts_with("comment")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        split_list(text)
    }

    #[test]
    fn the_table_is_sorted_and_every_name_is_its_environment_name() {
        assert!(OPTIONS.is_sorted_by_key(|spec| spec.name));
        for spec in OPTIONS.iter().filter(|spec| spec.name != "key") {
            assert_eq!(spec.env, format!("MODELFS_{}", spec.name.to_uppercase().replace('-', "_")));
        }
    }

    #[test]
    fn flags_beat_mount_options_beat_the_environment_beats_the_file() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "cache = \"1GiB\"\nopen = \"lazy\"\nkey = [\"file:/a\", \"file:/b\"]\nuid = 7\n")
            .expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("closed");
        let mut layers = Layers::default();
        layers.file(&path, true).expect("read");
        assert_eq!(layers.get("key").expect("from the file").values, ["file:/a", "file:/b"]);
        layers.environment(|name| match name {
            "MODELFS_CACHE" => Some("2GiB".into()),
            "MODELFS_UID" => Some(String::new()),
            _ => None,
        });
        assert_eq!(layers.get("cache").expect("env").last(), "2GiB");
        assert_eq!(layers.get("uid").expect("an empty variable is none").last(), "7");
        layers.mount_options(&words("rw,cache=3GiB,allow_other"), false).expect("known words");
        assert_eq!(layers.get("cache").expect("-o").last(), "3GiB");
        layers.flag("cache", vec!["4GiB".into()]);
        layers.flag("open", vec![]);
        assert_eq!(layers.get("cache").expect("flag").to_string(), "--cache");
        assert_eq!(layers.get("open").expect("file").last(), "lazy");
        assert!(layers.switch("allow-other").expect("a switch"));
    }

    #[test]
    fn an_unknown_word_is_refused_with_the_nearest_one() {
        let err = Layers::default().mount_options(&words("cahce=8G"), false).expect_err("unknown");
        assert!(err.chain().contains("did you mean `cache`"), "{err:?}");
        Layers::default().mount_options(&words("cahce=8G"), true).expect("sloppy passes over it");
    }

    #[test]
    fn a_file_with_an_unknown_key_or_open_to_writers_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "tust = \"x\"\n").expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("mode");
        let err = Layers::default().file(&path, true).expect_err("unknown key");
        assert!(err.chain().contains("`trust`"), "{err:?}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).expect("mode");
        let err = Layers::default().file(&path, true).expect_err("writable by all");
        assert!(err.chain().contains("chmod go-w"), "{err:?}");
        Layers::default().file(&dir.path().join("none"), false).expect("optional");
    }

    #[test]
    fn an_error_says_where_the_value_was_written() {
        let mut layers = Layers::default();
        layers.environment(|name| (name == "MODELFS_CACHE").then(|| "8Gx".into()));
        let err = layers.parse("cache", super::super::units::parse_size).expect_err("bad size");
        assert_eq!(err.chain(), "MODELFS_CACHE: `8Gx` is not a size; write 8GiB, 8G, 8GB, 512MiB or bytes");
    }

    #[test]
    fn a_comma_within_a_value_is_written_with_a_backslash() {
        assert_eq!(split_list(r"key=file:/a\,b,,ro"), ["key=file:/a,b", "ro"]);
    }
}
