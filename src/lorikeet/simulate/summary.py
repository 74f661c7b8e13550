"""What a simulation says: numbers as JSON, and as tables on the screen. Seconds, tokens and shares from 0 to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from lorikeet.simulate.replica import TIERS
from lorikeet.simulate.scenario import Scenario
from lorikeet.simulate.simulation import OUTCOMES, SETTLED, Record
from lorikeet.simulate.traffic import Floats, Ints

Json = dict[str, Any]
PERCENTILES = (50, 95, 99)


def summarise(scenario: Scenario, record: Record) -> Json:
    """All numbers of a simulation; the same scenario gives the same ones."""
    traffic = record.traffic
    end = float(max(np.nanmax(record.last, initial=0.0), traffic.time[-1]))
    seconds = max(end - float(traffic.time[0]), 1e-9)
    ttft = record.first - traffic.time
    return {
        "requests": len(traffic),
        "outcomes": {name: int(np.sum(record.outcome == i)) for i, name in enumerate(OUTCOMES)},
        "seconds": seconds,
        "throughput": {
            "requests_per_second": float(np.sum(record.outcome == 0)) / seconds,
            "output_tokens_per_second": float(record.made.sum()) / seconds,
            "prompt_tokens_per_second": record.prefill_tokens / seconds,
        },
        "ttft": percentiles(ttft),
        "itl": percentiles(record.gaps),
        "latency": percentiles((record.last - traffic.time)[record.outcome == 0]),
        "adapters": {
            "requests": int(np.sum(record.tier >= 0)),
            "distinct": len(np.unique(traffic.adapter[traffic.adapter >= 0])),
            "hits": {name: _share(record.tier == i, record.tier >= 0) for i, name in enumerate(TIERS)},
            "ttft": {name: percentiles(ttft[record.tier == i]) for i, name in enumerate(TIERS)},
        },
        "engine": {
            "steps": record.steps,
            "sequences_per_step": record.sequence_steps / max(record.steps, 1),
            "utilisation": {
                name: float(value) / seconds
                for name, value in zip(("mean", "least", "most"), _spread(record.busy), strict=True)
            },
            "preemptions": record.preemptions,
            "prefix_hit_tokens": record.prefix_hit_tokens,
        },
        "fairness": _fairness(scenario, record, ttft),
    }


def percentiles(values: Floats) -> dict[str, float | None]:
    """p50, p95, p99 and the mean of the values that are known; None where there are none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {**{f"p{p}": None for p in PERCENTILES}, "mean": None}
    found = {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(known, PERCENTILES), strict=True)}
    return {**found, "mean": float(known.mean())}


def jain(values: Floats) -> float:
    """The fairness index of Jain, Chiu and Hawe (1984): 1 where all are alike, 1 / n where one has everything."""
    squares = float(np.sum(values**2))
    return 1.0 if squares == 0 else float(np.sum(values)) ** 2 / (len(values) * squares)


def _fairness(scenario: Scenario, record: Record, ttft: Floats) -> Json:
    """Service for demand: of the tokens that were asked for in the first nine tenths of the arrivals, how many had been
    served when the last request came. It tells tenants apart only where there was not enough for all."""
    traffic = record.traffic
    begin, end = traffic.time[0], traffic.time[-1]
    settled = traffic.time <= begin + SETTLED * (end - begin)
    demand = traffic.prompt + traffic.output
    shares = _shares(traffic.stream, record.served, demand, settled, len(scenario.traffic))
    adapters = _shares(traffic.adapter + 1, record.served, demand, settled, int(traffic.adapter.max()) + 2)
    tenants: list[Json] = [
        {
            "tenant": stream.tenant,
            "requests": int(np.sum(traffic.stream == i)),
            "served": None if np.isnan(shares[i]) else float(shares[i]),
            "ttft": percentiles(ttft[traffic.stream == i]),
        }
        for i, stream in enumerate(scenario.traffic)
    ]
    slowest = max(tenants, key=lambda tenant: tenant["ttft"]["p95"] or 0.0)
    return {
        "jain_tenants": jain(shares[~np.isnan(shares)]),
        "jain_adapters": jain(adapters[~np.isnan(adapters)]),
        "worst_tenant": {"tenant": slowest["tenant"], "ttft_p95": slowest["ttft"]["p95"]},
        "tenants": tenants,
    }


