//! What lets somebody in over the network: a certificate, its key, and tokens; read anew when their files change.
//!
//! In: the paths of [`HttpPlan::Tcp`](crate::config::oversight::HttpPlan). Out: a TLS acceptor, and whether a token is one of
//! ours.
//! Promises: TLS 1.2 or 1.3 and nothing below; a key or token that others can read is refused; tokens are kept as hashes and
//! compared in constant time; files that cannot be used leave what was there in place, with a word in the log.
//! Held by: the tests below, tests/observe.rs.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use subtle::ConstantTimeEq;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, version};

use crate::crypto::sha256;
use crate::error::{Code, Error, Result};
use crate::mem;
use crate::refuse;

const FILE_BYTES_MAX: usize = 64 << 10;

/// A token that can be guessed is none: 128 bits in base64 are 22 characters.
const TOKEN_CHARS_MIN: usize = 22;
/// The old and the new one while they change, and a few scrapers.
const TOKENS_MAX: usize = 16;

/// The three files.
#[derive(Debug, Clone)]
pub struct Files {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub token: PathBuf,
}

/// By what a file that was replaced or written to is known: time, length, inode of each.
type Stamp = [Option<(i64, i64, u64, u64)>; 3];

pub struct Credentials {
    files: Files,
    now: RwLock<Arc<Loaded>>,
    seen: Mutex<Stamp>,
}

pub struct Loaded {
    pub acceptor: TlsAcceptor,
    tokens: Vec<[u8; 32]>,
}

impl Credentials {
    /// # Errors
    /// `USAGE`, `KEY_PERMS`, `KEY_FORMAT` naming the file.
    pub fn load(files: Files) -> Result<Credentials> {
        // Before the files are read: a change in between is seen the next time.
        let seen = stamp(&files);
        let now = Arc::new(Loaded::read(&files)?);
        Ok(Credentials { files, now: RwLock::new(now), seen: Mutex::new(seen) })
    }

    pub fn now(&self) -> Arc<Loaded> {
        self.now.read().expect("a thread died holding the credentials").clone()
    }

    /// Reads again what changed. Blocking.
    pub fn refresh(&self) {
        let mut seen = self.seen.lock().expect("a thread died holding the stamps");
        let stamp = stamp(&self.files);
        if *seen == stamp {
            return;
        }
        // Also of files that cannot be used: one word each time they change, not every few seconds.
        *seen = stamp;
        match Loaded::read(&self.files) {
            Ok(loaded) => {
                *self.now.write().expect("a thread died holding the credentials") = Arc::new(loaded);
                tracing::info!("certificate, key and tokens for metrics are read anew");
            }
            Err(error) => {
                tracing::error!("certificate, key and tokens for metrics stay as they were: {}", error.chain())
            }
        }
    }
}

impl Loaded {
    fn read(files: &Files) -> Result<Loaded> {
        let bad = |path: &Path, what: &str| Error::new(Code::KeyFormat, format!("{} holds no {what}", path.display()));
        let pem = std::fs::read(&files.cert).map_err(|e| {
            Error::new(Code::Usage, format!("cannot read http-cert {}", files.cert.display())).with_source(e)
        })?;
        let chain = CertificateDer::pem_slice_iter(&pem).collect::<std::result::Result<Vec<_>, _>>();
        let chain = chain.map_err(|_| bad(&files.cert, "certificate in PEM"))?;
        if chain.is_empty() {
            return Err(bad(&files.cert, "certificate in PEM"));
        }
        let key = mem::read_private_file(&files.key, FILE_BYTES_MAX).map_err(|e| e.context("http-key"))?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| bad(&files.key, "private key in PEM"))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])
            .expect("the provider has suites of both")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|e| {
                let (cert, key) = (files.cert.display(), files.key.display());
                Error::new(Code::Usage, format!("http-cert {cert} and http-key {key} do not go together"))
                    .with_source(e)
            })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let tokens = mem::read_private_file(&files.token, FILE_BYTES_MAX).map_err(|e| e.context("http-token-file"))?;
        Ok(Loaded { acceptor: TlsAcceptor::from(Arc::new(config)), tokens: tokens_in(&tokens, &files.token)? })
    }

    /// Whether `token` is one of ours. Takes as long for each.
    pub fn admits(&self, token: &[u8]) -> bool {
        let hash = sha256(&[token]);
        let found = self.tokens.iter().fold(subtle::Choice::from(0), |found, ours| found | ours.ct_eq(&hash));
        found.into()
    }
}

/// One a line; while they change, the old and the new one.
fn tokens_in(text: &[u8], path: &Path) -> Result<Vec<[u8; 32]>> {
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let mut tokens = Vec::new();
    for line in lines {
        if line.len() < TOKEN_CHARS_MIN || !line.iter().all(u8::is_ascii_graphic) {
            refuse!(
                KeyFormat,
                "http-token-file {} holds a token that is too short or not plain text; a line of at least {TOKEN_CHARS_MIN} \
                 characters is wanted, as `openssl rand -base64 32` writes it",
                path.display()
            );
        }
        tokens.push(sha256(&[line]));
    }
    match tokens.len() {
        0 => refuse!(KeyFormat, "http-token-file {} holds no token; write one a line", path.display()),
        1..=TOKENS_MAX => Ok(tokens),
        many => refuse!(KeyFormat, "http-token-file {} holds {many} tokens; {TOKENS_MAX} are enough", path.display()),
    }
}

fn stamp(files: &Files) -> Stamp {
    [&files.cert, &files.key, &files.token].map(|path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.mtime(), meta.mtime_nsec(), meta.len(), meta.ino()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_lines_long_enough_and_each_is_admitted() {
        let path = Path::new("/t");
        let (old, new) = ("a".repeat(22), "b".repeat(44));
        let tokens = tokens_in(format!("{old}\n\n  {new}  \n").as_bytes(), path).expect("two tokens");
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(tokio_rustls::rustls::server::ResolvesServerCertUsingSni::new()));
        let loaded = Loaded { acceptor: TlsAcceptor::from(Arc::new(config)), tokens };
        assert!(loaded.admits(old.as_bytes()) && loaded.admits(new.as_bytes()));
        assert!(!loaded.admits(b"") && !loaded.admits(&old.as_bytes()[1..]) && !loaded.admits(b"  "));
        for (text, fix) in [
            (String::new(), "no token"),
            ("short".into(), "openssl rand"),
            (format!("{old}\u{7f}"), "plain text"),
            (format!("{old}\n").repeat(TOKENS_MAX + 1), "are enough"),
        ] {
            let error = tokens_in(text.as_bytes(), path).expect_err(&text);
            assert!(error.chain().contains(fix), "{}", error.chain());
        }
    }
}
