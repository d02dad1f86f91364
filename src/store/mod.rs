//! Where bytes come from and go to: one trait to read, one to publish, several stores, decorators around them.
//!
//! In: object names (never file names) and byte ranges. Out: exactly the bytes asked for, or an error with a code.
//! Promises: every byte that leaves here is hostile until `crypto` has opened it; nothing here buffers more than was
//! asked for; nothing waits without a bound (`patient`); an object once created is never overwritten, hints excepted.
//! Not here: what the bytes mean (`format`), whether they are true (`crypto`), which of them to keep (`cache`).
//! Spec: docs/FORMAT.md a.1, a.3, b.1. Held by: tests/store_contract.rs (one suite over every store),
//! tests/hostile_http.rs (THREAT_MODEL (f) rows 13 to 18).

pub(crate) mod beneath;
pub mod credentials;
mod env_credentials;
pub mod fault;
pub mod hedge;
pub mod limit;
pub mod local;
pub mod memory;
mod openings;
pub mod pace;
pub mod patient;
pub mod s3;
mod wire;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use crate::error::{Code, Error, Result};
use crate::format::{self, ChunkIndex, Manifest, Oid};
use crate::refuse;
use crate::telemetry::Telemetry;

pub use credentials::{IssueCredentials, Issued, LeasedCredentials, tell_kept};
pub use env_credentials::{ENV_CREDENTIALS, EnvCredentials};
pub use hedge::{Hedged, Progress};
pub use limit::{Limiter, OriginLimits};
pub use openings::Openings;
pub use patient::{Patience, Patient};

/// Longest object name, in bytes. The longest the format makes is 64 + 3 + 64 + 21 bytes; S3 allows 1024 with the
/// bucket's prefix.
pub const NAME_BYTES_MAX: usize = 512;

/// Deepest folder below the root of a store. The format uses four.
pub const NAME_DEPTH_MAX: usize = 12;

/// Most names one listing answers: some 200 MB of them. Listings are asked for by model, whose objects number in the
/// thousands; only a hostile or a foreign store reaches this.
pub const LIST_NAMES_MAX: usize = 1_000_000;

/// Pieces shorter than this are gathered into larger ones: a store that answers byte by byte must not cost a
/// reference-counted piece for each byte.
const PIECE_BYTES_MIN: usize = 16 << 10;

/// One object below a prefix, as the store tells it. The size is a claim, not a fact.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    pub name: String,
    pub size: u64,
}

/// A store that can be read.
///
/// # Contract
/// - **Names** are those of FORMAT a.1: relative, `/` between components, ASCII letters, digits, `.`, `_` and `-`. Any
///   other name is refused with `Code::Usage` before anything is asked of the store ([`check_name`]).
/// - **Never short.** `read_range` gives exactly the bytes asked for. Fewer, more, a whole body instead of a range, or
///   another range than asked for, is `Code::Length`; so is a range that reaches past the end of the object.
/// - **Never more in memory than asked.** An endless answer is cut off at the length asked for (`Code::Length`), or at
///   `max` (`Code::Limit`).
/// - **Hostile.** Nothing is promised about what the bytes are. No checksum, ETag or version of the store is believed.
/// - **Not there** is `Code::NotFound`; no right to it is `Code::StoreDenied`; no answer is `Code::Unreachable` or
///   `Code::Deadline`; an answer that is never followed or decoded (redirect, Content-Encoding, broken listing) is
///   `Code::StoreAnswer`.
/// - **No secrets** in `describe` or in any error: no keys, no tokens, no query strings.
///
/// # Cancel safety
/// Every method may be dropped at any await point; nothing is left behind but work already sent to the store.
#[async_trait]
pub trait ChunkSource: Send + Sync + fmt::Debug {
    /// The bytes `range` of `name`, in the pieces in which they arrived; the sum of the lengths is that of `range`.
    /// An empty range is `Code::Usage`.
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>>;

    /// The whole of a small object; `Code::Limit` as soon as it is longer than `max` bytes.
    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes>;

    /// `read_range`, and `progress` is told of the body's bytes as they arrive, where the store can tell.
    async fn read_range_watched(&self, name: &str, range: Range<u64>, progress: &Progress) -> Result<Vec<Bytes>> {
        let pieces = self.read_range(name, range).await?;
        progress.add(pieces.iter().map(|piece| piece.len() as u64).sum());
        Ok(pieces)
    }

