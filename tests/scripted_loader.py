"""A loader process that does as told: the name of the folder is the order."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import lorikeet.engine.loader as loader
from lorikeet.engine.lifeline import die_with_parent
from lorikeet.engine.wire import Compile, LoaderSettings, Resolved
from lorikeet.errors import AdapterError
from lorikeet.types import AdapterInfo


def compile_one(job: Compile, settings: LoaderSettings) -> Resolved:
    folder = Path(job.folder)
    if folder.name.startswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if folder.name.startswith("slow"):
        time.sleep(0.5)
    if folder.name.startswith("bad"):
        error = AdapterError(f"{folder}/adapter_model.safetensors: truncated", param="adapter_model.safetensors")
        return Resolved(job.job, error=error.info())
    log = folder / "compiled.log"
    with log.open("a") as file:
        file.write("compiled\n")
    info = AdapterInfo(digest=f"digest-{folder.name}", path=str(log), nbytes=64, max_rank=4, sites=2)
    return Resolved(job.job, adapter=info)


if __name__ == "__main__":
    die_with_parent()
    loader.compile_one = compile_one
    loader.run_jobs(sys.argv[-1])
