"""The page of administrators, over a stub: keys, users, tenants and the log, for those who may, and for nobody else."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect
from tests.ui.conftest import Open, violations
from tests.ui.stub import ATTACK, SECRET, Stub
from tests.ui.test_pages import focused, go, tab_to

Urls = Callable[[str], str]
VIEWS = {"Keys": "ci", "Users": "grace", "Tenants": "others", "Audit log": "ci-60"}


def show(page: Page, view: str) -> None:
    page.get_by_role("radio", name=view).check()
    expect(page.get_by_role("table")).to_contain_text(VIEWS[view])


def test_a_key_is_made_and_shown_once(open_page: Open, stub: tuple[Stub, str]) -> None:
    """By keyboard; the first key of a server is used by this tab from then on, which would be locked out else."""
    made, url = stub
    page = open_page(f"{url}/#/access")
    expect(page.get_by_role("table", name="Keys")).to_contain_text("lk_abcdefg…")
    tab_to(page, "New key")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="New key")
    expect(dialog).to_contain_text("The first key must be an admin's")
    expect(dialog.get_by_label("Role")).to_have_value("admin")
    expect(dialog.get_by_label("Name")).to_be_focused()
    page.keyboard.type("deploy")
    dialog.get_by_label("Belongs to").select_option("grace")
    dialog.get_by_label("Only these").check()
    dialog.get_by_label("Repositories", exact=True).fill("intent\nsentiment")
    dialog.get_by_label("Requests a minute").fill("many")
    dialog.get_by_role("button", name="Make the key").click()
    expect(dialog.get_by_role("alert")).to_contain_text("Requests a minute: expected a whole number")
    dialog.get_by_label("Requests a minute").fill("30")
    dialog.get_by_label("Days until it expires").fill("7")
    assert violations(page) == []
    dialog.get_by_role("button", name="Make the key").click()

    shown = page.get_by_role("dialog", name="The key deploy")
    expect(shown).to_contain_text(SECRET)
    assert violations(page) == []
    shown.get_by_role("button", name="Copy the key").click()
    assert page.evaluate("() => navigator.clipboard.readText()") == SECRET
    shown.get_by_role("button", name="I have kept it").click()
    expect(page.get_by_role("table", name="Keys")).to_contain_text("deploy")
    assert SECRET not in page.content()
    assert page.evaluate("() => [sessionStorage['lorikeet.key'], localStorage['lorikeet.key'] ?? null]") == [
        SECRET, None,
    ]  # fmt: skip
    assert made.asked == [
        ("POST", "/api/keys", {
            "name": "deploy", "role": "admin", "user": "grace", "repositories": ["intent", "sentiment"],
            "expires_in": 604_800, "requests_per_minute": 30, "tokens_per_day": None,
        })
    ]  # fmt: skip


def test_keys_are_confined_and_revoked(open_page: Open, stub: tuple[Stub, str]) -> None:
    made, url = stub
    made.me |= {"needs_key": True, "key": {"id": "key-root", "repositories": None}}
    page = open_page(url)
    page.evaluate("() => sessionStorage.setItem('lorikeet.key', 'lk-right')")
    page.goto(f"{url}/#/access")
    page.reload()
    table = page.get_by_role("table", name="Keys")
    expect(table.get_by_role("row")).to_have_count(3)  # the revoked one is not shown
    row = table.get_by_role("row").filter(has_text="ci")
    for said in ("grace", "intent", "60 requests a minute, 100,000 tokens a day", "open", "3,400"):
        expect(row).to_contain_text(said)
    page.get_by_role("button", name="Change ci").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("Repositories", exact=True)).to_have_value("intent")
    expect(dialog).not_to_contain_text("the key that this page uses")
    dialog.get_by_label("Every repository").check()
    dialog.get_by_label("Role").select_option("trainer")
    dialog.get_by_label("Requests a minute").fill("")
    dialog.get_by_label("Tokens a day").fill("0")
    dialog.get_by_role("button", name="Change the key").click()
    expect(dialog.get_by_role("alert")).to_contain_text("Tokens a day: expected a whole number")
    dialog.get_by_label("Tokens a day").fill("100000")
    assert violations(page) == []
    dialog.get_by_role("button", name="Change the key").click()
    for said in ("every one", "trainer", "100,000 tokens a day"):
        expect(row).to_contain_text(said)
    expect(row).not_to_contain_text("a minute")
    page.get_by_role("button", name="Change root").click()
    expect(dialog).to_contain_text("It is the key that this page uses")
    dialog.get_by_role("button", name="Change the key").click()  # nothing is, so nothing is asked for
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="Revoke root").click()
    for said in ("It is the key that this page uses", "the last open key of an admin"):
        expect(dialog).to_contain_text(said)
    dialog.get_by_role("button", name="Keep as it is").click()
    assert focused(page) == "Revoke root"
    page.get_by_role("button", name="Revoke ci").click()
    expect(dialog).not_to_contain_text("last open key")
    dialog.get_by_role("button", name="Revoke the key").click()
    expect(row).to_have_count(0)
    page.get_by_label("Revoked and expired ones too").check()
    expect(row).to_contain_text("revoked")
    assert made.asked == [
        ("PATCH", "/api/keys/key-ci", {"role": "trainer", "repositories": None, "requests_per_minute": None}),
        ("DELETE", "/api/keys/key-ci", b""),
    ]  # fmt: skip


def test_users_tenants_and_the_log(open_page: Open, stub: tuple[Stub, str]) -> None:
    made, url = stub
    page = open_page(f"{url}/#/access")
    show(page, "Users")
    page.get_by_role("button", name="New user").click()
    page.get_by_label("Name", exact=True).fill("alan")
    page.get_by_role("button", name="Add the user").click()
    expect(page.get_by_role("row").filter(has_text="alan")).to_contain_text("open")
    page.get_by_role("button", name="Disable grace").click()
    page.get_by_role("button", name="Disable the user").click()
    expect(page.get_by_role("row").filter(has_text="grace")).to_contain_text("disabled")
    show(page, "Tenants")
    page.get_by_role("button", name="New tenant").click()
    page.get_by_label("Name", exact=True).fill("third")
    page.get_by_role("button", name="Add the tenant").click()
    expect(page.get_by_role("table", name="Tenants")).to_contain_text("third")
    assert [body for _, _, body in made.asked] == [
        {"name": "alan", "role": "user", "email": None}, {"disabled": True}, {"name": "third"}
    ]  # fmt: skip
    with page.expect_request(re.compile(r"/api/users\?tenant=others$")):
        page.get_by_label("Tenant", exact=True).select_option("others")
        page.get_by_role("radio", name="Users").check()
    page.get_by_label("Tenant", exact=True).select_option("default")

    show(page, "Audit log")
    rows = page.get_by_role("table", name="Changes").get_by_role("row")
    expect(rows).to_have_count(51)
    expect(rows.filter(has_text="ci-59")).to_contain_text(
        "role trainer → user, tokens per day no limit → 5,000, repositories every one → intent, slots"
    )
    page.get_by_role("button", name="Older").click()
    expect(rows).to_have_count(11)
    page.get_by_role("button", name="ci-3", exact=True).click()
    expect(rows).to_have_count(2)
    expect(page.get_by_label("Id of what it is about")).to_have_value("key-3")
    page.get_by_label("Action", exact=True).select_option("key.revoke")
    expect(page.get_by_text("Nothing like that was changed")).to_be_visible()


@pytest.mark.parametrize("fields", [{"role": "trainer"}, {"key": {"id": "k", "repositories": ["intent"]}}])
def test_who_manages_nobody_sees_nothing_of_it(
    open_page: Open, stub: tuple[Stub, str], fields: dict[str, object]
) -> None:
    made, url = stub
    made.me |= fields
    page = open_page(f"{url}/#/leaderboard")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{url}/#/access")
    expect(page.get_by_text("managed with an admin's key")).to_be_visible()
    expect(page.get_by_role("link", name="Access")).to_have_count(0)
    assert not [one for one in asked if re.search("/api/(keys|users|tenants|audit)", one)]


@pytest.mark.parametrize(("width", "scheme"), [(1440, "dark"), (375, "light")])
def test_axe_finds_nothing_in_any_view(open_page: Open, stub_urls: Urls, width: int, scheme: str) -> None:
    page = open_page(f"{stub_urls('plain')}/#/access", width=width, scheme=scheme)
    for view in VIEWS:
        show(page, view)
        assert violations(page) == [], view
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, view
    go(page, stub_urls("empty"), "access")
    assert violations(page) == []


def test_hostile_names_are_shown_and_never_run(open_page: Open, stub_urls: Urls) -> None:
    page = open_page(f"{stub_urls('hostile')}/#/access")
    for view in VIEWS:
        show(page, view)
        page.wait_for_timeout(50)
        assert ATTACK in page.locator("main").evaluate("(main) => main.textContent"), view
        assert page.evaluate("() => window.hacked") is None
        assert page.locator("#hacked, main img, main script").count() == 0
    show(page, "Keys")
    for button in ("Revoke ci", "Change ci", "New key"):
        page.get_by_role("button", name=button).click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert page.evaluate("() => window.hacked") is None and page.locator("#hacked").count() == 0
        page.keyboard.press("Escape")
