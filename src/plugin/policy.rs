//! What a volume may say for itself, and what its administrator keeps.
//!
//! Whoever may make volumes is not thereby the administrator of the machine: a volume must not read a file of the host,
//! send the plugin's credentials to a server of its choice, or believe others than the administrator does.
//!
//! In: the administrator's layers (`--config`, environment, flags), a volume's options. Out: both as layers of one mount, or
//! the option that is refused, by name and never with its value: that may be a secret put there by mistake.
//! Promises: an option that this page does not know is the administrator's; files that a volume names lie below `key-dir`,
//! where links lead counted; so do local stores below `allow-store`.
//! Held by: the tests below, tests/docker.sh.

use std::path::{Path, PathBuf};

use super::Options;
use crate::config::layers::{Kind, OptionSpec, find, split_list};
use crate::config::{Layers, parse_store};
use crate::error::{Code, Error, Result};
use crate::keys::KeySource;
use crate::refuse;
use crate::store::StoreUrl;

/// Who has the last word on an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// The volume.
    Volume,
    /// The administrator, if the plugin's own configuration says anything of it; else the volume.
    Kept,
    /// The administrator alone; why.
    Administrator(&'static str),
}

fn rule(name: &str) -> Rule {
    match name {
        "allow-other" | "gid" | "key" | "manifest" | "model" | "open" | "require" | "retire-after" | "uid"
        | "umask" | "versions" => Rule::Volume,
        // As whom the volume logs in to the administrator's Vault: its credentials are files below key-dir.
        "vault-auth"
        | "vault-auth-mount"
        | "vault-aws-region"
        | "vault-client-cert"
        | "vault-client-key"
        | "vault-jwt-file"
        | "vault-namespace"
        | "vault-password-file"
        | "vault-role"
        | "vault-role-id"
        | "vault-secret-id-file"
        | "vault-secret-id-wrapped"
        | "vault-timeout"
        | "vault-token-file"
        | "vault-username" => Rule::Volume,
        "fetch-budget" | "fetch-timeout" | "floor" | "key-loss-check" | "locked-opens" | "min-ref-seq"
        | "no-page-cache" | "no-passthrough" | "on-key-loss" | "origin-bytes" | "origin-inflight"
        | "origin-requests" | "require-floor" | "s3-credentials" | "s3-endpoint" | "s3-region" | "slot-label"
        | "trust" | "trust-file" | "trust-on-first-use" => Rule::Kept,
        "verify" => Rule::Kept,
        "cache" => Rule::Administrator("one cache serves all volumes"),
        "log" | "log-file" | "log-format" => Rule::Administrator("the plugin has one log"),
        "lock-when-idle" => Rule::Administrator("volumes of one version share it, and one of them alone is idle"),
        "ready-timeout" => Rule::Administrator("how long a mount may take is the container engine's to say"),
        "profile" => Rule::Administrator("it is written to"),
        "vault-addr" | "vault-aws-server-id" | "vault-aws-sts" | "vault-ca-cert" | "vault-plain-http" => {
            Rule::Administrator("credentials are sent there")
        }
        "audit"
        | "audit-checkpoint-every"
        | "audit-checkpoint-file"
        | "audit-checkpoint-records"
        | "audit-file"
        | "audit-file-bytes"
        | "audit-journal"
        | "audit-keep"
        | "audit-key" => Rule::Administrator("one log serves all volumes"),
        "alert-severity" | "alert-webhook" | "alert-webhook-file" | "http" | "http-cert" | "http-key"
        | "http-token-file" => Rule::Administrator("whoever looks after the plugin is told"),
        "control-admin" | "control-operator" | "control-viewer" => Rule::Administrator("it says who gives orders"),
        "policy" | "max-model-size" | "deny-types" => Rule::Administrator("it says what volumes may show, and to whom"),
        "state-dir" => Rule::Administrator("what was seen of all volumes is remembered there"),
        "allow-store" | "key-dir" => Rule::Administrator("it says what volumes may name"),
        "audience" | "driver-name" | "kubelet-dir" | "kubelet-socket" | "max-volumes" | "no-registration"
        | "node-id" | "recheck" | "registry" | "socket" => Rule::Administrator("it is the driver's own"),
        "keep-env" | "strict" => Rule::Administrator("it is for modelfs run"),
        "cipher" | "codec" | "hide-name" => Rule::Administrator("it is for modelfs seal"),
        _ => Rule::Administrator("it is none of a volume's options"),
    }
}

