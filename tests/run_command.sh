#!/usr/bin/env bash
# `modelfs run`, the container image, and mounts by an inherited descriptor: real processes, real namespaces, a real Docker.
#
#   tests/run_command.sh      needs the release build (MODELFS names another binary), root, /dev/fuse; for the image Docker
#
# What docs/DEPLOY.md says about them is cut out of that page and run as it stands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
modelfs=$(realpath "$modelfs" 2>/dev/null || echo "$modelfs")
page=$PWD/docs/DEPLOY.md
if [[ ! -x $modelfs ]]; then
  step "run: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
[[ $EUID == 0 && -c /dev/fuse ]] || { skip "modelfs run" "needs root and /dev/fuse"; finish; exit; }

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-run.XXXXXX")
chmod 755 "$work"
mnt=$work/mnt
mkdir "$mnt" "$work"/{bin,source,store,user,secrets}
# As modelfs and mount.fuse3 look for it; ordinary users may not get to where it is built.
cp "$modelfs" "$work/bin/modelfs"
modelfs=$work/bin/modelfs
export PATH=$work/bin:$PATH
export HOME=$work/home XDG_CONFIG_HOME=$work/config XDG_STATE_HOME=$work/state MODELFS_STATE_DIR=$work/state/modelfs
mkdir -p "$HOME"
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS|STRICT)_' | grep -vE '^MODELFS_(TEST_[A-Z_]+|STATE_DIR)$'); do unset "$name"; done
nobody=65534 image_user=65532
docker_pid="" fuse_mode=$(stat -c %a /dev/fuse)

mounted() { grep -qE "^[^ ]+ ${1:-$mnt} fuse\.modelfs " /proc/self/mounts; }
cleanup() {
  local at
  if [[ -n $docker_pid ]]; then
    docker ps -aq 2>/dev/null | xargs -r docker rm -f >/dev/null 2>&1 || true
    kill "$docker_pid" 2>/dev/null && wait "$docker_pid" 2>/dev/null || true
  fi
  for at in $(grep -E " $work/[^ ]+ fuse" /proc/self/mounts | cut -d' ' -f2); do umount -l "$at" 2>/dev/null || true; done
  jobs -p | xargs -r kill 2>/dev/null || true
  chmod "$fuse_mode" /dev/fuse
  if [[ -n ${MODELFS_TEST_RUN_KEEP:-} ]]; then echo "kept: $work"; else rm -rf --one-file-system "$work"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM
fresh() { # after a step that failed: nothing of it is in the way of the next
  local at
  [[ -z ${started:-} ]] || ! kill -9 "$started" 2>/dev/null || wait "$started" 2>/dev/null || true
  for at in $(grep -E " $work/[^ ]+ fuse" /proc/self/mounts | cut -d' ' -f2); do umount -l "$at" 2>/dev/null || true; done
}
until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || { echo "not within the time: $*"; return 1; }; sleep 0.1; done
}

step_run() { # NAME COMMAND...: a step that begins with nothing mounted
  fresh
  step "$@"
}

# ---- A model.

python3 - "$work/source" <<'PYTHON'
import random, sys
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "weights.bin").write_bytes(random.Random(5).randbytes((20 << 20) + 99))
(folder / "config.json").write_text('{"layers": 2}\n')
PYTHON
make_store() {
  modelfs keygen "$work/secrets/key" && modelfs keygen --signing "$work/secrets/sign" &&
    modelfs seal "$work/source" "$work/store" acme/m --key "file:$work/secrets/key" --sign "$work/secrets/sign"
}
step "a sealed model" make_store
trust=$work/secrets/sign.pub
sum=$(sha256sum <"$work/source/weights.bin" | cut -d' ' -f1)
common=("$work/store" "$mnt" --key "file:$work/secrets/key" --trust "$trust" --cache 128MiB)
# run [OPTION...] -- COMMAND...: what it and the command say lies in $work/out and $work/err.
run() { modelfs run "${common[@]}" "$@" >"$work/out" 2>"$work/err"; }
wiped() { # nothing is left of the last run
  ! mounted || { echo "still mounted"; return 1; }
  ! modelfs -q status "$mnt" 2>/dev/null || { echo "still answers"; return 1; }
  grep -q 'wiped wiped_bytes' "$work/err" || { cat "$work/err"; echo "did not say that it wiped"; return 1; }
}
run_exits() { # CODE ARGUMENT...: the code, and nothing left
  local wanted=$1
  shift
  exits_with "$wanted" run "$@" || { cat "$work/err"; return 1; }
  wiped
}

