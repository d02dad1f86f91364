//! Sole owner of unsafe memory: what holds plaintext and keys, how much of it, and how it ends.
//!
//! In: sizes and ranges from `cache`, key bytes from `keys` and `crypto`. Out: [`LockedFile`]s for model plaintext,
//! [`Secret`]s for keys, [`LockedBuf`]s for what lies between (manifests, KDF output), [`Grant`]s that say there is room.
//! Promises: plaintext and keys lie only in memory that is never swapped, never dumped, never copied into a forked
//! child, and that is overwritten before it goes back to the kernel; a write through a mapping cannot meet a full
//! tmpfs (SIGBUS), because every range is allocated before anyone may write to it; the [`Budget`] is never exceeded.
//! Not here: what the bytes mean (`crypto`), which ranges are resident or pinned (`cache`).
//! Spec: docs/THREAT_MODEL.md, memory rules. Held by: the tests in each file, tests/memory.rs.

mod arena;
mod budget;
mod env;
mod folder;
mod heap;
mod huge;
mod locked_file;
mod map;
mod numa;
mod pins;
mod private;
mod process;
mod secret;

pub use arena::{Arena, ArenaKind, ArenaPlan, Pages, tmpfs_refuses_swap};
pub use budget::{Budget, Grant};
pub use env::{env_names, is_env_set, take_env};
pub use folder::PrivateFolder;
pub use heap::{WIPED_BYTES_MAX, WipingHeap};
pub use huge::huge_page_short_bytes;
pub use locked_file::{Cut, IN_FLIGHT_GRACE, LockedFile, Wiped};
pub use map::wipe;
pub use numa::memory_nodes;
pub use pins::can_pin;
pub use private::read_private_file;
pub use process::{
    Hardening, end_by, harden, has_cap_sys_admin, lock_thread_stack, locked_bytes, memlock_limit, memory_ceiling,
    scrub_stack, use_right_to_lock,
};
pub use secret::{LockedBuf, Secret, SecretMemory, reserve_secrets, secret_memory};

/// The page of every machine modelfs runs on; [`Arena::open`] refuses another.
pub const SMALL_PAGE_BYTES: u64 = 4096;
/// A huge page (PMD) on x86_64 and on aarch64 with 4 KiB base pages.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
