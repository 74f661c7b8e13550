"""The leaderboard of a team that judges a lot: nothing is left out, and what is sent stays small."""

from __future__ import annotations

from pathlib import Path

from tests.registry.contents import content
from tests.server.platforms import up

from lorikeet.registry.records import Actor

TASKS, ADAPTERS = 6, 170  # more results than a page of the catalog


def test_many_tasks_and_adapters(tmp_path: Path) -> None:
    who = Actor()
    with up(tmp_path, scripted=True) as server:
        assert server.state.platform is not None
        catalog = server.state.platform.catalog
        catalog.repositories.create(who, "r")
        made = [catalog.versions.add(who, "r", content(catalog)) for _ in range(ADAPTERS)]
        for task in range(TASKS):
            shared = {"base": "nano", "task": f"t{task}", "metric": "accuracy", "n": 10}
            catalog.evaluations.add(who, score=0.1, result={"baseline": 0.3, "core_seconds": 5.0}, **shared)  # type: ignore[arg-type]
            for i, version in enumerate(made):
                catalog.evaluations.add(who, score=i / 1000, version_id=version.id, **shared)  # type: ignore[arg-type]
        tasks = server.http.get("/api/leaderboard").json()["tasks"]
        assert [(one["task"], one["judged"], len(one["adapters"])) for one in tasks] == [
            (f"t{task}", ADAPTERS, ADAPTERS) for task in range(TASKS)
        ]
        assert tasks[0]["base"]["score"] == 0.1 and tasks[0]["baseline"] == {"score": 0.3, "ci": None}
        few = server.http.get("/api/leaderboard?adapters=2").json()["tasks"]
        assert [one["ref"] for one in few[1]["adapters"]] == ["r/170", "r/169"] and few[1]["judged"] == ADAPTERS
        (one,) = server.http.get("/api/leaderboard?task=t5&adapters=170").json()["tasks"]
        assert len(one["adapters"]) == ADAPTERS and one["adapters"][0] == few[5]["adapters"][0]
        for wrong in ("adapters=0", "adapters=x", "best=3"):
            assert server.http.get(f"/api/leaderboard?{wrong}").status_code == 422
