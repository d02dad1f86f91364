//! One record: five fields, checked before anything is asked of a store.
//!
//! In: what a KV version holds, hostile. Out: a [`Record`], or `CATALOG` naming the record and the field.
//! Promises: no error repeats a value; the raw key is in secret memory when this returns, and every text of the answer is
//! overwritten, whether it was a record or not. Fields of other names are nobody's business here.
//! Spec: docs/CATALOG.md.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use super::wipe;
use crate::error::{Code, Error, Result};
use crate::format::limits::SLOT_TRANSIT_BYTES_MAX;
use crate::format::{ManifestDigest, ModelId, names};
use crate::mem::Secret;
use crate::refuse;
use crate::store::StoreUrl;

/// What opens the model of a record.
pub enum RecordKey {
    /// 32 bytes that open a raw slot of the version.
    Raw(Secret<32>),
    /// The body of a transit slot: `vault:vN:...`.
    Transit(String),
}

impl RecordKey {
    pub const fn kind(&self) -> &'static str {
        match self {
            RecordKey::Raw(_) => "raw",
            RecordKey::Transit(_) => "vault-transit",
        }
    }
}

impl fmt::Debug for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordKey::{}", self.kind())
    }
}

/// A model, as its record tells it.
#[derive(Debug)]
pub struct Record {
    /// The path below the catalog's: what the model is served as.
    pub name: String,
    /// Where its objects are: bucket and prefix.
    pub store: StoreUrl,
    pub model_id: ModelId,
    pub manifest: ManifestDigest,
    /// Plaintext bytes of all its files.
    pub size_bytes: u64,
    pub key: RecordKey,
    /// The version of the record in Vault.
    pub version: u32,
}

impl Record {
    /// # Errors
    /// `CATALOG`, naming `name` and the field. `data` is empty afterwards in any case.
    pub fn parse(name: &str, mut data: Map<String, Value>, version: u32) -> Result<Record> {
        let parsed = Self::read(name, &data, version);
        wipe(&mut data);
        parsed
    }

    fn read(name: &str, data: &Map<String, Value>, version: u32) -> Result<Record> {
        let wrong = |field: &str, wanted: &str| Error::new(Code::Catalog, format!("record {name}: {field} {wanted}"));
        let text = |field: &'static str, wanted: &str| match data.get(field) {
            None => Err(wrong(field, &format!("is missing; it holds {wanted}"))),
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(_) => Err(wrong(field, &format!("is no text; it holds {wanted}"))),
        };
        let bucket = text("s3_bucket", "the name of a bucket")?;
        let key = text("s3_key", "the prefix of a sealed model: the store's prefix and the model's id")?;
        let (prefix, id) = key.rsplit_once('/').unwrap_or(("", key));
        let Some(model_id) = names::model_id(id) else {
            return Err(wrong("s3_key", "does not end in a model id of 64 hex digits, as `modelfs seal` prints it"));
        };
        let at = if prefix.is_empty() { format!("s3://{bucket}") } else { format!("s3://{bucket}/{prefix}") };
        let store = match at.parse::<StoreUrl>() {
            // What was read back must be what was written: a slash in the bucket would move the prefix.
            // A leading slash is no prefix either.
            Ok(StoreUrl::S3 { bucket: b, prefix: p }) if b == bucket && p == prefix && !key.starts_with('/') => {
                StoreUrl::S3 { bucket: b, prefix: p }
            }
            Ok(_) | Err(_) => return Err(wrong("s3_bucket or s3_key", "is no bucket or no prefix of a store")),
        };
        let wanted = "sha256: and the 64 hex digits of the manifest digest";
        let manifest = text("checksum", wanted)?.strip_prefix("sha256:").and_then(ManifestDigest::from_hex);
        let Some(manifest) = manifest else { return Err(wrong("checksum", &format!("is not {wanted}"))) };
        let size_bytes = match data.get("size_bytes") {
            Some(Value::Number(number)) => number.as_u64(),
            // `vault kv put size_bytes=...` writes text.
            Some(Value::String(digits)) if digits.bytes().all(|c| c.is_ascii_digit()) => digits.parse().ok(),
            Some(_) => None,
            None => return Err(wrong("size_bytes", "is missing; it holds the bytes of all files")),
        };
        let Some(size_bytes) = size_bytes else { return Err(wrong("size_bytes", "is no whole number of bytes")) };
        let key = text("encryption_key", "a raw key in base64, or a transit ciphertext")?;
        let key = if key.starts_with("vault:") {
            let plain = key.len() <= SLOT_TRANSIT_BYTES_MAX && key.bytes().all(|c| c.is_ascii_graphic());
            if !plain || !is_transit(key) {
                return Err(wrong("encryption_key", "begins like a transit ciphertext and is none"));
            }
            RecordKey::Transit(key.to_owned())
        } else {
            let decoded = raw_key(key);
            RecordKey::Raw(decoded.ok_or_else(|| wrong("encryption_key", "is not 32 bytes in base64"))?)
        };
        Ok(Record { name: name.to_owned(), store, model_id, manifest, size_bytes, key, version })
    }
}

