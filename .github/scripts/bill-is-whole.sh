#!/usr/bin/env bash
# Whether a bill of materials names every crate that the program carries in its own list, and no crate that is in neither
# that list nor Cargo.lock. The two are made by two tools from two places: cargo auditable while linking, cargo cyclonedx from
# Cargo.toml.
#
#   .github/scripts/bill-is-whole.sh PROGRAM SBOM
set -euo pipefail
[[ $# == 2 ]] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
here=$(dirname "${BASH_SOURCE[0]}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bash "$here/embedded.sh" "$1" | jq -r '.packages[] | select(.kind == null) | "\(.name) \(.version)"' | sort -u >"$work/inside"
jq -r '.metadata.component, (.metadata.component.components // [])[], .components[] | select(.purl // "" | startswith("pkg:cargo/")) | "\(.name) \(.version)"' "$2" | sort -u >"$work/billed"
awk -F'"' '/^name = /{name = $2} /^version = / && name {print name " " $2; name = ""}' "$here/../../Cargo.lock" | sort -u >"$work/locked"
[[ $(wc -l <"$work/inside") -gt 1 ]] || { echo "$1 says that it has no crates" >&2; exit 1; }
missing=$(comm -23 "$work/inside" "$work/billed")
[[ -z $missing ]] || { printf 'in the program, and not in %s:\n%s\n' "$2" "$missing" >&2; exit 1; }
foreign=$(comm -23 "$work/billed" "$work/locked")
[[ -z $foreign ]] || { printf 'in %s, and not in Cargo.lock:\n%s\n' "$2" "$foreign" >&2; exit 1; }
echo "$(wc -l <"$work/inside") crates in the program, all of them among the $(wc -l <"$work/billed") of the bill"