    /// `read_small`, likewise.
    async fn read_small_watched(&self, name: &str, max: u64, progress: &Progress) -> Result<Bytes> {
        let bytes = self.read_small(name, max).await?;
        progress.add(bytes.len() as u64);
        Ok(bytes)
    }

    /// How long the store says the object is.
    async fn size(&self, name: &str) -> Result<u64>;

    /// Every object below `prefix` at any depth, sorted by name. `prefix` is empty (the whole store) or ends in `/`.
    /// A prefix with nothing below it lists nothing, which is not an error. Names no writer of ours could have made
    /// are left out. More than [`LIST_NAMES_MAX`] names are `Code::Limit`.
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>>;

    /// The next component of every name below `prefix` that has another one after it, sorted, each once.
    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>>;

    /// The store's URL for people.
    fn describe(&self) -> String;
}

/// A store that can be published to.
///
/// # Contract
/// - **Create-only.** `create` never replaces an object: when one with other bytes is there the answer is
///   `Code::Exists`; when the very same bytes are there it is success, so an attempt whose answer was lost can be made
///   again. Objects that `begin` writes have random names that nobody else can know, and are written once.
/// - **All or nothing.** An object is visible whole or not at all, whatever dies in between.
/// - **Durable.** When a writing call has answered Ok, the object survives a power cut as far as the store promises.
/// - Only `replace_hint` overwrites, and nothing may depend on what a hint says.
#[async_trait]
pub trait ChunkSink: ChunkSource {
    async fn create(&self, name: &str, bytes: Bytes) -> Result<()>;

    /// Starts a data object of at most `stored_len_max` bytes; it becomes visible when `finish` answers Ok.
    async fn begin(&self, name: &str, stored_len_max: u64) -> Result<Box<dyn ObjectWriter>>;

    async fn replace_hint(&self, name: &str, bytes: Bytes) -> Result<()>;

    /// Removes an object; one that is not there is success.
    async fn delete(&self, name: &str) -> Result<()>;

    /// Proves that the store keeps the promise of `create` before anything is entrusted to it: makes an object of a
    /// random name and makes it again with other bytes. `Code::StoreUnfit` when the second one is
    /// not refused (THREAT_MODEL (f) row 74).
    async fn check_create_only(&self) -> Result<()> {
        let name = format::names::probe(&random_16()?);
        self.create(&name, Bytes::from_static(b"modelfs probe 1\n")).await?;
        let second = self.create(&name, Bytes::from_static(b"modelfs probe 2\n")).await;
        // A publisher may well have no right to delete; the probe then stays, and that proves nothing.
        let _ = self.delete(&name).await;
        match second {
            Err(refused) if refused.code() == Code::Exists => Ok(()),
            Err(other) => Err(other.context(format!("cannot tell whether {} keeps objects", self.describe()))),
            Ok(()) => refuse!(
                StoreUnfit,
                "store {} let a second create replace the first one; publish to a store that honours If-None-Match",
                self.describe()
            ),
        }
    }
}

/// A data object on its way to the store. Dropping it without `finish` publishes nothing.
#[async_trait]
pub trait ObjectWriter: Send {
    /// Takes the next bytes of the object. `Code::Length` when they exceed the length given to `begin`. After an error
    /// the writer is of no more use and must be aborted or dropped.
    async fn write(&mut self, piece: Bytes) -> Result<()>;

    /// Publishes the object; `Code::Length` when not exactly `stored_len` bytes were written.
    async fn finish(self: Box<Self>, stored_len: u64) -> Result<()>;

    /// Gives up and frees what the store keeps of it, as far as the store answers.
    async fn abort(self: Box<Self>);
}

/// A chunk as the store sent it: hostile, of the right length, and saying which chunk it claims to be.
///
/// Only `crypto::open_chunk` turns it into something to be believed.
#[derive(Debug, Clone)]
pub struct CipherChunk {
    pub object: Oid,
    pub index: ChunkIndex,
    /// In the order of the chunk; the lengths add up to the stored length of the chunk when a contract-keeping store
    /// made it, which its reader checks again.
    pub pieces: Vec<Bytes>,
}

impl CipherChunk {
    pub fn stored_len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len() as u64).sum()
    }
}

