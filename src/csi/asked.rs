//! From what a pod author wrote and the kubelet added to what is asked of the driver; nothing that is not the pod's to say.
//!
//! In: the fields of a publish request, all hostile: whoever may create a pod writes them. Out: [`Asked`], or a refusal in
//! words of a pod's YAML.
//! Promises: a pod names a store that the operator listed, a model, and how it is shown; never a file of the node, an address, a
//! trusted key or the size of the cache. It may be stricter than the operator, never laxer. Only read-only volumes.
//! Held by: the tests below, tests/kubernetes.sh.

use std::collections::{BTreeMap, HashMap};

use super::proto::{AccessType, Mode, NodePublishVolumeRequest};
use crate::error::{Code, Error, Result};
use crate::mem::LockedBuf;
use crate::processes::Pod;
use crate::refuse;
use crate::vault::wipe_map;

/// Words of `-o` that a pod author may set. Whatever else a mount knows is the operator's.
const POD_WORDS: &[&str] =
    &["key", "manifest", "model", "no-page-cache", "no-passthrough", "open", "require", "vault-role", "verify"];
/// Words of volumes alone: which store, and whether the mount lies one folder below the volume.
const STORE: &str = "store";
const BELOW: &str = "below";

/// What the kubelet adds under these prefixes is not the pod author's.
const KUBELET: &str = "csi.storage.k8s.io/";
const CLUSTER: &str = "storage.kubernetes.io/";
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// Longest value of an attribute: a digest takes 71.
const VALUE_BYTES_MAX: usize = 1024;

/// Who asks, as the kubelet says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub namespace: String,
    pub pod: String,
    pub pod_uid: String,
    pub service_account: String,
}

impl Identity {
    /// `None`: only half of it was said, and half of it would be somebody else.
    pub fn pod(&self) -> Option<Pod> {
        let whole = !self.pod.is_empty() && !self.pod_uid.is_empty();
        // As rules and control groups write it.
        let uid = self.pod_uid.to_ascii_lowercase();
        whole.then(|| Pod { name: format!("{}/{}", self.namespace, self.pod), uid })
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "service account {}/{}", self.namespace, self.service_account)
    }
}

/// What the operator lets pods say.
#[derive(Debug, Clone)]
pub struct Rules {
    /// The stores a pod may name; the first is meant when it names none.
    pub stores: Vec<String>,
    /// The operator's own word on this machine, for pods that name no key.
    pub key_given: bool,
    /// The operator lets tags alone count.
    pub aead_allowed: bool,
    /// The role of pods that name none.
    pub vault_role: Option<String>,
    /// Pods log in to Vault: a token is needed.
    pub vault: bool,
    /// The audience of that token.
    pub audience: String,
}

/// One volume of one pod, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub who: Identity,
    pub store: String,
    /// As in `-o`.
    pub words: Vec<String>,
    pub vault_role: Option<String>,
    /// The folder of the volume on which the model store is mounted; `None`: the volume itself.
    pub below: Option<String>,
    /// The pod's `fsGroup`.
    pub group: Option<u32>,
}

/// The token of the pod: in locked memory, wiped when dropped, and shown by nothing.
pub type Token = LockedBuf;

