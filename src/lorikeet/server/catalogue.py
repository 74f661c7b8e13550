"""Names of adapters and the folders behind them: everything below one folder that holds an `adapter_config.json`."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import Signature, signature_of
from lorikeet.adapters.sources import escaping_link
from lorikeet.errors import ConfigError, NotFoundError

log = logging.getLogger("lorikeet.catalogue")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESCAN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A served name. `signature` changes when the files are replaced."""

    name: str
    folder: Path
    signature: Signature


@dataclass(frozen=True, slots=True)
class Refusal:
    """A name that is not served, why, and the folders that claim it."""

    name: str
    reason: str
    folders: tuple[Path, ...]


class Catalogue:
    """Looks at the disk again at most about once a second: on an unknown name, on listing, and for a name's files."""

    def __init__(self, root: Path | None, base_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        if root is not None and not root.is_dir():
            raise ConfigError(f"--adapters: {root} is not a folder", param="adapters")
        self.root = root
        self._base_name = base_name
        self._clock = clock
        self._scanned = float("-inf")
        self._folders: dict[str, AdapterFolder] = {}
        self._checked: dict[str, float] = {}
        self._refusals: dict[str, Refusal] = {}

    def peek(self, name: str) -> AdapterFolder | None:
        """The adapter of this name if that is known without looking at the disk."""
        fresh = self._clock() - self._checked.get(name, float("-inf")) < RESCAN_SECONDS
        return self._folders.get(name) if fresh else None

    def find(self, name: str) -> AdapterFolder:
        """The adapter of this name as it is on disk now. Raises `NotFoundError`."""
        found = self._folders.get(name)
        if found is not None:
            found = self._fresh(found)
        if found is None:
            self._rescan()
            found = self._folders.get(name)
        if found is None:
            raise self._unknown(name)
        return found

    def entries(self) -> list[AdapterFolder]:
        """All served adapters by name."""
        self._rescan()
        return [self._folders[name] for name in sorted(self._folders)]

    def refusals(self) -> list[Refusal]:
        """What was found and is not served."""
        self._rescan()
        return [self._refusals[name] for name in sorted(self._refusals)]

    def _fresh(self, found: AdapterFolder) -> AdapterFolder | None:
        """The same name with its files looked at again; None when they are gone."""
        now = self._clock()
        if now - self._checked.get(found.name, float("-inf")) < RESCAN_SECONDS:
            return found
        self._checked[found.name] = now
        signature = signature_of(found.folder)
        changed = signature != found.signature
        if signature is None or (changed and escaping_link(found.folder, self.root) is not None):
            del self._folders[found.name]
            return None
        if changed:
            found = self._folders[found.name] = AdapterFolder(found.name, found.folder, signature)
        return found

    def _rescan(self) -> None:
        now = self._clock()
        if self.root is None or now - self._scanned < RESCAN_SECONDS:
            return
        claims: dict[str, list[Path]] = {}
        for folder in adapter_folders(self.root):
            claims.setdefault(folder.name, []).append(folder)
        folders: dict[str, AdapterFolder] = {}
        refusals: dict[str, Refusal] = {}
        for name, claimed in claims.items():
            reason = self._objection(name, claimed)
            signature = None if reason else signature_of(claimed[0])
            if reason:
                refusals[name] = Refusal(name, reason, tuple(claimed))
            elif signature is not None:
                folders[name] = AdapterFolder(name, claimed[0], signature)
        for name, refusal in refusals.items():
            if self._refusals.get(name) != refusal:
                log.warning("adapter %r is not served: %s", name, refusal.reason)
        self._folders, self._refusals = folders, refusals
        self._checked = dict.fromkeys(folders, now)
        self._scanned = self._clock()

    def _objection(self, name: str, claimed: list[Path]) -> str | None:
        if name == self._base_name:
            return f"its name is the base's ({claimed[0]})"
        if not NAME.fullmatch(name):
            return f"its name must match {NAME.pattern} ({claimed[0]})"
        link = escaping_link(claimed[0], self.root)
        if link is not None:
            return f"its {link.name} is a link that leads out of the folder ({claimed[0]})"
        if len(claimed) > 1:
            return "several folders have this name: " + ", ".join(map(str, claimed))
        return None

    def _unknown(self, name: str) -> NotFoundError:
        refusal = self._refusals.get(name)
        if refusal is not None:
            return NotFoundError(f"adapter {name!r} is not served: {refusal.reason}", param="model")
        known = [self._base_name, *sorted(self._folders)]
        more = f" and {len(known) - 10} more (GET /v1/models)" if len(known) > 10 else ""
        return NotFoundError(
            f"no model or adapter is called {name!r}", hint="served are " + ", ".join(known[:10]) + more, param="model"
        )


def adapter_folders(root: Path) -> Iterator[Path]:
    """Folders from `root` down with an adapter config, links followed once; what starts with a dot is private."""
    seen: set[tuple[int, int]] = set()
    for path, names, files in os.walk(root, followlinks=True):
        stat = os.stat(path)
        if (stat.st_dev, stat.st_ino) in seen:
            names.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        if CONFIG in files:
            yield Path(path)
