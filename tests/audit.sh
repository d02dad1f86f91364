#!/usr/bin/env bash
# The commands of docs/AUDIT.md, on a real mount; those of the journal are run by tests/systemd.sh.
#
#   tests/audit.sh      needs root and /dev/fuse, and the program built
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

page=$PWD/docs/AUDIT.md
if [[ $EUID != 0 || ! -c /dev/fuse ]]; then
  skip "the commands of docs/AUDIT.md" "needs root and /dev/fuse"
  finish
  exit
fi
bin=${MODELFS:-${CARGO_TARGET_DIR:-target}/release/modelfs}
WORK=$(mktemp -d)
ETC=$WORK/etc LOGS=$WORK/logs ELSEWHERE=$WORK/elsewhere STORE=$WORK/store MNT=$WORK/mnt
mkdir -p "$ETC" "$LOGS" "$ELSEWHERE" "$STORE" "$MNT" "$WORK/bin" "$WORK/model"
ln -s "$(realpath "$bin")" "$WORK/bin/modelfs"
KEY=$ETC/model.key TRUST=$WORK/home/.config/modelfs/signing.key.pub
export WORK ETC LOGS ELSEWHERE STORE MNT KEY TRUST
export PATH=$WORK/bin:$PATH HOME=$WORK/home XDG_CONFIG_HOME=$WORK/home/.config MODELFS_STATE_DIR=$WORK/home/state
mkdir -p "$HOME"
cleanup() {
  ! mountpoint -q "$MNT" || modelfs umount "$MNT" >/dev/null 2>&1 || umount -l "$MNT" || true
  rm -rf "$WORK"
}
trap cleanup EXIT

prepare() {
  head -c 3000000 /dev/urandom >"$WORK/model/weights.bin"
  modelfs keygen "$KEY" && modelfs seal "$WORK/model" "$STORE" acme/llama --key "file:$KEY"
}
read_it() {
  cmp "$MNT/acme/llama/weights.bin" "$WORK/model/weights.bin" && modelfs umount "$MNT"
}
shows_what_happened() {
  local shown
  shown=$(run_page_block "$page" show) && echo "$shown"
  for word in start 'model acme/llama version 1' raw/key-file '"kind":"mount"'; do
    grep -F -- "$word" <<<"$shown" >/dev/null || { echo "$word is not shown"; return 1; }
  done
}
verifies() {
  local said
  said=$(run_page_block "$page" verify) && echo "$said"
  grep -F 'trusted' <<<"$said" >/dev/null && grep -F 'every line follows' <<<"$said" >/dev/null
}

step "audit: a model to read" prepare
step "audit: docs/AUDIT.md keys" run_page_block "$page" keys
step "audit: docs/AUDIT.md mount" run_page_block "$page" mount
step "audit: the model is read" read_it
step "audit: docs/AUDIT.md show" shows_what_happened
step "audit: docs/AUDIT.md verify" verifies
step "audit: docs/AUDIT.md tamper" run_page_block "$page" tamper
finish
