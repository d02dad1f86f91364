"""onnxruntime and tokenizers over the mount: a real encoder whose weights lie in an external data file.

The embeddings of twenty sentences must equal, bit for bit, those computed from the plain directory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from tokenizers import Tokenizer

from common import Differs, Tally, largest, main, require_equal
from sentences import SENTENCES


def encode(root: Path) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(SENTENCES)
    ids = np.array([e.ids for e in encodings], np.int64)
    return ids, np.array([e.attention_mask for e in encodings], np.int64)


def embed(root: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    # One thread, so that the order of additions is the same in both runs.
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(root / "model.onnx", options, providers=["CPUExecutionProvider"])
    ids, mask = encode(root)
    return session.run(["embedding"], {"input_ids": ids, "attention_mask": mask})[0]


def run(plain: Path, mounted: Path, tally: Tally) -> None:
    with tally.check("tokenizers: twenty sentences"):
        for seen, wanted in zip(encode(mounted), encode(plain), strict=True):
            require_equal(seen.tolist(), wanted.tolist(), "token ids")
    with tally.check("onnx: every initializer from the external data file") as step:
        seen, wanted = (onnx.load(str(root / "model.onnx")).graph.initializer for root in (mounted, plain))
        require_equal([t.name for t in seen], [t.name for t in wanted], "initializers")
        for a, b in zip(seen, wanted, strict=True):
            require_equal(numpy_helper.to_array(a).tobytes() == numpy_helper.to_array(b).tobytes(), True, a.name)
            step.bytes_read += numpy_helper.to_array(a).nbytes
    with tally.check("onnxruntime: embeddings of twenty sentences") as step:
        seen, wanted = embed(mounted), embed(plain)
        if seen.tobytes() != wanted.tobytes():
            raise Differs(f"largest difference {np.abs(seen - wanted).max()}")
        alike = float(seen[-1] @ seen[-2])
        step.note = f"question and answer: cosine {alike:.3f}, cat and answer: {float(seen[0] @ seen[-1]):.3f}"
        if alike < 0.7:
            raise Differs("the embeddings make no sense: the model was not really run")


if __name__ == "__main__":
    main(__doc__, run, lambda root: largest(root, ".data"))
