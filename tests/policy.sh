#!/usr/bin/env bash
# Who lists, who opens, who is refused, on the host and in containers, and each refusal in the audit log.
#
#   tests/policy.sh      needs the release build (MODELFS names another binary), root, and tests/parts/install.sh podman
#
# The policy and the commands are those of docs/ACCESS.md, taken out of that page as they stand. Everything happens in a mount
# namespace of the test's own, so that /etc/modelfs and /var/log/modelfs are the page's and not the host's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
page=$PWD/docs/ACCESS.md
if [[ ! -x $modelfs ]]; then
  step "policy: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
lacking=""
[[ $EUID == 0 ]] || lacking="this is not root"
[[ -c /dev/fuse ]] || lacking="this machine has no /dev/fuse"
for command in setpriv podman busybox; do command -v $command >/dev/null || lacking="$command is not installed"; done
[[ -z $lacking ]] || { skip policy "$lacking"; finish; exit; }

if [[ ${MODELFS_POLICY_INSIDE:-} != "$$" ]]; then
  made=()
  for folder in /etc/modelfs /var/log/modelfs; do
    [[ -d $folder ]] || { mkdir -p $folder; made+=("$folder"); }
  done
  rc=0
  unshare --mount --propagation private \
    bash -c 'MODELFS_POLICY_INSIDE=$$ exec bash "$@"' _ "$PWD/tests/policy.sh" "$@" || rc=$?
  [[ ${#made[@]} == 0 ]] || rmdir "${made[@]}" 2>/dev/null || true
  finish || true
  exit $rc
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-policy.XXXXXX")
chmod 755 "$work"
mkdir -p "$work"/{bin,etc,log,home,source,mnt,images/box,podman,containers}
mount --bind "$work/etc" /etc/modelfs
mount --bind "$work/log" /var/log/modelfs
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|CONTAINER)_' | grep -v '^MODELFS_TEST_'); do unset "$name"; done
export HOME=$work/home XDG_CONFIG_HOME=$work/home/.config MODELFS_STATE_DIR=$work/home/state
ln -s "$modelfs" "$work/bin/modelfs"
export PATH=$work/bin:$PATH LC_ALL=C
export STORE=$work/store MOUNTPOINT=$work/mnt KEY=file:$work/home/model.key SOURCE=$work/source
export TRUST=$XDG_CONFIG_HOME/modelfs/signing.key.pub
log=/var/log/modelfs/audit.log

groups_at="" # a hierarchy of control groups in which groups can be made

cleanup() {
  podman ps -aq 2>/dev/null | xargs -r podman rm -f -t 0 >/dev/null 2>&1 || true
  modelfs umount "$MOUNTPOINT" >/dev/null 2>&1 || umount -l "$MOUNTPOINT" 2>/dev/null || true
  umount /etc/modelfs /var/log/modelfs 2>/dev/null || true
  if [[ -n $groups_at ]]; then
    local group
    for group in a/worker a b c; do until_true 10 rmdir "$groups_at/modelfs-policy-$$-$group" || true; done
  fi
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || { echo "never came true: $*"; return 1; }; sleep 0.1; done
}
is_mounted() { awk -v at="$MOUNTPOINT" '$5 == at {found = 1} END {exit !found}' /proc/self/mountinfo; }

# ---- Models, a policy, a mount.

seal_models() {
  echo '{"layers": 2}' >"$SOURCE/config.json"
  head -c 3000000 /dev/urandom >"$SOURCE/model.safetensors"
  modelfs keygen "$work/home/model.key" || return 1
  run_page_block "$page" seal || return 1
  local name
  for name in open/base shown/next lone/secret; do modelfs seal "$SOURCE" "$STORE" $name --key "$KEY" >/dev/null || return 1; done
}
pickles_are_not_sealed() {
  local said
  mkdir -p "$work/spoiled" && printf '\x80\x04\x95.' >"$work/spoiled/weights.safetensors" || return 1
  if said=$(SOURCE=$work/spoiled run_page_block "$page" seal 2>&1); then echo "sealed: $said"; return 1; fi
  [[ $said == *weights.safetensors*pickle* ]] || { echo "$said"; return 1; }
}
policy() { # BLOCK...: the page's policies of these names as one file, the rules of the one called policy
  local block
  # So that a matrix of refusals blocks nobody.
  [[ " $* " == *" denials "* ]] || printf '[denials]\ncount = 1000\n' >/etc/modelfs/policy.toml
  [[ " $* " != *" denials "* ]] || : >/etc/modelfs/policy.toml
  for block; do
    if [[ $block == policy ]]; then page_block "$page" toml policy; else page_block "$page" toml "$block" | sed '/^\[\[rule\]\]/,$d'; fi
  done >>/etc/modelfs/policy.toml
}
mount_as_the_page_says() {
  policy policy || return 1
  local command
  command=$(page_block "$page" sh mount) || return 1
  (eval "$command") >"$work/daemon.log" 2>&1 &
  until_true 120 is_mounted || { cat "$work/daemon.log"; return 1; }
}

# ---- The matrix. WHO: uid, gid, supplementary groups or -.

as() { # UID GID GROUPS COMMAND...
  local groups=(--clear-groups)
  [[ $3 == - ]] || groups=(--groups "$3")
  setpriv --reuid "$1" --regid "$2" "${groups[@]}" -- "${@:4}" 2>&1
}
wants() { # WANTED COMMAND...: reads, sees nothing of it, or is refused it
  local wanted=$1 said rc=0
  shift
  said=$("$@") || rc=$?
  case $wanted in
    reads) [[ $rc == 0 && $said == *'"layers": 2'* ]] ;;
    lists) [[ $rc == 0 ]] ;;
    absent) [[ $rc != 0 && $said == *"No such file"* ]] ;;
    refused) [[ $rc != 0 && $said == *"Permission denied"* ]] ;;
  esac || { echo "wanted $wanted, exit $rc: $said: $*"; return 1; }
}
names() { # EXPECTED COMMAND...: what is listed, sorted, in one line
  local wanted=$1 said
  shift
  said=$("$@" | sort | tr '\n' ' ')
  [[ ${said% } == "$wanted" ]] || { echo "listed '${said% }', wanted '$wanted': $*"; return 1; }
}
trainers=("4301 4301 4300" "4302 4300 -")
outsiders=("4303 4303 -" "0 0 -")
on_the_host() {
  local who bad=0
  # Twice: each is asked before and after somebody whose answer is another.
  for _ in 1 2; do
    for who in "${trainers[@]}"; do
      # shellcheck disable=SC2086 # words
      {
        names "acme open shown" as $who ls "$MOUNTPOINT" || bad=1
        wants reads as $who cat "$MOUNTPOINT/acme/llama/config.json" || bad=1
        wants reads as $who cat "$MOUNTPOINT/open/base/config.json" || bad=1
        wants refused as $who cat "$MOUNTPOINT/shown/next/config.json" || bad=1
        wants absent as $who cat "$MOUNTPOINT/lone/secret/config.json" || bad=1
      }
    done
    for who in "${outsiders[@]}"; do
      # shellcheck disable=SC2086 # words
      {
        names "open shown" as $who ls "$MOUNTPOINT" || bad=1
        wants absent as $who stat "$MOUNTPOINT/acme" || bad=1
        wants absent as $who cat "$MOUNTPOINT/acme/llama/config.json" || bad=1
        wants reads as $who cat "$MOUNTPOINT/open/base/config.json" || bad=1
        wants lists as $who ls "$MOUNTPOINT/shown/next" || bad=1
        wants refused as $who cat "$MOUNTPOINT/shown/next/config.json" || bad=1
      }
    done
    names "" as 4304 4300 4300 ls "$MOUNTPOINT" || bad=1
    wants absent as 4304 4300 4300 cat "$MOUNTPOINT/open/base/config.json" || bad=1
  done
  return $bad
}
denied_in_log() { # UID MODEL: a refusal of this user and model is in the log
  modelfs audit show $log --uid "$1" --model "$2" --outcome denied --json >"$work/found" || return 1
  [[ -s $work/found ]] || { echo "no refusal of $2 to uid $1 in the log"; return 1; }
}
refusals_are_recorded() {
  local bad=0 uid
  for uid in 4301 4302; do denied_in_log $uid shown/next || bad=1; done
  for uid in 4303 0; do denied_in_log $uid acme && denied_in_log $uid shown/next || bad=1; done
  denied_in_log 4304 open || bad=1
  for uid in 4301 4302; do
    modelfs audit show $log --uid $uid --model acme/llama --kind open --outcome allowed --json >"$work/found" && [[ -s $work/found ]] || bad=1
  done
  run_page_block "$page" denied >"$work/found" && [[ -s $work/found ]] || bad=1
  modelfs audit verify $log >/dev/null || bad=1
  return $bad
}

