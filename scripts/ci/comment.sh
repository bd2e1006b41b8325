#!/usr/bin/env bash
# Put the result into one comment of a pull request: a second run updates the comment of the first.
#
#   ASSAY_COMMENT          Markdown file
#   ASSAY_PULL_REQUEST     its number
#   ASSAY_COMMENT_KEY      tells the comments of several jobs apart; letters, digits, dots, dashes, underscores
#   ASSAY_COMMENT_AUTHOR   who writes them: only this login's comments are updated
#   ASSAY_VERDICT          NONE (no recipe has changed) updates a comment, but adds none
#   GITHUB_TOKEN, GITHUB_API_URL, GITHUB_REPOSITORY, GITHUB_STEP_SUMMARY   as the runner sets them
#
# A comment is not the verdict: where it cannot be written (a fork's token may not), the summary says so, and the job goes on.
set -euo pipefail

fail() {
  printf 'assay-ci: %s\n' "$*" >&2
  exit 2
}

# Say why there is no comment, and end well.
give_up() {
  printf 'assay-ci: no comment on the pull request: %s\n' "$1" >&2
  [ -z "${GITHUB_STEP_SUMMARY:-}" ] || printf '\n_No comment on the pull request: %s The result is above._\n' "$1" >>"$GITHUB_STEP_SUMMARY"
  exit 0
}

# One request: method, path, and the file with its body, if any. The answer is in $work/answer; prints the status, 000 without one.
# The token goes through standard input, where no list of processes shows it.
request() {
  local arguments=(--silent --show-error --max-time 30 --request "$1" --output "$work/answer" --write-out '%{http_code}')
  [ "$1" = POST ] || arguments+=(--retry 2) # posted twice would be two comments
  [ -z "${3:-}" ] || arguments+=(--header 'Content-Type: application/json' --data-binary "@$3")
  printf 'header = "Authorization: Bearer %s"\n' "$GITHUB_TOKEN" |
    curl --config - "${arguments[@]}" --header 'Accept: application/vnd.github+json' \
      --header 'X-GitHub-Api-Version: 2022-11-28' -- "$api/repos/$GITHUB_REPOSITORY/$2" || true
}

# What a status that is no success means.
explain() {
  case $1 in
    401 | 403 | 404) printf 'the token may not write comments here (HTTP %s); pull requests from forks never may.' "$1" ;;
    000) printf 'GitHub could not be reached.' ;;
    *) printf 'GitHub answered HTTP %s.' "$1" ;;
  esac
}

# The number of our comment, or nothing.
find_comment() {
  local page status
  for ((page = 1; page <= 50; page++)); do
    status=$(request GET "issues/$ASSAY_PULL_REQUEST/comments?per_page=100&page=$page")
    [ "$status" = 200 ] || give_up "$(explain "$status")"
    found=$(jq -r --arg marker "$marker" --arg author "$author" \
      'map(select((.body // "" | startswith($marker)) and .user.login == $author)) | first | .id // empty' "$work/answer") ||
      give_up 'GitHub answered with something else than comments.'
    [ -z "$found" ] || return 0
    [ "$(jq length "$work/answer")" -ge 100 ] || return 0
  done
}

[[ ${ASSAY_PULL_REQUEST:-} =~ ^[0-9]{1,12}$ ]] || fail 'ASSAY_PULL_REQUEST is no number of a pull request.'
[[ ${GITHUB_REPOSITORY:-} =~ ^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$ ]] || fail 'GITHUB_REPOSITORY is not OWNER/NAME.'
key=${ASSAY_COMMENT_KEY:-assay}
[[ $key =~ ^[A-Za-z0-9._-]{1,64}$ ]] || fail "the comment's key is $(printf %q "$key"); allowed: letters, digits, dots, dashes, underscores."
[ -f "${ASSAY_COMMENT:-}" ] || fail "there is no file ${ASSAY_COMMENT:-} to put into a comment."
api=${GITHUB_API_URL:-https://api.github.com}
author=${ASSAY_COMMENT_AUTHOR:-github-actions[bot]}
marker="<!-- assay-ci $key -->"
{ command -v jq && command -v curl; } >/dev/null || give_up 'it needs curl and jq on the runner.'
[[ ${GITHUB_TOKEN:-} =~ ^[A-Za-z0-9._-]+$ ]] || give_up 'there is no token.'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
jq -n --arg marker "$marker" --rawfile text "$ASSAY_COMMENT" '{body: ($marker + "\n" + $text)}' >"$work/body"

found=
find_comment
status=404
if [ -n "$found" ]; then
  status=$(request PATCH "issues/comments/$found" "$work/body")
fi
if [ "$status" = 404 ]; then
  # There is none yet, or it was deleted since.
  [ "${ASSAY_VERDICT:-}" != NONE ] || exit 0
  status=$(request POST "issues/$ASSAY_PULL_REQUEST/comments" "$work/body")
fi
case $status in
  200 | 201) printf 'assay-ci: the comment is %s\n' "$(jq -r '.html_url // .id' "$work/answer")" ;;
  *) give_up "$(explain "$status")" ;;
esac
