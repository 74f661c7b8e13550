#!/bin/sh
# A browser for the tests of the page: installed from Debian where this is root, as on a machine of the CI. Elsewhere it
# says what to do; tests that need it are skipped without it.
set -eu
if command -v chromium >/dev/null 2>&1; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" -ne 0 ]; then
    echo "to run the tests of the page, install a browser (Debian: apt-get install chromium)" >&2
    exit 0
fi
{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium fonts-liberation; } ||
    echo "Chromium could not be installed: the tests of the page will be skipped" >&2
