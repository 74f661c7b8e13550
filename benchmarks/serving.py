"""How fast are requests on many adapters, against the base alone, against others, and against this machine's limits?

A closed loop of N clients, prompts of 128 tokens (no two alike), 64 new ones, greedy. Each repeat runs every
combination of side, case and number of clients once, in an order that turns, and measures the machine again; medians
are over the repeats, ratios are of pairs within a repeat, with a 95% bootstrap interval. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from device import SPECS, run_device, show_device
from load import ALL_CASES, CASES, Ask, Json, compare, make_clients, median, possible
from ours import OfflineSide, ServerSide, Setup, setting
from peers import PeftSide, UrlSide
from questions import QUESTIONS, prompts
from roofline import PEAK_ROWS, Machine, Meter, decode_work, prefill_work
from shapes import NAMES, default_cache, evict, fixture, make_adapter, parameters
from worker import progress

Side = OfflineSide | ServerSide | PeftSide | UrlSide
Key = tuple[str, str, int]  # side, case, clients

EXAMPLES = """examples:
  python benchmarks/serving.py                                             small, offline and HTTP, all cases
  python benchmarks/serving.py --shape half --batch 32 --case base all     one bar of the table
  python benchmarks/serving.py --side offline --peer peft                  beside transformers + peft
  python benchmarks/serving.py --side http --peer http://127.0.0.1:8080    beside a server on the same files
  python benchmarks/serving.py --peer http://127.0.0.1:8080 --peer-adapter '{"lora": [{"id": {i}, "scale": 1}]}'
  python benchmarks/serving.py --question distinct interference            only these
  python benchmarks/serving.py --set step_tokens=256 --set threads=1       other settings of the engine
  python benchmarks/serving.py --shape half --make                         make the files, print where they are

on a device, with nothing on disk (bases of random weights made there: 8b, 1b, tiny):
  python benchmarks/serving.py --device cuda --shape 8b --adapters 1000 --prompt 512 --new 128 --repeats 3 \\
      --batch 1 8 32 64 256 --case base one uniform zipf --set step_tokens=8192
  python benchmarks/serving.py --device cuda --shape 8b --adapters 200 --ranks 8 16 32 64 --case base uniform
"""
OURS = {"offline": OfflineSide, "http": ServerSide}
ALL_BAR, ONE_BAR, LIMIT_BAR = 0.85, 0.93, 0.75
PEFT_BARS = {("half", "all", 32): 6.0, ("small", "all", 32): 8.0}


@dataclass
class Results:
    """What a shape's repeats have brought."""

    samples: dict[Key, list[Json]] = field(default_factory=dict)
    machines: list[Machine] = field(default_factory=list)
    cold: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # cold, warm seconds to the first token

    def values(self, key: Key, metric: str) -> list[Any]:
        return [sample[metric] for sample in self.samples[key]]


# --- the repeats --------------------------------------------------------------------------------------------------


@contextmanager
def setups(shape: str, options: Namespace) -> Iterator[Setup]:
    """Files of the shape, and a folder for this run."""
    options.cache.mkdir(parents=True, exist_ok=True)
    progress(f"{shape}: files in {options.cache}")
    made = fixture(shape, options.cache)
    adapters = made.adapters([options.rank] * options.adapters)
    with tempfile.TemporaryDirectory(prefix="run-", dir=options.cache) as folder:
        spare = Path(folder) / "served"
        spare.mkdir()
        settings = dict(map(setting, options.set))
        if "threads" in settings:  # the machine is measured with as many
            torch.set_num_threads(settings["threads"])
        yield Setup(
            fixture=made, adapters=adapters, spare=spare, folder=Path(folder), clients=max(options.batch),
            settings=settings,
        )  # fmt: skip


