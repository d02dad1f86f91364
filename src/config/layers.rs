//! The four layers an option can come from, and which one won.
//!
//! Each value remembers where it was written, so that a message can say so. What is wrong in several places is told at
//! once: the errors of a layer are kept and refused together by whoever makes a plan.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::names::{self, Does, OfStore, Said, Stray};
use super::options::{nearest, parse_switch};
use crate::error::{Code, Error, Result};
use crate::store::StoreUrl;

pub use super::options::{Kind, OPTIONS, OptionSpec, find, options_of_a_mount, takes};

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
pub struct Layers {
    said: BTreeMap<&'static str, Setting>,
    /// Files that were there and were read, the highest last.
    files: Vec<PathBuf>,
    /// Names of the environment that begin as ours and that nobody reads.
    strays: Vec<Stray>,
    /// What the environment says in names of others, and cannot be understood.
    wrong: Vec<Error>,
    told: Vec<String>,
    of_store: OfStore,
}

impl Layers {
    pub fn get(&self, name: &'static str) -> Option<&Setting> {
        debug_assert!(OPTIONS.iter().any(|spec| spec.name == name), "{name} is not an option");
        self.said.get(name)
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
        self.said.insert(spec.name, Setting { name: spec.name, values, origin });
    }

    /// Lays flags above everything. No value, no layer: an absent flag hides nothing below it.
    pub fn flag(&mut self, name: &'static str, values: Vec<String>) {
        let spec = find(name).expect("flags are options of the table");
        if !values.is_empty() {
            self.put(spec, values, Origin::Flag);
        }
    }

    /// Lays the environment above the file. An empty value counts as not set, as `docker run -e NAME=` leaves it.
    ///
    /// `set` are the names that are set; only the values of those that hold no secret are asked for.
    pub fn environment(&mut self, set: &[String], read: impl Fn(&str) -> Option<String>) {
        let value = |name: &str| read(name).filter(|value| !value.is_empty());
        for other in names::OTHERS.iter().filter(|other| other.does != Does::Secret) {
            let Some(value) = value(other.name) else { continue };
            match names::read(other, &value) {
                Ok(Said::Option(option, value, below)) => {
                    let spec = find(option).expect("an option of the table");
                    let audited = option == "audit" && self.said.keys().any(|name| name.starts_with("audit"));
                    if !below || !(self.said.contains_key(option) || audited) {
                        self.put(spec, split(spec, value), Origin::Env(other.name));
                    }
                }
                Ok(Said::Told(text)) => self.told.push(text),
                Ok(Said::Nothing) => {}
                Err(error) => self.wrong.push(error),
            }
        }
        self.of_store = OfStore { backend: value("MODEL_STORAGE_BACKEND"), bucket: value("AWS_S3_BUCKET") };
        for spec in OPTIONS {
            if let Some(value) = value(spec.env) {
                self.put(spec, split(spec, value), Origin::Env(spec.env));
            }
        }
        self.strays = names::strays(set);
    }

    /// What is wrong in the environment as a whole. A name that a key source reads (`env:NAME`) is no stray.
    pub fn wrong(&self) -> Vec<Error> {
        let keys: Vec<&str> =
            self.get("key").map_or(Vec::new(), |keys| keys.values.iter().map(String::as_str).collect());
        let is_key = |stray: &&Stray| keys.iter().any(|key| key.strip_prefix("env:") == Some(stray.name.as_str()));
        let strays = self.strays.iter().filter(|stray| !is_key(stray)).map(Stray::error);
        self.wrong.iter().cloned().chain(strays).collect()
    }

    /// What whoever set names of others should know.
    pub fn told(&self) -> &[String] {
        &self.told
    }

    /// The files that were read, the highest last.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The store that `typed` means: `env:` is the bucket of the environment, and one that is named is of the kind that the
    /// environment says.
    pub fn store(&self, typed: &str) -> Result<StoreUrl> {
        let (store, told) = self.of_store.resolve(typed)?;
        if let Some(told) = told {
            tracing::warn!("{told}");
        }
        Ok(store)
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
            if !spec.is_taken_by(takes::MOUNT) {
                return Err(Error::new(Code::Usage, format!("{} is no option of a mount", spec.name)));
            }
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
        refuse_all(self.file_each(path, must_exist))
    }

