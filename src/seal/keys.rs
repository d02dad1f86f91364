//! What a sealer needs from whoever holds the keys.

use crate::crypto::Dek;
use crate::error::Result;
use crate::format::{ManifestHeader, Slot, Slots};
pub use crate::keys::SlotTarget;

/// Wraps and unwraps data keys. Both may take a second (password hashes) or ask a server: they run on threads of their own.
pub trait SlotKeys: Send + Sync {
    /// One slot for each key that shall open the version.
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>>;

    /// The data key of the manifest with this header, its commitment checked.
    ///
    /// # Errors
    /// `NO_KEY` if none of the slots opens.
    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek>;

    /// Whether `unlock` opens what `wrap` makes. A publisher that has only the public halves of its readers' keys says no:
    /// what it wrote is then compared byte for byte instead, and the rest is read back with the key it was sealed with.
    fn opens(&self) -> bool {
        true
    }
}
