//! A store in an S3 bucket, over `object_store` for requests and signatures and `wire` for what is believed.
//!
//! In: `s3://bucket/prefix` and the `AWS_…` settings. Out: as the traits say.
//! Promises: plain HTTP only where the settings say so; a part of an upload is kept until the store has acknowledged it,
//! and what is sent again is those bytes; nothing of an upload is visible before it is complete; an ETag is carried where
//! the protocol wants it and believed nowhere.
//! Not here: deadlines and retries of whole calls (`patient`), the rules of the wire (`wire`).
//! Held by: tests/store_contract.rs against a real server, tests/hostile_http.rs.

use std::collections::VecDeque;
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    ClientConfigKey, GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    RetryConfig,
};
use tokio::task::JoinSet;

use super::env_credentials::{ENV_CREDENTIALS, EnvCredentials};
use super::patient::{Attempt, Patience};
use super::wire::{Wire, told};
use super::{
    ChunkSink, ChunkSource, LIST_NAMES_MAX, Listed, ObjectWriter, Pieces, Progress, StoreOptions, check_name,
    check_prefix, is_component, range_len,
};
use crate::error::{Class, Code, Error, Result};
use crate::refuse;

/// The smallest part of an upload; S3 wants at least 5 MiB, and all but the last of one size.
const PART_BYTES_MIN: u64 = 8 << 20;

/// Most parts of one upload: S3 takes 10,000, which leaves room for stores that count otherwise.
const PARTS_MAX: u64 = 9_000;

/// Parts of one object on their way at once: with the part that fills, 5 parts of memory for each writer.
const PARTS_IN_FLIGHT: usize = 4;

/// Pages of one listing. A store that pages on for ever ends here, or at the deadline.
const LIST_PAGES_MAX: usize = LIST_NAMES_MAX / 100;

#[derive(Clone)]
pub struct S3Store {
    s3: AmazonS3,
    bucket: String,
    /// Empty, or ends in `/`.
    prefix: String,
    patience: Patience,
}

impl fmt::Debug for S3Store {
    /// The URL alone: what `object_store` shows of itself holds keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3Store({})", self.describe())
    }
}

