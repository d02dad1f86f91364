//! The rules of the wire: what an HTTP answer must look like before any library of ours believes a word of it.
//!
//! In: the request as signed, and whatever the server answers. Out: the answer, its body capped and its silence bounded,
//! or an `Error` with the code of the rule that was broken (it travels through `object_store` as the cause, and
//! [`told`] finds it there).
//! Promises: no redirect is followed; nothing is decompressed; a range is answered by 206 with exactly that
//! Content-Range, or not at all; no body of any kind exceeds its cap; no server text but one word of the alphabet of
//! S3's error codes reaches a message.
//! Not here: retries (`patient`), requests and signatures (`object_store`).
//! Spec: THREAT_MODEL (f) rows 13 to 18. Held by: tests/hostile_http.rs.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderMap, RANGE};
use http::{Method, StatusCode, Uri};
use http_body::{Body, Frame};
use object_store::ClientConfigKey;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};

use super::credentials::LeasedCredentials;
use super::limit::{self, Limiter};
use crate::error::{Code, Error, Result};

/// One page of a listing: S3 sends 1,000 names of at most 1,024 bytes and some XML around each.
const LISTING_BYTES_MAX: u64 = 16 << 20;

/// Every other answer that is text for machines: upload ids, results of completions.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// How much of an error page is looked at for S3's error code.
const ERROR_PAGE_BYTES_MAX: u64 = 16 << 10;

/// Connections kept open to one host: what the fetchers of a mount use at once, with room.
const IDLE_CONNECTIONS_MAX: usize = 64;

/// Makes the HTTP clients of one store.
#[derive(Debug)]
pub(super) struct Wire {
    /// The hosts and ports that are the store itself; others are asked for credentials only.
    pub(super) store_hosts: Vec<(String, u16)>,
    /// The longest silence within a body.
    pub(super) stall: Duration,
    /// Told which credentials the store takes and which it refuses, where there are others to be had.
    pub(super) credentials: Option<Arc<LeasedCredentials>>,
    /// Told of every request that goes out.
    pub(super) limiter: Option<Arc<Limiter>>,
}

impl HttpConnector for Wire {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let says = |key: ClientConfigKey| options.get_config_value(&key);
        let yes = |key: ClientConfigKey| says(key).is_some_and(|value| value == "true");
        // object_store asks for a short one where it looks for instance credentials that may not be there.
        let connect_s = says(ClientConfigKey::ConnectTimeout).and_then(|text| text.strip_suffix('s')?.parse().ok());
        let connect = Duration::from_secs(connect_s.unwrap_or(5).clamp(1, 5));
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("modelfs/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .https_only(!yes(ClientConfigKey::AllowHttp))
            .danger_accept_invalid_certs(yes(ClientConfigKey::AllowInvalidCertificates))
            .connect_timeout(connect)
            .tcp_keepalive(Duration::from_secs(30))
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .pool_idle_timeout(Duration::from_secs(60))
            // One connection for each request in flight: a shared HTTP/2 connection is one TCP window for all of them.
            .http1_only()
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .no_deflate();
        if let Some(url) = says(ClientConfigKey::ProxyUrl) {
            let excludes = says(ClientConfigKey::ProxyExcludes).unwrap_or_default();
            let proxy = reqwest::Proxy::all(url).map_err(client_error)?;
            builder = builder.proxy(proxy.no_proxy(reqwest::NoProxy::from_string(&excludes)));
        }
        let client = builder.build().map_err(client_error)?;
        let (credentials, limiter) = (self.credentials.clone(), self.limiter.clone());
        let (store_hosts, stall) = (self.store_hosts.clone(), self.stall);
        Ok(HttpClient::new(Guard { client, store_hosts, stall, credentials, limiter }))
    }
}

fn client_error(error: reqwest::Error) -> object_store::Error {
    object_store::Error::Generic { store: "S3", source: Box::new(error.without_url()) }
}

#[derive(Debug)]
struct Guard {
    client: reqwest::Client,
    store_hosts: Vec<(String, u16)>,
    stall: Duration,
    credentials: Option<Arc<LeasedCredentials>>,
    limiter: Option<Arc<Limiter>>,
}

