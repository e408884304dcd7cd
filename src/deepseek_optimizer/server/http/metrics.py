"""HTTP metrics, in the engine's registry. The names are those of vLLM's server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class HttpMetrics:
    """Counts and times requests. `handler` is the pattern of a route, never a client's path, so that there are few labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests", "Requests by handler, method and status.", ("handler", "method", "status"), registry=registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Time from a request's headers to the end of its response.",
            ("handler", "method"),
            buckets=_SECONDS,
            registry=registry,
        )

    def record(self, handler: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(handler, method, str(status)).inc()
        self._seconds.labels(handler, method).observe(seconds)
