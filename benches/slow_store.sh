#!/usr/bin/env bash
# How a mount streams from a store behind a link that is narrow, far or partly dead, against the link's own rate. Needs root
# (network namespaces, FUSE), tc, and versitygw from tests/parts/install.sh. Two measurements, alternating in rounds:
#
#   benches/slow_store.sh link    the link is held to --rate and nothing else is wrong: plain parallel range GETs of
#                                 the plain file, thrown away, against a cold read of it through a mount
#   benches/slow_store.sh stuck   on top of that each connection has --latency to its first byte and --mb-per-s, and one
#                                 in ten is stuck: cold reads of the mount, against range GETs through the same line
#                                 without stuck connections; and the reading of a warm file meanwhile and alone
#
#   --rate 1gbit  --latency 100  --mb-per-s 50  --size-mib 512  --rounds 3  --parallel 16  --open auto
#   --plain FILE --sealed DIR --model NAME --key KEY --trust KEY [--path FILE_IN_MODEL] [--warm FILE_IN_MODEL]
#       that plain file, and a local store in which it is sealed, instead of random bytes made here
#
# MODELFS, GETS and SLOW_LINE may name programs that are built already. Nothing is left behind but the build.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

mode=${1:-}; shift || true
rate=1gbit open=auto latency=100 mb_per_s=50 size=512 rounds=3 parallel=16 plain='' sealed='' model=slow key='' trust='' path='' warm_path=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --rate) rate=$2 ;; --latency) latency=$2 ;; --mb-per-s) mb_per_s=$2 ;; --size-mib) size=$2 ;; --rounds) rounds=$2 ;;
    --parallel) parallel=$2 ;; --open) open=$2 ;; --plain) plain=$2 ;; --sealed) sealed=$2 ;; --model) model=$2 ;; --key) key=$2 ;;
    --trust) trust=$2 ;; --path) path=$2 ;; --warm) warm_path=$2 ;;
    *) mode='' ; break ;;
  esac
  shift 2
done
if [[ $mode != link && $mode != stuck ]]; then
  sed -n '2,17s/^# \{0,1\}//p' "$0"
  exit 2
fi
[[ $EUID == 0 ]] || { echo "$0: needs root for network namespaces and FUSE" >&2; exit 1; }
command -v tc >/dev/null || { echo "$0: needs tc (Debian: apt-get install iproute2)" >&2; exit 1; }
versitygw=$(tests/parts/versitygw.sh path)
[[ -x $versitygw ]] || tests/parts/versitygw.sh install

bench() { # NAME: the path of a bench's executable
  cargo bench -q --no-run --bench "$1" --message-format=json |
    python3 -c 'import json, sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])'
}
modelfs=${MODELFS:-}
[[ -n $modelfs ]] || { cargo build -q --release --bin modelfs; modelfs=$PWD/target/release/modelfs; }
gets=${GETS:-$(bench gets)}
slow_line=${SLOW_LINE:-$(bench slow_line)}

work=$(mktemp -d) ns=slow-$$ pids=()
# Bound to a namespace of the script's own: addresses of a range that is for measurements (RFC 2544).
near=198.18.77.1 far=198.18.77.2
cleanup() {
  set +e
  mountpoint -q "$work/mnt" && "$modelfs" umount -q "$work/mnt" >/dev/null
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null; done
  wait 2>/dev/null
  ip netns del "$ns" 2>/dev/null
  rm -rf "$work"
}
trap cleanup EXIT
mkdir -p "$work"/{root/models,side,mnt,home,run,state}
chmod 700 "$work"/{run,state}
export HOME=$work/home MODELFS_STATE_DIR=$work/state XDG_RUNTIME_DIR=$work/run AWS_ALLOW_HTTP=true AWS_REGION=us-east-1
export AWS_ACCESS_KEY_ID=bench AWS_SECRET_ACCESS_KEY=bench-secret-0123

# The data: the file as it is, and sealed.
if [[ -z $sealed ]]; then
  mkdir "$work/model"
  head -c "${size}M" /dev/urandom >"$work/model/model.bin"
  head -c 64M /dev/urandom >"$work/model/warm.bin"
  plain=$work/model/model.bin path=model.bin warm_path=warm.bin
  "$modelfs" keygen -q "$work/k" >/dev/null
  "$modelfs" keygen -q --signing "$work/s" >/dev/null
  "$modelfs" seal -q "$work/model" "$work/sealed" "$model" --key "file:$work/k" --sign "$work/s" >/dev/null
  sealed=$work/sealed key=file:$work/k trust=$work/s.pub
fi
path=${path:-$(basename "$plain")}
cp -al "$sealed" "$work/root/models/sealed" 2>/dev/null || cp -a "$sealed" "$work/root/models/sealed"
ln "$plain" "$work/root/models/plain" 2>/dev/null || cp "$plain" "$work/root/models/plain"
bytes=$(stat -c %s "$plain")