#[async_trait]
impl HttpService for Guard {
    async fn call(&self, request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        let asked = Asked::of(&request);
        if !self.is_store(request.uri()) {
            // Whoever hands out credentials: object_store knows these answers; only their size is ours to bound.
            let answer = self.client.call(request).await?;
            return Ok(capped(answer, TEXT_BYTES_MAX, self.stall, Code::Limit, None));
        }
        let account = self.limiter.as_deref().and_then(limit::sent);
        let key_id = self.credentials.as_ref().and_then(|_| signed_by(&request));
        let mut answer = self.client.call(request).await.map_err(|e| boxed(transport(&e)))?;
        // Whoever is told that something is not there, or there already, was let in.
        let let_in = answer.status().is_success() || matches!(answer.status().as_u16(), 404 | 412 | 416);
        if let (true, Some(credentials), Some(key_id)) = (let_in, &self.credentials, &key_id) {
            credentials.accepted(key_id);
        }
        if answer.status().is_success() {
            let cap = asked.check(&answer).map_err(boxed)?;
            if asked.range.is_some() && !answer.headers().contains_key(CONTENT_LENGTH) {
                // A proxy may send a range in chunks. object_store insists on a length; here it is known.
                answer.headers_mut().insert(CONTENT_LENGTH, cap.into());
            }
            return Ok(capped(answer, cap, self.stall, Code::Length, account));
        }
        Err(boxed(self.refusal(&asked, answer, key_id.as_deref()).await))
    }
}

impl Guard {
    fn is_store(&self, uri: &Uri) -> bool {
        let default = if uri.scheme_str() == Some("http") { 80 } else { 443 };
        let port = uri.port_u16().unwrap_or(default);
        let host = uri.host().unwrap_or("").to_ascii_lowercase();
        self.store_hosts.iter().any(|(ours, our_port)| *ours == host && *our_port == port)
    }

