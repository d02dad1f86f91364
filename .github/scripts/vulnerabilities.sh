#!/usr/bin/env bash
# Whether what a bill of materials lists is known to be vulnerable. High and critical fail; so does what has no severity yet.
#
#   .github/scripts/vulnerabilities.sh SBOM...
#
# osv-scanner asks osv.dev, which knows RustSec's and Debian's advisories among others. An exception stands in
# .github/osv-scanner.toml with its reason and the day on which it ends.
#
# MODELFS_TEST_OSV_DATABASE names a folder with databases instead (osv-scanner's own format), and nobody is asked: for places
# without a network, and for the check of this check.
#
# Exit status: 0 nothing above medium; 1 something is, or the answer is not one; 75 osv.dev cannot be reached from here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh

[[ $# -gt 0 ]] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
osv_scanner=$(tool osv-scanner)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
arguments=(scan source --config .github/osv-scanner.toml --format json --all-packages --output-file "$work/answer")
if [[ -n ${MODELFS_TEST_OSV_DATABASE:-} ]]; then
  # FOLDER/osv-scalibr/ECOSYSTEM/all.zip: the library below osv-scanner has a variable of its own.
  export OSV_SCALIBR_LOCAL_DB_CACHE_DIRECTORY=$MODELFS_TEST_OSV_DATABASE
  arguments+=(--offline)
fi
number=0
for bill in "$@"; do
  # Told by its name what it is. Files have no advisories; those about Debian name source packages.
  number=$((number + 1))
  jq '
    def property($name): first(.properties[]? | select(.name == $name).value);
    .components |= map(select(.purl // "" | test("^pkg:(cargo|deb)/"))
      | .name = (property("modelfs:source-name") // .name) | .version = (property("modelfs:source-version") // .version))
    ' "$bill" >"$work/$number.cdx.json"
  arguments+=(--lockfile "$work/$number.cdx.json")
done
rc=0
"$osv_scanner" "${arguments[@]}" 2>"$work/log" || rc=$?
# 0: nothing found. 1: something found, whose severity decides below. Anything else is no answer.
case $rc in
0 | 1) ;;
*)
  cat "$work/log" >&2
  if [[ -z ${MODELFS_TEST_OSV_DATABASE:-} ]] && grep -E 'dial tcp|no such host|connection refused|i/o timeout|TLS handshake|proxyconnect|api.osv.dev' "$work/log" >/dev/null; then
    exit "$NOT_HERE"
  fi
  die "osv-scanner ended with $rc"
  ;;
esac
# What was asked about must be what the bills list, or silence would pass for safety.
asked=$(jq '[.results[].packages[].package | "\(.name) \(.version)"] | unique | length' "$work/answer")
listed=$(jq -s '[.[].components[].purl | sub("\\?.*"; "")] | unique | length' "$work"/*.cdx.json)
[[ $listed -gt 0 && $asked -ge $listed ]] || die "osv-scanner looked at $asked packages, and the bills list $listed"
jq -r '
  [.results[].packages[] | .package as $package | (.groups // [])[]
    | {severity: (.max_severity // "" | if . == "" then null else tonumber end), ids: (.ids | join(", ")), package: "\($package.name) \($package.version)"}]
  | unique | sort_by(-(.severity // 11))[]
  | "\(if .severity == null or .severity >= 7 then "FAILS " else "noted " end) \(.severity // "unrated")  \(.package)  \(.ids)"
  ' "$work/answer" >"$work/findings"
cat "$work/findings"
if grep '^FAILS' "$work/findings" >/dev/null; then exit 1; fi
echo "$asked packages: nothing high or critical"