# ---- The command's life.

reads_and_returns() {
  run_exits 7 -- sh -c "sha256sum <$mnt/acme/m/weights.bin; exit 7" && grep -q "$sum" "$work/out"
}
step_run "run: the command reads the model, its exit code comes back, the mount is gone and wiped" reads_and_returns
step_run "run: a command that ends with 0" run_exits 0 -- true
step_run "run: a command killed with SIGKILL is 137" run_exits 137 -- sh -c 'kill -9 $$'
step_run "run: a command that cannot be executed is 126" run_exits 126 -- "$work/source/config.json"
not_there() {
  exits_with 127 run -- no-such-command-anywhere && ! mounted && ! grep -q 'wiped' "$work/err"
}
step_run "run: a command that is not there is 127, and nothing is fetched for it" not_there
refuses_daemon() { exits_with 2 run --daemon -- true && grep -q 'stays as long as its command' "$work/err"; }
step_run "run: --daemon is refused" refuses_daemon
wrong_key() {
  modelfs keygen "$work/secrets/other" >/dev/null
  exits_with 25 modelfs run "$work/store" "$mnt" --key "file:$work/secrets/other" --trust "$trust" -- touch "$work/started" &&
    [[ ! -e $work/started ]] && ! mounted
}
step_run "run: without the key nothing is started" wrong_key

start() { # ARGUMENT...: in the background, until the command says that it goes
  : >"$work/out"
  # What a shell starts with & ignores SIGINT and SIGQUIT, and so would the command.
  env --default-signal=INT,QUIT modelfs run "${common[@]}" "$@" >"$work/out" 2>"$work/err" &
  started=$!
  until_true 120 grep -q going "$work/out" || { cat "$work/err"; return 1; }
}
over() { [[ ! -e /proc/$1 ]] || grep -q '^State:.Z' "/proc/$1/status"; } # PID: ended, waited for or not
ended_with() { # CODE
  local rc=0
  until_true 300 over "$started" || return 1
  wait "$started" || rc=$?
  [[ $rc == "$1" ]] || { cat "$work/out" "$work/err"; echo "exit status $rc, wanted $1"; return 1; }
}
signals_reach() {
  local signal
  start -- bash -c 'for s in TERM INT HUP QUIT USR1 USR2 WINCH; do trap "echo got $s" $s; done
    trap "echo got TERM; [[ -r '"$mnt"'/acme/m/config.json ]] && exit 5" TERM; echo going; while :; do sleep 0.05; done' || return 1
  for signal in INT HUP QUIT USR1 USR2 WINCH; do
    kill -$signal "$started"
    until_true 90 grep -q "got $signal" "$work/out" || return 1
  done
  mounted || return 1
  kill -TERM "$started"
  ended_with 5 && grep -q 'got TERM' "$work/out" && wiped
}
step_run "run: seven signals reach the command; SIGTERM reaches it while its files are still there" signals_reach
killed_outside() {
  start -- sh -c 'echo going; exec sleep 600' || return 1
  kill -9 "$(pgrep -P "$started")"
  ended_with 137 && wiped
}
step_run "run: the command is killed from outside" killed_outside
twice() {
  rm -f "$work/enough"
  start -- bash -c 'trap "" TERM; echo going; for i in $(seq 3000); do [[ ! -e '"$work/enough"' ]] || exit 4; sleep 0.1; done' || return 1
  kill -TERM "$started" && sleep 0.2 && kill -TERM "$started" && sleep 1.5
  touch "$work/enough"
  ended_with 4 && wiped
}
step_run "run: two SIGTERMs that the command ignores change nothing: its end is waited for, then all is wiped" twice
held_by_orphan() {
  local began orphan
  # Its file is open once it is called sleep.
  start -- bash -c 'setsid sleep 600.125 <'"$mnt"'/acme/m/config.json & until pgrep -f "^sleep 600\.125\$" >/dev/null; do sleep 0.05; done
    echo going; exit 3' || return 1
  began=$SECONDS
  ended_with 3 || return 1
  orphan=$(pgrep -f '^sleep 600\.125$' | tail -1)
  kill "$orphan" || return 1
  ((SECONDS - began < 120)) && ! mounted && grep -q 'detached while in use' "$work/err"
}
step_run "run: a process left behind that holds a file delays the end by 2 s and is named" held_by_orphan
taken_off() {
  rm -f "$work/enough"
  start -- sh -c 'echo going; until [ -e '"$work/enough"' ]; do sleep 0.1; done; echo went on; exit 6' || return 1
  umount -l "$mnt"
  until_true 90 grep -q 'was taken off while the command runs' "$work/err" || return 1
  exits_with 3 modelfs -q status "$mnt" 2>/dev/null || return 1
  touch "$work/enough"
  ended_with 6 && grep -q 'went on' "$work/out" && wiped
}
step_run "run: unmounted from outside: said at once, the command goes on, its code comes back" taken_off
stop_first() { # a store that never answers
  local port began
  python3 -c 'import socket, sys, time; s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(9); print(s.getsockname()[1], flush=True); time.sleep(600)' >"$work/port" &
  local listener=$!
  until_true 90 test -s "$work/port" || return 1
  port=$(cat "$work/port")
  AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b modelfs run s3://bucket/p "$mnt" --s3-endpoint "http://127.0.0.1:$port" --key "file:$work/secrets/key" \
    --trust "$trust" --cache 64MiB -- touch "$work/started" >"$work/out" 2>"$work/err" &
  started=$!
  sleep 1
  began=$SECONDS
  kill -TERM "$started"
  ended_with 143 || return 1
  kill $listener
  ((SECONDS - began < 45)) && [[ ! -e $work/started ]] && ! mounted
}
step_run "run: SIGTERM while a store does not answer ends within seconds, and nothing is started" stop_first