impl Asked {
    /// # Errors
    /// `USAGE` with the attribute or the field of the pod that is wrong, and how to write it.
    pub fn read(request: &NodePublishVolumeRequest, rules: &Rules) -> Result<(Asked, Option<Token>)> {
        let group = check_capability(request)?;
        let context = &request.volume_context;
        let said = |name: &str| context.get(&format!("{KUBELET}{name}")).cloned().unwrap_or_default();
        let who = Identity {
            namespace: said("pod.namespace"),
            pod: said("pod.name"),
            pod_uid: said("pod.uid"),
            service_account: said("serviceAccount.name"),
        };
        if who.namespace.is_empty() || who.service_account.is_empty() {
            refuse!(
                Usage,
                "the kubelet does not say whose volume it is; the CSIDriver object needs podInfoOnMount: true"
            );
        }
        let mut attributes = attributes(context)?;
        let store = match attributes.remove(STORE) {
            Some(store) => store,
            None => match rules.stores.first() {
                Some(first) => first.clone(),
                None => {
                    refuse!(Usage, "no store may be named on this node; the operator lists them with --allow-store")
                }
            },
        };
        if !rules.stores.contains(&store) {
            refuse!(
                Usage,
                "volumeAttributes.store: {store} is not among the stores of this cluster ({}); ask the operator to list it",
                rules.stores.join(", ")
            );
        }
        let below = attributes.remove(BELOW).map(check_folder).transpose()?;
        let vault_role = attributes.remove("vault-role").or_else(|| rules.vault_role.clone());
        if rules.vault && vault_role.is_none() {
            refuse!(Usage, "no Vault role; add volumeAttributes.vault-role, the role that {who} may log in to");
        }
        if attributes.get("verify").is_some_and(|mode| mode == "aead") && !rules.aead_allowed {
            refuse!(Usage, "volumeAttributes.verify: the operator wants every chunk hashed; leave verify out");
        }
        if !attributes.contains_key("model") {
            refuse!(Usage, "no model named; add volumeAttributes.model, as in acme/llama or acme/llama@prod");
        }
        let catalog = store.starts_with("vault-kv:");
        match attributes.get("key") {
            Some(key) => check_key(key)?,
            None if rules.key_given || catalog => {}
            None => {
                refuse!(Usage, "no key named; add volumeAttributes.key, as in vault-transit:transit/MODEL")
            }
        }
        let words = attributes.iter().flat_map(|(name, value)| words(name, value)).collect();
        let token = if rules.vault { Some(token(request, &rules.audience)?) } else { None };
        Ok((Asked { who, store, words, vault_role, below, group }, token))
    }

    /// The models, as the pod names them.
    pub fn models(&self) -> String {
        let names: Vec<&str> = self.words.iter().filter_map(|word| word.strip_prefix("model=")).collect();
        names.join(", ")
    }
}

/// Models and keys may be several, separated by commas; each becomes a word of its own.
fn words(name: &str, value: &str) -> Vec<String> {
    match name {
        "model" | "key" | "require" => value.split(',').map(|one| format!("{name}={}", one.trim())).collect(),
        _ => vec![format!("{name}={value}")],
    }
}

fn attributes(context: &HashMap<String, String>) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for (name, value) in context {
        if name.starts_with(KUBELET) || name.starts_with(CLUSTER) {
            continue;
        }
        let shown: String = name.chars().take(64).collect();
        let dashed = name.replace('_', "-");
        if ![STORE, BELOW].contains(&dashed.as_str()) && !POD_WORDS.contains(&dashed.as_str()) {
            let mut known: Vec<&str> = POD_WORDS.iter().copied().chain([STORE, BELOW]).collect();
            known.sort_unstable();
            refuse!(
                Usage,
                "volumeAttributes.{shown} is not for a pod to set; it may set {}, and the operator the rest",
                known.join(", ")
            );
        }
        if value.is_empty() || value.len() > VALUE_BYTES_MAX || value.chars().any(char::is_control) {
            refuse!(Usage, "volumeAttributes.{shown} is empty, longer than {VALUE_BYTES_MAX} bytes or not plain text");
        }
        if found.insert(dashed, value.clone()).is_some() {
            refuse!(Usage, "volumeAttributes.{shown} is written twice, with - and with _");
        }
    }
    Ok(found)
}

/// Only keys that Vault gives to the pod itself: a file, a variable or a passphrase would be the node's.
fn check_key(keys: &str) -> Result<()> {
    for key in keys.split(',').map(str::trim) {
        if !key.starts_with("vault-transit:") && !key.starts_with("vault-kv:") {
            let kind = key.split(':').next().unwrap_or_default();
            refuse!(
                Usage,
                "volumeAttributes.key: a pod may name keys in Vault, not `{kind}:` keys of the node; write \
                 vault-transit:MOUNT/KEY or vault-kv:MOUNT/PATH#FIELD"
            );
        }
    }
    Ok(())
}

fn check_folder(name: String) -> Result<String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.len() > 64 || name.starts_with('.') || !name.chars().all(legal) {
        refuse!(Usage, "volumeAttributes.below: `{name}` is not the name of one folder, of letters, digits, . _ and -");
    }
    Ok(name)
}

