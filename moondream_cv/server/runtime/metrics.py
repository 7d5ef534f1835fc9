"""Prometheus metrics of a server."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moondream_cv.server.runtime.engine_loop import StepOutput

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server. Each server has a separate registry, so several servers can share a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "moondream_cv_requests", "HTTP requests.", ["dialect", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "moondream_cv_request_seconds",
            "Time from the first byte of a request to the last byte of its response.",
            ["dialect", "route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.skills = Counter(
            "moondream_cv_skill_requests", "Requests to the model.", ["skill", "outcome"], registry=self.registry
        )
        self.batch_size = Histogram(
            "moondream_cv_batch_rows", "Requests that decode in one step.", buckets=BATCH_SIZES, registry=self.registry
        )
        self.in_flight = Gauge(
            "moondream_cv_requests_taken", "Requests that hold a queue slot.", registry=self.registry
        )
        self.waiting = Gauge("moondream_cv_queue_depth", "Requests that wait for admission.", registry=self.registry)
        self.rejected = Counter(
            "moondream_cv_refused", "Requests rejected with 429 because the queue was full.", registry=self.registry
        )
        self.tokens = Counter("moondream_cv_tokens", "Tokens by kind.", ["kind"], registry=self.registry)
        self.image_cache = Counter(
            "moondream_cv_image_cache", "Lookups in the cache of encoded images.", ["outcome"], registry=self.registry
        )

    def record_step(self, output: StepOutput[Any]) -> None:
        """Record the output of one engine step."""
        if output.num_running:
            self.batch_size.observe(output.num_running)
        self.waiting.set(output.num_waiting)
        self.image_cache.labels("hit").inc(output.cache_hits)
        self.image_cache.labels("miss").inc(output.cache_misses)
        for _, usage in output.results.values():
            self.tokens.labels("prompt").inc(usage.prompt_tokens)
            self.tokens.labels("completion").inc(usage.completion_tokens)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
