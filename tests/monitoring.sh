#!/usr/bin/env bash
# Monitoring with a real Prometheus: it scrapes a real mount over TLS with a token, evaluates the rules of docs/monitoring, and
# answers every query of the dashboard; then a byte of the store is flipped, and the alert fires.
#
#   tests/monitoring.sh     needs the release build (MODELFS names another binary), root, and tests/parts/install.sh prometheus panels
#
# The commands are the ones of docs/MONITORING.md, taken out of that page as they stand. Everything happens in mount and network
# namespaces of the test's own, so that /etc/modelfs, /mnt/models and ports are the page's and not the host's.
# MODELFS_TEST_PICTURES=DIR keeps the two pictures of the page, drawn from this run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
tools=$cache/prometheus/bin
panels=$cache/panels-$(sha256sum docs/monitoring/requirements.txt | cut -c1-12)
page=$PWD/docs/MONITORING.md
rules=$PWD/docs/monitoring

[[ -x $tools/promtool ]] || { skip monitoring "$tools/promtool is not installed"; finish; exit; }
[[ -f $panels/complete ]] || { skip monitoring "$panels is not there"; finish; exit; }
if [[ ! -x $modelfs ]]; then
  step "monitoring: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
lacking=""
[[ $EUID == 0 ]] || lacking="this is not root"
[[ -c /dev/fuse ]] || lacking="this machine has no /dev/fuse"
for command in curl jq openssl python3 ip; do command -v $command >/dev/null || lacking="$command is not installed"; done
[[ -z $lacking ]] || { skip monitoring "$lacking"; finish; exit; }

