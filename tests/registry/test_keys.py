"""Keys, users and tenants, in SQLite and PostgreSQL."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from tests.registry.conftest import NOW, Clock

from lorikeet.errors import ConflictError, InvalidRequestError, NotFoundError
from lorikeet.registry.catalog import Catalog
from lorikeet.registry.keys import DAY
from lorikeet.registry.records import Actor


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
    catalog.keys.grant(who, key.id, ["c"])
    assert usable() == {ids["c"]}
    catalog.keys.grant(who, key.id, [])
    assert usable() == set() and catalog.keys.grants(who, key.id) == []
    catalog.keys.grant(who, key.id, None)
    assert usable() is None and catalog.keys.grants(who, key.id) is None
    with pytest.raises(NotFoundError, match="there is no repository 'd'"):
        catalog.keys.grant(who, key.id, ["a", "d"])
    assert usable() is None


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
