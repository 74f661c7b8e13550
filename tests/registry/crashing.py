"""Kills processes in the middle of what they do, and looks at what is there afterwards.

    python -m tests.registry.crashing OPERATION FOLDER KILLS SEED

This process imports everything and forks a child for each kill, so that the kills fall into the operation itself and
not into the start of an interpreter. What a child was told to be done it says on a pipe before it goes on.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import inspect

from lorikeet.registry.blobs import BlobStore
from lorikeet.registry.catalog import Catalog, open_catalog
from lorikeet.registry.migration import migrate
from lorikeet.registry.records import Actor, VersionContent
from lorikeet.registry.schema import Rows

WHO = Actor()
SIZE = 300_000
Say = Callable[[int], None]


def weights(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (SIZE // 32)


def opened(folder: Path) -> tuple[Catalog, BlobStore]:
    catalog = open_catalog(folder / "catalog.db")
    return catalog, BlobStore(folder / "blobs", folder, catalog.ledger)


# --- operations: each goes on for ever, or until there is nothing to do ---------------------------------------------


def upload(folder: Path, say: Say) -> None:
    """Uploads in pieces that go on where the last process ended, each becomes a version."""
    catalog, store = opened(folder)
    catalog.repositories.create(WHO, "r", exists_ok=True)
    while True:
        number = len(catalog.repositories.get(WHO, "r").versions) + 1
        data = weights(number)
        one = store.begin(f"version-{number}")
        while (offset := one.offset) < len(data):
            one.write(data[offset : offset + 30_000])
        blob = one.finish(hashlib.sha256(data).hexdigest())
        place = folder / f"in-{os.getpid()}"
        place.mkdir(exist_ok=True)
        (place / "weights").write_bytes(data)
        manifest = store.put_folder(place, ["weights"])
        assert manifest.files[0].sha256 == blob.sha256
        say(catalog.versions.add(WHO, "r", VersionContent(manifest=manifest), idempotency_key=f"v{number}").number)


def check_upload(folder: Path, told: int) -> None:
    catalog, store = opened(folder)
    versions = catalog.repositories.page(WHO).items[0].versions if catalog.repositories.count(WHO) else []
    numbers = [one.number for one in versions]
    assert numbers == list(range(1, len(numbers) + 1)), numbers
    assert len(numbers) >= told, f"{told} were told to be done, {len(numbers)} are there"
    for number in numbers[-3:]:
        resolved = catalog.versions.resolve(WHO, f"r/{number}")
        assert (store.materialise(resolved.manifest) / "weights").read_bytes() == weights(number)
    assert len(catalog.audit.page(WHO, action="version.create", limit=1000).items) == len(numbers)
    store.collect(grace_seconds=3600)
    catalog.close()


def alias(folder: Path, say: Say) -> None:
    catalog, _ = opened(folder)
    while True:
        now = catalog.versions.resolve(WHO, "r@production").number
        catalog.aliases.move(WHO, "r", "production", now % 5 + 1, expected=now)
        say(len(catalog.aliases.history(WHO, "r", "production")))


def prepare_alias(folder: Path) -> None:
    catalog, store = opened(folder)
    catalog.repositories.create(WHO, "r")
    (folder / "one").mkdir()
    (folder / "one" / "weights").write_bytes(b"x")
    for _ in range(5):
        content = VersionContent(manifest=store.put_folder(folder / "one", ["weights"]))
        catalog.versions.add(WHO, "r", content)
    catalog.aliases.move(WHO, "r", "production", 1)
    catalog.close()


def check_alias(folder: Path, told: int) -> None:
    catalog, _ = opened(folder)
    moves = catalog.aliases.history(WHO, "r", "production")
    assert len(moves) >= told, f"{told} were told to be done, {len(moves)} are there"
    assert catalog.versions.resolve(WHO, "r").number == moves[0].number
    assert all(move.previous == before.number for move, before in zip(moves, moves[1:], strict=False))
    assert len(catalog.audit.page(WHO, action="alias.move", limit=1000).items) == min(len(moves), 1000)
    catalog.close()


def migration(folder: Path, say: Say) -> None:
    count = 0
    while True:
        count += 1
        open_catalog(folder / f"{os.getpid()}-{count}.db").close()
        say(count)


def check_migration(folder: Path, told: int) -> None:
    """Whatever there was of tables is all of them or none, and opening again makes the rest."""
    for path in folder.glob("*.db"):
        connection = sqlite3.connect(path)
        found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        connection.close()
        expected = {*Rows.metadata.tables}
        assert not found & expected or expected <= found, found
        catalog = open_catalog(path)
        catalog.repositories.create(WHO, "r")
        assert set(inspect(catalog.database.engine).get_table_names()) == expected | {"alembic_version"}
        migrate(catalog.database)
        catalog.close()
        for file in folder.glob(f"{path.name}*"):
            file.unlink()


OPERATIONS = {
    "upload": (None, upload, check_upload),
    "alias": (prepare_alias, alias, check_alias),
    "migration": (None, migration, check_migration),
}


def child(operation: Callable[[Path, Say], None], folder: Path, out: int) -> None:
    try:
        operation(folder, lambda number: void(os.write(out, number.to_bytes(4, "little"))))
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)  # an operation does not end by itself


def void(_: object) -> None:
    pass


def main(name: str, folder: Path, kills: int, seed: int) -> None:
    prepare, operation, check = OPERATIONS[name]
    draw = random.Random(seed)
    if prepare is not None:
        prepare(folder)
    told = 0
    for kill in range(kills):
        into, out = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(into)
            child(operation, folder, out)
        os.close(out)
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        with os.fdopen(into, "rb") as pipe:
            said = pipe.read()
        assert os.WIFSIGNALED(status), f"kill {kill}: the child ended by itself with {status}"
        for start in range(0, len(said) - len(said) % 4, 4):
            told = max(told, int.from_bytes(said[start : start + 4], "little"))
        check(folder, told if name != "migration" else 0)
    print(f"{name}: {kills} kills, {told} done")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
