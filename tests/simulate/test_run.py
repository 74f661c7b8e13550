from __future__ import annotations

import json
from pathlib import Path

import yaml
from tests.simulate.scenarios import document
from typer.testing import CliRunner

from lorikeet.cli import app
from lorikeet.errors import ConfigError


def test_a_scenario_from_the_command_line(tmp_path: Path) -> None:
    path, output = tmp_path / "small.yaml", tmp_path / "small.html"
    path.write_text(yaml.safe_dump(document()))
    told = [CliRunner().invoke(app, ["simulate", str(path), "--output", str(output), "--json"]) for _ in range(2)]
    assert [one.exit_code for one in told] == [0, 0], told[0].output
    assert told[0].stdout == told[1].stdout
    numbers = json.loads(told[0].stdout)
    assert numbers["outcomes"] == {"length": 300, "error": 0, "refused": 0}
    assert numbers["ttft"]["p50"] < numbers["ttft"]["p95"] < numbers["ttft"]["p99"]
    assert output.read_text().startswith("<!doctype html>")
    shown = CliRunner().invoke(app, ["simulate", str(path), "--output", str(output)])
    assert "requests a second" in shown.stdout and str(numbers["engine"]["steps"]) in shown.stdout


def test_what_is_wrong_is_said_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(document(cost={"kind": "fitted", "file": str(tmp_path / "none.json")})))
    found = CliRunner().invoke(app, ["simulate", str(path), "--output", str(tmp_path / "x.html")])
    assert isinstance(found.exception, ConfigError) and "none.json does not exist" in found.exception.message
    found = CliRunner().invoke(app, ["simulate", str(path), "--output", str(tmp_path / "nowhere" / "x.html")])
    assert isinstance(found.exception, ConfigError) and "--output" in found.exception.message