/// `vault:vN:` and something after it.
fn is_transit(text: &str) -> bool {
    let rest = text.strip_prefix("vault:v").and_then(|rest| rest.split_once(':'));
    rest.is_some_and(|(version, body)| version.parse::<u32>().is_ok_and(|v| v > 0) && !body.is_empty())
}

fn raw_key(text: &str) -> Option<Secret<32>> {
    let mut wide = Zeroizing::new([0u8; 33]); // base64 wants room for a padded group
    if text.len() != 44 || STANDARD.decode_slice(text, &mut wide[..]) != Ok(32) {
        return None;
    }
    let mut key = Zeroizing::new([0u8; 32]);
    key.copy_from_slice(&wide[..32]);
    (*key != [0; 32]).then(|| Secret::from_bytes(&mut key))
}

/// The five fields of a record that `seal` writes; those of other names stay as they were.
///
/// # Errors
/// `USAGE` for a store that is no bucket.
pub(super) fn fill(
    data: &mut Map<String, Value>,
    store: &StoreUrl,
    model_id: ModelId,
    manifest: ManifestDigest,
    size_bytes: u64,
    encryption_key: &str,
) -> Result<()> {
    let StoreUrl::S3 { bucket, prefix } = store else {
        refuse!(Usage, "a record names a bucket, and {store} is none; register models of s3:// stores only");
    };
    let key = if prefix.is_empty() { model_id.to_string() } else { format!("{prefix}/{model_id}") };
    data.insert("s3_bucket".into(), bucket.as_str().into());
    data.insert("s3_key".into(), key.into());
    data.insert("checksum".into(), format!("sha256:{manifest}").into());
    data.insert("size_bytes".into(), size_bytes.into());
    data.insert("encryption_key".into(), encryption_key.into());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ID: &str = "ee148d0c2a443fb2f078683d428bbeb84ad95b1111fe6f2b6f8b449a726bda1d";
    const DIGEST: &str = "sha256:517cc1d1929bc2c40ffad5438d4bb5bae18d1bde3a01817aa1ed62bd8ba4037a";

    fn good() -> Value {
        json!({
            "s3_bucket": "models",
            "s3_key": format!("prod/team/{ID}"),
            "checksum": DIGEST,
            "size_bytes": 1073741824u64,
            "encryption_key": STANDARD.encode([7; 32]),
        })
    }

    fn parse(value: Value) -> Result<Record> {
        Record::parse("acme/llama", value.as_object().expect("an object").clone(), 3)
    }

    #[test]
    fn a_record_of_five_fields_says_where_what_and_how() {
        let record = parse(good()).expect("a record");
        assert_eq!(record.store.to_string(), "s3://models/prod/team");
        assert_eq!(record.model_id.to_string(), ID);
        assert_eq!((record.size_bytes, record.version), (1 << 30, 3));
        let RecordKey::Raw(key) = &record.key else { panic!("{:?}", record.key) };
        assert_eq!(key.expose(), &[7; 32]);
    }

    #[test]
    fn other_fields_texts_of_digits_and_a_bucket_without_prefix_are_fine() {
        let mut value = good();
        value["owner"] = json!({"team": "x"});
        value["size_bytes"] = json!("12");
        value["s3_key"] = json!(ID);
        value["encryption_key"] = json!("vault:v2:abcd+/=");
        let record = parse(value).expect("a record");
        assert_eq!((record.size_bytes, record.store.to_string().as_str()), (12, "s3://models"));
        assert!(matches!(&record.key, RecordKey::Transit(text) if text == "vault:v2:abcd+/="));
    }

    /// Each names the record and the field, and repeats no value.
    #[test]
    fn missing_and_ill_typed_fields_are_refused_by_name_without_their_value() {
        for field in ["s3_bucket", "s3_key", "checksum", "size_bytes", "encryption_key"] {
            let mut missing = good();
            missing.as_object_mut().expect("an object").remove(field);
            let mut values = vec![missing];
            for bad in [json!(null), json!(true), json!(["canary"]), json!({"canary": 1}), json!(""), json!("canary?")]
            {
                let mut value = good();
                value[field] = bad;
                values.push(value);
            }
            for value in values {
                let error = parse(value.clone()).expect_err(field);
                assert_eq!(error.code(), Code::Catalog, "{value}");
                let text = error.chain();
                assert!(text.contains("acme/llama") && text.contains(field) && !text.contains("canary"), "{text}");
            }
        }
    }

    #[test]
    fn values_that_are_almost_right_are_refused() {
        let zero = STANDARD.encode([0; 32]);
        let short = STANDARD.encode([7; 31]);
        let long = STANDARD.encode([7; 33]);
        let huge = format!("vault:v1:{}", "a".repeat(600));
        for (field, bad) in [
            ("s3_bucket", json!("models/prod")),
            ("s3_bucket", json!("Models")),
            ("s3_key", json!(format!("/{ID}"))),
            ("s3_key", json!(format!("prod/{ID}/"))),
            ("s3_key", json!(format!("../{ID}"))),
            ("s3_key", json!(format!("a//{ID}"))),
            ("s3_key", json!(ID[1..])),
            ("s3_key", json!(ID.to_uppercase())),
            ("checksum", json!(DIGEST[7..])),
            ("checksum", json!(format!("{DIGEST}0"))),
            ("size_bytes", json!(-1)),
            ("size_bytes", json!(1.5)),
            ("size_bytes", json!("1e3")),
            ("size_bytes", json!("99999999999999999999")),
            ("encryption_key", json!(zero)),
            ("encryption_key", json!(short)),
            ("encryption_key", json!(long)),
            ("encryption_key", json!("vault:v1")),
            ("encryption_key", json!("vault:v0:abc")),
            ("encryption_key", json!("vault:v1:")),
            ("encryption_key", json!("vault:v1:a b")),
            ("encryption_key", json!(huge)),
        ] {
            let mut value = good();
            value[field] = bad.clone();
            assert_eq!(parse(value).expect_err(field).code(), Code::Catalog, "{field}: {bad}");
        }
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let mut data = Map::new();
        data.insert("owner".into(), "x".into());
        let store: StoreUrl = "s3://models/prod".parse().expect("a URL");
        let (id, digest) = (ModelId::of_name("m"), ManifestDigest([9; 32]));
        fill(&mut data, &store, id, digest, 42, "vault:v1:abc").expect("filled");
        assert_eq!(data["owner"], "x");
        let record = Record::parse("m", data, 1).expect("a record");
        assert_eq!((record.store, record.model_id, record.manifest, record.size_bytes), (store, id, digest, 42));
        let local: StoreUrl = "/srv/models".parse().expect("a path");
        assert_eq!(fill(&mut Map::new(), &local, id, digest, 1, "x").expect_err("no bucket").code(), Code::Usage);
    }
}
