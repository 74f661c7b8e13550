"""The page over an API that says what it is told, for what a live server cannot show at will: hostile texts in every
field, curves that turn, a server that is empty or asks for a key.

    python -m tests.ui.stub 8123 [hostile | many | empty | locked]
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from lorikeet.server.pages import add_pages

Json = dict[str, Any]
ATTACK = """'"><img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b id=hacked>${7*7}"""
NOW = 1_760_000_000.0
KEY = "lk-right"
SECRET = "lk_" + "s" * 43


class Stub:
    """`mode`: plain, hostile, many, empty or locked. `asked` holds (method, path, body) of what changed something."""

    def __init__(self, mode: str = "plain") -> None:
        self.mode = mode
        self.asked: list[tuple[str, str, Any]] = []
        self.jobs = [] if mode == "empty" else [self.job(i, state) for i, state in enumerate(STATES)]
        self.repos = [] if mode == "empty" else [self.repo("intent", 3, "production"), self.repo("sentiment", 1, None)]
        self.me: Json = {"tenant": "default", "role": "admin", "name": self.say("ada"), "key": None, "operator": True}
        self.tenants = [{"id": name, "name": name, "created": NOW} for name in ("default", self.say("others"))]
        self.users: list[Json] = []
        self.keys: list[Json] = []
        if mode != "empty":
            self.users = [{"id": "u1", "name": self.say("grace"), "role": "trainer", "email": self.say("g@example.com"),
                           "created": NOW, "disabled": None}]  # fmt: skip
            self.keys = [
                self.key("root", role="admin"), self.key("gone", revoked=NOW),
                self.key("ci", user_id="u1", repositories=["intent"], requests_per_minute=60, tokens_per_day=100_000),
            ]  # fmt: skip

    def say(self, text: str) -> str:
        """What a text field holds."""
        return text + ATTACK if self.mode == "hostile" else text

    # --- what there is ------------------------------------------------------------------------------------------

    def repo(self, name: str, count: int, alias: str | None) -> Json:
        versions = [
            {"id": f"{name}{n}", "number": n, "state": "ready", "base": self.say("lorikeet-nano"), "bytes": 3_300_000,
             "job_id": "job0", "created": NOW + n, "archived": None}
            for n in range(1, count + 1)
        ]  # fmt: skip
        aliases = [{"name": alias, "number": 2, "moved": NOW, "moved_by": self.say("ada")}] if alias else []
        return {
            "id": name, "name": name, "description": self.say(f"what {name} is for"), "created": NOW, "changed": NOW,
            "created_by": self.say("ada"), "versions": versions, "aliases": aliases,
        }  # fmt: skip

    def version(self, repo: str, number: int) -> Json:
        say = self.say
        evaluation = {"task": say(repo), "metric": say("accuracy"), "n": 300, "score": 0.912, "low": 0.88, "high": 0.94,
                      "created": NOW, "result": {"base": 0.31}}  # fmt: skip
        return {
            "id": f"{repo}{number}", "repository": repo, "number": number, "state": "ready", "kind": say("lora"),
            "rank": 16, "bytes": 3_300_000, "base": say("lorikeet-nano"), "where": "device", "created": NOW,
            "created_by": say("ada"), "description": say("lower rate"), "job_id": "job0", "source": say("hf://a/b"),
            "code_version": say("0.1.0"), "data_sha256": "ab" * 32, "metrics": {"validation_loss": 0.213},
            "lineage": [{"reference": say(f"{repo}/{n}")} for n in range(number - 1, 0, -1)], "children": [],
            "evaluations": [evaluation], "checkpoints": [{"step": 40}], "reference": f"{repo}/{number}",
            "recipe": {"prompt": say("Customer: {text}\nIntent:"), "completion": say(" {label}"), "rank": 16,
                       "dataset": "tickets"},
            "lock": {"template": {"kind": "prompt", "text": say("Customer: {text}\nIntent:")}},
            "files": [{"path": say("adapter_model.safetensors"), "sha256": "cd" * 32, "bytes": 3_300_000}],
        }  # fmt: skip

    def job(self, i: int, state: str) -> Json:
        say = self.say
        return {
            "id": f"job{i}", "kind": "train", "state": state, "stage": say("training"), "repo": "intent",
            "version": i + 1, "dataset": "tickets", "memory": 2**30, "result": None,
            "description": say(f"try {i}"), "base": say("lorikeet-nano"), "attempts": 1,
            "max_attempts": 3, "created": NOW + 10 * i, "started": NOW + 10 * i + 2,
            "finished": None if state == "running" else NOW + 10 * i + 80, "created_by": say("ada"),
            "progress": {"step": 40, "steps": 100, "loss": 0.4, "validation_loss": 0.7, "seconds_left": 12.0,
                         "core_seconds": 61.4},
            "error": {"message": say("no memory"), "hint": say("less")} if state == "errored" else None,
            "recipe": {"rank": 16, "epochs": 3, "prompt": say("Customer: {text}\nIntent:"),
                       "completion": say(" {label}")},
        }  # fmt: skip

    def lines(self, i: int) -> list[Json]:
        """Training loss falls; the held-out loss of job 0 turns at step 60."""
        found: list[Json] = []
        for step in range(2, 101, 2):
            noise = 0.15 * math.sin(step * 1.7)
            rest = {"tokens": 900 * step, "lr": 1e-3 * (1 - step / 101), "seconds": step / 2}
            loss = 2.5 * math.exp(-step / 35) + 0.2 + noise
            found.append({"id": 10 * step, "step": step, "split": "train", "loss": loss, **rest})
            if step % 10 == 0:
                turn = 0.0009 * max(step - 60, 0) ** 1.5 if i == 0 else 0
                loss = 2.3 * math.exp(-min(step, 60 if i == 0 else 100) / 35) + 0.3 + turn + 0.1 * i
                found.append({"id": 10 * step + 1, "step": step, "split": "validation", "loss": loss, **rest})
        return found

    def events(self, i: int) -> list[Json]:
        kinds = ["queued", "running", "preparing", "training", "checkpoint"]
        return [
            {"id": n + 1, "at": NOW + n, "kind": self.say(kind), "message": self.say(f"of job {i}")}
            for n, kind in enumerate(kinds)
        ]

    def dataset(self) -> Json:
        say = self.say
        row = {say("text"): say("where is my card"), say("label"): say("card arrival")}
        return {"name": "tickets", "description": say("of May"), "rows": 1200, "bytes": 90_000,
                "columns": {say("text"): "string", say("label"): "string"}, "splits": {"train": {"rows": 1200}},
                "first_rows": [row, row], "created": NOW, "created_by": say("ada")}  # fmt: skip

    def preview(self, body: Json) -> Json:
        say = self.say
        pieces = [{"text": say("Customer: where is my card\nIntent:"), "learned": False},
                  {"text": say(" card arrival<|endoftext|>"), "learned": True}]  # fmt: skip
        level = "error" if "{nothing}" in body["prompt"] else "warning"
        return {"rows": [{"pieces": pieces}] * 3, "labels": {say("card arrival"): 600, "refund": 600},
                "tokens": {"train_rows": 1140, "validation_rows": 60, "test_rows": 0, "tokens": 12_000,
                           "learned_tokens": 3_400, "limit": 64, "percentiles": {"100": 64}},
                "rows_read": 1200, "rows_all": 1200, "steps": 215,
                "audit": [{"level": level, "message": say("3 training rows repeat an earlier one")}]}  # fmt: skip

    def serving(self, t: float) -> Json:
        adapter = {"name": self.say("intent/2"), "tier": "device", "bytes": 3_300_000, "rank": 16, "hits": 12,
                   "running": 1, "waiting": 2, "last_used": time.time()}  # fmt: skip
        now = {"requests_running": 3, "requests_waiting": 2, "tokens_per_second": 410 + 60 * math.sin(t / 7),
               "ttft": {"p50": 0.031, "p95": 0.082}, "itl": {"p50": 0.0071, "p95": 0.0124}, "kv_used": 0.42,
               "adapters": [adapter, adapter | {"name": "sentiment/1", "tier": "disk"}]}  # fmt: skip
        if self.mode == "empty":
            now["adapters"] = []
        history = [{"t": int(t) - 300 + i, "tokens_per_second": 380 + 90 * math.sin(i / 9)} for i in range(299)]
        return {"t": t, "now": now, "history": history}

    def leaderboard(self) -> list[Json]:
        say = self.say
        if self.mode == "many":
            return [self.crowded(i) for i in range(20)]
        task = {"task": say("intent"), "metric": say("accuracy"), "n": 300, "base": {"score": 0.31, "ci": [0.26, 0.36]},
                "baseline": {"score": 0.842, "ci": [0.8, 0.88]},
                "adapters": [{"ref": say("intent/2"), "score": 0.912, "ci": [0.88, 0.94], "train_seconds": 84.2,
                              "core_seconds": 168.4, "adapter_bytes": 3_300_000, "p50_ms": 41.0, "p95_ms": 73.0},
                             {"ref": say("intent/1"), "score": 0.33, "ci": [0.28, 0.39], "train_seconds": 20.0,
                              "adapter_bytes": 3_300_000, "p50_ms": 40.0}]}  # fmt: skip
        return [] if self.mode == "empty" else [task, task | {"task": say("sentiment"), "baseline": None}]

    def crowded(self, i: int) -> Json:
        """A task on which 200 adapters were judged; every third one has a second metric, as a task may."""
        name = f"{'a-very-long-name-of-a-task-' if i % 5 == 0 else 'task-'}{i - (i % 3 == 1)}"
        cost = {"train_seconds": 100.0, "core_seconds": 12_345.0, "adapter_bytes": 10**6, "p50_ms": 40.0, "p95_ms": 9e4}
        adapters = [
            {"ref": f"team-{n % 7}-adapter-of-{name}/{n}", "score": 0.95 - n / 400, "ci": [0.9 - n / 400, 0.97], **cost}
            for n in range(200)
        ]
        return {"task": name, "metric": "rouge_l" if i % 3 == 1 else "accuracy", "n": 100_000,
                "base": {"score": 0.31, "ci": [0.26, 0.36]}, "baseline": None, "adapters": adapters}  # fmt: skip

    def key(self, name: str, **fields: Any) -> Json:
        made = {"id": f"key-{name}", "name": self.say(name), "prefix": "lk_abcdefg", "role": "user", "user_id": None,
                "repositories": None, "requests_per_minute": None, "tokens_per_day": None, "created": NOW,
                "created_by": self.say("ada"), "expires": None, "last_used": NOW, "revoked": None,
                "today": {"requests": 12, "tokens": 3400}}  # fmt: skip
        return made | fields

    def change(self, i: int) -> Json:
        say = self.say
        entry = {"id": i, "at": NOW + i, "actor": say("key:root"), "action": "key.create", "subject_id": f"key-{i}",
                 "subject": say(f"ci-{i}"), "details": {"prefix": say("lk_abcdefg"), "role": "user"}}  # fmt: skip
        if i == 59:
            entry["action"] = "key.change"
            entry["details"] = {
                "role": {"from": "trainer", "to": "user"}, "tokens_per_day": {"from": None, "to": 5000},
                "repositories": {"from": None, "to": ["intent", say("slots")]},
            }  # fmt: skip
        return entry

    def tokens(self, prompt: str) -> list[str]:
        return [" card", " arr", "ival", self.say("\n"), " of", " ", prompt[-6:], "."]


