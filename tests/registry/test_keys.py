"""Keys, users and tenants, in SQLite and PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from tests.registry.conftest import NOW, Clock

from lorikeet.errors import ConflictError, ForbiddenError, InvalidRequestError, LorikeetError, NotFoundError
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.keys import DAY
from lorikeet.registry.records import Actor, KeyChange


def test_a_key_opens_until_it_does_not(catalog: Catalog, who: Actor, clock: Clock) -> None:
    assert not catalog.keys.exist()
    key, secret = catalog.keys.create(who, "ci", "trainer", expires=NOW + 100, requests_per_minute=60)
    assert catalog.keys.exist()
    assert secret.startswith("lk_") and len(secret) > 40 and key.prefix == secret[:10]
    found = catalog.keys.authenticate(secret)
    assert found is not None
    actor, same = found
    assert (actor.tenant, actor.name, actor.role, actor.key_id, actor.repositories) == (
        who.tenant, "key:ci", "trainer", key.id, None,
    )  # fmt: skip
    assert same == key
    for wrong in (secret[:-1], secret + "x", secret.upper(), "", key.prefix, "\ud800"):
        assert catalog.keys.authenticate(wrong) is None
    clock.now += 100
    assert catalog.keys.authenticate(secret) is None and not catalog.keys.exist()
    second, other = catalog.keys.create(who, "ci")
    catalog.keys.revoke(who, second.id)
    assert catalog.keys.authenticate(other) is None
    assert [one.id for one in catalog.keys.all(who)] == [second.id, key.id]


def test_the_secret_is_nowhere(catalog: Catalog, who: Actor) -> None:
    _, secret = catalog.keys.create(who, "ci")

    def everything(session: Session) -> str:
        tables = ("keys", "audit", "users", "idempotency")
        return repr([session.execute(text(f"SELECT * FROM {table}")).all() for table in tables])

    assert secret[10:] not in catalog.database.read(everything)


def test_users(catalog: Catalog, who: Actor) -> None:
    user = catalog.people.create_user(who, "ann", "trainer", "ann@example.org")
    _, secret = catalog.keys.create(who, "laptop", "trainer", user="ann")
    found = catalog.keys.authenticate(secret)
    assert found is not None and (found[0].name, found[0].user_id) == ("user:ann", user.id)
    catalog.people.disable_user(who, "ann")
    assert catalog.keys.authenticate(secret) is None
    catalog.people.disable_user(who, "ann", disabled=False)
    assert catalog.keys.authenticate(secret) is not None
    with pytest.raises(ConflictError, match="a user 'ann' is there already"):
        catalog.people.create_user(who, "ann")
    with pytest.raises(NotFoundError, match="there is no user 'bob'"):
        catalog.keys.create(who, "x", user="bob")
    assert [one.name for one in catalog.people.users(who)] == ["ann"]


def test_grants(catalog: Catalog, who: Actor) -> None:
    ids = {name: catalog.repositories.create(who, name).id for name in ("a", "b", "c")}
    key, secret = catalog.keys.create(who, "k", repositories=["b", "a"])

    def usable() -> object:
        found = catalog.keys.authenticate(secret)
        assert found is not None
        return found[0].repositories

    assert usable() == {ids["a"], ids["b"]} and catalog.keys.grants(who, key.id) == ["a", "b"]
    catalog.keys.alter(who, key.id, KeyChange(repositories=["c"]))
    assert usable() == {ids["c"]}
    catalog.keys.alter(who, key.id, KeyChange(repositories=[]))
    assert usable() == set() and catalog.keys.grants(who, key.id) == []
    catalog.keys.alter(who, key.id, KeyChange(repositories=None))
    assert usable() is None and catalog.keys.grants(who, key.id) is None
    with pytest.raises(NotFoundError, match="there is no repository 'd'"):
        catalog.keys.alter(who, key.id, KeyChange(repositories=["a", "d"]))
    assert usable() is None


def test_a_key_is_changed(catalog: Catalog, who: Actor) -> None:
    """From the next request on, with what it was and what it is in the log; what does not change leaves no trace."""
    key, secret = catalog.keys.create(who, "ci", "user", requests_per_minute=60)
    for wanted in (KeyChange(role="trainer"), KeyChange(requests_per_minute=None, tokens_per_day=500), KeyChange()):
        catalog.keys.alter(who, key.id, wanted)
    found = catalog.keys.authenticate(secret)
    assert found is not None
    assert (found[0].role, found[1].role) == ("trainer", "trainer")
    assert (found[1].requests_per_minute, found[1].tokens_per_day) == (None, 500)
    catalog.repositories.create(who, "a")
    catalog.keys.alter(who, key.id, KeyChange(role="trainer", repositories=["a", "a"]))
    catalog.keys.alter(who, key.id, KeyChange(repositories=["a"]))
    entries = catalog.audit.page(who, action="key.change", subject_id=key.id).items
    assert [one.details for one in entries] == [
        {"repositories": {"from": None, "to": ["a"]}},
        {"requests_per_minute": {"from": 60, "to": None}, "tokens_per_day": {"from": None, "to": 500}},
        {"role": {"from": "user", "to": "trainer"}},
    ]
    assert {one.actor for one in entries} == {who.name}


def test_the_last_admin_stays_one(catalog: Catalog, who: Actor, clock: Clock) -> None:
    root, _ = catalog.keys.create(who, "root", "admin")
    catalog.people.create_user(who, "ann", "admin")
    catalog.repositories.create(who, "a")
    for name, more in (
        ("gone", {}), ("late", {"expires": NOW + 1}), ("hers", {"user": "ann"}), ("confined", {"repositories": ["a"]}),
    ):  # fmt: skip
        made, _ = catalog.keys.create(who, name, "admin", **more)  # type: ignore[arg-type]
        if name == "gone":
            catalog.keys.revoke(who, made.id)
    clock.now += 2
    catalog.people.disable_user(who, "ann")  # nobody is left but root
    for wanted in (KeyChange(role="trainer"), KeyChange(repositories=["a"])):
        with pytest.raises(ConflictError, match="the last key that manages this tenant") as caught:
            catalog.keys.alter(who, root.id, wanted)
        assert caught.value.code == "last_admin"
    assert catalog.keys.alter(who, root.id, KeyChange(tokens_per_day=9)).role == "admin"
    catalog.people.disable_user(who, "ann", disabled=False)
    assert catalog.keys.alter(who, root.id, KeyChange(role="user")).role == "user"


def test_two_admins_who_lower_each_other_at_once(catalog: Catalog, who: Actor) -> None:
    """One of them stays."""
    keys = [catalog.keys.create(who, name, "admin")[0] for name in ("one", "two")]

    def lower(key_id: str) -> str:
        try:
            return catalog.keys.alter(who, key_id, KeyChange(role="user")).role
        except ConflictError as error:
            return error.code

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lower, [key.id for key in keys])) == ["last_admin", "user"]


@pytest.mark.parametrize(
    ("wanted", "error", "param"),
    [
        (KeyChange(requests_per_minute=61), ForbiddenError, "requests_per_minute"),
        (KeyChange(requests_per_minute=None), ForbiddenError, "requests_per_minute"),
        (KeyChange(requests_per_minute=5, tokens_per_day=None), ForbiddenError, "tokens_per_day"),
        (KeyChange(requests_per_minute=5), None, None),
    ],
)
def test_nobody_widens_themselves(
    wanted: KeyChange, error: type[LorikeetError] | None, param: str | None, catalog: Catalog, who: Actor
) -> None:
    limits = {"requests_per_minute": 60, "tokens_per_day": 100}
    key, secret = catalog.keys.create(who, "root", "admin", **limits)  # type: ignore[arg-type]
    found = catalog.keys.authenticate(secret)
    assert found is not None
    if error is None:
        assert catalog.keys.alter(found[0], key.id, wanted).requests_per_minute == 5
        return
    with pytest.raises(error, match="a key does not widen itself") as caught:
        catalog.keys.alter(found[0], key.id, wanted)
    assert caught.value.param == param
    assert catalog.keys.alter(who, key.id, wanted) != key  # somebody else may


def test_a_key_does_not_widen_its_role_or_repositories(catalog: Catalog, who: Actor) -> None:
    catalog.repositories.create(who, "a")
    catalog.repositories.create(who, "b")
    key, secret = catalog.keys.create(who, "k", "trainer", repositories=["a"])
    found = catalog.keys.authenticate(secret)
    assert found is not None
    for wanted in (KeyChange(role="admin"), KeyChange(repositories=None), KeyChange(repositories=["b"])):
        with pytest.raises(ForbiddenError, match="does not widen itself"):
            catalog.keys.alter(found[0], key.id, wanted)
    assert catalog.keys.alter(found[0], key.id, KeyChange(role="user", repositories=[])).role == "user"


def test_changes_that_cannot_be(catalog: Catalog, who: Actor, clock: Clock) -> None:
    catalog.people.create_user(who, "ann", "trainer")
    with pytest.raises(InvalidRequestError, match="'ann' has the role trainer"):
        catalog.keys.create(who, "hers", "admin", user="ann")
    hers, _ = catalog.keys.create(who, "hers", "user", user="ann", expires=NOW + 50)
    assert catalog.keys.alter(who, hers.id, KeyChange(role="trainer")).role == "trainer"
    for wanted, said in (
        (KeyChange(role="admin"), "'ann' has the role trainer, and a key has no higher one"),
        (KeyChange(role="root"), "role: found 'root'"),  # type: ignore[arg-type]
        (KeyChange(tokens_per_day=0), "tokens_per_day: found 0; expected 1 or more"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            catalog.keys.alter(who, hers.id, wanted)
    with pytest.raises(NotFoundError):
        catalog.keys.alter(Actor(tenant="another"), hers.id, KeyChange(role="user"))
    clock.now += 50
    with pytest.raises(ConflictError, match="the key 'hers' is expired"):
        catalog.keys.alter(who, hers.id, KeyChange(role="user"))
    gone, _ = catalog.keys.create(who, "gone")
    catalog.keys.revoke(who, gone.id)
    with pytest.raises(ConflictError, match="the key 'gone' is revoked"):
        catalog.keys.alter(who, gone.id, KeyChange(role="trainer"))


def test_usage_by_day(catalog: Catalog, who: Actor, clock: Clock) -> None:
    key, _ = catalog.keys.create(who, "k", tokens_per_day=100)
    for _ in range(3):
        used = catalog.keys.spend(key.id, requests=1, tokens=10)
    assert (used.requests, used.tokens) == (3, 30)
    clock.now += DAY
    assert catalog.keys.usage(key.id) == []
    catalog.keys.spend(key.id, tokens=5)
    assert [one.tokens for one in catalog.keys.usage(key.id)] == [5]
    assert [one.tokens for one in catalog.keys.usage(key.id, days=2)] == [5, 30]
    assert catalog.keys.all(who)[0].last_used == clock.now


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"role": "root"}, "role: found 'root'; expected admin, trainer, user"),
        ({"requests_per_minute": 0}, "requests_per_minute: found 0; expected 1 or more"),
        ({"tokens_per_day": -1}, "tokens_per_day: found -1"),
        ({"expires": NOW - 1}, "expires: found a time that has passed"),
        ({"name": "a\r\nb"}, "expected a name of letters"),
    ],
)
def test_keys_that_cannot_be(fields: dict[str, object], said: str, catalog: Catalog, who: Actor) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        catalog.keys.create(who, **{"name": "k", **fields})  # type: ignore[arg-type]
    assert catalog.keys.all(who) == []


def test_tenants(catalog: Catalog, who: Actor) -> None:
    made = catalog.people.create_tenant(who, "acme")
    assert catalog.people.tenant("acme") == catalog.people.tenant(made.id) == made
    assert [one.name for one in catalog.people.tenants()] == ["acme", "default"]
    assert catalog.people.tenant("default").id == who.tenant
    with pytest.raises(ConflictError):
        catalog.people.create_tenant(who, "acme")


def test_upload_tokens(catalog: Catalog, who: Actor, clock: Clock) -> None:
    upload, token = catalog.uploads.begin(who, "adapter", {"repo": "intent"}, seconds=60)
    assert catalog.uploads.find(token) == upload
    catalog.uploads.add_file(upload.id, "adapter_config.json", "0" * 64, 10)
    assert catalog.uploads.add_file(upload.id, "adapter_config.json", "1" * 64, 11).files == {
        "adapter_config.json": {"sha256": "1" * 64, "bytes": 11}
    }
    assert catalog.uploads.complete(who, upload.id, "v1").result == "v1"
    assert catalog.uploads.complete(who, upload.id, "v1").result == "v1"
    with pytest.raises(ConflictError, match="the upload is complete"):
        catalog.uploads.complete(who, upload.id, "v2")
    with pytest.raises(ConflictError, match="the upload is complete"):
        catalog.uploads.add_file(upload.id, "x", "0" * 64, 1)
    clock.now += 60
    with pytest.raises(NotFoundError) as caught:
        catalog.uploads.find(token)
    assert token not in str(caught.value)
    assert catalog.uploads.forget_expired() == [upload.id]
