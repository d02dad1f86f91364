#!/usr/bin/env bash
# The program as a user runs it: seal real models, mount them, and let unmodified programs read the mount.
#
#   tests/e2e.sh [--quick]     --quick: small models, and no clients that need torch
#
# Needs the release build (MODELFS names another binary) and the parts of tests/parts/install.sh. Everything it makes
# lies in one temporary folder; nothing of it remains, whatever happens. The detectors prove first that they can fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

quick=""
[[ ${1:-} != --quick ]] || quick=1
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
models=$cache/models-1
clients=$PWD/tests/clients
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
lite=$cache/clients-lite/bin/python
torch=$cache/clients-torch/bin/python
pjdfstest=$(echo "$cache"/pjdfstest-*/bin/pjdfstest)
export PJDFSTEST=$pjdfstest HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONDONTWRITEBYTECODE=1

# Longest time for one client, far above what it needs: a mount that hangs must end as a failed step.
CLIENT_SECONDS=1800

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-e2e.XXXXXX")
store=$work/store
mnt=$work/mnt
mkdir "$mnt"
# The user's own keys, trust and recorded versions are neither read nor changed.
export XDG_CONFIG_HOME=$work/config XDG_STATE_HOME=$work/state MODELFS_STATE_DIR=$work/state/modelfs
for name in MODELFS_KEY MODELFS_KEY_SOURCE MODELFS_TRUST MODEL_ENCRYPTION_KEY; do unset $name; done

