#!/usr/bin/env bash
# A day with Vault: a live HashiCorp Vault and a live MinIO, a model sealed by a publisher, mounted by a server, through
# rotation, expiry, revocation, an outage, a replayed store and back. Every step checks its effect, and at the end Vault's own
# audit log says what the server asked for.
#
#   tests/vault_day.sh      needs the release build (MODELFS names another binary) and tests/parts/install.sh vault
#
# MODELFS_TEST_LONG=1 also reads on until the bucket's credentials have ended of old age: 900 s is the shortest life that there is.
# MODELFS_TEST_DAY_KEEP=1 keeps the folder with all logs.
#
# The set-up and the policies are the ones of docs/KEYS.md, taken out of that page as they stand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
vault=$(MODELFS_TEST_CACHE=$cache bash tests/parts/vault.sh path vault)
minio=$(MODELFS_TEST_CACHE=$cache bash tests/parts/vault.sh path minio)
keys_page=$PWD/docs/KEYS.md

if [[ ! -x $modelfs ]]; then
  step "vault day: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
for part in "$vault" "$minio"; do
  [[ -x $part ]] || { skip "vault day" "$part is not installed"; finish; exit; }
done
[[ -c /dev/fuse ]] || { skip "vault day" "this machine has no /dev/fuse"; finish; exit; }

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-day.XXXXXX")
mnt=$work/mnt
mkdir "$mnt" "$work/vault" "$work/minio" "$work/policies"
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS)_' | grep -vE '^MODELFS_TEST_[A-Z_]+$'); do unset "$name"; done
export HOME=$work/home XDG_CONFIG_HOME=$work/config XDG_STATE_HOME=$work/state MODELFS_STATE_DIR=$work/state/modelfs
mkdir -p "$HOME"

