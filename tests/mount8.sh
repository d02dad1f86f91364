#!/usr/bin/env bash
# mount(8), fstab and umount(8) with the helper mount.modelfs, as root and as an ordinary user.
#
#   tests/mount8.sh      as root; needs the release build (MODELFS names another binary)
#
# All of it happens in namespaces of its own for mounts and processes, over copies of /etc and /usr that are gone with them:
# the machine's own fstab, helpers and mounts are neither used nor changed. The commands and fstab lines are those of docs/DEPLOY.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $EUID == 0 && -z ${MODELFS_TEST_MOUNT8_INSIDE:-} ]]; then
  MODELFS_TEST_MOUNT8_INSIDE=1 exec unshare --mount --propagation private --pid --fork --kill-child --mount-proc bash tests/mount8.sh
fi
source tests/steps.sh
source tests/page.sh

page=$PWD/docs/DEPLOY.md
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
binary=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
versitygw=$(MODELFS_TEST_CACHE=$cache bash tests/parts/versitygw.sh path)
if [[ ! -x $binary ]]; then
  step "mount(8): $binary is built (cargo build --release --locked)" false
  finish
  exit
fi
[[ $EUID == 0 ]] || { skip "mount(8)" "it needs root"; finish; exit; }
[[ -c /dev/fuse ]] || { skip "mount(8)" "this machine has no /dev/fuse"; finish; exit; }

# ---- A machine of our own.
work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-mount8.XXXXXX")
chmod 755 "$work"
s3_pid="" sleeper=""
ours() { findmnt -rn -t fuse.modelfs -o TARGET | grep '^/mnt/' || true; }
daemons() { ps -eo pid=,comm= | awk '$2 ~ /^(mount\.|modelfs)/ { print $1 }'; }
# shellcheck disable=SC2317 # called by the trap
cleanup() {
  local mountpoint pid
  for mountpoint in $(ours); do umount --lazy "$mountpoint" || true; done
  for pid in $s3_pid $sleeper $(daemons); do kill "$pid" 2>/dev/null || true; done
  cd /
  umount --lazy "$work/over" 2>/dev/null || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# A new namespace begins with a copy of every mount; those of others end when they unmount them, and not with this test.
for mountpoint in $(findmnt -rn -t fuse,fuse.modelfs -o TARGET); do umount --lazy "$mountpoint" 2>/dev/null || true; done
mkdir "$work/over"
mount -t tmpfs -o mode=755 none "$work/over"
for dir in etc usr; do
  mkdir "$work/over/$dir" "$work/over/$dir.work"
  if ! mount -t overlay -o "lowerdir=/$dir,upperdir=$work/over/$dir,workdir=$work/over/$dir.work" none "/$dir"; then
    skip "mount(8)" "this kernel lays nothing over /$dir"
    finish
    exit
  fi
done
for dir in mnt srv run; do mount -t tmpfs -o mode=755 none "/$dir"; done
# A node that ordinary users may open, as udev makes it.
mknod "$work/over/fuse" c 10 229 && chmod 666 "$work/over/fuse" && mount --bind "$work/over/fuse" /dev/fuse
rm -f /usr/sbin/mount.modelfs /usr/sbin/mount.fuse.modelfs /etc/modelfs.toml
install -m 755 "$binary" /usr/local/bin/modelfs
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS)_' | grep -vE '^MODELFS_TEST_[A-Z_]+$'); do unset "$name"; done
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=$work/home XDG_CONFIG_HOME=$work/config MODELFS_STATE_DIR=$work/state
mkdir -p "$HOME" /etc/modelfs /mnt/models /mnt/other
chmod 700 /etc/modelfs

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.05; done
}
nothing_runs() { [[ -z $(daemons) && -z $(ours) ]]; }
# fails STATUS WORDS COMMAND...: that exit status, a last line on standard error that holds WORDS, and no mount left.
fails() {
  local status=$1 words=$2 said rc=0
  shift 2
  said=$("$@" 2>&1 >/dev/null) || rc=$?
  echo "$said"
  [[ $rc == "$status" ]] || { echo "exit status $rc, wanted $status"; return 1; }
  [[ $(tail -1 <<<"$said") == *"$words"* ]] || { echo "does not say at the end: $words"; return 1; }
  ! ours | grep -x /mnt/other >/dev/null || { echo "left a mount"; return 1; }
}
warns() { # WORDS COMMAND...: succeeds, and says so on standard error
  local words=$1 said
  shift
  said=$("$@" 2>&1 >/dev/null) || { echo "$said"; return 1; }
  [[ $said == *"$words"* ]] || { echo "said: $said"; return 1; }
}
silent() { # COMMAND...: succeeds and says nothing, but that memory lies in pieces, which is as the machine left it
  local said rc=0
  said=$("$@" 2>&1) || rc=$?
  said=$(grep -v 'memory is fragmented: ' <<<"$said" || true)
  [[ $rc == 0 && -z $said ]] || { echo "$said"; return 1; }
}