    /// What a status other than success means.
    async fn refusal(&self, asked: &Asked, answer: HttpResponse, key_id: Option<&str>) -> Error {
        let status = answer.status();
        let region = word(answer.headers().get("x-amz-bucket-region").and_then(|value| value.to_str().ok()));
        let page = capped(answer, ERROR_PAGE_BYTES_MAX, self.stall.min(Duration::from_secs(2)), Code::Limit, None);
        let mut text = Vec::new();
        let mut pieces = page.into_body().bytes_stream();
        while let Some(Ok(piece)) = pieces.next().await {
            text.extend_from_slice(&piece);
        }
        let reason = error_code(&text);
        let said = match &reason {
            Some(reason) => format!("store answered {} {reason}", status.as_u16()),
            None => format!("store answered {}", status.as_u16()),
        };
        if let (Some(credentials), Some(key_id)) = (&self.credentials, key_id)
            && refuses_credentials(asked, status, reason.as_deref())
            && credentials.refused(key_id, reason.as_deref())
        {
            // Patience asks again, and then it is signed with what is there by then.
            return Error::new(Code::Unreachable, format!("{said}: asking again with new credentials"));
        }
        let (code, message) = match (status.as_u16(), reason.as_deref().unwrap_or("")) {
            (404, "NoSuchBucket") => (Code::NotFound, format!("{said}: no such bucket")),
            (404, _) => (Code::NotFound, said),
            (401 | 403, _)
            | (400, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" | "InvalidAccessKeyId")
            | (400, "AuthorizationHeaderMalformed") => {
                (Code::StoreDenied, format!("{said}: the credentials do not allow it"))
            }
            (412, _) => (Code::Exists, format!("{said}: the object is there already")),
            (416, _) => (Code::Length, format!("{said}: the object ends before the range{}", asked.range_text())),
            // Two creates of one name at once, and the other ways in which S3 says "again".
            (408 | 409 | 429, _)
            | (400, "RequestTimeout" | "BadDigest" | "IncompleteBody" | "XAmzContentSHA256Mismatch") => {
                (Code::Unreachable, said)
            }
            (501, _) => (Code::StoreUnfit, format!("{said}: the store lacks a request that publishing needs")),
            (500..=599, _) => (Code::Unreachable, said),
            (300..=399, _) => {
                let hint = region.map(|region| format!(" (AWS_REGION={region} may be what it wants)"));
                (Code::StoreAnswer, format!("{said}: redirects are not followed{}", hint.unwrap_or_default()))
            }
            _ => (Code::StoreAnswer, said),
        };
        Error::new(code, message)
    }
}

/// Whether new credentials may change this answer.
fn refuses_credentials(asked: &Asked, status: StatusCode, reason: Option<&str>) -> bool {
    match (status.as_u16(), reason) {
        (401 | 403, _) => true,
        (400, Some(reason)) => {
            matches!(reason, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" | "InvalidAccessKeyId")
        }
        // The answer to a HEAD has no page that could say why.
        (400, None) => asked.method == Method::HEAD,
        _ => false,
    }
}

/// The key id a request was signed with: `AWS4-HMAC-SHA256 Credential=KEYID/...`.
fn signed_by(request: &HttpRequest) -> Option<String> {
    let text = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (_, rest) = text.split_once("Credential=")?;
    Some(rest.split_once('/')?.0.to_owned())
}

/// What was asked, as far as the answer must match it.
struct Asked {
    method: Method,
    listing: bool,
    range: Option<(u64, u64)>,
}

impl Asked {
    fn of(request: &HttpRequest) -> Self {
        Asked {
            method: request.method().clone(),
            listing: is_listing(request.uri()),
            range: request.headers().get(RANGE).and_then(|value| parse_range(value.to_str().ok()?)),
        }
    }

    fn range_text(&self) -> String {
        self.range.map(|(first, last)| format!(" of bytes {first} to {last}")).unwrap_or_default()
    }

    /// The most bytes the body of this answer may have, or what is wrong with its head.
    fn check(&self, answer: &HttpResponse) -> Result<u64> {
        let headers = answer.headers();
        if let Some(encoding) = headers.get(CONTENT_ENCODING) {
            // S3 keeps `aws-chunked` of an upload as if it were an encoding; it is none by the time it is served.
            if !["", "identity", "aws-chunked"].iter().any(|plain| encoding == plain) {
                return Err(Error::new(Code::StoreAnswer, "store answered an encoded body; nothing is ever decoded"));
            }
        }
        let wanted = match (&self.method, self.range) {
            (&Method::GET, Some((first, last))) => {
                check_range(answer.status(), headers, first, last)?;
                return Ok(last - first + 1);
            }
            (&Method::GET, None) if self.listing => LISTING_BYTES_MAX,
            // The reader of a small object stops at its own bound.
            (&Method::GET, None) => u64::MAX,
            (&Method::HEAD, _) => 0,
            _ => TEXT_BYTES_MAX,
        };
        if self.method == Method::GET && answer.status() != StatusCode::OK {
            let status = answer.status().as_u16();
            return Err(Error::new(Code::Length, format!("store answered {status} to a request for a whole object")));
        }
        Ok(wanted)
    }
}

fn check_range(status: StatusCode, headers: &HeaderMap, first: u64, last: u64) -> Result<()> {
    let wrong = |seen: String| {
        Err(Error::new(Code::Length, format!("store answered {seen} to a request for bytes {first} to {last}")))
    };
    if status != StatusCode::PARTIAL_CONTENT {
        return wrong(format!("{} without a range", status.as_u16()));
    }
    let range = headers.get(CONTENT_RANGE).and_then(|value| parse_content_range(value.to_str().ok()?));
    match range {
        Some(range) if range == (first, last) => {}
        Some((start, end)) => return wrong(format!("bytes {start} to {end}")),
        None => return wrong("206 without a readable Content-Range".to_owned()),
    }
    match headers.get(CONTENT_LENGTH).map(|value| value.to_str().ok().and_then(|text| text.parse::<u64>().ok())) {
        None => Ok(()),
        Some(Some(length)) if length == last - first + 1 => Ok(()),
        Some(_) => wrong("another Content-Length than its range".to_owned()),
    }
}

fn is_listing(uri: &Uri) -> bool {
    uri.query().is_some_and(|query| query.split('&').any(|part| part.starts_with("list-type=")))
}

/// `bytes=FIRST-LAST`, as we send it.
fn parse_range(text: &str) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    // The length must fit as well: `u64::MAX - 0 + 1` does not.
    (first <= last && last < u64::MAX).then_some((first, last))
}

/// `bytes FIRST-LAST/SIZE`, as the server sends it. A last byte of `u64::MAX` is refused here: `object_store` adds one.
fn parse_content_range(text: &str) -> Option<(u64, u64)> {
    let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, size): (u64, u64, u64) = (first.parse().ok()?, last.parse().ok()?, size.parse().ok()?);
    (first <= last && last < size).then_some((first, last))
}

/// The text of `<Code>` in S3's error XML.
fn error_code(page: &[u8]) -> Option<String> {
    let page = std::str::from_utf8(page).ok()?;
    let (_, rest) = page.split_once("<Code>")?;
    word(rest.split_once("</Code>").map(|(code, _)| code))
}

/// Server text that may stand in a message: one short plain word, or nothing.
fn word(text: Option<&str>) -> Option<String> {
    let plain = |text: &&str| {
        (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
    };
    text.filter(plain).map(str::to_owned)
}

fn transport(error: &HttpError) -> Error {
    let what = match error.kind() {
        HttpErrorKind::Connect => "cannot connect to the store",
        HttpErrorKind::Timeout => "the store did not answer in time",
        _ => "the connection to the store broke",
    };
    // The text of reqwest's innermost cause names no URL: "connection refused", "certificate has expired".
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    Error::new(Code::Unreachable, format!("{what}: {}", redact(&cause.to_string())))
}

fn boxed(error: Error) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, error)
}

