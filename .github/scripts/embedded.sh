#!/usr/bin/env bash
# The list of crates that a program carries inside, as JSON: {"packages": [{"name", "version", "source", "kind"}]}.
#
#   .github/scripts/embedded.sh PROGRAM
#
# The section .dep-v0 of cargo auditable: JSON in a zlib stream.
set -euo pipefail
[[ $# == 1 ]] || { echo "usage: $0 PROGRAM" >&2; exit 2; }
section=$(mktemp)
trap 'rm -f "$section"' EXIT
objcopy -O binary --only-section=.dep-v0 --set-section-flags .dep-v0=alloc "$1" "$section"
[[ -s $section ]] || { echo "embedded.sh: $1 carries no list of its crates; build it by .github/scripts/build.sh" >&2; exit 1; }
python3 -c 'import sys, zlib; sys.stdout.buffer.write(zlib.decompress(open(sys.argv[1], "rb").read()))' "$section"
