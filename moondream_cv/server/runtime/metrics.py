"""What a server counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moondream_cv.server.runtime.engine_loop import News

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Meters:
    """The counters of one server; each has its own registry, so that several fit into a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "moondream_cv_requests", "HTTP requests.", ["dialect", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "moondream_cv_request_seconds",
            "Time from a request's first byte to its answer's last.",
            ["dialect", "route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.skills = Counter(
            "moondream_cv_skill_requests", "Requests to the model.", ["skill", "outcome"], registry=self.registry
        )
        self.rows = Histogram(
            "moondream_cv_batch_rows", "Requests that decode in one step.", buckets=ROWS, registry=self.registry
        )
        self.taken = Gauge(
            "moondream_cv_requests_taken", "Requests that hold a place in the queue.", registry=self.registry
        )
        self.waiting = Gauge(
            "moondream_cv_queue_depth", "Requests that wait for room to decode.", registry=self.registry
        )
        self.refused = Counter(
            "moondream_cv_refused", "Requests answered with 429: the queue was full.", registry=self.registry
        )
        self.tokens = Counter(
            "moondream_cv_tokens", "Positions of the context, by what they hold.", ["kind"], registry=self.registry
        )
        self.image_cache = Counter(
            "moondream_cv_image_cache", "Images looked up among those encoded before.", ["outcome"],
            registry=self.registry,
        )  # fmt: skip

    def count(self, news: News[Any]) -> None:
        """Count what a step of the engine has brought."""
        if news.rows:
            self.rows.observe(news.rows)
        self.waiting.set(news.waiting)
        self.image_cache.labels("hit").inc(news.hits)
        self.image_cache.labels("miss").inc(news.misses)
        for _, usage in news.results.values():
            self.tokens.labels("prompt").inc(usage.prompt_tokens)
            self.tokens.labels("completion").inc(usage.completion_tokens)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)
