"""Products with weights in int8, int4 and NF4 on a GPU, against the dequantised weight in float64 and bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorikeet.kernels.gpu_weight import GpuInt4Weight, GpuInt8Weight, Nf4Weight
from lorikeet.kernels.int4_weight import Int4Weight
from lorikeet.kernels.weight import Weight

Make = Callable[[Tensor, Tensor | None], Weight]
FORMS: dict[str, Make] = {"int8": GpuInt8Weight, "int4": GpuInt4Weight, "nf4": Nf4Weight}


def drawn(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Rows of different sizes, one of zeros, one with an outlier, one far from zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    weight[1], weight[2, 5] = 0, 30.0
    weight[3] += 10
    return weight.bfloat16()


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels write into is not a number before."""
    empty = torch.empty

    def poison(*args: object, **kwargs: object) -> Tensor:
        found = empty(*args, **kwargs)  # type: ignore[call-overload]
        return found.fill_(float("nan")) if found.is_floating_point() else found  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "rows"), [((48, 128), 3), ((72, 320), 17), ((33, 64), 1), ((40, 192), 70)])
def test_products_are_those_of_the_dequantised_weight(
    form: str, shape: tuple[int, int], rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(rows)
    bias = torch.randn(shape[0], generator=generator).bfloat16() if rows % 2 else None
    x = torch.randn(rows, shape[1] + 8, generator=generator).bfloat16().to(device)[:, 8:]  # rows at a stride
    weight = FORMS[form](drawn(shape).to(device), None if bias is None else bias.to(device))
    poisoned(monkeypatch)
    plain = weight.dequantised()
    assert weight.shape == plain.shape == shape and plain.dtype == torch.bfloat16
    found = weight.linear(x)
    assert found.dtype == torch.bfloat16 and found.shape == (rows, shape[0])
    expected = x.double() @ plain.double().T + (0 if bias is None else bias.to(device).double())
    assert (found.double() - expected).norm() < 1e-2 * expected.norm()
    assert torch.allclose(weight.row_norms(), plain.float().norm(dim=1))
    held = sum(value.nbytes for value in vars(weight).values() if isinstance(value, Tensor) and value is not bias)
    assert held <= shape[0] * shape[1] * (1 if form == "int8" else 0.5625) + 8 * shape[0] + 64


@pytest.mark.parametrize(("form", "rounds"), [("int8", 127), ("int4", 15)])
def test_the_dequantised_weight_is_within_half_a_step(form: str, rounds: int, device: str) -> None:
    plain = drawn((48, 256)).float()
    found = FORMS[form](plain.bfloat16().to(device), None).dequantised().cpu().float()
    if form == "int8":
        step = plain.abs().amax(1, keepdim=True) / rounds
    else:
        groups = plain.view(48, -1, 64)
        step = ((groups.amax(2) - groups.amin(2)) / rounds).repeat_interleave(64, 1)
    assert ((found - plain).abs() <= step * 0.55 + plain.abs() * 2**-7 + 1e-6).all()


def values_of(weight: Nf4Weight) -> Tensor:
    """What the stored bytes stand for, unrounded."""
    bytes_ = weight.packed.view(weight.shape[0], -1, 32)
    index = torch.cat([bytes_ & 15, bytes_ >> 4], 2).long()
    assert weight.table is not None
    values: Tensor = weight.table[index] * weight.scale.T[:, :, None]
    return values.flatten(1)


def test_nf4_is_that_of_bitsandbytes(device: str) -> None:
    import bitsandbytes.functional as bnb

    plain = drawn((48, 256)).float()
    packed, state = bnb.quantize_4bit(plain, quant_type="nf4", blocksize=64)
    theirs = bnb.dequantize_4bit(packed, state)
    ours = Nf4Weight(plain.to(device))
    assert (values_of(ours).cpu() == theirs).float().mean() > 0.999  # a value between two may go either way
    again = Nf4Weight(theirs.to(device))
    assert torch.equal(values_of(again).cpu(), theirs)  # what was quantised once comes back as it was
    torch.testing.assert_close(again.dequantised().cpu().float(), theirs, rtol=2**-7, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_many_rows_are_multiplied_with_the_dequantised_weight(
    form: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorikeet.kernels import gpu_products

    weight, x = FORMS[form](drawn((48, 64)).to(device), None), torch.randn(9, 64).bfloat16().to(device)
    few = weight.linear(x)
    monkeypatch.setattr(gpu_products, "MOST_ROWS", 8)
    monkeypatch.setattr(gpu_products, "int8_linear", None)
    monkeypatch.setattr(gpu_products, "four_bits_linear", None)
    many = weight.linear(x)
    assert torch.equal(many, torch.nn.functional.linear(x, weight.dequantised()))
    assert (few.double() - many.double()).norm() < 1e-2 * many.double().norm()
    monkeypatch.undo()
    assert weight.linear(x[:0]).shape == (0, 48)


def test_rows_that_are_not_bf16_are_refused(device: str) -> None:
    weight = GpuInt8Weight(drawn((48, 64)).to(device))
    with pytest.raises(ValueError, match="expected bfloat16 rows of 64"):
        weight.linear(torch.zeros(2, 64, device=device))
    with pytest.raises(ValueError, match="expected bfloat16 rows of 64"):
        weight.linear(torch.zeros(64, 2, device=device).bfloat16().T)


def test_int4_is_the_same_on_both_devices(device: str) -> None:
    plain = drawn((48, 128))
    here, there = Int4Weight(plain), GpuInt4Weight(plain.to(device))
    torch.testing.assert_close(there.dequantised().cpu(), here.dequantised(), rtol=2**-7, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 16, 33, 64, 256, 300])
def test_large_products(form: str, rows: int, device: str) -> None:
    """The shapes of an 8B model, of which the interpreter would take hours, and in a graph."""
    generator = torch.Generator(device).manual_seed(rows)
    for shape in ((6144, 4096), (4096, 14336)):
        plain = torch.randn(shape, generator=generator, device=device).bfloat16()
        weight, x = FORMS[form](plain, None), torch.randn(rows, shape[1], generator=generator, device=device).bfloat16()
        expected = x.double() @ weight.dequantised().double().T
        assert (weight.linear(x).double() - expected).norm() < 1e-2 * expected.norm()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = weight.linear(x)
        x.mul_(-2)
        graph.replay()
        assert (found.double() + 2 * expected).norm() < 2e-2 * expected.norm()
