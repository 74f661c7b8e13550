"""How fast is the engine on a device, against the bytes that a step must read and the products it must form?

Nothing is written to disk: a base of random weights is made on the device, adapters share a buffer of random numbers in
host memory and lie one by one in the slab. N clients send their prompts at once, wave after wave. Each repeat measures
bandwidth and matrix products again and turns the order of the cells. `serving.py --device` runs this.
"""

from __future__ import annotations

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace as with_fields

from load import Json, Trace, compare, make_clients, median, possible, summarise
from lorikeet import kernels
from lorikeet.adapters import compiled
from lorikeet.adapters.compiled import Compiled, CompiledAdapter, lay_out, open_compiled
from lorikeet.adapters.normal import Entry
from lorikeet.config import EngineConfig
from lorikeet.engine.engine import Engine
from lorikeet.engine.sizing import choose_sizes, choose_weights
from lorikeet.kernels.precision import choose_dtype
from lorikeet.kernels.weight import DenseWeight
from lorikeet.model.decoder import DecoderWeights, LayerWeights
from lorikeet.model.spec import ModelSpec
from lorikeet.model.weights import rope_tables
from lorikeet.types import AdapterInfo, BaseIdentity, Request, SamplingParams
from ours import setting
from roofline import QUANTISED, Itemsizes, Machine, Work, decode_work, prefill_work
from worker import progress

_LLAMA = {"family": "llama", "max_context": 8192, "rope_theta": 500000.0}
SPECS = {
    "8b": ModelSpec(
        **_LLAMA, vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128,
    ),
    "1b": ModelSpec(
        **_LLAMA, vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
        num_kv_heads=8, head_dim=64, tie_embeddings=True,
    ),
    "tiny": ModelSpec(
        **_LLAMA, vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=32, tie_embeddings=True,
    ),
}  # fmt: skip
BASE = BaseIdentity(name="random", sha256="0" * 64, tokenizer_sha256="0" * 64, stop_ids=())
DECODE_BAR, ADAPTER_BAR, PREFILL_BAR = 1.25, 0.90, 0.60  # of the floor, of the floor ratio, of the matrix rate
MANY_PROMPTS = 8  # at once: fewer do not fill a device
CONTEXT_SLACK = 16  # tokens


# --- clocks -------------------------------------------------------------------------------------------------------


class Clock:
    """Marks in the order of what the device does; on a CPU in that of the host."""

    def __init__(self, device: str) -> None:
        self._on_device = device != "cpu"

    def mark(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        if not self._on_device:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def best(self, function: Callable[[], object], calls: int = 8) -> float:
        """The least seconds of some calls, the first ones left out."""
        for _ in range(3):
            function()
        marks = [self.mark()]
        for _ in range(calls):
            function()
            marks.append(self.mark())
        return min(self.seconds(a, b) for a, b in zip(marks, marks[1:], strict=False))


class DeviceMeter:
    """What the device can do: the faster of a copy and a sum for bytes, the largest product of the model by rows."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: str, rows: list[int]) -> None:
        self._clock = Clock(device)
        elements = 2**30 if device != "cpu" else 2**22
        self._source = torch.randn(elements, device=device, dtype=dtype)
        self._target = torch.empty_like(self._source)
        self._weight = torch.randn(2 * spec.intermediate_size, spec.hidden_size, device=device, dtype=dtype)
        sizes = {*rows, 8192 if device != "cpu" else 64}
        self._inputs = {n: torch.randn(n, spec.hidden_size, device=device, dtype=dtype) for n in sorted(sizes)}

    @torch.inference_mode()
    def measure(self) -> Machine:
        nbytes = self._source.numel() * self._source.itemsize
        copying = 2 * nbytes / self._clock.best(lambda: self._target.copy_(self._source))
        summing = nbytes / self._clock.best(lambda: self._source.sum())
        rates = {
            n: 2 * n * self._weight.numel() / self._clock.best(lambda x=x: torch.nn.functional.linear(x, self._weight))
            for n, x in self._inputs.items()
        }
        return Machine(max(copying, summing), rates)


# --- base and adapters --------------------------------------------------------------------------------------------


def random_weights(spec: ModelSpec, dtype: torch.dtype, device: str, make_weight: Any) -> DecoderWeights:
    """A base whose numbers mean nothing, layer by layer on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype) * shape[-1] ** -0.5

    def ones() -> torch.Tensor:
        return torch.ones(spec.hidden_size, device=device, dtype=dtype)

    h, m = spec.hidden_size, spec.intermediate_size
    with torch.no_grad():
        embed = DenseWeight(tensor(spec.vocab_size, h))
        layers = [
            LayerWeights(
                attn_norm=ones(), qkv=make_weight(tensor(spec.q_size + 2 * spec.kv_size, h), None),
                o=make_weight(tensor(h, spec.q_size), None), mlp_norm=ones(),
                gate_up=make_weight(tensor(2 * m, h), None), down=make_weight(tensor(h, m), None),
            )
            for _ in range(spec.num_layers)
        ]  # fmt: skip
        head = embed if spec.tie_embeddings else DenseWeight(tensor(spec.vocab_size, h))
        return DecoderWeights(embed, layers, ones(), head, *rope_tables(spec, dtype, device))