vault_port=$(free_port) minio_port=$(free_port)
vault_pid="" minio_pid="" reader_pid=""
cleanup() {
  if mountpoint -q "$mnt"; then
    timeout 60 "$modelfs" umount "$mnt" >/dev/null 2>&1 || umount --lazy "$mnt" || true
  fi
  for pid in $reader_pid $vault_pid $minio_pid; do kill "$pid" 2>/dev/null || true; done
  if [[ -n ${MODELFS_TEST_DAY_KEEP:-} ]]; then echo "kept: $work"; else rm -rf --one-file-system "$work"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# ---- The servers. What the administrator uses is not exported: modelfs must not find it by accident.

admin() { VAULT_ADDR=http://127.0.0.1:$vault_port VAULT_TOKEN=$root_token "$vault" "$@"; }
until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.1; done
}
vault_answers() { curl -fsS -o /dev/null "http://127.0.0.1:$vault_port/v1/sys/health?sealedcode=200&uninitcode=200&standbyok=true"; }

start_vault() {
  cat >"$work/vault.hcl" <<HCL
storage "file" { path = "$work/vault" }
listener "tcp" { address = "127.0.0.1:$vault_port" tls_disable = true }
disable_mlock = true
HCL
  "$vault" server -config="$work/vault.hcl" >>"$work/vault.log" 2>&1 &
  vault_pid=$!
  until_true 120 vault_answers
}
stop_vault() { kill "$vault_pid"; wait "$vault_pid" 2>/dev/null || true; vault_pid=""; }
unseal() { VAULT_ADDR=http://127.0.0.1:$vault_port "$vault" operator unseal "$unseal_key" >/dev/null; }

start_minio() { # PASSWORD
  storage_user=storage-admin storage_password=$1
  MINIO_ROOT_USER=$storage_user MINIO_ROOT_PASSWORD=$1 MINIO_BROWSER=off "$minio" server "$work/minio" \
    --address "127.0.0.1:$minio_port" --quiet >>"$work/minio.log" 2>&1 &
  minio_pid=$!
  # It calls itself ready a moment before it serves: whom it does not know it tells so (403) only then (503 before).
  until_true 120 eval '[[ $(curl -s -o /dev/null -w "%{http_code}" "http://127.0.0.1:$minio_port/") == 403 ]]'
}
stop_minio() { kill "$minio_pid"; wait "$minio_pid" 2>/dev/null || true; minio_pid=""; }
s3() { # METHOD PATH [CURL OPTION...]
  curl -fsS --aws-sigv4 aws:amz:us-east-1:s3 --user "$storage_user:$storage_password" -X "$1" \
    "http://127.0.0.1:$minio_port/$2" "${@:3}"
}
run_keys_block() { # NAME
  VAULT_ADDR=http://127.0.0.1:$vault_port VAULT_TOKEN=$root_token STORAGE_USER=$storage_user \
    STORAGE_PASSWORD=$storage_password STORAGE_ENDPOINT=http://127.0.0.1:$minio_port PATH=${vault%/*}:$PATH \
    run_page_block "$keys_page" "$1"
}
init_vault() {
  local answer
  answer=$(VAULT_ADDR=http://127.0.0.1:$vault_port "$vault" operator init -key-shares=1 -key-threshold=1 -format=json)
  root_token=$(jq -r .root_token <<<"$answer") unseal_key=$(jq -r '.unseal_keys_b64[0]' <<<"$answer")
  unseal
  until_true 120 admin token lookup
  admin audit enable file file_path="$work/audit.log" >/dev/null
}

step "start Vault" start_vault
step "initialise and unseal Vault, with an audit log" init_vault
step "start MinIO" start_minio storage-password-one
step "a bucket" s3 PUT models
set_up_vault() {
  run_keys_block setup
  # The new KV engine refuses everything until it has looked for values of its first version.
  until_true 120 admin read secret/config
}
step "set up Vault as docs/KEYS.md says" set_up_vault
step "let Vault make storage credentials as docs/KEYS.md says" run_keys_block storage
for role in publisher pruner server rewrap auditor registrar catalog; do
  page_block "$keys_page" hcl $role >"$work/policies/$role.hcl"
  step "policy $role" admin policy write $role "$work/policies/$role.hcl"
done
step "a role for servers as docs/KEYS.md says" run_keys_block approle
for role in publisher pruner rewrap auditor; do
  step "a role for $role" admin write auth/approle/role/$role token_policies=$role token_ttl=20m
done
step "a role for registrar" admin write auth/approle/role/registrar token_policies=publisher,registrar token_ttl=20m
step "a role for catalog" admin write auth/approle/role/catalog token_policies=server,catalog token_ttl=20m

# ---- Who is who. Secrets lie in files; nothing is on a command line.

credentials_of() { # ROLE: its role-id and a fresh secret-id
  admin read -field=role_id "auth/approle/role/$1/role-id" >"$work/$1.role-id"
  (umask 077 && admin write -f -field=secret_id "auth/approle/role/$1/secret-id" >"$work/$1.secret-id")
}
for role in publisher pruner server rewrap auditor registrar catalog; do credentials_of $role; done
as() { # ROLE [STORAGE-ROLE]: the options with which that role reaches Vault and the bucket
  local -A credentials=([publisher]=publish [registrar]=publish [pruner]=prune [rewrap]=rewrap [rewrap-registrar]=rewrap)
  echo "--vault-addr http://127.0.0.1:$vault_port --vault-auth approle --vault-role-id $(cat "$work/$1.role-id")" \
    "--vault-secret-id-file $work/$1.secret-id --s3-endpoint http://127.0.0.1:$minio_port --s3-region us-east-1" \
    "--s3-credentials vault-aws:aws/${2:-${credentials[$1]:-models}}"
}
store=s3://models/prod
model=acme/llama
transit="vault-transit:transit/models"
signer="vault-transit:transit/release"
floor="vault-kv:secret/floor"

# Two versions that differ in one file; the large one is shared. It is larger than the smallest cache.
make_version() { # N
  python3 - "$work/v$1" "$1" <<'PYTHON'
import json, random, struct, sys
from pathlib import Path

folder, number = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()
bytes_ = random.Random(7).randbytes(72 << 20)
header = json.dumps({"w": {"dtype": "U8", "shape": [len(bytes_)], "data_offsets": [0, len(bytes_)]}}).encode()
(folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes_)
(folder / "config.json").write_text(json.dumps({"version": number, "pad": "x" * 3000}))
PYTHON
}
# shellcheck disable=SC2046 # `as` answers words
publish_as() { # ROLE VERSION [OPTION...]
  "$modelfs" seal "$work/v$2" $store $model --key $transit --sign $signer --floor $floor "${@:3}" $(as "$1")
}
publish() { publish_as publisher "$@"; } # VERSION [OPTION...]
trusted() { admin read -format=json transit/keys/release | jq -r '.data.keys["1"].public_key' | base64 -d | xxd -p -c 64; }
# shellcheck disable=SC2046
mount_as() { # ROLE [OPTION...]
  "$modelfs" mount $store "$mnt" --model $model --key $transit --trust "$trust" --floor $floor --daemon \
    --log-file "$work/mount.log" --audit-file "$audited" $(as "$1") "${@:2}"
}
audited=$work/mounts.log
on_record() { # KIND JQ-FILTER: the mounts' audit log has a record of that kind for which it is true
  local shown
  shown=$("$modelfs" audit show "$audited" --kind "$1" --json)
  jq -es "map(select($2)) | length > 0" <<<"$shown" >/dev/null || { echo "no $1 with $2 among: $shown"; return 1; }
}
mount_as_server() { mount_as server "$@"; } # [OPTION...]
unmount() { "$modelfs" umount "$mnt"; }
shows_version() { # N: every byte through the kernel, as it was sealed
  diff -r "$work/v$1" "$mnt/$model" && cmp "$work/v$1/model.safetensors" "$mnt/$model/model.safetensors"
}
refused_with() { # CODE COMMAND...
  local code=$1 said
  shift
  if said=$("$@" 2>&1); then echo "was not refused: $*"; return 1; fi
  echo "$said"
  [[ $said == *"[$code]"* ]] || { echo "wanted $code"; return 1; }
}
status_says() { # JQ FILTER that must be true
  "$modelfs" status "$mnt" --json | jq -e "$1" >/dev/null || { "$modelfs" status "$mnt" --json; return 1; }
}

make_version 1
make_version 2
step "seal version 1 with transit, signed in Vault" publish 1
trust=$(trusted)
step "the server mounts it by AppRole with credentials from Vault" mount_as_server
step "the model loads" shows_version 1
step "status shows Vault live and the bucket's credentials" status_says '.vault.state == "live" and .vault.auth == "approle" and
  .storage_credentials.source == "vault-aws:aws/models" and .storage_credentials.state == "current"'
secrets() { # every secret there is, a line each
  printf '%s\n' "$root_token" "$unseal_key" storage-password-one storage-password-two
  if [[ -n ${auditor_token:-} ]]; then echo "$auditor_token"; fi
  local file
  for file in "$work"/*.secret-id "$work/phrase"; do
    if [[ -f $file ]]; then printf '%s\n' "$(cat "$file")"; fi
  done
}
holds_a_secret() { # FILE OR FOLDER...: names the files that hold one
  local secret found=1
  while read -r secret; do
    ((${#secret} >= 16)) || { echo "a secret of ${#secret} characters is none"; return 0; }
    if grep -rlaF -e "$secret" -- "$@"; then found=0; fi
  done < <(secrets)
  return $found
}
nothing_secret_shown() {
  local pid
  pid=$("$modelfs" status "$mnt" --json | jq -er .pid)
  # What is no secret is seen in both, so a secret would be.
  grep -qaF -e "$(cat "$work/server.role-id")" "/proc/$pid/cmdline"
  grep -qaF -e "$MODELFS_STATE_DIR" "/proc/$pid/environ"
  ! holds_a_secret "/proc/$pid/cmdline" "/proc/$pid/environ" || return 1
}
step "nothing secret is in the process list or environment" nothing_secret_shown

# ---- What one mount asks of Vault.

asked_since() { # LINE OPERATION PATH: how often the server did, after that line of Vault's audit log
  tail -n "+$(($1 + 1))" "$work/audit.log" | jq -s --arg operation "$2" --arg path "$3" 'map(select(.type == "request" and
    (.auth.policies // [] | index("server")) and .request.operation == $operation and .request.path == $path)) | length'
}
asks_once() {
  local from keys sets
  unmount
  from=$(wc -l <"$work/audit.log")
  mount_as_server
  for _ in 1 2; do find "$mnt/$model" -type f -exec cat {} + >/dev/null; done
  unmount
  keys=$(asked_since "$from" update transit/decrypt/models) sets=$(asked_since "$from" read aws/creds/models)
  mount_as_server
  [[ $keys == 1 && $sets == 1 ]] || { echo "it asked for $keys keys and $sets sets of credentials"; return 1; }
}
step "a mount asks for its version's key once, and once for credentials, however much is read" asks_once
step "its login is on record" on_record login '.outcome == "allowed"'

# ---- Credentials die under a running reader: MinIO forgets every session when its root password changes.

# One descriptor, read in small pieces past the kernel's cache, again and again: the file is larger than our cache. Each pass
# must give all of its bytes. What FOLDER holds tells it what to do: `hold` stops it in the middle of the file until `changed` is
# there, and it ends with the first pass that was begun after that.
read_on() { # FILE AS-SEALED FOLDER
  python3 - "$@" <<'PYTHON'
import hashlib, mmap, os, sys, time
from pathlib import Path

path, sealed, told = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
wanted = hashlib.sha256(sealed.read_bytes()).digest()
file = os.open(path, os.O_RDONLY | os.O_DIRECT)
piece, size, passes, last = mmap.mmap(-1, 256 << 10), os.fstat(file).st_size, 0, False
while not last:
    last, seen, at = (told / "changed").exists(), hashlib.sha256(), 0
    while at < size:
        got = os.preadv(file, [piece], at)
        if got == 0:
            sys.exit(f"pass {passes} ends at {at} of {size}")
        seen.update(piece[:got])
        at += got
        time.sleep(0.005)
        if at > size // 2 and (told / "hold").exists():
            (told / "held").touch()
            while not (told / "changed").exists():
                time.sleep(0.05)
    if seen.digest() != wanted:
        sys.exit(f"pass {passes} gave other bytes")
    passes += 1
    (told / "passed").write_text(str(passes))
print(f"{passes} times read without an error")
PYTHON
}
begin_reading() {
  "$modelfs" umount "$mnt" && mount_as_server --open lazy --cache 64MiB || return 1
  rm -rf "$work/reading"
  mkdir "$work/reading"
  read_on "$mnt/$model/model.safetensors" "$work/v1/model.safetensors" "$work/reading" >"$work/reader" 2>&1 &
  reader_pid=$!
  until_true 120 test -e "$work/reading/passed" || { cat "$work/reader"; return 1; }
}
reads_to_the_end() {
  local rc=0
  touch "$work/reading/changed"
  wait "$reader_pid" || rc=$?
  reader_pid=""
  cat "$work/reader"
  return $rc
}
answer_to() { # SET: of MinIO, to who comes with these credentials of Vault's
  curl -s -o /dev/null -w "%{http_code}" --aws-sigv4 aws:amz:us-east-1:s3 --user "$(jq -r '.access_key + ":" + .secret_key' <<<"$1")" \
    -H "x-amz-security-token: $(jq -r .security_token <<<"$1")" "http://127.0.0.1:$minio_port/models?list-type=2&max-keys=1&prefix=prod"
}
is_taken() { [[ $(answer_to "$1") == 200 ]]; }
is_refused() { [[ $(answer_to "$1") == 403 ]]; }
set_of_its_own() { admin read -format=json aws/creds/models | jq -c .data; } # as old as the one that the mount has
sets_on_record() { "$modelfs" audit show "$audited" --kind renewal --json | jq -s 'map(select(.outcome == "allowed" and ((.detail // "") | contains(": new ones")))) | length'; }
replace_credentials() {
  local old from had
  from=$(wc -l <"$work/audit.log") had=$(sets_on_record)
  begin_reading || return 1
  old=$(set_of_its_own)
  is_taken "$old" || { echo "MinIO does not take credentials that are new"; return 1; }
  # Between two pieces, since a store that is away is another matter.
  touch "$work/reading/hold"
  until_true 120 test -e "$work/reading/held" || { cat "$work/reader"; return 1; }
  stop_minio
  # Vault knows the new password before MinIO serves again: what is asked for then can be had.
  storage_password="storage-password-two"
  run_keys_block storage >/dev/null
  start_minio storage-password-two
  reads_to_the_end || return 1
  is_refused "$old" || { echo "MinIO still takes the old credentials"; return 1; }
  status_says '.storage_credentials.sets == 2' || return 1
  # The first set, and one in its place.
  [[ $(asked_since "$from" read aws/creds/models) == 2 ]] || { echo "more sets were asked for than were needed"; return 1; }
  [[ $(sets_on_record) == $((had + 2)) ]] || { echo "not both sets are on record: $(sets_on_record) now, $had before"; return 1; }
}
step "credentials end while a file is being read, and are replaced: its reader sees its bytes and no error" replace_credentials
stop_reading() { # what a step that failed left behind
  [[ -n $reader_pid ]] || return 0
  kill "$reader_pid" 2>/dev/null || true
  wait "$reader_pid" 2>/dev/null || true
  reader_pid=""
}
stop_reading
step "what the store took no more is on record" on_record renewal '.outcome == "denied" and (.detail | contains("the store takes them no more"))'
outlive_credentials() {
  local old began=$SECONDS
  admin write aws/roles/models default_sts_ttl=900s max_sts_ttl=900s >/dev/null
  begin_reading || return 1
  old=$(set_of_its_own)
  is_taken "$old" || { echo "MinIO does not take credentials that are new"; return 1; }
  until is_refused "$old"; do
    ((SECONDS < began + 1200)) || { echo "MinIO takes credentials of 900 s after $((SECONDS - began)) s"; return 1; }
    kill -0 "$reader_pid" 2>/dev/null || break
    sleep 5
  done
  echo "read for $((SECONDS - began)) s"
  reads_to_the_end && ((SECONDS - began > 900)) && status_says '.storage_credentials.sets >= 2' || return 1
  run_keys_block storage >/dev/null
}
if [[ ${MODELFS_TEST_LONG:-} == 1 ]]; then
  step "a file is read for longer than its credentials live" outlive_credentials
  stop_reading
fi

# ---- Rotation.
transit_versions() { # the transit versions that the slots of the newest version carry
  # shellcheck disable=SC2046
  "$modelfs" key list $store $model --trust "$trust" --json $(as server) | jq -r '.slots[].detail' | sort -u
}
# shellcheck disable=SC2046
rewrap_all() { "$modelfs" key rotate $store --all --rewrap --key $transit --sign $signer --trust "$trust" $(as rewrap) "$@"; }
rotate_transit() {
  [[ $(transit_versions) == "version 1" ]]
  admin write -f transit/keys/models/rotate >/dev/null
  rewrap_all
  [[ $(transit_versions) == "version 2" ]]
  admin write transit/keys/models/config min_decryption_version=2 >/dev/null
}
rewrap_changes_nothing() {
  local objects
  objects=$(cd "$work/minio" && find models | sort)
  rewrap_all --json >"$work/rewrapped"
  jq -e '(.versions | length) > 0 and all(.versions[]; .status == "unchanged")' "$work/rewrapped"
  [[ $(cd "$work/minio" && find models | sort) == "$objects" ]] || { echo "the bucket holds something else"; return 1; }
}
step "the transit key is rotated and every slot rewrapped by a job that cannot decrypt" rotate_transit
step "a second rewrap changes nothing" rewrap_changes_nothing
remount() { unmount && mount_as_server "$@"; }
step "the server restarts on the new slots" remount
step "the model loads after the rotation" shows_version 1

# ---- Revocation.
tokens_of() { # POLICY: the accessors of the tokens that AppRole gave out with it
  local accessor
  for accessor in $(admin list -format=json auth/token/accessors | jq -r '.[]'); do
    if admin token lookup -accessor -format=json "$accessor" 2>/dev/null |
      jq -e --arg policy "$1" '.data.path == "auth/approle/login" and (.data.policies | index($policy))' >/dev/null; then
      echo "$accessor"
    fi
  done
}
revoke_tokens_of() { # POLICY
  local accessor
  for accessor in $(tokens_of "$1"); do admin token revoke -accessor "$accessor" >/dev/null; done
}
revoke_and_look() {
  unmount && mount_as_server --on-key-loss lock --open lazy || return 1
  exec 7<"$mnt/$model/model.safetensors"
  head -c 4096 <&7 >/dev/null
  local began
  admin delete auth/approle/role/server >/dev/null
  revoke_tokens_of server
  began=$(date +%s.%N)
  # The mount learns of it when it next speaks with Vault; a new reader asks nothing of it.
  until ! head -c 4096 "$mnt/$model/config.json" >/dev/null 2>&1; do
    # It looks twice a second; anything near this is a look that failed.
    (($(date +%s) < ${began%.*} + 60)) || { echo "still readable after 60 s"; return 1; }
    sleep 0.2
  done
  echo "reads stopped $(python3 -c "import time; print(f'{time.time() - $began:.2f}')") s after the revocation"
  # New readers are refused first, then what the kernel still has for open files is dropped.
  until_true 60 open_file_is_refused || { echo "an open file is still read"; return 1; }
  exec 7<&-
  status_says '.vault.state == "lost" and all(.models[]; .locked)' && open_is_denied
}
open_file_is_refused() { ! head -c 4096 <&7; }
open_is_denied() { # EACCES, and no other error
  python3 - "$mnt/$model/config.json" <<'PYTHON'
import errno, os, sys
try:
    os.open(sys.argv[1], os.O_RDONLY)
except OSError as error:
    sys.exit(0 if error.errno == errno.EACCES else f"open answers {errno.errorcode[error.errno]}, not EACCES")
sys.exit("it can be opened")
PYTHON
}
step "the token is revoked: reads stop, on open files too" revoke_and_look
step "the revocation is on record" on_record lease-lost '.severity == "high" and .code == "VAULT_DENIED"'
restore() {
  unmount
  run_keys_block approle >/dev/null
  credentials_of server
  mount_as_server && shows_version 1
}
step "the role is restored and the server mounts again" restore

# ---- A secret-id ends, and a new one takes its place in the file.
new_secret_id() {
  local old
  old=$(cat "$work/server.secret-id")
  SECRET_ID_FILE=$work/server.secret-id run_keys_block secret-id
  [[ $(cat "$work/server.secret-id") != "$old" && $(stat -c %a "$work/server.secret-id") == 600 ]]
  admin write auth/approle/role/server/secret-id/destroy secret_id="$old" >/dev/null
  # What makes the next login come now.
  revoke_tokens_of server
  until_true 300 vault_is_live_again
  shows_version 1
}
vault_is_live_again() { status_says '.vault.state == "live"' && [[ -n $(tokens_of server) ]]; }
step "a new secret-id in the file is taken at the next login, without a restart" new_secret_id
wrapped_start() { mount_as wrapped --vault-secret-id-wrapped; }
restart_with_spent_wrapping() {
  unmount
  cp "$work/server.role-id" "$work/wrapped.role-id"
  # The block prints a role-id, then the wrapping token.
  (umask 077 && run_keys_block approle | grep -oE "hvs\.[[:alnum:]_-]+" >"$work/wrapped.secret-id")
  wrapped_start
  shows_version 1
  unmount
  refused_with VAULT_DENIED wrapped_start >"$work/refused"
  grep -F "before a restart" "$work/refused"
  grep -F "destroy the secret-id" "$work/refused"
  mount_as_server
}
step "a restart with a wrapping token that was spent says so" restart_with_spent_wrapping
step "its refused login is on record" on_record login '.outcome == "denied" and .severity == "medium"'

# ---- Versions.
step "seal version 2" publish 2 --metric eval_loss=1.93
step "the server takes version 2" remount
step "version 2 loads" shows_version 2
# The bucket as an attacker keeps it.
cp -a "$work/minio" "$work/minio.before"
# shellcheck disable=SC2046
roll_back() { "$modelfs" rollback $store $model --to 1 --sign $signer --trust "$trust" --floor $floor $(as publisher); }
step "roll back to version 1" roll_back
step "the server follows the rollback" remount
step "version 1 loads again" shows_version 1
replay() {
  unmount
  stop_minio
  mv "$work/minio" "$work/minio.now" && mv "$work/minio.before" "$work/minio"
  start_minio storage-password-two
  # A fresh machine: nothing is remembered here, only in Vault.
  refused_with ROLLBACK env MODELFS_STATE_DIR="$work/fresh" bash -c "$(declare -f mount_as mount_as_server as); $(declare -p modelfs store mnt model transit trust floor work audited vault_port minio_port); mount_as_server" || return 1
  stop_minio
  rm -rf "$work/minio" && mv "$work/minio.now" "$work/minio"
  start_minio storage-password-two
}
step "a bucket from before the rollback is refused by name on a fresh machine" replay
step "the true bucket mounts" mount_as_server

# ---- Break glass.
echo "a phrase in an envelope, $(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')" >"$work/phrase"
chmod 600 "$work/phrase"
phrase=passphrase-file:$work/phrase
# shellcheck disable=SC2046
add_phrase() {
  "$modelfs" key add $store $model --key $transit --add "$phrase" --label break-glass --sign $signer --trust "$trust" $(as publisher)
}
step "a passphrase slot is added" add_phrase
# Without Vault there are no storage credentials from it either: a break-glass envelope holds those too.
mount_with_phrase() {
  AWS_ACCESS_KEY_ID=$storage_user AWS_SECRET_ACCESS_KEY=$storage_password \
    "$modelfs" mount $store "$mnt" --model $model --key "$phrase" --trust "$trust" --daemon \
    --s3-endpoint "http://127.0.0.1:$minio_port" --s3-region us-east-1 "$@"
}
vault_first() { mount_with_phrase --key $transit --vault-addr "http://127.0.0.1:$vault_port" --vault-auth approle \
  --vault-role-id "$(cat "$work/server.role-id")" --vault-secret-id-file "$work/server.secret-id" --vault-timeout 2s; }
open_while() { # WHAT: stopped, sealed
  unmount 2>/dev/null || true
  case $1 in
    stopped) stop_vault ;;
    sealed) admin operator seal >/dev/null ;;
  esac
  vault_first && shows_version 1 && unmount || return 1
  case $1 in
    stopped) start_vault && unseal ;;
    sealed) unseal ;;
  esac
  until_true 120 admin token lookup
}
step "the phrase opens the model while Vault is stopped" open_while stopped
step "the phrase opens the model while Vault is sealed" open_while sealed
sealed_alone() {
  admin operator seal >/dev/null
  refused_with VAULT_SEALED mount_as_server --vault-timeout 60s
  local rc=$?
  unseal && until_true 120 admin token lookup
  return $rc
}
step "without the phrase a sealed Vault is named" sealed_alone
# shellcheck disable=SC2046
remove_phrase() {
  "$modelfs" key remove $store $model --key $transit --label break-glass --sign $signer --trust "$trust" $(as publisher)
}
step "the passphrase slot is removed" remove_phrase
step "the phrase opens nothing any more" refused_with NO_KEY mount_with_phrase
# shellcheck disable=SC2046
prune_twice() { # [ROLE [STORAGE-ROLE]]
  for _ in 1 2; do
    "$modelfs" prune $store --key $transit --trust "$trust" --grace 0s --second-look 0s --keep 1 --yes \
      $(as "${1:-pruner}" "${2:-}") || return 1
  done
}
step "the publisher's credentials delete nothing" refused_with STORE_DENIED prune_twice publisher
# shellcheck disable=SC2046
seal_as_pruner() { "$modelfs" seal "$work/v2" $store $model --key $transit --sign $signer --floor $floor $(as pruner); }
step "the pruner seals nothing" refused_with VAULT_DENIED seal_as_pruner
# With a policy that lets a role ask for the credentials of another: the bucket itself says no.
denied_with_credentials() { # ROLE STORAGE-ROLE COMMAND...
  local role=$1 storage=$2 rc=0
  shift 2
  { cat "$work/policies/$role.hcl"; echo "path \"aws/creds/$storage\" { capabilities = [\"read\"] }"; } | admin policy write "$role" - >/dev/null
  refused_with STORE_DENIED "$@" || rc=$?
  admin policy write "$role" "$work/policies/$role.hcl" >/dev/null
  return $rc
}
# shellcheck disable=SC2046
seal_with() { "$modelfs" seal "$work/v2" $store $model --key $transit --sign $signer --floor $floor $(as publisher "$1"); } # STORAGE-ROLE
for storage in models prune rewrap; do
  step "the credentials of $storage publish nothing" denied_with_credentials publisher $storage seal_with $storage
done
step "the rewrap job's credentials delete no weights" denied_with_credentials pruner rewrap prune_twice pruner rewrap
step "prune" prune_twice
step "what is left mounts" mount_as_server
step "and loads" shows_version 1
step "unmount" unmount

# ---- A catalog.
catalog="vault-kv://secret/models"
# shellcheck disable=SC2046,SC2120
mount_catalog() { # [OPTION...]
  "$modelfs" mount $catalog "$mnt" --key $transit --trust "$trust" --daemon --log-file "$work/catalog.log" $(as catalog) "$@"
}
catalog_works() {
  local rc=0
  { mount_catalog && shows_version 2; } || rc=$?
  unmount >/dev/null 2>&1 || true
  return $rc
}
step "seal version 2 again and register it" publish_as registrar 2 --register $catalog/$model
step "a catalog is mounted by its records" catalog_works
# shellcheck disable=SC2046
rewrap_record() {
  "$modelfs" key rotate $store $model --rewrap --key $transit --sign $signer --trust "$trust" \
    --register $catalog/$model $(as rewrap-registrar)
}
record_follows_rotation() {
  local newest
  admin write auth/approle/role/rewrap-registrar token_policies=rewrap,registrar token_ttl=20m >/dev/null
  credentials_of rewrap-registrar
  newest=$(admin read -format=json transit/keys/models | jq '.data.latest_version + 1')
  admin write -f transit/keys/models/rotate >/dev/null
  rewrap_all
  admin write transit/keys/models/config min_decryption_version="$newest" >/dev/null
  refused_with VAULT_DENIED mount_catalog --model $model
  rewrap_record
  catalog_works
}
step "a record that a rotation left behind is told, and follows when it is named" record_follows_rotation

# ---- Tokens without Vault's own `default` policy.

answered() { # REFUSED PATH: how often tokens without `default` were let, or refused, since the log had so many lines
  tail -n "+$((token_from + 1))" "$work/audit.log" | jq -s --argjson refused "$1" --arg path "$2" 'map(select(.type == "response" and
    (.auth.policies // [] | index("token") and (index("default") | not)) and .request.path == $path and ((.error // "") != "") == $refused)) | length'
}
seen_by_vault() { [[ $(answered "$@") -gt 0 ]]; }
with_token_rules() { # RIGHT-LEFT-OUT: mounts until Vault was asked to renew, and unmounts
  local left_out=$1
  grep -v "$left_out" "$work/policies/token.hcl" | admin policy write token - >/dev/null
  token_from=$(wc -l <"$work/audit.log")
  mount_as_server && shows_version 2 || return 1
  until_true 120 seen_by_vault "$([[ $left_out == renew-self ]] && echo true || echo false)" auth/token/renew-self || { echo "renew-self was not asked for"; return 1; }
  unmount
  seen_by_vault "$([[ $left_out == revoke-self ]] && echo true || echo false)" auth/token/revoke-self || { echo "revoke-self was not asked for"; return 1; }
}
# shellcheck disable=SC2046
mount_with_given_token() {
  local -A method=([--vault-auth]=1 [--vault-role-id]=1 [--vault-secret-id-file]=1)
  local words=() word
  for word in $(as server); do words+=("$word"); done
  local kept=() at=0
  while ((at < ${#words[@]})); do
    [[ -n ${method[${words[at]}]:-} ]] || kept+=("${words[at]}" "${words[at + 1]}")
    at=$((at + 2))
  done
  (umask 077 && admin token create -field=token -no-default-policy -policy=server -policy=token -ttl=20m >"$work/given.secret-id")
  "$modelfs" mount $store "$mnt" --model $model --key $transit --trust "$trust" --floor $floor --daemon "${kept[@]}" \
    --vault-auth token --vault-token-file "$work/given.secret-id"
}
without_default_policy() {
  page_block "$keys_page" hcl token >"$work/policies/token.hcl"
  # Short, so that it is renewed while we look.
  admin write auth/approle/role/server token_no_default_policy=true token_policies=server,token token_ttl=20s >/dev/null
  with_token_rules nothing || return 1
  [[ -z $(tokens_of token) ]] || { echo "a token is left behind"; return 1; }
  on_record renewal '.outcome == "allowed" and (.detail | startswith("Vault at "))' || return 1
  mount_with_given_token && shows_version 2 && unmount || return 1
  with_token_rules renew-self || return 1
  with_token_rules revoke-self || return 1
  grep -v lookup-self "$work/policies/token.hcl" | admin policy write token - >/dev/null
  refused_with VAULT_DENIED mount_with_given_token || return 1
  admin write auth/approle/role/server token_no_default_policy=false >/dev/null
  run_keys_block approle >/dev/null
}
step "a server without Vault's default policy needs the three rules of docs/KEYS.md, and each of them" without_default_policy

# ---- The policies: enough was shown above; one right less is not enough.
rights_of() { # ROLE: PATH RIGHT, a line each
  local path rights right
  sed -nE 's/^path "([^"]+)" \{ capabilities = \[(.*)\] \}$/\1 \2/p' "$work/policies/$1.hcl" | tr -d '",' |
    while read -r path rights; do for right in $rights; do echo "$path $right"; done; done
}
without_right() { # ROLE PATH RIGHT: a rule that has no other goes as a whole
  awk -v rule="path \"$2\" " -v right="\"$3\"" 'index($0, rule) == 1 {
    sub(right ", |, " right "|" right, "")
    if (/\[\]/) next
  } 1' "$work/policies/$1.hcl"
}
needs_every_right() { # ROLE COMMAND...
  local role=$1 path right
  shift
  rights_of "$role" >"$work/rights"
  [[ $(cut -d' ' -f1 "$work/rights" | sort -u) == "$(sed -nE 's/^path "([^"]+)".*/\1/p' "$work/policies/$role.hcl" | sort -u)" ]]
  while read -r path right; do
    without_right "$role" "$path" "$right" | admin policy write "$role" - >/dev/null
    if "$@" >"$work/without.log" 2>&1 </dev/null; then echo "works without $right on $path"; return 1; fi
    grep -qE '\[(VAULT_DENIED|STORE_DENIED)\]|permission denied' "$work/without.log" || { cat "$work/without.log"; echo "another failure without $right on $path"; return 1; }
    echo "refused without $right on $path"
  done <"$work/rights"
  admin policy write "$role" "$work/policies/$role.hcl" >/dev/null
  "$@"
}
server_works() {
  local rc=0
  { mount_as_server && shows_version 2; } || rc=$?
  unmount >/dev/null 2>&1 || true
  return $rc
}
step "the server's policy has no right too many" needs_every_right server server_works
# A new tag makes a floor of its own, a known one is raised: two rights. So with records.
edition=0
publisher_works() {
  edition=$((edition + 1))
  echo "$edition" >"$work/v2/edition"
  publish 2 && publish 2 --tag "edition-$edition" && floor_is_in_vault latest && floor_is_in_vault "edition-$edition"
}
# shellcheck disable=SC2046
floor_is_in_vault() { # TAG: what this machine has seen of it is what Vault holds; a seal that could not raise that only warns
  "$modelfs" floor $store $model --floor $floor --json $(as publisher) |
    jq -e --arg tag "$1" '[.floors[] | select(.tag == $tag)] | length == 2 and (map(.ref_seq) | unique | length) == 1' >/dev/null ||
    { echo "the floor of $1 in Vault was not raised"; return 1; }
}
step "the publisher's policy has no right too many" needs_every_right publisher publisher_works
registrar_works() {
  edition=$((edition + 1))
  echo "$edition" >"$work/v2/edition"
  publish_as registrar 2 --register $catalog/$model && publish_as registrar 2 --register "$catalog/edition-$edition"
}
step "the registrar's policy has no right too many" needs_every_right registrar registrar_works
step "the catalog server's policy has no right too many" needs_every_right catalog catalog_works
step "the pruner's policy has no right too many" needs_every_right pruner prune_twice
rotate_and_rewrap() { admin write -f transit/keys/models/rotate >/dev/null && rewrap_all; }
step "the rewrap job's policy has no right too many" needs_every_right rewrap rotate_and_rewrap
as_auditor() { VAULT_ADDR=http://127.0.0.1:$vault_port VAULT_TOKEN=$auditor_token "$vault" "$@"; }
auditor_works() {
  auditor_token=$(VAULT_ADDR=http://127.0.0.1:$vault_port "$vault" write -field=token auth/approle/login \
    role_id="$(cat "$work/auditor.role-id")" secret_id="$(cat "$work/auditor.secret-id")")
  as_auditor read transit/keys/models && as_auditor read transit/keys/release && as_auditor read sys/policies/acl/server &&
    as_auditor list secret/metadata/floor && as_auditor read "secret/metadata/floor/$(admin list -format=json secret/metadata/floor | jq -r '.[0]')" &&
    as_auditor list secret/metadata/models && as_auditor read "secret/metadata/models/$model" || return 1
  # shellcheck disable=SC2046
  "$modelfs" verify $store $model --trust "$trust" $(as auditor)
}
step "the auditor's policy has no right too many" needs_every_right auditor auditor_works
auditor_opens_nothing() {
  local body
  refused_without_right as_auditor write transit/decrypt/models ciphertext=vault:v1:AAAA context=AAAA || return 1
  body=$(as_auditor list -format=json secret/metadata/floor | jq -r '.[0]')
  refused_without_right as_auditor kv get "secret/floor/$body"
  # What another team keeps in the same mount.
  admin kv put secret/others/plans of=theirs >/dev/null
  refused_without_right as_auditor list secret/metadata
  refused_without_right as_auditor read secret/metadata/others/plans
}
refused_without_right() { local said; ! said=$("$@" 2>&1) && [[ $said == *"permission denied"* ]] || { echo "$said"; return 1; }; }
step "the auditor opens nothing" auditor_opens_nothing

# ---- The storage roles: likewise, of each statement without one action, or without one of the places it is for.
storage_role() { # NAME POLICY
  admin write "aws/roles/$1" credential_type=assumed_role role_arns=arn:aws:iam::123456789012:role/models \
    default_sts_ttl=3600s max_sts_ttl=3600s policy_document="$2" >/dev/null
}
without_one() { # POLICY: what is missing and the policy without it, a line each
  jq -r '. as $whole | range(.Statement | length) as $of | ("Action", "Resource") as $part | range(.Statement[$of][$part] | length) as $one |
    ($whole | del(.Statement[$of][$part][$one]) | .Statement |= map(select(.Action != [] and .Resource != []))) as $rest |
    "\(.Statement[$of].Action | join(",")): \(.Statement[$of][$part][$one])\t\($rest | tojson)"' <<<"$1"
}
needs_every_storage_right() { # STORAGE-ROLE COMMAND...
  local role=$1 whole missing rest
  shift
  whole=$(admin read -field=policy_document "aws/roles/$role")
  without_one "$whole" >"$work/rights"
  [[ $(wc -l <"$work/rights") -ge 4 ]]
  while IFS=$'\t' read -r missing rest; do
    storage_role "$role" "$rest"
    if "$@" >"$work/without.log" 2>&1 </dev/null; then echo "works without: $missing"; return 1; fi
    grep -qE '\[STORE_DENIED\]|left behind' "$work/without.log" || { cat "$work/without.log"; echo "another failure without: $missing"; return 1; }
    echo "refused without: $missing"
  done <"$work/rights"
  storage_role "$role" "$whole"
  "$@"
}
step "the readers' storage role has no right too many" needs_every_storage_right models server_works
# An upload in parts whose source changes under it is given up.
uploads() { (cd "$work/minio/.minio.sys/multipart" && find . -mindepth 2 -maxdepth 2 -type d | sort); }
another_upload_is_there() { [[ $(uploads) != "$1" ]]; }
# shellcheck disable=SC2046
seal_broken() { "$modelfs" seal "$work/broken" $store acme/broken --key $transit --sign $signer $(as publisher); }
gives_up_cleanly() {
  local before sealing rc=0
  before=$(uploads)
  rm -rf "$work/broken"
  mkdir "$work/broken"
  # Nothing on the disk, and so large that it cannot be through before it is cut.
  truncate -s 16G "$work/broken/weights.bin"
  seal_broken >"$work/broken.log" 2>&1 &
  sealing=$!
  until_true 120 another_upload_is_there "$before" || rc=1
  truncate -s 1M "$work/broken/weights.bin"
  ! wait "$sealing" || { echo "it was sealed"; return 1; }
  cat "$work/broken.log"
  [[ $rc == 0 ]] && grep -F "[SOURCE_CHANGED]" "$work/broken.log" >/dev/null || { echo "not broken off"; return 1; }
  [[ $(uploads) == "$before" ]] || { echo "an upload is left behind"; return 1; }
}
publishes_and_gives_up() {
  edition=$((edition + 1))
  echo "$edition" >"$work/v2/edition"
  publish 2 && gives_up_cleanly
}
step "the publisher's storage role has no right too many" needs_every_storage_right publish publishes_and_gives_up
prunes_something() {
  edition=$((edition + 1))
  echo "$edition" >"$work/v2/edition"
  publish 2 && prune_twice
}
step "the pruner's storage role has no right too many" needs_every_storage_right prune prunes_something
stored() { (cd "$work/minio/models/prod" && find . -path "$1" -name xl.meta | sort); } # PATTERN
rewraps_cleanly() {
  local probes
  probes=$(stored './probe/*')
  rotate_and_rewrap || return 1
  [[ $(stored './probe/*') == "$probes" ]] || { echo "a probe is left behind"; return 1; }
  # ./MODEL/k/VERSION/GENERATION/xl.meta
  [[ -z $(stored './*/k/*' | cut -d/ -f2-4 | uniq -d) ]] || { echo "slots of an older generation are left behind"; return 1; }
}
step "the rewrap job's storage role has no right too many" needs_every_storage_right rewrap rewraps_cleanly

# ---- Vault's own record of what the server asked for.
server_asked_only() {
  jq -r 'select(.type == "request" and (.auth.policies // [] | index("server") and (index("catalog") | not))) | "\(.request.operation) \(.request.path)"' \
    "$work/audit.log" | sort | uniq -c | sort -rn | tee "$work/asked"
  [[ -s $work/asked ]] || { echo "the audit log names no request of the server"; return 1; }
  ! awk '{ print $2, $3 }' "$work/asked" | grep -vE \
    '^(update transit/decrypt/models|read secret/data/floor/[0-9a-z._-]+|read aws/creds/models|(update|read) auth/token/(lookup|renew|revoke)-self)$'
}
step "the server asked Vault for nothing it did not need" server_asked_only
no_secret_in_logs() {
  local planted=$work/planted.log
  # Each kind of secret is found where it is.
  secrets >"$planted"
  holds_a_secret "$planted" >/dev/null || { echo "the search finds nothing"; return 1; }
  rm "$planted"
  ! holds_a_secret "$work"/*.log "$work/state" "$work/home" || return 1
}
step "no secret is in any log" no_secret_in_logs
finish
