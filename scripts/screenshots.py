"""The pictures of the README: each page of a running `lorikeet up`, as Chromium shows it.

    lorikeet up &
    python scripts/screenshots.py --prepare        # trains some of the demo's adapters first, and waits for them
    python scripts/screenshots.py                  # of whatever the server has

The last one, of Access, makes keys: from then on the server asks for one, which $LORIKEET_API_KEY holds.

Needs Debian's chromium (scripts/install_chromium.sh) and `pip install -e '.[dev]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright

OUTPUT = Path(__file__).parent.parent / "docs/img"
TASKS = ("intent", "calls", "sentiment")
PROMPT = "Customer: my suitcase never came out in Athens\nIntent:"
WAIT = 60_000  # ms
ENDED = ("completed", "errored", "canceled")
HEADERS = {"content-type": "application/json"}


def call(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, HEADERS)) as reply:
        return json.load(reply)


def prepare(url: str) -> None:
    """Adapters of the demo, with held-out rows for their curves, and judged."""
    for task in TASKS:
        call(f"{url}/api/demo/{task}/train", {"recipe": {"validation": 0.05}})
    settled = 0
    while settled < 5:  # an evaluation is queued shortly after its training ends
        time.sleep(2)
        going = [job for job in call(f"{url}/api/jobs?limit=50")["items"] if job["state"] not in ENDED]
        settled = 0 if going else settled + 1
        print(f"\r{len(going)} jobs to wait for ", end="", flush=True)
    print()


def load(url: str, models: list[str]) -> None:
    """Some traffic until the script ends, so that there is something to serve."""

    def ask(model: str) -> None:
        while True:
            call(f"{url}/v1/completions", {"model": model, "prompt": PROMPT, "max_tokens": 48, "ignore_eos": True})

    for model in models * 2:
        threading.Thread(target=ask, args=(model,), daemon=True).start()


def playground(page: Page, url: str, adapters: list[str]) -> None:
    page.goto(f"{url}/#/playground?model={adapters[0]}")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Max tokens").fill("12")
    page.get_by_label("Stop at").fill("\\n")
    for name in adapters[1:2]:
        page.get_by_label("Answered by").fill(name)
        page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    for footer in page.locator(".answer footer").all():
        expect(footer).to_contain_text("ended by", timeout=WAIT)
    page.locator(".answer").nth(1).locator(".token").first.hover()


def runs(page: Page, url: str) -> None:
    page.goto(f"{url}/#/runs")
    expect(page.locator(".u-over")).to_be_visible(timeout=WAIT)
    as_read(page)


def as_read(page: Page) -> None:
    """On a log scale, smoothed: how long runs are read."""
    page.get_by_label("Log scale").check()
    page.get_by_label("Smoothing of train").fill("0.9")


def run(page: Page, url: str) -> None:
    jobs = [job for job in call(f"{url}/api/jobs?limit=50")["items"] if job["kind"] == "train" and job["result"]]
    best = next((job for job in jobs if job["result"].get("validation_loss") is not None), jobs[0])
    page.goto(f"{url}/#/runs/{best['id']}")
    expect(page.locator(".u-over")).to_be_visible(timeout=WAIT)
    as_read(page)


def new_run(page: Page, url: str) -> None:
    page.goto(f"{url}/#/runs/new?dataset={call(f'{url}/api/datasets')['items'][0]['name']}")
    expect(page.get_by_role("region", name="Rendered rows")).to_be_visible(timeout=WAIT)


def adapters(page: Page, url: str, name: str) -> None:
    page.goto(f"{url}/#/adapters/{name}")
    expect(page.get_by_role("region", name="Version")).to_be_visible(timeout=WAIT)


def serving(page: Page, url: str, models: list[str], seconds: float) -> None:
    load(url, models)
    page.goto(f"{url}/#/serving")
    page.wait_for_timeout(1000 * seconds)
    expect(page.locator(".u-over").first).to_be_visible(timeout=WAIT)


def leaderboard(page: Page, url: str) -> None:
    page.goto(f"{url}/#/leaderboard")
    page.get_by_label("Everything").check()


def use_key(secret: str) -> None:
    HEADERS["authorization"] = f"Bearer {secret}"


def access(page: Page, url: str, names: list[str]) -> None:
    """With an admin's key, and some of others beside it."""
    if "authorization" not in HEADERS:
        use_key(call(f"{url}/api/keys", {"name": "operations", "role": "admin"})["secret"])
        call(f"{url}/api/users", {"name": "grace", "role": "trainer", "email": "grace@example.com"})
        call(f"{url}/api/keys", {"name": "grace-laptop", "role": "trainer", "user": "grace", "expires_in": 90 * 86_400})
        limits = {"requests_per_minute": 600, "tokens_per_day": 5_000_000}
        call(f"{url}/api/keys", {"name": "support-desk", "role": "user", "repositories": names[:2], **limits})
    secret = HEADERS["authorization"].removeprefix("Bearer ")
    page.add_init_script(f"sessionStorage.setItem('lorikeet.key', {json.dumps(secret)})")
    page.goto(f"{url}/#/access")
    expect(page.get_by_role("table", name="Keys")).to_be_visible(timeout=WAIT)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures of the README.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prepare", action="store_true", help="train some of the demo's adapters first")
    parser.add_argument("--seconds", type=float, default=40.0, help="of traffic before the picture of Serving")
    parser.add_argument("--only", help="take this picture alone, such as serving")
    asked = parser.parse_args()
    url = asked.url.rstrip("/")
    if os.environ.get("LORIKEET_API_KEY"):
        use_key(os.environ["LORIKEET_API_KEY"])
    if asked.prepare:
        prepare(url)
    names = [
        one["name"]
        for one in call(f"{url}/api/repos")["items"]
        if any(version["state"] == "ready" for version in one["versions"])
    ]
    names.sort(key=lambda name: TASKS.index(name) if name in TASKS else len(TASKS))
    views = {
        "playground": lambda page: playground(page, url, names),
        "runs": lambda page: runs(page, url),
        "run": lambda page: run(page, url),
        "new-run": lambda page: new_run(page, url),
        "adapters": lambda page: adapters(page, url, names[0]),
        "serving": lambda page: serving(page, url, names, asked.seconds),
        "leaderboard": lambda page: leaderboard(page, url),
        "access": lambda page: access(page, url, names),
    }
    dark_and_narrow = {"playground", "runs"}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )  # fmt: skip
        for name, show in views.items():
            if asked.only not in (None, name):
                continue
            take(browser, name, show, 1440, "light")
            if name in dark_and_narrow:
                take(browser, f"{name}-narrow-dark", show, 375, "dark")
        browser.close()


def take(browser: Any, name: str, show: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 760}, color_scheme=scheme)
    show(page)
    page.wait_for_timeout(600)
    page.screenshot(path=OUTPUT / f"{name}.png", full_page=name != "playground")
    print(OUTPUT / f"{name}.png")
    page.close()


if __name__ == "__main__":
    main()
