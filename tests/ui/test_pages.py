"""The page in a browser, over a stub: what it looks like to whom, what it asks for, and what cannot be put into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from tests.ui.conftest import Open, violations
from tests.ui.stub import ATTACK, KEY, Stub, running

Urls = Callable[[str], str]
ROUTES = {
    "playground": "Playground",
    "runs": "Runs",
    "runs/job0": "intent/1",
    "runs/new": "New run",
    "adapters": "Adapters",
    "adapters/intent": "intent",
    "serving": "Serving",
    "leaderboard": "Leaderboard",
    "access": "Access",
}


def go(page: Page, url: str, route: str) -> None:
    """Show a route and wait until there is something on it."""
    page.goto(f"{url}/#/{route}")
    expect(page.get_by_role("heading", level=1)).to_contain_text(ROUTES.get(route, ""))
    expect(page.get_by_text(re.compile("^Loading "))).to_have_count(0)


def fill(page: Page, route: str) -> None:
    """Bring out what shows itself only when asked for."""
    if route == "playground":
        page.get_by_label("Prompt", exact=True).fill("Customer: where is my card\nIntent:")
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.locator(".answer footer").first).to_contain_text("ended by stop")
        page.locator(".token").first.focus()
    if route == "runs/new":
        page.get_by_label("Or a dataset that is here").select_option("tickets")
        expect(page.get_by_role("region", name="Rendered rows")).to_be_visible()
    if "job0" in route or route in ("runs", "serving"):
        expect(page.locator(".u-over").first).to_be_visible()
    page.evaluate("() => document.querySelectorAll('details').forEach((one) => (one.open = true))")


# --- for whoever looks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (375, "dark")])
def test_axe_finds_nothing_and_nothing_is_cut_off(open_page: Open, stub_urls: Urls, width: int, scheme: str) -> None:
    url = stub_urls("plain")
    page = open_page(url, width=width, scheme=scheme)
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 22, 26)")
    for route in ROUTES:
        go(page, url, route)
        fill(page, route)
        assert violations(page) == [], route
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, route


def test_axe_finds_nothing_in_dialogs_and_on_empty_pages(open_page: Open, stub_urls: Urls) -> None:
    page = open_page(stub_urls("plain"))
    go(page, stub_urls("plain"), "adapters/intent")
    page.get_by_role("button", name="Promote 3").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert violations(page) == []
    for route in ("playground", "runs", "adapters", "leaderboard", "serving"):
        go(page, stub_urls("empty"), route)
        if route != "serving":
            expect(page.get_by_role("button", name="Train intent")).to_be_visible()
        assert violations(page) == [], route


def test_the_theme_can_be_chosen_and_stays(open_page: Open, stub_urls: Urls) -> None:
    page = open_page(stub_urls("plain"), scheme="light")
    button = page.get_by_role("button", name="Theme:")
    button.click()
    button.click()
    expect(button).to_have_text("Theme: dark")
    kept = "async (button) => { button.click(); await 0; await 0; return localStorage.getItem('lorikeet.theme'); }"
    assert [button.evaluate(kept) for _ in range(3)] == ["auto", "light", "dark"]  # before anything is painted
    page.reload()
    expect(button).to_have_text("Theme: dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"


def test_everything_can_be_reached_and_used_by_keyboard(open_page: Open, stub: tuple[Stub, str]) -> None:
    made, url = stub
    page = open_page(url)
    expect(page.get_by_role("button", name="Leave out intent")).to_be_visible()
    keys = page.keyboard
    keys.press("Tab")
    assert focused(page) == "Skip to the page"
    keys.press("Enter")
    expect(page.get_by_role("button", name="Prompt template of intent")).to_be_visible()
    tab_to(page, "Prompt", exact=True)
    keys.type("where is my card")
    keys.press("Control+Enter")
    expect(page.locator(".answer footer").first).to_contain_text("ended by stop")
    tab_to(page, "35.0%")  # the first token; the others are reached by arrow keys
    keys.press("ArrowRight")
    expect(page.get_by_role("tooltip")).to_contain_text("98.0%")
    keys.press("Escape")
    expect(page.get_by_role("tooltip")).to_have_count(0)

    page.goto(f"{url}/#/adapters/intent")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    tab_to(page, "Promote 3")
    keys.press("Enter")
    assert page.get_by_role("dialog").get_by_label("Alias").input_value() == "production"
    keys.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert focused(page) == "Promote 3"
    keys.press("Enter")
    tab_to(page, "Move production to 3")
    keys.press("Enter")
    expect(page.get_by_text("@production → 3")).to_be_visible()
    assert [one for one in made.asked if one[0] == "PUT"] == [
        ("PUT", "/api/repos/intent/aliases/production", {"version": 3, "expected": 2})
    ]


def focused(page: Page) -> str:
    script = """() => { const at = document.activeElement;
        return at.getAttribute("aria-label") ?? (at.labels?.length ? at.labels[0].textContent : at.textContent); }"""
    return str(page.evaluate(script)).strip()


def tab_to(page: Page, name: str, exact: bool = False) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        at = focused(page)
        if at == name or (name in at and not exact):
            outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"{name} does not show that it has the focus"
            return
    raise AssertionError(f"{name} cannot be reached by Tab; the last was {focused(page)}")


# --- what cannot be put into it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_hostile_texts_are_shown_and_never_run(open_page: Open, stub_urls: Urls, route: str) -> None:
    url = stub_urls("hostile")
    page = open_page(url)
    go(page, url, route)
    if route == "runs/new":  # the columns' own names are hostile, and so are the templates made of them
        page.get_by_label("Or a dataset that is here").select_option("tickets")
    else:
        fill(page, route)
    expect(page.locator("main")).to_contain_text("onerror=")
    page.wait_for_timeout(100)
    assert page.evaluate("() => window.hacked") is None
    assert page.locator("#hacked, main img, main script").count() == 0
    assert ATTACK in page.locator("main").evaluate("(main) => main.textContent") or route == "playground"


def test_errors_of_the_server_are_hostile_too(open_page: Open, stub_urls: Urls) -> None:
    url = stub_urls("hostile")
    page = open_page(f"{url}/#/runs/nothing{ATTACK}")
    expect(page.get_by_role("alert")).to_contain_text("there is no job nothing")
    page.goto(f"{url}/#/playground?model=broken")
    page.get_by_label("Prompt", exact=True).fill(ATTACK)
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text(ATTACK)
    page.goto(f"{url}/#/{ATTACK}")
    expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()
    assert page.evaluate("() => window.hacked") is None


def test_the_policy_stops_what_the_page_would_never_do(open_page: Open, stub_urls: Urls) -> None:
    page = open_page(stub_urls("plain"), strict=False)
    for script in (
        "document.body.innerHTML = '<b>x</b>'",
        "eval('1')",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 1'}))",
    ):
        refused = page.evaluate(
            "(code) => { try { const at = document.createElement('script'); at.text = code; document.head.append(at); "
            "return false; } catch { return true; } }",
            script,
        )
        assert refused
    assert page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => false, () => true)")


# --- what it asks for ---------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_kept_for_the_tab(open_page: Open) -> None:
    with running(Stub("locked")) as url:
        page = open_page(url)
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        dialog.get_by_label("API key").fill("lk-wrong")
        dialog.get_by_role("button", name="Use this key").click()
        expect(dialog.get_by_role("alert")).to_be_visible()
        assert page.evaluate("() => [sessionStorage.length, localStorage.getItem('lorikeet.key')]") == [0, None]
        dialog.get_by_label("API key").fill(KEY)
        dialog.get_by_role("button", name="Use this key").click()
        expect(dialog).to_have_count(0)
        expect(page.get_by_role("button", name="Leave out intent")).to_be_visible()
        assert "$LORIKEET_API_KEY" in page.locator("[data-snippet]").inner_text()
        assert KEY not in page.content()
        page.reload()
        expect(page.get_by_role("button", name="Forget the key")).to_be_visible()
        page.get_by_role("button", name="Forget the key").click()
        expect(dialog).to_be_visible()


def test_the_request_on_screen_is_the_one_that_is_sent(open_page: Open, stub: tuple[Stub, str]) -> None:
    made, url = stub
    page = open_page(url)
    page.get_by_label("Prompt", exact=True).fill('it\'s "so"\n$HOME \\ `x`')
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop at").fill("\\n")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator(".answer footer")).to_contain_text(["ended by stop", "ended by stop"])
    sent = [body for _, path, body in made.asked if path == "/v1/completions"]
    assert [body["model"] for body in sent] == ["lorikeet-nano", "intent"]
    assert sent[0]["prompt"] == 'it\'s "so"\n$HOME \\ `x`' and sent[0]["seed"] == 7 and sent[0]["stop"] == ["\n"]
    assert sent[0]["stream"] is True and sent[0]["logprobs"] == 5
    page.get_by_label("Chat", exact=True).check()
    page.get_by_label("System").fill("be brief")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator(".answer footer")).to_contain_text(["ended by stop", "ended by stop"])
    chat = made.asked[-1]
    assert chat[1] == "/v1/chat/completions"
    assert [one["role"] for one in chat[2]["messages"]] == ["system", "user"] and chat[2]["top_logprobs"] == 5


def test_tokens_are_cut_where_the_server_says_even_within_characters(open_page: Open, stub_urls: Urls) -> None:
    page = open_page(stub_urls("plain"))
    choice = {"text": "😀é!", "logprobs": {
        "tokens": ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "é", "!"], "token_logprobs": [-1, -0.5, -0.2, -0.1],
        "top_logprobs": [{}, {}, {}, {}], "text_offset": [10, 10, 11, 12]}}  # fmt: skip
    assert [one["text"] for one in run(page, "tokens.js", "readTokens", choice)] == ["", "😀", "é", "!"]


def test_characters_of_several_tokens_in_a_chat(open_page: Open, stub_urls: Urls) -> None:
    """The server calls a part of one U+FFFD; the page shows the character once it is whole, whatever chunk that is."""
    page = open_page(stub_urls("plain"))
    part = {"token": "\ufffd", "logprob": -1.0}
    chunks = [[b"\xf0\x9f", b"\x98"], [b"\x80", b"!"]]
    tokens = [[part | {"bytes": [*raw], "top_logprobs": [part | {"bytes": [*raw]}]} for raw in one] for one in chunks]
    choices = [{"logprobs": {"content": one}} for one in tokens]
    source = page.locator("script[type=module]").get_attribute("src") or ""
    found = page.evaluate(
        """([url, choices]) => import(new URL(url, document.baseURI)).then(({ readTokens }) => {
            const decoder = new TextDecoder();
            return choices.flatMap((choice) => readTokens(choice, decoder));
        })""",
        [source.replace("app.js", "tokens.js"), choices],
    )
    assert [one["text"] for one in found] == ["", "", "😀", "!"]
    assert found[0]["name"] == found[0]["top"][0][0] == "bytes:\\xf0\\x9f"


def test_where_held_out_loss_turned(open_page: Open, stub_urls: Urls) -> None:
    page = open_page(stub_urls("plain"))
    turned = [[1, 2.0], [2, 1.0], [3, 1.1], [4, 1.3]]
    assert run(page, "curves.js", "turningPoint", turned) == [2, 1.0]
    assert run(page, "curves.js", "turningPoint", [[1, 2.0], [2, 1.0], [3, 1.01]]) is None  # noise
    assert run(page, "curves.js", "turningPoint", [[1, 2.0], [2, 3.0]]) is None  # too early
    assert run(page, "curves.js", "turningPoint", [*turned, [5, 0.9]]) is None  # it came back
    smooth = run(page, "curves.js", "smooth", [[1, 4.0], [2, 4.0], [3, 4.0]], 0.9)
    assert [round(y, 9) for _, y in smooth] == [4.0, 4.0, 4.0]
    lines = [{"split": "train", "step": 2, "loss": 3}, {"split": "train", "step": 1, "loss": 4},
             {"split": "train", "step": 2, "loss": 1}, {"split": "validation", "step": 2, "loss": None}]  # fmt: skip
    assert run(page, "curves.js", "curvesOf", lines) == {"train": [[1, 4], [2, 1]], "validation": []}


def run(page: Page, module: str, function: str, *values: Any) -> Any:
    """A function of one of the page's modules."""
    source = page.locator("script[type=module]").get_attribute("src") or ""
    return page.evaluate(
        "([url, name, values]) => import(new URL(url, document.baseURI)).then((found) => found[name](...values))",
        [source.replace("app.js", module), function, values],
    )