# ---- What the command does not get.

secrets_gone() {
  local key variables="MODELFS_KEY MODEL_ENCRYPTION_KEY MODELFS_PASSPHRASE VAULT_TOKEN MODELFS_VAULT_SECRET_ID MODELFS_VAULT_PASSWORD MY_KEY"
  local hook=https://hooks.example/secret-of-ours
  key=$(cat "$work/secrets/key")
  # The detector first: with --keep-env the variable is there.
  MY_KEY=$key modelfs run "$work/store" "$mnt" --key env:MY_KEY --keep-env OTHER --keep-env VAULT_TOKEN --trust "$trust" --cache 64MiB \
    -- env >"$work/out" 2>"$work/err" || { cat "$work/err"; return 1; }
  ! grep -q "$key" "$work/out" || { echo "MY_KEY was given on"; return 1; }
  VAULT_TOKEN=hvs.kept modelfs run "${common[@]}" --keep-env VAULT_TOKEN -- env 2>/dev/null | grep '^VAULT_TOKEN=hvs.kept$' >/dev/null ||
    { echo "--keep-env does not keep"; return 1; }
  # shellcheck disable=SC2046
  env $(for v in $variables; do echo "$v=secret-of-ours"; done) MODELFS_ALERT_WEBHOOK="$hook" MODELFS_LOG=info PLAIN=stays modelfs run "${common[@]}" -- \
    sh -c 'env; tr "\0" "\n" </proc/$PPID/environ' >"$work/out" 2>"$work/err" || { cat "$work/err"; return 1; }
  grep -q '^PLAIN=stays$' "$work/out" || return 1
  ! grep -E "^(${variables// MY_KEY/})=" "$work/out" | tr '\n' ' ' | grep . || return 1
  ! grep -vE '^MY_KEY=' "$work/out" | grep secret-of-ours >/dev/null
}
step_run "run: no secret is in the command's environment, nor left in ours" secrets_gone
# As a service manager or a shell may leave it to us; the kernel then collects children unseen.
children_ignored() {
  timeout -k 1 120 python3 -c '
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execvp("modelfs", ["modelfs", *sys.argv[1:]])' run "${common[@]}" -- sh -c 'exit 7'
}
step_exits 7 "run: the end of the command is seen where its end was to be ignored" children_ignored
clean_process() {
  local look='ulimit -c; ulimit -Hc; ulimit -l; grep -E "^Sig(Blk|Ign)" /proc/self/status; ls /proc/self/fd; stat -c "%u" /proc/self/mem'
  bash -c "$look" >"$work/before"
  run -- bash -c "$look; ps -o pid=,pgid= -p \$\$ >&2" || { cat "$work/err"; return 1; }
  diff "$work/before" "$work/out" || return 1
  # A process group of its own.
  grep -E '^ *([0-9]+) +\1$' "$work/err"
}
step_run "run: limits, signal mask and descriptors are as before, the process group is its own" clean_process
at_a_terminal() {
  python3 - "$work" "${common[@]}" <<'PYTHON'
import os, pty, re, select, sys, time
work, *common = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    os.execvp("modelfs", ["modelfs", "-q", "run", *common, "--", "bash", "-c",
              "trap 'echo interrupted; exit 9' INT; echo going; while :; do sleep 0.05; done"])
seen, sent, end = b"", 0, time.time() + 300
while time.time() < end:
    if select.select([terminal], [], [], 0.1)[0]:
        try:
            seen += os.read(terminal, 4096)
        except OSError:
            break
    if b"going" in seen and sent == 0:
        os.write(terminal, b"\x1a")  # Ctrl-Z: it must not stay stopped
        sent = time.time()
    elif sent and time.time() - sent > 1:
        os.write(terminal, b"\x03")
        sent = end
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 9, (status, seen)
assert seen.count(b"interrupted") == 1, seen
PYTHON
}
step_run "run: at a terminal Ctrl-C reaches the command once, and Ctrl-Z does not stop it for ever" at_a_terminal
dies_with_us() {
  start -- sh -c 'echo going; exec sleep 600' || return 1
  local child
  child=$(pgrep -P "$started")
  kill -9 "$started"
  wait "$started" 2>/dev/null || true
  umount -l "$mnt"
  until_true 90 over "$child" || { kill "$child"; return 1; }
}
step_run "run: when modelfs is killed, the command is told" dies_with_us

