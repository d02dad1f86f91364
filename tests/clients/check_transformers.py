"""AutoModelForCausalLM.from_pretrained over the mount: the state equal bit for bit, and a forward pass equal too."""

from __future__ import annotations

import os
from pathlib import Path

# Nothing may be looked up elsewhere: what is not in the directory must fail.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from common import Differs, Tally, largest, main, require_equal

PROMPT = torch.tensor([[1, 15, 200, 3000, 77, 5, 9, 2]])


def load(root: Path) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(root)
    kind = AutoModelForCausalLM if "CausalLM" in config.architectures[0] else AutoModel
    return kind.from_pretrained(root, dtype="auto").eval()


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT)[0]


def run(plain: Path, mounted: Path, tally: Tally) -> None:
    # One thread, so that the order of additions is the same in both runs.
    torch.set_num_threads(1)
    wanted = load(plain)
    seen = None
    with tally.check("from_pretrained") as step:
        seen = load(mounted)
        step.bytes_read = sum(t.nbytes for t in seen.state_dict().values())
    if seen is None:
        return
    with tally.check("state dict bit for bit") as step:
        a, b = seen.state_dict(), wanted.state_dict()
        require_equal(list(a), list(b), "names")
        for name in a:
            require_equal((a[name].dtype, a[name].shape), (b[name].dtype, b[name].shape), name)
            if not torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)):
                raise Differs(f"tensor {name}")
            step.bytes_read += a[name].nbytes
    with tally.check("forward pass"):
        if not torch.equal(output(seen), output(wanted)):
            raise Differs("outputs of the forward pass")


if __name__ == "__main__":
    main(__doc__, run, lambda root: largest(root, ".safetensors"))
