#!/usr/bin/env bash
# Docker Compose (Apache-2.0), the command line's plugin, built from the Go module proxy, checked against Go's checksum
# database and tests/parts/compose/go.sum. 3 minutes on two cores; nothing when this very version is there.
#
#   tests/parts/compose.sh install     builds it into the cache folder
#   tests/parts/compose.sh path        prints where it is
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/parts/again.sh
source "$here/again.sh"
COMPOSE_VERSION=v2.40.3
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
root=$cache/compose-$COMPOSE_VERSION

case ${1:-install} in
path) echo "$root/bin/docker-compose" ;;
install)
  if [[ -x $root/bin/docker-compose ]]; then
    echo "[parts] compose $COMPOSE_VERSION is there"
    exit 0
  fi
  if ! command -v go >/dev/null; then
    echo "[parts] compose needs Go 1.24 or newer: https://go.dev/dl/" >&2
    exit 1
  fi
  echo "[parts] compose $COMPOSE_VERSION: building (3 minutes)"
  # Built aside and moved, so that a build cut short is not taken for the program.
  mkdir -p "$root.build" "$root/bin"
  (cd "$here/compose" && again go build -o "$root.build/docker-compose" \
    -ldflags "-s -w -X github.com/docker/compose/v2/internal.Version=$COMPOSE_VERSION" github.com/docker/compose/v2/cmd)
  mv "$root.build/docker-compose" "$root/bin/docker-compose"
  rm -rf "$root.build"
  echo "[parts] compose $COMPOSE_VERSION: built"
  ;;
*)
  echo "usage: $0 install | path" >&2
  exit 2
  ;;
esac