# ---- By control group. WHICH: a, b or c, or what lies below one.

find_groups() { # a hierarchy by which the daemon tells processes apart, and where this test may make groups
  local at groups=()
  # Version 2, else that of systemd.
  mapfile -t groups < <(awk '{
    split($0, half, " - "); split(half[1], left, " "); split(half[2], right, " ")
    if (right[1] == "cgroup2") print "1 " left[5]
    if (right[1] == "cgroup" && right[3] ~ /(^|,)name=systemd(,|$)/) print "2 " left[5]
  }' /proc/self/mountinfo | sort -u | cut -d ' ' -f 2)
  for at in "${groups[@]}"; do
    mkdir "$at/modelfs-policy-$$-a" 2>/dev/null || continue
    groups_at=$at
    mkdir "$at/modelfs-policy-$$-a/worker" "$at/modelfs-policy-$$-"{b,c} && (echo $BASHPID >"$at/modelfs-policy-$$-b/cgroup.procs") && return
    break
  done 2>/dev/null
  return 1
}
in_group() { # WHICH UID GID GROUPS COMMAND...
  (echo $BASHPID >"$groups_at/modelfs-policy-$$-$1/cgroup.procs" && as "${@:2}")
}
group_path() { # WHICH: as /proc says it, in the hierarchy that was found
  in_group "$1" 0 0 - cat /proc/self/cgroup | sed -n "s|^[0-9]*:[^:]*:\(.*/modelfs-policy-$$-.*\)|\1|p"
}
by_control_group() {
  local bad=0 a b who=(4303 4303 -)
  a=$(group_path a) b=$(group_path b)
  echo "rules on $a and $b"
  policy || return 1
  {
    printf '[[rule]]\nname = "service"\ncgroups = ["%s"]\nmodels = ["lone/*"]\nmay = "read"\n' "$a"
    printf '[[rule]]\nname = "batch"\ncgroups = ["%s"]\nmodels = ["open/*"]\nmay = "none"\n' "$b"
    page_block "$page" toml policy
  } >>/etc/modelfs/policy.toml
  run_page_block "$page" reload || return 1
  # Twice, and the same user in each: his control group tells the answers apart.
  for _ in 1 2; do
    names "lone open shown" in_group a "${who[@]}" ls "$MOUNTPOINT" || bad=1
    wants reads in_group a "${who[@]}" cat "$MOUNTPOINT/lone/secret/config.json" || bad=1
    wants reads in_group a/worker "${who[@]}" cat "$MOUNTPOINT/lone/secret/config.json" || bad=1
    wants reads in_group a "${who[@]}" cat "$MOUNTPOINT/open/base/config.json" || bad=1
    names "shown" in_group b "${who[@]}" ls "$MOUNTPOINT" || bad=1
    wants absent in_group b "${who[@]}" cat "$MOUNTPOINT/lone/secret/config.json" || bad=1
    wants absent in_group b "${who[@]}" cat "$MOUNTPOINT/open/base/config.json" || bad=1
    wants absent as "${who[@]}" cat "$MOUNTPOINT/lone/secret/config.json" || bad=1
    wants reads as "${who[@]}" cat "$MOUNTPOINT/open/base/config.json" || bad=1
  done
  modelfs audit show $log --uid 4303 --outcome denied --json >"$work/found" || bad=1
  grep -F "\"cgroup\":\"$b\"" "$work/found" >/dev/null || { echo "no refusal in $b is in the log"; bad=1; }
  return $bad
}
a_control_group_is_blocked() {
  local bad=0 uid c
  c=$(group_path c)
  policy denials policy && run_page_block "$page" reload || return 1
  wants refused in_group a 4320 4320 - cat "$MOUNTPOINT/shown/next/config.json" || bad=1
  # One denial each, of five users: a program that goes through them.
  for uid in 4321 4322 4323 4324; do wants refused in_group c $uid $uid - cat "$MOUNTPOINT/shown/next/config.json" || bad=1; done
  for uid in 4321 4322 4323 4324; do wants reads in_group c $uid $uid - cat "$MOUNTPOINT/open/base/config.json" || bad=1; done
  wants refused in_group c 4325 4325 - cat "$MOUNTPOINT/shown/next/config.json" || bad=1
  for uid in 4321 4322 4323 4324 4325; do
    wants refused in_group c $uid $uid - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  done
  # The next one with his first denial, and nobody who was denied nothing, nor in another group.
  wants reads in_group c 4326 4326 - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  wants refused in_group c 4326 4326 - cat "$MOUNTPOINT/shown/next/config.json" || bad=1
  wants refused in_group c 4326 4326 - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  wants reads in_group c 4327 4327 - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  wants reads in_group a 4320 4320 - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  run_page_block "$page" blocked >"$work/said" || bad=1
  grep -F "blocked: cgroup=$c" "$work/said" || { cat "$work/said"; bad=1; }
  modelfs audit show $log --kind block --severity high --json >"$work/found" || bad=1
  grep -F "cgroup=$c is refused everything" "$work/found" >/dev/null || { echo "no block of $c is in the log"; cat "$work/found"; bad=1; }
  # Each by his own name, whoever was denied last.
  for uid in 4321 4322 4325; do
    modelfs audit show $log --kind block --uid $uid --json >"$work/found" || bad=1
    [[ -s $work/found ]] || { echo "no block of uid $uid is in the log"; bad=1; }
  done
  modelfs sessions "$MOUNTPOINT" --let-in "cgroup=$c" || bad=1
  for uid in 4321 4322 4323 4324 4325 4326; do modelfs sessions "$MOUNTPOINT" --let-in uid=$uid || bad=1; done
  wants reads in_group c 4321 4321 - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  return $bad
}

