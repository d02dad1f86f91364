"""What every client check shares: its arguments, its tally of checks, and the proof that it can fail.

A check compares a model as an unmodified program reads it from the mount with the plain directory it was sealed from.
It exits 0 when everything agreed, 1 when anything did not. With --self-test it takes the plain directory alone, copies
it, flips one byte of the copy, and exits 0 only if the unharmed copy passes and the harmed one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Step:
    """One check in progress; `bytes_read` makes its line carry a rate, over the time spent inside `reading`."""

    bytes_read: int = 0
    note: str = ""
    reading_seconds: float = 0.0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads the mount, so that reading the plain side and comparing are not in the rate."""
        began = time.perf_counter()
        yield
        self.reading_seconds += time.perf_counter() - began


@dataclass
class Tally:
    passed: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[Step]:
        step = Step()
        began = time.perf_counter()
        try:
            yield step
        # Whatever a client raises over the mount is a failed check, and the checks after it must still run.
        except Exception as error:
            self.failed += 1
            self.failures.append(name)
            print(f"FAIL  {name}: {type(error).__name__}: {error}", flush=True)
            return
        seconds = time.perf_counter() - began
        self.passed += 1
        rate = f"  {step.bytes_read / (step.reading_seconds or seconds) / 1e9:.2f} GB/s" if step.bytes_read else ""
        note = f"  {step.note}" if step.note else ""
        print(f"ok    {name}  {seconds:.2f} s{rate}{note}", flush=True)


class Differs(Exception):
    """The mount answered something else than the plain directory holds."""


def require_equal(seen: object, wanted: object, what: str) -> None:
    if seen != wanted:
        raise Differs(f"{what}: mount has {seen!r}, plain has {wanted!r}")


def files_below(root: Path, suffix: str = "") -> list[Path]:
    """Relative paths of all regular files below `root`, sorted."""
    return sorted(p.relative_to(root) for p in root.rglob(f"*{suffix}") if p.is_file())


def first_difference(a: memoryview, b: memoryview) -> str:
    if len(a) != len(b):
        return f"{len(a)} bytes against {len(b)}"
    step = 1 << 20
    for at in range(0, len(a), step):
        if a[at : at + step] != b[at : at + step]:
            for i in range(at, min(at + step, len(a))):
                if a[i] != b[i]:
                    return f"first difference at byte {i} of {len(a)}"
    return "no difference"


def flip_byte(path: Path, offset: int | None = None, seed: int = 1) -> int:
    """Changes one byte of `path` and returns where; by default somewhere in its second half, past any header."""
    size = path.stat().st_size
    at = random.Random(seed).randrange(size // 2, size) if offset is None else offset
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 0x40]))
    path.chmod(mode)
    return at


def _prove_it_can_fail(run: Callable[[Path, Path, Tally], None], plain: Path, victim: Callable[[Path], Path]) -> int:
    with tempfile.TemporaryDirectory(prefix="modelfs-self-test-") as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(plain, copy)
        for path in files_below(copy):
            # The mount serves files without write bits; the copy must look like it.
            os.chmod(copy / path, 0o555 if (copy / path).stat().st_mode & 0o111 else 0o444)
        verdicts: list[Tally] = []
        for harmed in (False, True):
            if harmed:
                path = victim(copy)
                at = flip_byte(path)
                print(f"self-test: flipped byte {at} of {path.relative_to(copy)}")
            tally = Tally()
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                run(plain, copy, tally)
            print("".join(f"  | {line}\n" for line in out.getvalue().splitlines()), end="")
            verdicts.append(tally)
    clean, dirty = verdicts
    if clean.failed or not clean.passed:
        print(f"self-test FAILED: an unharmed copy did not pass ({clean.passed} passed, {clean.failed} failed)")
        return 1
    if not dirty.failed:
        print("self-test FAILED: a flipped byte went unnoticed")
        return 1
    print(f"self-test passed: noticed by {len(dirty.failures)} of {dirty.passed + dirty.failed} checks")
    return 0


def largest(root: Path, suffix: str = "") -> Path:
    return root / max(files_below(root, suffix), key=lambda p: (root / p).stat().st_size)


def main(
    doc: str | None,
    run: Callable[[Path, Path, Tally], None],
    victim: Callable[[Path], Path] = largest,
) -> None:
    """Parses the command line every check has, runs it, and exits with its verdict."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path, help="the directory the model was sealed from")
    parser.add_argument("mounted", type=Path, nargs="?", help="the same model on the mount")
    parser.add_argument(
        "--self-test", action="store_true", help="prove on a harmed copy of PLAIN that the check can fail"
    )
    args = parser.parse_args()
    if args.self_test:
        sys.exit(_prove_it_can_fail(run, args.plain, victim))
    if args.mounted is None:
        parser.error("MOUNTED is required without --self-test")
    tally = Tally()
    run(args.plain, args.mounted, tally)
    if tally.passed + tally.failed == 0:
        print(f"FAIL  nothing to check below {args.plain}")
        sys.exit(1)
    print(f"{Path(sys.argv[0]).stem}: {tally.passed} passed, {tally.failed} failed")
    sys.exit(1 if tally.failed else 0)
