//! A process seen from outside: numbers, health, alarms.
//!
//! In: the host and its counters ([`crate::telemetry`]), events. Out: text for Prometheus, JSON for people and probes, webhooks.
//! Promises: whoever asks gets an answer while a store hangs; no answer holds a secret; nothing here lets a reader wait.
//! `table`: what there is to count. `facts`, `probe`: what is so now. `metrics`: a scrape. `health`: is all well. `server`,
//! `tls`: the door to both. `alerts`: who is told unasked.
//! Not here: the counting (`telemetry`), the log of who did what (`audit`), what a host is (`host`).
//! Held by: tests/observe.rs, tests/observe.sh.

mod alerts;
mod facts;
mod health;
mod metrics;
mod probe;
mod server;
pub mod table;
mod tls;

pub use alerts::Alerts;
pub use facts::{Disk, Facts, Keep, ModelFacts, MountFacts, Process};
pub use metrics::{CONTENT_TYPE, MODELS_MAX, MOUNTS_MAX, text};
pub use probe::Probe;
pub use server::{Server, Watched};
