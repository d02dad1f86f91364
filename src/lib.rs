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
//! The list goes from what others stand on to what stands on them; who may import whom is in docs/ARCHITECTURE.md.
//!
//! - [`error`]: one table from code to class to errno and exit code; [`telemetry`]: every number and its unit.
//! - [`format`]: bytes on the store, both ways. Pure; nothing is allocated before its size is checked.
//! - [`codec`]: weights in fewer bytes, losslessly, and back. [`tensors`]: where they lie in a file; only ever a hint.
//! - [`mem`]: the only owner of memory that must not leak. [`store`]: bytes from elsewhere, never more than asked, never
//!   without a deadline.
//! - [`crypto`]: the only user of ciphers, hashes, key derivation and signatures.
//! - [`vault`]: HashiCorp Vault: who we are to it, what it holds for us.
//! - [`oms`]: whether an OpenSSF model-signing bundle vouches for a model's files.
//! - [`keys`]: where keys come from, whom to trust, which version, never an older one than seen.
//! - [`catalog`]: models that a Vault KV path lists.
//! - [`cache`]: which chunks are resident; one fetch for any number of readers; never above the budget.
//! - [`read`]: a plain range to verified bytes, and what to fetch ahead. [`vfs`]: the tree, without a kernel.
//! - [`policy`]: who may see and read which model, how often, and who is refused everything for a while.
//! - [`fuse`]: the kernel's requests; mounting. [`control`]: the socket behind `status` and `umount`.
//! - [`versions`]: tags, rollbacks, pruning, the best version by its metrics.
//! - [`rotate`]: who opens a version, and under which data key it lies: slots added, removed, replaced; new keys.
//! - [`reading`]: where every command and the daemon open a model; [`models`]: which versions a mount shows, and which of
//!   them mounts share. [`seal`]: a directory to a published version.
//! - [`host`]: a process and its mounts, one cache for all; the order of starting and stopping. [`daemon`]: a process that is
//!   one mount.
//! - [`observe`]: a process seen from outside: metrics, health, alarms.
//! - [`audit`]: who did what to which model, in a log that cannot be changed unseen.
//! - [`ready`]: when a mount may be called ready. [`notify`]: what a service manager is told.
//! - [`run`]: a command that lives on a mount, and ends with it wiped.
//! - [`plugin`]: volumes of Docker and Podman, and what whoever makes them may not say.
//! - [`csi`]: volumes of Kubernetes pods, each with the rights of its own service account.
//! - [`doctor`]: what of the machine stops all this or holds it back. [`gpu`]: what the driver says of its GPUs.
//! - [`scan`]: weights in plaintext in trees, image archives and layouts.
//! - [`mounts`], [`processes`]: what the kernel tells of mounts and of who asks, without touching a mount.
//! - [`config`]: what the user meant; [`cli`]: what was typed. [`units`]: how people write sizes and times.
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

pub mod audit;
pub mod cache;
pub mod catalog;
pub mod cli;
pub mod codec;
pub mod config;
pub mod control;
pub mod crypto;
pub mod csi;
pub mod daemon;
pub mod doctor;
mod door;
pub mod error;
pub mod format;
pub mod fuse;
pub mod gpu;
pub mod host;
pub mod keys;
pub mod mem;
pub mod models;
pub mod mounts;
pub mod notify;
pub mod observe;
pub mod oms;
pub mod plugin;
pub mod policy;
pub mod processes;
pub mod read;
pub mod reading;
pub mod ready;
pub mod rotate;
pub mod run;
pub mod scan;
pub mod seal;
pub mod store;
pub mod telemetry;
pub mod tensors;
pub mod units;
pub mod vault;
pub mod versions;
pub mod vfs;