# ---- Strict.

# in_root COMMAND...: on a root of its own, as a container has it, with this machine's programs and the test's files mounted into it; a
# look at the root passes over those. $weights is put there.
weights=""
in_root() {
  WORK=$work WEIGHTS=$weights unshare --mount --propagation private bash -euc '
    root=$1
    shift
    mount -t tmpfs -o mode=755 root "$root"
    for at in /bin /sbin /lib /lib64; do [[ ! -L $at ]] || cp -P "$at" "$root$at"; done
    for at in /bin /sbin /lib /lib64 /usr /etc /dev /proc /sys; do
      [[ -L $at || ! -d $at ]] || { mkdir "$root$at"; mount --rbind "$at" "$root$at"; }
    done
    mkdir -p "$root/opt" "$root$WORK"
    [[ -z $WEIGHTS ]] || cp "$WEIGHTS" "$root/opt/asset-7"
    mount --bind "$WORK" "$root$WORK"
    exec chroot "$root" "$@"' _ "$work/root" "$@"
}
mkdir "$work/root"
run_in_root() { in_root modelfs run "${common[@]}" "$@" >"$work/out" 2>"$work/err"; }
python3 - "$work/asset" <<'PYTHON'
import json, sys
size = 2 << 20
head = json.dumps({"w": {"dtype": "BF16", "shape": [1024, 1024], "data_offsets": [0, size]}}).encode()
open(sys.argv[1], "wb").write(len(head).to_bytes(8, "little") + head + b"\1" * size)
PYTHON
chmod 644 "$work/asset"
strict() {
  exits_with 26 in_root modelfs run "$work/store" "$mnt" --key "file:$work/secrets/key" --trust-on-first-use --cache 64MiB --strict -- \
    touch "$work/started" 2>"$work/err" || { cat "$work/err"; return 1; }
  grep -q 'INSECURE' "$work/err" && grep -q 'trust:' "$work/err" && [[ ! -e $work/started ]] && ! mounted || return 1
  STRICT_MODEL_SECURITY=true exits_with 26 run_in_root --verify aead -- touch "$work/started" || return 1
  STRICT_MODEL_SECURITY=maybe exits_with 2 run -- touch "$work/started" || return 1
  [[ ! -e $work/started ]] || return 1
  # Told all the same without it.
  run --verify aead -- true && grep -q 'WARN.*verify: chunks are checked by their tags alone' "$work/err"
}
step_run "run: strict security stops before the command with 26; without it the findings are told" strict
strict_looks_at_the_root() {
  exits_with 0 run_in_root --strict -- echo started || { cat "$work/err"; return 1; }
  grep -x started "$work/out" && ! grep baked-models "$work/err" || return 1
  weights=$work/asset
  exits_with 26 run_in_root --strict -- echo started || { weights=""; cat "$work/err"; return 1; }
  weights=""
  [[ ! -s $work/out ]] && grep 'baked-models: /opt/asset-7' "$work/err" && grep 'nothing was started' "$work/err"
}
step_run "run: strict starts the command on a root without weights, and on the same with some it ends with 26" strict_looks_at_the_root

# ---- As process 1.

