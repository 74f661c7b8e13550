"""Repositories, versions and aliases over HTTP, with the real loader on a tiny base."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.server.hosting import Hosted, own_cache
from tests.server.platforms import up

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    place = tmp_path_factory.mktemp("home")
    with (
        own_cache(tmp_path_factory.mktemp("cache")),
        up(place, str(checkpoint("llama")), max_context=128, max_upload=2**20) as server,
    ):
        yield server


@pytest.fixture
def repo(server: Hosted, request: pytest.FixtureRequest) -> str:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)[:100]
    reply = server.post("/api/repos", {"name": name, "description": "a test's"})
    assert reply.status_code == 201 and reply.json()["versions"] == []
    return name


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def upload(server: Hosted, repo: str, files: dict[str, bytes], **fields: str) -> Any:
    parts = [("files", (name, data, "application/octet-stream")) for name, data in files.items()]
    return server.http.post(f"/api/repos/{repo}/versions", files=parts, data=fields)


def test_a_version_from_its_files(server: Hosted, repo: str, adapters: Callable[..., list[Path]]) -> None:
    files = contents(adapters("llama", 2)[0])
    made = upload(server, repo, files, description="the first")
    assert made.status_code == 201, made.text
    found = server.http.get(f"/api/repos/{repo}/versions/1").json()
    assert found["description"] == "the first" and found["state"] == "ready" and found["source"] == "upload"
    assert {one["path"]: one["bytes"] for one in found["files"]} == {name: len(data) for name, data in files.items()}
    assert server.complete(model=f"{repo}/1", prompt="the", max_tokens=3)["model"] == f"{repo}/1"
    assert server.http.get(f"/api/repos/{repo}").json()["versions"][0]["where"] == "device"
    got = server.http.get(f"/api/repos/{repo}/versions/1/files/{WEIGHTS}")
    assert got.content == files[WEIGHTS] and got.headers["x-content-type-options"] == "nosniff"
    rest = server.http.get(f"/api/repos/{repo}/versions/1/files/{WEIGHTS}", headers={"range": "bytes=100-"})
    assert rest.status_code == 206 and rest.content == files[WEIGHTS][100:]
    assert rest.headers["content-range"] == f"bytes 100-{len(files[WEIGHTS]) - 1}/{len(files[WEIGHTS])}"
    again = upload(server, repo, files).json()
    assert again["number"] == 2 and again["digest"] == found["digest"] and again["manifest"] == found["manifest"]


def test_a_repository_shows_all_its_versions(
    server: Hosted, repo: str, adapters: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorikeet.server.repositories.PAGE", 2)
    for description in "abcde":
        made = upload(server, repo, contents(adapters("llama", 2)[0]), description=description)
        assert made.status_code == 201, made.text
    shown = server.http.get(f"/api/repos/{repo}").json()["versions"]
    assert [one["number"] for one in shown] == [5, 4, 3, 2, 1]


def test_a_retried_upload_is_one_version(server: Hosted, repo: str, adapters: Callable[..., list[Path]]) -> None:
    parts = [("files", (name, data)) for name, data in contents(adapters("llama", 2)[0]).items()]
    path, key = f"/api/repos/{repo}/versions", {"idempotency-key": f"once-{repo}"}
    made = [server.http.post(path, files=parts, headers=key).json()["number"] for _ in range(3)]
    assert made == [1, 1, 1]


def bomb(announced: int) -> bytes:
    """A header that announces more than there is."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [announced], "data_offsets": [0, 4 * announced]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(WEIGHTS, bytes(10_000_000))
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({WEIGHTS: bomb(2**40)}, 422, "truncated"),
        ({WEIGHTS: struct.pack("<Q", 2**62) + bytes(16)}, 422, "header of"),
        ({WEIGHTS: zipped()}, 422, WEIGHTS),
        ({WEIGHTS: None}, 422, WEIGHTS),
        ({CONFIG: None}, 422, CONFIG),
        ({CONFIG: b"{" * 100_000}, 422, CONFIG),
        ({"adapter.zip": zipped()}, 422, "'adapter.zip'"),
        ({"../evil.json": b"{}"}, 422, "evil.json"),
        ({"adapter_model.bin": b"x"}, 422, "'adapter_model.bin'"),
        ({"README.md": bytes(2**20)}, 413, "larger than"),
    ],
)
def test_what_is_no_adapter(
    server: Hosted, repo: str, adapters: Callable[..., list[Path]], change: dict[str, bytes | None], status: int,
    said: str,
) -> None:  # fmt: skip
    files = {name: data for name, data in (contents(adapters("llama", 2)[0]) | change).items() if data is not None}
    reply = upload(server, repo, files)
    assert reply.status_code == status and said in reply.json()["error"]["message"], reply.text
    assert str(server.state.platform.home.folder) not in reply.text  # type: ignore[union-attr]
    assert server.http.get(f"/api/repos/{repo}").json()["versions"] == []
    platform = server.state.platform
    assert platform is not None and not list(platform.blobs.staging.glob("adapter-*"))


