"""Training: rows, joint training of adapters, pretraining of a small base."""

import os
import sys

SPINS = "100000"  # about a tenth of a millisecond


def _spin_briefly() -> None:
    """Have torch's OpenMP threads (GNU's runtime) spin for a moment, then sleep, while they wait for each other.

    A training step has over a thousand short parallel regions. Threads that sleep at once cost a third of the speed
    of an idle machine; threads that spin for long are put aside, where something else wants a core too, just when
    their partner is waiting for them. The runtime reads the setting while torch is loaded, and it is taken back then,
    so that no child process inherits it.
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        import torch  # noqa: F401
    finally:
        del os.environ["GOMP_SPINCOUNT"]


_spin_briefly()
