#!/usr/bin/env bash
# From a fresh checkout to a model read from an encrypted store, with one command.
#
#   tests/demo.sh [DIR]      DIR is a model of yours; without it one is generated
#
# Looks for what the build and the mount need (for an ordinary user also `ulimit -l`), installs it where it can (Debian and Ubuntu, as root), names it where it
# cannot, then runs `cargo run --release --locked -- demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing=()
need() { # COMMAND DEBIAN_PACKAGE
  command -v "$1" >/dev/null || missing+=("$2")
}
need cc gcc
need fusermount3 fuse3
if [[ ${#missing[@]} -gt 0 ]]; then
  if [[ $EUID == 0 ]] && command -v apt-get >/dev/null; then
    echo "demo: installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" libc6-dev >/dev/null
  else
    echo "demo: please install ${missing[*]}, for instance: sudo apt-get install ${missing[*]} libc6-dev" >&2
    exit 1
  fi
fi
if ! command -v cargo >/dev/null; then
  echo "demo: needs Rust: curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" >&2
  exit 1
fi
if [[ ! -c /dev/fuse ]]; then
  echo "demo: /dev/fuse is missing: modprobe fuse; in a container, run it with --device /dev/fuse --cap-add SYS_ADMIN" >&2
  exit 1
fi
if [[ ! -r /dev/fuse || ! -w /dev/fuse ]]; then
  echo "demo: /dev/fuse is not open to $(id -un): as root, chmod 666 /dev/fuse (what udev sets elsewhere)" >&2
  exit 1
fi
# Holds the generated model on any machine; how much a larger one takes, the demo says itself.
lock_kib=131072
# CAP_IPC_LOCK is bit 14, CAP_SYS_ADMIN bit 21: whoever has one of them is bound by no limit.
free_to_lock=$((0x$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status) & (1 << 14 | 1 << 21)))
if [[ $free_to_lock == 0 && $(ulimit -l) != unlimited && $(ulimit -l) -lt $lock_kib ]]; then
  echo "demo: an ordinary user may lock $(ulimit -l) KiB of memory here, the demo needs $lock_kib; raise it for this shell, then" \
    "run the demo again: sudo prlimit --pid \$\$ --memlock=$((lock_kib * 1024))" >&2
  exit 1
fi
exec cargo run --release --locked -- demo "$@"
