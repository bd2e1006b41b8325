#!/usr/bin/env bash
# Install the Assay that these scripts belong to, with the versions that it was tested with.
#
#   ASSAY_EXTRAS   its extras, comma-separated; none: it is installed already
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

extras=${ASSAY_EXTRAS:-compile,cpu}
[ "$extras" != none ] || exit 0
[[ $extras =~ ^[a-z-]+(,[a-z-]+)*$ ]] || {
  printf 'assay-ci: the extras are %q; write them like compile,cpu, or none.\n' "$extras" >&2
  exit 2
}
command -v python >/dev/null || {
  echo 'assay-ci: there is no python; set up Python 3.11 or newer first.' >&2
  exit 2
}
python -m pip install --quiet --disable-pip-version-check --constraint "$here/constraints.txt" "${here}[$extras]"