STATES = ["completed", "running", "canceled", "errored"]


def make_app(stub: Stub) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def door(request: Request, call_next: Any) -> Response:
        api = request.url.path.startswith(("/api", "/v1"))
        if stub.mode == "locked" and api and request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "this server needs an API key, found none"}}, 401)
        if request.method not in ("GET", "HEAD"):
            body = await request.body()
            kind = request.headers.get("content-type", "")
            stub.asked.append((request.method, request.url.path, json.loads(body) if "json" in kind and body else body))
        answer: Response = await call_next(request)
        return answer

    _add_people(app, stub)
    _add_access(app, stub)
    _add_repositories(app, stub)
    _add_datasets(app, stub)
    _add_jobs(app, stub)
    _add_serving(app, stub)
    add_pages(app)
    return app


def page(items: list[Json]) -> Json:
    return {"items": items, "next": None}


def _add_people(app: FastAPI, stub: Stub) -> None:
    @app.get("/api/me")
    def me() -> Json:
        return {"needs_key": stub.mode == "locked", **stub.me}

    @app.get("/api/info")
    def info() -> Json:
        base = {"name": stub.say("lorikeet-nano"), "parameters": 29_000_000, "context": 1024}
        return {"version": "0.1.0", "base": base, "device": "cpu", "dtype": stub.say("bfloat16"), "home": "~"}