/// Options of which one changes what the others mean: who keeps one, keeps all.
const TRUST: [&str; 3] = ["trust", "trust-file", "trust-on-first-use"];

pub struct Policy {
    administrator: Layers,
    /// Empty: any store but local ones.
    stores: Vec<StoreUrl>,
    /// Without links.
    key_dirs: Vec<PathBuf>,
}

impl Policy {
    /// # Errors
    /// `USAGE` for a folder that is not there, a prefix that is no store, a key that nobody can be asked for.
    pub fn from_layers(administrator: Layers) -> Result<Policy> {
        let stores = administrator.parse_all("allow-store", allowed_store)?;
        let key_dirs = administrator.parse_all("key-dir", |text| canonical(Path::new(text)))?;
        let sources: Vec<KeySource> = administrator.parse_all("key", str::parse)?;
        if sources.contains(&KeySource::Passphrase) {
            refuse!(Usage, "a volume plugin has no terminal to ask for a passphrase at; use passphrase-file:PATH");
        }
        let in_environment = |source: &KeySource| matches!(source, KeySource::Env(_));
        if sources.iter().any(in_environment) || (sources.is_empty() && !KeySource::env_defaults().is_empty()) {
            refuse!(
                Usage,
                "a key in the environment is read once and wiped, and volumes are mounted again and again; use file:PATH, \
                 or Vault"
            );
        }
        for name in ["lock-when-idle", "profile"] {
            if let Some(setting) = administrator.get(name) {
                refuse!(Usage, "{setting} is for one mount, and volumes are many; leave it out");
            }
        }
        Ok(Policy { administrator, stores, key_dirs })
    }

    /// The store, and the layers of a mount of this volume.
    ///
    /// # Errors
    /// `USAGE` naming the option.
    pub fn admit(&self, options: &Options) -> Result<(String, Layers)> {
        let mut store = None;
        let mut words = Vec::new();
        for (name, value) in options {
            if name == "store" {
                store = Some(value.as_str());
                continue;
            }
            if looks_secret(name) && find(name).is_none() {
                refuse!(
                    Usage,
                    "option {} would leave a secret with the engine, for all to read; put it into a file of mode 0600 \
                     and name that: key=file:PATH, passphrase-file:PATH, vault-token-file=PATH; treat this one as known",
                    plain(name)
                );
            }
            let spec = find(name);
            let value = match spec {
                // What the engine makes of an option without a value.
                Some(spec) if spec.kind == Kind::Switch && value.is_empty() => "true",
                _ => value.as_str(),
            };
            if value.chars().any(char::is_control) {
                refuse!(Usage, "option {} holds a control character", plain(name));
            }
            match spec {
                Some(spec) => {
                    let mut values = if spec.kind == Kind::Many { split_list(value) } else { vec![value.to_owned()] };
                    if values.is_empty() {
                        values.push(String::new());
                    }
                    self.check(spec, &values).map_err(|e| e.context(format!("option {} is refused", spec.name)))?;
                    words.extend(values.into_iter().map(|value| format!("{}={value}", spec.name)));
                }
                // The layers know the nearest one, and mount(8)'s own words.
                None => words.push(name.clone()),
            }
        }
        let Some(store) = store else {
            refuse!(Usage, "a volume needs its store: -o store=s3://bucket/prefix");
        };
        self.check_store(store).map_err(|e| e.context("option store is refused"))?;
        let mut layers = self.administrator.clone();
        layers.mount_options(&words, false)?;
        // The mount is for containers, whatever user they run as; modes and owner decide.
        layers.flag("allow-other", vec!["true".into()]);
        Ok((store.to_owned(), layers))
    }