if [[ ${MODELFS_TEST_MONITORING_INSIDE:-} != "$$" ]]; then
  # The page's folders must be there to be mounted over; those that were not go again.
  made=()
  for folder in /etc/modelfs /etc/prometheus /run/modelfs /var/log/modelfs /mnt /srv; do
    [[ -d $folder ]] || { mkdir -p $folder; made+=("$folder"); }
  done
  rc=0
  # Its process is this one's: the variable holds for nobody else.
  unshare --mount --net --propagation private \
    bash -c 'MODELFS_TEST_MONITORING_INSIDE=$$ exec bash "$@"' _ "$PWD/tests/monitoring.sh" "$@" || rc=$?
  [[ ${#made[@]} == 0 ]] || rmdir "${made[@]}" 2>/dev/null || true
  finish || true
  exit $rc
fi

# Copies of the host's mounts, which would keep them in use beyond their end.
awk '/ - fuse\.modelfs / {print $5}' /proc/self/mountinfo | tac | while read -r mount; do umount -l "$mount" || true; done

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-monitoring.XXXXXX")
mkdir -p "$work"/{bin,etc,prometheus,run,log,mnt/models,srv/models,source,home,data}
chmod 700 "$work/run" "$work/log"
mount --bind "$work/etc" /etc/modelfs
mount --bind "$work/prometheus" /etc/prometheus
mount --bind "$work/run" /run/modelfs
# Of its own: that a disk has little room left is an alert, and not one of ours to raise here.
mount -t tmpfs -o mode=700,size=512m none /var/log/modelfs
mount --bind "$work/mnt" /mnt
mount --bind "$work/srv" /srv
printf '127.0.0.1 localhost models.example\n' >"$work/hosts"
mount --bind "$work/hosts" /etc/hosts
ip link set lo up
for name in $(compgen -e | grep -E '^(MODELFS|MODEL|VAULT|AWS)_' | grep -vE '^MODELFS_TEST_[A-Z_]+$'); do
  unset "$name"
done
export HOME=$work/home XDG_CONFIG_HOME=$work/home/.config MODELFS_STATE_DIR=$work/home/state
ln -s "$modelfs" "$work/bin/modelfs"
ln -s "$tools/promtool" "$work/bin/promtool"
export PATH=$work/bin:$PATH
prometheus_pid="" receiver_pid=""
cleanup() {
  local pid
  if mountpoint -q /mnt/models; then
    timeout 60 modelfs umount /mnt/models >/dev/null 2>&1 || umount --lazy /mnt/models || true
  fi
  for pid in $prometheus_pid $receiver_pid; do kill "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; done
  umount /etc/hosts /srv /mnt /var/log/modelfs /run/modelfs /etc/prometheus /etc/modelfs 2>/dev/null || true
  if [[ -n ${MODELFS_TEST_KEEP:-} ]]; then echo "kept: $work"; else rm -rf --one-file-system "$work"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# What a step calls runs without errexit (it is asked for its status): every function below says itself where it ends.
until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do ((SECONDS < end)) || { echo "not within the time: $*"; return 1; }; sleep 0.2; done
}

# ---- The rules by themselves.

check_rules() { promtool check rules "$rules/alerts.yaml"; }

# A test that cannot fail tests nothing: each rule is made to fire never, and always, and the tests must notice both.
every_rule_is_tested() {
  python3 - "$rules" "$work/spoiled" "$tools/promtool" <<'PY'
import pathlib, re, subprocess, sys
rules, spoiled, promtool = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
spoiled.mkdir()
head, *tests = (rules / "alerts_test.yaml").read_text().split("  - interval: 1m\n")
text = (rules / "alerts.yaml").read_text()
starts = [(at.start(), at.group(1)) for at in re.finditer(r"^      - alert: (\w+)$", text, re.M)]
assert len(starts) >= 16, starts
for (start, name), (end, _) in zip(starts, starts[1:] + [(len(text), "")]):
    rule = text[start:end]
    own = [test for test in tests if f"alertname: {name}\n" in test]
    (spoiled / "alerts_test.yaml").write_text("  - interval: 1m\n".join([head, *own]))
    for way, never in (("never", "vector(1) > 2"), ("always", 'label_replace(vector(1), "instance", "good", "", "")')):
        other, count = re.subn(r"expr:.*?(?=\n        (?:for|labels):)", lambda _: "expr: " + never, rule, flags=re.S)
        assert count == 1, rule
        (spoiled / "alerts.yaml").write_text(text[:start] + other + text[end:])
        ended = subprocess.run([promtool, "test", "rules", "alerts_test.yaml"], cwd=spoiled, capture_output=True, text=True)
        assert ended.returncode != 0 and name in ended.stdout + ended.stderr, f"{name} may fire {way} and no test notices"
print(f"{len(starts)} rules, each spoiled in two ways: every one was noticed")
PY
}

# Every name in rules, their tests, the dashboard and the page is one of docs/METRICS.md; every alert has its section in the
# runbook, a severity, and a place in the page.
names_exist() {
  python3 - "$rules" docs <<'PY'
import json, pathlib, re, sys
rules, docs = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
rows = re.findall(r"^\| `(modelfs_\w+)` \| \w+ \| \S+ \| (.*?) \|", (docs / "METRICS.md").read_text(), re.M)
labels = {name: set(re.findall(r"\w+", told)) for name, told in rows}
assert len(labels) > 50, f"docs/METRICS.md names {len(labels)} metrics"
wrong = []
texts = [rules / name for name in ("alerts.yaml", "alerts_test.yaml", "dashboard.json")] + [docs / "MONITORING.md"]
for path in texts:
    text = path.read_text()
    for name in sorted(set(re.findall(r"\bmodelfs_\w+", text)) - labels.keys()):
        wrong.append(f"{path.name}: {name} is not in docs/METRICS.md")
    for name, inside in re.findall(r"\b(modelfs_\w+)\{([^}]*)\}", text.replace('\\"', '"')):
        for label in re.findall(r"(\w+) ?!?=~?", inside):
            if label not in labels.get(name, set()) | {"job", "instance"}:
                wrong.append(f"{path.name}: {name} has no label {label}")
alerts = re.split(r"^      - alert: ", (rules / "alerts.yaml").read_text(), flags=re.M)[1:]
runbook, page = (docs / "RUNBOOK.md").read_text(), (docs / "MONITORING.md").read_text()
for alert in alerts:
    name = alert.split("\n", 1)[0]
    severity = re.search(r"severity: (critical|high|medium|low)$", alert, re.M)
    for part in ("summary: ", "description: ", f"runbook_url: docs/RUNBOOK.md#{name.lower()}\n"):
        if part not in alert:
            wrong.append(f"{name} has no {part.strip()}")
    if f"\n## {name}\n" not in runbook:
        wrong.append(f"docs/RUNBOOK.md has no section {name}")
    if not severity or not re.search(rf"^\| {severity.group(1)} \|.*\b{name}\b", page, re.M):
        wrong.append(f"docs/MONITORING.md does not tell the severity of {name}")
print("\n".join(wrong) or f"{len(labels)} metrics and {len(alerts)} alerts: every name used is one of them")
sys.exit(bool(wrong))
PY
}

# ---- A mount, and a Prometheus that scrapes it.

make_model() {
  python3 - "$work/source" <<'PY' || return
import os, pathlib, sys
source = pathlib.Path(sys.argv[1])
(source / "config.json").write_text('{"layers": 2}\n')
for number in (1, 2, 3):
    (source / f"model-0000{number}-of-00003.safetensors").write_bytes(os.urandom(96 << 20))
PY
  modelfs keygen /etc/modelfs/llama.key >/dev/null &&
    modelfs seal "$work/source" /srv/models acme/llama --key file:/etc/modelfs/llama.key >/dev/null &&
    cp "$XDG_CONFIG_HOME/modelfs/signing.key.pub" /etc/modelfs/signing.pub
}

# Every alert that modelfs posts, one a line.
start_receiver() {
  python3 - "$work/alerts" <<'PY' &
import http.server, sys
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with open(sys.argv[1], "ab") as file:
            file.write(body.replace(b"\n", b" ") + b"\n")
        self.send_response(204)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", 9099), Receiver).serve_forever()
PY
  receiver_pid=$!
  (umask 077 && echo http://127.0.0.1:9099/modelfs >/etc/modelfs/webhooks)
}

mount_page() {
  run_page_block "$page" certificate && run_page_block "$page" mount && mountpoint -q /mnt/models
}

scrape() { run_page_block "$page" scrape; }

# The page's own files, looking every second instead of every 15.
start_prometheus() {
  run_page_block "$page" prometheus || return
  sed -i 's/: 15s$/: 1s/' /etc/prometheus/prometheus.yaml
  grep -c ': 1s$' /etc/prometheus/prometheus.yaml | grep -x 2 >/dev/null || return
  "$tools/prometheus" --config.file /etc/prometheus/prometheus.yaml --storage.tsdb.path "$work/data" \
    --web.listen-address 127.0.0.1:9090 --log.level warn >"$work/prometheus.log" 2>&1 &
  prometheus_pid=$!
  until_true 180 target_is_up || { cat "$work/prometheus.log"; api targets | jq -c '.data.activeTargets[].lastError'; return 1; }
}
api() { curl --silent --fail "http://127.0.0.1:9090/api/v1/$1" "${@:2}"; }
target_is_up() { api targets 2>/dev/null | jq -e '.data.activeTargets | length == 1 and .[0].health == "up"' >/dev/null; }

# No token, a wrong one, no TLS, a certificate nobody vouches for: nothing is told.
strangers_are_told_nothing() {
  local url=models.example:9464/metrics bearer
  bearer="Authorization: Bearer $(cat /etc/modelfs/http.token)"
  rejects() { # ARGUMENTS OF CURL: nothing but a refusal may come
    local body
    body=$(curl --silent --fail "$@" 2>/dev/null) || true
    ! grep modelfs_ <<<"$body" >/dev/null || { echo "told without the right to know: curl $*"; return 1; }
  }
  rejects --cacert /etc/modelfs/http.pem "https://$url" || return
  rejects --cacert /etc/modelfs/http.pem -H "Authorization: Bearer wrong" "https://$url" || return
  rejects -H "$bearer" "http://$url" || return
  rejects -H "$bearer" "https://$url" || return
  scrape | grep '^modelfs_build_info' >/dev/null
}

lint() { scrape >"$work/scrape" && promtool check metrics <"$work/scrape"; }

# What is documented is told, and what is told is documented. Absent is only what this mount has nothing to tell of.
documented_metrics_appear() {
  local absent='^modelfs_(vault_|storage_credentials_expiry|model_ref_expiry|gpu_)'
  scrape >"$work/scrape" || return
  sed -n 's/^| `\(modelfs_[a-z0-9_]*\)` .*/\1/p' docs/METRICS.md | sort -u >"$work/documented"
  sed -n 's/^\(modelfs_[a-z0-9_]*\)[ {].*/\1/p' "$work/scrape" | sort -u >"$work/told"
  [[ $(wc -l <"$work/documented") -gt 50 ]] || { echo "docs/METRICS.md names $(wc -l <"$work/documented") metrics"; return 1; }
  local missing unknown
  missing=$(comm -23 "$work/documented" "$work/told" | grep -Ev "$absent" || true)
  unknown=$(comm -13 "$work/documented" "$work/told")
  [[ -z $missing ]] || { printf 'documented and not told:\n%s\n' "$missing"; return 1; }
  [[ -z $unknown ]] || { printf 'told and not documented:\n%s\n' "$unknown"; return 1; }
  echo "$(wc -l <"$work/told") of $(wc -l <"$work/documented") documented metrics are told"
}

# Reads that miss, hit, and throw out: the cache holds 256 MiB of 288.
read_model() {
  for _ in 1 2 3; do
    cat /mnt/models/acme/llama/* | cmp - <(cat "$work"/source/*) || return
    sleep 2
  done
}

# Every query of the dashboard, as Grafana would ask it: all parse; those of what this mount must have answer with data.
dashboard_queries_answer() {
  python3 - "$rules/dashboard.json" <<'PY'
import json, re, sys, time, urllib.error, urllib.parse, urllib.request
dashboard = json.load(open(sys.argv[1]))
may_be_empty = re.compile(r"modelfs_(vault_|storage_credentials_expiry|model_ref_expiry|gpu_|events_)")
asked = answered = 0
until = time.monotonic() + 120
def ask(expr):
    url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": expr})
    try:
        return json.load(urllib.request.urlopen(url))["data"]["result"]
    except urllib.error.HTTPError as error:
        sys.exit(f"{expr}\n{error.read().decode()}")
try:
    ask("sum(") # a query that does not parse is told so
except SystemExit:
    pass
else:
    sys.exit("a query that does not parse was answered")
for panel in dashboard["panels"]:
    for target in panel.get("targets", []):
        expr = target["expr"].replace("$job", ".*").replace("$instance", ".*").replace("$__rate_interval", "20s")
        assert "$" not in expr, expr
        result = ask(expr)
        asked += 1
        names = set(re.findall(r"modelfs_[a-z0-9_]+", expr))
        assert names, expr
        # A scrape that a busy machine did not answer within its second leaves nothing to be told until the next.
        while not result and not all(may_be_empty.match(name) for name in names) and time.monotonic() < until:
            time.sleep(1)
            result = ask(expr)
        if not result and not all(may_be_empty.match(name) for name in names):
            sys.exit(f"panel {panel['title']!r} has no data: {expr}")
        answered += bool(result)
assert asked > 50, asked
print(f"{asked} queries parse, {answered} of them have data here")
PY
}

nothing_fires() {
  api alerts | jq -e '[.data.alerts[] | select(.state == "firing")] == []' >/dev/null || { api alerts | jq .; return 1; }
}

# ---- A byte of the store.

# The last file was read last, so another one's data is not all in memory: of every object one byte in the middle.
flip_bytes() {
  python3 - /srv/models <<'PY'
import pathlib, sys
flipped = 0
for path in pathlib.Path(sys.argv[1]).rglob("*"):
    if path.is_file() and path.stat().st_size > 32 << 20:
        path.chmod(0o600)
        with open(path, "r+b") as file:
            for at in range(1 << 20, path.stat().st_size, 8 << 20):
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1]))
                flipped += 1
print(f"{flipped} bytes flipped")
sys.exit(flipped == 0)
PY
}

readers_get_errors_and_no_wrong_byte() {
  local file failed=0
  for file in "$work"/source/*.safetensors; do
    # What is in memory is right; what is not is refused.
    cmp "$file" "/mnt/models/acme/llama/$(basename "$file")" 2>"$work/cmp" || { failed=1; cat "$work/cmp"; }
    ! grep differ "$work/cmp" >/dev/null || { echo "a wrong byte was served"; return 1; }
  done
  [[ $failed == 1 ]] || { echo "every byte was still in memory: nothing was fetched"; return 1; }
}

firing() { api alerts | jq -e --arg name "$1" '.data.alerts[] | select(.labels.alertname == $name and .state == "firing")' >/dev/null; }

alert_fires() {
  until_true 180 firing ModelfsTamper || { scrape | grep tamper; api alerts | jq .; return 1; }
  api alerts | jq -r '.data.alerts[] | "\(.labels.alertname) \(.labels.severity): \(.annotations.summary)"'
}

webhook_was_called() {
  until_true 120 grep -qi tamper "$work/alerts" || { cat "$work/alerts"; return 1; }
  head -1 "$work/alerts"
  ! grep -F "$(cat /etc/modelfs/http.token)" "$work/alerts" >/dev/null
}

# The same in the log that cannot be quietly edited.
audit_has_it() {
  modelfs audit show /var/log/modelfs/audit.log --kind tamper --last 3 --json >"$work/audited" || return
  jq -es 'flatten | length > 0' "$work/audited" >/dev/null || { cat "$work/audited"; return 1; }
  jq -c . "$work/audited" | head -3
}

down_fires() {
  modelfs umount /mnt/models || return
  until_true 120 down_is_pending || { api alerts | jq .; return 1; }
}
down_is_pending() { api alerts | jq -e '.data.alerts[] | select(.labels.alertname == "ModelfsDown")' >/dev/null; }

show_top() {
  cat /mnt/models/acme/llama/model-00001* >/dev/null && run_page_block "$page" top >"$work/top" || return
  grep -F "model-00001-of-00003.safetensors" "$work/top" >/dev/null && grep -F hit_rate "$work/top" >/dev/null
}

draw_top() {
  # While somebody reads, so that there is something to see.
  (for _ in 1 2 3 4; do cat /mnt/models/acme/llama/model-0000[123]*; done >/dev/null 2>&1) &
  local reader=$!
  LANG=C.UTF-8 run_page_block "$page" picture || return
  wait $reader || true
  python3 -c 'import sys, xml.dom.minidom as xml; assert len(xml.parse("top.svg").getElementsByTagName("text")) > 30' &&
    mv top.svg "$work/top.svg"
}

draw_panels() {
  # No registry can be reached from in here.
  PIP_NO_INDEX=1 PIP_FIND_LINKS=$panels run_page_block "$page" panels || return
  python3 -c 'import xml.dom.minidom as xml; xml.parse("/tmp/panels/dashboard.svg")' || return
  mv /tmp/panels/dashboard.svg "$work/dashboard.svg" && rm -rf /tmp/panels
  [[ $(stat -c %s "$work/dashboard.svg") -lt 400000 ]]
}

step "monitoring: promtool finds nothing wrong with the rules" check_rules
step "monitoring: rules, dashboard and pages name what there is" names_exist
step "monitoring: each rule is tested, and each test can fail" every_rule_is_tested
step "monitoring: a model is sealed" make_model
start_receiver
step "monitoring: a mount answers over TLS (docs/MONITORING.md)" mount_page
step "monitoring: strangers are told nothing" strangers_are_told_nothing
step "monitoring: a real Prometheus scrapes it, with the page's configuration" start_prometheus
step "monitoring: promtool finds nothing wrong with a scrape" lint
step "monitoring: a model is read through the mount" read_model
step "monitoring: every documented metric is told, and no other" documented_metrics_appear
step "monitoring: every query of the dashboard is answered" dashboard_queries_answer
step "monitoring: no alert fires on a healthy mount" nothing_fires
step "monitoring: the terminal view shows the mount (docs/MONITORING.md)" show_top
step "monitoring: a frame is drawn (docs/MONITORING.md)" draw_top
step "monitoring: bytes of the store are flipped" flip_bytes
step "monitoring: readers get errors and no wrong byte" readers_get_errors_and_no_wrong_byte
step "monitoring: ModelfsTamper fires in Prometheus" alert_fires
step "monitoring: the webhook was called" webhook_was_called
step "monitoring: the audit log has it" audit_has_it
step "monitoring: the panels are drawn (docs/MONITORING.md)" draw_panels
step "monitoring: a mount that ends is seen to be down" down_fires
if [[ -n ${MODELFS_TEST_PICTURES:-} ]]; then
  cp "$work/top.svg" "$work/dashboard.svg" "$MODELFS_TEST_PICTURES/"
fi
finish
