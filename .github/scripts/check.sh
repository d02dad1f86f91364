#!/usr/bin/env bash
# The checks that need neither a mount nor a test binary, each by its name. Continuous integration, tests/run.sh and
# pre-commit call these, so that all three mean the same by them.
#
#   .github/scripts/check.sh NAME...
#
#   fmt          cargo fmt
#   clippy       every warning is an error
#   licences     licences, duplicate and wildcard versions, and where crates come from (deny.toml)
#   advisories   known vulnerabilities, unsound and yanked crates of Cargo.lock
#   shell        shellcheck of every script
#   workflows    actionlint and schemas of .github/ and of .pre-commit-config.yaml
#   files        no private key, merge mark, broken YAML, JSON or TOML, nor a file above 512 KiB
#   weights      no model weights, by `modelfs scan` of what is about to be committed (needs the release build)
#
# Exit status 75: what the check asks cannot be reached from here. 69: a program that it needs is not installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh

check_fmt() { cargo fmt --check; }

# In the profile of the tests, so that what both must build is built once.
check_clippy() { cargo clippy --release --all-targets --locked -- -D warnings; }

check_licences() {
  local deny
  deny=$(tool cargo-deny) || return
  "$deny" --log-level error check licenses bans sources
}

# The advisories are a git repository on another host. MODELFS_TEST_DENY_CONFIG names another deny.toml, for the check of this
# check, with another repository in it.
check_advisories() {
  local deny log rc=0
  deny=$(tool cargo-deny) || return
  log=$(mktemp)
  timeout 300 "$deny" --config "${MODELFS_TEST_DENY_CONFIG:-deny.toml}" check advisories >"$log" 2>&1 || rc=$?
  cat "$log"
  # 124: whoever holds them took the connection, and sent nothing for five minutes.
  if [[ $rc == 124 ]] || { [[ $rc != 0 ]] && grep 'failed to fetch advisory database' "$log" >/dev/null; }; then rc=$NOT_HERE; fi
  rm -f "$log"
  return $rc
}

check_shell() {
  local shellcheck scripts
  shellcheck=$(tool shellcheck supply) || return
  mapfile -t scripts < <(scripts_of_the_repository)
  [[ ${#scripts[@]} -gt 0 ]] || { echo "found no script at all"; return 1; }
  # Two at a time: the long ones take seconds each.
  printf "%s\\0" "${scripts[@]}" | xargs -0 -n 4 -P "$(nproc)" "$shellcheck" --external-sources --severity=warning
}

check_workflows() {
  local schemas actionlint shellcheck pre_commit
  schemas=$(tool check-jsonschema supply) && actionlint=$(tool actionlint) && shellcheck=$(tool shellcheck supply) &&
    pre_commit=$(tool pre-commit supply) || return
  # actionlint looks at the shell of the workflows too, with what it finds in the PATH.
  PATH=$PATH:${shellcheck%/*} "$actionlint" -color=false .github/workflows/*.yaml || return 1
  "$schemas" --builtin-schema vendor.github-workflows .github/workflows/*.yaml &&
    "$schemas" --builtin-schema vendor.dependabot .github/dependabot.yaml &&
    "$pre_commit" validate-config .pre-commit-config.yaml || return 1
  # What runs is what was read: a commit, not a name that can be moved. What lies in this repository is of the same commit.
  if grep -HnE '^ *(- )?uses:' .github/workflows/*.yaml | grep -vE 'uses: \./|@[0-9a-f]{40} # v[0-9.]+$'; then
    echo "an action must be named by its commit, with its version behind it"
    return 1
  fi
}

check_files() {
  local bin files
  bin=$(tool check-added-large-files supply) || return
  bin=${bin%/*}
  mapfile -t files < <(git ls-files --cached --others --exclude-standard | while read -r file; do [[ ! -f $file ]] || echo "$file"; done)
  [[ ${#files[@]} -gt 0 ]] || { echo "found no file at all"; return 1; }
  # A test refuses this private key, which is none.
  local text_of_a_key=^src/crypto/ecdsa.rs$
  not_matching() { printf '%s\n' "${files[@]}" | grep -vE "$1"; }
  matching() { printf '%s\n' "${files[@]}" | grep -E "$1"; }
  "$bin/check-added-large-files" --enforce-all --maxkb=512 "${files[@]}" &&
    not_matching "$text_of_a_key" | xargs "$bin/detect-private-key" &&
    "$bin/check-merge-conflict" --assume-in-merge "${files[@]}" &&
    matching '\.ya?ml$' | xargs "$bin/check-yaml" --allow-multiple-documents &&
    matching '\.json$' | xargs "$bin/check-json" &&
    matching '\.toml$' | xargs "$bin/check-toml"
}

# Of the index, so that what is checked is what would be committed.
check_weights() {
  local modelfs=${MODELFS:-${CARGO_TARGET_DIR:-target}/release/modelfs} folder rc=0
  [[ -x $modelfs ]] || die "$modelfs is not built: cargo build --release --locked"
  folder=$(mktemp -d)
  git checkout-index --all --prefix="$folder/" && "$modelfs" scan "$folder" || rc=$?
  rm -rf "$folder"
  return $rc
}

[[ $# -gt 0 ]] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
for name in "$@"; do
  [[ $(type -t "check_$name") == function ]] || { echo "check.sh: no check called $name" >&2; exit 2; }
done
for name in "$@"; do "check_$name"; done