class Adapters:
    """LoRAs on all linear layers, of these ranks in turn; those of a rank share their numbers in host memory."""

    def __init__(self, spec: ModelSpec, ranks: list[int], count: int, dtype: str) -> None:
        self._made = {rank: self._make(spec, rank, dtype) for rank in set(ranks)}
        self.ranks = [ranks[i % len(ranks)] for i in range(count)]

    @staticmethod
    def _make(spec: ModelSpec, rank: int, dtype: str) -> CompiledAdapter:
        draw = np.random.default_rng(rank)

        def random(columns: int) -> np.ndarray:
            return draw.standard_normal((rank, columns), np.float32) * columns**-0.5

        entries = [Entry(s, random(s.d_in), random(s.d_out), 2.0) for s in spec.sites if s.layer is not None]
        return CompiledAdapter(*lay_out(entries, "", BASE, dtype))

    def open(self, path: Path, *, wait: bool = True) -> Compiled:
        """By number, or of a compiled file."""
        if path.suffix:
            return open_compiled(path, wait=wait)
        made = self._made[self.ranks[int(path.name)]]
        return CompiledAdapter(with_fields(made.header, digest=path.name), made.data)

    def info(self, i: int) -> AdapterInfo:
        return self.open(Path(str(i))).header.info(Path(str(i)))

    def write(self, folder: Path, digest: str) -> AdapterInfo:
        """A compiled file of the first adapter under another digest, in the page cache."""
        made, path = self._made[self.ranks[0]], folder / f"{digest}{compiled.SUFFIX}"
        header = with_fields(made.header, digest=digest)
        compiled._write(path, header, made.data)
        return header.info(path)

    @property
    def nbytes(self) -> int:
        return sum(self._made[rank].header.nbytes + 64 for rank in self.ranks)


