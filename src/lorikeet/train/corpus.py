"""Text on disk or written by the project, tokenised once into memory-mapped files, and dealt out as rows of a mix."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lorikeet.errors import DataError
from lorikeet.train.tokenizer import END_OF_TEXT

Documents = Callable[..., Iterator[str]]  # (seed, families=weights) -> documents without end

RECORD_SEPARATOR = "\x1e"
PIECE = 4096  # characters; long records are cut at paragraphs so that a part of each source can be held out
HELD_OUT = 200  # one piece in so many
BLOCK = 512  # tokens from one drawable position to the next
PROBE = 2000  # documents whose text stands for a generator's content in the cache key
FORMAT = 1
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenised source. `tokens` and `held_out` are uint16, `starts` the positions at which documents begin."""

    name: str
    tokens: np.ndarray
    held_out: np.ndarray
    starts: np.ndarray

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise DataError(
                f"source {self.name} has {len(self.tokens)} tokens, too few for one row of {2 * BLOCK}",
                hint="give it more text or leave it out",
                param=self.name,
            )

    @property
    def blocks(self) -> int:
        """Positions that rows are drawn from."""
        return len(self.tokens) // BLOCK - 2

    def row(self, block: int, length: int) -> np.ndarray:
        """`length` tokens from a block's start; where documents are short, from the next document's beginning."""
        start = block * BLOCK
        if len(self.starts) > self.blocks:
            start = int(self.starts[np.searchsorted(self.starts, start)])
        start = min(start, len(self.tokens) - length)
        return self.tokens[start : start + length]


def read_records(path: Path) -> Iterator[str]:
    """Records of a plain or gzipped UTF-8 file, separated by U+001E; a file without one is a single record."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    for record in content.decode("utf-8").split(RECORD_SEPARATOR):
        if record.strip():
            yield record.strip()


def within(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Documents until they hold `characters` characters together."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def pieces(record: str) -> Iterator[str]:
    """Cut a long record at paragraph ends into parts of about PIECE characters; joined they are the record."""
    start = 0
    while len(record) - start > PIECE:
        cut = record.find("\n\n", start + PIECE)
        if cut < 0:
            break
        yield record[start : cut + 2]
        start = cut + 2
    if start < len(record):
        yield record[start:]


def tokenised(
    name: str, records: Callable[[], Iterable[str]], content: str, tokenizer: Tokenizer, cache: Path
) -> Corpus:
    """The corpus of `records`, from the cache where the same content was tokenised by the same tokenizer before.

    `content` is a digest of the text. Writes `NAME-KEY.{tokens,held_out,starts}.npy` by atomic rename.
    """
    key = hashlib.sha256(f"{FORMAT}:{content}:{digest(tokenizer.to_str())}".encode()).hexdigest()[:16]
    files = {part: cache / f"{name}-{key}.{part}.npy" for part in ("tokens", "held_out", "starts")}
    if not all(file.exists() for file in files.values()):
        cache.mkdir(parents=True, exist_ok=True)
        for part, array in _encode(records(), tokenizer).items():
            partial = files[part].with_suffix(".partial.npy")
            np.save(partial, array)
            os.replace(partial, files[part])
    loaded = {part: np.load(file, mmap_mode="r") for part, file in files.items()}
    return Corpus(name, loaded["tokens"], loaded["held_out"], loaded["starts"])


def _encode(records: Iterable[str], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Token streams of the pieces to train on and of those held out, END_OF_TEXT after every record."""
    if tokenizer.get_vocab_size() > 2**16:
        raise DataError("a vocabulary of more than 65,536 tokens does not fit the corpus cache", param="vocab_size")
    separator = tokenizer.token_to_id(END_OF_TEXT)
    streams: dict[bool, list[np.ndarray]] = {False: [], True: []}
    starts, position, count = [], 0, 0
    labelled = ((i == 0, piece) for record in records for i, piece in enumerate(pieces(record)))
    while group := list(islice(labelled, 1024)):
        encodings = tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
        for (first, _), encoding in zip(group, encodings, strict=True):
            held_out = count % HELD_OUT == HELD_OUT - 1
            count += 1
            ids = np.array([separator, *encoding.ids] if first else encoding.ids, dtype=np.uint16)
            if not held_out:
                if first:
                    starts.append(position + 1)
                position += len(ids)
            streams[held_out].append(ids)
    if not streams[True]:  # a source of few pieces is judged on its last one
        streams[True] = streams[False][-1:]
    joined = {held: np.concatenate(parts) for held, parts in streams.items() if parts}
    return {"tokens": joined[False], "held_out": joined[True], "starts": np.array(starts, dtype=np.int64)}


def digest(*texts: str) -> str:
    """sha256 over texts, each ended by a record separator."""
    state = hashlib.sha256()
    for text in texts:
        state.update(text.encode() + RECORD_SEPARATOR.encode())
    return state.hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def documents_digest(documents: Documents, seed: int, characters: int) -> str:
    """What a generator writes, known by its first documents: a changed generator is a changed corpus."""
    return digest(str(seed), str(characters), *islice(documents(seed), PROBE))


class Mixture:
    """Deals rows from corpora so that each keeps its share, without repeats until a corpus is used up.

    All state is `taken`, the rows dealt from each source: order comes from the seed, so resuming is exact. Whose turn
    it is comes from the multiples of the golden ratio, which are spread evenly from wherever one starts: shares that
    are changed, or a source that is added in the middle of a run, hold from the next row on and are not made up for.
    """

    def __init__(self, corpora: Sequence[Corpus], shares: Mapping[str, float], seed: int) -> None:
        self.corpora = {corpus.name: corpus for corpus in corpora}
        total = sum(shares[name] for name in self.corpora)
        self.bounds = np.cumsum([shares[name] / total for name in self.corpora])
        self.seed = seed
        self.taken = dict.fromkeys(self.corpora, 0)
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def rows(self, count: int, length: int) -> Tensor:
        """The next `count` rows of `length` tokens, int64."""
        return torch.from_numpy(np.stack([self._next(length) for _ in range(count)]).astype(np.int64))

    def _next(self, length: int) -> np.ndarray:
        turn = sum(self.taken.values()) * GOLDEN % 1
        name = list(self.corpora)[min(int(np.searchsorted(self.bounds, turn, side="right")), len(self.corpora) - 1)]
        corpus, epoch = self.corpora[name], self.taken[name] // self.corpora[name].blocks
        order = self._orders.get((name, epoch))
        if order is None:
            label = int.from_bytes(hashlib.sha256(json.dumps([self.seed, name, epoch]).encode()).digest()[:8])
            order = self._orders[name, epoch] = np.random.default_rng(label).permutation(corpus.blocks)
        block = int(order[self.taken[name] % corpus.blocks])
        self.taken[name] += 1
        return corpus.row(block, length)


def held_out_rows(corpus: Corpus, length: int, limit: int) -> Tensor:
    """At most `limit` consecutive rows [n, length + 1] of the held-out text (at least one, shorter if it must be)."""
    step = min(length, len(corpus.held_out) - 1)
    starts = range(0, min(limit, (len(corpus.held_out) - 1) // step) * step, step)
    rows = [corpus.held_out[start : start + step + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def tokenizer_texts(records: Iterable[str]) -> Iterator[str]:
    """The pieces of records, for training a tokenizer."""
    return (piece for record in records for piece in pieces(record))
