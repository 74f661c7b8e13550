"""The kernels on a CUDA device: Triton where something is fused, gathered or paged, vendor libraries for the rest.

Thin glue: the kernels lie in `gpu_*.py`, what each means is said in `reference.py`.
"""

from __future__ import annotations

from lorikeet.kernels.reference import ReferenceOps


class GpuOps(ReferenceOps):
    """As `ReferenceOps`, for inference in bf16 or fp32 on a CUDA device. Used by one thread at a time.

    Under Triton's interpreter (`TRITON_INTERPRET=1`, set before the first import) it takes tensors on the CPU.
    """
