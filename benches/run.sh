#!/usr/bin/env bash
# Measures modelfs on this machine and prints tables of ratios. Needs root (tmpfs and FUSE mounts) and about four times
# the file's size of free memory. Nothing is left behind but builds, installed parts, made data and, if asked for, results.
#
#   benches/run.sh [--size-mib 1024] [--rounds 3] [--dir /var/tmp] [--json FOLDER] [--no-peers] [--no-install]
#       everything: the benches of modelfs itself, and then the peers
#   benches/run.sh own [the same options]       only the benches of modelfs itself (cargo bench)
#   benches/run.sh peers [--quick] [--size MIB] [--rounds N] [--only NAME] [--kinds KIND,...] [--out docs] [--no-install] ...
#       only the comparison from an S3 server; --quick is a smoke test of a few minutes, --help shows all of it
#
# The peers come from ordinary packages (tests/parts/install.sh bench-peers and what it stands on): apt, PyPI, crates.io and
# the Go module proxy; the first time takes 20 minutes and 8 GB, 5.9 of them torch. MODELFS_TEST_BIN names another modelfs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

what=all
case ${1:-} in
own | peers) what=$1; shift ;;
-h | --help) usage; exit ;;
esac

if [[ $(id -u) != 0 && " $* " != *" --help "* ]]; then
    echo 'benches/run.sh: mounting tmpfs and FUSE needs root; crypto and read_path alone run as anybody with cargo bench' >&2
    exit 1
fi

# The options that everything and own take; those of peers go to it as they are.
size=1024 rounds=3 dir=${TMPDIR:-/var/tmp} json='' local_peers='' install=1 quick=''
peers_options=()
if [[ $what == peers ]]; then
    for word in "$@"; do
        case $word in
        --no-install) install='' ;;
        --quick) quick=1; peers_options+=("$word") ;;
        -h | --help) exec python3 benches/peers --help ;;
        *) peers_options+=("$word") ;;
        esac
    done
else
    while [[ $# -gt 0 ]]; do
        case $1 in
        --size-mib) size=$2; shift 2 ;;
        --rounds) rounds=$2; shift 2 ;;
        --dir) dir=$2; shift 2 ;;
        --json) mkdir -p "$2"; json=$(cd "$2" && pwd); shift 2 ;;
        --no-peers) local_peers=--no-peers; [[ $what == own ]] || what=own; shift ;;
        --no-install) install=''; shift ;;
        *) usage; exit 2 ;;
        esac
    done
    peers_options=(--size "$size" --rounds "$rounds" --dir "$dir" ${json:+--out "$json"})
fi

# executable NAME: builds that bench and says where it is; nothing if there is none by that name.
executable() {
    [[ -f benches/$1.rs ]] || return 0
    cargo bench --quiet --no-run --bench "$1" --message-format json |
        sed -n "s|.*\"kind\":\\[\"bench\"\\].*\"name\":\"$1\".*\"executable\":\"\\([^\"]*\\)\".*|\\1|p"
}

run_own() {
    local program
    for program in rclone gocryptfs; do
        [[ -n $local_peers ]] || command -v $program >/dev/null ||
            echo "$program is not on the path: left out of the local comparison" >&2
    done
    out() { [[ -z $json ]] || echo "--json $json/$1.json"; }
    cargo bench -q --no-run --bench audit --bench crypto --bench codec --bench read_path --bench mount --bench scale
    # shellcheck disable=SC2046 # the option and its value are two words, and the folder was made absolute above
    {
        cargo bench -q --bench audit -- --rounds "$rounds" --size-mib "$size" --dir "$dir" $(out audit)
        cargo bench -q --bench crypto -- --rounds "$rounds" $(out crypto)
        cargo bench -q --bench codec -- --rounds "$rounds" $(out codec)
        cargo bench -q --bench read_path -- --size-mib "$size" --rounds "$rounds" --dir "$dir" $(out read_path)
        cargo bench -q --bench mount -- --size-mib "$size" --rounds "$rounds" --dir "$dir" $local_peers $(out mount)
        cargo bench -q --bench scale -- --rounds "$rounds" $(out scale)
    }
    # From a real S3 server over links that are narrow, far and partly dead; and which opens wait.
    if command -v tc >/dev/null; then
        benches/slow_store.sh link --rounds "$rounds"
        benches/slow_store.sh stuck --rounds "$rounds"
    else
        echo 'tc is not here (Debian: iproute2): links are left out' >&2
    fi
    benches/open_policy.sh --rounds "$rounds"
}

run_peers() {
    local modelfs=${MODELFS_TEST_BIN:-${CARGO_TARGET_DIR:-target}/release/modelfs} gets
    if [[ -n $install ]]; then
        local parts=(apt clients-lite models-small versitygw)
        # The smoke test does with what is there of the large parts.
        [[ -n $quick ]] || parts+=(clients-torch models)
        bash tests/parts/install.sh "${parts[@]}" bench-peers
    fi
    [[ -n ${MODELFS_TEST_BIN:-} ]] || cargo build --quiet --release --locked
    gets=$(executable gets)
    python3 benches/peers --modelfs "$(realpath "$modelfs")" --reader "$(executable mount)" --crypto "$(executable crypto)" \
        ${gets:+--gets "$gets"} "${peers_options[@]}"
}

if [[ $what != peers ]]; then
    # What the local comparison of benches/mount.rs looks for on the path.
    cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
    if [[ -n $install && -z $local_peers ]]; then bash tests/parts/install.sh apt bench-peers; fi
    PATH=$(echo "$cache"/rclone-*/bin):$PATH
    run_own
fi
[[ $what == own ]] || run_peers
