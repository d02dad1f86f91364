#!/usr/bin/env bash
# docs/RUNBOOK.md, docs/INCIDENTS.md and docs/HARDENING.md: each command, on a real mount that is in the very state the section is
# about: tampered with, rolled back, denied, blocked, locked, killed, its disk full, its store away, its Vault away, its token revoked.
#
#   tests/runbook.sh      needs the release build (MODELFS names another binary), root, /dev/fuse, jq, curl, and for the sections
#                         about stores and Vault tests/parts/install.sh versitygw vault
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

modelfs=$(realpath "${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}")
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
versitygw=$(MODELFS_TEST_CACHE=$cache bash tests/parts/versitygw.sh path)
vault_program=$(MODELFS_TEST_CACHE=$cache bash tests/parts/vault.sh path vault)
runbook=$PWD/docs/RUNBOOK.md incidents=$PWD/docs/INCIDENTS.md hardening=$PWD/docs/HARDENING.md
[[ -x $modelfs ]] || { step "runbook: $modelfs is built (cargo build --release --locked)" false; finish; exit; }
[[ $EUID == 0 && -c /dev/fuse ]] || { skip runbook "needs root and /dev/fuse"; finish; exit; }

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-runbook.XXXXXX")
chmod 755 "$work"
mkdir -p "$work"/{bin,source,mnt,logs,elsewhere,home,state}
ln -s "$modelfs" "$work/bin/modelfs"
[[ ! -x $vault_program ]] || ln -s "$vault_program" "$work/bin/vault"
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS|STRICT)_' | grep -v '^MODELFS_TEST_'); do unset "$name"; done
export PATH=$work/bin:$PATH LC_ALL=C HOME=$work/home XDG_CONFIG_HOME=$work/home/config MODELFS_STATE_DIR=$work/state
export STORE=$work/store MODEL=acme/llama MNT=$work/mnt KEY=$work/llama.key NEW_KEY=$work/new.key TRUST=$work/home/config/modelfs/signing.key.pub
export LOG=$work/logs/audit.log COPY=$work/copy EVIDENCE=$work/evidence SOMEBODY=54321 OPTIONS="" SINCE=1h
export AUDIT_KEY=$work/audit.key.pub CHECKPOINTS=$work/elsewhere/checkpoints SIGNING_KEY=$work/home/config/modelfs/signing.key
export SYSCTL_D=$work/sysctl.d ARCHIVE=$work/archive
mkdir "$SYSCTL_D"
store_pid="" vault_pid=""
cleanup() {
  modelfs umount "$MNT" >/dev/null 2>&1 || umount -l "$MNT" 2>/dev/null || true
  [[ -z $store_pid ]] || kill -9 "$store_pid" 2>/dev/null || true
  [[ -z $vault_pid ]] || kill -9 "$vault_pid" 2>/dev/null || true
  wait 2>/dev/null || true
  umount "$work/small" 2>/dev/null || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || { echo "never came true: $*"; return 1; }; sleep 0.2; done
}
# says PAGE BLOCK WORDS...: the block runs, and its output has all the words; what was said stays in $said.
says() {
  local page=$1 block=$2 word
  shift 2
  said=$(run_page_block "$page" "$block" 2>&1) || { echo "$said"; echo "the block $block failed"; return 1; }
  for word in "$@"; do
    [[ $said == *"$word"* ]] || { echo "$said"; echo "$block does not say '$word'"; return 1; }
  done
}
whole() { cmp "$work/source/model.safetensors" "$MNT/$MODEL/model.safetensors"; }
ended() { modelfs umount "$MNT"; }
as_somebody() { setpriv --reuid=$SOMEBODY --regid=$SOMEBODY --clear-groups "$@"; }
mounted() { modelfs mount "$STORE" "$MNT" --model "$MODEL" --key "file:$KEY" --trust "$TRUST" --audit-file "$LOG" $OPTIONS --daemon; }

