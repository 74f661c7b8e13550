"""`python -m lorikeet.job.preview`: what a training would make of some rows, without starting one.

A process, because it tokenises, and because what trains loads torch, which the server does without. It reads `Asked`
as JSON from its standard input and writes `Answer` to its standard output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lorikeet.config import JobRecipe, job_adapter
from lorikeet.errors import LorikeetError
from lorikeet.job.orders import NICENESS
from lorikeet.types import ErrorInfo

if TYPE_CHECKING:
    from lorikeet.model.tokenizer import Tokenizer

SHOWN = 5  # rows


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """`folder` holds a file for each of `splits`."""

    model: str
    folder: str
    splits: dict[str, str]
    recipe: JobRecipe


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    preview: dict[str, Any] | None = None
    error: ErrorInfo | None = None


def preview(asked: Asked) -> dict[str, Any]:
    """The first rows token by token, the findings of the audit, and counts of tokens. Raises as `prepare`."""
    from lorikeet.model.sources import find_model
    from lorikeet.model.tokenizer import Tokenizer
    from lorikeet.model.weights import load_spec
    from lorikeet.train.audit import prepare

    model, folder = find_model(asked.model), Path(asked.folder)
    tokenizer = Tokenizer(model)
    adapter = job_adapter(asked.recipe, "preview", asked.splits)
    data, audit = prepare(adapter, tokenizer, load_spec(model).max_context, folder)
    findings = [("error", one) for one in audit.errors] + [("warning", one) for one in audit.warnings]
    rows = []
    for example in data.train[:SHOWN]:
        learned = {i for start, stop in example.learned for i in range(start, stop)}
        pieces = [{"text": text, "learned": i in learned} for i, text in enumerate(_texts(tokenizer, example.tokens))]
        rows.append({"line": example.line, "pieces": pieces})
    return {
        "rows": rows,
        "audit": [{"level": level, "message": said.replace(f"{folder}/", "")} for level, said in findings],
        "tokens": {
            "train_rows": audit.train, "validation_rows": audit.validation, "test_rows": audit.test,
            "tokens": audit.tokens, "learned_tokens": audit.learned_tokens, "limit": audit.limit,
            "percentiles": {str(percent): count for percent, count in audit.lengths.items()},
        },
        "labels": audit.labels,
    }  # fmt: skip


def _texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text: a character of several tokens comes with the one that completes it."""
    decoder = tokenizer.stream(skip_special_tokens=False)
    texts = [decoder.push([token]) for token in tokens]
    if texts:
        texts[-1] += decoder.finish()
    return texts


def main() -> None:
    os.nice(NICENESS)
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    try:
        answer = Answer(preview=preview(asked))
    except LorikeetError as error:
        answer = Answer(error=error.without(Path(asked.folder)).info())
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