impl S3Store {
    /// Checks the settings; asks nothing of the store.
    pub fn open(bucket: &str, prefix: &str, opts: &StoreOptions) -> Result<Self> {
        let environment = environment_credentials(opts)?;
        let mut builder = settings(opts)?;
        let setting = |key: AmazonS3ConfigKey| builder.get_config_value(&key).filter(|value| !value.is_empty());
        if setting(AmazonS3ConfigKey::S3Express).is_some_and(|v| v == "true") {
            refuse!(Usage, "S3 Express buckets (AWS_S3_EXPRESS) are not supported by this version");
        }
        let endpoint = setting(AmazonS3ConfigKey::S3Endpoint).or_else(|| setting(AmazonS3ConfigKey::Endpoint));
        let region = setting(AmazonS3ConfigKey::Region).unwrap_or_else(|| "us-east-1".to_owned());
        let allow_http = setting(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp)).is_some_and(|v| v == "true");
        let (store_hosts, plain_http) = match &endpoint {
            Some(endpoint) => endpoint_host(endpoint, allow_http)?,
            None => {
                let home = format!("s3.{region}.amazonaws.com");
                (vec![(format!("{bucket}.{home}"), 443), (home, 443)], false)
            }
        };
        if let Some(credentials) = &opts.credentials {
            // Asked for by name: what else the environment says of credentials, or of none, does not count.
            builder = builder.with_credentials(credentials.clone()).with_skip_signature(false);
        } else if let Some(credentials) = environment {
            builder = builder.with_credentials(credentials);
        }
        let s3 = builder
            .with_bucket_name(bucket)
            .with_allow_http(plain_http)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_disable_bulk_delete(true)
            // `patient` tries again, with one budget for all; here every answer is told as it is.
            .with_retry(RetryConfig { max_retries: 0, retry_timeout: Duration::ZERO, ..RetryConfig::default() })
            .with_http_connector(Wire {
                store_hosts,
                stall: opts.patience.stall,
                credentials: opts.credentials.clone(),
                limiter: super::limiter(&origin(opts), opts),
            })
            .build()
            .map_err(|e| Error::new(Code::Usage, format!("store s3://{bucket} cannot be set up: {e}")))?;
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(S3Store { s3, bucket: bucket.to_owned(), prefix, patience: opts.patience.clone() })
    }

    fn path(&self, name: &str) -> Result<Path> {
        check_name(name)?;
        Path::parse(format!("{}{name}", self.prefix))
            .map_err(|e| Error::new(Code::Usage, format!("object name {name:?}: {e}")))
    }

    /// An error told of `name`.
    fn of(&self, name: &str, error: &object_store::Error) -> Error {
        told(error).context(format!("object {name} in {}", self.describe()))
    }

    async fn put(&self, name: &str, payload: PutPayload, mode: PutMode) -> Result<()> {
        let opts = PutOptions { mode, ..PutOptions::default() };
        self.s3.put_opts(&self.path(name)?, payload, opts).await.map_err(|e| self.of(name, &e))?;
        Ok(())
    }

    /// Every page below `prefix`, each name and each folder without the store's own prefix.
    async fn pages(
        &self,
        prefix: &str,
        delimiter: bool,
        mut tell: impl FnMut(&str, Option<u64>) -> Result<()>,
    ) -> Result<()> {
        check_prefix(prefix)?;
        let below = format!("{}{prefix}", self.prefix);
        let mut page_token = None;
        for _ in 0..LIST_PAGES_MAX {
            let opts = PaginatedListOptions {
                delimiter: delimiter.then_some("/".into()),
                page_token: page_token.take(),
                ..PaginatedListOptions::default()
            };
            let wanted = (!below.is_empty()).then_some(below.as_str());
            let page = self.s3.list_paginated(wanted, opts).await.map_err(|e| self.of(prefix, &e))?;
            for folder in &page.result.common_prefixes {
                // A name outside what was asked for is the server's lie, or a folder marker: neither is an object.
                if let Some(name) = folder.as_ref().strip_prefix(self.prefix.as_str()) {
                    tell(name, None)?;
                }
            }
            for object in &page.result.objects {
                if let Some(name) = object.location.as_ref().strip_prefix(self.prefix.as_str()) {
                    tell(name, Some(object.size))?;
                }
            }
            page_token = page.page_token;
            if page_token.is_none() {
                return Ok(());
            }
        }
        refuse!(Limit, "listing {prefix:?} of {} has more than {LIST_PAGES_MAX} pages", self.describe())
    }
}

/// Those of the environment, unless `opts` say who we are. They leave the environment in any case: it shows them to others.
fn environment_credentials(opts: &StoreOptions) -> Result<Option<Arc<EnvCredentials>>> {
    if opts.ignore_environment {
        return Ok(None);
    }
    let named = |(name, _): &(String, String)| ENV_CREDENTIALS.contains(&name.to_ascii_uppercase().as_str());
    let told = opts.credentials.is_some() || opts.aws.iter().any(named);
    match EnvCredentials::taken() {
        Ok(taken) => Ok(taken.filter(|_| !told)),
        // Half a set that nobody asks for stands in nobody's way.
        Err(_) if told => Ok(None),
        Err(half) => Err(half),
    }
}

/// The settings of the environment, and above them those of `opts`. The credentials of the environment are not among them
/// once they were taken.
fn settings(opts: &StoreOptions) -> Result<AmazonS3Builder> {
    let mut builder = if opts.ignore_environment { AmazonS3Builder::new() } else { AmazonS3Builder::from_env() };
    for (name, value) in &opts.aws {
        let Ok(key) = AmazonS3ConfigKey::from_str(&name.to_ascii_lowercase()) else {
            refuse!(Usage, "{name} is no S3 setting");
        };
        builder = builder.with_config(key, value);
    }
    Ok(builder)
}

/// The service, whichever its buckets.
pub(super) fn origin(opts: &StoreOptions) -> String {
    const WHERE: [&str; 3] = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_REGION"];
    let said = opts.aws.iter().filter(|(name, _)| WHERE.iter().any(|it| it.eq_ignore_ascii_case(name)));
    said.fold("s3".to_owned(), |origin, (name, value)| format!("{origin} {name}={value}"))
}

