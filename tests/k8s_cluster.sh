# shellcheck shell=bash
# Sourced: a Kubernetes node of the test's own, from real parts (tests/parts/kubernetes.sh): etcd, API server, containerd and
# kubelet in one network namespace. No scheduler and no controllers: pods name the node. A pod's network is a namespace that leads
# nowhere, unless it uses the node's.
#
#   cluster_missing           why it cannot run here; nothing if it can
#   cluster_up DIR            starts it in DIR, which may exist; its servers' logs are DIR/*.log
#   kc ARGS...                kubectl, as administrator
#   in_cluster CMD...         a command in the cluster's network, in the foreground
#   serve NAME CMD...         the same in the background; ended by cluster_down before the node's own servers
#   image NAME FOLDER [JSON]  imports the tree FOLDER as the image localhost/NAME; JSON is its entrypoint
#   cluster_down              pods first, then the servers, mounts, the namespace
#
# FUSE mounts must be seen by the kubelet, by containers and by this shell, so nothing here makes a mount namespace: the network
# namespace is entered by nsenter, and the kubelet's folder is a shared mount, as it is on a machine that systemd booted.

cluster_node=node1
cluster_address=10.77.0.1
cluster_parts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/parts/kubernetes.sh
declare -A cluster_pids=()

cluster_part() { MODELFS_TEST_CACHE=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests} bash "$cluster_parts" path "$1"; }

cluster_missing() {
  local name
  [[ $EUID == 0 ]] || { echo "it needs root"; return; }
  for name in etcd containerd ctr runc ip nsenter busybox openssl jq; do
    command -v "$name" >/dev/null || { echo "$name is not installed"; return; }
  done
  for name in kube-apiserver kubelet kubectl; do
    [[ -x $(cluster_part "$name") ]] || { echo "$name is not installed (tests/parts/install.sh kubernetes)"; return; }
  done
  [[ -c /dev/fuse ]] || echo "this machine has no /dev/fuse"
}

kc() { in_cluster "$(cluster_part kubectl)" --kubeconfig "$cluster_dir/admin.conf" "$@"; }
in_cluster() { nsenter --net="/run/netns/$cluster_netns" "$@"; }

serve() { # NAME CMD...
  local name=$1
  shift
  # nsenter executes the command in its own place, so that $! is the server.
  nsenter --net="/run/netns/$cluster_netns" "$@" >>"$cluster_dir/$name.log" 2>&1 </dev/null &
  cluster_pids[$name]=$!
}
end_server() { # NAME [SIGNAL]
  local pid=${cluster_pids[$1]:-} tries
  [[ -n $pid ]] || return 0
  kill "-${2:-TERM}" "$pid" 2>/dev/null || true
  for tries in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || break
    [[ $tries != 80 ]] || kill -KILL "$pid" 2>/dev/null || true
    sleep 0.1
  done
  wait "$pid" 2>/dev/null || true
  unset "cluster_pids[$1]"
}

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || return 1; sleep 0.2; done
}

cluster_network() {
  ip netns add "$cluster_netns"
  ip -n "$cluster_netns" link set lo up
  # Both ends within: the address has to be on an interface that is up, and the kubelet refuses loopback.
  ip -n "$cluster_netns" link add kube0 type veth peer name kube1
  ip -n "$cluster_netns" address add $cluster_address/24 dev kube0
  ip -n "$cluster_netns" link set kube0 up
  ip -n "$cluster_netns" link set kube1 up
  ip -n "$cluster_netns" route add default via 10.77.0.254 dev kube0
}

