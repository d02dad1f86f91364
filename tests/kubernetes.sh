#!/usr/bin/env bash
# Models in Kubernetes: a real API server, kubelet and containerd, a live HashiCorp Vault with Kubernetes auth, a live MinIO, the
# driver from its own DaemonSet, pods of the restricted profile. Who may read what is decided by service accounts; it is taken away
# and given back, the driver is killed and comes back, and at the end nothing is left.
#
#   tests/kubernetes.sh      needs the release build (MODELFS names another binary) and tests/parts/install.sh vault kubernetes
#
# Commands, policies and roles are those of docs/DEPLOY.md and docs/KEYS.md, taken out of the pages as they stand; the manifests
# are those of docs/kubernetes, where only places (the kubelet's folder, addresses, sizes) are replaced.
# MODELFS_TEST_KUBE_KEEP=1 keeps the folder with all logs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh
source tests/k8s_cluster.sh

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
vault=$(MODELFS_TEST_CACHE=$cache bash tests/parts/vault.sh path vault)
minio=$(MODELFS_TEST_CACHE=$cache bash tests/parts/vault.sh path minio)
sanity=$(cluster_part csi-sanity)
page=docs/DEPLOY.md

if [[ ! -x $modelfs ]]; then
  step "kubernetes: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
lacking=$(cluster_missing)
for part in "$vault" "$minio"; do [[ -n $lacking || -x $part ]] || lacking="$part is not installed"; done
if [[ -n $lacking ]]; then
  skip kubernetes "$lacking"
  finish
  exit
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-kube.XXXXXX")
# What `ls` says of a dead mount is looked for in English.
export LC_ALL=C MODELFS_TEST_CACHE=$cache HOME=$work/home XDG_CONFIG_HOME=$work/config MODELFS_STATE_DIR=$work/state
mkdir -p "$HOME" "$work/bin" "$work/minio"
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS)_' | grep -vE '^MODELFS_(TEST_[A-Z_]+|STATE_DIR)$'); do unset "$name"; done
cleanup() {
  cluster_down
  if [[ -n ${MODELFS_TEST_KUBE_KEEP:-} ]]; then echo "kept: $work"; else rm -rf --one-file-system "$work"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# What everything after it needs.
must() { # NAME COMMAND...
  step "$@"
  [[ $(tail -1 "$MODELFS_TEST_STEPS") == passed* ]] || { finish; exit; }
}

# ---- The cluster, Vault and the bucket, all in one network namespace.

must "a node comes up: etcd, API server, containerd, kubelet" cluster_up "$work/cluster"

# Programs as a page's reader would call them, in the cluster's network.
wrapper() { # NAME PROGRAM ARGS...
  local name=$1
  shift
  { echo '#!/bin/sh'; echo "exec nsenter --net=/run/netns/$cluster_netns $(printf '%q ' "$@") \"\$@\""; } >"$work/bin/$name"
  chmod 755 "$work/bin/$name"
}
wrapper kubectl "$(cluster_part kubectl)" --kubeconfig "$cluster_dir/admin.conf"
wrapper vault "$vault"
wrapper modelfs "$modelfs"
# What the administrator uses; the driver gets none of it.
export PATH=$work/bin:$PATH
admin_env=("NODE=$cluster_node" VAULT_ADDR=http://127.0.0.1:8200 VAULT_TOKEN=root KUBERNETES_API=https://127.0.0.1:6443
  "KUBERNETES_CA=$cluster_dir/pki/ca.crt" STORAGE_USER=storage-admin STORAGE_PASSWORD=storage-password
  STORAGE_ENDPOINT=http://127.0.0.1:9000 MODELFS_S3_ENDPOINT=http://127.0.0.1:9000 MODELFS_S3_REGION=us-east-1
  AWS_ACCESS_KEY_ID=storage-admin AWS_SECRET_ACCESS_KEY=storage-password)
admin() { env "${admin_env[@]}" "$@"; }
block() { # PAGE NAME: a page's sh block as the administrator
  local script
  script=$(page_block "$1" sh "$2") || return 1
  admin bash -euo pipefail -c "$script"
}
start_vault() {
  serve vault env VAULT_DEV_ROOT_TOKEN_ID=root "$vault" server -dev -dev-no-store-token -dev-listen-address=127.0.0.1:8200
  until_true 120 admin vault token lookup
}
start_store() {
  serve minio env MINIO_ROOT_USER=storage-admin MINIO_ROOT_PASSWORD=storage-password MINIO_BROWSER=off \
    "$minio" server "$work/minio" --address 127.0.0.1:9000 --quiet
  # It calls itself ready a moment before it serves: whom it does not know it tells so (403) only then (503 before).
  serves() { [[ $(in_cluster curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:9000/) == 403 ]]; }
  until_true 120 serves
  in_cluster curl -fsS --aws-sigv4 aws:amz:us-east-1:s3 --user storage-admin:storage-password -X PUT http://127.0.0.1:9000/models
}
# A dev server has a KV engine at secret/ already.
vault_setup() { admin vault secrets disable secret >/dev/null && block docs/KEYS.md setup && block docs/KEYS.md storage; }
must "Vault is up" start_vault
must "a store is up" start_store
must "Vault is set up as docs/KEYS.md says" vault_setup
must "the driver's namespace and Vault's reviewer, as the page says" block $page kube-namespace
must "pods may log in to Vault, as the page says" block $page kube-auth

# ---- Who may open what. llama and qwen have a key each, and both may open the shared model.
policy_for() { # MODEL OTHER...
  page_block $page hcl kube-policy | sed "s/llama/$1/"
  for other in "${@:2}"; do echo "path \"transit/decrypt/$other\" { capabilities = [\"update\"] }"; done
}
role_as_the_page_says() { policy_for llama shared >"$work/llama.hcl" && (cd "$work" && block "$OLDPWD/$page" kube-role); }
role_for() { # NAME: the page's role by another name
  local script
  script=$(page_block $page sh kube-role | sed "s/llama/$1/g")
  policy_for "$1" shared >"$work/$1.hcl"
  (cd "$work" && admin bash -euo pipefail -c "$script")
}
must "llama's key, policy and role, as the page says" role_as_the_page_says
step "the same for qwen" role_for qwen
step "a key for both" admin vault write -f transit/keys/shared derived=true

# Models of 24 MiB, each with a sentence that is looked for in memory at the end.
canary=modelfs-canary-$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
make_model() { # NAME
  python3 - "$work/$1" "$canary-$1" <<'PYTHON'
import json, random, struct, sys
from pathlib import Path

folder, canary = Path(sys.argv[1]), sys.argv[2].encode()
folder.mkdir()
body = random.Random(canary).randbytes((24 << 20) - len(canary)) + canary
header = json.dumps({"w": {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}}).encode()
(folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
(folder / "config.json").write_text(json.dumps({"model": sys.argv[2]}))
PYTHON
}
seal_model() { # NAME
  make_model "$1" && admin modelfs seal "$work/$1" s3://models/prod "acme/$1" --key "vault-transit:transit/$1" \
    --sign vault-transit:transit/release
}
step "and for one whom the driver's policy refuses what Vault allows" role_for blocked
for model in llama qwen shared; do must "seal acme/$model with its own key" seal_model $model; done
trust=$(admin vault read -format=json transit/keys/release | jq -r '.data.keys["1"].public_key' | base64 -d | xxd -p -c 64)

# ---- The driver.
driver_image() {
  local tree=$work/image entrypoint user
  # What docs/container/Dockerfile puts together; its last words hold for the driver too, unless the manifest says otherwise.
  bash docs/container/rootfs.sh "$modelfs" "$work/image-context" && mkdir "$tree" || return 1
  tar -C "$tree" --numeric-owner -xf "$work/image-context/system.tar" && tar -C "$tree" -xf "$work/image-context/user.tar" || return 1
  entrypoint=$(sed -n 's/^ENTRYPOINT //p' docs/container/Dockerfile) user=$(sed -n 's/^USER //p' docs/container/Dockerfile)
  [[ -n $entrypoint && -n $user ]] || { echo "docs/container/Dockerfile has no ENTRYPOINT or no USER"; return 1; }
  image modelfs:0.1.0 "$tree" "$entrypoint" "$user"
}
to_json() { kc create --dry-run=client --validate=false -o json -f "$1" | jq -s 'map(if .kind == "List" then .items[] else . end)'; }
# What is of this machine alone; everything else stays as the manifest says.
config_of_this_place() {
  local rules
  rules=$(printf '[[rule]]\nservice_accounts = ["chat/%s"]\nmodels = ["acme/%s"]\nmay = "%s"\n' qwen qwen read qwen shared read llama shared read \
    blocked shared see)
  to_json docs/kubernetes/config.yaml | jq '.[]' | jq --arg trust "$trust" --arg rules "$rules" '
    .data["policy.toml"] += $rules |
    .data["release.pub"] = $trust
    | .data["modelfs.toml"] |= (gsub("8GiB"; "512MiB") | gsub("https://vault.vault.svc:8200"; "http://127.0.0.1:8200")
        | gsub("vault-ca-cert[^\n]*\n"; "") + "s3-endpoint = \"http://127.0.0.1:9000\"\n")'
}
# There is no DaemonSet controller here: its template becomes a pod, as the controller would make it.
driver_pod() {
  to_json docs/kubernetes/driver.yaml | jq --arg kubelet "$cluster_dir/kubelet" --arg state "$work/driver-state" --arg audit "$work/driver-audit" '
    .[] | select(.kind == "DaemonSet") | .spec.template
    | {apiVersion: "v1", kind: "Pod", metadata: (.metadata + {name: "modelfs-csi", namespace: "modelfs"}), spec: .spec}
    | .metadata.labels["modelfs-driver"] = "yes"
    | .spec.nodeName = "node1" | .spec.hostNetwork = true
    | .spec.containers[0] |= (.image = "localhost/modelfs:0.1.0" | .imagePullPolicy = "Never"
        | .args += ["--kubelet-dir=" + $kubelet, "--recheck=2s"]
        | .resources = {requests: {cpu: "100m", memory: "1536Mi"}, limits: {memory: "1536Mi"}})
    | walk(if type == "string" then gsub("^/var/lib/kubelet"; $kubelet) else . end)
    | (.spec.volumes[] | select(.name == "state") | .hostPath.path) = $state
    | (.spec.volumes[] | select(.name == "audit") | .hostPath.path) = $audit'
}
driver_ready() { kc get csinode $cluster_node -o json | jq -e '.spec.drivers // [] | any(.name == "csi.modelfs")'; }
start_driver() {
  driver_image || return 1
  config_of_this_place | kc apply -f - || return 1
  kc apply -f docs/kubernetes/driver.yaml -f docs/kubernetes/network.yaml || return 1
  driver_pod | kc apply -f - || return 1
  until_true 180 driver_ready || { kc describe pod -n modelfs modelfs-csi; kc logs -n modelfs modelfs-csi; return 1; }
}
dry_runs() {
  local file
  kc apply -f docs/kubernetes/examples/namespace.yaml || return 1
  for file in docs/kubernetes/*.yaml docs/kubernetes/examples/*.yaml; do
    kc apply --dry-run=server --validate=strict -f "$file" || { echo "refused: $file"; return 1; }
  done
  # The check can fail: one letter too many in a manifest is seen.
  ! sed 's/requiresRepublish/requiresRepublishs/' docs/kubernetes/driver.yaml | kc apply --dry-run=server --validate=strict -f - 2>/dev/null
}
apply_config_with_page() { # the page's own command, with the configuration of this place behind it
  block $page kube-driver && config_of_this_place | kc apply -f -
}
step "every manifest passes the API server" dry_runs
step "the page's command applies the driver's manifests" apply_config_with_page
must "the driver starts from its DaemonSet's template and registers with the kubelet" start_driver
log_of_driver() { kc logs -n modelfs modelfs-csi "$@"; }

# ---- Pods. `pod` turns the example into one more.
pod() { # NAME SERVICE-ACCOUNT MODEL [ROLE] [JQ]
  kc create serviceaccount -n chat "$2" >/dev/null 2>&1 || true
  to_json docs/kubernetes/examples/pod.yaml | jq '.[0]' | jq --arg name "$1" --arg account "$2" --arg model "$3" --arg role "${4:-$2}" '
    .metadata.name = $name | .spec.serviceAccountName = $account
    | .spec.volumes[0].csi.volumeAttributes += {model: ("acme/" + $model), key: ("vault-transit:transit/" + $model), "vault-role": $role}
    # A dead mount fails it at once; a node that stalls is not to.
    | .spec.containers[0].livenessProbe |= (.exec.command[1] = "/models/acme/" + $model + "/config.json" | .timeoutSeconds = 30)
    | .spec.terminationGracePeriodSeconds = 2
    | .spec.nodeName = "node1" | .spec.containers[0] |= (.image = "localhost/busybox:1" | .imagePullPolicy = "Never")
    | '"${5:-.}" | kc apply -f - >/dev/null
}
running() { kc get pod -n chat "$1" -o json | jq -e '.status.containerStatuses[0].state.running != null'; }
up() { until_true 180 running "$1" || { kc describe pod -n chat "$1" | tail -20; log_of_driver --tail 20; return 1; }; }
reads() { # POD MODEL [FOLDER]: every byte as it was sealed
  local got want
  want=$(sha256sum <"$work/$2/model.safetensors")
  got=$(answer_of "$1" sh -c "sha256sum <${3:-/models}/acme/$2/model.safetensors") && [[ $got == "$want" ]] || { echo "got $got"; return 1; }
}
# What the command said holds; where it was not reached, it is asked once more.
answer_of() { # POD COMMAND...
  local said rc=0
  said=$(kc exec -n chat "$1" -- "${@:2}" 2>"$work/exec.err") || rc=$?
  if [[ $rc != 0 ]] && ! grep "command terminated with exit code" "$work/exec.err" >/dev/null; then
    sleep 2
    rc=0
    said=$(kc exec -n chat "$1" -- "${@:2}" 2>"$work/exec.err") || rc=$?
  fi
  [[ $rc == 0 ]] || cat "$work/exec.err" >&2
  echo "$said"
  return $rc
}
opens() { kc exec -n chat "$1" -- cat "/models/acme/$2/config.json" >/dev/null 2>&1; }
# One `exec` that the kubelet did not manage is no loss of the model.
still_opens() { opens "$@" || { sleep 1; opens "$@"; }; }
cannot_open() { ! opens "$@"; }
denied() { # POD MODEL: told so, not merely failing
  local said
  said=$(kc exec -n chat "$1" -- cat "/models/acme/$2/config.json" 2>&1) && return 1
  [[ $said == *"Permission denied"* ]]
}
events() { kc get events -n chat -o json | jq -r --arg pod "$1" '.items[] | select(.involvedObject.name == $pod) | .message'; }
event_says() { # POD WORDS...
  local pod=$1 word said
  shift
  said=$(events "$pod")
  for word in "$@"; do [[ $said == *"$word"* ]] || return 1; done
}
refused() { # POD WORDS...: its events say so, and it does not run
  until_true 120 event_says "$@" || { echo "wanted: ${*:2}"; events "$1" | sort -u; log_of_driver --tail 5; return 1; }
  ! running "$1" >/dev/null || { echo "$1 runs"; return 1; }
  events "$1" | grep -F "$2" | tail -1
  gone "$1"
}
gone() { kc delete pod -n chat "$@" --timeout=180s >/dev/null; }
target_of() { # POD [PLACE]: where the kubelet has its volume
  local uid
  uid=$(kc get pod -n chat "$1" -o jsonpath='{.metadata.uid}')
  awk -v pod="$cluster_dir/kubelet/pods/$uid/volumes/kubernetes.io~csi/" 'index($5, pod) == 1 && / fuse.modelfs / {print $5}' /proc/self/mountinfo | tail -1
}

first_pod() {
  block $page kube-pod || return 1
  # There is no scheduler, and the example's image is not on this node: the same pod for this place.
  gone llama
  pod llama llama llama && up llama
}
must "the page's pod is accepted in a restricted namespace, and starts" first_pod
step "it reads its model" reads llama llama
unprivileged() { kc exec -n chat llama -- cat /proc/1/status | awk '/^(Uid|CapEff)/; /^Uid/ {u = $2} /^CapEff/ {c = $2} END {exit !(u == 1000 && c ~ /^0+$/)}'; }
step "as an ordinary user without a capability" unprivileged
cannot_write() { ! kc exec -n chat llama -- touch /models/acme/llama/x; }
step "and cannot write" cannot_write
qwen_up() { pod qwen qwen qwen && up qwen && reads qwen qwen; }
step "another service account reads another model" qwen_up

governed() {
  local uid record
  # Its probe would read what it is denied, and end it.
  pod blocked blocked shared blocked 'del(.spec.containers[0].livenessProbe)' && up blocked && until_true 180 denied blocked shared || return 1
  uid=$(kc get pod -n chat blocked -o jsonpath='{.metadata.uid}')
  record=$(modelfs audit show "$work/driver-audit/audit.jsonl" --kind open --outcome denied --json | tail -1)
  echo "$record"
  jq -e --arg uid "$uid" '.service_account == "chat/blocked" and .pod_name == "chat/blocked" and .pod == $uid and .model == "acme/shared"' <<<"$record" \
    || return 1
  gone blocked
}
step "a service account that the policy refuses stands in the log with its pod" governed
scraped() {
  local metrics
  metrics=$(curl -fsS --unix-socket "$cluster_dir/kubelet/plugins/csi.modelfs/http.sock" http://modelfs/metrics)
  grep -E '^modelfs_access_denied_total(\{[^}]*\})? [1-9]' <<<"$metrics" || { grep denied <<<"$metrics"; return 1; }
}
step "the driver's metrics are scraped on the node, and count the refusal" scraped

pod thief llama qwen llama
step "it is refused the other's model, in clear words" refused thief "model acme/qwen for service account chat/llama" VAULT_DENIED "must name this service account"
pod liar llama qwen qwen
step "and cannot take the other's role" refused liar "Vault role qwen" VAULT_DENIED
pod stranger stranger llama llama
step "a service account that Vault does not know is refused" refused stranger "service account chat/stranger" VAULT_DENIED
pod writer llama llama llama '.spec.volumes[0].csi.readOnly = false'
step "a writable volume is refused with the fix" refused writer "add readOnly: true"
pod nosy llama llama llama '.spec.volumes[0].csi.volumeAttributes.key = "file:/etc/modelfs/release.pub"'
step "a key file of the node is refused" refused nosy "not \`file:\` keys of the node"
pod lost llama llama llama '.spec.volumes[0].csi.volumeAttributes.store = "file:///var/lib/modelfs"'
step "a store that the operator did not list is refused" refused lost "not among the stores"
pod pushy llama llama llama '.spec.volumes[0].csi.volumeAttributes["vault-addr"] = "http://127.0.0.1:1"'
step "an operator's word is refused to a pod" refused pushy "not for a pod to set"
pod typo llama nothing llama
step "a model that is not there is named" refused typo "model acme/nothing"
why() { block $page kube-why | grep csi.modelfs >/dev/null; }
step "describe shows the volume, as the page says" why

# ---- One cache. The second pod of a model costs no byte of the store.
fetched() { in_driver status "$(target_of "$1")" --json | jq .metrics.fetch_bytes; }
in_driver() { kc exec -n modelfs modelfs-csi -- modelfs "$@"; }
share() {
  local before after
  pod shared-1 llama shared && up shared-1 && reads shared-1 shared || return 1
  before=$(fetched shared-1)
  pod shared-2 qwen shared && up shared-2 && reads shared-2 shared || return 1
  after=$(fetched shared-1)
  echo "fetched before the second pod: $before bytes, after it read everything: $after"
  ((before > 20000000)) || { echo "the counter counts nothing"; return 1; }
  # Refs, slots and the manifest are read again, for a right of its own; data is not.
  ((after - before < 1000000))
}
step "two pods with different accounts share one version's memory" share

# ---- A persistent volume, one folder below, for a pod that sees what is mounted later.
volume() {
  local uid
  kc apply -f docs/kubernetes/examples/volume.yaml >/dev/null || return 1
  gone llama-claim || true
  # What the volume controller does: the claim and the volume know each other, and are bound.
  uid=$(kc get pvc -n chat llama -o jsonpath='{.metadata.uid}')
  kc patch pv llama --type merge -p "{\"spec\": {\"claimRef\": {\"uid\": \"$uid\"}}}" >/dev/null
  kc annotate pvc -n chat llama pv.kubernetes.io/bind-completed=yes >/dev/null
  kc patch pv llama --subresource status --type merge -p '{"status": {"phase": "Bound"}}' >/dev/null
  kc patch pvc -n chat llama --subresource status --type merge \
    -p '{"status": {"phase": "Bound", "accessModes": ["ReadOnlyMany"], "capacity": {"storage": "1Gi"}}}' >/dev/null
  to_json docs/kubernetes/examples/volume.yaml | jq '.[] | select(.kind == "Pod")' | jq '
    .spec.nodeName = "node1" | .spec.terminationGracePeriodSeconds = 2
    | .spec.containers[0] |= (.image = "localhost/busybox:1" | .imagePullPolicy = "Never")' | kc apply -f - >/dev/null
  up llama-claim && reads llama-claim llama /models/store
}
page_volume() { block $page kube-volume && gone llama-claim; }
step "the page's persistent volume is accepted" page_volume
step "a claim's pod reads the model" volume
group() {
  local seen
  pod grouped llama llama llama '.spec.securityContext.fsGroup = 4242' && up grouped && reads grouped llama || return 1
  seen=$(kc exec -n chat grouped -- stat -c '%a %g' /models/acme/llama/config.json) && gone grouped
  [[ $seen == '440 4242' ]] || { echo "mode and group: $seen"; return 1; }
}
step "fsGroup owns the files, and they are closed to others" group

# ---- Revocation, and an outage that is none.
drop_role() {
  admin vault delete auth/kubernetes/role/llama >/dev/null
  until_true 240 denied llama llama || { echo "llama is not shut out"; log_of_driver --tail 5; return 1; }
  until_true 120 event_says llama VAULT_DENIED || return 1
  events llama | grep VAULT_DENIED | tail -1
  reads qwen qwen && still_opens shared-2 shared
}
restarts() { kc get pod -n chat "$1" -o jsonpath='{.status.containerStatuses[0].restartCount}'; }
# Its own probe failed meanwhile, and may have had it restarted, or be about to: it reads, and goes on.
settled() {
  local before
  before=$(restarts llama) && reads llama llama && sleep 12 && [[ $(restarts llama) == "$before" ]] && reads llama llama
}
restore_role() { role_as_the_page_says >/dev/null && until_true 480 settled; }
step "a role is removed: that pod's new opens fail, the others go on" drop_role
step "the role is back: it reads again" restore_role
outage() {
  kill -STOP "${cluster_pids[vault]}"
  # Longer than two of the kubelet's rounds and a question's time.
  local began=$SECONDS outcome=0
  noticed() { log_of_driver | grep "could not be proved again, and stays" >/dev/null; }
  # The kubelet asks in its own time; on a busy machine its round and the driver's question to Vault take longer.
  while ((SECONDS < began + 30)) || { ((SECONDS < began + 240)) && ! noticed; }; do
    still_opens llama llama || outcome=1
    still_opens qwen qwen || outcome=1
    sleep 1
  done
  kill -CONT "${cluster_pids[vault]}"
  until_true 120 admin vault token lookup
  noticed || { echo "the driver did not notice"; return 1; }
  return $outcome
}
step "Vault is away for 30 s: nobody loses anything" outage

# ---- Nothing secret where it does not belong.
driver_pid() { pgrep -f "^/usr/bin/modelfs --config=/etc/modelfs/modelfs.toml csi --node-id=node1 .*--kubelet-dir=$cluster_dir/kubelet" | head -1; }
tokens_kept() { # files in the driver's folders that no mount table shows
  python3 - "$(driver_pid)" <<'PYTHON'
import os, sys
base, found = f"/proc/{sys.argv[1]}/fd", 0
for fd in os.listdir(base):
    path = f"{base}/{fd}"
    if os.path.isdir(path + "/.") and os.readlink(path) == "/":
        found += len(os.listdir(path))
print(found)
PYTHON
}
plaintext_kept() { # times the canary is in the driver's memory, or in files it has open
  python3 - "$(driver_pid)" "$canary" <<'PYTHON'
import os, stat, sys
pid, canary, found = sys.argv[1], sys.argv[2].encode(), 0
for fd in os.listdir(f"/proc/{pid}/fd"):
    try:
        if stat.S_ISREG(os.stat(f"/proc/{pid}/fd/{fd}").st_mode):
            with open(f"/proc/{pid}/fd/{fd}", "rb") as file:
                found += file.read().count(canary)
    except OSError:
        pass
with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
    for line in maps:
        span, mode = line.split()[:2]
        start, end = (int(part, 16) for part in span.split("-"))
        if "r" not in mode or "[v" in line:
            continue
        try:
            memory.seek(start)
            while start < end:
                piece = memory.read(min(end - start, 64 << 20))
                if not piece:
                    break
                found += piece.count(canary)
                start += len(piece)
        except OSError:
            pass
print(found)
PYTHON
}
five_tokens() { (($(tokens_kept) == 5)); }
no_secrets() {
  # One that is being replaced lies there twice for a moment.
  until_true 60 five_tokens || { echo "five pods have volumes, and $(tokens_kept) tokens lie in the private folder"; return 1; }
  echo "plaintext found: $(plaintext_kept)"
  (($(plaintext_kept) > 0)) || { echo "the search finds nothing, even now"; return 1; }
  ! log_of_driver | grep 'eyJ' >/dev/null || { echo "a token is in the log"; return 1; }
  ! tr '\0' '\n' <"/proc/$(driver_pid)/environ" | grep -E 'eyJ|storage-password' || return 1
  ! grep -rqE 'eyJ|storage-password' "$work/driver-state" || { echo "a secret is in the state"; return 1; }
  ! grep -rlE 'eyJ' "$cluster_dir/kubelet/pods" --include=vol_data.json
}
step "tokens lie in no log, environment, state or mount table" no_secrets

# ---- The driver dies.
driver_restarted() { kc get pod -n modelfs modelfs-csi -o json | jq -e '.status.containerStatuses[0] | .restartCount >= 1 and .state.running != null'; }
kill_driver() {
  local claims
  claims=$(restarts llama-claim)
  kill -KILL "$(driver_pid)"
  cannot_open llama llama || { echo "it still opens: the kill did not reach the driver"; return 1; }
  until_true 240 driver_restarted || return 1
  until_true 240 reads llama-claim llama /models/store || { log_of_driver --tail 20; return 1; }
  echo "the claim's container, restarted $(restarts llama-claim) times, reads again"
  [[ $(restarts llama-claim) == "$claims" ]] || { echo "it was restarted"; return 1; }
  # Its container may be in the back-off of its restarts, which grows to five minutes.
  until_true 480 reads llama llama || { kc describe pod -n chat llama | tail -15; return 1; }
  echo "the probed container was restarted $(restarts llama) times and reads again"
  until_true 480 reads qwen qwen && until_true 480 reads shared-2 shared
}
step "the driver is killed: it comes back, and pods read again" kill_driver

# ---- The driver is replaced, as at an update. It is asked to end, and what it leaves is dead: no folder that a container which
# starts meanwhile could take for the model.
replace_driver() {
  local claims place inner said
  claims=$(restarts llama-claim) place=$(target_of llama) inner=$(target_of llama-claim)
  [[ -n $place && -n $inner ]] || { echo "mounted are: $place $inner"; return 1; }
  kc delete pod -n modelfs modelfs-csi --timeout=180s >/dev/null || return 1
  for place in "$place" "$inner"; do
    said=$(ls "$place" 2>&1) && { echo "$place can be listed: '$said'"; return 1; }
    [[ $said == *"not connected"* ]] || { echo "$said"; return 1; }
  done
  driver_pod | kc apply -f - >/dev/null || return 1
  # Of the driver before, the node may be said to be ready still; this one speaks when its container runs.
  until_true 180 driver_ready || { kc describe pod -n modelfs modelfs-csi; log_of_driver; return 1; }
  until_true 180 driver_says 'dead until the kubelet publishes them again' || { log_of_driver --tail 20; return 1; }
  until_true 240 reads llama-claim llama /models/store || { log_of_driver --tail 20; return 1; }
  [[ $(restarts llama-claim) == "$claims" ]] || { echo "the claim's container was restarted"; return 1; }
  until_true 480 reads llama llama && until_true 480 reads qwen qwen && until_true 480 reads shared-2 shared
}
driver_says() { log_of_driver | grep -F "$1" >/dev/null; }
step "the driver is replaced: dead mounts in between, and pods read again" replace_driver

# ---- Conformance of what is offered.
conformance() {
  mkdir -p "$cluster_dir/kubelet/sanity"
  # Without a controller there is no CreateVolume, with which one of the node's checks begins: publishing and unpublishing of
  # volumes that are there is what the pods above do.
  "$sanity" --csi.endpoint "unix://$cluster_dir/kubelet/plugins/csi.modelfs/csi.sock" \
    --csi.mountdir "$cluster_dir/kubelet/sanity/mount" --csi.stagingdir "$cluster_dir/kubelet/sanity/staging" \
    --ginkgo.no-color --ginkgo.focus "Identity Service|Node Service" --ginkgo.skip "should remove target path" \
    >"$work/sanity.log" 2>&1 || { grep -vE '^ *$' "$work/sanity.log" | tail -40; return 1; }
  grep -E '^Ran |Passed' "$work/sanity.log"
}
if [[ -x $sanity ]]; then step "csi-sanity passes for what is offered" conformance; else skip "csi-sanity" "$sanity is not installed"; fi

# ---- The end of the pods.
volumes_left() { grep -c "$cluster_dir/kubelet/pods/.*fuse.modelfs\|modelfs-volume" /proc/self/mountinfo || true; }
nothing_left() {
  (($(volumes_left) > 0)) || { echo "there was nothing to begin with"; return 1; }
  gone llama qwen shared-1 shared-2 llama-claim
  [[ $(volumes_left) == 0 ]] || { grep modelfs /proc/self/mountinfo; return 1; }
  [[ $(tokens_kept) == 0 ]] || { echo "$(tokens_kept) tokens are left"; return 1; }
  [[ $(plaintext_kept) == 0 ]] || { echo "plaintext is found $(plaintext_kept) times"; return 1; }
}
step "pods are deleted: no mount, no token, no plaintext" nothing_left
driver_ends() {
  kc delete pod -n modelfs modelfs-csi --timeout=180s >/dev/null
  [[ -z $(driver_pid) && ! -e $cluster_dir/kubelet/plugins_registry/csi.modelfs-reg.sock ]]
}
step "the driver ends at SIGTERM and takes its sockets along" driver_ends
nothing_runs() { ! pgrep -f "$cluster_dir"; }
cluster_ends() {
  cluster_down
  # What was killed last may take a moment to be gone.
  until_true 60 nothing_runs || { pgrep -af "$cluster_dir"; return 1; }
  ! grep -q "$cluster_dir" /proc/self/mountinfo && [[ ! -e /run/netns/$cluster_netns ]]
}
step "the cluster ends clean: no process, no mount, no namespace" cluster_ends
finish
