"""Is joint training of six adapters at least 2.5 times as fast as transformers + peft training them in turn?

Same rows, same base (the embedded one), rank 16 on all linear layers, 32 rows of about 28 tokens a step and adapter,
bf16 autocast for peft. Steps of both are interleaved; a token is a token of a row, never padding. Needs the `dev`
extra. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorikeet.config import AdapterRecipe, TrainData, TrainRecipe, resolve_adapters
from lorikeet.kernels.precision import choose_dtype
from lorikeet.model.sources import find_model
from lorikeet.model.weights import load
from lorikeet.train.adapter_run import AdapterRun
from lorikeet.train.dataset import Example
from lorikeet.train.heap import keep_freed_memory
from lorikeet.train.joint import JointTrainer

ROWS, RANK, BAR = 32, 16, 2.5


def make_rows(count: int, vocabulary: int, seed: int) -> list[Example]:
    """Rows of 20 to 36 tokens, the last 3 to 6 of them learned."""
    draw = random.Random(seed)
    rows = []
    for line in range(count):
        tokens = [draw.randrange(16, vocabulary) for _ in range(draw.randint(21, 37))]
        rows.append(Example(line, tokens, ((len(tokens) - draw.randint(3, 6), len(tokens)),), str(line), str(line)))
    return rows


def joint_stepper(folder: Path, rows: list[list[Example]]) -> Callable[[], int]:
    """One optimizer step of every adapter in shared forward passes; returns the tokens it took."""
    spec, weights = load(folder, choose_dtype("auto"))
    trainer = JointTrainer(spec, weights)
    data = TrainData(train="-")
    for i, examples in enumerate(rows):
        recipe = AdapterRecipe(
            name=f"a{i}", data=data, prompt="", completion="", batch_rows=ROWS, rank=RANK, epochs=1e6
        )
        resolved = resolve_adapters(TrainRecipe(version=1, base="-", output="-", adapters=[recipe]))[0]
        trainer.add(AdapterRun(resolved, spec, examples, [], compute_dtype=choose_dtype("auto")))
    return lambda: sum(result.tokens for result in trainer.step().values())


def peft_stepper(folder: Path, rows: list[list[Example]]) -> Callable[[], int]:
    """One optimizer step of one adapter, the adapters in turn; returns the tokens it took."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config, "a0")
    for i in range(1, len(rows)):
        model.add_adapter(f"a{i}", config)
    model.train()
    optimizers = []
    for i in range(len(rows)):
        model.set_adapter(f"a{i}")
        optimizers.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, fused=True))
    turn = 0

    def step() -> int:
        nonlocal turn
        i = turn % len(rows)
        turn += 1
        model.set_adapter(f"a{i}")
        examples = rows[i][:ROWS]
        longest = max(len(example.tokens) for example in examples)
        tokens, labels = torch.zeros(ROWS, longest, dtype=torch.int64), torch.full((ROWS, longest), -100)
        mask = torch.zeros(ROWS, longest, dtype=torch.int64)
        for row, example in enumerate(examples):
            length, ((a, b),) = len(example.tokens), example.learned
            tokens[row, :length], mask[row, :length] = torch.tensor(example.tokens), 1
            labels[row, a:b] = tokens[row, a:b]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizers[i].step()
        optimizers[i].zero_grad()
        return sum(example.inputs for example in examples)

    return step


def seconds_a_token(step: Callable[[], int]) -> float:
    began = time.perf_counter()
    tokens = step()
    return (time.perf_counter() - began) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a base folder; default: the embedded base")
    parser.add_argument("--adapters", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    keep_freed_memory()
    folder = find_model(arguments.model)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    rows = [make_rows(ROWS, vocabulary, seed) for seed in range(arguments.adapters)]
    ours, theirs = joint_stepper(folder, rows), peft_stepper(folder, rows)
    for _ in range(2):
        ours(), theirs()
    pairs = [(seconds_a_token(ours), seconds_a_token(theirs)) for _ in range(arguments.pairs)]
    ratios = np.array([b / a for a, b in pairs])
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    speeds = [1 / float(np.median(column)) for column in zip(*pairs, strict=True)]
    print(f"joint {speeds[0]:,.0f} tokens/s, peft in turn {speeds[1]:,.0f} tokens/s")
    print(f"ratio {np.median(ratios):.2f} [{low:.2f}, {high:.2f}], bar {BAR}")
    result = {
        "benchmark": "training", "adapters": arguments.adapters, "pairs": arguments.pairs,
        "joint_tokens_per_second": speeds[0], "peft_tokens_per_second": speeds[1],
        "ratio": float(np.median(ratios)), "ratio_ci": [float(low), float(high)], "bar": BAR, "holds": bool(low >= BAR),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
