"""The table of all kinds against transformers + peft (LoReFT: a hook on the transformers model): alone, and all of them
in one batch; and what bf16 costs each of them, against what it costs plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import kinds
from tests.adapters.resized import make_resized, theirs
from tests.fixtures import VOCABULARY, make_batch, make_slab, oracle, sample_tokens

from lorikeet.adapters.compiled import compile_adapter
from lorikeet.engine.engine import _where
from lorikeet.kernels.batch import Batch, Segments
from lorikeet.kernels.cpu import CpuOps
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.sources import checkpoint_files, identify
from lorikeet.model.weights import load
from lorikeet.types import AdapterInfo

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's: of what it saves, of tied weights, of LoftQ
    pytest.mark.filterwarnings("ignore:Adapter .default.. .* have invalid shape"),  # peft of its own biases of B
]
MORE = VOCABULARY + 3
# Every kind that is served, but for what only an untied or only a tied base has.
TABLE = [
    "lora", "rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "pissa", "olora", "loftq", "fused",
    "dora", "ia3", "vera", "lora_bias", "bias all", "alora", "loreft", "modules_to_save", "token rows", "embedding",
    "head", "added tokens", "ia3, head saved", "vera, embedding saved",
]  # fmt: skip
TIED = ["both tied", "saved and tied", "added tokens, tied"]


@dataclass
class Made:
    """An adapter's folder, and the logits [T, tokens] that somebody else's code has for a row."""

    folder: Path
    answer: Callable[[torch.Tensor], torch.Tensor]
    tokens: int = VOCABULARY


def make(kind: str, base: Path, folder: Path, seed: int) -> Made:
    def of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda row: model(input_ids=row.unsqueeze(0)).logits[0]

    if kind in ("pissa", "olora"):
        return Made(folder, of(kinds.make_converted(kind, base, folder, seed)))
    if kind == "loftq":  # what its pair leaves of the rounding is lost in PEFT's conversion, so the file counts
        kinds.make_converted(kind, base, folder, seed)
        return Made(folder, of(oracle(base, folder)))
    if kind == "fused":
        return Made(folder, of(oracle(base, kinds.make_fused(base, folder, seed))))
    if kind == "loreft":
        tensors = kinds.write_loreft(folder, 64, [0, 2], seed)
        model = kinds.hooked(base, tensors, lambda tokens: [0, 1, *range(tokens - 3, tokens)])
        return Made(folder, of(model))
    if kind.startswith("added tokens"):
        fields: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
        if kind.endswith("tied"):
            fields = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
        make_resized(base, folder, MORE, seed, **fields)
        return Made(folder, of(theirs(base, folder, MORE)), MORE)
    kinds.make(kind, base, folder, seed)
    return Made(folder, of(oracle(base, folder)))


def row_for(kind: str, place: int) -> torch.Tensor:
    row = sample_tokens(1, 20 + place, 100 + place)[0]
    row[row == kinds.INVOCATION[0]] = 10
    if kind == "alora":
        row[9:12] = torch.tensor(kinds.INVOCATION)
    if kind.startswith("added tokens"):
        row[3:9:2] = torch.tensor([VOCABULARY, MORE - 1, VOCABULARY + 1])
    return row


def batch_of(rows: list[torch.Tensor], handles: list[int | None], infos: list[AdapterInfo]) -> Batch:
    """Each adapter acts where the engine has it act."""
    batch, start = make_batch(rows, handles), 0
    acting: dict[int, list[torch.Tensor]] = {}
    for row, handle in zip(rows, handles, strict=True):
        if handle is not None:
            for begin, end in _where(row.tolist(), infos[handle]):
                acting.setdefault(handle, []).append(start + torch.arange(begin, min(end, len(row))))
        start += len(row)
    parts = {handle: torch.cat(found) for handle, found in sorted(acting.items())}
    if parts:
        ends = torch.tensor([len(part) for part in parts.values()]).cumsum(0).tolist()
        batch.token_segments = Segments(torch.cat(list(parts.values())), [0, *ends], list(parts), False)
    return batch  # type: ignore[no-any-return]


@pytest.mark.parametrize(("family", "table"), [("llama", TABLE), ("qwen2", TABLE), ("llama-tied", [*TABLE, *TIED])])
def test_every_kind_alone_and_all_in_one_batch(
    family: str,
    table: list[str],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", kinds.quantised)
    base = checkpoint(family)
    spec, weights = load(base, torch.float32)
    made = [make(kind, base, tmp_path / str(i), i) for i, kind in enumerate(table)]
    files = checkpoint_files(base)
    infos = [compile_adapter(one.folder, spec, identify(base), "float32", cache, checkpoint=files) for one in made]
    slab = make_slab([Path(info.path) for info in infos], spec)
    handles: list[int | None] = [*range(len(made)), None, 0]
    rows = [row_for("base" if handle is None else table[handle], i) for i, handle in enumerate(handles)]
    with torch.no_grad():
        plain = oracle(base)
        expected = [
            (plain(row.unsqueeze(0)).logits[0] if handle is None else made[handle].answer(row)).log_softmax(-1)
            for row, handle in zip(rows, handles, strict=True)
        ]

        def check(found: torch.Tensor, place: int) -> None:
            handle = handles[place]
            name, tokens = ("base", VOCABULARY) if handle is None else (table[handle], made[handle].tokens)
            ours = found[:, :tokens].log_softmax(-1)
            torch.testing.assert_close(ours, expected[place], atol=1e-4, rtol=0, msg=lambda m: f"{name}: {m}")

        for ops in (ReferenceOps(), CpuOps()):
            for place, (row, handle) in enumerate(zip(rows, handles, strict=True)):
                batch = batch_of([row], [handle], infos)
                check(forward(spec, weights, batch, ops, slab), place)  # type: ignore[arg-type]
            mixed = forward(spec, weights, batch_of(rows, handles, infos), ops, slab)  # type: ignore[arg-type]
            for place, found in enumerate(mixed.split([len(row) for row in rows])):
                check(found, place)


IN_BF16 = [
    "dora", "ia3", "vera", "lora_bias", "bias all", "alora", "loreft", "modules_to_save", "token rows", "embedding",
    "head", "dora on the head", "ia3, head saved", "vera, embedding saved",
]  # fmt: skip
FACTOR = 1.5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bf16_costs_no_kind_more_than_plain_lora(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    """The deviation from fp32, with the same values in the checkpoint, of weights, activations and adapters in bf16."""
    base = checkpoint(family, torch.bfloat16)
    files, names = checkpoint_files(base), ["lora", *IN_BF16]
    made = [make(kind, base, tmp_path / str(i), i) for i, kind in enumerate(names)]
    found: dict[str, list[torch.Tensor]] = {}
    for dtype in ("float32", "bfloat16"):
        spec, weights = load(base, getattr(torch, dtype))
        infos = [compile_adapter(one.folder, spec, identify(base), dtype, cache, checkpoint=files) for one in made]  # type: ignore[arg-type]
        slab = make_slab([Path(info.path) for info in infos], spec)
        for handle, kind in enumerate(names):
            rows = [row_for(kind, i) for i in range(8)]
            with torch.no_grad():
                logits = forward(spec, weights, batch_of(rows, [handle] * 8, infos), CpuOps(), slab)  # type: ignore[arg-type]
            found.setdefault(kind, []).append(logits.log_softmax(-1))
    off = {kind: float((two - one).square().mean().sqrt()) for kind, (one, two) in found.items()}
    assert 1e-3 < off["lora"] < 0.2
    assert {kind: value / off["lora"] for kind, value in off.items() if value > FACTOR * off["lora"]} == {}
