"""modelfs against its peers on one machine: one table of ratios, a chart, and every number behind them.

`benches/run.sh peers` installs what is compared and runs this. Every contender stores the same files in the same S3
server and reads them back; they take turns, round after round, and what is printed are medians over the rounds of the
ratio within a round. A contender whose bytes are wrong, by SHA-256 of a whole read before anything is timed, is named and
left out. Cold means: a fresh mount (or a fresh loading process) for every measurement, nothing decrypted or cached by
the client; what the server reads from lies in its page cache, for every contender, so that no disk is measured; and free
memory has just been touched, so that no hypervisor is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import report
from contenders import Bed, Contender, Data, Live, Modelfs, Tmpfs, everybody
from servers import Failed, Nginx, Processes, S3, run

READERS = 4
READ_SECONDS = 600
# Who takes longer than this for one load is not asked again in later rounds.
SLOW_SECONDS = 60
# Where the same bytes by plain GETs are taken from; the best of these is the reference of the cold columns.
GETS_IN_FLIGHT = (4, 8, 16)
PART_BYTES = 8 << 20


class Reader:
    """The reading program: benches/mount.rs in a process of its own, as a loader is."""

    def __init__(self, program: Path) -> None:
        self.program = str(program)

    def start(self, way: str, path: Path, count: int = 0) -> subprocess.Popen[str]:
        command = [self.program, "--client", way, str(path), str(count)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, process: subprocess.Popen[str]) -> dict[str, float]:
        try:
            out, err = process.communicate(timeout=READ_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"reading took more than {READ_SECONDS} s") from None
        if process.returncode:
            raise Failed(f"reading failed: {err.strip().splitlines()[-1] if err.strip() else process.returncode}")
        seconds, size, total, cpu = out.split()
        return {"seconds": float(seconds), "bytes": float(size), "sum": float(total), "cpu": float(cpu)}

    def read(self, way: str, path: Path, count: int = 0) -> dict[str, float]:
        return self.finish(self.start(way, path, count))


class Loader:
    """loader.py: one process that imports torch once and forks for every load."""

    def __init__(self, python: Path, env: dict[str, str], log: Path) -> None:
        self._log = log.open("ab")
        command = [str(python), str(Path(__file__).with_name("loader.py")), "--transformers"]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **quiet, **env, "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def __call__(self, request: dict[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"options": {}, **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Failed("loader.py has ended; loader.log says why")
        told: dict[str, Any] = json.loads(line)
        return told

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


class Numbers:
    """(data, who, what) -> one value a round."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str, str], list[float]] = {}
        self.notes: list[str] = []

    def add(self, data: str, who: str, what: str, value: float) -> None:
        self.values.setdefault((data, who, what), []).append(value)

    def of(self, data: str, who: str, what: str) -> list[float]:
        return self.values.get((data, who, what), [])

    def median(self, data: str, who: str, what: str) -> float | None:
        found = self.of(data, who, what)
        return statistics.median(found) if found else None

    def ratio(self, data: str, who: str, against: str, what: str, what_against: str | None = None) -> float | None:
        """The median over rounds of one by the other; both taken in the same round."""
        pairs = list(zip(self.of(data, who, what), self.of(data, against, what_against or what), strict=False))
        return statistics.median([a / b for a, b in pairs if b]) if pairs else None

    def note(self, text: str) -> None:
        # Where this run's files lie is nobody's business and never the same.
        text = re.sub(r"/\S*modelfs-bench\.[^/\s]*", "…", text.split("\n")[0])[:240]
        if text not in self.notes:
            self.notes.append(text)
            print(f"note: {text}", file=sys.stderr)


