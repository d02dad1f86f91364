#!/usr/bin/env bash
# Makes the files of a release in FOLDER, which must not exist. It runs what others wrote (build scripts of crates), so it has
# no key: sign-release.sh signs, elsewhere.
#
#   .github/scripts/release.sh [--trial] [--image] [--tag vVERSION] FOLDER
#
#   modelfs-VERSION-TARGET        the program, with the list of its crates inside
#   modelfs_VERSION-1_ARCH.deb    the Debian package
#   modelfs-VERSION.cdx.json      bill of materials of the program
#   modelfs-image-VERSION.tar     with --image: the container image, as `docker load` takes it (needs a Docker engine and root),
#   modelfs-image-VERSION.cdx.json  and its bill of materials
#   statement.json                provenance, not yet signed: SLSA 1.0 in an in-toto statement, with the hash of each file above
#
# A release is of a commit, whole and without changes, under a tag that is its version; and of one whose maintainers can be
# reached and have a release key (SECURITY.md, "Before the first release"). --trial asks for none of it, and the manifest says
# so; verify-release.sh refuses a trial unless it is asked for one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source .github/scripts/lib.sh

kind=release tag="" image=""
while [[ $# -gt 1 ]]; do
  case $1 in
  --trial) kind=trial ;;
  --image) image=1 ;;
  --tag) tag=$2; shift ;;
  *) break ;;
  esac
  shift
done
[[ $# == 1 && $1 != -* ]] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
out=$1
version=$(manifest_value version)
commit=$(git rev-parse HEAD)
target=$(rustc -vV | sed -n 's/^host: //p')
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
umask 022

[[ ! -e $out ]] || die "$out is there already; a release is made in a folder of its own"
if [[ $kind == release ]]; then
  [[ -z $(git status --porcelain) ]] || die "this checkout has changes; a release is of a commit (--trial tries the script)"
  [[ $tag == "v$version" ]] || die "the tag is '$tag', and Cargo.toml says version $version: --tag v$version"
  # .example is nobody's (RFC 2606).
  if grep -HnE '@[a-z0-9.-]*\.example\b' SECURITY.md Cargo.toml systemd/debian/changelog >&2; then
    die "the maintainers' address is still a placeholder (SECURITY.md, \"Before the first release\")"
  fi
  openssl pkey -pubin -in .github/release.pub -noout -text 2>/dev/null | grep '^ED25519 Public-Key' >/dev/null ||
    die ".github/release.pub is no Ed25519 public key (SECURITY.md, \"Before the first release\")"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/out"
began=$(date -u +%FT%TZ)

# ---- The program, its list of crates, and the bill of materials.
trial=() fast=()
[[ $kind == release ]] || { trial=(--trial); fast=(--fast); }
bash .github/scripts/build.sh "${trial[@]}" "$work/build"
install -m 755 "$work/build/modelfs" "$work/out/modelfs-$version-$target"
bash .github/scripts/embedded.sh "$work/build/modelfs" >/dev/null
bash .github/scripts/sbom.sh program "$work/out/modelfs-$version.cdx.json"

# ---- The package, around this very program.
bash .github/scripts/package.sh "${fast[@]}" "$work/build/modelfs" "$work/out"

# ---- The image.
if [[ -n $image ]]; then
  bash docs/container/rootfs.sh "$work/build/modelfs" "$work/image"
  docker build --quiet -t "modelfs:$version" -f docs/container/Dockerfile "$work/image"
  docker save -o "$work/out/modelfs-image-$version.tar" "modelfs:$version"
  chmod 644 "$work/out/modelfs-image-$version.tar"
  bash .github/scripts/sbom.sh image "$work/out/modelfs-$version.cdx.json" "$work/image" "$work/out/modelfs-image-$version.cdx.json"
fi

# ---- Provenance: what was built, from what, by whom.
subjects() { (cd "$work/out" && sha256sum -- *) | jq -R 'split("  ") | {name: .[1], digest: {sha256: .[0]}}' | jq -s .; }
jq -n --sort-keys --argjson subjects "$(subjects)" \
  --arg commit "$commit" --arg source "$(manifest_value repository)" --arg lock "$(sha256sum Cargo.lock | cut -d' ' -f1)" \
  --arg kind "$kind" --arg version "$version" --arg target "$target" --arg rustc "$(rustc -V)" --arg cargo "$(cargo -V)" \
  --arg builder "${RELEASE_BUILDER:-by hand}" --arg run "${RELEASE_BUILD_RUN:-}" --arg began "$began" --arg ended "$(date -u +%FT%TZ)" '
  {
    _type: "https://in-toto.io/Statement/v1",
    subject: $subjects,
    predicateType: "https://slsa.dev/provenance/v1",
    predicate: {
      buildDefinition: {
        buildType: "https://modelfs.example/release/v1",
        externalParameters: {version: $version, kind: $kind, target: $target},
        internalParameters: {rustc: $rustc, cargo: $cargo},
        resolvedDependencies: [
          {uri: "git+\(if $source == "" then "modelfs" else $source end)", digest: {gitCommit: $commit}},
          {uri: "Cargo.lock", digest: {sha256: $lock}}
        ]
      },
      runDetails: {
        builder: {id: $builder},
        metadata: ({startedOn: $began, finishedOn: $ended} + (if $run == "" then {} else {invocationId: $run} end))
      }
    }
  }' >"$work/statement"
mv "$work/statement" "$work/out/statement.json"
chmod 644 "$work"/out/*
chmod 755 "$work/out/modelfs-$version-$target"
mv "$work/out" "$out"
echo "$out: version $version ($kind) of commit $commit, to be signed"