/// One chunk of a data object, whole. The range is the manifest's; the object's own header is never asked for.
pub async fn fetch_chunk(
    source: &dyn ChunkSource,
    manifest: &Manifest,
    object: u32,
    index: ChunkIndex,
) -> Result<CipherChunk> {
    let oid = manifest.objects()[object as usize].oid;
    let name = format::names::data(manifest.header().model_id, oid);
    let pieces = source.read_range(&name, manifest.chunk_stored(object, index)).await?;
    Ok(CipherChunk { object: oid, index, pieces })
}

/// Where a store is. Parsed once, shown to people, never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StoreUrl {
    /// A folder of this machine.
    Local(PathBuf),
    /// A bucket and a prefix in it (empty, or components without a `/` at either end).
    S3 { bucket: String, prefix: String },
    /// A Vault KV path whose records name models of buckets: to be mounted and listed, and no store by itself.
    VaultKv { mount: String, path: String },
}

impl std::str::FromStr for StoreUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        const SUPPORTED: &str = "supported are a path, file:///path and s3://bucket/prefix";
        if let Some(rest) = text.strip_prefix(VAULT_KV) {
            let (mount, path) = check_kv_path(rest)?;
            return Ok(StoreUrl::VaultKv { mount: mount.to_owned(), path: path.to_owned() });
        }
        if text.is_empty() || text.contains('\0') {
            refuse!(Usage, "the store is an empty word; {SUPPORTED}");
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            if rest.contains(['?', '#', '@']) {
                refuse!(Usage, "store URL s3://… holds options or credentials; put those into AWS_ variables");
            }
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            check_bucket(bucket)?;
            let prefix = prefix.trim_end_matches('/');
            if !prefix.is_empty() {
                check_name(prefix).map_err(|e| e.context(format!("prefix of store {text} cannot be used")))?;
            }
            return Ok(StoreUrl::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() });
        }
        if let Some(rest) = text.strip_prefix("file:") {
            let Some(path) = rest.strip_prefix("//").filter(|path| path.starts_with('/')) else {
                refuse!(Usage, "store URL {text} names no absolute path; write file:///path, or the path alone");
            };
            if path.contains('%') {
                refuse!(Usage, "store URL {text} has percent signs; write the path alone instead");
            }
            return Ok(StoreUrl::Local(tidy_path(path)));
        }
        if let Some(scheme) = ["s3", "s3a", "gs", "az", "http", "https"].iter().find(|scheme| {
            text.strip_prefix(**scheme).is_some_and(|rest| rest.starts_with(':') && !rest.starts_with("://"))
        }) {
            refuse!(Usage, "store {text:?} looks like a URL without its slashes; write {scheme}://…, or ./{text}");
        }
        match text.split_once("://") {
            Some((scheme, _)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b)) => {
                refuse!(Usage, "stores of kind {scheme}:// are not supported by this version; {SUPPORTED}")
            }
            Some(_) | None => Ok(StoreUrl::Local(tidy_path(text))),
        }
    }
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreUrl::Local(path) if path.is_absolute() => write!(f, "file://{}", path.display()),
            StoreUrl::Local(path) => write!(f, "{}", path.display()),
            StoreUrl::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            StoreUrl::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            StoreUrl::VaultKv { mount, path } => write!(f, "{VAULT_KV}{mount}/{path}"),
        }
    }
}

const VAULT_KV: &str = "vault-kv://";

/// Mount and path of a catalog, without anything that a URL would read as something else than a word of the path.
fn check_kv_path(rest: &str) -> Result<(&str, &str)> {
    let plain = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.len() <= 255
            && part.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.+=,~".contains(&c))
    };
    match rest.trim_end_matches('/').split_once('/') {
        Some((mount, path)) if plain(mount) && path.len() <= 512 && path.split('/').all(plain) => Ok((mount, path)),
        _ => refuse!(
            Usage,
            "a catalog is {VAULT_KV}MOUNT/PATH, as in {VAULT_KV}secret/models, in words of letters, digits and -_.+=,~"
        ),
    }
}

/// Trailing slashes make the kernel follow a symlink in the last component, which is exactly what must be seen.
fn tidy_path(path: &str) -> PathBuf {
    let short = path.trim_end_matches('/');
    PathBuf::from(if short.is_empty() { "/" } else { short })
}

