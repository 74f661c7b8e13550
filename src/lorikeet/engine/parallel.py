"""Tensor parallelism: the engine's process is rank 0 and leads; every other rank is a process that follows it.

The leader tells its followers each step's plan and runs it as they do; tensors meet in `kernels.ranks`. It alone
samples: what it picked is shared where the next step reads it. Followers die with their leader. A follower that is gone
is an error of the step at hand, as if the leader's own device had failed.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import msgspec
import torch
import zmq

from lorikeet.config import EngineConfig
from lorikeet.engine.lifeline import child_command, exit_text
from lorikeet.engine.plan import Outcome, Plan
from lorikeet.engine.runner import Launched, Runner
from lorikeet.engine.sizing import Sizes
from lorikeet.engine.wire import Failed, Message
from lorikeet.errors import ConfigError, LorikeetError, UnavailableError
from lorikeet.kernels.ranks import Ranks
from lorikeet.types import AdapterCopy, AdapterInfo, ErrorInfo

log = logging.getLogger("lorikeet.engine")

COUNTS = (1, 2, 4, 8)
NOTICE = 2.0  # seconds from an error in a step until a rank that caused it is known to be gone
GRACE = 5.0  # seconds in which the engine may end by itself once a rank is gone
POLL = 100  # milliseconds


# --- messages -----------------------------------------------------------------------------------------------------


class Join(Message, frozen=True):
    """The first message to a follower: what to load, and which part."""

    config: EngineConfig
    rank: int
    threads: int | None  # on a CPU


class Begin(Message, frozen=True):
    """All ranks have loaded their part: meet at `meeting`, and make room for these sizes."""

    sizes: Sizes
    meeting: str


class Step(Message, frozen=True):
    plan: Plan


class Prefetch(Message, frozen=True):
    """A request waits for this adapter."""

    adapter: AdapterInfo


class Loaded(Message, frozen=True):
    """A follower's weights are in memory."""


class Carried(Message, frozen=True):
    """A follower has carried out a plan with copies of adapters, but for these."""

    failed: dict[str, ErrorInfo]
    late: set[str]


ToFollower = Join | Begin | Step | Prefetch
FromFollower = Loaded | Failed | Carried


def _name_of(value: Any) -> str:
    if not isinstance(value, torch.dtype):
        raise NotImplementedError(f"{type(value).__name__} is in no message")
    return str(value).removeprefix("torch.")


def _dtype_of(kind: type, name: str) -> Any:
    return getattr(torch, name)


encode = msgspec.msgpack.Encoder(enc_hook=_name_of).encode
decode_to_follower = msgspec.msgpack.Decoder(ToFollower, dec_hook=_dtype_of).decode
decode_from_follower = msgspec.msgpack.Decoder(FromFollower).decode


# --- what is possible ---------------------------------------------------------------------------------------------


def check_ranks(config: EngineConfig, device: str) -> None:
    """Raises ConfigError for a number of ranks that cannot be, or that there are not enough GPUs for."""
    ranks = config.tensor_parallel
    if ranks not in COUNTS:
        counts = ", ".join(map(str, COUNTS[:-1]))
        raise ConfigError(f"tensor_parallel: found {ranks}; expected {counts} or {COUNTS[-1]}", param="tensor_parallel")
    if ranks > 1 and device != "cpu" and (devices := torch.cuda.device_count()) < ranks:
        raise ConfigError(
            f"tensor_parallel: found {ranks}; expected at most {devices}, the number of CUDA devices here",
            hint="each rank takes one: lower --tensor-parallel, or make more devices visible",
            param="tensor_parallel",
        )


