"""A `lorikeet up` in a process of its own, to be killed: a scripted engine, jobs of naps. Arguments: home, port."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from lorikeet.config import EngineConfig, PlatformConfig, ServeConfig
from lorikeet.engine.link import EngineClient
from lorikeet.server import supervisor
from lorikeet.server.serve import listen, serve

TESTS = Path(__file__).parent.parent


def main() -> None:
    home, port = sys.argv[1], int(sys.argv[2])
    supervisor.child_command = lambda _: [sys.executable, str(TESTS / "scripted_job.py")]
    engine = EngineConfig(model="lorikeet-nano")
    config = ServeConfig(engine=engine, port=port, platform=PlatformConfig(home=home))
    client = EngineClient(engine, command=[sys.executable, str(TESTS / "scripted_engine.py")])
    asyncio.run(serve(config, listen("127.0.0.1", port), engine=client))


if __name__ == "__main__":
    main()
