#!/usr/bin/env bash
# Run recipes in CI: compile each of them, collect its reports, and end with the worst exit code.
#
#   ASSAY_RECIPES, ASSAY_CHANGED, ASSAY_SHARED, ASSAY_BASE   which recipes: see recipes.sh
#   ASSAY_PUBLISH          auto: publish a PASS, from a protected or the default branch only; never
#   ASSAY_DEFAULT_BRANCH   its name, on GitHub
#   ASSAY_KEY              who signs what is published, as assay's --key takes it: a file, env:NAME, or sigstore
#   ASSAY_SET              A.B=VALUE, one a line: for all recipes
#   ASSAY_FRESH            true: measure again, whatever is cached
#   ASSAY_WORKSPACE        directory of the cache and the runs
#   ASSAY_OUTPUT           new directory for what is collected: summary.md, comment.md, assay.env, and one directory for each recipe
#
# What is found goes to GITHUB_STEP_SUMMARY and GITHUB_OUTPUT too, where those are set.
set -Eeuo pipefail
# A command of this script that fails (a full disk) is a failure of the machine; its own code could be taken for a FAIL.
trap 'printf "assay-ci: line %s of run.sh failed\n" "$LINENO" >&2; exit 4' ERR
shopt -u patsub_replacement 2>/dev/null || true # from bash 5.2 on, & in a replacement would mean what was found
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# GitHub shows a step's summary up to 1 MiB, and takes 65,536 characters in a comment.
summary_bytes=1000000
comment_bytes=65000
log_lines=40

fail() {
  printf 'assay-ci: %s\n' "$*" >&2
  exit 2
}

