#!/usr/bin/env bash
# The two lanes of tests/parts/install.sh, with parts that only wait and fail.
#
#   tests/lanes.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-lanes.XXXXXX")
trap 'rm -rf "$work"' EXIT
cat >"$work/lanes" <<'END'
set -euo pipefail
source tests/parts/lanes.sh
work=$1 missing=()
say() { echo "$*"; }
waits_for() { local end=$((SECONDS + 120)); until [[ -e $work/$1 ]]; do ((SECONDS < end)) || { echo "no $1"; return 1; }; sleep 0.2; done; }
install_part() {
  echo "part $1"
  case $1 in
    here) touch "$work/here"; waits_for there ;;
    there) touch "$work/there"; waits_for here ;;
    lacks-*) missing+=("$1") ;;
    dies) false; touch "$work/went-on" ;;
    stays-*) echo $BASHPID >"$work/$1"; sleep 1000 & echo $! >>"$work/$1"; wait ;;
  esac
}
run_lanes "$2" "$3"
echo "failed $lanes_failed missing ${missing[*]}"
END
lanes() { bash "$work/lanes" "$work" "$@" >"$work/said" 2>&1; }
says() { grep -Fx "$1" "$work/said" >/dev/null || { cat "$work/said"; echo "wanted: $1"; return 1; }; }

# Each waits for the other: one after the other they would never end.
side_by_side() {
  lanes "here lacks-a lacks-b" "lacks-c there"
  says "failed 0 missing lacks-a lacks-b lacks-c"
  says "part here"
  says "part there"
  lanes "" "lacks-a lacks-b"
  says "failed 0 missing lacks-a lacks-b"
}
failure_is_told() {
  lanes "lacks-a dies lacks-b" "lacks-c lacks-d"
  says "the first lane did not come to its end: exit 1 in the part dies"
  says "failed 1 missing lacks-a lacks-c lacks-d"
  lanes "lacks-a" "lacks-b dies"
  says "the second lane did not come to its end: exit 1 in the part dies"
  says "failed 1 missing lacks-a lacks-b"
  [[ ! -e $work/went-on ]]
}
ends_both() { # SIGNAL
  rm -f "$work"/stays-*
  # From Python, with signals as they are at a terminal: what a shell starts in its background ignores the first of them.
  python3 - "$1" bash "$work/lanes" "$work" stays-a stays-b <<'PYTHON'
import signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
number, work = getattr(signal, "SIG" + sys.argv[1]), Path(sys.argv[4])
def wait_for(what, condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)
lanes = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL)
def started():
    return [int(pid) for name in ("stays-a", "stays-b") if (work / name).exists() for pid in (work / name).read_text().split()]
wait_for("both lanes work", lambda: len(started()) == 4)
lanes.send_signal(number)
assert lanes.wait(120) == 128 + number
def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
wait_for("all that they started has ended", lambda: all(map(gone, started())))
PYTHON
}
step "two lanes of parts run side by side, and what is lacking in either is told" side_by_side
step "a lane that does not come to its end is named, and the other goes on" failure_is_told
for signal in INT TERM; do
  step "both lanes, and all that they started, end with SIG$signal" ends_both $signal
done
finish
