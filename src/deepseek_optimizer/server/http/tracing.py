"""OpenTelemetry traces: a span for each HTTP request, and one for each request to the engine within it.

The trace of a client's `traceparent` header (W3C Trace Context) is continued. The attributes of engine spans are the gen_ai.*
of OpenTelemetry's semantic conventions, and vLLM's `gen_ai.latency.*` in seconds. No prompt and no text is exported.
Needs the extra `tracing`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engine.metrics import EndedRequest
from ...engine.request import Finish, Request
from ...errors import MissingPackageError
from .paths import path_of

_SCOPE = "deepseek_optimizer.server"


class Tracer:
    """Creates and exports spans.

    Args:
        exporter: of OpenTelemetry, such as from `otlp_exporter`.
        model_name: name of the model in the API.
        clock: the engine's clock.
    """

    def __init__(self, exporter: Any, model_name: str, clock: Any = time.monotonic) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "deepseek-optimizer"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_SCOPE)
        self._model_name, self._clock = model_name, clock
        self._parents: dict[str, Any] = {}  # contexts by id of an engine request

    def span(self, scope: Scope) -> Any:
        """A context manager: the span of an HTTP request."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        return self._tracer.start_as_current_span(
            f"{scope['method']} request",
            context=extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "url.scheme": scope.get("scheme", "http")},
            record_exception=False,  # a message may contain parts of a prompt
            set_status_on_exception=False,
        )

    def submitted(self, request: Request) -> None:
        """Called when a request is submitted to the engine, in the context of the HTTP request that it belongs to."""
        from opentelemetry.context import get_current

        self._parents[request.id] = get_current()

    def ended(self, ended: EndedRequest, finish: Finish) -> None:
        """Called on the engine's thread when it has ended a request.

        Args:
            ended: its state.
            finish: why it ended.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode

        parent = self._parents.pop(ended.request.id, None)
        now, wall = self._clock(), time.time_ns()

        def at(moment: float) -> int:
            return wall - int((now - moment) * 1e9)

        span = self._tracer.start_span(
            "llm_request",
            context=parent,
            kind=SpanKind.INTERNAL,
            start_time=at(ended.arrived),
            attributes=_attributes(ended, finish, self._model_name, now),
        )
        if finish == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end(wall)

    def close(self) -> None:
        """Exports the remaining spans."""
        self._provider.shutdown()


def _attributes(ended: EndedRequest, finish: Finish, model_name: str, now: float) -> Mapping[str, Any]:
    request, sampling = ended.request, ended.request.sampling
    reads = request.embed or request.classify or bool(request.scored_tokens)
    values: dict[str, Any] = {
        "gen_ai.operation.name": "embeddings" if reads else "text_completion",
        "gen_ai.provider.name": "deepseek-optimizer",
        "gen_ai.request.model": model_name,
        "gen_ai.response.model": model_name,
        "gen_ai.request.id": request.id,
        "gen_ai.response.finish_reasons": (finish,),
        "gen_ai.usage.input_tokens": len(request.prompt),
        "gen_ai.usage.output_tokens": ended.generated,
        "gen_ai.usage.prompt_tokens": len(request.prompt),  # this and the next: vLLM's names
        "gen_ai.usage.completion_tokens": ended.generated,
        "gen_ai.usage.cache_read.input_tokens": ended.cached,
        "gen_ai.latency.e2e": now - ended.arrived,
        "gen_ai.latency.time_in_queue": (ended.started or now) - ended.arrived,
    }
    if not reads:
        values |= {"gen_ai.request.temperature": sampling.temperature, "gen_ai.request.top_p": sampling.top_p}
        if sampling.max_tokens is not None:
            values["gen_ai.request.max_tokens"] = sampling.max_tokens
    if (first := ended.first) is not None:
        values["gen_ai.latency.time_to_first_token"] = first - ended.arrived
        if ended.started is not None:
            values["gen_ai.latency.time_in_model_prefill"] = first - ended.started
        values["gen_ai.latency.time_in_model_decode"] = now - first
    return values


class Tracing:
    """Middleware: a span around each request.

    Args:
        app: the application.
        tracer: creates the spans.
        skip: paths without a span, such as those of probes.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, skip: frozenset[str]) -> None:
        self._app, self._tracer, self._skip = app, tracer, skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.trace import StatusCode

        if scope["type"] != "http" or path_of(scope) in self._skip:
            return await self._app(scope, receive, send)
        with self._tracer.span(scope) as span:

            async def send_with_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                    if (route := getattr(scope.get("route"), "path", None)) is not None:
                        span.set_attribute("http.route", route)
                        span.update_name(f"{scope['method']} {route}")
                await send(message)

            await self._app(scope, receive, send_with_status)


def otlp_exporter(endpoint: str) -> Any:
    """An exporter to an OTLP collector over HTTP.

    Args:
        endpoint: URL of the collector's traces, such as http://localhost:4318/v1/traces.

    Raises:
        MissingPackageError: the extra `tracing` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingPackageError("--otlp-traces-endpoint", "opentelemetry-exporter-otlp-proto-http", "tracing") from error
    return OTLPSpanExporter(endpoint=endpoint)