prepare() {
  head -c 9000000 /dev/urandom >"$work/source/weights.bin"
  python3 - "$work/source/model.safetensors" <<'PYTHON'
import json, os, struct, sys
data = os.urandom(9_000_000)
header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
open(sys.argv[1], "wb").write(struct.pack("<Q", len(header)) + header + data)
PYTHON
  modelfs keygen "$KEY" && modelfs keygen "$NEW_KEY" && modelfs keygen --signing "$work/audit.key" &&
    modelfs -q seal "$work/source" "$STORE" "$MODEL" --key "file:$KEY" && cp -r "$STORE" "$COPY" || return 1
  printf '[[rule]]\nuids = 0\nmodels = "*"\nmay = "read"\n' >"$work/policy.toml"
  OPTIONS="--policy $work/policy.toml --allow-other --umask 0222 --audit required --audit-key $work/audit.key --audit-checkpoint-file $CHECKPOINTS --audit-checkpoint-records 5"
}
step "runbook: a sealed model" prepare
step "runbook: a mount with policy and audit log" mounted
step "runbook: a first look" says "$runbook" look "$MODEL"
step "runbook: evidence" says "$runbook" evidence
evidence_is_whole() { (cd "$EVIDENCE" && sha256sum -c --quiet SHA256SUMS && [[ -s status.json && -s audit.log ]]); }
step "runbook: the evidence is what it is" evidence_is_whole

# ---- Tampering: one byte of a stored object, before anybody has read it.
flip() {
  local object
  object=$(find "$STORE" -type f -size +1M -printf '%s %p\n' | sort -n | tail -1 | cut -d' ' -f2)
  chmod u+w "$object"
  printf '\xff\x00\xff' | dd of="$object" bs=1 seek=4000000 conv=notrunc status=none
}
tampered() {
  local file wrong=0
  flip
  for file in "$work"/source/*; do cmp "$file" "$MNT/$MODEL/${file##*/}" >/dev/null 2>&1 || wrong=$((wrong + 1)); done
  [[ $wrong == 1 ]] || { echo "$wrong files could not be read, one was spoilt"; return 1; }
  until_true 90 bash -c 'modelfs audit show "$LOG" --kind tamper | grep . >/dev/null'
}
step "runbook: a byte of the store is flipped, and a reader refused" tampered
step "runbook: ModelfsRefetched, look" says "$runbook" refetched-look high modelfs_fetch_refetches_total "exit status 20"
step "runbook: ModelfsTamper, look" says "$runbook" tamper-look "$MODEL" "exit status 20"
step "runbook: ModelfsReadErrors, look" says "$runbook" errors-look modelfs_read_errors_total
mended() { says "$runbook" tamper-do && until_true 180 whole && cmp "$work/source/weights.bin" "$MNT/$MODEL/weights.bin"; }
step "runbook: ModelfsTamper, do; and readers are served without a restart" mended

# ---- Denials and blocks.
denied() {
  for _ in 1 2 3; do ! as_somebody cat "$MNT/$MODEL/weights.bin" >/dev/null 2>&1 || return 1; done
}
step "runbook: somebody asks for what is not his" denied
step "runbook: ModelfsDenials, look" says "$runbook" denials-look "uid=$SOMEBODY"
blocked() {
  # Denials of one user and model within a second are one.
  for _ in 1 2 3 4 5 6; do as_somebody cat "$MNT/$MODEL/weights.bin" >/dev/null 2>&1 || sleep 1.1; done
  until_true 90 bash -c 'modelfs audit show "$LOG" --kind block | grep . >/dev/null' || { modelfs audit show "$LOG" --outcome denied; return 1; }
}
step "runbook: and again, until he is blocked" blocked
step "runbook: ModelfsBlocked, look" says "$runbook" blocked-look "blocked: uid=$SOMEBODY" "modelfs_blocked 1"
let_in() { says "$runbook" blocked-do && ! run_page_block "$runbook" blocked-look | grep "blocked: uid=$SOMEBODY"; }
step "runbook: ModelfsBlocked, do" let_in
step "incident: shut a session out" says "$incidents" shut-out
step "incident: who read what" says "$incidents" who-read "$MODEL@1"
step "incident: prove the log" says "$incidents" audit-proof

# ---- Locked, and not ready.
step "incident: make it dark" says "$incidents" dark
dark() { ! cat "$MNT/$MODEL/weights.bin" >/dev/null 2>&1; }
step "incident: it is dark" dark
step "runbook: ModelfsNotReady, look" says "$runbook" not-ready-look "$MNT: "
step "runbook: ModelfsLocked, look" says "$runbook" locked-look lock
step "runbook: ModelfsLocked, do" says "$runbook" locked-do
step "runbook: it serves again" whole

# ---- What is slow or small.
step "runbook: ModelfsCacheThrashing, look" says "$runbook" cache-look modelfs_cache_limit_bytes
step "runbook: ModelfsUnwiped, look" says "$runbook" unwiped-look modelfs_unwiped_bytes_total
step "runbook: ModelfsSmallPages, look" says "$runbook" pages-look
step "runbook: ModelfsSlowLoad, look" says "$runbook" slow-look modelfs_fetch_seconds_total