# ---- In a container.

container_setup() {
  export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf
  # What this machine needs of Podman.
  printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$work/podman/graph" "$work/podman/run" >"$work/storage.conf"
  {
    echo '[containers]'
    echo 'default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]'
    echo '[engine]'
    echo 'cgroup_manager = "cgroupfs"'
    echo 'events_logger = "file"'
    echo 'runtime = "runc"'
  } >"$work/containers.conf"
  local applet
  mkdir -p "$work/images/box"/{bin,etc,tmp,dev,proc,sys,models}
  cp "$(command -v busybox)" "$work/images/box/bin/busybox"
  for applet in sh cat ls stat sleep true; do ln -sf busybox "$work/images/box/bin/$applet"; done
  echo 'root:x:0:0::/:/bin/sh' >"$work/images/box/etc/passwd"
  tar -C "$work/images/box" -c . | podman import - localhost/box >/dev/null
}
box() { # NAME [OPTION...]: a container that stays, with the mount in it
  podman run -d --name "$1" --network none -v "$MOUNTPOINT:/models:ro" "${@:2}" localhost/box sleep 600
}
inside() { podman exec "$@" 2>&1; } # [OPTION...] NAME COMMAND...
containers_start() {
  box one >"$work/one" && box two >"$work/two" || return 1
  { # The first container by its id, after those of the page.
    policy policy
    printf '[[rule]]\nname = "one"\ncontainers = ["%s"]\nmodels = ["lone/*"]\nmay = "read"\n' "$(cut -c 1-12 "$work/one")" >>/etc/modelfs/policy.toml
  }
  run_page_block "$page" reload
}
in_containers() {
  local bad=0
  for _ in 1 2; do
    # The same user, root; the container tells them apart.
    names "lone open shown" inside one ls /models || bad=1
    names "open shown" inside two ls /models || bad=1
    wants reads inside one cat /models/lone/secret/config.json || bad=1
    wants absent inside two cat /models/lone/secret/config.json || bad=1
    wants absent as 0 0 - cat "$MOUNTPOINT/lone/secret/config.json" || bad=1
    wants absent inside one cat /models/acme/llama/config.json || bad=1
    # Users and groups of the container are the kernel's, supplementary ones as well.
    wants absent inside --user 4303:4303 two cat /models/acme/llama/config.json || bad=1
    wants reads inside --user 4302:4300 two cat /models/acme/llama/config.json || bad=1
    wants refused inside --user 4302:4300 two cat /models/shown/next/config.json || bad=1
  done
  podman run --rm --network none --user 4301:4301 --group-add 4300 -v "$MOUNTPOINT:/models:ro" localhost/box \
    cat /models/acme/llama/config.json | grep layers >/dev/null || bad=1
  return $bad
}
container_refusals_are_recorded() {
  denied_in_log 4302 shown/next && denied_in_log 0 lone || return 1
  grep -F "$(cat "$work/two")" "$work/found" >/dev/null || { echo "the container is not in the record:"; cat "$work/found"; return 1; }
}

