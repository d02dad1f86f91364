#!/usr/bin/env bash
# `modelfs scan` on what others write: files of real libraries, images of a real Docker and a real Podman, a real Debian.
#
#   tests/scan.sh [--quick]   needs the release build (MODELFS names another binary); root for images; parts clients-lite, docker,
#                             podman, rootfs, and clients-torch if it is there
#
# The commands of docs/SCAN.md are cut out of that page and run as they stand, on the images made here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
modelfs=$(realpath "$modelfs" 2>/dev/null || echo "$modelfs")
rootfs=$(MODELFS_TEST_CACHE=$cache bash tests/parts/rootfs.sh path)
page=$PWD/docs/SCAN.md
if [[ ! -x $modelfs ]]; then
  step "scan: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi

# The engine's mounts and network are the test's own.
if [[ $EUID == 0 && ${MODELFS_SCAN_INSIDE:-} != "$$" ]]; then
  rc=0
  unshare --mount --net --propagation private \
    bash -c 'MODELFS_SCAN_INSIDE=$$ exec bash "$@"' _ "$PWD/tests/scan.sh" "$@" || rc=$?
  finish || true
  exit $rc
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-scan.XXXXXX")
mkdir -p "$work"/{bin,home/.docker,context/model,written}
ln -s "$modelfs" "$work/bin/modelfs"
export PATH=$work/bin:$PATH HOME=$work/home DOCKER_CONFIG=$work/home/.docker DOCKER_HOST=unix://$work/docker.sock
echo '{}' >"$DOCKER_CONFIG/config.json"
engine_pid=""
cleanup() {
  if [[ -n $engine_pid ]]; then kill "$engine_pid" 2>/dev/null && wait "$engine_pid" 2>/dev/null || true; fi
  while read -r mount; do umount -l "$mount" || break; done < <(awk -v top="$work/" 'index($5, top) == 1 {print $5}' /proc/self/mountinfo | tac)
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do ((SECONDS < end)) || { echo "never came true: $*"; return 1; }; sleep 0.1; done
}

# scanned CODE PATH...: what of weight was found, a line each: format, confidence, path; fails if the scan ends otherwise.
scanned() {
  local wanted=$1 rc=0
  shift
  modelfs scan --json "$@" >"$work/report.json" 2>"$work/report.err" || rc=$?
  [[ $rc == "$wanted" ]] || { echo "ended with $rc, wanted $wanted"; cat "$work/report.err"; jq -r '.unread, (.findings[:5])' "$work/report.json"; return 1; }
  jq -r '.findings[] | select(.confidence != "info") | "\(.format) \(.confidence) \(.path)"' "$work/report.json" | sort
}
same() { # WANTED-LINES: those of standard input, and no others
  diff <([[ -z $1 ]] || sort <<<"$1") - || return 1
}

# ---- Files by the libraries that write them.

write_lite() {
  "$cache/clients-lite/bin/python" - "$work/written" <<'PYTHON'
import io, pickle, sys, zipfile
from pathlib import Path
import flatbuffers, gguf, h5py, numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

out = Path(sys.argv[1])
rng = np.random.default_rng(7)
weights = rng.standard_normal((512, 512), dtype=np.float32)
# By names that say nothing.
save_file({f"layer.{i}": weights for i in range(3)}, out / "a")
save_file({"w": weights[:8, :8]}, out / "small", metadata={"note": "x" * 20_000})
writer = gguf.GGUFWriter(out / "b", "llama")
writer.add_block_count(1)
writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(1000)])
writer.add_tensor("token_embd.weight", weights)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 512])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 512])], [numpy_helper.from_array(weights, "w")])
onnx.save(helper.make_model(graph), out / "c")
onnx.save(helper.make_model(graph), out / "external.onnx", save_as_external_data=True, location="external.onnx.data")
np.save(out / "d.npy", weights)
np.savez(out / "e.npz", a=weights, b=weights)
np.savez_compressed(out / "f.npz", a=rng.standard_normal((1024, 512)))
for protocol in (2, 3, 4, 5):
    (out / f"pickle{protocol}").write_bytes(pickle.dumps({"coef": weights}, protocol=protocol))
