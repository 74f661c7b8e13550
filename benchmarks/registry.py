"""How long the catalog takes with 10,000 repositories of 5 versions, and with 200 clients at once.

    python benchmarks/registry.py [--catalog postgresql://...] [--repositories 10000] [--clients 200]

The last line is JSON: times in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.records import DEFAULT_TENANT, Actor
from lorikeet.registry.schema import RepositoryRow, VersionRow, new_id

WHO = Actor()


def fill(catalog: Catalog, count: int) -> None:
    def work(session: Session) -> None:
        now = time.time()
        homes = [
            {"id": new_id(), "tenant_id": DEFAULT_TENANT, "name": f"repository-{number:05d}", "description": "",
             "last_number": 5, "created": now, "created_by": "bench", "changed": now}
            for number in range(count)
        ]  # fmt: skip
        session.execute(insert(RepositoryRow), homes)
        versions = [
            {"id": new_id(), "tenant_id": DEFAULT_TENANT, "repository_id": home["id"], "number": number,
             "state": "ready", "description": "", "manifest": "0" * 64, "created": now, "created_by": "bench"}
            for home in homes for number in range(1, 6)
        ]  # fmt: skip
        session.execute(insert(VersionRow), versions)
        session.execute(text("ANALYZE"))

    catalog.database.write(work)


def timed(work: Callable[[], object], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    return {"p50": round(statistics.median(times), 2), "max": round(max(times), 2)}


def clients(catalog: Catalog, count: int) -> dict[str, float]:
    """Each makes a repository, moves on, and looks at it: three transactions."""
    times: list[float] = []
    start = threading.Barrier(count + 1)

    def client(number: int) -> None:
        start.wait()
        for turn in range(3):
            began = time.perf_counter()
            catalog.repositories.create(WHO, f"client-{number}-{turn}")
            catalog.repositories.get(WHO, f"client-{number}-{turn}")
            times.append((time.perf_counter() - began) * 1000)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    ordered = sorted(times)
    return {
        "creates_per_second": round(len(times) / wall, 1), "errors": count * 3 - len(times),
        "p50": round(ordered[len(ordered) // 2], 1), "p99": round(ordered[int(len(ordered) * 0.99)], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--catalog", help="URL of an empty PostgreSQL database; default: SQLite in a temporary folder")
    parser.add_argument("--repositories", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        catalog = open_catalog(asked.catalog or Path(folder) / "catalog.db")
        fill(catalog, asked.repositories)
        middle = f"repository-{asked.repositories // 2:05d}"
        found = {
            "repositories": asked.repositories,
            "database": catalog.database.engine.dialect.name,
            "page_of_50": timed(lambda: catalog.repositories.page(WHO, after=middle), 50),
            "page_of_1000": timed(lambda: catalog.repositories.page(WHO, after=middle, limit=1000), 10),
            "search": timed(lambda: catalog.repositories.page(WHO, contains="9999"), 20),
            "resolve": timed(lambda: catalog.versions.resolve(WHO, middle), 200),
            "generation": timed(catalog.database.generation, 200),
            "clients": {"count": asked.clients, **clients(catalog, asked.clients)},
        }
        catalog.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
