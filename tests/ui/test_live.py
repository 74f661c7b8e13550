"""Each page doing its main job against `lorikeet up` with the embedded base: a real training from an uploaded file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from playwright.sync_api import Browser, Page, expect
from pyarrow import parquet
from tests.ui.conftest import Open, violations

from lorikeet.data.formats import READERS, Row

DATA = Path(__file__).parents[2] / "src/lorikeet/data/demo/sentiment/train.jsonl"
ROWS = 96
LONG = 240_000  # ms, for training on a machine that does other things, too
PROMPT = "Text: The room was clean and the staff were kind.\nLabel:"


@pytest.fixture(scope="session")
def trained(live_url: str, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a server whose adapter reviews/1 was trained by way of the page."""
    rows = [row.values for row in READERS[".jsonl"](DATA) if isinstance(row, Row)][:ROWS]
    file = tmp_path_factory.mktemp("rows") / "reviews.parquet"
    parquet.write_table(pyarrow.table({name: [row[name] for row in rows] for name in ("text", "label")}), file)
    page = browser.new_page()
    page.set_default_timeout(30_000)
    try:
        upload_and_start(page, live_url, file)
        watch(page)
    finally:
        page.close()
    return live_url


def upload_and_start(page: Page, url: str, file: Path) -> None:
    page.goto(f"{url}/#/runs/new")
    expect(page.get_by_role("button", name="Train sentiment")).to_be_visible()  # there is nothing yet
    page.get_by_label("A file of rows").set_input_files(file)
    expect(page.get_by_label("Name of the dataset")).to_have_value("reviews")
    page.get_by_label("Share kept to judge by").fill("0.25")
    page.get_by_role("button", name="Upload").click()
    preview = page.get_by_role("region", name="Rendered rows")
    expect(preview.get_by_role("group")).to_have_count(4, timeout=LONG)
    first = preview.get_by_role("group", name="Row 1")
    assert re.fullmatch(r"Text: .+\nLabel:", first.locator(".masked").first.inner_text(), re.DOTALL)
    assert first.locator(".learned").first.inner_text().strip().startswith(("positive", "negative", "neutral", "mixed"))
    expect(page.get_by_role("region", name="Audit")).to_contain_text("24 to judge by")
    for label, value in {"Rank": "4", "Epochs": "2", "Rows a step": "8", "Held-out share": "0.2"}.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Description").fill("from the page")
    expect(page.get_by_role("region", name="Audit")).to_contain_text("held out")
    page.get_by_role("button", name="Start the run").click()


def watch(page: Page) -> None:
    """The curve grows before the run is over, without anybody asking for it."""
    expect(page.get_by_role("heading", level=1)).to_have_text("reviews/1")
    expect(page.get_by_role("img", name=re.compile("Learning curve: train loss"))).to_be_visible(timeout=LONG)
    expect(page.locator(".head .state")).to_have_text("completed", timeout=LONG)
    expect(page.get_by_role("list", name="Timeline")).to_contain_text("publishing")
    expect(page.get_by_role("log")).to_contain_text("completed")
    assert re.search(r"held-out \d+\.\d+", page.get_by_role("region", name="Learning curve").inner_text())
    facts = page.locator(".facts").first.inner_text()
    assert re.search(r"Steps\n\d+ of \d+", facts) and re.search(r"Training\n[\d.]+ m?s", facts)


def test_adapters_show_where_it_comes_from_and_promote_it(trained: str, open_page: Open) -> None:
    page = open_page(f"{trained}/#/adapters")
    page.get_by_role("link", name="reviews").click()
    version = page.get_by_role("region", name="Version 1")
    for said in ("lorikeet-nano", "Held-out loss", "epochs", "Text: {text}"):
        expect(version).to_contain_text(said)
    page.get_by_role("button", name="Promote 1").click()
    page.get_by_role("button", name="Move production to 1").click()
    expect(page.get_by_text("@production → 1")).to_be_visible()
    version.locator("summary", has_text="Files").click()
    with page.expect_download() as download:
        version.get_by_role("button", name="adapter_config.json").click()
    assert json.loads(Path(download.value.path()).read_text())["r"] == 4
    version.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("reviews/1")
    assert violations(page) == []


