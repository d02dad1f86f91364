# shellcheck shell=bash
# Sourced by the scripts beside it: what asks a registry is asked again, since one that stumbles once is no reason to fail.

# again COMMAND...: up to three times, with a pause.
again() {
  local attempt
  for attempt in 1 2 3; do
    if "$@"; then return 0; fi
    [[ $attempt == 3 ]] || { echo "[parts] failed, and is tried again: $1 ${2:-}" >&2; sleep $((attempt * 10)); }
  done
  return 1
}

# apt_install PACKAGE...: waits for whoever else installs just now.
apt_install() { again apt_install_once "$@"; }
apt_install_once() {
  # The lists may be as empty as an image leaves them; what fails here fails below.
  apt-get update -qq >/dev/null || true
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@" >/dev/null
}
