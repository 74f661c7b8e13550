"""One adapter on its way from a recipe to a PEFT folder: its data, its run, its checkpoint, its lock."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from lorikeet import __version__
from lorikeet.adapters.configs import LoraConfig
from lorikeet.adapters.files import AdapterFile, Lock, LockedBase, LockedTemplate, write_peft
from lorikeet.config import AdapterRecipe
from lorikeet.errors import ConfigError
from lorikeet.model.names import MODULES, module_of
from lorikeet.model.spec import ModelSpec
from lorikeet.train import checkpoint
from lorikeet.train.adapter_run import AdapterRun
from lorikeet.train.audit import AdapterData
from lorikeet.train.dataset import digest
from lorikeet.types import BaseIdentity


@dataclass(slots=True)
class Trainee:
    """`mark` is what a checkpoint must agree in, `data_sha256` that of the tokens it learns from."""

    recipe: AdapterRecipe
    data: AdapterData
    run: AdapterRun
    base: BaseIdentity
    mark: str
    data_sha256: str

    @property
    def failed(self) -> bool:
        return self.run.progress.stopped == "not finite"

    def restore(self, path: Path) -> bool:
        """As `checkpoint.restore`."""
        return checkpoint.restore(self.run, path, self.mark)

    def save(self, path: Path) -> None:
        checkpoint.save(self.run, path, self.mark)

    @property
    def recipe_sha256(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self.recipe, order="sorted")).hexdigest()

    def lock(self) -> Lock:
        base = self.base
        return Lock(
            base=LockedBase(base.name, base.sha256),
            tokenizer_sha256=base.tokenizer_sha256,
            stop_ids=base.stop_ids,
            template=LockedTemplate.of(
                "chat" if self.data.template_kind == "chat" else "prompt", self.data.template_text
            ),
            recipe_sha256=self.recipe_sha256,
            data_sha256=self.data_sha256,
            code_version=__version__,
        )

    def write(self, folder: Path) -> str:
        """A PEFT folder with its lock, of the weights as they are now; its content hash. Raises `AdapterError`."""
        settings = self.run.settings
        config = LoraConfig(
            r=settings.rank,
            alpha=settings.alpha,
            use_rslora=settings.rslora,
            target_modules=tuple(MODULES[role].rsplit(".", 1)[1] for role in settings.roles),
        )
        pairs = {module_of(site): (a.numpy(), b.numpy()) for site, a, b in self.run.parameters.named_pairs()}
        return write_peft(folder, config, pairs, base_name=self.base.name, lock=self.lock())


def make_trainee(
    recipe: AdapterRecipe,
    data: AdapterData,
    spec: ModelSpec,
    base: BaseIdentity,
    dtype: torch.dtype,
    *,
    origin: Path | None = None,
) -> Trainee:
    """`recipe` is resolved. With `origin` (a PEFT folder) training goes on from its weights, else from zero.

    Raises ConfigError where the origin's shape is not the recipe's.
    """
    run = AdapterRun(recipe, spec, data.train, data.validation, compute_dtype=dtype)
    data_sha256 = digest(data.train, data.validation)
    identity = base.sha256
    if origin is not None:
        identity += start_from(run, origin)
    mark = checkpoint.fingerprint(recipe, identity, data_sha256, str(dtype))
    return Trainee(recipe, data, run, base, mark, data_sha256)


def start_from(run: AdapterRun, folder: Path) -> str:
    """Give `run` the weights of a LoRA adapter of the same rank, scale and targets; the adapter's content hash."""
    with AdapterFile(folder) as file:
        config = file.config
        tensors, sha256 = file.load()
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"training goes on from LoRA adapters only, found {config.kind}", param="parent")
    wanted: dict[tuple[str, str], torch.Tensor] = {}
    for site, a, b in run.parameters.named_pairs():
        module = module_of(site)
        wanted[module, "A"], wanted[module, "B"] = a, b.T
        if config.scale_of(module) != run.settings.scale:
            raise ConfigError(
                f"alpha: the adapter to go on from scales {module} by {config.scale_of(module):g}, the recipe by "
                f"{run.settings.scale:g}", hint="use the same rank, alpha and rslora", param="alpha",
            )  # fmt: skip
    found = {(module, str(part)): values for (module, part), values in tensors.items()}
    if found.keys() != wanted.keys():
        different = sorted(".".join(key) for key in found.keys() ^ wanted.keys())
        raise ConfigError(
            f"targets: the adapter to go on from has other tensors than the recipe trains: {', '.join(different[:3])}",
            hint="use the same targets", param="targets",
        )  # fmt: skip
    for key, values in found.items():
        if values.shape != tuple(wanted[key].shape):
            raise ConfigError(
                f"rank: {'.'.join(key)} of the adapter to go on from is {list(values.shape)}, the recipe trains "
                f"{list(wanted[key].shape)}", hint="use the same rank", param="rank",
            )  # fmt: skip
        wanted[key].copy_(torch.from_numpy(np.array(values)))
    run.parameters.refresh()
    return sha256
