"""When does it help to train several jobs as one? CPU time of jobs in turn over that of the same jobs joined.

    python benchmarks/joining_jobs.py [--jobs 4] [--steps 4] [--pairs 9]

For batches of different sizes; one thread, so that CPU time is what counts and a busy machine does no harm.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from lorikeet.config import AdapterRecipe, TrainData, TrainRecipe, resolve_adapters
from lorikeet.kernels.precision import choose_dtype
from lorikeet.model.sources import find_model
from lorikeet.model.weights import load
from lorikeet.train.adapter_run import AdapterRun
from lorikeet.train.dataset import Example
from lorikeet.train.joint import JointTrainer


def make_run(name: str, rows: int, length: int, spec: object) -> AdapterRun:
    data = TrainData(train="-")
    recipe = AdapterRecipe(name=name, data=data, prompt="", completion="", batch_rows=rows, epochs=10**6)
    resolved = resolve_adapters(TrainRecipe(version=1, base="-", output="-", adapters=[recipe]))[0]
    random = np.random.default_rng(len(name))
    examples = [
        Example(i, random.integers(10, 1000, length).tolist(), ((length // 2, length),), "", "x") for i in range(rows)
    ]
    return AdapterRun(resolved, spec, examples, [], compute_dtype=choose_dtype("auto"))  # type: ignore[arg-type]


def seconds(trainers: list[JointTrainer], steps: int) -> float:
    began = time.process_time()
    for trainer in trainers:
        for _ in range(steps):
            trainer.step()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--base", default="lorikeet-nano")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec, weights = load(find_model(options.base), choose_dtype("auto"))
    results = []
    for rows, length in ((4, 24), (16, 24), (16, 64), (64, 64), (64, 128)):
        together, alone = JointTrainer(spec, weights), []
        for i in range(options.jobs):
            together.add(make_run(f"t{i}", rows, length, spec))
            alone.append(JointTrainer(spec, weights))
            alone[-1].add(make_run(f"a{i}", rows, length, spec))
        for trainers in ([together], alone):
            seconds(trainers, 1)
        ratios = []
        for _ in range(options.pairs):
            turn = seconds(alone, options.steps)
            ratios.append(turn / seconds([together], options.steps))
        means = np.mean(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        ratio, interval = round(float(np.mean(ratios)), 3), [round(float(low), 3), round(float(high), 3)]
        results.append({"rows": rows, "length": length, "tokens": rows * (length - 1), "ratio": ratio, "ci": interval})
        print(results[-1], flush=True)
    print(json.dumps({"jobs": options.jobs, "base": options.base, "in_turn_over_joined": results}))


if __name__ == "__main__":
    main()
