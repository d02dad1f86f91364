#!/usr/bin/env bash
# `modelfs doctor` on a healthy machine, and on the same machine spoiled one thing at a time: the rule that is meant
# complains, and no other does. What cannot be spoiled for real is listed in docs/DOCTOR.md.
#
#   tests/doctor.sh      needs the release build (MODELFS names another binary) and root; for Vault and S3 their parts
#
# The machine is this one's kernel with a root file system of our own: a dozen files whose modes we know. Every setting of the
# kernel that is changed is put back.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
modelfs=$(realpath "$modelfs" 2>/dev/null || echo "$modelfs")
vault=$(MODELFS_TEST_CACHE=$cache bash tests/parts/vault.sh path vault)
gateway=$(MODELFS_TEST_CACHE=$cache bash tests/parts/versitygw.sh path)
page=$PWD/docs/DOCTOR.md
if [[ ! -x $modelfs ]]; then
  step "doctor: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
[[ $EUID == 0 && -c /dev/fuse ]] || { skip "doctor" "needs root and /dev/fuse"; finish; exit; }

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-doctor.XXXXXX")
chmod 755 "$work"
root=$work/root
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS|STRICT)_' | grep -v '^MODELFS_TEST_'); do unset "$name"; done
export HOME=$work/home XDG_CONFIG_HOME=$work/config XDG_STATE_HOME=$work/state
mkdir -p "$HOME"

declare -A settings=() # what the kernel's settings were
set_kernel() { # PATH VALUE
  [[ -w $1 ]] || { echo "$1 cannot be set here"; return 1; }
  [[ -n ${settings[$1]:-} ]] || settings[$1]=$(sed 's/.*\[\(.*\)\].*/\1/' "$1")
  echo "$2" >"$1"
}
restore_kernel() {
  local path
  for path in "${!settings[@]}"; do echo "${settings[$path]}" >"$path"; done
  settings=()
}
pids=() loop="" group="" far=""
cleanup() {
  local at
  restore_kernel
  [[ -z $loop ]] || { swapoff "$loop" 2>/dev/null; losetup -d "$loop" 2>/dev/null; }
  for at in "${pids[@]}"; do kill "$at" 2>/dev/null || true; done
  [[ -z $far ]] || ip address delete "$far/32" dev lo 2>/dev/null || true
  for at in $(grep -F " $work/" /proc/self/mounts | cut -d' ' -f2 | sort -r); do umount -l "$at" 2>/dev/null || true; done
  [[ -z $group ]] || rmdir "$group" 2>/dev/null || true
  if [[ -n ${MODELFS_TEST_DOCTOR_KEEP:-} ]]; then echo "kept: $work"; else rm -rf --one-file-system "$work"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# ---- The machine.

make_root() {
  local file
  mkdir -p "$root"/{dev,proc,sys,tmp,mnt/models,bin,usr/bin,usr/local/bin,etc/modelfs,var/lib/modelfs,var/log/modelfs,srv}
  chmod 1777 "$root/tmp"
  cp "$modelfs" "$root/usr/local/bin/modelfs"
  for file in $(ldd "$modelfs" | grep -o '/[^ ]*'); do cp -L --parents "$file" "$root"; done
  for file in /bin/sh $(ldd /bin/sh | grep -o '/[^ ]*'); do cp -L --parents "$file" "$root"; done
  for file in fuse null zero urandom; do
    cp -a "/dev/$file" "$root/dev/$file"
    chmod 666 "$root/dev/$file"
  done
  # A client of HTTPS is made of what authorities there are, also where it then speaks to this machine in clear.
  cp -L --parents /etc/ssl/certs/ca-certificates.crt "$root"
  mount -t proc proc "$root/proc"
  mount --rbind /sys "$root/sys"
  mount --make-rslave "$root/sys"
  "$modelfs" keygen "$root/etc/modelfs/key" >/dev/null
  "$modelfs" keygen --signing "$work/sign" >/dev/null
  cp "$work/sign.pub" "$root/etc/modelfs/sign.pub"
  chmod 644 "$root/etc/modelfs/sign.pub"
  mkdir "$work/source"
  head -c 300000 /dev/urandom >"$work/source/weights.bin"
  "$modelfs" seal "$work/source" "$root/srv/store" acme/m --key "file:$root/etc/modelfs/key" --sign "$work/sign" >/dev/null
  cat >"$root/etc/modelfs.toml" <<TOML
key = ["file:/etc/modelfs/key"]
trust = ["/etc/modelfs/sign.pub"]
audit-file = "/var/log/modelfs/audit"
audit-file-bytes = "8MiB"
TOML
  cp "$root/etc/modelfs.toml" "$work/modelfs.toml"
}
chroot=("$(command -v chroot)")
around=() # what stands before the program: other rights, limits, namespaces
extra=()  # variables of its environment
limit=300 # seconds that it may take
here() { # COMMAND...: in that root, with nothing of our environment
  timeout "$limit" "${around[@]}" env -i PATH=/usr/local/bin:/usr/bin:/bin HOME=/ "${extra[@]}" "${chroot[@]}" "$root" "$@"
}
in_group() { # COMMAND...: in a memory cgroup of its own
  sh -c 'echo $$ >"$0/cgroup.procs" && exec "$@"' "$group" "$@"
}

# complaints [ARGUMENT...]: a line for each rule that complains, with how much. Left out is what changes by itself on a machine
# that does something else as well: the pieces its memory lies in, how quick a store is, and when its clock is first kept.
complaints() {
  local rc=0
  here modelfs doctor --json --cache 64MiB "$@" >"$work/json" 2>"$work/err" || rc=$?
  jq -es '.[0].findings' "$work/json" >/dev/null || { cat "$work/json" "$work/err" >&2; return 1; }
  # The exit status says the same as the findings.
  [[ $rc == 0 && $(jq .can_mount "$work/json") == true || $rc == 1 && $(jq .can_mount "$work/json") == false ]] ||
    { echo "exit status $rc, can_mount $(jq .can_mount "$work/json")" >&2; return 1; }
  jq -r '.findings[] | select(.severity != "fine") | "\(.rule) \(.severity)"' "$work/json" |
    grep -vxE 'fragmentation warning|store warning|clock info' | sort >"$work/lines" || true
  jq -e '[.findings[] | select(.severity != "fine" and .fix == null)] == []' "$work/json" >/dev/null ||
    { echo "a finding without a fix" >&2; return 1; }
  cat "$work/lines"
}
# only "RULE SEVERITY[,RULE SEVERITY...]" SPOIL MEND [ARGUMENT...]: what is new once SPOIL was done is just that, and it goes
# with MEND.
only() {
  local wanted spoil=$2 mend=$3 rc=0
  wanted=$(tr , '\n' <<<"$1" | sort)
  shift 3
  complaints "$@" >"$work/before" || return 1
  $spoil || { $mend; echo "cannot be spoiled"; return 1; }
  complaints "$@" >"$work/after" || rc=1
  cp "$work/json" "$work/spoiled"
  $mend || return 1
  [[ $rc == 0 ]] || return 1
  # A rule that said something before says something else now.
  local fresh gone
  fresh=$(comm -13 "$work/before" "$work/after")
  gone=$(comm -23 "$work/before" "$work/after" | cut -d' ' -f1 | grep -vxF -f <(cut -d' ' -f1 <<<"$wanted") || true)
  [[ $fresh == "$wanted" && -z $gone ]] || {
    echo "wanted:"; echo "$wanted"; echo "new:"; echo "$fresh"; echo "gone: $gone"
    jq -c '.findings[] | select(.severity != "fine")' "$work/spoiled"
    return 1
  }
  complaints "$@" >"$work/again" && diff "$work/before" "$work/again"
}
nothing() { :; }
until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || { echo "not within the time: $*"; return 1; }; sleep 0.2; done
}