    /// The same: what can be understood is laid, and every error told.
    pub fn file_each(&mut self, path: &Path, must_exist: bool) -> Vec<Error> {
        let table = match read_table(path, must_exist) {
            Ok(Some(table)) => table,
            Ok(None) => return Vec::new(),
            Err(error) => return vec![error],
        };
        self.files.push(path.to_path_buf());
        let (mut errors, mut seen) = (Vec::new(), Vec::new());
        for (name, value) in table {
            let Some(spec) = find(&name) else {
                errors.push(unknown("option", &name, &path.display().to_string()));
                continue;
            };
            if seen.contains(&spec.name) {
                let text = format!("{} stands twice in {}, with - and with _; drop one", spec.name, path.display());
                errors.push(Error::new(Code::Usage, text));
            }
            seen.push(spec.name);
            match file_values(spec, value) {
                Ok(values) => self.put(spec, values, Origin::File(path.to_path_buf())),
                Err(e) => errors.push(e.context(format!("the configuration file {} is refused", path.display()))),
            }
        }
        errors
    }
}

/// None of them, or all of them in one: who mends the first need not come back for the second.
pub fn refuse_all(mut errors: Vec<Error>) -> Result<()> {
    match errors.len() {
        0 => Ok(()),
        1 => Err(errors.remove(0)),
        _ => {
            let code = errors[0].code();
            let texts: Vec<String> = errors.iter().map(Error::chain).collect();
            Err(Error::new(code, texts.join("; and ")))
        }
    }
}

fn split(spec: &OptionSpec, value: String) -> Vec<String> {
    if spec.kind == Kind::Many { split_list(&value) } else { vec![value] }
}

