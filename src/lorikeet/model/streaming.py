"""Text out of tokens while they arrive: stable pieces only, and stop strings. No torch."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol


class Pieces(Protocol):
    """What the stream decoder needs of a tokenizer; `model.tokenizer.Tokenizer` is one."""

    byte_level: bool
    byte_fallback: bool
    special_ids: frozenset[int]

    def piece(self, token: int) -> str | None: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class StreamDecoder:
    """Token ids in, text out. The pieces joined are `decode` of all ids; no piece holds half a character.

    Constant work a token. A byte-level vocabulary goes through an incremental UTF-8 decoder. Elsewhere a token is
    decoded behind the token before it, and a run of byte tokens as a whole, because one bad byte spoils its run.
    """

    def __init__(self, pieces: Pieces, skip_special_tokens: bool = True) -> None:
        self._pieces = pieces
        self._skipped = pieces.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._anchor: list[int] = []
        self._anchor_length = 0
        self._run: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` make stable, possibly empty."""
        return "".join([self._push(token) for token in ids if token not in self._skipped])

    def finish(self) -> str:
        """What was held back; the end of an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True) if self._pieces.byte_level else self._flush_run()

    def _push(self, token: int) -> str:
        piece = self._pieces.piece(token)
        if piece is None:  # an id beyond the vocabulary has no text
            return ""
        if self._pieces.byte_level:
            return self._utf8.decode(byte_level_bytes(piece))
        self._run.append(token)
        return "" if self._pieces.byte_fallback and fallback_byte(piece) is not None else self._flush_run()

    def _flush_run(self) -> str:
        if not self._run:
            return ""
        text = self._pieces.decode([*self._anchor, *self._run], skip_special_tokens=False)[self._anchor_length :]
        self._anchor, self._run = self._run[-1:], []
        self._anchor_length = len(self._pieces.decode(self._anchor, skip_special_tokens=False))
        return text


class StopMatcher:
    """Finds stop strings in streamed text and holds back what may still become one.

    The match that is complete first wins, the longest of those that end together, so that the result does not depend
    on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that may be shown: up to the match once there is one, and nothing after it."""
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.matched = min(ends)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when the stream ends without a match."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 stands for itself, other bytes are moved to U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    moved = (byte for byte in range(256) if byte not in set(plain))
    return table | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


def byte_level_bytes(piece: str) -> bytes:
    """The bytes behind a piece of a byte-level vocabulary; an added token outside its alphabet stands for itself."""
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in piece])
    except KeyError:
        return piece.encode()


def fallback_byte(piece: str) -> int | None:
    """The byte that a SentencePiece token like `<0x0A>` stands for, or None."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return int(piece[3:5], 16)
        except ValueError:
            return None
    return None