fn check_bucket(bucket: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-';
    let edges = [bucket.as_bytes().first(), bucket.as_bytes().last()];
    if !(3..=63).contains(&bucket.len())
        || !bucket.bytes().all(plain)
        || edges.iter().flatten().any(|b| !b.is_ascii_alphanumeric())
        || bucket.contains("..")
    {
        refuse!(
            Usage,
            "{bucket:?} is no bucket name; 3 to 63 lower-case letters, digits, '-' and '.', as in s3://bucket/prefix"
        );
    }
    Ok(())
}

/// What `open` needs besides the URL.
#[derive(Clone, Default)]
pub struct StoreOptions {
    pub patience: Patience,
    /// S3 settings by the names of their environment variables (`AWS_ENDPOINT_URL`, ...). They win over the
    /// environment.
    pub aws: Vec<(String, String)>,
    /// Whether `AWS_…` variables of the process are left alone, so that only `aws` counts.
    pub ignore_environment: bool,
    /// Where hedged requests are counted.
    pub telemetry: Arc<Telemetry>,
    /// Sign with these; they win over all else that says who we are.
    pub credentials: Option<Arc<LeasedCredentials>>,
    /// What an origin is asked for at most, by all stores of this process that lie there and have the same limits.
    pub limits: OriginLimits,
}

impl fmt::Debug for StoreOptions {
    /// The names of the settings alone: their values hold keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.aws.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("StoreOptions")
            .field("patience", &self.patience)
            .field("aws", &names)
            .field("ignore_environment", &self.ignore_environment)
            .field("credentials", &self.credentials)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// The store at `url`, with patience around it, hedging where there is a network, and limits around all. Asks nothing of
/// the store yet.
///
/// # Errors
/// `Code::Usage` for settings that cannot work, `Code::StorePerms` for a local root that is a symlink.
pub fn open(url: &StoreUrl, opts: &StoreOptions) -> Result<Arc<dyn ChunkSink>> {
    let patience = opts.patience.clone();
    Ok(match url {
        StoreUrl::Local(path) => {
            let limiter = limiter(&path.display().to_string(), opts);
            limited(Patient::new(local::LocalStore::open(path)?, patience), limiter, false, opts)
        }
        StoreUrl::S3 { bucket, prefix } => {
            let (store, limiter) = (s3::S3Store::open(bucket, prefix, opts)?, limiter(&s3::origin(opts), opts));
            limited(Patient::new(Hedged::new(store, opts.telemetry.clone()), patience), limiter, true, opts)
        }
        StoreUrl::VaultKv { .. } => refuse!(
            Usage,
            "{url} is a catalog, not a store: `mount` and `ls` take it; for all else name the store that its record names"
        ),
    })
}

fn limiter(origin: &str, opts: &StoreOptions) -> Option<Arc<Limiter>> {
    Limiter::of(origin, &opts.limits)
}

/// `metered`: the wire below says what was really sent.
fn limited(
    store: impl ChunkSink + 'static,
    limiter: Option<Arc<Limiter>>,
    metered: bool,
    opts: &StoreOptions,
) -> Arc<dyn ChunkSink> {
    match limiter {
        Some(limiter) => Arc::new(limit::Limited::new(store, limiter, metered, opts.telemetry.clone())),
        None => Arc::new(store),
    }
}

/// Whether `name` can be an object's name in every store there is; `Code::Usage` says why not.
///
/// The alphabet is smaller than any store's: no escaping, no folding of cases or of Unicode forms, no `..`. A first
/// component that starts with a dot is the local store's own.
pub fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        refuse!(Usage, "object name of {} bytes; wanted 1 to {NAME_BYTES_MAX}", name.len());
    }
    if name.starts_with('.') {
        refuse!(Usage, "object name {name:?} starts with a dot");
    }
    let mut depth = 0;
    for component in name.split('/') {
        depth += 1;
        if !is_component(component) || depth > NAME_DEPTH_MAX {
            refuse!(Usage, "object name {name:?} has an empty, odd or too deep component");
        }
    }
    Ok(())
}

/// `check_name` for what `list` and `list_dirs` take.
fn check_prefix(prefix: &str) -> Result<()> {
    match prefix.strip_suffix('/') {
        None if prefix.is_empty() => Ok(()),
        None => refuse!(Usage, "listing prefix {prefix:?} does not end in '/'"),
        Some(folder) => check_name(folder),
    }
}

