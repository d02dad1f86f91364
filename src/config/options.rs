//! The table of options: one line each, and everything that follows from it.
//!
//! In: nothing. Out: for each option its flag, its key in the file, its environment name, the form of its value, what it
//! means, what counts where nothing is said, and which commands take it.
//! Promises: flags and help (`cli::flags`), words of `-o`, keys of the file, names of the environment, the manual and
//! docs/CONFIGURATION.md come from here, so that none of them can lack an option.
//! Not here: what options mean together (`config`, `config::rules`), names that are no options (`config::names`).
//! Held by: the tests below, tests/config.rs.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::keys::KeySource;
use crate::units::{self, distance};

/// How often an option may be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One value; within a layer the last one wins.
    One,
    /// Any number; a layer replaces the list of the layer below.
    Many,
    /// Yes or no.
    Switch,
}

/// What a file or folder that an option names is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Read; nothing of it is secret, but what it says is believed.
    Read,
    /// Read, and secret.
    Secret,
    Written,
    /// A place where others look or put things.
    Folder,
}

/// How one value is written.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    /// Anything, to be understood by whom it is for.
    Text,
    Path(Use),
    /// An address, in which people put secrets.
    Url,
    /// What this function reads.
    Read(fn(&str) -> Result<()>),
    /// The same, and a text that it does not read may be a secret in the wrong place.
    ReadOrHide(fn(&str) -> Result<()>),
}

/// Who takes an option; added up.
pub mod takes {
    /// Commands that only reach a store: `ls`.
    pub const STORES: u16 = 1;
    /// Commands that read a model or change what is published of it.
    pub const READS: u16 = 1 << 1;
    pub const SEAL: u16 = 1 << 2;
    /// `mount`, `run` and mount.modelfs(8).
    pub const MOUNT: u16 = 1 << 3;
    /// `run` alone.
    pub const RUN: u16 = 1 << 4;
    pub const PLUGIN: u16 = 1 << 5;
    pub const CSI: u16 = 1 << 6;
    /// Commands that change what a store holds of models that are there: `key`, `tag`, `rollback`, `prune`, `sign`, `floor`.
    pub const CHANGES: u16 = 1 << 7;
    pub const ALL: u16 = u16::MAX;

    pub(super) const HOSTS: u16 = MOUNT | PLUGIN | CSI;
    pub(super) const ACCESS: u16 = READS | HOSTS;
    pub(super) const AUDITED: u16 = HOSTS | SEAL | CHANGES;
    pub(super) const REACH: u16 = STORES | SEAL | ACCESS;

    /// As people call them.
    pub const NAMES: &[(u16, &str)] = &[
        (STORES, "ls"),
        (READS, "commands that read"),
        (SEAL, "seal"),
        (CHANGES, "key, tag, rollback, prune, sign, floor"),
        (MOUNT, "mount, run"),
        (RUN, "run"),
        (PLUGIN, "volume-plugin"),
        (CSI, "csi"),
    ];
}

use takes::{ACCESS, AUDITED, CSI, HOSTS, MOUNT, PLUGIN, REACH, READS, RUN, SEAL};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Keys,
    Store,
    Vault,
    Mount,
    Run,
    Volumes,
    Oversight,
    Seal,
    Log,
}

impl Section {
    pub const ALL: [Section; 9] = [
        Section::Keys,
        Section::Store,
        Section::Vault,
        Section::Mount,
        Section::Run,
        Section::Volumes,
        Section::Oversight,
        Section::Seal,
        Section::Log,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Section::Keys => "Keys and trust",
            Section::Store => "Store",
            Section::Vault => "HashiCorp Vault",
            Section::Mount => "Mount",
            Section::Run => "Run",
            Section::Volumes => "Volumes of containers and pods",
            Section::Oversight => "Audit, metrics, alerts, roles",
            Section::Seal => "Seal",
            Section::Log => "Log",
        }
    }
}

/// One option, by the name of its flag.
#[derive(Debug)]
pub struct OptionSpec {
    pub name: &'static str,
    pub kind: Kind,
    pub env: &'static str,
    /// The value as help shows it.
    pub word: &'static str,
    pub form: Form,
    /// A value that is right in form.
    pub example: &'static str,
    /// What counts where nothing is said; empty: nothing.
    pub default: &'static str,
    pub means: &'static str,
    pub takes: u16,
    pub section: Section,
}

impl OptionSpec {
    const fn new(kind: Kind, name: &'static str, env: &'static str, takes: u16, section: Section) -> OptionSpec {
        OptionSpec { name, kind, env, word: "", form: Form::Text, example: "", default: "", means: "", takes, section }
    }

    const fn value(mut self, word: &'static str, form: Form, example: &'static str) -> OptionSpec {
        self.word = word;
        self.form = form;
        self.example = example;
        self
    }

    const fn default(mut self, default: &'static str) -> OptionSpec {
        self.default = default;
        self
    }