# As Keras lays its files out, by the library that writes them for it, in each form of the format that the library has.
for library in ("earliest", "v108", "latest"):
    with h5py.File(out / f"h5-model-{library}", "w", libver=library) as file:
        file.attrs["keras_version"], file.attrs["backend"] = "2.15.0", "tensorflow"
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"dense"]
        group.create_group("dense").create_dataset("dense/kernel:0", data=weights)
    with h5py.File(out / f"h5-weights-{library}", "w", libver=library) as file:
        file.create_group("layers/dense/vars").create_dataset("0", data=weights)
        file.create_group("vars")
with h5py.File(out / "h5-user-block", "w", userblock_size=512) as file:
    file.attrs["layer_names"] = [b"dense"]
    file.create_dataset("dense", data=weights)
# So many attributes that the library keeps them in a heap: Keras's words are there, but in no record of the root's header.
with h5py.File(out / "h5-many", "w", libver="latest") as file:
    for i in range(40):
        file.attrs[f"note{i}"] = i
    file.attrs["layer_names"] = [b"dense"]
    file.create_dataset("dense", data=weights)
whole = (out / "h5-model-earliest").read_bytes()
(out / "h5-cut").write_bytes(whole[: len(whole) // 2])
inner = io.BytesIO()
with h5py.File(inner, "w") as file:
    file.create_group("layers/dense/vars").create_dataset("0", data=weights)
with zipfile.ZipFile(out / "keras-archive", "w") as archive:
    archive.writestr("metadata.json", "{}")
    archive.writestr("config.json", "{}")
    archive.writestr("model.weights.h5", inner.getvalue())
# The fields of a Model of TensorFlow Lite's schema that every file has, by the library that its converter uses.
builder = flatbuffers.Builder(1024)
data = builder.CreateByteVector(weights.tobytes())
builder.StartObject(1)
builder.PrependUOffsetTRelativeSlot(0, data, 0)
buffer = builder.EndObject()
builder.StartVector(4, 1, 4)
builder.PrependUOffsetTRelative(buffer)
buffers = builder.EndVector()
text = builder.CreateString("made by a test")
builder.StartObject(8)
builder.PrependUint32Slot(0, 3, 0)
builder.PrependUOffsetTRelativeSlot(3, text, 0)
builder.PrependUOffsetTRelativeSlot(4, buffers, 0)
builder.Finish(builder.EndObject(), file_identifier=b"TFL3")
(out / "tfl").write_bytes(builder.Output())
# What looks near it and is none of it.
clean = out / "clean"; clean.mkdir()
np.save(clean / "labels.npy", np.arange(500_000))
np.savez(clean / "tiny.npz", a=np.zeros(10))
(clean / "words.pickle").write_bytes(pickle.dumps({f"word{i}": i for i in range(20_000)}))
for library in ("earliest", "latest"):
    with h5py.File(clean / f"measured-{library}", "w", libver=library) as file:
        file.attrs["instrument"] = "layers of a film"
        file.create_dataset("layers", data=rng.standard_normal((512, 512)))
(clean / "tables.json").write_text('{"w":{"dtype":"F32"}}' * 100_000)
PYTHON
}
lite_is_told() {
  write_lite || return 1
  scanned 26 "$work/written" | same "gguf certain b
hdf5 certain h5-model-earliest
hdf5 certain h5-model-latest
hdf5 certain h5-model-v108
hdf5 certain h5-user-block
hdf5 certain h5-weights-earliest
hdf5 certain h5-weights-latest
hdf5 certain h5-weights-v108
hdf5 likely h5-cut
hdf5 likely h5-many
keras certain keras-archive
numpy likely d.npy
numpy likely e.npz
numpy likely f.npz
onnx certain c
onnx likely external.onnx.data
pickle certain pickle2
pickle certain pickle3
pickle certain pickle4
pickle certain pickle5
safetensors certain a
safetensors certain small
tflite certain tfl" || return 1
  scanned 0 "$work/written/clean" | same ""
}
torch_is_told() {
  local folder=$work/torch
  mkdir "$folder"
  "$cache/clients-torch/bin/python" - "$folder" <<'PYTHON' || return 1
import sys
from pathlib import Path
import torch

out = Path(sys.argv[1])
layer = torch.nn.Linear(256, 256)
torch.save(layer.state_dict(), out / "zip")
torch.save(layer, out / "module")
torch.save(layer.state_dict(), out / "legacy", _use_new_zipfile_serialization=False)
torch.jit.script(layer).save(str(out / "script"))
PYTHON
  scanned 26 "$folder" | same "pytorch certain legacy
pytorch certain module
pytorch certain script
pytorch certain zip"
}
models_are_told() {
  scanned 26 "$cache/models-1" | same "$(
    cd "$cache/models-1"
    find . -name '*.safetensors' -printf 'safetensors certain %P\n'
    find . -name '*.gguf' -printf 'gguf certain %P\n'
    find . -name '*.onnx' -printf 'onnx certain %P\n'
    find . -name '*.onnx.data' -printf 'onnx likely %P\n'
  )"
}

