"""Finding a base, and knowing it by content."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorikeet.errors import ModelError
from lorikeet.model import sources
from lorikeet.model.sources import find_model, identify


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path, cache: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "tiny"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_is_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model(str(folder)) == find_model("tiny") == find_model("./tiny") == folder
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_model(str(tmp_path))
    for name in ("./nowhere", "/nowhere/at/all", "~/nowhere"):
        with pytest.raises(ModelError, match="no such folder"):
            find_model(name)


def test_the_embedded_base_has_its_own_name(cache: Path) -> None:
    folder = find_model(None)
    assert folder == find_model("lorikeet-nano") and identify(folder).name == "lorikeet-nano"


@pytest.mark.parametrize("kind", ["offline", "unknown"])
def test_the_hub_says_clearly_what_is_wrong(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        raise LocalEntryNotFoundError("no route\nmore") if kind == "offline" else HFValidationError("bad name")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    expected = "cannot be fetched from the hub: no route$" if kind == "offline" else "neither a folder nor a model"
    with pytest.raises(ModelError, match="owner/model") as caught:
        find_model("owner/model")
    assert re.search(expected, caught.value.message)
    assert asked["name"] == "owner/model" and "*.bin" not in asked["allow_patterns"]


def test_identity_is_content(folder: Path, tmp_path: Path) -> None:
    before = identify(folder)
    assert before.name == "tiny" and before.stop_ids == (1,) and identify(folder, "other").name == "other"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit(copy / "config.json", max_position_embeddings=512, transformers_version="9")
    assert identify(copy).sha256 == before.sha256
    edit(copy / "config.json", rope_theta=77.0)
    assert identify(copy).sha256 != before.sha256
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors")
    changed = identify(folder)
    assert changed.sha256 != before.sha256 and changed.tokenizer_sha256 == before.tokenizer_sha256


def test_sharding_does_not_change_the_identity(folder: Path, tmp_path: Path) -> None:
    before = identify(folder).sha256
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    assert identify(folder).sha256 == before


def test_the_hash_is_remembered_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    hash_tensors = sources._hash_tensors
    monkeypatch.setattr(sources, "_hash_tensors", lambda *args: (runs.append(1), hash_tensors(*args))[1])
    first = identify(folder).sha256
    assert identify(folder).sha256 == first and len(runs) == 1
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert identify(folder).sha256 == first and len(runs) == 2


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("in the way")
    monkeypatch.setenv("LORIKEET_CACHE", str(folder / "file"))
    assert identify(folder).sha256 == identify(folder).sha256


def test_a_truncated_checkpoint(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        identify(folder)


def test_dtype_is_part_of_the_content(folder: Path) -> None:
    before = identify(folder).sha256
    weights = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    assert identify(folder).sha256 != before
