//! The signature file: a Sigstore bundle around a DSSE envelope around an in-toto statement, verified from the outside in.
//!
//! In: bytes that anyone may have written, a public key. Out: [`Signed`], what the holder of the key has signed.
//! Promises: nothing of the statement is looked at before its signature holds; sizes and counts are bounded; one key, one
//! signature, one statement; a field twice, base64 with anything around it and a name that is no path of a model are
//! refused, although the reference takes some of them.
//! Spec: Sigstore bundle 0.3, DSSE 1.0, in-toto Statement 1, model signing 1.0. Held by: tests/oms.rs.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::crypto::{EcPublicKey, sha256};
use crate::error::{Code, Error, Result};
use crate::format::check_path;
use crate::format::limits::FILE_BYTES_MAX;
use crate::refuse;

/// A line of a file takes about 200 bytes, twice in base64: room for 200,000 files or shards.
pub const BUNDLE_BYTES_MAX: u64 = 64 << 20;
/// A bundle has 5 levels, a statement 4; other readers of JSON give up far below a hundred thousand.
const DEPTH_MAX: usize = 32;
/// Of the paths that a signer leaves out.
const IGNORED_MAX: usize = 1024;

const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
const PREDICATE_TYPE: &str = "https://model_signing/signature/v1.0";
const PREDICATE_TYPE_OLD: &str = "https://model_signing/Digests/v0.1";

/// Fields not named here are of no use to a verifier with a key; the specifications say to pass them over.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawBundle {
    media_type: String,
    verification_material: RawMaterial,
    #[serde(default)]
    dsse_envelope: Option<RawEnvelope>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMaterial {
    #[serde(default)]
    public_key: Option<RawKeyId>,
    #[serde(default)]
    x509_certificate_chain: Option<IgnoredAny>,
    #[serde(default)]
    certificate: Option<IgnoredAny>,
    #[serde(default)]
    tlog_entries: Option<Vec<IgnoredAny>>,
}

#[derive(Deserialize)]
struct RawKeyId {
    #[serde(default)]
    hint: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEnvelope {
    payload: String,
    payload_type: String,
    signatures: Vec<RawSignature>,
}

#[derive(Deserialize)]
struct RawSignature {
    sig: String,
}

#[derive(Deserialize)]
struct RawHead {
    #[serde(rename = "_type")]
    kind: String,
    #[serde(rename = "predicateType")]
    predicate_type: String,
}

#[derive(Deserialize)]
struct RawStatement {
    subject: Vec<RawSubject>,
    predicate: RawPredicate,
}

#[derive(Deserialize)]
struct RawSubject {
    name: String,
    digest: RawDigest,
}

#[derive(Deserialize)]
struct RawDigest {
    sha256: String,
}

#[derive(Deserialize)]
struct RawPredicate {
    serialization: RawSerialization,
    resources: Vec<RawResource>,
}

#[derive(Deserialize)]
struct RawSerialization {
    method: String,
    hash_type: String,
    #[serde(default)]
    shard_size: Option<serde_json::Number>,
    #[serde(default)]
    ignore_paths: Vec<String>,
}

#[derive(Deserialize)]
struct RawResource {
    name: String,
    algorithm: String,
    digest: String,
}

/// What the holder of the key vouches for.
#[derive(Debug, Clone)]
pub struct Signed {
    /// What the signer calls the model: for people, it decides nothing.
    pub name: String,
    /// Curve and fingerprint of the key.
    pub signer: String,
    pub(super) files: BTreeMap<String, SignedFile>,
    /// Plain bytes a shard where files are signed in shards.
    pub(super) shard_bytes: Option<u64>,
    pub(super) ignored: Vec<String>,
    /// SHA-256 of the bundle.
    pub(super) bundle: [u8; 32],
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SignedFile {
    Whole([u8; 32]),
    /// Of consecutive shards, all of the full length but the last; `len` is that of all.
    Shards {
        len: u64,
        digests: Vec<[u8; 32]>,
    },
}

impl Signed {
    /// # Errors
    /// `OMS` saying what is wrong; for keyless and certificate bundles also what to do instead.
    pub fn verify(bundle: &[u8], key: &EcPublicKey) -> Result<Signed> {
        if bundle.len() as u64 > BUNDLE_BYTES_MAX {
            refuse!(Oms, "the bundle has {} bytes, at most {BUNDLE_BYTES_MAX} are read", bundle.len());
        }
        let raw: RawBundle = parse(bundle, "the bundle")?;
        if raw.media_type != MEDIA_TYPE {
            refuse!(Oms, "the bundle is of media type {:?}, wanted {MEDIA_TYPE}", clip(&raw.media_type));
        }
        let payload = envelope(raw.verification_material, raw.dsse_envelope, key)?;
        let head: RawHead = parse(&payload, "the signed statement")?;
        if head.kind != STATEMENT_TYPE {
            refuse!(Oms, "the signed statement is of type {:?}, wanted {STATEMENT_TYPE}", clip(&head.kind));
        }
        if head.predicate_type == PREDICATE_TYPE_OLD {
            refuse!(
                Oms,
                "the predicate is {PREDICATE_TYPE_OLD}, which does not say what was left out; sign again with \
                 model_signing 1.0 or newer"
            );
        }
        if head.predicate_type != PREDICATE_TYPE {
            refuse!(Oms, "the predicate is {:?}, wanted {PREDICATE_TYPE}", clip(&head.predicate_type));
        }
        let statement: RawStatement = parse(&payload, "the signed statement")?;
        let [subject] = &statement.subject[..] else {
            refuse!(Oms, "the signed statement has {} subjects, wanted one model", statement.subject.len());
        };
        let RawPredicate { serialization, resources } = statement.predicate;
        let (files, root) = files(&serialization, &resources)?;
        if digest(&subject.digest.sha256, "the model")? != root {
            refuse!(
                Oms,
                "the statement contradicts itself: its subject is {}, its resources hash to {}",
                clip(&subject.digest.sha256),
                hex::encode(root)
            );
        }
        Ok(Signed {
            name: clip(&subject.name),
            signer: format!("{} key {}", key.curve(), key.pem_fingerprint()),
            files,
            shard_bytes: shard_bytes(&serialization)?,
            ignored: ignored(serialization.ignore_paths)?,
            bundle: sha256(&[bundle]),
        })
    }

