# shellcheck shell=bash
# Sourced by the test scripts: runs steps, remembers how each ended, and prints the tally.
#
# A step that fails does not stop the steps after it. Scripts started by a script add to the same tally: the file named
# by MODELFS_TEST_STEPS holds one line a step, and whoever made that file prints the summary.

if [[ -z ${MODELFS_TEST_STEPS:-} ]]; then
  MODELFS_TEST_STEPS=$(mktemp)
  export MODELFS_TEST_STEPS
  steps_owner=1
fi

# step NAME COMMAND...: one step; it passes if COMMAND exits 0.
step() {
  local name=$1 began=$SECONDS rc=0
  shift
  printf '\n==> %s\n' "$name"
  strictly "$@"
  if [[ $rc == 0 ]]; then
    printf 'PASSED  %s (%s s)\n' "$name" $((SECONDS - began))
    echo "passed $name" >>"$MODELFS_TEST_STEPS"
  else
    cat "$MODELFS_TEST_STEPS.stopped"
    printf 'FAILED  %s (exit %s, %s s)\n' "$name" $rc $((SECONDS - began))
    echo "failed $name" >>"$MODELFS_TEST_STEPS"
  fi
}

# strictly COMMAND...: its exit status in $rc. Any failure in it that nobody tests ends it, as errexit would: bash drops
# errexit in whatever stands left of a ||, and a failing command in the middle of a step would pass unseen.
strictly() {
  : >"$MODELFS_TEST_STEPS.stopped"
  set +e -E
  strictly_inside "$@"
  rc=$?
  trap - ERR
  set -e +E
}
strictly_inside() {
  trap 'stopped_at $? "${BASH_SOURCE[0]}:$LINENO" "$BASH_COMMAND" || return' ERR
  "$@"
}
stopped_at() { # EXIT WHERE COMMAND: noted by each function that it ends, the innermost first; told if the step fails
  [[ ${FUNCNAME[1]} == strictly_inside ]] || echo "stopped at ${2##*/} (exit $1): ${3%%$'\n'*}" >>"$MODELFS_TEST_STEPS.stopped"
  return "$1"
}

# step_exits CODE NAME COMMAND...: one step; it passes if COMMAND exits CODE and no other.
step_exits() {
  local wanted=$1 name=$2
  shift 2
  step "$name" exits_with "$wanted" "$@"
}
exits_with() {
  local wanted=$1 rc=0
  shift
  "$@" || rc=$?
  [[ $rc == "$wanted" ]] || { echo "exit status $rc, wanted $wanted: $*"; return 1; }
}

# skip NAME REASON: said, and not counted as passed. In CI, where everything is to be there, it is a failure.
skip() {
  printf '\nSKIPPED %s: %s\n' "$1" "$2"
  if [[ ${CI:-} == true ]]; then echo "failed $1 (skipped: $2)"; else echo "skipped $1"; fi >>"$MODELFS_TEST_STEPS"
}

# not_here NAME REASON: a check that depends on the world outside, so that its absence fails nobody.
not_here() {
  printf '\nSKIPPED %s: %s\n' "$1" "$2"
  echo "skipped $1" >>"$MODELFS_TEST_STEPS"
}

# try_step NAME REASON COMMAND...: a step whose COMMAND exits 75 where what it asks cannot be reached, for REASON, and 69
# where a program that it needs is not installed.
try_step() {
  local name=$1 reason=$2 log rc=0
  shift 2
  log=$(mktemp)
  strictly "$@" >"$log" 2>&1
  case $rc in
  75) not_here "$name" "$reason" ;;
  69) skip "$name" "$(tail -1 "$log")" ;;
  *)
    cat "$MODELFS_TEST_STEPS.stopped" >>"$log"
    step "$name" told "$rc" "$log"
    ;;
  esac
  rm -f "$log"
}
told() { cat "$2"; return "$1"; }

# free_port: one that nobody listens at, and not of those that the kernel gives to whoever asks for any: a server that starts
# later, or a second time, finds it as it was.
free_port() {
  python3 -c '
import random, socket
with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
    given = int(file.read().split()[0])
while True:
    port = random.SystemRandom().randrange(10000, given if given > 12000 else 65536)
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
    print(port)
    break'
}

# finish: the summary and the exit status; a script called by another leaves the summary to it.
finish() {
  local failed
  failed=$(grep -c '^failed ' "$MODELFS_TEST_STEPS" || true)
  if [[ -n ${steps_owner:-} ]]; then
    echo
    grep -v '^passed ' "$MODELFS_TEST_STEPS" || true
    echo "$(grep -c '^passed ' "$MODELFS_TEST_STEPS" || true) passed, $failed failed"
    rm -f "$MODELFS_TEST_STEPS" "$MODELFS_TEST_STEPS.stopped"
  fi
  [[ $failed == 0 ]]
}
