#!/usr/bin/env bash
# The POSIX suite pjdfstest, as far as it can say anything about a read-only mount.
#
#   pjdfstest.sh MNT      MNT is a directory on the mount; PJDFSTEST names the binary (default: from PATH)
#
# Every case of pjdfstest first makes files in the directory under test; its EROFS cases then remount that same
# filesystem read-only. A filesystem that was never writable can run none of them: tests/clients/readonly_suite.py asks
# those questions instead. What is left for pjdfstest, and is run here:
#   1. directly on MNT it must end at its first step, refused with EROFS;
#   2. as root, on an overlay whose lower layer is MNT and whose upper layer is a tmpfs (a common way to give a program
#      a writable copy of a model): every case must end as it does on an overlay above an ordinary directory (some fail
#      there: overlayfs takes no 0/0 devices), and MNT must be unchanged. This shows that MNT serves as a lower layer;
#      the refusals in it are overlayfs's own.
set -euo pipefail

mnt=$(realpath "$1")
pjdfstest=${PJDFSTEST:-pjdfstest}
scratch=$(mktemp -d)
mounted=()
cleanup() {
  for at in "${mounted[@]}"; do umount "$at" || umount --lazy "$at"; done
  rm -rf "$scratch"
}
trap cleanup EXIT

# naptime is longer than the clock tick that timestamps are taken from: 1 ms makes five cases fail on any filesystem.
cat >"$scratch/pjdfstest.toml" <<TOML
[features]
posix_fallocate = {}
[settings]
naptime = 0.05
allow_remount = true
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"], ["games", "games"]]
TOML

failed=0
if "$pjdfstest" -c "$scratch/pjdfstest.toml" -p "$mnt" rmdir >"$scratch/direct" 2>&1; then
  echo "FAIL  pjdfstest made files on the mount"
  failed=1
elif grep -q 'Read-only file system' "$scratch/direct"; then
  echo "ok    pjdfstest on the mount itself: refused with EROFS at its first step"
else
  echo "FAIL  pjdfstest on the mount itself: $(head -1 "$scratch/direct")"
  failed=1
fi

if [[ $EUID != 0 ]]; then
  echo "SKIPPED  pjdfstest on an overlay above the mount: needs root"
  exit $failed
fi
mkdir -p "$scratch"/{layers,top}
mount -t tmpfs tmpfs "$scratch/layers"
mounted=("$scratch/layers")
mkdir "$scratch/layers/ordinary"
# pjdfstest's other users must reach the directory it works in.
chmod 755 "$scratch" "$scratch/layers"

# outcomes LOWER NAME: pjdfstest on an overlay above LOWER; one line a case, in $scratch/NAME.
outcomes() {
  mkdir -m 755 "$scratch/layers/$2" "$scratch/layers/$2"/{upper,work}
  mount -t overlay overlay "$scratch/top" \
    -o "lowerdir=$1,upperdir=$scratch/layers/$2/upper,workdir=$scratch/layers/$2/work"
  mounted=("$scratch/top" "${mounted[@]}")
  diff -r "$1" "$scratch/top" >/dev/null || { echo "FAIL  an overlay above $1 shows other content"; failed=1; }
  "$pjdfstest" -c "$scratch/pjdfstest.toml" -p "$scratch/top" >"$scratch/log" 2>/dev/null || true
  grep -E ' (ok|FAILED|skipped)$' "$scratch/log" | sort >"$scratch/$2" || true
  umount "$scratch/top"
  mounted=("${mounted[@]:1}")
}
tree() { (cd "$mnt" && find . -printf '%p %s %m\n' | sort); }
before=$(tree)
# Cases that compare times fail by chance where the machine stalls; what the mount does to one, it does each time.
for try in 1 2 3; do
  outcomes "$scratch/layers/ordinary" "wanted-$try"
  outcomes "$mnt" "seen-$try"
  if diff "$scratch/wanted-$try" "$scratch/seen-$try" >"$scratch/difference"; then break; fi
done
passed=$(grep -c ' ok$' "$scratch/seen-$try" || true)
if ((passed > 100)) && [[ ! -s $scratch/difference ]]; then
  echo "ok    pjdfstest on an overlay above the mount: as above an ordinary directory," \
    "$passed of $(wc -l <"$scratch/seen-$try") cases pass"
else
  echo "FAIL  pjdfstest on an overlay above the mount: $passed cases pass"
  head -20 "$scratch/difference"
  failed=1
fi
if [[ $(tree) == "$before" ]]; then echo "ok    the mount is unchanged"; else echo "FAIL  the mount changed"; failed=1; fi
exit $failed
