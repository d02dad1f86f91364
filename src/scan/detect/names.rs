//! Names under which weights are kept. A name alone never makes a finding: size and binary content are asked for as well.

use super::super::Format;

pub(super) struct Named {
    pub format: Format,
    pub why: String,
    pub beside_config: bool,
}

/// Endings that are used for weights and hardly for anything else.
const ENDINGS: &[(&str, Format)] = &[
    (".safetensors", Format::Safetensors),
    (".gguf", Format::Gguf),
    (".ggml", Format::Ggml),
    (".pt", Format::Pytorch),
    (".pth", Format::Pytorch),
    (".pt2", Format::Pytorch),
    (".ckpt", Format::Named),
    (".onnx", Format::Onnx),
    (".onnx_data", Format::Onnx),
    (".onnx.data", Format::Onnx),
    (".ort", Format::Onnx),
    (".engine", Format::Tensorrt),
    (".trt", Format::Tensorrt),
    (".plan", Format::Tensorrt),
    (".h5", Format::Hdf5),
    (".hdf5", Format::Hdf5),
    (".keras", Format::Keras),
    (".tflite", Format::Tflite),
    (".caffemodel", Format::Named),
    (".mlmodel", Format::Named),
    (".params", Format::Named),
    (".pdparams", Format::Named),
    (".pdiparams", Format::Named),
    (".pdopt", Format::Named),
    (".nemo", Format::Named),
    (".joblib", Format::Pickle),
    (".weights", Format::Named),
    (".msgpack", Format::Named),
    (".mnn", Format::Named),
    (".rknn", Format::Named),
    (".hef", Format::Named),
    (".ubj", Format::Named),
    (".cbm", Format::Named),
];

/// Endings that others use as well: the beginning of the name has to be a model's.
const STEMS_OF_BIN: &[&str] = &[
    "pytorch_model",
    "diffusion_pytorch_model",
    "adapter_model",
    "model.",
    "model-",
    "model_",
    "consolidated",
    "ggml-",
    "open_clip_pytorch_model",
    "optimizer",
    "training_args",
    "rust_model",
];

pub(super) fn look(path: &[u8]) -> Option<Named> {
    let path = String::from_utf8_lossy(path).to_lowercase();
    let name = path.rsplit('/').next().unwrap_or(&path);
    if let Some((ending, format)) =
        ENDINGS.iter().find(|(ending, _)| name.ends_with(ending) && name.len() > ending.len())
    {
        return Some(Named { format: *format, why: format!("a name that ends in {ending}"), beside_config: false });
    }
    if is_shard(name) {
        let why = "a name that ends like a TensorFlow checkpoint's".to_owned();
        return Some(Named { format: Format::TfCheckpoint, why, beside_config: false });
    }
    // Apple's package: its weights are one file in a folder of their own.
    if name == "weight.bin" && path.contains(".mlpackage/") {
        return Some(Named {
            format: Format::Named,
            why: "the weights of a Core ML package".into(),
            beside_config: false,
        });
    }
    let is_bin = name.ends_with(".bin") || name.ends_with(".ot");
    if is_bin && STEMS_OF_BIN.iter().any(|stem| name.starts_with(stem)) {
        return Some(Named { format: Format::Named, why: format!("the name {name}"), beside_config: false });
    }
    if is_bin || name.ends_with(".npy") {
        let why = "a model's configuration in the same folder".to_owned();
        return Some(Named { format: Format::Named, why, beside_config: true });
    }
    None
}

/// `NAME.data-00000-of-00002`.
fn is_shard(name: &str) -> bool {
    let Some((_, numbers)) = name.rsplit_once(".data-") else { return false };
    let five = |digits: &str| digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
    numbers.split_once("-of-").is_some_and(|(part, all)| five(part) && five(all))
}

/// Whether a file of this name says that its folder is a model's.
pub(in super::super) fn is_model_config(name: &[u8]) -> bool {
    let names: [&[u8]; 7] = [
        b"config.json",
        b"tokenizer.json",
        b"tokenizer_config.json",
        b"adapter_config.json",
        b"generation_config.json",
        b"model_index.json",
        b"params.json",
    ];
    names.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_weights_are_known_and_names_that_only_look_alike_are_not() {
        for (name, beside_config) in [
            ("a/b.safetensors", false),
            ("M.GGUF", false),
            ("variables/variables.data-00000-of-00001", false),
            ("pytorch_model-00001-of-00002.bin", false),
            ("x/y.bin", true),
        ] {
            assert_eq!(look(name.as_bytes()).map(|named| named.beside_config), Some(beside_config), "{name}");
        }
        for name in [".gguf", "a.data-0-of-1", "readme.txt", "model", "a.bin.txt", "weight.bina"] {
            assert!(look(name.as_bytes()).is_none(), "{name}");
        }
    }
}