first_process() { # ARGUMENT...
  unshare --pid --fork --mount-proc --kill-child modelfs run "${common[@]}" "$@" >"$work/out" 2>"$work/err"
}
reaps() {
  exits_with 8 first_process -- bash -c '
    [[ $PPID == 1 ]] || exit 90
    for i in 1 2 3 4 5; do (sleep 0.2 &) ; done; sleep 1
    for i in $(seq 601); do ps -eo stat= | grep "^Z" >/dev/null || break; ((i <= 600)) || exit 91; sleep 0.1; done
    (setsid sh -c "trap \"\" TERM; sleep 60" &); exit 8' || { cat "$work/err"; return 1; }
  wiped
}
step_run "run: as process 1 orphans are reaped, and those that stay end with the command" reaps
first_is_told() {
  unshare --pid --fork --mount-proc --kill-child modelfs run "${common[@]}" -- \
    bash -c 'trap "echo got TERM; exit 11" TERM; echo going; while :; do sleep 0.05; done' >"$work/out" 2>"$work/err" &
  started=$!
  until_true 120 grep -q going "$work/out" || { cat "$work/err"; return 1; }
  # unshare does not forward: the kernel shows its child here under another number.
  kill -TERM "$(pgrep -P "$started")"
  ended_with 11 && wiped
}
step_run "run: as process 1 SIGTERM is heard and handed on" first_is_told

# ---- A mount that somebody else made.

may_lock=(setpriv "--reuid=$nobody" "--regid=$nobody" --clear-groups "--bounding-set=-all,+ipc_lock" "--inh-caps=-all,+ipc_lock" "--ambient-caps=-all,+ipc_lock")
if prlimit --memlock=536870912:536870912 true 2>/dev/null; then
  may_lock=(prlimit --memlock=536870912:536870912 setpriv "--reuid=$nobody" "--regid=$nobody" --clear-groups --bounding-set=-all --inh-caps=-all --ambient-caps=-all)
  raises=1
else
  # CAP_IPC_LOCK stands for a limit that is high enough: where root may not raise hard limits it is the only way.
  echo "this machine's root may not raise the limit of locked memory: CAP_IPC_LOCK stands for it" >&2
  raises=""
