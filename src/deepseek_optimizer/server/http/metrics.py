"""What is counted of HTTP, in the engine's own registry; names are those that vLLM's server has."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class HttpMetrics:
    """`handler` is a route's pattern, never a path that a client made up: labels stay few."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests", "Requests by handler, method and status.", ("handler", "method", "status"), registry=registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("handler", "method"),
            buckets=_SECONDS,
            registry=registry,
        )

    def record(self, handler: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(handler, method, str(status)).inc()
        self._seconds.labels(handler, method).observe(seconds)
