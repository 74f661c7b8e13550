#!/bin/sh
# Azurite, Microsoft's emulator of Azure's blob storage, for the tests of az://: from npm into the virtual environment.
# Node comes from Debian where this is root and there is none. Without it these tests are skipped.
set -eu
home="$(dirname "$0")/../.venv/azurite"
if [ -f "$home/node_modules/azurite/package.json" ]; then
    exit 0
fi
if ! command -v npm >/dev/null 2>&1; then
    if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" -ne 0 ]; then
        echo "to run the tests of az://, install Node.js and npm (Debian: apt-get install nodejs npm)" >&2
        exit 0
    fi
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends nodejs npm; } ||
        { echo "Node.js could not be installed: the tests of az:// will be skipped" >&2; exit 0; }
fi
npm install --prefix "$home" --silent --no-audit --no-fund --omit=dev 'azurite@^3.35.0' ||
    echo "Azurite could not be installed: the tests of az:// will be skipped" >&2
