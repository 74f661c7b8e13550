"""`lorikeet jobs` against a server whose jobs are naps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.hosting import Hosted
from tests.server.platforms import RECIPE, job_of, make, train, up, wait, wait_for_step
from typer.testing import CliRunner

from lorikeet.cli import app
from lorikeet.errors import ConfigError, LorikeetError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with up(tmp_path_factory.mktemp("home"), scripted=True) as server:
        make(server, "r", test=False)
        yield server


def run(server: Hosted, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["jobs", *arguments, "--url", server.url], env={"COLUMNS": "160"})
    if done.exception is not None:
        raise done.exception
    return done.output


def test_submitted_and_followed(server: Hosted, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rank: 4\nepochs: 9\n")
    templates = ("--prompt", RECIPE["prompt"], "--completion", RECIPE["completion"])
    said = run(server, "submit", "fresh", "--dataset", "colours", "--recipe", str(recipe), *templates,
               "--set", "epochs=5", "--follow")  # fmt: skip
    assert "makes fresh/1" in said and "training: naps" in said and "completed" in said
    job = server.http.get("/api/jobs?repo=fresh").json()["items"][0]
    assert job["recipe"]["rank"] == 4 and job["recipe"]["epochs"] == 5.0
    listed = run(server, "ls")
    assert job["id"][:8] in listed and "fresh/1" in listed and "5 of 5" in listed
    assert "training: naps" in run(server, "logs", job["id"][:8])


def test_cancelled_and_resumed(server: Hosted) -> None:
    job = train(server, "r", epochs=10_000)
    wait_for_step(server, job["id"], 1)
    assert "stopping" in run(server, "cancel", job["id"][:8])
    assert wait(server, job["id"])["state"] == "canceled"
    assert "queued" in run(server, "resume", job["id"])
    run(server, "cancel", job["id"])
    wait(server, job["id"])
    assert job_of(server, job["id"])["state"] == "canceled"


def test_what_is_wrong_is_said(server: Hosted) -> None:
    with pytest.raises(LorikeetError, match="nothing"):
        run(server, "submit", "unmade", "--dataset", "nothing")
    assert server.http.get("/api/repos/unmade").status_code == 404
    with pytest.raises(ConfigError, match="--set: found 'rank'"):
        run(server, "submit", "r", "--dataset", "colours", "--set", "rank")
    with pytest.raises(LorikeetError, match="recipe: expected either `prompt` with `completion`, or `messages`"):
        run(server, "submit", "r", "--dataset", "colours")
    said = run(server, "submit", "r", "--dataset", "colours", "--prompt", r"{thing}\nColour:", "--completion", "x")
    assert "--prompt has a backslash and an n" in said
    with pytest.raises(ConfigError, match="job: found none"):
        run(server, "logs", "zz")
    with pytest.raises(LorikeetError, match="no server answers"):
        raise CliRunner().invoke(app, ["jobs", "ls", "--url", "http://127.0.0.1:9"]).exception or AssertionError
