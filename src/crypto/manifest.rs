//! Opens and seals the manifest object: clear signed header, encrypted body.
//!
//! In: a manifest whose digest and signature were already verified (`keys::resolve`), and a DEK. Out: the tables and the
//! keys they lead to. Promises: nothing is deciphered before the DEK's and the manifest's commitments hold, nothing
//! parsed before every tag holds; the body's plaintext, which may hold keys, exists in locked memory only.
//! Spec: docs/FORMAT.md a.4. Held by: `vectors`, the tests below.

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::aead::{BodyCipher, TAG_LEN};
use super::dek::{Dek, ModelKeys};
use super::hash::sha256;
use crate::error::Result;
use crate::format::limits::MANIFEST_BLOCK_LOG2;
use crate::format::{MANIFEST_HEADER_LEN, Manifest, ManifestHeader, block_aad};
use crate::mem::{LockedBuf, Secret, reserve_secrets, scrub_stack};
use crate::refuse;

/// Plain bytes per block of a manifest body.
const BODY_BLOCK: usize = 1 << MANIFEST_BLOCK_LOG2;

/// # Errors
/// In this order: the header's own codes, `MAN_LENGTH`, `DEK_COMMIT`, `COMMIT`, `BODY_TAG`, then those of the strict
/// parser.
pub fn open_manifest(bytes: &[u8], dek: Dek) -> Result<(Manifest, ModelKeys)> {
    let (header, stored) = ManifestHeader::parse_object(bytes)?;
    let head = &bytes[..MANIFEST_HEADER_LEN];
    if !dek.opens(&header) {
        refuse!(DekCommit, "the unwrapped key is not the one that version {} was sealed with", header.vid);
    }
    let plain_len = usize::try_from(header.body_plain_len).expect("at most 512 MiB");
    let (ciphertext, tags) = stored.split_at(plain_len);
    let mut body = LockedBuf::copy_of(ciphertext)?;
    let opened = open_body(&dek, &header, head, &mut body, tags);
    scrub_stack();
    opened?;

    let (manifest, inherited) = Manifest::parse_body(header, &body)?;
    let roots = body[inherited].as_chunks::<32>().0;
    reserve_secrets(roots.len())?;
    let roots = roots.iter().map(|root| Secret::from_bytes(&mut Zeroizing::new(*root))).collect();
    Ok((manifest, ModelKeys::new(dek, roots)))
}

#[inline(never)]
fn open_body(dek: &Dek, header: &ManifestHeader, head: &[u8], body: &mut [u8], tags: &[u8]) -> Result<()> {
    let derived = dek.manifest_keys(header);
    if !bool::from(derived.commit.ct_eq(&header.manifest_commit)) {
        refuse!(Commit, "manifest of version {} does not have the commitment of its key", header.vid);
    }
    let cipher = BodyCipher::new(header.suite, &derived);
    let head_hash = sha256(&[head]);
    let last = body.len().div_ceil(BODY_BLOCK) - 1;
    for (number, (block, tag)) in body.chunks_mut(BODY_BLOCK).zip(tags.as_chunks::<TAG_LEN>().0).enumerate() {
        let aad = body_aad(number, block.len(), number == last, &head_hash);
        if cipher.open(number as u64, &aad, block, tag).is_err() {
            refuse!(BodyTag, "block {number} of the manifest of version {} failed authentication", header.vid);
        }
    }
    Ok(())
}

/// The whole manifest object. Fills in the commitments of the manifest's header; its `msalt` must be fresh, its `vid` the
/// one `dek` was drawn for, and `inherited[i]` the object root of inherited entry `i`.
///
/// # Errors
/// What locking the body may answer.
///
/// # Panics
/// If there is not exactly one root per inherited object.
pub fn seal_manifest(manifest: &mut Manifest, dek: &Dek, inherited: &[Secret<32>]) -> Result<Vec<u8>> {
    assert!(manifest.n_inherited() as usize == inherited.len(), "{} {}", manifest.n_inherited(), inherited.len());
    // Sealed where it is locked: the vector that goes out never holds plaintext.
    let mut body = LockedBuf::new(manifest.body_len())?;
    manifest.encode_body(&mut body, |index, row| row.copy_from_slice(inherited[index as usize].expose()));
    let mut header = *manifest.header();
    header.body_plain_len = body.len() as u64;
    header.dek_commit = dek.commitment(header.suite, header.model_id, header.vid);
    let derived = dek.manifest_keys(&header);
    header.manifest_commit = derived.commit;
    *manifest.header_mut() = header;

    let head = header.encode();
    let head_hash = sha256(&[&head]);
    let cipher = BodyCipher::new(header.suite, &derived);
    let blocks = body.len().div_ceil(BODY_BLOCK);
    let mut tags = Vec::with_capacity(TAG_LEN * blocks);
    for (number, block) in body.chunks_mut(BODY_BLOCK).enumerate() {
        let aad = body_aad(number, block.len(), number + 1 == blocks, &head_hash);
        tags.extend_from_slice(&cipher.seal(number as u64, &aad, block));
    }
    drop((cipher, derived));
    scrub_stack();
    Ok([&head[..], &body, &tags].concat())
}

/// The AAD of a data block, then the hash of the header: the body opens under this header only.
fn body_aad(number: usize, plain_len: usize, last: bool, head_hash: &[u8; 32]) -> [u8; 48] {
    let mut aad = [0; 48];
    let plain_len = u32::try_from(plain_len).expect("a block is at most 64 KiB");
    aad[..16].copy_from_slice(&block_aad(number as u64, plain_len, last));
    aad[16..].copy_from_slice(head_hash);
    aad
}

