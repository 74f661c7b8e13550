"""What the benchmark of GPU kernels counts and prints; it measures only where there is a device."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

import gpu_kernels
from gpu_kernels import Case, Device, Figure, cases


def test_cases_are_each_there_once() -> None:
    found = cases(["qkv", "o"], [1, 64], [1, 32, 64], [8, 64])
    assert [(c.product, c.rows, c.adapters) for c in found] == [
        (name, *sizes) for name in ("qkv", "o") for sizes in ((1, 1), (64, 1), (64, 32), (64, 64))
    ]
    assert found[3].ranks == (8, 64) * 32
    assert Case("o", 10, 4, (1, 1, 1, 1)).lengths == [3, 3, 2, 2]


def test_bytes_and_operations_of_a_case() -> None:
    case = Case("qkv", 3, 2, (8, 16))
    pairs = 24 * (3 * 4096 + 6144)
    assert case.bytes == 2 * (pairs + 3 * 4096 + 2 * 3 * 6144)
    assert case.operations == 2 * (2 * 8 + 1 * 16) * (3 * 4096 + 6144)
    assert case.layers(cache=50 * 2**20) == 214 and Case("gate_up", 2048, 1, (8,)).layers(2**20) == 2


def test_the_longer_of_two_times_is_the_floor() -> None:
    case = Case("o", 1024, 1, (16,))
    assert Device("d", bandwidth=case.bytes, rate=2 * case.operations, cache=0).floor(case) == (1e6, "bytes")
    assert Device("d", bandwidth=2 * case.bytes, rate=case.operations, cache=0).floor(case) == (1e6, "FLOPs")


@pytest.mark.parametrize("early", [None, 5.25])
def test_lines_stand_under_their_header(early: float | None) -> None:
    figure = Figure("gate_up", 2048, 64, 123.4, 61.7, "bytes", 400.0, 530.125, early)
    header, line = gpu_kernels.header(early is not None), gpu_kernels.line(figure)
    assert len(header) == len(line) and "50%" in line
    assert ("5.25" in line) == (early is not None)


def test_arguments() -> None:
    args = gpu_kernels.parse(["--rows", "1", "256", "--products", "down", "--early"])
    assert (args.rows, args.products, args.early, args.adapters) == ([1, 256], ["down"], True, [1, 32, 64])
    for wrong in (["--rows", "0"], ["--products", "qk"], ["--ranks", "x"]):
        with pytest.raises(SystemExit):
            gpu_kernels.parse(wrong)


def test_without_a_device_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_kernels.main([]) == 2
    assert "a CUDA device is needed" in capsys.readouterr().err


def test_a_run_under_the_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the clock: tensors, the check against fp64, variants of block sizes, the report."""
    pytest.importorskip("triton", reason="GPU kernels need triton")
    monkeypatch.setitem(gpu_kernels.PRODUCTS, "o", (64, (48, 32)))
    monkeypatch.setattr(gpu_kernels, "DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_kernels, "LAYERS", 2)
    monkeypatch.setattr(gpu_kernels, "measure_device", lambda repeats: Device("none", 4e12, 8e14, 2**10))
    some, ran = list(gpu_kernels.variants())[::11], []
    monkeypatch.setattr(gpu_kernels, "variants", lambda: iter(some))

    def microseconds(work: Callable[[], None], repeats: int) -> float:
        work()
        ran.append(repeats)
        return 2.0

    monkeypatch.setattr(gpu_kernels, "microseconds", microseconds)
    arguments = ["--products", "o", "--rows", "3", "--adapters", "2", "--ranks", "4", "20", "--repeats", "5", "--sweep"]
    assert gpu_kernels.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(printed[-1])
    (case,) = report["cases"]
    assert (case["product"], case["rows"], case["adapters"], case["lowrank"]) == ("o", 3, 2, 1.0)
    assert case["error"] <= 1e-2 and len(report["sweep"]["o 3 2"]) == 1 + len(some) == len(ran) - 3
    assert "as planned" in printed[-2] and ran[0] == 5
