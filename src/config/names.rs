//! Names of the environment that are no options: the program's own, secrets, and those that deployments from before this
//! program set.
//!
//! In: which names are set, and the values of those that hold no secret. Out: what they say of options, what is to be told
//! of the others, and the names of ours that nobody knows.
//! Promises: no value of these makes anything weaker; a value of a secret is not read here; a name of ours that is not
//! known is found, with the nearest one.
//! Held by: the tests below, tests/config.rs.

use super::options::{OPTIONS, nearest, parse_switch};
use crate::error::{Code, Error, Result};
use crate::refuse;
use crate::store::StoreUrl;

/// What a name of others does here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    /// It is the value of this option, below the option's own name and above the file.
    Says(&'static str),
    /// The same, below the file: something else on this machine may have set it.
    SaysLast(&'static str),
    /// With `true` it sets this switch or mode. `false` takes nothing back.
    Asks(&'static str, &'static str),
    /// What it asks for is always so: `true` adds nothing, and `false` is not obeyed.
    Always,
    /// It says of which kind the store is, or which bucket.
    OfStore,
    /// It is known, and does nothing.
    Nothing,
    /// It holds a secret: read where the secret is needed, and wiped.
    Secret,
}

#[derive(Debug)]
pub struct OtherName {
    pub name: &'static str,
    pub does: Does,
    pub means: &'static str,
}

const fn other(name: &'static str, does: Does, means: &'static str) -> OtherName {
    OtherName { name, does, means }
}

/// Names that others gave, sorted.
pub const OTHERS: &[OtherName] = &[
    other("AWS_ACCESS_KEY_ID", Does::Secret, "Who we are to an s3:// store, unless `s3-credentials` says otherwise."),
    other("AWS_ENDPOINT_URL", Does::SaysLast("s3-endpoint"), "The S3 endpoint."),
    other("AWS_REGION", Does::SaysLast("s3-region"), "The S3 region."),
    other(
        "AWS_S3_BUCKET",
        Does::OfStore,
        "The bucket that the store `env:` means; `env:PREFIX` is a prefix in it. A store that is named in full wins, and a \
         difference is told.",
    ),
    other("AWS_SECRET_ACCESS_KEY", Does::Secret, "The secret beside AWS_ACCESS_KEY_ID."),
    other("AWS_SESSION_TOKEN", Does::Secret, "The token of short-lived credentials."),
    other(
        "ENABLE_SECURITY_LOGGING",
        Does::Asks("audit", "on"),
        "`true` asks for the audit log: without `audit-file` or `audit-journal` the start is refused. `false` turns no log off.",
    ),
    other(
        "GAMEFORGE_ENV",
        Does::Nothing,
        "The name of the application's environment. There is no mode that is less safe.",
    ),
    other(
        "MAX_MODEL_SIZE_MB",
        Does::Says("max-model-size"),
        "The largest model that is sealed or mounted, in MiB, a number alone.",
    ),
    other(
        "MODEL_CACHE_DIR",
        Does::Nothing,
        "Never a place for plaintext: models are served from locked memory, and nothing is written there. Mount there, if the \
         application looks for its models in this folder.",
    ),
    other("MODEL_ENCRYPTION_KEY", Does::Secret, "A key itself, where neither `key` nor MODELFS_KEY is given."),
    other("MODEL_SECURITY_ENABLED", Does::Always, "Models are always verified; there is nothing to turn off."),
    other(
        "MODEL_STORAGE_BACKEND",
        Does::OfStore,
        "`s3` or `local`: a store of another kind is refused. `azure` and `gcs` are refused, there being no such store.",
    ),
    other(
        "PERFORMANCE_MONITORING_ENABLED",
        Does::Always,
        "Numbers are always counted; `http` says where they are answered.",
    ),
    other(
        "REQUIRED_MODELS",
        Does::Says("require"),
        "Models that must be usable before the start, separated by commas.",
    ),
    other("SECURE_MODE", Does::Always, "There is no other mode."),
    other(
        "SECURITY_SCAN_ENABLED",
        Does::Always,
        "`modelfs run` always looks at the machine before the command; `strict` makes findings stop the start.",
    ),
    other(
        "STRICT_MODEL_SECURITY",
        Does::Asks("strict", "true"),
        "`true` is `strict` of `modelfs run`. `false` takes no strictness back that the file or a flag asks for.",
    ),
    other("VAULT_HEALTH_CHECK_ENABLED", Does::Always, "A Vault that is named is always asked before the start."),
    other("VAULT_TOKEN", Does::Secret, "The token of `vault-auth` token."),
];

/// Names of ours that are no options, sorted; whether each holds a secret.
pub const OWN: &[(&str, bool, &str)] = &[
    ("MODELFS_CONFIG", false, "The configuration file, and no other."),
    ("MODELFS_KEY", true, "A key itself, 64 hex digits or base64; taken when no `key` is named, and wiped."),
    ("MODELFS_MOUNTPOINT", false, "Read by the units of the package alone: where to mount."),
    (
        "MODELFS_PASSPHRASE",
        true,
        "The passphrase of key=passphrase, where there is no terminal; never taken for a new one.",
    ),
    ("MODELFS_STORE", false, "Read by the units of the package alone: the store."),
    ("MODELFS_VAULT_PASSWORD", true, "userpass: the password itself."),
    ("MODELFS_VAULT_SECRET_ID", true, "approle: the secret-id itself."),
];

/// Ours by name, and set by our own tests alone.
const OF_TESTS: &str = "MODELFS_TEST_";

/// Kubernetes gives every container names of the Services in its namespace, and a Service may be called modelfs.
fn is_of_a_service(name: &str) -> bool {
    const ENDS: [&str; 4] = ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT", "_TCP"];
    let port = |rest: &str| rest.split('_').next().is_some_and(|port| port.parse::<u16>().is_ok());
    ENDS.iter().any(|end| name.ends_with(end))
        || name.contains("_SERVICE_PORT_")
        || name.rsplit_once("_PORT_").is_some_and(|(_, rest)| port(rest))
}

/// A name of ours that nobody reads: a typing error, most likely in something that was to make us stricter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stray {
    pub name: String,
    near: Option<&'static str>,
}

