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
driver_pid="" apart=()
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
plain=$work/kubelet/pods/1/mount carried=$work/kubelet/pods/2/mount third=$work/kubelet/pods/3/mount

start() { # [STORE [OPTION...]]: the driver, whose operator lists that store
  rm -f "$work/csi.sock"
  "${apart[@]}" "$modelfs" csi --node-id node1 --no-registration --socket "$work/csi.sock" --kubelet-dir "$work/kubelet" --cache 64MiB \
    --allow-store "${1:-$work/store}" "${@:2}" --key "file:$work/model.key" --trust "$XDG_CONFIG_HOME/modelfs/signing.key.pub" \
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
ask() { # METHOD TARGET [BELOW [ACCOUNT]]
  python3 - "$1" "$2" "$work/store" "${3:-}" "${4:-reader}" >"$work/request" <<'PYTHON'
import struct, sys
method, target, store, below, account = sys.argv[1:]
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
    context = {"model": "acme/m", "store": store, kubelet + "pod.namespace": "chat", kubelet + "pod.name": account + "-0",
               kubelet + "pod.uid": account.encode().hex().zfill(32), kubelet + "serviceAccount.name": account,
               kubelet + "ephemeral": "true"}
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
answers() { # STATUS METHOD TARGET [BELOW [ACCOUNT]]
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
  answers 0 NodePublishVolume "$third"
}
step "csi: volumes are published and read" publish
asked_to_end() {
  end TERM
  both_dead
  ! grep -F "$third" /proc/self/mountinfo || { echo "nobody wants the third, and it is still there"; return 1; }
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

# The driver as in its DaemonSet, where it sees no process of a pod: it goes by what the kubelet says of the volume.
uid_of() { printf '%032s' "$(printf %s "$1" | od -An -v -tx1 | tr -d ' \n')" | tr ' ' 0; } # ACCOUNT: its pod's, as `ask` says it
governed() {
  end KILL
  apart=(unshare --pid --fork --kill-child)
  printf '[[rule]]\nservice_accounts = ["chat/outsider"]\nmodels = ["*"]\nmay = "see"
[[rule]]\npods = ["%s"]\nmodels = ["*"]\nmay = "read"\n' "$(uid_of reader)" >"$work/policy.toml"
  start "$work/store" --policy "$work/policy.toml" --audit-file "$work/audit.jsonl" --http "unix:$work/http.sock"
  answers 0 NodePublishVolume "$plain"
  answers 0 NodePublishVolume "$carried" "" outsider
  answers 0 NodePublishVolume "$third" "" stranger
  cmp "$work/model/weights.bin" "$plain/acme/m/weights.bin"
}
step "csi: a pod reads that a rule of pods grants, although its processes are not seen" governed
recorded() { # ACCOUNT OUTCOME: the open of that account's pod is in the log, with account and pod, and with no process
  local records
  records=$("$modelfs" audit show "$work/audit.jsonl" --kind open --outcome "$2" --json)
  grep -F "\"service_account\":\"chat/$1\"" <<<"$records" | grep -F "\"pod_name\":\"chat/$1-0\"" | grep -F "\"pod\":\"$(uid_of "$1")\"" \
    | grep -vF '"pid":' || { echo "wanted: $1 $2"; echo "$records"; return 1; }
}
refused_and_recorded() {
  local said
  said=$(cat "$carried/acme/m/weights.bin" 2>&1 >/dev/null) && { echo "it was opened"; return 1; }
  [[ $said == *"Permission denied"* ]] || { echo "$said"; return 1; }
  said=$(cat "$third/acme/m/weights.bin" 2>&1 >/dev/null) && { echo "whom no rule names opened it"; return 1; }
  [[ $said == *"No such file"* ]] || { echo "$said"; return 1; }
  recorded outsider denied
  recorded reader allowed
  ! recorded outsider allowed >/dev/null || { echo "a record says that it was let"; return 1; }
}
step "csi: a service account that the policy refuses stands in the log with its pod" refused_and_recorded
shut_out() {
  local said
  "$modelfs" sessions "$plain" --shut-out "pod=$(uid_of outsider)"
  cmp "$work/model/weights.bin" "$plain/acme/m/weights.bin"
  "$modelfs" sessions "$plain" --shut-out "pod=$(uid_of reader)"
  said=$(cat "$plain/acme/m/weights.bin" 2>&1 >/dev/null) && { echo "it was opened"; return 1; }
  [[ $said == *"Permission denied"* ]] || { echo "$said"; return 1; }
  "$modelfs" sessions "$plain" --let-in "pod=$(uid_of reader)"
  cmp "$work/model/weights.bin" "$plain/acme/m/weights.bin"
}
step "csi: a pod is shut out of its volume and let in again, and another's UID changes nothing there" shut_out
scraped() {
  local metrics
  metrics=$(curl -fsS --max-time 60 --unix-socket "$work/http.sock" http://modelfs/metrics)
  grep -E '^modelfs_access_denied_total(\{[^}]*\})? [1-9]' <<<"$metrics" || { grep denied <<<"$metrics"; return 1; }
  curl -fsS --max-time 60 --unix-socket "$work/http.sock" http://modelfs/live
  for place in "$plain" "$carried" "$third"; do answers 0 NodeUnpublishVolume "$place"; done
}
step "csi: the driver's metrics are scraped, and count the refusal" scraped
finish
