//! A publisher's note of the objects it is about to inherit, so that no collector takes them meanwhile.
//!
//! Unsigned, and believed only towards keeping: a forged lease can keep garbage alive for a grace period, nothing else.
//! Spec: docs/FORMAT.md b.1.

use super::limits::OBJECTS_MAX;
use super::wire::{array_at, i64_at, is_zero, put, u16_at, u32_at};
use super::{FORMAT_VERSION, Oid};
use crate::error::Result;
use crate::refuse;

const MAGIC: &[u8; 8] = b"MFS1LEAS";
const HEAD_LEN: usize = 32;
const OID_LEN: usize = 32;

/// Bytes of the largest lease.
pub const LEASE_BYTES_MAX: u64 = (HEAD_LEN + OBJECTS_MAX as usize * OID_LEN) as u64;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Unix seconds; a lease older than the collector's grace period counts for nothing.
    pub issued_at: i64,
    pub oids: Vec<Oid>,
}

impl Lease {
    /// # Errors
    /// `LIMIT` for more objects than a manifest may have.
    pub fn encode(&self) -> Result<Vec<u8>> {
        if self.oids.len() > OBJECTS_MAX as usize {
            refuse!(Limit, "lease names {} objects, at most {OBJECTS_MAX} are allowed", self.oids.len());
        }
        let mut out = vec![0u8; HEAD_LEN];
        put(&mut out, 0, MAGIC);
        put(&mut out, 8, &FORMAT_VERSION.to_le_bytes());
        let count = u32::try_from(self.oids.len()).expect("checked against OBJECTS_MAX");
        put(&mut out, 12, &count.to_le_bytes());
        put(&mut out, 16, &self.issued_at.to_le_bytes());
        self.oids.iter().for_each(|oid| out.extend_from_slice(&oid.0));
        Ok(out)
    }

    /// # Errors
    /// `LENGTH` for a length that does not follow from the head, `UNSUPPORTED`, `LIMIT`.
    pub fn parse(bytes: &[u8]) -> Result<Lease> {
        if bytes.len() < HEAD_LEN || &bytes[..8] != MAGIC {
            refuse!(Length, "lease of {} bytes does not start with MFS1LEAS", bytes.len());
        }
        let version = u16_at(bytes, 8);
        if version != FORMAT_VERSION || !is_zero(&bytes[10..12]) || !is_zero(&bytes[24..HEAD_LEN]) {
            refuse!(Unsupported, "lease has format version {version} or a reserved byte set");
        }
        let count = u32_at(bytes, 12);
        if count > OBJECTS_MAX {
            refuse!(Limit, "lease names {count} objects, at most {OBJECTS_MAX} are allowed");
        }
        if bytes.len() != HEAD_LEN + count as usize * OID_LEN {
            refuse!(Length, "lease of {count} objects is {} bytes long", bytes.len());
        }
        let oids = bytes[HEAD_LEN..].chunks_exact(OID_LEN).map(|row| Oid(array_at(row, 0))).collect();
        Ok(Lease { issued_at: i64_at(bytes, 16), oids })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn a_lease_is_read_back_as_written_and_its_shape_is_checked() {
        let lease = Lease { issued_at: -5, oids: vec![Oid([1; 32]), Oid([2; 32])] };
        let good = lease.encode().unwrap();
        assert_eq!(Lease::parse(&good).unwrap(), lease);
        for len in [0, 31, 32, 95] {
            assert_eq!(Lease::parse(&good[..len]).unwrap_err().code(), Code::Length, "{len}");
        }
        for (at, byte, code) in [
            (0, 0, Code::Length),
            (8, 2, Code::Unsupported),
            (10, 1, Code::Unsupported),
            (15, 255, Code::Limit),
            (24, 1, Code::Unsupported),
        ] {
            let mut wrong = good.clone();
            wrong[at] = byte;
            assert_eq!(Lease::parse(&wrong).unwrap_err().code(), code, "{at}");
        }
    }
}