def test_the_playground_compares_the_base_with_it(trained: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(f"{trained}/#/playground?model=reviews/1")
    page.get_by_role("button", name="Prompt template of reviews").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("Text: {text}\nLabel:")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Max tokens").fill("8")
    page.get_by_role("button", name="Run", exact=True).click()
    for model in ("lorikeet-nano", "reviews/1"):
        answer = page.get_by_role("region", name=model)
        expect(answer.locator("footer")).to_contain_text("ended by", timeout=60_000)
    token = page.get_by_role("region", name="reviews/1").locator(".token").first
    token.hover()
    odds = [float(one.rstrip("%")) for one in page.get_by_role("tooltip").locator(".number").all_inner_texts()]
    assert len(odds) >= 5 and odds == sorted(odds, reverse=True) and sum(odds) <= 100.5
    said = page.get_by_role("region", name="reviews/1").locator(".text").inner_text()

    page.get_by_role("button", name="Leave out lorikeet-nano").click()
    snippet = page.locator("[data-snippet]")
    out = subprocess.run(["bash", "-c", snippet.inner_text()], capture_output=True, text=True, check=True)
    text = json.loads(out.stdout)["choices"][0]["text"]
    page.get_by_label("Python").check()
    command = [sys.executable, "-c", snippet.inner_text()]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"NO_COLOR": "1"})
    assert out.stdout.rstrip("\n") == text.rstrip("\n")
    assert said.split()[:1] == text.split()[:1]


def test_serving_shows_what_was_just_asked(trained: str, open_page: Open) -> None:
    body = {"model": "reviews/1", "prompt": PROMPT, "max_tokens": 8}
    post(f"{trained}/v1/completions", body)
    page = open_page(f"{trained}/#/serving")
    row = page.get_by_role("table", name="Adapters").get_by_role("row", name=re.compile("reviews.1"))
    expect(row).to_contain_text("device")
    before = int(row.get_by_role("cell").nth(4).inner_text())
    post(f"{trained}/v1/completions", body)
    expect(row.get_by_role("cell").nth(4)).to_have_text(str(before + 1))
    expect(page.locator(".figures")).to_contain_text(re.compile(r"First token p50\s*\d"))


def test_the_leaderboard_has_it_beside_the_base(trained: str, open_page: Open) -> None:
    page = open_page(f"{trained}/#/leaderboard")
    page.wait_for_function("() => !document.body.textContent.includes('Nothing was judged yet')", timeout=LONG)
    page.get_by_label("Everything").check()
    table = page.get_by_role("table", name="Results of reviews")
    for name in ("reviews.1", "base"):
        expect(table.get_by_role("row", name=re.compile(rf"^{name} ")).locator(".number").nth(1)).to_have_text(
            re.compile(r"\d+\.\d% to \d+\.\d%")
        )


def test_runs_can_be_canceled_and_resumed(trained: str, open_page: Open) -> None:
    page = open_page(f"{trained}/#/runs")
    page.get_by_role("link", name="reviews/1", exact=True).click()
    page.get_by_role("link", name="Start one like it").click()
    expect(page.get_by_label("Rank")).to_have_value("4")
    expect(page.get_by_label("Repository")).to_have_value("reviews")
    page.get_by_label("Epochs").fill("500")
    page.get_by_role("button", name="Start the run").click()
    expect(page.get_by_role("img", name=re.compile("Learning curve"))).to_be_visible(timeout=LONG)
    cancel(page)
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".head .state")).to_have_text(re.compile("queued|running"))
    cancel(page)
    page.goto(f"{trained}/#/runs")
    expect(page.get_by_role("row", name=re.compile("^Curve of reviews.2 "))).to_contain_text("canceled")
    page.get_by_label("Curve of reviews/2").check()
    expect(page.get_by_role("table", name="Losses of the runs in the chart").get_by_role("row")).to_have_count(3)


def cancel(page: Page) -> None:
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel the run").click()
    expect(page.locator(".head .state")).to_have_text("canceled", timeout=LONG)


def post(url: str, body: Any) -> Any:
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        return json.load(reply)
