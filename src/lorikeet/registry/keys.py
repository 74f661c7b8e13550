"""Tenants, users, and the keys by which the server knows them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from typing import Any

import msgspec
from sqlalchemy import Select, delete, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from lorikeet.errors import ConflictError, ForbiddenError, InvalidRequestError
from lorikeet.registry.audit import log_change, not_found, to_record
from lorikeet.registry.database import Part, change, query
from lorikeet.registry.records import RANKS, Actor, Key, KeyChange, Role, Tenant, Usage, User
from lorikeet.registry.references import check_name
from lorikeet.registry.repositories import find_repository
from lorikeet.registry.schema import GrantRow, KeyRow, RepositoryRow, TenantRow, UsageRow, UserRow

MARK = "lk_"  # what a key begins with, so that scanners for leaked secrets find it
SHOWN = 10  # characters of a key that may be shown
TOUCH_SECONDS = 60.0  # how exactly `last_used` is kept
DAY = 86_400.0
ROLES: tuple[Role, ...] = ("admin", "trainer", "user")
LIMITS = ("requests_per_minute", "tokens_per_day")


class People(Part):
    @change
    def create_tenant(self, session: Session, who: Actor, name: str) -> Tenant:
        """Raises `ConflictError` when the name is taken."""
        check_name(name)
        if session.scalar(select(TenantRow.id).where(TenantRow.name == name)) is not None:
            raise ConflictError(f"a tenant {name!r} is there already", hint="choose another name", param="name")
        row = TenantRow(name=name, created=self._now)
        session.add(row)
        session.flush()
        log_change(session, who, self._now, "tenant.create", row.id, name)
        return to_record(Tenant, row)

    @query
    def tenant(self, session: Session, name_or_id: str) -> Tenant:
        row = session.scalar(select(TenantRow).where((TenantRow.name == name_or_id) | (TenantRow.id == name_or_id)))
        if row is None:
            raise not_found("tenant", name_or_id, param="tenant")
        return to_record(Tenant, row)

    @query
    def tenants(self, session: Session) -> list[Tenant]:
        return [to_record(Tenant, row) for row in session.scalars(select(TenantRow).order_by(TenantRow.name))]

    @change
    def create_user(
        self, session: Session, who: Actor, name: str, role: Role = "user", email: str | None = None
    ) -> User:
        """A user of the actor's tenant. Raises `ConflictError` when the name is taken."""
        check_name(name)
        _check_role(role)
        if session.scalar(_users(who, name)) is not None:
            raise ConflictError(f"a user {name!r} is there already", hint="choose another name", param="name")
        row = UserRow(tenant_id=who.tenant, name=name, email=email, role=role, created=self._now)
        session.add(row)
        session.flush()
        log_change(session, who, self._now, "user.create", row.id, name, role=role)
        return to_record(User, row)

    @query
    def user(self, session: Session, who: Actor, name: str) -> User:
        row = session.scalar(_users(who, name))
        if row is None:
            raise not_found("user", name, param="user")
        return to_record(User, row)

    @query
    def users(self, session: Session, who: Actor) -> list[User]:
        rows = session.scalars(select(UserRow).where(UserRow.tenant_id == who.tenant).order_by(UserRow.name))
        return [to_record(User, row) for row in rows]

    @change
    def disable_user(self, session: Session, who: Actor, name: str, disabled: bool = True) -> User:
        """The keys of a disabled user open nothing. False takes it back."""
        row = session.scalar(_users(who, name).with_for_update())
        if row is None:
            raise not_found("user", name, param="user")
        if (row.disabled is not None) != disabled:
            row.disabled = self._now if disabled else None
            log_change(session, who, self._now, "user.disable" if disabled else "user.enable", row.id, name)
        return to_record(User, row)


