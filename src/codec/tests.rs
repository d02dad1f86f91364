use sha2::{Digest, Sha256};

use super::*;

/// The stream given in docs/FORMAT.md, and what it decodes to.
fn vector() -> (Vec<u8>, Vec<u8>) {
    let words = [0x3c00u16, 0xbc01, 0x3f80, 0x0000, 0x3b7f, 0x7f80, 0x3d11, 0xbd22];
    let plain = words.repeat(5).into_iter().flat_map(u16::to_le_bytes).collect();
    let coded = include_str!("../../tests/vectors/codec.hex");
    (plain, hex::decode(coded.split_whitespace().collect::<String>()).expect("hex"))
}

#[test]
fn the_vector_of_the_format_is_written_and_read_byte_for_byte() {
    let (plain, coded) = vector();
    assert_eq!(hex::encode(Sha256::digest(&coded)), "e680581d65840138cd7c60754b49c8fc43be30e3ecff05bb13312f196cb581a3");
    for implementation in Implementation::all_here() {
        let mut written = Vec::new();
        encode_with(implementation, Kind::Bf16, 0, &plain, &mut written);
        assert_eq!(hex::encode(&written), hex::encode(&coded), "{}", implementation.name());
        let mut read = vec![0xaa; plain.len()];
        Decoder::with(implementation, coded.len(), plain.len()).finish(&coded, &mut read).expect("the vector");
        assert_eq!(read, plain, "{}", implementation.name());
    }
}

#[test]
fn quick_roundtrip() {
    for kind in Kind::ALL {
        for len in [0, 1, 2, 3, 4, 5, 63, 64, 65, 66, 127, 128, 1000, 131_071, 131_072, 131_075, 400_003] {
            for skew in 0..kind.width() {
                let mut x = 1u64;
                let plain: Vec<u8> = (0..len)
                    .map(|i| {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        if i % 4 == 3 || (i % 4 == 1 && kind.width() == 2) {
                            0x3c + (x >> 62) as u8
                        } else {
                            (x >> 56) as u8
                        }
                    })
                    .collect();
                let mut coded = Vec::new();
                encode(kind, skew, &plain, &mut coded);
                assert!(coded.len() <= coded_len_max(kind, len));
                let mut read = vec![0xaa; len];
                decode(&coded, &mut read).unwrap();
                assert!(read == plain);
                if len > 100_000 {
                    eprintln!(
                        "{kind:?} {skew} {len} {} est {} {:?}",
                        coded.len(),
                        estimate(kind, skew, &plain),
                        sniff(&plain)
                    );
                }
            }
        }
    }
}