seal() { # STORE
  mkdir -p "$work/model"
  head -c 3000000 /dev/urandom >"$work/model/weights.bin"
  echo '{"layers": 2}' >"$work/model/config.json"
  modelfs --quiet seal "$work/model" "$1" acme/llama --key file:/etc/modelfs/llama.key >/dev/null
  cp "$XDG_CONFIG_HOME/modelfs/signing.key.pub" /etc/modelfs/signing.pub
}
reads() { diff -r "$work/model" "${1:-/mnt/models}/acme/llama"; }
access=key=file:/etc/modelfs/llama.key,trust=/etc/modelfs/signing.pub,cache=64MiB
at() { mount -t modelfs /srv/models "$1" -o "$access,${2:-ro}"; }
off() { umount "${1:-/mnt/models}" && until_true 90 nothing_runs; }

modelfs keygen /etc/modelfs/llama.key >/dev/null
step "seal a model" seal /srv/models

# ---- The helper.
links() { # WHAT became of both
  [[ $(modelfs install-helper --json "${@:2}" | jq -r '[.links[].done] | unique | join(",")') == "$1" ]]
}
foreign() {
  local rc=0
  printf '#!/bin/sh\n' >/usr/sbin/mount.fuse.modelfs
  fails 2 "move it away" modelfs install-helper || rc=$?
  [[ $(cat /usr/sbin/mount.fuse.modelfs) == '#!/bin/sh' && ! -e /usr/sbin/mount.modelfs ]] || rc=1
  rm /usr/sbin/mount.fuse.modelfs
  return $rc
}
step "a foreign helper is not overwritten" foreign
step "link the helper as docs/DEPLOY.md says" run_page_block "$page" helper
step "a second time nothing changes" links kept
step "the link leads to the program" test /sbin/mount.modelfs -ef /usr/local/bin/modelfs

# ---- By hand.
step "mount, find and unmount as docs/DEPLOY.md says" run_page_block "$page" mount
step "nothing is left running" until_true 90 nothing_runs
step "mount" at /mnt/models
step "the model is read" reads
table() {
  [[ $(findmnt -rn -o SOURCE,FSTYPE /mnt/models) == "/srv/models fuse.modelfs" ]] || { findmnt /mnt/models; return 1; }
  local flags flag
  flags=,$(findmnt -rn -o VFS-OPTIONS /mnt/models),
  for flag in ro nosuid nodev noexec; do [[ $flags == *,$flag,* ]] || { echo "not $flag: $flags"; return 1; }; done
  # What is looked for would be found: the words stand in the daemon's own arguments.
  local secret="llama.key|signing.pub|key="
  tr '\0' ' ' <"/proc/$(daemons)/cmdline" | grep -E "$secret" >/dev/null || return 1
  ! grep -E "$secret" /proc/self/mountinfo /proc/self/mounts /run/mount/utab || return 1
}
step "the mount table shows the store and flags, and no option" table
step "a write is refused" fails 1 "Read-only file system" touch /mnt/models/x
step "unmount, and nothing is left" off

