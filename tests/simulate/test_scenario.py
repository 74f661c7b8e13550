from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.simulate.scenarios import GIVEN, document, stream

from lorikeet.errors import ConfigError
from lorikeet.simulate.scenario import read_scenario

RECIPES = Path(__file__).parents[2] / "recipes" / "simulate"


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(yaml.safe_dump(document(**changes)))
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(path: Path) -> None:
    assert read_scenario(path).requests > 0


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"request": 5}, ["unknown field `request`"]),
        ({"version": 2}, ["$.version", "2"]),
        ({"requests": 0}, ["$.requests", ">= 1"]),
        ({"traffic": []}, ["$.traffic"]),
        ({"traffic": [stream(weight=2)]}, ["unknown field `weight`", "$.traffic[0]"]),
        ({"traffic": [stream(arrivals={"kind": "poison", "rate": 1})]}, ["'poison'", "$.traffic[0].arrivals"]),
        ({"traffic": [stream(arrivals={"kind": "poisson", "rate": 0})]}, ["$.traffic[0].arrivals.rate"]),
        (
            {"traffic": [stream(prompt={"kind": "uniform", "min": 9, "max": 3})]},
            ["$.traffic[0].prompt.min", "9", "(3)"],
        ),
        ({"traffic": [stream(prompt={"kind": "fixed", "tokens": 5000})]}, ["$.traffic[0].prompt", "5020", "4096"]),
        ({"traffic": [stream(adapters={"kind": "zipf", "first": 15, "count": 6})]}, ["$.traffic[0].adapters", "21"]),
        ({"adapters": {"count": 0}, "traffic": [stream(adapters={"kind": "uniform"})]}, ["adapters.count above 0"]),
        ({"adapters": {"count": 2, "bytes": ["1GiB"]}}, ["$.adapters.bytes", str(2**30), "engine.adapter_memory"]),
        ({"adapters": {"count": 2, "bytes": ["1 lot"]}}, ["adapters.bytes", "1 lot"]),
        ({"engine": {"kv_tokens": 512, "max_seqs": 64, "step_tokens": 32}}, ["$.engine.step_tokens", "32", "(64)"]),
        ({"engine": {"max_seqs": 64}}, ["kv_tokens", "$.engine"]),
        ({"replicas": {"routing": "random"}}, ["'random'", "$.replicas.routing"]),
        ({"cost": GIVEN | {"flops": "a lot"}}, ["$.cost.flops", "Expected `float`, got `str`"]),
        ({"cost": GIVEN | {"gpu": "H200"}}, ["unknown field `gpu`", "$.cost"]),
        ({"cost": {"kind": "guessed"}}, ["'guessed'", "$.cost"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else next(iter(value)),
)
def test_what_makes_no_sense_is_refused_by_name(changes: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_scenario(written(tmp_path, **changes))
    for name in names:
        assert name in error.value.message