# Whether a PASS may be published from here. What is not known to be safe is not: a pull request never is.
may_publish() {
  if [ "${GITHUB_ACTIONS:-}" = true ]; then
    [[ ${GITHUB_REF:-} == refs/heads/* ]] || return 1
    case ${GITHUB_EVENT_NAME:-} in
      schedule) return 0 ;; # GitHub runs these on the default branch only
      push | workflow_dispatch) ;;
      *) return 1 ;;
    esac
    [ "${GITHUB_REF_PROTECTED:-}" = true ] || [ "$GITHUB_REF" = "refs/heads/${ASSAY_DEFAULT_BRANCH:-}" ]
  elif [ "${GITLAB_CI:-}" = true ]; then
    case ${CI_PIPELINE_SOURCE:-} in
      push | schedule | web) ;;
      *) return 1 ;;
    esac
    [ -n "${CI_COMMIT_BRANCH:-}" ] || return 1
    [ "${CI_COMMIT_REF_PROTECTED:-}" = true ] || [ "$CI_COMMIT_BRANCH" = "${CI_DEFAULT_BRANCH:-}" ]
  else
    return 1
  fi
}

# Text as HTML that GitHub's Markdown, tables included, shows as it is.
literal() {
  local text=$1
  text=${text//&/&amp;}
  text=${text//</&lt;}
  text=${text//>/&gt;}
  text=${text//\"/&quot;}
  text=${text//|/&#124;}
  text=${text//\`/&#96;}
  text=${text//@/&#64;}
  printf '%s' "$text"
}

# The result as Markdown: the table of verdicts, then as many whole reports as fit into $1 bytes.
compose() {
  local LC_ALL=C limit=$1 index part text # bytes, not characters
  text="## Assay: $worst_verdict"$'\n\n'
  [ -z "$commit" ] || text+="Commit $commit${link:+, [log and files]($link)}."$'\n\n'
  if [ -n "$problem" ]; then
    text+="    ${problem//$'\n'/$'\n'    }"$'\n'
  elif [ ${#recipes[@]} -eq 0 ]; then
    text+='No recipe has changed: nothing was compiled.'$'\n'
  else
    text+='| recipe | verdict | exit code | published |'$'\n''|---|---|---|---|'$'\n'
  fi
  for index in "${!recipes[@]}"; do
    part="| <code>$(literal "${recipes[index]}")</code> | ${verdicts[index]} | ${codes[index]} | ${digests[index]:-no} |"$'\n'
    if ((${#text} + ${#part} > limit / 2)); then
      text+=$'\n'"$((${#recipes[@]} - index)) more recipes; see the uploaded files."$'\n'
      break
    fi
    text+=$part
  done
  for index in "${!recipes[@]}"; do
    part=$'\n'$(<"${places[index]}/section.md")$'\n'
    if ((${#text} + ${#part} > limit - 200)); then
      text+=$'\n''Reports left out, because no more fits here: see the uploaded files.'$'\n'
      break
    fi
    text+=$part
  done
  printf %s "$text"
}

# A JUnit file for a recipe that has no report: one test case with an error, so that it is not missing where tests are listed.
write_error_junit() {
  local name log
  name=$(literal "$1")
  log=$(tail -n "$log_lines" "$2" | tr -cd '\11\12\40-\176')
  cat <<JUNIT
<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="1" errors="1">
  <testsuite name="$name" tests="1" errors="1">
    <testcase classname="assay" name="$name"><error message="exit code $3">$(literal "$log")</error></testcase>
  </testsuite>
</testsuites>
JUNIT
}

# assay's own words on standard output, kept in $1. Nothing in them is a command to GitHub's runner.
run_assay() {
  local log=$1 token code=0
  shift
  token=$(head -c 32 /dev/urandom | sha256sum | cut -c 1-40)
  [ "${GITHUB_ACTIONS:-}" != true ] || printf '::stop-commands::%s\n' "$token"
  assay "$@" 2>&1 | tee "$log" || code=${PIPESTATUS[0]}
  [ "${GITHUB_ACTIONS:-}" != true ] || printf '::%s::\n' "$token"
  return "$code"
}

# One of assay's exit codes. A program that is missing, killed or that crashed (any other code) is a failure of the machine.
known_code() {
  case $1 in
    [0-5]) printf %s "$1" ;;
    *) printf 4 ;;
  esac
}

# Run one recipe into the directory $2; sets code, verdict and digest.
run_recipe() {
  local recipe=$1 place=$2 log=$2/log.txt flags=(--workspace "$workspace") found report
  code=0 verdict=ERROR digest=
  if [ "$publishing" != true ]; then
    flags+=(--no-publish)
  elif [ -n "${ASSAY_KEY:-}" ]; then
    flags+=(--key "$ASSAY_KEY")
  fi
  [ "${ASSAY_FRESH:-false}" != true ] || flags+=(--fresh-evidence)
  mkdir "$place"
  run_assay "$log" compile "${flags[@]}" ${assignments[@]+"${assignments[@]}"} -- "$recipe" || code=$?
  code=$(known_code "$code")
  found=$(sed -n 's/^verdict  *\([A-Z]*\)$/\1/p' "$log" | tail -n 1)
  case $code:$found in
    0:PASS | 1:FAIL | 3:INCONCLUSIVE | 4:INVALID) verdict=$found ;;
    0:* | 1:* | 3:*) code=4 ;; # a code that says more than the program did
  esac
  report=$(sed -n 's/^report  *//p' "$log" | tail -n 1)
  if [ "$verdict" != ERROR ] && [ -n "$report" ]; then
    for found in report.html report.md junit.xml verdict.json; do
      [ ! -f "$(dirname -- "$report")/$found" ] || cp "$(dirname -- "$report")/$found" "$place/"
    done
  fi
  if [ "$verdict:$publishing" = PASS:true ]; then
    digest=$(sed -n 's/^digest  *\(sha256:[0-9a-f]\{64\}\)$/\1/p' "$log" | tail -n 1)
  fi
  [ -f "$place/junit.xml" ] || write_error_junit "$recipe" "$log" "$code" >"$place/junit.xml"
  section "$recipe" "$place" >"$place/section.md"
}

# The report of one recipe; where it has none, the end of its log, every line of which is part of a code block.
section() {
  if [ -f "$2/report.md" ]; then
    cat "$2/report.md"
  else
    printf '## %s: <code>%s</code>\n\n' "$verdict" "$(literal "$1")"
    tail -n "$log_lines" "$2/log.txt" | tr -cd '\11\12\40-\176' | cut -c 1-500 | sed 's/^/    /'
  fi
}

# How bad an exit code is: integrity, then a failure, then a wrong request, then FAIL, then INCONCLUSIVE.
severity() {
  case $1 in
    0) printf 0 ;;
    3) printf 1 ;;
    1) printf 2 ;;
    2) printf 3 ;;
    4) printf 4 ;;
    *) printf 5 ;;
  esac
}

