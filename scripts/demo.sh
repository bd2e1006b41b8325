#!/usr/bin/env bash
# The whole of Assay on a real model: compile, judge and publish the demo recipe; pull it by digest; generate from it twice,
# once with Assay and once with nothing but onnxruntime-genai.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=.venv/bin
recipe=recipes/smollm2-135m-w4a16-ort.yaml
name=smollm2-135m-w4a16-ort
prompt="The capital of France is"

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }

say assay plan "$recipe"
"$bin/assay" plan "$recipe"

say assay compile "$recipe"
"$bin/assay" compile "$recipe"

digest=$("$bin/assay" show "$name:latest" --json | "$bin/python" -c 'import json, sys; print(json.load(sys.stdin)["digest"])')
destination=$(mktemp -d)/model
trap 'rm -rf "$(dirname "$destination")"' EXIT

say assay pull "$digest" "$destination"
"$bin/assay" pull "$digest" "$destination"

say assay generate "$destination" --prompt "\"$prompt\""
"$bin/assay" generate "$destination" --prompt "$prompt" --new-tokens 24

say python scripts/generate_plain.py "$destination" "\"$prompt\"   (onnxruntime-genai alone)"
"$bin/python" scripts/generate_plain.py "$destination" "$prompt" 24

printf '\nverdict    PASS\nreport     %s\ndigest     %s\n' "$PWD/artifacts/runs/$name/report.html" "$digest"