# ---- Limits, blocks, and their end.

denials_block() {
  local bad=0
  policy denials policy && sed -i 's/^within = .*/within = "10m"/; s/^block = .*/block = "60s"/' /etc/modelfs/policy.toml || return 1
  run_page_block "$page" reload || return 1
  for _ in 1 2 3 4 5 6; do
    as 4303 4303 - cat "$MOUNTPOINT/shown/next/config.json" >/dev/null || true
    sleep 1.1
  done
  wants refused as 4303 4303 - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  wants refused as 4303 4303 - ls "$MOUNTPOINT" || bad=1
  # Of the same control group, and denied nothing so far.
  wants reads as 4310 4300 - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  run_page_block "$page" blocked >"$work/said" && grep 'blocked: uid=4303' "$work/said" || { cat "$work/said"; bad=1; }
  modelfs audit show $log --kind block --severity high --json >"$work/found" && grep 4303 "$work/found" >/dev/null || bad=1
  return $bad
}
a_block_ends() {
  until_true 300 as 4303 4303 - cat "$MOUNTPOINT/open/base/config.json" || return 1
  until_true 120 bash -c "modelfs audit show $log --kind unblock --json | grep 4303 >/dev/null"
}
the_operator_lets_in() {
  sed -i 's/^block = .*/block = "1h"/; s/^count = .*/count = 1/' /etc/modelfs/policy.toml && run_page_block "$page" reload || return 1
  as 4303 4303 - cat "$MOUNTPOINT/shown/next/config.json" >/dev/null || true
  wants refused as 4303 4303 - cat "$MOUNTPOINT/open/base/config.json" || return 1
  run_page_block "$page" let-in | grep 'let in' || return 1
  wants reads as 4303 4303 - cat "$MOUNTPOINT/open/base/config.json"
}
limits_hold() {
  local bad=0 said
  policy limits policy && sed -i 's/^opens_per_s = .*/opens_per_s = 1/; s/^opens_burst = .*/opens_burst = 3/; s/^wait = .*/wait = "0s"/' /etc/modelfs/policy.toml || return 1
  run_page_block "$page" reload || return 1
  # By one process: on a slow machine a new one for each open would come no sooner than its turn.
  said=$(as 4303 4303 - sh -c 'for _ in $(seq 40); do read -r line <"$1" && echo "$line"; done' sh "$MOUNTPOINT/open/base/config.json" || true)
  [[ $said == *layers*"resource busy"* ]] || { echo "$said"; bad=1; }
  wants reads as 4310 4300 - cat "$MOUNTPOINT/open/base/config.json" || bad=1
  modelfs audit show $log --uid 4303 --kind limit --json >"$work/found" && [[ -s $work/found ]] || bad=1
  return $bad
}
a_mistake_changes_nothing() {
  local said
  policy policy && sed -i 's/^gids/gid/' /etc/modelfs/policy.toml || return 1
  if said=$(run_page_block "$page" reload 2>&1); then echo "taken: $said"; return 1; fi
  [[ $said == *'did you mean `gids`'* ]] || { echo "$said"; return 1; }
  wants reads as 4302 4300 - cat "$MOUNTPOINT/acme/llama/config.json" || return 1
  modelfs audit show $log --kind configuration --json | grep -i 'gids' >/dev/null
}

