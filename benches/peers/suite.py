"""The measuring: a reading process or a loading one against one contender at a time, in rounds; every answer checked.

Out: `Numbers`, one value a round for each data set, contender and column. What a contender does wrong, by an error or
by wrong bytes, becomes a note and leaves that contender without the number; the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import report
from contenders import Bed, Contender, Data, Live, Modelfs, Tmpfs
from servers import Failed, run

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
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

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


@contextlib.contextmanager
def flipped(path: Path) -> Iterator[None]:
    """One bit in the middle of the file is another while the block runs."""
    at = path.stat().st_size // 2

    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x40]))

    flip()
    try:
        yield
    finally:
        flip()


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
    def __init__(
        self, args: argparse.Namespace, bed: Bed, reader: Reader, gets: Path | None, loader: Loader | None
    ) -> None:
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
        able: list[Contender] = []
        for contender in contenders:
            if (
                isinstance(contender, Modelfs)
                and contender.codec == "none"
                and not self.codec_matters(able, contender, data)
            ):
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
        if coded and abs(coded.stored_bytes(data) - plain.stored_bytes(data)) < data.all_bytes // 1000:
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

    def prove(self, contenders: list[Contender], data: Data) -> None:
        """That a wrong byte is noticed: one is changed in the bucket, below a contender that does not verify."""
        victims = [contender for contender in contenders if contender.group == "plain"]
        reading = next((contender for contender in victims if contender.mounts), None)
        loading = next((contender for contender in victims if not contender.mounts), None)
        if not reading and not loading:
            self.numbers.note("not proved that a wrong byte would be noticed: nobody here serves the plain file")
            return
        stored = self.bed.s3.folder / "plain" / data.name / data.file
        with flipped(stored):
            for contender in filter(None, (reading, loading)):
                try:
                    if contender.mounts:
                        self.check(contender, data)
                    elif self.loader and data.file.endswith(".safetensors"):
                        self.load(contender, data, None, "proof", lambda _what, _value: None)
                    else:
                        continue
                except Failed as error:
                    if "WRONG BYTES" not in str(error):
                        raise
                    continue
                raise Failed(
                    f"a changed byte went unnoticed below {contender.name}: no number of this run can be believed"
                )

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
                self.numbers.add(
                    data.name, who, "server cpu", (machine.cpu_seconds([pid]) - before) / (data.bytes / 1e9)
                )
        # One reference a round for the cold columns: the best of what the S3 server gave.
        now = {
            what: [
                self.numbers.of(data.name, f"plain GETs, versitygw, {n} in flight", what)[-1] for n in GETS_IN_FLIGHT
            ]
            for what in ("cold", "cpu", "server cpu")
        }
        best = max(range(len(GETS_IN_FLIGHT)), key=lambda i: now["cold"][i])
        for what, values in now.items():
            self.numbers.add(data.name, report.PLAIN_GETS, what, values[best])

    def plain_gets(self, server: str, url: str, data: Data, parallel: int) -> tuple[float, float]:
        """Seconds, and processor seconds of the client."""
        if self.gets is None:
            told = run(
                [
                    sys.executable,
                    str(Path(__file__).with_name("gets.py")),
                    url,
                    str(data.bytes),
                    str(parallel),
                    str(PART_BYTES),
                ]
            )
            answer = json.loads(told)
            return float(answer["seconds"]), float(answer["cpu"])
        if server == "versitygw":
            store, name = f"s3://bench/plain/{data.name}", data.file
        else:
            store, name = url.rsplit("/", 1)
        command = [
            str(self.gets),
            store,
            name,
            "--parallel",
            str(parallel),
            "--part",
            str(PART_BYTES),
            "--ways",
            "bare",
            "--json",
        ]
        answer = json.loads(run(command, self.bed.s3.client_env()))
        way = answer["ways"]["bare"] if "ways" in answer else answer["bare"]
        return float(way["seconds"]), float(way["cpu_s_per_gb"]) * data.bytes / 1e9

    # ---- the columns -------------------------------------------------------------------------------------------------

    def round(self, contender: Contender, data: Data, columns: set[str]) -> None:
        self.prime(contender.stored(data))
        add = functools.partial(self.numbers.add, data.name, contender.name)
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
        self,
        contender: Contender,
        data: Data,
        live: Live,
        path: Path,
        columns: set[str],
        add: Callable[[str, float], None],
    ) -> None:
        # Twice: what is cached at all is then cached, and a file of modelfs is hot from the open after the one that
        # filled it.
        self.reader.read("read 1 MiB", path)

        def rate(way: str) -> float:
            seen = self.reader.read(way, path)
            return seen["bytes"] / seen["seconds"] / 1e9

        if "warm" in columns:
            add("warm", rate("read 1 MiB"))
        if "mmap" in columns:
            add("mmap", rate("mmap sum"))
        if "direct" in columns:
            try:
                add("direct", rate("O_DIRECT 1 MiB"))
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

    def load(
        self, contender: Contender, data: Data, live: Live | None, what: str, add: Callable[[str, float], None]
    ) -> None:
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
            plain: dict[str, object] = {
                "way": "safetensors",
                "paths": [
                    str(data.folder / name) for name in sorted(p.name for p in data.folder.glob("*.safetensors"))
                ],
            }
            wanted = self.sums[data.name] = self.loader(plain)
        if (told["bytes"], told["sum"]) != (wanted["bytes"], wanted["sum"]):
            raise Failed("WRONG BYTES: the tensors are not those of the source")
        add(what, told["bytes"] / told["seconds"] / 1e9)
        add(f"{what} seconds", told["seconds"])
        add(f"{what} cpu", (told["cpu"] + machine.cpu_seconds(pids) - before) / (told["bytes"] / 1e9))
        if not contender.mounts:
            self.numbers.add(
                data.name, contender.name, "load memory", max(0, told["memory"] - told["bytes"]) / (1 << 20)
            )

    def compare(self, data: Data, contenders: list[Contender], columns: set[str]) -> list[Contender]:
        able = self.ready(contenders, data)
        if len(columns) > 1:
            self.say(f"{data.name}: a changed byte is noticed")
            self.prove(able, data)
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
            stored = contender.stored_bytes(data)
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
            self.numbers.note(
                "no narrow link: it needs benches/slow_store.sh, benches/gets.rs and tc (Debian: iproute2)"
            )
            return
        store = self.bed.folder("sealed") / data.name
        try:
            own.seal(data, str(store))
            command = [
                "bash",
                str(script),
                "link",
                "--rounds",
                str(self.args.rounds),
                "--plain",
                str(data.path),
                "--path",
                data.file,
            ]
            command += [
                "--sealed",
                str(store),
                "--model",
                data.name,
                "--key",
                f"file:{own.keys}/key",
                "--trust",
                f"{own.keys}/signing.key.pub",
            ]
            told = run(command, {"MODELFS": str(self.bed.modelfs), "GETS": str(self.gets), "SLOW_LINE": "/bin/false"})
            found = re.search(r"mount cold.* / plain GETs.*: ([0-9.]+)", told)
            if not found:
                raise Failed("benches/slow_store.sh printed no ratio")
            ratio = float(found[1])
            # Nothing is stored in less than a third; more than that is a measurement that went wrong.
            if ratio > 3:
                raise Failed(f"a ratio of {ratio} cannot be: one of the two sides did not read everything")
            self.numbers.add(data.name, own.name, "narrow link", ratio)
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
                add = functools.partial(self.numbers.add, data.name, contender.name)
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
