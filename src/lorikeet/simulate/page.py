"""The plots of a simulation as one HTML page: inline SVG, nothing from anywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from lorikeet.simulate.simulation import Record
from lorikeet.simulate.summary import Json, latencies, rows
from lorikeet.simulate.traffic import Floats

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 260, 64, 36, 12, 16
COLORS = ("#1f6f5c", "#c2571a", "#4a5fa8")
POINTS = 400  # of a curve
STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:700px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:3px 14px 3px 0;text-align:right}"
    "td:first-child,th:first-child{text-align:left}tr{border-bottom:1px solid #ddd}svg{width:100%;height:auto}"
)


@dataclass(frozen=True, slots=True)
class Curve:
    name: str
    x: Floats
    y: Floats


def page(title: str, summary: Json, record: Record) -> str:
    """The whole page."""
    overview = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows(summary))
    heads = "".join(f"<th>{name}</th>" for name in ("milliseconds", "p50", "p95", "p99", "mean"))
    times = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for name, values in latencies(summary)
    )
    gauges = record.gauges
    seconds = gauges[:, 0]
    plots = [
        plot("Time to first token: share of requests", "seconds", [_distribution(record)], log=True),
        plot("Output tokens a second", "seconds", [Curve("tokens a second", *_rate(seconds, gauges[:, 3]))]),
        plot(
            "Requests that run and wait",
            "seconds",
            [Curve("running", seconds, gauges[:, 1]), Curve("waiting", seconds, gauges[:, 2])],
        ),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1><table>{overview}</table><table><tr>{heads}</tr>{times}</table>{''.join(plots)}</html>"
    )


def _distribution(record: Record) -> Curve:
    ttft = np.sort((record.first - record.traffic.time)[~np.isnan(record.first)])
    shares = np.linspace(0, 1, min(len(ttft), POINTS))
    return Curve("share", np.quantile(ttft, shares) if len(ttft) else np.zeros(0), shares)


def _rate(seconds: Floats, total: Floats) -> tuple[Floats, Floats]:
    """Over about a hundred spans of equal length."""
    if len(seconds) < 2:
        return np.zeros(0), np.zeros(0)
    edges = np.linspace(seconds[0], seconds[-1], min(len(seconds), 101))
    made = np.interp(edges, seconds, total)
    return (edges[1:] + edges[:-1]) / 2, np.diff(made) / np.diff(edges)


def plot(title: str, unit: str, curves: list[Curve], log: bool = False) -> str:
    """One chart; `log`: x is logarithmic, and what is not above 0 is left out."""
    kept = [Curve(c.name, c.x[c.x > 0], c.y[c.x > 0]) if log else c for c in curves]
    kept = [curve for curve in kept if len(curve.x)]
    if not kept:
        return f"<h2>{escape(title)}</h2><p>nothing to show</p>"
    every_x = np.concatenate([curve.x for curve in kept])
    low, high = float(every_x.min()), float(every_x.max())
    top = float(max(curve.y.max() for curve in kept)) or 1.0
    scale = np.log10 if log else np.asarray
    start, span = float(scale(low)), float(scale(high) - scale(low)) or 1.0

    def across(x: Floats | float) -> Floats:
        return LEFT + (np.asarray(scale(x)) - start) / span * (WIDTH - LEFT - RIGHT)

    def up(y: Floats | float) -> Floats:
        return HEIGHT - BOTTOM - np.asarray(y) / top * (HEIGHT - BOTTOM - TOP)

    parts = []
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        y, x = float(up(top * fraction)), LEFT + fraction * (WIDTH - LEFT - RIGHT)
        value = 10 ** (start + fraction * span) if log else low + fraction * span
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * fraction:.3g}</text>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{value:.3g}</text>')
    for i, (curve, color) in enumerate(zip(kept, COLORS, strict=False)):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across(curve.x), up(curve.y), strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(kept) > 1:
            parts.append(f'<text x="{LEFT + 12 + 90 * i}" y="{TOP + 12}" fill="{color}">{escape(curve.name)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(unit)}</text>')
    return (
        f'<h2>{escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" fill="#444" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
