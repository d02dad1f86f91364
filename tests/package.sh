#!/usr/bin/env bash
# The Debian package in a booted system: installed, mounted from fstab at boot, upgraded under a mount, purged.
#
#   tests/package.sh      as root; needs the release build and tests/parts/install.sh cargo-deb rootfs
#
# The package is made as docs/DEPLOY.md says, and the fstab lines are those of that page.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

page=$PWD/docs/DEPLOY.md
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
cargo_deb=$(compgen -G "$cache/cargo-deb-*/bin/cargo-deb" | head -1 || true)
modelfs=$PWD/target/release/modelfs
[[ -x $cargo_deb ]] || { skip "Debian package" "cargo-deb is not installed: tests/parts/install.sh cargo-deb"; finish; exit; }
command -v dpkg-shlibdeps >/dev/null || { skip "Debian package" "dpkg-dev is not installed"; finish; exit; }
export PATH=$PATH:${cargo_deb%/*}

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-package.XXXXXX")
root=$work/root
NSPAWN_PID=""
# shellcheck disable=SC2317 # called by the trap
cleanup() {
  [[ -z $NSPAWN_PID ]] || nspawn_stop || true
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.2; done
}

# ---- The package.
build() {
  rm -rf target/package target/debian/modelfs_*.deb
  run_page_block "$page" package
  cp target/debian/modelfs_*.deb "$work/modelfs.deb"
}
rebuild() { cargo deb --no-build --strip --fast --deb-version 99.0.0-1 --output "$work/newer.deb"; }
holds() { # what the system looks for
  local path missing=0
  dpkg-deb -c "$work/modelfs.deb" >"$work/files"
  for path in usr/bin/modelfs usr/share/man/man1/modelfs-mount.1.gz usr/share/man/man8/mount.modelfs.8.gz \
    usr/share/bash-completion/completions/modelfs usr/share/zsh/vendor-completions/_modelfs \
    usr/share/fish/vendor_completions.d/modelfs.fish usr/lib/systemd/system/modelfs@.service \
    usr/lib/systemd/system/modelfs.slice etc/modelfs/example.env usr/share/doc/modelfs/copyright usr/share/doc/modelfs/DEPLOY.md \
    usr/share/doc/modelfs/kubernetes/driver.yaml usr/share/doc/modelfs/kubernetes/examples/pod.yaml usr/share/doc/modelfs/container/Dockerfile \
    usr/share/doc/modelfs/compose/compose.yaml usr/share/doc/modelfs/docker-plugin/config.json \
    'usr/sbin/mount.modelfs -> ../bin/modelfs' 'usr/sbin/mount.fuse.modelfs -> ../bin/modelfs'; do
    grep -q " \./$path$" "$work/files" || { echo "lacks $path"; missing=1; }
  done
  ! grep -E '/(work|home|root|build)/' "$work/files" || missing=1
  dpkg-deb -f "$work/modelfs.deb" Depends | grep 'fuse3.*libc6' >/dev/null || { dpkg-deb -f "$work/modelfs.deb" Depends; missing=1; }
  return $missing
}
# The package is not for Debian's own archive, where a first upload closes a bug.
clean() {
  [[ $(dpkg-parsechangelog -l systemd/debian/changelog -S Version) == "$(dpkg-deb -f "$work/modelfs.deb" Version)" ]] || return 1
  lintian --allow-root --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs "$work/modelfs.deb"
}
step "the package is built as docs/DEPLOY.md says" build
[[ -f $work/modelfs.deb ]] || { finish; exit; }
step "and built again as a later version" rebuild
step "it holds what the system looks for" holds
if command -v lintian >/dev/null; then step "lintian finds nothing, and the changelog has its version" clean; else skip "lintian" "it is not installed"; fi

# ---- A system.
if [[ ! -f tests/nspawn.sh ]]; then skip "package in a booted system" "no tests/nspawn.sh"; finish; exit; fi
source tests/nspawn.sh
missing=$(nspawn_missing)
[[ -z $missing ]] || { skip "package in a booted system" "$missing"; finish; exit; }
nspawn_copy "$root"
# Without this capability nspawn refuses mlock altogether, whatever the limit.
boot() {
  local autofs=()
  [[ ! -c /dev/autofs ]] || autofs=(--bind=/dev/autofs --property=DeviceAllow='/dev/autofs rwm')
  nspawn_boot "$root" --capability=CAP_IPC_LOCK "${autofs[@]}"
}
# Everything but what a running system writes by itself.
file_list() {
  (cd "$root" && find etc opt srv usr var -xdev \( -path var/log -o -path var/cache -o -path var/tmp -o -path var/lib/dpkg -o -path var/lib/systemd \) \
    -prune -o -printf '%y %m %p %l\n' | grep -vE ' (etc/(ld.so.cache|machine-id|mtab)|var/lib/apt/.*|var/lib/pam/.*)( |$)' | sort)
}
install_deb() { cp "$1" "$root/root/modelfs.deb" && nspawn_in dpkg -i /root/modelfs.deb; }
# A model, and a store with a key that the machine is given by its administrator.
make_store() {
  export HOME=$work/home XDG_CONFIG_HOME=$work/config MODELFS_STATE_DIR=$work/state
  mkdir -p "$HOME" "$root/srv/model"
  head -c 3000000 /dev/urandom >"$root/srv/model/weights.bin"
  "$modelfs" keygen "$work/llama.key" >/dev/null
  "$modelfs" --quiet seal "$root/srv/model" "$root/srv/models" acme/llama --key "file:$work/llama.key" >/dev/null
  mkdir -p "$root"/mnt/{models,away,stuck,auto,unit}
}
give_keys() {
  [[ $(stat -c %a "$root/etc/modelfs") == 700 ]] || { stat "$root/etc/modelfs"; return 1; }
  install -m 600 "$work/llama.key" "$root/etc/modelfs/llama.key"
  cp "$XDG_CONFIG_HOME/modelfs/signing.key.pub" "$root/etc/modelfs/signing.pub"
  page_block "$page" ini s3.env >"$root/etc/modelfs/s3.env"
  chmod 600 "$root/etc/modelfs/s3.env"
  # As the page has a service keep its key and its own settings.
  install -m 600 "$work/llama.key" "$root/etc/credstore.encrypted/modelfs-llama.key"
  mkdir -p "$root/etc/systemd/system/modelfs@llama.service.d"
  printf '[Service]\nLimitMEMLOCK=8G\n' >"$root/etc/systemd/system/modelfs@llama.service.d/memlock.conf"
  # As the page has all of them limited.
  nspawn_in systemctl set-property modelfs.slice MemoryMax=96G
  [[ -n $(ls "$root/etc/systemd/system.control/modelfs.slice.d") ]]
}
# The page's lines: one for the first access; one that mounts; one whose store does not answer; one whose store takes the
# connection and says nothing.
write_fstab() {
  local s3 away=s3-endpoint=http://127.0.0.1:9,fetch-timeout=1s,fetch-budget=2s stuck=s3-endpoint=http://127.0.0.1:99
  s3=$(page_block "$page" fstab s3)
  {
    page_block "$page" fstab local | sed 's|/mnt/models|/mnt/auto|; s/ro,/ro,noauto,x-systemd.automount,/'
    page_block "$page" fstab local | sed 's/ro,/ro,_netdev,/'
    sed "s|/mnt/models|/mnt/away|; s|ro,|ro,$away,|" <<<"$s3"
    sed "s|/mnt/models|/mnt/stuck|; s|ro,|ro,$stuck,x-systemd.requires=stuck.socket,|; s|mount-timeout=90s|mount-timeout=4s|" <<<"$s3"
  } >"$root/etc/fstab"
  printf '[Socket]\nListenStream=127.0.0.1:99\nService=stuck.service\n' >"$root/etc/systemd/system/stuck.socket"
  printf '[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sleep infinity\n' >"$root/etc/systemd/system/stuck.service"
}
reads() { nspawn_in diff -r /srv/model /mnt/models/acme/llama; }
at_boot() {
  nspawn_in systemctl is-active mnt-models.mount && reads || return 1
  [[ $(nspawn_in findmnt -rn -o SOURCE,FSTYPE /mnt/models) == "/srv/models fuse.modelfs" ]]
}
at_first_access() {
  ! nspawn_in findmnt -rn -t fuse.modelfs /mnt/auto || return 1
  nspawn_in diff -r /srv/model /mnt/auto/acme/llama && nspawn_in findmnt -rn -t fuse.modelfs /mnt/auto && nspawn_in umount /mnt/auto
}
went_on() {
  nspawn_in systemctl is-active multi-user.target
  [[ $(nspawn_in systemctl is-failed mnt-away.mount) == failed ]] || return 1
  [[ $(nspawn_in systemctl show -P ExecMainStatus mnt-away.mount) == 32 ]] || nspawn_in systemctl status mnt-away.mount || true
  nspawn_in journalctl -b -u mnt-away.mount -o cat | grep 'mount.modelfs: .*UNREACHABLE'
}
given_up() {
  until_true 120 nspawn_in systemctl is-failed mnt-stuck.mount
  [[ $(nspawn_in systemctl show -P Result mnt-stuck.mount) == timeout ]] || { nspawn_in systemctl status mnt-stuck.mount; return 1; }
  # What it started is gone with it, and mounts nothing later.
  until_true 60 nothing_waits || { nspawn_in pgrep -af 'mount.modelfs .*/mnt/stuck'; return 1; }
}
nothing_waits() { ! nspawn_in pgrep -f 'mount.modelfs .*/mnt/stuck'; }
not_told() { ! nspawn_in journalctl -b -o cat | grep -F change-me; }
daemon() { nspawn_in pgrep -f 'mount.modelfs /srv/models'; }
upgrade() {
  local before rc=0
  before=$(daemon)
  nspawn_in sh -c 'exec sleep 600 </mnt/models/acme/llama/weights.bin' &
  reader=$!
  sleep 0.5
  install_deb "$work/newer.deb" | tee "$work/upgrade.log" || rc=1
  grep -q 'running mounts go on' "$work/upgrade.log" || { echo "does not say what becomes of mounts"; rc=1; }
  [[ $(nspawn_in dpkg-query -W -f '${Version}' modelfs) == 99.0.0-1 ]] || rc=1
  [[ $(daemon) == "$before" ]] && reads && nspawn_in systemctl is-active mnt-models.mount || rc=1
  [[ $(stat -c %a "$root/etc/modelfs/llama.key") == 600 ]] || rc=1
  kill "$reader" && wait "$reader" 2>/dev/null || true
  nspawn_in pkill -x sleep || true
  # As long as it lives, the mount is busy.
  until_true 60 reader_gone || rc=1
  return $rc
}
reader_gone() { ! nspawn_in pgrep -f '^sleep 600$'; }
again() { nspawn_in systemctl restart mnt-models.mount && reads; }
# A unit that is enabled and runs, beside the mount of fstab.
unit() {
  cat >"$root/etc/modelfs/models.env" <<ENV
MODELFS_STORE=/srv/models
MODELFS_MOUNTPOINT=/mnt/unit
MODELFS_KEY_SOURCE=file:/etc/modelfs/llama.key
MODELFS_TRUST=/etc/modelfs/signing.pub
MODELFS_CACHE=256MiB
ENV
  nspawn_in timeout 300 systemctl enable --now modelfs@models.service && nspawn_in diff -r /srv/model /mnt/unit/acme/llama
}
# What a container engine would ask of the driver's socket.
ask_plugin() { # CALL JSON FIELD
  local answer
  answer=$(curl -fsS --unix-socket "/proc/$NSPAWN_LEADER/root/run/docker/plugins/modelfs.sock" -d "$2" "http://plugin/$1") || return 1
  [[ $(jq -r '.Err // ""' <<<"$answer") == "" ]] || { echo "$1: $answer"; return 1; }
  jq -r "$3" <<<"$answer"
}
# The socket starts the driver, whose mount everyone sees; a store of this machine is read in spite of what the unit forbids.
plugin_unit() {
  local place
  page_block "$page" toml volumes | sed 's|"s3://models/prod"|"/srv/models"|; s|/etc/modelfs/keys|/etc/modelfs|; s|512MiB|256MiB|; /^s3-/d' \
    >"$root/etc/modelfs/volumes.toml"
  nspawn_in sh -ec "$(page_block "$page" sh volume-plugin-service)"
  ! nspawn_in systemctl is-active modelfs-volume-plugin.service || return 1
  ask_plugin VolumeDriver.Create '{"Name": "llama", "Opts": {"store": "/srv/models", "model": "acme/llama", "key": "file:/etc/modelfs/llama.key"}}' .Err
  nspawn_in systemctl is-active modelfs-volume-plugin.service || return 1
  place=$(ask_plugin VolumeDriver.Mount '{"Name": "llama", "ID": "one"}' .Mountpoint) || { nspawn_in journalctl -b -u modelfs-volume-plugin -o cat; return 1; }
  nspawn_in diff -r /srv/model "$place/acme/llama" || return 1
  ask_plugin VolumeDriver.Unmount '{"Name": "llama", "ID": "one"}' .Err && ! nspawn_in mountpoint -q "$place"
}
remove() {
  nspawn_in dpkg -r modelfs | tee "$work/remove.log" && grep -q 'go on until umount' "$work/remove.log" && reads || return 1
  ! nspawn_in systemctl is-active modelfs-volume-plugin.service || return 1
  ! nspawn_in systemctl is-active modelfs@models.service && ! nspawn_in mountpoint -q /mnt/unit
}
purge() {
  nspawn_in umount /mnt/models && until_true 90 no_daemon || return 1
  # As a volume plugin leaves it that was killed: what nobody serves any more.
  nspawn_in sh -ec 'mkdir -p /var/lib/modelfs/volumes/dead; exec 9<>/dev/fuse
    mount -i -t fuse.modelfs -o fd=9,rootmode=40000,user_id=0,group_id=0 none /var/lib/modelfs/volumes/dead'
  ! nspawn_in ls /var/lib/modelfs/volumes/dead 2>/dev/null || { echo "it is not dead"; return 1; }
  nspawn_in dpkg -P modelfs
}
no_daemon() { ! nspawn_in pgrep -f mount.modelfs; }
no_trace() {
  rm -f "$root"/etc/systemd/system/stuck.* "$root/root/modelfs.deb"
  : >"$root/etc/fstab"
  file_list >"$work/after"
  diff "$work/before" "$work/after" && [[ ! -e $root/run/modelfs ]] && nspawn_in test ! -e /run/modelfs
}

