"""Valid and invalid requests generated from the server's OpenAPI schema: no answer is a 5xx, and all match the schema. Invalid
requests are sent to a strict server, since others accept values of another JSON type.

DSO_SCHEMA_EXAMPLES: number of requests per operation; `make fuzz` tries 1,000.
"""

from __future__ import annotations

import copy
import os

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.errors import InvalidSchema
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from deepseek_optimizer.server.settings import ServerSettings
from support.chats import HERMES
from support.fake_engine import FakeEngine
from support.live_server import LiveServer

EXAMPLES = int(os.environ.get("DSO_SCHEMA_EXAMPLES", "50"))


def wrong_data_is_rejected(ctx, response, case):
    """`negative_data_rejection`, except for valid data: what is invalid for one branch of a union may be valid for another."""
    try:
        return negative_data_rejection(ctx, response, case)
    except AcceptedNegativeData:
        raw = case.operation.schema.raw_schema
        body = raw["paths"][case.operation.path][case.operation.method]["requestBody"]["content"].get("application/json")
        if body is None or not jsonschema_rs.is_valid({**body["schema"], "components": raw["components"]}, case.body):
            raise
        return None


@st.composite
def cases(draw, strategy):
    """The cases of a strategy, except where schemathesis changed the schema into one that nothing satisfies."""
    try:
        return draw(strategy)
    except InvalidSchema:
        reject()


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    wrong_data_is_rejected,
]


def schema_of(byte_tokenizer, strict):
    """Yields the OpenAPI schema of a server."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = HERMES
    engine = FakeEngine(tokenizer, script=lambda request: "short", context=512)
    with LiveServer(engine, ServerSettings(grammar_seconds=1.0, strict=strict)) as live:
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")
        assert live.client.get("/health").status_code == 200
        assert engine.admitted == 0 and engine.running == 0


@pytest.fixture(scope="module")
def api(byte_tokenizer):
    yield from schema_of(byte_tokenizer, strict=False)


@pytest.fixture(scope="module")
def strict_api(byte_tokenizer):
    yield from schema_of(byte_tokenizer, strict=True)


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/rerank"),
    ("POST", "/v1/score"),
    ("POST", "/classify"),
    ("POST", "/pooling"),
    ("POST", "/v1/files"),
    ("GET", "/v1/responses/{response_id}"),
    ("DELETE", "/v1/responses/{response_id}"),
    ("GET", "/v1/responses/{response_id}/input_items"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/api/chat"),
    ("POST", "/api/generate"),
    ("POST", "/api/embed"),
    ("POST", "/api/embeddings"),
    ("POST", "/api/show"),
    ("POST", "/api/pull"),
    ("GET", "/api/tags"),
    ("GET", "/api/ps"),
    ("GET", "/api/version"),
    ("POST", "/completion"),
    ("POST", "/embedding"),
    ("POST", "/infill"),
    ("POST", "/v1/fim/completions"),
    ("POST", "/apply-template"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/props"),
    ("GET", "/tokenizer_info"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/load"),
    ("GET", "/is_sleeping"),
    ("GET", "/slots"),
    ("POST", "/v1/chat/completions/input_tokens"),
    ("POST", "/v1/responses/input_tokens"),
]


def test_every_operation_is_tested(api):
    actual = {(result.ok().method.upper(), result.ok().path) for result in api.get_all_operations()}
    assert actual == set(OPERATIONS)


CASES = [
    (method, path, mode)
    for method, path in OPERATIONS
    for mode in GenerationMode
    if method == "POST" or path == "/v1/files" or mode is GenerationMode.POSITIVE  # the others have no inputs
]


@pytest.mark.parametrize("method,path,mode", CASES, ids=lambda value: getattr(value, "value", value))
def test_the_schema(request, method, path, mode):
    api = request.getfixturevalue("strict_api" if mode is GenerationMode.NEGATIVE else "api")

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(api[path][method].as_strategy(generation_mode=mode)))
    def run(case):
        case.validate_response(case.call(), checks=CHECKS)

    run()
