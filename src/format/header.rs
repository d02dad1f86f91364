//! The clear header of a data object: 128 bytes, the first 64 of them input to its key derivation.
//!
//! A reader recomputes it from the manifest and never trusts a fetched one; `verify` and recovery tools compare.
//! Spec: docs/FORMAT.md a.3.

use super::wire::{array_at, is_zero, put, u16_at};
use super::{FORMAT_VERSION, OBJECT_HEADER_LEN, Oid, Suite, Vid, layout};
use crate::error::Result;
use crate::refuse;

const MAGIC: &[u8; 8] = b"MFS1DATA";
const FLAG_CODED: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectHeader {
    pub suite: Suite,
    pub block_log2: u8,
    pub chunk_log2: u8,
    pub oid: Oid,
    /// The version that sealed the object; a later version may inherit it.
    pub origin_vid: Vid,
    /// Some chunks hold a coded stream in place of their plain bytes; the manifest says which.
    pub coded: bool,
    pub commit: [u8; 32],
}

impl ObjectHeader {
    pub fn encode(&self) -> [u8; OBJECT_HEADER_LEN] {
        let mut out = [0u8; OBJECT_HEADER_LEN];
        put(&mut out, 0, MAGIC);
        put(&mut out, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut out, 10, &self.suite.number().to_le_bytes());
        put(&mut out, 12, &[self.block_log2, self.chunk_log2]);
        put(&mut out, 14, &flags(self.coded)[..2]);
        put(&mut out, 16, &self.oid.0);
        put(&mut out, 48, &self.origin_vid.0);
        put(&mut out, 64, &self.commit);
        out
    }

    /// The part that goes into the key derivation; `commit` has no say in it.
    pub fn kdf_input(&self) -> [u8; 64] {
        array_at(&self.encode(), 0)
    }

    /// # Errors
    /// `HEADER` for another length or magic, `UNSUPPORTED` for what a later format may mean, `OBJECT` for impossible
    /// sizes.
    pub fn parse(bytes: &[u8]) -> Result<ObjectHeader> {
        if bytes.len() != OBJECT_HEADER_LEN {
            refuse!(Header, "object header is {} bytes long, not {OBJECT_HEADER_LEN}", bytes.len());
        }
        if &bytes[..8] != MAGIC {
            refuse!(Header, "object does not start with MFS1DATA");
        }
        let version = u16_at(bytes, 8);
        if version != FORMAT_VERSION {
            refuse!(Unsupported, "object has format version {version}, this reader knows {FORMAT_VERSION}");
        }
        let coded = is_coded(u32::from(u16_at(bytes, 14)))?;
        let suite = Suite::from_u16(u16_at(bytes, 10))?;
        if !is_zero(&bytes[96..]) {
            refuse!(Unsupported, "object header has a reserved byte set");
        }
        let (block_log2, chunk_log2) = (bytes[12], bytes[13]);
        layout::check_sizes(block_log2, chunk_log2)?;
        Ok(ObjectHeader {
            suite,
            block_log2,
            chunk_log2,
            oid: Oid(array_at(bytes, 16)),
            origin_vid: Vid(array_at(bytes, 48)),
            coded,
            commit: array_at(bytes, 64),
        })
    }
}

/// Object flags, as header and manifest carry them.
pub(super) fn flags(coded: bool) -> [u8; 4] {
    if coded { FLAG_CODED.to_le_bytes() } else { [0; 4] }
}

/// Whether flags say that the object is coded; any other flag is unknown to this reader.
pub(super) fn is_coded(flags: u32) -> Result<bool> {
    if flags & !FLAG_CODED != 0 {
        refuse!(Unsupported, "object has unknown flags {flags:#x}");
    }
    Ok(flags & FLAG_CODED != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn header() -> ObjectHeader {
        ObjectHeader {
            suite: Suite::Aes256Gcm,
            block_log2: 16,
            chunk_log2: 23,
            oid: Oid([7; 32]),
            origin_vid: Vid([8; 16]),
            coded: false,
            commit: [9; 32],
        }
    }

    #[test]
    fn a_header_is_read_back_as_written() {
        for coded in [false, true] {
            let header = ObjectHeader { coded, ..header() };
            let bytes = header.encode();
            assert_eq!(bytes[14..16], [u8::from(coded), 0]);
            assert_eq!(ObjectHeader::parse(&bytes).unwrap(), header);
            assert_eq!(&header.kdf_input()[..], &bytes[..64]);
        }
    }

    /// THREAT_MODEL (f) rows 12, 53, 54.
    #[test]
    fn every_field_of_a_header_is_checked() {
        let cases: &[(usize, u8, Code)] = &[
            (0, b'm', Code::Header),
            (8, 2, Code::Unsupported),
            (9, 1, Code::Unsupported),
            (10, 0, Code::Unsupported),
            (10, 3, Code::Unsupported),
            (11, 1, Code::Unsupported),
            (12, 11, Code::Object),
            (12, 63, Code::Object),
            (13, 19, Code::Object),
            (13, 40, Code::Object),
            (14, 2, Code::Unsupported),
            (14, 3, Code::Unsupported),
            (15, 1, Code::Unsupported),
            (96, 1, Code::Unsupported),
            (127, 1, Code::Unsupported),
        ];
        for &(at, byte, code) in cases {
            let mut bytes = header().encode();
            bytes[at] = byte;
            assert_eq!(ObjectHeader::parse(&bytes).unwrap_err().code(), code, "byte {at} = {byte}");
        }
        assert_eq!(ObjectHeader::parse(&header().encode()[..127]).unwrap_err().code(), Code::Header);
        assert_eq!(ObjectHeader::parse(&[]).unwrap_err().code(), Code::Header);
    }
}
