"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from lorikeet.config import ServeConfig
from lorikeet.engine.link import EngineClient, EngineInfo
from lorikeet.errors import UnavailableError
from lorikeet.server.auth import Access
from lorikeet.server.metrics import Metrics
from lorikeet.server.models import Models
from lorikeet.server.platform import Platform
from lorikeet.server.validation import AnyBody, parse, read_body


@dataclass
class ServerState:
    config: ServeConfig
    engine: EngineClient
    models: Models
    platform: Platform | None = None  # of `lorikeet up`
    metrics: Metrics = field(default_factory=Metrics)
    started: float = field(default_factory=time.time)
    access: Access = field(init=False)  # made with the application

    @property
    def info(self) -> EngineInfo:
        """The engine's description. Raises `UnavailableError` before the first one is ready."""
        if self.engine.info is None:
            raise UnavailableError("the engine is starting", retry_after=3.0, hint="try again shortly")
        return self.engine.info

    async def body(self, request: Request, kind: type[AnyBody], limit: int | None = None) -> AnyBody:
        """The body of a request, of at most `limit` bytes (default: the server's), as this kind.

        Raises `BodyTooLargeError`, and what `parse` raises.
        """
        return parse(kind, await read_body(request, self.config.max_body if limit is None else limit))
