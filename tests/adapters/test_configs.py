"""What an adapter_config.json says, and values in it that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.test_fields import write

from lorikeet.adapters.configs import CONFIG, LoraConfig, peft_fields, read_config
from lorikeet.errors import AdapterError


def test_the_defaults_of_peft_are_accepted(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig

    PeftConfig(r=3, lora_alpha=7, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    config = read_config(tmp_path)
    assert (config.r, config.alpha, config.target_modules) == (3, 7.0, ("q_proj",))


def test_what_is_written_is_read_again_here_and_by_peft(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig

    config = LoraConfig(
        r=3,
        alpha=6.5,
        use_rslora=True,
        target_modules=("down_proj", "q_proj"),
        exclude_modules=("model.layers.1.mlp.down_proj",),
        layers_to_transform=(0, 2),
        layers_pattern=("layers",),
        rank_pattern={"down_proj": 5},
        alpha_pattern={"q_proj": 2.5},
    )
    (tmp_path / CONFIG).write_text(json.dumps(peft_fields(config, "tiny")))
    assert read_config(tmp_path) == config
    theirs = PeftConfig.from_pretrained(str(tmp_path))
    assert (theirs.r, theirs.lora_alpha, theirs.rank_pattern) == (3, 6.5, {"down_proj": 5})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r: expected a positive integer, found '0'"),
        ({"r": True}, "r: expected a positive integer"),
        ({"r": 4.0}, "r: expected a positive integer"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\.q_proj: expected a positive integer"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected an object"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: expected a regular expression"),
        ({"target_modules": None}, "target_modules: expected a list of module names"),
        ({"target_modules": []}, "target_modules: expected at least one module"),
        ({"target_modules": "*"}, "target_modules: expected a regular expression"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "layers_to_transform: expected null"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform: expected a list of layer numbers"),
    ],
)
def test_values_that_cannot_be(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        read_config(write(tmp_path, **fields))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"r": 1, "r": 2}', "duplicate name 'r'"),
        ("[" * 100_000, "cannot be read as JSON"),
        (" " * (2**20 + 1), "1048577 bytes, expected at most"),
    ],
)
def test_broken_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(AdapterError, match=message):
        read_config(tmp_path)


def test_a_missing_config_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="adapter_config.json is missing"):
        read_config(tmp_path)