def _shares(key: Ints, served: Ints, demand: Ints, counted: Any, keys: int) -> Floats:
    """Served / demand by key, NaN for one that asked for nothing."""
    asked, got = (np.bincount(key[counted], weights=values[counted], minlength=keys) for values in (demand, served))
    shares: Floats = np.divide(got, asked, out=np.full(keys, np.nan), where=asked > 0)
    return shares


def _share(part: Any, whole: Any) -> float | None:
    return float(np.sum(part) / np.sum(whole)) if np.any(whole) else None


def _spread(values: Floats) -> tuple[float, float, float]:
    return float(values.mean()), float(values.min()), float(values.max())


# --- on the screen -------------------------------------------------------------------------------------------------


def tables(summary: Json) -> Group:
    """No wider than 80 columns."""
    parts = [_overview(summary), _latencies(summary)]
    if len(summary["fairness"]["tenants"]) > 1:
        parts.append(_tenants(summary))
    return Group(*parts)


def rows(summary: Json) -> list[tuple[str, str]]:
    """The overview as (name, value)."""
    throughput, engine, fairness = summary["throughput"], summary["engine"], summary["fairness"]
    outcomes, hits = summary["outcomes"], summary["adapters"]["hits"]
    out = [
        ("requests", f"{summary['requests']} in {summary['seconds']:.1f} s"),
        ("finished / error / refused", f"{outcomes['length']} / {outcomes['error']} / {outcomes['refused']}"),
        ("requests a second", f"{throughput['requests_per_second']:.1f}"),
        ("output tokens a second", f"{throughput['output_tokens_per_second']:.0f}"),
        ("prompt tokens a second", f"{throughput['prompt_tokens_per_second']:.0f}"),
        ("steps, sequences in each", f"{engine['steps']}, {engine['sequences_per_step']:.1f}"),
        ("replicas busy, least to most", "{least:.0%} to {most:.0%}".format(**engine["utilisation"])),
        ("preemptions", f"{engine['preemptions']}"),
        ("prompt tokens from the prefix cache", f"{engine['prefix_hit_tokens']}"),
    ]
    if summary["adapters"]["requests"]:
        out.append(("adapter hits: " + " / ".join(hits), " / ".join(f"{share:.1%}" for share in hits.values())))
    out.append(("Jain index: tenants, adapters", f"{fairness['jain_tenants']:.3f}, {fairness['jain_adapters']:.3f}"))
    worst = fairness["worst_tenant"]
    out.append(("worst tenant's p95 to first token", f"{worst['tenant']}: {milliseconds(worst['ttft_p95'])} ms"))
    return out


def latencies(summary: Json) -> list[tuple[str, list[str]]]:
    """Rows of (name, p50, p95, p99, mean), in ms."""
    kinds = {"time to first token": summary["ttft"]}
    if summary["adapters"]["requests"]:
        kinds |= {f"... adapter {tier}": summary["adapters"]["ttft"][tier] for tier in TIERS}
    kinds |= {"between tokens": summary["itl"], "whole request": summary["latency"]}
    return [(name, [milliseconds(value) for value in found.values()]) for name, found in kinds.items()]


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _overview(summary: Json) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows(summary):
        table.add_row(*row)
    return table


def _latencies(summary: Json) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("milliseconds")
    for name in ("p50", "p95", "p99", "mean"):
        table.add_column(name, justify="right")
    for name, values in latencies(summary):
        table.add_row(name, *values)
    return table


def _tenants(summary: Json) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("tenant")
    for name in ("requests", "served / asked", "first token p50 ms", "p95 ms"):
        table.add_column(name, justify="right")
    for tenant in summary["fairness"]["tenants"]:
        served = "-" if tenant["served"] is None else f"{tenant['served']:.1%}"
        p50, p95 = (milliseconds(tenant["ttft"][p]) for p in ("p50", "p95"))
        table.add_row(tenant["tenant"], str(tenant["requests"]), served, p50, p95)
    return table
