#!/usr/bin/env bash
# Key slots with a live HashiCorp Vault: which key opens a model when Vault serves, refuses, is sealed or gone, and what
# Vault was asked for. Before that the commands of docs/KEYS.md that no other script runs, taken out of that page as they stand.
#
#   tests/vault_slots.sh      needs the release build (MODELFS names another binary) and tests/parts/install.sh vault
#                             versitygw
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
vault=$(bash tests/parts/vault.sh path vault)
if [[ ! -x $modelfs ]]; then
  step "vault slots: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
versitygw=$(bash tests/parts/versitygw.sh path)
for part in "$vault" "$versitygw"; do
  [[ -x $part ]] || { skip "vault slots" "$part is not installed"; finish; exit; }
done

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-slots.XXXXXX")
vault_pid="" bucket_pid=""
cleanup() {
  local pid
  for pid in $vault_pid $bucket_pid; do kill "$pid" 2>/dev/null || true; done
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS)_' | grep -vE '^MODELFS_TEST_[A-Z_]+$'); do unset "$name"; done
export HOME=$work XDG_CONFIG_HOME=$work/config MODELFS_STATE_DIR=$work/state

# ---- Vault, with a transit key, another one, and a record in KV.

port=$(free_port)
export VAULT_ADDR=http://127.0.0.1:$port
cat >"$work/vault.hcl" <<HCL
storage "file" { path = "$work/vault" }
listener "tcp" { address = "127.0.0.1:$port" tls_disable = true }
disable_mlock = true
HCL
"$vault" server -config="$work/vault.hcl" >"$work/vault.log" 2>&1 &
vault_pid=$!
answers() { curl -fsS -o /dev/null "$VAULT_ADDR/v1/sys/health?sealedcode=200&uninitcode=200" 2>/dev/null; }
until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.1; done
}
until_true 120 answers || { step "vault slots: Vault starts" false; finish; exit; }
"$vault" operator init -key-shares=1 -key-threshold=1 -format=json >"$work/init.json"
field() { python3 -c 'import json, sys; value = json.load(open(sys.argv[1]))[sys.argv[2]]; print(value if isinstance(value, str) else value[0])' "$work/init.json" "$1"; }
"$vault" operator unseal "$(field unseal_keys_b64)" >/dev/null
VAULT_TOKEN=$(field root_token)
export VAULT_TOKEN
until_true 120 "$vault" token lookup || { step "vault slots: Vault is unsealed" false; finish; exit; }
for key in models other; do
  [[ $key == other ]] || "$vault" secrets enable transit >/dev/null
  "$vault" write -f "transit/keys/$key" derived=true >/dev/null
done
"$vault" secrets enable -path=secret -version=2 kv >/dev/null
# It refuses everything until it has looked for values of its first version.
until_true 120 "$vault" read secret/config || { step "vault slots: the KV engine is ready" false; finish; exit; }
"$vault" kv put secret/m kek="$(openssl rand -hex 32)" short=abcd >/dev/null
"$vault" audit enable file file_path="$work/audit" >/dev/null

# ---- The page, with a folder in place of the bucket: each of its stores has a memory of its own.

