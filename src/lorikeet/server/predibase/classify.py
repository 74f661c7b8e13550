"""Classification with an adapter that was trained to complete a text with its label.

The probability of a label is that of its tokens, and of the end after them, among all labels of the training data.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorikeet.errors import InvalidRequestError
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.records import Actor
from lorikeet.server.auth import Principal
from lorikeet.server.generation import Job, check_length, complete_all
from lorikeet.server.models import ServedModel
from lorikeet.server.platform import Platform
from lorikeet.server.predibase import records
from lorikeet.server.predibase.config import CLASSIFICATION
from lorikeet.server.state import ServerState
from lorikeet.template import Template
from lorikeet.types import SamplingParams

MAX_LABELS = 1000
_COMPLETION = Template(CLASSIFICATION["completion"], "completion")


@dataclass(frozen=True)
class Classified:
    """`probabilities` are in the order of the labels."""

    label: str
    probabilities: list[float]

    def described(self, index: int) -> dict[str, Any]:
        probs = self.probabilities
        return {"index": index, "label": self.label, "probs": probs, "num_classes": len(probs)}


async def classify(
    state: ServerState, platform: Platform, caller: Principal, reference: str | None, texts: Sequence[str]
) -> list[Classified]:
    """The most likely label of each text. Raises `InvalidRequestError` for an adapter that was not trained for it."""
    labels = await platform.run(labels_of, platform.catalog, caller.actor, reference)
    model = await state.models.get(reference, who=caller.actor)
    tokenizer = model.tokenizer
    ends = [tokenizer.eos_id] if tokenizer.eos_id is not None else list(tokenizer.stop_ids[:1])
    tails = [tokenizer.encode(_COMPLETION.render({"label": one}), add_special_tokens=False) + ends for one in labels]
    longest = max(tails, key=len)
    found = []
    for text in texts:
        head = await model.encode(model.render_columns({"text": text}))
        check_length([*head, *longest], 0, state.info.max_context, "input", "input")
        scores = await _scores(state, model, caller, head, tails)
        found.append(_best(labels, scores))
    return found


async def _scores(
    state: ServerState, model: ServedModel, caller: Principal, head: list[int], tails: Sequence[list[int]]
) -> list[float]:
    """The log probability of each tail behind the head. They share the head's keys and values, once it is computed."""
    call = uuid.uuid4().hex
    sampling = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, seed=0)
    jobs = [
        Job(request_id=f"classify-{call}-{i}", model=model, tokens=[*head, *tail], sampling=sampling, caller=caller)
        for i, tail in enumerate(tails)
    ]
    done = await complete_all(state.engine, state.metrics, jobs[:1]) if jobs else []
    done += await complete_all(state.engine, state.metrics, jobs[1:]) if jobs[1:] else []
    return [
        sum(entry.logprob for entry in (one.prompt_logprobs or [])[len(head) :] if entry is not None) for one in done
    ]


def _best(labels: Sequence[str], scores: Sequence[float]) -> Classified:
    most = max(scores)
    weights = [math.exp(score - most) for score in scores]
    total = sum(weights)
    return Classified(labels[scores.index(most)], [weight / total for weight in weights])


def labels_of(catalog: Catalog, who: Actor, reference: str | None) -> list[str]:
    """The labels that a version was trained with, sorted. Raises `InvalidRequestError` where there are none."""
    found: list[str] | None = None
    if reference:
        version = catalog.versions.by_id(who, catalog.versions.resolve(who, reference).version_id)
        if version.job_id is not None:
            found = records.notes(catalog.jobs.get(who, version.job_id)).get("labels")
    if not found:
        raise InvalidRequestError(
            f"{reference or 'the base'} was not trained for classification, so it has no labels",
            hint="name an adapter that was trained with task 'classification'",
            param="model",
        )
    return found
