//! What those who look after a mount may ask of it: a log of who read what, numbers, alarms, who may give it orders.
//!
//! One for a process, whatever it mounts. Who may read which model is a file of its own (`policy`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::layers::{Layers, refuse_all};
use super::{parse_path, parse_state_dir};
use crate::error::{Code, Error, Result};
use crate::refuse;
use crate::telemetry::events::Severity;
use crate::units;

#[derive(Debug, Clone, Default)]
pub struct Oversight {
    pub audit: AuditPlan,
    pub http: Option<HttpPlan>,
    pub alerts: AlertPlan,
    pub roles: RolesPlan,
    /// The folder of state, whose room is told; `None`: the usual one.
    pub state_dir: Option<PathBuf>,
}

/// Whether what happens is recorded, and what follows if it cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AuditMode {
    #[default]
    Off,
    /// A record that cannot be written is counted and told in the log; readers go on.
    On,
    /// Then opens are refused.
    Required,
}

impl std::str::FromStr for AuditMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<AuditMode> {
        match text {
            "off" => Ok(AuditMode::Off),
            "on" => Ok(AuditMode::On),
            "required" => Ok(AuditMode::Required),
            other => Err(Error::new(Code::Usage, format!("audit `{other}` is none of off, on, required"))),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditPlan {
    pub mode: AuditMode,
    /// `None` with `journal`: the journal alone.
    pub file: Option<PathBuf>,
    pub journal: bool,
    /// The Ed25519 key that signs checkpoints, as `modelfs keygen --signing` makes it.
    pub key: Option<PathBuf>,
    /// Where checkpoints are written a second time: another file system, or a pipe to another machine.
    pub checkpoint_file: Option<PathBuf>,
    /// A checkpoint after so many records, or so long after the first record since the last.
    pub checkpoint_records: u64,
    pub checkpoint_every: Duration,
    /// A file is closed and a new one begun at this size.
    pub file_bytes_max: u64,
    /// Closed files older than this are removed; `None`: never.
    pub keep: Option<Duration>,
    /// Where a checkpoint has been on its way to the disk and elsewhere for so long, somebody is told.
    pub stuck_after: Duration,
    /// And where the disk and the place elsewhere have had it for so long, it will never be there. No option: long enough
    /// for a disk that is sound and has a lot to write, and short for what is vouched for by nothing meanwhile.
    pub refuse_after: Duration,
}

impl Default for AuditPlan {
    fn default() -> AuditPlan {
        AuditPlan {
            mode: AuditMode::Off,
            file: None,
            journal: false,
            key: None,
            checkpoint_file: None,
            checkpoint_records: 1000,
            checkpoint_every: Duration::from_secs(60),
            file_bytes_max: 256 << 20,
            keep: None,
            stuck_after: Duration::from_secs(30),
            refuse_after: Duration::from_secs(120),
        }
    }
}

/// Where metrics and health are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpPlan {
    Unix(PathBuf),
    /// Only with TLS and a token.
    Tcp {
        address: SocketAddr,
        cert: PathBuf,
        key: PathBuf,
        token: PathBuf,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AlertPlan {
    /// A POST of JSON goes to each. May hold a secret: never shown.
    pub webhooks: Vec<String>,
    /// The same, one a line, in a file of mode 0600.
    pub webhook_file: Option<PathBuf>,
    pub from: Option<Severity>,
}

/// Whom the control socket answers beside root and the mounting user, who may all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RolesPlan {
    /// Status and numbers.
    pub viewers: Vec<Peers>,
    /// And lock, unlock, reload, sessions.
    pub operators: Vec<Peers>,
    /// And stop.
    pub admins: Vec<Peers>,
}

/// `uid=N` or `gid=N`, supplementary groups counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peers {
    Uid(u32),
    Gid(u32),
}

impl std::str::FromStr for Peers {
    type Err = Error;

