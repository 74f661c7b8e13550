"""Training: rows, joint training of adapters, pretraining of a small base."""

import os
import sys


def _wait_without_spinning() -> None:
    """Have torch's OpenMP threads sleep, not spin, while they wait for each other.

    A training step has over a thousand short parallel regions. Where something else wants a core too, a spinning
    thread is put aside just when its partner is waiting for it: several times slower steps were measured. The runtime
    reads the setting while torch is loaded, and it is taken back then, so that no child process inherits it.
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ["OMP_WAIT_POLICY"]


_wait_without_spinning()
