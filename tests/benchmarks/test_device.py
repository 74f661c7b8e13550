"""benchmarks/serving.py --device: whole runs on a tiny base, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import device
import serving
from load import choose_adapters
from roofline import Itemsizes, decode_work, linear_size, rank_size


def test_the_8b_shape_is_the_published_one() -> None:
    spec = device.SPECS["8b"]
    parameters = linear_size(spec) + 2 * spec.vocab_size * spec.hidden_size + 65 * spec.hidden_size
    assert parameters == pytest.approx(8.03e9, rel=1e-3)
    assert 16 * rank_size(spec) * 2 == pytest.approx(83.9e6, rel=1e-3)
    step = decode_work(spec, Itemsizes(2, 2), rows=64, context=0, distinct=64, adapted=64, rank=16)
    bare = decode_work(spec, Itemsizes(2, 2), rows=64, context=0, distinct=0, adapted=0, rank=0)
    assert step.bytes - bare.bytes == pytest.approx(64 * 83.9e6, rel=1e-3)
    long = {"rows": 64, "context": 640, "distinct": 0, "adapted": 0, "rank": 0}
    full, small = (decode_work(spec, Itemsizes(2, 2, cache), **long).bytes for cache in (None, 1))
    assert full - small == pytest.approx(64 * 640 * 65536)


def test_uniform_traffic_draws_from_all() -> None:
    drawn = choose_adapters("uniform", 64, 1, 1000, np.random.default_rng(0))
    assert drawn.shape == (1, 64) and len(set(drawn.ravel().tolist())) > 50 and drawn.max() < 1000


def test_a_whole_run() -> None:
    command = [
        sys.executable, serving.__file__, "--device", "cpu", "--shape", "tiny", "--adapters", "6", "--ranks", "2", "4",
        "--batch", "1", "3", "--case", "base", "one", "uniform", "zipf", "--prompt", "12", "--new", "6",
        "--repeats", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])["shapes"]["tiny"]
    cells = {(one["case"], one["clients"]): one for one in said["cells"]}
    assert set(cells) == {("base", 1), ("one", 1), *((case, 3) for case in ("base", "one", "uniform", "zipf"))}
    for one in cells.values():
        assert one["tokens"] == one["clients"] * 6 and one["step_seconds"] > 0 and one["step_over_floor"] > 0
        assert 0 < one["floor_ratio"] <= 1 and (one["case"] == "base") == (one["floor_ratio"] == 1)
    assert {one["ratio"] for one in said["ratios"]} >= {
        "step / floor",
        "base / uniform",
        "base / uniform, of its floor",
    }
    assert said["cold"]["cold_seconds"] > 0 and said["cold"]["copy_seconds"] is None
    assert said["load_seconds_each"] > 0


def test_shapes_belong_to_a_side(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--shape", "8b"], ["--shape", "half", "--device", "cpu"]):
        with pytest.raises(SystemExit):
            serving.arguments(given)
        assert f"--shape: found {given[1]}" in capsys.readouterr().err
    assert serving.arguments(["--device", "cpu", "--shape", "8b"]).ranks == [16]
    assert Path(device.__file__).name == "device.py"