fi
chown $nobody "$work/user"
install -m 600 -o $nobody "$work/secrets/key" "$work/user/key"
cp "$trust" "$work/user/trust.pub"
cp -r "$work/store" "$work/user/store" && chown -R $nobody "$work/user/store"
as_user() { # COMMAND...: as nobody, who has no right to mount and cannot open /dev/fuse
  env HOME="$work/user" MODELFS_STATE_DIR="$work/user/state" XDG_RUNTIME_DIR="$work/user/run" "${may_lock[@]}" --no-new-privs "$@"
}
mkdir -m 700 "$work/user/run" && chown $nobody "$work/user/run"
given=(--key "file:$work/user/key" --trust "$work/user/trust.pub" --cache 64MiB)
serve_given() { # OPTIONS PATH [ARGUMENT...]: until it is there
  local options=$1 path=$2
  shift 2
  : >"$work/out"
  chmod 600 /dev/fuse
  as_nobody_with_mount "$options" modelfs mount "$work/user/store" "$path" "${given[@]}" "$@" >"$work/out" 2>"$work/err" &
  started=$!
  until_true 120 grep -q 'acme/m of' "$work/out" || { cat "$work/err"; return 1; }
}
as_nobody_with_mount() { # OPTIONS COMMAND...
  local options=$1
  shift
  exec env HOME="$work/user" MODELFS_STATE_DIR="$work/user/state" XDG_RUNTIME_DIR="$work/user/run" \
    python3 tests/open_mount.py "$mnt" "$options" "${may_lock[@]}" --no-new-privs "$@"
}
by_descriptor() {
  serve_given "user_id=$nobody,group_id=$nobody,allow_other,default_permissions" /dev/fd/3 --umask 0222 || return 1
  local caps pid
  pid=$(pgrep -f "^modelfs mount $work/user/store" | head -1)
  caps=$(awk '/^CapEff/ {print $2}' "/proc/$pid/status")
  [[ $caps == 0000000000000000 || ( -z $raises && $caps == 0000000000004000 ) ]] || { echo "it has capabilities: $caps"; return 1; }
  [[ $(sha256sum <"$mnt/acme/m/weights.bin" | cut -d' ' -f1) == "$sum" ]] || return 1
  setpriv --reuid=1234 --regid=1234 --clear-groups cmp "$mnt/acme/m/config.json" "$work/source/config.json" || return 1
  ! touch "$mnt/acme/m/new" 2>/dev/null || return 1
  as_user modelfs status "$mnt" --json | jq -e '.passthrough == false and .models[0].name == "acme/m"' >/dev/null || return 1
  as_user modelfs -q status "$mnt"
}
step_run "a descriptor of /dev/fuse is all that a user without rights needs to serve a model" by_descriptor
given_is_locked_at_end() {
  exec 8<"$mnt/acme/m/weights.bin"
  head -c 4096 <&8 >/dev/null
  kill -TERM "$(pgrep -f "^modelfs mount $work/user/store" | head -1)"
  ended_with 0 || return 1
  ! head -c 4096 <&8 >/dev/null 2>&1 || { echo "an open file is still read"; return 1; }
  exec 8<&-
  mounted || { echo "the mount is not ours to take off"; return 1; }
  umount "$mnt"
}
step "its end wipes and refuses readers, and leaves the mount to whoever made it" given_is_locked_at_end
given_ends_outside() {
  serve_given "user_id=$nobody,group_id=$nobody,allow_other,default_permissions" /proc/self/fd/3 --umask 0222 || return 1
  umount "$mnt"
  ended_with 0
}
step_run "the end of such a mount from outside ends its server with 0" given_ends_outside
given_run() {
  local rc=0
  (as_nobody_with_mount "user_id=$nobody,group_id=$nobody,allow_other,default_permissions" \
    modelfs run "$work/user/store" /dev/fd/3 "${given[@]}" --umask 0222 -- \
    sh -c "sha256sum <$mnt/acme/m/weights.bin; ls -l /proc/self/fd; exit 12") >"$work/out" 2>"$work/err" || rc=$?
  umount "$mnt"
  [[ $rc == 12 ]] && grep -q "$sum" "$work/out" && ! grep -q /dev/fuse "$work/out" || { cat "$work/out" "$work/err"; return 1; }
}
step_run "run: on a descriptor, the command reads by the mount's path" given_run
modes_unchecked() {
  (as_nobody_with_mount "user_id=$nobody,group_id=$nobody,allow_other" modelfs mount "$work/user/store" /dev/fd/3 "${given[@]}") \
    >"$work/out" 2>"$work/err" && return 1
  umount -l "$mnt"
  grep -q 'does not check modes' "$work/err" || { cat "$work/err"; return 1; }
}
step_run "a mount that lets others in and checks no modes is refused" modes_unchecked
bad_descriptors() {
  refused() { # WORDS PATH
    exits_with 2 modelfs mount "$work/store" "$2" --key "file:$work/secrets/key" --trust "$trust" 3<"$3" 2>"$work/err" &&
      grep -q "$1" "$work/err" || { cat "$work/err"; return 1; }
  }
  refused 'descriptor 3 is /.*config.json, not /dev/fuse' /dev/fd/3 "$work/source/config.json" &&
    refused 'nothing is mounted with it' /proc/self/fd/3 /dev/fuse && refused 'descriptor 77 is not open' /dev/fd/77 /dev/null
}
step_run "a descriptor that is no fresh mount is refused by its number" bad_descriptors
served_already() {
  python3 - "$mnt" <<'PYTHON' >"$work/out" 2>&1 || { cat "$work/out"; return 1; }
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/dev/fuse", os.O_RDWR)
assert libc.mount(b"x", sys.argv[1].encode(), b"fuse.modelfs", 1, f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()) == 0
os.read(fd, 1 << 17)  # the kernel's first request, taken and never answered
done = subprocess.run(["modelfs", "mount", "/nowhere", f"/dev/fd/{fd}", "--key", "file:/k"], pass_fds=[fd], capture_output=True, timeout=120)
os.close(fd)
libc.umount2(sys.argv[1].encode(), 2)
assert done.returncode == 2 and b"another program has begun to serve" in done.stderr, done
PYTHON
}
step_run "a descriptor that another program answers is refused, not waited for" served_already

if ! command -v mount.fuse3 >/dev/null; then
  skip "mount.fuse3" "fuse3 is not installed"
