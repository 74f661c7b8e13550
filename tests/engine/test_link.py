"""The engine's process border, with an engine that does as told: faults, restarts, one final event always."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorikeet.config import EngineConfig
from lorikeet.engine.link import EngineClient, EventStream
from lorikeet.errors import LorikeetError
from lorikeet.types import Event, Request, SamplingParams

SCRIPTED = Path(__file__).parent.parent / "scripted_engine.py"
RAISE_IN_STEP, DIE, WAIT, REFUSE, FINAL_TWICE, SLOW = range(246, 252)


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(EngineConfig(**settings), command=[sys.executable, str(SCRIPTED)])
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def request(name: str, *tokens: int, max_tokens: int = 4, adapter: str | None = None) -> Request:
    return Request(
        request_id=name, tokens=list(tokens or (1,)), sampling=SamplingParams(max_tokens=max_tokens), adapter=adapter
    )


async def collect(stream: EventStream) -> list[Event]:
    return [event async for event in stream]


async def generate(client: EngineClient, wanted: Request) -> list[Event]:
    return await asyncio.wait_for(collect(await client.submit(wanted)), 10)


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


async def until_ready(client: EngineClient, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not client.ready:
        assert time.monotonic() < deadline, "the engine did not come back"
        await asyncio.sleep(0.02)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_a_request_streams_and_ends_once() -> None:
    async def test() -> None:
        async with running() as client:
            assert client.ready and client.info is not None and client.info.max_context == 256
            events = await generate(client, request("a", 7))
            assert tokens(events) == [8, 9, 10, 11]
            assert [event.finish for event in events] == [None, None, None, "length"]
            twice = await generate(client, request("b", FINAL_TWICE))
            assert sum(event.finish is not None for event in twice) == 1
            many = await asyncio.gather(*(generate(client, request(f"m{i}", i)) for i in range(64)))
            assert [tokens(events)[0] for events in many] == [i + 1 for i in range(64)]
            assert client.in_flight == 0

    run(test)


def test_a_request_that_cannot_be_taken_ends_with_its_error() -> None:
    async def test() -> None:
        async with running(queue=2) as client:
            (refused,) = await generate(client, request("a", REFUSE))
            assert refused.finish == "error" and refused.error is not None
            assert (refused.error.status, refused.error.param) == (400, "prompt")
            (unknown,) = await generate(client, request("b", adapter="nobody"))
            assert unknown.error is not None and "nobody" in unknown.error.message
            waiting = [await client.submit(request(f"w{i}", WAIT)) for i in range(2)]
            (full,) = await generate(client, request("c"))
            assert full.error is not None and (full.error.status, full.error.retry_after) == (429, 2.0)
            for stream in waiting:
                client.cancel(stream.request.request_id)
                assert (await collect(stream))[-1].finish == "cancelled"
            assert (await generate(client, request("c2")))[-1].finish == "length"

    run(test)


def test_closing_a_stream_cancels_its_request() -> None:
    async def test() -> None:
        async with running() as client:
            endless = SamplingParams(max_tokens=10**6, ignore_eos=True)
            stream = await client.submit(Request(request_id="a", tokens=[SLOW], sampling=endless))
            await anext(stream)
            stream.close()
            async with asyncio.timeout(10):
                while client.in_flight:
                    await asyncio.sleep(0.01)
            assert (await client.stats()).running == 0

    run(test)


@pytest.mark.parametrize("order", [DIE, RAISE_IN_STEP])
def test_a_dead_engine_ends_every_request_and_is_replaced(order: int, tmp_path: Path) -> None:
    """A kill and an exception in a step alike: what was sent stays sent, then one retryable error each."""

    async def test() -> None:
        async with running() as client:
            (tmp_path / "fine").mkdir()
            adapter = await client.resolve(tmp_path / "fine")
            await client.manage("pin", adapter.digest)
            streams = [await client.submit(request(f"w{i}", WAIT)) for i in range(5)]
            streams.append(await client.submit(request("bad", order, max_tokens=9)))
            ended = await asyncio.wait_for(asyncio.gather(*map(collect, streams)), 10)
            for events in ended:
                assert [event.finish for event in events][-1:] == ["error"]
                assert sum(event.finish is not None for event in events) == 1
                error = events[-1].error
                assert error is not None and (error.status, error.retryable) == (503, True) and error.retry_after
            assert len(tokens(ended[-1])) == 2
            if client.ready:  # the exception's process is still on its way out
                await asyncio.sleep(0.5)
            await until_ready(client)
            assert client.restarts == 1
            assert [one.pinned for one in (await client.stats()).adapters] == [True]
            events = await generate(client, request("after", 3, adapter=adapter.digest))
            assert tokens(events) == [4, 5, 6, 7]
            assert (tmp_path / "fine" / "compiled.log").read_text() == "compiled\n"

    run(test)


def test_while_there_is_no_engine_requests_are_refused() -> None:
    async def test() -> None:
        async with running() as client:
            pid = client.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            while client.ready:
                await asyncio.sleep(0.005)
            with pytest.raises(LorikeetError) as error:
                await client.submit(request("a"))
            assert error.value.status == 503 and error.value.retry_after
            assert error.value.message == "the engine is starting again"
            await until_ready(client)
            assert client.pid != pid
            assert tokens(await generate(client, request("b"))) == [2, 3, 4, 5]

    run(test)


def test_before_the_first_engine_is_there_nothing_starts_again() -> None:
    async def test() -> None:
        client = EngineClient(EngineConfig(), command=[sys.executable, str(SCRIPTED)])
        starting = asyncio.create_task(client.start())
        await asyncio.sleep(0)
        with pytest.raises(LorikeetError) as error:
            await client.submit(request("a"))
        await starting
        await client.stop()
        assert error.value.status == 503 and error.value.message == "the engine is starting"

    run(test)


def test_an_engine_asked_to_leave_ends_what_runs_first() -> None:
    async def test() -> None:
        async with running() as client:
            stream = await client.submit(request("a", SLOW, max_tokens=20))
            await anext(stream)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGTERM)
            assert (await collect(stream))[-1].finish == "length"
            while client.ready:
                await asyncio.sleep(0.01)
            await until_ready(client)

    run(test)


def test_drain() -> None:
    async def test() -> None:
        async with running() as client:
            short, long = [await client.submit(request(n, SLOW, max_tokens=m)) for n, m in (("s", 10), ("l", 9999))]
            draining = asyncio.create_task(client.drain(1.0))
            await asyncio.sleep(0.05)
            assert not client.ready and client.alive
            with pytest.raises(LorikeetError, match="shutting down"):
                await client.submit(request("late"))
            assert (await collect(short))[-1].finish == "length"
            last = (await collect(long))[-1]
            assert last.finish == "error" and last.error is not None and last.error.retryable
            await draining
            assert not client.alive

    run(test)


def test_an_engine_that_cannot_be_built_says_why() -> None:
    async def test() -> None:
        client = EngineClient(EngineConfig(model="broken"), command=[sys.executable, str(SCRIPTED)])
        with pytest.raises(LorikeetError, match="no config.json") as error:
            await client.start()
        assert error.value.status == 422 and error.value.hint == "name a model folder"
        assert not client.alive

    run(test)


def test_resolves_share_a_job_and_fail_alone(tmp_path: Path) -> None:
    for name in ("slow", "fine", "bad", "die"):
        (tmp_path / name).mkdir()

    async def test() -> None:
        async with running() as client:
            calls = [client.resolve(tmp_path / n) for n in ("slow", "slow", "bad", "die", "fine", "slow")]
            slow, again, bad, died, fine, third = await asyncio.gather(*calls, return_exceptions=True)
            assert slow == again == third and not isinstance(slow, BaseException)
            assert isinstance(bad, LorikeetError) and (bad.status, bad.param) == (422, "adapter_model.safetensors")
            assert isinstance(died, LorikeetError) and died.retryable and "die" in died.message
            assert not isinstance(fine, BaseException) and fine.digest == "digest-fine"
            assert (tmp_path / "slow" / "compiled.log").read_text() == "compiled\n"
            assert len((await client.stats()).adapters) == 2
            assert client.restarts == 0

    run(test)


def test_steps_go_on_while_an_adapter_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()

    async def test() -> None:
        async with running() as client:
            resolving = asyncio.create_task(client.resolve(tmp_path / "slow"))
            await asyncio.sleep(0.05)
            assert (await generate(client, request("a")))[-1].finish == "length"
            assert not resolving.done()
            await resolving

    run(test)


def test_an_idle_engine_costs_no_cpu() -> None:
    async def test() -> None:
        async with running() as client:
            await generate(client, request("a"))
            await asyncio.sleep(0.2)
            process = psutil.Process(client.pid)
            before = sum(process.cpu_times()[:2])
            await asyncio.sleep(1.0)
            assert sum(process.cpu_times()[:2]) - before < 0.1

    run(test)


def test_children_die_with_their_parent() -> None:
    code = f"""
import asyncio, sys, psutil
from lorikeet.config import EngineConfig
from lorikeet.engine.link import EngineClient
async def main():
    client = EngineClient(EngineConfig(), command=[sys.executable, {str(SCRIPTED)!r}])
    await client.start()
    print(client.pid, await client.loader_pid(), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