mkdir -p "$work/bin" "$work/page/llama"
ln -s "$(realpath "$modelfs")" "$work/bin/modelfs"
export PATH=$work/bin:$PATH
echo '{}' >"$work/page/llama/config.json"
head -c 300000 /dev/urandom >"$work/page/llama/model.bin"
here() { (cd "$work/page" && MODELFS_STATE_DIR=$work/page/$1.state "${@:2}"); } # STORE COMMAND...
block() { # STORE NAME
  mkdir -p "$work/page/of-$1"
  sed "s|s3://models/prod|./$1|" docs/KEYS.md >"$work/page/of-$1/KEYS.md"
  here "$1" run_page_block "$work/page/of-$1/KEYS.md" "$2"
}
reads() { # STORE OPTION...
  [[ $(here "$1" modelfs cat "./$1" acme/llama config.json "${@:2}") == '{}' ]]
}
refuses() { # WORDS COMMAND...
  local words=$1 said
  shift
  if said=$("$@" 2>&1); then echo "was not refused: $said"; return 1; fi
  [[ $said == *"$words"* ]] || { echo "wanted $words: $said"; return 1; }
}
own_keys() {
  block own own-keys
  here own modelfs seal ./llama ./own acme/llama --key file:llama.key --key recipient:server.key.pub
  cp "$XDG_CONFIG_HOME/modelfs/signing.key.pub" "$work/page/signing.pub"
  reads own --trust signing.pub --key x25519:server.key
  reads own --trust signing.pub --key file:llama.key
}
# A record names a bucket, so this block has one. It also names the transit version under which it was wrapped.
record_is_brought_along() {
  local port newest key=vault-transit:transit/models
  port=$(free_port)
  mkdir -p "$work/bucket/models"
  ROOT_ACCESS_KEY=storage ROOT_SECRET_KEY=storage-password "$versitygw" --port "127.0.0.1:$port" --quiet posix "$work/bucket" \
    >"$work/bucket.log" 2>&1 &
  bucket_pid=$!
  until_true 120 bash -c "</dev/tcp/127.0.0.1/$port"
  local -x AWS_ACCESS_KEY_ID=storage AWS_SECRET_ACCESS_KEY=storage-password MODELFS_TRUST=$work/page/signing.pub
  local -x MODELFS_S3_ENDPOINT=http://127.0.0.1:$port MODELFS_S3_REGION=us-east-1 MODELFS_STATE_DIR=$work/page/record.state
  modelfs seal "$work/page/llama" s3://models/prod acme/llama --key $key --register vault-kv://secret/models/acme/llama
  "$vault" write -f transit/keys/models/rotate >/dev/null
  newest=$("$vault" read -format=json transit/keys/models | jq .data.latest_version)
  "$vault" kv get -format=json secret/models/acme/llama >"$work/before"
  run_page_block docs/KEYS.md record
  "$vault" kv get -format=json secret/models/acme/llama >"$work/after"
  ! grep "vault:v$newest:" "$work/before" || return 1
  grep "vault:v$newest:" "$work/after"
  modelfs cat s3://models/prod acme/llama config.json --key $key | grep -xF '{}'
  kill "$bucket_pid"
}
two_publishers() {
  local name keys=()
  for name in ann ben cleo ci; do
    here two modelfs keygen --signing $name.key
    keys+=("$(grep -oE '[0-9a-f]{64}' "$work/page/$name.key.pub")")
  done
  page_block docs/KEYS.md text trust.conf |
    awk -v keys="${keys[*]}" 'BEGIN {split(keys, key, " ")} /<64 hex digits>/ {sub("<64 hex digits>", key[++n])} 1' >"$work/page/trust.conf"
  block two ann-seals
  refuses MAN_SIG reads two --trust-file trust.conf --key file:llama.key
  block two ben-signs
  reads two --trust-file trust.conf --key file:llama.key
}
# What a vendor's model_signing writes, as tests/oms.rs has it from the reference.
vendor_signs() {
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$work/page/vendor.key" 2>/dev/null
  openssl pkey -in "$work/page/vendor.key" -pubout -out "$work/page/vendor.pem"
  python3 - "$work/page/llama" "$work/page/vendor.key" <<'PYTHON'
import base64, hashlib, json, subprocess, sys
from pathlib import Path
folder, key = Path(sys.argv[1]), sys.argv[2]
digests = {path.name: hashlib.sha256(path.read_bytes()) for path in sorted(folder.iterdir())}
root = hashlib.sha256(b"".join(digest.digest() for digest in digests.values())).hexdigest()
statement = {
    "_type": "https://in-toto.io/Statement/v1", "predicateType": "https://model_signing/signature/v1.0",
    "subject": [{"name": "llama", "digest": {"sha256": root}}],
    "predicate": {
        "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ["model.sig"]},
        "resources": [{"name": name, "algorithm": "sha256", "digest": digest.hexdigest()} for name, digest in digests.items()],
    },
}
payload, kind = json.dumps(statement).encode(), "application/vnd.in-toto+json"
message = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", key], input=message, capture_output=True, check=True).stdout
(folder / "model.sig").write_text(json.dumps({
    "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
    "verificationMaterial": {"publicKey": {"hint": ""}, "tlogEntries": []},
    "dsseEnvelope": {"payload": base64.b64encode(payload).decode(), "payloadType": kind,
                     "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}]},
}))
PYTHON
}
model_signing() {
  vendor_signs
  block signed model-signing
  echo '{"more": 1}' >"$work/page/llama/config.json"
  refuses OMS block changed model-signing
}
step "docs/KEYS.md: keys of its own, without Vault" own_keys
step "docs/KEYS.md: a rotation brings the record of a catalog along" record_is_brought_along
step "docs/KEYS.md: two publishers, one after the other" two_publishers
step "docs/KEYS.md: a vendor's signature is checked, and one that does not fit is refused" model_signing

# ---- A model with three slots.

mkdir "$work/model"
echo '{}' >"$work/model/config.json"
(umask 077 && echo 'correct horse battery staple' >"$work/pass")
# Long enough for a Vault that is there and slow; once it is gone, as long as each question lasts.
patience=60s
transit=vault-transit:transit/models kv=vault-kv:secret/m#kek pass=passphrase-file:$work/pass
seal() { "$modelfs" seal "$work/model" "$work/store" "$@"; }
opens() { # KEY...
  local keys=() key
  for key in "$@"; do keys+=(--key "$key"); done
  [[ $("$modelfs" cat "$work/store" acme/m config.json --trust "$XDG_CONFIG_HOME/modelfs/signing.key.pub" \
    --vault-timeout "$patience" "${keys[@]}") == '{}' ]]
}
ends_with() { # CODE NAME KEY...: cat ends with the exit code and the name
  local rc=0 wanted=$1 name=$2 keys=() key
  shift 2
  for key in "$@"; do keys+=(--key "$key"); done
  "$modelfs" cat "$work/store" acme/m config.json --trust "$XDG_CONFIG_HOME/modelfs/signing.key.pub" \
    --vault-timeout "$patience" "${keys[@]}" >"$work/out" 2>"$work/err" || rc=$?
  cat "$work/err"
  [[ $rc == "$wanted" && ! -s $work/out ]] && grep -qF "[$name]" "$work/err"
}
with_token() { local VAULT_TOKEN=$1; shift; export VAULT_TOKEN; "$@"; }
without_address() { (unset VAULT_ADDR; "$@"); }
asked() { # OPERATION PATH: how often
  python3 - "$work/audit" "$1" "$2" <<'PY'
import json, sys
requests = [entry["request"] for entry in map(json.loads, open(sys.argv[1])) if entry["type"] == "request"]
print(sum(request["operation"] == sys.argv[2] and request["path"] == sys.argv[3] for request in requests))
PY
}
asked_so_often() { # COUNT OPERATION PATH
  local seen
  seen=$(asked "$2" "$3")
  [[ $seen == "$1" ]] || { echo "$2 $3: asked $seen times, not $1"; return 1; }
}

step "seal to transit, to a KV field and to a passphrase" seal acme/m --key "$transit" --key "$kv" --key "$pass"
step "transit opens it" opens "$transit"
step "the KV field opens it" opens "$kv"
"$vault" kv put secret/m kek="$(openssl rand -hex 32)" short=abcd >/dev/null
step "the version of the field that the slot names opens it, not the newest" opens "$kv"
"$vault" write -f transit/keys/models/rotate >/dev/null
step "transit opens it after its key was rotated" opens "$transit"
step "another transit key does not" ends_with 25 NO_KEY vault-transit:transit/other
step "a transit key that is not there is told" ends_with 3 VAULT_NOT_FOUND vault-transit:transit/none
step_exits 2 "a field of four bytes wraps nothing" seal acme/n --key 'vault-kv:secret/m#short'
step "without an address it is said what to set" without_address ends_with 2 USAGE "$transit"
before=$(asked update transit/decrypt/models)
step "the passphrase opens it and Vault is not asked" opens "$pass" "$transit"
step "... so says its audit log" asked_so_often "$before" update transit/decrypt/models
step "a token that is refused is told" with_token bogus ends_with 25 VAULT_DENIED "$transit"
step "the passphrase after it opens it" with_token bogus opens "$transit" "$kv" "$pass"
"$vault" kv destroy -versions=1 secret/m >/dev/null
step "a destroyed version of the field is told" ends_with 3 VAULT_NOT_FOUND "$kv"
"$vault" operator seal >/dev/null
step "a sealed Vault is told" ends_with 22 VAULT_SEALED "$transit"
step "the passphrase after it opens it with Vault sealed" opens "$transit" "$kv" "$pass"
kill "$vault_pid"
wait "$vault_pid" 2>/dev/null || true
vault_pid="" patience=2s
step "a Vault that is gone is told" ends_with 22 VAULT_UNREACHABLE "$transit"
step "the passphrase after it opens it with Vault stopped" opens "$transit" "$kv" "$pass"
finish
