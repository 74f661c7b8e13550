"""The demo's tasks by one click; the training itself is naps here, and real in test_jobs."""

from __future__ import annotations

from pathlib import Path

from tests.server.platforms import up, wait


def test_each_task_by_one_click(tmp_path: Path) -> None:
    with up(tmp_path, scripted=True) as server:
        assert server.post("/api/demo/intent/train", {"recipe": {"epoch": 1}}).status_code == 400
        assert server.post("/api/demo/intent/train", {"recipe": {"rank": 0}}).status_code == 400
        assert server.http.get("/api/repos").json()["items"] == server.http.get("/api/datasets").json()["items"] == []
        tasks = [one["task"] for one in server.http.get("/api/demo").json()["items"]]
        assert "intent" in tasks and len(tasks) == 7
        made = [server.http.post(f"/api/demo/{task}/train") for task in tasks]
        assert [one.status_code for one in made] == [201] * 7, [one.text for one in made]
        jobs = [one.json() for one in made]
        assert [one["repo"] for one in jobs] == tasks and {one["version"] for one in jobs} == {1}
        intent = jobs[tasks.index("intent")]
        assert intent["recipe"]["epochs"] == 4 and intent["recipe"]["evaluate"]["metric"] == "accuracy"
        assert wait(server, intent["id"])["state"] == "completed"
        again = server.post("/api/demo/intent/train", {"recipe": {"epochs": 1}})
        assert again.json()["version"] == 2 and again.json()["recipe"]["epochs"] == 1
        assert server.http.get("/api/demo").json()["items"][0]["repo"] == tasks[0]
        assert server.http.post("/api/demo/nothing/train").status_code == 404
        assert server.http.get("/api/repos/intent").json()["description"] == "the demo's intent"
        most = server.state.config.max_body
        assert server.post("/api/demo/intent/train", {"recipe": {"prompt": "x" * most}}).status_code == 413
        long = server.post("/api/demo/intent/train", {"recipe": {"prompt": "{nothing}" + "x" * 2**20}})
        assert long.status_code == 400 and "nothing" in long.text  # more than a MiB is read
        for job in server.http.get("/api/jobs?state=queued,running").json()["items"]:
            server.post(f"/api/jobs/{job['id']}/cancel", None)
