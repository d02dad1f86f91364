#!/usr/bin/env bash
# A Debian root file system that boots: systemd, D-Bus, fuse3, mount(8), for the tests of units, fstab and packages.
# 2 minutes, 0.3 GB; nothing when it is there. tests/nspawn.sh boots copies of it, never the thing itself.
#
#   tests/parts/rootfs.sh install     makes it in the cache folder (as root; debootstrap and systemd-container by apt)
#   tests/parts/rootfs.sh path        prints where it is
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/parts/again.sh
source "$here/again.sh"
SUITE=bookworm
# Counts up when what is below makes another file system.
RECIPE=1
PACKAGES=systemd,systemd-sysv,dbus,fuse3,mount,util-linux,procps,ca-certificates
MIRROR=${MODELFS_TEST_DEBIAN_MIRROR:-http://deb.debian.org/debian}

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
root=$cache/rootfs-$SUITE-$RECIPE

install_tools() {
  local wanted=()
  command -v debootstrap >/dev/null || wanted+=(debootstrap)
  command -v systemd-nspawn >/dev/null || wanted+=(systemd-container)
  [[ ${#wanted[@]} -gt 0 ]] || return 0
  if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "[parts] rootfs: please install ${wanted[*]}" >&2
    return 1
  fi
  echo "[parts] rootfs: apt installs ${wanted[*]}"
  apt_install "${wanted[@]}"
}

make_system() {
  rm -rf --one-file-system "$root.build"
  debootstrap --variant=minbase --include="$PACKAGES" "$SUITE" "$root.build" "$MIRROR"
}

case ${1:-install} in
path)
  echo "$root"
  ;;
install)
  install_tools
  if [[ -x $root/lib/systemd/systemd ]]; then
    echo "[parts] rootfs ${root##*/} is there"
    exit 0
  fi
  if [[ $EUID != 0 ]]; then
    echo "[parts] rootfs: debootstrap needs root" >&2
    exit 1
  fi
  echo "[parts] rootfs ${root##*/}: debootstrap (2 minutes)"
  # Made aside and moved, so that one cut short is not taken for it.
  again make_system >"$root.log" 2>&1 ||
    { tail -5 "$root.log" >&2; exit 1; }
  # Half a minute less of every boot, and nothing that wants a network or a console of its own.
  for unit in systemd-resolved systemd-networkd systemd-timesyncd apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap fstrim.timer getty@tty1 console-getty; do
    systemctl --root="$root.build" mask --quiet "$unit" 2>/dev/null || true
  done
  echo modelfs-test >"$root.build/etc/hostname"
  # Filled at the first boot: what debootstrap wrote would be the same in every copy for ever.
  : >"$root.build/etc/machine-id"
  rm -rf "$root.build"/var/cache/apt/archives/*.deb "$root.build"/usr/share/{doc,man,locale}/*
  mv "$root.build" "$root"
  rm -f "$root.log"
  echo "[parts] rootfs ${root##*/}: made"
  ;;
*)
  echo "usage: $0 [install|path]" >&2
  exit 2
  ;;
esac
