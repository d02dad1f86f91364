#!/usr/bin/env bash
# What leaves this repository, and what is let into it: a release with its image is made, looked at, signed, and refused after
# every kind of change; the bills of materials are valid and whole; the checks for vulnerabilities, of each week, of two
# builds, and those before a commit are shown to fail.
#
#   tests/supply.sh      needs tests/parts/install.sh cargo-deny cargo-auditable cargo-cyclonedx cargo-deb supply actionlint
#                        osv-scanner docker, and root for the image
#
# The release is a trial one (release.sh --trial): the same scripts around a program that is compiled faster. What takes two
# whole builds (reproducible.sh) is run on a small program: whether two builds of modelfs are equal is seen each week, by
# .github/workflows/weekly.yaml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh
source .github/scripts/lib.sh

for part in cargo-auditable cargo-cyclonedx cargo-deb; do
  [[ -x $(compgen -G "$cache/$part-*/bin/$part" | head -1) ]] || { skip "supply chain" "$part is not installed"; finish; exit; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-supply.XXXXXX")
engine_pid=""
cleanup() {
  stop_engine || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
release=$work/release
verify() { bash .github/scripts/verify-release.sh "$@"; }
key() { openssl genpkey -algorithm "$2" -out "$1" "${@:3}" 2>/dev/null && openssl pkey -in "$1" -pubout -out "$1.pub"; }

# ---- What the checks are to find, since a check that never fails shows nothing.
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
weights() { # a safetensors file, by its structure and not by its name
  python3 -c '
import json, struct, sys
header = json.dumps({"w": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}}).encode()
sys.stdout.buffer.write(struct.pack("<Q", len(header)) + header + bytes(range(256)) * 64)'
}
has() { [[ -x $(compgen -G "$cache/$1-*/bin/$1" | head -1) ]]; } # TOOL
# ended EXIT WORDS COMMAND...: COMMAND ends with EXIT, and says WORDS.
ended() {
  local wanted=$1 words=$2 out rc=0
  shift 2
  out=$("$@" 2>&1) || rc=$?
  [[ $rc == "$wanted" && $out == *"$words"* ]] || { echo "exit $rc, wanted $wanted and '$words': $out"; return 1; }
}

# ---- A Docker engine of this test's own for the image; it has its own /run, and reaches no network.
start_engine() {
  mkdir -p "$work/docker-home"
  echo '{}' >"$work/docker-home/config.json"
  # shellcheck disable=SC2016
  unshare --mount --net --propagation private bash -c 'mount -t tmpfs tmpfs /run && exec "$@"' _ dockerd \
    --data-root "$work/docker" --exec-root "$work/exec" --pidfile "$work/docker.pid" -H "unix://$work/docker.sock" \
    --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false >>"$work/engine.log" 2>&1 &
  engine_pid=$!
  export DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/docker-home
  local end=$((SECONDS + 180))
  until docker version >/dev/null 2>&1; do
    { ((SECONDS < end)) && kill -0 "$engine_pid"; } || { tail -20 "$work/engine.log"; return 1; }
    sleep 0.3
  done
}
stop_engine() {
  [[ -n $engine_pid ]] || return 0
  local pid=$engine_pid end=$((SECONDS + 120))
  engine_pid=""
  kill "$pid" 2>/dev/null || return 0
  while kill -0 "$pid" 2>/dev/null; do ((SECONDS < end)) || { kill -9 "$pid"; return 1; }; sleep 0.2; done
}
image=()
if [[ $EUID == 0 ]] && command -v dockerd >/dev/null && command -v docker >/dev/null; then
  step "start a Docker engine for the image" start_engine
  if docker version >/dev/null 2>&1; then image=(--image); fi
else
  skip "the image of a release" "it needs root and a Docker engine"
fi

# ---- A release.
key "$work/key" ed25519
key "$work/other" ed25519
key "$work/rsa" rsa -pkeyopt rsa_keygen_bits:2048
make_release() { bash .github/scripts/release.sh --trial "${image[@]}" "$release" && cp -r "$release" "$work/unsigned"; }
step "a release is made by one command" make_release

# ---- It is looked at before it is signed: models in the image, crates that no bill names, known vulnerabilities.
inspected() { # EXIT WORDS DATABASE CHANGE...: what the look at a copy ends with, after CHANGE in it
  local exit=$1 words=$2 known=$3
  shift 3
  rm -rf "$work/looked-at"
  cp -r "$release" "$work/looked-at"
  (cd "$work/looked-at" && "$@")
  MODELFS_TEST_OSV_DATABASE=$known ended "$exit" "$words" bash .github/scripts/inspect-release.sh "$work/looked-at"
}
# The image as it would be if somebody's build had left a model in it, under a name that tells nothing.
model_in_image() {
  local tag
  tag=$(basename modelfs-image-*.tar .tar) && tag=modelfs:${tag#modelfs-image-}
  mkdir -p "$work/planted" && weights >"$work/planted/notes.txt"
  printf 'FROM %s\nCOPY notes.txt /usr/share/notes.txt\n' "$tag" >"$work/planted/Dockerfile"
  docker build --quiet -t modelfs:planted "$work/planted"
  docker save -o "modelfs-image-${tag#*:}.tar" modelfs:planted
}
crate_left_out() {
  local bill
  bill=$(compgen -G 'modelfs-[0-9]*.cdx.json')
  jq 'del(.components[] | select(.name == "fuser"))' "$bill" >less && mv less "$bill"
}
nothing_known=$work/database-nothing crate_known=$work/database-crate package_known=$work/database-package
if has osv-scanner && [[ -f $release/statement.json ]]; then
  database "$nothing_known" crates.io no-such-crate $critical
  database "$crate_known" crates.io fuser $critical
  database "$package_known" Debian:12 glibc $critical
  step "a release in which nothing is wrong is let through" inspected 0 "nothing high or critical" "$nothing_known" true
  step "one with a crate that is known to be vulnerable is stopped" inspected 1 "FAILS  9.8  fuser" "$crate_known" true
  step "one with a crate that no bill names is stopped" inspected 1 "fuser 0" "$nothing_known" crate_left_out
  if [[ ${#image[@]} -gt 0 ]]; then
    step "one with a vulnerable package in its image is stopped" inspected 1 "FAILS  9.8  glibc" "$package_known" true
    step "one with a model in its image is stopped" inspected 26 "usr/share/notes.txt" "$nothing_known" model_in_image
  fi
  # What is known may change between two weeks, and what the image is made of.
  weekly() { MODELFS_TEST_OSV_DATABASE=$1 bash .github/scripts/weekly.sh; } # DATABASE
  step "the look of each week ends well where nothing is known" ended 0 "nothing high or critical" weekly "$nothing_known"
  step "the look of each week fails once something is known" ended 1 "FAILS  9.8  fuser" weekly "$crate_known"
else
  skip "the look at a release, and that of each week" "osv-scanner is not installed, or there is no release"
fi
step "the Docker engine ends" stop_engine
step "and signed by another" bash .github/scripts/sign-release.sh --key "$work/key" "$release"
[[ -f $release/MANIFEST ]] || { finish; exit; }
version=$(sed -n 's/^version //p' "$release/MANIFEST")
program=$release/modelfs-$version-$(sed -n 's/^target //p' "$release/MANIFEST")
bill=$release/modelfs-$version.cdx.json

step "it is verified by its public key" verify "$release" "$work/key.pub" --trial
# As somebody who has never verified one.
verified_as_the_page_says() {
  local page=$work/page/SECURITY.md
  mkdir -p "$work/page" "$work/nobody"
  sed "s|FOLDER release.pub |'$release' '$work/key.pub' --trial |" SECURITY.md >"$page"
  HOME=$work/nobody run_page_block "$page" verify-release && grep "^$version " "$work/nobody/.config/modelfs/release-floor"
}
step "it is verified as SECURITY.md says" verified_as_the_page_says
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
}
step "a release is not made of changes, nor under another tag" release_wants_a_clean_tagged_commit
# As for whoever downloads it, there must be somebody to write to, and a key that they had before.
release_wants_maintainers() {
  local clone=$work/clone-of-a-commit
  no_release() { # WORDS: of what the clone holds now, committed
    git -C "$clone" add --all
    git -C "$clone" -c user.name=t -c user.email=t@t.example -c commit.gpgsign=false commit --quiet --allow-empty --message=x
    ended 1 "$1" bash "$clone/.github/scripts/release.sh" --tag "v$version" "$work/never"
    [[ ! -e $work/never ]]
  }
  # Once they are set here, the first of these has them again.
  sed -i 's/[a-z]*@[a-z0-9.-]*\.[a-z]*/maintainers@modelfs.example/' "$clone/SECURITY.md"
  no_release "address is still a placeholder"
  sed -i 's/@modelfs\.example/@modelfs.test/' "$clone"/{SECURITY.md,Cargo.toml,systemd/debian/changelog}
  rm -f "$clone/.github/release.pub"
  no_release "release.pub is no Ed25519 public key"
  cp "$work/rsa.pub" "$clone/.github/release.pub"
  no_release "release.pub is no Ed25519 public key"
  rm -rf "$clone"
}
step "a release is not made without an address of maintainers and a release key" release_wants_maintainers
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

# ---- Two builds of one commit, of a small program with C in it: the same steps as for modelfs, in seconds.
small_program() { # MAIN: a repository with it
  local folder=$work/small
  rm -rf "$folder"
  mkdir -p "$folder/src" "$folder/.github" "$folder/.cargo"
  cp -r .github/scripts "$folder/.github/"
  printf '%s\n' '[package]' 'name = "modelfs"' 'version = "0.1.0"' 'edition = "2021"' '[build-dependencies]' 'cc = "1"' \
    >"$folder/Cargo.toml"
  printf '%s\n' '[source.crates-io]' 'replace-with = "vendored"' '[source.vendored]' 'directory = "vendor"' >"$folder/vendor.toml"
  # Where its C file lies is in the program, if nothing takes it out.
  cat >"$folder/build.rs" <<'RUST'
fn main() {
    let file = std::path::Path::new(&std::env::var_os("OUT_DIR").unwrap()).join("place.c");
    std::fs::write(&file, "const char *place(void) { return __FILE__; }").unwrap();
    cc::Build::new().file(file).compile("place");
}
RUST
  echo "$1" >"$folder/src/main.rs"
  # The crate cc from what was fetched for modelfs: no registry is asked.
  (cd "$folder" && cargo vendor --quiet --offline vendor && mv vendor.toml .cargo/config.toml &&
    git init -q -b main && git add --all --force &&
    git -c user.name=t -c user.email=t@t.example -c commit.gpgsign=false commit -q -m start)
}
# With an empty folder for Cargo, so that nobody's whole registry is copied for it.
built_twice() { CARGO_HOME=$work/no-cargo bash "$work/small/.github/scripts/reproducible.sh"; }
place='std::ffi::CStr::from_ptr(place()).to_str().unwrap()'
place="extern \"C\" { fn place() -> *const std::ffi::c_char; } fn main() { let place = unsafe { $place };"
equal_builds() { small_program "$place println!(\"{place} {}\", file!()); }" && ended 0 "the same program, twice" built_twice; }
other_builds() {
  small_program "$place println!(\"{place} {}\", env!(\"CARGO_MANIFEST_DIR\")); }" && ended 1 "differ" built_twice
}
build_of_changes() { echo >>"$work/small/src/main.rs" && ended 1 "this checkout has changes" built_twice; }
step "two builds of one commit, in other folders, are found to be the same" equal_builds
step "two builds that differ by the folder they were made in are found to differ" other_builds
step "two builds of a checkout with changes are not compared" build_of_changes

# ---- Nothing that a workflow calls is run there for the first time.
workflow_scripts_are_run() {
  local script missing=0
  grep -ohE '\.github/scripts/[a-z-]+\.sh' .github/workflows/*.yaml | sort -u >"$work/called"
  [[ $(wc -l <"$work/called") -ge 6 ]] || { cat "$work/called"; return 1; }
  while read -r script; do
    grep -E "^[^#]*bash [^ ]*$script" tests/*.sh >/dev/null || { echo "no test runs $script"; missing=1; }
  done <"$work/called"
  return $missing
}
step "every script that a workflow calls is run by a test" workflow_scripts_are_run

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

# ---- Known vulnerabilities, in databases of this test.
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
if has osv-scanner; then
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
if has cargo-deny; then
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
