#!/usr/bin/env bash
# Builds the program that is released into FOLDER/modelfs: from Cargo.lock, with the list of its crates inside (cargo
# auditable; read by cargo audit, trivy, grype, osv-scanner), without debug information, and with no path of this machine in it.
#
#   .github/scripts/build.sh [--trial] FOLDER
#
# Two builds of one commit by one toolchain give the same bytes, wherever the checkout and Cargo's folder lie:
# .github/scripts/reproducible.sh shows it. The paths in it differ from those of a build by hand, so nothing is shared with
# target/release: 10 CPU-minutes and more.
#
# --trial: to try the scripts. Shares target/ and optimizes modelfs itself not at all. release.sh marks what comes of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh

trial=""
[[ ${1:-} != --trial ]] || { trial=1; shift; }
[[ $# == 1 && $1 != -* ]] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
out=$1
auditable=$(tool cargo-auditable)
target=${CARGO_TARGET_DIR:-$PWD/target}
arguments=(build --release --locked --bin modelfs)
if [[ -n $trial ]]; then
  # Crates that compile C would be compiled again for each commit.
  unset SOURCE_DATE_EPOCH
  arguments+=(--config 'profile.release.package.modelfs.opt-level=0' --config 'profile.release.package.modelfs.codegen-units=64')
else
  export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
  # A folder of its own, so that flags which a shell has set do not come in by what was built with them.
  target+=/shipped
  cargo_home=${CARGO_HOME:-$HOME/.cargo}
  sysroot=$(rustc --print sysroot)
  unset RUSTFLAGS CARGO_BUILD_RUSTFLAGS CARGO_INCREMENTAL
  # Separated by 0x1f, so that folders may have blanks in their names.
  CARGO_ENCODED_RUSTFLAGS=$(printf '%s\x1f' "--remap-path-prefix=$target=/build" "--remap-path-prefix=$PWD=/modelfs" \
    "--remap-path-prefix=$cargo_home=/cargo" "--remap-path-prefix=$sysroot=/rustc" | sed 's/\x1f$//')
  export CARGO_ENCODED_RUSTFLAGS
  # The same for what the crates' C compilers write. Quoted as a shell has it, which the crate cc must be told.
  CFLAGS="$(printf '%q ' "-ffile-prefix-map=$target=/build" "-ffile-prefix-map=$cargo_home=/cargo")${CFLAGS:-}"
  export CFLAGS CC_SHELL_ESCAPED_FLAGS=1 CARGO_INCREMENTAL=0
fi
# A trial leaves the program of target/release what it was: tests run it.
kept=""
if [[ -n $trial && -f $target/release/modelfs ]]; then
  kept=$target/release/.modelfs-kept-$$
  ln "$target/release/modelfs" "$kept"
  # Where this was a trial before, both are one file, which mv would not take.
  trap 'if [[ $kept -ef $target/release/modelfs ]]; then rm -f "$kept"; else mv -f "$kept" "$target/release/modelfs"; fi' EXIT
fi
CARGO_TARGET_DIR=$target "$auditable" auditable "${arguments[@]}"
mkdir -p "$out"
# The list of crates is a section of its own, and stays.
strip --strip-debug -o "$out/modelfs" "$target/release/modelfs"
chmod 755 "$out/modelfs"
echo "$out/modelfs"
