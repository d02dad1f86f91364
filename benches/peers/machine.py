"""What the machine is and what processes on it used: processor time, memory, versions. Linux's /proc, nothing else."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
SAMPLE_SECONDS = 0.02
# Linux 5.14; not named in Python's mmap.
MADV_POPULATE_WRITE = 23


def describe() -> dict[str, object]:
    """Processor, cores, memory, kernel. No host name, no path."""
    cpuinfo = Path("/proc/cpuinfo").read_text()

    def field(name: str) -> str:
        return next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith(name)), "unknown"
        )

    return {
        "cpu": field("model name"),
        "cpu_family": field("cpu family"),
        "cpu_model": field("model\t"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(meminfo("MemTotal") / (1 << 30), 1),
        "kernel": os.uname().release,
        "architecture": os.uname().machine,
        "virtual": "hypervisor" in field("flags"),
    }


def meminfo(*names: str) -> int:
    """The sum of these lines of /proc/meminfo, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) << 10 for name in names)


def touch_free_memory(size: int) -> None:
    """Takes that much free memory, touches every page and gives it back.

    A hypervisor may have taken free pages back from a virtual machine; giving them again at the first touch takes ten
    times as long as anything measured here, and would be counted against whoever happens to touch them first.
    """
    size = min(size, meminfo("MemAvailable") // 2, meminfo("MemFree") * 3 // 4) // (2 << 20) * (2 << 20)
    if size <= 0:
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(MADV_POPULATE_WRITE)


def with_children(pids: list[int]) -> list[int]:
    """These processes and all below them that are there now."""
    found, waiting = [], list(pids)
    while waiting:
        pid = waiting.pop()
        if pid in found:
            continue
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # It has just ended.
    return found


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes, their threads, and their children, in steps of one tick."""
    ticks = 0
    for pid in with_children(pids):
        try:
            # After the name, which may hold anything but a closing bracket at its end.
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks * TICK_SECONDS


def anonymous(pids: list[int]) -> int:
    """Bytes of anonymous memory of these processes and all below them."""
    total = 0
    for pid in with_children(pids):
        try:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) << 10
        except OSError:
            continue
    return total


class MemoryPeak:
    """While in its block: the most that was held at once by `pids` and by the machine's shared memory and page cache,
    above what was there at the start. So whatever a mount and the kernel keep of a file counts once for each copy of
    it; only one thing may be measured at a time.
    """

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._done = threading.Event()
        self.bytes = 0

    def _held(self) -> int:
        # Cached holds shared memory too. Nothing else reads new files meanwhile, so what grows is this contender's.
        return anonymous(self._pids) + meminfo("Cached")

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, self._held() - self._start)

    def __enter__(self) -> MemoryPeak:
        # The daemons' own size counts; that of our readers, which start later, too.
        self._start = meminfo("Cached")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