def threads_of_rank(config: EngineConfig) -> int | None:
    """CPU threads of each rank where ranks share the processor; None: as torch chooses."""
    if config.tensor_parallel == 1:
        return config.threads
    return max((config.threads or os.cpu_count() or 1) // config.tensor_parallel, 1)


# --- the leader ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    socket: zmq.Socket[bytes]


@dataclass
class _Fate:
    """What the watching thread and the leader share."""

    lost: str | None = None
    noticed: threading.Event = field(default_factory=threading.Event)
    closing: bool = False
    ranks: Ranks | None = None


class Followers:
    """Ranks 1 and up, as rank 0 sees them: starts them, so that they load their parts while it loads its own.

    `on_lost` is called when a rank is gone and the engine did not end of it for GRACE seconds: it may wait for a
    device that waits for that rank.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_lost: Callable[[], None] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self.count = config.tensor_parallel
        self._fate = _Fate()
        self._folder = Path(tempfile.mkdtemp(prefix="lorikeet-ranks-"))  # mode 700: nobody else can speak to them
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._followers: list[_Follower] = []
        self.close = weakref.finalize(self, _end, self._fate, self._followers, self._context, self._folder)
        for rank in range(1, self.count):
            self._start(rank, config, list(command or child_command("lorikeet.engine.follower")))
        threading.Thread(target=_watch, args=(self._fate, self._followers, on_lost), name="ranks", daemon=True).start()

    def _start(self, rank: int, config: EngineConfig, command: list[str]) -> None:
        address = f"ipc://{self._folder}/rank-{rank}"
        socket = self._context.socket(zmq.PAIR)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.connect(address)  # a socket that is bound would wait for somebody to connect before it sends
        threads = threads_of_rank(config)
        environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        # Its standard output is a pipe that it never writes to: end of file means it is gone.
        process = subprocess.Popen([*command, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._followers.append(_Follower(rank, process, socket))
        socket.send(encode(Join(config, rank, threads)))

    @property
    def pids(self) -> list[int]:
        return [one.process.pid for one in self._followers]

    def join(self, sizes: Sizes, device: str) -> Ranks:
        """Wait until all have loaded their part, and meet them. Raises the error of one that could not."""
        for one in self._followers:
            message = self._receive(one)
            if isinstance(message, Failed):
                raise LorikeetError.from_info(message.error)
        meeting = self._folder / "meeting"
        self.send(Begin(sizes, str(meeting)))
        with self.watched():
            self._fate.ranks = Ranks(0, self.count, meeting, device)
        return self._fate.ranks

    def send(self, message: ToFollower) -> None:
        data = encode(message)
        for one in self._followers:
            one.socket.send(data)

    def carried(self) -> list[Carried]:
        """What each answers to a plan with copies of adapters."""
        answers = [self._receive(one) for one in self._followers]
        return [answer for answer in answers if isinstance(answer, Carried)]

    def check(self) -> None:
        """Raises UnavailableError when one is gone."""
        if self._fate.lost is not None:
            raise UnavailableError(
                self._fate.lost, hint="try again shortly; the log says why it ended", retry_after=3.0
            )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What runs inside needs all ranks: an error that comes of a lost one is told as that, unless it says what is
        wrong by itself. After any, an interrupt too, the ranks are not at the same place any more, and nothing can
        follow."""
        try:
            self.check()
            yield
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, LorikeetError):
                self._fate.noticed.wait(NOTICE)
                self.check()
            self._fate.lost = self._fate.lost or (
                f"a step ended in the middle ({type(error).__name__}); the ranks that hold the model are out of step"
            )
            self._fate.noticed.set()
            raise
        self.check()

    def _receive(self, one: _Follower) -> FromFollower:
        while not one.socket.poll(POLL):
            if self._fate.noticed.is_set() and not one.socket.poll(POLL):  # its last words may be on their way
                self.check()
        message: FromFollower = decode_from_follower(one.socket.recv())
        return message


def _watch(fate: _Fate, followers: list[_Follower], on_lost: Callable[[], None] | None) -> None:
    with DefaultSelector() as selector:
        for one in followers:
            assert one.process.stdout is not None
            selector.register(one.process.stdout, EVENT_READ, one)
        lost: _Follower = selector.select()[0][0].data
    code = lost.process.wait()
    if fate.closing:
        return
    fate.lost = f"rank {lost.rank} of the {len(followers) + 1} that hold the model ended ({exit_text(code)})"
    log.error(fate.lost)
    fate.noticed.set()
    if fate.ranks is not None:
        fate.ranks.abort()  # a step that waits for that rank, kernels of a graph too, ends
    if on_lost is not None:
        time.sleep(GRACE)
        if not fate.closing:
            on_lost()


def _end(fate: _Fate, followers: list[_Follower], context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
    fate.closing = True
    for one in followers:
        one.process.kill()
    for one in followers:
        one.process.wait()
        one.socket.close()
        for pipe in (one.process.stdin, one.process.stdout):
            assert pipe is not None
            pipe.close()
    if fate.ranks is not None:
        fate.ranks.leave()
    context.term()
    shutil.rmtree(folder, ignore_errors=True)


class LeadingRunner(Runner):
    """The runner of rank 0: each step is the followers' too."""

    def __init__(self, followers: Followers, ranks: Ranks, *args: Any, **sizes: Any) -> None:
        with followers.watched():  # ranks may meet already: to calibrate a cache
            super().__init__(*args, **sizes)
        self._followers, self._ranks = followers, ranks
        self._keeps_sampled = True

    def warm(self) -> None:
        with self._followers.watched():
            super().warm()

    def prefetch(self, adapter: AdapterInfo) -> None:
        self._followers.send(Prefetch(adapter))
        super().prefetch(adapter)

    def launch(self, plan: Plan) -> Launched:
        with self._followers.watched():
            self._followers.send(Step(plan))
            return super().launch(plan)

    def collect(self, launched: Launched) -> Outcome:
        with self._followers.watched():
            return super().collect(launched)

    def close(self) -> None:
        self._followers.close()

    def _bring(self, plan: Plan, outcome: Outcome) -> None:
        """An adapter is there when every rank has its part."""
        super()._bring(plan, outcome)
        if has_copies(plan):
            for carried in self._followers.carried():
                outcome.failed_adapters.update(carried.failed)
                outcome.late_adapters |= carried.late
            outcome.late_adapters -= outcome.failed_adapters.keys()

    def _step(self, plan: Plan, launched: Launched) -> None:
        super()._step(plan, launched)
        if any(sequence.samples for sequence in plan.sequences):
            self._ranks.share(self._sampled)


def has_copies(plan: Plan) -> bool:
    """Whether followers answer it with `Carried`."""
    return any(isinstance(instruction, AdapterCopy) for instruction in plan.adapters)
