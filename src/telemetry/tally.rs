//! How often what happened: one number for each kind, severity and outcome of an event, kept whether anybody listens or not.
//!
//! Held by: the tests below.

use std::sync::atomic::{AtomicU64, Ordering};

use super::events::{Event, Kind, Outcome, Severity};

const SEVERITIES: [Severity; 4] = [Severity::Low, Severity::Medium, Severity::High, Severity::Critical];
const OUTCOMES: [Outcome; 3] = [Outcome::Allowed, Outcome::Denied, Outcome::Failed];
/// More than there are kinds: one that is added needs no change here.
const KINDS_MAX: usize = 64;

pub struct Tally {
    counts: Box<[AtomicU64]>,
    /// Kinds in the order of their numbers, as they were seen.
    kinds: std::sync::RwLock<Vec<Kind>>,
}

impl Default for Tally {
    fn default() -> Tally {
        let cells = KINDS_MAX * SEVERITIES.len() * OUTCOMES.len();
        Tally { counts: (0..cells).map(|_| AtomicU64::new(0)).collect(), kinds: std::sync::RwLock::default() }
    }
}

impl Tally {
    pub fn note(&self, event: &Event) {
        let at = cell(event.kind as usize, event.severity as usize, event.outcome as usize);
        let Some(count) = self.counts.get(at) else { return };
        if count.fetch_add(1, Ordering::Relaxed) == 0 {
            let mut kinds = self.kinds.write().expect("a thread died holding the kinds");
            if !kinds.contains(&event.kind) {
                kinds.push(event.kind);
            }
        }
    }

    /// Every combination that happened.
    pub fn counts(&self) -> Vec<(Kind, Severity, Outcome, u64)> {
        let mut kinds = self.kinds.read().expect("a thread died holding the kinds").clone();
        kinds.sort_unstable();
        let mut counts = Vec::new();
        for kind in kinds {
            for severity in SEVERITIES {
                for outcome in OUTCOMES {
                    let at = cell(kind as usize, severity as usize, outcome as usize);
                    let count = self.counts[at].load(Ordering::Relaxed);
                    if count > 0 {
                        counts.push((kind, severity, outcome, count));
                    }
                }
            }
        }
        counts
    }
}

fn cell(kind: usize, severity: usize, outcome: usize) -> usize {
    (kind * SEVERITIES.len() + severity) * OUTCOMES.len() + outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_combination_is_counted_for_itself() {
        let tally = Tally::default();
        assert!(tally.counts().is_empty());
        tally.note(&Event::new(Kind::Open));
        tally.note(&Event::new(Kind::Open));
        tally.note(&Event::new(Kind::Open).outcome(Outcome::Denied).severity(Severity::Medium));
        tally.note(&Event::new(Kind::Checkpoint).severity(Severity::Critical).outcome(Outcome::Failed));
        let seen = [
            (Kind::Open, Severity::Low, Outcome::Allowed, 2),
            (Kind::Open, Severity::Medium, Outcome::Denied, 1),
            (Kind::Checkpoint, Severity::Critical, Outcome::Failed, 1),
        ];
        assert_eq!(tally.counts(), seen);
        assert!((Kind::Checkpoint as usize) < KINDS_MAX);
    }
}
