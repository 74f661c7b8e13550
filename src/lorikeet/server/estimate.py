"""What a training job needs: an estimate of its memory, made before it is queued."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorikeet.config import AdapterRecipe
from lorikeet.model.sources import weight_bytes
from lorikeet.model.spec import ModelSpec
from lorikeet.types import ROLES

STEP_TOKENS = 8192  # of one forward pass of a job, as `job.training` has it
RUNTIME = 700 * 2**20  # bytes: interpreter, libraries, compiled kernels
PER_PARAMETER = 20  # bytes: master weight, gradient, two moments, the copies that kernels multiply with
JOINED_TOKENS = 512  # of a batch below which jobs are joined: measured, benchmarks/joining_jobs.py
CHARACTERS = 3.5  # of a token of English text, about


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `shared` is there once, however many jobs run as one; `own` is each job's."""

    shared: int
    own: int

    @property
    def total(self) -> int:
        return self.shared + self.own


def batch_tokens(rows: int, size: int, batch_rows: int) -> float:
    """Tokens of a batch, about; `rows` and `size` (bytes) are those of the training split."""
    return batch_rows * (size / max(rows, 1)) / CHARACTERS


def training_memory(folder: Path, spec: ModelSpec, recipe: AdapterRecipe, rows: int, size: int) -> Memory:
    """Of one adapter of a resolved recipe on the base in `folder`; `rows` and `size` as in `batch_tokens`.

    Kept for the backward pass, of each token and layer: eight vectors of the hidden size, four of the inner sizes; and
    logits. Measured on the embedded base: 95 kB a token in bf16, where this says 224 kB (it counts fp32).
    """
    assert recipe.rank is not None and recipe.batch_rows is not None
    roles = ROLES if recipe.targets in (None, "all-linear") else tuple(recipe.targets or ())
    sites = [site for site in spec.sites if site.role in roles]
    parameters = recipe.rank * sum(site.d_in + site.d_out for site in sites)
    base = weight_bytes(folder)
    kept = spec.num_layers * (8 * spec.hidden_size + 4 * spec.intermediate_size + 4 * spec.q_size) + 2 * spec.vocab_size
    tokens = min(STEP_TOKENS, batch_tokens(rows, size, recipe.batch_rows))
    return Memory(shared=RUNTIME + 2 * base, own=parameters * PER_PARAMETER + int(tokens * kept * 4))


def gains_from_company(rows: int, size: int, batch_rows: int) -> bool:
    """Whether a training gains from sharing its forward passes with others, see docs/jobs.md."""
    return batch_tokens(rows, size, batch_rows) < JOINED_TOKENS
