"""Jobs over HTTP, with real training of the embedded base on rows that take seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.server.hosting import Hosted, own_cache
from tests.server.platforms import RECIPE, TEST_ROWS, job_of, make, train, up, wait
from websockets.sync.client import connect


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    with own_cache(tmp_path_factory.mktemp("cache")), up(tmp_path_factory.mktemp("home")) as server:
        make(server, "colour")
        yield server


@pytest.fixture(scope="module")
def trained(server: Hosted) -> dict[str, Any]:
    return wait(server, train(server, "colour", evaluate={"baseline": "tfidf", "input": "thing"})["id"])


def messages(server: Hosted, job_id: str, after: str = "") -> list[dict[str, Any]]:
    return server_sent(server, f"/api/jobs/{job_id}/stream" + (f"?after={after}" if after else ""))


def server_sent(server: Hosted, path: str) -> list[dict[str, Any]]:
    with server.http.stream("GET", path) as reply:
        assert reply.status_code == 200, reply.read()
        return [json.loads(line[5:]) for line in reply.iter_lines() if line.startswith("data:")]


def evaluation_of(server: Hosted, reference: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for one in server.http.get("/api/jobs").json()["items"]:
            if one["kind"] == "eval" and one["adapter"] == reference:
                found: dict[str, Any] = one
                return found
        time.sleep(0.1)
    raise AssertionError(f"no evaluation of {reference} follows")


def test_a_training_makes_a_version(server: Hosted, trained: dict[str, Any]) -> None:
    assert trained["state"] == "completed" and trained["error"] is None
    assert trained["result"]["steps"] == 12 and trained["result"]["joined"] == 1
    version = server.http.get("/api/repos/colour/versions/1").json()
    assert version["state"] == "ready" and version["job_id"] == trained["id"]
    assert version["lock"]["template"]["text"] == RECIPE["prompt"] and version["base"] == "lorikeet-nano"
    assert version["recipe"]["rank"] == 4 and version["recipe"]["dataset"] == "colours"
    assert all(len(version[name]) == 64 for name in ("recipe_sha256", "data_sha256", "digest", "base_sha256"))
    assert version["code_version"] and version["metrics"]["steps"] == 12 and version["metrics"]["loss"] < 3
    assert {one["path"] for one in version["files"]} == {
        "adapter_config.json", "adapter_model.safetensors", "lorikeet.json"
    }  # fmt: skip
    assert [one["step"] for one in version["checkpoints"]] == [6]  # the end of the first of two epochs
    assert server.complete(model="colour/1", prompt="Thing: x\nColour:", max_tokens=2)["model"] == "colour/1"
    assert server.complete(model="colour/1@6", prompt="Thing: x\nColour:", max_tokens=2)["model"] == "colour/1@6"


def test_what_it_said(server: Hosted, trained: dict[str, Any]) -> None:
    said = messages(server, trained["id"])
    kinds = [one["kind"] for one in said if one["type"] == "event"]
    assert kinds == ["queued", "started", "preparing", "audited", "training", "publishing", "completed"]
    metrics = [one for one in said if one["type"] == "metric"]
    assert [one["step"] for one in metrics] == list(range(1, 13)) and metrics[0]["adapter"] == "colour/1"
    log = "".join(one["text"] for one in said if one["type"] == "log")
    assert "training: 12 steps on 48 rows" in log and log == server.http.get(
        f"/api/jobs/{trained['id']}/logs"
    ).json()["text"]  # fmt: skip
    assert said[-1]["type"] == "state" and said[-1]["job"] == job_of(server, trained["id"])
    rest = messages(server, trained["id"], after=metrics[4]["cursor"])
    assert [one["step"] for one in rest if one["type"] == "metric"] == list(range(6, 13))
    listed = server.http.get(f"/api/jobs/{trained['id']}/metrics?after={metrics[4]['id']}").json()["items"]
    assert [one["step"] for one in listed] == list(range(6, 13))
    drawn = server.http.get(
        f"/api/jobs/{trained['id']}/metrics?after={metrics[4]['id']}&fields=step,loss,nothing"
    ).json()
    assert drawn["items"] == [{name: one[name] for name in ("id", "step", "loss")} for one in listed]


def test_the_same_over_a_websocket(server: Hosted, trained: dict[str, Any]) -> None:
    with connect(server.url.replace("http", "ws") + f"/api/jobs/{trained['id']}/ws") as socket:
        said = [json.loads(text) for text in socket]
    assert said == messages(server, trained["id"])


def test_judged_afterwards(server: Hosted, trained: dict[str, Any]) -> None:
    """A dataset with a test split: base and adapter are judged by a job of its own."""
    judging = evaluation_of(server, "colour/1")
    result = wait(server, judging["id"])["result"]["results"][0]
    assert (
        result["n"] == len(TEST_ROWS) and result["metric"] == "accuracy" and result["adapter_reference"] == "colour/1"
    )
    assert result["adapter_ci"][0] <= result["adapter"] <= result["adapter_ci"][1]
    board = server.http.get("/api/leaderboard").json()["tasks"]
    row = next(one for one in board if one["task"] == "colour")
    assert row["base"]["score"] == result["base"] and row["adapters"][0]["ref"] == "colour/1"
    assert row["baseline"] == {"score": result["baseline"], "ci": result["baseline_ci"]}
    judged = row["adapters"][0]
    assert judged["ci"] == result["adapter_ci"] and 0 < judged["p50_ms"] <= judged["p95_ms"]
    assert judged["core_seconds"] == trained["result"]["core_seconds"] >= trained["progress"]["core_seconds"] > 0
    assert wait(server, judging["id"])["result"]["core_seconds"] > 0
    version = server.http.get("/api/repos/colour/versions/1").json()
    assert [one["job_id"] for one in version["evaluations"]] == [judging["id"]]


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"recipe": RECIPE | {"rnak": 4}}, 400, "unknown field `rnak`"),
        ({"recipe": RECIPE | {"rank": 0}}, 400, "recipe.rank"),
        ({"recipe": RECIPE | {"prompt": "{nothing}"}}, 400, "uses the column 'nothing'"),
        ({"recipe": RECIPE | {"evaluate": {"metric": "python:os.system"}}}, 400, "evaluate"),
        ({"recipe": {"prompt": "x"}}, 400, "completion: missing"),
        ({"repo": None}, 422, "'repo' is missing"),
        ({"repo": "nobody"}, 404, "nobody"),
        ({"dataset": "nothing"}, 404, "nothing"),
        ({"kind": "eval"}, 422, "a job of kind eval has none"),
        ({"more": 1}, 422, "unknown field 'more'"),
        ({"parent": "colour/99"}, 404, "colour/99"),
        ({"parent": "colour/1", "recipe": {"rank": 8}}, 400, "recipe.rank: colour/1 has 4, found 8"),
    ],
)
def test_refused(server: Hosted, trained: dict[str, Any], change: dict[str, Any], status: int, said: str) -> None:
    reply = server.post("/api/jobs", {"repo": "colour", "dataset": "colours", "recipe": RECIPE} | change)
    assert reply.status_code == status and said in reply.json()["error"]["message"], reply.text


def test_a_training_that_is_refused_leaves_no_repository(
    server: Hosted, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is refused for; one that is taken makes its repository and its version at once."""
    body = {"repo": "fresh", "create_repo": True, "dataset": "colours", "recipe": RECIPE}
    with monkeypatch.context() as little:
        little.setattr(server.state.platform, "job_memory", 2**28)
        assert "needs about" in server.post("/api/jobs", body).text
    for change in (
        {"recipe": RECIPE | {"rnak": 4}}, {"recipe": RECIPE | {"prompt": "{nothing}"}}, {"dataset": "nothing"},
        {"parent": "colour/99"}, {"parent": "fresh/1"}, {"repo": "a b"}, {"repo": "../fresh"},
    ):  # fmt: skip
        assert server.post("/api/jobs", body | change).status_code in (400, 404), change
    assert [one["name"] for one in server.http.get("/api/repos").json()["items"]] == ["colour"]
    job = server.post("/api/jobs", body).json()
    assert (job["repo"], job["version"]) == ("fresh", 1)
    assert server.post("/api/jobs", body).json()["version"] == 2  # it is there by now
    for one in server.http.get("/api/jobs?repo=fresh").json()["items"]:
        server.post(f"/api/jobs/{one['id']}/cancel", None)
        wait(server, one["id"])
    assert server.http.delete("/api/repos/fresh").status_code == 204
    assert "a job of kind eval has none" in server.post("/api/jobs", {"kind": "eval"} | body).text


def test_more_memory_than_there_is(server: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.state.platform, "job_memory", 2**28)
    reply = server.post("/api/jobs", {"repo": "colour", "dataset": "colours", "recipe": RECIPE})
    assert reply.status_code == 400
    assert "needs about" in reply.json()["error"]["message"] and "0.2 GiB" in reply.json()["error"]["message"]


def test_lists_and_pages(server: Hosted, trained: dict[str, Any]) -> None:
    page = server.http.get("/api/jobs?limit=1").json()
    assert len(page["items"]) == 1 and page["next"]
    assert server.http.get(f"/api/jobs?limit=1&after={page['next']}").json()["items"] != page["items"]
    assert trained["id"] in [
        one["id"] for one in server.http.get("/api/jobs?repo=colour&state=completed").json()["items"]
    ]
    for wrong in ("?state=sleeping", "?limit=0", "?limit=x", "?more=1", "?limit=1&limit=2"):
        assert server.http.get(f"/api/jobs{wrong}").status_code == 422
    assert server.http.get("/api/jobs/nothing").status_code == 404
    assert server.http.get(f"/api/jobs/{trained['id']}/stream?after=x").status_code == 422
