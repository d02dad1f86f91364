"""Loads models as programs do, one process a load: a line of JSON in on standard input, a line of JSON out.

The imports, which take seconds, are done once; every load is then a fork of this process that ends with its answer, so
nothing stays warm in it. The clock runs from before the loader is asked until every byte of every tensor has been
added up: a tensor that is only a map of a file must have come from it by then. The sum tells whether they are right.

request   {"way": WAY, "paths": [FILE or s3:// URL...], "folder": DIR, "options": {...}}
answer    {"seconds", "cpu", "bytes", "sum", "memory"} or {"error"}
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

MASK = (1 << 64) - 1


def add_up(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Bytes, and the sum of their 64-bit words and odd bytes: the same in whatever order they come."""
    total = size = 0
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = flat.numel() // 8 * 8
        if whole and flat.data_ptr() % 8 == 0:
            total += int(flat[:whole].view(torch.int64).sum())
        else:
            # The words of an unaligned tensor, without which torch would not look at them.
            total += int(flat[:whole].clone().view(torch.int64).sum()) if whole else 0
        total += int(flat[whole:].sum()) if whole < flat.numel() else 0
        size += flat.numel()
    return size, total & MASK


def by_safetensors(request: dict[str, Any]) -> Iterable[torch.Tensor]:
    from safetensors.torch import load_file

    for path in request["paths"]:
        yield from load_file(path).values()


def by_fastsafetensors(request: dict[str, Any]) -> Iterable[torch.Tensor]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: request["paths"]})
    buffers = loader.copy_files_to_device()
    for name in loader.get_keys():
        yield buffers.get_tensor(name)
    buffers.close()
    loader.close()


def by_runai(request: dict[str, Any]) -> Iterable[torch.Tensor]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(request["paths"])
        for _, tensor in streamer.get_tensors():
            yield tensor


def _tensorizer(request: dict[str, Any]) -> Any:
    from tensorizer import DecryptionParams, TensorDeserializer, stream_io

    options = request["options"]
    stream = stream_io.open_stream(
        request["paths"][0],
        "rb",
        s3_access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        s3_secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        s3_endpoint=options["endpoint"],
        s3_region_name=os.environ["AWS_REGION"],
        force_http=True,
    )
    encryption = DecryptionParams.from_key(bytes.fromhex(options["key"])) if options.get("key") else None
    return TensorDeserializer(stream, device="cpu", encryption=encryption, num_readers=options.get("readers", 1))


def by_tensorizer(request: dict[str, Any]) -> Iterable[torch.Tensor]:
    yield from _tensorizer(request).values()


def tensorize(request: dict[str, Any]) -> Iterable[torch.Tensor]:
    """Not a load: writes the encrypted file that `tensorizer` then reads."""
    from safetensors.torch import load_file
    from tensorizer import EncryptionParams, TensorSerializer

    weights = {name: tensor for path in request["paths"] for name, tensor in load_file(path).items()}
    key = EncryptionParams(key=bytes.fromhex(request["options"]["key"]))
    serializer = TensorSerializer(request["options"]["out"], encryption=key)
    serializer.write_state_dict(weights)
    serializer.close()
    return weights.values()


def by_transformers(request: dict[str, Any]) -> Iterable[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(request["folder"], dtype="auto")
    return list(model.parameters())


def _into_model(folder: str, weights: dict[str, torch.Tensor]) -> Iterable[torch.Tensor]:
    """A model of that folder's shape around tensors that are there already, without another copy of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    model.load_state_dict(weights, strict=True, assign=True)
    return list(model.parameters())


def by_runai_model(request: dict[str, Any]) -> Iterable[torch.Tensor]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(request["paths"])
        # Views of its buffer, which is as large as the model unless told otherwise: were it used again, the sum would
        # tell.
        weights = dict(streamer.get_tensors())
    return _into_model(request["folder"], weights)


def by_tensorizer_model(request: dict[str, Any]) -> Iterable[torch.Tensor]:
    return _into_model(request["folder"], dict(_tensorizer(request).items()))


WAYS: dict[str, Callable[[dict[str, Any]], Iterable[torch.Tensor]]] = {
    "safetensors": by_safetensors,
    "fastsafetensors": by_fastsafetensors,
    "runai": by_runai,
    "tensorizer": by_tensorizer,
    "tensorize": tensorize,
    "transformers": by_transformers,
    "runai model": by_runai_model,
    "tensorizer model": by_tensorizer_model,
}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def status(name: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def warm_up(way: str) -> None:
    """What a program does once whatever it loads: imports, and the threads that torch starts at its first sum."""
    for package in ("fastsafetensors", "runai_model_streamer", "tensorizer"):
        if way.split()[0] in package:
            importlib.import_module(package)
    torch.ones(1 << 20, dtype=torch.int64).sum()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    warm_up(request["way"])
    # Forget the peak of the parent.
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS:")
    cpu = cpu_seconds()
    began = time.perf_counter()
    size, total = add_up(WAYS[request["way"]](request))
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "cpu": cpu_seconds() - cpu,
        "bytes": size,
        "sum": total,
        "memory": status("VmHWM:") - before,
    }


def main() -> None:
    # Everything slow to import that needs no thread of its own; threads do not survive a fork.
    import safetensors.torch  # noqa: F401

    if "--transformers" in sys.argv:
        import transformers.models.llama.modeling_llama  # noqa: F401
    for line in sys.stdin:
        request = json.loads(line)
        got, put = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(got)
            try:
                told = answer(request)
            # Whatever a loader raises is its answer.
            except BaseException as error:
                traceback.print_exc()
                told = {"error": f"{type(error).__name__}: {error}"[:300]}
            with os.fdopen(put, "w") as out:
                json.dump(told, out)
            # Nothing of the parent's is flushed or torn down twice.
            os._exit(0)
        os.close(put)
        with os.fdopen(got) as pipe:
            told_text = pipe.read()
        _, how = os.waitpid(child, 0)
        print(told_text or json.dumps({"error": f"the loading process ended with {how}"}), flush=True)


if __name__ == "__main__":
    main()
