#!/usr/bin/env bash
# Models as volumes of containers: a real Docker engine, a real Podman, a real Compose, with a model in a real S3 server.
#
#   tests/docker.sh [docker|managed|podman|compose]...
#                           needs the release build (MODELFS names another binary), root, and tests/parts/install.sh docker
#                           podman compose versitygw vault
#
# The commands are the ones of docs/DEPLOY.md, taken out of that page as they stand. Everything happens in mount and network
# namespaces of the test's own, so that /etc/modelfs, /run/docker, ports and driver names are the page's and not the host's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
versitygw=$(MODELFS_TEST_CACHE=$cache bash tests/parts/versitygw.sh path)
vault=$(MODELFS_TEST_CACHE=$cache bash tests/parts/vault.sh path vault)
compose=$(MODELFS_TEST_CACHE=$cache bash tests/parts/compose.sh path)
page=$PWD/docs/DEPLOY.md
parts=" ${*:-docker managed podman compose} "

if [[ ! -x $modelfs ]]; then
  step "docker: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
lacking=""
[[ $EUID == 0 ]] || lacking="this is not root"
[[ -c /dev/fuse ]] || lacking="this machine has no /dev/fuse"
[[ -x $versitygw ]] || lacking="$versitygw is not installed"
for command in dockerd docker busybox; do command -v $command >/dev/null || lacking="$command is not installed"; done
[[ -z $lacking ]] || { skip docker "$lacking"; finish; exit; }

