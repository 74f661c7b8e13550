"""Values of flags that several commands have."""

from __future__ import annotations

from typing import Any

from lorikeet.errors import ConfigError


def one_of(value: str, flag: str, *allowed: str) -> Any:
    """`value`, which is one of `allowed`. Raises `ConfigError`."""
    if value not in allowed:
        raise ConfigError(f"{flag}: found {value!r}; expected {' | '.join(allowed)}", param=flag)
    return value
