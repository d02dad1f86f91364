//! Names of objects on the store, made and read here and nowhere else. docs/FORMAT.md a.1.
//!
//! Everything of a model lies below `<model id>/`; only `name` tells what the model is called.

use super::{ChannelId, KeyId, ManifestDigest, ModelId, Oid, Vid, check_channel};

/// `d/<oid>`: one data object.
pub fn data(model: ModelId, oid: Oid) -> String {
    format!("{model}/d/{oid}")
}

pub fn data_dir(model: ModelId) -> String {
    format!("{model}/d/")
}

/// `m/<digest>`: one manifest.
pub fn manifest(model: ModelId, digest: ManifestDigest) -> String {
    format!("{model}/m/{digest}")
}

pub fn manifests_dir(model: ModelId) -> String {
    format!("{model}/m/")
}

/// `s/<digest>/<key id>`: one publisher's signature over one manifest.
pub fn signature(model: ModelId, digest: ManifestDigest, key: KeyId) -> String {
    format!("{model}/s/{digest}/{key}")
}

pub fn signatures_dir(model: ModelId, digest: ManifestDigest) -> String {
    format!("{model}/s/{digest}/")
}

/// A publisher's raw public key, content-addressed: believed only by those who trust on first use.
pub fn public_key(model: ModelId, key: KeyId) -> String {
    format!("{model}/p/{key}")
}

/// `k/<vid>/<generation>`: the key slots of one version.
pub fn slots(model: ModelId, vid: Vid, generation: u32) -> String {
    format!("{model}/k/{vid}/{generation:010}")
}

pub fn slots_dir(model: ModelId, vid: Vid) -> String {
    format!("{model}/k/{vid}/")
}

/// `k/`: the slots of every version.
pub fn all_slots_dir(model: ModelId) -> String {
    format!("{model}/k/")
}

/// `r/<channel>/<ref_seq>`: one ref.
pub fn reference(model: ModelId, channel: &str, ref_seq: u64) -> String {
    format!("{model}/r/{channel}/{ref_seq:020}")
}

/// `r/<channel>/head`: a hint at the newest ref, overwritten, believed by nobody.
pub fn head(model: ModelId, channel: &str) -> String {
    format!("{model}/r/{channel}/head")
}

pub fn channel_dir(model: ModelId, channel: &str) -> String {
    format!("{model}/r/{channel}/")
}

pub fn refs_dir(model: ModelId) -> String {
    format!("{model}/r/")
}

/// `name`: what the model is called, believed only if it hashes to the model id.
pub fn model_name(model: ModelId) -> String {
    format!("{model}/name")
}

/// `l/<random>`: the oids a publisher is about to inherit, so that a collector leaves them alone.
pub fn lease(model: ModelId, random: &[u8; 16]) -> String {
    format!("{model}/l/{}", hex::encode(random))
}

pub fn leases_dir(model: ModelId) -> String {
    format!("{model}/l/")
}

/// `probe/<random>`: what a publisher creates twice to learn whether the store keeps create-only.
pub fn probe(random: &[u8; 16]) -> String {
    format!("probe/{}", hex::encode(random))
}

/// The folder of a model: its whole prefix.
pub fn model_dir(model: ModelId) -> String {
    format!("{model}/")
}

