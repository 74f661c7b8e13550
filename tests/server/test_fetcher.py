"""Adapters that requests name by their source: who may have them, how often they are fetched, what a hang holds."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.servers import FileServer, file_server, publish
from tests.server.hosting import Hosted, hosted, own_cache

from lorikeet.adapters.configs import CONFIG
from lorikeet.adapters.files import WEIGHTS
from lorikeet.adapters.references import Credentials, parse
from lorikeet.config import SourceConfig
from lorikeet.errors import DeadlineError, LorikeetError, NotFoundError, SourceRefusedError
from lorikeet.server import fetcher as fetching
from lorikeet.server.fetcher import Fetcher

ALICE, BOB = Credentials("token-of-alice"), Credentials("token-of-bob")
NOBODY = Credentials()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with file_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        yield server


def files(size: int = 100_000) -> dict[str, bytes]:
    return {CONFIG: b"{}", WEIGHTS: (16).to_bytes(8, "little") + b"{}".ljust(16) + bytes(size - 24)}


def make(folder: Path, clock: Callable[[], float] = time.monotonic, **settings: Any) -> Fetcher:
    config = SourceConfig(**{"allow_private": True, "backoff_seconds": 0.01, "total_seconds": 20.0, **settings})
    return Fetcher(("hf", "https"), folder / "downloads", config, clock)


def get(fetcher: Fetcher, reference: str, credentials: Credentials = NOBODY) -> Path:
    return asyncio.run(fetcher.folder(parse(reference), credentials))


def test_a_thousand_requests_are_one_download(hub: FileServer, tmp_path: Path) -> None:
    commit = publish(hub, "org/name", files())
    fetcher = make(tmp_path)

    async def run() -> list[Path]:
        reference = parse("hf://org/name")
        return await asyncio.gather(*(fetcher.folder(reference, NOBODY) for _ in range(1000)))

    assert len(set(asyncio.run(run()))) == 1
    assert hub.asked("GET", f"/cdn/{commit}/{WEIGHTS}") == 1 and hub.sent[f"/cdn/{commit}/{WEIGHTS}"] == 100_000
    assert hub.asked("GET", "/api/models/org/name/revision/main") == 1


def test_what_one_loaded_another_does_not_see(hub: FileServer, tmp_path: Path) -> None:
    commit = publish(hub, "org/name", files(), private_to={"token-of-alice"})
    fetcher, clock = make(tmp_path, clock := Clock()), clock
    folder = get(fetcher, "hf://org/name", ALICE)
    for credentials in (BOB, NOBODY):
        with pytest.raises(NotFoundError, match="or not for these credentials"):
            get(fetcher, "hf://org/name", credentials)
        with pytest.raises(NotFoundError):
            get(fetcher, f"hf://org/name@{commit}", credentials)
    clock.now += fetching.DENIED_SECONDS
    hub.tokens["/org/name/"] = hub.tokens["/api/models/org/name/"] = {"token-of-alice", "token-of-bob"}
    assert get(fetcher, "hf://org/name", BOB) == folder  # granted, and not downloaded again
    assert hub.asked("GET", f"/cdn/{commit}/{WEIGHTS}") == 1


def test_access_that_is_withdrawn_ends_soon(hub: FileServer, tmp_path: Path) -> None:
    publish(hub, "org/name", files(), private_to={"token-of-alice"})
    fetcher = make(tmp_path, clock := Clock())
    get(fetcher, "hf://org/name", ALICE)
    asked = len(hub.requests)
    get(fetcher, "hf://org/name", ALICE)
    assert len(hub.requests) == asked
    hub.tokens["/org/name/"] = hub.tokens["/api/models/org/name/"] = set()
    clock.now += fetching.ALLOWED_SECONDS
    with pytest.raises(NotFoundError):
        get(fetcher, "hf://org/name", ALICE)


def test_a_new_version_is_found(hub: FileServer, tmp_path: Path) -> None:
    publish(hub, "org/name", files())
    fetcher = make(tmp_path, clock := Clock())
    first = get(fetcher, "hf://org/name")
    publish(hub, "org/name", files(200_000))
    assert get(fetcher, "hf://org/name") == first
    clock.now += fetching.ALLOWED_SECONDS
    assert get(fetcher, "hf://org/name") != first


def test_an_adapter_that_was_removed_is_fetched_again(hub: FileServer, tmp_path: Path) -> None:
    import shutil

    publish(hub, "org/name", files())
    fetcher = make(tmp_path)
    folder = get(fetcher, "hf://org/name")
    shutil.rmtree(tmp_path / "downloads")
    assert get(fetcher, "hf://org/name") == folder and (folder / WEIGHTS).stat().st_size == 100_000


def test_a_place_that_hangs_holds_its_own_requests_alone(tmp_path: Path) -> None:
    """Far more requests hang than there are threads for their place; another place answers meanwhile."""
    with file_server() as bad, file_server() as good:
        good.files |= {f"/a/{name}": data for name, data in files().items()}
        bad.hanging |= {f"/{i}/{CONFIG}" for i in range(100)}
        fetcher = make(tmp_path, total_seconds=1.5, stall_seconds=30)

        async def run() -> tuple[Path, list[Any]]:
            hanging = [asyncio.ensure_future(fetcher.folder(parse(f"{bad.url}/{i}"), NOBODY)) for i in range(100)]
            await asyncio.sleep(0.2)
            assert sum(one.name == "look https" for one in threading.enumerate()) <= fetching.LOOKS
            folder = await asyncio.wait_for(fetcher.folder(parse(f"{good.url}/a"), NOBODY), 1.0)
            assert not any(one.done() for one in hanging)
            return folder, await asyncio.gather(*hanging, return_exceptions=True)

        folder, errors = asyncio.run(run())
        assert folder.is_dir() and all(isinstance(error, DeadlineError) for error in errors)
        assert len(bad.requests) <= 2 * fetching.LOOKS


def test_who_leaves_takes_nobody_along(hub: FileServer, tmp_path: Path) -> None:
    publish(hub, "org/name", files())
    fetcher = make(tmp_path)

    async def run() -> Path:
        first = asyncio.ensure_future(fetcher.folder(parse("hf://org/name"), NOBODY))
        second = asyncio.ensure_future(fetcher.folder(parse("hf://org/name"), NOBODY))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(run()).is_dir()


def test_what_is_not_switched_on_is_refused(tmp_path: Path) -> None:
    fetcher = make(tmp_path)
    with pytest.raises(SourceRefusedError, match=r"from s3 \(start it with --adapter-sources hf,https,s3"):
        get(fetcher, "s3://bucket/a")
    with pytest.raises(SourceRefusedError, match="requests name no paths of this machine"):
        get(fetcher, f"file://{tmp_path}")


def test_answers_about_access_are_bounded(hub: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "REMEMBERED", 5)
    fetcher = make(tmp_path)
    for i in range(12):
        with pytest.raises(NotFoundError):
            get(fetcher, f"hf://org/none-{i}")
    assert len(fetcher._seen) == 5 and fetcher._running == {}


def test_errors_are_those_of_the_adapter_alone(hub: FileServer, tmp_path: Path) -> None:
    publish(hub, "org/good", files())
    publish(hub, "org/bad", {CONFIG: b"{}", WEIGHTS: (10**10).to_bytes(8, "little") + bytes(1000)})
    fetcher = make(tmp_path)

    async def run() -> list[Any]:
        names = ["org/bad", "org/good"] * 20
        calls = (fetcher.folder(parse(f"hf://{name}"), NOBODY) for name in names)
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = asyncio.run(run())
    assert all(isinstance(one, LorikeetError) and "10000000000 bytes" in str(one) for one in outcomes[::2])
    assert len(set(outcomes[1::2])) == 1


# --- over HTTP ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Hosted, FileServer]]:
    """The real engine, with a hub that holds two of its adapters; one of them is private to alice."""
    one, two = adapters("llama", 2)
    settings = {
        "adapter_sources": ("hf", "https"),
        "sources": SourceConfig(total_seconds=20, backoff_seconds=0.01),
    }
    with (
        file_server() as hub,
        pytest.MonkeyPatch.context() as patch,
        own_cache(tmp_path_factory.mktemp("cache")),
    ):
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.get_token", lambda: None)
        publish(hub, "org/open", {path.name: path.read_bytes() for path in one.iterdir()})
        publish(hub, "org/private", {path.name: path.read_bytes() for path in two.iterdir()},
                private_to={"token-of-alice"})  # fmt: skip
        with hosted(checkpoint("llama"), one.parent, serve_settings=settings, max_context=128) as server:
            yield server, hub


PROMPT = {"prompt": "the quick brown fox", "max_tokens": 6, "temperature": 0}


def test_a_model_of_the_hub_answers_as_the_same_files_here(served: tuple[Hosted, FileServer]) -> None:
    server, _ = served
    local = server.complete(model="adapter-00", **PROMPT)
    remote = server.complete(model="hf://org/open", **PROMPT)
    assert remote["choices"][0]["text"] == local["choices"][0]["text"] and remote["model"] == "hf://org/open"
    assert server.complete(**PROMPT)["choices"][0]["text"] != local["choices"][0]["text"]


def test_lorax_names_the_source_beside_the_adapter(served: tuple[Hosted, FileServer]) -> None:
    server, _ = served
    local = server.complete(model="adapter-01", **PROMPT)["choices"][0]["text"]
    parameters = {"adapter_id": "org/private", "adapter_source": "hub", "max_new_tokens": 6}
    reply = server.post("/generate", {"inputs": PROMPT["prompt"],
                                      "parameters": {**parameters, "api_token": "token-of-alice"}})  # fmt: skip
    assert reply.status_code == 200 and reply.json()["generated_text"] == local
    assert (reply.headers["x-adapter-id"], reply.headers["x-adapter-source"]) == ("org/private", "hf")
    for more in ({}, {"api_token": "token-of-bob"}):
        refused = server.post("/generate", {"inputs": PROMPT["prompt"], "parameters": {**parameters, **more}})
        assert refused.status_code == 404 and refused.json()["error_type"] == "not_found"


def test_a_private_adapter_is_its_tenants_alone(
    served: tuple[Hosted, FileServer], caplog: pytest.LogCaptureFixture
) -> None:
    server, _ = served
    caplog.set_level(logging.DEBUG)
    body = {"model": "hf://org/private", **PROMPT}
    assert server.complete(**body, api_token="token-of-alice")["choices"][0]["text"]
    for more in ({}, {"api_token": "token-of-bob"}):
        reply = server.post("/v1/completions", {**body, **more})
        assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"
        assert "token-of" not in reply.text
    listed = server.http.get("/v1/models").text
    assert "org/private" not in listed and "token-of" not in caplog.text


def test_what_is_refused_over_http(served: tuple[Hosted, FileServer]) -> None:
    server, _ = served
    wrong = {
        "s3://bucket/a": "--adapter-sources hf,https,s3",
        "https://127.0.0.1/a": "loopback address",
        "https://169.254.169.254/latest": "link-local address",
        "http://example.com/a": "expected https://",
        "file:///etc": "paths of this machine",
        "hf://org/../x": "expected hf://org/name",
    }
    for model, said in wrong.items():
        reply = server.post("/v1/completions", {"model": model, **PROMPT})
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "source_refused"), reply.text
        assert said in f"{error['message']} {error['hint']}"


def test_a_token_is_for_adapters_that_are_fetched_and_is_never_repeated(served: tuple[Hosted, FileServer]) -> None:
    server, _ = served
    for token, status in (("token-of-alice", 400), (["token-of-alice"], 422), ("token\nof-alice", 400)):
        model = "hf://org/open" if "\n" in token else "adapter-00"
        reply = server.post("/v1/completions", {"model": model, "api_token": token, **PROMPT})
        assert reply.status_code == status and reply.json()["error"]["param"] == "api_token", reply.text
        assert "of-alice" not in reply.text


def test_a_hub_that_hangs_is_a_504_and_nobody_else_waits(served: tuple[Hosted, FileServer]) -> None:
    server, hub = served
    hub.hanging.add("/api/models/org/hangs/revision/main")
    server.state.models._fetcher.config = SourceConfig(total_seconds=0.5)
    try:
        answers: list[Any] = []
        body = {"model": "hf://org/hangs", **PROMPT}
        thread = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
        thread.start()
        server.complete(model="adapter-00", **PROMPT)
        thread.join(10)
        assert answers[0].status_code == 504 and answers[0].json()["error"]["retryable"] is True
    finally:
        server.state.models._fetcher.config = SourceConfig(total_seconds=20)


def test_metrics_do_not_grow_with_the_names_that_clients_invent(served: tuple[Hosted, FileServer]) -> None:
    server, _ = served
    server.complete(model="hf://org/open@main", **PROMPT)
    page = server.http.get("/metrics").text
    assert '"(hf)"' in page and "org/open" not in page