class Suite:
    def __init__(self, args: argparse.Namespace, bed: Bed, reader: Reader, gets: Path | None, loader: Loader | None) -> None:
        self.args, self.bed, self.reader, self.gets, self.loader = args, bed, reader, gets, loader
        self.numbers = Numbers()
        self.sums: dict[str, dict[str, Any]] = {}
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        """One line of progress: overwritten on a terminal, with the minutes passed in a log."""
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif text:
            print(f"{(time.monotonic() - self.began) / 60:5.1f} min  {text}", file=sys.stderr, flush=True)

    # ---- preparing ---------------------------------------------------------------------------------------------------

    def ready(self, contenders: list[Contender], data: Data) -> list[Contender]:
        """Stores the data with everyone, reads it back once, and keeps those that answered right."""
        able = []
        for contender in contenders:
            if isinstance(contender, Modelfs) and contender.codec == "none" and not self.codec_matters(able, contender, data):
                continue
            self.say(f"{data.name}: {contender.name} stores and is checked")
            try:
                contender.store(data)
                self.check(contender, data)
            except (Failed, OSError, subprocess.TimeoutExpired) as error:
                self.numbers.note(f"{contender.name}, {data.name}: left out: {error}")
                continue
            able.append(contender)
        return able

    def codec_matters(self, able: list[Contender], plain: Modelfs, data: Data) -> bool:
        """Whether the codec stored anything else than `--codec none` does; the same bytes need not be read twice."""
        coded = next((other for other in able if isinstance(other, Modelfs)), None)
        plain.store(data)
        size = lambda contender: sum(path.stat().st_size for path in contender.stored(data))  # noqa: E731
        if coded and abs(size(coded) - size(plain)) < data.all_bytes // 1000:
            self.numbers.note(f"{data.name}: the codec has nothing to win, so there is no line without it")
            return False
        return True

    def check(self, contender: Contender, data: Data) -> None:
        """One cold read, not timed: its SHA-256, and the memory that it took beyond the plaintext."""
        if not contender.mounts:
            return
        self.prime(contender.stored(data))
        with contender.serve(data) as live:
            with machine.MemoryPeak(live.pids) as peak:
                done = run(["sha256sum", str(live.folder / data.file)], timeout=READ_SECONDS)
            if done.split()[0] != data.sha256():
                raise Failed("WRONG BYTES: its SHA-256 is not that of the source")
            if not isinstance(contender, Tmpfs):
                self.numbers.add(data.name, contender.name, "memory", max(0, peak.bytes - data.bytes) / (1 << 20))

    def prime(self, files: list[Path]) -> None:
        """The server's page cache holds what it is about to serve."""
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.read(8 << 20):
                    pass

    def settle(self, data: Data) -> None:
        """Before anything cold: there is free memory for the plaintext, a loader's copy of it, and the page cache's."""
        machine.touch_free_memory((data.all_bytes if data.whole else data.bytes) * (2 if data.whole else 3))

    # ---- floors ------------------------------------------------------------------------------------------------------

    def floors(self, data: Data) -> None:
        """Plain parallel range GETs thrown away, from both servers: what any client must at least spend."""
        copied = self.reader.read("memcpy", Path("/"), data.bytes)
        self.numbers.add(data.name, report.MEMCPY, "warm", data.bytes / copied["seconds"] / 1e9)
        key = f"plain/{data.name}/{data.file}"
        self.prime([data.path])
        link = self.bed.work / "plain" / data.name
        if not link.exists():
            link.symlink_to(data.folder)
        if not (self.bed.s3.folder / key).exists():
            self.bed.s3.put_tree(f"plain/{data.name}", data.folder)
        self.prime([self.bed.s3.folder / key])
        servers = [("versitygw", self.bed.s3.process.pid, self.bed.s3.presigned(key))]
        if self.bed.nginx:
            servers.append(("nginx", self.bed.nginx.process.pid, self.bed.nginx.url(f"{data.name}/{data.file}")))
        for server, pid, url in servers:
            for parallel in GETS_IN_FLIGHT:
                before = machine.cpu_seconds([pid])
                seconds, cpu = self.plain_gets(server, url, data, parallel)
                who = f"plain GETs, {server}, {parallel} in flight"
                self.numbers.add(data.name, who, "cold", data.bytes / seconds / 1e9)
                self.numbers.add(data.name, who, "cpu", cpu / (data.bytes / 1e9))
                self.numbers.add(data.name, who, "server cpu", (machine.cpu_seconds([pid]) - before) / (data.bytes / 1e9))
        # One reference a round for the cold columns: the best of what the S3 server gave.
        now = {
            what: [self.numbers.of(data.name, f"plain GETs, versitygw, {n} in flight", what)[-1] for n in GETS_IN_FLIGHT]
            for what in ("cold", "cpu", "server cpu")
        }
        best = max(range(len(GETS_IN_FLIGHT)), key=lambda i: now["cold"][i])
        for what, values in now.items():
            self.numbers.add(data.name, report.PLAIN_GETS, what, values[best])

    def plain_gets(self, server: str, url: str, data: Data, parallel: int) -> tuple[float, float]:
        """Seconds, and processor seconds of the client."""
        if self.gets is None:
            told = run([sys.executable, str(Path(__file__).with_name("gets.py")), url, str(data.bytes), str(parallel), str(PART_BYTES)])
            answer = json.loads(told)
            return float(answer["seconds"]), float(answer["cpu"])
        if server == "versitygw":
            store, name = f"s3://bench/plain/{data.name}", data.file
        else:
            store, name = url.rsplit("/", 1)
        command = [str(self.gets), store, name, "--parallel", str(parallel), "--part", str(PART_BYTES), "--ways", "bare", "--json"]
        answer = json.loads(run(command, self.bed.s3.client_env()))
        way = answer["ways"]["bare"] if "ways" in answer else answer["bare"]
        return float(way["seconds"]), float(way["cpu_s_per_gb"]) * data.bytes / 1e9

    # ---- the columns -------------------------------------------------------------------------------------------------

    def round(self, contender: Contender, data: Data, columns: set[str]) -> None:
        self.prime(contender.stored(data))
        add = lambda what, value: self.numbers.add(data.name, contender.name, what, value)  # noqa: E731
        memory = isinstance(contender, Tmpfs)
        if contender.mounts and not contender.reads:
            with contender.serve(data) as live:
                if "warm load" in columns and self.loader and data.file.endswith(".safetensors"):
                    self.load(contender, data, live, "warm load", add)
        elif contender.mounts:
            if "first" in columns and not memory:
                self.settle(data)
                with contender.serve(data) as live:
                    add("first", self.reader.read("first byte", live.folder / data.file)["seconds"] * 1e3)
            self.settle(data)
            with contender.serve(data) as live:
                path = live.folder / data.file
                if not memory:
                    self.cold(contender, data, live, path, add)
                if columns & {"warm", "mmap", "direct", "random", "many", "warm load"}:
                    self.warm(contender, data, live, path, columns, add)
        if "cold load" in columns and self.loader and data.file.endswith(".safetensors") and not memory:
            self.settle(data)
            with contender.serve(data) if contender.mounts else contextlib.nullcontext(None) as served:
                self.load(contender, data, served, "cold load", add)

    def cold(self, contender: Contender, data: Data, live: Live, path: Path, add: Callable[[str, float], None]) -> None:
        server = [self.bed.s3.process.pid]
        before, served = machine.cpu_seconds(live.pids), machine.cpu_seconds(server)
        seen = self.reader.read("read 1 MiB", path)
        if seen["bytes"] != data.bytes:
            raise Failed(f"{int(seen['bytes'])} bytes read of {data.bytes}")
        add("cold", data.bytes / seen["seconds"] / 1e9)
        add("cpu", (seen["cpu"] + machine.cpu_seconds(live.pids) - before) / (data.bytes / 1e9))
        add("server cpu", (machine.cpu_seconds(server) - served) / (data.bytes / 1e9))

    def warm(
        self, contender: Contender, data: Data, live: Live, path: Path, columns: set[str], add: Callable[[str, float], None]
    ) -> None:
        # Twice: what is cached at all is then cached, and a file of modelfs is hot from the open after the one that filled it.
        self.reader.read("read 1 MiB", path)
        rate = lambda seen: seen["bytes"] / seen["seconds"] / 1e9  # noqa: E731
        if "warm" in columns:
            add("warm", rate(self.reader.read("read 1 MiB", path)))
        if "mmap" in columns:
            add("mmap", rate(self.reader.read("mmap sum", path)))
        if "direct" in columns:
            try:
                add("direct", rate(self.reader.read("O_DIRECT 1 MiB", path)))
            except Failed:
                self.numbers.note(f"{contender.name}: no O_DIRECT")
        if "random" in columns:
            # As many as take about half a second here.
            probe = self.reader.read("random 4 KiB", path, 50)
            count = int(min(20_000, max(100, 0.5 / (probe["seconds"] / 50))))
            seen = self.reader.read("random 4 KiB", path, count)
            add("random", seen["seconds"] / (seen["bytes"] / 4096) * 1e6)
        if "many" in columns:
            began = time.perf_counter()
            readers = [self.reader.start("read 1 MiB", path) for _ in range(READERS)]
            size = sum(self.reader.finish(reader)["bytes"] for reader in readers)
            add("many", size / (time.perf_counter() - began) / 1e9)
        if "warm load" in columns and self.loader and data.file.endswith(".safetensors"):
            self.load(contender, data, live, "warm load", add)

    def load(self, contender: Contender, data: Data, live: Live | None, what: str, add: Callable[[str, float], None]) -> None:
        assert self.loader is not None
        if max(self.numbers.of(data.name, contender.name, f"{what} seconds"), default=0) > SLOW_SECONDS:
            self.numbers.note(f"{contender.name}, {data.name}: one {what} only, it takes more than {SLOW_SECONDS} s")
            return
        whole = data.whole
        request = contender.load_model(data, live) if whole else contender.load(data, live)
        pids = live.pids if live else []
        before = machine.cpu_seconds(pids)
        told = self.loader(request)
        if "error" in told:
            raise Failed(f"{request['way']}: {told['error']}")
        wanted = self.sums.get(data.name)
        if wanted is None:
            plain: dict[str, object] = {"way": "safetensors", "paths": [str(data.folder / name) for name in sorted(p.name for p in data.folder.glob("*.safetensors"))]}
            wanted = self.sums[data.name] = self.loader(plain)
        if (told["bytes"], told["sum"]) != (wanted["bytes"], wanted["sum"]):
            raise Failed("WRONG BYTES: the tensors are not those of the source")
        add(what, told["bytes"] / told["seconds"] / 1e9)
        add(f"{what} seconds", told["seconds"])
        add(f"{what} cpu", (told["cpu"] + machine.cpu_seconds(pids) - before) / (told["bytes"] / 1e9))
        if not contender.mounts:
            self.numbers.add(data.name, contender.name, "load memory", max(0, told["memory"] - told["bytes"]) / (1 << 20))

    def compare(self, data: Data, contenders: list[Contender], columns: set[str]) -> list[Contender]:
        able = self.ready(contenders, data)
        for number in range(self.args.rounds):
            self.say(f"{data.name}, round {number + 1}: plain GETs")
            try:
                self.floors(data)
            except (Failed, OSError, KeyError, subprocess.TimeoutExpired) as error:
                self.numbers.note(f"plain GETs, {data.name}: {error}")
            # Another order every round.
            turn = number % max(1, len(able))
            for contender in [*able[turn:], *able[:turn]]:
                self.say(f"{data.name}, round {number + 1}: {contender.name}")
                try:
                    self.round(contender, data, columns)
                except (Failed, OSError, subprocess.TimeoutExpired) as error:
                    self.numbers.note(f"{contender.name}, {data.name}: {error}")
        self.sizes(data, able)
        return able

    def sizes(self, data: Data, contenders: list[Contender]) -> None:
        for contender in contenders:
            stored = sum(path.stat().st_size for path in contender.stored(data))
            if stored:
                self.numbers.add(data.name, contender.name, "stored", stored / data.all_bytes)

    def forget(self, data: Data) -> None:
        """The stored copies go; the next data set needs the room, and the page cache."""
        for prefix in self.bed.s3.folder.iterdir():
            shutil.rmtree(prefix / data.name, ignore_errors=True)

    # ---- proofs ------------------------------------------------------------------------------------------------------

    def proofs(self, data: Data, own: Modelfs, total_bytes: int) -> None:
        """Warm whole files cost the daemon nothing: its processor time before and after many gigabytes are read."""
        with own.serve(data) as live:
            path = live.folder / data.file
            self.reader.read("read 1 MiB", path)
            self.reader.read("read 1 MiB", path)
            before, read = machine.cpu_seconds(live.pids), 0.0
            while read < total_bytes:
                for way in ("read 1 MiB", "mmap sum"):
                    read += self.reader.read(way, path)["bytes"]
            self.numbers.add("proofs", own.name, "daemon cpu", machine.cpu_seconds(live.pids) - before)
            self.numbers.add("proofs", own.name, "bytes read", read)

    def narrow_link(self, data: Data, own: Modelfs) -> None:
        """A link held to 1 Gb/s, by benches/slow_store.sh: a cold read against plain GETs of the plain file."""
        script = Path(__file__).parents[1] / "slow_store.sh"
        if not script.exists() or not self.gets or not shutil.which("tc"):
            self.numbers.note("no narrow link: it needs benches/slow_store.sh, benches/gets.rs and tc (Debian: iproute2)")
            return
        store = self.bed.folder("sealed") / data.name
        try:
            own.seal(data, str(store))
            command = ["bash", str(script), "link", "--rounds", str(self.args.rounds), "--plain", str(data.path), "--path", data.file]
            command += ["--sealed", str(store), "--model", data.name, "--key", f"file:{own.keys}/key", "--trust", f"{own.keys}/signing.key.pub"]
            told = run(command, {"MODELFS": str(self.bed.modelfs), "GETS": str(self.gets), "SLOW_LINE": "/bin/false"})
            found = re.search(r"mount cold.* / plain GETs.*: ([0-9.]+)", told)
            if not found:
                raise Failed("benches/slow_store.sh printed no ratio")
            self.numbers.add(data.name, own.name, "narrow link", float(found[1]))
        except (Failed, subprocess.TimeoutExpired) as error:
            self.numbers.note(f"narrow link, {data.name}: {error}")
        finally:
            shutil.rmtree(store, ignore_errors=True)

    def models(self, data: Data, contenders: list[Contender]) -> list[Contender]:
        """Whole-model loads, each contender with its own copy in the bucket, cold; and warm where it can stay warm."""
        able = []
        for contender in contenders:
            self.say(f"{data.name}: {contender.name} stores it")
            try:
                contender.store(data)
                able.append(contender)
            except (Failed, OSError, subprocess.TimeoutExpired) as error:
                self.numbers.note(f"{contender.name}, {data.name}: left out: {error}")
        for number in range(self.args.rounds):
            turn = number % max(1, len(able))
            for contender in [*able[turn:], *able[:turn]]:
                self.say(f"{data.name}, round {number + 1}: {contender.name}")
                add = lambda what, value, who=contender.name: self.numbers.add(data.name, who, what, value)  # noqa: E731
                try:
                    self.prime(contender.stored(data))
                    self.settle(data)
                    with contender.serve(data) if contender.mounts else contextlib.nullcontext(None) as live:
                        memory = isinstance(contender, Tmpfs)
                        if not memory:
                            self.load(contender, data, live, "cold load", add)
                        if memory or contender.group == "modelfs":
                            if not memory:
                                # Whatever the load left unread, and the opens that find the files whole.
                                for file in sorted(data.folder.glob("*.safetensors")):
                                    assert live is not None
                                    self.reader.read("read 1 MiB", live.folder / file.name)
                            self.load(contender, data, live, "warm load", add)
                except (Failed, OSError, subprocess.TimeoutExpired) as error:
                    self.numbers.note(f"{contender.name}, {data.name}: {error}")
        self.sizes(data, able)
        return able