impl Stray {
    pub fn error(&self) -> Error {
        let shown: String = self.name.chars().take(64).collect();
        let rest = match self.near {
            Some(near) => format!("did you mean {near}?"),
            None => "docs/CONFIGURATION.md lists them; names of other programs must not begin with MODELFS_".into(),
        };
        Error::new(Code::Usage, format!("nobody reads {shown} of the environment; {rest}"))
    }
}

/// Which of the names that are set are ours and known to nobody.
pub fn strays(set: &[String]) -> Vec<Stray> {
    let known = || OPTIONS.iter().map(|spec| spec.env).chain(OWN.iter().map(|(name, ..)| *name));
    let ours = set.iter().filter(|name| name.starts_with("MODELFS_") && !name.starts_with(OF_TESTS));
    ours.filter(|name| !known().any(|other| other == name.as_str()) && !is_of_a_service(name))
        .map(|name| {
            // What all of them begin with tells nothing of how near they are.
            let bare = |name: &'static str| name.strip_prefix("MODELFS_");
            let near = nearest(&name["MODELFS_".len()..], known().filter_map(bare));
            Stray { name: name.clone(), near: near.and_then(|near| known().find(|name| bare(name) == Some(near))) }
        })
        .collect()
}

/// What a name of others comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The option, its value, and whether the file stands above it.
    Option(&'static str, String, bool),
    /// Something that whoever set it should know.
    Told(String),
    Nothing,
}

