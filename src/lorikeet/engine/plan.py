"""What scheduler and runner tell each other about a step. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorikeet.engine.request import EVERYWHERE, Stretch
from lorikeet.engine.residency import Instruction
from lorikeet.types import ErrorInfo, SamplingParams, ScheduledSequence, TokenLogprob


@dataclass(slots=True)
class SlotLoad:
    """A sequence takes a slot: its tokens so far, its blocks, its adapter's handle (-1 is the base)."""

    slot: int
    tokens: list[int]
    blocks: list[int]
    handle: int
    sampling: SamplingParams
    seed: int
    acts: tuple[Stretch, Stretch] = EVERYWHERE  # where the adapter acts


@dataclass(slots=True)
class Plan:
    """One step, for the runner: carried out in the order of the fields. Nothing is ever copied between blocks."""

    adapters: list[Instruction] = field(default_factory=list)
    loads: list[SlotLoad] = field(default_factory=list)
    blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)  # (slot, index in the sequence, blocks)
    tokens: list[tuple[int, int, list[int]]] = field(default_factory=list)  # (slot, position, tokens not sampled)
    sequences: list[ScheduledSequence] = field(default_factory=list)
    allowed: dict[int, list[int]] = field(default_factory=dict)  # slot -> the only tokens that may be sampled
    token_count: int = 0
    token_limit: int = 0
    logit_rows: int = 0


@dataclass(slots=True)
class Outcome:
    """What the runner reports of a step, by slot. A slot in `failed` has no token."""

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    failed: dict[int, ErrorInfo] = field(default_factory=dict)
    failed_adapters: dict[str, ErrorInfo] = field(default_factory=dict)
    late_adapters: set[str] = field(default_factory=set)  # of which nothing was copied yet