else
  # What docs/DEPLOY.md says, with its names.
  export STORE=$work/user/store MNT=$mnt KEY=$work/user/key TRUST=$work/user/trust.pub SERVER=nobody
  by_mount_fuse() {
    local rc=0
    chmod 600 /dev/fuse
    HOME=$work/user MODELFS_STATE_DIR=$work/user/state XDG_RUNTIME_DIR=$work/user/run \
      prlimit ${raises:+--memlock=536870912:536870912} bash -c "source tests/page.sh; run_page_block '$page' drop-privileges" >"$work/out" 2>&1 || rc=$?
    if [[ -z $raises ]]; then
      # It came as far as the limit: mount.fuse3 has taken every capability away, CAP_IPC_LOCK too.
      umount -l "$mnt" 2>/dev/null || true
      [[ $rc != 0 ]] && grep -q MEMLOCK "$work/out" || { cat "$work/out"; return 1; }
      echo "refused as it must be where the limit of locked memory cannot be raised"
      return 0
    fi
    [[ $rc == 0 ]] || { cat "$work/out"; return 1; }
    [[ $(sha256sum <"$mnt/acme/m/weights.bin" | cut -d' ' -f1) == "$sum" ]] || return 1
    umount "$mnt"
  }
  step_run "mount.fuse3 with drop_privileges, as docs/DEPLOY.md says" by_mount_fuse
fi
chmod "$fuse_mode" /dev/fuse

# ---- The image.

if ! command -v dockerd >/dev/null || ! command -v docker >/dev/null || ! [[ -x /bin/busybox ]]; then
  skip "the image" "docker.io and busybox-static are not installed"
  finish
  exit
fi
export DOCKER_HOST=unix://$work/docker.sock DOCKER_BUILDKIT=0 DOCKER_CONFIG=$work/docker-config
start_docker() {
  cat >"$work/dockerd.sh" <<SH
exec dockerd --data-root "$work/docker" --exec-root "$work/docker-exec" --pidfile "$work/docker.pid" -H "$DOCKER_HOST" \
  --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false >"$work/dockerd.log" 2>&1
SH
  bash "$work/dockerd.sh" &
  docker_pid=$!
  until_true 180 docker info || { tail -5 "$work/dockerd.log"; return 1; }
}
step "start Docker" start_docker
# Non-root in a container opens what udev's rule would let everyone open.
chmod 666 /dev/fuse
export MODELFS=$modelfs IMAGE=$work/image MEMLOCK
MEMLOCK=$([[ -n $raises ]] && echo 536870912 || echo $(($(ulimit -l) * 1024)))
cp -r "$work/secrets" "$work/container" && chown -R $image_user "$work/container"
cp -r "$work/store" "$work/container/store" && chown -R $image_user "$work/container/store"
export STORE=$work/container/store KEY=$work/container/key TRUST=$work/container/sign.pub
step "build the image as docs/DEPLOY.md says" run_page_block "$page" image
image_size() {
  local bytes
  bytes=$(docker image inspect -f '{{.Size}}' modelfs:latest)
  echo "the image: $((bytes >> 20)) MiB"
  ((bytes < 200 << 20))
}
step "the image is small" image_size
no_models() { docker save -o "$work/image.tar" modelfs:latest && modelfs scan "$work/image.tar"; }
step "no model is in the image, by modelfs scan of what docker save writes" no_models
as_ordinary_user() { [[ $(docker image inspect -f '{{.Config.User}}' modelfs:latest) == "$image_user:$image_user" ]]; }
step "the image's user is an ordinary one" as_ordinary_user
# No shell between the engine and the program, and nothing below it that somebody else made.
starts_itself() {
  [[ $(docker image inspect -f '{{json .Config.Entrypoint}} {{json .Config.Cmd}}' modelfs:latest) =~ ^'["/usr/bin/modelfs","run"] '(null|\[\])$ ]] &&
    [[ $(grep -i '^FROM ' docs/container/Dockerfile) == "FROM scratch" ]]
}
step "the image has no base, and starts the program itself" starts_itself
# A container for a program: its own files and modelfs, here busybox.
mkdir "$work/app" && cp /bin/busybox "$work/app/"
build_app() {
  page_block "$page" dockerfile app >"$work/app/Dockerfile" && docker build -q -t app "$work/app"
}
step "an application's image on top of it, as docs/DEPLOY.md says" build_app
reads_in_container() {
  run_page_block "$page" container >"$work/out" 2>"$work/err" || { cat "$work/out" "$work/err"; return 1; }
  grep -q "$sum" "$work/out" || { cat "$work/out" "$work/err"; return 1; }
}
step "a container with the entrypoint reads the model, as docs/DEPLOY.md says" reads_in_container
container=(docker run -d --network none --device /dev/fuse --cap-drop ALL --cap-add SYS_ADMIN --cap-add IPC_LOCK
  --security-opt apparmor=unconfined -v "$STORE:/store:ro" -v "$KEY:/key:ro" -v "$TRUST:/trust.pub:ro"
  --health-interval 1s --health-retries 2 --health-start-period 2s)