def start_sides(setup: Setup, options: Namespace, sides: list[Side]) -> None:
    """Into `sides` one by one, so that those started are closed when another cannot be."""
    for name in options.side:
        progress(f"starting {name}")
        sides.append(OURS[name](setup))
    urls = 0
    for peer in options.peer:
        progress(f"starting {peer}")
        if peer == "peft":
            sides.append(PeftSide(setup))
        else:
            base = options.peer_base[min(urls, len(options.peer_base) - 1)] if options.peer_base else None
            sides.append(UrlSide(peer, base, options.peer_adapter[min(urls, len(options.peer_adapter) - 1)]))
            urls += 1


def run_cells(setup: Setup, options: Namespace, results: Results) -> None:
    spec = setup.fixture.spec
    draw = np.random.default_rng(options.seed)
    sides: list[Side] = []
    try:
        start_sides(setup, options, sides)
        results.samples = {
            (side.name, case, n): []
            for n in options.batch for case in options.case if possible(case, n) for side in sides
        }  # fmt: skip
        by_name = {side.name: side for side in sides}
        if len(by_name) < len(sides):
            raise SystemExit(f"--peer: found {options.peer}; expected each once")
        for side in sides:
            _warm(side, setup, options, draw)
        meter = Meter(spec, setup.dtype, options.batch)
        cells = list(results.samples)
        for repeat in range(options.repeats):
            results.machines.append(meter.measure())
            at = repeat * len(cells) // options.repeats
            for name, case, n in cells[at:] + cells[:at]:
                rounds = options.rounds or max(1, 4 // n)
                clients = make_clients(case, n, rounds, options.adapters, options.prompt, spec.vocab_size, draw)
                sample = by_name[name].run(clients, options.new) | _shares(clients)
                results.samples[name, case, n].append(sample | {"memory": by_name[name].memory()})
                speed = sample["tokens_per_second"]
                progress(f"repeat {repeat + 1} of {options.repeats}: {name} {case} x{n}: {speed:.1f} tokens/s")
            for side in sides:
                _load_cold(side, repeat, setup, options, draw, results)
    finally:
        for side in sides:
            side.close()


def _warm(side: Side, setup: Setup, options: Namespace, draw: np.random.Generator) -> None:
    """Every adapter in memory, every kernel and every number of clients run once."""
    rows, shape = max(options.batch), (options.adapters, options.prompt, setup.fixture.spec.vocab_size)
    progress(f"warming {side.name}")
    for n in options.batch:
        side.run(make_clients("base", n, 1, *shape, draw), 2)
    for start in range(0, options.adapters, rows) if set(options.case) != {"base"} else ():
        some = range(start, min(start + rows, options.adapters))
        texts = prompts(setup, len(some), options.prompt, draw)
        side.run([[Ask(text, i)] for text, i in zip(texts, some, strict=True)], 2)


def _shares(clients: list[list[Ask]]) -> Json:
    """Of the adapters in a batch: how many rows have one and how many are distinct, means over the rounds."""
    waves = [[ask.adapter for ask in wave if ask.adapter is not None] for wave in zip(*clients, strict=True)]
    return {
        "adapted": float(np.mean([len(wave) for wave in waves])),
        "distinct": float(np.mean([len(set(wave)) for wave in waves])),
    }


def _load_cold(
    side: Side, repeat: int, setup: Setup, options: Namespace, draw: np.random.Generator, results: Results
) -> None:
    """From an adapter's files, dropped from the page cache, to its first token; and the same where it is resident."""
    if options.no_cold or isinstance(side, UrlSide):
        return
    folder = setup.spare / f"cold-{side.name}-{repeat}"
    make_adapter(setup.fixture.spec, folder, options.rank, seed=int(draw.integers(2**31)))
    evict(folder)
    one, other = prompts(setup, 2, options.prompt, draw)
    cold = side.cold(folder, one)
    warm = float(side.run([[Ask(other, 0)]], 1)["ttft_p50"])
    results.cold.setdefault(side.name, []).append((cold, warm))


# --- what they say ------------------------------------------------------------------------------------------------


def limits(key: Key, setup: Setup, options: Namespace, results: Results) -> Json:
    """Work of prefill and of a decode step, the time they take at least, and the share of that limit reached.

    `reached` lists, repeat by repeat, limit / measured; `of_peak` the same with the rate of 512 rows for any step.
    """
    _, _, n = key
    spec, sizes = setup.fixture.spec, setup.itemsizes
    seconds: dict[str, list[float]] = {name: [] for name in ("prefill", "decode", "whole")}
    reached: dict[str, list[float]] = {name: [] for name in (*seconds, "decode_of_peak", "whole_of_peak")}
    works: dict[str, Any] = {}
    for sample, machine in zip(results.samples[key], results.machines, strict=True):
        shares = (sample["distinct"], sample["adapted"], options.rank)
        works["prefill"] = first = prefill_work(spec, sizes, n, options.prompt, *shares)
        works["decode"] = step = decode_work(spec, sizes, n, options.prompt + options.new // 2, *shares)
        begin, each = machine.seconds(first, n * options.prompt), machine.seconds(step, n)
        each_at_peak = machine.seconds(step, PEAK_ROWS)
        whole, whole_at_peak = (begin + (options.new - 1) * one for one in (each, each_at_peak))
        for name, value in zip(seconds, (begin, each, whole), strict=True):
            seconds[name].append(value)
        measured = n * options.new / sample["tokens_per_second"]
        reached["prefill"].append(begin * sample["prefill_tokens_per_second"] / (n * options.prompt))
        reached["whole"].append(whole / measured)
        reached["whole_of_peak"].append(whole_at_peak / measured)
        if sample["decode_tokens_per_second"]:
            reached["decode"].append(each * sample["decode_tokens_per_second"] / n)
            reached["decode_of_peak"].append(each_at_peak * sample["decode_tokens_per_second"] / n)
    whole = median(seconds["whole"]) or float("nan")
    return {
        **{f"{name}_gb": work.bytes / 1e9 for name, work in works.items()},
        **{f"{name}_gflop": work.operations / 1e9 for name, work in works.items()},
        **{f"{name}_seconds": median(values) for name, values in seconds.items()},
        "tokens_per_second": n * options.new / whole,
        "reached": reached,
    }


def describe(key: Key, setup: Setup, options: Namespace, results: Results) -> Json:
    """One row of the table."""
    name, case, n = key
    samples = results.samples[key]
    metrics = [m for m, value in samples[0].items() if m != "memory" and (value is None or isinstance(value, float))]
    limit = limits(key, setup, options, results)
    reached = {what: median(values) for what, values in limit.pop("reached").items()}
    memory = samples[-1]["memory"]
    return {
        "side": name, "case": case, "clients": n,
        **{metric: median([sample[metric] for sample in samples]) for metric in metrics},
        "tokens_per_second_each": [sample["tokens_per_second"] for sample in samples],
        "rss": memory and memory["rss"], "anonymous": memory and memory["anonymous"],
        "limit": limit, "reached": reached,
    }  # fmt: skip


def ratios(shape: str, setup: Setup, options: Namespace, results: Results) -> list[Json]:
    """What the bars are about: cases against the base, sides against peers, and measured against possible."""
    found = []
    for name, case, n in results.samples:
        key = (name, case, n)
        speed = results.values(key, "tokens_per_second")
        if case != "base" and (name, "base", n) in results.samples:
            bar = {"all": ALL_BAR, "one": ONE_BAR}.get(case) if name in OURS else None
            base = results.values((name, "base", n), "tokens_per_second")
            found.append(compare(f"{case} / base", speed, base, bar, side=name, clients=n))
        if name in OURS and case == "base":
            reached = limits(key, setup, options, results)["reached"]
            for part in ("decode", "prefill"):
                if reached[part]:
                    ones = [1.0] * len(reached[part])
                    found.append(compare(f"{part} / limit", reached[part], ones, LIMIT_BAR, side=name, clients=n))
        if name not in OURS:
            wanted = ("offline", "http") if name == "peft" else ("http", "offline")
            ours = next((one for one in wanted if (one, case, n) in results.samples), None)
            if ours is not None:
                bar = PEFT_BARS.get((shape, case, n)) if name == "peft" else None
                bar = 1.0 if case == "base" else bar
                own = results.values((ours, case, n), "tokens_per_second")
                found.append(compare(f"{ours} / {name}, {case}", own, speed, bar, side=ours, clients=n))
    return found


def run_shape(shape: str, options: Namespace) -> Json:
    with setups(shape, options) as setup:
        said: Json = {"parameters": parameters(setup.fixture.spec), "base": str(setup.fixture.base)}
        said["adapters"] = str(setup.adapters[0].parent)
        if options.make:
            return said
        results = Results()
        if options.case:
            run_cells(setup, options, results)
            said["cells"] = [describe(key, setup, options, results) for key in results.samples]
            said["ratios"] = ratios(shape, setup, options, results)
            said["machine"] = {
                "bandwidth": median([machine.bandwidth for machine in results.machines]),
                "rates": {n: median([m.rates[n] for m in results.machines]) for n in results.machines[0].rates},
            }
            said["cold"] = {
                name: {"cold_seconds": median([a for a, _ in pairs]), "warm_seconds": median([b for _, b in pairs]),
                       "added_seconds": median([a - b for a, b in pairs])}
                for name, pairs in results.cold.items()
            }  # fmt: skip
        said["questions"] = {name: QUESTIONS[name](setup, options) for name in options.question}
        return said


# --- printing -----------------------------------------------------------------------------------------------------


def show(shape: str, said: Json) -> None:
    print(f"\n{shape}: {said['parameters'] / 1e6:.1f} M parameters, {said['base']}; adapters in {said['adapters']}")
    if "cells" in said:
        machine = said["machine"]
        rates = ", ".join(f"{rate / 1e9:.0f} at {rows}" for rows, rate in machine["rates"].items())
        print(f"machine: {machine['bandwidth'] / 1e9:.1f} GB/s read; matrix products, GFLOP/s by rows: {rates}")
        _show_cells(said["cells"])
        for name, one in said["cold"].items():
            print(
                f"{name}: unseen adapter from disk to first token {one['cold_seconds']:.3f} s, "
                f"{one['added_seconds']:+.3f} s against a resident one"
            )
    every = said.get("ratios", []) + [r for q in said.get("questions", {}).values() for r in q.get("ratios", [])]
    for one in every:
        verdict = {True: "holds", False: "MISSED", None: ""}[one["holds"]]
        bar = "" if one["bar"] is None else f"bar {'<=' if one['at_most'] else '>='} {one['bar']:g}"
        where = " ".join([one.get("side", ""), f"x{one['clients']}"]).strip()
        low, high = one["ci"]
        print(f"{where:14} {one['ratio']:42} {one['median']:6.2f} [{low:.2f}, {high:.2f}] {bar:10} {verdict}")
    for name, answer in said.get("questions", {}).items():
        print(f"{name}: " + json.dumps({key: value for key, value in answer.items() if key != "ratios"}))


def _show_cells(cells: Sequence[Json]) -> None:
    print(
        f"\n{'side':14} {'case':6} {'x':>3} {'tok/s':>7} {'limit':>7} {'decode':>7} | {'TTFT p50':>8} {'p95 ms':>7} | "
        f"{'ITL p50':>8} {'p95':>7} {'p99 ms':>7} | {'RSS MB':>6} | {'prefill GFLOP':>13} {'reached':>7} | "
        f"{'step GB':>7} {'GFLOP':>6} {'reached':>7} {'whole':>6}"
    )
    for one in cells:
        limit, reached = one["limit"], one["reached"]
        times = [1e3 * one[key] for key in ("ttft_p50", "ttft_p95", "itl_p50", "itl_p95", "itl_p99")]
        print(
            f"{one['side']:14} {one['case']:6} {one['clients']:3} {one['tokens_per_second']:7.1f} "
            f"{limit['tokens_per_second']:7.1f} {one['decode_tokens_per_second'] or 0:7.1f} | {times[0]:8.1f} "
            f"{times[1]:7.1f} | {times[2]:8.1f} {times[3]:7.1f} {times[4]:7.1f} | {(one['rss'] or 0) / 1e6:6.0f} | "
            f"{limit['prefill_gflop']:13.1f} {_percent(reached['prefill']):>7} | {limit['decode_gb']:7.3f} "
            f"{limit['decode_gflop']:6.1f} {_percent(reached['decode']):>7} {_percent(reached['whole']):>6}"
        )
    print(
        "decode: tokens/s after the last first token; limit: bytes at the bandwidth or operations at the rate of so "
        "many rows (32 at least), the slower of both\n"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def arguments(given: Sequence[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--shape",
        nargs="+",
        choices=(*NAMES, *(name for name in SPECS if name not in NAMES)),
        default=["small"],
        help="bases; nano is the embedded one",
    )
    add("--device", choices=("cpu", "cuda"), help="the engine alone, on a base made on this device, without files")
    add("--ranks", nargs="+", type=int, help="with --device: ranks of the adapters, in turn [--rank]")
    add("--side", nargs="*", choices=tuple(OURS), default=list(OURS), help="our own sides")
    add("--peer", action="append", default=[], metavar="peft|URL", help="compare with it; give it again for more")
    add("--peer-base", action="append", default=[], metavar="NAME|JSON", help="the base at a URL peer, in order")
    add("--peer-adapter", action="append", metavar="NAME|JSON", help="an adapter there, {i} its number [adapter-{i}]")
    add("--case", nargs="+", choices=ALL_CASES, help="default: all, or none where a question is asked")
    add("--batch", nargs="+", type=int, default=[1, 8, 32], help="clients")
    add("--question", nargs="+", choices=tuple(QUESTIONS), default=[])
    add("--repeats", type=int, default=9)
    add("--rounds", type=int, help="requests of each client in a repeat [4 alone, else 1]")
    add("--prompt", type=int, default=128, help="tokens")
    add("--new", type=int, default=64, help="tokens")
    add("--adapters", type=int, default=32, help="how many there are")
    add("--rank", type=int, default=16)
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of our engine")
    add("--no-cold", action="store_true", help="load no unseen adapters")
    add("--make", action="store_true", help="only make the files")
    add("--cache", type=Path, default=default_cache(), help="where the files are kept [%(default)s]")
    add("--seed", type=int, default=0, help="of prompts and of adapters that are drawn")
    options = parser.parse_args(given)
    for name in ("repeats", "prompt", "adapters", "rank", "new"):
        if getattr(options, name) < (2 if name == "new" else 1):
            parser.error(f"--{name}: found {getattr(options, name)}; expected {2 if name == 'new' else 1} or more")
    if options.case is None:
        options.case = [] if options.question else list(CASES)
    known = SPECS if options.device else NAMES
    if unknown := [shape for shape in options.shape if shape not in known]:
        where = f"with --device {options.device}" if options.device else "without --device"
        parser.error(f"--shape: found {unknown[0]}; expected one of {', '.join(known)} {where}")
    options.ranks = options.ranks or [options.rank]
    options.peer_adapter = options.peer_adapter or ["adapter-{i}"]
    options.cache = options.cache.expanduser()
    return options


def main() -> None:
    options = arguments()
    shapes = {}
    for shape in options.shape:
        if options.device:
            shapes[shape] = run_device(shape, options)
            show_device(shape, shapes[shape])
        else:
            shapes[shape] = run_shape(shape, options)
            show(shape, shapes[shape])
    chosen = {key: value for key, value in vars(options).items() if key not in ("cache", "make")}
    print(json.dumps({"benchmark": "serving", "options": chosen, "shapes": shapes}))


if __name__ == "__main__":
    main()
