//! What is told of opens and looks: who asked, of what, whether it was let.
//!
//! In: a request as the kernel made it, and how it is about to be answered. Out: one event, before the answer.
//! Promises: without anybody who listens nothing is looked up; an open whose event a required log cannot take is refused;
//! who asked is what the kernel said with the request, and /proc only adds to it.
//! Not here: how events are kept (`telemetry::events` and its sinks), who is let in (`guard`).
//! Held by: tests/policy.rs.

use std::path::PathBuf;
use std::sync::LazyLock;

use super::{Inner, ModelFs, Opener};
use crate::error::{Error, Result};
use crate::processes::{self, Pod};
use crate::telemetry::events::{Actor, Event, Kind, Severity, Subject};
use crate::vfs::NodeId;

/// What every event of one mount has in common.
#[derive(Debug, Clone, Default)]
pub struct Place {
    pub mountpoint: PathBuf,
    pub store: String,
    /// `NAMESPACE/NAME` of Kubernetes, where the mount is a pod's.
    pub service_account: Option<String>,
    /// The pod that the mount is for: whoever is not seen is taken for one of its programs.
    pub pod: Option<Pod>,
}

impl ModelFs {
    /// Told once, before the mount is in the tree.
    pub fn set_place(&self, place: Place) {
        assert!(self.inner.place.set(place).is_ok(), "one place a filesystem");
    }
}

impl Inner {
    pub(super) fn is_heard(&self) -> bool {
        self.reader.cache().telemetry().events.any()
    }

    pub(super) fn place(&self) -> &Place {
        static NOWHERE: LazyLock<Place> = LazyLock::new(Place::default);
        self.place.get().unwrap_or_else(|| &NOWHERE)
    }

    /// Of an open that is about to be answered.
    ///
    /// # Errors
    /// A required log that cannot be written: then it is not to be let.
    pub(super) fn tell_opened(&self, node: NodeId, opener: &Opener) -> Result<()> {
        if !self.is_heard() {
            return Ok(());
        }
        let event = Event::new(Kind::Open).actor(self.actor(opener)).subject(self.subject(node));
        self.reader.cache().telemetry().events.emit(&event)
    }

    /// Of an open that is refused or failed, for the reason that the error gives.
    pub(super) fn tell_not_opened(&self, node: NodeId, opener: &Opener, error: &Error) {
        self.tell_refused(Event::new(Kind::Open).severity(Severity::Medium).error(error), node, opener);
    }

    /// Of a refusal that counts towards no block. So many a second of one user and no more: a loop could fill a log that must
    /// be written, and then nobody would be let in.
    pub(super) fn tell_refused(&self, event: Event, node: NodeId, opener: &Opener) {
        if self.is_heard()
            && let Some(missed) = self.refusal_is_told(opener)
        {
            self.tell(after(missed, event).actor(self.actor(opener)).subject(self.subject(node)));
        }
    }

    pub(super) fn tell(&self, event: Event) {
        self.reader.cache().telemetry().events.tell(&event);
    }

    pub(super) fn actor(&self, opener: &Opener) -> Actor {
        let seen = processes::process_of(opener.thread).map(processes::process);
        let place = self.place();
        let mut actor = Actor {
            uid: Some(opener.uid),
            gid: Some(opener.gid),
            ..Actor::of_volume(&place.service_account, &place.pod)
        };
        if let Some(process) = seen {
            actor.pid = Some(process.pid);
            actor.command = Some(process.command);
            actor.exe = process.exe;
            actor.cgroup = process.cgroup;
            actor.container = process.container;
            actor.pod = process.pod;
        }
        actor
    }

    pub(super) fn subject(&self, node: NodeId) -> Subject {
        let place = self.place();
        let mut subject = Subject {
            mountpoint: Some(place.mountpoint.clone()),
            store: Some(place.store.clone()),
            ..Subject::default()
        };
        if let Some(model) = self.vfs.model_of(node) {
            subject.model = Some(model.name.clone());
            subject.version = Some(model.manifest.header().seq);
            subject.manifest = Some(format!("sha256:{}", model.digest));
            subject.key = model.key_slot().map(|slot| slot.to_string());
        } else {
            subject.model = self.vfs.folder_path(node);
        }
        if let Some((model, file, _)) = self.vfs.file(node) {
            subject.file = Some(model.manifest.path(&model.manifest.files()[file as usize]).to_owned());
        }
        subject
    }
}

/// The event, with how many like it before were not told.
pub(super) fn after(missed: u64, mut event: Event) -> Event {
    if missed > 0 {
        let detail = event.detail.take().unwrap_or_default();
        event.detail = Some(format!("{detail}; {missed} more like it before were not told"));
    }
    event
}