step "a machine of our own" make_root
healthy() {
  complaints >"$work/before" || return 1
  cat "$work/before"
  # What one kernel or another lacks is no error; nothing of ours is wrong.
  ! grep -E ' error$' "$work/before" || return 1
  ! grep -E '^(configuration|trust|verify|secret-files|trusted-files|folders|program|set-id|world-writable|state-room|audit-room) ' "$work/before"
}
step "doctor: a healthy machine has no error, and nothing of ours complains" healthy

# ---- The kernel, the rights, memory.

gone() { mv "$root/$1" "$root/$1.gone"; }
back() { mv "$root/$1.gone" "$root/$1"; }
no_fuse() { gone dev/fuse; }
fuse_back() { back dev/fuse; }
step "doctor: no /dev/fuse" only "fuse-device error" no_fuse fuse_back

little_lock() { around=(prlimit --memlock=65536 setpriv --bounding-set=-ipc_lock); }
usual() { around=() extra=(); }
step "doctor: too little memory may be locked" only "memlock error" little_lock usual

no_admin() { around=(setpriv --bounding-set=-sys_admin); }
with_helper() { cp "$root/bin/sh" "$root/usr/bin/fusermount3"; }
without_admin() {
  with_helper
  only "passthrough warning$([[ $(cat /sys/kernel/mm/transparent_hugepage/shmem_enabled) != *'[never]'* ]] || echo ",huge-pages warning")" \
    no_admin usual || { rm "$root/usr/bin/fusermount3"; return 1; }
  no_admin
  helper_gone() { gone usr/bin/fusermount3; }
  helper_back() { back usr/bin/fusermount3; }
  only "mount-right error" helper_gone helper_back
  local rc=$?
  usual
  rm "$root/usr/bin/fusermount3"
  return $rc
}
step "doctor: no CAP_SYS_ADMIN costs passthrough; without fusermount3 too, no mount is possible" without_admin

namespace() { around=(unshare --user --map-root-user); }
poor() { around=(setpriv "--bounding-set=-sys_admin,-ipc_lock"); }
user_namespace() {
  unshare --user --map-root-user true 2>/dev/null || { echo "no user namespaces here"; return 0; }
  poor
  only "privileges info" namespace poor
  local rc=$?
  usual
  return $rc
}
step "doctor: root of a user namespace is told apart from an ordinary user" user_namespace

