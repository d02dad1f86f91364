# shellcheck shell=bash
# Sourced by the scripts beside it.

# Exit status of a check that cannot be made from here, because what it asks cannot be reached: neither passed nor failed.
# shellcheck disable=SC2034
NOT_HERE=75
# And of one whose program is not installed.
NOT_INSTALLED=69

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}

die() { echo "${0##*/}: $*" >&2; exit 1; }

# tool NAME: where the program is, among the parts that tests/parts/install.sh built, or in the PATH.
tool() {
  local found
  for found in "$cache"/"$1"-*/bin/"$1" "$cache"/supply/bin/"$1"; do
    [[ ! -x $found ]] || { echo "$found"; return; }
  done
  command -v "$1" && return
  echo "${0##*/}: $1 is not installed: bash tests/parts/install.sh ${2:-$1}" >&2
  return $NOT_INSTALLED
}

# manifest_value KEY: of the section [package] of Cargo.toml.
manifest_value() { sed -n "/^\[package\]/,/^\[/s/^$1 = \"\(.*\)\"/\1/p" Cargo.toml; }

# scripts_of_the_repository: every file that a shell runs.
scripts_of_the_repository() {
  git ls-files --cached --others --exclude-standard | while read -r file; do
    [[ -f $file ]] || continue
    case $file in
    *.sh) echo "$file" ;;
    *) if head -c 64 "$file" | head -1 | grep -aE '^#!.*\b(ba)?sh\b' >/dev/null; then echo "$file"; fi ;;
    esac
  done
}
