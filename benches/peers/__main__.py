"""modelfs against its peers on one machine: one table of ratios, a chart, and every number behind them.

`benches/run.sh peers` installs what is compared and runs this. Every contender stores the same files in the same S3
server and reads them back; they take turns, round after round, and what is printed are medians over the rounds of the
ratio within a round. A contender whose bytes are wrong, by SHA-256 of a whole read before anything is timed, is named
and left out. Cold means: a fresh mount (or a fresh loading process) for every measurement, nothing decrypted or cached
by the client; what the server reads from lies in its page cache, for every contender, so that no disk is measured; and
free memory has just been touched, so that no hypervisor is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import report
from contenders import Bed, Contender, Data, Modelfs, everybody
from servers import S3, Failed, Nginx, Processes, run
from suite import Loader, Reader, Suite


def versions(bed: Bed) -> dict[str, str]:
    def first(command: list[str | None], word: int) -> str:
        try:
            said = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=30)
            return (said.stdout + said.stderr).split()[word].strip(";,")
        except (OSError, IndexError, subprocess.TimeoutExpired):
            return "not there"

    found = {
        "modelfs": first([str(bed.modelfs), "--version"], 1),
        "versitygw": "1.8.0",
        "nginx": first([shutil.which("nginx") or "/usr/sbin/nginx", "-v"], 2).removeprefix("nginx/"),
        "rclone": first([bed.found("rclone-1.76.0", "rclone"), "version"], 1),
        "gocryptfs": first(["gocryptfs", "--version"], 1),
        "s3fs": first(["s3fs", "--version"], 6),
        "mountpoint-s3": "0.11.0 (crate mountpoint-s3-fs)"
        if bed.found("mountpoint-s3-0.11.0", "mountpoint-s3-peer")
        else "not there",
    }
    python = bed.cache / "bench-peers" / "bin" / "python"
    if python.exists():
        names = ["torch", "transformers", "safetensors", "tensorizer", "runai-model-streamer", "fastsafetensors"]
        code = (
            f"from importlib.metadata import version as v; import json; print(json.dumps({{n: v(n) for n in {names}}}))"
        )
        found |= json.loads(run([str(python), "-c", code]))
    return found


@contextlib.contextmanager
def prepared(args: argparse.Namespace) -> Iterator[tuple[Bed, Loader | None]]:
    """The servers, the loader and a folder of our own; all of it is gone afterwards, whatever happened."""
    cache = Path(os.environ.get("MODELFS_TEST_CACHE", Path.home() / ".cache/modelfs-tests"))
    gateway = cache / "versitygw-1.8.0/bin/versitygw"
    if not gateway.exists():
        raise Failed("versitygw is not installed: tests/parts/install.sh versitygw")
    work = Path(tempfile.mkdtemp(prefix="modelfs-bench.", dir=args.dir))
    processes = Processes(work / "logs")
    loader = None
    try:
        s3 = S3(gateway, work / "s3", processes)
        nginx = None
        (work / "plain").mkdir()
        if shutil.which("nginx") or Path("/usr/sbin/nginx").exists():
            nginx = Nginx(work / "plain", work / "nginx", processes)
        bed = Bed(work, cache, args.modelfs, s3, nginx, processes)
        python = cache / "bench-peers/bin/python"
        if not args.no_torch and (cache / "bench-peers/complete").exists():
            loader = Loader(python, s3.client_env(), work / "logs/loader.log")
            bed.helper = loader
        bed.versions = versions(bed)
        yield bed, loader
    finally:
        if loader:
            loader.close()
        processes.stop_all()
        for line in Path("/proc/mounts").read_text().splitlines():
            if line.split()[1].startswith(f"{work}/"):
                subprocess.run(["umount", "-l", line.split()[1]], capture_output=True)
        if args.keep_logs:
            shutil.copytree(work / "logs", args.keep_logs, dirs_exist_ok=True)
        # rmtree does not go through a mount that is still there.
        if not any(f" {work}/" in line for line in Path("/proc/mounts").read_text().splitlines()):
            shutil.rmtree(work, ignore_errors=True)


def make_data(args: argparse.Namespace, kinds: list[str]) -> dict[str, Data]:
    cache = Path(os.environ.get("MODELFS_TEST_CACHE", Path.home() / ".cache/modelfs-tests"))
    minilm = cache / "models-1/minilm"
    python = cache / "clients-lite/bin/python"
    if not python.exists() or not minilm.is_dir():
        raise Failed("the data need numpy and the small model: tests/parts/install.sh clients-lite models-small")
    made = [kind for kind in kinds if kind != "llama-bf16"]
    print(f"making the data, {args.size} MiB each, where they are not there", file=sys.stderr)
    if made:
        run(
            [
                str(python),
                str(Path(__file__).with_name("data.py")),
                str(args.data),
                "--mib",
                str(args.size),
                "--minilm",
                str(minilm),
                *made,
            ]
        )
    found = {}
    for kind in made:
        folder = args.data / f"{kind}-{args.size}"
        found[kind] = Data(kind, folder, next(path.name for path in folder.iterdir()))
    if "llama-bf16" in kinds:
        folder = cache / "models-1/llama"
        if folder.is_dir():
            found["llama-bf16"] = Data(
                "llama-bf16", folder, min(path.name for path in folder.glob("*.safetensors")), whole=True
            )
    return found


ALL_COLUMNS = {"first", "cold", "cold load", "warm", "mmap", "direct", "random", "many", "warm load"}
KINDS = ["minilm-bf16", "minilm-f16", "minilm-f32", "normal-bf16", "random", "gguf-q4k"]
# What is read through a narrow link as well.
LINK = ("minilm-bf16", "normal-bf16", "random")
# Who is in the shorter comparisons by kind of data.
SHORT = ("modelfs", "modelfs, open=whole", "modelfs, whole, no codec", "mountpoint-s3", "rclone crypt")
MODEL = (
    "tmpfs",
    "modelfs",
    "modelfs, open=whole",
    "rclone",
    "s3fs",
    "mountpoint-s3",
    "Run:ai streamer",
    "rclone crypt",
    "tensorizer, encrypted",
)
QUICK = ("tmpfs", "modelfs", "modelfs, open=whole", "rclone", "mountpoint-s3", "rclone crypt")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benches/run.sh peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, metavar="MIB", help="of each file [512; with --quick 96]")
    parser.add_argument("--rounds", type=int, help="[3; with --quick 1]")
    parser.add_argument(
        "--quick", action="store_true", help="small files, one round, few peers: a smoke test of some minutes"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="only contenders whose name holds this; give it again for more"
    )
    parser.add_argument(
        "--kinds", default=None, help="only these kinds of data, by commas: " + ",".join([*KINDS, "llama-bf16"])
    )
    parser.add_argument("--no-torch", action="store_true", help="leave out what needs torch")
    parser.add_argument("--no-link", action="store_true", help="leave out the link of 1 Gb/s (network namespaces, tc)")
    parser.add_argument(
        "--proof-gb", type=float, default=None, help="how much is read warm to see the daemon idle [10; with --quick 1]"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(os.environ.get("TMPDIR", "/var/tmp")), help="where the stores lie meanwhile"
    )
    parser.add_argument("--out", type=Path, help="writes benchmark.json and benchmark.svg into this folder")
    parser.add_argument("--keep-logs", type=Path, help="copies the logs of servers and mounts into this folder")
    parser.add_argument("--modelfs", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--reader", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--gets", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--crypto", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = args.size or (96 if args.quick else 512)
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.proof_gb = args.proof_gb or (1 if args.quick else 10)
    args.kinds = (
        args.kinds.split(",") if args.kinds else (["minilm-bf16", "random"] if args.quick else [*KINDS, "llama-bf16"])
    )
    cache = Path(os.environ.get("MODELFS_TEST_CACHE", Path.home() / ".cache/modelfs-tests"))
    args.data = cache / "bench-data-1"
    return args


def one_core(args: argparse.Namespace) -> dict[str, float]:
    """Cipher, hash and copy alone, from benches/crypto.rs."""
    if not args.crypto:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "crypto.json"
        run([str(args.crypto), "--rounds", str(args.rounds), "--json", str(out)])
        rows = json.loads(out.read_text())["results"]
    return {row["what"]: round(row["median"], 2) for row in rows if row["how"] == "GB/s"}


def main() -> int:
    args = parse()
    if os.geteuid() != 0:
        print("benches/run.sh peers: mounts of FUSE and tmpfs need root here", file=sys.stderr)
        return 1

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    began = time.monotonic()
    data = make_data(args, args.kinds)
    with prepared(args) as (bed, loader):
        suite = Suite(args, bed, Reader(args.reader), args.gets, loader)
        numbers = suite.numbers
        floors = one_core(args)
        wanted: list[Contender] = []
        for contender in everybody(bed):
            reason = contender.why_not()
            if args.only and not any(word in contender.name for word in [*args.only, "tmpfs"]):
                continue
            if args.quick and contender.name not in QUICK:
                continue
            if reason:
                numbers.note(f"{contender.name}: left out: {reason}")
            else:
                wanted.append(contender)
        seen: dict[str, list[Contender]] = {}
        kinds = [kind for kind in args.kinds if kind in data and not data[kind].whole]
        for position, kind in enumerate(kinds):
            everyone = position == 0
            who = wanted if everyone else [contender for contender in wanted if contender.name in SHORT]
            columns = ALL_COLUMNS if everyone else {"cold"}
            seen[kind] = suite.compare(data[kind], who, columns)
            own = next((contender for contender in seen[kind] if contender.name == "modelfs, open=whole"), None)
            if everyone and isinstance(own, Modelfs):
                suite.say("modelfs: its processor time while warm files are read")
                suite.proofs(data[kind], own, int(args.proof_gb * 1e9))
            if isinstance(own, Modelfs) and kind in LINK and not args.no_link:
                suite.say(f"{kind}: a link of 1 Gb/s")
                suite.narrow_link(data[kind], own)
            suite.forget(data[kind])
        model = data.get("llama-bf16")
        if model:
            suite.compare(model, [contender for contender in wanted if contender.name in SHORT], {"cold"})
        if model and loader:
            seen[model.name] = suite.models(model, [contender for contender in wanted if contender.name in MODEL])
        elif "llama-bf16" in args.kinds:
            numbers.note(
                "no whole-model loads: they need torch and the model (install.sh clients-torch models bench-peers)"
            )
        suite.say("")
        about = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "machine": machine.describe(),
            "versions": bed.versions,
            "size_mib": args.size,
            "rounds": args.rounds,
            "plain_gets_by": "benches/gets.rs, way bare" if args.gets else "benches/peers/gets.py",
            "minutes": round((time.monotonic() - began) / 60, 1),
        }
        result = report.collect(numbers, about, floors, data, seen, {contender.name: contender for contender in wanted})
    print(report.text(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "benchmark.json").write_text(report.as_json(result))
        (args.out / "benchmark.svg").write_text(report.chart(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; everything that was started is gone", file=sys.stderr)
        sys.exit(130)
    except Failed as error:
        print(f"benches/run.sh peers: {error}", file=sys.stderr)
        sys.exit(1)
