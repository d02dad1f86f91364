#!/usr/bin/env bash
# What leaves this repository, and what is let into it: a release is made, signed, and refused after every kind of change; the
# bills of materials are valid and whole; the checks for vulnerabilities, and those before a commit, are shown to fail.
#
#   tests/supply.sh      needs tests/parts/install.sh cargo-deny cargo-auditable cargo-cyclonedx cargo-deb supply actionlint
#                        osv-scanner
#
# The release is a trial one (release.sh --trial): the same scripts around a program that is compiled faster.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source .github/scripts/lib.sh

for part in cargo-auditable cargo-cyclonedx cargo-deb; do
  [[ -x $(compgen -G "$cache/$part-*/bin/$part" | head -1) ]] || { skip "supply chain" "$part is not installed"; finish; exit; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-supply.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
release=$work/release
verify() { bash .github/scripts/verify-release.sh "$@"; }
key() { openssl genpkey -algorithm "$2" -out "$1" "${@:3}" 2>/dev/null && openssl pkey -in "$1" -pubout -out "$1.pub"; }

# ---- A release.
key "$work/key" ed25519
key "$work/other" ed25519
key "$work/rsa" rsa -pkeyopt rsa_keygen_bits:2048
make_release() { bash .github/scripts/release.sh --trial "$release" && cp -r "$release" "$work/unsigned"; }
step "a release is made by one command" make_release
step "and signed by another" bash .github/scripts/sign-release.sh --key "$work/key" "$release"
[[ -f $release/MANIFEST ]] || { finish; exit; }
version=$(sed -n 's/^version //p' "$release/MANIFEST")
program=$release/modelfs-$version-$(sed -n 's/^target //p' "$release/MANIFEST")
bill=$release/modelfs-$version.cdx.json

step "it is verified by its public key" verify "$release" "$work/key.pub" --trial
key_from_the_environment() {
  RELEASE_SIGNING_KEY=$(cat "$work/key") bash -c '
    set -euo pipefail
    source <(sed -n "/^private()/,/^}/p" .github/scripts/sign-release.sh)
    key=env:
    sign "$1/MANIFEST"' _ "$release" | cmp - "$release/MANIFEST.sig"
}
step "the key may come by the environment, and signs the same" key_from_the_environment
release_wants_a_clean_tagged_commit() {
  local clone=$work/clone-of-a-commit out
  git clone --quiet --no-hardlinks . "$clone"
  cp -r .github Cargo.toml Cargo.lock "$clone/"
  git -C "$clone" -c user.name=t -c user.email=t@t.example -c commit.gpgsign=false commit --quiet --allow-empty --all --message=x
  git -C "$clone" clean -fdq -e .github
  (cd "$clone" && git add --all && git -c user.name=t -c user.email=t@t.example commit --quiet --allow-empty --message=y)
  out=$(bash "$clone/.github/scripts/release.sh" --tag v99.0.0 "$work/never" 2>&1) && return 1
  [[ $out == *"the tag is 'v99.0.0'"* ]] || { echo "$out"; return 1; }
  echo change >>"$clone/README.md"
  out=$(bash "$clone/.github/scripts/release.sh" --tag "v$version" "$work/never" 2>&1) && return 1
  [[ $out == *"this checkout has changes"* && ! -e $work/never ]] || { echo "$out"; return 1; }
  rm -rf "$clone"
}
step "a release is not made of changes, nor under another tag" release_wants_a_clean_tagged_commit
signs_nothing_else() {
  local out
  out=$(bash .github/scripts/sign-release.sh --key "$work/rsa" "$work/unsigned" 2>&1) && return 1
  [[ $out == *"not an Ed25519 private key"* ]] || { echo "$out"; return 1; }
  out=$(bash .github/scripts/sign-release.sh --key "$work/key" "$release" 2>&1) && return 1
  [[ $out == *"is signed already"* ]] || { echo "$out"; return 1; }
  echo x >"$work/unsigned/extra"
  out=$(bash .github/scripts/sign-release.sh --key "$work/key" "$work/unsigned" 2>&1) && return 1
  [[ $out == *extra*"is not what its statement says was built"* && ! -e $work/unsigned/MANIFEST ]] || { echo "$out"; return 1; }
  rm -rf "$work/unsigned"
}
step "nothing else is signed: no other kind of key, no second time, no file that was not built" signs_nothing_else

# refused WORDS COMMAND [ARGUMENT...]: after COMMAND has changed a copy of the release, it is refused with WORDS.
refused() {
  local words=$1 out rc=0
  shift
  rm -rf "$work/copy"
  cp -r "$release" "$work/copy"
  (cd "$work/copy" && "$@")
  out=$(verify "$work/copy" "$work/key.pub" --trial 2>&1) || rc=$?
  [[ $rc == 1 && $out == *REFUSED*"$words"* ]] || { echo "exit $rc: $out"; return 1; }
}
# In a byte that random chooses; told, so that a failure can be repeated.
flip() {
  local size at
  size=$(stat -c %s "$1")
  at=$((SRANDOM % size))
  echo "byte $at of $1"
  python3 - "$1" "$at" <<'PYTHON'
import sys
with open(sys.argv[1], "r+b") as file:
    file.seek(int(sys.argv[2]))
    byte = file.read(1)[0]
    file.seek(int(sys.argv[2]))
    file.write(bytes([byte ^ 1]))
PYTHON
}
every_flipped_byte() {
  local file
  for file in "$release"/*; do
    file=${file##*/}
    case $file in
    MANIFEST | MANIFEST.sig) refused "was not signed by" flip "$file" ;;
    *) refused "$file is not the file that was signed" flip "$file" ;;
    esac || return 1
  done
}
swapped() { mv "${program##*/}" x && mv "modelfs_$version"-1_*.deb "${program##*/}" && mv x "modelfs_$version-1_amd64.deb"; }
relink() { mv "$1" "$work/elsewhere" && ln -s "$work/elsewhere" "$1"; }
rename_in_manifest() { sed -i "s/ ${bill##*/}$/ renamed.json/" MANIFEST && mv "${bill##*/}" renamed.json; }
resigned() { openssl pkeyutl -sign -rawin -inkey "$work/other" -in MANIFEST -out MANIFEST.sig; }
step "a flipped byte of any file is refused" every_flipped_byte
step "two files swapped are refused" refused "bytes" swapped
step "a missing file is refused" refused "is missing" rm "${bill##*/}"
step "a file cut short is refused" refused "bytes" truncate -s -1 "${bill##*/}"
step "a file that nobody signed is refused" refused "nobody signed it" touch extra
step "a link in place of a file is refused" refused "no plain file" relink "${bill##*/}"
step "a name changed in the manifest is refused" refused "was not signed by" rename_in_manifest
step "a missing signature is refused" refused "MANIFEST.sig is not there" rm MANIFEST.sig
step "an empty signature is refused" refused "was not signed by" truncate -s 0 MANIFEST.sig
step "the signature of another key is refused" refused "was not signed by" resigned
refused_by() { # KEY WORDS [OPTION...]
  local out rc=0
  out=$(verify "$release" "$1" "${@:3}" 2>&1) || rc=$?
  [[ $rc == 1 && $out == *REFUSED*"$2"* ]] || { echo "exit $rc: $out"; return 1; }
}
step "another key accepts nothing" refused_by "$work/other.pub" "was not signed by" --trial
step "nor does a key of another kind" refused_by "$work/rsa.pub" "not an Ed25519 public key" --trial
step "a trial is no release" refused_by "$work/key.pub" "this is a trial"

