#!/usr/bin/env bash
# Every check of this repository, from a fresh checkout: parts, style, dependencies, tests, and real programs on a mount.
#
#   tests/run.sh            everything (first run: half an hour and 20 GB for the parts; later runs: minutes)
#   tests/run.sh --quick    without torch, without the multi-gigabyte models, without pjdfstest
#
# Ends with one line: N passed, N failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh

quick=""
case ${1:-} in
  "") ;;
  --quick) quick=--quick ;;
  *) sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}

install_parts() {
  if [[ -n $quick ]]; then
    bash tests/parts/install.sh apt rust cargo-deny clients-lite models-small versitygw
  else
    bash tests/parts/install.sh
  fi
}

# The advisories are a git repository on another host; where it cannot be reached the check says so and is not counted.
check_advisories() {
  local log
  log=$(mktemp)
  if timeout 300 "$deny" check advisories >"$log" 2>&1; then
    cat "$log"
    step "cargo deny: advisories" true
  elif grep -q 'failed to fetch advisory database' "$log"; then
    not_here "cargo deny: advisories" "the advisory database (github.com/RustSec/advisory-db) cannot be reached from here"
  else
    cat "$log"
    step "cargo deny: advisories" false
  fi
  rm -f "$log"
}

step "install parts" install_parts
deny=$(echo "$cache"/cargo-deny-*/bin/cargo-deny)
step "cargo fmt" cargo fmt --check
# In the profile of the tests, so that what both must build is built once.
step "cargo clippy" cargo clippy --release --all-targets --locked -- -D warnings
if [[ -x $deny ]]; then
  step "cargo deny: licences, bans, sources" "$deny" --log-level error check licenses bans sources
  check_advisories
else
  skip "cargo deny" "cargo-deny is not installed"
fi
step "cargo test" cargo test --release --locked
step "cargo build" cargo build --release --locked
bash tests/e2e.sh $quick || true
finish
