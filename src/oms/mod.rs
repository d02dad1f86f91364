//! OpenSSF model signing: whether a signature file that came with a model vouches for exactly these files.
//!
//! ```text
//!  model.sig ──Signed::verify (key)──> Signed ──check (SHA-256 of every file, from sealing or from the manifest)──> Vouched
//! ```
//! In: a bundle, a public key that the user gave, the digests of a model's files. Out: who signed, and what the signer left
//! out. Promises: a file that is neither signed nor left out by the signer is refused, so is one that is signed and not
//! there, or has other bytes; each is named. Nothing is fetched: a bundle that would need a network is refused by name.
//! Not here: reading files (`seal`, `cli::verify`). Held by: tests/oms.rs, against the reference implementation.

mod bundle;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use bundle::SignedFile;
pub use bundle::{BUNDLE_BYTES_MAX, Signed};

use crate::crypto::{EcPublicKey, FileHasher};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// What the reference calls the signature file.
pub const BUNDLE_NAME: &str = "model.sig";
/// A key in PEM takes 300 bytes.
const KEY_BYTES_MAX: u64 = 16 << 10;
/// Files named in one message.
const NAMED_MAX: usize = 8;

/// A file of the model, as it was sealed.
#[derive(Debug, Clone, Copy)]
pub struct SealedFile<'a> {
    pub path: &'a str,
    pub size: u64,
    pub sha256: [u8; 32],
}

/// A model whose files are those that were signed.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Vouched {
    pub signer: String,
    /// What the signer calls the model.
    pub name: String,
    pub files: u64,
    /// Files that the signer left out: the manifest vouches for them, the bundle does not.
    pub unsigned: Vec<String>,
}

