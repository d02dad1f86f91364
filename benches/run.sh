#!/bin/sh
# Measures modelfs on this machine and prints tables of ratios. Needs root (tmpfs and FUSE mounts) and about four times
# the file's size of free memory. Nothing is left behind but the build and, with --json, the results.
#
#   benches/run.sh [--size-mib 1024] [--rounds 3] [--dir /var/tmp] [--json FOLDER] [--no-peers]
set -eu
cd "$(dirname "$0")/.."

size=1024 rounds=3 dir=${TMPDIR:-/var/tmp} json='' peers=''
while [ $# -gt 0 ]; do
    case $1 in
        --size-mib) size=$2; shift 2 ;;
        --rounds) rounds=$2; shift 2 ;;
        --dir) dir=$2; shift 2 ;;
        --json) mkdir -p "$2"; json=$(cd "$2" && pwd); shift 2 ;;
        --no-peers) peers=--no-peers; shift ;;
        *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
done

if [ "$(id -u)" != 0 ]; then
    echo 'benches/run.sh: the mount bench needs root; the others would run as anybody with cargo bench' >&2
    exit 1
fi

if [ -z "$peers" ]; then
    for program in rclone gocryptfs fusermount3; do
        command -v "$program" >/dev/null && continue
        package=$program
        [ "$program" = fusermount3 ] && package=fuse3
        if command -v apt-get >/dev/null; then
            apt-get install -y -q "$package" >/dev/null || echo "could not install $package: left out of the comparison" >&2
        else
            echo "install $package by hand to have it in the comparison" >&2
        fi
    done
fi

out() { [ -z "$json" ] || echo "--json $json/$1.json"; }
cargo bench -q --no-run --bench crypto --bench read_path --bench mount
# shellcheck disable=SC2046 # the option and its value are two words, and the folder was made absolute above
{
    cargo bench -q --bench crypto -- --rounds "$rounds" $(out crypto)
    cargo bench -q --bench read_path -- --size-mib "$size" --rounds "$rounds" --dir "$dir" $(out read_path)
    cargo bench -q --bench mount -- --size-mib "$size" --rounds "$rounds" --dir "$dir" $peers $(out mount)
}
