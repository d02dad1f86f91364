"""Which open policy is right for whom: every way in which programs look at a model, under lazy, auto and whole.

Run by benches/open_policy.sh, which makes the model, the stores and the mounts' environment. For each case a fresh mount
and a fresh client process; the client's clock starts before its first system call on the mount and runs while it opens, so
that an open which waits is counted. `first` is the time to the first byte that the program wanted, `all` to the last one.
Counters are what `modelfs status --json` says right after the client ended.
"""
import asyncio
import json
import mmap
import multiprocessing
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
SHARDS = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
ONE = "one/model.safetensors"
PICKLE = "pickle/pytorch_model.bin"


def write_safetensors(path, mib):
    """Tensors of 16 MiB of incompressible bytes."""
    size = 16 * MIB
    heads = {
        f"layer.{i}": {"dtype": "I16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(mib // 16)
    }
    head = json.dumps(heads).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _ in range(mib // 16):
            file.write(os.urandom(size))


def make(root, mib):
    import torch

    os.makedirs(f"{root}/one")
    os.makedirs(f"{root}/pickle")
    for name in SHARDS:
        write_safetensors(f"{root}/{name}", mib // 4)
    write_safetensors(f"{root}/{ONE}", mib)
    tensors = {f"layer.{i}": torch.randint(0, 1 << 15, (8 * MIB,), dtype=torch.int16) for i in range(mib // 32)}
    torch.save(tensors, f"{root}/{PICKLE}")
    open(f"{root}/config.json", "w").write("{}")
    open(f"{root}/model.safetensors.index.json", "w").write(json.dumps({"weight_map": dict.fromkeys(SHARDS, "")}))


# ---- the programs -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.started, self.first = time.perf_counter(), None

    def byte(self):
        if self.first is None:
            self.first = time.perf_counter() - self.started

    def told(self):
        total = time.perf_counter() - self.started
        return {"first": total if self.first is None else self.first, "all": total}


def head_of(path):
    with open(path, "rb", buffering=0) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.read(length)
        return 8 + length


def take(clock, path):
    """All of a file by read(2)."""
    buffer = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            clock.byte()


def touch(clock, view, step=4096):
    """One byte a page, as a copy or a sum would meet them."""
    view[0]
    clock.byte()
    view[::step].sum()


def tensors(clock, path, framework):
    from safetensors import safe_open

    with safe_open(path, framework) as file:
        for key in file.keys():
            tensor = file.get_tensor(key)
            tensor.view(-1)[0].item() if framework == "pt" else tensor[0]
            clock.byte()
            tensor.sum()


def case_stat(root, clock):
    for folder, _, names in os.walk(root):
        for name in names:
            os.stat(f"{folder}/{name}")


def case_file(root, clock):
    subprocess.run(["file", "-b", f"{root}/{ONE}", f"{root}/{PICKLE}"] + [f"{root}/{n}" for n in SHARDS], check=True,
                   stdout=subprocess.DEVNULL)


def case_heads(root, clock):
    for name in [ONE, *SHARDS]:
        head_of(f"{root}/{name}")


def case_safe_open_torch(root, clock):
    tensors(clock, f"{root}/{ONE}", "pt")


def case_safe_open_numpy(root, clock):
    tensors(clock, f"{root}/{ONE}", "np")


def case_sharded(root, clock):
    for name in ["config.json", "model.safetensors.index.json"]:
        open(f"{root}/{name}").read()
    for name in SHARDS:
        tensors(clock, f"{root}/{name}", "pt")


def case_shards_only(root, clock):
    for name in SHARDS:
        tensors(clock, f"{root}/{name}", "np")


def one_of_eight(root, started):
    clock = Clock()
    take(clock, f"{root}/{ONE}")
    started.put(clock.told())


def case_eight(root, clock):
    queue = multiprocessing.Queue()
    for process in (workers := [multiprocessing.Process(target=one_of_eight, args=(root, queue)) for _ in range(8)]):
        process.start()
    clock.first = max(queue.get()["first"] for _ in workers)
    for process in workers:
        process.join()


def case_llama(root, clock):
    import numpy

    head_of(f"{root}/{ONE}")
    with open(f"{root}/{ONE}", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(mmap.MADV_WILLNEED)
    touch(clock, numpy.frombuffer(mapped, dtype="u1"))


def case_torch_load(root, clock):
    import torch

    for tensor in torch.load(f"{root}/{PICKLE}", weights_only=True).values():
        clock.byte()
        tensor.sum()


def case_external(root, clock):
    """As onnxruntime takes external data: every tensor by an open and a map of its own."""
    import numpy

    path = f"{root}/{ONE}"
    size = os.stat(path).st_size
    for start in range(0, size, 16 * MIB):
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), min(16 * MIB, size - start), prot=mmap.PROT_READ, offset=start)
        touch(clock, numpy.frombuffer(mapped, dtype="u1"))


def case_cp(root, clock):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as target:
        subprocess.run(["cp", "-r", *[f"{root}/{n}" for n in SHARDS], target], check=True)


def case_larger(root, clock):
    take(clock, f"{root}/{ONE}")


CASES = {
    "stat of every file": (case_stat, 0),
    "file(1) on six weights": (case_file, 0),
    "five safetensors heads": (case_heads, 0),
    "safe_open, torch": (case_safe_open_torch, 1),
    "safe_open, numpy": (case_safe_open_numpy, 1),
    "config, then 4 shards, torch": (case_sharded, 1),
    "4 shards alone, numpy": (case_shards_only, 1),
    "8 processes read one file": (case_eight, 1),
    "llama.cpp: head, map, WILLNEED": (case_llama, 1),
    "torch.load (zip)": (case_torch_load, 1),
    "external data, 16 MiB maps": (case_external, 1),
    "cp of 4 shards": (case_cp, 1),
    "file of twice the cache, read": (case_larger, 1),
}


def client(name, root):
    # Before the clock starts: what any run of such a program needs anyway.
    import numpy  # noqa: F401

    if CASES[name][0].__name__ in ("case_safe_open_torch", "case_sharded", "case_torch_load"):
        import torch  # noqa: F401
    if "safe_open" in name or "shards" in name:
        import safetensors  # noqa: F401

    clock = Clock()
    CASES[name][0](root, clock)
    print(json.dumps(clock.told()))


# ---- a link of so many bytes a second -----------------------------------------------------------------------------------


async def throttle(port, target, rate):
    """A TCP proxy whose answers share one link of `rate` bytes a second."""
    free = time.monotonic()

    async def pump(reader, writer, slow):
        nonlocal free
        try:
            while data := await reader.read(64 << 10):
                if slow:
                    free = max(free, time.monotonic()) + len(data) / rate
                    await asyncio.sleep(free - time.monotonic())
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader, writer):
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pump(reader, there_writer, False), pump(there_reader, writer, True))

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=256 << 10)
    await server.serve_forever()


# ---- the table ----------------------------------------------------------------------------------------------------------


def run_case(program, store, name, policy, mib, mount_args):
    with tempfile.TemporaryDirectory() as point:
        cache = f"{max(64, mib // 2)}MiB" if name.startswith("file of twice") else f"{mib * 3}MiB"
        subprocess.run([program, "mount", store, point, "--open", policy, "--cache", cache, "--daemon", *mount_args],
                       check=True, stdout=subprocess.DEVNULL)
        try:
            told = subprocess.run([sys.executable, __file__, "client", name, f"{point}/bench"], check=True,
                                  capture_output=True, text=True).stdout
            status = json.loads(subprocess.check_output([program, "status", point, "--json"]))
        finally:
            subprocess.run([program, "umount", point], check=False, stdout=subprocess.DEVNULL)
        return json.loads(told), status["metrics"]


def wanted_mib(name, mib):
    if name == "torch.load (zip)":
        return mib // 32 * 16
    return mib * CASES[name][1]


def table(program, store, mib, rounds, policies, only, mount_args):
    print("| case | policy | first byte, s | all, s | fetched / wanted, MiB | opens: plain, held, passthrough |")
    print("|---|---|---|---|---|---|")
    for name in CASES:
        if not re.search(only, name):
            continue
        runs = {policy: [] for policy in policies}
        for _ in range(rounds):
            for policy in policies:
                runs[policy].append(run_case(program, store, name, policy, mib, mount_args))
        for policy in policies:
            first, total = (statistics.median(told[key] for told, _ in runs[policy]) for key in ("first", "all"))
            metrics = runs[policy][-1][1]
            held = str(metrics["opens_held"])
            if vain := metrics.get("opens_held_in_vain"):
                held += f" ({vain} in vain)"
            modes = f"{metrics['opens_plain']}, {held}, {metrics['opens_passthrough']}"
            fetched = metrics["fetch_bytes"] / MIB
            print(f"| {name} | {policy} | {first:.3f} | {total:.3f} | {fetched:.0f} / {wanted_mib(name, mib)} | {modes} |",
                  flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", root, mib]:
            make(root, int(mib))
        case ["client", name, root]:
            client(name, root)
        case ["throttle", port, target, rate]:
            asyncio.run(throttle(int(port), int(target), float(rate)))
        case ["table", program, store, mib, rounds, policies, only, *mount_args]:
            table(program, store, int(mib), int(rounds), policies.split(","), only, mount_args)
        case _:
            sys.exit("run benches/open_policy.sh")