# ---- remount.
step "mount once more" at /mnt/models
step "remount,ro changes nothing and succeeds" silent mount -o remount,ro /mnt/models
step "the same by the type in the mount table" silent mount -t fuse.modelfs /srv/models /mnt/models -o remount,ro
step "with the options it has" silent mount -t modelfs /srv/models /mnt/models -o "remount,ro,$access"
step "remount,rw fails" fails 32 "is ro and cannot be remounted rw" mount -o remount,rw /mnt/models
step "remount with a new option fails and names it" \
  fails 32 "cache=128MiB" mount -t modelfs /srv/models /mnt/models -o "remount,ro,${access/64MiB/128MiB}"
step "remount of nothing fails" fails 32 "nothing is mounted" mount -t modelfs /srv/models /mnt/other -o remount,ro
step "the model is still read" reads

# ---- umount.
busy() {
  local rc=0
  exec 7</mnt/models/acme/llama/weights.bin
  fails 32 busy umount /mnt/models || rc=1
  umount --lazy /mnt/models || rc=1
  cmp - "$work/model/weights.bin" <&7 || rc=1
  [[ -n $(daemons) ]] || rc=1
  exec 7<&-
  until_true 90 nothing_runs || rc=1
  return $rc
}
step "umount of a busy mount fails; umount -l detaches, and what is open is read to its end" busy

# ---- Words of mount(8).
generic="defaults,_netdev,auto,nofail,users,nosuid,nodev,noexec,noatime,nodiratime,lazytime,silent,comment=some words,x-a=b,X-b"
generic+=,x-systemd.automount,x-systemd.mount-timeout=9s,x-systemd.requires=network.target,x-gvfs-hide,nosymfollow
step "generic words pass" at /mnt/models "ro,$generic"
step "and the model is read" reads
step "unmount" off
step "rw is answered with a warning" warns "mounted ro, although asked for rw" at /mnt/models rw
step "unmount" off
step "exec too" warns "mounted noexec, although asked for exec" at /mnt/models ro,user,exec
step "unmount" off
step "x-mount.mkdir makes the mountpoint" at /mnt/made ro,x-mount.mkdir
step "unmount" off /mnt/made
step "an unknown word is refused with the nearest" fails 1 'did you mean `cache`' at /mnt/other ro,cahce=1G
sloppy() { mount -s -t modelfs /srv/models /mnt/models -o "$access,ro,later=1" && off; }
step "mount -s passes over it" sloppy
quoted() { mount -t modelfs /srv/models /mnt/models -o "ro,$access,model=\"acme/llama\"" && reads && off; }
step "a value may stand in quotes" quoted

# ---- fake.
fake() { mount --fake -t modelfs /srv/models /mnt/models -o "ro,$access" && nothing_runs; }
step "mount --fake mounts nothing" fake
step "and checks what it is given" fails 1 "not a size" mount --fake -t modelfs /srv/models /mnt/other -o "ro,$access,cache=8Gx"

# ---- Failures.
step "no such mountpoint" fails 32 MOUNT_POINT at /mnt/none
step "no store" fails 32 "[" mount -t modelfs /srv/none /mnt/other -o "ro,$access"
step "a store that does not answer" fails 32 UNREACHABLE env AWS_ACCESS_KEY_ID=reader AWS_SECRET_ACCESS_KEY=change-me \
  mount -t modelfs s3://models/prod /mnt/other -o "ro,$access,s3-endpoint=http://127.0.0.1:9,fetch_budget=2s,fetch_timeout=1s"
