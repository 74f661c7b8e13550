"""Debian's Chromium for the tests of the page, and the servers they look at."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the page is tested with playwright: pip install -e '.[dev]'")

from playwright.sync_api import Browser, Page, sync_playwright
from tests.ui.stub import Stub, running

Open = Callable[..., Page]
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
NO_BROWSER = "Debian's chromium is not installed: scripts/install_chromium.sh"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip(NO_BROWSER)
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, as which containers run tests
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        with playwright.chromium.launch(executable_path=path, args=arguments) as found:
            yield found


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """`open_page(url, width=1440, scheme="light", strict=True)`: a page; a strict one fails the test when it complains
    of anything."""
    contexts = []
    complaints: list[str] = []

    def open_(url: str, *, width: int = 1440, scheme: str = "light", strict: bool = True) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce",
            permissions=["clipboard-read", "clipboard-write"],
        )  # fmt: skip
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        if not strict:
            page.goto(url)
            return page
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if is_complaint(said.type, said.text) else None)
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not complaints, complaints


def is_complaint(kind: str, text: str) -> bool:
    """Errors and broken policies; that a request was answered with an error is the page's to show."""
    return kind == "error" and not text.startswith("Failed to load resource")


@pytest.fixture(scope="session")
def stub_urls() -> Iterator[Callable[[str], str]]:
    """`stub_urls(mode)`: the address of a stub that tests only look at."""
    with ExitStack() as stack:
        urls = {mode: stack.enter_context(running(Stub(mode))) for mode in ("plain", "hostile", "empty", "many")}
        yield urls.__getitem__


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    """One of this test's own, to change."""
    made = Stub()
    with running(made) as url:
        yield made, url


@pytest.fixture(scope="session")
def live_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`lorikeet up` with an empty home: the embedded base, real training."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    log = home / "server.log"
    command = [sys.executable, "-m", "lorikeet", "up", "--home", str(home / "up"), "--port", str(port)]
    limits = ["--threads", "1", "--job-threads", "1", "--kv-memory", "64MiB", "--adapter-memory", "64MiB"]
    with log.open("w") as out:
        server = subprocess.Popen([*command, *limits], stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not answers(f"{url}/health/ready"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(40)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def violations(page: Page) -> list[str]:
    """What axe-core finds wrong with the page as it is, one line each."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(AXE.read_text())
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {json.dumps([node['target'] for node in one['nodes']][:3])} {one['nodes'][0]['failureSummary']}"
        for one in found["violations"]
    ]
