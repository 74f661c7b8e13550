from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.config import (
    DEFAULTS,
    EvalRecipe,
    JobRecipe,
    TrainRecipe,
    chosen,
    load_yaml,
    parse_size,
    read_fields,
    read_recipe,
    resolve_adapters,
    resolve_tasks,
)
from lorikeet.errors import ConfigError

ADAPTER = {"name": "intent", "data": {"train": "t.jsonl"}, "prompt": "{text}", "completion": " {label}"}


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "base": "lorikeet-nano", "output": "runs/x", **fields}))
    return path


def train(folder: Path, **adapter: Any) -> TrainRecipe:
    return read_recipe(written(folder, adapters=[ADAPTER | adapter]), TrainRecipe)


def test_an_adapters_own_setting_wins_over_the_recipes_over_the_house(tmp_path: Path) -> None:
    recipe = read_recipe(
        written(
            tmp_path,
            adapters=[ADAPTER | {"rank": 4, "weight_decay": 0.0}],
            defaults={"rank": 8, "epochs": 1, "weight_decay": 0.1},
        ),
        TrainRecipe,
    )
    (adapter,) = resolve_adapters(recipe)
    assert (adapter.rank, adapter.epochs, adapter.clip, adapter.weight_decay) == (4, 1.0, DEFAULTS.clip, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": [ADAPTER | {"rnak": 4}]}, r"unknown field `rnak` - at `\$.adapters\[0\]`"),
        ({"adapters": [ADAPTER | {"rank": 0}]}, r"Expected `int` >= 1 - at `\$.adapters\[0\].rank`"),
        ({"adapters": [ADAPTER | {"name": "../x"}]}, r"matching regex .* - at `\$.adapters\[0\].name`"),
        ({"adapters": []}, r"length >= 1 - at `\$.adapters`"),
        ({"adapters": [ADAPTER], "version": 2}, r"Invalid enum value 2 - at `\$.version`"),
        ({"adapters": [ADAPTER], "outptu": "x"}, r"unknown field `outptu`"),
    ],
)
def test_recipes_are_read_strictly(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(written(tmp_path, **fields), TrainRecipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "expected either `prompt` with `completion`, or `messages`, found both",
        ),
        ({"prompt": None}, "found neither"),
        ({"completion": None}, "completion: missing beside `prompt`"),
        ({"max_length": "p0"}, "found 'p0'; expected 'longest'"),
        ({"max_length": 1}, "found 1; expected"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_adapters(train(tmp_path, **change))


def test_what_was_found_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected `int` >= 1 - at `\$.adapters\[0\].rank`, found 0$"):
        read_recipe(written(tmp_path, adapters=[ADAPTER | {"rank": 0}]), TrainRecipe)
    with pytest.raises(ConfigError, match="at `recipe.learning_rate`, found 'fast'"):
        read_fields({"learning_rate": "fast"}, JobRecipe, "recipe")
    with pytest.raises(ConfigError, match=r"Expected `object`, got `str`$"):
        read_fields("text", JobRecipe, "recipe")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_of_yaml(number: float) -> None:
    for written in (f"{number:e}", f"{number!r}", f"{number:E}", f"{number:.1e}".replace("e+", "e")):
        assert load_yaml(f"x: {written}") == {"x": pytest.approx(float(written))}


def test_texts_of_yaml() -> None:
    for text in ("1e", "e5", "1.2.3", "1e-3x", "v1e3"):
        assert load_yaml(text) == text


def test_names_must_differ(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, adapters=[ADAPTER, ADAPTER]), TrainRecipe)
    with pytest.raises(ConfigError, match=r"adapters\[1\].name: 'intent' is used twice"):
        resolve_adapters(recipe)


def test_a_task_takes_prompt_and_reference_from_its_adapter(tmp_path: Path) -> None:
    task = {"name": "intent", "adapter": "intent", "data": {"test": "x.jsonl"}, "metric": "accuracy"}
    recipe = read_recipe(written(tmp_path, adapters=[ADAPTER], tasks=[task]), EvalRecipe)
    (resolved,) = resolve_tasks(recipe)
    assert (resolved.prompt, resolved.reference) == ("{text}", " {label}")
    with pytest.raises(ConfigError, match=r"tasks\[0\].prompt: missing"):
        resolve_tasks(read_recipe(written(tmp_path, tasks=[task]), EvalRecipe))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_recipe(tmp_path / "no.yaml", TrainRecipe)
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_recipe(tmp_path / "broken.yaml", TrainRecipe)
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="expected a mapping at the top, found list"):
        read_recipe(tmp_path / "list.yaml", TrainRecipe)


@given(st.integers(1, 2**40))
def test_sizes_in_bytes(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == parse_size(f"{size}B") == size


def test_sizes() -> None:
    assert (parse_size("2GiB"), parse_size("1.5 kib"), parse_size("1e9"), parse_size("3MB")) == (
        2**31,
        1536,
        10**9,
        3 * 10**6,
    )
    for text in ("", "-1", "2 GiBs", "0", "x", "nan"):
        with pytest.raises(ConfigError, match="--kv-memory: found"):
            parse_size(text, "--kv-memory")


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("recipes/[!n]*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_read(path: Path) -> None:
    raw = yaml.safe_load(path.read_text())
    if "adapters" in raw:
        resolve_adapters(read_recipe(path, TrainRecipe))
    if "tasks" in raw:
        resolve_tasks(read_recipe(path, EvalRecipe))


def test_some_of_a_recipe(tmp_path: Path) -> None:
    adapters = read_recipe(
        written(tmp_path, adapters=[ADAPTER | {"name": n} for n in ("a", "b", "c")]), TrainRecipe
    ).adapters
    assert [adapter.name for adapter in chosen(adapters, ())] == ["a", "b", "c"]
    assert [adapter.name for adapter in chosen(adapters, ["c", "a"])] == ["a", "c"]
    with pytest.raises(ConfigError, match="--only: found 'd'; the recipe has a, b, c"):
        chosen(adapters, ["a", "d"])