def _add_access(app: FastAPI, stub: Stub) -> None:
    @app.get("/api/keys")
    def keys() -> Json:
        return page(stub.keys)

    @app.post("/api/keys")
    async def create_key(request: Request) -> Json:
        body = await request.json()
        stub.keys.insert(0, stub.key(body["name"], role=body["role"], repositories=body["repositories"]))
        return stub.keys[0] | {"secret": SECRET}

    @app.patch("/api/keys/{key}")
    async def change_key(key: str, request: Request) -> Json:
        found = next(one for one in stub.keys if one["id"] == key)
        found |= await request.json()
        return found

    @app.delete("/api/keys/{key}")
    def revoke(key: str) -> Json:
        found = next(one for one in stub.keys if one["id"] == key)
        found["revoked"] = NOW
        return found

    @app.get("/api/users")
    def users() -> Json:
        return page(stub.users)

    @app.post("/api/users")
    async def create_user(request: Request) -> Json:
        stub.users.append({"id": "u2", "created": NOW, "disabled": None, **await request.json()})
        return stub.users[-1]

    @app.patch("/api/users/{name}")
    async def change_user(name: str, request: Request) -> Json:
        found = next(one for one in stub.users if one["name"] == name)
        found["disabled"] = NOW if (await request.json())["disabled"] else None
        return found

    @app.get("/api/tenants")
    def tenants() -> Json:
        return page(stub.tenants)

    @app.post("/api/tenants")
    async def create_tenant(request: Request) -> Json:
        stub.tenants.append({"id": "t3", "created": NOW, **await request.json()})
        return stub.tenants[-1]

    @app.get("/api/audit")
    def audit(subject_id: str = "", action: str = "", after: int = 0) -> Json:
        found = [stub.change(i) for i in range(60, 0, -1) if not after or i < after]
        found = [one for one in found if subject_id in ("", one["subject_id"]) and action in ("", one["action"])]
        return {"items": found[:50], "next": str(found[49]["id"]) if len(found) > 50 else None}


