"""What job processes hold of the machine's memory, what each may hold, and what its jobs are told when it held more.

Watched from outside, twice a second: nothing inside a process limits what it holds. RLIMIT_DATA and RLIMIT_AS count
addresses, which thread stacks, heaps and GPU drivers reserve many times over; a control group of one's own takes root,
or a delegation that few containers have. What a process takes between two looks is bounded by nothing but the
machine, whose kernel then ends job processes first (`job.__main__`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from lorikeet.config import DEFAULTS, JudgeRecipe
from lorikeet.registry.records import Job
from lorikeet.types import ErrorInfo

LOOK_SECONDS = 0.5
MARGIN = 1.25  # times its estimate that a process may hold, whatever the others need
CODE = "job_out_of_memory"
_HELD = re.compile(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", re.MULTILINE)
_SHARED_OUT = re.compile(r"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s+(\d+) kB$", re.MULTILINE)


def allowed(estimate: int, others: int, budget: int) -> int:
    """Bytes that a process may hold: what the estimates of the `others` leave of the budget of all, and never less
    than its own estimate with a margin."""
    return max(int(estimate * MARGIN), budget - others)


def held(pid: int, limit: int = 0) -> int:
    """Bytes of memory that a process and those it has started hold; 0 once it is gone.

    What the kernel can drop, such as mapped files, does not count. What several of them share counts for each, unless
    that comes to more than `limit`: then it is shared out, which costs the kernel a walk through their page tables.
    """
    try:
        first = psutil.Process(pid)
        pids = [pid, *(one.pid for one in first.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    simply = sum(_simply_held(one) for one in pids)
    return simply if simply <= limit else sum(map(_fairly_held, pids))


def _simply_held(pid: int) -> int:
    said = _read(f"/proc/{pid}/status")
    if said is not None:
        return _sum(_HELD, said)
    try:  # not Linux
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _fairly_held(pid: int) -> int:
    said = _read(f"/proc/{pid}/smaps_rollup")
    return _sum(_SHARED_OUT, said) if said is not None and "Pss_Anon" in said else _simply_held(pid)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def _sum(pattern: re.Pattern[str], text: str) -> int:
    return sum(int(kilobytes) for kilobytes in pattern.findall(text)) * 1024


def too_much(job: Job, together: int, found: int, most: int) -> ErrorInfo:
    """What a job is told whose process, which it shared with others if `together` is more than 1, held too much.

    Of a joint run nobody knows whose memory it was: each job is tried alone.
    """
    if together > 1:
        return ErrorInfo(
            code=CODE, retryable=True,
            message=f"the process of {together} joined jobs held {gib(found)} of memory, expected at most {gib(most)}; "
            "each is tried alone",
        )  # fmt: skip
    recipe = job.spec.get("recipe") or {}
    return ErrorInfo(
        code=CODE, param="batch_rows" if job.kind == "train" else "max_tokens",
        message=f"the job's process held {gib(found)} of memory, expected at most {gib(most)} "
        f"(its estimate was {gib(job.memory)})",
        hint=f"start it anew with a lower {_what_counts(job.kind, recipe)}; or resume it on a server with a larger "
        "--job-memory",
    )  # fmt: skip


def _what_counts(kind: str, recipe: Mapping[str, Any]) -> str:
    """The fields that memory depends on, with the values they have."""
    if kind == "train":
        fields = {name: recipe.get(name) or getattr(DEFAULTS, name) for name in ("batch_rows", "rank", "max_length")}
        return " or ".join(f"{name} (now {value})" for name, value in fields.items())
    return f"max_tokens (now {recipe.get('max_tokens') or JudgeRecipe().max_tokens}), on shorter rows"


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
