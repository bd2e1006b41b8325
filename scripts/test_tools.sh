#!/usr/bin/env bash
# Independent programs that tests hold Assay against: docker-registry is a server for it, skopeo reads its registries, Chromium its
# reports. Tests that lack one are skipped, with the reason.
set -euo pipefail

missing=()
command -v skopeo >/dev/null || missing+=(skopeo)
command -v docker-registry >/dev/null || missing+=(docker-registry)
command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
if [ ${#missing[@]} -eq 0 ] || ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  exit 0
fi
for package in "${missing[@]}"; do
  echo "test tools: installing $package"
  install=(timeout 300 env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$package")
  "${install[@]}" >/dev/null 2>&1 && continue
  { timeout 300 apt-get update -qq && "${install[@]}"; } >/dev/null 2>&1 ||
    echo "test tools: $package could not be installed; the tests that need it will be skipped"
done
