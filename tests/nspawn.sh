# shellcheck shell=bash
# Sourced by tests that need a booted systemd: boots a copy of the root file system of tests/parts/rootfs.sh in a
# container, runs commands in it, and stops it so that nothing is left.
#
#   nspawn_copy DIR             a copy of the root file system, for this test alone
#   nspawn_boot DIR [OPTION...] boots it (options of systemd-nspawn, as in --bind-ro=PATH) and waits until it has started;
#                               with NSPAWN_STARTING=1 only until it answers, for units whose start takes longer
#   nspawn_in COMMAND...        runs a command in it
#   nspawn_stop                 powers it off; its files stay, and it can be booted again
#   nspawn_remove DIR           stops what runs, and removes the copy with whatever is mounted below it
#
# One container a shell. `nspawn_missing` names what keeps it from running here, and is empty if nothing does.

NSPAWN_PID=""
NSPAWN_LEADER=""
NSPAWN_CGROUPS=()

nspawn_rootfs() { bash "$(dirname "${BASH_SOURCE[0]}")/parts/rootfs.sh" path; }

nspawn_missing() {
  if [[ $EUID != 0 ]]; then
    echo "booting a container needs root"
  elif ! command -v systemd-nspawn >/dev/null; then
    echo "systemd-nspawn is not installed (apt install systemd-container)"
  elif [[ ! -x $(nspawn_rootfs)/lib/systemd/systemd ]]; then
    echo "no root file system to boot: tests/parts/install.sh rootfs"
  elif [[ ! -c /dev/fuse ]]; then
    echo "no /dev/fuse on this machine"
  fi
}

nspawn_copy() { # DIR: must not exist
  cp -a --reflink=auto "$(nspawn_rootfs)" "$1"
}

# Without systemd on the host nobody gives the container a cgroup of its own, and two of them would count each other's
# processes as theirs.
nspawn_cgroup() {
  local hierarchy
  for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
    [[ -f $hierarchy/cgroup.procs ]] || continue
    mkdir -p "$hierarchy/nspawn-$1" && echo "$1" >"$hierarchy/nspawn-$1/cgroup.procs" && NSPAWN_CGROUPS+=("$hierarchy/nspawn-$1")
  done
}

nspawn_boot() { # DIR [OPTION...]
  local dir=$1 own=() began=$SECONDS state="" fuse=/dev/fuse
  shift
  # Open to everyone as udev makes it; where nobody did, a node beside the copy is.
  if [[ $(stat -c %a /dev/fuse) != 666 ]]; then
    fuse=$dir.fuse
    [[ -c $fuse ]] || { mknod "$fuse" c 10 229 && chmod 666 "$fuse"; }
  fi
  # On a host with systemd nspawn asks it for a scope; elsewhere it stays where it was started.
  [[ -d /run/systemd/system ]] || own=(--keep-unit)
  # No network but a loopback of its own. Locked memory, secret memory and io_uring as on a machine, which nspawn keeps from
  # containers otherwise.
  # SIGSTOP first, so that the container's processes are born in the cgroup that it is put in.
  bash -c 'kill -STOP $$; exec "$@"' nspawn systemd-nspawn --quiet --directory="$dir" --boot --register=no "${own[@]}" \
    --private-network --link-journal=no --resolv-conf=off --timezone=off --machine="modelfs-$$" \
    --capability=CAP_IPC_LOCK --system-call-filter='@memlock @aio memfd_secret' --bind="$fuse:/dev/fuse" \
    --property=DeviceAllow='/dev/fuse rwm' "$@" >>"$dir.console" 2>&1 </dev/null &
  NSPAWN_PID=$!
  NSPAWN_CGROUPS=()
  until [[ $(ps -o stat= -p "$NSPAWN_PID") == T* ]]; do sleep 0.02; done
  [[ ${#own[@]} == 0 ]] || nspawn_cgroup "$NSPAWN_PID"
  kill -CONT "$NSPAWN_PID"
  NSPAWN_LEADER=""
  while ((SECONDS < began + 300)); do
    if ! kill -0 "$NSPAWN_PID" 2>/dev/null; then break; fi
    NSPAWN_LEADER=$(pgrep -P "$NSPAWN_PID" | head -1) || true
    # Waits until no job is left; `degraded` is a start as well, and the test says which units it cares for.
    [[ -z $NSPAWN_LEADER ]] || state=$(nspawn_in systemctl is-system-running 2>/dev/null) || true
    if [[ $state == running || $state == degraded || ${NSPAWN_STARTING:-} == 1 && $state == starting ]]; then
      echo "booted: $state after $((SECONDS - began)) s"
      return 0
    fi
    sleep 0.2
  done
  echo "the container did not start within 300 s:"
  tail -20 "$dir.console"
  return 1
}

nspawn_in() {
  nsenter --target "$NSPAWN_LEADER" --mount --uts --ipc --net --pid --root --wd --cgroup -- \
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root "$@"
}

nspawn_stop() {
  local began=$SECONDS cgroup
  [[ -n $NSPAWN_PID ]] || return 0
  nspawn_in systemctl poweroff >/dev/null 2>&1 || true
  while kill -0 "$NSPAWN_PID" 2>/dev/null && ((SECONDS < began + 240)); do sleep 0.1; done
  if kill -0 "$NSPAWN_PID" 2>/dev/null; then
    echo "the container did not power off within 240 s, it is killed"
    kill -KILL "$NSPAWN_LEADER" "$NSPAWN_PID" 2>/dev/null || true
  fi
  wait "$NSPAWN_PID" 2>/dev/null || true
  for cgroup in "${NSPAWN_CGROUPS[@]}"; do find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
  NSPAWN_PID="" NSPAWN_LEADER="" NSPAWN_CGROUPS=()
  ((SECONDS - began < 240))
}

nspawn_remove() { # DIR
  nspawn_stop || true
  rm -rf --one-file-system "$1" "$1.console" "$1.fuse"
}