gateway_pid=""
cleanup() {
  [[ -z $gateway_pid ]] || kill "$gateway_pid" 2>/dev/null || true
  if mountpoint -q "$mnt"; then
    timeout 60 "$modelfs" umount "$mnt" >/dev/null 2>&1 || fusermount3 -uz "$mnt" || umount --lazy "$mnt" || true
  fi
  # Never through a mount that is still there.
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

if [[ ! -x $modelfs ]]; then
  step "e2e: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
if [[ ! -c /dev/fuse ]]; then
  skip "e2e" "this machine has no /dev/fuse"
  finish
  exit
fi
if [[ ! -x $lite ]]; then
  skip "e2e" "clients-lite is not installed (tests/parts/install.sh says why)"
  finish
  exit
fi

names=(minilm onnx edges gguf-small)
if [[ -z $quick ]]; then
  [[ ! -d $models/gguf ]] || names+=(gguf)
  if [[ -x $torch && -d $models/llama ]]; then names+=(llama); else skip "e2e: llama" "needs clients-torch"; fi
fi
for name in "${names[@]}"; do
  [[ -d $models/$name ]] || { step "e2e: the model $name is made" false; finish; exit; }
done

client() { # CHECK PYTHON ARGUMENTS...
  local check=$1 python=$2
  shift 2
  timeout --kill-after=10 $CLIENT_SECONDS "$python" "$clients/$check.py" "$@"
}

# ---- The detectors can fail.

for check in check_tree:edges check_safetensors:minilm check_gguf:gguf-small check_onnx:onnx; do
  step "self-test: ${check%:*}" client "${check%:*}" "$lite" --self-test "$models/${check#*:}"
done
if [[ -z $quick && -x $torch ]]; then
  for check in check_minilm check_transformers; do
    step "self-test: $check" client $check "$torch" --self-test "$models/minilm"
  done
fi
step "self-test: readonly_suite" client readonly_suite "$lite" --self-test
step "self-test: fio_verify" bash "$clients/fio_verify.sh" self-test "$work"

# ---- Seal.

fio_size=64m fio_seconds=5
[[ -n $quick ]] || fio_size=512m fio_seconds=10
mkdir -p "$work/plain/fio"
step "make the file fio verifies" bash "$clients/fio_verify.sh" make "$work/plain/fio/fio.bin" $fio_size

plain() { if [[ $1 == fio ]]; then echo "$work/plain/fio"; else echo "$models/$1"; fi; }
seal() { # NAME
  timeout --kill-after=10 $CLIENT_SECONDS "$modelfs" seal "$(plain "$1")" "$store" "e2e/$1" --key "file:$work/key" --sign "$work/signing.key"
}
step "keygen" "$modelfs" keygen "$work/key"
step "keygen --signing" "$modelfs" keygen --signing "$work/signing.key"
for name in "${names[@]}" fio; do step "seal $name" seal "$name"; done
step "ls" "$modelfs" ls "$store"
step "inspect" "$modelfs" inspect "$store" e2e/minilm --trust "$work/signing.key.pub"
step "verify without a key" "$modelfs" verify "$store" e2e/minilm --trust "$work/signing.key.pub"

# Sixty-four bytes that occur in a model must occur in no stored file; the search finds them where they are.
plaintext_is_not_stored() {
  "$lite" - "$models/minilm" "$store" <<'PYTHON'
import sys
from pathlib import Path

plain, store = map(Path, sys.argv[1:])
needles = [file.read_bytes()[at : at + 64] for file in plain.glob("*.json") for at in (0, 1000) if file.stat().st_size > 1064]
needles.append((plain / "model.safetensors").read_bytes()[45_000_000:45_000_064])

def holds(path: Path) -> bool:
    content = path.read_bytes()
    return any(needle in content for needle in needles)

stored = [path for path in store.rglob("*") if path.is_file() and path.stat().st_size < 200_000_000]
found = [path for path in stored if holds(path)]
print(f"{len(needles)} needles, {len(stored)} stored files, found in", *found or ["none"])
sys.exit(bool(found) or not stored or not holds(plain / "model.safetensors"))
PYTHON
}
step "no plaintext in the store" plaintext_is_not_stored

# ---- Mount, in the ways that differ inside; the same programs must see the same bytes.

mount_models() { # OPTIONS...
  timeout --kill-after=10 600 "$modelfs" mount "$store" "$mnt" --key "file:$work/key" --trust "$work/signing.key.pub" --daemon \
    --log-file "$work/log" "$@" || return 1
  mountpoint -q "$mnt" || { echo "nothing is mounted at $mnt"; return 1; }
}
unmount() {
  mountpoint -q "$mnt" || { echo "nothing is mounted at $mnt"; return 1; }
  timeout --kill-after=10 600 "$modelfs" umount "$mnt" || return 1
  ! mountpoint -q "$mnt" || { echo "$mnt is still mounted"; return 1; }
  [[ -z $(ls -A "$mnt") ]] || { echo "$mnt is not empty after unmounting"; return 1; }
}
everything() { # LABEL
  local name
  for name in edges minilm; do
    step "$1: check_tree $name" client check_tree "$lite" "$models/$name" "$mnt/e2e/$name"
  done
  step "$1: check_safetensors minilm" client check_safetensors "$lite" "$models/minilm" "$mnt/e2e/minilm"
  step "$1: check_onnx" client check_onnx "$lite" "$models/onnx" "$mnt/e2e/onnx"
  step "$1: check_gguf" client check_gguf "$lite" "$models/gguf-small" "$mnt/e2e/gguf-small"
  step "$1: fio verify" timeout --kill-after=10 $CLIENT_SECONDS \
    bash "$clients/fio_verify.sh" check "$mnt/e2e/fio/fio.bin" $fio_seconds
}

# Half of the free memory, at most what holds every model at once.
roomy=$(awk '/MemAvailable/ {b = int($2 / 2048); print (b < 8192 ? b : 8192) "MiB"}' /proc/meminfo)

step "mount" mount_models --cache "$roomy"
everything "auto"
step "readonly_suite" client readonly_suite "$lite" "$mnt/e2e/minilm"
step "a sealed script keeps its x bit" test -x "$models/edges/tool.sh" -a "$(stat -c %a "$mnt/e2e/edges/tool.sh" 2>/dev/null)" = 555
step_exits 126 "and does not run from a noexec mount" "$mnt/e2e/edges/tool.sh"
if [[ -z $quick ]]; then
  if [[ -x $torch ]]; then
    step "check_minilm: the package's own loader" client check_minilm "$torch" "$models/minilm" "$mnt/e2e/minilm"
    step "check_transformers minilm" client check_transformers "$torch" "$models/minilm" "$mnt/e2e/minilm"
  else
    skip "check_minilm, check_transformers" "clients-torch is not installed"
  fi
  if [[ -d $mnt/e2e/llama ]]; then
    step "check_transformers llama" client check_transformers "$torch" "$models/llama" "$mnt/e2e/llama"
    step "check_safetensors llama" client check_safetensors "$torch" "$models/llama" "$mnt/e2e/llama"
    step "check_tree llama" client check_tree "$lite" "$models/llama" "$mnt/e2e/llama"
  fi
  [[ ! -d $mnt/e2e/gguf ]] || step "check_gguf gguf" client check_gguf "$lite" "$models/gguf" "$mnt/e2e/gguf"
  if [[ -x $pjdfstest ]]; then
    step "pjdfstest" timeout --kill-after=10 900 bash "$clients/pjdfstest.sh" "$mnt/e2e/minilm"
  else
    skip "pjdfstest" "it is not installed"
  fi
fi
step "status" "$modelfs" status "$mnt"

busy_mount_is_detached() {
  local rc=0
  exec 9<"$mnt/e2e/minilm/config.json"
  "$modelfs" umount "$mnt" || rc=$?
  exec 9<&-
  [[ $rc == 24 ]] || { echo "umount ended with $rc, wanted 24"; return 1; }
  ! mountpoint -q "$mnt"
}
step "umount of a mount in use ends with 24 and the mount gone" busy_mount_is_detached
step "mount again" mount_models --cache "$roomy"
step "umount" unmount

step "mount --open lazy, a cache smaller than the models" mount_models --open lazy --cache 96MiB
# The longest run where it is hardest: every byte is evicted and fetched again many times.
[[ -n $quick ]] || fio_seconds=60
everything "lazy, small cache"
[[ -n $quick ]] || fio_seconds=10
[[ ! -d $mnt/e2e/llama ]] ||
  step "small cache: check_transformers llama" client check_transformers "$torch" "$models/llama" "$mnt/e2e/llama"
step "umount" unmount
step "mount --open whole --no-page-cache" mount_models --open whole --no-page-cache --cache "$roomy"
everything "whole, no page cache"
step "umount" unmount
if [[ -z $quick ]]; then
  step "mount --verify aead" mount_models --verify aead --cache "$roomy"
  everything "aead"
  step "umount" unmount
fi

# ---- What must not work.

"$modelfs" keygen "$work/other-key" >/dev/null
"$modelfs" keygen --signing "$work/other-signing.key" >/dev/null
cat_config() { timeout 900 "$modelfs" cat "$store" "$1" config.json "${@:2}" | cmp - "$models/minilm/config.json"; }
cat_quietly() { timeout 900 "$modelfs" cat "$store" "$@" >"$work/out"; }
step "cat" cat_config e2e/minilm --key "file:$work/key" --trust "$work/signing.key.pub"
step_exits 25 "another key opens nothing" \
  cat_quietly e2e/minilm config.json --key "file:$work/other-key" --trust "$work/signing.key.pub"
step "cat of a slot that may be opened" cat_config e2e/minilm --key "file:$work/key" --trust "$work/signing.key.pub" --slot-label key-file
step_exits 25 "a slot of another label is not opened" \
  cat_quietly e2e/minilm config.json --key "file:$work/key" --trust "$work/signing.key.pub" --slot-label theirs
step_exits 3 "a model that is not there" \
  cat_quietly e2e/nothing config.json --key "file:$work/key" --trust "$work/signing.key.pub"
step_exits 20 "a signature nobody trusts" \
  cat_quietly e2e/minilm config.json --key "file:$work/key" --trust "$work/other-signing.key.pub"
step_exits 2 "an option nobody knows" "$modelfs" mount --no-such-option

# One flipped byte in the largest stored object of one model: never one byte of plaintext from there, EIO instead.
harm_fio_object() {
  local victim
  victim=$(find "$store" -type f -printf '%T@ %s %p\n' | sort -n | awk '$2 > 60000000 {p = $3} END {print p}')
  "$lite" -c "
import sys; sys.path.insert(0, '$clients')
from pathlib import Path
from common import flip_byte
print('flipped byte', flip_byte(Path('$victim'), 20_000_000))"
}
harmed_file_is_refused() {
  local rc=0
  timeout 600 dd if="$mnt/e2e/fio/fio.bin" of="$work/out" bs=1M status=none 2>"$work/err" || rc=$?
  cat "$work/err"
  [[ $rc == 1 ]] && grep -q 'Input/output error' "$work/err" || { echo "dd ended with $rc"; return 1; }
  # What was answered before the harmed place must be right.
  cmp -n "$(stat -c %s "$work/out")" "$work/out" "$work/plain/fio/fio.bin"
}
step "harm one stored byte" harm_fio_object
step_exits 20 "verify names it" timeout 900 "$modelfs" verify "$store" e2e/fio --key "file:$work/key" --trust "$work/signing.key.pub"
step "mount the harmed store" mount_models --cache "$roomy" --open lazy
step "the harmed file ends in EIO, with no wrong byte before" harmed_file_is_refused
step "other models are served" client check_safetensors "$lite" "$models/minilm" "$mnt/e2e/minilm"
step "umount" unmount
# ---- The same through a real S3 server.

versitygw=$(bash tests/parts/versitygw.sh path 2>/dev/null || true)
start_gateway() {
  local port
  port=$(free_port)
  mkdir -p "$work/s3/models"
  export AWS_ACCESS_KEY_ID=modelfs-tests AWS_SECRET_ACCESS_KEY=not-a-secret-of-anyone AWS_REGION=us-east-1
  ROOT_ACCESS_KEY=$AWS_ACCESS_KEY_ID ROOT_SECRET_KEY=$AWS_SECRET_ACCESS_KEY \
    "$versitygw" --port "127.0.0.1:$port" --quiet posix "$work/s3" >"$work/s3.log" 2>&1 &
  gateway_pid=$!
  export MODELFS_S3_ENDPOINT=http://127.0.0.1:$port
  for _ in {1..1200}; do
    curl --silent --output /dev/null "$MODELFS_S3_ENDPOINT" && return 0
    sleep 0.1
  done
  cat "$work/s3.log"
  return 1
}
if [[ -x $versitygw ]]; then
  step "start versitygw" start_gateway
  store=s3://models/prefix
  step "s3: seal minilm" seal minilm
  step "s3: seal edges" seal edges
  step "s3: verify" timeout 900 "$modelfs" verify $store e2e/minilm --trust "$work/signing.key.pub"
  step "s3: mount" mount_models --cache "$roomy"
  step "s3: check_tree edges" client check_tree "$lite" "$models/edges" "$mnt/e2e/edges"
  step "s3: check_safetensors minilm" client check_safetensors "$lite" "$models/minilm" "$mnt/e2e/minilm"
  step "s3: umount" unmount
  kill "$gateway_pid" && wait "$gateway_pid" || true
  gateway_pid=""
else
  skip "s3" "versitygw is not installed"
fi

# ---- The first commands of the README, in a home and with folders of their own.

quick_start() {
  local home=$work/readme python="sha256sum MOUNT/acme/llama-8b/config.json"
  mkdir -p "$home/bin"
  cp -r "$models/minilm" "$home/llama-8b"
  ln -s "$modelfs" "$home/bin/modelfs"
  if [[ -x $torch ]]; then
    printf '#!/bin/sh\nexec %s "$@"\n' "$torch" >"$home/bin/python"
    chmod +x "$home/bin/python"
    python="&"
  fi
  sed "s|^python .*|$python|; s|/srv/models|$home/store|g; s|/mnt/models|$mnt|g; s|MOUNT/|$mnt/|" README.md >"$home/README.md"
  (
    cd "$home"
    unset XDG_CONFIG_HOME XDG_STATE_HOME MODELFS_STATE_DIR
    export HOME=$home PATH=$home/bin:$PATH
    run_page_block README.md quick-start
  )
  ! mountpoint -q "$mnt"
}
step "the quick start of the README" quick_start

# ---- The demo, as root and as somebody who may lock more memory or less.

nobody=$work/nobody
as_nobody() { # LIMIT|free COMMAND...
  local limit=$1 may_lock=()
  shift
  # Where root may not raise a limit, the capability stands for one that is high enough.
  if [[ $limit == free ]]; then
    if prlimit --memlock=134217728:134217728 true 2>/dev/null; then
      limit=134217728
    else
      limit=8388608 may_lock=(--inh-caps=+ipc_lock --ambient-caps=+ipc_lock)
    fi
  fi
  env -u XDG_CONFIG_HOME -u XDG_STATE_HOME -u MODELFS_STATE_DIR HOME="$nobody" TMPDIR="$nobody" PATH="$nobody/bin:$PATH" \
    prlimit "--memlock=$limit:$limit" setpriv --reuid=65534 --regid=65534 --clear-groups "${may_lock[@]}" -- \
    timeout --kill-after=10 900 "$@"
}
demo_names_the_limit() {
  local rc=0
  as_nobody 8388608 "$nobody/bin/modelfs" demo >"$work/out" 2>&1 || rc=$?
  cat "$work/out"
  [[ $rc == 2 ]]
  grep -E 'here it is 8192\..*sudo prlimit --pid \$\$ --memlock=[0-9]+` \[MEMLOCK\]' "$work/out"
  # Nothing was made in vain.
  [[ -z $(find "$nobody" -name 'modelfs-demo-*') ]]
}
first_command() { # LIMIT: the README's, with a cargo that builds nothing
  as_nobody "$1" bash "$nobody/tests/demo.sh"
}
first_command_names_the_limit() {
  local rc=0
  first_command 8388608 >"$work/out" 2>&1 || rc=$?
  cat "$work/out"
  [[ $rc == 1 ]]
  grep -F 'may lock 8192 KiB of memory here, the demo needs 131072;' "$work/out"
  grep -F 'sudo prlimit --pid $$ --memlock=134217728' "$work/out"
}
first_command_goes_on() { first_command free | grep -x 'built: run --release --locked -- demo'; }

step "demo" timeout 900 "$modelfs" demo
if [[ $EUID == 0 ]]; then
  # 0600 where udev does not run; an ordinary user needs what its rule would give.
  fuse_mode=$(stat -c %a /dev/fuse)
  chmod 666 /dev/fuse
  chmod 711 "$work"
  mkdir -p "$nobody/bin" "$nobody/tests"
  cp "$modelfs" "$nobody/bin/modelfs"
  cp tests/demo.sh "$nobody/tests"
  printf '#!/bin/sh\necho "built: $*"\n' >"$nobody/bin/cargo"
  chmod 755 "$nobody/bin/cargo"
  chown -R 65534:65534 "$nobody"
  step "demo of an ordinary user whose memory limit holds it" as_nobody free "$nobody/bin/modelfs" demo
  step "demo of an ordinary user names the limit it needs, and the command" demo_names_the_limit
  step "the first command of the README goes on where the limit holds the demo" first_command_goes_on
  step "the first command of the README names the limit before it builds" first_command_names_the_limit
  chmod "$fuse_mode" /dev/fuse
else
  skip "demo of an ordinary user" "only root can become one"
fi
finish
