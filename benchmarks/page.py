"""How soon is the page there? First paint and bytes of a first and of a second visit, on loopback.

    python benchmarks/page.py --url http://127.0.0.1:8000      # of a running `lorikeet up`

Last line: JSON, seconds and bytes, medians. A first visit has an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import urllib.request
from collections.abc import Sequence
from typing import Any

from playwright.sync_api import Browser, sync_playwright

PAGES = ("playground", "runs", "adapters", "serving", "leaderboard", "access")
PAINT = """() => new Promise((done) => {
    const painted = () => performance.getEntriesByName("first-contentful-paint")[0]?.startTime;
    const look = () => (painted() === undefined ? setTimeout(look, 10) : done(painted()));
    look();
})"""


def newest_run(url: str) -> list[str]:
    """The page of the newest training, where there is one."""
    with urllib.request.urlopen(f"{url}/api/jobs?limit=100") as reply:
        jobs = json.load(reply)["items"]
    return [f"runs/{job['id']}" for job in jobs if job["kind"] == "train"][:1]


def visit(browser: Browser, url: str, routes: Sequence[str]) -> dict[str, float]:
    """One first visit to `url`, one more with what the browser kept, then a look at every page."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    client = context.new_cdp_session(page)
    client.send("Network.enable")
    sizes: list[float] = []
    client.on("Network.loadingFinished", lambda done: sizes.append(done["encodedDataLength"]))
    found: dict[str, float] = {}
    for name in ("first", "second"):
        sizes.clear()
        page.goto(f"{url}/", wait_until="domcontentloaded")
        found[f"{name}_paint_seconds"] = page.evaluate(PAINT) / 1000
        page.wait_for_selector("h1")
        found[f"{name}_heading_seconds"] = page.evaluate("() => performance.now()") / 1000
        page.wait_for_timeout(700)
        found[f"{name}_bytes"] = sum(sizes)
    for route in routes:
        page.goto(f"{url}/#/{route}")
        page.wait_for_timeout(400)
    found["every_page_bytes"] = sum(sizes)
    context.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="First paint and bytes of the page.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else []
        )  # fmt: skip
        url = asked.url.rstrip("/")
        routes = [*PAGES, *newest_run(url)]
        visit(browser, url, routes)  # the browser itself is warm
        visits = [visit(browser, url, routes) for _ in range(asked.repeats)]
        browser.close()
    result: dict[str, Any] = {name: round(statistics.median(one[name] for one in visits), 4) for name in visits[0]}
    result["slowest_first_paint_seconds"] = round(max(one["first_paint_seconds"] for one in visits), 4)
    for name, value in result.items():
        print(f"{name:30} {value:>12,.4g}" if name.endswith("seconds") else f"{name:30} {value:>12,.0f}")
    print(json.dumps({"benchmark": "page", "repeats": asked.repeats, **result}))


if __name__ == "__main__":
    main()
