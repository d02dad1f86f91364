#!/usr/bin/env bash
# The image as it would be built today, from this commit and this machine's packages: its bill of materials, and what is known
# against anything in it.
#
#   .github/scripts/weekly.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bash .github/scripts/build.sh --trial "$work"
bash docs/container/rootfs.sh "$work/modelfs" "$work/image"
bash .github/scripts/sbom.sh program "$work/program.cdx.json"
bash .github/scripts/sbom.sh image "$work/program.cdx.json" "$work/image" "$work/image.cdx.json"
bash .github/scripts/bill-is-whole.sh "$work/modelfs" "$work/image.cdx.json"
bash .github/scripts/vulnerabilities.sh "$work/image.cdx.json"