# ---- Down.
crash() {
  kill -9 "$(modelfs status "$MNT" --json | jq -r .pid)"
  until_true 90 bash -c '! modelfs -q status "$MNT" 2>/dev/null'
}
step "runbook: the process is killed" crash
step "runbook: ModelfsDown, look" says "$runbook" down-look "exit status"
step "runbook: ModelfsDown, do" says "$runbook" down-do
step "runbook: it serves after that" whole
step "runbook: the log goes on after a crash, and is whole" says "$incidents" audit-proof
step "runbook: unmount" ended

# ---- A store that went back.
rolled_back() {
  cp -r "$STORE" "$work/older"
  echo second >"$work/source/second"
  modelfs -q seal "$work/source" "$STORE" "$MODEL" --key "file:$KEY" && modelfs -q inspect "$STORE" "$MODEL" --trust "$TRUST" >/dev/null || return 1
  mv "$STORE" "$work/newer" && mv "$work/older" "$STORE"
}
step "runbook: an older copy of the store is put back" rolled_back
step "runbook: ModelfsRollback, look" says "$runbook" rollback-look ROLLBACK "exit status 20"
put_back() { rm -rf "$STORE" && mv "$work/newer" "$STORE" && modelfs -q inspect "$STORE" "$MODEL" --trust "$TRUST" >/dev/null; }
step "runbook: the newer one is put back, and believed" put_back

# ---- A log that cannot be written.
full_disk() {
  mkdir "$work/small" && mount -t tmpfs -o size=256k none "$work/small"
  LOG=$work/small/audit.log CHECKPOINTS=$work/elsewhere/checkpoints-2
  OPTIONS="--audit required --audit-key $work/audit.key --audit-checkpoint-file $CHECKPOINTS --audit-file-bytes 8KiB"
  mounted || return 1
  for _ in $(seq 60); do whole || return 1; done
  [[ -e $LOG.000002 ]] || { ls "$work/small"; return 1; }
  dd if=/dev/zero of="$work/small/filler" bs=1k status=none 2>/dev/null || true
  # What is left of the last page of the log takes some records more.
  until_true 180 bash -c '! cat "$MNT/$MODEL/second" >/dev/null 2>&1'
}
export LOG CHECKPOINTS
step "runbook: the disk of the log is full, and opens are refused" full_disk
step "runbook: ModelfsAuditFailing, look" says "$runbook" audit-look "100%"
room() {
  rm "$work/small/filler" && until_true 180 cat "$MNT/$MODEL/second" && says "$runbook" audit-do gap || return 1
  # The newest closed file stays: where nothing is in the one being written, the chain goes on from it.
  [[ ! -e $LOG.000001 && -e $ARCHIVE/audit.log.000001 && $(find "$work/small" -name 'audit.log.[0-9]*' | wc -l) == 1 ]] ||
    { ls "$work/small" "$ARCHIVE"; return 1; }
  # Both places together are the log; what stayed alone is not.
  ! modelfs audit verify "$LOG" >/dev/null 2>&1
}
step "runbook: ModelfsAuditFailing, do: there is room, the log is whole and tells of the gap" room
step "runbook: unmount this one" ended
LOG=$work/logs/audit.log

# ---- What to do with keys, versions and the program.
step "incident: what was signed" says "$incidents" signed-since "$MODEL"
step "incident: which version is it" says "$incidents" which-version "$(sha256sum "$work/source/weights.bin" | cut -d' ' -f1)"
step "incident: what runs" says "$incidents" what-runs "modelfs "
step "incident: a key leaked, everything is encrypted anew" says "$incidents" reencrypt
old_key() { ! modelfs cat "$STORE" "$MODEL" second --key "file:$KEY" --trust "$TRUST" 2>/dev/null; }
step "incident: the old key opens nothing of it" old_key
step "hardening: doctor" says "$hardening" doctor swap
step "hardening: sysctl" says "$hardening" sysctl
sysctl_is_valid() { [[ $(grep -cE '^[a-z._]+=.+$' "$SYSCTL_D/60-modelfs.conf") == 3 ]]; }
step "hardening: the file has settings that exist" sysctl_is_valid

