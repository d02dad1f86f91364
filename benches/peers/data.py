"""Makes the model files that everything reads, once, into FOLDER/KIND-SIZE/: `data.py FOLDER --mib N KIND...`

minilm-bf16, minilm-f16, minilm-f32   the real all-MiniLM-L6-v2 weights in that type, repeated under other names
normal-bf16   bf16 tensors of normally distributed values, each with its own deviation, as trained weights have them
random        a safetensors file of random bytes: nothing to win
gguf-q4k      Q4_K tensors: normally distributed values, quantised block by block to 4.5 bits each

Every file is the same on every run. Needs numpy and gguf (tests/parts/install.sh clients-lite), and the small model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SEED = 20261125
MIB = 1 << 20

# A tensor as it is stored: name, type, shape, bytes.
Tensor = tuple[str, str, list[int], bytes]


def write_safetensors(path: Path, tensors: Iterator[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts, at = [], 0
    for name, dtype, shape, content in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        parts.append(content)
        at += len(content)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            file.write(part)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The nearest bf16 of each f32, ties to even, as 16-bit integers."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def minilm(out: Path, mib: int, kind: str, model: Path) -> None:
    from safetensors.numpy import load_file

    weights = {
        name: value for name, value in load_file(model / "model.safetensors").items() if value.dtype == np.float32
    }
    cast = {"bf16": ("BF16", to_bf16), "f16": ("F16", lambda v: v.astype(np.float16)), "f32": ("F32", lambda v: v)}
    dtype, convert = cast[kind]
    stored = {name: (list(value.shape), convert(value).tobytes()) for name, value in weights.items()}
    copies = max(1, round(mib * MIB / sum(len(content) for _, content in stored.values())))

    def tensors() -> Iterator[Tensor]:
        for copy in range(copies):
            for name, (shape, content) in stored.items():
                yield f"copy{copy}.{name}", dtype, shape, content

    write_safetensors(out / "model.safetensors", tensors())


def normal_bf16(out: Path, mib: int, _kind: str, _model: Path) -> None:
    random = np.random.default_rng(SEED)
    rows, width = 2048, 2048
    each = rows * width * 2

    def tensors() -> Iterator[Tensor]:
        for i in range(max(1, round(mib * MIB / each))):
            # Published models hold deviations of about 0.005 to 0.1, by layer and kind of matrix.
            deviation = 0.005 * 20 ** random.random()
            values = random.standard_normal((rows, width), dtype=np.float32) * deviation
            yield f"layer{i}.weight", "BF16", [rows, width], to_bf16(values).tobytes()

    write_safetensors(out / "model.safetensors", tensors())


def random_bytes(out: Path, mib: int, _kind: str, _model: Path) -> None:
    random = np.random.default_rng(SEED)
    write_safetensors(
        out / "model.safetensors", ((f"bytes{i}", "U8", [MIB * 8], random.bytes(MIB * 8)) for i in range(mib // 8))
    )


def quantise_q4k(values: np.ndarray) -> np.ndarray:
    """Q4_K of llama.cpp's layout by plain rounding: rows of a multiple of 256 values -> rows of 144 bytes for each 256.

    A block has eight parts of 32 values, each with a 6-bit scale and a 6-bit minimum of two f16 numbers of the block.
    """
    parts = values.reshape(-1, 8, 32)
    low = np.minimum(parts.min(axis=2), 0)
    scale = (parts.max(axis=2) - low) / 15
    d = (scale.max(axis=1) / 63).astype(np.float16)
    dmin = ((-low).max(axis=1) / 63).astype(np.float16)
    d32, dmin32 = d.astype(np.float32)[:, None], dmin.astype(np.float32)[:, None]
    sc = np.clip(np.rint(scale / d32), 0, 63).astype(np.uint8)
    mn = np.clip(np.rint(-low / dmin32), 0, 63).astype(np.uint8)
    step = np.maximum(d32 * sc, 1e-12)[:, :, None]
    q = np.clip(np.rint((parts + (dmin32 * mn)[:, :, None]) / step), 0, 15).astype(np.uint8)
    packed = np.empty((len(parts), 12), np.uint8)
    packed[:, 0:4] = (sc[:, :4] & 63) | ((sc[:, 4:] >> 4) << 6)
    packed[:, 4:8] = (mn[:, :4] & 63) | ((mn[:, 4:] >> 4) << 6)
    packed[:, 8:12] = (sc[:, 4:] & 15) | ((mn[:, 4:] & 15) << 4)
    nibbles = q[:, 0::2] | (q[:, 1::2] << 4)
    blocks = np.concatenate(
        [d.view(np.uint8).reshape(-1, 2), dmin.view(np.uint8).reshape(-1, 2), packed, nibbles.reshape(-1, 128)], axis=1
    )
    return blocks.reshape(values.shape[0], -1)


def gguf_q4k(out: Path, mib: int, _kind: str, _model: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize

    random = np.random.default_rng(SEED)
    rows, width = 4096, 4096
    writer = GGUFWriter(out / "model.gguf", "llama")
    written = i = 0
    made: list[np.ndarray] = []
    while written < mib * MIB:
        if len(made) < 8:
            # A handful of different tensors, then again: quantising gigabytes in numpy takes minutes.
            values = random.standard_normal((rows, width), dtype=np.float32) * 0.02
            made.append(quantise_q4k(values))
            # The package's own reader decides whether the layout is right.
            off = dequantize(made[-1], GGMLQuantizationType.Q4_K) - values
            assert np.sqrt(np.mean(off**2)) < 0.1 * values.std(), "the quantised values are not those that went in"
        data = made[i % len(made)]
        writer.add_tensor(f"blk.{i}.ffn_up.weight", data, raw_dtype=GGMLQuantizationType.Q4_K)
        written += data.nbytes
        i += 1
    writer.add_block_count(i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


KINDS = {
    "minilm-bf16": (minilm, "bf16"),
    "minilm-f16": (minilm, "f16"),
    "minilm-f32": (minilm, "f32"),
    "normal-bf16": (normal_bf16, ""),
    "random": (random_bytes, ""),
    "gguf-q4k": (gguf_q4k, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, required=True, help="size of each, about")
    parser.add_argument("--minilm", type=Path, required=True, help="the folder of the small model")
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    args = parser.parse_args()
    for kind in args.kinds:
        out = args.folder / f"{kind}-{args.mib}"
        if out.is_dir():
            continue
        # Made beside and renamed: a folder that exists is a whole one.
        staging = out.with_name(f".{out.name}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        maker, of = KINDS[kind]
        maker(staging, args.mib, of, args.minilm)
        staging.rename(out)


if __name__ == "__main__":
    main()
