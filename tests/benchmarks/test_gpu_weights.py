"""What the benchmark of weights on a GPU counts and prints; it measures only where there is a device."""

from __future__ import annotations

import pytest
import torch

import gpu_weights
from gpu_kernels import Device
from lorikeet.kernels.int4_weight import Int4Weight


def test_the_longer_of_two_times_is_the_floor() -> None:
    weights = 4096 * 6144
    few = gpu_weights.floor(Device("d", 1e12, 1e15, 0), "int4", 1, 4096, 6144)
    assert few == pytest.approx((0.5625 * weights + 2 * (4096 + 6144)) / 1e12 * 1e6)
    many = gpu_weights.floor(Device("d", 1e12, 1e14, 0), "torch int8", 2048, 4096, 6144)
    assert many == pytest.approx(2 * 2048 * weights / 1e14 * 1e6)


def test_bytes_are_those_that_are_held() -> None:
    held = Int4Weight(torch.randn(64, 128).bfloat16())
    assert held.packed.nbytes + held.scale.nbytes == gpu_weights.BYTES["int4"] * 64 * 128


def test_lines_stand_under_their_header() -> None:
    line = {"product": "gate_up", "form": "torch int4", "rows": 256, "stored": 123.4, "floor": 61.7}
    for more in ({}, {"dequantised": 100.0}):
        assert len(gpu_weights.show(line | more)) == len(gpu_weights.header())
    assert "62%" in gpu_weights.show(line | {"dequantised": 100.0})


def test_without_a_device_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_weights.main(["--rows", "1"]) == 2
    assert "a CUDA device is needed" in capsys.readouterr().err
