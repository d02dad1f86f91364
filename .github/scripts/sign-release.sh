#!/usr/bin/env bash
# Signs what release.sh made in FOLDER. It builds nothing and runs nothing of what it signs.
#
#   .github/scripts/sign-release.sh --key FILE FOLDER
#
#   modelfs-VERSION.intoto.jsonl  in place of statement.json: the provenance in a signed envelope (DSSE)
#   MANIFEST, MANIFEST.sig        version, commit and the hash of each file; the Ed25519 signature of that
#
# FILE is an Ed25519 private key (openssl genpkey -algorithm ed25519); or it is `env:`, and RELEASE_SIGNING_KEY holds one, which is
# then on no disk. verify-release.sh checks what comes of this, with the public key alone.
#
# What lies in FOLDER must be what the statement says was built, all of it and nothing else.
set -euo pipefail

[[ $# == 3 && $1 == --key ]] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
key=$2 folder=$3
die() { echo "sign-release.sh: $*" >&2; exit 1; }

# private: the signing key, from where it lies to one command; in no argument and no file of ours.
private() { if [[ $key == env: ]]; then printf '%s\n' "${RELEASE_SIGNING_KEY:?holds no key}"; else cat "$key"; fi; }
sign() { # FILE: the raw signature
  openssl pkeyutl -sign -rawin -inkey <(private) -in "$1"
}
openssl pkey -in <(private) -noout -text 2>/dev/null | grep '^ED25519 Private-Key' >/dev/null || die "$key is not an Ed25519 private key"
[[ -f $folder/statement.json && ! -e $folder/MANIFEST ]] || die "$folder holds no statement.json, or is signed already"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mv "$folder/statement.json" "$work/statement"
said() { jq -er "$1" "$work/statement"; }
version=$(said .predicate.buildDefinition.externalParameters.version)
kind=$(said .predicate.buildDefinition.externalParameters.kind)
target=$(said .predicate.buildDefinition.externalParameters.target)
commit=$(said '.predicate.buildDefinition.resolvedDependencies[0].digest.gitCommit')
if ! diff <(jq -r '.subject[] | "\(.digest.sha256)  \(.name)"' "$work/statement" | sort) <(cd "$folder" && sha256sum -- * | sort) >"$work/diff"; then
  cat "$work/diff" >&2
  die "$folder is not what its statement says was built"
fi

# DSSE: what is signed is the type, the length of both, and the statement.
type=application/vnd.in-toto+json
{ printf 'DSSEv1 %d %s %d ' ${#type} $type "$(stat -c %s "$work/statement")"; cat "$work/statement"; } >"$work/envelope"
keyid=$(openssl pkey -in <(private) -pubout -outform DER | sha256sum | cut -d' ' -f1)
sign "$work/envelope" | base64 -w0 >"$work/signature"
base64 -w0 "$work/statement" >"$work/payload"
jq -cn --rawfile payload "$work/payload" --rawfile signature "$work/signature" --arg type $type --arg keyid "$keyid" \
  '{payloadType: $type, payload: $payload, signatures: [{keyid: $keyid, sig: $signature}]}' >"$folder/modelfs-$version.intoto.jsonl"

# ---- The manifest, and one signature over all of it.
{
  printf 'modelfs release manifest 1\nversion %s\nkind %s\ncommit %s\ntarget %s\n' "$version" "$kind" "$commit" "$target"
  (cd "$folder" && for file in *; do printf 'file %s %s %s\n' "$(sha256sum "$file" | cut -d' ' -f1)" "$(stat -c %s "$file")" "$file"; done)
} >"$work/MANIFEST"
sign "$work/MANIFEST" >"$work/MANIFEST.sig"
chmod 644 "$work/MANIFEST" "$work/MANIFEST.sig"
mv "$work/MANIFEST" "$work/MANIFEST.sig" "$folder/"
echo "$folder: signed version $version ($kind) of commit $commit"
