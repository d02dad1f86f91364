#!/usr/bin/env bash
# HashiCorp Vault (MPL-2.0) and MinIO (AGPL, run by tests only): the key server and the store with short-lived credentials
# of the tests, built from the Go module proxy, checked against Go's checksum database and tests/parts/vault/go.sum.
# 14 CPU-minutes and 4; nothing when these very versions are there.
#
#   tests/parts/vault.sh install [vault|minio]     builds them into the cache folder
#   tests/parts/vault.sh path vault|minio          prints where one is
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/parts/again.sh
source "$here/again.sh"
VAULT_VERSION=1.13.0
MINIO_VERSION=v0.0.0-20260212201848-7aac2a2c5b7c
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
declare -A root=([vault]=$cache/vault-$VAULT_VERSION [minio]=$cache/minio-$MINIO_VERSION)

build() { # NAME: into $root.build
  case $1 in
  # Vault pins its dependencies by replacements in its own go.mod, which `go install` refuses: hence a module around it.
  vault) (cd "$here/vault" && again go build -ldflags '-s -w' -o "${root[vault]}.build/vault" github.com/hashicorp/vault) ;;
  minio) GOBIN=${root[minio]}.build again go install -ldflags '-s -w' "github.com/minio/minio@$MINIO_VERSION" ;;
  esac
}

install_one() {
  local name=$1 dir=${root[$1]}
  if [[ -x $dir/bin/$name ]]; then
    echo "[parts] $name is there (${dir##*/})"
    return
  fi
  if ! command -v go >/dev/null; then
    echo "[parts] $name needs Go 1.23 or newer: https://go.dev/dl/" >&2
    exit 1
  fi
  echo "[parts] ${dir##*/}: building (several minutes)"
  # Built aside and moved, so that a build cut short is not taken for the program.
  mkdir -p "$dir.build" "$dir/bin"
  build "$name"
  mv "$dir.build/$name" "$dir/bin/$name"
  rm -rf "$dir.build"
  echo "[parts] ${dir##*/}: built"
}

case ${1:-install} in
path) echo "${root[$2]}/bin/$2" ;;
install)
  shift || true
  for name in "${@:-vault minio}"; do
    for one in $name; do install_one "$one"; done
  done
  ;;
*)
  echo "usage: $0 install [vault|minio] | path vault|minio" >&2
  exit 2
  ;;
esac