    const fn means(mut self, means: &'static str) -> OptionSpec {
        self.means = means;
        self
    }

    /// # Errors
    /// `USAGE` for a value that cannot be one, whatever else is said.
    pub fn check(&self, value: &str) -> Result<()> {
        match self.form {
            Form::Text | Form::Path(_) | Form::Url => Ok(()),
            Form::Read(read) | Form::ReadOrHide(read) => read(value),
        }
    }

    /// The value as it may be printed; `None`: it holds or may hold a secret.
    pub fn shown(&self, value: &str) -> Option<String> {
        let plain = value.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect::<String>();
        match self.form {
            Form::Text | Form::Read(_) | Form::Path(Use::Read | Use::Written | Use::Folder) => Some(plain),
            // A token put where the path of its file belongs has no slash.
            Form::Path(Use::Secret) => value.contains('/').then_some(plain),
            Form::ReadOrHide(read) => read(value).is_ok().then_some(plain),
            Form::Url => {
                let url = url::Url::parse(value).ok()?;
                let only_a_place = url.username().is_empty() && url.password().is_none() && url.query().is_none();
                (only_a_place && url.fragment().is_none() && self.name != "alert-webhook").then_some(plain)
            }
        }
    }

    /// The files and folders that this value names.
    pub fn paths(&self, value: &str) -> Option<(PathBuf, Use)> {
        match self.form {
            Form::Path(kind) => Some((value.into(), kind)),
            _ => match self.name {
                "key" => match value.parse().ok()? {
                    KeySource::File(path) | KeySource::PassphraseFile(path) | KeySource::X25519(path) => {
                        Some((path, Use::Secret))
                    }
                    KeySource::RecipientFile(path) => Some((path, Use::Read)),
                    _ => None,
                },
                "trust" => {
                    let hex = value.len() == 64 && value.bytes().all(|byte| byte.is_ascii_hexdigit());
                    (!hex).then(|| (value.into(), Use::Read))
                }
                "http" => value.strip_prefix("unix:").map(|path| (path.into(), Use::Written)),
                _ => None,
            },
        }
    }

    pub fn is_taken_by(&self, who: u16) -> bool {
        self.takes & who != 0
    }
}

const fn one(name: &'static str, env: &'static str, takes: u16, section: Section) -> OptionSpec {
    OptionSpec::new(Kind::One, name, env, takes, section)
}

const fn many(name: &'static str, env: &'static str, takes: u16, section: Section) -> OptionSpec {
    OptionSpec::new(Kind::Many, name, env, takes, section)
}

const fn switch(name: &'static str, env: &'static str, takes: u16, section: Section) -> OptionSpec {
    OptionSpec::new(Kind::Switch, name, env, takes, section).value("yes|no", READS_SWITCH, "true").default("no")
}

const READS_SWITCH: Form = Form::Read(|text| parse_switch(text).map(drop));
const SIZE: Form = Form::Read(|text| units::parse_size(text).map(drop));
const TIME: Form = Form::Read(|text| units::parse_duration(text).map(drop));
const COUNT: Form = Form::Read(|text| super::parse_count(text).map(drop));
const ID: Form = Form::Read(|text| super::parse_id(text).map(drop));
const PEERS: Form = Form::Read(|text| text.parse::<super::oversight::Peers>().map(drop));
const SELECTOR: Form = Form::Read(|text| super::parse_selector(text).map(drop));
const STORE_URL: Form = Form::ReadOrHide(|text| super::parse_store(text).map(drop));