# Ctrl-C, and systemd at x-systemd.mount-timeout: whoever waits is let go, and nothing is mounted later.
given_up() { # SIGNAL
  local rc=0
  python3 -c '
import socket, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(600)' >"$work/silent.port" &
  s3_pid=$!
  until_true 120 test -s "$work/silent.port"
  timeout --signal="$1" 3 env AWS_ACCESS_KEY_ID=reader AWS_SECRET_ACCESS_KEY=change-me mount -t modelfs s3://models/prod /mnt/other \
    -o "ro,$access,s3-endpoint=http://127.0.0.1:$(cat "$work/silent.port")" || rc=$?
  [[ $rc == 124 ]] || { echo "exit status $rc"; return 1; }
  until_true 90 nothing_runs || return 1
  kill "$s3_pid"
  wait "$s3_pid" 2>/dev/null || true
  rm "$work/silent.port"
  s3_pid=""
}
step "a store that says nothing, and Ctrl-C" given_up INT
step "a store that says nothing, and SIGTERM" given_up TERM
wrong_key() {
  modelfs keygen "$work/wrong.key" >/dev/null
  fails 32 NO_KEY mount -t modelfs /srv/models /mnt/other -o "ro,key=file:$work/wrong.key,trust=/etc/modelfs/signing.pub,cache=64MiB"
}
step "a wrong key" wrong_key
step "no key" fails 1 "no key given" mount -t modelfs /srv/models /mnt/other -o ro
step "no such namespace" fails 2 "cannot enter" mount.modelfs /srv/models /mnt/other -N /none -o "ro,$access"
step "wrong usage of the helper" fails 1 "usage: mount.modelfs" mount.modelfs /srv/models

# ---- A namespace.
elsewhere() {
  local rc=0
  unshare --mount sleep 600 &
  sleeper=$!
  until [[ $(readlink "/proc/$sleeper/ns/mnt") != $(readlink /proc/self/ns/mnt) ]]; do sleep 0.05; done
  mount -N "$sleeper" -t modelfs /srv/models /mnt/models -o "ro,$access" || rc=1
  [[ -z $(ours) ]] || { echo "it is mounted here"; rc=1; }
  nsenter --target "$sleeper" --mount diff -r "$work/model" /mnt/models/acme/llama || rc=1
  nsenter --target "$sleeper" --mount umount /mnt/models || rc=1
  until_true 90 nothing_runs || rc=1
  kill "$sleeper"
  wait "$sleeper" 2>/dev/null || true
  sleeper=""
  return $rc
}
step "mount -N mounts in another namespace" elsewhere

# ---- fstab.
# A mount tells of memory in small pieces, and what ran before may have left it so.
in_one_piece() { { echo 1 >/proc/sys/vm/drop_caches && echo 1 >/proc/sys/vm/compact_memory; } 2>/dev/null || true; }
in_one_piece
page_block "$page" fstab local >/etc/fstab
step "an fstab line" silent mount /mnt/models
step "the model is read" reads
once() { mount -a && [[ $(ours) == /mnt/models ]]; }
step "mount -a sees that it is mounted" once
step "remount by fstab" silent mount -o remount /mnt/models
step "unmount" off
step "mount -a mounts it" once
step "unmount" off
by_network() {
  mount -a -O _netdev && nothing_runs || return 1
  sed -i 's/ro,/ro,_netdev,/' /etc/fstab
  mount -a -O no_netdev && nothing_runs || return 1
  mount -a -O _netdev && reads && off
}
step "mount -a -O _netdev takes those lines alone" by_network
not_auto() { sed -i 's/ro,/ro,noauto,/' /etc/fstab && mount -a && nothing_runs; }
step "mount -a leaves noauto" not_auto
several() { # one line fails, the other one is mounted
  { page_block "$page" fstab local; echo "/srv/none /mnt/other modelfs ro,nofail,$access 0 0"; } >/etc/fstab
  step_rc=0 && mount -a || step_rc=$?
  echo "exit status of mount -a: $step_rc"
  [[ $step_rc == 64 || $step_rc == 32 ]] && reads && off
}
step "a line that fails keeps no other one away" several

