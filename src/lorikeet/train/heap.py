"""The C library's heap, set up for steps that take and free the same large blocks again and again."""

from __future__ import annotations

import ctypes

HEAP = 2**30 - 2**21  # bytes; less than the threshold above which blocks are mapped one by one


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks, and Linux to back them with huge pages.

    A step frees and takes the same activations again. Otherwise each block goes back to the kernel and is mapped and
    zeroed page by page on the next step, which costs more than computing it. The huge pages come from a stretch of
    the heap that is marked before anything uses it: address space only, until then. Does nothing where the C library
    is another.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc, free, madvise = libc.mallopt, libc.malloc, libc.free, libc.madvise
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold, hugepage = -1, -3, 14  # malloc.h, sys/mman.h
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
    malloc.restype = ctypes.c_void_p
    block, huge = malloc(ctypes.c_size_t(HEAP)), 2**21
    if block:
        start = -(-block // huge) * huge
        madvise(ctypes.c_void_p(start), ctypes.c_size_t((block + HEAP - start) // huge * huge), hugepage)
        free(ctypes.c_void_p(block))
