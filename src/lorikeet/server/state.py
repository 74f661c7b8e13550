"""What the routes of one server share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lorikeet.config import ServeConfig
from lorikeet.engine.link import EngineClient, EngineInfo
from lorikeet.errors import UnavailableError
from lorikeet.server.auth import Access
from lorikeet.server.metrics import Metrics
from lorikeet.server.models import Models
from lorikeet.server.platform import Platform


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
