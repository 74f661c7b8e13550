"""PEFT directories read and written, content hashes, lock files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures import oracle, sample_tokens

from lorikeet.adapters.configs import CONFIG, LoraConfig
from lorikeet.adapters.files import (
    LOCK,
    WEIGHTS,
    AdapterFile,
    Lock,
    LockedBase,
    LockedTemplate,
    check_lock,
    read_lock,
    write_lock,
    write_peft,
)
from lorikeet.errors import AdapterError, LockMismatchError
from lorikeet.types import BaseIdentity

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(adapters: Callable[..., list[Path]], tmp_path: Path) -> Path:
    """A copy of an adapter of rank 2 on q_proj and v_proj, to be damaged."""
    return Path(shutil.copytree(adapters("llama", 2)[1], tmp_path / "adapter"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def digest(folder: Path) -> str:
    with AdapterFile(folder) as file:
        return file.load()[1]


def test_tensors_are_those_of_the_file(folder: Path) -> None:
    with AdapterFile(folder) as file:
        tensors, _ = file.load()
    stored = load_file(folder / WEIGHTS)
    assert len(tensors) == len(stored) == 12
    for (module, side), values in tensors.items():
        np.testing.assert_array_equal(values, stored[f"base_model.model.{module}.lora_{side}.weight"].numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_are_widened(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    with AdapterFile(folder) as file:
        tensors, _ = file.load()
    stored = load_file(folder / WEIGHTS)[f"base_model.model.{Q0}.lora_A.weight"]
    np.testing.assert_array_equal(tensors[Q0, "A"], stored.float().numpy())


def test_the_hash_is_the_content(folder: Path) -> None:
    before = digest(folder)
    config = json.loads((folder / CONFIG).read_text())
    # spelling: key prefix, `.default`, irrelevant fields, a pattern that says what r says already
    rewrite(folder, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    assert digest(folder) == before
    rewrite(folder, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    assert digest(folder) == before
    edited = config | {"lora_dropout": 0.1, "rank_pattern": {"q_proj": 2}, "base_model_name_or_path": "elsewhere"}
    (folder / CONFIG).write_text(json.dumps(edited))
    assert digest(folder) == before
    # meaning: scale, values, dtype
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 9}))
    assert digest(folder) != before
    (folder / CONFIG).write_text(json.dumps(config))
    rewrite(folder, lambda t: {k: v.bfloat16() for k, v in t.items()})
    halved = digest(folder)
    rewrite(folder, lambda t: {k: v.float() for k, v in t.items()})
    assert len({before, halved, digest(folder)}) == 3


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("base_model.model.prompt_embeddings", torch.ones(2, 9), "prompt_embeddings' is not supported"),
        ("../../etc/passwd.lora_A.weight", torch.ones(2, 64), "not supported"),
        ("model.x.lora_A.weight", torch.ones(2, 64, dtype=torch.int32), "expected F32 or BF16 .*, found I32"),
        ("model.x.lora_A.weight", torch.ones(2), r"expected two dimensions, found \[2\]"),
    ],
)
def test_foreign_tensors_are_named(key: str, value: torch.Tensor, message: str, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {key: value})
    with pytest.raises(AdapterError, match=message):
        AdapterFile(folder)


def test_a_tensor_under_two_names_is_one(folder: Path) -> None:
    """As PEFT writes some; with two values it would not be known which is meant."""
    before = digest(folder)
    name = f"base_model.model.{Q0}.lora_A"
    rewrite(folder, lambda tensors: tensors | {f"{name}.default.weight": tensors[f"{name}.weight"].clone()})
    assert digest(folder) == before
    rewrite(folder, lambda tensors: tensors | {f"{name}.default.weight": tensors[f"{name}.weight"] + 1})
    with (
        AdapterFile(folder) as file,
        pytest.raises(AdapterError, match=r"lora_A\.weight is there twice, with different"),
    ):
        file.load()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(bad: float, folder: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"base_model.model.{Q0}.lora_B.weight"][3, 1] = bad
        return tensors

    rewrite(folder, poison)
    with (
        AdapterFile(folder) as file,
        pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight: 1 of 128 values are NaN or"),
    ):
        file.load()


def test_pickled_weights_are_refused_by_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin: pickled weights are not loaded"):
        AdapterFile(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        AdapterFile(folder)


def test_what_is_written_loads_in_peft(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    config = LoraConfig(
        r=3, alpha=6, use_rslora=True, target_modules=("down_proj", "q_proj"), rank_pattern={"down_proj": 5}
    )
    pairs = {}
    for layer in range(3):
        for module, rank, d_in, d_out in (("self_attn.q_proj", 3, 64, 64), ("mlp.down_proj", 5, 112, 64)):
            a, b = rng.normal(size=(rank, d_in)), rng.normal(size=(rank, d_out))
            pairs[f"model.layers.{layer}.{module}"] = (a.astype(np.float32), b.astype(np.float32))
    target = tmp_path / "made" / "x"
    first = write_peft(target, config, pairs, base_name="tiny", files={"note.txt": b"hello"})
    with AdapterFile(target) as file:
        assert file.config == config
        tensors, loaded = file.load()
    assert first == loaded
    for module, (a, b) in pairs.items():
        np.testing.assert_array_equal(tensors[module, "A"], a)
        np.testing.assert_array_equal(tensors[module, "B"], b.T)

    base = checkpoint("llama")
    model = oracle(base, target)
    weights = model.state_dict()
    for module, (a, b) in pairs.items():
        inner = f"base_model.model.{module}"
        np.testing.assert_array_equal(weights[f"{inner}.lora_A.default.weight"].numpy(), a)
        np.testing.assert_array_equal(weights[f"{inner}.lora_B.default.weight"].numpy(), b.T)
    assert not torch.equal(model(sample_tokens(1, 8)).logits, oracle(base)(sample_tokens(1, 8)).logits)

    write_peft(target, config, {k: (2 * a, b) for k, (a, b) in pairs.items()}, base_name="tiny")
    assert digest(target) != first
    assert sorted(path.name for path in target.parent.iterdir()) == ["x"]  # nothing temporary is left
    assert sorted(path.name for path in target.iterdir()) == [CONFIG, WEIGHTS]


def test_what_nobody_could_load_is_not_written(folder: Path) -> None:
    before = digest(folder)
    broken = np.full((1, 64), np.nan, np.float32)
    config = LoraConfig(r=1, alpha=1, target_modules=("q_proj",))
    with pytest.raises(AdapterError, match=r"q_proj.lora_A.weight: 64 of 64 values are NaN"):
        write_peft(folder, config, {"model.layers.0.self_attn.q_proj": (broken, broken)}, base_name="tiny")
    assert digest(folder) == before


def test_a_failed_write_leaves_the_old_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(folder)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorikeet.adapters.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_peft(folder, LoraConfig(r=1, alpha=1, target_modules=("q_proj",)), {}, base_name="tiny")
    assert digest(folder) == before


BASE = BaseIdentity(name="tiny", sha256="b" * 64, tokenizer_sha256="c" * 64, stop_ids=(1, 2))
LOCKED = Lock(
    base=LockedBase("tiny", "b" * 64),
    tokenizer_sha256="c" * 64,
    stop_ids=(2, 1),
    template=LockedTemplate.of("prompt", "Customer: {text}\nIntent:"),
    recipe_sha256="d" * 64,
    data_sha256="e" * 64,
    code_version="0.1.0",
)


def test_locks_go_round(tmp_path: Path) -> None:
    assert read_lock(tmp_path) is None
    write_lock(tmp_path, LOCKED)
    assert read_lock(tmp_path) == LOCKED
    assert json.loads((tmp_path / LOCK).read_text())["version"] == 1
    check_lock(LOCKED, BASE)


@pytest.mark.parametrize(
    ("base", "message", "hint"),
    [
        ({"sha256": "0" * 64, "name": "other"}, "another base$", "base: trained on tiny .* serving other"),
        ({"tokenizer_sha256": "0" * 64}, "another tokenizer$", "tokenizer: cccc"),
        ({"stop_ids": (1,)}, "another stop ids$", r"stop ids: \[1, 2\] then, \[1\] now"),
        ({"sha256": "0" * 64, "stop_ids": ()}, "another base and stop ids$", "base: .*; stop ids: "),
    ],
)
def test_a_mismatch_names_what_differs(base: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(LockMismatchError) as caught:
        check_lock(LOCKED, msgspec.structs.replace(BASE, **base))
    assert caught.value.status == 409
    assert re.search(message, caught.value.message)
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"\$\.version"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"stop_ids": "1"}, r"\$\.stop_ids"),
        ({"template": {"kind": "prompt", "text": "edited", "sha256": "0" * 64}}, "template.sha256 is not that"),
    ],
)
def test_broken_locks(change: dict[str, object], message: str, tmp_path: Path) -> None:
    content = json.loads(msgspec.json.encode(LOCKED)) | change
    (tmp_path / LOCK).write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=message):
        read_lock(tmp_path)
