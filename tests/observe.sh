#!/usr/bin/env bash
# The commands of docs/METRICS.md, as they stand: scrapes over a Unix socket and over TLS, health, roles, alerts. What a
# scrape says is looked over by promtool, where it is installed.
#
#   tests/observe.sh      needs the release build (MODELFS names another binary), root, /dev/fuse
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
modelfs=$(realpath "$modelfs" 2>/dev/null || echo "$modelfs")
page=$PWD/docs/METRICS.md
promtool=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}/prometheus/bin/promtool
if [[ ! -x $modelfs ]]; then
  step "observe: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
[[ $EUID == 0 && -c /dev/fuse ]] || { skip "metrics and health" "needs root and /dev/fuse"; finish; exit; }

if [[ -z ${MODELFS_TEST_PAGE_RUN:-} ]]; then
  MODELFS_TEST_PAGE_RUN=$(mktemp)
  export MODELFS_TEST_PAGE_RUN
  own_page_run=1
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-observe.XXXXXX")
chmod 755 "$work"
mkdir "$work"/{bin,source,store,mnt,home}
cp "$modelfs" "$work/bin/modelfs"
export PATH=$work/bin:$PATH
export HOME=$work/home XDG_CONFIG_HOME=$work/config XDG_STATE_HOME=$work/state MODELFS_STATE_DIR=$work/state/modelfs
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS|STRICT)_' | grep -vE '^MODELFS_(TEST_[A-Z_]+|STATE_DIR)$'); do unset "$name"; done
export STORE=$work/store MNT=$work/mnt KEY=file:$work/model.key TRUST=$work/config/modelfs/signing.key.pub
export HTTP_SOCKET=$work/http.sock VIEWER=54321 PORT="" HOOK=""
receiver=""
cd "$work"

is_mounted() { grep -qE "^[^ ]+ $MNT fuse\.modelfs " /proc/self/mounts; }
unmount() { ! is_mounted || modelfs umount "$MNT"; }
cleanup() {
  [[ -z $receiver ]] || kill "$receiver" 2>/dev/null || true
  unmount >/dev/null 2>&1 || umount -l "$MNT" 2>/dev/null || true
  cd /
  [[ -z ${own_page_run:-} ]] || rm -f "$MODELFS_TEST_PAGE_RUN"
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || { echo "not within the time: $*"; return 1; }; sleep 0.1; done
}

prepare() {
  head -c 12000000 /dev/urandom >source/model.safetensors
  modelfs keygen model.key
  modelfs seal source "$STORE" acme/llama --key "$KEY"
}
says() { # WANTED COMMAND...: the command's output holds a line that begins so
  local wanted=$1 out
  shift
  out=$("$@") || return 1
  grep -E "^$wanted" <<<"$out" >/dev/null || { printf '%s\n' "$out" | head -20; echo "no line begins with: $wanted"; return 1; }
}

scrape_where_it_answers_by_itself() {
  modelfs mount "$STORE" "$MNT" --key "$KEY" --trust "$TRUST" --daemon
  cat "$MNT/acme/llama/model.safetensors" >/dev/null
  says 'modelfs_model_resident_bytes\{model="acme/llama",version="1"\} 12000000' run_page_block "$page" scrape
}
lint() {
  run_page_block "$page" scrape >scrape.txt || return 1
  "$promtool" check metrics <scrape.txt
}
health() {
  unmount
  modelfs mount "$STORE" "$MNT" --key "$KEY" --trust "$TRUST" --daemon --http "unix:$HTTP_SOCKET"
  says 'pass.memory' run_page_block "$page" health
}
health_of_a_locked_mount() {
  modelfs lock "$MNT" || return 1
  ! run_page_block "$page" health >/dev/null 2>&1
}
tls() {
  unmount
  PORT=$(free_port)
  run_page_block "$page" tls || return 1
  says 'modelfs_ready 1' run_page_block "$page" scrape-tls
}
tls_refuses() {
  local url=https://localhost:$PORT/metrics
  [[ $(curl -s -o /dev/null -w '%{http_code}' --cacert http.crt "$url") == 401 ]] || return 1
  # Without knowing the certificate nobody is talked to.
  ! curl -sS -H "Authorization: Bearer $(cat http.token)" "$url" >/dev/null 2>&1
}
roles() {
  unmount
  says 'passthrough' run_page_block "$page" roles || return 1
  # A mount that a viewer's `lock` had locked would refuse this.
  cat "$MNT/acme/llama/model.safetensors" >/dev/null
}
alert_is_told() { grep -q '"kind":"tamper".*"severity":"critical"' hook.log; }
alerts() {
  unmount
  local port object
  port=$(free_port)
  HOOK=http://127.0.0.1:$port/services/canary-of-the-hook
  python3 - "$port" >hook.log <<'PYTHON' &
import http.server, sys
class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(204)
        self.end_headers()
    def log_message(self, *words):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Hook).serve_forever()
PYTHON
  receiver=$!
  until_true 120 bash -c "exec 3<>/dev/tcp/127.0.0.1/$port"
  run_page_block "$page" alerts || return 1
  object=$(find store -type f -size +1M -print -quit)
  chmod u+w "$object"
  printf '\x5a\xa5\x5a\xa5' | dd of="$object" bs=1 seek=3000000 conv=notrunc status=none
  ! cat "$MNT/acme/llama/model.safetensors" >/dev/null 2>&1 || return 1
  until_true 120 alert_is_told || return 1
  jq -e 'select(.kind == "tamper" and .severity == "critical") | .schema == "modelfs.alert.v1" and .severity == "critical" and .subject.model == "acme/llama"' hook.log
}

step "metrics: a model is sealed" prepare
step "metrics: a mount answers beside its control socket, and a read shows in a scrape" scrape_where_it_answers_by_itself
if [[ -x $promtool ]]; then
  step "metrics: promtool has nothing to say about a scrape" lint
else
  skip "metrics: promtool" "$promtool is not installed"
fi
step "health: a mount that serves is well" health
step "health: a locked mount is not" health_of_a_locked_mount
step "metrics: over TLS with a token" tls
step "metrics: not without the token, nor to who does not know the certificate" tls_refuses
step "roles: a viewer looks and gives no orders" roles
step "alerts: a spoilt byte reaches the webhook" alerts
step "every command of docs/METRICS.md was run" page_was_run "$page"
finish
