"""What Prometheus reads: requests, tokens and errors by adapter, latencies, and the engine's gauges."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lorikeet.engine.link import EngineClient
from lorikeet.server.recent import Recent, Use
from lorikeet.types import EngineStats

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of a page

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_WELL = {"stop", "length"}


class Metrics:
    """One registry a server. The label `adapter` holds names that were resolved, so clients cannot invent series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recent = Recent()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lorikeet_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"lorikeet_{name}", text, buckets=buckets, registry=self.registry)

        self._requests = counter("requests", "Generations that ended, by how", "adapter", "outcome")
        self._prompt = counter("prompt_tokens", "Tokens of prompts", "adapter")
        self._generated = counter("generated_tokens", "Tokens generated", "adapter")
        self._errors = counter("errors", "Generations that failed, by error code", "adapter", "code")
        self.refused = counter("refused_requests", "HTTP requests answered with an error, by code", "code")
        self._first = histogram("time_to_first_token_seconds", "From submission to the first token", _SECONDS)
        self._between = histogram("inter_token_seconds", "Between the tokens of one generation", _BETWEEN)
        self._whole = histogram("generation_seconds", "From submission to the last token", _SECONDS)
        self._up = Gauge("lorikeet_engine_up", "The engine takes requests", registry=self.registry)
        self._restarts = Gauge("lorikeet_engine_restarts", "Engine processes replaced", registry=self.registry)
        self._in_flight = Gauge("lorikeet_requests_in_flight", "Generations not ended", registry=self.registry)
        self._adapters = {
            name: Gauge(f"lorikeet_adapter_{name}", text, ("digest",), registry=self.registry)
            for name, text in {
                "resident": "The adapter is in the slab",
                "running": "Sequences that use the adapter now",
                "hits": "Admissions that used the adapter",
            }.items()
        }
        self._engine = {
            name: Gauge(f"lorikeet_engine_{name}", name.replace("_", " "), registry=self.registry)
            for name in EngineStats.__struct_fields__
            if name != "adapters"
        }

    def start(self, adapter: str, prompt_tokens: int, *, digest: str | None = None, tenant: str = "") -> Watch:
        self._prompt.labels(adapter).inc(prompt_tokens)
        return Watch(self, adapter, self.recent.begin(adapter, tenant, digest))

    async def page(self, engine: EngineClient) -> bytes:
        """The text Prometheus reads; the engine's own gauges are those of this moment."""
        self._up.set(engine.ready)
        self._restarts.set(engine.restarts)
        self._in_flight.set(engine.in_flight)
        if engine.ready:
            self._show(await engine.stats())
        return generate_latest(self.registry)

    def _show(self, stats: EngineStats) -> None:
        for name, gauge in self._engine.items():
            gauge.set(getattr(stats, name))
        for name, gauge in self._adapters.items():
            gauge.clear()
            for adapter in stats.adapters:
                gauge.labels(adapter.digest[:12]).set(getattr(adapter, name))


class Watch:
    """The clock of one generation."""

    def __init__(self, metrics: Metrics, adapter: str, use: Use) -> None:
        self._metrics, self._adapter, self._use = metrics, adapter, use
        self._started = self._last = time.perf_counter()
        self._count = 0

    def tokens(self, count: int) -> None:
        """`count` tokens have come."""
        if not count:
            return
        now = time.perf_counter()
        recent = self._metrics.recent
        if self._count:
            for _ in range(count):
                self._metrics._between.observe((now - self._last) / count)
            recent.between((now - self._last) / count, count)
        else:
            self._metrics._first.observe(now - self._started)
            recent.first(now - self._started)
            self._use.waiting -= 1
            self._use.running += 1
        recent.tokens(count)
        self._last = now
        self._count += count

    def end(self, outcome: str) -> None:
        metrics = self._metrics
        if self._count:
            self._use.running -= 1
        else:
            self._use.waiting -= 1
        metrics._generated.labels(self._adapter).inc(self._count)
        metrics._requests.labels(self._adapter, outcome).inc()
        if outcome in _WELL:
            metrics._whole.observe(time.perf_counter() - self._started)
        elif outcome != "cancelled":
            metrics._errors.labels(self._adapter, outcome).inc()
