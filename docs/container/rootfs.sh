#!/usr/bin/env bash
# The context of docs/container/Dockerfile: everything that goes into the image, taken from this machine.
#
#   bash docs/container/rootfs.sh BINARY FOLDER      FOLDER must not exist
#
# Needs ldd, fusermount3 (package fuse3) and, for the right to lock memory in a container without ulimits, setcap (package
# libcap2-bin) as root.
set -euo pipefail

[[ $# == 2 ]] || { sed -n '2,/^set/{/^set/!p}' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
binary=$1 folder=$2
[[ -x $binary ]] || { echo "rootfs.sh: $binary is not a program" >&2; exit 2; }
fusermount=$(command -v fusermount3) || { echo "rootfs.sh: fusermount3 is not here; install fuse3" >&2; exit 1; }
certificates=/etc/ssl/certs/ca-certificates.crt
[[ -f $certificates ]] || { echo "rootfs.sh: $certificates is not here; install ca-certificates" >&2; exit 1; }

mkdir "$folder"
trees=$(mktemp -d)
trap 'rm -rf "$trees"' EXIT
system=$trees/system user=$trees/user
mkdir -p "$system"/{usr/bin,etc/ssl/certs,proc,sys,dev,tmp,run} "$user"/{models,home/modelfs/run}
chmod 755 "$system"
chmod 1777 "$system/tmp"
chmod 700 "$user/home/modelfs/run"
install -m 755 "$binary" "$system/usr/bin/modelfs"
! command -v strip >/dev/null || strip --strip-debug "$system/usr/bin/modelfs"
# Set-user-ID root: it mounts for the ordinary user, with the capabilities that the container is given.
install -m 4755 "$fusermount" "$system/usr/bin/fusermount3"
install -m 644 "$certificates" "$system/etc/ssl/certs/"
printf 'root:x:0:0::/:/usr/bin/false\nmodelfs:x:65532:65532::/home/modelfs:/usr/bin/false\n' >"$system/etc/passwd"
printf 'root:x:0:\nmodelfs:x:65532:\n' >"$system/etc/group"
echo user_allow_other >"$system/etc/fuse.conf"
ln -s ../proc/self/mounts "$system/etc/mtab"

# Each library at the path by which it is found, the loader included.
for program in "$binary" "$fusermount"; do
  ldd "$program" | grep -oE '/[^ ]+' | while read -r library; do
    install -D -m 755 "$library" "$system$library"
  done
done

# Permitted, not effective: the program raises it itself, and starts all the same where the container does not have it.
if [[ $EUID == 0 ]] && command -v setcap >/dev/null; then
  setcap cap_ipc_lock=p "$system/usr/bin/modelfs"
else
  echo "rootfs.sh: no setcap as root: memory is locked within --ulimit memlock only" >&2
fi
# With SOURCE_DATE_EPOCH the same files give the same archives.
same=(--sort=name "--pax-option=delete=atime,delete=ctime,exthdr.name=%d/PaxHeaders/%f")
[[ -z ${SOURCE_DATE_EPOCH:-} ]] || same+=(--mtime="@$SOURCE_DATE_EPOCH")
tar -C "$system" --format=pax "${same[@]}" --xattrs --xattrs-include=security.capability --owner=0 --group=0 --numeric-owner \
  -cf "$folder/system.tar" .
tar -C "$user" --format=pax "${same[@]}" --owner=65532 --group=65532 --numeric-owner -cf "$folder/user.tar" models home/modelfs
du -sh "$folder" | sed 's/\s.*/ in all/'