/// `None`: the file is not there and need not be.
fn read_table(path: &Path, must_exist: bool) -> Result<Option<toml::Table>> {
    use std::io::Read;
    let named = |what: &str| format!("the configuration file {} {what}", path.display());
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !must_exist => return Ok(None),
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
    text.parse().map(Some).map_err(|e: toml::de::Error| {
        let line = e.span().map_or(String::new(), |span| {
            format!(" (line {})", text[..span.start.min(text.len())].matches('\n').count() + 1)
        });
        Error::new(Code::Usage, format!("{}{line}: {}", named("is not TOML"), e.message()))
    })
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

fn unknown(what: &str, name: &str, place: &str) -> Error {
    let shown: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
    match nearest(&name.replace('_', "-"), OPTIONS.iter().map(|spec| spec.name)) {
        Some(best) => Error::new(Code::Usage, format!("unknown {what} `{shown}` in {place}; did you mean `{best}`?")),
        None => {
            Error::new(Code::Usage, format!("unknown {what} `{shown}` in {place}; `modelfs config options` lists them"))
        }
    }
}

/// Splits at commas; `\,` is a comma within a value, and a value may stand in double quotes, as mount(8) has it. Empty
/// pieces are dropped.
pub fn split_list(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut chars = text.chars().peekable();
    let mut quoted = false;
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted => quoted = false,
            '"' if pieces.last().is_some_and(|piece| piece.ends_with('=')) => quoted = true,
            '\\' if chars.peek() == Some(&',') => {
                chars.next();
                pieces.last_mut().expect("never empty").push(',');
            }
            ',' if !quoted => pieces.push(String::new()),
            c => pieces.last_mut().expect("never empty").push(c),
        }
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

/// Words that mount(8), fstab and systemd put into `-o` for themselves, sorted.
pub const MOUNT_WORDS: &[&str] = &[
    "_netdev",
    "async",
    "atime",
    "auto",
    "comment",
    "default_permissions",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "fsname",
    "group",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noatime",
    "noauto",
    "nodev",
    "nodiratime",
    "noexec",
    "nofail",
    "nogroup",
    "noiversion",
    "nolazytime",
    "nomand",
    "noowner",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "nouser",
    "nousers",
    "owner",
    "relatime",
    "remount",
    "ro",
    "rw",
    "silent",
    "strictatime",
    "subtype",
    "suid",
    "symfollow",
    "sync",
    "user",
    "users",
];

fn is_mount_word(name: &str) -> bool {
    MOUNT_WORDS.contains(&name) || name.starts_with("x-") || name.starts_with("X-")
}

/// The words that ask for what this filesystem never is, each with what it is. As mount(8) has it, the last of two
/// contrary words counts.
pub fn mount_flags_not_kept(words: &[String]) -> Vec<(&'static str, &'static str)> {
    const CONTRARY: [(&str, &str); 4] = [("rw", "ro"), ("suid", "nosuid"), ("dev", "nodev"), ("exec", "noexec")];
    let last = |(asked, is): &(&str, &str)| words.iter().rfind(|word| word == asked || word == is);
    CONTRARY.into_iter().filter(|pair| last(pair).is_some_and(|word| word == pair.0)).collect()
}

/// Options of ours among `words`, each in one spelling.
pub fn own_words(words: &[String]) -> Vec<String> {
    // A remount may bring the words by which the kernel describes a FUSE mount; where the first is, they all are its.
    const OF_KERNEL: [&str; 5] = ["user_id", "group_id", "allow_other", "max_read", "blksize"];
    let by_kernel = words.iter().any(|word| word.starts_with("user_id="));
    let own = words.iter().filter_map(|word| {
        let (name, value) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
        if is_mount_word(name) || by_kernel && OF_KERNEL.contains(&name) {
            return None;
        }
        let name = name.replace('_', "-");
        Some(value.map_or(name.clone(), |value| format!("{name}={value}")))
    });
    own.collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        split_list(text)
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
        layers.environment(&[], |name| match name {
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
        layers.environment(&[], |name| (name == "MODELFS_CACHE").then(|| "8Gx".into()));
        let err = layers.parse("cache", super::super::units::parse_size).expect_err("bad size");
        assert_eq!(err.chain(), "MODELFS_CACHE: `8Gx` is not a size; write 8GiB, 8G, 8GB, 512MiB or bytes");
    }

    #[test]
    fn a_comma_within_a_value_is_written_with_a_backslash() {
        assert_eq!(split_list(r"key=file:/a\,b,,ro"), ["key=file:/a,b", "ro"]);
        assert_eq!(split_list(r#"key="file:/a,b",model="x",ro"#), ["key=file:/a,b", "model=x", "ro"]);
    }

    #[test]
    fn words_of_mount_8_are_passed_over_and_none_of_them_is_an_option_of_ours() {
        assert!(MOUNT_WORDS.is_sorted());
        let all =
            format!("{},x-systemd.automount,X-mount.mkdir=0755,comment=all of it,user=ann", MOUNT_WORDS.join(","));
        let mut layers = Layers::default();
        layers.mount_options(&words(&all), false).expect("known to mount(8)");
        assert!(layers.said.is_empty());
        for word in MOUNT_WORDS {
            assert!(find(word).is_none(), "{word} means two things");
        }
        Layers::default().mount_options(&words("commentary"), false).expect_err("not a word of mount(8)");
    }

    #[test]
    fn flags_that_cannot_be_kept_are_told_and_the_last_of_two_counts() {
        assert_eq!(mount_flags_not_kept(&words("rw,exec,nodev")), [("rw", "ro"), ("exec", "noexec")]);
        assert_eq!(mount_flags_not_kept(&words("exec,rw,ro,noexec,suid,nosuid")), []);
    }

    #[test]
    fn options_of_ours_are_told_from_words_of_mount_8_in_one_spelling() {
        let text = "rw,allow_other,remount,fetch_budget=9s,x-a=b,_netdev,key=file:/a_b";
        assert_eq!(own_words(&words(text)), ["allow-other", "fetch-budget=9s", "key=file:/a_b"]);
        let of_kernel = "ro,remount,user_id=0,group_id=0,default_permissions,allow_other,cache=1G";
        assert_eq!(own_words(&words(of_kernel)), ["cache=1G"]);
    }
}
