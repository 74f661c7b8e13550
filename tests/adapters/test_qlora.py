"""Adapters over a quantised base: one that bitsandbytes stored (QLoRA), and one that is held so (`--quantize`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import kinds
from tests.fixtures import make_batch, make_checkpoint, make_slab, sample_tokens
from tests.quantised import quantise, quantised_oracle

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.kernels.gpu_weight import Fp8Weight, GpuInt4Weight, GpuInt8Weight, Nf4Weight
from lorikeet.kernels.int4_weight import Int4Weight, WhereItFits
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.kernels.weight import DenseWeight, Int8Weight, Weight
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load

KINDS = ["lora", "dora", "ia3"]


def compiled(folders: list[Path], base: Path, cache: Path, dtype: Any = "float32") -> Any:
    """The slab of these adapters, compiled for `base`."""
    spec = load(base, torch.float32)[0]
    identity, files = identify(base), checkpoint_files(base)
    infos = [compile_adapter(folder, spec, identity, dtype, cache, checkpoint=files) for folder in folders]
    return make_slab([Path(info.path) for info in infos], spec)


def rows_of(count: int) -> list[torch.Tensor]:
    return [sample_tokens(1, 20 + i, 100 + i)[0] for i in range(count)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's and bitsandbytes', of dtypes
@pytest.mark.parametrize(
    ("kind", "family"), [("nf4-double", "llama"), ("nf4", "qwen2"), ("fp4", "llama-tied"), ("int8", "qwen3")]
)
def test_adapters_on_a_stored_base_are_those_of_peft(kind: str, family: str, tmp_path: Path, cache: Path) -> None:
    """In one batch with the base itself."""
    quantise(family, tmp_path, kind)
    base = tmp_path / "base"
    folders = [kinds.make(name, tmp_path / "plain", tmp_path / name, i) for i, name in enumerate(KINDS)]
    slab = compiled(folders, base, cache)
    spec, weights = load(base, torch.float32)
    chosen: list[int | None] = [0, 1, 2, None, 1]
    rows = rows_of(len(chosen))
    with torch.no_grad():
        ours = forward_of(spec, weights, rows, chosen, slab)
        for row, handle, found in zip(rows, chosen, ours, strict=True):
            theirs = quantised_oracle(base, None if handle is None else folders[handle])(row.unsqueeze(0)).logits[0]
            name = "base" if handle is None else KINDS[handle]
            torch.testing.assert_close(
                found, theirs.log_softmax(-1), atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def forward_of(
    spec: Any, weights: Any, rows: list[torch.Tensor], chosen: list[int | None], slab: Any, ops: Any = None
) -> tuple[torch.Tensor, ...]:
    from lorikeet.model.decoder import forward

    logits = forward(spec, weights, make_batch(rows, chosen), ops or ReferenceOps(), slab).log_softmax(-1)
    return logits.split([len(row) for row in rows])


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], Weight]] = {
    "int8": Int8Weight,
    "int4": WhereItFits(Int4Weight),
    "int8 on a gpu": GpuInt8Weight,
    "int4 on a gpu": WhereItFits(GpuInt4Weight),
    "nf4 on a gpu": WhereItFits(Nf4Weight),
    "fp8 on a gpu": Fp8Weight,
}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_on_a_base_that_is_held_quantised(form: str, tmp_path: Path, cache: Path) -> None:
    """One batch in bf16 against the same model in fp32 with the dequantised weights: what differs is rounding alone, as
    with plain weights; the adapters' own normal form comes from the base as it is stored."""
    if "gpu" in form:
        pytest.importorskip("triton", reason="GPU kernels need triton")
    base = make_checkpoint("llama", tmp_path / "base", torch.bfloat16, intermediate_size=128)
    folders = [kinds.make(name, base, tmp_path / name, i) for i, name in enumerate(KINDS)]
    chosen: list[int | None] = [0, 1, 2, None, 1]
    rows = rows_of(len(chosen))

    def plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        held = FORMS[form](weight.bfloat16(), None if bias is None else bias.bfloat16())
        return DenseWeight(held.dequantised().float(), bias)

    found = {}
    for name, dtype, make in (
        ("exact", "float32", plain),
        ("bf16", "bfloat16", DenseWeight),
        (form, "bfloat16", FORMS[form]),
    ):
        slab = compiled(folders, base, cache, dtype)
        spec, weights = load(base, getattr(torch, dtype), make)
        with torch.no_grad():
            found[name] = torch.cat(forward_of(spec, weights, rows, chosen, slab))
    plain_base = forward_of(*load(base, torch.float32), rows, chosen, compiled(folders, base, cache))
    rounding = (found["bf16"] - torch.cat(plain_base)).square().mean().sqrt()
    off = (found[form] - found["exact"]).square().mean().sqrt()
    moved = (found["exact"] - torch.cat(plain_base)).square().mean().sqrt()
    assert off < (4 if "fp8" in form else 1.6) * rounding, (off, rounding)
    assert moved > 0.01
