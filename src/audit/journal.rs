//! Records to the journal of systemd, by its native protocol: one datagram, a field a line.
//!
//! In: a record, and its line. Out: a datagram whose fields are those of the record, `MODELFS_` before each name in capitals,
//! and the line itself as MODELFS_RECORD, so that an export of the journal can be verified like a file.
//! Promises: nothing waits longer than [`SEND_TIMEOUT`], and after a failure nothing waits until one gets through again; no
//! field holds a control character.
//! Held by: the tests below.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::record::{Record, shown};
use crate::error::{Code, Error, Result};
use crate::telemetry::events::Severity;

/// Where systemd-journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";

/// A journal that is busy reads later; one that hangs must not hang us.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

pub struct Journal {
    socket: UnixDatagram,
    at: PathBuf,
    failing: bool,
}

impl Journal {
    /// # Errors
    /// `AUDIT` if nothing listens there.
    pub fn open() -> Result<Journal> {
        Journal::at(Path::new(SOCKET))
    }

    fn at(path: &Path) -> Result<Journal> {
        let failed = |error| Error::new(Code::Audit, "cannot speak with the journal").with_source(error);
        if !path.exists() {
            return Err(failed(std::io::Error::new(
                std::io::ErrorKind::NotFound,
                format!("{} is not there; drop audit-journal where systemd does not run", path.display()),
            )));
        }
        let socket = UnixDatagram::unbound().map_err(failed)?;
        socket.set_write_timeout(Some(SEND_TIMEOUT)).map_err(failed)?;
        Ok(Journal { socket, at: path.to_owned(), failing: false })
    }

    /// # Errors
    /// `AUDIT` if the journal did not take it.
    pub fn send(&mut self, record: &Record<'_>, line: &[u8]) -> Result<()> {
        // By address each time: a journal that was started anew has another socket there.
        let sent = self.socket.send_to(&message(record, line), &self.at);
        let failing = sent.is_err();
        if failing != self.failing {
            self.failing = failing;
            let _ = self.socket.set_nonblocking(failing);
        }
        sent.map(drop).map_err(|error| Error::new(Code::Audit, "the journal takes no record").with_source(error))
    }
}

/// What syslog calls it.
const fn priority(severity: Severity) -> u8 {
    match severity {
        Severity::Low => 6,
        Severity::Medium => 5,
        Severity::High => 3,
        Severity::Critical => 2,
    }
}

fn message(record: &Record<'_>, line: &[u8]) -> Vec<u8> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut out = Vec::with_capacity(3 * line.len());
    let mut field = |name: &str, value: &str| {
        out.extend_from_slice(name.as_bytes());
        out.push(b'=');
        out.extend_from_slice(value.as_bytes());
        out.push(b'\n');
    };
    field("SYSLOG_IDENTIFIER", "modelfs");
    field("PRIORITY", &priority(record.severity).to_string());
    field("MESSAGE", &super::show::sentence(record));
    field("MODELFS_RECORD", &String::from_utf8_lossy(line));
    let Ok(Value::Object(fields)) = serde_json::to_value(record) else { return out };
    for (name, value) in fields {
        let value = match value {
            Value::String(text) => shown(&text),
            other => other.to_string(),
        };
        field(&format!("MODELFS_{}", name.to_ascii_uppercase()), &value);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::audit::record::Chain;
    use crate::telemetry::events::{Actor, Event, Kind, Outcome, Subject};

    #[test]
    fn a_record_is_a_datagram_of_fields_that_no_name_can_add_to() {
        let dir = tempfile::tempdir().expect("a folder");
        let place = dir.path().join("socket");
        assert_eq!(Journal::at(&place).err().expect("nothing listens").code(), Code::Audit);
        let journald = UnixDatagram::bind(&place).expect("bound");
        let mut journal = Journal::at(&place).expect("there");
        let event = Event::new(Kind::Open)
            .severity(Severity::High)
            .outcome(Outcome::Denied)
            .actor(Actor { uid: Some(1000), ..Actor::default() })
            .subject(Subject { file: Some("a\nPRIORITY=7\n".into()), ..Subject::default() });
        let (mut record, mut line) = (Record::of(&event), Vec::new());
        Chain::new().expect("random").line(&mut record, &mut line);

        journal.send(&record, &line).expect("taken");

        let mut bytes = vec![0; 64 << 10];
        let len = journald.recv(&mut bytes).expect("a datagram");
        let told = String::from_utf8(bytes[..len].to_vec()).expect("text");
        let line = String::from_utf8(line).expect("text");
        for field in [
            "SYSLOG_IDENTIFIER=modelfs",
            "PRIORITY=3",
            "MODELFS_KIND=open",
            "MODELFS_OUTCOME=denied",
            "MODELFS_SEVERITY=high",
            "MODELFS_UID=1000",
            "MODELFS_SEQ=0",
            "MODELFS_FILE=a\\nPRIORITY=7\\n",
            &format!("MODELFS_RECORD={}", line.trim_end()),
        ] {
            assert!(told.lines().any(|line| line == field), "{field} is not in {told}");
        }
        assert_eq!(told.lines().filter(|line| line.starts_with("PRIORITY=")).count(), 1);

        drop(journald);
        // A program that another test starts just now has inherited the socket, until it runs.
        let until = Instant::now() + Duration::from_secs(120);
        let gone = loop {
            match journal.send(&record, line.as_bytes()) {
                Ok(()) => assert!(Instant::now() < until, "somebody listens"),
                Err(gone) => break gone,
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(gone.code(), Code::Audit);
        std::fs::remove_file(&place).expect("removed");
        let journald = UnixDatagram::bind(&place).expect("bound again");
        journal.send(&record, line.as_bytes()).expect("one that was started anew is found");
        assert!(journald.recv(&mut bytes).expect("a datagram") > 0);
    }
}
