#!/usr/bin/env bash
# Bills of materials, CycloneDX 1.5 in JSON.
#
#   .github/scripts/sbom.sh program FILE                     the crates of the program, with licences and hashes
#   .github/scripts/sbom.sh image PROGRAM-SBOM CONTEXT FILE  the image of docs/container: the program, and every other file of
#                                                            the context with the Debian package that it comes from
#
# The same input gives the same bytes. A file of the image that no package of this machine owns, and that is not one of the
# few which docs/container/rootfs.sh writes itself, is an error: nothing gets into the image unnamed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}

usage() { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }

program() { # FILE
  local made=modelfs-sbom-$$ cargo_cyclonedx
  cargo_cyclonedx=$(tool cargo-cyclonedx) || return
  # Written beside Cargo.toml, whatever the output.
  trap 'rm -f "'"$made"'.json"' EXIT
  "$cargo_cyclonedx" cyclonedx --quiet --format json --spec-version 1.5 --all --override-filename "$made" \
    --target "$(rustc -vV | sed -n 's/^host: //p')"
  # Where the checkout lies is nobody's matter, and would make another file of it on another machine.
  jq --sort-keys --arg here "$PWD" '
    walk(if type == "string" then gsub("path\\+file://" + $here; "path+file:///modelfs") | gsub("file://" + $here; "file:///modelfs") else . end)
    ' "$made.json" >"$1"
  rm -f "$made.json"
}

# owner PATH: the package that owns it, by either of its names where /lib is a link into /usr.
owner() {
  local path
  for path in "$1" "${1#/usr}" "/usr$1"; do dpkg-query -S "$path" 2>/dev/null | grep -v '^diversion' | sed -n '1s/: .*//p' | grep . && return; done
  return 1
}

# One line a file of the image: package or "-", SHA-256, path.
files_of() { # FOLDER
  local path hash package
  (cd "$1" && find . -type f -printf '/%P\n' | sort) | while read -r path; do
    hash=$(sha256sum "$1$path" | cut -d' ' -f1)
    case $path in
    # Not a package's file, but what a package made of those of its own.
    /etc/ssl/certs/ca-certificates.crt) package=ca-certificates ;;
    /usr/bin/modelfs | /etc/passwd | /etc/group | /etc/fuse.conf) package=- ;;
    *) package=$(owner "$path") || { echo "sbom.sh: $path of the image belongs to no package of this machine" >&2; return 1; } ;;
    esac
    printf '%s\t%s\t%s\n' "$package" "$hash" "$path"
  done
}

image() { # PROGRAM-SBOM CONTEXT FILE
  local work package distribution release
  work=$(mktemp -d)
  trap 'rm -rf "'"$work"'"' EXIT
  mkdir "$work/root"
  tar -C "$work/root" -xf "$2/system.tar" --no-same-owner
  files_of "$work/root" >"$work/files" || return 1
  # shellcheck source=/dev/null
  distribution=$(. /etc/os-release && echo "$ID") release=$(. /etc/os-release && echo "${VERSION_ID:-}")
  cut -f1 "$work/files" | grep -v '^-$' | sort -u | while read -r package; do
    # The source package is what advisories name.
    dpkg-query -W -f '${Package}\t${Version}\t${source:Package}\t${source:Version}\t${Architecture}\n' "$package"
  done >"$work/packages"
  jq --sort-keys --rawfile packages "$work/packages" --rawfile files "$work/files" --arg distribution "$distribution" --arg release "$release" '
    def lines: split("\n") | map(select(. != "") | split("\t"));
    . as $program
    | ($packages | lines | map({
        type: "library", name: .[0], version: .[1],
        "bom-ref": "deb:\(.[0])@\(.[1])",
        purl: "pkg:deb/\($distribution)/\(.[2] | @uri)@\(.[3] | @uri)?arch=source&distro=\($distribution)-\($release)",
        properties: [{name: "modelfs:architecture", value: .[4]}, {name: "modelfs:source-name", value: .[2]},
          {name: "modelfs:source-version", value: .[3]}]
      })) as $debian
    | ($files | lines | map({
        type: "file", name: .[2], "bom-ref": "file:\(.[2])", hashes: [{alg: "SHA-256", content: .[1]}],
        properties: [{name: "modelfs:from", value: (if .[0] == "-" then "modelfs" else .[0] end)}]
      })) as $files
    | .metadata.component = {
        type: "container", name: "modelfs", version: $program.metadata.component.version, "bom-ref": "image:modelfs",
        components: [$program.metadata.component]
      }
    | .components += $debian + $files
    | .dependencies += [{ref: "image:modelfs", dependsOn: ([$program.metadata.component["bom-ref"]] + ($debian | map(.["bom-ref"])))}]
    ' "$1" >"$3"
}

case ${1:-} in
program) [[ $# == 2 ]] || usage; program "$2" ;;
image) [[ $# == 4 ]] || usage; image "$2" "$3" "$4" ;;
*) usage ;;
esac