step "policy: models are sealed with the page's rules for what may be one" seal_models
step "policy: a pickle by another name is not sealed" pickles_are_not_sealed
step "policy: mount as the page says" mount_as_the_page_says
step "policy: on the host each sees and reads what the rules grant" on_the_host
step "policy: each refusal is in the audit log, and each open" refusals_are_recorded
if find_groups; then
  step "policy: rules on control groups let in who is in one, and keep out who is in another" by_control_group
  step "policy: repeated denials of several users of a control group block it, and no other" a_control_group_is_blocked
else
  skip "policy: rules on control groups" "no control groups can be made here: neither version 2 nor name=systemd is writable"
fi
step "policy: podman has an image" container_setup
step "policy: two containers with the mount in them, one of them in a rule" containers_start
step "policy: in containers each sees and reads what the rules grant" in_containers
step "policy: refusals in containers are in the audit log with their container" container_refusals_are_recorded
step "policy: repeated denials block a user and nobody else" denials_block
step "policy: a block ends by itself" a_block_ends
step "policy: the operator ends one" the_operator_lets_in
step "policy: limits hold for each user" limits_hold
step "policy: a policy with a mistake in it changes nothing" a_mistake_changes_nothing
step "policy: unmount" modelfs umount "$MOUNTPOINT"
finish