def _add_repositories(app: FastAPI, stub: Stub) -> None:
    @app.get("/api/repos")
    def repos(contains: str = "") -> Json:
        return page([one for one in stub.repos if contains in one["name"]])

    @app.post("/api/repos")
    def create() -> Json:
        return stub.repos[0]  # type: ignore[no-any-return]

    @app.get("/api/repos/{repo}")
    def repo(repo: str) -> Json:
        return next(one for one in stub.repos if one["name"] == repo)

    @app.get("/api/repos/{repo}/versions/{number}")
    def version(repo: str, number: int) -> Json:
        return stub.version(repo, number)

    @app.put("/api/repos/{repo}/aliases/{alias}")
    async def promote(repo: str, alias: str, request: Request) -> Json:
        number = (await request.json())["version"]
        found = next(one for one in stub.repos if one["name"] == repo)
        found["aliases"] = [one for one in found["aliases"] if one["name"] != alias] + [
            {"name": alias, "number": number}
        ]
        return found["aliases"][-1]  # type: ignore[no-any-return]

    @app.get("/api/repos/{repo}/aliases/{alias}/history")
    def history(repo: str, alias: str) -> Json:
        return page([{"id": 1, "name": alias, "previous": 1, "number": 2, "at": NOW, "by": stub.say("ada")}])

    @app.delete("/api/repos/{repo}/versions/{number}")
    def delete(repo: str, number: int) -> Json:
        found = next(one for one in stub.repos if one["name"] == repo)
        found["versions"] = [one for one in found["versions"] if one["number"] != number]
        return {}


def _add_datasets(app: FastAPI, stub: Stub) -> None:
    @app.get("/api/datasets")
    def datasets() -> Json:
        return page([] if stub.mode == "empty" else [stub.dataset()])

    @app.post("/api/datasets")
    def upload() -> Json:
        return stub.dataset()

    @app.get("/api/datasets/{name}")
    def dataset(name: str) -> Json:
        return stub.dataset()

    @app.post("/api/datasets/{name}/preview")
    async def preview(name: str, request: Request) -> Json:
        return stub.preview(await request.json())


