"""Checkpoints whose unit is one adapter: a job resumes in any grouping, with the losses it would have had."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorikeet.config import AdapterRecipe
from lorikeet.errors import ConfigError
from lorikeet.train.adapter_run import AdapterRun, Progress

FOLDER = "checkpoints"  # below a run's output


def fingerprint(recipe: AdapterRecipe, base_sha256: str, data_sha256: str, dtype: str) -> str:
    """What a checkpoint must agree in to be gone on with: settings, base, data and dtype."""
    settings = msgspec.json.encode([recipe, base_sha256, data_sha256, dtype], order="sorted")
    return hashlib.sha256(settings).hexdigest()


def path_of(output: Path, name: str) -> Path:
    return output / FOLDER / f"{name}.safetensors"


def save(run: AdapterRun, path: Path, mark: str) -> None:
    """Write weights, optimizer moments and clock; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"fingerprint": mark, "progress": msgspec.json.encode(run.progress).decode()}
    save_file(run.state(), fresh, metadata)
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def restore(run: AdapterRun, path: Path, mark: str) -> bool:
    """Bring `run` to where the checkpoint was written; False where there is none.

    Raises ConfigError for a checkpoint of other settings, data or base, or one that cannot be read.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        progress = msgspec.json.decode(metadata["progress"], type=Progress)
    except (SafetensorError, KeyError, msgspec.DecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a readable checkpoint: {error}", hint="delete it, or train afresh") from error
    if metadata.get("fingerprint") != mark:
        raise ConfigError(
            f"{path}: made with other settings, data or base than the recipe now has for {run.name!r}",
            hint="undo the change, or train afresh without --resume",
        )
    run.restore(tensors, progress)
    return True
