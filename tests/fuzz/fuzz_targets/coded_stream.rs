//! Any bytes as a coded stream: no panic, nothing read or written outside, one verdict from every implementation, whole
//! or in pieces; what is accepted comes back from the writer.
//!
//! The first four bytes of the input say the plaintext's length and the size of the pieces; the rest is the stream.
#![no_main]

use libfuzzer_sys::fuzz_target;

// The module by itself: it needs nothing of the crate, and the crate's hundreds of dependencies need no instrumentation.
#[path = "../../../src/codec/mod.rs"]
#[allow(dead_code, unused_imports)]
mod codec;

use codec::{Decoder, Implementation, Kind};

fuzz_target!(|input: &[u8]| {
    let Some((&[low, high, top, pieces], coded)) = input.split_first_chunk::<4>() else { return };
    let plain_len = u32::from_le_bytes([low, high, top & 7, 0]) as usize;
    // Exact allocations, so that AddressSanitizer sees the first byte beyond.
    let coded: Box<[u8]> = coded.into();
    let mut oracle = None;
    for implementation in Implementation::all_here().into_iter().rev() {
        let mut out = vec![0; plain_len].into_boxed_slice();
        let verdict = Decoder::with(implementation, coded.len(), plain_len).finish(&coded, &mut out);
        let verdict = verdict.map(|()| out);
        let oracle = oracle.get_or_insert_with(|| verdict.clone());
        assert!(*oracle == verdict, "{} disagrees", implementation.name());
    }
    let oracle = oracle.expect("the portable one runs everywhere");

    let mut decoder = Decoder::new(coded.len(), plain_len);
    let mut out = vec![0; plain_len].into_boxed_slice();
    let piece = usize::from(pieces) * 16 + 1;
    let (mut available, mut used) = (0, 0);
    let verdict = loop {
        available = (available + piece).min(coded.len());
        match decoder.advance(&coded[used..available], &mut out) {
            Ok(more) => used += more,
            Err(err) => break Err(err),
        }
        if available == coded.len() {
            break decoder.finish(&coded[used..], &mut out);
        }
    };
    assert!(verdict == oracle.as_ref().map(|_| ()).map_err(|err| *err), "in pieces it is another verdict");

    if let Ok(plain) = oracle {
        assert!(verdict.is_err() || *plain == *out, "in pieces it is another plaintext");
        let kind = Kind::ALL[usize::from(pieces) % 3];
        let (mut coded, mut again) = (Vec::new(), vec![0; plain.len()]);
        codec::encode(kind, usize::from(pieces) % kind.width(), &plain, &mut coded);
        codec::decode(&coded, &mut again).expect("the writer's own");
        assert!(*again == *plain, "the writer loses something");
    }
});