if [[ ${MODELFS_TEST_DOCKER_INSIDE:-} != "$$" ]]; then
  # The page's folders must be there to be mounted over; those that were not go again.
  made=()
  for folder in /run/docker /var/lib/modelfs /etc/modelfs; do
    [[ -d $folder ]] || { mkdir -p $folder; made+=("$folder"); }
  done
  rc=0
  # Its process is this one's: the variable holds for nobody else.
  unshare --mount --net --propagation private \
    bash -c 'MODELFS_TEST_DOCKER_INSIDE=$$ exec bash "$@"' _ "$PWD/tests/docker.sh" "$@" || rc=$?
  [[ ${#made[@]} == 0 ]] || rmdir "${made[@]}" 2>/dev/null || true
  finish || true
  exit $rc
fi

# Copies of the host's mounts, which would keep them in use beyond their end.
awk '/ - fuse\.modelfs / {print $5}' /proc/self/mountinfo | tac | while read -r mount; do umount -l "$mount" || true; done

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-docker.XXXXXX")
# A folder of the S3 server is a bucket.
mkdir -p "$work"/{bin,etc,state,run,bucket/models,source,images,home,docker}
mount --bind "$work/etc" /etc/modelfs
mount --bind "$work/state" /var/lib/modelfs
mount --bind "$work/run" /run/docker
ip link set lo up
chmod 700 "$work/state"
unset XDG_STATE_HOME XDG_CONFIG_HOME
export HOME=$work/home DOCKER_CONFIG=$work/home/.docker
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS|DOCKER|CONTAINER)_' | grep -vE '^(MODELFS_(TEST_[A-Z_]+|DOCKER_KEEP)|DOCKER_CONFIG)$'); do
  unset "$name"
done
ln -s "$modelfs" "$work/bin/modelfs"
export PATH=$work/bin:$PATH
engine_pid="" plugin_pid="" store_pid=""

# ---- What is started and stopped.

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || { echo "never came true: $*"; return 1; }; sleep 0.1; done
}
ended() { # PID SECONDS: whether it ended by itself, killed if not
  local end=$((SECONDS + $2))
  while kill -0 "$1" 2>/dev/null; do ((SECONDS < end)) || { kill -9 "$1"; echo "$1 had to be killed"; return 1; }; sleep 0.1; done
}
start_engine() {
  dockerd --data-root "$work/docker" --exec-root "$work/exec" --pidfile "$work/docker.pid" -H "unix://$work/docker.sock" \
    --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false >>"$work/engine.log" 2>&1 &
  engine_pid=$!
  until_true 180 docker version
}
restart_engine() { stop_engine && start_engine; }
stop_engine() { kill "$engine_pid" && ended "$engine_pid" 180; engine_pid=""; }
# Podman looks for credentials of registries there, and wants them to be there.
mkdir -p "$DOCKER_CONFIG" && echo '{}' >"$DOCKER_CONFIG/config.json"
export DOCKER_HOST=unix://$work/docker.sock
start_plugin() { # as the page starts it, in the background of this script
  local command
  command=$(page_block "$page" sh volume-plugin) || return 1
  # shellcheck disable=SC2086 # the page's words
  exec_words $command
}
plugin_answers() { curl -fsS --unix-socket /run/docker/plugins/modelfs.sock -X POST http://plugin/Plugin.Activate | grep VolumeDriver >/dev/null; }
exec_words() {
  "$@" >>"$work/plugin.log" 2>&1 &
  plugin_pid=$!
  until_true 120 plugin_answers || { tail -5 "$work/plugin.log"; return 1; }
}
stop_plugin() { kill "$plugin_pid" && ended "$plugin_pid" 120; plugin_pid=""; }
crash_plugin() { kill -9 "$plugin_pid"; wait "$plugin_pid" 2>/dev/null || true; plugin_pid=""; }
start_store() {
  ROOT_ACCESS_KEY=storage ROOT_SECRET_KEY=storage-password "$versitygw" --port 127.0.0.1:9000 --access-log "$work/access.log" \
    --quiet posix "$work/bucket" >>"$work/store.log" 2>&1 &
  store_pid=$!
  until_true 120 bash -c '</dev/tcp/127.0.0.1/9000'
}
stop_store() { kill "$store_pid" && ended "$store_pid" 120; store_pid=""; }
mounts_left() { grep -c ' fuse.modelfs ' /proc/self/mountinfo; }
nothing_mounted() { [[ $(mounts_left) == 0 ]] || { grep ' fuse.modelfs ' /proc/self/mountinfo; return 1; }; }

cleanup() {
  local mount pid
  if [[ -n $engine_pid ]]; then
    docker ps -aq 2>/dev/null | xargs -r docker rm -f >/dev/null 2>&1 || true
    kill "$engine_pid" 2>/dev/null && ended "$engine_pid" 60 || true
  fi
  # What an engine left that did not come back: shims and their containers.
  for pid in $(pgrep -f "containerd-shim.*$work/exec"); do
    # shellcheck disable=SC2046
    kill -9 $(pgrep -P "$pid") "$pid" 2>/dev/null || true
  done
  [[ -z $plugin_pid ]] || { kill "$plugin_pid" 2>/dev/null && ended "$plugin_pid" 60 || true; }
  [[ -z $store_pid ]] || kill "$store_pid" 2>/dev/null || true
  # What a failed step left: the mounts die with the namespace, the folders must be bare before they are removed.
  while mount=$(awk -v top="$work/" 'index($5, top) == 1 || $5 ~ "^/var/lib/modelfs/" {print $5}' /proc/self/mountinfo | tail -1) && [[ -n $mount ]]; do
    umount -l "$mount" || break
  done
  if [[ -n ${MODELFS_TEST_DOCKER_KEEP:-} ]]; then echo "kept: $work"; else rm -rf --one-file-system "$work"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# ---- Images from what this machine has: a program, the libraries it names, and busybox for the rest.

# rootfs FOLDER [PROGRAM...]
rootfs() {
  local root=$1 program applet library
  shift
  mkdir -p "$root"/{bin,usr/bin,etc,tmp,dev,proc,sys}
  cp "$(command -v busybox)" "$root/bin/busybox"
  for applet in sh cat cp cmp cut dd env false find grep head id ls mkdir mount nc rm sha256sum sleep sort tail test touch true wc wget xargs; do
    ln -sf busybox "$root/bin/$applet"
  done
  # TLS does not start without anybody to trust.
  mkdir -p "$root/etc/ssl/certs" && cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  printf 'root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n' >"$root/etc/passwd"
  for program; do
    cp -L "$program" "$root/usr/bin/"
    for library in $(ldd "$program" 2>/dev/null | grep -oE '/[^ ]+'); do cp -L --parents "$library" "$root"; done
  done
}
image() { # NAME [PROGRAM...]
  rootfs "$work/images/$1" "${@:2}"
  tar -C "$work/images/$1" -c . | docker import - "$1" >/dev/null
}

# ---- The model: weights with texts in them that a scanner can look for.
make_model() {
  python3 - "$work/source" "$work/canaries" <<'PYTHON'
import json, random, secrets, struct, sys
from pathlib import Path

folder, canaries = Path(sys.argv[1]), Path(sys.argv[2])
weights = bytearray(random.Random(7).randbytes(24 << 20))
texts = [f"CANARY-{secrets.token_hex(16)}" for _ in range(24)]
for number, text in enumerate(texts):
    at = (number << 20) + 4096 * number + 17
    weights[at:at + len(text)] = text.encode()
header = json.dumps({"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}).encode()
(folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights)
(folder / "config.json").write_text(json.dumps({"canary": texts[0]}))
canaries.write_text("\n".join(texts) + "\n")
PYTHON
  chmod -R a+rX "$work/source"
  (cd "$work/source" && sha256sum -- * >"$work/hashes")
}
export AWS_ACCESS_KEY_ID=storage AWS_SECRET_ACCESS_KEY=storage-password
seal() { # NAME [OPTION...]
  modelfs seal "$work/source" s3://models/prod "$@" --s3-endpoint http://127.0.0.1:9000 --s3-region us-east-1
}
publish() {
  install -d -m 700 /etc/modelfs/keys /etc/modelfs/publisher
  modelfs keygen /etc/modelfs/keys/llama.key && modelfs keygen /etc/modelfs/keys/other.key &&
    modelfs keygen --signing /etc/modelfs/publisher/signing.key && modelfs keygen --signing /etc/modelfs/publisher/foreign.key || return 1
  cp /etc/modelfs/publisher/signing.key.pub /etc/modelfs/signing.pub
  local key=file:/etc/modelfs/keys/llama.key
  seal acme/llama --key $key --sign /etc/modelfs/publisher/signing.key &&
    seal acme/foreign --key $key --sign /etc/modelfs/publisher/foreign.key &&
    seal acme/tampered --key $key --sign /etc/modelfs/publisher/signing.key && seal acme/data --key $key --sign /etc/modelfs/publisher/signing.key
}

volume() { # NAME [OPTION...]: one of the published model
  docker volume create -d modelfs -o store=s3://models/prod -o key=file:/etc/modelfs/keys/llama.key "${@:2}" "$1"
}
in_container() { # DOCKER RUN OPTION... -- COMMAND
  local options=()
  while [[ $1 != -- ]]; do options+=("$1"); shift; done
  shift
  docker run --rm --network none "${options[@]}" busybox "$@"
}
says() { # WORDS COMMAND...: it fails, and its last words hold WORDS
  local words=$1 said
  shift
  if said=$("$@" 2>&1); then echo "was not refused: $said"; return 1; fi
  echo "$said"
  [[ $said == *"$words"* ]] || { echo "wanted: $words"; return 1; }
}
same_hashes() { diff <(sort -k2 "$work/hashes") <(tr -d '\r' | grep -E '^[0-9a-f]{64} ' | sed 's|  .*/|  |' | sort -k2); }

# ---- Docker.

data_gets() { # how often the store was asked for data objects of the model since the log had $1 lines
  tail -n "+$(($1 + 1))" "$work/access.log" | grep -cE 's3_GetObject [^ ]*/d/[0-9a-f]{64}' || true
}
log_lines() { wc -l <"$work/access.log"; }

page_volume() {
  run_page_block "$page" docker-volume && docker volume inspect llama | jq -e '.[0].Options.model == "acme/llama"'
}
page_run() { run_page_block "$page" docker-run | same_hashes; }
two_at_once() {
  local before gets bytes one two holder
  # The volume stays mounted whichever of the two is the quicker; this one reads nothing.
  holder=$(docker run -d --network none -v llama:/models --user 1000 busybox sleep 600) || return 1
  before=$(log_lines) bytes=$(fetched)
  one=$(docker run -d --network none -v llama:/models --user 1000 busybox sh -c 'cd /models/acme/llama && sha256sum *') || return 1
  two=$(docker run -d --network none -v llama:/models --user 1000 busybox sh -c 'cd /models/acme/llama && sha256sum *') || return 1
  docker wait "$one" "$two" >/dev/null
  docker logs "$one" | same_hashes && docker logs "$two" | same_hashes || return 1
  gets=$(data_gets "$before") bytes=$(($(fetched) - bytes))
  docker rm -f "$one" "$two" "$holder" >/dev/null
  echo "the store was asked $gets times for data, and $bytes bytes came"
  # Chunks of 8 MiB and a pack, each once. In how many requests one comes is a matter of how quick the store is just now.
  ((gets > 0 && bytes > 0 && bytes <= one_load)) || { echo "one load needs $one_load bytes"; return 1; }
}
# What came from the store for all volumes; asked of one that is mounted.
fetched() { modelfs status /var/lib/modelfs/volumes/llama --json | jq -e .metrics.fetch_bytes; }
# What one load costs: counted on a container alone, so that the comparison is not with a guess.
count_one_load() {
  local before gets holder
  holder=$(docker run -d --network none -v llama:/models --user 1000 busybox sleep 600) || return 1
  before=$(log_lines) one_load=$(fetched)
  in_container -v llama:/models --user 1000 -- sh -c 'cat /models/acme/llama/* >/dev/null' || return 1
  gets=$(data_gets "$before") one_load=$(($(fetched) - one_load))
  docker rm -f "$holder" >/dev/null
  echo "one load: $gets requests for data, $one_load bytes"
  ((gets > 0 && one_load > 20000000))
}
# A second volume of the version, while a container holds the first: nothing is fetched again.
two_volumes_one_memory() {
  local before holder
  volume again -o model=acme/llama -o gid=1000 >/dev/null || return 1
  holder=$(docker run -d --network none -v llama:/models --user 1000 busybox sh -c 'cat /models/acme/llama/* >/dev/null; echo read; sleep 600') || return 1
  until_true 120 bash -c "docker logs $holder | grep -x read && modelfs status /var/lib/modelfs/volumes/llama --json | jq -e '.models[0].resident_bytes >= 24 * 1048576'"
  before=$(log_lines)
  in_container -v again:/models --user 1000:1000 -- sh -c 'cd /models/acme/llama && sha256sum *' | same_hashes || return 1
  echo "requests for data: $(data_gets "$before")"
  [[ $(data_gets "$before") == 0 ]] || return 1
  docker rm -f "$holder" >/dev/null && docker volume rm again
}
read_only() {
  says "Read-only file system" in_container -v llama:/models -- touch /models/acme/llama/x
}
others_are_kept_out() {
  says "Permission denied" in_container -v llama:/models --user 4711:4711 -- cat /models/acme/llama/config.json
}
step_refuses() { # NAME WORDS OPTION...: docker volume create says so, and leaves no volume
  step "docker refuses $1" says "$2" docker volume create -d modelfs "${@:3}" refused
  step "docker keeps no volume of it" bash -c '! docker volume inspect refused >/dev/null 2>&1'
}
mount_refused() { # MODEL WORDS
  volume "refused-${1##*/}" -o "model=$1" >/dev/null || return 1
  says "$2" in_container -v "refused-${1##*/}:/models" -- true || return 1
  docker volume rm "refused-${1##*/}" && nothing_mounted
}
# Where a model's objects lie: docs/FORMAT.md, a.1.
objects_of() { echo "$work/bucket/models/prod/$(printf 'MFS1/model\0%s' "$1" | sha256sum | cut -d ' ' -f 1)"; }
flip_byte() { # FILE AT
  python3 -c 'import sys; f = open(sys.argv[1], "r+b"); f.seek(int(sys.argv[2])); b = f.read(1); f.seek(int(sys.argv[2])); f.write(bytes([b[0] ^ 1]))' "$1" "$2"
}
tamper_manifest() { local file; for file in "$(objects_of acme/tampered)"/m/*; do flip_byte "$file" 200; done; }
tampered_data_is_not_read() {
  local file
  for file in "$(objects_of acme/data)"/d/*; do flip_byte "$file" $(($(stat -c %s "$file") / 2)); done
  volume data -o model=acme/data >/dev/null || return 1
  says "Input/output error" in_container -v data:/models -- sh -c 'cat /models/acme/data/* >/dev/null' && docker volume rm data
}
in_use_stays() {
  local holder
  holder=$(docker run -d --network none -v llama:/models busybox sleep 600) || return 1
  says "volume is in use" docker volume rm llama || return 1
  # Past the engine, which counts for itself.
  curl -s --unix-socket /run/docker/plugins/modelfs.sock -d '{"Name":"llama"}' http://p/VolumeDriver.Remove | grep HELD >/dev/null || return 1
  docker rm -f "$holder"
}
others_are_turned_away() {
  local socket=/run/docker/plugins/modelfs.sock said modes
  ask() { setpriv --reuid 1000 --regid 1000 --clear-groups curl -sS --unix-socket $socket -X POST http://p/VolumeDriver.List 2>&1; }
  if said=$(ask); then echo "answered: $said"; return 1; fi
  # Not even where the files let them: the kernel says who asks.
  modes=$(stat -c '%a %n' /run/docker /run/docker/plugins $socket)
  chmod 755 /run/docker /run/docker/plugins && chmod 666 $socket
  if said=$(ask); then echo "answered: $said"; return 1; fi
  xargs -n 2 chmod <<<"$modes"
  grep 'turned away.*uid=1000' "$work/plugin.log"
}
kill_everything() {
  local holders
  for _ in 1 2 3; do docker run -d --network none -v llama:/models busybox sh -c 'exec 3</models/acme/llama/model.safetensors; sleep 600' || return 1; done
  # shellcheck disable=SC2046
  docker kill $(docker ps -q) >/dev/null && docker container prune -f >/dev/null || return 1
  until_true 90 nothing_mounted && docker volume rm llama || return 1
  holders=$(ls -A /var/lib/modelfs/volumes)
  [[ -z $holders ]] || { echo "left: $holders"; return 1; }
}
crash_while_running() {
  local holder
  run_page_block "$page" docker-volume >/dev/null || return 1
  holder=$(docker run -d --network none -v llama:/models --user 1000 busybox sleep 600) || return 1
  crash_plugin
  says "not connected" docker exec "$holder" cat /models/acme/llama/config.json || return 1
  start_plugin || return 1
  nothing_mounted || return 1
  docker volume ls -q | grep -x llama >/dev/null || { echo "the volume is not known any more"; return 1; }
  run_page_block "$page" docker-run | same_hashes || return 1
  # The container of before: let go without harm, and whole again when it starts anew.
  docker restart -t 0 "$holder" >/dev/null && docker exec "$holder" cat /models/acme/llama/config.json | cmp - "$work/source/config.json" || return 1
  docker rm -f "$holder" >/dev/null && until_true 90 nothing_mounted
}
crash_engine_while_running() {
  local holder
  holder=$(docker run -d --network none -v llama:/models --user 1000 busybox sleep 600) || return 1
  # Long enough to be seen as an engine, which stays: the plugin looks every 5 s, and a busy machine holds it up.
  sleep 20
  kill -9 "$engine_pid"
  wait "$engine_pid" 2>/dev/null || true
  # Its containerd dies with it, and must be gone, its zombie too, before another one looks.
  until_true 60 bash -c "! kill -0 $(cat "$work/exec/containerd/containerd.pid")" || return 1
  rm -f "$work/docker.pid"
  start_engine || return 1
  run_page_block "$page" docker-run | same_hashes || return 1
  docker rm -f "$holder" >/dev/null || return 1
  until_true 90 nothing_mounted && docker volume rm llama
}
governed() { # what the page's configuration shows as comments: a policy over all volumes, and the log of it
  local holder=() id record
  stop_plugin || return 1
  sed -i 's|^# policy = |policy = |; s|^# audit-file = .*|audit-file = "'"$work"'/audit.jsonl"|' /etc/modelfs/volumes.toml
  grep '^policy' /etc/modelfs/volumes.toml && grep '^audit-file' /etc/modelfs/volumes.toml || return 1
  printf '[[rule]]\neverybody = true\nmodels = ["*"]\nmay = "read"\n' >/etc/modelfs/policy.toml
  start_plugin && volume judged -o model=acme/llama -o uid=1000 >/dev/null || return 1
  id=$(docker run -d --network none -v judged:/models --user 1000 busybox sleep 600) || return 1
  holder=(docker exec "$id" cat /models/acme/llama/config.json)
  "${holder[@]}" | cmp - "$work/source/config.json" || return 1
  printf '[[rule]]\ncontainers = ["%s"]\nmodels = ["*"]\nmay = "see"\n' "$id" | cat - /etc/modelfs/policy.toml >"$work/policy.toml"
  cp "$work/policy.toml" /etc/modelfs/policy.toml && kill -HUP "$plugin_pid" || return 1
  until_true 120 says "Permission denied" "${holder[@]}" || return 1
  record=$(modelfs audit show "$work/audit.jsonl" --outcome denied --json | tail -1)
  echo "$record"
  jq -e --arg id "$id" '.container == $id and .uid == 1000 and .model == "acme/llama"' <<<"$record" || return 1
  in_container -v judged:/models --user 1000 -- cat /models/acme/llama/config.json | cmp - "$work/source/config.json" || return 1
  docker rm -f "$id" >/dev/null && until_true 90 nothing_mounted && docker volume rm judged || return 1
  page_block "$page" toml volumes >/etc/modelfs/volumes.toml
}
handed_over_by_systemd() {
  command -v systemd-socket-activate >/dev/null || { not_here "socket activation" "systemd-socket-activate is not there"; return 0; }
  local command
  command=$(page_block "$page" sh volume-plugin)
  # shellcheck disable=SC2086
  systemd-socket-activate --listen=/run/docker/plugins/modelfs.sock -E PATH -E HOME -E AWS_ACCESS_KEY_ID -E AWS_SECRET_ACCESS_KEY \
    $command >>"$work/plugin.log" 2>&1 &
  plugin_pid=$!
  until_true 120 test -S /run/docker/plugins/modelfs.sock || return 1
  run_page_block "$page" docker-volume && run_page_block "$page" docker-run | same_hashes && docker volume rm llama || return 1
  stop_plugin
  rm -f /run/docker/plugins/modelfs.sock
}
units_are_sound() {
  command -v systemd-analyze >/dev/null || { not_here "units of the plugin" "systemd-analyze is not there"; return 0; }
  mkdir -p "$work/units"
  cp systemd/modelfs-volume-plugin.* "$work/units/"
  # The program must be there to be named.
  sed -i "s|^ExecStart=/usr/bin/modelfs|ExecStart=$modelfs|" "$work/units/modelfs-volume-plugin.service"
  (cd "$work/units" && systemd-analyze verify --recursive-errors=no ./modelfs-volume-plugin.service ./modelfs-volume-plugin.socket) || return 1
  # A start limit would end the socket too, and the engine find no plugin after the configuration was mended.
  sed -n '/^\[Unit\]/,/^\[Service\]/p' systemd/modelfs-volume-plugin.service | grep -x 'StartLimitIntervalSec=0' || return 1
  # What docs/DEPLOY.md says of limits holds for its mounts too.
  grep -x 'Slice=modelfs.slice' systemd/modelfs-volume-plugin.service || return 1
  # A mount namespace of its own would hide its mounts from the engine.
  ! grep -nE '^(PrivateTmp|PrivateMounts|PrivateDevices|Protect|ReadOnly|ReadWrite|Inaccessible|Temporary|Bind|Mount)' systemd/modelfs-volume-plugin.service
}
no_secret_is_kept() {
  local file
  for file in /etc/modelfs/keys/llama.key /etc/modelfs/publisher/signing.key; do
    ! grep -rqlF "$(cat $file)" /var/lib/modelfs "$work/plugin.log" "$work/engine.log" "$work/docker" || { echo "$file was kept"; return 1; }
  done
  ! grep -rqF storage-password /var/lib/modelfs "$work/plugin.log" "$work/engine.log"
}

docker_steps() {
  page_block "$page" toml volumes >/etc/modelfs/volumes.toml
  step "start the plugin as docs/DEPLOY.md says" start_plugin
  step "make a volume as docs/DEPLOY.md says" page_volume
  step "read it as user 1000 as docs/DEPLOY.md says" page_run
  step "nothing is mounted after the last container" nothing_mounted
  step "count the bytes of one load" count_one_load
  step "two containers read at once, the cache is filled once" two_at_once
  step "two volumes of one version share its memory" two_volumes_one_memory
  step "a volume cannot be written" read_only
  step "a user that the volume is not for reads nothing" others_are_kept_out
  local store=(-o store=s3://models/prod -o model=acme/llama)
  step_refuses "a typo" "did you mean \`model\`" -o store=s3://models/prod -o modle=acme/llama
  step_refuses "a volume without a store" "-o store=" -o model=acme/llama
  step_refuses "a key itself" "that is a key itself" "${store[@]}" -o "key=$(cat /etc/modelfs/keys/llama.key)"
  step_refuses "a passphrase" "would leave a secret" "${store[@]}" -o passphrase=hunter2
  step_refuses "a file of the host" "below /etc/modelfs/keys" "${store[@]}" -o key=file:/etc/shadow
  step_refuses "a way out of the folder of keys" "below /etc/modelfs/keys" "${store[@]}" -o key=file:/etc/modelfs/keys/../volumes.toml
  step_refuses "a folder of the host" "--allow-store" -o "store=$work/source" -o key=file:/etc/modelfs/keys/llama.key
  step_refuses "another bucket" "--allow-store" -o store=s3://other/prod -o key=file:/etc/modelfs/keys/llama.key
  step_refuses "another publisher" "the administrator has decided it" "${store[@]}" -o trust-on-first-use
  step_refuses "a cache of its own" "one cache serves all volumes" "${store[@]}" -o cache=1GiB
  step_refuses "another Vault" "credentials are sent there" "${store[@]}" -o vault-addr=https://vault.example
  step "docker tells why a foreign model is not mounted" mount_refused acme/foreign "trust"
  step "tamper with a manifest" tamper_manifest
  step "docker tells that a model was tampered with" mount_refused acme/tampered "[MAN"
  step "tampered weights are not read" tampered_data_is_not_read
  step "docker tells which model is not there" mount_refused acme/none "acme/none"
  step "a volume in use is not removed" in_use_stays
  step "who is not root is turned away" others_are_turned_away
  step "docker kill leaves no mount, and no folder" kill_everything
  step "the plugin is killed while containers run, and starts again" crash_while_running
  step "the engine is killed while containers run, and starts again" crash_engine_while_running
  step "a container that the policy refuses stands in the log, and another reads" governed
  step "no secret is kept" no_secret_is_kept
  step "the plugin stops" stop_plugin
  step "the units are sound, and leave the mounts to be seen" units_are_sound
  step "systemd hands the socket over" handed_over_by_systemd
  step "nothing is mounted" nothing_mounted
}

# ---- The same as a managed plugin.

managed_build() {
  (cd "$work" && ln -sfn "$OLDPWD/systemd" systemd && run_page_block "$page" managed-plugin-build)
}
managed_run() {
  run_page_block "$page" docker-volume && run_page_block "$page" docker-run | same_hashes || return 1
  local holder
  holder=$(docker run -d --network none -v llama:/models --user 1000 busybox sleep 600) || return 1
  says "in use" docker plugin disable modelfs || return 1
  in_container -v llama:/models --user 1000 -- sh -c 'cd /models/acme/llama && sha256sum *' | same_hashes || return 1
  docker rm -f "$holder" >/dev/null
}
managed_again() {
  docker plugin disable --force modelfs && until_true 90 nothing_mounted && docker plugin enable modelfs || return 1
  docker volume ls -q | grep -x llama >/dev/null && run_page_block "$page" docker-run | same_hashes && docker volume rm llama
}
managed_gone() { docker plugin disable modelfs && docker plugin rm modelfs && until_true 90 nothing_mounted; }
managed_steps() {
  # The engine remembers that the name was another plugin's until it starts again.
  step "the engine starts without the other plugin" restart_engine
  page_block "$page" toml volumes >/etc/modelfs/volumes.toml
  step "make the managed plugin as docs/DEPLOY.md says" managed_build
  step "enable it as docs/DEPLOY.md says" run_page_block "$page" managed-plugin-enable
  step "containers read a volume of the managed plugin" managed_run
  step "it knows its volumes when it is enabled again" managed_again
  step "the managed plugin goes and leaves nothing" managed_gone
}

# ---- Podman.

podman_setup() {
  mkdir -p "$work/podman" "$work/containers"
  # What this machine needs of Podman, then what the page says.
  {
    echo '[containers]'
    echo 'default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]'
    echo '[engine]'
    echo 'cgroup_manager = "cgroupfs"'
    echo 'events_logger = "file"'
    echo 'runtime = "runc"'
    page_block "$page" toml podman
  } >"$work/containers.conf" || return 1
  printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$work/podman/graph" "$work/podman/run" >"$work/storage.conf"
  export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf
  rootfs "$work/images/podman"
  tar -C "$work/images/podman" -c . | podman import - localhost/busybox >/dev/null
}
podman_two() {
  local one
  one=$(podman run -d --network none --user 1000 -v llama:/models:ro localhost/busybox sleep 600) || return 1
  run_page_block "$page" podman-run | same_hashes || return 1
  podman exec "$one" cat /models/acme/llama/config.json | cmp - "$work/source/config.json" || return 1
  says "Read-only file system" podman run --rm --network none -v llama:/models localhost/busybox touch /models/acme/llama/x || return 1
  podman rm -f -t 0 "$one" >/dev/null && until_true 90 nothing_mounted
}
podman_refusals() {
  says "did you mean \`model\`" podman volume create --driver modelfs -o store=s3://models/prod -o modle=x refused &&
    says "below /etc/modelfs/keys" podman volume create --driver modelfs -o store=s3://models/prod -o key=file:/etc/shadow refused &&
    podman volume create --driver modelfs -o store=s3://models/prod -o model=acme/foreign -o key=file:/etc/modelfs/keys/llama.key foreign &&
    says "trust" podman run --rm --network none -v foreign:/models localhost/busybox true && podman volume rm foreign
}
podman_bind() {
  run_page_block "$page" podman-bind || return 1
  mkdir -p /srv/models/llama
  modelfs mount s3://models/prod /srv/models/llama --model acme/llama --key file:/etc/modelfs/keys/llama.key --trust /etc/modelfs/signing.pub \
    --s3-endpoint http://127.0.0.1:9000 --s3-region us-east-1 --allow-other --cache 64MiB --daemon || return 1
  podman exec reader sh -c 'cd /models/llama/acme/llama && sha256sum *' | same_hashes || return 1
  modelfs umount /srv/models/llama || return 1
  podman exec reader sh -c '[ -z "$(ls -A /models/llama)" ]' || { echo "the container still sees it"; return 1; }
  podman rm -f -t 0 reader >/dev/null && umount /srv/models && rmdir /srv/models/llama && nothing_mounted
}
podman_crash() {
  local before
  before=$(podman run -d --network none --user 1000 -v llama:/models:ro localhost/busybox sleep 600) || return 1
  crash_plugin
  start_plugin || return 1
  # Podman believes that it is mounted, and does not ask: no container may start on an empty folder.
  says "volumes/llama" podman run --rm --network none -v llama:/models:ro localhost/busybox true || return 1
  podman rm -f -t 0 "$before" >/dev/null || return 1
  run_page_block "$page" podman-run | same_hashes && podman volume rm llama && until_true 90 nothing_mounted
}
podman_steps() {
  command -v podman >/dev/null || { skip podman "podman is not installed"; return; }
  mount -t tmpfs tmpfs /srv
  page_block "$page" toml volumes >/etc/modelfs/volumes.toml
  step "set up Podman as docs/DEPLOY.md says" podman_setup
  step "start the plugin for Podman" start_plugin
  step "make a volume in Podman as docs/DEPLOY.md says" run_page_block "$page" podman-volume
  step "read it in Podman, two at once, as user 1000" podman_two
  step "Podman tells what was refused" podman_refusals
  step "the plugin is killed, and Podman mounts again" podman_crash
  step "a bind mount with rslave sees mounts come and go" podman_bind
  step "the plugin stops after Podman" stop_plugin
}

# ---- Compose.

compose_setup() {
  mkdir -p "$DOCKER_CONFIG/cli-plugins" /etc/modelfs/vault
  ln -sf "$compose" "$DOCKER_CONFIG/cli-plugins/docker-compose"
  image vault "$vault" && image versitygw "$versitygw" && image busybox || return 1
  MODELFS=$modelfs IMAGE=$work/image run_page_block "$page" compose-images || return 1
  page_block "$page" toml volumes-compose >/etc/modelfs/volumes.toml && start_plugin
}
export MODEL_SOURCE=$work/source MODEL_CANARIES=$work/canaries DOCKER_ROOT=$work/docker
compose_file() { docker compose -f docs/compose/compose.yaml "$@"; }
compose_up() {
  run_page_block "$page" compose-up || { compose_file logs; return 1; }
  compose_file logs --no-log-prefix consumer | same_hashes
}
# A scanner that finds nothing proves something only if it finds what is there.
scanner_finds() {
  local folder
  docker run --name baked --network none -v "$work/source:/source:ro" busybox cp /source/model.safetensors /baked || return 1
  compose_file up --detach --no-deps --force-recreate scanner >/dev/null 2>&1
  [[ $(docker wait modelfs-scanner-1) == 1 ]] || { compose_file logs scanner; return 1; }
  compose_file logs scanner
  folder=$(docker inspect baked | jq -r '.[0].GraphDriver.Data.UpperDir')
  # By its texts, and by its form.
  compose_file logs --no-log-prefix scanner | grep -F "${folder##*/overlay2/}/baked" | grep '^/docker/' >/dev/null || return 1
  compose_file logs --no-log-prefix scanner | grep -F "${folder##*/overlay2/}/baked" | grep '^CERTAIN *safetensors' >/dev/null || return 1
  docker rm baked
}
compose_down() { run_page_block "$page" compose-down && until_true 90 nothing_mounted && [[ -z $(docker ps -aq) && -z $(docker volume ls -q) ]]; }
compose_steps() {
  [[ -x $compose && -x $vault ]] || { skip compose "$compose or $vault is not installed"; return; }
  stop_store
  step "images, Compose and the plugin as docs/DEPLOY.md says" compose_setup
  step "compose up: Vault, store, publisher, consumer and scanner" compose_up
  step "a model that is baked into an image layer is found" scanner_finds
  step "compose down leaves nothing" compose_down
  step "the plugin stops after Compose" stop_plugin
}

make_model
step "start the S3 server" start_store
step "publish the models" publish
step "start the Docker engine" start_engine
step "make an image" image busybox
[[ $parts != *" docker "* ]] || docker_steps
[[ $parts != *" managed "* ]] || managed_steps
[[ $parts != *" podman "* ]] || podman_steps
[[ $parts != *" compose "* ]] || compose_steps
step "the engine stops" stop_engine
step "no mount is left" nothing_mounted
finish