/// Our own error inside one of `object_store`'s, or what its error means to us.
pub(super) fn told(error: &object_store::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut on_the_way = false;
    while let Some(this) = cause {
        if let Some(ours) = this.downcast_ref::<Error>() {
            return ours.clone();
        }
        on_the_way |= this.is::<HttpError>();
        cause = this.source();
    }
    use object_store::Error as Theirs;
    let text = redact(&error.to_string());
    if on_the_way {
        // All our answers carry an error of ours, so this one came from where credentials are handed out.
        return Error::new(
            Code::Unreachable,
            format!("no credentials for the store (set AWS_ACCESS_KEY_ID, or AWS_SKIP_SIGNATURE=true): {text}"),
        );
    }
    match error {
        Theirs::NotFound { .. } => Error::new(Code::NotFound, text),
        Theirs::PermissionDenied { .. } | Theirs::Unauthenticated { .. } => Error::new(Code::StoreDenied, text),
        Theirs::AlreadyExists { .. } | Theirs::Precondition { .. } => Error::new(Code::Exists, text),
        Theirs::NotImplemented { .. } | Theirs::NotSupported { .. } | Theirs::UnknownConfigurationKey { .. } => {
            Error::new(Code::Usage, text)
        }
        _ => Error::new(Code::StoreAnswer, format!("the store's answer cannot be understood: {text}")),
    }
}

/// The text in one line of at most 300 characters, without the query of any URL in it (it may hold a signature).
fn redact(text: &str) -> String {
    let words = text.split_whitespace().map(|word| match (word.contains("://"), word.split_once('?')) {
        (true, Some((url, _))) => format!("{url}?..."),
        _ => word.to_owned(),
    });
    let line = words.collect::<Vec<_>>().join(" ");
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

fn capped(
    answer: HttpResponse,
    cap: u64,
    stall: Duration,
    over: Code,
    account: Option<Arc<limit::Account>>,
) -> HttpResponse {
    let (parts, inner) = answer.into_parts();
    let silence = Box::pin(tokio::time::sleep(stall));
    HttpResponse::from_parts(parts, HttpResponseBody::new(Capped { inner, left: cap, stall, silence, over, account }))
}

/// A body that ends with an error at its cap, or after a silence.
struct Capped {
    inner: HttpResponseBody,
    left: u64,
    stall: Duration,
    silence: Pin<Box<tokio::time::Sleep>>,
    over: Code,
    account: Option<Arc<limit::Account>>,
}

impl Body for Capped {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, HttpError>>> {
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let len = frame.data_ref().map_or(0, Bytes::len) as u64;
                let Some(left) = self.left.checked_sub(len) else {
                    return Poll::Ready(Some(Err(boxed(Error::new(
                        self.over,
                        "store sent more bytes than asked for",
                    )))));
                };
                self.left = left;
                if let Some(account) = &self.account {
                    account.received(len);
                }
                let until = tokio::time::Instant::now() + self.stall;
                self.silence.as_mut().reset(until);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(boxed(transport(&error))))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => match self.silence.as_mut().poll(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) => {
                    let text = format!("the store fell silent for {:.1} s within an answer", self.stall.as_secs_f64());
                    Poll::Ready(Some(Err(boxed(Error::new(Code::Deadline, text)))))
                }
            },
        }
    }

    // No size hint: object_store would reserve as much memory as a Content-Length claims.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_parse_strictly() {
        assert_eq!(parse_content_range("bytes 0-9/10"), Some((0, 9)));
        assert_eq!(parse_range("bytes=5-9"), Some((5, 9)));
        for bad in [
            "",
            "0-9/10",
            "bytes 0-9",
            "bytes 0-9/*",
            "bytes */10",
            "bytes 9-0/10",
            "bytes 0-10/10",
            "bytes 0-18446744073709551615/18446744073709551615",
            "bytes 0-18446744073709551616/1",
            "octets 0-9/10",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_a_plain_word_of_an_error_page_is_believed() {
        assert_eq!(error_code(b"<Error><Code>NoSuchKey</Code></Error>").as_deref(), Some("NoSuchKey"));
        for bad in [&b"<Code></Code>"[..], b"<Code>a b</Code>", b"<Code>\x1b[31m</Code>", b"\xff<Code>x</Code>", b"x"] {
            assert_eq!(error_code(bad), None);
        }
        assert_eq!(error_code(format!("<Code>{}</Code>", "a".repeat(65)).as_bytes()), None);
    }

    #[test]
    fn queries_and_control_characters_never_reach_a_message() {
        let text = redact("GET https://b.s3/x?X-Amz-Signature=secret failed\n\x1b[31m twice");
        assert!(!text.contains("secret") && !text.contains('\x1b') && !text.contains('\n'), "{text}");
    }
}