    fn check(&self, spec: &'static OptionSpec, values: &[String]) -> Result<()> {
        let said = |name| self.administrator.get(name);
        match rule(spec.name) {
            Rule::Administrator(why) => {
                refuse!(Usage, "it is the administrator's, in the plugin's configuration: {why}")
            }
            Rule::Kept => {
                let group: &[&'static str] = if TRUST.contains(&spec.name) { &TRUST } else { &[spec.name] };
                let stricter = spec.name == "verify" && values == ["strict"];
                if let Some(kept) = group.iter().find_map(|name| said(name))
                    && kept.values != values
                    && !stricter
                {
                    refuse!(Usage, "the administrator has decided it ({kept})");
                }
                if spec.name == "verify" && !stricter && said("verify").is_none() {
                    refuse!(Usage, "less than strict is for the administrator to allow, in the plugin's configuration");
                }
                if spec.name == "s3-endpoint" && said("s3-endpoint").is_none() {
                    refuse!(
                        Usage,
                        "our storage credentials go there, so where stores are is the administrator's to say, in the plugin's \
                         configuration"
                    );
                }
            }
            Rule::Volume => {}
        }
        match spec.name {
            "key" => values.iter().try_for_each(|value| self.check_key(value)),
            "trust" => values.iter().filter(|value| !is_hex_key(value)).try_for_each(|value| self.check_file(value)),
            "trust-file" => values.iter().try_for_each(|value| self.check_file(value)),
            name if name.ends_with("-file") || name == "vault-client-cert" || name == "vault-client-key" => {
                values.iter().try_for_each(|value| self.check_file(value))
            }
            _ => Ok(()),
        }
    }

    fn check_key(&self, text: &str) -> Result<()> {
        if is_key_itself(text) {
            refuse!(
                Usage,
                "that is a key itself, and the engine would show it to all; put it into a file of mode 0600 and write \
                 key=file:PATH; treat this one as known"
            );
        }
        let file = |path: &Path| self.check_file(path.to_str().unwrap_or_default());
        match text.parse::<KeySource>()? {
            KeySource::File(path) | KeySource::PassphraseFile(path) | KeySource::X25519(path) => file(&path),
            KeySource::VaultTransit { .. } | KeySource::VaultKv { .. } => Ok(()),
            KeySource::Passphrase => refuse!(Usage, "nobody can be asked for a passphrase; use passphrase-file:PATH"),
            KeySource::Env(_) => {
                refuse!(Usage, "the environment is the administrator's; use file:PATH below a key-dir, or Vault")
            }
            KeySource::Recipient(_) | KeySource::RecipientFile(_) => {
                refuse!(Usage, "the public half of a key opens nothing; name the secret one: x25519:PATH")
            }
        }
    }

    /// Below a folder that the administrator lends. What is outside is not looked at: whether it exists is not told.
    fn check_file(&self, text: &str) -> Result<()> {
        if self.key_dirs.is_empty() {
            refuse!(Usage, "volumes may name no file of this host; the administrator lends a folder with --key-dir");
        }
        let path = Path::new(text);
        let dirs = || self.key_dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(" or ");
        if !path.is_absolute() || !is_tidy(path) || !self.key_dirs.iter().any(|dir| path.starts_with(dir)) {
            refuse!(Usage, "the file must be named by its absolute path, below {}", dirs());
        }
        let real = canonical(path)?;
        if !self.key_dirs.iter().any(|dir| real.starts_with(dir)) {
            refuse!(Usage, "the file leads out of {}", dirs());
        }
        Ok(())
    }

    fn check_store(&self, text: &str) -> Result<()> {
        let store = parse_store(text)?;
        let StoreUrl::Local(path) = &store else {
            if !self.stores.is_empty() && !self.stores.iter().any(|allowed| is_below(&store, allowed)) {
                refuse!(Usage, "it is not below a store that the administrator allows (--allow-store)");
            }
            return Ok(());
        };
        let allowed: Vec<&StoreUrl> = self.stores.iter().filter(|s| matches!(s, StoreUrl::Local(_))).collect();
        if allowed.is_empty() {
            refuse!(Usage, "volumes may name no folder of this host; the administrator allows one with --allow-store");
        }
        let outside =
            || Error::new(Code::Usage, "it is not below a store that the administrator allows (--allow-store)");
        if !is_tidy(path) || !allowed.iter().any(|allowed| is_below(&store, allowed)) {
            return Err(outside());
        }
        let real = StoreUrl::Local(canonical(path)?);
        if allowed.iter().any(|allowed| is_below(&real, allowed)) { Ok(()) } else { Err(outside()) }
    }
}

/// A prefix of stores; a local one without links, so that what is compared with it need have none either.
fn allowed_store(text: &str) -> Result<StoreUrl> {
    match parse_store(text)? {
        StoreUrl::Local(path) => Ok(StoreUrl::Local(canonical(&path)?)),
        other => Ok(other),
    }
}

/// The same place or one below it, by whole words: `prod` is not above `production`.
fn is_below(store: &StoreUrl, allowed: &StoreUrl) -> bool {
    let within = |path: &str, top: &str| {
        top.is_empty() || path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    match (store, allowed) {
        (StoreUrl::Local(path), StoreUrl::Local(top)) => path.starts_with(top),
        (StoreUrl::S3 { bucket, prefix }, StoreUrl::S3 { bucket: b, prefix: top }) => {
            bucket == b && within(prefix, top)
        }
        (StoreUrl::VaultKv { mount, path }, StoreUrl::VaultKv { mount: m, path: top }) => {
            mount == m && within(path, top)
        }
        _ => false,
    }
}

fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path)
        .map_err(|e| Error::new(Code::Usage, format!("{} cannot be found", path.display())).with_source(e))
}

