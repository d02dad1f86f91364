#!/usr/bin/env bash
# What a release carries that it should not: models in the image, known vulnerabilities in anything, crates that no bill names.
#
#   .github/scripts/inspect-release.sh FOLDER      as release.sh made it, before it is signed
set -euo pipefail
folder=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh

version=$(jq -er .predicate.buildDefinition.externalParameters.version "$folder/statement.json")
target=$(jq -er .predicate.buildDefinition.externalParameters.target "$folder/statement.json")
program=$folder/modelfs-$version-$target
image=$folder/modelfs-image-$version.tar

bash .github/scripts/bill-is-whole.sh "$program" "$folder/modelfs-$version.cdx.json"
bills=("$folder/modelfs-$version.cdx.json")
if [[ -f $image ]]; then
  "$program" scan "$image"
  bills+=("$folder/modelfs-image-$version.cdx.json")
fi
bash .github/scripts/vulnerabilities.sh "${bills[@]}"