/// Where the store answers, as a URL without anything secret in it; what [`S3Store::open`] refuses is `None`.
pub fn endpoint(opts: &StoreOptions) -> Option<String> {
    let builder = settings(opts).ok()?;
    let setting = |key: AmazonS3ConfigKey| builder.get_config_value(&key).filter(|value| !value.is_empty());
    match setting(AmazonS3ConfigKey::S3Endpoint).or_else(|| setting(AmazonS3ConfigKey::Endpoint)) {
        Some(endpoint) => endpoint_host(&endpoint, true).ok().map(|_| endpoint),
        None => {
            let region = setting(AmazonS3ConfigKey::Region).unwrap_or_else(|| "us-east-1".to_owned());
            Some(format!("https://s3.{region}.amazonaws.com"))
        }
    }
}

/// The endpoint's host and port, and whether it is plain HTTP. That is allowed on this machine, or when asked for by name.
fn endpoint_host(endpoint: &str, allow_http: bool) -> Result<(Vec<(String, u16)>, bool)> {
    let Ok(url) = url::Url::parse(endpoint) else {
        refuse!(Usage, "AWS_ENDPOINT_URL is no URL; write it as https://host or http://host:port");
    };
    let Some(host) = url.host_str() else { refuse!(Usage, "AWS_ENDPOINT_URL names no host") };
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        refuse!(Usage, "AWS_ENDPOINT_URL holds credentials or options; only scheme, host, port and path are used");
    }
    let plain = match url.scheme() {
        "https" => false,
        "http" => true,
        other => refuse!(Usage, "AWS_ENDPOINT_URL has scheme {other}; http and https are supported"),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let here = bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if plain && !here && !allow_http {
        refuse!(Usage, "endpoint http://{host} is not encrypted; use https, or set AWS_ALLOW_HTTP=true");
    }
    let port = url.port_or_known_default().unwrap_or(443);
    Ok((vec![(host.to_ascii_lowercase(), port)], plain))
}

#[async_trait]
impl ChunkSource for S3Store {
    async fn read_range(&self, name: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        self.read_range_watched(name, range, &Progress::start()).await
    }

    async fn read_range_watched(&self, name: &str, range: Range<u64>, progress: &Progress) -> Result<Vec<Bytes>> {
        let path = self.path(name)?;
        let len = range_len(name, &range)? as u64;
        let opts = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let answer = self.s3.get_opts(&path, opts).await.map_err(|e| self.of(name, &e))?;
        let mut pieces = Pieces::new(len);
        let mut stream = answer.into_stream();
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|e| self.of(name, &e))?;
            progress.add(piece.len() as u64);
            if !pieces.push(piece) {
                refuse!(Length, "store sent more than the {len} bytes asked for of {name}");
            }
        }
        if pieces.taken() != len {
            refuse!(Length, "store sent {} of {len} bytes of {name}", pieces.taken());
        }
        Ok(pieces.finish())
    }

    async fn read_small(&self, name: &str, max: u64) -> Result<Bytes> {
        self.read_small_watched(name, max, &Progress::start()).await
    }

    async fn read_small_watched(&self, name: &str, max: u64, progress: &Progress) -> Result<Bytes> {
        let path = self.path(name)?;
        let answer = self.s3.get_opts(&path, GetOptions::default()).await.map_err(|e| self.of(name, &e))?;
        let size = answer.meta.size;
        let too_long = || Error::new(Code::Limit, format!("object {name} is longer than {max} bytes"));
        if size > max {
            return Err(too_long());
        }
        let mut pieces = Pieces::new(max);
        let mut stream = GetResult::into_stream(answer);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|e| self.of(name, &e))?;
            progress.add(piece.len() as u64);
            if !pieces.push(piece) {
                return Err(too_long());
            }
        }
        if pieces.taken() != size {
            refuse!(Length, "store sent {} of {size} bytes of {name}", pieces.taken());
        }
        Ok(pieces.into_one())
    }

    async fn size(&self, name: &str) -> Result<u64> {
        let path = self.path(name)?;
        Ok(self.s3.head(&path).await.map_err(|e| self.of(name, &e))?.size)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>> {
        let mut found = Vec::new();
        self.pages(prefix, false, |name, size| {
            let Some(size) = size.filter(|_| name.starts_with(prefix) && check_name(name).is_ok()) else {
                return Ok(());
            };
            if found.len() == LIST_NAMES_MAX {
                refuse!(Limit, "more than {LIST_NAMES_MAX} objects below {prefix:?}");
            }
            found.push(Listed { name: name.to_owned(), size });
            Ok(())
        })
        .await?;
        found.sort_unstable();
        found.dedup_by(|a, b| a.name == b.name);
        Ok(found)
    }

    async fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        let mut dirs: Vec<String> = Vec::new();
        self.pages(prefix, true, |name, size| {
            let dir = name.strip_prefix(prefix).filter(|dir| size.is_none() && is_component(dir));
            let Some(dir) = dir.filter(|dir| !(prefix.is_empty() && dir.starts_with('.'))) else { return Ok(()) };
            if dirs.len() == LIST_NAMES_MAX {
                refuse!(Limit, "more than {LIST_NAMES_MAX} folders below {prefix:?}");
            }
            dirs.push(dir.to_owned());
            Ok(())
        })
        .await?;
        dirs.sort_unstable();
        dirs.dedup();
        Ok(dirs)
    }

    fn describe(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.prefix.trim_end_matches('/')).trim_end_matches('/').to_owned()
    }
}

