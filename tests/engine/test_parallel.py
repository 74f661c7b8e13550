"""Several processes hold one model over gloo: what they answer is what one process answers, and they end together."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from lorikeet.adapters import compiled
from lorikeet.adapters.normal import Entry
from lorikeet.adapters.overrides import Override
from lorikeet.config import EngineConfig
from lorikeet.engine.engine import Engine
from lorikeet.engine.link import EngineClient
from lorikeet.engine.parallel import (
    Begin,
    Carried,
    Followers,
    Join,
    LeadingRunner,
    Step,
    check_ranks,
    decode_from_follower,
    decode_to_follower,
    encode,
    threads_of_rank,
)
from lorikeet.engine.plan import Outcome, Plan, SlotLoad
from lorikeet.engine.request import EVERYWHERE
from lorikeet.engine.residency import AdapterDrop, AdapterMove
from lorikeet.engine.runner import Runner
from lorikeet.engine.sizing import Sizes
from lorikeet.errors import ConfigError, LorikeetError
from lorikeet.model.families import load_spec
from lorikeet.model.shard import Shard
from lorikeet.model.sources import identify
from lorikeet.model.spec import ModelSpec
from lorikeet.types import (
    AdapterCopy,
    AdapterInfo,
    BaseIdentity,
    ErrorInfo,
    Event,
    Request,
    SamplingParams,
    ScheduledSequence,
)

Checkpoint = Callable[..., Path]
SETTINGS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "kv_memory": 2**21, "adapter_memory": 2**20, "block_size": 4,
    "max_seqs": 6, "step_tokens": 48, "threads": 1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "pairs": {"roles": ("q", "k", "v", "o", "gate", "up", "down")},
    "some": {"roles": ("k", "o", "up"), "rank": 7},
    "gains": {"roles": ("q", "v", "o", "down"), "scaled": True},
    "vectors": {"roles": ("k", "up", "down"), "scaled": True, "rank": 0},
    "tables": {"roles": ("embed", "v", "down", "head"), "overrides": True},
    "stream": {"roles": ("residual",), "scaled": True, "positions": (2, 3, 0)},
    "invoked": {"roles": ("q", "down"), "invocation": (9, 8)},
}


@contextmanager
def built(folder: Path, ranks: int, **settings: Any) -> Iterator[Engine]:
    engine = Engine.build(EngineConfig(model=str(folder), tensor_parallel=ranks, **(SETTINGS | settings)))
    try:
        yield engine
    finally:
        engine.close()


def make(base: Path, ranks: int, name: str, folder: Path) -> AdapterInfo:
    """A random adapter for the base in a folder, compiled for so many ranks."""
    return _random(load_spec(base), identify(base), ranks, name, folder, **KINDS[name])


def _random(
    spec: ModelSpec, base: BaseIdentity, ranks: int, name: str, folder: Path, *, roles: tuple[str, ...],
    rank: int = 3, scaled: bool = False, overrides: bool = False, **acts: Any,
) -> AdapterInfo:  # fmt: skip
    random = np.random.default_rng(len(name))

    def array(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (random.normal(size=shape) * scale).astype(np.float32)

    entries = []
    for site in (*spec.sites, *spec.residual_sites):
        if site.role in roles:
            a, b = array(rank, site.d_in, scale=site.d_in**-0.5), array(rank, site.d_out, scale=0.2)
            vectors = (1 + array(site.d_out, scale=0.3), array(site.d_out, scale=0.1)) if scaled else (None, None)
            entries.append(Entry(site, a, b, 0.7, *vectors))
    if overrides:
        acts["overrides"] = [
            Override("embed", None, array(3, spec.hidden_size), (2, 5, 40)),
            Override("head", None, array(spec.vocab_size, spec.hidden_size, scale=0.2)),
            Override("mlp_norm", 1, 1 + array(1, spec.hidden_size, scale=0.3)),
        ]
    digest = hashlib.sha256(name.encode()).hexdigest()
    shards = [Shard(spec, rank, ranks) for rank in range(ranks)]
    header, data = compiled.lay_out_parts(entries, shards, digest, base, "float32", **acts)
    path = folder / f"{name}-{ranks}.lorikeet"
    compiled._write(path, header, data)
    return header.info(path)


def requests(digests: dict[str, str]) -> list[Request]:
    """The base and every kind, greedy and sampled, of different lengths: one batch that mixes them."""
    made = []
    for i, name in enumerate(["base", *digests, "base again"]):
        tokens = np.random.default_rng(i).integers(10, 300, 4 + 3 * i).tolist()
        if name == "invoked":
            tokens[3:5] = KINDS["invoked"]["invocation"]
        sampled = {"temperature": 0.8, "seed": i, "top_p": 0.9} if i % 3 == 2 else {"temperature": 0.0}
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=3, **sampled)  # type: ignore[arg-type]
        made.append(Request(request_id=name, tokens=tokens, adapter=digests.get(name), sampling=sampling))
    return made


def answers(engine: Engine, folder: Path) -> dict[str, tuple[list[int], np.ndarray]]:
    """Of each request its tokens, and all logprobs that were told."""
    digests = {}
    for name in KINDS:
        info = make(Path(engine.config.model), engine.config.tensor_parallel, name, folder)
        engine.register(info)
        digests[name] = info.digest
    return run(engine, requests(digests))


def run(engine: Engine, wanted: list[Request]) -> dict[str, tuple[list[int], np.ndarray]]:
    tokens: dict[str, list[int]] = {}
    numbers: dict[str, list[float]] = {}
    for request in wanted:
        engine.add(request)
    while engine.has_work():
        for event in engine.step():
            assert event.error is None, event.error
            tokens.setdefault(event.request_id, []).extend(event.tokens)
            for score in [*(event.prompt_logprobs or []), *(event.logprobs or [])]:
                if score is not None:
                    values = [score.logprob, *(value for _, value in score.top)]
                    numbers.setdefault(event.request_id, []).extend(values)
    return {name: (tokens[name], np.array(numbers[name])) for name in tokens}


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, (tokens, numbers) in expected.items():
        assert found[name][0] == tokens, name
        np.testing.assert_allclose(found[name][1], numbers, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("family", "ranks"),
    [
        ("llama-tied", 2),
        pytest.param("qwen3", 2, marks=pytest.mark.slow),
        pytest.param("qwen2", 4, marks=pytest.mark.slow),  # 2 key-value heads, each held by 2 of the ranks
    ],
)
def test_ranks_answer_as_one_process(family: str, ranks: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint(family)
    with built(folder, 1) as alone:
        expected = answers(alone, tmp_path)
    distinct = {tuple(tokens) for tokens, _ in expected.values()}
    assert len(distinct) == len(expected)
    with built(folder, ranks) as together:
        assert isinstance(together._runner, LeadingRunner)
        found = answers(together, tmp_path)
        check_same(found, expected)
        again = run(together, requests({name: hashlib.sha256(name.encode()).hexdigest() for name in KINDS}))
        assert {name: tokens for name, (tokens, _) in again.items()} == {n: t for n, (t, _) in found.items()}
        pids = together._runner._followers.pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each rank takes a GPU")
def test_gpus_answer_as_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("llama-tied")
    with built(folder, 1, device="cuda") as alone:
        expected = answers(alone, tmp_path)
    with built(folder, 2, device="cuda") as together:
        found = answers(together, tmp_path)
    for name, (_, numbers) in expected.items():
        np.testing.assert_allclose(found[name][1], numbers, atol=1e-3, rtol=1e-3, err_msg=name)


def test_an_adapter_that_one_rank_cannot_read_is_lost_for_all(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """And adapters go and come back: there is room for one at a time."""
    folder = checkpoint("llama-tied")
    infos = [make(folder, 2, name, tmp_path) for name in ("pairs", "gains")]
    with built(folder, 2, adapter_memory=max(info.nbytes for info in infos) + 64) as engine:
        for info in infos:
            engine.register(info)
        wanted = [
            Request(
                request_id=f"{i}", tokens=[20 + i, 30, 40], adapter=infos[i % 2].digest,
                sampling=SamplingParams(max_tokens=3, temperature=0.0, logprobs=0, ignore_eos=True),
            )
            for i in range(4)
        ]  # fmt: skip
        found = run(engine, wanted)
        assert len(found) == 4 and found["0"][0] != found["2"][0]
        Path(infos[0].path).unlink()
        run(engine, wanted[1:2])
        engine.add(wanted[0])
        events: list[Event] = []
        while engine.has_work():
            events += engine.step()
        assert events[-1].error is not None and events[-1].error.code == "adapter_lost"
        assert run(engine, wanted[3:])["3"][0] == found["3"][0]


def test_a_rank_that_is_gone_is_named(checkpoint: Checkpoint) -> None:
    with built(checkpoint("llama-tied"), 2) as engine:
        (pid,) = engine._runner._followers.pids  # type: ignore[attr-defined]
        endless = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        engine.add(Request(request_id="a", tokens=[20, 30], sampling=endless))
        engine.step()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LorikeetError, match=r"rank 1 of the 2 that hold the model ended \(killed by SIGKILL\)"):
            for _ in range(100):
                engine.step()


def test_one_that_cannot_begin_is_named(checkpoint: Checkpoint) -> None:
    config = EngineConfig(model=str(checkpoint("llama-tied")), tensor_parallel=2, **SETTINGS)
    followers = Followers(config, command=[sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(LorikeetError, match=r"rank 1 of the 2 that hold the model ended \(exit code 3\)"):
        followers.join(None, "cpu")  # type: ignore[arg-type]
    followers.close()
    broken = EngineConfig(model="/nowhere/to/be/found", tensor_parallel=2, **SETTINGS)
    followers = Followers(broken)
    with pytest.raises(LorikeetError, match="/nowhere/to/be/found: no such folder"):
        followers.join(None, "cpu")  # type: ignore[arg-type]
    followers.close()


def test_how_many_there_may_be(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel: found 3; expected 1, 2, 4 or 8"):
        check_ranks(EngineConfig(tensor_parallel=3), "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_ranks(EngineConfig(tensor_parallel=2), "cuda")
    with pytest.raises(ConfigError, match="tensor_parallel: found 4; expected at most 2, the number of CUDA devices"):
        check_ranks(EngineConfig(tensor_parallel=4), "cuda")
    with pytest.raises(
        ConfigError, match="tensor_parallel: found 8; expected a divisor of the model's attention heads, 4"
    ):
        Engine.build(EngineConfig(model=str(checkpoint("llama-tied")), tensor_parallel=8, **SETTINGS))
    assert threads_of_rank(EngineConfig(tensor_parallel=4, threads=9)) == 2
    assert threads_of_rank(EngineConfig(tensor_parallel=4, threads=2)) == 1
    assert threads_of_rank(EngineConfig()) is None


@pytest.mark.slow
def test_behind_the_link_a_lost_rank_is_a_restart(
    checkpoint: Checkpoint, adapters: Callable[..., list[Path]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole engine process: its loader compiles for two ranks, requests get a retryable error, all die with it."""
    usual = Path("~/.cache/lorikeet/numba").expanduser()
    monkeypatch.setenv("NUMBA_CACHE_DIR", os.environ.get("NUMBA_CACHE_DIR", str(usual)))  # kernels are compiled already
    config = EngineConfig(model=str(checkpoint("qwen3")), tensor_parallel=2, **SETTINGS)
    (adapter,) = adapters("qwen3", 1)

    def ask(name: str, digest: str | None, count: int) -> Request:
        sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        return Request(request_id=name, tokens=[20, 30, 40], adapter=digest, sampling=sampling)

    async def test() -> None:
        client = EngineClient(config)
        await client.start()
        try:
            info = await client.resolve(adapter)
            first = [event async for event in await client.submit(ask("a", info.digest, 5), adapter)]
            assert first[-1].finish == "length"
            stream = await client.submit(ask("b", info.digest, 200), adapter)
            await anext(stream)
            for follower in _followers(client.pid):
                follower.kill()
            events = [event async for event in stream]
            assert events[-1].error is not None and events[-1].error.retryable
            assert "rank 1 of the 2 that hold the model ended" in events[-1].error.message
            await _until(lambda: client.restarts == 1 and client.ready)
            second = [event async for event in await client.submit(ask("c", info.digest, 5), adapter)]
            assert [event.tokens for event in second] == [event.tokens for event in first]
            (idle,) = _followers(client.pid)
            idle.kill()  # while there is nothing to do
            await _until(lambda: client.restarts == 2 and client.ready)
            left = _followers(client.pid)
            os.kill(client.pid or 0, signal.SIGKILL)
            _, alive = psutil.wait_procs(left, timeout=10)
            assert left and not alive
        finally:
            await client.stop()

    asyncio.run(test())


