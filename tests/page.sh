# shellcheck shell=bash
# Sourced by tests that run a page's own commands, so that what the page says is what works.
#
# A block's name is the second word after its fence: ```sh fstab. Every named block that a test has run is written down in
# the file named by MODELFS_TEST_PAGE_RUN, if that is set; tests/run.sh compares it with the page at the end. Commands without a
# name are run by nobody: what only shows the shape of one is ```text.

# page_block PAGE LANGUAGE NAME: the text of one fenced block; fails if there is none.
page_block() {
  local text
  # In a list both fence and text are indented, by as much.
  text=$(awk -v fence="\`\`\`$2 $3" '
    !inside && (at = index($0, fence)) && $0 == sprintf("%*s", at - 1, "") fence {inside = at; next}
    /^ *```/ {inside = 0}
    inside {print substr($0, inside)}' "$1")
  [[ -n $text ]] || { echo "$1 has no $2 block called $3" >&2; return 1; }
  [[ -z ${MODELFS_TEST_PAGE_RUN:-} ]] || echo "$(basename "$1") $2 $3" >>"$MODELFS_TEST_PAGE_RUN"
  printf '%s\n' "$text"
}

# run_page_block PAGE NAME: the sh block of that name, run as a user would paste it, with this shell's exported variables.
run_page_block() {
  local script
  script=$(page_block "$1" sh "$2") || return 1
  bash -euo pipefail -c "$script"
}

# page_was_run PAGE: fails naming the blocks of PAGE that no test since MODELFS_TEST_PAGE_RUN was made has cut out, and its
# commands that have no name.
page_was_run() {
  commands_have_names "$1" && named_blocks_were_run "$1"
}
commands_have_names() { # PAGE
  local unnamed
  unnamed=$(grep -nE '^ *```(sh|bash|shell|console) *$' "$1") || return 0
  printf 'no test can run these blocks of %s, which have no name:\n%s\n' "$1" "$unnamed"
  return 1
}
named_blocks_were_run() { # PAGE
  local missing
  missing=$(comm -23 <(sed -n 's/^ *```\([a-z]\+\) \([a-z0-9.-]\+\)$/\1 \2/p' "$1" | sort -u) \
    <(sed -n "s/^$(basename "$1") //p" "$MODELFS_TEST_PAGE_RUN" | sort -u))
  [[ -z $missing ]] || { printf 'no test runs these blocks of %s:\n%s\n' "$1" "$missing"; return 1; }
}

# pages_tell: whether the functions above see what they are for, on pages made here.
pages_tell() {
  local folder said
  folder=$(mktemp -d)
  printf '%s\n' '```sh one' 'echo 1' '```' '- a list' '' '  ```sh two' '  if true; then' '    echo 2' '  fi' '  ```' \
    >"$folder/GOOD.md"
  printf '%s\n' '```sh one' 'echo 1' '```' '  ```sh' '  echo 2' '  ```' >"$folder/BAD.md"
  (
    export MODELFS_TEST_PAGE_RUN=$folder/run
    : >"$folder/run"
    [[ $(run_page_block "$folder/GOOD.md" one) == 1 ]] || exit 1
    said=$(page_was_run "$folder/GOOD.md") && exit 1
    [[ $said == *"sh two"* && $said != *"sh one"* ]] || exit 1
    [[ $(run_page_block "$folder/GOOD.md" two) == 2 ]] && page_was_run "$folder/GOOD.md" || exit 1
    run_page_block "$folder/BAD.md" one >/dev/null || exit 1
    said=$(page_was_run "$folder/BAD.md") && exit 1
    [[ $said == *"have no name"*"4:"* ]] || exit 1
    named_blocks_were_run "$folder/BAD.md"
  )
  rm -rf "$folder"
}