cluster_certificate() { # NAME SUBJECT
  openssl req -newkey rsa:2048 -nodes -keyout "$cluster_dir/pki/$1.key" -subj "$2" 2>/dev/null |
    openssl x509 -req -CA "$cluster_dir/pki/ca.crt" -CAkey "$cluster_dir/pki/ca.key" -CAcreateserial -days 2 \
      -extfile <(echo "subjectAltName=IP:127.0.0.1,IP:$cluster_address,DNS:$cluster_node") \
      -out "$cluster_dir/pki/$1.crt" 2>/dev/null
}
cluster_kubeconfig() { # FILE CERTIFICATE
  cat >"$cluster_dir/$1" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", certificate-authority: $cluster_dir/pki/ca.crt}}]
users: [{name: u, user: {client-certificate: $cluster_dir/pki/$2.crt, client-key: $cluster_dir/pki/$2.key}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
YAML
}
cluster_pki() {
  mkdir -p "$cluster_dir/pki"
  openssl req -x509 -newkey rsa:2048 -nodes -keyout "$cluster_dir/pki/ca.key" -out "$cluster_dir/pki/ca.crt" \
    -days 2 -subj /CN=ca 2>/dev/null
  cluster_certificate api /CN=kube-apiserver
  cluster_certificate node "/O=system:nodes/CN=system:node:$cluster_node"
  cluster_certificate admin /O=system:masters/CN=admin
  openssl genrsa -out "$cluster_dir/pki/sa.key" 2048 2>/dev/null
  openssl rsa -in "$cluster_dir/pki/sa.key" -pubout -out "$cluster_dir/pki/sa.pub" 2>/dev/null
  cluster_kubeconfig admin.conf admin
  cluster_kubeconfig kubelet.conf node
}

cluster_api_server() {
  local pki=$cluster_dir/pki
  serve etcd etcd --data-dir "$cluster_dir/etcd" --listen-client-urls http://127.0.0.1:2379 \
    --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 --unsafe-no-fsync
  serve kube-apiserver "$(cluster_part kube-apiserver)" --etcd-servers http://127.0.0.1:2379 \
    --bind-address=127.0.0.1 --secure-port=6443 --advertise-address=$cluster_address \
    --tls-cert-file "$pki/api.crt" --tls-private-key-file "$pki/api.key" --client-ca-file "$pki/ca.crt" \
    --authorization-mode=Node,RBAC --allow-privileged=true --enable-admission-plugins=NodeRestriction \
    --service-account-issuer=https://127.0.0.1:6443 --service-account-key-file "$pki/sa.pub" \
    --service-account-signing-key-file "$pki/sa.key" --service-cluster-ip-range=10.0.0.0/24 \
    --kubelet-client-certificate "$pki/admin.crt" --kubelet-client-key "$pki/admin.key" \
    --kubelet-preferred-address-types=InternalIP --endpoint-reconciler-type=none
  until_true 300 kc get --raw /readyz
}

# A network plugin that gives a pod an address and no wire: enough for the node to be ready and for pods of the restricted
# profile, which may not use the node's network.
cluster_pod_network() {
  mkdir -p "$cluster_dir"/cni/{bin,conf}
  cat >"$cluster_dir/cni/bin/nowhere" <<'PLUGIN'
#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "0.4.0", "supportedVersions": ["0.3.1", "0.4.0"]}' ;;
ADD) echo "{\"cniVersion\": \"0.4.0\", \"interfaces\": [{\"name\": \"$CNI_IFNAME\", \"sandbox\": \"$CNI_NETNS\"}],
  \"ips\": [{\"version\": \"4\", \"address\": \"10.78.0.2/24\", \"interface\": 0}]}" ;;
esac
PLUGIN
  chmod 755 "$cluster_dir/cni/bin/nowhere"
  # containerd calls it for the loopback interface by its own name.
  ln -sf nowhere "$cluster_dir/cni/bin/loopback"
  echo '{"cniVersion": "0.4.0", "name": "nowhere", "plugins": [{"type": "nowhere"}]}' >"$cluster_dir/cni/conf/1.conflist"
}

cluster_containerd() {
  mkdir -p "$cluster_dir/containerd"
  cluster_pod_network
  # restrict_oom_score_adj and disable_hugetlb_controller: a machine that is itself a container has neither.
  cat >"$cluster_dir/containerd.toml" <<TOML
version = 2
root = "$cluster_dir/containerd/root"
state = "$cluster_dir/containerd/state"
[grpc]
address = "$cluster_dir/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/pause:1"
restrict_oom_score_adj = true
disable_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "$cluster_dir/cni/bin"
conf_dir = "$cluster_dir/cni/conf"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.internal.v1.opt"]
path = "$cluster_dir/containerd/opt"
TOML
  serve containerd containerd --config "$cluster_dir/containerd.toml"
  until_true 120 ctr --address "$cluster_dir/containerd.sock" version
}

cluster_kubelet() {
  mkdir -p "$cluster_dir/kubelet" "$cluster_dir/pod-logs"
  mount --bind "$cluster_dir/kubelet" "$cluster_dir/kubelet"
  mount --make-rshared "$cluster_dir/kubelet"
  # syncFrequency: how often the kubelet comes by every pod, and so how often a CSI volume is published again.
  cat >"$cluster_dir/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $cluster_address
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: $cluster_dir/pki/ca.crt}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
cgroupsPerQOS: false
enforceNodeAllocatable: []
localStorageCapacityIsolation: false
resolvConf: ""
syncFrequency: 5s
containerRuntimeEndpoint: unix://$cluster_dir/containerd.sock
podLogsDir: $cluster_dir/pod-logs
tlsCertFile: $cluster_dir/pki/node.crt
tlsPrivateKeyFile: $cluster_dir/pki/node.key
YAML
  serve kubelet "$(cluster_part kubelet)" --config "$cluster_dir/kubelet.yaml" --kubeconfig "$cluster_dir/kubelet.conf" \
    --hostname-override $cluster_node --node-ip $cluster_address --root-dir "$cluster_dir/kubelet" \
    --cert-dir "$cluster_dir/pki"
  until_true 180 kc get node $cluster_node
}