cgroup_root=/sys/fs/cgroup
[[ -e $cgroup_root/cgroup.controllers ]] || cgroup_root=/sys/fs/cgroup/unified
if grep -qw memory "$cgroup_root/cgroup.subtree_control" 2>/dev/null && mkdir "$cgroup_root/modelfs-doctor-$$" 2>/dev/null; then
  group=$cgroup_root/modelfs-doctor-$$
  confined() { echo $((200 << 20)) >"$group/memory.max" && around=(in_group); }
  step "doctor: a memory cgroup too small for the cache" only "cache-room warning" confined usual
else
  not_here "doctor: a memory cgroup too small for the cache" "no memory controller of cgroup v2 here"
fi

swap_on() {
  truncate -s 32M "$work/swap" && fallocate -l 32M "$work/swap" && chmod 600 "$work/swap" && mkswap -q "$work/swap" &&
    loop=$(losetup -f --show "$work/swap") && swapon "$loop"
}
swap_off() { swapoff "$loop"; losetup -d "$loop"; loop=""; }
if (($(wc -l </proc/swaps) > 1)); then
  not_here "doctor: swap is on" "it is, whatever this does"
elif swap_on 2>"$work/why"; then
  swap_off
  step "doctor: swap is on" only "swap info" swap_on swap_off
else
  [[ -z $loop ]] || { losetup -d "$loop"; loop=""; }
  not_here "doctor: swap is on" "$(tail -1 "$work/why")"
fi

# From a value that nothing is said of, whatever this machine has.
setting() { # PATH GOOD VALUE EXPECTED NAME
  path=$1 good=$2 value=$3
  spoil_setting() { set_kernel "$path" "$value"; }
  mend_setting() { set_kernel "$path" "$good"; }
  from_good() {
    local rc=0
    mend_setting && only "$1" spoil_setting mend_setting || rc=1
    restore_kernel
    return $rc
  }
  if [[ -w $path ]]; then step "doctor: $5" from_good "$4"; else not_here "doctor: $5" "no $path"; fi
}
# From the value that docs/HARDENING.md sets to what distributions have.
cores_go_somewhere() {
  local cores=/proc/sys/kernel/core_pattern pattern rc=0
  nowhere() { set_kernel "$cores" '|/bin/false'; }
  somewhere() { set_kernel "$cores" "$pattern"; }
  nowhere && complaints >"$work/lines2" && ! grep '^core-pattern' "$work/lines2" || rc=1
  for pattern in core '/var/crash/core.%p' '|/usr/lib/systemd/systemd-coredump %P'; do
    [[ $rc == 0 ]] || break
    only "core-pattern info" somewhere nowhere || rc=1
  done
  restore_kernel
  return $rc
}
if [[ -w /proc/sys/kernel/core_pattern ]]; then
  step "doctor: cores are written or piped anywhere but to false" cores_go_somewhere
else
  not_here "doctor: cores are written or piped anywhere but to false" "no /proc/sys/kernel/core_pattern"
fi
setting /proc/sys/fs/suid_dumpable 0 1 "set-id-dumps warning" "set-uid programs leave cores"
setting /proc/sys/fs/suid_dumpable 0 2 "set-id-dumps info" "set-uid programs leave cores for root"
setting /proc/sys/kernel/yama/ptrace_scope 1 0 "ptrace-scope info" "anyone may debug his own"
# Less weighs what the kernel zeroes then.
setting /proc/sys/kernel/io_uring_disabled 0 2 "io-uring $(grep -qw init_on_free=1 /proc/cmdline && echo info || echo warning)" \
  "io_uring is off, and lock cannot wipe"
setting /sys/kernel/mm/transparent_hugepage/shmem_enabled advise deny "huge-pages warning" "huge pages are forbidden"

# ---- Files.