impl Signed {
    /// The files whose shards must be hashed before [`Signed::check`] can judge them: those longer than one shard.
    pub fn in_shards<'a>(&'a self, files: &'a [SealedFile<'a>]) -> impl Iterator<Item = usize> + 'a {
        let long = |file: &SealedFile<'_>| self.shard_bytes.is_some_and(|shard| file.size > shard);
        (0..files.len()).filter(move |number| long(&files[*number]) && self.files.contains_key(files[*number].path))
    }

    /// Whether exactly these files were signed. `bundle_path`: where the bundle lies within the model. `shards`: of each
    /// file that [`Signed::in_shards`] names, the digests of its shards.
    ///
    /// # Errors
    /// `OMS` naming up to eight files: not signed, not there, other bytes; or a bundle that is not the one verified.
    pub fn check(
        &self,
        files: &[SealedFile<'_>],
        bundle_path: &str,
        shards: &HashMap<usize, Vec<[u8; 32]>>,
    ) -> Result<Vouched> {
        let (mut faults, mut unsigned, mut vouched) = (Vec::new(), Vec::new(), 0u64);
        for (number, file) in files.iter().enumerate() {
            if file.path == bundle_path {
                if file.sha256 != self.bundle {
                    faults.push(format!("{} is not the bundle that was verified", file.path));
                }
            } else if self.leaves_out(file.path) {
                unsigned.push(file.path.to_owned());
            } else {
                match self.files.get(file.path) {
                    Some(signed) => match signed.differs(file, self.shard_bytes, shards.get(&number)) {
                        Some(fault) => faults.push(fault),
                        None => vouched += 1,
                    },
                    // The reference signs no shard of an empty file, so nobody can tell whether it was there.
                    None if file.size == 0 && self.shard_bytes.is_some() => unsigned.push(file.path.to_owned()),
                    None => faults.push(format!("{} is not signed", file.path)),
                }
            }
        }
        let there: HashSet<&str> = files.iter().map(|file| file.path).collect();
        for path in self.files.keys() {
            if !there.contains(path.as_str()) {
                faults.push(format!("{path} is signed, but not there"));
            } else if path == bundle_path || self.leaves_out(path) {
                faults.push(format!("{path} is both signed and left out"));
            }
        }
        if !faults.is_empty() {
            let more = faults.len().saturating_sub(NAMED_MAX);
            faults.truncate(NAMED_MAX);
            let more = if more > 0 { format!("; and {more} more") } else { String::new() };
            refuse!(Oms, "the bundle does not vouch for these files: {}{more}", faults.join("; "));
        }
        Ok(Vouched { signer: self.signer.clone(), name: self.name.clone(), files: vouched, unsigned })
    }

    fn leaves_out(&self, path: &str) -> bool {
        let under = |ignored: &String| {
            path.strip_prefix(ignored.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.ignored.iter().any(under)
    }
}

impl SignedFile {
    /// What is wrong with a file, if anything is.
    fn differs(&self, file: &SealedFile<'_>, shard: Option<u64>, hashed: Option<&Vec<[u8; 32]>>) -> Option<String> {
        let path = file.path;
        match self {
            SignedFile::Whole(digest) if *digest == file.sha256 => None,
            SignedFile::Whole(digest) => {
                Some(format!("{path} has SHA-256 {}, signed is {}", hex::encode(file.sha256), hex::encode(digest)))
            }
            SignedFile::Shards { len, .. } if *len != file.size => {
                Some(format!("{path} has {} bytes, signed are {len}", file.size))
            }
            SignedFile::Shards { digests, .. } => {
                // One shard is the whole file.
                let whole = vec![file.sha256];
                let found = if digests.len() == 1 { Some(&whole) } else { hashed };
                let found = found.expect("the shards of every longer file were hashed");
                let wrong = digests.iter().zip(found).position(|(signed, found)| signed != found);
                if wrong.is_none() && digests.len() == found.len() {
                    return None;
                }
                let start = wrong.unwrap_or(0) as u64 * shard.unwrap_or(0);
                Some(format!("{path} has other bytes than were signed in the shard at {start}"))
            }
        }
    }
}

/// A bundle that a model must agree with before it is published.
#[derive(Debug, Clone)]
pub struct Endorsement {
    pub signed: Arc<Signed>,
    /// Where the bundle lies within the model.
    pub bundle_path: String,
}

/// Hashes a file as a whole and in shards, in one pass.
#[derive(Debug)]
pub struct ShardHasher {
    shard: u64,
    room: u64,
    whole: FileHasher,
    current: FileHasher,
    done: Vec<[u8; 32]>,
}

impl ShardHasher {
    pub fn new(shard: u64) -> ShardHasher {
        ShardHasher { shard, room: shard, whole: FileHasher::new(), current: FileHasher::new(), done: Vec::new() }
    }

    pub fn update(&mut self, mut bytes: &[u8]) {
        self.whole.update(bytes);
        while !bytes.is_empty() {
            let len = usize::try_from(self.room).map_or(bytes.len(), |room| room.min(bytes.len()));
            self.current.update(&bytes[..len]);
            self.room -= len as u64;
            bytes = &bytes[len..];
            if self.room == 0 {
                self.done.push(std::mem::take(&mut self.current).finish());
                self.room = self.shard;
            }
        }
    }

    /// SHA-256 of the whole file, and of each shard.
    pub fn finish(mut self) -> ([u8; 32], Vec<[u8; 32]>) {
        if self.room < self.shard {
            self.done.push(self.current.finish());
        }
        (self.whole.finish(), self.done)
    }
}

/// A public key in PEM from `path`.
///
/// # Errors
/// `USAGE` if it cannot be read, `KEY_FORMAT` if it is none.
pub fn load_key(path: &Path) -> Result<EcPublicKey> {
    let bytes = read_file(path, KEY_BYTES_MAX)?;
    let text = String::from_utf8(bytes).unwrap_or_default();
    EcPublicKey::from_pem(&text).map_err(|e| e.context(format!("{} is no key for --oms-key", path.display())))
}

/// The bytes of a bundle at `path`, at most [`BUNDLE_BYTES_MAX`].
///
/// # Errors
/// `USAGE` if it cannot be read or is longer.
pub fn read_bundle(path: &Path) -> Result<Vec<u8>> {
    read_file(path, BUNDLE_BYTES_MAX)
}

fn read_file(path: &Path, max: u64) -> Result<Vec<u8>> {
    use std::io::Read;
    let fault = |e| Error::new(Code::Usage, format!("cannot read {}", path.display())).with_source(e);
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(fault)?;
    if !file.metadata().map_err(fault)?.is_file() {
        refuse!(Usage, "{} is not a file", path.display());
    }
    file.take(max + 1).read_to_end(&mut bytes).map_err(fault)?;
    if bytes.len() as u64 > max {
        refuse!(Usage, "{} is longer than {max} bytes", path.display());
    }
    Ok(bytes)
}
