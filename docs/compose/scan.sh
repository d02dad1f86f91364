#!/bin/sh
# scan.sh CANARIES FOLDER: fails, naming the files, if any file below FOLDER holds model weights, or one of the texts in the
# file CANARIES.
#
# `modelfs scan` knows weights by their form, in whatever layer or archive they lie. The texts were put into the weights before
# sealing: where one of them is found, a piece of the plaintext lies that has lost its form.
set -eu
canaries=$1 folder=$2 status=0
[ -s "$canaries" ] || { echo "$canaries holds no text to look for"; exit 2; }
modelfs scan "$folder" || status=$?
# A text that is there must be found, or finding none would mean nothing.
{ head -c 10000 /dev/urandom; tail -n 1 "$canaries"; head -c 10000 /dev/urandom; } >/tmp/planted
grep -zqF -f "$canaries" /tmp/planted || { echo "this grep finds nothing"; exit 2; }
rm /tmp/planted
# Not what is mounted below: a layer that is in use, once more.
find "$folder" -xdev -type f >/tmp/files
[ -s /tmp/files ] || { echo "$folder holds no file"; exit 2; }
found=$(xargs grep -zlF -f "$canaries" </tmp/files 2>/dev/null || true)
echo "looked into $(wc -l </tmp/files) files"
[ -z "$found" ] || { echo "plaintext of the model lies in:"; echo "$found"; exit 1; }
[ "$status" = 0 ] || { echo "modelfs scan ended with $status"; exit 1; }
