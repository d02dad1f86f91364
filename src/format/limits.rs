//! Every bound of the format, in one place. A parser checks them before it allocates. docs/FORMAT.md a.4.

/// Plain bytes of one data object, at most.
pub const OBJECT_PLAIN_BYTES_MAX: u64 = 1 << 40;
/// Plain bytes of one file, at most.
pub const FILE_BYTES_MAX: u64 = 1 << 44;
pub const FILES_MAX: u32 = 1_000_000;
pub const OBJECTS_MAX: u32 = 1_000_000;
pub const EXTENTS_MAX: u32 = 4_000_000;
/// 2^21 chunk hashes: 16 TiB at 8 MiB chunks.
pub const HASHES_MAX: u64 = 1 << 21;
pub const STRINGS_BYTES_MAX: u32 = 128 << 20;
pub const ANNOTATIONS_BYTES_MAX: u32 = 1 << 20;
pub const MANIFEST_BODY_BYTES_MIN: u64 = 64;
pub const MANIFEST_BODY_BYTES_MAX: u64 = 512 << 20;
/// The manifest body is always sealed in 64 KiB blocks.
pub const MANIFEST_BLOCK_LOG2: u8 = 16;
/// The whole manifest object: header, the largest body, its tags.
pub const MANIFEST_BYTES_MAX: u64 =
    super::MANIFEST_HEADER_LEN as u64 + MANIFEST_BODY_BYTES_MAX + 16 * (MANIFEST_BODY_BYTES_MAX >> MANIFEST_BLOCK_LOG2);
/// The smallest manifest object: header, a body of no files, one tag.
pub const MANIFEST_BYTES_MIN: u64 = super::MANIFEST_HEADER_LEN as u64 + MANIFEST_BODY_BYTES_MIN + 16;

pub const BLOCK_LOG2_MIN: u8 = 12;
pub const BLOCK_LOG2_MAX: u8 = 20;
/// 64 KiB: a tag costs 0.024 %, and one page fault opens 16 pages.
pub const BLOCK_LOG2_DEFAULT: u8 = 16;
pub const CHUNK_LOG2_MIN: u8 = 20;
pub const CHUNK_LOG2_MAX: u8 = 26;
/// 8 MiB: what one range request fetches.
pub const CHUNK_LOG2_DEFAULT: u8 = 23;
/// Every extent starts on a multiple of this in its object, and all but a file's last are a multiple of it long.
pub const EXTENT_ALIGN: u64 = 4096;

pub const PATH_BYTES_MAX: usize = 1024;
pub const COMPONENT_BYTES_MAX: usize = 255;
pub const PATH_DEPTH_MAX: usize = 32;
pub const MODEL_NAME_BYTES_MAX: usize = 512;
pub const CHANNEL_BYTES_MAX: usize = 64;

pub const SLOTS_BYTES_MAX: usize = 64 << 10;
pub const SLOTS_MAX: usize = 16;
pub const SLOT_LABEL_BYTES_MAX: usize = 64;
pub const SLOT_PARAMS_BYTES_MAX: usize = 256;
pub const SLOT_BODY_BYTES_MAX: usize = 1024;
/// A wrapped DEK: 32 bytes of commitment, 32 of ciphertext, 16 of tag.
pub const SLOT_WRAP_LEN: usize = 80;
pub const SLOT_TRANSIT_BYTES_MAX: usize = 512;
pub const SCRYPT_LOG2_N: std::ops::RangeInclusive<u8> = 15..=20;
pub const ARGON2_M_KIB: std::ops::RangeInclusive<u32> = 19_456..=(1 << 21);
pub const ARGON2_T: std::ops::RangeInclusive<u32> = 1..=10;
pub const ARGON2_P: std::ops::RangeInclusive<u32> = 1..=16;
pub const PBKDF2_ITERATIONS: std::ops::RangeInclusive<u32> = 100_000..=10_000_000;

pub const REF_SIGNATURES_MAX: usize = 4;
pub const REF_BYTES_MAX: usize = super::REF_HEAD_LEN + REF_SIGNATURES_MAX * super::REF_SIGNATURE_LEN;