/// Every option that the file, the environment and flags know; section by section, in the order of reading.
pub const OPTIONS: &[OptionSpec] = &[
    // Keys and trust.
    many("key", "MODELFS_KEY_SOURCE", ACCESS | SEAL, Section::Keys)
        .value("KEY", Form::ReadOrHide(|text| text.parse::<KeySource>().map(drop)), "file:/etc/modelfs/llama.key")
        .default("MODELFS_KEY, then MODEL_ENCRYPTION_KEY")
        .means("Where the key is, never a key itself; give it again for more, tried in order"),
    many("slot-label", "MODELFS_SLOT_LABEL", ACCESS, Section::Keys)
        .value("LABEL", Form::Read(|text| super::parse_slot_label(text).map(drop)), "node")
        .default("all")
        .means("Open no key slot of another label than this; give it again for more"),
    many("trust", "MODELFS_TRUST", ACCESS | SEAL, Section::Keys)
        .value("PUBKEY", Form::Text, "/etc/modelfs/signing.pub")
        .means("A signing key to believe: 64 hex digits, or a .pub file; give it again for more"),
    one("trust-file", "MODELFS_TRUST_FILE", ACCESS | SEAL, Section::Keys)
        .value("PATH", Form::Path(Use::Read), "/etc/modelfs/trust.toml")
        .means("The file of trusted keys and thresholds"),
    switch("trust-on-first-use", "MODELFS_TRUST_ON_FIRST_USE", READS | MOUNT | PLUGIN, Section::Keys)
        .means("Believe whoever signed what is there now, and only them from then on"),
    switch("require-floor", "MODELFS_REQUIRE_FLOOR", ACCESS, Section::Keys)
        .means("Refuse a model of which no earlier version was recorded here"),
    one("min-ref-seq", "MODELFS_MIN_REF_SEQ", ACCESS, Section::Keys)
        .value("N", Form::Read(|text| super::parse_ref_seq(text).map(drop)), "7")
        .default("0")
        .means("Refuse refs of the model with a lower number"),
    one("floor", "MODELFS_FLOOR", ACCESS | SEAL, Section::Keys)
        .value(
            "vault-kv:MOUNT/PATH",
            Form::Read(|text| text.parse::<super::FloorAt>().map(drop)),
            "vault-kv:secret/modelfs/floor",
        )
        .means("Where the floor is kept a second time, outside this machine"),
    one("state-dir", "MODELFS_STATE_DIR", ACCESS | SEAL, Section::Keys)
        .value("DIR", Form::Path(Use::Folder), "/var/lib/modelfs")
        .default("XDG_STATE_HOME/modelfs, else /var/lib/modelfs for root and ~/.local/state/modelfs for others")
        .means("Where this machine remembers the oldest version still accepted, and whom it believed at first use; an absolute path"),
    one("manifest", "MODELFS_MANIFEST", READS | MOUNT | PLUGIN, Section::Keys)
        .value(
            "sha256:HEX",
            Form::Read(|text| super::parse_digest(text).map(drop)),
            "sha256:51d0e6f0a9c0a1a0d7a2c9c1c5e1d4f3b2a1908f7e6d5c4b3a29181716151413",
        )
        .means("This version and no other, by its manifest digest"),
    // Store.
    one("fetch-timeout", "MODELFS_FETCH_TIMEOUT", REACH, Section::Store)
        .value("TIME", TIME, "5s")
        .default("30s")
        .means("Longest time one request to the store may take"),
    one("fetch-budget", "MODELFS_FETCH_BUDGET", REACH, Section::Store)
        .value("TIME", TIME, "90s")
        .default("60s")
        .means("Longest time a chunk may take, retries included"),
    one("s3-endpoint", "MODELFS_S3_ENDPOINT", REACH, Section::Store)
        .value("URL", Form::Url, "https://minio.example:9000")
        .default("AWS_ENDPOINT_URL, then Amazon's")
        .means("An S3 endpoint other than Amazon's"),
    one("s3-region", "MODELFS_S3_REGION", REACH, Section::Store)
        .value("REGION", Form::Text, "eu-central-1")
        .default("AWS_REGION")
        .means("The S3 region"),
    one("s3-credentials", "MODELFS_S3_CREDENTIALS", REACH, Section::Store)
        .value(
            "vault-aws:MOUNT/ROLE",
            Form::ReadOrHide(|text| text.parse::<super::VaultAwsRole>().map(drop)),
            "vault-aws:aws/models",
        )
        .default("the AWS_ names")
        .means("Short-lived S3 credentials from Vault"),
    one("origin-requests", "MODELFS_ORIGIN_REQUESTS", REACH, Section::Store)
        .value("RATE[:BURST]", Form::Read(|text| super::parse_request_rate(text).map(drop)), "100:500")
        .means("Most requests a second to the store, with a burst after a colon"),
    one("origin-bytes", "MODELFS_ORIGIN_BYTES", REACH, Section::Store)
        .value("SIZE", Form::Read(|text| super::parse_byte_rate(text).map(drop)), "200MiB")
        .means("Most bytes a second from and to the store"),
    one("origin-inflight", "MODELFS_ORIGIN_INFLIGHT", REACH, Section::Store)
        .value("N", Form::Read(|text| super::parse_inflight(text).map(drop)), "32")
        .means("Most requests to the store at once"),
    // Vault. Those that Vault's own command line has are called as it calls them.
    one("vault-addr", "VAULT_ADDR", REACH, Section::Vault)
        .value("URL", Form::Url, "https://vault.example:8200")
        .means("Where Vault is"),
    one("vault-namespace", "VAULT_NAMESPACE", REACH, Section::Vault)
        .value("NAME", Form::Read(|text| super::vault::check_namespace(text).map(drop)), "models")
        .means("Namespace (Vault Enterprise)"),
    one("vault-ca-cert", "VAULT_CACERT", REACH, Section::Vault)
        .value("FILE", Form::Path(Use::Read), "/etc/modelfs/vault-ca.crt")
        .default("the authorities of this system")
        .means("The only certificate authority to believe, PEM"),
    one("vault-client-cert", "VAULT_CLIENT_CERT", REACH, Section::Vault)
        .value("FILE", Form::Path(Use::Read), "/etc/modelfs/vault.crt")
        .means("Our certificate for Vault, PEM"),
    one("vault-client-key", "VAULT_CLIENT_KEY", REACH, Section::Vault)
        .value("FILE", Form::Path(Use::Secret), "/etc/modelfs/vault.key")
        .means("Its private key, PEM, mode 0600"),
    one("vault-auth", "MODELFS_VAULT_AUTH", REACH, Section::Vault)
        .value("METHOD", Form::Read(super::vault::check_method), "kubernetes")
        .default("token, from VAULT_TOKEN or ~/.vault-token; csi: kubernetes")
        .means("How to log in: token, approle, kubernetes, jwt, cert, aws or userpass"),
    one("vault-auth-mount", "MODELFS_VAULT_AUTH_MOUNT", REACH, Section::Vault)
        .value("PATH", Form::Text, "kubernetes")
        .default("the method's name")
        .means("Where the method is mounted in Vault"),
    one("vault-role", "MODELFS_VAULT_ROLE", REACH, Section::Vault)
        .value("ROLE", Form::Text, "model-reader")
        .means("kubernetes, jwt, cert, aws: the role to log in to"),
    one("vault-role-id", "MODELFS_VAULT_ROLE_ID", REACH, Section::Vault)
        .value("ID", Form::Text, "8c0e9a41-5d3f-4f0e-9a57-0d1b7c6a2e11")
        .means("approle: the role-id"),
    one("vault-secret-id-file", "MODELFS_VAULT_SECRET_ID_FILE", REACH, Section::Vault)
        .value("FILE", Form::Path(Use::Secret), "/run/secrets/secret-id")
        .default("MODELFS_VAULT_SECRET_ID")
        .means("approle: the file of the secret-id, mode 0600"),
    switch("vault-secret-id-wrapped", "MODELFS_VAULT_SECRET_ID_WRAPPED", REACH, Section::Vault)
        .means("approle: the file holds a response-wrapping token; it is unwrapped once"),
    one("vault-jwt-file", "MODELFS_VAULT_JWT_FILE", REACH, Section::Vault)
        .value("FILE", Form::Path(Use::Secret), "/run/secrets/token")
        .default("kubernetes: the pod's own")
        .means("kubernetes, jwt: the file of the token"),
    one("vault-username", "MODELFS_VAULT_USERNAME", REACH, Section::Vault)
        .value("NAME", Form::Text, "reader")
        .means("userpass: the user"),
    one("vault-password-file", "MODELFS_VAULT_PASSWORD_FILE", REACH, Section::Vault)
        .value("FILE", Form::Path(Use::Secret), "/run/secrets/vault-password")
        .default("MODELFS_VAULT_PASSWORD")
        .means("userpass: the file of the password, mode 0600"),
    one("vault-token-file", "MODELFS_VAULT_TOKEN_FILE", REACH, Section::Vault)
        .value("FILE", Form::Path(Use::Secret), "/run/secrets/vault-token")
        .default("VAULT_TOKEN, then ~/.vault-token")
        .means("token: the file of the token, mode 0600"),
    one("vault-aws-region", "MODELFS_VAULT_AWS_REGION", REACH, Section::Vault)
        .value("REGION", Form::Text, "eu-central-1")
        .default("us-east-1")
        .means("aws: the region that the login is signed for"),
    one("vault-aws-server-id", "MODELFS_VAULT_AWS_SERVER_ID", REACH, Section::Vault)
        .value("NAME", Form::Read(|text| super::vault::check_server_id(text).map(drop)), "vault.example")
        .means("aws: the name of Vault that the login is signed for, where Vault has an iam_server_id_header_value"),
    one("vault-aws-sts", "MODELFS_VAULT_AWS_STS", REACH, Section::Vault)
        .value("URL", Form::Url, "https://sts.eu-central-1.amazonaws.com/")
        .default("https://sts.amazonaws.com/")
        .means("aws: the address of the STS service that Vault asks"),
    switch("vault-plain-http", "MODELFS_VAULT_PLAIN_HTTP", REACH, Section::Vault)
        .means("Speak with Vault over plain HTTP on another host than this one: tokens and keys cross the network in clear"),
    one("vault-timeout", "MODELFS_VAULT_TIMEOUT", REACH, Section::Vault)
        .value("TIME", TIME, "5s")
        .default("15s")
        .means("Longest time one question to Vault may take"),
    // Mount.
    many("model", "MODELFS_MODEL", MOUNT | PLUGIN, Section::Mount)
        .value("MODEL", SELECTOR, "acme/llama@prod")
        .default("all of the store")
        .means("Only this model; give it again for more"),
    many("require", "MODELFS_REQUIRE", MOUNT | PLUGIN, Section::Mount)
        .value("MODEL", SELECTOR, "all")
        .default("none; as a service those of model")
        .means("Not ready before first and last block of this model could be read, or of `all`; give it again for more"),
    switch("versions", "MODELFS_VERSIONS", MOUNT | PLUGIN, Section::Mount)
        .means("Show MOUNTPOINT/NAME/VERSION and the link MOUNTPOINT/NAME/current, which `modelfs reload` switches"),
    one("retire-after", "MODELFS_RETIRE_AFTER", MOUNT | PLUGIN, Section::Mount)
        .value("TIME", TIME, "5m")
        .default("60s")
        .means("With versions: how long a version that is not current any more stays after its last use"),
    one("verify", "MODELFS_VERIFY", HOSTS, Section::Mount)
        .value("MODE", Form::Read(|text| super::parse_verify(text).map(drop)), "strict")
        .default("strict")
        .means("strict: every chunk against the signed hash; aead: tags only, faster, where no key holder writes to the store"),
    one("cache", "MODELFS_CACHE", HOSTS, Section::Mount)
        .value("SIZE", Form::Read(|text| super::parse_cache(text).map(drop)), "512MiB")
        .default("half of the free memory")
        .means("Most plaintext in locked memory, of all mounts of the process together"),
    one("open", "MODELFS_OPEN", HOSTS, Section::Mount)
        .value("POLICY", Form::Read(|text| text.parse::<crate::fuse::OpenPolicy>().map(drop)), "lazy")
        .default("auto")
        .means(
            "Which opens wait for the whole file: lazy (none), auto (weights of a program that is loading the model), whole \
             (all that fit)",
        ),
    one("profile", "MODELFS_PROFILE", MOUNT, Section::Mount)
        .value("FILE", Form::Path(Use::Written), "/var/lib/modelfs/llama.profile")
        .means("Keep the order of reads here, and fetch ahead in that order at the next mount; names files, mode 0600"),
    switch("no-page-cache", "MODELFS_NO_PAGE_CACHE", HOSTS, Section::Mount)
        .means("No second, unlocked copy of plaintext in the page cache; cold reads are slower"),
    switch("no-passthrough", "MODELFS_NO_PASSTHROUGH", HOSTS, Section::Mount)
        .means("Every read is answered by the daemon, whole files too: for an overlay above the mount; slower"),
    one("ready-timeout", "MODELFS_READY_TIMEOUT", MOUNT, Section::Mount)
        .value("TIME", TIME, "2m")
        .default("not at all; as a service until it is stopped")
        .means("How long to go on asking a store or Vault that does not answer"),
    one("lock-when-idle", "MODELFS_LOCK_WHEN_IDLE", MOUNT | CSI, Section::Mount)
        .value("TIME", Form::Read(|text| super::parse_idle(text).map(drop)), "1h")
        .means(
            "Lock the mount, as `modelfs lock` does, once no file was open or read for so long; it stays locked until \
             `modelfs unlock`",
        ),
    one("on-key-loss", "MODELFS_ON_KEY_LOSS", HOSTS, Section::Mount)
        .value("keep|lock", Form::Read(|text| super::parse_on_key_loss(text).map(drop)), "keep")
        .default("keep")
        .means("When Vault takes token or lease back for good: keep serving what is open, or lock"),
    one("key-loss-check", "MODELFS_KEY_LOSS_CHECK", HOSTS, Section::Mount)
        .value("TIME", Form::Read(|text| super::vault::parse_check(text).map(drop)), "5s")
        .default("500ms")
        .means(
            "With on-key-loss=lock: how often Vault is asked whether the token still holds, 100ms to 60s; each time is one \
             request, and one line of Vault's audit log",
        ),
    one("locked-opens", "MODELFS_LOCKED_OPENS", HOSTS, Section::Mount)
        .value("fail|TIME", Form::Read(|text| super::parse_locked_opens(text).map(drop)), "30s")
        .default("fail")
        .means(
            "What an open of a locked model does: fail at once, or wait so long, 10m at most, for it to be unlocked; whoever \
             waits cannot be killed",
        ),
    switch("allow-other", "MODELFS_ALLOW_OTHER", MOUNT, Section::Mount)
        .means("Let users other than the mounting one in, as file modes allow"),
    one("policy", "MODELFS_POLICY", HOSTS, Section::Mount)
        .value("PATH", Form::Path(Use::Read), "/etc/modelfs/policy.toml")
        .means("The file that says who may see and read which model"),
    one("max-model-size", "MODELFS_MAX_MODEL_SIZE", HOSTS | SEAL, Section::Mount)
        .value("SIZE", Form::Read(|text| super::parse_model_size(text).map(drop)), "200GiB")
        .means("Seal and mount no model of more bytes than this"),
    many("deny-types", "MODELFS_DENY_TYPES", HOSTS | SEAL, Section::Mount)
        .value("TYPE", Form::Read(|text| text.parse::<crate::policy::types::DeniedType>().map(drop)), "pickle")
        .means(
            "Seal and mount no model that holds files of this type: pickle, or the end of a name as in .bin; give it again for \
             more",
        ),
    one("uid", "MODELFS_UID", MOUNT, Section::Mount)
        .value("ID", ID, "0")
        .default("the mounting user")
        .means("Owner of all files"),
    one("gid", "MODELFS_GID", MOUNT, Section::Mount)
        .value("ID", ID, "1000")
        .default("the mounting user's")
        .means("Group of all files"),
    one("umask", "MODELFS_UMASK", MOUNT, Section::Mount)
        .value("OCTAL", Form::Read(|text| units::parse_octal(text).map(drop)), "0227")
        .default("0222; with allow-other 0227, closed to others")
        .means("Taken from the modes 0444 and 0555, octal"),
    // Run.
    switch("strict", "MODELFS_STRICT", RUN, Section::Run).means(
        "Do not start the command if `modelfs doctor` finds an error, or a weakness through which secrets could leak",
    ),
    many("keep-env", "MODELFS_KEEP_ENV", RUN, Section::Run).value("NAME", Form::Text, "AWS_ACCESS_KEY_ID").means(
        "Leave this variable to the command although it holds a secret that opens the models or their store; give it again \
         for more",
    ),
    // Volumes.
    many("allow-store", "MODELFS_ALLOW_STORE", PLUGIN | CSI, Section::Volumes)
        .value("STORE", STORE_URL, "s3://models/prod")
        .default("volume-plugin: any but folders of this host; csi: none")
        .means("Volumes may name stores below this one; give it again for more; csi: the first is meant when a pod names none"),
    many("key-dir", "MODELFS_KEY_DIR", PLUGIN, Section::Volumes)
        .value("DIR", Form::Path(Use::Folder), "/etc/modelfs/keys")
        .default("none")
        .means("Volumes may name files (keys, public keys, credentials) below this folder; give it again for more"),
    one("socket", "MODELFS_SOCKET", PLUGIN | CSI, Section::Volumes)
        .value("PATH", Form::Path(Use::Written), "/run/modelfs/driver.sock")
        .default("volume-plugin: /run/docker/plugins/modelfs.sock, or what systemd hands over; csi: /csi/csi.sock")
        .means("Where the container engine or the kubelet asks; for an engine its name is the driver's"),
    one("node-id", "MODELFS_NODE_ID", CSI, Section::Volumes)
        .value("NAME", Form::Text, "node-7")
        .means("The node's name, in a manifest from spec.nodeName"),
    one("driver-name", "MODELFS_DRIVER_NAME", CSI, Section::Volumes)
        .value("NAME", Form::Text, "csi.modelfs")
        .default("csi.modelfs")
        .means("The driver's name, as in the CSIDriver object"),
    one("audience", "MODELFS_AUDIENCE", CSI, Section::Volumes)
        .value("AUDIENCE", Form::Text, "vault")
        .default("vault")
        .means("The audience of the pods' tokens, as in the CSIDriver object"),
    one("recheck", "MODELFS_RECHECK", CSI, Section::Volumes)
        .value("TIME", TIME, "10s")
        .default("30s")
        .means("How often, at most, a running pod's right is proved again"),
    one("max-volumes", "MODELFS_MAX_VOLUMES", CSI, Section::Volumes)
        .value("N", COUNT, "64")
        .default("256")
        .means("Most volumes on this node"),
    one("kubelet-dir", "MODELFS_KUBELET_DIR", CSI, Section::Volumes)
        .value("DIR", Form::Path(Use::Folder), "/var/lib/kubelet")
        .default("/var/lib/kubelet")
        .means("The kubelet's folder, mounted at the same place"),
    one("kubelet-socket", "MODELFS_KUBELET_SOCKET", CSI, Section::Volumes)
        .value("PATH", Form::Path(Use::Folder), "/var/lib/kubelet/plugins/csi.modelfs/csi.sock")
        .default("KUBELET_DIR/plugins/DRIVER_NAME/csi.sock")
        .means("The driver's socket as the kubelet sees it"),
    one("registry", "MODELFS_REGISTRY", CSI, Section::Volumes)
        .value("DIR", Form::Path(Use::Folder), "/registration")
        .default("/registration")
        .means("Where the kubelet looks for drivers, in this container"),
    switch("no-registration", "MODELFS_NO_REGISTRATION", CSI, Section::Volumes).means("Do not register with a kubelet"),
    // Audit, metrics, alerts, roles.
    one("audit", "MODELFS_AUDIT", AUDITED, Section::Oversight)
        .value("MODE", Form::Read(|text| text.parse::<super::oversight::AuditMode>().map(drop)), "off")
        .default("on if there is somewhere to write")
        .means("off, on, or required: refuse opens that cannot be recorded"),
    one("audit-file", "MODELFS_AUDIT_FILE", AUDITED, Section::Oversight)
        .value("PATH", Form::Path(Use::Written), "/var/log/modelfs/audit.jsonl")
        .means("Record who opened what here, one JSON object a line, chained"),
    switch("audit-journal", "MODELFS_AUDIT_JOURNAL", AUDITED, Section::Oversight).means("Record it in the journal"),
    one("audit-key", "MODELFS_AUDIT_KEY", AUDITED, Section::Oversight)
        .value("PATH", Form::Path(Use::Secret), "/etc/modelfs/audit.key")
        .means("The key that signs the log's checkpoints, as `modelfs keygen --signing` makes it"),
    one("audit-checkpoint-file", "MODELFS_AUDIT_CHECKPOINT_FILE", AUDITED, Section::Oversight)
        .value("PATH", Form::Path(Use::Written), "/mnt/append-only/modelfs.checkpoints")
        .means("Write checkpoints here as well, best where this machine can only append"),
    one("audit-checkpoint-records", "MODELFS_AUDIT_CHECKPOINT_RECORDS", AUDITED, Section::Oversight)
        .value("N", COUNT, "500")
        .default("1000")
        .means("A checkpoint after so many records"),
    one("audit-checkpoint-every", "MODELFS_AUDIT_CHECKPOINT_EVERY", AUDITED, Section::Oversight)
        .value("TIME", TIME, "30s")
        .default("60s")
        .means("A checkpoint at the latest so long after a record"),
    one("audit-file-bytes", "MODELFS_AUDIT_FILE_BYTES", AUDITED, Section::Oversight)
        .value("SIZE", SIZE, "64MiB")
        .default("256MiB")
        .means("Begin a new file at this size"),
    one("audit-keep", "MODELFS_AUDIT_KEEP", AUDITED, Section::Oversight)
        .value("TIME", TIME, "365d")
        .default("keep all")
        .means("Remove files whose last record is older"),
    one("http", "MODELFS_HTTP", HOSTS, Section::Oversight)
        .value("WHERE", Form::Read(super::oversight::check_http), "unix:/run/modelfs/http.sock")
        .means("Answer metrics and health: unix:PATH, or ADDRESS:PORT with TLS and a token"),
    one("http-cert", "MODELFS_HTTP_CERT", HOSTS, Section::Oversight)
        .value("FILE", Form::Path(Use::Read), "/etc/modelfs/http.crt")
        .means("With ADDRESS:PORT: the certificate, PEM"),
    one("http-key", "MODELFS_HTTP_KEY", HOSTS, Section::Oversight)
        .value("FILE", Form::Path(Use::Secret), "/etc/modelfs/http.key")
        .means("Its private key, PEM, mode 0600"),
    one("http-token-file", "MODELFS_HTTP_TOKEN_FILE", HOSTS, Section::Oversight)
        .value("FILE", Form::Path(Use::Secret), "/etc/modelfs/http.token")
        .means("With ADDRESS:PORT: the file of the token that callers must bear, mode 0600"),
    many("alert-webhook", "MODELFS_ALERT_WEBHOOK", HOSTS, Section::Oversight)
        .value("URL", Form::Url, "https://alerts.example/modelfs")
        .means("POST alerts to this URL; give it again for more"),
    one("alert-webhook-file", "MODELFS_ALERT_WEBHOOK_FILE", HOSTS, Section::Oversight)
        .value("FILE", Form::Path(Use::Secret), "/etc/modelfs/webhooks")
        .means("The same from a file of mode 0600, one URL a line, for URLs that hold a secret"),
    one("alert-severity", "MODELFS_ALERT_SEVERITY", HOSTS, Section::Oversight)
        .value("SEVERITY", Form::Read(|text| super::oversight::parse_severity(text).map(drop)), "medium")
        .default("high")
        .means("Alert from this severity on: low, medium, high, critical"),
    many("control-viewer", "MODELFS_CONTROL_VIEWER", HOSTS, Section::Oversight)
        .value("WHO", PEERS, "gid=4000")
        .means("Who may look (uid=N or gid=N) beside root and the mounting user; give it again for more"),
    many("control-operator", "MODELFS_CONTROL_OPERATOR", HOSTS, Section::Oversight)
        .value("WHO", PEERS, "gid=4001")
        .means("Who may lock, unlock, reload and shut sessions out"),
    many("control-admin", "MODELFS_CONTROL_ADMIN", HOSTS, Section::Oversight)
        .value("WHO", PEERS, "uid=4002")
        .means("Who may also stop it"),
    // Seal.
    one("cipher", "MODELFS_CIPHER", SEAL, Section::Seal)
        .value("CIPHER", Form::Read(|text| text.parse::<crate::format::Suite>().map(drop)), "chacha20-poly1305")
        .default("aes-256-gcm")
        .means("aes-256-gcm or chacha20-poly1305"),
    one("codec", "MODELFS_CODEC", SEAL, Section::Seal)
        .value("CODEC", Form::Read(|text| super::parse_codec(text).map(drop)), "none")
        .default("auto")
        .means(
            "Lossless compression of weights: auto (bf16, f16 and f32, where it wins), or none (chunk lengths then tell nothing)",
        ),
    switch("hide-name", "MODELFS_HIDE_NAME", SEAL, Section::Seal).means("Do not publish the name: readers must know it"),
    // Log.
    one("log", "MODELFS_LOG", takes::ALL, Section::Log)
        .value("FILTER", Form::Read(crate::telemetry::check_log_filter), "modelfs=debug")
        .default("info of what serves, warn of other commands; -q and -v change it")
        .means("What is logged: a level (error, warn, info, debug, trace), or levels of parts, separated by commas"),
    one("log-file", "MODELFS_LOG_FILE", MOUNT, Section::Log)
        .value("PATH", Form::Path(Use::Written), "/var/log/modelfs.log")
        .means("In the background: log here after the mount is ready"),
    one("log-format", "MODELFS_LOG_FORMAT", takes::ALL, Section::Log)
        .value("FORMAT", Form::Read(|text| text.parse::<crate::telemetry::LogFormat>().map(drop)), "json")
        .default("text")
        .means("How log lines look: text or json"),
];