# --- an engine that is watched ------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Decode steps of one cell: marks around the forward pass, rows, tokens in the cache."""

    marks: list[tuple[Any, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)


class Watched:
    """An engine on the device whose requests, steps and forward passes are timed from outside."""

    def __init__(self, options: Namespace, spec: ModelSpec, adapters: Adapters) -> None:
        self.spec, self.adapters, self.device = spec, adapters, options.device
        self.dtype = choose_dtype("auto", options.device)
        self.clock = Clock(options.device)
        self.settings = dict(map(setting, options.set))
        most = max(options.batch)
        per_token = 2 * spec.num_layers * spec.kv_size * self.dtype.itemsize
        tokens = (most + 2) * (options.prompt + options.new + CONTEXT_SLACK)
        settings = {
            "device": options.device, "max_seqs": most, "max_context": options.prompt + options.new + CONTEXT_SLACK,
            "step_tokens": max(1024, most), "kv_memory": tokens * per_token,
            "adapter_memory": adapters.nbytes + 2 * adapters.nbytes // len(adapters.ranks) + 2**20,
            "prefix_cache": False, "queue": 10**6, **self.settings,
        }  # fmt: skip
        config = EngineConfig(**settings)
        weights = random_weights(spec, self.dtype, options.device, choose_weights(config, self.dtype, options.device))
        sizes = choose_sizes(config, spec, self.dtype, options.device)
        ops = kernels.pick(options.device)
        self.engine = Engine(spec, BASE, weights, ops, sizes, config, adapters.open)
        began = time.perf_counter()
        self.engine._runner.warm()
        self.warm_seconds = time.perf_counter() - began
        self.steps = Steps()
        self.engine._runner._forward = self._timed(self.engine._runner._forward)
        self._requests = 0

    def _timed(self, forward: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        def timed(batch: Any) -> torch.Tensor:
            if batch.max_query > 1:
                return forward(batch)
            begin = self.clock.mark()
            logits = forward(batch)
            self.steps.marks.append((begin, self.clock.mark()))
            self.steps.rows.append(len(batch.tokens))
            self.steps.cached.append(sum(len(one.tokens) for one in self.engine._scheduler.running))
            return logits

        return timed

    def load(self, infos: list[AdapterInfo]) -> float:
        """Bring adapters into the slab; seconds."""
        began = time.perf_counter()
        for info in infos:
            self.engine.register(info)
            self.engine.manage("load", info.digest)
            while self.engine.has_work():
                self.engine.step()
        self._finish()
        return time.perf_counter() - began

    def run(self, clients: list[list[Any]], new: int) -> Json:
        """Waves of requests, each client's next one when the wave before has ended."""
        self.steps = Steps()
        traces: list[list[Trace]] = [[] for _ in clients]
        for wave in zip(*clients, strict=True):
            for trace, own in zip(self._wave(wave, new), traces, strict=True):
                own.append(trace)
        said = summarise(traces, len(clients[0][0].prompt))
        full = [i for i, rows in enumerate(self.steps.rows) if rows == len(clients)]
        seconds = [self.clock.seconds(*self.steps.marks[i]) for i in full]
        cached = [self.steps.cached[i] / len(clients) for i in full]
        return said | {"step_seconds": median(seconds), "context": float(np.mean(cached)) if cached else None}

    def _wave(self, wave: tuple[Any, ...], new: int) -> list[Trace]:
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        traces = {}
        for ask in wave:
            name = str(self._requests)
            self._requests += 1
            traces[name] = Trace(time.perf_counter())
            adapter = None if ask.adapter is None else str(ask.adapter)
            self.engine.add(Request(request_id=name, tokens=ask.prompt, sampling=sampling, adapter=adapter))
        while self.engine.has_work():
            events = self.engine.step()
            now = time.perf_counter()
            for event in events:
                assert event.error is None, event.error
                if event.tokens:
                    traces[event.request_id].times.append(now)
                    traces[event.request_id].tokens += len(event.tokens)
        return list(traces.values())

    def first_token(self, prompt: list[int], info: AdapterInfo) -> float:
        """Seconds from a request on an adapter to its first token."""
        began = time.perf_counter()
        self.engine.register(info)
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        self._requests += 1
        name = f"first-{self._requests}"
        self.engine.add(Request(request_id=name, tokens=prompt, sampling=sampling, adapter=info.digest))
        while self.engine.has_work():
            self.engine.step()
        return time.perf_counter() - began

    def copy_seconds(self, info: AdapterInfo, calls: int = 5) -> float | None:
        """Of one adapter from pinned host memory to the device, alone; None on a CPU."""
        if self.device == "cpu":
            return None
        source = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(info.nbytes, dtype=torch.uint8, device=self.device)
        return self.clock.best(lambda: target.copy_(source, non_blocking=True), calls)

    def _finish(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


# --- cells --------------------------------------------------------------------------------------------------------


@contextmanager
def quiet_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        yield Path(folder)


def run_device(shape: str, options: Namespace) -> Json:
    """All cells of one shape: medians, floors, and ratios of pairs within a repeat."""
    spec = SPECS[shape]
    progress(f"{shape} on {options.device}: making base and adapters")
    dtype = "bfloat16" if choose_dtype("auto", options.device) == torch.bfloat16 else "float32"
    adapters = Adapters(spec, options.ranks, options.adapters, dtype)
    watched = Watched(options, spec, adapters)
    infos = [adapters.info(i) for i in range(options.adapters)]
    loading = watched.load(infos) if set(options.case) != {"base"} else None
    meter = DeviceMeter(spec, watched.dtype, options.device, options.batch)
    draw = np.random.default_rng(options.seed)
    cells = [(case, n) for n in options.batch for case in options.case if possible(case, n)]
    samples: dict[tuple[str, int], list[Json]] = {cell: [] for cell in cells}
    machines: list[Machine] = []
    for case, n in cells:
        watched.run(make_clients(case, n, 1, options.adapters, options.prompt, spec.vocab_size, draw), 4)
    for repeat in range(options.repeats):
        machines.append(meter.measure())
        at = repeat * len(cells) // options.repeats
        for case, n in cells[at:] + cells[:at]:
            clients = make_clients(case, n, 1, options.adapters, options.prompt, spec.vocab_size, draw)
            sample = watched.run(clients, options.new)
            chosen = [own[0].adapter for own in clients if own[0].adapter is not None]
            samples[case, n].append(sample | floors(spec, machines[-1], n, chosen, adapters, options, sample))
            speed = sample["tokens_per_second"]
            progress(f"repeat {repeat + 1} of {options.repeats}: {case} x{n}: {speed:.0f} tokens/s")
    said: Json = {
        "device": options.device, "dtype": dtype, "adapter_bytes": infos[0].nbytes,
        "warm_seconds": watched.warm_seconds,
        "load_seconds_each": None if loading is None else loading / options.adapters,
        "machine": {
            "bandwidth": median([machine.bandwidth for machine in machines]),
            "rates": {n: median([m.rates[n] for m in machines]) for n in machines[0].rates},
        },
        "cells": [describe(cell, samples[cell]) for cell in cells],
        "ratios": ratios(samples),
    }  # fmt: skip
    if not options.no_cold and set(options.case) != {"base"}:
        said["cold"] = cold(watched, options, draw)
    return said


def floors(
    spec: ModelSpec, machine: Machine, n: int, chosen: list[int], adapters: Adapters, options: Namespace,
    sample: Json,
) -> Json:  # fmt: skip
    """Least seconds of a decode step, what it would read without its adapters, and how fast prompts were at most."""
    rank = float(np.mean([adapters.ranks[i] for i in chosen])) if chosen else 0.0
    size = choose_dtype("auto", options.device).itemsize
    settings = dict(map(setting, options.set))
    linear = QUANTISED.get(settings.get("quantize", "none"), size)
    cache = 1 if settings.get("kv_cache_dtype") == "fp8" else size
    shares, sizes = (len(set(chosen)), len(chosen), rank), Itemsizes(linear, size, cache)
    tokens = options.prompt + options.new / 2 if sample["context"] is None else sample["context"]
    step: Work = decode_work(spec, sizes, n, tokens, *shares)
    bare: Work = decode_work(spec, sizes, n, tokens, 0, 0, 0)
    prompts = prefill_work(spec, sizes, n, options.prompt, *shares)
    least = prompts.operations / max(machine.rates.values())
    return {
        "distinct": len(set(chosen)), "step_bytes": step.bytes, "step_flop": step.operations,
        "step_floor": machine.seconds(step, n), "floor_ratio": bare.bytes / step.bytes,
        "prefill_of_peak": least * sample["prefill_tokens_per_second"] / (n * options.prompt),
    }  # fmt: skip


def describe(cell: tuple[str, int], samples: list[Json]) -> Json:
    case, n = cell
    values = {name: median([sample[name] for sample in samples]) for name in samples[0]}
    over = [one["step_seconds"] / one["step_floor"] for one in samples if one["step_seconds"]]
    return {"case": case, "clients": n, **values, "step_over_floor": median(over)}


def ratios(samples: dict[tuple[str, int], list[Json]]) -> list[Json]:
    """Decode steps against their floor and against the base's, prompts against the rate of products, pair by pair."""
    found = []
    for (case, n), own in samples.items():
        prompts = [one["prefill_of_peak"] for one in own]
        bar = PREFILL_BAR if case == "base" and n >= MANY_PROMPTS else None
        found.append(compare(f"prefill of {case} / products", prompts, [1.0] * len(own), bar, clients=n))
        steps = [one["step_seconds"] for one in own]
        if None in steps:
            continue
        if case == "base":
            floor = [one["step_floor"] for one in own]
            bar = DECODE_BAR if n <= 32 else None
            found.append(compare("step / floor", steps, floor, bar, at_most=True, clients=n))
        elif ("base", n) in samples:
            base = [one["step_seconds"] for one in samples["base", n]]
            reached = [b / s for b, s in zip(base, steps, strict=True)]
            possible_ratio = [one["floor_ratio"] for one in own]
            bar = ADAPTER_BAR if n == 64 else None
            found.append(compare(f"base / {case}", reached, [1.0] * len(own), clients=n))
            found.append(compare(f"base / {case}, of its floor", reached, possible_ratio, bar, clients=n))
    return found


def cold(watched: Watched, options: Namespace, draw: np.random.Generator, repeats: int = 5) -> Json:
    """An adapter that only a file in the page cache has, to its first token; and one that is resident."""

    def prompt() -> list[int]:
        return draw.integers(1, watched.spec.vocab_size, options.prompt).tolist()

    watched.first_token(prompt(), watched.adapters.info(0))
    with quiet_folder() as folder:
        infos = [watched.adapters.write(folder, f"cold-{i}") for i in range(repeats)]
        there = [watched.first_token(prompt(), watched.adapters.info(0)) for _ in infos]
        new = [watched.first_token(prompt(), info) for info in infos]
    return {
        "cold_seconds": median(new), "warm_seconds": median(there),
        "added_seconds": median([a - b for a, b in zip(new, there, strict=True)]),
        "copy_seconds": watched.copy_seconds(watched.adapters.info(0)),
    }  # fmt: skip


def show_device(shape: str, said: Json) -> None:
    machine = said["machine"]
    rates = ", ".join(f"{rate / 1e12:.1f} at {rows}" for rows, rate in machine["rates"].items())
    print(f"\n{shape} on {said['device']}, {said['dtype']}; warmed in {said['warm_seconds']:.1f} s")
    print(f"device: {machine['bandwidth'] / 1e12:.3f} TB/s; matrix products, TFLOP/s by rows: {rates}")
    print(
        f"{'case':8} {'x':>4} {'tok/s':>8} {'TTFT p50':>9} {'ITL p50':>8} {'p99 ms':>7} | {'step ms':>8} {'floor':>7} "
        f"{'over':>5} {'GB':>7} {'GFLOP':>8} {'distinct':>8} | {'prefill':>8} {'of peak':>7}"
    )
    for one in said["cells"]:
        step = one["step_seconds"]
        print(
            f"{one['case']:8} {one['clients']:4} {one['tokens_per_second']:8.0f} {1e3 * one['ttft_p50']:9.1f} "
            f"{1e3 * one['itl_p50']:8.2f} {1e3 * one['itl_p99']:7.2f} | {1e3 * step if step else 0:8.3f} "
            f"{1e3 * one['step_floor']:7.3f} {one['step_over_floor'] or 0:5.2f} {one['step_bytes'] / 1e9:7.2f} "
            f"{one['step_flop'] / 1e9:8.0f} {one['distinct']:8.0f} | {one['prefill_tokens_per_second']:8.0f} "
            f"{one['prefill_of_peak'] or 0:7.0%}"
        )
    for one in said["ratios"]:
        verdict = {True: "holds", False: "MISSED", None: ""}[one["holds"]]
        bar = "" if one["bar"] is None else f"bar {'<=' if one['at_most'] else '>='} {one['bar']:g}"
        low, high = one["ci"]
        print(f"x{one['clients']:<4} {one['ratio']:32} {one['median']:6.3f} [{low:.3f}, {high:.3f}] {bar:10} {verdict}")
    print(json.dumps({key: said[key] for key in ("load_seconds_each", "cold") if key in said}))