#[async_trait]
impl ChunkSink for S3Store {
    async fn create(&self, name: &str, bytes: Bytes) -> Result<()> {
        match self.put(name, PutPayload::from(bytes.clone()), PutMode::Create).await {
            Err(there) if there.code() == Code::Exists => match self.read_small(name, bytes.len() as u64).await {
                // An attempt whose answer was lost may have made it: the same bytes are a success.
                Ok(stored) if stored == bytes => Ok(()),
                Ok(_) => Err(there),
                Err(longer) if longer.code() == Code::Limit => Err(there),
                // Refused as there and yet not to be read: someone else's create is not done, or it was deleted. Ask again.
                Err(gone) if gone.code() == Code::NotFound => {
                    refuse!(Unreachable, "object {name} is just being created or deleted by another")
                }
                Err(other) => Err(other),
            },
            other => other,
        }
    }

    async fn begin(&self, name: &str, stored_len_max: u64) -> Result<Box<dyn ObjectWriter>> {
        let path = self.path(name)?;
        let part_len = part_len(stored_len_max);
        // One part needs no upload of many parts: a plain create-only PUT, when all is there.
        let upload = if stored_len_max <= part_len {
            None
        } else {
            let id = self.s3.create_multipart(&path).await.map_err(|e| self.of(name, &e))?;
            Some(Arc::new(Upload { store: self.clone(), path, name: name.to_owned(), id }))
        };
        Ok(Box::new(Writer {
            store: self.clone(),
            name: name.to_owned(),
            stored_len_max,
            part_len,
            taken: 0,
            waiting: VecDeque::new(),
            waiting_len: 0,
            upload,
            next_part: 0,
            in_flight: JoinSet::new(),
            done: Vec::new(),
            settled: false,
        }))
    }

    async fn replace_hint(&self, name: &str, bytes: Bytes) -> Result<()> {
        self.put(name, PutPayload::from(bytes), PutMode::Overwrite).await
    }

    async fn delete(&self, name: &str) -> Result<()> {
        match self.s3.delete(&self.path(name)?).await.map_err(|e| self.of(name, &e)) {
            Err(gone) if gone.code() == Code::NotFound => Ok(()),
            other => other,
        }
    }
}

/// Whole units of `PART_BYTES_MIN`, as few as keep an object of `stored_len` within `PARTS_MAX` parts.
fn part_len(stored_len: u64) -> u64 {
    stored_len.div_ceil(PARTS_MAX * PART_BYTES_MIN).max(1) * PART_BYTES_MIN
}

