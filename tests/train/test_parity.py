"""Twenty steps follow peft with torch's AdamW, and serving's forward gives what training's gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import packed_batch, random_examples, resolved

from lorikeet.kernels.batch import Slab
from lorikeet.kernels.reference import ReferenceOps
from lorikeet.model.decoder import forward
from lorikeet.model.names import module_of
from lorikeet.model.weights import load
from lorikeet.train.adapter_run import AdapterRun
from lorikeet.train.joint import JointTrainer
from lorikeet.train.ops import TrainedAdapters, TrainOps

SETTINGS: dict[str, Any] = {
    "rank": 6, "alpha": 9, "batch_rows": 5, "epochs": 5, "schedule": "constant", "warmup": 0.0, "seed": 4,
    "learning_rate": 5e-3, "weight_decay": 0.1, "clip": 0.7,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_twenty_steps_follow_peft(checkpoint: Callable[..., Path], family: str) -> None:
    """Same rows, same initial weights: losses, gradient norms and final weights, with clipping and weight decay."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = checkpoint(family)
    spec, weights = load(folder, torch.float32)
    run = AdapterRun(resolved(**SETTINGS), spec, random_examples(20, vocabulary=300), [])
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=6, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for site, a, b in run.parameters.named_pairs():
            name = f"base_model.model.{module_of(site)}"
            theirs[f"{name}.lora_A.default.weight"].copy_(a)
            assert not theirs[f"{name}.lora_B.default.weight"].any() and not b.any()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == run.parameters.data.numel()
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.1)
    trainer = JointTrainer(spec, weights)
    trainer.add(run)
    losses = []
    for _ in range(20):
        share = run.next_rows(0)
        total, count = torch.zeros(()), 0
        for example in share.examples:
            labels = torch.full((len(example.tokens),), -100)
            (a, b), *_ = example.learned
            labels[a:b] = torch.tensor(example.tokens[a:b])
            logits = model(torch.tensor([example.tokens])).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            count += b - a
        loss = total / count
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.7)
        optimizer.step()
        optimizer.zero_grad()
        result = trainer.step()["a"]
        assert result.loss == pytest.approx(loss.item(), rel=1e-4)
        assert result.grad_norm == pytest.approx(norm.item(), rel=2e-3)
        losses.append(result.loss)
    assert min(losses[-4:]) < losses[0] - 0.5
    for site, a, b in run.parameters.named_pairs():
        name = f"base_model.model.{module_of(site)}"
        torch.testing.assert_close(theirs[f"{name}.lora_A.default.weight"].detach(), a, rtol=0, atol=2e-3)
        torch.testing.assert_close(theirs[f"{name}.lora_B.default.weight"].detach().T, b, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_served_is_trained(checkpoint: Callable[..., Path], dtype: torch.dtype) -> None:
    """Logits of the trainer's forward equal those of serving's, which holds the trained adapter in a slab."""
    spec, weights = load(checkpoint("llama"), dtype)
    run = AdapterRun(resolved(**SETTINGS), spec, random_examples(20, vocabulary=300), [], compute_dtype=dtype)
    trainer = JointTrainer(spec, weights)
    trainer.add(run)
    while trainer.active:
        trainer.step()
    slab = slab_of(run, len(spec.sites), dtype)
    batch = packed_batch([9, 4, 30], [0, 0, 0])
    with torch.no_grad():
        trained = forward(spec, weights, batch, TrainOps(batch), TrainedAdapters([run.parameters], [None]))
        served = forward(spec, weights, batch, ReferenceOps(), slab)
        bare = forward(spec, weights, batch, ReferenceOps(), empty_like(slab))
    assert (trained - bare).abs().mean() > 0.3
    if dtype == torch.float32:
        torch.testing.assert_close(trained, served, rtol=1e-4, atol=1e-4)
        return
    wide_spec, wide = load(checkpoint("llama"), torch.float32)
    with torch.no_grad():
        exact = forward(wide_spec, wide, batch, ReferenceOps(), slab_of(run, len(spec.sites), torch.float32))
    assert (trained - served).abs().mean() < 1.5 * (served - exact).abs().mean()
    assert (trained - exact).abs().mean() < 1.25 * (served - exact).abs().mean()


def slab_of(run: AdapterRun, sites: int, dtype: torch.dtype) -> Slab:
    parameters = run.parameters
    table = torch.zeros(1, sites, 5, dtype=torch.int64)
    for site, a, b in parameters.named_pairs():
        table[0, site.index] = torch.tensor(
            [a.storage_offset(), b.storage_offset(), site.d_in, site.d_out, parameters.rank]
        )
    return Slab(parameters.data.to(dtype), table, torch.full((1, sites), parameters.scale))


def empty_like(slab: Slab) -> Slab:
    return Slab(slab.data, torch.zeros_like(slab.table), slab.scale)