change_mode() { # PATH MODE EXPECTED NAME
  path=$root/$1 mode=$2
  old_mode=$(stat -c %a "$path")
  spoil_mode() { chmod "$mode" "$path"; }
  mend_mode() { chmod "$old_mode" "$path"; }
  step "doctor: $4" only "$3" spoil_mode mend_mode
}
change_owner() { # PATH EXPECTED NAME
  path=$root/$1
  spoil_owner() { chown 65534 "$path"; }
  mend_owner() { chown 0 "$path"; }
  step "doctor: $3" only "$2" spoil_owner mend_owner
}
change_mode etc/modelfs/key 644 "secret-files error" "everybody reads the key"
change_mode etc/modelfs/key 660 "secret-files error" "a group writes the key"
change_owner etc/modelfs/key "secret-files error" "the key is another's"
key_gone() { gone etc/modelfs/key; }
key_back() { back etc/modelfs/key; }
step "doctor: the key is not there" only "secret-files error" key_gone key_back
change_mode etc/modelfs/sign.pub 664 "trusted-files error" "others write whom to trust"
change_owner etc/modelfs/sign.pub "trusted-files error" "whom to trust is another's"
change_mode etc/modelfs.toml 666 "configuration error" "others write the configuration"
change_mode var/lib 777 "folders warning" "others write in a folder above what was seen"
change_mode etc/modelfs 777 "folders warning,world-writable warning" "others write in the folder of the key"
change_mode var/lib/modelfs 777 "folders warning" "others write in the folder of what was seen"
linked() { mkdir "$root/srv/shared" && mv "$root/etc/modelfs" "$root/srv/shared/" && ln -s /srv/shared/modelfs "$root/etc/modelfs" && chmod 777 "$root/srv/shared"; }
unlinked() { rm "$root/etc/modelfs" && mv "$root/srv/shared/modelfs" "$root/etc/" && rmdir "$root/srv/shared"; }
step "doctor: the folder of the key is a link to where others write" only "folders warning" linked unlinked
change_mode usr/local/bin/modelfs 4755 "program warning" "the program is set-uid"
change_owner usr/local/bin/modelfs "program warning" "the program is another's"
plant() { cp "$root/bin/sh" "$root/$planted" && chmod "$planted_mode" "$root/$planted"; }
unplant() { rm "$root/$planted"; }
planted=etc/modelfs/helper planted_mode=4755
step "doctor: a set-uid program beside the key" only "set-id warning" plant unplant
planted=usr/local/bin/notes planted_mode=666
step "doctor: a file that everybody writes beside the program" only "world-writable warning" plant unplant
image() {
  touch "$root/.dockerenv"
  planted=usr/bin/su planted_mode=4755
  only "set-id info" plant unplant || return 1
  planted=srv/data planted_mode=666
  only "world-writable warning" plant unplant || return 1
  planted=srv/helper planted_mode=6755
  only "set-id warning" plant unplant || return 1
  # The kernel ignores the bits for whoever gave up new privileges.
  planted=usr/bin/su planted_mode=4755
  plant
  let_go() { around=(setpriv --no-new-privs); }
  complaints >"$work/before"
  let_go
  complaints >"$work/after"
  usual
  unplant
  rm "$root/.dockerenv"
  [[ $(comm -23 "$work/before" "$work/after") == "set-id info" && -z $(comm -13 "$work/before" "$work/after") ]]
}
step "doctor: an image is looked at whole; its own set-uid programs do nothing under no_new_privs" image

# Weights, by a name that says nothing.
mkdir "$root/opt"
python3 - "$work/planted" <<'PYTHON'
import json, sys
bytes = 2 << 20
head = json.dumps({"w": {"dtype": "BF16", "shape": [1024, 1024], "data_offsets": [0, bytes]}}).encode()
open(sys.argv[1], "wb").write(len(head).to_bytes(8, "little") + head + b"\1" * bytes)
PYTHON
weights_in() { cp "$work/planted" "$root/opt/asset-7"; }
weights_out() { rm "$root/opt/asset-7"; }
marked() { touch "$root/.dockerenv"; }
unmarked() { rm -f "$root/.dockerenv"; }
weights_in_image() {
  marked
  only "baked-models warning" weights_in weights_out || { unmarked; return 1; }
  unmarked
  jq -e '.findings[] | select(.rule == "baked-models") | .seen | contains("/opt/asset-7")' "$work/spoiled" >/dev/null
}
step "doctor: weights in an image are found by what they are" weights_in_image
# As containerd leaves it: nothing but layers at /.
weights_in_layers() {
  local rc=0 lower=$root
  mkdir -p "$work"/{upper,layers-work,layers}
  weights_in
  mount -t overlay -o "lowerdir=$root,upperdir=$work/upper,workdir=$work/layers-work" layers "$work/layers" || { weights_out; return 1; }
  mount -t proc proc "$work/layers/proc"
  root=$work/layers
  exits_with 26 here modelfs doctor --rule baked-models --strict >"$work/out" 2>&1 && grep '/opt/asset-7' "$work/out" || rc=1
  root=$lower
  umount "$work/layers/proc" "$work/layers"
  weights_out
  return $rc
}
step "doctor: a root of layers is an image without any other mark" weights_in_layers
# What we may not read is not clean; what is too small for weights need not be read.
unseen_in_image() {
  local rc=0
  marked
  chmod -R a+rX "$root/srv/store"
  chroot+=(--userspec=65534:65534)
  looks() { # CODE
    exits_with "$1" here modelfs doctor --rule baked-models --strict --all >"$work/out" 2>&1 || { cat "$work/out"; return 1; }
  }
  install -m 600 /dev/null "$root/opt/small"
  looks 0 || rc=1
  mkdir -m 700 "$root/opt/closed"
  looks 26 && grep '/opt/closed could not be read' "$work/out" && grep 'chmod a+rX /opt/closed' "$work/out" || rc=1
  mkdir -m 700 "$root/opt/another"
  looks 26 && grep '2 places could not be read: /opt/another, /opt/closed' "$work/out" && grep 'chmod a+rX /opt/another /opt/closed' "$work/out" || rc=1
  rmdir "$root/opt/another"
  chmod 755 "$root/opt/closed" && looks 0 || rc=1
  install -m 600 "$work/planted" "$root/opt/closed/asset"
  looks 26 && grep '/opt/closed/asset could not be read' "$work/out" || rc=1
  chmod 644 "$root/opt/closed/asset" && looks 26 && grep 'baked-models .*/opt/closed/asset' "$work/out" || rc=1
  rm -r "$root/opt/closed" "$root/opt/small"
  unset 'chroot[1]'
  unmarked
  return $rc
}
step "doctor: what of an image cannot be read fails a strict check" unseen_in_image