# The link: a pair of interfaces, the far one in a namespace with the server, held to the rate on its way to us.
ip netns add "$ns"
ip link add "near-$$" type veth peer name far netns "$ns"
ip addr add "$near/30" dev "near-$$"
ip link set "near-$$" up
ip -n "$ns" addr add "$far/30" dev far
ip -n "$ns" link set far up
ip -n "$ns" link set lo up
ip netns exec "$ns" tc qdisc add dev far root tbf rate "$rate" burst 512kb latency 40ms
ROOT_ACCESS_KEY=$AWS_ACCESS_KEY_ID ROOT_SECRET_KEY=$AWS_SECRET_ACCESS_KEY ip netns exec "$ns" \
  "$versitygw" --port "$far:7070" --quiet --keep-alive posix --sidecar "$work/side" "$work/root" >/dev/null 2>&1 &
pids+=($!)
direct=http://$far:7070 well=http://$far:7071 sick=http://$far:7072
if [[ $mode == stuck ]]; then
  ip netns exec "$ns" "$slow_line" "$far:7071" "$far:7070" "$latency" "$mb_per_s" none & pids+=($!)
  ip netns exec "$ns" "$slow_line" "$far:7072" "$far:7070" "$latency" "$mb_per_s" one-in-ten & pids+=($!)
fi
for _ in $(seq 100); do (: </dev/tcp/$far/7070) 2>/dev/null && break; sleep 0.1; done

now() { date +%s.%N; }
json() { python3 -c "import json, sys; print(json.load(sys.stdin)[\"metrics\"].get(sys.argv[1], 0))" "$1"; }
note() { echo "$1 $2" >>"$work/numbers"; printf '  %-44s %s\n' "$1" "$2"; }
rate_of() { python3 -c "print('%.1f' % ($bytes / 1e6 / ($2 - $1)))"; } # START END: MB/s
plain_gets() { # ENDPOINT: MB/s of the better plain client
  AWS_ENDPOINT_URL=$1 "$gets" s3://models plain --parallel "$parallel" --ways client,bare --json |
    python3 -c 'import json, sys; print("%.1f" % max(1000 * w["gb_per_s"] for w in json.load(sys.stdin)["ways"].values()))'
}
mount_at() { # ENDPOINT
  AWS_ENDPOINT_URL=$1 "$modelfs" mount s3://models/sealed "$work/mnt" --model "$model" --key "$key" --trust "$trust" \
    --cache "$((bytes / 1048576 + 384))MiB" --open "$open" --daemon >/dev/null
}
cold() { # ENDPOINT: MB/s of a cold read, the mount itself not counted
  mount_at "$1"
  local start end
  start=$(now)
  dd if="$work/mnt/$model/$path" of=/dev/null bs=1M status=none
  end=$(now)
  "$modelfs" status "$work/mnt" --json >"$work/status"
  "$modelfs" umount -q "$work/mnt" >/dev/null
  rate_of "$start" "$end"
}
warm() { # FILE: GB/s of two seconds of reads, each from a new open
  python3 - "$1" <<'PY'
import sys, time
buffer, read, start = bytearray(1 << 20), 0, time.monotonic()
while time.monotonic() < start + 2:
    with open(sys.argv[1], 'rb', buffering=0) as file:
        while got := file.readinto(buffer):
            read += got
print('%.2f' % (read / 1e9 / (time.monotonic() - start)))
PY
}

echo "link $rate, $((bytes / 1000000)) MB, $parallel requests in flight$([[ $mode == stuck ]] && echo ", $latency ms, $mb_per_s MB/s a connection, one in ten stuck")"
for round in $(seq "$rounds"); do
  echo "round $round"
  if [[ $mode == link ]]; then
    value=$(plain_gets $direct); note 'plain GETs, MB/s' "$value"
    value=$(cold $direct); note 'mount cold, MB/s of plaintext' "$value"
  else
    value=$(plain_gets $well); note 'plain GETs, no connection stuck, MB/s' "$value"
    value=$(cold $sick); note 'mount cold, one in ten stuck, MB/s' "$value"
    value=$(json hedges_sent <"$work/status"); note 'extra requests sent' "$value"
    value=$(json hedges_won <"$work/status"); note 'of those answered first' "$value"
    [[ -n $warm_path ]] || continue
    mount_at $sick
    cat "$work/mnt/$model/$warm_path" >/dev/null
    value=$(warm "$work/mnt/$model/$warm_path"); note 'warm file alone, GB/s' "$value"
    cat "$work/mnt/$model/$path" >/dev/null & stream=$!
    sleep 0.3
    value=$(warm "$work/mnt/$model/$warm_path"); note 'warm file during a cold stream, GB/s' "$value"
    kill -0 $stream 2>/dev/null || echo '  (the stream ended before the warm reads did)'
    wait $stream
    "$modelfs" umount -q "$work/mnt" >/dev/null
  fi
done
python3 - "$work/numbers" <<'PY'
import statistics, sys
rows = {}
for line in open(sys.argv[1]):
    what, value = line.rsplit(' ', 1)
    rows.setdefault(what, []).append(float(value))
print('medians')
for what, values in rows.items():
    print(f'  {what:<44} {statistics.median(values):.2f}')
names = list(rows)
for a, b in [(1, 0), (5, 4)][: 1 if len(names) < 6 else 2]:
    ratio = statistics.median(x / y for x, y in zip(rows[names[a]], rows[names[b]]))
    print(f'  {names[a]} / {names[b]}: {ratio:.2f}')
PY