make_store
: >"$root/etc/fstab"
step "a system boots" boot
# systemd's own folder for encrypted credentials.
install -d -m 700 "$root/etc/credstore.encrypted"
file_list >"$work/before"
step "install the package" install_deb "$work/modelfs.deb"
traces() { ! diff "$work/before" <(file_list) >/dev/null; }
step "the list of files sees it" traces
step "the program runs" nspawn_in modelfs --version
step "/etc/modelfs is for root alone; keys and fstab lines" give_keys
write_fstab
step "power off" nspawn_stop
step "boot again" boot
step "the fstab line is mounted at boot, and read" at_boot
if nspawn_in systemctl is-active --quiet mnt-auto.automount; then
  step "a line with x-systemd.automount is mounted at the first access" at_first_access
else
  skip "x-systemd.automount" "this container has no autofs"
fi
step "a store that does not answer: the boot goes on, the reason is in the journal" went_on
step "a store that says nothing: given up after x-systemd.mount-timeout" given_up
step "no secret is in the journal" not_told
step "upgrade under the mount: it goes on" upgrade
step "and is mounted anew by the new version" again
step "a unit of the package" unit
step "the volume driver of the package, by its socket" plugin_unit
step "remove: units stop, the mount goes on until umount" remove
step "purge" purge
step "no trace is left" no_trace
step "power off at the end" nspawn_stop
finish
