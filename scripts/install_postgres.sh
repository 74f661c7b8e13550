#!/bin/sh
# PostgreSQL for the tests: installed from Debian where this is root, as on a machine of the CI. Elsewhere it says what to
# do; tests that need it are skipped without it. They start a server of their own, so Debian's cluster is not made.
set -eu
if ls /usr/lib/postgresql/*/bin/pg_ctl >/dev/null 2>&1 || command -v pg_ctl >/dev/null 2>&1; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1 || [ "$(id -u)" -ne 0 ]; then
    echo "to run the tests on PostgreSQL, install it (Debian: apt-get install postgresql)" >&2
    exit 0
fi
mkdir -p /etc/postgresql-common/createcluster.d
echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.d/tests.conf
{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends postgresql; } ||
    echo "PostgreSQL could not be installed: its tests will be skipped" >&2
