#!/usr/bin/env bash
# The unit of systemd/ in a really booted systemd: started, reloaded, killed, hung, stopped, rebooted, with a wrong key and
# with a store that comes late. The commands are those of docs/DEPLOY.md, cut out of that page as they stand.
#
#   tests/systemd.sh      needs root, the release build (MODELFS names another binary) and tests/parts/install.sh rootfs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh
source tests/page.sh
source tests/nspawn.sh

cache=${MODELFS_TEST_CACHE:-$HOME/.cache/modelfs-tests}
modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}
versitygw=$(MODELFS_TEST_CACHE=$cache bash tests/parts/versitygw.sh path)
page=docs/DEPLOY.md
audit_page=docs/AUDIT.md
# Exposure as systemd-analyze counts it, in tenths; a unit without any of this has 96.
exposure_max=40

if [[ ! -x $modelfs ]]; then
  step "systemd: $modelfs is built (cargo build --release --locked)" false
  finish
  exit
fi
missing=$(nspawn_missing)
if [[ -n $missing ]]; then
  skip "systemd" "$missing"
  finish
  exit
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/modelfs-systemd.XXXXXX")
root=$work/root
cleanup() {
  if [[ -n ${MODELFS_TEST_KEEP:-} ]]; then
    nspawn_stop || true
    echo "kept: $work"
    return
  fi
  nspawn_remove "$root"
  rm -rf --one-file-system "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

nspawn_copy "$root"
strip -o "$root/usr/bin/modelfs" "$modelfs" 2>/dev/null || cp "$modelfs" "$root/usr/bin/modelfs"
cp -r systemd "$root/root/systemd"

# ---- Words.

in_it() { nspawn_in bash -euo pipefail -c "$1" in_it "${@:2}"; }
until_in() { # SECONDS SCRIPT: until it succeeds
  local end=$((SECONDS + $1))
  until in_it "$2" >/dev/null 2>&1; do
    ((SECONDS < end)) || { echo "not within $1 s: $2"; in_it 'systemctl status --no-pager --lines 20 "modelfs@*" || true'; return 1; }
    sleep 0.2
  done
}
block() { # NAME [PAGE]: of the page, run in the booted system as a user would paste it
  local script
  script=$(page_block "${2:-$page}" sh "$1") || return 1
  nspawn_in env -C /root ETC=/etc/modelfs STORE=/srv/store TRUST="$(cat "$root/root/.config/modelfs/signing.key.pub")" bash -euo pipefail -c "$script"
}
pid_of() { nspawn_in systemctl show --property MainPID --value "modelfs@$1"; }
status_of() { nspawn_in systemctl show --property StatusText --value "modelfs@$1"; }
says() { # UNIT WORDS: in what systemctl status shows; the journal has it a moment after it was said
  local shown end=$((SECONDS + 60))
  until shown=$(nspawn_in systemctl status --no-pager --full --lines 30 "modelfs@$1" || true) && [[ $shown == *"$2"* ]]; do
    ((SECONDS < end)) || { echo "$shown"; echo "wanted: $2"; return 1; }
    sleep 0.2
  done
}
journal_says() { until_in 60 "journalctl -u modelfs@$1 | grep -i '$2' >/dev/null"; } # UNIT WORDS
shows_version() { # N: every byte through the kernel, as root and as somebody else
  in_it 'diff -r /root/v$1 /srv/llama/acme/llama/current/ && [[ $(readlink /srv/llama/acme/llama/current) == "$1" ]]
    setpriv --reuid 1000 --regid 1000 --clear-groups cmp /srv/seen/v$1 /srv/llama/acme/llama/current/model.safetensors' "$1"
}

# ---- A publisher, in the same machine: a model of two versions that differ, with a word in it that is looked for later.

needle=NEEDLE-$(od -An -N12 -tx1 /dev/urandom | tr -d ' \n')
make_models() {
  in_it 'cd /root; mkdir -p /srv/store /srv/seen
    for n in 1 2; do
      mkdir v$n; head -c 20000000 /dev/urandom >v$n/model.safetensors
      for _ in 1 2 3; do echo "$1"; done >>v$n/model.safetensors; echo "{\"version\": $n}" >v$n/config.json
      cp v$n/model.safetensors /srv/seen/v$n
      # As long as a path can be, in letters that a record writes in six: its line is longer than what journalctl shows unasked. It
      # comes before the weights, whose end is to be that of the model.
      long=$(printf "ü%.0s" $(seq 119)); deep=v$n/a$long/ü$long/ü$long/ü$long; mkdir -p $deep; echo long >$deep/$(printf "ü%.0s" $(seq 28))
    done
    modelfs keygen llama.key; modelfs keygen other.key; modelfs seal v1 /srv/store acme/llama --key file:llama.key' "$needle"
}
seal_2() { in_it 'cd /root; modelfs seal v2 /srv/store acme/llama --key file:llama.key'; }

step "a Debian with systemd boots" nspawn_boot "$root"
step "a model is sealed" make_models

# ---- The unit as it stands.

unit_is_clean() { in_it 'systemd-analyze verify --recursive-errors=no modelfs@llama.service'; }
broken_unit_is_seen() {
  in_it 'sed "s/^WatchdogSec/WatchDogSec/" /root/systemd/modelfs@.service >/run/broken@.service
    ! systemd-analyze verify --recursive-errors=no /run/broken@.service 2>/dev/null' || { echo "a unit with an unknown key is found clean"; return 1; }
}
exposure_is_low() {
  in_it 'systemd-analyze security --offline=true --threshold=$1 modelfs@llama.service | tail -1' "$exposure_max" || return 1
  in_it '! systemd-analyze security --offline=true --threshold=20 modelfs@llama.service >/dev/null' || { echo "the threshold refuses nothing"; return 1; }
}
# What the unit says it leaves out because of the mount namespace: each of them makes one, and what it has makes none.
namespaces() {
  in_it 'host=$(readlink /proc/1/ns/mnt)
    of() { systemd-run --quiet --pipe --wait -p "$1" readlink /proc/self/ns/mnt; }
    [[ $(of UMask=0077) == "$host" ]] || { echo "a plain service has a namespace of its own"; exit 1; }
    for option in PrivateTmp=yes PrivateDevices=yes PrivateMounts=yes PrivateIPC=yes ProtectSystem=yes ProtectSystem=strict ProtectHome=yes \
      ProtectProc=invisible ProcSubset=pid ProtectKernelTunables=yes ProtectKernelModules=yes ProtectKernelLogs=yes ProtectControlGroups=yes \
      ReadOnlyPaths=/boot InaccessiblePaths=/boot NoExecPaths=/boot TemporaryFileSystem=/boot BindReadOnlyPaths=/boot DynamicUser=yes \
      LogNamespace=other; do
      [[ $(of $option) != "$host" ]] || { echo "$option gives no namespace: it can be taken in"; exit 1; }
      ! systemctl show modelfs@llama --property "${option%%=*}" | grep "=yes\|=true\|=strict" >/dev/null || { echo "the unit has $option"; exit 1; }
    done'
}
step "the unit is installed as the page says" block systemd-install
step "an unknown key in the unit would be seen" broken_unit_is_seen
step "the unit has no error" unit_is_clean
step "its exposure is at most $exposure_max tenths" exposure_is_low
step "both as the page says" block systemd-check
step "what the unit leaves out would hide the mount" namespaces

# ---- Start, read, reload, stop.

step "the key becomes a credential as the page says" block systemd-key
step "the configuration is written as the page says" block systemd-config
step "it starts as the page says" block systemd-start
step "the model is read, by others too" shows_version 1
shares_namespace() { in_it '[[ $(readlink /proc/$1/ns/mnt) == "$(readlink /proc/1/ns/mnt)" ]] && mountpoint -q /srv/llama' "$(pid_of llama)"; }
step "the mount is where everyone sees it" shares_namespace
says_version() { [[ $(status_of llama) == "/srv/llama: acme/llama version $1" ]] || { status_of llama; return 1; }; }
step "its status names the version" says_version 1
step "the page's look at it works" block systemd-look
no_secret_told() {
  in_it 'key=$(cat /root/llama.key); [[ ${#key} -gt 20 ]]
    { systemctl show modelfs@llama; systemctl cat modelfs@llama; journalctl -u modelfs@llama; tr "\0" "\n" </proc/$1/cmdline; tr "\0" "\n" </proc/$1/environ; } >/run/told
    grep -qF modelfs /run/told || { echo "the detector finds nothing"; exit 1; }
    if grep -F "$key" /run/told; then echo "the key is told"; exit 1; fi
    rm /run/told
    [[ $(stat -c "%a %U" /run/credentials/modelfs@llama.service/key) == "400 root" ]]
    ! setpriv --reuid 1000 --regid 1000 --clear-groups cat /run/credentials/modelfs@llama.service/key 2>/dev/null' "$(pid_of llama)"
}
step "the key is in no listing, log or environment, and for root alone" no_secret_told
governed() { # as example.env shows it: one user is refused by the policy, and that stands in the log
  in_it 'cp -p /etc/modelfs/llama.env /run/llama.env; install -d -m 700 /var/log/modelfs
    sed -n "s/^#\(MODELFS_AUDIT_FILE=\|MODELFS_POLICY=\|MODELFS_HTTP=\)/\1/p" /root/systemd/example.env >>/etc/modelfs/llama.env
    printf "[[rule]]\nuids = [4711]\nmodels = [\"*\"]\nmay = \"see\"\n[[rule]]\neverybody = true\nmodels = [\"*\"]\nmay = \"read\"\n" >/etc/modelfs/policy.toml
    chmod 600 /etc/modelfs/policy.toml; systemctl restart modelfs@llama' || return 1
  shows_version 1 || return 1
  in_it 'as_4711() { setpriv --reuid 4711 --regid 4711 --clear-groups "$@"; }
    as_4711 ls /srv/llama/acme/llama/current/config.json
    if as_4711 cat /srv/llama/acme/llama/current/config.json 2>/run/said; then echo "it is read"; exit 1; fi
    grep "Permission denied" /run/said
    modelfs audit show /var/log/modelfs/llama.jsonl --outcome denied --json >/run/denied; cat /run/denied
    grep "\"uid\":4711" /run/denied | grep "\"model\":\"acme/llama\"" >/dev/null
    modelfs status /srv/llama --json | grep "unix:/run/modelfs/llama.http"
    mv /run/llama.env /etc/modelfs/llama.env; rm /etc/modelfs/policy.toml /run/said /run/denied; systemctl restart modelfs@llama'
}
step "with the audit log and the policy of example.env a refused user is in the log" governed
nothing_new() { block systemd-reload && says_version 1; }
step "a reload without anything new changes nothing" nothing_new
newer() { seal_2 >/dev/null && shows_version 1 && block systemd-reload && shows_version 2 && says_version 2; }
step "a version sealed meanwhile is taken in by a reload" newer
refused_reload() {
  # The service has no right to pass over modes, root or not.
  in_it 'chmod 0 /srv/store; rc=0; systemctl reload modelfs@llama 2>/dev/null || rc=$?; chmod 755 /srv/store; [[ $rc != 0 ]]' || return 1
  says llama "not reloaded" && nspawn_in systemctl is-active --quiet modelfs@llama && shows_version 2
}
step "a reload that fails says so and changes nothing" refused_reload

offline() {
  block systemd-local && shows_version 2 && in_it 'grep -q "RestrictAddressFamilies=AF_UNIX$" <(systemctl show modelfs@llama --property RestrictAddressFamilies)
    rm -r /etc/systemd/system/modelfs@llama.service.d; systemctl daemon-reload; systemctl restart modelfs@llama'
}
step "with a local store it works without any network" offline

# ---- The audit log in the journal. What exceeds a unit's rate journald drops, and tells nobody: here it has a limit that is met.

opens=1000
few_a_unit() {
  in_it 'mkdir -p /run/systemd/journald.conf.d; printf "[Journal]\nRateLimitIntervalSec=1h\nRateLimitBurst=20\n" >/run/systemd/journald.conf.d/few.conf
    systemctl restart systemd-journald'
}
open_often() { # the names of slices and a unit make the line of the record that tells of it longer yet
  in_it 'for _ in $(seq $1); do : </srv/llama/acme/llama/current/config.json; done
    systemd-run --quiet --wait --pipe --collect --slice="$(printf "a%.0s" $(seq 80))-$(printf "b%.0s" $(seq 80))-$(printf "c%.0s" $(seq 80))" \
      --unit="$(printf "x%.0s" $(seq 200))" \
      setpriv --reuid 1000 --regid 1000 --clear-groups grep -rlx long /srv/llama/acme/llama/current' "$opens"
}
recorded() { # WORDS: how many lines of the export hold them
  in_it 'grep -cF -- "$1" /root/exported.log || true' "$1"
}
limited() { # COMMAND...: with a journald that takes few messages of a unit
  local rc=0
  { few_a_unit && "$@"; } || rc=$?
  in_it 'rm -f /run/systemd/journald.conf.d/few.conf; systemctl restart systemd-journald' || rc=1
  return $rc
}
journal_is_the_log() {
  block keys "$audit_page" && in_it 'cp -p /etc/modelfs/llama.env /root/llama.env' && block journal-config "$audit_page" && open_often || return 1
  # The last words of a process are the unit's too.
  in_it 'systemctl stop modelfs@llama' && block journal "$audit_page" || return 1
  [[ $(recorded '"kind":"open"') -gt $opens && $(recorded '"kind":"stop"') == 1 ]] || { echo "records are missing"; return 1; }
  in_it 'longest=$(wc -L </root/exported.log); [[ $longest -gt 4100 ]] || { echo "of $longest bytes no line is long enough to be left out"; exit 1; }' || return 1
  in_it 'line=$(grep -F "\"uid\":1000," /root/exported.log | tail -1); echo "$line" | cut -c1-400
    [[ $line == *"\"command\":\"grep\""* && $line == *"\"cgroup\":"* && $line != *"\"exe\":"* ]]'
}
step "the journal alone is the log: an export of it verifies, with a record of each open" limited journal_is_the_log
dropped_records_are_seen() {
  # The unit with a limit: what its journal lost is seen, and is in the file beside it. With the page's capability programs are named.
  in_it 'mkdir -p /run/systemd/system/modelfs@llama.service.d
    printf "[Service]\nLogRateLimitIntervalSec=1h\nLogRateLimitBurst=20\nCapabilityBoundingSet=CAP_SYS_PTRACE\n" >/run/systemd/system/modelfs@llama.service.d/limit.conf
    echo MODELFS_AUDIT_FILE=/var/log/modelfs/llama.log >>/etc/modelfs/llama.env
    systemctl daemon-reload; systemctl start modelfs@llama' && open_often && in_it 'systemctl stop modelfs@llama' || return 1
  local said
  if said=$(block journal "$audit_page" 2>&1); then echo "nothing was dropped: $said"; return 1; fi
  [[ $said == *"NOT GENUINE"* && $said == *"[AUDIT_CHAIN]"* ]] || { echo "$said"; return 1; }
  in_it '[[ $(stat -c "%a %U" /var/log/modelfs) == "700 root" ]]
    modelfs audit verify /var/log/modelfs/llama.log --trust /etc/modelfs/audit.key.pub
    [[ $(modelfs audit show /var/log/modelfs/llama.log --kind open --json | wc -l) -gt $1 ]]
    line=$(modelfs audit show /var/log/modelfs/llama.log --kind open --uid 1000 --last 1 --json); [[ $line == *"\"exe\":\"/usr/bin/grep\""* ]]' "$opens" || return 1
  in_it 'rm -r /run/systemd/system/modelfs@llama.service.d /var/log/modelfs; mv /root/llama.env /etc/modelfs/llama.env
    systemctl daemon-reload; systemctl start modelfs@llama' && shows_version 2
}
step "what a journal with a limit drops is seen, and is in the file" limited dropped_records_are_seen

# ---- Without --versions.

bound() {
  in_it 'sed "s,/srv/llama,/srv/plain,; /VERSIONS/d" /etc/modelfs/llama.env >/etc/modelfs/plain.env; chmod 600 /etc/modelfs/plain.env
    mkdir -p /srv/plain; systemd-creds encrypt --name=key /root/llama.key /etc/credstore.encrypted/modelfs-plain.key 2>/dev/null; systemctl start modelfs@plain
    systemctl kill --signal HUP --kill-whom main modelfs@plain' || return 1
  journal_says plain "bound to the versions it began with" || return 1
  in_it 'if systemctl reload modelfs@plain 2>/dev/null; then echo "reloaded"; exit 1; fi; systemctl is-active --quiet modelfs@plain; cmp /root/v2/config.json /srv/plain/acme/llama/config.json
    systemctl stop modelfs@plain'
}
step "a mount without versions answers SIGHUP by saying that it is bound" bound

# ---- Killed, hung.

restarted_after() { # PID: another daemon serves
  until_in 180 'new=$(systemctl show --property MainPID --value modelfs@llama); [[ $new != 0 && $new != '"$1"' ]] && systemctl is-active --quiet modelfs@llama'
}
killed() {
  local before rc=0
  before=$(pid_of llama)
  # The next start waits until the dead mount was looked at, however long that takes.
  in_it 'mkdir -p /run/systemd/system/modelfs@llama.service.d; touch /run/hold
    printf "[Service]\nExecStartPre=/bin/sh -c \"while [ -e /run/hold ]; do sleep 0.1; done\"\n" >/run/systemd/system/modelfs@llama.service.d/hold.conf
    systemctl daemon-reload' || return 1
  dead_but_for_whole_files "$before" || rc=1
  nspawn_in rm /run/hold && [[ $rc == 0 ]] || return 1
  restarted_after "$before" || return 1
  journal_says llama "cleared a dead mount on /srv/llama" || return 1
  in_it '[[ $(grep -c " /srv/llama " /proc/self/mountinfo) == 1 ]]
    rm -r /run/systemd/system/modelfs@llama.service.d; systemctl daemon-reload' && shows_version 2
}
dead_but_for_whole_files() { # PID: what is left of the mount when its daemon is killed
  # Whole files are open past the daemon: such a descriptor goes on. The rest of the mount is dead until the next start.
  in_it 'passed() { modelfs status /srv/llama --json | sed -n "s/.*\"opens_passthrough\": \([0-9]*\).*/\1/p"; }
    cat /srv/llama/acme/llama/current/model.safetensors >/dev/null
    for _ in $(seq 600); do was=$(passed); exec 7</srv/llama/acme/llama/current/model.safetensors; (($(passed) == was)) || break; sleep 0.1; done
    head -c 1000000 <&7 >/run/part
    kill -KILL $1
    while [[ -e /proc/$1 ]]; do sleep 0.05; done
    head -c 30000000 <&7 >>/run/part; cmp /run/part /root/v2/model.safetensors; rm /run/part; echo "an open whole file is read to its end"
    if ls /srv/llama 2>/run/said; then echo "it is no dead mount"; exit 1; fi
    grep "endpoint is not connected" /run/said' "$1"
}
step "killed, it is started again, and the dead mount is cleared" killed
foreign() { # A mount of another kind is left alone, and said.
  in_it 'systemctl stop modelfs@llama; mount -t tmpfs other /srv/llama; touch /srv/llama/mine
    if systemctl start modelfs@llama 2>/dev/null; then echo "it starts over a mount of somebody else"; exit 1; fi
    [[ -e /srv/llama/mine ]]; systemctl stop modelfs@llama; umount /srv/llama; systemctl start modelfs@llama' && shows_version 2
}
step "a mount of somebody else is not cleared" foreign
hung() {
  local before
  in_it 'mkdir -p /run/systemd/system/modelfs@llama.service.d; printf "[Service]\nWatchdogSec=20s\n" >/run/systemd/system/modelfs@llama.service.d/watchdog.conf
    systemctl daemon-reload; systemctl restart modelfs@llama' || return 1
  before=$(pid_of llama)
  sleep 32
  [[ $(pid_of llama) == "$before" ]] || { echo "killed although it answers"; return 1; }
  nspawn_in kill -STOP "$before"
  restarted_after "$before" || return 1
  journal_says llama "watchdog timeout" || return 1
  in_it 'rm -r /run/systemd/system/modelfs@llama.service.d; systemctl daemon-reload' && shows_version 2
}
step "a daemon that hangs is killed by the watchdog and started again" hung

# ---- Stop.

left_behind() { # fails if anything is
  in_it '! mountpoint -q /srv/llama && [[ -z $(ls -A /srv/llama) ]] && ! pgrep -x modelfs && ! ls /run/credentials/modelfs@llama.service 2>/dev/null ||
      { echo "a mount, a process or a credential is left"; exit 1; }
    if ls /run/modelfs/*.sock 2>/dev/null; then exit 1; fi
    ! grep -rlF --exclude-dir=seen "$1" /tmp /run /var /etc /srv /dev/shm 2>/dev/null' "$needle"
}
detector() {
  in_it 'echo "$1" >/run/planted' "$needle" || return 1
  ! left_behind >/dev/null || { echo "a planted word is not found"; return 1; }
  in_it 'rm /run/planted; touch /srv/llama/planted' || return 1
  ! left_behind >/dev/null || { echo "a planted file is not found"; return 1; }
  nspawn_in rm /srv/llama/planted
}
stopped() { block systemd-stop && detector && left_behind && [[ $(nspawn_in systemctl is-active modelfs@llama) == inactive ]]; }
step "stopped, nothing is left" stopped
held() {
  in_it 'systemctl start modelfs@llama; exec 7</srv/llama/acme/llama/current/config.json
    began=$SECONDS; systemctl stop modelfs@llama || true; ((SECONDS - began < 120)); ! mountpoint -q /srv/llama' || return 1
  says llama "was detached while in use: a process that cannot be seen" || return 1
  # As the page says: with one capability more they are named.
  in_it 'mkdir -p /run/systemd/system/modelfs@llama.service.d; printf "[Service]\nCapabilityBoundingSet=CAP_SYS_PTRACE\n" >/run/systemd/system/modelfs@llama.service.d/names.conf
    systemctl daemon-reload; systemctl start modelfs@llama; exec 7</srv/llama/acme/llama/current/config.json; systemctl stop modelfs@llama || true' || return 1
  says llama "(bash) holds /srv/llama/acme/llama/2/config.json" || return 1
  in_it 'rm -r /run/systemd/system/modelfs@llama.service.d; systemctl daemon-reload; systemctl reset-failed modelfs@llama'
}
step "programs that hold files have their time, then the mount is detached" held
ended_by_hand() { # `modelfs umount`, not systemd, ends it while a file is held: it stays down, longer than RestartSec
  in_it 'systemctl start modelfs@llama; exec 7</srv/llama/acme/llama/current/config.json
    rc=0; modelfs umount /srv/llama || rc=$?; [[ $rc == 24 ]]
    for _ in $(seq 600); do [[ $(systemctl show --property ActiveState --value modelfs@llama) != failed ]] || break; sleep 0.1; done; sleep 8
    [[ $(systemctl show --property ActiveState --value modelfs@llama) == failed ]]; ! mountpoint -q /srv/llama' || return 1
  [[ $(nspawn_in systemctl show --property ExecMainStatus --value modelfs@llama) == 24 ]] || return 1
  nspawn_in systemctl reset-failed modelfs@llama
}
step "one that is ended by hand while files are held does not come back" ended_by_hand

# ---- What must not start.

fails_saying() { # WORDS: the start fails once and for all, and says why
  local rc=0
  nspawn_in timeout 300 systemctl start modelfs@llama 2>/dev/null || rc=$?
  [[ $rc != 0 && $rc != 124 ]] || { echo "systemctl start ended with $rc"; return 1; }
  [[ $(nspawn_in systemctl show --property ActiveState --value modelfs@llama) == failed ]] || { echo "it is tried again"; return 1; }
  says llama "Status: " && says llama "$1" && in_it '! mountpoint -q /srv/llama'
}
wrong_key() {
  in_it 'cd /root; cp /etc/credstore.encrypted/modelfs-llama.key right; systemd-creds encrypt --name=key other.key /etc/credstore.encrypted/modelfs-llama.key 2>/dev/null' || return 1
  fails_saying "[NO_KEY]" || return 1
  in_it 'cd /root; mv right /etc/credstore.encrypted/modelfs-llama.key'
}
step "a wrong key fails the start, and the status says why" wrong_key
tampered() {
  # The very last byte of the large objects: only whoever reads the last block sees it.
  in_it 'cp -a /srv/store /srv/store.true; for object in $(find /srv/store -type f -size +1M); do
      chmod u+w "$object"; at=$(($(stat -c %s "$object") - 1)); byte=$(tail -c 1 "$object" | od -An -tu1)
      printf "\\x$(printf %x $((byte ^ 1)))" | dd of="$object" bs=1 seek=$at conv=notrunc status=none
    done' || return 1
  fails_saying "last block" || return 1
  in_it 'rm -r /srv/store; mv /srv/store.true /srv/store; systemctl start modelfs@llama' && shows_version 2
}
step "a model of which the last block is forged fails the start" tampered

later() {
  in_it 'sed -i "s,acme/llama,acme/later," /etc/modelfs/plain.env; ! systemctl start modelfs@plain 2>/dev/null' || return 1
  says plain "[NOT_FOUND]" || return 1
  in_it 'cd /root; modelfs seal v1 /srv/store acme/later --key file:llama.key >/dev/null' || return 1
  until_in 120 'systemctl is-active --quiet modelfs@plain' || return 1
  in_it 'cmp /root/v1/config.json /srv/plain/acme/later/config.json; systemctl stop modelfs@plain'
}
step "a model that is published later is found by a later try" later

# ---- Boot. A service that needs the model is started after it, and reads it at once.

consumer() {
  in_it 'cat >/etc/systemd/system/consumer.service <<END
[Unit]
Requires=modelfs@llama.service
After=modelfs@llama.service

[Service]
Type=oneshot
RemainAfterExit=true
ExecStart=/usr/bin/cmp /root/v2/model.safetensors /srv/llama/acme/llama/current/model.safetensors
[Install]
WantedBy=multi-user.target
END
    systemctl daemon-reload; systemctl enable --quiet consumer; sync'
}
consumed() { until_in 180 'systemctl is-active --quiet consumer'; }
reboot() { consumer && nspawn_stop && nspawn_boot "$root" && consumed && shows_version 2 && nspawn_in systemctl is-active modelfs@llama; }
step "after a boot the model is there for who needs it" reboot
late_store() {
  in_it 'mv /srv/store /srv/store.away' || return 1
  nspawn_stop && NSPAWN_STARTING=1 nspawn_boot "$root" || return 1
  until_in 120 'systemctl show --property StatusText --value modelfs@llama | grep "waiting: no store at /srv/store yet"' || return 1
  sleep 3
  [[ $(nspawn_in systemctl show --property ActiveState --value modelfs@llama) == activating ]] || { echo "it did not wait"; return 1; }
  [[ $(nspawn_in systemctl is-active consumer) != active ]] || { echo "the consumer did not wait"; return 1; }
  in_it 'mv /srv/store.away /srv/store' || return 1
  consumed && shows_version 2 && [[ $(nspawn_in systemctl show --property NRestarts --value modelfs@llama) == 0 ]]
}
step "a store that comes after the boot is waited for" late_store

late_s3() {
  cp "$versitygw" "$root/usr/bin/versitygw"
  in_it 'echo "127.0.0.1 localhost" >/etc/hosts; mkdir -p /srv/s3/models /srv/side /srv/remote
    cat >/etc/systemd/system/s3.service <<END
[Service]
Environment=ROOT_ACCESS_KEY=test-access ROOT_SECRET_KEY=test-secret-0123456789
ExecStart=/usr/bin/versitygw --port 127.0.0.1:7070 posix --sidecar /srv/side /srv/s3
END
    cat >/etc/modelfs/remote.env <<END
MODELFS_STORE=s3://models/prod
MODELFS_MOUNTPOINT=/srv/remote
MODELFS_MODEL=acme/llama
MODELFS_TRUST=$(cat /root/.config/modelfs/signing.key.pub)
MODELFS_CACHE=256MiB
MODELFS_S3_ENDPOINT=http://localhost:7070
MODELFS_S3_REGION=us-east-1
MODELFS_FETCH_BUDGET=2s
AWS_ACCESS_KEY_ID=test-access
AWS_SECRET_ACCESS_KEY=test-secret-0123456789
END
    chmod 600 /etc/modelfs/remote.env; systemd-creds encrypt --name=key /root/llama.key /etc/credstore.encrypted/modelfs-remote.key 2>/dev/null
    systemctl daemon-reload; systemctl start s3
    for _ in $(seq 600); do (: </dev/tcp/127.0.0.1/7070) 2>/dev/null && break; sleep 0.1; done
    cd /root; export AWS_ACCESS_KEY_ID=test-access AWS_SECRET_ACCESS_KEY=test-secret-0123456789
    modelfs seal v2 s3://models/prod acme/llama --key file:llama.key --s3-endpoint http://127.0.0.1:7070 --s3-region us-east-1 >/dev/null
    systemctl stop s3; systemctl start --no-block modelfs@remote' || return 1
  until_in 120 'systemctl show --property StatusText --value modelfs@remote | grep "waiting: "' || return 1
  status_of remote
  in_it 'systemctl start s3' || return 1
  until_in 180 'systemctl is-active --quiet modelfs@remote' || return 1
  in_it 'cmp /root/v2/model.safetensors /srv/remote/acme/llama/model.safetensors; systemctl stop modelfs@remote s3'
}
if [[ -x $versitygw ]]; then
  step "an S3 store that comes later is waited for" late_s3
else
  skip "an S3 store that comes later is waited for" "versitygw is not installed"
fi

# ---- A service of an ordinary user: its control socket lies in its own folder of /run, and root finds it.

as_user() {
  in_it 'useradd --uid 1000 --no-create-home reader; install -d -o 1000 -g 1000 /srv/user; install -o 1000 -g 1000 -m 600 /root/llama.key /srv/user.key; echo user_allow_other >/etc/fuse.conf
    chmod -R a+rX /srv/store
    systemd-run --quiet --unit modelfs-user -p User=reader -p Type=notify -p RuntimeDirectory=modelfs-user -p RuntimeDirectoryMode=0700 -p AmbientCapabilities=CAP_IPC_LOCK \
      -p StateDirectory=modelfs-user -p Environment=MODELFS_STATE_DIR=/var/lib/modelfs-user \
      modelfs mount /srv/store /srv/user --model acme/llama --key file:/srv/user.key --trust $(cat /root/.config/modelfs/signing.key.pub) --cache 64MiB' || return 1
  until_in 120 'systemctl is-active --quiet modelfs-user' || { nspawn_in journalctl -u modelfs-user --no-pager | tail -5; return 1; }
  in_it 'ls /run/modelfs-user/*.sock; modelfs status /srv/user --json | grep "\"mountpoint\": \"/srv/user\""; modelfs status | grep /srv/user
    modelfs umount /srv/user; ! mountpoint -q /srv/user'
}
step "root finds the mount of a service with another user" as_user

# Last: the page's own way to take it away.
step "it is removed as the page says" block systemd-remove
finish
