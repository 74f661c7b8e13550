"""What a training job needs: an estimate of its memory, made before it is queued."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorikeet.config import AdapterRecipe
from lorikeet.model.sources import checkpoint_files
from lorikeet.model.spec import ModelSpec
from lorikeet.types import ROLES

STEP_TOKENS = 8192  # of one forward pass of a job, as `job.training` has it
RUNTIME = 700 * 2**20  # bytes: interpreter, libraries, compiled kernels
PER_PARAMETER = 20  # bytes: master weight, gradient, two moments, the copies that kernels multiply with
CHARACTERS = 3.5  # of a token of English text, about


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `shared` is there once, however many jobs run as one; `own` is each job's."""

    shared: int
    own: int

    @property
    def total(self) -> int:
        return self.shared + self.own


def training_memory(folder: Path, spec: ModelSpec, recipe: AdapterRecipe) -> Memory:
    """Of one adapter of a resolved recipe on the base in `folder`."""
    assert recipe.rank is not None
    roles = ROLES if recipe.targets in (None, "all-linear") else tuple(recipe.targets or ())
    sites = [site for site in spec.sites if site.role in roles]
    parameters = recipe.rank * sum(site.d_in + site.d_out for site in sites)
    base = sum(path.stat().st_size for path in checkpoint_files(folder))
    wide = spec.hidden_size * 8 + spec.intermediate_size * 4 + spec.q_size * 4  # floats a token and layer keeps
    activations = STEP_TOKENS * (spec.num_layers * wide + 2 * spec.vocab_size) * 4
    return Memory(shared=RUNTIME + 2 * base + activations, own=parameters * PER_PARAMETER)


def fills_passes(rows: int, size: int, batch_rows: int) -> bool:
    """Whether the batches of one job alone fill forward passes: then joining it with others gains nothing.

    `rows` and `size` (bytes) are those of the training split.
    """
    return batch_rows * (size / max(rows, 1)) / CHARACTERS > STEP_TOKENS / 2