def test_a_run_that_over_fits_is_marked_canceled_and_resumed(open_page: Open, stub: tuple[Stub, str]) -> None:
    made, url = stub
    page = open_page(f"{url}/#/runs")
    table = page.get_by_role("table", name="Losses of the runs in the chart")
    expect(table).to_contain_text("turned at step 60")
    page.get_by_label("Curve of intent/1").uncheck()
    expect(table).not_to_contain_text("turned at step 60")
    page.goto(f"{url}/#/runs/job0")
    expect(page.get_by_role("status")).to_contain_text("Held-out loss turned at step 60")
    page.goto(f"{url}/#/runs/job1")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Cancel the run").click()
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_visible()
    assert [path for method, path, _ in made.asked if method == "POST"] == [
        "/api/jobs/job1/cancel", "/api/jobs/job1/resume"
    ]  # fmt: skip


def test_one_click_trains_an_adapter_of_the_demo(open_page: Open) -> None:
    made = Stub("empty")
    with running(made) as url:
        page = open_page(f"{url}/#/adapters")
        page.get_by_role("button", name="Train intent").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("intent/1")
    assert made.asked == [("POST", "/api/demo/intent/train", {"recipe": {"validation": 0.05}})]


def test_a_version_is_judged_on_the_rows_of_its_dataset(open_page: Open, stub: tuple[Stub, str]) -> None:
    made, url = stub
    page = open_page(f"{url}/#/adapters/intent")
    page.get_by_role("button", name="Judge it on tickets").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("intent/")
    assert made.asked == [("POST", "/api/jobs", {"kind": "eval", "dataset": "tickets", "adapter": "intent/3"})]


