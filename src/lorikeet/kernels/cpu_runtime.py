"""Numba set up to share torch's OpenMP threads, and the few intrinsics that the CPU kernels are written with.

Kernels take addresses and sizes as plain integers: unpacking a NumPy array costs about a microsecond an argument,
and a decode step launches over a hundred kernels. The dtype behind an address is told by a *tag*, a NumPy scalar
(`uint16` stands for the bits of a bfloat16). The wrappers in `cpu_*.py` check shapes and strides; kernels do not.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch  # before numba: its libgomp must be the process's first

os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from lorikeet.kernels.precision import native_bf16_products

llvmlite.binding.initialize_native_asmparser()  # for kernels with instructions that LLVM has no name for
config: Any = numba.config  # its settings are made at run time
# For the case that somebody imported numba before us and it has already read the environment.
config.THREADING_LAYER = os.environ["NUMBA_THREADING_LAYER"]
config.NUMBA_NUM_THREADS = int(os.environ["NUMBA_NUM_THREADS"])

# Reductions may be reordered and fused, but NaN and infinity keep their meaning.
FAST = {"contract", "reassoc", "nsz", "arcp"}
TAGS = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}


def tag_of(tensor: torch.Tensor) -> Any:
    """The tag of a tensor's dtype. Raises TypeError where kernels have none."""
    tag = TAGS.get(tensor.dtype)
    if tag is None:
        raise TypeError(f"CPU kernels compute in bfloat16 or float32, found {tensor.dtype}")
    return tag


def shares_openmp() -> bool:
    """Whether Numba's parallel regions run on the threads of torch's OpenMP runtime.

    Numba's wheel asks for libgomp under another file name than torch ships it, so both files may be mapped; what
    counts is which one its calls are bound to, and that is the first in the global scope.
    """
    bundled = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    try:
        runtime = ctypes.CDLL(str(bundled) if bundled.exists() else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        import_module("numba.np.ufunc.omppool")

        bound = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
        return config.THREADING_LAYER == "omp" and bound == ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, ImportError, AttributeError):
        return False


PARALLEL = shares_openmp()
if not PARALLEL:
    warnings.warn(
        f"Numba cannot share torch's OpenMP threads here (threading layer {config.THREADING_LAYER!r}): "
        "CPU kernels run on one thread. Install libgomp and leave NUMBA_THREADING_LAYER unset.",
        RuntimeWarning,
        stacklevel=2,
    )


def launch_threads() -> None:
    """Start Numba's threads now: doing so sets the number of threads of the OpenMP runtime, and with it torch's."""
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)


if PARALLEL:
    launch_threads()


def cache_folder() -> Path:
    """Where compiled kernels are kept: one folder per state of the sources.

    Numba notices a change in a kernel's own file, not in the functions that it calls from other files.
    """
    default = Path(os.environ.get("LORIKEET_CACHE", "~/.cache/lorikeet")).expanduser() / "numba"
    digest = hashlib.sha256(f"{numba.__version__} {PARALLEL} {native_bf16_products()}".encode())
    for source in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(source.read_bytes())
    return Path(os.environ.get("NUMBA_CACHE_DIR", default)) / digest.hexdigest()[:16]


config.CACHE_DIR = str(cache_folder())


SERIAL = 1 << 18  # products up to which one thread does it all: a team costs microseconds, and more on a busy machine


def share_threads() -> int:
    """How many threads a kernel may use: as many as torch in the calling thread."""
    return min(torch.get_num_threads(), int(config.NUMBA_NUM_THREADS)) if PARALLEL else 1


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call. LLVM decides whether to inline it."""
    return numba.njit(fastmath=FAST, error_model="numpy", nogil=True)(function)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with `prange` loops that Python calls; serial where the OpenMP runtime is not shared."""
    return numba.njit(cache=True, fastmath=FAST, error_model="numpy", nogil=True, parallel=PARALLEL)(function)


def intrinsic(function: Callable[..., Any]) -> Any:
    return extending.intrinsic(function)


def literal_intrinsic(function: Callable[..., Any]) -> Any:
    """An intrinsic that is told the values of constant integers among its arguments."""
    return extending.intrinsic(prefer_literal=True)(function)


