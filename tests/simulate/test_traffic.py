from __future__ import annotations

import msgspec
import numpy as np
import pytest
from tests.simulate.scenarios import scenario, stream

from lorikeet.simulate.scenario import (
    Arrivals,
    Gamma,
    LogNormalLength,
    OnOff,
    Poisson,
    Steady,
    UniformDraw,
    UniformLength,
    ZipfDraw,
)
from lorikeet.simulate.traffic import BASE, draw_adapters, draw_arrivals, draw_lengths, draw_traffic

COUNT = 200_000


@pytest.mark.parametrize(
    ("kind", "rate", "variation"),
    [
        (Steady(rate=5), 5, 0),
        (Poisson(rate=5), 5, 1),
        (Gamma(rate=5, variation=3), 5, 3),
        (OnOff(rate=20, on_seconds=1, off_seconds=3), 5, None),
    ],
)
def test_arrivals_have_the_rate_and_the_variation_asked_for(
    kind: Arrivals, rate: float, variation: float | None
) -> None:
    times = draw_arrivals(kind, COUNT, np.random.default_rng(0))
    gaps = np.diff(times)
    assert (gaps >= 0).all() and times[0] >= 0
    assert COUNT / times[-1] == pytest.approx(rate, rel=0.03)
    if variation is not None:
        assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.02, abs=1e-6)


def test_on_and_off_times_alternate() -> None:
    times = draw_arrivals(OnOff(rate=1000, on_seconds=2, off_seconds=5), COUNT, np.random.default_rng(0))
    pauses = np.diff(times)[np.diff(times) > 0.1]  # no gap of a Poisson process of 1000 a second is that long
    assert pauses.mean() == pytest.approx(5, rel=0.4)
    assert len(pauses) == pytest.approx(COUNT / 1000 / 2, rel=0.3)


def test_zipf_is_zipf_and_the_base_has_its_share() -> None:
    drawn = draw_adapters(ZipfDraw(first=10, count=5, base_share=0.25), COUNT, 100, np.random.default_rng(0))
    counts = {number: int(n) for number, n in zip(*np.unique(drawn, return_counts=True), strict=True)}
    assert set(counts) == {BASE, 10, 11, 12, 13, 14}
    assert counts[BASE] == pytest.approx(COUNT / 4, rel=0.02)
    for k in range(1, 5):
        assert counts[10] / counts[10 + k] == pytest.approx(k + 1, rel=0.05)
    every = draw_adapters(UniformDraw(first=90), COUNT, 100, np.random.default_rng(0))
    assert np.bincount(every)[90:] == pytest.approx(COUNT / 10, rel=0.05)


def test_lengths_keep_their_bounds() -> None:
    draw = np.random.default_rng(0)
    uniform = draw_lengths(UniformLength(min=3, max=6), COUNT, draw)
    assert np.bincount(uniform)[3:] == pytest.approx(COUNT / 4, rel=0.03) and uniform.max() == 6
    normal = draw_lengths(LogNormalLength(median=50, sigma=0.5, min=20, max=200), COUNT, draw)
    assert normal.min() == 20 and normal.max() == 200
    assert np.median(normal) == pytest.approx(50, rel=0.02)


def test_a_stream_stays_the_same_beside_others() -> None:
    alone = draw_traffic(scenario(requests=50, traffic=[stream(adapters={"kind": "zipf"})]))
    both = draw_traffic(
        scenario(requests=100, traffic=[stream(adapters={"kind": "zipf"}), stream(tenant="b", shared_prefix=2)])
    )
    assert (np.diff(both.time) >= 0).all()
    own = both.stream == 0
    shared = min(own.sum(), 40)
    for name in ("time", "adapter"):
        assert (getattr(both, name)[own][:shared] == getattr(alone, name)[:shared]).all(), name
    assert (both.adapter[~own] == BASE).all()


def test_the_seed_decides() -> None:
    first, again, other = (draw_traffic(msgspec.structs.replace(scenario(), seed=seed)) for seed in (1, 1, 2))
    assert (first.time == again.time).all() and (first.prompt == again.prompt).all()
    assert (first.time != other.time).any()