    /// Plain bytes a shard: a file longer than this is signed in shards, each with a digest of its own.
    pub fn shard_bytes(&self) -> Option<u64> {
        self.shard_bytes
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    if depth(bytes) > DEPTH_MAX {
        refuse!(Oms, "{what} is nested deeper than {DEPTH_MAX} levels");
    }
    serde_json::from_slice(bytes)
        .map_err(|e| Error::new(Code::Oms, format!("{what} is not the JSON it should be")).with_source(e))
}

/// How deep objects and arrays are nested, if this is JSON; brackets in strings do not count.
fn depth(bytes: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for byte in bytes {
        match (in_string, byte) {
            (true, _) if escaped => escaped = false,
            (true, b'\\') => escaped = true,
            (_, b'"') => in_string = !in_string,
            (false, b'{' | b'[') => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            (false, b'}' | b']') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// The payload, once its one signature holds.
fn envelope(material: RawMaterial, envelope: Option<RawEnvelope>, key: &EcPublicKey) -> Result<Vec<u8>> {
    let RawMaterial { public_key, x509_certificate_chain, certificate, tlog_entries } = material;
    if certificate.is_some() {
        let log = match tlog_entries.map_or(0, |entries| entries.len()) {
            0 => "a Sigstore certificate and no transparency log entry (missing tlog)".to_string(),
            count => format!("a Sigstore certificate and {count} transparency log entries"),
        };
        refuse!(
            Oms,
            "the bundle has {log}: keyless signatures are not verified here, a certificate of ten minutes says nothing \
             without Sigstore's log; check it with `model_signing verify sigstore`, then sign with a key \
             (`model_signing sign key`)"
        );
    }
    if x509_certificate_chain.is_some() {
        refuse!(
            Oms,
            "the bundle is signed by a certificate, which is not verified here; check it with `model_signing verify \
             certificate`, then sign with a key (`model_signing sign key`)"
        );
    }
    let Some(named) = public_key else {
        refuse!(Oms, "the bundle does not say that a key signed it");
    };
    // Bundles of before 1.0 have no hint; the signature decides in any case.
    if let Some(hint) = named.hint.filter(|hint| !hint.is_empty())
        && hint != key.pem_fingerprint()
    {
        refuse!(Oms, "another key signed the bundle: {}, the one given is {}", clip(&hint), key.pem_fingerprint());
    }
    let Some(RawEnvelope { payload, payload_type, signatures }) = envelope else {
        refuse!(Oms, "the bundle has no DSSE envelope");
    };
    if payload_type != PAYLOAD_TYPE {
        refuse!(Oms, "the payload is of type {:?}, wanted {PAYLOAD_TYPE}", clip(&payload_type));
    }
    let [RawSignature { sig }] = &signatures[..] else {
        refuse!(Oms, "the envelope has {} signatures, wanted one", signatures.len());
    };
    let bytes = |text: &str, what: &str| {
        STANDARD.decode(text).map_err(|e| Error::new(Code::Oms, format!("the {what} is not base64")).with_source(e))
    };
    let (payload, sig) = (bytes(&payload, "payload")?, bytes(sig, "signature")?);
    let mut message = format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len()).into_bytes();
    message.extend_from_slice(&payload);
    if !key.verify(&message, &sig) {
        refuse!(Oms, "the signature does not verify under the {} key {}", key.curve(), key.pem_fingerprint());
    }
    Ok(payload)
}

fn shard_bytes(serialization: &RawSerialization) -> Result<Option<u64>> {
    match (serialization.method.as_str(), &serialization.shard_size) {
        ("files", _) => Ok(None),
        ("shards", Some(size)) => {
            // The reference writes protobuf numbers, which are floating.
            let whole = size.as_u64().or_else(|| {
                size.as_f64().filter(|size| size.fract() == 0.0 && (1.0..9e15).contains(size)).map(|size| size as u64)
            });
            match whole {
                Some(size) if size > 0 => Ok(Some(size)),
                _ => refuse!(Oms, "shards of {size} bytes are none"),
            }
        }
        ("shards", None) => refuse!(Oms, "the signer does not say how long a shard is"),
        (other, _) => refuse!(Oms, "files are listed by method {:?}, wanted files or shards", clip(other)),
    }
}

type Files = BTreeMap<String, SignedFile>;

/// The files signed, and SHA-256 over all their digests in the order of the statement.
fn files(serialization: &RawSerialization, resources: &[RawResource]) -> Result<(Files, [u8; 32])> {
    if serialization.hash_type != "sha256" {
        refuse!(
            Oms,
            "files are hashed with {:?}, here they are with sha256; sign again with it",
            clip(&serialization.hash_type)
        );
    }
    let shard = shard_bytes(serialization)?;
    let (mut files, mut digests) = (Files::new(), Vec::with_capacity(resources.len() * 32));
    let mut pieces: BTreeMap<&str, BTreeMap<u64, (u64, [u8; 32])>> = BTreeMap::new();
    let wanted = shard.map_or("sha256".to_string(), |shard| format!("sha256-sharded-{shard}"));
    for RawResource { name, algorithm, digest: hex } in resources {
        if *algorithm != wanted {
            refuse!(Oms, "{} is hashed with {:?}, wanted {wanted}", clip(name), clip(algorithm));
        }
        let value = digest(hex, name)?;
        digests.extend_from_slice(&value);
        let (path, range) = match shard {
            None => (name.as_str(), None),
            Some(_) => shard_name(name)?,
        };
        check_path(path.as_bytes())
            .map_err(|e| Error::new(Code::Oms, format!("{:?} is no path of a model", clip(path))).with_source(e))?;
        let twice = match range {
            None => files.insert(path.to_owned(), SignedFile::Whole(value)).is_some(),
            Some((start, end)) => pieces.entry(path).or_default().insert(start, (end, value)).is_some(),
        };
        if twice {
            refuse!(Oms, "{} is listed twice", clip(name));
        }
    }
    for (path, pieces) in pieces {
        files.insert(path.to_owned(), joined(path, pieces, shard.expect("pieces are of shards"))?);
    }
    Ok((files, sha256(&[&digests])))
}

/// `path:start:end`, as the reference writes it; a path with a colon it cannot read back.
fn shard_name(name: &str) -> Result<(&str, Option<(u64, u64)>)> {
    let parts: Vec<&str> = name.split(':').collect();
    let number = |text: &str| text.bytes().all(|c| c.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    if let [path, start, end] = parts[..]
        && let (Some(start), Some(end)) = (number(start), number(end))
        && start < end
        && end <= FILE_BYTES_MAX
    {
        return Ok((path, Some((start, end))));
    }
    refuse!(Oms, "{:?} is no shard PATH:START:END", clip(name))
}

/// Shards without a gap, without overlap, of one length but the last.
fn joined(path: &str, pieces: BTreeMap<u64, (u64, [u8; 32])>, shard: u64) -> Result<SignedFile> {
    let (mut at, last) = (0, pieces.len() - 1);
    let mut digests = Vec::with_capacity(pieces.len());
    for (number, (start, (end, digest))) in pieces.into_iter().enumerate() {
        let full = end - start == shard;
        if start != at || !(full || (number == last && end - start < shard)) {
            refuse!(Oms, "the shards of {} are not one after the other, {shard} bytes each", clip(path));
        }
        at = end;
        digests.push(digest);
    }
    Ok(SignedFile::Shards { len: at, digests })
}

fn ignored(paths: Vec<String>) -> Result<Vec<String>> {
    if paths.len() > IGNORED_MAX {
        refuse!(Oms, "the signer left out {} paths, at most {IGNORED_MAX} are looked at", paths.len());
    }
    let mut kept = Vec::with_capacity(paths.len());
    for path in paths {
        let plain = path.strip_suffix('/').unwrap_or(&path);
        // What is no path of a model matches none; `.` would match all.
        if plain.split('/').all(|part| part.is_empty() || part == ".") {
            refuse!(Oms, "the signer left out {:?}, which is everything", clip(&path));
        }
        if check_path(plain.as_bytes()).is_ok() {
            kept.push(plain.to_owned());
        }
    }
    Ok(kept)
}

fn digest(text: &str, what: &str) -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    match hex::decode_to_slice(text, &mut bytes) {
        Ok(()) => Ok(bytes),
        Err(_) => refuse!(Oms, "the digest of {} is not 64 hex digits", clip(what)),
    }
}

/// As much of a hostile string as a message may hold.
fn clip(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