def _add_jobs(app: FastAPI, stub: Stub) -> None:
    @app.get("/api/jobs")
    def jobs() -> Json:
        return page(stub.jobs)

    @app.post("/api/jobs")
    @app.post("/api/demo/{task}/train")
    def start(task: str = "") -> Json:
        stub.jobs.insert(0, stub.job(len(stub.jobs), "running"))
        return stub.jobs[0]  # type: ignore[no-any-return]

    @app.get("/api/jobs/{job}")
    def one_job(job: str) -> Response:
        found = [one for one in stub.jobs if one["id"] == job]
        error = {"error": {"message": stub.say(f"there is no job {job}"), "hint": stub.say("look at the list")}}
        return JSONResponse(found[0] if found else error, 200 if found else 404)

    @app.post("/api/jobs/{job}/{action}")
    def act(job: str, action: str) -> Json:
        found: Json = next(one for one in stub.jobs if one["id"] == job)
        found["state"] = {"cancel": "canceled", "resume": "running"}[action]
        return found

    @app.get("/api/jobs/{job}/metrics")
    def metrics(job: str, after: int = 0) -> Json:
        return page([line for line in stub.lines(int(job[3:])) if line["id"] > after])

    @app.get("/api/jobs/{job}/stream")
    def job_stream(job: str, after: str = "0.0.0") -> StreamingResponse:
        i = int(job[3:])

        async def messages() -> AsyncIterator[str]:
            found = next(one for one in stub.jobs if one["id"] == job)
            yield sse({"type": "state", "job": found})
            for one in stub.events(i):
                yield sse({"type": "event", **one})
            for one in stub.lines(i):
                if one["id"] > int(after.split(".")[1]):
                    yield sse({"type": "metric", **one})
            yield sse({"type": "log", "text": stub.say("2026-01-01 training\n")})
            while found["state"] == "running":
                await asyncio.sleep(0.05)

        return StreamingResponse(messages(), media_type="text/event-stream")


def _add_serving(app: FastAPI, stub: Stub) -> None:
    @app.get("/api/serving/stream")
    def serving() -> StreamingResponse:
        async def messages() -> AsyncIterator[str]:
            for _ in range(600):
                yield sse(stub.serving(time.time()))
                await asyncio.sleep(1)

        return StreamingResponse(messages(), media_type="text/event-stream")

    @app.get("/api/leaderboard")
    def leaderboard(task: str = "", adapters: int = 1000) -> Json:
        tasks = [one for one in stub.leaderboard() if task in ("", one["task"])]
        return {"tasks": [
            one | {"judged": len(one["adapters"]), "adapters": one["adapters"][:adapters]} for one in tasks
        ]}  # fmt: skip

    @app.get("/api/demo")
    def demo() -> Json:
        example = {"text": stub.say("where is my card"), "label": stub.say("card arrival")}
        task = {"task": "intent", "prompt": "Customer: {text}", "completion": " {label}", "metric": "accuracy"}
        return page([task | {"repo": None, "example": example}])

    @app.post("/v1/{kind:path}")
    async def generate(kind: str, request: Request) -> Response:
        body = await request.json()
        if body["model"] == "broken":
            return JSONResponse(
                {"error": {"message": stub.say("there is no adapter 'broken'"), "hint": "see /v1/models"}}, 404
            )
        chat = kind.startswith("chat")
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]

        async def messages() -> AsyncIterator[str]:
            at, tokens = 0, stub.tokens(prompt)
            for i, token in enumerate(tokens):
                p = 0.98 if i % 3 else 0.35
                top = {token: math.log(p), stub.say(" other"): math.log(0.9 * (1 - p))}
                if chat:
                    shown = [{"token": one, "logprob": lp, "bytes": []} for one, lp in top.items()]
                    choice: Json = {
                        "delta": {"content": token},
                        "logprobs": {"content": [{**shown[0], "top_logprobs": shown}]},
                    }
                else:
                    choice = {"text": token, "logprobs": {"tokens": [token], "token_logprobs": [math.log(p)],
                                                          "top_logprobs": [top], "text_offset": [at]}}  # fmt: skip
                if "logprobs" not in body:
                    choice["logprobs"] = None
                at += len(token)
                yield sse(
                    {"choices": [{"index": 0, "finish_reason": "stop" if token == tokens[-1] else None, **choice}]}
                )
                await asyncio.sleep(0.005)
            yield sse({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 17}})
            yield "data: [DONE]\n\n"

        return StreamingResponse(messages(), media_type="text/event-stream")


def sse(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"


@contextmanager
def running(stub: Stub, port: int = 0) -> Iterator[str]:
    """Its address, while it answers from a thread."""
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(
        uvicorn.Config(make_app(stub), log_level="warning", ws="none", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


if __name__ == "__main__":
    with running(Stub(sys.argv[2] if len(sys.argv) > 2 else "plain"), int(sys.argv[1])) as url:
        print(url)
        threading.Event().wait()
