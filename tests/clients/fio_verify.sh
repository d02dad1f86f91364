#!/usr/bin/env bash
# fio verifies its own checksummed blocks over a read-only mount, in every way a loader may read.
#
#   fio_verify.sh make FILE [SIZE]      write FILE (default 256m) so that every block carries fio's header and CRC-32C
#   fio_verify.sh check FILE SECONDS    read FILE on the mount with four jobs at once, each checking every block it reads
#   fio_verify.sh self-test [DIR]       prove in DIR (default a temporary one) that check passes, and fails when one byte
#                                       is flipped and when two whole blocks have changed places
#
# The jobs: sequential and random psync, random through a map, random O_DIRECT. Blocks are 64 KiB. A header names its own
# offset, so a block served from another place is noticed as well as a block that changed.
set -euo pipefail

make_file() {
  local file=$1 size=${2:-256m} scratch
  scratch=$(mktemp -d)
  # fio leaves a verify state file where it stands; it is not needed, because every header carries what is checked.
  (cd "$scratch" && fio --name=make --filename="$file" --size="$size" --bs=64k --rw=write --ioengine=psync \
    --verify=crc32c --do_verify=0 --randrepeat=1 --end_fsync=1 --minimal >/dev/null)
  rm -rf "$scratch"
}

check_file() {
  local file=$1 seconds=$2 scratch rc=0
  scratch=$(mktemp -d)
  cat >"$scratch/jobs" <<JOBS
[global]
filename=$file
size=$(stat -c %s "$file")
bs=64k
verify=crc32c
verify_fatal=1
allow_file_create=0
time_based=1
runtime=$seconds
group_reporting=0
[sequential-read]
ioengine=psync
rw=read
[random-read]
ioengine=psync
rw=randread
[random-map]
ioengine=mmap
rw=randread
[random-direct]
ioengine=psync
direct=1
rw=randread
JOBS
  (cd "$scratch" && timeout --kill-after=10 $((seconds + 300)) fio --readonly jobs >out 2>&1) || rc=$?
  grep -E 'verify|error|^ *READ|: \(groupid|read: IOPS' "$scratch/out" | sed 's/: pid=.*//' | head -40 || true
  rm -rf "$scratch"
  return $rc
}

# In two seconds a quick machine comes by every block many times, and one that stalls not once.
noticed() { # FILE
  local seconds
  for seconds in 2 15 120; do check_file "$1" $seconds >/dev/null || return 0; done
  return 1
}

self_test() {
  local dir=${1:-} made=""
  if [[ -z $dir ]]; then
    dir=$(mktemp -d)
    made=$dir
  fi
  local good=$dir/fio.bin bad=$dir/harmed.bin failed=0
  make_file "$good" 64m
  check_file "$good" 2 >/dev/null || { echo "self-test FAILED: an unharmed file did not verify"; failed=1; }

  cp "$good" "$bad"
  printf '%b' "\\x$(printf %02x $((0x$(xxd -s 30000123 -l 1 -p "$good") ^ 0x40)))" |
    dd of="$bad" bs=1 seek=30000123 conv=notrunc status=none
  noticed "$bad" || { echo "self-test FAILED: a flipped byte went unnoticed"; failed=1; }

  cp "$good" "$bad"
  dd if="$good" of="$bad" bs=64k skip=10 seek=20 count=1 conv=notrunc status=none
  dd if="$good" of="$bad" bs=64k skip=20 seek=10 count=1 conv=notrunc status=none
  noticed "$bad" || { echo "self-test FAILED: moved blocks went unnoticed"; failed=1; }

  rm -f "$good" "$bad"
  [[ -z $made ]] || rmdir "$made"
  [[ $failed == 0 ]] && echo "self-test passed: unharmed verifies, a flipped byte and moved blocks do not"
  return $failed
}

case ${1:-} in
  make) make_file "$(realpath -m "$2")" "${3:-256m}" ;;
  check) check_file "$(realpath "$2")" "${3:-10}" ;;
  self-test) self_test "${2:-}" ;;
  *) sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
