#!/usr/bin/env bash
# Whether pages say what is there: alerts and their sections, requirements and their tests, links between pages, flags; and
# whether the release does what it says of itself.
#
#   tests/docs.sh      needs the release build (MODELFS names another binary)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tests/steps.sh

modelfs=${MODELFS:-${CARGO_TARGET_DIR:-$PWD/target}/release/modelfs}

# Each test and step that a page names: after a path in backticks, functions in backticks and steps in quotes are of that file.
named_tests_exist() { # PAGE
  python3 - "$1" <<'PYTHON'
import re, sys
from pathlib import Path
page, wrong, seen = Path(sys.argv[1]), [], 0
for number, line in enumerate(page.read_text().splitlines(), 1):
    path = text = None
    for token in re.finditer(r'`((?:tests|src|benches|\.github)/[A-Za-z0-9_./-]+)`|`([a-z0-9]+(?:_[a-z0-9]+){2,})`|"([^"]+)"', line):
        file, function, step = token.groups()
        if file:
            path = Path(file)
            text = path.read_text() if path.is_file() else None
            seen += 1
            if not path.exists():
                wrong.append(f"line {number}: {file} is not there")
        elif path and text is not None and function:
            seen += 1
            if not re.search(rf"\bfn {function}\b", text):
                wrong.append(f"line {number}: {path} has no test {function}")
        elif path and text is not None and step and path.suffix == ".sh":
            seen += 1
            if f'"{step}"' not in text:
                wrong.append(f'line {number}: {path} has no step "{step}"')
print(f"{page}: {seen} names")
if wrong or seen < int(sys.argv[2] if len(sys.argv) > 2 else 1):
    sys.exit("\n".join(wrong) or f"only {seen} names were understood")
PYTHON
}
# Sees a name that is wrong; else it would be worth nothing.
named_tests_can_fail() {
  local page rc=0
  page=$(mktemp)
  # shellcheck disable=SC2016
  printf '%s\n' '| `tests/lock.rs` `a_test_that_is_not_there` |' '| `tests/nowhere.rs` |' '| `tests/e2e.sh` "a step that is not there" |' >"$page"
  named_tests_exist "$page" >"$page.log" 2>&1 && rc=1
  [[ $(grep -c '^line' "$page.log") == 3 ]] || rc=1
  rm -f "$page" "$page.log"
  return $rc
}
alerts_have_sections() {
  diff <(sed -n 's/^ *- alert: *//p' docs/monitoring/alerts.yaml | sort) <(sed -n 's/^## \(Modelfs.*\)/\1/p' docs/RUNBOOK.md | sort) || return 1
  # Where an alert sends whoever is on call must be there.
  local url
  grep -oE 'runbook_url: *[^ ]+' docs/monitoring/alerts.yaml | grep -oE '#.*' | tr -d '#"' | while read -r url; do
    grep -iE "^## $url$" docs/RUNBOOK.md >/dev/null || { echo "no section for $url"; exit 1; }
  done
}
# Relative links, with the heading after #.
links_lead_somewhere() {
  python3 - <<'PYTHON'
import re, subprocess, sys
from pathlib import Path
def anchors(path):
    found, inside = set(), False
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
        if not inside and (heading := re.match(r"#+ (.*)", line)):
            text = re.sub(r"[`*]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1])).strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found
wrong, seen = [], 0
for page in subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], capture_output=True, text=True, check=True).stdout.split("\n"):
    if not page or not Path(page).is_file():
        continue
    text = re.sub(r"^```.*?^```", "", Path(page).read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        seen += 1
        file, _, anchor = link.partition("#")
        target = (Path(page).parent / file) if file else Path(page)
        if not target.exists():
            wrong.append(f"{page}: {link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{page}: {link}: no such heading")
if wrong or seen < 20:
    sys.exit("\n".join(wrong) or f"only {seen} links were understood")
print(seen, "links")
PYTHON
}
# Each --flag in backticks, and in lines of modelfs, is one of some command of ours, or one of those of other programs.
flags_exist() { # PAGE...
  "$modelfs" completions bash | python3 -c '
import re, sys
from pathlib import Path
FLAG = r"(?<![\w-])--[a-z][a-z0-9-]*"
OTHERS = set("""--bench --cap-drop --cgroup-manager --clear-groups --device --driver --duration --force --from --gpus --interleave --locked --memlock --nocapture --now
  --ignored --only --path --pid --read-only --regid --reuid --rounds --security-opt --size-mib --system --test --ulimit --unix-socket --user""".split())
ours, wrong, seen = set(re.findall(FLAG, sys.stdin.read())), [], 0
for page in sys.argv[1:]:
    inside = continued = False
    for number, line in enumerate(Path(page).read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside, continued = not inside, False
            continue
        spans = re.findall(r"`([^`]+)`", line)
        if inside:
            of_modelfs = continued or re.search(r"(^|[\s(|&;])modelfs\s", line)
            continued = bool(of_modelfs) and line.rstrip().endswith("\\")
            spans = [line] if of_modelfs else []
        for flag in re.findall(FLAG, " ".join(spans)):
            seen += 1
            if flag not in ours and flag not in OTHERS:
                wrong.append(f"{page}: line {number}: no command has {flag}")
print(seen, "flags,", len(ours), "of ours")
if wrong or seen < 3:
    sys.exit("\n".join(wrong) or f"only {seen} flags were understood")
' "$@"
}
flags_can_fail() {
  local page rc=0
  page=$(mktemp)
  # shellcheck disable=SC2016
  printf '%s\n' 'by `--vault-ca` and `--vault-ca-cert`' '```sh' 'modelfs mount S M \' '  --no-such-flag' 'other --whatever' '```' >"$page"
  flags_exist "$page" >"$page.log" 2>&1 && rc=1
  [[ $(grep -o 'no command has .*' "$page.log" | tr '\n' ' ') == "no command has --vault-ca no command has --no-such-flag " ]] || rc=1
  rm -f "$page" "$page.log"
  return $rc
}
# What release.yaml says of itself. A job that names its permissions has no others.
release_is_tested() {
  python3 - <<'PYTHON'
import re, sys
from pathlib import Path
text = Path(".github/workflows/release.yaml").read_text().split("\njobs:\n")[1]
jobs = dict(re.findall(r"^  (\w+):\n((?:    .*\n|  *#.*\n|\n)*)", text, flags=re.M))
wrong = []
if ".ci/run" not in Path(".github/workflows/ci.yaml").read_text():
    wrong.append("ci.yaml does not run .ci/run")
tested = {name for name, job in jobs.items() if "uses: ./.github/workflows/ci.yaml" in job or ".ci/run" in job}
for name, job in jobs.items():
    before, new = set(), set(re.findall(r"^    needs: *(\w+)", job, flags=re.M))
    while new - before:
        before |= new
        new = {of for other in before for of in re.findall(r"^    needs: *(\w+)", jobs[other], flags=re.M)}
    if name not in tested and not before & tested:
        wrong.append(f"release.yaml: {name} does not come after all that CI runs")
    if "gh run download" in job and "      actions: read" not in job:
        wrong.append(f"release.yaml: {name} downloads what another job left, without the right actions: read")
if wrong or len(jobs) < 2:
    sys.exit("\n".join(wrong) or "no jobs were understood")
PYTHON
}
# The page's table and order of modules against src: each module of src/lib.rs has a row, the row says `no` of unsafe code only
# where there is none, and an import goes to a row of the order above its own.
modules_are_as_drawn() { # PAGE
  python3 - "$1" <<'PYTHON'
import re, sys
from pathlib import Path
page, wrong = Path(sys.argv[1]).read_text(), []
modules = re.findall(r"^(?:pub )?mod (\w+);", Path("src/lib.rs").read_text(), re.M)
rows = {}
for names, claim in re.findall(r"^\| (`[^|]*`) \| [^|]* \| ([^|]*) \|$", page.split("| unsafe |", 1)[1].split("\n\n", 1)[0], re.M):
    rows.update((name, claim) for name in re.findall(r"`(\w+)`", names))
order = re.search(r"^```text imports\n(.*?)^```", page, re.S | re.M)[1].splitlines()
level = {name: number for number, row in enumerate(order) for name in re.findall(r"\w+", row)}
for name in sorted(set(modules) ^ set(rows)):
    wrong.append(f"{name}: in one of src/lib.rs and the table, not in both")
for name in sorted(set(modules) ^ set(level)):
    wrong.append(f"{name}: in one of src/lib.rs and the order of imports, not in both")
def code(file):  # without comments and without what only tests are made of
    text = re.sub(r"^\s*//.*$", "", file.read_text(), flags=re.M)
    return re.sub(r"#\[cfg\(test\)\]\s*(?:mod tests \{.*|[^;{]*;)", "", text, flags=re.S)
imports = 0
for name in modules:
    files = [file for file in [Path(f"src/{name}.rs"), *sorted(Path(f"src/{name}").rglob("*.rs"))] if file.is_file()]
    texts = [code(file) for file in files if not file.name.endswith("tests.rs")]
    unsafe = sum(len(re.findall(r"\bunsafe (?:\{|fn|impl|extern)", text)) for text in texts)
    if name in rows and (rows[name] == "no") != (unsafe == 0):
        wrong.append(f"{name}: {unsafe} places of unsafe code, the table says: {rows[name]}")
    used = set()
    for text in texts:
        used.update(re.findall(r"\bcrate::(\w+)", text))
        for group in re.findall(r"\bcrate::\{(.*?)\};", text, re.S):
            used.update(re.findall(r"(?:^|,)\s*(\w+)", re.sub(r"\{[^{}]*\}", "", group)))
    for other in sorted((used & set(modules)) - {name}):
        imports += 1
        if name in level and other in level:
            if level[other] >= level[name]:
                wrong.append(f"{name} imports {other}, which does not stand above it")
print(f"{len(rows)} rows, {imports} imports")
if wrong or imports < 100:
    sys.exit("\n".join(wrong) or f"only {imports} imports were understood")
PYTHON
}
# Three lies about what is there, each seen.
modules_as_drawn_can_fail() {
  local page rc=0
  page=$(mktemp)
  sed -e '/^| `gpu` |/d' -e '/^| `mem` |/s/| yes |$/| no |/' -e 's/^host$/@/; s/^reading$/host/; s/^@$/reading/' docs/ARCHITECTURE.md >"$page"
  modules_are_as_drawn "$page" >"$page.log" 2>&1 && rc=1
  for lie in "^gpu: in one of src/lib.rs and the table" "^mem: [0-9]* places of unsafe code" "^host imports reading,"; do
    grep "$lie" "$page.log" >/dev/null || rc=1
  done
  rm -f "$page" "$page.log"
  return $rc
}
# `row_58_*` on the page is the beginning of a test's name.
rows_have_tests() { # PAGE
  local row seen=0
  for row in $(grep -oE '`rows?_[0-9a-z_]+_\*`' "$1" | tr -d '`*' | sort -u); do
    grep -rqE "fn $row" tests src || { echo "$1: no test's name begins with $row"; return 1; }
    seen=$((seen + 1))
  done
  echo "$seen rows"
  [[ $seen -gt 5 ]]
}
# Codes of src/error.rs that a rule of the page refuses with and the list at its end lacks.
refusals_are_listed() { # PAGE
  local lacking
  lacking=$(sed '/^## a\.10 /,/^## a\.11 /d' "$1" | codes '`' | comm -12 - <(codes '"' <src/error.rs) |
    comm -23 - <(sed -n '/^## a\.10 /,/^## a\.11 /p' "$1" | codes '`'))
  [[ -z $lacking ]] || { echo "$1: a.10 lacks ${lacking//$'\n'/ }"; return 1; }
  [[ $(codes '`' <"$1" | wc -l) -gt 40 ]]
}
codes() { grep -oE "$1[A-Z]+(_[A-Z]+)*$1" | tr -d '`"' | sort -u; } # QUOTE: words in capitals between such quotes
step "the check of names can fail" named_tests_can_fail
step "every test that docs/COMPLIANCE.md names is there" named_tests_exist docs/COMPLIANCE.md
step "every test that docs/SECURE_CODING.md names is there" named_tests_exist docs/SECURE_CODING.md
step "every test that docs/THREAT_MODEL.md names by its row is there" rows_have_tests docs/THREAT_MODEL.md
step "every refusal that docs/FORMAT.md names is in its list" refusals_are_listed docs/FORMAT.md
if [[ -f docs/monitoring/alerts.yaml ]]; then
  step "every alert has a section in docs/RUNBOOK.md, and every section an alert" alerts_have_sections
fi
step "the check of modules can fail" modules_as_drawn_can_fail
step "modules, their unsafe code and their imports are as docs/ARCHITECTURE.md says" modules_are_as_drawn docs/ARCHITECTURE.md
step "every link between pages leads somewhere" links_lead_somewhere
step "a release comes after everything that CI runs, and each of its jobs may what it does" release_is_tested
if [[ -x $modelfs ]]; then
  step "the check of flags can fail" flags_can_fail
  step "every flag that a page names is one" flags_exist README.md docs/*.md
else
  step "flags of the pages: $modelfs is built (cargo build --release --locked)" false
fi
finish
