"""Bases that bitsandbytes stored, against what it reads out of them itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fixtures import sample_tokens
from tests.model.test_weights import named_tensors
from tests.quantised import STORED, quantise, quantised_oracle

import lorikeet
from lorikeet.errors import ModelError
from lorikeet.kernels.gpu_weight import Nf4Weight
from lorikeet.kernels.int4_weight import WhereItFits
from lorikeet.model import weights as module
from lorikeet.model.names import checkpoint_shapes
from lorikeet.model.shard import Shard
from lorikeet.model.sources import checkpoint_files, weight_bytes
from lorikeet.model.weights import load
from lorikeet.types import SamplingParams


@pytest.mark.parametrize("kind", STORED)
def test_every_tensor_is_that_of_bitsandbytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEQUANTISED", 300)
    theirs = quantise("qwen2", tmp_path, kind)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        spec, weights = load(tmp_path / "base", dtype)
        ours = dict(named_tensors(spec, weights))
        assert ours.keys() == checkpoint_shapes(spec).keys() <= theirs.keys()
        for name, tensor in ours.items():
            tolerance = 1e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(tensor.float(), theirs[name].float(), rtol=tolerance, atol=1e-7)
            assert torch.equal(theirs[name], plain[name]) == ("proj.weight" not in name)


def test_a_rank_reads_its_part(tmp_path: Path) -> None:
    theirs = quantise("llama", tmp_path, "nf4-double")
    for rank in range(2):
        spec, weights = load(tmp_path / "base", torch.float32, rank=rank, ranks=2)
        shard = Shard(spec, rank, 2)
        down, up = (theirs[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("down", "up"))
        torch.testing.assert_close(weights.layers[1].down.dequantised(), down[:, shard.inputs("down")])
        torch.testing.assert_close(weights.layers[1].gate_up.dequantised()[64:], up[shard.outputs("up")])


def test_nf4_is_held_as_it_is_stored(tmp_path: Path) -> None:
    """Not rounded to bf16 in between, which would move every block a little."""
    pytest.importorskip("triton", reason="GPU kernels need triton")
    theirs = quantise("llama", tmp_path, "nf4-double", torch.bfloat16)
    _, weights = load(tmp_path / "base", torch.bfloat16, WhereItFits(Nf4Weight))
    held = weights.layers[2].o
    assert isinstance(held, Nf4Weight) and held.table is not None
    packed = load_file(tmp_path / "base" / "model.safetensors")["model.layers.2.self_attn.o_proj.weight"].view(64, 32)
    index = torch.stack([packed >> 4, packed & 15], 2).flatten(1).long()  # as bitsandbytes packs them
    low, high = held.packed & 15, held.packed >> 4
    assert torch.equal(torch.cat([low, high], 1).long(), index)
    values = held.table[index] * held.scale.T
    assert torch.equal(values.bfloat16(), theirs["model.layers.2.self_attn.o_proj.weight"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # bitsandbytes', of dtypes
def test_it_is_served(tmp_path: Path) -> None:
    """From several files, where a tensor's parts lie apart."""
    quantise("llama", tmp_path, "nf4-double")
    base, row = tmp_path / "base", sample_tokens(1, 30)[0]
    with torch.no_grad():
        theirs = quantised_oracle(base)(row.unsqueeze(0)).logits[0].log_softmax(-1)
    whole = load_file(base / "model.safetensors")
    names = sorted(whole, key=lambda name: name[::-1])
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: whole[name] for name in held}, base / file)
    (base / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    score = SamplingParams(max_tokens=1, prompt_logprobs=0)
    llm = lorikeet.LLM(str(base), dtype="float32", kv_memory=2**22)
    (found,) = llm.generate([row.tolist()], sampling=score)
    assert found.prompt_logprobs is not None
    ours = torch.tensor([one.logprob for one in found.prompt_logprobs if one is not None])
    torch.testing.assert_close(ours, theirs[torch.arange(29), row[1:]], atol=1e-4, rtol=0)
    numbers = sum(value.numel() for value in load_file(tmp_path / "plain" / "model.safetensors").values())
    assert weight_bytes(base) == max(2 * numbers, sum(path.stat().st_size for path in checkpoint_files(base)))


def test_one_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    quantise("llama", tmp_path, "nf4")
    path = tmp_path / "base" / "model.safetensors"
    whole = load_file(path)
    q = "model.layers.0.self_attn.q_proj.weight"

    def refused(change: dict[str, Any], message: str) -> None:
        save_file({name: value for name, value in {**whole, **change}.items() if value is not None}, path)
        with pytest.raises(ModelError, match=message):
            load(tmp_path / "base", torch.float32)

    refused({f"{q}.absmax": None}, "q_proj.weight: cannot be dequantised: .*absmax is missing")
    refused({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}, r"unexpected tensor model\.layers\.7")
    state = f"{q}.quant_state.bitsandbytes__nf4"
    told = json.loads(bytes(whole[state].tolist())) | {"shape": [32, 128]}
    change = {state: torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)}
    refused(change, r"q_proj\.weight: expected \[64, 64\], found \[32, 128\]")
