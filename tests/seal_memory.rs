//! Hypothesis: a seal takes memory for its chunks in flight, whatever the size of the model.
//!
//! Alone in its binary: the high-water mark is the process's.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use modelfs::crypto::{Dek, SigningKey, unwrap_dek, wrap_dek};
use modelfs::error::Result;
use modelfs::format::{ManifestHeader, Slot, SlotParams, Slots};
use modelfs::mem::Secret;
use modelfs::seal::{SealOptions, SealSummary, SlotKeys, SlotTarget, seal};
use modelfs::store::local::LocalStore;

struct RawKey;

fn context(target: &SlotTarget) -> Vec<u8> {
    let params = SlotParams::Raw { salt: [7; 32] };
    Slot::wrap_context("test", &params, target.model_id, target.vid, &target.dek_commit)
}

impl SlotKeys for RawKey {
    fn wrap(&self, dek: &Dek, target: &SlotTarget) -> Result<Vec<Slot>> {
        let kek = Secret::from_bytes(&mut [1; 32]);
        let body = wrap_dek(&kek, &context(target), dek).to_vec();
        Ok(vec![Slot { label: "test".into(), params: SlotParams::Raw { salt: [7; 32] }, body }])
    }

    fn unlock(&self, slots: &Slots, header: &ManifestHeader) -> Result<Dek> {
        let slot = &slots.slots[0];
        let context = Slot::wrap_context("test", &slot.params, header.model_id, header.vid, &header.dek_commit);
        unwrap_dek(&Secret::from_bytes(&mut [1; 32]), &context, &slot.body)
    }
}

/// Seals one file of so many zeros, with the default sizes.
fn seal_file(root: &Path, bytes: u64) -> SealSummary {
    let source = tempfile::tempdir_in(root).unwrap();
    File::create(source.path().join("model.safetensors")).unwrap().set_len(bytes).unwrap();
    let store = tempfile::tempdir_in(root).unwrap();
    let local = LocalStore::open(&store.path().join("store")).unwrap();
    let signing = Arc::new(SigningKey::from_seed(Secret::from_bytes(&mut [1; 32])));
    let mut options = SealOptions::new(Arc::new(RawKey), signing);
    options.threads = 2;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(seal(source.path(), Arc::new(local), "big", options)).unwrap()
}

fn high_water_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() << 10
}

#[test]
fn a_large_model_takes_no_more_memory_than_its_chunks_in_flight() {
    let root = tempfile::tempdir().unwrap();
    let before = high_water_bytes();
    let summary = seal_file(root.path(), 768 << 20);
    let most = high_water_bytes();
    let rate = summary.bytes as f64 / summary.seconds / 1e6;
    println!("{} MiB before, {} MiB at most, {rate:.0} MB/s", before >> 20, most >> 20);
    // Two threads: eight chunk buffers of 8 MiB in flight, two more while the sample is read back. What is above is code,
    // stacks and the allocator's slack.
    assert!(most - before < (8 + 2 + 6) * (8 << 20), "{before} {most}");
}