def test_nothing_starts_while_the_audit_has_errors(open_page: Open, stub: tuple[Stub, str]) -> None:
    made, url = stub
    page = open_page(f"{url}/#/runs/new?dataset=tickets")
    start = page.get_by_role("button", name="Start the run")
    expect(start).to_be_enabled()
    assert page.get_by_label("Prompt", exact=True).input_value() == "Text: {text}\nLabel:"
    page.get_by_label("Prompt", exact=True).fill("{nothing}")
    expect(start).to_be_disabled()
    expect(page.get_by_text("The audit has errors")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("Say: {text}")
    page.get_by_label("Rank").fill("8")
    expect(start).to_be_enabled()
    start.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("intent/")
    (job,) = (body for method, path, body in made.asked if "preview" not in path)  # which makes the repository, too
    assert job["repo"] == "tickets" and job["create_repo"] and job["dataset"] == "tickets" and job["kind"] == "train"
    assert job["recipe"]["prompt"] == "Say: {text}" and job["recipe"]["rank"] == 8


@pytest.mark.parametrize("width", [375, 1440])
def test_a_leaderboard_of_many(open_page: Open, stub_urls: Urls, width: int) -> None:
    """Twenty tasks, some with two metrics, two hundred adapters each: the best is in sight, all else a step away."""
    page = open_page(stub_urls("many"), width=width)
    go(page, stub_urls("many"), "leaderboard")
    expect(page.get_by_role("row")).to_have_count(21)
    for title in ("Task", "Best adapter", "Base"):  # without scrolling sideways
        box = page.get_by_role("columnheader", name=title, exact=True).bounding_box()
        assert box is not None and box["x"] + box["width"] <= width
    assert violations(page) == []
    page.get_by_label("Everything").check()
    expect(page.get_by_role("row")).to_have_count(20 * (1 + 10 + 1))
    expect(page.get_by_role("table", name="Results of task-3, rouge_l")).to_contain_text("team-0-adapter-of-task-3/0")
    assert violations(page) == []
    page.get_by_role("button", name="All 200 adapters of task-8").click()
    expect(page.get_by_role("row")).to_have_count(1 + 200 + 1)
    expect(page.get_by_label("Task", exact=True)).to_have_value("task-8")
    page.get_by_label("Task", exact=True).select_option("task-3")
    expect(page.get_by_role("table")).to_have_count(2)  # one a metric
    assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
    page.get_by_label("Best of each task").check()
    page.get_by_role("button", name="task-14").click()
    expect(page.get_by_role("heading", level=2)).to_contain_text("task-14")


def test_a_run_says_what_it_costs_so_far(open_page: Open, stub_urls: Urls) -> None:
    page = open_page(f"{stub_urls('plain')}/#/runs/job0")
    expect(page.locator("dl.facts div").filter(has_text="Core-seconds")).to_contain_text("61")


def test_the_leaderboard_says_what_is_better_beyond_chance(open_page: Open, stub_urls: Urls) -> None:
    page = open_page(f"{stub_urls('plain')}/#/leaderboard")
    page.get_by_label("Everything").check()
    rows = page.get_by_role("table", name="Results of intent").get_by_role("row")
    expect(rows).to_contain_text(["Model", "above the base", "not told from the base", "84.2%", "31.0%"])
    expect(rows.nth(1)).to_contain_text("168")
    expect(rows.nth(1)).to_contain_text("73 ms")
    expect(rows.nth(3)).to_contain_text("80.0% to 88.0%")


def test_a_visit_stays_within_its_budget(open_page: Open, stub_urls: Urls) -> None:
    """All pages together, charts included: < 300 KB; nothing from anywhere else."""
    page = open_page("about:blank")
    client = page.context.new_cdp_session(page)
    client.send("Network.enable")
    sizes: list[float] = []
    client.on("Network.loadingFinished", lambda done: sizes.append(done["encodedDataLength"]))
    foreign: list[str] = []
    url = stub_urls("plain")
    page.on("request", lambda asked: None if asked.url.startswith(url) else foreign.append(asked.url))
    for route in ROUTES:
        go(page, url, route)
    assert 20_000 < sum(sizes) < 300_000
    assert foreign == []
