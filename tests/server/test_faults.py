"""What goes wrong with one adapter is told to its own requests, leaves nothing behind and disturbs nobody."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import resource
import shutil
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file, save_file
from tests.adapters.servers import FileServer, file_server, publish
from tests.server.hosting import Hosted, hosted, own_cache

from lorikeet.adapters.compiled import compiled_name
from lorikeet.adapters.files import CONFIG, WEIGHTS, AdapterFile
from lorikeet.config import SourceConfig
from lorikeet.engine.wire import Resolve

PROMPT = {"prompt": "the quick brown fox", "max_tokens": 6, "temperature": 0}
ALIGNMENT = 64


@dataclass
class World:
    """A server with the real engine, the hub that it fetches from, and what its adapters are made of."""

    server: Hosted
    hub: FileServer
    root: Path
    cache: Path
    originals: list[Path]

    def put(self, name: str, change: Callable[[Path], None] = lambda folder: None, original: int = 1) -> Path:
        """A changed copy of an adapter under a new name."""
        fresh = Path(shutil.copytree(self.originals[original], self.root / f".{name}"))
        change(fresh)
        return fresh.rename(self.root / name)

    def post(self, model: str, **more: Any) -> httpx.Response:
        return self.server.post("/v1/completions", {"model": model, **PROMPT, **more})

    def text(self, model: str) -> str:
        reply = self.post(model)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    def error(self, model: str, status: int, *said: str) -> Any:
        """The error of a request; its text holds all of `said`."""
        reply = self.post(model)
        assert reply.status_code == status, reply.text
        error = reply.json()["error"]
        text = f"{error['message']} {error['hint']}"
        assert all(part in text for part in said), text
        return error

    def ask(self, answer: Any) -> Any:
        """What a coroutine of the server comes to."""
        return asyncio.run_coroutine_threadsafe(answer, self.server.loop).result(30)

    def stats(self) -> Any:
        return self.ask(self.server.state.engine.stats())

    def leftovers(self) -> dict[str, Any]:
        """Whatever is still there of requests that have ended."""
        engine, stats = self.server.state.engine, self.stats()
        resident = sum(-(-one.bytes // ALIGNMENT) * ALIGNMENT for one in stats.adapters if one.resident)
        assert engine.pid is not None
        pids = (os.getpid(), engine.pid, self.ask(engine.loader_pid()))
        places = (str(self.root), str(self.cache))
        left = {
            "requests": stats.running + stats.waiting + engine.in_flight,
            "blocks": stats.blocks_total - stats.blocks_free,
            "slab bytes": stats.slab_used - resident,
            "jobs": [*engine._jobs, *engine._resolving],
            "downloads": [*self.server.state.models._fetcher._running],
            "files": [str(path) for path in self.cache.rglob(".*")] + [*self.root.glob(".*")],
            "open files": [path for pid in pids for path in open_files(pid) if path.startswith(places)],
            "mapped files": [pid for pid in pids if ".lorikeet" in Path(f"/proc/{pid}/maps").read_text()],
        }
        return {what: found for what, found in left.items() if found}


def open_files(pid: int) -> Iterator[str]:
    for one in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield os.readlink(one)
        except FileNotFoundError:
            continue  # it was closed meanwhile


@pytest.fixture(scope="module")
def whole(
    checkpoint: Callable[..., Path], adapters: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    originals = adapters("llama", 4)
    root, cache = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("cache")
    shutil.copytree(originals[0], root / "bystander")
    settings = {
        "adapter_sources": ("hf", "https"),
        "sources": SourceConfig(total_seconds=20, backoff_seconds=0.01, longest_backoff=0.05, attempts=3),
    }
    with (
        file_server() as hub,
        pytest.MonkeyPatch.context() as patch,
        own_cache(cache),
    ):
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.get_token", lambda: None)
        with hosted(
            checkpoint("llama"), root, serve_settings=settings, max_context=128, queue=2000, max_seqs=16
        ) as server:
            yield World(server, hub, root, cache, originals)


@pytest.fixture
def world(whole: World) -> Iterator[World]:
    """While a test runs two clients go on asking for another adapter; afterwards nothing is left of it."""
    expected = whole.text("bystander")
    stop, answers = threading.Event(), list[Any]()

    def ask_on() -> None:
        with httpx.Client(base_url=whole.server.url, timeout=60) as http:
            while not stop.is_set():
                reply = http.post("/v1/completions", json={"model": "bystander", **PROMPT})
                answers.append(reply.json()["choices"][0]["text"] if reply.status_code == 200 else reply.text)

    threads = [threading.Thread(target=ask_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not answers:
        time.sleep(0.001)
    restarts = whole.server.state.engine.restarts
    try:
        yield whole
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
        for folder in whole.root.iterdir():
            if folder.name != "bystander":
                shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
    assert set(answers) == {expected}, "another request was disturbed"
    assert whole.server.state.engine.restarts == restarts
    until = time.monotonic() + 10
    while left := whole.leftovers():
        assert time.monotonic() < until, left
        time.sleep(0.05)


# --- on the way here ------------------------------------------------------------------------------------------------


def published(world: World, name: str, change: Callable[[dict[str, bytes]], None] = lambda files: None) -> str:
    """Put an adapter on the hub; the path of its weights there."""
    files = {path.name: path.read_bytes() for path in world.originals[2].iterdir()}
    change(files)
    return f"/cdn/{publish(world.hub, name, files)}/{WEIGHTS}"


def test_a_source_dies_midway(world: World) -> None:
    path = published(world, "org/dies")
    world.hub.drop_after = [5000, 0, 0, 0, 0]
    error = world.error("hf://org/dies", 502, WEIGHTS, "5000 of", "3 times in a row", "try again")
    assert (error["code"], error["retryable"]) == ("source_failed", True)
    world.hub.drop_after.clear()
    world.put("same", original=2)
    assert world.text("hf://org/dies") == world.text("same")
    assert world.hub.requests[-1][2]["range"] == "bytes=5000-", "what had come was not used"
    assert world.hub.sent[path] == len(world.hub.files[path])


def test_the_disk_is_full_while_it_comes(world: World, full_disk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    published(world, "org/large", lambda files: files.update({CONFIG: files[CONFIG] + b"  "}))
    error = world.error("hf://org/large", 507, "the disk of", "is full")
    assert (error["code"], error["retryable"]) == ("disk_full", True)
    monkeypatch.undo()
    assert world.text("hf://org/large")


class Full(io.FileIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more can be written of a download."""
    usual = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        if path.parent.name == "partial" and mode in ("wb", "r+b"):
            return Full(path, mode.replace("b", ""))
        return usual(path, mode, *args, **more)

    monkeypatch.setattr(Path, "open", opened)


