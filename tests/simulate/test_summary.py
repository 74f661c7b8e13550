from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console
from tests.simulate.scenarios import flat, scenario, stream

from lorikeet.simulate.cost import CostModel
from lorikeet.simulate.page import page
from lorikeet.simulate.simulation import simulate
from lorikeet.simulate.summary import jain, percentiles, summarise, tables


def test_jain_is_one_for_equals_and_one_nth_for_a_single_winner() -> None:
    assert jain(np.full(7, 3.0)) == pytest.approx(1)
    assert jain(np.array([5.0, 0, 0, 0])) == pytest.approx(1 / 4)
    assert jain(np.zeros(3)) == 1


def test_percentiles_leave_out_what_never_came() -> None:
    assert percentiles(np.array([np.nan, 1.0, 3.0]))["p50"] == 2.0
    assert percentiles(np.array([np.nan])) == {"p50": None, "p95": None, "p99": None, "mean": None}


def test_too_little_for_all_shows_in_what_is_served() -> None:
    light, heavy = (
        summarise(made, simulate(made, flat(0.01)))
        for made in (
            scenario(
                requests=1500,
                traffic=[
                    stream(tenant="calm", arrivals={"kind": "poisson", "rate": 5.0}, adapters={"kind": "uniform"}),
                    stream(tenant="wild", arrivals={"kind": "poisson", "rate": rate}),
                ],
                replicas={"count": 1},
                engine={"kv_tokens": 4096, "max_seqs": 8, "step_tokens": 64, "queue": 2000},
                adapters={"count": 4, "bytes": ["1MiB"], "compiled": True},
            )
            for rate in (10.0, 500.0)
        )
    )
    assert light["fairness"]["jain_tenants"] > 0.99
    calm, wild = heavy["fairness"]["tenants"]
    assert wild["served"] < 0.5 < calm["served"]
    assert heavy["fairness"]["jain_tenants"] < 0.95
    assert heavy["fairness"]["worst_tenant"]["tenant"] == "wild"
    assert sum(heavy["adapters"]["hits"].values()) == pytest.approx(1)
    assert light["throughput"]["requests_per_second"] == pytest.approx(15, rel=0.2)


def test_the_page_stands_alone_and_the_tables_fit_80_columns() -> None:
    made = scenario(traffic=[stream(), stream(tenant="<b>", adapters={"kind": "zipf"})])
    record = simulate(made, flat(0.002))
    summary = summarise(made, record)
    html = page("a <scenario>", summary, record)
    assert html.count("<svg") == 3 and html.count("<polyline") == 4
    assert "a &lt;scenario&gt;" in html and "<b>" not in html
    assert not re.search(r"(src|href)=|https?:|@import|\bnan\b", html)
    out = io.StringIO()
    Console(file=out, width=80).print(tables(summary))
    assert "time to first token" in out.getvalue() and "…" not in out.getvalue()


def test_nothing_but_refusals_is_shown_too() -> None:
    made = scenario(requests=1, traffic=[stream(deadline=1e-6)])
    record = simulate(made, CostModel(combine="sum", fixed=1.0, request=0.5))
    summary = summarise(made, record)
    assert summary["outcomes"] == {"length": 0, "error": 1, "refused": 0}
    assert summary["ttft"]["p50"] is None
    assert "nothing to show" in page("x", summary, record)