# ---- An ordinary user.
echo "ann:x:12345:12345::$work/ann:/bin/sh" >>/etc/passwd
install -d -o 12345 -g 12345 "$work/ann" /mnt/ann
install -m 600 -o 12345 -g 12345 /etc/modelfs/llama.key "$work/ann/llama.key"
install -m 644 /etc/modelfs/signing.pub "$work/ann/signing.pub"
as_ann() { setpriv --reuid=12345 --regid=12345 --clear-groups env -u MODELFS_STATE_DIR -u XDG_CONFIG_HOME HOME="$work/ann" "$@"; }
anns="key=file:$work/ann/llama.key,trust=$work/ann/signing.pub,cache=64MiB"
echo "/srv/models /mnt/ann modelfs ro,noauto,user,$anns 0 0" >/etc/fstab
# Root's store is private; a user's is to be readable for the user.
chown -R 12345 /srv/models
ann_mounts() {
  as_ann mount /mnt/ann && as_ann diff -r "$work/model" /mnt/ann/acme/llama && as_ann umount /mnt/ann && until_true 90 nothing_runs
}
root_key() {
  sed -i "s|file:$work/ann/llama.key|file:/etc/modelfs/llama.key|" /etc/fstab
  fails 32 "" as_ann mount /mnt/ann
}
if [[ $(ulimit -H -l) == unlimited || $(ulimit -H -l) -ge 400000 ]]; then
  step "a user mounts a line with user, reads and unmounts" ann_mounts
  step "root's key is not read for a user" root_key
else
  step "a user whose memory limit is too small is told so" fails 32 MEMLOCK as_ann mount /mnt/ann
fi
as_ann_locks() { setpriv --reuid=12345 --regid=12345 --clear-groups --inh-caps=+ipc_lock --ambient-caps=+ipc_lock "$@"; }
# mount(8) gives up all rights before it calls the helper for a user; called by itself it can be lent the one it needs here.
ann_alone() {
  local rc=0
  as_ann_locks env -u MODELFS_STATE_DIR -u XDG_CONFIG_HOME HOME="$work/ann" mount.modelfs /srv/models /mnt/ann -o "ro,$anns" || return 1
  as_ann diff -r "$work/model" /mnt/ann/acme/llama || rc=1
  [[ $(findmnt -rn -o SOURCE,FSTYPE /mnt/ann) == "/srv/models fuse.modelfs" ]] || rc=1
  as_ann mount.modelfs /srv/models /mnt/ann -o "remount,ro,$anns" || rc=1
  as_ann umount /mnt/ann && until_true 90 nothing_runs && return $rc
}
if as_ann_locks true 2>/dev/null; then
  step "the helper alone mounts for a user, who unmounts" ann_alone
else
  skip "the helper alone for a user" "this root cannot lend CAP_IPC_LOCK"
fi
chown -R 0 /srv/models

# ---- S3, with credentials from a file.
start_s3() {
  local port
  port=$(free_port)
  mkdir -p "$work/s3/models"
  page_block "$page" ini s3.env | sed "s/:7070/:$port/" >/etc/modelfs/s3.env
  chmod 600 /etc/modelfs/s3.env
  ROOT_ACCESS_KEY=reader ROOT_SECRET_KEY=change-me "$versitygw" --port "127.0.0.1:$port" --quiet posix "$work/s3" >"$work/s3.log" 2>&1 &
  s3_pid=$!
  until_true 120 curl -s -o /dev/null "http://127.0.0.1:$port/"
  (set -a && source /etc/modelfs/s3.env && set +a && seal s3://models/prod)
}
s3_line() {
  page_block "$page" fstab s3 >/etc/fstab
  in_one_piece
  silent mount /mnt/models && reads || return 1
  [[ $(findmnt -rn -o SOURCE /mnt/models) == s3://models/prod ]] || return 1
  ! grep -rq change-me /proc/self/mountinfo /run/mount || return 1
  ! grep -aq change-me "/proc/$(daemons)/environ" "/proc/$(daemons)/cmdline" || { echo "the secret is shown to others"; return 1; }
  once && off
}
open_file() { chmod 644 /etc/modelfs/s3.env && fails 32 KEY_PERMS mount /mnt/models && chmod 600 /etc/modelfs/s3.env; }
if [[ -x $versitygw ]]; then
  step "seal into an S3 server" start_s3
  step "an fstab line with s3:// and a file of credentials" s3_line
  step "a file of credentials that others can read is refused" open_file
else
  skip "mount(8) from S3" "$versitygw is not installed"
fi

step "no daemon is left" nothing_runs
step "the helper is removed" links removed --remove
step "and again" links absent --remove
finish
