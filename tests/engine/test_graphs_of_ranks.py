"""Ranks capture and replay the same graphs in the same steps, and a rank that is lost in the middle is told."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.host_graphs import LOGS, UNREADABLE, LoggedOps
from tests.engine.test_parallel import KINDS, SETTINGS, answers, built, check_same, make, requests, run

from lorikeet import kernels
from lorikeet.config import EngineConfig
from lorikeet.engine import engine, parallel, sizing
from lorikeet.engine.parallel import Followers
from lorikeet.errors import ConfigError, LorikeetError
from lorikeet.kernels import ranks as ranks_module
from lorikeet.kernels.ranks import Ranks
from lorikeet.model.cache_scales import FP8
from lorikeet.types import Request, SamplingParams

ROOT = Path(__file__).parent.parent.parent
FOLLOW = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.engine.host_graphs import follow; follow()"
Checkpoint = Callable[..., Path]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engines of this test, and the ranks that follow, have the kernels of `host_graphs`."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setenv(LOGS, str(folder))
    monkeypatch.setattr(kernels, "pick", lambda device: LoggedOps())
    monkeypatch.setattr(parallel, "child_command", lambda module: [sys.executable, "-c", FOLLOW])
    return folder


def test_ranks_capture_the_same_graphs(
    checkpoint: Checkpoint, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of all kinds and two classes of ranks, one of which a rank cannot read at first: kinds of graphs that
    come for the first time in the middle of things."""
    monkeypatch.setitem(KINDS, "wide", {"roles": ("q", "down"), "rank": 20})
    folder = checkpoint("llama-tied")
    with built(folder, 1) as alone:
        expected = answers(alone, tmp_path)
    monkeypatch.setenv(UNREADABLE, "gains-2")
    with built(folder, 2) as together:
        digests = {name: make(folder, 2, name, tmp_path) for name in KINDS}
        for info in digests.values():
            together.register(info)
        wanted = requests({name: info.digest for name, info in digests.items()})
        (broken,) = (one for one in wanted if one.request_id == "gains")
        together.add(broken)
        events = []
        while together.has_work():
            events += together.step()
        assert events[-1].error is not None and events[-1].error.code == "adapter_lost"
        together.register(digests["gains"])
        found = run(together, wanted)
    check_same(found, expected)
    leader, follower = ((logs / f"rank-{rank}").read_text() for rank in range(2))
    assert leader.endswith(follower) and follower.count("\n") > 8
    steps = follower.splitlines()
    captured = {steps[i - 1] for i, step in enumerate(steps) if step == "capture"}
    assert captured == set(steps) - {"None", "capture"}
    assert any("rank=16" in one for one in captured) and any("rank=64" in one for one in captured)
    assert {one.split("scaled=")[1] for one in captured} == {"True)", "False)"}


def test_each_rank_has_the_scales_of_its_heads(
    checkpoint: Checkpoint, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An fp8 cache, whose scales are found by a pass that all make."""
    held = {"auto": torch.float32, "fp8": FP8}
    for module in (engine, sizing):
        monkeypatch.setattr(module, "choose_cache_dtype", lambda config, *_: held[config.kv_cache_dtype])
    folder, found, scales = checkpoint("qwen2"), [], []
    for ranks in (1, 2):
        with built(folder, ranks, kv_cache_dtype="fp8") as one:
            found.append(run(one, requests({})))
        scales.append([eval((logs / f"rank-{rank}.scales").read_text()) for rank in range(ranks)])
    (whole,), (first, second) = scales
    assert len(whole) == 3
    for layer, parts in enumerate(zip(first, second, strict=True)):
        for side in range(2):
            assert len(parts[0][side]) == 1 and parts[0][side] + parts[1][side] == whole[layer][side]
    for name, (_, numbers) in found[0].items():
        off = np.abs(found[1][name][1] - numbers)
        assert np.median(off) < 0.02, "sums of two parts round differently, and so does fp8 now and then"


def test_a_model_that_fp8_would_change_is_refused_by_all(
    checkpoint: Checkpoint, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that all but agree, in a head of the rank that follows: the leader says so, not that somebody is gone."""
    for module in (engine, sizing):
        monkeypatch.setattr(module, "choose_cache_dtype", lambda *_: FP8)
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "biased")
    tensors = load_file(folder / "model.safetensors")
    bias = tensors["model.layers.1.self_attn.k_proj.bias"]
    bias[len(bias) // 2 :] += 3000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(ConfigError, match=r"kv_cache_dtype: found fp8, .* head [23] in layer 1"),
        built(folder, 2, kv_cache_dtype="fp8"),
    ):
        pass


