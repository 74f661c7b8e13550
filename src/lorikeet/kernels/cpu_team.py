"""Threads that stay together: one parallel region for many kernels, with a barrier where one reads what another wrote.

A region costs several microseconds to enter and to leave, a barrier a fraction of one; a step of a small model has
hundreds of kernels.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import ctypes
import platform
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from lorikeet.kernels.cpu_runtime import device_function, hold, intrinsic, kernel, share_threads, use_threads

SPINS = 1 << 12  # looks at the counter, each a `pause`, before the processor is offered to another thread
PATIENCE = 1 << 22  # looks after which a thread of the probe says that it is alone
I64 = ir.IntType(64)


@intrinsic
def arrive(typing_context: Any, counter: Any) -> Any:
    """Add one to the int64 at `counter` for all threads to see, with all that was written before; its old value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def look(typing_context: Any, counter: Any) -> Any:
    """The int64 at `counter`, and with it all that was written before it got this value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(typing_context: Any) -> Any:
    """Wait some cycles, for a loop that looks at memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            builder.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "pause", "", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing_context: Any) -> Any:
    """Let another thread have this processor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@device_function
def meet(counter, parts):
    """Return once all `parts` threads are here. The counter only grows, so that no one has to put it back."""
    if parts == 1:
        return
    last = (arrive(counter) // parts + 1) * parts
    looks = 0
    while look(counter) < last:
        pause()
        looks += 1
        if looks > SPINS:
            give_way()


@kernel
def probe_kernel(counter, met, parts):
    use_threads(parts)
    for part in numba.prange(parts):
        arrive(counter)
        looks = 0
        while look(counter) < parts and looks < PATIENCE:
            pause()
            looks += 1
        met[part] = look(counter) >= parts


def meets(parts: int) -> bool:
    """Whether `parts` iterations of a loop run at the same time here, each on a thread of its own."""
    counter, met = np.zeros(1, np.int64), np.zeros(parts, np.int64)
    probe_kernel(counter.ctypes.data, met, parts)
    hold(counter)
    return bool(met.all())


def team() -> int:
    """How many threads may meet: as many as torch has in the calling thread, or one where they do not run at once.

    One also where OMP_DYNAMIC lets the runtime give fewer threads than asked for whenever the machine is busy: those
    that came would wait for ever.
    """
    parts = share_threads()
    if parts == 1 or ctypes.CDLL(None).omp_get_dynamic() or not meets(parts):
        return 1
    return parts
