#!/usr/bin/env bash
# versitygw: the S3 server of the tests (Apache-2.0), built from the Go module proxy, checked against Go's checksum
# database. 80 s and 600 MB of Go's caches on two cores; nothing when this very version is there.
#
#   tests/parts/versitygw.sh install     builds it into the cache folder
#   tests/parts/versitygw.sh path        prints where it is
#
# tests/common/mod.rs starts one server for each test that wants one, over a folder of its own, and stops it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/parts/again.sh
source "$here/again.sh"
VERSITYGW_VERSION=1.8.0
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
root=$cache/versitygw-$VERSITYGW_VERSION

case ${1:-install} in
path)
  echo "$root/bin/versitygw"
  ;;
install)
  if [[ -x $root/bin/versitygw ]]; then
    echo "[parts] versitygw $VERSITYGW_VERSION is there"
    exit 0
  fi
  if ! command -v go >/dev/null; then
    echo "[parts] versitygw needs Go 1.25 or newer: https://go.dev/dl/" >&2
    exit 1
  fi
  echo "[parts] versitygw $VERSITYGW_VERSION: building (80 s)"
  # Built aside and moved, so that a build cut short is not taken for the program.
  mkdir -p "$root.build"
  GOBIN=$root.build again go install "github.com/versity/versitygw/cmd/versitygw@v$VERSITYGW_VERSION"
  mkdir -p "$root/bin"
  mv "$root.build/versitygw" "$root/bin/versitygw"
  rmdir "$root.build"
  echo "[parts] versitygw $VERSITYGW_VERSION: built"
  ;;
*)
  echo "usage: $0 [install|path]" >&2
  exit 2
  ;;
esac