# --- a rank is lost -----------------------------------------------------------------------------------------------


def test_one_that_is_lost_in_the_middle_of_a_graph_is_named(checkpoint: Checkpoint, logs: Path) -> None:
    with built(checkpoint("llama-tied"), 2) as together:
        (pid,) = together._runner._followers.pids  # type: ignore[attr-defined]
        endless = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        together.add(Request(request_id="a", tokens=[20, 30], sampling=endless))
        for _ in range(4):
            together.step()
        assert "Kind(rows=1" in (logs / "rank-1").read_text()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LorikeetError, match=r"rank 1 of the 2 that hold the model ended \(killed by SIGKILL\)"):
            for _ in range(100):
                together.step()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Ranks, threading.Event]]:
    """Ranks whose communicator is not given up before an event is set, and that event."""
    graphless, aborted = threading.Event(), threading.Event()

    def abort() -> None:
        aborted.set()
        graphless.wait(30)

    fake = SimpleNamespace(
        init_process_group=lambda *_, **__: None,
        is_initialized=lambda: True,
        group=SimpleNamespace(WORLD=SimpleNamespace(abort=abort)),
        destroy_process_group=lambda: None,
    )
    monkeypatch.setattr(ranks_module, "dist", fake)
    ranks = Ranks(0, 2, tmp_path / "meeting")
    ranks.before_leaving(graphless.set)
    yield ranks, aborted
    graphless.set()


def test_an_engine_that_cannot_end_is_ended(
    stuck: tuple[Ranks, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its communicator is busy until its graphs are gone, and it holds them while it waits for the device."""
    monkeypatch.setattr(parallel, "GRACE", 0.05)
    ranks, aborted = stuck
    lost = threading.Event()
    config = EngineConfig(model="/nowhere", tensor_parallel=2, **SETTINGS)
    command = [sys.executable, "-c", "import sys; sys.stdin.read(1)"]
    followers = Followers(config, on_lost=lost.set, command=command)
    followers._fate.ranks = ranks
    os.kill(followers.pids[0], signal.SIGKILL)
    assert aborted.wait(30) and lost.wait(30)
    with pytest.raises(LorikeetError, match=r"rank 1 of the 2 .*killed by SIGKILL"):
        followers.check()
    followers.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each rank takes a GPU")
def test_graphs_of_gpus(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Decode steps are graphs with sums in them; then a rank is lost while they run, and the engine can be closed."""
    folder = checkpoint("llama-tied")
    with built(folder, 1, device="cuda") as alone:
        expected = answers(alone, tmp_path)
    with built(folder, 2, device="cuda") as together:
        found = answers(together, tmp_path)
        graphs: Any = together._runner._forward
        assert {kind.rank for kind in graphs._graphs} >= {0, 16} and len(graphs._capture._graphs) == len(graphs._graphs)
        for name, (_, numbers) in expected.items():
            np.testing.assert_allclose(found[name][1], numbers, atol=1e-3, rtol=1e-3, err_msg=name)
        (pid,) = together._runner._followers.pids  # type: ignore[attr-defined]
        endless = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        together.add(Request(request_id="a", tokens=[20, 30], sampling=endless))
        for _ in range(4):
            together.step()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LorikeetError, match="rank 1 of the 2 that hold the model ended"):
            for _ in range(100):
                together.step()
    assert not torch.distributed.is_initialized()