# ---- setting up --------------------------------------------------------------------------------------------------------


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
        "mountpoint-s3": "0.11.0 (crate mountpoint-s3-fs)" if bed.found("mountpoint-s3-0.11.0", "mountpoint-s3-peer") else "not there",
    }
    python = bed.cache / "bench-peers" / "bin" / "python"
    if python.exists():
        names = ["torch", "transformers", "safetensors", "tensorizer", "runai-model-streamer", "fastsafetensors"]
        code = f"from importlib.metadata import version as v; import json; print(json.dumps({{n: v(n) for n in {names}}}))"
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
    run([str(python), str(Path(__file__).with_name("data.py")), str(args.data), "--mib", str(args.size), "--minilm", str(minilm), *made])
    found = {}
    for kind in made:
        folder = args.data / f"{kind}-{args.size}"
        found[kind] = Data(kind, folder, next(path.name for path in folder.iterdir()))
    if "llama-bf16" in kinds:
        folder = cache / "models-1/llama"
        if folder.is_dir():
            found["llama-bf16"] = Data("llama-bf16", folder, min(path.name for path in folder.glob("*.safetensors")), whole=True)
    return found


ALL_COLUMNS = {"first", "cold", "cold load", "warm", "mmap", "direct", "random", "many", "warm load"}
KINDS = ["minilm-bf16", "minilm-f16", "minilm-f32", "normal-bf16", "random", "gguf-q4k"]
# What is read through a narrow link as well.
LINK = ("minilm-bf16", "normal-bf16", "random")
# Who is in the shorter comparisons by kind of data.
SHORT = ("modelfs", "modelfs, open=whole", "modelfs, whole, no codec", "mountpoint-s3", "rclone crypt")
MODEL = ("tmpfs", "modelfs", "modelfs, open=whole", "rclone", "s3fs", "mountpoint-s3", "Run:ai streamer", "rclone crypt", "tensorizer, encrypted")
QUICK = ("tmpfs", "modelfs", "modelfs, open=whole", "rclone", "mountpoint-s3", "rclone crypt")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches/run.sh peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, metavar="MIB", help="of each file [512; with --quick 96]")
    parser.add_argument("--rounds", type=int, help="[3; with --quick 1]")
    parser.add_argument("--quick", action="store_true", help="small files, one round, few peers: a smoke test of some minutes")
    parser.add_argument("--only", action="append", metavar="NAME", help="only contenders whose name holds this; give it again for more")
    parser.add_argument("--kinds", default=None, help="only these kinds of data, by commas: " + ",".join([*KINDS, "llama-bf16"]))
    parser.add_argument("--no-torch", action="store_true", help="leave out what needs torch")
    parser.add_argument("--no-link", action="store_true", help="leave out the link of 1 Gb/s (network namespaces, tc)")
    parser.add_argument("--proof-gb", type=float, default=None, help="how much is read warm to see the daemon idle [10; with --quick 1]")
    parser.add_argument("--dir", type=Path, default=Path(os.environ.get("TMPDIR", "/var/tmp")), help="where the stores lie meanwhile")
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
    args.kinds = args.kinds.split(",") if args.kinds else (["minilm-bf16", "random"] if args.quick else [*KINDS, "llama-bf16"])
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
            numbers.note("no whole-model loads: they need torch and the model (tests/parts/install.sh clients-torch models bench-peers)")
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
        (args.out / "benchmark.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
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
