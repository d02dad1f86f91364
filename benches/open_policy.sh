#!/usr/bin/env bash
# Prints, for lazy, auto and whole, what every kind of program meets at a cold mount: time to the first byte, time to the
# last, bytes fetched, how its opens were answered. From a local store, and from an S3 server behind a slow link.
#
#   benches/open_policy.sh [--mib N] [--rounds N] [--rate BYTES_PER_SECOND] [--store local|slow|both]
#                          [--policies lazy,auto,whole] [--only REGEX]
#
# Needs root, a release build, and the parts versitygw and torch (tests/parts/install.sh). Nothing here fails on a time.
set -euo pipefail

cd "$(dirname "$0")/.."
mib=256 rounds=2 rate=100e6 store=both policies=lazy,auto,whole only=
while [[ $# -gt 0 ]]; do
  case $1 in
  --mib) mib=$2 ;;
  --rounds) rounds=$2 ;;
  --rate) rate=$2 ;;
  --store) store=$2 ;;
  --policies) policies=$2 ;;
  --only) only=$2 ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
  esac
  shift 2
done

program=${MODELFS:-$PWD/target/release/modelfs}
python=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}/clients-torch/bin/python
versitygw=$(tests/parts/versitygw.sh path)
dir=$(mktemp -d)
children=()
cleanup() {
  for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
  rm -rf "$dir"
}
trap cleanup EXIT

export XDG_STATE_HOME=$dir/state XDG_CONFIG_HOME=$dir/config MODELFS_PASSPHRASE=
"$python" benches/open_policy.py make "$dir/model" "$mib"
"$program" keygen "$dir/key" >/dev/null
"$program" keygen --signing "$dir/signing" >/dev/null
seal=(--key "file:$dir/key" --sign "$dir/signing" -q)
mount=(--key "file:$dir/key" --trust "$dir/signing.pub")
mkdir -p "$dir/data/models" "$dir/sidecar"

run() {
  echo
  echo "### $1"
  echo
  "$python" benches/open_policy.py table "$program" "$2" "$mib" "$rounds" "$policies" "$only" "${mount[@]}"
}

if [[ $store != slow ]]; then
  "$program" seal "$dir/model" "$dir/local" bench "${seal[@]}" >/dev/null
  run "A local store" "$dir/local"
fi
if [[ $store != local ]]; then
  port=$((20000 + RANDOM % 20000))
  export AWS_ACCESS_KEY_ID=bench AWS_SECRET_ACCESS_KEY=bench-secret-0123456789 AWS_REGION=us-east-1
  ROOT_ACCESS_KEY=$AWS_ACCESS_KEY_ID ROOT_SECRET_KEY=$AWS_SECRET_ACCESS_KEY "$versitygw" --port "127.0.0.1:$port" \
    --quiet --keep-alive posix --sidecar "$dir/sidecar" "$dir/data" >/dev/null 2>&1 &
  children+=($!)
  "$python" benches/open_policy.py throttle $((port + 1)) "$port" "$rate" &
  children+=($!)
  for _ in $(seq 200); do
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && (: <"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null && break
    sleep 0.05
  done
  AWS_ENDPOINT_URL=http://127.0.0.1:$port "$program" seal "$dir/model" s3://models bench "${seal[@]}" >/dev/null
  export AWS_ENDPOINT_URL=http://127.0.0.1:$((port + 1))
  run "S3 behind a link of $rate bytes a second" s3://models
fi
