#!/usr/bin/env bash
# Whether two builds of this commit, in different folders and with different Cargo folders, give the same program.
#
#   .github/scripts/reproducible.sh
#
# Two whole builds. Run every week and before a release, not with the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh

[[ -z $(git status --porcelain) ]] || die "this checkout has changes; what is compared is a commit"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for place in one "a second, longer place"; do
  git worktree prune
  git clone --quiet --no-hardlinks . "$work/$place/checkout"
  mkdir -p "$work/$place/cargo"
  # Other folders, the same crates: what was fetched once is not fetched again.
  for part in registry git bin; do [[ ! -d ${CARGO_HOME:-$HOME/.cargo}/$part ]] || cp -r "${CARGO_HOME:-$HOME/.cargo}/$part" "$work/$place/cargo/"; done
  (cd "$work/$place/checkout" && CARGO_HOME=$work/$place/cargo CARGO_TARGET_DIR=$work/$place/target \
    bash .github/scripts/build.sh "$work/$place")
  rm -rf "$work/$place/target"
done
sha256sum "$work"/*/modelfs
cmp "$work/one/modelfs" "$work/a second, longer place/modelfs"
echo "the same program, twice"