    fn from_str(text: &str) -> Result<Peers> {
        let bad = || Error::new(Code::Usage, format!("`{text}` names nobody; write uid=1000 or gid=1000"));
        let (kind, number) = text.split_once('=').ok_or_else(bad)?;
        let number = number.parse().map_err(|_| bad())?;
        match kind {
            "uid" => Ok(Peers::Uid(number)),
            "gid" => Ok(Peers::Gid(number)),
            _ => Err(bad()),
        }
    }
}

impl Oversight {
    /// # Errors
    /// `USAGE` for every contradiction, naming the fix.
    pub fn from_layers(layers: &Layers) -> Result<Oversight> {
        let (audit, http) = (audit(layers), http(layers));
        refuse_all([audit.as_ref().err(), http.as_ref().err()].into_iter().flatten().cloned().collect())?;
        Ok(Oversight {
            audit: audit?,
            http: http?,
            alerts: AlertPlan {
                webhooks: layers.parse_all("alert-webhook", |text| Ok(text.to_owned()))?,
                webhook_file: layers.parse("alert-webhook-file", parse_path)?,
                from: layers.parse("alert-severity", parse_severity)?,
            },
            roles: RolesPlan {
                viewers: layers.parse_all("control-viewer", str::parse)?,
                operators: layers.parse_all("control-operator", str::parse)?,
                admins: layers.parse_all("control-admin", str::parse)?,
            },
            state_dir: layers.parse("state-dir", parse_state_dir)?,
        })
    }
}

pub(super) fn parse_severity(text: &str) -> Result<Severity> {
    match text {
        "low" => Ok(Severity::Low),
        "medium" => Ok(Severity::Medium),
        "high" => Ok(Severity::High),
        "critical" => Ok(Severity::Critical),
        other => Err(Error::new(Code::Usage, format!("severity `{other}` is none of low, medium, high, critical"))),
    }
}

/// What says something of the audit log that is written; of its files alone.
const OF_AUDIT: &[&str] = &["audit-key", "audit-checkpoint-file", "audit-checkpoint-records", "audit-checkpoint-every"];
const OF_AUDIT_FILES: &[&str] = &["audit-file-bytes", "audit-keep"];

/// Where and how it is recorded, of a mount or of a command that changes a store.
///
/// # Errors
/// `USAGE` for what contradicts itself.
pub fn audit(layers: &Layers) -> Result<AuditPlan> {
    let usual = AuditPlan::default();
    let file = layers.parse("audit-file", parse_path)?;
    let journal = layers.switch("audit-journal")?;
    let asked = file.is_some() || journal;
    let set =
        |names: &[&'static str]| names.iter().copied().filter(|name| layers.get(name).is_some()).collect::<Vec<_>>();
    let (of_files, of_any) = (set(OF_AUDIT_FILES), set(OF_AUDIT));
    let plan = AuditPlan {
        mode: layers.parse("audit", str::parse)?.unwrap_or(if asked { AuditMode::On } else { AuditMode::Off }),
        file,
        journal,
        key: layers.parse("audit-key", parse_path)?,
        checkpoint_file: layers.parse("audit-checkpoint-file", parse_path)?,
        checkpoint_records: layers
            .parse("audit-checkpoint-records", super::parse_count)?
            .unwrap_or(usual.checkpoint_records),
        checkpoint_every: layers
            .parse("audit-checkpoint-every", units::parse_duration)?
            .unwrap_or(usual.checkpoint_every),
        file_bytes_max: layers.parse("audit-file-bytes", units::parse_size)?.unwrap_or(usual.file_bytes_max),
        keep: layers.parse("audit-keep", units::parse_duration)?,
        stuck_after: usual.stuck_after,
        refuse_after: usual.refuse_after,
    };
    if plan.mode != AuditMode::Off && !asked {
        let by = layers.get("audit").map_or(String::new(), |setting| format!("{setting}: "));
        refuse!(Usage, "{by}audit is on and has nowhere to write; add audit-file=PATH or audit-journal");
    }
    if plan.mode == AuditMode::Off && asked {
        refuse!(Usage, "audit=off contradicts audit-file and audit-journal; drop one of them");
    }
    // Who asks for a key or a second place of checkpoints takes it that there is a log.
    let for_nothing = [of_any, of_files.clone()].concat();
    if !asked && !for_nothing.is_empty() {
        let names = for_nothing.join(", ");
        refuse!(
            Usage,
            "nothing is audited, and {names} is for the audit log; add audit-file=PATH or audit-journal, or drop it"
        );
    }
    if plan.file.is_none() && !of_files.is_empty() {
        let names = of_files.join(", ");
        refuse!(Usage, "{names} is for files, and the journal alone is the log; add audit-file=PATH, or drop it");
    }
    if plan.checkpoint_file.is_some() && plan.key.is_none() {
        refuse!(
            Usage,
            "checkpoints that leave this machine must be signed; add audit-key=PATH (modelfs keygen --signing)"
        );
    }
    Ok(plan)
}

fn http(layers: &Layers) -> Result<Option<HttpPlan>> {
    let (cert, key, token) = (
        layers.parse("http-cert", parse_path)?,
        layers.parse("http-key", parse_path)?,
        layers.parse("http-token-file", parse_path)?,
    );
    let Some(at) = layers.parse("http", |text| Ok(text.to_owned()))? else {
        if cert.is_some() || key.is_some() || token.is_some() {
            refuse!(Usage, "http-cert, http-key and http-token-file are for http=ADDRESS:PORT; add it or drop them");
        }
        return Ok(None);
    };
    if let Some(path) = at.strip_prefix("unix:") {
        return Ok(Some(HttpPlan::Unix(parse_path(path)?)));
    }
    let address = parse_address(&at)?;
    match (cert, key, token) {
        (Some(cert), Some(key), Some(token)) => Ok(Some(HttpPlan::Tcp { address, cert, key, token })),
        _ => refuse!(
            Usage,
            "http={at} answers over the network, only with TLS and a token; add http-cert, http-key and http-token-file, or \
             use http=unix:PATH"
        ),
    }
}

fn parse_address(at: &str) -> Result<SocketAddr> {
    at.parse().map_err(|_| {
        Error::new(Code::Usage, format!("http `{at}` is neither unix:PATH nor ADDRESS:PORT, as in 127.0.0.1:9464"))
    })
}

/// Whether it is a place to answer at, whatever else is needed there.
pub(super) fn check_http(text: &str) -> Result<()> {
    match text.strip_prefix("unix:") {
        Some(path) => parse_path(path).map(drop),
        None => parse_address(text).map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::super::layers::split_list;
    use super::*;

    fn oversight(words: &str) -> Result<Oversight> {
        let mut layers = Layers::default();
        layers.mount_options(&split_list(words), false)?;
        Oversight::from_layers(&layers)
    }

    #[test]
    fn nothing_is_recorded_or_answered_unless_asked_for() {
        let plan = oversight("ro").expect("a plan");
        assert_eq!((plan.audit.mode, plan.http), (AuditMode::Off, None));
        assert_eq!(oversight("audit_file=/a").expect("a plan").audit.mode, AuditMode::On);
        assert_eq!(oversight("audit_journal,audit=required").expect("a plan").audit.mode, AuditMode::Required);
    }

    #[test]
    fn contradictions_are_refused_with_their_fix() {
        let cases = [
            ("audit=required", "audit-file"),
            ("audit=off,audit_file=/a", "drop one"),
            ("audit=maybe", "off, on, required"),
            ("audit_file=/a,audit_checkpoint_file=/b", "audit-key"),
            ("audit_key=/k", "add audit-file"),
            ("audit_checkpoint_file=/b,audit_key=/k", "audit-key, audit-checkpoint-file is for the audit log"),
            ("audit_checkpoint_records=5", "add audit-file"),
            ("audit_checkpoint_every=5s,audit=off", "or drop it"),
            ("audit_keep=90d", "nothing is audited"),
            ("audit_journal,audit_keep=90d", "the journal alone"),
            ("audit_journal,audit_file_bytes=1MiB", "the journal alone"),
            ("audit_file=/a,audit_checkpoint_records=0", "1 or more"),
            ("http=127.0.0.1:9464", "TLS and a token"),
            ("http=127.0.0.1:9464,http_cert=/c,http_key=/k", "http-token-file"),
            ("http=localhost", "unix:PATH"),
            ("http_cert=/c", "drop them"),
            ("alert_severity=loud", "critical"),
            ("control_viewer=ann", "uid=1000"),
        ];
        for (words, fix) in cases {
            let error = oversight(words).expect_err(words);
            assert_eq!(error.code(), Code::Usage, "{words}");
            assert!(error.chain().contains(fix), "{words}: {}", error.chain());
        }
    }
}
