#!/usr/bin/env bash
# The commands of docs/CONFIGURATION.md, and a start with the names that deployments from before set.
#
#   tests/config.sh      as root; needs the release build (MODELFS names another binary) and /dev/fuse
#
# All of it happens in a mount namespace of its own, over a copy of /etc that is gone with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $EUID == 0 && -z ${MODELFS_TEST_CONFIG_INSIDE:-} ]]; then
  MODELFS_TEST_CONFIG_INSIDE=1 exec unshare --mount --propagation private bash tests/config.sh
fi
source tests/steps.sh
source tests/page.sh

page=$PWD/docs/CONFIGURATION.md
binary=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
if [[ ! -x $binary ]]; then
  step "configuration: $binary is built (cargo build --release --locked)" false
  finish
  exit
fi
[[ $EUID == 0 && -c /dev/fuse ]] || { skip "configuration" "needs root and /dev/fuse"; finish; exit; }

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-config.XXXXXX")
cleanup() {
  cd /
  umount --lazy /mnt/models 2>/dev/null || true
  umount --lazy /etc 2>/dev/null || true
  umount --lazy "$work/over" 2>/dev/null || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
mkdir "$work"/{over,bin,home}
mount -t tmpfs -o mode=755 none "$work/over"
mkdir "$work"/over/{etc,work}
if ! mount -t overlay -o "lowerdir=/etc,upperdir=$work/over/etc,workdir=$work/over/work" none /etc; then
  skip "configuration" "this kernel lays nothing over /etc"
  finish
  exit
fi
for dir in mnt srv var/log; do mount -t tmpfs -o mode=755 none "/$dir"; done
cp "$binary" "$work/bin/modelfs"
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS|STRICT|MAX|REQUIRED)_' | grep -vE '^MODELFS_TEST_'); do unset "$name"; done
export PATH=$work/bin:$PATH HOME=$work/home XDG_CONFIG_HOME=$work/home MODELFS_STATE_DIR=$work/state
mkdir -p /etc/modelfs /mnt/models /srv/models /var/log/modelfs "$work/source"
rm -f /etc/modelfs.toml

prepare() {
  modelfs -q keygen /etc/modelfs/llama.key &&
    modelfs -q keygen --signing /etc/modelfs/signing.key &&
    cp /etc/modelfs/signing.key.pub /etc/modelfs/signing.pub &&
    head -c 300000 /dev/urandom >"$work/source/model.safetensors" &&
    page_block "$page" toml modelfs.toml >/etc/modelfs.toml &&
    modelfs -q seal "$work/source" /srv/models acme/llama --sign /etc/modelfs/signing.key
}
broken_is_found() { # the same command, and something wrong
  local said
  echo 'cahce = "1GiB"' >>/etc/modelfs.toml
  said=$(run_page_block "$page" check 2>&1) && { echo "it did not fail"; return 1; }
  sed -i '/^cahce/d' /etc/modelfs.toml
  echo "$said"
  [[ $said == *'did you mean `cache`'* ]]
}
# Reads the whole model through a mount that is started with every name from before, and looks at what was left behind.
names_from_before() {
  local said=$work/said
  mkdir -p "$work/cache"
  GAMEFORGE_ENV=production MODEL_SECURITY_ENABLED=true SECURITY_SCAN_ENABLED=true VAULT_HEALTH_CHECK_ENABLED=true \
    PERFORMANCE_MONITORING_ENABLED=true SECURE_MODE=false MODEL_STORAGE_BACKEND=local REQUIRED_MODELS=acme/llama \
    MAX_MODEL_SIZE_MB=2048 MODEL_CACHE_DIR=$work/cache ENABLE_SECURITY_LOGGING=true \
    modelfs run /srv/models /mnt/models -- \
    cmp /mnt/models/acme/llama/model.safetensors "$work/source/model.safetensors" 2>"$said" || { cat "$said"; return 1; }
  cat "$said"
  grep -F "MODEL_CACHE_DIR: Never a place for plaintext" "$said" >/dev/null &&
    grep -F "SECURE_MODE is not obeyed" "$said" >/dev/null &&
    [[ -z $(ls -A "$work/cache") ]]
}
too_large_is_refused() {
  local rc=0
  MAX_MODEL_SIZE_MB=0.1 REQUIRED_MODELS=acme/llama modelfs run /srv/models /mnt/models -- true || rc=$?
  [[ $rc != 0 && $rc != 127 ]]
}

step "configuration: a model, a key, and the page's file" prepare
step "configuration: the page's check finds nothing wrong" run_page_block "$page" check
step "configuration: and finds what is" broken_is_found
step "configuration: the page's show" run_page_block "$page" show
step "configuration: the page's names from before" run_page_block "$page" names
step "configuration: with all of them a model is read, and nothing lies in MODEL_CACHE_DIR" names_from_before
step "configuration: MAX_MODEL_SIZE_MB keeps a larger model out" too_large_is_refused
finish