/// The last component of a listed name.
fn leaf(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Exactly `digits` decimal digits that fit a u64, as the names above write them.
fn number(text: &str, digits: usize) -> Option<u64> {
    let exact = text.len() == digits && text.bytes().all(|c| c.is_ascii_digit());
    exact.then(|| text.parse().ok()).flatten()
}

/// The generation in a listed slots name; `None` for anything a writer of this format does not make.
pub fn slots_generation(name: &str) -> Option<u32> {
    number(leaf(name), 10).and_then(|generation| u32::try_from(generation).ok())
}

/// The ref_seq in a listed ref name; `None` for `head` and for strangers.
pub fn ref_seq(name: &str) -> Option<u64> {
    number(leaf(name), 20)
}

/// The oid in a listed data object's name.
pub fn oid(name: &str) -> Option<Oid> {
    Oid::from_hex(leaf(name))
}

/// The digest in a listed manifest's name.
pub fn manifest_digest(name: &str) -> Option<ManifestDigest> {
    ManifestDigest::from_hex(leaf(name))
}

/// The key id in a listed signature's name.
pub fn key_id(name: &str) -> Option<KeyId> {
    KeyId::from_hex(leaf(name))
}

/// The version in a listed folder below `k/`.
pub fn vid(dir: &str) -> Option<Vid> {
    Vid::from_hex(leaf(dir.trim_end_matches('/')))
}

/// The model in a listed folder at the root of a store.
pub fn model_id(dir: &str) -> Option<ModelId> {
    ModelId::from_hex(leaf(dir.trim_end_matches('/')))
}

/// The channel in a listed folder below `r/`, if its name keeps the rules of a channel.
pub fn channel(dir: &str) -> Option<&str> {
    let name = leaf(dir.trim_end_matches('/'));
    check_channel(name).ok().map(|()| name)
}

/// Whether the bytes of a `name` object name this model: the only way such bytes are believed.
pub fn believed_name(model: ModelId, bytes: &[u8]) -> Option<&str> {
    let name = std::str::from_utf8(bytes).ok()?;
    super::check_model_name(name).ok()?;
    (ModelId::of_name(name) == model).then_some(name)
}

/// Whether a ref's channel id is the one of `channel`.
pub fn is_channel(id: ChannelId, channel: &str) -> bool {
    ChannelId::of_name(channel) == id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_as_they_were_made() {
        let model = ModelId([1; 32]);
        let vid_ = Vid([2; 16]);
        assert_eq!(slots_generation(&slots(model, vid_, u32::MAX)), Some(u32::MAX));
        assert_eq!(ref_seq(&reference(model, "prod", u64::MAX)), Some(u64::MAX));
        assert_eq!(oid(&data(model, Oid([3; 32]))), Some(Oid([3; 32])));
        assert_eq!(manifest_digest(&manifest(model, ManifestDigest([4; 32]))), Some(ManifestDigest([4; 32])));
        assert_eq!(key_id(&signature(model, ManifestDigest([4; 32]), KeyId([5; 32]))), Some(KeyId([5; 32])));
        assert_eq!(vid(&slots_dir(model, vid_)), Some(vid_));
        assert_eq!(model_id(&model_dir(model)), Some(model));
        assert_eq!(channel(&channel_dir(model, "prod")), Some("prod"));
        assert_eq!(slots(model, vid_, 3), format!("{model}/k/{vid_}/0000000003"));
        assert_eq!(reference(model, "prod", 42), format!("{model}/r/prod/00000000000000000042"));
    }

    #[test]
    fn strange_names_are_no_numbers() {
        for name in ["head", "1", "0000000000000000001", "000000000000000000001", "+0000000000000000001"] {
            assert_eq!(ref_seq(&format!("x/r/prod/{name}")), None, "{name}");
        }
        assert_eq!(ref_seq("x/r/prod/99999999999999999999"), None, "above u64");
        assert_eq!(slots_generation("x/k/y/9999999999"), None, "above u32");
        assert_eq!(channel("x/r/3/"), None);
        assert_eq!(model_id("probe/"), None);
    }

    #[test]
    fn a_name_object_is_believed_only_if_it_hashes_to_its_model() {
        let model = ModelId::of_name("acme/llama-70b");
        assert_eq!(believed_name(model, b"acme/llama-70b"), Some("acme/llama-70b"));
        for lie in [&b"acme/llama-70"[..], b"", b"\xff", b"acme/llama-70b\n"] {
            assert_eq!(believed_name(model, lie), None);
        }
    }
}
