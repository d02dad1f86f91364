//! The heap of the program: what it gets back is overwritten.
//!
//! Secrets of ours lie in [`Secret`](super::Secret) and [`LockedBuf`](super::LockedBuf). On their way through libraries
//! (an HTTP header, a JSON string, a TLS record) they also pass through ordinary heap blocks that no one wipes. This
//! allocator does, for blocks up to [`WIPED_BYTES_MAX`], whoever frees them.
//! Promises: no freed block of that size keeps its bytes. Not promised: blocks that are in use now, and the stack.
//! Held by: the tests below, tests/secrets.rs.

use std::alloc::{GlobalAlloc, Layout, System};

use super::map::wipe_raw;

/// The largest block that is overwritten when freed. Strings, headers, JSON and TLS records are far below; what is above
/// is ciphertext on its way, where overwriting would cost as much as a copy.
pub const WIPED_BYTES_MAX: usize = 64 << 10;

/// The system's allocator, with freed blocks overwritten.
#[derive(Debug, Clone, Copy, Default)]
pub struct WipingHeap;

// SAFETY: every block comes from `System` and goes back to it with the layout it came with; before that it is written
// within its own size only, by the one caller that still owns it.
unsafe impl GlobalAlloc for WipingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise on `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if layout.size() <= WIPED_BYTES_MAX {
            // SAFETY: the caller gives the block up: it is `layout.size()` bytes long and nobody else uses it.
            unsafe { wipe_raw(block, layout.size()) };
        }
        // SAFETY: `block` came from `System` with this layout.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if layout.size() > WIPED_BYTES_MAX {
            // SAFETY: the caller's promise is passed on.
            return unsafe { System.realloc(block, layout, new_size) };
        }
        // The system's own would leave the old place as it is when it moves.
        // SAFETY: the caller promises that `new_size`, rounded up to the alignment, does not overflow.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: a layout of non-zero size, as the caller promises.
        let moved = unsafe { System.alloc(new_layout) };
        if !moved.is_null() {
            // SAFETY: two different blocks, each at least as long as what is copied; then the old one is given up.
            unsafe {
                std::ptr::copy_nonoverlapping(block, moved, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes behind a block's first two words, in which the system's allocator keeps its own lists.
    fn freed(bytes: usize, free: impl FnOnce(*mut u8, Layout)) -> Vec<u8> {
        const LISTS: usize = 32;
        let layout = Layout::from_size_align(bytes, 16).expect("a layout");
        // Before the block is freed: it would be the very next one to be handed out.
        let mut seen = Vec::with_capacity(bytes);
        // SAFETY: the block is ours, written within its size; afterwards it is only looked at, which a freed block of
        // this size, below the size that is unmapped, allows. Nothing allocates in between.
        unsafe {
            // Opaque to the compiler, which else leaves out a write to what is freed at once: the very thing that is tested.
            let block = std::hint::black_box(System.alloc(layout));
            std::ptr::write_bytes(block, 0xa5, bytes);
            let block = std::hint::black_box(block);
            free(block, layout);
            let block = std::hint::black_box(block);
            seen.extend((LISTS..bytes).map(|at| block.add(at).read_volatile()));
        }
        seen
    }

    /// The detector first: the system's own allocator keeps the bytes.
    #[test]
    fn a_freed_block_keeps_none_of_its_bytes() {
        let kept = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == 0xa5).count();
        // SAFETY: each frees exactly the block it is given, once.
        let plain = || freed(8000, |block, layout| unsafe { System.dealloc(block, layout) });
        // Now and then a thread that shares our part of the heap is handed the block before it was looked at.
        assert!((0..100).any(|_| kept(&plain()) > 7000), "the detector finds what is left behind");
        // SAFETY: as above.
        let wiped = freed(8000, |block, layout| unsafe { WipingHeap.dealloc(block, layout) });
        assert!(kept(&wiped) < 100, "{} bytes left", kept(&wiped));
        let moved = freed(8000, |block, layout| {
            // SAFETY: the block is given up to `realloc`, whose answer is freed.
            unsafe {
                let larger = WipingHeap.realloc(block, layout, 20_000);
                assert_eq!((*larger, *larger.add(7999)), (0xa5, 0xa5));
                WipingHeap.dealloc(larger, Layout::from_size_align(20_000, 16).expect("a layout"));
            }
        });
        assert!(kept(&moved) < 100, "{} bytes left", kept(&moved));
    }
}
