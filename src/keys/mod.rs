//! Where keys come from, whom to trust, and which version is the newest one that may be believed.
//!
//! ```text
//!  --trust, trust file ──> Trust ─┐
//!  state directory ──> FloorStore ┼──resolve──> Resolved (signed manifest, slots) ──unlock──> Dek ──> crypto::open_manifest
//!  store (hostile) ───────────────┘                                          ↑
//!  --key ──> KeySource ──> Keyring (keys in locked memory, or Vault asked) ──┘
//! ```
//! Promises: nothing the store says decides whom to trust, which file is read or which program runs; a key file that others
//! can read or replace is refused; a secret is in locked memory from the moment it is read, and its source is wiped where
//! that is possible; an older version than one already seen is refused.
//! Not here: opening the manifest (`crypto`), how Vault is reached (`vault`).
//! Spec: docs/FORMAT.md a.5 to a.7 and (b). Held by: the tests of each file, named after THREAT_MODEL (f) rows 21 to 43.

mod floor;
mod pin;
mod resolve;
mod selector;
mod service;
mod signing;
mod slots;
mod source;
pub(crate) mod state;
mod stretch;
mod trust;
mod wrap;

pub use floor::{FloorPin, FloorPlace, FloorPolicy, FloorStore, Note, Raised, RefFloor, check_ref, check_slots};
pub use pin::{KvFloor, VaultKv, VersionedKv};
pub use resolve::{BrokenTag, Candidate, DEFAULT_CHANNEL, Resolved, Resolver, Versions, unix_now};
pub use selector::{Aim, METRIC_NAME_BYTES_MAX, ModelSelector, Wanted};
pub use signing::{
    Signer, VaultSigner, default_signing_key_path, generate_key_file, generate_recipient_pair, generate_signing_pair,
    load_or_create_signing_key, load_signing_key, public_path,
};
pub use slots::{Keyring, free_label, unlock};
pub use source::{KeyMaterial, KeySource, Prompt, prompt_new, prompt_terminal};
pub use state::usual_state_dir;
pub use stretch::Cost;
pub use trust::{Glob, Role, Roles, Tofu, Trust, load_public_key};
pub use wrap::{SlotTarget, wrap};
