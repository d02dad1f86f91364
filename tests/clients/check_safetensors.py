"""Every tensor of every .safetensors file, read by the safetensors library over the mount, bit for bit.

Three readers, because loaders differ in how they ask: the numpy one, the torch one (both map the file), and a reader
that loads whole files by read(2). The torch one runs where torch is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from safetensors import deserialize, safe_open

from common import Differs, Step, Tally, files_below, largest, main, require_equal


def by_numpy(plain: Path, mounted: Path, step: Step) -> None:
    """Tensors as numpy arrays; the types numpy lacks (bf16, fp8) are left to the other two readers."""
    with safe_open(plain, framework="np") as wanted, safe_open(mounted, framework="np") as seen:
        require_equal(seen.keys(), wanted.keys(), "tensor names")
        require_equal(seen.metadata(), wanted.metadata(), "metadata")
        for name in wanted.keys():
            dtype = seen.get_slice(name).get_dtype()
            require_equal(dtype, wanted.get_slice(name).get_dtype(), f"dtype of {name}")
            if dtype in ("BF16", "F8_E4M3", "F8_E5M2"):
                continue
            with step.reading():
                a = seen.get_tensor(name)
            b = wanted.get_tensor(name)
            require_equal(a.shape, b.shape, f"shape of {name}")
            # As integers: NaNs with equal bits are equal, and 0.0 is not -0.0.
            if not np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)):
                raise Differs(f"tensor {name}")
            step.bytes_read += a.nbytes


def by_torch(plain: Path, mounted: Path, step: Step) -> None:
    import torch

    with safe_open(plain, framework="pt") as wanted, safe_open(mounted, framework="pt") as seen:
        require_equal(seen.keys(), wanted.keys(), "tensor names")
        for name in wanted.keys():
            # A copy: the tensor itself may be no more than a map that nothing has touched yet.
            with step.reading():
                a = seen.get_tensor(name).clone()
            b = wanted.get_tensor(name)
            require_equal((a.shape, a.dtype), (b.shape, b.dtype), f"shape and dtype of {name}")
            if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
                raise Differs(f"tensor {name}")
            step.bytes_read += a.nbytes


def by_whole_read(plain: Path, mounted: Path, step: Step) -> None:
    wanted = dict(deserialize(plain.read_bytes()))
    with step.reading():
        content = mounted.read_bytes()
    for name, tensor in deserialize(content):
        reference = wanted.pop(name, None)
        if reference is None:
            raise Differs(f"tensor {name} is not in the plain file")
        require_equal((tensor["dtype"], tensor["shape"]), (reference["dtype"], reference["shape"]), f"shape of {name}")
        if tensor["data"] != reference["data"]:
            raise Differs(f"tensor {name}")
        step.bytes_read += len(tensor["data"])
    require_equal(sorted(wanted), [], "tensors missing from the mount")


def run(plain: Path, mounted: Path, tally: Tally) -> None:
    readers = {"safe_open numpy": by_numpy, "whole read": by_whole_read}
    if importlib.util.find_spec("torch"):
        readers["safe_open torch"] = by_torch
    names = files_below(plain, ".safetensors")
    for label, reader in readers.items():
        for name in names:
            with tally.check(f"{label}: {name}") as step:
                reader(plain / name, mounted / name, step)
    with tally.check("every .safetensors file is there"):
        require_equal(files_below(mounted, ".safetensors"), names, "files")


if __name__ == "__main__":
    main(__doc__, run, lambda root: largest(root, ".safetensors"))
