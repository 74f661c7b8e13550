"""A job process as it is, but for its checkpoints, which it writes four times a second."""

from __future__ import annotations

from lorikeet.job import __main__ as process
from lorikeet.job import training

if __name__ == "__main__":
    training.CHECKPOINT_SECONDS = 0.25
    process.main()