/// # Errors
/// `USAGE` for what could be understood as asking for more than is done.
pub(super) fn read(other: &OtherName, value: &str) -> Result<Said> {
    let name = other.name;
    let yes = || parse_switch(value).map_err(|e| e.context(name));
    Ok(match other.does {
        Does::Says("max-model-size") => Said::Option("max-model-size", format!("{value}MiB"), false),
        Does::Says(option) => Said::Option(option, value.into(), false),
        Does::SaysLast(option) => Said::Option(option, value.into(), true),
        Does::Asks(option, asked) => match yes()? {
            // Nothing that the file says may become less by it.
            true => Said::Option(option, asked.into(), option == "audit"),
            false => Said::Told(format!("{name} is not obeyed: {}", other.means)),
        },
        // Other programs may have more words for it than yes and no.
        Does::Always => match parse_switch(value) {
            Ok(true) => Said::Nothing,
            Ok(false) | Err(_) => Said::Told(format!("{name} is not obeyed: {}", other.means)),
        },
        Does::Nothing if name == "MODEL_CACHE_DIR" => Said::Told(format!("{name}: {}", other.means)),
        Does::Nothing | Does::OfStore | Does::Secret => Said::Nothing,
    })
}

/// What MODEL_STORAGE_BACKEND and AWS_S3_BUCKET say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OfStore {
    pub backend: Option<String>,
    pub bucket: Option<String>,
}

/// A store that the environment names.
const ENV: &str = "env:";

impl OfStore {
    /// The store that `typed` means; what is to be told of it.
    ///
    /// # Errors
    /// `USAGE` for `env:` without a bucket, and for a store of another kind than the environment says.
    pub fn resolve(&self, typed: &str) -> Result<(StoreUrl, Option<String>)> {
        let store = match typed.strip_prefix(ENV) {
            Some(prefix) => {
                let Some(bucket) = &self.bucket else {
                    refuse!(
                        Usage,
                        "the store {typed} is the bucket of AWS_S3_BUCKET, which is not set; set it, or name a store"
                    );
                };
                super::parse_store(&format!("s3://{bucket}/{}", prefix.trim_start_matches('/')))?
            }
            None => super::parse_store(typed)?,
        };
        self.check_kind(&store)?;
        let told = match (&store, &self.bucket) {
            (StoreUrl::S3 { bucket, .. }, Some(said)) if bucket != said => {
                Some(format!("AWS_S3_BUCKET is {said}, and the store that was named is {store}: the named one counts"))
            }
            _ => None,
        };
        Ok((store, told))
    }