inside=(/store /models --key file:/key --trust /trust.pub --cache 64MiB)
# The same image with weights in it, by a name that says nothing.
build_app_with_weights() {
  mkdir "$work/weights" && cp "$work/asset" "$work/weights/" && printf 'FROM app\nCOPY asset /opt/asset-7\n' >"$work/weights/Dockerfile" &&
    docker build -q -t app-with-weights "$work/weights"
}
step "the same image with weights in it" build_app_with_weights
in_container() { # IMAGE [OPTION...]: what it says lies in $work/out and $work/err
  local image=$1
  shift
  docker run --rm "${container[@]:3}" "$@" "$image" "${inside[@]}" -- busybox echo started >"$work/out" 2>"$work/err"
}
weights_in_image() {
  exits_with 0 in_container app-with-weights || { cat "$work/err"; return 1; }
  grep -x started "$work/out" && grep 'WARN.*baked-models: /opt/asset-7' "$work/err" || { cat "$work/err"; return 1; }
  exits_with 26 in_container app-with-weights -e STRICT_MODEL_SECURITY=true || { cat "$work/err"; return 1; }
  [[ ! -s $work/out ]] && grep 'baked-models: /opt/asset-7' "$work/err" && grep 'nothing was started' "$work/err" || { cat "$work/err"; return 1; }
  # The same without them.
  exits_with 0 in_container app -e STRICT_MODEL_SECURITY=true || { cat "$work/err"; return 1; }
  grep -x started "$work/out" && ! grep baked-models "$work/err"
}
step "weights in an image: run tells of them, and with STRICT_MODEL_SECURITY=true its command is not started" weights_in_image
health_is() { [[ $(docker inspect -f '{{.State.Health.Status}}' c1) == "$1" ]]; }
health() {
  "${container[@]}" --name c1 app "${inside[@]}" -- busybox sh -c 'trap "echo told; exit 5" TERM; while :; do busybox sleep 0.1; done' >/dev/null || return 1
  until_true 180 health_is healthy || { docker logs c1; return 1; }
  docker exec c1 modelfs lock /models >/dev/null && until_true 180 health_is unhealthy || { docker inspect -f '{{json .State.Health}}' c1; return 1; }
  docker exec c1 modelfs unlock /models >/dev/null && until_true 180 health_is healthy
}
step "the image's health check: healthy, unhealthy while locked, healthy again" health
stop_container() {
  docker stop -t 120 c1 >/dev/null
  docker logs c1 >"$work/out" 2>&1
  [[ $(docker inspect -f '{{.State.ExitCode}}' c1) == 5 ]] && grep -q told "$work/out" && grep -q 'wiped wiped_bytes' "$work/out" ||
    { cat "$work/out"; return 1; }
}
step "docker stop: the command is told, its code is the container's, all is wiped" stop_container
no_secrets_in_container() {
  "${container[@]}" --name c2 -e MODELFS_KEY=secret-of-ours -e VAULT_TOKEN=secret-of-ours app "${inside[@]}" -- busybox sh -c \
    'busybox env; busybox id -u; busybox grep CapEff /proc/self/status; busybox cat /proc/1/environ' >/dev/null || return 1
  docker wait c2 >/dev/null
  docker logs c2 >"$work/out" 2>&1
  grep -q "^$image_user$" "$work/out" && grep -q 'CapEff:.0000000000000000' "$work/out" && ! grep -q secret-of-ours "$work/out" ||
    { cat "$work/out"; return 1; }
}
step "in a container the command is an ordinary user without capabilities and without our secrets" no_secrets_in_container
reader_without_rights() {
  local given_user=$nobody
  serve_given "user_id=$given_user,group_id=$given_user,allow_other,default_permissions" /dev/fd/3 --umask 0222 || return 1
  local out
  out=$(docker run --rm --network none --cap-drop ALL --security-opt no-new-privileges --user 1000 --read-only \
    -v "$mnt:/models:ro" --entrypoint busybox app sha256sum /models/acme/m/weights.bin) || return 1
  kill -TERM "$(pgrep -f "^modelfs mount $work/user/store" | head -1)"
  ended_with 0
  umount "$mnt"
  [[ $out == "$sum "* ]] || { echo "$out"; return 1; }
}
step_run "a container without any capability reads what a user without rights serves" reader_without_rights
finish