# signed FOLDER SED...: a copy with another manifest, signed by the very key; what only a careful reader refuses.
signed() {
  rm -rf "$1"
  cp -r "$release" "$1"
  sed -i "${@:2}" "$1/MANIFEST"
  openssl pkeyutl -sign -rawin -inkey "$work/key" -in "$1/MANIFEST" -out "$1/MANIFEST.sig"
}
strict() {
  local change out
  for change in '2d' '2s/.*/version 1.0/' '3s/.*/kind other/' '$s/^file \(.*\) \(.*\) .*/file \1 \2 ..\/x/' '$p' '$s/.*/file x/' '1s/1$/2/' '6,$d'; do
    signed "$work/careless" "$change"
    out=$(verify "$work/careless" "$work/key.pub" --trial 2>&1) && { echo "accepted: $change"; return 1; }
    [[ $out == *REFUSED*MANIFEST* ]] || { echo "$change: $out"; return 1; }
  done
}
step "a signed manifest that is not well-formed is refused" strict
floor() {
  local out floor=$work/floor
  signed "$work/older" '2s/.*/version 0.0.9/'
  signed "$work/newer" '2s/.*/version 0.10.0/'
  signed "$work/twice" '4s/.*/commit 0000000000000000000000000000000000000000/'
  verify "$release" "$work/key.pub" --trial --floor "$floor" && verify "$release" "$work/key.pub" --trial --floor "$floor" || return 1
  out=$(verify "$work/older" "$work/key.pub" --trial --floor "$floor" 2>&1) && { echo "an older one was accepted"; return 1; }
  [[ $out == *"a release was put back"* ]] || { echo "$out"; return 1; }
  out=$(verify "$work/twice" "$work/key.pub" --trial --floor "$floor" 2>&1) && { echo "another one of this version was accepted"; return 1; }
  [[ $out == *"was signed twice"* ]] || { echo "$out"; return 1; }
  verify "$work/newer" "$work/key.pub" --trial --floor "$floor" || return 1
  ! verify "$release" "$work/key.pub" --trial --floor "$floor" 2>/dev/null || return 1
  echo rubbish >"$floor"
  ! verify "$work/newer" "$work/key.pub" --trial --floor "$floor" 2>/dev/null
}
step "with a floor an older release is refused, and another one of the same version" floor

