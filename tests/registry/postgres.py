"""A private PostgreSQL for the tests: its own folder, a unix socket, no network, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MISSING = "PostgreSQL is not installed (apt-get install postgresql)"


def find_binaries() -> Path | None:
    """The folder of `initdb` and `pg_ctl`: Debian keeps them out of the PATH."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")]
    if found:
        return max(found, key=lambda path: int(path.parent.parent.name)).parent
    there = shutil.which("pg_ctl")
    return Path(there).resolve().parent if there else None


@contextmanager
def private_postgres(binaries: Path) -> Iterator[str]:
    """Yields the URL of its database. It refuses to run as root, who therefore starts it as somebody else."""
    folder = Path(tempfile.mkdtemp(prefix="lorikeet-pg-", dir="/tmp"))  # a socket's path has at most 107 characters
    user = None
    if os.geteuid() == 0:
        user = next((name for name in ("postgres", "nobody") if _is_user(name)), "nobody")
        shutil.chown(folder, user)

    def run(*command: str) -> None:
        subprocess.run(command, user=user, check=True, cwd=folder, stdout=subprocess.DEVNULL, env={"LC_ALL": "C.UTF-8"})

    data = folder / "data"
    settings = "-c listen_addresses='' -c fsync=off -c max_connections=300"
    try:
        run(f"{binaries}/initdb", "-D", str(data), "-A", "trust", "-U", "lorikeet", "-E", "UTF8", "--no-sync")
        options = f"-k {folder} {settings}"
        run(f"{binaries}/pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-w", "-o", options, "start")
        try:
            yield f"postgresql://lorikeet@/postgres?host={folder}"
        finally:
            run(f"{binaries}/pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