# ---- A store that is away.
KEY=$NEW_KEY
port=$(free_port)
start_store() {
  ROOT_ACCESS_KEY=storage ROOT_SECRET_KEY=storage-password "$versitygw" --port 127.0.0.1:$port --quiet posix "$work/bucket" >>"$work/store.log" 2>&1 &
  store_pid=$!
  until_true 180 bash -c "</dev/tcp/127.0.0.1/$port"
}
remote() {
  mkdir -p "$work/bucket/models"
  start_store || return 1
  modelfs -q seal "$work/source" s3://models/prod "$MODEL" --key "file:$KEY"
}
away() {
  OPTIONS="--fetch-timeout 10s --fetch-budget 15s --open lazy --no-page-cache"
  LOG=$work/logs/audit-2.log
  STORE=s3://models/prod mounted || return 1
  kill -9 "$store_pid" && { wait "$store_pid" 2>/dev/null || true; }
  ! cat "$MNT/$MODEL/weights.bin" >/dev/null 2>&1 && until_true 180 bash -c 'modelfs audit show "$LOG" --kind store-down | grep . >/dev/null'
}
back() { start_store && until_true 180 cmp "$work/source/weights.bin" "$MNT/$MODEL/weights.bin" && ended; }
if [[ -x $versitygw ]]; then
  export AWS_ACCESS_KEY_ID=storage AWS_SECRET_ACCESS_KEY=storage-password AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_REGION=us-east-1
  step "runbook: a model in an S3 server" remote
  step "runbook: the server is killed under the mount" away
  look_at_store() { STORE=s3://models/prod says "$runbook" store-look store-down; }
  step "runbook: ModelfsStoreDown, look" look_at_store
  step "runbook: the server is back, and readers are served" back
  unset AWS_ENDPOINT_URL
else
  skip "runbook: ModelfsStoreDown" "$versitygw is not installed"
fi

# ---- Vault.
vault_port=$(free_port)
export VAULT_ADDR=http://127.0.0.1:$vault_port
start_vault() {
  VAULT_TOKEN="" vault server -dev -dev-root-token-id=root -dev-listen-address=127.0.0.1:$vault_port -dev-no-store-token >"$work/vault.log" 2>&1 &
  vault_pid=$!
  until_true 180 vault status
}
vault_setup() {
  export VAULT_TOKEN=root
  vault secrets enable transit && vault auth enable approle && vault write -f transit/keys/models derived=true || return 1
  vault policy write server - <<<'path "transit/decrypt/models" { capabilities = ["update"] }
path "transit/encrypt/models" { capabilities = ["update"] }'
  vault write auth/approle/role/server token_policies=server token_ttl=20m token_max_ttl=4h
  vault read -field=role_id auth/approle/role/server/role-id >"$work/role-id"
  (umask 077 && vault write -f -field=secret_id auth/approle/role/server/secret-id >"$work/secret-id")
  modelfs -q seal "$work/source" "$work/store-v" "$MODEL" --key vault-transit:transit/models
}
vault_mount() {
  LOG=$work/logs/audit-3.log
  env -u VAULT_TOKEN modelfs mount "$work/store-v" "$MNT" --model "$MODEL" --key vault-transit:transit/models --trust "$TRUST" --vault-auth approle \
    --vault-role-id "$(cat "$work/role-id")" --vault-secret-id-file "$work/secret-id" --on-key-loss lock --audit-file "$LOG" --daemon && whole
}
is_dark() { until_true 180 bash -c '! cat "$MNT/$MODEL/weights.bin" >/dev/null 2>&1'; }
frozen() {
  kill -STOP "$vault_pid"
  says "$runbook" vault-look "exit status" && whole
  local rc=$?
  kill -CONT "$vault_pid"
  return $rc
}
if [[ -x $vault_program ]]; then
  step "runbook: Vault starts" start_vault
  step "runbook: and has a key and a role" vault_setup
  step "runbook: a mount whose key is in Vault" vault_mount
  step "runbook: ModelfsVaultDown, look: Vault answers nobody, and what is mounted is served" frozen
  step "incident: revoke what a role has" says "$incidents" revoke
  step "incident: and the mount is dark" is_dark
  step "runbook: ModelfsLeaseLost, look" says "$runbook" lease-look
  step "runbook: ModelfsLeaseLost, do" says "$runbook" lease-do
  step "runbook: it serves after the new login" whole
  step "runbook: unmount the last" ended
else
  skip "runbook: Vault" "$vault_program is not installed"
fi
finish
