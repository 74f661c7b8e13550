from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient

from lorikeet.server.pages import UI, Pages, add_pages
from lorikeet.server.replies import json_reply

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def locked() -> None:
    raise AssertionError("files of the page need no key")


@pytest.fixture(scope="module")
def pages() -> Pages:
    return Pages()


@pytest.fixture
def client(pages: Pages) -> Iterator[TestClient]:
    app = FastAPI(openapi_url=None)

    @app.get("/")
    async def root() -> object:
        return json_reply({"name": "lorikeet"})

    add_pages(app, pages)
    with TestClient(app) as client:
        yield client


def policy(reply: httpx.Response) -> dict[str, str]:
    parts = (part.strip().partition(" ") for part in reply.headers["content-security-policy"].split(";"))
    return {name: rest for name, _, rest in parts}


def test_browsers_get_the_page_and_others_the_json_root(client: TestClient) -> None:
    page = client.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "<title>Lorikeet" in page.text
    for accept in ("*/*", "application/json", "text/html;q=0"):
        assert client.get("/", headers={"accept": accept}).json() == {"name": "lorikeet"}
    assert client.head("/", headers=BROWSER).status_code == 200
    assert client.post("/", headers=BROWSER).status_code == 405


def test_the_policy_lets_nothing_inline_or_foreign_run(client: TestClient, pages: Pages) -> None:
    for url in ("/", f"/ui/{pages.version}/app.js"):
        rules = policy(client.get(url, headers=BROWSER))
        assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'" and rules["style-src"] == "'self'"
        assert rules["require-trusted-types-for"] == "'script'" and rules["frame-ancestors"] == "'none'"
        assert "unsafe" not in str(rules)
    page = client.get("/", headers=BROWSER).text
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon[a-z]+=", page)


def test_every_file_that_the_page_and_its_modules_name_is_there(client: TestClient, pages: Pages) -> None:
    page = client.get("/", headers=BROWSER).text
    named = set(re.findall(r'="(ui/[^"]+)"', page))
    assert named and all(name.startswith(f"ui/{pages.version}/") for name in named)
    for name in named:
        assert client.get(f"/{name}").status_code == 200, name
    for path in UI.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', path.read_text()):
            assert name in pages.assets, f"{path.name} imports {name}"
            assert f"ui/{pages.version}/{name}" in named, f"{name} is not preloaded"


def test_files_are_kept_for_ever_and_the_page_is_asked_for_again(client: TestClient, pages: Pages) -> None:
    page = client.get("/", headers=BROWSER)
    assert page.headers["cache-control"] == "no-cache"
    again = client.get("/", headers=BROWSER | {"if-none-match": f'"other", W/{page.headers["etag"]}'})
    assert again.status_code == 304 and not again.content
    asset = client.get(f"/ui/{pages.version}/style.css")
    assert "immutable" in asset.headers["cache-control"] and asset.headers["content-type"].startswith("text/css")
    known = {"if-none-match": asset.headers["etag"]}
    assert client.get(f"/ui/{pages.version}/style.css", headers=known).status_code == 304
    assert client.get("/ui/0123456789abcdef/style.css").status_code == 404


@pytest.mark.parametrize(("accepted", "zipped"), [("gzip, br", True), ("gzip;q=0", False), ("identity", False)])
def test_gzip_where_it_is_taken(client: TestClient, pages: Pages, accepted: str, zipped: bool) -> None:
    with client.stream("GET", f"/ui/{pages.version}/app.js", headers={"accept-encoding": accepted}) as reply:
        raw = b"".join(reply.iter_raw())
    assert (reply.headers.get("content-encoding") == "gzip") is zipped
    assert "Accept-Encoding" in reply.headers["vary"]
    assert (gzip.decompress(raw) if zipped else raw) == (UI / "app.js").read_bytes()


@pytest.mark.parametrize(
    "name", ["../server/pages.py", "%2e%2e/server/pages.py", "..%2fserver%2fpages.py", "/etc/passwd", "index.html", ""]
)
def test_there_is_no_way_out_of_the_folder(client: TestClient, pages: Pages, name: str) -> None:
    assert client.get(f"/ui/{pages.version}/{name}").status_code == 404


def test_another_content_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text('<link href="ui/a.css">')
    (tmp_path / "a.css").write_text("a {}")
    first = Pages(tmp_path)
    (tmp_path / "a.css").write_text("b {}")
    second = Pages(tmp_path)
    assert first.version != second.version and first.index.etag != second.index.etag


def test_no_key_is_asked_for_the_page(pages: Pages) -> None:
    app = FastAPI(openapi_url=None, dependencies=[Depends(locked)])
    add_pages(app, pages)
    client = TestClient(app)
    assert client.get("/", headers=BROWSER).status_code == 200
    assert client.get(f"/ui/{pages.version}/app.js").status_code == 200


def test_what_a_visit_costs(pages: Pages) -> None:
    """Everything, charts and all, within the budget of 300 KB."""
    assets = [pages.index, *(asset for name, asset in pages.assets.items())]
    assert sum(len(asset.zipped or asset.content) for asset in assets) < 300_000 / 3
