"""What the jobs of a process cost: CPU time as the kernel counts it, shared out among them."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Mapping

from lorikeet.registry.records import Job

FIELD = "core_seconds"  # of a job's progress, which outlives the process


def process_seconds() -> float:
    """CPU seconds of this process since its start, all its threads, and of the processes it has waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, kinds))


class Usage:
    """Core-seconds of each job, those of its earlier attempts among them.

    What the process uses belongs to its jobs from its start on: whatever was not shared out goes with the next
    `share`. Steps that an attempt lost and another took again count twice, as they were paid for twice.
    """

    def __init__(self, jobs: Iterable[Job], clock: Callable[[], float] = process_seconds) -> None:
        self._seconds = {job.id: float((job.progress or {}).get(FIELD) or 0.0) for job in jobs}
        self._clock = clock
        self._shared = 0.0

    def share(self, weights: Mapping[str, float]) -> None:
        """What was used since the last time goes to these jobs, by id: in proportion, or evenly where all are 0."""
        if not weights:
            return
        now, total = self._clock(), sum(weights.values())
        used, self._shared = now - self._shared, now
        for job_id, weight in weights.items():
            self._seconds[job_id] += used * (weight / total if total > 0 else 1 / len(weights))

    def of(self, job_id: str) -> float:
        """Seconds so far, to the millisecond."""
        return round(self._seconds[job_id], 3)
