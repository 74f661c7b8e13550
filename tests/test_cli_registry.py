"""`lorikeet adapters ...` and `lorikeet datasets ...` on a home folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.adapters.servers import file_server, publish
from typer.testing import CliRunner

from lorikeet.cli import app
from lorikeet.errors import LorikeetError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`run("adapters", "ls")`: what it prints. A user's mistake is raised."""
    monkeypatch.setenv("LORIKEET_HOME", str(tmp_path / "home"))

    def call(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return call


@pytest.fixture
def folders(adapters: Callable[..., list[Path]]) -> list[Path]:
    return adapters("llama", 2)


def test_adapters(run: Callable[..., str], folders: list[Path], tmp_path: Path) -> None:
    first, second = folders
    assert run("adapters", "import", first, "intent", "--alias", "production").splitlines()[-1] == "intent/1"
    described = "[bold red]loud[/] \x1b[31m"
    run("adapters", "import", second, "intent", "--description", described, "--parent", "intent/1")
    listed = run("adapters", "ls")
    assert "2 (newest 2, ready)" in listed and "production is 1" in listed
    versions = run("adapters", "ls", "intent")
    assert "intent/2" in versions and "[bold red]loud[/]" in versions and "\x1b[31m" not in versions
    assert [one["number"] for one in json.loads(run("adapters", "ls", "intent", "--json"))["items"]] == [2, 1]
    shown = json.loads(run("adapters", "show", "intent@production", "--json"))
    assert shown["reference"] == "intent/1" and shown["aliases"] == ["production"]
    assert "intent/2 < intent/1" in run("adapters", "show", "intent/2")
    difference = run("adapters", "diff", "intent/1", "intent/2")
    assert "config.r" in difference and "changed" in difference
    assert run("adapters", "alias", "intent/2", "production") == "intent@production is intent/2\n"
    assert "intent/2" in run("adapters", "alias", "intent")
    run("adapters", "export", "intent", tmp_path / "out")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (second / name).read_bytes()
    assert run("adapters", "rm", "intent/1", "--yes") == "deleted intent/1\n"
    run("adapters", "alias", "intent", "production", "--remove")
    run("adapters", "rm", "intent", "--yes")
    assert json.loads(run("adapters", "ls", "--json"))["items"] == []
    assert "removed" in run("adapters", "collect", "--days", 0)


def test_adapters_of_the_hub(run: Callable[..., str], folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with file_server() as hub:
        publish(hub, "org/one", {path.name: path.read_bytes() for path in folders[0].iterdir()})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        run("adapters", "import", "hf://org/one@main", "mine")
        assert json.loads(run("adapters", "show", "mine", "--json"))["version"]["source"] == "hf://org/one@main"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("adapters", "show", "intent"), "there is no repository 'intent'"),
        (("adapters", "show", "a/b"), "model: found 'a/b'; expected name, name/3"),
        (("adapters", "import", "nowhere", "intent"), "nowhere: no such folder"),
        (("adapters", "import", ".", "../x"), "NAME: found '../x'"),
        (("adapters", "import", ".", "x", "--alias", "3"), "an alias has letters"),
        (("adapters", "rm", "intent@production"), "intent@production is an alias"),
        (("adapters", "ls", "intent", "--after", "x"), "--after: found 'x'; expected the number of a version"),
        (("datasets", "add", "rows", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("datasets", "show", "rows"), "there is no dataset 'rows'"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], said: str, run: Callable[..., str]) -> None:
    with pytest.raises(LorikeetError) as caught:
        run(*arguments)
    assert said in caught.value.message


def test_datasets(run: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"t{number}", "label": "x"}) + "\n" for number in range(10)))
    added = run("datasets", "add", "rows", file, "--test", "0.2")
    assert added == "rows: 8 train, 2 test rows; columns text (text), label (text)\n"
    assert "8 train, 2 test" in run("datasets", "ls")
    shown = json.loads(run("datasets", "show", "rows", "--rows", 2, "--json"))
    assert shown["dataset"]["splits"]["test"]["rows"] == 2 and len(shown["rows"]) == 2
    with pytest.raises(LorikeetError, match="Delete the dataset rows"):  # nobody can be asked here
        run("datasets", "rm", "rows")
    assert run("datasets", "rm", "rows", "--yes") == "deleted rows\n"
