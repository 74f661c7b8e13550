"""`python -m lorikeet.job ORDERS`: run the jobs that the file names. The supervisor starts it and watches it.

SIGTERM: checkpoints are written and the jobs go back to the queue. Exit codes: 0 is what the catalog says; anything
else is a process that broke down with its jobs.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from lorikeet.engine.lifeline import die_with_parent
from lorikeet.job.orders import NICENESS, Orders, read_orders
from lorikeet.job.reporter import Pulse, Reporter
from lorikeet.registry.home import Home, open_home


def main() -> None:
    die_with_parent()
    os.nice(NICENESS)
    go_first_when_memory_ends()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    orders = read_orders(Path(sys.argv[1]))
    home = open_home(Path(orders.home), catalog=orders.catalog, blobs=orders.blobs)
    try:
        run(orders, home)
    finally:
        home.close()


def go_first_when_memory_ends() -> None:
    """Of this and what it starts: a job can be tried again, a server that is killed takes everybody's work along."""
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")


def run(orders: Orders, home: Home) -> None:
    """The jobs of one kind, which were claimed together."""
    from lorikeet.job.evaluation import run_evaluation
    from lorikeet.job.training import TrainingRun
    from lorikeet.train.trainer import stop_on_signal

    if orders.threads is not None:
        import torch

        torch.set_num_threads(orders.threads)
    reporters = [Reporter(home.catalog, lease, home.folder, orders.lease_seconds) for lease in orders.leases]
    with Pulse(reporters), stop_on_signal() as asked_to_leave:
        training = [one for one in reporters if one.job.kind == "train"]
        if training:
            TrainingRun(home, orders.model, training).run(asked_to_leave)
        for one in reporters:
            if one.job.kind == "evaluate":
                run_evaluation(home, orders.model, one, asked_to_leave)


if __name__ == "__main__":
    main()
