"""Adapters of the registry for requests: a name is looked up for each of them, its files are there from then on.

A request sees one version: it goes on with the folder it got, whatever its name stands for a moment later.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from typing import TypeVar

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import LOCK, Signature, signature_of
from lorikeet.errors import UnavailableError
from lorikeet.registry.home import Home
from lorikeet.registry.records import Actor, Resolved
from lorikeet.server.catalogue import AdapterFolder

REMEMBERED = 4096  # answers that hold as long as nothing in the catalog changes
LISTED = 1000  # repositories that a listing shows

Key = TypeVar("Key")
Value = TypeVar("Value")


class RegistryAdapters:
    """Resolves `name`, `name/3`, `name/3@step` and `name@alias`; what `server.models.Models.registry` is."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._lock = threading.Lock()
        self._generation: int | None = None
        self._answers: OrderedDict[tuple[Actor, str], Resolved] = OrderedDict()
        self._signatures: OrderedDict[str, Signature] = OrderedDict()

    async def find(self, who: Actor, name: str) -> AdapterFolder:
        """The version that `name` stands for at this moment, under its exact name.

        Raises `NotFoundError` for what is not there or not for `who`, `InvalidRequestError` for what is no reference,
        `ConflictError` for a version without content, and what the blob store raises.
        """
        return await asyncio.to_thread(self._find, who, name)

    async def listing(self, who: Actor) -> list[AdapterFolder]:
        """Of each repository what its bare name stands for, under that name; the folders hold no weights."""
        return await asyncio.to_thread(self._listing, who)

    def _find(self, who: Actor, name: str) -> AdapterFolder:
        resolved = self._resolve(who, name)
        folder = self.home.blobs.materialise(resolved.manifest)
        with self._lock:
            signature = self._signatures.get(resolved.manifest)
        if signature is None:  # of files that never change
            signature = signature_of(folder)
            if signature is None:
                raise UnavailableError(f"the files of {resolved.reference} were removed", hint="try again")
            with self._lock:
                _remember(self._signatures, resolved.manifest, signature)
        return AdapterFolder(resolved.reference, folder, signature)

    def _resolve(self, who: Actor, name: str) -> Resolved:
        """From memory while nobody has changed the catalog. It is asked whether somebody has before each answer."""
        catalog = self.home.catalog
        generation = catalog.database.generation()
        if generation is None:
            return catalog.versions.resolve(who, name)
        key = (who, name)
        with self._lock:
            if generation != self._generation:
                self._generation = generation
                self._answers.clear()
            known = self._answers.get(key)
        if known is not None:
            return known
        resolved = catalog.versions.resolve(who, name)
        with self._lock:
            if generation == self._generation:
                _remember(self._answers, key, resolved)
        return resolved

    def _listing(self, who: Actor) -> list[AdapterFolder]:
        found = []
        for name, manifest in self.home.catalog.versions.current(who, limit=LISTED):
            folder = self.home.blobs.materialise(manifest, only=(CONFIG, LOCK))
            signature = signature_of(folder)
            if signature is not None:
                found.append(AdapterFolder(name, folder, signature))
        return found


def _remember(known: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    known[key] = value
    while len(known) > REMEMBERED:
        known.popitem(last=False)
