"""The whole tree as ordinary programs see it: names, sizes, modes, and every byte by every way of reading.

Ways: sha256 over read(2), a map, pread at random offsets, O_DIRECT into aligned buffers, sendfile, sha256sum, and
`cp -r` to a tmpfs followed by `diff -r`. The mount serves regular files 0444 (0555 if the source was executable)
and no empty directories.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from common import Differs, Step, Tally, files_below, first_difference, main, require_equal

PIECE = 1 << 20
PREADS_PER_FILE = 200
SEED = 20261122


def listing(root: Path) -> dict[str, tuple[str, int]]:
    """Relative path -> (kind and mode, size), with the modes that a read-only mount serves."""
    found: dict[str, tuple[str, int]] = {}
    for folder, _, files in os.walk(root, onerror=_raise):
        for name in files:
            path = Path(folder, name)
            info = path.lstat()
            if not stat.S_ISREG(info.st_mode):
                raise Differs(f"{path} is not a regular file")
            found[str(path.relative_to(root))] = (oct(0o555 if info.st_mode & 0o111 else 0o444), info.st_size)
    return found


def _raise(error: OSError) -> None:
    raise error


def names_sizes_modes(plain: Path, mounted: Path, step: Step) -> None:
    seen, wanted = listing(mounted), listing(plain)
    require_equal(sorted(seen), sorted(wanted), "names")
    for name, answer in wanted.items():
        require_equal(seen[name], answer, f"mode and size of {name}")
        mode = stat.S_IMODE((mounted / name).stat().st_mode)
        if mode & 0o222:
            raise Differs(f"{name} has write bits: {mode:o}")
    for folder in {Path(name).parent for name in wanted}:
        require_equal(sorted(os.listdir(mounted / folder)), sorted(_served(plain, folder)), f"listing of {folder}")
    step.note = f"{len(wanted)} files"


def _served(plain: Path, folder: Path) -> list[str]:
    entries = (plain / folder).iterdir()
    return [e.name for e in entries if e.is_file() or files_below(e)]


def sha256_by_read(path: Path, step: Step) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while True:
            with step.reading():
                piece = file.read(PIECE)
            if not piece:
                return digest.hexdigest()
            digest.update(piece)
            step.bytes_read += len(piece)


def by_read(plain: Path, mounted: Path, step: Step) -> None:
    require_equal(sha256_by_read(mounted, step), sha256_by_read(plain, Step()), "sha256")


def by_map(plain: Path, mounted: Path, step: Step) -> None:
    with plain.open("rb") as a, mounted.open("rb") as b:
        with (
            mmap.mmap(a.fileno(), 0, access=mmap.ACCESS_READ) as wanted,
            mmap.mmap(b.fileno(), 0, access=mmap.ACCESS_READ) as seen,
        ):
            for at in range(0, len(wanted), PIECE):
                with step.reading():
                    piece = seen[at : at + PIECE]
                step.bytes_read += len(piece)
                if piece != wanted[at : at + PIECE]:
                    with memoryview(seen) as x, memoryview(wanted) as y:
                        where = first_difference(x, y)
                    raise Differs(where)


def by_random_pread(plain: Path, mounted: Path, step: Step) -> None:
    size = plain.stat().st_size
    # The name is in the seed, so that files differ in their offsets and every run asks the same ones.
    chance = random.Random(f"{SEED} {plain.name}")
    with plain.open("rb") as a, mounted.open("rb") as b:
        for _ in range(PREADS_PER_FILE):
            at = chance.randrange(size + 1)
            length = chance.choice([1, 7, 512, 4096, 65535, 65536, 65537, 1 << 20, 3 << 20])
            with step.reading():
                seen = os.pread(b.fileno(), length, at)
            require_equal(len(seen), min(length, size - at), f"length of the answer to {length} bytes at {at}")
            if seen != os.pread(a.fileno(), length, at):
                raise Differs(f"{length} bytes at {at}")
            step.bytes_read += len(seen)


def by_direct_read(plain: Path, mounted: Path, step: Step) -> None:
    buffer = mmap.mmap(-1, 4 * PIECE)
    descriptor = os.open(mounted, os.O_RDONLY | os.O_DIRECT)
    at = 0
    try:
        with plain.open("rb") as reference:
            while True:
                with step.reading():
                    count = os.readv(descriptor, [buffer])
                if reference.read(len(buffer)) != buffer[:count]:
                    raise Differs(f"within {len(buffer)} bytes at {at}")
                if count == 0:
                    return
                at += count
                step.bytes_read += count
    finally:
        os.close(descriptor)
        buffer.close()


def by_sendfile(plain: Path, mounted: Path, step: Step) -> None:
    with tempfile.TemporaryFile(dir=_memory()) as out, mounted.open("rb") as file:
        size, at = mounted.stat().st_size, 0
        with step.reading():
            while at < size:
                count = os.sendfile(out.fileno(), file.fileno(), at, size - at)
                if count == 0:
                    raise Differs(f"sendfile ended at {at} of {size}")
                at += count
        step.bytes_read += size
        out.seek(0)
        require_equal(hashlib.file_digest(out, "sha256").hexdigest(), sha256_by_read(plain, Step()), "sha256")


def by_sha256sum(plain: Path, mounted: Path, step: Step) -> None:
    # The plain side is hashed here: sha256sum may be twenty times slower, and only its reading is of interest.
    names = files_below(plain)
    wanted = "".join(f"{sha256_by_read(plain / name, Step())}  {name}\n" for name in names)
    with step.reading():
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet"], cwd=mounted, check=True, input=wanted, text=True
        )
    step.bytes_read = sum((plain / name).stat().st_size for name in names)


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def by_copy(plain: Path, mounted: Path, step: Step) -> None:
    size = sum((plain / name).stat().st_size for name in files_below(plain))
    room = shutil.disk_usage(_memory() or tempfile.gettempdir()).free
    scratch = _memory() if room > 2 * size else None
    with tempfile.TemporaryDirectory(prefix="modelfs-copy-", dir=scratch) as copy:
        with step.reading():
            subprocess.run(["cp", "-r", "--", str(mounted), f"{copy}/tree"], check=True)
        step.bytes_read = size
        difference = subprocess.run(["diff", "-r", "--", str(plain), f"{copy}/tree"], capture_output=True, text=True)
        if difference.returncode != 0:
            raise Differs(difference.stdout.strip()[:400] or difference.stderr.strip()[:400])


def run(plain: Path, mounted: Path, tally: Tally) -> None:
    with tally.check("names, sizes, modes") as step:
        names_sizes_modes(plain, mounted, step)
    ways = {
        "read": by_read,
        "map": by_map,
        "random pread": by_random_pread,
        "O_DIRECT": by_direct_read,
        "sendfile": by_sendfile,
    }
    for label, way in ways.items():
        with tally.check(f"{label}: every file") as step:
            for name in files_below(plain):
                # An empty file cannot be mapped (EINVAL), on any filesystem.
                if way is by_map and (plain / name).stat().st_size == 0:
                    continue
                try:
                    way(plain / name, mounted / name, step)
                except (Differs, OSError) as error:
                    raise Differs(f"{name}: {error}") from error
    with tally.check("sha256sum") as step:
        by_sha256sum(plain, mounted, step)
    with tally.check("cp -r, then diff -r") as step:
        by_copy(plain, mounted, step)


if __name__ == "__main__":
    main(__doc__, run)
