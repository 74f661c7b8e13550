"""A rank that follows: loads its part of the model, then runs every step that the leader tells it, and nothing else."""

from __future__ import annotations

import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import zmq

from lorikeet import kernels
from lorikeet.adapters.compiled import open_compiled
from lorikeet.engine.engine import make_runner, make_slab
from lorikeet.engine.lifeline import die_with_parent
from lorikeet.engine.parallel import (
    Begin,
    Carried,
    FromFollower,
    Join,
    Loaded,
    Prefetch,
    Step,
    ToFollower,
    decode_to_follower,
    encode,
    has_copies,
)
from lorikeet.engine.plan import Outcome, Plan
from lorikeet.engine.runner import UNKNOWN, Launched, Runner
from lorikeet.engine.sizing import choose_device, choose_table, choose_weights
from lorikeet.engine.wire import Failed
from lorikeet.errors import LorikeetError
from lorikeet.kernels.precision import choose_dtype
from lorikeet.kernels.ranks import Ranks
from lorikeet.model import sources
from lorikeet.model import weights as model_weights
from lorikeet.model.shard import Shard
from lorikeet.types import ErrorInfo

log = logging.getLogger("lorikeet.follower")


class Link:
    """The follower's end of its socket."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.LINGER, 1000)  # milliseconds for the last words
        self._socket.bind(address)

    def receive(self) -> ToFollower:
        message: ToFollower = decode_to_follower(self._socket.recv())
        return message

    def send(self, message: FromFollower) -> None:
        self._socket.send(encode(message))

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class FollowingRunner(Runner):
    """The runner of any other rank: computes its part of every step, and reads what the leader has sampled."""

    def __init__(self, link: Link, ranks: Ranks, *args: Any, **sizes: Any) -> None:
        super().__init__(*args, **sizes)
        self._link, self._ranks = link, ranks
        self._keeps_sampled = True  # it never learns what the leader picked but by what is shared

    def _bring(self, plan: Plan, outcome: Outcome) -> None:
        super()._bring(plan, outcome)
        if has_copies(plan):
            self._link.send(Carried(outcome.failed_adapters, outcome.late_adapters))

    def _step(self, plan: Plan, launched: Launched) -> None:
        rows, batch, sampled, _ = self._begin(plan)
        self._forward(batch)
        if len(sampled):
            self._ranks.share(self._sampled)
            self._tokens[rows.slot[sampled], (rows.start + rows.count)[sampled]] = UNKNOWN


def follow(link: Link) -> int:
    """Until the leader is gone; the exit code where it cannot begin."""
    join = link.receive()
    assert isinstance(join, Join)
    config, ranks = join.config, join.config.tensor_parallel
    try:
        device = choose_device(config)
        if device != "cpu":
            torch.cuda.set_device(join.rank)
        elif join.threads is not None:
            torch.set_num_threads(join.threads)
        dtype = choose_dtype(config.dtype, device)
        make_weight, make_table = choose_weights(config, dtype, device), choose_table(config, device)
        folder = sources.find_model(config.model)
        spec, weights = model_weights.load(folder, dtype, make_weight, device, join.rank, ranks, make_table)
        ops = kernels.pick(device)
    except Exception as error:
        if not isinstance(error, LorikeetError):
            log.exception("rank %d could not load its part of the model", join.rank)
        link.send(Failed(_info_of(error, join.rank)))
        return 1
    link.send(Loaded())
    begin = link.receive()
    assert isinstance(begin, Begin)
    sizes = begin.sizes
    ops.ranks = Ranks(join.rank, ranks, Path(begin.meeting), device)
    local = Shard(spec, join.rank, ranks).local
    slab = make_slab(sizes, local, partial(open_compiled, rank=join.rank, ranks=ranks))
    runner = make_runner(partial(FollowingRunner, link, ops.ranks), local, weights, ops, slab, sizes, config)
    runner.warm()
    while True:
        match message := link.receive():
            case Step():
                runner.collect(runner.launch(message.plan))
            case Prefetch():
                runner.prefetch(message.adapter)
            case _:
                raise AssertionError(f"{message} is not for a follower that runs")


def _info_of(error: Exception, rank: int) -> ErrorInfo:
    if isinstance(error, LorikeetError):
        return error.info()
    message = f"rank {rank} could not load its part of the model: {type(error).__name__}: {error}"
    return ErrorInfo(code="internal_error", message=message)


def main() -> NoReturn:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the leader's to handle
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(name)s: %(message)s")
    code, link = 1, Link(sys.argv[-1])
    try:
        code = follow(link)
    except Exception:
        log.exception("a step failed on a rank that follows")
    link.close()
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