def _followers(pid: int | None) -> list[psutil.Process]:
    children = psutil.Process(pid).children()
    return [child for child in children if "lorikeet.engine.follower" in child.cmdline()]


async def _until(done: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def test_plans_cross_the_border_as_they_are() -> None:
    copy = AdapterCopy("d", "/p", 3, 64, 128, 0, 128)
    plan = Plan(
        adapters=[AdapterDrop(1), AdapterMove(2, 128, 0, 64), copy],
        loads=[SlotLoad(0, [1, 2], [5], 3, SamplingParams(seed=7), 2**64 - 1, EVERYWHERE)],
        blocks=[(0, 1, [6])],
        tokens=[(0, 2, [9])],
        sequences=[ScheduledSequence(0, 0, 2, True)],
        allowed={0: [4, 5]},
    )
    sizes = Sizes(
        dtype=torch.bfloat16, adapter_dtype=torch.float32, max_context=8, blocks=4, kv_bytes=1, slab_bytes=64,
        logit_rows=3,
    )  # fmt: skip
    for message in (Step(plan), Begin(sizes, "/m"), Join(EngineConfig(tensor_parallel=2), 1, None)):
        assert decode_to_follower(encode(message)) == message
    answer = Carried({"d": ErrorInfo(code="c", message="m")}, {"e"})
    assert decode_from_follower(encode(answer)) == answer


def test_what_one_rank_lacks_all_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader has read everything; of its followers one cannot, and another not yet."""
    error = ErrorInfo(code="adapter_lost", message="gone")
    asked: list[int] = []

    class Fake:
        def carried(self) -> list[Carried]:
            asked.append(1)
            return [Carried({"a": error}, {"b"}), Carried({}, {"a", "c"})]

    monkeypatch.setattr(Runner, "_bring", lambda *_: None)
    leader = LeadingRunner.__new__(LeadingRunner)
    leader._followers = Fake()  # type: ignore[assignment]
    outcome = Outcome()
    leader._bring(Plan(adapters=[AdapterDrop(1)]), outcome)
    assert not asked and not outcome.late_adapters
    leader._bring(Plan(adapters=[AdapterCopy("a", "/p", 3, 64, 128, 0, 128)]), outcome)
    assert outcome.failed_adapters == {"a": error} and outcome.late_adapters == {"b", "c"}