#[cfg(test)]
mod tests {
    use super::super::testing::Sealed;
    use super::*;
    use crate::error::Code;
    use crate::format::{
        Extent, HashAlg, ManifestBuilder, ModelId, NewFile, NewHeader, NewObject, ObjectLayout, Oid, Suite, Vid,
    };

    fn dek() -> Dek {
        Dek::from_secret(Secret::from_bytes(&mut [0x42; 32]))
    }

    #[test]
    fn every_bent_byte_of_a_manifest_is_refused() {
        for suite in [Suite::Aes256Gcm, Suite::ChaCha20Poly1305] {
            let sealed = Sealed::new(suite, HashAlg::Blake3, ObjectLayout::new(10, 16, 20).unwrap(), Oid([1; 32]));
            let bytes = sealed.manifest_bytes;
            for at in 0..bytes.len() {
                let mut bent = bytes.clone();
                bent[at] ^= 1;
                let code = open_manifest(&bent, dek()).unwrap_err().code();
                let want: &[Code] = match at {
                    // Model, version, the commitment itself: another promise.
                    16..64 | 128..160 => &[Code::DekCommit],
                    // Salt and version number: another key.
                    65..72 | 96..128 | 160..192 => &[Code::Commit],
                    // Fields with rules of their own.
                    0..16 | 80..96 | 224..256 => {
                        &[Code::ManFormat, Code::Unsupported, Code::ManLength, Code::DekCommit, Code::BodyTag]
                    }
                    64 => &[Code::ManFormat, Code::Commit],
                    // Date, previous version, ciphertext and tags: bound by every block's associated data.
                    _ => &[Code::BodyTag],
                };
                assert!(want.contains(&code), "{suite:?} byte {at}: {code}");
            }
        }
    }

    /// THREAT_MODEL (f) row 49, first half; row 55.
    #[test]
    fn a_cut_or_longer_manifest_and_another_suite_are_refused() {
        let sealed = Sealed::small(Suite::Aes256Gcm);
        let bytes = sealed.manifest_bytes;
        for other in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat()] {
            assert_eq!(open_manifest(other, dek()).unwrap_err().code(), Code::ManLength);
        }
        let mut other = bytes.clone();
        other[10] = 2;
        assert_eq!(open_manifest(&other, dek()).unwrap_err().code(), Code::DekCommit);
    }

    /// Rotation L2: a new version under a new DEK hands on the old object by its root; no bulk byte changes.
    #[test]
    fn an_inherited_object_opens_under_a_later_versions_key() {
        let old = Sealed::small(Suite::ChaCha20Poly1305);
        let entry = old.manifest.objects()[0];
        let root = old.keys.object_root(&entry);
        let mut builder = ManifestBuilder::new();
        let object = builder.add_object(NewObject {
            oid: entry.oid,
            layout: entry.layout,
            suite: entry.suite,
            inherited: true,
            origin_vid: entry.origin_vid,
            commit: entry.commit,
            hashes: old.manifest.object_hashes(0).to_vec(),
            coded: None,
        });
        let len = entry.layout.plain_len();
        builder.add_file(NewFile {
            path: "renamed.bin".into(),
            mode: 0o444,
            size: len,
            sha256: sha256(&[&old.plain]),
            mtime: 0,
            extents: vec![Extent { object, object_offset: 0, len }],
        });
        let head = NewHeader {
            suite: Suite::Aes256Gcm,
            hash_alg: HashAlg::Blake3,
            model_id: ModelId::of_name("test/model"),
            vid: Vid([10; 16]),
            seq: 2,
            created_at: 0,
            msalt: [4; 32],
            previous: None,
        };
        let mut manifest = builder.finish(head).unwrap();
        let new_dek = Dek::random();
        let bytes = seal_manifest(&mut manifest, &new_dek, &[root]).unwrap();
        let (manifest, keys) = open_manifest(&bytes, new_dek).unwrap();
        let mut slot = old.slot(1);
        super::super::open_chunk(&keys, &manifest, 0, &old.chunk(1), super::super::Verify::Strict, &mut slot, &mut [])
            .unwrap();
        assert_eq!(slot, old.plain_of(1));
        assert_eq!(open_manifest(&bytes, dek()).unwrap_err().code(), Code::DekCommit);
    }

    /// More than one block of body, so that block numbers and the last-block flag are met.
    #[test]
    fn a_body_of_several_blocks_opens_and_its_blocks_do_not_swap() {
        for suite in [Suite::Aes256Gcm, Suite::ChaCha20Poly1305] {
            let mut builder = ManifestBuilder::new();
            for i in 0..2_000 {
                let path = format!("folder/{i:05}");
                let sha256 = sha256(&[]);
                builder.add_file(NewFile { path, mode: 0o444, size: 0, sha256, mtime: i, extents: Vec::new() });
            }
            let head = NewHeader {
                suite,
                hash_alg: HashAlg::Blake3,
                model_id: ModelId([1; 32]),
                vid: Vid([2; 16]),
                seq: 1,
                created_at: 0,
                msalt: [3; 32],
                previous: None,
            };
            let mut manifest = builder.finish(head).unwrap();
            let bytes = seal_manifest(&mut manifest, &dek(), &[]).unwrap();
            assert!(bytes.len() > 2 * BODY_BLOCK);
            assert_eq!(open_manifest(&bytes, dek()).unwrap().0, manifest);

            let mut swapped = bytes.clone();
            let body = &mut swapped[MANIFEST_HEADER_LEN..];
            let (first, second) = body.split_at_mut(BODY_BLOCK);
            first.swap_with_slice(&mut second[..BODY_BLOCK]);
            assert_eq!(open_manifest(&swapped, dek()).unwrap_err().code(), Code::BodyTag);
        }
    }
}
