"""Where a base model comes from, and what it is: folder lookup and content identity. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from contextlib import ExitStack, suppress
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import msgspec

from lorikeet.adapters.safefile import SafeFile
from lorikeet.errors import ModelError
from lorikeet.model.families import load_spec, read_json
from lorikeet.model.names import checkpoint_shapes
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.types import BaseIdentity

__all__ = ["EMBEDDED", "BaseIdentity", "cache_folder", "checkpoint_files", "find_model", "identify", "weight_bytes"]

EMBEDDED = "lorikeet-nano"
_EMBEDDED_FOLDER = Path(str(resources.files("lorikeet"))) / "nano"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER = 100 * 2**20  # what safetensors itself allows


def find_model(name: str | None) -> Path:
    """The folder of a base model: the embedded one (`lorikeet-nano` or None), a local folder, or a hub id.

    A hub model is downloaded (only what is needed) into the hub's own cache. Raises ModelError.
    """
    if name is None or name == EMBEDDED:
        if not (_EMBEDDED_FOLDER / "config.json").exists():
            raise ModelError(f"the embedded base {EMBEDDED} is not in this installation", hint="name a model folder")
        return _EMBEDDED_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder}: no config.json", hint="a model folder holds config.json and safetensors")
        return folder.resolve()
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder", param="model")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # 0.3 s, and rarely needed
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{name!r} is neither a folder nor a model on the hub: {str(error).splitlines()[0]}",
            hint="private models need a token in the environment (HF_TOKEN)",
            param="model",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name!r} is not a local folder and cannot be fetched from the hub: {str(error).splitlines()[0]}",
            hint="check the network, or name a folder",
            param="model",
        ) from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or its shards. Pickled weights are refused by name."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index}: weight_map: expected a non-empty object, found {shards!r}")
        names = sorted(set(map(str, shards.values())))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index}: {name!r} is not the name of a safetensors file beside it")
            if not (folder / name).exists():
                raise ModelError(f"{folder / name}: shard named in {index.name} is missing")
        return [folder / name for name in names]
    if single.exists():
        return [single]
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{folder / pickled[0]}: pickled weights are not loaded, they can run code",
            hint="convert the checkpoint to safetensors",
            param=pickled[0],
        )
    raise ModelError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")


def weight_bytes(folder: Path) -> int:
    """Of a base once it is loaded, about: as it is stored, and two a number where it is stored in fewer."""
    numbers = sum(map(math.prod, checkpoint_shapes(load_spec(folder)).values()))
    return max(sum(path.stat().st_size for path in checkpoint_files(folder)), 2 * numbers)


def cache_folder() -> Path:
    """Where derived files live: $LORIKEET_CACHE, else ~/.cache/lorikeet. Safe to delete."""
    return Path(os.environ.get("LORIKEET_CACHE") or "~/.cache/lorikeet").expanduser()


def identify(folder: Path, name: str | None = None) -> BaseIdentity:
    """What the base in `folder` is, by content.

    `sha256` covers the sorted (name, dtype, shape, bytes) of all tensors and the fields of the spec that change the
    forward pass. It is remembered in the cache folder under the files' paths, sizes and times.
    """
    tokenizer = Tokenizer(folder)
    return BaseIdentity(
        name=name or (EMBEDDED if folder == _EMBEDDED_FOLDER else folder.name),
        sha256=_weights_sha256(folder),
        tokenizer_sha256=tokenizer.sha256,
        stop_ids=tokenizer.stop_ids,
    )


def _weights_sha256(folder: Path) -> str:
    files = checkpoint_files(folder)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    fields = {k: v for k, v in asdict(load_spec(folder)).items() if k not in ("max_context", "bos_id", "eos_ids")}
    spec = json.dumps(fields, sort_keys=True).encode()
    key = hashlib.sha256(msgspec.msgpack.encode([1, stats]) + spec).hexdigest()
    remembered = cache_folder() / "identity" / key
    try:
        return remembered.read_text("ascii")
    except OSError:
        digest = _hash_tensors(files, spec)
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        remembered.parent.mkdir(parents=True, exist_ok=True)
        fresh = remembered.with_name(f"{key}.{os.getpid()}")
        fresh.write_text(digest, "ascii")
        fresh.replace(remembered)
    return digest


def _hash_tensors(files: list[Path], spec: bytes) -> str:
    digest = hashlib.sha256(spec)
    with ExitStack() as stack:
        opened = [stack.enter_context(SafeFile(path, error=ModelError, max_header=_MAX_HEADER)) for path in files]
        places = {name: (file, data) for file in opened for data in [file.map()] for name in file.entries}
        for name, (file, data) in sorted(places.items()):
            entry = file.entries[name]
            digest.update(msgspec.msgpack.encode([name, entry.dtype, list(entry.shape)]))
            digest.update(data[entry.start : entry.stop])
    return digest.hexdigest()