@device_function
def hold(array: Any) -> None:
    """Keep a scratch array alive up to here: kernels know it by its address only."""


@intrinsic
def use_threads(typing_context: Any, parts: Any) -> Any:
    """How many threads the `prange` loops of the kernel that calls this start; with 1 no other thread is waited for.

    Calls the threading layer by its symbol: numba.set_num_threads holds its address, which cannot be cached.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if PARALLEL:
            i32 = ir.IntType(32)
            setter_type = ir.FunctionType(ir.VoidType(), [i32])
            setter = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
                builder.module, setter_type, "set_num_threads"
            )
            builder.call(setter, [builder.trunc(arguments[0], i32)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def emit_prefetch(builder: Any, address: Any) -> None:
    """Call the 64 bytes around an address into the second-level cache; any address will do."""
    i32, pointer = ir.IntType(32), builder.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
    builder.call(function, [pointer, *(ir.Constant(i32, value) for value in (0, 2, 1))])  # read, second level, data


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """`emit_prefetch` for kernels."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit_prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def at(typing_context: Any, address: Any, tag: Any) -> Any:
    """The address as a pointer to elements of the tag's type."""

    pointer: Any = types.CPointer(tag)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, tag), generate


@intrinsic
def size(typing_context: Any, tag: Any) -> Any:
    """Bytes of one element of the tag's type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), tag.bitwidth // 8)

    return types.int64(tag), generate


@intrinsic
def widen(typing_context: Any, value: Any) -> Any:
    """A stored element as float32: bfloat16 bits are the upper half of a float32's; int8 is a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value == types.float32:
            return arguments[0]
        if value == types.int8:
            return builder.sitofp(arguments[0], ir.FloatType())
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(value), generate


@intrinsic
def narrow(typing_context: Any, value: Any, tag: Any) -> Any:
    """A float32 as a stored element, rounded to nearest even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if tag == types.float32:
            return arguments[0]
        i32, i16 = ir.IntType(32), ir.IntType(16)

        def constant(number: int) -> Any:
            return ir.Constant(i32, number)

        bits = builder.bitcast(arguments[0], i32)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
        is_nan = builder.icmp_unsigned(">", builder.and_(bits, constant(0x7FFFFFFF)), constant(0x7F800000))
        return builder.trunc(builder.select(is_nan, constant(0x7FC0), rounded), i16)

    return tag(types.float32, tag), generate


@intrinsic
def exp2(typing_context: Any, value: Any) -> Any:
    """2 ** value in float32, within 2e-7 relative and vectorisable (libm's is not); below 2 ** -126 it stays there.

    The integer part goes to the exponent bits, a Taylor polynomial takes the rest. NaN stays NaN.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        f32, i32 = ir.FloatType(), ir.IntType(32)

        def number(x: float) -> Any:
            return ir.Constant(f32, float(np.float32(x)))

        z = arguments[0]
        z = builder.select(builder.fcmp_ordered("<", z, number(-126.0)), number(-126.0), z)
        z = builder.select(builder.fcmp_ordered(">", z, number(127.0)), number(127.0), z)
        rint = builder.module.declare_intrinsic("llvm.rint", (f32,), ir.FunctionType(f32, (f32,)))
        whole = builder.call(rint, (z,))
        fraction = builder.fsub(z, whole)
        shifted = builder.fadd(whole, number(12582912.0))  # 1.5 * 2 ** 23: the integer lands in the low bits
        coefficients = [math.log(2) ** k / math.factorial(k) for k in range(8)]
        total = number(coefficients[7])
        for c in reversed(coefficients[:7]):
            total = builder.fma(total, fraction, number(c))
        exponent = builder.shl(builder.bitcast(shifted, i32), ir.Constant(i32, 23))
        return builder.bitcast(builder.add(builder.bitcast(total, i32), exponent), f32)

    return types.float32(types.float32), generate


@intrinsic
def maximum(typing_context: Any, first: Any, second: Any) -> Any:
    """The larger float32; NaN when either is. LLVM vectorises a loop of these without assuming that NaN is absent."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        f32 = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.maximum", (f32,), ir.FunctionType(f32, (f32, f32)))
        return builder.call(function, arguments)

    return types.float32(types.float32, types.float32), generate