# ---- Systems without weights.

debian_is_clean() {
  scanned 0 "$rootfs" | same "" || return 1
  jq -r '"\(.looked.files) files, \(.findings | length) only mentioned"' "$work/report.json"
  tar -C "$rootfs" --one-file-system -c . >"$work/rootfs.tar" || return 1
  scanned 0 "$work/rootfs.tar" | same "" || return 1
  gzip -1 <"$work/rootfs.tar" | modelfs scan - || return 1
  # A model that is put there is found in each of the three: a scan that finds nothing must be able to find.
  cp "$work/written/a" "$work/planted"
  tar -C "$work" --transform 's|^|usr/share/doc/|' -rf "$work/rootfs.tar" planted || return 1
  scanned 26 "$work/rootfs.tar" | same "safetensors certain usr/share/doc/planted" || return 1
  rm "$work/rootfs.tar"
}
we_are_clean() { scanned 0 "$modelfs" docs src tests | same ""; }

# ---- Images.

base() { # FOLDER: a file system to build on
  mkdir -p "$1"/{bin,tmp,opt,etc}
  cp "$(command -v busybox)" "$1/bin/busybox"
  local applet
  for applet in sh rm cat mkdir; do ln -sf busybox "$1/bin/$applet"; done
}
write_context() {
  cp "$work/written/a" "$work/context/model/weights"
  cp "$work/written/b" "$work/context/model/kept"
  base "$work/base"
  cat >"$work/context/Dockerfile" <<'DOCKERFILE'
FROM localhost/base
COPY model /opt/model
ENV MODEL=/opt/model
RUN rm /opt/model/weights
RUN ["/bin/sh", "-c", "cat /etc/hostname > /opt/done"]
DOCKERFILE
  printf 'FROM localhost/base\nCOPY Dockerfile /opt/\n' >"$work/context/Dockerfile.clean"
}
start_engine() {
  dockerd --data-root "$work/docker" --exec-root "$work/exec" --pidfile "$work/docker.pid" -H "$DOCKER_HOST" \
    --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false >"$work/engine.log" 2>&1 &
  engine_pid=$!
  until_true 180 docker version || { tail -5 "$work/engine.log"; return 1; }
}
docker_builds() {
  tar -C "$work/base" -c . | docker import - localhost/base >/dev/null || return 1
  export DOCKER_BUILDKIT=0
  docker build --network none -q -t acme/app:1.4 "$work/context" && docker build --network none -q -t acme/clean:1.4 -f "$work/context/Dockerfile.clean" "$work/context"
}
# layers_told PATH...: both files, the layer that holds them, the line that made it, the one that hides one of them.
layers_told() {
  scanned 26 "$@" | same "gguf certain opt/model/kept
safetensors certain opt/model/weights" || return 1
  jq -e '.findings | map({path, at: .layer.images[0]}) | sort_by(.path)
    | .[0].at.hidden_by == null and .[1].at.position == .[0].at.position and .[1].at.hidden_by[0] == .[1].at.position + 1
      and .[1].at.hidden_by[1] == "deleted" and (.[1].at.created_by | test("COPY")) and all(.at.of >= 4)' "$work/report.json" >/dev/null ||
    { jq '.findings[].layer' "$work/report.json"; return 1; }
  jq -e '.findings | all(.layer.digest | test("^sha256:[0-9a-f]{64}$"))' "$work/report.json" >/dev/null
}
docker_page() {
  (cd "$work" && exits_with 26 run_page_block "$page" scan-archive && run_page_block "$page" scan-clean && run_page_block "$page" scan-pipeline) || return 1
  jq -e '.runs[0].results | length == 2' "$work/scan.sarif" >/dev/null || return 1
  layers_told "$work/app.tar" && layers_told --verify "$work/app.tar" || return 1
  jq -e '.targets[0].images[0].name == "acme/app:1.4"' "$work/report.json" >/dev/null
  gzip -1 <"$work/app.tar" | exits_with 26 modelfs scan - >/dev/null || return 1
  # The container of it, as an engine exports its file system: what was deleted is gone there.
  docker create --name exported acme/app:1.4 /bin/sh >/dev/null && docker export exported >"$work/export.tar" && docker rm exported >/dev/null || return 1
  scanned 26 "$work/export.tar" | same "gguf certain opt/model/kept"
}
stop_engine() { kill "$engine_pid" && wait "$engine_pid" || true; engine_pid=""; }
podman_setup() {
  mkdir -p "$work/podman"
  printf '[containers]\ndefault_ulimits = ["nofile=20000:20000"]\n[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n' >"$work/containers.conf"
  printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$work/podman/graph" "$work/podman/run" >"$work/storage.conf"
  export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf
  tar -C "$work/base" -c . | podman import - localhost/base >/dev/null || return 1
  (cd "$work" && podman build --isolation chroot --network host --layers -q -t localhost/acme/app:1.4 context)
}
podman_saves() {
  local form
  for form in oci-archive docker-archive; do
    podman save --format $form -o "$work/$form.tar" localhost/acme/app:1.4 2>/dev/null || return 1
    layers_told "$work/$form.tar" && layers_told --verify "$work/$form.tar" || { echo "in $form"; return 1; }
  done
  for form in oci-dir docker-dir; do
    podman save --format $form -o "$work/$form" localhost/acme/app:1.4 2>/dev/null || return 1
  done
  layers_told "$work/oci-dir" && layers_told --verify "$work/oci-dir" || return 1
  # A folder of blobs that is no layout is a tree with archives in it.
  scanned 26 "$work/docker-dir" | grep -c 'opt/model/weights$' | same 1 || return 1
  # One byte of a layer is another: gzip or the digest tells.
  python3 - "$work/oci-dir" <<'PYTHON'
import sys; from pathlib import Path
blob = max(Path(sys.argv[1], "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
data = bytearray(blob.read_bytes()); data[len(data) // 2] ^= 1; blob.write_bytes(data)
PYTHON
  modelfs scan --verify --json "$work/oci-dir" >"$work/report.json" 2>/dev/null && { echo "taken for clean"; return 1; }
  jq -e '.unread | length > 0' "$work/report.json" >/dev/null
}
accept_page() {
  mkdir -p /srv 2>/dev/null && mount -t tmpfs tmpfs /srv || return 1
  mkdir -p /srv/app/testdata && cp "$work/written/a" /srv/app/model && cp "$work/written/b" /srv/app/testdata/ || return 1
  echo "sha256:$(sha256sum <"$work/written/a" | cut -d ' ' -f 1)  # reviewed" >"$work/accepted.txt"
  (cd "$work" && run_page_block "$page" scan-accept) && exits_with 26 modelfs scan /srv/app >/dev/null && umount /srv
}

lite=$cache/clients-lite/bin/python
if [[ ! -x $lite ]]; then
  skip scan "clients-lite is not installed (tests/parts/install.sh says why)"
  finish
  exit
fi
step "files that safetensors, GGUF, ONNX, NumPy, pickle, h5py and flatbuffers wrote are told as what they are" lite_is_told
if [[ ${1:-} != --quick && -f $cache/clients-torch/complete ]]; then
  step "files that PyTorch wrote are told as what they are" torch_is_told
else
  not_here "files that PyTorch wrote" "clients-torch is not installed, or this is a quick run"
fi
[[ ! -d $cache/models-1 ]] || step "the test models are found, and nothing else of their folders" models_are_told
step "this program and its sources are clean" we_are_clean
if [[ -x $rootfs/lib/systemd/systemd ]]; then
  step "a Debian root file system is clean, as a tree, an archive and in a pipe, until a model is put there" debian_is_clean
else
  skip "a clean Debian" "$rootfs is not there (tests/parts/install.sh rootfs)"
fi
write_context
if [[ $EUID == 0 ]] && command -v dockerd docker busybox >/dev/null; then
  step "start the Docker engine" start_engine
  step "build images with Docker" docker_builds
  step "an image of Docker, as docs/SCAN.md says: layers, hidden files, a clean one, SARIF" docker_page
  step "accept and exclude as docs/SCAN.md says" accept_page
  stop_engine
else
  skip "images of Docker" "docker, dockerd or busybox is not installed, or this is not root"
fi
if [[ $EUID == 0 ]] && command -v podman busybox >/dev/null; then
  step "build an image with Podman" podman_setup
  step "archives and layouts that Podman saves, and a flipped byte" podman_saves
else
  skip "images of Podman" "podman or busybox is not installed, or this is not root"
fi
finish
