//! Turns hostile bytes into verified ones and plaintext into stored ones; sole user of the AEAD, hash, KDF and signature
//! crates.
//!
//! ```text
//!  keys::unlock ──> Dek ──open_manifest──> Manifest + ModelKeys
//!                                             │
//!  store ──CipherChunk (hostile)──open_chunk──┴──> the slot, verified          cache calls it, nobody else
//!  seal  ──plain chunk──ObjectSealer──> ciphertext, tags, chunk hash           seal calls it, nobody else
//!  seal  ──body──seal_manifest──> manifest object       keys::resolve ──PublicKey::verify_strict──> trust
//! ```
//! Promises: [`open_chunk`] is the only maker of verified bytes, and a slot it refuses is wiped; every commitment is
//! compared in constant time before a cipher is used; a key is derived where it is used and wiped there; what has to
//! stay lives in [`Secret`](crate::mem::Secret).
//! Not here: which key is trusted (`keys`), where bytes come from (`store`), where plaintext stays (`cache`, `mem`).
//! Spec: docs/FORMAT.md (a). Held by: the tests of each file; the vectors of FORMAT.md a.9 stand in `vectors`.
#![forbid(unsafe_code)]

mod aead;
mod chunk;
mod dek;
mod ecdsa;
mod hash;
mod kdf;
mod manifest;
mod recipient;
mod sign;
mod wrap;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod vectors;

pub use aead::{Implementation, TAG_LEN, implementation};
pub use chunk::{ObjectSealer, Verify, check_chunk_hash, open_chunk, scratch_len};
pub use dek::{Dek, ModelKeys};
pub use ecdsa::EcPublicKey;
pub use hash::{FileHasher, hmac_sha256, sha256};
pub use manifest::{open_manifest, seal_manifest};
pub use recipient::{RecipientKey, RecipientSecret, open_dek_with, seal_dek_to};
pub use sign::{PublicKey, SIGNATURE_LEN, SigningKey};
pub use wrap::{unwrap_dek, wrap_dek};