fn is_tidy(path: &Path) -> bool {
    path.components().all(|part| !matches!(part, std::path::Component::ParentDir))
}

fn is_hex_key(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// 32 bytes in hex or base64.
fn is_key_itself(text: &str) -> bool {
    use base64::Engine;
    let base64 = base64::engine::general_purpose::STANDARD.decode(text).is_ok_and(|bytes| bytes.len() == 32);
    is_hex_key(text) || base64
}

/// Names under which people hand over secrets.
fn looks_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace('_', "-");
    ["passphrase", "password", "secret", "token", "access-key", "encryption-key"].iter().any(|word| name.contains(word))
}

/// A name as it may be shown.
fn plain(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::config::layers::OPTIONS;

    fn options(words: &str) -> Options {
        let pair = |word: &str| {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            (name.to_owned(), value.to_owned())
        };
        words.split(' ').filter(|word| !word.is_empty()).map(pair).collect()
    }

    fn policy(flags: &[(&'static str, &str)]) -> Policy {
        let mut layers = Layers::default();
        for (name, value) in flags {
            layers.flag(name, vec![(*value).to_owned()]);
        }
        Policy::from_layers(layers).unwrap()
    }

    #[track_caller]
    fn refused(policy: &Policy, words: &str, why: &str) {
        let err = policy.admit(&options(words)).err().unwrap_or_else(|| panic!("{words} was admitted"));
        assert!(err.code() == Code::Usage && err.chain().contains(why), "{words}: wanted {why:?} in {}", err.chain());
    }

    const STORE: &str = "store=s3://models/prod ";

    #[test]
    fn every_option_of_a_mount_has_a_rule() {
        let none = Rule::Administrator("it is none of a volume's options");
        assert_eq!(rule("an-option-of-tomorrow"), none);
        for spec in OPTIONS {
            assert_ne!(rule(spec.name), none, "{} is in no rule", spec.name);
        }
    }

    #[test]
    fn words_of_a_volume_lie_above_the_administrators_and_others_may_always_enter() {
        let policy = policy(&[("key", "vault-transit:transit/models"), ("open", "lazy"), ("trust", "/t.pub")]);
        let (store, layers) =
            policy.admit(&options(&format!("{STORE}model=a,b open=whole uid=1000 versions"))).unwrap();
        assert_eq!(store, "s3://models/prod");
        assert_eq!(layers.get("model").unwrap().values, ["a", "b"]);
        assert_eq!(layers.get("open").unwrap().last(), "whole");
        assert_eq!(layers.get("key").unwrap().last(), "vault-transit:transit/models");
        assert!(layers.switch("allow-other").unwrap() && layers.switch("versions").unwrap());
    }

    #[test]
    fn a_typo_and_a_missing_store_are_told_by_name() {
        let policy = policy(&[]);
        refused(&policy, "model=a", "-o store=");
        refused(&policy, &format!("{STORE}modle=a"), "did you mean `model`");
        refused(&policy, &format!("{STORE}model="), "needs a value");
        refused(&policy, "store=gopher://x", "s3://bucket/prefix");
    }

    #[test]
    fn a_secret_itself_is_refused_and_never_repeated() {
        let policy = policy(&[("key-dir", "/etc")]);
        let hex = "5a".repeat(32);
        for (words, why) in [
            (format!("{STORE}key={hex}"), "that is a key itself"),
            (format!("{STORE}key=WlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlo="), "that is a key itself"),
            (format!("{STORE}passphrase={hex}"), "option passphrase would leave a secret"),
            (format!("{STORE}vault_token={hex}"), "option vault_token would leave a secret"),
            (format!("{STORE}key=passphrase:{hex}"), "key source"),
        ] {
            refused(&policy, &words, why);
            let said = policy.admit(&options(&words)).err().unwrap().chain();
            assert!(!said.contains(&hex) && !said.contains("WlpaW"), "{said}");
        }
    }

    #[test]
    fn files_of_the_host_are_named_only_below_the_folders_that_were_lent() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let lent = top.join("keys");
        std::fs::create_dir(&lent).unwrap();
        for name in ["keys/a.key", "outside.key"] {
            std::fs::write(top.join(name), "x").unwrap();
        }
        symlink(top.join("outside.key"), lent.join("link.key")).unwrap();
        let (top, lent) = (top.to_str().unwrap(), lent.to_str().unwrap());

        refused(&policy(&[]), &format!("{STORE}key=file:{lent}/a.key"), "--key-dir");
        let policy = policy(&[("key-dir", lent)]);
        policy.admit(&options(&format!("{STORE}key=file:{lent}/a.key trust={lent}/a.key"))).unwrap();
        policy.admit(&options(&format!("{STORE}key=vault-transit:t/k trust={}", "ab".repeat(32)))).unwrap();
        for kind in ["key=file:", "key=passphrase-file:", "key=x25519:", "trust=", "trust-file=", "vault-token-file="] {
            refused(&policy, &format!("{STORE}{kind}/etc/shadow"), "below");
            refused(&policy, &format!("{STORE}{kind}{lent}/../outside.key"), "below");
            refused(&policy, &format!("{STORE}{kind}{top}/outside.key"), "below");
            refused(&policy, &format!("{STORE}{kind}a.key"), "absolute path");
            refused(&policy, &format!("{STORE}{kind}{lent}/link.key"), "leads out of");
            refused(&policy, &format!("{STORE}{kind}{lent}/none.key"), "cannot be found");
        }
        refused(&policy, &format!("{STORE}key=env:AWS_SECRET_ACCESS_KEY"), "environment");
        refused(&policy, &format!("{STORE}key=passphrase"), "nobody can be asked");
    }

    #[test]
    fn local_stores_are_named_only_below_those_that_are_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        for name in ["prod/a", "production"] {
            std::fs::create_dir_all(top.join(name)).unwrap();
        }
        symlink(top.join("production"), top.join("prod/link")).unwrap();
        let top = top.to_str().unwrap();

        refused(&policy(&[]), &format!("store={top}/prod"), "--allow-store");
        let policy = policy(&[("allow-store", &format!("{top}/prod"))]);
        for ok in ["prod", "prod/a", "prod/"] {
            policy.admit(&options(&format!("store={top}/{ok}"))).unwrap();
        }
        for bad in ["production", "prod/../production", "prod/link", "prod/none"] {
            policy.admit(&options(&format!("store=file://{top}/{bad}"))).err().unwrap_or_else(|| panic!("{bad}"));
        }
        refused(&policy, STORE.trim(), "not below");
    }

    #[test]
    fn a_list_of_buckets_closes_all_others_and_where_they_are_is_never_the_volumes_to_say() {
        let open = policy(&[]);
        open.admit(&options("store=s3://any/where")).unwrap();
        refused(&open, "store=s3://any/where s3-endpoint=http://minio:9000", "administrator's to say");
        let policy = policy(&[("allow-store", "s3://models/prod")]);
        policy.admit(&options("store=s3://models/prod/acme")).unwrap();
        for bad in ["s3://models", "s3://models/production", "s3://other/prod", "vault-kv://secret/models", "/srv"] {
            refused(&policy, &format!("store={bad}"), "--allow-store");
        }
        refused(&policy, &format!("{STORE}s3-endpoint=http://evil"), "administrator's to say");
    }

    #[test]
    fn what_the_administrator_decided_a_volume_cannot_weaken() {
        let ours = "ab".repeat(32);
        let policy = policy(&[
            ("trust", &ours),
            ("require-floor", "true"),
            ("floor", "vault-kv:secret/floor"),
            ("origin-bytes", "100MiB"),
            ("no-page-cache", "true"),
            ("slot-label", "node"),
        ]);
        policy
            .admit(&options(&format!("{STORE}trust={ours} require-floor origin-bytes=100MiB verify=strict")))
            .unwrap();
        for word in [
            "trust=cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd",
            "trust-on-first-use",
            "trust-file=/x",
            "require-floor=false",
            "floor=vault-kv:secret/mine",
            "origin-bytes=1GiB",
            "no-page-cache=off",
            "slot-label=theirs",
        ] {
            refused(&policy, &format!("{STORE}{word}"), "the administrator has decided it");
        }
        refused(&policy, &format!("{STORE}verify=aead"), "less than strict");
    }

    #[test]
    fn credentials_go_where_the_administrator_says_and_what_is_the_hosts_is_not_a_volumes() {
        let policy = policy(&[]);
        for word in [
            "vault-addr=https://evil",
            "vault-ca-cert=/x",
            "vault-plain-http",
            "vault-aws-sts=https://evil",
            "vault-aws-server-id=evil",
            "cache=1GiB",
            "profile=/etc/passwd",
            "lock-when-idle=1h",
            "log-file=/etc/passwd",
            "key-dir=/",
            "allow-store=/",
        ] {
            refused(&policy, &format!("{STORE}{word}"), "it is the administrator's");
        }
    }

    #[test]
    fn a_plugin_whose_keys_would_not_last_does_not_start() {
        for (key, why) in [("passphrase", "no terminal"), ("env:MODEL", "mounted again and again")] {
            let mut layers = Layers::default();
            layers.flag("key", vec![key.into()]);
            assert!(Policy::from_layers(layers).err().unwrap().chain().contains(why), "{key}");
        }
    }
}
