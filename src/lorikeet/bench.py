"""`lorikeet bench`: the seconds of real steps of this machine, with what they depend on, for `lorikeet simulate`."""

from __future__ import annotations

import platform
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import torch
from msgspec.structs import replace
from rich.console import Console
from rich.progress import track

from lorikeet.adapters.compiled import Dtype, compile_adapter
from lorikeet.adapters.configs import CONFIG
from lorikeet.config import EngineConfig
from lorikeet.engine.engine import Engine
from lorikeet.engine.plan import Outcome, Plan
from lorikeet.engine.runner import Launched, Runner
from lorikeet.errors import ConfigError
from lorikeet.kernels.precision import choose_dtype
from lorikeet.model.families import load_spec
from lorikeet.model.sources import checkpoint_files, find_model, identify
from lorikeet.simulate.cost import StepFeatures, StepMeter
from lorikeet.simulate.fit import Measurement, fit_steps
from lorikeet.types import AdapterInfo, Event, Request, SamplingParams

BATCHES = (1, 2, 4, 8, 16, 32, 64)
DISTINCT = (0, 1, 2, 4, 8, 16, 32)
PROMPTS = (8, 48, 192, 768)  # tokens
NEW_TOKENS = 24
MOST_ADAPTERS = 64
MOST_COMPILES = 16
SLAB_SHARE = 0.5  # of all adapters that the slab holds, so that steps copy some


@dataclass(frozen=True, slots=True)
class Burst:
    """`batch` requests, half of them at once, the others one a step; they use `distinct` adapters in turn."""

    batch: int
    distinct: int
    prompt: int


def run_bench(
    config: EngineConfig, *, adapters: Path | None = None, output: Path, repeats: int = 1, seed: int = 0
) -> None:
    """Measure and write `output`. Raises ConfigError, and what a model or an adapter that cannot be used raises."""
    console = Console(stderr=True)
    if not output.parent.is_dir():
        raise ConfigError(f"--output: found {output}, and there is no folder {output.parent}", param="output")
    measured = measure(config, adapter_folders(adapters), repeats=repeats, seed=seed)
    output.write_bytes(msgspec.json.encode(measured))
    fit = fit_steps(np.array(measured.steps))
    console.print(
        f"{len(measured.steps)} steps are in {output}; a cost model fitted on half of them misses the others by "
        f"{fit.median_error:.1%} (median), their sum by {fit.total_error:+.1%}",
        highlight=False,
    )


def adapter_folders(root: Path | None) -> list[Path]:
    """The PEFT folders below `root`, at most MOST_ADAPTERS. Raises ConfigError when there is none."""
    if root is None:
        return []
    found = [path.parent for path in islice(sorted(root.rglob(CONFIG)), MOST_ADAPTERS)]
    if not found:
        raise ConfigError(f"--adapters: found no {CONFIG} below {root}", param="adapters")
    return found


def measure(config: EngineConfig, folders: Sequence[Path], *, repeats: int = 1, seed: int = 0) -> Measurement:
    """Run bursts of all sizes in random order through an engine, and time every step."""
    with tempfile.TemporaryDirectory(prefix="lorikeet-bench-") as cache:
        engine, infos, compiles = open_engine(config, folders, Path(cache))
        meter = TimedEngine(engine)
        draw = np.random.default_rng(seed)
        bursts = plan_bursts(engine, len(infos)) * repeats
        order = draw.permutation(len(bursts))
        for _ in _play(meter, bursts[int(order[0])], infos, draw):  # code, caches and memory are warm after it
            pass
        meter.steps.clear()
        for index in track(order, "measuring", console=Console(stderr=True), transient=True):
            for _ in _play(meter, bursts[int(index)], infos, draw):
                pass
    return Measurement(
        model=engine.base.name,
        machine=f"{platform.machine()}, {psutil.cpu_count()} cores, {platform.system()}",
        adapters=len(infos),
        steps=[[float(value) for value in (*features, seconds)] for features, seconds in meter.steps],
        compiles=compiles,
    )