/// Only a mounted, read-only volume. Answers the group.
fn check_capability(request: &NodePublishVolumeRequest) -> Result<Option<u32>> {
    let Some(capability) = &request.volume_capability else { refuse!(Usage, "the request names no volume capability") };
    let mount = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => refuse!(Usage, "models are files, not a device; leave out volumeMode: Block"),
        None => refuse!(Usage, "the request says neither mount nor block"),
    };
    if let Some(flag) = mount.mount_flags.iter().find(|flag| flag.as_str() != "ro") {
        refuse!(Usage, "mountOptions: `{flag}` is not known here; options go into volumeAttributes");
    }
    if !["", "modelfs"].contains(&mount.fs_type.as_str()) {
        refuse!(Usage, "fsType: {} is not what is in a model store; leave it out", mount.fs_type);
    }
    let mode = capability.access_mode.as_ref().map_or(Mode::Unknown, |mode| mode.mode());
    let reads_only = matches!(mode, Mode::SingleNodeReaderOnly | Mode::MultiNodeReaderOnly);
    if !reads_only && !request.readonly {
        let ephemeral = request.volume_context.get(&format!("{KUBELET}ephemeral")).is_some_and(|said| said == "true");
        match ephemeral {
            true => refuse!(Usage, "models are read-only; add readOnly: true below csi: of the pod's volume"),
            false => refuse!(
                Usage,
                "models are read-only; write accessModes: [ReadOnlyMany] in the PersistentVolume and the claim"
            ),
        }
    }
    match mount.volume_mount_group.as_str() {
        "" => Ok(None),
        digits => match digits.parse() {
            Ok(group) => Ok(Some(group)),
            Err(_) => refuse!(Usage, "fsGroup `{digits}` is not a group number"),
        },
    }
}

/// `{"AUDIENCE": {"token": "...", ...}}`, beside the attributes or, from Kubernetes 1.35 on, among the secrets.
fn token(request: &NodePublishVolumeRequest, audience: &str) -> Result<Token> {
    let text = request.secrets.get(TOKENS).or_else(|| request.volume_context.get(TOKENS));
    let missing = || {
        Error::new(
            Code::Usage,
            format!(
                "the kubelet sent no token of the pod; the CSIDriver object needs tokenRequests: [{{audience: {audience}}}]"
            ),
        )
    };
    let parsed = serde_json::from_str(text.ok_or_else(missing)?);
    // Tokens for other audiences are in there too.
    let mut tokens: serde_json::Map<String, serde_json::Value> = parsed.map_err(|_| missing())?;
    let token = tokens.get(audience).and_then(|one| one.get("token")).and_then(serde_json::Value::as_str);
    let token = token.filter(|token| !token.is_empty()).map(|token| LockedBuf::copy_of(token.as_bytes()));
    wipe_map(&mut tokens);
    token.ok_or_else(missing)?
}

#[cfg(test)]
pub mod tests {
    use super::super::proto::{AccessMode, BlockVolume, MountVolume, VolumeCapability};
    use super::*;

    pub fn rules() -> Rules {
        Rules {
            stores: vec!["s3://models/prod".into(), "s3://models/test".into()],
            key_given: false,
            aead_allowed: false,
            vault_role: None,
            vault: true,
            audience: "vault".into(),
        }
    }