def test_an_adapter_of_another_base(server: Hosted, repo: str, adapters: Callable[..., list[Path]]) -> None:
    files = contents(adapters("qwen3", 1)[0])
    reply = upload(server, repo, files)
    assert reply.status_code == 422 and "expected" in reply.json()["error"]["message"]


def test_aliases(server: Hosted, repo: str, adapters: Callable[..., list[Path]]) -> None:
    for folder in adapters("llama", 2):
        assert upload(server, repo, contents(folder)).status_code == 201
    path = f"/api/repos/{repo}/aliases/production"

    def served() -> str:
        model: str = server.complete(model=repo, prompt="the", max_tokens=1)["model"]
        return model

    assert served() in (repo, f"{repo}/2")
    assert server.http.put(path, json={"version": 1}).json()["number"] == 1
    assert server.complete(model=f"{repo}@production", prompt="the", max_tokens=1)
    stale = server.http.put(path, json={"version": 2, "expected": 2})
    assert stale.status_code == 409
    assert server.http.put(path, json={"version": 2, "expected": 1}).status_code == 200
    assert server.http.delete(f"/api/repos/{repo}/versions/2").status_code == 409  # the alias needs it
    assert server.http.delete(path).status_code == 204
    moves = server.http.get(f"{path}/history").json()["items"]
    assert [(one["previous"], one["number"]) for one in moves] == [(2, None), (1, 2), (None, 1)]
    assert server.http.delete(f"/api/repos/{repo}/versions/2").status_code == 204
    assert server.http.get(f"/api/repos/{repo}/versions/2").status_code == 404
    for wrong in ({"version": 0}, {"version": "1"}, {"version": 1, "more": 2}, {}):
        assert server.http.put(path, json=wrong).status_code == 422
    assert server.http.put(path, json={"version": 9}).status_code == 404


def test_merging_and_comparing(server: Hosted, repo: str, adapters: Callable[..., list[Path]]) -> None:
    for folder in (adapters("llama", 4)[0], adapters("llama", 4)[3]):
        assert upload(server, repo, contents(folder)).status_code == 201
    spec = {"adapters": [f"{repo}/1", f"{repo}/2"], "weights": [0.5, 0.5], "method": "cat"}
    made = server.post(f"/api/repos/{repo}/versions", {"merge": spec, "description": "both"})
    assert made.status_code == 201, made.text
    assert made.json()["recipe"]["merge"]["adapters"] == [f"{repo}/1", f"{repo}/2"]
    assert server.complete(model=f"{repo}/3", prompt="the", max_tokens=2)
    told = server.http.get(f"/api/repos/{repo}/versions/1/diff/3").json()
    assert told["first"] == f"{repo}/1" and told["tensors"]["changed"]
    for wrong in ({}, {"merge": spec, "source": "hf://a/b"}, {"merge": spec | {"method": "x"}}, {"source": "local"}):
        assert server.post(f"/api/repos/{repo}/versions", wrong).status_code == 422
    refused = server.post(f"/api/repos/{repo}/versions", {"source": "hf://org/name"})
    assert refused.status_code == 400 and "fetches no adapters from hf" in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "x" * 129, "a\nb", "<b>"])
def test_names_that_are_none(server: Hosted, name: str) -> None:
    assert server.post("/api/repos", {"name": name}).status_code == 400


@pytest.mark.parametrize("path", ["%2e%2e/catalog.db", "..%2f..%2fcatalog.db", "/etc/passwd", "lorikeet.json"])
def test_files_that_are_not_there(server: Hosted, repo: str, adapters: Callable[..., list[Path]], path: str) -> None:
    upload(server, repo, contents(adapters("llama", 2)[0]))
    assert server.http.get(f"/api/repos/{repo}/versions/1/files/{path}").status_code == 404


def test_repositories_are_listed_and_changed(server: Hosted, repo: str) -> None:
    assert server.post("/api/repos", {"name": repo}).status_code == 409
    assert server.post("/api/repos", {"name": repo, "exists_ok": True}).status_code == 201
    listed = server.http.get(f"/api/repos?contains={repo[:20]}&limit=1").json()
    assert listed["items"][0]["name"] == repo
    assert server.http.patch(f"/api/repos/{repo}", json={"description": "<i>"}).json()["description"] == "<i>"
    assert server.http.delete(f"/api/repos/{repo}").status_code == 204
    assert server.http.get(f"/api/repos/{repo}").status_code == 404
    assert server.http.get("/api/repos?sort=x").status_code == 422


def test_a_form_that_is_none(server: Hosted, repo: str) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    reply = server.http.post(f"/api/repos/{repo}/versions", content=b"--y\r\n\r\n", headers=kind)
    assert reply.status_code in (400, 422)
    reply = server.http.post(
        f"/api/repos/{repo}/versions", content=b"", headers={"content-type": "multipart/form-data"}
    )
    assert reply.status_code == 400


def test_a_number_that_is_none(server: Hosted) -> None:
    reply = server.http.get("/api/repos/x/versions/first")
    assert reply.status_code == 422 and reply.json()["error"]["param"] == "number"
    assert "'number' should be a valid integer" in reply.json()["error"]["message"]
    assert "found 'first'" in reply.json()["error"]["message"]
