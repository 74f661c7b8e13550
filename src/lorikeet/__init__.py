"""Train many small adapters on one base model and serve them mixed in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorikeet.client import AsyncClient, Client
    from lorikeet.engine.llm import LLM
    from lorikeet.types import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncClient", "Client", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "lorikeet.engine.llm",
    "AsyncClient": "lorikeet.client",
    "Client": "lorikeet.client",
    "SamplingParams": "lorikeet.types",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: `import lorikeet` stays fast and loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lorikeet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
