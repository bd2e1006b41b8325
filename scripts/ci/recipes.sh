#!/usr/bin/env bash
# Print the recipes to run, each ended by a NUL: those that a branch changed, or all that match.
#
#   ASSAY_RECIPES   files or patterns (git's: * within a folder, ** across folders), one a line
#   ASSAY_CHANGED   true: only what differs from ASSAY_BASE; false: all
#   ASSAY_SHARED    files or patterns on which every recipe depends: when one of them changed, all recipes are run
#   ASSAY_BASE      commit to compare with; GitLab's own variables where it is not set; empty or all zeros: all recipes
set -euo pipefail

fail() {
  printf 'assay-ci: %s\n' "$*" >&2
  exit 2
}

# Lines of $1 as patterns of git, into the array `patterns`. A pattern cannot be taken for an option, nor for git's own magic.
read_patterns() {
  local line
  patterns=()
  while IFS= read -r line; do
    line=${line%$'\r'}
    line=${line#"${line%%[![:space:]]*}"}
    line=${line%"${line##*[![:space:]]}"}
    [ -z "$line" ] || patterns+=(":(glob)${line#./}")
  done <<<"$1"
}

# The commit that the branch left its base at, so that what the base gained since is not taken for a change of the branch.
branch_point() {
  local base=$1
  [[ $base =~ ^[0-9a-f]{40}([0-9a-f]{24})?$ ]] || fail "the base is no commit: $(printf %q "$base"). Give its full hash."
  git cat-file -e "$base^{commit}" 2>/dev/null || git fetch --quiet --no-tags --depth=1 origin "$base" ||
    fail "the base $base is not in this clone and could not be fetched. Check out the whole history (fetch-depth: 0, GIT_DEPTH: 0)."
  git merge-base "$base" HEAD 2>/dev/null || printf '%s\n' "$base"
}

changed() {
  git diff --name-only -z --no-renames --diff-filter="$1" --relative "$2" HEAD -- "${patterns[@]}"
}

git rev-parse --is-inside-work-tree >/dev/null 2>&1 || fail "$PWD is not a git repository; check it out first."

base=${ASSAY_BASE:-${CI_MERGE_REQUEST_DIFF_BASE_SHA:-${CI_COMMIT_BEFORE_SHA:-}}}
[[ $base =~ ^0*$ ]] && base=
only_changed=${ASSAY_CHANGED:-true}
case $only_changed in
  true | false) ;;
  *) fail "changed is $(printf %q "$only_changed"); allowed: true, false." ;;
esac

point=
if [ "$only_changed" = true ] && [ -n "$base" ]; then
  point=$(branch_point "$base")
  read_patterns "${ASSAY_SHARED:-}"
  shared=
  [ ${#patterns[@]} -eq 0 ] || shared=$(changed ACDMTUX "$point" | tr '\0' '\n') || fail "git could not compare with $point."
  if [ -n "$shared" ]; then
    echo 'assay-ci: a file on which every recipe depends has changed; all recipes are run.' >&2
    point=
  fi
fi

list=$(mktemp)
trap 'rm -f "$list"' EXIT
read_patterns "${ASSAY_RECIPES:-recipes/**/*.yaml}"
[ ${#patterns[@]} -gt 0 ] || fail "no recipes are named; write files or patterns, one a line."
git ls-files -z -- "${patterns[@]}" >"$list" || fail "git could not list the files."
mapfile -d '' -t matching <"$list"
[ ${#matching[@]} -gt 0 ] || fail "no file in git matches $(printf '%q ' "${patterns[@]#:(glob)}"). Is it a typo, or not committed?"
if [ -n "$point" ]; then
  changed d "$point" >"$list" || fail "git could not compare with $point."
  mapfile -d '' -t matching <"$list"
fi

for recipe in ${matching[@]+"${matching[@]}"}; do
  [[ $recipe != *[[:cntrl:]]* ]] || fail "a control character in the name $(printf %q "$recipe"); rename the file."
done
[ ${#matching[@]} -eq 0 ] || printf '%s\0' "${matching[@]}"