# Write the results to where CI reads them. Every value is one line without a line's end in it.
hand_over() {
  local index worst_report='' published=''
  for index in "${!recipes[@]}"; do
    [ -z "${digests[index]}" ] || published+=${published:+,}${digests[index]}
    if [ "${codes[index]}" = "$worst_code" ] && [ -z "$worst_report" ] && [ -f "${places[index]}/report.html" ]; then
      worst_report=${places[index]}/report.html
    fi
  done
  compose "$summary_bytes" >"$output/summary.md"
  compose "$comment_bytes" >"$output/comment.md"
  {
    printf 'ASSAY_VERDICT=%s\nASSAY_EXIT_CODE=%s\n' "$worst_verdict" "$worst_code"
    # GitLab takes 5 kB.
    { [ -z "$published" ] || [ ${#published} -gt 4000 ]; } || printf 'ASSAY_DIGEST=%s\n' "$published"
    [ -z "$worst_report" ] || printf 'ASSAY_REPORT=%s\n' "$worst_report"
  } >"$output/assay.env"
  [ -z "${GITHUB_STEP_SUMMARY:-}" ] || cat "$output/summary.md" >>"$GITHUB_STEP_SUMMARY"
  [ -z "${GITHUB_OUTPUT:-}" ] || printf '%s=%s\n' verdict "$worst_verdict" exit-code "$worst_code" digest "$published" \
    report "$worst_report" reports "$output" comment "$output/comment.md" >>"$GITHUB_OUTPUT"
}

workspace=${ASSAY_WORKSPACE:-artifacts}
publishing=false
case ${ASSAY_PUBLISH:-auto} in
  auto) ! may_publish || publishing=true ;;
  never) ;;
  *) fail "publish is $(printf %q "$ASSAY_PUBLISH"); allowed: auto, never." ;;
esac
assignments=()
while IFS= read -r line; do
  line=${line%$'\r'}
  [[ $line =~ ^[[:space:]]*$ ]] || assignments+=(--set "$line")
done <<<"${ASSAY_SET:-}"

output=${ASSAY_OUTPUT:-}
[[ $output != -* ]] || output=./$output
[ -n "$output" ] || output=$(mktemp -d "${RUNNER_TEMP:-${TMPDIR:-/tmp}}/assay-ci.XXXXXX")
[[ $output != *[[:cntrl:]]* ]] || fail 'a control character in the name of the output directory.'
[ -z "$(ls -A "$output" 2>/dev/null)" ] || fail "the output directory $output is not empty; name a new one."
mkdir -p "$output"

commit=${ASSAY_COMMIT:-${GITHUB_SHA:-${CI_COMMIT_SHA:-}}}
[[ $commit =~ ^[0-9a-f]{7,64}$ ]] || commit=
link=${CI_JOB_URL:-}
[ -z "${GITHUB_RUN_ID:-}" ] || link=${GITHUB_SERVER_URL:-}/${GITHUB_REPOSITORY:-}/actions/runs/$GITHUB_RUN_ID

recipes=() verdicts=() codes=() digests=() places=()
worst_code=0 worst_verdict=PASS problem=''
listed=$output/recipes.list
if "$here/recipes.sh" >"$listed" 2>"$output/problem.txt"; then
  mapfile -d '' -t recipes <"$listed"
  [ ${#recipes[@]} -gt 0 ] || worst_verdict=NONE
else
  worst_code=2 worst_verdict=ERROR problem=$(tr -cd '\11\12\40-\176' <"$output/problem.txt")
fi
cat "$output/problem.txt" >&2
rm "$listed" "$output/problem.txt"

for index in "${!recipes[@]}"; do
  name=${recipes[index]//[^A-Za-z0-9._-]/_}
  places[index]=$output/$((index + 1))-${name: -80}
  [ ${#name} -gt 80 ] || places[index]=$output/$((index + 1))-$name
  printf 'assay-ci: %s (%s of %s)\n' "${recipes[index]}" $((index + 1)) ${#recipes[@]}
  run_recipe "${recipes[index]}" "${places[index]}"
  codes[index]=$code verdicts[index]=$verdict digests[index]=$digest
  if (($(severity "$code") > $(severity "$worst_code"))); then
    worst_code=$code worst_verdict=$verdict
  fi
done
hand_over
printf 'assay-ci: %s, exit code %s; collected in %s\n' "$worst_verdict" "$worst_code" "$output"
exit "$worst_code"