    pub fn request(attributes: &[(&str, &str)]) -> NodePublishVolumeRequest {
        let mut context: HashMap<String, String> = [
            ("pod.name", "llama-0"),
            ("pod.namespace", "chat"),
            ("pod.uid", "0f8fad5b-d9cb-469f-a165-70867728950e"),
            ("serviceAccount.name", "reader"),
            ("ephemeral", "true"),
            ("serviceAccount.tokens", r#"{"vault":{"token":"pod-jwt","expirationTimestamp":"2030-01-01T00:00:00Z"}}"#),
        ]
        .into_iter()
        .map(|(name, value)| (format!("{KUBELET}{name}"), value.to_owned()))
        .collect();
        context.extend(attributes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        NodePublishVolumeRequest {
            volume_id: "csi-1".into(),
            target_path: "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/m/mount".into(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume::default())),
                access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter as i32 }),
            }),
            readonly: true,
            volume_context: context,
            ..Default::default()
        }
    }

    const GOOD: &[(&str, &str)] =
        &[("model", "acme/llama@prod"), ("key", "vault-transit:transit/llama"), ("vault-role", "llama")];

    fn refusal(more: &[(&str, &str)]) -> String {
        let mut attributes = GOOD.to_vec();
        attributes.extend(more);
        let error = Asked::read(&request(&attributes), &rules()).expect_err("refused");
        assert_eq!(error.code(), Code::Usage);
        error.chain()
    }

    #[test]
    fn a_good_request_becomes_words_and_a_token() {
        let (asked, token) = Asked::read(&request(GOOD), &rules()).expect("asked");
        assert_eq!(asked.store, "s3://models/prod");
        assert_eq!(asked.words, ["key=vault-transit:transit/llama", "model=acme/llama@prod"]);
        assert_eq!(asked.vault_role.as_deref(), Some("llama"));
        assert_eq!(asked.who.to_string(), "service account chat/reader");
        let token = token.expect("a token");
        assert_eq!(&token[..], b"pod-jwt");
        assert_eq!(format!("{token:?}"), "LockedBuf(7 bytes)");
        let (asked, _) = Asked::read(&request(&[("model", "a, b"), GOOD[1], GOOD[2]]), &rules()).expect("asked");
        assert_eq!(asked.models(), "a, b");
    }

    /// In case somebody logs it one day.
    #[test]
    fn a_request_shows_no_token_of_the_pod() {
        let mut request = request(GOOD);
        request.secrets.insert(TOKENS.into(), r#"{"vault":{"token":"from-secrets"}}"#.into());
        let shown = format!("{request:?}");
        assert!(shown.contains("csi-1") && !shown.contains("pod-jwt") && !shown.contains("from-secrets"), "{shown}");
    }

    #[test]
    fn what_is_the_operators_is_refused_to_a_pod_whatever_the_spelling() {
        for word in crate::config::layers::OPTIONS.iter().map(|spec| spec.name).filter(|name| !POD_WORDS.contains(name))
        {
            for name in [word.to_owned(), word.replace('-', "_")] {
                assert!(refusal(&[(&name, "x")]).contains("not for a pod to set"), "{name}");
            }
        }
        assert!(refusal(&[("store", "file:///etc")]).contains("not among the stores"));
        assert!(refusal(&[("verify", "aead")]).contains("every chunk hashed"));
        assert!(refusal(&[("below", "../x")]).contains("one folder"));
        assert!(refusal(&[("vault_role", "x")]).contains("twice"));
        assert!(refusal(&[("open", "a\nb")]).contains("not plain text"));
    }

    #[test]
    fn a_key_of_the_node_is_refused() {
        for key in ["file:/etc/modelfs/k", "env:MODELFS_KEY", "passphrase", "x25519:/k", "vault-transit:t/k,file:/k"] {
            let error = Asked::read(&request(&[GOOD[0], ("key", key), GOOD[2]]), &rules()).expect_err(key);
            assert!(error.chain().contains("not `"), "{error:?}");
        }
        let error = Asked::read(&request(&[GOOD[0], GOOD[2]]), &rules()).expect_err("no key at all");
        assert!(error.chain().contains("no key named"), "{error:?}");
        let operators = Rules { key_given: true, ..rules() };
        Asked::read(&request(&[GOOD[0], GOOD[2]]), &operators).expect("the operator's key");
    }

    #[test]
    fn a_writable_volume_or_a_device_is_refused_in_the_words_of_the_manifest() {
        let mut writable = request(GOOD);
        writable.readonly = false;
        let said = |request: &NodePublishVolumeRequest| Asked::read(request, &rules()).expect_err("refused").chain();
        assert!(said(&writable).contains("readOnly: true"));
        writable.volume_context.remove("csi.storage.k8s.io/ephemeral");
        assert!(said(&writable).contains("ReadOnlyMany"));
        let mut capability = writable.volume_capability.clone().expect("there");
        capability.access_mode = Some(AccessMode { mode: Mode::MultiNodeReaderOnly as i32 });
        writable.volume_capability = Some(capability.clone());
        Asked::read(&writable, &rules()).expect("a reader");
        capability.access_type = Some(AccessType::Block(BlockVolume {}));
        writable.volume_capability = Some(capability);
        assert!(said(&writable).contains("not a device"));
    }

    #[test]
    fn without_a_token_of_that_audience_nothing_is_asked_of_vault() {
        let mut request = request(GOOD);
        for tokens in ["", "{}", "[]", r#"{"other":{"token":"x"}}"#, r#"{"vault":{"token":""}}"#] {
            request.volume_context.insert(TOKENS.into(), tokens.into());
            let error = Asked::read(&request, &rules()).expect_err(tokens);
            assert!(error.chain().contains("tokenRequests"), "{error:?}");
            assert!(!error.chain().contains("pod-jwt"));
        }
        request.secrets.insert(TOKENS.into(), r#"{"vault":{"token":"from secrets"}}"#.into());
        let (_, token) = Asked::read(&request, &rules()).expect("asked");
        assert_eq!(&token.expect("a token")[..], b"from secrets");
    }
}