def open_engine(
    config: EngineConfig, folders: Sequence[Path], cache: Path
) -> tuple[Engine, list[AdapterInfo], list[tuple[int, float]]]:
    """An engine that knows the adapters, which are compiled into `cache`, and bytes and seconds of the first
    compilations. Unless the config says otherwise its slab holds SLAB_SHARE of the adapters."""
    infos: list[AdapterInfo] = []
    compiles = []
    if folders:
        base = find_model(config.model)
        spec, identity = load_spec(base), identify(base, config.model)
        dtype = choose_dtype(config.dtype if config.adapter_dtype == "auto" else config.adapter_dtype)
        name: Dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    for folder in folders:
        began = time.perf_counter()
        allow = config.allow_lock_mismatch
        infos.append(compile_adapter(folder, spec, identity, name, cache, allow, checkpoint_files(base)))
        compiles.append((infos[-1].nbytes, time.perf_counter() - began))
    if infos and config.adapter_memory is None:
        sizes = [info.nbytes for info in infos]
        config = replace(config, adapter_memory=max(int(sum(sizes) * SLAB_SHARE), max(sizes) + 64))
    engine = Engine.build(config)
    for info in infos:
        engine.register(info)
    return engine, infos, compiles[:MOST_COMPILES]


def plan_bursts(engine: Engine, adapters: int) -> list[Burst]:
    """Every mix of sizes that the engine and the number of adapters allow."""
    longest = engine.max_context - NEW_TOKENS
    return [
        Burst(batch, distinct, min(prompt, longest))
        for batch in BATCHES
        if batch <= engine.config.max_seqs
        for distinct in DISTINCT
        if distinct <= min(batch, adapters)
        for prompt in PROMPTS
        if prompt == PROMPTS[0] or prompt < longest
    ]


class _Watched:
    """A runner of which one can see the plan of the step that was collected last."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._plans: deque[Plan] = deque()
        self.plan = Plan()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, plan: Plan) -> Launched:
        self._plans.append(plan)
        return self._runner.launch(plan)

    def collect(self, launched: Launched) -> Outcome:
        self.plan = self._plans.popleft()
        return self._runner.collect(launched)


class TimedEngine:
    """An engine whose steps are timed from outside, with the features of each."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[tuple[StepFeatures, float]] = []
        self._meter = StepMeter(engine.config.max_seqs)
        self._watched = _Watched(engine._runner)
        engine._runner = self._watched  # type: ignore[assignment]
        self._requests = 0

    def step(self) -> list[Event]:
        began = time.perf_counter()
        events = self.engine.step()
        seconds = time.perf_counter() - began
        self.steps.append((self._meter.measure(self._watched.plan), seconds))
        return events

    def add(self, tokens: list[int], new: int, adapter: AdapterInfo | None) -> str:
        """Queue a greedy request for exactly `new` tokens; its id."""
        self._requests += 1
        name = f"bench-{self._requests}"
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        digest = None if adapter is None else adapter.digest
        self.engine.add(Request(request_id=name, tokens=tokens, sampling=sampling, adapter=digest))
        return name


def _play(meter: TimedEngine, burst: Burst, infos: Sequence[AdapterInfo], draw: np.random.Generator) -> Iterator[None]:
    """Run a burst, one step at a time. Its prompts are random, so that no prefix is found in the cache."""
    chosen = [infos[i] for i in draw.permutation(len(infos))[: burst.distinct]]
    added = 0
    while added < burst.batch or meter.engine.has_work():
        for _ in range(max(burst.batch // 2, 1) if added == 0 else 1):
            if added < burst.batch:
                prompt = draw.integers(0, meter.engine.spec.vocab_size, max(burst.prompt - added % 4, 1)).tolist()
                meter.add(prompt, NEW_TOKENS, chosen[added % len(chosen)] if chosen else None)
                added += 1
        meter.step()
        yield
