"""Creates that a client sends again because it saw no answer, told apart from new ones.

The SDK repeats a POST, word for word and without a mark, after a 429 or 5xx from anything between it and the server.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import msgspec

REPEAT_SECONDS = 900.0  # the SDK's four attempts after the first, with its waits and slow answers in between


def fingerprint(request: Any) -> str:
    """The same for the same JSON."""
    return hashlib.sha256(msgspec.json.encode(request, order="sorted")).hexdigest()


class Intentions:
    """When a caller last announced a new training of this kind.

    The SDK asks what a job would cost once before it creates one, and not before it repeats the create: a create that
    follows such a question means another job.
    """

    LIMIT = 10_000

    def __init__(self) -> None:
        self._asked: dict[tuple[str, ...], float] = {}

    def asked(self, *about: str) -> None:
        self._asked.pop(about, None)
        self._asked[about] = time.time()
        while len(self._asked) > self.LIMIT:
            del self._asked[next(iter(self._asked))]

    def since(self, *about: str) -> float:
        """What was created before that is not what a create now repeats."""
        return max(self._asked.get(about, 0.0), time.time() - REPEAT_SECONDS)
