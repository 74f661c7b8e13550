"""Every field of the installed peft's configs is classified; what is not handled is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorikeet.adapters.configs import read_config
from lorikeet.adapters.fields import KINDS, REFUSED_KINDS
from lorikeet.errors import AdapterError


def write(folder: Path, **fields: Any) -> Path:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"LOREFT"}))  # which is not peft's
def test_every_field_of_peft_is_classified_once(kind: str) -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    fields, ours = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}, KINDS[kind]
    assert fields - ours.handled - ours.irrelevant - ours.refused.keys() == set()
    assert not ours.handled & ours.irrelevant and not (ours.handled | ours.irrelevant) & ours.refused.keys()


def test_every_kind_of_peft_is_handled_or_refused() -> None:
    from peft import PeftType

    assert {kind.value for kind in PeftType} <= KINDS.keys() | REFUSED_KINDS.keys()
    assert not KINDS.keys() & REFUSED_KINDS.keys()


VALUES: dict[str, Any] = {
    "ensure_weight_tying": True,
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 2]],
    "modules_to_save": ["lm_head"],
    "target_parameters": ["experts.w"],
    "trainable_token_indices": [5],
    "use_qalora": True,
}


@pytest.mark.parametrize("name", sorted(KINDS["LORA"].refused))
def test_refused_fields_are_named_with_what_was_found(name: str, tmp_path: Path) -> None:
    value = VALUES.get(name, {"anything": 1})
    with pytest.raises(AdapterError, match=f"adapter_config.json: {name}: expected") as caught:
        read_config(write(tmp_path, **{name: value}))
    assert str(value) in caught.value.message and caught.value.hint
    assert caught.value.status == 422 and caught.value.param == name
    for neutral in (None, *KINDS["LORA"].refused[name][0]):
        read_config(write(tmp_path, **{name: neutral}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "BOFT"}, "peft_type: expected 'LORA' or 'IA3' or 'VERA' or 'LOREFT', found 'BOFT'"),
        ({"peft_type": None}, "peft_type: expected 'LORA' or 'IA3' or 'VERA' or 'LOREFT', found 'None'"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected 'CAUSAL_LM', found 'SEQ_CLS'"),
        ({"use_newest_thing": True}, "use_newest_thing: expected no such field, found 'True'"),
        ({"use_newest_thing": 0}, "use_newest_thing: expected no such field"),
    ],
)
def test_kinds_and_fields_that_are_not_known(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        read_config(write(tmp_path, **fields))


def test_loftq_counts_where_it_is_not_converted_yet(tmp_path: Path) -> None:
    said = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    read_config(write(tmp_path, init_lora_weights=True, **said))
    with pytest.raises(AdapterError, match="init_lora_weights: expected .* found 'loftq'"):
        read_config(write(tmp_path, init_lora_weights="loftq", **said))


def test_unknown_fields_that_are_off_are_accepted(tmp_path: Path) -> None:
    read_config(write(tmp_path, use_newest_thing=False, newest_config=None, newest_list=[], newest_table={}))