    fn check_kind(&self, store: &StoreUrl) -> Result<()> {
        let Some(backend) = &self.backend else { return Ok(()) };
        let fits = match backend.to_ascii_lowercase().as_str() {
            "s3" | "minio" => !matches!(store, StoreUrl::Local(_)),
            "local" | "file" => !matches!(store, StoreUrl::S3 { .. }),
            "azure" | "gcs" => refuse!(
                Usage,
                "MODEL_STORAGE_BACKEND={backend}: stores are s3:// and folders; reach {backend} by its S3 interface, with \
                 MODEL_STORAGE_BACKEND=s3 and s3-endpoint"
            ),
            _ => refuse!(Usage, "MODEL_STORAGE_BACKEND={backend:?} is neither s3 nor local"),
        };
        if !fits {
            refuse!(
                Usage,
                "MODEL_STORAGE_BACKEND={backend}, and the store {store} is none of that kind; name another store, or unset it"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Vec<String> {
        let set: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        strays(&set).iter().map(|stray| stray.error().message().to_owned()).collect()
    }

    #[test]
    fn tables_are_sorted_and_names_mean_one_thing() {
        assert!(OTHERS.is_sorted_by_key(|other| other.name));
        assert!(OWN.is_sorted_by_key(|(name, ..)| *name));
        for name in OTHERS.iter().map(|other| other.name).chain(OWN.iter().map(|(name, ..)| *name)) {
            assert!(OPTIONS.iter().all(|spec| spec.env != name), "{name}");
        }
        for other in OTHERS {
            if let Does::Says(option) | Does::SaysLast(option) | Does::Asks(option, _) = other.does {
                assert!(super::super::options::find(option).is_some(), "{}", other.name);
            }
        }
    }

    #[test]
    fn a_name_of_ours_that_nobody_reads_is_found_with_the_nearest() {
        let told = found(&["MODELFS_POLCY", "MODELFS_POLICY", "MODELFS_KEY", "MODELFS_TEST_SEED", "HOME", "POLCY"]);
        assert_eq!(told, ["nobody reads MODELFS_POLCY of the environment; did you mean MODELFS_POLICY?"]);
        assert!(found(&["MODELFS_QQQQQQQQ"])[0].contains("docs/CONFIGURATION.md"));
        assert!(found(&["MODELFS_PASPHRASE"])[0].contains("MODELFS_PASSPHRASE"));
    }

    #[test]
    fn names_that_kubernetes_makes_of_a_service_are_not_ours() {
        let of_services = [
            "MODELFS_SERVICE_HOST",
            "MODELFS_METRICS_SERVICE_PORT",
            "MODELFS_METRICS_SERVICE_PORT_HTTPS",
            "MODELFS_PORT",
            "MODELFS_PORT_9464_TCP",
            "MODELFS_PORT_9464_TCP_PROTO",
            "MODELFS_PORT_9464_TCP_ADDR",
        ];
        assert_eq!(found(&of_services), [""; 0]);
        assert_eq!(found(&["MODELFS_REPORT_POLICY"]).len(), 1);
    }

    #[test]
    fn a_switch_of_others_takes_nothing_away() {
        let other = |name: &str| OTHERS.iter().find(|other| other.name == name).expect("in the table");
        for name in OTHERS.iter().filter(|other| matches!(other.does, Does::Always | Does::Asks(..))) {
            let said = read(name, "false").expect("understood");
            assert!(matches!(&said, Said::Told(text) if text.contains("not obeyed")), "{}: {said:?}", name.name);
            let neither = read(name, "maybe");
            match name.does {
                Does::Always => assert!(matches!(&neither, Ok(Said::Told(_))), "{}: {neither:?}", name.name),
                _ => assert_eq!(neither.expect_err("neither").code(), Code::Usage, "{}", name.name),
            }
        }
        let strict = read(other("STRICT_MODEL_SECURITY"), "true").expect("understood");
        assert_eq!(strict, Said::Option("strict", "true".into(), false));
        assert_eq!(read(other("SECURE_MODE"), "true").expect("understood"), Said::Nothing);
    }

    #[test]
    fn the_store_of_the_environment_is_its_bucket_and_of_its_kind() {
        let said = |backend: &str, bucket: &str| OfStore {
            backend: Some(backend.to_owned()).filter(|text| !text.is_empty()),
            bucket: Some(bucket.to_owned()).filter(|text| !text.is_empty()),
        };
        let store =
            |of: OfStore, typed: &str| of.resolve(typed).map(|(store, told)| (store.to_string(), told.is_some()));
        assert_eq!(store(said("s3", "models"), "env:").expect("a store").0, "s3://models");
        assert_eq!(store(said("", "models"), "env:prod/a").expect("a store").0, "s3://models/prod/a");
        assert_eq!(store(said("", "models"), "s3://other").expect("a store"), ("s3://other".into(), true));
        assert_eq!(store(said("local", "models"), "/srv").expect("a store"), ("file:///srv".into(), false));
        for (backend, bucket, typed, why) in [
            ("s3", "", "env:", "AWS_S3_BUCKET"),
            ("s3", "", "/srv", "none of that kind"),
            ("local", "", "s3://models", "none of that kind"),
            ("azure", "", "s3://models", "S3 interface"),
            ("gcs", "", "/srv", "S3 interface"),
            ("tape", "", "/srv", "neither s3 nor local"),
        ] {
            let error = said(backend, bucket).resolve(typed).expect_err(why);
            assert!(error.code() == Code::Usage && error.chain().contains(why), "{}", error.chain());
        }
    }
}