def test_what_it_announces_is_refused_before_it_comes(world: World) -> None:
    def claims(files: dict[str, bytes]) -> None:
        files[WEIGHTS] = struct.pack("<Q", 10 * 10**9) + files[WEIGHTS][8:]

    path = published(world, "org/claims", claims)
    world.error("hf://org/claims", 422, WEIGHTS, "10000000000 bytes")
    assert world.hub.asked("GET", path) == 1
    world.hub.headers = {"content-encoding": "gzip"}
    try:
        published(world, "org/packed", lambda files: files.update({CONFIG: files[CONFIG] + b" "}))
        world.error("hf://org/packed", 502, "'gzip'", "expected none")
    finally:
        world.hub.headers = {}
    world.error("https://127.0.0.1:1/a", 400, "loopback address", "--allow-private-sources")


# --- what is in it --------------------------------------------------------------------------------------------------


def with_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return changed


def filled(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if "q_proj.lora_B" in name)
        tensors[name] = tensors[name].copy()
        tensors[name][0, 0] = value

    return with_tensors(change)


def renamed(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.../../../etc/passwd.lora_A.weight"] = tensors.pop(next(iter(tensors)))


def header(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


def zipped(folder: Path) -> None:
    """A gigabyte of zeros in a megabyte."""
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("zeros", "w") as file:
        for _ in range(64):
            file.write(bytes(2**20))
    (folder / "bomb.zip").rename(folder / WEIGHTS)


def with_config(**fields: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return changed


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "nan": (filled(float("nan")), ["q_proj.lora_B.weight", "1 of", "NaN or infinite"]),
    "infinity": (filled(float("-inf")), ["q_proj.lora_B.weight", "NaN or infinite"]),
    "claims": (lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10 * 10**9) + bytes(100)),
               [WEIGHTS, "header of 10000000000 bytes"]),
    "endless": (header(b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'),
                ["needs 73786976294838206464 bytes"]),
    "deep": (header(b"[" * 10**6), ["header is not valid"]),
    "deep-config": (lambda folder: (folder / CONFIG).write_text("[" * 10**6), [CONFIG]),
    "vast-config": (lambda folder: (folder / CONFIG).write_text(" " * 2**26), [CONFIG, "67108864 bytes"]),
    "zip": (zipped, [WEIGHTS]),
    "climbing-tensor": (with_tensors(renamed), ["../../../etc/passwd", "not supported"]),
    "climbing-target": (with_config(target_modules=["../../../etc/passwd"]), ["target_modules"]),
    "climbing-module": (with_config(modules_to_save=["/etc/passwd"]), ["modules_to_save", "/etc/passwd"]),
    "elsewhere": (with_config(lora_path="/etc/passwd"), ["lora_path"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_its_files_is_named(world: World, name: str) -> None:
    change, said = BROKEN[name]
    world.put(name, change)
    for _ in range(2):
        assert world.error(name, 422, *said)["code"] in ("invalid_adapter", "unsupported_field")
    shutil.rmtree(world.root / name)
    world.put(name)
    world.put("whole")
    assert world.text(name) == world.text("whole"), "the name is not served again once its files are whole"


def test_paths_in_its_config_are_never_opened(world: World, tmp_path: Path) -> None:
    """Whoever opened these pipes would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "config.json")
    world.put("whole")
    for i, path in enumerate((tmp_path / "pipe", tmp_path / "folder", "../../../../../etc/passwd")):
        world.put(f"path-{i}", with_config(base_model_name_or_path=str(path), revision=str(path)))
        assert world.text(f"path-{i}") == world.text("whole")


def test_names_are_no_paths(world: World) -> None:
    for name in ("../bystander", "/etc", "..", "bystander/../bystander", "bystander/.", "%2e%2e", str(world.root)):
        assert world.error(name, 404, "no model or adapter")["code"] == "model_not_found"


def test_links_out_of_the_folder_are_not_followed(world: World, tmp_path: Path) -> None:
    for i, name in enumerate((WEIGHTS, CONFIG)):
        outside = tmp_path / name
        shutil.copy(world.originals[1] / name, outside)

        def link(folder: Path, name: str = name, outside: Path = outside) -> None:
            (folder / name).unlink()
            (folder / name).symlink_to(outside)

        world.put(f"link-{i}", link)
        world.error(f"link-{i}", 404, f"its {name} is a link that leads out of the folder")
        folder = world.put(f"later-{i}")
        assert world.text(f"later-{i}")
        link(folder)
        world.error(f"later-{i}", 404, f"its {name} is a link that leads out of the folder")


# --- what happens to its files ----------------------------------------------------------------------------------------


def test_the_disk_is_full_while_it_is_compiled(world: World) -> None:
    folder = world.put("fits-not", with_config(lora_alpha=17.0))
    with AdapterFile(folder) as file:
        digest = file.load()[1]
    name = compiled_name(digest, world.server.state.info.base, "float32")
    compiled = next(path for path in world.cache.rglob("*.lorikeet")).parent
    loader = world.ask(world.server.state.engine.loader_pid())
    (compiled / f".{name}.{loader}").symlink_to("/dev/full")  # where the loader writes before it renames
    error = world.error("fits-not", 507, "the disk of", "is full")
    assert (error["code"], error["retryable"]) == ("disk_full", True)
    assert world.text("fits-not")
    assert world.ask(world.server.state.engine.loader_pid()) == loader


def test_a_file_is_deleted_between_check_and_load(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, engine = world.put("vanishes"), world.server.state.engine
    usual = engine.resolve

    async def deleted(where: Path, version: object = None) -> Any:
        if where.name == "vanishes":
            (where / WEIGHTS).unlink(missing_ok=True)
        return await usual(where, version)

    monkeypatch.setattr(engine, "resolve", deleted)
    world.error("vanishes", 422, WEIGHTS, "is missing")
    monkeypatch.undo()
    shutil.copy(world.originals[1] / WEIGHTS, folder)
    assert world.text("vanishes")


@pytest.mark.parametrize("damage", ["deleted", "cut", "another"])
def test_a_compiled_file_is_gone_when_the_engine_comes_to_it(
    world: World, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made again, and the request does not notice."""
    alpha = {"deleted": 21.0, "cut": 22.0, "another": 23.0}[damage]
    world.put("lost", with_config(lora_alpha=alpha))
    engine = world.server.state.engine
    usual, damaged = engine.submit, list[str]()

    async def submit(request: Any, folder: Path | None = None) -> Any:
        adapter = engine._held.get(str(request.adapter))
        if folder is not None and folder.name == "lost" and adapter is not None and not damaged:
            path = Path(adapter.path)
            damaged.append(str(path))
            content = path.read_bytes()
            path.unlink()
            if damage != "deleted":
                path.write_bytes(content[:100] if damage == "cut" else content[:-64] + bytes(64))
            if damage == "another":
                other = next(one for one in path.parent.glob("*.lorikeet") if one != path)
                path.write_bytes(other.read_bytes())
        return await usual(request, folder)

    monkeypatch.setattr(engine, "submit", submit)
    first = world.text("lost")
    assert damaged
    monkeypatch.undo()
    assert first == world.text("lost")
    world.put("again", with_config(lora_alpha=alpha))
    assert first == world.text("again")


def two_versions(world: World) -> dict[str, str]:
    """Adapters `one` and `two` of one shape with other weights and another alpha; what they answer. The weights of one
    with the alpha of the other would answer something else."""

    def negated(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = -tensors[name] if "lora_B" in name else tensors[name]

    made = {
        "one": (4.0, with_tensors(lambda tensors: None)),
        "two": (64.0, with_tensors(negated)),
        "mixed-one": (64.0, with_tensors(lambda tensors: None)),
        "mixed-two": (4.0, with_tensors(negated)),
    }
    for name, (alpha, change) in made.items():
        change(world.put(name, with_config(lora_alpha=alpha), original=2))
    texts = {name: world.text(name) for name in made}
    assert len(set(texts.values())) == 4
    return {name: texts[name] for name in ("one", "two")}


def test_replaced_under_traffic_nobody_sees_a_mixture(world: World) -> None:
    """Two versions that differ in config and weights take turns under one name, each time as new files."""
    texts = two_versions(world)
    shutil.copytree(world.root / "one", world.root / "changing")
    stop, seen = threading.Event(), list[tuple[int, str]]()

    def ask_on() -> None:
        with httpx.Client(base_url=world.server.url, timeout=60) as http:
            while not stop.is_set():
                reply = http.post("/v1/completions", json={"model": "changing", **PROMPT})
                body = reply.json()
                text = body["choices"][0]["text"] if reply.status_code == 200 else body["error"]["code"]
                seen.append((reply.status_code, text))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask_on) for _ in range(4)]
        for turn in range(30):
            fresh = Path(shutil.copytree(world.root / ("two", "one")[turn % 2], world.root / ".fresh"))
            (world.root / "changing").rename(world.root / ".old")
            fresh.rename(world.root / "changing")
            shutil.rmtree(world.root / ".old")
            time.sleep(0.01 * (turn % 8))
        stop.set()
        for one in asking:
            one.result(60)
    answered = {text for status, text in seen if status == 200}
    assert answered <= set(texts.values()) and len(answered) == 2, answered
    failures = {said for said in seen if said[0] != 200}
    assert failures <= {(404, "model_not_found"), (503, "unavailable")}, failures  # between the two renames
    assert world.text("changing") == texts["one"]


def test_files_that_are_replaced_one_by_one_while_they_are_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader comes when one file of two is new; a third request joins a reading that began before that."""
    texts = two_versions(world)
    folder = Path(shutil.copytree(world.root / "one", world.root / "written"))
    engine = world.server.state.engine
    usual, read = engine.resolve, list[Path]()

    async def resolve(where: Path, version: object = None) -> Any:
        if where == folder and not read:
            read.append(where)
            shutil.copy(world.root / "two" / CONFIG, folder)
            adapter = await usual(where, version)
            shutil.copy(world.root / "two" / WEIGHTS, folder)
            return adapter
        return await usual(where, version)

    monkeypatch.setattr(engine, "resolve", resolve)
    assert world.text("written") == texts["two"] and read
    assert world.text("written") == texts["two"]


def test_what_is_replaced_without_end_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, engine = world.put("restless"), world.server.state.engine
    usual = engine.resolve

    async def resolve(where: Path, version: object = None) -> Any:
        adapter = await usual(where, version)
        os.utime(folder / CONFIG)
        return adapter

    monkeypatch.setattr(engine, "resolve", resolve)
    error = world.error("restless", 503, "'restless' were replaced while they were read", "rename it into place")
    assert error["retryable"] is True
    monkeypatch.undo()
    assert world.text("restless")


# --- many at once, and one that is in use ----------------------------------------------------------------------------


def test_a_thousand_requests_for_one_cold_adapter_are_one_load(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.put("crowd", with_config(lora_alpha=33.0))
    engine = world.server.state.engine
    usual, sent = engine._send, list[Any]()
    monkeypatch.setattr(engine, "_send", lambda message: (sent.append(message), usual(message)))

    body = json.dumps({"model": "crowd", "prompt": "the quick", "max_tokens": 1}).encode()
    # Both ends of each connection are open files of this process, which may not be allowed two thousand.
    clients = min(1000, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 200) // 2)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
    host, port = world.server.url.removeprefix("http://").split(":")

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        status = (await reader.read()).partition(b"\r\n")[0]
        writer.close()
        return status

    async def run() -> list[bytes]:
        return await asyncio.gather(*(one() for _ in range(clients)))

    assert set(asyncio.run(run())) == {b"HTTP/1.1 200 OK"}
    assert sum(isinstance(message, Resolve) for message in sent) == 1
    described = world.server.http.get("/v1/adapters/crowd").json()
    assert (described["hits"], described["tier"], described["running"]) == (clients, "device", 0)


def test_unloading_what_is_in_use_is_refused_and_its_requests_go_on(world: World) -> None:
    world.put("busy")
    body = {"model": "busy", "prompt": "the quick", "max_tokens": 100, "temperature": 0, "ignore_eos": True, "n": 8}
    expected = [choice["text"] for choice in world.server.post("/v1/completions", body).json()["choices"]]
    texts = [""] * 8
    with world.server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        lines = (line[6:] for line in reply.iter_lines() if line.startswith("data: "))
        refused = None
        for line in lines:
            refused = refused or world.server.post("/v1/adapters/busy/unload", {})
            for choice in [] if line == "[DONE]" else json.loads(line)["choices"]:
                texts[choice["index"]] += choice["text"]
    assert texts == expected and refused is not None
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (409, "adapter_in_use"), refused.text
    assert "8 requests run on it" in error["message"]
    assert world.server.post("/v1/adapters/busy/unload", {}).json()["tier"] == "disk"


def test_what_is_listed_of_an_adapter(world: World) -> None:
    world.put("told", with_config(lora_alpha=41.0))
    world.text("told")
    listed = {one["name"]: one for one in world.server.http.get("/v1/adapters").json()["data"]}
    told = listed["told"]
    assert (told["tier"], told["kind"], told["max_rank"], told["hits"]) == ("device", "lora", 2, 1)
    assert told["bytes"] > 0 and time.time() - 60 < told["last_used"] <= time.time()