class Keys(Part):
    @change
    def create(
        self,
        session: Session,
        who: Actor,
        name: str,
        role: Role = "user",
        *,
        user: str | None = None,
        repositories: Iterable[str] | None = None,
        expires: float | None = None,
        requests_per_minute: int | None = None,
        tokens_per_day: int | None = None,
    ) -> tuple[Key, str]:
        """A key of the actor's tenant, and the key itself, which is shown this once.

        `repositories`: the names of those it may use; None is all. Raises `NotFoundError`, `InvalidRequestError`.
        """
        check_name(name)
        _check_limits({"requests_per_minute": requests_per_minute, "tokens_per_day": tokens_per_day})
        if expires is not None and expires <= self._now:
            raise InvalidRequestError("expires: found a time that has passed", param="expires")
        owner = None if user is None else session.scalar(_users(who, user))
        if user is not None and owner is None:
            raise not_found("user", user, param="user")
        _check_role(role, owner)
        secret = MARK + secrets.token_urlsafe(32)
        row = KeyRow(
            tenant_id=who.tenant, user_id=None if owner is None else owner.id, name=name, hash=hash_key(secret),
            prefix=secret[:SHOWN], role=role, every_repository=repositories is None,
            requests_per_minute=requests_per_minute, tokens_per_day=tokens_per_day, created=self._now,
            created_by=who.name, expires=expires,
        )  # fmt: skip
        session.add(row)
        session.flush()
        self._grant(session, who, row, repositories)
        log_change(session, who, self._now, "key.create", row.id, name, prefix=row.prefix, role=role)
        return to_record(Key, row), secret

    @query
    def authenticate(self, session: Session, secret: str) -> tuple[Actor, Key] | None:
        """Who holds this key; None for one that is unknown, expired, revoked, or of a disabled user.

        The hash is looked up, not compared: how long that takes says nothing of a key.
        """
        found = session.execute(_WITH_USERS.where(KeyRow.hash == hash_key(secret))).first()
        actor = None if found is None else _holder(session, *found, self._now)
        return None if found is None or actor is None else (actor, to_record(Key, found[0]))

    @query
    def holders(self, session: Session, key_ids: Iterable[str]) -> dict[str, Actor]:
        """Who holds each of these keys, by its id; those that open nothing are left out."""
        found = session.execute(_WITH_USERS.where(KeyRow.id.in_(sorted(set(key_ids))))).all()
        holders = {row.id: _holder(session, row, user, self._now) for row, user in found}
        return {key_id: actor for key_id, actor in holders.items() if actor is not None}

    @query
    def exist(self, session: Session) -> bool:
        """Whether there is a key at all that opens something."""
        open_ = (KeyRow.revoked.is_(None), KeyRow.expires.is_(None) | (KeyRow.expires > self._now))
        return session.scalar(select(KeyRow.id).where(*open_).limit(1)) is not None

    @query
    def all(self, session: Session, who: Actor) -> list[Key]:
        """The tenant's, newest first, revoked ones too."""
        rows = session.scalars(
            select(KeyRow).where(KeyRow.tenant_id == who.tenant).order_by(KeyRow.created.desc(), KeyRow.id)
        )
        return [to_record(Key, row) for row in rows]

    @query
    def grants(self, session: Session, who: Actor, key_id: str) -> list[str] | None:
        """The names of the repositories that a key may use; None: all."""
        return _granted(session, _key(session, who, key_id))

    @change
    def alter(self, session: Session, who: Actor, key_id: str, wanted: KeyChange) -> Key:
        """Change what a key may do, from the next request on.

        Raises `ConflictError` for a key that opens nothing any more and for the tenant's last admin, `ForbiddenError`
        for a key that would widen itself, `InvalidRequestError`, `NotFoundError`.
        """
        # Admins' rows are locked too: of two who lower each other at once, the second sees what the first did.
        locked = select(KeyRow).where(KeyRow.tenant_id == who.tenant, or_(KeyRow.id == key_id, KeyRow.role == "admin"))
        rows = {row.id: row for row in session.scalars(locked.order_by(KeyRow.id).with_for_update())}
        row = rows.get(key_id)
        if row is None:
            raise not_found("key", key_id, param="key")
        before = {name: getattr(row, name) for name in ("role", *LIMITS)} | {"repositories": _granted(session, row)}
        after = before | msgspec.to_builtins(wanted)
        if after["repositories"] is not None:
            after["repositories"] = sorted(set(after["repositories"]))
        changed = {name: {"from": before[name], "to": after[name]} for name in before if before[name] != after[name]}
        if not changed:
            return to_record(Key, row)
        _check_open(row, self._now)
        if "role" in changed:
            _check_role(after["role"], None if row.user_id is None else session.get_one(UserRow, row.user_id))
        _check_limits(after)
        if who.key_id == row.id:
            _check_narrower(before, after)
        stays = after["role"] == "admin" and after["repositories"] is None
        if not stays and [one for one in rows.values() if _manages(session, one, self._now)] == [row]:
            raise ConflictError(
                f"{row.name!r} is the last key that manages this tenant", hint="make another admin's key first",
                param="role" if "role" in changed else "repositories", code="last_admin",
            )  # fmt: skip
        row.role, row.requests_per_minute, row.tokens_per_day = (after[name] for name in ("role", *LIMITS))
        if "repositories" in changed:
            self._grant(session, who, row, after["repositories"])
        log_change(session, who, self._now, "key.change", row.id, row.name, **changed)
        return to_record(Key, row)

    def _grant(self, session: Session, who: Actor, row: KeyRow, repositories: Iterable[str] | None) -> None:
        """Let a key use exactly these repositories, by name; None: all."""
        session.execute(delete(GrantRow).where(GrantRow.key_id == row.id))
        row.every_repository = repositories is None
        for one in sorted(set(repositories or ())):
            home = find_repository(session, who, one)
            session.add(GrantRow(key_id=row.id, repository_id=home.id, created=self._now))

    @change
    def revoke(self, session: Session, who: Actor, key_id: str) -> Key:
        """It opens nothing from the next request on."""
        row = _key(session, who, key_id, lock=True)
        if row.revoked is None:
            row.revoked = self._now
            log_change(session, who, self._now, "key.revoke", row.id, row.name)
        return to_record(Key, row)

    # --- usage: counted, not audited --------------------------------------------------------------------------------

    @change
    def spend(self, session: Session, key_id: str, *, requests: int = 0, tokens: int = 0) -> Usage:
        """Add to what a key used today, and note that it was used."""
        day = int(self._now // DAY)
        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        fresh = insert(UsageRow).values(key_id=key_id, day=day, requests=requests, tokens=tokens)
        sums = {"requests": UsageRow.requests + requests, "tokens": UsageRow.tokens + tokens}
        session.execute(fresh.on_conflict_do_update(index_elements=["key_id", "day"], set_=sums))
        row = session.get_one(KeyRow, key_id)
        if row.last_used is None or self._now - row.last_used > TOUCH_SECONDS:
            row.last_used = self._now
        return to_record(Usage, session.get_one(UsageRow, (key_id, day)))

    @query
    def usage(self, session: Session, key_id: str, days: int = 1) -> list[Usage]:
        """Of the last `days` days, today first; days without use are left out."""
        since = int(self._now // DAY) - days
        rows = session.scalars(
            select(UsageRow).where(UsageRow.key_id == key_id, UsageRow.day > since).order_by(UsageRow.day.desc())
        )
        return [to_record(Usage, row) for row in rows]


_WITH_USERS = select(KeyRow, UserRow).outerjoin(UserRow, UserRow.id == KeyRow.user_id)


def _holder(session: Session, row: KeyRow, user: UserRow | None, now: float) -> Actor | None:
    """None for a key that is expired, revoked, or of a disabled user."""
    expired = row.expires is not None and row.expires <= now
    if expired or row.revoked is not None or (user is not None and user.disabled is not None):
        return None
    repositories = None
    if not row.every_repository:
        repositories = frozenset(session.scalars(select(GrantRow.repository_id).where(GrantRow.key_id == row.id)))
    return Actor(
        tenant=row.tenant_id, name=f"key:{row.name}" if user is None else f"user:{user.name}",
        role=msgspec.convert(row.role, Role), key_id=row.id, user_id=row.user_id, repositories=repositories,
    )  # fmt: skip


def hash_key(secret: str) -> str:
    """Keys are 256 random bits: a plain hash cannot be guessed back, and is quick enough for every request."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _check_role(role: str, owner: UserRow | None = None) -> None:
    """`owner`: whose key it is to be the role of."""
    if role not in ROLES:
        raise InvalidRequestError(f"role: found {role!r}; expected {', '.join(ROLES)}", param="role")
    if owner is not None and RANKS[msgspec.convert(role, Role)] > RANKS[msgspec.convert(owner.role, Role)]:
        raise InvalidRequestError(
            f"role: found {role!r}; {owner.name!r} has the role {owner.role}, and a key has no higher one",
            param="role",
        )


def _check_limits(limits: dict[str, Any]) -> None:
    for field in LIMITS:
        if limits[field] is not None and limits[field] < 1:
            raise InvalidRequestError(f"{field}: found {limits[field]}; expected 1 or more, or none", param=field)


def _check_open(row: KeyRow, now: float) -> None:
    if row.revoked is not None or (row.expires is not None and row.expires <= now):
        ended = "revoked" if row.revoked is not None else "expired"
        raise ConflictError(f"the key {row.name!r} is {ended}", hint="make a new one", param="key")


def _check_narrower(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise `ForbiddenError` where a key that changes itself would come to more than it has."""
    wider = ["role"] if RANKS[after["role"]] > RANKS[before["role"]] else []
    for name in LIMITS:
        if before[name] is not None and (after[name] is None or after[name] > before[name]):
            wider.append(name)
    had, has = before["repositories"], after["repositories"]
    if had is not None and (has is None or not set(has) <= set(had)):
        wider.append("repositories")
    if wider:
        raise ForbiddenError(
            f"{wider[0]}: a key does not widen itself", hint="have another admin do it", param=wider[0], code="own_key"
        )


def _granted(session: Session, row: KeyRow) -> list[str] | None:
    """Names of living repositories, sorted; None: all."""
    if row.every_repository:
        return None
    names = select(RepositoryRow.name).join(GrantRow, GrantRow.repository_id == RepositoryRow.id)
    alive = names.where(GrantRow.key_id == row.id, RepositoryRow.deleted.is_(None))
    return [*session.scalars(alive.order_by(RepositoryRow.name))]


def _manages(session: Session, row: KeyRow, now: float) -> bool:
    """Whether it opens the management of its tenant: an admin's key that is not confined."""
    user = None if row.user_id is None else session.get(UserRow, row.user_id)
    return row.role == "admin" and row.every_repository and _holder(session, row, user, now) is not None


def _users(who: Actor, name: str) -> Select[UserRow]:
    return select(UserRow).where(UserRow.tenant_id == who.tenant, UserRow.name == name)


def _key(session: Session, who: Actor, key_id: str, *, lock: bool = False) -> KeyRow:
    wanted = select(KeyRow).where(KeyRow.id == key_id, KeyRow.tenant_id == who.tenant)
    row = session.scalar(wanted.with_for_update() if lock else wanted)
    if row is None:
        raise not_found("key", key_id, param="key")
    return row