fn is_component(component: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=255).contains(&component.len()) && component != "." && component != ".." && component.bytes().all(plain)
}

/// The length of a range that was asked for, or `Code::Usage` for an empty or backward one.
fn range_len(name: &str, range: &Range<u64>) -> Result<usize> {
    match range.end.checked_sub(range.start).map(usize::try_from) {
        Some(Ok(len)) if len > 0 => Ok(len),
        _ => refuse!(Usage, "range {}..{} of {name} is empty or too long", range.start, range.end),
    }
}

/// What `list_dirs` says, taken from full names.
fn dirs_of<'a>(prefix: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let below = names.filter_map(|name| name.strip_prefix(prefix)?.split_once('/'));
    let mut dirs: Vec<String> = below.map(|(dir, _)| dir.to_owned()).collect();
    dirs.sort_unstable();
    dirs.dedup();
    dirs
}

/// 128 random bits, for names that nobody can guess or meet again.
fn random_16() -> Result<[u8; 16]> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::new(Code::Host, "no random numbers from the kernel").with_source(e))?;
    Ok(bytes)
}

/// The one place where bytes off a wire pile up: counts them against what was asked for and gathers crumbs.
struct Pieces {
    pieces: Vec<Bytes>,
    crumbs: BytesMut,
    taken: u64,
    wanted: u64,
}

impl Pieces {
    fn new(wanted: u64) -> Self {
        Pieces { pieces: Vec::new(), crumbs: BytesMut::new(), taken: 0, wanted }
    }

    /// Takes a piece; false, and nothing kept, when it is more than was asked for.
    fn push(&mut self, piece: Bytes) -> bool {
        if self.wanted - self.taken < piece.len() as u64 {
            return false;
        }
        self.taken += piece.len() as u64;
        if piece.len() < PIECE_BYTES_MIN {
            self.crumbs.extend_from_slice(&piece);
        } else {
            self.flush();
            self.pieces.push(piece);
        }
        if self.crumbs.len() >= 4 * PIECE_BYTES_MIN {
            self.flush();
        }
        true
    }

    fn flush(&mut self) {
        if !self.crumbs.is_empty() {
            self.pieces.push(self.crumbs.split().freeze());
        }
    }

    fn taken(&self) -> u64 {
        self.taken
    }

    fn finish(mut self) -> Vec<Bytes> {
        self.flush();
        self.pieces
    }