/// The options that a mount may be given by `-o`.
pub fn options_of_a_mount() -> impl Iterator<Item = &'static OptionSpec> {
    OPTIONS.iter().filter(|option| option.is_taken_by(MOUNT))
}

/// By flag name; `_` and `-` are the same.
pub fn find(name: &str) -> Option<&'static OptionSpec> {
    let dashed = name.replace('_', "-");
    OPTIONS.iter().find(|spec| spec.name == dashed)
}

/// The word among `known` that was meant, if one is near enough.
pub fn nearest<'k>(typed: &str, known: impl Iterator<Item = &'k str>) -> Option<&'k str> {
    let near = known.map(|word| (distance(typed, word), word)).min()?;
    (near.0 <= 3.max(typed.len() / 3)).then_some(near.1)
}

pub(super) fn parse_switch(text: &str) -> Result<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(crate::error::Error::new(crate::error::Code::Usage, format!("`{text}` is neither true nor false"))),
    }
}

/// A path as it will be once it is made: absolute, links of what is there followed.
pub(super) fn settled(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut rest = Vec::new();
    let mut there: &Path = &path;
    loop {
        if let Ok(real) = there.canonicalize() {
            return rest.iter().rev().fold(real, |path, name| path.join(name));
        }
        match (there.parent(), there.file_name()) {
            (Some(parent), Some(name)) => {
                rest.push(name.to_owned());
                there = parent;
            }
            _ => return path,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_is_whole_and_its_example_is_right_in_form() {
        for spec in OPTIONS {
            assert!(!spec.means.is_empty() && !spec.example.is_empty() && !spec.word.is_empty(), "{}", spec.name);
            assert!(spec.takes != 0, "{} is taken by nobody", spec.name);
            spec.check(spec.example).unwrap_or_else(|e| panic!("{}: {}", spec.name, e.chain()));
            assert_eq!(find(&spec.name.replace('-', "_")).map(|it| it.name), Some(spec.name), "twice in the table");
        }
        // Names follow from names, but for Vault's own and the one whose plain name holds a key itself.
        let vault = ["VAULT_ADDR", "VAULT_CACERT", "VAULT_CLIENT_CERT", "VAULT_CLIENT_KEY", "VAULT_NAMESPACE"];
        for spec in OPTIONS.iter().filter(|spec| spec.name != "key" && !vault.contains(&spec.env)) {
            assert_eq!(spec.env, format!("MODELFS_{}", spec.name.to_uppercase().replace('-', "_")));
        }
        let sections: Vec<Section> = OPTIONS.iter().map(|spec| spec.section).collect();
        let order = |section: &Section| Section::ALL.iter().position(|other| other == section);
        assert!(sections.is_sorted_by_key(order), "section by section");
    }

    #[test]
    fn what_may_be_a_secret_is_not_shown() {
        let shown = |name: &str, value: &str| find(name).expect("an option").shown(value);
        assert_eq!(shown("key", "file:/k").as_deref(), Some("file:/k"));
        assert_eq!(shown("key", &"5a".repeat(32)), None);
        assert_eq!(shown("s3-credentials", "AKIA:s3cret"), None);
        assert_eq!(shown("vault-token-file", "hvs.CAESIJ"), None);
        assert_eq!(shown("vault-token-file", "/run/token").as_deref(), Some("/run/token"));
        assert_eq!(shown("alert-webhook", "https://hooks.example/T0/B0/x"), None);
        assert_eq!(shown("s3-endpoint", "https://ak:sk@minio"), None);
        assert_eq!(shown("s3-endpoint", "https://minio?token=x"), None);
        assert_eq!(shown("s3-endpoint", "https://minio:9000").as_deref(), Some("https://minio:9000"));
        assert_eq!(shown("model", "a\u{1b}[2J").as_deref(), Some("a\u{fffd}[2J"));
    }

    #[test]
    fn the_nearest_word_is_near() {
        let names = || OPTIONS.iter().map(|spec| spec.name);
        assert_eq!(nearest("cahce", names()), Some("cache"));
        assert_eq!(nearest("zzzzzzzz", names()), None);
    }
}
