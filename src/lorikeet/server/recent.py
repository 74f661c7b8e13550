"""What requests saw a moment ago, for people who look on: latencies of the last minute, tokens of the last ten.

Prometheus keeps counters since the start; nobody can read "now" from those without asking twice.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW = 60.0  # seconds of latencies
HISTORY = 600  # seconds of token counts
RATE = 5  # seconds that the present throughput is the mean of
SAMPLES = 20_000  # latencies kept at most
ADAPTERS = 4096  # whose use is remembered at most


@dataclass(slots=True)
class Use:
    """What one tenant's requests on one adapter, by its exact name, are up to. `digest` None is the base."""

    name: str
    tenant: str
    digest: str | None
    waiting: int = 0  # no token yet
    running: int = 0
    requests: int = 0  # since the start
    last_used: float = 0.0


class Recent:
    """Times in seconds; `clock` gives those since the epoch."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._first: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        self._between: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        self._tokens: OrderedDict[int, int] = OrderedDict()  # by second
        self._uses: OrderedDict[tuple[str, str], Use] = OrderedDict()

    # --- what happens -------------------------------------------------------------------------------------------

    def begin(self, name: str, tenant: str, digest: str | None) -> Use:
        """A request was submitted."""
        use = self._uses.pop((tenant, name), None) or Use(name, tenant, digest)
        self._uses[tenant, name] = use
        use.digest, use.last_used = digest, self._clock()
        use.requests += 1
        use.waiting += 1
        while len(self._uses) > ADAPTERS:
            self._uses.popitem(last=False)
        return use

    def first(self, seconds: float) -> None:
        self._first.append((self._clock(), seconds))

    def between(self, seconds: float, count: int) -> None:
        """`count` tokens came `seconds` apart."""
        now = self._clock()
        self._between.extend([(now, seconds)] * count)

    def tokens(self, count: int) -> None:
        second = int(self._clock())
        self._tokens[second] = self._tokens.get(second, 0) + count
        while next(iter(self._tokens)) < second - HISTORY:
            self._tokens.popitem(last=False)

    # --- what is shown ------------------------------------------------------------------------------------------

    @property
    def uses(self) -> list[Use]:
        """The latest first."""
        return list(reversed(self._uses.values()))

    def tokens_per_second(self) -> float:
        """Over the last whole seconds: the one that has just begun would pull it down."""
        second = int(self._clock())
        return sum(self._tokens.get(second - i, 0) for i in range(1, RATE + 1)) / RATE

    def history(self) -> list[tuple[int, int]]:
        """(second, tokens) of the past, the oldest first; seconds without tokens between are 0."""
        second = int(self._clock())
        known = [one for one in self._tokens if one >= second - HISTORY]
        return [(one, self._tokens.get(one, 0)) for one in range(min(known, default=second), second)]

    def first_percentiles(self, *shares: float) -> list[float | None]:
        return _percentiles(self._first, self._clock() - WINDOW, shares)

    def between_percentiles(self, *shares: float) -> list[float | None]:
        return _percentiles(self._between, self._clock() - WINDOW, shares)


def _percentiles(samples: deque[tuple[float, float]], since: float, shares: tuple[float, ...]) -> list[float | None]:
    """The smallest value that at least this share of the samples does not exceed; None without samples."""
    while samples and samples[0][0] < since:
        samples.popleft()
    values = sorted(value for _, value in samples)
    if not values:
        return [None for _ in shares]
    return [values[max(0, -int(-share * len(values) // 1) - 1)] for share in shares]
