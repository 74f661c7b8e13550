"""`lorikeet jobs` against a server whose jobs are naps."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.hosting import Hosted
from tests.server.platforms import RECIPE, job_of, make, train, up, wait, wait_for_step
from typer.testing import CliRunner

from lorikeet.cli import app
from lorikeet.client import Client
from lorikeet.errors import ConfigError, LorikeetError, UnavailableError
from lorikeet.registry.records import Actor


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
    for change, said in (("rank=", "found 'rank='"), ("=4", "found '=4'"), ("rank=[", "'rank=\\[' is not YAML")):
        with pytest.raises(ConfigError, match=f"--set: {said}"):
            run(server, "submit", "r", "--dataset", "colours", "--set", change)
    with pytest.raises(LorikeetError, match=r"Expected `int` >= 1 - at `recipe.rank`, found 0"):
        run(server, "submit", "r", "--dataset", "colours", "--set", "rank=0")
    with pytest.raises(LorikeetError, match="recipe: expected either `prompt` with `completion`, or `messages`"):
        run(server, "submit", "r", "--dataset", "colours")
    said = run(server, "submit", "r", "--dataset", "colours", "--prompt", r"{thing}\nColour:", "--completion", "x")
    assert "--prompt has a backslash and an n" in said
    with pytest.raises(ConfigError, match="job: found none"):
        run(server, "logs", "zz")
    with pytest.raises(ConfigError, match="job: expected an id, or how it begins"):
        run(server, "logs", "")


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("http://127.0.0.1:9", UnavailableError, "no server answers at http://127.0.0.1:9"),
        ("127.0.0.1:9", ConfigError, "url: found '127.0.0.1:9'; expected such as http://127.0.0.1:8000"),
        ("somewhere", ConfigError, "url: found 'somewhere'"), ("http://", ConfigError, "url: found 'http://'"),
        ("http://[::1:8000", ConfigError, r"url: found 'http://\[::1:8000'"),
    ],
)  # fmt: skip
def test_addresses_where_no_server_is(url: str, kind: type[LorikeetError], said: str) -> None:
    with pytest.raises(kind, match=said):
        raise CliRunner().invoke(app, ["jobs", "ls", "--url", url]).exception or AssertionError


def test_a_server_that_goes_away() -> None:
    """In the middle of a stream, and before it said anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for answer in (b'HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\ndata: {"type": "x"}\n\n', b""):
                connection = listening.accept()[0]
                connection.recv(65536)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with Client(f"http://127.0.0.1:{listening.getsockname()[1]}") as client:
            with pytest.raises(UnavailableError, match="the connection to http://127.0.0.1:.* broke"):
                assert [one["type"] for one in client.events("/api/jobs/x/stream")] == ["x"]
            with pytest.raises(UnavailableError, match="the connection to http://127.0.0.1:.* broke"):
                client.api("GET", "/api/jobs")
        thread.join(10)


def test_numbers_as_people_write_them(server: Hosted) -> None:
    """1e-3 is a number in YAML 1.2, and text in the YAML of most libraries."""
    templates = ("--prompt", RECIPE["prompt"], "--completion", RECIPE["completion"])
    said = run(server, "submit", "r", "--dataset", "colours", *templates, "--set", "learning_rate=1e-3",
               "--set", "epochs=2", "-f")  # fmt: skip
    assert job_of(server, said[:36])["recipe"]["learning_rate"] == 0.001


def test_judged(server: Hosted) -> None:
    templates = ("--prompt", RECIPE["prompt"], "--completion", RECIPE["completion"])
    run(server, "submit", "judged", "--dataset", "colours", *templates, "--set", "epochs=2", "--follow")
    said = run(server, "judge", "judged/1", "--dataset", "colours", "--set", "split=train", "--task", "t")
    assert "judges judged/1" in said
    job = job_of(server, said[:36])
    assert (job["kind"], job["adapter"], job["recipe"]["split"]) == ("eval", "judged/1", "train")
    for arguments, wrong in (
        (["judged/9"], "judged/9"), ([], "the base alone needs prompt"), (["--set", "split=test"], "recipe.split"),
    ):  # fmt: skip
        with pytest.raises(LorikeetError, match=wrong):
            run(server, "judge", "--dataset", "colours", "--set", "split=train", *arguments)


def test_whoever_has_no_key_is_told_where_to_give_one(tmp_path: Path) -> None:
    with up(tmp_path, scripted=True) as server:
        assert server.state.platform is not None
        server.state.platform.catalog.keys.create(Actor(), "root", "admin")
        server.state.access.keys_changed()
        with pytest.raises(LorikeetError) as caught:
            run(server, "ls")
        assert "--api-key or LORIKEET_API_KEY" in str(caught.value.hint)
