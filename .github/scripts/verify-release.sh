#!/usr/bin/env bash
# Whether the files of a release are what the holder of the release key signed, all of them, and no older than before.
#
#   verify-release.sh FOLDER PUBLIC-KEY [--floor FILE] [--trial]
#
# FOLDER holds MANIFEST, MANIFEST.sig and the files it names: any subset will not do, and no file beside them either.
# PUBLIC-KEY is a PEM file that you have from somewhere other than the release.
#
# --floor FILE   refuses a version lower than the highest one verified before, and another manifest of the same version;
#                remembers this one. Without it an older release, genuine at its time, is accepted: its version is printed.
# --trial        a trial of the release script is accepted as well.
#
# Ends with 0 and the version, or with 1 and the reason. Needs openssl 3 and coreutils; it stands alone, take it from the
# repository or read it first. What may write to FOLDER afterwards can still change it: verify a copy of your own.
set -euo pipefail

refuse() { echo "REFUSED: $*" >&2; exit 1; }
folder="" key="" floor="" trial=""
while [[ $# -gt 0 ]]; do
  case $1 in
  --floor) [[ $# -ge 2 ]] || refuse "--floor needs a file"; floor=$2; shift ;;
  --trial) trial=1 ;;
  -*) folder="" key=""; break ;;
  *) if [[ -z $folder ]]; then folder=$1; elif [[ -z $key ]]; then key=$1; else folder=""; break; fi ;;
  esac
  shift
done
[[ -n $folder && -n $key ]] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }

# Copies, so that what is read is what was verified.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for file in MANIFEST MANIFEST.sig; do
  [[ -f $folder/$file && ! -L $folder/$file ]] || refuse "$folder/$file is not there, or is no plain file"
  head -c 1048577 "$folder/$file" >"$work/$file"
  [[ $(stat -c %s "$work/$file") -le 1048576 ]] || refuse "$file is larger than any manifest"
done
openssl pkey -pubin -in "$key" -noout -text 2>/dev/null | grep '^ED25519 Public-Key' >/dev/null || refuse "$key is not an Ed25519 public key"
openssl pkeyutl -verify -rawin -pubin -inkey "$key" -in "$work/MANIFEST" -sigfile "$work/MANIFEST.sig" >/dev/null 2>&1 ||
  refuse "MANIFEST was not signed by $key, or was changed since"

# ---- What was signed. Strict all the same: one reading of it, and no other.
version="" kind="" commit="" target="" number=0
declare -A named=()
while IFS= read -r line; do
  number=$((number + 1))
  case $number in
  1) [[ $line == "modelfs release manifest 1" ]] || refuse "MANIFEST is of another kind: $line" ;;
  2) [[ $line =~ ^version\ ([0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9})$ ]] || refuse "MANIFEST line 2 is no version: $line"; version=${BASH_REMATCH[1]} ;;
  3) [[ $line =~ ^kind\ (release|trial)$ ]] || refuse "MANIFEST line 3 is no kind: $line"; kind=${BASH_REMATCH[1]} ;;
  4) [[ $line =~ ^commit\ ([0-9a-f]{40,64})$ ]] || refuse "MANIFEST line 4 is no commit: $line"; commit=${BASH_REMATCH[1]} ;;
  5) [[ $line =~ ^target\ ([a-z0-9_-]+)$ ]] || refuse "MANIFEST line 5 is no target: $line"; target=${BASH_REMATCH[1]} ;;
  *)
    [[ $line =~ ^file\ ([0-9a-f]{64})\ ([0-9]{1,15})\ ([A-Za-z0-9_][A-Za-z0-9._+~-]*)$ ]] || refuse "MANIFEST line $number is no file: $line"
    [[ -z ${named[${BASH_REMATCH[3]}]:-} ]] || refuse "MANIFEST names ${BASH_REMATCH[3]} twice"
    named[${BASH_REMATCH[3]}]="${BASH_REMATCH[1]} ${BASH_REMATCH[2]}"
    ;;
  esac
done <"$work/MANIFEST"
[[ ${#named[@]} -gt 0 && -z $(tail -c 1 "$work/MANIFEST") ]] || refuse "MANIFEST ends too early"
[[ $kind == release || -n $trial ]] || refuse "this is a trial of the release script, not a release (--trial accepts one)"

# ---- The files, each by the name it was signed under.
for name in "${!named[@]}"; do
  read -r hash size <<<"${named[$name]}"
  [[ -f $folder/$name && ! -L $folder/$name ]] || refuse "$name is missing, or is no plain file"
  [[ $(stat -c %s "$folder/$name") == "$size" ]] || refuse "$name has $(stat -c %s "$folder/$name") bytes, $size were signed"
  [[ $(sha256sum <"$folder/$name") == "$hash  -" ]] || refuse "$name is not the file that was signed"
done
while IFS= read -r -d '' entry; do
  case $entry in
  MANIFEST | MANIFEST.sig) ;;
  *) [[ -n ${named[$entry]:-} ]] || refuse "$entry is in the folder, and nobody signed it" ;;
  esac
done < <(find "$folder" -mindepth 1 -maxdepth 1 -printf '%P\0')

# ---- No way back.
if [[ -n $floor ]]; then
  manifest=$(sha256sum <"$work/MANIFEST" | cut -d' ' -f1)
  if [[ -e $floor ]]; then
    read -r seen seen_manifest <"$floor" || refuse "$floor holds no version; if it was lost, remove it by hand"
    [[ $seen =~ ^[0-9]+\.[0-9]+\.[0-9]+$ && $seen_manifest =~ ^[0-9a-f]{64}$ ]] || refuse "$floor holds no version; if it was lost, remove it by hand"
    highest=$(printf '%s\n%s\n' "$seen" "$version" | sort -V | tail -1)
    [[ $version == "$highest" ]] || refuse "version $version is older than $seen, which was verified before: a release was put back"
    [[ $version != "$seen" || $manifest == "$seen_manifest" ]] || refuse "version $version was signed twice, with other files"
  fi
  mkdir -p "$(dirname "$floor")"
  # Written beside it and moved, so that a run cut short leaves the floor as it was.
  printf '%s %s\n' "$version" "$manifest" >"$floor.new"
  mv "$floor.new" "$floor"
fi
echo "verified: modelfs $version ($kind, $target) of commit $commit, ${#named[@]} files"
