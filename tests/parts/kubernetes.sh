#!/usr/bin/env bash
# A Kubernetes node for the tests (Apache-2.0): kube-apiserver, kubelet and kubectl, and csi-sanity, the conformance suite of
# volume drivers; built from the Go module proxy, checked against Go's checksum database and tests/parts/kubernetes/go.sum.
# 6 minutes on two cores and 4 GB of Go's caches; nothing when these very versions are there.
# etcd, containerd, runc, busybox and ip come from the system: any version that Debian 12 or newer has.
#
#   tests/parts/kubernetes.sh install [apt|kube-apiserver|kubelet|kubectl|csi-sanity]...   default: all of them
#   tests/parts/kubernetes.sh path kube-apiserver|kubelet|kubectl|csi-sanity               prints where one is
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tests/parts/again.sh
source "$here/again.sh"
KUBERNETES_VERSION=1.34.0
CSI_SANITY_VERSION=5.6.0
cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}

root_of() {
  case $1 in
  kube-apiserver | kubelet | kubectl) echo "$cache/kubernetes-$KUBERNETES_VERSION" ;;
  csi-sanity) echo "$cache/csi-sanity-$CSI_SANITY_VERSION" ;;
  *) echo "[parts] kubernetes: no part called '$1'" >&2 && exit 2 ;;
  esac
}

# The versions are what `kubectl version` and a node's status show; without them the kubelet calls itself v0.0.0, which the
# API server would take for a node too old to talk to.
version_flags() {
  local package
  for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    printf -- '-X %s.gitVersion=v%s -X %s.gitMajor=1 -X %s.gitMinor=%s ' \
      $package $KUBERNETES_VERSION $package $package "$(cut -d. -f2 <<<$KUBERNETES_VERSION)"
  done
}

build() { # NAME FOLDER
  case $1 in
  # Kubernetes pins its own libraries by replacements, which `go install` refuses: hence a module around it.
  kube*) (cd "$here/kubernetes" && again go build -ldflags "-s -w $(version_flags)" -o "$2/$1" "k8s.io/kubernetes/cmd/$1") ;;
  csi-sanity) GOBIN=$2 again go install -ldflags '-s -w' "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@v$CSI_SANITY_VERSION" ;;
  esac
}

# Command -> Debian package.
declare -A packages=([etcd]=etcd-server [containerd]=containerd [ctr]=containerd [runc]=runc [ip]=iproute2)

install_apt() {
  local wanted=() command
  for command in "${!packages[@]}"; do
    command -v "$command" >/dev/null || wanted+=("${packages[$command]}")
  done
  # /bin/busybox of another package may be linked to libraries that an image does not have.
  [[ $(busybox 2>/dev/null || true) == BusyBox* ]] || wanted+=(busybox-static)
  if [[ ${#wanted[@]} == 0 ]]; then
    echo "[parts] kubernetes: nothing to install with apt"
  elif [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "[parts] kubernetes: please install ${wanted[*]}" >&2
    return 1
  else
    echo "[parts] kubernetes: apt installs ${wanted[*]}"
    apt_install "${wanted[@]}"
  fi
}

install_one() {
  local name=$1 dir
  dir=$(root_of "$name")
  if [[ -x $dir/bin/$name ]]; then
    echo "[parts] $name is there (${dir##*/})"
    return
  fi
  if ! command -v go >/dev/null; then
    echo "[parts] $name needs Go 1.24 or newer: https://go.dev/dl/" >&2
    exit 1
  fi
  echo "[parts] $name: building (${dir##*/}; several minutes)"
  # Built aside and moved, so that a build cut short is not taken for the program.
  mkdir -p "$dir.build" "$dir/bin"
  build "$name" "$dir.build"
  mv "$dir.build/$name" "$dir/bin/$name"
  rmdir --ignore-fail-on-non-empty "$dir.build"
  echo "[parts] $name: built"
}

case ${1:-install} in
path) echo "$(root_of "$2")/bin/$2" ;;
install)
  shift || true
  [[ $# -gt 0 ]] || set -- apt kubectl kubelet kube-apiserver csi-sanity
  for name in "$@"; do
    if [[ $name == apt ]]; then install_apt; else install_one "$name"; fi
  done
  ;;
*)
  echo "usage: $0 install [apt|kube-apiserver|kubelet|kubectl|csi-sanity]... | path NAME" >&2
  exit 2
  ;;
esac
