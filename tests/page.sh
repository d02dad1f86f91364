# shellcheck shell=bash
# Sourced by tests that run a page's own commands, so that what the page says is what works.
#
# A block's name is the second word after its fence: ```sh fstab. Every named block that a test has run is written down in
# the file named by MODELFS_TEST_PAGE_RUN, if that is set; tests/run.sh compares it with the page at the end.

# page_block PAGE LANGUAGE NAME: the text of one fenced block; fails if there is none.
page_block() {
  local text
  text=$(awk -v fence="\`\`\`$2 $3" '$0 == fence {inside = 1; next} /^```/ {inside = 0} inside' "$1")
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

# page_was_run PAGE: fails naming the blocks of PAGE that no test since MODELFS_TEST_PAGE_RUN was made has cut out.
page_was_run() {
  local missing
  missing=$(comm -23 <(sed -n 's/^```\([a-z]\+\) \([a-z0-9.-]\+\)$/\1 \2/p' "$1" | sort -u) \
    <(sed -n "s/^$(basename "$1") //p" "$MODELFS_TEST_PAGE_RUN" | sort -u))
  [[ -z $missing ]] || { printf 'no test runs these blocks of %s:\n%s\n' "$1" "$missing"; return 1; }
}