# ---- Provenance, by other eyes than those that wrote it.
provenance() {
  local file=$release/modelfs-$version.intoto.jsonl
  jq -r .payload "$file" | base64 -d >"$work/statement"
  jq -r '.signatures[0].sig' "$file" | base64 -d >"$work/statement.sig"
  python3 - "$file" "$work/envelope" <<'PYTHON' || return 1
import base64, json, sys
envelope = json.load(open(sys.argv[1]))
kind, payload = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"], validate=True)
open(sys.argv[2], "wb").write(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
PYTHON
  openssl pkeyutl -verify -rawin -pubin -inkey "$work/key.pub" -in "$work/envelope" -sigfile "$work/statement.sig" || return 1
  # Each file that the manifest names, but the provenance itself, and by the same hash.
  diff <(jq -r '.subject[] | "\(.digest.sha256) \(.name)"' "$work/statement" | sort) \
    <(sed -n 's/^file \([0-9a-f]*\) [0-9]* \(.*\)/\1 \2/p' "$release/MANIFEST" | grep -v intoto | sort) || return 1
  jq -e --arg commit "$(git rev-parse HEAD)" --arg lock "$(sha256sum Cargo.lock | cut -d' ' -f1)" '
    ._type == "https://in-toto.io/Statement/v1" and .predicateType == "https://slsa.dev/provenance/v1"
    and .predicate.buildDefinition.resolvedDependencies[0].digest.gitCommit == $commit
    and .predicate.buildDefinition.resolvedDependencies[1].digest.sha256 == $lock
    and (.predicate.runDetails.builder.id | length > 0)' "$work/statement" >/dev/null
}
step "the provenance is signed, and names every file, the commit and Cargo.lock" provenance

# ---- Bills of materials.
valid_bill() {
  "$cache/supply/bin/python" - "$@" <<'PYTHON'
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
validator = JsonStrictValidator(SchemaVersion.V1_5)
assert validator.validate_str('{"bomFormat": "CycloneDX", "specVersion": "1.5", "surprise": 1}'), "the validator accepts everything"
for name in sys.argv[1:]:
    error = validator.validate_str(open(name).read())
    if error:
        sys.exit(f"{name}: {error}")
PYTHON
}
image_bill() {
  bash docs/container/rootfs.sh "$program" "$work/image" && bash .github/scripts/sbom.sh image "$bill" "$work/image" "$work/image.cdx.json"
}
same_image() {
  local again=$work/image-again
  SOURCE_DATE_EPOCH=1700000000 bash docs/container/rootfs.sh "$program" "$again-1" && sleep 1.1 &&
    SOURCE_DATE_EPOCH=1700000000 bash docs/container/rootfs.sh "$program" "$again-2" && diff -r "$again-1" "$again-2" && rm -rf "$again-1" "$again-2"
}
step "the same program gives the same image" same_image
step "the image's bill of materials is made from what is in it" image_bill
# One of both: it holds the whole other one, and the validator takes 20 s for each.
step "the bill of the image, and of the program in it, is valid CycloneDX 1.5" valid_bill "$work/image.cdx.json"
step "the program carries its crates, and the bill has them all" bash .github/scripts/bill-is-whole.sh "$program" "$bill"
packaged() {
  dpkg-deb -x "$release"/modelfs_"$version"-1_*.deb "$work/deb" && bash .github/scripts/bill-is-whole.sh "$work/deb/usr/bin/modelfs" "$bill"
}
step "the packaged program still carries them" packaged
incomplete() {
  local out
  jq 'del(.components[] | select(.name == "fuser"))' "$bill" >"$work/less"
  out=$(bash .github/scripts/bill-is-whole.sh "$program" "$work/less" 2>&1) && return 1
  [[ $out == *"fuser 0"* ]] || { echo "$out"; return 1; }
  jq '.components += [{type: "library", name: "fuser", version: "99.0.0", purl: "pkg:cargo/fuser@99.0.0"}]' "$bill" >"$work/more"
  out=$(bash .github/scripts/bill-is-whole.sh "$program" "$work/more" 2>&1) && return 1
  [[ $out == *"fuser 99.0.0"* ]] || { echo "$out"; return 1; }
}
step "a crate left out of the bill, or invented, is named" incomplete
same_bill() { bash .github/scripts/sbom.sh program "$work/again" && cmp "$bill" "$work/again"; }
step "the same commit gives the same bill" same_bill
foreign_file() {
  local out
  mkdir "$work/foreign" && tar -C "$work/foreign" -xf "$work/image/system.tar" && echo x >"$work/foreign/usr/bin/helper"
  mkdir "$work/foreign-image" && tar -C "$work/foreign" -cf "$work/foreign-image/system.tar" .
  out=$(bash .github/scripts/sbom.sh image "$bill" "$work/foreign-image" "$work/never" 2>&1) && return 1
  [[ $out == *"/usr/bin/helper of the image belongs to no package"* ]] || { echo "$out"; return 1; }
}
if command -v dpkg-query >/dev/null; then
  step "a file of the image that no package owns is refused" foreign_file
fi

# ---- Known vulnerabilities: databases made here, since a check that never fails shows nothing.
database() { # FOLDER ECOSYSTEM PACKAGE SCORE-OR-EMPTY: one advisory about every version of it
  python3 - "$@" <<'PYTHON'
import json, sys, zipfile
from pathlib import Path
folder, ecosystem, package, vector = sys.argv[1:]
advisory = {
    "schema_version": "1.6.0", "id": "RUSTSEC-2099-0001", "modified": "2099-01-01T00:00:00Z", "published": "2099-01-01T00:00:00Z",
    "summary": "made by a test", "details": "made by a test",
    "affected": [{"package": {"ecosystem": ecosystem, "name": package},
                  "ranges": [{"type": "SEMVER" if ecosystem == "crates.io" else "ECOSYSTEM", "events": [{"introduced": "0"}]}]}],
}
if vector:
    advisory["severity"] = [{"type": "CVSS_V3", "score": vector}]
# Both are asked, so both must be there; what is about the other one is about nothing we have.
for name in ("crates.io", "Debian"):
    about = advisory if ecosystem.split(":")[0] == name else advisory | {"id": "RUSTSEC-2099-0002", "affected": [
        {"package": {"ecosystem": name if name != "Debian" else "Debian:12", "name": "no-such-package"}, "versions": ["1"]}]}
    path = Path(folder) / "osv-scalibr" / name / "all.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(about["id"] + ".json", json.dumps(about))
PYTHON
}
critical=CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H low=CVSS:3.1/AV:L/AC:H/PR:H/UI:R/S:U/C:L/I:N/A:N
vulnerable() { # EXIT WORDS ECOSYSTEM PACKAGE VECTOR
  local out rc=0
  rm -rf "$work/database"
  database "$work/database" "$3" "$4" "$5"
  out=$(MODELFS_TEST_OSV_DATABASE=$work/database bash .github/scripts/vulnerabilities.sh "$work/image.cdx.json" 2>&1) || rc=$?
  [[ $rc == "$1" && $out == *$2* ]] || { echo "exit $rc, wanted $1: $out"; return 1; }
}
nothing_asked() {
  local out rc=0
  jq '.components = []' "$bill" >"$work/empty"
  out=$(MODELFS_TEST_OSV_DATABASE=$work/database bash .github/scripts/vulnerabilities.sh "$work/empty" 2>&1) || rc=$?
  [[ $rc == 1 ]] || { echo "exit $rc: $out"; return 1; }
}
no_database() {
  local out rc=0
  out=$(MODELFS_TEST_OSV_DATABASE=$work/nowhere bash .github/scripts/vulnerabilities.sh "$bill" 2>&1) || rc=$?
  [[ $rc == 1 ]] || { echo "exit $rc: $out"; return 1; }
}
if [[ -x $(compgen -G "$cache/osv-scanner-*/bin/osv-scanner" | head -1) ]]; then
  step "a critical advisory about a crate fails" vulnerable 1 "FAILS  9.8  fuser" crates.io fuser $critical
  step "one about a Debian package of the image fails" vulnerable 1 "FAILS  9.8  glibc" Debian:12 glibc $critical
  step "a low one is noted" vulnerable 0 "noted  1.8  fuser" crates.io fuser $low
  step "one that nobody has rated fails" vulnerable 1 "FAILS  unrated  fuser" crates.io fuser ""
  step "one about something else is nothing" vulnerable 0 "nothing high or critical" crates.io no-such-crate $critical
  step "a bill without packages is no good news" nothing_asked
  step "no database is no good news" no_database
  live_vulnerabilities() { bash .github/scripts/vulnerabilities.sh "$work/image.cdx.json"; }
  try_step "nothing in the image is known to be vulnerable" "osv.dev cannot be reached from here" live_vulnerabilities
else
  skip "known vulnerabilities of the image" "osv-scanner is not installed"
fi
# cargo-deny's own gate, with an advisory database that is a git repository of this test.
advisories() { # EXIT CRATE
  local folder=$work/advisories-$2 rc=0
  mkdir -p "$folder/db/crates/$2"
  cat >"$folder/db/crates/$2/RUSTSEC-2099-0003.md" <<END
\`\`\`toml
[advisory]
id = "RUSTSEC-2099-0003"
package = "$2"
date = "2026-01-01"
[versions]
patched = []
\`\`\`
# Made by a test
Nothing is wrong.
END
  (cd "$folder/db" && git init -q -b main && git add --all && git -c user.name=t -c user.email=t@t.example commit -q -m x)
  # A name that only git's own table of names leads to: cargo-deny wants an address with a host.
  local address=https://advisories.test/db
  sed "s|^\[advisories\]|&\ndb-path = \"$folder/clones\"\ndb-urls = [\"$address\"]|; s/^yanked = .*/yanked = \"allow\"/" deny.toml >"$folder/deny.toml"
  GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=url.file://$folder/db.insteadOf GIT_CONFIG_VALUE_0=$address \
    MODELFS_TEST_DENY_CONFIG=$folder/deny.toml bash .github/scripts/check.sh advisories >"$folder/log" 2>&1 || rc=$?
  [[ $rc == "$1" ]] || { cat "$folder/log"; echo "exit $rc, wanted $1"; return 1; }
  [[ $1 == 0 ]] || grep RUSTSEC-2099-0003 "$folder/log" >/dev/null
}
if [[ -x $(compgen -G "$cache/cargo-deny-*/bin/cargo-deny" | head -1) ]]; then
  step "an advisory about a crate of ours fails the check of advisories" advisories 1 fuser
  step "one about another crate does not" advisories 0 no-such-crate
else
  skip "the check of advisories" "cargo-deny is not installed"
fi

# ---- Before a commit: the hooks pass here, and each of them stops what it is for.
clone=$work/clone
make_clone() {
  git clone --quiet --no-hardlinks . "$clone" && git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents -t "$clone" 2>/dev/null || true
  cd "$clone" && git add --all && git -c user.name=t -c user.email=t@t.example commit --quiet --allow-empty --message=start && cd - >/dev/null
}
# In the clone; clippy and licences are steps of tests/run.sh.
hooks() { # [OPTION...]
  (cd "$clone" && git add --all && MODELFS=$modelfs SKIP=clippy,licences "$cache/supply/bin/pre-commit" run --color never "$@")
}
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
stopped() { # HOOK FILE: by this hook and no other, after FILE was written from standard input
  local out rc=0
  mkdir -p "$clone/$(dirname "$2")"
  cat >"$clone/$2"
  out=$(hooks --files "$2" 2>&1) || rc=$?
  (cd "$clone" && git reset --quiet --hard && git clean -fdq)
  [[ $rc == 1 && $(grep -c 'Failed$' <<<"$out") == 1 && $(grep 'Failed$' <<<"$out") == "$1"* ]] || { echo "exit $rc: $out"; return 1; }
}
weights() { # a safetensors file, by its structure and not by its name
  python3 -c '
import json, struct, sys
header = json.dumps({"w": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}}).encode()
sys.stdout.buffer.write(struct.pack("<Q", len(header)) + header + bytes(range(256)) * 64)'
}
unpinned() { sed 's/@[0-9a-f]\{40\} # v\([0-9]*\).*/@v\1/' .github/workflows/ci.yaml; }
if [[ -f $cache/supply/complete && -x $modelfs ]]; then
  step "a clone for the hooks" make_clone
  step "the hooks pass on what is committed" hooks --all-files
  step "a script with a mistake is stopped" stopped shellcheck tests/bad.sh <<<$'#!/bin/bash\nunused=1\nrm -rf $1/*\n[ $1 == x ] && cd $2'
  step "code that is not formatted is stopped" stopped "cargo fmt" src/main.rs <<<'fn main( ) {}'
  step "an action named by a tag is stopped" stopped workflows .github/workflows/ci.yaml < <(unpinned)
  step "a workflow that is none is stopped" stopped workflows .github/workflows/new.yaml <<<$'name: x\non: push\njobs:\n  a:\n    runs-on: ubuntu-24.04\n    steps: [{rum: x}]'
  step "a private key is stopped" stopped "keys, large" notes.txt < <(openssl genrsa 2>/dev/null | openssl rsa -traditional 2>/dev/null || cat "$work/rsa")
  step "a large file is stopped" stopped "keys, large" big.bin < <(head -c 700000 /dev/urandom)
  step "broken YAML is stopped" stopped "keys, large" docs/x.yaml <<<'a: [1'
  step "model weights are stopped" stopped "model weights" docs/picture.png < <(weights)
else
  skip "pre-commit" "the part supply or the release build is missing"
fi
finish
