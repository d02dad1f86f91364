#!/usr/bin/env bash
# The Kubernetes node driver without Kubernetes: the real program, asked over its socket as the kubelet asks, ended and killed
# between the questions. What tests/kubernetes.sh shows on a real node in minutes, for the folders of volumes alone, in seconds.
#
#   tests/csi.sh      needs root, /dev/fuse and the release build (MODELFS names another binary)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh

modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
if [[ ! -x $modelfs ]]; then
  step "csi: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
missing=""
[[ $EUID == 0 ]] || missing="it needs root"
[[ -c /dev/fuse ]] || missing="this machine has no /dev/fuse"
curl --version | grep HTTP2 >/dev/null || missing="curl speaks no HTTP/2"
if [[ -n $missing ]]; then
  skip "csi" "$missing"
  finish
  exit
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-csi.XXXXXX")
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS)_' | grep -vE '^MODELFS_TEST_[A-Z_]+$'); do unset "$name"; done
# What `ls` says of a dead mount is looked for in English.
export LC_ALL=C HOME=$work/home XDG_CONFIG_HOME=$work/config MODELFS_STATE_DIR=$work/state
driver_pid=""
# shellcheck disable=SC2317 # called by the trap
cleanup() {
  [[ -z $driver_pid ]] || { kill -KILL "$driver_pid" && wait "$driver_pid"; } 2>/dev/null || true
  awk -v below="$work/" 'index($5, below) == 1 {print $5}' /proc/self/mountinfo | tac | xargs -r umount -l || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

mkdir -p "$HOME" "$work/model" "$work"/kubelet/pods/{1,2,3}
head -c 5000000 /dev/urandom >"$work/model/weights.bin"
# One volume that is the mount, one that has it a folder below.
plain=$work/kubelet/pods/1/mount carried=$work/kubelet/pods/2/mount

start() { # [STORE]: the driver, whose operator lists that store
  rm -f "$work/csi.sock"
  "$modelfs" csi --node-id node1 --no-registration --socket "$work/csi.sock" --kubelet-dir "$work/kubelet" --cache 64MiB \
    --allow-store "${1:-$work/store}" --key "file:$work/model.key" --trust "$XDG_CONFIG_HOME/modelfs/signing.key.pub" \
    >>"$work/driver.log" 2>&1 &
  driver_pid=$!
  for _ in $(seq 1200); do ! listens 2>/dev/null || return 0; sleep 0.1; done
  tail -5 "$work/driver.log"
  return 1
}
# The socket's file is there a moment before anybody listens.
listens() { [[ -S $work/csi.sock ]] && python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])' "$work/csi.sock"; }
end() { # SIGNAL
  kill "-$1" "$driver_pid"
  wait "$driver_pid" 2>/dev/null || true
  driver_pid=""
}
# The answer's gRPC status goes to standard output.
ask() { # METHOD TARGET [BELOW]
  python3 - "$1" "$2" "$work/store" "${3:-}" >"$work/request" <<'PYTHON'
import struct, sys
method, target, store, below = sys.argv[1:]
def number(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])
def field(tag, value):
    value = value if isinstance(value, bytes) else value.encode()
    return number(tag << 3 | 2) + number(len(value)) + value
body = field(1, "volume")
if method == "NodeUnpublishVolume":
    body += field(2, target)
else:
    kubelet = "csi.storage.k8s.io/"
    context = {"model": "acme/m", "store": store, kubelet + "pod.namespace": "chat", kubelet + "pod.name": "pod",
               kubelet + "serviceAccount.name": "reader", kubelet + "ephemeral": "true"}
    if below:
        context["below"] = below
    body += field(4, target) + field(5, field(2, b"") + field(3, b"\x08\x01")) + b"\x30\x01"
    body += b"".join(field(8, field(1, key) + field(2, value)) for key, value in context.items())
sys.stdout.buffer.write(b"\0" + struct.pack(">I", len(body)) + body)
PYTHON
  curl -sS --max-time 60 --unix-socket "$work/csi.sock" --http2-prior-knowledge -H 'content-type: application/grpc' -H 'te: trailers' \
    --data-binary "@$work/request" -D "$work/head" -o "$work/body" "http://csi/csi.v1.Node/$1"
  sed -n 's/^grpc-status: *\([0-9]*\).*/\1/p' "$work/head"
}
answers() { # STATUS METHOD TARGET [BELOW]
  local got
  got=$(ask "${@:2}")
  [[ $got == "$1" ]] || { echo "$2 of $3 was answered $got, wanted $1"; grep -i grpc-message "$work/head"; tail -3 "$work/driver.log"; return 1; }
}
both() { answers "$1" NodePublishVolume "$plain" && answers "$1" NodePublishVolume "$carried" store; } # STATUS
both_read() { cmp "$work/model/weights.bin" "$plain/acme/m/weights.bin" && cmp "$work/model/weights.bin" "$carried/store/acme/m/weights.bin"; }
both_dead() { # what a program meets that starts now
  local place said
  for place in "$plain" "$carried/store"; do
    said=$(ls "$place" 2>&1) && { echo "$place can be listed: '$said'"; return 1; }
    [[ $said == *"not connected"* ]] || { echo "$said"; return 1; }
  done
}
unavailable=14 permanent=3

publish() {
  "$modelfs" keygen "$work/model.key"
  "$modelfs" --quiet seal "$work/model" "$work/store" acme/m --key "file:$work/model.key"
  start
  both 0
  both_read
  # What the kubelet writes as long as it has the volumes; of the third it has none.
  touch "$work"/kubelet/pods/{1,2}/vol_data.json
  answers 0 NodePublishVolume "$work/kubelet/pods/3/mount"
}
step "csi: volumes are published and read" publish
asked_to_end() {
  end TERM
  both_dead
  ! grep -F "$work/kubelet/pods/3/mount" /proc/self/mountinfo || { echo "nobody wants the third, and it is still there"; return 1; }
}
step "csi: a driver that is asked to end leaves dead mounts, no empty folders" asked_to_end
store_is_away() {
  mv "$work/store" "$work/store.away"
  start
  both $unavailable
  both_dead
  mv "$work/store.away" "$work/store"
  both 0
  both_read
}
step "csi: while the store is away after a restart they stay dead, then they are there again" store_is_away
not_listed_any_more() {
  end KILL
  both_dead
  start s3://another/store
  both $unavailable
  both_dead
  answers $permanent NodePublishVolume "$work/kubelet/pods/new/mount"
}
step "csi: a store that the operator took out refuses new volumes for good, and none that was there" not_listed_any_more
taken_off() {
  answers 0 NodeUnpublishVolume "$plain"
  answers 0 NodeUnpublishVolume "$carried"
  [[ ! -e $plain && ! -e $carried ]] && ! grep "$work" /proc/self/mountinfo
}
step "csi: unpublished, nothing is left of them" taken_off
finish
