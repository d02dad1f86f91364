//! modelfs: a FUSE filesystem that serves encrypted machine-learning models.
//!
//! A publisher seals a model directory into object storage. A server mounts it read-only: files are fetched lazily in
//! chunks, verified and decrypted into locked memory, and read by any unmodified program at the speed of memory.
//! Plaintext never lands on a disk.
//!
//! ```text
//!  publisher                    anyone's bucket                 server
//!  model dir ──seal──> ciphertext ─────────────> range reads ──> open_chunk ──> LockedFile ──> Reader ──> kernel
//!            (seal)   refs, slots, manifest       (store)         (crypto)       (mem, cache)   (read)    (fuse)
//! ```
//!
//! # Where a byte is ...
//!
//! | | |
//! |---|---|
//! | fetched, hostile | [`store::fetch_chunk`], into a [`store::CipherChunk`] |
//! | verified and decrypted | [`crypto::open_chunk`], the only maker of plaintext |
//! | locked | [`mem::LockedFile`], handed out by [`cache::Cache`] as a [`cache::Pin`] |
//! | served | [`read::Reader`] to the daemon's own replies; by the kernel itself for whole files ([`fuse`]) |
//! | wiped | [`mem::LockedFile::wipe`] on eviction, [`cache::Cache::wipe_all`] at the end |
//!
//! # Which module owns which promise
//!
//! Imports point one way, from the bottom of this list to the top.
//!
//! - [`error`]: one table from code to class to errno and exit code; [`telemetry`]: every number and its unit.
//! - [`format`]: bytes on the store, both ways. Pure; nothing is allocated before its size is checked.
//! - [`codec`]: weights in fewer bytes, losslessly, and back. [`tensors`]: where they lie in a file; only ever a hint.
//! - [`mem`]: the only owner of memory that must not leak. [`store`]: bytes from elsewhere, never more than asked, never
//!   without a deadline.
//! - [`crypto`]: the only user of ciphers, hashes, key derivation and signatures.
//! - [`keys`]: where keys come from, whom to trust, which version, never an older one than seen.
//! - [`cache`]: which chunks are resident; one fetch for any number of readers; never above the budget.
//! - [`read`]: a plain range to verified bytes, and what to fetch ahead. [`vfs`]: the tree, without a kernel.
//! - [`fuse`]: the kernel's requests; mounting. [`control`]: the socket behind `status` and `umount`.
//! - [`reading`]: where every command and the daemon open a model. [`daemon`]: the order of starting and stopping. [`seal`]: a directory to a published version.
//! - [`doctor`]: what of the machine stops all this or holds it back.
//! - [`config`]: what the user meant; [`cli`]: what was typed.
//!
//! # Words
//!
//! - **model**: a directory of files under a name; **version**: one immutable state of it, described by one manifest.
//! - **object**: ciphertext under a random name: one large file, a slice of one, or a **pack** of small files.
//! - **chunk**: the unit of fetching and hashing (8 MiB); **block**: the unit of authentication (64 KiB).
//! - **coded**: a chunk stored as a shorter stream that gives exactly its plaintext; **as it is**: one that is not.
//! - **slot**: the version's data key, wrapped for one recipient. **ref**: a signed, numbered pointer from a channel
//!   (`latest`, a tag) to a manifest. **floor**: the oldest ref this machine still accepts.
//! - **cold** and **hot** node: a file served through the daemon, and one whose locked pages the kernel serves itself.
//!
//! docs/ARCHITECTURE.md tells the why, docs/FORMAT.md is the format's normative text, docs/THREAT_MODEL.md says what holds
//! against whom, docs/SEMANTICS.md what a program sees.

pub mod cache;
pub mod cli;
pub mod codec;
pub mod config;
pub mod control;
pub mod crypto;
pub mod daemon;
pub mod doctor;
pub mod error;
pub mod format;
pub mod fuse;
pub mod keys;
pub mod mem;
pub mod mounts;
pub mod read;
pub mod reading;
pub mod seal;
pub mod store;
pub mod telemetry;
pub mod tensors;
pub mod vfs;
