"""OpenTelemetry traces."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from deepseek_optimizer import load_model, load_tokenizer
from deepseek_optimizer.server.http.tracing import Tracer, otlp_exporter
from deepseek_optimizer.server.settings import ServerSettings
from deepseek_optimizer.serving import make_async_engine
from support.live_server import LiveServer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def traced(tiny_model):
    """traced(requests) -> the spans that they caused."""

    def run(requests):
        exporter = InMemorySpanExporter()
        engine = make_async_engine(
            load_model(tiny_model, kv_cache_memory=1 << 22), load_tokenizer(tiny_model), model_name="tiny"
        )
        live = LiveServer(engine, ServerSettings(), tracer=Tracer(exporter, "tiny"))
        with live:
            requests(live.client)
        return exporter.get_finished_spans()  # the application exports the rest when it ends

    return run


def test_spans(traced):
    def requests(client):
        body = {"prompt": "a secret prompt", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2, "ignore_eos": True}
        for _ in range(2):
            client.post("/v1/completions", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).raise_for_status()
        client.get("/health")

    spans = traced(requests)
    http = [span for span in spans if span.name == "POST /v1/completions"]
    engine = [span for span in spans if span.name == "llm_request"]
    assert len(http) == 2 and len(engine) == 4 and len(spans) == 6
    assert {format(span.context.trace_id, "032x") for span in spans} == {TRACE}
    assert {format(span.parent.span_id, "016x") for span in http} == {PARENT}
    assert {span.parent.span_id for span in engine} == {span.context.span_id for span in http}
    assert http[0].attributes["http.response.status_code"] == 200 and http[0].attributes["http.route"] == "/v1/completions"
    values = engine[0].attributes
    assert values["gen_ai.request.model"] == "tiny" and values["gen_ai.usage.input_tokens"] == len("a secret prompt")
    assert values["gen_ai.usage.output_tokens"] == 3 and values["gen_ai.response.finish_reasons"] == ("length",)
    assert values["gen_ai.request.temperature"] == 0.5 and values["gen_ai.request.top_p"] == 0.9
    first, whole = values["gen_ai.latency.time_to_first_token"], values["gen_ai.latency.e2e"]
    assert 0 <= values["gen_ai.latency.time_in_queue"] <= first <= whole
    for span in engine:
        parent = next(one for one in http if one.context.span_id == span.parent.span_id)
        assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time + 10**9
    assert "secret" not in json.dumps([span.to_json() for span in spans])


def test_requests_without_a_trace_begin_one(traced):
    def requests(client):
        for header in ("", "nonsense", "00-0-0-00"):
            client.post("/v1/embeddings", json={"input": "x"}, headers={"traceparent": header}).raise_for_status()
        client.post("/v1/embeddings", json={"input": "x" * 5000})

    spans = traced(requests)
    http = [span for span in spans if span.parent is None]
    assert len(http) == 4 and len({span.context.trace_id for span in http}) == 4
    assert [span.attributes["http.response.status_code"] for span in http] == [200, 200, 200, 400]
    engine = [span for span in spans if span.parent is not None]
    assert [span.attributes["gen_ai.operation.name"] for span in engine] == ["embeddings"] * 3
    assert all(span.status.status_code is StatusCode.UNSET for span in spans)


def test_the_exporter():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    assert otlp_exporter("http://localhost:4318/v1/traces")._endpoint == "http://localhost:4318/v1/traces"
