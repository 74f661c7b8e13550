"""Text that the project writes itself to pretrain the embedded base.

Every family trains one skill that books do not: copying an unseen name out of the text, everyday and customer language
with its many ways to say one thing, and formats such as JSON, SQL, tables and chats. All names are composed, so that
they can be copied but not memorised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from lorikeet.data.synthesize import commands, conversation, echo, facts, lore, passages, records, sql
from lorikeet.data.synthesize.grammar import Writer
from lorikeet.data.synthesize.lexicon import lexicon

__all__ = ["FAMILIES", "WEIGHTS", "documents"]

MIN_LENGTH, MAX_LENGTH = 50, 2000

_FAMILIES: dict[str, tuple[float, Callable[[Writer], str], str]] = {
    "copying": (1.0, records.copying, "key-value look-ups, reordered lists, logs, quotes"),
    "echo": (0.5, echo.echo, "runs of words and strings without sense, said again"),
    "respelled": (0.5, echo.respelled, "names, words and codes, said again in another notation"),
    "records": (1.0, records.records, "records in one notation, then in another, asked about, changed"),
    "tables": (0.7, records.tables, "CSV, Markdown and JSON-lines tables with questions"),
    "data_to_text": (1.0, facts.data_to_text, "facts in brackets, forms or JSON told in sentences, and back"),
    "passages": (1.2, passages.passages, "short news and stories with questions answered from the text"),
    "voice": (1.3, commands.voice, "voice commands with intent and slots in many notations"),
    "function_calls": (0.8, commands.function_calls, "tools, a request, the call as JSON"),
    "entities": (1.0, commands.entities, "sentences with their names marked: JSON, tags, BIO, lists"),
    "sql": (1.2, sql.text_to_sql, "schema, question and SQL query"),
    "paraphrases": (
        1.6,
        conversation.paraphrases,
        "several ways to say one thing, and different things that look alike",
    ),
    "intents": (1.4, conversation.intents, "messages with their topic, in many label styles"),
    "support": (1.4, conversation.support, "FAQ, dialogues, tickets, help pages, forum posts"),
    "reviews": (1.0, lore.reviews, "opinions with clear polarity"),
    "words": (0.6, lore.words, "definitions, synonyms, opposites, categories"),
    "notes": (0.5, lore.notes, "posts, diary lines and messages with names in them"),
    "sums": (0.4, lore.sums, "simple arithmetic, dates, comparisons, sequences"),
}

FAMILIES: dict[str, str] = {name: description for name, (_, _, description) in _FAMILIES.items()}
WEIGHTS: dict[str, float] = {name: weight for name, (weight, _, _) in _FAMILIES.items()}


def documents(seed: int, families: Mapping[str, float] | None = None) -> Iterator[str]:
    """Endless stream of documents of 50 to 2000 characters; the same seed and families give the same stream.

    ``families`` maps names of ``FAMILIES`` to relative weights (shares of documents, not of bytes); absent families are
    not written. None means ``WEIGHTS``. Raises ValueError for an unknown family or weights that are not positive.
    """
    weights = dict(WEIGHTS if families is None else families)
    unknown = sorted(set(weights) - set(FAMILIES))
    if unknown:
        raise ValueError(f"families: {', '.join(unknown)} unknown; expected some of {', '.join(FAMILIES)}")
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"families: weights {weights} must not be negative and their sum must be positive")
    names = sorted(name for name, weight in weights.items() if weight > 0)
    return _stream(seed, [_FAMILIES[name][1] for name in names], [weights[name] for name in names])


def _stream(seed: int, builders: list[Callable[[Writer], str]], weights: list[float]) -> Iterator[str]:
    writer = Writer(seed, lexicon())
    bounds = list(accumulate(weights))
    last = len(bounds) - 1
    while True:
        at, drawn = 0, writer.random() * bounds[-1]
        while at < last and bounds[at] <= drawn:
            at += 1
        text = builders[at](writer).strip()
        if MIN_LENGTH <= len(text) <= MAX_LENGTH:
            yield text