struct Upload {
    store: S3Store,
    path: Path,
    name: String,
    id: String,
}

impl Upload {
    async fn put_part(&self, index: usize, part: PutPayload) -> Result<PartId> {
        let what = format!("upload part {index} of {}", self.name);
        let span = Attempt::Sending(part.content_length() as u64);
        let send = || async {
            let sent = self.store.s3.put_part(&self.path, &self.id, index, part.clone()).await;
            sent.map_err(|e| self.store.of(&self.name, &e))
        };
        self.store.patience.run(&what, span, send).await
    }

    async fn complete(&self, parts: Vec<PartId>, stored_len: u64) -> Result<()> {
        let what = format!("complete the upload of {}", self.name);
        let complete = || async {
            let done = self.store.s3.complete_multipart(&self.path, &self.id, parts.clone()).await;
            done.map(|_| ()).map_err(|e| self.store.of(&self.name, &e))
        };
        match self.store.patience.run(&what, Attempt::Single, complete).await {
            // The answer was lost: either no one knows, or a second try found no upload any more. The name is random
            // and the manifest will hold the hash of every chunk, so the right length there means that it is ours.
            Err(lost) if lost.class() == Class::Unreachable || lost.code() == Code::NotFound => {
                let asked = || self.store.size(&self.name);
                match self.store.patience.run(&what, Attempt::Single, asked).await {
                    Ok(size) if size == stored_len => Ok(()),
                    _ => Err(lost),
                }
            }
            other => other,
        }
    }

    /// Best effort: what is left is invisible, and the bucket's lifecycle rule removes it.
    async fn abort(&self) {
        let limit = self.store.patience.attempt;
        let _ = tokio::time::timeout(limit, self.store.s3.abort_multipart(&self.path, &self.id)).await;
    }
}

struct Writer {
    store: S3Store,
    name: String,
    stored_len_max: u64,
    part_len: u64,
    taken: u64,
    /// Pieces that do not fill a part yet.
    waiting: VecDeque<Bytes>,
    waiting_len: u64,
    upload: Option<Arc<Upload>>,
    next_part: usize,
    in_flight: JoinSet<Result<(usize, PartId)>>,
    done: Vec<(usize, PartId)>,
    /// Finished, or given up: nothing is left to abort.
    settled: bool,
}

impl Writer {
    /// The first `len` waiting bytes, without a copy.
    fn take(&mut self, len: u64) -> PutPayload {
        let mut pieces = Vec::new();
        let mut wanted = len;
        while wanted > 0 {
            let mut piece = self.waiting.pop_front().expect("the caller asks for no more than is waiting");
            if piece.len() as u64 > wanted {
                let rest = piece.split_off(wanted as usize);
                self.waiting.push_front(rest);
            }
            wanted -= piece.len() as u64;
            pieces.push(piece);
        }
        self.waiting_len -= len;
        PutPayload::from_iter(pieces)
    }

    async fn send(&mut self, upload: &Arc<Upload>, len: u64) -> Result<()> {
        while self.in_flight.len() >= PARTS_IN_FLIGHT {
            self.land().await?;
        }
        let (index, part, upload) = (self.next_part, self.take(len), Arc::clone(upload));
        self.next_part += 1;
        self.in_flight.spawn(async move { Ok((index, upload.put_part(index, part).await?)) });
        Ok(())
    }

    /// Waits for one part in flight.
    async fn land(&mut self) -> Result<()> {
        match self.in_flight.join_next().await {
            None => Ok(()),
            Some(Ok(part)) => {
                self.done.push(part?);
                Ok(())
            }
            Some(Err(died)) if died.is_panic() => std::panic::resume_unwind(died.into_panic()),
            Some(Err(_)) => refuse!(Stopping, "the runtime is stopping"),
        }
    }

