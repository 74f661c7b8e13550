"""What a constrained completion may say next: so far, exactly one of given token sequences. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Choices:
    """Where a completion stands in the trie of the sequences it may be.

    Where one choice is the beginning of another, a stop token may end the shorter one.
    """

    def __init__(self, choices: Iterable[Sequence[int]], stop_ids: Iterable[int]) -> None:
        self._root = _Node()
        for choice in choices:
            node = self._root
            for token in choice:
                node = node.children.setdefault(token, _Node())
            node.ends = True
        self._stop_ids = frozenset(stop_ids)
        self._node = self._root
        self._stopped = False

    @property
    def done(self) -> bool:
        """The completion is one of the choices and cannot become another."""
        return self._stopped or (self._node.ends and not self._node.children)

    @property
    def complete(self) -> bool:
        """The completion is one of the choices as it stands."""
        return self._stopped or self._node.ends

    def allowed(self) -> list[int]:
        """The tokens that may come next, ascending; empty when done."""
        if self.done:
            return []
        tokens = set(self._node.children)
        return sorted(tokens | self._stop_ids) if self._node.ends else sorted(tokens)

    def forced(self) -> list[int]:
        """Take every next token that has no alternative, and return them."""
        taken = []
        while len(allowed := self.allowed()) == 1:
            self.advance(allowed[0])
            taken.append(allowed[0])
        return taken

    def advance(self, token: int) -> None:
        """Take `token` as the next one. Raises ValueError where it is not allowed."""
        following = None if self._stopped else self._node.children.get(token)
        if following is not None:
            self._node = following
        elif self._node.ends and not self.done and token in self._stop_ids:
            self._stopped = True
        else:
            raise ValueError(f"token {token} is not allowed here; allowed are {self.allowed()}")


class _Node:
    __slots__ = ("children", "ends")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.ends = False
