"""Fine-tuning configs as recipes, and rows of datasets by the SDK's conventions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.config import JobRecipe, job_adapter, read_fields
from lorikeet.errors import DataError, UnsupportedFieldError
from lorikeet.registry.records import Dataset, Split
from lorikeet.server.predibase.config import SCHEDULES, TARGETS, parse_config, recipe_of
from lorikeet.server.predibase.datasets import shaped

FILES = {"train": "train.jsonl", "validation": "validation.jsonl"}


def dataset(*columns: str, rows: int = 20, validation: int = 4) -> Dataset:
    counts = {"train": rows, "validation": validation}
    splits = {s: Split(file=FILES[s], sha256="0" * 64, rows=n, bytes=1) for s, n in counts.items() if n}
    return Dataset(
        id="d", tenant_id="t", name="rows", description="", sha256="0" * 64, format="jsonl",
        columns=dict.fromkeys(columns or ("prompt", "completion"), "text"), splits=splits, rows=rows, bytes=1,
        created=0.0, created_by="x", deleted=None, collected=None,
    )  # fmt: skip


def translated(config: dict[str, Any], data: Dataset | None = None, **more: Any) -> dict[str, Any]:
    return recipe_of(parse_config(config), data or dataset(), **more)


def one_of(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


configs = st.fixed_dictionaries(
    {},
    optional={
        "base_model": one_of(st.just("lorikeet-nano")),
        "adapter": one_of(st.just("lora")),
        "task": one_of(st.just("sft")),
        "epochs": one_of(st.integers(1, 100) | st.floats(0.1, 10)),
        "train_steps": one_of(st.integers(1, 10_000)),
        "learning_rate": one_of(st.floats(1e-6, 1e-1)),
        "rank": one_of(st.integers(1, 256)),
        "target_modules": one_of(st.lists(st.sampled_from(sorted(TARGETS)), min_size=1)),
        "enable_early_stopping": one_of(st.booleans()),
        "apply_chat_template": one_of(st.booleans()),
        "lora_alpha": one_of(st.integers(1, 512)),
        "lora_dropout": one_of(st.floats(0, 0.9)),
        "effective_batch_size": one_of(st.integers(1, 512)),
        "lr_scheduler": one_of(st.fixed_dictionaries({"type": st.sampled_from(sorted(set(SCHEDULES) - {"constant"}))})),
        "warmup_ratio": one_of(st.floats(0, 1)),
        "optimizer": st.just({"type": "adamw_torch", "params": {"weight_decay": 0.01}}),
    },
)


@given(configs, st.integers(1, 3000), st.booleans())
def test_every_config_that_is_taken_is_a_recipe(config: dict[str, Any], rows: int, continued: bool) -> None:
    """Nothing is left for the queue or the job to object to, and every field that was given shows in the recipe."""
    recipe = translated(config, dataset(rows=rows), continued=continued)
    adapter = job_adapter(read_fields(recipe, JobRecipe, "recipe"), "x", FILES)
    given = {name: value for name, value in config.items() if value is not None}
    same = {"learning_rate": "learning_rate", "rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
            "warmup_ratio": "warmup", "effective_batch_size": "batch_rows"}  # fmt: skip
    for theirs, ours in same.items():
        if theirs in given:
            assert getattr(adapter, ours) == given[theirs]
    if "lora_alpha" not in given and not continued:
        assert adapter.alpha == 2 * given.get("rank", 16)
    assert (adapter.early_stopping is not None) == bool(given.get("enable_early_stopping"))
    assert (adapter.messages is not None) == bool(given.get("apply_chat_template"))
    if "train_steps" in given:  # as the trainer counts
        assert adapter.batch_rows is not None and adapter.epochs is not None
        steps = max(1, math.ceil(adapter.epochs * -(-rows // adapter.batch_rows)))
        assert steps == given["train_steps"]
    elif "epochs" in given:
        assert adapter.epochs == given["epochs"]


def test_what_is_left_out_is_as_in_every_recipe() -> None:
    assert translated({}) == {"prompt": "{prompt}", "completion": "{completion}", "rank": 16, "alpha": 32}
    assert set(translated({}, continued=True)) == {"prompt", "completion"}
    assert translated({"lr_scheduler": {"type": "constant"}})["warmup"] == 0.0


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"colour": 1}, "colour"),
        ({"adapter": "dora"}, "adapter"),
        ({"task": "continued_pretraining"}, "task"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"rank": "16"}, "rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["lm_head"]}, "target_modules.0"),
        ({"lr_scheduler": {"type": "polynomial"}}, "lr_scheduler.type"),
        ({"lr_scheduler": {"type": "cosine", "params": {"power": 2}}}, "lr_scheduler.params.power"),
        ({"lr_scheduler": {"type": "cosine_with_restarts", "params": {"num_cycles": 3}}},
         "lr_scheduler.params.num_cycles"),
        ({"lr_scheduler": {"name": "cosine"}}, "lr_scheduler"),
        ({"lr_scheduler": {"type": "constant"}, "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"optimizer": {"type": "sgd"}}, "optimizer.type"),
        ({"optimizer": {"type": "adamw", "params": {"betas": [0.9, 0.99]}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "adamw", "params": {"weight_decay": -1}}}, "optimizer.params.weight_decay"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(config: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedFieldError) as raised:
        translated(config)
    assert raised.value.param is not None and raised.value.param.startswith(field)


def test_columns_decide_what_is_learned() -> None:
    assert translated({}, dataset("system", "user", "assistant"))["messages"] == [
        {"role": role, "content": f"{{{role}}}"} for role in ("system", "user", "assistant")
    ]
    assert translated({"task": "classification"}, dataset("text", "label"))["completion"] == " {label}"
    for config, columns, field in (
        ({}, ("text", "label"), "dataset"),
        ({"task": "classification"}, ("prompt", "completion"), "dataset"),
        ({"apply_chat_template": False}, ("user", "assistant"), "apply_chat_template"),
        ({"enable_early_stopping": True}, (), "enable_early_stopping"),
    ):
        with pytest.raises(UnsupportedFieldError) as raised:
            translated(config, dataset(*columns, validation=0))
        assert raised.value.param == field


# --- rows ---------------------------------------------------------------------------------------------------------

names = {"train": "train", "evaluation": "validation", "validation": "validation", "test": "test"}


@given(st.lists(st.tuples(st.sampled_from(sorted(names)), st.integers()), min_size=1, max_size=30))
def test_rows_go_to_their_splits_in_order(listed: list[tuple[str, int]]) -> None:
    rows = [{"split": split, "value": value} for split, value in listed]
    expected: dict[str, list[dict[str, Any]]] = {}
    for split, value in listed:
        expected.setdefault(names[split], []).append({"value": value})
    if "train" not in expected:
        with pytest.raises(DataError, match="no row .* 'train'"):
            shaped(rows)
    else:
        assert shaped(rows) == expected


def test_rows_without_conventions_stay_as_they_are() -> None:
    assert shaped([{"a": 1}, {"a": 2}]) is None


say = st.text(max_size=20)


@given(st.lists(st.tuples(say, say, st.none() | say), min_size=1, max_size=8))
def test_conversations_become_columns(listed: list[tuple[str, str, str | None]]) -> None:
    rows, expected = [], []
    for user, assistant, system in listed:
        turns = {"user": user, "assistant": assistant} if system is None else {
            "system": system, "user": user, "assistant": assistant}  # fmt: skip
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns.items()], "id": 1})
        expected.append({"id": 1, **turns})
    assert shaped(rows) == {"train": expected}


@pytest.mark.parametrize(
    "messages",
    [
        None, "text", [], [{"role": "user", "content": "a"}], [{"role": "user"}, {"role": "assistant"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
        [{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "b"}],
    ],
)  # fmt: skip
def test_other_conversations_are_refused(messages: Any) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="row 2: messages: expected user, assistant"):
        shaped([{"messages": good}, {"messages": messages}])


@pytest.mark.parametrize("value", ["dev", None, 1, ["train"]])
def test_other_splits_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match="row 1: split: expected train, evaluation"):
        shaped([{"split": value, "a": 1}])