    async fn publish(&mut self, stored_len: u64) -> Result<()> {
        if self.taken != stored_len {
            refuse!(Length, "object {} has {} of {stored_len} bytes written", self.name, self.taken);
        }
        let Some(upload) = self.upload.clone() else {
            let whole = self.take(self.waiting_len);
            return self.create_whole(whole).await;
        };
        if self.waiting_len > 0 {
            self.send(&upload, self.waiting_len).await?;
        }
        while !self.in_flight.is_empty() {
            self.land().await?;
        }
        self.done.sort_unstable_by_key(|(index, _)| *index);
        let parts = self.done.drain(..).map(|(_, id)| id).collect();
        upload.complete(parts, stored_len).await
    }

    async fn create_whole(&self, whole: PutPayload) -> Result<()> {
        let what = format!("create object {} in {}", self.name, self.store.describe());
        let mut tries = 0;
        let put = || {
            tries += 1;
            let again = tries > 1;
            let whole = whole.clone();
            async move {
                match self.store.put(&self.name, whole, PutMode::Create).await {
                    // Nobody else knows the name: an earlier attempt of ours was taken and its answer lost.
                    Err(there) if again && there.code() == Code::Exists => match self.store.size(&self.name).await {
                        Ok(size) if size == self.taken => Ok(()),
                        _ => Err(there),
                    },
                    other => other,
                }
            }
        };
        self.store.patience.run(&what, Attempt::Sending(self.taken), put).await
    }

    async fn give_up(&mut self) {
        self.settled = true;
        self.in_flight.shutdown().await;
        if let Some(upload) = &self.upload {
            upload.abort().await;
        }
    }
}

#[async_trait]
impl ObjectWriter for Writer {
    async fn write(&mut self, piece: Bytes) -> Result<()> {
        if self.taken + piece.len() as u64 > self.stored_len_max {
            let max = self.stored_len_max;
            refuse!(Length, "object {} was announced with at most {max} bytes, more were written", self.name);
        }
        if piece.is_empty() {
            return Ok(());
        }
        self.taken += piece.len() as u64;
        self.waiting_len += piece.len() as u64;
        self.waiting.push_back(piece);
        let Some(upload) = self.upload.clone() else { return Ok(()) };
        while self.waiting_len >= self.part_len {
            self.send(&upload, self.part_len).await?;
        }
        Ok(())
    }

    async fn finish(mut self: Box<Self>, stored_len: u64) -> Result<()> {
        let result = self.publish(stored_len).await;
        match &result {
            Ok(()) => self.settled = true,
            Err(_) => self.give_up().await,
        }
        result
    }

    async fn abort(mut self: Box<Self>) {
        self.give_up().await;
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Dropped without a word (a cancelled publish): the store should not keep the parts for ever.
        if let (false, Some(upload), Ok(runtime)) =
            (self.settled, self.upload.take(), tokio::runtime::Handle::try_current())
        {
            runtime.spawn(async move { upload.abort().await });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_below_the_limit_at_every_size() {
        for len in [1, PART_BYTES_MIN, PART_BYTES_MIN + 1, 1 << 30, PARTS_MAX * PART_BYTES_MIN, (1 << 40) + 12345] {
            let part = part_len(len);
            assert!(part.is_multiple_of(PART_BYTES_MIN) && len.div_ceil(part) <= PARTS_MAX, "{len}: {part}");
        }
        assert_eq!(part_len(PARTS_MAX * PART_BYTES_MIN), PART_BYTES_MIN);
        assert_eq!(part_len(PARTS_MAX * PART_BYTES_MIN + 1), 2 * PART_BYTES_MIN);
    }

    #[test]
    fn plain_http_is_for_this_machine_or_for_those_who_ask() {
        for (endpoint, allow, plain) in [
            ("http://127.0.0.1:9000", false, true),
            ("http://localhost:9000", false, true),
            ("http://[::1]:9000", false, true),
            ("https://minio.example.org", false, false),
            ("http://minio.example.org", true, true),
        ] {
            assert_eq!(endpoint_host(endpoint, allow).expect(endpoint).1, plain);
        }
        for endpoint in [
            "http://minio.example.org",
            "http://127.0.0.1.example.org",
            "ftp://localhost",
            "localhost:9000",
            "http://user:pw@localhost",
            "",
        ] {
            assert_eq!(endpoint_host(endpoint, false).expect_err(endpoint).code(), Code::Usage);
        }
    }
}
