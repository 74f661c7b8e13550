"""A `lorikeet up` in a process of its own, to be killed: a scripted engine, jobs as told.

Arguments: home, port, the script of jobs.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from lorikeet.config import EngineConfig, PlatformConfig, ServeConfig
from lorikeet.engine.link import EngineClient
from lorikeet.registry.records import VersionContent
from lorikeet.server import repositories, supervisor
from lorikeet.server.platform import Platform
from lorikeet.server.serve import listen, serve
from lorikeet.server.state import ServerState

TESTS = Path(__file__).parent.parent


async def checked(_: ServerState, platform: Platform, folder: Path, source: str) -> VersionContent:
    """Without the scripted loader, whose digests are not those of contents."""
    return await platform.run_slow(platform.home.read_adapter, folder, source=source)


def main() -> None:
    repositories._checked = checked
    home, port, job = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    supervisor.child_command = lambda _: [sys.executable, job]
    engine = EngineConfig(model="lorikeet-nano")
    config = ServeConfig(engine=engine, port=port, platform=PlatformConfig(home=home))
    client = EngineClient(engine, command=[sys.executable, str(TESTS / "scripted_engine.py")])
    asyncio.run(serve(config, listen("127.0.0.1", port), engine=client))


if __name__ == "__main__":
    main()