image() { # NAME FOLDER [ENTRYPOINT [USER]]: a docker archive of one layer, made by hand
  local name=$1 out=$cluster_dir/image digest
  rm -rf "$out" && mkdir -p "$out"
  tar -C "$2" --owner 0 --group 0 --numeric-owner -cf "$out/layer.tar" .
  digest=$(sha256sum "$out/layer.tar" | cut -d' ' -f1)
  jq -n --arg digest "sha256:$digest" --arg arch "$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')" \
    --argjson entrypoint "${3:-null}" --arg user "${4:-}" \
    '{architecture: $arch, os: "linux", config: {Env: ["PATH=/bin:/usr/bin"], Entrypoint: $entrypoint, User: $user}, rootfs: {type: "layers", diff_ids: [$digest]}}' \
    >"$out/config.json"
  jq -n --arg name "localhost/$name" '[{Config: "config.json", RepoTags: [$name], Layers: ["layer.tar"]}]' >"$out/manifest.json"
  tar -C "$out" -cf "$cluster_dir/image.tar" manifest.json config.json layer.tar
  ctr --address "$cluster_dir/containerd.sock" -n k8s.io images import "$cluster_dir/image.tar" >/dev/null
  rm -rf "$out" "$cluster_dir/image.tar"
}

busybox_tree() { # FOLDER: a root file system of one program
  local command
  mkdir -p "$1"/{bin,etc,proc,sys,dev,tmp,run,models}
  cp "$(command -v busybox)" "$1/bin/busybox"
  for command in $("$1/bin/busybox" --list); do
    [[ -e $1/bin/$command ]] || ln -s busybox "$1/bin/$command"
  done
  echo "root:x:0:0::/:/bin/sh" >"$1/etc/passwd"
}
cluster_images() {
  busybox_tree "$cluster_dir/busybox"
  image busybox:1 "$cluster_dir/busybox"
  # What holds a pod's sandbox; containerd runs it without naming a command.
  image pause:1 "$cluster_dir/busybox" '["/bin/busybox", "sleep", "1000000"]'
}
cluster_up() { # DIR
  mkdir -p "$1"
  cluster_dir=$(cd "$1" && pwd -P)
  cluster_netns=modelfs-k8s-$$
  cluster_network || return 1
  cluster_pki || return 1
  cluster_containerd || { tail -5 "$cluster_dir/containerd.log"; return 1; }
  cluster_images || return 1
  cluster_api_server || { tail -5 "$cluster_dir/kube-apiserver.log"; return 1; }
  cluster_kubelet || { tail -5 "$cluster_dir/kubelet.log"; return 1; }
  # What controllers would make. The namespace it lies in is made by the API server, some time after it calls itself ready.
  until_true 120 kc create serviceaccount default
}

cluster_down() {
  local name pid
  [[ -n ${cluster_dir:-} ]] || return 0
  if [[ -n ${cluster_pids[kubelet]:-} ]] && kill -0 "${cluster_pids[kubelet]}" 2>/dev/null; then
    # Pods with volumes before the driver that takes these away.
    timeout 60 bash -c "$(declare -f kc in_cluster cluster_part); $(declare -p cluster_dir cluster_netns cluster_parts)
      kc delete pods --all-namespaces -l '!modelfs-driver' --timeout=40s; kc delete pods --all --all-namespaces --timeout=20s" \
      >/dev/null 2>&1 || true
  fi
  for name in "${!cluster_pids[@]}"; do
    [[ $name == etcd || $name == kube-apiserver || $name == containerd || $name == kubelet ]] || end_server "$name"
  done
  end_server kubelet
  cluster_end_containers
  end_server containerd
  # A shim outlives containerd, and a container its shim; the shim's command line names this cluster's socket.
  for pid in $(pgrep -f "containerd-shim.*$cluster_dir/containerd.sock" || true); do
    pkill -KILL -P "$pid" || true
    kill -KILL "$pid" 2>/dev/null || true
  done
  end_server kube-apiserver
  end_server etcd
  cluster_unmount
  ip netns delete "$cluster_netns" 2>/dev/null || true
}
cluster_end_containers() {
  local task
  for task in $(ctr --address "$cluster_dir/containerd.sock" -n k8s.io tasks ls -q 2>/dev/null); do
    ctr --address "$cluster_dir/containerd.sock" -n k8s.io tasks kill -s SIGKILL "$task" >/dev/null 2>&1 || true
  done
}
cluster_unmount() {
  local place
  # Last made, first undone.
  for place in $(awk -v below="$cluster_dir/" 'index($5, below) == 1 {print $5}' /proc/self/mountinfo | tac); do
    umount --lazy "$place" 2>/dev/null || true
  done
}
