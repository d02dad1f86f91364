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
source tests/page.sh

quick=""
case ${1:-} in
  "") ;;
  --quick) quick=--quick ;;
  *) sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac

install_parts() {
  if [[ -n $quick ]]; then
    bash tests/parts/install.sh apt rust cargo-deny cargo-auditable cargo-cyclonedx cargo-deb supply actionlint osv-scanner clients-lite models-small versitygw vault docker podman compose prometheus panels rootfs kubernetes
  else
    bash tests/parts/install.sh
  fi
}

# script NAME [ARGUMENT]: its steps; one that ends between two of them has failed as well.
script() {
  local name=$1
  shift
  bash "tests/$name" "$@" || grep -q '^failed ' "$MODELFS_TEST_STEPS" || step "$name runs to its end" false
}

check() { try_step "$1" "${3:-it needs the network}" bash .github/scripts/check.sh "$2"; }

# What every script here counts on, tried on steps whose end is known.
steps_tell() {
  local tally
  tally=$(mktemp)
  MODELFS_TEST_STEPS=$tally bash -euo pipefail -c '
    source tests/steps.sh
    good() { if false; then return 1; fi; false || true; set_by_a_step=yes; }
    middle() { false; true; }
    deep() { middle; true; }
    inner() { local x; x=$(false); true; }
    piped() { false | true; }
    step 1 good; step 2 middle; step 3 deep; step 4 inner; step 5 piped; step_exits 3 6 bash -c "exit 3"
    [[ $set_by_a_step == yes ]]' >/dev/null
  diff <(printf '%s\n' "passed 1" "failed 2" "failed 3" "failed 4" "failed 5" "passed 6") "$tally"
  rm -f "$tally" "$tally.stopped"
}

# Some tests hold ten thousand files open; a login gives a thousand.
ulimit -Hn 65536 2>/dev/null || true
ulimit -Sn "$(ulimit -Hn)"

MODELFS_TEST_PAGE_RUN=$(mktemp)
export MODELFS_TEST_PAGE_RUN
step "a step fails with the first command in it that fails" steps_tell
step "a command of a page that has no name, or that no test runs, is told" pages_tell
step "install parts" install_parts
script lanes.sh
check "cargo fmt" fmt
check "cargo clippy" clippy
check "cargo deny: licences, bans, sources" licences
check "cargo deny: advisories" advisories "the advisory database (github.com/RustSec/advisory-db) cannot be reached from here"
check "shellcheck" shell
check "workflows, dependabot, pre-commit" workflows
check "no keys, no large files, nothing broken" files
step "cargo test" cargo test --release --locked --no-fail-fast
step "cargo build" cargo build --release --locked
check "no model weights in this repository" weights
script supply.sh
script e2e.sh $quick
script config.sh
script vault_slots.sh
script vault_day.sh
script audit.sh
script docker.sh
script policy.sh
script monitoring.sh
script mount8.sh
script package.sh
script systemd.sh
script run_command.sh
script doctor.sh
script scan.sh $quick
script csi.sh
script kubernetes.sh
script observe.sh
script runbook.sh
script docs.sh
for page in ACCESS AUDIT CONFIGURATION DEPLOY DOCTOR HARDENING INCIDENTS KEYS METRICS MONITORING RECOVERY RUNBOOK SCAN; do
  step "every command of docs/$page.md was run" page_was_run "docs/$page.md"
done
step "every command of SECURITY.md was run" page_was_run SECURITY.md
# Two of its commands start this script; one is the day of tests/vault_day.sh in three lines.
step "every named command of README.md was run" named_blocks_were_run README.md
rm -f "$MODELFS_TEST_PAGE_RUN"
finish