full() { mount -t tmpfs -o size=2m,mode=755 full "$root/$place"; }
free_again() { umount "$root/$place"; }
place=var/lib/modelfs
step "doctor: no room for what was seen" only "state-room warning" full free_again
place=var/log/modelfs
step "doctor: no room for the audit log" only "audit-room warning" full free_again

say() { echo "$words" >>"$root/etc/modelfs.toml"; }
unsay() { cp "$work/modelfs.toml" "$root/etc/modelfs.toml"; }
words='verify = "aead"'
step "doctor: chunks are believed by their tags" only "verify warning" say unsay
words='verfy = "strict"'
step "doctor: the configuration has an option that is none" only "configuration error" say unsay
words='trust-on-first-use = true'
step "doctor: the configuration contradicts itself" only "configuration error" say unsay
words='umask = "999"'
step "doctor: the configuration has a value that is none" only "configuration error" say unsay
words='model = ["acme/m"]
require = ["acme/other"]'
step "doctor: the configuration requires what it leaves out" only "configuration error" say unsay
unsaid() { sed "/^$left_out = /d" "$work/modelfs.toml" >"$root/etc/modelfs.toml"; }
left_out=trust
step "doctor: a store is named, and nobody whose signature is believed" only "configuration error" unsaid unsay file:///srv/store
left_out=key
step "doctor: a store is named, and no key" only "configuration error" unsaid unsay file:///srv/store
step "doctor: no store is named yet, and no key" only "configuration info" unsaid unsay
first_use() { sed 's/^trust = .*/trust-on-first-use = true/' "$work/modelfs.toml" >"$root/etc/modelfs.toml"; }
step "doctor: whoever signed first is believed" only "trust warning" first_use unsay

# ---- A mount.

