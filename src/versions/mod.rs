//! What becomes of a model's versions after they were published: tags move, versions go back, old ones go away, and the
//! best one is found.
//!
//! ```text
//!  tag, rollback ──resolve (as a reader)──> the version ──seal::Releaser──> the next ref of a channel
//!  prune ──mark: refs within retention, their manifests, objects, slots──> sweep what two looks called garbage
//!  NAME@best:METRIC:min|max ──candidates──> each opened and verified ──> one version, pinned by its digest
//! ```
//! In: a hostile store, local trust, keys. Out: refs through `seal::Releaser` alone; deletions through [`Pruner`] alone.
//! Promises: no ref names a version that a reader would refuse; nothing is deleted that a ref in the store leads to, or
//! that was not called garbage by two looks a grace period apart; whatever cannot be read or verified stops a prune.
//! Not here: how a ref is written (`seal`), which version may be believed (`keys`), slots and their rotation.
//! Spec: docs/FORMAT.md b.1, b.2. Held by: the tests of each file, tests/versions.rs.

mod best;
mod moves;
mod prune;

pub use best::{Best, VERSIONS_MAX, best_of, metrics_of};
pub use moves::{Expires, MoveOrder, Moved, Mover};
pub use prune::{Kind, Look, PruneOptions, PruneProgressFn, PruneReport, Pruner, Tally};
