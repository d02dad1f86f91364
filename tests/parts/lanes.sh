# shellcheck shell=bash
# Sourced by install.sh: two lanes of parts side by side, since what compiles waits for processors, and what is fetched for
# the network.
#
# What a lane runs is `install_part PART`, for one after the other; `missing` gathers what was lacking in both.

running_lanes=() lanes_folder="" lanes_failed=0

# run_lanes "PART..." "PART...": both to their end, whatever becomes of the other. Output of the second is kept and comes when it
# ends. A lane that did not come to its end is named with its part, and lanes_failed is 1 then; not the exit status, since who
# asks for that takes errexit from the lanes.
run_lanes() {
  local name pid rc more
  local -A pids=()
  lanes_folder=$(mktemp -d)
  trap end_lanes EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  # With job control each is a process group: what it started ends with it.
  set -m
  # shellcheck disable=SC2086 # names of parts
  if [[ -n $1 ]]; then
    lane first $1 </dev/null &
    pids[first]=$!
  fi
  # shellcheck disable=SC2086
  if [[ -n $1 && -n $2 ]]; then
    kept_lane second $2 </dev/null &
    pids[second]=$!
  elif [[ -n $2 ]]; then
    lane second $2 </dev/null &
    pids[second]=$!
  fi
  set +m
  running_lanes=("${pids[@]}")
  for name in first second; do
    pid=${pids[$name]:-}
    [[ -n $pid ]] || continue
    rc=0
    wait "$pid" || rc=$?
    if [[ $rc != 0 ]]; then
      # shellcheck disable=SC2034 # for whoever sources this
      lanes_failed=1
      say "the $name lane did not come to its end: exit $rc in the part $(cat "$lanes_folder/$name.at" 2>/dev/null)"
    fi
    if [[ -f $lanes_folder/$name.missing ]]; then
      mapfile -t more <"$lanes_folder/$name.missing"
      missing+=("${more[@]}")
    fi
  done
  running_lanes=()
}

# Each part's missing ones are written at once: a lane that is cut short has told what was lacking before.
lane() { # NAME PART...
  local name=$1 part
  shift
  for part; do
    echo "$part" >"$lanes_folder/$name.at"
    missing=()
    install_part "$part"
    [[ ${#missing[@]} == 0 ]] || printf '%s\n' "${missing[@]}" >>"$lanes_folder/$name.missing"
  done
}
kept_lane() { # NAME PART...
  local name=$1
  exec 3>&1 >"$lanes_folder/$name.log" 2>&1
  # shellcheck disable=SC2064
  trap "printf '[parts] meanwhile:\n' >&3; cat '$lanes_folder/$name.log' >&3" EXIT
  lane "$@"
}

end_lanes() {
  local pid
  for pid in "${running_lanes[@]}"; do kill -- "-$pid" 2>/dev/null || true; done
  # Their own ends, so that the folder is not written to any more.
  wait 2>/dev/null || true
  rm -rf "$lanes_folder"
}