mount_here() {
  limit=3600 here modelfs mount file:///srv/store /mnt/models --cache 64MiB >"$work/mount.log" 2>&1 &
  pids+=($!)
  mount_pid=$!
  until_true 60 grep -q " $root/mnt/models fuse" /proc/self/mounts || { cat "$work/mount.log"; return 1; }
  device=$(awk -v at="$root/mnt/models" '$5 == at {print $3}' /proc/self/mountinfo)
  # As machines have it; it tells of connections what nothing else does.
  [[ -e $root/sys/fs/fuse/connections/${device#*:} ]] || mount -t fusectl fusectl "$root/sys/fs/fuse/connections"
}
unmount_here() { umount "$root/mnt/models" && wait "$mount_pid"; }
less_ahead() { echo 128 >"/sys/class/bdi/$device/read_ahead_kb"; }
more_ahead() { echo 1024 >"/sys/class/bdi/$device/read_ahead_kb"; }
few_reads() { echo 12 >"$root/sys/fs/fuse/connections/${device#*:}/max_background"; }
many_reads() { echo 65535 >"$root/sys/fs/fuse/connections/${device#*:}/max_background"; }
step "a mount on that machine" mount_here
step "doctor: a mount reads too little ahead" only "read-ahead warning" less_ahead more_ahead /mnt/models
step "doctor: a mount may have few reads under way" only "background warning" few_reads many_reads /mnt/models
step "the mount is taken off" unmount_here

# ---- A store.

store_gone() { gone srv/store; }
store_back() { back srv/store; }
step "doctor: the folder of the store is not there" only "store error" store_gone store_back file:///srv/store

# An address that is not of the loopback network: what is sent there could have to cross one. Nobody outside reaches it.
if command -v ip >/dev/null && ip address add 198.51.100.1/32 dev lo 2>/dev/null; then far=198.51.100.1; fi
good_key=(AWS_ACCESS_KEY_ID=modelfs-tests AWS_SECRET_ACCESS_KEY=not-a-secret-of-anyone AWS_REGION=us-east-1)
start_gateway() {
  mkdir -p "$work/s3/models"
  ROOT_ACCESS_KEY=modelfs-tests ROOT_SECRET_KEY=not-a-secret-of-anyone \
    "$gateway" --port "127.0.0.1:$s3_port" --quiet posix "$work/s3" >>"$work/s3.log" 2>&1 &
  gateway_pid=$!
  pids+=($!)
  until_true 120 curl --silent --output /dev/null "http://127.0.0.1:$s3_port"
}
stop_gateway() { kill "$gateway_pid"; wait "$gateway_pid" 2>/dev/null || true; }
knows() { extra=("${good_key[@]}"); }
stranger() { extra=("${good_key[@]}" AWS_SECRET_ACCESS_KEY=a-secret-of-someone-else); }
listener() { # never answers
  python3 -c 'import socket, sys, time
s = socket.socket(); s.bind(("127.0.0.1", int(sys.argv[1]))); s.listen(9); time.sleep(600)' "$s3_port" &
  pids+=($!)
  listener_pid=$!
}
if [[ -x $gateway ]]; then
  s3_port=$(free_port)
  at=(--s3-endpoint "http://127.0.0.1:$s3_port" --wait 15s)
  step "start an S3 server" start_gateway
  seal_there() {
    env "${good_key[@]}" "$modelfs" seal "$work/source" s3://models/prod acme/m --s3-endpoint "http://127.0.0.1:$s3_port" \
      --key "file:$root/etc/modelfs/key" --sign "$work/sign" >/dev/null
  }
  step "a model in it" seal_there
  knows
  store_is_fine() {
    complaints s3://models/prod "${at[@]}" >"$work/lines2" && ! grep -E '^(store|clock-skew)' "$work/lines2" &&
      jq -e '[.findings[] | select(.rule == ("store", "store-access", "store-tls", "clock-skew"))] | length == 4' "$work/json"
  }
  step "doctor: a store in S3 with its model and its clock" store_is_fine
  step "doctor: credentials that the store does not know" only "store-access error" stranger knows s3://models/prod "${at[@]}"
  empty_bucket() { complaints s3://models/nothing "${at[@]}" >"$work/lines2" && grep -x 'store-access info' "$work/lines2"; }
  step "doctor: a store without a model" empty_bucket
  no_bucket() { complaints s3://no-such-bucket "${at[@]}" >"$work/lines2" && grep -x 'store-access error' "$work/lines2"; }
  step "doctor: a bucket that is not there" no_bucket
  step "doctor: the store is away" only "store error" stop_gateway start_gateway s3://models/prod "${at[@]}"
  hangs() { stop_gateway && listener; }
  answers_again() { kill "$listener_pid"; wait "$listener_pid" 2>/dev/null || true; start_gateway; }
  step "doctor: the store takes connections and never answers" only "store error" hangs answers_again s3://models/prod "${at[@]}"
  stop_gateway
  if [[ -n $far ]]; then
    near_store() { extra=("${good_key[@]}" MODELFS_S3_ENDPOINT="http://127.0.0.1:$s3_port"); }
    far_store() { extra=("${good_key[@]}" AWS_ALLOW_HTTP=true MODELFS_S3_ENDPOINT="http://$far:$s3_port"); }
    near_store
    both_gateways() {
      start_gateway || return 1
      ROOT_ACCESS_KEY=modelfs-tests ROOT_SECRET_KEY=not-a-secret-of-anyone \
        "$gateway" --port "$far:$s3_port" --quiet posix "$work/s3" >>"$work/s3.log" 2>&1 &
      far_gateway_pid=$!
      pids+=($!)
      until_true 60 curl --silent --output /dev/null "http://$far:$s3_port"
    }
    step "the S3 server at an address outside the loopback network" both_gateways
    step "doctor: a store that is spoken to in clear" only "store-tls warning" far_store near_store s3://models/prod --wait 5s
    kill "$far_gateway_pid"
    stop_gateway
  else
    not_here "doctor: a store that is spoken to in clear" "no address can be added to lo"
  fi
  usual
else
  skip "doctor: S3" "$gateway is not installed"
fi

# ---- Vault.

vault_port=$(free_port)
admin() { VAULT_ADDR=http://127.0.0.1:$vault_port VAULT_TOKEN=$root_token "$vault" "$@"; }
start_vault() {
  "$vault" server -config="$work/vault.hcl" >>"$work/vault.log" 2>&1 &
  vault_pid=$!
  pids+=($!)
  until_true 120 curl -fsS -o /dev/null "http://127.0.0.1:$vault_port/v1/sys/health?sealedcode=200&uninitcode=200"
}
stop_vault() { kill "$vault_pid"; wait "$vault_pid" 2>/dev/null || true; }
unseal() { VAULT_ADDR=http://127.0.0.1:$vault_port "$vault" operator unseal "$unseal_key" >/dev/null && until_true 120 admin token lookup; }
seal_vault() { admin operator seal >/dev/null; }
start_and_unseal() { start_vault && unseal; }
token() { # OPTION...: a token of that kind is the one that is used
  admin token create -field=token "$@" >"$root/etc/modelfs/token" && chmod 600 "$root/etc/modelfs/token"
}
prepare_vault() {
  local answer
  mkdir "$work/vault"
  cat >"$work/vault.hcl" <<HCL
storage "file" { path = "$work/vault" }
listener "tcp" { address = "127.0.0.1:$vault_port" tls_disable = true }
$([[ -z $far ]] || echo "listener \"tcp\" { address = \"$far:$vault_port\" tls_disable = true }")
disable_mlock = true
HCL
  start_vault || return 1
  answer=$(VAULT_ADDR=http://127.0.0.1:$vault_port "$vault" operator init -key-shares=1 -key-threshold=1 -format=json)
  root_token=$(jq -r .root_token <<<"$answer") unseal_key=$(jq -r '.unseal_keys_b64[0]' <<<"$answer")
  unseal && admin secrets enable transit >/dev/null && admin write -f transit/keys/models derived=true >/dev/null &&
    echo 'path "transit/decrypt/models" { capabilities = ["update"] }' | admin policy write server - >/dev/null &&
    token -policy=server -period=24h
}
if [[ -x $vault ]]; then
  step "start Vault, with a key and a token for servers" prepare_vault
  at=(--vault-addr "http://127.0.0.1:$vault_port" --vault-token-file /etc/modelfs/token --key vault-transit:transit/models --wait 15s)
  vault_is_fine() {
    complaints "${at[@]}" >"$work/lines2" && ! grep -E '^(vault|clock-skew)' "$work/lines2" &&
      jq -e '[.findings[] | select(.rule == ("vault", "vault-tls", "vault-token", "vault-rights", "clock-skew"))] | length == 5' "$work/json"
  }
  step "doctor: Vault as it should be" vault_is_fine
  step "doctor: Vault is sealed" only "vault error" seal_vault unseal "${at[@]}"
  step "doctor: Vault is away" only "vault error" stop_vault start_and_unseal "${at[@]}"
  good_token() { token -policy=server -period=24h; }
  root_one() { echo "$root_token" >"$root/etc/modelfs/token"; }
  step "doctor: a root token" only "vault-token warning" root_one good_token "${at[@]}"
  revoked() { admin token revoke "$(cat "$root/etc/modelfs/token")" >/dev/null; }
  step "doctor: a token that was revoked" only "vault-token error" revoked good_token "${at[@]}"
  expired() { token -policy=server -ttl=1s && until_true 120 expired_now; }
  expired_now() { ! VAULT_ADDR=http://127.0.0.1:$vault_port VAULT_TOKEN=$(cat "$root/etc/modelfs/token") "$vault" token lookup; }
  step "doctor: a token that has expired" only "vault-token error" expired good_token "${at[@]}"
  short() { token -policy=server -ttl=300s -renewable=false; }
  step "doctor: a token that ends soon and cannot be renewed" only "vault-token warning" short good_token "${at[@]}"
  rightless() { token -policy=default -period=24h; }
  step "doctor: a token without the right to the key" only "vault-rights error" rightless good_token "${at[@]}"
  floor_policy() { # CAPABILITY...: what servers may do with floors
    printf 'path "transit/decrypt/models" { capabilities = ["update"] }\npath "secret/data/floor/*" { capabilities = ["%s"] }\n' "$1" |
      admin policy write server - >/dev/null
  }
  floor_shut() { floor_policy deny; }
  floor_open() { floor_policy read; }
  step "a policy that lets floors be read" floor_open
  step "doctor: a token without the right to the floor" \
    only "vault-rights error" floor_shut floor_open "${at[@]}" --floor vault-kv:secret/floor
  if [[ -n $far ]]; then
    near_vault() { extra=(VAULT_ADDR="http://127.0.0.1:$vault_port"); }
    far_vault() { extra=(VAULT_ADDR="http://$far:$vault_port" MODELFS_VAULT_PLAIN_HTTP=true); }
    near_vault
    step "doctor: Vault is spoken to in clear" only "vault-tls warning" far_vault near_vault "${at[@]:2}"
    usual
  else
    not_here "doctor: Vault is spoken to in clear" "no address can be added to lo"
  fi
  open_token() { chmod 644 "$root/etc/modelfs/token"; }
  close_token() { chmod 600 "$root/etc/modelfs/token"; }
  step "doctor: everybody reads the token" only "secret-files error,vault-token error" open_token close_token "${at[@]}"
  stop_vault
else
  skip "doctor: Vault" "$vault is not installed"
fi

# A clock that is wrong, imitated: something that answers as Vault does, with a date of our choice.
cat >"$work/dated.py" <<'PYTHON'
import http.server, json, sys
from email.utils import formatdate
import time
ahead = int(sys.argv[2])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"initialized": True, "sealed": False, "version": "1.13.0"}).encode()
        self.send_response_only(200 if self.path.startswith("/v1/sys/health") else 403)
        self.send_header("Date", formatdate(time.time() + ahead, usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
PYTHON
dated() { # SECONDS
  python3 "$work/dated.py" "$vault_port" "$1" &
  dated_pid=$!
  pids+=($!)
  until_true 120 curl -fsS -o /dev/null "http://127.0.0.1:$vault_port/v1/sys/health"
}
undated() { kill "$dated_pid"; wait "$dated_pid" 2>/dev/null || true; }
wrong_clock() {
  late() { undated && dated -7200; }
  right() { undated && dated 0; }
  echo some-token >"$root/etc/modelfs/token"
  chmod 600 "$root/etc/modelfs/token"
  dated 0 && only "clock-skew warning" late right --vault-addr "http://127.0.0.1:$vault_port" --vault-token-file /etc/modelfs/token
  local rc=$?
  undated
  return $rc
}
step "doctor: another clock says another time (imitated)" wrong_clock

# ---- What follows from it.

exits_as_said() {
  exits_with 0 here modelfs doctor --rule secret-files >/dev/null || return 1
  exits_with 2 here modelfs doctor --rule no-such-rule 2>"$work/err" || return 1
  grep -q 'secret-files' "$work/err" || return 1
  exits_with 2 here modelfs doctor s3://models/prod?x=1 2>/dev/null || return 1
  chmod 644 "$root/etc/modelfs/key"
  exits_with 1 here modelfs doctor --rule secret-files >"$work/out" 2>/dev/null || return 1
  grep -q 'do: chmod 600 /etc/modelfs/key' "$work/out" || return 1
  exits_with 26 here modelfs doctor --rule secret-files --strict >/dev/null 2>&1 || return 1
  # The fix that is told is a command that mends it.
  here sh -c ':' && chmod 600 "$root/etc/modelfs/key"
  exits_with 0 here modelfs doctor --rule secret-files --strict >/dev/null 2>&1 || return 1
  chmod 777 "$root/var/lib"
  exits_with 0 here modelfs doctor --rule folders >/dev/null || return 1
  exits_with 26 here modelfs doctor --rule folders --strict >/dev/null 2>&1 || return 1
  extra=(STRICT_MODEL_SECURITY=true)
  exits_with 26 here modelfs doctor --rule folders >/dev/null 2>&1 || return 1
  usual
  chmod 755 "$root/var/lib"
}
step "doctor: 0, 1, 2 and 26 as the page says" exits_as_said

fixes_work() { # every chmod that is told is run as told, in the machine it is told of
  local fix
  chmod 644 "$root/etc/modelfs/key"
  chmod 664 "$root/etc/modelfs/sign.pub"
  chmod 777 "$root/var/lib"
  planted=etc/modelfs/helper planted_mode=4777
  plant
  mkdir -p "$root/bin"
  cp -L /bin/chmod "$root/bin/chmod"
  for fix in $(ldd /bin/chmod | grep -o '/[^ ]*'); do cp -L --parents "$fix" "$root"; done
  here modelfs doctor --json >"$work/json" 2>/dev/null || true
  jq -r '.findings[] | select(.rule == ("secret-files", "trusted-files", "folders", "set-id", "world-writable")) | .fix // empty' \
    "$work/json" >"$work/fixes"
  cat "$work/fixes"
  [[ $(wc -l <"$work/fixes") == 5 ]] || return 1
  while read -r fix; do here sh -c "$fix" || return 1; done <"$work/fixes"
  complaints >"$work/after" && unplant && ! grep -E '^(secret-files|trusted-files|folders|set-id|world-writable) ' "$work/after"
}
step "doctor: the commands that it tells mend what it found" fixes_work

run_here() { here modelfs run file:///srv/store /mnt/models "$@" >"$work/out" 2>"$work/err"; }
checked_run() {
  planted=etc/modelfs/helper planted_mode=4755
  exits_with 0 run_here --strict -- /bin/sh -c 'echo started' || { cat "$work/err"; return 1; }
  grep -qx started "$work/out" || return 1
  plant
  exits_with 26 run_here --strict -- /bin/sh -c 'echo started' || { unplant; cat "$work/err"; return 1; }
  [[ ! -s $work/out ]] && grep -q '/etc/modelfs/helper' "$work/err" && grep -q 'nothing was started' "$work/err" || return 1
  exits_with 0 run_here -- /bin/sh -c 'echo started' || { unplant; cat "$work/err"; return 1; }
  grep -qx started "$work/out" && grep -q '/etc/modelfs/helper' "$work/err" || return 1
  unplant
}
step "run: a command is started on a healthy machine; with --strict not beside a set-uid program" checked_run
# Nothing of this root tells that it is an image.
checked_image() {
  local say_it
  [[ ! -e $root/.dockerenv ]] || return 1
  weights_in
  for say_it in "--strict" ""; do
    extra=() && [[ -n $say_it ]] || extra=(STRICT_MODEL_SECURITY=true)
    # shellcheck disable=SC2086
    exits_with 26 run_here $say_it -- /bin/sh -c 'echo started' || { usual; weights_out; cat "$work/err"; return 1; }
    [[ ! -s $work/out ]] && grep 'baked-models: /opt/asset-7' "$work/err" && grep 'nothing was started' "$work/err" || { usual; weights_out; return 1; }
  done
  # Without it the first process tells of them, and goes on.
  usual
  around=(unshare --pid --fork --kill-child)
  exits_with 0 run_here -- /bin/sh -c 'echo started' || { usual; weights_out; cat "$work/err"; return 1; }
  usual
  weights_out
  grep -x started "$work/out" && grep 'WARN.*baked-models: /opt/asset-7' "$work/err" || { cat "$work/err"; return 1; }
  # The same without them.
  exits_with 0 run_here --strict -- /bin/sh -c 'echo started' || { cat "$work/err"; return 1; }
  grep -x started "$work/out" && ! grep baked-models "$work/err"
}
step "run: weights in the image are told, and with strict model security the command is not started" checked_image

# ---- The page.

export STORE=$root/srv/store KEY=$root/etc/modelfs/key TRUST=$root/etc/modelfs/sign.pub MNT=$work/mnt
mkdir -p "$MNT" "$work/bin"
cp "$modelfs" "$work/bin/modelfs"
export PATH=$work/bin:$PATH
for block in doctor json run; do step "docs/DOCTOR.md: $block" run_page_block "$page" $block; done
finish
