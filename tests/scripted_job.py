"""A job process that trains nothing: a step is a nap. Its checkpoint is the number of steps, its adapter a fixed one.

`epochs` of the recipe are the steps; `{"description": "die at 5"}` kills it at step 5 of its first attempt, and
`{"description": "hold 300 at 5"}` has it take 300 MiB at step 5 of each.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np

from lorikeet.adapters.configs import LoraConfig
from lorikeet.adapters.files import write_peft
from lorikeet.engine.lifeline import die_with_parent
from lorikeet.errors import LorikeetError
from lorikeet.job import reporter as reporting
from lorikeet.job.orders import job_folder, read_orders
from lorikeet.job.reporter import Pulse, Reporter
from lorikeet.registry.home import Home, open_home

STEP_SECONDS = 0.02
HELD: list[np.ndarray] = []


def write_adapter(folder: Path, seed: int = 0) -> Path:
    """A LoRA adapter for the scripted engine's model: one layer, eight wide."""
    random = np.random.default_rng(seed)
    module = "model.layers.0.self_attn.q_proj"
    pair = tuple(random.standard_normal((2, 8), dtype=np.float32) for _ in "AB")
    config = LoraConfig(r=2, alpha=2.0, use_rslora=False, target_modules=("q_proj",))
    write_peft(folder, config, {module: (pair[0], pair[1])}, base_name="scripted")
    return folder


def main() -> None:
    die_with_parent()
    reporting.FLUSH_SECONDS = 0.05  # tests do not wait for its news
    leaving: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: leaving.append(1))
    orders = read_orders(Path(sys.argv[1]))
    home = open_home(Path(orders.home), catalog=orders.catalog, blobs=orders.blobs)
    reporters = [Reporter(home.catalog, lease, home.folder, orders.lease_seconds) for lease in orders.leases]
    with Pulse(reporters):
        for reporter in reporters:
            reporter.stage("training", "naps", joined=len(reporters))
        active = list(reporters)
        while active:
            if leaving:
                for one in active:
                    one.release("leaving")
                return
            active = [one for one in active if advance(home, one, len(reporters))]
            time.sleep(STEP_SECONDS)


def advance(home: Home, reporter: Reporter, joined: int) -> bool:
    """One step; False when the job is over."""
    job = reporter.job
    checkpoint = job_folder(home.folder, job.id) / "step"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    if reporter.over:
        return False
    if reporter.stopping:
        reporter.stopped(f"stopped at step {step}")
        return False
    steps = int(job.spec["recipe"]["epochs"])
    if step < steps:
        step += 1
        fresh = checkpoint.with_suffix(".new")
        fresh.write_text(str(step))
        fresh.replace(checkpoint)
        reporter.note([{"step": step, "split": "train", "loss": 1 / step}], {"step": step, "steps": steps})
    dying = re.search(r"die at (\d+)", job.description)
    if dying and job.attempts == 1 and step >= int(dying[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    holding = re.search(r"hold (\d+) at (\d+)", job.description)
    if holding and step >= int(holding[2]) and not HELD:
        HELD.append(np.ones(int(holding[1]) * 2**20, np.uint8))
    if step < steps:
        return True
    try:
        content = home.read_adapter(write_adapter(checkpoint.parent / "adapter", steps))
        reporter.finish(content, {"steps": step, "joined": joined, "train_seconds": 0.1})
    except LorikeetError as error:
        reporter.fail(error.info())
    return False


if __name__ == "__main__":
    main()
