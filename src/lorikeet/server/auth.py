"""One key for the whole server, when it was started with one."""

from __future__ import annotations

import hmac

from fastapi import Request

from lorikeet.errors import LorikeetError

OPEN_PATHS = ("/health", "/ping")  # probes carry no key


class WrongKeyError(LorikeetError):
    code = "invalid_api_key"
    status = 401


def check_key(request: Request, key: str | None) -> None:
    """Raise `WrongKeyError` (401) unless the request carries `Authorization: Bearer <key>`."""
    if key is None or request.url.path.startswith(OPEN_PATHS):
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        found = "a wrong one" if given else "none"
        raise WrongKeyError(f"this server needs an API key, found {found}", hint="send Authorization: Bearer <key>")