    fn into_one(self) -> Bytes {
        let mut pieces = self.finish();
        if pieces.len() == 1 {
            return pieces.remove(0);
        }
        let mut whole = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
        pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
        whole.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::ModelId;

    #[test]
    fn store_urls_parse_and_show_themselves() {
        for (text, shown) in [
            ("/srv/models", "file:///srv/models"),
            ("/srv/models///", "file:///srv/models"),
            ("file:///srv/models", "file:///srv/models"),
            ("./store", "./store"),
            ("store", "store"),
            ("/", "file:///"),
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/", "s3://bucket"),
            ("s3://my-bucket/team/models/", "s3://my-bucket/team/models"),
            ("vault-kv://secret/team/models/", "vault-kv://secret/team/models"),
        ] {
            let url: StoreUrl = text.parse().expect(text);
            assert_eq!(url.to_string(), shown);
        }
    }

    #[test]
    fn other_store_urls_are_refused_with_a_hint() {
        for text in [
            "",
            "gs://bucket/x",
            "https://host/x",
            "az://c/x",
            "file://host/path",
            "file:relative",
            "s3:bucket/x",
            "s3:/bucket/x",
            "file:///a%20b",
            "s3://",
            "s3://ab",
            "s3://Bucket/x",
            "s3://bucket/../x",
            "s3://bucket//x",
            "s3://key:secret@bucket/x",
            "s3://bucket/x?endpoint=http://evil",
            "s3://bucket/.hidden",
            "vault-kv://",
            "vault-kv://secret",
            "vault-kv://secret/",
            "vault-kv:///x",
            "vault-kv://s/a//b",
            "vault-kv://s/../b",
            "vault-kv://s/a?version=1",
            "vault-kv://s/a#f",
            "vault-kv://s/a%2fb",
            "vault-kv://user:pw@host/x",
        ] {
            let err = text.parse::<StoreUrl>().expect_err(text);
            assert_eq!(err.code(), Code::Usage, "{text}: {err:?}");
        }
    }

    #[test]
    fn neither_options_nor_stores_show_keys_when_debugged() {
        let aws = [("AWS_ACCESS_KEY_ID", "canary-id"), ("AWS_SECRET_ACCESS_KEY", "canary-secret")];
        let aws = aws.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let opts = StoreOptions { aws, ignore_environment: true, ..StoreOptions::default() };
        let store = open(&"s3://models/x".parse().expect("a URL"), &opts).expect("settings");
        for text in [format!("{opts:?}"), format!("{store:?}"), store.describe()] {
            assert!(!text.contains("canary"), "{text}");
        }
    }

    #[test]
    fn names_outside_the_small_alphabet_are_refused() {
        for good in ["a", "a/b/c", "0f/d/ab", "a/r/prod/head", "a/r/v1.2_x-y/0001", "a/.b"] {
            check_name(good).expect(good);
        }
        let long = "a".repeat(513);
        let deep = ["a"; 13].join("/");
        for bad in
            ["", "/a", "a/", "a//b", "a/./b", "a/../b", "..", ".staging/x", "a b", "a\\b", "ä", "a\nb", "a\0b", "a%2fb"]
                .into_iter()
                .chain([long.as_str(), deep.as_str()])
        {
            assert_eq!(check_name(bad).expect_err(bad).code(), Code::Usage, "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_chunk_is_fetched_from_where_the_manifest_says() {
        let layout = format::ObjectLayout::new((2 << 20) + 5, 16, 20).expect("a layout");
        for coded in [None, Some(vec![1 << 20, 700_001, 2])] {
            let object = format::NewObject {
                oid: Oid([3; 32]),
                layout,
                suite: format::Suite::Aes256Gcm,
                inherited: false,
                origin_vid: format::Vid([4; 16]),
                commit: [5; 32],
                hashes: vec![[0; 32]; 3],
                coded,
            };
            let stored: Vec<u8> = (0..object.stored_len().expect("lengths")).map(|i| (i % 251) as u8).collect();
            let (oid, model) = (object.oid, ModelId::of_name("acme/model"));
            let manifest = manifest_of(object, model);
            let store = memory::MemoryStore::new();
            store.put(&format::names::data(model, oid), stored.clone());

            let mut at = 128;
            for index in 0..3 {
                let chunk = fetch_chunk(&store, &manifest, 0, ChunkIndex(index)).await.expect("there");
                assert_eq!((chunk.object, chunk.index), (oid, ChunkIndex(index)));
                let bytes = chunk.pieces.concat();
                assert_eq!(bytes, stored[at..at + bytes.len()]);
                at += bytes.len();
            }
            assert_eq!(at, stored.len(), "the chunks are the object without its header");
        }
    }

    fn manifest_of(object: format::NewObject, model_id: ModelId) -> Manifest {
        let len = object.layout.plain_len();
        let mut builder = format::ManifestBuilder::new();
        let object = builder.add_object(object);
        builder.add_file(format::NewFile {
            path: "weights".into(),
            mode: 0o444,
            size: len,
            sha256: [6; 32],
            mtime: 0,
            extents: vec![format::Extent { object, object_offset: 0, len }],
        });
        let head = format::NewHeader {
            suite: format::Suite::Aes256Gcm,
            hash_alg: format::HashAlg::Blake3,
            model_id,
            vid: format::Vid([4; 16]),
            seq: 1,
            created_at: 0,
            msalt: [0; 32],
            previous: None,
        };
        builder.finish(head).expect("a manifest")
    }

    #[test]
    fn pieces_stop_at_what_was_asked_and_gather_crumbs() {
        let mut pieces = Pieces::new(100_000);
        for _ in 0..1000 {
            assert!(pieces.push(Bytes::from_static(&[7; 100])));
        }
        assert!(!pieces.push(Bytes::from_static(&[7])), "one byte too many is not kept");
        assert_eq!(pieces.taken(), 100_000);
        let kept = pieces.finish();
        assert!(kept.len() <= 2, "{} pieces", kept.len());
        assert_eq!(kept.iter().map(Bytes::len).sum::<usize>(), 100_000);
    }
}
