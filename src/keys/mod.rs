//! Where keys come from, whom to trust, and which version is the newest one that may be believed.
//!
//! ```text
//!  --trust, trust file ──> Trust ─┐
//!  state directory ──> FloorStore ┼──resolve──> Resolved (signed manifest, slots) ──unlock──> Dek ──> crypto::open_manifest
//!  store (hostile) ───────────────┘                                          ↑
//!  --key ──> KeySource ──> Keyring (keys in locked memory) ──────────────────┘
//! ```
//! Promises: nothing the store says decides whom to trust, which file is read or which program runs; a key file that others
//! can read or replace is refused; a secret is in locked memory from the moment it is read, and its source is wiped where
//! that is possible; an older version than one already seen is refused.
//! Not here: opening the manifest (`crypto`), Vault (a later version).
//! Spec: docs/FORMAT.md a.5 to a.7 and (b). Held by: the tests of each file, named after THREAT_MODEL (f) rows 21 to 43.

mod floor;
mod resolve;
mod selector;
mod signing;
mod slots;
mod source;
mod state;
mod trust;

pub use floor::{FloorPolicy, FloorStore, Note, RefFloor, check_ref, check_slots};
pub use resolve::{DEFAULT_CHANNEL, Resolved, Resolver, unix_now};
pub use selector::{ModelSelector, Wanted};
pub use signing::{
    default_signing_key_path, generate_key_file, generate_signing_pair, load_or_create_signing_key, load_signing_key,
    public_path,
};
pub use slots::{Cost, Keyring, SlotTarget, unlock, wrap};
pub use source::{KeyMaterial, KeySource, Prompt, prompt_terminal};
pub use state::state_dir;
pub use trust::{Glob, Role, Roles, Tofu, Trust, load_public_key};
