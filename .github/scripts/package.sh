#!/usr/bin/env bash
# Makes the Debian package of a built program, with manual pages, completions and units: FOLDER/modelfs_VERSION_ARCH.deb.
#
#   .github/scripts/package.sh [--fast] PROGRAM FOLDER      --fast: compressed less, for tests
#
# The same program gives the same package. Needs cargo-deb (tests/parts/install.sh cargo-deb) and dpkg-dev.
set -euo pipefail
fast=()
[[ $1 != --fast ]] || { fast=(--fast); shift; }
program=$(realpath "$1") && mkdir -p "$2" && out=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh

cargo_deb=$(tool cargo-deb)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y Cargo.toml)}
"$program" man target/package/man
for shell in bash zsh fish; do
  "$program" completions $shell >target/package/modelfs.$shell
done
ln -sfn ../bin/modelfs target/package/mount.modelfs
ln -sfn ../bin/modelfs target/package/mount.fuse.modelfs
# cargo-deb takes the program from where cargo would have put it.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install -D -m 755 "$program" "$work/release/modelfs"
CARGO_TARGET_DIR=$work "$cargo_deb" deb --quiet --no-build --strip "${fast[@]}" --output "$out/"
