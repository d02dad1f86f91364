#!/usr/bin/env bash
# How fast `modelfs scan` goes through an image of plain layers, against `cat` of the same file: alternating in rounds, from the
# disk (what of the file is in memory is dropped before each) and from memory. Prints each round's ratio and their median.
#
#   benches/scan.sh [--size-mib 2048] [--rounds 5] [--dir /var/tmp] [--keep]
#
# The image is made: two layers, three quarters of the bytes in files of 2 to 200 KiB as systems have them, the rest in
# files of 64 MiB. MODELFS names another binary than target/release/modelfs. Nothing is left behind unless --keep is given.
set -euo pipefail
cd "$(dirname "$0")/.."

size=2048 rounds=5 dir=${TMPDIR:-/var/tmp} keep=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --size-mib) size=$2; shift 2 ;;
    --rounds) rounds=$2; shift 2 ;;
    --dir) dir=$2; shift 2 ;;
    --keep) keep=1; shift ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-target}/release/modelfs}
[[ -x $modelfs ]] || { echo "$0: $modelfs is not built (cargo build --release --locked)" >&2; exit 1; }
image=$dir/modelfs-scan-bench-$size.tar
[[ -n $keep ]] || trap 'rm -f "$image"' EXIT

[[ -s $image ]] || python3 - "$image" "$size" <<'PYTHON'
import io, json, random, sys, tarfile

path, mib = sys.argv[1], int(sys.argv[2])
dice = random.Random(7)
noise = dice.randbytes((64 << 20) + 4096)


class Layer(io.RawIOBase):
    """The bytes of a layer's tar, made as they are read: a layer is larger than what one wants to hold."""

    def __init__(self, sizes):
        self.members = iter([*enumerate(sizes), None])
        self.rest = memoryview(b"")

    def readable(self):
        return True

    def readinto(self, room):
        while not self.rest:
            try:
                member = next(self.members)
            except StopIteration:
                return 0
            if member is None:
                self.rest = memoryview(bytes(1024))
            else:
                number, length = member
                info = tarfile.TarInfo(f"usr/lib/{number % 100}/file{number}")
                info.size = length
                start = dice.randrange(4096)
                body = noise[start : start + length]
                self.rest = memoryview(info.tobuf() + body + bytes(-length % 512))
        n = min(len(room), len(self.rest))
        room[:n] = self.rest[:n]
        self.rest = self.rest[n:]
        return n


def sizes(total, large):
    while total > 0:
        one = large or int(dice.lognormvariate(10.3, 1.1)) % (200 << 10) + 2048
        total -= one
        yield one


def length(members):
    return sum(512 + (one + 511) // 512 * 512 for one in members) + 1024


with tarfile.open(path, "w") as image:
    names = []
    for number, (total, large) in enumerate([(mib * 3 // 4 << 20, 0), (mib // 4 << 20, 64 << 20)]):
        members = list(sizes(total, large))
        info = tarfile.TarInfo(f"{number}/layer.tar")
        info.size = length(members)
        names.append(info.name)
        image.addfile(info, io.BufferedReader(Layer(members), 1 << 20))
    for name, value in [("config.json", {}), ("manifest.json", [{"Config": "config.json", "RepoTags": ["bench:1"], "Layers": names}])]:
        text = json.dumps(value).encode()
        info = tarfile.TarInfo(name)
        info.size = len(text)
        image.addfile(info, io.BytesIO(text))
PYTHON

python3 - "$image" "$modelfs" "$rounds" <<'PYTHON'
import os, statistics, subprocess, sys, time

image, modelfs, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
size = os.path.getsize(image)
print(f"{image}: {size / 1e9:.2f} GB")


def forget():
    with open(image, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def took(command):
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


cat, scan = ["cat", image], [modelfs, "scan", "--quiet", "--fail-on", "never", image]
for name, before in [("from the disk", forget), ("from memory", lambda: None)]:
    took(cat)
    ratios = []
    for number in range(rounds):
        times = {}
        # Whoever comes second may find the disk busier or idler: they take turns.
        for what, command in [("cat", cat), ("scan", scan)][:: -1 if number % 2 else 1]:
            before()
            times[what] = took(command)
        ratios.append(times["cat"] / times["scan"])
        print(f"{name}: cat {size / times['cat'] / 1e9:.2f} GB/s, scan {size / times['scan'] / 1e9:.2f} GB/s, "
              f"scan/cat {ratios[-1]:.2f}")
    print(f"{name}: median scan/cat {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
PYTHON
