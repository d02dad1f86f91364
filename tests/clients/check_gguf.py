"""Every field and every tensor of every .gguf file, read by gguf.GGUFReader (which maps the file) over the mount."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader

from common import Differs, Step, Tally, files_below, largest, main, require_equal


def compare(plain: Path, mounted: Path, step: Step) -> None:
    wanted, seen = GGUFReader(plain), GGUFReader(mounted)
    require_equal(list(seen.fields), list(wanted.fields), "field names")
    for name, field in wanted.fields.items():
        require_equal(seen.fields[name].contents(), field.contents(), f"field {name}")
    require_equal([t.name for t in seen.tensors], [t.name for t in wanted.tensors], "tensor names")
    for a, b in zip(seen.tensors, wanted.tensors, strict=True):
        require_equal((list(a.shape), a.tensor_type), (list(b.shape), b.tensor_type), f"shape and type of {a.name}")
        # A copy: the reader's array is a map that nothing has touched yet.
        with step.reading():
            data = np.array(a.data)
        if not np.array_equal(data.reshape(-1).view(np.uint8), b.data.reshape(-1).view(np.uint8)):
            raise Differs(f"tensor {a.name}")
        step.bytes_read += data.nbytes


def run(plain: Path, mounted: Path, tally: Tally) -> None:
    for name in files_below(plain, ".gguf"):
        with tally.check(f"GGUFReader: {name}") as step:
            compare(plain / name, mounted / name, step)


if __name__ == "__main__":
    main(__doc__, run, lambda root: largest(root, ".gguf"))
