//! Who may see and read which model, how often, and who is refused everything for a while.
//!
//! ```text
//!  policy file ──file──> Policy ──judge(asker, model)──> none | see | read, by which rule
//!                                └ limits: token buckets by uid        └ denials: too many, and a timed block
//! ```
//! In: a TOML file of the administrator's; askers as the kernel and /proc tell of them. Out: verdicts, waits, blocks.
//! Promises: what no rule grants is denied; the first rule that fits decides; whoever's process cannot be seen is judged by
//! uid and primary group alone, and never gets more than he would if it could; a file with one mistake in it is refused
//! whole; every table has a bound and forgets.
//! Not here: what the kernel is answered and told to forget (`fuse::access`), owner and modes (the kernel, always).
//! Spec: docs/ACCESS.md. Held by: the tests below, tests/policy.rs, tests/policy.sh.

mod denials;
mod file;
mod limits;
mod rules;
pub mod types;

pub use denials::{Block, Blocked, Counted, Culprit, DenialRules, Denials, Notice, Where};
pub use limits::{Buckets, Limiter, Limits, Rate, Share, Shares, WAIT_MAX, Wait};
pub use rules::{Asker, May, Rule, Verdict, Who};

pub use crate::processes::Seen;

/// A policy file that was read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    pub rules: Vec<Rule>,
    /// Where a rule has none of its own.
    pub limits: Limits,
    pub denials: DenialRules,
    /// SHA-256 of the file's bytes, for the record.
    pub digest: [u8; 32],
}
