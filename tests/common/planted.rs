//! Files as the writers of each format make them, small, with numbers in them that mean nothing.
#![allow(dead_code)] // each test binary uses its own part

/// Bytes without structure, the same every time.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    out.truncate(len);
    out
}

pub fn safetensors() -> Vec<u8> {
    let json = r#"{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[64,64],"data_offsets":[0,8192]}}"#;
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &noise(8192)].concat()
}

pub fn gguf() -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(1_u64.to_le_bytes());
    out.extend(1_u64.to_le_bytes());
    out.extend(text("general.architecture"));
    out.extend(8_u32.to_le_bytes());
    out.extend(text("llama"));
    out.extend(text("token_embd.weight"));
    out.extend(1_u32.to_le_bytes());
    out.extend(1024_u64.to_le_bytes());
    out.extend(0_u32.to_le_bytes());
    out.extend(0_u64.to_le_bytes());
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(noise(4096));
    out
}

pub fn ggjt() -> Vec<u8> {
    let numbers = [3_u32, 32_000, 4096, 256, 32, 32, 128, 2];
    [b"tjgg".to_vec(), numbers.iter().flat_map(|n| n.to_le_bytes()).collect(), noise(4096)].concat()
}

/// One local header of a zip archive and its stored bytes.
fn zip_entry(name: &str, body: &[u8], extra: &[u8]) -> Vec<u8> {
    let mut out = b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0".to_vec();
    out.extend(0_u32.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend((name.len() as u16).to_le_bytes());
    out.extend((extra.len() as u16).to_le_bytes());
    out.extend(name.as_bytes());
    out.extend(extra);
    out.extend(body);
    out
}

/// A zip archive: entries, and as much of a directory as ends the walk.
pub fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out: Vec<u8> = entries.iter().flat_map(|(name, body)| zip_entry(name, body, b"")).collect();
    out.extend(b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    out
}

pub fn pytorch() -> Vec<u8> {
    let pickle = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\0.";
    let mut out = zip_entry("archive/data.pkl", pickle, b"FB\x04\0ZZZZ");
    out.extend(zip_entry("archive/byteorder", b"little", b""));
    out.extend(zip_entry("archive/data/0", &noise(4096), b""));
    out.extend(zip_entry("archive/version", b"3\n", b""));
    out.extend(b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    out
}

pub fn pytorch_legacy() -> Vec<u8> {
    let mut out = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.".to_vec();
    out.extend(noise(4096));
    out
}

pub fn pickle() -> Vec<u8> {
    let mut out =
        b"\x80\x04\x95\0\x10\0\0\0\0\0\0\x8c\x15numpy.core.multiarray\x94\x8c\x0c_reconstruct\x94\x93\x94C".to_vec();
    out.push(200);
    out.extend(noise(200));
    out.extend(b"B");
    out.extend(100_000_u32.to_le_bytes());
    out.extend(noise(100_000));
    out.push(b'.');
    out
}

/// A field of a protocol buffer that is bytes, and one that is a number.
fn bytes(number: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut len = body.len();
    while len >= 0x80 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend_from_slice(body);
    out
}
fn number(number: u8, value: u8) -> Vec<u8> {
    vec![number << 3, value]
}

pub fn onnx() -> Vec<u8> {
    let node = [bytes(1, b"x"), bytes(1, b"w"), bytes(2, b"y"), bytes(4, b"MatMul")].concat();
    let tensor = [number(1, 64), number(2, 1), bytes(8, b"w"), bytes(9, &noise(4096))].concat();
    let graph = [bytes(1, &node), bytes(2, b"g"), bytes(5, &tensor)].concat();
    [number(1, 8), bytes(2, b"pytorch"), bytes(7, &graph), bytes(8, &number(2, 17))].concat()
}

pub fn tf_graph() -> Vec<u8> {
    let node = |name: &str, operator: &str, value: &[u8]| {
        bytes(1, &[bytes(1, name.as_bytes()), bytes(2, operator.as_bytes()), bytes(5, value)].concat())
    };
    [node("x", "Placeholder", &[0x0a, 0]), node("dense/kernel", "Const", &noise(4096)), node("y", "MatMul", &[0x0a, 0])]
        .concat()
}

pub fn tf_saved_model() -> Vec<u8> {
    let info = [bytes(2, &bytes(1, &bytes(1, b"AddV2"))), bytes(4, b"serve"), bytes(5, b"2.16.1")].concat();
    [number(1, 1), bytes(2, &[bytes(1, &info), bytes(2, &tf_graph())].concat())].concat()
}

pub fn tf_index() -> Vec<u8> {
    [b"\0\0\x06\x08\x01\x1a\x02\x08\x01\0\x0c\x14dense/kernel".to_vec(), noise(2000)].concat()
}

/// An engine of one of the two marks that versions of TensorRT write.
pub fn tensorrt(mark: &[u8; 4]) -> Vec<u8> {
    [mark.to_vec(), vec![0; 60], noise(4096)].concat()
}

pub fn hdf5() -> Vec<u8> {
    // A superblock of version 2, and the header of a root whose one attribute is Keras's.
    let attribute = [&[3, 0, 12, 0, 8, 0, 4, 0, 0][..], b"layer_names\0", &[0; 12]].concat();
    let records = [&[0x0c, attribute.len() as u8, 0, 0][..], &attribute].concat();
    let header = [b"OHDR\x02\0", &[records.len() as u8][..], &records, &[0; 4]].concat();
    let end = 48 + header.len() as u64 + 4096;
    let addresses: Vec<u8> = [0, u64::MAX, end, 48].iter().flat_map(|n| n.to_le_bytes()).collect();
    [b"\x89HDF\r\n\x1a\n\x02\x08\x08\0".to_vec(), addresses, vec![0; 4], header, noise(4096)].concat()
}

pub fn tflite() -> Vec<u8> {
    let mut model = vec![0; 64];
    model[..4].copy_from_slice(&28_u32.to_le_bytes());
    model[4..8].copy_from_slice(b"TFL3");
    model[12..14].copy_from_slice(&12_u16.to_le_bytes());
    model[14..16].copy_from_slice(&20_u16.to_le_bytes());
    model[16..18].copy_from_slice(&4_u16.to_le_bytes());
    model[28..32].copy_from_slice(&16_i32.to_le_bytes());
    model[32..36].copy_from_slice(&3_u32.to_le_bytes());
    model.extend(noise(4096));
    model
}

pub fn npy(len: usize) -> Vec<u8> {
    let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (512, 512), }\n";
    [&b"\x93NUMPY\x01\0"[..], &(text.len() as u16).to_le_bytes(), text.as_bytes(), &noise(len)].concat()
}

pub fn npz() -> Vec<u8> {
    zip(&[("a.npy", &npy(1 << 20)), ("b.npy", &npy(100))])
}

pub fn keras() -> Vec<u8> {
    zip(&[("metadata.json", b"{}"), ("config.json", b"{}"), ("model.weights.h5", &hdf5())])
}

/// Every format by a path that says nothing, what it is told as, and how sure.
pub fn all() -> Vec<(&'static str, &'static str, &'static str, Vec<u8>)> {
    vec![
        ("one/a", "safetensors", "certain", safetensors()),
        ("one/b", "gguf", "certain", gguf()),
        ("one/c", "ggml", "certain", ggjt()),
        ("one/d", "pytorch", "certain", pytorch()),
        ("one/e", "pytorch", "certain", pytorch_legacy()),
        ("one/f", "pickle", "certain", pickle()),
        ("one/g", "onnx", "certain", onnx()),
        ("one/h", "tf-saved-model", "certain", tf_saved_model()),
        ("one/i", "tf-graph", "certain", tf_graph()),
        ("one/j", "tf-checkpoint", "certain", tf_index()),
        ("one/k", "tensorrt", "certain", tensorrt(b"ptrt")),
        ("one/l", "hdf5", "certain", hdf5()),
        ("one/m", "tflite", "certain", tflite()),
        ("one/n", "numpy", "likely", npy(1 << 20)),
        ("one/o", "numpy", "likely", npz()),
        ("one/p", "keras", "certain", keras()),
        ("one/q", "tensorrt", "certain", tensorrt(b"ftrt")),
        ("two/variables.data-00000-of-00001", "tf-checkpoint", "likely", noise(1 << 20)),
        ("two/model.ckpt", "named", "likely", noise(1 << 20)),
        ("three/weights.bin", "named", "likely", noise(1 << 20)),
    ]
}
